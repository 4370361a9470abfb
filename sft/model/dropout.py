"""Dropout whose masks cost little where layers are compiled for a GPU.

Takes and gives activations, as `nn.Dropout` does; everywhere else it is `nn.Dropout`. A compiled layer would draw the
128 random bits of Philox (Salmon et al. 2011, 10 rounds) for each value and use 24 of them: with LoRA on seven linears
that takes a tenth of a step. Here one draw of 7 rounds, which pass the paper's tests, decides eight values.

The kernel stands apart: torch for CPUs does not bring Triton.
"""

import torch
from torch import Tensor, nn

if torch.cuda.is_available():
    from sft.model import dropout_kernel

STEPS = 2**16  # of the probability: a p of 0.05 is off by 5e-6


class Dropout(nn.Dropout):
    """`nn.Dropout` with another source of masks in compiled layers on a GPU."""

    def forward(self, input: Tensor) -> Tensor:
        """See `nn.Dropout`; the name of the argument is its."""
        if not (self.training and input.is_cuda and torch.compiler.is_compiling()):
            return super().forward(input)
        dropped_steps = min(round(self.p * STEPS), STEPS - 1)
        kept = dropout_kernel.kept_of(input.numel(), dropped_steps, input.device).view(input.shape)
        return torch.where(kept != 0, input * (STEPS / (STEPS - dropped_steps)), 0)


def replace_in(module: nn.Module) -> None:
    """Puts `Dropout` in the place of every plain `nn.Dropout` among the LoRA layers of a model."""
    for layer in module.modules():
        for name, dropout in getattr(layer, "lora_dropout", {}).items():
            if type(dropout) is nn.Dropout:
                layer.lora_dropout[name] = Dropout(dropout.p)
