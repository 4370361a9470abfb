"""What a sweep's trials amount to: the best against the seed setting, repeats with other seeds, device time.

Takes the records of trials.py, gives figures and the sentences that tell them. A Dice that is no finite number is none.
Draws nothing, writes nothing, imports nothing heavy.
"""

import itertools
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tune.scales import finite
from tune.trials import SEED_SETTING, Status, Sweep, Trial, best_of

STATUSES: tuple[Status, ...] = ("finished", "stopped", "failed", "unfinished")
REPEAT = re.compile(r"trial (\d+), seed ")
HOUR_S, MINUTE_S = 3600.0, 60.0


def dice_of(trial: Trial) -> float | None:
    """Best validation Dice of its epochs; None before the first."""
    return finite(trial.dice_so_far)


def best_row(trial: Trial) -> dict[str, Any] | None:
    """The validation of its best Dice, the earliest of several."""
    rows = [row for row in trial.rows if finite(row.get("dice")) is not None]
    return max(rows, key=lambda row: (row["dice"], -row["epoch"]), default=None)


def measured(trials: Sequence[Trial]) -> list[Trial]:
    """The trials with a Dice, repeats aside."""
    return [trial for trial in trials if not trial.is_repeat and dice_of(trial) is not None]


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """The best of those with a Dice."""
    return best_of(measured(trials))


def seed_trial(trials: Sequence[Trial]) -> Trial | None:
    """The trial of the seed setting, which the others are held against."""
    return next((trial for trial in trials if trial.origin == SEED_SETTING and not trial.is_repeat), None)


def rungs(sweep: Sweep) -> list[int]:
    """The epochs after which ASHA stops trials."""
    found, epoch = [], sweep.grace_epochs
    while sweep.early_stop and 0 < epoch < sweep.num_epochs:
        found.append(epoch)
        epoch *= max(sweep.reduction, 2)
    return found


def epochs_left(sweep: Sweep, trials: Sequence[Trial], total: int) -> int:
    """Epochs that are still to be trained: of the search's trials as many as ASHA plans, of repeats all.

    Args:
        sweep: its record.
        trials: those that have begun.
        total: of the search or, once that has ended, with the repeats.
    """
    own = [trial for trial in trials if not trial.is_repeat]
    if sweep.early_stop and (len(own) < sweep.num_trials or any(trial.status == "unfinished" for trial in own)):
        ends = [*rungs(sweep), sweep.num_epochs]
        at_least = sum(min(end for end in ends if end > trial.epoch) - trial.epoch for trial in _going_on(sweep, own))
        return max(_planned_epochs(sweep, ends) - sum(trial.epoch for trial in own), at_least)
    to_come = (total - len(trials)) * sweep.num_epochs
    return to_come + sum(sweep.num_epochs - trial.epoch for trial in _going_on(sweep, trials))


def _going_on(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.status == "unfinished" and trial.epoch < sweep.num_epochs]


def _planned_epochs(sweep: Sweep, ends: Sequence[int]) -> int:
    """The best of each rung go on, and beside them the seed setting."""
    count, before, found = sweep.num_trials, 0, 0
    for end in ends:
        found += min(count + (before > 0), sweep.num_trials) * (end - before)
        count, before = max(1, count // sweep.reduction), end
    return found


def most_waiting(sweep: Sweep) -> int:
    """Trials that may wait at ASHA's rungs at one time, at the most: at each the best that may go on."""
    counts = [sweep.num_trials // sweep.reduction ** (number + 1) for number in range(len(rungs(sweep)))]
    return min(sweep.num_trials, sum(max(1, count) for count in counts))


def counted(trials: Sequence[Trial]) -> str:
    """How the trials stand, in words: `3 finished, 5 stopped`."""
    counts = Counter(trial.status for trial in trials)
    return ", ".join(f"{count} {status}" for status in STATUSES if (count := counts[status]))


@dataclass(frozen=True)
class Repeats:
    """What one setting reaches with other seeds than its own."""

    of: int
    """Number of the repeated trial. Its own Dice, by which it was chosen, is not among `dices`."""
    dices: tuple[float, ...]
    """Of the repeats that ran to the end."""

    @property
    def mean(self) -> float | None:
        """Mean Dice."""
        return statistics.fmean(self.dices) if self.dices else None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation of Dice; None of fewer than two."""
        return statistics.stdev(self.dices) if len(self.dices) > 1 else None

    def __str__(self) -> str:
        if not self.dices:
            return "–"
        spread = f" ± {self.spread:.4f}" if self.spread is not None else ""
        return f"{self.mean:.4f}{spread} ({len(self.dices)})"


def repeat_of(trial: Trial) -> int | None:
    """The number of the trial that this one repeats with another seed."""
    found = REPEAT.match(trial.origin) if trial.is_repeat else None
    return int(found[1]) if found else None


def repeats(trials: Sequence[Trial]) -> dict[int, Repeats]:
    """Number of a repeated trial -> its repeats, by number."""
    dices: dict[int, list[float]] = {}
    for trial in trials:
        if (number := repeat_of(trial)) is not None:
            dices.setdefault(number, [])
            dices[number] += [dice_of(trial)] if trial.status == "finished" and dice_of(trial) is not None else []
    return {number: Repeats(number, tuple(dices[number])) for number in sorted(dices)}


def verdict(sweep: Sweep, trials: Sequence[Trial]) -> str:
    """One line: the best trial, its Dice, and how it compares with the seed setting."""
    best, seed = best_trial(trials), seed_trial(trials)
    if best is None:
        return f"no trial has a Dice yet{': ' if trials else ''}{counted(trials)}"
    dice = dice_of(best)
    if best is seed:
        others = [trial for trial in measured(trials) if trial is not seed]
        second = best_trial(others)
        line = f"the seed setting is best: {_named(sweep, best)}: Dice {dice:.4f}"
        if second is not None:
            line += f", next {_named(sweep, second)}: {dice_of(second):.4f}: {dice_of(second) - dice:+.4f}"
    elif seed is None or dice_of(seed) is None:
        line = f"{_named(sweep, best)}: Dice {dice:.4f}; {_no_seed_dice(seed)}"
    else:
        before = dice_of(seed)
        line = f"{_named(sweep, best)}: Dice {dice:.4f}, seed setting{_state(sweep, seed)} {before:.4f}: "
        line += f"{dice - before:+.4f}"
    return line + "".join(_with_other_seeds(trials, best, seed))


def _named(sweep: Sweep, trial: Trial) -> str:
    return f"trial {trial.number}{_state(sweep, trial)}"


def _state(sweep: Sweep, trial: Trial) -> str:
    """Why a trial's Dice may not be its last word."""
    return "" if trial.status == "finished" else f" ({trial.status} at epoch {trial.epoch} of {sweep.num_epochs})"


def _no_seed_dice(seed: Trial | None) -> str:
    if seed is None:
        return "the seed setting is not among the trials"
    why = f"it failed: {seed.reason}" if seed.status == "failed" else "it has no validation yet"
    return f"the seed setting has no Dice: {why}"


def _with_other_seeds(trials: Sequence[Trial], best: Trial, seed: Trial | None) -> Iterator[str]:
    found = repeats(trials)
    if best.number in found and found[best.number].dices:
        yield f"; with other seeds {found[best.number]}"
        if seed is not None and seed is not best and seed.number in found:
            yield f", seed setting {found[seed.number]}"


@dataclass(frozen=True)
class Cost:
    """Device time of one trial, in seconds of one GPU, or of the CPUs where there is none."""

    used_s: float
    saved_s: float
    """An estimate: seconds of its mean epoch times the epochs that stopping spared; 0 for what was not stopped."""


@dataclass(frozen=True)
class Unit:
    """What device time is told in."""

    name: str
    seconds: float


def costs(sweep: Sweep, trials: Sequence[Trial]) -> dict[int, Cost]:
    """Number of a trial -> its device time."""
    devices = sweep.gpus_per_trial or 1.0
    return {
        trial.number: Cost(devices * (finite(trial.device_s) or 0.0), devices * _spared_s(sweep, trial))
        for trial in trials
    }


def _spared_s(sweep: Sweep, trial: Trial) -> float:
    if trial.status != "stopped" or not trial.rows:
        return 0.0
    # Between two validations no start-up is counted, which a longer trial would not have paid again: the median leaves
    # out the one after a wait.
    rows = trial.rows if len(trial.rows) > 1 else ({"epoch": 0, "device_s": 0.0}, *trial.rows)
    epochs_s = [
        (after["device_s"] - before["device_s"]) / max(after["epoch"] - before["epoch"], 1)
        for before, after in itertools.pairwise(rows)
    ]
    return max(finite(statistics.median(epochs_s)) or 0.0, 0.0) * max(sweep.num_epochs - trial.epoch, 0)


def unit_of(sweep: Sweep, longest_s: float) -> Unit:
    """Hours where the longest of the times to tell takes one, else minutes."""
    hours = longest_s >= HOUR_S
    if sweep.gpus_per_trial:
        return Unit("GPU-hours", HOUR_S) if hours else Unit("GPU-minutes", MINUTE_S)
    return Unit("hours on CPUs", HOUR_S) if hours else Unit("minutes on CPUs", MINUTE_S)


def saved(sweep: Sweep, trials: Sequence[Trial]) -> str:
    """In words: device time used, and what early stopping spared of what all epochs would have cost."""
    found = costs(sweep, trials).values()
    used_s, saved_s = sum(cost.used_s for cost in found), sum(cost.saved_s for cost in found)
    unit = unit_of(sweep, used_s + saved_s)
    used, whole = f"{used_s / unit.seconds:.2f} {unit.name} used", f"{(used_s + saved_s) / unit.seconds:.2f}"
    if not sweep.early_stop:
        return f"{used}; early stopping was off"
    if not saved_s:
        return f"{used}; early stopping has spared nothing yet"
    stopped = sum(trial.status == "stopped" for trial in trials)
    searched = sum(not trial.is_repeat for trial in trials)
    share = saved_s / (used_s + saved_s)
    return f"{used}, about {whole} without early stopping: {share:.0%} saved by stopping {stopped} of {searched} trials"
