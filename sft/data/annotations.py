"""Upstream Sa2VA's `annotations.json`: reads its entries, and draws their polygons as masks.

Takes the file's path and the folder of its images; gives one entry per (image, phrase). Knows nothing of pairs,
splits or pixels.

The format is a list of `{"image": file name, "mask": [object, ...], "text": [phrase, ...]}`; an object is a list of
rings, a ring is a flat list `[x1, y1, x2, y2, ...]` in pixels, where pixel (column c, row r) covers
[c, c + 1) x [r, r + 1).

How rings become a mask:

- A pixel belongs to a ring if its centre lies inside by the even-odd rule, so a ring that crosses or bridges itself
  leaves the doubly enclosed part open. pycocotools samples the same centres, with vertices rounded to 1/5 pixel.
- Rings of one object that only overlap are united: the overlap stays foreground (upstream adds them up and gets a 2
  there).
- A ring wholly inside another ring of the same object is a hole, a ring inside that hole an island, and so on. This
  is how contour tools write the holes of a vessel network; upstream fills them. A ring equal to another one is no
  hole.
- Objects are united, whatever lies in whatever: an object never cuts a hole into another one.

Shapes: H, W = height and width of the image in pixels; N = points of a ring.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sft.config import UserError

FILE_NAME = "annotations.json"
FORMAT = 'a list of {"image": file, "mask": [[[x1, y1, x2, y2, ...], ...], ...], "text": [phrase, ...]}'
OUTSIDE_TOLERANCE_PX = 1.0


class Entry(NamedTuple):
    """What one phrase names on one image."""

    image: Path
    phrase: str | None
    """None if the entry has no texts."""
    polygons: tuple
    """Objects of rings of numbers."""


class Annotations(NamedTuple):
    """All entries of one file, and what is wrong with it."""

    entries: list[Entry]
    errors: list[str]
    warnings: list[str]


class Raster(NamedTuple):
    """A drawn mask, how many rings were read as holes, and how far (px) the farthest point lies outside the frame."""

    mask_HW: np.ndarray
    holes: int
    outside_px: float


def read_annotations(path: Path, images: Path) -> Annotations:
    """Reads an `annotations.json`; objects of one image with the same phrase become one entry.

    A phrase loses a final full stop and its capitals, as upstream does before it asks for it.

    Args:
        path: the JSON file.
        images: the folder that the entries' file names are relative to.

    Returns:
        The entries, sorted by image and phrase, and the findings: an entry with an error is left out.

    Raises:
        UserError: the file is not JSON, or not a list of entries.
    """
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); expected {FORMAT}") from None
    if not isinstance(items, list):
        kind = "a COCO file" if isinstance(items, dict) and "annotations" in items else f"a {type(items).__name__}"
        raise UserError(f"{path}: is {kind}; expected {FORMAT}: convert it")
    found: dict[tuple[Path, str | None], list] = {}
    errors: list[str] = []
    warnings: list[str] = []
    for index, item in enumerate(items):
        name = item.get("image") if isinstance(item, dict) else None
        where = f"{path}: entry {index} ({name})"
        try:
            image = _image_of(item, images)
            for phrase, rings in _objects_of(item, where, warnings):
                found.setdefault((image, phrase), []).append(rings)
        except UserError as error:
            errors.append(f"{where}: {error}")
    order = sorted(found, key=lambda key: (str(key[0]), key[1] or ""))
    return Annotations([Entry(*key, tuple(found[key])) for key in order], errors, warnings)


def rasterise(polygons: tuple, height: int, width: int) -> Raster:
    """Draws objects of rings on an empty frame; the module's docstring states the rule.

    Args:
        polygons: objects of rings `(x1, y1, x2, y2, ...)` in pixels; what lies outside the frame is cut off.
        height: H, in pixels.
        width: W, in pixels.

    Returns:
        The mask (bool, HW), the number of holes, the largest distance of a point from the frame in pixels.
    """
    mask_HW = np.zeros((height, width), dtype=bool)
    holes = 0
    outside_px = 0.0
    for rings in polygons:
        points = [np.asarray(ring, dtype=np.float64).reshape(-1, 2) for ring in rings]
        for points_N2 in points:
            beyond = np.maximum(-points_N2, points_N2 - (width, height))
            outside_px = max(outside_px, float(beyond.max()))
        drawn = [patch for patch in (_draw_ring(points_N2, height, width) for points_N2 in points) if patch.area]
        holes += _paint_object(mask_HW, drawn)
    return Raster(mask_HW, holes, outside_px)


class _Patch(NamedTuple):
    """One ring's pixels inside its bounding box, whose upper left pixel is (top, left)."""

    top: int
    left: int
    inside_hw: np.ndarray
    area: int

    @property
    def box(self) -> tuple[slice, slice]:
        height, width = self.inside_hw.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def _image_of(item: object, images: Path) -> Path:
    if not isinstance(item, dict) or not isinstance(item.get("image"), str) or not isinstance(item.get("mask"), list):
        raise UserError(f'needs "image" (text) and "mask" (list); the file is {FORMAT}')
    image = images / item["image"]
    if not image.is_file():
        raise UserError(f"there is no file {image}: add it or delete the entry")
    return image


def _objects_of(item: dict, where: str, warnings: list[str]) -> list[tuple[str | None, tuple]]:
    """The entry's (phrase, rings), one per object; rings that enclose nothing are left out with a warning."""
    objects, texts = item["mask"], item.get("text")
    if texts is None:
        texts = [None] * len(objects)
    if not isinstance(texts, list) or len(texts) != len(objects):
        given = f"{len(texts)} texts" if isinstance(texts, list) else f"text {texts!r}"
        raise UserError(f"{len(objects)} masks but {given}: give a list with one phrase per mask, or no text at all")
    if not objects:
        raise UserError("holds no mask: give an object, or delete the entry")
    result = []
    for number, (rings, text) in enumerate(zip(objects, texts, strict=True)):
        if not isinstance(rings, list):
            raise UserError(f"mask {number} is a {type(rings).__name__}, not a list of rings (RLE is not read)")
        checked = [_ring(ring, number) for ring in rings]
        kept = tuple(ring for ring in checked if len(ring) >= 6)
        if len(kept) < len(checked):
            # pycocotools reads four numbers as a box x, y, width, height: a two-point contour is a rectangle there.
            warnings.append(
                f"{where}: {len(checked) - len(kept)} ring(s) of mask {number} have fewer than 3 points: left out"
            )
        result.append((_phrase(text, number), kept))
    return result


def _ring(ring: object, number: int) -> tuple[float, ...]:
    if not isinstance(ring, list) or not all(type(value) in (int, float) and math.isfinite(value) for value in ring):
        raise UserError(f"mask {number} holds a ring that is not a flat list of finite numbers [x1, y1, x2, y2, ...]")
    if len(ring) % 2:
        raise UserError(
            f"mask {number} holds a ring of {len(ring)} numbers: x and y must alternate, so the count is even"
        )
    return tuple(ring)


def _phrase(text: object, number: int) -> str | None:
    if text is None:
        return None
    phrase = text.strip().removesuffix(".").strip().lower() if isinstance(text, str) else ""
    if not phrase:
        raise UserError(f"text {number} is {text!r}: give a phrase such as 'the blood vessels'")
    return phrase


def _draw_ring(points_N2: np.ndarray, height: int, width: int) -> _Patch:
    """Even-odd fill by rows: every edge that crosses a row of pixel centres toggles all pixels to its right."""
    limit = np.array((width, height))
    left, top = np.clip(np.floor(points_N2.min(axis=0)), 0, limit).astype(int)
    right, bottom = np.clip(np.ceil(points_N2.max(axis=0)), 0, limit).astype(int)
    rows, columns = max(bottom - top, 0), max(right - left, 0)
    x1, y1 = points_N2.T
    x2, y2 = np.roll(points_N2, -1, axis=0).T
    # Half-open in y, so a vertex exactly on a row of centres counts once.
    first = np.clip(np.ceil(np.minimum(y1, y2) - 0.5), top, bottom).astype(int)
    last = np.clip(np.ceil(np.maximum(y1, y2) - 0.5), top, bottom).astype(int)
    crossings = last - first
    edge = np.repeat(np.arange(len(points_N2)), crossings)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(crossings) - crossings, crossings) + first[edge]
    x = x1[edge] + (row + 0.5 - y1[edge]) * (x2[edge] - x1[edge]) / (y2[edge] - y1[edge])
    column = np.clip(np.ceil(x - 0.5), left, right).astype(int) - left
    toggles = np.bincount((row - top) * (columns + 1) + column, minlength=rows * (columns + 1))
    inside_hw = (np.cumsum(toggles.reshape(rows, columns + 1), axis=1)[:, :columns] & 1).astype(bool)
    return _Patch(int(top), int(left), inside_hw, int(inside_hw.sum()))


def _paint_object(mask_HW: np.ndarray, patches: list[_Patch]) -> int:
    """Adds one object's rings to the mask, each outer ring without its direct holes; returns the number of holes."""
    patches = sorted(patches, key=lambda patch: -patch.area)
    outer_of = _containers(patches)
    depth: list[int] = []
    for index in range(len(patches)):
        # The longest chain of nesting, not the count: two overlapping outer rings around one hole make it no island.
        depth.append(1 + max((depth[outer] for outer in outer_of[index]), default=-1))
    holes_of: list[list[_Patch]] = [[] for _ in patches]
    for index, patch in enumerate(patches):
        for outer in outer_of[index]:
            if depth[outer] == depth[index] - 1:
                holes_of[outer].append(patch)
    for index, patch in enumerate(patches):
        if depth[index] % 2 == 0:
            solid_hw = patch.inside_hw.copy()
            for hole in holes_of[index]:
                _view(solid_hw, patch, hole)[hole.inside_hw] = False
            mask_HW[patch.box] |= solid_hw
    return sum(level % 2 for level in depth)


def _containers(patches: list[_Patch]) -> list[set[int]]:
    """For each ring the larger rings that hold all its pixels; expects the patches sorted by falling area."""
    if not patches:
        return []
    corner = np.array([(p.top, p.left, -p.top - p.inside_hw.shape[0], -p.left - p.inside_hw.shape[1]) for p in patches])
    result: list[set[int]] = []
    for index, patch in enumerate(patches):
        # Boxes first: an object may hold hundreds of rings, and few boxes lie in one another.
        candidates = np.nonzero((corner[:index] <= corner[index]).all(axis=1))[0]
        result.append(
            {
                int(outer)
                for outer in candidates
                if patches[outer].area > patch.area
                and not (patch.inside_hw & ~_view(patches[outer].inside_hw, patches[outer], patch)).any()
            }
        )
    return result


def _view(array_hw: np.ndarray, outer: _Patch, inner: _Patch) -> np.ndarray:
    """The part of an array over `outer`'s box that lies over `inner`'s box."""
    top, left = inner.top - outer.top, inner.left - outer.left
    height, width = inner.inside_hw.shape
    return array_hw[top : top + height, left : left + width]
