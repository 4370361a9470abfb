"""What a published directory of the Qwen-VL families says: which model, how its images and questions are made.

Takes config.json and the processor's files, gives transformers' configurations, a `PreprocessQwen`, and the processor's
file of a new directory. It does not read weights or tokenizers.
"""

import copy
import json
from pathlib import Path
from typing import Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen3VLConfig

from sft.config import UserError
from sft.model.preprocess_qwen import PreprocessQwen
from sft.model.published_json import read_json

Family = Literal["qwen2_5_vl", "qwen3_vl"]
# What transformers raises on settings that make no model.
REFUSED = (ArithmeticError, AttributeError, LookupError, RuntimeError, StrictDataclassError, TypeError, ValueError)
HOW_TO_RUN = ("_name_or_path", "attn_implementation", "auto_map", "dtype", "torch_dtype", "transformers_version")
PROCESSOR_FILE, OTHER_PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
_PARTS = ("text_config", "vision_config")
# transformers 4.57's rotary base, which a config.json may leave out; transformers 5 has another default for Qwen3-VL.
_ROPE_THETA = {"qwen2_5_vl": 1_000_000.0, "qwen3_vl": 5_000_000.0}
_STATISTICS = {
    "qwen2_5_vl": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "qwen3_vl": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
}


def family(config: dict, file: Path) -> Family:
    """Which of the two a config.json describes: its parts name their kind, and each has settings of its own.

    Raises:
        UserError: neither, with what was found.
    """
    parts = [config.get(part) for part in _PARTS]
    kinds = [str(part.get("model_type")) for part in parts if isinstance(part, dict) and part.get("model_type")]
    vision = config["vision_config"]
    if any("moe" in kind for kind in kinds) or "num_experts" in (config.get("text_config") or {}):
        raise UserError(f"{file}: a mixture of experts ({', '.join(kinds)}) is not supported; take a dense Sa2VA model")
    if any(kind.startswith("qwen3_vl") for kind in kinds) or "deepstack_visual_indexes" in vision:
        return "qwen3_vl"
    if any(kind.startswith("qwen2_5_vl") for kind in kinds) or "fullatt_block_indexes" in vision:
        return "qwen2_5_vl"
    raise UserError(
        f"{file}: vision_config and text_config are of {', '.join(kinds) or 'no kind that they name'}; "
        "supported: qwen2_5_vl, qwen3_vl"
    )


def model_config(config: dict, file: Path) -> Qwen2_5_VLConfig | Qwen3VLConfig:
    """transformers' configuration of the vision and language model; nothing in it about how to run.

    transformers 4.49 wrote the text decoder's settings at the top, later versions write them into text_config.
    """
    kind = family(config, file)
    config = copy.deepcopy(config)  # transformers writes into the dictionaries that it is given
    settings = {key: value for key, value in config.items() if key not in (*HOW_TO_RUN, "native", "model_type")}
    for part in _PARTS:
        if isinstance(settings.get(part), dict):
            dropped = (*HOW_TO_RUN, "model_type")  # older versions gave the vision part the whole model's
            settings[part] = {key: value for key, value in settings[part].items() if key not in dropped}
    text = settings.get("text_config") if isinstance(settings.get("text_config"), dict) else settings
    if "rope_theta" not in text and "rope_theta" not in (text.get("rope_parameters") or {}):
        text["rope_theta"] = _ROPE_THETA[kind]
    # The text decoder's own word counts, as in transformers 4.57.
    tied = bool(text.get("tie_word_embeddings", settings.get("tie_word_embeddings", False)))
    for copied in (text, settings):
        copied["tie_word_embeddings"] = tied
    try:
        made = (Qwen2_5_VLConfig if kind == "qwen2_5_vl" else Qwen3VLConfig)(**settings)
    except REFUSED as error:
        raise UserError(f"{file}: not valid ({' '.join(str(error).split())[:300]}); check the download") from error
    made.text_config.tie_word_embeddings = made.tie_word_embeddings = tied
    return made


def make_preprocess(config: dict, tokenizer: PreTrainedTokenizerBase, sam2_px: int, directory: Path) -> PreprocessQwen:
    """Sizes and statistics of the directory's processor, and its chat template.

    A directory of ours may say min_pixels and max_pixels under `native.preprocess`; the published code fixes them.
    """
    file, settings = _processor_settings(directory)
    needed = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")
    absent = [name for name in needed if name not in settings]
    if absent:
        raise UserError(f"{file}: lacks {', '.join(absent)}; copy the file from the published model again")
    return PreprocessQwen(
        tokenizer,
        chat_template=_chat_template(tokenizer, directory),
        patch_px=settings["patch_size"],
        merge=settings["merge_size"],
        frames=settings["temporal_patch_size"],
        mean=tuple(settings["image_mean"]),
        std=tuple(settings["image_std"]),
        sam2_px=sam2_px,
        **config.get("native", {}).get("preprocess", {}),
    )


def write_processor(directory: Path, config: dict) -> None:
    """Writes preprocessor_config.json for a config.json, as the published models of its kind have it."""
    made = model_config(config, directory / "config.json")
    mean, std = _STATISTICS[made.model_type]
    vision = made.vision_config
    settings = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen2_5_VLProcessor" if made.model_type == "qwen2_5_vl" else "Qwen3VLProcessor",
        "image_mean": mean,
        "image_std": std,
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    (directory / PROCESSOR_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def _processor_settings(directory: Path) -> tuple[Path, dict]:
    """transformers 4 writes the image processor into a file of its own, transformers 5 into that of the processor."""
    file = directory / PROCESSOR_FILE
    if file.is_file():
        return file, read_json(file)
    other = directory / OTHER_PROCESSOR_FILE
    if other.is_file() and isinstance(inner := read_json(other).get("image_processor"), dict):
        return other, inner
    raise UserError(f"{file}: no such file; copy the published model's processor files there")


def _chat_template(tokenizer: PreTrainedTokenizerBase, directory: Path) -> str:
    """In the order in which transformers looks for a processor's template; the tokenizer's own comes last."""
    if (file := directory / "chat_template.json").is_file():
        template = read_json(file).get("chat_template")
    elif (file := directory / "chat_template.jinja").is_file():
        template = file.read_text(encoding="utf-8")
    else:
        template = tokenizer.chat_template
    if not isinstance(template, str) or not template.strip():
        raise UserError(
            f"{directory}: no chat template (chat_template.json, chat_template.jinja, or in tokenizer_config.json); "
            "copy the published model's processor files there"
        )
    return template
