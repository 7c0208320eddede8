"""A run's model on the Hugging Face hub: what is needed to rebuild it, files for other runtimes, and a page that says
what it is worth."""
import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import huggingface_hub
from huggingface_hub import constants
from timm.models._hub import save_config_for_hf

from vitlab.exporting.running import WAYS
from vitlab.exporting.runtimes import RUNTIMES
from vitlab.models import checkpoint, encoder_of
from vitlab.models.hub import CONFIG, HUB, OURS, WAIT, answers
from vitlab.runtime.files import InputError, atomic_folder, first_line, read_json, require
from vitlab.runtime.kinds import Folder, flag
from vitlab.runtime.results import ResultRow, read_rows
from vitlab.workbench.card import model_card
from vitlab.workbench.steps import RESULTS

PAGE = "README.md"


def rows_of_model(run: Path) -> list[ResultRow]:
    """What was measured of a run's model, in whichever runtime: in its own results, or those of its study. Rows name it
    as the run is called, or by a path whose last two parts are the run's."""
    for folder in (run, run.parent):
        rows = []
        for row in read_rows(folder / RESULTS):
            way = next((f" ({way})" for way in WAYS if row.model.endswith(f" ({way})")), "")
            name = row.model.removesuffix(way)
            if name == run.name or run_of(name).parts[-2:] == run.parts[-2:]:
                rows.append(dataclasses.replace(row, model=run.name + way))                 # not where it lay
        if rows:
            return rows
    return []


def run_of(path: str | Path) -> Path:
    """The run folder, resolved, that a path to it or to its checkpoint/ names."""
    path = Path(path).resolve()
    return path.parent if path.name == checkpoint.FOLDER else path


def check_out(out: Path, run: Path) -> None:
    """InputError where a folder can't be replaced by what is pushed: the run or a folder it lies in, or one that holds
    anything but what was pushed before."""
    if any(path.resolve().is_relative_to(out.resolve()) for path in (run, checkpoint.find(run))):
        raise InputError(f"{out}: the run itself, or a folder it lies in; another folder is needed")
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or is_ours(out))):
        raise InputError(f"{out}: is there, and holds no model that was pushed, of which {CONFIG} says \"vitlab\"; an "
                         f"empty folder, or a new one, is needed")


def is_ours(folder: Path) -> bool:
    """Whether a folder holds what `write_files` wrote: its config.json says so."""
    try:
        config = read_json(folder / CONFIG)
    except InputError:
        return False
    return isinstance(config, dict) and "vitlab" in config


def write_files(run: str | Path, name: str, folder: Path, licence: str | None = None) -> list[str]:
    """Into a folder: the checkpoint's own three files; config.json as timm writes it, of the dense part and its image
    settings and class names; exported files; the page. Returns their names. Raises InputError where the run holds no
    whole checkpoint."""
    source, found, run = checkpoint.find(run), checkpoint.load(run), run_of(run)
    for file in OURS:
        shutil.copyfile(source / file, folder / file)
    encoder, classes = encoder_of(found.model), found.info.get("classes")
    save_config_for_hf(encoder, str(folder / CONFIG), model_config={"label_names": classes} if classes else {},
                       model_args=found.info["model"]["args"])
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps({**config, "vitlab": list(OURS)}, indent=2) + "\n", encoding="utf-8")
    endings = tuple(ending for runtime in RUNTIMES.values() for ending in (runtime.ending, *runtime.beside))
    exported = sorted(path for path in run.iterdir() if path.is_file() and path.name.endswith(endings))
    for path in exported:
        shutil.copyfile(path, folder / path.name)
    card = model_card(found, name, rows_of_model(run), licence=licence, exported=[path.name for path in exported])
    (folder / PAGE).write_text(card, encoding="utf-8")
    return sorted(path.name for path in folder.iterdir())


def push(run: Folder, name: str, /, *, out: Folder | None = None,
         licence: Annotated[str | None, flag(metavar="NAME")] = None, private: bool = False) -> str:
    """Put a run's model on the Hugging Face hub, or, with `out`, what would be put there into a folder: weights, plan,
    timm's config.json, image settings, exported files of the run folder, and a page written from its results; returns
    what came of it, in a line. It opens as hf-hub:OWNER/NAME wherever a model does. Raises InputError for a run without
    a checkpoint, another kind of name, and a hub that does not answer or refuses.

    Args:
        run: run folder, or a checkpoint's
        name: OWNER/NAME on the hub
        out: write the files into this folder, which is new, empty or of an earlier push, and upload nothing
        licence: as the hub names it: apache-2.0, mit, ... (default: the page says that it is not known)
        private: make a new repository that others can't see
    """
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except huggingface_hub.errors.HFValidationError as error:
        raise InputError(f"{name!r} is no name on the hub ({first_line(error)}); OWNER/NAME is needed") from None
    require("/" in name, f"{name!r} is no name on the hub; OWNER/NAME is needed")
    require(not str(run).startswith(HUB), f"{run} is on the hub already; a run folder of this machine is needed")
    if out is not None:
        check_out(Path(out), Path(run))
        with atomic_folder(out) as folder:
            files = write_files(run, name, folder, licence)
        return f"{out}: {', '.join(files)}"
    checkpoint.find(run)                        # before the hub is asked
    require(answers(), f"{constants.ENDPOINT}: does not answer within {WAIT:g} s; --out FOLDER writes what would be "
            "pushed")
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(run, name, Path(folder), licence)
        try:
            api = huggingface_hub.HfApi(endpoint=constants.ENDPOINT)
            api.create_repo(name, private=private or None, exist_ok=True)
            if private and not api.repo_info(name).private:
                raise InputError("others can see it, and private is asked for; its settings on the hub change that")
            done = api.create_commit(name, [huggingface_hub.CommitOperationAdd(file, str(Path(folder) / file))
                                            for file in files], commit_message="Pushed by vitlab")
        except InputError as error:
            raise InputError(f"{HUB}{name}: {error}") from None
        except Exception as error:              # its client's errors, of whichever library: no token, no right, no disk
            raise InputError(f"{HUB}{name}: can't be pushed ({first_line(error)}); `hf auth login`, or HF_TOKEN, says "
                             f"who you are") from None
    return f"{HUB}{name}: {', '.join(files)} ({done.commit_url})"
