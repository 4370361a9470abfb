"""Protects the native model: where the [SEG] state is read, what the mask decoder gets, what is not computed."""

import dataclasses
import math

import pytest
import small_sa2va as small
import torch
from torch.nn import functional

from sft.config import TrainConfig
from sft.model import lora, sa2va_internvl
from sft.model.sa2va import Prompt, Sam2Features, VisionFeatures, upsample

QUESTIONS = [small.QUESTION, small.LONGER, small.QUESTION]


@pytest.fixture(scope="module")
def batch():
    """Three samples of 1, 3 and 1 tiles with questions of different length: vision tokens, layouts, features."""
    return small.inputs(small.model(), 3)


def prompt_of(layouts, *, with_labels=False) -> Prompt:
    return small.preprocess().prompt(QUESTIONS[: len(layouts)], layouts, with_labels=with_labels)


def row(features: Sam2Features, index: int) -> Sam2Features:
    parts = (features.level0_BCHW, features.level1_BCHW, features.embedding_BDHW)
    return Sam2Features(*(part[index : index + 1] for part in parts), features.projected)


def of_image(vision: VisionFeatures, layouts, index: int) -> VisionFeatures:
    """One image's part of the batch's vision tokens."""
    return VisionFeatures(vision.tokens_MC.split([math.prod(layout) for layout in layouts])[index])


def reference(index: int, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """One sample by hand: (state at [SEG], logits of the best mask), from transformers' own calls and plain loops."""
    model, preprocess = small.model(), small.preprocess()
    tokens, layouts, features = batch
    vision = iter(of_image(tokens, layouts, index).tokens_MC)
    ids = preprocess.question_ids(QUESTIONS[index], layouts[index]) + preprocess.answer_ids()
    table = model.language_model.model.embed_tokens.weight
    embeddings = torch.stack([next(vision) if token == model.image_token_id else table[token] for token in ids])
    assert next(vision, None) is None
    outputs = model.language_model(inputs_embeds=embeddings[None], output_hidden_states=True)
    state = outputs.hidden_states[-1][0, ids.index(preprocess.seg_token_id)]
    sparse, dense = model.sam2.prompt_encoder(
        input_points=torch.zeros(1, 1, 1, 2),
        input_labels=-torch.ones(1, 1, 1).int(),
        input_boxes=None,
        input_masks=None,
    )
    sparse = torch.cat([sparse, model.text_hidden_fcs(state)[None, None, None]], dim=2)
    own = row(features, index)
    masks, iou, *_ = model.sam2.mask_decoder(
        image_embeddings=own.embedding_BDHW,
        image_positional_embeddings=model.sam2.get_image_wide_positional_embeddings(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
        high_resolution_features=[own.level0_BCHW, own.level1_BCHW],
    )
    return state, masks[0, 0, int(iou[0, 0].argmax())]


@torch.no_grad()
def test_forward_equals_a_reference_that_takes_one_sample_at_a_time(batch):
    tokens, layouts, features = batch
    output = small.model()(prompt_of(layouts), tokens, features)
    assert output.masks.logits_Bhw.shape == (3, small.MASK_PX, small.MASK_PX)
    assert output.masks.candidate_logits_BKhw.shape == (3, 3, small.MASK_PX, small.MASK_PX)
    assert output.text_loss is None
    for index in range(3):
        state, logits = reference(index, batch)
        torch.testing.assert_close(output.seg_state_BC[index], state, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.masks.logits_Bhw[index], logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output.masks.logits_Bhw[0], output.masks.logits_Bhw[2], atol=1e-2)  # images differ


@torch.no_grad()
def test_padding_and_neighbours_change_nothing(batch):
    tokens, layouts, features = batch
    together = small.model()(prompt_of(layouts, with_labels=True), tokens, features)
    for index, layout in enumerate(layouts):
        prompt = small.preprocess().prompt([QUESTIONS[index]], [layout])
        alone = small.model()(prompt, of_image(tokens, layouts, index), row(features, index))
        torch.testing.assert_close(together.seg_state_BC[index], alone.seg_state_BC[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.masks.logits_Bhw[index], alone.masks.logits_Bhw[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_follows_seg_does_not_reach_the_mask(batch):
    tokens, layouts, features = batch
    prompt = prompt_of(layouts, with_labels=True)
    changed = prompt.input_ids_BL.clone()
    for ids, position in zip(changed, prompt.seg_position_B, strict=True):
        ids[position + 1 :] = 3
    before = small.model()(prompt, tokens, features)
    after = small.model()(dataclasses.replace(prompt, input_ids_BL=changed), tokens, features)
    assert torch.equal(before.masks.logits_Bhw, after.masks.logits_Bhw)
    prompt.input_ids_BL[0, prompt.seg_position_B[0] - 1] = 3  # but what stands before it does
    assert not torch.equal(small.model()(prompt, tokens, features).seg_state_BC[0], before.seg_state_BC[0])


@torch.no_grad()
def test_the_head_runs_only_for_a_text_loss_and_only_on_labelled_positions(batch):
    tokens, layouts, features = batch
    seen = []
    handle = small.model().language_model.lm_head.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape))
    small.model()(prompt_of(layouts), tokens, features)
    assert seen == []
    small.model()(prompt_of(layouts, with_labels=True), tokens, features)
    handle.remove()
    answer = len(small.preprocess().answer_ids())
    assert seen == [(3 * answer, 32)]


@torch.no_grad()
def test_text_loss_equals_cross_entropy_of_full_logits_shifted_by_one(batch):
    tokens, layouts, features = batch
    model, prompt = small.model(), prompt_of(layouts, with_labels=True)
    loss = model(prompt, tokens, features).text_loss
    embeddings = model.input_embeddings(prompt.input_ids_BL, tokens)
    logits = model.language_model(inputs_embeds=embeddings).logits
    answer = len(small.preprocess().answer_ids())
    terms = []
    for ids, position, row_logits in zip(prompt.input_ids_BL, prompt.seg_position_B, logits, strict=True):
        first = int(position) - small.preprocess().answer_ids().index(small.preprocess().seg_token_id)
        for place in range(first, first + answer):
            terms.append(-row_logits[place - 1].log_softmax(-1)[ids[place]])
    torch.testing.assert_close(loss, torch.stack(terms).mean(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_mask_is_the_one_of_highest_predicted_iou():
    generator = torch.Generator().manual_seed(1)
    _, _, features = small.inputs(small.model(), 2)
    predicted = torch.rand(2, 8, 4, generator=generator)  # the first of four is SAM2's single mask, not a candidate
    head = small.model().sam2.mask_decoder.iou_prediction_head
    handle = head.register_forward_hook(lambda *_: predicted)
    masks = small.model().decode_masks(torch.randn(2, 8, 32, generator=generator), features)
    handle.remove()
    best = predicted[..., 1:].argmax(-1).flatten()
    assert set(best.tolist()) == {0, 1, 2}
    for index in range(16):
        assert torch.equal(masks.logits_Bhw[index], masks.candidate_logits_BKhw[index, best[index]])


@torch.no_grad()
def test_several_prompts_to_an_image_equal_the_image_repeated():
    torch.manual_seed(2)
    _, _, features = small.inputs(small.model(), 2)
    embeddings = torch.randn(2, 3, 32)
    together = small.model().decode_masks(embeddings, features)
    parts = (features.level0_BCHW, features.level1_BCHW, features.embedding_BDHW)
    repeated = Sam2Features(*(part.repeat_interleave(3, dim=0) for part in parts), projected=True)
    apart = small.model().decode_masks(embeddings.flatten(0, 1)[:, None], repeated)
    torch.testing.assert_close(together.logits_Bhw, apart.logits_Bhw, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.predicted_iou_BK, apart.predicted_iou_BK, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_features_equal_sam2s_own_and_may_be_projected_before_or_after():
    model = small.model()
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(3))
    projected, plain = model.sam2_features(images), model.sam2_features(images, project=False)
    for ours, own in zip(
        (projected.level0_BCHW, projected.level1_BCHW, projected.embedding_BDHW),
        model.sam2.get_image_embeddings(images),
        strict=True,
    ):
        torch.testing.assert_close(ours, own)
    assert [tuple(part.shape[1:]) for part in (plain.level0_BCHW, projected.level0_BCHW)] == [(32, 32, 32), (4, 32, 32)]
    embeddings = torch.randn(2, 1, 32)
    assert torch.equal(
        model.decode_masks(embeddings, projected).logits_Bhw, model.decode_masks(embeddings, plain).logits_Bhw
    )


@torch.no_grad()
def test_forward_takes_images_in_the_place_of_features(batch):
    tokens, layouts, features = batch
    images = torch.stack([small.preprocess().sam2_image(picture) for picture in small.images(3)])
    prompt = prompt_of(layouts)
    from_images = small.model()(prompt, tokens, images).masks.logits_Bhw
    torch.testing.assert_close(from_images, small.model()(prompt, tokens, features).masks.logits_Bhw)


@torch.no_grad()
def test_bf16_runs_and_the_text_loss_stays_fp32():
    model = small.build().to(torch.bfloat16)
    picture = small.images(1)[0]
    image = small.preprocess().vision_input(picture).to("cpu", torch.bfloat16)
    tokens = model.vision_features(image)
    features = model.sam2_features(small.preprocess().sam2_image(picture)[None].bfloat16())
    output = model(prompt_of([image.layout], with_labels=True), tokens, features)
    assert output.masks.logits_Bhw.dtype == torch.bfloat16 and output.masks.logits_Bhw.isfinite().all()
    assert output.text_loss.dtype == torch.float32 and output.text_loss.isfinite()
    assert upsample(output.masks.logits_Bhw, (5, 7)).dtype == torch.float32


def test_checkpointing_recomputes_every_layer_and_keeps_the_gradients(batch):
    plain, plain_calls = lora_gradients(batch, checkpointing=False)
    checkpointed, calls = lora_gradients(batch, checkpointing=True)
    assert plain_calls == 2 and calls == 4  # two layers, each a second time in the backward pass
    assert set(plain) == set(checkpointed)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)
        assert gradient.abs().max() > 0, f"{name} has no gradient"


def lora_gradients(batch, *, checkpointing: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of every LoRA matrix (B made non-zero, so that A has one), and how often a layer's attention ran."""
    tokens, layouts, features = batch
    model = small.build()
    peft_model = lora.wrap(model, TrainConfig(lora_rank=2, lora_dropout=0.0))
    for name, parameter in peft_model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(4))
    if checkpointing:
        model.layers.recomputed_layers = 2
    calls = []
    for layer in model.language_model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    peft_model.train()
    peft_model(prompt_of(layouts), tokens, features).masks.logits_Bhw.square().mean().backward()
    return {name: p.grad for name, p in peft_model.named_parameters() if p.requires_grad}, len(calls)


@torch.no_grad()
def test_generation_is_greedy_decoding_that_ends_at_a_stop_token(batch):
    tokens, layouts, _ = batch
    tokens = of_image(tokens, layouts, 0)
    model, preprocess = small.model(), small.preprocess()
    ids = torch.tensor([preprocess.question_ids(small.QUESTION, layouts[0])])
    question = prompt_of(layouts[:1]).first(ids.shape[1])
    assert torch.equal(question.input_ids_BL, ids)
    new = model.generate(question, tokens, preprocess.stop_token_ids, 6)
    expected, embeddings = [], model.input_embeddings(ids, tokens)
    for _ in range(6):
        token = int(model.language_model(inputs_embeds=embeddings).logits[0, -1].argmax())
        expected.append(token)
        if token in preprocess.stop_token_ids:
            break
        embeddings = torch.cat([embeddings, model.language_model.model.embed_tokens.weight[token][None, None]], dim=1)
    assert new.tolist() == [expected]
    stopped = model.generate(question, tokens, [expected[2]], 6)
    assert stopped.tolist() == [expected[: expected.index(expected[2]) + 1]]


@torch.no_grad()
def test_a_row_that_has_ended_never_says_seg_while_another_goes_on(batch):
    """Its rest is filled with the end of the turn: to fill it with [SEG] would count as an answer."""
    tokens, layouts, _ = batch
    tokens = of_image(tokens, layouts, 0)
    model, seg = small.model(), small.preprocess().seg_token_id
    question = prompt_of(layouts[:1]).first(len(small.preprocess().question_ids(small.QUESTION, layouts[0])))
    other = dataclasses.replace(tokens, tokens_MC=3 * torch.randn_like(tokens.tokens_MC))
    together = Prompt.join([question, question]), VisionFeatures.join([tokens, other])
    free = model.generate(*together, [seg, model.language_model.config.vocab_size - 1], 6).tolist()
    end = next(token for token in free[0] if token not in free[1] and token != seg)
    stopped = model.generate(*together, [seg, end], 6).tolist()
    length = free[0].index(end) + 1
    assert stopped == [free[0][:length] + [end] * (len(free[1]) - length), free[1]] and length < len(free[1])


def test_pixel_shuffle_by_hand():
    # One tile of 4 x 4 patches with one channel, numbered row by row; ratio 0.5 makes 2 x 2 tokens of 4 channels.
    patches = torch.arange(16.0).view(1, 16, 1)
    upright = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert sa2va_internvl._pixel_shuffle(patches, 0.5, "v2")[0].tolist() == upright
    transposed = [upright[0], upright[2], upright[1], upright[3]]  # v1 left the tokens' grid transposed
    assert sa2va_internvl._pixel_shuffle(patches, 0.5, "v1")[0].tolist() == transposed


@torch.no_grad()
def test_vision_tokens_come_from_the_layer_that_is_chosen():
    model = small.build()
    tiles = torch.randn(2, 3, 56, 56)
    states = []
    for layer in model.vision_model.encoder.layer:
        layer.register_forward_hook(lambda _m, _i, output: states.append(output))
    for select_layer, layer in ((-1, 1), (-2, 0)):
        states.clear()
        model.settings = dataclasses.replace(model.settings, select_layer=select_layer)
        tokens = model.vision_tokens(tiles)
        expected = model.mlp1(sa2va_internvl._pixel_shuffle(states[layer][:, 1:], 0.5, "v2"))  # without the class token
        assert tokens.shape == (2, 4, 32) and torch.equal(tokens, expected)


def test_upsampling_is_bilinear_between_pixel_centres_and_differentiable():
    logits = torch.tensor([[[0.0, 4.0]]], requires_grad=True)
    enlarged = upsample(logits, (1, 4))
    assert enlarged.tolist() == [[[0.0, 1.0, 3.0, 4.0]]]
    enlarged.sum().backward()
    assert logits.grad.tolist() == [[[2.0, 2.0]]]
    # At SAM2's own size and half of it, the published detour over that size gives the same.
    torch.manual_seed(5)
    grid = torch.randn(1, 16, 16)
    detour = functional.interpolate(upsample(grid, (64, 64))[:, None], size=(32, 32), mode="bilinear")[:, 0]
    torch.testing.assert_close(detour, upsample(grid, (32, 32)))
