"""A Sa2VA of 0.2 M parameters: all parts, random weights, a word-level tokenizer; for tests of the model."""

import copy
import functools
from pathlib import Path

import numpy as np
import torch

from sft.model import published
from sft.model.preprocess import IMAGE_TOKEN, PreprocessInternVL
from sft.model.sa2va import Layout, Sa2VA, Sam2Features, VisionFeatures
from sft.model.sa2va_internvl import Sa2VAInternVL
from sft.model.tiny import TINY_CONFIG, build_tokenizer

QUESTION = "Please segment the blood vessels in this image."
LONGER = "Could you please segment the thin dark vessels in the left part of the image?"
MASK_PX = 32  # side of the mask decoder's grid
LANGUAGE_MODELS = (
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "LlamaForCausalLM",
    "InternLM2ForCausalLM",
    "Phi3ForCausalLM",
)

_SAM2 = {
    "vision_config": {
        "model_type": "sam2_vision_model",
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "image_size": [128, 128],
            "hidden_size": 8,
            "num_attention_heads": 1,
            "blocks_per_stage": [1, 2, 2, 1],
            "embed_dim_per_stage": [8, 16, 32, 64],
            "num_attention_heads_per_stage": [1, 1, 2, 2],
            "window_size_per_stage": [4, 4, 4, 4],
            "window_positional_embedding_background_size": [4, 4],
            "global_attention_blocks": [4],
        },
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "fpn_hidden_size": 32,
    },
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 128, "patch_size": 16},
    "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
}


def config(architecture: str = "Qwen2ForCausalLM", **language) -> dict:
    """config.json of a small model; keyword arguments change its llm_config."""
    small = copy.deepcopy(TINY_CONFIG)
    small["force_image_size"] = 56
    small["vision_config"] |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    small["vision_config"] |= {"intermediate_size": 64, "image_size": 56}
    small["llm_config"] |= {"architectures": [architecture], "hidden_size": 32, "intermediate_size": 48}
    small["llm_config"] |= {"num_hidden_layers": 2, "head_dim": 8} | language
    small["native"] = {"max_tiles": 12, "sam2_config": copy.deepcopy(_SAM2)}
    return small


@functools.cache
def tokenizer():
    return build_tokenizer(("blood vessels", "thin dark vessels"))


def build(settings: dict | None = None, seed: int = 0) -> Sa2VAInternVL:
    """Random fp32 weights, large enough that every part counts; the two copies of SAM2's gaussian matrix agree."""
    torch.manual_seed(seed)
    model = published.build(settings or config(), tokenizer().convert_tokens_to_ids(IMAGE_TOKEN), Path("small"))
    return perturbed(model)


def perturbed(model: Sa2VA) -> Sa2VA:
    """Every weight moved by random numbers, frozen and ready to be read."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    gaussian = model.sam2.shared_image_embedding.positional_embedding
    model.sam2.prompt_encoder.shared_embedding.positional_embedding.copy_(gaussian)
    return model.eval().requires_grad_(False)


@functools.cache
def model() -> Sa2VAInternVL:
    """One that tests only read."""
    return build()


@functools.cache
def preprocess() -> PreprocessInternVL:
    return published.make_preprocess(config(), tokenizer(), Path("small"))


def write(directory: Path, settings: dict | None = None, seed: int = 0, dtype=torch.float32) -> Sa2VAInternVL:
    """Writes a small published directory; returns the model that lies in it."""
    built = build(settings, seed)
    published.save(directory, built, settings or config(), tokenizer(), dtype=dtype)
    return built


def images(count: int, seed: int = 0) -> list[np.ndarray]:
    """Alternately of one tile, and of two tiles and a thumbnail."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (56, 112 if index % 2 else 56, 3), dtype=np.uint8) for index in range(count)]


def inputs(
    of: Sa2VAInternVL, count: int = 2, seed: int = 0, *, project: bool = True
) -> tuple[VisionFeatures, list[Layout], Sam2Features]:
    """Vision tokens of some images, the layout of each, and SAM2 features."""
    pictures = images(count, seed)
    vision = [preprocess().vision_input(picture) for picture in pictures]
    with torch.no_grad():
        sam2_images = torch.stack([preprocess().sam2_image(picture) for picture in pictures])
        features = of.sam2_features(sam2_images, project=project)
        return (
            VisionFeatures.join([of.vision_features(one) for one in vision]),
            [one.layout for one in vision],
            features,
        )
