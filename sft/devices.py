"""Which devices this run trains on, settled before torch is imported.

Takes --gpu or --include and the environment a launcher left. Sets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_SIZE and
CUDA_VISIBLE_DEVICES for this process, ends ranks that are not wanted, or starts one process per device.
Numbers are nvidia-smi's; CUDA_VISIBLE_DEVICES is a limit. Without a GPU, LOCAL_SIZE=4 stands for four devices, as it
does for DeepSpeed's launcher. Does not know torch: with a CPU build of it, a chosen GPU is not used.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sft.ranks import local_ranks, rank_environ, set_port, start_ranks, was_launched, was_started_here
from sft.settings import UserError

LIMIT = "CUDA_VISIBLE_DEVICES"
HIDE_ALL = ("", "-1")  # values of the limit that leave no device
CHOOSING_OPTIONS = ("--in", "--ex", "--num_", "-i", "-e")  # of DeepSpeed's launcher, which takes abbreviations


@dataclass(frozen=True)
class Device:
    """One device a process may use."""

    number: str  # as nvidia-smi counts, "3"; a MIG instance has its UUID here
    name: str  # as CUDA_VISIBLE_DEVICES calls it: "3", "GPU-5f1c", "MIG-77ab"
    uuid: str  # "" where unknown


@dataclass(frozen=True)
class Launch:
    """What the user gave DeepSpeed's launcher and the launcher does not hand on."""

    limit: str | None  # CUDA_VISIBLE_DEVICES before the launcher replaced it
    options: tuple[str, ...]  # what stood before the script


@dataclass(frozen=True)
class Plan:
    """What this process does: train here, leave, or start one process per device."""

    action: Literal["train", "leave", "start"]
    devices: tuple[str, ...] = ()  # in order of rank; empty where the launcher's own choice stands, and on the CPU
    environ: dict[str, str] = field(default_factory=dict)  # to be set before torch is imported


def claim(gpu: str | None, include: str | None) -> int | None:
    """Take the devices of this run; afterwards the environment describes this process's rank.

    Args:
        gpu: devices such as "3" or "0,1", or None.
        include: the same as "localhost:0,1", or None.

    Returns:
        None where training goes on in this process; otherwise the exit code: this rank is not wanted, or one
        process per device was started and all have ended.

    Raises:
        UserError: a device that does not exist or lies outside CUDA_VISIBLE_DEVICES, or devices chosen twice.
    """
    if was_started_here():
        return None
    decided = plan(gpu, include, os.environ, installed_gpus(), _launch_of_parents())
    if decided.action == "leave":
        return 0
    os.environ.update(decided.environ)
    if decided.action == "start":
        return start_ranks(len(decided.devices))
    set_port()
    return None


def plan(
    gpu: str | None,
    include: str | None,
    environ: Mapping[str, str],
    gpus: Mapping[str, str],
    launch: Launch | None = None,
) -> Plan:
    """Decide without doing: every form in which a run can be started meets here.

    Args:
        gpu: see `claim`.
        include: see `claim`.
        environ: the environment of this process.
        gpus: number -> UUID of the GPUs of this machine; empty without one.
        launch: what DeepSpeed's launcher was given, if it started this process.

    Returns:
        The plan of this process.

    Raises:
        UserError: see `claim`.
    """
    user_limit = launch.limit if launch else environ.get(LIMIT)
    on_cpu = not gpus or user_limit in HIDE_ALL
    installed = _stand_ins(environ) if on_cpu else dict(gpus)
    hidden = on_cpu and environ.get(LIMIT) in HIDE_ALL
    visible = visible_devices(None if hidden else environ.get(LIMIT), installed)
    wanted = _wanted(gpu, include, visible)
    base = {} if on_cpu else {"CUDA_DEVICE_ORDER": environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")}
    if gpus and on_cpu:
        base[LIMIT] = ""  # DeepSpeed's launcher replaced the user's "", which hides every device

    if was_launched(environ):
        _check_launch(wanted, visible, environ, launch)
        if not wanted:
            return Plan("train", environ=base)
    elif not on_cpu and not visible:
        raise UserError(f"{LIMIT}={user_limit} names no device of this machine, which has {_listed(installed)}")
    chosen = _choose(wanted, visible, installed, user_limit) if wanted else visible[:1]
    names = tuple(device.name for device in chosen)
    count = max(1, len(names))
    rank = int(environ["LOCAL_RANK"]) if was_launched(environ) else 0
    if rank >= count:
        return Plan("leave", names)
    if was_launched(environ) and count > local_ranks(environ):
        raise UserError(f"{count} devices for {local_ranks(environ)} ranks; let the launcher start {count} ranks")
    action = "train" if count == 1 or was_launched(environ) else "start"
    return Plan(action, names, ({LIMIT: ",".join(names)} if names else {}) | base | rank_environ(rank, count))


def visible_devices(limit: str | None, installed: Mapping[str, str]) -> list[Device]:
    """The devices CUDA_VISIBLE_DEVICES leaves, in its order.

    Args:
        limit: its value: numbers, UUIDs or their beginnings, with commas between; None sets no limit.
        installed: number -> UUID.

    Returns:
        The devices up to the first entry that names none, where CUDA stops reading, too.
    """
    everything = [Device(number, number, uuid) for number, uuid in installed.items()]
    if limit is None:
        return everything
    devices = []
    for name in (part.strip() for part in limit.split(",")):
        device = next((device for device in everything if _is(device, name)), None)
        if device is None and not (name.startswith(("GPU-", "MIG-")) and not all(installed.values())):
            break
        devices.append(Device(device.number, name, device.uuid) if device else Device(name, name, name))
    return devices


def installed_gpus() -> dict[str, str]:
    """Number -> UUID ("" if unknown) of this machine's GPUs and MIG instances, found without torch."""
    if tool := shutil.which("nvidia-smi"):
        try:
            listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
            return parse_listing(listing)
        except (OSError, subprocess.SubprocessError):
            pass  # a driver that does not answer: what the kernel shows is still there to be counted
    described = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))  # by PCI address, as nvidia-smi counts
    if described:
        uuids = [re.search(r"GPU UUID:\s*(GPU-\S+)", path.read_text()) for path in described]
        return {str(number): uuid.group(1) if uuid else "" for number, uuid in enumerate(uuids)}
    return {str(number): "" for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))}


def parse_listing(listing: str) -> dict[str, str]:
    """Number -> UUID from the text of `nvidia-smi -L`; a MIG instance stands under its UUID."""
    gpus = dict(re.findall(r"^GPU (\d+):(?:.*\(UUID: (GPU-[^)]+)\))?", listing, flags=re.MULTILINE))
    return gpus | {uuid: uuid for uuid in re.findall(r"\(UUID: (MIG-[^)]+)\)", listing)}


def _stand_ins(environ: Mapping[str, str]) -> dict[str, str]:
    """The devices DeepSpeed's launcher sees without a GPU: those it has just assigned, or LOCAL_SIZE of them."""
    if was_launched(environ) and environ.get(LIMIT):
        return dict.fromkeys(environ[LIMIT].split(","), "")
    return {str(number): "" for number in range(int(environ.get("LOCAL_SIZE") or 0))}


def _wanted(gpu: str | None, include: str | None, visible: list[Device]) -> tuple[str, ...]:
    """The devices the user names, in order; empty when none is named."""
    given = f"gpu = {gpu}" if gpu else f"include = {include}"
    if include:
        host, _, slots = include.partition(":")
        here = ("localhost", "127.0.0.1", socket.gethostname(), socket.gethostname().partition(".")[0])
        if host not in here or "@" in include:
            raise UserError(
                f"{given} names another machine; choose among several machines before the script: "
                f"deepspeed --hostfile FILE --include {include} launch/train.py"
            )
        if not slots:
            return tuple(device.number for device in visible)
        gpu = slots
    names = tuple(name.strip() for name in gpu.split(",")) if gpu else ()
    if not all(re.fullmatch(r"\d+|(GPU|MIG)-\S+", name) for name in names):
        raise UserError(f"{given} is not a list of devices; expected numbers with commas between, e.g. 0,1")
    if len(set(names)) < len(names):
        raise UserError(f"{given} names a device twice")
    return tuple(sorted(names, key=int)) if include and all(map(str.isdigit, names)) else names  # as DeepSpeed sorts


def _choose(
    wanted: tuple[str, ...], visible: list[Device], installed: Mapping[str, str], limit: str | None
) -> list[Device]:
    """The wanted devices; UserError for one that is not there or not allowed."""
    chosen = []
    for name in wanted:
        device = next((device for device in visible if name == device.name or _is(device, name)), None)
        if device is None and any(_is(Device(number, number, uuid), name) for number, uuid in installed.items()):
            raise UserError(f"device {name} is outside {LIMIT}={limit}; choose among {_listed(visible)}, or change it")
        if device is None:
            has = f"those that exist: {_listed(installed)}" if installed else "no GPU is visible; leave the choice out"
            raise UserError(f"device {name} does not exist: {has}{' to train on the CPU' if not installed else ''}")
        chosen.append(device)
    return chosen


def _check_launch(
    wanted: tuple[str, ...], visible: list[Device], environ: Mapping[str, str], launch: Launch | None
) -> None:
    """What only a process started by a launcher can get wrong."""
    nodes = int(environ.get("CROSS_SIZE", "1"))
    if wanted and (nodes > 1 or int(environ["WORLD_SIZE"]) > local_ranks(environ)):
        raise UserError(
            "with several machines devices are chosen before the script: "
            "deepspeed --hostfile FILE --include HOST:0,1@HOST:0,1 launch/train.py"
        )
    if launch is None:
        return
    before = next((option for option in launch.options if option.startswith(CHOOSING_OPTIONS)), None)
    if wanted and before:
        raise UserError(f"{before} before the script and device {','.join(wanted)} after it both choose; give one")
    if launch.limit is not None and launch.limit not in HIDE_ALL:
        allowed = launch.limit.split(",")
        outside = next((d for d in visible if not any(name == d.name or _is(d, name) for name in allowed)), None)
        if outside:
            raise UserError(f"device {outside.number} is outside {LIMIT}={launch.limit}; choose among {launch.limit}")


def _launch_of_parents() -> Launch | None:
    """Read DeepSpeed's command line and environment from /proc: it drops CUDA_VISIBLE_DEVICES beside --include."""
    try:
        starter = Path(f"/proc/{os.getppid()}")
        if b"deepspeed.launcher.launch" not in (starter / "cmdline").read_bytes():
            return None
        runner = Path("/proc") / (starter / "stat").read_text().rpartition(")")[2].split()[1]
        words = [word.decode() for word in (runner / "cmdline").read_bytes().split(b"\0")]
        variables = [line.decode() for line in (runner / "environ").read_bytes().split(b"\0")]
    except OSError:
        return None
    names = ("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")
    if not any(Path(word).name in names for word in words[:4]) or sys.argv[0] not in words:
        return None
    limit = dict(line.split("=", 1) for line in variables if "=" in line).get(LIMIT)
    return Launch(limit, tuple(words[: words.index(sys.argv[0])]))


def _is(device: Device, name: str) -> bool:
    """Whether a name means this device: its number, its UUID, or the beginning of its UUID."""
    return name == device.number or (name.startswith(("GPU-", "MIG-")) and device.uuid.startswith(name))


def _listed(devices: list[Device] | Mapping[str, str]) -> str:
    return ", ".join(getattr(device, "number", device) for device in devices) or "none"
