"""Ray's side of a sweep: nodes and devices, one Tuner run, what happens when a trial reports, ends or fails.

Takes a `Plan` and the sweep's folder; starts trials and notes how they end. All that must survive a kill lies in the
trials' folders (trials.py); Ray's own records are of one session and are not read again.
"""

import contextlib
import math
import os
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Callback
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sft.config import TrainConfig
from sft.ranks import rank_environ
from sft.settings import DiskError, UserError
from tune import keeping, results, trials
from tune.options import ROOT, Plan, SweepConfig
from tune.progress import LiveTable
from tune.scheduler import NotedAsha
from tune.suggest import Suggestions
from tune.trial_run import CRASH_FILE, limit_gpu_memory, run_trial
from tune.trials import METRIC, Sweep, Trial

ANSWERS_S = 10.0  # a cluster's head; Ray itself would ask for minutes, and warn all the while
RETRIES = 2  # of a trial that crashed, from its last checkpoint
STOPPING = "stopping: the trials end, the table follows; press Ctrl-C again to leave without it"
SESSION = "session"  # Ray's own files, in the sweep's folder
ENVIRONMENT = {  # of the driver
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the trials' own logs hold all of it
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails before its first validation has no Dice
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # otherwise Tune prints a table of its own
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "120",  # instead of 30: a machine may be busy
}


def start_ray(address: str | None, gpus: Sequence[str]) -> None:
    """Starts Ray on this machine, or joins a cluster.

    Args:
        address: of a cluster, or None.
        gpus: devices of this machine that trials may use; empty without any.

    Raises:
        UserError: no cluster there.
    """
    os.environ.update(ENVIRONMENT)
    for name in (*rank_environ(0, 1), "MASTER_ADDR", "MASTER_PORT"):  # a trial finds a rank and a port of its own
        os.environ.pop(name, None)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    told = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths), "RAY_CHDIR_TO_TRIAL_DIR": "0"}}
    options = {"runtime_env": told, "log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if address:
        try:
            _reach(address)
            ray.init(address=address, **options)
        except (OSError, OverflowError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"address {address}: no Ray cluster answers ({reason}); ray start --head first") from None
        return
    cores = len(os.sched_getaffinity(0))
    try:
        ray.init(address="local", num_cpus=cores, num_gpus=len(gpus), include_dashboard=False, **options)
    except Exception as error:  # Ray has no class for it
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"Ray did not start on this machine ({reason}); start again when it is less busy") from error


def _reach(address: str) -> None:
    """Raises OSError or OverflowError where an address names a host and a port at which nobody listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERS_S).close()


def resources(sweep: SweepConfig) -> tuple[dict[str, float], int]:
    """What one trial takes (`CPU`, `GPU`) and how many run at a time.

    Raises:
        UserError: the cluster has less than one trial needs.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(node.get("GPU", 0) for node in nodes)
    per_trial = sweep.gpus_per_trial if gpus else 0.0
    ranks = sweep.ranks(per_trial)
    if per_trial > gpus:
        raise UserError(f"gpus_per_trial = {per_trial:g}, but there are {gpus:g} GPUs; give at most {gpus:g}")
    if gpus and ranks > max(1, per_trial):
        raise UserError(f"ranks_per_trial = {ranks} needs a GPU for each rank: give --gpus_per_trial {ranks}")
    # A rank lies whole on a node; the cores of a node without GPUs are no help to a trial that has one.
    hosts = [(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes if not gpus or node.get("GPU", 0) >= 1]
    if ranks > 1:  # they may lie on several
        hosts = [tuple(map(sum, zip(*hosts, strict=True)))]
    # Trials that share a GPU: as many as lie whole on each.
    rooms = [int(own // per_trial) if per_trial >= 1 else int(own) * int(1 / per_trial) for _, own in hosts if gpus]
    share = min((int(cpus // room) for (cpus, _), room in zip(hosts, rooms, strict=False)), default=0)
    cores = max(ranks, sweep.cpus_per_trial or share)  # a rank has one at the least
    fits = [int(cpus // cores) for cpus, _ in hosts]
    room = sum(map(min, fits, rooms) if gpus else fits)
    if room < 1:
        most = max((cpus for cpus, _ in hosts), default=0)
        raise UserError(
            f"a trial of {ranks} ranks takes {cores} cores, but there are {most:g}; give fewer --cpus_per_trial or "
            "--ranks_per_trial"
        )
    return {"CPU": cores, "GPU": per_trial}, min(room, sweep.max_concurrent or room)


def prepare_nodes(config: TrainConfig, needs: dict[str, float]) -> list[Any]:
    """Computes the frozen features once on each node, before any trial.

    Args:
        config: what the trials have in common, with their highest rank.
        needs: what one trial takes.

    Returns:
        What `sft.train.prepare` gave on each node.

    Raises:
        UserError: a mistake in data, checkpoint or settings.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if needs["GPU"]:
        nodes = [node for node in nodes if node["Resources"].get("GPU", 0) >= 1] or nodes
    cores = min(int(node["Resources"]["CPU"]) for node in nodes)
    # One call per process: a trial in the same process would count its seconds as its own.
    options = {"num_cpus": cores, "num_gpus": 1 if needs["GPU"] else 0, "max_retries": 1, "max_calls": 1}
    task = ray.remote(**options)(_prepare)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    found = ray.get([task.options(scheduling_strategy=place).remote(config, needs["GPU"]) for place in places])
    for one in found:
        if isinstance(one, str):
            raise UserError(one)
    return found


class Phase:
    """Runs of Tune over some trials, one after the other; together they have the sweep's time.

    Args:
        plan: of the sweep.
        sweep: its record.
        folder: its directory.
        needs: what one trial takes, and
        concurrent: how many run at a time (see `resources`).
    """

    def __init__(self, plan: Plan, sweep: Sweep, folder: Path, needs: dict[str, float], concurrent: int):
        self._plan, self._sweep, self._folder = plan, sweep, folder
        self._needs, self._concurrent = needs, concurrent
        self._started_s = time.monotonic()
        self.interrupted = False
        """Whether Ctrl-C has been pressed, and told of, while Ray ran."""

    @property
    def left_s(self) -> float:
        """What is left of the sweep's time; infinity where it has no end."""
        return (self._plan.sweep.time_budget_s or math.inf) - time.monotonic() + self._started_s

    def run(self, queue: Sequence[Trial], suggestions: Suggestions | None, early_stop: bool) -> bool:
        """Runs trials until all have ended, or time is over, or somebody interrupts.

        Args:
            queue: trials that come first: unfinished ones, or repeats.
            suggestions: where the others come from; None: there are no others.
            early_stop: whether ASHA ends some.

        Returns:
            Whether all have ended.
        """
        known = trials.read_all(self._folder)
        samples = len(queue) + (suggestions.left if suggestions else 0)
        if samples == 0:
            return True
        left_s = self.left_s
        if left_s <= 0:
            return False
        scheduler = NotedAsha(self._folder, self._sweep, known) if early_stop else FIFOScheduler()
        ranks = self._plan.sweep.ranks(self._needs["GPU"])
        of_rank = {"CPU": max(1, self._needs["CPU"] // ranks), "GPU": self._needs["GPU"] / ranks}
        place = {"sweep": str(self._folder), "ranks": ranks, "needs": of_rank}
        # Ranks of their own take the devices; the trial itself only waits for them.
        bundle = self._needs if ranks == 1 else {"CPU": 0, "memory": 1}  # a byte: Ray takes no empty request
        waiting = {trial.number for trial in queue}
        shown = LiveTable(self._sweep, samples + sum(trial.number not in waiting for trial in known))
        watch = Watch(self._folder, shown, suggestions)
        tuner = tune.Tuner(
            tune.with_resources(run_trial, tune.PlacementGroupFactory([bundle])),
            tune_config=tune.TuneConfig(
                search_alg=Queue(self._folder, queue, suggestions, place),
                scheduler=scheduler,
                num_samples=samples,
                max_concurrent_trials=self._concurrent,
                time_budget_s=left_s if math.isfinite(left_s) else None,
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
        watch.close()
        to_come = suggestions is not None and suggestions.left > 0  # interrupted between one trial and the next
        return not to_come and all(trial.status != "unfinished" for trial in trials.read_all(self._folder))


class Queue(Searcher):
    """Hands trials to Ray, one whenever there is room: those of the queue, then new ones.

    Args:
        folder: the sweep's; a new trial gets its folder there.
        queue: trials that come first.
        suggestions: new ones, or None.
        place: what `run_trial` needs besides the number.
    """

    def __init__(
        self, folder: Path, queue: Sequence[Trial], suggestions: Suggestions | None, place: dict[str, Any]
    ) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._folder, self._queue, self._suggestions, self._place = folder, list(queue), suggestions, place

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial's place."""
        trial = self._queue.pop(0) if self._queue else self._suggestions and self._suggestions.next()
        if trial is None:
            return Searcher.FINISHED
        trials.create(self._folder, trial)
        return self._place | {"number": trial.number}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Nothing: `Watch` reads the trial's folder."""

    def save(self, checkpoint_path: str) -> None:
        """An empty file: the trials' folders are the memory."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class Watch(Callback):
    """Follows the trials: shows them, notes crashes, keeps the best adapter, deletes what losers leave.

    Args:
        folder: the sweep's.
        shown: the live table.
        suggestions: is told of every end; None: nobody.
    """

    def __init__(self, folder: Path, shown: LiveTable, suggestions: Suggestions | None):
        self._folder, self._shown, self._suggestions = folder, shown, suggestions
        self._running: dict[str, int] = {}
        self._since_s: dict[str, float] = {}
        self.interrupted = False
        """Whether Ctrl-C has been pressed."""

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
        """A trial has crashed for the last time."""
        held_s = time.monotonic() - self._since_s.get(trial.trial_id, time.monotonic())
        self._note_crash(trials_folder(self._folder, trial), held_s)
        self._ended(trial)

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        """Now and then."""
        self._shown.tick(lambda: (trials_of(self._folder), list(self._running.values())))

    def close(self) -> None:
        """The last look."""
        self._running.clear()
        self._shown.close(trials_of(self._folder))

    def _ended(self, trial: Any) -> None:
        self._running.pop(trial.trial_id, None)
        found, number = trials_of(self._folder), trial.config["number"]
        if self._suggestions is not None:
            self._suggestions.ended(next(one for one in found if one.number == number))
        sweep, live = trials.read_sweep(self._folder), list(self._running.values())
        try:
            keeping.keep_best(self._folder, found, live)
            keeping.write_best(self._folder, sweep, found, live)
            results.write(self._folder, sweep, found)
        except OSError as error:  # a full disk may have room again when the next trial ends
            print(f"warning: {in_words(error)}; the results are of before trial {number}", flush=True)
        shutil.rmtree(trials_folder(self._folder, trial) / "ray", ignore_errors=True)
        self._show(force=True)

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
            last = in_words(error)
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


def in_words(error: OSError) -> str:
    """What failed and why; of a folder that could not be copied its first file."""
    if isinstance(error, shutil.Error):
        _, target, reason = error.args[0][0]
        return f"{target}: {reason}"
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def _prepare(config: TrainConfig, gpus_per_trial: float) -> Any:
    """Runs on a node; a mistake comes back as text, since Ray would wrap it."""
    from sft.train import prepare

    try:
        limit_gpu_memory(gpus_per_trial)
        return prepare(config)
    except UserError as error:
        return str(error)
