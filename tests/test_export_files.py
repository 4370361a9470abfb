"""Protects what export does with files: where it writes, what it carries over, what it says; on a small model."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import small_runs
import small_sa2va as small
import torch
from safetensors.torch import load_file, save_file

from launch import export as script
from sft.config import TrainConfig, UserError
from sft.model import export as exporting
from sft.model import lora, published
from sft.model.export import export, export_adapter
from sft.train import train

HEAD, EMBEDDINGS = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def write_checkpoint(directory: Path, model, **changes) -> Path:
    """An adapter with LoRA that moved and text_hidden_fcs trained whole."""
    chosen = TrainConfig(**{"lora_rank": 2, "lora_alpha": 6, "train_modules": ("text_hidden_fcs",)} | changes)
    peft_model = lora.wrap(model, chosen)
    torch.manual_seed(1)
    trainable = {name: p.detach() for name, p in peft_model.named_parameters() if p.requires_grad}
    for parameter in trainable.values():
        parameter.add_(0.1 * torch.randn_like(parameter))
    directory.mkdir(parents=True)
    lora.save_adapter(directory, peft_model, trainable, "safetensors")
    return directory


@pytest.fixture
def base(tmp_path):
    small.write(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "run" / "checkpoint_best", small.build())


def sharded(base: Path) -> Path:
    """The base in two shards and an index."""
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"model-1-of-2.safetensors": names[:100], "model-2-of-2.safetensors": names[100:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, base / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return base


@pytest.mark.parametrize("place", ["base", "base/inside", "base/a/b", "run/checkpoint_best/out", "other/../base/x"])
def test_an_output_inside_the_base_or_the_checkpoint_is_refused(base, checkpoint, tmp_path, place):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"output .*: is the (base|checkpoint) .* or lies in it; give a folder outside"):
        export(base, checkpoint, tmp_path / place)
    if "checkpoint" in place:
        with pytest.raises(UserError, match="lies in it"):
            export_adapter(checkpoint, tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_inside_the_base_by_way_of_a_link_is_refused(base, checkpoint, tmp_path):
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(UserError, match="is the base .* or lies in it"):
        export(base, checkpoint, tmp_path / "link" / "out")


@pytest.mark.parametrize(("dtype", "share"), [(None, 1.0), (torch.bfloat16, 0.5), (torch.float32, 1.0)])
def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    base, checkpoint, tmp_path, monkeypatch, dtype, share
):
    rest = sum(path.stat().st_size for path in base.iterdir() if path.suffix != ".safetensors")
    needed = rest + share * sum(tensor.nbytes for tensor in load_file(base / "model.safetensors").values())
    usage, free = exporting.shutil.disk_usage(tmp_path), needed - 1
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda path: usage._replace(free=free))
    with pytest.raises(UserError, match=rf"output .*/new/out: needs .* GiB, but {tmp_path} has .* GiB free; free some"):
        export(base, checkpoint, tmp_path / "new" / "out", dtype)
    assert not (tmp_path / "new").exists()
    free = needed
    export(base, checkpoint, tmp_path / "new" / "out", dtype)
    written = sum(path.stat().st_size for path in (tmp_path / "new" / "out").iterdir())
    headers = 200_000  # of the safetensors file, which no estimate counts
    assert needed <= written <= needed + headers


def test_a_checkpoint_or_base_that_is_none_is_one_line(base, checkpoint, tmp_path, monkeypatch, capsys):
    """A run's folder, a folder that is not there, a base cut short, a base that nobody names: no traceback."""

    def said(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["export.py", "--output", str(tmp_path / "out"), *map(str, words)])
        assert script.main() == 2
        return capsys.readouterr().err

    assert "nowhere: no such directory; give a checkpoint" in said("--checkpoint", tmp_path / "nowhere")
    for kind in ([], ["--adapter_only"]):
        line = said("--checkpoint", checkpoint.parent, *kind)
        assert "no adapter_config.json in it; give one of checkpoint_best in it" in line
    given = ("--checkpoint", checkpoint, "--model_path")
    assert "nowhere: no such directory; give the base" in said(*given, tmp_path / "nowhere")
    weights_file = base / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-100])
    assert "model.safetensors: unreadable safetensors file" in said(*given, base)
    settings = json.loads((checkpoint / "adapter_config.json").read_text())
    (checkpoint / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    assert "adapter_config.json: names no base; give --model_path" in said("--checkpoint", checkpoint)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("flag", [("--validate",), ("--dtype", "fp16"), ("--model_path", "base")])
def test_what_means_nothing_for_an_adapter_alone_is_refused(checkpoint, tmp_path, monkeypatch, capsys, flag):
    """Asked for and not done is never silent."""
    words = ["export.py", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), "--adapter_only", *flag]
    monkeypatch.setattr(sys, "argv", words)
    assert script.main() == 2 and f"so {flag[0]} means nothing with it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_weight_that_fp16_cannot_hold_is_refused(tmp_path, checkpoint):
    """70,000 would become infinite; bf16 and fp32 hold it, and what is infinite already is not the fault of fp16."""
    small.write(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["mlp1.0.bias"][0] = 70_000
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"dtype float16: mlp1.0.bias holds 7e\+04, which is beyond 65,504"):
        export(tmp_path / "base", checkpoint, tmp_path / "out", torch.float16)
    assert not list(tmp_path.glob("out*"))
    export(tmp_path / "base", checkpoint, tmp_path / "out", torch.bfloat16)


def test_a_base_of_links_becomes_files(base, checkpoint, tmp_path):
    """Hugging Face's cache: snapshots/REVISION/NAME are links to ../../blobs/HASH."""
    sharded(base)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(base.iterdir())):
        path.rename(blobs / f"{number:04d}")
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"{number:04d}", snapshot))
    before = {path.name: path.read_bytes() for path in blobs.iterdir()}
    export(snapshot, checkpoint, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in snapshot.iterdir()}
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    published.load(str(tmp_path / "out"), dtype=torch.float32)
    assert {path.name: path.read_bytes() for path in blobs.iterdir()} == before


def test_links_to_nothing_are_named(base, checkpoint, tmp_path):
    (base / "merges.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=f"{base}: merges.txt link to nothing; download the model again"):
        export(base, checkpoint, tmp_path / "out")


def test_a_line_for_each_shard(base, checkpoint, tmp_path):
    lines = []
    written = export(sharded(base), checkpoint, tmp_path / "out", tell=lines.append)
    assert len(lines) == 2
    assert re.fullmatch(r"model-1-of-2.safetensors: 100 tensors, 0\.\d\d GB \(1 of 2\)", lines[0])
    assert re.fullmatch(rf"model-2-of-2.safetensors: {written.tensors - 100} tensors, 0\.\d\d GB \(2 of 2\)", lines[1])


def test_weights_that_would_stay_unmerged_are_left_out_and_named(base, checkpoint, tmp_path):
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.Q4.gguf", "generation_config.json"):
        (base / name).write_text("{}")
    for folder in (".git", ".cache", "assets"):
        (base / folder).mkdir()
        (base / folder / "file").write_text("x")
    written = export(base, checkpoint, tmp_path / "out")
    left_out = (".cache", ".git", "consolidated.safetensors", "model.Q4.gguf", "pytorch_model.bin")
    assert written.left_out == left_out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in base.iterdir()} - set(left_out)
    assert (tmp_path / "out" / "assets" / "file").read_text() == "x"


@pytest.mark.parametrize("head_in_file", [False, True])
def test_tied_embeddings_survive(tmp_path, head_in_file):
    settings = small.config(tie_word_embeddings=True)
    model = small.write(tmp_path / "base", settings)
    file = tmp_path / "base" / "model.safetensors"
    if head_in_file:
        state = load_file(file)
        save_file(state | {HEAD: state[EMBEDDINGS].clone()}, file)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small.build(settings))
    export(tmp_path / "base", checkpoint, tmp_path / "out")
    before, after = load_file(file), load_file(tmp_path / "out" / "model.safetensors")
    assert (HEAD in after) == head_in_file and torch.equal(before[EMBEDDINGS], after[EMBEDDINGS])
    loaded = published.load(str(tmp_path / "out"), dtype=torch.float32).model.language_model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.language_model.model.embed_tokens.weight)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_that_of_all_floating_point_weights(base, checkpoint, tmp_path, dtype):
    state = load_file(base / "model.safetensors")
    extra = "grounding_encoder.sam2_model.memory_encoder.count"  # video only, so that nobody asks for it
    save_file(state | {extra: torch.tensor([3])}, base / "model.safetensors")
    written = export(base, checkpoint, tmp_path / "out", dtype)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.pop(extra).dtype == torch.int64
    assert {tensor.dtype for tensor in after.values()} == {dtype or torch.float32}
    assert set(written.dtypes) == {"int64", str(dtype or torch.float32).removeprefix("torch.")}
    assert not torch.equal(after["text_hidden_fcs.0.weight"].float(), state["text_hidden_fcs.0.weight"])
    frozen = "vision_model.embeddings.class_embedding"
    assert torch.equal(after[frozen], state[frozen].to(after[frozen].dtype))


def test_modules_trained_whole_are_replaced_by_what_was_trained(base, checkpoint, tmp_path):
    written = export(base, checkpoint, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    adapter = lora.read_adapter(checkpoint)
    names = [name for name in after if name.startswith("text_hidden_fcs.")]
    assert written.replaced == len(names) == 4
    assert all(torch.equal(after[name], adapter[f"base_model.model.{name}"]) for name in names)


def test_an_adapter_whose_scale_is_another_is_refused(base, checkpoint, tmp_path):
    file = checkpoint / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_rslora": True}))
    with pytest.raises(UserError, match="adapter_config.json: use_rslora is set"):
        export(base, checkpoint, tmp_path / "out")


# The command


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return small_runs.write_inputs(tmp_path_factory.mktemp("inputs"))


def run_script(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
    return script.main()


@pytest.mark.parametrize("samples", [0, 2])
def test_the_command_says_the_seg_rate_before_and_after(inputs, tmp_path, monkeypatch, capsys, samples):
    result = train(small_runs.settings(inputs, tmp_path, seg_rate_samples=samples, num_epochs=1))
    log = result.directory / "training_log.json"
    if samples:
        rows = json.loads(log.read_text())
        for row in rows:
            row |= {"seg_rate": 1.0 if row["epoch"] == 0 else 0.5} if row["kind"] == "val" else {}
        log.write_text(json.dumps(rows))
    capsys.readouterr()
    best = result.directory / "checkpoint_best"
    assert run_script(monkeypatch, "--checkpoint", best, "--output", tmp_path / "out") == 0
    assert run_script(monkeypatch, "--checkpoint", best, "--output", tmp_path / "alone", "--adapter_only") == 0
    told = "base 1.00, epoch 1 0.50, on up to 2 validation images"
    told = told if samples else "not measured by this run (seg_rate_samples 0)"
    out = capsys.readouterr().out
    assert out.count(f"[SEG] rate (how often the model, asked freely, arrives at [SEG]): {told}\n") == 2
    assert out.startswith("model.safetensors: ") and "(1 of 1)" in out


def test_a_seg_rate_that_nobody_knows_is_said_so(checkpoint, base, tmp_path, monkeypatch, capsys):
    assert re.search("not known: .*not a checkpoint of this program", script.seg_rate_line(checkpoint))
    words = ("--checkpoint", checkpoint, "--model_path", base, "--output", tmp_path / "out")
    assert run_script(monkeypatch, *words) == 0
    assert "[SEG] rate (how often the model, asked freely, arrives at [SEG]): not known: " in capsys.readouterr().out
