"""Protects the native Qwen-VL families: vision tokens, positions, which state feeds the mask, greedy decoding."""

import dataclasses
import math

import pytest
import small_qwen as small
import torch

from sft.config import TrainConfig
from sft.model import lora
from sft.model.sa2va import Prompt, Sam2Features, VisionFeatures

QUESTIONS = [small.QUESTION, small.LONGER]


@pytest.fixture(params=small.FAMILIES, scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def batch(family):
    """Two images of different size with questions of different length: vision features, layouts, SAM2 features."""
    return small.inputs(small.model(family), family, 2)


def prompt_of(family, layouts, *, with_labels=False) -> Prompt:
    return small.preprocess(family).prompt(QUESTIONS[: len(layouts)], layouts, with_labels=with_labels)


def lengths_of(family, layouts, prompt) -> list[int]:
    """Tokens of each row without the padding."""
    chosen = QUESTIONS[: len(layouts)]
    asked = [len(small.preprocess(family).question_ids(*pair)) for pair in zip(chosen, layouts, strict=True)]
    answer = prompt.input_ids_BL.shape[1] - max(asked)
    return [count + answer for count in asked]


def whole_forward(family, model, prompt, lengths):
    """transformers' own forward from pixels and ids with a padding mask: its output, and what its last layer gave."""
    images = [small.preprocess(family).vision_input(picture) for picture in small.images(len(lengths))]
    mask_BL = torch.arange(prompt.input_ids_BL.shape[1]) < torch.tensor(lengths)[:, None]
    grids = torch.tensor([[1, 2 * image.layout[1], 2 * image.layout[2]] for image in images])
    seen = []
    handle = model.decoder.layers[-1].register_forward_hook(lambda _m, _i, output: seen.append(output))
    outputs = model.model(
        input_ids=prompt.input_ids_BL,
        attention_mask=mask_BL.long(),
        pixel_values=torch.cat([image.pixels for image in images]),
        image_grid_thw=grids,
        mm_token_type_ids=(prompt.input_ids_BL == model.image_token_id).int(),
    )
    handle.remove()
    last = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return outputs.logits, last, (grids, mask_BL)


@torch.no_grad()
def test_states_equal_transformers_own_forward_from_pixels(family, batch):
    """Two images, two lengths, padding: the native parts against one call of the library's whole model."""
    vision, layouts, _ = batch
    model, prompt = small.model(family), prompt_of(family, layouts, with_labels=True)
    lengths = lengths_of(family, layouts, prompt)
    assert layouts[0] != layouts[1] and lengths[0] != lengths[1]
    logits, before_norm, _ = whole_forward(family, model, prompt, lengths)
    states = model.hidden_states(prompt, vision)
    for row, length in enumerate(lengths):
        ours = model.head(states.normed_BLC[row, :length])
        torch.testing.assert_close(ours, logits[row, :length], atol=2e-5, rtol=2e-5)
        expected = before_norm if family == "qwen3_vl" else model.decoder.norm(before_norm)
        torch.testing.assert_close(states.seg_BLC[row, :length], expected[row, :length], atol=2e-5, rtol=2e-5)
    assert not torch.allclose(before_norm, model.decoder.norm(before_norm), atol=0.1)  # the two are not alike


@torch.no_grad()
def test_position_ids_equal_transformers_own(family, batch):
    _, layouts, _ = batch
    model, prompt = small.model(family), prompt_of(family, layouts, with_labels=True)
    lengths = lengths_of(family, layouts, prompt)
    grids, mask_BL = whole_forward(family, model, prompt, lengths)[2]
    kinds = (prompt.input_ids_BL == model.image_token_id).int()
    expected, _ = model.model.model.get_rope_index(
        prompt.input_ids_BL, mm_token_type_ids=kinds, image_grid_thw=grids, attention_mask=mask_BL
    )
    for row, length in enumerate(lengths):
        assert torch.equal(prompt.position_ids_3BL[:, row, :length], expected[:, row, :length])


@torch.no_grad()
def test_the_mask_comes_from_the_seg_state_of_the_family(family, batch):
    vision, layouts, features = batch
    model, prompt = small.model(family), prompt_of(family, layouts)
    output, states = model(prompt, vision, features), model.hidden_states(prompt, vision)
    source = states.seg_BLC if family == "qwen3_vl" else states.normed_BLC
    for row, position in enumerate(prompt.seg_position_B.tolist()):
        assert prompt.input_ids_BL[row, position] == small.preprocess(family).seg_token_id
        torch.testing.assert_close(output.seg_state_BC[row], source[row, position])
    embedding = model.text_hidden_fcs(output.seg_state_BC)[:, None]
    assert torch.equal(model.decode_masks(embedding, features).logits_Bhw, output.masks.logits_Bhw)


@torch.no_grad()
def test_padding_and_neighbours_change_nothing(family, batch):
    vision, layouts, features = batch
    model, preprocess = small.model(family), small.preprocess(family)
    together = model(prompt_of(family, layouts, with_labels=True), vision, features)
    counts = [math.prod(layout) for layout in layouts]
    for row, layout in enumerate(layouts):
        deepstack = None if vision.deepstack_KMC is None else vision.deepstack_KMC.split(counts, dim=1)[row]
        own = VisionFeatures(vision.tokens_MC.split(counts)[row], deepstack)
        parts = (features.level0_BCHW, features.level1_BCHW, features.embedding_BDHW)
        sam2 = Sam2Features(*(part[row : row + 1] for part in parts), features.projected)
        alone = model(preprocess.prompt([QUESTIONS[row]], [layout]), own, sam2)
        torch.testing.assert_close(together.masks.logits_Bhw[row], alone.masks.logits_Bhw[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_deepstack_maps_matter_and_belong_to_qwen3_alone(batch, family):
    vision, layouts, features = batch
    if family == "qwen2_5_vl":
        assert vision.deepstack_KMC is None
        return
    assert vision.deepstack_KMC.shape == (2, len(vision.tokens_MC), 32)
    model, prompt = small.model(family), prompt_of(family, layouts)
    without = dataclasses.replace(vision, deepstack_KMC=0 * vision.deepstack_KMC)
    states = [model(prompt, one, features).seg_state_BC for one in (vision, without)]
    assert (states[0] - states[1]).abs().max() > 0.01


@torch.no_grad()
def test_the_head_runs_on_labelled_positions_alone_and_on_the_normed_state(family, batch):
    vision, layouts, features = batch
    model, seen = small.model(family), []
    handle = model.head.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    model(prompt_of(family, layouts), vision, features)
    assert seen == []
    prompt = prompt_of(family, layouts, with_labels=True)
    loss = model(prompt, vision, features).text_loss
    handle.remove()
    answer = small.preprocess(family).answer_ids()
    assert [tuple(one.shape) for one in seen] == [(2 * len(answer), 32)]
    logits = whole_forward(family, model, prompt, lengths_of(family, layouts, prompt))[0]
    terms = []
    for ids, position, row in zip(prompt.input_ids_BL, prompt.seg_position_B.tolist(), logits, strict=True):
        first = position - answer.index(small.preprocess(family).seg_token_id)
        terms += [-row[place - 1].log_softmax(-1)[ids[place]] for place in range(first, first + len(answer))]
    torch.testing.assert_close(loss, torch.stack(terms).mean(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_generation_equals_transformers_own_from_pixels(family):
    """The cached steps against whole forward passes over the growing text, and where it ends."""
    model, preprocess = small.model(family), small.preprocess(family)
    vision, layouts, _ = small.inputs(model, family, 1)
    length = len(preprocess.question_ids(small.QUESTION, layouts[0]))
    question = preprocess.prompt([small.QUESTION], layouts).first(length)
    ids, expected = question.input_ids_BL, []
    for _ in range(6):
        prompt = Prompt(ids, question.seg_position_B)
        token = whole_forward(family, model, prompt, [ids.shape[1]])[0][0, -1].argmax()
        expected.append(int(token))
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
    unseen = next(token for token in range(96) if token not in expected)
    assert model.generate(question, vision, [unseen], 6).tolist() == [expected]
    stop = expected[2]
    assert model.generate(question, vision, [stop], 6).tolist() == [expected[: expected.index(stop) + 1]]


def test_checkpointing_recomputes_every_layer_and_every_lora_b_gets_the_same_gradient(family, batch):
    plain, plain_calls = lora_gradients(family, batch, checkpointing=False)
    checkpointed, calls = lora_gradients(family, batch, checkpointing=True)
    assert plain_calls == 3 and calls == 6
    assert len(plain) == 2 * 3 * 7 and set(plain) == set(checkpointed)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)
        assert gradient.abs().max() > 0, f"{name} has no gradient"


def lora_gradients(family, batch, *, checkpointing: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of every LoRA matrix (B made non-zero, so that A has one), and how often a layer's attention ran."""
    vision, layouts, features = batch
    model = small.build(family)
    peft_model = lora.wrap(model, TrainConfig(lora_rank=2, lora_dropout=0.0))
    for name, parameter in peft_model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(4))
    if checkpointing:
        model.layers.recomputed_layers = len(model.decoder.layers)
    calls = []
    for layer in model.decoder.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    peft_model.train()
    peft_model(prompt_of(family, layouts), vision, features).masks.logits_Bhw.square().mean().backward()
    return {name: p.grad for name, p in peft_model.named_parameters() if p.requires_grad}, len(calls)


@torch.no_grad()
def test_bf16_runs_and_the_text_loss_stays_fp32(family):
    model = small.build(family).to(torch.bfloat16)
    image = small.preprocess(family).vision_input(small.images(1)[0])
    vision = model.vision_features(image.to("cpu", torch.bfloat16))
    features = model.sam2_features(small.preprocess(family).sam2_image(small.images(1)[0])[None].bfloat16())
    output = model(prompt_of(family, [image.layout], with_labels=True), vision, features)
    assert output.masks.logits_Bhw.dtype == torch.bfloat16 and output.masks.logits_Bhw.isfinite().all()
    assert output.text_loss.dtype == torch.float32 and output.text_loss.isfinite()


def test_lora_matches_the_text_decoders_linears_alone(family):
    """Qwen2.5-VL's vision MLP has a gate_proj, an up_proj and a down_proj too."""
    peft_model = lora.wrap(small.build(family), TrainConfig(lora_rank=2))
    found = {name.removesuffix(".lora_A") for name, _ in peft_model.named_modules() if name.endswith(".lora_A")}
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    root = "base_model.model.model.model.language_model.layers"
    expected = {
        f"{root}.{layer}.{'self_attn' if kind[0] in 'qkvo' else 'mlp'}.{kind}" for layer in range(3) for kind in kinds
    }
    assert found == expected
    assert lora.describe(peft_model, TrainConfig(lora_rank=2))[0].startswith("LoRA on language_model: 21 linears")
