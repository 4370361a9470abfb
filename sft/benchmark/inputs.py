"""What a benchmark runs on: a model directory of random weights and a folder of procedural vessels.

Takes a shape's name and a folder, which keeps what it holds for the next time. Does not know training.
"""

import json
import shutil
from pathlib import Path

from sft import synthetic
from sft.config import EMBEDDED
from sft.model import random_weights, shapes
from sft.ranks import processors

TINY = "tiny"
SHAPES = (TINY, *shapes.NAMES)
VALIDATION_IMAGES = 2
IMAGES_PER_PROCESS = 16  # of those that write images: fewer are not worth its start
_DONE = "complete"  # written last


def write_model(shape: str, folder: Path) -> str:
    """The directory of a shape's random weights, written unless it stands there whole; the embedded base for `tiny`."""
    if shape == TINY:
        return EMBEDDED
    directory, wanted = folder / f"model_{shape}", shapes.named(shape)
    note = json.dumps(vars(wanted))  # now: whoever builds a model from a config may add to it
    if not _holds(directory, note):
        shutil.rmtree(directory, ignore_errors=True)
        random_weights.write(wanted, directory)
        (directory / _DONE).write_text(note, encoding="utf-8")
    return str(directory)


def write_images(width_px: int, height_px: int, count: int, folder: Path) -> tuple[Path, Path]:
    """A data folder of so many training images and a few more, and the list of these for validation."""
    root = folder / f"images_{width_px}x{height_px}_{count}"
    val_list = root / "val.txt"
    if not _holds(root, "whole"):
        shutil.rmtree(root, ignore_errors=True)
        workers = max(1, min(processors(), count // IMAGES_PER_PROCESS))
        pairs = [(f"v{number}", number) for number in range(count + VALIDATION_IMAGES)]
        synthetic.write_pairs(root, pairs, "cine", (height_px, width_px), workers=workers)
        names = [f"v{count + number}\n" for number in range(VALIDATION_IMAGES)]
        val_list.write_text("".join(names), encoding="utf-8")
        (root / _DONE).write_text("whole", encoding="utf-8")
    return root, val_list


def _holds(directory: Path, note: str) -> bool:
    file = directory / _DONE
    return file.is_file() and file.read_text(encoding="utf-8") == note
