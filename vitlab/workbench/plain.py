"""Commands that compute nothing themselves: recipes, a batch, the demo; each imports what it needs when called."""
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vitlab.runtime.kinds import Count, Folder, Setting, Words, flag

DEMO = ("00_check_setup", "01_baseline", "02_token_scores", "03_prune_and_merge", "04_finetune", "05_heads_and_neurons",
        "06_search", "07_prune_what_was_found", "08_tonight", "09_segmentation", "90_results")


def recipes() -> str:
    """The named recipes, with source, expected number and command."""
    from vitlab.training.recipes import RECIPES
    return "\n".join(f"{r.name}\n  source    {r.source}\n  expected  {r.expected}\n  command   {r.command}"
                     for r in RECIPES.values())


def batch(file: str, *, out: Annotated[str | None, flag(metavar="RUN")] = None,
          changes: Annotated[tuple[Setting, ...], Parameter(name="--set")] = (), cores: Count = 1,
          executor: Annotated[str | None, flag(metavar="NAME")] = None, snakemake: Words = (),
          dry_run: bool = False) -> int:
    """Run a batch file, and say what became of its entries; 1 where one failed.

    Args:
        file: YAML (docs/batch.md has the format), or the name of one that comes with vitlab, such as digits
        out: run folder (default: runs/NAME, of FILE's name)
        changes: a parameter for all notebooks that declare it; with dots, a place in the file, such as
            entries.dense.parameters.seed=1
        cores: entries at a time
        executor: executor plugin of Snakemake's, such as slurm (default: this machine)
        snakemake: arguments for Snakemake itself in one text, such as
            --snakemake='--default-resources slurm_partition=gpu'
        dry_run: say what would run and why, and start nothing
    """
    from vitlab.runtime.launching import check_out
    from vitlab.workbench import batch as batches
    run = out or f"runs/{Path(file).stem}"
    check_out(run, wants_file=False)
    given = {key.strip(): value for key, _, value in (change.partition("=") for change in changes)}
    if dry_run:
        print(batches.format_summary(batches.plan_of(file, run, given)))
        return 0
    summary = batches.run_batch(file, run, changes=given, cores=cores, executor=executor,
                                extra=tuple(snakemake))
    print(batches.format_summary(summary["entries"]))
    counts = ", ".join(f"{count} {state}" for state, count in summary["counts"].items() if count)
    print(f"{counts}; summary: {run}/summary.json; page: vitlab report {run}")
    return 1 if summary["counts"]["failed"] else 0


def demo(*, out: Folder = "runs/demo", quick: bool = False) -> str:
    """Run the notebooks on the embedded digits, and say what came out.

    Args:
        out: run folder
        quick: a few steps of each, to see that it runs
    """
    from vitlab.runtime.results import format_table, notes, read_rows
    from vitlab.workbench import notebooks, steps
    parameters = {n: {"run": str(out)} | ({"quick": True} if quick else {}) for n in DEMO}
    notebooks.run_all(list(DEMO), out, parameters)
    rows = read_rows(f"{out}/{steps.RESULTS}")
    return "\n".join((format_table(rows), notes(rows), f"report: {out}/report.html"))
