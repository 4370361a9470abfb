"""The pictures of a sweep: learning curves, parallel coordinates, importance, Dice against cost, device time.

Takes the records of a sweep, gives matplotlib figures and PNGs of them; the one file that imports matplotlib. Without
pyplot, so no figure outlives its use, and no matplotlibrc changes how they look. Computes no score: importance.py and
tally.py did.
"""

import functools
import io
import statistics
import textwrap
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.ticker import FixedLocator, MaxNLocator
from PIL import Image

from tune.importance import METHOD, Importance
from tune.scales import MISSING, Scale, finite, scale
from tune.space import Space
from tune.tally import best_trial, costs, dice_of, measured, rungs, saved, seed_trial, unit_of
from tune.trials import Sweep, Trial

# Okabe and Ito's colours, apart for every reader; what they tell is told by a line style or marker too.
BEST, SEED, FAILED, SAVED, REPEAT = "#0072B2", "#D55E00", "#AA4499", "#F0C36D", "#56B4E9"
INK, FAINT, GRID, OTHERS = "#20242a", "#6a7078", "#dfe3e7", "#868e96"
DICE_COLOURS = ListedColormap(colormaps["YlGnBu"](np.linspace(0.3, 1, 64)))  # dark is good: pale vanishes on white
MARKS = {
    "finished": {"marker": "o", "color": OTHERS},
    "stopped": {"marker": "o", "color": "#c3c8ce"},
    "failed": {"marker": "x", "color": FAILED},
    "unfinished": {"marker": ">", "color": INK},
}
DPI, WIDE_IN, HALF_IN = 130, 10.0, 6.4
CROWD = 40
"""More trials than this are drawn thinner and fainter."""
BAND = 0.05
"""Width of the band into which lines through one choice are spread, on an axis of length 1."""
CHINESE = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Microsoft YaHei")
"""For letters that DejaVu Sans, which comes with matplotlib, lacks; where they are installed."""
LOOK = {
    "font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT,
    "axes.labelcolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT, "text.color": INK, "grid.color": GRID,
    "axes.axisbelow": True, "legend.frameon": False, "figure.dpi": DPI, 
    "axes.titlelocation": "left", "axes.titlesize": 11.5, "axes.titleweight": "bold", "text.parse_math": False,
}  # fmt: skip


def _in_our_look(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @functools.wraps(draw)
    def drawn(*arguments, **named) -> Figure:
        fonts = ["DejaVu Sans", *(name for name in CHINESE if name in get_font_names())]
        with style.context(["default", LOOK, {"font.family": fonts}]):
            return draw(*arguments, **named)

    return drawn


@_in_our_look
def learning_curves(sweep: Sweep, trials: Sequence[Trial]) -> Figure:
    """Dice of each validated epoch, a line per trial; what was stopped is faint and ends where it was stopped."""
    figure, axes = _axes("Validation Dice of every trial", (WIDE_IN, 5.0))
    drawn, best, seed = measured(trials), best_trial(trials), seed_trial(trials)
    if best is None:
        return _nothing(axes)
    for number, epoch in enumerate(rungs(sweep)):
        axes.axvline(epoch, color=FAINT, linewidth=1, linestyle=":", zorder=0, label="" if number else "rungs of ASHA")
    thin = 0.6 if len(drawn) > CROWD else 1.0
    for trial in drawn:
        if trial not in (best, seed):
            alpha = thin * (0.35 if trial.status == "stopped" else 0.8)
            axes.plot(*_curve(trial), color=OTHERS, linewidth=1.3 * thin, alpha=alpha, zorder=2)
    _mark(axes, drawn, {trial.number: tuple(values[-1] for values in _curve(trial)) for trial in drawn}, 20 * thin)
    if seed in drawn and seed is not best:
        axes.plot(*_curve(seed), "s--", color=SEED, linewidth=2, markersize=4, zorder=4, label=_seed_label(seed))
    axes.plot(*_curve(best), "o-", color=BEST, linewidth=2.8, markersize=5, zorder=5, label=_best_label(best, seed))
    axes.set_xlabel("epoch")
    axes.set_ylabel("Dice")
    margin = max(0.01 * sweep.num_epochs, 0.1)
    axes.set_xlim(1 - margin, sweep.num_epochs + margin)
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True, steps=[1, 2, 5, 10]))
    late = np.nanquantile(_curve(best)[1], 0.15, method="lower")  # of the best trial all but the first epochs is seen
    _cut_below(axes, min(_floor(drawn, seed), late), [dice for trial in drawn for dice in _curve(trial)[1]])
    axes.grid(axis="y")
    return _with_legend(figure, 4)


@_in_our_look
def parallel_coordinates(space: Space, trials: Sequence[Trial]) -> Figure:
    """A line per trial through its parameters, each on its own axis, to its Dice, which colours it.

    A missing value leaves a gap. A trial without a Dice is grey and ends at its last parameter.
    """
    shown = [trial for trial in trials if not trial.is_repeat]
    scales = [scale(axis, (trial.params.get(axis.name, MISSING) for trial in shown)) for axis in space.axes]
    figure, axes = _axes("Parameters and Dice", (max(WIDE_IN, 1.25 * (len(scales) + 1)), 5.2))
    if (best := best_trial(trials)) is None:
        return _nothing(axes)
    floor = _floor(measured(trials), seed_trial(trials))
    dice_scale = Scale("Dice", "linear", floor, dice_of(best), (), ())
    spread = _spread(scales, shown)
    for trial in sorted(shown, key=lambda trial: (dice_of(trial) or 0.0, -trial.number)):
        places = [
            _place(one, trial.params.get(one.name, MISSING), spread.get((one.name, trial.number), 0.0))
            for one in scales
        ]
        places.append(np.nan if dice_of(trial) is None else _place(dice_scale, max(dice_of(trial), floor)))
        axes.plot(places, marker="o", markersize=2.5, **_line_look(trial, trials, dice_scale))
    for index, one in enumerate([*scales, dice_scale]):
        ticks = one.ticks()
        if one is dice_scale and min(dice_of(trial) for trial in measured(trials)) < floor:
            ticks = [(0.0, f"≤ {floor:.3g}"), *(tick for tick in ticks if tick[0] > BAND)]
        _draw_axis(axes, index, one.name, ticks, 1 if one is dice_scale else -1)
    axes.set_xlim(-0.6, len(scales) + 0.4)
    axes.set_ylim(-BAND, 1 + BAND)
    axes.axis("off")
    return _with_legend(figure, 3)


@_in_our_look
def importance_bars(importance: Importance | None, why: str) -> Figure:
    """A bar per parameter with its spread, or the sentence that says why there is none."""
    count = len(importance.means) if importance else 1
    figure, axes = _axes("Importance of each parameter", (HALF_IN, 1.7 + 0.36 * count))
    if importance is None:
        return _nothing(axes, why)
    spreads = [importance.spreads[name] for name in importance.means]
    axes.barh(range(count), importance.means.values(), xerr=spreads, height=0.6, color=BEST, ecolor=INK, capsize=3)
    axes.set_yticks(range(count), [_short(name, 30) for name in importance.means], color=INK)
    axes.invert_yaxis()
    axes.axvline(0, color=FAINT, linewidth=0.8)
    below = f"lost out-of-bag R²; the forest's own: {importance.r2:.2f}\n{METHOD}, {importance.trials} trials"
    axes.set_xlabel("\n".join([below, *textwrap.wrap(importance.warning, 60)]))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.grid(axis="x")
    return figure


@_in_our_look
def dice_against_cost(sweep: Sweep, trials: Sequence[Trial]) -> Figure:
    """Best Dice of each trial over its device time; the grey steps join those that no cheaper trial beats."""
    figure, axes = _axes("Dice against cost", (HALF_IN, 4.6))
    drawn, best, seed = measured(trials), best_trial(trials), seed_trial(trials)
    if best is None:
        return _nothing(axes)
    used = costs(sweep, drawn)
    unit = unit_of(sweep, max(cost.used_s for cost in used.values()))
    points = {trial.number: (used[trial.number].used_s / unit.seconds, dice_of(trial)) for trial in drawn}
    times, dices = zip(*sorted(points.values()), strict=True)
    axes.step(times, np.maximum.accumulate(dices), where="post", color=FAINT, alpha=0.5, linewidth=1.2, zorder=1)
    _mark(axes, [trial for trial in drawn if trial not in (best, seed)], points, 30)
    if seed in drawn and seed is not best:
        axes.scatter(*points[seed.number], marker="s", s=60, color=SEED, zorder=4, label=_seed_label(seed))
    axes.scatter(*points[best.number], marker="*", s=190, color=BEST, zorder=5, label=_best_label(best, seed))
    axes.set_xlabel(unit.name)
    axes.set_ylabel("Dice")
    axes.set_xlim(0, 1.05 * max(times) or 1)
    _cut_below(axes, _floor(drawn, seed), dices)
    axes.grid()
    return _with_legend(figure, 2)


@_in_our_look
def device_time(sweep: Sweep, trials: Sequence[Trial]) -> Figure:
    """Device time of each trial, and above it what its stopping spared."""
    figure, axes = _axes("\n".join(textwrap.wrap(saved(sweep, trials), 104)), (WIDE_IN, 3.8))
    if not trials:
        return _nothing(axes)
    found = costs(sweep, trials)
    unit = unit_of(sweep, max(cost.used_s + cost.saved_s for cost in found.values()))
    numbers = [trial.number for trial in trials]
    used = np.array([found[number].used_s for number in numbers]) / unit.seconds
    spared = np.array([found[number].saved_s for number in numbers]) / unit.seconds
    kinds = np.array([_kind(trial) for trial in trials])
    bars = [
        (label, colour, np.where(kinds == label, used, 0), 0)
        for label, colour in (("used", BEST), ("used by repeats", REPEAT), ("used, then failed", FAILED))
    ]
    for label, colour, heights, bottom in [*bars, ("saved by early stopping (estimate)", SAVED, spared, used)]:
        if heights.any():
            axes.bar(numbers, heights, bottom=bottom, color=colour, label=label)
    axes.set_xlim(min(numbers) - 0.6, max(max(numbers), min(numbers) + 9) + 0.6)
    axes.xaxis.set_major_locator(
        FixedLocator(numbers) if len(numbers) <= 20 else MaxNLocator(20, integer=True, steps=[1, 2, 5, 10])
    )
    axes.set_xlabel("trial")
    axes.set_ylabel(unit.name)
    axes.grid(axis="y")
    return _with_legend(figure, 4)


def png(figure: Figure) -> bytes:
    """A figure as PNG of 256 colours, a third of the size of all; the same figure gives the same bytes."""
    canvas, file = FigureCanvasAgg(figure), io.BytesIO()
    with style.context(["default", LOOK]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a box stands for a letter that no font has
        canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(file, "PNG")
    return file.getvalue()


def draw_all(
    sweep: Sweep, space: Space, trials: Sequence[Trial], importance: Importance | None, why: str
) -> dict[str, bytes]:
    """Name of a picture -> its PNG, in the order in which they are read."""
    figures = {
        "learning_curves": lambda: learning_curves(sweep, trials),
        "parallel_coordinates": lambda: parallel_coordinates(space, trials),
        "importance": lambda: importance_bars(importance, why),
        "dice_against_cost": lambda: dice_against_cost(sweep, trials),
        "device_time": lambda: device_time(sweep, trials),
    }
    return {name: png(draw()) for name, draw in figures.items()}


def _axes(title: str, size_in: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(size_in, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def _nothing(axes: Axes, text: str = "No trial has a Dice yet.") -> Figure:
    axes.axis("off")
    axes.figure.set_figheight(1.8)
    axes.text(0.5, 0.5, "\n".join(textwrap.wrap(text, 60)), ha="center", va="center", color=FAINT)
    return axes.figure


def _with_legend(figure: Figure, columns: int) -> Figure:
    """The legend stands below the axes, where it hides nothing."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=columns, fontsize=9.5)
    return figure


def _mark(axes: Axes, trials: Sequence[Trial], points: dict[int, tuple[float, float]], size: float) -> None:
    for status, look in MARKS.items():
        if found := [points[trial.number] for trial in trials if trial.status == status]:
            axes.scatter(*zip(*found, strict=True), s=size, zorder=3, label=status, linewidths=1.2, **look)


def _curve(trial: Trial) -> tuple[list[int], list[float]]:
    """Epochs and Dice; a Dice that is no number leaves a gap."""
    return [row["epoch"] for row in trial.rows], [_or_nan(row.get("dice")) for row in trial.rows]


def _best_label(best: Trial, seed: Trial | None) -> str:
    return f"best: {'seed setting, ' if best is seed else ''}trial {best.number}, {dice_of(best):.4f}"


def _seed_label(seed: Trial) -> str:
    return f"seed setting: trial {seed.number}" + (f", {dice:.4f}" if (dice := dice_of(seed)) is not None else "")


def _line_look(trial: Trial, trials: Sequence[Trial], dice_scale: Scale) -> dict:
    """How a trial's line through the parameters is drawn."""
    best, seed, dice = best_trial(trials), seed_trial(trials), dice_of(trial)
    if trial == best:
        return {"color": BEST, "linewidth": 3.5, "zorder": 5, "label": _best_label(best, seed)}
    if trial == seed:
        return {"color": SEED, "linewidth": 2, "linestyle": "--", "zorder": 4, "label": _seed_label(seed)}
    width = 0.8 if len(trials) > CROWD else 1.3
    if dice is None:
        first = trial.number == min(one.number for one in trials if not one.is_repeat and dice_of(one) is None)
        label = {"label": "without a Dice"} if first else {}
        return {"color": FAINT, "linewidth": width, "linestyle": ":", "zorder": 1} | label
    place = dice_scale.place(max(dice, dice_scale.low))
    return {"color": DICE_COLOURS(place), "linewidth": width, "zorder": 2, "alpha": 0.4 + 0.6 * place}


def _place(one: Scale, value: object, offset: float = 0.0) -> float:
    return np.nan if (place := one.place(value)) is None else place + offset


def _spread(scales: Sequence[Scale], trials: Sequence[Trial]) -> dict[tuple[str, int], float]:
    """Small offsets, so that lines through one choice lie side by side: (parameter, trial) -> offset, by Dice."""
    offsets = {}
    for one in scales:
        groups: dict[float, list[Trial]] = {}
        for trial in trials if one.choices else ():
            if (place := one.place(trial.params.get(one.name, MISSING))) is not None:
                groups.setdefault(place, []).append(trial)
        for group in groups.values():
            group.sort(key=lambda trial: (dice_of(trial) or 0.0, trial.number))
            width = min(BAND, 0.012 * (len(group) - 1))
            places = np.linspace(-width / 2, width / 2, len(group)) if len(group) > 1 else [0.0]
            offsets |= {(one.name, trial.number): offset for trial, offset in zip(group, places, strict=True)}
    return offsets


def _draw_axis(axes: Axes, index: int, name: str, ticks: Sequence[tuple[float, str]], side: int) -> None:
    axes.plot([index, index], [0, 1], color=INK, linewidth=1, zorder=3)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    look = {"ha": "right" if side < 0 else "left", "va": "center", "fontsize": 9, "bbox": box, "zorder": 6}
    for place, text in ticks:
        axes.plot([index, index + 0.03 * side], [place, place], color=INK, linewidth=1, zorder=6)
        axes.text(index + 0.05 * side, place, _short(text, 16), **look)
    lines = textwrap.wrap(name.replace("_", "_ "), 13)
    axes.text(index, -0.06, "\n".join(lines).replace("_ ", "_"), ha="center", va="top", fontsize=9.5)


def _floor(trials: Sequence[Trial], seed: Trial | None) -> float:
    """Where an axis of Dice begins: at the lowest, unless a few trials that went wrong would flatten all others."""
    dices = [dice_of(trial) for trial in trials]
    top, middle = max(dices), statistics.median(dices)
    floor = max(min(dices), top - 3 * (top - middle)) if middle < top else min(dices)
    return min(floor, dice_of(seed)) if seed in trials else floor


def _cut_below(axes: Axes, floor: float, values: Sequence[float]) -> None:
    """Limits of an axis of Dice; says so where values lie below it."""
    known = [value for value in values if not np.isnan(value)]
    margin = (max(known) - floor) / 20 or 0.01
    axes.set_ylim(floor - margin, max(known) + margin)
    if below := sum(value < floor - margin for value in known):
        text = f"{below} of {len(known)} values lie below, down to {min(known):.3f}"
        axes.text(0.995, 0.015, text, transform=axes.transAxes, ha="right", color=FAINT, fontsize=9)


def _kind(trial: Trial) -> str:
    if trial.status == "failed":
        return "used, then failed"
    return "used by repeats" if trial.is_repeat else "used"


def _or_nan(value: object) -> float:
    return np.nan if (number := finite(value)) is None else number


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
