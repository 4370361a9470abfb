"""Protects LoRA: it sits where it was told to and nowhere else, it learns, and its files fit the published model."""

import functools
import itertools
import json
import re

import pytest
import small_sa2va as small
import torch
from peft import PeftModel
from torch import nn

from sft.config import TrainConfig, UserError
from sft.model import key_map, lora, published

ALL_TARGETS = TrainConfig().lora_target_modules
SCOPES = [
    scopes
    for count in (1, 2, 3)
    for scopes in itertools.combinations(("language_model", "mask_decoder", "sam2_encoder"), count)
]
CASES = [
    (scopes, modules)
    for scopes in SCOPES
    for modules in ((), ("text_hidden_fcs",), ("mask_decoder",), ("text_hidden_fcs", "mask_decoder"))
    if not ("mask_decoder" in scopes and "mask_decoder" in modules)
]
DECODER = "grounding_encoder.sam2_model.mask_decoder."


def config(scopes=("language_model",), modules=(), **others) -> TrainConfig:
    settings = {"lora_rank": 2, "lora_alpha": 6, "lora_dropout": 0.0} | others
    return TrainConfig(lora_scope=scopes, train_modules=modules, **settings)


def wrapped(chosen: TrainConfig):
    return lora.wrap(small.build(), chosen)


@functools.cache
def sample():
    """Prompts, vision tokens and SAM2's input images of two pictures."""
    tokens, layouts, _ = small.inputs(small.model(), 2)
    pictures = torch.stack([small.preprocess().sam2_image(picture) for picture in small.images(2)])
    return small.preprocess().prompt([small.QUESTION, small.LONGER], layouts), tokens, pictures


def step(peft_model) -> None:
    """One optimizer step, SAM2's encoder in it."""
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    masks = peft_model(*sample()).masks
    (masks.candidate_logits_BKhw.square().mean() + masks.predicted_iou_BK.mean()).backward()
    optimizer.step()


def trainable_of(peft_model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in peft_model.named_parameters() if p.requires_grad}


@torch.no_grad()
def masks_of(peft_model) -> torch.Tensor:
    return peft_model(*sample()).masks.candidate_logits_BKhw


def expected_linears(scopes, targets=ALL_TARGETS) -> set[str]:
    """What LoRA must sit on, spelled out."""
    decoder = f"{DECODER}transformer."
    attentions = [
        f"layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
    ] + ["final_attn_token_to_image"]
    in_scope = {
        "language_model": {
            f"language_model.model.layers.{layer}.{'self_attn' if target[0] in 'qkvo' else 'mlp'}.{target}"
            for layer in range(2)
            for target in targets
        },
        "mask_decoder": {f"{decoder}{name}.{part}_proj" for name in attentions for part in "qkvo"}
        | {f"{decoder}layers.{layer}.mlp.proj_{end}" for layer in (0, 1) for end in ("in", "out")},
        "sam2_encoder": {
            f"grounding_encoder.sam2_model.vision_encoder.backbone.blocks.{block}.{part}"
            for block in range(6)
            for part in ("attn.qkv", "attn.proj", "mlp.proj_in", "mlp.proj_out")
        },
    }
    return set().union(*(in_scope[scope] for scope in scopes))


@pytest.mark.parametrize("scopes", SCOPES, ids="+".join)
def test_lora_sits_on_the_linears_of_its_scopes_and_nowhere_else(scopes):
    peft_model = wrapped(config(scopes))
    assert set(peft_model.base_model.targeted_module_names) == expected_linears(scopes)
    trainable = trainable_of(peft_model)
    assert len(trainable) == 2 * len(expected_linears(scopes)) and all(".lora_" in name for name in trainable)


def test_some_targets_alone():
    targets = ("q_proj", "down_proj")
    peft_model = wrapped(config(lora_target_modules=targets))
    assert set(peft_model.base_model.targeted_module_names) == expected_linears(("language_model",), targets)


@pytest.mark.parametrize("name", ["wqkv", "q_pro", "qkv", ".*", "embed_tokens", "lm_head"])
def test_a_target_that_the_language_model_lacks_is_refused_with_those_it_has(name):
    with pytest.raises(UserError) as caught:
        wrapped(config(lora_target_modules=("q_proj", name)))
    assert f"lora_target_modules: {name} is no linear layer" in str(caught.value)
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(caught.value)


@pytest.mark.parametrize("modules", [("text_hidden_fcs",), ("mask_decoder",), ("text_hidden_fcs", "mask_decoder")])
def test_modules_trained_whole_are_trained_whole(modules):
    peft_model = wrapped(config(modules=modules))
    whole = [name for name in trainable_of(peft_model) if ".lora_" not in name]
    paths = {"text_hidden_fcs": "text_hidden_fcs", "mask_decoder": DECODER[:-1]}
    inner = small.model()
    counts = {module: len(list(inner.get_submodule(paths[module]).parameters())) for module in modules}
    assert len(whole) == sum(counts.values())
    for module in modules:
        assert len([name for name in whole if f".{paths[module]}.modules_to_save." in name]) == counts[module]


def test_describe_says_what_matched_and_counts_what_trains():
    chosen = config(("language_model", "mask_decoder"), ("text_hidden_fcs",))
    peft_model = wrapped(chosen)
    lines = lora.describe(peft_model, chosen)
    kinds = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert lines[0] == f"LoRA on language_model: 14 linears ({', '.join(f'{kind} x2' for kind in kinds)})"
    assert lines[1].startswith("LoRA on mask_decoder: 32 linears (k_proj x7, o_proj x7, proj_in x2, ")
    assert lines[2] == "Trained whole: text_hidden_fcs"
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in peft_model.parameters())
    share = f"{100 * trainable / total:.4f}"
    assert lines[3] == f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share}"


def test_an_untrained_adapter_changes_nothing_and_its_seed_decides_it():
    chosen = config(("language_model", "mask_decoder", "sam2_encoder"), ("text_hidden_fcs",))
    first, again, other = wrapped(chosen), wrapped(chosen), wrapped(config(chosen.lora_scope, seed=7))
    torch.testing.assert_close(masks_of(first.eval()), masks_of(small.model()))
    for name, value in trainable_of(first).items():
        assert torch.equal(value, trainable_of(again)[name])
        if ".lora_A." in name:
            assert not torch.equal(value, trainable_of(other)[name])
        if ".lora_B." in name:
            assert not value.any()


@pytest.mark.parametrize(("scopes", "modules"), CASES, ids=["+".join(scopes + modules) for scopes, modules in CASES])
def test_every_combination_learns_and_its_adapter_returns_bit_by_bit(tmp_path, scopes, modules):
    chosen = config(scopes, modules)
    peft_model = wrapped(chosen)
    check = lora.GradientCheck(peft_model)
    step(peft_model)
    assert check.problems(peft_model) == []
    lora.save_adapter(tmp_path, peft_model, trainable_of(peft_model), "safetensors")
    fresh = wrapped(chosen)
    assert not torch.allclose(masks_of(fresh), masks_of(peft_model), atol=1e-3)
    lora.load_adapter(fresh, tmp_path)
    assert set(trainable_of(fresh)) == set(trainable_of(peft_model))
    for name, value in trainable_of(peft_model).items():
        assert torch.equal(trainable_of(fresh)[name], value), name
    assert torch.equal(masks_of(fresh), masks_of(peft_model))


def test_gradient_check_names_a_b_that_stood_still_and_a_frozen_parameter_that_moved():
    peft_model = wrapped(config())
    check = lora.GradientCheck(peft_model)
    assert "14 LoRA B matrices got no update" in check.problems(peft_model)[0]
    step(peft_model)
    assert check.problems(peft_model) == []
    still = "base_model.model.language_model.model.layers.1.mlp.up_proj.lora_B.default.weight"
    frozen = "base_model.model.vision_model.embeddings.cls_token"
    parameters = dict(peft_model.named_parameters())
    with torch.no_grad():
        parameters[still].zero_()
        parameters[frozen][0, 0, 3] += 1e-4
    problems = check.problems(peft_model)
    assert problems == [f"1 LoRA B matrices got no update: {still}", f"1 frozen parameters moved: {frozen}"]


def test_gradient_check_sees_updates_that_cancel_and_bf16():
    peft_model = wrapped(config()).to(torch.bfloat16)
    check = lora.GradientCheck(peft_model)
    frozen = dict(peft_model.named_parameters())["base_model.model.text_hidden_fcs.0.weight"]
    with torch.no_grad():
        frozen[0, 0], frozen[0, 1] = frozen[0, 0] + 0.5, frozen[0, 1] - 0.5  # their sum stays
    assert "1 frozen parameters moved" in check.problems(peft_model)[1]


def test_bin_format_holds_the_same_and_loads_without_pickled_code(tmp_path):
    peft_model = wrapped(config(modules=("text_hidden_fcs",)))
    step(peft_model)
    for name in ("safetensors", "bin"):
        (tmp_path / name).mkdir()
        lora.save_adapter(tmp_path / name, peft_model, trainable_of(peft_model), name)
    assert sorted(path.name for path in (tmp_path / "bin").iterdir()) == ["adapter_config.json", "adapter_model.bin"]
    one, other = lora.read_adapter(tmp_path / "safetensors"), lora.read_adapter(tmp_path / "bin")
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    fresh = wrapped(config(modules=("text_hidden_fcs",)))
    lora.load_adapter(fresh, tmp_path / "bin")
    assert torch.equal(masks_of(fresh), masks_of(peft_model))


def test_an_adapter_holds_no_base_weight_and_its_settings_say_what_it_is(tmp_path, monkeypatch):
    def asked(*_):
        raise AssertionError("a question to the hub")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", asked)
    peft_model = wrapped(config(("language_model", "sam2_encoder"), ("mask_decoder",)))
    lora.save_adapter(tmp_path, peft_model, trainable_of(peft_model), "safetensors")
    names = lora.read_adapter(tmp_path)
    assert len(names) == len(trainable_of(peft_model))
    decoder = "base_model.model.grounding_encoder.sam2_model.sam_mask_decoder."
    assert all(".lora_" in name or name.startswith(decoder) for name in names)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["grounding_encoder.sam2_model.sam_mask_decoder"]
    expected = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "lora_dropout": 0.0, "bias": "none"}
    expected |= {"base_model_name_or_path": str(published.EMBEDDED), "inference_mode": True, "task_type": None}
    assert {key: settings[key] for key in expected} == expected


class Published(nn.Module):
    """A stand-in for the original model: its module tree and weights under published names, and no forward."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        for name, tensor in state.items():
            path, _, leaf = name.rpartition(".")
            owner = self
            for part in path.split("."):
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            owner.register_parameter(leaf, nn.Parameter(tensor.clone()))
        self._make_linears()

    def _make_linears(self) -> None:
        for path, module in list(self.named_modules()):
            weight = module._parameters.get("weight")
            if weight is None or weight.ndim != 2 or path.endswith(("embed", "_token", "_tokens")):
                continue
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in module._parameters)
            linear.load_state_dict({name: p.detach() for name, p in module.named_parameters()})
            parent, _, leaf = path.rpartition(".")
            self.get_submodule(parent).add_module(leaf, linear)


@pytest.mark.parametrize(
    ("scopes", "modules"),
    [
        (("language_model",), ()),
        (("language_model", "mask_decoder", "sam2_encoder"), ("text_hidden_fcs",)),
        (("language_model", "sam2_encoder"), ("text_hidden_fcs", "mask_decoder")),
    ],
)
def test_peft_puts_the_adapter_on_the_published_module_tree(tmp_path, recwarn, scopes, modules):
    peft_model = wrapped(config(scopes, modules))
    step(peft_model)
    lora.save_adapter(tmp_path, peft_model, trainable_of(peft_model), "safetensors")
    original = PeftModel.from_pretrained(Published(key_map.to_published(small.model().state_dict())), tmp_path)
    assert not [warning for warning in recwarn if "missing" in str(warning.message).lower()]
    native_paths = {key_map.published_name(name): name for name in peft_model.base_model.targeted_module_names}
    assert set(original.base_model.targeted_module_names) == set(native_paths)
    ours, theirs = dict(peft_model.base_model.model.named_modules()), dict(original.base_model.model.named_modules())
    for path, native in native_paths.items():
        update = ours[native].get_delta_weight("default")
        assert update.abs().max() > 0 and torch.equal(theirs[path].get_delta_weight("default"), update)
    for name, value in trainable_of(peft_model).items():
        if match := re.fullmatch(r"base_model\.model\.(.*)\.modules_to_save\.default\.(.*)", name):
            inner = key_map.published_name(f"{match[1]}.{match[2]}")
            path = key_map.published_name(match[1])
            copy = theirs[path].modules_to_save["default"].get_parameter(inner.removeprefix(f"{path}."))
            assert torch.equal(copy, value), name


def test_an_adapter_that_does_not_fit_is_refused_and_told_apart(tmp_path):
    lora.save_adapter(tmp_path, wrapped(config()), trainable_of(wrapped(config())), "safetensors")
    with pytest.raises(UserError) as caught:
        lora.load_adapter(wrapped(config(lora_rank=4)), tmp_path)
    assert f"{tmp_path}: the adapter does not fit" in str(caught.value) and "28 of another shape" in str(caught.value)
    with pytest.raises(UserError, match="4 tensors missing.*0 left over"):
        lora.load_adapter(wrapped(config(modules=("text_hidden_fcs",))), tmp_path)
    with pytest.raises(UserError, match="0 tensors missing.*24 left over"):
        lora.load_adapter(wrapped(config(lora_target_modules=("q_proj",))), tmp_path)


def test_an_adapter_that_is_missing_or_broken(tmp_path):
    with pytest.raises(UserError, match="no adapter_model.safetensors and no adapter_model.bin"):
        lora.read_adapter(tmp_path)
    for name, content in (
        ("adapter_model.bin", b"nonsense"),
        ("adapter_model.bin", b""),
        ("adapter_model.safetensors", b"{"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: unreadable adapter"):
            lora.read_adapter(tmp_path)
