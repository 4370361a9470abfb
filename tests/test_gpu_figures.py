"""Protects the script that takes the figures of a GPU: every command leaves its rows, ended, failed or out of time."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import gpu_figures
import pytest
from gpu_readers import READERS, Call, Figure

from sft.config import parse_args
from sft.model.shapes import NAMES

ROOT = Path(__file__).resolve().parents[1]
STEP = {"batch_size": 32, "ms_per_sample": 9.0, "step_ms": 288.0, "step_ms_quartiles": 2.88, "steps": 20.0}
STEP |= {"mfu": 0.49, "peak_tflops": 780.0, "deepspeed_overhead": 0.03, "data_share": 0.01, "pace": "Step: none"}
STEPS = {"shape": "4b", "image": "512x512", "ranks": 1, "ours": [STEP], "fill_images_per_s": 95.0, "fill_images": 302}
STEPS["targets"] = [
    {"figure": "ms_per_sample", "batch_size": 32, "at_most": 9.5},
    {"figure": "mfu", "batch_size": 32, "at_least": 0.5},
    {"figure": "deepspeed_overhead", "batch_size": None, "at_most": 0.05},
    {"figure": "fill_images_per_s", "batch_size": None, "at_least": 90.0},
    {"figure": "scaling", "batch_size": None, "at_least": 1.9},
]
DONE = Call(seconds=300.0, exit_code=0, shape="4b", on_gpu=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An OUT; the folder of weights and logs stands beside it."""
    monkeypatch.setenv("FIGURES_FOLDER", str(tmp_path / "work"))
    monkeypatch.setenv("SHAPE", "tiny")
    (tmp_path / "work").mkdir()
    return tmp_path / "out"


def run_script(out: Path, *parts: str, **environ: str) -> subprocess.CompletedProcess:
    own = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "tests" / "gpu_figures.sh"), str(out), *parts]
    return subprocess.run(command, env=own | environ, capture_output=True, text=True, timeout=300)


def rows(out: Path) -> dict[tuple[str, str], dict]:
    found = json.loads((out / "figures.json").read_text())
    return {(row["part"], row["what"]): row for row in found}


def measured(reader: str, found: object, call: Call = DONE) -> dict[str, Figure]:
    return {figure.what: figure for figure in READERS[reader](found, call)}


def test_a_part_leaves_a_row_with_a_number_and_a_failing_one_does_not_stop_it(folder):
    done = run_script(folder, "sizes:5b", "loss")
    assert done.returncode == 1, done.stderr
    found = rows(folder)
    assert "shape '5b': choose from 1b" in found["sizes:5b", "5b: failed"]["measured"]
    assert "exit code 1" in found["sizes:5b", "the whole command"]["measured"]
    loss = found["loss", "ComboLoss forward and backward, 2x64x64"]
    assert loss["value"] > 0 and loss["measured"].endswith(" ms") and loss["GPU"] and loss["date"]
    assert loss["command"].startswith("python3 tests/gpu_losses.py DIR/logs/loss --host --batches 2x64")
    assert found["loss", "ComboLoss forward and backward, 2x64x64: against eager"]["value"] > 0
    table = (folder / "figures.md").read_text()
    assert f"| loss | {loss['what']} | - | {loss['measured']} | `{loss['command']}` |" in table
    with tarfile.open(folder / "logs.tar.gz") as archive:
        assert {"loss.txt", "loss/losses.json", "sizes_5b.txt"} <= set(archive.getnames())


def test_lanes_run_beside_each_other_each_with_its_own_gpus_and_rows_of_all_come_back(tmp_path):
    """A stand-in for Python notes the GPUs it sees, and leaves a row as `gpu_figures.py` does."""
    stand_in, out = tmp_path / "bin" / "python3", tmp_path / "out"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\necho "| $3 | $CUDA_VISIBLE_DEVICES |" >> "$2/figures.md"\n')
    stand_in.chmod(0o755)
    environ = {"PATH": f"{stand_in.parent}:{os.environ['PATH']}", "FIGURES_FOLDER": str(tmp_path / "work")}
    command = ["bash", str(ROOT / "tests" / "gpu_lanes.sh"), str(out)]
    run = functools.partial(subprocess.run, env=os.environ | environ, capture_output=True, text=True, timeout=60)
    done = run([*command, "1 loss", "2 sweep:ranks,asha"])
    assert done.returncode == 0, done.stderr
    expected = ["| loss | 0 |", "| sweep:ranks | 1,2 |", "| sweep:asha | 1,2 |"]
    assert (out / "figures.md").read_text().splitlines() == expected
    with tarfile.open(out / "lanes.tar.gz") as archive:
        assert {"./1/log", "./2/log", "./2/out/figures.md"} <= set(archive.getnames())
    for lanes in ((), ("loss",), ("0 loss",)):
        assert run([*command, *lanes]).returncode == 2


def test_the_commands_of_the_4b_shape_are_understood(folder):
    """All that a GPU would be asked to do, written down by a stand-in for Python and parsed."""
    bin_folder, written = folder.parent / "bin", folder.parent / "commands.txt"
    bin_folder.mkdir()
    scripts = {
        "python3": f'printf "%s\\037" "$@" >> {written}; echo >> {written}',
        "nvidia-smi": "echo GPU 0; echo GPU 1",
    }
    for name, text in scripts.items():
        (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (bin_folder / name).chmod(0o755)
    run_script(folder, SHAPE="4b", PATH=f"{bin_folder}:{os.environ['PATH']}")
    calls = [line.rstrip("\037").split("\037") for line in written.read_text().splitlines()]
    assert all(call[0] == "tests/gpu_figures.py" or call == ["-c", "import ray"] for call in calls)
    commands = [call[call.index("--") + 2 :] for call in calls if "--" in call]
    benchmarks = [command[1:] for command in commands if command[0] == "launch/benchmark.py"]
    parsed = [script("benchmark").parse(words) for words in benchmarks]
    shapes = [(arguments.shape, arguments.image_size, arguments.ranks, arguments.profile) for arguments, _ in parsed]
    square = (512, 512)
    starts = [("4b", square, 1, 0)] * 2
    of_4b = [("4b", square, 1, 0), *starts, ("4b", square, 1, 3), ("4b", square, 1, 0)]
    of_others = [("1b", square, 1, 0), ("8b", square, 1, 0), ("4b", (999, 960), 1, 0)]
    assert shapes == [*of_4b, *of_others, ("4b", square, 2, 0)]
    runs = [parse_args(command[1:]) for command in commands if command[0] == "launch/train.py"]
    job, memory = runs
    assert (job.num_epochs, job.batch_size, job.feature_cache, job.precision) == (15, 8, "auto", "bf16")
    assert (memory.batch_size, memory.gradient_checkpointing, memory.feature_cache) == (1, True, "disk")
    sizes = {command[2] for command in commands if command[0] == "tests/gpu_sizes.py"}
    assert sizes == {"8b", "internlm2-8b", "qwen2_5vl-3b", "qwen2_5vl-7b", "qwen3vl-4b", "4b"} <= set(NAMES)
    assert any(command[:2] == ["-m", "sft.synthetic"] and "1220" in command for command in commands)


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_does_not_fit_is_named_and_eight_files_come_back(folder):
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text("x")
    assert run_script(folder, "loss", "sizes:small", LIMIT_S="30").returncode == 0
    whole = rows(folder)["loss", "the whole command"]
    assert whole["measured"] == "not run: no time left in this call" and whole["value"] is None
    assert ("sizes:small", "the whole command") in rows(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"figures.md", "figures.json", "logs.tar.gz", "others.tar.gz"}
    unknown = run_script(folder, "losses")
    assert unknown.returncode == 2 and "no part losses; there are: speed start profile" in unknown.stderr
    assert "loss:1: only shapes, sizes and sweep have choices" in run_script(folder, "loss:1").stderr


def test_a_command_whose_time_is_up_leaves_what_it_had_measured(folder, monkeypatch):
    """The clock stands until the row is there; then all time is gone."""
    file = folder.parent / "speed.json"
    command = ["bash", "-c", f"echo '{json.dumps(STEPS)}' > {file}; exec sleep 1000"]
    seen = []

    def clock():
        seen.append((folder / "figures.json").exists())
        return 1000.0 * seen[-1]

    monkeypatch.setattr(gpu_figures.time, "monotonic", clock)
    monkeypatch.setattr(gpu_figures, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(sys, "argv", ["x", str(folder), "speed", "500", "--read", str(file), "--", *command])
    assert gpu_figures.main() == gpu_figures.TIMED_OUT
    assert rows(folder)["speed", "4b, 512x512, batch 32: a sample"]["value"] == 9.0
    assert "time is up" in rows(folder)["speed", "the whole command"]["measured"]
    # A later call that fails at once must not show the old file's figures as its own.
    before = rows(folder)["speed", "4b, 512x512, batch 32: a sample"]
    file.with_name("other.json").write_text(json.dumps(STEPS))
    other = ["--read", str(file.with_name("other.json")), "--", "bash", "-c", "echo broken; exit 3"]
    monkeypatch.setattr(sys, "argv", ["x", str(folder), "shapes:4b", "500", *other])
    monkeypatch.setattr(gpu_figures.time, "monotonic", lambda: 0.0)
    assert gpu_figures.main() == 3
    of_other = [row for (part, _), row in rows(folder).items() if part == "shapes:4b"]
    assert [row["measured"] for row in of_other] == ["0 s (exit code 3; broken)"]
    assert rows(folder)["speed", "4b, 512x512, batch 32: a sample"] == before


def test_verdicts_follow_the_targets():
    found = measured("speed", STEPS)
    assert found["4b, 512x512, batch 32: a sample"].target == "at most 9.5 ms"
    assert found["4b, 512x512, batch 32: a sample"].measured == "9 ms, met (median of 20, quartiles 1.0% apart)"
    assert found["4b, 512x512, batch 32: MFU"].met is False
    assert "MISSED" in found["4b, 512x512, batch 32: MFU"].measured
    overhead = found["4b, 512x512, batch 32: DeepSpeed against bare torch"]
    assert (overhead.measured, overhead.target) == ("3 %, met", "at most 5 %")
    assert found["4b, 512x512: filling features"].measured == "95 images/s, met (302 images)"
    two = STEPS | {"ranks": 2, "scaling": [{"batch_size": 32, "factor": 1.8}]}
    found = measured("scaling", two)
    assert found["4b, 512x512, batch 32: a sample"].met is None, "the targets of steps are of one rank"
    assert found["4b, 512x512, batch 32 each: 2 ranks against one"].measured == "1.8 x samples/s, MISSED"


def test_a_job_has_a_time_only_when_it_has_ended():
    log = [{"kind": "val", "dice": 0.25}, {"kind": "step", "loss": 1.0}]
    log += [{"kind": "train", "epoch": epoch, "step": 122 * epoch, "step_s": 0.1} for epoch in (1, 2)]
    log += [{"kind": "val", "dice": 0.5}]
    (done,) = measured("seed_job", log).values()
    assert done.measured == "300 s, met (2 epochs, 24 s of them in steps; validation Dice 0.250 -> 0.500)"
    (ended,) = measured("seed_job", log, Call(540.0, 124, "4b", True)).values()
    assert ended.value is None and ended.measured.startswith("not finished after 540 s: 2 epochs")
    (other,) = measured("seed_job", log, Call(300.0, 0, "tiny", False)).values()
    assert other.value == 300 and other.met is None


def test_memory_sizes_and_tests_are_read():
    log = [{"kind": "train", "gpu_gib": 11.5}, {"kind": "train", "gpu_gib": 12.5}]
    (peak,) = measured("memory", log).values()
    assert peak.measured == "12.5 GiB, MISSED"
    assert [figure.note for figure in READERS["memory"]([{"kind": "train"}], DONE)] == ["no GPU"]
    size = {"shape": "8b", "bytes": 16e9, "read_s": 2.0, "load_s": 2.2, "load_over_read": 1.1, "gpu_peak": 16.16e9}
    size |= {"host_anonymous_peak": 0.07e9, "cold_read_s": 8.0, "cold_load_s": 10.0}
    found = measured("sizes", [size])
    assert found["8b: loading against reading"].measured.startswith("1.1 x, met")
    assert found["8b: loading against reading, cold"].measured.startswith("1.25 x, MISSED")
    assert found["8b: GPU memory of loading against the weights"].value == pytest.approx(1.01)
    cases = '<testcase classname="tests.test_gpu" name="test_b"><failure/></testcase>'
    suite = f'<testsuites><testsuite tests="5" skipped="1" failures="1" errors="0">{cases}</testsuite></testsuites>'
    (counted,) = measured("tests", ElementTree.fromstring(suite)).values()
    assert counted.measured == "1, MISSED (3 passed, 1 skipped)" and counted.details == ("tests.test_gpu::test_b",)


def test_what_does_not_fit_into_a_cell_stands_below_the_table():
    kernels = [{"name": "gemm|bf16", "ms": 7.0, "calls": 36.0, "share": 0.7}]
    row = STEP | {"profile": {"steps": 3, "idle_share": 0.25, "copies_ms": 0.5, "kernels": kernels}}
    idle, longest = READERS["profile"](STEPS | {"ours": [row]}, DONE)
    assert idle.measured == "25 % (3 profiled steps, copies 0.50 ms a step)"
    shared = {"part": "profile", "target": "", "command": "a | b", "GPU": "X", "date": "D", "details": longest.details}
    text = gpu_figures.markdown([shared | {"what": longest.what, "measured": longest.measured}])
    assert "| `a \\| b` |" in text and text.splitlines()[-2].split() == [
        "7.000",
        "ms",
        "70.0%",
        "36",
        "calls",
        "gemm|bf16",
    ]


def test_of_a_short_call_only_the_start_is_a_figure():
    found = STEPS | {"start_s": 45.0, "start_parts_s": {"imports": 12.0}}
    (figure,) = measured("start", found).values()
    assert (figure.value, figure.note) == (45.0, "batch 32; imports 12.0 s")
