"""ASHA for Ray: which trial Ray stops at a rung, and what of it is noted on the disk.

Takes Ray's results, asks the rungs (rungs.py), gives Ray's decisions. A trial that waits at a rung has ended in Ray's
eyes, which frees its devices; the queue of driver.py hands it to Ray again when it may go on.
"""

from pathlib import Path
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from tune import trials
from tune.rungs import Rungs
from tune.trials import METRIC

EPOCH = "epoch"  # absolute: a trial that was restored does not begin at 1 again


class NotedAsha(FIFOScheduler):
    """Ray's scheduler over the rungs.

    Args:
        folder: the sweep's.
        rungs: where its trials stand.
        num_epochs: of a whole trial.
    """

    def __init__(self, folder: Path, rungs: Rungs, num_epochs: int) -> None:
        super().__init__()
        self._folder, self._rungs, self._num_epochs = folder, rungs, num_epochs

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decides whether a trial goes on at once."""
        if EPOCH not in result:  # it has failed before its first validation, and ends by itself
            return TrialScheduler.CONTINUE
        if result[EPOCH] >= self._num_epochs:
            return TrialScheduler.CONTINUE
        goes_on = self._rungs.report(result["number"], result[EPOCH], result[METRIC])
        note_stops(self._folder, self._rungs)
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP


def note_stops(folder: Path, rungs: Rungs) -> None:
    """Notes the end of trials that wait in vain.

    Args:
        folder: the sweep's.
        rungs: where its trials stand.
    """
    for number, reason in rungs.take_out().items():
        try:
            trials.write_outcome(trials.folder_of(folder, number), "stopped", reason)
        except OSError as error:  # a later session stops it
            print(f"warning: {error.filename}: {error.strerror}; trial {number} was stopped", flush=True)
