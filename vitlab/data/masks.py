"""open_scenes: one way to the embedded scenes, or a folder of images and masks in one of the layouts."""
import warnings
from collections.abc import Callable
from pathlib import Path

from vitlab.data.layouts import CLASS_LIST, IGNORE, LAYOUTS, Layout, Meaning, own_classes
from vitlab.data.listing import entries, images_below
from vitlab.data.mask_files import MaskReader, is_binary
from vitlab.data.scene_data import SceneData, Scenes
from vitlab.data.scenes import digit_scenes
from vitlab.runtime.files import from_root, require
from vitlab.runtime.kinds import SPLITS

# folders that hold masks, however a data set is laid out; *annot too
OF_MASKS = ("masks", "annotations", "labels", "ann_dir", "SegmentationClass", "SegmentationClassContext", "gtFine")
BLACK_AND_WHITE = ("background", "foreground")                        # where no classes.txt names them


def _layout_of(root: Path) -> str | None:
    return next((name for name, each in LAYOUTS.items() if each.is_of(root)), None)


def _pictures(root: Path) -> list[Path]:
    """The images below a folder of images alone, or below its train/ where that is the only split. Raises InputError
    where it is none, or has a folder of masks, naming the folder to give where that is one above or below."""
    splits = [name for name in SPLITS if (root / name).is_dir()]
    below = root / "train" if splits == ["train"] else root
    inside = next((name for name in entries(root)[1] if _layout_of(root / name)), None)
    right = root / inside if inside is not None else root.parent if _layout_of(root.parent) else None
    require(right is None, f"{root}: one folder too {'high' if inside else 'low'}; {right} holds images and masks: "
            "give that folder")
    masks = next((name for name in sorted(entries(root)[1]) if name in OF_MASKS or name.endswith("annot")), None)
    found = [] if masks or splits and below == root else [below / name for name in images_below(below)]
    require(found, f"{root}: has {f'{masks}/, but ' if masks else ''}none of the layouts {sorted(LAYOUTS)}; the "
            "simplest is train/images/, train/masks/, the same of val and test, and classes.txt with a name a line")
    return found


def _meaning(root: Path, layout: Layout, masks: list[Path]) -> Meaning:
    """Classes of a layout and what the ids in its masks are. Black and white masks have 255 for the second class, where
    classes.txt names two, or is not there."""
    named = (root / CLASS_LIST).exists()
    two = layout.meaning is own_classes and (not named or len(own_classes(root)[0]) == 2)
    if not two or not is_binary(masks):
        return layout.meaning(root)
    classes = own_classes(root)[0] if named else BLACK_AND_WHITE
    warnings.warn(f"{root}: its masks hold 0 and {IGNORE} alone, so {IGNORE} is taken for {classes[1]!r} and no pixel "
                  f"is ignored; in a data set with ids 0 and 1, {IGNORE} is ignored", stacklevel=3)
    return classes, {0: 0, IGNORE: 1}


SCENES: dict[str, Callable[[], SceneData]] = {"digit_scenes": digit_scenes}


def open_scenes(data: str | Path) -> SceneData:
    """A data set of images with masks: a name of SCENES, or a folder in the first of LAYOUTS that it has.

    Of a layout with classes.txt 255 is ignored, unless masks hold 0 and 255 alone and it names two classes, or is not
    there: then it is the second, or the foreground. A folder, or its train/, that holds images alone, however deep, and
    no folder of OF_MASKS, has no masks, and no other split than train.
    Raises InputError naming the folder or file: missing, no layout that is known, an image without a mask, a split
    without images.
    """
    if str(data) in SCENES:
        return SCENES[str(data)]()
    root = from_root(data)
    require(str(data) and root.is_dir(), f"{str(data)!r}: no such folder; give one of {sorted(SCENES)}, or a folder of "
            "images and masks")
    name = _layout_of(root)
    if name is None:
        train = Scenes(MaskReader([(path, None) for path in _pictures(root)], {}))
        return SceneData(root.resolve().name, {"train": train}, None, labelled=False)
    chosen = LAYOUTS[name]
    pairs = chosen.pairs(root)
    classes, ids = _meaning(root, chosen, [mask for found in pairs.values() for _, mask in found])
    splits = {split: Scenes(MaskReader(found, ids)) for split, found in pairs.items()}
    return SceneData(root.resolve().name, splits, list(classes))
