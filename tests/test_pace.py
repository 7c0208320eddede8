"""Stages on one bar: what is said before they begin, and how long what is left of them takes."""
import pytest
from segmenting_fixtures import pictures, small
from training_fixtures import images, one_thread, tiny  # noqa: F401

from vitlab.workbench import pace
from vitlab.workbench.pace import Pace, images_per_second, lasting

STAGES = {"scores": 100.0, "search": 300.0, "refit": 600.0}


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(pace.time, "monotonic", lambda: self.now)


def test_stages_are_numbered_and_what_they_take_is_said_before_the_first(capsys):
    with Pace("tonight", STAGES, 50.0) as found:
        err = capsys.readouterr().err
        assert "tonight: 3 stages, about 20 seconds at 50 images a second (scores 10 %, search 30 %, refit 60 %)" in err
        assert found.total == 1000 and found.seconds == 20
        for number, name in enumerate(STAGES, 1):
            with found.stage(name):
                assert found.bar.desc == f"tonight {number}/3, {name}"
    assert found.done == found.bar.n == 1000 and "100%" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "0 seconds"), (59.4, "59 seconds"), (60, "1.0 minutes"),
                                               (5000, "83.3 minutes")])
def test_a_time_in_words(seconds, words):
    assert lasting(seconds) == words


def test_nothing_is_printed_without_progress(capsys):
    with Pace("tonight", STAGES, 50.0, progress=False) as found:
        for name in STAGES:
            with found.stage(name):
                found.add(1)
    assert capsys.readouterr() == ("", "") and found.done == 1000


def test_what_is_left_takes_as_long_as_what_is_done_says(monkeypatch):
    clock = Clock(monkeypatch)
    with Pace("tonight", STAGES, 50.0, progress=False) as found:
        assert found.seconds_of("refit") == 12 and found.seconds_of("search", "refit", "another") == 18
        with found.stage("scores"):
            clock.now += 4
            found.add(100)
        assert found.seconds_of("refit") == 12                                  # a tenth is done: too little to say
        with found.stage("search"):
            found.add(300)
            clock.now += 12
        assert found.done == 400 and found.seconds_of("refit") == pytest.approx(600 * 16 / 400)


def test_a_stage_is_worth_what_was_thought_where_less_was_done_and_no_more_on_the_bar():
    with Pace("tonight", STAGES, 50.0) as found:
        found.add(7)                                                            # before any stage: it counts for itself
        with found.stage("scores"):
            found.add(30)
        assert found.done == 107
        with found.stage("search"):
            found.add(350)
        assert found.done == found.bar.n == 457
        with found.stage("refit"):
            found.add(5000)
        assert found.done == 5457 and found.bar.n == found.bar.total == 1000


def test_a_stage_inside_another_is_counted_by_itself():
    with Pace("tonight", STAGES, 50.0, progress=False) as found:
        with found.stage("scores"):
            found.add(10)
            with found.stage("refit"):
                found.add(1)
            assert found.done == 610 and found.at == 2
            found.add(20)
        assert found.done == 700 and found.named is None


def test_what_is_gone_through_is_counted_as_it_is_done():
    seen = []
    with Pace("tonight", STAGES, 50.0, progress=False) as found, found.stage("refit"):
        for item in found.over(iter("abc"), 3, 21.0):
            seen.append((item, found.done))
        assert seen == [("a", 0.0), ("b", 7.0), ("c", 14.0)] and found.done == 21


def test_the_rate_is_of_a_second_forward_once_the_machine_is_warm(monkeypatch):
    times = iter([0.0, 10.0, 10.5] * 2)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(times))
    assert images_per_second(tiny().eval(), images(7)) == images_per_second(small(), pictures(7)) == 7 / 0.5


def test_what_was_there_already_says_nothing_of_how_long_the_rest_takes():
    pace = Pace("work", {"read": 100.0, "made": 100.0}, rate=0.5, progress=False)
    with pace.stage("read"):
        pass                                                                    # taken from files, in no time
    assert pace.seconds_of("made") == 200
