"""vitlab.runtime.files: what a kill, an error or a damaged file may and may not do."""
import json
import os
import subprocess
import sys

import pytest

from vitlab.runtime import files
from vitlab.runtime.files import InputError


def names(folder) -> list[str]:
    """All entries, hidden ones too, so that a forgotten temporary file is seen."""
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("content", ["", "one\nzwei ü\n", b"\x00\xff\n"])
def test_atomic_write_replaces_the_whole_content(tmp_path, content):
    path = tmp_path / "new" / "folder" / "f"
    files.atomic_write(path, "longer than anything that follows")
    files.atomic_write(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode("utf-8"))
    assert names(path.parent) == ["f"]


def test_atomic_write_leaves_the_old_file_whole_when_the_rename_fails(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_text("old")

    def killed(source, target):
        raise OSError("no space")
    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(OSError, match="no space"):
        files.atomic_write(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["f"]


def test_atomic_write_never_shows_a_part_of_the_new_content(tmp_path, monkeypatch):
    path, seen = tmp_path / "f", []
    path.write_text("old")
    real = os.fsync

    def look(handle):
        seen.append(path.read_text())
        real(handle)
    monkeypatch.setattr(files.os, "fsync", look)
    files.atomic_write(path, "new")
    assert seen == ["old"] and path.read_text() == "new"    # on the disk before the name points to it


def test_atomic_folder_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "parent" / "run"
    for text in ("first", "second"):
        with files.atomic_folder(path) as folder:
            (folder / text).write_text(text)
    assert names(path) == ["second"] and names(path.parent) == ["run"]


def test_atomic_folder_leaves_the_old_folder_whole_on_an_error_inside(tmp_path):
    path = tmp_path / "run"
    with files.atomic_folder(path) as folder:
        (folder / "f").write_text("old")
    with pytest.raises(RuntimeError, match="inside"), files.atomic_folder(path) as folder:
        (folder / "f").write_text("half")
        assert (path / "f").read_text() == "old"
        raise RuntimeError("inside")
    assert names(tmp_path) == ["run"] and (path / "f").read_text() == "old"


def test_a_kill_between_the_two_renames_of_atomic_folder_is_recovered(tmp_path, monkeypatch):
    path = tmp_path / "run"
    with files.atomic_folder(path) as folder:
        (folder / "f").write_text("old")
    rename, calls = type(path).rename, []

    def rename_once(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt     # the process ends here; nothing after the second rename runs
        return rename(self, target)
    with monkeypatch.context() as patch:
        patch.setattr(type(path), "rename", rename_once)
        with pytest.raises(KeyboardInterrupt), files.atomic_folder(path) as folder:
            (folder / "f").write_text("new")
    assert not path.exists()
    assert (files.existing_folder(path) / "f").read_text() == "old"
    assert names(tmp_path) == ["run"]


def test_atomic_folder_after_a_kill_between_its_renames_still_guards_the_old_folder(tmp_path):
    path = tmp_path / "run"
    with files.atomic_folder(path) as folder:
        (folder / "f").write_text("old")
    path.rename(files.replaced(path))
    with pytest.raises(RuntimeError), files.atomic_folder(path) as folder:
        raise RuntimeError
    assert (path / "f").read_text() == "old"


def test_existing_folder_keeps_the_new_folder_when_the_kill_came_after_both_renames(tmp_path):
    path = tmp_path / "run"
    for folder, text in ((path, "new"), (files.replaced(path), "old")):
        folder.mkdir()
        (folder / "f").write_text(text)
    assert (files.existing_folder(path) / "f").read_text() == "new"


def test_existing_folder_gives_back_a_path_that_never_was(tmp_path):
    assert files.existing_folder(tmp_path / "none") == tmp_path / "none"
    assert names(tmp_path) == []


def test_read_json_gives_what_was_written(tmp_path):
    path, value = tmp_path / "f.json", {"a": [1, 2.5, None, "ü"]}
    files.atomic_write(path, json.dumps(value, ensure_ascii=False))
    assert files.read_json(path) == value


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": }', b"\xff\xfe{}", b"{} {}"])
def test_read_json_names_the_file_that_is_not_json(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="broken.json.*not valid JSON"):
        files.read_json(path)


def test_read_json_names_the_file_that_is_missing(tmp_path):
    with pytest.raises(InputError, match="nothing.json: no such file"):
        files.read_json(tmp_path / "nothing.json")


RECORDS = [{"epoch": 0, "loss": 1.5}, {"epoch": 1, "text": "line\nbreak \u2028 ü"}, {"epoch": 2, "list": [1, None]}]


def test_lines_are_read_back_in_the_order_they_were_appended(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    assert files.read_lines(path) == []
    for record in RECORDS:
        files.append_line(path, record)
    assert files.read_lines(path) == RECORDS


def test_a_line_cut_at_any_byte_costs_that_record_alone(tmp_path):
    path = tmp_path / "log.jsonl"
    for record in RECORDS[:2]:
        files.append_line(path, record)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole) + 1):
        path.write_bytes(whole[:cut])
        files.append_line(path, RECORDS[2])
        # All but the newline written: the record is whole, and kept.
        survivors = RECORDS[:2] if cut >= len(whole) - 1 else RECORDS[:1]
        assert files.read_lines(path) == survivors + RECORDS[2:], f"cut after {cut} bytes"


def test_a_cut_last_line_is_left_out_of_reading(tmp_path):
    path = tmp_path / "log.jsonl"
    files.append_line(path, RECORDS[0])
    with open(path, "ab") as file:
        file.write(b'{"epoch": 1, "te\xc3')      # cut inside a UTF-8 character
    assert files.read_lines(path) == RECORDS[:1]


def test_what_a_killed_process_left_of_a_folder_goes_with_the_next_write_and_what_a_living_one_fills_stays(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f".run.1.{ended.pid}.tmp"
    for folder in (left, tmp_path / f".run.1.{os.getppid()}.tmp", tmp_path / f".other.{ended.pid}.tmp"):
        folder.mkdir()
        (folder / "half").write_text("half")
    with files.atomic_folder(tmp_path / "run.1"):
        assert not left.exists()
    assert names(tmp_path) == sorted([f".run.1.{os.getppid()}.tmp", f".other.{ended.pid}.tmp", "run.1"])
