"""Processes of trials: each a fork of one that has imported everything, which neither outlives nor takes along another.

The trials here have been trained to their end: what is left of them is one report.
"""

import os
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path

import psutil
import pytest
import small_sweeps as small

from tune import trials
from tune.fork_server import ENVIRONMENT, ForkServer, ForkSource

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
    for number in (0, 1):
        small.put(tmp_path, small.trial(number, rows, status="unfinished"))
    return {"sweep": str(tmp_path), "number": 0, "cpus": 1, "began": time.time()}


class Forks(ForkServer):
    """A server of its own, or one that a source has forked."""

    def __init__(self, source: ForkSource | None) -> None:
        super().__init__()
        self.source = source

    def run(self, place, report):
        super().run(place, report, self.source and self.source.address())

    @property
    def server(self) -> psutil.Process:
        if self._server is not None:
            return psutil.Process(self._server.pid)
        (server,) = psutil.Process(self.source._process.pid).children()
        return server

    @property
    def trial(self) -> psutil.Process:
        (trial,) = self.server.children()
        return trial


@pytest.fixture(scope="module")
def paths():
    """Processes find this checkout, as those do that Ray starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATHS)
        yield


@pytest.fixture(scope="module")
def source(paths):
    """A source, which ends with the module."""
    source = ForkSource(with_gpus=False)
    yield source
    end(source)


@pytest.fixture(scope="module", params=["own", "of a source"])
def forks(request, paths, source):
    """What stands in one of Ray's processes."""
    server = Forks(source if request.param == "of a source" else None)
    yield server
    server.close()


def end(source: ForkSource) -> None:
    """As when the process that has started it ends."""
    source._process.stdin.close()
    source._process.wait()


def test_a_trial_reports_from_a_process_that_ends_with_it(forks, place):
    seen, told = [], []

    def report(row):
        told.append(row)
        seen.append(forks.trial)
        assert trials.read(trials.folder_of(Path(place["sweep"]), 0)).status == "finished"

    forks.run(place, report)
    assert [row | {"dice_so_far": pytest.approx(0.9)} for row in told] == [LAST]
    assert forks.is_warm and not seen[0].is_running()


def test_the_next_trial_is_a_fork_of_the_same_server(forks, place):
    servers, processes = set(), set()

    def report(row):
        servers.add(forks.server.pid)
        processes.add(forks.trial.pid)

    forks.run(place, report)
    forks.run(place, report)
    assert len(servers) == 1 and len(processes) == 2


def test_a_trial_that_is_stopped_while_it_reports_is_gone_and_the_next_one_runs(forks, place):
    """Ray stops a trial by an exception in `report`: what it held of a GPU is free when the next one starts."""
    seen = []

    def stop(row):
        seen.append(forks.trial)
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
        forks.run(place, lambda row: forks.trial.kill())
    assert forks.is_warm
    forks.run(place, lambda row: None)  # the answer to the report of the one before is not taken for a trial


def test_where_the_server_is_killed_its_trial_fails_and_the_next_one_has_a_new_server(forks, place):
    def kill(row):
        server = forks.server
        server.kill()
        server.wait()

    forks.run(place, lambda row: None)
    before = forks.server.pid
    with pytest.raises(RuntimeError, match="its process died"):
        forks.run(place, kill)
    assert not forks.is_warm
    forks.run(place, lambda row: None)
    assert forks.server.pid != before


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
    forks, told = Forks(None), []
    forks._connection, theirs = Pipe()
    with theirs:
        command = [sys.executable, "-c", SERVER_WITHOUT_FORKS, str(theirs.fileno())]
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": PATHS}
        forks._server = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
    try:
        forks.run(place, lambda row: told.append(forks.trial.cmdline()))
        assert "-m" in told[0] and "tune.fork_server" in told[0]  # not the server's command line
    finally:
        forks.close()


LOOK = """
import os, torch
from tune import trial_run
def look(report, **place):
    report({"name": os.environ.get("NAME"), "directory": os.getcwd(), "threads": torch.get_num_threads()})
trial_run.train_trial = look
"""


def test_a_trial_from_a_source_has_the_environment_of_who_asked_and_not_the_sources(tmp_path, monkeypatch, paths):
    """Ray tells a trial its GPUs and its cores in the environment of the process that stands for it."""
    told = []
    (tmp_path / "sitecustomize.py").write_text(LOOK)
    monkeypatch.setenv("NAME", "source")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), PATHS]))
    source = ForkSource(with_gpus=False)
    for name, threads in (("one", "1"), ("other", "2")):
        monkeypatch.setenv("NAME", name)
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        monkeypatch.chdir(tmp_path)
        forks = ForkServer()
        forks.run({}, told.append, source.address())
        forks.close()
    end(source)
    expected = {"directory": str(tmp_path)}
    assert told == [{"name": "one", "threads": 1} | expected, {"name": "other", "threads": 2} | expected]


def test_two_processes_have_servers_of_their_own_from_one_source(place, paths):
    source = ForkSource(with_gpus=False)
    first, second = Forks(source), Forks(source)

    def report(row):
        assert len(psutil.Process(source._process.pid).children()) == 2

    first.run(place, lambda row: second.run(place | {"number": 1}, report))
    first.close()
    second.close()
    end(source)


def test_where_the_source_is_gone_the_server_imports_for_itself(place, paths):
    source, told = ForkSource(with_gpus=False), []
    source._process.kill()
    source._process.wait()
    forks = Forks(source)
    forks.run(place, told.append)
    assert len(told) == 1 and forks._server is not None
    forks.close()


def test_a_source_neither_outlives_its_process_nor_takes_trials_along(place, paths):
    source = ForkSource(with_gpus=False)
    forks, told = Forks(source), []

    def report(row):
        end(source)
        told.append(row)

    forks.run(place, report)
    assert len(told) == 1 and forks.is_warm
    forks.close()
