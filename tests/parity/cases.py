"""The small checkpoints that are compared: their config.json, their vocabulary, and fixed inputs.

Gives dicts and numpy arrays, read by the reference and by us alike; needs numpy alone. It does not know torch.

Shapes: B = 2 samples, T = 4 tiles (one, and three), L tokens of the longer prompt.
"""

import copy
import json
import re
from pathlib import Path

import numpy as np

from parity import seeded

IMAGE_PX = 56  # side of an InternViT tile: 4 x 4 patches of 14 px, 4 tokens after the pixel shuffle
TILES = (1, 3)
TOKENS_PER_TILE = 4
SAM2_PX, MASK_PX = 128, 32
GRIDS_THW = ((1, 4, 6), (1, 8, 4))  # Qwen-VL: patches of each image in time, height and width
PATCH_PX = {"qwen2_5_vl": 14, "qwen3_vl": 16}
MERGED = 4  # Qwen-VL: patches that make one token
LORA_RANK, LORA_ALPHA = 4, 8

_WORDS = """
<|endoftext|> <|im_end|> <|im_start|> <unk> <img> </img> <IMG_CONTEXT> [SEG] <p> </p> <vp> </vp> <|end|> <|user|>
<|assistant|> <|eot_id|> <|start_header_id|> <|end_header_id|> <|vision_start|> <|image_pad|> <|vision_end|>
<|video_pad|> user assistant Please segment the vessels in this image left right Sure It is . ,
"""
WORDS = [*_WORDS.split(), "\n"]
SPECIAL = 22  # so many of them are special tokens
VOCABULARY = 64

# SAM2 at a size for a CPU. The published code writes Hiera-L at 1024 px into its functions; `shrink.py` puts these
# sizes in their place and changes nothing else.
SAM2 = {
    "vision_config": {
        "model_type": "sam2_vision_model",
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "image_size": [SAM2_PX, SAM2_PX],
            "hidden_size": 16,
            "num_attention_heads": 2,
            "blocks_per_stage": [1, 2, 3, 1],
            "embed_dim_per_stage": [16, 32, 64, 128],
            "num_attention_heads_per_stage": [2, 4, 8, 16],
            "window_size_per_stage": [8, 4, 6, 2],  # 6 does not divide the grid of 8: windows are padded
            "window_positional_embedding_background_size": [7, 7],
            "global_attention_blocks": [4],
        },
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "fpn_hidden_size": 32,
    },
    "prompt_encoder_config": {"hidden_size": 32, "image_size": SAM2_PX, "patch_size": 16},
    "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 8, "iou_head_hidden_dim": 32},
}
_VIT_300M = {
    "architectures": ["InternVisionModel"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": IMAGE_PX,
    "patch_size": 14,
    "qkv_bias": True,
    "qk_normalization": False,
    "norm_type": "layer_norm",
}
_VIT_6B = _VIT_300M | {"qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm", "layer_norm_eps": 1e-3}
_LANGUAGE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def _internvl(architecture: str, template: str, vision: dict = _VIT_300M, *, top: dict | None = None, **language):
    return {
        "family": "internvl",
        "config": {
            "architectures": ["Sa2VAChatModel"],
            "model_type": "sa2va_chat",
            "template": template,
            "downsample_ratio": 0.5,
            "ps_version": "v2",
            "select_layer": -1,
            "force_image_size": IMAGE_PX,
            "vision_config": vision,
            "llm_config": {"architectures": [architecture]} | _LANGUAGE | language,
            "native": {"sam2_config": SAM2},
        }
        | (top or {}),
    }


def _qwen_vl(kind: str, vision: dict, rope: dict) -> dict:
    text = _LANGUAGE | {"model_type": f"{kind}_text", "rope_scaling": rope, "head_dim": 12}
    return {
        "family": kind,
        "config": {
            "architectures": ["Sa2VAChatModelQwen"],
            "model_type": "sa2va_chat",
            "template": "qwen_chat",
            "text_config": text,
            "vision_config": {"model_type": kind, "depth": 3, "hidden_size": 32, "num_heads": 2} | vision,
            "image_token_id": WORDS.index("<|image_pad|>"),
            "video_token_id": WORDS.index("<|video_pad|>"),
            "vision_start_token_id": WORDS.index("<|vision_start|>"),
            "vision_end_token_id": WORDS.index("<|vision_end|>"),
            "tie_word_embeddings": False,
            "native": {"sam2_config": SAM2},
        },
    }


CASES = {
    "qwen2": _internvl("Qwen2ForCausalLM", "qwen_chat"),
    "qwen2_tied": _internvl("Qwen2ForCausalLM", "qwen_chat", tie_word_embeddings=True),
    "qwen3": _internvl(
        "Qwen3ForCausalLM", "qwen_chat", _VIT_300M | {"layer_norm_eps": 1e-3}, top={"select_layer": -2}, head_dim=16
    ),
    "llama": _internvl("LlamaForCausalLM", "internlm2_chat", _VIT_6B, top={"ps_version": "v1"}),
    "internlm2": _internvl("InternLM2ForCausalLM", "internlm2_chat", bias=False),
    "phi3": _internvl("Phi3ForCausalLM", "phi3_chat", num_key_value_heads=4, original_max_position_embeddings=512),
    "qwen2_5_vl": _qwen_vl(
        "qwen2_5_vl",
        {"intermediate_size": 64, "out_hidden_size": 48, "window_size": 56, "fullatt_block_indexes": [1]},
        {"type": "mrope", "mrope_section": [1, 2, 3]},
    ),
    "qwen3_vl": _qwen_vl(
        "qwen3_vl",
        {
            "intermediate_size": 64,
            "out_hidden_size": 48,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1],
        },
        {"rope_type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": True},
    ),
}


def config(name: str) -> dict:
    """config.json of a case; `hiera_large` is qwen2 with SAM2 at its published size."""
    if name == "hiera_large":
        whole = copy.deepcopy(CASES["qwen2"]["config"])
        del whole["native"]
        return whole
    return copy.deepcopy(CASES[name]["config"])


def family(name: str) -> str:
    """internvl, qwen2_5_vl or qwen3_vl."""
    return "internvl" if name == "hiera_large" else CASES[name]["family"]


def inputs(name: str) -> dict[str, np.ndarray]:
    """Fixed inputs: ids and labels (B, L), mask (B, L), place of [SEG] (B,), pixels, SAM2's images."""
    sam2_px = 1024 if name == "hiera_large" else SAM2_PX
    arrays = {"sam2_images": 2 * seeded.uniform("sam2 images", (2, 3, sam2_px, sam2_px))}
    if family(name) == "internvl":
        counts = [count * TOKENS_PER_TILE for count in TILES]
        words = ("<img>", "<IMG_CONTEXT>", "</img>")
        arrays["tiles"] = 2 * seeded.uniform("tiles", (sum(TILES), 3, IMAGE_PX, IMAGE_PX))
    else:
        counts = [int(np.prod(grid)) // MERGED for grid in GRIDS_THW]
        words = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
        side = PATCH_PX[family(name)]
        rows = sum(counts) * MERGED
        arrays["patches"] = 2 * seeded.uniform("patches", (rows, 3 * 2 * side * side))
        arrays["grids_thw"] = np.array(GRIDS_THW)
    return arrays | _prompts(words, counts)


def mask_weights(shape: tuple[int, ...]) -> np.ndarray:
    """What the chosen logits are weighed with to make a loss whose gradient reaches every pixel."""
    return seeded.uniform("mask weights", shape) / np.float32(np.prod(shape[1:]))


def flat(published: dict) -> dict:
    """A Qwen2.5-VL config.json as transformers before 4.52 wrote it: no text_config, its settings at the top."""
    top = {key: value for key, value in published.items() if key != "text_config"}
    text = {key: value for key, value in published["text_config"].items() if key != "model_type"}
    return text | top


def old_name(name: str) -> str:
    """A Qwen2.5-VL tensor's name as transformers before 4.52 wrote it."""
    return name.replace("model.model.visual.", "model.visual.").replace("model.model.language_model.", "model.model.")


def new_name(name: str) -> str:
    """The opposite of `old_name`; new names and those of other families stay."""
    if name.startswith("model.visual."):
        return f"model.{name}"
    if re.match(r"model\.model\.(embed_tokens|layers|norm)\.", name):
        return name.replace("model.model.", "model.model.language_model.", 1)
    return name


def write_config(name: str, directory: Path, *, old: bool = False) -> None:
    """config.json of a case, as short as it may be; `old` as transformers before 4.52 laid it out."""
    (directory / "config.json").write_text(json.dumps(flat(config(name)) if old else config(name)))


def write_processor(name: str, directory: Path) -> None:
    """A word-level tokenizer of WORDS, as PreTrainedTokenizerFast saves one; Qwen-VL's image settings besides."""
    special = [{"id": index, "content": word, "special": True} for index, word in enumerate(WORDS[:SPECIAL])]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    backend = {
        "version": "1.0",
        "added_tokens": [flags | token for token in special],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": {w: i for i, w in enumerate(WORDS)}},
    }
    backend |= dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer.json").write_text(json.dumps(backend))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    if family(name) != "internvl":
        statistics = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
        sizes = {"patch_size": PATCH_PX[family(name)], "merge_size": 2, "temporal_patch_size": 2}
        template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        (directory / "preprocessor_config.json").write_text(json.dumps(statistics | sizes))
        (directory / "chat_template.json").write_text(json.dumps({"chat_template": template}))


def _prompts(words: tuple[str, str, str], counts: list[int]) -> dict[str, np.ndarray]:
    start, token, end = words
    questions = ("Please segment the vessels in this image .", "segment the left vessels")
    answer = ["Sure", ",", "[SEG]", ".", "<|im_end|>"]
    rows = []
    for question, count in zip(questions, counts, strict=True):
        head = ["<|im_start|>", "user", "\n", start, *[token] * count, end, "\n", *question.split(), "<|im_end|>", "\n"]
        rows.append([*head, "<|im_start|>", "assistant", "\n", *answer])
    longest = max(map(len, rows))
    ids_BL = np.array([[WORDS.index(word) for word in row + ["<|endoftext|>"] * (longest - len(row))] for row in rows])
    mask_BL = np.array([[index < len(row) for index in range(longest)] for row in rows])
    answers_BL = np.array(
        [[0 <= index - len(row) + len(answer) < len(answer) for index in range(longest)] for row in rows]
    )
    return {
        "input_ids": ids_BL,
        "attention_mask": mask_BL,
        "labels": np.where(answers_BL, ids_BL, -100),  # as transformers takes them: shifted inside the model
        "seg_position": np.array([row.index("[SEG]") for row in rows]),
    }
