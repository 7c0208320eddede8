"""The steps of segmentation from an encoder to overlays, by functions and by commands, on a few of the embedded
scenes."""
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from segmenting_fixtures import given, match_plan, opened, small, units_plan
from test_cost import counted_macs
from test_latency import made
from training_fixtures import NAME, logits, one_thread, small_recipe, tiny, token_plan  # noqa: F401

from vitlab import cli
from vitlab.data.masks import open_scenes
from vitlab.measure import latency
from vitlab.measure.pixels import evaluate_scenes
from vitlab.models import checkpoint, compress, deploy, shape_of
from vitlab.models.segmenter import Segmenter
from vitlab.models.windows import segment
from vitlab.plan import BlockPlan, CompressionPlan, cost
from vitlab.plan.rules import Match
from vitlab.plots.colours import class_colours
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError, read_lines
from vitlab.runtime.results import read_rows
from vitlab.search.strategies import Settings
from vitlab.training import states
from vitlab.training.loop import LOG
from vitlab.training.recipes import Engine
from vitlab.workbench import calibrating, comparing, cutting, scoring, searching, segmenting, steps, tonight, training

DATA, NAMES = "digit_scenes", ["background", *"0123456789"]
HERE = RunConfig(device="cpu", quiet=True, workers=0)
RECIPE = small_recipe(epochs=3, batch_size=4, lr=3e-3, lr_batch=4, drop_path=0.1, augment={"scale": (0.8, 1.2)})
SEARCH = Settings(population=2, evaluations=3, candidates=10, refinements=1)


def encoder():
    """A classifier whose blocks become the encoder: 24 wide, 2 blocks, patches of 8 x 8."""
    return opened(tiny(num_classes=10))


def train(out, **more):
    return segmenting.train_segmenter(encoder(), DATA, out, **{"recipe": RECIPE, "images": 8, "config": HERE, **more})


@pytest.fixture(scope="module")
def way(tmp_path_factory):
    """The folder of a study in which each step was done once."""
    out = tmp_path_factory.mktemp("way")
    train(out / "dense")
    scoring.score_tokens(out / "dense", DATA, out / "tokens.safetensors", images=6,
                         config=dataclasses.replace(HERE, batch_size=3))
    cutting.prune_tokens(out / "dense", out / "tokens.safetensors", out / "pruned", keep_rate=0.5)
    training.finetune(out / "pruned", DATA, out / "tuned", teacher=out / "dense", images=8,
                      recipe=RECIPE.replace(epochs=1, distill="soft", alpha=0.8, tau=4.0), config=HERE)
    scoring.score_units(out / "dense", DATA, out / "units.safetensors", images=6,
                        config=dataclasses.replace(HERE, batch_size=3))
    cutting.prune_units(out / "dense", out / "units.safetensors", out / "half", neuron_ratio=0.5)
    return out


# ---------------------------------------------------------------- training

def test_training_makes_a_dense_segmenter_of_the_scenes_size_and_classes_and_logs_its_mean_iou(way):
    found = checkpoint.load(way / "dense")
    assert isinstance(found.model, Segmenter) and found.model.img_size == (32, 32) and found.model.num_classes == 11
    assert found.info["classes"] == NAMES and found.plan == CompressionPlan.empty(shape_of(found.model))
    assert found.info["made_by"]["step"] == "segment" and found.info["made_by"]["data"] == DATA
    log = read_lines(way / "dense" / "training" / LOG)
    assert [record["epoch"] for record in log] == [1, 2, 3] and log[2]["loss"] < 0.9 * log[0]["loss"]
    slice_of_train = open_scenes(DATA).batches("train", found.model, limit=50, workers=0)
    worth = evaluate_scenes(found.model, slice_of_train, progress=False).scores.miou_pct
    # bf16 or not, the middle of each image
    assert log[2]["train_slice_miou_pct"] == pytest.approx(worth, rel=1e-3)


def test_a_training_that_was_cut_off_ends_with_the_same_weights(way, tmp_path):
    shutil.copytree(way / "dense", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    newest = states.paths(tmp_path / "run" / "training")[-1]
    assert len(states.paths(tmp_path / "run" / "training")) == 2
    newest.unlink()
    # dropout, drop path and augmentation are drawn as before
    train(tmp_path / "run")
    found, wanted = (checkpoint.load(folder).model.state_dict() for folder in (tmp_path / "run", way / "dense"))
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    with pytest.raises(InputError, match="the state of another run .other recipe"):
        train(tmp_path / "run", recipe=RECIPE.replace(lr=1e-4))


def test_a_step_in_turns_and_one_at_once_train_alike(tmp_path):
    """Without dropout, and with crops that are larger than some scenes: batches have different numbers of pixels."""
    one = RECIPE.replace(epochs=1, drop_path=0.0, augment={"scale": (0.5, 1.0), "color_jitter": 0.0})
    source = opened(Segmenter(small(num_classes=11, img_size=(32, 32)).encoder, 11, "linear"))
    logs = []
    for name, engine in (("once", Engine()), ("turns", Engine(accumulate=2, checkpointing=True))):
        segmenting.train_segmenter(source, DATA, tmp_path / name, recipe=one, images=8, engine=engine, config=HERE)
        logs.append([record["loss"] for record in read_lines(tmp_path / name / "training" / LOG)])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)                  # float32 sums in another order


def test_a_segmenter_goes_on_training_at_another_size_with_its_own_decoder(way, tmp_path):
    segmenting.train_segmenter(way / "dense", DATA, tmp_path / "run", img_size=(33, 50),
                               recipe=RECIPE.replace(epochs=1), images=8, config=HERE)
    found, before = checkpoint.load(tmp_path / "run").model, checkpoint.load(way / "dense").model
    assert found.img_size == (40, 56) and found.decoder_name == "mask_transformer"
    moved = (found.decoder.cls_emb - before.decoder.cls_emb).detach().abs().max()
    # 2 steps of AdamW at 3e-3 from where it was, not from the start
    assert 0 < float(moved) < 0.05
    # images that are larger than its windows, and all of each
    row = steps.evaluate(tmp_path / "run", DATA, images=2, config=HERE)
    assert (row.conditions["images"], row.conditions["pixels"]) == (2, 2 * 64 * 96)


def test_a_segmenter_is_made_of_the_encoders_own_blocks_at_the_size_of_the_first_scenes():
    data, source = open_scenes(DATA), encoder()
    for decoder, args in (("linear", {}), ("mask_transformer", {"depth": 1}), ("queries", {"depth": 1})):
        model = segmenting.make_segmenter(source, data, decoder=decoder, **args)
        assert (model.decoder_name, model.num_classes, model.img_size,
                model.decoder_depth) == (decoder, 11, (32, 32), len(args))
        assert len(model.blocks) == len(source.model.blocks)
        assert torch.equal(model.blocks[1].mlp.fc2.weight, source.model.blocks[1].mlp.fc2.weight)
    assert segmenting.make_segmenter(source, data).decoder_name == "mask_transformer"
    dropping = segmenting.make_segmenter(source, data, drop_path=0.3)
    assert isinstance(dropping.blocks[0].drop_path1, torch.nn.Identity)
    assert dropping.blocks[1].drop_path1.drop_prob == dropping.blocks[1].drop_path2.drop_prob == pytest.approx(0.3)
    assert source.model.img_size if hasattr(source.model,
                                            "img_size") else tuple(source.model.patch_embed.img_size) == (32, 32)
    assert segmenting.scene_size(given([(24, 40)] * 3)) == (24, 40)
    assert segmenting.scene_size(given([(24, 40), (40, 24)])) == (512, 512)


def test_what_no_segmenter_can_be_made_of_is_refused(way):
    data = open_scenes(DATA)
    with pytest.raises(InputError, match="the model has a decoder already .mask_transformer., which goes on training"):
        segmenting.make_segmenter(way / "dense", data, decoder="linear")
    with pytest.raises(InputError, match="already compressed"):
        segmenting.make_segmenter(way / "pruned", data)
    with pytest.raises(InputError, match="digit_scenes: 11 classes, but the model's decoder has 5"):
        segmenting.make_segmenter(opened(small()), data)
    with pytest.raises(InputError, match="decoder 'conv' is not known"):
        segmenting.make_segmenter(encoder(), data, decoder="conv")
    for change, says in (({"mixup": 0.8}, "recipe test mixes images"),
                         ({"augment": {"ratio": (0.9, 1.1)}}, "augmentation 'ratio' can't be done to an image and its "
                                                              "mask; scale, hflip")):
        with pytest.raises(InputError, match=says):
            segmenting.train_segmenter(encoder(), DATA, way / "none", recipe=RECIPE.replace(**change), images=8,
                                       config=HERE)


# ---------------------------------------------------------------- from scores to a smaller model

def test_scores_prune_and_distil_a_segmenter_as_a_classifier(way):
    dense, pruned, tuned = (checkpoint.load(way / name) for name in ("dense", "pruned", "tuned"))
    assert scoring.read_scores(way / "tokens.safetensors")[0].shape == (2, 16)
    assert [block.tokens.num_merged
            for block in pruned.plan.blocks] == [block.tokens.num_merged for block in tuned.plan.blocks]
    assert pruned.plan.shape == shape_of(dense.model) and cost.gmacs(pruned.plan) < cost.gmacs(dense.plan)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(logits(tuned.model, x), logits(pruned.model, x))
    assert tuned.info["made_by"]["recipe"]["distill"] == "soft" and tuned.info["classes"] == NAMES
    half = checkpoint.load(way / "half")
    assert [len(block.neurons) for block in half.plan.blocks] == [48, 48]


def test_calibration_brings_a_cut_segmenter_nearer_to_the_dense_one_on_images_set_apart(way, tmp_path):
    made = calibrating.calibrate(way / "dense", DATA, tmp_path / "out", way / "half" / "checkpoint" / "plan.json",
                                 images=24, config=HERE)
    said = made.info["made_by"]
    assert 0 < said["distance_refitted"] < said["distance_cut"]
    assert made.info["classes"] == NAMES and said["images"] == 24
    assert isinstance(checkpoint.load(tmp_path / "out").model, Segmenter)


def test_a_search_proposes_merging_by_content_and_its_plan_fits_the_budget(way, tmp_path):
    study = searching.search(way / "dense", DATA, tmp_path / "study", macs_ratio=0.9, images=4, score_images=4,
                             settings=SEARCH, compensate=True, metric="miou_pct", config=HERE)
    plan = CompressionPlan.load(tmp_path / "study" / "plan.json", shape_of(checkpoint.load(way / "dense").model))
    assert len(study.evaluations) == 3 and study.info["about"]["metric"] == "miou_pct"
    assert any(isinstance(block.tokens, Match) for block in plan.blocks) and plan.shape.decoder == "mask_transformer"
    assert cost.gmacs(plan) <= 0.9 * cost.gmacs(CompressionPlan.empty(plan.shape))
    for evaluation in study.evaluations:
        assert evaluation.value == evaluation.measures["miou_pct"] and evaluation.measures["distill_loss"] >= 0
    worth = plan.made_by["reported"]
    assert worth["images"] == 4 and worth["miou_pct"] != study.best.value and worth["miou_se"] > 0 and worth[
        "agree_se"] > 0
    for wrong in ({"tokens": "select"}, {"tokens": "select_per_stage"}, {"read_out": True}):
        with pytest.raises(InputError, match="a class for each pixel needs the whole grid; tokens that merge"):
            searching.search(way / "dense", DATA, tmp_path / "other", macs_ratio=0.9, **wrong, config=HERE)
    with pytest.raises(InputError, match="metric 'top1_pct' is of another task"):
        searching.search(way / "dense", DATA, tmp_path / "other", macs_ratio=0.9, metric="top1_pct", images=4,
                         score_images=4, config=HERE)
    assert not (tmp_path / "other").exists()


def test_a_search_by_latency_keeps_to_the_table_of_the_segmenter(way, tmp_path, monkeypatch):
    monkeypatch.setenv("VITLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "measure_table", lambda model, *, batch_size, dtype, device, progress, way: made(
        # times that are the same every time
        shape_of(model), **latency.conditions_of(model, batch_size, dtype, device)))
    shape = shape_of(checkpoint.load(way / "dense").model)
    table = made(shape)
    dense = float(table.predict(cost.counts_of(CompressionPlan.empty(shape))))
    study = searching.search(way / "dense", DATA, tmp_path / "study", latency_ms=0.8 * dense, images=4, score_images=4,
                             settings=SEARCH, metric="distill_loss", tokens="share", config=HERE)
    plan = CompressionPlan.load(tmp_path / "study" / "plan.json")
    assert 0 < float(table.predict(cost.counts_of(plan))) <= 0.8 * dense * (1 + 1e-9)           # float64
    assert study.budget.unit == "latency_ms" and len(study.evaluations) == 3


def test_where_cutting_hurts_is_measured_in_each_block_and_tokens_merge_by_content(way, tmp_path):
    rows = comparing.sensitivity(way / "dense", DATA, tmp_path, criteria=("weight",), images=4, score_images=4,
                                 config=HERE)
    assert {(row["dimension"], row["block"]) for row in rows} == {(d, b) for d in ("heads", "neurons", "tokens")
                                                                  for b in (0, 1)}
    assert all(row["metric"] == "distill_loss" and row["drop_se"] >= 0 and row["gmacs_removed"] > 0 for row in rows)
    for block in (0, 1):
        plan = comparing._match_in(shape_of(checkpoint.load(way / "dense").model), block, 0.25)
        assert [None if b.tokens is None else b.tokens.merged
                for b in plan.blocks] == ([4, 0] if block == 0 else [None, 4])


def test_photographs_without_masks_are_enough_for_a_smaller_segmenter_tonight(way, tmp_path):
    photographs, train, chance = tmp_path / "photographs", open_scenes(DATA).split("train"), np.random.default_rng(0)
    photographs.mkdir()
    for i in range(12):
        train.scene(i)[0].save(photographs / f"{i:02d}.png")
    # of another size
    Image.fromarray(chance.integers(0, 256, (20, 70, 3), dtype=np.uint8)).save(photographs / "flat.png")
    made = tonight.tonight(way / "dense", photographs, tmp_path / "out", macs_ratio=0.9,
                           rules=("merging by content", "neurons"), ratios=(0.95,), evaluations=3, images=5,
                           score_images=10, config=dataclasses.replace(HERE, seed=1))
    dense = checkpoint.load(way / "dense")
    assert cost.gmacs(made.plan) <= 0.9 * cost.gmacs(dense.plan) and made.plan.shape.decoder == "mask_transformer"
    rows = list(read_lines(tmp_path / "out" / tonight.OFFERS))
    assert [row["rule"] for row in rows] == ["merging by content"] * 2 + ["neurons"] * 2
    images = torch.cat([x for x,
                        _ in open_scenes(photographs).parts(1, report=5).batches("report", dense.model, workers=0)])
    # measured on images that served nothing before; nothing of them is refitted
    for row in rows[:2]:
        small = deploy(compress(dense.model, CompressionPlan.from_json(row["plan"])))
        same = logits(small, images).argmax(dim=1) == logits(dense.model, images).argmax(dim=1)
        assert same.shape == (2, 32, 32) and row["agree_pct"] == pytest.approx(100 * float(same.double().mean()))
        # two images: the error is half their difference
        shares = same.double().mean(dim=(1, 2)).tolist()
        assert row["agree_se"] == pytest.approx(100 * abs(shares[0] - shares[1]) / 2)
    offers = [tonight.Offer(rule="neurons", plan=made.plan, gmacs=0.1, agree_pct=90.0, distill_loss=0.1, chosen_by=0.1)]
    label = tonight.offers_figure(offers).axes[0].get_ylabel()
    assert label.replace("\n", " ") == "pixels classified as by the dense model (%)"
    few = {"macs_ratio": 0.9, "metric": "distill_loss", "images": 4, "score_images": 4, "settings": SEARCH,
           "config": HERE}
    study = searching.search(way / "dense", photographs, tmp_path / "study", **few)
    assert all(not {"miou_pct", "loss"} & e.measures.keys() for e in study.evaluations)
    assert [e.value for e in study.evaluations] == [-e.measures["distill_loss"]
                                                    for e in study.evaluations] and len(study.evaluations) == 3
    for step in (lambda: steps.evaluate(way / "dense", photographs, config=HERE),
                 lambda: searching.search(way / "dense", photographs, tmp_path / "other", tokens="share", **few),
                 lambda: searching.search(way / "dense", photographs, tmp_path / "other", criterion="taylor", **few),
                 lambda: searching.search(way / "dense", photographs, tmp_path / "other",
                                          **{**few, "metric": "miou_pct"}),
                 lambda: segmenting.train_segmenter(encoder(), photographs, tmp_path, recipe="digit_scenes"),
                 lambda: scoring.score_tokens(way / "dense", photographs, tmp_path / "tokens.safetensors",
                                              config=HERE)):
        with pytest.raises(InputError, match="photographs: images without masks, which this step needs; train/images/"):
            step()
    (photographs / "03.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="03.png: can't be read as an image .*, left out"):
        scores = scoring.score_units(way / "dense", photographs, tmp_path / "units.safetensors", criterion="activation",
                                     config=HERE)
    assert scores.made_by["images"] == "8"                              # of 9
    with pytest.warns(UserWarning, match="03.png: can't be read as an image .*, left out"):
        made = tonight.tonight(way / "dense", photographs, tmp_path / "without", macs_ratio=0.9, rules=("neurons",),
                               ratios=(0.9,), evaluations=0, images=5, score_images=10, config=HERE)
    assert cost.gmacs(made.plan) <= 0.9 * cost.gmacs(dense.plan)


# ---------------------------------------------------------------- evaluation

@pytest.mark.parametrize("name", ["dense", "tuned", "half"])
def test_a_row_says_what_the_deployed_form_is_worth_on_whole_images_and_what_it_costs(way, tmp_path, name):
    row = steps.evaluate(way / name, DATA, out=tmp_path, images=4, config=HERE)
    found = checkpoint.load(way / name)
    model = deploy(found.model)
    worth = evaluate_scenes(model,
                            open_scenes(DATA).batches("test", model, limit=4, batch_size=1, whole=True, workers=0),
                            progress=False)
    assert row.miou_pct == worth.scores.miou_pct and row.loss == worth.loss and row.top1_pct is None
    assert row.pixel_accuracy_pct == worth.scores.pixel_accuracy_pct and row.split == "test" and row.dataset == DATA
    assert row.gmacs == counted_macs(model) / 1e9
    parameters = dict(model.named_parameters())                         # and the folded matrices
    assert row.params_m == sum(v.numel() for k,
                               v in model.state_dict().items() if k.endswith("matrix") or k in parameters) / 1e6
    assert cost.macs(found.plan)["decoder"] > 0.2 * row.gmacs * 1e9
    iou = row.conditions["iou_pct"]
    assert list(iou) == NAMES and all(value is None or 0 <= value <= 100 for value in iou.values())
    assert row.miou_pct == pytest.approx(np.mean([value for value in iou.values() if value is not None]))
    assert (row.conditions["images"], row.conditions["pixels"]) == (4, 4 * 64 * 96) and "windows" not in row.conditions
    again, = read_rows(tmp_path / steps.RESULTS)
    assert (again.miou_pct, again.conditions["iou_pct"]) == (row.miou_pct, iou)
    assert "NaN" not in (tmp_path / steps.RESULTS).read_text()


def test_windows_scales_and_flips_are_measured_and_said(way):
    windows = {"stride": (16, 24), "scales": (1.0, 1.5), "flip": True}
    plain, row = (steps.evaluate(way / "dense", DATA, images=2, windows=steps.Windows(**more), config=HERE)
                  for more in ({}, windows))
    model = checkpoint.load(way / "dense").model
    batches = open_scenes(DATA).batches("test", model, limit=2, batch_size=1, whole=True, workers=0)
    assert row.miou_pct == evaluate_scenes(model, batches, progress=False, **windows).scores.miou_pct
    assert row.conditions["windows"] == windows and row.loss != plain.loss and row.gmacs == plain.gmacs
    with pytest.raises(InputError, match="flip is of segmentation; the model gives one class for an image"):
        steps.evaluate(encoder(), "digits", images=2, config=HERE, windows=steps.Windows(flip=True))
    with pytest.raises(InputError, match="crop_pct is 0.9, but scenes"):
        steps.evaluate(way / "dense", DATA, crop=0.9, config=HERE)


def test_scenes_of_other_classes_than_the_segmenter_was_trained_on_are_refused(way, tmp_path):
    found = checkpoint.load(way / "dense")
    other = dataclasses.replace(found, info={**found.info, "classes": [*NAMES[:-1], "ten"]})
    with pytest.raises(InputError, match="its classes are not the model's"):
        steps.evaluate(other, DATA, config=HERE)
    with pytest.raises(InputError, match="a class map is of class folders; masks have none"):
        steps.evaluate(found, DATA, class_map=tmp_path / "map.json", config=HERE)


def test_a_plan_made_for_a_classifier_costs_with_the_decoder_once_a_segmenter_is_cut_by_it(way, tmp_path):
    dense = checkpoint.load(way / "dense").model
    shape = dataclasses.replace(shape_of(dense), decoder="", decoder_depth=0, num_classes=10, pool="token")
    plan = CompressionPlan(shape=shape, blocks=(BlockPlan(neurons=tuple(range(48))), token_plan(dense).blocks[1]))
    plan.save(tmp_path / "plan.json")
    cutting.prune_plan(way / "dense", tmp_path / "plan.json", tmp_path / "cut")
    row = steps.evaluate(tmp_path / "cut", DATA, images=1, config=HERE)
    assert row.gmacs == counted_macs(deploy(compress(dense, plan))) / 1e9


# ---------------------------------------------------------------- predictions

@pytest.fixture
def photos(tmp_path):
    """A folder of two images of different sizes, one of them grey, and a broken one."""
    folder, chance = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    Image.fromarray(chance.integers(0, 256, (50, 110, 3), dtype=np.uint8)).save(folder / "a.png")
    Image.fromarray(chance.integers(0, 256, (64, 96), dtype=np.uint8)).save(folder / "b.jpg")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no image either")
    return folder


@pytest.mark.parametrize("name, windows", [("dense", {}), ("tuned", {"flip": True, "stride": (16, 24)})])
def test_predictions_are_the_classes_of_the_deployed_model_and_their_colours_over_the_image(way, photos, tmp_path, name,
                                                                                            windows):
    with pytest.warns(UserWarning) as said:
        written = segmenting.predict(way / name, photos, tmp_path / "out", opacity=0.25,
                                     windows=steps.Windows(**windows), config=RunConfig(device="cpu", quiet=True))
    assert written == [tmp_path / "out" / "a.png", tmp_path / "out" / "b.png"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.png", "a_classes.png", "b.png", "b_classes.png"}
    text, = (str(warning.message) for warning in said)
    assert text.startswith(f"{photos / 'broken.jpg'}: can't be read as an image (") and text.endswith("), left out")
    model, colours = deploy(checkpoint.load(way / name).model), class_colours(11)
    for source, overlay in zip((photos / "a.png", photos / "b.jpg"), written):
        image = np.asarray(Image.open(source).convert("RGB")) / 255
        flat = Image.open(overlay.with_name(f"{overlay.stem}_classes.png"))
        classes, x = np.asarray(flat), torch.from_numpy((image - 0.5) / 0.5).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            wanted = segment(model, x, window=(32, 32), **windows)[0].argmax(0).numpy()
        assert flat.mode == "P" and classes.shape == image.shape[:2]
        # one float32 normalisation and another: near ties alone differ
        assert (classes != wanted).mean() < 1e-3
        palette = np.array(flat.getpalette()[:33]).reshape(11, 3)
        assert np.array_equal(palette, (colours * 255).round())
        shown = np.asarray(Image.open(overlay))
        assert shown.shape == image.shape
        # rounded to whole levels
        assert np.abs(shown - 255 * (0.75 * image + 0.25 * colours[classes])).max() <= 0.5 + 1e-6


def test_what_cant_be_predicted_is_refused_before_anything_is_written(way, photos, tmp_path):
    def predict(source=way / "dense", images=photos, **more):
        return segmenting.predict(source, images, tmp_path / "out", **more, config=RunConfig(device="cpu", quiet=True))
    with pytest.raises(InputError, match="gives one class for an image; a Segmenter is needed"):
        predict(encoder())
    with pytest.raises(InputError, match="nowhere: no such folder of images"):
        predict(images=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: holds no images"):
        predict(images=tmp_path / "empty")
    with pytest.raises(InputError, match="opacity is 1.5"):
        predict(opacity=1.5)
    shutil.copy(photos / "a.png", photos / "b.png")
    with pytest.raises(InputError, match="images named b and b; both would be written to b.png"):
        predict()
    for path in ("a.png", "b.png", "b.jpg"):
        (photos / path).unlink()
    with pytest.raises(InputError,
                       match="photos: none of its 1 images can be read"), pytest.warns(UserWarning, match="broken.jpg"):
        predict()
    assert not (tmp_path / "out").exists()


def test_an_image_is_never_overwritten_by_its_own_prediction_nor_by_anothers(way, photos, tmp_path):
    before = (photos / "a.png").read_bytes()
    for out in (photos, photos / ".." / "photos"):
        with pytest.raises(InputError, match="photos: the predictions would be written over the images; choose another "
                                             "folder"):
            segmenting.predict(way / "dense", photos, out, config=RunConfig(device="cpu", quiet=True))
    assert (photos / "a.png").read_bytes() == before and not list(photos.glob("*_classes.png"))
    shutil.copy(photos / "b.jpg", photos / "a_classes.jpg")
    with pytest.raises(InputError, match="images named a and a_classes; both would be written to a_classes.png"):
        segmenting.predict(way / "dense", photos, tmp_path / "out", config=RunConfig(device="cpu", quiet=True))


# ---------------------------------------------------------------- by commands alone

QUIET = ["--device", "cpu", "--workers", "0", "--quiet"]


def test_a_segmenter_is_trained_gone_on_with_pruned_measured_and_asked_by_commands_alone(tmp_path, photos, capsys,
                                                                                         monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save("encoder", encoder().model, encoder().plan)

    def run(*argv: str) -> str:
        assert cli.main(list(argv)) == 0
        return capsys.readouterr().out
    short = ["--epochs", "1", "--images", "8", "--batch-size", "4", *QUIET]
    assert run("segment", "--checkpoint", "encoder", "--data", DATA, "--decoder", "linear", "--img-size", "30", "50",
               "--out", "dense", *short) == "checkpoint: dense/checkpoint\n"
    model = checkpoint.load("dense").model
    assert (model.img_size, model.decoder_name) == ((32, 56), "linear")
    weights = (tmp_path / "dense/checkpoint/weights.safetensors").read_bytes()
    run("resume", "dense")
    assert (tmp_path / "dense/checkpoint/weights.safetensors").read_bytes() == weights
    assert json.loads((tmp_path / "dense/command.json").read_text())["arguments"][0] == "segment"
    out = run("prune", "match", "--checkpoint", "dense", "--ratio", "0.25", "--out", "small")
    assert "GMACs deployed" in out
    run("finetune", "--checkpoint", "small", "--teacher", "dense", "--data", DATA, "--recipe", "segmenter_pm", "--out",
        "tuned", *short)
    out = run("evaluate", "--checkpoint", "tuned", "--data", DATA, "--images", "2", "--out", "rows", "--mean", "0.4",
              *QUIET)
    row, = read_rows("rows/results.jsonl")
    assert "miou_pct" in out and "top1_pct" not in out and f"{row.miou_pct:.2f}" in out
    assert row.conditions[
        "prepared"] == "mean 0.4 0.4 0.4, std 0.5 0.5 0.5" and f"images, {row.conditions['prepared']}\n" in out
    iou = row.conditions["iou_pct"]
    assert "IoU: " + ", ".join(f"{name} {'-' if iou[name] is None else format(iou[name], '.1f')}"
                               for name in NAMES) in out
    out = run("predict", "--checkpoint", "tuned", "--folder", str(photos), "--stride", "16", "28", "--out", "seen",
              "--device", "cpu", "--quiet")
    assert out == "2 files: seen/a.png to b.png\n" and len(list((tmp_path / "seen").iterdir())) == 4
    out = run("search", "--checkpoint", "dense", "--data", DATA, "--macs-ratio", "0.9", "--evaluations", "2",
              "--population", "2", "--images", "4", "--criterion", "weight", "--out", "study", *QUIET)
    assert "best of 2" in out


def test_a_compressed_segmenter_is_saved_and_opened_by_its_run_folder(tmp_path):
    dense = small(num_classes=11, img_size=(64, 96))
    for make in (units_plan, match_plan, token_plan):
        plan = make(dense)
        made = cutting.apply_plan(opened(dense, classes=NAMES), plan, tmp_path / make.__name__)
        again = steps.open_model(tmp_path / make.__name__)
        x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
        assert torch.equal(logits(again.model, x), logits(compress(dense, plan), x))
        assert torch.equal(logits(made.model, x), logits(again.model, x))


def test_a_timm_name_is_the_encoder_of_a_new_segmenter(tmp_path):
    built = steps.open_model(NAME, pretrained=False, num_classes=10, depth=1, embed_dim=24, num_heads=3, patch_size=8)
    model = segmenting.make_segmenter(built, given([(24, 40)]), decoder="linear")
    assert (model.img_size, model.num_classes, len(model.blocks)) == ((24, 40), 5, 1)
