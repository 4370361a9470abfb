"""Published tensor names <-> native module paths, in both directions.

Takes and gives names and tensors, no files. The published model keeps its own InternViT and SAM2; here transformers'
modules stand in their place, so names differ inside `vision_model` and `grounding_encoder.sam2_model` and nowhere else,
but for an InternLM2 language model, whose `heads` are given then (internlm2.py). Three tensors differ in shape as well:
InternViT's fused qkv, SAM2's four point embeddings, SAM2's gaussian matrix.
"""

import re

import torch
from torch import Tensor

from sft.model import internlm2
from sft.model.internlm2 import Heads

SAM2 = "grounding_encoder.sam2_model."
_LANGUAGE = "language_model."
_GAUSSIAN_PUBLISHED = f"{SAM2}sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_GAUSSIAN_NATIVE = (
    f"{SAM2}shared_image_embedding.positional_embedding",
    f"{SAM2}prompt_encoder.shared_embedding.positional_embedding",
)
_POINT_PUBLISHED = f"{SAM2}sam_prompt_encoder.point_embeddings."
_POINT_NATIVE = f"{SAM2}prompt_encoder.point_embed.weight"
_QKV = re.compile(r"^(vision_model\.encoder\.layer\.\d+\.attention\.)([qkv])_proj\.(weight|bias)$")
_QKV_PUBLISHED = re.compile(r"^vision_model\.encoder\.layers\.(\d+)\.attn\.qkv\.(weight|bias)$")

# The Qwen-VL families as transformers 4.49 wrote them; later versions, and the native model, have one more `model`.
_OLD_QWEN = (
    (re.compile(r"^model\.visual\b"), "model.model.visual"),
    (re.compile(r"^model\.model\.(layers|embed_tokens|norm)\b"), r"model.model.language_model.\1"),
)
_NEW_QWEN = (
    (re.compile(r"^model\.model\.visual\b"), "model.visual"),
    (re.compile(r"^model\.model\.language_model\."), "model.model."),
)

# Weights of SAM2's video memory; images never reach them.
VIDEO_ONLY = re.compile(
    rf"^{re.escape(SAM2)}(memory_attention|memory_encoder|maskmem_tpos_enc|no_mem_pos_enc|no_obj_ptr|no_obj_embed_spatial"
    r"|obj_ptr_proj|obj_ptr_tpos_proj|mask_downsample)\b"
)

# (published, native) fragments. Of a part's prefixes the first that matches is replaced, of its words each one.
_PREFIXES = (
    ("image_encoder.trunk.patch_embed.proj.", "vision_encoder.backbone.patch_embed.projection."),
    ("image_encoder.trunk.", "vision_encoder.backbone."),
    ("image_encoder.neck.", "vision_encoder.neck."),
    ("sam_prompt_encoder.mask_downscaling.0.", "prompt_encoder.mask_embed.conv1."),
    ("sam_prompt_encoder.mask_downscaling.1.", "prompt_encoder.mask_embed.layer_norm1."),
    ("sam_prompt_encoder.mask_downscaling.3.", "prompt_encoder.mask_embed.conv2."),
    ("sam_prompt_encoder.mask_downscaling.4.", "prompt_encoder.mask_embed.layer_norm2."),
    ("sam_prompt_encoder.mask_downscaling.6.", "prompt_encoder.mask_embed.conv3."),
    ("sam_prompt_encoder.", "prompt_encoder."),
    ("sam_mask_decoder.output_upscaling.0.", "mask_decoder.upscale_conv1."),
    ("sam_mask_decoder.output_upscaling.1.", "mask_decoder.upscale_layer_norm."),
    ("sam_mask_decoder.output_upscaling.3.", "mask_decoder.upscale_conv2."),
    ("sam_mask_decoder.transformer.norm_final_attn.", "mask_decoder.transformer.layer_norm_final_attn."),
    ("sam_mask_decoder.", "mask_decoder."),
    ("no_mem_embed.", "no_memory_embedding."),
)
_SAM2_WORDS = (
    (".out_proj.", ".o_proj."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".norm3.", ".layer_norm3."),
    (".norm4.", ".layer_norm4."),
)
_VISION_WORDS = (
    (".class_embedding.", ".cls_token."),
    (".patch_embedding.", ".patch_embeddings.projection."),
    (".position_embedding.", ".position_embeddings."),
    (".encoder.layers.", ".encoder.layer."),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.", ".attention."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls1.", ".lambda_1."),
    (".ls2.", ".lambda_2."),
)
# Heads of three layers number them 0, 1, 2; two-layer MLPs number them 0, 1. One layer of a name is renamed.
_HEAD = re.compile(r"(output_hypernetworks_mlps\.\d+|iou_prediction_head|pred_obj_score_head)\.")
_HEAD_LAYERS = ((".layers.0.", ".proj_in."), (".layers.1.", ".layers.0."), (".layers.2.", ".proj_out."))
_MLP_LAYERS = ((".mlp.layers.0.", ".mlp.proj_in."), (".mlp.layers.1.", ".mlp.proj_out."))
# The published neck wraps each convolution in a Sequential with one entry called conv.
_NECK = re.compile(r"(\.neck\.convs\.\d+)\.(conv\.)?")


def native_name(name: str, heads: Heads | None = None) -> str:
    """Native path of a published tensor or module name whose shape is the same in both."""
    if heads and name.startswith(_LANGUAGE):
        return internlm2.native_name(name)
    return _rename(newer_layout(name), published=True)


def published_name(name: str, heads: Heads | None = None) -> str:
    """Published path of a native tensor or module name whose shape is the same in both."""
    if heads and name.startswith(_LANGUAGE):
        return internlm2.published_name(name)
    return _rename(name, published=False)


def newer_layout(name: str) -> str:
    """A published name of the Qwen-VL families as transformers 4.57 and later write it; others stay as they are."""
    for old, new in _OLD_QWEN:
        name = old.sub(new, name)
    return name


def older_layout(name: str) -> str:
    """What transformers 4.49 called a tensor of the Qwen-VL families; others stay as they are."""
    for newer, old in _NEW_QWEN:
        name = newer.sub(old, name)
    return name


def to_native(name: str, tensor: Tensor, heads: Heads | None = None) -> dict[str, Tensor]:
    """One published tensor -> the native tensors it fills: none for video memory, several where it is split.

    SAM2's point embeddings 0..3 each give one row, named `<native>[i]`; `join_rows` puts them together.
    """
    name = newer_layout(name)
    if VIDEO_ONLY.match(name):
        return {}
    if heads and name.startswith(_LANGUAGE):
        return internlm2.to_native(name, tensor, heads)
    if fused := _QKV_PUBLISHED.match(name):
        layer, kind = fused.groups()
        prefix = f"vision_model.encoder.layer.{layer}.attention."
        parts = zip("qkv", tensor.tensor_split(3), strict=True)
        return {f"{prefix}{which}_proj.{kind}": part for which, part in parts}
    if name == _GAUSSIAN_PUBLISHED:
        return {native: tensor.clone() for native in _GAUSSIAN_NATIVE}
    if name.startswith(_POINT_PUBLISHED):
        row = name.removeprefix(_POINT_PUBLISHED).removesuffix(".weight")
        return {f"{_POINT_NATIVE}[{row}]": tensor}
    return {native_name(name): tensor}


def join_rows(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """The row entries of `to_native`, all collected -> the whole tensors."""
    return {_POINT_NATIVE: torch.cat([rows[name] for name in sorted(rows)])} if rows else {}


def to_published(state: dict[str, Tensor], heads: Heads | None = None) -> dict[str, Tensor]:
    """A whole native state dict -> published names and shapes (video memory stays absent)."""
    published: dict[str, Tensor] = {}
    if heads:
        language = {name: tensor for name, tensor in state.items() if name.startswith(_LANGUAGE)}
        published = internlm2.to_published(language, heads)
        state = {name: tensor for name, tensor in state.items() if name not in language}
    for name, tensor in state.items():
        if split := _QKV.match(name):
            prefix, which, kind = split.groups()
            if which == "q":
                whole = torch.cat([state[f"{prefix}{part}_proj.{kind}"] for part in "qkv"])
                layer = prefix.split(".")[3]
                published[f"vision_model.encoder.layers.{layer}.attn.qkv.{kind}"] = whole
        elif name == _POINT_NATIVE:
            published |= {f"{_POINT_PUBLISHED}{i}.weight": row[None].clone() for i, row in enumerate(tensor)}
        elif name in _GAUSSIAN_NATIVE:
            published[_GAUSSIAN_PUBLISHED] = tensor
        else:
            published[published_name(name)] = tensor
    return published


def _rename(name: str, *, published: bool) -> str:
    """Renames from published to native, or backwards."""
    dotted = name + "."  # so that a rule for a whole word also matches at the end of a module path
    if name.startswith("vision_model."):
        return _each(dotted, _VISION_WORDS, published)[:-1]
    if not name.startswith(SAM2):
        return name
    inner = _first(dotted.removeprefix(SAM2), _PREFIXES, published, at_start=True)
    inner = _NECK.sub(r"\1." if published else r"\1.conv.", inner)
    inner = _first(inner, _HEAD_LAYERS if _HEAD.search(inner) else _MLP_LAYERS, published)
    return SAM2 + _each(inner, _SAM2_WORDS, published)[:-1]


def _first(text: str, rules, published: bool, *, at_start: bool = False) -> str:
    """Replaces by the first rule that matches: here one rule's result can be another rule's source."""
    for source, target in _directed(rules, published):
        if text.startswith(source) if at_start else source in text:
            return text.replace(source, target, 1)
    return text


def _each(text: str, rules, published: bool) -> str:
    for source, target in _directed(rules, published):
        text = text.replace(source, target)
    return text


def _directed(rules, published: bool):
    return rules if published else [(native, name) for name, native in rules]
