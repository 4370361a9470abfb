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


def test_the_choice_reaches_the_loop_and_is_told():
    """A choice that is only logged would change nothing."""
    model = small_sa2va.build()
    size = replace(FOUR_B, layers=2)
    size, line = pace.set_up(model, TrainConfig(gradient_checkpointing=True), size, CPU, 1, steps=10)
    assert model.layers.recomputed_layers == size.recomputed_layers == 2
    assert line == "Step: 2 of 2 decoder layers recomputed in the backward pass, not compiled"
