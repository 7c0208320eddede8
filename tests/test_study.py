"""A study that is killed anywhere goes on as if nothing had happened; what its folder holds is checked, not
believed."""
import dataclasses
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from comparing import killed_after

from vitlab.plan.cost import macs_of
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import LOCK, InputError, read_lines
from vitlab.search import Budget, SearchSpace, Study
from vitlab.search import study as module
from vitlab.search.allocation import levels
from vitlab.search.sampling import Problem
from vitlab.search.sensitivity import SENSITIVITY, start_policies
from vitlab.search.strategies import Proposal, Settings
from vitlab.search.study import JOURNAL, read_journal

SHAPE = ViTShape(img_size=(80, 112), patch_size=(16, 16), embed_dim=28, depth=2, num_heads=7, head_dim=4,
                 num_neurons=53, num_classes=3)
SPACE = SearchSpace(shape=SHAPE)
QUICK = Settings(population=5, evaluations=9, candidates=12, refinements=1)
RUNS = {f"{strategy} {batch}": (strategy, batch) for strategy in ("gp", "random") for batch in (1, 3)}


def budget(part: float = 0.7, tolerance: float = 0.02, space: SearchSpace = SPACE) -> Budget:
    def cost(policies: np.ndarray) -> np.ndarray:
        return macs_of(space.shape, space.counts(policies))["total"] / 1e9
    return Budget(limit=part * float(cost(np.zeros((1, space.size)))[0]), cost=cost, max_ratio=0.5, size=space.size,
                  tolerance=tolerance)


def objective(policy: np.ndarray) -> dict[str, float]:
    value = -float(((policy - 0.2)**2).sum())
    return {"value": value, "top1_pct": 50 + value}


def study(folder: Path, strategy: str = "gp", batch: int = 1, **changed) -> Study:
    options = changed.pop("options", dataclasses.replace(QUICK, batch=batch))
    return Study(folder, changed.pop("space", SPACE), changed.pop("budget", budget()), strategy=strategy,
                 options=options, **changed)


def facts(found: Study | list) -> list[dict]:
    """All but the seconds."""
    evaluations = found.evaluations if isinstance(found, Study) else found
    return [{k: v for k, v in dataclasses.asdict(e).items() if k != "seconds"} for e in evaluations]


@pytest.fixture(scope="module", params=list(RUNS))
def undisturbed(request, tmp_path_factory) -> tuple[str, int, Path, list[dict]]:
    """(strategy, batch, folder, evaluations) of a run that nothing disturbed."""
    strategy, batch = RUNS[request.param]
    folder = tmp_path_factory.mktemp("study")
    whole = study(folder, strategy, batch)
    whole.run(objective, progress=False)
    return strategy, batch, folder, facts(whole)


def copied(source: Path, target: Path, journal: bytes) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    (target / "study.json").write_bytes((source / "study.json").read_bytes())
    (target / JOURNAL).write_bytes(journal)
    return target


def test_a_journal_has_one_line_per_evaluation_with_all_that_is_known_of_it(undisturbed):
    strategy, batch, folder, whole = undisturbed
    lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    assert len(lines) == 9 and [line["index"] for line in lines] == list(range(9))
    assert facts(read_journal(folder)) == whole
    for line in lines:
        policy = np.array(line["policy"])
        assert line["value"] == objective(policy)["value"] and line["measures"] == {"top1_pct": 50 + line["value"]}
        assert line["cost"] == budget().cost(policy[None])[0] and budget().meets(policy).all() and line["seconds"] >= 0
    # A batch of 3 that begins before there are 5 of the population belongs to it.
    by = ["population"] * (5 if batch == 1
                           else 6) + ["gp"] * (4 if batch == 1 else 3) if strategy == "gp" else ["random"] * 9
    assert [line["by"] for line in lines] == by
    for line in lines:
        assert set(line["expected"]) == ({"log_ei", "mean", "deviation"} if line["by"] == "gp" else set())


def test_every_evaluation_is_on_the_disk_before_the_next_starts(tmp_path):
    seen = []

    def look(policy: np.ndarray) -> dict[str, float]:
        journal = tmp_path / JOURNAL
        seen.append(journal.read_bytes().count(b"\n") if journal.exists() else 0)
        return objective(policy)
    study(tmp_path).run(look, progress=False)
    assert seen == list(range(9))


def test_an_interrupt_in_the_objective_loses_nothing(undisturbed, tmp_path):
    strategy, batch, _, whole = undisturbed
    for stop in (0, 4, 7):
        folder, calls = tmp_path / str(stop), []

        def interrupted(policy: np.ndarray, calls=calls, stop=stop) -> dict[str, float]:
            calls.append(policy)
            if len(calls) == stop + 1:
                raise KeyboardInterrupt
            return objective(policy)
        with pytest.raises(KeyboardInterrupt):
            study(folder, strategy, batch).run(interrupted, progress=False)
        assert facts(read_journal(folder)) == whole[:stop]
        resumed = study(folder, strategy, batch)
        best = resumed.run(objective, progress=False)
        assert facts(resumed) == facts(read_journal(folder)) == whole and best.value == max(e["value"] for e in whole)


def test_a_journal_that_ends_after_any_line_is_taken_up_there(undisturbed, tmp_path):
    strategy, batch, folder, whole = undisturbed
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    for kept in range(len(lines) + 1):
        target = copied(folder, tmp_path / str(kept), b"".join(lines[:kept]))
        calls = []
        resumed = study(target, strategy, batch)
        resumed.run(lambda policy: calls.append(policy) or objective(policy), progress=False)       # noqa: B023
        assert facts(resumed) == whole and len(calls) == len(lines) - kept


def test_a_last_line_cut_at_any_byte_is_dropped_with_a_warning(undisturbed, tmp_path):
    strategy, batch, folder, whole = undisturbed
    content = (folder / JOURNAL).read_bytes()
    start = content[:-1].rindex(b"\n") + 1
    step = 1 if batch == 1 else 11                      # every byte
    for end in [*range(start, len(content) - 3, step), *range(len(content) - 3, len(content) + 1)]:
        target = copied(folder, tmp_path / "cut", content[:end])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # who only reads leaves the file alone
            assert facts(read_journal(target)) == facts(read_journal(target))
            assert (target / JOURNAL).read_bytes() == content[:end]
            caught.clear()
            found = read_journal(target, repair=True)
        complete = end >= len(content) - 1              # all but the line's end: nothing is missing
        assert facts(found) == (whole if complete else whole[:-1]), end
        assert len(caught) == (start < end < len(content) - 1)
        assert (target / JOURNAL).read_bytes() == (content[:end] if complete else content[:start])
    with pytest.warns(UserWarning, match="last line was cut short and is measured again"):
        read_journal(copied(folder, target, content[:-9]))
    for end in (start + 1, len(content) - 30, len(content) - 1):
        target = copied(folder, tmp_path / str(end), content[:end])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            resumed = study(target, strategy, batch)
        resumed.run(objective, progress=False)
        assert facts(resumed) == facts(read_journal(target)) == whole


KILLED = """
import os, signal, sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import test_study as t
from vitlab.runtime import files
from pathlib import Path
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
for moment in sys.argv[3:]:
    run, when, count = moment.split("-")
    if os.fork() == 0:                      # one import for all of them; the child dies, the parent goes on
        calls = []
        def objective(policy):
            calls.append(policy)
            if when == "measuring" and len(calls) == int(count):
                die()
            return t.objective(policy)
        if when == "writing":               # half of a line reaches the file
            def append(path, record, append=t.module.append_line):
                if record["index"] == int(count):
                    line = files.json.dumps(record).encode()
                    with open(path, "ab") as file:
                        file.write(line[:len(line) // 2])
                    die()
                append(path, record)
            t.module.append_line = append
        if when == "written":
            def append(path, record, append=t.module.append_line):
                append(path, record)
                if record["index"] == int(count):
                    die()
            t.module.append_line = append
        t.study(Path(moment), *t.RUNS[run]).run(objective, progress=False)
        os._exit(3)
    _, status = os.wait()
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_study_that_was_killed_ends_as_one_that_was_not(tmp_path):
    moments = {"measuring-1": 0, "measuring-8": 7, "writing-0": 0, "writing-7": 7, "written-4": 5, "written-6": 7}
    runs = {"gp 3": moments, "gp 1": {m: moments[m] for m in ("measuring-8", "writing-7", "written-4")}}
    here = Path(__file__).resolve().parent
    given = subprocess.run([sys.executable, "-c", KILLED, str(here), str(here.parent),
                            *(f"{run}-{moment}" for run, moments in runs.items() for moment in moments)],
                           cwd=tmp_path, capture_output=True, text=True, timeout=600,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert given.returncode == 0, given.stderr[-2000:]
    for run, moments in runs.items():
        whole = study(tmp_path / f"whole {run}", *RUNS[run])
        whole.run(objective, progress=False)
        for moment, measured in moments.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                resumed = study(tmp_path / f"{run}-{moment}", *RUNS[run])
            assert len(resumed.evaluations) == measured and bool(caught) == moment.startswith("writing")
            resumed.run(objective, progress=False)
            assert facts(resumed) == facts(read_journal(tmp_path / f"{run}-{moment}")) == facts(whole)


@pytest.mark.parametrize("number", [1, 4, 8])
@pytest.mark.parametrize("damage",
                         [lambda line: line[:len(line) // 2], lambda line: b"", lambda line: b"\0" * 40,
                          lambda line: b"[1]",
                                    lambda line: line.replace(b'"index": ', b'"index": 1'),
                          lambda line: line.replace(b'"by"', b'"who"'),
                                    lambda line: line.replace(b'"value": -', b'"value": NaN, "x": -'),
                          lambda line: b"\xff\xfe" + line])
def test_a_damaged_line_that_is_not_the_last_is_refused_by_number(undisturbed, tmp_path, number, damage):
    strategy, batch, folder, _ = undisturbed
    lines = (folder / JOURNAL).read_bytes().splitlines()
    lines[number - 1] = damage(lines[number - 1])
    content = b"".join(line + b"\n" for line in lines)
    copied(folder, tmp_path, content)
    with pytest.raises(InputError, match=f"{JOURNAL}: line {number} is damaged"):
        study(tmp_path, strategy, batch)
    assert (tmp_path / JOURNAL).read_bytes() == content                     # nothing is thrown away


def test_a_journal_of_another_number_of_dimensions_is_refused_by_line(tmp_path):
    whole = study(tmp_path)
    whole.run(objective, progress=False)
    lines = [json.loads(line) for line in (tmp_path / JOURNAL).read_text().splitlines()]
    lines[2]["policy"].append(0.1)
    (tmp_path / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match="line 3: a policy of 6 numbers; this space has 5 dimensions"):
        study(tmp_path)


def more_tokens() -> SearchSpace:
    return SearchSpace(shape=SHAPE, tokens="select_per_stage")


@pytest.mark.parametrize("name, change", [
    ("seed", lambda: {"seed": 1}), ("budget", lambda: {"budget": budget(0.71)}),
    ("budget", lambda: {"budget": budget(tolerance=0.03)}),
    ("budget", lambda: {"budget": dataclasses.replace(budget(), unit="latency_ms")}),
    ("space", lambda: {"space": more_tokens(), "budget": budget(space=more_tokens())}),
    ("space", lambda: {"space": SearchSpace(shape=SHAPE, settings={"ranked_by": "all"})}),
    ("strategy", lambda: {"strategy": "random"}), ("about", lambda: {"about": {"model": "b", "images": 64}}),
    ("about", lambda: {"about": None}), ("settings", lambda: {"options": dataclasses.replace(QUICK, candidates=13)}),
    ("settings", lambda: {"options": dataclasses.replace(QUICK, batch=2)}),
    ("about, seed", lambda: {"seed": 2, "about": {}}),
])
def test_the_folder_of_another_study_is_refused_naming_what_differs(tmp_path, name, change):
    same = {"about": {"model": "a", "images": 64}}
    first = study(tmp_path, **same)
    first.run(objective, progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != LOCK}
    assert set(before) == {"study.json", JOURNAL}
    with pytest.raises(InputError, match=r"study.json: another study \(.*, now ") as refused:
        study(tmp_path, **(same | change()))
    differences = str(refused.value).partition("(")[2].split("; ")
    assert {d.split(" ")[0].split(".")[0].strip(")") for d in differences if ", now " in d} == set(name.split(", "))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != LOCK} == before
    assert facts(study(tmp_path, **same)) == facts(first)


def test_a_journal_without_its_study_is_not_taken_for_another_ones(tmp_path):
    study(tmp_path).run(objective, progress=False)
    (tmp_path / "study.json").unlink()
    with pytest.raises(InputError, match=r"journal.jsonl: a journal without study.json"):
        study(tmp_path)


def test_empty_lines_at_the_end_of_a_journal_are_no_damage(tmp_path):
    whole = study(tmp_path)
    whole.run(objective, progress=False)
    with open(tmp_path / JOURNAL, "a") as file:
        file.write("\n\n")
    assert facts(read_journal(tmp_path)) == facts(whole)


def test_a_study_file_that_is_no_study_is_refused(tmp_path):
    for content in ("[]", "null", '{"format": "other"}', '{"settings": 3}'):
        (tmp_path / "study.json").write_text(content)
        with pytest.raises(InputError, match=r"study.json: another study \(no vitlab.study of version 1\)"):
            study(tmp_path)
    (tmp_path / "study.json").write_text('{"format"')
    with pytest.raises(InputError, match="study.json: not valid JSON"):
        study(tmp_path)


def test_more_evaluations_may_be_asked_for_later(undisturbed, tmp_path):
    strategy, batch, _, whole = undisturbed
    for evaluations in (1, 2, 5, 7, 9):
        part = study(tmp_path, strategy, options=dataclasses.replace(QUICK, batch=batch, evaluations=evaluations))
        part.run(objective, progress=False)
        assert facts(part) == whole[:evaluations]
    fewer = study(tmp_path, strategy, options=dataclasses.replace(QUICK, batch=batch, evaluations=3))
    best = fewer.run(lambda policy: pytest.fail("all is measured already"), progress=False)
    assert facts(fewer) == whole and best.value == max(e["value"] for e in whole)


def test_a_policy_with_the_counts_of_another_is_not_measured_again(tmp_path, monkeypatch):
    policy = np.array([0.3, 0.3, 0.3, 0.3, 0.3])
    offered = [policy, policy + 1e-9, policy + 0.1, policy]
    monkeypatch.setattr(module, "propose", lambda strategy, problem, policies, values, options, count, seed, *more:
                        [Proposal(policy=p, by="random", expected={}) for p in offered[len(policies):][:count]])
    for evaluations in (2, 4):                          # within a run, and after another
        calls = []
        again = study(tmp_path, options=dataclasses.replace(QUICK, evaluations=evaluations))
        again.run(lambda policy: calls.append(policy) or objective(policy), progress=False)          # noqa: B023
        assert len(calls) == 1
    values = [e.value for e in again.evaluations]
    assert values[0] == values[1] == values[3] != values[2]
    assert again.evaluations[3].measures == again.evaluations[0].measures == {"top1_pct": 50 + values[0]}


@pytest.mark.parametrize("given", [{"value": math.nan}, {"value": math.inf}, {"value": -math.inf}, {"top1_pct": 3.0}])
def test_an_objective_without_a_finite_value_is_refused_and_not_written(tmp_path, given):
    calls = []

    def sometimes(policy: np.ndarray) -> dict[str, float]:
        calls.append(policy)
        return given if len(calls) == 3 else objective(policy)
    with pytest.raises(InputError, match="the objective gave .* for policy 2; a finite value"):
        study(tmp_path).run(sometimes, progress=False)
    assert len(read_journal(tmp_path)) == 2
    resumed = study(tmp_path)
    resumed.run(objective, progress=False)
    whole = study(tmp_path / "whole")
    whole.run(objective, progress=False)
    assert facts(resumed) == facts(whole)


def test_the_best_is_the_first_of_the_largest_values(tmp_path):
    fresh = study(tmp_path)
    with pytest.raises(InputError, match="nothing was measured yet"):
        _ = fresh.best
    values = iter([1.0, 3.0, 2.0, 3.0, 0.0, -1.0, 3.0, 2.0, 0.5])
    best = fresh.run(lambda policy: {"value": next(values)}, progress=False)
    assert best is fresh.best and (best.index, best.value) == (1, 3.0)


ALONE = 1 + sum(map(len, levels(SPACE)))        # policies that a start from sensitivity measures first


def sensitive(folder: Path, **changed) -> Study:
    return study(folder, options=dataclasses.replace(QUICK, initial="sensitivity", **changed))


def test_a_start_from_sensitivity_measures_each_dimension_alone_and_begins_with_what_follows(tmp_path):
    calls, found = [], sensitive(tmp_path)
    found.run(lambda policy: calls.append(policy) or objective(policy), progress=False)
    assert len(calls) == ALONE + 9 and (tmp_path / SENSITIVITY).read_bytes().count(b"\n") == ALONE
    assert found.spent == sensitive(tmp_path).spent == len(calls)
    assert not calls[0].any() and all((policy > 0).sum() == 1 for policy in calls[1:ALONE])
    # half of 5, the rest as ever
    assert [e.by for e in found.evaluations] == ["sensitivity"] * 2 + ["population"] * 3 + ["gp"] * 4
    first = start_policies(Problem(SPACE, budget()), read_lines(tmp_path / SENSITIVITY), 1, 0)[0]
    assert (calls[ALONE] == first).all() and tuple(first) == found.evaluations[0].policy
    assert budget().meets(np.array([e.policy for e in found.evaluations])).all()
    varied = study(tmp_path / "varied")
    varied.run(objective, progress=False)
    assert [e.policy for e in found.evaluations[2:5]] == [e.policy for e in varied.evaluations[:3]]
    assert varied.spent == len(varied.evaluations) == 9 and sensitive(tmp_path / "new").spent == 0


@pytest.mark.parametrize("batch", [1, 2])
def test_given_starts_follow_the_first_that_sensitivity_gives_and_all_are_measured_once(tmp_path, batch):
    starts, met = budget().project(np.random.default_rng(0).uniform(0, 0.5, (2, SPACE.size)))
    assert met.all()
    plain, found = sensitive(tmp_path / "plain", batch=batch), sensitive(tmp_path / "found", batch=batch)
    plain.run(objective, progress=False)
    found.run(objective, starts=starts, progress=False)
    first, *others = [e.policy for e in plain.evaluations[:2]]
    assert [e.policy for e in found.evaluations[:4]] == [first, *map(tuple, starts), *others]
    assert [e.by for e in found.evaluations[:5]] == ["sensitivity"] * 4 + ["population"]
    again = sensitive(tmp_path / "found", batch=batch)
    again.run(lambda policy: pytest.fail("all is measured already"), starts=starts, progress=False)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_search_whose_time_is_over_ends_with_one_policy_at_least_and_goes_on_from_there(tmp_path, monkeypatch, batch):
    whole, found = study(tmp_path / "whole", batch=batch), study(tmp_path / "found", batch=batch)
    whole.run(objective, progress=False)
    found.run(objective, until=0.0, progress=False)
    assert facts(found) == facts(whole)[:1]
    clock = iter(range(100))
    monkeypatch.setattr("vitlab.search.study.time.monotonic", lambda: next(clock))
    # at 0 a turn begins, at 1 its first policy
    found.run(objective, until=2, progress=False)
    assert facts(found) == facts(whole)[:2]
    study(tmp_path / "found", batch=batch).run(objective, progress=False)
    assert facts(study(tmp_path / "found", batch=batch)) == facts(whole)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("stop", [0, 1, 9, ALONE - 1, ALONE, ALONE + 1, ALONE + 7])
def test_a_start_from_sensitivity_goes_on_where_it_was_killed(tmp_path, stop, batch):
    whole = sensitive(tmp_path / "whole", batch=batch)
    whole.run(objective, progress=False)
    calls = []
    with pytest.raises(KeyboardInterrupt):
        sensitive(tmp_path / "killed", batch=batch).run(killed_after(stop, objective, calls), progress=False)
    resumed = sensitive(tmp_path / "killed", batch=batch)
    resumed.run(lambda policy: calls.append(tuple(policy)) or objective(policy), progress=False)
    assert facts(resumed) == facts(whole) and len(calls) == len(set(calls)) == ALONE + 9
    assert (tmp_path / "killed" / SENSITIVITY).read_bytes() == (tmp_path / "whole" / SENSITIVITY).read_bytes()
    again = sensitive(tmp_path / "killed", batch=batch)
    again.run(lambda policy: pytest.fail("all is measured already"), progress=False)


def test_sensitivity_of_another_study_is_refused(tmp_path):
    sensitive(tmp_path, evaluations=1).run(objective, progress=False)
    with pytest.raises(InputError, match="another study .settings.initial sensitivity, now varied"):
        study(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / SENSITIVITY).write_bytes((tmp_path / SENSITIVITY).read_bytes())
    with pytest.raises(InputError, match="sensitivity.jsonl: a journal without study.json"):
        sensitive(tmp_path / "other")


def test_a_start_from_sensitivity_is_for_the_gp(tmp_path):
    with pytest.raises(InputError, match='initial "sensitivity" is a start of strategy "gp", not \'uniform\''):
        study(tmp_path / "new", "uniform", options=dataclasses.replace(QUICK, initial="sensitivity"))
    assert not (tmp_path / "new").exists()


def test_an_unknown_strategy_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="strategy 'sobol' .*gp.*random.*uniform"):
        study(tmp_path / "new", "sobol")
    assert not (tmp_path / "new").exists()


# Two blocks of three heads, of which one or two are cut; two in exactly one of the blocks meet the budget: (1, 2) and
# (2, 1),
# and, for a ratio of exactly 0, (1, 3) and (3, 1).
FEW = SearchSpace(shape=dataclasses.replace(SHAPE, num_heads=3, embed_dim=12), units=("heads",), tokens="none")


def few_left(folder: Path, monkeypatch, strategy: str, step: float = 1.0, population: int = 2) -> Study:
    """A study of FEW whose policies cost `step` less for each block that keeps one head, of 100; the budget is 99."""
    monkeypatch.setattr("vitlab.search.strategies.BLOCKS", 7)               # giving up takes longer otherwise
    monkeypatch.setattr("vitlab.search.sampling.ATTEMPTS", 7)
    limited = Budget(limit=99.0, cost=lambda p: 100 - step * (FEW.counts(p).heads == 1).sum(axis=1), max_ratio=0.5,
                     size=2, tolerance=0.001)
    return study(folder, strategy, space=FEW, budget=limited,
                 options=dataclasses.replace(QUICK, population=population, initial="random"))


def test_a_space_with_nothing_left_ends_the_search_with_a_warning(tmp_path, monkeypatch):
    for _ in range(2):                                                      # opened again there is still nothing
        found = few_left(tmp_path, monkeypatch, "random")
        with pytest.warns(UserWarning, match="ends after 2 evaluations: no other policy was found within 0.1% below 99 "
                                             "gmacs"):
            best = found.run(objective, progress=False)
        heads = [FEW.counts(np.array(e.policy)).heads[0].tolist() for e in found.evaluations]
        assert sorted(heads) == [[1, 2], [2, 1]] and best.value == max(e.value for e in found.evaluations)


def test_a_space_with_nothing_left_ends_the_search_of_the_gp_too(tmp_path, monkeypatch):
    found = few_left(tmp_path, monkeypatch, "gp")
    with pytest.warns(UserWarning, match="ends after [234] evaluations: no other policy"):
        found.run(objective, progress=False)


def test_the_gp_looks_around_the_best_before_it_gives_up(tmp_path, monkeypatch):
    found = few_left(tmp_path, monkeypatch, "gp")
    with pytest.warns(UserWarning, match="no other policy"):
        found.run(objective, progress=False)
    heads = {tuple(FEW.counts(np.array(e.policy)).heads[0].tolist()) for e in found.evaluations}
    assert {(1, 2), (2, 1)} < heads <= {(1, 2), (2, 1), (1, 3), (3, 1)}         # random draws find the first two alone


@pytest.mark.filterwarnings("ignore:the search ends")
def test_a_population_as_small_as_the_uniform_policies_does_not_end_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr("vitlab.search.strategies.BLOCKS", 7)
    found = study(tmp_path, options=dataclasses.replace(QUICK, population=4, batch=3))
    found.run(objective, progress=False)
    assert len(found.evaluations) == 9


def test_a_space_without_any_policy_in_the_budget_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no other policy was found within 0.1% below 99"):
        few_left(tmp_path, monkeypatch, "random", step=3.0).run(objective, progress=False)
