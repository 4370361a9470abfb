"""How many images a rank takes at once: what `--batch_size auto` chooses, and how many steps an epoch then has.

Takes the settings, sizes and a model that no engine holds yet; gives the settings with a number, the same on every
rank, and a line that says why. The memory estimate proposes a number; a trial step of the largest images confirms it or
leads to the next smaller one. Nothing else changes: not the learning rate, the epochs or the accumulation, and after
the trial not a weight, a gradient or a random state.
"""

import dataclasses
import gc
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from sft import engine, losses, pace
from sft.config import TrainConfig, UserError
from sft.features import Features
from sft.memory import GIB, ModelSize, estimate, explain_out_of_memory
from sft.model.preprocess import Preprocess

# An H200 takes 32.9 ms for a sample of a 4B model at batch 1, 10.7 at 8 and 9.3 at 32. From there on it is busy, and a
# larger batch only leaves an epoch fewer optimizer steps.
MOST = 32
WELL_FILLED = 8  # from here on a larger batch gains less than recomputing layers for it costs (a third of their time)
MOST_ON_CPU = 4  # as in the demo: more gains nothing on a few cores
SIZES_TRIED = 16  # of the images' sizes, for the longest prompt: a tokenizer takes some ms


@dataclass(frozen=True)
class Largest:
    """What the images of a data set ask for at most; two images may share in it."""

    tokens: int
    """Of a sample: vision, question and answer."""
    image_hw: tuple[int, int]
    """Of an image with so many tokens."""
    mask_hw: tuple[int, int]
    """Of the mask with the most pixels."""


def largest(sizes: Iterable[tuple[int, int]], preprocess: Preprocess, question: str) -> Largest:
    """Looks through the sizes (width, height) of a data set's images."""
    widest = sorted(sizes, key=math.prod, reverse=True) or [(512, 512)]

    def tokens(size: tuple[int, int]) -> int:
        return preprocess.prompt([question], [preprocess.image_layout(*size[::-1])]).input_ids_BL.shape[1]

    most, longest = max((tokens(size), size) for size in widest[:SIZES_TRIED])
    return Largest(most, longest[::-1], widest[0][::-1])


def count_steps(samples: int, config: TrainConfig, world_size: int) -> int:
    """Optimizer steps of an epoch: the last one is filled up with samples from the epoch's beginning."""
    per_step = config.batch_size * world_size * config.gradient_accumulation_steps
    return -(-samples // per_step)


def candidates(samples: int, together: int, most: int) -> list[int]:
    """The numbers worth a try, largest first: each about half of the one before it, down to 1.

    No step takes a sample twice, where there are enough for all ranks. Each number is the smallest with its number of
    steps an epoch, so that as few samples as can be are repeated to fill the last one.

    Args:
        samples: training images.
        together: forward passes of a step, over ranks and accumulation.
        most: a number above it is not wanted.
    """
    most = max(1, min(most, samples // together))
    found = []
    while most:
        steps = -(-samples // (most * together))
        found.append(-(-samples // (steps * together)))
        most //= 2
    return list(dict.fromkeys(found))


def choose(
    config: TrainConfig,
    size: ModelSize,
    samples: int,
    ranks: engine.Ranks,
    attempt: Callable[[TrainConfig], int | None],
) -> tuple[TrainConfig, str]:
    """Puts a number in the place of `auto`. Collective.

    Args:
        config: comes back as it is if it holds a number.
        size: of the model and its largest sample.
        samples: training images.
        ranks: who takes part.
        attempt: runs a step with these settings on this rank; bytes at its peak, or None if they do not fit (`trial`).

    Returns:
        The settings with a number, and a line for the log.

    Raises:
        UserError: not even the smallest number fits; says what would help.
    """
    if config.batch_size != "auto":
        return config, _line(config, ranks)
    together = ranks.world_size * config.gradient_accumulation_steps
    whole_bytes = pace.usable_bytes(ranks.device)
    most = MOST_ON_CPU if whole_bytes is None else MOST
    counts = candidates(samples, together, most)
    ends = f"{most} at most, evened out over the steps of an epoch"
    if samples // together < most:
        ends = f"no step takes one of the {samples:,} images twice"
    if whole_bytes is None:
        config = dataclasses.replace(config, batch_size=counts[0])
        return config, _line(config, ranks, f"no limit of memory is known on a CPU, so {ends}")
    usable_bytes = pace.MEMORY_SHARE * whole_bytes
    proposed, why = min(engine.gather_objects(_proposed(config, size, ranks.world_size, usable_bytes, counts)))
    why = why or ends
    for count in counts[counts.index(proposed) :]:
        tried = dataclasses.replace(config, batch_size=count)
        peaks = engine.gather_objects(attempt(tried))
        if None not in peaks:
            return tried, _line(tried, ranks, f"{why}; a trial step took up to {max(peaks) / GIB:.1f} GiB")
        why = f"{count} ran out of memory in a trial step"
    total_bytes = torch.cuda.get_device_properties(ranks.device).total_memory
    size = dataclasses.replace(size, recomputed_layers=_recomputed(tried, size, ranks))
    raise UserError(explain_out_of_memory(torch.OutOfMemoryError(), tried, size, ranks.world_size, total_bytes))


def trial(
    model: nn.Module, features: Features, most: Largest, size: ModelSize, ranks: engine.Ranks, config: TrainConfig
) -> int | None:
    """A forward and backward pass of a batch of the largest images, beside what the engine will hold.

    Under ZeRO-3 the weights are still whole on every rank here, so the number errs on the small side.

    Args:
        model: wrapped with LoRA, before an engine holds it.
        features: makes the batch.
        most: the largest images.
        size: for what is not there yet: the optimizer's share.
        ranks: this rank's device, and how many there are.
        config: settings with a number.

    Returns:
        Bytes of GPU memory at the peak (0 on a CPU), or None if they were not to be had.
    """
    device, on_gpu = ranks.device, ranks.device.type == "cuda"
    model.get_base_model().layers.recomputed_layers = _recomputed(config, size, ranks)
    parts = estimate(config, size, ranks.world_size)
    spare_bytes = int((1 - pace.MEMORY_SHARE) / 2 * pace.usable_bytes(device))  # the other half is for the estimate
    held_bytes = parts["gradients"] + parts["optimizer"] + spare_bytes
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    trained = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
    for parameter, data in trained.items():
        parameter.data = data.to(dtype)  # as in the engine; peft has them in fp32, which takes more memory
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    fits = True
    try:
        with torch.random.fork_rng([device] if on_gpu else []):
            _step(model, features, most, config, device, held_bytes)
    except torch.OutOfMemoryError:
        fits = False
    peak_bytes = torch.cuda.max_memory_allocated(device) - spare_bytes if on_gpu else 0
    model.eval()  # as it was loaded
    for parameter, data in trained.items():
        parameter.grad, parameter.data = None, data
    gc.collect()
    torch.cuda.empty_cache()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)  # what was set aside is no part of the run's peak
    return peak_bytes if fits else None


def _proposed(
    config: TrainConfig, size: ModelSize, world_size: int, usable_bytes: float, counts: list[int]
) -> tuple[int, str]:
    """The largest number whose estimate fits, and what the next larger one would take; "" if there is none.

    Where layers may be recomputed or not, a number that fills the GPU without comes before a larger one with it.
    """

    def needed(count: int, layers: int) -> int:
        with_count = dataclasses.replace(config, batch_size=count)
        return sum(estimate(with_count, dataclasses.replace(size, recomputed_layers=layers), world_size).values())

    ways = {"auto": (0, size.layers), True: (size.layers,), False: (0,)}[config.gradient_checkpointing]
    for layers in ways:
        found = next((count for count in counts if needed(count, layers) <= usable_bytes), counts[-1])
        if found >= WELL_FILLED or layers == ways[-1]:
            break
    if found == counts[0]:
        return found, ""
    larger = counts[counts.index(found) - 1]
    recomputing = "" if layers else " without recomputing layers"
    need = f"an estimated {needed(larger, layers) / GIB:.1f} GiB, {usable_bytes / GIB:.1f} are usable"
    return found, f"{larger} would take{recomputing} {need}"


def _recomputed(config: TrainConfig, size: ModelSize, ranks: engine.Ranks) -> int:
    return pace.recomputed_layers(config, size, ranks.device, ranks.world_size)


def _step(
    model: nn.Module, features: Features, most: Largest, config: TrainConfig, device: torch.device, held_bytes: int
) -> None:
    held = torch.empty(held_bytes, dtype=torch.uint8, device=device)
    batch = features.blank(most.image_hw, config.batch_size)
    masks_BHW = torch.zeros(config.batch_size, *most.mask_hw, dtype=torch.bool, device=device)
    model.train()
    output = model(batch.prompt, batch.vision, batch.sam2)
    loss = losses.combo(output.masks.logits_Bhw, masks_BHW, config)["total"]
    (loss if output.text_loss is None else loss + output.text_loss).backward()
    del held


def _line(config: TrainConfig, ranks: engine.Ranks, why: str = "") -> str:
    per_step = config.batch_size * ranks.world_size * config.gradient_accumulation_steps
    text = f"Batch size {config.batch_size} per rank, {per_step} images a step"
    rest = f"learning rate {config.learning_rate:g} and {config.num_epochs} epochs stay as given"
    return f"{text}, chosen by auto: {why}; {rest}" if why else text
