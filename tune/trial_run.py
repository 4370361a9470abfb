"""One trial where it runs: the training of launch/train.py, told to Ray at every validation.

Takes a sweep's folder and a number, reads what was drawn, trains from the trial's last checkpoint, notes every
validation in the trial's folder before anyone is told of it. Of several ranks the first waits for the trial, looks
where it stands and tells the others. A mistake that would come again (too little memory, a loss that is no number) ends
the trial with its reason; anything else is raised, and Ray tries again.
"""

import contextlib
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft.config import TrainConfig, override
from sft.settings import DiskError, UserError
from tune import trials
from tune.fork_server import ForkServer
from tune.trials import METRIC, SPLIT_FILE, Sweep, Trial

TOLD = ("epoch", "dice", "dice_best", "threshold_best", "iou", "recall", "precision", "seg_rate")
CRASH_FILE, RANKS_FILE = "crash.txt", "ranks.txt"
CONTEXT_BYTES = 700 * 2**20  # CUDA context and libraries of one process, outside torch's own memory

_forks = ForkServer()  # of this process

Report = Callable[[dict[str, Any]], None]
Share = Callable[[dict[str, Any] | None], dict[str, Any] | None]


def run_trial(place: dict[str, Any]) -> None:
    """Ray's trainable: one rank here, or several in processes of their own under Ray Train.

    Args:
        place: `sweep` (folder), `number`, `ranks`, of each rank `needs` (CPU, GPU), and `forks`: where a node's
            `ForkSource` is asked.
    """
    import ray
    from ray import train as ray_train
    from ray import tune

    if place["ranks"] == 1:
        # The first one waits for this process; Ray gives the process to another one then.
        began = time.time() if _forks.is_warm else start_of_process()
        told = {"sweep": place["sweep"], "number": place["number"], "cpus": place["needs"]["CPU"], "began": began}
        _forks.run(told, tune.report, place["forks"].get(ray.get_runtime_context().get_node_id()))
        return
    from ray.tune.integration.ray_train import TuneReportCallback

    folder = trials.folder_of(Path(place["sweep"]), place["number"])
    free_ranks(folder)  # of an attempt before this one
    trainer = _trainer_class()(
        _rank_of_trial,
        train_loop_config=place,
        scaling_config=ray_train.ScalingConfig(
            num_workers=place["ranks"], use_gpu=place["needs"]["GPU"] > 0, resources_per_worker=place["needs"]
        ),
        run_config=ray_train.RunConfig(
            name=f"ranks_{os.getpid()}", storage_path=str(folder / "ray"), callbacks=[TuneReportCallback()]
        ),
    )
    trainer.fit()


def _trainer_class() -> type:
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        """Without the process that Ray Train starts to do what `free_ranks` does: it would outlive the trial."""

        def _create_default_callbacks(self) -> list:
            callbacks = super()._create_default_callbacks()
            return [one for one in callbacks if type(one).__name__ != "PlacementGroupCleanerCallback"]

    return Trainer


def free_ranks(folder: Path) -> None:
    """Gives back what the ranks of a trial hold, and ends them, where the trial was ended from outside.

    Ray Train keeps their placement group then until the whole sweep has ended: it looks for it through Ray's dashboard,
    which a sweep does not need otherwise.

    Args:
        folder: the trial's.
    """
    file = folder / RANKS_FILE
    if not file.exists():
        return
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(file.read_text()))))
    file.unlink(missing_ok=True)


def train_trial(
    sweep: str | Path,
    number: int,
    cpus: int,
    report: Report,
    share: Share = lambda told: told,
    began: float | None = None,
) -> None:
    """Trains one trial to its end, from where it stands.

    Args:
        sweep: the folder that holds sweep.json, split.json and the trials.
        number: of the trial.
        cpus: of this rank; the machine's others are other trials'.
        report: is told epoch and best Dice after each validation; may not return.
        share: a collective: gives every rank what rank 0 gives it. Without it the rank is the only one.
        began: when the trial got its devices, in seconds since the epoch; None: when this process was started.
    """
    sweep_folder, began = Path(sweep), began or start_of_process()
    sweep = trials.read_sweep(sweep_folder)
    folder = trials.folder_of(sweep_folder, number)
    is_main, before_s = os.environ.get("RANK", "0") == "0", 0.0
    with contextlib.ExitStack() as running:
        try:
            start = _start(folder, running, share, is_main)
            if start is None:  # rank 0 could not start, and says why
                return
            trial = trials.read(folder)
            before_s = trial.device_s
            limit_gpu_memory(sweep.gpus_per_trial)
            validations = Validations(folder, trial, sweep, report, is_main, began)
            config = settings_of(sweep, trial, folder, start["resume"])
            if validations.last is None or validations.last["epoch"] < sweep.num_epochs:
                _train(config, cpus, sweep_folder / SPLIT_FILE, validations)
        except UserError as error:
            if isinstance(error, DiskError):  # the same trial may go on once there is room
                _note_crash(folder)
                raise
            if is_main:
                trials.write_outcome(folder, "failed", str(error), before_s + time.time() - began)
            return
        except Exception:
            _note_crash(folder)
            raise
        if is_main:
            trials.write_outcome(folder, "finished")
        report(told(validations.last, trial.number))


class Validations:
    """What `train` calls after each validation: notes it, then tells Ray.

    Args:
        folder: the trial's.
        trial: as it was before this attempt.
        sweep: whose epochs end it.
        report: see `train_trial`.
        is_main: whether this rank writes.
        began: see `train_trial`.
    """

    def __init__(self, folder: Path, trial: Trial, sweep: Sweep, report: Report, is_main: bool, began: float):
        self._folder, self._trial, self._sweep = folder, trial, sweep
        self._report, self._is_main, self._began = report, is_main, began
        self._best, self._before_s = trial.dice_so_far, trial.device_s
        self._start_s: float | None = None
        self.last = trial.rows[-1] if trial.rows else None
        """The last validation, as it is noted."""

    def __call__(self, row: dict[str, Any]) -> None:
        """Takes a row of `train`."""
        if row["epoch"] == 0 or self._start_s is None:
            self._start_s = time.time() - self._began
        if row["epoch"] == 0:
            return
        held_s = time.time() - self._began
        noted = _noted(row, self._best, self._before_s + held_s) | {"start_s": self._start_s}
        self._best = noted[METRIC]
        self.last = noted
        if self._is_main:
            trials.append_row(self._folder, noted)
        if row["epoch"] < self._sweep.num_epochs:  # the last one is told when all is written
            self._report(told(noted, self._trial.number))


def settings_of(sweep: Sweep, trial: Trial, folder: Path, resume: str | None) -> TrainConfig:
    """The TrainConfig of a trial: its settings, its folder, and the checkpoint it goes on from.

    Raises:
        UserError: the settings contradict each other.
    """
    config = override(TrainConfig(**sweep.base), trial.settings)
    place = {"output_dir": str(folder), "save_every": sweep.base["validate_every"], "resume": resume, "keep": "latest"}
    return override(config, place | {"gpu": None, "include": None})


def told(row: dict[str, Any], number: int) -> dict[str, Any]:
    """What Ray is told of a validation."""
    return {"epoch": row["epoch"], METRIC: row[METRIC], "number": number}


def _start(folder: Path, running: contextlib.ExitStack, share: Share, is_main: bool) -> dict[str, Any] | None:
    """Where all ranks go on from: rank 0 looks once no other process runs the trial, and tells it.

    Args:
        folder: the trial's.
        running: holds the trial for rank 0 until it has ended.
        share: see `train_trial`.
        is_main: whether this is rank 0.

    Returns:
        `resume`: the checkpoint, or None. On other ranks than 0 None for all where rank 0 has failed.
    """
    found, failed = None, None
    if is_main:
        try:
            running.enter_context(trials.alone(folder))
            found = {"resume": _caught_up(folder)}
        except Exception as error:  # the others wait for a word
            failed = error
    found = share(found)
    if failed is not None:
        raise failed
    return found


def _caught_up(folder: Path) -> str | None:
    """The checkpoint that a trial goes on from; validations that a kill kept from its folder are noted now.

    Raises:
        UserError: the run's files were changed.
    """
    from sft import checkpoint

    runs = sorted(folder.glob(checkpoint.RUN_PATTERN))
    found = checkpoint.newest(runs[-1]) if runs else None
    if found is None:
        return None
    for row in _not_noted(trials.read(folder), found.parent, checkpoint.read_progress(found).epoch):
        trials.append_row(folder, row)
    return str(found)


def _note_crash(folder: Path) -> None:
    """Keeps the traceback for a person; on a full disk there may be no room for it, either."""
    with contextlib.suppress(OSError), (folder / CRASH_FILE).open("a", encoding="utf-8") as file:
        file.write(traceback.format_exc())


def limit_gpu_memory(gpus_per_trial: float) -> None:
    """Trials that share a GPU: none takes another's memory; what CUDA itself takes in each process is set aside."""
    if 0 < gpus_per_trial < 1:
        import torch

        if torch.cuda.is_available():
            aside = CONTEXT_BYTES / torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            torch.cuda.set_per_process_memory_fraction(max(gpus_per_trial / 2, gpus_per_trial - aside))


def start_of_process() -> float:
    """When this process was started, in seconds since the epoch."""
    import psutil

    return psutil.Process().create_time()


def _rank_of_trial(place: dict[str, Any]) -> None:
    from ray import train as ray_train
    from ray.train import collective
    from ray.util import get_current_placement_group

    if ray_train.get_context().get_world_rank() == 0:
        held = get_current_placement_group().id.hex()
        trials.write_whole(trials.folder_of(Path(place["sweep"]), place["number"]) / RANKS_FILE, held.encode())
    cpus, share = place["needs"]["CPU"], collective.broadcast_from_rank_zero
    train_trial(place["sweep"], place["number"], cpus, ray_train.report, share)


def _train(config: TrainConfig, cpus: int, split_file: Path, on_validation: Callable[[dict], None]) -> None:
    from sft.features import MOST_READERS  # torch and all the rest load here
    from sft.train import train

    if config.num_workers == "auto":
        config = override(config, {"num_workers": min(MOST_READERS, cpus)})
    train(config, on_validation, split_file)


def _not_noted(trial: Trial, run: Path, epoch: int) -> tuple[dict[str, Any], ...]:
    """The validations up to a checkpoint, which is on the disk before they are noted."""
    best, found = trial.dice_so_far, []
    for row in json.loads((run / "training_log.json").read_text(encoding="utf-8")):
        if row["kind"] == "val" and trial.epoch < row["epoch"] <= epoch:
            found.append(_noted(row, best, trial.device_s))
            best = found[-1][METRIC]
    return tuple(found)


def _noted(row: dict[str, Any], best: float | None, device_s: float) -> dict[str, Any]:
    """A validation of `train` as the trial's folder holds it; `best` is the Dice of those before."""
    best = row["dice"] if best is None else max(best, row["dice"])
    told = {name: row[name] for name in TOLD if name in row}
    return told | {METRIC: best, "device_s": device_s, "time": time.time()}
