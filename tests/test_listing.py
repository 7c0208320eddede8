"""What is an image, in which order classes are numbered, and what other people's folders, tars and data sets hold."""
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from segmenting_fixtures import opened, small
from test_data_sources import write_shards, write_tars
from training_fixtures import one_thread, tiny, write_easy_folder, write_folder, write_grey  # noqa: F401

from vitlab import cli
from vitlab.data import Shuffled, open_data
from vitlab.data.folder import read_class_map
from vitlab.data.images import Images
from vitlab.data.listing import ENDINGS, images_below, images_in
from vitlab.data.loading import fault, load
from vitlab.data.masks import open_scenes
from vitlab.models import checkpoint, shape_of
from vitlab.plan import CompressionPlan
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError
from vitlab.workbench import steps
from vitlab.workbench.segmenting import predict

NUMBERS = ("0", "1", "2", "10", "11", "100")    # as timm sorts them; as text 0, 1, 10, 100, 11, 2
JUNK = (".ipynb_checkpoints/a.png", "__MACOSX/1/a.png", "._a.png", ".DS_Store", "Thumbs.db", "desktop.ini",
        "@eaDir/a.png")


def numbered(data) -> dict[str, int]:
    """{class folder: number} as the images of `val` have it."""
    images = data.split("val")
    return {Path(images.path(i)).parent.name: images.reader[images.indices[i]][1] for i in range(len(images))}


# ---------------------------------------------------------------- order

def test_classes_are_numbered_in_natural_order_in_folders_and_in_tars(tmp_path):
    write_folder(tmp_path / "folder", {"train": 1, "val": 2}, classes=NUMBERS)
    wanted = {name: number for number, name in enumerate(NUMBERS)}
    for place in (tmp_path / "folder", write_tars(tmp_path / "folder", tmp_path / "tars")):
        data = open_data(place)
        assert data.classes == list(NUMBERS) and numbered(data) == wanted
        # a state of a training with other numbers is not gone on from
        assert data.files("train")[1:7] == list(NUMBERS)


def test_a_tar_numbers_nested_folders_as_the_folder_does_whatever_lies_above_them(tmp_path):
    write_folder(tmp_path / "f", {"train": 2, "val": 2}, classes=NUMBERS)
    write_grey(tmp_path / "f" / "val" / "10" / "2" / "5.png", 200)
    tars = write_tars(tmp_path / "f", tmp_path / "tars")
    with tarfile.open(tars / "val.tar", "w") as tar:
        tar.add(tmp_path / "f" / "val", arcname="sets/val")
    plain, packed = (open_data(place).split("val") for place in (tmp_path / "f", tars))
    names = [[(path.split("val/")[-1], images.reader[i][1]) for i,
              path in enumerate(map(images.path, range(len(images))))]
             for images in (plain, packed)]
    assert names[0] == names[1] and ("10/2/5.png", 3) in names[0]


def test_a_tar_of_tars_of_one_class_each_opens(tmp_path):
    write_folder(tmp_path, {"train": 2})
    for name in ("ant", "bee", "cat"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for i in range(2):
                tar.add(tmp_path / "train" / name / f"{i}.png", arcname=f"{i}.png")
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name in ("ant", "bee", "cat"):
            tar.add(tmp_path / f"{name}.tar", arcname=f"{name}.tar")
    data = open_data(tmp_path / "all.tar")
    assert data.classes == ["ant", "bee",
                            "cat"] and [data.split("train").image(i)[1] for i in range(6)] == [0, 0, 1, 1, 2, 2]


def test_a_checkpoint_with_its_classes_in_the_order_of_letters_gets_its_own_numbers(tmp_path):
    """As those trained before classes were sorted as numbers; wrong numbers would go unseen."""
    model = tiny(num_classes=len(NUMBERS))
    write_folder(tmp_path / "data", {"val": 2}, classes=NUMBERS)
    for place in (tmp_path / "data",
                  write_tars(write_folder(tmp_path / "f", {"train": 1, "val": 2}, classes=NUMBERS), tmp_path / "tars")):
        found = opened(model, classes=sorted(NUMBERS))
        data = steps.open_matching(place, found)
        assert data.classes == sorted(NUMBERS)
        assert {name: data.split("val").image(2 * i)[1] for i,
                name in enumerate(NUMBERS)} == {n: sorted(NUMBERS).index(n) for n in NUMBERS}
    (tmp_path / "data" / "class_index.json").write_text(json.dumps({name: i for i, name in enumerate(NUMBERS)}))
    with pytest.raises(InputError, match="its classes are not the model's: their order differs, number 2 is '2' here "
                                         "and '10' there"):
        steps.open_matching(tmp_path / "data", found)


def test_where_labels_are_not_needed_a_folder_of_other_classes_serves_without_them(tmp_path):
    write_folder(tmp_path / "data", {"train": 2})
    with pytest.warns(UserWarning, match="its classes are not the model's.*taken without labels"):
        data = steps.open_matching(tmp_path / "data", opened(tiny(), classes=["ant", "bee", "dog"]), labels=False)
    assert not data.labelled and len(data.split("train")) == 6
    with pytest.raises(InputError, match="its classes are not the model's"):
        steps.open_matching(tmp_path / "data", opened(tiny(), classes=["ant", "bee", "dog"]))


# ---------------------------------------------------------------- what an image is

@pytest.fixture
def mixed(tmp_path) -> Path:
    """A folder of one image of each ending, half of them in capitals, and of what systems leave."""
    place = tmp_path / "mixed" / "1"
    for i, ending in enumerate(ENDINGS):
        # Pillow goes by the content
        write_grey(place / f"{i}.png", i).rename(place / f"{i}{ending.upper() if i % 2 else ending}")
    for junk in JUNK:
        (place / junk).parent.mkdir(exist_ok=True, parents=True)
        (place / junk).write_bytes(b"no image")
    (place / "notes.txt").write_text("no image")
    return place


def test_every_ending_is_an_image_everywhere_and_notes_of_systems_are_none(mixed, tmp_path):
    count = len(ENDINGS)
    assert len(images_in(mixed)) == len(list(images_below(mixed))) == count
    (tmp_path / "set").mkdir()
    mixed.parent.rename(tmp_path / "set" / "train")
    folder = tmp_path / "set" / "train"
    data = open_data(tmp_path / "set")
    assert data.classes == ["1"] and len(data.split("train")) == count
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(folder, arcname=".")
    packed = open_data(tmp_path / "train.tar")
    assert packed.classes == ["1"] and len(packed.split("train")) == count
    for flat in (folder, folder / "1"):
        assert len(open_data(flat).split("train")) == len(open_scenes(flat).split("train")) == count
    assert len(predict(opened(small()), folder / "1", tmp_path / "out",
                       config=RunConfig(device="cpu", quiet=True))) == count
    assert open_scenes(flat).split("train").scene(0)[0].size == (32, 32)


def test_scenes_of_every_ending_are_taken(tmp_path):
    for i, ending in enumerate(ENDINGS):
        image = write_grey(tmp_path / "train" / "images" / f"{i}.png", i)
        image.rename(image.with_suffix(ending.upper() if i % 2 else ending))
        (tmp_path / "train" / "masks").mkdir(exist_ok=True)
        Image.fromarray(np.resize(np.array([0, 1], dtype=np.uint8),
                                  (32, 32))).save(tmp_path / "train" / "masks" / f"{i}.png")
    (tmp_path / "train" / "images" / "._0.png").write_bytes(b"no image")
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    assert len(open_scenes(tmp_path).split("train")) == len(ENDINGS)


def test_a_picture_that_nothing_here_decodes_is_named_with_the_reason(tmp_path):
    write_folder(tmp_path, {"val": 1})
    (tmp_path / "val" / "ant" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    batches = open_data(tmp_path).batches("val", tiny(), workers=0)
    with pytest.warns(UserWarning, match="IMG_1.HEIC: can't be read as an image .no decoder of .heic is installed; as "
                                         "JPEG"):
        assert sum(len(y) for _, y in batches) == 3


@pytest.mark.parametrize("size", [(30_000, 1), (1, 30_000)])
def test_a_strip_that_would_be_resized_to_gigabytes_is_left_out_by_name_and_size(tmp_path, size):
    write_folder(tmp_path, {"val": 1})
    strip = tmp_path / "val" / "ant" / "strip.png"
    Image.new("1", size).save(strip)
    assert strip.stat().st_size < 5000
    for training in (None, Shuffled()):
        batches = open_data(tmp_path).batches("val", tiny(), workers=0, training=training)
        with pytest.warns(UserWarning, match=f"strip.png: can't be read as an image .{size[0]} x {size[1]} pixels; the "
                                             f"long side may be"):
            assert sum(len(y) for _, y in batches) == 3
    (tmp_path / "flat").mkdir()
    strip.rename(tmp_path / "flat" / "strip.png")
    with pytest.raises(InputError, match=f"strip.png: can't be read as an image .{size[0]} x {size[1]} pixels"):
        open_scenes(tmp_path / "flat").split("train").scene(0)
    Image.new("RGB", (1000, 10)).save(tmp_path / "flat" / "strip.png")          # a panorama is none
    assert open_data(tmp_path / "flat").split("train").image(0)[0].size == (1000, 10)


# ---------------------------------------------------------------- class maps

MAPS = {"m.json": '{"ant": 5, "bee": 0, "cat": 9}',
        "imagenet_class_index.json": '{"5": ["ant", "an ant"], "0": ["bee", "a bee"], "9": ["cat", "a cat"]}',
        "id2label.json": '{"5": "ant", "0": "bee", "9": "cat"}',
        "names.json": '["bee", "x", "y", "z", "w", "ant", "u", "v", "t", "cat"]',
        "synset_words.txt": "bee A bee, Bee\nx x\ny y\nz z\nw w\nant Ant, emmet\nu u\nv v\nt t\ncat cat\n",
        "timm.txt": "bee\nx\ny\nz\nw\nant\nu\nv\nt\ncat\n"}


@pytest.mark.parametrize("name", MAPS)
def test_class_maps_are_read_as_they_are_published(tmp_path, name):
    (tmp_path / name).write_text(MAPS[name])
    found = read_class_map(tmp_path / name)
    assert {key.split()[0]: found[key] for key in found
            if key.split()[0] in ("ant", "bee", "cat")} == {"ant": 5, "bee": 0, "cat": 9}
    write_folder(tmp_path / "f", {"train": 1, "val": 1})
    tars = write_tars(tmp_path / "f", tmp_path / "tars")
    for place in (tmp_path / "f", tars):
        assert numbered(open_data(place, class_map=tmp_path / name)) == {"ant": 5, "bee": 0, "cat": 9}
    if name.endswith("json"):
        (tars / "class_index.json").write_text(MAPS[name])
        assert numbered(open_data(tars)) == {"ant": 5, "bee": 0, "cat": 9}


@pytest.mark.parametrize(("name", "text", "says"), [
    ("m.txt", "ant\nbee\nant\n", "m.txt: names 'ant' twice"), ("m.txt", "ant\n\nbee", "m.txt: an empty line names no "
                                                                                      "class"),
    ("m.txt", "", "m.txt: must be an object"), ("m.pkl", "x", "m.pkl: a pickle, which can run code and is not read"),
    ("m.json", '{"0": ["ant"], "1": ["ant"]}', "m.json: must be an object")])
def test_a_class_map_that_is_none_is_named(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=says):
        read_class_map(tmp_path / name)


def test_a_class_map_of_none_of_the_classes_is_to_blame(tmp_path):
    write_folder(tmp_path / "f", {"train": 1, "val": 1})
    (tmp_path / "m.txt").write_text("tench, Tinca tinca\ngoldfish\n")
    with pytest.raises(InputError, match="m.txt: a class map of none of the classes of .*train; it names 'tench, "
                                         ".*they are 'ant' and 2"):
        open_data(tmp_path / "f", class_map=tmp_path / "m.txt")


# ---------------------------------------------------------------- Hugging Face's data sets and shards

@pytest.fixture(scope="module")
def easy(tmp_path_factory) -> Path:
    return write_easy_folder(tmp_path_factory.mktemp("easy") / "easy", train=2, val=2)


COLUMNS = {"as usual": ("image", "label", {}), "CIFAR-10": ("img", "label", {}),
           "CIFAR-100": ("img", "fine_label", {"coarse_label": True}), "pixels": ("pixel_values", "target", {}),
           "plain integers": ("image", "label", {"plain": True}), "bytes": ("jpg", "cls", {"plain": True, "raw": True})}


def write_hugging_face(source: Path, place: Path, how: str, saved: bool) -> str:
    """The images of a folder, embedded without paths, under other columns: by save_to_disk, or as Parquet files."""
    import datasets
    image, label, options = COLUMNS[how]
    classes = ["blue", "green", "red"]
    features = {image: datasets.Image(), label: datasets.ClassLabel(names=classes)}
    features |= {"coarse_label": datasets.ClassLabel(names=["all"])} if "coarse_label" in options else {}
    features |= {label: datasets.Value("int64")} if "plain" in options else {}
    features |= {image: {"bytes": datasets.Value("binary"),
                         "path": datasets.Value("string")}} if "raw" in options else {}
    splits = {}
    for split, name in (("train", "train"), ("val", "test")):
        files = sorted((source / split).rglob("*.png"))
        rows = {image: [{"bytes": file.read_bytes(), "path": None} for file in files],
                label: [classes.index(file.parent.name) for file in files], "coarse_label": [0] * len(files)}
        splits[name] = datasets.Dataset.from_dict({key: rows[key] for key in features},
                                                  features=datasets.Features(features))
    if saved:
        datasets.DatasetDict(splits).save_to_disk(place)
    else:
        for name, dataset in splits.items():
            place.mkdir(exist_ok=True)
            dataset.to_parquet(place / f"{name}-00000-of-00001.parquet")
    return f"hfds/{place}"


@pytest.mark.parametrize("how", COLUMNS)
def test_columns_are_found_by_what_they_hold_and_embedded_images_need_no_path(easy, tmp_path, how):
    pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed (pip install vitlab[streams])")
    saved = how not in ("CIFAR-10", "bytes")
    data = open_data(write_hugging_face(easy, tmp_path / "set", how, saved))
    known = None if "plain" in how or how == "bytes" else ["blue", "green", "red"]
    assert (data.classes, data.num_classes, data.held_out) == (known, known and 3, "test")
    images, wanted = data.split("test"), open_data(easy).split("val")
    assert len(images) == len(wanted)
    for i in range(len(images)):
        (found, target), (image, number) = images.image(i), wanted.image(i)
        assert target == number and np.array_equal(np.asarray(found), np.asarray(image))
    assert images.path(3) == f"hfds/{tmp_path}/set/test/3" and data.files("train")[-1].endswith("/train/5")


def test_columns_that_cant_be_told_are_listed(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed (pip install "
                                                      "vitlab[streams])")
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(tmp_path / "text")
    with pytest.raises(InputError, match=r"which column holds the images can't be told; its columns are text "
                                         r"\(string\), label \(int64\)"):
        open_data(f"hfds/{tmp_path}/text")
    pixel = Image.new("RGB", (8, 8))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": [pixel], "label": ["a"]}, features=features).save_to_disk(tmp_path / "names")
    with pytest.raises(InputError, match=r"which column holds the classes can't be told; .*label \(string\)"):
        open_data(f"hfds/{tmp_path}/names")
    datasets.Dataset.from_dict({"photo": [pixel]},
                               features=datasets.Features({"photo": datasets.Image()})).save_to_disk(tmp_path / "bare")
    data = open_data(f"hfds/{tmp_path}/bare")
    assert not data.labelled and data.split("train").image(0)[1] == 0


def test_a_class_map_numbers_hugging_faces_classes_by_name(easy, tmp_path):
    pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed (pip install vitlab[streams])")
    name = write_hugging_face(easy, tmp_path / "set", "as usual", True)
    (tmp_path / "map.json").write_text('{"red": 0, "green": 7, "blue": 4, "grey": 9}')
    data = open_data(name, class_map=tmp_path / "map.json")
    assert [data.split("test").image(i)[1] for i in (0, 2, 4)] == [4, 7, 0] and (data.num_classes,
                                                                                 data.mapped) == (10, True)
    (tmp_path / "map.json").write_text('{"red": 0, "green": 1}')
    with pytest.raises(InputError, match="blue: not in the class map"):
        open_data(name, class_map=tmp_path / "map.json")


def rewritten(shards: Path, change) -> Path:
    """Every file of every shard under another name or content: change(ending, content) -> the same of the new file, or
    None."""
    for shard in shards.glob("*.tar"):
        with tarfile.open(shard) as tar:
            files = [(member.name, tar.extractfile(member).read()) for member in tar]
        with tarfile.open(shard, "w") as tar:
            for name, content in files:
                stem, ending = name.split(".")
                made = change(ending, content)
                if made is not None:
                    entry = tarfile.TarInfo(f"{stem}.{made[0]}")
                    entry.size = len(made[1])
                    tar.addfile(entry, io.BytesIO(made[1]))
    return shards


@pytest.mark.parametrize("field", ["label", "class_id", "cls"])
def test_labels_of_shards_may_be_in_json_and_their_images_of_any_ending(easy, tmp_path, field):
    pytest.importorskip("webdataset", reason="webdataset is not installed (pip install vitlab[streams])")

    def change(ending: str, content: bytes) -> tuple[str, bytes]:
        return ("JPEG",
                content) if ending == "png" else ("json",
                                                  json.dumps({field: int(content), "w": 32, "note": "x"}).encode())
    data = open_data(f"wds/{rewritten(write_shards(easy, tmp_path / 'shards'), change)}")
    targets = [t for _, y in data.batches("held_out", tiny(), workers=0) for t in y.tolist()]
    assert sorted(targets) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("change", "says"), [
    (lambda e, c: (e, c) if e == "png" else ("json", b'{"caption": "a"}'), r"its .json has no class number under "
                                                                           r"label, .* \['caption'\]"),
    (lambda e, c: (e, c) if e == "png" else None, "000000 has no label, .cls or .json; it has .png"),
    (lambda e, c: (e, c) if e == "cls" else ("npy", c), "000000 has no image .*; it has .npy, .cls")])
def test_shards_without_image_or_label_are_refused_by_their_first_sample(easy, tmp_path, change, says):
    pytest.importorskip("webdataset", reason="webdataset is not installed (pip install vitlab[streams])")
    with pytest.raises(InputError, match=f"easy-train-0000.tar: sample .*{says}"):
        open_data(f"wds/{rewritten(write_shards(easy, tmp_path / 'shards'), change)}")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_of_a_stream_that_lacks_its_label_ends_in_one_line_with_the_streams_name(easy, tmp_path, workers):
    pytest.importorskip("webdataset", reason="webdataset is not installed (pip install vitlab[streams])")
    samples = itertools.count(1)

    def change(ending: str, content: bytes) -> tuple[str, bytes]:
        return (ending,
                content) if ending == "png" else ("json", json.dumps({"cls" if next(samples) % 3 else "x": 1}).encode())
    data = open_data(f"wds/{rewritten(write_shards(easy, tmp_path / 'shards', 1), change)}")
    with pytest.raises(InputError, match=r"^wds/.*shards: .*'cls'") as said:
        list(data.batches("held_out", tiny(), workers=workers))
    assert "\n" not in str(said.value)


# ---------------------------------------------------------------- loader processes

def local_fault() -> None:
    class Local(Exception):
        """Of no module, so that it can't be pickled."""
    raise Local("a fault")


@pytest.mark.parametrize(("wrong", "says"), [
    (lambda: {}["a fault"], "vitlab evaluate: an error in a loader process: KeyError: 'a fault'"),
    (lambda: int("one line\nand another"),
     "vitlab evaluate: an error in a loader process: ValueError: invalid literal"),
    (local_fault, r"vitlab evaluate: an error in a loader process: test_listing.local_fault.<locals>.Local: a fault"),
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "vitlab evaluate: a loader process .*, most likely because the "
                                                   "memory was used up")])
def test_an_error_in_a_loader_process_ends_the_command_with_one_line(tmp_path, monkeypatch, capsys, wrong, says):
    model, here, plain = tiny(), os.getpid(), Images.__getitem__
    checkpoint.save(tmp_path / "run", model, CompressionPlan.empty(shape_of(model)))
    write_folder(tmp_path / "data", {"val": 4})
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)              # seconds, of 5
    monkeypatch.setattr(Images, "__getitem__", lambda *given: plain(*given) if os.getpid() == here else wrong())
    assert cli.main(["evaluate", "--checkpoint", str(tmp_path / "run"), "--data", str(tmp_path / "data"), "--device",
                     "cpu", "--quiet", "--workers", "2"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.match(says, said) and multiprocessing.active_children() == []


class Zeros:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.zeros(1)


def end_by_an_error() -> None:
    loader, _ = load(Zeros(), 2, workers=1)
    batches = iter(loader)
    next(batches)
    raise ValueError("a fault of the program")


def test_a_process_that_ends_by_an_error_does_not_wait_for_its_loader_processes():
    """They ignore requests to stop, which multiprocessing would send them, and wait."""
    process = multiprocessing.get_context("fork").Process(target=end_by_an_error)
    process.start()
    process.join(60)
    assert process.exitcode == 1
    process.kill()


def test_only_torchs_words_about_its_processes_are_taken_for_them():
    killed = fault(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "))
    assert killed.startswith("a loader process is killed by signal: Killed, most likely because the memory")
    assert fault(RuntimeError("shapes differ")) is None


# ---------------------------------------------------------------- how long it takes

def test_a_folder_is_listed_once_and_names_are_not_read_twice(tmp_path, monkeypatch):
    write_folder(tmp_path, {"train": 2, "val": 2}, classes=tuple(map(str, range(5))))
    seen, plain = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: (seen.append(str(place)), plain(place))[1])
    open_data(tmp_path)
    assert len(seen) == len(set(seen)) == 12
