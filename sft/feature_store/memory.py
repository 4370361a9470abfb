"""Stores that die with the process: `NoStore`, and `MemoryStore` in GPU or host memory, alone or before a disk store.

Their methods are described in the package's docstring.
"""

import threading
from collections.abc import Iterable

import torch
from torch import Tensor

from sft.feature_store.disk import DiskStore
from sft.feature_store.entry import Entry, Packed, pack, parts_of

SLAB_BYTES = 256 * 2**20  # at the most; a power of two: pinned allocations are rounded up to one
ALIGNMENT_BYTES = 512


def held_bytes(entries: int, entry_bytes: int, *, pinned: bool = False) -> int:
    """Memory that so many entries of one size take: whole slabs, in which none is split.

    Args:
        entries: their number.
        entry_bytes: of each.
        pinned: whether it is pinned host memory, of which torch takes a power of two.
    """
    slab = _slab_bytes(entry_bytes)
    in_slab = slab // _aligned(entry_bytes)
    return -(-entries // in_slab) * (1 << (slab - 1).bit_length() if pinned else slab)


class NoStore:
    """Keeps nothing: every entry is computed whenever it is needed."""

    rejected: tuple[str, ...] = ()

    def missing(self, keys: Iterable[str]) -> list[str]:
        """All of the keys."""
        return list(dict.fromkeys(keys))

    def put(self, key: str, entry: Entry) -> None:
        """Does nothing."""

    def at_once(self, key: str, device: torch.device) -> None:
        """Never anything."""

    def read_packed(self, key: str) -> None:
        """Never anything."""

    def read(self, key: str) -> None:
        """Never anything."""

    def flush(self) -> None:
        """Nothing to wait for."""

    def close(self, at_most_s: float | None = None) -> None:
        """Nothing to stop."""


class MemoryStore:
    """Keeps entries in the memory of one device.

    Args:
        device: where tensors are kept and what `read` gives; the CPU for host memory.
        pin: whether host memory is pinned, for copies to a GPU that wait for nothing.
        behind: where entries that are not kept yet are taken from, and where new ones go too.
    """

    def __init__(self, device: torch.device, pin: bool = False, behind: DiskStore | None = None):
        self._device, self._pin, self._behind = device, pin, behind
        self._kept: dict[str, Packed] = {}
        self._slab, self._used = torch.empty(0, dtype=torch.uint8), 0
        self._lock = threading.Lock()

    @property
    def rejected(self) -> tuple[str, ...]:
        """What the disk store behind could not use, and why."""
        return self._behind.rejected if self._behind else ()

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Keys neither kept nor on the disk behind, in order, each once."""
        unkept = [key for key in dict.fromkeys(keys) if key not in self._kept]
        return self._behind.missing(unkept) if self._behind else unkept

    def put(self, key: str, entry: Entry) -> None:
        """Copies an entry into this memory, from where it goes onto the disk behind in its own time."""
        if key not in self._kept:
            self._kept[key] = pack(entry, self._room(parts_of(entry)[-1].stop))
        if self._behind:
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()  # whoever writes is on another stream
            self._behind.put_kept(key, self._kept[key])

    def at_once(self, key: str, device: torch.device) -> Packed | None:
        """An entry that is in the memory of that device already."""
        return self._kept.get(key) if self._device == device else None

    def read_packed(self, key: str) -> Packed | None:
        """An entry in one piece."""
        if key not in self._kept and self._behind and (packed := self._behind.read_packed(key)):
            kept = self._room(len(packed.data))
            kept.copy_(packed.data)  # complete on return: whoever reads next may be on another stream
            self._kept[key] = Packed(packed.parts, kept)
        return self._kept.get(key)

    def read(self, key: str) -> Entry | None:
        """An entry's tensors, to be read and never written; None where there is none."""
        packed = self.read_packed(key)
        return packed.entry() if packed else None

    def settle(self) -> None:
        """Waits for the disk behind; a full one is told among `rejected`."""
        if self._behind:
            self._behind.settle()

    def flush(self) -> None:
        """Waits for the disk behind; raises where that is full."""
        if self._behind:
            self._behind.flush()

    def close(self, at_most_s: float | None = None) -> None:
        """Closes the disk store behind, see there; the memory is free with the last reference."""
        if self._behind:
            self._behind.close(at_most_s)

    def _room(self, wanted_bytes: int) -> Tensor:
        """Memory for one entry, from the current slab or a new one."""
        with self._lock:
            if self._used + wanted_bytes > len(self._slab):
                size = _slab_bytes(wanted_bytes)
                self._slab = torch.empty(size, dtype=torch.uint8, device=self._device, pin_memory=self._pin)
                self._used = 0
            start = self._used
            self._used = start + _aligned(wanted_bytes)
            # .data: autograd counts writes, of all parts of a slab together, and would take one into the next entry
            # for one into an entry that a layer has saved for its backward pass.
            return self._slab[start : start + wanted_bytes].data


def _aligned(entry_bytes: int) -> int:
    """What one entry takes of a slab, never nothing."""
    return max(1, -(-entry_bytes // ALIGNMENT_BYTES)) * ALIGNMENT_BYTES


def _slab_bytes(entry_bytes: int) -> int:
    """As many whole entries as SLAB_BYTES hold, one at least."""
    one = _aligned(entry_bytes)
    return max(1, SLAB_BYTES // one) * one
