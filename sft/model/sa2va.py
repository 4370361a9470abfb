"""Sa2VA, native: vision tokens -> language model -> [SEG] state -> SAM2 mask decoder -> mask logits.

Takes tensors that `preprocess` made, gives logits on the mask decoder's grid; `upsample` brings them to a mask's size.
Attribute names are the published ones, so an adapter trained here fits the original model. It does not know files,
tokenizers, losses or LoRA.

Shapes: B samples, T image tiles over the whole batch, L tokens of the longest prompt, C language model width,
D SAM2 width (256 in the published models), P prompts per image, h x w the mask decoder's grid (256 x 256).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import InternVLVisionModel, Sam2Model
from transformers.models.auto import AutoModelForCausalLM


@dataclass(frozen=True)
class Sa2VASettings:
    """What the published config.json says beyond the configurations of the three parts."""

    downsample_ratio: float = 0.5
    ps_version: str = "v2"
    select_layer: int = -1


@dataclass(frozen=True)
class Sam2Features:
    """Outputs of SAM2's image encoder for B images, as the mask decoder wants them.

    `projected` tells whether the mask decoder's own conv_s0 and conv_s1 have been applied to the two finer maps.
    """

    level0_BCHW: Tensor  # (B, D/8, 4h', 4w') when projected, else (B, D, 4h', 4w'); h' is the embedding's side
    level1_BCHW: Tensor  # (B, D/4, 2h', 2w') when projected, else (B, D, 2h', 2w')
    embedding_BDHW: Tensor  # (B, D, h', w'), "no memory" embedding added
    projected: bool


@dataclass(frozen=True)
class Prompt:
    """Teacher-forced token sequences, right-padded; causal attention makes a padding mask unnecessary."""

    input_ids_BL: Tensor  # int64
    seg_position_B: Tensor  # index of the [SEG] token in its row
    labels_BL: Tensor | None = None  # the token to predict *at* each position, -100 where none counts


@dataclass(frozen=True)
class Masks:
    """What the mask decoder says about B samples."""

    logits_Bhw: Tensor  # of the mask with the highest predicted IoU
    candidate_logits_BKhw: Tensor  # all K = 3
    predicted_iou_BK: Tensor


@dataclass(frozen=True)
class Output:
    """One forward pass."""

    masks: Masks
    seg_state_BC: Tensor
    text_loss: Tensor | None  # mean cross entropy over the labelled positions


class Sa2VA(nn.Module):
    """InternVL family: InternViT, pixel shuffle, projector, a causal language model, SAM2."""

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
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(shuffled_width),
            nn.Linear(shuffled_width, language_width),
            nn.GELU(),
            nn.Linear(language_width, language_width),
        )
        self.language_model = AutoModelForCausalLM.from_config(language_config)
        self.grounding_encoder = nn.Module()
        self.grounding_encoder.sam2_model = Sam2Model(sam2_config)
        self.text_hidden_fcs = nn.Sequential(
            nn.Linear(language_width, language_width),
            nn.ReLU(inplace=True),
            nn.Linear(language_width, sam2_config.mask_decoder_config.hidden_size),
            nn.Dropout(0.0),
        )

    @property
    def sam2(self) -> Sam2Model:
        """The SAM2 part under its published path `grounding_encoder.sam2_model`."""
        return self.grounding_encoder.sam2_model

    def forward(self, prompt: Prompt, vision_tokens_TNC: Tensor, sam2: Sam2Features | Tensor) -> Output:
        """Masks for B samples from the features of their images and their teacher-forced prompts.

        Args:
            prompt: token ids with one [SEG] each.
            vision_tokens_TNC: the batch's vision tokens, tiles in the order of the samples.
            sam2: SAM2's features, one row per sample; or, where its encoder trains, its input images (B, 3, H, W).
        """
        sam2_features = self.sam2_features(sam2) if isinstance(sam2, Tensor) else sam2
        hidden_BLC = self.hidden_states(prompt.input_ids_BL, vision_tokens_TNC)
        rows_B = torch.arange(len(hidden_BLC), device=hidden_BLC.device)
        seg_state_BC = hidden_BLC[rows_B, prompt.seg_position_B]
        masks = self.decode_masks(self.text_hidden_fcs(seg_state_BC)[:, None], sam2_features)
        text_loss = None if prompt.labels_BL is None else self.text_loss(hidden_BLC, prompt.labels_BL)
        return Output(masks, seg_state_BC, text_loss)

    def vision_tokens(self, tiles_T3HW: Tensor) -> Tensor:
        """Image tiles -> vision tokens in the language model's space, (T, tokens per tile, C)."""
        if self.settings.select_layer == -1:
            states = self.vision_model(pixel_values=tiles_T3HW).last_hidden_state
        else:
            outputs = self.vision_model(pixel_values=tiles_T3HW, output_hidden_states=True)
            states = outputs.hidden_states[self.settings.select_layer]
        patches = states[:, 1:]  # without the class token
        return self.mlp1(_pixel_shuffle(patches, self.settings.downsample_ratio, self.settings.ps_version))

    def sam2_features(self, images_B3HW: Tensor, *, project: bool = True) -> Sam2Features:
        """SAM2's image encoder; `project` applies conv_s0 and conv_s1, which belong to the mask decoder."""
        level0, level1, embedding = self.sam2.vision_encoder(images_B3HW).fpn_hidden_states
        embedding = embedding + self.sam2.no_memory_embedding.view(1, -1, 1, 1)
        features = Sam2Features(level0, level1, embedding, projected=False)
        return self._project(features) if project else features

    def hidden_states(self, input_ids_BL: Tensor, vision_tokens_TNC: Tensor) -> Tensor:
        """Final (normed) hidden states of the language model, (B, L, C); no language model head is run."""
        embeddings_BLC = self.input_embeddings(input_ids_BL, vision_tokens_TNC)
        return self.language_model.model(inputs_embeds=embeddings_BLC, use_cache=False).last_hidden_state

    def input_embeddings(self, input_ids_BL: Tensor, vision_tokens_TNC: Tensor) -> Tensor:
        """Token embeddings with the vision tokens written over the image place holders."""
        embeddings_BLC = self.language_model.get_input_embeddings()(input_ids_BL)
        vision_MC = vision_tokens_TNC.reshape(-1, embeddings_BLC.shape[-1]).to(embeddings_BLC.dtype)
        places_BL1 = (input_ids_BL == self.image_token_id)[..., None]
        return embeddings_BLC.masked_scatter(places_BL1, vision_MC)

    def text_loss(self, hidden_BLC: Tensor, labels_BL: Tensor) -> Tensor:
        """Mean cross entropy in fp32 over the labelled positions; the head runs on those alone."""
        labelled_BL = labels_BL != -100
        logits = self.language_model.get_output_embeddings()(hidden_BLC[labelled_BL]).float()
        return functional.cross_entropy(logits, labels_BL[labelled_BL])

    def decode_masks(self, seg_embedding_BPD: Tensor, features: Sam2Features) -> Masks:
        """[SEG] embeddings -> masks; with P > 1 prompts per image the rows come out image by image, (B*P, ...)."""
        batch, prompts, width = seg_embedding_BPD.shape
        if not features.projected:
            features = self._project(features)
        sparse_BPND, dense_BDHW = self._prompt_embeddings(seg_embedding_BPD)
        positions = self.sam2.get_image_wide_positional_embeddings().to(features.embedding_BDHW.dtype)
        candidates, predicted_iou, _, _ = self.sam2.mask_decoder(
            image_embeddings=features.embedding_BDHW,
            image_positional_embeddings=positions.expand(batch, -1, -1, -1),
            sparse_prompt_embeddings=sparse_BPND,
            dense_prompt_embeddings=dense_BDHW,
            multimask_output=True,
            high_resolution_features=[features.level0_BCHW, features.level1_BCHW],
        )
        candidates, predicted_iou = candidates.flatten(0, 1), predicted_iou.flatten(0, 1)
        rows = torch.arange(batch * prompts, device=candidates.device)
        return Masks(candidates[rows, predicted_iou.argmax(-1)], candidates, predicted_iou)

    @torch.no_grad()
    def generate(
        self, input_ids_BL: Tensor, vision_tokens_TNC: Tensor, stop_token_ids: list[int], max_tokens: int
    ) -> Tensor:
        """Greedy decoding after B questions of equal length; returns the new token ids, (B, up to max_tokens)."""
        embeddings_BLC = self.input_embeddings(input_ids_BL, vision_tokens_TNC)
        return self.language_model.generate(
            inputs_embeds=embeddings_BLC,
            attention_mask=torch.ones_like(input_ids_BL),
            do_sample=False,
            use_cache=True,  # many published configurations say false, which computes the whole prompt for each token
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=max_tokens,
            eos_token_id=stop_token_ids,
            pad_token_id=stop_token_ids[0],
        )

    def enable_activation_checkpointing(self) -> None:
        """Recomputes each decoder layer in the backward pass; non-reentrant, so frozen inputs do not cut gradients."""
        model = self.language_model
        enable = getattr(model, "activation_checkpointing_enable", None)
        if enable is not None:
            enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:  # transformers before 5.20 knows only the older name
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def _project(self, features: Sam2Features) -> Sam2Features:
        decoder = self.sam2.mask_decoder
        return Sam2Features(
            decoder.conv_s0(features.level0_BCHW),
            decoder.conv_s1(features.level1_BCHW),
            features.embedding_BDHW,
            projected=True,
        )

    def _prompt_embeddings(self, seg_embedding_BPD: Tensor) -> tuple[Tensor, Tensor]:
        """Two "not a point" tokens, as SAM2 gives for an absent point, then the [SEG] embedding; no mask prompt."""
        batch, prompts, width = seg_embedding_BPD.shape
        encoder = self.sam2.prompt_encoder
        dtype = seg_embedding_BPD.dtype
        absent = encoder.not_a_point_embed.weight.to(dtype).expand(batch, prompts, 2, width)
        sparse_BPND = torch.cat([absent, seg_embedding_BPD[:, :, None]], dim=2)
        dense_BDHW = encoder.no_mask_embed.weight.to(dtype).view(1, -1, 1, 1)
        return sparse_BPND, dense_BDHW.expand(batch, -1, *encoder.image_embedding_size)


def upsample(logits_BHW: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Bilinear to the mask's own size, in fp32 and one step.

    The published predict_forward goes through SAM2's 1024 x 1024 on the way; at 512 and 1024 px that is the same to
    the last digit, elsewhere a few pixels on an outline differ.
    """
    return functional.interpolate(logits_BHW[:, None].float(), size=size_hw, mode="bilinear", align_corners=False)[:, 0]


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
