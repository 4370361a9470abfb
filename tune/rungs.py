"""ASHA's rungs: who has come how far, who waits there, who may go on.

Takes epochs and Dice as trials report them, or as their folders tell them; says which trial goes on next and which
never will. The algorithm is the asynchronous successive halving of Li et al., "A System for Massively Parallel
Hyperparameter Tuning" (MLSys 2020), algorithm 2: at epochs grace, grace x reduction, ... a trial waits until it is
among the best 1/reduction of all that came there. Knows nothing of Ray and writes nothing.
"""

import math
from collections.abc import Iterable

from tune import tally
from tune.trials import SEED_NUMBER, Sweep, Trial


class Rungs:
    """Where the trials of a sweep stand; repeats with other seeds are none of them.

    The seed setting never waits: all others are held against its whole course. Where too few come to a rung for a place
    besides its own, the best of them goes on: a sweep ends with a whole trial besides the seed setting's.

    Args:
        sweep: its grace, reduction, epochs, and number of trials.
        known: trials that an earlier session has begun. One that stands exactly at a rung waits there, also if that
            session had just let it go on.
        soon: a trial goes on as soon as it may, as in the paper: some are whole early. Otherwise new trials come first,
            then the lower rungs: a rung is nearly full when its best are chosen, and fewer are chosen wrongly.
    """

    def __init__(self, sweep: Sweep, known: Iterable[Trial], soon: bool = False) -> None:
        self._epochs, self._reduction, self._total = tally.rungs(sweep), sweep.reduction, sweep.num_trials
        self._soon = soon
        self._dice: list[dict[int, float]] = [{} for _ in self._epochs]
        """Of each rung: number of a trial -> its best Dice when it came there."""
        self._ranks: list[dict[int, int]] = [{} for _ in self._epochs]
        """Of each rung: number of a trial -> its rank among all that came there."""
        self._waiting: dict[int, int] = {}
        """Number of a trial -> the rung where it waits."""
        self._heading: dict[int, int] = {}
        """Number of a trial that runs, or is to run again -> the next rung it comes to."""
        self._begun = 0
        for trial in known:
            if not trial.is_repeat:
                self._restore(trial)

    @property
    def waiting(self) -> frozenset[int]:
        """Numbers of the trials that wait at a rung."""
        return frozenset(self._waiting)

    @property
    def running(self) -> frozenset[int]:
        """Numbers of those that run, or are to run again."""
        return frozenset(self._heading)

    def begin(self, number: int) -> None:
        """A new trial runs, or one that has waited goes on."""
        if number in self._heading:
            return
        rung = self._waiting.pop(number, None)
        self._begun += rung is None
        self._heading[number] = 0 if rung is None else rung + 1

    def report(self, number: int, epoch: int, dice: float) -> bool:
        """Takes the best Dice up to an epoch; returns whether the trial goes on at once."""
        if number not in self._heading:  # it has been told to stop before
            return False
        rung = self._heading[number]
        if rung == len(self._epochs) or epoch < self._epochs[rung]:
            return True
        self._enter(number, rung, dice)
        if number == SEED_NUMBER:
            return True
        del self._heading[number]
        self._waiting[number] = rung
        goes_on = self._may_go_on(number) if self._soon else self._is_certain(number) or self.next() == number
        if goes_on:
            self.begin(number)
        return goes_on

    def end(self, number: int) -> None:
        """A trial has ended by itself, well or not."""
        self._heading.pop(number, None)

    def close(self) -> None:
        """There are no new trials any more."""
        self._total = self._begun

    def next(self) -> int | None:
        """The trial that goes on next, of its rung the best; None where none may yet, or new ones come first."""
        if not self._soon and self._begun < self._total:
            return None
        up = -1 if self._soon else 1
        order = sorted(self._waiting, key=lambda number: (up * self._waiting[number], self._rank(number)))
        return next((number for number in order if self._may_go_on(number)), None)

    def take_out(self) -> dict[int, str]:
        """Numbers of those that will not go on whatever the others come to, each with the reason; they wait no more."""
        limits = self._limits()
        out = [number for number, rung in self._waiting.items() if self._rank(number) > limits[rung]]
        return {number: self._reason(number, self._waiting.pop(number)) for number in out}

    def _restore(self, trial: Trial) -> None:
        self.begin(trial.number)
        waits = False
        for row in trial.rows:
            rung = self._heading[trial.number]
            waits = rung < len(self._epochs) and row["epoch"] >= self._epochs[rung]
            if waits:
                self._enter(trial.number, rung, row["dice_so_far"])
        if trial.status != "unfinished":
            self.end(trial.number)
        elif waits and trial.number != SEED_NUMBER:
            self._waiting[trial.number] = self._heading.pop(trial.number) - 1

    def _enter(self, number: int, rung: int, dice: float) -> None:
        told = self._dice[rung]
        told[number] = dice if math.isfinite(dice) else -math.inf
        order = sorted(told, key=lambda one: (-told[one], one))
        self._ranks[rung] = {one: rank for rank, one in enumerate(order, start=1)}
        self._heading[number] = rung + 1

    def _may_go_on(self, number: int) -> bool:
        rung = self._waiting[number]
        places = len(self._dice[rung]) // self._reduction
        if self._to_come()[rung] == 0:
            places = max(places, self._least(rung))
        return self._rank(number) <= places

    def _is_certain(self, number: int) -> bool:
        """Whether it is among the best also if all that are still to come are better."""
        rung = self._waiting[number]
        to_come = self._to_come()[rung]
        return self._rank(number) + to_come <= (len(self._dice[rung]) + to_come) // self._reduction

    def _rank(self, number: int) -> int:
        """At the rung where it waits, 1 for the best; of equals the earlier trial is better."""
        return self._ranks[self._waiting[number]][number]

    def _limits(self) -> list[int]:
        """Of each rung the lowest rank that may ever go on."""
        return [self._limit(rung, most) for rung, most in enumerate(self._to_come())]

    def _limit(self, rung: int, to_come: int) -> int:
        return max(self._least(rung), (len(self._dice[rung]) + to_come) // self._reduction)

    def _least(self, rung: int) -> int:
        """The rank of the best besides the seed setting."""
        return 2 if self._ranks[rung].get(SEED_NUMBER) == 1 else 1

    def _to_come(self) -> list[int]:
        """Of each rung how many trials may yet come there, at the most."""
        found, most = [], self._total - self._begun  # new ones
        for rung in range(len(self._epochs)):
            most = max(0, most) + sum(heading == rung for heading in self._heading.values())
            found.append(most)
            limit = self._limit(rung, most)
            most += sum(at == rung and self._rank(number) <= limit for number, at in self._waiting.items())
        return found

    def _reason(self, number: int, rung: int) -> str:
        dice = self._dice[rung][number]
        return f"at epoch {self._epochs[rung]} not among the best 1/{self._reduction} with Dice {dice:.4f}"
