"""The training loop: `train(config)` runs validation of the base, epochs, validation, checkpoints, report.

Takes a TrainConfig, gives a `Result`; everything it needs of the world stands in a `Run` (run.py). Every rank takes the
same path; only the log of the main rank writes.
"""

import contextlib
import dataclasses
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sft import checkpoint, engine, keep, losses, operations, validation
from sft import run as runs
from sft.checkpoint import Progress
from sft.config import TrainConfig
from sft.data.views import VIEWS
from sft.features import Batch, Item
from sft.finite import DivergedError
from sft.model import lora
from sft.model.sa2va import Masks
from sft.run import Run
from sft.stopwatch import Stopwatch


@dataclass(frozen=True)
class Result:
    """What a run achieved; all Dice figures are of the validation images."""

    directory: Path
    dice: float
    """Best validation Dice at `threshold`."""
    epoch: int
    """Epoch of the best validation Dice."""
    base_dice: float
    """Of the base at the same threshold."""
    base_dice_best: float
    """Of the base at the threshold chosen for it on the validation images."""


@dataclass(frozen=True)
class Prepared:
    """What runs of one config share, as `prepare` found it."""

    split: dict
    """The content of split.json."""
    checkpoint_bytes: int
    """Estimate of one checkpoint."""
    batch_size: int
    """The config's; where that is auto, what it chooses here."""
    features: str
    """What was computed, in a sentence."""


def train(
    config: TrainConfig, on_validation: Callable[[dict], None] | None = None, split_file: Path | None = None
) -> Result:
    """Fine-tunes one model; see the module's docstring.

    Args:
        config: all settings.
        on_validation: called on every rank with each validation row (epoch, step, dice, dice_best, ...), base included.
            It may end the process: what the epoch saves is on the disk by then.
        split_file: the split.json of another run, whose division into training and validation is taken over.

    Raises:
        UserError: a mistake the user can mend, among them a diverged loss and too little memory.
    """
    if config.dry_run:
        return dry_run(config)
    with runs.prepared(config, split_file=split_file) as run:
        runs.announce(run)
        runs.keep_features(run, all_items(run))
        if run.progress.epoch == 0:
            hand_on(run, validate(run), on_validation)
        else:
            run.log.line(f"Resumed after epoch {run.progress.epoch} (step {run.progress.step})")
            run.pictures["base"] = validation.base_masks(run)
        run.log.start(run.steps_per_epoch * config.num_epochs, run.progress.step)
        for epoch in range(run.progress.epoch + 1, config.num_epochs + 1):
            train_epoch(run, epoch)
            row = validate(run) if _is_due(epoch, config.validate_every, config) else None
            save(run)
            if row is not None:
                show(run)
                hand_on(run, row, on_validation)
        run.writer.wait()
        return _finish(run)


def train_epoch(run: Run, epoch: int) -> None:
    """One pass over the training images; logs its means."""
    config = run.config
    run.ds_engine.train()
    watch = Stopwatch(run.ranks.device)
    whole = functools.partial(engine.full_parameters, run.ds_engine)
    check = lora.GradientCheck(run.peft_model, whole) if run.progress.step == 0 else None
    sums: dict[str, Tensor] = {}
    effort = operations.Effort(run.loaded.model, run.ranks.device)
    plan = epoch_plan(run, epoch)
    with contextlib.closing(run.features.batches(plan)) as batches:
        for number, batch in enumerate(watch.timed("data", batches), start=1):
            lr = run.ds_engine.learning_rate()  # of this step; the step itself moves it on
            terms = train_step(run, batch, watch)
            effort.add(batch.prompt)
            sums = {name: sums.get(name, 0) + value for name, value in terms.items()}
            if number % config.gradient_accumulation_steps:
                continue
            run.progress = dataclasses.replace(run.progress, step=run.progress.step + 1)
            if check is not None:
                check = _assert_learning(run, check)
            run.log.advance()
            if run.progress.step % config.log_every_steps == 0:
                run.watch.check(config)
                run.log.step({"epoch": epoch, "step": run.progress.step, "lr": lr} | _loss_row(terms))
    run.watch.check(config)
    run.progress = dataclasses.replace(run.progress, epoch=epoch)
    means = {name: engine.all_reduce_sum(value / len(plan)) / run.ranks.world_size for name, value in sums.items()}
    row = {"epoch": epoch, "step": run.progress.step, "lr": lr} | _loss_row(means)
    row |= _speed_row(run, plan, watch, effort)
    epochs_done = epoch - run.first_epoch + 1
    row["eta_s"] = (time.monotonic() - run.started_s) / epochs_done * (config.num_epochs - epoch)
    run.log.epoch(row)
    runs.tell_rejected(run)


def train_step(run: Run, batch: Batch, watch: Stopwatch) -> dict[str, Tensor]:
    """Forward, loss, backward and (on the last micro-batch of a step) the optimizer; returns the loss terms."""
    with watch.part("forward"):
        output = run.ds_engine(batch.prompt, batch.vision, batch.sam2)
        terms = loss_terms(output.masks, batch, run.config)
        if output.text_loss is not None:
            terms["text"] = output.text_loss
            terms["total"] = terms["total"] + run.config.text_weight * output.text_loss
    with watch.part("backward"):
        run.ds_engine.backward(terms["total"])
    with watch.part("optimizer"):
        run.ds_engine.step()
    run.watch.update(terms["total"], run.ds_engine.gradient_norm(), run.progress.step + 1)
    return {name: value.detach() for name, value in terms.items()}


def loss_terms(masks: Masks, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """ComboLoss at each mask's native size: images of one size together, then the mean over images."""
    groups = validation.rows_by_size(batch)
    if len(groups) == 1:  # nothing to gather and nothing to weigh
        return losses.combo(masks.logits_Bhw, torch.stack(batch.masks), config)
    sums: dict[str, Tensor] = {}
    logits = masks.logits_Bhw.unbind()  # to take rows by a list would copy it to the GPU, and wait
    for rows in groups:
        truth_BHW = torch.stack([batch.masks[row] for row in rows])
        terms = losses.combo(torch.stack([logits[row] for row in rows]), truth_BHW, config)
        share = len(rows) / len(batch.masks)
        sums = {name: sums.get(name, 0) + share * value for name, value in terms.items()}
    return sums


def epoch_plan(run: Run, epoch: int) -> list[list[Item]]:
    """This rank's batches of an epoch: a shuffle that seed and epoch decide, dealt to the ranks sample by sample.

    One rank with batch 2B and two ranks with batch B see the same samples in each step.
    """
    items, rank, world_size = _epoch_items(run, epoch), run.ranks.rank, run.ranks.world_size
    per_batch = run.config.batch_size * world_size
    return [items[start : start + per_batch][rank::world_size] for start in range(0, len(items), per_batch)]


def all_items(run: Run) -> list[Item]:
    """What the epochs of a run, from the first on, and its validations ask for on all ranks, each once."""
    items = dict.fromkeys(Item(pair) for pair in run.data.val)
    epochs = range(1, run.config.num_epochs + 1) if run.config.augment else range(1, 2)  # without views all are alike
    for epoch in epochs:
        items |= dict.fromkeys(_epoch_items(run, epoch))
    return list(items)


def validate(run: Run) -> dict:
    """Validates, logs, and takes over the figures of the base (epoch 0) or of the best epoch so far."""
    row = {"epoch": run.progress.epoch, "step": run.progress.step} | validation.validate(run)
    run.log.val(row)
    runs.tell_rejected(run)
    figures = run.progress.figures
    if run.progress.epoch == 0:
        base = {
            f"base_{name}": row[name] for name in ("dice", "dice_best", "threshold_best", "seg_rate") if name in row
        }
        run.progress = dataclasses.replace(run.progress, figures=base)
        run.pictures["base"] = run.pictures["latest"]
    else:
        if row.get("seg_rate", 1.0) < figures.get("base_seg_rate", 0.0):
            run.log.line(
                f"warning: seg_rate fell from {figures['base_seg_rate']:.2f} to {row['seg_rate']:.2f}: asked freely, "
                "the model says [SEG] less often than the base; --text_weight 0.1 or a lower learning_rate keeps it"
            )
        if row["dice"] > run.progress.best_dice:
            run.progress = dataclasses.replace(
                run.progress, best_dice=row["dice"], best_epoch=run.progress.epoch, figures=figures | _scores(row)
            )
            run.pictures["tuned"] = run.pictures["latest"]
    return row


def save(run: Run) -> None:
    """Has what is to stay of the epoch that just ended written beside the next steps."""
    run.writer.check()  # a write that failed ends the run after this epoch, not at the next save
    best = run.progress.best_epoch == run.progress.epoch
    due = _is_due(run.progress.epoch, run.config.save_every, run.config)
    if best or due:
        keep.save(run, as_best=best, to_resume=due)


def show(run: Run) -> None:
    """Brings the pictures of the best adapter and the report up to the validation that just ended."""
    if run.progress.best_epoch == run.progress.epoch:
        runs.draw_comparison(run)
    runs.write_report(run)


def hand_on(run: Run, row: dict, on_validation: Callable[[dict], None] | None) -> None:
    """Gives a validation to the caller of `train`, who may end the process in this call."""
    if on_validation is not None:
        run.writer.wait()
        on_validation(row)


def dry_run(config: TrainConfig) -> Result:
    """One step, one validation batch, a checkpoint written and read back, all in a folder that is removed again."""
    ranks = engine.start(config)
    folder = runs.on_main(ranks, lambda: Path(tempfile.mkdtemp(prefix="sft_dry_run_")))
    try:
        with runs.prepared(config, scratch=folder) as run:
            runs.announce(run)
            run.progress = Progress(epoch=0, num_epochs=config.num_epochs, step=0)  # also after a resume
            run.first_epoch = 1
            whole, per_step = run.data, run.config.batch_size * config.gradient_accumulation_steps * ranks.world_size
            items = all_items(run)
            run.data = dataclasses.replace(whole, train=whole.train[:per_step], val=whole.val[: config.val_batch_size])
            run.steps_per_epoch = 1
            runs.keep_features(run, items, now=all_items(run))
            row = validate(run)
            run.log.line(runs.memory_line(run))
            run.log.start(1)
            train_epoch(run, 1)
            validate(run)
            show(run)
            keep.save(run, as_best=False, to_resume=True)
            run.writer.wait()
            checkpoint.load(keep.to_resume_from(run), run.ds_engine, ranks)
            engine.barrier()  # nobody reads the folder any more
            run.log.line("Dry run: data, model, one step, one validation batch and one checkpoint are in order")
            return Result(run.directory, run.progress.best_dice, 1, row["dice"], row["dice_best"])
    finally:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def prepare(config: TrainConfig) -> Prepared:
    """Checks everything and computes the frozen features that runs of this config will read, before any of them.

    Leaves the features on the disk and nothing else.

    Args:
        config: what the runs have in common, with their highest lora_rank: it decides how much room they need.

    Raises:
        UserError: as `train`.
    """
    ranks = engine.start(config)
    folder = runs.on_main(ranks, lambda: Path(tempfile.mkdtemp(prefix="sft_prepare_")))
    try:
        with runs.prepared(config, scratch=folder) as run:
            runs.keep_features(run, all_items(run))
            run.features.flush()
            split = json.loads((run.directory / "split.json").read_text(encoding="utf-8")) if ranks.is_main else {}
            trainable, number = run.size.lora_parameters + run.size.whole_parameters, run.config.batch_size
        lines = (folder / "training.log").read_text(encoding="utf-8").splitlines() if ranks.is_main else []
        told = next((line for line in reversed(lines) if line.startswith("Frozen features")), "Frozen features: none")
        one = checkpoint.checkpoint_bytes(trainable, 2 if config.precision == "bf16" else 4)
        return Prepared(split, one, number, told)
    finally:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _epoch_items(run: Run, epoch: int) -> list[Item]:
    """The samples of an epoch in their order, of all ranks."""
    config, world_size = run.config, run.ranks.world_size
    generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
    pairs = run.data.train
    order = torch.randperm(len(pairs), generator=generator).tolist()
    views = torch.randint(VIEWS, (len(pairs),), generator=generator).tolist() if config.augment else [0] * len(pairs)
    micro_batches = run.steps_per_epoch * config.gradient_accumulation_steps
    wanted = micro_batches * config.batch_size * world_size
    order = (order * -(-wanted // len(order)))[:wanted]  # filled up from the beginning
    return [Item(pairs[index], views[index]) for index in order]


def _assert_learning(run: Run, check: lora.GradientCheck) -> None:
    """After the first step: stops the run if a LoRA matrix got no update or a frozen weight moved."""
    problems = check.problems(run.peft_model)
    if problems:
        raise DivergedError(f"after the first step {'; '.join(problems)}: nothing was saved, the set-up is wrong")
    run.log.line("Gradient check: every LoRA B moved, no frozen parameter did")


def _loss_row(terms: dict[str, Tensor]) -> dict[str, float]:
    return {("loss" if name == "total" else name): float(value) for name, value in terms.items()}


def _speed_row(run: Run, plan: list[list[Item]], watch: Stopwatch, effort: operations.Effort) -> dict[str, float]:
    """Samples per second over all ranks, the mean step and its parts, and on a GPU its memory and MFU."""
    shares, elapsed_s = watch.seconds(), watch.elapsed_s()
    row = {f"{part}_s": shares[part] / run.steps_per_epoch for part in ("data", "forward", "backward", "optimizer")}
    row["step_s"] = elapsed_s / run.steps_per_epoch
    row["samples_per_s"] = sum(map(len, plan)) * run.ranks.world_size / elapsed_s
    if run.ranks.device.type == "cuda":
        row["gpu_gib"] = torch.cuda.max_memory_allocated(run.ranks.device) / 2**30
    return row | effort.row(elapsed_s)


def _scores(row: dict) -> dict[str, float]:
    return {name: row[name] for name in ("dice", "dice_best", "threshold_best", "iou", "recall", "precision")}


def _is_due(epoch: int, every: int, config: TrainConfig) -> bool:
    """Whether something that comes every so many epochs, and at the end, comes after this epoch."""
    return epoch == config.num_epochs or epoch % every == 0


def _finish(run: Run) -> Result:
    """The closing lines."""
    figures, progress = run.progress.figures, run.progress
    base, base_best = figures["base_dice"], figures["base_dice_best"]
    log = run.log.line
    log(f"Best Dice {progress.best_dice:.4f} at epoch {progress.best_epoch}, {time.monotonic() - run.started_s:.0f} s")
    log(f"  base {base:.4f}: gain {progress.best_dice - base:+.4f}")
    log(
        f"  base at its best threshold {figures['base_threshold_best']:.2g}: {base_best:.4f}: "
        f"gain {progress.best_dice - base_best:+.4f}"
    )
    log(f"  tuned at its best threshold {figures['threshold_best']:.2g}: {figures['dice_best']:.4f}")
    for path in (run.directory / name for name in (checkpoint.BEST, "comparison.png", "report.html")):
        if path.exists():
            log(f"  {path}")
    return Result(run.directory, progress.best_dice, progress.best_epoch, base, base_best)
