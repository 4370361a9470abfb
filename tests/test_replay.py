"""Protects what a recorded encoder gives: the numbers of the function itself, call by call, and its memory back."""

import threading

import numpy as np
import pytest
import small_runs
import torch
from torch import Tensor

from sft.config import TrainConfig
from sft.encoders import Encoders
from sft.model import published
from sft.replay import Replayed

pytestmark = pytest.mark.gpu
MIB = 2**20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return small_runs.write_inputs(tmp_path_factory.mktemp("inputs"))


class Counted:
    """A function of a tensor that counts how often Python runs it."""

    def __init__(self):
        self.calls = 0
        self.weight = torch.randn(256, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(0))

    def __call__(self, given: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        hidden = torch.nn.functional.gelu(given.float() @ self.weight)
        return hidden, hidden.sum(-1)


def given(seed: int, rows: int = 64) -> Tensor:
    return torch.randint(0, 256, (rows, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).cuda()


def test_replays_give_the_functions_own_numbers_in_memory_of_their_own():
    function = Counted()
    replayed = Replayed(function)
    with replayed.recording():
        found = [replayed(given(seed)) for seed in range(5)]
    assert function.calls == 2  # once as it is, once recorded
    for seed, parts in enumerate(found):
        assert all(torch.equal(part, own) for part, own in zip(parts, function(given(seed)), strict=True))


def test_a_shape_that_comes_once_is_not_recorded_and_each_shape_has_its_own_recording():
    function = Counted()
    replayed = Replayed(function)
    with replayed.recording():
        for rows in (64, 32, 64, 32, 64, 32, 16):
            parts = replayed(given(rows, rows))
            assert all(torch.equal(part, own) for part, own in zip(parts, Counted()(given(rows, rows)), strict=True))
    assert function.calls == 5  # twice for each of two shapes, once for the third


@pytest.mark.parametrize("wanted", [True, False])
def test_nothing_is_recorded_outside_or_where_it_is_not_wanted_and_the_memory_comes_back(wanted):
    function = Counted()
    replayed = Replayed(function)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with replayed.recording(wanted):
        for seed in range(3):
            replayed(given(seed))
    calls = function.calls
    assert calls == (2 if wanted else 3)
    replayed(given(0))
    assert function.calls == calls + 1
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2 * MIB


def test_other_threads_may_pin_memory_and_copy_while_it_records():
    stop, failures = threading.Event(), []

    def beside() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                while not stop.is_set():
                    torch.ones(MIB).pin_memory().to("cuda", non_blocking=True).sum().item()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=beside)
    thread.start()
    try:
        for _ in range(10):
            replayed = Replayed(Counted())
            with replayed.recording():
                found = [replayed(given(seed)) for seed in range(4)]
            assert torch.equal(found[3][0], Counted()(given(3))[0])
    finally:
        stop.set()
        thread.join()
    assert not failures


def test_where_memory_ends_while_it_records_it_goes_on_without():
    function = Counted()

    def once_short(given: Tensor) -> tuple[Tensor, Tensor]:
        found = function(given)  # before the end: recording stops halfway
        if torch.cuda.is_current_stream_capturing():
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        return found

    replayed = Replayed(once_short)
    with replayed.recording():
        found = [replayed(given(seed)) for seed in range(4)]
    assert function.calls == 5  # the second call twice: recording it, and for its result
    assert all(torch.equal(parts[0], function(given(seed))[0]) for seed, parts in enumerate(found))


def test_memory_that_ends_beside_a_recording_is_taken_back_from_it(inputs):
    """The vision encoder asks for more than is left while SAM2's encoder is recorded; then it is not any more."""
    loaded = published.load(str(inputs / "model"), dtype=torch.float32, device="cuda")
    encoders = Encoders(loaded.model, loaded.preprocess, TrainConfig(precision="fp32"), torch.device("cuda"))
    given = [encoders.load([np.full((64, 64, 3), value, np.uint8)]) for value in range(16)]
    vision_of = loaded.model.vision_features_of

    def short(images):
        if encoders._sam2_parts._recordings:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        return vision_of(images)

    expected = encoders.encode(given)
    with encoders.many(100):
        encoders.encode(given)
        assert encoders._sam2_parts._recordings
        loaded.model.vision_features_of = short
        found = encoders.encode(given)
        assert not encoders._sam2_parts._recordings
    for entry, own in zip(found, expected, strict=True):
        assert all(torch.equal(entry[name], own[name]) for name in own)
    torch.cuda.empty_cache()
    loaded.model.vision_features_of = lambda images: torch.empty(2**50, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        encoders.encode(given)
