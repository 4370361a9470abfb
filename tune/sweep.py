"""A sweep from its first line to its last: folder, features, trials, repeats, result.

Takes a `Plan`, leaves SWEEP/ with best.yaml, best_checkpoint/, trials.csv, report.html and pictures; returns the exit
code. Reading order is running order.
"""

import dataclasses
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from sft import __version__, devices
from sft.config import TrainConfig, override, to_yaml
from sft.ranks import rank_environ
from sft.settings import UserError
from tune import keeping, results, suggest, trials
from tune import space as spaces
from tune.options import Plan
from tune.progress import table
from tune.trials import Sweep, Trial, best_of

BEST_FILE = "best.yaml"
INTERRUPTED = 130  # exit code, as after Ctrl-C
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray")


def run(plan: Plan) -> int:
    """Runs or continues a sweep.

    Returns:
        0, or 130 where trials are left to go on with.

    Raises:
        UserError: a mistake, before the first trial.
    """
    suggest.check(plan)
    gpus = claim_devices(plan.seed_setting)
    folder, sweep = open_folder(plan)
    holder = keeping.lock(folder)
    from tune import driver  # Ray loads here

    print(f"Sweep {folder}", flush=True)
    driver.start_ray(plan.sweep.address, gpus)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # Ray has put its own there
    needs, concurrent = driver.resources(plan.sweep)
    sweep = dataclasses.replace(sweep, gpus_per_trial=needs["GPU"])
    plan = dataclasses.replace(plan, seed_setting=share_features(plan.seed_setting, needs["GPU"]))
    sweep = dataclasses.replace(sweep, base=dataclasses.asdict(plan.seed_setting))
    prepare(plan, sweep, folder, needs, concurrent)
    try:
        finished = search(driver.Phase(plan, sweep, folder, needs, concurrent), plan, folder)
    except KeyboardInterrupt:
        finished = False
    conclude(folder, sweep, finished)
    os.close(holder)
    return 0 if finished else INTERRUPTED


def claim_devices(base: TrainConfig) -> list[str]:
    """This machine's devices that trials may use, all that are visible unless some are named; hides the others.

    Raises:
        UserError: a device that does not exist, or is not to be used.
    """
    installed = devices.installed_gpus()
    visible = devices.visible_devices(os.environ.get(devices.LIMIT), installed)
    everything = ",".join(device.name for device in visible) or None
    wanted = base.gpu or (everything if not base.include else None)
    environ = {name: value for name, value in os.environ.items() if name not in rank_environ(0, 1)}
    plan = devices.plan(wanted, base.include, environ, installed)
    if installed:
        os.environ[devices.LIMIT] = ",".join(plan.devices)
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    return list(plan.devices) if installed else []


def open_folder(plan: Plan) -> tuple[Path, Sweep]:
    """Makes the sweep's folder with sweep.json, or takes up the one that is continued."""
    space = spaces.as_record(plan.space)
    if plan.resumed:
        before = trials.read_sweep(plan.resumed)
        options = dataclasses.asdict(plan.sweep) | {"resume": None}
        sweep = dataclasses.replace(before, num_trials=suggest.new_trials(plan), options=options)
        trials.write_sweep(plan.resumed, sweep)
        return plan.resumed, sweep
    name = plan.sweep.name or f"sweep_{time.strftime('%Y%m%d_%H%M%S')}"
    folder = Path(plan.sweep.storage_path).absolute() / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{folder} exists; give another --name, or continue it with --resume {folder}") from None
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; give another --storage_path") from None
    sweep = Sweep(
        name=name,
        base=dataclasses.asdict(plan.seed_setting),
        space=space,
        search=plan.sweep.search,
        num_trials=suggest.new_trials(plan),
        early_stop=plan.sweep.early_stop,
        grace_epochs=plan.sweep.grace * plan.seed_setting.validate_every,
        reduction=plan.sweep.reduction,
        seed=plan.seed_setting.seed,
        gpus_per_trial=plan.sweep.gpus_per_trial,
        started=time.strftime("%Y-%m-%d %H:%M:%S"),
        versions={"sa2va-sft": __version__, "python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
        command=sys.argv,
        options=dataclasses.asdict(plan.sweep),
    )
    trials.write_sweep(folder, sweep)
    return folder, sweep


def share_features(base: TrainConfig, gpus_per_trial: float) -> TrainConfig:
    """Frozen features are read from the disk, whose cache all trials share; in GPU memory, too, if a trial has one."""
    if base.feature_cache != "auto" or gpus_per_trial >= 1:
        return base
    return override(base, {"feature_cache": "disk"})


def prepare(plan: Plan, sweep: Sweep, folder: Path, needs: dict[str, float], concurrent: int) -> None:
    """Computes the frozen features on every node, records the split, checks the disk."""
    from tune import driver

    print(
        f"{sweep.num_trials} trials, {concurrent} at a time, each with {needs['GPU']:g} GPUs and {needs['CPU']:g} cores"
        f" | {plan.sweep.search} search"
        + (f", ASHA from epoch {sweep.grace_epochs} of {sweep.num_epochs}" if sweep.early_stop else ", no early stop"),
        flush=True,
    )
    rank = keeping.highest_rank(plan.seed_setting, plan.space)
    config = override(plan.seed_setting, {"output_dir": str(folder), "gpu": None, "include": None})
    found = driver.prepare_nodes(config, rank, needs)
    for line in dict.fromkeys(one.features for one in found):
        print(line, flush=True)
    trials.write_sweep(folder, sweep)
    if not (folder / "split.json").exists():
        trials.write_json(folder / "split.json", found[0].split)
    left = sum(trial.status == "unfinished" for trial in trials.read_all(folder))
    keeping.check_disk(folder, found[0].checkpoint_bytes, concurrent, left)


def search(phase: "driver.Phase", plan: Plan, folder: Path) -> bool:  # noqa: F821
    """The trials, then the repeats with other seeds; whether all have ended."""
    known = trials.read_all(folder)
    queue = [trial for trial in known if trial.status == "unfinished" and not trial.is_repeat]
    suggestions = suggest.Suggestions(plan, known)
    if not phase.run(queue, suggest.new_trials(plan), suggestions, plan.sweep.early_stop):
        return False
    known = trials.read_all(folder)
    again = [trial for trial in known if trial.status == "unfinished"]
    again += suggest.repeats(known, plan.seed_setting, plan.sweep.seeds)
    return phase.run(again, 0, None, early_stop=False)


def conclude(folder: Path, sweep: Sweep, finished: bool) -> None:
    """Writes the result and prints what is known."""
    found = trials.read_all(folder)
    keeping.keep_best(folder, found, [])
    results.write(folder, sweep, found)
    write_best(folder, sweep, found)
    print(f"\n{table(found, ())}\n\n{results.verdict(sweep, found)}")
    names = (BEST_FILE, keeping.BEST, "trials.csv", "report.html")
    for path in (folder / name for name in names):
        if path.exists():
            print(f"  {path}")
    if not finished:
        left = sum(trial.status == "unfinished" for trial in found) + max(0, sweep.num_trials - len(found))
        print(f"{left} trials have not ended: python tune/search.py --resume {folder}")


def write_best(folder: Path, sweep: Sweep, found: Sequence[Trial]) -> None:
    """Writes best.yaml: the best trial's settings, for `launch/train.py --config`."""
    best = best_of(found)
    if best is None:
        return
    base = TrainConfig(**sweep.base)
    settings = best.settings | {"feature_cache": "auto", "gpu": None, "include": None}
    text = f"# Trial {best.number} of {sweep.name}: validation Dice {best.dice_so_far:.4f}, {best.epoch} epochs\n"
    partial = folder / f"{BEST_FILE}.partial"
    partial.write_text(text + to_yaml(trials.config_of(base, settings)), encoding="utf-8")
    os.replace(partial, folder / BEST_FILE)
