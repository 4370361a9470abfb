"""Protects the pace of a step: between two lines of the log nothing waits for the GPU.

A GPU works behind the CPU. Whoever asks for a value of a tensor (`float`, `nonzero`, rows chosen by a mask or a list)
or makes one from numbers (`torch.tensor`) waits until all that is queued is done. On a CPU such calls are counted, on a
GPU torch itself reports them.
"""

import dataclasses
from collections import Counter

import pytest
import small_qwen
import small_runs
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sft import operations
from sft import run as runs
from sft import train as loop
from sft.features import Batch, Item
from sft.run import Run
from sft.stopwatch import Stopwatch

CALLS = {Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__float__, Tensor.__int__}
CALLS |= {Tensor.__index__, torch.tensor, torch.equal, torch.allclose}
OPERATORS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::_unique2"}
OPERATORS |= {"aten::masked_scatter_backward"}  # selects by the mask
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}


class CountedCalls(TorchFunctionMode):
    """Calls in Python that would wait."""

    def __init__(self, found: Counter):
        super().__init__()
        self._found = found

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function in CALLS or (function is torch.as_tensor and not isinstance(arguments[0], Tensor)):
            self._found[function.__name__] += 1
        if function is Tensor.__getitem__:
            index = arguments[1] if isinstance(arguments[1], tuple) else (arguments[1],)
            if any(isinstance(part, list) for part in index):
                self._found["rows by a list"] += 1
        return function(*arguments, **keywords or {})


class CountedOperators(TorchDispatchMode):
    """Operators that would wait, those of the backward pass among them."""

    def __init__(self, found: Counter):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        name = operator.name().partition(".")[0]
        by_mask = name in INDEXING and any(part is not None and part.dtype == torch.bool for part in arguments[1])
        if name in OPERATORS or by_mask:
            self._found[name] += 1
        return operator(*arguments, **keywords or {})


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The default precision and ZeRO stage, on the six images of several sizes."""
    monkeypatch.setenv("SA2VA_SFT_CACHE", str(tmp_path / "cache"))
    inputs = small_runs.write_inputs(tmp_path)
    return small_runs.settings(inputs, tmp_path / "runs", precision="bf16", num_epochs=100, log_every_steps=1000)


def ready(run: Run) -> list[Item]:
    """Features kept, dropout on; gives items of two sizes."""
    runs.keep_features(run, loop.all_items(run))
    run.ds_engine.train()
    items = [Item(pair) for pair in run.data.train]
    assert len({run.features._known[item.pair.name].size_hw for item in items}) > 1
    return items


def step(run: Run, batch: Batch, watch: Stopwatch, effort: operations.Effort) -> None:
    """What the loop does with a batch."""
    loop.train_step(run, batch, watch)
    effort.add(batch.prompt)


@pytest.mark.parametrize("family", ["internvl", *small_qwen.FAMILIES])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"train_modules": ("mask_decoder",)},
        {"gradient_checkpointing": True},
        {"text_weight": 0.1},
    ],
    ids=["plain", "accumulation", "decoder trains", "recomputed", "text"],
)
def test_nothing_in_a_step_would_wait(config, tmp_path, family, changes):
    if family != "internvl":
        small_qwen.write(tmp_path / "qwen", family)
        changes = changes | {"model_path": str(tmp_path / "qwen")}
    found = Counter()
    with runs.prepared(dataclasses.replace(config, **changes)) as run:
        items, watch = ready(run), Stopwatch(run.ranks.device)
        effort = operations.Effort(run.loaded.model, run.ranks.device)
        batches = run.features.batches([items] * 4)
        for number, batch in enumerate(batches):
            if number < 2:
                step(run, batch, watch, effort)
                continue
            with CountedOperators(found), CountedCalls(found):
                step(run, batch, watch, effort)
        run.watch.check(run.config)
    assert found == Counter()


def test_the_count_sees_what_waits():
    """Each in turn, on its own."""
    values, mask = torch.arange(4.0, requires_grad=True), torch.tensor([True, False, True, False])
    waiting = {
        "float": lambda: float(values.detach().sum()),
        "if": lambda: bool(values.sum() > 1),
        "a mask": lambda: values[mask],
        "a list": lambda: values[[0, 2]],
        "nonzero": lambda: mask.nonzero(),
        "a new tensor": lambda: values * torch.tensor(2.0),
        "a backward pass": lambda: values.masked_scatter(mask, values[:2]).sum().backward(),
    }
    for name, call in waiting.items():
        found = Counter()
        with CountedOperators(found), CountedCalls(found):
            call()
        assert found, name
    found = Counter()
    with CountedOperators(found), CountedCalls(found):
        torch.where(mask, values, 0.0).clamp(max=3).sum().backward()
    assert found == Counter()


def test_an_epoch_asks_for_values_as_often_as_it_logs(config):
    """Steps without a line add nothing."""

    def asked(steps: int, log_every_steps: int) -> int:
        found = Counter()
        changed = dataclasses.replace(config, batch_size=1, log_every_steps=log_every_steps)
        with runs.prepared(changed) as run:
            ready(run)
            run.data = dataclasses.replace(run.data, train=run.data.train[:1] * steps)
            run.steps_per_epoch = steps
            run.log.start(2 * steps)
            loop.train_epoch(run, 1)  # the first checks gradients
            with CountedOperators(found):
                loop.train_epoch(run, 2)
        return found["aten::_local_scalar_dense"]

    seldom = asked(2, log_every_steps=1000)
    assert seldom == asked(6, log_every_steps=1000)
    assert asked(6, log_every_steps=1) >= seldom + 6


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("place", ["gpu", "host", "disk"])
def test_no_step_waits_for_the_gpu(config, place, compiled):
    """Batches and steps, after the first have compiled and recorded: torch raises where one would wait."""
    config = dataclasses.replace(config, feature_cache=place, compile=compiled)
    with runs.prepared(config) as run:
        items, watch = ready(run), Stopwatch(run.ranks.device)
        effort = operations.Effort(run.loaded.model, run.ranks.device)
        batches = run.features.batches([items] * 8)
        for _ in range(4):
            step(run, next(batches), watch, effort)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches:
                step(run, batch, watch, effort)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        run.watch.check(run.config)
