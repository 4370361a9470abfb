"""Batches with the outputs of the frozen encoders, which are computed once per run, image and view.

Takes pairs (and which flip or turn of them), gives `Batch`es on the device. The one door for the rest of the project is
`Features.batches`; behind it stand reading, preprocessing, the encoders and the memory that keeps their outputs.
Vision tokens depend on the image alone, SAM2's features too unless its encoder trains: then its input image is kept.

Shapes: B samples, H x W pixels.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sft.config import TrainConfig, UserError
from sft.data import Pair, read
from sft.model.preprocess import Preprocess
from sft.model.sa2va import Layout, Prompt, Sa2VA, Sam2Features, VisionFeatures, VisionInput

VIEWS = 8  # the image as it is, its mirror image, and their quarter turns
READ_AHEAD_BATCHES = 2
MEMORY_SHARE = 0.8  # of the memory that is free: what kept features may take


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


@dataclass(frozen=True)
class _Inputs:
    """What is read from the disk for one item."""

    vision: VisionInput
    sam2_image_3HW: Tensor
    mask_HW: Tensor
    question: str


@dataclass(frozen=True)
class _Encoded:
    """What is kept of one item: no gradient ever reaches it."""

    vision: VisionFeatures
    layout: Layout
    sam2: tuple[Tensor, ...]  # level0, level1, embedding, each without the batch dimension; or the one input image
    mask_HW: Tensor
    question: str

    def bytes(self) -> int:
        return self.vision.nbytes + sum(tensor.nbytes for tensor in (*self.sam2, self.mask_HW))


class Features:
    """The frozen encoders of one run and the memory of their outputs.

    Args:
        model: the native model on its device; its encoders are used as they stand.
        preprocess: of the same checkpoint.
        config: decides what is kept and what trains.
        device: where batches go.
    """

    def __init__(self, model: Sa2VA, preprocess: Preprocess, config: TrainConfig, device: torch.device):
        self._model, self._preprocess, self._config, self._device = model, preprocess, config, device
        self._dtype = next(model.parameters()).dtype
        self._encoder_trains = "sam2_encoder" in config.lora_scope
        # conv_s0 and conv_s1 belong to the mask decoder: while it trains, features are kept before them.
        self._project = "mask_decoder" not in config.train_modules
        self._kept: dict[Item, _Encoded] = {}
        self.longest_prompt_tokens = 0  # over all batches so far, image and answer included
        self._readers = ThreadPoolExecutor(max(1, config.num_workers), thread_name_prefix="read")

    def batches(self, plan: Sequence[Sequence[Item]]) -> Iterator[Batch]:
        """Yields one Batch per entry of the plan, in its order; files of the next ones are read meanwhile."""
        reading: dict[Item, Future] = {}
        for position, items in enumerate(plan):
            for item in itertools.chain(*plan[position : position + 1 + READ_AHEAD_BATCHES]):
                if item not in self._kept and item not in reading:
                    reading[item] = self._readers.submit(self._read, item)
            missing = [item for item in dict.fromkeys(items) if item in reading]
            encoded = {item: self._encode(reading.pop(item).result()) for item in missing}
            if self._config.feature_cache == "memory":
                self._kept |= encoded
            yield self._collate([encoded.get(item) or self._kept[item] for item in items], tuple(items))

    def check_memory(self, train: int, val: int, ranks: int) -> str:
        """Says what keeping the features will take; refuses what the machine's memory cannot hold.

        Args:
            train: training images. Every rank sees all of them in the course of the epochs, and keeps them.
            val: validation images. Each rank keeps its share.
            ranks: ranks on this machine.

        Raises:
            UserError: too little memory is free. Call after a first batch, which shows what an image takes.
        """
        if self._config.feature_cache == "off":
            return "Frozen features: computed anew in every step (--feature_cache off)"
        one = max(encoded.bytes() for encoded in self._kept.values())
        views = VIEWS if self._config.augment else 1
        need, free = one * (train * views * ranks + val), _free_memory_bytes()
        text = f"{need / 2**30:.1f} GiB for {train + val:,} images" + (f" in {views} views" if views > 1 else "")
        text += f" on {ranks} ranks" if ranks > 1 else ""
        if need > MEMORY_SHARE * free:
            raise UserError(
                f"feature_cache memory: keeping frozen features takes {text}, {free / 2**30:.1f} GiB of memory is "
                "free; use --feature_cache off" + (", or --augment false" if views > 1 else "")
            )
        return f"Frozen features: computed once and kept in memory, {text}"

    def set_encoders_aside(self) -> None:
        """Takes the frozen encoders out of the model's parameters; they still answer to their names. For ZeRO-3.

        It keeps slices of all parameters of a model and makes them whole inside the engine's forward alone. But the
        encoders run outside of it, and on some ranks only: they have to stay whole on every rank.
        """
        sam2, parts = self._model.sam2, []
        for path in self._model.vision_paths:
            owner, _, name = path.rpartition(".")
            parts.append((self._model.get_submodule(owner), name))
        if not self._encoder_trains:
            parts += [(sam2, "vision_encoder"), (sam2, "no_memory_embedding")]
            parts += [(sam2.mask_decoder, name) for name in ("conv_s0", "conv_s1") if self._project]
        for owner, name in parts:
            part = getattr(owner, name)
            delattr(owner, name)
            object.__setattr__(owner, name, part)  # torch's own would register it again

    def close(self) -> None:
        """Stops the reading threads."""
        self._readers.shutdown(cancel_futures=True)

    def _read(self, item: Item) -> _Inputs:
        sample = read(item.pair)
        image, mask = turned(sample.image_HW3, item.view), turned(sample.mask_HW, item.view)
        question = f"Please segment {sample.phrase} in this image." if sample.phrase else self._config.question
        try:
            vision = self._preprocess.vision_input(image)
        except UserError as error:  # of a shape that the vision encoder does not take
            raise UserError(f"{item.pair.image}: {error}") from None
        return _Inputs(vision, self._preprocess.sam2_image(image), torch.from_numpy(mask), question)

    @torch.no_grad()
    def _encode(self, inputs: _Inputs) -> _Encoded:
        image = inputs.sam2_image_3HW.to(self._device, self._dtype)
        vision = self._model.vision_features(inputs.vision.to(self._device, self._dtype))
        if self._encoder_trains:
            kept = (image,)
        else:
            features = self._model.sam2_features(image[None], project=self._project)
            kept = (features.level0_BCHW[0], features.level1_BCHW[0], features.embedding_BDHW[0])
        # Kept in the machine's memory: GPU memory is for the step.
        sam2 = tuple(part.cpu() for part in kept)
        return _Encoded(vision.to("cpu"), inputs.vision.layout, sam2, inputs.mask_HW, inputs.question)

    def _collate(self, encoded: list[_Encoded], items: tuple[Item, ...]) -> Batch:
        def together(parts: list[Tensor]) -> Tensor:
            return torch.stack(parts).to(self._device, non_blocking=True)

        prompt = self._preprocess.prompt(
            [one.question for one in encoded],
            [one.layout for one in encoded],
            with_labels=self._config.text_weight > 0,
        )
        self.longest_prompt_tokens = max(self.longest_prompt_tokens, prompt.input_ids_BL.shape[1])
        sam2 = [together(list(parts)) for parts in zip(*(one.sam2 for one in encoded), strict=True)]
        return Batch(
            items,
            prompt.to(self._device),
            VisionFeatures.join([one.vision for one in encoded]).to(self._device, non_blocking=True),
            sam2[0] if self._encoder_trains else Sam2Features(*sam2, projected=self._project),
            tuple(one.mask_HW.to(self._device, non_blocking=True) for one in encoded),
        )


def turned(pixels_HWx: np.ndarray, view: int) -> np.ndarray:
    """An image or mask in one of its 8 views: `view % 4` quarter turns, after mirroring from 4 on."""
    mirrored = pixels_HWx[:, ::-1] if view >= 4 else pixels_HWx
    return np.ascontiguousarray(np.rot90(mirrored, view % 4))


def _free_memory_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
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
