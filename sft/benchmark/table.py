"""The figures of a benchmark for a reader: an aligned table with units and targets, and a bar chart.

Takes the dictionary of `measure`; gives text and a PNG. Draws with Pillow alone, in its own font.
"""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT_INK = (255, 255, 255), (32, 36, 42), (110, 116, 124)
PLAIN, OURS, BARE = (217, 72, 15), (31, 111, 235), (134, 142, 150)
WIDTH_PX, BAR_PX, MARGIN_PX, FONT_PX = 1000, 34, 24, 18
UNSTEADY = 0.25  # distance of the quartiles, in medians, from which on a figure is marked
SHOWN_KERNELS, SHOWN_CHARACTERS = 15, 60  # of a profile; the JSON has more
TARGET_SHAPE, TARGET_IMAGE = "4b", "512x512"
# On one H200: what a row is to reach at a batch size (None: at any).
_AT_MOST = {("ms_per_sample", 1): 60.0, ("ms_per_sample", 8): 13.0, ("ms_per_sample", 32): 9.5}
_AT_MOST |= {("deepspeed_overhead", None): 0.05, ("start_s", None): 60.0, ("data_share", None): 0.02}
_AT_LEAST = {("times_plain", 1): 6.0, ("times_plain", 32): 40.0, ("mfu", 32): 0.5, ("fill_images_per_s", None): 90.0}
_AT_LEAST |= {("scaling", None): 1.9}  # of two ranks

Line = tuple[str, str, str, str]


def table(figures: dict) -> str:
    """One line a figure: what, value, unit, target; the count of operations in words below."""
    lines = [("", "value", "unit", "target"), *_lines(figures)]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    text = [
        "  ".join((line[0].ljust(widths[0]), line[1].rjust(widths[1]), line[2].ljust(widths[2]), line[3])).rstrip()
        for line in lines
    ]
    head = f"{figures['shape']} | {figures['image']} | {figures['ranks']} x {figures['device']} | {figures['date']}"
    return "\n".join([head, *text, "", *_explained(figures)])


def picture(path: Path, figures: dict) -> None:
    """A PNG with one bar a loop and batch size: milliseconds per sample, shorter is better.

    The bars are to scale; each has its figure.
    """
    bars = _bars(figures)
    font = ImageFont.load_default(FONT_PX)
    height_px = 2 * MARGIN_PX + (len(bars) + 1) * (BAR_PX + 10) + 10
    canvas = Image.new("RGB", (WIDTH_PX, height_px), PAPER)
    draw = ImageDraw.Draw(canvas)
    title = f"ms per sample, {figures['shape']} shape, {figures['image']} image, {figures['device']}"
    draw.text((MARGIN_PX, MARGIN_PX), title, INK, font)
    left_px = MARGIN_PX + round(max(draw.textlength(name, font) for name, _, _ in bars)) + 14
    room_px = WIDTH_PX - left_px - MARGIN_PX - 200  # the figures stand behind the bars
    longest = max(value for _, value, _ in bars)
    slowest = figures.get("plain", {}).get("ms_per_sample")
    for number, (name, value, colour) in enumerate(bars, start=1):
        top_px = MARGIN_PX + number * (BAR_PX + 10)
        middle_px = top_px + BAR_PX // 2
        right_px = left_px + max(2, round(room_px * value / longest))
        draw.text((MARGIN_PX, middle_px), name, INK, font, anchor="lm")
        draw.rectangle((left_px, top_px, right_px, top_px + BAR_PX), fill=colour)
        factor = f"  ({slowest / value:.1f}x)" if slowest and value < slowest else ""
        draw.text((right_px + 8, middle_px), f"{value:.1f} ms{factor}", FAINT_INK, font, anchor="lm")
    canvas.save(path)


def targets(shape: str, image: str) -> list[dict]:
    """What figures are to reach: "figure", "batch_size" (None: at any), and "at_most" or "at_least"."""
    if (shape, image) != (TARGET_SHAPE, TARGET_IMAGE):
        return []
    return [
        {"figure": figure, "batch_size": batch, side: value}
        for side, limits in (("at_most", _AT_MOST), ("at_least", _AT_LEAST))
        for (figure, batch), value in limits.items()
    ]


def _bars(figures: dict) -> list[tuple[str, float, tuple[int, int, int]]]:
    bars = [("plain loop, batch 1", figures["plain"]["ms_per_sample"], PLAIN)] if "plain" in figures else []
    for row in figures["ours"]:
        bars.append((f"ours, batch {row['batch_size']}", row["ms_per_sample"], OURS))
        if "bare" in row:
            bars.append((f"bare torch, batch {row['batch_size']}", row["bare"]["ms_per_sample"], BARE))
    return bars


def _lines(figures: dict) -> Iterator[Line]:
    if "plain" in figures:
        yield from _step_lines("plain loop, batch 1", figures["plain"])
    for row in figures["ours"]:
        batch, name = row["batch_size"], f"ours, batch {row['batch_size']}"
        yield from _step_lines(name, row, _target(figures, "ms_per_sample", batch, "ms"))
        if "times_plain" in row:
            target = _target(figures, "times_plain", batch, "x")
            unit = f"x{_unsteady(row) or _unsteady(figures['plain'])}"
            yield f"{name}: against the plain loop", f"{row['times_plain']:.1f}", unit, target
        target = _target(figures, "data_share", batch)
        yield f"{name}: waiting for data", f"{100 * row['data_share']:.1f}", "% of the step", target
        target = _target(figures, "mfu", batch, "")
        yield f"{name}: MFU of the step", f"{row['mfu']:.3f}", f"of {row['peak_tflops']:.4g} TFLOP/s measured", target
        if "bare" in row:
            yield from _step_lines(f"bare torch, batch {batch}", row["bare"])
            overhead, target = row["deepspeed_overhead"], _target(figures, "deepspeed_overhead", batch, "")
            unit = f"% of the step{_unsteady(row['around_bare']) or _unsteady(row['bare'])}"
            yield f"DeepSpeed against bare torch, batch {batch}", f"{100 * overhead:+.1f}", unit, target
        for part, times in row.get("parts", {}).items():
            yield f"  part at batch {batch}: {part}", f"{times['step_ms']:.2f}", _spread(times), ""
        yield from _profile_lines(f"batch {batch}", row.get("profile", {"kernels": []}))
    unit = f"images/s, of {figures['fill_images']} images"
    yield "filling features", f"{figures['fill_images_per_s']:.1f}", unit, _target(figures, "fill_images_per_s")
    if "write_s" in figures:
        yield "  then until they are on the disk", f"{figures['write_s']:.1f}", "s, in a run beside its first steps", ""
    yield from _profile_lines("filling", figures.get("fill_profile", {"kernels": []}), "filling")
    yield "start to the end of the first step", f"{figures['start_s']:.1f}", "s", _target(figures, "start_s", unit="s")
    for part, seconds in figures.get("start_parts_s", {}).items():
        yield f"  of it {part}", f"{seconds:.1f}", "s", ""
    for row in figures.get("scaling", []):
        target = _target(figures, "scaling") if figures["ranks"] == 2 else ""
        name = f"{figures['ranks']} ranks against one, batch {row['batch_size']} each"
        yield name, f"{row['factor']:.2f}", "x samples/s", target


def _profile_lines(name: str, profile: dict, once: str = "step") -> Iterator[Line]:
    if "idle_share" in profile:
        yield f"no kernel runs, {name}", f"{100 * profile['idle_share']:.1f}", f"% of the profiled {once}s", ""
    for kernel in profile["kernels"][:SHOWN_KERNELS]:
        calls = f"ms, {kernel['calls']:.0f} calls a {once}, {100 * kernel['share']:.1f} % of all"
        yield f"  kernel at {name}: {kernel['name'][:SHOWN_CHARACTERS]}", f"{kernel['ms']:.3f}", calls, ""


def _step_lines(name: str, row: dict, target: str = "") -> Iterator[Line]:
    yield f"{name}: per sample", f"{row['ms_per_sample']:.2f}", "ms", target
    yield f"{name}: step", f"{row['step_ms']:.2f}", _spread(row), ""
    yield f"{name}: rate", f"{row['samples_per_s']:.2f}", "samples/s", ""
    if "peak_gib" in row:
        yield f"{name}: most GPU memory", f"{row['peak_gib']:.2f}", "GiB", ""
    if "host_peak_gib" in row:
        yield f"{name}: most host memory", f"{row['host_peak_gib']:.2f}", "GiB, of the whole process so far", ""


def _spread(row: dict) -> str:
    return f"ms, median of {row['steps']:.0f} (quartiles {row['step_ms_quartiles']:.2f} apart){_unsteady(row)}"


def _unsteady(row: dict) -> str:
    """A remark on steps so unequal that something else was using the machine."""
    return " UNSTEADY: is the machine busy?" if row["step_ms_quartiles"] > UNSTEADY * row["step_ms"] else ""


def _target(figures: dict, key: str, batch: int | None = None, unit: str = "") -> str:
    for target in targets(figures["shape"], figures["image"]):
        if target["figure"] == key and target["batch_size"] in (batch, None):
            side, value = list(target.items())[-1]
            return f"{side.replace('_', ' ')} {value:g} {unit}".rstrip()
    return ""


def _explained(figures: dict) -> Iterator[str]:
    row = figures["ours"][-1]
    yield f"Operations of a step at batch {row['batch_size']}, {row['tokens']} tokens a sample, in 10^9:"
    for name, value in row["operations"].items():
        yield f"  {name} {value / 1e9:.4g} = {figures['formula'][name]}"
    peak = figures["peak_in_words"]
    yield f"MFU: their sum by the seconds of the whole step, by {row['peak_tflops']:.4g} TFLOP/s: {peak}"
    yield row["pace"]
