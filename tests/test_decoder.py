"""The decoder's own loop over the layers: equal to transformers' forward, with recomputing, compiling and graphs."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaModel,
    Phi3Config,
    Phi3Model,
    Qwen2_5_VLTextConfig,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLTextConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from sft.flat import Vector
from sft.model.decoder import Decoder

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = {
    "qwen2": (Qwen2Model, Qwen2Config(**SIZES)),
    "qwen2 with a window": (
        Qwen2Model,
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ),
    "qwen3": (Qwen3Model, Qwen3Config(**SIZES, head_dim=8)),
    "llama": (LlamaModel, LlamaConfig(**SIZES)),
    "phi3 with a window": (Phi3Model, Phi3Config(**SIZES, sliding_window=8)),
}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
READ_BR = torch.tensor([[5, 19], [3, 11]])
ROWS = torch.arange(2)[:, None]


def build(kind, config):
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def embeddings():
    return torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PLAIN)
def test_states_are_those_of_transformers(name):
    """Our loop, its masks and its shortened last layer change no number of any supported language model."""
    model, inputs = build(*PLAIN[name]), embeddings()
    expected = model(inputs_embeds=inputs, use_cache=False).last_hidden_state[ROWS, READ_BR]
    torch.testing.assert_close(model.norm(Decoder(model)(inputs, READ_BR)), expected, rtol=1e-6, atol=1e-6)


def test_the_last_layer_keeps_what_phi3_adds_to_it():
    """Phi3 drops out of both of a layer's sums; with the same random numbers the states are transformers' own."""
    model = build(Phi3Model, Phi3Config(**SIZES, resid_pdrop=0.5)).train()
    torch.manual_seed(4)
    expected = model(inputs_embeds=embeddings(), use_cache=False).last_hidden_state[ROWS, READ_BR]
    torch.manual_seed(4)
    torch.testing.assert_close(model.norm(Decoder(model)(embeddings(), READ_BR)), expected, rtol=1e-6, atol=1e-6)


def test_three_dimensional_positions_reach_the_rotary_embedding():
    """Qwen2.5-VL counts time, height and width: dropping them would turn every image by a little."""
    config = Qwen2_5_VLTextConfig(**SIZES, rope_parameters=ROPE | {"mrope_section": [1, 1, 2]})
    model, inputs = build(Qwen2_5_VLTextModel, config), embeddings()
    positions = torch.randint(0, 20, (3, 2, 20), generator=torch.Generator().manual_seed(2))
    expected = model(inputs_embeds=inputs, position_ids=positions, use_cache=False).last_hidden_state
    got = model.norm(Decoder(model)(inputs, READ_BR, positions))
    torch.testing.assert_close(got, expected[ROWS, READ_BR], rtol=1e-6, atol=1e-6)


def test_deepstack_maps_are_added_after_the_first_layers():
    """Qwen3-VL feeds maps of inner vision layers to the first decoder layers, at the image's positions alone."""
    config = Qwen3VLTextConfig(**SIZES, head_dim=8, rope_parameters=ROPE | {"mrope_section": [2, 1, 1]})
    model, inputs = build(Qwen3VLTextModel, config), embeddings()
    image_BL = torch.zeros(2, 20, dtype=torch.bool)
    image_BL[0, 1:4] = image_BL[1, 0:2] = True
    maps_KMC = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(20).expand(3, 2, 20)
    expected = model(
        inputs_embeds=inputs,
        position_ids=positions,
        use_cache=False,
        visual_pos_masks=image_BL,
        deepstack_visual_embeds=list(maps_KMC),
    ).last_hidden_state
    got = model.norm(Decoder(model)(inputs, READ_BR, positions, image_BL, maps_KMC))
    torch.testing.assert_close(got, expected[ROWS, READ_BR], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recomputed", [1, 3])
def test_recomputed_layers_give_the_same_gradients(recomputed):
    """Recomputing some or all layers changes memory and time alone; a forward counter shows that it happens."""
    model = build(*PLAIN["qwen2"]).train()
    decoder, counted = Decoder(model), []
    for layer in model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: counted.append(1))
    parameters = list(model.layers.parameters())
    plain = torch.autograd.grad(decoder(embeddings(), READ_BR).sum(), parameters)
    assert len(counted) == 3
    decoder.recomputed_layers = recomputed
    again = torch.autograd.grad(decoder(embeddings(), READ_BR).sum(), parameters)
    assert len(counted) == 3 + 3 + recomputed
    for first, second in zip(plain, again, strict=True):
        torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_no_layer_is_recomputed_outside_training():
    """Validation keeps no activations, so it has nothing to recompute."""
    model = build(*PLAIN["qwen2"]).train()
    decoder = Decoder(model)
    decoder.recomputed_layers = 3
    with torch.no_grad():
        states = decoder(embeddings(), READ_BR)
    assert states.grad_fn is None


def states_and_gradients(decoder, inputs, read_BR):
    """Copies: a graph's own memory is written again by the next replay. Nothing here keeps autograd's nodes alive."""
    states = decoder(inputs, read_BR)
    gradients = torch.autograd.grad(states.square().sum(), list(decoder.text_model.layers.parameters()))
    return [part.detach().clone() for part in (states, *gradients)]


@pytest.mark.gpu
@pytest.mark.parametrize("graph_tokens", [0, 10_000])
def test_compiled_and_graphed_layers_agree_with_eager_ones(graph_tokens):
    """Compiling and replaying change rounding, nothing else: states and gradients stay within 1e-5 of eager fp32."""
    model = build(*PLAIN["qwen2"]).train().cuda()
    inputs, read_BR = embeddings().cuda(), READ_BR.cuda()
    expected = states_and_gradients(Decoder(model), inputs, read_BR)
    decoder = Decoder(model)
    decoder.compile()
    decoder.graph_tokens = graph_tokens
    for _ in range(3):  # recording, then replaying
        for one, other in zip(states_and_gradients(decoder, inputs, read_BR), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.gpu
def test_a_graph_is_recorded_while_another_thread_pins_memory_and_copies():
    """As threads do that put batches together and write features: CUDA forbids it while all threads are captured."""
    model, ended = build(*PLAIN["qwen2"]).train().cuda(), threading.Event()
    decoder = Decoder(model)
    decoder.graph_tokens = 10_000

    def copies() -> int:
        count = 0
        with torch.cuda.stream(torch.cuda.Stream()):
            while not ended.is_set():
                count += 1
                held = [torch.empty(1000 * count, pin_memory=True) for _ in range(2)]
                held[0].cuda(non_blocking=True)
                torch.cuda.current_stream().record_event().synchronize()
        return count

    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(copies)
        try:
            for length in (20, 16, 12):  # one graph each
                read_BR = READ_BR.clamp(max=length - 1).cuda()
                found = states_and_gradients(decoder, embeddings()[:, :length].cuda(), read_BR)
                assert all(torch.isfinite(part).all() for part in found)
        finally:
            ended.set()
        assert other.result() > 0
    assert len(decoder._graphs) == 3 and torch.cuda.graph.__name__ == "graph"


@pytest.mark.gpu
def test_recording_a_graph_leaves_the_random_state():
    """It runs the layers several times; a run that resumes records at another step than one that did not."""
    model = build(*PLAIN["qwen2"]).train().cuda()
    decoder = Decoder(model)
    decoder.graph_tokens = 10_000
    before = torch.cuda.get_rng_state()
    decoder(embeddings().cuda(), READ_BR.cuda())
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.gpu
def test_replays_add_up_to_the_gradients_of_all_micro_batches():
    """Each replay writes its gradients to the same memory; taken in between, as the engine does, none is lost."""
    model = build(*PLAIN["qwen2"]).train().cuda()
    batches, read_BR = [embeddings().cuda(), embeddings().cuda().flip(1).contiguous()], READ_BR.cuda()
    alone = [states_and_gradients(Decoder(model), inputs, read_BR)[1:] for inputs in batches]
    vector = Vector(dict(model.layers.named_parameters()), torch.float32, torch.device("cuda"))
    vector.link()
    decoder = Decoder(model)
    decoder.graph_tokens = 10_000
    taken = torch.zeros_like(vector.parameter)
    for inputs in batches:
        decoder(inputs, read_BR).square().sum().backward()
        taken += vector.take_gradients()
    for found, gradients in zip(vector.layout.cut(taken).values(), zip(*alone, strict=True), strict=True):
        expected = sum(gradients)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
