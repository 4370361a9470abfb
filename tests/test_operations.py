"""Protects the count of operations: against numbers computed by hand and against torch's own counter."""

import pytest
import small_qwen
import small_sa2va as small
import torch
from small_runs import settings
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sft import operations
from sft.model import lora
from sft.model.sa2va import Prompt

MATRIX_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


@pytest.fixture
def model(tmp_path):
    """A small InternVL-like model with LoRA on its language model, no dropout."""
    made = small.build()
    lora.wrap(made, settings(tmp_path, tmp_path))
    return made


def test_the_formulas_on_round_numbers_by_hand():
    sizes = operations.Sizes(frozen=1000, frozen_end=100, lora=10, lora_end=1, attention=64, head=500)
    counted = operations.of_tokens(sizes, [3, 5])
    assert counted["frozen"] == 4 * (1000 * 8 + 100 * 2)
    assert counted["lora"] == 6 * (10 * 8 + 1 * 2)
    assert counted["attention"] == 6 * 64 * (9 + 25)
    assert counted["head"] == 0
    with_text = operations.of_tokens(sizes, [3, 5], labelled=4)
    assert with_text["frozen"] == 4 * (1000 * 8 + 100 * 6) and with_text["head"] == 4 * 500 * 4


def test_sizes_are_those_of_the_configuration(model, tmp_path):
    config, rank = model.decoder.config, settings(tmp_path, tmp_path).lora_rank
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head_width = width // config.num_attention_heads
    keys = config.num_key_value_heads * head_width
    sizes = operations.sizes_of(model)
    assert sizes.frozen_end == 3 * width * inner
    assert sizes.frozen == layers * (2 * width * width + 2 * width * keys) + (layers - 1) * 3 * width * inner
    assert sizes.lora_end == 3 * rank * (width + inner)
    assert sizes.lora == layers * rank * (4 * width + 2 * width + 2 * keys - 2 * width + 2 * width) + (
        layers - 1
    ) * 3 * rank * (width + inner)
    assert sizes.attention == layers * width and sizes.head == config.vocab_size * width


def test_torch_counts_the_same_matrix_products_but_for_the_first_layers_inputs(model):
    """Of the very first projections the gradient stops: nothing before them trains."""
    tokens, tile_counts, _ = small.inputs(model, 1)
    prompt = small.preprocess().prompt([small.QUESTION], tile_counts)
    model.train()
    with FlopCounterMode(display=False) as counter:
        states = model.hidden_states(prompt, tokens, prompt.seg_position_B[:, None])
        states.seg_BLC.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    seen = sum(count for product, count in counts.items() if product in MATRIX_PRODUCTS)
    length = int(prompt.seg_position_B) + 1
    assert operations.lengths_of(prompt).tolist() == [length]
    counted = operations.of_tokens(operations.sizes_of(model), [length])
    attention = model.decoder.layers[0].self_attn
    first = [attention.q_proj, attention.k_proj, attention.v_proj]
    skipped = sum(part.base_layer.weight.numel() + part.lora_A["default"].weight.numel() for part in first)
    assert counted["frozen"] + counted["lora"] - 2 * length * skipped == seen


def test_convolutions_and_linears_count_as_torch_counts_them():
    parts = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ConvTranspose2d(6, 5, 2, stride=2), nn.Flatten(2), nn.Linear(64, 7)
    )
    images = torch.randn(2, 4, 4, 4)
    with FlopCounterMode(display=False) as counter:
        parts(images)
    by_hand = 2 * (2 * 6 * 16) * (2 * 9) + 2 * (2 * 6 * 16) * (5 * 4) + 2 * (2 * 5 * 7) * 64
    assert operations.forward_of(parts, lambda: parts(images)) == counter.get_total_flops() == by_hand


@pytest.mark.parametrize("multiple_of", [1, 64])
@pytest.mark.parametrize("with_labels", [False, True])
def test_padding_counts_as_nothing(with_labels, multiple_of):
    """Neither what makes rows equally long nor what brings them to a length that repeats."""
    preprocess, layout = small.preprocess(), (1, 4, 4)
    questions = [small.QUESTION, small.LONGER]
    alone = [preprocess.prompt([one], [layout], with_labels=with_labels).input_ids_BL.shape[1] for one in questions]
    together = preprocess.prompt(questions, [layout] * 2, with_labels=with_labels, multiple_of=multiple_of)
    assert alone[0] != alone[1] and together.input_ids_BL.shape[1] % multiple_of == 0
    assert operations.lengths_of(together).tolist() == alone


def test_qwen_has_the_same_parts(tmp_path):
    made = small_qwen.build("qwen3_vl")
    lora.wrap(made, settings(tmp_path, tmp_path))
    sizes, text = operations.sizes_of(made), small_qwen._TEXT
    assert sizes.frozen_end == 3 * text["hidden_size"] * text["intermediate_size"]
    assert sizes.attention == text["num_hidden_layers"] * text["num_attention_heads"] * 8


def test_the_epochs_sums_are_those_of_its_batches(model, monkeypatch):
    """The samples one by one; of the mask decoder, what passes through it in the first batch and never again."""
    monkeypatch.setattr(operations, "measured_peak", lambda device, dtype: 1e9)
    decoder = model.sam2.mask_decoder
    layer = next(part for part in decoder.modules() if isinstance(part, nn.Linear))
    layer.requires_grad_(True)  # one trains: 2 backward for 1 forward
    effort = operations.Effort(model, torch.device("cpu"))
    for positions in ([4, 6], [9]):
        layer(torch.zeros(len(positions), 5, layer.in_features))
        effort.add(Prompt(torch.zeros(len(positions), max(positions) + 1), torch.tensor(positions)))
    expected = sum(operations.of_tokens(operations.sizes_of(model), [5, 7, 10]).values())
    expected += 3 * 3 * 2 * 5 * layer.in_features * layer.out_features
    assert effort.row(2.0)["mfu"] == pytest.approx(expected / 2.0 / 1e9)
    assert not any(part._forward_hooks for part in decoder.modules())


def test_measuring_the_peak_leaves_a_runs_random_numbers_alone():
    """Dropout of the next epoch would depend on whether an earlier run in this process had measured it."""
    operations.measured_peak.cache_clear()
    before = torch.get_rng_state()
    operations.measured_peak(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
