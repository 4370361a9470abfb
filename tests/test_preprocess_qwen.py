"""Protects Qwen-VL's preprocessing: sizes and patches as the published pipeline makes them, every token of a prompt."""

import json
from pathlib import Path

import numpy as np
import pytest
import small_qwen as small
import torch
from PIL import Image

from sft.config import UserError
from sft.model import published, published_qwen
from sft.model.preprocess_qwen import PreprocessQwen, fitted_size

STATISTICS = {14: published_qwen._STATISTICS["qwen2_5_vl"], 16: published_qwen._STATISTICS["qwen3_vl"]}


def preprocess(patch_px: int) -> PreprocessQwen:
    mean, std = STATISTICS[patch_px]
    return PreprocessQwen(None, "", patch_px, 2, 2, tuple(mean), tuple(std), sam2_px=1024)


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels(vision, patch_px: int) -> np.ndarray:
    """Puts an image together again from its patches by plain loops: uint8 (H, W, 3)."""
    mean, std = (np.array(values) for values in STATISTICS[patch_px])
    _, rows, columns = vision.layout
    image_HW3 = np.zeros((rows * 2 * patch_px, columns * 2 * patch_px, 3))
    patches = vision.pixels.view(-1, 3, 2, patch_px, patch_px).numpy()
    assert np.array_equal(patches[:, :, 0], patches[:, :, 1])  # an image is a film of two equal frames
    tokens = [(row, column) for row in range(0, 2 * rows, 2) for column in range(0, 2 * columns, 2)]
    places = [(row + y, column + x) for row, column in tokens for y in (0, 1) for x in (0, 1)]
    for patch, (row, column) in zip(patches[:, :, 0], places, strict=True):
        top, left = row * patch_px, column * patch_px
        image_HW3[top : top + patch_px, left : left + patch_px] = patch.transpose(1, 2, 0)
    return np.rint((image_HW3 * std + mean) * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("width", "height", "grid_14", "grid_16"),
    [  # patches as transformers 4.57.1's fast processor gives them after qwen_vl_utils 0.0.14
        (512, 512, (46, 46), (40, 40)),
        (565, 584, (48, 46), (42, 40)),
        (999, 960, (68, 72), (60, 64)),
        (2048, 1536, (78, 104), (68, 90)),
        (1, 1, (46, 46), (40, 40)),
        (3000, 20, (6, 470), (4, 410)),
        (20, 3000, (470, 6), (410, 4)),
        (700, 605, (44, 50), (38, 44)),
        (1920, 1080, (68, 120), (58, 104)),
        (4288, 2848, (72, 110), (64, 96)),
    ],
)
def test_grids_are_the_published_ones(width, height, grid_14, grid_16):
    for patch_px, grid in ((14, grid_14), (16, grid_16)):
        vision = preprocess(patch_px).vision_input(np.zeros((height, width, 3), np.uint8))
        assert vision.layout == (1, grid[0] // 2, grid[1] // 2)
        assert vision.pixels.shape == (grid[0] * grid[1], 3 * 2 * patch_px**2) and vision.pixels.dtype == torch.float32


def test_patches_of_one_token_stand_together_and_nothing_is_resized_without_need():
    image = picture(28 * 26, 28 * 21)  # 428,064 px: within the limits
    assert np.array_equal(pixels(preprocess(14).vision_input(image), 14), image)
    image = picture(32 * 28, 32 * 21)  # multiples of 28 and of 32
    assert np.array_equal(pixels(preprocess(16).vision_input(image), 16), image)


def test_an_image_is_resized_twice_and_bicubically():
    """To multiples of 28 first, whatever the model: in one step the picture would be another."""
    image = np.asarray(Image.fromarray(picture(350, 302)).resize((700, 605)))
    first = Image.fromarray(image).resize((700, 616), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels(preprocess(14).vision_input(image), 14), np.asarray(first))
    ours = pixels(preprocess(16).vision_input(image), 16).astype(int)
    twice = np.asarray(first.resize((704, 608), Image.Resampling.BICUBIC))
    once = np.asarray(Image.fromarray(image).resize((704, 608), Image.Resampling.BICUBIC))
    difference = np.abs(ours - twice)
    assert difference.max() <= 8 and difference.mean() < 0.4  # torch's kernel, not PIL's: they round otherwise
    assert np.abs(ours - once).mean() > 1.5


def test_fitted_sizes_by_hand():
    assert fitted_size(100, 100, 28, 0, 10**9) == (112, 112)
    assert fitted_size(5, 400, 28, 0, 10**9) == (28, 392)
    assert fitted_size(560, 560, 28, 0, 280 * 280) == (280, 280)
    assert fitted_size(1, 1, 28, 560 * 560, 10**9) == (560, 560)


@pytest.mark.parametrize(("width", "height"), [(1, 201), (4021, 20), (8200, 41)])  # the last grows longer by rounding
def test_images_too_long_for_the_model_are_refused(width, height):
    with pytest.raises(UserError, match=f"an image of {width} x {height} pixels: .* up to 200 to 1"):
        preprocess(14).vision_input(np.zeros((height, width, 3), np.uint8))


def test_every_token_of_a_prompt():
    made, tokenizer = small.preprocess("qwen3_vl"), small.tokenizer()
    question = ["<|im_start|>", "system", "\n", *small.SYSTEM.removesuffix(".").split(), ".", "<|im_end|>", "\n"]
    question += ["<|im_start|>", "user", "\n", "<|vision_start|>", *["<|image_pad|>"] * 6, "<|vision_end|>"]
    question += ["\n", "Please", "segment", "the", "blood", "vessels", "in", "this", "image", ".", "<|im_end|>", "\n"]
    question += ["<|im_start|>", "assistant", "\n"]
    answer = ["Sure", ",", "[SEG]", ".", "<|im_end|>"]
    ids = made.question_ids(small.QUESTION, (1, 2, 3))
    assert tokenizer.convert_ids_to_tokens(ids) == question
    assert tokenizer.convert_ids_to_tokens(made.stop_token_ids) == ["[SEG]", "<|im_end|>"]
    prompt = made.prompt([small.QUESTION], [(1, 2, 3)], with_labels=True)
    assert tokenizer.convert_ids_to_tokens(prompt.input_ids_BL[0].tolist()) == question + answer
    assert prompt.seg_position_B.tolist() == [len(question) + 2]
    labels = prompt.labels_BL[0].tolist()
    assert labels == [-100] * (len(question) - 1) + tokenizer.convert_tokens_to_ids(answer) + [-100]


def test_positions_by_hand():
    """Text counts up; an image of 2 x 3 tokens stands at one time, and text goes on after its longer side."""
    made = small.preprocess("qwen2_5_vl")
    ids = torch.tensor([[2, 2, *[made.image_token_id] * 6, 2, 2]])
    expected = [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert made.position_ids(ids, [(1, 2, 3)])[:, 0].tolist() == expected


@pytest.mark.parametrize("word", ["<|image_pad|>", "<|vision_start|>", "<|video_pad|>"])
def test_words_for_pieces_of_an_image_are_refused_in_a_question(word):
    with pytest.raises(UserError, match="stands for a piece of the image; leave it out"):
        small.preprocess("qwen3_vl").prompt([f"Segment {word}."], [(1, 2, 2)])


def test_the_template_is_the_processors_before_the_tokenizers(tmp_path):
    """A processor's own template counts, in the order in which transformers looks for it."""
    config = small.config("qwen3_vl")
    published_qwen.write_processor(tmp_path, config)

    def begins(folder: Path) -> str:
        made = published.make_preprocess(config, small.tokenizer(), folder)
        return small.tokenizer().convert_ids_to_tokens(made.question_ids("Please", (1, 1, 1)))[0]

    assert begins(tmp_path) == "<|im_start|>"
    (tmp_path / "chat_template.jinja").write_text("image <|image_pad|>")
    assert begins(tmp_path) == "image"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "segment <|image_pad|>"}))
    assert begins(tmp_path) == "segment"
