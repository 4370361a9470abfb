"""Where the time of a step goes, without making the device wait.

Takes named parts of the loop, gives seconds per part. On a GPU the parts are bounded by events in its own queue, read
once an epoch; on a CPU by the clock.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch


class Stopwatch:
    """Sums the seconds of named parts.

    On a GPU a part is what lies between its two events in the queue. So waiting for a batch counts where the device
    stands still for it; a loop that is ahead of its device may wait and lose nothing.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._started_s = time.perf_counter()
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times what happens inside."""
        started = self._mark()
        yield
        self._add(name, started)

    def timed(self, name: str, iterable: Iterable) -> Iterator:
        """Passes items on and times the waiting for each."""
        iterator = iter(iterable)
        while True:
            started = self._mark()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._add(name, started)
            yield item

    def seconds(self) -> dict[str, float]:
        """Seconds by part so far; on a GPU this waits for it."""
        if self._events:
            torch.cuda.synchronize()
            for name, started, ended in self._events:
                self._seconds[name] += started.elapsed_time(ended) / 1000
            self._events.clear()
        return self._seconds

    def elapsed_s(self) -> float:
        """Seconds since this watch was made."""
        return time.perf_counter() - self._started_s

    def _add(self, name: str, started) -> None:
        ended = self._mark()
        if self._on_gpu:
            self._events.append((name, started, ended))
        else:
            self._seconds[name] += ended - started

    def _mark(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
