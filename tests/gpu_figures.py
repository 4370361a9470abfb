"""Runs one command of gpu_figures.sh under a time limit and keeps its figures while it runs.

Usage: python3 tests/gpu_figures.py OUT NAME SECONDS [--read FILE] -- COMMAND...
       python3 tests/gpu_figures.py OUT NAME --skip REASON
NAME is PART or PART:CHOICE; PART decides what is read out of FILE (see gpu_readers.py), a pattern of which the newest
match counts. Every figure is a row of OUT/figures.json and of the table in OUT/figures.md; a row replaces an earlier
one of the same NAME and words. Output goes to FIGURES_FOLDER/logs, which is packed as OUT/logs.tar.gz each time. SHAPE
says which model is measured. Standard library alone.
"""

import argparse
import contextlib
import glob
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path

from gpu_readers import READERS, Call, Figure

HEADS = ("part", "what", "target", "measured", "command", "GPU", "date")
LOOK_EVERY_S = 1.0
PATIENCE_S = 15.0  # between asking a command to end and ending it
TIMED_OUT = 124  # as coreutils' timeout says it
PACKED_BYTES = 2 * 2**20  # of a log, its end: the archive stays below what may come back


class Table:
    """The rows of one OUT, and its three files."""

    def __init__(self, out: Path, name: str, command: str):
        self._out, self._name, self._logs = out, name, Path(os.environ["FIGURES_FOLDER"]) / "logs"
        self._about = {"command": command, "GPU": gpu_name(), "date": time.strftime("%Y-%m-%d %H:%M")}

    def put(self, figures: list[Figure]) -> None:
        """Adds or replaces rows and writes everything; a file appears whole or not at all."""
        file = self._out / "figures.json"
        rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        for figure in figures:
            new = {"part": self._name, "what": figure.what, "target": figure.target, "measured": figure.measured}
            new |= self._about | {"value": figure.value, "met": figure.met, "details": figure.details}
            place = next((number for number, row in enumerate(rows) if _same(row, new)), len(rows))
            rows[place : place + 1] = [new]
        for name, text in (("figures.json", json.dumps(rows, indent=2) + "\n"), ("figures.md", markdown(rows))):
            _replace(self._out / name, text.encode())
        _replace(self._out / "logs.tar.gz", packed(self._logs))


def markdown(rows: list[dict]) -> str:
    """The table, and below it what does not fit into a cell."""
    lines = ["| " + " | ".join(HEADS) + " |", "|" + " --- |" * len(HEADS)]
    for row in rows:
        cells = {head: str(row[head]).replace("|", "\\|").replace("\n", " ") or "-" for head in HEADS}
        cells["command"] = f"`{cells['command']}`"
        lines.append("| " + " | ".join(cells.values()) + " |")
    for row in rows:
        if row["details"]:
            lines += ["", f"{row['part']}: {row['what']}", "", "```text", *row["details"], "```"]
    return "\n".join(lines) + "\n"


def packed(folder: Path) -> bytes:
    """A .tar.gz of the files of a folder, of long ones the end."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            content = file.read_bytes()[-PACKED_BYTES:]
            entry = tarfile.TarInfo(str(file.relative_to(folder)))
            entry.size, entry.mtime = len(content), int(file.stat().st_mtime)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def gpu_name() -> str:
    """Of all GPUs here, as nvidia-smi names them."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
        names = [name.strip() for name in names if name.strip()]
        if names:
            return f"{len(names)} x {names[0]}"
    return "none (CPU)"


def main() -> int:
    """Runs the command; returns its exit code, or 124 where the time was up."""
    own, command = sys.argv[1:], []
    if "--" in own:
        own, command = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("name")
    parser.add_argument("seconds", type=float, nargs="?", default=0.0)
    parser.add_argument("--read", help="the file with the figures, or a pattern")
    parser.add_argument("--skip", help="why nothing is run")
    arguments = parser.parse_args(own)
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = Table(arguments.out, arguments.name, shown(command))
    if arguments.skip:
        table.put([Figure("the whole command", None, note=f"not run: {arguments.skip}")])
        print(f"   {arguments.name}: not run: {arguments.skip}", flush=True)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TIMED_OUT))  # the command must not outlive this
    return follow(command, table, arguments)


def follow(command: list[str], table: Table, arguments: argparse.Namespace) -> int:
    """The command until it ends or its time is up; its rows whenever its file has changed."""
    log = Path(os.environ["FIGURES_FOLDER"]) / "logs" / f"{re.sub(r'[^a-zA-Z0-9]+', '_', arguments.name)}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"== {arguments.name}: {shown(command)}", flush=True)
    started, code = time.monotonic(), None
    before = seen = stamp(arguments.read)  # of an earlier call: not this one's figures
    on_gpu = gpu_name() != "none (CPU)"
    reader = READERS.get(arguments.name) or READERS.get(arguments.name.partition(":")[0])

    def figures(exit_code: int | None) -> list[Figure]:
        if reader is None or stamp(arguments.read) in (before, None):
            return []
        return read(reader, arguments.read, Call(time.monotonic() - started, exit_code, os.environ["SHAPE"], on_gpu))

    with (
        open(log, "wb") as opened,
        subprocess.Popen(
            command, stdout=opened, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        ) as process,
    ):
        try:
            while code is None and time.monotonic() - started < arguments.seconds:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(LOOK_EVERY_S)
                if code is None and (changed := stamp(arguments.read)) != seen:
                    seen = changed
                    table.put(figures(None))
        finally:
            end(process)
    seconds = time.monotonic() - started
    ended = "time is up" if code is None else f"exit code {code}"
    last = [f"; {line.strip()}" for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
    whole = Figure("the whole command", seconds, "s", note=ended + ("".join(last)[:300] if code != 0 else ""))
    table.put([*figures(TIMED_OUT if code is None else code), whole])
    print(f"   {whole.measured}", flush=True)
    return TIMED_OUT if code is None else code


def read(reader: Callable[..., Iterator[Figure]], pattern: str, call: Call) -> list[Figure]:
    """Figures of the newest file of a pattern; none while it is half written."""
    file = newest(pattern)
    try:
        text = file.read_text(encoding="utf-8")
        return list(reader(ElementTree.fromstring(text) if file.suffix == ".xml" else json.loads(text), call))
    except (json.JSONDecodeError, ElementTree.ParseError):
        return []
    except Exception as error:  # the command goes on: its file can be read by hand
        print(f"   {file.name} is not understood: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return []


def newest(pattern: str | None) -> Path | None:
    """The file that changed last."""
    files = [Path(name) for name in glob.glob(pattern or "")]
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


def stamp(pattern: str | None) -> tuple | None:
    """Changes whenever the newest file does."""
    file = newest(pattern)
    return (file, file.stat().st_mtime_ns, file.stat().st_size) if file else None


def end(process: subprocess.Popen) -> None:
    """Ends the command's whole group, if it runs still: first asked, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_S)


def shown(command: list[str]) -> str:
    """For somebody else to type."""
    return shlex.join(command).replace(os.environ["FIGURES_FOLDER"], "DIR")


def _same(row: dict, other: dict) -> bool:
    return (row["part"], row["what"]) == (other["part"], other["what"])


def _replace(file: Path, content: bytes) -> None:
    partial = Path(os.environ["FIGURES_FOLDER"]) / f"{file.name}.partial"
    partial.write_bytes(content)
    try:
        os.replace(partial, file)
    except OSError:  # another file system
        file.write_bytes(content)
        partial.unlink()


if __name__ == "__main__":
    sys.exit(main())
