"""How fast a training step is, against the loop one writes first, and where its time goes.

Takes the settings of a run and a few of its own, gives one dictionary of figures, which `table` prints and draws. Ours
is the project's own step: `runs.prepared`, `Features.batches`, `train_step`. It decides nothing about training.
"""

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from sft import data, engine, operations, provenance
from sft import run as runs
from sft.benchmark import parts, plain, profiled
from sft.benchmark.bare import BareEngine
from sft.benchmark.clock import Times, timed, wait
from sft.config import TrainConfig
from sft.features import Batch, Item
from sft.run import Run
from sft.stopwatch import Stopwatch
from sft.train import train_step

FILL_BATCH = 8
MOST_PLAIN_STEPS = 10  # of half a second each, on the published sizes


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    config: TrainConfig
    """Of the runs; its batch size is replaced."""
    batch_sizes: tuple[int, ...]
    steps: int
    """Timed ones, of each kind."""
    warm_up: int
    with_plain: bool = True
    with_parts: bool = True
    profiled_steps: int = 0
    """Steps under the profiler, of each batch size; 0: none."""
    import_s: float = 0.0
    """Seconds from the start of the process to the call."""


def measure(settings: Settings, keep: Callable[[dict], None] = lambda figures: None) -> dict:
    """All figures; on several ranks all ranks call it, and only rank 0's count.

    Args:
        settings: see there.
        keep: gets what is known so far, after each part.
    """
    figures: dict = {"ours": [], "formula": operations.FORMULA}
    for batch_size in settings.batch_sizes:
        config = dataclasses.replace(settings.config, batch_size=batch_size)
        figures["ours"].append(_ours(config, settings, figures))
        _free()
        keep(figures)
    if settings.with_plain:
        device = _device()
        figures["plain"] = _plain(settings, device)
        _free()
        of_plain = figures["plain"]["ms_per_sample"]
        for row in figures["ours"]:
            row["times_plain"] = of_plain / row["ms_per_sample"]
        keep(figures)
    return figures


def scaling(one: dict, several: dict) -> list[dict]:
    """Batch size by batch size, how many times the samples a second of one rank these ranks reach."""
    before = {row["batch_size"]: row["samples_per_s"] for row in one["ours"]}
    return [
        {"batch_size": row["batch_size"], "factor": row["samples_per_s"] / before[row["batch_size"]]}
        for row in several["ours"]
    ]


def step_operations(run: Run, batch: Batch) -> dict[str, int]:
    """Operations that one step on this batch needs, by their reason; see `operations.FORMULA`."""
    model = run.loaded.model
    lengths = operations.lengths_of(batch.prompt).tolist()
    labels = batch.prompt.labels_BL
    labelled = 0 if labels is None else int((labels != -100).sum())
    counted = operations.of_tokens(operations.sizes_of(model), lengths, labelled)
    decoder = model.sam2.mask_decoder
    with torch.no_grad():
        forward = operations.forward_of(decoder, lambda: model(batch.prompt, batch.vision, batch.sam2))
    trains = any(parameter.requires_grad for parameter in decoder.parameters())
    return counted | {"mask_decoder": (3 if trains else 2) * forward}


def _ours(config: TrainConfig, settings: Settings, figures: dict) -> dict:
    """One batch size: a run as training builds it; the first one also tells start and filling."""
    left_over = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0  # of runs before this one
    started_s = time.perf_counter()
    with runs.prepared(config) as run:
        device, first = run.ranks.device, not figures["ours"]
        if first:
            figures["device"] = provenance.device_name(device)
            figures["ranks"] = run.ranks.world_size
            ready_s = time.perf_counter()
            _take_first_step(run)
            figures["start_parts_s"] = {
                "imports": settings.import_s,
                "putting the run together": ready_s - started_s,
                "the first step": time.perf_counter() - ready_s,
            }
            figures["start_s"] = sum(figures["start_parts_s"].values())
        _fill_first(run, settings, figures)
        batches = _batches(run)
        run.ds_engine.train()
        waited = Stopwatch(device)
        ours = _timed_steps(run, batches, settings, waited)
        batch = next(batches)
        row = {"batch_size": config.batch_size, "pace": run.pace_line, "memory_before_gib": left_over / 2**30}
        if run.ds_engine.vectors and run.ranks.world_size == 1:
            bare_run = dataclasses.replace(run, ds_engine=BareEngine(run.ds_engine, config))
            bare = _timed_steps(bare_run, batches, settings)
            around = ours + _timed_steps(run, batches, settings)  # on both sides of the bare ones: clocks drift
            row["bare"], row["around_bare"] = (times.record(config.batch_size) for times in (bare, around))
            row["deepspeed_overhead"] = around.median_s / bare.median_s - 1
        run.watch.check(config)
        row |= ours.record(config.batch_size)
        row["samples_per_s"] *= run.ranks.world_size
        row["data_share"] = waited.seconds()["data"] / sum(ours.steps_s)
        row |= _mfu(run, batch, ours)
        if settings.with_parts and run.ds_engine.vectors:
            pairs = (run.data.train * config.batch_size)[: min(config.batch_size, FILL_BATCH)]
            measured = parts.measure(run, batch, pairs, settings.steps, settings.warm_up)
            row["parts"] = {name: times.record() for name, times in measured.items()}
        if settings.profiled_steps:
            watch = Stopwatch(device)
            row["profile"] = profiled.measure(
                lambda: train_step(run, next(batches), watch), device, settings.profiled_steps
            )
        return row


def _take_first_step(run: Run) -> None:
    """Up to the end of a first step: its batch's features, its kernels compiled."""
    run.ds_engine.train()
    train_step(run, next(_batches(run)), Stopwatch(run.ranks.device))
    wait(run.ranks.device)


def _fill_first(run: Run, settings: Settings, figures: dict) -> None:
    """In every run: no timed step computes features, or has them written beside it. The first run's pace is told."""
    first, filled = not figures["ours"], []
    if first and settings.profiled_steps:
        figures["fill_profile"] = profiled.measure(lambda: filled.append(_fill(run)), run.ranks.device, 1)
    else:
        filled.append(_fill(run))
    started_s = time.perf_counter()
    run.features.flush()
    if first:
        figures["fill_images"], figures["fill_images_per_s"] = filled[0]
        figures["write_s"] = time.perf_counter() - started_s


def _fill(run: Run) -> tuple[int, float]:
    """How many images the run has, and how many a second are read, encoded and kept."""
    items = [Item(pair) for pair in (*run.data.train, *run.data.val)]
    wait(run.ranks.device)
    started_s = time.perf_counter()
    runs.keep_features(run, items)
    wait(run.ranks.device)
    return len(items), len(items) / (time.perf_counter() - started_s)


def _plan(run: Run) -> Iterator[list[Item]]:
    """Batches without end, the training images in turn."""
    position, pairs = 0, run.data.train
    while True:
        yield [Item(pairs[(position + number) % len(pairs)]) for number in range(run.config.batch_size)]
        position += run.config.batch_size


def _batches(run: Run, most: int = 10_000) -> Iterator[Batch]:
    plan = _plan(run)
    return run.features.batches([next(plan) for _ in range(most)])


def _timed_steps(run: Run, batches: Iterator[Batch], settings: Settings, waited: Stopwatch | None = None) -> Times:
    """Whole steps: data, forward, loss, backward, clipping, optimizer."""
    watch = Stopwatch(run.ranks.device)
    for _ in range(settings.warm_up):
        train_step(run, next(batches), watch)
    timed_batches = (waited or watch).timed("data", batches)
    return timed(lambda: train_step(run, next(timed_batches), watch), run.ranks.device, settings.steps, warm_up=0)


def _mfu(run: Run, batch: Batch, times: Times) -> dict:
    needed = step_operations(run, batch)
    peak = operations.measured_peak(run.ranks.device, next(run.loaded.model.parameters()).dtype)
    total = sum(needed.values())
    return {
        "tokens": int(operations.lengths_of(batch.prompt).sum()) // len(batch.items),
        "operations": {name: int(value) for name, value in needed.items()},
        "tflops": total / times.median_s / 1e12,
        "peak_tflops": peak / 1e12,
        "mfu": total / times.median_s / peak,
    }


def _plain(settings: Settings, device: torch.device) -> dict:
    """The loop one writes first, at batch 1."""
    loop = plain.PlainLoop(settings.config, device)
    pairs = data.load(settings.config).train[:FILL_BATCH]
    inputs = [plain.read(pair, loop.preprocess, settings.config) for pair in pairs]
    turn = (inputs[number % len(inputs)] for number in range(10_000))
    steps = min(settings.steps, MOST_PLAIN_STEPS)
    return timed(lambda: loop.step(next(turn)), device, steps, min(settings.warm_up, 3)).record()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _free() -> None:
    """Gives back what a closed run has left: its parts point at each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    engine.barrier()
