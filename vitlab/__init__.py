"""vitlab: makes vision transformers smaller and faster, and shows why that works."""
import importlib

__version__ = "0.1.0"
_PUBLIC = {"compress": "vitlab.models", "deploy": "vitlab.models", "shape_of": "vitlab.models",
           "set_trainable": "vitlab.models", "CompressionPlan": "vitlab.plan", "InputError": "vitlab.files",
           "create_model": "vitlab.models.create", "prune_and_merge": "vitlab.criteria.planning",
           "token_scores": "vitlab.training.capture", "open_data": "vitlab.data",
           "load": "vitlab.training.checkpoint", "save": "vitlab.training.checkpoint"}
__all__ = sorted(_PUBLIC)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str):         # torch and timm load at first use, so that `vitlab --help` answers at once
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vitlab' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
