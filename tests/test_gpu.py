"""What only a GPU can show: bf16 under ZeRO-2 on CUDA, fused AdamW, events, memory figures, resume."""

import dataclasses
import json

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


def test_resume_on_cuda_continues_the_same_run(config):
    """Two epochs in one go and one plus one from the checkpoint reach the same losses."""
    from sft.train import train

    whole = train(config)
    before = rows_of(whole, "train")[-1]["loss"]
    resumed = train(dataclasses.replace(config, resume=str(whole.directory / "checkpoint_epoch_1")))
    assert rows_of(resumed, "train")[-1]["loss"] == pytest.approx(before, rel=2e-2)
