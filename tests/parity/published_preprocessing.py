"""The published preprocessing, run as predict_forward runs it, up to where the model begins.

    SA2VA_UPSTREAM=~/Sa2VA ~/sa2va_reference/bin/python tests/parity/published_preprocessing.py FOLDER

Runs under the Python in which the published code works. Reads FOLDER/NAME.png and the tokenizer in FOLDER; writes
FOLDER/NAME.npz (tiles, sam2_image in fp32 and as in bf16) and FOLDER/prompts.json (token ids by template and question).
For Qwen-VL it reads the processor in FOLDER/FAMILY and writes FOLDER/FAMILY/NAME.npz, or NAME.txt if it refuses.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

sys.path[:0] = [
    str(Path(os.environ["SA2VA_UPSTREAM"]) / "projects" / "sa2va" / "hf"),
    str(Path(__file__).resolve().parents[1]),
]
torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor

from models import modeling_sa2va_chat as published  # noqa: E402
from models.sam2 import SAM2  # noqa: E402
from models.templates import PROMPT_TEMPLATE  # noqa: E402
from models_qwen2_5_vl.modeling_sa2va_qwen import Sa2VAChatModelQwen as Qwen2_5  # noqa: E402
from models_qwen3vl.modeling_sa2va_qwen import Sa2VAChatModelQwen as Qwen3  # noqa: E402
from preprocessing_cases import IMAGES, QUESTIONS, TEMPLATES  # noqa: E402
from transformers import AutoProcessor, AutoTokenizer  # noqa: E402


class Reached(Exception):
    """predict_forward has come to the model."""


class Beginning:
    """Stands for the model: predict_forward itself is the published one, `generate` notes what it is given."""

    predict_forward = published.Sa2VAChatModel.predict_forward
    preparing_for_generation = published.Sa2VAChatModel.preparing_for_generation

    def __init__(self, template: str, tokenizer, dtype: torch.dtype):
        self.template = PROMPT_TEMPLATE[template]
        self.config = SimpleNamespace(llm_config=SimpleNamespace(architectures=["Qwen2ForCausalLM"]))
        self.grounding_encoder = SimpleNamespace(preprocess_image=self.preprocess_image)
        self.statistics = SimpleNamespace(img_mean=(0.485, 0.456, 0.406), img_std=(0.229, 0.224, 0.225))
        self.init_prediction_config = False
        self.preparing_for_generation(tokenizer, torch_dtype=dtype)

    def preprocess_image(self, pixels):
        """The published one, in the dtype of the run; its default is bf16 whatever the image is."""
        self.sam2_image = SAM2.preprocess_image(self.statistics, pixels, dtype=self.torch_dtype)
        return self.sam2_image

    def generate(self, **inputs):
        """Notes the inputs and ends the run."""
        self.inputs = inputs
        raise Reached

    def begin(self, image: Image.Image, question: str):
        """Runs predict_forward up to the model."""
        try:
            self.predict_forward(image=image, text=f"<image>\n{question}")
        except Reached:
            return self
        raise RuntimeError("predict_forward ended before the model")


class BeginningQwen:
    """The same for the Qwen-VL families."""

    device, min_pixels, max_pixels, torch_dtype = "cpu", 512 * 28 * 28, 2048 * 28 * 28, torch.float32

    def __init__(self, processor):
        self.processor = processor
        self.extra_image_processor = published.DirectResize(1024)
        self.grounding_encoder = SimpleNamespace(preprocess_image=lambda pixels: pixels)
        self.model = SimpleNamespace(generate=self.generate)

    def generate(self, **inputs):
        """Notes the inputs and ends the run."""
        self.inputs = inputs
        raise Reached


def begin_qwen(kind: type, processor, image: Image.Image) -> dict:
    """What the published class of a family gives its model."""
    begun = BeginningQwen(processor)
    try:
        kind.predict_forward(begun, image=image, text=f"<image>\n{QUESTIONS[0]}", processor=processor)
    except Reached:
        return begun.inputs
    raise RuntimeError("predict_forward ended before the model")


def run_qwen(folder: Path) -> None:
    """All images in both families."""
    for family, kind in (("qwen2_5_vl", Qwen2_5), ("qwen3_vl", Qwen3)):
        processor = AutoProcessor.from_pretrained(folder / family)
        for name in IMAGES:
            image = Image.open(folder / f"{name}.png").convert("RGB")
            try:
                inputs = begin_qwen(kind, processor, image)
            except ValueError as error:
                (folder / family / f"{name}.txt").write_text(str(error))
                continue
            names = ("pixel_values", "image_grid_thw", "input_ids")
            np.savez(folder / family / f"{name}.npz", **{key: inputs[key].numpy() for key in names})


def main(folder: Path) -> None:
    """All images, and all prompts on two of them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = {}
    for name in IMAGES:
        image = Image.open(folder / f"{name}.png").convert("RGB")  # what every published example does
        exact = Beginning("qwen_chat", tokenizer, torch.float32).begin(image, QUESTIONS[0])
        half = Beginning("qwen_chat", tokenizer, torch.bfloat16).begin(image, QUESTIONS[0])
        np.savez(
            folder / f"{name}.npz",
            rgb=np.asarray(image),
            tiles=exact.inputs["pixel_values"].numpy(),
            sam2_image=exact.sam2_image.numpy(),
            tiles_bf16=half.inputs["pixel_values"].float().numpy(),
            sam2_image_bf16=half.sam2_image.float().numpy(),
        )
        if name not in ("1x1", "999x960"):
            continue
        for template in TEMPLATES:
            for index, question in enumerate(QUESTIONS):
                begun = Beginning(template, tokenizer, torch.float32).begin(image, question)
                prompts[f"{name}/{template}/{index}"] = begun.inputs["input_ids"][0].tolist()
    (folder / "prompts.json").write_text(json.dumps(prompts))
    run_qwen(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
