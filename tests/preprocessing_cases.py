"""Image files, prompts and a tokenizer that preprocessing is tested on, and figures that stand for large arrays.

Everything follows from integer arithmetic, so it is the same on every machine. Needs numpy and Pillow alone: the
published side reads it too, under its own Python.

Shapes: T tiles, H x W pixels.
"""

import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
# name -> (width, height, kind of file)
IMAGES = {
    "512x512": (512, 512, "RGB"),
    "565x584": (565, 584, "RGB"),
    "999x960": (999, 960, "RGB"),
    "2048x1536": (2048, 1536, "RGB"),
    "1x1": (1, 1, "RGB"),
    "3000x20": (3000, 20, "RGB"),
    "grey": (300, 200, "L"),
    "rgba": (300, 200, "RGBA"),
    "16 bit": (300, 200, "I;16"),
    "4100x20": (4100, 20, "RGB"),
}
SCALED = ("16 bit",)  # read differently by us, on purpose: see test_sixteen_bits
QUESTIONS = ("Please segment the blood vessels in this image.", "  Where are they?\nÄ, 血管 <p>")
TEMPLATES = ("qwen_chat", "internlm2_chat", "phi3_chat", "llama3_chat")
_WORDS_OF_TEMPLATES = """
<|endoftext|> <|im_start|> <|im_end|> <|user|> <|assistant|> <|end|> <|start_header_id|> <|end_header_id|> <|eot_id|>
"""
SPECIAL = [*_WORDS_OF_TEMPLATES.split(), "<img>", "</img>", "<IMG_CONTEXT>", "[SEG]", "<p>", "</p>", "<vp>", "</vp>"]
SPECIAL += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
# In the manner of the published ones: a system turn, the image's words, the text.
QWEN_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Processor settings that differ between the families; both merge 2 x 2 patches and repeat an image to 2 frames.
QWEN = {
    "qwen2_5_vl": {
        "patch_size": 14,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": "Qwen2_5_VLProcessor",
    },
    "qwen3_vl": {
        "patch_size": 16,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    },
}
TOO_LONG = "4100x20"  # over 200 to 1: refused by the published code too
SAMPLES = 12


def write_image(name: str, folder: Path) -> Path:
    """The file of a case."""
    width, height, kind = IMAGES[name]
    y, x = np.mgrid[:height, :width]
    planes = [(x * (7 + c) + y * (13 - 2 * c) + x * y // 31 + 50 * c) % 256 for c in range(4)]
    match kind:
        case "L":
            array = planes[0].astype(np.uint8)
        case "I;16":
            array = (planes[0] * 256 + planes[1]).astype(np.uint16)
        case _:
            array = np.stack(planes[: len(kind)], -1).astype(np.uint8)
    file = folder / f"{name}.png"
    Image.fromarray(array).save(file, compress_level=1)
    return file


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes in Qwen2's format: every byte is a token, so that no character of a prompt can hide."""
    letters = {symbol: index for index, symbol in enumerate(_byte_symbols())}
    added = {word: len(letters) + index for index, word in enumerate(SPECIAL)}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False) | {"special": True}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "added_tokens_decoder": {str(index): {"content": word} | flags for word, index in added.items()},
    }
    (folder / "vocab.json").write_text(json.dumps(letters))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_processor(family: str, folder: Path) -> None:
    """A Qwen-VL directory's tokenizer, template and processor."""
    write_tokenizer(folder)
    settings = QWEN[family] | {"image_processor_type": "Qwen2VLImageProcessorFast", "merge_size": 2}
    settings |= {"temporal_patch_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": QWEN_TEMPLATE}))


def patch_figures(patches: np.ndarray) -> dict:
    """Shape, mean, and some of the values: the resizing kernel's last digit may differ from machine to machine."""
    flat = patches.ravel()
    chosen = np.linspace(0, flat.size - 1, SAMPLES).astype(int)
    return {
        "shape": list(patches.shape),
        "mean": round(float(patches.mean(dtype=np.float64)), 5),
        "samples": [round(float(value), 5) for value in flat[chosen]],
    }


def pixels(normalised_T3HW: np.ndarray) -> np.ndarray:
    """Undoes ImageNet's statistics: the uint8 values that were resized, (T, H, W, 3)."""
    values = np.moveaxis(normalised_T3HW.astype(np.float64), -3, -1) * STD + MEAN
    return np.rint(values * 255).astype(np.uint8)


def figures(normalised_T3HW: np.ndarray) -> dict:
    """Shape, checksum of the uint8 pixels, and some of the values as they are."""
    flat = normalised_T3HW.ravel()
    chosen = np.linspace(0, flat.size - 1, SAMPLES).astype(int)
    return {
        "shape": list(normalised_T3HW.shape),
        "crc32": zlib.crc32(pixels(normalised_T3HW).tobytes()),
        "samples": [round(float(value), 6) for value in flat[chosen]],
    }


def runs(ids: list[int]) -> list[list[int]]:
    """Token ids as [id, how often] pairs: thousands of image tokens in a row are one."""
    pairs: list[list[int]] = []
    for token in ids:
        if pairs and pairs[-1][0] == token:
            pairs[-1][1] += 1
        else:
            pairs.append([token, 1])
    return pairs


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes that GPT-2's vocabulary is written in."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
