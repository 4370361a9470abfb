"""Image and question -> the tensors a model expects, as in the published pipeline: what families share, and InternVL.

Takes RGB uint8 arrays and text, gives float tensors and token ids. It does not know masks or files; the Qwen families
stand in preprocess_qwen.

Source of the constants: InternVL2.5's and Sa2VA's preprocessing (ImageNet statistics, bicubic, 1-12 tiles and a
thumbnail).
"""

import functools
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sft.config import UserError
from sft.model.sa2va import Layout, Prompt, VisionInput

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ANSWER = "Sure, [SEG]."
SEG_TOKEN = "[SEG]"
IMAGE_START, IMAGE_TOKEN, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
IGNORED = -100


@dataclass(frozen=True)
class Template:
    """The words around a question: chat templates of the published models."""

    question: str  # {} is the image tokens and the question
    end: str  # the token that ends an answer


TEMPLATES = {
    "qwen_chat": Template("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "internlm2_chat": Template("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "phi3_chat": Template("<|user|>\n{}<|end|>\n<|assistant|>\n", "<|end|>"),
    "llama3_chat": Template(
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
}


@dataclass(frozen=True)
class Preprocess:
    """Sizes and words of one checkpoint, made by `published.load`: what all families share.

    A family's class adds `vision_input`, `question_ids` and two words of its own. `sam2_px` side of SAM2's input.
    """

    tokenizer: PreTrainedTokenizerBase
    sam2_px: int = field(kw_only=True)
    # Tokenizing takes 1 ms a question, as much as the rest of a sample; a run asks the same few over and over.
    _asked: dict[tuple[str, Layout], list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def end_token(self) -> str:
        """The token that ends an answer."""
        raise NotImplementedError

    @property
    def image_token(self) -> str:
        """The place holder of one vision token."""
        raise NotImplementedError

    def image_layout(self, height: int, width: int) -> Layout:
        """The layout of the vision tokens of an image of that size (pixels)."""
        raise NotImplementedError

    def vision_pixels(self, image_HW3: np.ndarray) -> VisionInput:
        """RGB uint8 image -> what the vision encoder takes as uint8, before `normalise_vision`."""
        raise NotImplementedError

    def normalise_vision(self, pixels: VisionInput, dtype: torch.dtype = torch.float32) -> VisionInput:
        """`vision_pixels` of one image -> what the vision encoder takes, on the same device."""
        raise NotImplementedError

    def vision_input(self, image_HW3: np.ndarray) -> VisionInput:
        """RGB uint8 image -> what the vision encoder takes, and the layout of its tokens, for `prompt`."""
        return self.normalise_vision(self.vision_pixels(image_HW3))

    def question_ids(self, question: str, layout: Layout) -> list[int]:
        """Token ids up to and with the assistant's turn, for free generation.

        Raises:
            UserError: the question holds the word that stands for a piece of the image.
        """
        raise NotImplementedError

    def sam2_image(self, image_HW3: np.ndarray) -> Tensor:
        """RGB uint8 image -> (3, sam2_px, sam2_px) fp32; the aspect ratio is not kept, as in the published model."""
        return self.normalise_sam2(self.sam2_pixels(image_HW3)[None])[0]

    def sam2_pixels(self, image_HW3: np.ndarray) -> Tensor:
        """RGB uint8 image -> (3, sam2_px, sam2_px) uint8, before `normalise_sam2`."""
        return _pixels(Image.fromarray(image_HW3).resize((self.sam2_px, self.sam2_px)))

    def normalise_sam2(self, pixels_B3HW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 images of SAM2's size -> what its encoder takes, on the same device."""
        return look_up(pixels_B3HW, _IMAGENET, dtype)

    def answer_ids(self) -> list[int]:
        """Token ids of "Sure, [SEG]." and the end of the turn."""
        return list(self._answer)

    @property
    def forced_ids(self) -> list[int]:
        """Token ids of the answer up to and with [SEG]: nothing behind it reaches the mask."""
        return self._answer[: self._answer.index(self.seg_token_id) + 1]

    @functools.cached_property
    def _answer(self) -> list[int]:
        return self.tokenizer.encode(ANSWER + self.end_token, add_special_tokens=False)

    @functools.cached_property
    def seg_token_id(self) -> int:
        """Id of [SEG]."""
        return self.tokenizer.convert_tokens_to_ids(SEG_TOKEN)

    @property
    def image_token_id(self) -> int:
        """Id of the place holder of one vision token."""
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def stop_token_ids(self) -> list[int]:
        """Ends of a greedy answer: the end of the turn, and [SEG] itself, after which nothing matters for a mask."""
        return [self.seg_token_id, self.tokenizer.convert_tokens_to_ids(self.end_token)]

    def prompt(
        self, questions: list[str], layouts: list[Layout], *, with_labels: bool = False, multiple_of: int = 1
    ) -> Prompt:
        """Teacher-forced prompts of B samples, right-padded.

        Without labels a row ends at [SEG], since nothing after it reaches the mask; with labels the whole answer
        is there and its tokens are the labels.

        Args:
            questions: one per sample.
            layouts: of the samples' images.
            with_labels: whether the text is trained.
            multiple_of: rows are padded to a multiple of so many tokens, so that fewer lengths are compiled.
        """
        answer = self._answer if with_labels else self.forced_ids
        rows, labels, seg_positions = [], [], []
        for question, layout in zip(questions, layouts, strict=True):
            if (question, layout) not in self._asked:
                self._asked[question, layout] = self.question_ids(question, layout)
            question_ids = self._asked[question, layout]
            rows.append(question_ids + answer)
            labels.append([IGNORED] * (len(question_ids) - 1) + answer + [IGNORED])
            seg_positions.append(len(question_ids) + answer.index(self.seg_token_id))
        longest = -(-max(map(len, rows)) // multiple_of) * multiple_of
        input_ids_BL = _pad(rows, longest, self.stop_token_ids[-1])
        labels_BL = _pad(labels, longest, IGNORED) if with_labels else None
        return Prompt(
            input_ids_BL,
            torch.tensor(seg_positions),
            labels_BL,
            self.position_ids(input_ids_BL, layouts),
            (labels_BL != IGNORED).flatten().nonzero()[:, 0] if with_labels else None,
        )

    def position_ids(self, input_ids_BL: Tensor, layouts: list[Layout]) -> Tensor | None:
        """Positions (3, B, L) where they do not just count up; else None."""
        return None


@dataclass(frozen=True)
class PreprocessInternVL(Preprocess):
    """The InternVL family.

    `tile_px` side of a vision tile; `tokens_per_tile` after pixel shuffle; `max_tiles` 12 in the published models.
    """

    template: Template
    tile_px: int
    tokens_per_tile: int
    max_tiles: int
    use_thumbnail: bool

    @property
    def end_token(self) -> str:
        """The token that ends an answer."""
        return self.template.end

    @property
    def image_token(self) -> str:
        """The place holder of one vision token."""
        return IMAGE_TOKEN

    def vision_pixels(self, image_HW3: np.ndarray) -> VisionInput:
        """RGB uint8 image -> its tiles (T, 3, tile_px, tile_px) uint8 and the layout of their tokens."""
        image = Image.fromarray(image_HW3)
        columns, rows = _closest_grid(image.width, image.height, self.max_tiles, self.tile_px)
        side = self.tile_px
        resized = image.resize((columns * side, rows * side))  # PIL's default for RGB is bicubic
        boxes = [(x * side, y * side, (x + 1) * side, (y + 1) * side) for y in range(rows) for x in range(columns)]
        tiles = [resized.crop(box) for box in boxes]
        if self.use_thumbnail and len(tiles) > 1:
            tiles.append(image.resize((side, side)))
        return VisionInput(torch.stack([_pixels(tile) for tile in tiles]), self.layout(len(tiles)))

    def normalise_vision(self, pixels: VisionInput, dtype: torch.dtype = torch.float32) -> VisionInput:
        """uint8 tiles -> normalised tiles, on the same device."""
        return VisionInput(look_up(pixels.pixels, _IMAGENET, dtype), pixels.layout)

    def image_layout(self, height: int, width: int) -> Layout:
        """The layout of the vision tokens of an image of that size (pixels)."""
        columns, rows = _closest_grid(width, height, self.max_tiles, self.tile_px)
        return self.layout(columns * rows + (1 if self.use_thumbnail and columns * rows > 1 else 0))

    def layout(self, tile_count: int) -> Layout:
        """Vision tokens of an image of so many tiles."""
        side = math.isqrt(self.tokens_per_tile)
        return tile_count, side, self.tokens_per_tile // side

    def tiles(self, image_HW3: np.ndarray) -> Tensor:
        """RGB uint8 image -> normalised vision tiles, (T, 3, tile_px, tile_px) fp32, T from 1 to max_tiles + 1."""
        return self.vision_input(image_HW3).pixels

    def question_ids(self, question: str, layout: Layout) -> list[int]:
        """Token ids up to and with the assistant's turn, for free generation.

        Raises:
            UserError: the question holds the word that stands for a piece of the image.
        """
        if IMAGE_TOKEN in question:  # it would take another sample's vision token
            raise UserError(f"question {question!r}: {IMAGE_TOKEN} stands for a piece of the image; leave it out")
        image = IMAGE_START + IMAGE_TOKEN * math.prod(layout) + IMAGE_END
        return self.tokenizer.encode(self.template.question.format(f"{image}\n{question}"))


def _closest_grid(width: int, height: int, max_tiles: int, tile_px: int) -> tuple[int, int]:
    """Columns and rows of the nearest aspect ratio; on a tie the larger grid if the image fills half of it."""
    grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1) if c * r <= max_tiles]
    best, best_difference = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        larger_is_filled = width * height > 0.5 * tile_px * tile_px * columns * rows
        if difference < best_difference or (difference == best_difference and larger_is_filled):
            best, best_difference = (columns, rows), difference
    return best


class Table:
    """What the 256 levels of each channel become, (3, 256) fp32; a copy for each device that has asked."""

    def __init__(self, values_3V: Tensor):
        self._values_3V = values_3V
        self._there: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Channel after channel. Only the first copy waits for what a GPU has still to do."""
        if (device, dtype) not in self._there:
            self._there[device, dtype] = self._values_3V.to(device, dtype).flatten()
        return self._there[device, dtype]


def look_up(pixels_N3x: Tensor, table: Table, dtype: torch.dtype) -> Tensor:
    """uint8 pixels -> their values in a table; the same to the last bit on every device.

    Divisions are rounded in another way on a GPU, where torch multiplies by the reciprocal.

    Args:
        pixels_N3x: uint8, channels in the second dimension.
        table: of the values.
        dtype: of the result.
    """
    values = table.on(pixels_N3x.device, dtype)
    first_of_channel = 256 * torch.arange(3, dtype=torch.int32, device=pixels_N3x.device)
    return values[pixels_N3x.int() + first_of_channel.view(1, 3, *[1] * (pixels_N3x.ndim - 2))]


def _pixels(image: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _imagenet() -> Table:
    mean_31, std_31 = (torch.tensor(values)[:, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return Table((torch.arange(256).float() / 255.0 - mean_31) / std_31)


_IMAGENET = _imagenet()


def _pad(rows: list[list[int]], length: int, filler: int) -> Tensor:
    return torch.tensor([row + [filler] * (length - len(row)) for row in rows])
