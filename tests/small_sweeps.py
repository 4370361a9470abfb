"""Parts of sweeps made by hand: trials with a Dice per validation, a record, a plan; for tests of tune/."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

from sft.config import TrainConfig
from tune.options import Plan, SweepConfig
from tune.space import Axis, Space, as_record
from tune.trials import SEED_SETTING, Sweep, Trial, append_row, create, write_outcome

RANK = Axis("lora_rank", "choice", (8, 16, 32))
RATE = Axis("learning_rate", "loguniform", (1e-5, 1e-3))
SPACE = Space((RANK, RATE), {"lora_alpha": "2 * lora_rank"})
GRID = Space((Axis("lora_rank", "choice", (8, 16)), Axis("lora_dropout", "choice", (0.0, 0.1, 0.2))), {})


def rows(dices, every: int = 1, epoch_s: float = 10.0) -> tuple[dict, ...]:
    """A validation each `every` epochs."""
    return tuple(
        {"epoch": every * count, "dice": dice, "dice_so_far": max(dices[:count]), "device_s": epoch_s * every * count}
        for count, dice in enumerate(dices, start=1)
    )


def trial(number: int, dices=(), status="finished", origin="random", params=None, settings=None, every=1) -> Trial:
    """A trial; number 0 is the seed setting."""
    origin = SEED_SETTING if number == 0 else origin
    return Trial(number, origin, params or {}, settings or {}, rows(dices, every), status)


def repeat(number: int, of: int, seed: int, dices=(0.5,), status="finished") -> Trial:
    """A trial with another seed."""
    return trial(number, dices, status, f"trial {of}, seed {seed}", settings={"seed": seed})


def ended(begun: Trial, *dices: float, status="finished") -> Trial:
    """What a trial has come to."""
    return dataclasses.replace(begun, rows=rows(dices), status=status)


def put(folder: Path, one: Trial) -> Path:
    """Writes a trial's files."""
    place = create(folder, one)
    for row in one.rows:
        append_row(place, row)
    if one.status != "unfinished":
        write_outcome(place, one.status, one.reason)
    return place


def sweep(space: Space = SPACE, base: TrainConfig | None = None, **changes) -> Sweep:
    """A record as sweep.json gives it back."""
    base = base or TrainConfig(num_epochs=9)
    known = {
        "name": "sweep_1", "base": json.loads(json.dumps(dataclasses.asdict(base))), "search": "random",
        "space": json.loads(json.dumps(as_record(space))), "num_trials": 4, "early_stop": True, "grace_epochs": 1,
        "reduction": 3, "seed": base.seed, "gpus_per_trial": 0.0, "started": "2026-11-25 21:00:00", "versions": {},
        "command": ["tune/search.py"], "options": dataclasses.asdict(SweepConfig()),
    }  # fmt: skip
    return Sweep(**known | changes)


def plan(space: Space = SPACE, points=(), base: TrainConfig | None = None, resumed=None, **settings) -> Plan:
    """What the command line would give."""
    return Plan(SweepConfig(**settings), base or TrainConfig(), space, tuple(points), resumed)


def of_ray(number: int) -> SimpleNamespace:
    """What Ray calls a trial."""
    return SimpleNamespace(trial_id=f"id{number}", config={"number": number})
