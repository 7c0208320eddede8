"""The notebooks on scikit-learn's digits, from a training to the report; and what one of them lacks, made by another.
"""
import sys
import time
from pathlib import Path
from typing import Annotated

from vitlab.runtime.files import existing_folder, require
from vitlab.runtime.kinds import flag

# The main story, five to seven minutes on two quiet cores, with parameters that make it so; and all of it.
STORY: dict[str, dict[str, str]] = {
    "00_check_setup": {}, "01_baseline": {}, "02_token_scores": {}, "03_prune_and_merge": {},
    "06_search": {"strategies": "gp", "other_ratios": ""}, "08_tonight": {}, "90_results": {}}
EVERYTHING: dict[str, dict[str, str]] = {
    "00_check_setup": {}, "01_baseline": {"recipe_name": "digits"}, "02_token_scores": {}, "03_prune_and_merge": {},
    "04_finetune": {}, "05_heads_and_neurons": {}, "06_search": {}, "07_prune_what_was_found": {}, "08_tonight": {},
    "09_segmentation": {}, "10_deploy": {}, "11_what_changed": {}, "90_results": {}}
EMBEDDED = ("digits", "digit_scenes")


def demo(*, out: Annotated[str | Path | None, flag(metavar="RUN")] = None, everything: bool = False,
         quick: bool = False) -> Path:
    """Run the notebooks on the embedded digits and print their table; returns the report, out/report.html.

    Five to seven minutes on two cores: dense model, scores, prune and merge, one search, calibration, deployed model.
    Executed copies go to out/notebooks/; trainings and searches that are there already are gone on with.

    Args:
        out: run folder (default: runs/demo, or runs/demo-all with --everything)
        everything: every notebook, with a dense model that is trained for longer: twenty minutes
        quick: a few steps of each, to see that it runs
    """
    from vitlab.runtime.results import format_table, notes, read_rows
    from vitlab.workbench import notebooks, steps
    out, began = Path(out or f"runs/demo{'-all' if everything else ''}"), time.monotonic()
    chosen = EVERYTHING if everything else STORY
    for number, (name, parameters) in enumerate(chosen.items(), 1):
        label, start = f"[{number}/{len(chosen)}] {name}", time.monotonic()
        notebooks.run(notebooks.NOTEBOOKS / f"{name}.ipynb", out / "notebooks", _parameters(out, quick) | parameters,
                      progress={"desc": label, "leave": False, "disable": None})    # on a terminal, while it runs
        print(f"{label:32s} {time.monotonic() - start:4.0f} s", file=sys.stderr, flush=True)
    page = notebooks.report(out / "notebooks" / f"{next(reversed(chosen))}.ipynb", out / "report.html")
    rows = read_rows(out / steps.RESULTS)
    print(format_table(rows), notes(rows), sep="\n")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes; notebooks as they ran: {out}/notebooks")
    return page


def _parameters(out: str | Path, quick: bool) -> dict[str, str | bool]:
    return {"run": str(out)} | ({"quick": True} if quick else {})


def made(study: Path, name: str, *, by: str, data: str, quick: bool = False, **dense: str) -> Path:
    """study/name, which the notebook `by` makes. Where it is not there yet and the data set is an embedded one, that
    notebook is run first, on the digits, and this is said. dense: its parameters checkpoint and model, where the dense
    model is one's own. Raises InputError naming it for any other data set."""
    from vitlab.models.checkpoint import FOLDER, INFO
    path = study / name
    there = (path, existing_folder(path / FOLDER) / INFO)           # a training that was killed leaves a folder alone
    if not any(each.is_file() for each in there):
        require(data in EMBEDDED, f"{path}: not there yet; {by} makes it: run that notebook first, with the same run "
                "and data")
        from vitlab.workbench import notebooks
        print(f"{path} is not there yet: running {by}, which makes it on the digits", flush=True)
        given = dense if dense.get("checkpoint") else {}
        notebooks.run(notebooks.NOTEBOOKS / f"{by}.ipynb", study / "notebooks", _parameters(study, quick) | given,
                      progress=False)
    return path
