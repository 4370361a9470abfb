"""Measures ComboLoss forward and backward on one GPU: eager, torch.compile and the kernels.

Usage: python tests/gpu_losses.py OUT [--batches 8x1024,8x512] [--calls 200] [--blocks] [--host] [--without_compile]
Twice per batch: logits at the masks' size (the loss alone), and logits on a 256 x 256 grid (interpolation and loss).
Prints a table and writes OUT/losses.json, batch by batch: three times of a call (see `milliseconds`); peak memory above
the inputs; largest difference of the total and of the gradient from the formulas in fp64.
--blocks also tries other block sizes of the kernels, --host tells where the CPU spends a call of theirs; torch.compile
takes most of the script's two or three minutes.
Without a GPU there are no kernels: the script then shows that it runs, with --batches 2x64 --calls 4 in a second.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from sft import losses  # noqa: E402
from sft.config import TrainConfig  # noqa: E402
from sft.engine import in_this_thread  # noqa: E402
from sft.model.sa2va import upsample  # noqa: E402

CONFIG = TrainConfig()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCHES = "8x1024,1x512,8x512,32x512"
GRID_PX, ROUNDS = 256, 5
TARGET, AT_MOST_MS, AT_LEAST_TIMES_EAGER = "8x1024x1024", 0.35, 4
BLOCKS = {"PIXELS": (512, 1024, 2048, 4096), "ROWS": (2, 4, 8, 16), "COLUMNS": (128, 256, 512), "LOGITS": (128, 256)}
Loss = Callable[[Tensor, Tensor], Tensor]


def eager(logits: Tensor, masks: Tensor) -> Tensor:
    enlarged = logits if logits.shape == masks.shape else upsample(logits, tuple(masks.shape[1:]))
    return losses.by_formulas(enlarged, masks, CONFIG)["total"]


def kernels(logits: Tensor, masks: Tensor) -> Tensor:
    return losses.combo(logits, masks, CONFIG)["total"]


def gradient_of(loss: Loss, logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    total = loss(logits, masks)
    with in_this_thread():  # as in a step
        return total.detach(), torch.autograd.grad(total, logits)[0]


def milliseconds(candidates: dict[str, Loss], logits: Tensor, masks: Tensor, calls: int) -> dict[str, dict[str, float]]:
    """Three times of a call, each the median of the rounds.

    ms: calls follow each other as fast as they are issued; device_ms: what of it the device works; alone_ms: a single
    call, from an idle device to an idle device. All candidates take turns: what else the machine does meanwhile
    meets each of them.
    """
    ways = {"ms": issued, "device_ms": queued, "alone_ms": alone}
    rounds = [
        {(name, way): time_of(loss, logits, masks, -(-calls // ROUNDS)) for way, time_of in ways.items()}
        for _ in range(1 + ROUNDS)  # the first one warms up
        for name, loss in candidates.items()
    ]
    return {
        name: {way: statistics.median([one[name, way] for one in rounds if (name, way) in one][1:]) for way in ways}
        for name in candidates
    }


def issued(loss: Loss, logits: Tensor, masks: Tensor, calls: int, asleep: bool = False) -> float:
    """One call of many that are issued without waiting, to a device that is idle or asleep meanwhile."""
    wait()
    if asleep and DEVICE.type == "cuda":
        torch.cuda._sleep(200_000_000)
    start = mark()
    for _ in range(calls):
        gradient_of(loss, logits, masks)
    return milliseconds_since(start) / calls


def queued(loss: Loss, logits: Tensor, masks: Tensor, calls: int) -> float:
    """The same where the device sleeps while the calls are issued: its own time, without the launches'."""
    return issued(loss, logits, masks, calls, asleep=True)


def alone(loss: Loss, logits: Tensor, masks: Tensor, calls: int) -> float:
    """One call, from an idle device to an idle device."""
    times = []
    for _ in range(calls):
        wait()
        start = mark()
        gradient_of(loss, logits, masks)
        times.append(milliseconds_since(start))
    return statistics.median(times)


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def mark() -> torch.cuda.Event | float:
    if DEVICE.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds_since(start: torch.cuda.Event | float) -> float:
    end = mark()
    wait()
    return 1000 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def peak_mib(loss: Loss, logits: Tensor, masks: Tensor) -> float:
    if DEVICE.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradient_of(loss, logits, masks)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def inputs(batch: int, side: int, grid: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    logits = 4 * torch.randn(batch, grid, grid, generator=generator, device=DEVICE)
    masks = torch.rand(batch, side, side, generator=generator, device=DEVICE) < 0.2
    return logits.requires_grad_(), masks


def measure(batch: int, side: int, grid: int, candidates: dict[str, Loss], calls: int) -> list[dict]:
    logits, masks = inputs(batch, side, grid)
    exact_logits = logits.detach().double().requires_grad_()
    exact_total, exact = gradient_of(lambda x, m: losses.combo(x, m, CONFIG)["total"], exact_logits, masks)
    if "compile" in candidates:
        torch._dynamo.reset()
    rows = []
    for name, loss in candidates.items():
        started = time.perf_counter()
        total, gradient = gradient_of(loss, logits, masks)
        wait()
        row = {"loss": name, "batch": f"{batch}x{side}x{side}", "grid": grid, "first_s": time.perf_counter() - started}
        row |= {
            "total_error": abs(total.item() - exact_total.item()) / abs(exact_total.item()),
            "gradient_error": ((gradient - exact).abs().max() / exact.abs().max()).item(),
        }
        del total, gradient
        rows.append(row | {"peak_mib": peak_mib(loss, logits, masks)})
    times = milliseconds(candidates, logits, masks, calls)
    for row in rows:
        row |= times[row["loss"]]
        print(
            f"{row['batch']:>12} from {grid:4} {row['loss']:8} {row['ms']:7.3f} ms, device {row['device_ms']:6.3f} ms, "
            f"alone {row['alone_ms']:6.3f} ms, "
            f"x{rows[0]['ms'] / row['ms']:5.1f}, {row['peak_mib']:7.1f} MiB, "
            f"error {row['total_error']:.0e} / {row['gradient_error']:.0e}, first {row['first_s']:.1f} s",
            flush=True,
        )
    return rows


def try_blocks(calls: int) -> list[dict]:
    """One setting changed at a time, at the size of the target and at that of the usual batch."""
    from sft import loss_kernels  # needs triton

    rows = []
    for name, values in BLOCKS.items():
        usual = getattr(loss_kernels, name)
        for value in values:
            setattr(loss_kernels, name, value)
            row = {"setting": name, "value": value, "usual": value == usual}
            for batch, side in ((8, 1024), (8, 512)):
                for grid in (side, GRID_PX):
                    row[f"{batch}x{side} from {grid}"] = queued(kernels, *inputs(batch, side, grid), calls)
            rows.append(row)
            print(row, flush=True)
        setattr(loss_kernels, name, usual)
    return rows


def host_us(calls: int) -> dict[str, float]:
    """Medians, in microseconds of the CPU, of the parts of a call of the kernels at the size of the target."""
    from sft import loss_kernels  # needs triton

    logits, masks = inputs(8, 1024, 1024)
    stamps: list[float] = []
    backward = loss_kernels._Combo.backward

    def stamped(context, *gradients):
        stamps.append(time.perf_counter())
        found = backward(context, *gradients)
        stamps.append(time.perf_counter())
        return found

    loss_kernels._Combo.backward = staticmethod(stamped)
    times: dict[str, list[float]] = {"forward": [], "to backward": [], "backward": [], "back": []}
    try:
        for _ in range(calls):
            wait()
            stamps[:] = [time.perf_counter()]
            total = kernels(logits, masks)
            stamps.append(time.perf_counter())
            with in_this_thread():
                torch.autograd.grad(total, logits)
            stamps.append(time.perf_counter())
            for name, (start, end) in zip(times, itertools.pairwise(stamps), strict=True):
                times[name].append(1e6 * (end - start))
    finally:
        loss_kernels._Combo.backward = backward
    return {name: statistics.median(values) for name, values in times.items()}


def found_of(rows: list[dict]) -> dict:
    """The first batch whose loss alone is measured, beside the targets, which hold for TARGET on a GPU."""
    first = rows[0]
    ms = {row["loss"]: row["ms"] for row in rows if (row["batch"], row["grid"]) == (first["batch"], first["grid"])}
    found = {"batch": first["batch"], "ms": ms["kernels"], "times_eager": ms["eager"] / ms["kernels"]}
    if DEVICE.type == "cuda" and first["batch"] == TARGET:
        found |= {"at_most_ms": AT_MOST_MS, "at_least_times_eager": AT_LEAST_TIMES_EAGER}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--batches", default=BATCHES, help="images x side, with commas between")
    parser.add_argument("--calls", type=int, default=200, help="timed ones")
    parser.add_argument("--blocks", action="store_true", help="also other block sizes")
    parser.add_argument("--host", action="store_true", help="also the CPU's share of a call, by its parts")
    parser.add_argument("--without_compile", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(device, "torch", torch.__version__)
    report = {"device": device, "torch": torch.__version__, "rows": [], "blocks": []}
    candidates = {"eager": eager, "compile": torch.compile(eager, dynamic=False), "kernels": kernels}
    if args.without_compile:
        del candidates["compile"]
    for batch, side in (map(int, words.split("x")) for words in args.batches.split(",")):
        for grid in (side, GRID_PX):
            report["rows"] += measure(batch, side, grid, candidates, args.calls)
            report["found"] = found_of(report["rows"])
            write(args.out, report)
    found = report["found"]
    print(f"{found['batch']}: {found['ms']:.3f} ms (at most {AT_MOST_MS} for {TARGET}), ", end="")
    print(f"{found['times_eager']:.1f}x eager (at least {AT_LEAST_TIMES_EAGER})")
    if args.host and DEVICE.type == "cuda":
        report["host_us"] = host_us(args.calls)
        print("CPU, us:", ", ".join(f"{name} {value:.0f}" for name, value in report["host_us"].items()))
        write(args.out, report)
    if args.blocks:
        report["blocks"] = try_blocks(args.calls)
        write(args.out, report)


def write(out: Path, report: dict) -> None:
    (out / "losses.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
