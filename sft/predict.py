"""One image and one question -> the answer in words and the mask at the image's own size.

Takes a loaded checkpoint, gives a `Prediction`; what its parts hand on is kept for those who compare or draw. Does not
know files, truth or training.

Shapes: H x W the image, h x w the mask decoder's grid (256 x 256 in the published models), L tokens, C width of the
language model, K = 3 candidate masks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sft.model.preprocess import ANSWER
from sft.model.published import Loaded
from sft.model.sa2va import Layout, Masks, Prompt, upsample

MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the model says about one image; all tensors in fp32 on the CPU."""

    answer: str
    """The greedy answer up to and with [SEG]; all of it if it does not say [SEG]."""
    answer_ids: list[int]
    says_seg: bool
    """Whether the greedy answer arrives at [SEG]."""
    forced: bool
    """Whether the mask follows "Sure, [SEG]." put in the model's mouth, as in training, and not its own answer."""
    mask_logits_HW: Tensor
    """At the image's size; vessel where above 0."""
    masks: Masks
    """On the mask decoder's grid, one row."""
    seg_state_C: Tensor
    input_ids_L: Tensor
    """The prompt, without the answer."""
    vision: dict[str, Tensor]
    """What the image became: `pixel_values` for the vision encoder, `vision_tokens`, and `sam2_image`."""
    layout: Layout
    """Of the vision tokens."""


@torch.no_grad()
def predict(
    loaded: Loaded,
    image_HW3: np.ndarray,
    question: str,
    *,
    forced: bool = False,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
) -> Prediction:
    """Answers a question about an image and segments what the answer's [SEG] means.

    The mask follows the model's own greedy answer, as in the published `predict_forward`. A model that does not say
    [SEG] has the answer of the training put in its mouth; `Prediction.forced` then says so.

    Args:
        loaded: from `published.load`.
        image_HW3: uint8 RGB of any size.
        question: for instance "Please segment the blood vessels in this image."
        forced: always put the training's answer in its mouth.
        max_answer_tokens: where a greedy answer without an end is cut off.
    """
    model, preprocess = loaded.model, loaded.preprocess
    reference = model.text_hidden_fcs[0].weight
    image = preprocess.vision_input(image_HW3).to(reference.device, reference.dtype)
    sam2_image = preprocess.sam2_image(image_HW3)
    vision = model.vision_features(image)
    question_ids = preprocess.question_ids(question, image.layout)

    def prompt(ids: list[int]) -> Prompt:
        ids_1L = torch.tensor([ids])
        positions = preprocess.position_ids(ids_1L, [image.layout])
        return Prompt(ids_1L, torch.tensor([len(ids) - 1]), None, positions).to(reference.device)

    asked = prompt(question_ids)
    answer_ids = model.generate(asked, vision, preprocess.stop_token_ids, max_answer_tokens)[0].tolist()
    says_seg = preprocess.seg_token_id in answer_ids
    own_answer = says_seg and not forced
    spoken = answer_ids if own_answer else preprocess.forced_ids
    output = model(prompt(question_ids + spoken), vision, sam2_image[None].to(reference))
    masks = Masks(*(tensor.float().cpu() for tensor in vars(output.masks).values()))
    return Prediction(
        answer=preprocess.tokenizer.decode(answer_ids).strip(),
        answer_ids=answer_ids,
        says_seg=says_seg,
        forced=not own_answer,
        mask_logits_HW=upsample(masks.logits_Bhw, image_HW3.shape[:2])[0],
        masks=masks,
        seg_state_C=output.seg_state_BC[0].float().cpu(),
        input_ids_L=torch.tensor(question_ids),
        vision={
            "pixel_values": image.pixels.float().cpu(),
            "vision_tokens": vision.tokens_MC.float().cpu(),
            "sam2_image": sam2_image.to(reference.dtype).float(),
        },
        layout=image.layout,
    )


def forced_answer() -> str:
    """What training puts in the model's mouth, up to [SEG]."""
    return ANSWER.partition("[SEG]")[0] + "[SEG]"
