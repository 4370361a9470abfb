"""The Qwen-VL families: transformers' own Qwen2.5-VL or Qwen3-VL under `model`, and what all families share.

Module paths are those of the published model as transformers 4.57 and later run it; its own decoder layers stand under
`model.model.language_model.layers`. In transformers 4.49 the same layers stood under `model.model.layers`: who puts an
adapter on the published model there has to drop `language_model.` from its keys and its target pattern.

Shapes: B samples, N patches of one image, M vision tokens, L tokens, C language model width, K deepstack levels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLConfig
from transformers import Qwen3VLForConditionalGeneration as Qwen3VL

from sft.model.sa2va import Prompt, Sa2VA, VisionFeatures, VisionInput


class Sa2VAQwen(Sa2VA):
    """See the module's docstring."""

    decoder_path = "model.model.language_model"
    head_path = "model.lm_head"
    vision_paths = ("model.model.visual",)

    def __init__(self, config: Qwen2_5_VLConfig | Qwen3VLConfig, sam2_config):
        """Builds the parts with untrained weights.

        Args:
            config: of the whole vision and language model.
            sam2_config: transformers' Sam2Config.
        """
        super().__init__()
        self.image_token_id = config.image_token_id
        match config.model_type:
            case "qwen2_5_vl":
                self.model = Qwen2_5_VLForConditionalGeneration(config)
            case "qwen3_vl":
                self.model = Qwen3VL(config)
                self.deepstack_levels = len(config.vision_config.deepstack_visual_indexes)
            case _:
                raise ValueError(f"model type {config.model_type!r}: choose qwen2_5_vl or qwen3_vl")
        # The published Qwen3-VL models were trained where transformers' last hidden state was the one before the norm.
        self.seg_before_norm = config.model_type == "qwen3_vl"
        self._build_mask_part(config.text_config.hidden_size, sam2_config)

    def vision_features_of(self, images: Sequence[VisionInput]) -> list[VisionFeatures]:
        """The vision encoder on the patches of all images at once; Qwen3-VL gives deepstack features as well."""
        visual = self.model.model.visual
        merge = visual.spatial_merge_size
        grids = [(frames, rows * merge, columns * merge) for frames, rows, columns in (one.layout for one in images)]
        pixels = torch.cat([image.pixels for image in images])
        outputs = visual(pixels, grid_thw=torch.tensor(grids, device=pixels.device), return_dict=True)
        counts = [math.prod(image.layout) for image in images]
        tokens, deepstack = outputs.pooler_output.split(counts), getattr(outputs, "deepstack_features", None)
        levels = torch.stack(deepstack).split(counts, dim=1) if deepstack else [None] * len(images)
        return [VisionFeatures(*parts) for parts in zip(tokens, levels, strict=True)]

    @torch.no_grad()
    def generate(self, question: Prompt, vision: VisionFeatures, stop_token_ids: list[int], max_tokens: int) -> Tensor:
        """Greedy decoding after B questions of equal length; returns the new token ids, (B, up to max_tokens).

        A row that has ended goes on with the last of the stop tokens. transformers' own `generate` cannot take vision
        features that are computed already.
        """
        outputs = self._decode(question, vision, use_cache=True)
        positions_4B1 = _with_text_positions(question)[:, :, -1:]
        positions_4B1[1:] = question.position_ids_3BL.amax((0, 2)).view(1, -1, 1)
        stops = torch.tensor(stop_token_ids, device=positions_4B1.device)
        ended_B = torch.zeros(positions_4B1.shape[1], dtype=torch.bool, device=positions_4B1.device)
        tokens: list[Tensor] = []
        while True:
            token_B = self.head(outputs.last_hidden_state[:, -1]).argmax(-1)
            tokens.append(torch.where(ended_B, stops[-1], token_B))
            ended_B |= torch.isin(token_B, stops)
            if bool(ended_B.all()) or len(tokens) == max_tokens:
                return torch.stack(tokens, dim=1)
            positions_4B1 = positions_4B1 + 1
            outputs = self.decoder(
                inputs_embeds=self.decoder.embed_tokens(tokens[-1][:, None]),
                position_ids=positions_4B1,
                past_key_values=outputs.past_key_values,
                use_cache=True,
            )

    def _decode(self, prompt: Prompt, vision: VisionFeatures, *, use_cache: bool):
        """The text decoder over a prompt, with the vision tokens in their places."""
        deepstack = {}
        if vision.deepstack_KMC is not None:
            deepstack["visual_pos_masks"] = prompt.input_ids_BL == self.image_token_id
            deepstack["deepstack_visual_embeds"] = list(vision.deepstack_KMC)
        return self.decoder(
            inputs_embeds=self.input_embeddings(prompt.input_ids_BL, vision),
            position_ids=_with_text_positions(prompt),
            use_cache=use_cache,
            **deepstack,
        )


def _with_text_positions(prompt: Prompt) -> Tensor:
    """Positions (4, B, L): the plain count comes first.

    Given three rows alone, some versions of transformers take the equal times of vision tokens for the seams between
    packed sequences and mask attention there.
    """
    assert prompt.position_ids_3BL is not None, "a prompt for Qwen-VL carries three-dimensional positions"
    positions_3BL = prompt.position_ids_3BL
    plain_1BL = torch.arange(positions_3BL.shape[2], device=positions_3BL.device).expand_as(positions_3BL[:1])
    return torch.cat([plain_1BL, positions_3BL])
