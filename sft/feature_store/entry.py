"""An entry in one piece: a dict of tensors as one run of bytes, in memory and as a file that is checked when read.

The file is in the safetensors format: 8 bytes length of the header, the header as JSON, the data without gaps. Its
metadata holds the format's number, the store's and the entry's name, and a CRC-32 of the whole file, taken with zeros
in its own place. Largest data types come first, so that every tensor lies at a multiple of its own size.
"""

import json
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Entry = dict[str, Tensor]

FORMAT = "1"
PAGE_BYTES = 4096  # the header is filled up to whole pages: one read finds it, and data begins at a page
MOST_HEADER_BYTES = 2**20
NO_CRC, CRC_FIELD = b"00000000", b'"crc32":"%s"'
DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class DamagedError(Exception):
    """A file that is not the entry its name promises."""


@dataclass(frozen=True)
class Part:
    """One tensor's place in the data of an entry."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Packed:
    """An entry in one piece."""

    parts: tuple[Part, ...]
    data: Tensor  # uint8, one dimension

    def entry(self) -> Entry:
        """Its tensors, which share the data."""
        return {part.name: self.data[part.start : part.stop].view(part.dtype).view(part.shape) for part in self.parts}


def parts_of(entry: Entry) -> tuple[Part, ...]:
    """Where each tensor of an entry goes."""
    unknown = [f"{name} is {tensor.dtype}" for name, tensor in entry.items() if tensor.dtype not in NAMES]
    if unknown or not entry:
        raise ValueError(f"{unknown[0] if unknown else 'no tensors'}: an entry holds tensors of {', '.join(DTYPES)}")
    parts, start = [], 0
    for name, tensor in sorted(entry.items(), key=lambda item: (-item[1].itemsize, item[0])):
        parts.append(Part(name, tensor.dtype, tuple(tensor.shape), start, start + tensor.nbytes))
        start += tensor.nbytes
    return tuple(parts)


def pack(entry: Entry, into: Tensor | None = None) -> Packed:
    """Copies an entry into one piece: `into` (uint8, of its size, on any device), or new host memory.

    What comes from a GPU goes into pinned memory there, ten times as fast; torch keeps such blocks and uses them again.
    In host memory the copy is complete on return, on a GPU in the order of its stream.
    """
    parts = parts_of(entry)
    from_gpu = any(tensor.is_cuda for tensor in entry.values())
    data = torch.empty(parts[-1].stop, dtype=torch.uint8, pin_memory=from_gpu) if into is None else into
    for part in parts:
        place = data[part.start : part.stop].view(part.dtype).view(part.shape)
        place.copy_(entry[part.name].detach(), non_blocking=True)
    if from_gpu and not data.is_cuda:
        torch.cuda.current_stream(next(tensor.device for tensor in entry.values() if tensor.is_cuda)).synchronize()
    return Packed(parts, data)


def write(path: Path, packed: Packed, store: str, key: str) -> None:
    """Writes a new file of host memory; it is the caller's to give it its name once it is whole."""
    body = memoryview(packed.data.numpy())
    header = _header(packed.parts, store, key)
    crc = zlib.crc32(body, zlib.crc32(header))
    with open(path, "xb") as file:
        file.write(header.replace(CRC_FIELD % NO_CRC, CRC_FIELD % (b"%08x" % crc), 1))
        file.write(body)


def read(path: Path, store: str, key: str, check: bool, pin: bool) -> Packed:
    """Reads an entry into new host memory.

    Args:
        path: of the file.
        store: the store's name that must stand in it.
        key: the entry's.
        check: whether to compare the CRC; size, header and names are compared always.
        pin: whether the memory is pinned; torch keeps such blocks and uses them again once copies from them are done.

    Raises:
        FileNotFoundError: no such entry.
        DamagedError: the file is cut short, changed, or another entry's.
    """
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        header = file.read(PAGE_BYTES)
        length = 8 + int.from_bytes(header[:8], "little")
        if len(header) < 8 or length > min(size, MOST_HEADER_BYTES):
            raise DamagedError("its header is cut short")
        if length > len(header):
            header += file.read(length - len(header))
        file.seek(length)
        parts, crc = _parse(header[:length], store, key)
        if parts[-1].stop != size - length:
            raise DamagedError(f"its data has {size - length} bytes instead of {parts[-1].stop}")
        data = torch.empty(parts[-1].stop, dtype=torch.uint8, pin_memory=pin)
        body, filled = memoryview(data.numpy()), 0
        while filled < len(body):
            if not (count := file.readinto(body[filled:])):
                raise DamagedError("it was cut short while it was read")
            filled += count
    if check:
        blank = header[:length].replace(CRC_FIELD % crc, CRC_FIELD % NO_CRC, 1)
        if b"%08x" % zlib.crc32(body, zlib.crc32(blank)) != crc:
            raise DamagedError("its checksum is wrong")
    return Packed(parts, data)


def _header(parts: tuple[Part, ...], store: str, key: str) -> bytes:
    metadata = {"format": FORMAT, "store": store, "key": key, "crc32": NO_CRC.decode()}
    tensors = {
        part.name: {"dtype": NAMES[part.dtype], "shape": part.shape, "data_offsets": (part.start, part.stop)}
        for part in parts
    }
    text = json.dumps({"__metadata__": metadata} | tensors, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    return len(text).to_bytes(8, "little") + text


def _parse(header: bytes, store: str, key: str) -> tuple[tuple[Part, ...], bytes]:
    """The parts and the CRC's digits that a header tells of."""
    try:
        tensors = json.loads(header[8:])
        metadata = tensors.pop("__metadata__")
        told = metadata["format"], metadata["store"], metadata["key"]
        crc = metadata["crc32"].encode()
        parts = tuple(
            Part(name, DTYPES[one["dtype"]], tuple(one["shape"]), *one["data_offsets"]) for name, one in tensors.items()
        )
        whole = bool(parts) and parts[0].start == 0
        for part, following in zip(parts, (*parts[1:], None), strict=True):
            whole &= part.stop - part.start == math.prod(part.shape) * part.dtype.itemsize
            whole &= following is None or following.start == part.stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"its header is damaged ({type(error).__name__})") from error
    if told != (FORMAT, store, key):
        raise DamagedError("it is another entry's or another format's file")
    if not whole:
        raise DamagedError("its header is damaged (sizes)")
    return parts, crc
