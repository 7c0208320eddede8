"""A large split is listed once; afterwards only the folders that changed are gone through again."""
import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
from training_fixtures import write_folder

from vitlab.data import groups, image_data, open_data
from vitlab.data.groups import groups_of
from vitlab.data.listing import in_order, natural

TICK = 0.05                                     # s: longer than a step of the clock that files get their times from


@pytest.fixture
def split(tmp_path, monkeypatch):
    """A split of which the listing is kept from its first image on, whenever it was made."""
    write_folder(tmp_path, {"train": 3}, classes=("1", "2", "10"))
    (tmp_path / "train" / "2" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "train" / "2" / "deep" / "er" / "a.png").touch()
    monkeypatch.setenv("VITLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(groups, "KEPT_FROM", 1)
    monkeypatch.setattr(groups, "SETTLED_NS", -10**18)
    time.sleep(TICK)
    return tmp_path / "train"


@pytest.fixture
def seen(monkeypatch):
    """Folders that are gone through, in their order."""
    found, plain = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: (found.append(str(place)), plain(place))[1])
    return found


def listed(split: Path) -> dict[str, list[str]]:
    return {name: [os.fsdecode(image) for image in images] for name, images in groups_of(split).items()}


def walked(split: Path) -> dict[str, list[str]]:
    """The same by a plain walk, without anything kept."""
    found = {}
    for place, _, names in os.walk(split):
        for name in names:
            path = os.path.relpath(os.path.join(place, name), split)
            found.setdefault(path.split("/")[0] if "/" in path else "", []).append(path)
    return {name: sorted(found[name], key=lambda path: [natural(part) for part in path.split("/")])
            for name in in_order(list(found))}


def test_an_unchanged_split_is_not_gone_through_again(split, seen):
    first = listed(split)
    assert first == walked(split) and list(first) == ["1", "2", "10"] and len(first["2"]) == 4
    seen.clear()
    assert listed(split) == first and seen == [str(split)]              # its class folders' names alone


def add(split: Path) -> None:
    (split / "2" / "new.png").touch()


def add_deep(split: Path) -> None:
    (split / "2" / "deep" / "er" / "new.png").touch()


def remove(split: Path) -> None:
    (split / "2" / "deep" / "er" / "a.png").unlink()


def rename(split: Path) -> None:
    (split / "2" / "deep").rename(split / "2" / "deeper")


def hide_the_change(split: Path) -> None:
    """As a program does that gives a copied folder the times of its source."""
    was = os.stat(split / "2")
    add(split)
    os.utime(split / "2", ns=(was.st_atime_ns, was.st_mtime_ns))


def link_elsewhere(split: Path) -> None:
    os.rename(split / "2", split.parent / "elsewhere")
    os.symlink(split.parent / "elsewhere", split / "2")
    add(split)


@pytest.mark.parametrize("change", [add, add_deep, remove, rename, hide_the_change, link_elsewhere])
def test_the_class_that_changed_is_gone_through_again_and_no_other(split, seen, change):
    before = listed(split)
    change(split)
    seen.clear()
    after = listed(split)
    places = [place for place in seen if place != str(split)]
    assert places and all(place.startswith(str(split / "2")) for place in places)
    assert {name for name in after if after[name] != before[name]} == {"2"}
    if change is not link_elsewhere:
        assert after == walked(split)                                   # os.walk does not follow links
    seen.clear()
    assert listed(split) == after and seen == [str(split)]


def test_classes_that_come_and_go_are_noticed(split):
    listed(split)
    (split / "3").mkdir()
    (split / "3" / "a.png").touch()
    (split / "loose.png").touch()
    assert listed(split) == walked(split)
    for path in (split / "1").iterdir():
        path.unlink()
    (split / "1").rmdir()
    assert listed(split) == walked(split) and list(listed(split)) == ["", "2", "3", "10"]


def test_a_folder_that_changed_just_before_it_was_listed_is_gone_through_again(split, seen, monkeypatch):
    """It may change once more without a later time."""
    monkeypatch.setattr(groups, "SETTLED_NS", 2 * 10**9)
    first = listed(split)
    # by a time that can be set it is old; by the other it is not
    os.utime(split / "1", ns=(0, 0))
    seen.clear()
    assert listed(split) == first and len(seen) == 6


def test_only_listings_of_many_images_are_kept(split, tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "KEPT_FROM", 11)
    listed(split)
    assert not (tmp_path / "cache").exists()
    add(split)
    listed(split)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def saved(**arrays) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def changed(content: bytes, **arrays) -> bytes:
    return saved(**{**np.load(io.BytesIO(content)), **arrays})


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: b"PK\x03\x04 is no zip", lambda content: content[:len(content) // 2],
    lambda content: bytes(byte ^ 255 if 200 < place < 260 else byte for place, byte in enumerate(content)),
    lambda content: saved(images=np.array([1])),
    lambda content: changed(content, about="another folder", images=np.array([b"9/a.png"] * 10)),
    lambda content: changed(content, counts=np.array([[1, 1]])),
    lambda content: changed(content, images=np.array([b"9/a.png"])),
    lambda content: changed(content, images=np.array([Harm()] * 10, dtype=object))],
                         ids=["empty", "no zip", "cut short", "flipped bits", "other content", "another folder",
                              "other counts", "fewer images",
         "a pickle"])
def test_a_kept_listing_that_is_damaged_or_of_something_else_is_made_anew(split, tmp_path, seen, monkeypatch, damage):
    first = listed(split)
    (kept,) = (tmp_path / "cache").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    monkeypatch.chdir(tmp_path)
    assert listed(split) == first and not Path("harm").exists()
    seen.clear()
    assert listed(split) == first and seen == [str(split)]


@pytest.mark.parametrize("nowhere", ["a home that can't be written", "no home"])
def test_without_a_place_to_keep_it_a_split_is_listed_each_time(split, tmp_path, monkeypatch, nowhere):
    def none(*_):
        raise RuntimeError("Could not determine home directory.")
    if nowhere == "no home":
        monkeypatch.delenv("VITLAB_CACHE")
        monkeypatch.setattr(Path, "home", none)
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("VITLAB_CACHE", str(tmp_path / "file" / "cache"))
    assert listed(split) == walked(split) == listed(split)


def test_names_with_one_beginning_are_in_the_order_of_the_whole_names():
    names = [f"n2_{part}.JPEG" for part in ("10", "9", "010", "1x", "100", "1", "x", "X", "9b", "09")]
    for chosen in (names, ["n2", "n21", "n2a", "n"], ["a٣1", "a٣004", "a٣5"], ["7"], [], ["a", "A"]):
        assert in_order(chosen) == sorted(chosen, key=natural)


def test_a_data_set_is_known_by_all_names_and_by_sizes_of_some(tmp_path, monkeypatch):
    write_folder(tmp_path, {"train": 4, "val": 1}, classes=("a", "b"))
    every = open_data(tmp_path).files("train")[1:]
    assert [int(known.rpartition(" ")[2])
            for known in every] == [os.stat(known.rpartition(" ")[0]).st_size for known in every]
    monkeypatch.setattr(image_data, "SIZED", 3)                         # of 8 images: the first, fourth and seventh
    some = open_data(tmp_path).files("train")[1:]
    assert some == [known if place in (0, 3, 6) else known.rpartition(" ")[0] for place, known in enumerate(every)]
