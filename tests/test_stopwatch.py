"""The stopwatch: sums by part, waiting for data apart from the work, and no waiting for a GPU before it is asked."""

import time

import pytest
import torch

from sft.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def test_parts_are_summed_and_what_lies_between_belongs_to_none(clock):
    watch = Stopwatch(torch.device("cpu"))
    for seconds in (1.0, 2.0):
        with watch.part("forward"):
            clock(seconds)
        clock(10.0)
        with watch.part("backward"):
            clock(4 * seconds)
    assert watch.seconds() == {"forward": 3.0, "backward": 12.0}
    assert watch.elapsed_s() == 35.0


def test_a_part_that_never_ran_took_no_time(clock):
    assert Stopwatch(torch.device("cpu")).seconds()["optimizer"] == 0.0


def test_waiting_for_each_item_is_timed_and_its_use_is_not(clock):
    def items():
        for item in "abc":
            clock(1.0)
            yield item
        clock(50.0)  # finding that there are no more is nobody's wait

    watch, seen = Stopwatch(torch.device("cpu")), []
    for item in watch.timed("data", items()):
        seen.append(item)
        clock(20.0)
    assert seen == ["a", "b", "c"]
    assert watch.seconds() == {"data": 3.0}


def test_an_error_inside_a_part_passes_through(clock):
    with pytest.raises(KeyError), Stopwatch(torch.device("cpu")).part("forward"):
        raise KeyError


def test_on_a_gpu_events_are_read_only_when_the_seconds_are_asked_for(monkeypatch):
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("record")

        def elapsed_time(self, end):
            assert happened[-1] == "synchronize"
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("synchronize"))
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(3):
        with watch.part("forward"):
            pass
    assert happened == ["record"] * 6
    assert watch.seconds() == {"forward": 0.75}
    assert watch.seconds() == {"forward": 0.75}, "read once"
    assert happened.count("synchronize") == 1
