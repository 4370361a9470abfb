"""The comparison picture: image, truth, base and tuned side by side, one row per image.

Takes images, masks and binary predictions at their native size; gives a PNG. Draws with Pillow alone, in its own font.
Knows nothing of the model, of thresholds or of how the rows were chosen.

Shapes: H x W pixels, 3 = RGB.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from sft.metrics import dice

# White, red and blue stay apart for a colour-blind reader; white and green do not.
FOUND, FALSE_ALARM, MISSED = (255, 255, 255), (255, 84, 54), (66, 153, 255)
LEGEND = (("found", FOUND), ("missed", MISSED), ("false alarm", FALSE_ALARM))
PAPER, INK, FAINT_INK = (255, 255, 255), (32, 36, 42), (110, 116, 124)
DIMMED = 0.3
"""How bright the image stands behind a mask, against its own brightness."""
GAP_PX, LEAST_FONT_PX = 10, 14


class ComparisonRow(NamedTuple):
    """One row of the picture."""

    name: str
    image_HW3: np.ndarray
    """uint8."""
    mask_HW: np.ndarray
    """bool, the truth."""
    base_HW: np.ndarray
    """bool, predicted by the base."""
    tuned_HW: np.ndarray
    """bool, predicted by the tuned model."""


def comparison_picture(path: Path, rows: Sequence[ComparisonRow | tuple], cell_px: int = 512) -> None:
    """Write a PNG: a row per image, with what each prediction finds (white), misses (blue) and invents (red).

    Under each prediction stands its Dice. A smaller image is enlarged by a whole factor and stays sharp; a larger one
    is reduced by area, so that a thin vessel turns fainter but does not break up.

    Args:
        path: the PNG to write.
        rows: at least one; a ComparisonRow, or a plain tuple in its order.
        cell_px: length of a cell's longer side, at most.

    Raises:
        ValueError: no rows, or a mask that is not of its image's size.
    """
    if not rows:
        raise ValueError("a comparison picture needs at least one row")
    lines = [_cells(ComparisonRow(*row), cell_px) for row in rows]
    column_px = max(cell.width for cells in lines for _, cell in cells)
    font = ImageFont.load_default(max(LEAST_FONT_PX, column_px // 22))  # readable when the picture is shown smaller
    caption_px = round(1.6 * font.size)
    height_px = 2 * caption_px + sum(cells[0][1].height + caption_px + GAP_PX for cells in lines)
    canvas = Image.new("RGB", (4 * column_px + 5 * GAP_PX, height_px), PAPER)
    draw = ImageDraw.Draw(canvas)
    middles_px = [GAP_PX + column_px // 2 + column * (column_px + GAP_PX) for column in range(4)]
    for middle_px, title in zip(middles_px, ("image", "truth", "base", "tuned"), strict=True):
        draw.text((middle_px, caption_px / 2), title, INK, font, anchor="mm")
    top_px = caption_px
    for cells in lines:
        bottom_px = top_px + cells[0][1].height
        for middle_px, (caption, cell) in zip(middles_px, cells, strict=True):
            canvas.paste(cell, (middle_px - cell.width // 2, top_px))
            shown = _shorten(caption, column_px, draw, font)
            draw.text((middle_px, bottom_px + caption_px / 2), shown, FAINT_INK, font, anchor="mm")
        top_px = bottom_px + caption_px + GAP_PX
    _legend(draw, GAP_PX, top_px + caption_px // 2 - GAP_PX // 2, font)
    canvas.save(path)


def _cells(row: ComparisonRow, cell_px: int) -> list[tuple[str, Image.Image]]:
    """The four cells of a row, each with its caption."""
    for mask_HW in (row.mask_HW, row.base_HW, row.tuned_HW):
        if mask_HW.shape != row.image_HW3.shape[:2]:
            raise ValueError(f"{row.name}: mask {mask_HW.shape} and image {row.image_HW3.shape[:2]} differ in size")
    base, tuned = _dice(row.base_HW, row.mask_HW), _dice(row.tuned_HW, row.mask_HW)
    cells = (
        (row.name, row.image_HW3),
        (f"vessel {row.mask_HW.mean():.1%}", _overlay(row.image_HW3, row.mask_HW, row.mask_HW)),
        (f"Dice {base:.3f}", _overlay(row.image_HW3, row.base_HW, row.mask_HW)),
        (f"Dice {tuned:.3f} ({tuned - base:+.3f})", _overlay(row.image_HW3, row.tuned_HW, row.mask_HW)),
    )
    return [(caption, _fit(pixels_HW3, cell_px)) for caption, pixels_HW3 in cells]


def _dice(predicted_HW: np.ndarray, mask_HW: np.ndarray) -> float:
    agreement = (predicted_HW & mask_HW, predicted_HW & ~mask_HW, ~predicted_HW & mask_HW)
    return dice(torch.tensor([int(pixels.sum()) for pixels in agreement])).item()


def _overlay(image_HW3: np.ndarray, predicted_HW: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    grey_HW1 = image_HW3.mean(-1, keepdims=True) * DIMMED
    pixels_HW3 = np.repeat(grey_HW1, 3, axis=-1).astype(np.uint8)
    pixels_HW3[predicted_HW & mask_HW] = FOUND
    pixels_HW3[predicted_HW & ~mask_HW] = FALSE_ALARM
    pixels_HW3[~predicted_HW & mask_HW] = MISSED
    return pixels_HW3


def _fit(pixels_HW3: np.ndarray, cell_px: int) -> Image.Image:
    image = Image.fromarray(pixels_HW3)
    longer_px = max(image.size)
    if longer_px <= cell_px:
        factor = cell_px // longer_px
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = cell_px / longer_px
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BOX)


def _shorten(text: str, width_px: int, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont) -> str:
    """The text, without its middle if it is too wide: names of one data set differ at their ends."""
    shown, keep = text, len(text)
    while draw.textlength(shown, font) > width_px and keep > 1:
        keep -= 1
        shown = f"{text[: keep // 2]}...{text[len(text) - (keep - keep // 2) :]}"
    return shown


def _legend(draw: ImageDraw.ImageDraw, left_px: int, middle_px: int, font: ImageFont.FreeTypeFont) -> None:
    side_px = round(0.8 * font.size)
    for text, colour in LEGEND:
        box = (left_px, middle_px - side_px // 2, left_px + side_px, middle_px - side_px // 2 + side_px)
        draw.rectangle(box, fill=colour, outline=FAINT_INK)
        draw.text((left_px + 1.5 * side_px, middle_px), text, INK, font, anchor="lm")
        left_px += 3 * side_px + round(draw.textlength(text, font))
