"""The shapes of the published models: config.json contents and the ids of special tokens, by name.

For trying out sizes where the published weights are not at hand. Does not know weights or files.

Sources: the config.json of OpenGVLab's InternVL2_5-1B, -4B, -8B and InternVL3-8B, of Qwen's Qwen2.5-VL-3B and -7B and
Qwen3-VL-2B and -4B, settings that change no shape left out; for what Sa2VA makes of them its README and
tools/convert_to_hf.py (github.com/bytedance/Sa2VA): five tokens more, a vocabulary cut to the tokenizer's length,
embeddings and head never tied.
"""

from dataclasses import dataclass

from sft.config import UserError

NAMES = ("1b", "4b", "8b", "internlm2-8b", "qwen2_5vl-3b", "qwen2_5vl-7b", "qwen3vl-2b", "qwen3vl-4b")
_SA2VA_TOKENS = ("[SEG]", "<p>", "</p>", "<vp>", "</vp>")
_INTERNVL_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
_QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_VISION = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")

_INTERNVIT_300M = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 448,
    "patch_size": 14,
    "qkv_bias": True,
    "qk_normalization": False,
    "norm_type": "layer_norm",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}


@dataclass(frozen=True)
class Shape:
    """A published model without its weights."""

    config: dict
    special_ids: dict[str, int]
    """Token -> its id in the published tokenizer, of the tokens that prompts need."""


def named(name: str) -> Shape:
    """The shape of a published model.

    Raises:
        UserError: no such name; lists those there are.
    """
    match name:
        case "1b":  # Sa2VA-1B: InternVL2.5-1B with Qwen2.5-0.5B
            return _internvl_qwen2(896, 4864, 24, 14, 2)
        case "4b":  # Sa2VA-4B: InternVL2.5-4B with Qwen2.5-3B
            return _internvl_qwen2(2048, 11_008, 36, 16, 2)
        case "8b":  # Sa2VA-InternVL3-8B, with Qwen2.5-7B
            return _internvl_qwen2(3584, 18_944, 28, 28, 4)
        case "internlm2-8b":  # Sa2VA-8B: InternVL2.5-8B with InternLM2.5-7B
            return _internvl_internlm2()
        case "qwen2_5vl-3b":  # Sa2VA-Qwen2_5-VL-3B
            return _qwen2_5vl(2048, 11_008, 36, 16, 2)
        case "qwen2_5vl-7b":  # Sa2VA-Qwen2_5-VL-7B
            return _qwen2_5vl(3584, 18_944, 28, 28, 4)
        case "qwen3vl-2b":  # Sa2VA-Qwen3-VL-2B
            return _qwen3vl(2048, 6144, 28, 16)
        case "qwen3vl-4b":  # Sa2VA-Qwen3-VL-4B
            return _qwen3vl(2560, 9728, 36, 32)
    raise UserError(f"shape {name!r}: choose from {', '.join(NAMES)}")


def _internvl(template: str, llm_config: dict, special_ids: dict[str, int]) -> Shape:
    config = {
        "architectures": ["Sa2VAChatModel"],
        "model_type": "sa2va_chat",
        "template": template,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "force_image_size": 448,
        "vision_config": _INTERNVIT_300M,
        "llm_config": llm_config,
    }
    return Shape(config, special_ids)


def _qwen2_language(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
    }


def _internvl_qwen2(*sizes: int) -> Shape:
    tokens = _numbered(_QWEN_TOKENS, 151_643) | _numbered(_INTERNVL_TOKENS + _SA2VA_TOKENS, 151_665)
    llm_config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151_674 + 5}
    return _internvl("qwen_chat", llm_config | _qwen2_language(*sizes), tokens)


def _internvl_internlm2() -> Shape:
    tokens = {"<s>": 1, "</s>": 2} | _numbered(("<|im_end|>", "<|im_start|>"), 92_542)
    llm_config = {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "vocab_size": 92_553 + 5,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "bias": False,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return _internvl("internlm2_chat", llm_config, tokens | _numbered(_INTERNVL_TOKENS + _SA2VA_TOKENS, 92_544))


def _qwen2_5vl(*sizes: int) -> Shape:
    text = {"model_type": "qwen2_5_vl_text", "vocab_size": 151_665 + 5} | _qwen2_language(*sizes)
    text |= {"max_position_embeddings": 128_000, "rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}
    vision = {
        "model_type": "qwen2_5_vl",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "hidden_act": "silu",
        "in_channels": 3,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return _qwen(text, vision, 151_665)


def _qwen3vl(hidden: int, intermediate: int, layers: int, heads: int) -> Shape:
    text = {
        "model_type": "qwen3_vl_text",
        "vocab_size": 151_669 + 5,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": 262_144,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5_000_000,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        "tie_word_embeddings": False,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
    }
    vision = {
        "model_type": "qwen3_vl",
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "out_hidden_size": hidden,
        "num_position_embeddings": 2304,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "deepstack_visual_indexes": [5, 11, 17],
    }
    return _qwen(text, vision, 151_669)


def _qwen(text_config: dict, vision_config: dict, tokens_before: int) -> Shape:
    config = {
        "architectures": ["Sa2VAChatModelQwen"],
        "model_type": "sa2va_chat",
        "template": "qwen_chat",
        "image_token_id": 151_655,
        "video_token_id": 151_656,
        "vision_start_token_id": 151_652,
        "vision_end_token_id": 151_653,
        "tie_word_embeddings": False,
        "text_config": text_config,
        "vision_config": vision_config,
    }
    tokens = _numbered(_QWEN_TOKENS, 151_643) | _numbered(_QWEN_VISION, 151_652)
    return Shape(config, tokens | _numbered(_SA2VA_TOKENS, tokens_before))


def _numbered(tokens: tuple[str, ...], first: int) -> dict[str, int]:
    return {token: first + index for index, token in enumerate(tokens)}
