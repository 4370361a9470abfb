"""Protects the key map: every published name has one native place, and every tensor comes back unchanged."""

import published_names
import pytest
import small_sa2va as small
import torch
from published_names import SAM2
from transformers import Sam2Model

from sft.model import internlm2, key_map, published

IMAGE_NAMES = published_names.expand(published_names.IMAGE_PATTERNS)
VIDEO_NAMES = published_names.expand(published_names.VIDEO_PATTERNS)
VISION_NAMES = published_names.expand(published_names.VISION_PATTERNS, "vision_model.")
PAIRS = [  # published, native; written by hand, tensors and module paths
    ("image_encoder.trunk.patch_embed.proj.weight", "vision_encoder.backbone.patch_embed.projection.weight"),
    ("image_encoder.trunk.blocks.8.proj.bias", "vision_encoder.backbone.blocks.8.proj.bias"),
    ("image_encoder.trunk.blocks.8.attn.proj", "vision_encoder.backbone.blocks.8.attn.proj"),
    ("image_encoder.trunk.blocks.8.norm1.weight", "vision_encoder.backbone.blocks.8.layer_norm1.weight"),
    ("image_encoder.trunk.blocks.8.mlp.layers.0", "vision_encoder.backbone.blocks.8.mlp.proj_in"),
    ("image_encoder.trunk.blocks.8.mlp.layers.1.bias", "vision_encoder.backbone.blocks.8.mlp.proj_out.bias"),
    ("image_encoder.neck.convs.2.conv.weight", "vision_encoder.neck.convs.2.weight"),
    ("sam_prompt_encoder.mask_downscaling.4.bias", "prompt_encoder.mask_embed.layer_norm2.bias"),
    ("sam_prompt_encoder.no_mask_embed.weight", "prompt_encoder.no_mask_embed.weight"),
    ("sam_mask_decoder", "mask_decoder"),
    ("sam_mask_decoder.transformer.layers.1.mlp.layers.1", "mask_decoder.transformer.layers.1.mlp.proj_out"),
    (
        "sam_mask_decoder.transformer.layers.1.self_attn.out_proj",
        "mask_decoder.transformer.layers.1.self_attn.o_proj",
    ),
    ("sam_mask_decoder.transformer.layers.0.norm4.weight", "mask_decoder.transformer.layers.0.layer_norm4.weight"),
    ("sam_mask_decoder.transformer.norm_final_attn.bias", "mask_decoder.transformer.layer_norm_final_attn.bias"),
    ("sam_mask_decoder.output_upscaling.1.weight", "mask_decoder.upscale_layer_norm.weight"),
    ("sam_mask_decoder.output_upscaling.3.weight", "mask_decoder.upscale_conv2.weight"),
    (
        "sam_mask_decoder.output_hypernetworks_mlps.3.layers.0.bias",
        "mask_decoder.output_hypernetworks_mlps.3.proj_in.bias",
    ),
    ("sam_mask_decoder.iou_prediction_head.layers.1.weight", "mask_decoder.iou_prediction_head.layers.0.weight"),
    ("sam_mask_decoder.pred_obj_score_head.layers.2.weight", "mask_decoder.pred_obj_score_head.proj_out.weight"),
]


def test_the_list_of_published_names_is_whole():
    assert len(IMAGE_NAMES) == len(set(IMAGE_NAMES)) == 743 and len(VIDEO_NAMES) == len(set(VIDEO_NAMES)) == 157


def test_every_published_sam2_tensor_has_one_place_in_hiera_l_and_every_place_is_filled():
    filled = [native for name in IMAGE_NAMES for native in key_map.to_native(name, torch.empty(0))]
    rows = [name for name in filled if "[" in name]
    assert rows == [f"{SAM2}prompt_encoder.point_embed.weight[{row}]" for row in range(4)]
    whole = [name for name in filled if "[" not in name] + list(key_map.join_rows({"[0]": torch.empty(0)}))
    with torch.device("meta"):
        native = {SAM2 + name for name in Sam2Model(published._sam2_config({})).state_dict()}
    assert len(whole) == len(set(whole)) and set(whole) == native


def test_video_memory_is_left_out_and_nothing_else():
    assert all(key_map.to_native(name, torch.empty(0)) == {} for name in VIDEO_NAMES)
    assert not [name for name in IMAGE_NAMES if key_map.VIDEO_ONLY.match(name)]
    # A name that only begins like one of video memory is no name we know: it must not vanish in silence.
    assert key_map.to_native(f"{SAM2}no_obj_ptr_new", torch.empty(0))


@pytest.mark.parametrize("names", [IMAGE_NAMES, VISION_NAMES], ids=["sam2", "vision"])
def test_names_of_one_shape_return_unchanged(names):
    special = ("point_embeddings", "gaussian_matrix", "vision_model.encoder.layers.0.attn.qkv")
    plain = [name for name in names if not any(word in name for word in special)]
    assert [name for name in plain if key_map.published_name(key_map.native_name(name)) != name] == []
    paths = {name.rpartition(".")[0] for name in plain}  # module paths, as adapters name them
    assert [path for path in paths if key_map.published_name(key_map.native_name(path)) != path] == []


@pytest.mark.parametrize(("name", "native"), PAIRS, ids=[name for name, _ in PAIRS])
def test_names_by_hand(name, native):
    assert key_map.native_name(SAM2 + name) == SAM2 + native
    assert key_map.published_name(SAM2 + native) == SAM2 + name


@pytest.mark.parametrize(
    ("name", "native"),
    [
        ("embeddings.class_embedding", "embeddings.cls_token"),
        ("embeddings.patch_embedding.bias", "embeddings.patch_embeddings.projection.bias"),
        ("embeddings.position_embedding", "embeddings.position_embeddings"),
        ("encoder.layers.3.attn.proj.weight", "encoder.layer.3.attention.projection_layer.weight"),
        ("encoder.layers.3.attn.q_norm.weight", "encoder.layer.3.attention.q_norm.weight"),
        ("encoder.layers.3.norm2.bias", "encoder.layer.3.layernorm_after.bias"),
        ("encoder.layers.3.ls1", "encoder.layer.3.lambda_1"),
        ("encoder.layers.3.mlp.fc1.weight", "encoder.layer.3.mlp.fc1.weight"),
    ],
)
def test_vision_names_by_hand(name, native):
    assert key_map.native_name(f"vision_model.{name}") == f"vision_model.{native}"
    assert key_map.published_name(f"vision_model.{native}") == f"vision_model.{name}"


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.model.layers.0.mlp.down_proj",
        "language_model.lm_head.weight",
        "mlp1.0.weight",
        "text_hidden_fcs.2.bias",
    ],
)
def test_all_else_keeps_its_name(name):
    assert key_map.native_name(name) == key_map.published_name(name) == name


def test_tensors_that_differ_in_shape():
    qkv = torch.arange(12.0).view(6, 2)
    name = "vision_model.encoder.layers.5.attn.qkv.weight"
    parts = key_map.to_native(name, qkv)
    prefix = "vision_model.encoder.layer.5.attention."
    assert {key: part[0, 0].item() for key, part in parts.items()} == {
        f"{prefix}q_proj.weight": 0,
        f"{prefix}k_proj.weight": 4,
        f"{prefix}v_proj.weight": 8,
    }
    assert torch.equal(key_map.to_published(parts)[name], qkv)
    points = {f"{SAM2}sam_prompt_encoder.point_embeddings.{row}.weight": torch.full((1, 8), row) for row in range(4)}
    rows = {key: part for name, tensor in points.items() for key, part in key_map.to_native(name, tensor).items()}
    whole = key_map.join_rows(dict(reversed(rows.items())))  # shards come in any order
    assert whole[f"{SAM2}prompt_encoder.point_embed.weight"][:, 0].tolist() == [0, 1, 2, 3]
    back = key_map.to_published(whole)
    assert set(back) == set(points) and all(torch.equal(back[name], tensor) for name, tensor in points.items())


def test_every_tensor_of_a_model_makes_the_round_trip():
    for architecture in small.LANGUAGE_MODELS:
        model = small.build(small.config(architecture))
        state, heads = model.state_dict(), internlm2.heads_of(model.language_model.config)
        written = key_map.to_published(state, heads)
        assert f"{SAM2}sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix" in written
        read: dict[str, torch.Tensor] = {}
        for name, tensor in written.items():
            read |= key_map.to_native(name, tensor, heads)
        rows = {name: read.pop(name) for name in list(read) if "[" in name}
        read |= key_map.join_rows(rows)
        assert set(read) == set(state)
        assert [name for name in state if not torch.equal(read[name], state[name])] == []
