"""Line charts as inline SVG: text that a browser draws, with no library and no network.

Takes series of (x, y) points; gives one <svg> element as a string. Points without a number are left out.
"""

import html
import math
from collections.abc import Callable, Sequence

COLOURS = ("#1f6feb", "#d9480f", "#2b8a3e", "#9c36b5", "#868e96")
WIDTH_PX, HEIGHT_PX = 520, 270
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 58, 14, 34, 40
MOST_POINTS = 300
"""More points than this are averaged in groups: a chart is 450 pixels wide."""

Points = Sequence[tuple[float, float | None]]


def line_chart(title: str, series: dict[str, Points], x_label: str, log_y: bool = False) -> str:
    """One chart with its title, axes and legend.

    Args:
        title: stands above.
        series: name -> points, ascending in x; y may be None.
        x_label: stands below.
        log_y: logarithmic y axis; points at or below 0 are left out.

    Returns:
        An <svg> element; with no point at all one that says so.
    """
    drawn = {name: _thin([point for point in points if _drawable(point[1], log_y)]) for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    body = _plot(drawn, log_y) if drawn else _text(WIDTH_PX / 2, HEIGHT_PX / 2, "no figures yet", "middle")
    return (
        f'<svg viewBox="0 0 {WIDTH_PX} {HEIGHT_PX}" role="img" aria-label="{html.escape(title)}">'
        f"{_text(LEFT_PX, 14, title, 'start', 'title')}"
        f"{_text((LEFT_PX + WIDTH_PX - RIGHT_PX) / 2, HEIGHT_PX - 6, x_label, 'middle')}{body}</svg>"
    )


def _drawable(y: float | None, log_y: bool) -> bool:
    return y is not None and math.isfinite(y) and (y > 0 or not log_y)


def _thin(points: Points) -> Points:
    group = math.ceil(len(points) / MOST_POINTS)
    chunks = [points[start : start + group] for start in range(0, len(points), group or 1)]
    return [(sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def _plot(drawn: dict[str, Points], log_y: bool) -> str:
    last_x = max(x for points in drawn.values() for x, _ in points)
    ys = [y for points in drawn.values() for _, y in points]
    y_ticks = _log_ticks(min(ys), max(ys)) if log_y else _ticks(min(ys), max(ys))
    x_at = _scale(0, last_x or 1, LEFT_PX, WIDTH_PX - RIGHT_PX)
    y_at = _scale(y_ticks[0], y_ticks[-1], HEIGHT_PX - BOTTOM_PX, TOP_PX, log_y)
    parts = [f'<path class="grid" d="M{LEFT_PX} {y_at(y):.1f}H{WIDTH_PX - RIGHT_PX}"/>' for y in y_ticks]
    parts += [_text(LEFT_PX - 6, y_at(y) + 4, f"{y:g}", "end") for y in y_ticks]
    parts += [_text(x_at(x), HEIGHT_PX - BOTTOM_PX + 15, f"{x:g}", "middle") for x in _ticks(0, last_x) if x <= last_x]
    legend = []
    for (name, points), colour in zip(drawn.items(), COLOURS, strict=False):
        path = "L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in points)
        parts.append(f'<path class="line" stroke="{colour}" d="M{path}"/>')
        if len(points) <= 40:
            parts += [f'<circle cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="2.5" fill="{colour}"/>' for x, y in points]
        legend.append(f'<tspan dx="12" style="fill:{colour}">{html.escape(name)}</tspan>')
    return "".join(parts) + f'<text x="{WIDTH_PX - RIGHT_PX}" y="14" text-anchor="end">{"".join(legend)}</text>'


def _scale(low: float, high: float, low_px: float, high_px: float, log: bool = False) -> Callable[[float], float]:
    if log:
        low, high = math.log10(low), math.log10(high)
    return lambda value: low_px + ((math.log10(value) if log else value) - low) / (high - low) * (high_px - low_px)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose low and high."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / 5))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor >= span / 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, or 1-2-5 steps within a few of them, that enclose low and high."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 2) for factor in factors]
    lowest = max(index for index, tick in enumerate(ticks) if tick <= low)
    highest = min(index for index, tick in enumerate(ticks) if tick >= high)
    return ticks[lowest : max(highest, lowest + 1) + 1]


def _text(x: float, y: float, text: str, anchor: str, css: str = "") -> str:
    look = f' class="{css}"' if css else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{look}>{html.escape(text)}</text>'
