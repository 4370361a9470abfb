"""Export: the merged directory computes what base and adapter compute, and is the base's in all else."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sft.config import TrainConfig, UserError
from sft.model import lora, published
from sft.model.export import export, export_adapter
from sft.model.sa2va import Prompt, VisionInput

WHOLE = re.compile(r"text_hidden_fcs\.|grounding_encoder\.sam2_model\.sam_mask_decoder\.")
EVERYWHERE = {
    "lora_rank": 4,
    "lora_alpha": 12,
    "lora_scope": ("language_model", "sam2_encoder"),
    "train_modules": ("text_hidden_fcs", "mask_decoder"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The embedded base with an adapter on every part that moved everywhere, and its checkpoint directory."""
    loaded = published.load("embedded", dtype=torch.float32)
    peft_model = lora.wrap(loaded.model, TrainConfig(**EVERYWHERE)).eval()
    torch.manual_seed(1)
    trainable = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp("run") / "checkpoint_best"
    directory.mkdir()
    lora.save_adapter(directory, peft_model, {name: p.detach() for name, p in trainable.items()}, "safetensors")
    (directory / "training_state.pt").write_bytes(b"not for others")
    return loaded, peft_model, directory


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The base, as fp32 so that merging rounds nothing, with files of its authors beside it; and what export made."""
    base = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(published.EMBEDDED, base)
    state = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    state["grounding_encoder.sam2_model.memory_encoder.fuser.layers.0.gamma"] = torch.ones(3)  # video only
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    (base / "modeling_sa2va_chat.py").write_text("raise SystemExit('nobody may run this')\n")
    output = base.parent / "merged"
    return base, output, export(base, trained[2], output)


def masks_of(model) -> torch.Tensor:
    torch.manual_seed(0)
    images, tiles = torch.randn(1, 3, 512, 512), torch.randn(1, 3, 224, 224)
    ids = torch.tensor([[2, 8, 7, *[6] * 64, 20, 25, 194]])
    prompt = Prompt(ids, torch.tensor([ids.shape[1] - 1]))
    with torch.no_grad():
        vision = model.vision_features(VisionInput(tiles, (1, 8, 8)))
        return model(prompt, vision, model.sam2_features(images)).masks.candidate_logits_BKhw


def test_merged_directory_computes_what_base_and_adapter_compute(trained, exported):
    merged = published.load(str(exported[1]), dtype=torch.float32).model
    before, after = masks_of(trained[0].model), masks_of(merged)
    assert (before - after).abs().max() <= 1e-4 * before.abs().max()
    base = masks_of(published.load(str(exported[0]), dtype=torch.float32).model)
    assert (before - base).abs().max() > 0.1, "the adapter must matter, or this test shows nothing"


def test_everything_else_of_the_base_is_carried_over(exported):
    base, output, written = exported
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            assert (output / path.name).read_bytes() == path.read_bytes()
    before, after = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys() and written.tensors == len(after)
    video = "grounding_encoder.sam2_model.memory_encoder.fuser.layers.0.gamma"
    assert torch.equal(before[video], after[video])
    frozen = "vision_model.embeddings.class_embedding"
    assert torch.equal(before[frozen], after[frozen])
    with safe_open(output / "model.safetensors", framework="pt") as shard:
        assert shard.metadata() == {"format": "pt"}


def test_counts_say_what_was_merged(exported):
    assert exported[2].merged == 28 + 40  # linears of the language model and of SAM2's encoder
    names = load_file(exported[1] / "model.safetensors")
    assert exported[2].replaced == sum(bool(WHOLE.match(name)) for name in names)
    assert exported[2].dtypes == ("float32",)


def test_sharded_base_stays_sharded_with_a_true_index(trained, exported, tmp_path):
    base = tmp_path / "sharded"
    shutil.copytree(exported[0], base)
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"model-1-of-2.safetensors": names[:200], "model-2-of-2.safetensors": names[200:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, base / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    written = export(base, trained[2], tmp_path / "out", torch.bfloat16)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": written.bytes}, "weight_map": weight_map}
    assert written.dtypes == ("bfloat16",)


def test_another_base_is_refused_and_nothing_is_left(trained, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(published.EMBEDDED, other)
    state = load_file(other / "model.safetensors")
    del state["text_hidden_fcs.0.weight"]
    save_file(state, other / "model.safetensors")
    with pytest.raises(UserError, match="text_hidden_fcs.0.weight"):
        export(other, trained[2], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_existing_output_is_never_touched(trained, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        export(published.EMBEDDED, trained[2], tmp_path)
    with pytest.raises(UserError, match="exists already"):
        export_adapter(trained[2], tmp_path)


def test_adapter_alone_leaves_the_training_state_behind(trained, tmp_path):
    export_adapter(trained[2], tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
