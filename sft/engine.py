"""Ranks and the DeepSpeed engine: start the process group, build the engine, move its state in and out whole.

Takes a TrainConfig, a model and its parameter groups; gives a DeepSpeed engine and plain tensors. It knows nothing of
images, losses or checkpoint files. It is the only file that imports deepspeed.

Words: master: the fp32 copy of a weight that AdamW updates. Compute copy: the weight the forward pass uses (bf16 or
fp32), always the master rounded. Step: one optimizer step, of all ranks and all accumulated micro-batches.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import os
import unittest.mock
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from sft import gloo, zero_json, zero_steps
from sft.config import TrainConfig, UserError, deepspeed_config_path
from sft.finite import check_weights
from sft.flat import Layout, Vector, Vectors, layout, vectors_of
from sft.ranks import ensure_rank, reserve_port, was_launched
from sft.schedule import learning_rate_factor

# DeepSpeed picks its accelerator while it is imported, so the choice has to stand before that.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: E402

# The first step would import DeepSpeed's Muon, which is never used here and has itself compiled: a second at least.
with unittest.mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda one: one)):
    import deepspeed.runtime.zero.muon.original_muon  # noqa: E402

PORT_TRIES = 5
_LINEAR = nn.functional.linear  # ZeRO-3 replaces it for the whole process, and the other rounds differently


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world_size`, the `local_rank`-th on its machine, computing on `device`."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0


def in_this_thread() -> contextlib.AbstractContextManager:
    """Around a backward pass: torch runs it here, not in a thread per GPU; to wake one and wait takes 0.1 to 0.2 ms."""
    return torch.autograd.set_multithreading_enabled(False)


class Engine:
    """A model in training: run it, give it gradients, step.

    Under ZeRO-1 and 2 DeepSpeed holds the vectors of what trains and autograd the parameters of the model; under
    ZeRO-3, which deals out the parameters of each module, DeepSpeed holds the model.
    """

    def __init__(self, model: nn.Module, deepspeed_engine: deepspeed.DeepSpeedEngine, vectors: list[Vector]):
        self.model, self.deepspeed, self.vectors = model, deepspeed_engine, vectors

    def __call__(self, *inputs: Any) -> Any:
        """The model's forward pass."""
        return self.model(*inputs) if self.vectors else self.deepspeed(*inputs)

    def train(self) -> None:
        """Dropout on, activations recomputed as asked."""
        self.model.train()

    def eval(self) -> None:
        """Dropout off."""
        self.model.eval()

    def backward(self, loss: Tensor) -> None:
        """The backward pass of one micro-batch: gradients, summed over micro-batches, reduced over ranks."""
        with in_this_thread():
            if self.vectors:
                loss.backward()
                loss = self.deepspeed(tuple(vector.take_gradients() for vector in self.vectors))
            self.deepspeed.backward(loss)

    def step(self) -> None:
        """AdamW and the schedule after the last micro-batch of a step; before it, nothing."""
        self.deepspeed.step()

    def gradient_norm(self) -> Tensor | float | None:
        """L2 norm of all gradients of the last step before clipping; None before the first."""
        return self.deepspeed.get_global_grad_norm()

    def learning_rate(self) -> float:
        """Of the first group in the step to come."""
        return self.deepspeed.lr_scheduler.get_last_lr()[0]


def start(config: TrainConfig) -> Ranks:
    """Joins the process group (nccl on GPUs, gloo on CPUs), alone if no launcher set RANK and its kin.

    A second call in one process gives the same ranks again, and a process group that torch already has is used.

    Raises:
        UserError: the launcher's variables are incomplete, LOCAL_RANK has no device, or the GPU cannot do bf16.
    """
    _silence()
    if os.environ.get("WORLD_SIZE", "1") != "1" and not was_launched(os.environ):
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but RANK and its kin are not all set: see launch/")
    ensure_rank()
    rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = _pick_device(local_rank, config.precision)
    # Otherwise init_distributed compiles a shared-memory extension: 100 s, a C++ compiler, 66 MiB of /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    steps_on_cpu = backend == "gloo" or zero_json.offloads(zero_json.read(config.deepspeed_config))
    if not steps_on_cpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # else each reader and writer copies by as many threads as there are cores
    _join(backend, alone=world_size == 1)
    return Ranks(rank, local_rank, world_size, device)


def deepspeed_dict(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's dictionary: the JSON file's ZeRO and communication keys, and everything else from TrainConfig.

    Args:
        config: `deepspeed_config` is a name in deepspeed_configs/ or the path of a JSON file.
        world_size: number of ranks, >= 1.

    Raises:
        UserError: no such file, no JSON, a key that belongs to TrainConfig or is unknown, "auto", or a ZeRO stage
            other than 1, 2, 3.
    """
    keys = zero_json.read(config.deepspeed_config)
    _check_zero_keys(deepspeed_config_path(config.deepspeed_config), keys["zero_optimization"])
    # Sums of bf16 gradients in bf16 are off by 0.4 % after 8 micro-batches. ZeRO-1 would change to another optimizer
    # class for fp32 sums, and offload has none.
    summed = config.precision == "bf16" and config.gradient_accumulation_steps > 1
    if summed and keys["zero_optimization"]["stage"] > 1 and not zero_json.offloads(keys):
        keys["data_types"] = {"grad_accum_dtype": "fp32"}
    return keys | {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "train_batch_size": config.batch_size * config.gradient_accumulation_steps * world_size,
        "gradient_clipping": config.max_grad_norm,
        # The check waits for the GPU in every step; `FiniteWatch` sees what it sees, without waiting.
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": False},
        "zero_allow_untested_optimizer": True,
        # Offload with torch's fused AdamW on the CPU; DeepSpeed's own would be compiled on the user's machine.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        # On by default, and then it waits for the GPU twice per micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }


def initialize(
    model: nn.Module, param_groups: list[dict[str, Any]], config: TrainConfig, ranks: Ranks, total_steps: int
) -> Engine:
    """Wraps the model with AdamW, the learning-rate schedule and ZeRO; the engine steps the schedule itself.

    A parameter may have no gradient in a step: it counts as zero. Under ZeRO-3 the set of parameters that have one
    must be the same on every rank and in every micro-batch of a step (its buckets have no way to tell them apart).

    Args:
        model: its parameters are moved to the device and cast to the compute dtype; buffers keep theirs.
        param_groups: torch.optim groups, each trainable parameter in exactly one; `lr` and `weight_decay` default
            to the config's.
        total_steps: optimizer steps of the whole run, >= 1.
    """
    grouped = [id(parameter) for group in param_groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trainable), "param_groups must hold every trainable parameter once"
    param_groups = [group for group in param_groups if group["params"]]
    settings = deepspeed_dict(config, ranks.world_size)
    vectors, held = [], model
    if settings["zero_optimization"]["stage"] < 3:
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        nn.functional.linear = _LINEAR
        vectors = vectors_of(model, param_groups, dtype, ranks.device)
        param_groups = [group | {"params": [v.parameter]} for group, v in zip(param_groups, vectors, strict=True)]
        held = Vectors(vectors, scaled=config.gradient_accumulation_steps > 1)
        _move(model, dtype, ranks.device)
    optimizer = torch.optim.AdamW(param_groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, total_steps, warmup_steps, config.lr_scheduler)
    )
    deepspeed_engine, *_ = deepspeed.initialize(
        model=held, optimizer=optimizer, lr_scheduler=schedule, config=settings, dist_init_required=False
    )
    for vector in vectors:
        vector.link()
    engine = Engine(model, deepspeed_engine, vectors)
    _create_optimizer_state(engine)
    _forget_gradients_after_step(engine)
    zero = deepspeed_engine.optimizer
    if vectors and zero.dtype == torch.bfloat16 and not zero.cpu_offload:  # elsewhere it waits for other reasons
        zero_steps.lighten(zero, config.max_grad_norm)
    return engine


def set_schedule_step(ds_engine: Engine, step: int) -> None:
    """Puts the schedule at an optimizer step, as if so many had been taken."""
    schedule = ds_engine.deepspeed.lr_scheduler
    schedule.last_epoch = step
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(ds_engine.deepspeed.basic_optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


@contextlib.contextmanager
def full_parameters(ds_engine: Engine, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Makes parameters whole for reading while inside, on every rank: ZeRO-3 keeps only slices. Collective."""
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
        yield


def settle(ds_engine: Engine) -> None:
    """Waits for what ZeRO-3 has fetched ahead; call after forward passes that no backward pass follows.

    Such a pass leaves parameters in flight for the backward pass it expects, and then none can be made whole.
    """
    if ds_engine.deepspeed.zero_optimization_stage() == 3:
        ds_engine.deepspeed.empty_partition_cache()


def trainable_state(ds_engine: Engine) -> dict[str, Tensor]:
    """Trainable weights by name, in the compute dtype (what validation measured), whole. Collective.

    Returns:
        CPU copies on the main rank; an empty dict on the others.

    Raises:
        DivergedError: on every rank, if a value is not finite.
    """
    state, finite = {}, []
    for name, parameter in _trainable(ds_engine).items():
        with full_parameters(ds_engine, [parameter]):
            finite.append(torch.isfinite(parameter.detach()).all())
            if torch.distributed.get_rank() == 0:
                state[name] = parameter.detach().to("cpu", copy=True)
    check_weights(finite)
    return state


def training_tensors(ds_engine: Engine) -> dict[str, Any]:
    """Everything the engine needs to go on, whole and independent of the number of ranks. Collective.

    Returns:
        On the main rank `parameters`: name -> {master, exp_avg, exp_avg_sq} (fp32, CPU), `adam_step`,
        `schedule_step`, `global_steps`, `global_samples`. On the others the same, `parameters` being empty.

    Raises:
        DivergedError: on every rank, if a value is not finite.
    """
    parameters, finite = {}, []
    for parameter, places in _optimised(ds_engine):
        whole = {
            "master": deepspeed.utils.safe_get_full_fp32_param(parameter),
            "exp_avg": deepspeed.utils.safe_get_full_optimizer_state(parameter, "exp_avg"),
            "exp_avg_sq": deepspeed.utils.safe_get_full_optimizer_state(parameter, "exp_avg_sq"),
        }
        finite += [torch.isfinite(value).all() for value in whole.values()]
        if torch.distributed.get_rank() == 0:
            for key, value in whole.items():
                for name, part in places.cut(value.detach()).items():
                    parameters.setdefault(name, {})[key] = part.to("cpu", copy=True)
    check_weights(finite)
    steps = {int(state["step"]) for state in _adam_states(ds_engine)}
    assert len(steps) == 1, f"AdamW's partitions are at different steps: {sorted(steps)}"
    return {
        "parameters": parameters,
        "adam_step": steps.pop(),
        "schedule_step": ds_engine.deepspeed.lr_scheduler.last_epoch,
        "global_steps": ds_engine.deepspeed.global_steps,
        "global_samples": ds_engine.deepspeed.global_samples,
    }


def restore_training_tensors(ds_engine: Engine, state: dict[str, Any]) -> None:
    """Puts back what `training_tensors` gave, on any number of ranks; every rank passes all of it. Collective.

    Args:
        state: names and shapes must be this engine's (`parameter_shapes`); the caller checks them.
    """
    fp32 = torch.empty(0, dtype=torch.float32)
    for parameter, places in _optimised(ds_engine):
        named = {place.name: state["parameters"][place.name] for place in places.places}
        whole = {
            key: places.join({name: values[key] for name, values in named.items()}, fp32)
            for key in ("master", "exp_avg", "exp_avg_sq")
        }
        _set_partition(parameter, whole["master"], None)
        _set_partition(parameter, whole["exp_avg"], "exp_avg")
        _set_partition(parameter, whole["exp_avg_sq"], "exp_avg_sq")
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(whole["master"].view(parameter.shape))
    for partition in _adam_states(ds_engine):
        partition["step"].fill_(state["adam_step"])
    set_schedule_step(ds_engine, state["schedule_step"])
    ds_engine.deepspeed.global_steps = state["global_steps"]
    ds_engine.deepspeed.global_samples = state["global_samples"]
    ds_engine.deepspeed.micro_steps = state["global_steps"] * ds_engine.deepspeed.gradient_accumulation_steps()


def parameter_shapes(ds_engine: Engine) -> dict[str, tuple[int, ...]]:
    """Name -> whole shape of every trainable parameter, whatever the ZeRO stage."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in _trainable(ds_engine).items()}


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sums a tensor over all ranks, in place; exact for integers and, at these sizes, float64 counts."""
    torch.distributed.all_reduce(tensor)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank. Pickles: small values only."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits for every rank."""
    torch.distributed.barrier()


def shut_down() -> None:
    """Leaves the process group, if there is one; not a collective, so it is safe after an error."""
    if torch.distributed.is_initialized():
        deepspeed.comm.destroy_process_group()
        gloo.wait_until_idle()


def _silence() -> None:
    """The log is ours: from libraries only warnings that someone can act on."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    for message in (".*is_gradient_checkpointing.*deprecated", r".*torch\.distributed\..*deprecated"):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    # The device of a barrier is the one `_pick_device` made current.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    logging.getLogger("DeepSpeed").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    # ZeRO-3 cannot look into the model's own output types; their tensors come from submodules, which it does hook.
    return "unknown inputs or outputs type" not in record.getMessage()


def _join(backend: str, alone: bool) -> None:
    """Makes the process group; a rank alone takes another port where somebody else has come to listen on its own."""
    for tries_left in reversed(range(PORT_TRIES if alone else 1)):
        try:
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
            return
        except torch.distributed.DistNetworkError:
            if not tries_left:
                raise
            os.environ["MASTER_PORT"] = reserve_port()


def _pick_device(local_rank: int, precision: str) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"LOCAL_RANK {local_rank}: only {torch.cuda.device_count()} GPU(s) are visible to this process")
    torch.cuda.set_device(local_rank)
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"precision bf16: {torch.cuda.get_device_name()} cannot compute in bf16; use --precision fp32")
    return torch.device("cuda", local_rank)


def _check_zero_keys(path: Path, zero: dict[str, Any]) -> None:
    fields = DeepSpeedZeroConfig.model_fields
    known = {alias for name, field in fields.items() for alias in (name, field.alias or name)}
    for key in zero:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise UserError(f"{path}: zero_optimization has no key {key!r}{hint}")
    try:
        DeepSpeedZeroConfig(**zero)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{path}: zero_optimization: {' '.join(str(error).split())}") from error


def _trainable(ds_engine: Engine) -> dict[str, nn.Parameter]:
    return {name: p for name, p in ds_engine.model.named_parameters() if p.requires_grad}


def _move(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """To the device, parameters in the compute dtype; buffers such as rotary frequencies keep theirs."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _optimised(ds_engine: Engine) -> list[tuple[nn.Parameter, Layout]]:
    """What the optimizer updates, and which trainable parameters lie in it where."""
    if ds_engine.vectors:
        return [(vector.parameter, vector.layout) for vector in ds_engine.vectors]
    whole = {name: getattr(p, "ds_shape", p.shape) for name, p in _trainable(ds_engine).items()}
    return [(p, layout({name: whole[name]}, aligned=1)) for name, p in _trainable(ds_engine).items()]


def _flat_masters(ds_engine: Engine) -> list[Tensor]:
    """This rank's slices of the masters, flattened: what AdamW really updates."""
    zero = ds_engine.deepspeed.optimizer
    if ds_engine.deepspeed.zero_optimization_stage() == 3:
        return zero.fp32_partitioned_groups_flat
    return zero.single_partition_of_fp32_groups


def _adam_states(ds_engine: Engine) -> list[dict[str, Tensor]]:
    return [ds_engine.deepspeed.basic_optimizer.state[flat] for flat in _flat_masters(ds_engine)]


def _create_optimizer_state(ds_engine: Engine) -> None:
    """Creates AdamW's state before the first step, as AdamW would, and links it to the parameters.

    DeepSpeed 0.19.8 links it after the first group's first step, when the other groups have none yet: their state
    could then be neither read nor restored. It also shows the memory it takes before training starts.
    """
    for flat in _flat_masters(ds_engine):
        ds_engine.deepspeed.basic_optimizer.state[flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=flat.device),
            "exp_avg": torch.zeros_like(flat, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
        }
    if ds_engine.deepspeed.zero_optimization_stage() < 3:
        ds_engine.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()


def _forget_gradients_after_step(ds_engine: Engine) -> None:
    """Clears the gradient buffers that DeepSpeed keeps between steps under ZeRO-3.

    There (0.19.8) a parameter without a gradient would be updated with the gradient of an earlier step. A vector has
    one in every step.
    """
    if ds_engine.vectors:
        return
    zero = ds_engine.deepspeed.optimizer
    kept = [flat.grad for flat in _flat_masters(ds_engine) if flat.grad is not None]
    kept.append(zero.grad_partitions_flat_buffer)
    step = zero.step

    def step_then_forget(*arguments: Any, **keywords: Any) -> None:
        step(*arguments, **keywords)
        for gradients in kept:
            gradients.zero_()

    zero.step = step_then_forget


def _set_partition(parameter: nn.Parameter, whole: Tensor, key: str | None) -> None:
    """Writes this rank's slice of a whole fp32 tensor (`key` None: the master)."""
    if not hasattr(parameter, "ds_tensor"):
        if key is None:
            deepspeed.utils.safe_set_full_fp32_param(parameter, whole)
        else:
            deepspeed.utils.safe_set_full_optimizer_state(parameter, whole, key)
        return
    # ZeRO-3 pads a parameter to a multiple of the ranks; DeepSpeed's setter for whole tensors runs over the end then.
    size = parameter.ds_tensor.numel()
    padded = nn.functional.pad(whole.flatten(), (0, size * torch.distributed.get_world_size() - whole.numel()))
    mine = padded.narrow(0, size * torch.distributed.get_rank(), size)
    if key is None:
        deepspeed.utils.safe_set_local_fp32_param(parameter, mine)
    else:
        deepspeed.utils.safe_set_local_optimizer_state(parameter, mine, key)
