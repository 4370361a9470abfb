"""Layer norms of SAM2's image encoder with what stands around them, as Triton kernels: windows cut and joined, sums.

Takes maps of tokens, gives maps or windows; each value is read and written once. torch's layer norm reaches a fifth of
an H200's memory bandwidth at these widths, its copies into windows a quarter. Without gradients. Imports Triton, which
comes with torch for CUDA.

Shapes: B images, H x W tokens, C width, W' windows of side s: (W', s, s, C), of one image row by row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

VALUES = 4096  # of a program, about


def normed(map_BHWC: Tensor, norm: nn.LayerNorm, side: int) -> Tensor:
    """Layer norm of every token, as windows; as the map where side is 0."""
    batch, height, width, channels = map_BHWC.shape
    shape = (-1, side, side, channels) if side else map_BHWC.shape
    out = torch.empty_like(map_BHWC, memory_format=torch.contiguous_format)
    _run(_normed_kernel, (map_BHWC.contiguous(), norm.weight, norm.bias, out), map_BHWC.shape, side, norm.eps)
    return out.view(shape)


def added(map_BHWC: Tensor, windows: Tensor, norm: nn.LayerNorm, side: int) -> tuple[Tensor, Tensor]:
    """The map with the windows added in their places, and its layer norm, both (B, H, W, C)."""
    total, out = (torch.empty_like(map_BHWC, memory_format=torch.contiguous_format) for _ in range(2))
    tensors = (map_BHWC.contiguous(), windows.contiguous(), norm.weight, norm.bias, total, out)
    _run(_added_kernel, tensors, map_BHWC.shape, side, norm.eps)
    return total, out


def _run(kernel, tensors: tuple[Tensor, ...], shape_BHWC: torch.Size, side: int, eps: float) -> None:
    batch, height, width, channels = shape_BHWC
    padded = triton.next_power_of_2(channels)
    rows = max(VALUES // padded, 1)
    tokens = batch * height * width
    kernel[(triton.cdiv(tokens, rows),)](
        *tensors, tokens, height, width, eps, CHANNELS=channels, PADDED=padded, ROWS=rows, SIDE=side
    )


@triton.jit
def _normed_kernel(
    map_in, weight, bias, out, tokens, height, width, eps,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, PADDED)[None, :]
    inside = (token < tokens) & (channel < CHANNELS)
    values = tl.load(map_in + token * CHANNELS + channel, mask=inside, other=0.0).to(tl.float32)
    values = _layer_norm(values, weight, bias, eps, channel, CHANNELS)
    place = _in_windows(token, height, width, SIDE)
    tl.store(out + place * CHANNELS + channel, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _added_kernel(
    map_in, windows, weight, bias, total, out, tokens, height, width, eps,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, PADDED)[None, :]
    inside = (token < tokens) & (channel < CHANNELS)
    place = _in_windows(token, height, width, SIDE)
    values = tl.load(map_in + token * CHANNELS + channel, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(windows + place * CHANNELS + channel, mask=inside, other=0.0).to(tl.float32)
    rounded = values.to(total.dtype.element_ty)  # the norm is that of the sum as it is kept
    tl.store(total + token * CHANNELS + channel, rounded, mask=inside)
    values = _layer_norm(rounded.to(tl.float32), weight, bias, eps, channel, CHANNELS)
    tl.store(out + token * CHANNELS + channel, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _in_windows(token, height, width, SIDE: tl.constexpr):
    # Where a token of the maps, row by row, lies among the windows.
    if SIDE == 0:
        return token
    across = width // SIDE
    row, column = token // width, token % width  # of all maps, one below the other; the height is a multiple of SIDE
    window = (row // SIDE) * across + column // SIDE
    return (window * SIDE + row % SIDE) * SIDE + column % SIDE


@triton.jit
def _layer_norm(values, weight, bias, eps, channel, CHANNELS: tl.constexpr):
    mean = tl.sum(values, 1)[:, None] / CHANNELS
    centred = tl.where(channel < CHANNELS, values - mean, 0.0)
    variance = tl.sum(centred * centred, 1)[:, None] / CHANNELS
    scale = tl.load(weight + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    return centred * tl.rsqrt(variance + eps) * scale + shift
