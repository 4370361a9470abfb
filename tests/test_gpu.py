"""What only a GPU can show: bf16 under ZeRO-2 on CUDA, fused AdamW, events, memory figures, resume."""

import dataclasses
import gc
import json
import re

import pytest

torch = pytest.importorskip("torch")

from sft.config import TrainConfig  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    """The researcher's numbers on the embedded base and data, two epochs."""
    return TrainConfig(
        output_dir=str(tmp_path), num_epochs=2, batch_size=4, learning_rate=1e-3, save_every=1, log_every_steps=1
    )


def rows_of(result, kind: str) -> list[dict]:
    return [row for row in json.loads((result.directory / "training_log.json").read_text()) if row["kind"] == kind]


def test_bf16_zero2_learns_on_cuda(config):
    """The default precision and ZeRO stage train on the device and say what memory and time they took."""
    from sft.train import train

    result = train(config)
    assert result.dice > result.base_dice
    row = rows_of(result, "train")[-1]
    assert row["gpu_gib"] > 0 and 0 < row["mfu"] < 1
    parts = sum(row[f"{part}_s"] for part in ("data", "forward", "backward", "optimizer"))
    assert 0.3 < parts / row["step_s"] < 1.1, "the parts of a step must make up the step"


def test_bf16_validation_of_the_base_is_near_fp32(config):
    """Same base, same images: what bf16 costs in Dice is rounding, no more."""
    from sft.train import train

    short = dataclasses.replace(config, num_epochs=1)
    in_bf16 = train(short)
    in_fp32 = train(dataclasses.replace(short, precision="fp32"))
    assert in_bf16.base_dice == pytest.approx(in_fp32.base_dice, abs=0.01)


def number_and_line(config) -> tuple[int, str]:
    """What `auto` chooses for a run that then takes no step, and the line that says why."""
    from sft.run import prepared

    with prepared(config) as run:
        return run.config.batch_size, run.batch_line


def test_batch_size_auto_fills_the_gpu_or_comes_to_its_end_and_trains(config):
    """A step must run, and a larger one must not have been well within reach."""
    from sft.batch_size import MOST, candidates
    from sft.train import train

    result = train(dataclasses.replace(config, batch_size="auto"))
    number = json.loads((result.directory / "config.json").read_text())["batch_size"]
    samples = len(json.loads((result.directory / "split.json").read_text())["train"])
    row = rows_of(result, "train")[-1]
    assert row["step"] == 2 * -(-samples // number)
    total_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    assert number == candidates(samples, 1, MOST)[0] or row["gpu_gib"] > total_gib / 2


def test_batch_size_auto_meets_a_real_end_of_memory(config, monkeypatch):
    """The process may take six tenths of what the trial took, and the estimate does not know: fewer images fit."""
    from sft import batch_size

    config = dataclasses.replace(config, batch_size="auto")
    before, line = number_and_line(config)
    taken_bytes = float(re.search(r"a trial step took up to ([\d.]+) GiB", line)[1]) * 2**30
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    monkeypatch.setattr(batch_size, "_proposed", lambda config, size, world_size, usable_bytes, counts: (counts[0], ""))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.6 * taken_bytes / total_bytes)
    try:
        after, line = number_and_line(config)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    failed = int(re.search(r"(\d+) ran out of memory in a trial step", line)[1])
    assert 1 <= after < failed <= before


def test_trial_on_cuda_leaves_weights_and_random_numbers_as_they_were(config):
    """A run with `auto` begins where the run with its number begins, to the last bit."""
    from sft.run import prepared

    def begun(config) -> tuple:
        with prepared(config) as run:
            weights = {name: p.detach().cpu() for name, p in run.peft_model.named_parameters() if p.requires_grad}
            return run.config.batch_size, torch.cuda.get_rng_state(), torch.get_rng_state(), weights

    number, *states, weights = begun(dataclasses.replace(config, batch_size="auto"))
    _, *given_states, given = begun(dataclasses.replace(config, batch_size=number))
    assert all(torch.equal(state, other) for state, other in zip(states, given_states, strict=True))
    assert weights.keys() == given.keys() and all(torch.equal(weights[name], given[name]) for name in weights)


def test_resume_on_cuda_continues_the_same_run(config):
    """Two epochs in one go and one plus one from the checkpoint reach the same losses."""
    from sft.train import train

    whole = train(config)
    before = rows_of(whole, "train")[-1]["loss"]
    resumed = train(dataclasses.replace(config, resume=str(whole.directory / "checkpoint_epoch_1")))
    assert rows_of(resumed, "train")[-1]["loss"] == pytest.approx(before, rel=2e-2)
