"""Entries of coming batches on the device before they are asked for: from the disk or host memory, by threads.

Each entry is one copy: file -> pinned memory -> device. Copies run on a stream of their own beside the step; the
consumer's stream waits for those of its batch alone.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from sft.feature_store.disk import DiskStore
from sft.feature_store.entry import Entry, Packed
from sft.feature_store.memory import MemoryStore, NoStore

Moved = tuple[Packed, torch.cuda.Event | None] | None


def read_ahead(
    store: DiskStore | MemoryStore | NoStore,
    plan: Sequence[Sequence[str]],
    device: torch.device,
    threads: int = 4,
    batches: int = 2,
) -> Iterator[list[Entry | None]]:
    """Yields the entries of each batch of the plan, in its order.

    Args:
        store: where they are kept.
        plan: the keys of each batch.
        device: where the tensors are to be. They are for reading: the store may own their memory.
        threads: that read. One gives 1 GB/s or more.
        batches: how many are read before they are due; their memory is taken on the device.

    Yields:
        One per key; None where the store has none, or a damaged one: compute it and put it.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    readers = ThreadPoolExecutor(threads, thread_name_prefix="features")
    coming: list[list[Future | Packed]] = []
    try:
        for position in range(len(plan)):
            for keys in plan[position + len(coming) : position + 1 + batches]:
                coming.append(
                    [store.at_once(key, device) or readers.submit(_moved, store, key, device, stream) for key in keys]
                )
            yield [
                found.entry() if isinstance(found, Packed) else _received(found.result(), device)
                for found in coming.pop(0)
            ]
    finally:
        readers.shutdown(cancel_futures=True)


def _moved(
    store: DiskStore | MemoryStore | NoStore, key: str, device: torch.device, stream: torch.cuda.Stream | None
) -> Moved:
    """An entry on the device, and the event after which it is there. Runs in a thread."""
    if stream is None:
        packed = store.read_packed(key)
        return packed and (Packed(packed.parts, packed.data.to(device)), None)
    with torch.cuda.stream(stream):
        packed = store.read_packed(key)
        if packed is None or packed.data.device == device:
            return packed and (packed, None)
        # torch holds pinned memory back until copies from it are done.
        moved = Packed(packed.parts, packed.data.to(device, non_blocking=True))
        return moved, stream.record_event()


def _received(moved: Moved, device: torch.device) -> Entry | None:
    """The entry, safe to use on the current stream."""
    if moved is None:
        return None
    packed, done = moved
    if done is not None:
        current = torch.cuda.current_stream(device)
        current.wait_event(done)
        packed.data.record_stream(current)  # its memory came from the other stream's share
    return packed.entry()
