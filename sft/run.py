"""One run put together: ranks, data, model, LoRA, features, engine, log and directory; and what it leaves behind.

Takes a TrainConfig, gives a `Run` that the loop in train.py drives. It decides no order of training.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import torch

from sft import batch_size, checkpoint, data, engine, pace, provenance, zero_json
from sft.config import TrainConfig, UserError
from sft.feature_store import cache_directory, listed
from sft.features import Features, Item
from sft.finite import FiniteWatch
from sft.memory import GIB, ModelSize, estimate, explain_out_of_memory, still_needed
from sft.model import lora, published
from sft.report import NullLog, RunLog
from sft.report.page import write_html
from sft.report.pictures import ComparisonRow, comparison_picture
from sft.settings import DiskError
from sft.writer import Writer

PICTURED = 4  # validation images in the comparison picture

Found = TypeVar("Found")


@dataclass
class Run:
    """The parts of one run and where it stands."""

    config: TrainConfig
    ranks: engine.Ranks
    directory: Path
    data: data.Loaded
    loaded: published.Loaded
    peft_model: object
    size: ModelSize
    features: Features
    ds_engine: engine.Engine
    log: RunLog | NullLog
    writer: Writer
    steps_per_epoch: int
    progress: checkpoint.Progress
    watch: FiniteWatch
    first_epoch: int
    """The first epoch that this process trains: 1, or more after a resume."""
    batch_line: str
    """How many images a step takes, in one line; with batch_size auto, also why."""
    pace_line: str
    """How a step is computed, in one line."""
    started_s: float = field(default_factory=time.monotonic)
    pictures: dict[str, dict] = field(default_factory=dict)
    """"base", "tuned" and "latest" -> name -> predicted mask, of the first validation images; main rank only."""


@contextlib.contextmanager
def prepared(config: TrainConfig, scratch: Path | None = None, split_file: Path | None = None) -> Iterator[Run]:
    """Builds a run, new or resumed, and closes it.

    Nothing is written before all of it stands. What ends a run early is noted in training.log, an out-of-memory error
    with advice, and a new run that ends before its first step leaves no directory.

    Args:
        config: all settings.
        scratch: written to instead of output_dir; of a dry run.
        split_file: the split.json of another run, whose division is taken over; a resumed run has its own.

    Raises:
        UserError: anything the user can mend, before the first step; too little GPU memory at any time.
    """
    ranks = engine.start(config)
    resumed, number = on_main(ranks, lambda: _find_resumed(config))
    config = dataclasses.replace(config, batch_size=number)
    split_file = resumed.parent / "split.json" if resumed else split_file
    loaded_data = on_main(ranks, lambda: data.load(config, split_file=split_file))
    output_dir, features, size, run = scratch or Path(config.output_dir), None, None, None
    try:
        loaded, peft_model, size, largest = _load_model(config, ranks, loaded_data)
        on_main(ranks, lambda: _check_disk(config, size, resumed))
        features = Features(loaded.model, loaded.preprocess, config, ranks.device, loaded_data.findings.sizes_hw)
        attempt = functools.partial(batch_size.trial, peft_model, features, largest, size, ranks)
        config, batch_line = batch_size.choose(config, size, len(loaded_data.train), ranks, attempt)
        steps_per_epoch = batch_size.count_steps(len(loaded_data.train), config, ranks.world_size)
        steps = steps_per_epoch * config.num_epochs
        size, pace_line = pace.set_up(loaded.model, config, size, ranks.device, ranks.world_size, steps)
        groups = _parameter_groups(peft_model, config)
        if zero_json.read(config.deepspeed_config)["zero_optimization"]["stage"] == 3:
            features.set_encoders_aside()
        ds_engine = engine.initialize(peft_model, groups, config, ranks, steps)
        progress, logged_step = _restore(resumed, ds_engine, ranks, steps_per_epoch, config)
        directory, log = _open(config, ranks, loaded_data, output_dir, None if scratch else resumed, logged_step)
        parts = (config, ranks, directory, loaded_data, loaded, peft_model, size, features, ds_engine, log)
        state = (steps_per_epoch, progress, FiniteWatch(ranks.device), progress.epoch + 1, batch_line, pace_line)
        run = Run(*parts, Writer(log.line), *state)
        with log, run.writer:
            yield run
            features.close()  # what it could not write still belongs in the log
            tell_rejected(run)
    except BaseException as error:
        told = error
        if isinstance(error, torch.OutOfMemoryError):
            told = UserError(_out_of_memory(error, config, ranks, size, features))
        elif isinstance(error, OSError) and error.errno in checkpoint.USER_ERRNOS:
            told = DiskError(f"{error.filename or output_dir}: {error.strerror}; free some space, then resume")
        _note_end(run, output_dir, told)
        if told is error:
            raise
        raise told from error
    finally:
        if features is not None:
            features.close(at_most_s=10.0)  # what waits to be written can be computed again


def on_main(ranks: engine.Ranks, function: Callable[[], Found]) -> Found:
    """What the main rank finds, or the user's mistake it runs into, on every rank: no rank waits for one that failed.

    Collective; for what touches files, so that one rank does.
    """
    found, failure = None, None
    if ranks.is_main:
        try:
            found = function()
        except UserError as error:
            failure = error
        except OSError as error:
            if error.errno not in checkpoint.USER_ERRNOS:
                raise
            place = f"{error.filename}: " if error.filename else ""  # a write to a full disk names no file
            failure = DiskError(f"{place}{error.strerror}; give a path you may use, or free some space")
    found, failure = engine.gather_objects((found, failure))[0]
    if failure is not None:
        raise failure
    return found


def announce(run: Run) -> None:
    """Writes to the log what will run on what: data, device, what LoRA matched."""
    config, ranks = run.config, run.ranks
    summary = run.data.findings.summary
    log = run.log.line
    log(f"Run {run.directory}")
    log(f"Model {config.model_path} | {config.precision} | {ranks.world_size} x {provenance.device_name(ranks.device)}")
    log(
        f"Data {config.data_root} | {len(run.data.train):,} training and {len(run.data.val):,} validation images | "
        f"vessels {summary.fraction_mean:.2%} of the pixels"
    )
    for warning in data.brief(run.data.findings.warnings):
        log(f"warning: {warning}")
    for line in lora.describe(run.peft_model, config):
        log(line)
    steps = run.steps_per_epoch * config.num_epochs
    log(run.batch_line)
    log(run.pace_line)
    log(f"{config.num_epochs} epochs of {run.steps_per_epoch} steps, {steps:,} in all")


def memory_line(run: Run) -> str:
    """The estimate of a GPU's memory by purpose; call after a first batch."""
    size = _as_measured(run.size, run.features)
    parts = {name: count / GIB for name, count in estimate(run.config, size, run.ranks.world_size).items() if count}
    text = " + ".join(f"{name} {gib:.2f}" for name, gib in parts.items())
    line = f"Memory estimate of a GPU: {text} = {sum(parts.values()):.2f} GiB"
    if run.ranks.device.type != "cuda":
        return line
    total_gib = torch.cuda.get_device_properties(run.ranks.device).total_memory / GIB
    return f"{'warning: ' if sum(parts.values()) > total_gib else ''}{line}, of {total_gib:.0f} GiB"


def keep_features(run: Run, items: list[Item], now: list[Item] | None = None) -> None:
    """Computes the frozen features of a run before its first step, where there is room for them. Collective.

    Args:
        run: nothing of it has run yet.
        items: all that its epochs and validations will ask for.
        now: of a dry run: the part to compute, which is kept in host memory alone.
    """
    reserve_bytes = 0
    if run.ranks.device.type == "cuda":
        held_bytes = torch.cuda.memory_allocated(run.ranks.device)
        reserve_bytes = still_needed(run.config, run.size, run.ranks.world_size, held_bytes)
    run.log.line(run.features.choose(items, run.ranks, reserve_bytes, dry=now is not None).sentence)
    if filled := run.features.fill(items if now is None else now, run.ranks):
        run.log.line(filled)
    if now is not None and run.config.feature_cache != "off":
        run.log.line(f"Feature cache: {listed(cache_directory(run.config.feature_cache_dir))}")


def tell_rejected(run: Run) -> None:
    """Names entries of the feature cache damaged or not written, on any rank, since the last call. Collective."""
    for line in itertools.chain(*engine.gather_objects(run.features.rejected())):
        run.log.line(f"warning: {line}")


def draw_comparison(run: Run) -> None:
    """Writes comparison.png: images, truth, masks of the base and of the best adapter; main rank only."""
    if not run.ranks.is_main:
        return
    rows = []
    for pair in run.data.val[:PICTURED]:
        if pair.name in run.pictures["base"]:
            sample = data.read(pair)
            masks = (run.pictures[which][pair.name] for which in ("base", "tuned"))
            rows.append(ComparisonRow(pair.name, sample.image_HW3, sample.mask_HW, *masks))
    comparison_picture(run.directory / "comparison.png", rows)


def write_report(run: Run) -> None:
    """Writes report.html from what the run knows so far; main rank only."""
    if not run.ranks.is_main:
        return
    picture = run.directory / "comparison.png"
    config = json.loads((run.directory / "config.json").read_text(encoding="utf-8"))
    names = [pair.name for pair in run.data.val]
    shown = picture if picture.exists() else None
    write_html(run.directory / "report.html", run.directory.name, config, run.log.rows, names, shown)


def _find_resumed(config: TrainConfig) -> tuple[Path | None, int | str]:
    """The checkpoint to go on from, of a run with these settings, None for a new run; and the batch size to take."""
    if config.resume is None:
        return None, config.batch_size
    resumed = checkpoint.find_resume(Path(config.output_dir), config.resume)
    resumed = resumed.resolve() if resumed.name in ("", "..") else resumed  # its parent is the run
    record = resumed.parent / "config.json"
    config = dataclasses.replace(config, batch_size=provenance.begun_batch_size(record, config))
    provenance.check_same_settings(record, config)
    return resumed, config.batch_size


def _load_model(config: TrainConfig, ranks: engine.Ranks, loaded_data: data.Loaded):
    """The base on this rank's device, the same wrapped with LoRA, its size, and the largest images."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    loaded = published.load(config.model_path, dtype=dtype, device=ranks.device)
    peft_model = lora.wrap(loaded.model, config)
    torch.manual_seed(config.seed + ranks.rank)  # dropout differs between ranks; lora_A was drawn the same on all
    largest = batch_size.largest(loaded_data.findings.summary.sizes, loaded.preprocess, config.question)
    return loaded, peft_model, _model_size(loaded, peft_model, largest), largest


def _model_size(loaded: published.Loaded, peft_model, largest: batch_size.Largest) -> ModelSize:
    """The figures of the memory estimate; call before ZeRO-3 takes the parameters apart."""
    named = [(name, p.numel()) for name, p in peft_model.named_parameters() if p.requires_grad]
    lora_parameters = sum(count for name, count in named if ".lora_" in name)
    language = loaded.model.decoder.config
    return ModelSize(
        frozen_parameters=sum(p.numel() for p in peft_model.parameters() if not p.requires_grad),
        lora_parameters=lora_parameters,
        whole_parameters=sum(count for _, count in named) - lora_parameters,
        layers=language.num_hidden_layers,
        hidden=language.hidden_size,
        intermediate=language.intermediate_size,
        tokens=largest.tokens,
        mask_pixels=math.prod(largest.mask_hw),
    )


def _check_disk(config: TrainConfig, size: ModelSize, resumed: Path | None) -> None:
    """Refuses an output_dir that cannot hold the checkpoints; makes nothing, so it looks at what exists of the path."""
    trainable, value_bytes = size.lora_parameters + size.whole_parameters, 2 if config.precision == "bf16" else 4
    whole, adapter = (checkpoint.checkpoint_bytes(trainable, value_bytes, resumable) for resumable in (True, False))
    match config.keep:
        case "all":
            done = checkpoint.read_progress(resumed).epoch if resumed else 0
            of_epochs = -(-config.num_epochs // config.save_every) - done // config.save_every  # the last one rounds up
            needed = (1 + of_epochs + 1) * whole  # 1: the best; 1: beside the one it replaces
            what = f"{1 + of_epochs} checkpoints and the one being replaced, {whole / GIB:.2f} GiB each,"
            advice = "raise save_every, use --keep latest"
        case "latest":
            there = resumed is not None and resumed.name == checkpoint.LATEST
            needed = (1 if there else 2) * whole + adapter
            what = f"{checkpoint.LATEST}, the one it replaces and the best adapter"
            advice = "lower lora_rank"
        case _:
            raise ValueError(f"keep {config.keep!r}: expected all or latest")
    folder = Path(config.output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    checkpoint.check_disk(existing, needed, what, advice)


def _parameter_groups(peft_model, config: TrainConfig) -> list[dict]:
    """LoRA matrices, and modules trained whole with a learning rate of their own."""
    named = [(name, parameter) for name, parameter in peft_model.named_parameters() if parameter.requires_grad]
    whole_rate = config.train_modules_learning_rate or config.learning_rate
    return [
        {"params": [p for name, p in named if ".lora_" in name], "lr": config.learning_rate},
        {"params": [p for name, p in named if ".lora_" not in name], "lr": whole_rate},
    ]


def _restore(
    resumed: Path | None, ds_engine, ranks: engine.Ranks, steps_per_epoch: int, config: TrainConfig
) -> tuple[checkpoint.Progress, int | None]:
    """Where training stands, counted in this run's steps, and the step up to which the run's log holds."""
    if resumed is None:
        return checkpoint.Progress(epoch=0, num_epochs=config.num_epochs, step=0), None
    progress = checkpoint.load(resumed, ds_engine, ranks)
    step = progress.epoch * steps_per_epoch
    if step != progress.step:  # another number of ranks makes other steps of the same epochs
        engine.set_schedule_step(ds_engine, step)
    return dataclasses.replace(progress, step=step), progress.step


def _open(
    config: TrainConfig,
    ranks: engine.Ranks,
    loaded_data: data.Loaded,
    output_dir: Path,
    resumed: Path | None,
    logged_step: int | None,
) -> tuple[Path, RunLog | NullLog]:
    """The directory of the run, a new one with config.json and split.json in it, and its log. Collective."""
    log = NullLog()

    def create() -> Path:
        nonlocal log
        if resumed:
            checkpoint.clean_leftovers(resumed.parent)
            output_dir.mkdir(parents=True, exist_ok=True)  # it need not be the one around the run
            log = RunLog(output_dir, resumed.parent, config, resume_step=logged_step)
            return resumed.parent
        directory = _new_directory(output_dir)
        try:
            data.write_split(directory / "split.json", loaded_data.train, loaded_data.val)
            text = json.dumps(provenance.record(config, ranks), indent=2)
            (directory / "config.json").write_text(text + "\n", encoding="utf-8")
            log = RunLog(output_dir, directory, config)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return directory

    return on_main(ranks, create), log


def _new_directory(output_dir: Path) -> Path:
    """Makes output_dir/lora_sft_YYYYMMDD_HHMMSS, with a number behind it for runs begun in the same second."""
    name, number = f"lora_sft_{datetime.now():%Y%m%d_%H%M%S}", 1
    while True:
        directory = output_dir / (name if number == 1 else f"{name}_{number}")
        try:
            directory.mkdir(parents=True)
            return directory
        except FileExistsError:
            number += 1


def _note_end(run: Run | None, output_dir: Path, error: BaseException) -> None:
    """Notes in training.log why a run ended, and removes the directory of a new one that took no step; main rank only.

    The log is closed by now; the terminal has the error from whoever catches it.
    """
    if run is None or not run.ranks.is_main:
        return
    step = run.progress.step
    match error:
        case UserError():
            text = f"error: {error}"
        case KeyboardInterrupt() | SystemExit():
            text = f"Interrupted after step {step}"
        case _:
            text = f"Failed after step {step}: {type(error).__name__}: {error}"
    for folder in {run.directory, output_dir}:
        with contextlib.suppress(OSError), (folder / "training.log").open("a", encoding="utf-8") as log:
            log.write(" ".join(text.split()) + "\n")
    if run.first_epoch == 1 and step == 0:
        shutil.rmtree(run.directory, ignore_errors=True)


def _out_of_memory(
    error: torch.OutOfMemoryError,
    config: TrainConfig,
    ranks: engine.Ranks,
    size: ModelSize | None,
    features: Features | None,
) -> str:
    if size is None or features is None:
        return (
            f"CUDA out of memory while the model was loaded ({str(error).split('. ')[0]}); another program may hold "
            "memory: see nvidia-smi, or choose another device with --gpu"
        )
    total = torch.cuda.get_device_properties(ranks.device).total_memory
    return explain_out_of_memory(error, config, _as_measured(size, features), ranks.world_size, total)


def _as_measured(size: ModelSize, features: Features) -> ModelSize:
    tokens = features.longest_prompt_tokens or size.tokens
    return dataclasses.replace(size, tokens=tokens, cached_bytes=features.gpu_bytes)
