"""InternLM2, the language model of Sa2VA-8B and 26B, on transformers' Llama modules: names, tensors, adapters.

Takes a published llm_config, tensors and names, gives Llama's, and backwards; no files. InternLM2 is Llama under other
names, but for one tensor: `attention.wqkv` holds q, k and v of each key/value group side by side. So every weight
converts without loss, and a LoRA of q_proj, k_proj and v_proj is one LoRA of `attention.wqkv`: with A stacked and each
B in the rows of its own part, block by block, B A is the same matrix to the last bit, of whichever of the three are
targets. Its rank is the sum of theirs; alpha grows alike, so that alpha / rank stays.

One thing differs when such an adapter is trained on elsewhere: here lora_dropout draws a mask for each of q, k and v,
there one for the fused linear. It does not know tokenizers, Sa2VA's other parts or peft.

Source: modeling_internlm2.py of the published models. Its dynamic rope keeps the widest base it ever needed; ours goes
back to plain rope for the next prompt that fits into max_position_embeddings (32,768 in the published models), as both
do for every prompt of a fresh model that fits.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig

from sft.config import UserError

ARCHITECTURE = "InternLM2ForCausalLM"
_LAYER = r"language_model\.model\.layers\.\d+\."
_FUSED = "attention.wqkv"
_NAMES = (  # (published, native) module paths; q, k and v come besides
    ("language_model.model.tok_embeddings", "language_model.model.embed_tokens"),
    ("language_model.output", "language_model.lm_head"),
    ("attention.wo", "self_attn.o_proj"),
    ("feed_forward.w1", "mlp.gate_proj"),
    ("feed_forward.w3", "mlp.up_proj"),
    ("feed_forward.w2", "mlp.down_proj"),
    ("attention_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
)
_TO_NATIVE = dict(_NAMES)
_TO_PUBLISHED = {native: name for name, native in _NAMES} | {f"self_attn.{part}_proj": _FUSED for part in "qkv"}
_MODULE = re.compile(rf"^({_LAYER})?(.*?)(\.weight|\.bias)?$")
_WQKV = re.compile(rf"^({_LAYER})attention\.wqkv\.(weight|bias)$")
_PART = re.compile(rf"^({_LAYER})self_attn\.([qkv])_proj\.(weight|bias)$")
_LORA_PART = re.compile(rf"^(.*{_LAYER})self_attn\.([qkv])_proj\.lora_A\.weight$")
_LORA_FUSED = re.compile(rf"^(.*{_LAYER})attention\.wqkv\.lora_A\.weight$")
_TARGETS = re.compile(re.escape(_LAYER) + r"\(self_attn\|mlp\)\\\.\(([\w|]+)\)")


@dataclass(frozen=True)
class Heads:
    """How wqkv's rows lie: for each key/value head its queries' heads, its key, its value, `head_dim` rows each."""

    key_value_heads: int
    queries_per_group: int
    head_dim: int

    @property
    def rows(self) -> int:
        """Of the fused weight."""
        return self.key_value_heads * (self.queries_per_group + 2) * self.head_dim

    def rows_of(self, part: str) -> Tensor:
        """Where the rows of "q", "k" or "v" lie in the fused weight, in the order that Llama's own weight has."""
        grid_GSD = torch.arange(self.rows).view(self.key_value_heads, -1, self.head_dim)
        match part:
            case "q":
                return grid_GSD[:, :-2].flatten()
            case "k":
                return grid_GSD[:, -2].flatten()
            case "v":
                return grid_GSD[:, -1].flatten()
        raise ValueError(f"part {part!r}: choose q, k or v")


def language_config(published: dict, file: Path) -> LlamaConfig:
    """A published llm_config as Llama's; what it leaves out is as in the published InternLM2Config.

    Raises:
        UserError: a rope or a division into heads that the published code refuses too.
    """
    hidden, heads = published.get("hidden_size", 4096), published.get("num_attention_heads", 32)
    key_value_heads = published.get("num_key_value_heads") or heads
    if hidden % heads or heads % key_value_heads:
        raise UserError(
            f"{file}: llm_config's hidden_size {hidden}, num_attention_heads {heads} and num_key_value_heads "
            f"{key_value_heads} do not divide one another; check the download"
        )
    return LlamaConfig(
        architectures=[ARCHITECTURE],
        vocab_size=published.get("vocab_size", 103_168),
        hidden_size=hidden,
        intermediate_size=published.get("intermediate_size", 11_008),
        num_hidden_layers=published.get("num_hidden_layers", 32),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=hidden // heads,
        hidden_act=published.get("hidden_act", "silu"),
        max_position_embeddings=published.get("max_position_embeddings", 2048),
        rms_norm_eps=published.get("rms_norm_eps", 1e-6),
        attention_bias=published.get("bias", True),  # of wqkv and wo; the feed-forward has none
        mlp_bias=False,
        tie_word_embeddings=published.get("tie_word_embeddings", False),
        pad_token_id=published.get("pad_token_id", 0),
        bos_token_id=published.get("bos_token_id", 1),
        eos_token_id=published.get("eos_token_id", 2),
        rope_parameters=_rope(published, file),
    )


def heads_of(config: PreTrainedConfig) -> Heads | None:
    """How the published wqkv of this native language model lies; None if it is no InternLM2."""
    if (config.architectures or [None])[0] != ARCHITECTURE:
        return None
    groups = config.num_key_value_heads
    return Heads(groups, config.num_attention_heads // groups, config.head_dim)


def native_name(name: str) -> str:
    """Llama's path of a published tensor or module; `attention.wqkv` has none of its own and stays."""
    return _rename(name, _TO_NATIVE)


def published_name(name: str) -> str:
    """Published path of a tensor or module of Llama; q, k and v all lie in `attention.wqkv`."""
    return _rename(name, _TO_PUBLISHED)


def to_native(name: str, tensor: Tensor, heads: Heads) -> dict[str, Tensor]:
    """One published tensor -> the native tensors it fills."""
    if not (fused := _WQKV.match(name)):
        return {native_name(name): tensor}
    layer, kind = fused.groups()
    parts = {part: tensor[heads.rows_of(part).to(tensor.device)] for part in "qkv"}
    return {f"{layer}self_attn.{part}_proj.{kind}": one for part, one in parts.items()}


def to_published(state: dict[str, Tensor], heads: Heads) -> dict[str, Tensor]:
    """The language model's native state -> published names and shapes."""
    published: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not (part := _PART.match(name)):
            published[published_name(name)] = tensor
            continue
        layer, letter, kind = part.groups()
        fused = published.setdefault(f"{layer}{_FUSED}.{kind}", tensor.new_empty(heads.rows, *tensor.shape[1:]))
        fused[heads.rows_of(letter).to(tensor.device)] = tensor
    return published


def fuse_adapter(state: dict[str, Tensor], heads: Heads) -> dict[str, Tensor]:
    """peft's LoRA tensors of a native model -> those of the published model, under Llama's names but for wqkv.

    Args:
        state: `...self_attn.q_proj.lora_A.weight` (r, C), `...lora_B.weight` (rows, r) and so on; others pass.

    Returns:
        For each layer `...attention.wqkv.lora_A.weight` (n r, C) and `...lora_B.weight` (rows of wqkv, n r), n being
        how many of q, k and v have LoRA; their order in the ranks is q, k, v.
    """
    fused, parts = dict(state), _lora_parts(state)
    for layer, letters in parts.items():
        names = [f"{layer}self_attn.{letter}_proj.lora_" for letter in letters]
        a_parts = [fused.pop(f"{name}A.weight") for name in names]
        b_parts = [fused.pop(f"{name}B.weight") for name in names]
        whole = a_parts[0].new_zeros(heads.rows, sum(len(a) for a in a_parts))
        first = 0
        for letter, b in zip(letters, b_parts, strict=True):
            whole[heads.rows_of(letter), first : first + b.shape[1]] = b
            first += b.shape[1]
        fused |= {f"{layer}{_FUSED}.lora_A.weight": torch.cat(a_parts), f"{layer}{_FUSED}.lora_B.weight": whole}
    return fused


def split_adapter(state: dict[str, Tensor], targets: set[str], heads: Heads, place: Path) -> dict[str, Tensor]:
    """What `fuse_adapter` made -> the LoRA tensors of the parts, where q, k and v of `targets` have LoRA.

    Raises:
        UserError: the fused LoRA is not one of blocks, as after training it elsewhere; `place` stands in the message.
    """
    letters = [letter for letter in "qkv" if f"{letter}_proj" in targets]
    split = dict(state)
    for layer in [found[1] for name in state if (found := _LORA_FUSED.match(name))]:
        a, b = (split.pop(f"{layer}{_FUSED}.lora_{side}.weight") for side in "AB")
        rank = len(a) // max(len(letters), 1)
        blocks = torch.zeros_like(b)
        for index, letter in enumerate(letters):
            ranks, rows = slice(index * rank, (index + 1) * rank), heads.rows_of(letter)
            blocks[rows, ranks] = b[rows, ranks]
            name = f"{layer}self_attn.{letter}_proj.lora_"
            split |= {f"{name}A.weight": a[ranks].clone(), f"{name}B.weight": b[rows, ranks].clone()}
        if not torch.equal(blocks, b):
            raise UserError(
                f"{place}: the LoRA of {layer}{_FUSED} is no LoRA of {', '.join(f'{one}_proj' for one in letters)}; "
                "give an adapter that a run with these lora_target_modules and this lora_rank has saved"
            )
    return split


def adapter_settings(settings: dict) -> dict:
    """peft's settings of a native model's adapter -> those with which peft loads it on the published model."""
    found = _TARGETS.search(settings["target_modules"])
    if not found:
        return settings
    targets = found[1].split("|")
    paths = dict.fromkeys(_TO_PUBLISHED[f"{'self_attn' if one[0] in 'qkvo' else 'mlp'}.{one}"] for one in targets)
    pattern = _LAYER + f"({'|'.join(map(re.escape, paths))})"
    changed = settings | {"target_modules": settings["target_modules"].replace(found[0], pattern)}
    count = sum(one in ("q_proj", "k_proj", "v_proj") for one in targets)
    if count > 1:
        fused = _LAYER + re.escape(_FUSED)
        changed["rank_pattern"] = settings["rank_pattern"] | {fused: count * settings["r"]}
        changed["alpha_pattern"] = settings["alpha_pattern"] | {fused: count * settings["lora_alpha"]}
    return changed


def _rope(published: dict, file: Path) -> dict:
    """Llama's rope_parameters for the published rope_scaling."""
    scaling, theta = published.get("rope_scaling"), published.get("rope_theta", 10_000)
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    kind = scaling.get("type", scaling.get("rope_type")) if isinstance(scaling, dict) else None
    factor = scaling.get("factor") if isinstance(scaling, dict) else None
    if kind not in ("linear", "dynamic") or not isinstance(factor, float | int) or factor < 1:
        raise UserError(
            f"{file}: rope_scaling {scaling!r} is none that InternLM2 has; it is null, or "
            '{"type": "dynamic" or "linear", "factor": 1 or more}; copy the file from the published model again'
        )
    return {"rope_type": kind, "rope_theta": theta, "factor": float(factor)}


def _rename(name: str, names: dict[str, str]) -> str:
    layer, module, leaf = _MODULE.match(name).groups(default="")
    return layer + names.get(module, module) + leaf


def _lora_parts(state: dict[str, Tensor]) -> dict[str, list[str]]:
    """Layer -> which of q, k and v have LoRA there, in this order."""
    parts: dict[str, list[str]] = {}
    for name in state:
        if found := _LORA_PART.match(name):
            parts.setdefault(found[1], []).append(found[2])
    return {layer: sorted(letters, key="qkv".index) for layer, letters in parts.items()}
