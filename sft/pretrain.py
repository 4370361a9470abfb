"""Trains the embedded base: a tiny Sa2VA, every part, on procedural vessel images with a question per target.

`python -m sft.pretrain DIR` writes a published directory: config.json, safetensors, tokenizer, pretraining.json.
It knows the architecture and the procedural images; users never run it, and no run depends on it.

The trap it is built around: trained plainly, the [SEG] token becomes the same for every question and the mask decoder
learns to ignore it. Against that stand several questions with different non-empty targets on every image, a classifier
of the target on the [SEG] embedding (dropped afterwards), and no text gradient through the [SEG] state.
"""

import argparse
import json
import math
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sft import synthetic
from sft.losses import bce_loss, dice_loss
from sft.metrics import counts, summarize
from sft.model import published
from sft.model.preprocess import ANSWER, IMAGENET_MEAN, IMAGENET_STD, Preprocess
from sft.model.sa2va import Prompt, Sa2VA, upsample
from sft.model.tiny import TINY_CONFIG, build_tokenizer

QUESTIONS = (
    "Please segment {} in this image.",
    "Can you segment {} in this image?",
    "Could you please segment {} in the image?",
    "Segment {}.",
)
SIDES = {"left tree": "right tree", "right tree": "left tree"}
# Every phrase asks for the overlap of some of the renderer's targets.
PHRASES: dict[str, tuple[str, ...]] = {target: (target,) for target in synthetic.TARGETS} | {
    "thick dark vessels": ("thick vessels", "dark vessels"),
    "thin dark vessels": ("thin vessels", "dark vessels"),
    "thick bright vessels": ("thick vessels", "bright vessels"),
    "thin bright vessels": ("thin vessels", "bright vessels"),
}
NAMES = tuple(PHRASES)
MIN_MASK_PX = 30  # a target of fewer pixels is not asked for


@dataclass(frozen=True)
class Settings:
    """What decides the base; written into its card."""

    seed: int = 0
    images: int = 12_000  # rendered ahead, then seen many times under turns, flips and photometric changes
    batch_size: int = 32
    prompts: int = 4  # questions per image and step
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 300
    seconds: float = 900.0  # of training, rendering aside; the schedule runs over time, so a slower chip still ends it
    task_weight: float = 0.3
    text_weight: float = 0.1
    iou_weight: float = 0.1
    compile: int = 1  # of SAM2's encoder, on a GPU


class Pool:
    """Rendered scenes on one device: images (N, 3, H, W) uint8, masks as bit planes (N, H, W), presence (N, K)."""

    def __init__(self, count: int, first_seed: int, device: torch.device, workers: int):
        size = 512
        seeds = range(first_seed, first_seed + count)
        workers = multiprocessing.get_context("fork").Pool(
            workers
        )  # they only render, so forking a GPU process is safe
        self.images = torch.empty(count, 3, size, size, dtype=torch.uint8, device=device)
        self.planes = torch.empty(count, size, size, dtype=torch.int16, device=device)
        self.present = torch.zeros(count, len(NAMES), dtype=torch.bool, device=device)
        with workers:
            for index, (image, plane, present) in enumerate(workers.imap(_render, seeds, chunksize=8)):
                self.images[index] = torch.from_numpy(image).permute(2, 0, 1).to(device)
                self.planes[index] = torch.from_numpy(plane).to(device)
                self.present[index] = torch.from_numpy(present).to(device)

    def __len__(self) -> int:
        return len(self.images)


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


def pretrain(directory: Path, settings: Settings, device: torch.device, workers: int) -> dict:
    """Renders, trains until the time is over, gates and saves; returns the card's figures."""
    torch.manual_seed(settings.seed)
    tokenizer = build_tokenizer(NAMES)
    model = published.build(TINY_CONFIG, tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), directory).to(device)
    _initialise(model)
    preprocess = published._preprocess(TINY_CONFIG, model, tokenizer, directory)
    task_head = nn.Linear(model.sam2.config.mask_decoder_config.hidden_size, len(NAMES)).to(device)
    started = time.time()
    held_out = Pool(64, 10_000_000, device, workers)
    pool = Pool(settings.images, 1, device, workers)
    print(f"rendered {settings.images} images in {time.time() - started:.0f} s", flush=True)
    curve = _train(model, task_head, preprocess, pool, held_out, settings)
    gate = evaluate(model, preprocess, held_out)
    size = published.save(directory, model, TINY_CONFIG, tokenizer)
    figures = {"settings": vars(settings), "curve": curve, "gate": gate, "bytes": size, "device": _device_name(device)}
    figures["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    (directory / "pretraining.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def _train(
    model: Sa2VA, task_head, preprocess: Preprocess, pool: Pool, held_out: Pool, settings: Settings
) -> list[dict]:
    parameters = [*model.parameters(), *task_head.parameters()]
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    plain = [parameter for parameter in parameters if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
    )
    generator = torch.Generator().manual_seed(settings.seed)
    prompts = PromptBook(preprocess, pool.images.device)
    if settings.compile and pool.images.is_cuda:
        model.grounding_encoder.sam2_model.vision_encoder.compile()
    curve, step, started = [], 0, time.time()
    while (spent := (time.time() - started) / settings.seconds) < 1:
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / settings.warmup_steps)
            group["lr"] = settings.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * spent)))
        loss, terms = _loss(model, task_head, prompts, pool, settings, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            row = {"step": step, "seconds": round(time.time() - started)} | {
                k: round(v.item(), 4) for k, v in terms.items()
            }
            if step % 1000 == 0:
                row["held_out"] = evaluate(model, preprocess, held_out)["dice"]
            curve.append(row)
            print(json.dumps(row), flush=True)
    return curve


def _loss(model, task_head, prompts: "PromptBook", pool: Pool, settings: Settings, generator) -> tuple[Tensor, dict]:
    """One batch: every image with several questions; the image encoders run once per image."""
    images, masks, targets = _sample(pool, settings, generator)
    batch, count = targets.shape
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        features = model.sam2_features(images)
        tiles = functional.interpolate(images, size=prompts.preprocess.tile_px, mode="bilinear", antialias=True)
        tokens = model.vision_tokens(tiles).repeat_interleave(count, dim=0)
        hidden, prompt = prompts.hidden_states(model, tokens, targets.flatten(), generator)
        state = hidden[torch.arange(batch * count, device=hidden.device), prompt.seg_position_B]
        embedding = model.text_hidden_fcs(state)
        task_loss = functional.cross_entropy(task_head(embedding).float(), targets.flatten())
        # The state at [SEG] predicts the full stop; its gradient must not pull the mask's embedding.
        text_loss = model.text_loss(_detach_at(hidden, prompt.seg_position_B), prompt.labels_BL)
        decoded = model.decode_masks(embedding.view(batch, count, -1), features)
    # Any of the three masks may be the one of highest predicted IoU later, so each is trained, one a step.
    chosen = int(torch.randint(3, (), generator=generator))
    logits = upsample(decoded.candidate_logits_BKhw[:, chosen], masks.shape[-2:])
    truth = masks.flatten(0, 1)
    dice, bce = dice_loss(logits, truth, 1.0).mean(), bce_loss(logits, truth).mean()
    with torch.no_grad():
        predicted = logits > 0
        union = (predicted | truth).sum((1, 2)).clamp(min=1)
        iou = (predicted & truth).sum((1, 2)) / union
    iou_loss = functional.mse_loss(decoded.predicted_iou_BK[:, chosen].float(), iou)
    total = dice + bce + settings.task_weight * task_loss + settings.text_weight * text_loss
    total = total + settings.iou_weight * iou_loss
    return total, {"dice": dice, "bce": bce, "task": task_loss, "text": text_loss, "iou": iou.mean()}


def _sample(pool: Pool, settings: Settings, generator) -> tuple[Tensor, Tensor, Tensor]:
    """Augmented images (B, 3, H, W) normalised, masks (B, P, H, W) bool, target indices (B, P)."""
    device = pool.images.device
    rows = torch.randint(len(pool), (settings.batch_size,), generator=generator).to(device)
    flip, turns = bool(torch.randint(2, (), generator=generator)), int(torch.randint(4, (), generator=generator))
    upright = turns == 0
    weights = pool.present[rows].float()
    if not upright:  # left and right mean nothing on a turned image
        weights[:, [NAMES.index(side) for side in SIDES]] = 0
    targets = torch.multinomial(weights, settings.prompts, replacement=True)
    masks = (pool.planes[rows][:, None].int() >> targets[:, :, None, None]) & 1
    images = pool.images[rows]
    if flip:
        images, masks = images.flip(-1), masks.flip(-1)
        if upright:
            mirrored = torch.arange(len(NAMES), device=device)
            for side, other in SIDES.items():
                mirrored[NAMES.index(side)] = NAMES.index(other)
            targets = mirrored[targets]
    images, masks = images.rot90(turns, (-2, -1)), masks.rot90(turns, (-2, -1))
    return _normalise(_photometric(images)), masks.bool(), targets


def _photometric(images: Tensor) -> Tensor:
    """uint8 -> float in 0..1 with random gain, gamma and colour per image, some grey, some noise."""
    batch, device = len(images), images.device
    pixels = images.float() / 255
    gain = 1 + 0.15 * torch.randn(batch, 3, 1, 1, device=device) + 0.15 * torch.randn(batch, 1, 1, 1, device=device)
    gamma = torch.exp(0.2 * torch.randn(batch, 1, 1, 1, device=device))
    pixels = (pixels.clamp(min=1e-4) ** gamma * gain).clamp(0, 1)
    grey = torch.rand(batch, 1, 1, 1, device=device) < 0.15
    pixels = torch.where(grey, pixels.mean(1, keepdim=True).expand_as(pixels), pixels)
    noise = 0.03 * torch.rand(batch, 1, 1, 1, device=device) * (torch.rand(batch, 1, 1, 1, device=device) < 0.5)
    return (pixels + noise * torch.randn_like(pixels)).clamp(0, 1)


def _normalise(pixels: Tensor) -> Tensor:
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=pixels.device).view(3, 1, 1)
    return (pixels - mean) / std


class PromptBook:
    """Tokenised questions of every target, made once: rows are right-padded to one length."""

    def __init__(self, preprocess: Preprocess, device: torch.device):
        self.preprocess = preprocess
        texts = [question.format(f"the {target}") for target in NAMES for question in QUESTIONS]
        prompt = preprocess.prompt(texts, [1] * len(texts), with_labels=True)
        self.ids, self.positions, self.labels = (
            part.to(device) for part in (prompt.input_ids_BL, prompt.seg_position_B, prompt.labels_BL)
        )

    def hidden_states(self, model: Sa2VA, tokens: Tensor, targets: Tensor, generator):
        wording = torch.randint(len(QUESTIONS), targets.shape, generator=generator).to(targets.device)
        rows = targets * len(QUESTIONS) + wording
        prompt = Prompt(self.ids[rows], self.positions[rows], self.labels[rows])
        return model.hidden_states(prompt.input_ids_BL, tokens), prompt


def _detach_at(hidden_BLC: Tensor, positions_B: Tensor) -> Tensor:
    index = torch.arange(hidden_BLC.shape[1], device=hidden_BLC.device)
    return torch.where((index == positions_B[:, None])[..., None], hidden_BLC.detach(), hidden_BLC)


@torch.no_grad()
def evaluate(model: Sa2VA, preprocess: Preprocess, pool: Pool) -> dict:
    """The gate: Dice per question on held-out images, and how far the logits differ between questions."""
    model.eval()
    device = pool.images.device
    per_target: dict[str, list] = {target: [] for target in NAMES}
    spreads = []
    for row in range(len(pool)):
        present = pool.present[row].nonzero().flatten()
        texts = [QUESTIONS[0].format(f"the {NAMES[bit]}") for bit in present.tolist()]
        prompt = preprocess.prompt(texts, [1] * len(texts))
        image = _normalise(pool.images[row : row + 1].float() / 255)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = model.sam2_features(image)
            tile = functional.interpolate(image, size=preprocess.tile_px, mode="bilinear", antialias=True)
            tokens = model.vision_tokens(tile).expand(len(texts), -1, -1)
            hidden = model.hidden_states(prompt.input_ids_BL.to(device), tokens)
            state = hidden[torch.arange(len(texts)), prompt.seg_position_B.to(device)]
            logits = model.decode_masks(model.text_hidden_fcs(state)[None], features).logits_Bhw
        logits = upsample(logits, pool.planes.shape[-2:])
        spreads.append(logits.std(0).mean().item() if len(texts) > 1 else float("nan"))
        for bit, own in zip(present.tolist(), logits, strict=True):
            truth = ((pool.planes[row].int() >> bit) & 1).bool()
            per_target[NAMES[bit]].append(counts(own[None], truth[None])[0].cpu())
    model.train()
    dice = {t: round(summarize(torch.stack(c))["dice"], 4) for t, c in per_target.items() if c}
    return {"dice": dice, "mean_dice": float(np.mean(list(dice.values()))), "spread": float(np.nanmean(spreads))}


def _initialise(model: Sa2VA) -> None:
    """1/sqrt(fan_in): transformers' fixed 0.02 starves layers this narrow."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            fan_in = module.weight[0].numel() if not isinstance(module, nn.ConvTranspose2d) else module.weight.shape[0]
            nn.init.normal_(module.weight, std=1 / math.sqrt(fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    backbone = model.sam2.vision_encoder.backbone
    for parameter in (backbone.pos_embed, backbone.pos_embed_window, model.vision_model.embeddings.position_embeddings):
        nn.init.normal_(parameter, std=0.02)
    gaussian = model.sam2.shared_image_embedding.positional_embedding
    model.sam2.prompt_encoder.shared_embedding.positional_embedding.copy_(
        gaussian
    )  # one matrix in the published format


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    for name, value in vars(Settings()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    arguments = vars(parser.parse_args())
    directory, workers = arguments.pop("directory"), arguments.pop("workers")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = pretrain(directory, Settings(**arguments), device, workers)
    print(json.dumps({key: figures[key] for key in ("gate", "parameters", "bytes")}, indent=1), f"\n{ANSWER}")


if __name__ == "__main__":
    main()
