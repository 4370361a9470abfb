"""gloo's threads at the end of a process: wait until they hold nothing of Python's any more.

A thread of gloo that has finished a collective tells whoever waits first and drops the collective's tensors afterwards,
and for that it needs the interpreter. If it is slow, the interpreter is ending by then, and the whole process aborts
("terminate called without an active exception", exit code 134, torch 2.11 and 2.13). Destroying the process group does
not help: DeepSpeed's engine still holds it. Takes nothing, gives nothing; Linux.
"""

import time
from pathlib import Path

THREADS = Path("/proc/self/task")
NAME = "pt_gloo_runloop"
POLL_S, AT_MOST_S = 0.02, 10.0


def wait_until_idle() -> None:
    """Returns once every gloo thread of this process has slept through a poll; at once if there is none."""
    before, end = None, time.monotonic() + AT_MOST_S
    while (now := _states()) and not (now == before and _all_sleep(now)) and time.monotonic() < end:
        time.sleep(POLL_S)  # without the interpreter: a thread that waits for it can go on
        before = now


def _states() -> dict[str, tuple[str, str]]:
    """Of each gloo thread: its state, and how often it has gone to sleep (a wait for the interpreter repeats)."""
    found = {}
    for folder in THREADS.iterdir() if THREADS.is_dir() else ():
        try:
            lines = (folder / "status").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # a thread that has ended meanwhile
            continue
        status = dict(line.split(":", 1) for line in lines)
        if status["Name"].strip() == NAME:
            found[folder.name] = status["State"].split()[0], status["voluntary_ctxt_switches"].strip()
    return found


def _all_sleep(states: dict[str, tuple[str, str]]) -> bool:
    return all(state == "S" for state, _ in states.values())
