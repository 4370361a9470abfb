"""Two records of the same prediction, ours and the published code's -> a row per quantity, and a verdict.

Takes arrays by name (see `NAMES`), gives `Row`s in the order in which one quantity leads to the next: the first that
differs is where to look. Does not know models, files or processes.

Allowed differences are relative to the largest magnitude of the published quantity. In fp32 both sides do the same
sums in another order: 1e-4 is many times what that was seen to make. In bf16 every intermediate result is rounded by
up to u = 2^-8 of itself, at other places on the two sides (ours uses fused attention, theirs does not), and roundings
add up over the layers; so what is allowed is stated in u. A bf16 difference near its limit decides nothing: compare
in fp32 then.

Shapes: H x W the image, h x w the mask decoder's grid, K = 3 candidate masks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NAMES = ("input_ids", "pixel_values", "sam2_image", "vision_tokens", "answer_ids", "seg_state", "candidate_logits")
NAMES += ("predicted_iou", "mask")
FP32_ALLOWED = 1e-4
BF16_U = 2.0**-8
# In u. One rounding of equal fp32 pixels; the published SAM2 normalises in bf16: four roundings, enlarged by 1 / std.
BF16_ALLOWED_U = {
    "pixel_values": 1,
    "sam2_image": 4,
    "vision_tokens": 16,
    "seg_state": 16,
    "candidate_logits": 32,
    "predicted_iou": 16,
}
TITLES = {
    "pixel_values": "pixels for the vision encoder",
    "image_grid_thw": "patches in time, height, width",
    "sam2_image": "pixels for SAM2",
    "vision_tokens": "vision tokens",
    "seg_state": "state at [SEG]",
    "candidate_logits": "logits of the three masks",
    "predicted_iou": "their predicted IoUs",
}


@dataclass(frozen=True)
class Row:
    """One quantity on both sides."""

    quantity: str
    native: str
    published: str
    absolute: float | None
    """Largest difference; None where it has no sense."""
    relative: float | None
    """The same over the largest published magnitude."""
    allowed: str
    ok: bool


def compare(
    native: Mapping[str, np.ndarray], published: Mapping[str, np.ndarray], precision: str, seg_token_id: int
) -> list[Row]:
    """Rows for all quantities that both answers reached.

    Args:
        native: arrays by the names of `NAMES`; without the last four if the answer does not say [SEG]. Beside them
            `mask_logits`, (K, H, W): the candidates at the image's size, resized as the published code does.
        published: the same without `mask_logits`; `answer_ids` may go on after [SEG].
        precision: "fp32" or "bf16".
        seg_token_id: ends what is compared of an answer.

    Raises:
        KeyError: a name is missing that the answer should have led to.
    """
    rows = [_ids_row("prompt", native["input_ids"], published["input_ids"])]
    given = ("pixel_values", "image_grid_thw", "sam2_image", "vision_tokens")
    rows += [_row(name, native, published, precision) for name in given if name in native or name in published]
    answers = [up_to(side["answer_ids"], seg_token_id) for side in (native, published)]
    rows.append(_ids_row("answer up to [SEG]", *answers))
    if not all(says(answer, seg_token_id) for answer in answers):
        return rows
    rows += [_row(name, native, published, precision) for name in ("seg_state", "candidate_logits", "predicted_iou")]
    return [*rows, *_mask_rows(native, published, precision)]


def says(answer_ids: np.ndarray, seg_token_id: int) -> bool:
    """Whether an answer holds [SEG]."""
    return bool((answer_ids == seg_token_id).any())


def verdict(rows: Sequence[Row]) -> tuple[bool, str]:
    """Whether all was found the same, and the line that says so or where the first difference is."""
    different = [row.quantity for row in rows if not row.ok]
    if different:
        rest = f"; after it also: {', '.join(different[1:])}" if different[1:] else ""
        return False, f"differs: first in {different[0]}{rest}"
    if not any(row.quantity == "mask" for row in rows):
        return False, "undecided: both answers are the same, but neither says [SEG], so there is no mask to compare"
    return True, "same"


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    lines = [("quantity", "native", "published", "largest diff.", "relative", "allowed", "")]
    for row in rows:
        figures = ("-" if value is None else f"{value:.2g}" for value in (row.absolute, row.relative))
        lines.append((row.quantity, row.native, row.published, *figures, row.allowed, "ok" if row.ok else "DIFFERS"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def allowed(name: str, precision: str) -> float:
    """Largest relative difference of a quantity that passes."""
    match precision:
        case "fp32":
            return FP32_ALLOWED
        case "bf16":
            return BF16_ALLOWED_U[name] * BF16_U
    raise ValueError(f"precision {precision!r}; known: fp32, bf16")


def up_to(answer_ids: np.ndarray, seg_token_id: int) -> np.ndarray:
    """An answer up to and with its first [SEG]; all of it if it has none."""
    found = np.flatnonzero(answer_ids == seg_token_id)
    return answer_ids[: found[0] + 1] if len(found) else answer_ids


def _ids_row(quantity: str, native: np.ndarray, published: np.ndarray) -> Row:
    texts = [f"{len(ids)} tokens" for ids in (native, published)]
    same = np.array_equal(native, published)
    if not same:
        shorter = min(len(native), len(published))
        other = np.flatnonzero(native[:shorter] != published[:shorter])
        first = int(other[0]) if len(other) else shorter
        texts = [f"{text}, {_some(ids, first)}" for text, ids in zip(texts, (native, published), strict=True)]
    return Row(quantity, *texts, None, None, "equal", same)


def _some(ids: np.ndarray, first: int) -> str:
    return f"from {first}: {' '.join(map(str, ids[first : first + 4].tolist())) or 'none'}"


def _row(name: str, native: Mapping[str, np.ndarray], published: Mapping[str, np.ndarray], precision: str) -> Row:
    title = TITLES[name]
    if name not in native or name not in published:
        return Row(title, *("there" if name in side else "none" for side in (native, published)), None, None, "", False)
    shapes = ["x".join(map(str, side[name].shape)) for side in (native, published)]
    if shapes[0] != shapes[1]:
        return Row(title, *shapes, None, None, "equal shapes", False)
    if not np.issubdtype(published[name].dtype, np.floating):
        told = ["x".join(map(str, side[name].ravel().tolist())) for side in (native, published)]
        return Row(title, *told, None, None, "equal", told[0] == told[1])
    absolute, relative = differences(native[name], published[name])
    limit = allowed(name, precision)
    told = f"{limit:.2g}" if precision == "fp32" else f"{limit:.2g} = {BF16_ALLOWED_U[name]} u"
    return Row(title, *shapes, absolute, relative, told, relative <= limit)


def differences(native: np.ndarray, published: np.ndarray) -> tuple[float, float]:
    """Largest absolute difference, and the same over the largest published magnitude; not finite counts infinite."""
    if not (np.isfinite(native).all() and np.isfinite(published).all()):
        return float("inf"), float("inf")
    absolute = float(np.abs(native.astype(np.float64) - published).max(initial=0))
    scale = float(np.abs(published).max(initial=0))
    return absolute, absolute / scale if scale else (0.0 if absolute == 0 else float("inf"))


def _mask_rows(native: Mapping[str, np.ndarray], published: Mapping[str, np.ndarray], precision: str) -> list[Row]:
    """Which of the three was chosen, and its pixels.

    Two masks of practically one predicted IoU may change places: then the published choice is compared on both sides.
    A pixel may differ where its logit is closer to 0 than logits may differ.
    """
    iou_K = native["predicted_iou"]
    chosen, theirs = int(iou_K.argmax()), int(published["predicted_iou"].argmax())
    limit = allowed("predicted_iou", precision) * float(np.abs(published["predicted_iou"]).max())
    tied = float(iou_K[chosen] - iou_K[theirs]) <= 2 * limit
    rows = [Row("chosen mask", f"{chosen + 1} of 3", f"{theirs + 1} of 3", None, None, "equal or tied", tied)]
    logits_HW, mask_HW = native["mask_logits"][theirs], published["mask"]
    shapes = [f"{shape[1]}x{shape[0]}" for shape in (logits_HW.shape, mask_HW.shape)]
    if shapes[0] != shapes[1]:
        return [*rows, Row("mask", *shapes, None, None, "equal sizes", False)]
    different_HW = (logits_HW > 0) != mask_HW
    margin = allowed("candidate_logits", precision) * float(np.abs(published["candidate_logits"][theirs]).max())
    excused_HW = np.abs(logits_HW) <= margin
    texts = [f"{int(mask.sum()):,} px" for mask in (logits_HW > 0, mask_HW)]
    told = f"{int(excused_HW.sum()):,} px near 0"
    count = int(different_HW.sum())
    return [*rows, Row("mask", *texts, count, count / mask_HW.size, told, not (different_HW & ~excused_HW).any())]
