"""launch/verify.py for real: a small InternVL directory with SAM2 at its real size and the published Python files.

Needs a clone of the published repository and a Python in which it runs:

    SA2VA_UPSTREAM=~/Sa2VA SA2VA_UPSTREAM_PYTHON=~/sa2va_reference/bin/python pytest tests/parity/test_verify.py
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_sa2va as small
import torch
from PIL import Image
from small_saying import teach

from sft.model import published
from sft.model.tiny import TINY_CONFIG

ROOT = Path(__file__).resolve().parents[2]
UPSTREAM, PYTHON = os.environ.get("SA2VA_UPSTREAM"), os.environ.get("SA2VA_UPSTREAM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (UPSTREAM and PYTHON),
        reason="needs the published code and its Python: SA2VA_UPSTREAM, SA2VA_UPSTREAM_PYTHON",
    ),
]


def settings() -> dict:
    """A config.json without a word that the published code does not know."""
    made = copy.deepcopy(TINY_CONFIG)
    del made["native"]
    made |= {"force_image_size": 448}
    made["vision_config"] |= {"image_size": 448, "hidden_size": 64, "num_hidden_layers": 2}
    made["llm_config"] |= {"hidden_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 8192}
    classes = {"AutoConfig": "configuration_sa2va_chat.Sa2VAChatConfig"}
    return made | {"auto_map": classes | {"AutoModel": "modeling_sa2va_chat.Sa2VAChatModel"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The directory and an image of two tiles and a thumbnail, about which it says "Sure, [SEG]."."""
    folder = tmp_path_factory.mktemp("verify")
    image = np.random.default_rng(0).integers(0, 256, (300, 600, 3), dtype=np.uint8)
    Image.fromarray(image).save(folder / "image.png")
    preprocess = published.make_preprocess(settings(), small.tokenizer(), folder)
    torch.manual_seed(0)
    model = published.build(settings(), preprocess.image_token_id, folder).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.add_((0.02 if "sam2" in name else 0.1) * torch.randn_like(parameter))
    gaussian = model.sam2.shared_image_embedding.positional_embedding
    gaussian.copy_(torch.randn_like(gaussian))
    model.sam2.prompt_encoder.shared_embedding.positional_embedding.copy_(gaussian)
    teach(model, preprocess, "Sure, [SEG].<|im_end|>", image)
    published.save(folder / "model", model, settings(), small.tokenizer(), dtype=torch.float32)
    file = folder / "model" / "tokenizer_config.json"
    written = json.loads(file.read_text())  # as transformers 4 would have written it
    written |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    written["additional_special_tokens"] = written.pop("extra_special_tokens", [])
    file.write_text(json.dumps(written))
    for file in (Path(UPSTREAM) / "projects" / "sa2va" / "hf" / "models").glob("*.py"):
        shutil.copy(file, folder / "model")
    return folder


def verify(folder: Path, precision: str) -> tuple[subprocess.CompletedProcess, dict]:
    output = folder / precision
    words = ("--model_path", folder / "model", "--image", folder / "image.png", "--output", output)
    words += ("--trust_remote_code", "--published_python", PYTHON, "--precision", precision, "--device", "cpu")
    command = [sys.executable, ROOT / "launch" / "verify.py", *words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done, json.loads((output / "verify.json").read_text())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ours_and_the_published_code_are_the_same(folder, precision):
    done, report = verify(folder, precision)
    assert done.returncode == 0, done.stdout
    assert report["verdict"] == f"same, {precision}" and report["published_answer"].endswith("<|im_end|>")
    if precision == "fp32":
        assert all(row["relative"] is None or row["relative"] < 1e-5 for row in report["rows"])


def test_other_published_code_is_found_out(folder):
    """Somebody's directory whose code asks in other words: the first difference is the prompt."""
    file = folder / "model" / "templates.py"
    file.write_text(file.read_text().replace("<|im_start|>user\n", "<|im_start|>assistant\n").replace("user\\n", "\\n"))
    done, report = verify(folder, "fp32")
    assert done.returncode == 1 and report["verdict"].startswith("differs: first in prompt")
