"""ComboLoss's kernels against the formulas in fp64: values, gradients, shapes, extremes, the same bits on every run.

Marked `gpu`. Without one, `TRITON_INTERPRET=1 python -m pytest tests/test_losses_gpu.py` runs the same kernels on the
CPU where Triton is installed, the large shapes left out.
"""

import os
from functools import partial

import pytest
import torch

from sft import losses
from sft.config import TrainConfig

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else pytest.mark.gpu
CONFIG = TrainConfig(
    dice_weight=2.0, focal_weight=3.0, bce_weight=0.5, focal_alpha=0.6, focal_gamma=1.5, dice_smooth=0.7
)
# A scale with a rounded position: fp32 misplaces pixel 1000 by up to 3e-5 of the grid's step, torch's own kernel too.
EXACT, ROUNDED = 5e-6, 2e-4
EQUAL_SIZES = [(1, 1, 1), (2, 8, 8), (3, 50, 47), (33, 5, 3)]
RESIZED = [
    ((2, 8, 8), (32, 32), EXACT),
    ((2, 32, 32), (8, 8), EXACT),
    ((1, 1, 1), (5, 7), EXACT),
    ((2, 5, 5), (1, 1), EXACT),
    ((2, 16, 20), (37, 61), ROUNDED),  # up by no whole number
    ((2, 40, 30), (17, 9), ROUNDED),  # down: some logits are looked at by no pixel
    ((1, 12, 30), (30, 12), ROUNDED),  # up one way, down the other
    ((1, 3, 70), (70, 3), ROUNDED),
    ((1, 3, 130), (9, 150), ROUNDED),  # several programs side by side
    ((17, 4, 6), (7, 5), ROUNDED),
]
large = pytest.mark.skipif(INTERPRETED, reason="too slow without a GPU")
LARGE = [
    pytest.param((2, 256, 256), (256, 256), EXACT, marks=large),
    pytest.param((8, 256, 256), (1024, 1024), EXACT, marks=large),
    pytest.param((2, 256, 256), (999, 960), ROUNDED, marks=large),
    pytest.param((2, 256, 256), (3000, 2000), ROUNDED, marks=large),
    pytest.param((2, 256, 256), (100, 61), ROUNDED, marks=large),
    pytest.param((1, 64, 64), (4096, 4096), EXACT, marks=large),
]


def inputs(shape, size, spread=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(shape, generator=generator)
    masks = torch.rand((shape[0], *size), generator=generator) < 0.3
    return logits.to(DEVICE), masks.to(DEVICE)


def kernels(logits, masks, config=CONFIG):
    """What `losses.combo` does with a CUDA tensor, also where the device is interpreted."""
    return losses._by_kernels(logits, masks, config)


def with_gradient(combo, logits, masks, factor=1.0):
    logits = logits.detach().requires_grad_()
    terms = combo(logits, masks)
    (gradient,) = torch.autograd.grad(factor * terms["total"], logits)
    return {name: value.detach() for name, value in terms.items()}, gradient


def assert_equal_the_formulas(logits, masks, tolerance=EXACT, config=CONFIG):
    actual, gradient = with_gradient(partial(kernels, config=config), logits, masks)
    expected, exact = with_gradient(partial(losses.combo, config=config), logits.double(), masks)
    assert list(actual) == list(expected)
    for name, value in actual.items():
        assert value.dtype == torch.float32 and value.shape == ()
        torch.testing.assert_close(
            value.double(), expected[name], rtol=tolerance, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )
    torch.testing.assert_close(gradient.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


@pytest.mark.parametrize("shape", EQUAL_SIZES, ids=str)
def test_logits_of_the_masks_size_cost_what_the_formulas_say(shape):
    assert_equal_the_formulas(*inputs(shape, shape[1:]))


@pytest.mark.parametrize(("shape", "size", "tolerance"), RESIZED + LARGE, ids=str)
def test_logits_on_a_grid_cost_what_their_interpolation_costs(shape, size, tolerance):
    """Terms and the gradient of the grid's own logits, up, down and both, by whole numbers and others."""
    assert_equal_the_formulas(*inputs(shape, size), tolerance)


@pytest.mark.parametrize("size", [(16, 16), (40, 29)], ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 10.0])
def test_settings_reach_the_kernels(size, gamma):
    config = TrainConfig(
        focal_gamma=gamma, focal_alpha=0.1, dice_smooth=100.0, dice_weight=0.3, focal_weight=20.0, bce_weight=0.0
    )
    assert_equal_the_formulas(*inputs((2, 16, 16), size), ROUNDED, config)


@pytest.mark.parametrize("size", [(16, 16), (64, 64)], ids=str)
@pytest.mark.parametrize("vessel", [False, True])
def test_empty_and_full_masks(size, vessel):
    logits, masks = inputs((3, 16, 16), size)
    masks[1:] = vessel
    assert_equal_the_formulas(logits, masks)


@pytest.mark.parametrize("size", [(2, 7), (4, 28)], ids=str)
@pytest.mark.parametrize("largest", [100.0, 1e4])
def test_extreme_logits_give_finite_losses_and_gradients_and_the_right_ones(size, largest):
    row = torch.tensor([-largest, -88.0, -20.0, 0.0, 20.0, 88.0, largest])
    logits = torch.stack((row, row))[None].to(DEVICE)
    masks = torch.zeros(1, *size, dtype=torch.bool, device=DEVICE)
    masks[:, : size[0] // 2] = True
    terms, gradient = with_gradient(kernels, logits, masks)
    assert all(value.isfinite() for value in terms.values()) and gradient.isfinite().all()
    assert_equal_the_formulas(logits, masks, ROUNDED)


def test_small_costs_are_not_lost_in_rounding():
    """log(1 + x) of x = e^-17 is 0 in fp32; the cost of a pixel on the right side is not."""
    logits = torch.full((1, 4, 4), 17.0, device=DEVICE)
    masks = torch.ones(1, 4, 4, dtype=torch.bool, device=DEVICE)
    terms = kernels(logits, masks)
    assert terms["bce"].item() == pytest.approx(4.1399e-8, rel=1e-3)


@pytest.mark.parametrize("size", [(16, 16), (37, 61)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_cost_what_the_same_values_cost_in_fp32(size, dtype):
    """And their gradient is the fp32 one, rounded once (the interpreter cuts bf16 off)."""
    logits, masks = inputs((2, 16, 16), size)
    half, gradient = with_gradient(kernels, logits.to(dtype), masks)
    whole, exact = with_gradient(kernels, logits.to(dtype).float(), masks)
    torch.testing.assert_close(half, whole, rtol=1e-6, atol=0)
    assert gradient.dtype == dtype
    step = torch.finfo(dtype).eps * (1.0 if INTERPRETED else 0.51)
    torch.testing.assert_close(gradient.float(), exact, rtol=step, atol=6e-8 if dtype == torch.float16 else 0)


@pytest.mark.parametrize("size", [(16, 24), (37, 61)], ids=str)
def test_strided_inputs_and_integer_masks_equal_plain_ones(size):
    logits, masks = inputs((2, 16, 24), size)
    plain, exact = with_gradient(kernels, logits, masks)
    strided = torch.stack((logits, -logits), dim=-1)[..., 0]
    turned = masks.mT.contiguous().mT
    assert not strided.is_contiguous() and not turned.is_contiguous()
    for other in (turned, masks.to(torch.int64), masks.to(torch.uint8)):
        terms, gradient = with_gradient(kernels, strided, other)
        assert all(torch.equal(terms[name], plain[name]) for name in plain)
        assert torch.equal(gradient, exact)


@pytest.mark.parametrize("size", [(70, 90), (90, 70), pytest.param((1024, 1024), marks=large)], ids=str)
def test_every_run_gives_the_same_bits(size):
    """A resumed run continues the same one only if no sum depends on the order in which programs end."""
    logits, masks = inputs((4, 70, 90), size)
    first, exact = with_gradient(kernels, logits, masks)
    for _ in range(1 if INTERPRETED else 20):
        terms, gradient = with_gradient(kernels, logits, masks)
        assert all(torch.equal(terms[name], first[name]) for name in first)
        assert torch.equal(gradient, exact)


@pytest.mark.parametrize("size", [(8, 8), (20, 11)], ids=str)
def test_the_gradient_scales_with_what_comes_from_above(size):
    """Gradient accumulation divides the loss; 1/4 is exact."""
    logits, masks = inputs((2, 8, 8), size)
    _, whole = with_gradient(kernels, logits, masks)
    _, quarter = with_gradient(kernels, logits, masks, factor=0.25)
    assert torch.equal(quarter, whole / 4)


def test_total_alone_has_a_gradient():
    logits, masks = inputs((2, 8, 8), (20, 11))
    terms = kernels(logits.requires_grad_(), masks)
    assert [name for name, value in terms.items() if value.requires_grad] == ["total"]
    with torch.no_grad():
        assert not kernels(logits, masks)["total"].requires_grad


@pytest.mark.parametrize("size", [(8, 8), (16, 16)], ids=str)
def test_a_logit_that_is_no_number_makes_the_loss_none(size):
    """The loop stops a diverged run by its loss; a maximum that drops NaN would hide it."""
    logits, masks = inputs((2, 8, 8), size)
    logits[1, 3, 3] = float("nan")
    terms, gradient = with_gradient(kernels, logits, masks)
    assert all(value.isnan() for value in terms.values())
    assert gradient[1, 3, 3].isnan()


@pytest.mark.skipif(INTERPRETED, reason="needs CUDA tensors")
def test_combo_takes_the_kernels_on_a_gpu_and_the_formulas_for_fp64():
    logits, masks = inputs((2, 8, 8), (20, 11))
    from sft import loss_kernels

    total = losses.combo(logits.requires_grad_(), masks, CONFIG)["total"]
    assert isinstance(total.grad_fn, loss_kernels._Combo._backward_cls)
    assert losses.combo(logits.double(), masks, CONFIG)["total"].dtype == torch.float64


@pytest.mark.skipif(INTERPRETED, reason="needs CUDA's figures")
def test_logits_never_exist_at_the_masks_size():
    """Forward and backward of 8 x 1024 x 1024 take 2 MiB of gradient, 8 MiB gathered along y and a few sums, not 32."""
    logits, masks = inputs((8, 256, 256), (1024, 1024))
    with_gradient(partial(losses.combo, config=CONFIG), logits, masks)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with_gradient(partial(losses.combo, config=CONFIG), logits, masks)
    assert torch.cuda.max_memory_allocated() - before < 12 * 2**20
