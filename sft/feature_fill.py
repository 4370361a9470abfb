"""Filling a feature store: images are read and moved ahead of the encoders and kept behind them, beside each other.

Takes images with the keys of their views and a function that loads one; gives the store their entries. It does not know
pairs, masks or ranks. Groups are the same whatever the store holds: what is taken together decides the last bits of
bf16 features, which must not depend on where a filling was interrupted.
"""

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from sft.encoders import Encoders, Loaded
from sft.feature_store import DiskStore, Entry, MemoryStore
from sft.report import Progress

LOADED_AHEAD, KEPT_BEHIND = 3, 2  # groups around the one that is being encoded

Done, Image = TypeVar("Done"), TypeVar("Image")


@dataclass(frozen=True)
class Work(Generic[Image]):
    """One image to encode, in whatever words `load` knows it, and the keys of its views."""

    image: Image
    key_of_view: dict[int, str]


class Filled(NamedTuple):
    """What was done."""

    entries: int
    waited_s: float
    """Seconds in which no image was read in time: the readers were too slow."""


class _Task(Generic[Done]):
    """Work of a thread, done once more where GPU memory ended; before that the recorded encoder gives its own back."""

    def __init__(self, threads: Executor, *call: Any):
        self._submit = functools.partial(threads.submit, *call)
        self._future: Future[Done] = self._submit()

    def result(self, encoders: Encoders) -> Done:
        """What the call gave. For the thread that encodes: nothing may be recorded or replayed meanwhile."""
        try:
            return self._future.result()
        except torch.OutOfMemoryError:
            encoders.forget()
        return self._submit().result()

    def cancel(self) -> None:
        """Does not begin what has not begun."""
        self._future.cancel()


def grouped(works: Iterable[Work], size: int) -> list[list[Work]]:
    """Images in groups of about `size` views each; the views of one image are decoded once and stay together."""
    groups: list[list[Work]] = []
    count = size
    for work in works:
        if count >= size:
            groups.append([])
            count = 0
        groups[-1].append(work)
        count += len(work.key_of_view)
    return groups


def fill(
    store: DiskStore | MemoryStore,
    encoders: Encoders,
    groups: Sequence[Sequence[Work]],
    load: Callable[[Image, Sequence[int]], Loaded],
    readers: Executor,
    show: bool,
) -> Filled:
    """Computes the groups of which something is missing, and keeps what is.

    Args:
        store: where they go.
        encoders: which compute them.
        groups: from `grouped`.
        load: an image and its views -> the views on the device; runs in the readers.
        readers: threads.
        show: whether to show progress.
    """
    missing = set(store.missing(key for group in groups for work in group for key in work.key_of_view.values()))
    groups = _unfinished(groups, missing, encoders)
    stream = torch.cuda.Stream(encoders.device) if encoders.device.type == "cuda" else None
    loading: deque[list[_Task[Loaded]]] = deque()
    keeping: deque[_Task[None]] = deque()
    waited_s = 0.0
    shown = Progress("Features", len(missing), unit="image") if show and missing else contextlib.nullcontext()
    many = encoders.many(len(groups))
    with ThreadPoolExecutor(1, thread_name_prefix="keep") as keeper, many, shown as progress:
        try:
            for position, group in enumerate(groups):
                for later in groups[position + len(loading) : position + LOADED_AHEAD]:
                    loading.append([_Task(readers, load, work.image, [*work.key_of_view]) for work in later])
                waiting_s = time.perf_counter()
                loaded = [task.result(encoders) for task in loading.popleft()]
                waited_s += time.perf_counter() - waiting_s
                entries = encoders.encode(loaded)
                keys = [key for work in group for key in work.key_of_view.values()]
                wanted = {key: entry for key, entry in zip(keys, entries, strict=True) if key in missing}
                if progress:
                    progress.advance(len(wanted))
                done = torch.cuda.current_stream(encoders.device).record_event() if stream else None
                keeping.append(_Task(keeper, _keep, store, wanted, stream, done))
                if len(keeping) > KEPT_BEHIND:
                    keeping.popleft().result(encoders)
            for task in keeping:
                task.result(encoders)
        finally:
            for task in (task for several in loading for task in several):
                task.cancel()
    return Filled(len(missing), waited_s)


def _unfinished(groups: Sequence[Sequence[Work]], missing: set[str], encoders: Encoders) -> list[Sequence[Work]]:
    """Groups of which something is missing: whole, or that alone where neighbours decide nothing."""
    if encoders.sizes.images == 1:
        lacking = [
            Work(work.image, {view: key for view, key in work.key_of_view.items() if key in missing})
            for group in groups
            for work in group
        ]
        return [[work] for work in lacking if work.key_of_view]
    return [group for group in groups if any(missing & set(work.key_of_view.values()) for work in group)]


def _keep(
    store: DiskStore | MemoryStore,
    entries: dict[str, Entry],
    stream: torch.cuda.Stream | None,
    computed: torch.cuda.Event | None,
) -> None:
    """Runs in a thread, whose copies wait for these entries and hold up no others; lets go of those it has kept."""
    with torch.cuda.stream(stream):  # does nothing for None
        if stream is not None:
            stream.wait_event(computed)
        for key, entry in entries.items():
            store.put(key, entry)
        if stream is not None:
            stream.synchronize()  # before the memory of the entries goes to the next ones
    entries.clear()  # the task still has them: to keep them again if that failed
