"""The InternVL family: InternViT, pixel shuffle, projector, a causal language model, and what all families share.

Shapes: B samples, T image tiles, N tokens or patches per tile, E width of the vision encoder, M vision tokens,
L tokens, C language model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import InternVLVisionModel
from transformers.models.auto import AutoModelForCausalLM

from sft.model.sa2va import Prompt, Sa2VA, VisionFeatures, VisionInput


@dataclass(frozen=True)
class Sa2VASettings:
    """What the published config.json says beyond the configurations of the three parts."""

    downsample_ratio: float = 0.5
    ps_version: str = "v2"
    select_layer: int = -1


class Sa2VAInternVL(Sa2VA):
    """See the module's docstring."""

    decoder_path = "language_model.model"
    head_path = "language_model.lm_head"
    vision_paths = ("vision_model", "mlp1")

    def __init__(self, vision_config, language_config, sam2_config, settings: Sa2VASettings, image_token_id: int):
        """Builds the parts with untrained weights.

        Args:
            vision_config: transformers' InternVLVisionConfig.
            language_config: transformers' Qwen2Config, Qwen3Config or LlamaConfig.
            sam2_config: transformers' Sam2Config.
            settings: pixel shuffle and layer choice of the published config.json.
            image_token_id: id of `<IMG_CONTEXT>`, the place holder of one vision token.
        """
        super().__init__()
        self.settings = settings
        self.image_token_id = image_token_id
        language_width = language_config.hidden_size
        shuffled_width = vision_config.hidden_size * int(1 / settings.downsample_ratio) ** 2
        self.vision_model = InternVLVisionModel(vision_config)
        if vision_config.use_qk_norm:  # transformers leaves their epsilon at 1e-6; InternViT has one for all norms
            for layer in self.vision_model.encoder.layer:
                for norm in (layer.attention.q_norm, layer.attention.k_norm):
                    norm.variance_epsilon = vision_config.layer_norm_eps
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(shuffled_width),
            nn.Linear(shuffled_width, language_width),
            nn.GELU(),
            nn.Linear(language_width, language_width),
        )
        self.language_model = AutoModelForCausalLM.from_config(language_config)
        self._build_mask_part(language_width, sam2_config)

    def vision_features_of(self, images: Sequence[VisionInput]) -> list[VisionFeatures]:
        """The vision encoder on the tiles of all images at once."""
        tokens_TNC = self.vision_tokens(torch.cat([image.pixels for image in images]))
        parts = tokens_TNC.split([len(image.pixels) for image in images])
        return [VisionFeatures(part_TNC.flatten(0, 1)) for part_TNC in parts]

    def vision_tokens(self, tiles_T3HW: Tensor) -> Tensor:
        """Image tiles -> vision tokens in the language model's space, (T, tokens per tile, C)."""
        if self.settings.select_layer == -1:
            states = self.vision_model(pixel_values=tiles_T3HW).last_hidden_state
        else:
            outputs = self.vision_model(pixel_values=tiles_T3HW, output_hidden_states=True)
            states = outputs.hidden_states[self.settings.select_layer]
        patches = states[:, 1:]  # without the class token
        return self.mlp1(_pixel_shuffle(patches, self.settings.downsample_ratio, self.settings.ps_version))

    @torch.no_grad()
    def generate(self, question: Prompt, vision: VisionFeatures, stop_token_ids: list[int], max_tokens: int) -> Tensor:
        """Greedy decoding after B questions of equal length; returns the new token ids, (B, up to max_tokens)."""
        embeddings_BLC = self.input_embeddings(question.input_ids_BL, vision)
        return self.language_model.generate(
            inputs_embeds=embeddings_BLC,
            attention_mask=torch.ones_like(question.input_ids_BL),
            do_sample=False,
            use_cache=True,  # many published configurations say false, which computes the whole prompt for each token
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=max_tokens,
            eos_token_id=stop_token_ids,
            pad_token_id=stop_token_ids[-1],  # rows that have ended are filled with it: not with [SEG]
        )


def _pixel_shuffle(patches_TNE: Tensor, ratio: float, version: str) -> Tensor:
    """Trades side for depth as InternVL does: (T, N, E) on a square grid -> (T, N * ratio^2, E / ratio^2)."""
    tiles, count, width = patches_TNE.shape
    side = int(count**0.5)
    small, wide = int(side * ratio), int(width / ratio)
    grid = patches_TNE.reshape(tiles, side, small, wide).permute(0, 2, 1, 3)
    grid = grid.reshape(tiles, small, small, int(wide / ratio))
    if version == "v2":  # v1 left the grid transposed
        grid = grid.permute(0, 2, 1, 3)
    return grid.reshape(tiles, small * small, -1)
