"""Protects equality with the published code itself: every family, values, gradients, bf16, adapters carried over.

Needs a checkout of the published code and a Python it runs under; the package's docstring says how to set them up.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from parity import cases, figures, native

UPSTREAM, PYTHON = os.environ.get("SA2VA_UPSTREAM"), os.environ.get("SA2VA_UPSTREAM_PYTHON")
TESTS = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    not (UPSTREAM and PYTHON), reason="needs SA2VA_UPSTREAM and SA2VA_UPSTREAM_PYTHON (see tests/parity/__init__.py)"
)
OLD_PYTHON = os.environ.get("SA2VA_UPSTREAM_PYTHON_OLD")
NAMES = [name for name in cases.CASES if cases.family(name) in native.FAMILIES]


def reference(*arguments: str | Path, python: str | None = PYTHON) -> None:
    """Runs the published side in its own Python; its output is shown when it fails."""
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "parity.published", *map(str, arguments)]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory) -> tuple[str, Path]:
    """A case's name and the directory where the published code left the checkpoint and its results."""
    directory = tmp_path_factory.mktemp(request.param)
    reference("case", request.param, directory)
    return request.param, directory


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert set(ours) == set(theirs)
    far = {key: figures.difference(ours[key], theirs[key]) for key in theirs}
    assert not {key: value for key, value in far.items() if not value <= figures.tolerance(key)}


def test_values_and_gradients_are_the_published_ones(case):
    """Vision tokens, FPN, [SEG] state, masks, IoU, text loss; with LoRA the gradient of every matrix: fp32."""
    name, directory = case
    arrays = cases.inputs(name)
    ours = native.run(native.load(directory / "model"), arrays)
    ours |= native.run_lora(directory / "model", native.load(directory / "model"), arrays)
    compare(ours, dict(np.load(directory / "expected.npz")))


def test_bf16_is_as_near_to_fp32_as_the_published_bf16(case):
    """Ours and the published code round at different places: neither may be further from the exact result.

    The spread between two runs of the published code, the batch together and each sample alone, counts besides. On a
    CPU it is nothing at these sizes, so it cannot be the measure.
    """
    name, directory = case
    exact, half = dict(np.load(directory / "expected.npz")), dict(np.load(directory / "bf16.npz"))
    ours = native.run(native.load(directory / "model", torch.bfloat16), cases.inputs(name))
    for key in ("vision_tokens", "seg_state", "fpn0", "fpn1", "fpn2", "candidate_logits", "predicted_iou"):
        theirs = half[f"together/{key}"]
        spread = rms(half[f"alone/{key}"] - theirs) if f"alone/{key}" in half else 0
        spread += rms(exact[key]) * 2**-9  # one rounding to bf16
        assert rms(ours[key] - exact[key]) <= 1.5 * rms(theirs - exact[key]) + spread, key
        assert rms(ours[key] - theirs) <= 2 * rms(theirs - exact[key]) + spread, key


@pytest.mark.parametrize(
    ("modules", "how"), [(("text_hidden_fcs",), "on"), (("text_hidden_fcs", "mask_decoder"), "merged")]
)
def test_a_trained_adapter_gives_the_same_masks_on_the_published_model(case, modules, how, tmp_path):
    """LoRA and modules trained whole, saved by us, put on the published model by peft alone."""
    name, directory = case
    adapter = tmp_path / "adapter"
    model = native.save_trained_adapter(directory / "model", native.load(directory / "model"), modules, adapter)
    ours = native.run(model, cases.inputs(name))
    reference("adapter", name, directory, adapter, how)
    theirs = dict(np.load(directory / "adapted.npz"))
    compare(ours, theirs)
    base = np.load(directory / "expected.npz")["logits"]
    assert figures.difference(theirs["logits"], base) > 0.01  # the adapter did change the masks


def test_the_golden_files_are_of_this_code(case):
    """What tests/test_golden.py holds us to is what the published code gives now."""
    name, directory = case
    golden, expected = figures.read(name), dict(np.load(directory / "expected.npz"))
    assert set(golden) == set(expected)
    for key, array in expected.items():
        assert figures.digest_difference(array, golden[key]) <= figures.tolerance(key), key


@pytest.mark.skipif(not OLD_PYTHON, reason="needs SA2VA_UPSTREAM_PYTHON_OLD (see tests/parity/__init__.py)")
def test_qwen2_5_vl_saved_by_older_transformers(tmp_path):
    """transformers 4.49 names tensors and lays out config.json otherwise; figures and what we load are the same."""
    reference("case", "qwen2_5_vl", tmp_path, python=OLD_PYTHON)
    expected, golden = dict(np.load(tmp_path / "expected.npz")), figures.read("qwen2_5_vl")
    assert set(golden) == set(expected)
    for key, array in expected.items():
        assert figures.digest_difference(array, golden[key]) <= figures.tolerance(key), key
    if "qwen2_5_vl" in NAMES:
        compare(native.run(native.load(tmp_path / "model"), cases.inputs("qwen2_5_vl")), without_lora(expected))


@pytest.mark.slow
def test_sam2_at_its_published_size(tmp_path):
    """Hiera-L at 1024 px as the published code writes it: the sizes that ours states, and 48 blocks of rounding."""
    reference("case", "hiera_large", tmp_path)
    ours = native.run(native.load(tmp_path / "model"), cases.inputs("hiera_large"))
    compare(ours, dict(np.load(tmp_path / "expected.npz")))


def without_lora(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: array for key, array in arrays.items() if not key.startswith(("lora/", "gradient/"))}


def rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))
