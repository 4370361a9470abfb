"""A sweep from its first line to its last: folder, features, trials, repeats, result.

Takes a `Plan`, leaves SWEEP/ with best.yaml, best_checkpoint/, trials.csv, report.html and pictures; returns the exit
code. Reading order is running order.
"""

import dataclasses
import errno
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from sft import __version__, devices
from sft.config import TrainConfig, override
from sft.ranks import rank_environ
from sft.settings import UserError
from tune import keeping, results, suggest, tally, trials
from tune import space as spaces
from tune.options import Plan
from tune.progress import STOPPING, table
from tune.trials import Sweep, Trial

INTERRUPTED = 130  # exit code, as after Ctrl-C
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray")


def run(plan: Plan) -> int:
    """Runs or continues a sweep.

    Returns:
        0; 130 where trials are left to go on with, unless time_budget_s has ended the sweep.

    Raises:
        UserError: a mistake, before the first trial.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("a sweep needs the package ray: pip install 'ray[tune]'")
    suggest.check(plan)
    gpus = claim_devices(plan.seed_setting)
    folder = plan.resumed or make_folder(plan)
    holder = keeping.lock(folder)  # before anything in it is changed: somebody else may be running it
    try:
        return _drive(plan, folder, gpus)
    finally:
        os.close(holder)


def _drive(plan: Plan, folder: Path, gpus: list[str]) -> int:
    try:
        from tune import driver, nodes  # Ray loads here

        print(f"Sweep {folder}", flush=True)
        sweep = record(plan, folder)
        if not plan.resumed:
            trials.write_sweep(folder, sweep)  # to go on from, however soon it is interrupted
        nodes.start_ray(plan.sweep.address, gpus)
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # Ray has put its own there
        needs, concurrent = nodes.resources(plan.sweep)
        plan = dataclasses.replace(plan, seed_setting=share_features(plan.seed_setting, needs["GPU"]))
        base = dataclasses.asdict(plan.seed_setting)
        sweep = dataclasses.replace(sweep, gpus_per_trial=needs["GPU"], base=base)
        forks = nodes.Forks(needs, plan.sweep.ranks(needs["GPU"]))
        plan, sweep = prepare(plan, sweep, folder, needs, concurrent)
        phase = driver.Phase(plan, sweep, folder, needs, concurrent, forks.addresses())
    except BaseException:
        if not plan.resumed:
            shutil.rmtree(folder, ignore_errors=True)  # it holds no trial, and its name is wanted again
        raise
    try:
        as_asked = _search_and_conclude(phase, plan, sweep, folder)
    except OSError as error:
        if error.errno not in NO_ROOM and not isinstance(error, shutil.Error):
            raise
        text = f"{keeping.in_words(error)}; free some space, then python tune/search.py {resume_flag(folder)}"
        raise UserError(text) from error
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ray ends its processes now, and would answer with a traceback
    return 0 if as_asked else INTERRUPTED


def _search_and_conclude(phase: "driver.Phase", plan: Plan, sweep: Sweep, folder: Path) -> bool:  # noqa: F821
    """Returns whether the sweep has ended as it was asked to: all trials have ended, or time is over."""
    interrupted = False
    try:
        finished = search(phase, plan, folder)
    except KeyboardInterrupt:
        if phase.interrupted:  # before: this is the second Ctrl-C
            raise
        print(STOPPING, flush=True)  # it came between the runs of Ray
        finished, interrupted = False, True
    time_is_over = phase.left_s <= 0 and not (interrupted or phase.interrupted)
    conclude(folder, sweep, finished, time_is_over, phase.reported)
    return finished or time_is_over


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


def make_folder(plan: Plan) -> Path:
    """Makes the folder of a new sweep.

    Raises:
        UserError: it exists, or cannot be made.
    """
    name = plan.sweep.name or f"sweep_{time.strftime('%Y%m%d_%H%M%S')}"
    folder = Path(plan.sweep.storage_path).absolute() / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{folder} exists; give another --name, or continue it: {resume_flag(folder)}") from None
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; give another --storage_path or --name") from None
    return folder


def record(plan: Plan, folder: Path) -> Sweep:
    """What the sweep is; of one that is continued, with what has been given anew."""
    options = dataclasses.asdict(plan.sweep) | {"resume": None}
    total = suggest.new_trials(plan, trials.read_all(folder))
    if plan.resumed:
        return dataclasses.replace(trials.read_sweep(folder), num_trials=total, options=options)
    return Sweep(
        name=folder.name,
        base=dataclasses.asdict(plan.seed_setting),
        space=spaces.as_record(plan.space),
        search=plan.sweep.search,
        num_trials=total,
        early_stop=plan.sweep.early_stop,
        grace_epochs=plan.sweep.grace * plan.seed_setting.validate_every,
        reduction=plan.sweep.reduction,
        seed=plan.seed_setting.seed,
        gpus_per_trial=plan.sweep.gpus_per_trial,
        started=time.strftime("%Y-%m-%d %H:%M:%S"),
        versions={"sa2va-sft": __version__, "python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
        command=sys.argv,
        options=options,
        points=list(plan.points),
    )


def resume_flag(folder: Path) -> str:
    """How a sweep is continued, for a shell."""
    return f"--resume {shlex.quote(str(folder))}"


def share_features(base: TrainConfig, gpus_per_trial: float) -> TrainConfig:
    """Frozen features are read from the disk, whose cache all trials share; in GPU memory, too, if a trial has one."""
    if base.feature_cache != "auto" or gpus_per_trial >= 1:
        return base
    return override(base, {"feature_cache": "disk"})


def prepare(plan: Plan, sweep: Sweep, folder: Path, needs: dict[str, float], concurrent: int) -> tuple[Plan, Sweep]:
    """Computes the frozen features on every node, records the split, checks the disk; settles the batch size, if auto:
    it is one for all trials."""
    from tune import nodes

    print(
        f"{sweep.num_trials} trials, {concurrent} at a time, each with {needs['GPU']:g} GPUs and {needs['CPU']:g} cores"
        f" | {plan.sweep.search} search"
        + (f", ASHA from epoch {sweep.grace_epochs} of {sweep.num_epochs}" if sweep.early_stop else ", no early stop"),
        flush=True,
    )
    if tried := suggest.tried_anyway(plan):
        print(f"  {tried} combinations of the grid are tried as seed setting or given point, and not once more")
    if left_out := suggest.left_out(plan, trials.read_all(folder)):
        print(
            f"  {left_out} combinations of the grid are left out: --num_trials {sweep.num_trials + left_out} tries all"
        )
    rank = keeping.highest_rank(plan.seed_setting, plan.space, plan.points)
    place = {"output_dir": str(folder), "gpu": None, "include": None, "keep": "latest"}  # as its trials have it
    config = override(plan.seed_setting, place | {"lora_rank": rank})
    found = nodes.prepare_nodes(config, needs)
    for line in dict.fromkeys(one.features for one in found):
        print(line, flush=True)
    if plan.seed_setting.batch_size == "auto":
        base = override(plan.seed_setting, {"batch_size": min(one.batch_size for one in found)})
        print(f"batch_size auto: {base.batch_size} for every trial", flush=True)
        plan = dataclasses.replace(plan, seed_setting=base)
        total = suggest.new_trials(plan, trials.read_all(folder))  # a grid may hold what the seed setting now is
        sweep = dataclasses.replace(sweep, base=dataclasses.asdict(base), num_trials=total)
    trials.write_sweep(folder, sweep)
    if not (folder / trials.SPLIT_FILE).exists():
        trials.write_json(folder / trials.SPLIT_FILE, found[0].split)
    on_disk = sum(trial.status == "unfinished" for trial in trials.read_all(folder))
    keeping.check_disk(folder, found[0].checkpoint_bytes, concurrent, max(0, tally.most_waiting(sweep) - on_disk))
    return plan, sweep


def search(phase: "driver.Phase", plan: Plan, folder: Path) -> bool:  # noqa: F821
    """The trials, then the repeats with other seeds; whether all have ended."""
    known = trials.read_all(folder)
    queue = [trial for trial in known if trial.status == "unfinished" and not trial.is_repeat]
    suggestions = suggest.Suggestions(plan, known)
    if not phase.run(queue, suggestions, plan.sweep.early_stop):
        return False
    known = trials.read_all(folder)
    again = [trial for trial in known if trial.status == "unfinished"]
    again += suggest.repeats(known, plan.seed_setting, plan.sweep.seeds)
    return phase.run(again, None, early_stop=False)


def conclude(
    folder: Path, sweep: Sweep, finished: bool, time_is_over: bool = False, reported: list[Trial] | None = None
) -> None:
    """Writes the result and prints what is known.

    Args:
        folder: the sweep's.
        sweep: its record.
        finished: whether all trials have ended.
        time_is_over: whether that is why they have not.
        reported: trials as the results tell them that are written already, such as when the last trial ended.
    """
    found = trials.read_all(folder)
    if found != reported:
        results.update(folder, sweep, found, [])
    print(f"\n{table(found, None)}\n\n{results.verdict(sweep, found)}")
    names = (keeping.BEST_FILE, keeping.BEST, results.CSV_FILE, results.HTML_FILE)
    for path in (folder / name for name in names):
        if path.exists():
            print(f"  {path}")
    if not finished:
        why = f"time_budget_s = {sweep.options['time_budget_s']:g} is over, and " if time_is_over else ""
        print(f"{why}{_left(sweep, found)} trials have not ended: python tune/search.py {resume_flag(folder)}")


def _left(sweep: Sweep, found: Sequence[Trial]) -> int:
    """Trials to go on with, and those to come; which ones are repeated is known when the others have ended."""
    left = sum(trial.status == "unfinished" for trial in found)
    own = [trial for trial in found if not trial.is_repeat]
    to_come = max(0, sweep.num_trials - len(own))
    if not to_come and all(trial.status != "unfinished" for trial in own):
        to_come = len(suggest.repeats(found, TrainConfig(**sweep.base), sweep.options["seeds"]))
    return left + to_come
