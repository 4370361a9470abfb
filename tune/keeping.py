"""What of a sweep stays on the disk: one checkpoint of each live trial, the best adapter and its settings.

Takes a sweep's folder and its trials; deletes what losers leave, keeps the best, refuses to start where there is no
room. Knows nothing of Ray.
"""

import fcntl
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft.config import TrainConfig, override, to_yaml
from sft.settings import UserError
from tune import trials
from tune.space import Space, probes
from tune.trials import Sweep, Trial, best_of

BEST_FILE, BEST, BEST_ADAPTER = "best.yaml", "best_checkpoint", "checkpoint_best"
BEST_FILES = ("config.json", "training_log.json")  # of the best trial's run: what its checkpoint is used with
LOCK = "sweep.lock"
LIVE_SHARE = 2.2  # a live trial's checkpoint while it is replaced, and its best adapter (a sixth of a checkpoint)
WAITING_SHARE = 1.2  # of one that waits: nothing is being replaced


def lock(folder: Path) -> int:
    """Makes this process the only one that drives a sweep, until it ends; returns the lock's descriptor.

    Raises:
        UserError: another one does.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"{folder / LOCK}: {error.strerror}; a sweep goes on where its folder may be written") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder}: another process is running this sweep; wait for it, or end it") from None
    except OSError as error:
        print(f"warning: {folder}: no locks there ({error.strerror}); start it once at a time", flush=True)
    return descriptor


def best_at_rest(found: Sequence[Trial], live: Sequence[int]) -> Trial | None:
    """The best of those that do not run: nobody writes to its checkpoint."""
    return best_of([trial for trial in found if trial.number not in live])


def keep_best(folder: Path, found: Sequence[Trial], live: Sequence[int]) -> None:
    """Copies the best trial's adapter to best_checkpoint/ and deletes what ended trials no longer need.

    Args:
        folder: the sweep's.
        found: all its trials.
        live: numbers of those that run: they may be writing.
    """
    best = best_at_rest(found, live)
    ended = [trial for trial in found if trial.number not in live and trial.status != "unfinished"]
    for trial in ended:  # the losers first: on a full disk that makes the room for the copy
        if trial is not best:
            _delete_checkpoints(folder, trial)
    if best is not None:
        _copy_best(folder, best)
        if best in ended:
            _delete_checkpoints(folder, best)


def write_best(folder: Path, sweep: Sweep, found: Sequence[Trial], live: Sequence[int]) -> None:
    """Writes best.yaml: the best trial's settings, for `launch/train.py --config`.

    Args:
        folder: the sweep's.
        sweep: its record.
        found: all its trials.
        live: numbers of those that run: best_checkpoint/ is of another one, too.
    """
    best = best_at_rest(found, live)
    if best is None:
        return
    base = TrainConfig(**sweep.base)
    settings = best.settings | {"feature_cache": "auto", "gpu": None, "include": None}
    text = f"# Trial {best.number} of {sweep.name}: validation Dice {best.dice_so_far:.4f}, {best.epoch} epochs\n"
    trials.write_whole(folder / BEST_FILE, (text + to_yaml(override(base, settings))).encode())


def check_disk(folder: Path, one_bytes: int, concurrent: int, waiting: int = 0) -> None:
    """Refuses to start where the checkpoints will not fit.

    Args:
        folder: the sweep's.
        one_bytes: of one checkpoint at the highest rank.
        concurrent: trials that run at a time. Those that an earlier session has left have theirs on the disk already.
        waiting: trials that may wait at rungs meanwhile and have no checkpoint yet.

    Raises:
        UserError: too little room; says how much is needed for what.
    """
    needed = int(one_bytes * (LIVE_SHARE * concurrent + WAITING_SHARE * waiting + 1))
    free = shutil.disk_usage(folder).free
    if needed > free:
        of_waiting = f", and of up to {waiting} that wait at ASHA's rungs," if waiting else ""
        raise UserError(
            f"{folder}: {free / 2**30:.2f} GiB free, but checkpoints of {one_bytes / 2**30:.2f} GiB of {concurrent} "
            f"trials at a time{of_waiting} need {needed / 2**30:.2f} GiB; free some space, lower --max_concurrent "
            f"{'or --num_trials ' if waiting else ''}or set another --storage_path"
        )


def highest_rank(base: TrainConfig, space: Space, points: Sequence[dict[str, Any]] = ()) -> int:
    """The highest LoRA rank that a trial may have: by the space, the seed setting or a given point."""
    settings = [*points, *(space.settings(params, base) for params in probes(space))]
    return max([base.lora_rank, *(one["lora_rank"] for one in settings if "lora_rank" in one)])


def in_words(error: OSError) -> str:
    """What could not be written and why; of a folder that could not be copied its first file."""
    if isinstance(error, shutil.Error):
        _, target, reason = error.args[0][0]
        return f"{target}: {reason}"
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def _delete_checkpoints(folder: Path, trial: Trial) -> None:
    for directory in trials.folder_of(folder, trial.number).glob("*/checkpoint_*"):
        shutil.rmtree(directory, ignore_errors=True)


def _copy_best(folder: Path, best: Trial) -> None:
    """Beside it first, then renamed: there is a whole one at any moment."""
    source = trials.folder_of(folder, best.number)
    adapters = sorted(source.glob(f"*/{BEST_ADAPTER}"))
    if not adapters:
        return  # kept before, or of a run that ended before its first checkpoint was written
    partial, target = folder / f"{BEST}.partial", folder / BEST
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(adapters[-1], partial)
    shutil.copyfile(source / trials.TRIAL_FILE, partial / trials.TRIAL_FILE)
    for name in BEST_FILES:
        shutil.copyfile(adapters[-1].parent / name, folder / f"{name}.partial")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    for name in BEST_FILES:
        os.replace(folder / f"{name}.partial", folder / name)
