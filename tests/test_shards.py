"""Protects reading weights, mapped and staged: every byte in its place, no more memory than the weights need."""

import os
import threading
import weakref

import pytest
import small_sa2va as small
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sft.config import UserError
from sft.model import published, random_weights, shapes, shards

CPU = torch.device("cpu")
LARGEST_SHARD = 300_000


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, as long as they live; `peak` is the most at a time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self._known = 0, 0, {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


@pytest.fixture
def staged(monkeypatch):
    """Reads as for a GPU; every tensor of a small model takes several reads, and few are read ahead."""
    monkeypatch.setattr(shards, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(shards, "AHEAD_BYTES", 3000)
    monkeypatch.setattr(shards, "begin", lambda *reading: shards._begun(shards._staged(*reading)))


def test_every_dtype_and_shape_comes_back_bit_by_bit_in_the_order_of_the_file(tmp_path, staged):
    """Against safetensors' own reader: no element, one, odd counts, beyond one read."""
    drawn = torch.Generator().manual_seed(0)
    written = {"none": torch.empty(0, 3), "one": torch.tensor(7.5), "odd": torch.rand(3, 5, 7, generator=drawn)}
    for dtype in set(shards._DTYPES.values()) - {torch.bool}:
        written[str(dtype)] = torch.randint(0, 100, (41, 30), generator=drawn).to(dtype)
    written["bool"] = torch.rand(2001, generator=drawn) > 0.5
    half = len(written) // 2
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file(dict(list(written.items())[:half]), files[0])
    save_file(dict(list(written.items())[half:]), files[1], metadata={"format": "pt"})
    expected = load_file(files[0]) | load_file(files[1])
    found = dict(shards.begin(files, torch.bfloat16, CPU))
    assert set(found) == set(written)
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    begins = [entry.begin for entry in shards._entries(files[1])]
    assert begins == sorted(begins) and list(found)[half:] == [entry.name for entry in shards._entries(files[1])]


def test_staged_weights_make_the_same_model(tmp_path, staged):
    """Fused, split and joined tensors included."""
    written = small.write(tmp_path).state_dict()
    read = published.load(str(tmp_path), dtype=torch.float32).model.state_dict()
    assert set(read) == set(written) and all(torch.equal(read[name], written[name]) for name in written)


def test_weights_changed_in_memory_leave_the_mapped_file_alone(tmp_path):
    """Modules trained whole are changed in place."""
    small.write(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        for tensor in published.load(str(tmp_path), dtype=torch.float32).model.state_dict().values():
            tensor.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_file_that_ends_while_it_is_read_is_one_clear_line(tmp_path, monkeypatch, staged):
    small.write(tmp_path)
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(UserError, match=r"model\.safetensors: ended while it was read; download it again"):
        published.load(str(tmp_path))


def test_a_type_that_no_published_model_has_is_named(tmp_path, staged):
    save_file({"x": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="x is of type F8_E4M3; supported: F64, F32, F16, BF16"):
        list(shards.begin([tmp_path / "a.safetensors"], torch.bfloat16, CPU))


def test_short_reads_are_continued(tmp_path, monkeypatch, staged):
    """A read may give fewer bytes than it was asked for."""
    save_file({"x": torch.arange(1000)}, tmp_path / "a.safetensors")
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, at: whole(descriptor, [views[0][:77]], at))
    assert torch.equal(dict(shards.begin([tmp_path / "a.safetensors"], torch.bfloat16, CPU))["x"], torch.arange(1000))


def test_a_caller_that_stops_leaves_no_reader_behind(tmp_path, staged):
    """Loading fails after reading began when the tokenizer is broken."""
    small.write(tmp_path)
    before = threading.active_count()
    tensors = shards.begin([tmp_path / "model.safetensors"], torch.float32, CPU)
    assert threading.active_count() > before, "reading goes on before anyone asks"
    tensors.close()
    assert threading.active_count() == before
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read") as kept:  # and its frames with it
        published.load(str(tmp_path))
    assert threading.active_count() == before, kept


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16 files", "fp32 files"])
def sharded(tmp_path_factory, request):
    """A small random directory in many shards."""
    directory = tmp_path_factory.mktemp("sharded")
    shape = shapes.Shape(small.config(num_hidden_layers=24), small.tokenizer().get_added_vocab())
    headers = 80_000
    random_weights.write(shape, directory, shard_bytes=(LARGEST_SHARD - headers) * 2 // request.param.itemsize)
    for file in directory.glob("*.safetensors"):
        save_file({name: tensor.to(request.param) for name, tensor in load_file(file).items()}, file)
    sizes = [file.stat().st_size for file in directory.glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) <= LARGEST_SHARD
    return directory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reader", ["mapped", "staged"])
def test_loading_holds_the_weights_and_little_beside(sharded, request, reader, dtype):
    """Staged: one tensor, what is read ahead, the buffers. Mapped: one file, and none beside what are its views.

    All shards kept to the end, a shard kept to its end, or a fused tensor kept beside its parts, would be more.
    """
    if reader == "staged":
        request.getfixturevalue("staged")
    with LiveBytes() as counted:
        model = published.load(str(sharded), dtype=dtype).model
    sizes = [tensor.nbytes for tensor in model.state_dict().values()]
    largest = max(tensor.numel() for tensor in model.state_dict().values()) * 4  # of an fp32 file, or converted to fp32
    beside = 2 * sum(buffer.nbytes for buffer in model.buffers())  # rotary frequencies, and what they are made from
    beside += shards.AHEAD_BYTES + shards.READERS * shards.CHUNK_BYTES if reader == "staged" else LARGEST_SHARD
    assert beside < 0.4 * sum(sizes), "too small a model to tell"
    assert sum(sizes) <= counted.peak <= sum(sizes) + largest + beside


def test_the_count_of_live_bytes_sees_a_tensor_kept_and_one_let_go():
    with LiveBytes() as counted:
        kept = torch.zeros(1000, dtype=torch.uint8)
        part = kept[10:20]
        torch.ones(500, dtype=torch.uint8)
        torch.ones(500, dtype=torch.uint8)
    assert (counted.peak, counted.live) == (1500, 1000) and len(part) == 10


@pytest.mark.gpu
def test_a_gpu_gets_the_same_weights_and_nothing_beside(tmp_path):
    """Through pinned buffers: bit by bit what a CPU reads, at a peak of the weights alone."""
    settings = small.config(vocab_size=200_000, hidden_size=256, num_attention_heads=8, num_key_value_heads=4)
    total = random_weights.write(shapes.Shape(settings, small.tokenizer().get_added_vocab()), tmp_path)
    on_cpu = published.load(str(tmp_path)).model.state_dict()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    on_gpu = published.load(str(tmp_path), device="cuda").model.state_dict()
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * total
    assert all(torch.equal(tensor.cpu(), on_cpu[name]) for name, tensor in on_gpu.items())
