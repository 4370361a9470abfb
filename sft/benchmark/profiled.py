"""Which kernels a step spends its time in, and for how much of it the GPU runs none; by torch.profiler.

Takes a call, gives figures. On a GPU it records what the GPU ran and nothing of the CPU's operators: to record these
slows the CPU, which a small batch would then wait for. On a CPU it records operators, and nothing is idle.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sft.benchmark.clock import wait

MOST_KERNELS = 40
NAME_CHARACTERS = 120  # of a templated kernel's name
COPIES = ("Memcpy", "Memset")


@dataclass(frozen=True)
class Span:
    """What a GPU ran from when to when, in microseconds of one clock."""

    name: str
    start_us: float
    end_us: float


def measure(step: Callable[[], object], device: torch.device, steps: int) -> dict:
    """Calls a step so many times under the profiler; it should be warm.

    Returns:
        "steps"; "kernels": the longest first, each with "name", "ms" and "calls" a step and its "share" of all; on a
        GPU "idle_share", of the time from the first kernel to the last, and "copies_ms" a step.
    """
    on_gpu = device.type == "cuda"
    wait(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        wait(device)
    if not on_gpu:
        averages = profiler.key_averages()
        return {"steps": steps, "kernels": _kernels({a.key: (a.self_cpu_time_total, a.count) for a in averages}, steps)}
    events = (event for event in profiler.events() if event.device_type == DeviceType.CUDA)
    spans = [Span(e.name, e.time_range.start, e.time_range.end) for e in events if not e.is_user_annotation]
    return {"steps": steps} | of_gpu(spans, steps)


def of_gpu(spans: Iterable[Span], steps: int) -> dict:
    """Kernels, copies and idle time of what a GPU ran; two kernels at once are busy once.

    Raises:
        RuntimeError: no kernel was recorded.
    """
    sums: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    copies_us, busy_us, start_us, busy_until_us = 0.0, 0.0, None, float("-inf")
    for span in sorted(spans, key=lambda span: span.start_us):
        if span.name.startswith(COPIES):
            copies_us += span.end_us - span.start_us
            continue
        total_us, calls = sums[span.name]
        sums[span.name] = total_us + span.end_us - span.start_us, calls + 1
        start_us = span.start_us if start_us is None else start_us
        busy_us += max(0.0, span.end_us - max(span.start_us, busy_until_us))
        busy_until_us = max(busy_until_us, span.end_us)
    if start_us is None:
        raise RuntimeError("the profiler recorded no kernel: CUPTI may be missing, or another profiler may use it")
    idle_share = 1 - busy_us / (busy_until_us - start_us)
    return {"kernels": _kernels(sums, steps), "idle_share": idle_share, "copies_ms": copies_us / 1000 / steps}


def _kernels(sums: dict[str, tuple[float, int]], steps: int) -> list[dict]:
    """From name -> (microseconds, calls) of all steps."""
    whole_us = sum(total_us for total_us, _ in sums.values())
    longest = sorted(sums.items(), key=lambda item: item[1][0], reverse=True)[:MOST_KERNELS]
    return [
        {
            "name": name[:NAME_CHARACTERS],
            "ms": total_us / 1000 / steps,
            "calls": calls / steps,
            "share": total_us / whole_us,
        }
        for name, (total_us, calls) in longest
    ]
