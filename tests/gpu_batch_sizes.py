"""What batch sizes reach in Dice: at equal epochs, each at several learning rates, and at equal training time.

Usage: python3 tests/gpu_batch_sizes.py OUT [--sizes 1 4 16] [--factors 1 2 4] [FLAGS OF launch/train.py]
Without flags the demo is trained. A run's learning rate is the given one times a factor; at equal time each size has
the factor that was best for it, and as many epochs as fit the time of the slowest. OUT/batch_sizes.json receives rows
(fields of Figure in gpu_readers.py), each as soon as it is known. Uses the GPU if there is one, else the CPU.
"""

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gpu_readers import Figure  # noqa: E402

from sft.config import TrainConfig, override, parse_args  # noqa: E402


@dataclass(frozen=True)
class Found:
    """One run."""

    config: TrainConfig
    dice: float
    epoch: int
    training_s: float
    """In steps: start, validation and checkpoints aside."""


def main() -> int:
    """Runs all; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 2, 4])
    options, flags = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    base = parse_args(flags, demo=ROOT / "launch" / "configs" / "demo.yaml")
    base = override(base, {"output_dir": str(options.out / "runs"), "tensorboard": False, "keep": "latest"})
    rows: list[Figure] = []

    def run(kind: str, size: int, factor: float, epochs: int) -> Found:
        changes = {"batch_size": size, "learning_rate": base.learning_rate * factor, "num_epochs": epochs}
        found = trained(override(base, changes))
        note = f"Dice at epoch {found.epoch} of {epochs}, {found.training_s:.0f} s of training"
        rows.append(Figure(f"{kind}: batch {size}, rate {found.config.learning_rate:g}", found.dice, note=note))
        text = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
        (options.out / "batch_sizes.json").write_text(text + "\n", encoding="utf-8")
        print(f"{rows[-1].what}: {rows[-1].measured}", flush=True)
        return found

    best = {}
    for size in options.sizes:
        found = {factor: run("equal epochs", size, factor, base.num_epochs) for factor in options.factors}
        best[size] = max(found.items(), key=lambda item: item[1].dice)
    longest_s = max(one.training_s for _, one in best.values())
    for size, (factor, one) in best.items():
        epochs = round(base.num_epochs * longest_s / one.training_s)
        if epochs > base.num_epochs:  # the slowest has been run
            run("equal time", size, factor, epochs)
    return 0


def trained(config: TrainConfig) -> Found:
    """Trains and reads what the run's log says."""
    from sft.ranks import ensure_rank
    from sft.train import train

    ensure_rank()
    result = train(config)
    rows = json.loads((result.directory / "training_log.json").read_text(encoding="utf-8"))
    epochs = [row for row in rows if row["kind"] == "train"]
    before = [0, *(row["step"] for row in epochs)]
    training_s = sum(row["step_s"] * (row["step"] - start) for row, start in zip(epochs, before, strict=False))
    return Found(config, result.dice, result.epoch, training_s)


if __name__ == "__main__":
    sys.exit(main())
