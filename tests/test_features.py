"""Models without a classifier: distances, gradients and neighbours of features against slow oracles, and every step of
a study on them."""
import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from test_distillation import small_recipe
from training_fixtures import full_plan, images, logits, one_thread, tiny, token_plan  # noqa: F401

from vitlab import cli
from vitlab.measure.capture import token_scores
from vitlab.measure.distance import Classes, Features, Patches, Pixels, output_of, same_neighbours
from vitlab.measure.features import features_of, nearest_neighbours, zero_shot
from vitlab.measure.moments import fisher
from vitlab.measure.objective import PlanObjective
from vitlab.measure.units import unit_scores
from vitlab.models import checkpoint, compress, deploy, shape_of
from vitlab.models.checkpoint import Checkpoint
from vitlab.models.ends import as_projection
from vitlab.models.segmenter import Segmenter, as_encoder
from vitlab.plan import CompressionPlan
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError, read_lines
from vitlab.runtime.results import ResultRow, format_table, notes
from vitlab.training.distillation import make_task
from vitlab.training.self_distillation import Divergence, self_distil
from vitlab.workbench import calibrating, comparing, scoring, searching, steps, training
from vitlab.workbench.evaluating import Features as Asked
from vitlab.workbench.tonight import tonight

CPU = torch.device("cpu")
QUIET = RunConfig(workers=0, quiet=True, device="cpu")
# what a model gives: a class token, the mean of its patches, all its tokens, or a projection of the first
KINDS = {"token": {}, "avg": {"global_pool": "avg", "class_token": False}, "patches": {"global_pool": ""},
         "projected": {"num_classes": 7}}
each_kind = pytest.mark.parametrize("kind", KINDS)


def headless(kind: str = "token", seed: int = 0) -> torch.nn.Module:
    return as_projection(tiny(**{"num_classes": 0, "seed": seed, **KINDS[kind]})).eval()


def opened(kind: str = "token") -> Checkpoint:
    model = headless(kind)
    return Checkpoint(model=model, plan=CompressionPlan.empty(shape_of(model)), info={"classes": None, "made_by": {}})


def cosine(u: list[float], v: list[float]) -> float:
    return sum(a * b for a, b in zip(u, v)) / math.sqrt(sum(a * a for a in u) * sum(b * b for b in v))


def rows_of(model: torch.nn.Module, x: torch.Tensor) -> list[list[list[float]]]:
    """The features of each image, one vector or one for each patch, in float64."""
    given = logits(copy.deepcopy(model).double(), x.double())
    return (given[:, None] if given.dim() == 2 else given[:, model.num_prefix_tokens:]).tolist()


def mean_direction(rows: list[list[float]]) -> list[float]:
    units = [[a / math.sqrt(sum(b * b for b in row)) for a in row] for row in rows]
    return [sum(column) for column in zip(*units)]


def nearest(vectors: list[list[float]]) -> list[int]:
    return [max((j for j in range(len(vectors)) if j != i), key=lambda j, i=i: cosine(vectors[i], vectors[j]))
            for i in range(len(vectors))]


# ---------------------------------------------------------------- what a model gives, and how far it is

def test_what_a_model_gives_is_told_by_what_it_has():
    dense = tiny()
    found = [(Classes, dense), (Features, headless("avg")), (Patches, headless("patches")),
             (Features, headless("projected")), (Patches, tiny(global_pool="")),                # a head for each token
             (Pixels, Segmenter(as_encoder(dense), 5, "linear"))]
    for kind, model in found:
        assert type(output_of(model)) is type(output_of(shape_of(model))) is kind
    other = headless("projected")
    other.reset_classifier(5)
    assert type(output_of(other)) is Classes                    # another head is no projection
    dense.head = torch.nn.Identity()                            # its num_classes still says 3
    assert type(output_of(dense)) is type(output_of(compress(headless(), token_plan(headless())))) is Features


@each_kind
def test_measures_are_one_less_the_cosine_and_shared_neighbours_image_by_image(kind):
    model, x = headless(kind), images(7)
    plan = full_plan(model)
    cut = compress(model, plan)
    measures = PlanObjective(model, [(x[:4], torch.zeros(4)), (x[4:], torch.zeros(3))])(plan)
    dense, other = rows_of(model, x), rows_of(cut, x)
    apart = [sum(1 - cosine(u, v) for u, v in zip(a, b)) / len(a) for a, b in zip(dense, other)]
    same = [a == b for a, b in zip(*(nearest([mean_direction(rows) for rows in of]) for of in (dense, other)))]
    # float32 through two blocks
    assert measures["distill_loss"] == pytest.approx(sum(apart) / 7, rel=1e-4) and measures["value"] < -1e-3
    assert measures["agree_pct"] == pytest.approx(100 * sum(same) / 7) and 0 < sum(same) < 7
    assert set(measures) == {"value", "distill_loss", "distill_loss_se", "agree_pct", "agree_se"}
    spread = math.sqrt(sum((a - sum(apart) / 7) ** 2 for a in apart) / 6 / 7)
    assert measures["distill_loss_se"] == pytest.approx(spread, rel=1e-3)
    assert Divergence(model, [(x, None)]).each(deploy(cut)) == pytest.approx(apart, rel=1e-4)
    nothing = PlanObjective(model, [(x, torch.zeros(7))])(CompressionPlan.empty(shape_of(model)))
    assert (nothing["distill_loss"], nothing["agree_pct"]) == (0, 100)


def test_neighbours_that_are_as_near_are_the_same_and_one_image_has_none():
    u = torch.tensor([[1.0, 0, 0], [1, 0.1, 0], [1, 0.1, 0], [0, 1, 0.1], [0, 1, 0]])
    u = u / u.norm(dim=1, keepdim=True)
    assert same_neighbours(u[[0, 2, 1, 3, 4]], u).all()         # 1 and 2 are alike, and which is first is luck
    assert same_neighbours(u[[3, 1, 2, 0, 4]], u).tolist() == [False, True, True, False, False]
    with pytest.raises(InputError, match="nearest neighbours of 1 image; at least 2 are needed"):
        same_neighbours(u[:1], u[:1])


def test_a_metric_by_labels_is_refused_and_the_distance_named():
    model = headless()
    with pytest.raises(InputError, match="'top1_pct' is of another task; for this model 'distill_loss' is"):
        PlanObjective(model, [(images(), torch.zeros(5))], metric="top1_pct")


# ---------------------------------------------------------------- gradients

def test_squared_gradients_of_what_is_drawn_say_what_a_small_error_costs():
    # 1 - cos(f, f + e) = e^T (I - u u^T) e / (2 |f|^2), to second order
    f, count = torch.tensor([[1.0, -2.0, 0.5]]), 6000
    raw = f.repeat(count, 1).requires_grad_()
    Features().drawn(Features().compared(raw), torch.Generator().manual_seed(0)).backward()
    found = raw.grad.T @ raw.grad / count
    u = f / f.norm()
    wanted = (torch.eye(3) - u.T @ u) / f.norm() ** 2
    assert (found - wanted).abs().max() < 0.06 * wanted.abs().max()             # sqrt(2 / 6000) = 0.02, three times
    e = torch.tensor([[1e-2, 2e-2, -1e-2]])
    apart = Features().apart(Features().compared(f + e), Features().compared(f))
    assert float(apart) == pytest.approx(float(e @ wanted @ e.T) / 2, rel=3e-2)


@each_kind
def test_token_scores_are_how_the_drawn_features_move_with_a_patchs_values(kind):
    model, x = headless(kind).double(), images(3).double()
    scores = token_scores(model, [(x, torch.zeros(3))], progress=False)
    assert torch.equal(scores, token_scores(model, [(x, torch.tensor([2, 0, 1]))], progress=False))
    z = torch.randn(Features().compared(output_of(model).raw(model, x)).shape,
                    generator=torch.Generator().manual_seed(0)).double()
    for block, patch in ((0, 3), (1, 11)):
        attn, place, step = model.blocks[block].attn, model.num_prefix_tokens + patch, 1e-5

        def moved(by: float, attn=attn, place=place) -> torch.Tensor:
            def scale(module, inputs, qkv):
                qkv = qkv.clone()
                qkv[:, place, 2 * attn.attn_dim:] *= 1 + by
                return qkv
            handle = attn.qkv.register_forward_hook(scale)
            with torch.no_grad():
                raw = model(x)
            handle.remove()
            raw = raw if raw.dim() == 2 else raw[:, model.num_prefix_tokens:].mT
            return (raw / raw.norm(dim=1, keepdim=True) * z).flatten(1).sum(dim=1)
        slopes = (moved(step) - moved(-step)) / (2 * step)
        wanted = float(slopes.abs().mean()) / attn.num_heads / (model.num_prefix_tokens + 16)
        assert float(scores[block, patch]) == pytest.approx(wanted, rel=1e-6)


@each_kind
@pytest.mark.parametrize("criterion", ["hsic", "taylor", "fisher"])
def test_units_that_nothing_is_made_of_have_the_least_scores_whatever_the_labels(kind, criterion):
    model, x = headless(kind), images(6)
    with torch.no_grad():                       # one neuron and one head give nothing to what follows
        model.blocks[0].mlp.fc1.weight[5] = model.blocks[0].mlp.fc1.bias[5] = 0
        model.blocks[0].mlp.fc2.weight[:, 5] = 0
        model.blocks[0].attn.proj.weight[:, 8:16] = 0
    found = unit_scores(model, [(x, torch.zeros(6))], criterion=criterion, progress=False)
    again = unit_scores(model, [(x, torch.arange(6) % 3)], criterion=criterion, progress=False)
    assert torch.equal(found.heads, again.heads) and torch.equal(found.neurons, again.neurons)
    assert found.heads.isfinite().all() and found.neurons.isfinite().all()
    if criterion != "hsic":                     # which looks at what a unit is, not at what becomes of it
        assert int(found.heads[0].argmin()) == 1 and int(found.neurons[0].argmin()) == 5


@each_kind
def test_errors_cost_what_gradients_of_the_features_say(kind):
    model = headless(kind)
    costs = fisher(model, [(images(8), None)], progress=False)
    last = costs[1, "neurons"]
    assert last.metric.trace() > 0 and torch.equal(last.metric, last.metric.T)
    # behind the last block only the class token has a say, where that alone is read
    assert last.prefix_weight == (50 if kind in ("token", "projected") else 1)


# ---------------------------------------------------------------- trainings

@each_kind
def test_self_distillation_brings_the_features_nearer(kind, folder):
    teacher = headless(kind)
    model, data = compress(teacher, full_plan(teacher)), steps.open_data(folder)
    apart = Divergence(teacher, data.batches("train", teacher, limit=8, workers=0))
    log = self_distil(model, teacher, data, apart, steps=8, lr=1e-3, batch_size=8, workers=0, progress=False)
    assert log[-1]["distance"] < 0.95 * log[0]["distance"]
    assert apart(model) == pytest.approx(min(record["distance"] for record in log), rel=1e-5)


@each_kind
def test_the_loss_of_a_training_is_the_distance_to_the_teacher_and_labels_are_not_read(kind):
    student, teacher, x = headless(kind), headless(kind, seed=1), images(5)
    task = make_task(student, teacher, small_recipe(distill="soft", alpha=0.3, tau=5.0), CPU)
    losses = [float(task(x, targets)["loss"].detach()) for targets in (torch.zeros(5).long(), torch.arange(5))]
    wanted = [sum(1 - cosine(u, v) for u, v in zip(a, b)) / len(a)
              for a, b in zip(rows_of(student, x), rows_of(teacher, x))]
    assert losses[0] == losses[1] == pytest.approx(sum(wanted) / 5, rel=1e-4)


def test_features_are_learned_from_a_teacher_of_the_same_ones():
    student, recipe = headless(), small_recipe(distill="soft")
    for teacher, wrong in ((tiny(), "the teacher has 3 classes, the student 0"),
                           (headless("patches"), "gives 24 features, pooled by '', the student 24, pooled by 'token'"),
                           (tiny(0, embed_dim=36), "gives 36 features, pooled by 'token', the student 24")):
        with pytest.raises(InputError, match=wrong):
            make_task(student, teacher, recipe, CPU)
    make_task(student, headless("avg"), recipe, CPU)            # pooled features of as many dimensions
    with pytest.raises(InputError, match='distill \'none\'; the model has no classifier and learns the teacher\'s'):
        make_task(student, headless(), small_recipe(), CPU)


def test_fine_tuning_needs_a_teacher_and_no_labels(folder, tmp_path):
    found, more = opened(), {"recipe": small_recipe(distill="soft", epochs=2, batch_size=8, mixup=0.5), "config": QUIET}
    with pytest.raises(InputError, match="learns a teacher's features; the dense model is needed as teacher"):
        training.finetune(found, folder, tmp_path / "a", plan=token_plan(found.model), **more)
    run = training.finetune(found, folder, tmp_path / "a", plan=token_plan(found.model), teacher=opened(), **more)
    log = [row for row in read_lines(run / "training" / "log.jsonl") if "epoch" in row]
    assert log[-1]["train_slice_distill_loss"] < log[0]["train_slice_distill_loss"] < 1
    assert steps.open_model(run).model.num_classes == 0
    with pytest.raises(InputError, match="a model without a classifier is trained by a teacher's features"):
        training.pretrain(model="vit_nano_patch4_32", data="digits", out=tmp_path / "p", config=QUIET,
                          model_args={"num_classes": 0})


# ---------------------------------------------------------------- classes that features tell

def told_slowly(train: list, labels: list[int], one: list, k: int) -> int:
    votes: dict[int, float] = {}
    for u, label in sorted(zip(train, labels), key=lambda pair: -cosine(pair[0], one))[:k]:
        votes[label] = votes.get(label, 0.0) + math.exp(cosine(u, one) / 0.07)
    return max(votes, key=votes.get)


def test_classes_by_neighbours_and_by_embeddings_are_those_of_slow_loops():
    draws = torch.Generator().manual_seed(0)
    train, labels, given = torch.randn(40, 6, generator=draws), torch.arange(40) % 4, torch.randn(9, 6, generator=draws)
    tell = nearest_neighbours(train, labels, k=5)
    assert tell(given).tolist() == [told_slowly(train.tolist(), labels.tolist(), one, 5) for one in given.tolist()]
    with pytest.raises(InputError, match="41 nearest neighbours of 40 images"):
        nearest_neighbours(train, labels, k=41)
    classes = torch.randn(4, 6, generator=draws) * torch.tensor([[9.0], [1.0], [0.1], [3.0]])
    wanted = [max(range(4), key=lambda c, one=one: cosine(one, classes[c].tolist())) for one in given.tolist()]
    assert zero_shot(classes)(given).tolist() == wanted and len(set(wanted)) > 1
    with pytest.raises(InputError, match="embeddings are 6 wide, the model's 5"):
        zero_shot(classes)(given[:, :5])


@each_kind
def test_features_are_pooled_and_of_a_classifier_what_goes_into_it(kind):
    model, x = headless(kind), images(5)
    vectors, targets, *_ = features_of(model, [(x[:3], torch.arange(3)), (x[3:], torch.arange(2))], progress=False)
    wanted = torch.tensor([mean_direction(rows) for rows in rows_of(model, x)])
    torch.testing.assert_close(vectors, wanted / wanted.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-4,
                               check_dtype=False)
    assert targets.tolist() == [0, 1, 2, 0, 1]
    if kind == "token":
        whole = copy.deepcopy(model)
        whole.reset_classifier(3)
        assert torch.equal(features_of(whole, [(x, targets)], progress=False)[0], vectors)


# ---------------------------------------------------------------- steps

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 digits as pictures, without labels."""
    root = tmp_path_factory.mktemp("pictures")
    for number, pixels in enumerate(load_digits().images[:48]):
        Image.fromarray(np.uint8(pixels * 15).repeat(4, 0).repeat(4, 1)).convert("RGB").save(root / f"{number}.png")
    return root


@pytest.mark.parametrize("kind", ["projected", "patches"])
def test_every_step_takes_a_model_without_a_classifier_and_images_without_labels(kind, folder, tmp_path):
    found, few = opened(kind), {"config": QUIET}
    scores = scoring.score_tokens(found, folder, tmp_path / "s.safetensors", images=8, **few)
    assert scores.shape == (2, 16) and (scores > 0).all()
    scoring.score_units(found, folder, tmp_path / "u.safetensors", images=8, criterion="taylor", **few)
    study = searching.search(found, folder, tmp_path / "study", macs_ratio=0.8, evaluations=3, population=2, images=6,
                             criterion="taylor", tokens="match", score_images=8, **few)
    plan = CompressionPlan.load(tmp_path / "study" / "plan.json")
    name = "mean 1 - cosine of patch tokens" if kind == "patches" else "1 - cosine of pooled features"
    assert name in plan.made_by["distance"] and 0 < -study.best.value < 1
    made = calibrating.calibrate(found, folder, tmp_path / "c", plan, images=14, minutes=0.002, **few)
    said = calibrating.distances(made.info["made_by"])
    assert name in said and "nats" not in said
    row = steps.evaluate(made, folder, dense=found, split="train", **few)
    assert row.top1_pct is row.loss is None and 0 < row.distill_loss < 1
    assert name in row.conditions["distance"] and 0 <= row.conditions["agree_pct"] <= 100
    rows = comparing.sensitivity(found, folder, tmp_path / "cuts", criteria=("taylor",), images=6, score_images=8,
                                 **few)
    assert {row["dimension"] for row in rows} == {"heads", "neurons", "tokens"}


def test_tonight_makes_a_model_without_a_classifier_smaller(folder, tmp_path):
    ready = tonight(opened("patches"), folder, tmp_path, macs_ratio=0.8, rules=("merging by content", "all together"),
                    ratios=(0.8,), evaluations=2, finalists=1, images=8, report_images=8, score_images=16, config=QUIET)
    offers = read_lines(tmp_path / "offers.jsonl")
    assert offers and all(0 < row["distill_loss"] < 1 and row["agree_pct"] <= 100 for row in offers)
    assert "cosine" in ready.info["made_by"]["distance"] and (tmp_path / "offers.png").is_file()


def test_select_is_refused_where_every_patch_counts(folder, tmp_path):
    for more in ({"tokens": "select"}, {"tokens": "match", "read_out": True}):
        with pytest.raises(InputError, match="a model that pools nothing needs the whole grid"):
            searching.search(opened("patches"), folder, tmp_path / "study", macs_ratio=0.8, config=QUIET, **more)


def test_evaluation_asks_what_a_model_without_a_classifier_is_to_be_measured_by(tmp_path):
    found, few = opened(), {"config": QUIET, "images": 40}
    with pytest.raises(InputError, match="no classifier; the model it was made from .dense. says how far"):
        steps.evaluate(found, "digits", **few)
    row = steps.evaluate(found, "digits", features=Asked(knn=True), **few)
    # random weights tell more than luck, which is 10
    assert row.top1_pct > 30 and row.top1_se > 0 and row.distill_loss is None
    assert row.conditions["top1"].startswith("20 nearest neighbours among 1437 images of train")
    features, labels, *_ = features_of(found.model, steps.open_data("digits").batches("train", found.model, workers=0),
                                       progress=False)
    means = torch.stack([features[labels == c].mean(dim=0) for c in range(10)])
    save_file({"classes": means}, tmp_path / "classes.safetensors")
    by_means = steps.evaluate(found, "digits", features=Asked(classes=tmp_path / "classes.safetensors"), **few)
    assert 30 < by_means.top1_pct < 100 and "zero-shot" in by_means.conditions["top1"]
    # a projection to the width of embeddings is a head, and no classifier
    tower = Checkpoint(model=tiny(24), plan=found.plan, info={"classes": None, "made_by": {}})
    tower.model.load_state_dict({**found.model.state_dict(), "head.weight": 2 * torch.eye(24),
                                 "head.bias": torch.zeros(24)})
    projected = steps.evaluate(tower, "digits", features=Asked(classes=tmp_path / "classes.safetensors"), **few)
    assert projected.top1_pct == by_means.top1_pct and tower.model.num_classes == 24
    for tensors, wrong in (({"a": means, "b": means + 1}, "holds 2 tensors; one of floats"),
                           ({"a": means[:9].clone()}, "embeddings of 9 classes; digits has 10"),
                           ({"a": means[:, :7].clone()}, "embeddings are 7 wide, the model's 24")):
        save_file(tensors, tmp_path / "wrong.safetensors")
        with pytest.raises(InputError, match=wrong):
            steps.evaluate(found, "digits", features=Asked(classes=tmp_path / "wrong.safetensors"), **few)
    with pytest.raises(InputError, match="both give a top-1"):
        steps.evaluate(found, "digits", features=Asked(knn=True, classes=tmp_path / "classes.safetensors"), **few)


def test_the_command_gives_top1_by_neighbours(tmp_path, capsys):
    path = str(checkpoint.save(tmp_path / "m", headless(), CompressionPlan.empty(shape_of(headless()))))
    code = cli.main(["evaluate", "--checkpoint", path, "--dense", path, "--data", "digits", "--knn", "--neighbours",
                     "5", "--images", "40", "--quiet", "--device", "cpu", "--out", str(tmp_path)])
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert code == 0 and row["top1_pct"] > 30 and row["distill_loss"] == 0 and row["conditions"]["agree_pct"] == 100
    said = capsys.readouterr().out
    assert "top1_pct: 5 nearest neighbours among 1437 images of train" in said
    assert "distill_loss: 1 - cosine of pooled features" in said and "agree_pct 100.00 ± " in said


def test_tables_and_differences_are_of_the_distance_where_there_is_no_top1():
    near, far = (ResultRow(model=name, distill_loss=value, distill_loss_se=0.01, gmacs=1.0)
                 for name, value in (("near", 0.1), ("far", 0.3)))
    head, _, *lines = format_table([near, far]).splitlines()
    assert head.split()[:3] == ["model", "distill_loss", "gmacs"] and "0.1000 ± 0.0100" in lines[0]
    assert comparing.difference(near, far) == "-0.2000 ± 0.0141 of distance"
    told = ResultRow(model="dense", top1_pct=50.0, gmacs=2.0)
    assert format_table([told, near]).split()[:4] == ["model", "top1_pct", "distill_loss", "gmacs"]
    assert "distill_loss" not in format_table([dataclasses.replace(near, top1_pct=40.0), told])
    assert comparing.difference(near, told) == "nothing that both have"
    told, near = (dataclasses.replace(row, conditions={"distance": "1 - cosine", key: words}) for row, key, words in (
        (told, "top1", "20 nearest neighbours"), (near, "limit", "none")))
    assert notes([told, near]).splitlines()[1:] == ["top1_pct: 20 nearest neighbours", "distill_loss: 1 - cosine"]
    assert notes([told]) == "top1_pct: 20 nearest neighbours"
