"""Processes of trials: each a fork of one that has imported everything, which neither outlives nor takes along another.

The trials here have been trained to their end: what is left of them is one report.
"""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path

import psutil
import pytest
import small_sweeps as small

from tune import trials
from tune.fork_server import ENVIRONMENT, ForkServer

ROOT = Path(__file__).resolve().parents[1]
PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
LAST = {"epoch": 9, "dice_so_far": 0.9, "number": 0}
SERVER_WITHOUT_FORKS = """
import sys, torch
from multiprocessing.connection import Connection
torch.cuda._is_in_bad_fork = lambda: True
from tune.fork_server import serve
serve(Connection(int(sys.argv[1])))
"""
ACTOR = """
import sys, time
from tune.fork_server import ForkServer
def report(told):
    print(told["epoch"], flush=True)
    time.sleep(600)
ForkServer().run({"sweep": sys.argv[1], "number": 0, "cpus": 1, "began": time.time()}, report)
"""


@pytest.fixture
def place(tmp_path):
    """A trial that only has to report its last validation."""
    trials.write_sweep(tmp_path, small.sweep())
    rows = [0.1 * epoch for epoch in range(1, 10)]
    small.put(tmp_path, small.trial(0, rows, status="unfinished"))
    return {"sweep": str(tmp_path), "number": 0, "cpus": 1, "began": time.time()}


@pytest.fixture(scope="module")
def forks():
    """A server that finds this checkout, as those do that Ray's processes start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATHS)
        server = ForkServer()
        yield server
        server.close()


def process_of_trial(forks: ForkServer) -> psutil.Process:
    """The one child of the server."""
    (child,) = psutil.Process(forks._server.pid).children()
    return child


def test_a_trial_reports_from_a_process_that_ends_with_it(forks, place):
    seen, told = [], []

    def report(row):
        told.append(row)
        seen.append(process_of_trial(forks))
        assert trials.read(trials.folder_of(Path(place["sweep"]), 0)).status == "finished"

    forks.run(place, report)
    assert [row | {"dice_so_far": pytest.approx(0.9)} for row in told] == [LAST]
    assert forks.is_warm and not seen[0].is_running()


def test_the_next_trial_is_a_fork_of_the_same_server(forks, place):
    servers, processes = set(), set()

    def report(row):
        servers.add(forks._server.pid)
        processes.add(process_of_trial(forks).pid)

    forks.run(place, report)
    forks.run(place, report)
    assert len(servers) == 1 and len(processes) == 2


def test_a_trial_that_is_stopped_while_it_reports_is_gone_and_the_next_one_runs(forks, place):
    """Ray stops a trial by an exception in `report`: what it held of a GPU is free when the next one starts."""
    seen = []

    def stop(row):
        seen.append(process_of_trial(forks))
        raise SystemExit

    with pytest.raises(SystemExit):
        forks.run(place, stop)
    assert not seen[0].is_running() and forks.is_warm
    told = []
    forks.run(place, told.append)
    assert len(told) == 1


def test_what_a_trial_raises_is_told_with_its_traceback(forks, place):
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*train_trial.*trials/007"):
        forks.run(place | {"number": 7}, pytest.fail)
    forks.run(place, lambda row: None)


def test_a_trial_that_is_killed_is_told_and_leaves_the_server(forks, place):
    with pytest.raises(RuntimeError, match="its process ended with exit code -9"):
        forks.run(place, lambda row: process_of_trial(forks).kill())
    assert forks.is_warm
    forks.run(place, lambda row: None)  # the answer to the report of the one before is not taken for a trial


def test_where_the_server_is_killed_its_trial_fails_and_the_next_one_has_a_new_server(forks, place):
    def kill(row):
        os.kill(forks._server.pid, signal.SIGKILL)
        forks._server.wait()

    forks.run(place, lambda row: None)
    before = forks._server.pid
    with pytest.raises(RuntimeError, match="its process died"):
        forks.run(place, kill)
    assert not forks.is_warm
    forks.run(place, lambda row: None)
    assert forks._server.pid != before


def test_a_trial_does_not_outlive_the_process_it_reports_to(place):
    """Ray kills its processes: nobody would give their trials' GPUs back."""
    command = [sys.executable, "-c", ACTOR, place["sweep"]]
    actor = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": PATHS}, stdout=subprocess.PIPE, text=True)
    assert actor.stdout.readline() == "9\n"
    (server,) = psutil.Process(actor.pid).children()
    processes = [server, *server.children()]
    assert len(processes) == 2
    actor.kill()
    actor.wait()
    gone, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive


def test_where_a_fork_could_not_use_the_gpu_each_trial_has_a_process_of_its_own(place):
    forks, told = ForkServer(), []
    forks._connection, theirs = Pipe()
    with theirs:
        command = [sys.executable, "-c", SERVER_WITHOUT_FORKS, str(theirs.fileno())]
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": PATHS}
        forks._server = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
    try:
        forks.run(place, lambda row: told.append(process_of_trial(forks).cmdline()))
        assert "-m" in told[0] and "tune.fork_server" in told[0]  # not the server's command line
    finally:
        forks.close()
