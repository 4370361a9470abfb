"""The published Sa2VA directory format, read and written: config.json, safetensors shards, tokenizer files.

A directory is data: nothing in it is run. Gives a native `Sa2VA` and its `Preprocess`; it does not know LoRA.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import InternVLVisionConfig, LlamaConfig, Qwen2Config, Qwen3Config, Sam2Config

from sft.config import UserError
from sft.model import key_map
from sft.model.preprocess import IMAGE_END, IMAGE_START, IMAGE_TOKEN, SEG_TOKEN, TEMPLATES, Preprocess
from sft.model.sa2va import Sa2VA, Sa2VASettings

EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "tiny_sa2va"
WEIGHTS_INDEX, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"
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
    tokenizer = _read_tokenizer(directory)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    with init_empty_weights(include_buffers=False):
        model = build(config, image_token_id, directory)
    _fill(model, directory, dtype, torch.device(device))
    return Loaded(model.eval(), _preprocess(config, model, tokenizer, directory), directory)


def read_config(directory: Path) -> dict:
    """config.json of a published directory; raises UserError saying what was found instead."""
    if not directory.is_dir():
        raise UserError(f"model_path {directory}: no such directory; give a published Sa2VA directory or 'embedded'")
    file = directory / "config.json"
    if not file.is_file():
        found = ", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing"
        raise UserError(f"model_path {directory}: not a Sa2VA directory, no config.json in it (found {found})")
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); copy the file from the published model again") from error
    if config.get("model_type") != "sa2va_chat":
        raise UserError(
            f"{file}: model_type is {config.get('model_type')!r}, expected 'sa2va_chat'; give a Sa2VA checkpoint"
        )
    return config


def build(config: dict, image_token_id: int, directory: Path) -> Sa2VA:
    """The native model of a config.json, weights untrained (and on the meta device when the caller says so)."""
    if "vision_config" not in config or "llm_config" not in config:
        raise UserError(
            f"{directory / 'config.json'}: architecture {config.get('architectures')} is not supported yet; "
            "supported: Sa2VAChatModel (InternVL family), which has vision_config and llm_config"
        )
    settings = Sa2VASettings(
        config.get("downsample_ratio", 0.5), config.get("ps_version", "v1"), config.get("select_layer", -1)
    )
    sam2_config = Sam2Config(**config.get("native", {}).get("sam2_config", _SAM2_HIERA_LARGE))
    return Sa2VA(
        _vision_config(config), _language_config(config["llm_config"], directory), sam2_config, settings, image_token_id
    )


def save(directory: Path, model: Sa2VA, config: dict, tokenizer, *, dtype: torch.dtype = torch.bfloat16) -> int:
    """Writes a complete published directory (one safetensors file); returns the bytes of the weights."""
    directory.mkdir(parents=True, exist_ok=True)
    state = dict(model.state_dict())
    if model.language_model.config.tie_word_embeddings:
        state.pop("language_model.lm_head.weight", None)
    published = {name: tensor.to(dtype).contiguous().clone() for name, tensor in key_map.to_published(state).items()}
    save_file(published, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(directory)
    return (directory / WEIGHTS_FILE).stat().st_size


def _vision_config(config: dict) -> InternVLVisionConfig:
    published = config["vision_config"]
    return InternVLVisionConfig(
        hidden_size=published.get("hidden_size", 1024),
        num_hidden_layers=published.get("num_hidden_layers", 24),
        num_attention_heads=published.get("num_attention_heads", 16),
        intermediate_size=published.get("intermediate_size", 4096),
        hidden_act=published.get("hidden_act", "gelu"),
        layer_norm_eps=published.get("layer_norm_eps", 1e-6),
        norm_type=published.get("norm_type", "layer_norm"),
        attention_bias=published.get("qkv_bias", True),
        use_qk_norm=published.get("qk_normalization", False),
        image_size=published.get("image_size", 448),
        patch_size=published.get("patch_size", 14),
    )


def _language_config(published: dict, directory: Path):
    architecture = (published.get("architectures") or ["none"])[0]
    settings = {
        key: value for key, value in published.items() if key not in ("auto_map", "_name_or_path", "torch_dtype")
    }
    match architecture:
        case "Qwen2ForCausalLM":
            return Qwen2Config(**settings)
        case "Qwen3ForCausalLM":
            return Qwen3Config(**settings)
        case "LlamaForCausalLM":
            return LlamaConfig(**settings)
        case _:
            raise UserError(
                f"{directory / 'config.json'}: language model {architecture} is not supported yet; "
                "supported: Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaForCausalLM"
            )


def _read_tokenizer(directory: Path):
    """The concrete tokenizer class: AutoTokenizer would ask on the terminal whether to run the directory's code."""
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

    file = directory / "tokenizer_config.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file; copy the published model's tokenizer files there")
    name = json.loads(file.read_text()).get("tokenizer_class", "")
    match name.removesuffix("Fast"):
        case "Qwen2Tokenizer":
            kind = Qwen2Tokenizer
        case "LlamaTokenizer":
            kind = LlamaTokenizer
        case "PreTrainedTokenizer" | "TokenizersBackend":
            kind = PreTrainedTokenizerFast
        case _:
            raise UserError(
                f"{file}: tokenizer_class {name!r} is not supported yet; supported: Qwen2Tokenizer, LlamaTokenizer, "
                "PreTrainedTokenizerFast"
            )
    tokenizer = kind.from_pretrained(directory)
    vocabulary = tokenizer.get_vocab()
    absent = [token for token in (SEG_TOKEN, IMAGE_TOKEN, IMAGE_START, IMAGE_END) if token not in vocabulary]
    if absent:
        raise UserError(
            f"{directory}: the tokenizer lacks {', '.join(absent)}; this is not a Sa2VA checkpoint's tokenizer"
        )
    return tokenizer


def _preprocess(config: dict, model: Sa2VA, tokenizer, directory: Path) -> Preprocess:
    vision = config["vision_config"]
    tile_px = config.get("force_image_size") or vision.get("image_size", 448)
    template = (config.get("template") or "").replace("-", "_")
    if template not in TEMPLATES:
        raise UserError(
            f"{directory / 'config.json'}: template {template!r} is not supported; supported: {', '.join(TEMPLATES)}"
        )
    return Preprocess(
        tokenizer=tokenizer,
        template=TEMPLATES[template],
        tile_px=tile_px,
        tokens_per_tile=int((tile_px // vision.get("patch_size", 14)) ** 2 * model.settings.downsample_ratio**2),
        # The published code ignores config.json here and always takes 1 to 12 tiles and a thumbnail.
        max_tiles=config.get("native", {}).get("max_tiles", 12),
        use_thumbnail=True,
        sam2_px=model.sam2.config.prompt_encoder_config.image_size,
    )


def _fill(model: Sa2VA, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Puts every tensor of the shards in its place; each place filled once, or an error that lists the rest."""
    wanted = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    tied = model.language_model.config.tie_word_embeddings
    if tied:
        wanted.pop("language_model.lm_head.weight", None)
    rows: dict[str, Tensor] = {}
    left_over, misshapen = [], []

    def place(name: str, tensor: Tensor) -> None:
        if "[" in name:
            rows[name] = tensor
        elif name not in wanted:
            left_over.append(name)
        elif wanted[name].shape != tensor.shape:
            misshapen.append(f"{name}: {list(tensor.shape)} in the file, {list(wanted[name].shape)} by config.json")
            del wanted[name]
        else:
            _assign(model, name, tensor.to(device=device, dtype=dtype))
            del wanted[name]

    for published, tensor in _tensors(directory):
        if tied and published == "language_model.lm_head.weight":
            continue  # from_pretrained ties it to the embeddings whatever the file holds
        for name, part in key_map.to_native(published, tensor).items():
            place(name, part)
    for name, whole in key_map.join_rows(rows).items():
        place(name, whole)
    _report_mismatch(directory, sorted(wanted), left_over, misshapen)
    if tied:
        model.language_model.tie_weights()
    for buffer_owner in model.modules():  # buffers outside the state dict (rotary frequencies) were made on the CPU
        for name in buffer_owner._non_persistent_buffers_set:
            buffer_owner._buffers[name] = buffer_owner._buffers[name].to(device)


def _tensors(directory: Path):
    """Yields (published name, tensor) shard by shard; memory holds one tensor at a time."""
    for file in _weight_files(directory):
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - an open shard is no mapping
                    yield name, shard.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{file}: unreadable safetensors file ({error}); download it again") from error


def _weight_files(directory: Path) -> list[Path]:
    index = directory / WEIGHTS_INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        absent = [name for name in names if not (directory / name).is_file()]
        if absent:
            raise UserError(f"{index}: names shards that are not there: {', '.join(absent)}; download them")
        return [directory / name for name in names]
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    raise UserError(f"{directory}: no {WEIGHTS_FILE} and no {WEIGHTS_INDEX}; weights are read from safetensors only")


def _assign(model: Sa2VA, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)


def _report_mismatch(directory: Path, missing: list[str], left_over: list[str], misshapen: list[str]) -> None:
    lines = [f"{len(missing)} missing ({_some(missing)})"] if missing else []
    lines += [f"{len(left_over)} left over ({_some(left_over)})"] if left_over else []
    lines += [f"{len(misshapen)} of another shape ({_some(misshapen)})"] if misshapen else []
    if lines:
        raise UserError(f"{directory}: the weights do not fit config.json: {'; '.join(lines)}; check the download")


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
