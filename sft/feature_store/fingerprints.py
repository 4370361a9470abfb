"""Fingerprints: short texts that change when weights, a file's bytes or settings do. Keys of entries are made of them.

Weights are hashed where they lie, GPU or CPU, with the same result: 1 GB takes 0.6 s of a CPU core, and nothing but one
number per tensor leaves a GPU.

Why `weights_fingerprint` notices a single changed bit: a tensor's bytes are cut into 64-bit lanes; each lane, after its
position times an odd constant is added, goes through splitmix64's finalizer (Steele, Lea, Flood 2014), which is a
bijection; the results are added modulo 2**64. A change inside one lane changes one summand, so the sum. Changes of
several lanes meet again with a chance of about 2**-64. A sum of lanes times odd numbers would not do: flipping the top
bits of any two lanes leaves it as it was. It is no protection against somebody who wants two models to collide.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DIGEST_BYTES = 16
LANE_BYTES = 8
CPU_CHUNK_LANES = 2**15  # fits a core's cache; torch divides more than that among threads, which wait for each other
GPU_CHUNK_LANES = 2**24  # 128 MiB, three of them at once


def entry_key(*parts: str | int) -> str:
    """One key of several parts, e.g. an image's fingerprint and its view: 32 hexadecimal digits."""
    return _digest(json.dumps(parts).encode())


def settings_fingerprint(settings: Mapping[str, Any]) -> str:
    """Of values that JSON can hold, whatever their order.

    Raises:
        TypeError, ValueError: a value that JSON cannot hold, or a number that is not finite.
    """
    return _digest(json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def file_fingerprint(path: Path) -> str:
    """Of a file's bytes, wherever it lies and whatever it is called; about 1.3 GB/s, and other threads go on."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).hexdigest()


@torch.no_grad()
def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Of the weights as they are now: names, data types, shapes and every bit.

    Args:
        weights: e.g. a module's `state_dict()`; whole tensors on any device.

    Raises:
        ValueError: a tensor without data (on the meta device).
    """
    empty = [name for name, tensor in weights.items() if tensor.is_meta]
    if empty:
        raise ValueError(f"{empty[0]} is on the meta device: load the weights before taking their fingerprint")
    names = sorted(weights)
    about = [(name, str(weights[name].dtype), list(weights[name].shape)) for name in names]
    sums: dict[torch.device, list[Tensor]] = {}
    for name in names:
        sums.setdefault(weights[name].device, []).append(_mixed_sum(weights[name]))
    # One copy per device, after all of its work is queued.
    on_host = {device: iter(torch.stack(parts).tolist()) for device, parts in sums.items()}
    values = [next(on_host[weights[name].device]) for name in names]
    return _digest(json.dumps([about, values]).encode())


def _mixed_sum(tensor: Tensor) -> Tensor:
    """The sum modulo 2**64 of a tensor's mixed lanes, int64 without dimensions, on the tensor's device."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = len(data) // LANE_BYTES * LANE_BYTES
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for part, first_lane in ((data[:whole], 0), (data[whole:], whole // LANE_BYTES)):
        if len(part) == 0:
            continue
        if len(part) % LANE_BYTES:
            part = torch.nn.functional.pad(part, (0, LANE_BYTES - len(part)))  # shape and type say how long it was
        if part.storage_offset() % LANE_BYTES:
            part = part.clone()
        lanes = part.view(torch.int64)
        chunk = CPU_CHUNK_LANES if lanes.device.type == "cpu" else GPU_CHUNK_LANES
        for start in range(0, len(lanes), chunk):
            total += _mixed(lanes[start : start + chunk], first_lane + start).sum()
    return total


def _mixed(lanes: Tensor, position: int) -> Tensor:
    """splitmix64 of each lane and its position; int64 arithmetic wraps, and >> repeats the sign, hence the masks."""
    mixed = torch.arange(position, position + len(lanes), device=lanes.device)
    mixed.mul_(_signed(0x9E3779B97F4A7C15)).add_(lanes)
    shifted = torch.empty_like(mixed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        torch.bitwise_right_shift(mixed, shift, out=shifted)
        mixed.bitwise_xor_(shifted.bitwise_and_((1 << (64 - shift)) - 1)).mul_(_signed(factor))
    return mixed


def _signed(value: int) -> int:
    """An unsigned 64-bit number as the int64 of the same bits."""
    return value - 2**64 if value >= 2**63 else value


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()
