"""The gate: the shipped base segments what it is asked for, and its question steers the mask.

LoRA on the language model moves nothing but the [SEG] state. On a base whose decoder ignores it, no tuning can work.
"""

import json

import pytest
import torch
import yaml

from sft import card, gate, synthetic
from sft.metrics import counts, summarize
from sft.model import published
from sft.model.preprocess import ANSWER
from sft.model.sa2va import VisionFeatures, upsample
from sft.model.tiny import build_tokenizer

DIRECTORY = published.EMBEDDED
FIGURES = json.loads((DIRECTORY / "pretraining.json").read_text())
# Six of the card's 64 held-out scenes: two trees of different brightness each, so that every phrase occurs six times.
SEEDS = tuple(gate.HELD_OUT_SEED + index for index in (15, 20, 24, 35, 36, 43))
DICE_MARGIN, MEAN_MARGIN = 0.1, 0.03  # six scenes scatter around the card's 64
MOST_PARAMETERS, MOST_BYTES = 6_000_000, 12_000_000


@pytest.fixture(scope="module")
def base() -> published.Loaded:
    return published.load("embedded", dtype=torch.float32)


@pytest.fixture(scope="module")
def scenes() -> gate.Scenes:
    return gate.render(SEEDS, torch.device("cpu"))


def first(scenes: gate.Scenes, count: int) -> gate.Scenes:
    return gate.Scenes(scenes.images_N3HW[:count], scenes.planes_NHW[:count], scenes.present_NK[:count])


def test_every_phrase_is_segmented_nearly_as_well_as_the_card_says(base, scenes):
    assert scenes.present_NK.all(), "the renderer changed: these scenes no longer hold every phrase"
    figures = gate.evaluate(base.model, base.preprocess, scenes)
    floors = {phrase: dice - DICE_MARGIN for phrase, dice in FIGURES["gate"]["dice"].items()}
    assert set(floors) == set(gate.NAMES)
    below = {phrase: (dice, floors[phrase]) for phrase, dice in figures["dice"].items() if dice < floors[phrase]}
    assert not below, f"Dice below its floor: {below}"
    assert figures["mean_dice"] > FIGURES["gate"]["mean_dice"] - MEAN_MARGIN
    assert figures["spread"] > 0.7 * FIGURES["gate"]["spread"]


def test_the_gate_sees_a_base_that_ignores_its_question(base, scenes):
    def same_for_all(_module, _inputs, embedding):
        return embedding.mean(0, keepdim=True).expand_as(embedding)

    handle = base.model.text_hidden_fcs.register_forward_hook(same_for_all)
    figures = gate.evaluate(base.model, base.preprocess, first(scenes, 1))
    handle.remove()
    assert figures["spread"] < 1e-3
    assert figures["mean_dice"] < FIGURES["gate"]["mean_dice"] - 0.2
    assert not base.model.training  # evaluate leaves the mode as it was


@torch.no_grad()
def test_the_users_way_to_a_mask_is_as_good(base, scenes):
    """Through Preprocess, as in training: the gate resizes tiles in another way."""
    image_HW3 = scenes.images_N3HW[0].permute(1, 2, 0).numpy()
    image = base.preprocess.vision_input(image_HW3)
    vision = base.model.vision_features(image)
    features = base.model.sam2_features(base.preprocess.sam2_image(image_HW3)[None])
    prompt = base.preprocess.prompt(["Please segment the blood vessels in this image."], [image.layout])
    logits_1HW = upsample(base.model(prompt, vision, features).masks.logits_Bhw, image_HW3.shape[:2])
    masks_1HW = scenes.masks(torch.tensor([0]), torch.tensor([[gate.NAMES.index("blood vessels")]]))[0]
    gated = gate.evaluate(base.model, base.preprocess, first(scenes, 1))["dice"]["blood vessels"]
    assert summarize(counts(logits_1HW, masks_1HW))["dice"] == pytest.approx(gated, abs=0.01)


@torch.no_grad()
def test_greedy_decoding_says_the_answer_to_every_question(base, scenes):
    preprocess, model = base.preprocess, base.model
    end = preprocess.stop_token_ids[-1]
    pictures = (scenes.images_N3HW[row].permute(1, 2, 0).numpy() for row in (0, 3))
    images = [preprocess.vision_input(picture) for picture in pictures]
    vision, layouts = VisionFeatures.join([model.vision_features(image) for image in images]), [(1, 8, 8)] * 2
    assert [image.layout for image in images] == layouts
    for phrase in gate.NAMES:
        for question in gate.QUESTIONS:
            text = question.format(f"the {phrase}")
            length = len(preprocess.question_ids(text, layouts[0]))
            asked = preprocess.prompt([text] * 2, layouts).first(length)
            for answer in model.generate(asked, vision, [end], 8).tolist():
                assert answer == preprocess.answer_ids(), (phrase, question)
    stopped = model.generate(asked, vision, preprocess.stop_token_ids, 8)  # as validation's seg_rate decodes
    assert stopped[:, -1].tolist() == [preprocess.seg_token_id] * 2
    assert preprocess.tokenizer.decode(preprocess.answer_ids()[:-1]).replace(" ", "") == ANSWER.replace(" ", "")


def test_all_parts_are_there_and_small(base):
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    assert parameters == FIGURES["parameters"] <= MOST_PARAMETERS
    assert sum(file.stat().st_size for file in DIRECTORY.iterdir()) <= MOST_BYTES
    parts = dict(base.model.named_children())
    assert set(parts) == {"vision_model", "mlp1", "language_model", "grounding_encoder", "text_hidden_fcs"}
    for name, parameter in base.model.named_parameters():
        assert parameter.isfinite().all(), name


def test_its_tokenizer_is_the_one_the_code_makes(base):
    made, shipped = build_tokenizer(gate.NAMES), base.preprocess.tokenizer
    assert made.get_vocab() == shipped.get_vocab()
    text = base.preprocess.template.question.format("Segment the thin dark vessels.\n") + ANSWER
    assert made.encode(text) == shipped.encode(text) and shipped.unk_token_id not in shipped.encode(text)
    # A phrase is words, and each is one token of its own.
    assert len(shipped.encode("thin dark vessels", add_special_tokens=False)) == 3


def test_the_card_is_up_to_date():
    text = (DIRECTORY / "README.md").read_text(encoding="utf-8")
    assert card.refresh(DIRECTORY) == text, "run python -m sft.card sft/assets/tiny_sa2va"
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["renderer_version"] == synthetic.GENERATOR_VERSION, "the renderer changed: train the base anew"
    assert front["license"] == "apache-2.0"
    for phrase in gate.NAMES:
        assert phrase in text
