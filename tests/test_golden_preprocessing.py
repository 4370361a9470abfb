"""Preprocessing against figures of the published code, kept in golden_preprocessing.json: no published code is needed.

The figures come from tests/parity/test_preprocessing.py, which compares every value.
"""

import json
from pathlib import Path

import numpy as np
import preprocessing_cases as cases
import pytest
import torch
from PIL import Image
from transformers import Qwen2Tokenizer

from sft.config import TrainConfig, UserError
from sft.data import Pair
from sft.data.read import read_image
from sft.features import Features, Item
from sft.model import published_qwen
from sft.model.preprocess import TEMPLATES, PreprocessInternVL
from sft.model.preprocess_qwen import PreprocessQwen

GOLDEN = Path(__file__).resolve().parent / "golden_preprocessing.json"
PUBLISHED = {"tile_px": 448, "tokens_per_tile": 256, "max_tiles": 12, "use_thumbnail": True, "sam2_px": 1024}


def preprocess(template: str = "qwen_chat", tokenizer_folder: Path | None = None) -> PreprocessInternVL:
    """The published sizes."""
    tokenizer = None if tokenizer_folder is None else Qwen2Tokenizer.from_pretrained(tokenizer_folder)
    return PreprocessInternVL(tokenizer, template=TEMPLATES[template], **PUBLISHED)


def qwen_preprocess(family: str, folder: Path) -> PreprocessQwen:
    """From the processor's files, as a published directory holds them."""
    config = {"architectures": ["Sa2VAChatModelQwen"], "vision_config": {"model_type": family}}
    return published_qwen.make_preprocess(config, Qwen2Tokenizer.from_pretrained(folder), 1024, folder)


def ours(image_HW3: np.ndarray) -> dict[str, np.ndarray]:
    """What the vision encoder and SAM2 are given."""
    made = preprocess()
    return {"tiles": made.tiles(image_HW3).numpy(), "sam2_image": made.sam2_image(image_HW3).numpy()}


def prompt_ids(name: str, tokenizer_folder: Path) -> list[int]:
    """Of a case called image/template/index of the question."""
    image, template, index = name.split("/")
    tiles = {"1x1": 1, "999x960": 10}[image]
    made = preprocess(template, tokenizer_folder)
    return made.question_ids(cases.QUESTIONS[int(index)], made.layout(tiles))


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


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()).get("qwen", {}))
def test_qwen_vl(case, tmp_path):
    """Patches and every token id of both families; half a grey level may differ, by the machine's resizing kernel."""
    family, name = case.split("/")
    cases.write_processor(family, tmp_path)
    made = qwen_preprocess(family, tmp_path)
    vision = made.vision_input(read_image(cases.write_image(name, tmp_path)))
    expected = json.loads(GOLDEN.read_text())["qwen"][case]
    figures = cases.patch_figures(vision.pixels.numpy())
    assert figures["shape"] == expected["patches"]["shape"]
    assert figures["mean"] == pytest.approx(expected["patches"]["mean"], abs=1e-3)
    assert figures["samples"] == pytest.approx(expected["patches"]["samples"], abs=0.5 / 255 / 0.26)
    assert cases.runs(made.question_ids(cases.QUESTIONS[0], vision.layout)) == expected["prompt"]


def test_a_too_long_image_is_named_with_its_file(tmp_path):
    """Qwen-VL takes no sides of over 200 to 1, as in the published code; among many images it must be found."""
    image = cases.write_image(cases.TOO_LONG, tmp_path)
    Image.new("L", (4100, 20)).save(tmp_path / "mask.png")
    cases.write_processor("qwen2_5_vl", tmp_path)
    model = torch.nn.Linear(1, 1)
    config = TrainConfig(num_workers=0)
    features = Features(model, qwen_preprocess("qwen2_5_vl", tmp_path), config, torch.device("cpu"))
    pair = Pair("long", image, tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"4100x20\.png: .*4100 x 20 .*200 to 1"):
        next(features.batches([[Item(pair)]]))
    features.close()
