"""Trainable parameters side by side in one vector per group, which the optimizer sees in their place.

Takes named parameters, gives vectors and the way back. DeepSpeed spends 0.3 ms of Python on each parameter and step,
more than a GPU needs for its share of the step; LoRA on a 4B model has 504 of them. It does not know DeepSpeed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGNED = 64  # elements: each parameter starts where a matrix product wants it


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in its vector."""

    name: str
    start: int
    shape: torch.Size

    @property
    def stop(self) -> int:
        """One behind its last element."""
        return self.start + self.shape.numel()


@dataclass(frozen=True)
class Layout:
    """The places of the parameters of one vector, in order; between them lie zeros."""

    places: tuple[Place, ...]
    size: int

    def cut(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector of `size` elements -> its parts by name, as views."""
        flat = vector.flatten()
        return {place.name: flat[place.start : place.stop].view(place.shape) for place in self.places}

    def join(self, parts: dict[str, Tensor | None], like: Tensor) -> Tensor:
        """Parts by name -> a vector of the dtype and device of `like`; None and what lies between counts as zero."""
        pieces, end = [], 0
        for place in self.places:
            part = parts[place.name]
            if place.start > end:
                pieces.append(like.new_zeros(place.start - end))
            if part is None:
                pieces.append(like.new_zeros(place.shape.numel()))
            elif part.dtype == like.dtype and part.device == like.device:  # a gradient: there are hundreds in a step
                pieces.append(part.reshape(-1))
            else:
                pieces.append(part.to(like).reshape(-1))
            end = place.stop
        if self.size > end:
            pieces.append(like.new_zeros(self.size - end))
        return torch.cat(pieces).detach()


def layout(shapes: dict[str, torch.Size], *, aligned: int = ALIGNED) -> Layout:
    """Places for named shapes, one after another, each start a multiple of `aligned` elements."""
    places, end = [], 0
    for name, shape in shapes.items():
        places.append(Place(name, end, torch.Size(shape)))
        end = -(-places[-1].stop // aligned) * aligned
    return Layout(tuple(places), end)


class Vector:
    """One group of trainable parameters (the leaves that autograd knows) and the vector that is optimised."""

    def __init__(self, leaves: dict[str, nn.Parameter], dtype: torch.dtype, device: torch.device):
        self.leaves = leaves
        self.layout = layout({name: leaf.shape for name, leaf in leaves.items()})
        start = torch.empty(0, dtype=dtype, device=device)
        self.parameter = nn.Parameter(self.layout.join(dict(leaves), start))

    def link(self) -> None:
        """Makes the leaves views of the vector's storage; call again whenever that has moved."""
        for name, part in self.layout.cut(self.parameter.data).items():
            self.leaves[name].data = part

    def take_gradients(self) -> Tensor:
        """The leaves' gradients as one vector, cleared where they were; a leaf without one counts as zero."""
        gradients = {name: leaf.grad for name, leaf in self.leaves.items()}
        for leaf in self.leaves.values():
            leaf.grad = None
        return self.layout.join(gradients, self.parameter)


def vectors_of(model: nn.Module, param_groups: list[dict], dtype: torch.dtype, device: torch.device) -> list[Vector]:
    """One vector per group of torch.optim's kind, its leaves under their names in the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [Vector({names[id(leaf)]: leaf for leaf in group["params"]}, dtype, device) for group in param_groups]


class _Handover(torch.autograd.Function):
    """A scalar 0 whose gradient with respect to each vector is the one already computed."""

    @staticmethod
    def forward(context, gradients: tuple[Tensor, ...], scaled: bool, *vectors: Tensor) -> Tensor:
        context.gradients, context.scaled = gradients, scaled
        return torch.zeros((), dtype=torch.float32, device=vectors[0].device)

    @staticmethod
    def backward(context, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients, context.gradients = context.gradients, ()  # the last reference: autograd takes them without a copy
        if not context.scaled:
            return None, None, *gradients
        return None, None, *(gradient * scale.to(gradient.dtype) for gradient in gradients)


class Vectors(nn.Module):
    """All vectors of a run as a module, the one that DeepSpeed holds.

    Args:
        vectors: one per group.
        scaled: whether the scalar's own gradient is another than 1: where micro-batches are averaged.
    """

    def __init__(self, vectors: list[Vector], scaled: bool):
        super().__init__()
        self._scaled = scaled
        self.vectors = nn.ParameterList(vector.parameter for vector in vectors)

    def forward(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """A scalar; its backward pass gives each vector its gradient from the tuple, times the scalar's own."""
        return _Handover.apply(gradients, self._scaled, *self.vectors)
