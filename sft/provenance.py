"""What decides a run's result besides its code path: settings, command, versions, commit, machine.

Takes a TrainConfig and the ranks, gives the content of config.json; and tells whether a run's settings are those that
its config.json holds.
"""

import dataclasses
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sft import __version__, engine
from sft.config import TrainConfig, UserError

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "safetensors", "numpy", "pillow")
# What may differ between a run and its continuation: where and how it runs, not what it computes.
FREE_ON_RESUME = {"resume", "gpu", "include", "output_dir", "num_workers", "log_every_steps"}
FREE_ON_RESUME |= {
    "feature_cache",
    "feature_cache_dir",
    "tensorboard",
    "save_every",
    "keep",
    "save_format",
    "dry_run",
    "gradient_checkpointing",
    "val_batch_size",
}


def record(config: TrainConfig, ranks: engine.Ranks) -> dict:
    """The content of config.json: the resolved settings first, then what else decides the result."""
    return dataclasses.asdict(config) | {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "ranks": ranks.world_size,
        "device": device_name(ranks.device),
        "git_commit": git_commit(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of this package, Python and the libraries that decide a result."""
    ours = {"sa2va-sft": __version__, "python": platform.python_version()}
    return ours | {package: version(package) for package in PACKAGES}


def check_same_settings(file: Path, config: TrainConfig) -> None:
    """Compares a config with the config.json of the run that it is to continue.

    Raises:
        UserError: no such file, or a setting that decides the result differs; names each.
    """
    before = _read(file)
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    changed = [key for key in now if key not in FREE_ON_RESUME and key in before and before[key] != now[key]]
    if changed:
        listed = ", ".join(f"{key} {before[key]} (now {now[key]})" for key in changed)
        raise UserError(f"{file}: the run was started with {listed}; resume with its settings, or start a new run")


def begun_batch_size(file: Path, config: TrainConfig) -> int | str:
    """The number in a run's config.json where `batch_size auto` is to continue it; else the config's own."""
    return _read(file)["batch_size"] if config.batch_size == "auto" else config.batch_size


def settings_of_run(directory: Path) -> TrainConfig:
    """The settings in a run's config.json."""
    # Where features were kept is no part of a result, and older runs name places that are no more.
    names = {field.name for field in dataclasses.fields(TrainConfig)} - {"feature_cache", "feature_cache_dir"}
    return TrainConfig(**{name: value for name, value in _read(directory / "config.json").items() if name in names})


def validated_dice(directory: Path, epoch: int) -> float:
    """The Dice that a run's log holds for an epoch; UserError if it was not validated then."""
    rows = _read(directory / "training_log.json")
    found = [row["dice"] for row in rows if row["kind"] == "val" and row["epoch"] == epoch]
    if not found:
        raise UserError(f"{directory}: epoch {epoch} was not validated; take another checkpoint, e.g. checkpoint_best")
    return found[0]


def seg_rates(directory: Path) -> dict[int, float]:
    """Epoch -> the [SEG] rate in a run's log; 0 is the base. Empty where the run did not measure it."""
    rows = _read(directory / "training_log.json")
    return {row["epoch"]: row["seg_rate"] for row in rows if row["kind"] == "val" and "seg_rate" in row}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: not found; a checkpoint is used inside its run's own directory") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); a run's files must be as it wrote them") from error


def git_commit() -> str | None:
    """The checkout's commit, with "+changes" if files differ from it; None where this file is in no checkout."""
    package = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # a virtual environment may lie inside somebody's repository
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: torch.device) -> str:
    """The GPU's name, or CPU and its threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
