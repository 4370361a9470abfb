"""Measure a training step on this machine, against the loop one writes first: time, memory, MFU, parts, scaling.

Works without a checkpoint: random weights of a published shape, procedural images. A setting of launch/train.py that
is not among the options below, such as --gradient_checkpointing true, is passed on to the runs.
"""

import time

STARTED_S = time.perf_counter()

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # a checkout's scripts run the checkout's package, installed or not

from sft.config import EMBEDDED, TrainConfig, UserError, check_paths, override, parse_args
from sft.devices import LIMIT, claim, installed_gpus, visible_devices
from sft.model.shapes import NAMES
from sft.ranks import USER_ERROR, was_started_here

TINY = "tiny"
ENDLESS_EPOCHS = 1000  # so that the learning rate does not come to its end, and compiling is worth its time
ONE_RANK = "one_rank.json"


class Parser(argparse.ArgumentParser):
    """Raises a UserError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        """A mistake on the command line, in one line."""
        raise UserError(f"{message}; see --help")


def main() -> int:
    """Measures as the command line says; returns the exit code."""
    temporary = None
    try:
        arguments, rest = parse(sys.argv[1:])
        if arguments.ranks > 1 and not was_started_here():
            exit_code = measure_one_rank(arguments)
            if exit_code:
                return exit_code
        exit_code = claim(devices(arguments.ranks), None)
        if exit_code is not None:
            return exit_code
        if arguments.folder is None:
            temporary = arguments.folder = Path(tempfile.mkdtemp(prefix="sa2va-sft-benchmark-"))
        benchmark(arguments, rest)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
    return 0


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what is left of it for the runs."""
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--shape", choices=(TINY, *NAMES), default=TINY, help="published model; tiny: the embedded one")
    parser.add_argument("--model_path", help="a checkpoint's directory, instead of random weights")
    parser.add_argument("--folder", type=Path, help="keeps weights and images for the next call; on a fast disk")
    parser.add_argument("--batch_sizes", type=numbers, help="with commas between; default 1,8,32, tiny: 1,4")
    parser.add_argument("--image_size", type=size, default=(512, 512), help="512, or WIDTHxHEIGHT such as 999x960")
    parser.add_argument("--images", type=number, help="training images, all filled; default 64, tiny: 8")
    parser.add_argument("--rank", type=number, help="of LoRA; default 64, tiny: the demo's")
    parser.add_argument("--steps", type=number, help="timed ones of each kind; default 20, tiny: 6")
    parser.add_argument("--warm_up", type=number, help="steps before them; default 5, tiny: 2")
    parser.add_argument("--ranks", type=number, default=1, help="devices; above 1 needs --folder, measures one first")
    parser.add_argument("--parts", action="store_true", help="also the parts of a step one by one")
    parser.add_argument("--profile", type=number, default=0, help="also the kernels of so many steps, by time")
    parser.add_argument("--no_plain", action="store_true", help="leave out the plain loop")
    parser.add_argument("--json", type=Path, help="write all figures to this file, part by part")
    parser.add_argument("--picture", type=Path, help="write a bar chart to this PNG")
    arguments, rest = parser.parse_known_args(argv)
    is_tiny = arguments.shape == TINY
    defaults = {"batch_sizes": (1, 4), "images": 8, "steps": 6, "warm_up": 2} if is_tiny else {}
    defaults = {"batch_sizes": (1, 8, 32), "images": 64, "steps": 20, "warm_up": 5} | defaults
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.ranks > 1 and arguments.folder is None:
        raise UserError(f"--ranks {arguments.ranks} needs --folder DIR, which all ranks read the weights from")
    for file in (arguments.json, arguments.picture):
        if file and not file.absolute().parent.is_dir():
            raise UserError(f"{file}: its folder does not exist; make it first")
    given = {word.partition("=")[0] for word in rest}
    for flag in (
        "--data_root",
        "--val_list",
        "--output_dir",
        "--batch_size",
        "--gradient_accumulation_steps",
        "--lora_rank",
        "--num_epochs",
        "--feature_cache_dir",
    ):
        if flag in given:
            raise UserError(f"{flag}: the benchmark chooses it itself; see --batch_sizes, --rank, --folder")
    # Wrong settings are answered before anything is measured.
    read = {
        "model_path": arguments.model_path or EMBEDDED,
        "output_dir": str(arguments.folder or tempfile.gettempdir()),
    }
    check_paths(override(settings_of_runs(arguments, rest), read))
    return arguments, rest


def settings_of_runs(arguments: argparse.Namespace, rest: list[str]) -> TrainConfig:
    """The runs' settings, their paths aside."""
    of_demo = arguments.shape == TINY and arguments.model_path is None
    config = parse_args(rest, demo=HERE / "configs" / "demo.yaml" if of_demo else None)
    changes = {"num_epochs": ENDLESS_EPOCHS, "seg_rate_samples": 0, "tensorboard": False, "save_every": ENDLESS_EPOCHS}
    if arguments.rank:
        changes |= {"lora_rank": arguments.rank, "lora_alpha": 2 * arguments.rank}
    return override(config, changes)


def measure_one_rank(arguments: argparse.Namespace) -> int:
    """The same command on one rank first, whose figures the others are compared with; returns its exit code."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *sys.orig_argv[1:], "--ranks", "1", "--json", str(arguments.folder / ONE_RANK)]
    return subprocess.run(command).returncode


def devices(ranks: int) -> str | None:
    """The first so many devices that may be used; None: the first."""
    if ranks == 1:
        return None
    installed = installed_gpus()
    if not installed or os.environ.get(LIMIT) in ("", "-1"):
        os.environ.setdefault("LOCAL_SIZE", str(ranks))  # stands for as many devices on a CPU
        return ",".join(map(str, range(ranks)))
    visible = visible_devices(os.environ.get(LIMIT), installed)
    if len(visible) < ranks:
        raise UserError(f"--ranks {ranks}: {len(visible)} device(s) may be used; give fewer ranks")
    return ",".join(device.number for device in visible[:ranks])


def benchmark(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Prepares what is measured on, measures, prints and writes."""
    from sft import benchmark as measuring
    from sft.benchmark.table import picture, table

    import_s = time.perf_counter() - STARTED_S
    folder, is_main, several = arguments.folder, os.environ["RANK"] == "0", arguments.ranks > 1
    config = prepare(arguments, rest)
    head = described(arguments, config)

    def keep(figures: dict) -> None:
        if is_main and arguments.json:
            arguments.json.write_text(json.dumps(head | figures, indent=2) + "\n", encoding="utf-8")

    settings = measuring.Settings(
        config,
        arguments.batch_sizes,
        arguments.steps,
        arguments.warm_up,
        with_plain=not (arguments.no_plain or several),
        with_parts=arguments.parts and not several,
        profiled_steps=0 if several else arguments.profile,
        import_s=import_s,
    )
    try:
        figures = measuring.measure(settings, keep)
    finally:
        # All ranks share them: one that fails must not take them from the others, whose errors would be told instead.
        for path in (config.output_dir, os.environ["SA2VA_SFT_CACHE"]) if is_main else ():
            shutil.rmtree(path, ignore_errors=True)
    if several:
        one = json.loads((folder / ONE_RANK).read_text(encoding="utf-8"))
        figures["scaling"] = measuring.scaling(one, figures)
    keep(figures)
    if is_main:
        print(table(head | figures), flush=True)
        if arguments.picture:
            picture(arguments.picture, head | figures)


def prepare(arguments: argparse.Namespace, rest: list[str]) -> TrainConfig:
    """Writes weights and images, unless the folder has them; the settings of the runs."""
    from sft.benchmark import inputs

    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    own = os.getppid() if was_started_here() else os.getpid()  # the same on all ranks
    os.environ["SA2VA_SFT_CACHE"] = str(folder / f"cache_{own}")  # features are computed, not found
    model_path = arguments.model_path or inputs.write_model(arguments.shape, folder)
    count = max(arguments.images, max(arguments.batch_sizes))
    data_root, val_list = inputs.write_images(*arguments.image_size, count, folder)
    paths = {"model_path": model_path, "data_root": str(data_root), "val_list": str(val_list)}
    return override(settings_of_runs(arguments, rest), paths | {"output_dir": str(folder / f"runs_{own}")})


def described(arguments: argparse.Namespace, config: TrainConfig) -> dict:
    """What was measured, when and by which versions."""
    from sft import operations, provenance
    from sft.benchmark.table import targets

    shape = arguments.shape if arguments.model_path is None else Path(arguments.model_path).resolve().name
    image = "x".join(map(str, arguments.image_size))
    return {
        "shape": shape,
        "image": image,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.orig_argv),
        "git_commit": provenance.git_commit(),
        "versions": provenance.versions(),
        "settings": vars(config),
        "peak_in_words": operations.PEAK_IN_WORDS,
        "targets": targets(shape, image),
    }


def number(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(text)


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between."""
    return tuple(number(part.strip()) for part in text.split(","))


def size(text: str) -> tuple[int, int]:
    """One side, or width x height, in pixels."""
    sides = tuple(number(part) for part in text.lower().split("x"))
    if len(sides) > 2 or min(sides) < 64:
        raise argparse.ArgumentTypeError(f"{text} is no size; give 512, or 999x960, 64 pixels at least")
    return sides if len(sides) == 2 else sides * 2


if __name__ == "__main__":
    exit_code = main()
    if engine := sys.modules.get("sft.engine"):
        engine.shut_down()
    sys.exit(exit_code)
