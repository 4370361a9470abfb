"""What a benchmark runs on: a model directory of random weights and a folder of procedural vessels.

Takes a shape's name and a folder, which keeps what it holds for the next time. Does not know training.
"""

import json
import shutil
from pathlib import Path

from PIL import Image

from sft import synthetic
from sft.config import EMBEDDED
from sft.model import random_weights, shapes

TINY = "tiny"
SHAPES = (TINY, *shapes.NAMES)
VALIDATION_IMAGES = 2
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
        for name in ("images", "masks"):
            (root / name).mkdir(parents=True)
        for number in range(count + VALIDATION_IMAGES):
            scene = synthetic.render(number, "cine", max(width_px, height_px))
            mask_HW = scene.masks["blood vessels"][:height_px, :width_px]
            Image.fromarray(scene.image_HW3[:height_px, :width_px]).save(root / "images" / f"v{number}.png")
            Image.fromarray(mask_HW.astype("uint8") * 255).save(root / "masks" / f"v{number}.png")
        names = [f"v{count + number}\n" for number in range(VALIDATION_IMAGES)]
        val_list.write_text("".join(names), encoding="utf-8")
        (root / _DONE).write_text("whole", encoding="utf-8")
    return root, val_list


def _holds(directory: Path, note: str) -> bool:
    file = directory / _DONE
    return file.is_file() and file.read_text(encoding="utf-8") == note
