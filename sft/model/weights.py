"""Safetensors shards -> a native model on its device, each place filled once, as the tensors come in.

Takes a directory with one file or with shards and their index. It does not know what config.json means.
"""

from pathlib import Path

import torch
from torch import Tensor

from sft.config import UserError
from sft.model import internlm2, key_map, shards
from sft.model.published_json import read_json
from sft.model.sa2va import Sa2VA

INDEX, FILE = "model.safetensors.index.json", "model.safetensors"


def begin(directory: Path, dtype: torch.dtype, device: torch.device) -> shards.Tensors:
    """Begins to read the shards of a directory, by published names, while the model is still being made; close it.

    Raises:
        UserError: no weights, a shard missing or unreadable; unreadable ones that come later, while `fill` goes on.
    """
    return shards.begin(weight_files(directory), dtype, device)


def fill(model: Sa2VA, directory: Path, tensors: shards.Tensors, dtype: torch.dtype, device: torch.device) -> None:
    """Puts every published tensor in its place in the native model, each place filled once.

    Args:
        model: weights on the meta device.
        directory: where the tensors come from.
        tensors: from `begin`.
        dtype: of all weights.
        device: where the tensors are, and the model is to be.

    Raises:
        UserError: tensors missing, left over or of another shape, listed by the names and shapes that the files have.
    """
    heads = internlm2.heads_of(model.decoder.config)
    tied_head = key_map.published_name(model.tied_head, heads) if model.tied_head else None
    wanted = {name: list(tensor.shape) for name, tensor in published_state(model).items()}
    rows: dict[str, Tensor] = {}
    left_over, misshapen, in_old_layout = [], [], False
    for name, tensor in tensors:
        newer = key_map.newer_layout(name)
        in_old_layout |= newer != name
        if newer == tied_head or key_map.VIDEO_ONLY.match(name):
            continue  # from_pretrained ties a head to the embeddings whatever the file holds
        expected, found = wanted.pop(newer, None), list(tensor.shape)
        if expected is None:
            left_over.append(name)
        elif expected != found:
            misshapen.append(f"{name}: {found} in the file, {expected} by config.json")
        else:
            for native, part in key_map.to_native(newer, tensor, heads).items():
                part = part.to(device=device, dtype=dtype)
                rows.update({native: part}) if "[" in native else _assign(model, native, part)
    missing = sorted(map(key_map.older_layout, wanted) if in_old_layout else wanted)
    _report_mismatch(directory, missing, left_over, misshapen)
    for native, whole in key_map.join_rows(rows).items():
        _assign(model, native, whole)
    model.tie_head()
    for buffer_owner in model.modules():  # buffers outside the state dict (rotary frequencies) were made on the CPU
        for name in buffer_owner._non_persistent_buffers_set:
            buffer_owner._buffers[name] = buffer_owner._buffers[name].to(device)


def published_state(model: Sa2VA) -> dict[str, Tensor]:
    """All weights under their published names and in their published shapes; a tied head is absent."""
    state = dict(model.state_dict())
    if model.tied_head:
        state.pop(model.tied_head, None)
    return key_map.to_published(state, internlm2.heads_of(model.decoder.config))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, all there; else a UserError says which is missing."""
    index = directory / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not weight_map:
            raise UserError(f"{index}: has no weight_map; copy the file from the published model again")
        names = sorted(set(weight_map.values()))
        absent = [name for name in names if not (directory / name).is_file()]
        if absent:
            raise UserError(f"{index}: names shards that are not there: {', '.join(absent)}; download them")
        return [directory / name for name in names]
    if (directory / FILE).is_file():
        return [directory / FILE]
    raise UserError(f"{directory}: no {FILE} and no {INDEX}; weights are read from safetensors only")


def _assign(model: Sa2VA, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)


def _report_mismatch(directory: Path, missing: list[str], left_over: list[str], misshapen: list[str]) -> None:
    lines = [f"{len(missing)} missing ({_some(missing)})"] if missing else []
    lines += [f"{len(left_over)} left over ({_some(left_over)})"] if left_over else []
    lines += [f"{len(misshapen)} of another shape ({_some(misshapen)})"] if misshapen else []
    if lines:
        raise UserError(f"{directory}: the weights do not fit config.json: {'; '.join(lines)}; check the download")


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
