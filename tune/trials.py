"""A sweep's trials as files, one folder each, whole after a kill at any moment.

    SWEEP/sweep.json                   what the sweep is: settings, space, versions
    SWEEP/trials/007/trial.json        what was drawn, and the settings it stands for
    SWEEP/trials/007/validations.jsonl one line a validation, on the disk before anyone is told of it
    SWEEP/trials/007/outcome.json      how it ended; absent while it may go on
    SWEEP/trials/007/lora_sft_*/       the run itself

These files are the only memory of a sweep: the table, the report, the scheduler's and the search's state are made from
them. Knows nothing of Ray; imports nothing heavy.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sft.settings import UserError

FORMAT = 1
TRIALS, SWEEP_FILE = "trials", "sweep.json"
SPLIT_FILE = "split.json"  # of the sweep: every trial has the same validation images
TRIAL_FILE, ROWS_FILE, OUTCOME_FILE = "trial.json", "validations.jsonl", "outcome.json"
LOCK_FILE, ORPHAN_S, POLL_S = "trial.lock", 120.0, 0.5
METRIC = "dice_so_far"  # best validation Dice up to an epoch, the base's not counted
SEED_SETTING, SEED_NUMBER = "seed setting", 0  # always the first trial
Status = Literal["unfinished", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """One trial as its folder tells it."""

    number: int
    origin: str
    """seed setting, points, random, grid, optuna, or `trial 7, seed 43` for a repeat."""
    params: dict[str, Any]
    """Axis of the space -> value; an axis that a given setting does not tell is missing."""
    settings: dict[str, Any]
    """What differs from the seed setting's TrainConfig."""
    rows: tuple[dict[str, Any], ...] = ()
    """One per validation, ascending in epoch: epoch, dice, dice_so_far, dice_best, threshold_best, ..., device_s."""
    status: Status = "unfinished"
    """finished: all epochs; stopped: by the scheduler; failed: see reason; unfinished: begun, and to go on."""
    reason: str = ""
    outcome_s: float = 0.0
    """Device time as its outcome tells it: of a failed trial, whose last attempt may have ended between validations."""

    @property
    def epoch(self) -> int:
        """The last validated epoch, 0 before the first."""
        return self.rows[-1]["epoch"] if self.rows else 0

    @property
    def dice_so_far(self) -> float | None:
        """Best validation Dice of its epochs."""
        return self.rows[-1][METRIC] if self.rows else None

    @property
    def device_s(self) -> float:
        """Seconds on its device, starting up included, summed over its attempts."""
        return max(self.rows[-1]["device_s"] if self.rows else 0.0, self.outcome_s)

    @property
    def is_repeat(self) -> bool:
        """Whether it repeats another trial with another seed."""
        return "seed" in self.settings


def folder_of(sweep: Path, number: int) -> Path:
    """Where a trial's files lie."""
    return sweep / TRIALS / f"{number:03}"


def create(sweep: Path, trial: Trial) -> Path:
    """Makes a trial's folder with its trial.json; one that is there stays as it is."""
    folder = folder_of(sweep, trial.number)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / TRIAL_FILE).exists():
        record = {name: getattr(trial, name) for name in ("number", "origin", "params", "settings")}
        write_json(folder / TRIAL_FILE, {"format": FORMAT} | record)
    return folder


def read_all(sweep: Path) -> list[Trial]:
    """Every trial of a sweep, by number."""
    found = [read(folder) for folder in (sweep / TRIALS).glob("*/") if (folder / TRIAL_FILE).exists()]
    return sorted(found, key=lambda trial: trial.number)


def read(folder: Path) -> Trial:
    """One trial.

    Raises:
        UserError: a file is not as it was written.
    """
    record = read_json(folder / TRIAL_FILE)
    outcome = read_json(folder / OUTCOME_FILE) if (folder / OUTCOME_FILE).exists() else {}
    try:
        fields = {name: _plain(record[name]) for name in ("number", "origin", "params", "settings")}
        ended = {name: outcome[name] for name in ("status", "reason") if name in outcome}
        return Trial(**fields, rows=_read_rows(folder / ROWS_FILE), **ended, outcome_s=outcome.get("device_s", 0.0))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        text = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder}: its files are not as the sweep wrote them ({text}); put them back") from None


def append_row(folder: Path, row: dict[str, Any]) -> None:
    """Adds a validation, on the disk when this returns."""
    file = folder / ROWS_FILE
    before = file.read_bytes() if file.exists() else b""
    gap = b"\n" if before and not before.endswith(b"\n") else b""  # after a line that a kill cut off
    with file.open("ab") as file:
        file.write(gap + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def write_outcome(folder: Path, status: Status, reason: str = "", device_s: float = 0.0) -> None:
    """Notes how a trial ended.

    Args:
        folder: the trial's.
        status: not unfinished.
        reason: of a failed or stopped one.
        device_s: of all its attempts, where its validations do not tell it.
    """
    told = {"status": status, "reason": " ".join(reason.split())} | ({"device_s": device_s} if device_s else {})
    write_json(folder / OUTCOME_FILE, told)


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The trial of highest validation Dice, repeats aside; the earliest of several."""
    measured = [trial for trial in trials if trial.rows and not trial.is_repeat]
    return max(measured, key=lambda trial: (trial.dice_so_far, -trial.number), default=None)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes this process the only one that runs a trial: one whose driver was killed may live a little longer.

    Raises:
        RuntimeError: another one still runs it after two minutes.
    """
    with (folder / LOCK_FILE).open("a") as file:
        end = time.monotonic() + ORPHAN_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise RuntimeError(f"{folder}: another process still runs this trial") from None
                time.sleep(POLL_S)
            except OSError:  # a file system without locks: `keeping.lock` has said so
                break
        yield


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file that is there whole, the old one or the new, also after the machine has failed."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as new:
            new.write(content)
            new.flush()
            os.fsync(new.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)  # on a full disk it takes what room is left


def write_json(file: Path, content: Any) -> None:
    """Writes a JSON file as `write_whole` does."""
    write_whole(file, (json.dumps(content, indent=2) + "\n").encode())


def read_json(file: Path) -> Any:
    """What `write_json` wrote.

    Raises:
        UserError: the file is not there or no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file}: not found; expected a sweep's folder, as tune/search.py makes it") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; a sweep must be readable to whom it belongs") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); a sweep's files must be as it wrote them") from None


def _read_rows(file: Path) -> tuple[dict[str, Any], ...]:
    """The validations by epoch. A line that a kill cut off is none; of an epoch told twice the later counts."""
    rows = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["epoch"]] = row
    return tuple(rows[epoch] for epoch in sorted(rows))


def _plain(value: Any) -> Any:
    """JSON has lists only; several names are a tuple, as in TrainConfig."""
    if isinstance(value, dict):
        return {name: tuple(one) if isinstance(one, list) else one for name, one in value.items()}
    return value


@dataclass(frozen=True)
class Sweep:
    """What a sweep is, as its sweep.json tells it."""

    name: str
    base: dict[str, Any]
    """The seed setting: every field of TrainConfig."""
    space: dict[str, Any]
    """`space.as_record` of the space."""
    search: str
    """random, grid or optuna."""
    num_trials: int
    early_stop: bool
    grace_epochs: int
    reduction: int
    seed: int
    gpus_per_trial: float
    """GPUs of one trial; 0 on CPUs."""
    started: str
    versions: dict[str, str]
    command: list[str]
    options: dict[str, Any]
    """Every field of the command's own settings."""
    points: list[dict[str, Any]] = field(default_factory=list)
    """Settings of the points given, as their files said when the sweep began."""

    @property
    def num_epochs(self) -> int:
        """Epochs of a whole trial."""
        return self.base["num_epochs"]


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """Writes sweep.json."""
    write_json(folder / SWEEP_FILE, {"format": FORMAT} | dataclasses.asdict(sweep))


def read_sweep(folder: Path) -> Sweep:
    """Reads sweep.json.

    Raises:
        UserError: it is missing or of another version.
    """
    file = folder / SWEEP_FILE
    record = read_json(file)
    try:
        if record.pop("format", None) != FORMAT:
            raise TypeError
        return Sweep(**record)
    except (AttributeError, TypeError):
        raise UserError(f"{file}: not a sweep of this version; start a new one") from None
