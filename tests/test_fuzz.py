"""Anything at all in the place of a file or an argument: what comes back is whole, or an InputError in one line;
nothing else."""
import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from vitlab import cli
from vitlab.data.folder import read_class_map, read_image
from vitlab.data.source import Images
from vitlab.models import checkpoint, compress, shape_of
from vitlab.models.create import create_model
from vitlab.models.weights import read_state
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import Match, MergeReconstruct, Select, SharedUpdate
from vitlab.runtime.files import InputError, append_line, read_lines
from vitlab.runtime.results import ResultRow, append_row, read_rows
from vitlab.search.study import Evaluation, read_journal
from vitlab.workbench import batch_file, report

# Derandomised: the same cases every time, so that a failure is a failure for all. No deadline for one case on a busy
# machine; the
# number of cases bounds the time.
bounded = settings(max_examples=150, deadline=None, derandomize=True, database=None,
                   suppress_health_check=list(HealthCheck))
few = settings(bounded, max_examples=40)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70)
    | st.sampled_from([10 ** 400, -1, 0.5, float("nan"), float("inf"), 1e308])
    | st.floats(-2, 2)
    | st.sampled_from(["", "..", "match", "select", "merge_reconstruct", "token", "\0", "\udcff", "../x"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["kind", "kept", "heads", "x"]), inner, max_size=3),
    max_leaves=6)


def places(data: Any, way: tuple = ()) -> list[tuple]:
    """The ways to every value in parsed JSON."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [way, *(found for key, value in inner for found in places(value, (*way, key)))]


@st.composite
def damaged(draw: st.DrawFn, data: Any) -> Any:
    """Parsed JSON with one to three values replaced, removed or exchanged."""
    data = json.loads(json.dumps(data))
    for _ in range(draw(st.integers(1, 3))):
        way = draw(st.sampled_from(places(data)))
        if not way:
            continue
        place = data
        for key in way[:-1]:
            place = place[key]
        if draw(st.booleans()):
            place[way[-1]] = draw(json_values)
        else:
            del place[way[-1]]
    return data


@st.composite
def bitten(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with some bytes changed, cut out, put in, or its end missing."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        kind, some = draw(st.sampled_from(["change", "cut", "insert", "end"])), draw(st.binary(min_size=1, max_size=8))
        if kind == "change":
            content[at:at + len(some)] = some
        elif kind == "insert":
            content[at:at] = some
        else:
            del content[at:at + len(some) if kind == "cut" else len(content)]
    return bytes(content)


@contextlib.contextmanager
def refused():
    """What is refused is refused in words of a bounded length."""
    try:
        yield
    except InputError as error:
        assert 10 < len(cli.one_line(str(error))) < 3000


# ---- Plans

MODEL = create_model("vit_nano_patch4_32", depth=4, embed_dim=8, num_heads=2, img_size=16)
SHAPE = shape_of(MODEL)
HALF = tuple(j // 2 for j in range(16))
PLANS = [CompressionPlan(shape=SHAPE, blocks=tuple(map(block, rules))) for block in (
    lambda rule: BlockPlan(heads=(0,), neurons=(1, 5), tokens=rule),) for rules in (
    (MergeReconstruct(regions=(-1, *HALF[:-1]), weights=(0.0, *[0.5] * 15), pruned=(0,)), None, Select(kept=9), None),
    (MergeReconstruct(regions=(-1, *HALF[:-1]), weights=(0.0, *[0.5] * 15), pruned=(0,), span=3), None, None, None),
    (SharedUpdate(regions=HALF, weights=(0.5,) * 16), Match(merged=3), Match(merged=0), Match(merged=2)))]
PLAN_DATA = [json.loads(plan.to_json()) for plan in PLANS]


@bounded
@given(data=st.one_of(*map(damaged, PLAN_DATA)))
def test_a_damaged_plan_is_refused_or_a_plan_that_can_be_saved_read_and_applied(data):
    with refused():
        plan = CompressionPlan.from_json(json.loads(json.dumps(data)))
        assert CompressionPlan.from_json(json.loads(plan.to_json())).blocks == plan.blocks
        plan.check_fits(SHAPE)
        with torch.inference_mode():
            assert compress(MODEL, plan)(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


@bounded
@given(content=bitten(PLANS[0].to_json().encode()) | st.binary(max_size=60))
def test_a_bitten_plan_file_is_refused_or_read(content):
    with tempfile.TemporaryDirectory() as folder, refused():
        path = Path(folder, "plan.json")
        path.write_bytes(content)
        assert isinstance(CompressionPlan.load(path), CompressionPlan)


# ---- Checkpoints and weights

@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    small = compress(MODEL, PLANS[0])
    checkpoint.save(folder / "checkpoint", small, PLANS[0], classes=[str(d) for d in range(10)])
    torch.save({"model": MODEL.state_dict()}, folder / "w.pth")
    return folder


@few
@given(choice=st.data())
def test_a_damaged_checkpoint_is_refused_or_a_model_that_computes(saved, choice):
    name = choice.draw(st.sampled_from([checkpoint.WEIGHTS, checkpoint.PLAN, checkpoint.INFO]))
    content = (saved / "checkpoint" / name).read_bytes()
    # Not sizes of the model: a large one that fits its weights takes time. test_faults has those.
    data = json.loads(content) if name == checkpoint.INFO else None
    made = choice.draw(damaged(data["config"]).map(lambda c: json.dumps({**data, "config": c}).encode()) if data
                       else bitten(content))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(saved / "checkpoint", f"{folder}/c")
        Path(folder, "c", name).write_bytes(made)
        with refused(), torch.inference_mode():
            found = checkpoint.load(f"{folder}/c")
            assert found.model(torch.zeros(1, 3, 16, 16)).shape == (1, 10)
        assert Path(folder, "c", name).read_bytes() == made


@bounded
@given(choice=st.data())
def test_bitten_weights_are_refused_or_tensors(saved, choice):
    source = choice.draw(st.sampled_from([saved / "w.pth", saved / "checkpoint" / checkpoint.WEIGHTS]))
    with tempfile.TemporaryDirectory() as folder, refused():
        path = Path(folder, f"w{source.suffix}")
        path.write_bytes(choice.draw(bitten(source.read_bytes()) | st.binary(max_size=99)))
        assert all(isinstance(value, torch.Tensor) for value in read_state(path).values())


# ---- Journals, results, summaries

EVALUATIONS = [Evaluation(index=i, policy=(0.1, 0.2), value=0.5, cost=0.3, by="gp", measures={"top1_pct": 3.0}).__dict__
               for i in range(3)]


@bounded
@given(records=damaged(EVALUATIONS), end=st.sampled_from(["", "\n", "{", "\n\n"]), repair=st.booleans())
def test_a_damaged_journal_is_refused_or_its_first_evaluations(records, end, repair):
    assume(isinstance(records, list))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr("warnings.warn", lambda *a, **k: None)
        path = Path(folder, "journal.jsonl")
        content = "\n".join(map(json.dumps, records)) + end
        path.write_text(content)
        with refused():
            found = read_journal(folder, repair=repair)
            assert [e.index for e in found] == list(range(len(found))) and len(found) <= len(records)
            assert all(np.isfinite([e.value, e.cost, *e.policy]).all() for e in found)
            # none is lost
            assert [json.loads(line) for line in path.read_text().splitlines()[:len(found)]] == records[:len(found)]
            return
        assert path.read_text() == content


@bounded
@given(content=bitten(b"".join(json.dumps(e).encode() + b"\n" for e in EVALUATIONS)) | st.binary(max_size=60)
       | st.sampled_from([b"[" * 100_000, b"1" * 5000 + b"\n{}\n"]))             # beyond Python's limits
def test_a_file_of_lines_gives_its_whole_lines_and_takes_another(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lines.jsonl")
        path.write_bytes(content)
        before = read_lines(path)
        append_line(path, {"last": 1})
        assert read_lines(path) == before + [{"last": 1}] and path.read_bytes().startswith(content)


ROW = {"model": "a", "dataset": "b", "split": "c", "top1_pct": 3.0, "gmacs": 1.0,
       "conditions": {"seed": 0, "plan": {"x": [1]}}}


@bounded
@given(rows=damaged([ROW, ROW]))
def test_damaged_results_are_refused_or_make_a_table(rows):
    assume(isinstance(rows, list))
    with tempfile.TemporaryDirectory() as folder, refused():
        Path(folder, "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = read_rows(Path(folder, "results.jsonl"))
        assert all(isinstance(row, ResultRow) for row in found)
        report.results_table(folder)
        report.write_tables(folder)


SUMMARY = {"file": "b", "counts": {},
           "entries": [{"name": "w", "notebook": "n.ipynb", "state": "done", "seconds": 1.0, "why": None}]}


@bounded
@given(summary=damaged(SUMMARY), status=damaged({"state": "done", "inherited": 0}))
def test_a_damaged_summary_is_refused_or_makes_a_page(summary, status):
    with tempfile.TemporaryDirectory() as folder, refused():
        Path(folder, "summary.json").write_text(json.dumps(summary))
        append_row(Path(folder, "entries", "w", "results.jsonl"), ResultRow(model="a"))
        Path(folder, "entries", "w", "status.json").write_text(json.dumps(status))
        for entry in report.entries_of(folder):
            assert entry["folder"].resolve().is_relative_to(Path(folder, "entries").resolve())
        report.summary_table(folder)
        report.results_table(folder)


# ---- Batch files

BATCH = b"""defaults: {seed: 1}
entries:
  a: {notebook: 01_baseline, parameters: {data: "x"}, grid: {seed: [1, 2], kind: {s: {quick: true}, l: {quick: false}}}}
  b: {notebook: 90_results, after: a, parameters: {quick: true}}
  c: {notebook: 02_token_scores, after_all: [a, b], parameters: {checkpoint: "{a}/x"}}
"""


@bounded
@given(content=bitten(BATCH) | st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode(errors="replace")))
def test_a_bitten_batch_file_is_refused_or_entries_with_names_that_stay_inside(content):
    with tempfile.TemporaryDirectory() as folder, refused():
        Path(folder, "b.yaml").write_bytes(content)
        for entry in batch_file.read(f"{folder}/b.yaml"):
            assert Path(folder, entry.name).resolve().parent == Path(folder).resolve() and entry.notebook.is_file()


@bounded
@given(name=st.text(max_size=9) | st.text("./\\~:\0ab-=", max_size=9))
def test_any_text_as_a_name_is_refused_or_stays_inside(name):
    with tempfile.TemporaryDirectory() as folder, refused():
        data = {"entries": {name: {"notebook": "90_results", "grid": {"quick": {name: {"quick": True}}}}}}
        Path(folder, "b.yaml").write_text(json.dumps(data))
        entry, = batch_file.read(f"{folder}/b.yaml")
        assert Path(folder, entry.name).resolve().parent == Path(folder).resolve() and name in entry.name


# ---- Images and class maps

def encodings() -> list[bytes]:
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("png", "jpeg", "gif", "webp", "tiff", "bmp"):
            pixels.save(f"{folder}/i.{kind}")
        return [Path(folder, f"i.{kind}").read_bytes() for kind in ("png", "jpeg", "gif", "webp", "tiff", "bmp")]


class One:
    def __init__(self, path: str) -> None:
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> tuple[str, int]:
        return self.path, 3


@bounded
@given(content=st.one_of(*map(bitten, encodings())) | st.binary(max_size=99))
def test_a_bitten_image_is_an_image_or_flagged(content):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr("warnings.warn", lambda *a, **k: None)
        path = f"{folder}/i.jpg"
        Path(path).write_bytes(content)
        images = Images(One(path))
        images.transform = lambda image: image
        image, target = images[0]
        assert image.mode == "RGB" and target in (3, -1)
        if target == 3:
            assert read_image(path).size == image.size


@bounded
@given(data=damaged({"ant": 0, "bee": 1}) | json_values)
def test_a_class_map_is_refused_or_numbers_from_zero(data):
    with tempfile.TemporaryDirectory() as folder, refused():
        Path(folder, "class_index.json").write_text(json.dumps(data))
        numbers = read_class_map(Path(folder, "class_index.json"))
        assert numbers and all(type(n) is int and n >= 0
                               for n in numbers.values()) and len(set(numbers.values())) == len(numbers)


# ---- The command line

WORDS = ["prune", "evaluate", "score", "search", "batch", "report", "--checkpoint", "--plan", "--out", "--data",
         "--ratio", "match", "tokens", "--scores", "--gmacs", "--model", "--set", "--dry-run", "--seed",
         "--images", "--num-classes"]
VALUES = ["nowhere", "out", "..", ".", "/dev/null", "plan.json", "0", "-1", "nan", "1e999", "x" * 300, "", "\0",
          "\udcff", "a\nb", "\x1b[2J", "--", "-", "a=b", "=", "a.b=1", "checkpoint", "digits", "checkpoint/plan.json",
          "é", "~", "C:\\x", "%s", "{a}"]


@bounded
@given(argv=st.lists(st.sampled_from(WORDS) | st.sampled_from(VALUES) | st.text(max_size=5), max_size=8).map(
    lambda argv: [argv[0] if argv and argv[0] in WORDS[:6] else "prune", *argv[1:]]))
def test_any_arguments_end_in_an_exit_code_and_one_line(saved, argv):
    assume("--help" not in argv and "-h" not in argv and not any(word.startswith("-h") for word in argv))
    assume("digits" not in argv)                                # what is right then starts to work
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        shutil.copytree(saved / "checkpoint", "checkpoint")
        said: list[str] = []
        patched.setattr("sys.stderr.write", said.append)
        try:
            code = cli.main(argv)
        except SystemExit as stop:
            code = stop.code
        lines = "".join(said).splitlines()
        assert code in (0, 2)
        assert code == 0 or lines and lines[-1].startswith("vitlab") and "Traceback" not in lines[-1]
