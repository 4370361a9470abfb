"""Protects the adapter that ZeRO-3 leaves: every tensor whole and at its place, as one rank with ZeRO-2 writes it."""

import json
import re
import sys
from pathlib import Path

import pytest
import small_runs
import small_sa2va as small
import torch
import toy
from safetensors.torch import load_file
from small_runs import only_run, settings

from sft import engine
from sft.model import lora, published
from sft.model.export import export
from sft.train import train

BASE = small.config("InternLM2ForCausalLM", bias=False)  # its adapter is put together anew when it is saved
WHOLE = ("text_hidden_fcs", "mask_decoder")


CHANGES = {"train_modules": WHOLE, "num_epochs": 1, "seg_rate_samples": 0}


def part_of_a_rank(inputs: Path, out: Path) -> None:
    """What each of two ranks does: a run under a ZeRO-3 that slices every matrix, LoRA's too."""
    ranks = engine.start(settings(inputs, out))
    zero = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 100}
    file = out / f"zero3_{ranks.rank}.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    train(settings(inputs, out / "two", batch_size=1, deepspeed_config=str(file), **CHANGES))
    engine.barrier()
    engine.shut_down()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The base, and the checkpoints of one rank with ZeRO-2 and of two ranks with ZeRO-3."""
    if torch.cuda.device_count() == 1:
        pytest.skip("two ranks need two GPUs or none")
    inputs, out = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("out")
    small.write(inputs / "model", BASE)
    small_runs.write_images(inputs / "data")
    (inputs / "val.txt").write_text("v1\nv4\n")
    toy.run_ranks(__file__, str(inputs), str(out))
    train(settings(inputs, out / "one", deepspeed_config="zero2", **CHANGES))
    return inputs / "model", [only_run(out / place) / "checkpoint_epoch_1" for place in ("one", "two")]


def test_it_holds_every_tensor_whole(runs):
    model_path, checkpoints = runs
    one, two = map(lora.read_adapter, checkpoints)
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in one.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in two.items()
    }
    base = load_file(model_path / "model.safetensors")
    for key, tensor in two.items():
        path, is_lora, side = key.removeprefix("base_model.model.").partition(".lora_")
        assert tensor.numel() > 0 and bool(torch.isfinite(tensor).all())
        rows, columns = base[f"{path}.weight"].shape if is_lora else (None, None)
        match side[:1]:
            case "A":
                assert tensor.shape[1] == columns and tensor.any()
            case "B":
                assert tensor.shape[0] == rows and tensor.any()
            case _:
                assert tensor.shape == base[path].shape
    modules = [key for key in base if key.startswith(("text_hidden_fcs.", "grounding_encoder.sam2_model.sam_mask_de"))]
    assert {f"base_model.model.{key}" for key in modules} == {key for key in two if ".lora_" not in key}
    settings_of = [json.loads((folder / "adapter_config.json").read_text()) for folder in checkpoints]
    assert settings_of[0] == settings_of[1]


def test_it_is_what_one_rank_trains(runs):
    """fp32 sums in another order alone tell the runs apart, and Adam makes a step of any gradient, however small."""
    model_path, checkpoints = runs
    one, two = map(lora.read_adapter, checkpoints)
    noise = re.compile(r"attn.*\.k_proj\.bias$")  # softmax does not see it: its gradient is rounding alone
    for key in (key for key in one if not noise.search(key)):
        far = (one[key] - two[key]).abs() > 1e-4
        assert far.float().mean() < 0.01, f"{key}: {int(far.sum())} of {far.numel()} values differ"


def test_it_merges_and_computes_what_the_other_computes(runs, tmp_path):
    model_path, checkpoints = runs
    masks = []
    for number, checkpoint in enumerate(checkpoints):
        export(model_path, checkpoint, tmp_path / str(number))
        model = published.load(str(tmp_path / str(number)), dtype=torch.float32).model
        tokens, tile_counts, features = small.inputs(model, 1)
        with torch.no_grad():
            masks.append(model(small.preprocess().prompt([small.QUESTION], tile_counts), tokens, features).masks)
    one, two = (found.candidate_logits_BKhw for found in masks)
    assert (one - two).abs().max() <= 1e-3 * one.abs().max()


if __name__ == "__main__":
    part_of_a_rank(*map(Path, sys.argv[1:]))
