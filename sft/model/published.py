"""The published Sa2VA directory format, read and written: config.json, safetensors shards, tokenizer files.

A directory is data: nothing in it is run. Gives a native `Sa2VA` and its `Preprocess`; it does not know LoRA.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import (
    InternVLVisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
    Sam2Config,
)
from transformers.initialization import no_init_weights

from sft.config import UserError
from sft.model import internlm2, phi3, preprocess_qwen, published_qwen, published_tokenizer, weights
from sft.model.preprocess import (
    IMAGE_END,
    IMAGE_START,
    IMAGE_TOKEN,
    SEG_TOKEN,
    TEMPLATES,
    Preprocess,
    PreprocessInternVL,
)
from sft.model.published_json import read_json
from sft.model.published_qwen import HOW_TO_RUN, REFUSED
from sft.model.sa2va import Sa2VA
from sft.model.sa2va_internvl import Sa2VAInternVL, Sa2VASettings
from sft.model.sa2va_qwen import Sa2VAQwen

EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "tiny_sa2va"
# SAM2 Hiera-L as the published code hard-codes it. A directory of ours may say otherwise under the key `native`:
# `sam2_config` (transformers' Sam2Config) and `max_tiles`; a published config.json has no such key.
_SAM2_HIERA_LARGE = {
    "vision_config": {
        "model_type": "sam2_vision_model",
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 144,
            "num_attention_heads": 2,
            "blocks_per_stage": [2, 6, 36, 4],
            "embed_dim_per_stage": [144, 288, 576, 1152],
            "num_attention_heads_per_stage": [2, 4, 8, 16],
            "window_size_per_stage": [8, 4, 16, 8],
            "global_attention_blocks": [23, 33, 43],
        },
        "backbone_channel_list": [1152, 576, 288, 144],
    }
}
_QWEN_WORDS = (SEG_TOKEN, *preprocess_qwen.RESERVED[:3], preprocess_qwen.END_TOKEN)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory."""

    model: Sa2VA
    preprocess: Preprocess
    directory: Path


def resolve(model_path: str) -> Path:
    """The directory that --model_path means."""
    return EMBEDDED if model_path == "embedded" else Path(model_path).expanduser().resolve()


def load(model_path: str, *, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu") -> Loaded:
    """Reads a published directory into the native model.

    Args:
        model_path: "embedded" or a directory with config.json, safetensors and a tokenizer.
        dtype: of all weights, torch.bfloat16 or torch.float32.
        device: weights go from the shards straight there.

    Raises:
        UserError: not such a directory, an unsupported architecture, missing, left-over or misshapen tensors.
    """
    directory = resolve(model_path)
    config = read_config(directory)
    with contextlib.closing(weights.begin(directory, dtype, torch.device(device))) as tensors:
        preprocess = make_preprocess(config, published_tokenizer.read(directory), directory)
        with init_empty_weights(include_buffers=False), no_init_weights():  # every weight comes from the files
            model = build(config, preprocess.image_token_id, directory)
        weights.fill(model, directory, tensors, dtype, torch.device(device))
    return Loaded(model.eval(), preprocess, directory)


def read_config(directory: Path) -> dict:
    """config.json of a published directory of a supported architecture; else a UserError says what was found."""
    if not directory.is_dir():
        raise UserError(f"model_path {directory}: no such directory; give a published Sa2VA directory or 'embedded'")
    file = directory / "config.json"
    if not file.is_file():
        found = ", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing"
        raise UserError(f"model_path {directory}: not a Sa2VA directory, no config.json in it (found {found})")
    config = read_json(file)
    if config.get("model_type") != "sa2va_chat":
        raise UserError(
            f"{file}: model_type is {config.get('model_type')!r}, expected 'sa2va_chat'; give a Sa2VA checkpoint"
        )
    # Here and not in `build` alone, so that an unsupported model is named before its tokenizer is read.
    if _is_qwen_vl(config):
        published_qwen.model_config(config, file)
        return config
    if not all(isinstance(config.get(part), dict) for part in ("vision_config", "llm_config")):
        raise UserError(
            f"{file}: architecture {config.get('architectures')} is not supported yet; supported: Sa2VAChatModel "
            "(InternVL family), which has vision_config and llm_config, and Sa2VAChatModelQwen, which has vision_config"
        )
    _language_config(config["llm_config"], file)
    _vision_config(config["vision_config"], file)
    return config


def build(config: dict, image_token_id: int, directory: Path) -> Sa2VA:
    """The native model of a config.json, weights untrained (and on the meta device when the caller says so)."""
    file = directory / "config.json"
    if _is_qwen_vl(config):
        return _build_qwen(config, image_token_id, file)
    settings = Sa2VASettings(
        config.get("downsample_ratio", 0.5), config.get("ps_version", "v1"), config.get("select_layer", -1)
    )
    parts = (
        _vision_config(config["vision_config"], file),
        _language_config(config["llm_config"], file),
        _sam2_config(config),
    )
    try:
        return Sa2VAInternVL(*parts, settings, image_token_id)
    except REFUSED as error:
        raise UserError(f"{file}: no model can be built from it ({_one_line(error)}); check the download") from error


def make_preprocess(config: dict, tokenizer: PreTrainedTokenizerBase, directory: Path) -> Preprocess:
    """Sizes and words of a config.json; a UserError if its template or the tokenizer's words are not Sa2VA's."""
    sam2_px = _sam2_config(config).prompt_encoder_config.image_size
    if _is_qwen_vl(config):
        text = published_qwen.model_config(config, directory / "config.json").text_config
        published_tokenizer.check_words(tokenizer, _QWEN_WORDS, text.vocab_size, directory)
        return published_qwen.make_preprocess(config, tokenizer, sam2_px, directory)
    vision = config["vision_config"]
    tile_px = config.get("force_image_size") or vision.get("image_size", 224)
    name = str(config.get("template")).replace("-", "_")
    if name not in TEMPLATES:
        raise UserError(
            f"{directory / 'config.json'}: template {name!r} is not supported; supported: {', '.join(TEMPLATES)}"
        )
    words = (SEG_TOKEN, IMAGE_TOKEN, IMAGE_START, IMAGE_END, TEMPLATES[name].end)
    rows = _language_config(config["llm_config"], directory / "config.json").vocab_size
    published_tokenizer.check_words(tokenizer, words, rows, directory)
    return PreprocessInternVL(
        tokenizer=tokenizer,
        template=TEMPLATES[name],
        tile_px=tile_px,
        tokens_per_tile=int((tile_px // vision.get("patch_size", 14)) ** 2 * config.get("downsample_ratio", 0.5) ** 2),
        # The published code ignores config.json here and always takes 1 to 12 tiles and a thumbnail.
        max_tiles=config.get("native", {}).get("max_tiles", 12),
        use_thumbnail=True,
        sam2_px=sam2_px,
    )


def save(
    directory: Path,
    model: Sa2VA,
    config: dict,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Writes a complete published directory (one safetensors file); returns the bytes of the weights."""
    directory.mkdir(parents=True, exist_ok=True)
    published = {name: tensor.to(dtype).contiguous().clone() for name, tensor in weights.published_state(model).items()}
    save_file(published, directory / weights.FILE, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(directory)
    if _is_qwen_vl(config):
        published_qwen.write_processor(directory, config)
    return (directory / weights.FILE).stat().st_size


def _is_qwen_vl(config: dict) -> bool:
    """The Qwen-VL families have no llm_config: their config.json is that of the vision and language model itself."""
    qwen = "Sa2VAChatModelQwen" in (config.get("architectures") or [])
    return isinstance(config.get("vision_config"), dict) and "llm_config" not in config and qwen


def _build_qwen(config: dict, image_token_id: int, file: Path) -> Sa2VAQwen:
    made = published_qwen.model_config(config, file)
    if made.image_token_id != image_token_id:
        raise UserError(
            f"{file}: image_token_id is {made.image_token_id}, the tokenizer's {preprocess_qwen.IMAGE_TOKEN} is "
            f"{image_token_id}; tokenizer and model are not of one checkpoint"
        )
    try:
        return Sa2VAQwen(made, _sam2_config(config))
    except REFUSED as error:
        raise UserError(f"{file}: no model can be built from it ({_one_line(error)}); check the download") from error


def _vision_config(published: dict, file: Path) -> InternVLVisionConfig:
    """What the file leaves out is as in the published InternVisionConfig: the 6B model's."""
    try:
        return InternVLVisionConfig(
            hidden_size=published.get("hidden_size", 3200),
            num_hidden_layers=published.get("num_hidden_layers", 48),
            num_attention_heads=published.get("num_attention_heads", 25),
            intermediate_size=published.get("intermediate_size", 12_800),
            hidden_act=published.get("hidden_act", "gelu"),
            layer_norm_eps=published.get("layer_norm_eps", 1e-6),
            norm_type=published.get("norm_type", "rms_norm"),
            attention_bias=published.get("qkv_bias", False),
            use_qk_norm=published.get("qk_normalization", True),
            image_size=published.get("image_size", 224),
            patch_size=published.get("patch_size", 14),
        )
    except REFUSED as error:
        raise UserError(f"{file}: vision_config is not valid ({_one_line(error)}); check the download") from error


def _language_config(published: dict, file: Path) -> PreTrainedConfig:
    """All published settings but those about how to run: many ask for flash_attention_2, which is not installed."""
    settings = {key: value for key, value in published.items() if key not in HOW_TO_RUN}
    architecture = (published.get("architectures") or ["none"])[0]
    try:
        match architecture:
            case "Qwen2ForCausalLM":
                return Qwen2Config(**settings)
            case "Qwen3ForCausalLM":
                return Qwen3Config(**settings)
            case "LlamaForCausalLM":
                return LlamaConfig(**settings)
            case "InternLM2ForCausalLM":
                return internlm2.language_config(published, file)
            case "Phi3ForCausalLM":
                return phi3.language_config(published, file)
    except UserError:
        raise
    except REFUSED as error:
        raise UserError(f"{file}: llm_config is not valid ({_one_line(error)}); check the download") from error
    raise UserError(
        f"{file}: language model {architecture} is not supported yet; "
        "supported: Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaForCausalLM, InternLM2ForCausalLM, Phi3ForCausalLM"
    )


def _sam2_config(config: dict) -> Sam2Config:
    return Sam2Config(**config.get("native", {}).get("sam2_config", _SAM2_HIERA_LARGE))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
