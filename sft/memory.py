"""GPU memory: an estimate of what takes it, and what to change when it runs out.

Pure functions of the settings and a few sizes of the model; bytes per rank. Imports nothing heavy.

Sources of the constants: the ZeRO paper (arXiv 1910.02054, section 3) for weights, gradients and AdamW's state; the
activations were fitted to a measured 1.75 GiB per sample for 36 layers of width 2048/11008 on 320 tokens.
"""

import re
from dataclasses import dataclass, replace

from sft import zero_json
from sft.config import TrainConfig

OPTIMIZER_BYTES = 12  # fp32 master and AdamW's two moments, per trainable parameter
HIDDEN_VALUES, INTERMEDIATE_VALUES = 18, 4  # kept per token and layer, in units of the two widths
MASK_PIXEL_BYTES = 128  # mask decoder, upsampled fp32 logits and the loss terms, per pixel of the mask
GIB = 2**30
STEP_MARGIN = 1.25  # of the estimate, before GPU memory goes to features
FILLING_BYTES = 6 * GIB  # what the encoders take at once, with what waits around them


@dataclass(frozen=True)
class ModelSize:
    """What the estimate needs to know about a model and a sample."""

    frozen_parameters: int
    lora_parameters: int
    whole_parameters: int
    """Parameters of modules that are trained whole."""
    layers: int
    """Layers of the language model."""
    hidden: int
    """Width of its states."""
    intermediate: int
    """Width inside its MLPs."""
    tokens: int
    """Tokens of one sample: vision, question and answer."""
    mask_pixels: int
    """Pixels of one sample's mask."""
    recomputed_layers: int = 0
    """Layers whose activations are computed again in the backward pass instead of being kept."""
    cached_bytes: int = 0
    """Features of frozen encoders kept on the GPU."""


def estimate(config: TrainConfig, size: ModelSize, world_size: int) -> dict[str, int]:
    """Bytes on one GPU by purpose: weights, gradients, optimizer, activations, features.

    Args:
        config: the run's settings.
        size: of the model and one sample.
        world_size: number of ranks, >= 1.
    """
    keys = zero_json.read(config.deepspeed_config)
    stage, offload = keys["zero_optimization"]["stage"], zero_json.offloads(keys)
    value = 2 if config.precision == "bf16" else 4
    trainable = size.lora_parameters + size.whole_parameters
    layer = value * size.tokens * (HIDDEN_VALUES * size.hidden + INTERMEDIATE_VALUES * size.intermediate)
    recomputed = size.recomputed_layers  # each leaves its input; one at a time is whole again
    layers = (size.layers - recomputed + (recomputed > 0)) * layer + recomputed * value * size.tokens * size.hidden
    return {
        "weights": value * (size.frozen_parameters + trainable) // (world_size if stage == 3 else 1),
        "gradients": value * trainable // (world_size if stage >= 2 else 1),
        "optimizer": 0 if offload else OPTIMIZER_BYTES * trainable // world_size,
        "activations": config.batch_size * (layers + MASK_PIXEL_BYTES * size.mask_pixels),
        "features": size.cached_bytes,
    }


def still_needed(config: TrainConfig, size: ModelSize, world_size: int, held_bytes: int) -> int:
    """Bytes that must stay free on a GPU when features move in: of the step, or of the encoders that fill.

    Args:
        config: the run's settings.
        size: of the model and one sample.
        world_size: number of ranks.
        held_bytes: what the run has taken already.
    """
    step = int(STEP_MARGIN * sum(estimate(config, size, world_size).values()))
    return max(FILLING_BYTES, step - held_bytes)


def explain_out_of_memory(
    error: BaseException, config: TrainConfig, size: ModelSize, world_size: int, total_bytes: int
) -> str:
    """One line: what ran out, and the three settings that would help most, with their estimated effect.

    Args:
        error: torch's out-of-memory error; its text tells how much was asked for.
        config: the settings it happened with.
        size: of the model and one sample.
        world_size: number of ranks.
        total_bytes: memory of the GPU.
    """
    now = sum(estimate(config, size, world_size).values())
    saved = {
        flags: now - sum(estimate(replace(config, **changes), smaller, world_size).values())
        for flags, changes, smaller in _remedies(config, size, world_size)
    }
    best = sorted((flags for flags in saved if saved[flags] > 0), key=saved.get, reverse=True)[:3]
    advice = [f"({i}) {flags}: about {saved[flags] / GIB:.1f} GiB less" for i, flags in enumerate(best, start=1)]
    while len(advice) < 3:
        advice.append(f"({len(advice) + 1}) {_last_resorts(world_size)[len(advice) - len(best)]}")
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    return (
        f"CUDA out of memory{f' on asking for {asked[1]}' if asked else ''} (the GPU has {total_bytes / GIB:.0f} GiB, "
        f"this run needs an estimated {now / GIB:.1f} GiB). What helps most here: {'; '.join(advice)}"
    )


def _remedies(config: TrainConfig, size: ModelSize, world_size: int) -> list[tuple[str, dict, ModelSize]]:
    """Flags, the same as changes of the config, and the model's size with them."""
    remedies = []
    if config.batch_size > 1:
        half, accumulation = config.batch_size // 2, config.gradient_accumulation_steps * 2
        changes = {"batch_size": half, "gradient_accumulation_steps": accumulation}
        remedies.append((f"--batch_size {half} --gradient_accumulation_steps {accumulation}", changes, size))
    if size.recomputed_layers < size.layers:
        all_again = replace(size, recomputed_layers=size.layers)
        remedies.append(("--gradient_checkpointing true", {"gradient_checkpointing": True}, all_again))
    if config.lora_rank > 1:
        rank = config.lora_rank // 2
        smaller = replace(size, lora_parameters=size.lora_parameters * rank // config.lora_rank)
        alpha = max(1, config.lora_alpha // 2)
        remedies.append((f"--lora_rank {rank} --lora_alpha {alpha}", {"lora_rank": rank, "lora_alpha": alpha}, smaller))
    keys = zero_json.read(config.deepspeed_config)
    if not zero_json.offloads(keys):
        remedies.append(("--deepspeed_config zero2_offload", {"deepspeed_config": "zero2_offload"}, size))
    if world_size > 1 and keys["zero_optimization"]["stage"] < 3:
        remedies.append(("--deepspeed_config zero3", {"deepspeed_config": "zero3"}, size))
    if config.precision == "fp32":
        remedies.append(("--precision bf16", {"precision": "bf16"}, size))
    if size.cached_bytes:
        remedies.append(("--feature_cache host", {"feature_cache": "host"}, replace(size, cached_bytes=0)))
    return remedies


def _last_resorts(world_size: int) -> list[str]:
    gpus = f"more GPUs (now {world_size}) with --deepspeed_config zero3 share the weights"
    return [gpus, "another program may hold memory: see nvidia-smi", "a smaller base model"]
