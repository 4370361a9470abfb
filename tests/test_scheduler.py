"""ASHA with a memory: decisions one can compute on paper, and the same rungs after any number of restarts."""

import random
from types import SimpleNamespace

import pytest
import small_sweeps as small
from ray.tune.schedulers import TrialScheduler

from sft.config import TrainConfig
from tune import tally, trials
from tune.scheduler import NotedAsha
from tune.trials import SEED_NUMBER, Trial

CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


class Session:
    """Ray's part: hands trials and results to a scheduler, from what a sweep's folder holds."""

    def __init__(self, folder, sweep):
        self.folder = folder
        self.asha = NotedAsha(folder, sweep, trials.read_all(folder))
        self.started: dict[int, SimpleNamespace] = {}

    def start(self, number: int) -> None:
        """Ray gives every trial a new id in each session."""
        trials.create(self.folder, Trial(number, "random", {}, {}))
        self.started[number] = SimpleNamespace(trial_id=f"{id(self)}_{number}", config={"number": number})
        self.asha.on_trial_add(None, self.started[number])

    def tell(self, number: int, epoch: int, dice: float) -> str:
        """What a trial notes and reports; what is decided."""
        row = {"epoch": epoch, "dice": dice, "dice_so_far": dice, "device_s": 1.0}
        trials.append_row(trials.folder_of(self.folder, number), row)
        # A restored trial's training_iteration begins at 1 again.
        result = {"epoch": epoch, "dice_so_far": dice, "number": number, "training_iteration": 1}
        decision = self.asha.on_trial_result(None, self.started[number], result)
        if decision == STOP:
            self.asha.on_trial_complete(None, self.started[number], result)
        return decision

    def rungs(self) -> dict[int, list[float]]:
        """Epoch -> Dice of all that came there, of rungs that are judged."""
        (bracket,) = self.asha._brackets
        return {epoch: sorted(told.values()) for epoch, told in bracket._rungs if epoch < self.asha._max_t}


def outcome(folder, number: int) -> Trial:
    return trials.read(trials.folder_of(folder, number))


def test_of_those_that_come_to_a_rung_the_best_third_goes_on(tmp_path):
    session = Session(tmp_path, small.sweep())  # 9 epochs, grace 1, reduction 3
    for number in range(1, 7):
        session.start(number)
    told = [session.tell(number, 1, dice) for number, dice in enumerate([0.3, 0.6, 0.49, 0.51, 0.9], start=1)]
    # Two thirds of the way through those before: none; 0.3; 0.3 + 0.3 * 2/3 = 0.5; 0.49 + 0.11 / 3 = 0.527; 0.51.
    assert told == [CONTINUE, CONTINUE, STOP, STOP, CONTINUE]
    assert [session.tell(2, epoch, 0.6) for epoch in (2, 3)] == [CONTINUE, CONTINUE]
    assert session.tell(1, 2, 0.1) == CONTINUE  # no rung
    assert session.tell(1, 3, 0.59) == STOP and session.tell(5, 4, 0.9) == CONTINUE  # past 3: it counts there
    assert session.rungs() == {1: [0.3, 0.49, 0.51, 0.6, 0.9], 3: [0.59, 0.6, 0.9]}


def test_the_seed_setting_is_never_stopped_and_counts_at_its_rungs(tmp_path):
    session = Session(tmp_path, small.sweep())
    session.start(SEED_NUMBER), session.start(1)
    session.tell(1, 1, 0.9)
    assert [session.tell(SEED_NUMBER, epoch, 0.1) for epoch in (1, 2, 3)] == [CONTINUE] * 3
    assert session.rungs() == {1: [0.1, 0.9], 3: [0.1]}
    assert outcome(tmp_path, SEED_NUMBER).status == "unfinished"


def test_a_stop_is_noted_with_its_reason(tmp_path):
    session = Session(tmp_path, small.sweep())
    session.start(0), session.start(1)
    session.tell(0, 1, 0.5)
    assert outcome(tmp_path, 0).status == "unfinished"
    session.tell(1, 1, 0.25)
    found = outcome(tmp_path, 1)
    assert (found.status, found.reason) == ("stopped", "at epoch 1 not among the best 1/3 with Dice 0.2500")


def test_a_trial_at_its_last_epoch_ends_by_itself(tmp_path):
    session = Session(tmp_path, small.sweep())
    session.start(0), session.start(1)
    assert [session.tell(0, epoch, 0.9) for epoch in range(1, 10)] == [CONTINUE] * 9
    assert session.tell(1, 9, 0.1) == CONTINUE  # Ray would stop what has come to its end
    assert {outcome(tmp_path, number).status for number in (0, 1)} == {"unfinished"}


def test_a_trial_that_failed_before_its_first_validation_is_not_judged(tmp_path):
    session = Session(tmp_path, small.sweep())
    session.start(0)
    assert session.asha.on_trial_result(None, session.started[0], {"done": True, "config/number": 0}) == CONTINUE
    session.asha.on_trial_complete(None, session.started[0], {"done": True})
    assert session.rungs() == {1: [], 3: []}


def test_rungs_are_those_that_the_report_names(tmp_path):
    for base, changes in (
        (TrainConfig(num_epochs=30), {"grace_epochs": 3}),
        (TrainConfig(num_epochs=12, validate_every=2), {"grace_epochs": 4, "reduction": 2}),
        (TrainConfig(num_epochs=5), {"grace_epochs": 5}),
    ):
        sweep = small.sweep(base=base, **changes)
        assert sorted(Session(tmp_path, sweep).rungs()) == tally.rungs(sweep)


# After a restart


def lived_through(folder, curves: list[list[float]], restarts=()) -> tuple[list[tuple], dict[int, list[float]]]:
    """All trials, three at a time and an epoch each in turn; at a restart all is forgotten but the files.

    Returns:
        (trial, epoch, decision) in order, and the rungs in the end.
    """
    sweep = small.sweep()
    session, waiting, live, decisions = Session(folder, sweep), list(range(len(curves))), {}, []
    while waiting or live:
        while waiting and len(live) < 3:
            live[waiting[0]] = 0
            session.start(waiting.pop(0))
        number = list(live)[len(decisions) % len(live)]
        live[number] += 1
        epoch, dice = live[number], curves[number][live[number] - 1]
        decisions.append((number, epoch, session.tell(number, epoch, dice)))
        if decisions[-1][2] == STOP or epoch == sweep.num_epochs:
            del live[number]
            if epoch == sweep.num_epochs:
                trials.write_outcome(trials.folder_of(folder, number), "finished")
        if len(decisions) in restarts:
            session = Session(folder, sweep)
            for begun in live:
                session.start(begun)
    return decisions, session.rungs()


@pytest.mark.parametrize("seed", range(5))
def test_after_restarts_decisions_and_rungs_are_those_of_an_uninterrupted_session(tmp_path, seed):
    draw = random.Random(seed)
    curves = [[draw.random() + 0.05 * epoch for epoch in range(9)] for _ in range(12)]
    curves = [[max(curve[: epoch + 1]) for epoch in range(9)] for curve in curves]  # best so far
    whole = lived_through(tmp_path / "whole", curves)
    restarts = draw.sample(range(1, len(whole[0])), 8)
    assert lived_through(tmp_path / "restarted", curves, restarts) == whole
    stops = [decision for _, _, decision in whole[0] if decision == STOP]
    assert stops and len(whole[1][3]) > 1
    after = [trials.read_all(tmp_path / name) for name in ("whole", "restarted")]
    assert after[0] == after[1]


def test_a_restored_trial_is_not_judged_at_a_rung_again(tmp_path):
    for number, dice in enumerate([0.3, 0.8, 0.9], start=1):
        small.put(tmp_path, small.trial(number, [dice], "unfinished"))
    session = Session(tmp_path, small.sweep())
    session.start(1), session.start(2), session.start(3)
    assert session.tell(1, 1, 0.3) == CONTINUE and session.tell(1, 2, 0.3) == CONTINUE  # the worst of three
    assert session.rungs() == {1: [0.3, 0.8, 0.9], 3: []}
    assert session.tell(2, 3, 0.8) == CONTINUE
    assert session.tell(1, 3, 0.3) == STOP  # at the next rung it is


def test_trials_of_before_count_where_they_came_to(tmp_path):
    small.put(tmp_path, small.trial(0, [0.5] * 9, "finished"))
    small.put(tmp_path, small.trial(1, [0.2], "stopped"))
    small.put(tmp_path, small.trial(2, [0.4, 0.4, 0.4, 0.4], "failed"))
    small.put(tmp_path, small.trial(3, status="failed"))
    small.put(tmp_path, small.repeat(4, of=0, seed=43, dices=[0.99] * 9))  # it was not chosen by any rung
    session = Session(tmp_path, small.sweep())
    assert session.rungs() == {1: [0.2, 0.4, 0.5], 3: [0.4, 0.5]}
    session.start(5), session.start(6)
    assert session.tell(5, 1, 0.44) == CONTINUE  # at two thirds: 0.4 + 0.1 / 3 = 0.433
    assert session.tell(6, 1, 0.43) == STOP
