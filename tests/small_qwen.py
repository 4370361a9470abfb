"""Qwen-VL-shaped Sa2VA models of 0.1 M parameters: all parts, random weights, a word-level tokenizer; for tests."""

import copy
import functools
import tempfile
from pathlib import Path

import numpy as np
import small_sa2va
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft.model import published, published_qwen
from sft.model.preprocess_qwen import IMAGE_TOKEN, PreprocessQwen
from sft.model.sa2va import Layout, Sam2Features, VisionFeatures
from sft.model.sa2va_qwen import Sa2VAQwen

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
QUESTION, LONGER, MASK_PX = small_sa2va.QUESTION, small_sa2va.LONGER, small_sa2va.MASK_PX
SYSTEM = "You are a helpful assistant."
# In the manner of the published ones: a system turn of its own, content as text or as parts.
TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<unk>")
_VISION = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
_WORDS = (QUESTION + " " + LONGER + " " + SYSTEM + " Sure It is user assistant system").replace(".", " . ")
_TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_VISION_CONFIG = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = _WORDS.replace(",", " , ").replace("?", " ? ").split()
    vocabulary = dict.fromkeys([*_SPECIAL, *_VISION, "[SEG]", "\n", ",", ".", "?", *words])
    assert len(vocabulary) <= _TEXT["vocab_size"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *_VISION, "[SEG]"]})
    made.chat_template = TEMPLATE
    return made


def config(family: str, *, flat: bool = False, tied: bool = False) -> dict:
    """config.json of a small model; `flat` as transformers 4.49 wrote Qwen2.5-VL."""
    ids = tokenizer().convert_tokens_to_ids
    text, vision = copy.deepcopy(_TEXT), copy.deepcopy(_VISION_CONFIG) | {"model_type": family}
    match family:
        case "qwen2_5_vl":
            text |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}, "model_type": "qwen2_5_vl_text"}
            vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2}
        case "qwen3_vl":
            mrope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
            text |= {"rope_scaling": mrope, "head_dim": 8, "model_type": "qwen3_vl_text"}
            vision |= {"patch_size": 16, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
        case _:
            raise ValueError(f"{family}: choose qwen2_5_vl or qwen3_vl")
    text |= {"tie_word_embeddings": tied}
    made = {
        "architectures": ["Sa2VAChatModelQwen"],
        "model_type": "sa2va_chat",
        "auto_map": {"AutoModel": "modeling_sa2va_qwen.Sa2VAChatModelQwen"},
        "template": "qwen_chat",
        "image_token_id": ids(IMAGE_TOKEN),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        "video_token_id": ids("<|video_pad|>"),
        "tie_word_embeddings": tied,
        "vision_config": vision,
        "native": {
            "sam2_config": small_sa2va.config()["native"]["sam2_config"],
            "preprocess": {"min_pixels": 4 * 32 * 32, "max_pixels": 12 * 32 * 32},
        },
    }
    text.pop("model_type") if flat else None
    return made | (text if flat else {"text_config": text})


def build(family: str, settings: dict | None = None, seed: int = 0) -> Sa2VAQwen:
    """Random fp32 weights, large enough that every part counts; the two copies of SAM2's gaussian matrix agree."""
    torch.manual_seed(seed)
    settings = settings or config(family)
    model = published.build(settings, settings["image_token_id"], Path("small"))
    model.tie_head()
    return small_sa2va.perturbed(model)


@functools.cache
def model(family: str) -> Sa2VAQwen:
    """One that tests only read."""
    return build(family)


def write(directory: Path, family: str, settings: dict | None = None, seed: int = 0, dtype=torch.float32) -> Sa2VAQwen:
    """Writes a small published directory; returns the model that lies in it."""
    settings = settings or config(family)
    built = build(family, settings, seed)
    published.save(directory, built, settings, tokenizer(), dtype=dtype)
    return built


def rename_to_old_layout(directory: Path) -> None:
    """Renames a directory's tensors to what transformers 4.49 called them."""
    tensors = load_file(directory / "model.safetensors")
    renamed = {old_name(name): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})


def old_name(name: str) -> str:
    """What transformers 4.49 called a tensor."""
    for new, old in (("model.model.visual.", "model.visual."), ("model.model.language_model.", "model.model.")):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


@functools.cache
def preprocess(family: str) -> PreprocessQwen:
    """Of a small model; patches of 14 or 16 px, 4 to 12 vision tokens an image."""
    with tempfile.TemporaryDirectory() as folder:
        published_qwen.write_processor(Path(folder), config(family))
        return published.make_preprocess(config(family), tokenizer(), Path(folder))


def images(count: int, seed: int = 0) -> list[np.ndarray]:
    """Alternately square and twice as wide as high."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (56, 112 if index % 2 else 56, 3), dtype=np.uint8) for index in range(count)]


def inputs(of: Sa2VAQwen, family: str, count: int = 2) -> tuple[VisionFeatures, list[Layout], Sam2Features]:
    """Vision features of some images, the layout of each, and SAM2 features."""
    pictures = images(count)
    vision = [preprocess(family).vision_input(picture) for picture in pictures]
    with torch.no_grad():
        features = of.sam2_features(torch.stack([preprocess(family).sam2_image(picture) for picture in pictures]))
        encoded = VisionFeatures.join([of.vision_features(one) for one in vision])
    return encoded, [one.layout for one in vision], features
