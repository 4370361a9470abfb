"""Safetensors files -> tensors on their device.

On a CPU a tensor is a view of its mapped file: no copy, and the ranks of a machine share one. To a GPU the bytes go by
several reads at once through a few pinned buffers, in the order they lie in the file, and memory holds nothing else of
the file: copied from a mapped file instead, each page would be fetched when the copy touches it, one after the other.
It does not know what the names mean.
"""

import contextlib
import itertools
import json
import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sft.config import UserError

READERS = 4
CHUNK_BYTES = 16 * 2**20  # of one read; a GPU's load pins READERS buffers of it
AHEAD_BYTES = 256 * 2**20  # read beyond the tensor that is being placed
Tensors = Generator[tuple[str, Tensor], None, None]
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies in its file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    bytes: int


def begin(files: list[Path], dtype: torch.dtype, device: torch.device) -> Tensors:
    """Begins to read, and gives a generator of (name, tensor), each tensor in its file's dtype; close it.

    To a GPU, reading goes on while the caller does other things. A caller that converts to `dtype` and lets go of what
    it does not keep holds beside the rest: on a CPU one mapped file, on a GPU one tensor and AHEAD_BYTES.

    Args:
        files: safetensors files, read one after the other.
        dtype: in which the caller keeps the tensors; those that have it already are read ahead without bound.
        device: where the tensors are to be.

    Raises:
        UserError: a file is no whole safetensors file.
    """
    return _begun(_mapped(files) if device.type == "cpu" else _staged(files, dtype, device))


@contextlib.contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    """An open safetensors file; a UserError if it is none, or not whole."""
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except SafetensorError as error:
        raise UserError(f"{file}: unreadable safetensors file ({error}); download it again") from error


def _begun(found: Generator) -> Generator:
    """A generator that has gone to its first item, which it does not keep when that is handed out."""

    def all_of_it() -> Generator:
        with contextlib.closing(found):
            first = list(itertools.islice(found, 1))
            yield
            while first:
                yield first.pop()
            yield from found

    begun = all_of_it()
    next(begun)
    return begun


def _mapped(files: list[Path]) -> Tensors:
    for file in files:
        with opened(file) as shard:
            for name in shard.keys():  # noqa: SIM118 - an open shard is no mapping
                yield name, shard.get_tensor(name)


def _staged(files: list[Path], dtype: torch.dtype, device: torch.device) -> Tensors:
    buffers: SimpleQueue[Tensor] = SimpleQueue()
    for _ in range(READERS):
        buffers.put(torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda"))
    with ThreadPoolExecutor(READERS) as readers:
        for file in files:
            yield from _tensors_of(file, dtype, device, readers, buffers)


def _tensors_of(
    file: Path, dtype: torch.dtype, device: torch.device, readers: ThreadPoolExecutor, buffers: SimpleQueue
) -> Tensors:
    waiting: deque[tuple[_Entry, Tensor, list[Future]]] = deque()
    ahead = 0  # bytes of those waiting that will not stay
    with open(file, "rb", buffering=0) as raw, _all_ended(waiting):
        for entry in _entries(file):
            bytes_N = torch.empty(entry.bytes, dtype=torch.uint8, device=device)
            starts = range(0, entry.bytes, CHUNK_BYTES)
            parts = [(bytes_N[start : start + CHUNK_BYTES], entry.begin + start) for start in starts]
            reads = [readers.submit(_read, raw.fileno(), *part, file, buffers) for part in parts]
            waiting.append((entry, bytes_N, reads))
            ahead += _passing(entry, dtype)
            del bytes_N, parts
            while ahead - _passing(waiting[0][0], dtype) >= AHEAD_BYTES:
                ahead -= _passing(waiting[0][0], dtype)
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())


@contextlib.contextmanager
def _all_ended(waiting: deque[tuple[_Entry, Tensor, list[Future]]]) -> Iterator[None]:
    """Leaves no read behind when the caller stops early: the file is closed next."""
    try:
        yield
    finally:
        for *_, reads in waiting:
            for read in reads:
                read.cancel() or read.exception()


def _passing(entry: _Entry, dtype: torch.dtype) -> int:
    """Bytes of a tensor that only its conversion will stay of."""
    return 0 if entry.dtype == dtype else entry.bytes


def _entries(file: Path) -> list[_Entry]:
    """The header, in the order of the bytes; the safetensors package says whether it is whole."""
    with opened(file):
        pass
    with open(file, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    entries = []
    for name, described in header.items():
        if name == "__metadata__":
            continue
        if described["dtype"] not in _DTYPES:
            raise UserError(f"{file}: {name} is of type {described['dtype']}; supported: {', '.join(_DTYPES)}")
        begin, end = described["data_offsets"]
        dtype, shape = _DTYPES[described["dtype"]], tuple(described["shape"])
        entries.append(_Entry(name, dtype, shape, 8 + length + begin, end - begin))
    return sorted(entries, key=lambda entry: entry.begin)


def _read(descriptor: int, target_N: Tensor, begin: int, file: Path, buffers: SimpleQueue) -> None:
    """Fills bytes of a tensor from a place in a file; runs in a reader's thread."""
    buffer = buffers.get()
    try:
        staged_N = buffer[: len(target_N)]
        _read_whole(descriptor, staged_N, begin, file)
        target_N.copy_(staged_N, non_blocking=True)
        if target_N.is_cuda:
            torch.cuda.current_stream(target_N.device).synchronize()  # the buffer is filled again next
    finally:
        buffers.put(buffer)


def _read_whole(descriptor: int, target_N: Tensor, begin: int, file: Path) -> None:
    view, done = memoryview(target_N.numpy()), 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], begin + done)  # one call reads 2 GiB at most, or less
        if count == 0:
            raise UserError(f"{file}: ended while it was read; download it again")
        done += count


def _finished(entry: _Entry, bytes_N: Tensor, reads: list[Future]) -> tuple[str, Tensor]:
    for read in reads:
        read.result()
    return entry.name, bytes_N.view(entry.dtype).view(entry.shape)
