"""The reference: a small checkpoint built, saved and run with the published classes. Not run by our Python.

Takes a case's name and a directory; leaves there the checkpoint (`model/`, as `save_pretrained` writes it) and what the
published code computes on it (`expected.npz`, `bf16.npz`). With an adapter's directory it instead puts that adapter on
the saved checkpoint through peft and writes `adapted.npz`. Needs SA2VA_UPSTREAM and the packages that `parity` names.

    python -m parity.published case NAME DIRECTORY
    python -m parity.published adapter NAME DIRECTORY ADAPTER on|merged
    python -m parity.published golden
"""

import importlib
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open

from parity import cases, figures, fused, seeded, shrink

FOLDERS = {"internvl": "models", "qwen2_5_vl": "models_qwen2_5_vl", "qwen3_vl": "models_qwen3vl"}
PER_SAMPLE = ("seg_state", "fpn0", "fpn1", "fpn2", "candidate_logits", "predicted_iou", "logits")
LINEARS = (
    r"(language_model\.model|model\.model|model\.model\.language_model)\.layers\.\d+\..*"
    r"\.(q_proj|k_proj|v_proj|o_proj|qkv_proj|gate_proj|up_proj|gate_up_proj|down_proj|wqkv|wo|w1|w2|w3)"
)


def main(arguments: list[str]) -> None:
    """Runs one of the three commands."""
    torch.set_num_threads(1)
    match arguments:
        case ["case", name, directory]:
            run_case(name, Path(directory))
        case ["adapter", name, directory, adapter, "on" | "merged" as how]:
            run_adapter(name, Path(directory), Path(adapter), merged=how == "merged")
        case ["golden"]:
            write_golden()
        case _:
            raise SystemExit(__doc__)


def run_case(name: str, directory: Path) -> None:
    """Builds, saves and runs a case in fp32, then in bf16 with two shapes of the batch."""
    published = import_published(name)
    model = build(name, published)
    save(name, model, directory / "model")
    arrays = cases.inputs(name)
    with torch.no_grad():
        expected = run(model, arrays)
    if name != "hiera_large":
        with torch.no_grad():
            half = model.to(torch.bfloat16)
            together = run(half, arrays)
            alone = [run(half, one) for one in _singles(arrays)]
        model = load(name, published, directory / "model")
        bf16 = {f"together/{key}": value for key, value in together.items()}
        bf16 |= {f"alone/{key}": np.concatenate([one[key] for one in alone]) for key in together if key in PER_SAMPLE}
        np.savez(directory / "bf16.npz", **bf16)
        config = cases.config(name)
        expected |= run_lora(model, arrays, config.get("llm_config") or config["text_config"])
    np.savez(directory / "expected.npz", **expected)


def write_golden() -> None:
    """Digests of every case, and what tensors its checkpoint has."""
    shapes = {}
    for name in cases.CASES:
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            run_case(name, directory)
            figures.write(name, dict(np.load(directory / "expected.npz")))
            with safe_open(directory / "model" / "model.safetensors", "np") as file:
                shapes[name] = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    figures.write_tensors(shapes)


def run_adapter(name: str, directory: Path, adapter: Path, *, merged: bool) -> None:
    """The published model with our adapter on it, or merged into it.

    peft before 0.20 puts a wrapper around a module trained whole that takes no call by keywords alone, and that is how
    the published code calls its mask decoder: there such an adapter has to be merged first.
    """
    model = load(name, import_published(name), directory / "model")
    model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval()
    model = model.merge_and_unload() if merged else model.get_base_model()
    with torch.no_grad():
        np.savez(directory / "adapted.npz", **run(model, cases.inputs(name)))


def import_published(name: str) -> dict:
    """The published modules of a case's family: `modeling`, `configuration`, `sam2`, with SAM2 at the case's size."""
    sys.path.insert(0, str(Path(os.environ["SA2VA_UPSTREAM"]) / "projects" / "sa2va" / "hf"))
    folder = FOLDERS[cases.family(name)]
    modeling = "modeling_sa2va_chat" if folder == "models" else "modeling_sa2va_qwen"
    files = {"modeling": modeling, "configuration": "configuration_sa2va_chat", "sam2": "sam2"}
    modules = {key: importlib.import_module(f"{folder}.{file}") for key, file in files.items()}
    native = cases.config(name).get("native")
    if native and not hasattr(modules["sam2"], "is_shrunk"):
        shrink.sam2(modules["sam2"], native["sam2_config"])
        modules["sam2"].is_shrunk = True
    shrink.run_on_cpu()
    return modules


def build(name: str, published: dict) -> torch.nn.Module:
    """The published model of a case, every tensor of its state dict from the seed."""
    config = shrink.configuration(published["configuration"], cases.config(name))
    model = _class(published)(config, use_flash_attn=False).eval()
    seen = set()
    for key, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:  # the head of tied embeddings
            continue
        seen.add(tensor.data_ptr())
        tensor.copy_(torch.from_numpy(seeded.weight(cases.new_name(key), tuple(tensor.shape))))
    return shrink.ready(model.requires_grad_(False))


def save(name: str, model: torch.nn.Module, directory: Path) -> None:
    """The directory as the published conversion leaves it, and a tokenizer of a few words."""
    model.save_pretrained(directory)
    cases.write_processor(name, directory)


def load(name: str, published: dict, directory: Path) -> torch.nn.Module:
    """What `save` wrote, read by the published class."""
    config = shrink.configuration(published["configuration"], cases.config(name))
    model = _class(published).from_pretrained(directory, config=config, use_flash_attn=False, torch_dtype=torch.float32)
    return shrink.ready(model.eval().requires_grad_(False))


def run(model: torch.nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Everything that is compared, by the published code."""
    return {key: tensor.detach().float().numpy() for key, tensor in forward(model, arrays).items()}


def forward(model: torch.nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The published pieces in the order of predict_forward, teacher-forced."""
    data = {key: torch.from_numpy(array) for key, array in arrays.items()}
    dtype = next(model.text_hidden_fcs.parameters()).dtype
    data = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in data.items()}
    language = _internvl_language if hasattr(model, "vision_model") else _qwen_vl_language
    results, outputs = language(model, data)
    rows_B = torch.arange(len(data["seg_position"]))
    seg_state_BC = outputs.hidden_states[-1][rows_B, data["seg_position"]]
    results |= {"seg_state": seg_state_BC, "text_loss": outputs.loss[None]}
    given = model.grounding_encoder, data["sam2_images"], model.text_hidden_fcs(seg_state_BC)
    if dtype == torch.float32 and not torch.is_grad_enabled():  # in bf16 it counts on CUDA's autocast
        results["inference_logits"] = _inference_logits(*given)
    return results | _masks(*given)


def run_lora(model: torch.nn.Module, arrays: dict[str, np.ndarray], language: dict) -> dict[str, np.ndarray]:
    """LoRA on the language model's linears, A and B from the seed: results and gradients, in Llama's terms."""
    ranks = {"rank_pattern": {"wqkv": 3 * cases.LORA_RANK}, "alpha_pattern": {"wqkv": 3 * cases.LORA_ALPHA}}
    settings = LoraConfig(r=cases.LORA_RANK, lora_alpha=cases.LORA_ALPHA, target_modules=LINEARS, **ranks)
    wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False).eval()
    matrices = {}
    for key, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            path = cases.new_name(key.removeprefix("base_model.model.").replace(".default", ""))
            path = fused.llama_path(path)
            shape = tuple(parameter.shape)
            values = fused.join(path, shape, language) if "wqkv" in path else seeded.weight(path, shape)
            parameter.data.copy_(torch.from_numpy(values))
            matrices[path] = parameter
    results = forward(wrapped.get_base_model(), arrays)
    weights = torch.from_numpy(cases.mask_weights(tuple(results["logits"].shape)))
    (results["text_loss"].sum() + (results["logits"] * weights).sum()).backward()
    kept = {f"lora/{key}": results[key].detach().numpy() for key in ("seg_state", "text_loss", "logits")}
    for path, parameter in matrices.items():
        gradient = parameter.grad.numpy()
        parts = fused.split(path, gradient, language) if "wqkv" in path else {path: gradient}
        kept |= {f"gradient/{key}": part for key, part in parts.items()}
    return kept


def _class(published: dict) -> type:
    modeling = published["modeling"]
    return getattr(modeling, "Sa2VAChatModel", None) or modeling.Sa2VAChatModelQwen


def _internvl_language(model, data: dict) -> tuple[dict, object]:
    counts = list(cases.TILES) if len(data["tiles"]) == sum(cases.TILES) else [len(data["tiles"])]
    vision_tokens = model.extract_feature(data["tiles"]).flatten(0, 1)
    batch = {key: data[key] for key in ("input_ids", "attention_mask", "labels")}
    batch |= {"pixel_values": list(data["tiles"].split(counts)), "position_ids": None}
    return {"vision_tokens": vision_tokens}, model.forward(batch)


def _qwen_vl_language(model, data: dict) -> tuple[dict, object]:
    inner = model.model.model
    if hasattr(inner, "get_image_features"):
        vision = inner.get_image_features(data["patches"], data["grids_thw"])
    else:  # transformers before 4.52
        vision = (model.model.visual(data["patches"], grid_thw=data["grids_thw"]),)
    tokens, levels = vision if isinstance(vision[0], list | tuple) else (vision, [])
    results = {"vision_tokens": torch.cat(list(tokens))} | {f"deepstack{i}": level for i, level in enumerate(levels)}
    outputs = model.model(
        input_ids=data["input_ids"],
        attention_mask=data["attention_mask"].long(),
        labels=data["labels"],
        pixel_values=data["patches"],
        image_grid_thw=data["grids_thw"],
        output_hidden_states=True,
    )
    return results, outputs


def _masks(grounding_encoder, images_B3HW: torch.Tensor, embeddings_BD: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each image as a frame of its own, as in training; what the mask decoder got and gave is caught on the way."""
    predictor, caught = grounding_encoder.sam2_model, []
    heads = predictor._forward_sam_heads

    def catching(**given):
        result = heads(**given)
        fine, middle = given["high_res_features"]
        caught.append((fine, middle, given["backbone_features"], result[0], result[2], result[3][:, 0]))
        return result

    predictor._forward_sam_heads = catching
    try:
        grounding_encoder.inject_language_embd(_state(grounding_encoder, images_B3HW), [[one] for one in embeddings_BD])
    finally:
        del predictor._forward_sam_heads
    names = ("fpn0", "fpn1", "fpn2", "candidate_logits", "predicted_iou", "logits")
    return {name: torch.cat(parts) for name, parts in zip(names, zip(*caught, strict=True), strict=True)}


def _inference_logits(grounding_encoder, images_B3HW: torch.Tensor, embeddings_BD: torch.Tensor) -> torch.Tensor:
    """What predict_forward takes a sigmoid of: each image a video of one frame, propagated, at SAM2's own size."""
    videos = [_state(grounding_encoder, image[None]) for image in images_B3HW]
    pairs = zip(videos, embeddings_BD, strict=True)
    return torch.cat([grounding_encoder.language_embd_inference(video, [one[None]])[:, 0] for video, one in pairs])


def _state(grounding_encoder, images_B3HW: torch.Tensor) -> dict:
    state = grounding_encoder.get_sam2_embeddings(images_B3HW)
    state["device"] = state["storage_device"] = images_B3HW.device
    return state


def _singles(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The batch as two batches of one, without padding."""
    singles = []
    for row in range(2):
        length = int(arrays["attention_mask"][row].sum())
        one = {key: arrays[key][row : row + 1, :length] for key in ("input_ids", "attention_mask", "labels")}
        one |= {key: arrays[key][row : row + 1] for key in ("seg_position", "sam2_images")}
        if "tiles" in arrays:
            start = sum(cases.TILES[:row])
            one["tiles"] = arrays["tiles"][start : start + cases.TILES[row]]
        else:
            sizes = [int(np.prod(grid)) for grid in cases.GRIDS_THW]
            one["patches"] = arrays["patches"][sum(sizes[:row]) : sum(sizes[: row + 1])]
            one["grids_thw"] = arrays["grids_thw"][row : row + 1]
        singles.append(one)
    return singles


if __name__ == "__main__":
    main(sys.argv[1:])
