"""A complete published directory of random weights, of any size, written without holding the model.

Takes a shape, gives a directory that loads, trains and exports like a published one, for figures of time and memory;
what such a model says means nothing. SAM2's video memory, which images do not need, is absent.
"""

import json
import math
import random
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor

from sft.model import preprocess_qwen, published, published_qwen, weights
from sft.model.preprocess import IMAGE_TOKEN
from sft.model.shapes import Shape
from sft.model.tiny import tokenizer_with

SHARD_BYTES = 5 * 10**9  # as transformers cut them when Sa2VA was published
BLOCK = 16_777_213  # random numbers drawn; a prime, so that rows cut from them in turn begin at different places
DTYPE = torch.bfloat16
# What the published Qwen-VL templates make of a turn with one image, and nothing of what else they can do.
_SYSTEM_TURN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)
_TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(shape: Shape, directory: Path, *, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes config.json, tokenizer, bf16 shards with their index and, for Qwen-VL, the processor's file.

    Returns the bytes of the weights.

    Weights are drawn with a deviation of 1 / sqrt(fan in) and norms lie near 1, so that activations stay finite at any
    depth. They come from one block of random numbers, read from different places.

    Args:
        shape: from `shapes.named`, or one of the caller's.
        directory: made if need be.
        seed: the same seed writes the same bytes.
        shard_bytes: most of a shard, unless one tensor is larger.

    Raises:
        UserError: a family that is not supported.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape.config, indent=2) + "\n", encoding="utf-8")
    tensors = _empty_tensors(directory, _write_texts(shape, directory))
    block_N = torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed)).to(DTYPE)
    places = random.Random(seed)
    shards = _cut(tensors, shard_bytes)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [weights.FILE]
    for file, names in zip(files, shards, strict=True):
        _write_shard(directory / file, {name: tensors[name] for name in names}, block_N, places)
    total = sum(map(_bytes, tensors.values()))
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / weights.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _write_texts(shape: Shape, directory: Path) -> int:
    """Tokenizer, and chat template and processor where the family has them; returns the image token's id."""
    tokenizer = tokenizer_with(shape.special_ids)
    if preprocess_qwen.IMAGE_TOKEN not in shape.special_ids:
        tokenizer.save_pretrained(directory)
        return shape.special_ids[IMAGE_TOKEN]
    family = published_qwen.family(shape.config, directory / "config.json")
    tokenizer.chat_template = _TURNS if family == "qwen3_vl" else _SYSTEM_TURN + _TURNS
    tokenizer.save_pretrained(directory)
    published_qwen.write_processor(directory, shape.config)
    return shape.special_ids[preprocess_qwen.IMAGE_TOKEN]


def _empty_tensors(directory: Path, image_token_id: int) -> dict[str, Tensor]:
    """Published name -> a tensor of that shape on the meta device."""
    config = published.read_config(directory)
    with init_empty_weights(include_buffers=False):
        model = published.build(config, image_token_id, directory)
    return {name: tensor.to("meta") for name, tensor in weights.published_state(model).items()}


def _cut(tensors: dict[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Names of each shard, in order."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + _bytes(tensor) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(tensor)
    return shards


def _write_shard(file: Path, tensors: dict[str, Tensor], block_N: Tensor, places: random.Random) -> None:
    """A safetensors file by hand: its own writer would want all tensors in memory at once."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + _bytes(tensor)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data at a multiple of 8
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            mean, deviation = _distribution(name, tensor)
            place, left = places.randrange(BLOCK), tensor.numel()
            while left:
                drawn_N = block_N[place : place + left]
                opened.write(drawn_N.mul(deviation).add_(mean).view(torch.uint8).numpy())
                place, left = 0, left - len(drawn_N)


def _distribution(name: str, tensor: Tensor) -> tuple[float, float]:
    """Mean and deviation of a tensor's values."""
    if name.endswith(".bias"):
        return 0.0, 0.02
    if tensor.dim() == 1:  # the weight of a norm, or a layer's scale
        return 1.0, 0.02
    return 0.0, 1 / math.sqrt(tensor.numel() / len(tensor))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * DTYPE.itemsize
