"""ComboLoss and its terms: pure functions of mask logits and masks.

Takes logits (before the sigmoid) and binary masks, whose size is the loss's; gives one value per image for each term,
or the weighted sum over the batch. Knows nothing of the model, of the loop or of thresholds.

Shapes: B images, H x W pixels, h x w grid of the mask decoder. Computed in fp32: fp16 and bf16 logits are cast first,
fp64 stays. Every finite logit gives a finite value and a finite gradient: no term takes the logarithm of a probability.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate, logsigmoid

from sft.config import TrainConfig


def combo(logits_Bhw: Tensor, masks_BHW: Tensor, config: TrainConfig) -> dict[str, Tensor]:
    """ComboLoss: dice_weight x Dice + focal_weight x Focal + bce_weight x BCE, each the mean over images of its term.

    Logits of another size than the masks are brought to it as `upsample` of the model does: bilinear in fp32. On a GPU
    that happens inside the loss (loss_kernels.py), in one pass forward and one backward whose gradient is the same bits
    on every run; on a CPU, and for fp64, by the formulas of this file.

    Args:
        logits_Bhw: mask logits on a grid of any size, any floating type.
        masks_BHW: bool or integers 0/1, at their own size.
        config: gives dice_weight, focal_weight, bce_weight, dice_smooth, focal_alpha and focal_gamma.

    Returns:
        Scalars: "dice", "focal" and "bce" without their weights, for the log, and "total" with them, which alone has a
        gradient.

    Raises:
        ValueError: not one mask (H, W) for each (h, w) of logits, or masks of a floating type.
    """
    if logits_Bhw.ndim != 3 or masks_BHW.ndim != 3 or len(logits_Bhw) != len(masks_BHW):
        raise ValueError(
            f"logits {tuple(logits_Bhw.shape)} and masks {tuple(masks_BHW.shape)} must be (B, h, w) and (B, H, W)"
        )
    if masks_BHW.is_floating_point():
        raise ValueError(f"masks of {masks_BHW.dtype} must be bool or integers 0/1")
    if logits_Bhw.is_cuda and logits_Bhw.dtype != torch.float64:
        return _by_kernels(logits_Bhw, masks_BHW, config)
    # Cast here, not in each term: the gradients of the terms are summed before they are rounded to bf16.
    logits_Bhw = logits_Bhw.to(torch.promote_types(logits_Bhw.dtype, torch.float32))
    if logits_Bhw.shape != masks_BHW.shape:
        size = masks_BHW.shape[1:]
        logits_Bhw = interpolate(logits_Bhw[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    return by_formulas(logits_Bhw, masks_BHW, config)


def by_formulas(logits_BHW: Tensor, masks_BHW: Tensor, config: TrainConfig) -> dict[str, Tensor]:
    """`combo` from the three functions below, for logits at the masks' own size, on any device."""
    terms = {
        "dice": dice_loss(logits_BHW, masks_BHW, config.dice_smooth).mean(),
        "focal": focal_loss(logits_BHW, masks_BHW, config.focal_alpha, config.focal_gamma).mean(),
        "bce": bce_loss(logits_BHW, masks_BHW).mean(),
    }
    total = config.dice_weight * terms["dice"] + config.focal_weight * terms["focal"] + config.bce_weight * terms["bce"]
    return {name: value.detach() for name, value in terms.items()} | {"total": total}


def dice_loss(logits_BHW: Tensor, masks_BHW: Tensor, smooth: float) -> Tensor:
    """Soft Dice loss per image (Milletari et al. 2016, with the sums of p and m unsquared).

    1 - (2 sum(p m) + smooth) / (sum(p) + sum(m) + smooth), p = sigmoid(logits).
    An empty mask leaves 1 - smooth / (sum(p) + smooth): 0 when nothing is predicted, near 1 once sum(p) is far above
    smooth. A full mask is no special case: 0 when p = 1 everywhere.

    Args:
        logits_BHW: mask logits.
        masks_BHW: 0/1 or bool.
        smooth: in pixels, above 0 (0 would be 0/0 on an empty mask with an empty prediction).

    Returns:
        (B,) in [0, 1].
    """
    logits_BHW, masks_BHW = _prepare(logits_BHW, masks_BHW)
    probabilities_BHW = logits_BHW.sigmoid()
    overlap_B = (probabilities_BHW * masks_BHW).sum((1, 2))
    sizes_B = probabilities_BHW.sum((1, 2)) + masks_BHW.sum((1, 2))
    return 1 - (2 * overlap_B + smooth) / (sizes_B + smooth)


def focal_loss(logits_BHW: Tensor, masks_BHW: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss per image, mean over pixels (Lin et al. 2017, equation 5): -alpha_t (1 - p_t)^gamma log(p_t).

    p_t is the probability of the pixel's true class; alpha_t is alpha on vessel and 1 - alpha on background.
    An empty mask weighs every pixel 1 - alpha, a full one alpha; neither is a special case.

    Args:
        logits_BHW: mask logits.
        masks_BHW: 0/1 or bool.
        alpha: weight of vessel pixels, 0 to 1.
        gamma: 0 or more; 0 is the alpha-weighted cross entropy.

    Returns:
        (B,), 0 or more.
    """
    logits_BHW, masks_BHW = _prepare(logits_BHW, masks_BHW)
    margin_BHW = _margin(logits_BHW, masks_BHW)
    # (1 - p_t)^gamma as an exponential: a power with gamma < 1 has an infinite slope, hence a NaN gradient, at p_t = 1.
    modulation_BHW = (gamma * logsigmoid(-margin_BHW)).exp()
    alpha_BHW = alpha * masks_BHW + (1 - alpha) * (1 - masks_BHW)
    return (-alpha_BHW * modulation_BHW * logsigmoid(margin_BHW)).mean((1, 2))


def bce_loss(logits_BHW: Tensor, masks_BHW: Tensor) -> Tensor:
    """Binary cross entropy per image, mean over pixels. Empty and full masks are no special case.

    Args:
        logits_BHW: mask logits.
        masks_BHW: 0/1 or bool.

    Returns:
        (B,), 0 or more.
    """
    logits_BHW, masks_BHW = _prepare(logits_BHW, masks_BHW)
    return -logsigmoid(_margin(logits_BHW, masks_BHW)).mean((1, 2))


def _by_kernels(logits_Bhw: Tensor, masks_BHW: Tensor, config: TrainConfig) -> dict[str, Tensor]:
    from sft import loss_kernels  # imports Triton, which torch for CPUs does not bring

    weights = loss_kernels.Weights(
        dice=config.dice_weight,
        focal=config.focal_weight,
        bce=config.bce_weight,
        smooth=config.dice_smooth,
        alpha=config.focal_alpha,
        gamma=config.focal_gamma,
    )
    return loss_kernels.combo(logits_Bhw, masks_BHW, weights)


def _prepare(logits_BHW: Tensor, masks_BHW: Tensor) -> tuple[Tensor, Tensor]:
    if logits_BHW.ndim != 3 or logits_BHW.shape != masks_BHW.shape:
        # Broadcasting would accept (B, 1, H, W) against (B, H, W) and compare every image with every mask.
        raise ValueError(
            f"logits {tuple(logits_BHW.shape)} and masks {tuple(masks_BHW.shape)} must both be (B, H, W) of one size"
        )
    if logits_BHW.dtype in (torch.float16, torch.bfloat16):
        logits_BHW = logits_BHW.float()
    return logits_BHW, masks_BHW.to(logits_BHW.dtype)


def _margin(logits_BHW: Tensor, masks_BHW: Tensor) -> Tensor:
    """The logit of p_t: positive where the pixel is on the right side of 0.5."""
    return logits_BHW * (2 * masks_BHW - 1)
