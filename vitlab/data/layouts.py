"""Where the data sets of segmentation have their images and masks, as their owners publish them and as people keep
their own, and what their ids mean: a table.

Sources: ADE20K scene parsing (Zhou et al., CVPR 2017, ADEChallengeData2016), Cityscapes (Cordts et al., CVPR 2016;
labels.py of its scripts), PASCAL VOC (Everingham et al., IJCV 2010), PASCAL Context (Mottaghi et al., CVPR 2014; its 60
classes as mmsegmentation numbers them) and CamVid (Brostow et al., 2009, the 11 classes of SegNet, arXiv 1511.00561).
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vitlab.data.listing import images_in
from vitlab.runtime.files import InputError, require
from vitlab.runtime.kinds import SPLITS

IGNORE = 255                                    # the class of pixels that count for nothing
MOST_CLASSES = 254                              # the ids of bytes less IGNORE and that of a pixel of no class
CLASS_LIST = "classes.txt"
Pairs = list[tuple[Path, Path]]
Meaning = tuple[tuple[str, ...], dict[int, int]]            # class names, {id in a mask: class number or IGNORE}

# id 0 to 33 of a Cityscapes mask: its class; all others are ignored
CITYSCAPES = {7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
              20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car",
              27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}
# id 0 to 459 of the owners' MATLAB files: its class; all others are background. PNGs number these from 1, in this order
PASCAL_CONTEXT = {2: "aeroplane", 9: "bag", 18: "bed", 19: "bedclothes", 22: "bench", 23: "bicycle", 25: "bird",
                  31: "boat", 33: "book", 34: "bottle", 44: "building", 45: "bus", 46: "cabinet", 59: "car", 65: "cat",
                  68: "ceiling", 72: "chair", 80: "cloth", 85: "computer", 98: "cow", 104: "cup", 105: "curtain",
                  113: "dog", 115: "door", 144: "fence", 158: "floor", 159: "flower", 162: "food", 187: "grass",
                  189: "ground", 207: "horse", 220: "keyboard", 232: "light", 258: "motorbike", 259: "mountain",
                  260: "mouse", 284: "person", 295: "plate", 296: "platform", 308: "pottedplant", 324: "road",
                  326: "rock", 347: "sheep", 349: "shelves", 354: "sidewalk", 355: "sign", 360: "sky", 366: "snow",
                  368: "sofa", 397: "table", 415: "track", 416: "train", 420: "tree", 424: "truck", 427: "tvmonitor",
                  440: "wall", 445: "water", 454: "window", 458: "wood"}
PASCAL_CONTEXT_IDS = 460
PASCAL_VOC = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
              "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
              "tvmonitor")
CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign_symbol", "fence", "car", "pedestrian",
          "bicyclist")
ADE20K_CLASSES = 150


def numbered(names: tuple[str, ...]) -> Meaning:
    """Ids are class numbers, IGNORE is ignored; of CamVid's classes 11, unlabelled, too."""
    void = {len(CAMVID): IGNORE} if names == CAMVID else {}
    return names, {i: i for i in range(len(names))} | void | {IGNORE: IGNORE}


def ade20k(root: Path) -> Meaning:
    """0 is none of the 150 classes, which are 1 to 150. Names are the first of each in objectInfo150.txt, which lies
    beside the images; numbers where it does not."""
    path = root / "objectInfo150.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:] if path.is_file() else []
    names = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    require(not names or len(names) == ADE20K_CLASSES, f"{path}: names {len(names)} classes; {ADE20K_CLASSES} are "
            "needed, one a line below the heading")
    return (tuple(names) or tuple(f"class {i + 1}" for i in range(ADE20K_CLASSES)),
            {0: IGNORE} | {i + 1: i for i in range(ADE20K_CLASSES)})


def cityscapes(root: Path) -> Meaning:
    return tuple(CITYSCAPES.values()), dict.fromkeys(range(34), IGNORE) | {i: n for n, i in enumerate(CITYSCAPES)}


def _lines(path: Path) -> list[str]:
    """The lines of a text file that say something. Raises InputError naming it where it is none."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read ({getattr(error, 'strerror', error)})") from None


def own_classes(root: Path) -> Meaning:
    """As root/classes.txt names them, one a line. Raises InputError naming it where it is missing, or names no or too
    many classes, or one twice."""
    path = root / CLASS_LIST
    require(path.is_file(), f"{path}: no such file; the class names are needed there, one a line, that of id 0 first")
    names = _lines(path)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or not 2 <= len(names) <= MOST_CLASSES:
        raise InputError(f"{path}: " + (f"names {twice!r} twice" if twice is not None else
                                        f"names {len(names)} classes; 2 to {MOST_CLASSES} are needed, one a line"))
    return numbered(tuple(names))


def _named(folder: str) -> tuple[str, ...]:
    """Masks in a folder that are named as their image, or that with an ending."""
    return tuple(f"{folder}/{{name}}{end}.png" for end in ("", "_mask", "_gt"))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a data set has the images of a split and their masks, as paths from its folder, and what their ids mean."""

    images: str                                 # folder of a {split}'s images; * is any folder
    masks: tuple[str, ...]                      # of an image {name} in a {folder} of a {split}: the first that is there
    meaning: Callable[[Path], Meaning] = own_classes
    splits: Mapping[str, str]                   # split: what the layout calls it
    listed: tuple[str, ...] = ()                # files that name a {split}'s images, without ending, one a line
    ending: str = ""                            # of the images' names, left out of {name}

    def found(self, root: Path) -> dict[str, str]:
        """Those of `splits` that a folder has."""
        places = self.listed or (self.images.removesuffix("/*"),)
        return {split: own for split, own in self.splits.items()
                if any((root / place.format(split=own)).exists() for place in places)}

    def is_of(self, root: Path) -> bool:
        """Whether a folder has this layout: images, or a list of them, and some place for masks."""
        return any((root / mask.split("/")[0].format(split=own)).is_dir()
                   for own in self.found(root).values() for mask in self.masks)

    def pairs(self, root: Path) -> dict[str, Pairs]:
        """(image, mask) files of each split. Raises InputError naming a folder without images, a list that can't be
        read or is empty, a listed image that is missing, or the first image without a mask."""
        return {split: self._matched(root, own, self._listed(root, own) if self.listed else self._all(root, own))
                for split, own in self.found(root).items()}

    def _all(self, root: Path, own: str) -> list[Path]:
        """By folder and name."""
        found = []
        for folder in sorted(path for path in root.glob(self.images.format(split=own)) if path.is_dir()):
            found += images_in(folder)
            require(images_in(folder), f"{folder}: holds no images")
        if not found:
            raise InputError(f"{root / self.images.format(split=own)}: no such folder")
        return found

    def _listed(self, root: Path, own: str) -> list[Path]:
        places = [root / place.format(split=own) for place in self.listed]
        names = next(place for place in places if place.exists())
        images = [root / self.images / f"{line}.jpg" for line in _lines(names)]
        require(images, f"{names}: names no image; one a line is needed, without its ending")
        missing = next((image for image in images if not image.is_file()), None)
        if missing is not None:
            raise InputError(f"{names}: names {missing.stem}, but {missing} is missing")
        return images

    def _matched(self, root: Path, own: str, images: list[Path]) -> Pairs:
        folders: dict[Path, set[str]] = {}
        pairs = []
        for image in images:
            wanted = {"split": own, "folder": image.parent.name, "name": image.stem.removesuffix(self.ending)}
            masks = [root / mask.format(**wanted) for mask in self.masks]
            for folder in {mask.parent for mask in masks} - folders.keys():
                folders[folder] = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
            mask = next((mask for mask in masks if mask.name in folders[mask.parent]), None)
            if mask is None:
                others = f", and so {'are' if len(masks) > 2 else 'is'} " if len(masks) > 1 else ""
                raise InputError(f"{image}: has no mask; {masks[0]} is missing{others}"
                                 + " and ".join(str(each.relative_to(root)) for each in masks[1:]))
            pairs.append((image, mask))
        return pairs


TRAIN_VAL, ALL = {"train": "train", "val": "val"}, {name: name for name in SPLITS}
LAYOUTS: dict[str, Layout] = {                  # the first that a folder has is taken
    "ade20k": Layout(images="images/{split}", masks=("annotations/{split}/{name}.png",),
                     splits={"train": "training", "val": "validation"}, meaning=ade20k),
    # the truth of test is not published
    "cityscapes": Layout(images="leftImg8bit/{split}/*", masks=("gtFine/{split}/{folder}/{name}_gtFine_labelIds.png",),
                         splits=TRAIN_VAL, ending="_leftImg8bit", meaning=cityscapes),
    # VOC2010/ with the owners' MATLAB files, or with PNGs as mmsegmentation converts them
    "pascal_context": Layout(images="JPEGImages", masks=("SegmentationClassContext/{name}.png",
                                                         "SegmentationClassContext/{name}.mat", "trainval/{name}.mat"),
                             listed=("ImageSets/SegmentationContext/{split}.txt", "ImageSets/Main/{split}.txt"),
                             splits=TRAIN_VAL, meaning=lambda _: numbered(("background", *PASCAL_CONTEXT.values()))),
    "pascal_voc": Layout(images="JPEGImages", masks=("SegmentationClass/{name}.png",), splits=TRAIN_VAL,
                         listed=("ImageSets/Segmentation/{split}.txt",), meaning=lambda _: numbered(PASCAL_VOC)),
    "camvid": Layout(images="{split}", masks=("{split}annot/{name}.png",), splits=ALL,  # as SegNet's authors give it
                     meaning=lambda _: numbered(CAMVID)),
    "folder": Layout(images="{split}/images", masks=_named("{split}/masks"), splits=ALL),
    "images_masks": Layout(images="images/{split}", masks=_named("masks/{split}"), splits=ALL),
    "mmsegmentation": Layout(images="img_dir/{split}", masks=_named("ann_dir/{split}"), splits=ALL),
}
