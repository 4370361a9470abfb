"""A user's own checkpoint: our native model against the directory's own remote code, on one image.

Takes a directory and an image; gives the two sides' figures, a verdict, `verify.png` and `verify.json`. The remote code
runs in a process of its own (`published_side`), and only when the caller says so. Does not know the command line.

Shapes: H x W the image, K = 3 candidate masks.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from sft.model import published
from sft.model.preprocess_qwen import PreprocessQwen
from sft.predict import Prediction, forced_answer, predict
from sft.verify import compare, picture
from sft.verify.published_side import SCRIPT, run_published

PUBLISHED_SIDE_PX = 1024  # the published code resizes logits to SAM2's input first, then to the image
REPORT, PICTURE, LOG = "verify.json", "verify.png", "published.log"


@dataclasses.dataclass(frozen=True)
class NativeSide:
    """What our model computed, and what the other side is compared with."""

    prediction: Prediction
    forced: Prediction
    """The mask after the training's answer; the same object where that is what the model says anyway."""
    arrays: dict[str, np.ndarray]
    seg_token_id: int
    text: str
    """What the published predict_forward is to be asked, so that its prompt is ours."""


def native_side(
    model_path: str, image_HW3: np.ndarray, question: str, *, precision: str, device: str, max_answer_tokens: int
) -> NativeSide:
    """Loads the directory natively, answers and segments; the model is gone again when this returns."""
    torch.backends.cudnn.allow_tf32 = False  # fp32 is to be fp32 on both sides
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    loaded = published.load(model_path, dtype=dtype, device=device)
    own = predict(loaded, image_HW3, question, max_answer_tokens=max_answer_tokens)
    same_words = own.forced or own.answer_ids == loaded.preprocess.forced_ids
    forced = own if same_words else predict(loaded, image_HW3, question, forced=True, max_answer_tokens=1)
    arrays = record(own)
    if isinstance(loaded.preprocess, PreprocessQwen):
        frames, rows, columns = (int(count) for count in own.layout)
        merge = loaded.preprocess.merge
        arrays["image_grid_thw"] = np.array([[frames, rows * merge, columns * merge]])
    return NativeSide(own, forced, arrays, loaded.preprocess.seg_token_id, f"<image>\n{question}")


def record(prediction: Prediction) -> dict[str, np.ndarray]:
    """A prediction's figures by the names that `compare` knows."""
    arrays = {name: tensor.numpy() for name, tensor in prediction.vision.items()}
    arrays |= {"input_ids": prediction.input_ids_L.numpy(), "answer_ids": np.array(prediction.answer_ids, np.int64)}
    if not prediction.forced:
        candidates_KHW = prediction.masks.candidate_logits_BKhw[0]
        side = functional.interpolate(candidates_KHW[None], (PUBLISHED_SIDE_PX,) * 2, mode="bilinear")
        final = functional.interpolate(side, prediction.mask_logits_HW.shape, mode="bilinear")[0]
        arrays |= {
            "seg_state": prediction.seg_state_C.numpy(),
            "candidate_logits": candidates_KHW.numpy(),
            "predicted_iou": prediction.masks.predicted_iou_BK[0].numpy(),
            "mask_logits": final.numpy(),
        }
    return arrays


def side_by_side(
    native: NativeSide,
    python: Path,
    directory: Path,
    image_HW3: np.ndarray,
    output: Path,
    *,
    precision: str,
    max_answer_tokens: int,
    say: Callable[[str], None],
    script: Path = SCRIPT,
) -> bool:
    """Runs the published side, says table and verdict, writes picture and report; returns whether all is the same."""
    started_s = time.monotonic()
    theirs = run_published(
        python,
        directory,
        image_HW3,
        native.text,
        precision=precision,
        max_answer_tokens=max_answer_tokens,
        log=output / LOG,
        script=script,
    )
    versions = ", ".join(f"{name} {version}" for name, version in theirs.versions.items())
    say(f"published: answered in {time.monotonic() - started_s:.0f} s on {theirs.device} ({versions})")
    say(f"  its answer: {theirs.answer!r}")
    rows = compare.compare(native.arrays, theirs.arrays, precision, native.seg_token_id)
    same, line = compare.verdict(rows)
    say(f"\n{compare.table(rows)}\n")
    for remark in _remarks(native, theirs.arrays, precision, same):
        say(remark)
    _write(output, native, image_HW3, theirs.arrays.get("mask"), f"{line}, {precision}", rows, theirs.answer)
    say(f"verdict: {line}")
    return same


def write_native_alone(native: NativeSide, image_HW3: np.ndarray, output: Path) -> None:
    """The picture and the report where nothing is compared."""
    _write(output, native, image_HW3, None, "not compared", [], None)


def answer_remarks(native: NativeSide) -> list[str]:
    """What is to be said about the native answer and what its mask follows."""
    own, forced = native.prediction, native.forced
    lines = [f"  its answer: {own.answer!r}"]
    if not own.says_seg:
        lines.append(f"  it does not say [SEG]: the mask follows {forced_answer()!r}, put in its mouth as in training")
    elif forced is not own:
        lines.append(
            f"  not the {forced_answer()!r} of training and validation: the mask follows the model's own words; after "
            f"the training's words its Dice with this one is {_dice(own, forced):.4f}"
        )
    height, width = own.mask_logits_HW.shape
    share = (own.mask_logits_HW > 0).float().mean().item()
    return [*lines, f"  its mask: {width}x{height}, {share:.2%} of the pixels are vessel"]


def _remarks(native: NativeSide, theirs: dict[str, np.ndarray], precision: str, same: bool) -> list[str]:
    remarks = []
    if precision == "bf16":
        remarks.append("u = 2^-8, one rounding to bf16; how many add up depends on the checkpoint's depth")
        if not same:
            remarks.append("bf16 alone cannot tell rounding from error: compare again with --precision fp32")
    if "mask" in theirs and not native.prediction.forced:
        ours_HW = native.prediction.mask_logits_HW.numpy() > 0
        if ours_HW.shape == theirs["mask"].shape:
            count = int((ours_HW != theirs["mask"]).sum())
            remarks.append(
                f"in training and export the logits go to the image's size in one step, not by way of 1024x1024 as in "
                f"the published code: with that {count:,} of {ours_HW.size:,} pixels differ, on outlines"
            )
    return remarks


def _write(
    output: Path,
    native: NativeSide,
    image_HW3: np.ndarray,
    mask_HW: np.ndarray | None,
    line: str,
    rows: list[compare.Row],
    answer: str | None,
) -> None:
    ours_HW = native.prediction.mask_logits_HW.numpy() > 0
    if mask_HW is not None and "mask_logits" in native.arrays:  # as it was compared
        ours_HW = native.arrays["mask_logits"][int(native.arrays["predicted_iou"].argmax())] > 0
    if mask_HW is not None and mask_HW.shape != ours_HW.shape:
        mask_HW = None
    picture.side_by_side(output / PICTURE, image_HW3, ours_HW, mask_HW, line)
    report = {
        "verdict": line,
        "native_answer": native.prediction.answer,
        "published_answer": answer,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    (output / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _dice(first: Prediction, second: Prediction) -> float:
    one_HW, other_HW = first.mask_logits_HW > 0, second.mask_logits_HW > 0
    total = int(one_HW.sum() + other_HW.sum())
    return 2 * int((one_HW & other_HW).sum()) / total if total else 1.0
