"""The picture of a comparison: image, native mask, published mask and the pixels on which they differ, side by side.

Takes masks at the image's size, gives a PNG. Knows nothing of models.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sft.report.pictures import FAINT_INK, GAP_PX, INK, PAPER

MASK, ONLY_NATIVE, ONLY_PUBLISHED = (255, 255, 255), (255, 84, 54), (66, 153, 255)
DIMMED = 0.3
CELL_PX = 448
LEAST_DOT_PX = 3


def side_by_side(
    path: Path, image_HW3: np.ndarray, native_HW: np.ndarray, published_HW: np.ndarray | None, remark: str = ""
) -> None:
    """Writes the PNG.

    Args:
        path: the PNG to write.
        image_HW3: uint8 RGB.
        native_HW: bool, of the image's size.
        published_HW: the same; None where nothing was compared: two cells then.
        remark: a line below, for instance the verdict.
    """
    cells = [("image", image_HW3), (f"native: {_share(native_HW)}", _on_dimmed(image_HW3, [(native_HW, MASK)]))]
    legend = remark
    if published_HW is not None:
        cells.append((f"published: {_share(published_HW)}", _on_dimmed(image_HW3, [(published_HW, MASK)])))
        only = [(native_HW & ~published_HW, ONLY_NATIVE), (published_HW & ~native_HW, ONLY_PUBLISHED)]
        count = int((native_HW != published_HW).sum())
        cells.append((f"differing: {count:,} px", _on_dimmed(image_HW3, [(_fat(px), colour) for px, colour in only])))
        legend = f"red: native alone, blue: published alone, drawn larger.   {remark}"
    font = ImageFont.load_default(18)
    drawn = [(caption, _fit(pixels)) for caption, pixels in cells]
    column_px = max(max(cell.width for _, cell in drawn), 240)
    row_px, line_px = max(cell.height for _, cell in drawn), 30
    canvas = Image.new("RGB", (len(drawn) * (column_px + GAP_PX) + GAP_PX, row_px + 2 * line_px + GAP_PX), PAPER)
    draw = ImageDraw.Draw(canvas)
    for index, (caption, cell) in enumerate(drawn):
        left = GAP_PX + index * (column_px + GAP_PX)
        draw.text((left + column_px // 2, line_px // 2), caption, INK, font, anchor="mm")
        canvas.paste(cell, (left + (column_px - cell.width) // 2, line_px))
    draw.text((GAP_PX, line_px + row_px + line_px // 2 + GAP_PX // 2), legend, FAINT_INK, font, anchor="lm")
    canvas.save(path)


def _share(mask_HW: np.ndarray) -> str:
    return f"{mask_HW.mean():.2%} of the image"


def _on_dimmed(image_HW3: np.ndarray, layers: list[tuple[np.ndarray, tuple[int, int, int]]]) -> np.ndarray:
    grey_HW1 = image_HW3.mean(-1, keepdims=True) * DIMMED
    pixels_HW3 = np.repeat(grey_HW1, 3, axis=-1).astype(np.uint8)
    for mask_HW, colour in layers:
        pixels_HW3[mask_HW] = colour
    return pixels_HW3


def _fat(mask_HW: np.ndarray) -> np.ndarray:
    """Each pixel as a square that is still seen after the picture is reduced."""
    reach = round(LEAST_DOT_PX * max(1.0, max(mask_HW.shape) / CELL_PX)) // 2
    if not mask_HW.any():
        return mask_HW
    for axis in (0, 1):
        padded = np.pad(mask_HW, [(reach, reach) if axis == here else (0, 0) for here in (0, 1)])
        mask_HW = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=axis).any(-1)
    return mask_HW


def _fit(pixels_HW3: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels_HW3)
    scale = CELL_PX / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX)
