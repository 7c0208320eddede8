"""The command line, called in process: what it does, and the one line that wrong input gets."""
import io
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console

from vitlab import cli
from vitlab.models import checkpoint
from vitlab.plan import CompressionPlan
from vitlab.plan.cost import gmacs
from vitlab.plan.rules import ReadOut
from vitlab.plan.tokens import decay_of
from vitlab.runtime import signals
from vitlab.runtime.files import read_lines
from vitlab.workbench import tonight

SURFACE = Path(__file__).parent / "golden" / "commands.txt"
QUICK = ["--images", "64", "--epochs", "1", "--batch-size", "32", "--quiet", "--device", "cpu"]


def run(capsys, *argv: str) -> tuple[int, str, str]:
    try:
        code = cli.main(list(argv))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A dense checkpoint and scores, made by the commands themselves."""
    out = tmp_path_factory.mktemp("study")
    assert cli.main(["pretrain", "--model", "vit_nano_patch4_32", "--data", "digits", "--out", f"{out}/dense",
                     *QUICK]) == 0
    assert cli.main(["score", "tokens", "--checkpoint", f"{out}/dense", "--data", "digits", "--images", "32", "--out",
                     f"{out}/s.safetensors", "--quiet"]) == 0
    return out


def test_the_papers_path_runs_from_commands_alone(study, capsys):
    code, out, _ = run(capsys, "prune", "tokens", "--checkpoint", f"{study}/dense", "--scores",
                       f"{study}/s.safetensors", "--keep-rate", "0.5", "--out", f"{study}/pruned")
    assert code == 0 and "GMACs deployed" in out
    code, _, _ = run(capsys, "finetune", "--checkpoint", f"{study}/pruned", "--teacher", f"{study}/dense", "--data",
                     "digits", "--recipe", "digits_pm", "--out", f"{study}/tuned", *QUICK)
    assert code == 0
    code, out, _ = run(capsys, "evaluate", "--checkpoint", f"{study}/tuned", "--data", "digits", "--out", str(study),
                       "--quiet", "--dense", f"{study}/dense")
    assert code == 0 and "top1_pct" in out and "± one standard error over 360 images" in out
    row = json.loads((study / "results.jsonl").read_text())
    assert row["split"] == "test" and row["conditions"]["images"] == 360
    assert row["distill_loss"] > 0 and f"{row['distill_loss']:.4f} ± " in out
    assert row["top1_se"] > 0 and row["loss_se"] > 0 and f"{row['top1_pct']:.2f} ± {row['top1_se']:.2f}" in out
    code, out, _ = run(capsys, "throughput", f"{study}/dense", f"{study}/tuned", "--repeats", "2", "--batch-size", "4",
                       "--quiet")
    assert code == 0 and "images/s (batch 4)" in out and "range" in out and "ratio: median over 2 rounds" in out
    assert "threads" in out and "float32" in out


def test_prune_takes_the_decay_of_scores_per_block(study, capsys):
    common = ["prune", "tokens", "--checkpoint", f"{study}/dense", "--scores", f"{study}/s.safetensors"]
    for name, options in (("a", ["--decay", "0"]), ("b", ["--decay", "0.05"]), ("c", [])):
        assert run(capsys, *common, *options, "--out", f"{study}/{name}")[0] == 0
    made = [CompressionPlan.load(f"{study}/{name}/checkpoint/plan.json") for name in "abc"]
    assert [plan.made_by["decay"] for plan in made[:2]] == [0.0, 0.05]
    assert made[2].made_by["decay"] == decay_of("center", made[2].shape.depth)


def test_prune_with_a_plan_file_makes_the_same_model(study, capsys):
    run(capsys, "prune", "tokens", "--checkpoint", f"{study}/dense", "--scores", f"{study}/s.safetensors", "--out",
        f"{study}/a")
    code, _, _ = run(capsys, "prune", "plan", "--checkpoint", f"{study}/dense", "--plan",
                     f"{study}/a/checkpoint/plan.json", "--out", f"{study}/b")
    assert code == 0
    assert checkpoint.load(study / "a").plan.blocks == checkpoint.load(study / "b").plan.blocks


def test_search_cut_and_fine_tune_run_from_commands_alone(study, capsys):
    base = ["--checkpoint", f"{study}/dense", "--data", "digits"]
    code, out, _ = run(capsys, "score", "units", *base, "--images", "32", "--out", f"{study}/u.safetensors",
                       "--quiet")
    assert code == 0
    code, out, _ = run(capsys, "prune", "units", "--checkpoint", f"{study}/dense", "--scores", f"{study}/u.safetensors",
                       "--neuron-ratio", "0.25", "--rho", "0.2", "--out", f"{study}/units")
    assert code == 0 and "neurons per block [192" in out and "tokens per block" in out and "heads per block" not in out
    search = ["search", *base, "--macs-ratio", "0.6", "--evaluations", "4", "--population", "3", "--images", "32",
              "--out", f"{study}/found", "--quiet"]
    code, out, _ = run(capsys, *search)
    assert code == 0 and "best of 4" in out and f"{study}/found/plan.json" in out
    worth = json.loads((study / "found/reported.json").read_text())
    assert "on 32 other images, ± one standard error: distill_loss " in out and worth["distill_loss_se"] > 0 and worth[
        "images"] == 32
    journal = (study / "found/journal.jsonl").read_text()
    code, again, _ = run(capsys, *search)
    assert code == 0 and again == out and (study / "found/journal.jsonl").read_text() == journal
    few = [{"4": "1"}.get(word, word) for word in search[:-2]]
    code, _, _ = run(capsys, *few, f"{study}/sensed", "--quiet", "--start", "sensitivity")
    assert code == 0 and '"by": "sensitivity"' in (study / "sensed/journal.jsonl").read_text()
    code, _, error = run(capsys, *search[:-2], f"{study}/other", "--quiet", "--start", "sensitivity", "--strategy",
                         "random")
    assert code == 2 and 'a start of strategy "gp"' in error
    code, _, _ = run(capsys, "finetune", *base, "--teacher", f"{study}/dense", "--recipe", "digits_pm", "--plan",
                     f"{study}/found/plan.json", "--out", f"{study}/joint", *QUICK)
    assert code == 0
    assert checkpoint.load(study / "joint").plan.blocks == CompressionPlan.load(study / "found/plan.json").blocks


def test_calibration_runs_from_the_command_alone_and_prints_what_it_gained(study, capsys):
    run(capsys, "score", "units", "--checkpoint", f"{study}/dense", "--data", "digits", "--criterion", "weight",
        "--out", f"{study}/w.safetensors", "--quiet")
    run(capsys, "prune", "units", "--checkpoint", f"{study}/dense", "--scores", f"{study}/w.safetensors",
        "--neuron-ratio", "0.5", "--out", f"{study}/half")
    base = ["calibrate", "--checkpoint", f"{study}/dense", "--plan", f"{study}/half/checkpoint/plan.json", "--data",
            "digits", "--images", "64", "--out", f"{study}/calibrated"]
    code, out, _ = run(capsys, *base)
    assert code == 0 and "in nats on 216 other images, ± one standard error: cut " in out and ", refitted " in out
    assert out.count(" ± ") == 3 and "± 0.0000," not in out and "distilled" not in out
    assert re.search(r"; kept: (cut|refitted|refitted throughout)$", out, re.MULTILINE)
    code, out, _ = run(capsys, *base, "--minutes", "0.02")
    assert code == 0 and checkpoint.load(study / "calibrated").info["made_by"]["minutes"] == 0.02
    code, _, err = run(capsys, *base, "--minutes", "-1")
    assert code == 2 and "'-1' is not a number of minutes" in err


def test_tonight_takes_its_amounts_rules_and_ratios_from_the_command(study, capsys):
    base = ["tonight", "--checkpoint", f"{study}/dense", "--data", "digits", "--out", f"{study}/tonight",
            "--macs-ratio", "0.8"]
    small = ["--rules", "merging by content, neurons", "--ratios", "0.9,0.7", "--evaluations", "2", "--finalists", "1",
             "--images", "9", "--report-images", "11", "--score-images", "40"]
    with pytest.warns(UserWarning, match="^40 images to refit on: of fewer than 100 it is uncertain which form is the "
                                         "nearest"):
        code, out, err = run(capsys, *base, *small)
    rows, made_by = read_lines(study / "tonight/offers.jsonl"), checkpoint.load(study / "tonight/deployed").info[
        "made_by"]
    assert code == 0
    assert "before calibration, on 11 other images" in out
    assert f"kept: {made_by['kept']}" in out
    assert "GMACs deployed" in out
    assert [row["rule"] for row in rows] == ["merging by content"] * 3 + ["neurons"] * 3      # at 0.9, the budget, 0.7
    assert {role: made_by["roles"][role] for role in ("choose", "report", "score")} == {"choose": 9, "report": 11,
                                                                                        "score": 40}
    assert "tonight: 6 stages, about " in err and re.search("tonight 6/6, refit on all images: 100%", err)
    asked = {"rules": ("merging by content", "neurons"), "ratios": (0.9, 0.7), "evaluations": 2, "finalists": 1,
             "images": 9, "report_images": 11, "score_images": 40, "minutes": 1.5, "macs_ratio": 0.8}
    command, bound, _ = cli.build().parse_args([*base, *small, "--minutes", "1.5"], exit_on_error=False)
    assert command is tonight.tonight and bound.arguments.items() >= asked.items()
    for wrong, says in ((["--rules", "neurons,"], "names nothing"), (["--ratios", "0.5,2"], "'2' is not a fraction"),
                        (["--minutes", "-1"], "'-1' is not a number of minutes"), (["--finalists", "0"], "at least 1")):
        code, _, err = run(capsys, *base, *wrong)
        assert code == 2 and says in err and len(err.splitlines()) == 1
    code, _, err = run(capsys, *base, "--rules", "neurons,pruning")
    assert code == 2 and "rule 'pruning' is not known; known are ['merging by content'" in err


def test_a_search_given_minutes_reports_what_it_has_and_goes_on(study, capsys):
    search = ["search", "--checkpoint", f"{study}/dense", "--data", "digits", "--macs-ratio", "0.6", "--criterion",
              "weight", "--images", "32", "--evaluations", "4", "--population", "3", "--out", f"{study}/timed"]
    code, out, err = run(capsys, *search, "--minutes", "0")
    assert code == 0
    assert "best of 1: " in out
    assert "search: 4 policies to measure on 32 images, about 0 seconds; it ends after 0" in err
    code, out, err = run(capsys, *search, "--quiet")
    assert code == 0 and "best of 4: " in out and err == ""
    code, _, err = run(capsys, *search, "--minutes", "long")
    assert code == 2 and "'long' is not a number of minutes" in err


def test_published_form_is_a_flag_away(study, capsys):
    code, _, _ = run(capsys, "prune", "tokens", "--checkpoint", f"{study}/dense", "--scores", f"{study}/s.safetensors",
                     "--boundary", "reference", "--weights", "reference", "--out", f"{study}/published")
    made_by = checkpoint.load(study / "published").plan.made_by
    assert code == 0 and (made_by["boundary"], made_by["weights"]) == ("reference", "reference")


def test_a_split_that_is_not_there_is_named_with_those_that_are(study, capsys):
    code, _, err = run(capsys, "evaluate", "--checkpoint", f"{study}/dense", "--data", "digits", "--split", "dev",
                       "--quiet")
    assert code == 2 and "no split 'dev'" in err and "test" in err and "train" in err


def test_options_that_can_have_no_effect_are_refused(study, capsys, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text((study / "dense/checkpoint/plan.json").read_text())
    dense, out = ["--checkpoint", f"{study}/dense"], ["--out", f"{tmp_path}/o"]
    for argv, named in (
            (["prune", "plan", *dense, "--plan", str(plan), "--keep-rate", "0.5", *out], "--keep-rate"),
            (["prune", "tokens", *dense, "--scores", f"{study}/s.safetensors", "--rule", "merge", "--boundary", "grid",
              *out], "boundary is of rule center"),
            (["prune", "tokens", *dense, "--scores", f"{study}/s.safetensors", "--neuron-ratio", "0.5", *out],
             "--neuron-ratio"),
            (["prune", "match", *dense, "--ratio", "0.2", "--decay", "0.1", *out], "--decay"),
            (["score", "units", *dense, "--data", "digits", "--absolute", "image", "--out", f"{tmp_path}/o.safetensors"
              ],
             "--absolute"),
            (["search", *dense, "--data", "digits", "--gmacs", "9", *out], "can't be met"),
            (["search", *dense, "--data", "digits", "--gmacs", "0.01", "--units", "ears", *out], "ears"),
            (["search", *dense, "--data", "digits", "--gmacs", "0.01", "--tokens", "merge", "--published-count", *out],
             "tokens select"),
            (["finetune", *dense, "--teacher", f"{study}/dense", "--teacher-model", "deit_tiny_patch16_224", "--data",
              "digits", *out], "--teacher-model"),
            (["evaluate", *dense, "--model", "deit_tiny_patch16_224", "--data", "digits"], "--model"),
            (["throughput", f"{study}/dense", "--seed", "1"], "--seed"),
            (["pretrain", "--model", "vit_nano_patch4_32", "--data", "digits", "--class-map", str(plan), *out],
             "class map")):
        code, _, err = run(capsys, *argv)
        assert code == 2 and named in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("out", ["FILE", "FILE/x", "/proc/x", "n" * 300])
def test_a_place_that_can_not_be_written_to_is_refused_before_the_work(study, capsys, tmp_path, out):
    (tmp_path / "FILE").write_text("mine")
    target = out if out.startswith("/") else str(tmp_path / out)
    code, _, err = run(capsys, "prune", "tokens", "--checkpoint", f"{study}/dense", "--scores",
                       f"{study}/s.safetensors", "--out", target)
    assert code == 2 and len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert (tmp_path / "FILE").read_text() == "mine"


def test_a_result_never_takes_the_place_of_a_model_that_is_read(study, capsys):
    before = (study / "dense/checkpoint/weights.safetensors").read_bytes()
    plan = ["--plan", f"{study}/dense/checkpoint/plan.json"]
    for argv in (["prune", "plan", "--checkpoint", f"{study}/dense", *plan, "--out", f"{study}/dense"],
                 ["prune", "plan", "--checkpoint", f"{study}/dense/checkpoint", *plan, "--out", f"{study}/dense"],
                 ["calibrate", "--checkpoint", f"{study}/dense", "--data", "digits", *plan, "--out",
                  f"{study}/x/../dense"],
                 ["finetune", "--checkpoint", "vit_nano_patch4_32", "--teacher", f"{study}/dense", "--data", "digits",
                  "--out", f"{study}/dense"]):
        code, _, err = run(capsys, *argv)
        assert code == 2 and "would replace" in err and len(err.strip().splitlines()) == 1
    assert (study / "dense/checkpoint/weights.safetensors").read_bytes() == before


def test_another_image_size_trains_and_is_measured(capsys, tmp_path):
    code, _, _ = run(capsys, "pretrain", "--model", "vit_nano_patch4_32", "--img-size", "48", "--data", "digits",
                     "--out", f"{tmp_path}/r", *QUICK)
    assert code == 0 and checkpoint.load(tmp_path / "r").plan.shape.img_size == (48, 48)
    code, _, _ = run(capsys, "evaluate", "--checkpoint", f"{tmp_path}/r", "--data", "digits", "--images", "20",
                     "--quiet")
    assert code == 0


def test_what_can_be_told_from_the_words_is_told_before_torch_is_imported(tmp_path):
    """So that help, a wrong path, recipes and copies of notebooks are there at once."""
    words = [["--help"], ["prune", "--help"], [], ["frobnicate"], ["prune", "--plan", "p.json"]]
    evaluate, prune = ["evaluate", "--data", "digits"], ["prune", "tokens", "--checkpoint", "vit_nano_patch4_32"]
    words += [[*evaluate, "--checkpoint", "a/b/c"], [*evaluate[:2], "nowhere", "--checkpoint", "dense"],
              [*prune, "--scores", "none.safetensors", "--out", "o"], [*prune, "--scores", __file__, "--out", __file__],
              ["finetune", "--checkpoint", ".", "--plan", "none.json", "--out=o"], [*evaluate, "--dense", "/none"],
              [*evaluate, "--class-map=none.json", "--checkpoint", "dense"]]
    code = f"""
import sys
from vitlab.cli import main
assert main(["recipes"]) == main(["notebooks", {str(tmp_path)!r}]) == 0
print([main(words) for words in {words!r}])
assert "torch" not in sys.modules and "vitlab.workbench.steps" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str([0, 0, *[2] * (len(words) - 2)])
    lines = done.stderr.splitlines()
    assert len(lines) == len(words) - 2 and all("no such" in line for line in lines[3:] if "is a file" not in line)


def surface() -> str:
    """The help of every command, 100 columns wide."""
    app, console = cli.build(), Console(width=100, color_system=None, force_terminal=False, file=io.StringIO())
    for name in ("", *cli.COMMANDS, "resume"):
        app.help_print(name.split() or [], console=console)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


@pytest.mark.skipif(version("cyclopts").startswith("4."), reason="cyclopts 4, of Python 3.10, words its help otherwise")
def test_the_command_surface_is_the_stored_one():
    assert surface() == SURFACE.read_text(encoding="utf-8"), "run: python tests/test_cli.py"


@pytest.mark.parametrize("command", [name for name, entry in cli.COMMANDS.items() if not isinstance(entry, str)])
def test_every_flag_of_every_command_says_what_it_is(command):
    app = cli.build()
    for part in command.split():
        app = app[part]
    arguments = [each for each in app.assemble_argument_collection(parse_docstring=True)
                 if each.parse and not each.children]
    assert not [each.name for each in arguments if not each.parameter.help]


def test_merging_by_content_from_the_command_line_needs_no_images(study, tmp_path, capsys):
    common = ["prune", "match", "--checkpoint", f"{study}/dense", "--out", str(tmp_path / "run")]
    code, out, _ = run(capsys, *common, "--ratio", "0.25", "--read-out")
    plan = checkpoint.load(tmp_path / "run").plan
    assert code == 0 and "GMACs deployed" in out and isinstance(plan.blocks[-1].tokens, ReadOut)
    depth, (first, *_) = len(plan.blocks), [i for i, block in enumerate(plan.blocks) if block.tokens is not None]
    assert first == depth // 4 and plan.blocks[first].tokens.merged == plan.shape.num_patches - int(
        plan.shape.num_patches * 0.75)


@pytest.mark.parametrize("way", [["match"], ["tokens", "--scores", "s.safetensors"]])
def test_prune_takes_a_budget_instead_of_a_ratio_or_keep_rate(study, tmp_path, capsys, monkeypatch, way):
    monkeypatch.chdir(study)
    common = ["prune", *way, "--checkpoint", "dense", "--out", str(tmp_path / "run")]
    code, out, _ = run(capsys, *common, "--macs-ratio", "0.8")
    plan = checkpoint.load(tmp_path / "run").plan
    dense = gmacs(CompressionPlan.empty(plan.shape))
    assert code == 0 and 0.75 * dense < gmacs(plan) <= 0.8 * dense and f"{gmacs(plan):.4f} GMACs deployed" in out
    assert run(capsys, *common, "--gmacs",
               f"{0.8 * dense}")[0] == 0 and checkpoint.load(tmp_path / "run").plan.blocks == plan.blocks
    code, _, error = run(capsys, *common, "--macs-ratio", "0.01")
    assert code == 2 and "can't be met" in error and "to below 1" in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("given, named", [
    (["match"], "one of the three is needed"),
    (["match", "--ratio", "0.2", "--gmacs", "1"], "one of the three is needed"),
    (["match", "--gmacs", "1", "--macs-ratio", "0.5"], "one of the three is needed"),
    (["match", "--ratio", "x"], "'x' is not a fraction"),
    (["tokens", "--scores", "s.safetensors", "--gmacs", "1", "--macs-ratio", "0.5"], "one of the two is needed"),
    (["tokens", "--scores", "s.safetensors", "--keep-rate", "0.5", "--gmacs", "1"], "a keep rate is given; one of the "
                                                                                    "two is needed")])
def test_no_amount_or_two_are_refused_in_one_line(study, tmp_path, capsys, monkeypatch, given, named):
    monkeypatch.chdir(study)
    code, _, error = run(capsys, "prune", *given, "--checkpoint", "dense", "--out", str(tmp_path / "run"))
    assert code == 2 and named in error and len(error.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


def test_spans_from_the_command_line_stay_merged_and_are_recorded(study, tmp_path, capsys):
    common = ["prune", "tokens", "--checkpoint", f"{study}/dense", "--scores", f"{study}/s.safetensors", "--out",
              str(tmp_path / "run")]
    code, out, _ = run(capsys, *common, "--spans", "0-1:0.7,2-2:0.5", "--prune-rate", "0.2")
    plan = checkpoint.load(tmp_path / "run").plan
    assert code == 0 and "GMACs deployed" in out and plan.made_by["spans"] == [[0, 1, 0.7], [2, 2, 0.5]]
    assert [b.tokens and b.tokens.span for b in plan.blocks][:4] == [2, None, 1,
                                                                     None] and "keep_rate" not in plan.made_by
    assert len(set(plan.tokens_per_block()[:2])) == 1 and plan.tokens_per_block()[3] == plan.shape.num_tokens


@pytest.mark.parametrize("spans, named", [
    ("", "an empty text names nothing"), ("0-1", "'0-1' is not FIRST-LAST:RATE"),
    ("0:0.5", "'0:0.5' is not"), ("0-1:0.5,", "'' is not"), ("0-1:0.5;2-3:0.5", "is not"), ("a-b:0.5", "is not"),
    ("-1-2:0.5", "requires an argument"), ("0-1:1.5", "'1.5' is not a fraction from 0 to 1"),
    ("0-1:.", "'.' is not a fraction"), ("0-1:0", "span 0-1: keep_rate is 0"), ("1-0:0.5", "span 1-0: its blocks must "
                                                                                           "lie from 0 to"),
                                                                                           ("0-99:0.5",
                                                                                            "span 0-99: its blocks"),
    ("0-1:0.5,1-2:0.5", "span 1-2 begins before")])
def test_spans_that_can_not_be_are_refused_in_one_line(study, tmp_path, capsys, spans, named):
    code, _, err = run(capsys, "prune", "tokens", "--checkpoint", f"{study}/dense", "--scores",
                       f"{study}/s.safetensors", "--out", str(tmp_path / "run"), "--spans", spans)
    assert code == 2 and named in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("other, named", [
    (["--keep-rate", "0.5"], "spans do not go with a keep rate: each span has its own"),
    (["--share"], "spans do not go with share")])
def test_options_that_do_not_go_with_spans_are_refused(study, tmp_path, capsys, other, named):
    code, _, err = run(capsys, "prune", "tokens", "--checkpoint", f"{study}/dense", "--scores",
                       f"{study}/s.safetensors", *other, "--spans", "0-1:0.5", "--out", str(tmp_path / "run"))
    assert code == 2 and named in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("stop, code, word",
                         [(KeyboardInterrupt, 130, "interrupted"), (signals.Stopped, 75, "stopped on request")])
@pytest.mark.parametrize("command, says", [
    ("evaluate --checkpoint dense --data digits", "nothing of it is kept, and the same command begins anew"),
    ("score tokens --checkpoint dense --data digits --out s.safetensors", "nothing of it is kept, and the "
                                                                          "same command begins anew"),
    ("calibrate --checkpoint dense --data digits --plan p.json --out c", "the best model so far, where there "
                                                                         "is one, is in the run folder"),
    ("search --checkpoint dense --data digits --gmacs 1 --out s", "each policy that was measured, are kept, and the "
                                                                  "same command goes on"),
    ("tonight --checkpoint dense --data digits --out t",
     "scores, curves, offers and policies finished so far are kept"),
    ("finetune --checkpoint dense --data digits --out f", "the states written so far are kept, and the same command "
                                                          "goes on"),
])
def test_who_stops_a_command_is_told_what_of_it_is_kept(capsys, monkeypatch, tmp_path, stop, code, word, command, says):
    def stopped(*args, **settings):
        raise stop
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.json").write_text("{}")
    words = command.split()
    name = cli.launching.name_of(words, cli.COMMANDS)
    monkeypatch.setattr(cli.App, "parse_args", lambda *args, **settings: (stopped, Bound(), {}))
    got, out, err = run(capsys, *words)
    assert (got, out) == (code, "") and err.startswith(f"vitlab {name}: {word}; ") and says in err
    assert len(err.splitlines()) == 1


class Bound:
    args, kwargs = (), {}


if __name__ == "__main__":
    SURFACE.write_text(surface(), encoding="utf-8")
