"""Data sets: the embedded digits, image folders, broken images, slices and batches."""
import io
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from sklearn.datasets import load_digits
from training_fixtures import one_thread, tiny, write_folder, write_grey  # noqa: F401

from vitlab.data import Shuffled, open_data
from vitlab.runtime.files import InputError


def grey_levels(batches) -> list[int]:
    """The grey level of every image in the batches (mean and deviation 0.5 undone), in order, to know images again."""
    return [round(float(x.mean() * 0.5 + 0.5) * 255) for images, _ in batches for x in images]


def targets_of(batches) -> list[int]:
    return [t for _, targets in batches for t in targets.tolist()]


# ---------------------------------------------------------------- digits

def test_digits_hold_1437_training_and_360_held_out_images_that_are_disjoint_and_together_all_1797():
    data = open_data("digits")
    train, test = data.split("train"), data.split("held_out")
    numbers = [{int(s.path(i).split("/")[1]) for i in range(len(s))} for s in (train, test)]
    assert (len(train), len(test)) == (1437, 360)
    assert not numbers[0] & numbers[1]
    assert numbers[0] | numbers[1] == set(range(1797))
    assert data.held_out == "test" and data.num_classes == 10


def test_digits_split_is_the_same_every_time():
    def order(split):
        images = open_data("digits").split(split)
        return [images.path(i) for i in range(len(images))]
    assert order("train") == order("train") and order("test") == order("test")


def test_digits_split_has_each_class_in_the_same_share_in_both_parts():
    data = open_data("digits")
    splits = data.split("train"), data.split("test")
    counts = [np.bincount([s.reader[i][1] for i in range(len(s))], minlength=10) for s in splits]
    total = counts[0] + counts[1]
    # whole images alone can be dealt out, so a class is off its exact share by less than one image
    assert np.all(np.abs(counts[1] - total * 360 / 1797) < 1)


def test_digits_are_32_by_32_rgb_of_the_scanned_digit_with_its_label():
    train, bunch = open_data("digits").split("train"), load_digits()
    for i in (0, 7, 1436):
        image, target = train.image(i)
        number = int(train.path(i).split("/")[1])
        assert image.size == (32, 32) and image.mode == "RGB"
        assert target == bunch.target[number]
        shrunk = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), float) * 16 / 255
        assert np.corrcoef(shrunk.ravel(), bunch.images[number].ravel())[0, 1] > 0.95   # the bicubic blur alone is lost


# ---------------------------------------------------------------- folders

@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_a_folder_of_train_and_any_of_the_held_out_names_opens_with_sorted_class_numbers(tmp_path, held_out):
    data = open_data(write_folder(tmp_path, {"train": 3, held_out: 2}))
    assert data.has_held_out and data.held_out == held_out and data.classes == ["ant", "bee",
                                                                                "cat"] and data.num_classes == 3
    assert len(data.split("train")) == 9 and len(data.split("held_out")) == 6
    batches = data.batches("held_out", tiny(), batch_size=4, workers=0)
    assert targets_of(batches) == [0, 0, 1, 1, 2, 2]
    assert grey_levels(batches) == [0, 1, 2, 3, 4, 5]


def test_a_held_out_split_alone_opens_and_train_is_said_to_be_missing(tmp_path):
    data = open_data(write_folder(tmp_path, {"val": 1}))
    with pytest.raises(InputError, match=r"no split 'train'; it has \['val'\]"):
        data.split("train")


def test_a_missing_split_error_names_those_there_are(tmp_path):
    data = open_data(write_folder(tmp_path, {"train": 1}))
    assert not data.has_held_out
    with pytest.raises(InputError, match=r"held-out.*\['train'\]"):
        data.split("held_out")
    with pytest.raises(InputError, match=r"no split 'wal'.*\['test', 'train'\]"):
        open_data("digits").split("wal")


def test_a_split_without_class_folders_is_refused_by_name_where_another_has_them(tmp_path):
    write_folder(tmp_path, {"val": 1})
    write_grey(tmp_path / "train" / "0.png", 0)
    with pytest.raises(InputError, match=f"{tmp_path / 'train'}: holds no class folders"):
        open_data(tmp_path)


@pytest.mark.parametrize("inside", ["", "train"])
def test_a_folder_of_images_alone_is_train_without_labels(tmp_path, inside):
    for level in (3, 40, 7):
        write_grey(tmp_path / inside / f"{level}.png", level)
    (tmp_path / inside / "notes.txt").write_text("not an image")
    (tmp_path / inside / "broken.png").write_text("not an image either")
    data = open_data(tmp_path)
    assert (list(data.splits), data.classes, data.num_classes) == (["train"], None, None)
    batches = data.batches("train", tiny(), workers=0)
    with pytest.warns(UserWarning, match="broken.png: can't be read"):
        # in natural order, whatever their labels
        assert grey_levels(batches) == [3, 7, 40]
    assert [Path(path).name for path in batches.broken] == ["broken.png"]


def test_a_tree_of_photographs_is_train_without_labels_and_where_labels_are_needed_its_splits_are_said_to_lack(
    tmp_path):
    for number, path in enumerate(("2/10.png", "2/9.png", "10/a/1.png", "stray.png", ".ipynb_checkpoints/0.png",
                                   "__MACOSX/2/9.png")):
        write_grey(tmp_path / "photos" / path, number)
    data = open_data(tmp_path / "photos")
    assert (list(data.splits), data.classes, data.labelled) == (["train"], None, False)
    assert grey_levels(data.batches("train", tiny(), workers=0)) == [3, 1, 0, 2]
    with pytest.raises(InputError, match="photos: images without labels, .*; it holds none of train/, val/, .*one "
                                         "folder per class"):
        data.need_labels()


def test_images_beside_class_folders_are_left_out_and_said_to_be(tmp_path):
    write_folder(tmp_path, {"train": 1})
    write_grey(tmp_path / "train" / "stray.png", 9)
    with pytest.warns(UserWarning, match=f"{tmp_path / 'train'}: 1 images lie outside of its class folders, stray.png "
                                         f"among them"):
        assert len(open_data(tmp_path).split("train")) == 3


def test_a_folder_too_high_or_too_low_is_refused_with_the_one_to_give(tmp_path):
    write_folder(tmp_path / "sets" / "mine", {"train": 1, "val": 1})
    write_grey(tmp_path / "sets" / "other" / "0.png", 0)
    sets, mine = tmp_path / "sets", tmp_path / "sets" / "mine"
    with pytest.raises(InputError,
                       match=f"{sets}: one folder too high; mine/ in it holds train/ and val/: give {mine}"):
        open_data(sets)
    with pytest.raises(InputError, match=f"{mine} holds train/ and val/: give that folder"):
        open_data(mine / "val").need_labels()
    tars = tmp_path / "tars" / "inside"
    tars.mkdir(parents=True)
    for name in ("train", "val"):
        (tars / f"{name}.tar").touch()
    with pytest.raises(InputError, match=f"one folder too high; inside/ in it holds train.tar and val.tar: give "
                                         f"{tars}"):
        open_data(tars.parent)
    shutil.rmtree(mine / "val")                 # a tree of images may have a folder of trains: only labels tell
    with pytest.raises(InputError, match=f"{mine} holds train/: give that folder"):
        open_data(sets).need_labels()


def test_a_step_that_needs_labels_refuses_a_folder_without_by_name_and_takes_one_with(tmp_path):
    write_grey(tmp_path / "plain" / "0.png", 0)
    with pytest.raises(InputError, match="plain: images without labels.*one folder per class"):
        open_data(tmp_path / "plain").need_labels()
    assert open_data("digits").need_labels().name == "digits"
    with pytest.raises(InputError, match="plain: images without class folders; a class map"):
        open_data(tmp_path / "plain", class_map=tmp_path / "map.json")


def test_a_class_folder_without_images_is_refused_by_name(tmp_path):
    write_folder(tmp_path, {"train": 1, "val": 1})
    (tmp_path / "val" / "bee" / "0.png").rename(tmp_path / "val" / "bee" / "0.text")
    with pytest.raises(InputError, match=f"{tmp_path / 'val' / 'bee'}: a class folder without images"):
        open_data(tmp_path)


def test_classes_that_differ_between_splits_are_refused_naming_the_odd_one(tmp_path):
    write_folder(tmp_path, {"train": 1, "val": 1})
    write_grey(tmp_path / "train" / "dog" / "0.png", 0)
    with pytest.raises(InputError, match="train/ and val/ hold different classes.*'dog'"):
        open_data(tmp_path)


def test_every_image_below_a_class_folder_is_of_that_class(tmp_path):
    """CLASS/day/1.png is an image of CLASS, also where the inner folder has another class's name."""
    write_folder(tmp_path, {"train": 1})
    write_grey(tmp_path / "train" / "ant" / "day" / "1.png", 100)
    write_grey(tmp_path / "train" / "ant" / "bee" / "2.png", 101)
    batches = open_data(tmp_path).batches("train", tiny(), workers=0)
    assert dict(zip(grey_levels(batches), targets_of(batches))) == {0: 0, 1: 1, 2: 2, 100: 0, 101: 0}


# ---------------------------------------------------------------- class_index.json

def test_a_class_index_gives_the_models_numbers_to_a_folder_of_some_classes(tmp_path):
    write_folder(tmp_path, {"train": 1, "val": 2})
    (tmp_path / "class_index.json").write_text(json.dumps({"ant": 5, "bee": 0, "cat": 9, "dog": 3}))
    data = open_data(tmp_path)
    batches = data.batches("val", tiny(num_classes=10), workers=0)
    assert dict(zip(grey_levels(batches), targets_of(batches))) == {0: 5, 1: 5, 2: 0, 3: 0, 4: 9, 5: 9}
    assert data.mapped


def test_a_class_index_given_by_path_goes_before_the_one_in_the_folder(tmp_path):
    write_folder(tmp_path / "data", {"val": 1})
    (tmp_path / "data" / "class_index.json").write_text(json.dumps({"ant": 0, "bee": 1, "cat": 2}))
    (tmp_path / "mine.json").write_text(json.dumps({"ant": 2, "bee": 1, "cat": 0}))
    data = open_data(tmp_path / "data", class_map=tmp_path / "mine.json")
    assert targets_of(data.batches("val", tiny(), workers=0)) == [2, 1, 0]


def test_splits_of_different_classes_are_welcome_with_a_class_index(tmp_path):
    write_folder(tmp_path, {"train": 1})
    write_folder(tmp_path, {"val": 1}, classes=("cat",))
    (tmp_path / "class_index.json").write_text(json.dumps({"ant": 0, "bee": 1, "cat": 2}))
    assert targets_of(open_data(tmp_path).batches("val", tiny(), workers=0)) == [2]


def test_a_folder_that_the_class_index_lacks_is_refused_by_name(tmp_path):
    write_folder(tmp_path, {"train": 1})
    (tmp_path / "class_index.json").write_text(json.dumps({"ant": 0, "cat": 1}))
    with pytest.raises(InputError, match=f"{tmp_path / 'train' / 'bee'}: not in the class map .*class_index.json"):
        open_data(tmp_path)


def test_a_class_index_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="absent.json: no such file"):
        open_data(write_folder(tmp_path, {"train": 1}), class_map=tmp_path / "absent.json")


@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_class_count_that_is_not_the_classifiers_is_refused_with_both_counts(tmp_path, num_classes):
    data = open_data(write_folder(tmp_path, {"train": 1}))
    with pytest.raises(InputError, match=f"3 classes.*classifier has {num_classes}.*class_index.json"):
        data.batches("train", tiny(num_classes=num_classes), workers=0)


def test_a_class_index_fits_a_larger_classifier_and_no_smaller_one_than_its_largest_number(tmp_path):
    write_folder(tmp_path, {"train": 1})
    (tmp_path / "class_index.json").write_text(json.dumps({"ant": 0, "bee": 1, "cat": 6}))
    data = open_data(tmp_path)
    data.check_fits(7)
    data.check_fits(1000)
    data.check_fits(0)                          # no classifier: nothing to fit
    with pytest.raises(InputError, match="classifier has 6"):
        data.check_fits(6)


# ---------------------------------------------------------------- slices

def test_a_slice_has_the_size_asked_for_and_is_the_same_for_the_same_seed():
    data = open_data("digits")

    def names(limit, seed):
        images = data.split("train", limit, seed)
        return [images.path(i) for i in range(len(images))]
    assert len(names(53, 1)) == 53 == len(set(names(53, 1)))
    assert names(53, 1) == names(53, 1)
    assert set(names(53, 1)) != set(names(53, 2))


def test_a_slice_larger_than_the_split_is_the_whole_split_and_none_keeps_its_order(tmp_path):
    data = open_data(write_folder(tmp_path, {"val": 2}))
    with pytest.warns(UserWarning, match="1000 images were asked for; the split has 6"):
        assert len(data.split("val", limit=1000)) == 6
    assert grey_levels(data.batches("val", tiny(), limit=None, workers=0)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_slice_of_no_image_is_refused(limit):
    with pytest.raises(InputError, match=f"limit is {limit}; at least 1"):
        open_data("digits").split("train", limit)


# ---------------------------------------------------------------- broken images

def noise(format: str, **options) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of under 100 bytes whose header declares 60,000 x 60,000 pixels: over 10 GB, were it decoded."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR",
                                        header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")


def write_broken(folder: Path) -> set[str]:
    """Broken images of several kinds, named so that they lie before, between and after the good ones."""
    files = {"0_cut.jpg": noise("JPEG")[:700], "1_text.jpg": b"not an image at all\n", "2_empty.png": b"",
             "m_bomb.png": bomb(), "z_cut.png": noise("PNG")[:900], "z_header.jpg": b"\xff\xd8\xff"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "z_gone.png").symlink_to(folder / "nowhere.png")
    return {str(folder / name) for name in [*files, "z_gone.png"]}


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_left_out_and_named_once_each_and_every_good_one_is_counted_once(tmp_path, workers):
    write_folder(tmp_path, {"val": 3})
    broken = write_broken(tmp_path / "val" / "ant") | write_broken(tmp_path / "val" / "cat")
    batches = open_data(tmp_path).batches("val", tiny(), batch_size=4, workers=workers)
    for _ in range(2):                                          # a second pass must not count them again
        with pytest.warns(UserWarning) if not batches.broken else pytest.MonkeyPatch.context():
            pairs = list(batches)
        assert sorted(zip(grey_levels(pairs), targets_of(pairs))) == list(zip(range(9), [0, 0, 0, 1, 1, 1, 2, 2, 2]))
        assert set(batches.broken) == broken and len(batches.broken) == len(broken) == 14


def test_a_broken_image_is_warned_of_by_path(tmp_path):
    write_folder(tmp_path, {"val": 1})
    (tmp_path / "val" / "ant" / "bad.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=f"{tmp_path / 'val' / 'ant' / 'bad.png'}: can't be read"):
        list(open_data(tmp_path).batches("val", tiny(), workers=0))


def test_broken_images_of_a_slice_are_named_by_their_own_path(tmp_path):
    """The flag of a broken image counts within the slice, which has an order of its own."""
    write_folder(tmp_path, {"val": 3})
    bad = tmp_path / "val" / "bee" / "1.png"
    bad.write_bytes(b"nonsense")
    for seed in range(5):
        batches = open_data(tmp_path).batches("val", tiny(), limit=9, seed=seed, workers=0)
        with pytest.warns(UserWarning):
            assert sorted(grey_levels(batches)) == [0, 1, 2, 3, 5, 6, 7, 8]
        assert batches.broken == [str(bad)]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow is built without AVIF, so it can't break on one")
def test_a_damaged_avif_under_a_jpg_name_is_left_out_like_any_other(tmp_path):
    """Pillow goes by the content, and its AVIF decoder raises RuntimeError."""
    write_folder(tmp_path, {"val": 1})
    content = bytearray(noise("AVIF"))
    pixels = content.index(b"mdat") + 4
    content[pixels:pixels + 12] = bytes(12)
    (tmp_path / "val" / "ant" / "bad.jpg").write_bytes(content)
    batches = open_data(tmp_path).batches("val", tiny(), workers=0)
    with pytest.warns(UserWarning, match="bad.jpg"):
        assert grey_levels(batches) == [0, 1, 2]


def test_a_split_of_broken_images_alone_gives_no_batch(tmp_path):
    write_folder(tmp_path, {"val": 1})
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"")
    batches = open_data(tmp_path).batches("val", tiny(), workers=0)
    with pytest.warns(UserWarning):
        assert list(batches) == []
    assert len(batches.broken) == 3


def test_greyscale_palette_and_transparent_images_come_as_three_channels(tmp_path):
    for i, mode in enumerate(("L", "P", "RGBA", "1", "CMYK", "I;16")):
        path = tmp_path / "val" / "ant" / (f"{i}.jpg" if mode == "CMYK" else f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (32, 32)).save(path)
    batches = open_data(tmp_path).batches("val", tiny(num_classes=1), workers=0)
    assert [tuple(x.shape) for x, _ in batches] == [(6, 3, 32, 32)]
    assert batches.broken == []


# ---------------------------------------------------------------- batches

def test_training_batches_are_shuffled_anew_each_pass_and_drop_the_last_partial_batch(tmp_path):
    data = open_data(write_folder(tmp_path, {"train": 11}))                     # 33 images: 6 batches of 5, 3 left over
    batches = data.batches("train", tiny(), batch_size=5, workers=0,
                           training=Shuffled(augment={"color_jitter": 0.0}))
    torch.manual_seed(0)
    first, second = list(batches), list(batches)
    assert len(batches) == 6 and [len(x) for x, _ in first] == [5] * 6
    levels = grey_levels(first)
    assert len(set(levels)) == 30 and levels != sorted(levels)
    assert levels != grey_levels(second)
    # labels go with their images
    assert [t for _, y in first for t in y.tolist()] == [level // 11 for level in levels]


def test_evaluation_batches_keep_the_last_partial_batch_and_the_order(tmp_path):
    data = open_data(write_folder(tmp_path, {"train": 11}))
    batches = data.batches("train", tiny(), batch_size=5, workers=0)
    assert [len(x) for x, _ in batches] == [5] * 6 + [3]
    assert grey_levels(batches) == list(range(33))


def test_a_training_split_smaller_than_the_batch_is_one_batch_and_not_none(tmp_path):
    data = open_data(write_folder(tmp_path, {"train": 2}))
    assert [len(x) for x, _ in data.batches("train", tiny(), batch_size=64, training=Shuffled(), workers=0)] == [6]


def test_images_come_in_the_models_size_mean_and_deviation(tmp_path):
    data = open_data(write_folder(tmp_path, {"val": 1}))
    model = tiny(img_size=48)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 0.2),
                            "input_size": (3, 48, 48)}
    images, _ = next(iter(data.batches("val", model, workers=0)))
    assert tuple(images.shape) == (3, 3, 48, 48)
    wanted = torch.tensor([[(level / 255 - m) / s for m, s in ((0.1, 0.5), (0.2, 0.25), (0.3, 0.2))]
                           for level in (0, 1, 2)])
    torch.testing.assert_close(images.mean(dim=(2, 3)), wanted, rtol=0, atol=1e-5)     # float32 of numbers about 1


def test_images_come_in_the_size_the_model_is_not_the_one_its_name_says():
    model = tiny(num_classes=10, img_size=48)
    x, _ = next(iter(open_data("digits").batches("test", model, batch_size=2)))
    assert x.shape == (2, 3, 48, 48) and model(x).shape == (2, 10)
