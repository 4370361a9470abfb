"""A run's data set, from its folder to checked and divided pairs; `python -m sft.data DIR` prints what the check finds.

Takes TrainConfig; gives the pairs of training and validation. Holds only the order of steps, and knows nothing of
tensors: `find` pairs files by folders and names, `read` turns a pair into pixels, `check` compares
pairs, `split` divides them, `annotations` draws polygons. What other rooms need of these stands here too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sft.config import EMBEDDED, TrainConfig, UserError
from sft.data.check import Findings, Summary, brief, check
from sft.data.find import LAYOUTS, Found, find_pairs
from sft.data.read import Pair, Sample, read, read_image_of, read_mask
from sft.data.split import Division, read_split, split, write_split
from sft.settings import checked, docs_of

__all__ = [
    "Findings",
    "Found",
    "Loaded",
    "Pair",
    "Sample",
    "Summary",
    "brief",
    "check",
    "find_pairs",
    "load",
    "read",
    "read_image_of",
    "read_mask",
    "read_split",
    "split",
    "write_split",
]

SPLIT_SETTINGS = ("group_pattern", "val_fraction", "val_list", "folds", "fold", "seed")
ERRORS_SHOWN = 10
SIZES_SHOWN = 5
NAMES_SHOWN = 8


@dataclass(frozen=True)
class Loaded:
    """A checked and divided data set; `findings` has no errors."""

    train: tuple[Pair, ...]
    val: tuple[Pair, ...]
    findings: Findings


def load(config: TrainConfig, *, split_file: Path | None = None) -> Loaded:
    """Finds, checks and divides the data set of a run.

    Args:
        config: `data_root` (a folder, or `embedded`) and the settings of the split.
        split_file: a recorded division to reuse, as a resumed run does; None divides anew.

    Raises:
        UserError: no data set there, files with errors (the first ten are listed, a line each), or a split that
            cannot be.
    """
    pairs, findings = _inspect(_root(config))
    errors = findings.errors
    if errors:
        listed = "".join(f"\n  {line}" for line in errors[:ERRORS_SHOWN])
        if len(errors) > ERRORS_SHOWN:
            listed += f"\n  ... and {len(errors) - ERRORS_SHOWN:,} more: `python -m sft.data {config.data_root} --all`"
        raise UserError(
            f"data_root {config.data_root}: {_counted(len(errors), 'error')}; correct the files first:{listed}"
        )
    train, val = _divide(pairs, findings, config) if split_file is None else read_split(split_file, pairs)
    return Loaded(train, val, findings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a data set's summary, findings and split; returns the exit code: 0, or 2 if there are errors."""
    options = _parse(arguments)
    start_s = time.perf_counter()
    try:
        given = {name: value for name, value in vars(options).items() if name != "all" and value is not None}
        config = TrainConfig(**checked(TrainConfig, given))
        root = _root(config)
        pairs, findings = _inspect(root, progress=_show_progress if sys.stderr.isatty() else None)
        _print_summary(root, pairs, findings.summary, time.perf_counter() - start_s)
        for noun, lines in (("error", findings.errors), ("warning", findings.warnings)):
            if lines:
                shown = lines if options.all else brief(lines)
                print(f"\n{_counted(len(lines), noun)}", *shown, sep="\n  ")
        if findings.errors:
            print("\nnot ready: correct the errors first")
            return 2
        _print_split(*_divide(pairs, findings, config), config)
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _root(config: TrainConfig) -> Path:
    if config.data_root == EMBEDDED:
        from sft.synthetic import embedded_dataset  # the generator is only for those who use it

        return Path(embedded_dataset())
    return Path(config.data_root)


def _inspect(root: Path, progress: Callable[[int, int], None] | None = None) -> tuple[list[Pair], Findings]:
    """Pairs, with the findings of folders and files together."""
    pairs, errors, warnings = find_pairs(root)
    findings = check(pairs, progress=progress)
    return pairs, replace(findings, errors=errors + findings.errors, warnings=warnings + findings.warnings)


def _divide(pairs: Sequence[Pair], findings: Findings, config: TrainConfig) -> Division:
    settings = {name: getattr(config, name) for name in SPLIT_SETTINGS}
    return split(pairs, **settings, together=findings.duplicates)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sft.data",
        description="Check a data set and show how it would be split; exit code 2 if it has errors.",
        allow_abbrev=False,
    )
    parser.add_argument("data_root", metavar="DIR", help=f"folder with {LAYOUTS}; or {EMBEDDED}")
    docs = docs_of(TrainConfig)
    for name in SPLIT_SETTINGS:
        parser.add_argument(f"--{name}", help=docs[name].replace("%", "%%"))
    parser.add_argument("--all", action="store_true", help="print every finding, not the first of each kind")
    return parser.parse_args(arguments)


def _show_progress(done: int, total: int) -> None:
    if done == total:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    elif done % 20 == 0:
        print(f"\rchecking {done:,}/{total:,}", end="", file=sys.stderr, flush=True)


def _print_summary(root: Path, pairs: Sequence[Pair], summary: Summary, elapsed_s: float) -> None:
    sizes = [f"{width}x{height} ({count:,})" for (width, height), count in summary.sizes.items()]
    rest = f", and {len(sizes) - SIZES_SHOWN} more" if len(sizes) > SIZES_SHOWN else ""
    images = len({pair.image for pair in pairs})
    of_images = f" of {images:,} images" if images != len(pairs) else ""
    fractions = (summary.fraction_mean, summary.fraction_min, summary.fraction_max)
    shown = "mean {:.2%}, min {:.2%}, max {:.2%} of the frame".format(*fractions)
    print(root)
    print(f"  samples          {summary.count:,} of {len(pairs):,}{of_images} read in {elapsed_s:.1f} s")
    print(f"  width x height   {', '.join(sizes[:SIZES_SHOWN]) or 'none'}{rest}")
    print(f"  vessel fraction  {shown}")


def _print_split(train: Sequence[Pair], val: Sequence[Pair], config: TrainConfig) -> None:
    names = ", ".join(pair.name for pair in val[:NAMES_SHOWN]) + (", ..." if len(val) > NAMES_SHOWN else "")
    chosen = "by folders" if train[0].split else f"seed {config.seed}"
    print(f"\n  split            {len(train):,} for training, {len(val):,} for validation ({chosen})")
    print(f"  validation       {names}")


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
