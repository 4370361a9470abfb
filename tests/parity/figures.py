"""Digests of tensors for the golden files, and how near is equal. Needs numpy alone.

A digest is the shape, the largest magnitude, a few samples at even strides, and the product with fixed random numbers:
the last notices any change of a value or of the order.
"""

import json
from pathlib import Path

import numpy as np

from parity import seeded

GOLDEN = Path(__file__).parent / "golden"
VALUES, GRADIENTS = 1e-5, 1e-4  # relative to the tensor's largest magnitude, fp32
_SAMPLES = 8
_TENSORS = GOLDEN / "tensors.txt"


def digest(array: np.ndarray) -> dict:
    """A tensor in a few numbers."""
    flat = np.asarray(array, np.float64).ravel()
    return {
        "shape": list(np.shape(array)),
        "largest": _short(np.abs(flat).max()),
        "projection": _short(_projection(flat)),
        "samples": [_short(number) for number in _strided(flat)],
    }


def digest_difference(array: np.ndarray, golden: dict) -> float:
    """The largest difference between a tensor and a digest, relative to the digest's largest magnitude."""
    assert list(np.shape(array)) == golden["shape"], f"{np.shape(array)} is not {golden['shape']}"
    flat = np.asarray(array, np.float64).ravel()
    ours = np.array([_projection(flat), np.abs(flat).max(), *_strided(flat)])
    theirs = np.array([golden["projection"], golden["largest"], *golden["samples"]])
    return float(np.abs(ours - theirs).max() / golden["largest"])


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of two tensors, relative to the largest magnitude of the second."""
    assert np.shape(ours) == np.shape(theirs), f"{np.shape(ours)} is not {np.shape(theirs)}"
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def tolerance(name: str) -> float:
    """Gradients add up more rounding than values."""
    return GRADIENTS if name.startswith("gradient/") else VALUES


def write(name: str, arrays: dict[str, np.ndarray]) -> None:
    """The golden file of a case."""
    lines = [f"  {json.dumps(key)}: {json.dumps(digest(array))}" for key, array in sorted(arrays.items())]
    (GOLDEN / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def write_tensors(shapes_by_case: dict[str, dict[str, tuple[int, ...]]]) -> None:
    """One line for each published tensor: name, shape, the cases that have it."""
    cases_of: dict[tuple, list[str]] = {}
    for case, shapes in shapes_by_case.items():
        for name, shape in shapes.items():
            cases_of.setdefault((name, shape), []).append(case)
    every = list(shapes_by_case)
    lines = [
        f"{name} {'x'.join(map(str, shape))} {'all' if having == every else ','.join(having)}\n"
        for (name, shape), having in sorted(cases_of.items())
    ]
    _TENSORS.write_text("".join(lines))


def read_tensors(case: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a case's checkpoint as the published code saved it."""
    lines = [line.split() for line in _TENSORS.read_text().splitlines()]
    having = [(name, shape) for name, shape, cases in lines if cases == "all" or case in cases.split(",")]
    return {name: tuple(map(int, shape.split("x"))) for name, shape in having}


def read(name: str) -> dict[str, dict]:
    """Digests by tensor."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def _projection(flat: np.ndarray) -> float:
    return float(flat @ seeded.uniform("projection", flat.shape).astype(np.float64) / np.sqrt(len(flat)))


def _strided(flat: np.ndarray) -> np.ndarray:
    return flat[np.linspace(0, len(flat) - 1, min(_SAMPLES, len(flat))).astype(int)]


def _short(number: float) -> float:
    return float(f"{number:.8g}")
