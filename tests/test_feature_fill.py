"""Filling a store where GPU memory ends in a thread: the recorded encoder gives its own back, and it is tried again."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from sft.encoders import Sizes
from sft.feature_fill import Work, _keep, fill, grouped
from sft.feature_store import MemoryStore

KEYS = tuple("abcdef")


class Short:
    """A function that ends with the memory of a GPU the first so many times it is called with `at`."""

    def __init__(self, function, at, times: int):
        self._function, self._at, self.left, self.calls = function, at, times, []

    def __call__(self, first, *others):
        self.calls.append(first)
        if first == self._at and self.left:
            self.left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._function(first, *others)


@pytest.fixture
def encoders():
    """An encoder of whole numbers, which notes in which threads its recordings were given back."""
    forgotten = []
    return SimpleNamespace(
        device=torch.device("cpu"),
        sizes=Sizes(images=1, sam2_images=1, vision_tokens=1),
        many=lambda calls: contextlib.nullcontext(),
        encode=lambda loaded: [{"value": torch.tensor([number])} for number in loaded],
        forget=lambda: forgotten.append(threading.current_thread()),
        forgotten=forgotten,
    )


@pytest.fixture
def store():
    return MemoryStore(torch.device("cpu"))


def filled(store, encoders, load):
    groups = grouped([Work(number, {0: key}) for number, key in enumerate(KEYS)], size=1)
    with ThreadPoolExecutor(2) as readers:
        return fill(store, encoders, groups, load, readers, show=False)


def number_of(image, views):
    return image


def kept(store):
    return [entry and entry["value"].item() for entry in map(store.read, KEYS)]


@pytest.mark.parametrize("failing", ["reader", "keeper"])
@pytest.mark.parametrize("at", [0, 3, 5])  # the last ones are waited for after the last is encoded
def test_memory_that_ends_once_in_a_thread_is_taken_from_the_recorded_encoder(store, encoders, failing, at):
    load, put = Short(number_of, at, failing == "reader"), Short(store.put, KEYS[at], failing == "keeper")
    store.put = put
    assert filled(store, encoders, load).entries == len(KEYS)
    assert kept(store) == list(range(len(KEYS)))
    assert load.left == put.left == 0
    assert encoders.forgotten == [threading.current_thread()], "where nothing is recorded or replayed meanwhile"


@pytest.mark.parametrize("failing", ["reader", "keeper"])
def test_memory_that_ends_again_is_the_callers(store, encoders, failing):
    load, put = Short(number_of, 2, 9 * (failing == "reader")), Short(store.put, KEYS[2], 9 * (failing == "keeper"))
    store.put = put
    with pytest.raises(torch.OutOfMemoryError):
        filled(store, encoders, load)
    assert (load.calls.count(2), put.calls.count(KEYS[2])) == ((2, 0) if failing == "reader" else (1, 2))
    assert len(encoders.forgotten) == 1


def test_any_other_failure_of_a_thread_is_not_tried_again(store, encoders):
    calls = []

    def broken(image, views):
        calls.append(image)
        raise OSError("no picture")

    with pytest.raises(OSError, match="no picture"):
        filled(store, encoders, broken)
    assert calls.count(0) == 1 and not encoders.forgotten


def test_a_task_lets_go_of_entries_once_they_are_kept_and_not_before(store):
    """Those of a group are hundreds of MB on a GPU; but where memory ended they are there to be kept again."""
    entries = {key: {"value": torch.tensor([number])} for number, key in enumerate(KEYS)}
    store.put = Short(store.put, "b", 1)
    with pytest.raises(torch.OutOfMemoryError):
        _keep(store, entries, None, None)
    assert tuple(entries) == KEYS
    _keep(store, entries, None, None)
    assert not entries and kept(store) == list(range(len(KEYS)))
