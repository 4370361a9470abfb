"""Trainable parameters as one vector: every number in its place, there and back."""

import pytest
import torch
from torch import nn

from sft.flat import Vector, Vectors, layout


def leaves():
    torch.manual_seed(0)
    return {"a": nn.Parameter(torch.randn(3, 5)), "b": nn.Parameter(torch.randn(7)), "c": nn.Parameter(torch.randn(()))}


def test_places_start_where_they_are_aligned():
    """Matrix products on a GPU want aligned addresses."""
    places = layout({"a": torch.Size((3, 5)), "b": torch.Size((7,))}, aligned=8)
    assert [(place.start, place.stop) for place in places.places] == [(0, 15), (16, 23)]
    assert places.size == 24


def test_join_and_cut_are_inverse_and_fill_with_zeros():
    """Optimizer states are cut into named tensors for a checkpoint and joined again on resuming."""
    parts = {name: leaf.detach() for name, leaf in leaves().items()}
    places = layout({name: part.shape for name, part in parts.items()}, aligned=4)
    vector = places.join(parts | {"b": None}, torch.empty(0))
    assert vector.shape == (places.size,)
    assert vector.count_nonzero() == 16
    found = places.cut(vector)
    assert torch.equal(found["a"], parts["a"]) and torch.equal(found["c"], parts["c"])
    assert found["b"].count_nonzero() == 0


def test_linked_leaves_follow_their_vector():
    """The optimizer writes the vector; the model reads the leaves."""
    named = leaves()
    vector = Vector(named, torch.float32, torch.device("cpu"))
    before = {name: leaf.detach().clone() for name, leaf in named.items()}
    vector.link()
    for name, leaf in named.items():
        assert torch.equal(leaf, before[name])
    with torch.no_grad():
        vector.parameter.add_(1)
    for name, leaf in named.items():
        assert torch.equal(leaf, before[name] + 1)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_gradients_of_leaves_reach_the_vector_scaled(micro_batches):
    """What autograd found is the vector's gradient, times the accumulation's factor; an unused leaf counts as zero."""
    named = leaves()
    vector = Vector(named, torch.float32, torch.device("cpu"))
    vector.link()
    (named["a"].square().sum() + 3 * named["c"]).backward()
    expected = {"a": 2 * named["a"].detach(), "b": torch.zeros(7), "c": torch.tensor(3.0)}
    held = Vectors([vector], scaled=micro_batches > 1)
    gradients = vector.take_gradients()
    place, total = gradients.data_ptr(), held((gradients,))
    del gradients
    (total / micro_batches).backward()
    if micro_batches == 1:
        assert vector.parameter.grad.data_ptr() == place, "handed over, not copied"
    assert all(leaf.grad is None for leaf in named.values())
    for name, part in vector.layout.cut(vector.parameter.grad).items():
        torch.testing.assert_close(part, expected[name] / micro_batches)
