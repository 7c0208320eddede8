"""Data sets: the embedded digits, folders of images, and what timm opens."""
from vitlab.data.source import Batches, ImageData, Images, open_data

__all__ = ["Batches", "ImageData", "Images", "open_data"]
