"""An adapter put back into the published directory: every weight under its published name, all other files unchanged.

Takes a published directory and a checkpoint of a run, gives a new directory; works on tensors and names alone, shard by
shard, so that memory holds one tensor at a time and no model is built. Does not know training.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sft.config import UserError
from sft.model.key_map import newer_layout
from sft.model.lora import ADAPTER_CONFIG, read_adapter
from sft.model.weights import FILE, INDEX, read_json, weight_files

_PREFIX = "base_model.model."


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


def export(base: Path, checkpoint: Path, output: Path, dtype: torch.dtype | None = None) -> Exported:
    """Merges an adapter into a published directory and writes the result complete or not at all.

    Args:
        base: the published directory the adapter was trained on.
        checkpoint: holds adapter_config.json and the adapter's weights.
        output: must not exist yet.
        dtype: of all floating-point weights; None keeps each tensor's own.

    Raises:
        UserError: output exists, or the adapter names a tensor that the base lacks or shapes differently.
    """
    if output.exists():
        raise UserError(f"output {output}: exists already; give a folder that does not")
    change = _Change(checkpoint)
    work = output.with_name(output.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        shards = weight_files(base)
        _copy_the_rest(base, work, {shard.name for shard in shards})
        written = [_write_shard(shard, work / shard.name, change, dtype) for shard in shards]
        change.check_all_used(base)
        _update_index(work, sum(size for _, size in written))
        _check_readable(work, shards)
        work.rename(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    names = [name for shard_names, _ in written for name in shard_names]
    kinds = tuple(sorted({str(kind).removeprefix("torch.") for kind in change.dtypes}))
    return Exported(len(names), len(change.pairs), len(change.whole), sum(size for _, size in written), kinds)


def export_adapter(checkpoint: Path, output: Path) -> None:
    """Copies a checkpoint without its training state: what peft needs on the original model, and the tokenizer.

    Raises:
        UserError: output exists, or the checkpoint holds no adapter.
    """
    if output.exists():
        raise UserError(f"output {output}: exists already; give a folder that does not")
    read_adapter(checkpoint)
    shutil.copytree(checkpoint, output, ignore=shutil.ignore_patterns("training_state.pt", "checkpoint.json"))


class _Change:
    """What an adapter does to the tensors of its base, by published name."""

    def __init__(self, checkpoint: Path):
        config = read_json(checkpoint / ADAPTER_CONFIG)
        self.checkpoint = checkpoint
        self.scale = config["lora_alpha"] / config["r"]
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
        update = self.scale * (pair["B"].float() @ pair["A"].float())
        self._check(name, update.shape, tensor.shape)
        return (tensor.float() + update).to(tensor.dtype)

    def check_all_used(self, base: Path) -> None:
        if self._unused:
            listed = ", ".join(sorted(self._unused)[:4])
            raise UserError(
                f"{self.checkpoint}: {len(self._unused)} tensors of the adapter are not in {base} ({listed}); "
                "give the base it was trained on as --model_path"
            )

    def _check(self, name: str, ours: torch.Size, theirs: torch.Size) -> None:
        if ours != theirs:
            raise UserError(
                f"{self.checkpoint}: {name} is {list(ours)} in the adapter and {list(theirs)} in the base; "
                "give the base it was trained on as --model_path"
            )


def _copy_the_rest(base: Path, work: Path, weights: set[str]) -> None:
    for path in sorted(base.iterdir()):
        if path.name in weights:
            continue
        if path.is_dir():
            shutil.copytree(path, work / path.name)
        else:
            shutil.copyfile(path, work / path.name)


def _write_shard(source: Path, target: Path, change: _Change, dtype: torch.dtype | None) -> tuple[list[str], int]:
    tensors = {}
    with safe_open(source, framework="pt") as shard:
        metadata = shard.metadata()
        for name in shard.keys():  # noqa: SIM118 - an open shard is no mapping
            tensor = change.apply(name, shard.get_tensor(name))
            tensor = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            tensors[name] = tensor.contiguous()
            change.dtypes.add(tensor.dtype)
    save_file(tensors, target, metadata=metadata)
    return list(tensors), sum(tensor.nbytes for tensor in tensors.values())


def _update_index(work: Path, size: int) -> None:
    """The shards keep their names and tensors; only the total can change, with the dtype."""
    if (work / INDEX).is_file():
        index = read_json(work / INDEX)
        index["metadata"] = {**index.get("metadata", {}), "total_size": size}
        (work / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _check_readable(work: Path, shards: list[Path]) -> None:
    """Re-reads names and shapes of what was written against its source."""
    for shard in shards:
        with safe_open(shard, framework="pt") as before, safe_open(work / shard.name, framework="pt") as after:
            assert list(before.keys()) == list(after.keys()), f"{shard.name}: written with other tensors"
            for name in before.keys():  # noqa: SIM118
                shapes = [opened.get_slice(name).get_shape() for opened in (before, after)]
                assert shapes[0] == shapes[1], f"{shard.name}: {name} written with another shape"
    assert (work / FILE).is_file() or (work / INDEX).is_file()
