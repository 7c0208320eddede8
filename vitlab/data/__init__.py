"""Data sets: the embedded digits, folders of images, and what timm opens."""
from vitlab.data.image_data import ImageData
from vitlab.data.images import Batches, Images
from vitlab.data.order import Shuffled
from vitlab.data.source import DATA_SETS, open_data
