"""What gpu_figures.py reads out of the JSON (or JUnit XML) that a command writes: figures, their targets, in words.

A reader takes what a file holds, complete or as far as it is written, and how far the command is. Targets of steps come
with the benchmark's own file, those of whole runs stand here: they hold for the 4b shape on a GPU. Standard library
alone.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

GB, SHAPE_OF_TARGETS = 1e9, "4b"
MOST_MEMORY_GIB, MOST_JOB_S, MOST_OVER_READ, MOST_LOADING = 12.0, 360.0, 1.2, 1.2
KERNELS = 25


@dataclass(frozen=True)
class Figure:
    """One row: a value with its unit, or words alone."""

    what: str
    value: float | None
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""
    details: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """In words."""
        sides = (("at most", self.at_most), ("at least", self.at_least))
        return ", ".join(f"{words} {value:.4g} {self.unit}".strip() for words, value in sides if value is not None)

    @property
    def measured(self) -> str:
        """In words, with the verdict."""
        if self.value is None:
            return self.note
        verdict = {True: ", met", False: ", MISSED"}.get(self.met, "")
        return f"{self.value:.4g} {self.unit}".strip() + verdict + (f" ({self.note})" if self.note else "")

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.value is None or (self.at_most is None and self.at_least is None):
            return None
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )


@dataclass(frozen=True)
class Call:
    """How far a command is."""

    seconds: float
    exit_code: int | None
    shape: str
    on_gpu: bool

    @property
    def has_targets(self) -> bool:
        """Of memory and whole jobs."""
        return self.on_gpu and self.shape == SHAPE_OF_TARGETS


def of_step(found: dict, call: Call) -> Iterator[Figure]:
    """What launch/benchmark.py --json holds: steps by batch size, filling, start, scaling."""
    del call
    scene = f"{found['shape']}, {found['image']}"
    targets = found["targets"] if found["ranks"] == 1 else []  # of one rank
    for row in found["ours"]:
        batch = row["batch_size"]
        spread = f"median of {row['steps']:.0f}, quartiles {row['step_ms_quartiles'] / row['step_ms']:.1%} apart"
        for key, words, unit, factor, note in (
            ("ms_per_sample", "a sample", "ms", 1, spread),
            ("times_plain", "against the plain loop", "x", 1, ""),
            ("mfu", "MFU", "", 1, f"of {row['peak_tflops']:.4g} TFLOP/s"),
            ("deepspeed_overhead", "DeepSpeed against bare torch", "%", 100, ""),
            ("data_share", "waiting for data", "%", 100, "of the step"),
            ("peak_gib", "most GPU memory in the timed steps", "GiB", 1, row["pace"]),
        ):
            if key in row:
                limits = _limits(targets, key, batch, factor)
                yield Figure(f"{scene}, batch {batch}: {words}", factor * row[key], unit, note=note, **limits)
    start = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in found.get("start_parts_s", {}).items())
    written = f", on the disk {found['write_s']:.1f} s later" if "write_s" in found else ""
    for key, words, unit, note in (
        ("fill_images_per_s", "filling features", "images/s", f"{found.get('fill_images')} images{written}"),
        ("start_s", "start to the end of the first step", "s", f"batch {found['ours'][0]['batch_size']}; {start}"),
    ):
        if key in found:
            yield Figure(f"{scene}: {words}", found[key], unit, note=note, **_limits(targets, key, None))
    for row in found.get("scaling", []):
        words = f"{scene}, batch {row['batch_size']} each: {found['ranks']} ranks against one"
        limits = _limits(found["targets"], "scaling", None) if found["ranks"] == 2 else {}
        yield Figure(words, row["factor"], "x samples/s", **limits)


def of_start(found: dict, call: Call) -> Iterator[Figure]:
    """Of launch/benchmark.py, the start alone: so few steps tell nothing else."""
    for figure in of_step(found, call):
        if ": start to" in figure.what:
            yield figure


def of_peak(found: dict, call: Call) -> Iterator[Figure]:
    """Of launch/benchmark.py, the memory of its steps alone."""
    for figure in of_step(found, call):
        if "GPU memory" in figure.what:
            yield figure


def of_profile(found: dict, call: Call) -> Iterator[Figure]:
    """Idle time and the longest kernels: of steps by batch size, and of filling."""
    del call
    profiles = [(f"batch {row['batch_size']}", "step", row.get("profile")) for row in found["ours"]]
    profiles.append((f"filling, {found.get('fill_images')} images", "filling", found.get("fill_profile")))
    for name, once, profile in profiles:
        if profile is None:
            continue
        scene = f"{found['shape']}, {name}"
        if "idle_share" in profile:
            note = f"{profile['steps']} profiled {once}s, copies {profile['copies_ms']:.2f} ms a {once}"
            yield Figure(f"{scene}: no kernel runs", 100 * profile["idle_share"], "%", note=note)
        details = tuple(
            f"{kernel['ms']:9.3f} ms {kernel['share']:6.1%} {kernel['calls']:7.0f} calls  {kernel['name']}"
            for kernel in profile["kernels"][:KERNELS]
        )
        whole_ms = sum(kernel["ms"] for kernel in profile["kernels"])
        yield Figure(f"{scene}: longest kernels", whole_ms, f"ms a {once} in these", note="below", details=details)


def of_memory(rows: list[dict], call: Call) -> Iterator[Figure]:
    """The most GPU memory of a run, by its training_log.json: loading and filling are in it."""
    peaks = [row["gpu_gib"] for row in rows if "gpu_gib" in row]
    what, limit = (
        f"{call.shape}, batch 1: most GPU memory of a whole run",
        MOST_MEMORY_GIB if call.has_targets else None,
    )
    if peaks:
        yield Figure(what, max(peaks), "GiB", at_most=limit)
    elif any(row["kind"] == "train" for row in rows):
        yield Figure(what, None, note="no GPU")


def of_job(rows: list[dict], call: Call) -> Iterator[Figure]:
    """A whole training run: seconds from the start of the command to its end."""
    trained, scores = ([row for row in rows if row["kind"] == kind] for kind in ("train", "val"))
    epochs_s = sum(last["step_s"] * (last["step"] / last["epoch"]) for last in trained)
    note = f"{len(trained)} epochs, {epochs_s:.0f} s of them in steps"
    if trained and scores:
        note += f"; validation Dice {scores[0]['dice']:.3f} -> {scores[-1]['dice']:.3f}"
    what = f"{call.shape}: a whole run, features included"
    if call.exit_code == 0:
        yield Figure(what, call.seconds, "s", at_most=MOST_JOB_S if call.has_targets else None, note=note)
    else:
        yield Figure(what, None, note=f"not finished after {call.seconds:.0f} s: {note}")


def of_loss(found: dict, call: Call) -> Iterator[Figure]:
    """What gpu_losses.py writes."""
    del call
    loss = found.get("found")
    if loss:
        words = f"ComboLoss forward and backward, {loss['batch']}"
        yield Figure(words, loss["ms"], "ms", at_most=loss.get("at_most_ms"))
        yield Figure(f"{words}: against eager", loss["times_eager"], "x", at_least=loss.get("at_least_times_eager"))


def of_sizes(rows: list[dict], call: Call) -> Iterator[Figure]:
    """What gpu_sizes.py writes."""
    for row in rows:
        name = Path(row["shape"]).stem
        limits = (MOST_OVER_READ, MOST_LOADING) if call.on_gpu else (None, None)
        if "load_s" in row:
            note = f"{row['load_s']:.2f} s against {row['read_s']:.2f} s, {row['bytes'] / GB:.2f} GB, cache warm"
            yield Figure(f"{name}: loading against reading", row["load_over_read"], "x", limits[0], note=note)
            yield Figure(f"{name}: host memory of loading, no file's", row["host_anonymous_peak"] / GB, "GB")
        if "cold_load_s" in row:
            cold, note = row["cold_load_s"] / row["cold_read_s"], f"{row['cold_load_s']:.2f} s, page cache empty"
            yield Figure(f"{name}: loading against reading, cold", cold, "x", limits[0], note=note)
        if "gpu_peak" in row:
            peak = row["gpu_peak"] / row["bytes"]
            yield Figure(f"{name}: GPU memory of loading against the weights", peak, "x", limits[1])
        if "gpu_run_gib" in row:
            yield Figure(f"{name}: most GPU memory of a run, batch 1, all recomputed", row["gpu_run_gib"], "GiB")
        if "step_ms" in row:
            yield Figure(f"{name}: a step, batch 1, all recomputed", row["step_ms"], "ms")
        if "reload_s" in row:
            yield Figure(f"{name}: export", row["export_s"], "s", note=f"loaded again in {row['reload_s']:.2f} s")
        if "failed" in row:
            yield Figure(f"{name}: failed", None, note=row["failed"][-200:])


def of_tests(found: ElementTree.Element, call: Call) -> Iterator[Figure]:
    """JUnit XML of pytest."""
    del call
    suites = list(found.iter("testsuite"))
    count = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "skipped", "failures", "errors")}
    passed = count["tests"] - count["skipped"] - count["failures"] - count["errors"]
    broken = [
        case for case in found.iter("testcase") if case.find("failure") is not None or case.find("error") is not None
    ]
    names = tuple(f"{case.get('classname')}::{case.get('name')}" for case in broken)
    note = f"{passed} passed, {count['skipped']} skipped"
    at_most = 0 if passed else None  # where all are skipped nothing was tried
    yield Figure("GPU tests that fail", count["failures"] + count["errors"], at_most=at_most, note=note, details=names)


def of_rows(rows: list[dict], call: Call) -> Iterator[Figure]:
    """What another script has put into words itself: Figure's fields."""
    del call
    for row in rows:
        yield Figure(**row)


READERS: dict[str, Callable[..., Iterator[Figure]]] = {
    "speed": of_step,
    "start": of_start,
    "shapes": of_step,
    "scaling": of_step,
    "profile": of_profile,
    "memory": of_memory,
    "memory:steps": of_peak,
    "seed_job": of_job,
    "loss": of_loss,
    "sizes": of_sizes,
    "tests": of_tests,
    "batches": of_rows,
    "sweep": of_rows,
}


def _limits(targets: list[dict], key: str, batch: int | None, factor: float = 1) -> dict[str, float]:
    """Of the benchmark's own list, for Figure."""
    for target in targets:
        if target["figure"] == key and target["batch_size"] in (batch, None):
            return {side: factor * target[side] for side in ("at_most", "at_least") if side in target}
    return {}
