"""Protects what is learned from how it is computed: ZeRO-2, compiling and the feature cache against the plain way.

Whole runs and long ones, where small differences would have grown; each test states how far apart two ways may end.
Batch against accumulation stands in test_train.py, the exact equality of caches in fp32 in test_feature_cache.py.
"""

import dataclasses
import math
import shutil
import sysconfig
from pathlib import Path

import pytest
import small_runs
import torch
from small_runs import values
from torch import Tensor, nn

from sft import encoders, engine
from sft import run as runs
from sft import train as loop
from sft.config import TrainConfig
from sft.encoders import Encoders, Sizes
from sft.features import Item
from sft.model import lora, published
from sft.schedule import learning_rate_factor
from sft.stopwatch import Stopwatch
from sft.train import Result, train

STEPS = 50
BF16_ROUNDING = 2**-8  # of one number, relative
HAS_COMPILER = any(map(shutil.which, ("c++", "g++"))) and Path(sysconfig.get_path("include"), "Python.h").is_file()
NO_COMPILER = pytest.mark.skipif(not HAS_COMPILER, reason="on a CPU torch.compile needs g++ and Python's headers")


@pytest.fixture(scope="module", autouse=True)
def of_this_file(ranks):
    """The process group ends with the file."""


@pytest.fixture
def config(tmp_path, monkeypatch) -> TrainConfig:
    """Four images, two a step, fp32 without dropout; mask decoder and all train, so that the loss falls by a fifth."""
    monkeypatch.setenv("SA2VA_SFT_CACHE", str(tmp_path / "cache"))
    small = {"num_epochs": STEPS // 2, "learning_rate": 1e-3, "weight_decay": 0.01, "max_grad_norm": 0.1}
    small |= {"train_modules": ("text_hidden_fcs", "mask_decoder"), "validate_every": STEPS, "save_every": STEPS}
    return small_runs.settings(small_runs.write_inputs(tmp_path), tmp_path / "runs", seg_rate_samples=0, **small)


@pytest.mark.parametrize(("precision", "of_loss", "of_weights"), [("fp32", 1e-5, 5e-4), ("bf16", 2e-3, 5e-2)])
def test_zero2_follows_plain_adamw_for_50_steps(config, precision, of_loss, of_weights):
    """Every loss, and the masters in the end: apart by so much of the way they have gone, in bf16 by rounding.

    AdamW without decay ends 6e-3 away, with a clipping norm of 0.11 for 0.1 1.6e-3, with another schedule 0.1.
    """
    if torch.cuda.is_available():  # sums run in another order each time, and AdamW's division makes that larger
        of_loss, of_weights = max(of_loss, 1e-4), max(of_weights, 2e-2)
    config = dataclasses.replace(config, precision=precision, deepspeed_config="zero2")
    batches, losses, masters = by_engine(config)
    expected_losses, expected = by_adamw(config, batches, STEPS)
    _, start = by_adamw(config, batches, 0)
    assert losses == pytest.approx(expected_losses, rel=of_loss)
    assert losses[-1] < 0.85 * losses[0], "what does not learn proves nothing"
    assert apart(masters, expected, start) < of_weights


@NO_COMPILER
@pytest.mark.slow
def test_a_compiled_run_is_the_eager_one(config, tmp_path, monkeypatch):
    """fp32, eight steps and validations of images of one size: losses 1e-5 apart, Dice 1e-4."""
    monkeypatch.setattr(small_runs, "SIZES_HW", small_runs.SIZES_HW[:1] * len(small_runs.NAMES))
    data_root = small_runs.write_images(tmp_path / "one_size")  # each size would be compiled anew
    config = dataclasses.replace(config, num_epochs=4, val_batch_size=2, data_root=str(data_root))
    eager, compiled = both(config, tmp_path, {"compile": False}, {"compile": True})
    assert "not compiled" in log(eager) and ", compiled" in log(compiled)
    assert values(compiled, "step", "loss") == pytest.approx(values(eager, "step", "loss"), rel=1e-5)
    assert values(compiled, "val", "dice") == pytest.approx(values(eager, "val", "dice"), abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_a_compiled_run_with_graphs_is_the_eager_one_on_a_gpu(config, tmp_path, precision, tolerance):
    """Layers compiled and replayed as CUDA graphs."""
    config = dataclasses.replace(config, num_epochs=4, precision=precision)
    eager, compiled = both(config, tmp_path, {"compile": False}, {"compile": True})
    assert "replayed as CUDA graphs" in log(compiled)
    assert values(compiled, "step", "loss") == pytest.approx(values(eager, "step", "loss"), rel=tolerance)


def test_features_kept_in_bf16_are_those_of_every_step_within_rounding(config, tmp_path, monkeypatch):
    """Encoded in other company, as on a GPU: each loss within one rounding of bf16, Dice within 5e-3."""
    for device in encoders.SIZES:
        monkeypatch.setitem(encoders.SIZES, device, Sizes(images=4, sam2_images=3, vision_tokens=64))
    together, encode = set(), Encoders.encode

    def noted(self, loaded):
        together.add(len(loaded))
        return encode(self, loaded)

    monkeypatch.setattr(Encoders, "encode", noted)
    config = dataclasses.replace(config, num_epochs=4, precision="bf16", validate_every=2)
    off, kept = both(config, tmp_path, {"feature_cache": "off"}, {"feature_cache": "disk"})
    assert together == {1, 2, 4}, "validation, steps, filling"
    assert values(kept, "step", "loss") == pytest.approx(values(off, "step", "loss"), rel=BF16_ROUNDING)
    assert values(kept, "val", "dice") == pytest.approx(values(off, "val", "dice"), abs=5e-3)


def test_bf16_accumulation_is_one_batch_within_rounding(config, tmp_path):
    """Four times one image against four at once, twelve steps: within one rounding of bf16; 1e-5 in fp32, see above."""
    config = dataclasses.replace(config, num_epochs=12, precision="bf16")
    ways = {"batch_size": 4}, {"batch_size": 1, "gradient_accumulation_steps": 4}
    together, accumulated = both(config, tmp_path, *ways)
    assert values(accumulated, "train", "loss") == pytest.approx(values(together, "train", "loss"), rel=BF16_ROUNDING)


def both(config: TrainConfig, folder: Path, *ways: dict) -> list[Result]:
    """Whole runs that differ in some settings."""
    return [
        train(dataclasses.replace(config, output_dir=str(folder / str(number)), **way))
        for number, way in enumerate(ways)
    ]


def log(result: Result) -> str:
    return (result.directory / "training.log").read_text()


def by_engine(config: TrainConfig) -> tuple[list, list[float], dict[str, Tensor]]:
    """50 steps of a run: its batches, losses and masters."""
    with runs.prepared(config) as run:
        runs.keep_features(run, loop.all_items(run))
        run.ds_engine.train()
        plan = [[Item(pair) for pair in run.data.train[start : start + 2]] for start in (0, 2)]
        batches = list(run.features.batches(plan))
        terms = [loop.train_step(run, batches[number % 2], Stopwatch(run.ranks.device)) for number in range(STEPS)]
        parameters = engine.training_tensors(run.ds_engine)["parameters"]
        return batches, [float(one["total"]) for one in terms], {n: one["master"] for n, one in parameters.items()}


def by_adamw(config: TrainConfig, batches: list, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """The same by torch alone: a master in fp32 for each weight, clipped gradients, AdamW, the schedule by hand."""
    device = batches[0].masks[0].device
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = published.load(config.model_path, dtype=dtype, device=device).model
    peft_model = lora.wrap(model, config).to(device).train()
    for parameter in peft_model.parameters():
        parameter.data = parameter.data.to(dtype)  # buffers such as rotary frequencies keep theirs
    copies = {name: weight for name, weight in peft_model.named_parameters() if weight.requires_grad}
    masters = {name: nn.Parameter(weight.detach().float().clone()) for name, weight in copies.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    warm_up, losses = math.ceil(config.warmup_ratio * STEPS), []
    for step in range(steps):
        factor = learning_rate_factor(step, STEPS, warm_up, config.lr_scheduler)
        optimizer.param_groups[0]["lr"] = factor * config.learning_rate
        batch = batches[step % 2]
        total = loop.loss_terms(model(batch.prompt, batch.vision, batch.sam2).masks, batch, config)["total"]
        total.backward()
        for name, weight in copies.items():
            masters[name].grad = torch.zeros_like(masters[name]) if weight.grad is None else weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(masters.values(), config.max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            for name, weight in copies.items():
                weight.copy_(masters[name])
        losses.append(float(total.detach()))
    return losses, {name: master.detach().cpu() for name, master in masters.items()}


def apart(masters: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far apart two ways ended, as a share of the way that was gone."""
    assert masters.keys() == expected.keys() == start.keys()

    def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))

    return distance(masters, expected) / distance(expected, start)
