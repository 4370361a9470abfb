"""Phi-3 as a language model of Sa2VA, on transformers' Phi3 modules: its settings, what LoRA's usual names mean.

Takes a published llm_config and names; no tensors: names and shapes of the weights are the same in both. Phi-3 holds q,
k and v in one linear `qkv_proj`, and the feed-forward's gate and up in `gate_up_proj`. It does not know tokenizers.

Source: modeling_phi3.py of the published models. Two of its settings mean something else in transformers: a sliding
window of w there sees w + 1 tokens, and `yarn` there scales by 0.1 ln(s) + 1, which transformers' Phi3 has not.
"""

from pathlib import Path

from transformers import Phi3Config

from sft.config import UserError

ARCHITECTURE = "Phi3ForCausalLM"
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Read by both and of one meaning; what a file leaves out has the same value in both.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "resid_pdrop",
    "embd_pdrop",
    "attention_dropout",
    "hidden_act",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def language_config(published: dict, file: Path) -> Phi3Config:
    """A published llm_config as transformers' own.

    Raises:
        UserError: a rope that transformers' Phi3 does not compute as the published code does.
    """
    settings = {name: published[name] for name in _SHARED if name in published}
    window = published.get("sliding_window")
    return Phi3Config(
        architectures=[ARCHITECTURE],
        sliding_window=None if window is None else window + 1,
        rope_parameters=_rope(published, file),
        **settings,
    )


def lora_targets(wanted: tuple[str, ...]) -> tuple[str, ...]:
    """`lora_target_modules` as names of Phi-3's linears: q_proj, k_proj and v_proj together are its qkv_proj.

    Raises:
        UserError: some parts of a fused linear without the others.
    """
    found: dict[str, None] = {}
    for name in wanted:
        fused = next((whole for whole, parts in _FUSED.items() if name in parts), None)
        missing = [part for part in _FUSED.get(fused, ()) if part not in wanted]
        if missing:
            raise UserError(
                f"lora_target_modules: Phi-3 holds {', '.join(_FUSED[fused])} in one linear; name {fused}, or add "
                f"{', '.join(missing)}; it has down_proj, gate_up_proj, o_proj, qkv_proj"
            )
        found[fused or name] = None
    return tuple(found)


def _rope(published: dict, file: Path) -> dict:
    scaling, theta = published.get("rope_scaling"), published.get("rope_theta", 10_000.0)
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    kind = scaling.get("type", scaling.get("rope_type")) if isinstance(scaling, dict) else None
    if kind not in ("su", "longrope"):
        raise UserError(
            f"{file}: a rope_scaling of type {kind!r} is not supported for Phi-3; supported: null, su and longrope "
            "with short_factor and long_factor"
        )
    trained = published.get("original_max_position_embeddings", 4096)
    factors = {name: scaling.get(name) for name in ("short_factor", "long_factor")}
    # Without a factor transformers takes max_position_embeddings / original_max_position_embeddings, as published.
    return {"rope_type": "longrope", "rope_theta": theta, "original_max_position_embeddings": trained} | factors
