"""Protects the Qwen-VL families' directories: both layouts of names and of config.json, adapters, export, mistakes."""

import json
import shutil

import pytest
import small_qwen as small
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sft.config import TrainConfig, UserError
from sft.model import key_map, lora, published, published_qwen
from sft.model.export import export

FILE = "model.safetensors"
EVERYWHERE = {
    "lora_rank": 4,
    "lora_alpha": 12,
    "lora_scope": ("language_model", "sam2_encoder"),
    "train_modules": ("text_hidden_fcs",),
}


@pytest.fixture(params=small.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def directory(tmp_path, family):
    """A small published directory of the test's own."""
    small.write(tmp_path / "model", family)
    return tmp_path / "model"


def edit_config(directory, change) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def refused(directory) -> str:
    with pytest.raises(UserError) as caught:
        published.load(str(directory))
    return str(caught.value)


def states_equal(ours, theirs) -> bool:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def logits_of(loaded, family) -> torch.Tensor:
    """Mask candidates and text logits of two images."""
    model = loaded.model
    vision, layouts, features = small.inputs(model, family, 2)
    prompt = loaded.preprocess.prompt([small.QUESTION, small.LONGER], layouts, with_labels=True)
    with torch.no_grad():
        masks = model(prompt, vision, features).masks.candidate_logits_BKhw
        return torch.cat([masks.flatten(), model.head(model.hidden_states(prompt, vision).normed_BLC).flatten()])


# In and out


@pytest.mark.parametrize("old", [False, True], ids=["4.57", "4.49"])
def test_both_layouts_of_names_load_and_save_gives_the_newer(tmp_path, family, old):
    written = small.write(tmp_path / "model", family)
    before = (tmp_path / "model" / FILE).read_bytes()
    names = set(load_file(tmp_path / "model" / FILE))
    assert {name.split(".")[2] for name in names if name.startswith("model.model.")} == {"visual", "language_model"}
    if old:
        small.rename_to_old_layout(tmp_path / "model")
        names = set(load_file(tmp_path / "model" / FILE))
        assert "model.visual.patch_embed.proj.weight" in names and "model.model.norm.weight" in names
        assert "model.model.layers.0.mlp.up_proj.weight" in names and "model.lm_head.weight" in names
    loaded = published.load(str(tmp_path / "model"), dtype=torch.float32)
    assert states_equal(loaded.model, written)
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    published.save(tmp_path / "again", loaded.model, settings, loaded.preprocess.tokenizer, dtype=torch.float32)
    assert (tmp_path / "again" / FILE).read_bytes() == before
    for name in ("config.json", "preprocessor_config.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_tied_embeddings_are_one_tensor_in_memory_and_in_the_file(tmp_path, family):
    settings = small.config(family, tied=True)
    written = small.write(tmp_path, family, settings)
    names = set(load_file(tmp_path / FILE))
    assert "model.lm_head.weight" not in names and "model.model.language_model.embed_tokens.weight" in names
    loaded = published.load(str(tmp_path), dtype=torch.float32)
    assert loaded.model.head.weight is loaded.model.decoder.embed_tokens.weight
    assert torch.equal(loaded.model.head.weight, written.decoder.embed_tokens.weight)
    assert torch.equal(logits_of(loaded, family), logits_of(published.Loaded(written, loaded.preprocess, None), family))
    tensors = load_file(tmp_path / FILE) | {"model.lm_head.weight": torch.full((96, 32), 7.0)}
    save_file(tensors, tmp_path / FILE)  # a copy in the file counts as little as it does for transformers
    again = published.load(str(tmp_path), dtype=torch.float32)
    assert torch.equal(again.model.head.weight, written.decoder.embed_tokens.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_of_every_precision_load_in_the_one_that_is_asked_for(tmp_path, family, dtype):
    small.write(tmp_path, family, dtype=dtype)
    model = published.load(str(tmp_path), dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    frequencies = {name: buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name}
    assert frequencies and set(frequencies.values()) == {torch.float32}


def test_missing_and_left_over_tensors_are_listed(directory):
    tensors = load_file(directory / FILE)
    del tensors["model.model.visual.blocks.0.attn.qkv.weight"]
    tensors["model.model.language_model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, directory / FILE)
    line = refused(directory)
    assert "1 missing (model.model.visual.blocks.0.attn.qkv.weight)" in line
    assert "1 left over (model.model.language_model.layers.7.mlp.up_proj.weight)" in line


def test_the_older_layout_is_listed_in_its_own_names(directory):
    """What is missing from a file, or too much, is called as the file calls the rest."""
    small.rename_to_old_layout(directory)
    tensors = load_file(directory / FILE)
    del tensors["model.visual.blocks.0.attn.qkv.weight"], tensors["model.model.layers.1.mlp.up_proj.weight"]
    tensors["model.model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    tensors["model.model.norm.weight"] = torch.zeros(31)
    save_file(tensors, directory / FILE)
    line = refused(directory)
    missing = "model.model.layers.1.mlp.up_proj.weight, model.visual.blocks.0.attn.qkv.weight"
    assert f"2 missing ({missing})" in line
    assert "1 left over (model.model.layers.7.mlp.up_proj.weight)" in line
    assert "1 of another shape (model.model.norm.weight: [31] in the file, [32] by config.json)" in line


def test_a_tensor_in_both_layouts_is_left_over_once(directory):
    """The second of two names of one place does not overwrite the first."""
    tensors = load_file(directory / FILE)
    tensors["model.model.norm.weight"] = torch.zeros(32)
    save_file(tensors, directory / FILE)
    assert "1 left over (model.model." in refused(directory)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.visual.blocks.3.attn.qkv.bias", "model.model.visual.blocks.3.attn.qkv.bias"),
        ("model.model.layers.1.mlp.up_proj", "model.model.language_model.layers.1.mlp.up_proj"),
        ("model.model.embed_tokens.weight", "model.model.language_model.embed_tokens.weight"),
        ("model.model.norm.weight", "model.model.language_model.norm.weight"),
        ("model.lm_head.weight", "model.lm_head.weight"),
        ("model.model.visual.merger.norm.weight", "model.model.visual.merger.norm.weight"),
        ("model.model.language_model.norm.weight", "model.model.language_model.norm.weight"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
        ("vision_model.embeddings.class_embedding", "vision_model.embeddings.class_embedding"),
    ],
)
def test_names_by_hand(old, new):
    assert key_map.newer_layout(old) == key_map.newer_layout(new) == new
    if not new.startswith("vision_model"):
        assert key_map.native_name(old) == new and key_map.published_name(new) == new


# config.json


def test_a_flat_config_of_old_builds_the_same_model(tmp_path):
    small.write(tmp_path, "qwen2_5_vl")
    nested = published.load(str(tmp_path), dtype=torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(small.config("qwen2_5_vl", flat=True)))
    flat = published.load(str(tmp_path), dtype=torch.float32)
    text = flat.model.decoder.config
    assert (text.hidden_size, text.num_hidden_layers, text.intermediate_size) == (32, 3, 48)
    assert torch.equal(logits_of(flat, "qwen2_5_vl"), logits_of(nested, "qwen2_5_vl"))


def test_the_kind_is_told_by_names_or_by_settings_of_its_own(tmp_path, family):
    config = small.config(family)
    assert published_qwen.family(config, tmp_path) == family
    del config["text_config"]["model_type"]
    assert published_qwen.family(config, tmp_path) == family
    del config["vision_config"]["model_type"]
    assert published_qwen.family(config, tmp_path) == family
    config["vision_config"] = {"depth": 3}
    with pytest.raises(UserError, match="no kind that they name; supported: qwen2_5_vl, qwen3_vl"):
        published_qwen.family(config, tmp_path)
    config["text_config"]["model_type"] = "qwen3_vl_moe_text"
    with pytest.raises(UserError, match="mixture of experts"):
        published_qwen.family(config, tmp_path)


@pytest.mark.parametrize(("kind", "base"), [("qwen2_5_vl", 1e6), ("qwen3_vl", 5e6)])
def test_a_rotary_base_that_is_left_out_is_the_one_of_the_published_code(tmp_path, kind, base):
    """Newer versions of transformers have another default for Qwen3-VL: every position would be turned too far."""
    config = small.config(kind)
    del config["text_config"]["rope_theta"]
    before = json.dumps(config)
    frequencies = small.build(kind, config).decoder.rotary_emb.inv_freq
    torch.testing.assert_close(frequencies, base ** (-torch.arange(0, 8, 2) / 8))
    assert json.dumps(config) == before  # nothing is written into what was given
    torch.testing.assert_close(small.model(kind).decoder.rotary_emb.inv_freq, 1e4 ** (-torch.arange(0, 8, 2) / 8))


@pytest.mark.parametrize(
    ("top", "text", "tied"), [(True, None, True), (False, None, False), (None, True, True), (True, False, False)]
)
def test_the_text_decoders_word_on_tying_counts(tmp_path, family, top, text, tied):
    config = small.config(family)
    for place, value in ((config, top), (config["text_config"], text)):
        place.pop("tie_word_embeddings")
        place.update({} if value is None else {"tie_word_embeddings": value})
    model = published.build(config, config["image_token_id"], tmp_path)
    assert (model.tied_head == "model.lm_head.weight") is tied


# Mistakes


def test_directories_that_lack_a_file(directory):
    (directory / "chat_template.jinja").rename(directory / "template")
    assert "no chat template (chat_template.json, chat_template.jinja" in refused(directory)
    (directory / "template").rename(directory / "chat_template.jinja")
    (directory / "preprocessor_config.json").rename(directory / "processor")
    assert "preprocessor_config.json: no such file; copy" in refused(directory)
    (directory / "preprocessor_config.json").write_text('{"patch_size": 14, "merge_size": 2}')
    assert "preprocessor_config.json: lacks temporal_patch_size, image_mean, image_std" in refused(directory)
    (directory / "preprocessor_config.json").unlink()
    inner = json.loads((directory / "processor").read_text())
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": inner}))  # as transformers 5 does
    assert published.load(str(directory)).preprocess.patch_px == inner["patch_size"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(image_token_id=3), "image_token_id is 3, the tokenizer's <|image_pad|> is 5"),
        (lambda c: c["text_config"].update(vocab_size=8), "beyond the 8 words of config.json"),
        (lambda c: c["text_config"].update(hidden_size="32"), "config.json: not valid"),
        (lambda c: c["text_config"].update(num_hidden_layers=4), "missing (model.model.language_model.layers.3."),
        (lambda c: c["vision_config"].update(depth=2), "left over (model.model.visual.blocks.2."),
        (lambda c: c.pop("vision_config"), "is not supported yet; supported: Sa2VAChatModel "),
    ],
)
def test_a_config_with_wrong_entries(directory, change, says):
    edit_config(directory, change)
    assert says in refused(directory)


# Adapters and export


@pytest.mark.parametrize("old", [False, True], ids=["4.57", "4.49"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_directory_computes_what_base_and_adapter_compute(tmp_path, family, old, tied):
    base, checkpoint = tmp_path / "base", tmp_path / "checkpoint"
    small.write(base, family, small.config(family, tied=tied))
    if old:
        small.rename_to_old_layout(base)
    loaded = published.load(str(base), dtype=torch.float32)
    plain = logits_of(loaded, family)
    peft_model = lora.wrap(loaded.model, TrainConfig(model_path=str(base), **EVERYWHERE)).eval()
    trainable = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tuned = logits_of(loaded, family)
    assert (tuned - plain).abs().max() > 0.05 * plain.abs().max()
    checkpoint.mkdir()
    lora.save_adapter(checkpoint, peft_model, {name: p.detach() for name, p in trainable.items()}, "safetensors")
    keys = load_file(checkpoint / "adapter_model.safetensors")
    assert "base_model.model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    written = export(base, checkpoint, tmp_path / "merged")
    assert written.merged == 21 + 24 and written.replaced == 4
    with (
        safe_open(base / FILE, framework="pt") as before,
        safe_open(tmp_path / "merged" / FILE, framework="pt") as after,
    ):
        assert list(before.keys()) == list(after.keys())
    for path in base.iterdir():
        if path.name != FILE:
            assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()
    merged = logits_of(published.load(str(tmp_path / "merged"), dtype=torch.float32), family)
    assert (merged - tuned).abs().max() <= 1e-4 * tuned.abs().max()


def test_an_adapter_returns_to_a_base_of_the_other_layout(tmp_path, family):
    """Adapters name module paths of the newer layout, whichever the base's file has."""
    small.write(tmp_path / "base", family)
    shutil.copytree(tmp_path / "base", tmp_path / "old")
    small.rename_to_old_layout(tmp_path / "old")
    config = TrainConfig(**EVERYWHERE)
    first = lora.wrap(published.load(str(tmp_path / "base"), dtype=torch.float32).model, config)
    trainable = {name: p.detach() + 0.1 for name, p in first.named_parameters() if p.requires_grad}
    lora.save_adapter(tmp_path, first, trainable, "safetensors")
    second = lora.wrap(published.load(str(tmp_path / "old"), dtype=torch.float32).model, config)
    lora.load_adapter(second, tmp_path)
    found = {name: p for name, p in second.named_parameters() if p.requires_grad}
    assert found.keys() == trainable.keys() and all(torch.equal(found[name], trainable[name]) for name in found)
