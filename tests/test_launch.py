"""The commands as a user types them: every form of starting a run trains; every mistake is one line and exit code 2.

Training commands run as processes of their own; mistakes that are found after torch was imported run in this one.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_runs
import torch
from small_runs import only_run, rows, values

from sft import engine, synthetic
from sft.model import published
from sft.ranks import rank_environ

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "launch" / "train.py"
UNSET = ("MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", *rank_environ(0, 1))
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="devices can be faked only where there are none")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return small_runs.write_inputs(tmp_path_factory.mktemp("inputs"))


def flags(inputs: Path, output_dir: Path, **changes) -> list[str]:
    """The settings of small_runs.py as flags."""
    config = small_runs.settings(inputs, output_dir, **{"num_epochs": 1, "val_batch_size": 2} | changes)
    default = type(config)()
    changed = {name: value for name, value in vars(config).items() if value != getattr(default, name)}
    texts = {name: ",".join(value) if isinstance(value, tuple) else str(value) for name, value in changed.items()}
    return [word for name, text in texts.items() for word in (f"--{name}", text)]


def start(*command: str | Path, **environ: str) -> subprocess.Popen:
    """A command on a machine without a GPU, on which LOCAL_SIZE fakes devices."""
    kept = {name: value for name, value in os.environ.items() if name not in UNSET}
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    kept |= {"PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | environ
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in command], env=kept, start_new_session=True, **pipes)


def run(*command: str | Path, **environ: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    process = start(*command, **environ)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def train(*words: str | Path, **environ: str) -> tuple[int, str, str]:
    return run(sys.executable, SCRIPT, *words, **environ)


def check_trained(output_dir: Path, ranks: int) -> Path:
    """The run has taken its steps on so many ranks and kept what it learned."""
    directory = only_run(output_dir)
    record = json.loads((directory / "config.json").read_text())
    assert record["ranks"] == ranks
    assert values(directory, "train", "step") == [2 // ranks]
    assert (directory / "checkpoint_best" / "adapter_model.safetensors").exists()
    assert (output_dir / "training.log").read_text().count("Gradient check: every LoRA B moved") == 1
    return directory


# Forms of starting a run


@NO_GPU
@pytest.mark.parametrize("before", [True, False])
def test_deepspeed_trains_on_device_3_wherever_include_stands(inputs, tmp_path, before):
    words, include = [SCRIPT, *flags(inputs, tmp_path)], ["--include", "localhost:3"]
    command = ["deepspeed", *include, *words] if before else ["deepspeed", *words, *include]
    code, out, err = run(*command, LOCAL_SIZE="4")
    assert code == 0, err
    check_trained(tmp_path, ranks=1)
    assert out.count("Gradient check:") == 1


@NO_GPU
def test_gpu_0_1_trains_on_two_ranks_and_prints_once(inputs, tmp_path):
    code, out, err = train(*flags(inputs, tmp_path), "--gpu", "0,1", LOCAL_SIZE="2")
    assert (code, err) == (0, "")
    check_trained(tmp_path, ranks=2)
    assert out == (tmp_path / "training.log").read_text()


@pytest.mark.slow
def test_the_seed_command_flag_by_flag(tmp_path):
    """On a copy of the embedded base, with the researcher's numbers; the device is the one this machine has."""
    shutil.copytree(published.EMBEDDED, tmp_path / "M")
    synthetic.write_dataset(tmp_path / "D", "demo", count=2, seed=7)
    command = "--model_path M --data_root D --lora_rank 64 --lora_alpha 128 --num_epochs 15 --gradient_checkpointing"
    words = [str(tmp_path / word) if word in ("M", "D") else word for word in command.split()]
    code, out, err = train(
        *words, "--gpu", "3", "--output_dir", tmp_path / "out", "--val_fraction", "0.5", LOCAL_SIZE="4"
    )
    assert code == 0, err
    assert [line for line in err.splitlines() if not line.startswith("Training: step ")] == []
    record = json.loads((only_run(tmp_path / "out") / "config.json").read_text())
    expected = {"lora_rank": 64, "lora_alpha": 128, "num_epochs": 15, "gradient_checkpointing": True, "gpu": "3"}
    assert {name: record[name] for name in expected} == expected
    assert record["command"] == [str(SCRIPT), *words, "--gpu", "3", "--output_dir", *record["command"][-3:]]
    assert values(only_run(tmp_path / "out"), "val", "epoch") == list(range(16))
    kept = {path.name for path in only_run(tmp_path / "out").glob("checkpoint_*")}
    assert kept == {"checkpoint_best", *(f"checkpoint_epoch_{epoch}" for epoch in (3, 6, 9, 12, 15))}
    losses = values(only_run(tmp_path / "out"), "train", "loss")
    assert losses[-1] < losses[0]


def test_terminated_run_closes_its_log_and_resumes(inputs, tmp_path):
    words = flags(inputs, tmp_path, num_epochs=300, save_every=300)
    process = start(sys.executable, SCRIPT, *words)
    log = tmp_path / "training.log"
    wait_for(lambda: log.exists() and "\nVal 2/300" in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (143, "")
    last = re.fullmatch(r"Interrupted after step (\d+)", log.read_text().splitlines()[-1])
    assert int(last[1]) >= 4
    before = rows(only_run(tmp_path))
    assert [row["step"] for row in before if row["kind"] == "step"][-1] == int(last[1]), "no row was lost"
    resumed = start(sys.executable, SCRIPT, *words, "--resume", "auto")
    wait_for(
        lambda: "Resumed after epoch" in log.read_text() and "\nEpoch" in log.read_text().split("Resumed")[1], resumed
    )
    resumed.send_signal(signal.SIGINT)
    _, err = resumed.communicate(timeout=60)
    assert (resumed.returncode, err) == (130, "interrupted\n")
    assert log.read_text().splitlines()[-1].startswith("Interrupted after step")


def wait_for(condition, process: subprocess.Popen, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# Mistakes that are answered before torch is imported


EARLY = {
    "no such model": (["--model_path", "nowhere"], r"model_path nowhere does not exist; expected a downloaded Sa2VA"),
    "no Sa2VA directory": (
        ["--model_path", str(ROOT / "launch")],
        r"has no config\.json \(found: benchmark.py, con",
    ),
    "no such data": (["--data_root", "nowhere"], "data_root nowhere is not a directory"),
    "output_dir is a file": (["--output_dir", str(SCRIPT)], r"output_dir .* is a file; name another folder"),
    "out of range": (["--lora_rank", "0"], "lora_rank = 0 is not allowed: integer at least 1"),
    "unknown key": (["--lora_rnk", "8"], "unknown key --lora_rnk = 8; nearest: --lora_rank"),
    "contradiction": (["--gpu", "0", "--include", "localhost:1"], "gpu and include both choose the devices"),
    "no such device": (["--gpu", "7"], "device 7 does not exist: .*0, 1, 2, 3"),
    "no such checkpoint": (["--resume", "nowhere"], "resume nowhere is not a directory"),
}


@pytest.mark.parametrize("mistake", EARLY)
def test_a_mistake_in_the_settings_is_one_line_at_once(tmp_path, mistake):
    words, expected = EARLY[mistake]
    if mistake == "no such device" and torch.cuda.is_available():
        pytest.skip("devices can be faked only where there are none")
    started = time.monotonic()
    code, out, err = train("--output_dir", tmp_path / "out", *words, LOCAL_SIZE="4")
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"error: .*{expected}.*\n", err), err
    assert time.monotonic() - started < 5, "nothing heavy was imported"
    assert not (tmp_path / "out").exists()


# Mistakes that show only in the files


@pytest.fixture(scope="module")
def script():
    """launch/train.py as a module; the process group it joins is left when the file is done."""
    spec = importlib.util.spec_from_file_location("launch_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    yield module
    engine.shut_down()
    signal.signal(signal.SIGTERM, handler)
    os.environ.clear()
    os.environ.update(before)


def spoil(model: Path, name: str) -> None:
    """One way in which a downloaded model can be wrong."""
    config = json.loads((model / "config.json").read_text())
    match name:
        case "another architecture":
            config["llm_config"]["architectures"] = ["GemmaForCausalLM"]
        case "the other family":
            del config["vision_config"]
        case "another model":
            config["model_type"] = "llava"
        case "another shape":
            config["llm_config"]["intermediate_size"] = 64
        case "no weights":
            (model / "model.safetensors").unlink()
        case "half a download":
            (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000])
        case "no tokenizer":
            (model / "tokenizer_config.json").unlink()
    (model / "config.json").write_text(json.dumps(config))


SPOILED = {
    "another architecture": "language model GemmaForCausalLM is not supported yet; supported: Qwen2",
    "the other family": "architecture .* is not supported yet; supported: Sa2VAChatModel",
    "another model": "model_type is 'llava', expected 'sa2va_chat'",
    "another shape": r"of another shape \(language_model.* in the file, .* by config.json",
    "no weights": "no model.safetensors",
    "half a download": "unreadable safetensors file",
    "no tokenizer": "tokenizer_config.json",
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_model_is_one_line(inputs, tmp_path, script, monkeypatch, capsys, name):
    shutil.copytree(inputs / "model", tmp_path / "model")
    spoil(tmp_path / "model", name)
    check_mistake(script, monkeypatch, capsys, inputs, tmp_path, SPOILED[name], model_path=str(tmp_path / "model"))


def test_data_with_errors_are_one_line(inputs, tmp_path, script, monkeypatch, capsys):
    small_runs.write_images(tmp_path / "data")
    (tmp_path / "data" / "masks" / "v1.png").unlink()
    (tmp_path / "data" / "images" / "v2.png").write_bytes(b"no picture")
    expected = r"data_root .*: 2 errors; correct the files first: .*v[12]\.png.*v[12]\.png"
    check_mistake(script, monkeypatch, capsys, inputs, tmp_path, expected, data_root=str(tmp_path / "data"))


def test_too_little_disk_is_one_line(inputs, tmp_path, script, monkeypatch, capsys):
    expected = (
        r"GiB free, but 1000001 checkpoints and the one being replaced, .* raise save_every, use --keep latest or set "
        "another output_dir"
    )
    check_mistake(script, monkeypatch, capsys, inputs, tmp_path, expected, num_epochs=10**6)


def test_nothing_to_resume_is_one_line(inputs, tmp_path, script, monkeypatch, capsys):
    expected = "resume auto: no checkpoint of any run in .*"
    check_mistake(script, monkeypatch, capsys, inputs, tmp_path, expected, resume="auto")


def check_mistake(script, monkeypatch, capsys, inputs, folder, expected, **changes):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags(inputs, folder / "out", **changes)])
    assert script.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"error: .*{expected}.*\n", err), err
    assert not (folder / "out").exists()


@NO_GPU
def test_a_mistake_on_two_ranks_is_one_line_and_none_waits(inputs, tmp_path):
    started = time.monotonic()
    words = flags(inputs, tmp_path / "out", data_root=str(inputs), val_list=None)
    code, out, err = train(*words, "--gpu", "0,1", LOCAL_SIZE="2")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: data_root .* has no such layout .*\n", err), err
    assert time.monotonic() - started < 60
    assert not (tmp_path / "out").exists()
