"""Measures ComboLoss forward and backward on one GPU: eager, torch.compile and the kernels.

Usage: python tests/gpu_losses.py OUT [--blocks] [--without_compile]
Twice per batch: logits at the masks' size (the loss alone), and logits on a 256 x 256 grid (interpolation and loss).
Prints a table and writes OUT/losses.json: milliseconds, median of 200 after 50 to warm up; peak memory above the
inputs; largest difference of the total and of the gradient from the formulas in fp64. --blocks also tries other block
sizes of the kernels; torch.compile takes most of the script's two or three minutes.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from sft import loss_kernels, losses  # noqa: E402
from sft.config import TrainConfig  # noqa: E402
from sft.model.sa2va import upsample  # noqa: E402

CONFIG = TrainConfig()
BATCHES = [(1, 512), (8, 512), (8, 1024), (32, 512)]
GRID_PX = 256
WARM_UP, TIMED = 50, 200
TARGET = "8x1024x1024"
BLOCKS = {"PIXELS": (512, 1024, 2048, 4096), "ROWS": (2, 4, 8, 16), "COLUMNS": (128, 256, 512), "LOGITS": (128, 256)}
Loss = Callable[[Tensor, Tensor], Tensor]


def eager(logits: Tensor, masks: Tensor) -> Tensor:
    enlarged = logits if logits.shape == masks.shape else upsample(logits, tuple(masks.shape[1:]))
    return losses.by_formulas(enlarged, masks, CONFIG)["total"]


def kernels(logits: Tensor, masks: Tensor) -> Tensor:
    return losses.combo(logits, masks, CONFIG)["total"]


def gradient_of(loss: Loss, logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    total = loss(logits, masks)
    return total.detach(), torch.autograd.grad(total, logits)[0]


def milliseconds(loss: Loss, logits: Tensor, masks: Tensor) -> dict[str, float]:
    """Median of one call between two events, and of the device's own time when calls queue behind each other."""
    for _ in range(WARM_UP):
        gradient_of(loss, logits, masks)
    torch.cuda.synchronize()
    single = []
    for _ in range(TIMED):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        gradient_of(loss, logits, masks)
        end.record()
        torch.cuda.synchronize()
        single.append(start.elapsed_time(end))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The device sleeps while the calls are issued: what follows is its own time, without the launches'.
    torch.cuda._sleep(200_000_000)
    start.record()
    for _ in range(50):
        gradient_of(loss, logits, masks)
    end.record()
    torch.cuda.synchronize()
    return {"ms": statistics.median(single), "device_ms": start.elapsed_time(end) / 50}


def peak_mib(loss: Loss, logits: Tensor, masks: Tensor) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradient_of(loss, logits, masks)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def inputs(batch: int, side: int, grid: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(0)
    logits = 4 * torch.randn(batch, grid, grid, generator=generator, device="cuda")
    masks = torch.rand(batch, side, side, generator=generator, device="cuda") < 0.2
    return logits.requires_grad_(), masks


def measure(batch: int, side: int, grid: int, candidates: dict[str, Loss]) -> list[dict]:
    logits, masks = inputs(batch, side, grid)
    exact_logits = logits.detach().double().requires_grad_()
    exact_total, exact = gradient_of(lambda x, m: losses.combo(x, m, CONFIG)["total"], exact_logits, masks)
    torch._dynamo.reset()
    rows = []
    for name, loss in candidates.items():
        started = time.perf_counter()
        total, gradient = gradient_of(loss, logits, masks)
        torch.cuda.synchronize()
        row = {"loss": name, "batch": f"{batch}x{side}x{side}", "grid": grid, "first_s": time.perf_counter() - started}
        row |= {
            "total_error": abs(total.item() - exact_total.item()) / abs(exact_total.item()),
            "gradient_error": ((gradient - exact).abs().max() / exact.abs().max()).item(),
        }
        del total, gradient
        row |= milliseconds(loss, logits, masks) | {"peak_mib": peak_mib(loss, logits, masks)}
        rows.append(row)
        print(
            f"{row['batch']:>12} from {grid:4} {name:8} {row['ms']:8.3f} ms, device {row['device_ms']:7.3f} ms, "
            f"x{rows[0]['ms'] / row['ms']:5.1f}, {row['peak_mib']:7.1f} MiB, "
            f"error {row['total_error']:.0e} / {row['gradient_error']:.0e}, first {row['first_s']:.1f} s",
            flush=True,
        )
    return rows


def try_blocks() -> list[dict]:
    """One setting changed at a time, at the size of the target and at that of the usual batch."""
    rows = []
    for name, values in BLOCKS.items():
        usual = getattr(loss_kernels, name)
        for value in values:
            setattr(loss_kernels, name, value)
            row = {"setting": name, "value": value, "usual": value == usual}
            for batch, side in ((8, 1024), (8, 512)):
                for grid in (side, GRID_PX):
                    row[f"{batch}x{side} from {grid}"] = milliseconds(kernels, *inputs(batch, side, grid))["device_ms"]
            rows.append(row)
            print(row, flush=True)
        setattr(loss_kernels, name, usual)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", action="store_true", help="also other block sizes")
    parser.add_argument("--without_compile", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": [], "blocks": []}
    candidates = {"eager": eager, "compile": torch.compile(eager, dynamic=False), "kernels": kernels}
    if args.without_compile:
        del candidates["compile"]
    for batch, side in BATCHES:
        for grid in (side, GRID_PX):
            report["rows"] += measure(batch, side, grid, candidates)
    found = {(row["loss"], row["grid"]): row["ms"] for row in report["rows"] if row["batch"] == TARGET}
    mine, speedup = found["kernels", 1024], found["eager", 1024] / found["kernels", 1024]
    met = mine <= 0.35 and speedup >= 4
    print(f"{TARGET}: {mine:.3f} ms (at most 0.35), {speedup:.1f}x eager (at least 4): {'met' if met else 'MISSED'}")
    if args.blocks:
        report["blocks"] = try_blocks()
    (args.out / "losses.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
