"""One run put together: ranks, data, model, LoRA, features, engine, log and directory; and what it leaves behind.

Takes a TrainConfig, gives a `Run` that the loop in train.py drives. It decides no order of training.
"""

import contextlib
import dataclasses
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch

from sft import __version__, checkpoint, data, engine
from sft.config import TrainConfig, UserError
from sft.features import Features
from sft.finite import FiniteWatch
from sft.memory import ModelSize, explain_out_of_memory
from sft.model import lora, published
from sft.report import NullLog, RunLog
from sft.report.page import write_html
from sft.report.pictures import ComparisonRow, comparison_picture

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "safetensors", "numpy", "pillow")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "*.model")
# What may differ between a run and its continuation: where and how it runs, not what it computes.
FREE_ON_RESUME = {"resume", "gpu", "include", "output_dir", "num_workers", "feature_cache", "log_every_steps"}
FREE_ON_RESUME |= {"tensorboard", "save_every", "save_format", "dry_run", "gradient_checkpointing", "val_batch_size"}
PICTURED = 4  # validation images in the comparison picture


@dataclass
class Run:
    """The parts of one run and where it stands."""

    config: TrainConfig
    ranks: engine.Ranks
    directory: Path
    data: data.Loaded
    loaded: published.Loaded
    peft_model: object
    features: Features
    ds_engine: engine.Engine
    log: RunLog | NullLog
    steps_per_epoch: int
    progress: checkpoint.Progress
    watch: FiniteWatch
    first_epoch: int
    """The first epoch that this process trains: 1, or more after a resume."""
    started_s: float = field(default_factory=time.monotonic)
    pictures: dict[str, dict] = field(default_factory=dict)
    """"base" and "tuned" -> name -> predicted mask, of the first validation images; main rank only."""


@contextlib.contextmanager
def prepared(config: TrainConfig) -> Iterator[Run]:
    """Builds a run, new or resumed, and closes it; an out-of-memory error leaves with advice.

    Raises:
        UserError: anything the user can mend, before the first step.
    """
    ranks = engine.start(config)
    resumed = checkpoint.find_resume(Path(config.output_dir), config.resume) if config.resume else None
    directory = resumed.parent if resumed else _new_directory(config)
    loaded_data = _load_data(config, ranks, directory, resumed)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    loaded = published.load(config.model_path, dtype=dtype, device=ranks.device)
    peft_model = lora.wrap(loaded.model, config)
    if config.gradient_checkpointing:
        loaded.model.enable_activation_checkpointing()
    features = Features(loaded.model, loaded.preprocess, config, ranks.device)
    steps_per_epoch = count_steps(len(loaded_data.train), config, ranks.world_size)
    try:
        _check_disk(config, directory, peft_model)
        groups = _parameter_groups(peft_model, config)
        ds_engine = engine.initialize(peft_model, groups, config, ranks, steps_per_epoch * config.num_epochs)
        progress = _restore(resumed, ds_engine, ranks, steps_per_epoch, config)
        log = _open_log(config, ranks, directory, progress if resumed else None)
        watch = FiniteWatch(ranks.device)
        parts = (config, ranks, directory, loaded_data, loaded, peft_model, features, ds_engine, log)
        with log:
            yield Run(*parts, steps_per_epoch, progress, watch, first_epoch=progress.epoch + 1)
    except torch.OutOfMemoryError as error:
        size = _model_size(loaded.model, peft_model, loaded_data)
        total = torch.cuda.get_device_properties(ranks.device).total_memory
        raise UserError(explain_out_of_memory(error, config, size, ranks.world_size, total)) from error
    finally:
        features.close()


def count_steps(samples: int, config: TrainConfig, world_size: int) -> int:
    """Optimizer steps of an epoch: the last one is filled up with samples from the epoch's beginning."""
    per_step = config.batch_size * world_size * config.gradient_accumulation_steps
    return -(-samples // per_step)


def announce(run: Run) -> None:
    """Writes to the log what will run on what: data, device, what LoRA matched."""
    config, ranks = run.config, run.ranks
    summary = run.data.findings.summary
    log = run.log.line
    log(f"Run {run.directory}")
    log(f"Model {config.model_path} | {config.precision} | {ranks.world_size} x {_device_name(ranks.device)}")
    log(
        f"Data {config.data_root} | {len(run.data.train):,} training and {len(run.data.val):,} validation images | "
        f"vessels {summary.fraction_mean:.2%} of the pixels"
    )
    for warning in data.brief(run.data.findings.warnings):
        log(f"warning: {warning}")
    for line in lora.describe(run.peft_model, config):
        log(line)
    steps = run.steps_per_epoch * config.num_epochs
    log(f"{config.num_epochs} epochs of {run.steps_per_epoch} steps, {steps:,} in all")


def save(run: Run, name: str) -> None:
    """Writes checkpoint NAME with adapter, tokenizer and training state. Collective."""
    trainable = engine.trainable_state(run.ds_engine)

    def write_model(directory: Path) -> None:
        lora.save_adapter(directory, run.peft_model, trainable, run.config.save_format)
        for pattern in TOKENIZER_FILES:
            for file in run.loaded.directory.glob(pattern):
                shutil.copyfile(file, directory / file.name)

    checkpoint.save(run.directory / name, run.ds_engine, run.ranks, write_model, run.progress)


def write_report(run: Run) -> None:
    """Writes comparison.png and report.html from what the run knows so far; main rank only."""
    if not run.ranks.is_main:
        return
    picture = None
    if len(run.pictures) == 2:
        rows = []
        for pair in run.data.val[:PICTURED]:
            if pair.name in run.pictures["base"]:
                sample = data.read(pair)
                masks = (run.pictures[which][pair.name] for which in ("base", "tuned"))
                rows.append(ComparisonRow(pair.name, sample.image_HW3, sample.mask_HW, *masks))
        picture = run.directory / "comparison.png"
        comparison_picture(picture, rows)
    config = json.loads((run.directory / "config.json").read_text())
    names = [pair.name for pair in run.data.val]
    write_html(run.directory / "report.html", run.directory.name, config, run.log.rows, names, picture)


def _new_directory(config: TrainConfig) -> Path:
    """output_dir/lora_sft_YYYYMMDD_HHMMSS, chosen by the main rank for all."""
    name = engine.gather_objects(f"lora_sft_{datetime.now():%Y%m%d_%H%M%S}")[0]
    directory, number = Path(config.output_dir) / name, 1
    while directory.exists():  # two runs begun in the same second
        number += 1
        directory = Path(config.output_dir) / f"{name}_{number}"
    directory = engine.gather_objects(directory)[0]
    engine.barrier()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir {config.output_dir}: {error.strerror}; give a folder you may write to") from error
    return directory


def _load_data(config: TrainConfig, ranks: engine.Ranks, directory: Path, resumed: Path | None) -> data.Loaded:
    """The main rank checks every file and records the split; the others read what it recorded."""
    split_file = directory / "split.json"
    loaded, failure = None, None
    if ranks.is_main:
        try:
            loaded = data.load(config, split_file=split_file if resumed else None)
            if not resumed:
                data.write_split(split_file, loaded.train, loaded.val)
        except UserError as error:
            failure = error
    loaded, failure = engine.gather_objects((loaded, failure))[0]
    if failure is not None:
        if not resumed and ranks.is_main:
            directory.rmdir()
        raise failure
    return loaded


def _parameter_groups(peft_model, config: TrainConfig) -> list[dict]:
    """LoRA matrices, and modules trained whole with a learning rate of their own."""
    named = [(name, parameter) for name, parameter in peft_model.named_parameters() if parameter.requires_grad]
    whole_rate = config.train_modules_learning_rate or config.learning_rate
    return [
        {"params": [p for name, p in named if ".lora_" in name], "lr": config.learning_rate},
        {"params": [p for name, p in named if ".lora_" not in name], "lr": whole_rate},
    ]


def _check_disk(config: TrainConfig, directory: Path, peft_model) -> None:
    trainable, _ = peft_model.get_nb_trainable_parameters()
    value_bytes = 2 if config.precision == "bf16" else 4
    kept = 2 + config.num_epochs // config.save_every  # the best, the last, and one more while writing
    checkpoint.check_disk(directory, checkpoint.checkpoint_bytes(trainable, value_bytes), kept)


def _restore(resumed: Path | None, ds_engine, ranks, steps_per_epoch: int, config: TrainConfig) -> checkpoint.Progress:
    if resumed is None:
        return checkpoint.Progress(epoch=0, num_epochs=config.num_epochs, step=0)
    _compare_settings(resumed.parent / "config.json", config)
    progress = checkpoint.load(resumed, ds_engine, ranks)
    step = progress.epoch * steps_per_epoch
    if step != progress.step:  # another number of ranks makes other steps of the same epochs
        engine.set_schedule_step(ds_engine, step)
    return dataclasses.replace(progress, step=step)


def _compare_settings(file: Path, config: TrainConfig) -> None:
    if not file.is_file():
        raise UserError(f"{file}: not found; resume needs the run's own directory around the checkpoint")
    before = json.loads(file.read_text())
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    changed = [key for key in now if key not in FREE_ON_RESUME and key in before and before[key] != now[key]]
    if changed:
        listed = ", ".join(f"{key} {before[key]} (now {now[key]})" for key in changed)
        raise UserError(f"{file}: the run was started with {listed}; resume with its settings, or start a new run")


def _open_log(config: TrainConfig, ranks, directory: Path, resumed: checkpoint.Progress | None) -> RunLog | NullLog:
    if not ranks.is_main:
        return NullLog()
    if resumed is None:
        (directory / "config.json").write_text(json.dumps(_record(config, ranks), indent=2) + "\n")
    checkpoint.clean_leftovers(directory)
    return RunLog(Path(config.output_dir), directory, config, resume_step=resumed and resumed.step)


def _record(config: TrainConfig, ranks: engine.Ranks) -> dict:
    """config.json: the resolved settings first, then what else decides the result."""
    return dataclasses.asdict(config) | {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "ranks": ranks.world_size,
        "device": _device_name(ranks.device),
        "git_commit": _git_commit(),
        "versions": {"sa2va-sft": __version__, "python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
    }


def _git_commit() -> str | None:
    """The checkout's commit, with "+changes" if files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def _model_size(model, peft_model, loaded_data: data.Loaded) -> ModelSize:
    """The figures of the memory estimate; a sample is one of 512 image tokens unless the data say more."""
    named = [(name, p.numel()) for name, p in peft_model.named_parameters() if p.requires_grad]
    lora_parameters = sum(count for name, count in named if ".lora_" in name)
    language = model.language_model.config
    largest = max((width * height for width, height in loaded_data.findings.summary.sizes), default=512 * 512)
    return ModelSize(
        frozen_parameters=sum(p.numel() for p in peft_model.parameters() if not p.requires_grad),
        lora_parameters=lora_parameters,
        whole_parameters=sum(count for _, count in named) - lora_parameters,
        layers=language.num_hidden_layers,
        hidden=language.hidden_size,
        intermediate=language.intermediate_size,
        tokens=512,
        mask_pixels=largest,
    )
