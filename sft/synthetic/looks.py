"""Paints vessel trees into images: retina, X-ray angiogram, OCT angiogram, mixed trees, cine angiogram.

Takes a random generator, a look and a size; gives a `Painting`: the image and its layers (trees with polarity, discs,
lines, field of view). Knows nothing of targets, questions or files; `sft.synthetic` turns layers into masks.

Array legend: CHW float32 image planes in 0..255; HW rows and columns. Lengths are px of a 512x512 image.
"""

from dataclasses import dataclass

import numpy as np

from sft.synthetic.grounds import (
    darken,
    draw_discs,
    draw_exudates,
    draw_lines,
    draw_macula,
    draw_optic_disc,
    field_of_view,
    finish,
    lighten,
    planar_ground,
    retina,
    smooth_field,
)
from sft.synthetic.trees import CENTRE_PX, FRAME_PX, Drawn, Habit, Roots, Tree, draw, grow, visible_area_px

MIN_TREE_PX = 3000  # area of a tree, px at 512, below which another is grown


@dataclass(frozen=True)
class Layer:
    """One tree of an image."""

    drawn: Drawn
    dark: bool


@dataclass(frozen=True)
class Painting:
    """An image and what is on it."""

    image_HW3: np.ndarray
    trees: tuple[Layer, ...]
    left_right: bool
    """Exactly two trees, the first in the left half and the second in the right."""
    discs_HW: np.ndarray
    lines_HW: np.ndarray
    view_HW: np.ndarray
    """The field of view; nothing outside it is a target."""


def paint(rng: np.random.Generator, look: str, size_px: int, area_px: float | None) -> Painting:
    """Paint one image.

    Args:
        rng: source of all randomness.
        look: "fundus", "angiogram", "octa", "mixed trees" or "cine".
        size_px: side of the image.
        area_px: upper limit of the area of all vessels, px at 512; None for no limit.

    Raises:
        ValueError: unknown look.
    """
    match look:
        case "fundus":
            return _fundus(rng, size_px, area_px)
        case "angiogram" | "octa" | "mixed trees" | "cine":
            return _planar(rng, look, size_px, area_px)
        case _:
            raise ValueError(f"look {look!r}: allowed are fundus, angiogram, octa, mixed trees, cine")


def _fundus(rng: np.random.Generator, size_px: int, area_px: float | None) -> Painting:
    """A retina: vessels radiate from the optic disc, all darker than the ground."""
    radius = rng.uniform(222, 252) if rng.random() < 0.6 else rng.uniform(252, 420)
    centre = CENTRE_PX + rng.normal(0, 6 if radius < 252 else 40, 2)
    view = field_of_view(rng, size_px, centre, radius)
    temporal = rng.choice((-1.0, 1.0))
    nasal_shift = rng.uniform(-0.1, 0.2) if rng.random() < 0.6 else rng.uniform(0.3, 0.7)
    disc = centre + np.array([-temporal * nasal_shift, rng.uniform(-0.12, 0.12)]) * min(radius, 250)
    disc_px = rng.uniform(0.13, 0.2) * radius
    image = retina(rng, size_px, centre, radius)
    draw_macula(rng, image, disc + np.array([temporal * rng.uniform(4.0, 5.0), 0.4]) * disc_px, disc_px)
    draw_optic_disc(rng, image, disc, disc_px)
    image *= 1 + rng.uniform(0.01, 0.05) * smooth_field(rng, size_px, (64, 128))

    def room(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (np.hypot(x - centre[0], y - centre[1]) < radius).astype(float)

    trees = []
    clarity = rng.uniform(0.55, 1.3)
    fading = 1 + 0.2 * np.clip(smooth_field(rng, size_px, (3, 6)), -2, 2)
    for kind in ("artery", "vein"):
        roots = _retinal_roots(rng, kind, disc, temporal, radius, 1 if area_px is None else 0.7)
        habit = Habit(wander=rng.uniform(0.18, 0.42), branching=rng.uniform(0.3, 0.65), taper=0.25, ratio=(0.3, 0.85))
        tree = grow(rng, roots, habit, room, None if area_px is None else area_px / 2)
        trees.append(Layer(_retinal_stain(rng, image, tree, kind, clarity, fading), dark=True))
    discs = draw_discs(rng, image, 0.65, dark_share=0.6, tint=rng.uniform((0.2, 0.6, 0.5), (0.5, 0.9, 0.9)))
    lines = draw_lines(rng, image, 0.55)
    draw_exudates(rng, image)
    if rng.random() < 0.1:
        image[:] = image[1] * rng.uniform(1.0, 2.2)  # red-free
    _cut_to_view(image, view, outside=rng.uniform(0, 6))
    finished = finish(rng, image, np.ones(3), grain=rng.uniform(0.5, 6), blur=rng.uniform(0.3, 1.1), coarse=0.3)
    return Painting(finished, tuple(trees), False, discs, lines, view > 0.5)


def _planar(rng: np.random.Generator, look: str, size_px: int, area_px: float | None) -> Painting:
    """One to three separate trees of either polarity on an X-ray-like, speckled or coloured ground."""
    dark = _polarities(rng, look)
    left_right = look != "cine" and len(dark) == 2 and rng.random() < (0.75 if area_px is None else 0.5)
    image = planar_ground(rng, look, size_px, dark)
    trees = []
    shapes_before = rng.integers(0, len(dark) + 1)  # distractors lie below some trees and above the others
    split_px, tilt = CENTRE_PX + rng.uniform(-50, 50), rng.uniform(-0.25, 0.25)
    for number, is_dark in enumerate((*dark, None)):
        if number == shapes_before:
            often = 0.95 if look == "mixed trees" else 0.65
            discs = draw_discs(rng, image, often, dark_share=0.5, tint=rng.uniform(0.4, 1.0, len(image)))
            lines = draw_lines(rng, image, often)
        if is_dark is not None:
            territory = (-1, 1)[number] if left_right else 0
            share = None if area_px is None else area_px / len(dark)
            tree = _planar_tree(rng, look, is_dark, territory, split_px, tilt, share)
            trees.append(Layer(_planar_stain(rng, image, tree, look, is_dark), is_dark))
    view = np.ones((size_px, size_px), np.float32)
    if look == "cine" or rng.random() < 0.2:
        radius = rng.uniform(262, 320) if look == "cine" else 265
        view = field_of_view(rng, size_px, CENTRE_PX + rng.normal(0, 5, 2), radius)
    if look == "cine":
        image *= 0.4 + 0.6 / 255 * image  # a steeper film curve than any other look has
    _cut_to_view(image, view)
    finished = finish(rng, image, _cast(rng, look), *_texture(rng, look))
    return Painting(finished, tuple(trees), left_right, discs, lines, view > 0.5)


def _cut_to_view(image: np.ndarray, view_HW: np.ndarray, outside: float = 0.0) -> None:
    """Clip to 0..255 and darken what lies outside the field of view, in place."""
    np.clip(image, 0, 255, out=image)
    image *= view_HW
    image += np.float32(outside) * (1 - view_HW)


def _retinal_roots(
    rng: np.random.Generator, kind: str, disc: np.ndarray, temporal: float, radius: float, share: float
) -> Roots:
    """Four arcade trunks and some small radial vessels; angles are measured from the macula's side."""
    scale = rng.uniform(0.8, 1.3) * max(radius, 235) / 240 * share
    trunk = rng.uniform(4.8, 7.6) if kind == "vein" else rng.uniform(3.6, 6.0)
    upper = rng.uniform((55, 110), (100, 165))
    lower = -rng.uniform((55, 110), (100, 165))
    small = rng.uniform(-180, 180, int(rng.integers(2, 6)))
    angle = np.deg2rad(np.concatenate((upper, lower, small)))
    toward_macula = -np.sign(angle) * np.where(
        np.abs(angle) < 1.8, rng.uniform(0.2, 1.2, len(angle)), rng.uniform(-0.4, 0.4, len(angle))
    )
    width = np.concatenate((trunk * rng.uniform(0.65, 1.1, 4), rng.uniform(1.6, 3.4, len(small)))) * scale
    if share < 1:
        chosen = rng.permutation(len(angle))[:3]
        angle, toward_macula, width = angle[chosen], toward_macula[chosen], width[chosen]
    length = np.where(width > 3, rng.uniform(1.0, 1.5, len(width)), rng.uniform(0.4, 1.0, len(width))) * radius
    if temporal < 0:
        angle, toward_macula = np.pi - angle, -toward_macula
    x, y = (disc[axis] + rng.normal(0, 5, len(angle)) for axis in (0, 1))
    return Roots(x, y, angle, np.maximum(width, 1.4), length, toward_macula)


def _polarities(rng: np.random.Generator, look: str) -> tuple[bool, ...]:
    """One entry per tree, true for a dark one."""
    match look:
        case "angiogram":
            return tuple(rng.random(rng.choice((1, 2, 3), p=(0.35, 0.5, 0.15))) < 0.8)
        case "octa":
            return tuple(rng.random(rng.choice((1, 2), p=(0.45, 0.55))) < 0.2)
        case "cine":
            return ((True, False), (True, True, False), (True, False, False))[rng.choice(3, p=(0.5, 0.2, 0.3))]
        case _:
            first = bool(rng.random() < 0.5)
            return (first, not first) if rng.random() < 0.7 else (first, not first, bool(rng.random() < 0.5))


def _planar_roots(rng: np.random.Generator, look: str, territory: int, dark: bool, share: float) -> Roots:
    """Roots on the border of the tree's territory, heading in, or around a point inside it."""
    low, high = {0: (0.0, 1.0), -1: (0.0, 0.42), 1: (0.58, 1.0)}[territory]
    wide = rng.uniform(6.5, 9.0) if look == "cine" else rng.uniform(2.6, 8.0)
    if look == "cine" and not dark:
        wide = rng.uniform(4.5, 8.0)
    count = 1 if share < 1 or rng.random() < 0.55 else int(rng.integers(2, 5))
    if rng.random() < 0.7 or share < 1:
        from_top = rng.random() < 0.5
        x = rng.uniform(low + 0.08, high - 0.08) + rng.normal(0, 0.05, count)
        y = np.full(count, -0.01 if from_top else 1.01)
        angle = np.full(count, np.pi / 2 if from_top else -np.pi / 2) + rng.normal(0, 0.35, count)
        if territory == 0 and rng.random() < 0.5:
            x, y, angle = y, x, np.pi / 2 - angle
    else:
        count = int(rng.integers(2, 6))
        x = np.full(count, rng.uniform(low + 0.1, high - 0.1)) + rng.normal(0, 0.002, count)
        y = np.full(count, rng.uniform(0.2, 0.8)) + rng.normal(0, 0.002, count)
        angle = rng.uniform(0, 2 * np.pi) + np.arange(count) * 2 * np.pi / count + rng.normal(0, 0.3, count)
    width = np.maximum(wide * rng.uniform(0.7, 1.0, count) * share, 1.7)
    length = rng.uniform(0.6, 1.15, count) * FRAME_PX * (0.8 if territory else 1)
    return Roots(x * FRAME_PX, y * FRAME_PX, angle, width, length, rng.normal(0, 0.6, count))


def _planar_tree(
    rng: np.random.Generator,
    look: str,
    dark: bool,
    territory: int,
    split_px: float,
    tilt: float,
    area_px: float | None,
) -> Tree:
    """Grow a tree left (-1) or right (1) of a tilted border, or anywhere (0)."""

    def room(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        frame = (np.minimum(x, y) > -12) & (np.maximum(x, y) < FRAME_PX + 12)
        to_border_px = territory * (x - split_px - tilt * (y - CENTRE_PX)) if territory else 99.0
        return frame * np.clip((to_border_px - 4) / 40, 0, 1)

    habit = _planar_habit(rng, look, dark)
    for _ in range(5):  # some trees leave the frame at once
        tree = grow(rng, _planar_roots(rng, look, territory, dark, 1 if area_px is None else 0.6), habit, room, area_px)
        if visible_area_px(tree) > (MIN_TREE_PX if area_px is None else area_px * 0.7):
            break
    return tree


def _planar_habit(rng: np.random.Generator, look: str, dark: bool) -> Habit:
    if look == "cine":
        return Habit(wander=0.4, branching=0.9, ratio=(0.3, 0.72), taper=0.1, major_width_px=4.5 if dark else None)
    return Habit(
        generations=int(rng.integers(3, 5)),
        wander=rng.uniform(0.15, 0.6),
        branching=rng.uniform(0.45, 0.95),
        ratio=(0.3, rng.uniform(0.7, 0.93)),
        taper=rng.uniform(0.05, 0.35),
    )


def _retinal_stain(
    rng: np.random.Generator, image: np.ndarray, tree: Tree, kind: str, clarity: float, fading_HW: np.ndarray
) -> Drawn:
    """Draw arteries or veins into the image; arteries are paler and shine more."""
    shiny = rng.random() < (0.8 if kind == "artery" else 0.45)
    drawn = draw(tree, image.shape[1], reflex=shiny)
    absorbed = np.array((0.06, 0.34, 0.3) if kind == "artery" else (0.18, 0.48, 0.36)) * clarity
    absorbed[0] *= rng.uniform(0, 1.8)
    darken(image, _depth(rng, drawn) * fading_HW, np.minimum(absorbed, 0.85))
    if shiny:
        lighten(image, drawn.reflex_HW * np.float32(rng.uniform(0.08, 0.3)), image.mean((1, 2)) * 1.9)
    return drawn


def _planar_stain(rng: np.random.Generator, image: np.ndarray, tree: Tree, look: str, dark: bool) -> Drawn:
    """Draw a tree into the image with a contrast of its own."""
    shiny = dark and rng.random() < 0.25
    drawn = draw(tree, image.shape[1], reflex=shiny)
    alpha = _depth(rng, drawn) * (1 + 0.15 * smooth_field(rng, image.shape[1], (4, 9)))
    contrast = rng.uniform(*{"cine": (0.35, 0.6), "octa": (0.4, 0.9)}.get(look, (0.22, 0.75)))
    hue = rng.uniform(0.6, 1.0, len(image)) if len(image) == 3 else np.ones(1)
    if dark:
        darken(image, alpha, contrast * hue)
    else:
        peak = rng.uniform(170, 255) * np.sqrt(hue)
        lighten(image, alpha * np.float32(contrast), np.maximum(peak, image.mean((1, 2)) * 1.3))
    if shiny:
        lighten(image, drawn.reflex_HW * np.float32(0.25), image.mean((1, 2)) * 1.3)
    return drawn


def _depth(rng: np.random.Generator, drawn: Drawn) -> np.ndarray:
    """Opacity: coverage, weaker where the vessel is thin, as less blood is crossed."""
    floor = rng.uniform(0.35, 0.8)
    return drawn.coverage_HW * (floor + (1 - floor) * np.minimum(drawn.width_HW / 5, 1)).astype(np.float32)


def _cast(rng: np.random.Generator, look: str) -> np.ndarray:
    """Colour cast of a one-plane image; most stay grey."""
    strength = 0.3 if look != "cine" and rng.random() < 0.25 else 0.02
    return 1 - rng.uniform(0, strength, 3)


def _texture(rng: np.random.Generator, look: str) -> tuple[float, float, float]:
    """Grain (grey levels), blur (px) and coarseness of the grain (0 to 1)."""
    match look:
        case "octa":
            return rng.uniform(4, 15), rng.uniform(0.3, 0.9), rng.uniform(0.2, 0.8)
        case "cine":
            return rng.uniform(8, 14), rng.uniform(0.7, 1.2), 0.9
        case _:
            return rng.uniform(2, 13), rng.uniform(0.3, 1.3), rng.uniform(0, 0.7)
