"""Where the outputs of frozen encoders are kept: nowhere, in GPU memory, in host memory, or on the disk.

A store maps a key (text) to an entry: a small dict of named tensors whose shapes may differ from entry to entry. It
knows nothing of models, settings or images; `fingerprints` makes keys that change when anything behind an entry does.

    missing(keys)    which of them have to be computed, in the given order, each once
    put(key, entry)  keeps an entry; may return before it is kept
    at_once(key, device)  an entry that is in this device's memory already, or None
    read(key)        an entry, or None: compute it. A damaged one is None too, and `rejected` says why
    settle()         returns once nothing is being written any more; a full disk behind memory is told in `rejected`
    flush()          returns once everything put is kept
    close()          flush, and stop the threads

Choices, with what they were measured against (2 cores, ext4 on a virtual disk, entries of 9.4 MB):
- One file per entry, complete or absent (written beside, then renamed). Reading in random order is as fast as from one
  large file (1.6 against 1.4 GB/s from the disk, 8 GB/s both from the page cache), and it needs no lock, no index that
  could disagree with the data and no compaction; processes that fill at once can only do the same work twice. 10,000
  names are listed in 20 ms.
- Files are read, not mapped: a mapped file that another process cuts short kills the reader (SIGBUS), a mapping per
  entry measured 1.2 GB/s, and a read goes straight into pinned memory. All processes share the page cache either way.
- safetensors as the format, so that any of its readers opens an entry; a CRC-32 over header and data is checked at each
  process's first read of an entry (7 GB/s on an idle core, less with older zlibs; in the threads that read).
- No fsync: what a power cut leaves is found by the CRC and computed again.
- Memory stores pack entries into slabs: single pinned allocations are rounded up to powers of two.
- In front of a disk store, a memory store takes from it what it has not kept: a sweep's trials compute nothing again.
  What it keeps is written from there in the disk's own time: a slow disk holds up no filling, and a full one no run.
"""

from sft.feature_store.disk import DiskStore, cache_directory, keys_in, listed, stores_in
from sft.feature_store.entry import Entry
from sft.feature_store.fingerprints import (
    entry_key,
    file_fingerprint,
    settings_fingerprint,
    weights_fingerprint,
)
from sft.feature_store.memory import MemoryStore, NoStore, held_bytes
from sft.feature_store.place import (
    PLACES,
    Demand,
    Place,
    Room,
    choose,
    free_disk_bytes,
    free_gpu_bytes,
    free_host_bytes,
)
from sft.feature_store.read_ahead import read_ahead

__all__ = [
    "PLACES",
    "Demand",
    "DiskStore",
    "Entry",
    "MemoryStore",
    "NoStore",
    "Place",
    "Room",
    "cache_directory",
    "choose",
    "entry_key",
    "file_fingerprint",
    "free_disk_bytes",
    "free_gpu_bytes",
    "free_host_bytes",
    "held_bytes",
    "keys_in",
    "listed",
    "read_ahead",
    "settings_fingerprint",
    "stores_in",
    "weights_fingerprint",
]
