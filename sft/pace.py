"""How a step is computed on this machine: which layers are recomputed, whether they are compiled, what is graphed.

Takes the settings, the sizes and the device, sets up the model's decoder loop, and says in one line what it chose.
None of it changes what is learned beyond rounding.
"""

import dataclasses

import torch

from sft import zero_json
from sft.config import TrainConfig
from sft.feature_store import free_gpu_bytes
from sft.memory import ModelSize, estimate
from sft.model.sa2va import Sa2VA

MEMORY_SHARE = 0.9  # of the GPU: what the estimate may fill before layers are recomputed
GRAPH_TOKENS = (
    4096  # of a batch; beyond, the GPU is busier than the CPU that feeds it (H200: 8 x 288 gains 20 %, 32 none)
)
# A compiled layer saves about 4.5 ms of launches a step (H200, 36 layers); compiling the one they share takes 20 s.
SAVED_S_PER_LAYER, COMPILING_S = 0.0045, 20.0


def set_up(
    model: Sa2VA, config: TrainConfig, size: ModelSize, device: torch.device, ranks: int, steps: int
) -> tuple[ModelSize, str]:
    """Sets up the decoder loop before the first step.

    Args:
        model: its `layers` are set up.
        config: `gradient_checkpointing` and `compile` decide, or leave it to this function.
        size: of the model and its longest sample.
        device: where it trains.
        ranks: of the whole run.
        steps: optimizer steps that the run will take.

    Returns:
        The size with `recomputed_layers`, and a line for the log.
    """
    size = dataclasses.replace(size, recomputed_layers=recomputed_layers(config, size, device, ranks))
    model.layers.recomputed_layers = size.recomputed_layers
    text = f"{size.recomputed_layers or 'none'} of {size.layers} decoder layers recomputed in the backward pass"
    if not compiles(config, size, device, steps):
        return size, f"Step: {text}, not compiled"
    model.layers.compile()
    text += ", compiled (the first steps take some 20 s)"
    if size.recomputed_layers == 0:
        model.layers.graph_tokens = GRAPH_TOKENS
        text += f", replayed as CUDA graphs up to {GRAPH_TOKENS:,} tokens a batch"
    return size, f"Step: {text}"


def recomputed_layers(config: TrainConfig, size: ModelSize, device: torch.device, ranks: int) -> int:
    """All, none, or as few as make the estimate fit the device."""
    if config.gradient_checkpointing != "auto":
        return size.layers if config.gradient_checkpointing else 0
    usable = usable_bytes(device)
    return 0 if usable is None else fewest_layers(config, size, ranks, MEMORY_SHARE * usable)


def usable_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that this process holds or could have; None on a CPU, where no limit is known."""
    if device.type != "cuda":
        return None
    return free_gpu_bytes(device) + torch.cuda.memory_allocated(device)


def fewest_layers(config: TrainConfig, size: ModelSize, ranks: int, usable_bytes: float) -> int:
    """The fewest layers to recompute so that the estimate stays within the bytes; all of them if it never does."""
    for count in range(size.layers):
        need = estimate(config, dataclasses.replace(size, recomputed_layers=count), ranks)
        if sum(need.values()) <= usable_bytes:
            return count
    return size.layers


def compiles(config: TrainConfig, size: ModelSize, device: torch.device, steps: int) -> bool:
    """Whether the decoder layer is compiled: auto asks for a GPU and a run long enough to win the time back."""
    if zero_json.read(config.deepspeed_config)["zero_optimization"]["stage"] == 3:
        return False  # its hooks fetch each module's parameters as the layer runs
    if config.compile != "auto":
        return config.compile
    micro_steps = steps * config.gradient_accumulation_steps
    return device.type == "cuda" and micro_steps * size.layers * SAVED_S_PER_LAYER > COMPILING_S
