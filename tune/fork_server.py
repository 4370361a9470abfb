"""A process for each trial that starts at once: a fork of one that has imported torch and all the rest.

Each node has a `ForkSource`, whose process runs `serve_node`: it imports everything while no trial holds a device yet.
In the process that Ray keeps for trials stands a `ForkServer`; what it gets from there, or starts where there is no
source, runs `serve`, which forks for each trial that comes, one at a time. A fork ends with its trial, and with it goes
whatever it held of a GPU. Knows neither settings nor results: it hands on what a trial reports.
"""

import contextlib
import json
import os
import queue
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

# torch counts GPUs without touching CUDA, which a fork could not use after that.
ENVIRONMENT = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
FOR_NODE = "node"  # in place of a trial, in the command line of a source's process


class ForkSource:
    """A process that has imported everything, and forks a server for whoever asks; it ends with this one.

    Args:
        with_gpus: whether trials have GPUs: what is imported looks once whether there are any.
    """

    def __init__(self, with_gpus: bool) -> None:
        self._address = f"\0sa2va-sft-{secrets.token_hex(8)}"  # of Linux's abstract names, which leave no file
        environ = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        environ |= ENVIRONMENT if with_gpus else ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}
        with socket.socket(socket.AF_UNIX) as asked:
            asked.bind(self._address)
            asked.listen(128)
            command = [sys.executable, "-m", __name__, str(asked.fileno()), FOR_NODE]
            self._process = subprocess.Popen(
                command, env=environ, pass_fds=[asked.fileno()], stdin=subprocess.PIPE, start_new_session=True
            )

    def address(self) -> str:
        """The socket at which it is asked, for `ForkServer.run`; before it has imported everything, too."""
        return self._address


class ForkServer:
    """Starts the server with the first trial; this process runs one trial at a time."""

    def __init__(self) -> None:
        self._server: subprocess.Popen | None = None
        self._connection: Connection | None = None

    @property
    def is_warm(self) -> bool:
        """Whether the next trial is forked from a server that is there; of one that is not, the end can be read."""
        return self._connection is not None and not self._connection.poll()

    def run(self, place: dict[str, Any], report: Callable[[dict[str, Any]], None], source: str | None = None) -> None:
        """Runs one trial to its end in a process of its own, which is killed when `report` raises.

        Args:
            place: keyword arguments of `tune.trial_run.train_trial`, which JSON can hold.
            report: gets what the trial reports, while the trial waits.
            source: a `ForkSource`'s address; None, or nobody there: a server of its own imports everything.

        Raises:
            RuntimeError: the trial raised something, with its traceback, or its process died.
        """
        if not self.is_warm:
            self._start(source)
        pid, failed = None, ""
        try:
            self._connection.send(place)
            while True:
                match self._connection.recv():
                    case "started", pid:
                        pass
                    case "report", told:
                        report(told)
                        self._connection.send(None)
                    case "failed", failed:
                        pass
                    case "ended", code:
                        pid = None
                        if failed or code:
                            raise RuntimeError(failed or f"its process ended with exit code {code}")
                        return
        except (EOFError, ConnectionError) as error:
            raise RuntimeError("its process died") from error
        finally:
            if pid is not None:
                self._kill(pid)

    def close(self) -> None:
        """Ends the server, and a trial that runs."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._server is not None:
            self._server.wait()
            self._server = None

    def _start(self, source: str | None) -> None:
        self.close()
        self._connection = _ask(source) if source else None
        if self._connection is not None:
            return
        self._connection, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno())]
            self._server = subprocess.Popen(
                command, env=os.environ | ENVIRONMENT, pass_fds=[theirs.fileno()], start_new_session=True
            )

    def _kill(self, pid: int) -> None:
        """Ends a trial before its time; the server stays."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(EOFError, ConnectionError):
            while self._connection.recv()[0] != "ended":
                pass


def _ask(source: str) -> Connection | None:
    """A server forked for this process, with its environment; None where nobody answers."""
    try:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(source)
            if not _is_ours(asking):
                return None
            connection = Connection(asking.detach())
        connection.send((dict(os.environ), os.getcwd()))
    except OSError:
        return None
    return connection


def serve_node(asked: socket.socket) -> None:
    """Forks a server for each process that asks, until the one that started this process is gone.

    Args:
        asked: listens.
    """
    _import_everything()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for servers
    while sys.stdin not in select.select([asked, sys.stdin], [], [])[0]:
        asking, _ = asked.accept()
        with asking:
            if _is_ours(asking):
                _forked(lambda asking=asking: _serve_one(Connection(asking.detach()), asked))


def _is_ours(peer: socket.socket) -> bool:
    """Whether the process at the other end is of the same user: what comes from it is code."""
    told = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", told)[1] == os.getuid()


def _serve_one(connection: Connection, asked: socket.socket) -> int:
    import torch

    asked.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    with contextlib.suppress(EOFError, ConnectionError):
        environ, directory = connection.recv()
        os.environ.clear()
        os.environ.update(environ | ENVIRONMENT)
        os.chdir(directory)
        if threads := environ.get("OMP_NUM_THREADS"):  # read when it was loaded
            torch.set_num_threads(int(threads))
        serve(connection)
    return 0


def _import_everything() -> None:
    """What a fork need not import."""
    import sft.train  # noqa: F401
    import tune.trial_run  # noqa: F401


def serve(connection: Connection) -> None:
    """Forks for each trial that comes, until the other end is closed.

    Where importing has touched CUDA all the same, a trial gets a process that imports anew.
    """
    import torch

    _import_everything()
    may_fork = _exit_code(_forked(lambda: int(torch.cuda._is_in_bad_fork()))) == 0
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            place = connection.recv()
            if place is None:  # the answer to a report of a trial that has died meanwhile
                continue
            if may_fork:
                pid = _forked(lambda place=place: train(connection, place))
            else:
                command = [sys.executable, "-m", __name__, str(connection.fileno()), json.dumps(place)]
                pid = subprocess.Popen(command, pass_fds=[connection.fileno()]).pid
            connection.send(("ended", _exit_code(pid)))


def train(connection: Connection, place: dict[str, Any]) -> int:
    """One trial, in the process that ends with it; returns the exit code."""
    from tune.trial_run import train_trial

    answers: queue.SimpleQueue[None] = queue.SimpleQueue()
    connection.send(("started", os.getpid()))
    threading.Thread(target=_listen, args=(connection, answers), daemon=True).start()

    def report(told: dict[str, Any]) -> None:
        connection.send(("report", told))
        answers.get()

    try:
        train_trial(**place, report=report)
    except Exception:
        connection.send(("failed", traceback.format_exc()))
        return 1
    return 0


def _listen(connection: Connection, answers: queue.SimpleQueue) -> None:
    """Hands on what comes; a trial does not outlive the process that it reports to."""
    try:
        while True:
            answers.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)


def _forked(function: Callable[[], int]) -> int:
    """Runs a function in a fork that ends with it; the process's number."""
    pid = os.fork()
    return pid or _end_with(function)


def _end_with(function: Callable[[], int]) -> NoReturn:
    """Ends the process without what the server, whose copy it is, registered for its own end."""
    code = 1
    try:
        code = function()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    if sys.argv[2:] == [FOR_NODE]:
        serve_node(socket.socket(fileno=int(sys.argv[1])))
        sys.exit()
    end = Connection(int(sys.argv[1]))
    if len(sys.argv) > 2:
        _end_with(lambda: train(end, json.loads(sys.argv[2])))
    serve(end)
