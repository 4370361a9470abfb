"""A function of one GPU tensor, recorded as a CUDA graph for each shape it is often called with.

Takes the function, gives one that is called alike. A call then costs the CPU one launch instead of a thousand, and does
not wait for its turn among threads that run Python too. It does not know models.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

EAGER_CALLS = 1  # of a shape before it is recorded: kernels are compiled and libraries set up by then


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    input: Tensor
    outputs: tuple[Tensor, ...]


class Replayed:
    """`function`, without gradients; inside `recording` a shape that comes again is recorded, then replayed.

    Args:
        function: a tensor -> some tensors; the same kernels whatever the values, and nothing that waits for the GPU.
    """

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]]):
        self._function = function
        self._records = False
        self._calls: Counter[torch.Size] = Counter()
        self._recordings: dict[torch.Size, _Recording] = {}

    @torch.no_grad()
    def __call__(self, given: Tensor) -> tuple[Tensor, ...]:
        """The function's results, in memory of their own."""
        self._calls[given.shape] += 1
        if self._records and given.shape not in self._recordings and self._calls[given.shape] > EAGER_CALLS:
            try:
                self._recordings[given.shape] = self._recorded(given)
            except RuntimeError:  # no memory, or something that cannot be recorded; it goes on as before
                self._records = False
        if (recording := self._recordings.get(given.shape)) is None:
            return self._function(given)
        recording.input.copy_(given)
        recording.graph.replay()
        return tuple(output.clone() for output in recording.outputs)

    @contextlib.contextmanager
    def recording(self, wanted: bool = True) -> Iterator[None]:
        """For many calls; the memory that recordings hold, as much as a call takes, is given back at the end."""
        self._records = wanted
        try:
            yield
        finally:
            self.forget()

    def forget(self) -> bool:
        """Records no more and gives the memory of recordings back; whether there were any."""
        held = bool(self._recordings)
        if held and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # a replay may be on its way
        self._records = False
        self._calls.clear()
        self._recordings.clear()
        if held:
            torch.cuda.empty_cache()  # torch gives a recording's memory to nothing else by itself
        return held

    def _recorded(self, given: Tensor) -> _Recording:
        graph, kept = torch.cuda.CUDAGraph(), given.clone()
        # Other threads may do meanwhile what a recording thread may not, such as reserving pinned memory.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = self._function(kept)
        return _Recording(graph, kept, outputs)
