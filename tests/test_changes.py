"""What compression changed: predictions, classes, calibration and blame against slow oracles; the pictures that are
shown are those that changed."""
import asyncio
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from training_fixtures import full_plan, images, logits, one_thread, tiny, write_easy_folder  # noqa: F401

from vitlab.measure.changes import BINS, Changes, blame, similarity, undone
from vitlab.measure.corruptions import CORRUPTIONS, corrupted, robustness
from vitlab.measure.distance import output_of, outputs
from vitlab.measure.rollout import looked_at
from vitlab.models import checkpoint, compress, deploy, shape_of
from vitlab.models.checkpoint import Checkpoint
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import Match
from vitlab.plots import changed_pictures, class_changes, corruption_curves, reliability, stream_similarity
from vitlab.plots.units import over_grey
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError
from vitlab.workbench.changes import named, overview, pictures, what_changed
from vitlab.workbench.compared import Compared
from vitlab.workbench.explore.base import PAUSE
from vitlab.workbench.explore.changes import changes_explorer

QUIET = RunConfig(workers=0, quiet=True, device="cpu")


def told(seed: int = 0, count: int = 60, classes: int = 4) -> Changes:
    """Predictions of two models that agree for the most part, and targets."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(count, classes, generator=generator).mul(2).softmax(dim=1)
    own = (dense.log() + 0.9 * torch.randn(dense.shape, generator=generator)).softmax(dim=1)
    (p, top), (own_p, own_top) = (each.topk(3, dim=1) for each in (dense, own))
    return Changes(targets=torch.randint(classes, (count,), generator=generator),
                   distance=(dense * (dense / own).log()).sum(dim=1), dense=top, dense_p=p, compressed=own_top,
                   compressed_p=own_p)


def found_by(model: torch.nn.Module, plan: CompressionPlan | None = None, info: dict | None = None) -> Checkpoint:
    return Checkpoint(model=model, plan=plan or CompressionPlan.empty(shape_of(model)), info=info or {"made_by": {}})


def match_plan(model: torch.nn.Module, *merged: int) -> CompressionPlan:
    blocks = tuple(BlockPlan(tokens=Match(merged=count)) for count in merged)
    return CompressionPlan(shape=shape_of(model), blocks=blocks)


def test_classes_confusion_and_calibration_are_what_slow_loops_say():
    changes, names = told(), ["ant", "bee", "cat", "dog"]
    rows, n = changes.by_class(names.__getitem__), len(changes.targets)
    assert [row["difference"] for row in rows] == sorted(row["difference"] for row in rows)
    for row in rows:
        own = [i for i in range(n) if names[changes.targets[i]] == row["class"]]
        dense, compressed = ([int(top[i, 0] == changes.targets[i]) for i in own]
                             for top in (changes.dense, changes.compressed))
        gained = [100 * (b - a) for a, b in zip(dense, compressed)]
        mean = sum(gained) / len(own)
        error = (sum((g - mean) ** 2 for g in gained) / (len(own) - 1) / len(own)) ** 0.5
        assert row["images"] == len(own) and row["dense_pct"] == pytest.approx(100 * sum(dense) / len(own))
        assert (row["difference"], row["difference_se"]) == (pytest.approx(mean), pytest.approx(error))
    confused = {}
    for i in range(n):
        if changes.dense[i, 0] == changes.targets[i] != changes.compressed[i, 0]:
            pair = names[changes.targets[i]], names[changes.compressed[i, 0]]
            confused[pair] = confused.get(pair, 0) + 1
    appeared = changes.appeared(names.__getitem__)
    assert confused and {(r["class"], r["taken_for"]): r["images"] for r in appeared} == confused
    for name, top, p in (("dense", changes.dense, changes.dense_p),
                         ("compressed", changes.compressed, changes.compressed_p)):
        total = 0.0
        for b in range(BINS):
            own = [i for i in range(n) if b / BINS <= p[i, 0] < (b + 1) / BINS or b == BINS - 1 and p[i, 0] == 1]
            right = sum(int(top[i, 0] == changes.targets[i]) for i in own)
            total += abs(right - sum(float(p[i, 0]) for i in own))
        assert changes.calibration_error()[name] == pytest.approx(100 * total / n)


def test_what_changed_comes_in_the_order_in_which_it_moved_and_survives_its_file(tmp_path):
    changes = told()
    order = changes.order()
    assert order and set(order) == {i for i in range(60) if changes.dense[i, 0] != changes.compressed[i, 0]}
    assert changes.distance[order].tolist() == sorted(changes.distance[order].tolist(), reverse=True)
    changes.save(tmp_path / "changes.safetensors")
    again = Changes.load(tmp_path / "changes.safetensors")
    assert all(torch.equal(value, getattr(again, name)) for name, value in vars(changes).items())
    with pytest.raises(InputError, match="no labels"):
        dataclasses.replace(changes, targets=torch.full((60,), -1)).by_class()


def test_a_pass_keeps_each_models_likeliest_classes_and_the_distance_between_them():
    dense = tiny(7).eval()
    model = compress(dense, full_plan(dense)).eval()
    x = images(9)
    found = Changes.between(dense, {"it": model, "itself": dense}, [(x[:5], torch.arange(5)), (x[5:], torch.arange(4))],
                            progress=False)
    assert not found["itself"].changed.any() and not found["itself"].distance.any()
    changes = found["it"]
    p, q = (logits(each, x).softmax(dim=1) for each in (dense, model))
    assert torch.equal(changes.dense, p.argsort(dim=1, descending=True)[:, :5])
    torch.testing.assert_close(changes.compressed_p, q.sort(dim=1, descending=True).values[:, :5])
    torch.testing.assert_close(changes.distance, (p * (p / q).log()).sum(dim=1), rtol=1e-4, atol=1e-6)
    assert changes.targets.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_without_a_classifier_what_changes_is_the_nearest_image():
    dense = tiny(0).eval()
    model = compress(dense, full_plan(dense)).eval()
    x = images(12)
    changes = Changes.between(dense, {"it": model}, [(x, torch.zeros(12, dtype=torch.int64))], progress=False)["it"]
    for numbers, of in ((changes.dense, dense), (changes.compressed, model)):
        given = logits(of, x)
        for i in range(12):
            cosines = {j: float(torch.cosine_similarity(given[i], given[j], dim=0)) for j in range(12) if j != i}
            assert numbers[i].tolist() == sorted(cosines, key=cosines.get, reverse=True)[:5]
    assert (changes.targets == -1).all()


@pytest.mark.parametrize("make", [full_plan, lambda model: match_plan(model, 5, 4)], ids=["by place, units", "match"])
def test_a_block_undone_is_the_dense_models_and_the_others_stay(make):
    dense = tiny(5).eval()
    plan, x = make(dense), images(4)
    model = compress(dense, plan).eval()
    with torch.no_grad():                       # as if it had been trained
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    left = dataclasses.replace(plan.blocks[0], tokens=Match(merged=0)) if isinstance(plan.blocks[0].tokens, Match) \
        else BlockPlan()
    wanted = compress(dense, dataclasses.replace(plan, blocks=(left, plan.blocks[1]))).eval()
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("blocks.0.")}
    wanted.load_state_dict(state, strict=False)
    torch.testing.assert_close(logits(undone(dense, model, plan, 0), x), logits(wanted, x), rtol=0, atol=0)


def test_blame_is_what_is_gained_where_a_block_is_undone_and_nothing_where_nothing_is_cut():
    dense, x = tiny(5).eval(), images(4)
    plan = match_plan(dense, 0, 6)
    found = blame(dense, compress(dense, plan).eval(), plan, x)
    given, expected = outputs(compress(dense, plan).eval(), x), outputs(dense, x)
    assert (found[0] == 0).all()
    torch.testing.assert_close(found[1], output_of(dense).apart(given, expected), rtol=1e-4, atol=1e-7)
    folded = full_plan(dense)
    with pytest.raises(InputError, match="deployed"):
        blame(dense, deploy(compress(dense, folded)), folded, x)


def test_streams_are_alike_by_cosine_and_by_centred_kernels():
    dense, x = tiny(5).eval(), images(8)
    model = compress(dense, match_plan(dense, 5, 4)).eval()
    found, seen = similarity(dense, {"itself": dense, "it": model}, [(x[:3], None), (x[3:], None)]), []
    assert {name: each["itself"] for name, each in found.items()} == {name: pytest.approx([1, 1])
                                                                      for name in ("cosine", "CKA")}
    for of in (dense, model):
        handle = of.blocks[0].register_forward_hook(lambda m, i, out: seen.append(out[:, 0].double()))
        logits(of, x)
        handle.remove()
    a, b = (each - each.mean(dim=0) for each in seen)
    kernels = [each @ each.T for each in (a, b)]                # CKA as Kornblith et al. define it, by kernels (N, N)
    hsic = (kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm())
    assert found["CKA"]["it"][0] == pytest.approx(float(hsic), rel=1e-6)
    cosines = [float(torch.cosine_similarity(u, v, dim=0)) for u, v in zip(*seen)]
    assert found["cosine"]["it"][0] == pytest.approx(sum(cosines) / 8, rel=1e-6)


def test_corruptions_are_those_of_their_severity():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    m, s = (torch.tensor(each)[:, None, None] for each in (mean, std))
    shown = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    x = (shown - m) / s

    def seen(kind: str, severity: int) -> torch.Tensor:
        return corrupted(x, kind, severity, mean, std) * s + m
    torch.testing.assert_close(seen("brightness", 1), (shown + 0.3).clamp(0, 1))
    # of 75,264 values a deviation is known to 0.3 %
    assert float((seen("noise", 0) - shown).std()) == pytest.approx(0.08, rel=0.02)
    pixels = (shown[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), format="JPEG", quality=7)
    wanted = torch.from_numpy(np.asarray(Image.open(file)) / 255).permute(2, 0, 1)
    torch.testing.assert_close(seen("JPEG", 2)[0], wanted.float(), rtol=0, atol=1e-5)
    spreads = [float(seen("blur", severity).std()) for severity in range(3)]
    assert float(shown.std()) > spreads[0] > spreads[1] > spreads[2]
    with pytest.raises(InputError, match="fog"):
        corrupted(x, "fog", 0, mean, std)


MEAN, STD = (0.5,) * 3, (0.25,) * 3


def corrupted_rows(model: torch.nn.Module, targets: torch.Tensor, **settings) -> dict[tuple[str, int], dict]:
    """What `robustness` says of a model by corruption and severity; in the figure, too."""
    rows = robustness({"dense": model}, [(images(6), targets)], MEAN, STD, progress=False, **settings)
    axis = corruption_curves(rows).axes[list(CORRUPTIONS).index("JPEG")]
    drawn = [row["value"] for row in rows if row["corruption"] in ("", "JPEG")]
    assert axis.lines[0].get_ydata().tolist() == drawn and axis.get_ylim()[1] > max(drawn)
    plt.close("all")
    return {(row["corruption"], row["severity"]): row for row in rows}


def test_robustness_is_top_1_of_corrupted_images_or_how_far_the_output_moves():
    model, targets, worse = tiny(3).eval(), torch.arange(6) % 3, corrupted(images(6), "blur", 1, MEAN, STD)
    rows = corrupted_rows(model, targets)
    assert len(rows) == 1 + sum(map(len, CORRUPTIONS.values()))
    for key, shown in {("", -1): images(6), ("blur", 1): worse}.items():
        right = (logits(model, shown).argmax(dim=1) == targets).float().mean()
        assert rows[key]["measure"] == "top-1 (%)" and rows[key]["value"] == pytest.approx(100 * float(right))
    moved = corrupted_rows(model, targets, labelled=False)[("blur", 1)]
    p, q = (logits(model, each).log_softmax(dim=1) for each in (images(6), worse))
    assert moved["value"] == pytest.approx(float((p.exp() * (p - q)).sum(dim=1).mean()), rel=1e-4)
    assert "own output (nats)" in moved["measure"]
    model.reset_classifier(0)
    rows = corrupted_rows(model, targets)
    with torch.inference_mode():
        alike = torch.cosine_similarity(model(images(6)), model(worse), dim=1)
    assert rows[("", -1)]["value"] == 0
    assert rows[("blur", 1)]["value"] == pytest.approx(float((1 - alike).mean()), rel=1e-4)


@pytest.fixture
def study(tmp_path):
    """(dense checkpoint, compressed one, folder of 21 images of three classes, one of them broken)."""
    folder = write_easy_folder(tmp_path / "data", train=2)
    (folder / "val" / "green" / "3.png").write_bytes(b"no image")
    dense = tiny(3).eval()
    plan, classes = match_plan(dense, 6, 3), ["blue", "green", "red"]
    checkpoint.save(tmp_path / "small", compress(dense, plan), plan, classes=classes)
    return found_by(dense, info={"classes": classes, "made_by": {}}), tmp_path / "small", folder


def test_pictures_are_those_that_the_predictions_are_of_also_behind_a_broken_one(study, tmp_path):
    dense, small, folder = study
    with pytest.warns(UserWarning, match="3.png: can't be read"):
        found = what_changed(dense, small, folder, tmp_path / "out", config=QUIET)["small"]
    assert len(found.images) == len(found.changes.targets) == 20
    given = logits(dense.model, found.inputs(range(20)))
    torch.testing.assert_close(given.softmax(dim=1).max(dim=1).values, found.changes.dense_p[:, 0])
    assert [found.title(i) for i in range(20)] == [found.images.path(i).split("/")[-2] for i in range(20)]
    assert Changes.load(tmp_path / "out" / "small.safetensors").order() == found.changes.order()
    assert f"{int(found.changes.changed.sum())} of 20 images have another class" in found.summary()
    right = [int((each[:, 0] == found.changes.targets).sum()) for each in (found.changes.dense,
                                                                        found.changes.compressed)]
    assert f"top-1 {5 * right[0]:.1f} to {5 * right[1]:.1f} %" in found.summary()


def test_mapped_folders_are_called_by_their_names(tmp_path):
    folder = write_easy_folder(tmp_path / "data", train=2)
    (folder / "class_index.json").write_text('{"blue": 7, "green": 2, "red": 5}')
    dense = tiny(10).eval()
    found = what_changed(found_by(dense), found_by(compress(dense, match_plan(dense, 5, 4)).eval(),
                                                   match_plan(dense, 5, 4)), folder, tmp_path / "out",
                         config=QUIET)["compressed"]
    assert [found.title(i) for i in range(21)] == [found.images.path(i).split("/")[-2] for i in range(21)]
    assert found.called(7) == "blue" and found.called(3) == "class 3"
    assert {row["class"] for row in found.changes.by_class(found.called)} == {"blue", "green", "red"}


def test_an_explorer_shows_the_picture_its_tokens_and_what_both_models_say(study, tmp_path):
    dense, small, folder = study
    (folder / "val" / "green" / "3.png").unlink()
    every = what_changed(dense, small, folder, tmp_path / "out", config=QUIET)
    explorer, found = changes_explorer(every), every["small"]
    explorer.which.value = "all images"
    for place in (0, 5):
        explorer.image.value, explorer.block.value = place, 1
        number = found.changes.distance.argsort(descending=True)[place]
        label, p = found.told(number)["compressed"][0]
        assert explorer.chosen == number and f"<td>compressed</td><td>{label} {p:.2f}</td>" in explorer.line.value
        assert f"{found.changes.distance[number]:.4f}" in explorer.line.value
        assert explorer.cells.groups == found.tokens(int(number))[1].regions.tolist()
        assert len(set(explorer.cells.groups)) == 16 - 6 - 3
    assert "image/png" in explorer._repr_mimebundle_()

    async def through() -> set[int]:
        """On a page no block is undone while a slider goes on moving."""
        known = set(explorer.blames)
        for place in (8, 9, 10):
            explorer.image.value = place
        assert set(explorer.blames) == known
        await asyncio.sleep(PAUSE + 0.1)
        return set(explorer.blames) - known
    assert asyncio.run(through()) == {("small", explorer.chosen)}


def test_beside_a_picture_stands_what_both_models_look_at_and_without_a_classifier_the_nearest_image_of_each(study,
                                                                                                        tmp_path):
    dense, small, folder = study
    (folder / "val" / "green" / "3.png").unlink()
    found = what_changed(dense, small, folder, tmp_path / "out", config=QUIET)["small"]
    shown = found.beside(2)
    assert list(shown) == ["dense: rollout", "compressed: rollout"]
    for name, model in (("dense", found.dense.model), ("compressed", found.compressed.model)):
        values = looked_at(model, found.inputs([2]))[0]
        wanted = over_grey(found.picture(2), values, found.dense.plan.shape)
        np.testing.assert_array_equal(shown[f"{name}: rollout"], wanted)
    assert not np.array_equal(*shown.values())
    figure = found.strip(2)
    assert [axis.get_title() for axis in figure.axes[:3]] == ["picture", "block 0: 10 tokens", "block 1: 7 tokens"]
    assert [axis.get_title() for axis in found.token_sheet([2, 3]).axes[1:4:2]] == ["7 tokens"] * 2
    features = tiny(0, seed=3).eval()
    plan = match_plan(features, 6, 3)
    found = what_changed(found_by(features), found_by(compress(features, plan).eval(), plan), folder, tmp_path / "more",
                         config=QUIET)["compressed"]
    shown, i = found.beside(4), int(found.changes.compressed[4, 0])
    np.testing.assert_array_equal(shown["compressed: nearest"], found.picture(i))
    assert found.told(4)["compressed"][0][0] == Path(found.images.path(i)).name
    plt.close("all")


@pytest.fixture
def several(study, tmp_path):
    """(dense, {name: model of another plan}, folder of 20 images)."""
    dense, small, folder = study
    (folder / "val" / "green" / "3.png").unlink()
    plans = {"few": match_plan(dense.model, 1, 0), "many": match_plan(dense.model, 8, 4),
             "units": full_plan(dense.model)}
    return dense, {name: found_by(compress(dense.model, plan).eval(), plan) for name, plan in plans.items()}, folder


def test_several_models_are_compared_in_one_pass_and_more_are_added_to_it(several, tmp_path, monkeypatch):
    dense, models, folder = several
    passes, between = [], Changes.between

    def counted(dense, models, *args, **settings):
        passes.append(list(models))
        return between(dense, models, *args, **settings)
    monkeypatch.setattr(Changes, "between", counted)
    some = {name: models[name] for name in ("few", "many")}
    first = what_changed(dense, some, folder, tmp_path / "out", config=QUIET)
    found = what_changed(dense, models, folder, tmp_path / "out", config=QUIET)
    assert passes == [["few", "many"], ["units"]] and list(found) == ["few", "many", "units"]
    for name, each in models.items():                           # each as if it had been compared alone
        alone = what_changed(dense, each, folder, tmp_path / name, config=QUIET)["compressed"].changes
        for of in (found, first) if name in first else (found,):
            assert all(torch.equal(value, getattr(of[name].changes, field)) for field, value in vars(alone).items())
    del passes[:]
    with torch.no_grad():
        models["many"].model.head.bias += 1                     # as if it had been trained again
    again = what_changed(dense, models, folder, tmp_path / "out", config=QUIET)
    assert passes == [["many"]] and not torch.equal(again["many"].changes.distance, found["many"].changes.distance)
    what_changed(dense, models, folder, tmp_path / "out", images=7, config=QUIET)
    assert passes[1:] == [list(models)]


def test_models_are_called_by_the_end_of_their_paths_that_tells_them_apart():
    assert named("runs/a/small") == {"small": "runs/a/small"}
    assert list(named(["runs/a/small", Path("runs/b/other")])) == ["small", "other"]
    assert list(named(["runs/a/small", "runs/b/small", "weights.pth"])) == ["a-small", "b-small", "weights.pth"]
    with pytest.raises(InputError, match="two have one name"):
        named(["runs/a/small", "runs/a/small"])


def test_the_overview_says_of_each_model_what_slow_loops_say(several, tmp_path):
    dense, models, folder = several
    found = what_changed(dense, models, folder, tmp_path / "out", config=QUIET)
    shown = overview(found)
    assert list(shown.index) == ["dense", "few", "many", "units"]
    for name, each in found.items():
        changes, line = each.changes, shown.loc[name]
        before, after = ([int(a) == int(b) for a, b in zip(of[:, 0], changes.targets)]
                         for of in (changes.dense, changes.compressed))
        assert line["top-1 (%)"].startswith(f"{5 * sum(after):.1f} ± ") and len(after) == 20
        assert shown.loc["dense", "top-1 (%)"].startswith(f"{5 * sum(before):.1f} ± ")
        assert line["images lost"] == str(sum(a and not b for a, b in zip(before, after)))
        assert line["images gained"] == str(sum(b and not a for a, b in zip(before, after)))
        gained = {k: sum(after[i] - before[i] for i in range(20) if changes.targets[i] == k) for k in range(3)}
        assert (line["classes lost"], line["classes gained"]) == (str(sum(v < 0 for v in gained.values())),
                                                                  str(sum(v > 0 for v in gained.values())))
        mean = sum(changes.distance.tolist()) / 20
        error = (sum((d - mean) ** 2 for d in changes.distance.tolist()) / 19 / 20) ** 0.5
        mine, its = map(float, line["distance"].split(" ± "))
        assert mine == pytest.approx(mean, abs=5e-5) and its == pytest.approx(error, rel=0.1)   # two figures are shown
        assert line["ECE (points)"] == f"{changes.calibration_error()['compressed']:.1f}"
    figures = Compared.of_classes(found)
    assert len(figures["classes"].axes) == 3
    assert len(figures["reliability"].axes[0].collections) == 4                 # the dense one's points, too
    plt.close("all")


def test_pictures_that_all_or_one_model_alone_has_wrong_are_told(several, tmp_path):
    dense, models, folder = several
    found = what_changed(dense, models, folder, tmp_path / "out", config=QUIET)
    names = list(found)
    for name in names:                                          # predictions are made up, so that every case is there
        changes = found[name].changes
        wrong = torch.tensor([bool(i >> names.index(name) & 1) for i in range(20)])
        tops = torch.where(wrong, (changes.targets + 1) % 3, changes.targets)
        dense_tops = torch.where(torch.arange(20) % 5 == 4, (changes.targets + 1) % 3, changes.targets)
        made = dataclasses.replace(changes, compressed=tops[:, None], dense=dense_tops[:, None])
        found[name] = dataclasses.replace(found[name], changes=made)
    for bit, name in enumerate(names):
        shown, distance = pictures(found, name), found[name].changes.distance
        assert all(distance[a] >= distance[b] for each in shown.values() for a, b in zip(each, each[1:]))
        assert set(shown["wrong in all"]) == {i for i in range(20) if i % 8 == 7} and len(shown["all images"]) == 20
        assert set(shown["wrong in this one only"]) == {i for i in range(20) if i % 8 == 1 << bit and i % 5 != 4}


def test_the_explorer_has_a_menu_of_models_and_each_has_its_own_order(several, tmp_path):
    dense, models, folder = several
    found = what_changed(dense, models, folder, tmp_path / "out", config=QUIET)
    explorer = changes_explorer(found)
    explorer.which.value, explorer.image.value = "all images", 4
    number = explorer.chosen
    explorer.model.value = "many"
    assert explorer.chosen == number == pictures(found, "many")["all images"][explorer.image.value]
    assert f"{found['many'].changes.distance[number]:.4f}" in explorer.line.value
    assert explorer.cells.groups == found["many"].tokens(number)[0].regions.tolist()
    for name, each in found.items():                            # what all of them say
        label, p = each.told(number)["compressed"][0]
        assert f"<td>{name}</td><td>{label} {p:.2f}</td>" in explorer.line.value
    explorer.image.value = 19
    for name in found:
        explorer.model.value = name
        for which in explorer.which.options:
            explorer.which.value = which
            wanted = pictures(found, name)[which]
            assert explorer.numbers == (wanted or pictures(found, name)["all images"])
            assert explorer.image.max == len(explorer.numbers) - 1 and explorer.chosen == explorer.numbers[0]
    plt.close("all")


def test_what_can_not_be_compared_is_refused(study, tmp_path):
    dense, small, folder = study
    with pytest.raises(InputError, match="another shape"):
        what_changed(found_by(tiny(3, embed_dim=36)), small, folder, tmp_path, config=QUIET)
    other = found_by(dense.model, info={"classes": ["blue", "green", "white"], "made_by": {}})
    with pytest.raises(InputError, match="other classes .*red.*white|other classes .*white.*red"):
        what_changed(other, small, folder.parent / "data", tmp_path, config=QUIET)
    with pytest.raises(InputError, match="already compressed"):
        what_changed(small, small, folder, tmp_path, config=QUIET)


def test_figures_show_the_values(study, tmp_path):
    changes, odd = told(), "US$ 5_$"
    figure = changed_pictures([np.zeros((8, 8, 3))], [{"dense": [(odd, 1.0)]}], np.zeros((2, 1)), [odd])
    plt.close(figure.canvas.draw() or figure)                                   # no formula of a name
    models = {"one": changes.by_class(), "other": told(2).by_class()}
    figure = class_changes(models, most=1)
    for axis, rows in zip(figure.axes, models.values()):
        moved = [row for row in rows if row["difference"]]
        assert [bar.get_width() for bar in axis.patches] == pytest.approx([moved[0]["difference"],
                                                                           moved[-1]["difference"]])
    bins = changes.reliability()
    figure = reliability(bins, changes.calibration_error())
    assert figure.axes[0].lines[1].get_xydata().tolist() == [[sure, right] for sure, right, _ in bins["dense"]]
    figure = stream_similarity({"cosine": {"a": [1, 0.7], "b": [1, 0.6]}, "CKA": {"a": [1, 0.9], "b": [1, 0.5]}})
    assert figure.axes[1].lines[1].get_ydata().tolist() == [1, 0.5]
    with pytest.raises(InputError, match="nothing to show"):
        changed_pictures([], [], np.zeros((2, 0)), [])
    plt.close("all")
