"""Images with masks: every published layout written small, its faults named by file, joint transforms, and batches that
resume."""
import itertools
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torch import nn
from training_fixtures import one_thread, tiny  # noqa: F401

from vitlab.data.joint import evaluation_transform, training_transform
from vitlab.data.layouts import CAMVID, LAYOUTS, PASCAL_VOC, own_classes
from vitlab.data.masks import open_scenes
from vitlab.data.order import Shuffled
from vitlab.data.scene_data import SceneData, Scenes, Unreadable
from vitlab.runtime.files import InputError

PAGE = Path(__file__).parent.parent / "docs" / "segmentation.md"
HEIGHT, WIDTH = 11, 13                                                  # no multiples of any patch


def write_image(path: Path, size: tuple[int, int] = (HEIGHT, WIDTH), level: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (level,) * 3).save(path)


def write_mask(path: Path, ids: list[int], size: tuple[int, int] = (HEIGHT, WIDTH), palette: bool = False) -> None:
    """The ids in turn, pixel by pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.resize(np.array(ids), size)
    image = Image.fromarray(values.astype(np.uint8) if values.max() < 256 else values.astype(np.uint16))
    if palette:
        image.putpalette([255 - v // 3 for v in range(768)])            # colours that are not the ids
    image.save(path)


def ade20k(root: Path, ids: list[int]) -> Path:
    for split in ("training", "validation"):
        for name in ("b", "a"):
            write_image(root / "images" / split / f"ADE_{split}_{name}.jpg")
            write_mask(root / "annotations" / split / f"ADE_{split}_{name}.png", ids)
    return root


def cityscapes(root: Path, ids: list[int]) -> Path:
    for split, city in (("train", "zurich"), ("train", "aachen"), ("val", "ulm"), ("test", "bonn")):
        name = f"{city}_000000_000019"
        write_image(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
        write_mask(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", ids)
        write_mask(root / "gtFine" / split / city / f"{name}_gtFine_color.png", [200])
    return root


def pascal_context(root: Path, ids: list[int]) -> Path:
    for split, names in (("train", ("2008_000002", "2008_000001")), ("val", ("2010_000003",))):
        (root / "ImageSets" / "SegmentationContext").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "SegmentationContext" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            write_image(root / "JPEGImages" / f"{name}.jpg")
            write_mask(root / "SegmentationClassContext" / f"{name}.png", ids, palette=True)
    write_image(root / "JPEGImages" / "2007_000000.jpg")                # of VOC, in no list
    return root


def folder(root: Path, ids: list[int], classes: tuple[str, ...] = ("sand", "sea"), **settings) -> Path:
    for split in ("train", "val", "test"):
        for name in ("b", "a"):
            write_image(root / split / "images" / f"{name}.jpg")
            write_mask(root / split / "masks" / f"{name}.png", ids, **settings)
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    return root


def pascal_context_mat(root: Path, ids: list[int]) -> Path:
    """The owners' files: the lists are VOC's own."""
    pascal_context(root, [0])
    (root / "ImageSets" / "SegmentationContext").rename(root / "ImageSets" / "Main")
    shutil.rmtree(root / "SegmentationClassContext")
    (root / "trainval").mkdir()
    for file in (root / "JPEGImages").iterdir():
        write_label_map(root / "trainval" / f"{file.stem}.mat", ids)
    return root


def write_label_map(path: Path, ids: list[int], size: tuple[int, int] = (HEIGHT, WIDTH), **more) -> None:
    scipy.io.savemat(path, {"LabelMap": np.resize(np.array(ids, dtype=np.uint16), size), **more})


def pascal_voc(root: Path, ids: list[int]) -> Path:
    pascal_context(root, ids)
    (root / "ImageSets" / "SegmentationContext").rename(root / "ImageSets" / "Segmentation")
    (root / "SegmentationClassContext").rename(root / "SegmentationClass")
    return root


def camvid(root: Path, ids: list[int]) -> Path:
    """SegNet's."""
    for split in ("train", "val", "test"):
        for name in ("b", "a"):
            write_image(root / split / f"{name}.png")
            write_mask(root / f"{split}annot" / f"{name}.png", ids)
    return root


def images_masks(root: Path, ids: list[int], images: str = "images", masks: str = "masks", end: str = "") -> Path:
    """Splits within the folders of images and masks."""
    for file in folder(root / "own", ids).glob("*/*/*"):
        split, kind, name = file.relative_to(root / "own").parts
        is_mask = kind == "masks"
        place = root / (masks if is_mask else images) / split
        place.mkdir(parents=True, exist_ok=True)
        file.rename(place / (f"{file.stem}{end}.png" if is_mask else name))
    (root / "own" / "classes.txt").rename(root / "classes.txt")
    shutil.rmtree(root / "own")
    return root


def mmsegmentation(root: Path, ids: list[int]) -> Path:
    return images_masks(root, ids, "img_dir", "ann_dir")


# layout: how it is written, ids, the classes they are (255: ignored), number of classes, images in train
CASES = {
    "ade20k": (ade20k, [0, 1, 2, 150], [255, 0, 1, 149], 150, 2),
    # in the owners' label table: unlabeled, road, sidewalk, parking, building, guard rail, pole, polegroup, traffic
    # light, sky, rider,
    # caravan, trailer, train, bicycle
    "cityscapes": (cityscapes, [0, 7, 8, 9, 11, 14, 17, 18, 19, 23, 25, 29, 30, 31, 33],
                   [255, 0, 1, 255, 2, 255, 5, 255, 6, 10, 12, 255, 255, 16, 18], 19, 2),
    "pascal_context": (pascal_context, [0, 1, 59, 255], [0, 1, 59, 255], 60, 2),
    "pascal_voc": (pascal_voc, [0, 1, 20, 255], [0, 1, 20, 255], 21, 2),
    "camvid": (camvid, [0, 10, 11, 255], [0, 10, 255, 255], 11, 2),
    "folder": (folder, [1, 0, 255], [1, 0, 255], 2, 2),
    "images_masks": (images_masks, [1, 0, 255], [1, 0, 255], 2, 2),
    "mmsegmentation": (mmsegmentation, [1, 0, 255], [1, 0, 255], 2, 2),
}
THREE = ("camvid", "folder", "images_masks", "mmsegmentation")      # that have train, val and test


@pytest.fixture(params=list(CASES))
def case(request) -> str:
    return request.param


# ---------------------------------------------------------------- black and white masks

def test_255_is_the_second_of_two_classes_where_no_mask_holds_a_1_and_ignored_where_one_does(tmp_path):
    """Told for the data set: the masks of each kind look alike."""
    folder(tmp_path, [0, 255, 255])
    with pytest.warns(UserWarning, match="its masks hold 0 and 255 alone, so 255 is taken for 'sea'") as said:
        data = open_scenes(tmp_path)
    assert len(said) == 1
    assert data.split("val").scene(0)[1].flatten()[:3].tolist() == [0, 1, 1]
    write_mask(tmp_path / "test" / "masks" / "a.png", [0, 1])
    assert open_scenes(tmp_path).split("val").scene(0)[1].flatten()[:3].tolist() == [0, 255, 255]
    write_mask(tmp_path / "test" / "masks" / "a.png", [0, 255])
    (tmp_path / "classes.txt").write_text("sand\nsea\nsky\n")
    assert open_scenes(tmp_path).split("val").scene(0)[1].flatten()[:3].tolist() == [0, 255, 255]


def test_black_and_white_masks_of_16_bits_are_as_those_of_8(tmp_path):
    folder(tmp_path, [0, 255, 255])
    for file in tmp_path.glob("*/masks/*.png"):
        Image.fromarray(np.asarray(Image.open(file)).astype(np.uint16)).save(file)
        assert Image.open(file).mode.startswith("I")
    with pytest.warns(UserWarning, match="its masks hold 0 and 255 alone, so 255 is taken for 'sea'"):
        data = open_scenes(tmp_path)
    assert data.split("val").scene(0)[1].flatten()[:3].tolist() == [0, 1, 1]


def test_masks_of_one_class_alone_are_not_black_and_white(tmp_path):
    assert open_scenes(folder(tmp_path, [0])).split("val").scene(0)[1].max() == 0
    assert open_scenes(folder(tmp_path, [255])).split("val").scene(0)[1].min() == 255


# ---------------------------------------------------------------- layouts

def test_every_layout_has_a_case():
    assert set(CASES) == set(LAYOUTS)


def test_a_published_layout_is_known_by_itself_and_its_ids_become_classes(tmp_path, case):
    write, ids, classes, count, images = CASES[case]
    data = open_scenes(write(tmp_path / "set", ids))
    assert (data.name, data.num_classes, len(set(data.classes))) == ("set", count, count)
    assert len(data.split("train")) == images and data.choose_on == "val"
    assert data.held_out == ("test" if case in THREE else "val")
    for split in data.splits:
        for i in range(len(data.split(split))):
            image, mask = data.split(split).scene(i)
            assert image.size == (WIDTH, HEIGHT) and image.mode == "RGB"
            assert mask.dtype == np.uint8 and np.array_equal(mask, np.resize(classes, (HEIGHT, WIDTH)))


def test_the_first_layout_that_a_folder_has_is_taken(tmp_path):
    root = pascal_voc(pascal_context(tmp_path, [0, 59]), [0, 20])
    pascal_context(root, [0, 59])
    assert open_scenes(root).num_classes == 60


def test_the_class_after_camvids_own_counts_for_nothing_in_any_folder_of_them(tmp_path):
    for write in (folder, images_masks):
        root = write(tmp_path / write.__name__, [0, 10, 11, 255])
        (root / "classes.txt").write_text("\n".join(CAMVID))
        assert open_scenes(root).split("val").scene(0)[1].flatten()[:4].tolist() == [0, 10, 255, 255]


@pytest.mark.parametrize("end", ["_mask", "_gt"])
@pytest.mark.parametrize("write", [images_masks, mmsegmentation, folder])
def test_masks_may_be_named_with_an_ending(tmp_path, write, end):
    root = write(tmp_path, [1, 0, 255])
    for file in list(root.rglob("*.png")):
        file.rename(file.with_name(f"{file.stem}{end}.png"))
    data = open_scenes(root)
    assert [Path(data.split("val").path(i)).name for i in (0, 1)] == ["a.jpg", "b.jpg"]
    assert np.array_equal(data.split("val").scene(1)[1], np.resize([1, 0, 255], (HEIGHT, WIDTH)))


def test_black_and_white_masks_are_taken_for_two_classes_in_every_layout_with_names_of_its_own(tmp_path):
    for write in (images_masks, mmsegmentation):
        with pytest.warns(UserWarning, match="255 is taken for 'sea'"):
            data = open_scenes(write(tmp_path / write.__name__, [0, 255]))
        assert data.split("val").scene(0)[1].flatten()[:2].tolist() == [0, 1]


def test_black_and_white_masks_need_no_list_of_classes(tmp_path):
    root = images_masks(tmp_path, [0, 255, 255])
    (root / "classes.txt").unlink()
    with pytest.warns(UserWarning, match="255 is taken for 'foreground'"):
        data = open_scenes(root)
    assert data.classes == ["background", "foreground"]
    assert data.split("val").scene(0)[1].flatten()[:3].tolist() == [0, 1, 1]


# ---------------------------------------------------------------- PASCAL Context's MATLAB files

def test_the_owners_files_of_pascal_context_give_the_ids_of_the_pngs(tmp_path):
    """Of 459 names, in their order, the 59 of the task are numbered from 1; the others are background."""
    ids, classes = [0, 1, 2, 9, 284, 431, 458, 459], [0, 0, 1, 2, 37, 0, 59, 0]
    data = open_scenes(pascal_context_mat(tmp_path, ids))
    assert [data.classes[i] for i in (0, 1, 2, 37, 59)] == ["background", "aeroplane", "bag", "person", "wood"]
    for split in ("train", "val"):
        assert np.array_equal(data.split(split).scene(0)[1], np.resize(classes, (HEIGHT, WIDTH)))
    mats = pascal_context_mat(tmp_path / "other", ids)
    (mats / "trainval").rename(mats / "SegmentationClassContext")
    assert np.array_equal(open_scenes(mats).split("val").scene(0)[1], data.split("val").scene(0)[1])


def test_a_wrong_matlab_file_is_named(tmp_path):
    data, path = open_scenes(pascal_context_mat(tmp_path, [2])), tmp_path / "trainval" / "2010_000003.mat"
    for write, says in (
            (lambda: write_label_map(path, [2, 460]), "LabelMap holds ids from 2 to 460; they are 0 to 459"),
            (lambda: scipy.io.savemat(path, {"Map": [[1]]}), "holds no LabelMap of whole numbers"),
            (lambda: write_label_map(path, [2], (7, 9)), "is 7 x 9, its image .*2010_000003.jpg is 11 x 13"),
            (lambda: path.write_bytes(b"no"), "can't be read as a mask")):
        write()
        with pytest.raises(InputError, match=f"{path}: {says}"):
            data.split("val").scene(0)


def test_splits_of_the_published_sets(tmp_path):
    for name, wanted in (("ade20k", ["train", "val"]), ("cityscapes", ["train", "val"]),
                         ("pascal_context", ["train", "val"]), ("camvid", ["train", "val", "test"])):
        write, ids, *_ = CASES[name]
        # Cityscapes' test has no published truth
        assert list(open_scenes(write(tmp_path / name, ids)).splits) == wanted


def test_images_are_in_the_order_of_their_names_and_those_of_pascal_in_that_of_their_list(tmp_path):
    def names(data):
        return [Path(data.split("train").path(i)).stem for i in range(2)]
    assert names(open_scenes(ade20k(tmp_path / "a", [1]))) == ["ADE_training_a", "ADE_training_b"]
    assert names(open_scenes(folder(tmp_path / "f", [1]))) == ["a", "b"]
    assert names(open_scenes(cityscapes(tmp_path / "c", [7])))[0].startswith("aachen")
    assert names(open_scenes(pascal_context(tmp_path / "p", [1]))) == ["2008_000002", "2008_000001"]


def test_class_names(tmp_path):
    root = ade20k(tmp_path / "a", [1])
    assert open_scenes(root).classes[:2] == ["class 1", "class 2"]
    lines = [f"{i}\t0.1\t10\t1\tthing{i}, other{i}\t" if i % 2 else f"{i}\t0.1\t10\t1\tthing{i}" for i in range(1, 151)]
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n"
                                            + "\n".join(line.rstrip("\t") for line in lines) + "\n")
    assert open_scenes(root).classes == [f"thing{i}" for i in range(1, 151)]
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t10\t1\twall\n")
    with pytest.raises(InputError, match="objectInfo150.txt: names 1 classes; 150 are needed"):
        open_scenes(root)
    names = open_scenes(cityscapes(tmp_path / "c", [7])).classes
    assert (names[0], names[13], names[18], len(set(names))) == ("road", "car", "bicycle", 19)
    # mmsegmentation's converter gives picture 2008_000002, with a truck behind a window, 55 and 58
    names = open_scenes(pascal_context(tmp_path / "p", [1])).classes
    assert (names[0], names[54], names[58], len(set(names))) == ("background", "truck", "window", 60)
    assert names[1:] == sorted(names[1:])
    assert len(set(CAMVID)) == 11 and len(set(PASCAL_VOC)) == 21


def test_palette_masks_give_their_index_not_their_colour(tmp_path):
    data = open_scenes(folder(tmp_path, [1, 0, 255], palette=True))
    assert Image.open(tmp_path / "train" / "masks" / "a.png").mode == "P"
    assert np.array_equal(data.split("train").scene(0)[1], np.resize([1, 0, 255], (HEIGHT, WIDTH)))


def write_grey_png(path: Path, values: np.ndarray, bits: int) -> None:
    """A grey PNG of so few bits, written from the format's description: Pillow writes none."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    rows = []
    for row in values.tolist():
        text = "".join(f"{value:0{bits}b}" for value in row)
        rows.append(b"\0" + bytes(int(text[i:i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8)))
    height, width = values.shape
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b""))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_masks_of_few_bits_are_read_as_they_are_stored(tmp_path, bits):
    """Pillow spreads them over 0 to 255."""
    count = 2 ** bits
    root = folder(tmp_path, [0], tuple(f"class {i}" for i in range(max(count, 3))))
    values = np.resize(np.arange(count), (HEIGHT, WIDTH))
    for file in root.glob("*/masks/*.png"):
        write_grey_png(file, values, bits)
    assert np.array_equal(open_scenes(root).split("val").scene(0)[1], values)


def test_palette_masks_of_few_bits_are_read_as_they_are_stored(tmp_path):
    root = folder(tmp_path, [0], ("a", "b", "c"))
    image = Image.fromarray(np.resize(np.arange(3, dtype=np.uint8), (HEIGHT, WIDTH)))
    image.putpalette([9, 8, 7, 6, 5, 4, 3, 2, 1])
    image.save(root / "val" / "masks" / "a.png", bits=2)
    assert np.array_equal(open_scenes(root).split("val").scene(0)[1], np.resize([0, 1, 2], (HEIGHT, WIDTH)))


@pytest.mark.parametrize("mode", ["1", "I;16", "I"])
def test_masks_of_other_depths_are_read(tmp_path, mode):
    folder(tmp_path, [0])
    values = np.resize([0, 1, 1], (HEIGHT, WIDTH))
    dtype = {"1": np.bool_, "I;16": np.uint16, "I": np.int32}[mode]
    image = Image.fromarray(values.astype(dtype))
    assert image.mode == mode
    path = tmp_path / "train" / "masks" / "a.png"
    if mode == "I":                                                     # PNG keeps 16 bits of it
        path.unlink()
        path = path.with_suffix(".tif")
        image.save(path)
        path.rename(path.with_suffix(".png"))
    else:
        image.save(path)
    assert np.array_equal(open_scenes(tmp_path).split("train").scene(0)[1], values)


def test_any_image_becomes_rgb(tmp_path):
    folder(tmp_path, [0])
    Image.new("LA", (WIDTH, HEIGHT), (9, 102)).save(tmp_path / "train" / "images" / "a.png")
    (tmp_path / "train" / "images" / "a.jpg").unlink()
    assert open_scenes(tmp_path).split("train").scene(0)[0].getpixel((0, 0)) == (157,) * 3       # 0.4 of it over white


def layouts_page() -> str:
    """docs/segmentation.md with its table of layouts."""
    rows = ["| layout | images | their masks | classes |", "|---|---|---|---|"]
    for name, each in LAYOUTS.items():
        named = "" if set(each.splits.values()) == set(each.splits) else f" ({', '.join(each.splits.values())})"
        lists = f", listed in {' or '.join(f'`{place}`' for place in each.listed)}" if each.listed else ""
        rows.append(f"| `{name}` | `{each.images}`{lists}{named} | {', '.join(f'`{mask}`' for mask in each.masks)} "
                    f"| {'`classes.txt`' if each.meaning is own_classes else len(each.meaning(Path('nowhere'))[0])} |")
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(r"(?<=<!-- layouts -->\n).*?(?=<!-- end -->)", "\n".join(rows) + "\n", text, count=1,
                  flags=re.DOTALL)


def test_the_page_has_the_table_of_layouts():
    assert PAGE.read_text(encoding="utf-8") == layouts_page(), "run: python tests/test_masks.py"


# ---------------------------------------------------------------- faults

MASKS = {"ade20k": ("annotations/training/ADE_training_a.png", 0),
         "cityscapes": ("gtFine/val/ulm/ulm_000000_000019_gtFine_labelIds.png", 0),
         "pascal_context": ("SegmentationClassContext/2010_000003.png", 0), "camvid": ("valannot/b.png", 1),
         "pascal_voc": ("SegmentationClass/2010_000003.png", 0), "folder": ("test/masks/b.png", 1),
         "images_masks": ("masks/test/b.png", 1), "mmsegmentation": ("ann_dir/test/b.png", 1)}
UNKNOWN = {"ade20k": (151, "0 to 150"), "cityscapes": (34, "0 to 33"), "pascal_context": (60, "0 to 59, 255"),
           "pascal_voc": (21, "0 to 20, 255"), "camvid": (12, "0 to 11, 255"),
           **dict.fromkeys(("folder", "images_masks", "mmsegmentation"), (2, "0 to 1, 255"))}


def faulty(data, case: str) -> Exception:
    """What the scene with that mask raises."""
    path, number = MASKS[case]
    split = "train" if case == "ade20k" else "test" if "test" in path else "val"
    with pytest.raises(InputError) as error:
        data.split(split).scene(number)
    return error.value


def test_a_mask_of_another_size_is_named_with_its_image(tmp_path, case):
    root, path = CASES[case][0](tmp_path, CASES[case][1]), tmp_path / MASKS[case][0]
    write_mask(path, [1], (WIDTH, HEIGHT))
    message = str(faulty(open_scenes(root), case))
    assert message.startswith(f"{path}: is 13 x 11, its image ") and message.endswith(" is 11 x 13")


def test_a_missing_mask_is_named_with_its_image_when_the_set_is_opened(tmp_path, case):
    root, path = CASES[case][0](tmp_path, CASES[case][1]), tmp_path / MASKS[case][0]
    path.unlink()
    with pytest.raises(InputError, match=f"{tmp_path}.*(jpg|png): has no mask; {path} is missing"):
        open_scenes(root)


def test_an_unknown_id_is_named_with_its_file_and_the_known_ones(tmp_path, case):
    root, path = CASES[case][0](tmp_path, CASES[case][1]), tmp_path / MASKS[case][0]
    wrong, known = UNKNOWN[case]
    write_mask(path, [1, wrong])
    assert str(faulty(open_scenes(root), case)) == f"{path}: holds id {wrong}, which is unknown; ids are {known}"


def test_ids_of_more_than_a_byte_and_several_are_named(tmp_path):
    root = folder(tmp_path, [0])
    write_mask(tmp_path / "test/masks/b.png", [0, 256, 65535])          # a byte of 256 would be 0
    assert str(faulty(open_scenes(root), "folder")).endswith("holds id 256 and 1 more that are unknown; ids are 0 to "
                                                             "1, 255")


@pytest.mark.parametrize("what", ["colours", "broken", "empty", "folder"])
def test_a_mask_that_is_none_is_named(tmp_path, what):
    root, path = folder(tmp_path, [0]), tmp_path / "test/masks/b.png"
    path.unlink()
    if what == "colours":
        write_image(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"not an image" if what == "broken" else b"")
    says = "has 3 channels \\(RGB\\); a mask has one number a pixel" if what == "colours" else "can't be read as a mask"
    assert str(path) in str(faulty(open_scenes(root), "folder"))
    with pytest.raises(InputError, match=f"{path}: {says}"):
        open_scenes(root).split("test").scene(1)


def test_a_broken_image_is_named(tmp_path):
    root = folder(tmp_path, [0])
    path = tmp_path / "test/images/b.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=f"{path}: can't be read as an image"):
        open_scenes(root).split("test").scene(1)


@pytest.mark.parametrize("text, says", [
    (None, "no such file; the class names are needed there"), ("", "names 0 classes; 2 to 254"),
    ("sand\n", "names 1 classes"), ("sand\nsea\nsand\n", "names 'sand' twice"), (b"\xff\xfe\x00", "can't be read"),
    ("\n".join(map(str, range(255))), "names 255 classes"),
])
def test_a_class_list_that_is_none_is_named(tmp_path, text, says):
    root = folder(tmp_path, [0])
    path = root / "classes.txt"
    path.unlink() if text is None else path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=f"{path}: {says}"):
        open_scenes(root)


def test_the_last_of_254_classes_is_one_and_the_id_after_it_is_unknown(tmp_path):
    data = open_scenes(folder(tmp_path, [0, 253, 255], tuple(map(str, range(254)))))
    assert data.split("val").scene(0)[1].flatten()[:3].tolist() == [0, 253, 255]
    write_mask(tmp_path / "val" / "masks" / "a.png", [0, 254])
    with pytest.raises(InputError, match="holds id 254, which is unknown; ids are 0 to 253, 255"):
        data.split("val").scene(0)


@pytest.mark.parametrize("masks", ["masks", "annotations", "labels", "ann_dir", "SegmentationClass", "gtFine",
                                   "trainannot"])
def test_images_beside_masks_in_no_layout_are_not_taken_for_photographs_without(tmp_path, masks):
    write_image(tmp_path / "images" / "a.jpg")
    assert not open_scenes(tmp_path).labelled
    write_mask(tmp_path / masks / "a.png", [0, 1])
    with pytest.raises(InputError, match=f"^{tmp_path}: has {masks}/, but none of the layouts .*train/images/, "
                                         f"train/masks/"):
        open_scenes(tmp_path)


@pytest.mark.parametrize("content, says", [(None, "can't be read \\(Is a directory\\)"), (b"\n \n", "names no image"),
                                           (b"2008_\xff\n", "can't be read \\('utf-8' codec can't decode byte 0xff")])
def test_a_list_of_images_that_is_none_is_named(tmp_path, content, says):
    path = pascal_voc(tmp_path, [0]) / "ImageSets" / "Segmentation" / "val.txt"
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{path}: {says}"):
        open_scenes(tmp_path)


def test_folders_that_hold_no_scenes_are_named(tmp_path):
    with pytest.raises(InputError, match=f"'{tmp_path / 'nowhere'}': no such folder; give one of"):
        open_scenes(tmp_path / "nowhere")
    with pytest.raises(InputError, match="'': no such folder"):
        open_scenes("")
    with pytest.raises(InputError, match=f"{tmp_path}: has none of the layouts"):
        open_scenes(tmp_path)
    root = folder(tmp_path / "f", [0])
    for path in (root / "val" / "images").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=f"{root / 'val' / 'images'}: holds no images"):
        open_scenes(root)


def test_a_name_in_a_pascal_list_without_image_is_named(tmp_path):
    root = pascal_context(tmp_path, [0])
    (root / "JPEGImages" / "2010_000003.jpg").unlink()
    with pytest.raises(InputError, match=f"{root}/ImageSets/SegmentationContext/val.txt: names 2010_000003, but .*jpg "
                                         f"is missing"):
        open_scenes(root)


# ---------------------------------------------------------------- joint transforms

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)


def coloured(height: int = 23, width: int = 29, block: int = 1, seed: int = 0) -> tuple[Image.Image, np.ndarray]:
    """An image that says each pixel's class: class k is grey 20 k. Blocks of one class."""
    small = np.random.default_rng(seed).integers(0, 10, (-(-height // block), -(-width // block)), dtype=np.uint8)
    mask = small.repeat(block, 0).repeat(block, 1)[:height, :width].copy()
    return Image.fromarray(np.repeat(20 * mask[..., None], 3, axis=2)), mask


def classes_in(image: torch.Tensor) -> torch.Tensor:
    """The classes that a transformed image says: (3, h, w) -> (h, w), -1 for the mean colour."""
    grey = (image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
    filled = ((image.abs() < 0.01).all(dim=0))
    return torch.where(filled, -1, (grey.mean(dim=0) / 20).round().long())


def test_evaluation_normalises_alone():
    image, mask = coloured()
    x, y = evaluation_transform(MEAN, STD)(image, mask)
    assert (x.dtype, y.dtype, x.shape, y.shape) == (torch.float32, torch.int64, (3, 23, 29), (23, 29))
    assert type(x) is torch.Tensor and type(y) is torch.Tensor and np.array_equal(y.numpy(), mask)
    for c, i, j in ((0, 0, 0), (1, 22, 3), (2, 7, 28)):
        assert float(x[c, i, j]) == pytest.approx((image.getpixel((j, i))[c] / 255 - MEAN[c]) / STD[c], abs=1e-6)


@pytest.mark.parametrize("size, top, left", [((11, 17), 6, 6), ((23, 29), 0, 0), ((31, 17), 0, 6)])
def test_the_middle_is_cut_out_and_what_is_missing_below_and_right_of_it_is_ignored(size, top, left):
    image, mask = coloured()
    x, y = evaluation_transform(MEAN, STD, size)(image, mask)
    assert x.shape == (3, *size) and y.shape == size
    inside = mask[top:top + size[0], left:left + size[1]]
    assert np.array_equal(y[:len(inside)].numpy(), inside) and bool((y[len(inside):] == 255).all())
    said = classes_in(x)
    assert torch.equal(said == -1, y == 255) and torch.equal(said[y != 255], y[y != 255])


@pytest.mark.parametrize("size", [(23, 29), (11, 17), (31, 37), (11, 41)])
def test_crops_and_flips_move_image_and_mask_together_and_what_is_filled_is_ignored(size):
    transform = training_transform(size, MEAN, STD, scale=(1, 1), color_jitter=0)
    image, mask = coloured()
    flipped = 0
    for seed in range(8):
        torch.manual_seed(seed)
        x, y = transform(image, mask)
        assert x.shape == (3, *size) and y.shape == size
        said = classes_in(x)
        assert torch.equal(said == -1, y == 255) and torch.equal(said[y != 255], y[y != 255])
        assert int((y == 255).sum()) == size[0] * size[1] - min(size[0], 23) * min(size[1], 29)
        flipped += size == (23, 29) and np.array_equal(y.numpy(), mask[:, ::-1])
    assert size != (23, 29) or 0 < flipped < 8


def test_resizing_moves_image_and_mask_together():
    image, mask = coloured(64, 96, block=16)
    for seed in range(6):
        torch.manual_seed(seed)
        x, y = training_transform((64, 96), MEAN, STD, scale=(0.5, 2.0), color_jitter=0)(image, mask)
        same = classes_in(x)[y != 255] == y[y != 255]
        # all but the soft edges of regions of 8 to 32 pixels
        assert float(same.float().mean()) > 0.75


def test_the_factor_is_drawn_from_the_whole_range_and_both_sides_share_it():
    image = Image.new("RGB", (60, 40), (0, 0, 0))
    transform, factors = training_transform((80, 120), (0.5,) * 3, (0.5,) * 3, scale=(0.5, 2.0), color_jitter=0), []
    for seed in range(40):
        torch.manual_seed(seed)
        inside = transform(image, np.zeros((40, 60), np.uint8))[1] != 255
        height, width = int(inside.any(1).sum()), int(inside.any(0).sum())
        assert abs(height * 1.5 - width) <= 1.5
        factors.append(height / 40)
    assert 0.5 <= min(factors) < 0.65 and 1.85 < max(factors) <= 2.0 and 1.0 < np.mean(factors) < 1.5


def test_colours_change_the_image_and_never_the_mask():
    image, mask = coloured()
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        x, y = training_transform((23, 29), MEAN, STD, scale=(1, 1), hflip=0, color_jitter=0.5)(image, mask)
        assert np.array_equal(y.numpy(), mask)
        found.append(x)
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


# ---------------------------------------------------------------- batches

class Model(nn.Module):
    """What batches ask of a Segmenter: its size, the encoder's mean and deviation, and the number of classes."""

    def __init__(self, num_classes: int = 11, img_size: tuple[int, int] = (32, 32)) -> None:
        super().__init__()
        self.encoder, self.num_classes, self.img_size = tiny(img_size=img_size), num_classes, img_size


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(torch.equal(p, q) for left, right in zip(a, b) for p, q in zip(left, right))


def batches(**settings):
    settings = {"batch_size": 4, "limit": 14, "seed": 5, "workers": 0, "training": Shuffled(), **settings}
    return open_scenes("digit_scenes").batches("train", Model(), **settings)


def test_evaluation_batches_hold_every_image_once_in_order_with_int64_masks():
    data = open_scenes("digit_scenes")
    found = list(data.batches("val", Model(), batch_size=30, whole=True))
    assert [len(x) for x, _ in found] == [30, 30, 30, 10]
    masks = torch.cat([y for _, y in found])
    assert masks.shape == (100, 64, 96) and masks.dtype == torch.int64 and found[0][0].shape == (30, 3, 64, 96)
    assert all(np.array_equal(masks[i].numpy(), data.split("val").scene(i)[1]) for i in range(0, 100, 9))
    image = torch.from_numpy(np.asarray(data.split("val").scene(0)[0]).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(found[0][0][0], (image - 0.5) / 0.5)     # the encoder's mean and deviation


def test_training_batches_are_crops_of_the_models_size_whatever_whole_says():
    assert {(x.shape, y.shape) for x, y in batches()} == {((4, 3, 32, 32), (4, 32, 32))}
    data, model = open_scenes("digit_scenes"), Model(img_size=(24, 40))
    for whole in (False, True):
        x, y = next(iter(data.batches("train", model, batch_size=4, limit=14, training=Shuffled(), whole=whole)))
        assert x.shape == (4, 3, 24, 40) and y.shape == (4, 24, 40)


def test_without_training_an_image_is_its_middle_at_the_models_size_and_what_is_missing_is_ignored():
    data = open_scenes("digit_scenes")                                  # 64 x 96
    masks = [data.split("val").scene(i)[1] for i in range(3)]

    def first(img_size: tuple[int, int], **settings):
        return next(iter(data.batches("val", Model(img_size=img_size), batch_size=3, workers=0, **settings)))
    (x, y), (whole, _) = first((24, 40)), first((24, 40), whole=True)
    assert all(np.array_equal(y[i].numpy(), masks[i][20:44, 28:68]) for i in range(3))
    assert torch.equal(x, whole[:, :, 20:44, 28:68])
    x, y = first((72, 88))
    assert x.shape == (3, 3, 72, 88) and (y[:, 64:] == 255).all()
    assert all(np.array_equal(y[i, :64].numpy(), masks[i][:, 4:92]) for i in range(3))


def test_scenes_are_not_resized_so_a_crop_share_is_refused():
    with pytest.raises(InputError, match="digit_scenes: crop_pct is 0.9, but scenes are taken as they are"):
        batches(training=None, crop_pct=0.9)


def test_training_goes_on_in_the_middle_of_an_epoch_bit_for_bit():
    whole = batches()
    first, second = list(whole), list(whole)                            # epochs 0 and 1
    assert len(first) == 3 and not same(first, second)
    later = batches()
    torch.manual_seed(99)                                               # whatever was drawn before
    later.begin(1, 2)
    assert same(list(later), second[2:])
    later.begin(0)
    assert same(list(later), first)


def test_repeats_take_an_image_several_times_in_a_row_each_with_random_numbers_of_its_own():
    found = batches(training=Shuffled(repeats=2))
    names = [found.names(0, batch) for batch in range(3)]
    assert all(four[0] == four[1] and four[2] == four[3] for four in names)
    images = next(iter(found))[0]
    assert not torch.equal(images[0], images[1])


def test_a_seed_of_its_own_makes_each_sample_and_leaves_the_random_numbers_of_others_alone():
    images = open_scenes("digit_scenes").split("train")
    images.transform = training_transform((32, 32), MEAN, STD)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, other, again = images[3, (77,)], images[3, (78,)], images[3, (77,)]
    assert torch.equal(torch.get_rng_state(), before)
    assert same([one], [again]) and not torch.equal(one[0], other[0])


def test_loader_processes_give_the_same_batches():
    assert same(list(batches(workers=1)), list(batches(workers=0)))


def test_two_processes_share_the_batches_of_one(monkeypatch):
    def places(rank: int, world: int, training: bool) -> list:
        monkeypatch.setattr("vitlab.runtime.parallel.rank", lambda: rank)
        monkeypatch.setattr("vitlab.runtime.parallel.world", lambda: world)
        return list(batches(training=Shuffled() if training else None, shared=True, batch_size=3))
    one = places(0, 1, False)
    halves = places(0, 2, False), places(1, 2, False)
    assert same([b for pair in itertools.zip_longest(*halves) for b in pair if b is not None], one)
    pictures = {x.numpy().tobytes() for rank in (0, 1) for batch, _ in places(rank, 2, True) for x in batch}
    assert len(pictures) == 12                                          # 2 processes, 2 batches of 3 each, none twice


def refusal(found) -> str:
    """What ends the batches; no traceback is kept that would keep the loader's process."""
    try:
        list(found)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("training", [None, Shuffled()])
def test_a_scene_of_which_a_file_can_not_be_read_is_left_out_and_named(tmp_path, workers, training):
    """As a broken image of a class folder is."""
    root = folder(tmp_path, [0])
    for name in ("c", "d", "e", "f"):
        write_image(root / "train" / "images" / f"{name}.jpg")
        write_mask(root / "train" / "masks" / f"{name}.png", [1])
    image, mask = root / "train" / "images" / "b.jpg", root / "train" / "masks" / "d.png"
    image.write_bytes(image.read_bytes()[:200])
    mask.write_bytes(b"")
    data = open_scenes(root)
    with pytest.raises(Unreadable, match=f"{mask}: can't be read as a mask"):
        data.split("train").scene(3)
    found = data.batches("train", Model(2, (8, 16)), batch_size=3, training=training, workers=workers)
    with pytest.warns(UserWarning) as said:
        assert sorted(len(y) for _, y in found) in ([2, 2], [1, 3])
    assert sorted(str(each.message).partition(" (")[0] for each in said) == [f"{image}: can't be read as an image",
                                                                              f"{mask}: can't be read as a mask"]
    assert sorted(found.broken) == [str(image), str(root / "train" / "images" / "d.jpg")]
    for file in (root / "train" / "masks").iterdir():
        file.write_bytes(b"")
    again = data.batches("train", Model(2, (8, 16)), batch_size=3, training=training, workers=0)
    with pytest.warns(UserWarning):
        said = refusal(again)
    assert said.startswith("no image of a batch of 3 could be read") if training else said == ""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_mask_ends_the_batches_with_its_name_in_one_line(tmp_path, workers):
    root = folder(tmp_path, [0])
    write_mask(root / "test" / "masks" / "b.png", [7])
    said = refusal(open_scenes(root).batches("test", Model(2), batch_size=2, workers=workers))
    assert said == f"{root}/test/masks/b.png: holds id 7, which is unknown; ids are 0 to 1, 255"


def test_images_that_differ_in_size_are_evaluated_one_by_one(tmp_path):
    root = folder(tmp_path, [0])
    write_image(root / "val" / "images" / "b.jpg", (7, 9))
    write_mask(root / "val" / "masks" / "b.png", [1], (7, 9))
    data = open_scenes(root)
    with pytest.raises(InputError, match="images of 7 x 9 and 11 x 13 in one batch; .* batches of 1"):
        list(data.batches("val", Model(2), batch_size=2, workers=0, whole=True))
    assert [tuple(y.shape) for _,
            y in data.batches("val", Model(2), batch_size=1, workers=0, whole=True)] == [(1, 11, 13), (1, 7, 9)]
    for training in (Shuffled(), None):
        found = data.batches("val", Model(2, (8, 16)), batch_size=2, training=training, workers=0)
        assert [tuple(y.shape) for _, y in found] == [(2, 8, 16)]


def test_the_parts_of_train_are_scenes_without_one_in_common():
    data = open_scenes("digit_scenes")
    parts = data.parts(2, score=60, choose=30)
    score, choose = ({parts.split(name).path(i) for i in range(len(parts.split(name)))} for name in ("score", "choose"))
    assert (len(score), len(choose)) == (60, 30) and not score & choose and isinstance(parts, SceneData)
    assert parts.split("choose").scene(0)[1].shape == (32, 32) and isinstance(parts.split("choose"), Scenes)
    assert data.files("val")[:2] == ["digit_scenes", "digit_scenes/val/0"] and "train" in data.splits


def test_a_model_of_another_number_of_classes_and_a_missing_split_are_refused(tmp_path):
    data = open_scenes(folder(tmp_path, [0]))
    with pytest.raises(InputError, match="2 classes, but the model's decoder has 11"):
        data.batches("val", Model())
    with pytest.raises(InputError, match="no split 'wal'"):
        data.split("wal")
    del data.splits["test"], data.splits["val"]
    for what in ("report on", "choose on"):
        with pytest.raises(InputError, match=f"no .*split to {what} .*it has .'train'."):
            data.held_out if what == "report on" else data.choose_on  # noqa: B018


if __name__ == "__main__":
    PAGE.write_text(layouts_page(), encoding="utf-8")
