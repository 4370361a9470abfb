"""Protects shapes and random directories: the published models' sizes, complete, deterministic, finite, of any size."""

import hashlib
import json
import math

import pytest
import small_qwen
import small_runs
import small_sa2va as small
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from test_shards import LiveBytes
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from sft.config import UserError
from sft.model import published, published_tokenizer, random_weights, shapes, weights
from sft.model.tiny import tokenizer_with
from sft.train import train

SAM2_PARAMETERS = 224.4e6  # Hiera-L with the video memory, which is a twentieth of it
IMAGE_PARAMETERS = 0.304e9  # InternViT-300M
# Parameters that the base models' pages state, 10^9.
STATED = {"1b": 0.938, "4b": 3.71, "8b": 7.94, "internlm2-8b": 8.08}
STATED_QWEN = {"qwen2_5vl-3b": 3.75, "qwen2_5vl-7b": 8.29, "qwen3vl-2b": 2.13, "qwen3vl-4b": 4.44}
TIED = ("qwen2_5vl-3b", "qwen3vl-2b", "qwen3vl-4b")  # as published by Qwen; Sa2VA gives them a head of their own


@pytest.fixture
def special_ids():
    return small.tokenizer().get_added_vocab()


def write(directory, special_ids, **changes) -> int:
    """A small random directory."""
    settings = changes.pop("settings", small.config())
    return random_weights.write(shapes.Shape(settings, special_ids), directory, **changes)


def parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", STATED)
def test_internvl_shapes_have_the_parameters_of_the_published_models(name, tmp_path):
    shape = shapes.named(name)
    with init_empty_weights(include_buffers=False):
        model = published.build(shape.config, shape.special_ids["<IMG_CONTEXT>"], tmp_path)
    assert parameters(model.vision_model) == pytest.approx(IMAGE_PARAMETERS, rel=0.003)
    assert parameters(model.sam2) == pytest.approx(SAM2_PARAMETERS, rel=0.06)
    without = parameters(model) - parameters(model.sam2) - parameters(model.text_hidden_fcs)
    assert without / 1e9 == pytest.approx(STATED[name], rel=0.002)


@pytest.mark.parametrize("name", STATED_QWEN)
def test_qwen_shapes_have_the_parameters_of_the_published_models(name):
    config = shapes.named(name).config
    made, kind = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    if name.startswith("qwen3"):
        made, kind = Qwen3VLConfig, Qwen3VLForConditionalGeneration
    with init_empty_weights():
        model = kind(made(**{key: config[key] for key in ("text_config", "vision_config", "tie_word_embeddings")}))
    head = parameters(model.lm_head) if name in TIED else 0
    assert (parameters(model) - head) / 1e9 == pytest.approx(STATED_QWEN[name], rel=0.003)


@pytest.mark.parametrize("name", shapes.NAMES)
def test_every_shape_has_a_tokenizer_with_its_published_ids_within_its_vocabulary(name):
    """The last of Sa2VA's tokens is the last row of the embeddings: the vocabulary is cut to the tokenizer."""
    shape = shapes.named(name)
    language = shape.config.get("llm_config") or shape.config["text_config"]
    assert max(shape.special_ids.values()) == shape.special_ids["</vp>"] == language["vocab_size"] - 1
    tokenizer = tokenizer_with(shape.special_ids)
    assert len(tokenizer) == language["vocab_size"]
    for token, index in shape.special_ids.items():
        assert tokenizer.encode(token, add_special_tokens=False) == [index]
    words = tokenizer.encode(small.QUESTION, add_special_tokens=False)
    assert tokenizer.unk_token_id not in words and len(words) == 9


def test_an_unknown_shape_is_answered_with_the_choices():
    with pytest.raises(UserError, match="shape '5b': choose from 1b, 4b, 8b, internlm2-8b, qwen2_5vl-3b"):
        shapes.named("5b")


def test_a_random_directory_loads_whole_and_computes_finite_masks(tmp_path, special_ids):
    """Deep enough that weights drawn too wide or too narrow would show."""
    settings = small.config(num_hidden_layers=24)
    total = write(tmp_path, special_ids, settings=settings, shard_bytes=200_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert len(set(index["weight_map"].values())) == len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = published.load(str(tmp_path), dtype=torch.float32)
    assert sum(tensor.numel() * 2 for tensor in weights.published_state(loaded.model).values()) == total
    tokens, tile_counts, features = small.inputs(loaded.model, 2)
    output = loaded.model(loaded.preprocess.prompt([small.QUESTION, small.LONGER], tile_counts), tokens, features)
    assert output.masks.logits_Bhw.isfinite().all()
    assert output.masks.logits_Bhw.std() > 1e-3 and output.seg_state_BC.abs().max() < 100


def test_shards_are_cut_at_their_size_and_may_hold_one_larger_tensor(tmp_path, special_ids):
    write(tmp_path, special_ids, shard_bytes=20_000)
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    write(tmp_path / "one", special_ids)
    assert [path.name for path in (tmp_path / "one").glob("model*")] == ["model.safetensors"]


def test_the_seed_decides_every_byte_and_no_two_tensors_are_alike(tmp_path, special_ids):
    digests = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(tmp_path / name, special_ids, seed=seed)
        digests.append(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]
    state = published.load(str(tmp_path / "a")).model.language_model.state_dict()
    assert not torch.equal(state["model.layers.0.mlp.up_proj.weight"], state["model.layers.1.mlp.up_proj.weight"])


def test_a_fused_language_model_is_written_under_its_published_names(tmp_path, special_ids):
    """InternLM2: q, k and v in one tensor."""
    write(tmp_path, special_ids, settings=small.config("InternLM2ForCausalLM"))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert "language_model.model.layers.0.attention.wqkv.weight" in opened.keys()  # noqa: SIM118
    assert published.load(str(tmp_path)).model.language_model.lm_head.weight.isfinite().all()


def test_a_tied_head_is_absent(tmp_path, special_ids):
    write(tmp_path, special_ids, settings=small.config(tie_word_embeddings=True))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert "language_model.lm_head.weight" not in opened.keys()  # noqa: SIM118
    language_model = published.load(str(tmp_path)).model.language_model
    assert language_model.lm_head.weight is language_model.model.embed_tokens.weight


def test_writing_holds_the_block_and_no_model(tmp_path, special_ids, monkeypatch):
    monkeypatch.setattr(random_weights, "BLOCK", 997)
    settings = small.config(num_hidden_layers=24)
    with LiveBytes() as counted:
        total = write(tmp_path, special_ids, settings=settings)
    drawn = 997 * (4 + 2)  # in fp32, then in bf16; later two copies of a piece
    made = 512 * 32 * 4  # the largest tensor of the model, before it goes to the meta device
    assert counted.peak <= drawn + made + 10_000 < total / 4  # 10,000: rotary frequencies


@pytest.fixture
def qwen_ids():
    vocabulary = small_qwen.tokenizer().get_vocab()
    tokens = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *small_qwen._VISION, "[SEG]")
    return {token: vocabulary[token] for token in tokens}


@pytest.mark.parametrize("family", small_qwen.FAMILIES)
def test_a_random_qwen_directory_loads_asks_and_trains(family, tmp_path, qwen_ids):
    """Tokenizer, chat template and processor are there: a run of two epochs changes the loss and stays finite."""
    total = write(tmp_path / "model", qwen_ids, settings=small_qwen.config(family))
    loaded = published.load(str(tmp_path / "model"), dtype=torch.float32)
    assert sum(tensor.numel() * 2 for tensor in weights.published_state(loaded.model).values()) == total
    image = loaded.preprocess.vision_input(small_qwen.images(1)[0])
    prompt = loaded.preprocess.prompt([small.QUESTION], [image.layout])
    ids_L = prompt.input_ids_BL[0].tolist()
    assert ids_L.count(qwen_ids["<|image_pad|>"]) == image.layout[1] * image.layout[2]
    assert ids_L.count(qwen_ids["<|vision_start|>"]) == ids_L.count(qwen_ids["<|vision_end|>"]) == 1
    assert ids_L.count(qwen_ids["<|im_start|>"]) == (3 if family == "qwen2_5_vl" else 2)  # Qwen3-VL has no system turn
    small_runs.write_images(tmp_path / "data")
    (tmp_path / "val.txt").write_text("v1\nv4\n")
    result = train(small_runs.settings(tmp_path, tmp_path / "runs"))
    first, last = small_runs.values(result, "train", "loss")
    assert math.isfinite(first) and math.isfinite(last) and first != last


@pytest.mark.parametrize("name", ["qwen2_5vl-3b", "qwen3vl-4b"])
def test_a_directory_of_a_published_qwen_shape_has_all_its_parameters(name, tmp_path, monkeypatch):
    """The model's stated ones, a head of its own, SAM2 and the two layers before it; only the bytes are left out."""
    monkeypatch.setattr(random_weights, "_write_shard", lambda *_: None)
    shape = shapes.named(name)
    total = random_weights.write(shape, tmp_path)
    text = shape.config["text_config"]
    width = text["hidden_size"]
    expected = STATED_QWEN[name] * 1e9 + width * text["vocab_size"] + SAM2_PARAMETERS + width * (width + 256)
    assert total / 2 == pytest.approx(expected, rel=0.005)
    preprocess = published.make_preprocess(shape.config, published_tokenizer.read(tmp_path), tmp_path)
    assert preprocess.image_token_id == shape.config["image_token_id"]
