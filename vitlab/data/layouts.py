"""Where the data sets of segmentation have their images and masks, as their owners publish them, and what their ids
mean.

A layout lists (image, mask) pairs and says which class each id in a mask is. Sources: ADE20K scene parsing (Zhou et
al., CVPR 2017, ADEChallengeData2016), Cityscapes (Cordts et al., CVPR 2016; labels.py of its scripts), PASCAL Context
(Mottaghi et al., CVPR 2014) and CamVid (Brostow et al., 2009, the 11 classes of SegNet, arXiv 1511.00561).
"""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vitlab.data.listing import images_in
from vitlab.runtime.files import InputError
from vitlab.runtime.kinds import SPLITS

IGNORE = 255                                    # the class of pixels that count for nothing
Pairs = list[tuple[Path, Path]]

# id 0 to 33 of a Cityscapes mask -> train id; all others are ignored
CITYSCAPES_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
                  27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
CITYSCAPES = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
              "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
PASCAL_CONTEXT = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
                  "table", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
                  "bag", "bed", "bench", "book", "building", "cabinet", "ceiling", "cloth", "computer", "cup", "door",
                  "fence", "floor", "flower", "food", "grass", "ground", "keyboard", "light", "mountain", "mouse",
                  "curtain", "platform", "sign", "plate", "road", "rock", "shelves", "sidewalk", "sky", "snow",
                  "bedclothes", "track", "tree", "truck", "wall", "water", "window", "wood")
CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign_symbol", "fence", "car", "pedestrian",
          "bicyclist")
ADE20K_CLASSES = 150
CLASS_LIST = "classes.txt"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a data set's folder holds."""

    known_by: Callable[[Path], bool]                            # whether a folder has this layout
    pairs: Callable[[Path], dict[str, Pairs]]                   # (image, mask) files of each split
    classes: Callable[[Path], tuple[str, ...]]                  # names, in the order of the class numbers
    ids: Callable[[int], dict[int, int]]                        # of K classes: id in a mask -> class number or IGNORE


def _listed(folder: Path) -> list[Path]:
    """Images in a folder, by name. Raises InputError where there is no such folder or no image."""
    found = images_in(folder) if folder.is_dir() else []
    if not found:
        raise InputError(f"{folder}: " + ("holds no images" if folder.is_dir() else "no such folder"))
    return found


def matched(images: list[Path], mask_of: Callable[[Path], Path]) -> Pairs:
    """Each image with its mask. Raises InputError naming the first image without one."""
    folders: dict[Path, set[str]] = {}
    pairs = [(image, mask_of(image)) for image in images]
    for image, mask in pairs:
        if mask.parent not in folders:
            folders[mask.parent] = {entry.name for entry in mask.parent.iterdir()} if mask.parent.is_dir() else set()
        if mask.name not in folders[mask.parent]:
            raise InputError(f"{image}: has no mask; {mask} is missing")
    return pairs


def _by_stem(images: Path, masks: Path) -> Pairs:
    """The images in a folder, each with the mask of its name in another."""
    return matched(_listed(images), lambda image: masks / f"{image.stem}.png")


def _numbered(count: int) -> dict[int, int]:
    return {i: i for i in range(count)} | {IGNORE: IGNORE}


def _ade20k_pairs(root: Path) -> dict[str, Pairs]:
    return {name: _by_stem(root / "images" / folder, root / "annotations" / folder)
            for name, folder in (("train", "training"), ("val", "validation")) if (root / "images" / folder).is_dir()}


def _ade20k_classes(root: Path) -> tuple[str, ...]:
    """The first name of each class in objectInfo150.txt, which lies beside the images; numbers where it does not."""
    path = root / "objectInfo150.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:] if path.is_file() else []
    names = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    if names and len(names) != ADE20K_CLASSES:
        raise InputError(f"{path}: names {len(names)} classes; {ADE20K_CLASSES} are needed, one a line below the "
                         f"heading")
    return tuple(names) or tuple(f"class {i + 1}" for i in range(ADE20K_CLASSES))


def _cityscapes_pairs(root: Path) -> dict[str, Pairs]:
    """train and val; the truth of test is not published."""
    def mask(image: Path) -> Path:
        name = image.name.removesuffix("_leftImg8bit.png") + "_gtFine_labelIds.png"
        return root / "gtFine" / image.parent.parent.name / image.parent.name / name
    found = {}
    for split in ("train", "val"):
        if (root / "leftImg8bit" / split).is_dir():
            cities = sorted(city for city in (root / "leftImg8bit" / split).iterdir() if city.is_dir())
            found[split] = matched([image for city in cities for image in _listed(city)], mask)
    return found


def _pascal_lists(root: Path) -> dict[str, Path]:
    folder = root / "ImageSets" / "SegmentationContext"
    return {name: folder / f"{name}.txt" for name in ("train", "val") if (folder / f"{name}.txt").is_file()}


def _pascal_pairs(root: Path) -> dict[str, Pairs]:
    found = {}
    for split, names in _pascal_lists(root).items():
        images = [root / "JPEGImages" / f"{line.strip()}.jpg" for line in names.read_text(encoding="utf-8").splitlines()
                  if line.strip()]
        missing = next((image for image in images if not image.is_file()), None)
        if missing is not None:
            raise InputError(f"{names}: names {missing.stem}, but {missing} is missing")
        found[split] = matched(images, lambda image: root / "SegmentationClassContext" / f"{image.stem}.png")
    return found


def _folder_splits(root: Path) -> list[str]:
    return [name for name in SPLITS if (root / name / "images").is_dir()]


def _folder_pairs(root: Path) -> dict[str, Pairs]:
    return {name: _by_stem(root / name / "images", root / name / "masks") for name in _folder_splits(root)}


def read_classes(root: Path) -> tuple[str, ...]:
    """Names in root/classes.txt, one a line. Raises InputError naming it where it is missing, or names no or too many
    classes, or one twice."""
    path = root / CLASS_LIST
    if not path.is_file():
        raise InputError(f"{path}: no such file; the class names are needed there, one a line, that of id 0 first")
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read ({error})") from None
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or not 2 <= len(names) <= IGNORE:
        raise InputError(f"{path}: " + (f"names {twice!r} twice" if twice is not None else
                                        f"names {len(names)} classes; 2 to {IGNORE} are needed, one a line"))
    return tuple(names)


def _camvid_classes(root: Path) -> tuple[str, ...]:
    if read_classes(root) != CAMVID:
        raise InputError(f"{root / CLASS_LIST}: not CamVid's 11 classes ({', '.join(CAMVID)}); layout 'folder' takes "
                         f"any")
    return CAMVID


def _is_camvid(root: Path) -> bool:
    return bool(_folder_splits(root)) and (root / CLASS_LIST).is_file() and read_classes(root) == CAMVID


LAYOUTS: dict[str, Layout] = {                  # the first that a folder has is taken
    # annotations/: 0 is none of the 150 classes, which are 1 to 150
    "ade20k": Layout(known_by=lambda root: any((root / "annotations" / name).is_dir()
                                               for name in ("training", "validation")),
                     pairs=_ade20k_pairs, classes=_ade20k_classes,
                     ids=lambda k: {0: IGNORE} | {i + 1: i for i in range(k)}),
    "cityscapes": Layout(known_by=lambda root: (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir(),
                         pairs=_cityscapes_pairs, classes=lambda root: CITYSCAPES,
                         ids=lambda k: {i: CITYSCAPES_IDS.get(i, IGNORE) for i in range(34)}),
    # VOC2010/ with one PNG of 60 ids an image, as mmsegmentation and Segmenter convert the 459-class MATLAB files of
    # the owners
    "pascal_context": Layout(known_by=lambda root: bool(_pascal_lists(root)), pairs=_pascal_pairs,
                             classes=lambda root: PASCAL_CONTEXT, ids=_numbered),
    "camvid": Layout(known_by=_is_camvid, pairs=_folder_pairs, classes=_camvid_classes,
                     ids=lambda k: _numbered(k) | {k: IGNORE}),
    "folder": Layout(known_by=lambda root: bool(_folder_splits(root)), pairs=_folder_pairs, classes=read_classes,
                     ids=_numbered),
}
