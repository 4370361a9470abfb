"""The frozen encoders of a run: from an image's pixels to the entry of a feature store, many images at a time.

Takes RGB images, gives entries: named tensors without a batch dimension. Vision tokens depend on the image alone,
SAM2's features too unless its encoder trains: then its input image is kept, as uint8. It does not know masks, pairs,
stores or ranks.

Shapes: B images, H x W pixels, N vision tokens, C language model width, K deepstack levels.
"""

import contextlib
import dataclasses
import inspect
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sft import feature_store, replay
from sft.config import TrainConfig
from sft.data import read_image_of
from sft.data.views import turned
from sft.feature_store import Entry
from sft.model import hiera
from sft.model.preprocess import Preprocess
from sft.model.sa2va import Layout, Sa2VA, VisionFeatures, VisionInput

SAM2_PARTS = ("level0", "level1", "embedding")
WORTH_RECORDING = 8  # calls of `encode`
WORDS = {"tokenizer", "template", "chat_template"}  # of a Preprocess: they reach no encoder


@dataclass(frozen=True)
class Sizes:
    """How much the encoders take at once."""

    images: int
    """Of one `encode`, about."""
    sam2_images: int
    vision_tokens: int


# On a CPU more at once is no faster; and one by one, an image's features do not depend on its neighbours.
SIZES = {"cuda": Sizes(16, 8, 8192), "cpu": Sizes(1, 1, 1)}


@dataclass(frozen=True)
class Pixels:
    """One image for both encoders, as uint8: three bytes a pixel on the way to the device."""

    vision: VisionInput
    sam2_3HW: Tensor


@dataclass(frozen=True)
class Loaded:
    """Images on the device, and the event after which they are there."""

    pixels: tuple[Pixels, ...]
    there: torch.cuda.Event | None


class Encoders:
    """The encoders of one model, used as they stand, and where they lie.

    Args:
        model: the native model on its device.
        preprocess: of the same checkpoint.
        config: decides what trains, so what is frozen.
        device: where images go and entries come out.
    """

    def __init__(self, model: Sa2VA, preprocess: Preprocess, config: TrainConfig, device: torch.device):
        self.model, self.preprocess, self.device = model, preprocess, device
        self.dtype = next(model.parameters()).dtype
        self.sam2_trains = "sam2_encoder" in config.lora_scope
        # conv_s0 and conv_s1 belong to the mask decoder: while it trains, features are kept before them.
        self.project = "mask_decoder" not in config.train_modules
        self.sizes = SIZES[device.type]
        self.resting = False
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._sam2_parts = replay.Replayed(self._sam2_parts_of)

    def load(self, images: Sequence[np.ndarray]) -> Loaded:
        """RGB uint8 images, resized and on the way to the device. For threads: nobody else waits for it."""
        pixels = tuple(
            Pixels(self.preprocess.vision_pixels(image), self.preprocess.sam2_pixels(image)) for image in images
        )
        if self._copies is None:
            return Loaded(pixels, None)
        with torch.cuda.stream(self._copies):
            return Loaded(tuple(map(self._moved, pixels)), self._copies.record_event())

    @torch.no_grad()
    def encode(self, loaded: Sequence[Loaded]) -> list[Entry]:
        """Entries of all images, in their order; on a GPU the work is queued, not done."""
        try:
            return self._encoded(loaded)
        except torch.OutOfMemoryError:
            if not self.forget():  # a recording keeps its memory from the vision encoder
                raise
        return self._encoded(loaded)

    def _encoded(self, loaded: Sequence[Loaded]) -> list[Entry]:
        pixels = [one for several in loaded for one in self._received(several)]
        with self._awake():
            entries: list[Entry] = []
            for group in self._vision_groups(pixels):
                inputs = [self.preprocess.normalise_vision(one.vision, self.dtype) for one in group]
                entries += [_vision_entry(features) for features in self.model.vision_features_of(inputs)]
            if self.sam2_trains:
                return [entry | {"image": one.sam2_3HW} for entry, one in zip(entries, pixels, strict=True)]
            size = self.sizes.sam2_images
            for start in range(0, len(pixels), size):
                images = torch.stack([one.sam2_3HW for one in pixels[start : start + size]])
                # Remainders have many sizes, and each recording would hold memory of its own.
                parts_of = self._sam2_parts if len(images) == size else self._sam2_parts_of
                of_each = zip(*parts_of(images), strict=True)
                for entry, parts in zip(entries[start : start + size], of_each, strict=True):
                    entry |= dict(zip(SAM2_PARTS, parts, strict=True))
        return entries

    def many(self, calls: int) -> contextlib.AbstractContextManager[None]:
        """Around so many calls of `encode`: on a GPU, SAM2's encoder is recorded as a CUDA graph if that pays."""
        stays = self.device.type == "cuda" and not self.resting  # a graph reads weights where they were
        return self._sam2_parts.recording(stays and calls >= WORTH_RECORDING)

    def forget(self) -> bool:
        """Records no more and gives the memory of recordings back; whether there were any."""
        return self._sam2_parts.forget()

    def entry_bytes(self, layout: Layout) -> int:
        """Size of the entry of an image with so many vision tokens."""
        value, sam2 = self.dtype.itemsize, self.model.sam2
        tokens = math.prod(layout) * self.model.decoder.config.hidden_size * value * (1 + self.model.deepstack_levels)
        if self.sam2_trains:
            return tokens + 3 * self.preprocess.sam2_px**2
        vision, convolutions = sam2.config.vision_config, (sam2.mask_decoder.conv_s0, sam2.mask_decoder.conv_s1)
        widths = [one.out_channels for one in convolutions] if self.project else [vision.fpn_hidden_size] * 2
        widths.append(vision.fpn_hidden_size)
        areas = [high * wide for high, wide in vision.backbone_feature_sizes]
        return tokens + value * sum(width * area for width, area in zip(widths, areas, strict=True))

    def scope(self) -> tuple[str, dict]:
        """What all entries have in common: a name that changes when it does, and words on it for people."""
        weights = {
            f"{name}.{key}": tensor
            for name, part in self._frozen().items()
            for key, tensor in (part.state_dict() if isinstance(part, nn.Module) else {"": part}).items()
        }
        settings = {
            "code": {file.name: feature_store.file_fingerprint(file) for file in self._code()},
            "preprocess": {name: str(getattr(self.preprocess, name)) for name in self._preprocess_settings()},
            "configurations": self._configurations(),
            "dtype": str(self.dtype),
            "device": self.device.type,  # of rounding
            "versions": {name: version(name) for name in ("torch", "transformers", "pillow")},
            "project": self.project,
            "sam2_trains": self.sam2_trains,
        }
        fingerprints = feature_store.weights_fingerprint(weights), feature_store.settings_fingerprint(settings)
        return feature_store.entry_key(*fingerprints)[:16], {"dtype": str(self.dtype), "settings": settings}

    def set_aside(self) -> None:
        """Takes the frozen encoders out of the model's parameters; they still answer to their names. For ZeRO-3.

        It keeps slices of all parameters of a model and makes them whole inside the engine's forward alone. But the
        encoders run outside of it, and on some ranks only: they have to stay whole on every rank.
        """
        for path, part in self._frozen().items():
            owner_path, _, name = path.rpartition(".")
            owner = self.model.get_submodule(owner_path)
            delattr(owner, name)
            object.__setattr__(owner, name, part)  # torch's own would register it again

    def rest(self) -> int:
        """Moves the frozen encoders to host memory until somebody encodes; returns the bytes that are free for it."""
        self.resting = True
        return self._move("cpu")

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        if self.resting:
            self._move(self.device)
        try:
            yield
        finally:
            if self.resting:
                self._move("cpu")

    def _move(self, device: torch.device | str) -> int:
        parts = [part for part in self._frozen().values() if isinstance(part, nn.Module)]
        for part in parts:
            part.to(device)
        return sum(tensor.nbytes for part in parts for tensor in part.parameters())

    def _frozen(self) -> dict[str, nn.Module | Tensor]:
        """Path -> module or parameter: what an entry depends on."""
        paths = list(self.model.vision_paths)
        if not self.sam2_trains:
            sam2 = "grounding_encoder.sam2_model"
            paths += [f"{sam2}.vision_encoder", f"{sam2}.no_memory_embedding"]
            paths += [f"{sam2}.mask_decoder.{name}" for name in ("conv_s0", "conv_s1") if self.project]
        found = {}
        for path in paths:
            owner, _, name = path.rpartition(".")
            found[path] = getattr(self.model.get_submodule(owner), name)
        return found

    def _preprocess_settings(self) -> list[str]:
        """Fields, not all that the object holds: it remembers what it was asked."""
        return [one.name for one in dataclasses.fields(self.preprocess) if one.init and one.name not in WORDS]

    def _code(self) -> list[Path]:
        """Files of ours whose edit may change a feature."""
        classes = (*type(self.model).__mro__, *type(self.preprocess).__mro__, Encoders)
        ours = (one for one in (*classes, read_image_of, turned) if one.__module__.startswith("sft."))
        blocks = {Path(hiera.__file__), Path(hiera.__file__).with_name("hiera_kernels.py")}
        return sorted(blocks | {Path(inspect.getfile(one)) for one in ours})

    def _configurations(self) -> dict[str, str]:
        """What shapes the encoders and stands in no weight, e.g. the width of windows."""
        modules = {path: part for path, part in self._frozen().items() if hasattr(part, "config")}
        found = {"model": str(vars(self.model).get("settings"))}
        for path, module in modules.items():
            values = {k: v for k, v in module.config.to_dict().items() if k[0] != "_" and k != "transformers_version"}
            found[path] = json.dumps(values, sort_keys=True, default=str)
        return found

    def _moved(self, pixels: Pixels) -> Pixels:
        vision = dataclasses.replace(pixels.vision, pixels=sent(pixels.vision.pixels, self.device))
        return Pixels(vision, sent(pixels.sam2_3HW, self.device))

    def _received(self, loaded: Loaded) -> tuple[Pixels, ...]:
        """The images, safe to use on the current stream."""
        if loaded.there is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(loaded.there)
            for one in loaded.pixels:  # their memory came from the other stream's share
                one.vision.pixels.record_stream(current)
                one.sam2_3HW.record_stream(current)
        return loaded.pixels

    def _vision_groups(self, pixels: Sequence[Pixels]) -> Iterator[list[Pixels]]:
        """Neighbours that go through the vision encoder together."""
        group: list[Pixels] = []
        tokens = 0
        for one in pixels:
            more = math.prod(one.vision.layout)
            if group and tokens + more > self.sizes.vision_tokens:
                yield group
                group, tokens = [], 0
            group.append(one)
            tokens += more
        if group:
            yield group

    def _sam2_parts_of(self, pixels_B3HW: Tensor) -> tuple[Tensor, ...]:
        """SAM2's features of images, in the order of SAM2_PARTS."""
        images = self.preprocess.normalise_sam2(pixels_B3HW, self.dtype)
        features = self.model.sam2_features(images, project=self.project)
        return features.level0_BCHW, features.level1_BCHW, features.embedding_BDHW


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """From host memory to a GPU; on the current stream, and nobody waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True)


def vision_of(entries: Sequence[Entry]) -> VisionFeatures:
    """Vision features of a batch, images one after another."""
    return VisionFeatures.join([VisionFeatures(entry["vision_tokens"], entry.get("deepstack")) for entry in entries])


def _vision_entry(features: VisionFeatures) -> Entry:
    deepstack = {} if features.deepstack_KMC is None else {"deepstack": features.deepstack_KMC}
    return {"vision_tokens": features.tokens_MC} | deepstack
