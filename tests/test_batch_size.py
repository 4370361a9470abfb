"""`--batch_size auto`: what is worth a try, what fits, what a trial leaves behind, and that the run is the same one.

A GPU's memory is played by a number of bytes: the choice, the trial and all that follow then run on a CPU.
"""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import small_runs
import torch
from small_runs import only_run, rows, settings

from sft import batch_size, losses, pace, train
from sft import run as runs
from sft.batch_size import MOST, MOST_ON_CPU, Largest, candidates, choose, largest
from sft.config import TrainConfig, UserError
from sft.engine import Ranks
from sft.features import Features
from sft.memory import GIB, ModelSize, estimate
from sft.model import lora, published
from sft.settings import docs_of

FOUR_B = ModelSize(3_700_000_000, 120_000_000, 0, layers=36, hidden=2048, intermediate=11008, tokens=288, mask_pixels=0)
ROOM = 2 * GIB  # more than any step here takes
# What a trial could disturb: dropout's random numbers, adapters that peft keeps in fp32, a text loss, a second group.
RESTLESS = {"precision": "bf16", "lora_dropout": 0.3, "text_weight": 0.1, "train_modules": ("text_hidden_fcs",)}


def memory_of(monkeypatch, whole_bytes):
    """Stands for a GPU with so many bytes."""
    monkeypatch.setattr(pace, "usable_bytes", lambda device: whole_bytes)
    properties = SimpleNamespace(total_memory=whole_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def number_of(directory):
    return json.loads((directory / "config.json").read_text())["batch_size"]


def batch_lines(text):
    return [line for line in text.splitlines() if line.startswith("Batch size")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return small_runs.write_inputs(tmp_path_factory.mktemp("inputs"))


# What is worth a try


@pytest.mark.parametrize(
    ("samples", "together", "expected"),
    [
        (1024, 1, [32, 16, 8, 4, 2, 1]),
        (40, 1, [20, 14, 8, 4, 2, 1]),  # 2 steps of 20, not of 32 with 24 images twice; 3 steps of 14
        (30, 1, [30, 15, 6, 3, 1]),
        (7, 2, [2, 1]),  # 3 on each of two ranks would take two steps as well, and 5 images twice
        (5, 8, [1]),  # too few for all ranks
        (1, 1, [1]),
    ],
)
def test_candidates_by_hand(samples, together, expected):
    assert candidates(samples, together, MOST) == expected


@pytest.mark.parametrize("together", [1, 2, 3, 8])
@pytest.mark.parametrize("samples", [8, 9, 31, 33, 40, 100, 977])
def test_no_step_takes_a_sample_twice_and_no_candidate_wastes_more_than_its_steps_ask(samples, together):
    found = candidates(samples, together, MOST)
    assert found == sorted(set(found), reverse=True) and found[-1] == 1 and found[0] <= MOST
    for count in found:
        assert count * together <= samples
        steps = -(-samples // (count * together))
        assert steps * (count - 1) * together < samples, "one fewer would not do in as many steps"


def test_the_largest_samples_may_be_of_two_images():
    """Many tiles make many tokens, many pixels a large mask."""

    class Tiles:
        def image_layout(self, height, width):
            return (width // height, 1, 1)

        def prompt(self, questions, layouts):
            return SimpleNamespace(input_ids_BL=torch.zeros(1, len(questions[0]) + layouts[0][0]))

    found = largest([(600, 100), (400, 390), (30, 20)], Tiles(), "ask")
    assert found == Largest(tokens=9, image_hw=(100, 600), mask_hw=(390, 400))


# What fits


def chosen(config, whole_gib, monkeypatch, ranks, attempt=lambda config: 0, samples=1024):
    memory_of(monkeypatch, None if whole_gib is None else int(whole_gib * GIB))
    config, line = choose(config, FOUR_B, samples, ranks, attempt)
    return config.batch_size, line


def needed(config, count, layers=0):
    config = dataclasses.replace(config, batch_size=count)
    return sum(estimate(config, dataclasses.replace(FOUR_B, recomputed_layers=layers), 1).values()) / GIB


@pytest.mark.parametrize("whole_gib", [9.5, 12, 16, 24, 40, 60, 80, 140])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_largest_that_fits_is_taken(monkeypatch, ranks, checkpointing, whole_gib):
    config = TrainConfig(batch_size="auto", gradient_checkpointing=checkpointing)
    layers = 36 if checkpointing else 0
    count, line = chosen(config, whole_gib, monkeypatch, ranks)
    usable = pace.MEMORY_SHARE * whole_gib
    assert needed(config, count, layers) <= usable or count == 1
    assert (count == MOST) == (needed(config, MOST, layers) <= usable)
    if count < MOST:
        assert needed(config, 2 * count, layers) > usable
        said = f"{2 * count} would take{'' if layers else ' without recomputing layers'} an estimated "
        assert said + f"{needed(config, 2 * count, layers):.1f} GiB, {usable:.1f} are usable" in line


@pytest.mark.parametrize(
    ("whole_gib", "expected", "recomputes"),
    [(80, 32, False), (40, 16, False), (26, 8, False), (18, 32, True), (12, 16, True)],
)
def test_layers_are_recomputed_only_for_a_batch_that_would_leave_the_gpu_idle(
    monkeypatch, ranks, whole_gib, expected, recomputes
):
    """26 GiB hold 32 images with all layers recomputed, which takes a third longer than 8 and saves an eighth."""
    config = TrainConfig(batch_size="auto")
    assert (needed(config, 32, layers=36) <= 0.9 * whole_gib) == (whole_gib >= 18)
    count, _ = chosen(config, whole_gib, monkeypatch, ranks)
    assert count == expected
    assert (needed(config, count) > 0.9 * whole_gib) is recomputes


def test_a_cpu_takes_what_the_demo_takes_and_says_why(monkeypatch, ranks):
    def never(config):
        raise AssertionError("there is nothing to try")

    config = TrainConfig(batch_size="auto", learning_rate=3e-4, num_epochs=7, gradient_accumulation_steps=3)
    assert chosen(config, None, monkeypatch, ranks, never, samples=24) == (
        MOST_ON_CPU,
        "Batch size 4 per rank, 12 images a step, chosen by auto: no limit of memory is known on a CPU, so 4 at most, "
        "evened out over the steps of an epoch; learning rate 0.0003 and 7 epochs stay as given",
    )
    count, line = chosen(config, None, monkeypatch, ranks, never, samples=8)
    assert count == 2 and "so no step takes one of the 8 images twice" in line


def test_a_number_stays_and_nothing_is_tried(monkeypatch, ranks):
    def never(config):
        raise AssertionError("nobody asked")

    config = TrainConfig(batch_size=48, gradient_accumulation_steps=2)
    memory_of(monkeypatch, GIB)
    assert choose(config, FOUR_B, 5, ranks, never) == (config, "Batch size 48 per rank, 96 images a step")


def test_what_runs_out_of_memory_is_halved(monkeypatch, ranks):
    tried = []

    def attempt(config):
        tried.append(config.batch_size)
        return None if config.batch_size > 8 else 30 * GIB

    count, line = chosen(TrainConfig(batch_size="auto"), 80, monkeypatch, ranks, attempt)
    assert (tried, count) == ([32, 16, 8], 8)
    assert "16 ran out of memory in a trial step; a trial step took up to 30.0 GiB" in line


def test_if_nothing_fits_there_is_advice(monkeypatch, ranks):
    with pytest.raises(UserError, match=r"the GPU has 80 GiB, .*\(1\) --gradient_checkpointing true: about "):
        chosen(TrainConfig(batch_size="auto"), 80, monkeypatch, ranks, attempt=lambda config: None)


def test_the_words_of_the_setting_are_those_of_the_choice():
    assert f"at most {MOST} ({MOST_ON_CPU} on a CPU)" in docs_of(TrainConfig)["batch_size"]


# The trial


@pytest.fixture
def parts(inputs, monkeypatch):
    """A trial up to its settings, the model and the settings."""
    config = settings(inputs, inputs, batch_size=3, **RESTLESS)
    device = torch.device("cpu")
    loaded = published.load(config.model_path, dtype=torch.bfloat16, device=device)
    model = lora.wrap(loaded.model, config)
    features = Features(loaded.model, loaded.preprocess, config, device)
    size = dataclasses.replace(FOUR_B, lora_parameters=1000, layers=2)
    memory_of(monkeypatch, ROOM)

    def trial(config):
        most = Largest(tokens=0, image_hw=(64, 128), mask_hw=(128, 96))
        return batch_size.trial(model, features, most, size, Ranks(0, 0, 1, device), config)

    yield trial, model, config
    features.close()


def state_of(model):
    """All that a trial may touch."""
    parameters = {name: (p.detach().clone(), p.grad, p.requires_grad) for name, p in model.named_parameters()}
    modes = [module.training for module in model.get_base_model().sam2.modules()]
    return parameters, modes, torch.get_rng_state()


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    for name, (value, gradient, trained) in after[0].items():
        assert gradient is None and trained == before[0][name][2]
        torch.testing.assert_close(value, before[0][name][0], rtol=0, atol=0)  # and the same dtype
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])


def test_trial_runs_both_passes_on_the_largest_images_and_leaves_no_trace(parts, monkeypatch):
    trial, model, config = parts
    combo, seen = losses.combo, []

    def watched(logits_Bhw, masks_BHW, config):
        logits_Bhw.register_hook(lambda gradient: seen.append("backward"))
        seen.append((logits_Bhw.dtype, tuple(masks_BHW.shape)))
        assert model.training and {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
        return combo(logits_Bhw, masks_BHW, config)

    monkeypatch.setattr(losses, "combo", watched)
    before = state_of(model)
    assert trial(config) == 0
    assert seen == [(torch.bfloat16, (3, 128, 96)), "backward"]
    assert_same(before, state_of(model))


def test_trial_that_runs_out_of_memory_says_so_and_leaves_no_trace(parts, monkeypatch):
    trial, model, config = parts

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(losses, "combo", full)
    before = state_of(model)
    assert trial(config) is None
    assert_same(before, state_of(model))


def test_trial_sets_aside_what_the_engine_will_take(parts, monkeypatch):
    """Gradients and AdamW's state of 1000 parameters, and half of what the estimate leaves free."""
    trial, _, config = parts
    empty, held = torch.empty, []

    def watched(*size, **keywords):
        if keywords.get("dtype") == torch.uint8:
            held.append(size)
        return empty(*size, **keywords)

    monkeypatch.setattr(torch, "empty", watched)
    assert trial(config) == 0
    assert held == [(2 * 1000 + 12 * 1000 + int((1 - pace.MEMORY_SHARE) / 2 * ROOM),)]


# Whole runs


def small_gpu(monkeypatch, most_that_fits):
    """Memory enough for any estimate here, and a step that runs out of it all the same."""
    memory_of(monkeypatch, ROOM)
    step = batch_size._step

    def limited(model, features, most, config, device, held_bytes):
        step(model, features, most, config, device, held_bytes)
        if config.batch_size > most_that_fits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(batch_size, "_step", limited)


@pytest.mark.parametrize(
    "changes",
    [
        RESTLESS,
        {"lora_scope": ("language_model", "sam2_encoder"), "lora_dropout": 0.3},
        {"deepspeed_config": "zero3", "lora_dropout": 0.3, "seg_rate_samples": 0},
    ],
    ids=["restless", "sam2_encoder", "zero3"],
)
def test_run_with_auto_is_the_run_with_its_number_bit_by_bit_and_goes_on_as_such(
    inputs, tmp_path, monkeypatch, changes
):
    given = train.train(settings(inputs, tmp_path / "given", batch_size=2, **changes))
    config = settings(inputs, tmp_path / "auto", batch_size="auto", **changes)
    small_gpu(monkeypatch, most_that_fits=2)
    found = train.train(config)
    assert number_of(found.directory) == 2
    assert rows(found) == rows(given)
    log = (found.directory / "training.log").read_text()
    assert len(batch_lines(log)) == 1 and "4 ran out of memory in a trial step" in log
    shutil.rmtree(found.directory / "checkpoint_epoch_2")
    shutil.rmtree(found.directory / "checkpoint_best")
    small_gpu(monkeypatch, most_that_fits=1)  # another machine: the number is the run's all the same
    resumed = train.train(dataclasses.replace(config, resume="auto"))
    assert resumed.directory == found.directory and rows(resumed) == rows(given)
    assert number_of(found.directory) == 2
    assert batch_lines((found.directory / "training.log").read_text())[1:] == ["Batch size 2 per rank, 2 images a step"]


def test_resume_with_another_number_than_auto_chose_is_refused(inputs, tmp_path):
    def stop(row):
        if row["epoch"] == 1:
            raise KeyboardInterrupt

    config = settings(inputs, tmp_path, batch_size="auto")
    with pytest.raises(KeyboardInterrupt):
        train.train(config, stop)
    assert number_of(only_run(tmp_path)) == 4
    with pytest.raises(UserError, match=r"started with batch_size 4 \(now 2\); resume with its settings"):
        train.train(dataclasses.replace(config, batch_size=2, resume="auto"))


def test_dry_run_reports_the_choice_and_takes_a_step_of_it(inputs, tmp_path, capsys, monkeypatch):
    small_gpu(monkeypatch, most_that_fits=2)
    steps, train_step = [], train.train_step

    def watched(run, batch, watch):
        steps.append((len(batch.items), run.config.batch_size))
        return train_step(run, batch, watch)

    monkeypatch.setattr(train, "train_step", watched)
    train.train(settings(inputs, tmp_path / "out", batch_size="auto", dry_run=True))
    assert steps == [(2, 2)]
    (line,) = batch_lines(capsys.readouterr().out)
    assert line.startswith("Batch size 2 per rank, 2 images a step, chosen by auto: 4 ran out of memory in a trial")
    assert not (tmp_path / "out").exists()


def test_what_fits_nowhere_ends_with_advice_and_leaves_nothing(inputs, tmp_path, monkeypatch):
    small_gpu(monkeypatch, most_that_fits=0)
    with pytest.raises(UserError, match="CUDA out of memory .the GPU has 2 GiB"):
        train.train(settings(inputs, tmp_path / "out", batch_size="auto"))
    assert not list(tmp_path.glob("out/lora_sft_*"))


def test_what_is_made_of_the_number_has_it(inputs, tmp_path):
    config = settings(inputs, tmp_path, batch_size="auto", gradient_accumulation_steps=2)
    with runs.prepared(config) as run:
        assert run.config == dataclasses.replace(config, batch_size=2)
        assert run.steps_per_epoch == 1
        assert run.ds_engine.deepspeed.train_micro_batch_size_per_gpu() == 2
        assert run.ds_engine.deepspeed.train_batch_size() == 4
        assert "activations" in runs.memory_line(run)
