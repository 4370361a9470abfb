"""Image and question -> the tensors the Qwen-VL families expect, equal to the published pipeline.

Takes RGB uint8 arrays and text, gives patches and token ids. It does not know masks or files.

Source: the published predict_forward. There an image is resized twice: qwen_vl_utils brings its sides to multiples of
28 with PIL (bicubic), then transformers' fast image processor brings it between 512 and 2,048 times 28 * 28 pixels, its
sides to multiples of patch times merge (28 in Qwen2.5-VL, 32 in Qwen3-VL), with torch's bicubic kernel on uint8. Both
kernels are called here as they are there, so that the pixels are the same to the last bit (seen with transformers
4.57.1 and qwen_vl_utils 0.0.14; transformers' slow image processor differs from both by two grey levels).
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from sft.config import UserError
from sft.model.preprocess import Preprocess, Table, look_up
from sft.model.sa2va import Layout, VisionInput

IMAGE_START, IMAGE_TOKEN, IMAGE_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
END_TOKEN = "<|im_end|>"
RESERVED = (IMAGE_START, IMAGE_TOKEN, IMAGE_END, "<|video_pad|>")
MIN_PIXELS, MAX_PIXELS = 512 * 28 * 28, 2048 * 28 * 28
MOST_ELONGATED = 200  # longer side to shorter: Qwen's own limit
_FIRST_FACTOR_PX = 28  # qwen_vl_utils knows no model: 28 also for Qwen3-VL
_FIRST_MIN_PIXELS, _FIRST_MAX_PIXELS = 4 * 28 * 28, 16384 * 28 * 28


@dataclass(frozen=True)
class PreprocessQwen(Preprocess):
    """`patch_px` side of a patch; `merge` patches to a vision token on each side; `frames` an image is repeated to."""

    chat_template: str
    patch_px: int
    merge: int
    frames: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS

    @property
    def end_token(self) -> str:
        """The token that ends an answer."""
        return END_TOKEN

    @property
    def image_token(self) -> str:
        """The place holder of one vision token."""
        return IMAGE_TOKEN

    def vision_pixels(self, image_HW3: np.ndarray) -> VisionInput:
        """RGB uint8 image -> its patches (N, 3 * frames * patch_px^2) uint8 and the layout of their tokens.

        Patches that become one vision token stand together.

        Raises:
            UserError: one side is more than 200 times the other.
        """
        pixels_3HW = self._resized(image_HW3)
        patch, merge = self.patch_px, self.merge
        rows, columns = (side // (patch * merge) for side in pixels_3HW.shape[1:])
        parts = pixels_3HW.reshape(3, rows, merge, patch, columns, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
        repeated = parts[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, self.frames, -1, -1)
        return VisionInput(repeated.reshape(rows * columns * merge**2, -1), (1, rows, columns))

    def normalise_vision(self, pixels: VisionInput, dtype: torch.dtype = torch.float32) -> VisionInput:
        """uint8 patches -> normalised patches, on the same device."""
        by_channel = look_up(pixels.pixels.unflatten(1, (3, -1)), self._table, dtype)
        return VisionInput(by_channel.flatten(1), pixels.layout)

    @functools.cached_property
    def _table(self) -> Table:
        mean_31, std_31 = (torch.tensor(values)[:, None] for values in (self.mean, self.std))
        # The fast processor folds the division by 255 into mean and std; so does this, to the last bit.
        return Table(torch.arange(256).float().sub(mean_31 * 255.0).div(std_31 * 255.0))

    def image_layout(self, height: int, width: int) -> Layout:
        """The layout of the vision tokens of an image of that size (pixels).

        Raises:
            UserError: one side is more than 200 times the other.
        """
        high, wide = self._sizes(height, width)[1]
        return 1, high // (self.patch_px * self.merge), wide // (self.patch_px * self.merge)

    def question_ids(self, question: str, layout: Layout) -> list[int]:
        """Token ids of the chat template up to and with the assistant's turn, for free generation.

        With a line break between image and question, as in the published training and evaluation, and with the system
        turn that the template adds, as predict_forward has it, which that training leaves out.

        Raises:
            UserError: the question holds a word that stands for a piece of an image.
        """
        for word in RESERVED:
            if word in question:  # it would take another sample's vision token
                raise UserError(f"question {question!r}: {word} stands for a piece of the image; leave it out")
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"\n{question}"}]}]
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer.encode(text.replace(IMAGE_TOKEN, IMAGE_TOKEN * math.prod(layout), 1))

    def position_ids(self, input_ids_BL: Tensor, layouts: list[Layout]) -> Tensor:
        """Time, row and column of each token, (3, B, L).

        Text counts up in all three; an image's tokens begin where the text before it ends and text goes on behind the
        largest of them. Source: Qwen2-VL (arXiv 2409.12191, section 2.1), for still images.
        """
        rows = []
        for ids_L, (frames, high, wide) in zip(input_ids_BL, layouts, strict=True):
            first = int((ids_L == self.image_token_id).int().argmax())
            count, behind = frames * high * wide, first + max(frames, high, wide)
            grid = torch.meshgrid(*(torch.arange(side) for side in (frames, high, wide)), indexing="ij")
            before_3L = torch.arange(first).expand(3, -1)
            image_3L = torch.stack(grid).flatten(1) + first
            after_3L = torch.arange(behind, behind + len(ids_L) - first - count).expand(3, -1)
            rows.append(torch.cat([before_3L, image_3L, after_3L], dim=1))
        return torch.stack(rows, dim=1)

    def _sizes(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width after the first resizing and after the second."""
        high, wide = fitted_size(height, width, _FIRST_FACTOR_PX, _FIRST_MIN_PIXELS, _FIRST_MAX_PIXELS)
        for sides in ((height, width), (high, wide)):  # rounding can lengthen an image; the published code looks twice
            if max(sides) > MOST_ELONGATED * min(sides):
                raise UserError(
                    f"an image of {width} x {height} pixels: Qwen-VL takes sides up to {MOST_ELONGATED} to 1; crop it"
                )
        second = fitted_size(high, wide, self.patch_px * self.merge, self.min_pixels, self.max_pixels)
        return (high, wide), second

    def _resized(self, image_HW3: np.ndarray) -> Tensor:
        (high, wide), size = self._sizes(*image_HW3.shape[:2])
        first = np.array(Image.fromarray(image_HW3).resize((wide, high)))  # PIL's default for RGB is bicubic
        pixels_3HW = torch.from_numpy(first).permute(2, 0, 1)
        if size == (high, wide):
            return pixels_3HW
        return functional.interpolate(pixels_3HW[None], size=size, mode="bicubic", antialias=True)[0]


def fitted_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width as multiples of `factor` with about the same ratio, min_pixels to max_pixels in all.

    Source: smart_resize of Qwen2-VL's processor.
    """
    high, wide = (max(factor, round(side / factor) * factor) for side in (height, width))
    if high * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        high, wide = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif high * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        high, wide = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return high, wide
