"""Finds the pairs of a data set by its folders and file names, without opening an image.

Takes a folder; gives pairs, errors for what has no partner, warnings for what is ignored. Knows nothing of pixels or
splits by chance.

Layouts, at the root or inside `train/` and `val/` (the constants below have more names; case does not matter):

    images/ + masks/              one mask per image: the same name (`a.jpg`, `a.png`) or a known suffix (`a_mask.png`)
    images/ + annotations.json    upstream's polygons, see `sft/annotations.py`; one sample per image and phrase

A `test/` folder beside `train/` is never read. `train/` without `val/` is divided like a single folder.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sft.config import UserError
from sft.data.annotations import FILE_NAME as ANNOTATIONS
from sft.data.annotations import read_annotations
from sft.data.read import Pair

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif")
IMAGE_FOLDERS = ("images", "image", "imgs", "img")
MASK_FOLDERS = ("masks", "1st_manual", "labels", "gt", "annotations", "mask", "label")
"""The first that exists is read: DRIVE keeps the vessels in `1st_manual` and the field of view in `mask`."""
TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation")
TEST_FOLDERS = ("test", "testing")
MASK_SUFFIXES = ("_mask", "_masks", "_gt", "_label", "_seg", "_segmentation", "_vessels", "_manual1", "_1stHO")
IMAGE_SUFFIXES = ("_image", "_img", "_training", "_test")
SECOND_OBSERVER_SUFFIXES = ("_manual2", "_2ndHO")
LITTER = ("thumbs.db", "desktop.ini")
LAYOUTS = f"images/ + masks/, or images/ + {ANNOTATIONS}, either also inside train/ and val/"
NAMES_SHOWN = 8
HINTS = 10
PHRASE_CHARACTERS = 40


class Found(NamedTuple):
    """Pairs in the order of their names, and what the folders leave unpaired."""

    pairs: list[Pair]
    errors: list[str]
    warnings: list[str]


def find_pairs(root: Path) -> Found:
    """Pairs images with masks or polygons.

    Args:
        root: a folder in one of the layouts above.

    Returns:
        The pairs, sorted by name; images and masks without a partner as errors; ignored files as warnings. A name is
        unique: the image's name without ending, `name--phrase` if an image has several samples, `train-name` if both
        splits use a name.

    Raises:
        UserError: the folder is missing, has none of the layouts, or more than one.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"data_root {root}: no such folder; give one with {LAYOUTS}")
    found = Found([], [], [])
    try:
        for folder, part in _parts(root, found):
            _find_in(folder, part, found)
    except PermissionError as error:
        raise UserError(
            f"data_root {root}: no permission to read {error.filename}; change its mode or its owner"
        ) from None
    if not found.pairs and not found.errors:
        raise UserError(f"data_root {root}: holds no images ({', '.join(IMAGE_ENDINGS)}); expected {LAYOUTS}")
    return found._replace(pairs=sorted(_with_unique_names(found.pairs), key=lambda pair: pair.name))


def _parts(root: Path, found: Found) -> list[tuple[Path, str | None]]:
    """The folders to search and the split each stands for."""
    train, val, test = (_subfolders(root, names) for names in (TRAIN_FOLDERS, VAL_FOLDERS, TEST_FOLDERS))
    if not train and not val:
        return [(root, None)]
    if _subfolders(root, IMAGE_FOLDERS):
        raise UserError(
            f"data_root {root}: has images both at the root and in {(train or val)[0].name}/; keep one of the layouts"
        )
    if not train or len(train) > 1 or len(val) > 1:
        names = ", ".join(folder.name + "/" for folder in train + val)
        raise UserError(f"data_root {root}: has {names}; expected one train/ and at most one val/")
    found.warnings.extend(f"{folder}: a test folder is not read; evaluate on it after training" for folder in test)
    if not val:
        return [(train[0], None)]
    return [(train[0], "train"), (val[0], "val")]


def _subfolders(folder: Path, names: Sequence[str]) -> list[Path]:
    """Subfolders with one of the names in any case, in the order of the names."""
    present = [entry for entry in folder.iterdir() if entry.is_dir() and entry.name.lower() in names]
    return sorted(present, key=lambda entry: (names.index(entry.name.lower()), entry.name))


def _find_in(folder: Path, part: str | None, found: Found) -> None:
    image_folders, mask_folders = _subfolders(folder, IMAGE_FOLDERS), _subfolders(folder, MASK_FOLDERS)
    annotations = folder / ANNOTATIONS
    if not image_folders or not (mask_folders or annotations.is_file()):
        names = sorted(
            entry.name + "/" * entry.is_dir() for entry in folder.iterdir() if not entry.name.startswith(".")
        )
        held = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise UserError(f"data_root {folder}: has no such layout (it holds {held or 'nothing'}); expected {LAYOUTS}")
    if mask_folders and annotations.is_file():
        raise UserError(
            f"data_root {folder}: has both {mask_folders[0].name}/ and {ANNOTATIONS}; keep the one that holds the truth"
        )
    found.warnings.extend(f"{extra}: not read, {image_folders[0].name}/ is" for extra in image_folders[1:])
    found.warnings.extend(f"{extra}: not read, {mask_folders[0].name}/ is" for extra in mask_folders[1:])
    if annotations.is_file():
        _read_polygons(annotations, image_folders[0], part, found)
    else:
        _match(image_folders[0], mask_folders[0], part, found)


def _read_polygons(annotations: Path, images: Path, part: str | None, found: Found) -> None:
    entries, errors, warnings = read_annotations(annotations, images)
    found.errors.extend(errors)
    found.warnings.extend(warnings)
    per_image = Counter(entry.image for entry in entries)
    for entry in entries:
        name = "_".join(entry.image.relative_to(images).with_suffix("").parts)
        if per_image[entry.image] > 1:
            name += "--" + re.sub(r"\W+", "-", entry.phrase or "all")[:40].strip("-")
        found.pairs.append(Pair(name, entry.image, polygons=entry.polygons, split=part, phrase=entry.phrase))
    if not errors:
        unused = set(_image_files(images, found)) - per_image.keys()
        found.warnings.extend(f"{image}: has no entry in {annotations}, it is not used" for image in sorted(unused))


def _match(images: Path, masks: Path, part: str | None, found: Found) -> None:
    image_of = _by_stem(_image_files(images, found), found)
    short_image_of = {_without(stem, IMAGE_SUFFIXES): stem for stem in image_of}
    masks_of: dict[str, list[Path]] = defaultdict(list)
    left: dict[str, Path] = {}
    for stem, mask in _by_stem(_image_files(masks, found), found).items():
        short = _without(stem, MASK_SUFFIXES)
        image = stem if stem in image_of else short if short in image_of else short_image_of.get(short)
        if image is not None:
            masks_of[image].append(mask)
        elif _without(stem, SECOND_OBSERVER_SUFFIXES) != stem:
            found.warnings.append(f"{mask}: a second observer's mask, it is not used")
        else:
            left[stem] = mask
    single = 0
    for stem, image in image_of.items():
        match masks_of[stem]:
            case [mask]:
                found.pairs.append(Pair(stem, image, mask, split=part))
            case []:
                single += 1
                lowered = {other.lower(): mask.name for other, mask in left.items()} if single <= HINTS else {}
                near = difflib.get_close_matches(stem.lower(), lowered, n=1)
                hint = f" (nearest: {lowered[near[0]]})" if near else ""
                found.errors.append(
                    f"{image}: has no mask in {masks}{hint}; add {stem}.png or {stem}_mask.png, or remove the image"
                )
            case several:
                names = ", ".join(mask.name for mask in several)
                found.errors.append(f"{image}: has {len(several)} masks in {masks}: {names}; keep one")
    found.errors.extend(f"{mask}: has no image in {images}; add it, or remove the mask" for mask in left.values())


def _image_files(folder: Path, found: Found) -> list[Path]:
    """The folder's image files, sorted; everything else but litter becomes a warning."""
    files = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.name.lower() in LITTER:
            continue
        if entry.is_file() and entry.suffix.lower() in IMAGE_ENDINGS:
            files.append(entry)
        elif entry.is_dir():
            found.warnings.append(f"{entry}: a folder inside {folder.name}/ is not read; move its files up")
        else:
            found.warnings.append(f"{entry}: not an image ({', '.join(IMAGE_ENDINGS)}), it is not read")
    return files


def _by_stem(files: Sequence[Path], found: Found) -> dict[str, Path]:
    stems: dict[str, Path] = {}
    for file in files:
        if file.stem in stems:
            found.errors.append(f"{file}: has the same name as {stems[file.stem].name}; keep one of the two")
        stems.setdefault(file.stem, file)
    return stems


def _without(stem: str, suffixes: Sequence[str]) -> str:
    for suffix in suffixes:
        if stem.lower().endswith(suffix.lower()) and len(stem) > len(suffix):
            return stem[: -len(suffix)]
    return stem


def _with_unique_names(pairs: Sequence[Pair]) -> list[Pair]:
    counts = Counter(pair.name for pair in pairs)
    unique: dict[str, Pair] = {}
    for pair in pairs:
        name = base = f"{pair.split}-{pair.name}" if pair.split and counts[pair.name] > 1 else pair.name
        number = 1
        while name in unique or (number > 1 and name in counts):
            number += 1
            name = f"{base}-{number}"
        unique[name] = replace(pair, name=name)
    return list(unique.values())
