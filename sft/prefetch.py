"""Batches put together beside the step before them: by a thread, on a stream of their own.

Takes an iterator of batches, gives the same batches in the same order. Without a GPU they come straight from it: there
is no second device that could work meanwhile. It does not know what a batch is, beyond its tensors.
"""

import contextlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch
from torch import Tensor

AHEAD_BATCHES = 2  # whose steps the device has still to do, beside the one it is at


class _Tensors(Protocol):
    def tensors(self) -> Iterator[Tensor]: ...


Batch = TypeVar("Batch", bound=_Tensors)


def prefetched(batches: Generator[Batch], stream: torch.cuda.Stream | None) -> Iterator[Batch]:
    """Yields the batches, each ready for the current stream; the next one is put together meanwhile.

    Args:
        batches: closed in the end, also where the consumer stops early.
        stream: where the copies of all batches run; None: no thread.
    """
    if stream is None:
        yield from batches
        return

    handed_out: deque[torch.cuda.Event] = deque()  # after which the step that used a batch is done

    def following() -> tuple[Batch, torch.cuda.Event] | None:
        if len(handed_out) > AHEAD_BATCHES:  # a loop that is far ahead of its device would fill it with batches
            handed_out.popleft().synchronize()
        with torch.cuda.stream(stream):  # also picks the device, which a new thread does not know
            batch = next(batches, None)
            return None if batch is None else (batch, stream.record_event())

    with contextlib.closing(batches), ThreadPoolExecutor(1, thread_name_prefix="batch") as thread:
        coming = thread.submit(following)
        while (found := coming.result()) is not None:
            coming = thread.submit(following)
            batch, there = found
            current = torch.cuda.current_stream(stream.device)
            current.wait_event(there)
            for tensor in batch.tensors():
                if tensor.is_cuda:
                    tensor.record_stream(current)  # its memory came from the other stream's share
            yield batch
            handed_out.append(torch.cuda.Event(blocking=True))
            handed_out[-1].record(current)
