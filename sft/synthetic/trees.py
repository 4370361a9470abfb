"""Grows branching vessel trees and draws them with exact widths: the geometry behind `sft.synthetic`.

Takes a random generator, root positions and a `Habit`; gives courses (x, y, width along every branch) and, drawn,
coverage and width for each pixel. Knows nothing of colours, looks or targets.

All lengths are px of a 512x512 image, x to the right, y down; drawing scales them to the size asked for. Array
legend: P branches, N points along a branch, E side branches of a branch, HW image rows and columns.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

FRAME_PX = 512  # the frame that all lengths refer to
CENTRE_PX = FRAME_PX / 2
POINTS = 65  # points along a branch
EVENTS = 5  # side branches along a branch, the fork at its end included
OVERSAMPLING = 3
WIDTH_CODE = 16  # grey level per px of width on the drawing canvas


@dataclass(frozen=True)
class Habit:
    """How a tree grows."""

    generations: int = 4
    wander: float = 0.35
    """Standard deviation of the heading along a long branch, radians."""
    branching: float = 0.7
    """Probability of each of the EVENTS possible side branches."""
    ratio: tuple[float, float] = (0.35, 0.85)
    """Range of a side branch's width relative to its parent."""
    taper: float = 0.15
    """Share of the width lost along a branch besides what side branches take."""
    shrink: float = 0.75
    """Length of a side branch relative to its parent, before a random factor."""
    min_width_px: float = 1.25
    major_width_px: float | None = None
    """With a value, branches that start wider stay above it, all others shrink to 1.4-2.45 px: a gap."""


@dataclass(frozen=True)
class Roots:
    """Where branches start. Every field has one value per branch, shape (P,)."""

    x: np.ndarray
    y: np.ndarray
    angle: np.ndarray
    width: np.ndarray
    length: np.ndarray
    bend: np.ndarray
    """Turning along the whole branch, radians."""


@dataclass(frozen=True)
class Tree:
    """Courses of all branches, parents before children; width 0 where a branch has ended."""

    x_PN: np.ndarray
    y_PN: np.ndarray
    width_PN: np.ndarray


@dataclass(frozen=True)
class Drawn:
    """A tree on the pixel grid."""

    coverage_HW: np.ndarray
    """Share of the pixel that vessels cover, float32 in [0, 1]."""
    width_HW: np.ndarray
    """Mean width of the vessels that cover the pixel, px at 512, float32; 0 where none does."""
    reflex_HW: np.ndarray
    """The inner third of vessels wider than 3 px, float32 in [0, 1]."""

    @property
    def mask_HW(self) -> np.ndarray:
        """Pixels covered by more than half."""
        return self.coverage_HW > 0.5


def grow(
    rng: np.random.Generator,
    roots: Roots,
    habit: Habit,
    room: Callable[[np.ndarray, np.ndarray], np.ndarray],
    max_area_px: float | None = None,
) -> Tree:
    """Grow a tree from its roots.

    Args:
        rng: source of all randomness.
        roots: starts of the first generation.
        habit: how it grows.
        room: (x, y) -> share of the width that a vessel keeps there, 0 to 1; a branch ends for good where it is 0.
        max_area_px: stop, in order of generations, where width times length exceeds this.

    Returns:
        The courses of all generations, parents first.
    """
    grown: list[Tree] = []
    for _ in range(habit.generations):
        tree, roots = _extend(rng, roots, habit, room)
        grown.append(tree)
        if not len(roots.x):
            break
    tree = Tree(*(np.concatenate([getattr(t, field) for t in grown]) for field in ("x_PN", "y_PN", "width_PN")))
    return tree if max_area_px is None else _thinned(tree, max_area_px)


def visible_area_px(tree: Tree) -> float:
    """Width times length, summed over what lies in the frame."""
    return float(_areas(tree).sum())


def draw(tree: Tree, size_px: int, reflex: bool = False) -> Drawn:
    """Rasterise a tree.

    Args:
        tree: courses in px at 512.
        size_px: side of the square image.
        reflex: draw the reflex too; without it that map is zero.

    Returns:
        Coverage, width and reflex maps of shape (size_px, size_px).
    """
    ink = _canvas(size_px, OVERSAMPLING)
    _paint(ink, tree, size_px / FRAME_PX * OVERSAMPLING)
    codes = np.asarray(ink.reduce(OVERSAMPLING), np.float32) / WIDTH_CODE
    coverage = reduced(np.asarray(ink) != 0, OVERSAMPLING)
    width = np.where(coverage > 0.02, codes / np.maximum(coverage, 0.02), 0).astype(np.float32)
    if not reflex:
        return Drawn(coverage, width, np.zeros_like(coverage))
    wide = np.where(tree.width_PN > 3, tree.width_PN * 0.33, 0)
    core = _canvas(size_px, 2)
    _paint(core, replace(tree, width_PN=wide), size_px / FRAME_PX * 2)
    return Drawn(coverage, width, reduced(np.asarray(core) != 0, 2))


def reduced(canvas_HW: np.ndarray, factor: int) -> np.ndarray:
    """Box-downsample a bool canvas to the covered share of each pixel, float32 in [0, 1]."""
    image = Image.fromarray(canvas_HW.view(np.uint8) * np.uint8(255))
    return np.asarray(image.reduce(factor), np.float32) * np.float32(1 / 255)


def _extend(rng: np.random.Generator, roots: Roots, habit: Habit, room: Callable) -> tuple[Tree, Roots]:
    """One generation: the courses from the roots, and the roots of the next generation."""
    count = len(roots.x)
    along = np.linspace(0, 1, POINTS)
    at = np.sort(rng.uniform(0.1, 0.95, (count, EVENTS)), 1)
    at[:, -1] = 1.0
    index = np.rint(at * (POINTS - 1)).astype(int)
    ratio = rng.uniform(*habit.ratio, (count, EVENTS)) * (rng.random((count, EVENTS)) < habit.branching)
    side = rng.choice((-1.0, 1.0), (count, 1)) * np.where(rng.random((count, EVENTS)) < 0.75, (1, -1, 1, -1, 1), -1)
    passed = index[:, :, None] < np.arange(POINTS)  # P E N
    # Murray: the cubes of the widths add up at a fork.
    left_over = np.where(passed, np.cbrt(1 - ratio**3)[:, :, None], 1.0).prod(1)
    width = roots.width[:, None] * left_over * (1 - habit.taper * along)
    turns = np.where(passed, (-0.45 * side * ratio**2)[:, :, None], 0.0).sum(1) @ _BLUR
    heading = _headings(rng, roots, habit) + turns
    step = (roots.length / (POINTS - 1))[:, None]
    x = roots.x[:, None] + np.cumsum(np.cos(heading) * step, 1) - np.cos(heading[:, :1]) * step
    y = roots.y[:, None] + np.cumsum(np.sin(heading) * step, 1) - np.sin(heading[:, :1]) * step
    width = width * np.minimum.accumulate(room(x, y), 1)
    alive = np.logical_and.accumulate(width >= habit.min_width_px, 1)
    shown = width if habit.major_width_px is None else _parted(width, habit.major_width_px, along)
    tree = Tree(x, y, np.where(alive, shown, 0.0))
    return tree, _side_branches(rng, roots, habit, (x, y, heading, width, alive), (index, ratio, side))


def _headings(rng: np.random.Generator, roots: Roots, habit: Habit) -> np.ndarray:
    """Headings along the branches, radians, shape (P, N): a smooth random walk around a steady bend."""
    coarse = rng.standard_normal((len(roots.x), POINTS)) @ _SMOOTH_COARSE
    fine = rng.standard_normal((len(roots.x), POINTS)) @ _SMOOTH_FINE
    # Short branches have short steps: the same wiggle in radians would look like noise.
    reach = np.minimum(1, roots.length / 160)[:, None]
    walk = habit.wander * (coarse * (0.5 + 0.5 * reach) + 0.6 * fine * reach)
    return roots.angle[:, None] + walk - walk[:, :1] + roots.bend[:, None] * np.linspace(0, 1, POINTS)


def _side_branches(rng: np.random.Generator, roots: Roots, habit: Habit, course: tuple, forks: tuple) -> Roots:
    """The roots of the next generation, at the forks that the parents reached."""
    (x, y, heading, width, alive), (index, ratio, side) = course, forks
    parent = np.broadcast_to(np.arange(len(roots.x))[:, None], index.shape)
    before = np.maximum(index - 1, 0)  # the width the fork divides
    child_width = ratio * width[parent, before]
    spread = np.where(index == POINTS - 1, 0.35, 1.0)  # a fork at the end goes on rather than off
    angle = heading[parent, index] + spread * side * (rng.normal(0.95, 0.2, index.shape) - 0.5 * ratio)
    length = roots.length[:, None] * habit.shrink * (0.45 + 0.65 * ratio) * rng.uniform(0.6, 1.25, index.shape)
    bend = -0.5 * side * rng.uniform(0, 1.2, index.shape)
    keep = (child_width >= habit.min_width_px) & alive[parent, index] & (length > 10)
    return Roots(
        x[parent, index][keep], y[parent, index][keep], angle[keep], child_width[keep], length[keep], bend[keep]
    )


def _parted(width_PN: np.ndarray, major_px: float, along_N: np.ndarray) -> np.ndarray:
    """Move widths to either side of a gap, by the width each branch starts with."""
    major = width_PN[:, :1] >= major_px
    closing = np.clip((1 - along_N) / 0.08, 0.45, 1)  # a major branch must not end bluntly
    return np.where(major, np.maximum(width_PN, major_px) * closing, np.minimum(1.4 + 0.3 * width_PN, 2.45))


def _thinned(tree: Tree, max_area_px: float) -> Tree:
    """Cut a tree off where its area, summed over branches in order, reaches the limit."""
    area = np.cumsum(_areas(tree)).reshape(tree.width_PN.shape)
    return replace(tree, width_PN=np.where(area <= max_area_px, tree.width_PN, 0.0))


def _areas(tree: Tree) -> np.ndarray:
    """Visible area of each step of each branch, shape (P, N)."""
    step = np.hypot(np.diff(tree.x_PN[:, :2], axis=1), np.diff(tree.y_PN[:, :2], axis=1))
    visible = (np.minimum(tree.x_PN, tree.y_PN) >= 0) & (np.maximum(tree.x_PN, tree.y_PN) < FRAME_PX)
    return np.where(visible, tree.width_PN * step, 0)


def _canvas(size_px: int, factor: int) -> Image.Image:
    return Image.new("L", (size_px * factor, size_px * factor))


def _paint(canvas: Image.Image, tree: Tree, scale: float) -> None:
    """Draw all branches as short tapering polygons whose grey level is their width, widest last."""
    jobs = []
    step = np.hypot(tree.x_PN[:, 1] - tree.x_PN[:, 0], tree.y_PN[:, 1] - tree.y_PN[:, 0])
    stride_P = 2 ** np.clip(np.ceil(np.log2(2.2 / np.maximum(step, 0.01))), 0, 3).astype(int)
    for stride in (1, 2, 4, 8):
        jobs += _polygons(tree, np.flatnonzero(stride_P == stride), stride, scale)
    pen = ImageDraw.Draw(canvas)
    for code, outline in sorted(jobs, key=lambda job: job[0]):
        pen.polygon(outline, fill=code)


def _polygons(tree: Tree, chosen_P: np.ndarray, stride: int, scale: float) -> list[tuple[int, list[float]]]:
    """(grey level, flat outline) of every visible stretch of 8 steps of the chosen branches."""
    x, y, width = (a[chosen_P, ::stride] for a in (tree.x_PN, tree.y_PN, tree.width_PN))
    dx, dy = np.gradient(x, axis=1), np.gradient(y, axis=1)
    norm = np.maximum(np.hypot(dx, dy), 1e-9)
    # PIL fills the outline's own pixels too, which adds one canvas pixel to every width.
    half = np.maximum(width * scale - 1, 0) / 2
    offset_x, offset_y = -dy / norm * half, dx / norm * half
    left = np.stack((x * scale + offset_x, y * scale + offset_y), -1)  # P N 2
    right = np.stack((x * scale - offset_x, y * scale - offset_y), -1)
    jobs = []
    for start in range(0, x.shape[1] - 1, 8):
        piece = slice(start, start + 9)
        length = (width[:, piece] > 0).cumprod(1).sum(1)
        mean = width[:, piece].sum(1) / np.maximum(length, 1)
        for p in np.flatnonzero(length > 1):
            end = start + length[p]
            outline = np.concatenate((left[p, start:end], right[p, start:end][::-1]))
            jobs.append((max(1, min(255, round(mean[p] * WIDTH_CODE))), outline.ravel().tolist()))
    return jobs


def _smoother(sigma_points: float) -> np.ndarray:
    """Matrix (N, N) that smooths white noise along a branch to unit variance."""
    distance = np.arange(POINTS)[:, None] - np.arange(POINTS)
    kernel = np.exp(-0.5 * (distance / sigma_points) ** 2)
    return kernel / np.sqrt((kernel**2).sum(0))


_SMOOTH_COARSE = _smoother(11.0)
_SMOOTH_FINE = _smoother(2.6)
_BLUR = _smoother(2.0) / _smoother(2.0).sum(0)
