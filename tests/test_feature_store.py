"""Protects kept features: what was put is what is read, by any process, after any crash; keys notice every change."""

import dataclasses
import errno
import inspect
import json
import os
import random
import subprocess
import sys
import threading
import zlib
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sft.feature_store import (
    PLACES,
    Demand,
    DiskStore,
    MemoryStore,
    NoStore,
    Room,
    cache_directory,
    choose,
    entry_key,
    file_fingerprint,
    fingerprints,
    free_disk_bytes,
    free_gpu_bytes,
    free_host_bytes,
    listed,
    read_ahead,
    settings_fingerprint,
    stores_in,
    weights_fingerprint,
)
from sft.feature_store import disk as disk_room
from sft.feature_store import entry as entry_room
from sft.feature_store import memory as memory_room
from sft.settings import UserError

CPU = torch.device("cpu")
GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]


def entry(number: int, size: int = 20_000) -> dict[str, torch.Tensor]:
    """An entry that tells its number."""
    values = torch.arange(size, dtype=torch.int64) * 2654435761 + number
    return {"tokens": values.to(torch.float32).to(torch.bfloat16).view(-1, 8), "levels": values.view(2, -1)}


# The tests' processes make entries in the same way.
IN_A_PROCESS = "import sys, torch\nfrom sft.feature_store import DiskStore\n" + inspect.getsource(entry)


@pytest.fixture
def made(tmp_path):
    """Makes disk stores that are closed at the end."""
    stores = []

    def make(scope: str = "model", root: Path = tmp_path / "features", **more) -> DiskStore:
        stores.append(DiskStore(root, scope, {"model": "tiny"}, **more))
        return stores[-1]

    yield make
    for store in stores:
        store._failure = store._untold = None
        store.close()


def same(one: dict, other: dict) -> bool:
    alike = one.keys() == other.keys() and all(one[name].dtype == other[name].dtype for name in one)
    return alike and all(torch.equal(one[name], other[name]) for name in one)


def run_process(code: str, *arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", IN_A_PROCESS + code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)


def flipped(file: Path, position: int) -> None:
    """One bit of the byte at a position turned over, in place."""
    data = bytearray(file.read_bytes())
    data[position] ^= 0x10
    file.write_bytes(data)


# Entries and files


def stores(made) -> dict:
    return {"disk": made(), "host": MemoryStore(CPU), "host before disk": MemoryStore(CPU, behind=made("behind"))}


@pytest.mark.parametrize("place", ["disk", "host", "host before disk"])
def test_every_store_gives_back_what_was_put(made, place):
    """Any dtype and shape, empty and without dimensions, whatever order the tensors have."""
    store = stores(made)[place]
    odd = {
        "flag": torch.tensor([True, False, True]),
        "none": torch.empty(0, 7, dtype=torch.bfloat16),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "turned": torch.randn(3, 5).to(torch.bfloat16).T,
        "special": torch.tensor([-0.0, float("inf")], dtype=torch.float16),
        "whole": torch.tensor([[-(2**63), 7]]),
    }
    assert store.missing(["b", "a", "b"]) == ["b", "a"] and store.read("a") is None
    store.put("a", odd)
    store.put("b", entry(4))
    assert same(store.read("a"), odd), "also before it is written"
    store.flush()
    assert same(store.read("a"), odd) and same(store.read("b"), entry(4))
    assert torch.signbit(store.read("a")["special"])[0]
    assert store.missing(["b", "c", "a"]) == ["c"] and store.rejected == ()


def test_no_store_keeps_nothing():
    store = NoStore()
    store.put("a", entry(1))
    assert store.read("a") is None and store.missing(["a", "b", "a"]) == ["a", "b"]


def test_an_entrys_file_is_safetensors(made):
    """Its own library, an independent reader, finds the same tensors; the header says which entry it is."""
    store = made()
    store.put("a", entry(9) | {"odd": torch.ones(3, dtype=torch.bool)})
    store.flush()
    file = store.folder / "a.safetensors"
    assert same(load_file(file), entry(9) | {"odd": torch.ones(3, dtype=torch.bool)})
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    zeros = raw.replace(f'"crc32":"{header["crc32"]}"'.encode(), b'"crc32":"00000000"', 1)
    assert header == {"format": "1", "store": "v1-model", "key": "a", "crc32": f"{zlib.crc32(zeros):08x}"}


def test_what_an_entry_cannot_hold_is_refused(made):
    with pytest.raises(ValueError, match="x is torch.complex64: an entry holds"):
        made().put("a", {"x": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="no tensors"):
        made().put("a", {})
    for name in ("../a", "", "a/b", "x" * 121, "ä"):
        with pytest.raises(ValueError, match="no name of a file"):
            made().put(name, entry(1))


def test_entries_do_not_hold_on_to_the_tensors_they_came_from(made):
    """A caller's buffer that is used again does not change what was put."""
    for store in stores(made).values():
        tensors = entry(3)
        store.put("a", tensors)
        tensors["levels"].zero_()
        store.flush()
        assert same(store.read("a"), entry(3))


# Damage


def test_every_damaged_byte_is_noticed_and_the_entry_computed_again(made):
    """A bit anywhere in the file, header and padding included: not used, named, missing, and mended by the next put."""
    writer = made()
    writer.put("a", {"tokens": torch.arange(64, dtype=torch.int16)})
    writer.flush()
    file = writer.folder / "a.safetensors"
    whole = file.read_bytes()
    positions = [*range(0, 400, 3), 4000, 4095, *range(4096, len(whole), 5), len(whole) - 1]
    for position in positions:
        file.write_bytes(whole)
        flipped(file, position)
        store = made()
        assert store.read("a") is None, f"byte {position}"
        assert len(store.rejected) == 1 and f"{file}: not used" in store.rejected[0]
        assert store.missing(["a"]) == ["a"] and not file.exists()
        store.close()
    store = made()
    store.put("a", entry(2))
    store.flush()
    assert same(made().read("a"), entry(2))


@pytest.mark.parametrize("left", [0, 5, 8, 100, 4095, 4096, 5000, -1])
def test_a_file_cut_short_is_not_used(made, left):
    store = made()
    store.put("a", entry(1))
    store.flush()
    file = store.folder / "a.safetensors"
    size = file.stat().st_size
    os.truncate(file, left if left >= 0 else size - 1)
    assert store.read("a") is None and store.missing(["a"]) == ["a"]


def test_a_file_with_more_than_its_data_is_not_used(made):
    store = made()
    store.put("a", entry(1))
    store.flush()
    with open(store.folder / "a.safetensors", "ab") as file:
        file.write(b"x")
    assert store.read("a") is None and "bytes instead of" in store.rejected[0]


def test_a_file_changed_after_its_first_read_is_checked_again(made):
    """The checksum is compared once per process and file, and a file replaced since is another file."""
    store = made()
    store.put("a", entry(1))
    store.flush()
    assert same(store.read("a"), entry(1))
    file = store.folder / "a.safetensors"
    changed = file.with_name("changed")
    changed.write_bytes(file.read_bytes())
    flipped(changed, 6000)
    os.replace(changed, file)
    assert store.read("a") is None and "checksum" in store.rejected[0]


def test_the_checksum_is_computed_at_the_first_read_alone(made, monkeypatch):
    store = made()
    store.put("a", entry(1))
    store.flush()
    sums, crc32 = [], zlib.crc32
    monkeypatch.setattr(entry_room.zlib, "crc32", lambda *data: sums.append(data) or crc32(*data))
    for _ in range(3):
        assert same(store.read("a"), entry(1))
    assert len(sums) == 2, "header and data, once"


def test_another_entrys_file_is_not_used(made, tmp_path):
    """A stale file: copied from another key or another store, or of another program."""
    store, other = made(), made("other")
    store.put("a", entry(1))
    other.put("a", entry(2))
    store.flush()
    other.flush()
    good = (store.folder / "a.safetensors").read_bytes()
    (store.folder / "b.safetensors").write_bytes(good)
    (store.folder / "c.safetensors").write_bytes((other.folder / "a.safetensors").read_bytes())
    save_file(entry(1), store.folder / "d.safetensors")
    for key in "bcd":
        assert store.read(key) is None
    assert "another entry" in store.rejected[0] and "another entry" in store.rejected[1] and len(store.rejected) == 3
    assert same(store.read("a"), entry(1)) and same(other.read("a"), entry(2))


def test_a_damaged_file_that_cannot_be_removed_still_counts_as_missing(made, monkeypatch):
    store = made()
    store.put("a", entry(1))
    store.flush()
    flipped(store.folder / "a.safetensors", 5000)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert store.read("a") is None and store.missing(["a"]) == ["a"]
    store.put("a", entry(1))
    store.flush()
    assert store.missing(["a"]) == [] and same(store.read("a"), entry(1))


# Several processes


FILL = """
import random
store = DiskStore(sys.argv[1], "model", {"model": "tiny"})
keys = [str(n) for n in range(int(sys.argv[2]))]
random.Random(int(sys.argv[3])).shuffle(keys)
for key in keys:
    store.put(key, entry(int(key)))
    if store.read(key) is None: sys.exit("what was put is gone")
store.close()
"""


def test_processes_that_fill_at_once_do_not_harm_each_other(made, tmp_path):
    """Two write the same entries in different orders; every one is whole, and nothing else is left."""
    processes = [run_process(FILL, tmp_path / "features", 30, seed) for seed in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    store = made()
    assert store.missing(map(str, range(30))) == []
    assert all(same(store.read(str(n)), entry(n)) for n in range(30)) and store.rejected == ()
    assert sorted(os.listdir(store.folder)) == sorted(["about.json", *(f"{n}.safetensors" for n in range(30))])


KILLED_BETWEEN_FILES = """
store = DiskStore(sys.argv[1], "model", {"model": "tiny"})
for n in range(10**6):
    store.put(str(n), entry(n))
    print(n, flush=True)
"""
KILLED_WITHIN_A_FILE = """
import signal
from sft.feature_store import entry as room
store = DiskStore(sys.argv[1], "model", {"model": "tiny"})
for n in range(3):
    store.put(str(n), entry(n))
store.flush()
real = open
class HalfFile:
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
    def write(self, data):
        if isinstance(data, memoryview):
            self.file.write(data[: len(data) // 2]); self.file.flush()
            print("writing", flush=True)
            signal.sigwait([signal.SIGUSR1])
        return self.file.write(data)
room.open = lambda path, mode, **more: HalfFile(real(path, mode, **more))
store.put("3", entry(3))
store.flush()
"""


def test_a_kill_within_a_file_leaves_the_others_and_no_trace_of_it(made, tmp_path):
    """Half of the data is in the file when the process dies; filling goes on, and an hour later the rest is swept."""
    process = run_process(KILLED_WITHIN_A_FILE, tmp_path / "features")
    assert process.stdout.readline() == "writing\n"
    process.kill()
    assert process.wait() == -9
    store = made()
    (partial,) = store.folder.glob(".*.partial")
    assert partial.stat().st_size > entry(3)["levels"].nbytes // 2
    assert store.missing("0123") == ["3"] and all(same(store.read(str(n)), entry(n)) for n in range(3))
    store.put("3", entry(3))
    store.flush()
    assert same(store.read("3"), entry(3)) and partial.exists(), "another process might still be writing it"
    os.utime(partial, (0, 0))
    assert made().missing("0123") == [] and not partial.exists()


@pytest.mark.parametrize("after", [1, 7, 23])
def test_a_kill_at_any_time_leaves_whole_entries_and_filling_goes_on(made, tmp_path, after):
    process = run_process(KILLED_BETWEEN_FILES, tmp_path / "features")
    for _ in range(after):
        process.stdout.readline()
    process.kill()
    process.wait()
    store = made()
    keys = [str(n) for n in range(after + 30)]
    missing = store.missing(keys)
    assert missing, "it was killed before the end"
    assert all(same(store.read(key), entry(int(key))) for key in keys if key not in missing) and store.rejected == ()
    for key in missing:
        store.put(key, entry(int(key)))
    store.flush()
    assert store.missing(keys) == [] and all(same(store.read(key), entry(int(key))) for key in keys)


def test_ranks_fill_a_share_each_and_read_all(made):
    keys = [str(n) for n in range(7)]
    ranks = [made(), made()]
    for rank, store in enumerate(ranks):
        share = store.missing(keys[rank::2])
        assert share == keys[rank::2]
        for key in share:
            store.put(key, entry(int(key)))
        store.flush()
    for store in ranks:
        assert store.missing(keys) == [] and all(same(store.read(key), entry(int(key))) for key in keys)


# What a user meets


def test_a_full_disk_is_said_and_what_is_there_stays(made, tmp_path):
    """A real limit of the system on a file's size stands for the full disk; the process goes on to read."""
    code = """
import resource
from sft.settings import UserError
store = DiskStore(sys.argv[1], "model", {})
store.put("small", entry(1, 800))
store.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
def large():
    store.put("large", entry(2))
    store.flush()
def more():
    store.put("more", entry(1, 800))
for attempt in (large, more, store.close):
    try:
        attempt()
        sys.exit("nothing was said")
    except UserError as error:
        print(error)
assert store.missing(["small", "large", "more"]) == ["large", "more"] and store.read("small") is not None
"""
    process = run_process(code, tmp_path / "features")
    said = process.communicate()[0].splitlines()
    assert process.returncode == 0 and len(said) == 3
    assert "the feature cache cannot be used (File too large); what it holds is intact" in said[0]
    assert "another feature_cache_dir or --feature_cache host or off" in said[0] and "delete any with rm -r" in said[0]
    store = made()
    assert sorted(os.listdir(store.folder)) == ["about.json", "small.safetensors"]
    assert same(store.read("small"), entry(1, 800))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_what_a_user_can_mend_is_a_users_error(made, monkeypatch, number):
    store = made()

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk_room.os, "replace", fail)
    store.put("a", entry(1))
    with pytest.raises(UserError, match=os.strerror(number)):
        store.flush()
    assert store.missing(["a"]) == ["a"] and not list(store.folder.glob(".*"))


def test_what_memory_keeps_goes_on_when_the_disk_behind_is_full(made, monkeypatch):
    """It is told once, a flush raises it for who needs the files, and the end of the run is none the worse."""
    behind = made()
    store = MemoryStore(CPU, behind=behind)

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk_room.os, "replace", fail)
    store.put("a", entry(1))
    with pytest.raises(UserError, match="No space left"):
        store.flush()
    store.put("b", entry(2))  # is not tried any more
    assert same(store.read("a"), entry(1)) and same(store.read("b"), entry(2))
    store.close()
    (told,) = store.rejected
    assert "No space left" in told and "kept in memory for this run" in told


def test_memory_does_not_wait_for_the_disk_behind(made, monkeypatch):
    """More entries than may wait elsewhere are put while the first is still being written."""
    goes_on, written, really = threading.Event(), [], disk_room.write

    def slow(path, packed, *names):
        goes_on.wait(60)
        written.append(packed.data.data_ptr())
        return really(path, packed, *names)

    monkeypatch.setattr(disk_room, "write", slow)
    behind = made()
    store = MemoryStore(CPU, behind=behind)
    keys = [f"entry_{number}" for number in range(disk_room.WRITES_AHEAD + 5)]
    for number, key in enumerate(keys):
        store.put(key, entry(number, 800))
    assert not written and store.missing(keys) == []
    goes_on.set()
    store.flush()
    own = {packed.data.data_ptr() for packed in store._kept.values()}
    assert set(written) == own, "written from where they are kept"
    assert same(made().read("entry_3"), entry(3, 800))


def test_a_store_that_closes_in_a_hurry_leaves_the_rest_unwritten(made, monkeypatch):
    goes_on, really = threading.Event(), disk_room.write

    def slow(*arguments):
        goes_on.wait(60)
        return really(*arguments)

    monkeypatch.setattr(disk_room, "write", slow)
    monkeypatch.setattr(disk_room, "wait", lambda writes, at_most_s=None: goes_on.set())  # the time is over
    store = MemoryStore(CPU, behind=made())
    keys = [f"entry_{number}" for number in range(40)]
    for key in keys:
        store.put(key, entry(1, 800))
    store.close(at_most_s=0.01)
    there = set(keys) - set(made().missing(keys))
    assert len(there) < 40 and all(same(made().read(key), entry(1, 800)) for key in there)


def test_an_unforeseen_error_of_a_writing_thread_is_heard(made, monkeypatch):
    store = made()

    def fail(*_):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(disk_room, "write", fail)
    store.put("a", entry(1))
    with pytest.raises(RuntimeError, match="unforeseen"):
        store.flush()


def test_a_root_that_is_a_file_is_refused(made, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="feature cache cannot be used .Not a directory"):
        made(root=tmp_path / "file" / "features")


def test_the_folder_says_what_it_is_and_touches_nothing_else(made, tmp_path):
    root = tmp_path / "features"
    theirs = root / "theirs"
    theirs.mkdir(parents=True)
    (theirs / "data").write_text("keep")
    (theirs / ".x.partial").write_text("keep")
    os.utime(theirs / ".x.partial", (0, 0))
    store = made()
    store.put("a", entry(1))
    store.flush()
    made("second")
    readme = (root / "README").read_text()
    assert "sa2va-sft" in readme and "rm -r" in readme
    assert json.loads((store.folder / "about.json").read_text()) == {"model": "tiny"}
    size = (store.folder / "a.safetensors").stat().st_size
    assert [(one.folder.name, one.entries, one.bytes) for one in stores_in(root)] == [
        ("v1-model", 1, size),
        ("v1-second", 0, 0),
    ]
    assert "v1-model (0.0 GiB, last used 20" in listed(root) and "delete any with rm -r" in listed(root)
    assert (theirs / "data").read_text() == "keep" and (theirs / ".x.partial").exists()
    assert listed(tmp_path / "nowhere").endswith("holds no features")


def test_a_store_deleted_in_use_is_filled_anew(made):
    """What the README in the folder promises."""
    store = made()
    store.put("a", entry(1))
    store.flush()
    for file in store.folder.iterdir():
        file.unlink()
    store.folder.rmdir()
    assert store.read("a") is None and store.missing(["a"]) == ["a"]
    store.put("a", entry(1))
    store.flush()
    assert same(store.read("a"), entry(1)) and (store.folder / "about.json").is_file()


def test_where_the_cache_lies(monkeypatch, tmp_path):
    assert cache_directory("~/here") == Path.home() / "here"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SA2VA_SFT_CACHE")
    assert cache_directory() == tmp_path / "sa2va-sft" / "features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "sa2va-sft" / "features"
    monkeypatch.setenv("SA2VA_SFT_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own" / "features"


# Memory and reading ahead


def test_memory_takes_from_the_disk_behind_and_survives_its_loss(made):
    made().put("a", entry(1))
    filled = made()
    filled.put("a", entry(1))
    filled.flush()
    store = MemoryStore(CPU, behind=made())
    assert store.missing(["a", "b"]) == ["b"]
    first = store.read("a")
    (filled.folder / "a.safetensors").unlink()
    assert same(store.read("a"), entry(1)) and store.missing(["a"]) == []
    assert store.read("a")["tokens"].data_ptr() == first["tokens"].data_ptr(), "one copy"


def test_memory_says_what_the_disk_behind_could_not_use(made):
    filled = made()
    filled.put("a", entry(1))
    filled.flush()
    flipped(filled.folder / "a.safetensors", 6000)
    store = MemoryStore(CPU, behind=made())
    assert store.read("a") is None and "checksum" in store.rejected[0]


def test_entries_in_memory_do_not_overlap(monkeypatch):
    """Slabs of 100 kB: several entries share one, one is larger than that."""
    monkeypatch.setattr(memory_room, "SLAB_BYTES", 100_000)
    store, sizes = MemoryStore(CPU), [8, 800, 4_000, 24_000, 80, 4_000]
    for number, size in enumerate(sizes):
        store.put(str(number), entry(number, size))
    assert all(same(store.read(str(number)), entry(number, size)) for number, size in enumerate(sizes))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_entry_that_a_layer_has_saved_for_its_backward_pass_bears_the_next_one(device):
    """Entries share a slab: autograd must not take a write into the next one, read ahead, for one into the saved."""
    pixels, layer = torch.ones(1, 4, 8, 8, device=device), torch.nn.Conv2d(4, 2, 1, device=device)
    store = MemoryStore(torch.device(device))
    store.put("a", {"level": pixels})
    loss = layer(store.read("a")["level"]).sum()
    store.put("b", {"level": pixels})
    loss.backward()
    assert torch.equal(layer.weight.grad, torch.full_like(layer.weight, 64))


@pytest.mark.parametrize("place", ["disk", "host", "host before disk"])
def test_reading_ahead_gives_each_batch_its_entries_in_order(made, place):
    store = stores(made)[place]
    for number in range(9):
        store.put(str(number), entry(number, 800))
    store.flush()
    plan = [random.Random(seed).choices("0123456789", k=3) for seed in range(12)] + [[], ["0"]]
    for batches in (1, 3, 50):
        got = list(read_ahead(store, plan, CPU, batches=batches))
        assert [len(batch) for batch in got] == [len(batch) for batch in plan]
        for keys, entries in zip(plan, got, strict=True):
            for key, one in zip(keys, entries, strict=True):
                assert one is None if key == "9" else same(one, entry(int(key), 800))


def test_reading_ahead_reads_no_further_than_asked(made, monkeypatch):
    """Memory on the device is taken for the current batch and the next ones alone; reading at once shows it."""

    class AtOnce:
        def __init__(self, *_, **__):
            self.shutdown = lambda **_: None

        def submit(self, function, *arguments) -> Future:
            future = Future()
            future.set_result(function(*arguments))
            return future

    store, read = made(), []
    monkeypatch.setattr(store, "read_packed", read.append)
    module = sys.modules["sft.feature_store.read_ahead"]  # the package gives the function this name
    monkeypatch.setattr(module, "ThreadPoolExecutor", AtOnce)
    batches = read_ahead(store, [[str(n)] for n in range(6)], CPU, batches=2)
    for due in range(6):
        assert next(batches) == [None]
        assert read == [str(n) for n in range(min(6, due + 3))]


def test_reading_ahead_hands_on_a_threads_error(made, monkeypatch):
    store = made()

    def fail(key):
        raise UserError(f"{key} may not be read")

    monkeypatch.setattr(store, "read_packed", fail)
    with pytest.raises(UserError, match="a may not be read"):
        list(read_ahead(store, [["a"]], CPU))


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["disk", "host", "gpu", "gpu before disk"])
def test_entries_reach_the_gpu_unchanged(made, place):
    """Copies on the stream beside a busy one: each batch is summed while the next ones arrive."""
    device = torch.device("cuda", torch.cuda.current_device())
    store = {
        "disk": lambda: made(pin=True),
        "host": lambda: MemoryStore(CPU, pin=True),
        "gpu": lambda: MemoryStore(device),
        "gpu before disk": lambda: MemoryStore(device, behind=made(pin=True)),
    }[place]()
    for number in range(8):
        store.put(str(number), {name: tensor.to(device) for name, tensor in entry(number, 400_000).items()})
    store.flush()
    plan = [random.Random(seed).sample("01234567", 4) for seed in range(40)]
    busy, got = torch.randn(2048, 2048, device=device), []
    for keys, entries in zip(plan, read_ahead(store, plan, device), strict=True):
        busy = torch.tanh(busy @ busy)
        assert all(one["levels"].device == device for one in entries)
        got.append((keys, [one["levels"].sum() for one in entries]))
        del entries
    for keys, sums in got:
        assert [int(one) for one in sums] == [int(entry(int(key), 400_000)["levels"].sum()) for key in keys]


# Fingerprints


def splitmix(lane: int, position: int) -> int:
    """The finalizer in plain integers."""
    word = 2**64 - 1
    value = (lane + position * 0x9E3779B97F4A7C15) & word
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & word
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & word
    return value ^ value >> 31


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_sums_of_lanes_are_those_of_plain_integers(monkeypatch, count):
    """Against Python's unbounded integers, over several chunks and a tail that fills no lane."""
    monkeypatch.setattr(fingerprints, "CPU_CHUNK_LANES", 16)
    data = np.random.default_rng(count).integers(0, 256, count, dtype=np.uint8)
    padded = data.tobytes() + bytes(-count % 8)
    lanes = [int.from_bytes(padded[start : start + 8], "little") for start in range(0, len(padded), 8)]
    wanted = sum(splitmix(lane, position) for position, lane in enumerate(lanes)) % 2**64
    assert int(fingerprints._mixed_sum(torch.from_numpy(data))) % 2**64 == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64])
def test_every_bit_of_a_weight_changes_the_fingerprint(dtype):
    weight = torch.randn(3, 5).to(dtype)
    lone = weights_fingerprint({"w": weight})
    for byte in range(weight.nbytes):
        for bit in range(8):
            changed = weight.clone()
            changed.view(-1).view(torch.uint8)[byte] ^= 1 << bit
            assert weights_fingerprint({"w": changed}) != lone
    assert weights_fingerprint({"w": weight.clone()}) == lone


def test_changes_that_plain_sums_do_not_see_change_the_fingerprint():
    """Two weights exchanged, two signs turned, a value moved, a zero appended; name, type and shape as well."""
    weight = torch.randn(64, dtype=torch.float64)
    exchanged, negated = weight.clone(), weight.clone()
    exchanged[[3, 40]] = weight[[40, 3]]
    negated[[3, 40]] *= -1
    variants = [
        {"w": weight},
        {"w": exchanged},
        {"w": negated},
        {"w": weight.roll(1)},
        {"w": torch.cat([weight, torch.zeros(1, dtype=torch.float64)])},
        {"v": weight},
        {"w": weight.view(8, 8)},
        {"w": weight.view(torch.int64)},
        {"w": weight.float()},
        {"w": weight, "v": weight},
        {"w": weight[:32], "v": weight[32:]},
        {"v": weight[:32], "w": weight[32:]},
        {},
    ]
    assert len({weights_fingerprint(one) for one in variants}) == len(variants)


def test_a_fingerprint_depends_on_values_not_on_where_they_lie():
    weight = torch.randn(6, 10).to(torch.bfloat16)
    beside = torch.cat([torch.zeros(3, dtype=torch.bfloat16), weight.flatten()])[3:].view(6, 10)  # at an odd offset
    turned = weight.T.contiguous().T
    parts = {"b": weight, "a": torch.ones(2)}
    assert weights_fingerprint(parts) == weights_fingerprint({"a": torch.ones(2), "b": beside})
    assert weights_fingerprint(parts) == weights_fingerprint({"b": turned.requires_grad_(), "a": torch.ones(2)})
    with pytest.raises(ValueError, match="w is on the meta device"):
        weights_fingerprint({"w": torch.empty(2, device="meta")})


@pytest.mark.gpu
def test_a_gpu_takes_the_same_fingerprint():
    weights = {"a": torch.randn(1_000_003).to(torch.bfloat16), "b": torch.randn(33, 5), "c": torch.tensor(3)}
    assert weights_fingerprint(weights) == weights_fingerprint({name: w.cuda() for name, w in weights.items()})


def test_keys_of_files_and_settings(tmp_path):
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    one.write_bytes(b"image")
    other.write_bytes(b"image")
    assert file_fingerprint(one) == file_fingerprint(other)
    other.write_bytes(b"imagf")
    assert file_fingerprint(one) != file_fingerprint(other)
    assert settings_fingerprint({"a": 1, "b": [1.5, None]}) == settings_fingerprint({"b": [1.5, None], "a": 1})
    assert settings_fingerprint({"a": 1}) != settings_fingerprint({"a": "1"})
    with pytest.raises(ValueError):
        settings_fingerprint({"a": float("nan")})
    with pytest.raises(TypeError):
        settings_fingerprint({"a": torch.bfloat16})
    keys = {entry_key("ab", "c"), entry_key("a", "bc"), entry_key("abc"), entry_key("ab", "c", 0), entry_key("ab")}
    assert len(keys) == 5 and all(len(key) == 32 for key in keys)


# The place


ONE = Demand(entry_bytes=GIB // 100, images=1000)  # 10 GB


@pytest.mark.parametrize(
    "room, demand, place",
    [
        (Room(80 * GIB, 200 * GIB, 500 * GIB), ONE, "gpu"),
        (Room(70 * GIB, 200 * GIB, 500 * GIB), ONE, "host"),  # 10 GiB beside the step, a share of 0.95
        (Room(0, 200 * GIB, 500 * GIB), ONE, "host"),
        (Room(0, 12 * GIB, 500 * GIB), ONE, "disk"),
        (Room(0, 200 * GIB, 500 * GIB), Demand(GIB // 100, 1000, ranks=20), "disk"),  # each rank keeps all
        (Room(80 * GIB, 200 * GIB, 500 * GIB), Demand(GIB // 100, 1000, views=8), "host"),
        (Room(0, 2 * GIB, 11 * GIB), ONE, "off"),
        (Room(0, 2 * GIB, 11 * GIB), Demand(GIB // 100, 1000, on_disk=500), "disk"),
        (Room(0, 2 * GIB, 0), Demand(GIB // 100, 1000, on_disk=1000), "disk"),
    ],
)
def test_auto_takes_the_first_place_with_room(room, demand, place):
    chosen = choose("auto", demand, room, reserve_bytes=60 * GIB)
    assert chosen.name == place
    assert chosen.on_disk == (place != "off" and place in ("gpu", "host", "disk"))


@pytest.mark.parametrize(("entry_bytes", "entries"), [(700, 3), (43 << 20, 12), (86 << 20, 7), (300 << 20, 2)])
def test_what_entries_take_in_memory_is_what_was_counted_before(monkeypatch, entry_bytes, entries):
    """In slabs of 256 MiB, of which 86 MiB would fill two thirds, a GPU would run out of memory beside the step."""
    taken, empty = [], torch.empty

    def counted(size, **options):
        taken.append(size)
        return empty(size, dtype=torch.uint8, device="meta")

    store = MemoryStore(torch.device("cpu"))
    monkeypatch.setattr(memory_room.torch, "empty", counted)
    for _ in range(entries):
        store._room(entry_bytes)
    assert sum(taken) == memory_room.held_bytes(entries, entry_bytes) < entries * entry_bytes + memory_room.SLAB_BYTES
    pinned = sum(1 << (size - 1).bit_length() for size in taken)
    assert pinned == memory_room.held_bytes(entries, entry_bytes, pinned=True)


def test_the_sentence_says_what_was_chosen_and_why():
    demand = Demand(GIB // 100, 1220, views=8, ranks=2, on_disk=20)
    chosen = choose("auto", demand, Room(70 * GIB, 100 * GIB, 500 * GIB), reserve_bytes=60 * GIB)
    assert chosen.sentence == (
        "Frozen features: computed once and kept on the disk, 97.6 GiB for 9,760 views of 1,220 images; gpu: 97.7 "
        "GiB needed, 10.0 GiB free after 60.0 GiB for the step; host: 195.2 GiB needed by 2 ranks, 100.0 GiB free; "
        "disk: 97.4 GiB needed beyond 20 entries that are there, 500.0 GiB free"
    )
    fewer = dataclasses.replace(demand, entries=5000)  # the epochs do not use each image in every view
    said = choose("auto", fewer, Room(70 * GIB, 100 * GIB, 500 * GIB), reserve_bytes=60 * GIB).sentence
    assert "50.0 GiB for 5,000 views of 1,220 images; gpu: 50.2 GiB needed" in said
    pinned = dataclasses.replace(fewer, entry_bytes=86 << 20, pins=True)  # 2 in each of 2,500 slabs
    said = choose("auto", pinned, Room(0, 100 * GIB, 5000 * GIB), reserve_bytes=0).sentence
    assert "gpu: there is none; host: 1250.0 GiB needed by 2 ranks" in said
    chosen = choose("auto", ONE, Room(0, 100 * GIB, 0), reserve_bytes=0)
    assert (chosen.name, chosen.on_disk) == ("host", False)
    assert (
        "kept in host memory, not on the disk, 10.0 GiB for 1,000 images; gpu: there is none; host:" in chosen.sentence
    )
    assert "no room for 10.0 GiB" in choose("auto", ONE, Room(0, 0, 0), 0).sentence


def test_a_wanted_place_is_taken_or_refused_never_replaced():
    room = Room(0, 100 * GIB, 5 * GIB)
    assert choose("off", ONE, room, 0).name == "off" and choose("host", ONE, room, 0).name == "host"
    assert not choose("host", ONE, Room(0, 100 * GIB, 500 * GIB), 0, share_on_disk=False).on_disk
    with pytest.raises(UserError, match=r"feature_cache gpu: .*gpu: there is none; use --feature_cache host$"):
        choose("gpu", ONE, room, 0)
    with pytest.raises(UserError, match=r"disk: 80.0 GiB needed, 5.0 GiB free; .* host or --augment false$"):
        choose("disk", Demand(GIB // 100, 1000, views=8), Room(0, 101 * GIB, 5 * GIB), 0)
    with pytest.raises(UserError, match="use off"):
        choose("disk", ONE, Room(0, 0, 0), 0)
    with pytest.raises(ValueError, match="memory is no place for features: one of auto, gpu, host, disk, off"):
        choose("memory", ONE, room, 0)
    assert PLACES == ("auto", "gpu", "host", "disk", "off")


def test_free_memory_is_the_least_of_machine_and_groups(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (groups / "job" / "step").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:    1000 kB\n")
    assert free_host_bytes(proc, groups) == 1000 * 1024
    (proc / "self" / "cgroup").write_text("0::/job/step\n")
    (groups / "job" / "memory.max").write_text("500000\n")
    (groups / "job" / "memory.current").write_text("400000\n")
    (groups / "job" / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    (groups / "job" / "step" / "memory.max").write_text("max\n")
    assert free_host_bytes(proc, groups) == 150_000


def test_free_disk_is_measured_before_the_folder_is_there(tmp_path):
    free = os.statvfs(tmp_path)
    assert abs(free_disk_bytes(tmp_path / "not" / "yet") - free.f_bavail * free.f_frsize) < GIB
    assert free_gpu_bytes(CPU) == 0
