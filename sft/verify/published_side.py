"""The published side: a second process, under another Python, in which the directory's own code works.

Takes the directory, an image and a question; gives the arrays and words that launch/published_side.py notes. Everything
that can be wrong is found before anything heavy starts. Does not know what is compared.
"""

import ast
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sft.config import UserError
from sft.model.published_json import read_json

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPT = CHECKOUT / "launch" / "published_side.py"
REQUIREMENTS = "launch/published_requirements.txt"
HOW_TO_MAKE = (
    f"make one: python3 -m venv .venv_published && .venv_published/bin/pip install -r {REQUIREMENTS}; "
    "or name one with --published_python"
)
NEEDED = ("torch", "torchvision", "transformers", "timm", "einops", "peft", "qwen_vl_utils", "numpy", "PIL")
PATIENCE_S = 60
SHOWN_LINES = 12
_JSONS_WITH_CODE = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
_FILES = {"image": "image.npy", "arrays": "arrays.npz", "words": "words.json"}
_PROBE = f"""
import importlib.util, importlib.metadata, sys
missing = [name for name in {NEEDED!r} if importlib.util.find_spec(name) is None]
print(",".join(missing), "" if "transformers" in missing else importlib.metadata.version("transformers"))
"""


@dataclass(frozen=True)
class PublishedSide:
    """What the published code computed."""

    arrays: dict[str, np.ndarray]
    answer: str
    versions: dict[str, str]
    device: str


def remote_files(directory: Path) -> list[Path]:
    """The directory's own Python files that loading it runs: those its auto_map names, and what they import.

    Raises:
        UserError: there is no auto_map, it names code outside of the directory, or a file is missing.
    """
    named: set[str] = set()
    for name in _JSONS_WITH_CODE:
        if (directory / name).is_file():
            named |= set(_strings(read_json(directory / name).get("auto_map") or {}))
    if not named:
        raise UserError(
            f"{directory / 'config.json'}: has no auto_map, so the directory names no code of its own; copy it and the "
            "modeling_*.py files from the published model"
        )
    if outside := sorted(name for name in named if "--" in name):
        raise UserError(
            f"{directory}: its auto_map names code outside of the directory ({', '.join(outside)}), which is not run; "
            "copy those files into it and name them without the part before --"
        )
    waiting, found = {name.partition(".")[0] for name in named}, {}
    while waiting:
        module = waiting.pop()
        file = directory / f"{module}.py"
        if not file.is_file():
            raise UserError(
                f"{file}: no such file, but the directory's code needs it; copy it from the published model"
            )
        found[module] = file
        waiting |= _relative_imports(file) - set(found)
    return [found[module] for module in sorted(found)]


def find_python(given: str | None) -> Path:
    """The Python for the published side, tried out: all packages there, transformers 4.

    Args:
        given: --published_python; None takes .venv_published of this checkout.

    Raises:
        UserError: there is none, or it lacks something; the message says how to make one.
    """
    python = Path(given).expanduser().absolute() if given else CHECKOUT / ".venv_published" / "bin" / "python"
    if not python.is_file() or not os.access(python, os.X_OK):
        what = f"published_python {python}: no such program" if given else f"no {python}"
        raise UserError(f"{what}; the directory's own code needs a Python with transformers 4: {HOW_TO_MAKE}")
    try:
        tried = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"published_python {python}: does not answer within {PATIENCE_S} s; {HOW_TO_MAKE}") from None
    except OSError as error:
        raise UserError(f"published_python {python}: does not start ({error}); {HOW_TO_MAKE}") from None
    if tried.returncode:
        raise UserError(f"published_python {python}: does not start ({_last(tried.stderr, 1)}); {HOW_TO_MAKE}")
    missing, version = tried.stdout.rstrip("\n").split(" ")
    if missing:
        raise UserError(f"published_python {python}: lacks {missing.replace(',', ', ')}; {HOW_TO_MAKE}")
    if int(version.partition(".")[0]) >= 5:
        raise UserError(
            f"published_python {python}: has transformers {version}, under which the published code does not load; "
            f"{HOW_TO_MAKE}"
        )
    return python


def run_published(
    python: Path,
    directory: Path,
    image_HW3: np.ndarray,
    text: str,
    *,
    precision: str,
    max_answer_tokens: int,
    log: Path,
    script: Path = SCRIPT,
) -> PublishedSide:
    """Runs the directory's own code and waits for it.

    Args:
        python: from `find_python`.
        directory: whose code runs.
        image_HW3: uint8 RGB, the same pixels that our side sees.
        text: what predict_forward is asked; `<image>` stands for the image.
        precision: "fp32" or "bf16".
        max_answer_tokens: where an answer without an end is cut off.
        log: takes what the code prints.
        script: what to run there.

    Raises:
        UserError: it failed; the message holds its last words and where the rest is.
    """
    with tempfile.TemporaryDirectory(prefix="sa2va-verify-") as folder:
        files = {name: str(Path(folder) / file) for name, file in _FILES.items()}
        np.save(files["image"], image_HW3)
        request = {
            "directory": str(directory),
            "text": text,
            "precision": precision,
            "max_answer_tokens": max_answer_tokens,
        } | files
        request_file = Path(folder) / "request.json"
        request_file.write_text(json.dumps(request), encoding="utf-8")
        # No hub, and a module cache of its own: exactly this directory's files run, nothing stays behind.
        environ = _without_our_packages() | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(folder) / "modules")}
        with log.open("wb") as said:
            code = subprocess.run(
                [python, script, request_file], env=environ, stdout=said, stderr=subprocess.STDOUT, check=False
            ).returncode
        if code or not Path(files["words"]).is_file():
            words = _last(log.read_text(encoding="utf-8", errors="replace"), SHOWN_LINES)
            raise UserError(
                f"{directory}: its own code failed under {python} (exit code {code}); all it said is in {log}, "
                f"last:\n{words}"
            )
        with np.load(files["arrays"]) as stored:
            arrays = dict(stored)
        words = json.loads(Path(files["words"]).read_text(encoding="utf-8"))
    return PublishedSide(arrays, words["answer"], words["versions"], words["device"])


def _strings(value: object) -> list[str]:
    """All names in an auto_map: a tokenizer's is a pair of which one may be null."""
    if isinstance(value, dict):
        return [name for one in value.values() for name in _strings(one)]
    if isinstance(value, list):
        return [name for one in value for name in _strings(one)]
    return [value] if isinstance(value, str) else []


def _relative_imports(file: Path) -> set[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not Python ({error}); copy it from the published model") from None
    return {
        node.module.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
    }


def _without_our_packages() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _last(text: str, lines: int) -> str:
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
