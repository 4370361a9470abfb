"""Protects prediction: the mask follows the model's own words, or the training's where it says no [SEG]."""

from pathlib import Path

import numpy as np
import pytest
import small_qwen
import small_sa2va as small
import torch
from small_saying import SAID, loaded_that_says, teach

from sft.model.published import Loaded
from sft.model.sa2va import Prompt, upsample
from sft.predict import forced_answer, predict

IMAGE = small.images(2)[1]  # 112 x 56: two tiles and a thumbnail


@pytest.fixture(scope="module")
def speaking():
    return loaded_that_says(SAID, IMAGE)


def test_the_mask_follows_what_the_model_says(speaking):
    """By hand: the state at the last token of question + own answer, decoded and resized."""
    made = predict(speaking, IMAGE, small.QUESTION)
    model, preprocess = speaking.model, speaking.preprocess
    tokens = preprocess.tokenizer.convert_ids_to_tokens(made.answer_ids)
    assert tokens == SAID.split() and made.says_seg and not made.forced
    image = preprocess.vision_input(IMAGE)
    ids = preprocess.question_ids(small.QUESTION, image.layout) + made.answer_ids
    prompt = Prompt(torch.tensor([ids]), torch.tensor([0]))
    state = model.hidden_states(prompt, model.vision_features(image)).seg_BLC[:, -1]
    features = model.sam2_features(preprocess.sam2_image(IMAGE)[None])
    masks = model.decode_masks(model.text_hidden_fcs(state)[:, None], features)
    torch.testing.assert_close(made.seg_state_C, state[0])
    torch.testing.assert_close(made.masks.candidate_logits_BKhw, masks.candidate_logits_BKhw)
    torch.testing.assert_close(made.mask_logits_HW, upsample(masks.logits_Bhw, (56, 112))[0])
    assert made.mask_logits_HW.shape == (56, 112) and made.mask_logits_HW.dtype == torch.float32


def test_forced_is_what_training_computes(speaking):
    """Equal to a forward pass on the training's prompt; its words differ from this model's own."""
    made = predict(speaking, IMAGE, small.QUESTION, forced=True)
    image = speaking.preprocess.vision_input(IMAGE)
    prompt = speaking.preprocess.prompt([small.QUESTION], [image.layout])
    output = speaking.model(prompt, speaking.model.vision_features(image), speaking.preprocess.sam2_image(IMAGE)[None])
    assert made.forced and made.says_seg
    torch.testing.assert_close(made.seg_state_C, output.seg_state_BC[0])
    own = predict(speaking, IMAGE, small.QUESTION)
    assert not torch.allclose(made.seg_state_C, own.seg_state_C, atol=1e-3)


def test_a_model_that_does_not_say_seg_is_told_apart():
    """The mask is then the training's, and `forced` says so; the answer is cut where it is told to be."""
    loaded = loaded_that_says("Please Please Please", IMAGE)
    made = predict(loaded, IMAGE, small.QUESTION, max_answer_tokens=3)
    assert not made.says_seg and made.forced and len(made.answer_ids) <= 3
    told = predict(loaded, IMAGE, small.QUESTION, forced=True, max_answer_tokens=1)
    assert torch.equal(made.mask_logits_HW, told.mask_logits_HW)


@pytest.mark.parametrize("shape", [(1, 1, 3), (20, 300, 3)])
def test_any_size_of_image_gets_a_mask_of_its_size(speaking, shape):
    image = np.full(shape, 90, np.uint8)
    made = predict(speaking, image, small.QUESTION, max_answer_tokens=2)
    assert made.mask_logits_HW.shape == shape[:2] and made.mask_logits_HW.isfinite().all()


@pytest.mark.parametrize("family", small_qwen.FAMILIES)
def test_qwen_vl(family):
    """Its prompts carry positions, and Qwen3-VL's [SEG] state is another: the forced mask is the forward pass's."""
    preprocess = small_qwen.preprocess(family)
    model = small_qwen.build(family)
    teach(model, preprocess, "It is [SEG]", IMAGE)
    loaded = Loaded(model, preprocess, Path("small"))
    made = predict(loaded, IMAGE, small.QUESTION)
    assert preprocess.tokenizer.convert_ids_to_tokens(made.answer_ids) == SAID.split() and not made.forced
    told = predict(loaded, IMAGE, small.QUESTION, forced=True)
    image = preprocess.vision_input(IMAGE)
    prompt = preprocess.prompt([small.QUESTION], [image.layout])
    output = model(prompt, model.vision_features(image), preprocess.sam2_image(IMAGE)[None])
    torch.testing.assert_close(told.seg_state_C, output.seg_state_BC[0])
    assert made.mask_logits_HW.shape == (56, 112)


def test_the_forced_answer_ends_at_seg():
    assert forced_answer() == "Sure, [SEG]"
