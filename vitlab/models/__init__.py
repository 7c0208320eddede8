"""timm models and what vitlab makes of them: compress, deploy."""
from vitlab.models import t2t  # timm knows its names from now on
from vitlab.models.compress import compress, set_trainable
from vitlab.models.deploy import deploy
from vitlab.models.support import attention_block, check_supported, encoder_of, is_merged, shape_of
