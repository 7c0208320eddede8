"""What the command line takes: the subcommands, their flags, and the checks on each value."""
import argparse
import re
import shlex
from collections.abc import Callable
from typing import Any, NoReturn

import vitlab


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
ratio = _number(float, 0, 0.999, "a fraction from 0 to 0.999")
positive = _number(float, 1e-9, 1e9, "a positive number")
crop = _number(float, 0.1, 1, "a fraction from 0.1 to 1")
minutes = _number(float, 0, 1e6, "a number of minutes from 0")


def spans(text: str) -> list[tuple[int, int, float]]:
    """(first block, last block, keep rate) each of FIRST-LAST:RATE,..."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})-([0-9]{1,6}):([0-9.e-]+)", part.strip())
        if match is None:
            raise argparse.ArgumentTypeError(f"{part!r} is not FIRST-LAST:RATE, as in 3-5:0.7,6-11:0.5")
        found.append((int(match[1]), int(match[2]), rate(match[3])))
    return found


def given(text: str) -> str:
    """A path or name that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty text names nothing")
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r}: a NUL is in no name")
    return text


def _list(kind: Callable[[str], Any]) -> Callable[[str], tuple]:
    """Values with commas between them."""
    return lambda text: tuple(kind(part.strip()) for part in text.split(","))


def setting(text: str) -> tuple[str, str]:
    """(key, value) of KEY=VALUE."""
    key, sign, value = text.partition("=")
    if not key.strip() or not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key.strip(), value


def words(text: str) -> list[str]:
    """The words of a text, quoted as in a shell."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _model_options(parser: argparse.ArgumentParser, *, sized: bool = True) -> None:
    parser.add_argument("--checkpoint", required=True, type=given, metavar="SOURCE", dest="source",
                        help="checkpoint or run folder, a weights file such as .pth or .safetensors (with --model), a "
                             "folder of such with "
                             "its config.json, hf-hub:OWNER/NAME, or a timm name")
    parser.add_argument("--model", metavar="NAME", help="timm name of the model that a weights file is for")
    parser.add_argument("--num-classes", type=count, metavar="N", help="classes of the classifier (default: the "
                                                                       "weights' own)")
    if sized:
        parser.add_argument("--img-size", type=count, metavar="PIXELS",
                            help="side of the images; position embeddings of another are resampled (default: the "
                                 "weights' own)")
    group = parser.add_argument_group("images", "How they are prepared (default: as config.json beside the weights "
                                                "says, or else timm).")
    group.add_argument("--mean", type=float, nargs="+", metavar="M", help="of the channels, in pixels from 0 to 1")
    group.add_argument("--std", type=float, nargs="+", metavar="S", help="deviation of the channels")
    group.add_argument("--crop-pct", type=crop, help="crop size over resize size")
    group.add_argument("--crop-mode", metavar="NAME", help="center, squash or border")
    group.add_argument("--interpolation", metavar="NAME", help="bicubic, bilinear, ...")


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=given, required=True, metavar="DATA",
                        help="'digits' (embedded), a folder with train/ and val/, validation/ or test/, or hfds/NAME, "
                             "wds/NAME, ...; "
                             "where labels are not needed, also a folder of images alone; a split may be a tar file. "
                             "Of a Segmenter: "
                             "'digit_scenes' (embedded), or the folder of ADE20K, Cityscapes, PASCAL Context, CamVid, "
                             "or of images and "
                             "masks")
    parser.add_argument("--class-map", type=given, metavar="FILE",
                        help="JSON of class folder: class number, or a text of one name a line (default: "
                             "DATA/class_index.json)")
    parser.add_argument("--workers", type=_number(int, 0, 256, "an integer from 0 to 256"), metavar="N",
                        help="loader processes (default: one a core, at most 8)")


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=seed, default=0, help="default: 0")
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _recipe_options(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--recipe", default=default, metavar="NAME", help=f"named recipe (default: {default}); `vitlab "
                                                                          f"recipes` lists them")
    parser.add_argument("--epochs", type=count, metavar="N", help="instead of the recipe's")
    parser.add_argument("--batch-size", type=count, metavar="N", help="instead of the recipe's; lr scales along")
    parser.add_argument("--lr", type=_number(float, 1e-12, 1e3, "a positive number"), metavar="LR",
                        help="instead of the recipe's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="instead of the recipe's; float16 "
                                                                                    "with loss scaling")
    parser.add_argument("--limit", type=count, metavar="IMAGES", help="train on a slice of this many images")
    group = parser.add_argument_group("how it is run", "None of it changes what is trained, but for rounding.")
    group.add_argument("--accumulate", type=count, default=1, metavar="K", help="divide each step into K batches one "
                                                                                "after another")
    group.add_argument("--compile", action="store_true", help="compile the model (torch.compile)")
    group.add_argument("--grad-checkpointing", action="store_true", help="keep no activations inside blocks: less "
                                                                         "memory, more time")
    group.add_argument("--channels-last", action="store_true", help="memory format of images and patch embedding")
    group.add_argument("--save-steps", type=count, default=1000, metavar="N",
                       help="a state on the disk every N steps, besides one after each epoch (default: 1000)")
    group.add_argument("--keep", type=count, default=2, metavar="K", help="states that stay on the disk (default: 2)")
    group.add_argument("--changed-data", action="store_true", help="go on though the data set is another than it was")


def _window_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("windows", "Of a Segmenter, whose images may be larger than its encoder's.")
    group.add_argument("--window", type=count, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: the encoder's size")
    group.add_argument("--stride", type=count, nargs=2, metavar=("HEIGHT", "WIDTH"), help="from window to window "
                                                                                          "(default: the window)")
    group.add_argument("--scales", type=positive, nargs="+", metavar="FACTOR", help="the mean over several sizes "
                                                                                    "(default: 1)")
    group.add_argument("--flip", action="store_true", help="and over each turned left to right")


def build_parser() -> Parser:
    parser = Parser(prog="vitlab", description="Make vision transformers cheaper and faster, and see why it works.")
    parser.add_argument("--version", action="version", version=f"vitlab {vitlab.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    p = add("pretrain", "Train a timm model from scratch.")
    p.add_argument("--model", required=True, metavar="NAME", help="timm name, such as vit_micro_patch4_32 or "
                                                                  "deit_tiny_patch16_224")
    p.add_argument("--img-size", type=count, metavar="PIXELS", help="instead of the model's own")
    _data_options(p)
    _recipe_options(p, "digits")
    p.add_argument("--out", type=given, required=True, metavar="RUN", help="run folder; a killed run goes on there")
    _run_options(p)

    p = add("segment", "Train a dense Segmenter: a model's blocks as encoder, and a decoder that gives every pixel a "
                       "class.")
    _model_options(p, sized=False)
    _data_options(p)
    p.add_argument("--decoder", choices=("mask_transformer", "linear"),
                   help="default: mask_transformer; where SOURCE is a Segmenter, its own goes on")
    p.add_argument("--img-size", type=count, nargs=2, metavar=("HEIGHT", "WIDTH"),
                   help="pixels the encoder is for (default: those of the first images, 512 x 512 where they differ)")
    _recipe_options(p, "segmenter")
    p.add_argument("--out", type=given, required=True, metavar="RUN", help="run folder; a killed run goes on there")
    _run_options(p)

    p = add("score", "Score tokens, or heads and neurons, on images of train.")
    _model_options(p)
    _data_options(p)
    p.add_argument("--of", choices=("tokens", "units"), default="tokens", help="units are heads and neurons (default: "
                                                                               "tokens)")
    p.add_argument("--criterion", metavar="NAME", help="of tokens: gradient, class_attention or hsic (default: "
                                                       "gradient); of units: "
                                                       "hsic, weight, activation, taylor, reconstruction, fisher or "
                                                       "random (default: hsic)")
    p.add_argument("--images", type=count, default=512, help="of train, at most (default: 512)")
    p.add_argument("--batch-size", type=count, help="default: 64, of scenes 8")
    p.add_argument("--absolute", choices=("image", "batch"),
                   help="of criterion gradient: absolute value per image, or after the batch as published (default: "
                        "image)")
    p.add_argument("--out", type=given, required=True, metavar="FILE", help="scores file, .safetensors")
    _run_options(p)

    p = add("prune", "Compress a dense model by its scores, or by a plan file.")
    _model_options(p)
    group = p.add_mutually_exclusive_group(required=True)
    group.add_argument("--scores", type=given, metavar="FILE", help="of tokens, from `vitlab score`: Prune and Merge")
    group.add_argument("--unit-scores", type=given, metavar="FILE", help="of heads and neurons, from `vitlab score "
                                                                         "--of units`")
    group.add_argument("--plan", type=given, metavar="FILE", help="a plan.json to apply as it is")
    group.add_argument("--match", type=ratio, metavar="R", nargs="?", const=True,
                       help="merge by content this fraction of the tokens in each block of the middle half, or without "
                            "R as many as the "
                            "budget asks for; needs no scores")
    group = p.add_mutually_exclusive_group()
    group.add_argument("--gmacs", type=positive, help="budget, instead of a ratio or keep rate: 10^9 multiply-adds per "
                                                      "image")
    group.add_argument("--macs-ratio", type=ratio, help="budget: fraction of the dense model's multiply-adds")
    p.add_argument("--read-out", action="store_true", default=None,
                   help="with --match: the last block computes what the classifier reads alone")
    p.add_argument("--rule", choices=("center", "merge"), help="default: center")
    p.add_argument("--keep-rate", type=rate, help="fraction of patches that become centers (default: 0.6)")
    p.add_argument("--spans", type=spans, metavar="FIRST-LAST:RATE,...",
                   help="instead of --keep-rate: blocks through which tokens stay merged, as in 3-5:0.7,6-11:0.5; all "
                        "stay in the others")
    p.add_argument("--prune-rate", type=rate, help="fraction of patches that skip a block, or a span (default: 0.1)")
    p.add_argument("--decay", type=_number(float, 0, 1, "a number from 0 to 1"), metavar="D",
                   help="that each block's scores lose of their factor to the one before, below 1 / (blocks - 1) "
                        "(default: the published "
                        "one of the rule, spread over the depth)")
    p.add_argument("--boundary", choices=("grid", "reference"),
                   help="regions of rule center: 2-D cells, or raster runs as published (default: grid)")
    p.add_argument("--weights", choices=("score", "uniform", "reference"),
                   help="entries of the merge matrix; reference: as published (default: score)")
    p.add_argument("--share", action="store_true", default=None,
                   help="regions share their block's update and keep their own streams, without matrices")
    p.add_argument("--policy", metavar="NAME", help="with --unit-scores: published ratios, deit_small_60 or "
                                                    "deit_base_60")
    p.add_argument("--head-ratio", type=ratio, help="with --unit-scores: fraction of heads cut in every block")
    p.add_argument("--neuron-ratio", type=ratio, help="with --unit-scores: fraction of neurons cut in every block")
    p.add_argument("--rho", type=ratio, help="with --unit-scores: fraction of tokens dropped by each of three "
                                             "selections")
    p.add_argument("--out", type=given, required=True, metavar="RUN", help="run folder for the checkpoint")
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")

    p = add("search", "Search how much to cut in each block under a budget; a killed search goes on.")
    _model_options(p)
    _data_options(p)
    group = p.add_mutually_exclusive_group(required=True)
    group.add_argument("--gmacs", type=positive, help="budget: 10^9 multiply-adds per image")
    group.add_argument("--macs-ratio", type=ratio, help="budget: fraction of the dense model's multiply-adds")
    group.add_argument("--latency-ms", type=positive, help="budget: milliseconds of one batch on this machine, from a "
                                                           "measured table")
    p.add_argument("--published-count", action="store_true", help="count multiply-adds, and rank tokens, as arXiv "
                                                                  "2201.00043 does")
    p.add_argument("--units", default="neurons,heads", metavar="LIST", help="neurons,heads or one of them or none "
                                                                            "(default: both)")
    p.add_argument("--tokens", metavar="NAME",
                   help="none, select, merge, share or match, the last four with _per_stage for ratios of their own, "
                        "or "
                        "merge_per_span (default: select; match without a class token or of a Segmenter)")
    p.add_argument("--read-out", action="store_true",
                   help="the last block computes what a classifier on the class token reads, and no more: exact, fewer "
                        "multiply-adds")
    p.add_argument("--max-ratio", type=_number(float, 1e-3, 0.999, "a fraction from 0.001 to 0.999"), default=0.5,
                   metavar="R", help="largest ratio; int(count * (1 - ratio)) stay, so of few heads one may go "
                                     "(default: 0.5, as published)")
    p.add_argument("--strategy", default="gp", metavar="NAME", help="gp, random or uniform (default: gp)")
    p.add_argument("--settings", default="default", metavar="NAME", help="default or published (default: default)")
    p.add_argument("--evaluations", type=count, metavar="N", help="policies measured in all (default: the settings')")
    p.add_argument("--minutes", type=minutes, metavar="M",
                   help="for the whole, at most; what was found by then is reported, and the same command goes on "
                        "(default: no limit)")
    p.add_argument("--population", type=_number(int, 2, 10**6, "an integer of at least 2"), metavar="N",
                   help="policies before the Gaussian process proposes (default: the settings')")
    p.add_argument("--start", "--initial", dest="initial", choices=("varied", "random", "sensitivity"),
                   help="how the population is drawn; sensitivity: each dimension is measured alone first (default: "
                        "the settings')")
    p.add_argument("--metric", choices=("top1_pct", "miou_pct", "distill_loss"), default="distill_loss",
                   help="top-1, of a Segmenter mIoU, or the distance to the dense model's output (default: "
                        "distill_loss)")
    p.add_argument("--criterion", default="hsic", metavar="NAME", help="that ranks heads and neurons (default: hsic)")
    p.add_argument("--compensate", action="store_true", help="refit what is left of each cut layer before a policy is "
                                                             "measured")
    p.add_argument("--images", type=count, default=1000,
                   help="of train, that policies are measured on, and as many others that the best is reported on, at "
                        "most (default: 1000)")
    p.add_argument("--parallel", type=count, metavar="K", help="policies proposed at a time (default: as many as there "
                                                               "are processes)")
    p.add_argument("--batch-size", type=count, metavar="N", help="of the latency (default: 32)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the latency (default: float32)")
    p.add_argument("--out", type=given, required=True, metavar="STUDY", help="folder of the study")
    _run_options(p)

    p = add("tonight", "From a dense model and images without labels to a cheaper model that is ready: offers, search, "
                       "calibration.")
    _model_options(p)
    _data_options(p)
    group = p.add_mutually_exclusive_group()
    group.add_argument("--gmacs", type=positive, help="budget: 10^9 multiply-adds per image")
    group.add_argument("--macs-ratio", type=ratio, default=0.6, help="budget: fraction of the dense model's "
                                                                     "multiply-adds (default: 0.6)")
    p.add_argument("--minutes", type=minutes, metavar="M",
                   help="for the whole: fewer evaluations and images where it would take longer, and self-distillation "
                        "in what is left "
                        "(default: as long as the amounts below take, about an hour at most, and none of it)")
    p.add_argument("--rules", type=_list(given), metavar="LIST",
                   help="merging by content, shared updates, neurons, heads and neurons, all together, with commas "
                        "between (default: all)")
    p.add_argument("--ratios", type=_list(_number(float, 1e-3, 1, "a fraction from 0.001 to 1")), metavar="LIST",
                   help="fractions of the dense model's multiply-adds that each rule is offered at, beside the budget "
                        "(default: "
                        "0.9,0.75,0.6,0.45)")
    p.add_argument("--evaluations", type=_number(int, 0, 10**6, "an integer from 0"), default=40, metavar="N",
                   help="plans measured in the search at the budget; 0: none (default: 40)")
    p.add_argument("--finalists", type=count, default=2, metavar="N",
                   help="plans of the search that are refitted and compared, beside the best of one rule alone "
                        "(default: 2)")
    p.add_argument("--images", type=count, default=128, help="of train, that plans are compared on, at most (default: "
                                                             "128)")
    p.add_argument("--report-images", type=count, default=256, metavar="IMAGES", help="others, to report on, at most "
                                                                                      "(default: 256)")
    p.add_argument("--score-images", type=count, default=1000, metavar="IMAGES",
                   help="others, to rank units and to refit on, at most (default: 1000)")
    p.add_argument("--out", type=given, required=True, metavar="RUN", help="run folder; the model is in deployed/")
    _run_options(p)

    p = add("calibrate", "Compress by a plan and refit what is left, without labels: closed form, then a short "
                         "self-distillation.")
    _model_options(p)
    p.add_argument("--plan", type=given, required=True, metavar="FILE", help="a plan.json by which a dense SOURCE is "
                                                                             "compressed")
    _data_options(p)
    p.add_argument("--images", type=count, default=1000,
                   help="of train, that it is fitted on, at most; others to choose and to report on (default: 1000)")
    p.add_argument("--minutes", type=minutes, default=0, metavar="M",
                   help="self-distillation afterwards, at most so long (default: 0, none)")
    p.add_argument("--out", type=given, required=True, metavar="RUN", help="run folder for the checkpoint")
    _run_options(p)

    p = add("finetune", "Fine-tune a compressed model, distilling from the dense one.")
    _model_options(p)
    p.add_argument("--plan", type=given, metavar="FILE", help="a plan.json by which a dense SOURCE is compressed first")
    p.add_argument("--steps", type=count, default=1, metavar="K",
                   help="with --plan: cut and fine-tune in K turns, each for its share of the epochs, at least one "
                        "(default: 1)")
    p.add_argument("--teacher", type=given, metavar="SOURCE", help="the dense model, like --checkpoint")
    p.add_argument("--teacher-model", metavar="NAME", help="timm name of the model that the teacher's weights file is "
                                                           "for")
    _data_options(p)
    _recipe_options(p, "deit_tiny_pm")
    p.add_argument("--distill", choices=("none", "soft", "hard"), help="instead of the recipe's")
    p.add_argument("--trainable", choices=("all", "matrices", "weights"), help="what trains: all, the matrices alone, "
                                                                               "or all but them")
    p.add_argument("--matrices-lr", type=_number(float, 1e-6, 1e3, "a number from 1e-6"), metavar="F",
                   help="factor of the learning rate for merge and reconstruct matrices, instead of the recipe's; "
                        "where an image has many "
                        "patches, below 1")
    p.add_argument("--out", type=given, required=True, metavar="RUN", help="run folder; a killed run goes on there")
    _run_options(p)

    p = add("resume", "Go on with the training or search of a run folder, by the command that began it.")
    p.add_argument("run", type=given, metavar="RUN", help="run folder")

    p = add("evaluate", "Top-1, top-5 and loss on the held-out split, of a Segmenter mIoU, with GMACs and parameters.")
    _model_options(p)
    _data_options(p)
    p.add_argument("--dense", type=given, metavar="SOURCE", help="the model it was made from: the distance to its "
                                                                 "output, too")
    p.add_argument("--split", default="held_out", help="default: the held-out one")
    p.add_argument("--batch-size", type=count, help="default: 64, of a Segmenter 1, for images that differ in size")
    p.add_argument("--limit", type=count, metavar="IMAGES", help="a slice of this many images")
    p.add_argument("--name", help="name in the result row (default: SOURCE)")
    p.add_argument("--bf16", action="store_true", help="bf16 autocast instead of float32")
    _window_options(p)
    p.add_argument("--out", type=given, metavar="RUN", help="append the row to RUN/results.jsonl")
    _run_options(p)

    p = add("predict", "Segment a folder of images: class numbers and an overlay of each, as PNG.")
    _model_options(p)
    p.add_argument("--images", type=given, required=True, metavar="FOLDER", help="folder of images; masks are not "
                                                                                 "needed")
    p.add_argument("--opacity", type=rate, default=0.55, help="of the classes' colours over the image (default: 0.55)")
    p.add_argument("--bf16", action="store_true", help="bf16 autocast instead of float32")
    _window_options(p)
    p.add_argument("--out", type=given, required=True, metavar="FOLDER", help="folder for NAME.png (overlay) and "
                                                                              "NAME_classes.png")
    p.add_argument("--device", metavar="DEVICE", help="cpu or cuda (default: cuda where there is one)")
    p.add_argument("--quiet", action="store_true", help="no progress bars")

    p = add("throughput", "Images per second of deployed models, the first the baseline, measured in turn.")
    p.add_argument("sources", nargs="+", type=given, metavar="SOURCE", help="checkpoint or run folders, or timm names")
    p.add_argument("--batch-size", type=count, default=32, help="default: 32")
    p.add_argument("--repeats", type=count, default=10, help="default: 10")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: float32")
    p.add_argument("--out", type=given, metavar="RUN", help="append the rows to RUN/results.jsonl")
    p.add_argument("--device", metavar="DEVICE", help="cpu or cuda (default: cuda where there is one)")
    p.add_argument("--quiet", action="store_true", help="no progress bars")

    add("recipes", "List the named recipes with source, expected number and command.")

    p = add("batch", "Run a batch file of notebooks with parameters; what is up to date is not repeated, a failed or "
                     "killed one goes on.")
    p.add_argument("file", type=given, metavar="FILE",
                   help="YAML (docs/batch.md has the format), or the name of one that comes with vitlab, such as "
                        "digits")
    p.add_argument("--out", type=given, metavar="RUN", help="run folder (default: runs/NAME, of FILE's name)")
    p.add_argument("--set", dest="changes", action="append", default=[], type=setting, metavar="KEY=VALUE",
                   help="a parameter for all notebooks that declare it; with dots, a place in the file, such as "
                        "entries.dense.parameters.seed=1")
    p.add_argument("--cores", type=count, default=1, metavar="N", help="entries at a time (default: 1)")
    p.add_argument("--executor", type=given, metavar="NAME", help="executor plugin of Snakemake's, such as slurm "
                                                                  "(default: this machine)")
    p.add_argument("--snakemake", type=words, default=[], metavar="ARGS",
                   help="arguments for Snakemake itself in one text, such as --snakemake='--default-resources "
                        "slurm_partition=gpu'")
    p.add_argument("--dry-run", action="store_true", help="say what would run and why, and start nothing")

    p = add("report", "One page of a batch's run, or a study's: tables with conditions, figures, failures; the table "
                      "as CSV and LaTeX.")
    p.add_argument("run", type=given, metavar="RUN", help="run folder of a batch, or a study with results.jsonl")

    p = add("notebooks", "Copy the notebooks that come with vitlab into a folder of yours.")
    p.add_argument("folder", type=given, metavar="FOLDER", help="files that were changed there are never replaced")

    p = add("demo", "Run the notebooks on the embedded digits: dense model, scores, prune and merge, search, "
                    "calibration, table.")
    p.add_argument("--out", type=given, metavar="RUN", help="default: runs/demo, or runs/demo-all with --everything")
    p.add_argument("--everything", action="store_true", help="every notebook: twenty minutes in place of five")
    p.add_argument("--quick", action="store_true", help="a few steps of each, to see that it runs")
    return parser
