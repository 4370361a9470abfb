"""SAM2's image encoder, a Hiera and its neck, without what transformers computes there for nothing.

Takes a transformers encoder, whose modules, names and weights stay; gives the same numbers. In transformers 5.17 to
5.23 each attention first computes weights between the heads of a token, in fp32, that nothing reads, each block copies
its input once more, to pad it by nothing, and the neck computes sines and cosines for its maps that only video needs.
On a GPU without gradients, layer norms are one kernel each with what stands around them (hiera_kernels.py), and the
numbers the same within rounding.

Shapes: B images, H x W tokens, W' windows of all images, N tokens of a window, C width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.sam2.modeling_sam2 import Sam2MultiScaleAttention, Sam2MultiScaleBlock, Sam2VisionNeck

if torch.cuda.is_available():
    from sft.model import hiera_kernels


class _Attention(Sam2MultiScaleAttention):
    """Attention within windows, or over the whole map; a stage's first block looks at it with fewer queries."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """(W', height, width, C) -> the same, or smaller by `query_stride`."""
        windows, height, width, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).view(windows, height * width, 3, self.num_attention_heads, -1)
        query, key, value = qkv.unbind(2)
        if self.query_stride:
            pooled = _pooled(query.reshape(windows, height, width, -1), self.query_stride)
            height, width = pooled.shape[1:3]
            query = pooled.reshape(windows, height * width, self.num_attention_heads, -1)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        attended = functional.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return self.proj(attended.transpose(1, 2).reshape(windows, height, width, -1))


class _Block(Sam2MultiScaleBlock):
    """Attention and MLP; only maps that windows do not divide go the way of transformers, which pads them."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """(B, H, W, C) -> the same, or half the sides and twice the width in the first block of a stage."""
        side, sizes = self.window_size, hidden_states.shape[1:3]
        if side and any(size % side for size in sizes):
            return super().forward(hidden_states, **kwargs)
        if self._may_use_kernels(hidden_states):
            return self._by_kernels(hidden_states)
        normed = self.layer_norm1(hidden_states)
        shortcut = hidden_states if self.dim == self.dim_out else _pooled(self.proj(normed), self.query_stride)
        attended = self.attn(_split(normed, side) if side else normed)
        hidden_states = shortcut + (_joined(attended, shortcut.shape) if side else attended)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))

    def _may_use_kernels(self, hidden_states: Tensor) -> bool:
        """Not with gradients, nor where ZeRO-3 holds the weights: it makes them whole for calls of their own module."""
        by_zero3 = hasattr(self.layer_norm1.weight, "ds_id")
        return hidden_states.is_cuda and self.dim == self.dim_out and not torch.is_grad_enabled() and not by_zero3

    def _by_kernels(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states.contiguous()
        attended = self.attn(hiera_kernels.normed(hidden_states, self.layer_norm1, self.window_size))
        hidden_states, normed = hiera_kernels.added(hidden_states, attended, self.layer_norm2, self.window_size)
        return hidden_states + self.mlp(normed)


class _Neck(Sam2VisionNeck):
    """Every stage's map at one width; the two smallest are added, the smaller one enlarged."""

    def forward(self, hidden_states: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[()]]:
        """Maps of the stages (B, H, W, C), large to small -> maps (B, D, H, W), small to large, and no encodings."""
        maps: list[Tensor] = []
        last = len(self.convs) - 1
        for stage in range(last, -1, -1):
            lateral = self.convs[last - stage](hidden_states[stage].permute(0, 3, 1, 2))
            if stage in self.fpn_top_down_levels and stage != last:
                enlarged = functional.interpolate(maps[-1].float(), scale_factor=2.0, mode="nearest")
                lateral = lateral + enlarged.to(lateral.dtype)
            maps.append(lateral)
        return tuple(maps), ()


def lighten(encoder: nn.Module) -> None:
    """Puts these classes in the place of transformers'; parameters and their names do not change."""
    for module in encoder.modules():
        if type(module) is Sam2MultiScaleBlock:
            module.__class__ = _Block
        elif type(module) is Sam2MultiScaleAttention:
            module.__class__ = _Attention
        elif type(module) is Sam2VisionNeck:
            module.__class__ = _Neck


def _pooled(map_BHWC: Tensor, stride: tuple[int, int] | None) -> Tensor:
    if stride is None:
        return map_BHWC
    return functional.max_pool2d(map_BHWC.permute(0, 3, 1, 2), stride, stride).permute(0, 2, 3, 1)


def _split(map_BHWC: Tensor, side: int) -> Tensor:
    """(B, H, W, C) -> windows (W', side, side, C)."""
    batch, height, width, channels = map_BHWC.shape
    grid = map_BHWC.view(batch, height // side, side, width // side, side, channels)
    return grid.transpose(2, 3).reshape(-1, side, side, channels)


def _joined(windows: Tensor, shape_BHWC: torch.Size) -> Tensor:
    """The way back of `_split`."""
    batch, height, width, channels = shape_BHWC
    side = windows.shape[1]
    grid = windows.view(batch, height // side, width // side, side, side, channels)
    return grid.transpose(2, 3).reshape(batch, height, width, channels)
