"""The command line: one subcommand per step; every line of work is in vitlab.workbench.steps."""
import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitlab.files import InputError
from vitlab.options import build_parser

DEMO = ("00_check_setup", "01_baseline", "02_token_scores", "03_prune_and_merge", "04_finetune", "90_results")


def _recipe(args: argparse.Namespace) -> Any:
    from vitlab.training.recipes import recipe
    return recipe(args.recipe).replace(epochs=args.epochs, batch_size=args.batch_size, lr=args.lr,
                                       distill=getattr(args, "distill", None), trainable=getattr(args, "trainable", None))


def _source(args: argparse.Namespace) -> Any:
    from vitlab.workbench import steps
    if Path(args.source).is_dir() and (args.model or args.num_classes):
        raise InputError(f"{args.source} is a folder and says itself which model it holds; --model and --num-classes are for others")
    return steps.open_model(args.source, model=args.model, num_classes=args.num_classes)


def _check_out(out: str, wants_file: bool) -> None:
    """OSError or InputError before any work where `out` is of the wrong kind or nothing can be written to it."""
    if wants_file and Path(out).is_dir():
        raise InputError(f"{out}: is a folder; a file to write the scores to is needed")
    if not wants_file and Path(out).is_file():
        raise InputError(f"{out}: is a file; a run folder is needed")
    folder = Path(out).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() and folder != Path(out).absolute():
        raise InputError(f"{out}: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{out}: {folder} can't be written to")


def execute(args: argparse.Namespace) -> None:
    """Do one parsed command. Raises InputError."""
    from vitlab.results import format_table, read_rows
    from vitlab.workbench import notebooks, steps
    if getattr(args, "out", None):
        _check_out(args.out, wants_file=args.command == "score")
    if args.command == "pretrain":
        extra = {"img_size": args.img_size} if args.img_size else {}
        run = steps.pretrain(args.model, args.data, args.out, settings=_recipe(args), seed=args.seed, device=args.device,
                             limit=args.limit, class_map=args.class_map, workers=args.workers, progress=not args.quiet, **extra)
        print(f"checkpoint: {run}/checkpoint")
    elif args.command == "score":
        steps.score(_source(args), args.data, args.out, images=args.images, batch_size=args.batch_size, absolute=args.absolute,
                    seed=args.seed, device=args.device, class_map=args.class_map, workers=args.workers, progress=not args.quiet)
        print(f"scores: {args.out}")
    elif args.command == "prune":
        from vitlab import cost
        from vitlab.plan import CompressionPlan
        chosen = {k: getattr(args, k) for k in ("rule", "keep_rate", "prune_rate", "boundary", "weights") if getattr(args, k) is not None}
        if args.plan and chosen:
            raise InputError(f"--{next(iter(chosen)).replace('_', '-')} does not go with --plan: the plan says it all")
        if args.rule == "merge" and args.boundary:
            raise InputError("--boundary is for rule center; rule merge has none")
        found = steps.prune(_source(args), args.scores, args.out, plan=args.plan, **chosen)
        dense = cost.gmacs(CompressionPlan.empty(found.plan.shape))
        if not args.quiet:
            print(f"{cost.gmacs(found.plan):.4f} GMACs deployed ({cost.gmacs(found.plan, 'published'):.4f} as the papers count; "
                  f"dense {dense:.4f}), tokens per block {found.plan.tokens_per_block()}\ncheckpoint: {args.out}/checkpoint")
    elif args.command == "finetune":
        teacher = None if args.teacher is None else steps.open_model(args.teacher, model=args.teacher_model,
                                                                     num_classes=args.num_classes)
        run = steps.finetune(_source(args), teacher, args.data, args.out, settings=_recipe(args), seed=args.seed,
                             device=args.device, limit=args.limit, class_map=args.class_map, workers=args.workers,
                             progress=not args.quiet)
        print(f"checkpoint: {run}/checkpoint")
    elif args.command == "evaluate":
        row = steps.evaluate(_source(args), args.data, name=args.name or args.source, split=args.split, out=args.out,
                             batch_size=args.batch_size, device=args.device, amp=args.bf16, class_map=args.class_map,
                             crop_pct=args.crop_pct, limit=args.limit, seed=args.seed, workers=args.workers, progress=not args.quiet)
        print(format_table([row], ("model", "dataset", "split", "top1_pct", "top5_pct", "loss", "gmacs", "params_m")))
    elif args.command == "throughput":
        rows = steps.throughput({s: s for s in args.sources}, batch_size=args.batch_size, repeats=args.repeats, dtype=args.dtype,
                                device=args.device, progress=not args.quiet, out=args.out)
        print(format_table(rows, ("model", "throughput_img_s", "ratio", "latency_ms")))
        print(", ".join(f"{k} {v}" for k, v in rows[0].conditions["speed"].items() if k not in ("ratio_range", "peak_memory_mb"))
              + "; latency at batch 1")
        peaks = {r.model: r.conditions["speed"]["peak_memory_mb"] for r in rows}
        print("peak memory: " + (", ".join(f"{n} {v:.0f} MiB" for n, v in peaks.items() if v) or "measured on a GPU only"))
    elif args.command == "recipes":
        from vitlab.training.recipes import RECIPES
        for r in RECIPES.values():
            print(f"{r.name}\n  source    {r.source}\n  expected  {r.expected}\n  command   {r.command}")
    elif args.command == "demo":
        parameters = {n: {"run": args.out} | ({"quick": True} if args.quick else {}) for n in DEMO}
        notebooks.run_all(list(DEMO), args.out, parameters)
        print(format_table(read_rows(f"{args.out}/{steps.RESULTS}")))
        print(f"report: {args.out}/report.html")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 when done, 2 for wrong input (one line on stderr), 130 when interrupted."""
    args = build_parser().parse_args(argv)
    try:
        execute(args)
    except InputError as error:
        print(f"vitlab {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:                     # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"vitlab {args.command}: {error.filename or ''}: {error.strerror or error}".replace(" : ", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vitlab {args.command}: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
