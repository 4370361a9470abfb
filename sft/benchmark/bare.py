"""The engine's step by torch alone: what DeepSpeed adds to a step on one rank shows against it.

Takes an `Engine` and works on its model and flat vectors: fp32 masters, clipping, fused AdamW, the compute copy written
back. One rank, no accumulation.
"""

import torch
from torch import Tensor, nn

from sft.config import TrainConfig
from sft.engine import Engine, in_this_thread


class BareEngine:
    """Stands in for an `Engine` in `train_step`; the engine itself takes no step meanwhile.

    Args:
        engine: with vectors, that is ZeRO-1 or 2.
        config: learning rate, weight decay, norm.
    """

    def __init__(self, engine: Engine, config: TrainConfig):
        assert engine.vectors, "ZeRO-3 holds the model itself"
        self.model, self._vectors, self._most = engine.model, engine.vectors, config.max_grad_norm
        self._masters = [nn.Parameter(vector.parameter.detach().float().clone()) for vector in engine.vectors]
        self._optimizer = torch.optim.AdamW(
            self._masters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self._norm: Tensor | None = None

    def __call__(self, *inputs: object) -> object:
        """The model's forward pass."""
        return self.model(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the leaves."""
        with in_this_thread():
            loss.backward()

    def step(self) -> None:
        """Clips, updates the masters, rounds them into the compute copy."""
        for vector, master in zip(self._vectors, self._masters, strict=True):
            master.grad = vector.take_gradients().float()
        self._norm = nn.utils.clip_grad_norm_(self._masters, self._most)
        self._optimizer.step()
        with torch.no_grad():
            for vector, master in zip(self._vectors, self._masters, strict=True):
                vector.parameter.copy_(master)

    def gradient_norm(self) -> Tensor | None:
        """Before clipping."""
        return self._norm
