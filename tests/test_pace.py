"""How a step is computed: what `auto` chooses, and that the choice reaches the decoder loop."""

from dataclasses import replace

import pytest
import small_sa2va
import torch

from sft import pace
from sft.config import TrainConfig
from sft.memory import GIB, ModelSize, estimate

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FOUR_B = ModelSize(3_700_000_000, 120_000_000, 0, layers=36, hidden=2048, intermediate=11008, tokens=288, mask_pixels=0)


@pytest.mark.parametrize("usable_gib", [9, 10, 12, 20, 80])
def test_no_more_layers_are_recomputed_than_memory_asks_for(usable_gib):
    """Each recomputed layer costs a third of its time again: one fewer must not fit."""
    config = TrainConfig(batch_size=4)
    count = pace.fewest_layers(config, FOUR_B, 1, usable_gib * GIB)
    need = sum(estimate(config, replace(FOUR_B, recomputed_layers=count), 1).values())
    assert need <= usable_gib * GIB or count == 36
    if count:
        fewer = sum(estimate(config, replace(FOUR_B, recomputed_layers=count - 1), 1).values())
        assert fewer > usable_gib * GIB
    assert (count == 0) == (usable_gib >= 20)


def test_auto_on_a_gpu_recomputes_what_its_free_memory_asks_for(monkeypatch):
    """Selective before full: none, a few, more, all, as less is free; what the run holds already is its own."""
    config, counts = TrainConfig(batch_size=4), []
    for free_gib in (80, 16, 14, 12, 1):
        monkeypatch.setattr(pace, "free_gpu_bytes", lambda device, free_gib=free_gib: (free_gib - 1) * GIB)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
        counts.append(pace.recomputed_layers(config, FOUR_B, CUDA, 1))
        assert counts[-1] == pace.fewest_layers(config, FOUR_B, 1, pace.MEMORY_SHARE * free_gib * GIB)
    assert counts[0] == 0 and counts[-1] == FOUR_B.layers
    assert 0 < counts[1] < counts[2] < counts[3] < FOUR_B.layers, "some layers, not all or none"


def test_a_flag_forces_what_auto_would_decide():
    """`--gradient_checkpointing` is obeyed on any device; on the CPU auto recomputes nothing."""
    for given, expected in ((True, 36), (False, 0), ("auto", 0)):
        assert pace.recomputed_layers(TrainConfig(gradient_checkpointing=given), FOUR_B, CPU, 1) == expected


def test_auto_compiles_on_a_gpu_where_the_run_wins_the_time_back():
    """Compiling takes longer than the whole demo."""
    config = TrainConfig()
    assert pace.compiles(config, FOUR_B, CUDA, steps=976)
    assert not pace.compiles(config, FOUR_B, CUDA, steps=100)
    assert not pace.compiles(config, FOUR_B, CPU, steps=100_000)
    assert pace.compiles(replace(config, compile=True), FOUR_B, CPU, steps=1)
    assert not pace.compiles(replace(config, compile=False), FOUR_B, CUDA, steps=100_000)
    assert not pace.compiles(replace(config, compile=True, deepspeed_config="zero3"), FOUR_B, CUDA, steps=100_000)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_as_many_layers_run_again_as_auto_chose(monkeypatch, count):
    """Counted in a forward and backward pass of the model that `set_up` was given."""
    model = small_sa2va.build().train()
    monkeypatch.setattr(pace, "recomputed_layers", lambda *_: count)
    pace.set_up(model, TrainConfig(), replace(FOUR_B, layers=2), CPU, 1, steps=10)
    calls: list[int] = []
    for number, layer in enumerate(model.decoder.layers):
        layer.input_layernorm.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    vision, layouts, _ = small_sa2va.inputs(model)
    prompt = small_sa2va.preprocess().prompt([small_sa2va.QUESTION] * 2, layouts)
    model.decoder.layers[0].mlp.up_proj.weight.requires_grad_()
    calls.clear()
    model.hidden_states(prompt, vision, prompt.seg_position_B[:, None]).seg_BLC.sum().backward()
    assert sorted(calls) == sorted([0, 1, *range(count)])


def test_the_choice_reaches_the_loop_and_is_told():
    """A choice that is only logged would change nothing."""
    model = small_sa2va.build()
    size = replace(FOUR_B, layers=2)
    size, line = pace.set_up(model, TrainConfig(gradient_checkpointing=True), size, CPU, 1, steps=10)
    assert model.layers.recomputed_layers == size.recomputed_layers == 2
    assert line == "Step: 2 of 2 decoder layers recomputed in the backward pass, not compiled"
