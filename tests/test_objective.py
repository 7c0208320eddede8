"""The objective of a search against a slow oracle: every image alone through the compressed model, sums in plain
Python."""
import copy
import math

import pytest
import torch
from segmenting_fixtures import CLASSES, batches, masks, match_plan, pictures, small, units_plan
from training_fixtures import token_plan

from vitlab.measure.objective import METRICS, PlanObjective
from vitlab.measure.pixels import evaluate_scenes
from vitlab.models import compress, deploy, shape_of
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import Match, MergeReconstruct, ReadOut
from vitlab.runtime.files import InputError

COUNT = 11


@pytest.fixture
def sample(tiny_vit, images):
    """sample(family): a model and batches of 5, 5 and 1 images whose targets are partly what the model says."""
    def make(family: str) -> tuple[torch.nn.Module, list]:
        model = tiny_vit(family)
        x = images(model, COUNT)
        with torch.no_grad():
            said = model(x).argmax(dim=1)
        # 7 of 11 right: 0, 3, 6, 9 are not
        targets = torch.where(torch.arange(COUNT) % 3 == 0, (said + 1) % 7, said)
        return model, [(x[i:i + 5], targets[i:i + 5]) for i in range(0, COUNT, 5)]
    return make


@pytest.mark.parametrize("segmenter", [False, True])
def test_of_images_without_labels_nothing_is_said_that_needs_them(sample, segmenter):
    if segmenter:
        model = small()
        given, plan = [(pictures(3), torch.zeros_like(masks(3)))], units_plan(model)
    else:
        model, given = sample("deit")
        plan = CompressionPlan.empty(shape_of(model))
    found = PlanObjective(model, given, labelled=False)(plan)
    assert found.keys() == {"value", "distill_loss", "distill_loss_se", "agree_pct", "agree_se"}
    whole = PlanObjective(model, given)(plan)
    assert found == {name: whole[name] for name in found}
    with pytest.raises(InputError, match="'(top1|miou)_pct' needs labels"):
        PlanObjective(model, given, metric="miou_pct" if segmenter else "top1_pct", labelled=False)


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(v - max(logits)) for v in logits)
    return [math.exp(v - max(logits)) / total for v in logits]


def slow_error(values: list[float]) -> float:
    """Standard error of a mean."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def slow_share(count: int, n: int) -> float:
    p = (count + 2) / (n + 4)
    return 100 * math.sqrt(p * (1 - p) / (n + 4))


def slow(model: torch.nn.Module, plan: CompressionPlan, batches: list) -> dict[str, float]:
    """The training form, which is not deployed, one image at a time in float64."""
    dense, cut = copy.deepcopy(model).double(), compress(model, plan).double().eval()
    right, same, losses, distances, count = 0, 0, [], [], 0
    for x, targets in batches:
        for image, target in zip(x, targets.tolist()):
            with torch.no_grad():
                p, q = (softmax(m(image[None].double())[0].tolist()) for m in (dense, cut))
            right += q.index(max(q)) == target
            same += q.index(max(q)) == p.index(max(p))
            losses.append(-math.log(q[target]))
            distances.append(sum(a * math.log(a / b) for a, b in zip(p, q)))            # KL(dense || cut)
            count += 1
    return {"top1_pct": 100 * right / count, "loss": sum(losses) / count, "distill_loss": sum(distances) / count,
            "agree_pct": 100 * same / count, "top1_se": slow_share(right, count), "loss_se": slow_error(losses),
            "distill_loss_se": slow_error(distances), "agree_se": slow_share(same, count)}


@pytest.mark.parametrize("layout", ["-mm--", "--s--", "-----", "mm-s-"])
@pytest.mark.parametrize("family", ["deit", "dinov2_reg"])
def test_measures_are_those_of_every_image_alone(sample, random_plan, family, layout):
    model, batches = sample(family)
    plan = random_plan(shape_of(model), layout, seed=3)
    wanted = slow(model, plan, batches)
    for metric, sign in (("top1_pct", 1), ("distill_loss", -1)):
        given = PlanObjective(model, batches, metric=metric)(plan)
        assert set(given) == {"value", *wanted} and all(type(v) is float for v in given.values())
        # float32 logits of about 3, through five blocks of unit gain: 1e-5; classes are further apart than that.
        assert {k: given[k] for k in wanted} == pytest.approx(wanted, abs=1e-4, rel=1e-4)
        assert given["value"] == sign * given[metric]
    assert wanted["distill_loss"] > 0.01


@pytest.mark.parametrize("family", ["deit", "distilled", "qk_norm"])
def test_the_empty_plan_has_no_distance_and_the_top1_of_the_dense_model(sample, family):
    model, batches = sample(family)
    given = PlanObjective(model, batches, metric="distill_loss")(CompressionPlan.empty(shape_of(model)))
    assert given["distill_loss"] == 0 and given["value"] == 0               # the very same logits
    assert given["top1_pct"] == pytest.approx(100 * 7 / 11)                 # as the targets were made


def test_the_distance_is_the_metric_unless_another_is_asked_for(sample, random_plan):
    model, batches = sample("deit")
    assert METRICS == ("top1_pct", "miou_pct", "distill_loss")
    plan = random_plan(shape_of(model), "--s--", seed=3)
    given = PlanObjective(model, batches)(plan)
    assert given["value"] == -given["distill_loss"] < 0
    given = PlanObjective(model, batches, metric="top1_pct")(CompressionPlan.empty(shape_of(model)))
    assert given["value"] == given["top1_pct"] == pytest.approx(100 * 7 / 11)
    with pytest.raises(InputError, match="metric 'loss' .*top1_pct.*distill_loss"):
        PlanObjective(model, batches, metric="loss")


def test_batches_weigh_by_their_images(sample, random_plan):
    model, batches = sample("deit")
    plan = random_plan(shape_of(model), "-m-s-", seed=5)
    x, targets = (torch.cat(parts) for parts in zip(*batches))
    whole, apart = (PlanObjective(model, given)(plan) for given in ([(x, targets)], batches))
    assert whole == pytest.approx(apart, rel=1e-5)                          # float32 sums in another order
    objective = PlanObjective(model, batches)
    assert objective.images == COUNT


def test_the_same_on_other_images_is_an_objective_of_its_own(sample, random_plan):
    model, batches = sample("deit")
    plan, objective = random_plan(shape_of(model), "--s--", seed=3), PlanObjective(model, batches[:2])
    before = objective(plan)
    other = objective.on(batches[2:])
    assert (objective.images, other.images) == (10, 1) and objective(plan) == before
    alone = PlanObjective(model, batches[2:])(plan)
    # of one image no spread is known
    assert other(plan) == alone and "distill_loss_se" not in alone and "top1_se" in alone


@pytest.mark.parametrize("targets", [torch.rand(5, 7), torch.randint(0, 2, (5, 7)), torch.rand(5)])
def test_targets_of_several_labels_an_image_are_refused(sample, targets):
    model, batches = sample("deit")
    with pytest.raises(InputError, match="targets are .*one class number an image.*several labels an image are not"):
        PlanObjective(model, [(batches[0][0], targets)])


@pytest.mark.parametrize("rule", ["neurons", "merge_reconstruct", "match", "read_out"])
def test_from_the_first_block_that_is_cut_on_it_is_the_same_as_from_the_images(sample, family, rule):
    if rule == "read_out" and family == "mae":
        rule = "neurons"                                    # it pools its patches, and nothing can be read out
    model, batches = sample(family)
    shape, objective = shape_of(model), PlanObjective(model, batches)
    cuts = {"neurons": BlockPlan(neurons=(0, 2, 3)), "match": BlockPlan(tokens=Match(merged=3, protect=0.0)),
            "read_out": BlockPlan(tokens=ReadOut()), "merge_reconstruct": BlockPlan(tokens=MergeReconstruct(
                regions=tuple(j // 2 for j in range(shape.num_patches)), weights=(0.5,) * shape.num_patches))}
    after = BlockPlan(tokens=Match(merged=0, protect=0.0)) if rule == "match" else BlockPlan()
    # onwards, back, and from the images again
    for first in (4,) if rule == "read_out" else (1, 3, 4, 2, 0, 3):
        plan = CompressionPlan(shape=shape, blocks=(*[BlockPlan()] * first, cuts[rule], *[after] * (4 - first)))
        assert objective(plan) == objective.measure(deploy(compress(model, plan)))


def test_a_hook_on_the_whole_model_is_heard_whichever_block_is_cut(sample):
    model, batches = sample("deit")
    plan = CompressionPlan(shape=shape_of(model), blocks=(*[BlockPlan()] * 3, BlockPlan(neurons=(0, 2)), BlockPlan()))
    plain = PlanObjective(model, batches)(plan)
    model.register_forward_pre_hook(lambda module, given: (given[0].flip(3),))
    turned = PlanObjective(model, batches)(plan)
    assert turned["distill_loss"] == PlanObjective(model,
                                                   batches).measure(deploy(compress(model, plan)))["distill_loss"]
    assert turned["distill_loss"] != plain["distill_loss"]


def test_cuts_that_are_measured_block_after_block_run_what_comes_before_once(sample):
    model, batches = sample("deit")
    objective, runs = PlanObjective(model, batches), []
    for index, block in enumerate(objective.dense.blocks):
        block.register_forward_pre_hook(lambda module, given, index=index,
                                        own=block: runs.append(index) if module is own else None)
    for index in (1, 1, 3, 3, 4):
        blocks = (BlockPlan(neurons=(0, 2)) if i == index else BlockPlan() for i in range(5))
        objective(CompressionPlan(shape=shape_of(model), blocks=tuple(blocks)))
    assert sorted(runs) == [index for index in range(4) for _ in batches]


def test_the_dense_model_and_the_order_of_plans_leave_no_trace(sample, random_plan):
    model, batches = sample("deit")
    model.train()
    before = copy.deepcopy(model.state_dict())
    modules = [type(m) for m in model.modules()]
    objective = PlanObjective(model, batches, metric="distill_loss")
    plans = [random_plan(shape_of(model), layout, seed=7)
             for layout in ("-mm--", "--s--")] + [CompressionPlan.empty(shape_of(model))]
    first = [objective(plan) for plan in plans]
    assert [objective(plan) for plan in reversed(plans)] == first[::-1]
    assert model.training and [type(m) for m in model.modules()] == modules
    assert all(torch.equal(value, before[name]) for name,
               value in model.state_dict().items()) and set(before) == set(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            # what is done to the model later has no part in it
            parameter.zero_()
    assert [objective(plan) for plan in plans] == first


def test_batches_may_be_read_once_only(sample, random_plan):
    model, batches = sample("deit")
    plan = random_plan(shape_of(model), "--s--", seed=9)
    objective = PlanObjective(model, iter(batches))
    assert objective(plan) == objective(plan) == PlanObjective(model, batches)(plan)


def test_compressed_models_and_other_plans_and_no_images_are_refused(sample, random_plan):
    model, batches = sample("deit")
    for layout, shrink in (("-mm--", False), ("-----", True)):
        cut = compress(model, random_plan(shape_of(model), layout, seed=1, shrink=shrink))
        with pytest.raises(InputError, match="already compressed; the dense one is needed"):
            PlanObjective(cut, batches)
    with pytest.raises(InputError, match="no image"):
        PlanObjective(model, [])
    other, _ = sample("distilled")
    with pytest.raises(InputError, match="the plan is for another model"):
        PlanObjective(model, batches)(CompressionPlan.empty(shape_of(other)))


def test_batches_without_images_are_refused(sample):
    model, batches = sample("deit")
    with pytest.raises(InputError, match="no image"):
        PlanObjective(model, [(batches[0][0][:0], batches[0][1][:0])])(CompressionPlan.empty(shape_of(model)))


# ---------------------------------------------------------------- a class for each pixel

def slow_pixels(model, plan: CompressionPlan, found: list) -> dict[str, float]:
    """The training form image by image in float64: KL of each patch, everything else of each pixel."""
    dense, cut = copy.deepcopy(model).double(), compress(model, plan).double().eval()
    tables, losses, counted, distances, agreeing, pixels = [], [], [], [], [], 0
    for x, y in [(images[i:i + 1].double(), targets[i]) for images, targets in found for i in range(len(images))]:
        with torch.no_grad():
            patches = [m.patch_logits(x)[0].flatten(1).T.tolist() for m in (dense, cut)]
            chosen = [m(x)[0].flatten(1).T.tolist() for m in (dense, cut)]
        kl = 0.0
        for p, q in zip(*(map(softmax, rows) for rows in patches)):
            kl += sum(a * math.log(a / b) for a, b in zip(p, q))
        counts, loss, same = [[0] * CLASSES for _ in range(CLASSES)], 0.0, 0
        for p, q, truth in zip(*chosen, y.flatten().tolist()):
            first, own, pixels = p.index(max(p)), q.index(max(q)), pixels + 1
            same += own == first
            if truth != 255:
                counts[truth][own] += 1
                loss -= math.log(softmax(q)[truth])
        for into, value in ((tables, counts), (losses, loss), (counted, sum(map(sum, counts))),
                            (distances, kl / len(patches[0])), (agreeing, same)):
            into.append(value)

    def miou(tables: list) -> float:
        counts = [[sum(table[c][k] for table in tables) for k in range(CLASSES)] for c in range(CLASSES)]
        unions = [sum(counts[c]) + sum(row[c] for row in counts) - counts[c][c] for c in range(CLASSES)]
        iou = [100 * counts[c][c] / union for c, union in enumerate(unions) if union]
        return sum(iou) / len(iou)
    # fewer than 20 images: a group each
    n, mean = len(tables), sum(losses) / sum(counted)
    without = [miou(tables[:i] + tables[i + 1:]) for i in range(n)]
    return {"miou_pct": miou(tables), "loss": mean, "distill_loss": sum(distances) / n,
            "agree_pct": 100 * sum(agreeing) / pixels,
            "miou_se": math.sqrt((n - 1) / n * sum((v - sum(without) / n) ** 2 for v in without)),
            "loss_se": math.sqrt(n / (n - 1) * sum((v - mean * c) ** 2 for v, c in zip(losses, counted))) / sum(
                counted), "distill_loss_se": slow_error(distances),
            "agree_se": slow_error([100 * v * n / pixels for v in agreeing])}


@pytest.mark.parametrize("decoder", ["linear", "mask_transformer", "queries"])
@pytest.mark.parametrize("make", [token_plan, match_plan, units_plan])
def test_measures_of_a_segmenter_are_those_of_every_patch_and_pixel_alone(make, decoder):
    model, found = small(decoder), batches((3, 2))
    plan = make(model)
    wanted = slow_pixels(model, plan, found)
    for metric, sign in (("miou_pct", 1), ("distill_loss", -1)):
        given = PlanObjective(model, found, metric=metric)(plan)
        assert set(given) == {"value", *wanted} and all(type(v) is float for v in given.values())
        # Of 4,800 pixels one or two may lie so near the border of two classes that float32 chooses the other: 0.1 of a
        # per cent.
        assert {k: given[k] for k in wanted} == pytest.approx(wanted, rel=1e-3, abs=5e-3)
        assert given["value"] == sign * given[metric]
    assert wanted["distill_loss"] > 0.01 and wanted["agree_pct"] < 99 and wanted["miou_se"] > 0.1


@pytest.mark.parametrize("decoder", ["linear", "mask_transformer", "queries"])
def test_the_empty_plan_of_a_segmenter_has_no_distance_and_what_the_dense_model_is_worth(decoder):
    model, found = small(decoder), batches((3, 2))
    given = PlanObjective(model, found, metric="miou_pct")(CompressionPlan.empty(shape_of(model)))
    worth = evaluate_scenes(model, found, progress=False)
    assert given["distill_loss"] == 0 and given["agree_pct"] == 100         # the very same logits
    assert given["value"] == given["miou_pct"] == worth.scores.miou_pct     # counts of the same pixels
    assert given["loss"] == pytest.approx(worth.loss, rel=1e-5)             # float32 logarithms
    assert given["miou_se"] == worth.scores.miou_se > 0 and given["loss_se"] == pytest.approx(worth.loss_se, rel=1e-4)


def test_images_of_a_segmenter_weigh_alike_however_they_come_and_pixels_by_their_number():
    model = small()
    x, y = pictures(4), masks(4)
    # nothing of the last image counts, but for the distance
    y[3] = 255
    y[2, :, 5:] = 255
    whole, apart = (PlanObjective(model, given)(units_plan(model))
                    for given in ([(x, y)], [(x[:3], y[:3]), (x[3:], y[3:])]))
    assert whole == pytest.approx(apart, rel=1e-5)                          # float32 sums in another order
    three = PlanObjective(model, [(x[:3], y[:3])])(units_plan(model))
    assert (three["miou_pct"], three["miou_se"]) == (whole["miou_pct"], whole["miou_se"])
    assert three["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert three["distill_loss"] != pytest.approx(whole["distill_loss"], rel=1e-3)


def test_the_metric_of_another_task_is_refused(sample):
    with pytest.raises(InputError, match="metric 'top1_pct' is of another task; for this model 'miou_pct' and "
                                         "'distill_loss' are"):
        PlanObjective(small(), batches(), metric="top1_pct")
    with pytest.raises(InputError, match="metric 'miou_pct' is of another task; for this model 'top1_pct'"):
        PlanObjective(*sample("deit"), metric="miou_pct")


@pytest.mark.parametrize("metric", ["miou_pct", "distill_loss"])
def test_images_of_which_no_pixel_counts_are_refused_to_search_on(metric):
    with pytest.raises(InputError, match="no pixel"):
        PlanObjective(small(), [(pictures(2), torch.full((2, 24, 40), 255))], metric=metric)


def test_a_deployed_segmenter_measures_as_the_training_form_does():
    model, found = small(), batches()
    cut = compress(model, token_plan(model))
    objective = PlanObjective(model, found, metric="distill_loss")
    assert objective.measure(deploy(cut)) == pytest.approx(objective.measure(cut), rel=1e-3, abs=1e-4)      # as above
