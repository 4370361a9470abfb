"""Whole training runs of a second: a small random Sa2VA on six small images; for tests of the loop and its commands."""

import json
from pathlib import Path

import small_sa2va
from PIL import Image

from sft import synthetic
from sft.config import TrainConfig
from sft.train import Result

SIZES_HW = ((96, 128), (128, 96), (96, 128), (96, 128), (128, 128), (64, 128))
NAMES = [f"v{number}" for number in range(len(SIZES_HW))]
UNSTEADY = ("_s", "mfu")  # end the keys whose values are times, or come of one


def write_images(folder: Path, count: int = len(SIZES_HW)) -> Path:
    """images/ and masks/ of procedural vessels, of several sizes."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for number, (height, width) in enumerate(SIZES_HW[:count]):
        scene = synthetic.render(100 + number, "cine", 128)
        Image.fromarray(scene.image_HW3[:height, :width]).save(folder / "images" / f"v{number}.png")
        mask = scene.masks["blood vessels"][:height, :width]
        Image.fromarray(mask.astype("uint8") * 255).save(folder / "masks" / f"v{number}.png")
    return folder


def write_inputs(folder: Path) -> Path:
    """A folder with model/, data/ and the names of two validation images."""
    small_sa2va.write(folder / "model")
    write_images(folder / "data")
    (folder / "val.txt").write_text("v1\nv4\n")
    return folder


def settings(inputs: Path, output_dir: Path, **changes) -> TrainConfig:
    """fp32, LoRA of rank 4, 2 epochs of 2 steps of 2 images, all checkpoints."""
    small = {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "learning_rate": 1e-2, "precision": "fp32"}
    small |= {"num_epochs": 2, "batch_size": 2, "val_batch_size": 1, "seg_rate_samples": 1, "save_every": 1}
    small |= {"gradient_checkpointing": False, "log_every_steps": 1, "num_workers": 0, "tensorboard": False}
    paths = {"model_path": inputs / "model", "data_root": inputs / "data", "val_list": inputs / "val.txt"}
    return TrainConfig(
        **{name: str(path) for name, path in paths.items()} | {"output_dir": str(output_dir)} | small | changes
    )


def rows(place: Result | Path, kind: str | None = None) -> list[dict]:
    """Rows of a run's training_log.json without its times and what comes of one."""
    directory = place.directory if isinstance(place, Result) else place
    found = json.loads((directory / "training_log.json").read_text())
    return [
        {key: value for key, value in row.items() if not key.endswith(UNSTEADY)}
        for row in found
        if kind in (None, row["kind"])
    ]


def values(place: Result | Path, kind: str, key: str) -> list[float]:
    """One figure of every row of a kind."""
    return [row[key] for row in rows(place, kind)]


def only_run(output_dir: Path) -> Path:
    """The one run directory in an output_dir."""
    (directory,) = output_dir.glob("lora_sft_*")
    return directory
