"""A sweep in progress on the terminal: one live table, the best so far, the time left.

Takes trials; prints. On a terminal the table is drawn over itself, elsewhere a line tells what has changed.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

from sft.report import format_duration
from sft.settings import as_text
from tune import tally
from tune.trials import SEED_SETTING, Sweep, Trial, best_of

STOPPING = "stopping: the trials end, the table follows; press Ctrl-C again to leave without it"
REDRAW_S = 1.0
NEW = (0, "unfinished")
ROWS = 20  # of the live table: the running ones, then the best
SHORT = {"learning_rate": "lr", "lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
SHORT |= {"dice_weight": "w_dice", "focal_weight": "w_focal", "bce_weight": "w_bce", "focal_gamma": "gamma"}


def table(found: Sequence[Trial], running: Iterable[int] | None, most: int | None = None) -> str:
    """Trials as text: the running ones first, then by Dice.

    Args:
        found: all trials.
        running: numbers of those that run now, while the others wait; None: the sweep does not go on.
        most: rows at the most; None: all.
    """
    waiting, running = "unfinished" if running is None else "waiting", set(running or ())
    order = sorted(found, key=lambda trial: (trial.number not in running, -(trial.dice_so_far or 0.0), trial.number))
    shown, axes = order[:most], list(dict.fromkeys(name for trial in found for name in trial.params))
    head = ["trial", "status", "epoch", "Dice", *(SHORT.get(name, name) for name in axes)]
    lines = [head]
    for trial in shown:
        state = "running" if trial.number in running else waiting
        lines.append(_cells(trial, axes, state if trial.status == "unfinished" else trial.status))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(text + [f"... and {len(order) - len(shown)} more"] * (len(order) > len(shown)))


class LiveTable:
    """What is shown while a sweep runs.

    Args:
        sweep: how many epochs and trials there are.
        total: trials of this phase, earlier ones included.
        stream: where it is printed.
    """

    def __init__(self, sweep: Sweep, total: int, stream: TextIO = sys.stdout):
        self._sweep, self._total, self._stream = sweep, total, stream
        self._live = stream.isatty()
        self._drawn_lines, self._next_s, self._started_s = 0, 0.0, time.monotonic()
        self._told: dict[int, tuple] = {}
        self._waiting: set[int] = set()
        self._epochs_before: int | None = None

    def tick(self, now: Callable[[], tuple[Sequence[Trial], Sequence[int]]]) -> None:
        """On a terminal, and once a second: asks how things stand, and shows it."""
        if self._live and time.monotonic() >= self._next_s:
            self.show(*now())

    def show(self, found: Sequence[Trial], running: Sequence[int], force: bool = False) -> None:
        """Shows how things stand, at most once a second on a terminal."""
        if self._epochs_before is None:
            self._epochs_before = sum(trial.epoch for trial in found)
            self._told = {trial.number: _state(trial) for trial in found}  # of an earlier session, or told before
        if not self._live:
            self._tell_changes(found, running)
        elif force or time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + REDRAW_S
            self._draw(f"{table(found, running, ROWS)}\n{self.summary(found, running)}")

    def say(self, line: str) -> None:
        """Prints a line that stays, on a terminal in place of the table that is shown."""
        if self._live:
            self._draw("")
        print(line, file=self._stream, flush=True)

    def waits(self, trial: Trial) -> None:
        """Elsewhere than on a terminal: a line tells of a trial that begins to wait at a rung, and of its going on."""
        if not self._live:
            self._waiting.add(trial.number)
            self._tell(f"trial {trial.number} waits at epoch {trial.epoch}")
            self._stream.flush()

    def close(self, found: Sequence[Trial]) -> None:
        """Takes the live table off the terminal; elsewhere tells what has not been told."""
        if self._live:
            self._draw("")
        else:
            self._tell_changes(found, [])

    def summary(self, found: Sequence[Trial], running: Sequence[int]) -> str:
        """How many trials, the best, and the time left."""
        begun = [trial for trial in found if trial.status == "unfinished"]
        best, runs = best_of(found), [trial for trial in begun if trial.number in running]
        text = f"{len(found) - len(begun)} of {self._total} trials ended, {len(runs)} running"
        text += f", {len(begun) - len(runs)} waiting" * (len(begun) > len(runs))
        if best:
            text += f" | best Dice {best.dice_so_far:.4f} of trial {best.number}"
        return f"{text} | {format_duration(time.monotonic() - self._started_s)}, ETA {self._eta(found)}"

    def _eta(self, found: Sequence[Trial]) -> str:
        """By epochs, at the pace of this session."""
        done = sum(trial.epoch for trial in found) - (self._epochs_before or 0)
        if done <= 0:
            return "?"
        left = tally.epochs_left(self._sweep, found, self._total)
        return format_duration((time.monotonic() - self._started_s) / done * left)

    def _tell_changes(self, found: Sequence[Trial], running: Sequence[int]) -> None:
        for trial in found:
            if trial.number in self._waiting.intersection(running):
                self._waiting.remove(trial.number)
                self._tell(f"trial {trial.number} goes on from epoch {trial.epoch}")
            before = self._told.get(trial.number, NEW)
            self._told[trial.number] = _state(trial)
            if before == _state(trial) or before[1] == trial.status != "unfinished":  # its end is told once
                continue
            if trial.status == "unfinished":
                dice = f"Dice {trial.rows[-1]['dice']:.4f}"
                self._tell(f"trial {trial.number}: epoch {trial.epoch}/{self._sweep.num_epochs} {dice}")
            else:
                reason = f" ({trial.reason})" if trial.reason else ""
                self._tell(f"trial {trial.number} {trial.status}{reason} | {self.summary(found, running)}")
        self._stream.flush()

    def _tell(self, line: str) -> None:
        print(line, file=self._stream)

    def _draw(self, text: str) -> None:
        columns = shutil.get_terminal_size().columns  # a line that wraps would be two
        lines = [line[: columns - 1] for line in text.splitlines()]
        back = f"\x1b[{self._drawn_lines}A\x1b[J" if self._drawn_lines else ""
        print(back + "".join(f"{line}\n" for line in lines), end="", file=self._stream, flush=True)
        self._drawn_lines = len(lines)


def _state(trial: Trial) -> tuple[int, str]:
    return trial.epoch, trial.status


def _cells(trial: Trial, axes: Sequence[str], status: str) -> list[str]:
    told = f" ({trial.origin})" if trial.origin == SEED_SETTING or trial.is_repeat else ""
    name = f"{trial.number}{told}"
    dice = "-" if trial.dice_so_far is None else f"{trial.dice_so_far:.4f}"
    values = [_short(trial.params[axis]) if axis in trial.params else "-" for axis in axes]
    return [name, status, str(trial.epoch), dice, *values]


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else as_text(value)
