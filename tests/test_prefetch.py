"""Protects the batches that are put together beside a step: their order, their content, and how they end."""

import dataclasses

import pytest
import torch
from torch import Tensor

from sft.features import Batch
from sft.model.sa2va import Prompt, Sam2Features, VisionFeatures
from sft.prefetch import prefetched


@dataclasses.dataclass
class Values:
    """A batch of one tensor."""

    tensor: Tensor

    def tensors(self):
        return iter([self.tensor])


def batches(count: int, device: str, closed: list | None = None, fails_at: int | None = None):
    try:
        for number in range(count):
            if number == fails_at:
                raise KeyError("no such image")
            host = torch.full((1000, 1000), float(number))
            yield Values((host.pin_memory() if device == "cuda" else host).to(device, non_blocking=True))
    finally:
        if closed is not None:
            closed.append(True)


def test_without_a_gpu_batches_come_straight_from_their_maker():
    made = batches(3, "cpu")
    assert [batch.tensor[0, 0].item() for batch in prefetched(made, None)] == [0.0, 1.0, 2.0]


@pytest.mark.gpu
def test_on_a_gpu_they_come_in_order_whole_and_ready_for_the_stream_of_the_step():
    """The step's stream is busy, so that what a batch does not wait for would show."""
    sums, stream = [], torch.cuda.Stream()
    for batch in prefetched(batches(20, "cuda"), stream):
        torch.cuda._sleep(2_000_000)
        sums.append(batch.tensor.sum())
        del batch  # its memory must not go to a later batch while the sum waits
    assert [one.item() for one in sums] == [number * 1e6 for number in range(20)]
    assert list(prefetched(batches(0, "cuda"), stream)) == []


@pytest.mark.gpu
def test_on_a_gpu_an_error_reaches_the_step_and_an_early_end_closes_the_maker():
    closed: list = []
    with pytest.raises(KeyError, match="no such image"):
        list(prefetched(batches(5, "cuda", closed, fails_at=3), torch.cuda.Stream()))
    assert closed == [True]
    coming = prefetched(batches(5, "cuda", closed), torch.cuda.Stream())
    next(coming)
    coming.close()
    assert closed == [True, True]


def tensors_in(value) -> list[Tensor]:
    """All tensors anywhere in a dataclass."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in tensors_in(part)]
    if dataclasses.is_dataclass(value):
        return [tensor for field in dataclasses.fields(value) for tensor in tensors_in(getattr(value, field.name))]
    return []


@pytest.mark.parametrize("sam2_trains", [False, True])
def test_a_batch_tells_all_its_tensors(sam2_trains):
    """One that was left out could be overwritten while a step still reads it."""

    def new() -> Tensor:
        return torch.zeros(1)

    sam2 = new() if sam2_trains else Sam2Features(new(), new(), new(), projected=True)
    batch = Batch((), Prompt(new(), new(), new(), new(), new()), VisionFeatures(new(), new()), sam2, (new(), new()))
    assert {id(tensor) for tensor in batch.tensors()} == {id(tensor) for tensor in tensors_in(batch)}
    assert len(tensors_in(batch)) == (10 if sam2_trains else 12)
    without = dataclasses.replace(batch, prompt=Prompt(new(), new()), vision=VisionFeatures(new()))
    assert all(isinstance(tensor, Tensor) for tensor in without.tensors())
