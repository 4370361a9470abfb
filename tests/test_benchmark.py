"""Protects the benchmark: both loops compute the same, every figure is there, mistakes are one line."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import small_qwen
import small_runs
import torch
from gpu_readers import READERS, Call
from PIL import Image

from sft import benchmark, data, train
from sft import run as runs
from sft.benchmark import inputs as benchmark_inputs
from sft.benchmark import plain, profiled
from sft.benchmark.bare import BareEngine
from sft.benchmark.clock import Times, timed
from sft.benchmark.profiled import Span
from sft.benchmark.table import picture, table, targets
from sft.features import Item
from sft.model import shapes
from sft.ranks import rank_environ
from sft.stopwatch import Stopwatch

SCRIPT = Path(__file__).resolve().parents[1] / "launch" / "benchmark.py"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="devices can be faked only where there are none")
CPU = torch.device("cpu")


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("launch_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path):
    """fp32 without dropout: a difference would be one of the arithmetic."""
    return small_runs.settings(small_runs.write_inputs(tmp_path), tmp_path / "runs", num_epochs=100)


def small_figures(**changes) -> dict:
    row = {"step_ms": 12.0, "step_ms_quartiles": 0.5, "ms_per_sample": 1.5, "samples_per_s": 666.0, "steps": 9}
    ours = row | {"batch_size": 8, "times_plain": 40.0, "data_share": 0.01, "mfu": 0.55, "peak_tflops": 780.0}
    ours |= {"bare": row, "around_bare": row, "deepspeed_overhead": 0.02}
    ours |= {"tokens": 320, "operations": {"frozen": 10**12}, "pace": "Step"}
    figures = {"shape": "4b", "image": "512x512", "ranks": 1, "device": "X", "date": "D", "ours": [ours]}
    figures |= {"plain": row | {"ms_per_sample": 60.0}, "fill_images_per_s": 95.0, "start_s": 31.0}
    figures |= {"fill_images": 66}
    return figures | {"formula": {"frozen": "F"}, "peak_in_words": "P"} | changes


@pytest.mark.parametrize("family", ["internvl", *small_qwen.FAMILIES])
@pytest.mark.parametrize("text_weight", [0.0, 0.3])
def test_the_plain_loop_and_ours_compute_the_same_loss_and_gradients(config, tmp_path, family, text_weight):
    if family != "internvl":
        small_qwen.write(tmp_path / "qwen", family)
        config = dataclasses.replace(config, model_path=str(tmp_path / "qwen"))
    config = dataclasses.replace(config, batch_size=1, text_weight=text_weight, lora_dropout=0.0)
    loop = plain.PlainLoop(config, CPU)
    with runs.prepared(config) as run:
        pair = run.data.train[0]
        expected = loop.loss(plain.read(pair, loop.preprocess, config))
        expected.backward()
        (batch,) = run.features.batches([[Item(pair)]])
        run.ds_engine.train()
        output = run.ds_engine(batch.prompt, batch.vision, batch.sam2)
        total = train.loss_terms(output.masks, batch, config)["total"]
        if text_weight:
            total = total + text_weight * output.text_loss
        total.backward()
        assert total.item() == pytest.approx(expected.item(), rel=1e-5)
        gradients = {name: p.grad for name, p in run.peft_model.named_parameters() if p.grad is not None}
        for name, parameter in loop.peft_model.named_parameters():
            if parameter.requires_grad and ".lora_B" in name:
                assert torch.allclose(parameter.grad, gradients[name], rtol=1e-3, atol=1e-6), name


def test_the_plain_loop_learns_and_recomputes_its_layers(config):
    """Checkpointing is part of what it stands for: each layer runs twice a step."""
    loop, calls = plain.PlainLoop(config, CPU), []
    (inputs,) = [plain.read(pair, loop.preprocess, config) for pair in data.load(config).train[:1]]
    loop.model.decoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    first, *_, last = [float(loop.step(inputs)) for _ in range(6)]
    assert last < first and len(calls) == 12


def test_bare_torch_takes_the_engines_steps(config):
    """The same two steps from the same weights, by DeepSpeed and without it."""
    weights = {}
    for bare in (False, True):
        with runs.prepared(config) as run:
            batch = next(run.features.batches([[Item(pair) for pair in run.data.train[:2]]]))
            run.ds_engine.train()
            stepped = run
            if bare:
                stepped = dataclasses.replace(run, ds_engine=BareEngine(run.ds_engine, config))
            for _ in range(3):
                if not bare:  # a constant rate, as the other's
                    for group in run.ds_engine.deepspeed.basic_optimizer.param_groups:
                        group["lr"] = config.learning_rate
                train.train_step(stepped, batch, Stopwatch(CPU))
            named = run.peft_model.named_parameters()
            weights[bare] = {name: p.detach().clone() for name, p in named if p.requires_grad}
    for name, weight in weights[False].items():
        assert torch.allclose(weight, weights[True][name], rtol=1e-3, atol=1e-5), name
    assert any(weight.abs().max() > 0 for name, weight in weights[True].items() if "lora_B" in name)


def test_every_figure_is_measured_and_fits_into_json(config, monkeypatch, tmp_path):
    monkeypatch.setenv("SA2VA_SFT_CACHE", str(tmp_path / "cache"))
    kept = []
    settings = benchmark.Settings(config, (1, 2), steps=2, warm_up=1, import_s=1.0, profiled_steps=2)
    figures = benchmark.measure(settings, lambda known: kept.append(json.dumps(known)))
    assert len(kept) == 3 and json.loads(kept[-1]) == json.loads(json.dumps(figures))
    assert figures.keys() >= {"plain", "ours", "start_s", "fill_images_per_s", "write_s", "device", "ranks", "formula"}
    assert sum(figures["start_parts_s"].values()) == figures["start_s"] > figures["start_parts_s"]["imports"] == 1.0
    assert figures["fill_images_per_s"] > 0
    assert figures["fill_images"] == len(small_runs.NAMES)
    for row, batch_size in zip(figures["ours"], (1, 2), strict=True):
        assert row["batch_size"] == batch_size and row["steps"] == 2
        assert row["ms_per_sample"] == pytest.approx(row["step_ms"] / batch_size)
        assert row["times_plain"] == pytest.approx(figures["plain"]["ms_per_sample"] / row["ms_per_sample"])
        assert torch.cuda.is_available() or row["host_peak_gib"] > 0.1
        assert row["around_bare"]["steps"] == 2 * row["bare"]["steps"] == 4
        assert row["bare"]["step_ms"] > 0 and row["deepspeed_overhead"] > -1 and 0 <= row["data_share"] < 1
        assert row["mfu"] == pytest.approx(row["tflops"] / row["peak_tflops"]) and row["mfu"] > 0
        parts = ("vision encoder", "SAM2 encoder", "language model", "mask decoder", "loss", "optimizer")
        assert [name.split(",")[0] for name in row["parts"]] == list(parts)
        kernels = row["profile"]["kernels"]
        assert row["profile"]["steps"] == 2 and sum(kernel["share"] for kernel in kernels) <= 1 + 1e-9
        assert kernels == sorted(kernels, key=lambda kernel: kernel["ms"], reverse=True)
        if "idle_share" not in row["profile"]:  # a GPU's kernels have names of their own
            (product,) = (kernel for kernel in kernels if kernel["name"] == "aten::mm")
            assert product["ms"] > 0 and product["calls"] >= 2 * 14, "14 linears, forward and backward"
    first, second = (row["operations"] for row in figures["ours"])
    assert first.keys() == figures["formula"].keys()
    assert second["mask_decoder"] == 2 * first["mask_decoder"] and second["head"] == 0


def test_idle_is_what_no_kernel_covers():
    """By hand: kernels from 0 to 4, 2 to 6 (both at once from 2 to 4) and 9 to 10; a copy fills no gap."""
    spans = [Span("b", 2.0, 6.0), Span("a", 0.0, 4.0), Span("Memcpy HtoD", 6.0, 9.0), Span("a", 9.0, 10.0)]
    figures = profiled.of_gpu(spans, steps=2)
    assert figures["idle_share"] == pytest.approx(3 / 10) and figures["copies_ms"] == pytest.approx(3e-3 / 2)
    longest, other = figures["kernels"]
    assert longest == {"name": "a", "ms": 2.5e-3, "calls": 1.0, "share": pytest.approx(5 / 9)}
    assert other["name"] == "b" and other["calls"] == 0.5
    inside = profiled.of_gpu([Span("a", 0.0, 8.0), Span("b", 1.0, 2.0), Span("b", 6.0, 8.0)], steps=1)
    assert inside["idle_share"] == 0
    with pytest.raises(RuntimeError, match="no kernel"):
        profiled.of_gpu([Span("Memset", 0.0, 1.0)], steps=1)


def test_times_are_of_the_middle_step():
    times = Times((0.1, 0.2, 0.4, 0.2, 3.0), 2**30)
    row = times.record(samples=4)
    assert row["step_ms"] == pytest.approx(200) and row["ms_per_sample"] == pytest.approx(50)
    assert row["samples_per_s"] == pytest.approx(20) and row["peak_gib"] == 1
    both = times + Times((0.2,), 2**31)
    assert len(both.steps_s) == 6 and both.peak_bytes == 2**31 and Times((0.3,), 0).spread_s == 0
    on_cpu = Times((0.1,), 0, 2**30) + Times((0.1,), 0, 2**31)
    assert on_cpu.record()["host_peak_gib"] == 2 and "peak_gib" not in on_cpu.record() and "host_peak_gib" not in row


def test_on_a_cpu_the_most_memory_of_the_process_is_told():
    """What a step touched stays in it after it was given back; the kernel's other figure is never lower."""
    now = 4096 * int(Path("/proc/self/statm").read_text().split()[1])
    touched = timed(lambda: torch.ones(2**29, dtype=torch.uint8), CPU, 1, 0).host_peak_bytes
    assert 0.9 * (now + 2**29) < touched <= 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert timed(lambda: None, CPU, 1, 0).record()["host_peak_gib"] == touched / 2**30
    figures = small_figures()
    figures["ours"][0]["host_peak_gib"] = 1.25
    (line,) = (line for line in table(figures).splitlines() if "memory" in line)
    assert line.startswith("ours, batch 8: most host memory") and "1.25  GiB, of the whole process so far" in line


def test_the_table_is_aligned_and_names_targets_for_the_shape_they_are_of():
    lines = table(small_figures()).splitlines()
    steps = [line for line in lines if " ms, median of 9" in line]
    assert len(steps) == 3 and len({line.index(" ms, median") for line in steps}) == 1
    (per_sample,) = (line for line in lines if line.startswith("ours, batch 8: per sample"))
    assert "1.50  ms" in per_sample and per_sample.endswith("at most 13 ms")
    assert any(line.startswith("filling") and line.endswith("at least 90") for line in lines)
    assert not [line for line in table(small_figures(shape="8b")).splitlines() if "at most" in line]
    assert not any("least 0.5" in line for line in lines), "MFU has a target at batch 32 alone"
    assert {"figure": "mfu", "batch_size": 32, "at_least": 0.5} in targets("4b", "512x512")
    assert not targets("8b", "512x512") and not targets("4b", "999x960")
    assert {"figure": "data_share", "batch_size": None, "at_most": 0.02} in targets("4b", "512x512")


def test_the_table_names_the_longest_kernels_and_the_idle_share():
    figures = small_figures()
    kernels = [{"name": f"kernel_{n}", "ms": 9.0 / n, "calls": 36.0, "share": 0.5 / n} for n in range(1, 30)]
    figures["ours"][0]["profile"] = {"steps": 3, "idle_share": 0.125, "copies_ms": 0.1, "kernels": kernels}
    lines = table(figures).splitlines()
    (idle,) = (line for line in lines if line.startswith("no kernel runs, batch 8"))
    assert "12.5  % of the profiled steps" in idle
    shown = [line for line in lines if "kernel_" in line]
    assert len(shown) == 15 and "9.000  ms, 36 calls a step, 50.0 % of all" in shown[0]


def test_steps_of_very_unequal_length_are_marked():
    """A busy machine makes a factor that means nothing; the reader is told."""
    assert "UNSTEADY" not in table(small_figures())
    plain_row = small_figures()["plain"] | {"step_ms": 60.0, "step_ms_quartiles": 16.0}
    marked = [line for line in table(small_figures(plain=plain_row)).splitlines() if "UNSTEADY" in line]
    assert [line.split(": ")[1].split("  ")[0] for line in marked] == ["step", "against the plain loop"]
    for side in ("bare", "around_bare"):  # steps of the one kind, or of the other before and after them
        figures = small_figures()
        figures["ours"][0][side] = figures["ours"][0][side] | {"step_ms_quartiles": 4.0}
        marked = [line for line in table(figures).splitlines() if "UNSTEADY" in line]
        assert "DeepSpeed against bare torch" in marked[-1] and "% of the step UNSTEADY" in marked[-1]
        assert len(marked) == (2 if side == "bare" else 1), "the bare steps have a line of their own"


def test_the_picture_opens_and_its_bars_are_to_scale(tmp_path):
    picture(tmp_path / "bars.png", small_figures())
    with Image.open(tmp_path / "bars.png") as image:
        pixels = image.convert("RGB")
        colours = [pixels.getpixel((x, y)) for y in range(pixels.height) for x in range(pixels.width)]
    longest = dict.fromkeys(((217, 72, 15), (31, 111, 235)), 0)
    for start in range(0, len(colours), pixels.width):
        row = colours[start : start + pixels.width]
        longest = {colour: max(most, row.count(colour)) for colour, most in longest.items()}
    assert math.isclose(longest[217, 72, 15] / longest[31, 111, 235], 60 / 1.5, rel_tol=0.1)


def test_scaling_compares_equal_batch_sizes():
    one = {"ours": [{"batch_size": 1, "samples_per_s": 2.0}, {"batch_size": 8, "samples_per_s": 10.0}]}
    two = {"ours": [{"batch_size": 8, "samples_per_s": 19.0}]}
    assert benchmark.scaling(one, two) == [{"batch_size": 8, "factor": 1.9}]


def test_weights_and_images_are_written_once_and_again_when_half_written(tmp_path, monkeypatch):
    ids = {token: small_qwen.tokenizer().get_vocab()[token] for token in ("<|endoftext|>", *small_qwen._VISION)}
    ids |= {token: small_qwen.tokenizer().get_vocab()[token] for token in ("<|im_start|>", "<|im_end|>", "[SEG]")}
    monkeypatch.setattr(shapes, "named", lambda name: shapes.Shape(small_qwen.config("qwen3_vl"), ids))
    directory = Path(benchmark_inputs.write_model("qwen3vl-4b", tmp_path))
    written = (directory / "model.safetensors").stat().st_mtime_ns
    benchmark_inputs.write_model("qwen3vl-4b", tmp_path)
    assert (directory / "model.safetensors").stat().st_mtime_ns == written
    (directory / "complete").unlink()
    benchmark_inputs.write_model("qwen3vl-4b", tmp_path)
    assert (directory / "model.safetensors").stat().st_mtime_ns > written
    monkeypatch.setattr(benchmark_inputs, "IMAGES_PER_PROCESS", 1)  # by several, where there are cores
    root, val_list = benchmark_inputs.write_images(96, 64, 3, tmp_path)
    assert len(list((root / "images").iterdir())) == 5 and val_list.read_text().split() == ["v3", "v4"]
    with Image.open(root / "masks" / "v0.png") as mask:
        assert mask.size == (96, 64)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--shape 5b", "invalid choice: '5b'"),
        ("--profile 0", "0 is no whole number of at least 1"),
        ("--batch_sizes 1,0", "0 is no whole number of at least 1"),
        ("--image_size 12", "12 is no size; give 512, or 999x960"),
        ("--batch_size=4", "--batch_size: the benchmark chooses it itself; see --batch_sizes"),
        ("--gradient_accumulation_steps=2", "--gradient_accumulation_steps: the benchmark chooses it itself; see"),
        ("--lora_dropout 2", "lora_dropout = 2 is not allowed"),
        ("--learning_rat 1", "unknown key --learning_rat"),
        ("--ranks 2", "--ranks 2 needs --folder DIR"),
        ("--model_path launch", "has no config.json"),
        ("--picture nowhere/x.png", "its folder does not exist"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured(script, words, said, monkeypatch, capsys):
    monkeypatch.chdir(SCRIPT.parents[1])
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words.split()])
    assert script.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_settings_of_training_go_through_to_the_runs(script):
    arguments, rest = script.parse(["--shape", "1b", "--rank", "8", "--compile", "false", "--seed", "3"])
    config = script.settings_of_runs(arguments, rest)
    assert (config.lora_rank, config.lora_alpha, config.compile, config.seed) == (8, 16, False, 3)
    assert arguments.batch_sizes == (1, 8, 32) and config.precision == "bf16"
    demo = script.settings_of_runs(*script.parse([]))
    assert (demo.lora_rank, demo.precision) == (16, "fp32")  # the demo's own


@NO_GPU
def test_the_command_measures_one_rank_and_two(config, tmp_path):
    """Both forms in one call: one rank with everything, then two, compared with it."""
    command = [sys.executable, SCRIPT, "--model_path", config.model_path, "--folder", tmp_path / "kept", "--ranks", 2]
    command += ["--batch_sizes", 1, "--image_size", "128x96", "--images", 4, "--steps", 2, "--warm_up", 1, "--rank", 4]
    command += ["--precision", "bf16", "--json", tmp_path / "two.json", "--picture", tmp_path / "two.png"]
    unset = ("MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", *rank_environ(0, 1))
    environ = {name: value for name, value in os.environ.items() if name not in unset} | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([str(word) for word in command], env=environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    one = json.loads((tmp_path / "kept" / "one_rank.json").read_text())
    two = json.loads((tmp_path / "two.json").read_text())
    assert one["ranks"] == 1 and "plain" in one and two["ranks"] == 2 and "plain" not in two
    assert two["scaling"][0]["factor"] == pytest.approx(
        two["ours"][0]["samples_per_s"] / one["ours"][0]["samples_per_s"]
    )
    assert (
        two["settings"]["precision"] == "bf16"
        and two["targets"] == []
        and "--ranks 2" in two["command"]
        and two["versions"]["torch"]
    )
    assert "2 ranks against one, batch 1 each" in done.stdout
    known = {figure.what: figure.value for figure in READERS["scaling"](two, Call(1.0, 0, "tiny", False))}
    assert known[f"{two['shape']}, 128x96, batch 1 each: 2 ranks against one"] == two["scaling"][0]["factor"]
    left = {path.name for path in (tmp_path / "kept").iterdir()}
    assert left == {"one_rank.json", "images_128x96_4"}, "runs and features are removed"
    Image.open(tmp_path / "two.png").verify()


def test_no_timed_step_runs_an_encoder(config, monkeypatch, tmp_path):
    """Features are kept before the steps, as training keeps them; else a step's time would be theirs."""
    monkeypatch.setenv("SA2VA_SFT_CACHE", str(tmp_path / "cache"))
    calls, timed = [], benchmark.timed

    def watched(step, device, steps, warm_up):
        before = len(calls)
        times = timed(step, device, steps, warm_up)
        assert len(calls) == before
        return times

    prepared = runs.prepared

    @contextlib.contextmanager
    def counting(given):
        with prepared(given) as run:
            run.loaded.model.sam2.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
            yield run

    monkeypatch.setattr(benchmark, "timed", watched)
    monkeypatch.setattr(runs, "prepared", counting)
    benchmark.measure(benchmark.Settings(config, (1, 2), steps=3, warm_up=1, with_plain=False, with_parts=False))
    assert calls, "nothing was counted"
