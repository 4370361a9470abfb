"""Procedural vessel images with exact masks: pre-training pictures and the embedded demo data set.

Takes a seed and a look; gives an RGB image and one mask per target that is on it. Also writes image/mask folders,
complete or absent, and keeps the embedded one in a cache. Everything follows from the seed; numpy and PIL only. How
trees grow is in `sft.synthetic.trees`, what lies around them in `sft.synthetic.grounds`, how a look is composed in
`sft.synthetic.looks`; this file knows the targets, the presets and the files.

    python -m sft.synthetic DIR --preset demo --count 40 --seed 7     writes DIR/images, DIR/masks and DIR/dataset.json
    python -m sft.synthetic DIR --preset pretrain --contact_sheet     writes DIR/contact_sheet.png, images beside masks
"""

import argparse
import functools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from sft.config import UserError
from sft.ranks import processors
from sft.synthetic.looks import Painting, paint
from sft.synthetic.trees import FRAME_PX

GENERATOR_VERSION = 1  # raise it whenever pixels change: it names the cache folder
TARGETS: tuple[str, ...] = (
    "blood vessels",
    "dark vessels",
    "bright vessels",
    "thick vessels",
    "thin vessels",
    "left tree",
    "right tree",
    "discs",
    "lines",
)
LOOKS = ("mixed", "fundus", "angiogram", "octa", "mixed trees", "cine")
MIXED_SHARES = {"fundus": 0.45, "angiogram": 0.19, "octa": 0.13, "mixed trees": 0.23}
THIN_PX = 2.5  # up to here a vessel is thin, px at 512
THICK_PX = 4.0  # from here on it is thick


@dataclass(frozen=True)
class Preset:
    """A kind of data set."""

    look: str
    target_fraction: float | None = None


PRESETS = {"pretrain": Preset("mixed"), "demo": Preset("cine"), "sparse": Preset("mixed", 0.005)}


@dataclass(frozen=True)
class Scene:
    """An image and what is on it."""

    image_HW3: np.ndarray
    """uint8, RGB."""
    masks: dict[str, np.ndarray]
    """One HW bool mask for each of TARGETS that is on the image; what is absent is no key."""
    label_HW: np.ndarray
    """What this look's annotator draws, bool: all vessels, but on "cine" the thick dark ones alone, 1 px too wide."""


def render(seed: int, look: str = "mixed", size_px: int = FRAME_PX, target_fraction: float | None = None) -> Scene:
    """Render one image, deterministic in its arguments.

    Args:
        seed: non-negative; the only source of randomness.
        look: one of LOOKS; "mixed" draws any but "cine".
        size_px: side of the image; widths and lengths scale with it.
        target_fraction: vessel share of the frame (0 to 1) above which trees are thinned out; None for no limit.

    Raises:
        ValueError: a look that does not exist, or a size below 64.
    """
    if look not in LOOKS:
        raise ValueError(f"look {look!r}: allowed are {', '.join(LOOKS)}")
    if size_px < 64:
        raise ValueError(f"size_px {size_px}: at least 64")
    rng = np.random.default_rng(seed)
    if look == "mixed":
        look = str(rng.choice(list(MIXED_SHARES), p=list(MIXED_SHARES.values())))
    painting = paint(rng, look, size_px, None if target_fraction is None else target_fraction * FRAME_PX**2)
    masks = _masks(painting)
    label = _thick_and_dark(painting) if look == "cine" else masks["blood vessels"]
    return Scene(painting.image_HW3, {name: mask for name, mask in masks.items() if mask.any()}, label)


def write_dataset(directory: Path, preset: str, count: int, seed: int, workers: int = 1) -> Path:
    """Write images/NAME.png, masks/NAME.png (0 or 255) and dataset.json, complete or absent.

    Several processes may write the same folder at once: the first to finish wins, the others find its work.

    Args:
        directory: the folder to make; one that already holds this very set is kept.
        preset: one of PRESETS.
        count: number of images, at least 1.
        seed: of the set, non-negative.
        workers: processes that render, at least 1; the set is the same for any number.

    Returns:
        The folder.

    Raises:
        UserError: an unknown preset, a count or number of workers below 1, or a folder that holds something else.
    """
    if preset not in PRESETS:
        raise UserError(f"preset {preset!r}: allowed are {', '.join(PRESETS)}")
    if min(count, workers) < 1 or seed < 0:
        given = f"count {count}, workers {workers}, seed {seed}"
        raise UserError(f"{given}: count and workers must be at least 1, and seed at least 0")
    directory = Path(directory)
    card = {"preset": preset, "seed": seed, "count": count, "generator_version": GENERATOR_VERSION}
    if _holds(directory, card):
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: holds something else; name a new or an empty folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        chosen = PRESETS[preset]
        pairs = [(f"{preset}_{index:04d}", image_seed(seed, index)) for index in range(count)]
        write_pairs(work, pairs, chosen.look, target_fraction=chosen.target_fraction, workers=workers)
        (work / "dataset.json").write_text(json.dumps(card, indent=2) + "\n")
        work.chmod(0o755)  # mkdtemp makes it private
        _publish(work, directory, card)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return directory


def embedded_dataset(preset: str = "demo", count: int = 40, seed: int = 7, cache_dir: Path | None = None) -> Path:
    """Return the folder of a generated set, making it on first use.

    Args:
        preset: one of PRESETS.
        count: number of images.
        seed: of the set.
        cache_dir: where sets are kept; default $SA2VA_SFT_CACHE, else ~/.cache/sa2va-sft.
    """
    cache = Path(cache_dir or os.environ.get("SA2VA_SFT_CACHE") or Path.home() / ".cache" / "sa2va-sft")
    return write_dataset(cache / f"synthetic-v{GENERATOR_VERSION}-{preset}-{count}-seed{seed}", preset, count, seed)


def write_pairs(
    directory: Path,
    pairs: Iterable[tuple[str, int]],
    look: str,
    size_hw: tuple[int, int] = (FRAME_PX, FRAME_PX),
    target_fraction: float | None = None,
    workers: int = 1,
) -> None:
    """Renders images into directory/images and what their annotator draws, 0 or 255, into directory/masks.

    Args:
        directory: receives both folders.
        pairs: (name, seed of the image).
        look: see `render`, as `target_fraction`.
        size_hw: what is cut out of a square of the longer side.
        workers: processes; with one, it is this.
    """
    for name in ("images", "masks"):
        (directory / name).mkdir(parents=True)
    write = functools.partial(_write_pair, directory, look, size_hw, target_fraction)
    if workers == 1:
        for pair in pairs:
            write(pair)
        return
    # Not forked: whoever calls may have threads, whose locks a fork would copy as they stand.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(write, pairs, chunksize=4):
            pass  # an error in any of them comes out here


def image_seed(seed: int, index: int) -> int:
    """Seed of image `index` of the set with this seed: sets of neighbouring seeds share no image."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0])


def contact_sheet(preset: str, count: int, seed: int, tile_px: int = 320) -> Image.Image:
    """A picture of the first images of a set, each above its targets in colour (the label in white)."""
    columns = min(count, 6)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * tile_px, rows * 2 * tile_px))
    for index in range(count):
        chosen = PRESETS[preset]
        scene = render(image_seed(seed, index), chosen.look, target_fraction=chosen.target_fraction)
        x, y = index % columns * tile_px, index // columns * 2 * tile_px
        sheet.paste(Image.fromarray(scene.image_HW3).resize((tile_px, tile_px)), (x, y))
        sheet.paste(Image.fromarray(_coloured(scene)).resize((tile_px, tile_px)), (x, y + tile_px))
    return sheet


def _masks(painting: Painting) -> dict[str, np.ndarray]:
    """All targets, empty ones included, each cut to the field of view."""
    view = painting.view_HW
    nothing = np.zeros_like(view)
    each = [tree.drawn.mask_HW & view for tree in painting.trees]
    everything = np.any(each, axis=0)
    width = np.max([np.where(mask, tree.drawn.width_HW, 0) for mask, tree in zip(each, painting.trees, strict=True)], 0)
    left, right = each if painting.left_right and all(mask.any() for mask in each) else (nothing, nothing)
    dark = np.any([mask & tree.dark for mask, tree in zip(each, painting.trees, strict=True)], axis=0)
    bright = np.any([mask & (not tree.dark) for mask, tree in zip(each, painting.trees, strict=True)], axis=0)
    return {
        "blood vessels": everything,
        "dark vessels": dark,
        "bright vessels": bright,
        "thick vessels": everything & (width >= THICK_PX),
        "thin vessels": everything & (width <= THIN_PX),
        "left tree": left,
        "right tree": right,
        "discs": painting.discs_HW & view,
        "lines": painting.lines_HW & view,
    }


def _thick_and_dark(painting: Painting) -> np.ndarray:
    """The cine annotator's policy: trunk and major branches of dark trees, drawn 1 px too wide."""
    trees = [tree.drawn for tree in painting.trees if tree.dark]
    thick = np.any([tree.mask_HW & (tree.width_HW >= THICK_PX) for tree in trees], axis=0) & painting.view_HW
    return np.asarray(Image.fromarray(thick.astype(np.uint8)).filter(ImageFilter.MaxFilter(3))) > 0


def _holds(directory: Path, card: dict) -> bool:
    """Whether the folder holds the complete set that the card describes."""
    try:
        return json.loads((directory / "dataset.json").read_text()) == card
    except (OSError, ValueError):
        return False


def _write_pair(
    directory: Path, look: str, size_hw: tuple[int, int], target_fraction: float | None, pair: tuple[str, int]
) -> None:
    (name, seed), (height, width) = pair, size_hw
    scene = render(seed, look, max(size_hw), target_fraction)
    image_HW3, label_HW = scene.image_HW3[:height, :width], scene.label_HW[:height, :width]
    Image.fromarray(image_HW3).save(directory / "images" / f"{name}.png", compress_level=1)
    Image.fromarray(label_HW.astype(np.uint8) * np.uint8(255)).save(directory / "masks" / f"{name}.png")


def _publish(work: Path, directory: Path, card: dict) -> None:
    """Rename the finished folder into place; another process that got there first is as good."""
    try:
        os.rename(work, directory)
    except OSError:
        if not _holds(directory, card):
            raise


def _coloured(scene: Scene) -> np.ndarray:
    """Masks as colours: dark red, bright yellow, thin dimmer, discs blue, lines green, a label that differs white."""
    colours = {
        "discs": (60, 90, 255),
        "lines": (0, 200, 80),
        "dark vessels": (255, 60, 60),
        "bright vessels": (255, 220, 60),
    }
    picture = np.zeros_like(scene.image_HW3)
    for name, colour in colours.items():
        if name in scene.masks:
            picture[scene.masks[name]] = colour
    if "thin vessels" in scene.masks:
        picture[scene.masks["thin vessels"]] //= 2
    if not np.array_equal(scene.label_HW, scene.masks.get("blood vessels")):
        picture[scene.label_HW] = 255
    return picture


def main(argv: list[str] | None = None) -> int:
    """Write a set or a contact sheet; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sft.synthetic", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("directory", type=Path, help="folder to write")
    parser.add_argument("--preset", choices=PRESETS, default="demo")
    parser.add_argument("--count", type=int, default=40, help="number of images")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--workers", type=int, default=1, help="processes that render; 0: one per CPU core")
    parser.add_argument(
        "--contact_sheet", action="store_true", help="write contact_sheet.png (at most 24 images) instead"
    )
    args = parser.parse_args(argv)
    try:
        if args.contact_sheet:
            args.directory.mkdir(parents=True, exist_ok=True)
            path = args.directory / "contact_sheet.png"
            contact_sheet(args.preset, max(1, min(args.count, 24)), args.seed).save(path)
        else:
            workers = args.workers or processors()
            path = write_dataset(args.directory, args.preset, args.count, args.seed, workers)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print(path)
    return 0
