"""The published code made to run on small checkpoints without CUDA. Reference side alone.

Takes the published modules and patches them in memory; no file of theirs is changed. It does not know the inputs.

The published SAM2 writes its sizes into the functions that build it. Each class that these functions call is wrapped so
that some keyword arguments get other values, whatever the function says; the classes' own code runs unchanged.
"""

import functools
import types

import torch
from transformers import Phi3Config

from parity import cases


def sam2(module: types.ModuleType, config: dict) -> None:
    """Puts a Sam2Config's sizes (as a dict) in place of Hiera-L's in the published sam2.py."""
    backbone = config["vision_config"]["backbone_config"]
    decoder = config["mask_decoder_config"]
    width, image_px = decoder["hidden_size"], config["prompt_encoder_config"]["image_size"]
    sizes = {
        "Hiera": {
            "embed_dim": backbone["hidden_size"],
            "num_heads": backbone["num_attention_heads"],
            "stages": backbone["blocks_per_stage"],
            "global_att_blocks": backbone["global_attention_blocks"],
            "window_pos_embed_bkg_spatial_size": backbone["window_positional_embedding_background_size"],
            "window_spec": backbone["window_size_per_stage"],
        },
        "FpnNeck": {"d_model": width, "backbone_channel_list": config["vision_config"]["backbone_channel_list"]},
        "SAM2VideoPredictor": {"image_size": image_px},
        "TwoWayTransformer": {"mlp_dim": decoder["mlp_dim"], "num_heads": decoder["num_attention_heads"]},
        "MaskDecoder": {"iou_head_hidden_dim": decoder["iou_head_hidden_dim"]},
        # Video memory, which images never reach, at a size that costs nothing.
        "RoPEAttention": {"embedding_dim": width},
        "MemoryAttentionLayer": {"d_model": width, "dim_feedforward": 16},
        "MemoryAttention": {"d_model": width, "num_layers": 1},
        "MemoryEncoder": {"in_dim": width},
        "MaskDownSampler": {"embed_dim": width},
        "CXBlock": {"dim": width},
    }
    for name, changed in sizes.items():
        setattr(module, name, _with(getattr(module, name), changed))


def run_on_cpu() -> None:
    """The published inference moves tensors with .cuda(); here that stays where it is."""
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor


def configuration(module: types.ModuleType, published: dict):
    """The published configuration object of a config.json.

    The published model class knows Phi3ForCausalLM, its configuration class refuses the name: it is told Llama and
    given the Phi-3 settings after.
    """
    if "llm_config" not in published:
        return _qwen_configuration(module.Sa2VAChatConfigQwen, published)
    language = published["llm_config"]
    if language["architectures"] != ["Phi3ForCausalLM"]:
        return module.Sa2VAChatConfig(**published)
    config = module.Sa2VAChatConfig(**published | {"llm_config": language | {"architectures": ["LlamaForCausalLM"]}})
    config.llm_config = Phi3Config(**language)
    return config


def ready(model: torch.nn.Module) -> torch.nn.Module:
    """Sets what the published training code, not the model's own constructor, sets on a model."""
    if hasattr(model, "vision_model"):
        model._count = 0  # forward counts its calls
        model.img_context_token_id = cases.WORDS.index("<IMG_CONTEXT>")
    return model


def _qwen_configuration(kind: type, published: dict):
    """Before transformers 4.52 the language model's settings stood at the top, without a text_config."""
    if "text_config" in kind.sub_configs:
        return kind(**published)
    kind.text_config = property(lambda config: config)
    return kind(**cases.flat(published))


def _with(kind: type, changed: dict) -> type:
    class Resized(kind):
        @functools.wraps(kind.__init__)
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | changed)

    Resized.__name__ = kind.__name__
    return Resized
