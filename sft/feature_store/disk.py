"""A store on the disk, shared by ranks, trials and runs: a folder with one file per entry.

`ROOT/v1-SCOPE/KEY.safetensors`: the scope names what all entries have in common (encoder weights, preprocessing, data
type), so that what belongs to one model is listed and deleted at once. Any number of processes may read and fill the
same folder. A file appears under its name only when it is whole; what a killed process left half written is removed
when it is an hour old. It may be deleted at any time, even in use: what is gone is computed again.
"""

import contextlib
import errno
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft.feature_store.entry import FORMAT, DamagedError, Entry, Packed, pack, read, write
from sft.settings import UserError

ENDING, PARTIAL, ABOUT = ".safetensors", ".partial", "about.json"
LEGAL_NAME = re.compile(r"[A-Za-z0-9_-]{1,120}")
LEFT_OVER_AFTER_S = 3600
WRITERS, WRITES_AHEAD = 4, 16
BY_USER = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
README = """\
This folder is a cache of sa2va-sft. It holds what the frozen encoders of a model compute from images, so that it is
computed once and not in every epoch, run and trial. There is one folder per model and preprocessing; its about.json
says which. Deleting one of them, or all, is safe at any time and loses nothing but the time to compute it again:

    rm -r NAME_OF_THE_FOLDER

Nothing here is deleted by itself.
"""


@dataclass(frozen=True)
class Listed:
    """One store of a root folder."""

    folder: Path
    entries: int
    bytes: int
    last_used: float  # seconds since 1970
    about: dict[str, Any]


class DiskStore:
    """Entries as files of one folder.

    Args:
        root: the folder of all stores, made if need be; see `cache_directory`.
        scope: name of this store.
        about: what a person would want to know of it, written to about.json.
        pin: whether what is read lies in pinned memory.

    Raises:
        UserError: the folder cannot be made, or not be written where it is new.
    """

    def __init__(self, root: Path, scope: str, about: Mapping[str, Any], pin: bool = False):
        self._root, self._name, self._about, self._pin = Path(root), _legal(f"v{FORMAT}-{scope}"), dict(about), pin
        self.folder = self._root / self._name
        self.rejected: tuple[str, ...] = ()  # files that were not used or not written, and why
        self._unusable: set[str] = set()  # keys whose damaged file could not be removed
        self._checked: set[tuple[str, int, int]] = set()
        self._waiting: dict[str, Packed] = {}  # put, not yet written
        self._failure: Exception | None = None
        self._untold: Exception | None = None  # of an entry that stays in memory
        self._room_to_wait = threading.Semaphore(WRITES_AHEAD)
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        self._writes: set[Future] = set()  # not done
        self._lock = threading.Lock()  # of what several threads change
        self._stream: torch.cuda.Stream | None = None
        with self._users_mistakes():
            self._make_folder()

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Keys without a file at this moment, in order, each once; whether a file is whole shows when it is read."""
        there = set(self._waiting)
        with self._users_mistakes(), contextlib.suppress(FileNotFoundError):  # deleted since: all are missing
            names = os.listdir(self.folder)
            there |= {name.removesuffix(ENDING) for name in names if name.endswith(ENDING)} - self._unusable
        return [key for key in dict.fromkeys(keys) if key not in there]

    def put(self, key: str, entry: Entry) -> None:
        """Copies an entry to host memory and has it written; waits only where many are waiting already.

        Raises:
            UserError: the disk is full or not writable, for this entry or one before. What is there stays.
        """
        self._raise_failure()
        packed = pack(entry)
        self._room_to_wait.acquire()
        self._have_written(key, packed, kept=False)

    def put_kept(self, key: str, packed: Packed) -> None:
        """Has an entry written that stays in its memory, a GPU's or the host's; copies nothing and waits for nothing.

        Once the disk is full, the rest is not tried: `rejected` tells, and `flush` raises.
        """
        self._have_written(key, packed, kept=True)

    def at_once(self, key: str, device: torch.device) -> None:
        """Never anything: it is in no device's memory."""

    def read_packed(self, key: str) -> Packed | None:
        """An entry in one piece, in host memory of its own; see `read`."""
        if (packed := self._waiting.get(key)) is not None:
            return packed
        path = self._path(key)
        try:
            with self._users_mistakes():
                status = path.stat()
                seen = (key, status.st_ino, status.st_mtime_ns)
                packed = read(path, self._name, key, check=seen not in self._checked, pin=self._pin)
        except FileNotFoundError:
            return None
        except (DamagedError, OSError) as error:  # a file system's error while reading, e.g. a broken disk's
            self._reject(path, key, str(error))
            return None
        self._checked.add(seen)
        return packed

    def read(self, key: str) -> Entry | None:
        """An entry's tensors in host memory; None where there is none or it is damaged, which `rejected` tells.

        Raises:
            UserError: the file may not be read.
        """
        packed = self.read_packed(key)
        return packed.entry() if packed else None

    def settle(self) -> None:
        """Returns once nothing is being written any more; raises as `put` does, of what is not kept elsewhere."""
        wait(list(self._writes))
        self._raise_failure()

    def flush(self) -> None:
        """Returns once everything put is on its way to the disk and visible to others; raises as `put` does."""
        self.settle()
        if self._untold:
            raise self._untold

    def close(self, at_most_s: float | None = None) -> None:
        """Writes what is waiting and stops the threads; raises as `put` does, of what is not kept elsewhere.

        Args:
            at_most_s: what has not begun to be written by then is left unwritten.
        """
        wait(list(self._writes), at_most_s)
        self._writers.shutdown(cancel_futures=True)
        self._writes.clear()  # to wait for one that was cancelled would take for ever
        self._raise_failure()

    def _path(self, key: str) -> Path:
        return self.folder / (_legal(key) + ENDING)

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path, text in (
            (self._root / "README", README),
            (self.folder / ABOUT, json.dumps(self._about, indent=2, default=str) + "\n"),
        ):
            if not path.exists():
                _replace(path, lambda partial, text=text: partial.write_text(text, encoding="utf-8"))
        with contextlib.suppress(PermissionError):  # another user's store may be read
            os.utime(self.folder / ABOUT)  # "last used" in the list of stores
            for partial in self.folder.glob(f".*{PARTIAL}"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - partial.stat().st_mtime > LEFT_OVER_AFTER_S:
                        partial.unlink()

    def _have_written(self, key: str, packed: Packed, *, kept: bool) -> None:
        path = self._path(key)
        self._waiting[key] = packed
        write = self._writers.submit(self._write, path, key, packed, kept)
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)

    def _write(self, path: Path, key: str, packed: Packed, kept: bool) -> None:
        try:
            if self._failure is None and self._untold is None:
                with self._users_mistakes():
                    if not self.folder.is_dir():  # deleted since
                        self._make_folder()
                    _replace(path, lambda partial: write(partial, self._on_host(packed), self._name, key))
                self._unusable.discard(key)
        except Exception as error:  # of a thread: `put` and `flush` raise it where somebody hears it
            with self._lock:
                if not kept:
                    self._failure = error
                elif self._untold is None:
                    self._untold = error
                    self.rejected += (f"{error}; kept in memory for this run",)
        finally:
            self._waiting.pop(key, None)
            if not kept:
                self._room_to_wait.release()

    def _on_host(self, packed: Packed) -> Packed:
        """An entry in host memory; from a GPU on a stream of its own, since the step's has a queue."""
        if not packed.data.is_cuda:
            return packed
        with self._lock:
            self._stream = stream = self._stream or torch.cuda.Stream(packed.data.device)
        with torch.cuda.stream(stream):
            return pack(packed.entry())

    def _reject(self, path: Path, key: str, reason: str) -> None:
        with self._lock:
            self.rejected += (f"{path}: not used, {reason}; computed again",)
        try:
            path.unlink(missing_ok=True)  # so that other processes need not find out
        except OSError:
            self._unusable.add(key)

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure

    @contextlib.contextmanager
    def _users_mistakes(self) -> Iterator[None]:
        """Turns errors that a user can mend into a UserError that says how."""
        try:
            yield
        except OSError as error:
            if error.errno not in BY_USER:
                raise
            raise UserError(
                f"{self.folder}: the feature cache cannot be used ({error.strerror}); what it holds is intact. Give "
                f"another feature_cache_dir or --feature_cache host or off, or free some space: {listed(self._root)}"
            ) from error


def cache_directory(given: str | None = None) -> Path:
    """Root folder of the stores: the given one, else `features` in $SA2VA_SFT_CACHE or $XDG_CACHE_HOME/sa2va-sft.

    Without these variables it is ~/.cache/sa2va-sft/features. It does not depend on where a run's output goes.
    """
    if given:
        return Path(given).expanduser()
    if own := os.environ.get("SA2VA_SFT_CACHE"):
        return Path(own) / "features"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sa2va-sft" / "features"


def keys_in(root: Path, scope: str) -> set[str]:
    """Keys of the entries of a store that need not exist; whether each is whole shows when it is read."""
    folder = Path(root) / _legal(f"v{FORMAT}-{scope}")
    with contextlib.suppress(OSError):  # not there, or not to be read: whoever opens it says so
        return {name.removesuffix(ENDING) for name in os.listdir(folder) if name.endswith(ENDING)}
    return set()


def stores_in(root: Path) -> list[Listed]:
    """The stores of a root folder, largest first; what else lies there is not touched or counted."""
    found = []
    for folder in Path(root).glob(f"v*-*/{ABOUT}"):
        with contextlib.suppress(OSError, ValueError):  # just being deleted, or no store
            sizes = [file.stat().st_size for file in os.scandir(folder.parent) if file.name.endswith(ENDING)]
            about = json.loads(folder.read_text(encoding="utf-8"))
            found.append(Listed(folder.parent, len(sizes), sum(sizes), folder.stat().st_mtime, about))
    return sorted(found, key=lambda store: store.bytes, reverse=True)


def listed(root: Path, most: int = 3) -> str:
    """The stores of a root folder in one sentence, and how to delete one."""
    stores = stores_in(root)
    if not stores:
        return f"{root} holds no features"
    names = [
        f"{store.folder.name} ({store.bytes / 2**30:.1f} GiB, last used "
        f"{time.strftime('%Y-%m-%d', time.localtime(store.last_used))})"
        for store in stores[:most]
    ]
    more = f" and {len(stores) - most} more" if len(stores) > most else ""
    total = sum(store.bytes for store in stores) / 2**30
    return f"{root} holds {total:.1f} GiB in {', '.join(names)}{more}; delete any with rm -r"


def _replace(path: Path, fill: Callable[[Path], object]) -> None:
    """Gives a file its name only when it is whole; `fill` writes it to the path it is given."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        fill(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _legal(name: str) -> str:
    if not LEGAL_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a file here: at most 120 letters, digits, - and _")
    return name
