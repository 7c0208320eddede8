"""The command line: one subcommand per step; every line of work is in vitlab.workbench."""
import argparse
import contextlib
import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitlab.options import build_parser
from vitlab.runtime import signals
from vitlab.runtime.files import InputError
from vitlab.runtime.launching import COMMAND, LOST, RESUMABLE, join, kept_of, leave, lost, on_record, one_line, recorded


def _recipe(args: argparse.Namespace) -> Any:
    from vitlab.training.recipes import recipe
    return recipe(args.recipe).replace(epochs=args.epochs, batch_size=args.batch_size, lr=args.lr,
                                       distill=getattr(args, "distill", None),
                                       trainable=getattr(args, "trainable", None),
                                       matrices_lr=getattr(args, "matrices_lr", None), dtype=args.dtype)


def _engine(args: argparse.Namespace) -> dict[str, Any]:
    """The options of how a training is run."""
    from vitlab.training.recipes import Engine
    engine = Engine(accumulate=args.accumulate, compile=args.compile, checkpointing=args.grad_checkpointing,
                    channels_last=args.channels_last, save_steps=args.save_steps, keep=args.keep)
    return {"engine": engine, "changed_data": args.changed_data}


def _source(args: argparse.Namespace) -> Any:
    from vitlab.workbench import steps
    if Path(args.source).is_dir() and args.model:
        raise InputError(f"{args.source} is a folder and says itself which model it holds; --model is for weights "
                         f"files")
    size = None if args.command == "segment" else args.img_size         # there, the size that the encoder is taken to
    settings = {name: getattr(args, name) for name in ("mean", "std", "crop_pct", "crop_mode", "interpolation")}
    return steps.open_model(args.source, model=args.model, num_classes=args.num_classes, img_size=size,
                            settings=settings)


def _check_out(out: str, wants_file: bool) -> None:
    """OSError or InputError before any work where `out` is of the wrong kind or nothing can be written to it."""
    if wants_file and Path(out).is_dir():
        raise InputError(f"{out}: is a folder; a file to write the scores to is needed")
    if wants_file and Path(out).suffix != ".safetensors":
        raise InputError(f"{out}: scores are written as .safetensors; a name that ends so is needed")
    if not wants_file and Path(out).is_file():
        raise InputError(f"{out}: is a file; a run folder is needed")
    folder = Path(out).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() and folder != Path(out).absolute():
        raise InputError(f"{out}: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{out}: {folder} can't be written to")


def _check_apart(args: argparse.Namespace) -> None:
    """InputError where the result would take the place of a model that the command reads."""
    for given in (getattr(args, "source", None), getattr(args, "teacher", None)):
        if given and Path(given).is_dir() and Path(args.out).resolve() in (Path(given).resolve(),
                                                                           Path(given).resolve().parent):
            raise InputError(f"--out {args.out} would replace {given}, which is read; choose another folder")


def _data(args: argparse.Namespace) -> dict[str, Any]:
    """The options that every step on a data set takes."""
    return {"seed": args.seed, "device": args.device, "class_map": args.class_map, "workers": args.workers,
            "progress": not args.quiet}


def _pretrain(args: argparse.Namespace) -> None:
    from vitlab.workbench import steps
    extra = {"img_size": args.img_size} if args.img_size else {}
    run = steps.pretrain(args.model, args.data, args.out, settings=_recipe(args), limit=args.limit, **_engine(args),
                         **_data(args), **extra)
    print(f"checkpoint: {run}/checkpoint")


def _segment(args: argparse.Namespace) -> None:
    from vitlab.workbench import segmenting
    options = {**_engine(args), **_data(args)}
    if options.pop("class_map") is not None:
        raise InputError("--class-map is of class folders; masks have none")
    run = segmenting.train_segmenter(_source(args), args.data, args.out,
                                     img_size=None if args.img_size is None else tuple(args.img_size),
                                     decoder=args.decoder, settings=_recipe(args), limit=args.limit, **options)
    print(f"checkpoint: {run}/checkpoint")


def _windows(args: argparse.Namespace) -> dict[str, Any]:
    """The options of windows that were given."""
    given = {"window": args.window and tuple(args.window), "stride": args.stride and tuple(args.stride),
             "scales": args.scales and tuple(args.scales), "flip": args.flip or None}
    return {name: value for name, value in given.items() if value is not None}


def _predict(args: argparse.Namespace) -> None:
    from vitlab.workbench import segmenting
    written = segmenting.predict(_source(args), args.images, args.out, opacity=args.opacity, amp=args.bf16,
                                 device=args.device, progress=not args.quiet, **_windows(args))
    print(f"{len(written)} images: {args.out}")


def _score(args: argparse.Namespace) -> None:
    from vitlab.workbench import cutting, steps
    options = {"images": args.images, "batch_size": args.batch_size, **_data(args)}
    if args.of == "units":
        if args.absolute:
            raise InputError("--absolute is for tokens")
        cutting.score_units(_source(args), args.data, args.out, criterion=args.criterion or "hsic", **options)
    else:
        steps.score(_source(args), args.data, args.out, criterion=args.criterion or "gradient",
                    absolute=args.absolute or "image", **options)
    print(f"scores: {args.out}")


def _print_cut(plan: Any, out: str) -> None:
    from vitlab.plan import CompressionPlan, cost
    counts = cost.counts_of(plan)
    print(f"{cost.gmacs(plan):.4f} GMACs deployed ({cost.gmacs(plan, 'published'):.4f} without matrices, as the papers "
          f"count; "
          f"dense {cost.gmacs(CompressionPlan.empty(plan.shape)):.4f})")
    for name, total in (("attended", plan.shape.num_tokens), ("heads", plan.shape.num_heads),
                        ("neurons", plan.shape.num_neurons)):
        values = getattr(counts, name).tolist()
        if min(values) < total:
            print(f"{'tokens' if name == 'attended' else name} per block {values}, of {total}")
    print(f"checkpoint: {out}")


def _prune(args: argparse.Namespace) -> None:
    from vitlab.workbench import cutting, steps
    merging = ("rule", "keep_rate", "spans", "prune_rate", "decay", "boundary", "weights", "share")
    chosen = {k: getattr(args, k) for k in merging if getattr(args, k) is not None}
    ratios = {k: getattr(args, k) for k in ("policy", "head_ratio", "neuron_ratio", "rho")
              if getattr(args, k) is not None}
    budget = {k: getattr(args, k) for k in ("gmacs", "macs_ratio") if getattr(args, k) is not None}
    given = next(iter({**chosen, **ratios}), "").replace("_", "-")
    if args.plan and (given or budget):
        raise InputError(f"--{given or next(iter(budget)).replace('_', '-')} does not go with --plan: the plan says it "
                         f"all")
    if args.scores and ratios:
        raise InputError(f"--{next(iter(ratios)).replace('_', '-')} cuts by --unit-scores; --scores is of tokens, for "
                         f"merging")
    if args.unit_scores and chosen:
        raise InputError(f"--{given} merges by --scores of tokens; --unit-scores takes --policy, or --head-ratio, "
                         f"--neuron-ratio and --rho")
    if args.rule == "merge" and args.boundary:
        raise InputError("--boundary is for rule center; rule merge has none")
    if args.spans and (args.share or args.keep_rate is not None):
        raise InputError(f"--spans does not go with "
                         f"{'--share' if args.share else '--keep-rate: each span has its own'}")
    if args.read_out and args.match is None:
        raise InputError("--read-out goes with --match")
    if args.match is not None:
        if chosen or ratios:
            raise InputError(f"--{given} does not go with --match, which has one number")
        found = cutting.prune_match(_source(args), args.out, ratio=None if args.match is True else args.match, **budget,
                                    read_out=bool(args.read_out))
    elif args.unit_scores:
        if not ratios and not budget:
            raise InputError("--unit-scores needs --policy NAME, or --head-ratio, --neuron-ratio or --rho, or --gmacs "
                             "or --macs-ratio")
        found = cutting.prune_units(_source(args), args.unit_scores, args.out, **ratios, **budget)
    else:
        found = steps.prune(_source(args), args.scores, args.out, plan=args.plan, **chosen, **budget)
    if not args.quiet:
        _print_cut(found.plan, f"{args.out}/checkpoint")


def _finetune(args: argparse.Namespace) -> None:
    from vitlab.workbench import steps
    if args.teacher is not None and Path(args.teacher).is_dir() and args.teacher_model:
        raise InputError(f"{args.teacher} is a folder and says itself which model it holds; --teacher-model is for "
                         f"weights files")
    alike = {} if args.teacher is None or Path(args.teacher).is_dir() else {"num_classes": args.num_classes,
                                                                            "img_size": args.img_size}
    teacher = None if args.teacher is None else steps.open_model(args.teacher, model=args.teacher_model, **alike)
    run = steps.finetune(_source(args), teacher, args.data, args.out, plan=args.plan, steps=args.steps,
                         settings=_recipe(args), limit=args.limit, **_engine(args), **_data(args))
    print(f"checkpoint: {run}/checkpoint")


def _search(args: argparse.Namespace) -> None:
    from vitlab.data.parts import reported_on
    from vitlab.runtime import parallel
    from vitlab.runtime.results import in_words
    from vitlab.search.strategies import settings
    from vitlab.workbench import searching
    options = settings(args.settings)
    changes = {k: getattr(args, k) for k in ("evaluations", "population", "initial") if getattr(args, k) is not None}
    together = args.parallel or parallel.world()
    changes |= {"batch": together} if together > 1 else {}
    if args.latency_ms is None and (args.batch_size or args.dtype):
        raise InputError("--batch-size and --dtype are those of a latency; they go with --latency-ms")
    if args.published_count and args.latency_ms is not None:
        raise InputError("--published-count goes with --gmacs or --macs-ratio")
    if args.published_count and args.tokens not in (None, "select"):
        raise InputError(f"--published-count is of one selection ratio; it goes with --tokens select, not "
                         f"{args.tokens}")
    cost = "latency_ms" if args.latency_ms is not None else "published_gmacs" if args.published_count else "gmacs"
    limit = args.latency_ms if args.latency_ms is not None else args.gmacs
    study = searching.search(
        _source(args), args.data, args.out, limit=limit, macs_ratio=args.macs_ratio, cost=cost,
        units=tuple(u for u in args.units.split(",") if u not in ("", "none")), tokens=args.tokens,
        max_ratio=args.max_ratio, read_out=args.read_out, strategy=args.strategy,
        options=dataclasses.replace(options, **changes), minutes=args.minutes, metric=args.metric,
        criterion=args.criterion, compensated=args.compensate, images=args.images, batch_size=args.batch_size or 32,
        dtype=args.dtype or "float32", token_settings={"ranked_by": "all"} if args.published_count else None,
        **_data(args))
    best, worth = study.best, searching.reported(args.out) or {}
    print(f"best of {len(study.evaluations)}: number {best.index}, {best.cost:.6g} {cost} of {study.budget.limit:.6g}\n"
          f"on images it was chosen on: {in_words(best.measures)}\n"
          f"{reported_on(study.info['about']['roles'])}, ± one standard error: {in_words(worth)}\nplan: "
          f"{args.out}/{searching.PLAN}")


def _tonight(args: argparse.Namespace) -> None:
    from vitlab.data.parts import reported_on
    from vitlab.runtime.results import in_words
    from vitlab.workbench import calibrating, tonight
    lists = {name: getattr(args, name) for name in ("rules", "ratios") if getattr(args, name) is not None}
    found = tonight.tonight(_source(args), args.data, args.out, gmacs=args.gmacs, macs_ratio=args.macs_ratio,
                            minutes=args.minutes, evaluations=args.evaluations, finalists=args.finalists,
                            images=args.images, report_images=args.report_images, score_images=args.score_images,
                            **lists, **_data(args))
    if not args.quiet:
        made_by = found.info["made_by"]
        print(f"before calibration, {reported_on(made_by['roles'])}: {in_words(made_by['plan']['reported'])}")
        print(calibrating.distances(made_by))
        _print_cut(found.plan, f"{args.out}/{tonight.DEPLOYED}")


def _calibrate(args: argparse.Namespace) -> None:
    from vitlab.workbench import calibrating
    found = calibrating.calibrate(_source(args), args.data, args.out, args.plan, images=args.images,
                                  minutes=args.minutes, **_data(args))
    if not args.quiet:
        print(calibrating.distances(found.info["made_by"]))
        _print_cut(found.plan, f"{args.out}/checkpoint")


def _evaluate(args: argparse.Namespace) -> None:
    from vitlab.runtime.results import format_table
    from vitlab.workbench import steps
    row = steps.evaluate(_source(args), args.data, dense=args.dense, name=args.name or args.source, split=args.split,
                         out=args.out, amp=args.bf16, batch_size=args.batch_size, limit=args.limit, **_windows(args),
                         **_data(args))
    measured = ("top1_pct", "top5_pct") if row.miou_pct is None else ("miou_pct", "pixel_accuracy_pct")
    measured += ("loss",) if row.distill_loss is None else ("distill_loss", "loss")
    print(format_table([row], ("model", "dataset", "split", *measured, "gmacs", "params_m")))
    print(f"± one standard error over {row.conditions['images']} images, {row.conditions['prepared']}")
    if row.miou_pct is not None:
        iou = row.conditions["iou_pct"].items()
        print("IoU: " + ", ".join(f"{name} {'-' if value is None else f'{value:.1f}'}" for name, value in iou))


def _throughput(args: argparse.Namespace) -> None:
    from vitlab.runtime.results import format_speeds
    from vitlab.workbench import steps
    rows = steps.throughput({s: s for s in args.sources}, batch_size=args.batch_size, repeats=args.repeats,
                            dtype=args.dtype, device=args.device, progress=not args.quiet, out=args.out)
    print(format_speeds(rows))
    print(", ".join(f"{k} {v}" for k,
                    v in rows[0].conditions["speed"].items() if k not in ("ratio_range", "peak_memory_mb", "timing")))
    peaks = {r.model: r.conditions["speed"]["peak_memory_mb"] for r in rows}
    print("peak memory: " + (", ".join(f"{n} {v:.0f} MiB" for n, v in peaks.items() if v) or "measured on a GPU only"))


def _recipes(args: argparse.Namespace) -> None:
    from vitlab.training.recipes import RECIPES
    for r in RECIPES.values():
        print(f"{r.name}\n  source    {r.source}\n  expected  {r.expected}\n  command   {r.command}")


def _batch(args: argparse.Namespace) -> int:
    from vitlab.workbench import batch
    out, changes = args.out or f"runs/{Path(args.file).stem}", dict(args.changes)
    _check_out(out, wants_file=False)
    if args.dry_run:
        print(batch.format_summary(batch.plan_of(args.file, out, changes)))
        return 0
    summary = batch.run_batch(args.file, out, changes=changes, cores=args.cores, executor=args.executor,
                              extra=tuple(args.snakemake))
    print(batch.format_summary(summary["entries"]))
    print(f"{', '.join(f'{count} {state}' for state, count in summary['counts'].items() if count)}; summary: "
          f"{out}/summary.json; "
          f"page: vitlab report {out}")
    return 1 if summary["counts"]["failed"] else 0


def _notebooks(args: argparse.Namespace) -> None:
    from vitlab.workbench import notebooks
    copies = notebooks.copy_all(args.folder)
    print(f"{len(copies)} notebooks: {copies[0]} to {copies[-1].name}")


def _report(args: argparse.Namespace) -> None:
    from vitlab.workbench import report
    page = report.report(args.run)
    print(f"report: {page}, as notebook {report.NOTEBOOK}; table: {report.CSV}, {report.LATEX}")


def _demo(args: argparse.Namespace) -> None:
    from vitlab.workbench.demo import demo
    demo(args.out, everything=args.everything, quick=args.quick)


COMMANDS = {"pretrain": _pretrain, "segment": _segment, "score": _score, "prune": _prune, "search": _search,
            "tonight": _tonight, "calibrate": _calibrate, "predict": _predict,
            "finetune": _finetune, "evaluate": _evaluate, "throughput": _throughput, "recipes": _recipes,
            "batch": _batch, "report": _report, "demo": _demo, "notebooks": _notebooks}


def execute(args: argparse.Namespace, given: Sequence[str] = ()) -> int:
    """Do one parsed command, `given` as these words; returns its exit code. Raises InputError."""
    if args.command in ("prune", "calibrate", "search", "finetune", "tonight", "segment"):
        _check_apart(args)
    if getattr(args, "out", None):
        _check_out(args.out, wants_file=args.command == "score")
    join(args)
    keeps = args.command in RESUMABLE and given and int(os.environ.get("RANK", "0")) == 0
    with on_record(Path(args.out) / COMMAND, given) if keeps else contextlib.nullcontext():
        code = COMMANDS[args.command](args) or 0
    leave()
    return code


def _loader_fault(error: BaseException) -> str | None:
    """What happened to a loader process, which torch may say at any time."""
    from vitlab.data.loading import fault
    return fault(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 when done, 1 where an entry of a batch failed, 2 for wrong input (one line on stderr), 75 when
    asked to stop (SIGTERM), 130 when interrupted."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parser.parse_args(given)
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"vitlab {args.command}: {one_line(str(message))}\n"
    # names of files need not be text: print them all the same
    with contextlib.suppress(AttributeError, ValueError):
        sys.stdout.reconfigure(errors="backslashreplace")

    def say(what: str) -> None:
        print(f"vitlab {args.command}: {one_line(what)}", file=sys.stderr)
    try:
        with signals.on_request(signals.stop):
            if args.command == "resume":
                args, given = recorded(args.run, parser), ()
            return execute(args, given)
    except InputError as error:
        say(str(error))
        leave(error)
        return 2
    except BrokenPipeError:                     # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        say(f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "))
        leave(error)
        return 2
    except (RuntimeError, MemoryError) as error:
        if isinstance(error,
                      MemoryError) or any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            say(f"out of memory; a smaller batch or model needs less ({str(error) or 'no memory'})"[:300])
            leave(error)
            return 2
        if (died := _loader_fault(error)) is not None:
            say(died)
            leave(error)
            return 2
        if not lost(error):
            leave(error)
            raise
        say("another process of this run ended, and so does this one; what went wrong is in that one's error")
        time.sleep(LOST)                        # torchrun reports the first that ends
        return 1
    except signals.Stopped:
        say(f"stopped on request; {kept_of(args.command)}")
        return signals.EXIT_CODE
    except KeyboardInterrupt:
        say(f"interrupted; {kept_of(args.command)}")
        return 130
    finally:
        warnings.formatwarning = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
