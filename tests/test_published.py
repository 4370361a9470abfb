"""Protects the published directory format: what is written comes back bit by bit, every misfit is one clear line."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import small_sa2va as small
import torch
from safetensors.torch import load_file, save_file

from sft.config import TrainConfig, UserError
from sft.model import lora, published
from sft.model.preprocess import TEMPLATES
from sft.model.sa2va import Prompt, VisionFeatures
from sft.model.tiny import TINY_CONFIG

HEAD = "language_model.lm_head.weight"
# What old transformers wrote into llm_config beside the sizes; "flash_attention_2" is not installed here.
LEGACY = {
    "_attn_implementation_autoset": True,
    "_name_or_path": "Qwen/Qwen2.5-3B-Instruct",
    "add_cross_attention": False,
    "attn_implementation": "flash_attention_2",
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "max_length": 20,
    "num_beams": 1,
    "output_hidden_states": False,
    "pruned_heads": {},
    "return_dict": True,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "temperature": 1.0,
    "torch_dtype": "bfloat16",
    "torchscript": False,
    "transformers_version": "4.44.0",
    "use_cache": False,
    "use_sliding_window": False,
}


@pytest.fixture
def directory(tmp_path) -> Path:
    """A small published directory of the test's own."""
    small.write(tmp_path / "model")
    return tmp_path / "model"


def edit_config(directory: Path, change) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def edit_weights(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def shard(directory: Path) -> None:
    """One file -> three shards and their index, as large checkpoints are published."""
    tensors = load_file(directory / "model.safetensors")
    weight_map = {}
    for number in range(3):
        name = f"model-{number + 1:05d}-of-00003.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::3]}
        save_file(part, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()


def states_equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def refused(directory: Path) -> str:
    """The one line with which loading fails."""
    with pytest.raises(UserError) as caught:
        published.load(str(directory))
    line = str(caught.value)
    assert "\n" not in line and str(directory) in line
    return line


def test_what_is_written_comes_back_bit_by_bit_with_config_and_tokenizer(tmp_path):
    written = small.write(tmp_path)
    loaded = published.load(str(tmp_path), dtype=torch.float32)
    assert states_equal(loaded.model, written)
    assert json.loads((tmp_path / "config.json").read_text()) == small.config()
    assert loaded.preprocess.tokenizer.get_vocab() == small.tokenizer().get_vocab()
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    again = tmp_path / "again"
    published.save(again, loaded.model, small.config(), loaded.preprocess.tokenizer, dtype=torch.float32)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    tokens, layouts, features = small.inputs(written, 2)
    prompt = loaded.preprocess.prompt([small.QUESTION, small.LONGER], layouts)
    with torch.no_grad():
        assert torch.equal(
            loaded.model(prompt, tokens, features).masks.logits_Bhw, written(prompt, tokens, features).masks.logits_Bhw
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_of_any_precision_are_read_in_the_precision_asked_for(tmp_path, dtype):
    written = small.write(tmp_path, dtype=dtype)
    for wanted in (torch.float32, torch.bfloat16):
        state = published.load(str(tmp_path), dtype=wanted).model.state_dict()
        assert {tensor.dtype for tensor in state.values()} == {wanted}
        for name, tensor in written.state_dict().items():
            assert torch.equal(state[name], tensor.to(dtype).to(wanted)), name


def test_shards_are_read_through_their_index_in_any_order(directory):
    shard(directory)
    assert states_equal(published.load(str(directory), dtype=torch.float32).model, small.build())
    index = directory / "model.safetensors.index.json"
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors; download" in refused(directory)
    index.write_text("{")
    assert f"{index}: not valid JSON" in refused(directory)
    index.write_text("{}")
    assert f"{index}: has no weight_map" in refused(directory)


@pytest.mark.parametrize("in_file", [False, True])
def test_tied_embeddings_are_tied_with_and_without_a_head_in_the_file(tmp_path, in_file):
    settings = small.config(tie_word_embeddings=True)
    written = small.write(tmp_path, settings)
    assert HEAD not in load_file(tmp_path / "model.safetensors")
    if in_file:
        edit_weights(tmp_path, lambda tensors: tensors.update({HEAD: torch.zeros(512, 32)}))
    model = published.load(str(tmp_path), dtype=torch.float32).model
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight
    assert states_equal(model, written)
    tokens, layouts, features = small.inputs(model, 1)
    prompt = small.preprocess().prompt([small.QUESTION], layouts, with_labels=True)
    assert torch.equal(model(prompt, tokens, features).text_loss, written(prompt, tokens, features).text_loss)


def test_untied_embeddings_need_their_head(directory):
    edit_weights(directory, lambda tensors: tensors.pop(HEAD))
    assert f"1 missing ({HEAD})" in refused(directory)


@pytest.mark.parametrize("architecture", small.LANGUAGE_MODELS)
def test_every_language_model_builds_saves_loads_and_takes_a_training_step(tmp_path, architecture):
    settings = small.config(architecture, num_hidden_layers=1)
    written = small.write(tmp_path, settings)
    loaded = published.load(str(tmp_path), dtype=torch.float32)
    built = {"InternLM2ForCausalLM": "LlamaForCausalLM"}.get(architecture, architecture)
    assert type(loaded.model.language_model).__name__ == built and states_equal(loaded.model, written)
    config = TrainConfig(lora_rank=2, lora_dropout=0.0)
    peft_model = lora.wrap(loaded.model, config)
    linears = 4 if architecture == "Phi3ForCausalLM" else 7
    assert lora.describe(peft_model, config)[0].startswith(f"LoRA on language_model: {linears} linears")
    check = lora.GradientCheck(peft_model)
    tokens, layouts, features = small.inputs(written, 2)
    prompt = loaded.preprocess.prompt([small.QUESTION] * 2, layouts, with_labels=True)
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(2):
        output = peft_model(prompt, tokens, features)
        loss = output.masks.logits_Bhw.mean() + output.text_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 0:
            assert check.problems(peft_model) == []
    assert losses[1] < losses[0]


def test_published_settings_about_how_to_run_do_not_reach_the_model(tmp_path):
    small.write(tmp_path, small.config(**LEGACY))
    model = published.load(str(tmp_path), dtype=torch.float32).model
    frequencies = model.language_model.model.rotary_emb.inv_freq
    torch.testing.assert_close(frequencies, 1e6 ** (-torch.arange(0, 8, 2) / 8))  # rope_theta is no mere default
    assert model.language_model.config._attn_implementation == "sdpa"
    ids = torch.tensor([[1, 2, 3]])
    question, vision = Prompt(ids, torch.tensor([0])), VisionFeatures(torch.zeros(0, 32))
    assert model.generate(question, vision, [0], 3).shape[1] <= 3  # max_length 20 and use_cache false stand


def test_rotary_frequencies_of_llama3_are_scaled(tmp_path):
    scaling = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
    scaling["original_max_position_embeddings"] = 64
    small.write(tmp_path, small.config("LlamaForCausalLM", rope_theta=500000.0, rope_scaling=scaling))
    frequencies = published.load(str(tmp_path), dtype=torch.float32).model.language_model.model.rotary_emb.inv_freq
    plain = 500000.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(frequencies[[0, 3]], torch.stack([plain[0], plain[3] / 8]))


def test_published_defaults_hold_where_the_file_is_silent():
    vision = published._vision_config({}, Path("config.json"))  # InternViT-6B's, as in the published class
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (3200, 48, 25)
    assert (vision.norm_type, vision.attention_bias, vision.use_qk_norm) == ("rms_norm", False, True)
    sam2 = published._sam2_config({})
    assert sam2.prompt_encoder_config.image_size == 1024 and sam2.mask_decoder_config.hidden_size == 256
    assert sam2.vision_config.backbone_config.blocks_per_stage == [2, 6, 36, 4]
    settings = small.config()
    del settings["native"]
    preprocess = published.make_preprocess(settings, small.tokenizer(), Path("x"))
    assert (preprocess.max_tiles, preprocess.use_thumbnail, preprocess.sam2_px) == (12, True, 1024)


def test_video_memory_in_the_file_is_passed_over(directory):
    extra = {"memory_attention.norm.weight": torch.zeros(3), "maskmem_tpos_enc": torch.zeros(7, 1, 1, 64)}
    prefixed = {f"grounding_encoder.sam2_model.{name}": tensor for name, tensor in extra.items()}
    edit_weights(directory, lambda tensors: tensors.update(prefixed))
    assert states_equal(published.load(str(directory), dtype=torch.float32).model, small.build())


def test_missing_left_over_and_misshapen_tensors_are_listed_by_their_published_names(directory):
    removed = "grounding_encoder.sam2_model.sam_mask_decoder.iou_token.weight"
    changed = "vision_model.encoder.layers.1.norm1.bias"

    def change(tensors):
        del tensors[removed]
        tensors["language_model.model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
        tensors[changed] = torch.zeros(31)

    edit_weights(directory, change)
    line = refused(directory)
    assert f"1 missing ({removed})" in line
    assert "1 left over (language_model.model.layers.7.mlp.up_proj.weight)" in line
    assert f"1 of another shape ({changed}: [31] in the file, [32] by config.json)" in line


def test_long_lists_are_cut(directory):
    edit_config(directory, lambda config: config["llm_config"].update(num_hidden_layers=3))
    line = refused(directory)
    assert "12 missing (" in line and "and 6 more)" in line and len(line) < 1000


@pytest.mark.parametrize("rows", [(0, 1, 3), (0, 1, 2, 3, 4)])
def test_a_missing_or_surplus_point_embedding_is_a_misfit(directory, rows):
    name = "grounding_encoder.sam2_model.sam_prompt_encoder.point_embeddings.{}.weight"

    def change(tensors):
        for row in range(5):
            tensors.pop(name.format(row), None)
            if row in rows:
                tensors[name.format(row)] = torch.zeros(1, 32)

    edit_weights(directory, change)
    what = f"1 missing ({name.format(2)})" if 2 not in rows else f"1 left over ({name.format(4)})"
    assert refused(directory).endswith(f"do not fit config.json: {what}; check the download")


def test_a_fused_qkv_of_another_size_is_a_misfit(directory):
    name = "vision_model.encoder.layers.0.attn.qkv.bias"
    edit_weights(directory, lambda tensors: tensors.update({name: torch.zeros(4)}))
    assert f"1 of another shape ({name}: [4] in the file, [96] by config.json)" in refused(directory)


SPLIT = {
    "vision_model.encoder.layers.1.attn.qkv.weight": [96, 32],
    "grounding_encoder.sam2_model.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": [2, 16],
    "grounding_encoder.sam2_model.sam_prompt_encoder.point_embeddings.3.weight": [1, 32],
    "grounding_encoder.sam2_model.no_mem_embed": [1, 1, 32],
    "language_model.model.layers.1.attention.wqkv.weight": [64, 32],
    "language_model.model.tok_embeddings.weight": None,
}


@pytest.mark.parametrize(("name", "shape"), SPLIT.items())
def test_a_tensor_that_is_split_or_renamed_on_the_way_is_listed_as_it_is_in_the_file(tmp_path, name, shape):
    """Once, by its published name, with the shapes before it is split: missing, too long, left over."""
    small.write(tmp_path, small.config("InternLM2ForCausalLM"))
    whole = load_file(tmp_path / "model.safetensors")
    shape = shape or list(whole[name].shape)
    edit_weights(tmp_path, lambda tensors: tensors.pop(name))
    assert f"config.json: 1 missing ({name}); check" in refused(tmp_path)
    longer = torch.zeros(shape[0] + 1, *shape[1:])
    edit_weights(tmp_path, lambda tensors: tensors.update({name: longer}))
    expected = f"1 of another shape ({name}: {list(longer.shape)} in the file, {shape} by config.json); check"
    assert f"config.json: {expected}" in refused(tmp_path)
    surplus = name.replace(".1.", ".7.") if ".1." in name else f"{name}.weights"
    edit_weights(tmp_path, lambda tensors: tensors.update({name: whole[name], surplus: whole[name].clone()}))
    assert f"config.json: 1 left over ({surplus}); check" in refused(tmp_path)


def test_a_directory_that_is_not_there_or_holds_something_else(tmp_path):
    assert "no such directory" in refused(tmp_path / "absent")
    assert "no config.json in it (found nothing)" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("")
    assert "no config.json in it (found pytorch_model.bin)" in refused(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "config.json: not valid JSON"),
        ("[1]", "config.json: holds no settings by name"),
        ("{}", "config.json: model_type is None, expected 'sa2va_chat'"),
        ('{"model_type": "llava"}', "config.json: model_type is 'llava', expected 'sa2va_chat'"),
    ],
)
def test_a_config_that_is_not_sa2vas(directory, content, says):
    (directory / "config.json").write_text(content)
    assert says in refused(directory)


def test_a_config_that_is_no_text(directory):
    (directory / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json: not valid JSON" in refused(directory)


def test_an_unknown_qwen_vl_is_named_before_its_tokenizer_is(directory):
    qwen = {"model_type": "sa2va_chat", "architectures": ["Sa2VAChatModelQwen"], "vision_config": {"depth": 32}}
    (directory / "config.json").write_text(json.dumps(qwen))
    (directory / "tokenizer_config.json").unlink()
    assert "no kind that they name; supported: qwen2_5_vl, qwen3_vl" in refused(directory)


@pytest.mark.parametrize("name", ["GemmaForCausalLM", "MistralForCausalLM"])
def test_other_language_models_are_named_as_not_supported_yet(directory, name):
    edit_config(directory, lambda config: config["llm_config"].update(architectures=[name]))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer"}))
    assert f"config.json: language model {name} is not supported yet; supported: Qwen2" in refused(directory)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("llm_config"), "is not supported yet"),
        (lambda c: c.update(vision_config=None), "is not supported yet"),
        (lambda c: c["llm_config"].pop("architectures"), "language model none is not supported yet"),
        (lambda c: c["llm_config"].pop("hidden_size"), "of another shape"),
        (lambda c: c["llm_config"].update(hidden_size="32"), "config.json: llm_config is not valid"),
        (lambda c: c["llm_config"].update(num_attention_heads=0), "config.json: "),
        (lambda c: c["vision_config"].update(hidden_size="32"), "config.json: vision_config is not valid"),
        (lambda c: c["vision_config"].update(num_attention_heads=5), "config.json: no model can be built from it"),
        (lambda c: c["vision_config"].pop("hidden_size"), "of another shape"),
        (lambda c: c.pop("template"), "config.json: template 'None' is not supported; supported: qwen_chat"),
        (lambda c: c.update(template="vicuna"), "config.json: template 'vicuna' is not supported"),
        (lambda c: c["llm_config"].update(vocab_size=100), "beyond the 100 words of config.json; "),
    ],
)
def test_a_config_with_missing_or_wrong_entries(directory, change, says):
    edit_config(directory, change)
    assert says in refused(directory)


def test_every_published_template_is_known_with_hyphens_too():
    for name in TEMPLATES:
        settings = small.config() | {"template": name.replace("_", "-")}
        if TEMPLATES[name].end in small.tokenizer().get_vocab():
            assert published.make_preprocess(settings, small.tokenizer(), Path("x")).template == TEMPLATES[name]
        else:
            with pytest.raises(UserError, match="lacks"):
                published.make_preprocess(settings, small.tokenizer(), Path("x"))


def test_weights_that_are_missing_or_broken(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert f"{file}: unreadable safetensors file" in refused(directory)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert f"{file}: unreadable safetensors file" in refused(directory)
    file.unlink()
    (directory / "pytorch_model.bin").write_text("")
    assert "no model.safetensors and no model.safetensors.index.json" in refused(directory)


def test_tokenizers_that_are_missing_broken_or_not_sa2vas(directory):
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    vocabulary = (directory / "tokenizer.json").read_text()
    (directory / "tokenizer.json").write_text(vocabulary.replace("[SEG]", "[GONE]"))
    file.write_text(file.read_text().replace("[SEG]", "[GONE]"))
    assert "the tokenizer lacks [SEG]; this is not a Sa2VA" in refused(directory)
    (directory / "tokenizer.json").write_text("{}")
    assert "cannot be read" in refused(directory)
    (directory / "tokenizer.json").unlink()
    assert "cannot be read" in refused(directory)
    file.write_text(json.dumps(settings | {"tokenizer_class": "GemmaTokenizer"}))
    assert f"{file}: tokenizer_class 'GemmaTokenizer' is not supported yet" in refused(directory)
    file.write_text(json.dumps(settings | {"tokenizer_class": None}))
    assert f"{file}: tokenizer_class '' is not supported yet" in refused(directory)
    file.write_text("nonsense")
    assert f"{file}: not valid JSON" in refused(directory)
    file.unlink()
    assert f"{file}: no such file" in refused(directory)


def test_a_qwen_tokenizer_is_read_from_its_vocabulary_and_merges(directory):
    """The published files: byte pairs, and Sa2VA's words as added tokens."""
    for file in directory.glob("token*"):
        file.unlink()
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "[SEG]"]
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "Su", "re", "Sure"]
    (directory / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
    (directory / "merges.txt").write_text("#version: 0.2\nS u\nr e\nSu re\n")
    added = {word: len(letters) + index for index, word in enumerate(words)}
    (directory / "added_tokens.json").write_text(json.dumps(added))
    decoder = {str(index): {"content": word, "special": True} for word, index in added.items()}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder, "model_max_length": 8192}
    settings |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    preprocess = published.load(str(directory)).preprocess
    expected = ["Sure", ",", "Ġ", "[SEG]", ".", "<|im_end|>"]
    assert preprocess.tokenizer.convert_ids_to_tokens(preprocess.answer_ids()) == expected
    ids = preprocess.question_ids("Sure", (1, 2, 2))
    assert ids.count(added["<IMG_CONTEXT>"]) == 4
    for file in ("vocab.json", "merges.txt", "added_tokens.json"):
        (directory / file).unlink()
    preprocess.tokenizer.save_pretrained(directory)  # the other form: all of it in tokenizer.json
    assert published.load(str(directory)).preprocess.question_ids("Sure", (1, 2, 2)) == ids


def test_nothing_in_the_directory_is_run_and_nobody_is_asked(directory, tmp_path, monkeypatch):
    trace = tmp_path / "ran"
    hostile = f"open({str(trace)!r}, 'w').write('ran')\nraise SystemExit(3)\n"
    for name in ("modeling_sa2va_chat", "configuration_sa2va_chat", "tokenization_hostile", "sam2", "__init__"):
        (directory / f"{name}.py").write_text(hostile)
    auto_map = {
        "AutoConfig": "configuration_sa2va_chat.Sa2VAChatConfig",
        "AutoModel": "modeling_sa2va_chat.Sa2VAChatModel",
        "AutoModelForCausalLM": "modeling_sa2va_chat.Sa2VAChatModel",
    }

    def change(config):
        config["auto_map"] = auto_map
        config["llm_config"]["auto_map"] = auto_map
        config["vision_config"]["auto_map"] = auto_map

    edit_config(directory, change)
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["tokenization_hostile.Hostile", None]}}
    file.write_text(json.dumps(settings))

    def asked(*_):
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))
    published.load(str(directory))
    assert not trace.exists()
    assert not [name for name in sys.modules if "hostile" in name or "sa2va_chat" in name]


def test_embedded_means_the_shipped_directory(tmp_path, monkeypatch):
    assert published.resolve("embedded") == published.EMBEDDED
    assert json.loads((published.EMBEDDED / "config.json").read_text()) == TINY_CONFIG
    monkeypatch.setenv("HOME", str(tmp_path))
    assert published.resolve("~/model") == tmp_path / "model"
    shutil.copytree(published.EMBEDDED, tmp_path / "copy")  # it is a published directory like any other
    elsewhere, shipped = published.load(str(tmp_path / "copy")), published.load("embedded")
    assert states_equal(elsewhere.model, shipped.model)
