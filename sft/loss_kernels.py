"""ComboLoss on a GPU in one pass forward and one backward, as Triton kernels: nothing per pixel is kept in between.

Takes logits at the masks' size or on a coarser or finer grid, masks and the loss's settings; gives the terms as scalars
on the device. Logits of another size are interpolated inside the kernels, so that they never exist at the masks' size;
their gradient is gathered along y, then along x. Sums have a fixed order: equal inputs give equal bits, which
torch's own backward of the bilinear interpolation does not (it adds atomically).
Imports Triton, which comes with torch for CUDA: `losses` imports this file when the first CUDA tensor arrives. Knows
nothing of configuration, model and loop.

Shapes: B images, H x W pixels, h x w grid of the logits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

PIXELS = 2048  # a program of the forward and of the direct backward
SUMS = 5  # per image: sum p m, sum p, sum m, focal, bce
ROWS, COLUMNS = 8, 128  # a program of the gather along y: rows of the grid, columns of pixels
LOGITS = 256  # a program of the gather along x


class Weights(NamedTuple):
    """The settings of ComboLoss."""

    dice: float
    focal: float
    bce: float
    smooth: float
    alpha: float
    gamma: float


def combo(logits_Bhw: Tensor, masks_BHW: Tensor, weights: Weights) -> dict[str, Tensor]:
    """ComboLoss of logits brought bilinearly to the masks' size (align_corners=False); see `losses.combo`.

    Args:
        logits_Bhw: fp32, bf16 or fp16, any size; of the masks' own size they are taken as they are.
        masks_BHW: 0/1 or bool, no floating type.
        weights: the weights of the terms and their settings.

    Returns:
        fp32 scalars: "dice", "focal", "bce" for the log, without a gradient, and "total", which has one.
    """
    terms_3, total = _Combo.apply(logits_Bhw, masks_BHW, weights)
    return dict(zip(("dice", "focal", "bce"), terms_3.unbind(), strict=True)) | {"total": total}


class _Combo(torch.autograd.Function):
    """Keeps the logits as they came, the masks and two figures per image."""

    @staticmethod
    def forward(ctx, logits_Bhw: Tensor, masks_BHW: Tensor, weights: Weights) -> tuple[Tensor, ...]:
        logits_Bhw = logits_Bhw.contiguous()
        masks_BHW = masks_BHW.contiguous() if masks_BHW.dtype == torch.bool else (masks_BHW != 0).contiguous()
        masks_BHW = masks_BHW.view(torch.uint8)
        (images, height, width), (grid_h, grid_w) = masks_BHW.shape, logits_Bhw.shape[1:]
        pixels = height * width
        blocks = triton.cdiv(pixels, PIXELS)
        # Two slopes per image, then the sums, (SUMS, images, blocks): one allocation, which takes as long as a kernel.
        figures = torch.empty(2 * images + SUMS * images * blocks, dtype=torch.float32, device=logits_Bhw.device)
        _sums_kernel[(blocks, images)](
            logits_Bhw, masks_BHW, figures, images * blocks, pixels, width,
            grid_h, grid_w, grid_h / height, grid_w / width, weights.alpha, weights.gamma,
            RESIZED=(grid_h, grid_w) != (height, width), PIXELS=PIXELS,
        )  # fmt: skip
        terms_3, total = figures.new_empty(3), figures.new_empty(())
        rows = triton.next_power_of_2(images)
        _terms_kernel[(1,)](
            figures, terms_3, total, images, blocks, images * blocks, pixels,
            weights.smooth, weights.dice, weights.focal, weights.bce,
            IMAGES=rows, CHUNK=max(2048 // rows, 1), num_warps=8,
        )  # fmt: skip
        ctx.save_for_backward(logits_Bhw, masks_BHW, figures)
        ctx.weights = weights
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(terms_3)
        return terms_3, total

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        if gradients[1] is None:
            return None, None, None
        logits_Bhw, masks_BHW, figures = ctx.saved_tensors
        gradient_Bhw = torch.empty_like(logits_Bhw)
        (images, height, width), (grid_h, grid_w) = masks_BHW.shape, logits_Bhw.shape[1:]
        pixels, weights = height * width, ctx.weights
        inputs = (logits_Bhw, masks_BHW, figures, gradients[1])
        settings = (weights.focal / (images * pixels), weights.bce / (images * pixels), weights.alpha, weights.gamma)
        if (grid_h, grid_w) == (height, width):
            _gradient_kernel[(triton.cdiv(pixels, PIXELS), images)](
                *inputs, gradient_Bhw, pixels, *settings, PIXELS=PIXELS
            )
        else:
            gathered_BhW = figures.new_empty(images, grid_h, width)
            _gather_rows_kernel[(triton.cdiv(width, COLUMNS), triton.cdiv(grid_h, ROWS), images)](
                *inputs, gathered_BhW, height, width, grid_h, grid_w, grid_h / height, grid_w / width, *settings,
                ROWS=ROWS, COLUMNS=COLUMNS,
            )  # fmt: skip
            _gather_columns_kernel[(triton.cdiv(gradient_Bhw.numel(), LOGITS),)](
                gathered_BhW, gradient_Bhw, gradient_Bhw.numel(), width, grid_w, grid_w / width,
                -(-2 * width // grid_w) + 1, LOGITS=LOGITS,
            )  # fmt: skip
        return gradient_Bhw, None, None


@triton.jit
def _sums_kernel(
    logits, masks, figures, stride, pixels, width, grid_h, grid_w, scale_y, scale_x, alpha, gamma,
    RESIZED: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    block, blocks, image = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    pixel = block * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    vessel = tl.load(masks + image * pixels + pixel, mask=inside, other=0) != 0
    if RESIZED:
        top, bottom, low = _taps(pixel // width, scale_y, grid_h)
        left, right, near = _taps(pixel % width, scale_x, grid_w)
        logit = _interpolated(logits + image * grid_h * grid_w, top * grid_w, bottom * grid_w, low, left, right, near)
    else:
        logit = tl.load(logits + image * pixels + pixel, mask=inside, other=0.0).to(tl.float32)
    right_p, wrong_p, cost, modulation = _pixel(logit, vessel, gamma)
    probability = tl.where(inside, tl.where(vessel, right_p, wrong_p), 0.0)
    focal = tl.where(vessel, alpha, 1.0 - alpha) * modulation * cost
    place = figures + 2 * tl.num_programs(1) + image * blocks + block
    tl.store(place, tl.sum(tl.where(vessel, probability, 0.0)))
    tl.store(place + stride, tl.sum(probability))
    tl.store(place + 2 * stride, tl.sum(tl.where(vessel, 1.0, 0.0)))
    tl.store(place + 3 * stride, tl.sum(tl.where(inside, focal, 0.0)))
    tl.store(place + 4 * stride, tl.sum(tl.where(inside, cost, 0.0)))


@triton.jit
def _terms_kernel(
    figures, terms_out, total_out, images, blocks, stride, pixels,
    smooth, dice_weight, focal_weight, bce_weight, IMAGES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # One program: the mean over images needs all of them, and there are few sums left.
    row = tl.arange(0, IMAGES)
    real = row < images
    partial = figures + 2 * images
    overlap = _row_sums(partial, images, blocks, IMAGES, CHUNK)
    predicted = _row_sums(partial + stride, images, blocks, IMAGES, CHUNK)
    vessels = _row_sums(partial + 2 * stride, images, blocks, IMAGES, CHUNK)
    focal = tl.sum(_row_sums(partial + 3 * stride, images, blocks, IMAGES, CHUNK) / pixels) / images
    bce = tl.sum(_row_sums(partial + 4 * stride, images, blocks, IMAGES, CHUNK) / pixels) / images
    sizes = predicted + vessels + smooth
    score = (2.0 * overlap + smooth) / sizes
    dice = tl.sum(tl.where(real, 1.0 - score, 0.0)) / images
    # What one more probability costs: on the background it enlarges the sizes, on a vessel the overlap too.
    on_background = dice_weight * score / sizes / images
    tl.store(figures + 2 * row, on_background - 2.0 * dice_weight / sizes / images, mask=real)
    tl.store(figures + 2 * row + 1, on_background, mask=real)
    tl.store(terms_out, dice)
    tl.store(terms_out + 1, focal)
    tl.store(terms_out + 2, bce)
    tl.store(total_out, dice_weight * dice + focal_weight * focal + bce_weight * bce)


@triton.jit
def _gradient_kernel(
    logits, masks, slopes, total_gradient, gradient, pixels, focal_share, bce_share, alpha, gamma, PIXELS: tl.constexpr
):
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    vessel = tl.load(masks + image * pixels + pixel, mask=inside, other=0) != 0
    logit = tl.load(logits + image * pixels + pixel, mask=inside, other=0.0).to(tl.float32)
    on_vessel, on_background = tl.load(slopes + 2 * image), tl.load(slopes + 2 * image + 1)
    slope = _slope(logit, vessel, on_vessel, on_background, focal_share, bce_share, alpha, gamma)
    slope = (slope * tl.load(total_gradient)).to(gradient.dtype.element_ty)
    tl.store(gradient + image * pixels + pixel, slope, mask=inside)


@triton.jit
def _gather_rows_kernel(
    logits, masks, slopes, total_gradient, gathered, height, width, grid_h, grid_w, scale_y, scale_x,
    focal_share, bce_share, alpha, gamma, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Goes down some rows of the grid, at columns of pixels: what lies between a row and the next is evaluated once and
    # shared out among the two. Begins one row early, for what its first row gets from above.
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first, image = tl.program_id(1) * ROWS, tl.program_id(2).to(tl.int64)
    left, right, near = _taps(x, scale_x, grid_w)
    grid, truth = logits + image * grid_h * grid_w, masks + image * height * width
    out = gathered + image * grid_h * width
    on_vessel, on_background = tl.load(slopes + 2 * image), tl.load(slopes + 2 * image + 1)
    factor = tl.load(total_gradient)
    from_above = tl.zeros((COLUMNS,), tl.float32)
    begin = tl.maximum(first - 1, 0)
    for step in range(0, tl.minimum(first + ROWS, grid_h) - begin):
        row = begin + step
        start, end = _between(row, scale_y, height)
        own, below = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
        for down in range(0, end - start):
            y = start + down
            top, bottom, low = _taps(y, scale_y, grid_h)
            vessel = tl.load(truth + y * width + x, mask=x < width, other=0) != 0
            logit = _interpolated(grid, top * grid_w, bottom * grid_w, low, left, right, near)
            slope = _slope(logit, vessel, on_vessel, on_background, focal_share, bce_share, alpha, gamma)
            # The range is a little generous, and below the last row both shares are its own.
            own += slope * tl.where(top == row, tl.where(bottom == row, 1.0, 1.0 - low), 0.0)
            below += slope * tl.where((top == row) & (bottom != row), low, 0.0)
        tl.store(out + row * width + x, factor * (from_above + own), mask=x < tl.where(row >= first, width, 0))
        from_above = below


@triton.jit
def _gather_columns_kernel(
    gathered, gradient, count, width, grid_w, scale_x, span, LOGITS: tl.constexpr
):  # fmt: skip
    # The rows of all images one below the other; `span` is the most pixels that look at a logit.
    place = tl.program_id(0).to(tl.int64) * LOGITS + tl.arange(0, LOGITS)
    row, column = place // grid_w, (place % grid_w).to(tl.int32)
    start, end = _looking(column, scale_x, width)
    sums = tl.zeros((LOGITS,), tl.float32)
    for step in range(0, span):
        x = start + step
        left, right, near = _taps(x, scale_x, grid_w)
        share = tl.where(left == column, 1.0 - near, 0.0) + tl.where(right == column, near, 0.0)
        sums += share * tl.load(gathered + row * width + x, mask=(x < end) & (place < count), other=0.0)
    tl.store(gradient + place, sums.to(gradient.dtype.element_ty), mask=place < count)


@triton.jit
def _taps(position, scale, size):
    # torch's align_corners=False: the two neighbours in the grid, and the share of the second.
    source = tl.maximum((position + 0.5) * scale - 0.5, 0.0)
    first = tl.minimum(source.to(tl.int32), size - 1)
    return first, tl.minimum(first + 1, size - 1), tl.minimum(source - first.to(tl.float32), 1.0)


@triton.jit
def _between(row, scale, size):
    # Pixels (start, end) whose first neighbour is this row; a tenth of a pixel absorbs the rounding of the division.
    start = tl.where(row == 0, 0.0, tl.ceil((row + 0.5) / scale - 0.6)).to(tl.int32)
    end = tl.floor((row + 1.5) / scale - 0.4).to(tl.int32) + 1
    return start, tl.minimum(end, size)


@triton.jit
def _looking(column, scale, size):
    # Pixels (start, end) with this neighbour, as above.
    start = tl.ceil((column - 0.5) / scale - 0.6).to(tl.int32)
    end = tl.floor((column + 1.5) / scale - 0.4).to(tl.int32) + 1
    return tl.maximum(start, 0), tl.minimum(end, size)


@triton.jit
def _interpolated(logits, top, bottom, low, left, right, near):
    above = tl.load(logits + top + left).to(tl.float32) * (1.0 - near)
    above += tl.load(logits + top + right).to(tl.float32) * near
    below = tl.load(logits + bottom + left).to(tl.float32) * (1.0 - near)
    below += tl.load(logits + bottom + right).to(tl.float32) * near
    return above * (1.0 - low) + below * low


@triton.jit
def _pixel(logit, vessel, gamma):
    # Probability of the true class and of the other, cross entropy, and the focal modulation wrong_p^gamma.
    margin = tl.where(vessel, logit, -logit)
    small = tl.exp(-tl.abs(margin))
    larger = 1.0 / (1.0 + small)
    right_p = tl.where(margin >= 0, larger, small * larger)
    wrong_p = tl.where(margin >= 0, small * larger, larger)
    softened = _log1p(small)
    cost = tl.maximum(-margin, 0.0) + softened
    modulation = tl.exp(-gamma * (tl.maximum(margin, 0.0) + softened))
    return right_p, wrong_p, cost, modulation


@triton.jit
def _log1p(x):
    # 2 artanh(x / (2 + x)) as a series, for x in 0..1: relative error below 2e-7 however small x is, where log(1 + x)
    # would have lost it; the language has no log1p.
    z = x / (2.0 + x)
    s = z * z
    series = 1 / 11 + s * (1 / 13)
    series = 1 / 7 + s * (1 / 9 + s * series)
    series = 1 / 3 + s * (1 / 5 + s * series)
    return 2.0 * z * (1.0 + s * series)


@triton.jit
def _slope(logit, vessel, on_vessel, on_background, focal_share, bce_share, alpha, gamma):
    # Derivative of the weighted loss by a pixel's logit.
    right_p, wrong_p, cost, modulation = _pixel(logit, vessel, gamma)
    dice = right_p * wrong_p * tl.where(vessel, on_vessel, on_background)
    focal = focal_share * tl.where(vessel, alpha, 1.0 - alpha) * modulation * (wrong_p + gamma * right_p * cost)
    others = focal + bce_share * wrong_p
    return dice + tl.where(vessel, -others, others)


@triton.jit
def _row_sums(partial, images, blocks, IMAGES: tl.constexpr, CHUNK: tl.constexpr):
    row, column = tl.arange(0, IMAGES)[:, None], tl.arange(0, CHUNK)[None, :]
    sums = tl.zeros((IMAGES, CHUNK), tl.float32)
    for start in range(0, blocks, CHUNK):
        real = (row < images) & (start + column < blocks)
        sums += tl.load(partial + row * blocks + start + column, mask=real, other=0.0)
    return tl.sum(sums, axis=1)
