"""A sweep on the terminal: the table's order, what a line tells, the time left."""

import dataclasses
import io

import pytest
import small_sweeps as small

from tune import progress
from tune.progress import LiveTable, table
from tune.trials import Trial

PARAMS = {"learning_rate": 1.23456e-4, "lora_rank": 8, "lora_target_modules": ("q_proj", "v_proj"), "augment": True}
FOUND = [
    small.trial(0, [0.5, 0.6], params={"learning_rate": 1e-4}),
    small.trial(1, [0.7], "stopped", params=PARAMS),
    small.trial(2, [0.4], "unfinished", params=PARAMS),
    small.trial(3, status="unfinished", params=PARAMS),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which a test sets."""
    now = {"s": 100.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: now["s"])
    return now


def test_the_running_ones_come_first_then_the_best():
    lines = table(FOUND, running=[2]).splitlines()
    assert lines[0].split() == ["trial", "status", "epoch", "Dice", "lr", "rank", "lora_target_modules", "augment"]
    assert [line.split()[0] for line in lines[1:]] == ["2", "1", "0", "3"]
    assert lines[1].split() == ["2", "running", "1", "0.4000", "0.000123", "8", "q_proj,v_proj", "true"]
    assert lines[3].split()[:8] == ["0", "(seed", "setting)", "finished", "2", "0.6000", "0.0001", "-"]
    assert lines[4].split()[1:4] == ["waiting", "0", "-"]
    assert len(set(map(len, lines))) == 1
    assert [line.split()[1] for line in table(FOUND, None).splitlines()[3:]] == ["unfinished", "unfinished"]


def test_a_repeat_says_of_what_and_the_rest_is_counted():
    lines = table([*FOUND, small.repeat(4, of=1, seed=43, dices=[0.9])], running=[], most=2).splitlines()
    assert lines[1].split()[:5] == ["4", "(trial", "1,", "seed", "43)"] and lines[-1] == "... and 3 more"
    assert table([], []).split() == ["trial", "status", "epoch", "Dice"]


def test_elsewhere_than_on_a_terminal_a_line_tells_what_has_changed(clock):
    stream, sweep = io.StringIO(), small.sweep()
    shown = LiveTable(sweep, 4, stream)
    shown.show(FOUND[:1], [])  # of an earlier session
    shown.show(FOUND[:1], [])
    assert stream.getvalue() == ""
    shown.show([FOUND[0], Trial(1, "random", {}, {})], [1])
    assert stream.getvalue() == ""  # nothing validated yet
    shown.show([FOUND[0], small.trial(1, [0.7], "unfinished")], [1])
    assert stream.getvalue() == "trial 1: epoch 1/9 Dice 0.7000\n"
    clock["s"] += 60
    stopped = Trial(1, "random", {}, {}, small.rows([0.7]), "stopped", "not among the best")
    shown.show([FOUND[0], stopped], [1])
    late = dataclasses.replace(stopped, rows=small.rows([0.7, 0.6]))  # several ranks learn of it a little later
    shown.show([FOUND[0], late], [])
    assert stream.getvalue().splitlines()[1:] == [
        "trial 1 stopped (not among the best) | 2 of 4 trials ended, 0 running | best Dice 0.7000 of trial 1 | "
        "0:01:00, ETA 0:17:00"
    ]


def test_elsewhere_a_line_tells_who_waits_and_who_goes_on(clock):
    stream, terminal = io.StringIO(), Terminal()
    shown = LiveTable(small.sweep(), 4, stream)
    first, other = small.trial(0, [0.5] * 3, "unfinished"), small.trial(1, [0.4] * 3, "unfinished")
    shown.show([first, other], [0, 1])  # of an earlier session
    shown.show([first, other], [1])
    shown.waits(first)
    shown.show([first, other], [1])
    shown.show([first, other], [0, 1])
    shown.show([first, other], [1])  # interrupted
    shown.show([first, other], [0, 1])
    assert stream.getvalue().splitlines() == ["trial 0 waits at epoch 3", "trial 0 goes on from epoch 3"]
    LiveTable(small.sweep(), 4, terminal).waits(first)
    assert terminal.getvalue() == ""


def test_the_time_left_is_by_epochs_of_this_session(clock):
    sweep = small.sweep(num_trials=6)  # 6 trials to epoch 1; the 2 best, and the seed setting, to 3; 1 and it to 9
    shown = LiveTable(sweep, 6, io.StringIO())
    before = [small.trial(0, [0.5] * 9)]
    shown.show(before, [])
    assert shown.summary(before, []).endswith("ETA ?")
    clock["s"] += 100
    # 5 epochs in 100 s. Planned are 6 * 1 + 3 * 2 + 2 * 6 = 24, of which 14 are trained.
    found = [*before, small.trial(1, [0.4], "stopped"), small.trial(2, [0.4] * 3, "unfinished")]
    found += [small.trial(3, [0.3], "unfinished")]
    assert shown.summary(found, [3]) == (
        "2 of 6 trials ended, 1 running, 1 waiting | best Dice 0.5000 of trial 0 | 0:01:40, ETA 0:03:20"
    )


def test_on_a_terminal_the_table_is_drawn_over_itself_once_a_second(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    shown, asked = LiveTable(small.sweep(), 4, stream), []

    def now():
        asked.append(clock["s"])
        return FOUND, [2, 3]

    shown.tick(now)
    shown.tick(now)
    assert len(asked) == 1
    first = stream.getvalue()
    assert all(len(line) < 40 for line in first.splitlines()) and len(first.splitlines()) == 1 + 4 + 1
    assert "\x1b" not in first
    clock["s"] += progress.REDRAW_S
    shown.tick(now)
    assert stream.getvalue()[len(first) :].startswith("\x1b[6A\x1b[J")
    shown.show(FOUND, [])
    assert stream.getvalue().count("\x1b[J") == 1
    shown.show(FOUND, [], force=True)
    assert stream.getvalue().count("\x1b[J") == 2


def test_without_a_terminal_nobody_is_asked():
    LiveTable(small.sweep(), 4, io.StringIO()).tick(lambda: pytest.fail("asked"))


def test_a_line_that_stays_takes_the_place_of_the_table(clock):
    stream = Terminal()
    shown = LiveTable(small.sweep(), 4, stream)
    shown.show(FOUND, [2])
    drawn = stream.getvalue()
    shown.say("stopping")
    assert stream.getvalue()[len(drawn) :] == f"\x1b[{drawn.count(chr(10))}A\x1b[Jstopping\n"
    shown.show(FOUND, [2], force=True)  # below it
    assert stream.getvalue().endswith(f"stopping\n{drawn}")
    elsewhere = io.StringIO()
    LiveTable(small.sweep(), 4, elsewhere).say("stopping")
    assert elsewhere.getvalue() == "stopping\n"
