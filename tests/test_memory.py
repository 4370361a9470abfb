"""The memory estimate by hand, against a measurement, and the advice after an out-of-memory error."""

from dataclasses import replace

import pytest

from sft.config import TrainConfig
from sft.memory import GIB, ModelSize, estimate, explain_out_of_memory, still_needed

SMALL = ModelSize(
    frozen_parameters=1000,
    lora_parameters=80,
    whole_parameters=20,
    layers=3,
    hidden=8,
    intermediate=16,
    tokens=5,
    mask_pixels=100,
    cached_bytes=7,
)
FOUR_B = ModelSize(
    frozen_parameters=3_700_000_000,
    lora_parameters=120_000_000,
    whole_parameters=0,
    layers=36,
    hidden=2048,
    intermediate=11008,
    tokens=320,
    mask_pixels=0,
)
ERROR = RuntimeError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.65 GiB")


def test_by_hand():
    config = TrainConfig(batch_size=2, gradient_checkpointing=False)
    layer = 2 * 5 * (18 * 8 + 4 * 16)
    assert estimate(config, SMALL, world_size=1) == {
        "weights": 2 * 1100,
        "gradients": 2 * 100,
        "optimizer": 12 * 100,
        "activations": 2 * (3 * layer + 128 * 100),
        "features": 7,
    }
    changed = replace(config, precision="fp32")
    changed = estimate(changed, replace(SMALL, recomputed_layers=3, cached_bytes=0), world_size=1)
    assert changed["activations"] == 2 * (2 * layer + 3 * 4 * 5 * 8 + 128 * 100)
    assert changed["weights"] == 4 * 1100
    assert changed["features"] == 0


def test_what_features_must_leave_free_is_the_rest_of_the_step_or_the_encoders_share():
    config = TrainConfig(batch_size=8)
    step = sum(estimate(config, FOUR_B, 1).values())
    assert still_needed(config, FOUR_B, 1, held_bytes=7 * GIB) == int(1.25 * step) - 7 * GIB
    assert still_needed(config, FOUR_B, 1, held_bytes=80 * GIB) == 6 * GIB


def test_features_on_the_gpu_are_advised_to_move():
    large = replace(FOUR_B, cached_bytes=20 * GIB)
    text = explain_out_of_memory(ERROR, TrainConfig(), large, world_size=1, total_bytes=24 * GIB)
    assert "(1) --feature_cache host: about 20.0 GiB less" in text


def test_zero_stages_and_offload_share_or_move_what_they_should():
    def of(name, world_size):
        used = estimate(TrainConfig(deepspeed_config=name), SMALL, world_size)
        return used["weights"], used["gradients"], used["optimizer"]

    assert of("zero1", 2) == (2200, 200, 600)
    assert of("zero2", 2) == (2200, 100, 600)
    assert of("zero3", 2) == (1100, 100, 600)
    assert of("zero2_offload", 1) == (2200, 200, 0)


def test_activations_agree_with_the_measurement():
    """1.75 GiB more per sample, measured between batches 8 and 32 without checkpointing."""
    config = TrainConfig(batch_size=1, gradient_checkpointing=False)
    assert estimate(config, FOUR_B, 1)["activations"] / GIB == pytest.approx(1.75, rel=0.05)


def test_advice_names_three_settings_sorted_by_effect():
    config = TrainConfig(batch_size=8, gradient_checkpointing=False)
    text = explain_out_of_memory(ERROR, config, FOUR_B, world_size=1, total_bytes=24 * GIB)
    assert "\n" not in text
    assert "on asking for 2.50 GiB" in text
    assert "24 GiB" in text
    order = ["(1) --gradient_checkpointing true", "(2) --batch_size 4 --gradient_accumulation_steps 2"]
    order.append("(3) --deepspeed_config zero2_offload: about 1.3 GiB less")  # 12 bytes x 120 M
    assert [text.find(part) for part in order] == sorted(text.find(part) for part in order)
    assert all(part in text for part in order)
    assert "(4)" not in text


def test_several_gpus_are_advised_to_share_the_weights():
    text = explain_out_of_memory(ERROR, TrainConfig(), FOUR_B, world_size=4, total_bytes=16 * GIB)
    assert "(1) --deepspeed_config zero3: about 5." in text  # 3/4 of 7.1 GiB


def test_when_no_setting_is_left_there_are_still_three_hints():
    config = TrainConfig(deepspeed_config="zero2_offload", lora_rank=1, feature_cache="off")
    size = replace(FOUR_B, recomputed_layers=36)
    text = explain_out_of_memory(RuntimeError("CUDA error"), config, size, world_size=1, total_bytes=8 * GIB)
    assert all(f"({number}) " in text for number in (1, 2, 3))
    assert "less" not in text
    assert "on asking for" not in text


@pytest.mark.parametrize("world_size", [1, 2])
def test_advice_never_repeats_what_is_set_already(world_size):
    config = TrainConfig(deepspeed_config="zero3", batch_size=1, precision="fp32")
    size = replace(FOUR_B, recomputed_layers=36)
    text = explain_out_of_memory(ERROR, config, size, world_size, total_bytes=80 * GIB)
    assert "zero3:" not in text
    assert "--batch_size" not in text
    assert "--gradient_checkpointing" not in text
    assert "(1) --precision bf16" in text
