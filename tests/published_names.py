"""Tensor names of a published Sa2VA's SAM2 (Hiera-L) and InternViT, as patterns: {a,b} is a choice, {0-3} a range."""

import itertools
import re

SAM2 = "grounding_encoder.sam2_model."
_WIDENING = "2,8,44"  # blocks in front of which the width doubles: the ends of stages 2, 6, 36, 4

IMAGE_PATTERNS = (
    "no_mem_embed",
    "image_encoder.trunk.{pos_embed,pos_embed_window}",
    "image_encoder.trunk.patch_embed.proj.{weight,bias}",
    "image_encoder.trunk.blocks.{0-47}.{norm1,norm2,attn.qkv,attn.proj,mlp.layers.0,mlp.layers.1}.{weight,bias}",
    f"image_encoder.trunk.blocks.{{{_WIDENING}}}.proj.{{weight,bias}}",
    "image_encoder.neck.convs.{0-3}.conv.{weight,bias}",
    "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    "sam_prompt_encoder.point_embeddings.{0-3}.weight",
    "sam_prompt_encoder.{not_a_point_embed,no_mask_embed}.weight",
    "sam_prompt_encoder.mask_downscaling.{0,1,3,4,6}.{weight,bias}",
    "sam_mask_decoder.transformer.layers.{0,1}.{self_attn,cross_attn_token_to_image,cross_attn_image_to_token}"
    ".{q_proj,k_proj,v_proj,out_proj}.{weight,bias}",
    "sam_mask_decoder.transformer.layers.{0,1}.{norm1,norm2,norm3,norm4,mlp.layers.0,mlp.layers.1}.{weight,bias}",
    "sam_mask_decoder.transformer.final_attn_token_to_image.{q_proj,k_proj,v_proj,out_proj}.{weight,bias}",
    "sam_mask_decoder.transformer.norm_final_attn.{weight,bias}",
    "sam_mask_decoder.{iou_token,mask_tokens,obj_score_token}.weight",
    "sam_mask_decoder.{output_upscaling.0,output_upscaling.1,output_upscaling.3,conv_s0,conv_s1}.{weight,bias}",
    "sam_mask_decoder.{output_hypernetworks_mlps.0,output_hypernetworks_mlps.1,output_hypernetworks_mlps.2"
    ",output_hypernetworks_mlps.3,iou_prediction_head,pred_obj_score_head}.layers.{0-2}.{weight,bias}",
)
VIDEO_PATTERNS = (
    "{maskmem_tpos_enc,no_mem_pos_enc,no_obj_ptr}",
    "mask_downsample.{weight,bias}",
    "memory_attention.layers.{0-3}.{self_attn,cross_attn_image}.{q_proj,k_proj,v_proj,out_proj}.{weight,bias}",
    "memory_attention.layers.{0-3}.{linear1,linear2,norm1,norm2,norm3}.{weight,bias}",
    "memory_attention.norm.{weight,bias}",
    "memory_encoder.mask_downsampler.encoder.{0,1,3,4,6,7,9,10,12}.{weight,bias}",
    "memory_encoder.{pix_feat_proj,out_proj}.{weight,bias}",
    "memory_encoder.fuser.layers.{0,1}.g_weight",
    "memory_encoder.fuser.layers.{0,1}.{dwconv,norm,pwconv1,pwconv2}.{weight,bias}",
    "obj_ptr_proj.layers.{0-2}.{weight,bias}",
)
# InternViT-300M: 24 layers; the 6B model has no attn.qkv.bias, and attn.{q_norm,k_norm}.weight besides.
VISION_PATTERNS = (
    "embeddings.{class_embedding,position_embedding,patch_embedding.weight,patch_embedding.bias}",
    "encoder.layers.{0-23}.{attn.qkv,attn.proj,mlp.fc1,mlp.fc2,norm1,norm2}.{weight,bias}",
    "encoder.layers.{0-23}.{ls1,ls2,attn.q_norm.weight,attn.k_norm.weight}",
)


def expand(patterns: tuple[str, ...], prefix: str = SAM2) -> list[str]:
    """All names that the patterns stand for, the prefix before each."""
    names = []
    for pattern in patterns:
        parts = re.split(r"\{(.*?)\}", pattern)  # every second part is a choice
        choices = [[part] if index % 2 == 0 else _choices(part) for index, part in enumerate(parts)]
        names += [prefix + "".join(parts) for parts in itertools.product(*choices)]
    return names


def _choices(text: str) -> list[str]:
    if bounds := re.fullmatch(r"(\d+)-(\d+)", text):
        return [str(number) for number in range(int(bounds[1]), int(bounds[2]) + 1)]
    return text.split(",")
