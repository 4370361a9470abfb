"""Ranks of one machine: their environment, a port no other run has, and starting one process per device.

Takes and gives environment variables, as DeepSpeed's launcher and torch read them. Does not know devices or torch.
"""

import atexit
import ctypes
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from sft.settings import UserError

LAUNCHER_PORT = "29500"  # DeepSpeed's launcher gives it to every run that names none
PARENT = "SFT_PARENT_PID"
POLL_S = 0.1
SETTLE_S = 10.0  # after a failure: time for the other ranks to say and save what they have
AFTER_RANK_0_S = 1.0  # rank 0 speaks for all: once it has failed, nobody is waited for
AGREE_S = 60.0
TAIL_LINES = 30
USER_ERROR = 2  # exit code of a user's mistake, reported by rank 0

_reserved: list[socket.socket] = []


def was_launched(environ: Mapping[str, str]) -> bool:
    """Whether a launcher has given this process its rank."""
    return all(key in environ for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def was_started_here() -> bool:
    """Whether this process comes from `start_ranks`; its environment is then complete."""
    return os.environ.get(PARENT) == str(os.getppid())


def local_ranks(environ: Mapping[str, str]) -> int:
    """Ranks on this machine, as a launcher states them."""
    return int(environ.get("LOCAL_SIZE") or environ.get("LOCAL_WORLD_SIZE") or environ["WORLD_SIZE"])


def processors() -> int:
    """What this process may use of the machine: those it is bound to, and no more than a container's quota grants."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min(bound, _granted_processors()))


def rank_environ(rank: int, count: int) -> dict[str, str]:
    """What a launcher sets for one of `count` processes on a single machine, address and port aside."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_SIZE": count, "LOCAL_WORLD_SIZE": count}
    return {key: str(value) for key, value in (values | {"CROSS_RANK": 0, "CROSS_SIZE": 1}).items()}


def ensure_rank() -> None:
    """Make this process the only rank unless a launcher gave it one: for trials and notebooks."""
    if not was_launched(os.environ):
        os.environ.update(rank_environ(0, 1))
        set_port()


def set_port() -> None:
    """Set MASTER_ADDR and MASTER_PORT; a port the user chose stays, the launcher's default is replaced.

    Raises:
        UserError: the ranks of this launch could not agree on a port.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    chosen = os.environ.setdefault("MASTER_PORT", LAUNCHER_PORT) != LAUNCHER_PORT
    if chosen or os.environ.get("CROSS_SIZE") != "1" or "TORCHELASTIC_RUN_ID" in os.environ:
        return  # several machines cannot see each other's free ports; torchrun's own store already listens
    os.environ["MASTER_PORT"] = reserve_port() if os.environ["WORLD_SIZE"] == "1" else _agreed_port()


def reserve_port() -> str:
    """A free port that no other run is given while this process lives."""
    holder = socket.socket()
    holder.bind(("", 0))
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after bind: torch may listen there, too
    _reserved.append(holder)
    return str(holder.getsockname()[1])


def start_ranks(count: int) -> int:
    """Run this very command once per device and wait for all of it.

    The environment of this process, set by the caller, is what the ranks share. Rank 0 has the terminal; what the
    others print is kept and shown when they fail. One failure ends all; signals are handed on.

    Args:
        count: number of ranks, at least 2.

    Returns:
        The exit code: the highest among the ranks that ended by themselves, 128 + n after signal n.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ["MASTER_PORT"] = reserve_port()
    logs = Path(tempfile.mkdtemp(prefix="sa2va-sft-ranks-"))
    processes: list[subprocess.Popen] = []
    received: list[int] = []

    def hand_on(number: int, _frame: object) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(number if len(received) == 1 else signal.SIGKILL)

    # What is ignored stays ignored: under nohup a closed terminal must not end the run.
    handled = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hand_on) for number in handled}
    try:
        for rank in range(count):
            if not received:
                processes.append(_start_rank(rank, count, logs))
        stopped = _wait(processes, received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    codes = {rank: process.returncode for rank, process in enumerate(processes) if rank not in stopped}
    codes = {rank: 128 - code if code < 0 else code for rank, code in codes.items()}
    if received:
        shutil.rmtree(logs)
        return 128 + received[0]
    _show_failures(codes, logs)
    return max(codes.values())


def _granted_processors(mounted: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Seconds of processor time that the process's control groups grant it per second; infinity without a quota.

    Args:
        mounted: where control groups of version 2 lie, and beneath `cpu` those of version 1.
        own: names the groups of this process; inside a container perhaps as the host knows them, and then they are not
            there: what the container has lies at the top.
    """
    granted = [math.inf]
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, group = line.split(":", 2)
        top = mounted / "cpu" if "cpu" in controllers.split(",") else mounted
        innermost = top / group.lstrip("/")
        for folder in (innermost, *innermost.parents):  # each of them may set a quota
            files = [folder / name for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
            match " ".join(file.read_text() for file in files if os.access(file, os.R_OK)).split():
                case [quota, period] if quota not in ("max", "-1"):
                    granted.append(int(quota) / int(period))
    return min(granted)


def _start_rank(rank: int, count: int, logs: Path) -> subprocess.Popen:
    """This command again, as one rank, in a session of its own: Ctrl-C reaches it once, through us."""
    environ = {**os.environ, **rank_environ(rank, count), PARENT: str(os.getpid())}
    command = [sys.executable, *sys.orig_argv[1:]]
    options = {"env": environ, "stdin": subprocess.DEVNULL, "start_new_session": True, "preexec_fn": _die_with_parent}
    if rank == 0:
        return subprocess.Popen(command, **options)
    with (logs / f"rank_{rank}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **options)


def _die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent is gone, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


def _wait(processes: list[subprocess.Popen], received: list[int]) -> set[int]:
    """Wait until all have ended; after a failure or a signal, stop the rest. Returns the ranks stopped."""
    escalation, stopped, since = [signal.SIGTERM, signal.SIGKILL], set(), None
    while any(process.poll() is None for process in processes):
        time.sleep(POLL_S)
        if since is None and (received or any(process.poll() for process in processes)):
            since = time.monotonic()
        patience_s = AFTER_RANK_0_S if processes[0].poll() and not stopped else SETTLE_S
        if since is not None and time.monotonic() - since > patience_s and escalation:
            number, since = escalation.pop(0), time.monotonic()
            alive = [rank for rank, process in enumerate(processes) if process.poll() is None]
            stopped.update(alive)
            for rank in alive:
                processes[rank].send_signal(number)
    return stopped


def _show_failures(codes: dict[int, int], logs: Path) -> None:
    """Show what failed ranks other than 0 wrote last, and keep it; without a crash nothing is left behind."""
    failed = [rank for rank, code in codes.items() if code]
    if failed == [] or codes.get(0) == USER_ERROR:  # rank 0 has printed the one line
        shutil.rmtree(logs)
        return
    for rank in failed:
        if rank > 0:
            log = logs / f"rank_{rank}.log"
            tail = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            print(f"rank {rank} ended with exit code {codes[rank]}; its last lines:", *tail, sep="\n", file=sys.stderr)
    print(f"the output of all ranks but 0 is kept in {logs}", file=sys.stderr)


def _agreed_port() -> str:
    """One free port for all ranks that a DeepSpeed launcher started here: rank 0 notes it, the others read it."""
    launcher = os.getppid()
    try:
        started = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        started = ""
    note = Path(tempfile.gettempdir()) / f"sa2va-sft-port-{os.getuid()}-{launcher}-{started}"
    if os.environ["RANK"] == "0":
        port, draft = reserve_port(), note.with_suffix(".draft")
        draft.write_text(port)
        draft.replace(note)
        atexit.register(note.unlink, missing_ok=True)
        return port
    for _ in range(int(AGREE_S / POLL_S)):
        if note.exists():
            return note.read_text()
        time.sleep(POLL_S)
    raise UserError(f"rank 0 noted no port in {note} within {AGREE_S:.0f} s; give the launcher --master_port NUMBER")
