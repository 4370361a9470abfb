"""Ray's side of a sweep: runs of Tune over trials that an earlier session has begun, then over new ones.

Takes a `Plan` and the sweep's folder; starts trials, tells whether all have ended. All that must survive a kill lies in
the trials' folders (trials.py); Ray's own records are of one session and are not read again.
"""

import contextlib
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from tune import trials
from tune.options import Plan
from tune.progress import LiveTable
from tune.rungs import Rungs
from tune.scheduler import NotedAsha, note_stops
from tune.suggest import Suggestions
from tune.trial_run import run_trial
from tune.trials import METRIC, Sweep, Trial
from tune.watch import RETRIES, Silent, Watch

SESSION = "session"  # Ray's own files, in the sweep's folder


class Phase:
    """Runs of Tune over some trials, one after the other; together they have the sweep's time.

    Args:
        plan: of the sweep.
        sweep: its record.
        folder: its directory.
        needs: what one trial takes, and
        concurrent: how many run at a time (see `resources`).
        forks: where a node's process that forks for trials is asked, by node; None: on no node is one.
    """

    def __init__(
        self,
        plan: Plan,
        sweep: Sweep,
        folder: Path,
        needs: dict[str, float],
        concurrent: int,
        forks: dict[str, str] | None = None,
    ):
        self._plan, self._sweep, self._folder = plan, sweep, folder
        self._needs, self._concurrent, self._forks = needs, concurrent, forks or {}
        self._started_s = time.monotonic()
        self.interrupted = False
        """Whether Ctrl-C has been pressed, and told of, while Ray ran."""
        self.reported: list[Trial] | None = None
        """The trials as the results tell them that are written; None where they are not those of a moment of rest."""

    @property
    def left_s(self) -> float:
        """What is left of the sweep's time; infinity where it has no end."""
        return (self._plan.sweep.time_budget_s or math.inf) - time.monotonic() + self._started_s

    def run(self, queue: Sequence[Trial], suggestions: Suggestions | None, early_stop: bool) -> bool:
        """Runs trials until all have ended, or time is over, or somebody interrupts.

        Args:
            queue: trials that come first: unfinished ones, or repeats.
            suggestions: where the others come from; None: there are no others.
            early_stop: whether ASHA lets some wait, and ends some.

        Returns:
            Whether all have ended.
        """
        known = trials.read_all(self._folder)
        samples = len(queue) + (suggestions.left if suggestions else 0)
        if samples == 0:
            return True
        if (left_s := self.left_s) <= 0:
            return False
        rungs, scheduler = None, FIFOScheduler()
        if early_stop:
            rungs = Rungs(self._sweep, known, soon=self._plan.sweep.time_budget_s is not None)
            scheduler = NotedAsha(self._folder, rungs, self._sweep.num_epochs)
        ranks = self._plan.sweep.ranks(self._needs["GPU"])
        of_rank = {"CPU": max(1, self._needs["CPU"] // ranks), "GPU": self._needs["GPU"] / ranks}
        place = {"sweep": str(self._folder), "ranks": ranks, "needs": of_rank, "forks": self._forks}
        # Ranks of their own take the devices; the trial itself only waits for them.
        bundle = self._needs if ranks == 1 else {"CPU": 0, "memory": 1}  # a byte: Ray takes no empty request
        ended = {trial.number for trial in known} - {trial.number for trial in queue}
        shown = LiveTable(self._sweep, samples + len(ended))
        asked = Queue(self._folder, queue, suggestions, place, rungs, self._concurrent)
        watch = Watch(self._folder, shown, suggestions, asked)
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(self._concurrent)  # Ray would start one after the other
        tuner = tune.Tuner(
            tune.with_resources(run_trial, tune.PlacementGroupFactory([bundle])),
            tune_config=tune.TuneConfig(
                search_alg=asked,
                scheduler=scheduler,
                num_samples=-1,  # a trial that has waited is a new one of Ray's
                time_budget_s=left_s if math.isfinite(left_s) else None,
                reuse_actors=ranks == 1,  # whose process forks the next trial's
            ),
            run_config=tune.RunConfig(
                name=f"{SESSION}_{time.strftime('%Y%m%d_%H%M%S')}",
                storage_path=str(self._folder / "ray"),
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                callbacks=[watch, Silent()],
                verbose=0,
            ),
        )
        before = signal.getsignal(signal.SIGINT)
        try:
            with contextlib.suppress(EOFError):  # a full disk cut off Ray's record of an error; the folders tell it all
                tuner.fit()
        finally:
            signal.signal(signal.SIGINT, before)  # Ray leaves its own there
            self.interrupted = watch.interrupted
            self.reported = watch.reported
        watch.close()
        if suggestions is None:
            return all(trial.status != "unfinished" for trial in trials.read_all(self._folder))
        own = [trial for trial in trials.read_all(self._folder) if not trial.is_repeat]  # repeats come after this
        return suggestions.left == 0 and all(trial.status != "unfinished" for trial in own)


class Queue(Searcher):
    """Hands trials to Ray, one whenever there is room: those of the queue, those that may go on, then new ones.

    Args:
        folder: the sweep's; a new trial gets its folder there.
        queue: trials that come first, unless they wait at a rung.
        suggestions: new ones, or None.
        place: what `run_trial` needs besides the number.
        rungs: where trials wait; None: none does.
        concurrent: trials at a time, at the most.
    """

    def __init__(
        self,
        folder: Path,
        queue: Sequence[Trial],
        suggestions: Suggestions | None,
        place: dict[str, Any],
        rungs: Rungs | None,
        concurrent: int,
    ) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._concurrent, self._lost = concurrent, Counter()
        self._folder, self._suggestions, self._place, self._rungs = folder, suggestions, place, rungs
        waiting = rungs.waiting if rungs else frozenset()
        self._queue = [trial for trial in queue if trial.number not in waiting]
        for trial in queue:
            if trial.number in waiting and suggestions:
                suggestions.told(trial)
        self._numbers: dict[str, int] = {}
        """Ray's name of a trial that runs -> its number."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's place; None while it depends on those that run whether there is one."""
        if len(self._numbers) >= self._concurrent:
            return None
        number = self._next()
        if number is None:
            return None if self._numbers else Searcher.FINISHED
        self._numbers[trial_id] = number
        if self._rungs:
            self._rungs.begin(number)
        return self._place | {"number": number}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """One has ended, or waits at a rung; what it has come to `Watch` reads in its folder, and settles errors."""
        if not error:
            self.forget(trial_id)

    def holds(self, trial_id: str) -> bool:
        """Whether it takes one of Ray's trials to run."""
        return trial_id in self._numbers

    def waits(self, number: int) -> bool:
        """Whether a trial waits at a rung."""
        return self._rungs is not None and number in self._rungs.waiting

    def forget(self, trial_id: str) -> None:
        """One of Ray's trials is no more."""
        number = self._numbers.pop(trial_id, None)
        if self._rungs and number is not None:
            self._rungs.end(number)

    def again(self, trial_id: str) -> bool:
        """Takes back a trial whose process Ray has lost before it began; False once that has come too often."""
        number = self._numbers[trial_id]
        self._lost[number] += 1
        if self._lost[number] > RETRIES:
            self.forget(trial_id)
            return False
        del self._numbers[trial_id]
        self._queue.append(trials.read(trials.folder_of(self._folder, number)))
        return True

    def save(self, checkpoint_path: str) -> None:
        """An empty file: the trials' folders are the memory."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""

    def _next(self) -> int | None:
        number = None if self._queue else self._waited()
        if number is not None:
            return number
        trial = self._queue.pop(0) if self._queue else self._suggestions and self._suggestions.next()
        if trial is not None:
            trials.create(self._folder, trial)
            return trial.number
        if self._rungs:
            self._rungs.close()
        return self._waited()

    def _waited(self) -> int | None:
        """One that has waited and may go on; those that never will end here."""
        if self._rungs is None:
            return None
        note_stops(self._folder, self._rungs)
        return self._rungs.next()
