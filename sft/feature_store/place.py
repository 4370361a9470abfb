"""Which place features are kept in: decided from their size and what is free, and said in a sentence.

Takes sizes, gives a decision; it builds no store. With several ranks, one decides for all, from the least free memory
among them. GPU memory is counted per rank, host memory once per rank of this machine, the disk once.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from sft.feature_store.memory import held_bytes
from sft.settings import UserError

PLACES = ("auto", "gpu", "host", "disk", "off")
SHARE = {"gpu": 0.95, "host": 0.8, "disk": 0.9}  # of what is free: the most that may be taken
GIB = 2**30


@dataclass(frozen=True)
class Demand:
    """What is to be kept."""

    entry_bytes: int
    """Of the largest entry."""
    images: int
    views: int = 1
    """Turned and mirrored versions of each image, at most."""
    ranks: int = 1
    """Processes on this machine that each keep everything, where memory is not shared."""
    on_disk: int = 0
    """Entries that the disk store holds already."""
    entries: int | None = None
    """Of them all, where not every image is kept in every view."""
    pins: bool = False
    """Whether host memory is pinned."""


@dataclass(frozen=True)
class Room:
    """Free bytes."""

    gpu: int
    """Of the GPU with the least; 0 without one."""
    host: int
    disk: int


@dataclass(frozen=True)
class Place:
    """The decision."""

    name: str
    """gpu, host, disk or off."""
    on_disk: bool
    """Whether a disk store stands behind it, for the other ranks, trials and runs."""
    sentence: str
    """What was chosen and why, for the log."""


def choose(wanted: str, demand: Demand, room: Room, reserve_bytes: int, share_on_disk: bool = True) -> Place:
    """Decides where features are kept.

    Args:
        wanted: one of PLACES; auto takes the first of gpu, host and disk that has room for all, else off.
        demand: what is to be kept.
        room: what is free.
        reserve_bytes: of GPU memory that the step will take and does not hold yet.
        share_on_disk: whether a place in memory may have a disk store behind it; it has one if the disk has room.

    Raises:
        UserError: the wanted place has no room; names those that have.
        ValueError: no such place.
    """
    if wanted not in PLACES:
        raise ValueError(f"{wanted} is no place for features: one of {', '.join(PLACES)}")
    if wanted == "off":
        return Place("off", False, "Frozen features: computed anew in every step (off)")
    entries = demand.images * demand.views if demand.entries is None else demand.entries
    one, new = demand.entry_bytes * entries, demand.entry_bytes * max(0, entries - demand.on_disk)
    on_host = held_bytes(entries, demand.entry_bytes, pinned=True) if demand.pins else one
    needed = {"gpu": held_bytes(entries, demand.entry_bytes), "host": on_host * demand.ranks, "disk": new}
    free = {"gpu": max(0, room.gpu - reserve_bytes), "host": room.host, "disk": room.disk}
    fits = {place: needed[place] <= SHARE[place] * free[place] for place in needed}
    on_disk = share_on_disk and fits["disk"]
    images = f"{demand.images:,} images"
    what = f"{one / GIB:.1f} GiB for " + (f"{entries:,} views of {images}" if demand.views > 1 else images)
    why = {place: _room_in_words(place, needed[place], free[place], demand, room, reserve_bytes) for place in needed}
    behind = ", and on the disk for other ranks and runs" if on_disk else ", not on the disk"
    if wanted == "auto":
        chosen = next((place for place, enough in fits.items() if enough), "off")
        refused = [why[place] for place in list(fits)[: [*fits, "off"].index(chosen)]]
    elif fits[wanted]:
        chosen, refused = wanted, []
    else:
        others = ", ".join([f"--feature_cache {place}" for place, enough in fits.items() if enough] or ["off"])
        fewer = " or --augment false" if demand.views > 1 else ""
        raise UserError(f"feature_cache {wanted}: features take {what}; {why[wanted]}; use {others}{fewer}")
    if chosen == "off":
        text = f"Frozen features: computed anew in every step, no room for {what}; "
        return Place("off", False, text + "; ".join(refused))
    words = {"gpu": "in GPU memory", "host": "in host memory", "disk": "on the disk"}[chosen]
    text = f"Frozen features: computed once and kept {words}{behind if chosen != 'disk' else ''}, {what}; "
    return Place(chosen, on_disk or chosen == "disk", text + "; ".join([*refused, why[chosen]]))


def free_gpu_bytes(device: torch.device) -> int:
    """Free memory of a CUDA device, with what torch holds of it and does not use; 0 for any other device.

    Where this process may only take a share of the device (`torch.cuda.set_per_process_memory_fraction`), of its share.
    """
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    share = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(free + reserved, share) - allocated


def free_disk_bytes(root: Path) -> int:
    """Free bytes of the file system that a folder lies on, or will; 0 where nothing may be written."""
    there = next(folder for folder in (Path(root).absolute(), *Path(root).absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free if os.access(there, os.W_OK | os.X_OK) else 0


def free_host_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Free memory of the machine, or of the container or batch job (cgroup v2) that this process is limited to."""
    lines = (proc / "meminfo").read_text().splitlines()
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    membership = proc / "self" / "cgroup"
    own = re.search(r"^0::/(.*)", membership.read_text(), re.MULTILINE) if membership.exists() else None
    inner = groups / (own[1] if own else "")
    for group in (inner, *inner.parents):
        limit = group / "memory.max"
        if limit.is_file() and (most := limit.read_text().strip()) != "max":
            cache = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
            free.append(int(most) - int((group / "memory.current").read_text()) + int(cache[1] if cache else 0))
    return min(free)


def _room_in_words(place: str, needed: int, free: int, demand: Demand, room: Room, reserve: int) -> str:
    """E.g. "gpu: 20.0 GiB needed, 12.0 GiB free after 60.0 GiB for the step"."""
    if place == "gpu" and room.gpu == 0:
        return "gpu: there is none"
    text = f"{place}: {needed / GIB:.1f} GiB needed"
    text += f" by {demand.ranks} ranks" if place == "host" and demand.ranks > 1 else ""
    text += f" beyond {demand.on_disk:,} entries that are there" if place == "disk" and demand.on_disk else ""
    text += f", {free / GIB:.1f} GiB free"
    text += f" after {reserve / GIB:.1f} GiB for the step" if place == "gpu" else ""
    return text
