"""What happens when a trial of Ray's starts, reports, ends or fails: it is shown and noted, the best is kept.

Takes Ray's calls and the trials' folders, which tell how a trial has ended; writes the results each time one has.
"""

import contextlib
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.progress_reporter import TrialProgressCallback

from sft.settings import DiskError
from tune import keeping, results, trials
from tune.progress import STOPPING, LiveTable
from tune.suggest import Suggestions
from tune.trial_run import CRASH_FILE, free_ranks
from tune.trials import Trial

RETRIES = 2  # of a trial that crashed, from its last checkpoint


class Watch(Callback):
    """Follows the trials: shows them, notes crashes, keeps the best adapter, deletes what losers leave.

    Args:
        folder: the sweep's.
        shown: the live table.
        suggestions: is told of every end, and of each wait at a rung; None: nobody.
        queue: the driver's, which takes back trials that Ray has lost.
    """

    def __init__(self, folder: Path, shown: LiveTable, suggestions: Suggestions | None, queue: Any):
        self._folder, self._shown, self._suggestions, self._queue = folder, shown, suggestions, queue
        self._running: dict[str, int] = {}
        self._since_s: dict[str, float] = {}
        self.interrupted = False
        """Whether Ctrl-C has been pressed."""
        self.reported: list[Trial] | None = None
        """The trials as the last results tell them; None where others were running then, or none has ended."""

    def setup(self, **info: Any) -> None:
        """Ray has begun; at Ctrl-C it ends the trials, which takes seconds, without a word."""
        of_ray = signal.getsignal(signal.SIGINT)

        def first(number: int, frame: Any) -> None:
            self.interrupted = True
            with contextlib.suppress(RuntimeError):  # the table is just being drawn, on a terminal that is held up
                self._shown.say(STOPPING)
            of_ray(number, frame)  # puts back what was there before: the next Ctrl-C raises KeyboardInterrupt

        signal.signal(signal.SIGINT, first)

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """A trial has its devices, for the first or a further attempt."""
        self._running[trial.trial_id] = trial.config["number"]
        self._since_s.setdefault(trial.trial_id, time.monotonic())
        self._show()

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        """A validation."""
        self._show()

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """A trial has ended by itself or was stopped."""
        self._ended(trial)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """A trial has crashed for the last time; or the process that Ray kept for it had died before it began."""
        began = trial.trial_id in self._since_s
        if not began and self._queue.holds(trial.trial_id) and self._queue.again(trial.trial_id):
            return
        self._queue.forget(trial.trial_id)
        held_s = time.monotonic() - self._since_s.get(trial.trial_id, time.monotonic())
        self._note_crash(trials_folder(self._folder, trial), held_s)
        self._ended(trial)

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        """Now and then. Ray may end a trial without a word, where its process does not let go of the one before."""
        for trial in trials:
            if self._queue.holds(trial.trial_id) and trial.is_finished():
                self._running.pop(trial.trial_id, None)
                if not self._queue.again(trial.trial_id):
                    self._note_crash(trials_folder(self._folder, trial), 0.0)
                    self._ended(trial)
        self._shown.tick(lambda: (trials_of(self._folder), list(self._running.values())))

    def close(self) -> None:
        """The last look."""
        self._running.clear()
        self._shown.close(trials_of(self._folder))

    def _ended(self, trial: Any) -> None:
        self._running.pop(trial.trial_id, None)
        found, number = trials_of(self._folder), trial.config["number"]
        this = next(one for one in found if one.number == number)
        if self._suggestions is not None:
            self._suggestions.told(this)
        best = keeping.best_at_rest(found, list(self._running.values()))
        if this.status != "unfinished" or this is best:  # others that wait at a rung change no result
            self._update(found, number)
        free_ranks(trials_folder(self._folder, trial))
        shutil.rmtree(trials_folder(self._folder, trial) / "ray", ignore_errors=True)
        self._show(force=True)
        if self._queue.waits(number):
            self._shown.waits(this)

    def _update(self, found: list[Trial], number: int) -> None:
        live = list(self._running.values())
        try:
            results.update(self._folder, trials.read_sweep(self._folder), found, live)
            self.reported = None if live else found
        except Exception as error:  # a full disk may have room again when the next trial ends; Ray would try again
            what = keeping.in_words(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            print(f"warning: {what}; the results are of before trial {number}", flush=True)

    def _show(self, force: bool = False) -> None:
        self._shown.show(trials_of(self._folder), list(self._running.values()), force)

    def _note_crash(self, folder: Path, held_s: float) -> None:
        """Notes how a trial failed; one that only lacked room on a disk stays unfinished, to go on later."""
        if (folder / trials.OUTCOME_FILE).exists():
            return
        crash = folder / CRASH_FILE
        lines = crash.read_text(encoding="utf-8", errors="replace").split("\n") if crash.exists() else []
        last = next((line for line in reversed(lines) if line.strip()), "its process died")
        try:
            if DiskError.__name__ not in last:
                trials.write_outcome(folder, "failed", f"crashed {RETRIES + 1} times: {last}", held_s)
                return
        except OSError as error:
            last = keeping.in_words(error)
        print(f"warning: trial {int(folder.name)} has not ended: {last.partition(': ')[2]}", flush=True)


class Silent(TrialProgressCallback):
    """In place of the lines that Ray prints of its own where a trial ends without a validation."""

    def on_trial_result(self, *_: Any, **info: Any) -> None:
        """Nothing: `Watch` shows it."""

    def on_trial_error(self, *_: Any, **info: Any) -> None:
        """Nothing: `Watch` shows it."""

    def on_trial_complete(self, *_: Any, **info: Any) -> None:
        """Nothing: `Watch` shows it."""


def trials_of(folder: Path) -> list[Trial]:
    """All trials of a sweep."""
    return trials.read_all(folder)


def trials_folder(folder: Path, trial: Any) -> Path:
    """The folder of one of Ray's trials."""
    return trials.folder_of(folder, trial.config["number"])
