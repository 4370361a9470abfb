"""What Ray is told of a validation: whether the trial runs on, and what of it is on the disk by then."""

import pytest
import small_sweeps as small
from ray.tune.schedulers import TrialScheduler

from tune import trials
from tune.rungs import Rungs
from tune.scheduler import NotedAsha, note_stops

CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


@pytest.fixture
def asha(tmp_path):
    """Over six trials that have begun, of 9 epochs with rungs at 1 and 3."""
    for number in range(1, 7):
        trials.create(tmp_path, small.trial(number))
    sweep = small.sweep(num_trials=6)
    return NotedAsha(tmp_path, Rungs(sweep, trials.read_all(tmp_path)), sweep.num_epochs)


def tell(asha: NotedAsha, number: int, epoch: int, dice: float) -> str:
    """A restored trial's training_iteration begins at 1 again."""
    result = {"epoch": epoch, "dice_so_far": dice, "number": number, "training_iteration": 1}
    return asha.on_trial_result(None, None, result)


def test_a_trial_that_waits_frees_its_devices_and_has_not_ended(tmp_path, asha):
    assert [tell(asha, number, 1, dice) for number, dice in ((1, 0.3), (2, 0.4), (3, 0.5))] == [STOP, STOP, CONTINUE]
    assert tell(asha, 3, 2, 0.5) == CONTINUE
    assert trials.read(trials.folder_of(tmp_path, 2)).status == "unfinished"


def test_a_trial_that_waits_in_vain_is_stopped_with_its_reason(tmp_path, asha):
    for number, dice in ((1, 0.3), (2, 0.4), (3, 0.5)):
        tell(asha, number, 1, dice)
    found = [trials.read(trials.folder_of(tmp_path, number)) for number in (1, 2, 3)]
    assert [trial.status for trial in found] == ["stopped", "unfinished", "unfinished"]
    assert found[0].reason == "at epoch 1 not among the best 1/3 with Dice 0.3000"


def test_a_trial_at_its_last_epoch_ends_by_itself(asha):
    assert tell(asha, 1, 9, 0.1) == CONTINUE


def test_a_trial_that_failed_before_its_first_validation_is_not_judged(asha):
    assert asha.on_trial_result(None, None, {"done": True, "config/number": 1}) == CONTINUE
    assert asha._rungs.running == {1, 2, 3, 4, 5, 6}


def test_a_disk_that_is_full_keeps_nobody_from_going_on(tmp_path, asha, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "outcome.json")

    monkeypatch.setattr(trials, "write_outcome", full)
    assert [tell(asha, number, 1, dice) for number, dice in ((1, 0.3), (2, 0.4), (3, 0.5))][-1] == CONTINUE
    assert capsys.readouterr().out == "warning: outcome.json: No space left on device; trial 1 was stopped\n"
    note_stops(tmp_path, asha._rungs)
    assert capsys.readouterr().out == ""
