"""Protects preprocessing: how many tiles and in which order, their pixels, and every token id of a prompt."""

import numpy as np
import pytest
import small_sa2va as small
import torch
from PIL import Image

from sft.config import UserError
from sft.model.preprocess import IMAGENET_MEAN, IMAGENET_STD, TEMPLATES, PreprocessInternVL

MEAN, STD = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
PUBLISHED = PreprocessInternVL(None, TEMPLATES["qwen_chat"], 448, 256, 12, use_thumbnail=True, sam2_px=1024)


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels(tile_3HW: torch.Tensor) -> np.ndarray:
    """Undoes the normalisation: uint8 (H, W, 3)."""
    return np.rint((tile_3HW.permute(1, 2, 0).numpy() * STD + MEAN) * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("width", "height", "tiles"),
    [
        (512, 512, 1),
        (999, 960, 10),  # 3 x 3 and a thumbnail
        (2048, 1536, 13),  # 4 x 3
        (1, 1, 1),
        (3000, 20, 13),  # 12 x 1
        (20, 3000, 13),
        (448, 448, 1),
        (640, 480, 13),  # 4 : 3 is met exactly, by 4 x 3 alone
        (800, 400, 3),  # 2 x 1: its ratio ties with 4 x 2, which the image does not half fill
        (1280, 640, 9),  # 4 x 2, half filled
    ],
)
def test_the_number_of_tiles(width, height, tiles):
    assert PUBLISHED.tiles(picture(width, height)).shape == (tiles, 3, 448, 448)


def test_tiles_run_row_by_row_and_the_thumbnail_comes_last():
    image = picture(1344, 896)  # exactly 3 x 2 tiles: nothing is resized but the thumbnail
    tiles = PUBLISHED.tiles(image)
    assert len(tiles) == 7
    for index in range(6):
        top, left = index // 3 * 448, index % 3 * 448
        assert np.array_equal(pixels(tiles[index]), image[top : top + 448, left : left + 448])
    thumbnail = Image.fromarray(image).resize((448, 448), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels(tiles[6]), np.asarray(thumbnail))


def test_one_tile_has_no_thumbnail_and_max_tiles_is_kept():
    assert len(PUBLISHED.tiles(picture(448, 448))) == 1
    few = PreprocessInternVL(None, TEMPLATES["qwen_chat"], 448, 256, 1, use_thumbnail=True, sam2_px=1024)
    assert len(few.tiles(picture(2048, 300))) == 1
    bare = PreprocessInternVL(None, TEMPLATES["qwen_chat"], 448, 256, 12, use_thumbnail=False, sam2_px=1024)
    assert len(bare.tiles(picture(896, 448))) == 2


def test_values_are_scaled_by_imagenets_statistics_channel_by_channel():
    image = np.full((448, 448, 3), (255, 0, 51), np.uint8)
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    for made in (PUBLISHED.tiles(image)[0], PUBLISHED.sam2_image(image)):
        assert made.dtype == torch.float32
        assert made[:, 0, 0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("width", "height"), [(512, 512), (999, 960), (1, 1), (3000, 20)])
def test_sam2s_image_is_square_bicubic_and_gives_up_the_aspect_ratio(width, height):
    image = picture(width, height)
    made = PUBLISHED.sam2_image(image)
    assert made.shape == (3, 1024, 1024)
    expected = Image.fromarray(image).resize((1024, 1024), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels(made), np.asarray(expected))


def test_every_token_of_a_prompt():
    preprocess, tokenizer = small.preprocess(), small.tokenizer()
    question = ["<|im_start|>", "user", "\n", "<img>", *["<IMG_CONTEXT>"] * 8, "</img>", "\n"]
    question += ["Please", "segment", "the", "blood", "vessels", "in", "this", "image", ".", "<|im_end|>", "\n"]
    question += ["<|im_start|>", "assistant", "\n"]
    answer = ["Sure", ",", "[SEG]", ".", "<|im_end|>"]
    assert preprocess.tokens_per_tile == 4
    ids = preprocess.question_ids(small.QUESTION, preprocess.layout(2))
    assert tokenizer.convert_ids_to_tokens(ids) == question
    assert tokenizer.convert_ids_to_tokens(preprocess.answer_ids()) == answer
    assert tokenizer.convert_ids_to_tokens(preprocess.stop_token_ids) == ["[SEG]", "<|im_end|>"]
    prompt = preprocess.prompt([small.QUESTION], [preprocess.layout(2)])
    assert tokenizer.convert_ids_to_tokens(prompt.input_ids_BL[0].tolist()) == question + answer[:3]
    assert prompt.seg_position_B.tolist() == [len(question) + 2]
    assert prompt.labels_BL is None


def test_rows_grow_to_a_multiple_and_nothing_else_changes():
    """On a GPU every new length is compiled anew; padding stands behind everything that is read."""
    plain, padded = (small.preprocess().prompt([small.QUESTION], [(2, 2, 2)], multiple_of=size) for size in (1, 32))
    length = plain.input_ids_BL.shape[1]
    assert length % 32 and padded.input_ids_BL.shape[1] == -(-length // 32) * 32
    assert padded.input_ids_BL[:, :length].equal(plain.input_ids_BL)
    assert padded.seg_position_B.equal(plain.seg_position_B)


def test_prompts_are_padded_on_the_right_and_labels_are_the_next_token():
    preprocess = small.preprocess()
    answer, layouts = preprocess.answer_ids(), [preprocess.layout(1), preprocess.layout(3)]
    prompt = preprocess.prompt([small.QUESTION, small.LONGER], layouts, with_labels=True)
    questions = zip((small.QUESTION, small.LONGER), layouts, strict=True)
    lengths = [len(preprocess.question_ids(*question)) for question in questions]
    assert prompt.input_ids_BL.shape == prompt.labels_BL.shape == (2, lengths[1] + len(answer))
    for ids, labels, position, length in zip(
        prompt.input_ids_BL.tolist(), prompt.labels_BL.tolist(), prompt.seg_position_B.tolist(), lengths, strict=True
    ):
        end = length + len(answer)
        assert ids[length:end] == answer and ids[position] == preprocess.seg_token_id
        assert set(ids[end:]) <= {preprocess.stop_token_ids[-1]}
        for place, label in enumerate(labels):
            assert label == (ids[place + 1] if length - 1 <= place < end - 1 else -100)


def test_templates_end_where_the_assistant_speaks():
    for name, template in TEMPLATES.items():
        asked = template.question.format("QUESTION")
        assert asked.count("QUESTION") == 1 and asked.rstrip().endswith(
            ("assistant", "<|assistant|>", "<|end_header_id|>")
        ), name
        assert template.end in asked, name


def test_the_image_word_in_a_question_is_refused():
    with pytest.raises(UserError, match="IMG_CONTEXT.*leave it out"):
        small.preprocess().prompt(["Segment <IMG_CONTEXT>."], [(1, 2, 2)])
