"""Runs a published directory's own remote code on one image and notes what it computes. Started by launch/verify.py.

    python published_side.py REQUEST.json

Runs under the Python in which the published model works (launch/published_requirements.txt); knows nothing of this
project. The request names the directory, an RGB array, the text and where to write; `predict_forward` runs as its
authors wrote it, and what it passes between its parts is noted on the way:

- input_ids, pixel_values and, for Qwen-VL, image_grid_thw: what `generate` is given;
- vision_tokens; sam2_image; answer_ids: all tokens of the greedy answer;
- seg_state: what `text_hidden_fcs` is given for the first [SEG];
- candidate_logits and predicted_iou: of the three masks on the mask decoder's grid; mask: the final one.

Three things of it are changed in memory: `.cuda()` and "cuda" stay on the CPU where there is no GPU; in fp32 nothing is
rounded to bf16 in between (its input types and its autocast say bf16 whatever the weights are); an answer ends after
as many tokens as the request says, not after 2,048.
"""

import contextlib
import functools
import inspect
import json
import sys
from collections.abc import Callable

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module


def main(request_file: str) -> None:
    """Does what the request says and writes arrays (.npz) and words (.json)."""
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    fp32 = request["precision"] == "fp32"
    if fp32:
        torch.backends.cudnn.allow_tf32 = False
    if not torch.cuda.is_available():
        stay_on_cpu()
    model = load(request, torch.float32 if fp32 else torch.bfloat16)
    speaker = load_speaker(model, request["directory"])
    if fp32:
        keep_fp32(model, speaker)
    noted = {}
    note(model, noted, request["max_answer_tokens"])
    image = Image.fromarray(np.load(request["image"]))
    with torch.no_grad():
        result = model.predict_forward(image=image, text=request["text"], **speaker)
    if result["prediction_masks"]:
        noted["mask"] = np.asarray(result["prediction_masks"][0][0], dtype=bool)
    np.savez(request["arrays"], **noted)
    words = {
        "answer": result["prediction"],
        "masks": len(result["prediction_masks"]),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    with open(request["words"], "w", encoding="utf-8") as file:
        json.dump(words, file)


def load(request: dict, dtype: torch.dtype) -> torch.nn.Module:
    """The model by the directory's own classes."""
    directory = request["directory"]
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    named = getattr(config, "auto_map", None) or {}
    name, auto = next(
        ((named[auto.__name__], auto) for auto in (AutoModel, AutoModelForCausalLM) if auto.__name__ in named),
        (None, None),
    )
    if auto is None:
        raise SystemExit(f"{directory}/config.json: its auto_map names no AutoModel and no AutoModelForCausalLM")
    takes = inspect.signature(get_class_from_dynamic_module(name, directory).__init__).parameters
    options = {"use_flash_attn": False} if "use_flash_attn" in takes else {}
    model = auto.from_pretrained(directory, trust_remote_code=True, torch_dtype=dtype, **options).eval()
    return model.cuda() if torch.cuda.is_available() else model


def load_speaker(model: torch.nn.Module, directory: str) -> dict:
    """The tokenizer, and for Qwen-VL the processor, as predict_forward takes them."""
    if hasattr(model, "vision_model"):
        return {"tokenizer": AutoTokenizer.from_pretrained(directory, trust_remote_code=True)}
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    return {"processor": processor, "tokenizer": processor.tokenizer}


def stay_on_cpu() -> None:
    """Makes moves to a GPU stay where they are, and its autocast the CPU's."""
    autocast = torch.autocast
    torch.autocast = lambda device_type, **options: autocast("cpu" if device_type == "cuda" else device_type, **options)
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
    torch.nn.Module.cuda = lambda module, *args, **kwargs: module


def keep_fp32(model: torch.nn.Module, speaker: dict) -> None:
    """Takes out what rounds to bf16 whatever the weights are: input types, ImageNet's statistics, autocast."""
    torch.autocast = lambda *args, **kwargs: contextlib.nullcontext()
    encoder = model.grounding_encoder
    encoder.preprocess_image = functools.partial(encoder.preprocess_image, dtype=torch.float32)
    if hasattr(model, "preparing_for_generation"):
        model.preparing_for_generation(tokenizer=speaker["tokenizer"], torch_dtype=torch.float32)
    model.torch_dtype = torch.float32


def note(model: torch.nn.Module, noted: dict, max_answer_tokens: int) -> None:
    """Wraps the places where one part of the model hands over to the next."""

    def keep(name: str, value: torch.Tensor) -> None:
        if name not in noted:  # the first [SEG] is the one that counts
            value = value.detach().cpu()
            noted[name] = (value.float() if value.is_floating_point() else value).numpy()

    note_generation(model, keep, max_answer_tokens)
    encoder = model.grounding_encoder
    model.text_hidden_fcs.register_forward_pre_hook(
        lambda _module, given: keep("seg_state", given[0][0]) if len(given[0]) else None
    )
    embeddings, heads = encoder.get_sam2_embeddings, encoder.sam2_model._forward_sam_heads

    @functools.wraps(embeddings)
    def noting_image(images):
        keep("sam2_image", images[0])
        state = embeddings(images)
        if not torch.cuda.is_available():
            state["device"] = state["storage_device"] = torch.device("cpu")
        return state

    @functools.wraps(heads)
    def noting_masks(*args, **kwargs):
        result = heads(*args, **kwargs)
        keep("candidate_logits", result[0][0])
        keep("predicted_iou", result[2][0])
        return result

    encoder.get_sam2_embeddings, encoder.sam2_model._forward_sam_heads = noting_image, noting_masks


def note_generation(model: torch.nn.Module, keep: Callable, max_answer_tokens: int) -> None:
    """Prompt, pixels, vision tokens and answer; the two families hold them in different places."""
    is_internvl = hasattr(model, "vision_model")
    owner = model if is_internvl else model.model
    generate = owner.generate

    @functools.wraps(generate)
    def noting(*args, **kwargs):
        for name in ("input_ids", "pixel_values", "image_grid_thw"):
            if kwargs.get(name) is not None:
                keep(name, kwargs[name][0] if name == "input_ids" else kwargs[name])
        if kwargs.get("generation_config") is not None:
            kwargs["generation_config"].max_new_tokens = max_answer_tokens
        else:
            kwargs["max_new_tokens"] = max_answer_tokens
        output = generate(*args, **kwargs)
        prompt_length = 0 if is_internvl else kwargs["input_ids"].shape[1]
        keep("answer_ids", output.sequences[0][prompt_length:])
        return output

    owner.generate = noting
    if is_internvl:
        extract = model.extract_feature

        @functools.wraps(extract)
        def noting_tokens(pixel_values):
            tokens = extract(pixel_values)
            keep("vision_tokens", tokens.flatten(0, 1))
            return tokens

        model.extract_feature = noting_tokens
    else:
        visual = model.model.model.visual
        visual.register_forward_hook(
            lambda _module, _given, out: keep("vision_tokens", out[0] if isinstance(out, tuple) else out)
        )


if __name__ == "__main__":
    main(sys.argv[1])
