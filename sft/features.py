"""Batches with the outputs of the frozen encoders, which are computed once per image and view and kept.

Takes pairs (and which flip or turn of them), gives `Batch`es on the device. The doors for the rest of the project are
`Features.choose` and `Features.fill`, before the first step, and `Features.batches`; behind them stand reading, the
encoders and a feature store. Masks and questions belong to pairs and stay in host memory, packed.

Shapes: B samples, H x W pixels.
"""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from sft import engine, feature_fill, feature_store, prefetch
from sft.config import TrainConfig, UserError
from sft.data import Pair, read_image_of, read_mask
from sft.data.views import VIEWS, turned
from sft.encoders import SAM2_PARTS, Encoders, Loaded, sent, vision_of
from sft.feature_fill import Work
from sft.feature_store import Demand, DiskStore, Entry, MemoryStore, NoStore, Place, Room
from sft.model.preprocess import Preprocess
from sft.model.sa2va import Prompt, Sa2VA, Sam2Features, VisionFeatures
from sft.ranks import local_ranks, processors

READ_AHEAD_BATCHES = 2
MOST_READERS = 16
TELL_WAITING_FROM = 0.2  # of the seconds that filling took
GPU_LENGTHS = 32  # tokens: prompts on a GPU are padded to a multiple, since each length is compiled and graphed anew

Found = TypeVar("Found")


@dataclass(frozen=True)
class Item:
    """One sample of a batch: a pair in one of its views, 0 (as it is) to 7."""

    pair: Pair
    view: int = 0

    def __hash__(self) -> int:
        return hash((self.pair.name, self.view))  # not over a pair's polygons, which can be long; names are unique


@dataclass(frozen=True)
class Batch:
    """B samples, ready for `Sa2VA.forward` and the loss."""

    items: tuple[Item, ...]
    prompt: Prompt
    vision: VisionFeatures
    sam2: Sam2Features | Tensor  # features, or input images (B, 3, H, W) where SAM2's encoder trains
    masks: tuple[Tensor, ...]  # B times bool (H, W), each at its native size

    def tensors(self) -> Iterator[Tensor]:
        """All of them."""
        prompt, sam2 = self.prompt, self.sam2
        parts = [getattr(prompt, one.name) for one in fields(prompt)] + [*self.vision]
        parts += [sam2] if isinstance(sam2, Tensor) else [sam2.level0_BCHW, sam2.level1_BCHW, sam2.embedding_BDHW]
        return (part for part in (*parts, *self.masks) if part is not None)


@dataclass(frozen=True)
class _Known:
    """What is told of an image without decoding it."""

    key: str
    size_hw: tuple[int, int]


@dataclass(frozen=True)
class _Prepared:
    """What a thread has ready for one sample."""

    mask_HW: Tensor
    loaded: Loaded | None


class Features:
    """The frozen encoders of one run and where their outputs are kept; nowhere until `choose` was called.

    Args:
        model: the native model on its device; its encoders are used as they stand.
        preprocess: of the same checkpoint.
        config: decides what is kept and what trains.
        device: where batches go.
        sizes_hw: height and width of pairs that have been looked at before, by name; others are looked at here.
    """

    def __init__(
        self,
        model: Sa2VA,
        preprocess: Preprocess,
        config: TrainConfig,
        device: torch.device,
        sizes_hw: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    ):
        self._preprocess, self._config, self._device, self._sizes_hw = preprocess, config, device, sizes_hw
        self._encoders = Encoders(model, preprocess, config, device)
        self._store: DiskStore | MemoryStore | NoStore = NoStore()
        self._known: dict[str, _Known] = {}  # by the pair's name, as the masks
        self._masks: dict[str, tuple[np.ndarray, tuple[int, int]]] = {}
        self._images: dict[str, np.ndarray] = {}  # decoded, where they are needed in every epoch
        self._images_bytes = 0  # what more of them may take
        self._rejected = 0
        self._place: Place | None = None
        self.gpu_bytes = 0  # of GPU memory that kept features take
        self.longest_prompt_tokens = 0  # over all batches so far, image and answer included
        self._readers = ThreadPoolExecutor(_reader_count(config), thread_name_prefix="read")
        self._assembly = torch.cuda.Stream(device) if device.type == "cuda" else None

    def choose(self, items: Sequence[Item], ranks: engine.Ranks, reserve_bytes: int, *, dry: bool = False) -> Place:
        """Decides where features are kept, the same on every rank, and opens that place. Collective.

        Args:
            items: all that the run will ask for, on any rank.
            ranks: who takes part.
            reserve_bytes: of GPU memory that the step will take and does not hold yet.
            dry: decide as for a run, but keep features in host memory alone and leave nothing on the disk.

        Raises:
            UserError: the wanted place has no room, or an image cannot be read; a mask is read when it is needed.
        """
        if self._config.feature_cache == "off":
            self._images_bytes = feature_store.free_host_bytes() // 4 // local_ranks(os.environ)
            self._place = feature_store.choose("off", Demand(0, 0), Room(0, 0, 0), 0)
            return self._place
        self._identify_all(items, ranks)
        root = feature_store.cache_directory(self._config.feature_cache_dir)
        scope, about = engine.gather_objects(self._encoders.scope() if ranks.is_main else None)[0]
        keys = sorted({self._key(item) for item in items})
        on_disk = len(keys) - len(set(keys) - feature_store.keys_in(root, scope))
        room = (feature_store.free_gpu_bytes(self._device), feature_store.free_host_bytes())
        told = (*room, feature_store.free_disk_bytes(root), -reserve_bytes, -local_ranks(os.environ), on_disk)
        *room, reserve, local, on_disk = map(min, zip(*engine.gather_objects(told), strict=True))
        largest = max(self._encoders.entry_bytes(layout) for layout in self._layouts(items))
        images = len({self._known[item.pair.name].key for item in items})
        views = VIEWS if self._config.augment else 1
        pin = self._device.type == "cuda"
        demand = Demand(largest, images, views, -local, on_disk, entries=len(keys), pins=pin)
        self._place = place = feature_store.choose(self._config.feature_cache, demand, Room(*room), -reserve)
        self.gpu_bytes = feature_store.held_bytes(len(keys), largest) if place.name == "gpu" else 0
        about |= {"model_path": self._config.model_path}
        disk = DiskStore(root, scope, about, pin) if place.on_disk and not dry else None
        match place.name:
            case "off":
                self._store = NoStore()
            case "gpu":
                self._store = MemoryStore(self._device, behind=disk)
            case "disk" if disk:
                self._store = disk
            case "host" | "disk":
                self._store = MemoryStore(torch.device("cpu"), pin, behind=disk)
            case _:
                raise ValueError(f"features are kept in gpu, host, disk or off, not in {place.name}")
        return place

    def fill(self, items: Sequence[Item], ranks: engine.Ranks) -> str:
        """Computes what is missing, each rank its share; returns a sentence for the log, if any. Collective.

        What the encoders take together is the same whatever is there already and however many ranks there are.

        Args:
            items: as for `choose`, or some of them.
            ranks: who takes part.
        """
        if isinstance(self._store, NoStore):
            return ""
        works, started_s = self._works(items), time.monotonic()
        groups = feature_fill.grouped(works, self._encoders.sizes.images)
        total = sum(len(work.key_of_view) for work in works)

        def filled(some: Sequence[Sequence[Work]]) -> feature_fill.Filled:
            done = feature_fill.fill(self._store, self._encoders, some, self._load, self._readers, ranks.is_main)
            # The others look for them there next; and where nothing else keeps them, so do the steps.
            if ranks.world_size > 1 or isinstance(self._store, DiskStore):
                self._store.settle()
            return done

        shares, waits = zip(*_on_all_ranks(lambda: filled(groups[ranks.rank :: ranks.world_size])), strict=True)
        # What the others computed and this rank cannot see: there is no disk, not the same, or a full one.
        again = max(_on_all_ranks(lambda: filled(groups).entries))
        for pair in {item.pair.name: item.pair for item in items}.values():  # the steps need their masks soon
            self._readers.submit(self._mask, pair)
        seconds, computed = time.monotonic() - started_s, sum(shares) or again
        text = f"Frozen features: {computed:,} of {total:,} computed in {seconds:.1f} s"
        text += f", {computed / seconds:.0f} images/s" if computed else ""
        if max(waits) > TELL_WAITING_FROM * seconds and self._device.type == "cuda":
            hint = "" if self._config.num_workers == "auto" else ": a higher num_workers, or auto, reads faster"
            text += f" ({max(waits):.1f} s of them waiting for images{hint})"
        text += "; the rest was there" if 0 < computed < total else ""
        images = "; SAM2's encoder trains, so it is not among them: its input images are kept"
        return text + images * self._encoders.sam2_trains + self._rest()

    def batches(self, plan: Sequence[Sequence[Item]]) -> Iterator[Batch]:
        """Yields one Batch per entry of the plan, in its order; on a GPU the next is put together meanwhile."""
        encodes = isinstance(self._store, NoStore)  # with the model that trains: not beside it
        return prefetch.prefetched(self._batches(plan), None if encodes else self._assembly)

    def rejected(self) -> list[str]:
        """Lines on entries that were damaged or could not be written, since the last call."""
        lines = self._store.rejected[self._rejected :]
        self._rejected += len(lines)
        return list(lines)

    def blank(self, size_hw: tuple[int, int], count: int) -> Batch:
        """A batch of black images of one size (pixels), read nowhere and kept nowhere: to try what a step takes."""
        loaded = self._encoders.load([np.zeros((*size_hw, 3), np.uint8)])
        item = Item(Pair("black", Path()))
        prepared = {item: _Prepared(torch.zeros(size_hw, dtype=torch.bool), None)}
        return self._collate((item,) * count, prepared, self._encoders.encode([loaded]) * count)

    def set_encoders_aside(self) -> None:
        """See `Encoders.set_aside`."""
        self._encoders.set_aside()

    def flush(self) -> None:
        """Returns once what was computed is where other processes find it; raises a UserError if the disk is full."""
        self._store.flush()

    def close(self, at_most_s: float | None = None) -> None:
        """Writes what is waiting, for so many seconds at most, and stops the threads."""
        self._readers.shutdown(cancel_futures=True)
        self._store.close(at_most_s)

    def _batches(self, plan: Sequence[Sequence[Item]]) -> Generator[Batch]:
        """The batches of a plan; what the next ones need is read meanwhile."""
        off = isinstance(self._store, NoStore)
        coming: deque[dict[Item, Future[_Prepared]]] = deque()  # of images that are encoded in each batch
        with contextlib.closing(_nothing(plan) if off else self._kept(plan)) as kept:
            for position, (items, entries) in enumerate(zip(plan, kept, strict=True)):
                if off:
                    for later in plan[position + len(coming) : position + 1 + READ_AHEAD_BATCHES]:
                        coming.append({item: self._readers.submit(self._prepare, item, True) for item in set(later)})
                    prepared = {item: future.result() for item, future in coming.popleft().items()}
                else:
                    prepared = {item: self._prepare(item, False) for item in set(items)}
                found = dict(zip(items, entries, strict=True))
                self._complete(found, prepared)
                yield self._collate(tuple(items), prepared, [found[item] for item in items])

    def _identify_all(self, items: Sequence[Item], ranks: engine.Ranks) -> None:
        """Each rank looks at its share of the files, all know what was found."""
        pairs = sorted({item.pair.name: item.pair for item in items}.values(), key=lambda pair: pair.name)
        mine = pairs[ranks.rank :: ranks.world_size]
        names = [pair.name for pair in mine]
        for found in _on_all_ranks(lambda: dict(zip(names, self._readers.map(self._identify, mine), strict=True))):
            self._known |= found

    def _identify(self, pair: Pair) -> _Known:
        size_hw = self._sizes_hw.get(pair.name) or self._mask(pair).shape
        try:
            fingerprint = feature_store.file_fingerprint(pair.image)
            self._preprocess.image_layout(*size_hw)
        except OSError as error:
            raise UserError(f"{pair.image}: {error.strerror}; look at data_root again") from None
        except UserError as error:
            raise UserError(f"{pair.image}: {error}") from None
        # An image is turned like its mask where only the one or the other way fits.
        like = (*size_hw,) if pair.mask else ("polygons",)
        return _Known(feature_store.entry_key(fingerprint, *like), size_hw)

    def _key(self, item: Item) -> str:
        if item.pair.name not in self._known:
            self._known[item.pair.name] = self._identify(item.pair)
        return feature_store.entry_key(self._known[item.pair.name].key, item.view)

    def _layouts(self, items: Sequence[Item]) -> set[tuple[int, int, int]]:
        sizes = {self._known[item.pair.name].size_hw[:: -1 if item.view % 2 else 1] for item in items}
        return {self._preprocess.image_layout(*size_hw) for size_hw in sizes}

    def _works(self, items: Sequence[Item]) -> list[Work[Pair]]:
        """All images with their views, by name; several pairs of one image are one."""
        works: dict[str, Work[Pair]] = {}
        for item in sorted(items, key=lambda item: (item.pair.name, item.view)):
            work = works.setdefault(self._known[item.pair.name].key, Work(item.pair, {}))
            work.key_of_view[item.view] = self._key(item)
        return list(works.values())

    def _rest(self) -> str:
        """Frees the encoders' GPU memory where features lie elsewhere: a damaged entry fetches them back."""
        if self._device.type != "cuda" or self._place.name == "gpu":
            return ""
        return f"; the encoders rest in host memory, {self._encoders.rest() / 2**30:.1f} GiB"

    def _mask(self, pair: Pair) -> np.ndarray:
        """bool (H, W); read once."""
        if pair.name not in self._masks:
            mask_HW = read_mask(pair)
            self._masks[pair.name] = np.packbits(mask_HW), mask_HW.shape
        bits, (height, width) = self._masks[pair.name]
        return np.unpackbits(bits, count=height * width).view(bool).reshape(height, width)

    def _load(self, pair: Pair, views: Sequence[int]) -> Loaded:
        if (image_HW3 := self._images.get(pair.name)) is None:
            image_HW3 = read_image_of(pair, self._mask(pair))
            if image_HW3.nbytes <= self._images_bytes:
                self._images[pair.name], self._images_bytes = image_HW3, self._images_bytes - image_HW3.nbytes
        try:
            return self._encoders.load([turned(image_HW3, view) for view in views])
        except UserError as error:  # of a shape that the vision encoder does not take
            raise UserError(f"{pair.image}: {error}") from None

    def _prepare(self, item: Item, with_image: bool) -> _Prepared:
        mask_HW = torch.from_numpy(turned(self._mask(item.pair), item.view))
        return _Prepared(mask_HW, self._load(item.pair, [item.view]) if with_image else None)

    def _kept(self, plan: Sequence[Sequence[Item]]) -> Iterator[list[Entry | None]]:
        keys = [[self._key(item) for item in items] for items in plan]
        return feature_store.read_ahead(self._store, keys, self._device)

    def _read(self, item: Item) -> Entry | None:
        (((entry,),)) = feature_store.read_ahead(self._store, [[self._key(item)]], self._device)
        return entry

    def _complete(self, found: dict[Item, Entry | None], prepared: dict[Item, _Prepared]) -> None:
        """Computes what no store had: all of it, or what is damaged or gone."""
        missing = [item for item, entry in found.items() if entry is None]
        if not isinstance(self._store, NoStore):  # a batch before this one may have computed it since
            found |= {item: entry for item in missing if (entry := self._read(item)) is not None}
            missing = [item for item in missing if found[item] is None]
        if not missing:
            return
        loaded = [prepared[item].loaded or self._load(item.pair, [item.view]) for item in missing]
        for item, entry in zip(missing, self._encoders.encode(loaded), strict=True):
            found[item] = entry
            if not isinstance(self._store, NoStore):
                self._store.put(self._key(item), entry)

    def _collate(self, items: tuple[Item, ...], prepared: dict[Item, _Prepared], entries: list[Entry]) -> Batch:
        masks = [prepared[item].mask_HW for item in items]
        prompt = self._preprocess.prompt(
            [self._question(item.pair) for item in items],
            [self._preprocess.image_layout(*mask_HW.shape) for mask_HW in masks],
            with_labels=self._config.text_weight > 0,
            multiple_of=GPU_LENGTHS if self._device.type == "cuda" else 1,
        )
        self.longest_prompt_tokens = max(self.longest_prompt_tokens, prompt.input_ids_BL.shape[1])
        if self._encoders.sam2_trains:
            images = _stacked([entry["image"] for entry in entries])
            sam2 = self._preprocess.normalise_sam2(images, self._encoders.dtype)
        else:
            parts = (_stacked([entry[name] for entry in entries]) for name in SAM2_PARTS)
            sam2 = Sam2Features(*parts, projected=self._encoders.project)
        return Batch(items, prompt.to(self._device), vision_of(entries), sam2, self._moved(masks))

    def _moved(self, masks: list[Tensor]) -> tuple[Tensor, ...]:
        """Masks on the device; those of one size in one copy."""
        if self._device.type != "cuda":
            return tuple(masks)
        if len({mask_HW.shape for mask_HW in masks}) == 1:
            return tuple(sent(torch.stack(masks), self._device))
        return tuple(sent(mask_HW, self._device) for mask_HW in masks)

    def _question(self, pair: Pair) -> str:
        return f"Please segment {pair.phrase} in this image." if pair.phrase else self._config.question


def _reader_count(config: TrainConfig) -> int:
    """How many threads read images; they are started as they are needed."""
    if config.num_workers != "auto":
        return max(1, config.num_workers)
    return max(1, min(MOST_READERS, processors() // local_ranks(os.environ)))


def _stacked(parts: list[Tensor]) -> Tensor:
    """One above the other; a single one is not copied."""
    return torch.stack(parts) if len(parts) > 1 else parts[0][None]


def _nothing(plan: Sequence[Sequence[Item]]) -> Iterator[list[None]]:
    """What no store has."""
    for items in plan:
        yield [None] * len(items)


def _on_all_ranks(function: Callable[[], Found]) -> list[Found]:
    """What every rank finds, or the first user's mistake of any, raised on all: none waits for one that failed."""
    found, failure = None, None
    try:
        found = function()
    except UserError as error:
        failure = error
    told = engine.gather_objects((found, failure))
    for _, failure in told:
        if failure is not None:
            raise failure
    return [found for found, _ in told]
