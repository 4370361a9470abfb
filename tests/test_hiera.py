"""Protects SAM2's image encoder from our shorter way through its blocks: the numbers are those of transformers.

The kernels' tests are marked `gpu`; without one, `TRITON_INTERPRET=1 python -m pytest tests/test_hiera.py` runs them on
the CPU where Triton is installed.
"""

import copy
import os

import pytest
import torch
from torch import nn
from transformers import Sam2HieraDetConfig, Sam2HieraDetModel, Sam2VisionConfig
from transformers.models.sam2.modeling_sam2 import Sam2VisionNeck

from sft.model import hiera

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
kernels = (lambda test: test) if INTERPRETED else pytest.mark.gpu


def encoder(image_px: int) -> Sam2HieraDetModel:
    """Two blocks in each of the four stages, the sixth block global; windows of the published sides."""
    torch.manual_seed(0)
    config = Sam2HieraDetConfig(
        hidden_size=24,
        num_attention_heads=1,
        image_size=[image_px, image_px],
        blocks_per_stage=[2, 2, 2, 2],
        embed_dim_per_stage=[24, 48, 96, 192],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[8, 4, 16, 8],
        window_positional_embedding_background_size=[7, 7],
        global_attention_blocks=[5],
    )
    model = Sam2HieraDetModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_neck_gives_the_bits_of_transformers(dtype):
    """Its maps and gradients, without the position encodings that come with them there."""
    torch.manual_seed(0)
    theirs = Sam2VisionNeck(Sam2VisionConfig(fpn_hidden_size=32, backbone_channel_list=[192, 96, 48, 24])).to(dtype)
    ours = copy.deepcopy(theirs)
    hiera.lighten(ours)
    stages = [torch.randn(2, 64 >> n, 64 >> n, 24 << n).to(dtype).requires_grad_() for n in range(4)]
    found = []
    for neck in (theirs, ours):
        maps, encodings = neck(stages)
        gradients = torch.autograd.grad(
            sum(map_.float().square().sum() for map_ in maps), [*stages, *neck.parameters()]
        )
        found.append((*(map_.detach() for map_ in maps), *gradients))
    assert not encodings
    assert len(found[0]) == len(found[1]) and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("image_px", [256, 160])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_blocks_give_the_bits_of_transformers(image_px, with_gradients):
    """256 pixels: 64 tokens a side, windows fit; 160: they do not, in the third stage."""
    theirs = encoder(image_px)
    ours = copy.deepcopy(theirs)
    hiera.lighten(ours)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    images = torch.randn(2, 3, image_px, image_px)
    found = []
    for model in (theirs, ours):
        with torch.set_grad_enabled(with_gradients):
            states = model(images).last_hidden_state
        if with_gradients:
            states.square().sum().backward()
        found.append((states.detach(), *(p.grad for p in model.parameters() if p.grad is not None)))
    assert len(found[0]) == len(found[1]) and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "width", "side", "channels"), [(8, 12, 4, 24), (4, 4, 0, 144), (6, 3, 3, 130)])
def test_norms_with_windows_are_those_of_torch(height, width, side, channels, dtype):
    from sft.model import hiera_kernels  # needs triton

    torch.manual_seed(0)
    norm = nn.LayerNorm(channels, eps=1e-6).to(DEVICE, dtype)
    norm.weight.data += 0.3 * torch.randn_like(norm.weight)
    norm.bias.data += 0.3 * torch.randn_like(norm.bias)
    map_BHWC = (1 + 3 * torch.randn(3, height, width, channels)).to(DEVICE, dtype)
    rounding = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    split = (lambda values: hiera._split(values, side)) if side else (lambda values: values)
    with torch.no_grad():
        windows = hiera_kernels.normed(map_BHWC, norm, side)
        torch.testing.assert_close(windows, split(norm(map_BHWC)), **rounding)
        total, normed = hiera_kernels.added(map_BHWC, windows, norm, side)
        expected = map_BHWC + (hiera._joined(windows, map_BHWC.shape) if side else windows)
        assert torch.equal(total, expected) or (INTERPRETED and dtype == torch.bfloat16)  # it rounds bf16 down
        torch.testing.assert_close(normed, norm(total), **rounding)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_blocks_by_kernels_give_the_numbers_of_transformers(dtype, tolerance):
    theirs = encoder(256).cuda()
    ours = copy.deepcopy(theirs).to(dtype)
    hiera.lighten(ours)
    images = torch.randn(2, 3, 256, 256, device="cuda")
    with torch.no_grad():
        expected, found = theirs(images).last_hidden_state, ours(images.to(dtype)).last_hidden_state.float()
    assert (found - expected).norm() < tolerance * expected.norm()
