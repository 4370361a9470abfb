"""Devices: every way to start a run trains on the devices asked for, and nothing goes round CUDA_VISIBLE_DEVICES."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft.devices import Launch, installed_gpus, parse_listing, plan, visible_devices
from sft.ranks import rank_environ, reserve_port
from sft.settings import UserError

ROOT = Path(__file__).resolve().parent.parent
GPUS = {str(number): f"GPU-{letter}0ab" for number, letter in enumerate("abcd")}
LISTING = "".join(f"GPU {number}: NVIDIA H100 80GB HBM3 (UUID: {uuid})\n" for number, uuid in GPUS.items())

# What launch/train.py does before torch, and then a line that says which rank this is instead of training.
PROBE = f"""
import json, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from sft.config import UserError, parse_args
from sft.devices import claim
try:
    config = parse_args(sys.argv[1:])
    code = claim(config.gpu, config.include)
except UserError as error:
    sys.exit(f"error: {{error}}")
if code is not None:
    sys.exit(code)
assert "torch" not in sys.modules
with open(os.environ["PROBE_OUT"], "a") as out:
    out.write(json.dumps({{**os.environ, "pid": os.getpid()}}) + "\\n")
print("out of rank", os.environ["RANK"], flush=True)
if os.environ["RANK"] == os.environ.get("PROBE_FAILS"):
    raise RuntimeError("boom")
time.sleep(float(os.environ.get("PROBE_SLEEPS", "0")))
"""


class Probe:
    """A script that takes its devices and notes each rank's environment."""

    def __init__(self, folder: Path, listing: str) -> None:
        self.script, self.out, tool = folder / "probe.py", folder / "ranks.jsonl", folder / "bin" / "nvidia-smi"
        self.script.write_text(PROBE)
        tool.parent.mkdir()
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{listing}\nEND\n")
        tool.chmod(0o755)
        unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_PORT", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES")
        self.environ = {key: value for key, value in os.environ.items() if key not in unset}
        paths = (str(tool.parent), str(Path(sys.executable).parent), os.environ["PATH"])
        self.environ |= {"PROBE_OUT": str(self.out), "PATH": os.pathsep.join(paths), "TMPDIR": str(folder)}
        self.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

    def start(self, *command: str, **environ: str) -> subprocess.Popen:
        words = [str(self.script) if word == "SCRIPT" else word for word in command]
        return subprocess.Popen(
            words, env=self.environ | environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *command: str, **environ: str) -> tuple[int, str, str]:
        process = self.start(*command, **environ)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def ranks(self) -> list[dict]:
        """The environments of the ranks that trained, in order of rank."""
        lines = self.out.read_text().splitlines() if self.out.exists() else []
        return sorted(map(json.loads, lines), key=lambda environ: int(environ["RANK"]))


@pytest.fixture
def cpu(tmp_path: Path) -> Probe:
    """A machine without a GPU; LOCAL_SIZE=4 makes DeepSpeed and us see four devices."""
    return Probe(tmp_path, "")


@pytest.fixture
def gpus(tmp_path: Path) -> Probe:
    """A machine on which nvidia-smi lists four GPUs."""
    return Probe(tmp_path, LISTING)


def launched(rank: int, count: int, visible: str, **more: str) -> dict[str, str]:
    """The environment DeepSpeed's launcher gives a rank on a single machine."""
    launcher = {"CUDA_VISIBLE_DEVICES": visible, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    return rank_environ(rank, count) | launcher | more


# What the plan is (no process started)


def test_without_a_choice_the_first_visible_device_trains() -> None:
    assert plan(None, None, {}, GPUS).devices == ("0",)
    assert plan(None, None, {"CUDA_VISIBLE_DEVICES": "2,3"}, GPUS).devices == ("2",)


def test_without_a_gpu_the_cpu_trains() -> None:
    for environ in ({}, {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "0"}):
        decided = plan(None, None, environ, {})
        assert (decided.action, decided.devices, decided.environ["WORLD_SIZE"]) == ("train", (), "1")


@pytest.mark.parametrize("hide", ["", "-1"])
def test_hidden_gpus_stay_hidden(hide: str) -> None:
    decided = plan(None, None, {"CUDA_VISIBLE_DEVICES": hide}, GPUS)
    assert (decided.devices, decided.environ["CUDA_VISIBLE_DEVICES"]) == ((), "")
    with pytest.raises(UserError, match="device 0 does not exist"):
        plan("0", None, {"CUDA_VISIBLE_DEVICES": hide}, GPUS)


def test_the_launcher_cannot_bring_hidden_gpus_back() -> None:
    # Under CUDA_VISIBLE_DEVICES="" the launcher takes the machine for a CPU and sets CUDA_VISIBLE_DEVICES=0.
    decided = plan(None, None, launched(0, 1, "0"), GPUS, Launch(limit="", options=()))
    assert decided.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_one_device_trains_here_and_several_are_started() -> None:
    one, two = plan("3", None, {}, GPUS), plan(None, "localhost:0,1", {}, GPUS)
    assert (one.action, one.environ["CUDA_VISIBLE_DEVICES"], one.environ["WORLD_SIZE"]) == ("train", "3", "1")
    assert (two.action, two.environ["CUDA_VISIBLE_DEVICES"], two.environ["WORLD_SIZE"]) == ("start", "0,1", "2")
    assert one.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"  # otherwise CUDA counts from the fastest device


def test_order_is_kept_for_gpu_and_sorted_for_include_as_deepspeed_does() -> None:
    assert plan("2,1", None, {}, GPUS).devices == ("2", "1")
    assert plan(None, "localhost:2,1", {}, GPUS).devices == ("1", "2")
    assert plan(None, "localhost", {"CUDA_VISIBLE_DEVICES": "1,3"}, GPUS).devices == ("1", "3")
    assert plan(None, f"{socket.gethostname()}:2", {}, GPUS).devices == ("2",)


def test_a_launched_rank_beyond_the_choice_leaves_and_the_rest_are_renumbered() -> None:
    plans = [plan(None, "localhost:3,1", launched(rank, 4, "0,1,2,3"), GPUS) for rank in range(4)]
    assert [decided.action for decided in plans] == ["train", "train", "leave", "leave"]
    for rank, decided in enumerate(plans[:2]):
        assert decided.environ["CUDA_VISIBLE_DEVICES"] == "1,3"
        assert {decided.environ[key] for key in ("RANK", "LOCAL_RANK")} == {str(rank)}
        assert {decided.environ[key] for key in ("WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")} == {"2"}


def test_a_launched_rank_without_a_choice_is_left_as_it_is() -> None:
    decided = plan(None, None, launched(1, 2, "0,1"), GPUS)
    assert (decided.action, set(decided.environ)) == ("train", {"CUDA_DEVICE_ORDER"})


def test_a_device_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(UserError, match=r"^device 7 does not exist: those that exist: 0, 1, 2, 3$"):
        plan("7", None, {}, GPUS)
    with pytest.raises(UserError, match="no GPU is visible; leave the choice out to train on the CPU"):
        plan("0", None, {}, {})


def test_cuda_visible_devices_is_a_limit() -> None:
    with pytest.raises(UserError, match=r"device 3 is outside CUDA_VISIBLE_DEVICES=0,1; choose among 0, 1"):
        plan("3", None, {"CUDA_VISIBLE_DEVICES": "0,1"}, GPUS)
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=9 names no device of this machine, which has 0, 1, 2, 3"):
        plan(None, None, {"CUDA_VISIBLE_DEVICES": "9"}, GPUS)
    # The launcher drops the user's limit beside an --include of its own.
    with pytest.raises(UserError, match="device 3 is outside CUDA_VISIBLE_DEVICES=0,1"):
        plan(None, None, launched(0, 1, "3"), GPUS, Launch("0,1", ("--include", "localhost:3")))
    allowed = Launch("GPU-d", ("--include", "localhost:3"))
    assert plan(None, None, launched(0, 1, "3"), GPUS, allowed).action == "train"


def test_a_limit_of_uuids_is_matched_to_numbers() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "GPU-d0,GPU-b0ab"}
    assert plan("3", None, environ, GPUS).environ["CUDA_VISIBLE_DEVICES"] == "GPU-d0"
    assert plan("GPU-b", None, environ, GPUS).devices == ("GPU-b0ab",)
    with pytest.raises(UserError, match="device 0 is outside"):
        plan("0", None, environ, GPUS)


def test_mig_instances_are_chosen_by_their_uuid() -> None:
    installed = parse_listing(
        "GPU 0: A100 (UUID: GPU-a)\n"
        "  MIG 1g.5gb  Device  0: (UUID: MIG-x1)\n"
        "  MIG 1g.5gb  Device  1: (UUID: MIG-x2)\n"
        "GPU 1: some card without one\n"
    )
    assert installed == {"0": "GPU-a", "1": "", "MIG-x1": "MIG-x1", "MIG-x2": "MIG-x2"}
    assert plan(None, None, {"CUDA_VISIBLE_DEVICES": "MIG-x2"}, installed).devices == ("MIG-x2",)
    assert plan("MIG-x1", None, {}, installed).devices == ("MIG-x1",)


def test_the_limit_is_read_up_to_the_first_wrong_entry_as_cuda_does() -> None:
    assert [device.name for device in visible_devices("2,9,1", GPUS)] == ["2"]
    assert [device.name for device in visible_devices("GPU-unknown", {"0": ""})] == ["GPU-unknown"]


@pytest.mark.parametrize(
    ("gpu", "include", "expected"),
    [
        ("0,x", None, "gpu = 0,x is not a list of devices"),
        ("0,", None, "is not a list of devices"),
        ("1,1", None, "names a device twice"),
        (None, "worker-1:0", "names another machine.*before the script"),
        (None, "localhost:0@worker-1:0", "names another machine"),
    ],
)
def test_a_malformed_choice_is_refused(gpu: str | None, include: str | None, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        plan(gpu, include, {}, GPUS)


def test_devices_are_chosen_in_one_place() -> None:
    with pytest.raises(UserError, match="--include before the script and device 3 after it both choose"):
        plan("3", None, launched(0, 1, "3"), GPUS, Launch(None, ("deepspeed", "--include", "localhost:3")))


def test_several_machines_are_the_launchers_business() -> None:
    several = launched(2, 2, "0,1") | {"RANK": "2", "WORLD_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
    assert plan(None, None, several, GPUS).action == "train"
    with pytest.raises(UserError, match="with several machines devices are chosen before the script"):
        plan("0", None, several, GPUS)


def test_more_devices_than_torchruns_ranks_are_refused() -> None:
    environ = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    with pytest.raises(UserError, match="2 devices for 1 ranks"):
        plan("0,1", None, environ, GPUS)


# Processes


def test_gpus_are_listed_without_torch(gpus: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", gpus.environ["PATH"])
    assert installed_gpus() == GPUS


def test_plain_python_trains_on_one_device(gpus: Probe) -> None:
    assert gpus.run(sys.executable, "SCRIPT", "--gpu", "3")[0] == 0
    (rank,) = gpus.ranks()
    assert (rank["CUDA_VISIBLE_DEVICES"], rank["RANK"], rank["WORLD_SIZE"]) == ("3", "0", "1")
    assert int(rank["MASTER_PORT"]) != 29500


def test_plain_python_starts_one_process_per_device(gpus: Probe) -> None:
    code, out, _ = gpus.run(sys.executable, "SCRIPT", "--gpu", "0,1")
    assert (code, out) == (0, "out of rank 0\n")
    first, second = gpus.ranks()
    assert [(rank["RANK"], rank["LOCAL_RANK"], rank["WORLD_SIZE"]) for rank in (first, second)] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert first["CUDA_VISIBLE_DEVICES"] == second["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert not list(gpus.script.parent.glob("sa2va-sft*"))


def test_the_train_script_refuses_a_device_that_does_not_exist(gpus: Probe) -> None:
    code, out, err = gpus.run(sys.executable, str(ROOT / "launch" / "train.py"), "--gpu", "7")
    assert (code, out, err) == (2, "", "error: device 7 does not exist: those that exist: 0, 1, 2, 3\n")


def test_one_failing_rank_ends_the_others_and_is_shown(gpus: Probe) -> None:
    started = time.monotonic()
    code, _, err = gpus.run(sys.executable, "SCRIPT", "--gpu", "0,1", PROBE_FAILS="0", PROBE_SLEEPS="60")
    assert code == 1 and "RuntimeError: boom" in err
    assert time.monotonic() - started < 10
    code, out, err = gpus.run(sys.executable, "SCRIPT", "--gpu", "0,1", PROBE_FAILS="1")
    assert (code, out) == (1, "out of rank 0\n")
    assert "rank 1 ended with exit code 1" in err and "RuntimeError: boom" in err
    kept = re.search(r"kept in (\S+)", err.splitlines()[-1]).group(1)
    assert "RuntimeError: boom" in (Path(kept) / "rank_1.log").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_reaches_every_rank(gpus: Probe, number: signal.Signals, code: int) -> None:
    process = gpus.start(sys.executable, "SCRIPT", "--gpu", "0,1", PROBE_SLEEPS="60")
    wait_for(lambda: len(gpus.ranks()) == 2)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == code
    wait_for(lambda: not any(is_alive(rank["pid"]) for rank in gpus.ranks()))


def test_two_runs_at_once_have_different_ports(gpus: Probe) -> None:
    held = {reserve_port() for _ in range(50)}
    assert len(held) == 50
    runs = [gpus.start(sys.executable, "SCRIPT", "--gpu", str(n), PROBE_SLEEPS="1") for n in range(3)]
    assert [run.wait(timeout=20) for run in runs] == [0, 0, 0]
    ports = {rank["MASTER_PORT"] for rank in gpus.ranks()}
    assert len(ports) == 3 and ports.isdisjoint(held)


def test_a_reserved_port_can_be_listened_on() -> None:
    port = int(reserve_port())
    with socket.socket() as server:  # as torch's store does
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", port))
        server.listen()


def test_ranks_of_one_launch_agree_on_a_port_that_another_launch_does_not_have(cpu: Probe) -> None:
    # Stands in for DeepSpeed's launcher, which gives every run port 29500.
    launcher = "import subprocess, sys, os\n" + (
        "ranks = [subprocess.Popen([sys.executable, sys.argv[1]], env=os.environ | {'RANK': r, 'LOCAL_RANK': r,"
        " 'WORLD_SIZE': '2', 'LOCAL_SIZE': '2', 'CROSS_SIZE': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '29500',"
        " 'CUDA_VISIBLE_DEVICES': '0,1'}) for r in '10']\n"
        "sys.exit(max(rank.wait() for rank in ranks))"
    )
    runs = [cpu.start(sys.executable, "-c", launcher, "SCRIPT", PROBE_SLEEPS="1") for _ in range(2)]
    assert [run.wait(timeout=20) for run in runs] == [0, 0]
    ports = [rank["MASTER_PORT"] for rank in cpu.ranks()]
    assert sorted(ports.count(port) for port in set(ports)) == [2, 2] and "29500" not in ports
    assert not list(cpu.script.parent.glob("sa2va-sft*"))


# DeepSpeed's own launcher, seconds each: it imports torch twice


def test_deepspeed_with_include_after_the_script_trains_on_device_3_only(cpu: Probe) -> None:
    assert cpu.run("deepspeed", "SCRIPT", "--include", "localhost:3", LOCAL_SIZE="4")[0] == 0
    check_device_3_only(cpu)


def test_deepspeed_with_include_before_the_script_trains_on_device_3_only(cpu: Probe) -> None:
    assert cpu.run("deepspeed", "--include", "localhost:3", "SCRIPT", LOCAL_SIZE="4")[0] == 0
    check_device_3_only(cpu)


def test_deepspeed_cannot_go_round_cuda_visible_devices(cpu: Probe) -> None:
    command = ("deepspeed", "--include", "localhost:3", "SCRIPT")
    code, _, err = cpu.run(*command, LOCAL_SIZE="4", CUDA_VISIBLE_DEVICES="0,1")
    assert code != 0 and "error: device 3 is outside CUDA_VISIBLE_DEVICES=0,1" in err
    assert cpu.ranks() == []


def check_device_3_only(probe: Probe) -> None:
    (rank,) = probe.ranks()
    assert (rank["CUDA_VISIBLE_DEVICES"], rank["RANK"], rank["LOCAL_RANK"], rank["WORLD_SIZE"]) == ("3", "0", "0", "1")
    assert rank["MASTER_PORT"] != "29500"


def wait_for(condition: object, seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
