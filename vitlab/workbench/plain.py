"""Commands that compute nothing themselves: recipes, a batch; each imports what it needs when called. And what is said
of the results of those that need no torch."""
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from vitlab.runtime.kinds import Count, Setting, Words, flag


def told(result: Any, out: str | None, *, quiet: bool = False) -> str:
    """`said.said`, which imports torch, where the result is no text, page or list of files."""
    if isinstance(result, str):
        return f"{result}\n"
    if isinstance(result, Path) and result.is_file():
        return f"page: {result}\n"
    if isinstance(result, list) and isinstance(result[0], Path):
        return f"{len(result)} files: {result[0]} to {result[-1].name}\n"
    from vitlab.workbench.said import said
    return said(result, out, quiet=quiet)


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
    check_out(run)
    given = {key.strip(): value for key, _, value in (change.partition("=") for change in changes)}
    if dry_run:
        print(batches.format_summary(batches.plan_of(file, run, given)))
        return 0
    summary = batches.run_batch(file, run, changes=given, cores=cores, executor=executor, extra=tuple(snakemake))
    print(batches.format_summary(summary["entries"]))
    counts = ", ".join(f"{count} {state}" for state, count in summary["counts"].items() if count)
    print(f"{counts}; summary: {run}/summary.json; page: vitlab report {run}")
    return 1 if summary["counts"]["failed"] else 0
