"""Sa2VA, native: vision tokens -> language model -> [SEG] state -> SAM2 mask decoder -> mask logits.

Takes tensors of a `Preprocess`, gives logits on the mask decoder's grid; `upsample` brings them to a mask's size.
Here stands what all families share; `sa2va_internvl` and `sa2va_qwen` add a vision encoder and a language model.
Attribute names are the published ones, so an adapter trained here fits the original model. It does not know files,
tokenizers, losses or LoRA.

Shapes: B samples, M vision tokens over the whole batch, L tokens of the longest prompt, C language model width,
K deepstack levels, D SAM2 width (256 in the published models), P prompts per image, h x w the mask decoder's grid
(256 x 256).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Sam2Model

from sft.model import hiera
from sft.model.decoder import Decoder

Layout = tuple[int, int, int]
"""Vision tokens of one image: tiles (1 in the Qwen families), rows and columns; their product is the token count."""


@dataclass(frozen=True)
class VisionInput:
    """One image as its vision encoder wants it."""

    pixels: Tensor  # InternVL: tiles (T, 3, H, W); Qwen: patches (N, 3 * frames * patch^2); fp32 from a Preprocess
    layout: Layout  # of the vision tokens that come of it

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "VisionInput":
        """The same on a device."""
        return replace(self, pixels=self.pixels.to(device, dtype))


@dataclass(frozen=True)
class VisionFeatures:
    """What the vision encoder gives of one image, or of the images of a batch one after another."""

    tokens_MC: Tensor
    deepstack_KMC: Tensor | None = None  # Qwen3-VL: added to the vision tokens' states after the first K layers

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "VisionFeatures":
        """The same on a device."""
        return VisionFeatures(*(part if part is None else part.to(device, non_blocking=non_blocking) for part in self))

    @staticmethod
    def join(images: Sequence["VisionFeatures"]) -> "VisionFeatures":
        """Images one after another, in the order of the samples."""
        if len(images) == 1:
            return images[0]
        deepstack = [image.deepstack_KMC for image in images]
        return VisionFeatures(
            torch.cat([image.tokens_MC for image in images]),
            None if deepstack[0] is None else torch.cat(deepstack, dim=1),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self if part is not None)

    def __iter__(self):
        return iter((self.tokens_MC, self.deepstack_KMC))


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
    position_ids_3BL: Tensor | None = None  # Qwen: time, row and column of each token; else positions count up
    labelled_N: Tensor | None = None  # where the labels stand, row * L + position: to look for them waits for a GPU

    def to(self, device: torch.device | str) -> "Prompt":
        """The same on a device; on a GPU without waiting for what it still has to do."""
        parts = tuple(getattr(self, field.name) for field in fields(self))
        if torch.device(device).type == "cuda":
            parts = tuple(part if part is None or part.is_cuda else part.pin_memory() for part in parts)
        return Prompt(*(None if part is None else part.to(device, non_blocking=True) for part in parts))

    @staticmethod
    def join(prompts: Sequence["Prompt"]) -> "Prompt":
        """The rows of prompts of one length one after another, without labels."""
        positions = [prompt.position_ids_3BL for prompt in prompts]
        return Prompt(
            torch.cat([prompt.input_ids_BL for prompt in prompts]),
            torch.cat([prompt.seg_position_B for prompt in prompts]),
            position_ids_3BL=None if positions[0] is None else torch.cat(positions, dim=1),
        )

    def first(self, length: int) -> "Prompt":
        """The first tokens of every row, for instance the question without its answer."""
        positions = None if self.position_ids_3BL is None else self.position_ids_3BL[:, :, :length]
        labels = None if self.labels_BL is None else self.labels_BL[:, :length]
        return Prompt(self.input_ids_BL[:, :length], self.seg_position_B, labels, positions)


@dataclass(frozen=True)
class TextStates:
    """Last states of the language model, (B, L, C), or (B, R, C) where only R positions are read."""

    normed_BLC: Tensor  # after the final norm: what the language model head reads
    seg_BLC: Tensor  # what `text_hidden_fcs` reads at [SEG]: the same, but in Qwen3-VL before the final norm


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
    """The part that all families share: [SEG] state to mask.

    A family's class builds the rest, has `vision_features_of` and `generate`, and tells by three paths where the rest
    stands.
    """

    decoder_path: str
    """The text decoder: it has `config`, `embed_tokens` and `layers`."""
    head_path: str
    """The language model head."""
    vision_paths: tuple[str, ...]
    """The modules that make vision tokens."""
    image_token_id: int
    """The place holder of one vision token."""
    seg_before_norm: bool = False
    """Whether `text_hidden_fcs` reads the state before the final norm."""
    deepstack_levels: int = 0
    """Vision features beside the vision tokens: Qwen3-VL's."""

    def _build_mask_part(self, language_width: int, sam2_config) -> None:
        self.grounding_encoder = nn.Module()
        self.grounding_encoder.sam2_model = Sam2Model(sam2_config)
        hiera.lighten(self.sam2.vision_encoder)
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

    @property
    def decoder(self) -> nn.Module:
        """The text decoder; `config` tells num_hidden_layers, hidden_size and intermediate_size."""
        return self.get_submodule(self.decoder_path)

    @functools.cached_property
    def layers(self) -> Decoder:
        """Runs the text decoder's layers; says how many are recomputed, compiled, graphed."""
        return Decoder(self.decoder)

    @property
    def head(self) -> nn.Module:
        """The language model head."""
        return self.get_submodule(self.head_path)

    @property
    def tied_head(self) -> str | None:
        """Name of the head's weight where it is the token embeddings themselves, which files then leave out."""
        return f"{self.head_path}.weight" if self.decoder.config.tie_word_embeddings else None

    def tie_head(self) -> None:
        """Makes the head's weight the token embeddings, where the configuration ties them."""
        if self.tied_head:
            self.head.weight = self.decoder.embed_tokens.weight

    def vision_features(self, image: VisionInput) -> VisionFeatures:
        """The vision encoder on one image."""
        return self.vision_features_of([image])[0]

    def vision_features_of(self, images: Sequence[VisionInput]) -> list[VisionFeatures]:
        """The vision encoder on several images at once."""
        raise NotImplementedError

    def hidden_states(self, prompt: Prompt, vision: VisionFeatures, read_BR: Tensor | None = None) -> TextStates:
        """The language model's last states, at the R positions that are read or at all; no head is run."""
        image_BL = None if vision.deepstack_KMC is None else prompt.input_ids_BL == self.image_token_id
        embeddings_BLC = self.input_embeddings(prompt.input_ids_BL, vision)
        before = self.layers(embeddings_BLC, read_BR, prompt.position_ids_3BL, image_BL, vision.deepstack_KMC)
        normed = self.decoder.norm(before)
        return TextStates(normed, before if self.seg_before_norm else normed)

    def generate(self, question: Prompt, vision: VisionFeatures, stop_token_ids: list[int], max_tokens: int) -> Tensor:
        """Greedy decoding after B questions of equal length; returns the new token ids, (B, up to max_tokens)."""
        raise NotImplementedError

    def forward(self, prompt: Prompt, vision: VisionFeatures, sam2: Sam2Features | Tensor) -> Output:
        """Masks for B samples from the features of their images and their teacher-forced prompts.

        Args:
            prompt: token ids with one [SEG] each.
            vision: the batch's vision tokens, images in the order of the samples.
            sam2: SAM2's features, one row per sample; or, where its encoder trains, its input images (B, 3, H, W).
        """
        sam2_features = self.sam2_features(sam2) if isinstance(sam2, Tensor) else sam2
        if prompt.labels_BL is None:
            states = self.hidden_states(prompt, vision, prompt.seg_position_B[:, None])
            seg_state_BC = states.seg_BLC[:, 0]
        else:
            states = self.hidden_states(prompt, vision)
            rows_B = torch.arange(len(states.seg_BLC), device=states.seg_BLC.device)
            seg_state_BC = states.seg_BLC[rows_B, prompt.seg_position_B]
        masks = self.decode_masks(self.text_hidden_fcs(seg_state_BC)[:, None], sam2_features)
        text_loss = None if prompt.labels_BL is None else self.text_loss(states.normed_BLC, prompt)
        return Output(masks, seg_state_BC, text_loss)

    def sam2_features(self, images_B3HW: Tensor, *, project: bool = True) -> Sam2Features:
        """SAM2's image encoder; `project` applies conv_s0 and conv_s1, which belong to the mask decoder."""
        level0, level1, embedding = self.sam2.vision_encoder(images_B3HW).fpn_hidden_states
        embedding = embedding + self.sam2.no_memory_embedding.view(1, -1, 1, 1)
        features = Sam2Features(level0, level1, embedding, projected=False)
        return self._project(features) if project else features

    def input_embeddings(self, input_ids_BL: Tensor, vision: VisionFeatures) -> Tensor:
        """Token embeddings with the vision tokens written over the image place holders."""
        embeddings_BLC = self.decoder.embed_tokens(input_ids_BL)
        places_BL1 = (input_ids_BL == self.image_token_id)[..., None]
        return embeddings_BLC.masked_scatter(places_BL1, vision.tokens_MC.to(embeddings_BLC.dtype))

    def text_loss(self, hidden_BLC: Tensor, prompt: Prompt) -> Tensor:
        """Mean cross entropy in fp32 over the labelled positions; the head runs on those alone."""
        labels, labelled_N = prompt.labels_BL.flatten(), prompt.labelled_N
        if labelled_N is None:
            labelled_N = (labels != -100).nonzero()[:, 0]
        logits = self.head(hidden_BLC.flatten(0, 1).index_select(0, labelled_N)).float()
        return functional.cross_entropy(logits, labels.index_select(0, labelled_N))

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
