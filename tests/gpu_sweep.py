"""What early stopping saves and what sharing a GPU gains, in sweeps on the embedded base.

Usage: python3 tests/gpu_sweep.py OUT rates|ranks|asha [--epochs 27] [--images 320] [--small] [--folder DIR]
  rates  trials per hour with 1, 2, 4 and 8 trials on a GPU (on a CPU: one per core), or with --at_a_time of them
  ranks  trials of two ranks, under ASHA: with two GPUs or more each rank has its own
  asha   27 trials to their end and the same 27 under ASHA from epoch 3 and, of 81 epochs, from epoch 9: device hours
         and best Dice, beside the spread between seeds; with few images starts are a large part of the hours
OUT/sweep.json receives rows (fields of Figure in gpu_readers.py), each as soon as it is known. --small: few and short
trials, to see that it runs. --epochs, --images: of asha; fewer on a CPU. DIR keeps the sweeps. Uses the python3 of the
machine as it is; ray must be there.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gpu_readers import Figure  # noqa: E402

from tune import tally, trials  # noqa: E402
from tune.trials import Trial  # noqa: E402

SHARES = {1: "1", 2: "0.5", 4: "0.25", 8: "0.125"}
RATE_TRIALS, RATE_EPOCHS = 8, 4
# Epochs 3, 9, 27: of 81, as in the Hyperband paper (its section 3.2), the third lies in the warm-up.
ASHA_TRIALS, ASHA_EPOCHS, IMAGES, SEEDS = 27, 27, 320, 3


def main() -> int:
    """Measures one part; returns 1 if a sweep failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("part", choices=("rates", "ranks", "asha"))
    parser.add_argument("--epochs", type=int, default=ASHA_EPOCHS)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--at_a_time", type=int, choices=tuple(SHARES), nargs="+")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="sa2va_sft_sweeps_"))
    folder.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Figure] = []

    def keep(figure: Figure) -> None:
        rows.append(figure)
        trials.write_json(options.out / "sweep.json", [dataclasses.asdict(row) for row in rows])
        print(f"{figure.what}: {figure.measured}", flush=True)

    match options.part:
        case "rates":
            rates(folder, keep, options.small, options.at_a_time)
        case "ranks":
            ranks(folder, keep, options.small)
        case "asha":
            few = (4, 3, 5, 2)
            asha(folder, keep, *(few if options.small else (ASHA_TRIALS, options.epochs, options.images, SEEDS)))
    return 0


def rates(folder: Path, keep, small: bool, at_a_time: list[int] | None) -> None:
    """Trials per hour for each number of trials at a time."""
    import torch

    for count in at_a_time or (SHARES if torch.cuda.is_available() else (1, 2)):
        number, epochs = (2, 1) if small else (max(RATE_TRIALS, count), RATE_EPOCHS)
        words = ["--num_trials", number, "--num_epochs", epochs, "--no_early_stop", "--max_concurrent", count]
        found = search(folder, f"rate_{count}", *words, "--gpus_per_trial", SHARES[count])
        note = f"{number} trials of {epochs} epochs; start to first step {start_s(found):.1f} s"
        keep(Figure(f"trials per hour, {count} at a time", per_hour(found), note=note))


def ranks(folder: Path, keep, small: bool) -> None:
    """Trials that span two GPUs, some of which wait or are stopped."""
    import torch

    number, epochs, grace = (2, 2, 1) if small else (4, 6, 2)
    words = ["--num_trials", number, "--num_epochs", epochs, "--grace", grace, "--ranks_per_trial", 2]
    found = search(folder, "ranks", *words, *(["--gpus_per_trial", 2] if torch.cuda.is_available() else []))
    ended = ", ".join(f"{status} {count}" for status, count in Counter(trial.status for trial in found).items())
    note = f"{ended}; epochs {epochs_of(found)}; start to first step {start_s(found):.1f} s"
    keep(Figure("trials per hour, two ranks each", per_hour(found), note=note))
    keep(Figure("best Dice with two ranks", trials.best_of(found).dice_so_far))


def asha(folder: Path, keep, number: int, epochs: int, images: int, seeds: int) -> None:
    """Device time and best Dice with and without early stopping, on the same points."""
    data = folder / f"images_{images}"
    if not (data / "dataset.json").exists():
        command = [sys.executable, "-m", "sft.synthetic", data, "--count", images, "--seed", 7, "--workers", 0]
        subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
    words = ["--config", ROOT / "tune" / "demo.yaml", "--space", ROOT / "tune" / "demo_space.yaml"]
    words += ["--data_root", data, "--num_trials", number, "--num_epochs", epochs, "--gpus_per_trial", "0.125"]
    graces = [grace for grace in (3, 9) if epochs >= 9 * grace] or [1]
    own, best = {}, {}
    for grace in graces:
        again = ["--seeds", seeds] if grace == graces[-1] else []
        found = search(folder, f"asha_{grace}", *words, "--grace", grace, *again)
        own[grace] = [trial for trial in found if not trial.is_repeat]
        best[grace] = trials.best_of(own[grace])
        note = f"trial {best[grace].number} of {number}"
        keep(Figure(f"best Dice with ASHA from epoch {grace}", best[grace].dice_so_far, note=note))
    spread, settings = spread_of(found)
    keep(Figure("spread of Dice between seeds", spread, note=f"of {settings} settings with other seeds, pooled"))
    whole = search(folder, "whole", *words, "--no_early_stop")
    best_whole = trials.best_of(whole)
    keep(Figure("best Dice without early stopping", best_whole.dice_so_far, note=f"trial {best_whole.number}"))
    for grace in graces:
        taken, in_all = hours(own[grace]), hours(whole)
        note = f"{taken:.3f} of {in_all:.3f} hours; epochs {epochs_of(own[grace])} of {epochs_of(whole)}"
        keep(Figure(f"device time of ASHA from epoch {grace} against none", taken / in_all, at_most=0.35, note=note))
        lost = best_whole.dice_so_far - best[grace].dice_so_far
        keep(Figure(f"Dice lost by ASHA from epoch {grace}", lost, at_most=spread, note="at most the spread"))


def spread_of(found: list[Trial]) -> tuple[float, int]:
    """Standard deviation of the best Dice of whole trials between seeds, pooled over repeated settings; how many."""
    whole = {trial.number: trial.dice_so_far for trial in found if trial.status == "finished"}
    groups = [
        [*again.dices, *([whole[number]] if number in whole else [])] for number, again in tally.repeats(found).items()
    ]
    groups = [group for group in groups if len(group) > 1]
    return statistics.fmean(map(statistics.variance, groups)) ** 0.5, len(groups)


def search(folder: Path, name: str, *words: object) -> list[Trial]:
    """Runs a sweep, goes on with one that was cut off, or takes one that has ended; gives its trials."""
    sweep, ended = folder / name, folder / f"{name}.ended"
    if not ended.exists():
        given = ["--resume", sweep] if sweep.exists() else ["--storage_path", folder, "--name", name, *words]
        command = [sys.executable, ROOT / "tune" / "search.py", *given]
        subprocess.run(list(map(str, command)), check=True)
        ended.touch()
    return trials.read_all(sweep)


def per_hour(found: list[Trial]) -> float:
    """Trials per hour, from the start of the first process: what a row says of the time before it counts."""
    first = min(row["time"] - row["device_s"] for trial in found for row in trial.rows)
    last = max(row["time"] for trial in found for row in trial.rows)
    return 3600 * len(found) / (last - first)


def start_s(found: list[Trial]) -> float:
    """Seconds from a trial's start to its first step, the median."""
    return statistics.median(row["start_s"] for trial in found for row in trial.rows[:1])


def hours(found: list[Trial]) -> float:
    """Device time of trials; a trial's process counts while it lives."""
    return sum(trial.device_s for trial in found) / 3600


def epochs_of(found: list[Trial]) -> int:
    """Epochs that were trained."""
    return sum(trial.epoch for trial in found)


if __name__ == "__main__":
    sys.exit(main())
