"""Protects a whole InternLM2 run: published directory in, training, adapter and merged directory in its terms out."""

import json

import internlm2_files
import pytest
import small_runs
import small_sa2va
from safetensors.torch import load_file
from small_runs import rows, settings, values

from sft.model import lora
from sft.model.export import export
from sft.train import train
from sft.validation import validate_directory


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base with sentencepiece tokenizer, grouped-query attention and dynamic rope; images."""
    folder = tmp_path_factory.mktemp("inputs")
    rope = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 1000000, "bias": False}
    config = small_sa2va.config("InternLM2ForCausalLM", vocab_size=internlm2_files.ROWS, **rope)
    config["template"] = "internlm2_chat"
    small_sa2va.write(folder / "model", config)
    (folder / "model" / "tokenizer.json").unlink()
    internlm2_files.write_tokenizer(folder / "model")
    (folder / "model" / "modeling_internlm2.py").write_text("raise SystemExit('nobody may run this')\n")
    small_runs.write_images(folder / "data")
    (folder / "val.txt").write_text("v1\nv4\n")
    return folder


def test_a_run_trains_resumes_and_leaves_the_published_format(inputs, tmp_path):
    result = train(settings(inputs, tmp_path / "runs", num_epochs=3))
    losses = values(result, "train", "loss")
    assert losses[-1] < losses[0]
    names = set(load_file(inputs / "model" / "model.safetensors"))
    for key in lora.read_adapter(result.directory / "checkpoint_best"):
        assert f"{key.removeprefix('base_model.model.').partition('.lora_')[0]}.weight" in names
    left = {path.name for path in (result.directory / "checkpoint_best").iterdir()}
    assert {"tokenizer.model", "tokenizer_config.json", "added_tokens.json"} <= left

    steps, first = rows(result, "step"), result.directory / "checkpoint_epoch_1"
    resumed = train(settings(inputs, tmp_path / "runs", num_epochs=3, resume=str(first)))
    assert rows(resumed, "step") == steps

    checkpoint = result.directory / "checkpoint_epoch_3"
    export(inputs / "model", checkpoint, tmp_path / "merged")
    before, after = validate_directory(checkpoint, tmp_path / "merged")
    assert after == pytest.approx(before, abs=1e-3)
    base = json.loads((inputs / "model" / "config.json").read_text())
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == base
    assert (tmp_path / "merged" / "tokenizer.model").is_file()
