"""Preprocessing against figures of the published code, kept in golden_preprocessing.json: no published code is needed.

The figures come from tests/parity/test_preprocessing.py, which compares every value.
"""

import json
from pathlib import Path

import numpy as np
import preprocessing_cases as cases
import pytest
from transformers import Qwen2Tokenizer

from sft.data.read import read_image
from sft.model.preprocess import TEMPLATES, Preprocess

GOLDEN = Path(__file__).resolve().parent / "golden_preprocessing.json"
PUBLISHED = {"tile_px": 448, "tokens_per_tile": 256, "max_tiles": 12, "use_thumbnail": True, "sam2_px": 1024}


def preprocess(template: str = "qwen_chat", tokenizer_folder: Path | None = None) -> Preprocess:
    """The published sizes."""
    tokenizer = None if tokenizer_folder is None else Qwen2Tokenizer.from_pretrained(tokenizer_folder)
    return Preprocess(tokenizer, TEMPLATES[template], **PUBLISHED)


def ours(image_HW3: np.ndarray) -> dict[str, np.ndarray]:
    """What the vision encoder and SAM2 are given."""
    made = preprocess()
    return {"tiles": made.tiles(image_HW3).numpy(), "sam2_image": made.sam2_image(image_HW3).numpy()}


def prompt_ids(name: str, tokenizer_folder: Path) -> list[int]:
    """Of a case called image/template/index of the question."""
    image, template, index = name.split("/")
    tiles = {"1x1": 1, "999x960": 10}[image]
    return preprocess(template, tokenizer_folder).question_ids(cases.QUESTIONS[int(index)], tiles)


@pytest.mark.parametrize("name", [name for name in cases.IMAGES if name not in cases.SCALED])
def test_images(name, tmp_path):
    """Tiles in number, order and pixel; SAM2's image; and their values after normalisation."""
    made = ours(read_image(cases.write_image(name, tmp_path)))
    for part, expected in json.loads(GOLDEN.read_text())["images"][name].items():
        figures = cases.figures(made[part])
        assert figures["samples"] == pytest.approx(expected["samples"], abs=2e-6), part
        assert {key: figures[key] for key in ("shape", "crc32")} == {key: expected[key] for key in ("shape", "crc32")}


def test_sixteen_bits_are_scaled_and_not_cut(tmp_path):
    """Where the published example, which reads with convert("RGB"), sees a white picture: 65535 / 257 = 255."""
    image = read_image(cases.write_image("16 bit", tmp_path))
    y, x = np.mgrid[:200, :300]
    high, low = (x * 7 + y * 13 + x * y // 31) % 256, (x * 8 + y * 11 + x * y // 31 + 50) % 256
    assert np.array_equal(image[..., 0], np.rint((high * 256 + low) / 257).astype(np.uint8))
    assert np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2])


def test_prompts(tmp_path):
    """Every token id of every template."""
    cases.write_tokenizer(tmp_path)
    golden = json.loads(GOLDEN.read_text())["prompts"]
    assert len(golden) == 2 * len(cases.TEMPLATES) * len(cases.QUESTIONS)
    for name, expected in golden.items():
        assert cases.runs(prompt_ids(name, tmp_path)) == expected, name
