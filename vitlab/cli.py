"""The command line: one subcommand per step; every line of work is in vitlab.workbench.steps."""
import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import vitlab
from vitlab.files import InputError

DEMO = ("00_check_setup", "01_baseline", "02_token_scores", "03_prune_and_merge", "04_finetune", "90_results")


class Parser(argparse.ArgumentParser):
    """A wrong flag or value gets one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _number(kind: type, low: float, high: float, what: str):
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value
    return parse


count = _number(int, 1, 10**9, "an integer of at least 1")
seed = _number(int, 0, 2**31 - 1, "an integer from 0 to 2147483647")
rate = _number(float, 0, 1, "a fraction from 0 to 1")
crop = _number(float, 0.1, 1, "a fraction from 0.1 to 1")


def given(text: str) -> str:
    """A path or name that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty text names nothing")
    return text


def _model_options(parser: argparse.ArgumentParser, name: str = "--checkpoint") -> None:
    parser.add_argument(name, required=True, type=given, metavar="SOURCE", dest="source",
                        help="checkpoint or run folder, a .pth or .safetensors file (with --model), or a timm name")
    parser.add_argument("--model", metavar="NAME", help="timm name of the model that a weights file is for")
    parser.add_argument("--num-classes", type=count, metavar="N", help="classes of the classifier (default: the model's own)")


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=given, required=True, metavar="DATA",
                        help="'digits' (embedded), a folder with train/ and val/, validation/ or test/, or hfds/NAME, wds/NAME, ...")
    parser.add_argument("--class-map", type=given, metavar="FILE",
                        help="JSON of class folder: class number (default: DATA/class_index.json)")
    parser.add_argument("--workers", type=_number(int, 0, 256, "an integer from 0 to 256"), metavar="N",
                        help="loader processes (default: one a core, at most 8)")


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=seed, default=0, help="default: 0")
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _recipe_options(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--recipe", default=default, metavar="NAME", help=f"named recipe (default: {default}); `vitlab recipes` lists them")
    parser.add_argument("--epochs", type=count, metavar="N", help="instead of the recipe's")
    parser.add_argument("--batch-size", type=count, metavar="N", help="instead of the recipe's; lr scales along")
    parser.add_argument("--lr", type=_number(float, 1e-12, 1e3, "a positive number"), metavar="LR", help="instead of the recipe's")
    parser.add_argument("--limit", type=count, metavar="IMAGES", help="train on a slice of this many images")


def build_parser() -> Parser:
    parser = Parser(prog="vitlab", description="Make vision transformers smaller and faster, and see why it works.")
    parser.add_argument("--version", action="version", version=f"vitlab {vitlab.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    p = add("pretrain", "Train a timm model from scratch.")
    p.add_argument("--model", required=True, metavar="NAME", help="timm name, such as vit_micro_patch4_32 or deit_tiny_patch16_224")
    p.add_argument("--img-size", type=count, metavar="PIXELS", help="instead of the model's own")
    _data_options(p)
    _recipe_options(p, "digits")
    p.add_argument("--out", type=given, required=True, metavar="RUN", help="run folder; a killed run goes on there")
    _run_options(p)

    p = add("score", "Score tokens by gradient-weighted attention on a slice of train.")
    _model_options(p)
    _data_options(p)
    p.add_argument("--images", type=count, default=512, help="size of the slice (default: 512)")
    p.add_argument("--batch-size", type=count, default=64, help="default: 64")
    p.add_argument("--absolute", choices=("image", "batch"), default="image",
                   help="where the absolute value is taken: per image, or after the batch as published (default: image)")
    p.add_argument("--out", type=given, required=True, metavar="FILE", help="scores file, .safetensors")
    _run_options(p)

    p = add("prune", "Compress a dense model by its token scores, or by a plan file.")
    _model_options(p)
    group = p.add_mutually_exclusive_group(required=True)
    group.add_argument("--scores", type=given, metavar="FILE", help="from `vitlab score`")
    group.add_argument("--plan", type=given, metavar="FILE", help="a plan.json to apply as it is")
    p.add_argument("--rule", choices=("center", "merge"), help="default: center")
    p.add_argument("--keep-rate", type=rate, help="fraction of patches that become centers (default: 0.6)")
    p.add_argument("--prune-rate", type=rate, help="fraction of patches that skip a block (default: 0.1)")
    p.add_argument("--boundary", choices=("grid", "reference"),
                   help="regions of rule center: 2-D cells, or raster runs as published (default: grid)")
    p.add_argument("--weights", choices=("score", "uniform", "reference"),
                   help="entries of the merge matrix; reference: as published (default: score)")
    p.add_argument("--out", type=given, required=True, metavar="RUN", help="run folder for the checkpoint")
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")

    p = add("finetune", "Fine-tune a compressed model, distilling from the dense one.")
    _model_options(p)
    p.add_argument("--teacher", type=given, metavar="SOURCE", help="the dense model, like --checkpoint")
    p.add_argument("--teacher-model", metavar="NAME", help="timm name of the model that the teacher's weights file is for")
    _data_options(p)
    _recipe_options(p, "deit_tiny_pm")
    p.add_argument("--distill", choices=("none", "soft", "hard"), help="instead of the recipe's")
    p.add_argument("--trainable", choices=("all", "matrices", "weights"), help="what trains: all, the matrices alone, or all but them")
    p.add_argument("--out", type=given, required=True, metavar="RUN", help="run folder; a killed run goes on there")
    _run_options(p)

    p = add("evaluate", "Top-1, top-5 and loss on the held-out split, with GMACs and parameters.")
    _model_options(p)
    _data_options(p)
    p.add_argument("--split", default="held_out", help="default: the held-out one")
    p.add_argument("--batch-size", type=count, default=64, help="default: 64")
    p.add_argument("--crop-pct", type=crop, help="crop size over resize size (default: the model's)")
    p.add_argument("--limit", type=count, metavar="IMAGES", help="a slice of this many images")
    p.add_argument("--name", help="name in the result row (default: SOURCE)")
    p.add_argument("--bf16", action="store_true", help="bf16 autocast instead of float32")
    p.add_argument("--out", type=given, metavar="RUN", help="append the row to RUN/results.jsonl")
    _run_options(p)

    p = add("throughput", "Images per second of deployed models, the first the baseline, measured in turn.")
    p.add_argument("sources", nargs="+", type=given, metavar="SOURCE", help="checkpoint or run folders, or timm names")
    p.add_argument("--batch-size", type=count, default=32, help="default: 32")
    p.add_argument("--repeats", type=count, default=10, help="default: 10")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: float32")
    p.add_argument("--out", type=given, metavar="RUN", help="append the rows to RUN/results.jsonl")
    p.add_argument("--device", metavar="DEVICE", help="cpu or cuda (default: cuda where there is one)")
    p.add_argument("--quiet", action="store_true", help="no progress bars")

    add("recipes", "List the named recipes with source, expected number and command.")

    p = add("demo", "Run the notebooks on the embedded digits: baseline, scores, prune and merge, fine-tune, table.")
    p.add_argument("--out", type=given, default="runs/demo", metavar="RUN", help="default: runs/demo")
    p.add_argument("--quick", action="store_true", help="a few steps of each, to see that it runs")
    return parser


def _recipe(args: argparse.Namespace) -> Any:
    from vitlab.training.recipes import recipe
    return recipe(args.recipe).replace(epochs=args.epochs, batch_size=args.batch_size, lr=args.lr,
                                       distill=getattr(args, "distill", None), trainable=getattr(args, "trainable", None))


def _source(args: argparse.Namespace) -> Any:
    from vitlab.workbench import steps
    if Path(args.source).is_dir() and (args.model or args.num_classes):
        raise InputError(f"{args.source} is a folder and says itself which model it holds; --model and --num-classes are for others")
    return steps.open_model(args.source, model=args.model, num_classes=args.num_classes)


def _check_out(out: str) -> None:
    """OSError or InputError before any work where nothing can be written to `out`."""
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
        _check_out(args.out)
    if args.command in ("pretrain", "prune", "finetune", "evaluate", "throughput", "demo") and Path(args.out or ".").is_file():
        raise InputError(f"{args.out}: is a file; a run folder is needed")
    if args.command == "score" and Path(args.out).is_dir():
        raise InputError(f"{args.out}: is a folder; a file to write the scores to is needed")
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
