"""What a run writes while it runs: training.log, training_log.json, TensorBoard events, the progress bar.

Takes rows, plain dicts of numbers that the loop fills, and puts each to every place at once; gives the rows back for
the page made of them at the end (page.py). Only rank 0 opens a RunLog; the others hold a NullLog, and the loop needs no
`if`. Knows nothing of the model, and computes no figure but the shares and weighted terms of a line.

Rows, by kind. All hold "epoch" (0 for the base) and "step" (optimizer steps done); a key in brackets may be missing.
  step   loss, dice, focal, bce, [text] (the terms unweighted), lr; every log_every_steps
  train  the same as means over the epoch, and samples_per_s, eta_s, [gpu_gib], [mfu] (the operations that a step
         needs, as a share of the measured peak), and the mean seconds of an optimizer step and of its parts: step_s,
         data_s, forward_s, backward_s, optimizer_s
  val    what metrics.summarize gives, and [seg_rate]
"""

import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

from tqdm import tqdm

from sft.config import TrainConfig, UserError

REWRITE_EVERY_S = 1.0
"""Least time between two rewrites of training_log.json for step rows; a rewrite of 10,000 rows takes 4 ms."""
PLAIN_PROGRESS_EVERY_S = 30.0
"""Time between two lines of progress where stderr is no terminal."""


class RunLog:
    """The log of one run. Use as a context manager, or call close().

    Args:
        output_dir: holds training.log of the latest run, emptied at the start and then only appended to.
        run_dir: this run's directory: its own training.log, training_log.json, TensorBoard events.
        config: gives num_epochs, the weights of the loss terms and whether TensorBoard events are written.
        resume_step: continue the log in run_dir: rows after this optimizer step are dropped, all else stays.

    Raises:
        UserError: a file cannot be written, or TensorBoard is asked for and not installed.
    """

    def __init__(self, output_dir: Path, run_dir: Path, config: TrainConfig, resume_step: int | None = None):
        self.rows: list[dict] = []
        self._config = config
        self._json_path = Path(run_dir, "training_log.json")
        own_log = Path(run_dir, "training.log")
        self._progress: Progress | None = None
        try:
            Path(run_dir).mkdir(parents=True, exist_ok=True)
            if resume_step is None:
                own_log.write_text("")
            elif self._json_path.exists():
                self.rows = [row for row in json.loads(self._json_path.read_text()) if row["step"] <= resume_step]
            latest_log = Path(output_dir, "training.log")
            latest_log.write_bytes(own_log.read_bytes() if own_log.exists() else b"")
            # Opened to append: if an older run still writes to output_dir, lines mix but none is overwritten.
            self._logs = [path.open("a", encoding="utf-8", buffering=1) for path in {own_log, latest_log}]
            self._encoded = [json.dumps(row) for row in self.rows]
            self._rewrite()
        except OSError as error:
            raise UserError(
                f"cannot write {error.filename or run_dir}: {error.strerror}; give an --output_dir you may write to"
            ) from error
        self._events = _tensorboard(run_dir, resume_step) if config.tensorboard else None

    def line(self, text: str) -> None:
        """Write one line to stdout and to both training.log files, at once."""
        tqdm.write(text, file=sys.stdout)  # steps aside for a progress bar on the same terminal
        sys.stdout.flush()
        for log in self._logs:
            log.write(text + "\n")

    def start(self, total_steps: int, step: int = 0) -> None:
        """Show progress from optimizer step `step` on to `total_steps`."""
        self._progress = Progress("Training", total_steps, step)

    def advance(self) -> None:
        """One optimizer step is done: moves the progress bar, writes nothing."""
        self._progress.advance()

    def step(self, row: dict) -> None:
        """Record a row of kind "step"; no line."""
        if self._progress is not None:
            self._progress.note(f"loss {row['loss']:.4f}")
        self._record("step", row)

    def epoch(self, row: dict) -> None:
        """Record a row of kind "train", the means of one epoch, and write its `Epoch` line."""
        self.line(format_epoch(row, self._config))
        self._record("train", row)

    def val(self, row: dict) -> None:
        """Record a row of kind "val" and write its `Val` line."""
        self.line(format_val(row, self._config))
        self._record("val", row)

    def close(self) -> None:
        """Write what is pending and close every file."""
        if self._progress is not None:
            self._progress.close()
        self._rewrite()
        if self._events is not None:
            self._events.close()
        for log in self._logs:
            log.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _record(self, kind: str, row: dict) -> None:
        row = _finite({"kind": kind, **row})
        self.rows.append(row)
        self._encoded.append(json.dumps(row, allow_nan=False))
        if kind != "step" or time.monotonic() >= self._next_rewrite_s:
            self._rewrite()
        if self._events is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name not in ("epoch", "step"):
                    self._events.add_scalar(f"{kind}/{name}", value, row["step"])
            if kind != "step":
                self._events.flush()

    def _rewrite(self) -> None:
        # Whole and renamed into place: appending would show a reader, or leave after kill -9, a list without its end.
        partial = self._json_path.with_suffix(".json.partial")
        partial.write_text("[\n" + ",\n".join(self._encoded) + "\n]\n", encoding="utf-8")
        os.replace(partial, self._json_path)
        self._next_rewrite_s = time.monotonic() + REWRITE_EVERY_S


class NullLog:
    """The log of every rank but 0: the same methods, none of which does anything."""

    rows: tuple = ()

    def line(self, text: str) -> None: ...
    def start(self, total_steps: int, step: int = 0) -> None: ...
    def advance(self) -> None: ...
    def step(self, row: dict) -> None: ...
    def epoch(self, row: dict) -> None: ...
    def val(self, row: dict) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> "NullLog":
        return self

    def __exit__(self, *error) -> None: ...


class Progress:
    """Progress with the time left, on stderr: a bar on a terminal, elsewhere a plain line every half minute.

    Args:
        label: what is being done.
        total: when it is complete, in `unit`.
        done: how much of it stands already.
        unit: one of them, in words.
    """

    def __init__(self, label: str, total: int, done: int = 0, unit: str = "step"):
        self._label, self._total, self._first, self._done, self._unit = label, total, done, done, unit
        self._note = ""
        self._start_s = time.monotonic()
        self._next_line_s = self._start_s + PLAIN_PROGRESS_EVERY_S
        terminal = shutil.get_terminal_size()  # tqdm's own measure shows no bar on a terminal that says 0 x 0
        self._bar = tqdm(
            desc=label,
            total=total,
            initial=done,
            unit=f" {unit}",
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
            leave=False,
            ncols=min(100, terminal.columns),
            nrows=terminal.lines,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} | {rate_fmt} | ETA {remaining}{postfix}",
        )

    def advance(self, count: int = 1) -> None:
        """`count` more are done."""
        self._done += count
        self._bar.update(count)
        now_s = time.monotonic()
        if self._bar.disable and now_s >= self._next_line_s:
            self._next_line_s = now_s + PLAIN_PROGRESS_EVERY_S
            left_s = (now_s - self._start_s) / (self._done - self._first) * (self._total - self._done)
            text = f"{self._label}: {self._unit} {self._done}/{self._total}{self._note} | ETA {format_duration(left_s)}"
            print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Show `text` beside the progress from now on."""
        self._note = f" | {text}"
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Take the bar off the terminal."""
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def format_epoch(row: dict, config: TrainConfig) -> str:
    """The `Epoch` line of a row. Terms of the loss stand with their weights, so that they add up to it."""
    weights = {
        "dice": config.dice_weight,
        "focal": config.focal_weight,
        "bce": config.bce_weight,
        "text": config.text_weight,
    }
    terms = " + ".join(f"{name} {weight * row[name]:.4f}" for name, weight in weights.items() if name in row)
    shares = " ".join(
        f"{part} {row[f'{part}_s'] / row['step_s']:.0%}" for part in ("data", "forward", "backward", "optimizer")
    )
    fields = [
        f"Epoch {row['epoch']}/{config.num_epochs}",
        f"loss {row['loss']:.4f} = {terms}",
        f"lr {row['lr']:.1e}",
        f"{row['samples_per_s']:.1f} samples/s",
        f"step {1000 * row['step_s']:.0f} ms ({shares})",
    ]
    if row.get("gpu_gib") is not None:
        fields.append(f"GPU {row['gpu_gib']:.1f} GiB")
    if row.get("mfu") is not None:
        fields.append(f"MFU {row['mfu']:.2f}")
    return " | ".join([*fields, f"ETA {format_duration(row['eta_s'])}"])


def format_val(row: dict, config: TrainConfig) -> str:
    """The `Val` line of a row; epoch 0 is the base, before any training."""
    fields = [
        f"Val {row['epoch']}/{config.num_epochs}",
        f"Dice {row['dice']:.4f}",
        f"IoU {row['iou']:.2f}",
        f"recall {row['recall']:.2f}",
        f"precision {row['precision']:.2f}",
        f"Dice_best {row['dice_best']:.4f} at {row['threshold_best']:.2g}",
    ]
    if row.get("seg_rate") is not None:
        fields.append(f"seg_rate {row['seg_rate']:.2f}")
    if row["epoch"] == 0:
        fields.append("base")
    return " | ".join(fields)


def format_duration(duration_s: float) -> str:
    """Seconds as h:mm:ss, hours without limit; "?" where the number is not finite."""
    if not math.isfinite(duration_s):
        return "?"
    minutes, seconds = divmod(round(max(duration_s, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _tensorboard(run_dir: Path, resume_step: int | None):
    try:
        from torch.utils.tensorboard import SummaryWriter  # half a second, and only rank 0 needs it
    except ImportError as error:
        raise UserError(
            f"tensorboard cannot be imported ({error}): pip install tensorboard, or --tensorboard false"
        ) from error
    return SummaryWriter(str(run_dir), purge_step=None if resume_step is None else resume_step + 1)


def _finite(value):
    """The same value with None for every NaN and infinity, which JSON cannot write."""
    match value:
        case dict():
            return {name: _finite(item) for name, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value
