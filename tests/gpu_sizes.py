"""Models of the published shapes, with random weights, on this machine: load, train, save, export; one table.

Usage: python3 tests/gpu_sizes.py OUT SHAPE... [--folder DIR] [--cold] [--flags "FLAGS OF launch/train.py"]
Shapes: sft/model/shapes.py. OUT receives logs and sizes.json. DIR, on a fast local disk, holds two copies of a
model for a while. Uses the python3 of the machine as it is; without a GPU the same things run on the CPU.
"""

import argparse
import gc
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
IMAGES, EPOCHS = 10, 3
BUFFER_BYTES = 16 * 2**20
GB = 1e9
HEADS = {  # key -> head of the table's column
    "bytes": "GB",
    "write_s": "write s",
    "read_s": "read s",
    "load_s": "load s",
    "load_over_read": "load/read",
    "host_peak": "host peak GB",
    "host_anonymous_peak": "host anon GB",
    "gpu_peak": "GPU load GB",
    "step_ms": "step ms",
    "gpu_run_gib": "GPU run GiB",
    "train_s": "run s",
    "checkpoint_bytes": "ckpt GB",
    "export_s": "export s",
    "reload_s": "reload s",
}
FLAGS = ["--batch_size", "1", "--lora_rank", "64", "--lora_alpha", "128", "--gradient_checkpointing", "true"]
FLAGS += ["--deepspeed_config", "zero2", "--num_epochs", str(EPOCHS), "--save_every", str(EPOCHS)]
FLAGS += ["--seg_rate_samples", "0", "--val_batch_size", "1", "--log_every_steps", "1", "--tensorboard", "false"]


def main() -> int:
    """Measures every shape; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("shapes", nargs="*")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument(
        "--cold", action="store_true", help="also read and load with the page cache emptied of the files"
    )
    parser.add_argument("--flags", default="", help="more flags of launch/train.py, in one word")
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)  # this script's own child
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load_figures(arguments.out, arguments.cold)))
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows, failed = [], False
    for shape in arguments.shapes:
        rows.append({"shape": shape})
        try:
            measure(arguments, rows)
        except Exception as error:  # the other shapes, and what is known of this one, are wanted all the same
            print(f"FAILED {shape}: {error}", file=sys.stderr)
            rows[-1]["failed"], failed = str(error), True
            keep(arguments.out, rows)
    print(table(rows))
    return int(failed)


def measure(arguments: argparse.Namespace, rows: list[dict]) -> None:
    """Fills the last row of the table, part by part; removes what it wrote."""
    row, out = rows[-1], arguments.out
    shape = row["shape"]
    work = Path(tempfile.mkdtemp(prefix=f"sft_{Path(shape).stem}_", dir=arguments.folder))
    try:
        started = time.monotonic()
        row["bytes"] = write_model(shape, work / "model")
        row["write_s"] = time.monotonic() - started
        row |= child_load(work / "model", arguments.cold)
        keep(out, rows)
        write_images(work / "data")
        row |= train(work, out / f"{Path(shape).stem}_train.txt", shlex.split(arguments.flags))
        keep(out, rows)
        started = time.monotonic()
        checkpoint = ["--checkpoint", work / "run" / "checkpoint_best", "--output", work / "merged"]
        run([ROOT / "launch" / "export.py", *checkpoint], out / f"{Path(shape).stem}_export.txt")
        row["export_s"] = time.monotonic() - started
        again = child_load(work / "merged", cold=False)
        assert again["tensors"] == row["tensors"], "the export holds another number of tensors"
        assert math.isfinite(again["sum"]) and again["sum"] != row["sum"], "the export changed nothing"
        row["reload_s"] = again["load_s"]
        keep(out, rows)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_model(shape: str, directory: Path) -> int:
    """The random directory; a shape may also be a JSON file with `config` and `special_ids`."""
    from sft.model import random_weights, shapes

    own = json.loads(Path(shape).read_text()) if shape.endswith(".json") else None
    return random_weights.write(shapes.Shape(**own) if own else shapes.named(shape), directory)


def child_load(directory: Path, cold: bool) -> dict:
    """`load_figures` in a process of its own, whose memory is the load's alone."""
    command = [sys.executable, __file__, "--load", directory, *(["--cold"] if cold else [])]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"load: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def load_figures(directory: Path, cold: bool) -> dict:
    """Seconds of reading the files and of loading them natively, and the most memory above what was there before."""
    import torch

    from sft.model import published

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.zeros(1, device=device)  # the CUDA context is no part of the model
    files = sorted(directory.glob("*.safetensors"))
    figures = {}
    if cold:
        evict(files)
        figures["cold_read_s"] = read_seconds(files)
        evict(files)
        figures["cold_load_s"] = timed_load(published, directory, device)[0]
    read_seconds(files)
    figures["read_s"] = min(read_seconds(files) for _ in range(2))
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before_gpu = torch.cuda.memory_allocated()
    with MemoryWatch() as watch:
        seconds, model = timed_load(published, directory, device)
    figures |= {"load_s": seconds, "load_over_read": seconds / figures["read_s"]}
    figures |= {"host_peak": watch.peak["VmRSS"], "host_anonymous_peak": watch.peak["RssAnon"]}
    if device.type == "cuda":
        figures["gpu_peak"] = torch.cuda.max_memory_allocated() - before_gpu
    state = model.state_dict()
    figures["tensors"] = len(state)
    figures["sum"] = sum(float(tensor.flatten()[:4096].double().sum()) for tensor in state.values())
    return figures


def timed_load(published, directory: Path, device) -> tuple[float, object]:
    """Seconds, and the model."""
    import torch

    started = time.monotonic()
    model = published.load(str(directory), dtype=torch.bfloat16, device=device).model
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - started, model


def read_seconds(files: list[Path]) -> float:
    """Reads files into one buffer, over and over."""
    buffer, started = bytearray(BUFFER_BYTES), time.monotonic()
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.monotonic() - started


def evict(files: list[Path]) -> None:
    """Drops files from the page cache, their bytes safely on the disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class MemoryWatch:
    """The most of this process's memory in a while, above its beginning; looks fifty times a second."""

    def __enter__(self) -> "MemoryWatch":
        self.before, self.peak, self._stop = _memory(), {"VmRSS": 0, "RssAnon": 0}, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            last = self._stop.wait(0.02)
            now = _memory()
            self.peak = {key: max(most, now[key] - self.before[key]) for key, most in self.peak.items()}
            if last:
                return


def _memory() -> dict[str, int]:
    """Bytes resident, and those of them that belong to no file."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0] in ("VmRSS:", "RssAnon:")}


def write_images(folder: Path) -> None:
    """Procedural vessels at 512 x 512 px: one tile each."""
    from PIL import Image

    from sft import synthetic

    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(IMAGES):
        scene = synthetic.render(number, "cine", 512)
        mask = scene.masks["blood vessels"].astype("uint8") * 255
        Image.fromarray(scene.image_HW3).save(folder / "images" / f"v{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"v{number}.png")


def train(work: Path, log: Path, flags: list[str]) -> dict:
    """A run of a few epochs; the last one's step is warm and sees kept features. Moves the run to work/run."""
    paths = ["--model_path", work / "model", "--data_root", work / "data", "--output_dir", work / "runs"]
    started = time.monotonic()
    run([ROOT / "launch" / "train.py", *paths, *FLAGS, *flags], log)
    seconds = time.monotonic() - started
    (directory,) = (work / "runs").glob("lora_sft_*")
    directory.rename(work / "run")
    rows = json.loads((work / "run" / "training_log.json").read_text())
    steps = [row for row in rows if "step_s" in row]
    figures = {"step_ms": 1000 * steps[-1]["step_s"], "train_s": seconds}
    if "gpu_gib" in steps[-1]:
        figures["gpu_run_gib"] = steps[-1]["gpu_gib"]
    best = (work / "run" / "checkpoint_best").rglob("*")
    return figures | {"checkpoint_bytes": sum(path.stat().st_size for path in best if path.is_file())}


def run(words: list, log: Path) -> None:
    """Runs a script of this checkout; its output goes to a log, whose end tells of a failure."""
    with open(log, "w") as opened:
        command = [sys.executable, *map(str, words)]
        code = subprocess.run(command, cwd=ROOT, stdout=opened, stderr=subprocess.STDOUT).returncode
    if code:
        raise RuntimeError(f"{Path(words[0]).name} ended with {code}; {log}: {log.read_text()[-600:]}")


def keep(out: Path, rows: list[dict]) -> None:
    """Writes and says what is known so far, at once: the machine may be gone before the table is printed."""
    (out / "sizes.json").write_text(json.dumps(rows, indent=2) + "\n")
    known = {key: round(value, 3) for key, value in rows[-1].items() if isinstance(value, float | int)}
    print(rows[-1]["shape"], known, flush=True)


def table(rows: list[dict]) -> str:
    """One line a shape."""
    keys = [key for key in (*HEADS, "cold_read_s", "cold_load_s") if any(key in row for row in rows)]
    lines = [["shape", *(HEADS.get(key, key) for key in keys)]]
    for row in rows:
        values = (row.get(key) for key in keys)
        in_gb = (
            value / GB if value is not None and HEADS.get(key, "").endswith("GB") else value
            for key, value in zip(keys, values, strict=True)
        )
        lines.append([Path(row["shape"]).stem, *("-" if value is None else f"{value:.2f}" for value in in_gb)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


if __name__ == "__main__":
    sys.exit(main())
