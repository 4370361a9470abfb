"""Protects training of the Qwen-VL families: features kept and joined, a whole run and its export, ZeRO-3."""

import dataclasses
import json
import math

import pytest
import small_qwen as small
import small_runs
import torch
from small_runs import NAMES, settings, values

from sft.config import TrainConfig
from sft.data import Pair
from sft.features import Features, Item
from sft.model import lora, published
from sft.model.export import export
from sft.model.preprocess_qwen import PreprocessQwen
from sft.train import train
from sft.validation import validate_directory


@pytest.fixture(params=small.FAMILIES, scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def inputs(family, tmp_path_factory):
    """A folder with model/, in the older layout for Qwen2.5-VL, data/ and the names of two validation images."""
    folder = tmp_path_factory.mktemp("inputs")
    small.write(folder / "model", family)
    if family == "qwen2_5_vl":
        small.rename_to_old_layout(folder / "model")
    small_runs.write_images(folder / "data")
    (folder / "val.txt").write_text("v1\nv4\n")
    return folder


@pytest.fixture
def made(inputs):
    """Features of a model wrapped with LoRA, and the pairs."""
    config = TrainConfig(precision="fp32", num_workers=0, lora_rank=2, text_weight=0.1)
    loaded = published.load(str(inputs / "model"), dtype=torch.float32)
    peft_model = lora.wrap(loaded.model, config)
    features = Features(loaded.model, loaded.preprocess, config, torch.device("cpu"))
    data = inputs / "data"
    pairs = [Pair(name, data / "images" / f"{name}.png", data / "masks" / f"{name}.png") for name in NAMES]
    yield features, loaded, peft_model, pairs
    features.close()


def test_kept_features_of_images_of_several_sizes_join_to_a_batch(made, family):
    features, loaded, peft_model, pairs = made
    items = [Item(pairs[0]), Item(pairs[1]), Item(pairs[4], 1)]
    (batch,), (again,) = (list(features.batches([items])) for _ in range(2))
    alone = [next(iter(features.batches([[item]]))) for item in items]
    counts = [len(one.vision.tokens_MC) for one in alone]
    assert len(set(counts)) > 1 and torch.equal(again.vision.tokens_MC, batch.vision.tokens_MC)
    assert torch.equal(batch.vision.tokens_MC, torch.cat([one.vision.tokens_MC for one in alone]))
    places = (batch.prompt.input_ids_BL == loaded.model.image_token_id).sum(1)
    assert places.tolist() == counts
    if family == "qwen3_vl":
        assert torch.equal(batch.vision.deepstack_KMC, torch.cat([one.vision.deepstack_KMC for one in alone], dim=1))
        assert batch.vision.nbytes == 3 * batch.vision.tokens_MC.nbytes
    with torch.no_grad():
        together = peft_model(batch.prompt, batch.vision, batch.sam2).masks.logits_Bhw
        apart = torch.cat([peft_model(one.prompt, one.vision, one.sam2).masks.logits_Bhw for one in alone])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_a_blank_batch_of_any_size_can_be_trained_on(made):
    """What `batch_size auto` tries."""
    features, _, peft_model, pairs = made
    blank = features.blank((96, 128), 3)
    (real,) = features.batches([[Item(pairs[0])] * 3])
    assert torch.equal(blank.prompt.position_ids_3BL, real.prompt.position_ids_3BL)
    assert blank.vision.tokens_MC.shape == real.vision.tokens_MC.shape
    output = peft_model(blank.prompt, blank.vision, blank.sam2)
    (output.masks.logits_Bhw.sum() + output.text_loss).backward()
    assert any(parameter.grad is not None for parameter in peft_model.parameters())


def test_encoders_set_aside_answer_as_before_and_are_no_parameters(made):
    features, loaded, peft_model, pairs = made
    (before,) = features.batches([[Item(pairs[0])]])
    features.set_encoders_aside()
    names = [name for name, _ in peft_model.named_parameters()]
    assert not any("visual" in name for name in names)
    assert any("language_model" in name for name in names) and any("lm_head" in name for name in names)
    (again,) = features.batches([[Item(dataclasses.replace(pairs[0], name="again"))]])
    assert torch.equal(again.vision.tokens_MC, before.vision.tokens_MC)


def test_a_run_learns_saves_exports_and_validates_the_merged_model(inputs, tmp_path):
    """Through the engine: two epochs, checkpointing of activations, the gradient check, [SEG] rate, export."""
    config = settings(inputs, tmp_path / "runs", text_weight=0.1, gradient_checkpointing=True)
    result = train(config)
    losses = values(result, "train", "loss")
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses) and losses[1] < losses[0]
    assert all(0 <= rate <= 1 for rate in values(result, "val", "seg_rate"))
    log = (result.directory / "training.log").read_text()
    assert "Gradient check: every LoRA B moved" in log and "LoRA on language_model: 21 linears" in log
    best = result.directory / "checkpoint_best"
    assert {"preprocessor_config.json", "chat_template.jinja", "tokenizer.json"} <= {
        path.name for path in best.iterdir()
    }
    export(inputs / "model", best, tmp_path / "merged")
    before, after = validate_directory(best, tmp_path / "merged")
    assert after == pytest.approx(before, abs=1e-3)
    plain = settings(inputs, tmp_path / "plain", text_weight=0.1)
    assert values(train(plain), "train", "loss") == pytest.approx(losses, rel=1e-4)


def test_the_preprocess_is_the_familys(inputs, family):
    loaded = published.load(str(inputs / "model"))
    assert isinstance(loaded.preprocess, PreprocessQwen)
    assert loaded.preprocess.patch_px == {"qwen2_5_vl": 14, "qwen3_vl": 16}[family]
    assert json.loads((inputs / "model" / "config.json").read_text())["architectures"] == ["Sa2VAChatModelQwen"]
