"""Scores of the validation images: of a run's model while it trains, and of a finished directory.

Takes a `Run`, or the directory of a run's checkpoint and that of a model; gives Dice and its kin, masks, the
[SEG] rate. Does not know epochs, losses or which checkpoint is kept.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sft import checkpoint, data, engine, metrics, provenance
from sft.config import TrainConfig
from sft.features import Batch, Features, Item
from sft.model import published
from sft.model.sa2va import Output, Prompt, VisionFeatures, upsample
from sft.run import Run

MAX_ANSWER_TOKENS = 16  # "Sure, [SEG]." has five: an answer that has not come to [SEG] by then will not


@torch.no_grad()
def validate(run: Run) -> dict:
    """Scores of the validation images, the same whatever the number of ranks.

    Batches are the same for any number of ranks, which take them in turn; each image fills its own row of one table.
    """
    config, ranks, val = run.config, run.ranks, run.data.val
    run.ds_engine.eval()
    batches = _batches(val, config)
    table = torch.zeros(len(val), len(metrics.thresholds(config.threshold)), 3, dtype=torch.int64, device=ranks.device)
    seen = torch.zeros(len(val), dtype=torch.int64, device=ranks.device)
    mine = list(range(len(batches)))[ranks.rank :: ranks.world_size]
    # A rank without a batch of its own repeats the first: under ZeRO-3 every rank must take part in each forward.
    mine += [0] * (-(-len(batches) // ranks.world_size) - len(mine))
    pictured: dict[str, np.ndarray] = {}
    plan = [batches[number] for number in mine]
    for turn, batch, rows, logits_BHW, truth_BHW in _answers(run.ds_engine, run.features, plan, _quietly(run)):
        if turn * ranks.world_size + ranks.rank >= len(batches):
            continue  # a repeated batch
        places = torch.tensor(rows, device=ranks.device) + mine[turn] * config.val_batch_size
        table[places] = metrics.counts(logits_BHW, truth_BHW, config.threshold)
        seen[places] += 1
        if mine[turn] == 0:
            pictured |= _predicted(logits_BHW, batch, rows, config)
    run.pictures["latest"] = pictured
    engine.all_reduce_sum(table)
    assert bool((engine.all_reduce_sum(seen) == 1).all()), "a validation image was counted twice or not at all"
    row = metrics.summarize(table.cpu(), config.threshold)
    row |= {"seg_rate": seg_rate(run)} if config.seg_rate_samples else {}
    engine.settle(run.ds_engine)
    return row


@torch.no_grad()
def base_masks(run: Run) -> dict[str, np.ndarray]:
    """The base's masks of the first validation batch, which a resumed run needs for its picture. Collective."""
    run.ds_engine.eval()
    first = _batches(run.data.val, run.config)[:1]
    found: dict[str, np.ndarray] = {}
    with run.peft_model.disable_adapter():
        for _, batch, rows, logits_BHW, _ in _answers(run.ds_engine, run.features, first, _quietly(run)):
            found |= _predicted(logits_BHW, batch, rows, run.config)
    engine.settle(run.ds_engine)
    return found


@torch.no_grad()
def seg_rate(run: Run) -> float:
    """How often greedy decoding after the question arrives at [SEG], on a fixed part of the validation images.

    Every rank decodes all of them: it is little work, and no rank waits in a collective alone.
    """
    val, preprocess, most = run.data.val, run.loaded.preprocess, run.config.val_batch_size
    count = min(run.config.seg_rate_samples, len(val))
    chosen = [val[index * len(val) // count] for index in range(count)]
    seg_in_answer = len(preprocess.forced_ids) - 1
    of_length: dict[int, list[tuple[Prompt, VisionFeatures]]] = {}  # decoded together: padding has no place in between
    with contextlib.closing(run.features.batches([[Item(pair)] for pair in chosen])) as batches:
        for batch in batches:
            length = int(batch.prompt.seg_position_B) - seg_in_answer
            of_length.setdefault(length, []).append((batch.prompt.first(length), batch.vision))
    together = [asked[start : start + most] for asked in of_length.values() for start in range(0, len(asked), most)]
    arrived = 0
    for asked in together:
        questions, visions = zip(*asked, strict=True)
        question, vision = Prompt.join(questions), VisionFeatures.join(visions)
        answers_BL = run.loaded.model.generate(question, vision, preprocess.stop_token_ids, MAX_ANSWER_TOKENS)
        arrived += int((answers_BL == preprocess.seg_token_id).any(-1).sum())
    return arrived / count


@torch.no_grad()
def validate_directory(checkpoint_directory: Path, model_directory: Path) -> tuple[float, float]:
    """Validation Dice of a run's checkpoint as the run found it, and of another model on the same images.

    Args:
        checkpoint_directory: RUN/checkpoint_best or another of a run; its settings and split are used.
        model_directory: in the published format, for instance the checkpoint merged into its base.

    Raises:
        UserError: no run around the checkpoint, no validation of it in the run's log, or a wrong model.
    """
    checkpoint.check_complete(checkpoint_directory)
    run_directory = Path(checkpoint_directory).resolve().parent
    before = provenance.validated_dice(run_directory, checkpoint.read_progress(checkpoint_directory).epoch)
    config = dataclasses.replace(provenance.settings_of_run(run_directory), model_path=str(model_directory))
    val = data.load(config, split_file=run_directory / "split.json").val
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    loaded = published.load(config.model_path, dtype=dtype, device=device)
    frozen = dataclasses.replace(config, lora_scope=("language_model",), train_modules=(), feature_cache="off")
    features = Features(loaded.model, loaded.preprocess, frozen, device)
    answers = _answers(loaded.model, features, _batches(val, config))
    counted = [metrics.counts(logits, truth, config.threshold).cpu() for _, _, _, logits, truth in answers]
    features.close()
    return before, metrics.summarize(torch.cat(counted), config.threshold)["dice"]


def rows_by_size(batch: Batch) -> list[list[int]]:
    """Rows of the batch whose masks have one size, together."""
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, mask in enumerate(batch.masks):
        rows_of.setdefault(tuple(mask.shape), []).append(row)
    return list(rows_of.values())


def _batches(pairs: Sequence[data.Pair], config: TrainConfig) -> list[list[Item]]:
    starts = range(0, len(pairs), config.val_batch_size)
    return [[Item(pair) for pair in pairs[start : start + config.val_batch_size]] for start in starts]


def _quietly(run: Run) -> Callable[[], contextlib.AbstractContextManager]:
    """Inference mode, but where something outlives a pass that training uses too and must be an ordinary tensor: the
    small parameters that ZeRO-3 has gathered, and what a compiled layer and its graphs hold.
    """
    nothing_lasts = run.ds_engine.vectors and not run.loaded.model.layers.compiled
    return torch.inference_mode if nothing_lasts else torch.no_grad


def _answers(
    model: Callable[..., Output],
    features: Features,
    plan: list[list[Item]],
    quietly: Callable[[], contextlib.AbstractContextManager] = torch.inference_mode,
) -> Iterator[tuple[int, Batch, list[int], Tensor, Tensor]]:
    """Each batch's number, the batch, rows of it whose masks have one size, their logits and truth at that size."""
    with contextlib.closing(features.batches(plan)) as batches:
        for number, batch in enumerate(batches):
            with quietly():
                logits_Bhw = model(batch.prompt, batch.vision, batch.sam2).masks.logits_Bhw
            for rows in rows_by_size(batch):
                truth_BHW = torch.stack([batch.masks[row] for row in rows])
                yield number, batch, rows, upsample(logits_Bhw[rows], tuple(truth_BHW.shape[1:])), truth_BHW


def _predicted(logits_BHW: Tensor, batch: Batch, rows: list[int], config: TrainConfig) -> dict[str, np.ndarray]:
    """Name -> mask at the threshold, of these rows of a batch."""
    masks_BHW = (logits_BHW.sigmoid() > config.threshold).cpu().numpy()
    return {batch.items[row].pair.name: mask for row, mask in zip(rows, masks_BHW, strict=True)}
