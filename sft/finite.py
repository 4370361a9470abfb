"""Stops a run whose loss or gradient is no longer finite, without waiting for the device at every step.

Takes losses and gradient norms as tensors; knows nothing of the engine or the model.
"""

from collections.abc import Iterable

import torch
import torch.distributed
from torch import Tensor

from sft.config import TrainConfig, UserError

NEVER = torch.iinfo(torch.int64).max


class DivergedError(UserError):
    """The loss, the gradient or a weight is not finite: training cannot go on from here."""


def check_weights(finite: Iterable[Tensor]) -> None:
    """Stops before a checkpoint is written; every rank passes the same.

    Args:
        finite: a bool per trained weight: whether all of its values are finite.

    Raises:
        DivergedError: one is not.
    """
    finite = list(finite)
    if finite and not bool(torch.stack(finite).all()):
        raise DivergedError("a trained weight is not finite (NaN or infinite): the checkpoint was not written")


class FiniteWatch:
    """Keeps, on the device, the first step with a loss or gradient that is not finite; only `check` waits for it.

    In bf16 under ZeRO-1 and 2 DeepSpeed applies such a step, otherwise it drops the step and goes on; this sees both.
    """

    def __init__(self, device: torch.device) -> None:
        self._first_bad_step = torch.full((), NEVER, dtype=torch.int64, device=device)

    def update(self, loss: Tensor, gradient_norm: Tensor | float | None, step: int) -> None:
        """Looks at one micro-batch.

        Args:
            loss: this rank's, scalar.
            gradient_norm: of the last optimizer step, `ds_engine.gradient_norm()`; None before the first.
            step: the optimizer step the two belong to.
        """
        finite = torch.isfinite(loss.detach())
        if gradient_norm is not None:
            finite = finite & torch.isfinite(torch.as_tensor(gradient_norm, device=loss.device))
        first = self._first_bad_step
        self._first_bad_step = torch.where(finite, first, first.clamp(max=step))

    def check(self, config: TrainConfig) -> None:
        """Stops every rank if any saw a bad step. Collective; call on logging steps and before validation.

        Raises:
            DivergedError: names the step and what to change.
        """
        first = self._first_bad_step.clone()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(first, op=torch.distributed.ReduceOp.MIN)
        if (step := int(first)) == NEVER:
            return
        raise DivergedError(
            f"step {step}: the loss or its gradient is not finite (NaN or infinite); no checkpoint holds it. Lower "
            f"learning_rate (now {config.learning_rate:g}) or max_grad_norm (now {config.max_grad_norm:g}), raise "
            f"warmup_ratio (now {config.warmup_ratio:g}) or use precision fp32 (now {config.precision}), then start "
            "again or resume from the last checkpoint"
        )
