"""Scrubbing through a search: what is shown is the journal's own, the belief the search's own, and nothing is ever
written."""
import asyncio
import base64
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from vitlab.plan.cost import macs_of
from vitlab.plan.shape import ViTShape
from vitlab.plots import moment
from vitlab.runtime.files import InputError
from vitlab.search import Budget, SearchSpace, Study
from vitlab.search.strategies import Settings
from vitlab.search.study import JOURNAL, Evaluation, read_journal
from vitlab.workbench.explore import study as module
from vitlab.workbench.explore.study import Watched, measured, study_explorer, told, watch

matplotlib.use("agg")
SHAPE = ViTShape(img_size=(80, 112), patch_size=(16, 16), embed_dim=28, depth=2, num_heads=7, head_dim=4,
                 num_neurons=53, num_classes=3)
SPACE = SearchSpace(shape=SHAPE)
QUICK = Settings(population=5, evaluations=11, candidates=12, refinements=1)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def objective(policy: np.ndarray) -> dict[str, float]:
    distance = float(((policy - 0.2)**2).sum())
    return {"value": -distance, "distill_loss": distance, "top1_pct": 90 - 40 * distance, "loss": 1 + distance}


def made_study(folder: Path, evaluations: int = 11, measure=objective, **changes) -> Study:
    """A study of 5 dimensions with so many evaluations by an objective that takes no time."""
    def cost(policies: np.ndarray) -> np.ndarray:
        return macs_of(SHAPE, SPACE.counts(policies))["total"] / 1e9
    budget = Budget(limit=0.7 * float(cost(np.zeros((1, SPACE.size)))[0]), cost=cost, max_ratio=0.5, size=SPACE.size)
    options = dataclasses.replace(QUICK, evaluations=evaluations, **changes)
    found = Study(folder, SPACE, budget, options=options, about={"metric": "distill_loss"})
    found.run(measure, progress=False)
    return found


def parts(explorer) -> tuple:
    """The slider, the play button, the follow box, the choice of dimension, the text and the picture."""
    (row, dimension, text, picture), (place, play, follow) = explorer.children, explorer.children[0].children
    assert row is explorer.children[0]
    return place, play, follow, dimension, text, picture


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


@pytest.mark.parametrize("changes", [{}, {"batch": 3}, {"initial": "sensitivity"}],
                         ids=["one by one", "in batches", "from sensitivity"])
def test_the_belief_after_k_evaluations_is_what_the_search_expected_of_its_next_proposal(tmp_path, changes):
    found = made_study(tmp_path, **changes)
    watched, journal = watch(tmp_path), read_journal(tmp_path)
    asked = [e for e in journal if e.expected]
    assert len(asked) >= 5 and found.evaluations == journal
    for e in asked:
        mean, deviation = watched.belief(journal[:e.index])(np.array(e.policy)[None])
        # The same fit of the same numbers; an optimiser's last digits may depend on how memory is laid out.
        assert (mean[0], deviation[0]) == pytest.approx((e.expected["mean"], e.expected["deviation"]), rel=1e-5,
                                                        abs=1e-9)


def test_at_evaluation_k_stand_the_best_of_the_first_k_and_the_proposal_that_the_journal_has_next(tmp_path):
    found = made_study(tmp_path)
    explorer = study_explorer(found)
    place, _, _, _, text, _ = parts(explorer)
    assert (place.min, place.max, place.value) == (0, 11, 11)
    for k in (2, 5, 7, 10):
        place.value = k
        values, following = [e.value for e in found.evaluations[:k]], found.evaluations[k]
        figure = explorer.figure()
        dots, steps = figure.axes[0].lines[:2]
        assert list(dots.get_ydata()) == values and list(dots.get_xdata()) == list(range(k))
        assert list(steps.get_ydata()) == [max(values[:i + 1]) for i in range(k)]
        measured = next(line for line in figure.axes[0].lines if line.get_label() == "next, then measured")
        assert (list(measured.get_xdata()), list(measured.get_ydata())) == ([k], [following.value])
        assert f"best so far <b>{max(values):.4g}</b>" in text.value
        assert f"next: number {k} by {following.by}" in text.value
        assert ("log EI" in text.value) == (k >= 5)             # the population was proposed without a belief
    place.value = 11
    assert "next" not in text.value and f"<b>{found.best.value:.4g}</b> (number {found.best.index}" in text.value


def test_the_curves_run_through_the_best_and_the_next_policy_along_the_chosen_dimension(tmp_path):
    found = made_study(tmp_path)
    explorer = study_explorer(tmp_path)
    place, _, _, dimension, _, picture = parts(explorer)
    place.value, before = 8, picture.picture
    dimension.value = SPACE.names[3]
    assert picture.picture != before
    seen, following = found.evaluations[:8], found.evaluations[8]
    best = max(seen, key=lambda e: e.value)
    _, belief, acquisition = explorer.figure().axes
    assert belief.get_xlabel() == f"fraction cut of {SPACE.names[3]}"
    predict = watch(tmp_path).belief(seen)
    for curve, dot, policy in zip(belief.lines[::2], belief.lines[1::2], (best.policy, following.policy)):
        where = np.array([[*policy[:3], x, *policy[4:]] for x in curve.get_xdata()])
        np.testing.assert_allclose(curve.get_ydata(), predict(where)[0], rtol=1e-9)
        assert list(dot.get_xdata()) == [policy[3]]
    # log EI where the next policy stands is what the search chose it for, but for the drawn curve's straight pieces.
    assert acquisition.lines[3].get_ydata()[0] == pytest.approx(following.expected["log_ei"], abs=0.2)


def test_without_two_evaluations_the_figure_says_what_is_missing(tmp_path):
    found = made_study(tmp_path)
    lines = (tmp_path / JOURNAL).read_text().splitlines(keepends=True)
    (tmp_path / JOURNAL).write_text(lines[0])
    explorer = study_explorer(tmp_path)
    assert "two evaluations are needed" in explorer.figure().axes[1].texts[0].get_text()
    (tmp_path / JOURNAL).unlink()
    assert told(watch(tmp_path), [], 1).startswith("nothing was measured yet")
    assert len(study_explorer(found).figure().axes) == 3


def test_following_moves_to_the_end_and_ends_when_unchecked(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.01)
    made_study(tmp_path)
    lines = (tmp_path / JOURNAL).read_text().splitlines(keepends=True)
    (tmp_path / JOURNAL).write_text("".join(lines[:6]))
    explorer = study_explorer(tmp_path)
    place, play, follow, *_ = parts(explorer)

    async def session() -> None:
        follow.value = True
        await asyncio.sleep(0.1)
        assert place.value == 6
        with open(tmp_path / JOURNAL, "a") as journal:
            journal.write("".join(lines[6:9]) + lines[9][:40])              # the last one is being written
        await asyncio.sleep(0.5)
        assert (place.value, place.max, play.max) == (9, 9, 9)
        follow.value = False
        await asyncio.sleep(0.1)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        (tmp_path / JOURNAL).write_text("".join(lines))
        await asyncio.sleep(0.1)
        assert place.max == 9
        follow.value = True
        await asyncio.sleep(0.3)
        assert place.max == 11
        explorer.close()
        await asyncio.sleep(0.1)
        assert asyncio.all_tasks() == {asyncio.current_task()}
    asyncio.run(session())


def test_a_journal_that_was_begun_anew_is_not_believed_by_what_stood_there_before(tmp_path, monkeypatch):
    made_study(tmp_path / "old")
    made_study(tmp_path / "new", measure=lambda policy: objective(1 - policy))
    explorer = study_explorer(tmp_path / "old")
    place, _, follow, *_ = parts(explorer)
    place.value = 7

    async def session() -> None:
        (tmp_path / "old" / JOURNAL).write_bytes((tmp_path / "new" / JOURNAL).read_bytes())
        follow.value = True
        await asyncio.sleep(0)
        follow.value = False
        await asyncio.sleep(0.3)
    asyncio.run(session())
    place.value = 7
    fresh = study_explorer(tmp_path / "new")
    parts(fresh)[0].value = 7
    for old, new in zip(explorer.figure().axes, fresh.figure().axes):
        assert [list(line.get_ydata()) for line in old.lines] == [list(line.get_ydata()) for line in new.lines]


def test_looking_writes_nothing_even_where_the_last_line_was_cut_short(tmp_path, recwarn):
    made_study(tmp_path)
    with open(tmp_path / JOURNAL, "a") as journal:
        journal.write('{"index": 11, "pol')
    before = content(tmp_path)
    explorer = study_explorer(tmp_path)
    for k in (0, 1, 6, 11):
        parts(explorer)[0].value = k
        explorer.figure()
    assert content(tmp_path) == before and not [w for w in recwarn if "cut short" in str(w.message)]


def test_a_journal_damaged_while_followed_is_told_and_ends_the_following(tmp_path):
    made_study(tmp_path)
    explorer = study_explorer(tmp_path)
    _, _, follow, _, text, _ = parts(explorer)
    lines = (tmp_path / JOURNAL).read_text().splitlines(keepends=True)

    async def session() -> None:
        (tmp_path / JOURNAL).write_text(lines[0] + "<b>\n" + lines[2])
        follow.value = True
        await asyncio.sleep(0.1)
        assert follow.value is False and "line 2 is damaged" in text.value and asyncio.all_tasks() == {
            asyncio.current_task()}
    asyncio.run(session())


@pytest.mark.parametrize(("content", "says"),
                         [(None, "no such file"), ("[]", "no study"), ('{"space": {}}', "no study")])
def test_a_folder_that_holds_no_study_is_refused_by_name(tmp_path, content, says):
    if content is not None:
        (tmp_path / "study.json").write_text(content)
    with pytest.raises(InputError, match=f"study.json: {says}"):
        study_explorer(tmp_path)


def test_where_there_are_no_widgets_the_explorer_is_a_picture_of_its_moment_drawn_once(tmp_path, monkeypatch):
    made_study(tmp_path)
    drawn = []
    monkeypatch.setattr(module, "moment", lambda *args, **more: drawn.append(1) or moment(*args, **more))
    explorer = study_explorer(tmp_path)
    bundle = explorer._repr_mimebundle_()
    picture = base64.b64decode(bundle["image/png"])
    assert picture.startswith(b"\x89PNG") and "application/vnd.jupyter.widget-view+json" in bundle
    assert picture == explorer.children[-1].picture and drawn == [1]
    parts(explorer)[0].value = 4
    assert explorer._repr_mimebundle_()["image/png"] != bundle["image/png"]


def test_what_was_measured_has_its_standard_error_where_the_journal_knows_it():
    known = Evaluation(index=0, by="gp", policy=(0.0,), cost=1.0, value=-.25,
                       measures={"distill_loss": .25, "distill_loss_se": .03125})
    found = SimpleNamespace(metric="distill_loss")
    found.error = lambda *args: Watched.error(found, *args)
    assert measured(found, known) == "-0.25 ± 0.031" and measured(found, known, "distill_loss") == "0.25 ± 0.031"
    found.metric = "top1_pct"
    assert measured(found, known) == "-0.25"
    figure = moment([1, 3], total=4, label="v", dimension="neurons 0", lines={}, errors=[.5, None])
    bars = [part for each in figure.axes[0].collections for part in each.get_segments() if len(part)]
    assert [part[:, 1].tolist() for part in bars] == [[.5, 1.5]]
