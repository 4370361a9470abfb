"""Protects the house: which room may use which, what stands in one room alone, that what is shipped can be read."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sft.config import parse_args

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("launch", "tune")
# A room uses rooms of the layers before its own, never of its own or of later ones.
LAYERS = (
    ("settings", "metrics", "prefetch", "replay", "schedule", "stopwatch", "loss_kernels"),
    ("config", "ranks"),
    ("devices", "feature_store", "finite", "flat", "gloo", "losses", "synthetic", "zero_json", "zero_steps"),
    ("data", "engine", "memory", "model", "report"),
    ("encoders", "gate", "operations", "predict", "provenance", "writer"),
    ("checkpoint", "feature_fill", "pace", "verify"),
    ("features",),
    ("batch_size",),
    ("run", "pretrain", "card"),
    ("keep", "validation"),
    ("train",),
    ("benchmark",),
    SCRIPTS,
)
BEFORE_TORCH = ("settings", "config", "ranks", "devices", "zero_json")  # --help answers at once
# Libraries that have one room each; a package's prefix allows all of it.
OWNERS = {
    "ray": ("tune/",),
    "deepspeed": ("sft/engine.py",),
    "peft": ("sft/model/lora.py",),
    "transformers": ("sft/model/", "launch/published_side.py"),  # a script for another Python
    "tokenizers": ("sft/model/",),
    "sentencepiece": ("sft/model/internlm2_tokenizer.py",),
    "accelerate": ("sft/model/",),
    "triton": ("sft/loss_kernels.py", "sft/model/dropout_kernel.py", "sft/model/hiera_kernels.py"),
    "tqdm": ("sft/report/",),
    "tensorboard": ("sft/report/",),
    "matplotlib": ("tune/pictures.py",),
    "sklearn": ("tune/importance.py",),
    "optuna": ("tune/suggest.py",),
    "psutil": ("tune/trial_run.py",),
}
NEVER = {"torchvision", "timm", "mmengine", "mmcv", "xtuner", "flash_attn", "einops", "qwen_vl_utils"}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 50
LONGER = {"sft/engine.py": 500}  # all of DeepSpeed stands in it
GIVEN_PATHS = re.compile(r"(?<![\w.$}~])/(?:work|root|home/(?!someone)\w+|tmp/\w+|usr/local)/\w")


def sources(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py") if ".ipynb" not in file.parts)


def shipped(*endings: str) -> list[Path]:
    """Files of the checkout outside caches, environments and runs."""
    folders = ("sft", "launch", "tune", "tests", "deepspeed_configs", "docs")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if "__pycache__" not in file.parts]
    files += [file for file in ROOT.iterdir() if not file.name.startswith(".")]
    return sorted(file for file in files if file.is_file() and file.suffix in endings)


def imported(file: Path) -> set[str]:
    """Full names of what a file imports, at its top and inside functions; `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(file: Path) -> str:
    inside = file.relative_to(ROOT).with_suffix("").parts
    return inside[1] if inside[0] == "sft" else inside[0]


def layer_of(room: str) -> int:
    found = [index for index, rooms in enumerate(LAYERS) if room in rooms]
    assert found, f"{room} is a new room: give it a layer in tests/test_house.py"
    return found[0]


def test_every_room_has_a_layer_and_every_layer_its_rooms():
    rooms = {room_of(file) for file in sources("sft")} - {"__init__"}
    named = {room for layer in LAYERS[:-1] for room in layer}
    assert rooms == named


@pytest.mark.parametrize("file", sources("sft", *SCRIPTS), ids=lambda file: str(file.relative_to(ROOT)))
def test_the_arrows_point_one_way(file):
    room = room_of(file)
    if room == "__init__":
        assert not imported(file)
        return
    for name in imported(file):
        package, _, inner = name.partition(".")
        used = inner.split(".")[0]
        if package in SCRIPTS:
            assert room in SCRIPTS, f"{room} uses the script {name}"
        if package == "sft" and used not in (room, "__version__"):
            assert layer_of(used) < layer_of(room), f"{room} uses {name}, which stands beside or above it"


def test_modules_of_a_package_do_not_go_round_in_circles():
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in sources("sft")}
    files = {name.removesuffix(".__init__"): file for name, file in files.items()}
    uses = {
        name: {other for used in imported(file) if (other := owner(used, files)) not in (None, name, parent(name))}
        for name, file in files.items()
    }
    while free := {name for name, others in uses.items() if not others}:
        uses = {name: others - free for name, others in uses.items() if name not in free}
    assert not uses, f"these import each other: {sorted(uses)}"


def owner(name: str, files: dict[str, Path]) -> str | None:
    """The module that `from a import b` reads: a.b if that is one, else a."""
    return next((module for module in (name, parent(name)) if module in files), None)


def parent(name: str) -> str:
    return name.rpartition(".")[0]


@pytest.mark.parametrize("file", sources("sft", *SCRIPTS), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_library_stands_in_the_room_that_owns_it(file):
    place = file.relative_to(ROOT).as_posix()
    for library in {name.split(".")[0] for name in imported(file)}:
        assert library not in NEVER, f"{place} imports {library}"
        assert place.startswith(OWNERS.get(library, ("",))), f"{place} imports {library}; its room is {OWNERS[library]}"


def test_tests_need_none_of_the_libraries_that_are_not_installed():
    assert not [file.name for file in sources("tests") for name in imported(file) if name.split(".")[0] in NEVER]


def test_what_answers_before_torch_imports_nothing_heavy():
    heavy = ("torch", "transformers", "peft", "deepspeed", "ray", "tensorboard", "PIL")
    modules = ", ".join(f"sft.{name}" for name in BEFORE_TORCH)
    code = f"import sys, {modules}; print(sorted(set(sys.modules) & set({heavy!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("file", sources("sft", *SCRIPTS), ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_are_short_documented_and_typed(file):
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= LONGER.get(file.relative_to(ROOT).as_posix(), MOST_LINES)
    assert ast.get_docstring(tree), "a file's first docstring says what it does"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            documented = bool(ast.get_docstring(node))
            body = node.body[1:] if documented else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 1
            assert lines <= MOST_LINES_OF_A_FUNCTION, f"{node.name} has {lines} lines"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [*node.args.args, *node.args.kwonlyargs]
            untyped = [argument.arg for argument in arguments if argument.annotation is None]
            assert not untyped and node.returns is not None, f"{node.name}: {untyped or 'its result'} has no type"


def test_every_package_is_one_and_there_are_no_drawers():
    folders = {file.parent for file in sources("sft")}
    assert all((folder / "__init__.py").is_file() for folder in folders)
    drawers = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}
    assert not [file.name for file in sources("sft", *SCRIPTS) if file.name in drawers]


def test_errors_are_not_swallowed():
    for file in sources("sft", *SCRIPTS):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{file.name}:{node.lineno}: bare except"


@pytest.mark.parametrize("file", shipped(".json"), ids=lambda file: str(file.relative_to(ROOT)))
def test_every_json_is_valid(file):
    json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", shipped(".yaml", ".yml"), ids=lambda file: str(file.relative_to(ROOT)))
def test_every_yaml_is_valid(file):
    assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize("file", sorted((ROOT / "launch" / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_training_configuration_is_legal(file):
    parse_args(["--config", str(file)])


def test_deepspeed_files_hold_zero_and_communication_alone():
    for file in (ROOT / "deepspeed_configs").glob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert '"auto"' not in text, f"{file.name}: bare DeepSpeed does not know auto"
        batches = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping", "optimizer", "bf16"}
        assert not batches & set(json.loads(text)), f"{file.name}: these come from TrainConfig"


def test_no_file_names_a_place_on_somebodys_machine():
    endings = (".py", ".sh", ".md", ".yaml", ".yml", ".json", ".toml", ".txt")
    found = []
    for file in shipped(*endings):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if match := GIVEN_PATHS.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {match[0]}")
    assert not found


def test_nothing_large_is_shipped_but_the_base():
    limits = {".safetensors": 12_000_000, ".png": 1_000_000}
    for file in shipped(".safetensors", ".png", ".json", ".md", ".py", ".txt"):
        assert file.stat().st_size <= limits.get(file.suffix, 100_000), file.relative_to(ROOT)
