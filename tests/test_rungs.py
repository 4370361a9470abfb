"""ASHA's rungs: decisions one can compute on paper, whole sweeps, and the same rungs after any number of restarts."""

import math
import random

import pytest
import small_sweeps as small

from sft.config import TrainConfig
from tune import tally, trials
from tune.rungs import Rungs
from tune.trials import SEED_NUMBER


def rungs(count: int = 27, known=(), soon: bool = True) -> Rungs:
    """9 epochs, grace 1, reduction 3: rungs at 1 and 3."""
    return Rungs(small.sweep(num_trials=count), known, soon)


def come(to: Rungs, dices: dict[int, float], epoch: int = 1) -> list[bool]:
    """Trials that come to an epoch one after the other; who goes on at once."""
    for number in dices:
        to.begin(number)
    return [to.report(number, epoch, dice) for number, dice in dices.items()]


# On paper


def test_a_trial_goes_on_once_it_is_among_the_best_third_of_those_that_came():
    one = rungs()
    assert come(one, {1: 0.3, 2: 0.6}) == [False, False]  # a third of one or two trials is none
    assert one.next() is None
    assert come(one, {3: 0.5}) == [False]
    assert one.next() == 2  # 0.6 is the best of three
    one.begin(2)
    assert one.next() is None and one.waiting == {1, 3} and one.running == {2}
    assert come(one, {4: 0.9}) == [True]  # the best of four; that 2 has gone on does not keep a better one back
    assert come(one, {5: 0.6, 6: 0.7}) == [False, True] and one.waiting == {1, 3, 5}


def test_it_goes_on_at_once_where_it_need_not_wait():
    one = rungs()
    come(one, {1: 0.3, 2: 0.2})
    assert come(one, {3: 0.5, 4: 0.1, 5: 0.4, 6: 0.45}) == [True, False, False, True]


def test_the_highest_rung_comes_first_and_there_the_best():
    one = rungs(27)
    come(one, {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.6, 5: 0.5, 6: 0.4})
    for number, dice in ((1, 0.5), (2, 0.6)):
        assert one.next() == number
        one.begin(number)
        assert one.report(number, 3, dice) is False
    assert one.next() is None
    come(one, {7: 0.75, 8: 0.3, 9: 0.2, 10: 0.1, 11: 0.1, 12: 0.1})
    order = []
    while (number := one.next()) is not None:
        one.begin(number)
        order.append(number)
        assert number != 7 or one.report(7, 3, 0.1) is False
    assert order == [7, 2, 3]  # once 7 has come to the higher rung, that has a place, for 2


def test_new_trials_come_first_where_nobody_is_in_a_hurry_then_the_lower_rung():
    one = rungs(9, soon=False)
    assert come(one, {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.6, 5: 0.5, 6: 0.4}) == [False] * 6 and one.next() is None
    assert come(one, {7: 0.3}) == [False]
    assert come(one, {8: 0.75}) == [False]  # the ninth may be better
    assert come(one, {9: 0.1}) == [False]
    assert [one.next(), one.begin(1)] == [1, None]
    assert one.report(1, 3, 0.9) is False  # it would be alone there, and 2 has still to come
    assert [one.next(), one.begin(2)] == [2, None]
    assert one.report(2, 3, 0.95) is False
    assert [one.next(), one.begin(8)] == [8, None]
    assert one.report(8, 3, 0.96) is True  # the best of the three, and nobody is left below


def test_a_trial_that_nobody_can_pass_goes_on_at_once():
    one = rungs(6, soon=False)
    assert come(one, {1: 0.5, 2: 0.4, 3: 0.3, 4: 0.2}) == [False] * 4
    assert come(one, {5: 0.9}) == [True]  # the best of five: of six two go on
    assert one.next() is None and come(one, {6: 0.1}) == [False] and one.next() == 1


def test_without_new_trials_any_more_nobody_waits_for_them():
    one = rungs(9, soon=False)
    come(one, {1: 0.9, 2: 0.8, 3: 0.7})
    assert one.next() is None and one.take_out() == {}
    one.close()
    assert sorted(one.take_out()) == [2, 3] and one.next() == 1


def test_between_two_rungs_and_past_the_last_nothing_is_decided():
    one = rungs()
    come(one, {1: 0.1, 2: 0.2, 3: 0.9})
    assert [one.report(3, epoch, 0.9) for epoch in (2,)] == [True]
    assert one.report(3, 3, 0.9) is False  # alone at its rung
    one.begin(3)
    assert [one.report(3, epoch, 0.9) for epoch in range(4, 9)] == [True] * 5


def test_the_seed_setting_never_waits_and_counts_at_its_rungs():
    one = rungs()
    one.begin(SEED_NUMBER)
    assert [one.report(SEED_NUMBER, epoch, 0.1) for epoch in (1, 2, 3, 4)] == [True] * 4
    assert come(one, {1: 0.3, 2: 0.2}) == [False, False] and one.next() == 1


def test_of_equals_the_earlier_goes_on_and_no_number_is_the_worst():
    one = rungs(6)
    come(one, {1: math.nan, 2: 0.5, 3: 0.5})
    assert one.next() == 2
    one.begin(2)
    come(one, {4: 0.1, 5: 0.1, 6: 0.1})
    assert one.next() == 3
    assert sorted(one.take_out()) == [1, 4, 5, 6]


def test_who_can_no_longer_be_among_the_best_third_is_out_with_its_reason():
    one = rungs(9)
    come(one, {1: 0.1, 2: 0.9, 3: 0.8})
    assert one.take_out() == {}  # of nine trials three go on
    come(one, {4: 0.7})
    assert one.take_out() == {1: "at epoch 1 not among the best 1/3 with Dice 0.1000"}
    assert one.take_out() == {} and 1 not in one.waiting


def test_trials_that_never_come_to_a_rung_leave_less_room_there():
    one = rungs(6)
    come(one, {1: 0.1, 2: 0.9, 3: 0.5})
    assert list(one.take_out()) == [1]  # of six trials two go on
    for number in (4, 5, 6):
        one.begin(number)
        one.end(number)  # it has failed
    assert list(one.take_out()) == [3] and one.next() == 2


def test_where_too_few_come_for_a_third_the_best_goes_on_once_nobody_can_follow():
    one = rungs(3)
    one.begin(SEED_NUMBER)
    assert come(one, {1: 0.3}) == [False]
    one.report(SEED_NUMBER, 1, 0.2)
    assert one.next() is None  # a third trial is to come
    one.begin(2)
    one.end(2)
    assert one.next() == 1
    one.begin(1)
    assert one.report(1, 3, 0.1) is False  # the seed setting is still to come to this rung
    assert one.report(SEED_NUMBER, 3, 0.9) is True
    assert one.take_out() == {} and one.next() == 1  # it goes on anyway: the place is the next best's


def test_beside_a_seed_setting_that_is_best_the_next_best_goes_on():
    """A given point would otherwise never be trained whole in a sweep of two."""
    one = rungs(2, soon=False)
    one.begin(SEED_NUMBER)
    assert come(one, {1: 0.3}) == [False]
    one.report(SEED_NUMBER, 1, 0.9)
    assert one.take_out() == {} and one.next() == 1


def test_a_trial_that_has_been_told_to_stop_is_told_so_again():
    one = rungs()
    assert come(one, {1: 0.3}) == [False] and one.report(1, 2, 0.9) is False and one.waiting == {1}


def test_rungs_are_those_that_the_report_names():
    for base, changes in (
        (TrainConfig(num_epochs=30), {"grace_epochs": 3}),
        (TrainConfig(num_epochs=12, validate_every=2), {"grace_epochs": 4, "reduction": 2}),
        (TrainConfig(num_epochs=5), {"grace_epochs": 5}),
    ):
        sweep = small.sweep(base=base, num_trials=1, **changes)
        one, at = Rungs(sweep, ()), []
        one.begin(1)
        for epoch in range(1, sweep.num_epochs):
            if not one.report(1, epoch, 0.5):
                at.append(epoch)
                one.begin(one.next())
        assert at == tally.rungs(sweep) or at == []  # alone at a rung it goes on at once
        assert len(one._dice) == len(tally.rungs(sweep))


# Whole sweeps


class Devices:
    """Runs a sweep with some trials at a time, an epoch each in turn, as Ray and the driver's queue do."""

    def __init__(self, folder, curves: list[list[float]], slots: int, soon: bool = False, take_out: bool = True):
        self.sweep, self.soon = small.sweep(num_trials=len(curves)), soon
        self.folder, self.curves, self.slots, self.takes_out = folder, curves, slots, take_out
        self.log: list[tuple] = []
        self.restart()

    def restart(self) -> None:
        known = trials.read_all(self.folder)
        self.rungs = Rungs(self.sweep, known, self.soon)
        self.queue = [one.number for one in known if one.number in self.rungs.running]
        self.live: list[int] = []

    def next(self) -> int | None:
        self.stop_some()
        if self.queue:
            return self.queue.pop(0)
        if (number := self.rungs.next()) is not None:
            return number
        new = len(trials.read_all(self.folder))
        if new == len(self.curves):
            return None
        trials.create(self.folder, small.trial(new))
        return new

    def stop_some(self) -> None:
        for number, reason in self.rungs.take_out().items() if self.takes_out else ():
            trials.write_outcome(trials.folder_of(self.folder, number), "stopped", reason)
            self.log.append((number, "stopped"))

    def run(self, restarts=()) -> list:
        while True:
            while len(self.live) < self.slots and (number := self.next()) is not None:
                self.rungs.begin(number)
                self.live.append(number)
                self.log.append((number, "starts"))
            if not self.live:
                return trials.read_all(self.folder)
            number = self.live.pop(0)
            place = trials.folder_of(self.folder, number)
            epoch = trials.read(place).epoch + 1
            dices = self.curves[number][:epoch]
            trials.append_row(place, small.rows(dices)[-1])
            self.log.append((number, epoch))
            if epoch == self.sweep.num_epochs:
                trials.write_outcome(place, "finished")
                self.rungs.end(number)
            elif self.rungs.report(number, epoch, max(dices)):
                self.live.append(number)
            self.stop_some()
            if len(self.log) in restarts:
                self.restart()


def curves(seed: int, count: int = 27) -> list[list[float]]:
    """Trials of different worth, with noise."""
    draw = random.Random(seed)
    worth = [draw.random() for _ in range(count)]
    return [[one * (1 - 0.7**epoch) + 0.02 * draw.random() for epoch in range(1, 10)] for one in worth]


PLANNED = 27 * 1 + 10 * 2 + 4 * 6  # the best third of each rung, and the seed setting


@pytest.mark.parametrize(("soon", "slots", "more"), [(False, 1, 0), (False, 2, 6), (False, 8, 12), (True, 2, 36)])
@pytest.mark.parametrize("seed", range(3))
def test_a_sweep_trains_little_more_than_it_must_and_finds_what_is_good(tmp_path, seed, soon, slots, more):
    found = Devices(tmp_path, curves(seed), slots, soon).run()
    assert {trial.status for trial in found} == {"finished", "stopped"}
    assert sum(trial.epoch for trial in found) <= PLANNED + more
    whole = [trial for trial in found if trial.status == "finished"]
    assert found[SEED_NUMBER] in whole and len(whole) >= 2
    order = sorted(max(curve) for curve in curves(seed))
    assert max(trial.dice_so_far for trial in whole) >= order[-2]
    assert all(trial.epoch in (1, 3) for trial in found if trial.status == "stopped")


@pytest.mark.parametrize("count", range(1, 12))
@pytest.mark.parametrize("soon", [False, True])
def test_the_best_of_a_small_sweep_is_trained_to_its_end(tmp_path, count, soon):
    found = Devices(tmp_path, curves(count, count), 2, soon).run()
    assert trials.best_of(found).status == "finished"


@pytest.mark.parametrize("soon", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_who_is_out_would_never_have_gone_on(tmp_path, seed, soon):
    """Stopping it at once only frees its disk: every trial comes as far as if nobody were ever stopped."""
    drawn = curves(seed, 20)
    stopped = Devices(tmp_path / "stopped", drawn, 3, soon).run()
    kept = Devices(tmp_path / "kept", drawn, 3, soon, take_out=False).run()
    assert [trial.rows for trial in stopped] == [trial.rows for trial in kept]


@pytest.mark.parametrize("soon", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_after_restarts_every_trial_comes_to_an_end_and_none_trains_an_epoch_twice(tmp_path, seed, soon):
    drawn, draw = curves(seed, 12), random.Random(seed)
    devices = Devices(tmp_path, drawn, 3, soon)
    found = devices.run(restarts=draw.sample(range(1, 60), 8))
    assert {trial.status for trial in found} == {"finished", "stopped"}
    told = [entry for entry in devices.log if isinstance(entry[1], int)]
    assert len(told) == len(set(told)) and trials.best_of(found).status == "finished"


# A later session


def test_trials_of_before_count_where_they_came_to():
    known = [
        small.trial(0, [0.5] * 9, "finished"),
        small.trial(1, [0.2], "stopped"),
        small.trial(2, [0.4, 0.4, 0.4, 0.4], "failed"),
        small.trial(3, status="failed"),
        small.repeat(4, of=0, seed=43, dices=[0.99] * 9),  # it was not chosen by any rung
    ]
    one = rungs(known=known)
    assert one.waiting == one.running == frozenset()
    assert come(one, {5: 0.44, 6: 0.45}) == [False, False]  # five came, and the one place is the seed setting's
    assert come(one, {7: 0.47}) == [True]  # two of six


def test_a_trial_that_stood_at_a_rung_waits_there_and_one_on_its_way_goes_on():
    known = [small.trial(number, [0.1 * number], "unfinished") for number in (1, 2, 3)]
    known += [small.trial(4, [0.5, 0.5], "unfinished"), small.trial(5, [0.6, 0.6, 0.6], "unfinished")]
    known += [small.trial(6, status="unfinished"), small.trial(SEED_NUMBER, [0.1], "unfinished")]
    one = rungs(known=known)
    assert one.waiting == {1, 2, 3, 5} and one.running == {4, 6, SEED_NUMBER}
    assert one.report(4, 3, 0.9) is False and one.report(SEED_NUMBER, 2, 0.1) is True
    one.begin(4)
    assert one.report(4, 4, 0.9) is True  # it is not judged at a rung again


def test_more_trials_make_room_for_those_that_still_wait():
    known = [small.trial(number, [0.1 * number], "unfinished") for number in (1, 2, 3)]
    assert sorted(rungs(3, known=known).take_out()) == [1, 2]
    assert sorted(rungs(6, known=known).take_out()) == [1]
    assert sorted(rungs(9, known=known).take_out()) == []
