"""Digests of tensors for the golden files, and how near is equal. Needs numpy alone.

A digest is the shape, the largest magnitude, the sum, and a few samples at even strides.
"""

import json
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
LOGITS, GRADIENTS = 1e-5, 1e-4  # relative to the tensor's largest magnitude, fp32
_SAMPLES = 12


def digest(array: np.ndarray) -> dict:
    """A tensor in a few numbers."""
    flat = np.asarray(array, np.float64).ravel()
    return {
        "shape": list(np.shape(array)),
        "largest": _short(np.abs(flat).max()),
        "mean": _short(flat.mean()),
        "samples": [_short(number) for number in _strided(flat)],
    }


def digest_difference(array: np.ndarray, golden: dict) -> float:
    """The largest difference between a tensor and a digest, relative to the digest's largest magnitude."""
    assert list(np.shape(array)) == golden["shape"], f"{np.shape(array)} is not {golden['shape']}"
    flat = np.asarray(array, np.float64).ravel()
    ours = np.array([flat.mean(), np.abs(flat).max(), *_strided(flat)])
    theirs = np.array([golden["mean"], golden["largest"], *golden["samples"]])
    return float(np.abs(ours - theirs).max() / golden["largest"])


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of two tensors, relative to the largest magnitude of the second."""
    assert np.shape(ours) == np.shape(theirs), f"{np.shape(ours)} is not {np.shape(theirs)}"
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def tolerance(name: str) -> float:
    """Gradients add up more rounding than values."""
    return GRADIENTS if name.startswith("gradient/") else LOGITS


def write(name: str, arrays: dict[str, np.ndarray]) -> None:
    """The golden file of a case."""
    lines = [f"  {json.dumps(key)}: {json.dumps(digest(array))}" for key, array in sorted(arrays.items())]
    (GOLDEN / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read(name: str) -> dict[str, dict]:
    """Digests by tensor."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def _strided(flat: np.ndarray) -> np.ndarray:
    return flat[np.linspace(0, len(flat) - 1, min(_SAMPLES, len(flat))).astype(int)]


def _short(number: float) -> float:
    return float(f"{number:.8g}")
