"""Times of steps, without making the device wait inside what is timed.

Takes calls, gives seconds: on a GPU between events in its own queue, on a CPU by the clock.
"""

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of single steps."""

    steps_s: tuple[float, ...]
    peak_bytes: int
    """Most memory that tensors took on the GPU meanwhile; 0 on a CPU."""
    host_peak_bytes: int = 0
    """On a CPU the most memory that the whole process has had resident so far; 0 on a GPU."""

    @property
    def median_s(self) -> float:
        """Half of the steps were faster."""
        return statistics.median(self.steps_s)

    @property
    def spread_s(self) -> float:
        """Distance between the quartiles: half of the steps lie within it."""
        if len(self.steps_s) < 2:
            return 0.0
        lower, _, upper = statistics.quantiles(self.steps_s, n=4)
        return upper - lower

    def __add__(self, other: "Times") -> "Times":
        host_peak_bytes = max(self.host_peak_bytes, other.host_peak_bytes)
        return Times(self.steps_s + other.steps_s, max(self.peak_bytes, other.peak_bytes), host_peak_bytes)

    def record(self, samples: int = 1) -> dict[str, float]:
        """Figures for the table, of steps with so many samples."""
        figures = {
            "step_ms": 1000 * self.median_s,
            "step_ms_quartiles": 1000 * self.spread_s,
            "ms_per_sample": 1000 * self.median_s / samples,
            "samples_per_s": samples / self.median_s,
            "steps": len(self.steps_s),
        }
        peaks = {"peak_gib": self.peak_bytes, "host_peak_gib": self.host_peak_bytes}
        return figures | {name: size / 2**30 for name, size in peaks.items() if size}


def timed(step: Callable[[], object], device: torch.device, steps: int, warm_up: int) -> Times:
    """Calls a step warm_up + steps times; the seconds of the latter."""
    for _ in range(warm_up):
        step()
    wait(device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    marks = [_mark(on_gpu)]
    for _ in range(steps):
        step()
        marks.append(_mark(on_gpu))
    wait(device)
    if on_gpu:
        return Times(tuple(_seconds(marks, on_gpu)), torch.cuda.max_memory_allocated(device))
    return Times(tuple(_seconds(marks, on_gpu)), 0, _host_peak_bytes())


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mark(on_gpu: bool):
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(marks: Sequence, on_gpu: bool) -> list[float]:
    pairs = zip(marks, marks[1:], strict=False)
    return [first.elapsed_time(second) / 1000 if on_gpu else second - first for first, second in pairs]


def _host_peak_bytes() -> int:
    """From the kernel; `ru_maxrss` would count the process that started this one, too: Linux hands its peak on."""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0
