"""Kills parts of a sweep with SIGKILL, continues it, and tells what was lost; one line a round, a summary at the end.

Usage: python tests/sweep_drill.py [--rounds 10] [--kinds driver trial actor node] [--folder DIR] [--seed 0]

A round: a sweep of small trials on this machine (`node`: on a Ray cluster of two nodes started here); after a random
number of validations the driver, one trial's process, Ray's process for it (`actor`) or the second node is killed; a
driver is started again with --resume. Lost is what an ended trial no longer has, and of a running one the epochs that
it trains a second time.
"""

import argparse
import contextlib
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
EPOCHS, TRIALS = 9, 5
KEPT = {"model_path", "data_root", "val_list", "lora_rank", "lora_alpha", "lora_dropout", "learning_rate", "precision"}
KEPT |= {"num_epochs", "batch_size", "val_batch_size", "seg_rate_samples", "gradient_checkpointing", "num_workers"}
SPACE = "lora_rank: {choice: [2, 4, 8]}\nlearning_rate: {loguniform: [1.0e-3, 3.0e-2]}\n"
LIMIT_S = 600
ACTOR_TITLE = "ray::ImplicitFunc"  # what Ray calls its process for a trial
FORK_SERVER = "tune.fork_server"  # in the command line of a node's source, of the servers it forks, and of their trials


def main() -> int:
    """Runs the rounds; returns 1 if anything finished was lost, or a running trial lost more than one epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--kinds", nargs="+", default=["driver", "trial", "actor", "node"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="sweep_drill_"))
    write_inputs(folder)
    draw, rounds = random.Random(options.seed), []
    for number in range(options.rounds):
        kind = options.kinds[number % len(options.kinds)]
        rounds.append(drill(folder, kind, f"{kind}_{number}", draw.randint(1, EPOCHS * 2)))
        print(f"round {number}: {' | '.join(f'{name} {value}' for name, value in rounds[-1].items())}", flush=True)
    lost = sum(row["finished lost"] for row in rounds)
    most = max(row["epochs again, at most"] for row in rounds)
    print(f"{len(rounds)} rounds: finished trials lost {lost}; epochs of a running trial trained again: at most {most}")
    if options.folder is None:
        shutil.rmtree(folder)
    return int(lost > 0 or most > 1)


def write_inputs(folder: Path) -> None:
    """The model, the data, config.yaml and space.yaml of the sweeps, where they are not there yet."""
    import small_runs

    if (folder / "space.yaml").exists():
        return
    settings = vars(small_runs.settings(small_runs.write_inputs(folder / "inputs"), folder, num_epochs=EPOCHS))
    kept = {name: value for name, value in settings.items() if name in KEPT} | {"tensorboard": False}
    (folder / "config.yaml").write_text(yaml.safe_dump(kept))
    (folder / "space.yaml").write_text(SPACE)


def drill(folder: Path, kind: str, name: str, after: int) -> dict:
    """One round.

    Args:
        folder: see `write_inputs`.
        kind: driver, trial, actor or node.
        name: of the sweep.
        after: validations before the kill.
    """
    sweep, cluster = folder / "sweeps" / name, None
    environment = os.environ | environment_of(folder)
    command = ["--config", str(folder / "config.yaml"), "--space", str(folder / "space.yaml"), "--name", name]
    command += ["--num_trials", str(TRIALS), "--storage_path", str(sweep.parent)]
    if kind == "node":
        cluster = Cluster(environment)
        command += ["--address", cluster.address]
    try:
        driver = start(command, environment, sweep)
        wait_for(lambda: validations(sweep) >= after or driver.poll() is not None, "validations")
        before, told = state(sweep), {name: len(text) for name, text in logs(sweep).items()}
        victim = kill(kind, driver, cluster)
        if kind != "driver":
            driver.wait(timeout=LIMIT_S)
        again = 0 if finished(sweep) else 1
        if again:
            extra = ["--address", cluster.address] if cluster else []
            wait_for(lambda: not ray_of(driver.pid), "Ray to end with its driver")
            start(["--resume", str(sweep), *extra], environment, sweep).wait(timeout=LIMIT_S)
        return {
            "killed": f"{kind} {victim} after {sum(len(rows) for rows, _ in before.values())} validations"
        } | losses(before, told, sweep)
    finally:
        if cluster:
            cluster.stop()


def environment_of(folder: Path) -> dict[str, str]:
    """What a sweep's processes are given: a cache of their own, and Ray's password for both nodes and the driver."""
    ours = {"SA2VA_SFT_CACHE": str(folder / "cache"), "RAY_USAGE_STATS_ENABLED": "0"}
    return ours | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def start(command: list[str], environment: dict, sweep: Path) -> subprocess.Popen:
    """Starts tune/search.py; its output is kept beside the sweep."""
    sweep.parent.mkdir(parents=True, exist_ok=True)
    with (sweep.parent / f"{sweep.name}.log").open("a") as log:
        whole = [sys.executable, str(ROOT / "tune" / "search.py"), *command]
        return subprocess.Popen(whole, env=environment, stdout=log, stderr=subprocess.STDOUT)


def kill(kind: str, driver: subprocess.Popen, cluster: "Cluster | None") -> str:
    """Kills what the round is about; gives its name."""
    match kind:
        case "driver":
            os.kill(driver.pid, signal.SIGKILL)
            driver.wait()
            return str(driver.pid)
        case "trial" | "actor":
            wait_for(lambda: processes_of(kind, driver.pid) or driver.poll() is not None, "trial")
            victims = processes_of(kind, driver.pid)
            if not victims:
                return "none: all have ended"
            victims[0].kill()
            return str(victims[0].pid)
        case "node":
            return cluster.kill_second()
        case _:
            raise ValueError(f"{kind}: expected driver, trial, actor or node")


class Cluster:
    """Two Ray nodes of one core each on this machine, beside any other."""

    def __init__(self, environment: dict) -> None:
        self._folder, self._environment = tempfile.mkdtemp(prefix="drill_ray_"), environment
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        port = self.address.partition(":")[2]
        self._start("--head", f"--port={port}", f"--temp-dir={self._folder}", "--include-dashboard=false")
        first = self._raylets()
        self._start(f"--address={self.address}")
        (self._second,) = self._raylets() - first

    def kill_second(self) -> str:
        """Kills the second node: its raylet, and with it its workers."""
        os.kill(self._second, signal.SIGKILL)
        return str(self._second)

    def stop(self) -> None:
        """Ends both, and nothing else."""
        subprocess.run(["pkill", "-KILL", "-f", self._folder])
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, *words: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", *words]
        subprocess.run(command, env=self._environment, check=True, capture_output=True, timeout=LIMIT_S)

    def _raylets(self) -> set[int]:
        done = subprocess.run(["pgrep", "-f", f"raylet/raylet .*{self._folder}"], capture_output=True, text=True)
        return set(map(int, done.stdout.split()))


def state(sweep: Path) -> dict[str, tuple[list[str], str]]:
    """Trial -> its validations, and its outcome ("" while it runs)."""
    found = {}
    for folder in sorted((sweep / "trials").glob("*/")):
        rows, outcome = folder / "validations.jsonl", folder / "outcome.json"
        lines = rows.read_text().splitlines() if rows.exists() else []
        found[folder.name] = lines, outcome.read_text() if outcome.exists() else ""
    return found


def logs(sweep: Path) -> dict[str, str]:
    """Trial -> what its runs have told."""
    folders = sorted((sweep / "trials").glob("*/"))
    return {one.name: "".join(path.read_text() for path in one.glob("lora_sft_*/training.log")) for one in folders}


def losses(before: dict[str, tuple[list[str], str]], told: dict[str, int], sweep: Path) -> dict:
    """What is no longer there, was done twice, or has failed, after all trials have ended.

    Args:
        before: `state` when something was killed.
        told: length of each trial's `logs` then: a trial may have waited, and gone on, before.
        sweep: its folder.
    """
    after, later = state(sweep), logs(sweep)
    gone = sum(after.get(name) != (rows, outcome) for name, (rows, outcome) in before.items() if outcome)
    lost_rows = sum(after[name][0][: len(rows)] != rows for name, (rows, _) in before.items())
    failed = sum('"failed"' in outcome for _, outcome in after.values())
    again = [0]
    for name, (rows, outcome) in before.items():
        log = later[name][told[name] :]
        resumed = [int(epoch) for epoch in re.findall(r"^Resumed after epoch (\d+)", log, re.MULTILINE)]
        if not outcome and rows and resumed:
            again.append(len(rows) - resumed[0])
        if not outcome and rows and not resumed and "Gradient check" in log:
            again.append(len(rows))
    return {
        "finished before": sum(bool(outcome) for _, outcome in before.values()),
        "finished lost": gone + lost_rows + failed,
        "epochs again, at most": max(again),
        "ended after": sum(bool(outcome) for _, outcome in after.values()),
        "of": TRIALS,
    }


def finished(sweep: Path) -> bool:
    """Whether every trial has an outcome."""
    found = state(sweep)
    return len(found) == TRIALS and all(outcome for _, outcome in found.values())


def validations(sweep: Path) -> int:
    """Validations of all trials so far."""
    return sum(len(rows) for rows, _ in state(sweep).values())


def processes_of(kind: str, driver: int) -> list[psutil.Process]:
    """Trials of this driver alone, or Ray's processes for them: other sweeps may run on the machine."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(driver).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                line = (process, *process.parents()[:2])
                is_fork = all(FORK_SERVER in one.cmdline() for one in line)
                if is_fork if kind == "trial" else "".join(process.cmdline()).startswith(ACTOR_TITLE):
                    found.append(process)
    return found


def ray_of(driver: int) -> list[int]:
    """Children of a driver that are still there."""
    return [
        int(pid) for pid in subprocess.run(["pgrep", "-P", str(driver)], capture_output=True, text=True).stdout.split()
    ]


def wait_for(condition, what: str) -> None:
    """Polls until something holds."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"no {what} within {LIMIT_S} s")
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
