"""The gate a base must pass before anybody tunes it: Dice per question, and how far a question moves the mask.

Takes a model and rendered scenes, gives figures. Pre-training samples scenes of the same kind and asks the same
phrases. It does not train, and knows no files.

Shapes: N scenes, K phrases, Q questions to one image.
"""

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sft import synthetic
from sft.metrics import counts, summarize
from sft.model.preprocess import IMAGENET_MEAN, IMAGENET_STD, PreprocessInternVL
from sft.model.sa2va import Sam2Features, VisionFeatures, upsample
from sft.model.sa2va_internvl import Sa2VAInternVL

QUESTIONS = (
    "Please segment {} in this image.",
    "Can you segment {} in this image?",
    "Could you please segment {} in the image?",
    "Segment {}.",
)
# Every phrase asks for the overlap of some of the renderer's targets.
PHRASES: dict[str, tuple[str, ...]] = {target: (target,) for target in synthetic.TARGETS} | {
    "thick dark vessels": ("thick vessels", "dark vessels"),
    "thin dark vessels": ("thin vessels", "dark vessels"),
    "thick bright vessels": ("thick vessels", "bright vessels"),
    "thin bright vessels": ("thin vessels", "bright vessels"),
}
NAMES = tuple(PHRASES)
HELD_OUT_SEED = 10_000_000  # the first that training never renders
MIN_MASK_PX = 30  # a target of fewer pixels is not asked for


@dataclass(frozen=True)
class Scenes:
    """Rendered scenes on one device."""

    images_N3HW: Tensor  # uint8
    planes_NHW: Tensor  # int16; bit k is the mask of phrase k
    present_NK: Tensor  # bool: the phrase has a mask worth asking for

    def masks(self, rows: Tensor, phrases: Tensor) -> Tensor:
        """Masks of one phrase or several per row: rows (B,), phrases (B, Q) -> bool (B, Q, H, W)."""
        return ((self.planes_NHW[rows][:, None].int() >> phrases[:, :, None, None]) & 1).bool()


def render(seeds: Sequence[int], device: torch.device, workers: int = 0) -> Scenes:
    """Renders one scene per seed; with `workers` processes, or in this one with none."""
    if workers == 0:
        return _gather(map(_render, seeds), len(seeds), device)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return _gather(pool.imap(_render, seeds, chunksize=8), len(seeds), device)


@torch.no_grad()
def evaluate(model: Sa2VAInternVL, preprocess: PreprocessInternVL, scenes: Scenes) -> dict:
    """Asks every scene for each phrase it holds.

    Returns:
        `dice`: per phrase, the mean over its scenes at threshold 0.5; `mean_dice`: over the phrases; `spread`: standard
        deviation of a pixel's logit over the questions to one image, mean over pixels and images. A base that ignores
        its question has spread 0.
    """
    was_training = model.training
    model.eval()
    per_phrase: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    spreads = []
    for row in range(len(scenes.images_N3HW)):
        phrases_Q = scenes.present_NK[row].nonzero().flatten()
        logits_QHW = _ask(model, preprocess, scenes.images_N3HW[row], [NAMES[bit] for bit in phrases_Q.tolist()])
        if len(phrases_Q) > 1:
            spreads.append(logits_QHW.std(0).mean().item())
        masks_QHW = scenes.masks(torch.tensor([row]), phrases_Q[None])[0]
        for bit, count in zip(phrases_Q.tolist(), counts(logits_QHW, masks_QHW).cpu(), strict=True):
            per_phrase[NAMES[bit]].append(count)
    model.train(was_training)
    dice = {name: round(summarize(torch.stack(rows))["dice"], 4) for name, rows in per_phrase.items() if rows}
    return {"dice": dice, "mean_dice": float(np.mean(list(dice.values()))), "spread": float(np.mean(spreads))}


def encode(model: Sa2VAInternVL, images_B3HW: Tensor, tile_px: int) -> tuple[Sam2Features, Tensor]:
    """Both image encoders on images of SAM2's own size, normalised; one tile an image."""
    tiles = functional.interpolate(images_B3HW, size=tile_px, mode="bilinear", antialias=True)
    return model.sam2_features(images_B3HW), model.vision_tokens(tiles)


def normalise(pixels_B3HW: Tensor) -> Tensor:
    """0..1 -> ImageNet's mean and standard deviation."""
    mean = torch.tensor(IMAGENET_MEAN, device=pixels_B3HW.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=pixels_B3HW.device).view(3, 1, 1)
    return (pixels_B3HW - mean) / std


def _ask(model: Sa2VAInternVL, preprocess: PreprocessInternVL, image_3HW: Tensor, names: list[str]) -> Tensor:
    """Logits of one image at its own size, one row per phrase."""
    device = image_3HW.device
    layouts = [preprocess.layout(1)] * len(names)
    prompt = preprocess.prompt([QUESTIONS[0].format(f"the {name}") for name in names], layouts).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        features, tokens = encode(model, normalise(image_3HW[None].float() / 255), preprocess.tile_px)
        vision = VisionFeatures(tokens.expand(len(names), -1, -1).flatten(0, 1))
        hidden = model.hidden_states(prompt, vision).seg_BLC
        state = hidden[torch.arange(len(names)), prompt.seg_position_B]
        masks = model.decode_masks(model.text_hidden_fcs(state)[None], features)
    return upsample(masks.logits_Bhw, image_3HW.shape[-2:])


def _gather(rendered, count: int, device: torch.device) -> Scenes:
    size = synthetic.FRAME_PX
    scenes = Scenes(
        torch.empty(count, 3, size, size, dtype=torch.uint8, device=device),
        torch.empty(count, size, size, dtype=torch.int16, device=device),
        torch.zeros(count, len(NAMES), dtype=torch.bool, device=device),
    )
    for index, (image_HW3, plane_HW, present_K) in enumerate(rendered):
        scenes.images_N3HW[index] = torch.from_numpy(image_HW3).permute(2, 0, 1).to(device)
        scenes.planes_NHW[index] = torch.from_numpy(plane_HW).to(device)
        scenes.present_NK[index] = torch.from_numpy(present_K).to(device)
    return scenes


def _render(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scene = synthetic.render(seed)
    plane = np.zeros(scene.image_HW3.shape[:2], np.int16)
    present = np.zeros(len(NAMES), bool)
    for bit, parts in enumerate(PHRASES.values()):
        if all(part in scene.masks for part in parts):
            mask = np.logical_and.reduce([scene.masks[part] for part in parts])
            plane |= mask.astype(np.int16) << bit
            present[bit] = mask.sum() >= MIN_MASK_PX
    return scene.image_HW3, plane, present
