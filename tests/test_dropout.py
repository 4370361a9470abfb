"""Protects what dropout means where compiled layers draw their masks another way: rates, independence, gradients.

The kernel's tests are marked `gpu`; without one, `TRITON_INTERPRET=1 python -m pytest tests/test_dropout.py` runs those
of the masks on the CPU where Triton is installed.
"""

import os

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sft.model import dropout
from sft.model.dropout import STEPS, Dropout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
masks = (lambda test: test) if INTERPRETED else pytest.mark.gpu
COUNT = 100_003  # no multiple of what a program or a draw decides


def kept(p: float, count: int = COUNT, seed: int | None = None):
    from sft.model import dropout_kernel  # needs triton

    if seed is not None:
        torch.manual_seed(seed)
    return dropout_kernel.kept_of(count, round(p * STEPS), DEVICE)


@masks
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_every_place_is_dropped_equally_often(p):
    """Five standard deviations: over all, and over each of the eight bytes that one draw decides."""
    dropped = (kept(p, seed=0) == 0).double()
    assert dropped.mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / COUNT) ** 0.5)
    for place in range(8):
        part = dropped[place::8]
        assert part.mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / len(part)) ** 0.5)


@masks
def test_masks_are_zeros_and_ones_to_the_last_and_never_the_same_twice():
    first, again, other = kept(0.3, seed=0), kept(0.3), kept(0.3, seed=0)
    assert set(first.tolist()) == {0, 1} and len(first) == COUNT
    assert torch.equal(first, other) and not torch.equal(first, again)
    both = ((first == 0) & (again == 0)).double().mean().item()
    assert both == pytest.approx(0.09, abs=5 * (0.09 * 0.91 / COUNT) ** 0.5), "two masks know nothing of each other"
    shifted = ((first[1:] == 0) & (first[:-1] == 0)).double().mean().item()
    assert shifted == pytest.approx(0.09, abs=8 * (0.09 * 0.91 / COUNT) ** 0.5), "neighbours neither"
    assert kept(0.0, 40).all() and not kept(1 - 1 / STEPS, 40, seed=0).all()


class Twice(nn.Module):
    """Two dropouts of one input in one graph, as LoRA has on q, k and v."""

    def __init__(self):
        super().__init__()
        self.one, self.other = Dropout(0.25), Dropout(0.25)

    def forward(self, values):
        return self.one(values), self.other(values)


@pytest.mark.gpu
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_compiled_layer_drops_in_its_gradient_what_it_dropped(recomputed):
    module, compiled = Twice(), torch.compile(lambda module, values: module(values))
    values = torch.ones(1003, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    run = (lambda *inputs: checkpoint(compiled, *inputs, use_reentrant=False)) if recomputed else compiled
    one, other = run(module, values)
    assert not torch.equal(one, other)
    scale = 1 / 0.75
    assert set(one.float().unique().tolist()) == {0.0, torch.tensor(scale).bfloat16().item()}
    (gradient,) = torch.autograd.grad((one + 2 * other).float().sum(), values)
    assert torch.allclose(gradient.float(), ((one != 0) + 2.0 * (other != 0)) * scale, rtol=1e-2)
    torch.manual_seed(3)
    repeated = run(module, values)[0]
    torch.manual_seed(3)
    assert torch.equal(run(module, values)[0], repeated)
    assert torch.equal(run(module.eval(), values)[0], values)


def test_elsewhere_it_is_plain_dropout():
    values, plain = torch.randn(300, 7), nn.Dropout(0.2)
    torch.manual_seed(1)
    expected = plain(values)
    torch.manual_seed(1)
    assert torch.equal(Dropout(0.2)(values), expected)
    assert torch.equal(Dropout(0.2).eval()(values), values)


def test_it_takes_the_place_of_plain_dropout_in_lora_layers_alone():
    layer, outside = nn.Module(), nn.Dropout(0.1)
    layer.lora_dropout = nn.ModuleDict({"default": nn.Dropout(0.1), "none": nn.Identity()})
    dropout.replace_in(nn.ModuleList([layer, outside]))
    assert type(layer.lora_dropout["default"]) is Dropout and layer.lora_dropout["default"].p == 0.1
    assert type(layer.lora_dropout["none"]) is nn.Identity and type(outside) is nn.Dropout
