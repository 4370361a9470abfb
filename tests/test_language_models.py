"""Protects InternLM2 and Phi-3: what ours computes is what the published modeling files compute, figure by figure.

golden/language_models.json holds hidden states (after the final norm) and logits of the published classes in fp32, with
eager attention, for small models whose weights are drawn here as they were drawn there.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.auto import AutoModelForCausalLM

from sft.config import UserError
from sft.model import internlm2, key_map, phi3, published
from sft.model.decoder import Decoder

GOLDEN = json.loads((Path(__file__).parent / "golden" / "language_models.json").read_text(encoding="utf-8"))
FILE = Path("config.json")
CASES = {f"{case['llm_config']['architectures'][0]}: {case['name']}": case for case in GOLDEN["cases"]}
PREFIX = "language_model."


def settings(case: dict) -> dict:
    return GOLDEN["common"] | case["llm_config"]


@functools.cache
def model_of(name: str):
    """The native model of a case, its weights drawn in the order of the published names."""
    config = published._language_config(settings(CASES[name]), FILE)
    model = AutoModelForCausalLM.from_config(config).eval()
    heads, rng = internlm2.heads_of(config), np.random.default_rng(5)
    outside = key_map.to_published({PREFIX + key: tensor for key, tensor in model.state_dict().items()}, heads)
    native = {}
    for key in sorted(outside):
        shape = tuple(outside[key].shape)
        scale = np.float32(0.3 if len(shape) == 1 else shape[-1] ** -0.5)
        noise = rng.standard_normal(shape, dtype=np.float32) * scale
        tensor = torch.from_numpy(noise + np.float32("norm" in key))
        native |= {key: tensor} if heads is None else key_map.to_native(key, tensor, heads)
    model.load_state_dict({key.removeprefix(PREFIX): tensor for key, tensor in native.items()})
    return model


def states_of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states after the norm and logits, (2, length, width)."""
    ids = torch.from_numpy(np.random.default_rng(9).integers(3, 97, (2, CASES[name]["length"])))
    with torch.no_grad():
        hidden = model_of(name).model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden, model_of(name).lm_head(hidden)


@pytest.mark.parametrize("name", CASES)
def test_hidden_states_and_logits_are_those_of_the_published_code(name):
    case = CASES[name]
    for values, kind in zip(states_of(name), ("hidden", "logits"), strict=True):
        most, length = case[f"{kind}_absmax"], case["length"]
        found = [values[row, position, :4] for row in (0, 1) for position in (0, length // 2, length - 1)]
        torch.testing.assert_close(torch.stack(found), torch.tensor(case[kind]), atol=1e-5 * most, rtol=0)
        assert abs(values.abs().max().item() - most) <= 1e-5 * most
        assert abs(values.double().sum().item() - case[f"{kind}_sum"]) <= 1e-5 * most * values.numel() ** 0.5


def test_the_cases_tell_settings_apart():
    """Each setting that the golden figures cover moves them by far more than the tolerance."""
    plain, others = CASES["InternLM2ForCausalLM: plain"], ("bias", "linear")
    for other in others:
        difference = np.subtract(plain["logits"], CASES[f"InternLM2ForCausalLM: {other}"]["logits"])
        assert np.abs(difference).max() > 1e-2 * plain["logits_absmax"]
    assert plain["logits"] == CASES["InternLM2ForCausalLM: dynamic"]["logits"]  # a prompt that fits: plain rope
    beyond = [CASES[f"InternLM2ForCausalLM: {kind}, beyond"]["hidden"] for kind in ("plain", "dynamic")]
    assert np.abs(np.subtract(*beyond)).max() > 1e-2
    phi = [CASES[f"Phi3ForCausalLM: {kind}"]["hidden"] for kind in ("plain", "window", "su, long", "su, no stretch")]
    assert all(np.abs(np.subtract(phi[0], other)).max() > 1e-2 for other in phi[1:])


def test_after_a_prompt_beyond_the_limit_rope_is_plain_again():
    name = "InternLM2ForCausalLM: dynamic, beyond"
    states_of(name)
    ids = torch.from_numpy(np.random.default_rng(9).integers(3, 97, (2, 40)))
    with torch.no_grad():
        dynamic = model_of(name).model(input_ids=ids, use_cache=False).last_hidden_state
        plain = model_of("InternLM2ForCausalLM: plain").model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(dynamic, plain)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "yarn", "factor": 2.0},
        {"type": "dynamic"},
        {"type": "dynamic", "factor": 0.5},
        {"type": "linear", "factor": "2"},
        {"factor": 2.0},
        "dynamic",
    ],
)
def test_a_rope_that_internlm2_has_not_is_refused(scaling):
    with pytest.raises(UserError, match=r"config.json: rope_scaling .* is none that InternLM2 has"):
        internlm2.language_config({"rope_scaling": scaling}, FILE)


def test_heads_that_do_not_divide_are_refused():
    for changes in ({"num_attention_heads": 3}, {"num_attention_heads": 8, "num_key_value_heads": 3}):
        with pytest.raises(UserError, match=r"config.json: llm_config's hidden_size 64.* do not divide one another"):
            internlm2.language_config({"hidden_size": 64} | changes, FILE)


def test_internlm2_defaults_are_the_published_ones():
    config = internlm2.language_config({}, FILE)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (103_168, 4096, 11_008)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 32, 128)
    assert (config.attention_bias, config.mlp_bias, config.rms_norm_eps) == (True, False, 1e-6)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000}
    assert config.max_position_embeddings == 2048 and not config.tie_word_embeddings


def test_wqkv_rows_lie_group_by_group():
    """Two key/value heads of two queries each, one row a head: q0 q1 k0 v0 q2 q3 k1 v1."""
    heads = internlm2.Heads(key_value_heads=2, queries_per_group=2, head_dim=1)
    assert {part: heads.rows_of(part).tolist() for part in "qkv"} == {"q": [0, 1, 4, 5], "k": [2, 6], "v": [3, 7]}
    name = "language_model.model.layers.11.attention.wqkv.weight"
    parts = internlm2.to_native(name, torch.arange(8.0)[:, None], heads)
    layer = "language_model.model.layers.11.self_attn."
    assert {key: part[:, 0].tolist() for key, part in parts.items()} == {
        f"{layer}q_proj.weight": [0, 1, 4, 5],
        f"{layer}k_proj.weight": [2, 6],
        f"{layer}v_proj.weight": [3, 7],
    }
    assert torch.equal(internlm2.to_published(parts, heads)[name][:, 0], torch.arange(8.0))


@pytest.mark.parametrize("kind", ["yarn", "linear", None])
def test_a_rope_that_phi3_computes_otherwise_is_refused(kind):
    scaling = {"type": kind, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    with pytest.raises(UserError, match="config.json: a rope_scaling of type .* is not supported for Phi-3"):
        phi3.language_config({"rope_scaling": scaling}, FILE)


def test_lora_targets_of_phi3():
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert phi3.lora_targets(every) == ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    assert phi3.lora_targets(("qkv_proj", "down_proj")) == ("qkv_proj", "down_proj")
    with pytest.raises(UserError, match="holds q_proj, k_proj, v_proj in one linear; name qkv_proj, or add k_proj;"):
        phi3.lora_targets(("q_proj", "v_proj"))


@pytest.mark.parametrize("name", CASES)
def test_the_decoder_that_runs_the_layers_one_by_one_gives_the_same_states(name):
    """Rope that grows with the prompt and windows reach the layers by its own hands, not by the model's forward."""
    hidden, _ = states_of(name)
    length = CASES[name]["length"]
    model, read = model_of(name).model, torch.tensor([[0, length // 2, length - 1]] * 2)
    ids = torch.from_numpy(np.random.default_rng(9).integers(3, 97, (2, length)))
    with torch.no_grad():
        found = model.norm(Decoder(model)(model.get_input_embeddings()(ids), read))
    torch.testing.assert_close(found, hidden[torch.arange(2)[:, None], read], atol=1e-5, rtol=1e-5)
