"""The command line of a sweep: its own settings, the seed setting that every trial starts from, and the space.

Takes arguments, gives a `Plan` or raises UserError with one line. Imports nothing heavy: --help and a mistake answer
at once, before Ray or torch are loaded. Does not know Ray.
"""

import argparse
import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from sft.config import EMBEDDED, TrainConfig, check_paths, override, read_yaml
from sft.settings import PATH, FlagParser, Range, UserError, add_flags, as_text, checked, docs_of, nearest, settings_of
from tune import space as spaces
from tune import trials

ROOT = Path(__file__).resolve().parent.parent
SPACE = ROOT / "tune" / "space.yaml"
DEMO, DEMO_SPACE = ROOT / "tune" / "demo.yaml", ROOT / "tune" / "demo_space.yaml"
DEMO_SWEEP = {"num_trials": 8, "grace": 2}  # with 2 cores and 6 epochs
PathText = Annotated[str, PATH]
# Settings of a run that a sweep decides for its trials.
OURS = {"output_dir": "--storage_path", "resume": "--resume SWEEP", "dry_run": "launch/train.py --dry_run"}
OURS |= {"keep": "nothing: a trial keeps its latest checkpoint", "save_every": "nothing: every epoch is kept"}
AGAIN = {"num_trials", "max_concurrent", "gpus_per_trial", "cpus_per_trial", "ranks_per_trial", "time_budget_s"}
AGAIN |= {"seeds", "address", "include", "gpu"}  # what a resumed sweep may be given anew


@dataclass(frozen=True)
class SweepConfig:
    """How a sweep proceeds.

    Raises:
        UserError: a value of the wrong type or out of its range, or settings that contradict each other.
    """

    space: PathText | None = None
    """YAML file that says what varies; none: tune/space.yaml."""
    num_trials: Annotated[int, Range(at_least=1)] = 32
    """Trials in all, the seed setting and given points among them."""
    search: Literal["random", "grid", "optuna"] = "random"
    """How points are chosen: at random, every combination of choices, or by Optuna's TPE."""
    points: tuple[str, ...] = ()
    """YAML files of settings that are tried first, such as another sweep's best.yaml."""
    name: str | None = None
    """Name of the sweep's folder; none: sweep_YYYYMMDD_HHMMSS."""
    storage_path: PathText = "output_tune"
    """Folder that receives one directory per sweep; on a cluster one that all nodes share."""

    early_stop: bool = True
    """Stop trials whose Dice falls behind (ASHA); --no_early_stop runs all to the end."""
    grace: Annotated[int, Range(at_least=1)] = 3
    """Validations before a trial may be stopped."""
    reduction: Annotated[int, Range(at_least=2)] = 3
    """Of the trials that come to a rung, one in so many goes on."""
    seeds: Annotated[int, Range(at_least=1, at_most=100)] = 1
    """Seeds with which the three best trials and the seed setting are run in the end; 1 repeats nothing."""

    gpus_per_trial: Annotated[float, Range(at_least=0.01)] = 1.0
    """GPUs of one trial: a share such as 0.5, or a whole number, one per rank. Without GPUs of no effect."""
    cpus_per_trial: Annotated[int, Range(at_least=0)] = 0
    """CPU cores of one trial; 0: an equal share beside GPUs, else one per rank."""
    ranks_per_trial: Annotated[int, Range(at_least=0)] = 0
    """Ranks of one trial under DeepSpeed; 0: one per whole GPU."""
    max_concurrent: Annotated[int, Range(at_least=0)] = 0
    """Trials at a time; 0: as many as there is room for."""
    time_budget_s: Annotated[float, Range(above=0)] | None = None
    """Seconds after which no trial goes on; --resume continues."""
    address: str | None = None
    """Ray cluster to use: auto, or HOST:PORT; none starts one on this machine."""
    resume: PathText | None = None
    """Sweep directory to continue: finished trials stay, the others go on from their last checkpoint."""

    def __post_init__(self) -> None:
        for name, value in checked(SweepConfig, vars(self)).items():
            object.__setattr__(self, name, value)
        if self.gpus_per_trial > 1 and self.gpus_per_trial % 1:
            raise UserError(f"gpus_per_trial = {self.gpus_per_trial}: give a share below 1, or a whole number")
        if self.ranks_per_trial and self.gpus_per_trial != 1 and max(1.0, self.gpus_per_trial) != self.ranks_per_trial:
            raise UserError(
                f"ranks_per_trial = {self.ranks_per_trial} with gpus_per_trial = {self.gpus_per_trial:g}: a rank has "
                "one GPU or one share; leave ranks_per_trial out"
            )
        if self.name and (os.sep in self.name or self.name.startswith(".")):
            raise UserError(f"name = {self.name} is no folder name; --storage_path says where the folder lies")

    def ranks(self, gpus: float) -> int:
        """Ranks of a trial that gets so many GPUs, 0 on CPUs."""
        return self.ranks_per_trial or max(1, int(gpus))


@dataclass(frozen=True)
class Plan:
    """What is to be done."""

    sweep: SweepConfig
    seed_setting: TrainConfig
    space: spaces.Space
    points: tuple[dict[str, Any], ...]
    """Settings of the given points, in the space's keys alone."""
    resumed: Path | None
    """The sweep's directory, where it is continued."""


def parse(argv: list[str]) -> Plan:
    """What the command line asks for.

    Args:
        argv: arguments without the program's name.

    Raises:
        UserError: any mistake.
        SystemExit: with 0, after --help.
    """
    parser = _parser()
    if "-h" in argv or "--help" in argv:
        print(parser.format_help(), flush=True)
        sys.exit(0)
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(_unknown(unknown))
    flags = {key: ",".join(value) if isinstance(value, list) else value for key, value in vars(options).items()}
    own = {key: flags.pop(key) for key in list(flags) if key in settings_of(SweepConfig)}
    file = flags.pop("config", None)
    if own.get("resume"):
        return _resumed(own, flags, file)
    is_demo = file is None and {flags.get(key, EMBEDDED) for key in ("model_path", "data_root")} == {EMBEDDED}
    if is_demo:
        file, own = DEMO, DEMO_SWEEP | {"space": str(DEMO_SPACE)} | own
    sweep = SweepConfig(**checked(SweepConfig, own))
    base = _absolute(TrainConfig(**(_base_of(file) if file else {}) | checked(TrainConfig, flags)))
    check_paths(base)
    space = spaces.read(Path(sweep.space or SPACE), base)
    return _plan(sweep, base, space, None, tuple(_point(Path(file), space, base) for file in sweep.points))


def sweep_table() -> str:
    """The Markdown table of a sweep's own settings that the README shows."""
    docs, lines = docs_of(SweepConfig), ["| key | default | range | meaning |", "|---|---|---|---|"]
    for name, setting in settings_of(SweepConfig).items():
        lines.append(f"| `{name}` | {setting.default_text} | {setting.allowed} | {docs[name]} |")
    return "\n".join(lines)


def _parser() -> FlagParser:
    parser = FlagParser(
        prog="search.py",
        usage="search.py [--config FILE] [--space FILE] [--key value ...]",
        description="Search better settings for launch/train.py: trials under Ray Tune; hopeless ones are stopped.",
        epilog="Every setting of launch/train.py is a flag, too: it then holds for all trials. Without --config, and "
        "with model and data both embedded, a small sweep runs on the CPU (tune/demo.yaml, tune/demo_space.yaml).",
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this text and exit")
    sections = {"space": "what is searched, and how", "early_stop": "which trials go on", "gpus_per_trial": "running"}
    add_flags(parser, SweepConfig, sections)
    group = parser.add_argument_group("the seed setting: the first trial, and what the space leaves alone")
    group.add_argument("--config", metavar="FILE", help="YAML file of settings, as for launch/train.py")
    for name, setting in settings_of(TrainConfig).items():
        if name not in OURS:  # their texts stand in launch/train.py --help
            several = {"nargs": "?", "const": True} if setting.kind is bool else {"nargs": "+"} if setting.many else {}
            shown = (
                {"help": f"devices, {setting.allowed}"} if name in ("gpu", "include") else {"help": argparse.SUPPRESS}
            )
            group.add_argument(f"--{name}", **several, **shown)
            if setting.kind is bool:
                group.add_argument(f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
    return parser


def _unknown(unknown: list[str]) -> str:
    flag = next((word for word in unknown if word.startswith("--")), None)
    if flag is None:
        return f"unexpected argument {unknown[0]}; a setting is given as --key value"
    key = flag.partition("=")[0]
    if key[2:] in OURS:
        return f"{key} is decided by the sweep for its trials; use {OURS[key[2:]]}"
    known = {**settings_of(TrainConfig), **settings_of(SweepConfig)}
    close = known[nearest(key, known.keys() - OURS.keys() | {"resume"})]
    return f"unknown key {key}; nearest: --{close.name} ({close.allowed})"


def _base_of(file: str | Path) -> dict[str, Any]:
    """The settings of a YAML file, without what a sweep decides."""
    return {name: value for name, value in read_yaml(Path(file)).items() if name not in OURS}


def _resumed(own: dict[str, Any], flags: dict[str, Any], file: str | None) -> Plan:
    given = {**own, **flags, **({"config": file} if file else {})}
    for key in sorted(given.keys() - AGAIN - {"resume"}):
        flag = "--no_early_stop" if key == "early_stop" and not given[key] else f"--{key}"
        raise UserError(
            f"{flag} with --resume: a sweep goes on as it was begun; may be given anew: {', '.join(sorted(AGAIN))}"
        )
    folder = Path(own["resume"]).expanduser().absolute()
    record = trials.read_sweep(folder)
    changes = checked(SweepConfig, {key: value for key, value in own.items() if key != "resume"})
    before = {name: value for name, value in record.options.items() if name not in ("time_budget_s", "address")}
    sweep = SweepConfig(**before | changes | {"resume": str(folder)})
    if sweep.num_trials < record.num_trials:
        raise UserError(f"num_trials = {sweep.num_trials}: the sweep has {record.num_trials}; it can only be raised")
    anew = {"gpu": None, "include": None} | flags if flags else {}  # the one takes the place of the other
    base = override(TrainConfig(**checked(TrainConfig, record.base, str(folder / trials.SWEEP_FILE))), anew)
    check_paths(base)
    return _plan(sweep, base, spaces.from_record(record.space), folder, tuple(record.points))


def _plan(
    sweep: SweepConfig,
    base: TrainConfig,
    space: spaces.Space,
    resumed: Path | None,
    points: tuple[dict[str, Any], ...],
) -> Plan:
    grace_epochs = sweep.grace * base.validate_every
    if sweep.early_stop and grace_epochs > base.num_epochs:
        raise UserError(
            f"grace = {sweep.grace} validations end after epoch {grace_epochs}, but a trial has {base.num_epochs}; "
            "give a smaller --grace, more --num_epochs, or --no_early_stop"
        )
    if base.num_epochs % base.validate_every and sweep.early_stop:
        raise UserError(
            f"validate_every = {base.validate_every} does not divide num_epochs = {base.num_epochs}: trials could not "
            "be compared at their end; give a num_epochs that it divides, or --no_early_stop"
        )
    if sweep.search == "grid":
        next(space.grid())
    if sweep.num_trials < 1 + len(points):
        raise UserError(
            f"num_trials = {sweep.num_trials} leaves no room for the seed setting and {len(points)} points; "
            f"give at least {1 + len(points)}"
        )
    return Plan(sweep, base, space, points, resumed)


def _point(file: Path, space: spaces.Space, base: TrainConfig) -> dict[str, Any]:
    """What a YAML file says of the settings that vary."""
    if not file.is_file():
        raise UserError(f"--points {file} is no file; expected YAML files of settings, such as a sweep's best.yaml")
    varied = {axis.name for axis in space.axes} | space.expressions.keys()
    point = {name: value for name, value in read_yaml(file).items() if name in varied}
    if not point:
        raise UserError(f"--points {file}: sets nothing that varies; expected some of {', '.join(sorted(varied))}")
    override(base, point, str(file))
    return point


def _absolute(config: TrainConfig) -> TrainConfig:
    """Paths that hold in any working directory."""
    changes = {}
    for name, setting in settings_of(TrainConfig).items():
        value = getattr(config, name)
        named = name == "deepspeed_config" and not Path(value).is_file()  # a shipped one
        if setting.is_path and name not in OURS and value not in (None, EMBEDDED) and not named:
            changes[name] = str(Path(value).absolute())
    return dataclasses.replace(config, **changes)


if __name__ == "__main__":
    if sys.argv[1:] != ["--table"]:
        sys.exit(f"usage: python -m tune.options --table, not {as_text(' '.join(sys.argv[1:]))}")
    print(sweep_table())
