"""Data beyond a folder of files: tar files, WebDataset shards and Hugging Face data sets give the images that the
folder gives."""
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from training_fixtures import one_thread, small_recipe, tiny, write_easy_folder  # noqa: F401

from vitlab.data import open_data
from vitlab.measure.evaluate import evaluate
from vitlab.runtime.files import InputError
from vitlab.training import states
from vitlab.training.loop import fit

QUIET = {"progress": False, "seed": 3}
CLASSES = ["blue", "green", "red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_easy_folder(tmp_path_factory.mktemp("easy") / "easy")


def write_tars(source: Path, target: Path) -> Path:
    target.mkdir()
    for split in ("train", "val"):
        with tarfile.open(target / f"{split}.tar", "w") as tar:
            tar.add(source / split, arcname=".")
    return target


def write_shards(source: Path, target: Path, shards: int = 2) -> Path:
    """source as WebDataset shards with their _info.json."""
    target.mkdir()
    info = {"name": "easy", "splits": {}}
    for split, name in (("train", "train"), ("val", "validation")):
        files, names, lengths = sorted((source / split).rglob("*.png")), [], []
        for number in range(shards):
            names.append(f"easy-{name}-{number:04d}.tar")
            lengths.append(len(files[number::shards]))
            with tarfile.open(target / names[-1], "w") as tar:
                for i, file in enumerate(files[number::shards]):
                    for suffix, content in (("png", file.read_bytes()),
                                            ("cls", str(CLASSES.index(file.parent.name)).encode())):
                        entry = tarfile.TarInfo(f"{number:02d}{i:04d}.{suffix}")
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
        info["splits"][name] = {"name": name, "num_samples": len(files), "filenames": names, "shard_lengths": lengths}
    (target / "_info.json").write_text(json.dumps(info))
    return target


@pytest.fixture(scope="module", params=["tar", "wds", "hfds", "torch"])
def other(request, folder, tmp_path_factory) -> str:
    """The same images in another form."""
    place = tmp_path_factory.mktemp(request.param)
    if request.param == "tar":
        return str(write_tars(folder, place / "tars"))
    if request.param == "wds":
        pytest.importorskip("webdataset", reason="webdataset is not installed (pip install vitlab[streams])")
        return f"wds/{write_shards(folder, place / 'shards')}"
    if request.param == "torch":
        return f"torch/image_folder@{folder}"
    pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed (pip install vitlab[streams])")
    return f"hfds/{folder}"


@pytest.mark.parametrize("workers", [0, 2])
def test_the_held_out_images_are_those_of_the_folder_each_counted_once(folder, other, workers):
    model, found = tiny(), []
    for data in (str(folder), other):
        found.append(evaluate(model, open_data(data).batches("held_out", model, batch_size=5, workers=workers),
                              progress=False))
    assert found[0].images == found[1].images == 21 and found[0].top1_pct == found[1].top1_pct
    assert found[0].loss == pytest.approx(found[1].loss, abs=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_learnt(other, tmp_path, workers):
    model, data = tiny(), open_data(other)
    log = fit(model, data, small_recipe(epochs=4), tmp_path, workers=workers, **QUIET)
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert evaluate(model, data.batches("held_out", model, workers=0), progress=False).top1_pct > 90


def test_what_has_an_order_trains_bit_for_bit_as_the_folder_does(folder, tmp_path):
    weights = []
    for data in (folder, write_tars(folder, tmp_path / "tars")):
        model = tiny()
        fit(model, open_data(data), small_recipe(), tmp_path / f"run {len(weights)}", workers=2, **QUIET)
        weights.append(model.state_dict())
    # The tar names its files otherwise, but their order by class and number is the same.
    assert all(torch.equal(weights[0][k], v) for k, v in weights[1].items())


class Stop(BaseException):
    pass


def test_a_stream_goes_on_in_the_middle_of_an_epoch(folder, tmp_path, monkeypatch):
    pytest.importorskip("webdataset", reason="webdataset is not installed (pip install vitlab[streams])")
    from vitlab.training.recipes import Engine
    data, engine, plain = f"wds/{write_shards(folder, tmp_path / 'shards')}", Engine(save_steps=1), states.write
    whole, parts = tiny(), tiny()
    fit(whole, open_data(data), small_recipe(), tmp_path / "whole", engine=engine, workers=0, **QUIET)

    def stopping(*given):
        plain(*given)
        if given[1] == 4:
            raise Stop
    with monkeypatch.context() as patch:
        patch.setattr(states, "write", stopping)
        with pytest.raises(Stop):
            fit(tiny(), open_data(data), small_recipe(), tmp_path / "parts", engine=engine, workers=0, **QUIET)
    fit(parts, open_data(data), small_recipe(), tmp_path / "parts", engine=engine, workers=0, **QUIET)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[key], value, rtol=0, atol=0)


# ---------------------------------------------------------------- what is wrong is named

def test_what_is_no_data_set_is_refused_by_name(folder, tmp_path):
    tars = write_tars(folder, tmp_path / "tars")
    (tmp_path / "shards").mkdir()
    with pytest.raises(InputError, match=f"{tmp_path}/shards: no folder of WebDataset shards"):
        open_data(f"wds/{tmp_path}/shards")
    with pytest.raises(InputError, match="hfds/.*can't be opened by Hugging Face's datasets"):
        open_data(f"hfds/{tmp_path}/nothing")
    with tarfile.open(tars / "val.tar", "w") as tar:
        tar.add(folder / "val" / "red", arcname="red")
    with pytest.raises(InputError, match=f"{tars}: train.tar and val.tar hold different classes \\('blue' is in one of "
                                         f"them only\\)"):
        open_data(tars)
    with tarfile.open(tars / "val.tar", "w") as tar:
        tar.add(folder / "val" / "red" / "0.png", arcname="0.png")
    with pytest.raises(InputError, match="val.tar: holds images outside of class folders"):
        open_data(tars)
    with tarfile.open(tars / "val.tar", "w"):
        pass
    with pytest.raises(InputError, match="val.tar: holds no images"):
        open_data(tars)
    for content in (b"", b"nonsense" * 999):
        (tars / "val.tar").write_bytes(content)
        with pytest.raises(InputError, match="val.tar: can't be read as a tar file|val.tar: holds no images"):
            open_data(tars)


@pytest.mark.parametrize(("kind", "tool"), [("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")])
def test_a_compressed_tar_is_called_compressed(folder, tmp_path, kind, tool):
    with tarfile.open(tmp_path / "train.tar", f"w:{kind}") as tar:
        tar.add(folder / "val", arcname=".")
    with pytest.raises(InputError, match=f"train.tar: compressed .{kind}., .*: {tool} < train.tar > plain.tar"):
        open_data(tmp_path)


def test_hidden_files_in_a_tar_are_no_images(folder, tmp_path):
    tars = write_tars(folder, tmp_path / "tars")
    with tarfile.open(tars / "val.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("./red/._0.png"))
    assert evaluate(tiny(), open_data(tars).batches("held_out", tiny(), workers=0), progress=False).images == 21


def test_a_broken_image_in_a_tar_is_left_out_and_named(folder, tmp_path):
    tars = write_tars(folder, tmp_path / "tars")
    with tarfile.open(tars / "val.tar", "a") as tar:
        entry = tarfile.TarInfo("./red/99.png")
        entry.size = 4
        tar.addfile(entry, io.BytesIO(b"nope"))
    model = tiny()
    with pytest.warns(UserWarning, match=r"val.tar/.*99.png: can't be read as an image"):
        found = evaluate(model, open_data(tars).batches("held_out", model, workers=0), progress=False)
    assert (found.images, found.broken) == (21, 1)
