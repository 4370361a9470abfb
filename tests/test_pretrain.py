"""Protects the recipe of the embedded base: one step of it, end to end, and the parts that are easy to get wrong."""

import json
import math
from pathlib import Path

import pytest
import small_sa2va as small
import torch

from sft import gate, pretrain, synthetic
from sft.model import published

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenes() -> gate.Scenes:
    """Two scenes, one of them with a left and a right tree."""
    return gate.render((gate.HELD_OUT_SEED, gate.HELD_OUT_SEED + 15), CPU)


def test_one_step_end_to_end_writes_a_base_that_loads(tmp_path, capsys):
    settings = pretrain.Settings(images=2, held_out=1, batch_size=1, prompts=2, seconds=1e-6)
    figures = pretrain.pretrain(tmp_path, settings, CPU, workers=0)
    assert json.loads((tmp_path / "pretraining.json").read_text()) == json.loads(json.dumps(figures))
    assert figures["settings"] == vars(settings) and figures["renderer_version"] == synthetic.GENERATOR_VERSION
    assert 0 <= figures["gate"]["mean_dice"] < 0.4 and figures["gate"]["spread"] > 0
    loaded = published.load(str(tmp_path), dtype=torch.float32)
    assert sum(p.numel() for p in loaded.model.parameters()) == figures["parameters"] == 4_651_689
    assert all(p.isfinite().all() for p in loaded.model.parameters())
    assert "rendered 2 images" in capsys.readouterr().out


def test_the_shipped_base_was_made_by_the_default_recipe():
    shipped = json.loads((published.EMBEDDED / "pretraining.json").read_text())["settings"]
    defaults = vars(pretrain.Settings())
    assert shipped == {name: defaults[name] for name in shipped}


def test_the_loss_reaches_every_part_and_the_text_does_not_pull_the_seg_state(scenes, monkeypatch):
    model, preprocess = small.build().requires_grad_(True).train(), small.preprocess()
    monkeypatch.setattr(pretrain, "encode", lambda _model, images, _tile_px: encoded(_model, images))
    head = torch.nn.Linear(32, len(gate.NAMES))
    settings = pretrain.Settings(batch_size=2, prompts=3)
    questions = pretrain._Questions(preprocess, CPU)
    torch.manual_seed(0)
    loss, terms = pretrain._loss(model, head, questions, scenes, settings, torch.Generator().manual_seed(0))
    assert set(terms) == {"dice", "bce", "task", "text", "iou"}
    assert terms["task"].item() == pytest.approx(math.log(len(gate.NAMES)), abs=2)
    loss.backward()
    for part in (model.vision_model, model.mlp1, model.language_model, model.sam2, model.text_hidden_fcs, head):
        assert sum(p.grad.abs().sum() for p in part.parameters() if p.grad is not None) > 0
    hidden = torch.randn(2, 5, 4, requires_grad=True)
    pretrain._detach_at(hidden, torch.tensor([1, 4])).sum().backward()
    assert hidden.grad.sum(-1).tolist() == [[4, 0, 4, 4, 4], [4, 4, 4, 4, 0]]


def encoded(model, images):
    shrunk = torch.nn.functional.interpolate(images, size=128)
    return gate.encode(model, shrunk, 56)


def test_samples_hold_what_their_phrase_names_under_every_flip_and_turn(scenes):
    settings = pretrain.Settings(batch_size=2, prompts=6)
    every_NKHW = scenes.masks(torch.arange(2), torch.arange(len(gate.NAMES)).expand(2, -1))
    views, sides = set(), set()
    for seed in range(32):
        torch.manual_seed(seed)
        images, masks, phrases = pretrain._sample(scenes, settings, torch.Generator().manual_seed(seed))
        assert images.shape == (2, 3, 512, 512) and images.isfinite().all() and masks.dtype == torch.bool
        flip, turns = view_of(masks[0, 0], every_NKHW)
        views.add((flip, turns))
        for mask, phrase in zip(masks.flatten(0, 1), phrases.flatten().tolist(), strict=True):
            name = gate.NAMES[phrase]
            if name in pretrain.SIDES:
                assert turns == 0, "left and right mean nothing on a turned image"
                sides.add((name, flip))
                name = pretrain.SIDES[name] if flip else name
            truth = every_NKHW[:, gate.NAMES.index(name)]
            shown = (truth.flip(-1) if flip else truth).rot90(turns, (-2, -1))
            assert any(torch.equal(mask, one) for one in shown), name
    assert len(views) == 8 and len(sides) > 2


def view_of(mask: torch.Tensor, every_NKHW: torch.Tensor) -> tuple[bool, int]:
    """The flip and the turns that lead from some scene's mask to this one."""
    area = mask.sum()
    for turns in range(4):
        back = mask.rot90(-turns, (-2, -1))
        for flip in (False, True):
            upright = back.flip(-1) if flip else back
            for one in every_NKHW.flatten(0, 1):
                if one.sum() == area and torch.equal(one, upright):
                    return flip, turns
    raise AssertionError("a mask of no scene")


def test_mirroring_swaps_left_and_right_alone():
    mirrored = pretrain._mirrored(CPU).tolist()
    swapped = {gate.NAMES[index]: gate.NAMES[other] for index, other in enumerate(mirrored) if index != other}
    assert swapped == {"left tree": "right tree", "right tree": "left tree"}


def test_phrases_are_overlaps_of_the_renderers_targets(scenes):
    scene = synthetic.render(gate.HELD_OUT_SEED + 15)
    masks = scenes.masks(torch.tensor([1]), torch.arange(len(gate.NAMES))[None])[0]
    for mask, (phrase, parts) in zip(masks.numpy(), gate.PHRASES.items(), strict=True):
        expected = True
        for part in parts:
            expected = expected & scene.masks[part]
        assert (mask == expected).all(), phrase
    assert scenes.present_NK[1].all()


def test_scenes_do_not_depend_on_the_number_of_workers(scenes):
    apart = gate.render((gate.HELD_OUT_SEED, gate.HELD_OUT_SEED + 15), CPU, workers=2)
    assert torch.equal(apart.images_N3HW, scenes.images_N3HW)
    assert torch.equal(apart.planes_NHW, scenes.planes_NHW) and torch.equal(apart.present_NK, scenes.present_NK)


def test_every_wording_of_every_phrase_is_drawn():
    questions = pretrain._Questions(small.preprocess(), CPU)
    generator = torch.Generator().manual_seed(0)
    phrase = gate.NAMES.index("blood vessels")
    prompt = questions.draw(torch.full((200,), phrase), generator)
    texts = set(small.tokenizer().batch_decode(prompt.input_ids_BL))
    assert len(texts) == len(gate.QUESTIONS) and all("blood vessels" in text for text in texts)


def test_initial_weights_keep_the_scale_of_a_signal():
    model = small.build(seed=1)
    pretrain._initialise(model)
    weight = model.language_model.model.layers[0].mlp.down_proj.weight  # 48 inputs
    assert weight.std().item() == pytest.approx(1 / math.sqrt(48), rel=0.1)
    one, other = model.sam2.shared_image_embedding, model.sam2.prompt_encoder.shared_embedding
    assert torch.equal(one.positional_embedding, other.positional_embedding)


def test_the_command_knows_its_flags(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pretrain", "DIR", "--seeds", "1"])
    with pytest.raises(SystemExit):
        pretrain.main()
    assert "unrecognized arguments: --seeds" in capsys.readouterr().err
    seen = {}
    monkeypatch.setattr(
        pretrain, "pretrain", lambda *given: seen.update(given=given) or {"gate": 0, "parameters": 0, "bytes": 0}
    )
    monkeypatch.setattr("sys.argv", ["pretrain", "DIR", "--images", "7", "--learning_rate", "3e-4", "--workers", "3"])
    pretrain.main()
    directory, settings, _, workers = seen["given"]
    assert (directory, workers) == (Path("DIR"), 3)
    assert settings == pretrain.Settings(images=7, learning_rate=3e-4)
