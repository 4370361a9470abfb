"""Random zeros and ones as a Triton kernel, eight of one draw; see `dropout`.

Imports Triton, which comes with torch for CUDA.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DRAWS = 512  # of a program
PER_DRAW = 8  # values that one draw decides, by 16 bits each


def kept_of(count: int, dropped_steps: int, device: torch.device) -> Tensor:
    """Random zeros and ones, uint8 on a GPU.

    Args:
        count: how many.
        dropped_steps: zeros among 2^16 of them, on average.
        device: the GPU, whose generator gives the seed: runs repeat, and layers that are computed again.
    """
    draws = -(-count // PER_DRAW)
    seed = torch.randint(2**62, (1,), device=device)
    kept = torch.empty(draws * PER_DRAW, dtype=torch.uint8, device=device)
    _kept_kernel[(-(-draws // DRAWS),)](seed, kept, draws, dropped_steps, DRAWS=DRAWS)
    return kept[:count]


@triton.jit
def _kept_kernel(seed, kept, draws, dropped_steps, DRAWS: tl.constexpr):
    # Two words of four bytes from each draw; they lie apart, so that those of neighbours lie side by side.
    first = tl.program_id(0) * DRAWS
    place = tl.arange(0, DRAWS)
    inside = first + place < draws
    a, b, c, d = tl.randint4x(tl.load(seed), first + place, n_rounds=7)
    words = kept.to(tl.pointer_type(tl.int32)) + 2 * first.to(tl.int64) + place
    tl.store(words, _word(a, b, dropped_steps), mask=inside)
    tl.store(words + tl.minimum(draws - first, DRAWS), _word(c, d, dropped_steps), mask=inside)


@triton.jit
def _word(one, other, dropped_steps):
    # Four bytes 0 or 1, from the halves of two random words.
    word = ((one & 0xFFFF) >= dropped_steps).to(tl.int32)
    word |= (((one >> 16) & 0xFFFF) >= dropped_steps).to(tl.int32) << 8
    word |= ((other & 0xFFFF) >= dropped_steps).to(tl.int32) << 16
    return word | (((other >> 16) & 0xFFFF) >= dropped_steps).to(tl.int32) << 24
