"""Checkpoints that are complete or absent, and resuming from one.

A checkpoint is a directory: what `write_model` puts there (adapter, tokenizer), `training_state.pt` (everything that
training needs to go on, one file whatever the number of ranks, readable with `torch.load(weights_only=True)`; a
checkpoint that nobody resumes from has none), and, written last, `checkpoint.json` (progress, and the size of every
file). It takes an engine, directories and a `Writer`; it knows nothing of adapters, tokenizers or the loop.

Training waits for the snapshot in host memory alone; the files are written beside the steps that follow.

How a write survives a crash at any point: all of it goes to `NAME.partial` beside the target and to the disk; then
NAME becomes NAME.previous, NAME.partial becomes NAME, and NAME.previous is removed. `clean_leftovers` finishes or
undoes whichever of these steps was cut off.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sft.config import UserError
from sft.engine import (
    Engine,
    Ranks,
    gather_objects,
    parameter_shapes,
    restore_training_tensors,
    trainable_state,
    training_tensors,
)
from sft.settings import DiskError
from sft.writer import Writer

FORMAT = 1
STATE_FILE = "training_state.pt"
RECORD_FILE = "checkpoint.json"
BEST, LATEST = "checkpoint_best", "checkpoint_latest"
PARTIAL, PREVIOUS = ".partial", ".previous"
RUN_PATTERN = "lora_sft_*"
USER_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Progress:
    """Where training stands: what the loop needs besides the engine's tensors to go on."""

    epoch: int
    """Epochs completed."""
    num_epochs: int
    """Epochs of the whole run; the run is finished when `epoch` reaches it."""
    step: int
    """Optimizer steps taken."""
    samples_in_epoch: int = 0
    """Samples of the current, unfinished epoch already used, summed over ranks."""
    best_dice: float = -1.0
    """Best validation Dice so far; -1 before the first validation."""
    best_epoch: int = 0
    """Epoch of best_dice."""
    figures: dict[str, float] = field(default_factory=dict)
    """Further numbers the loop wants back, such as the base's Dice."""


def save(
    targets: dict[Path, bool],
    ds_engine: Engine,
    ranks: Ranks,
    write_model: Callable[[Path, dict[str, Tensor]], None],
    progress: Progress,
    writer: Writer,
) -> None:
    """Takes a snapshot of training and has it written in the background. Collective.

    A checkpoint replaces the one of the same name only when it is complete. The write before is waited for, so one
    snapshot at a time lies in the main rank's host memory, until it is written: the adapter, 2 bytes per trained weight
    in bf16 and 4 in fp32, twice while its file is written, and for a resumable target 12 more (master and moments).

    Args:
        targets: directory, for instance RUN/checkpoint_best -> whether it is resumable, that is, gets a
            training_state.pt. Written in this order; their parents exist.
        write_model: called in the background with a folder to write adapter and tokenizer into, and
            `engine.trainable_state`.
        progress: where training stands.
        writer: of this run; `writer.wait()` before anything reads what was saved.

    Raises:
        UserError: the write before failed for want of space or permission; the earlier checkpoint is intact.
        DivergedError: a weight is not finite; nothing is written.
    """
    writer.wait()
    trainable = trainable_state(ds_engine)
    state = _training_state(ds_engine, progress) if any(targets.values()) else None

    def write() -> None:
        for directory, resumable in targets.items():
            _write_or_explain(
                directory, state if resumable else None, lambda folder: write_model(folder, trainable), progress
            )

    if ranks.is_main:
        writer.submit(write)


def load(directory: Path, ds_engine: Engine, ranks: Ranks) -> Progress:
    """Puts a checkpoint's state into the engine and the random generators. Collective.

    With the number of ranks it was saved on, training goes on bit by bit as if never stopped. With another, weights,
    optimizer and schedule are the same; ranks beyond the saved ones get random states of their own.

    Raises:
        UserError: not a complete checkpoint with a training state, not of this version, or its parameters are not
            this engine's: the missing, left-over and differently shaped names are listed.
    """
    check_complete(directory, resumable=True)
    state = _read_state(directory / STATE_FILE)
    _check_parameters(directory, state["parameters"], parameter_shapes(ds_engine))
    restore_training_tensors(ds_engine, state)
    _restore_random_state(state["random_states"], ranks, state["adam_step"])
    return Progress(**state["progress"])


def find_resume(output_dir: Path, resume: str) -> Path:
    """The checkpoint directory to resume from, after cleaning up what a crash left in its run.

    Args:
        output_dir: the folder that holds the runs (lora_sft_...).
        resume: a checkpoint directory, or "auto": the newest checkpoint of the newest run that is unfinished.

    Raises:
        UserError: nothing fits; says what was found.
    """
    if resume != "auto":
        directory = Path(resume)
        _recover(directory)
        check_complete(directory, resumable=True)
        return directory
    found = []
    for run in sorted(Path(output_dir).glob(RUN_PATTERN), reverse=True):
        directory = newest(run)
        if directory is None:
            found.append(f"{run.name} (no complete checkpoint with {STATE_FILE})")
            continue
        progress = read_progress(directory)
        if progress.epoch < progress.num_epochs:
            clean_leftovers(run)  # only here: another run may be writing at this moment
            return newest(run)
        found.append(f"{run.name} (finished: epoch {progress.epoch}/{progress.num_epochs})")
    raise UserError(
        f"resume auto: no unfinished run with a checkpoint in {output_dir}; found: {', '.join(found) or 'no run'}. "
        "Leave resume out to start a new run, or give a checkpoint directory"
    )


def clean_leftovers(run_directory: Path) -> None:
    """Finishes or undoes a write that a crash cut off; call only where no other process is writing.

    Afterwards no .partial and no .previous is left, and whatever was complete is there under its name.
    """
    names = {
        path.name.removesuffix(suffix) for suffix in (PARTIAL, PREVIOUS) for path in _left_over(run_directory, suffix)
    }
    for name in names:
        _recover(run_directory / name)


def check_complete(directory: Path, resumable: bool = False) -> None:
    """Raises UserError unless the directory is a complete checkpoint, with `resumable` one to go on from."""
    if problem := _problem(directory, resumable):
        folders = sorted(path.parent for path in directory.parent.glob(f"*/{RECORD_FILE}"))
        beside = ", ".join(folder.name for folder in folders if _problem(folder, resumable) is None) or "none"
        raise UserError(f"{directory}: {problem}; {'resumable' if resumable else 'complete'} ones beside it: {beside}")


def read_progress(directory: Path) -> Progress:
    """The progress of a complete checkpoint, without reading its tensors."""
    return Progress(**json.loads((directory / RECORD_FILE).read_text(encoding="utf-8"))["progress"])


def checkpoint_bytes(trainable_parameters: int, adapter_bytes_per_parameter: int, resumable: bool = True) -> int:
    """Estimated size of one checkpoint: adapter, 16 MiB for the tokenizer, and to resume three fp32 values a weight."""
    return trainable_parameters * (adapter_bytes_per_parameter + 3 * 4 * resumable) + 2**24


def check_disk(directory: Path, bytes_needed: int, what: str, advice: str) -> None:
    """Checks before training that the checkpoints can be written.

    Args:
        directory: the run directory, or output_dir; created if it is not there.
        bytes_needed: of all that will lie there at one time, and is not there yet.
        what: needs them, for the error: "3 checkpoints".
        advice: what would need less, for the error.

    Raises:
        UserError: not writable, or too little space.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"{directory}: cannot write there ({error.strerror}); set another output_dir") from error
    free = shutil.disk_usage(directory).free
    if bytes_needed > free:
        raise UserError(
            f"{directory}: {free / 2**30:.2f} GiB free, but {what} need {bytes_needed / 2**30:.2f} GiB; free some "
            f"space, {advice} or set another output_dir"
        )


def _training_state(ds_engine: Engine, progress: Progress) -> dict[str, Any]:
    """What training_state.pt holds. Collective; the tensors on the main rank alone."""
    random_states = gather_objects(_random_state())
    return training_tensors(ds_engine) | {
        "format": FORMAT,
        "progress": dataclasses.asdict(progress),
        "random_states": random_states,
    }


def _write_or_explain(
    directory: Path, state: dict[str, Any] | None, write_model: Callable[[Path], None], progress: Progress
) -> None:
    try:
        _write(directory, state, write_model, progress)
    except Exception as error:
        shutil.rmtree(_sibling(directory, PARTIAL), ignore_errors=True)
        message = f"{type(error).__name__}: {error}"
        text = f"{directory}: the checkpoint could not be written ({message}); an earlier one is intact"
        if _errno(error) in USER_ERRNOS:
            raise DiskError(f"{text}; free some space or set another output_dir, then resume") from error
        raise RuntimeError(text) from error


def _errno(error: BaseException | None) -> int | None:
    """The operating system's number of an error that torch raised while it handled one, or safetensors put in words."""
    while error is not None:
        if isinstance(error, OSError):
            return error.errno
        if in_words := re.search(r"\(os error (\d+)\)", str(error)):
            return int(in_words[1])
        error = error.__context__
    return None


def _write(
    directory: Path, state: dict[str, Any] | None, write_model: Callable[[Path], None], progress: Progress
) -> None:
    partial, previous = _sibling(directory, PARTIAL), _sibling(directory, PREVIOUS)
    _recover(directory)
    partial.mkdir()
    write_model(partial)
    if state is not None:
        with (partial / STATE_FILE).open("wb") as file:  # given a path, torch would forget why writing failed
            torch.save(state, file)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    sizes = {path.relative_to(partial).as_posix(): path.stat().st_size for path in files}
    for path in files:
        _to_disk(path)
    record = {"format": FORMAT, "progress": dataclasses.asdict(progress), "files": sizes}
    (partial / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _to_disk(partial / RECORD_FILE)
    _to_disk(partial)
    if directory.exists():
        os.replace(directory, previous)
    os.replace(partial, directory)
    _to_disk(directory.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _left_over(run_directory: Path, suffix: str) -> list[Path]:
    return [path for path in run_directory.glob(f"checkpoint_*{suffix}") if path.is_dir()]


def _recover(directory: Path) -> None:
    """Finishes the write of one checkpoint if its new files are complete, otherwise puts the old one back."""
    partial, previous = _sibling(directory, PARTIAL), _sibling(directory, PREVIOUS)
    if _problem(partial) is None:
        if directory.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.replace(directory, previous)
        os.replace(partial, directory)
    elif previous.is_dir() and not directory.exists():
        os.replace(previous, directory)
    for left_over in (partial, previous):
        if left_over.is_dir():
            shutil.rmtree(left_over)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot do it for a folder
            raise
    finally:
        os.close(descriptor)


def _sibling(directory: Path, suffix: str) -> Path:
    return directory.with_name(directory.name + suffix)


def _problem(directory: Path, resumable: bool = False) -> str | None:
    """Why a directory is no complete checkpoint, or none to go on from; None if it is one."""
    if not directory.is_dir():
        return "no such directory"
    try:
        record = json.loads((directory / RECORD_FILE).read_text(encoding="utf-8"))
        sizes, version = record["files"], record["format"]
        Progress(**record["progress"])
    except FileNotFoundError:
        return f"not a checkpoint of this program (no {RECORD_FILE})"
    except (ValueError, KeyError, TypeError) as error:
        return f"{RECORD_FILE} is damaged ({type(error).__name__}: {error})"
    if version != FORMAT:
        return f"checkpoint format {version}, this program reads {FORMAT}"
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    if resumable and STATE_FILE not in sizes:
        return f"holds an adapter without {STATE_FILE}, so training cannot go on from it"
    return None


def newest(run: Path) -> Path | None:
    """The checkpoint of most steps to go on from, also under the name that a cut-off write left it."""
    resumable = [path for path in run.glob("checkpoint_*") if path.is_dir() and _problem(path, resumable=True) is None]
    return max(resumable, key=lambda path: (read_progress(path).step, path.name), default=None)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}); use another one") from error


def _check_parameters(directory: Path, saved: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    missing = sorted(shapes.keys() - saved.keys())
    left_over = sorted(saved.keys() - shapes.keys())
    reshaped = [
        f"{name} {tuple(saved[name]['master'].shape)} instead of {shapes[name]}"
        for name in sorted(shapes.keys() & saved.keys())
        if tuple(saved[name]["master"].shape) != shapes[name]
    ]
    problems = [
        f"{what} {len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("not trained here", left_over), ("of another shape", reshaped))
        if names
    ]
    if problems:
        raise UserError(
            f"{directory}: its parameters are not this run's ({'; '.join(problems)}); resume with the model_path, "
            "lora and train_modules settings it was trained with"
        )


def _random_state() -> dict[str, Any]:
    """This rank's generators, in plain types that `torch.load(weights_only=True)` accepts."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore_random_state(states: list[dict[str, Any]], ranks: Ranks, step: int) -> None:
    if ranks.rank >= len(states):
        seed = (step * 1_000_003 + ranks.rank) % 2**32
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return
    state = states[ranks.rank]
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
