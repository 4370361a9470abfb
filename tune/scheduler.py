"""ASHA with a memory: trials of an earlier session stand in its rungs, and what it stops is noted on the disk.

Takes trials as their folders tell them and Ray's results, gives Ray's decisions. The algorithm is Ray's own: at epochs
grace, grace x reduction, ... a trial goes on if its best Dice is among the best 1/reduction of all that came there. The
seed setting is never stopped.
"""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from tune import trials
from tune.trials import METRIC, SEED_NUMBER, Sweep, Trial

EPOCH = "epoch"  # absolute: a trial that was restored does not begin at 1 again


class NotedAsha(ASHAScheduler):
    """Ray's ASHAScheduler over absolute epochs.

    Args:
        folder: the sweep's.
        sweep: its grace, reduction and epochs.
        earlier: trials that an earlier session has begun; repeats are none of the search's.
    """

    def __init__(self, folder: Path, sweep: Sweep, earlier: Iterable[Trial]):
        options = {"grace_period": sweep.grace_epochs, "reduction_factor": sweep.reduction}
        super().__init__(time_attr=EPOCH, metric=METRIC, mode="max", max_t=sweep.num_epochs, **options)
        self._folder, self._num_epochs = folder, sweep.num_epochs
        self._earlier = {trial.number: trial for trial in earlier if not trial.is_repeat}
        for trial in self._earlier.values():
            if trial.status != "unfinished":
                stand_in = SimpleNamespace(trial_id=f"trial {trial.number}", config={"number": trial.number})
                self.on_trial_add(None, stand_in)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Puts a trial into the rungs it has come to before."""
        super().on_trial_add(tune_controller, trial)
        before = self._earlier.get(trial.config["number"])
        for row in before.rows if before else ():
            if row[EPOCH] < self._num_epochs:
                super().on_trial_result(tune_controller, trial, row)  # decided long ago; only the rungs remember

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decides whether a trial goes on, and notes it if not."""
        if EPOCH not in result:  # it has failed before its first validation, and ends by itself
            return TrialScheduler.CONTINUE
        decision = super().on_trial_result(tune_controller, trial, result)
        if result[EPOCH] >= self._num_epochs or result["number"] == SEED_NUMBER:
            return TrialScheduler.CONTINUE  # it has ended by itself; or all others are held against its whole course
        if decision == TrialScheduler.STOP:
            reason = f"at epoch {result[EPOCH]} not among the best 1/{self._reduction_factor:g} with Dice "
            try:
                folder = trials.folder_of(self._folder, result["number"])
                trials.write_outcome(folder, "stopped", f"{reason}{result[METRIC]:.4f}")
            except OSError as error:  # it goes on in a later session, past this rung
                print(f"warning: {error.filename}: {error.strerror}; trial {result['number']} was stopped", flush=True)
        return decision
