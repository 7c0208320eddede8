"""vitlab: makes vision transformers cheaper and faster, and shows why that works."""
import importlib
from typing import TYPE_CHECKING, Any

from vitlab.runtime.cores import share_cores
from vitlab.runtime.files import InputError

share_cores()                   # before torch is imported: it reads the environment once
__version__ = "0.1.0"
_PUBLIC = {"compress": "vitlab.models", "deploy": "vitlab.models", "shape_of": "vitlab.models",
           "set_trainable": "vitlab.models", "CompressionPlan": "vitlab.plan", "InputError": "vitlab.runtime.files",
           "create_model": "vitlab.models.create", "at_fixed_size": "vitlab.models.naflex",
           "prune_and_merge": "vitlab.criteria.planning",
           "token_scores": "vitlab.measure.capture", "open_data": "vitlab.data",
           "export": "vitlab.exporting.export", "load": "vitlab.models.checkpoint", "save": "vitlab.models.checkpoint"}
__all__ = sorted(_PUBLIC)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


if TYPE_CHECKING:               # the same names, for editors and type checkers
    from vitlab.criteria.planning import prune_and_merge as prune_and_merge
    from vitlab.data import open_data as open_data
    from vitlab.exporting.export import export as export
    from vitlab.measure.capture import token_scores as token_scores
    from vitlab.models import compress as compress
    from vitlab.models import deploy as deploy
    from vitlab.models import set_trainable as set_trainable
    from vitlab.models import shape_of as shape_of
    from vitlab.models.checkpoint import load as load
    from vitlab.models.checkpoint import save as save
    from vitlab.models.create import create_model as create_model
    from vitlab.models.naflex import at_fixed_size as at_fixed_size
    from vitlab.plan import CompressionPlan as CompressionPlan
    from vitlab.runtime.files import InputError as InputError


# torch and timm load at first use, so that `vitlab --help` answers at once
def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vitlab' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
