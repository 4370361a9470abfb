"""Trains the embedded base: a tiny Sa2VA, every part, on procedural vessel images with a question per target.

`python -m sft.pretrain DIR` writes a published directory: config.json, safetensors, tokenizer, pretraining.json.
It knows the architecture and the procedural images; users never run it, and no run depends on it.

The trap it is built around: trained plainly, the [SEG] token becomes the same for every question and the mask decoder
learns to ignore it. Against that stand several questions with different non-empty targets on every image, a classifier
of the target on the [SEG] embedding (dropped afterwards), and no text gradient through the [SEG] state.

Shapes: B images of a step, Q questions to each, K phrases, H x W pixels.
"""

import argparse
import json
import math
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from sft import synthetic
from sft.gate import HELD_OUT_SEED, NAMES, QUESTIONS, Scenes, encode, evaluate, normalise, render
from sft.losses import bce_loss, dice_loss
from sft.model import published
from sft.model.preprocess import IMAGE_TOKEN, PreprocessInternVL
from sft.model.sa2va import Prompt, VisionFeatures, upsample
from sft.model.sa2va_internvl import Sa2VAInternVL
from sft.model.tiny import TINY_CONFIG, build_tokenizer

SIDES = {"left tree": "right tree", "right tree": "left tree"}
LOG_EVERY_STEPS, GATE_EVERY_STEPS = 100, 1000


@dataclass(frozen=True)
class Settings:
    """What decides the base; written into its card. The defaults made the one that is shipped."""

    seed: int = 0
    images: int = 10_000  # rendered ahead, then seen many times under turns, flips and photometric changes
    held_out: int = 64  # images of the gate
    batch_size: int = 32
    prompts: int = 4  # questions per image and step
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 300
    seconds: float = 930.0  # of training, rendering aside; the schedule runs over time, so a slower chip still ends it
    task_weight: float = 0.3
    text_weight: float = 0.1
    iou_weight: float = 0.1
    compile: int = 1  # of SAM2's encoder, on a GPU


def pretrain(directory: Path, settings: Settings, device: torch.device, workers: int) -> dict:
    """Renders, trains until the time is over, gates and saves; returns the card's figures.

    Args:
        directory: the published directory to write.
        settings: the recipe.
        device: a GPU; on a CPU it runs too, far too slowly to converge.
        workers: processes that render; 0 renders in this one.
    """
    torch.manual_seed(settings.seed)
    tokenizer = build_tokenizer(NAMES)
    model = published.build(TINY_CONFIG, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), directory).to(device)
    _initialise(model)
    preprocess = published.make_preprocess(TINY_CONFIG, tokenizer, directory)
    task_head = nn.Linear(model.sam2.config.mask_decoder_config.hidden_size, len(NAMES)).to(device)
    started = time.time()
    held_out = render(range(HELD_OUT_SEED, HELD_OUT_SEED + settings.held_out), device, workers)
    scenes = render(range(1, settings.images + 1), device, workers)
    print(f"rendered {settings.images:,} images in {time.time() - started:.0f} s", flush=True)
    curve = _train(model, task_head, preprocess, scenes, held_out, settings)
    gate = evaluate(model, preprocess, held_out)
    size = published.save(directory, model, TINY_CONFIG, tokenizer)
    figures = {
        "settings": vars(settings),
        "curve": curve,
        "gate": gate,
        "bytes": size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "renderer_version": synthetic.GENERATOR_VERSION,
    }
    (directory / "pretraining.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def _initialise(model: Sa2VAInternVL) -> None:
    """1/sqrt(fan_in): transformers' fixed 0.02 starves layers this narrow."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            fan_in = module.weight.shape[0] if isinstance(module, nn.ConvTranspose2d) else module.weight[0].numel()
            nn.init.normal_(module.weight, std=1 / math.sqrt(fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    backbone = model.sam2.vision_encoder.backbone
    for parameter in (backbone.pos_embed, backbone.pos_embed_window, model.vision_model.embeddings.position_embeddings):
        nn.init.normal_(parameter, std=0.02)
    gaussian = model.sam2.shared_image_embedding.positional_embedding
    # The published format holds this matrix once.
    model.sam2.prompt_encoder.shared_embedding.positional_embedding.copy_(gaussian)


def _train(
    model: Sa2VAInternVL,
    task_head: nn.Linear,
    preprocess: PreprocessInternVL,
    scenes: Scenes,
    held_out: Scenes,
    settings: Settings,
) -> list[dict]:
    """Steps until the time is over; returns the curve, one row every LOG_EVERY_STEPS."""
    parameters = [*model.parameters(), *task_head.parameters()]
    optimizer = _optimizer(parameters, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    questions = _Questions(preprocess, scenes.images_N3HW.device)
    if settings.compile and scenes.images_N3HW.is_cuda:
        model.sam2.vision_encoder.compile()
    model.train()
    curve, step, started = [], 0, time.time()
    while (spent := (time.time() - started) / settings.seconds) < 1:
        warm = min(1.0, (step + 1) / settings.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * spent)))
        loss, terms = _loss(model, task_head, questions, scenes, settings, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % LOG_EVERY_STEPS == 0:
            row = {"step": step, "seconds": round(time.time() - started)}
            row |= {name: round(value.item(), 4) for name, value in terms.items()}
            if step % GATE_EVERY_STEPS == 0:
                row["held_out"] = evaluate(model, preprocess, held_out)["dice"]
            curve.append(row)
            print(json.dumps(row), flush=True)
    return curve


def _optimizer(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))


def _loss(
    model: Sa2VAInternVL,
    task_head: nn.Linear,
    questions: "_Questions",
    scenes: Scenes,
    settings: Settings,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One batch: every image with several questions; the image encoders run once per image."""
    images_B3HW, masks_BQHW, phrases_BQ = _sample(scenes, settings, generator)
    batch, count = phrases_BQ.shape
    targets = phrases_BQ.flatten()
    with torch.autocast(images_B3HW.device.type, torch.bfloat16, enabled=images_B3HW.is_cuda):
        features, tokens = encode(model, images_B3HW, questions.tile_px)
        prompt = questions.draw(targets, generator)
        vision = VisionFeatures(tokens.repeat_interleave(count, dim=0).flatten(0, 1))
        hidden = model.hidden_states(prompt, vision).normed_BLC
        state = hidden[torch.arange(batch * count, device=hidden.device), prompt.seg_position_B]
        embedding = model.text_hidden_fcs(state)
        task_loss = functional.cross_entropy(task_head(embedding).float(), targets)
        # The state at [SEG] predicts the full stop; its gradient must not pull the mask's embedding.
        text_loss = model.text_loss(_detach_at(hidden, prompt.seg_position_B), prompt)
        decoded = model.decode_masks(embedding.view(batch, count, -1), features)
    # Any of the three masks may be the one of highest predicted IoU later, so each is trained, one a step.
    chosen = int(torch.randint(3, (), generator=generator))
    logits = upsample(decoded.candidate_logits_BKhw[:, chosen], masks_BQHW.shape[-2:])
    truth = masks_BQHW.flatten(0, 1)
    dice, bce = dice_loss(logits, truth, 1.0).mean(), bce_loss(logits, truth).mean()
    iou = _iou(logits.detach() > 0, truth)
    iou_loss = functional.mse_loss(decoded.predicted_iou_BK[:, chosen].float(), iou)
    total = dice + bce + settings.task_weight * task_loss + settings.text_weight * text_loss
    total = total + settings.iou_weight * iou_loss
    return total, {"dice": dice, "bce": bce, "task": task_loss, "text": text_loss, "iou": iou.mean()}


def _sample(scenes: Scenes, settings: Settings, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Augmented images (B, 3, H, W) normalised, masks (B, Q, H, W) bool, indices of their phrases (B, Q)."""
    device = scenes.images_N3HW.device
    rows = torch.randint(len(scenes.images_N3HW), (settings.batch_size,), generator=generator).to(device)
    flip, turns = bool(torch.randint(2, (), generator=generator)), int(torch.randint(4, (), generator=generator))
    weights_BK = scenes.present_NK[rows].float()
    if turns:  # left and right mean nothing on a turned image
        weights_BK[:, [NAMES.index(side) for side in SIDES]] = 0
    phrases_BQ = torch.multinomial(weights_BK, settings.prompts, replacement=True)
    images, masks = scenes.images_N3HW[rows], scenes.masks(rows, phrases_BQ)
    if flip:
        images, masks = images.flip(-1), masks.flip(-1)
        if not turns:
            phrases_BQ = _mirrored(device)[phrases_BQ]
    images, masks = images.rot90(turns, (-2, -1)), masks.rot90(turns, (-2, -1))
    return normalise(_photometric(images)), masks, phrases_BQ


def _mirrored(device: torch.device) -> Tensor:
    """For each phrase the one that asks for the same on the mirror image."""
    return torch.tensor([NAMES.index(SIDES.get(name, name)) for name in NAMES], device=device)


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


class _Questions:
    """Tokenised wordings of every phrase, made once: rows are right-padded to one length."""

    def __init__(self, preprocess: PreprocessInternVL, device: torch.device):
        self.tile_px = preprocess.tile_px
        texts = [question.format(f"the {name}") for name in NAMES for question in QUESTIONS]
        prompt = preprocess.prompt(texts, [preprocess.layout(1)] * len(texts), with_labels=True)
        self.parts = [part.to(device) for part in (prompt.input_ids_BL, prompt.seg_position_B, prompt.labels_BL)]

    def draw(self, phrases: Tensor, generator: torch.Generator) -> Prompt:
        """One wording at random for each phrase."""
        wording = torch.randint(len(QUESTIONS), phrases.shape, generator=generator).to(phrases.device)
        return Prompt(*(part[phrases * len(QUESTIONS) + wording] for part in self.parts))


def _detach_at(hidden_BLC: Tensor, positions_B: Tensor) -> Tensor:
    index = torch.arange(hidden_BLC.shape[1], device=hidden_BLC.device)
    return torch.where((index == positions_B[:, None])[..., None], hidden_BLC.detach(), hidden_BLC)


def _iou(predicted: Tensor, truth: Tensor) -> Tensor:
    return (predicted & truth).sum((1, 2)) / (predicted | truth).sum((1, 2)).clamp(min=1)


def main() -> None:
    """Reads the flags, pre-trains on a GPU if there is one, prints the gate."""
    parser = argparse.ArgumentParser(
        prog="python -m sft.pretrain", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("directory", type=Path, help="the published directory to write")
    for name, value in vars(Settings()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count(), help="processes that render")
    arguments = vars(parser.parse_args())
    directory, workers = arguments.pop("directory"), arguments.pop("workers")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = pretrain(directory, Settings(**arguments), device, workers)
    print(json.dumps({key: figures[key] for key in ("gate", "parameters", "bytes")}, indent=1))


if __name__ == "__main__":
    main()
