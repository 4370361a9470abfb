"""ComboLoss: hand-computed values, MONAI's figures, gradients, extreme logits, empty and full masks."""

import math

import pytest
import torch

from sft.config import TrainConfig
from sft.losses import bce_loss, combo, dice_loss, focal_loss
from sft.model.sa2va import upsample

# Logits with round probabilities: sigmoid(log 3) = 3/4, sigmoid(-log 3) = 1/4, sigmoid(0) = 1/2.
LOG3 = math.log(3)
LOGITS_122 = torch.tensor([[[LOG3, -LOG3], [0.0, LOG3]]], dtype=torch.float64)
MASKS_122 = torch.tensor([[[1, 0], [1, 0]]])

TERMS = {
    "dice": lambda logits, masks: dice_loss(logits, masks, 1.0),
    "focal": lambda logits, masks: focal_loss(logits, masks, 0.25, 2.0),
    "focal, gamma 0.5": lambda logits, masks: focal_loss(logits, masks, 0.25, 0.5),
    "focal, gamma 0": lambda logits, masks: focal_loss(logits, masks, 0.25, 0.0),
    "bce": bce_loss,
}


def test_dice_of_a_2x2_image_by_hand():
    # p = 3/4, 1/4, 1/2, 3/4 and m = 1, 0, 1, 0: overlap 5/4, sum(p) 9/4, sum(m) 2.
    assert dice_loss(LOGITS_122, MASKS_122, 1.0).item() == pytest.approx(1 - (2.5 + 1) / (2.25 + 2 + 1))


def test_bce_of_a_2x2_image_by_hand():
    # p_t = 3/4, 3/4, 1/2, 1/4.
    expected = -(2 * math.log(3 / 4) + math.log(1 / 2) + math.log(1 / 4)) / 4
    assert bce_loss(LOGITS_122, MASKS_122).item() == pytest.approx(expected)


def test_focal_of_a_2x2_image_by_hand_alpha_weighs_the_vessels():
    # (alpha_t, p_t): vessel 3/4, background 3/4, vessel 1/2, background 1/4.
    pixels = [(0.2, 3 / 4), (0.8, 3 / 4), (0.2, 1 / 2), (0.8, 1 / 4)]
    expected = sum(-alpha * (1 - p) ** 2 * math.log(p) for alpha, p in pixels) / 4
    assert focal_loss(LOGITS_122, MASKS_122, 0.2, 2.0).item() == pytest.approx(expected)


def test_focal_with_gamma_0_and_alpha_half_is_half_the_bce():
    focal = focal_loss(LOGITS_122, MASKS_122, 0.5, 0.0)
    torch.testing.assert_close(focal, bce_loss(LOGITS_122, MASKS_122) / 2)


# Recorded from MONAI 1.6.1 in fp64, with a channel axis put in:
# DiceLoss(sigmoid=True, smooth_nr=s, smooth_dr=s, reduction="none")(logits[:, None], masks[:, None]).flatten()
# FocalLoss(alpha=alpha, gamma=gamma, reduction="none")(logits[:, None], masks[:, None]).mean((1, 2, 3))
# The last mask is empty.
MONAI_LOGITS = [
    [[-3.0, -1.0, 0.5], [2.0, 4.0, -0.25]],
    [[1.5, -2.5, 0.0], [-6.0, 3.0, 7.0]],
    [[-1.0, -2.0, -3.0], [-4.0, 0.25, 1.0]],
]
MONAI_MASKS = [[[0, 0, 1], [1, 1, 0]], [[1, 1, 0], [0, 0, 1]], [[0, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize(
    ("loss", "settings", "figures"),
    [
        (dice_loss, (1.0,), [0.1752783246835924, 0.3487582586713801, 0.6359388771232497]),
        (dice_loss, (0.01,), [0.20304480592645002, 0.4030668648561878, 0.9943078049013921]),
        (focal_loss, (0.25, 2.0), [0.01953705959022045, 0.45949479937553406, 0.1234346330165863]),
        (focal_loss, (0.6, 0.5), [0.07069679349660873, 0.48756468296051025, 0.13076235353946686]),
        (focal_loss, (0.25, 0.0), [0.14302168786525726, 0.5839102268218994, 0.3307659924030304]),
    ],
)
def test_terms_equal_monai(loss, settings, figures):
    logits, masks = torch.tensor(MONAI_LOGITS, dtype=torch.float64), torch.tensor(MONAI_MASKS)
    # MONAI's focal modulation is computed in fp32, hence the tolerance.
    torch.testing.assert_close(loss(logits, masks, *settings), torch.tensor(figures).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", TERMS)
def test_gradients_agree_with_finite_differences(name):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    masks = torch.rand(2, 3, 4, generator=generator) < 0.4
    assert torch.autograd.gradcheck(lambda logits: TERMS[name](logits, masks), (logits,))


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_losses_and_gradients(name, dtype):
    values = torch.tensor([-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4], dtype=dtype)
    logits = torch.stack((values, values))[None].requires_grad_()
    masks = torch.stack((torch.ones(7), torch.zeros(7)))[None]
    loss = TERMS[name](logits, masks)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


def test_a_saturated_error_still_costs_its_logit_and_has_a_gradient():
    logits = torch.full((1, 1, 1), -1e4, requires_grad=True)
    masks = torch.ones(1, 1, 1)
    for loss, slope in ((bce_loss(logits, masks), 1.0), (focal_loss(logits, masks, 0.25, 2.0), 0.25)):
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.item() == pytest.approx(slope * 1e4)
        assert gradient.item() == pytest.approx(-slope)


@pytest.mark.parametrize("vessel", [0.0, 1.0])
def test_empty_and_full_masks_cost_nothing_when_right_and_much_when_wrong(vessel):
    masks = torch.full((1, 8, 8), vessel)
    right = torch.full((1, 8, 8), 50.0 if vessel else -50.0)
    for loss in TERMS.values():
        assert loss(right, masks).item() == pytest.approx(0, abs=1e-6)
    # 64 wrong pixels against a smoothing of one.
    assert dice_loss(-right, masks, 1.0).item() == pytest.approx(1 - 1 / 65)
    assert bce_loss(-right, masks).item() == pytest.approx(50)
    assert focal_loss(-right, masks, 0.25, 2.0).item() == pytest.approx(50 * (0.25 if vessel else 0.75))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_cost_what_the_same_values_cost_in_fp32(dtype):
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(2, 16, 16, generator=generator)).to(dtype)
    masks = torch.rand(2, 16, 16, generator=generator) < 0.1
    for loss in TERMS.values():
        assert loss(logits, masks).dtype == torch.float32
        assert torch.equal(loss(logits, masks), loss(logits.float(), masks))


def test_bool_masks_equal_0_1_masks():
    generator = torch.Generator().manual_seed(2)
    logits, masks = torch.randn(2, 5, 5, generator=generator), torch.rand(2, 5, 5, generator=generator) < 0.3
    for loss in TERMS.values():
        assert torch.equal(loss(logits, masks), loss(logits, masks.float()))
        assert torch.equal(loss(logits, masks), loss(logits, masks.to(torch.uint8)))


def test_combo_is_the_weighted_sum_of_means_over_images():
    config = TrainConfig(
        dice_weight=2.0, focal_weight=3.0, bce_weight=0.5, focal_alpha=0.6, focal_gamma=0.5, dice_smooth=0.01
    )
    logits, masks = torch.tensor(MONAI_LOGITS, dtype=torch.float64), torch.tensor(MONAI_MASKS)
    terms = combo(logits, masks, config)
    assert set(terms) == {"dice", "focal", "bce", "total"}
    # The figures recorded above for these settings: per image first, not over the batch's pixels.
    dice = (0.20304480592645002 + 0.4030668648561878 + 0.9943078049013921) / 3
    focal = (0.07069679349660873 + 0.48756468296051025 + 0.13076235353946686) / 3
    bce = bce_loss(logits, masks).mean().item()
    assert terms["dice"].item() == pytest.approx(dice)
    assert terms["focal"].item() == pytest.approx(focal)
    assert terms["bce"].item() == pytest.approx(bce)
    assert terms["total"].item() == pytest.approx(2 * dice + 3 * focal + 0.5 * bce)


def test_combo_compiles_into_one_graph_with_the_same_values_and_gradients():
    config = TrainConfig()
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 6, 7, generator=generator, requires_grad=True)
    masks = torch.rand(2, 6, 7, generator=generator) < 0.3
    compiled = torch.compile(combo, fullgraph=True, backend="aot_eager")
    expected, actual = combo(logits, masks, config), compiled(logits, masks, config)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(terms["total"], logits)[0] for terms in (expected, actual)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("masks_shape", [(2, 1, 4, 4), (2, 4, 3), (1, 4, 4)])
def test_shapes_that_would_broadcast_are_refused(masks_shape):
    with pytest.raises(ValueError, match="must both be"):
        bce_loss(torch.zeros(2, 4, 4), torch.zeros(masks_shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(8, 8), (32, 32), (13, 21), (5, 3)], ids=str)
def test_combo_on_a_grid_is_the_combo_of_the_logits_as_the_model_enlarges_them(size, dtype):
    """Training and validation must see one and the same mask."""
    generator = torch.Generator().manual_seed(4)
    logits = (3 * torch.randn(2, 8, 8, generator=generator)).to(dtype).requires_grad_()
    masks = torch.rand(2, *size, generator=generator) < 0.3
    config = TrainConfig(dice_weight=2.0, focal_weight=3.0, bce_weight=0.5)
    on_grid, enlarged = combo(logits, masks, config), combo(upsample(logits, size), masks, config)
    assert all(torch.equal(on_grid[name], enlarged[name]) for name in enlarged)
    gradients = [torch.autograd.grad(terms["total"], logits)[0] for terms in (on_grid, enlarged)]
    assert torch.equal(*gradients)


def test_combo_keeps_fp64_on_a_grid_and_its_gradient_agrees_with_finite_differences():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    masks = torch.rand(2, 7, 5, generator=generator) < 0.4
    assert torch.autograd.gradcheck(lambda logits: combo(logits, masks, TrainConfig())["total"], (logits,))


def test_total_alone_has_a_gradient():
    """On every device: the terms are for the log."""
    terms = combo(torch.zeros(1, 4, 4, requires_grad=True), torch.ones(1, 4, 4, dtype=torch.bool), TrainConfig())
    assert [name for name, value in terms.items() if value.requires_grad] == ["total"]


@pytest.mark.parametrize("shapes", [((2, 4, 4), (1, 8, 8)), ((2, 1, 4, 4), (2, 4, 4)), ((2, 4, 4), (2, 1, 4, 4))])
def test_combo_refuses_what_is_not_one_mask_for_each_image(shapes):
    with pytest.raises(ValueError, match="must be"):
        combo(torch.zeros(shapes[0]), torch.zeros(shapes[1], dtype=torch.bool), TrainConfig())


def test_combo_refuses_soft_masks():
    """The kernels would take 0.3 for 1, the formulas would not."""
    with pytest.raises(ValueError, match="must be bool or integers"):
        combo(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), TrainConfig())
