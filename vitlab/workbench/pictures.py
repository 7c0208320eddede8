"""Pictures to look at a model with: one image of the data set, and scikit-learn's two sample photographs."""
import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from vitlab.data import ImageData
from vitlab.data.images import image_config
from vitlab.plan.shape import ViTShape

SHOWN = 224                                     # pixels a picture has at least, so that small inputs can be looked at


def shown_size(shape: ViTShape) -> tuple[int, int]:
    """(width, height) of a picture, which the patch grid divides."""
    scale = max(1, SHOWN // shape.img_size[0])
    height, width = (g * p * scale for g, p in zip(shape.grid_size, shape.patch_size))
    return width, height


def fitted(image: Image.Image, shape: ViTShape) -> np.ndarray:
    """The middle of an RGB image as (h, w, 3) in [0, 1], of `shown_size`."""
    return np.asarray(ImageOps.fit(image, shown_size(shape), Image.Resampling.BICUBIC)) / 255


def sample_pictures(data: ImageData, shape: ViTShape, seed: int = 0) -> dict[str, np.ndarray]:
    """{"data", "china", "flower"}: centre crops (h, w, 3) in [0, 1], of `shown_size`."""
    width, height = shown_size(shape)
    photos = dict(zip(("china", "flower"), map(Image.fromarray, load_sample_images().images)))
    pictures = {}
    for name, picture in {"data": data.split("train", 1, seed).image(0)[0], **photos}.items():
        ratio = min(picture.width / width, picture.height / height)
        w, h = round(width * ratio), round(height * ratio)
        left, top = (picture.width - w) // 2, (picture.height - h) // 2
        crop = picture.crop((left, top, left + w, top + h))
        pictures[name] = np.asarray(crop.resize((width, height), Image.Resampling.BICUBIC)) / 255
    return pictures


def as_input(picture: np.ndarray, model: nn.Module) -> Tensor:
    """A picture (h, w, 3) in [0, 1] as the model's input (1, channels, H, W), resized and normalised."""
    config = image_config(model)
    channels, height, width = config["input_size"]
    image = Image.fromarray((picture * 255).round().astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image if channels == 3 else image.convert("L"))
    x = torch.from_numpy(pixels / 255).reshape(height, width, channels).permute(2, 0, 1)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    return ((x - mean) / std)[None].float()
