"""An adapter put back into the published directory: every weight under its published name, all other files unchanged.

Takes a published directory and a checkpoint of a run, gives a new directory; works on tensors and names alone, shard by
shard, so that memory holds one shard at a time and no model is built. Does not know training.
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sft.config import UserError
from sft.model.key_map import newer_layout
from sft.model.lora import ADAPTER_CONFIG, read_adapter
from sft.model.published_json import read_json
from sft.model.shards import opened
from sft.model.weights import FILE, INDEX, weight_files

_PREFIX = "base_model.model."
# Weights beside those that are merged, in whatever format, and what download tools leave.
_NOT_CARRIED = re.compile(
    r"\.git|\.cache|.*\.safetensors(\.index\.json)?|(pytorch_model|tf_model|flax_model).*|.*\.gguf"
)


@dataclass(frozen=True)
class Exported:
    """What was written."""

    tensors: int
    merged: int
    """Weights that a LoRA pair was added to."""
    replaced: int
    """Tensors of modules trained whole."""
    bytes: int
    dtypes: tuple[str, ...]
    left_out: tuple[str, ...]
    """Weights in other files of the base, which would stay without the adapter, and its .git and .cache."""


def export(
    base: Path,
    checkpoint: Path,
    output: Path,
    dtype: torch.dtype | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Merges an adapter into a published directory and writes the result complete or not at all.

    Files of the base that are links, as in Hugging Face's cache, become files.

    Args:
        base: the published directory the adapter was trained on.
        checkpoint: holds adapter_config.json and the adapter's weights.
        output: must not exist yet.
        dtype: of all floating-point weights; None keeps each tensor's own.
        tell: gets a line when a shard is written.

    Raises:
        UserError: output exists or lies inside base or checkpoint, too little space, or the adapter names a tensor
            that the base lacks or shapes differently.
    """
    _check_place(output, base, checkpoint)
    change = _Change(checkpoint)
    if not base.is_dir():
        raise UserError(f"model_path {base}: no such directory; give the base that the adapter was trained on")
    shards = weight_files(base)
    others, left_out = _other_files(base, {shard.name for shard in shards})
    _check_space(output, shards, others, dtype)
    work = output.with_name(output.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        for path in others:
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, work / path.name)
        written = []
        for number, shard in enumerate(shards, start=1):
            written.append(_write_shard(shard, work / shard.name, change, dtype))
            names, size = written[-1]
            tell(f"{shard.name}: {len(names):,} tensors, {size / 1e9:.2f} GB ({number} of {len(shards)})")
        change.check_all_used(base)
        _update_index(work, sum(size for _, size in written))
        _check_readable(work, shards)
        work.rename(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    names = [name for shard_names, _ in written for name in shard_names]
    kinds = tuple(sorted({str(kind).removeprefix("torch.") for kind in change.dtypes}))
    size = sum(size for _, size in written)
    return Exported(len(names), len(change.pairs), len(change.whole), size, kinds, left_out)


def export_adapter(checkpoint: Path, output: Path) -> None:
    """Copies a checkpoint without its training state: what peft needs on the original model, and the tokenizer.

    Raises:
        UserError: output exists or lies inside the checkpoint, or the checkpoint holds no adapter.
    """
    _check_place(output, checkpoint, checkpoint)
    _adapter_settings(checkpoint)
    read_adapter(checkpoint)
    shutil.copytree(checkpoint, output, ignore=shutil.ignore_patterns("training_state.pt", "checkpoint.json"))


def base_of(checkpoint: Path) -> str:
    """The model_path that a checkpoint's adapter was trained on, by its adapter_config.json."""
    named = _adapter_settings(checkpoint).get("base_model_name_or_path")
    if not named:
        raise UserError(f"{checkpoint / ADAPTER_CONFIG}: names no base; give --model_path")
    return named


class _Change:
    """What an adapter does to the tensors of its base, by published name."""

    def __init__(self, checkpoint: Path):
        config = _adapter_settings(checkpoint)
        self.checkpoint = checkpoint
        self.settings = config
        other = [name for name in ("use_rslora", "use_dora") if config.get(name)]
        if other:
            raise UserError(
                f"{checkpoint / ADAPTER_CONFIG}: {other[0]} is set, which no run of this program does; "
                "give a checkpoint of a run, or merge with peft"
            )
        self.pairs: dict[str, dict[str, Tensor]] = {}
        self.whole: dict[str, Tensor] = {}
        self.dtypes: set[torch.dtype] = set()
        self._unused: set[str] = set()
        for key, tensor in read_adapter(checkpoint).items():
            path, lora, side = key.removeprefix(_PREFIX).partition(".lora_")
            if lora:
                self.pairs.setdefault(f"{path}.weight", {})[side.removesuffix(".weight")] = tensor
            else:
                self.whole[path] = tensor
        self._unused = set(self.pairs) | set(self.whole)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as the adapter leaves it, in its own dtype; sums are formed in fp32."""
        name = newer_layout(name)  # an adapter's names are; the file keeps its own
        self._unused.discard(name)
        if name in self.whole:
            self._check(name, self.whole[name].shape, tensor.shape)
            return self.whole[name].to(tensor.dtype)
        if name not in self.pairs:
            return tensor
        pair = self.pairs[name]
        update = self._scale(name, len(pair["A"])) * (pair["B"].float() @ pair["A"].float())
        self._check(name, update.shape, tensor.shape)
        return (tensor.float() + update).to(tensor.dtype)

    def check_all_used(self, base: Path) -> None:
        if self._unused:
            listed = ", ".join(sorted(self._unused)[:4])
            raise UserError(
                f"{self.checkpoint}: {len(self._unused)} tensors of the adapter are not in {base} ({listed}); "
                "give the base it was trained on as --model_path"
            )

    def _scale(self, name: str, rank: int) -> float:
        """alpha / rank of one linear, as peft takes them."""
        path = name.removesuffix(".weight")
        alphas = self.settings.get("alpha_pattern") or {}
        found = (alpha for pattern, alpha in alphas.items() if re.fullmatch(rf"(.*\.)?({pattern})", path))
        return next(found, self.settings["lora_alpha"]) / rank

    def _check(self, name: str, ours: torch.Size, theirs: torch.Size) -> None:
        if ours != theirs:
            raise UserError(
                f"{self.checkpoint}: {name} is {list(ours)} in the adapter and {list(theirs)} in the base; "
                "give the base it was trained on as --model_path"
            )


def _adapter_settings(checkpoint: Path) -> dict:
    if not checkpoint.is_dir():
        raise UserError(f"checkpoint {checkpoint}: no such directory; give a checkpoint directory of a run")
    if not (checkpoint / ADAPTER_CONFIG).is_file():
        inside = ", ".join(sorted(path.parent.name for path in checkpoint.glob(f"*/{ADAPTER_CONFIG}")))
        hint = f"give one of {inside} in it" if inside else "give a checkpoint directory of a run"
        raise UserError(f"checkpoint {checkpoint}: no {ADAPTER_CONFIG} in it; {hint}")
    return read_json(checkpoint / ADAPTER_CONFIG)


def _check_place(output: Path, base: Path, checkpoint: Path) -> None:
    for kind, folder in (("base", base), ("checkpoint", checkpoint)):
        if output.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"output {output}: is the {kind} {folder} or lies in it; give a folder outside")
    if output.exists():
        raise UserError(f"output {output}: exists already; give a folder that does not")


def _other_files(base: Path, weights: set[str]) -> tuple[list[Path], tuple[str, ...]]:
    """What is carried over besides the weights, and the names of what is not: old weights would be unmerged ones."""
    found = [path for path in sorted(base.iterdir()) if path.name not in weights]
    dangling = [path.name for path in found if not path.exists()]
    if dangling:
        raise UserError(f"{base}: {', '.join(dangling)} link to nothing; download the model again")
    left_out = [path for path in found if _NOT_CARRIED.fullmatch(path.name) and path.name != INDEX]
    return [path for path in found if path not in left_out], tuple(path.name for path in left_out)


def _check_space(output: Path, shards: list[Path], others: list[Path], dtype: torch.dtype | None) -> None:
    """Before anything is written: the weights in their new dtype and the other files must fit on the disk."""
    files = [file for path in others for file in ((path, *path.rglob("*")) if path.is_dir() else (path,))]
    needed = sum(file.stat().st_size for file in files if file.is_file())
    needed += sum(_bytes_of(shard, dtype) for shard in shards)
    existing = next(path for path in output.absolute().parents if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"output {output}: needs {needed / 2**30:.2f} GiB, but {existing} has {free / 2**30:.2f} GiB free; "
            "free some space or give another --output"
        )


def _bytes_of(shard: Path, dtype: torch.dtype | None) -> int:
    """Of a shard when its floating-point tensors have this dtype, by its header alone."""
    total = 0
    with opened(shard) as file:
        for name in file.keys():  # noqa: SIM118 - an open shard is no mapping
            part = file.get_slice(name)
            kind = part.get_dtype()  # F32, BF16, F8_E4M3, I64, BOOL
            bits = int(re.search(r"\d+", kind)[0]) if kind != "BOOL" else 8
            width = dtype.itemsize if dtype is not None and kind.startswith(("F", "BF")) else bits // 8
            total += math.prod(part.get_shape()) * width
    return total


def _write_shard(source: Path, target: Path, change: _Change, dtype: torch.dtype | None) -> tuple[list[str], int]:
    tensors = {}
    with opened(source) as shard:
        metadata = shard.metadata()
        for name in shard.keys():  # noqa: SIM118 - an open shard is no mapping
            tensor = change.apply(name, shard.get_tensor(name))
            if dtype is not None and tensor.is_floating_point():
                tensor = _converted(name, tensor, dtype)
            tensors[name] = tensor.contiguous()
            change.dtypes.add(tensor.dtype)
    save_file(tensors, target, metadata=metadata)
    return list(tensors), sum(tensor.nbytes for tensor in tensors.values())


def _converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    converted = tensor.to(dtype)
    if converted.isinf().sum() > tensor.isinf().sum():
        raise UserError(
            f"dtype {str(dtype).removeprefix('torch.')}: {name} holds {tensor.abs().max():.3g}, which is beyond "
            f"{torch.finfo(dtype).max:,.0f}, the largest number of that type; give --dtype bf16 or fp32"
        )
    return converted


def _update_index(work: Path, size: int) -> None:
    """The shards keep their names and tensors; only the total can change, with the dtype."""
    if (work / INDEX).is_file():
        index = read_json(work / INDEX)
        index["metadata"] = {**index.get("metadata", {}), "total_size": size}
        (work / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _check_readable(work: Path, shards: list[Path]) -> None:
    """Re-reads names and shapes of what was written against its source."""
    for shard in shards:
        with opened(shard) as before, opened(work / shard.name) as after:
            assert list(before.keys()) == list(after.keys()), f"{shard.name}: written with other tensors"
            for name in before.keys():  # noqa: SIM118
                shapes = [file.get_slice(name).get_shape() for file in (before, after)]
                assert shapes[0] == shapes[1], f"{shard.name}: {name} written with another shape"
    assert (work / FILE).is_file() or (work / INDEX).is_file()
