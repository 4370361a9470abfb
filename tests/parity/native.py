"""Our side of the comparison: a checkpoint loaded natively, run on a case's inputs. All calls of `sft` stand here.

Takes a directory and numpy inputs, gives numpy results under the same names as `published.py`.
"""

import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from parity import cases, seeded
from sft.config import TrainConfig
from sft.model import lora, published
from sft.model.sa2va import Layout, Output, Prompt, Sam2Features, VisionFeatures, VisionInput, upsample

FAMILIES = ("internvl", "qwen2_5_vl", "qwen3_vl")  # those that load natively


def write_checkpoint(name: str, tensors: dict[str, tuple[int, ...]], directory: Path, *, old: bool = False) -> None:
    """The directory that `published.py` saves, without it: config.json, seeded weights, tokenizer.

    `old`: Qwen2.5-VL as transformers before 4.52 saved it.
    """
    directory.mkdir()
    weights = {key: torch.from_numpy(seeded.weight(key, shape)) for key, shape in tensors.items()}
    weights = {cases.old_name(key) if old else key: weight for key, weight in weights.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    cases.write_config(name, directory, old=old)
    cases.write_processor(name, directory)


def load(directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The native model of a directory, frozen; what makes its positions comes along as `preprocess`."""
    loaded = published.load(str(directory), dtype=dtype)
    loaded.model.preprocess = loaded.preprocess
    return loaded.model.requires_grad_(False)


def run(model: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Everything that is compared."""
    with torch.no_grad():
        results = forward(model, arrays)
        results["inference_logits"] = upsample(results["logits"], arrays["sam2_images"].shape[-2:])
    return {key: tensor.float().numpy() for key, tensor in results.items()}


def forward(model: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The model's own pieces, then its forward as training calls it."""
    dtype = next(model.text_hidden_fcs.parameters()).dtype
    images = _images(arrays)
    vision = VisionFeatures.join([model.vision_features(image.to("cpu", dtype)) for image in images])
    features = model.sam2_features(torch.from_numpy(arrays["sam2_images"]).to(dtype))
    output = model(_prompt(model, arrays, [image.layout for image in images]), vision, features)
    return _vision_results(vision) | _results(output, features)


def wrap(directory: Path, model: nn.Module, **settings) -> nn.Module:
    """LoRA on the language model, A and B from the seed."""
    given = {"lora_rank": cases.LORA_RANK, "lora_alpha": cases.LORA_ALPHA, "lora_dropout": 0.0} | settings
    wrapped = lora.wrap(model, TrainConfig(model_path=str(directory), **given)).eval()
    for path, parameter in trainable(wrapped).items():
        if ".lora_" in path:
            parameter.data.copy_(torch.from_numpy(seeded.weight(path, tuple(parameter.shape))))
    return wrapped


def trainable(wrapped: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by their path, without what peft puts around it."""
    return {
        key.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", ""): parameter
        for key, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }


def run_lora(directory: Path, model: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Results and gradients with LoRA on the language model."""
    wrapped = wrap(directory, model)
    results = forward(wrapped.get_base_model(), arrays)
    weights = torch.from_numpy(cases.mask_weights(tuple(results["logits"].shape)))
    (results["text_loss"].sum() + (results["logits"] * weights).sum()).backward()
    kept = {key: results[key].detach().numpy() for key in ("seg_state", "text_loss", "logits")}
    gradients = {f"gradient/{path}": parameter.grad.numpy() for path, parameter in trainable(wrapped).items()}
    return {f"lora/{key}": value for key, value in kept.items()} | gradients


def save_trained_adapter(directory: Path, model: nn.Module, modules: tuple[str, ...], adapter: Path) -> nn.Module:
    """An adapter as a run would leave it, some modules trained whole besides; gives the model with it on."""
    wrapped = wrap(directory, model, train_modules=modules)
    with torch.no_grad():
        for path, parameter in trainable(wrapped).items():
            if ".lora_" not in path:
                shift = torch.from_numpy(seeded.uniform(f"trained {path}", tuple(parameter.shape)))
                parameter.add_(shift * parameter.abs().mean())
    adapter.mkdir()
    parameters = {key: value.detach() for key, value in wrapped.named_parameters() if value.requires_grad}
    lora.save_adapter(adapter, wrapped, parameters, "safetensors")
    return wrapped.get_base_model()


def _images(arrays: dict[str, np.ndarray]) -> list[VisionInput]:
    """Each sample's image, and the layout of its vision tokens."""
    if "tiles" in arrays:
        side = math.isqrt(cases.TOKENS_PER_TILE)
        parts = torch.from_numpy(arrays["tiles"]).split(list(cases.TILES))
        return [VisionInput(part, (len(part), side, side)) for part in parts]
    merge = math.isqrt(cases.MERGED)
    layouts = [(frames, rows // merge, columns // merge) for frames, rows, columns in cases.GRIDS_THW]
    parts = torch.from_numpy(arrays["patches"]).split([math.prod(grid) for grid in cases.GRIDS_THW])
    return [VisionInput(part, layout) for part, layout in zip(parts, layouts, strict=True)]


def _vision_results(vision: VisionFeatures) -> dict[str, Tensor]:
    levels = [] if vision.deepstack_KMC is None else vision.deepstack_KMC
    return {"vision_tokens": vision.tokens_MC} | {f"deepstack{index}": level for index, level in enumerate(levels)}


def _prompt(model: nn.Module, arrays: dict[str, np.ndarray], layouts: list[Layout]) -> Prompt:
    labels_BL = np.full_like(arrays["labels"], -100)
    labels_BL[:, :-1] = arrays["labels"][:, 1:]  # ours stand where they are predicted
    ids_BL = torch.from_numpy(arrays["input_ids"])
    positions_3BL = model.preprocess.position_ids(ids_BL, layouts)
    return Prompt(ids_BL, torch.from_numpy(arrays["seg_position"]), torch.from_numpy(labels_BL), positions_3BL)


def _results(output: Output, features: Sam2Features) -> dict[str, Tensor]:
    return {
        "fpn0": features.level0_BCHW,
        "fpn1": features.level1_BCHW,
        "fpn2": features.embedding_BDHW,
        "seg_state": output.seg_state_BC,
        "text_loss": output.text_loss[None],
        "candidate_logits": output.masks.candidate_logits_BKhw,
        "predicted_iou": output.masks.predicted_iou_BK,
        "logits": output.masks.logits_Bhw,
    }
