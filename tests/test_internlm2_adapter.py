"""Protects the adapter of an InternLM2 run: as LoRA of the published linears it is the same update."""

import itertools
import json
import re

import pytest
import small_sa2va as small
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_lora import Published

from sft.config import TrainConfig, UserError
from sft.model import internlm2, key_map, lora, published
from sft.model.export import export

SETTINGS = small.config("InternLM2ForCausalLM", bias=False)
PARTS = ("q_proj", "k_proj", "v_proj")
OTHERS = {"o_proj": "attention.wo", "gate_proj": "feed_forward.w1", "up_proj": "feed_forward.w3"}
OTHERS |= {"down_proj": "feed_forward.w2"}
SUBSETS = [parts for count in (1, 2, 3) for parts in itertools.combinations(PARTS, count)]
TARGETS = [*SUBSETS, ("o_proj", "down_proj"), (*PARTS, *OTHERS), ("v_proj", "up_proj", "q_proj", "gate_proj")]


def settings(targets, **others) -> TrainConfig:
    chosen = {"lora_rank": 3, "lora_alpha": 7, "lora_dropout": 0.0} | others
    return TrainConfig(lora_target_modules=targets, **chosen)


def trained(chosen: TrainConfig):
    """A native model with LoRA of random A and B."""
    peft_model = lora.wrap(small.build(SETTINGS), chosen).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter) + (".lora_A." in name))
    return peft_model


def trainable_of(peft_model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in peft_model.named_parameters() if p.requires_grad}


def saved(peft_model, directory):
    lora.save_adapter(directory, peft_model, trainable_of(peft_model), "safetensors")
    return directory


def updates_of(peft_model, heads) -> dict[str, torch.Tensor]:
    """What LoRA adds to each published weight: Llama's updates, put together by rows that are spelled out here."""
    modules = dict(peft_model.base_model.model.named_modules())
    found: dict[str, torch.Tensor] = {}
    for name in peft_model.base_model.targeted_module_names:
        update = modules[name].get_delta_weight("default")
        layer, _, linear = re.fullmatch(r"(.*layers\.\d+\.)(self_attn|mlp)\.(\w+)", name).groups()
        if linear in OTHERS:
            found[layer + OTHERS[linear]] = update
            continue
        whole = found.setdefault(f"{layer}attention.wqkv", torch.zeros(heads.rows, update.shape[1]))
        groups = whole.view(heads.key_value_heads, heads.queries_per_group + 2, heads.head_dim, -1)
        by_head = update.view(-1, heads.head_dim, update.shape[1])
        for head, rows in enumerate(by_head):
            match linear:
                case "q_proj":
                    groups[head // heads.queries_per_group, head % heads.queries_per_group] = rows
                case "k_proj":
                    groups[head, -2] = rows
                case "v_proj":
                    groups[head, -1] = rows
    return found


@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
def test_peft_computes_the_same_update_on_the_published_tree(tmp_path, recwarn, targets):
    peft_model = trained(settings(targets))
    saved(peft_model, tmp_path)
    heads = internlm2.heads_of(peft_model.get_base_model().decoder.config)
    tree = Published(key_map.to_published(small.build(SETTINGS).state_dict(), heads))
    original = PeftModel.from_pretrained(tree, tmp_path)
    assert not [warning for warning in recwarn if "missing" in str(warning.message).lower()]
    expected, theirs = updates_of(peft_model, heads), dict(original.base_model.model.named_modules())
    assert set(original.base_model.targeted_module_names) == set(expected)
    for path, update in expected.items():
        there = theirs[path].get_delta_weight("default")
        assert update.abs().max() > 0.1
        torch.testing.assert_close(there, update, atol=1e-6 * update.abs().max().item(), rtol=0)
        count = len(set(targets) & set(PARTS)) if path.endswith("wqkv") else 1
        assert theirs[path].r["default"] == 3 * count and theirs[path].scaling["default"] == 7 / 3


@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
def test_the_adapter_returns_bit_by_bit(tmp_path, targets):
    chosen = settings(targets)
    peft_model = trained(chosen)
    fresh = lora.wrap(small.build(SETTINGS), chosen).eval()
    lora.load_adapter(fresh, saved(peft_model, tmp_path))
    before, after = trainable_of(peft_model), trainable_of(fresh)
    assert set(before) == set(after) and [name for name in before if not torch.equal(before[name], after[name])] == []


def test_files_hold_published_names_alone(tmp_path):
    saved(trained(settings((*PARTS, *OTHERS))), tmp_path)
    layer = "base_model.model.language_model.model.layers.0."
    names = {name for name in lora.read_adapter(tmp_path) if name.startswith(layer)}
    linears = ("attention.wqkv", *OTHERS.values())
    assert names == {f"{layer}{linear}.lora_{side}.weight" for linear in linears for side in "AB"}
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not re.search("_proj|self_attn|mlp", written["target_modules"])
    fused = r"language_model\.model\.layers\.\d+\.attention\.wqkv"
    assert (written["rank_pattern"], written["alpha_pattern"]) == ({fused: 9}, {fused: 21})


@pytest.mark.parametrize("targets", [(*PARTS, *OTHERS), ("q_proj", "v_proj")], ids="+".join)
def test_merged_directory_computes_what_base_and_adapter_compute(tmp_path, targets):
    small.write(tmp_path / "base", SETTINGS)
    chosen = settings(targets, model_path=str(tmp_path / "base"))
    peft_model = trained(chosen)
    (tmp_path / "run").mkdir()
    written = export(tmp_path / "base", saved(peft_model, tmp_path / "run"), tmp_path / "merged")
    fused = bool(set(targets) & set(PARTS))
    assert written.merged == 2 * (fused + len(set(targets) - set(PARTS)))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    heads = internlm2.heads_of(peft_model.get_base_model().decoder.config)
    for path, update in updates_of(peft_model, heads).items():
        torch.testing.assert_close(after[f"{path}.weight"] - before[f"{path}.weight"], update, atol=1e-5, rtol=1e-5)
    tokens, tile_counts, features = small.inputs(small.build(SETTINGS), 1)
    prompt = small.preprocess().prompt([small.QUESTION], tile_counts)
    merged = published.load(str(tmp_path / "merged"), dtype=torch.float32).model
    with torch.no_grad():
        ours, theirs = (one(prompt, tokens, features).masks.logits_Bhw for one in (peft_model, merged))
    assert (ours - theirs).abs().max() <= 1e-4 * ours.abs().max()


def test_an_adapter_of_other_targets_or_trained_elsewhere_is_refused(tmp_path):
    directory = saved(trained(settings(PARTS)), tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: the LoRA of .*attention.wqkv is no LoRA of q_proj, v_proj;"):
        lora.load_adapter(lora.wrap(small.build(SETTINGS), settings(("q_proj", "v_proj"))), directory)
    with pytest.raises(UserError, match="the adapter does not fit these settings.*4 of another shape"):
        lora.load_adapter(lora.wrap(small.build(SETTINGS), settings(("o_proj",), lora_rank=2)), saved_o(tmp_path))


def saved_o(tmp_path):
    directory = tmp_path / "o"
    directory.mkdir()
    return saved(trained(settings(("o_proj",))), directory)


def test_the_log_says_how_it_is_saved():
    chosen = settings(PARTS)
    lines = lora.describe(lora.wrap(small.build(SETTINGS), chosen), chosen)
    assert "q_proj, k_proj and v_proj as one LoRA of attention.wqkv" in lines[1]


def test_phi3_takes_the_usual_target_names_and_says_so(tmp_path):
    phi3 = small.config("Phi3ForCausalLM")
    chosen = TrainConfig(lora_rank=2)
    peft_model = lora.wrap(small.build(phi3), chosen)
    lines = lora.describe(peft_model, chosen)
    assert lines[0] == "LoRA on language_model: 8 linears (down_proj x2, gate_up_proj x2, o_proj x2, qkv_proj x2)"
    assert lines[1].endswith("are qkv_proj, o_proj, gate_up_proj, down_proj in this language model")
    saved(peft_model, tmp_path)
    original = PeftModel.from_pretrained(Published(key_map.to_published(small.build(phi3).state_dict())), tmp_path)
    assert set(original.base_model.targeted_module_names) == set(peft_model.base_model.targeted_module_names)
    with pytest.raises(UserError, match="nonsense is no linear layer of this language model; it has down_proj, ga"):
        lora.wrap(small.build(phi3), settings(("nonsense",)))
