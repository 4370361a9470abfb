"""The README: its commands run, with small settings; its tables, trees and log lines are those of the program.

Commands are read from the fenced blocks of README.md; the places they name (/models/..., /data/...) stand for a small
model and small data. A command that no test here knows is an error. README.zh-CN.md has the same commands.
"""

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from data_files import add_pair
from PIL import Image

from sft import data, synthetic
from sft.config import TrainConfig, override, parse_args, settings_table
from sft.devices import plan
from sft.ranks import rank_environ
from sft.verify.published_side import HOW_TO_MAKE
from tune import options as sweep_options
from tune import space as spaces
from tune import trials

ROOT = Path(__file__).resolve().parent.parent
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
TRAIN, JOB = "launch/train.py", "launch/run_sft_training.sh"
RUN, LAST_KEPT = "lora_sft_20261123_124804", "checkpoint_epoch_3"  # what the README calls a run and a checkpoint
SWEEP = "output_tune/sweep_20261127_054637"  # and a sweep
SMALL = {"num_epochs": 1, "num_workers": 0, "save_every": 1, "log_every_steps": 1, "gpu": None, "include": None}
GPUS = {str(number): f"GPU-{number}" for number in range(4)}
RECORD = ("random", 8, True, 2, 3, 42, 0.0, "2026-11-25 23:09:37", {}, ["tune/search.py"])  # the rest of a sweep.json
INSTALLED = ("deepspeed", "hf", "tensorboard", "ray")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, without the fences."""
    return re.findall(rf"^```{language}\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)


def block(language: str, start: str) -> str:
    """The one block of README.md that starts so."""
    (found,) = [text for text in blocks(ENGLISH, language) if text.startswith(start)]
    return found


def script(name: str) -> ModuleType:
    """A file of launch/ as a module."""
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMMANDS = [line.partition("  #")[0].strip() for text in blocks(ENGLISH, "bash") for line in text.splitlines()]
TRAINING = [command for command in COMMANDS if {TRAIN, JOB} & set(shlex.split(command))]
WITH_DEVICES = [command for command in TRAINING if re.search(r"^deepspeed|--(gpu|include) ", command)]


def parts(command: str) -> tuple[list[str], list[str]]:
    """A training command's words before and after the script."""
    words = shlex.split(command)
    place = next(index for index, word in enumerate(words) if word in (TRAIN, JOB))
    return words[:place], words[place + 1 :]


class Place:
    """A folder in which the README's commands find what they name, and what they have made."""

    def __init__(self, folder: Path):
        import small_sa2va

        self.folder, self.trained = folder, {}
        small_sa2va.write(folder / "model")
        for number in range(5):
            add_pair(folder / "data", f"Image_{number:02}L", number)
        (folder / "val.txt").write_text("Image_01L\n")
        (folder / "vessels.yaml").write_text(self.fill(block("yaml", "model_path")))
        (folder / "hostfile").write_text(block("text", "node-a") + "\n")
        (folder / SWEEP).mkdir(parents=True)
        (folder / SWEEP / "best.yaml").write_text("lora_rank: 8\n")

    def fill(self, text: str) -> str:
        names = {"/models/Sa2VA-4B": "model", "/data/chase_db1": "data", "/data/vessels": "data"}
        names |= {"/data/val.txt": "val.txt", "/data/synthetic": "synthetic", "/data/tiny_sa2va": "base"}
        names |= {SWEEP: SWEEP, "/data/sweeps": "sweeps"}
        names |= {"vessels.yaml": "vessels.yaml", "output_sft": "output_sft", "gpu_report": "gpu_report"}
        names |= {"/data/benchmark": "benchmark", "benchmark.json": "benchmark.json", "benchmark.png": "benchmark.png"}
        found = re.compile("|".join(rf"(?<!/){re.escape(name)}" for name in names))
        return found.sub(lambda match: str(self.folder / names[match[0]]), text)

    def config(self, arguments: list[str], **changes) -> TrainConfig:
        """The command's settings where they matter, on small inputs."""
        config = parse_args(arguments, demo=ROOT / "launch" / "configs" / "demo.yaml")
        paths = {"model_path": self.folder / "model", "data_root": self.folder / "data"}
        paths |= {"output_dir": self.folder / "output_sft"}
        return override(config, SMALL | {name: str(path) for name, path in paths.items()} | changes)

    def train(self, config: TrainConfig) -> Path:
        """The directory of a run; settings that have run already do not run again."""
        from sft.train import train

        if config not in self.trained:
            self.trained[config] = train(config).directory
        return self.trained[config]

    def interrupt(self, config: TrainConfig) -> Path:
        """The directory of a run that was stopped in its second of three epochs."""
        from sft.train import train

        def stop(row: dict) -> None:
            if row["epoch"] == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(override(config, {"resume": None}), stop)
        return max((self.folder / "interrupted").glob("lora_sft_*"))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("readme"))


@pytest.fixture(scope="module")
def demo(place) -> Path:
    """The directory of the demo's run, small."""
    return place.train(place.config([]))


# Commands


def test_every_command_is_known_here() -> None:
    others = {
        "bash tests/run.sh", "bash tests/gpu.sh", "source .venv/bin/activate", "tail -f", "grep '^", "jq -c",
        "python -m sft.data", "python -m sft.config --table", "python -m sft.synthetic", "python -m sft.pretrain",
        "hf download", "tensorboard --logdir", "python launch/export.py", "python launch/verify.py",
        "python launch/benchmark.py", "python3 -m venv .venv_published", ".venv_published/bin/pip install",
        "python tune/search.py", "ray start",
    }  # fmt: skip
    unknown = [command for command in COMMANDS if command not in TRAINING and not command.startswith(tuple(others))]
    assert not unknown, "give them a test"
    assert all(any(command.startswith(start) for command in COMMANDS) for start in others), "its test tests nothing"


@pytest.mark.parametrize("command", [command for command in TRAINING if "--resume" not in command])
def test_training_command_trains(command: str, place: Place, capsys) -> None:
    _, arguments = parts(place.fill(command))
    if {"--help", "--print_config"} & set(arguments):
        with pytest.raises(SystemExit) as ended:
            parse_args(arguments)
        assert ended.value.code == 0
        assert "lora_rank" in capsys.readouterr().out
        return
    config = place.config(arguments)
    directory = place.train(config)
    assert (directory / "checkpoint_best" / "adapter_model.safetensors").is_file() is not config.dry_run


@pytest.mark.parametrize("command", [command for command in TRAINING if "--resume" in command])
def test_resuming_command_finishes_the_run(command: str, place: Place) -> None:
    _, arguments = parts(place.fill(command))
    config = place.config(arguments, num_epochs=3, output_dir=str(place.folder / "interrupted"))
    run = place.interrupt(config)
    if config.resume != "auto":
        assert Path(config.resume).parts[-2:] == (RUN, LAST_KEPT)
        config = override(config, {"resume": str(run / "checkpoint_epoch_1")})
    assert place.train(config) == run
    assert (run / "checkpoint_epoch_3" / "checkpoint.json").is_file()


@pytest.mark.parametrize("command", WITH_DEVICES)
def test_command_trains_on_the_devices_it_names(command: str, place: Place, monkeypatch) -> None:
    monkeypatch.chdir(place.folder)  # the host file lies there
    before, arguments = parts(place.fill(command))
    if before[0] == "deepspeed":
        trained = devices_under_deepspeed(before[1:], arguments)
    else:
        config = parse_args(arguments)
        trained = {"localhost": plan(config.gpu, config.include, {}, GPUS).devices}
    (named,) = re.findall(r"--(?:gpu|include) (\S+)", command)
    assert "@".join(f"{host}:{','.join(devices)}" for host, devices in trained.items()).endswith(named)


def devices_under_deepspeed(before: list[str], arguments: list[str]) -> dict[str, tuple[str, ...]]:
    """Host -> devices that train, as DeepSpeed's launcher would start them on machines with four GPUs."""
    from deepspeed.launcher import runner

    launcher = runner.parse_args([*before, TRAIN, *arguments])
    assert (launcher.user_script, launcher.user_args) == (TRAIN, arguments)
    hosts = runner.fetch_hostfile(launcher.hostfile) or {"localhost": len(GPUS)}
    active = runner.parse_inclusion_exclusion(hosts, launcher.include, launcher.exclude)
    if list(active) != ["localhost"]:
        return {host: tuple(map(str, slots)) for host, slots in active.items()}
    config, slots, trained = parse_args(arguments), tuple(map(str, active["localhost"])), ()
    for rank in range(len(slots)):
        environ = rank_environ(rank, len(slots)) | {"CUDA_VISIBLE_DEVICES": ",".join(slots)}
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        decided = plan(config.gpu, config.include, environ, GPUS)
        if decided.action == "train":
            after = environ | decided.environ
            trained += (after["CUDA_VISIBLE_DEVICES"].split(",")[int(after["LOCAL_RANK"])],)
    return {"localhost": trained}


def test_data_command_prints_what_the_readme_shows(place: Place, capsys) -> None:
    (command,) = [command for command in COMMANDS if command.startswith("python -m sft.data")]
    assert data.main(shlex.split(place.fill(command))[3:]) == 0
    printed = [labels.split("  ")[0] for labels in re.findall(r"^  (\S.*)", capsys.readouterr().out, re.MULTILINE)]
    shown = re.findall(r"^  (\S.*)", block("text", "/data/chase_db1"), re.MULTILINE)
    assert printed == [line.split("  ")[0] for line in shown]


def test_synthetic_command_writes_a_data_set(place: Place, capsys) -> None:
    (command,) = [command for command in COMMANDS if command.startswith("python -m sft.synthetic")]
    arguments = shlex.split(place.fill(command))[3:]
    arguments[arguments.index("--count") + 1] = "1"
    assert synthetic.main(arguments) == 0
    assert len(data.find_pairs(place.folder / "synthetic").pairs) == 1


def test_pretraining_command_is_understood(place: Place, monkeypatch) -> None:
    from sft import pretrain

    class Started(Exception):
        pass

    def start(directory: Path, *rest) -> None:
        raise Started(directory)

    (command,) = [command for command in COMMANDS if command.startswith("python -m sft.pretrain")]
    monkeypatch.setattr(pretrain, "pretrain", start)
    monkeypatch.setattr(sys, "argv", shlex.split(place.fill(command))[2:])
    with pytest.raises(Started, match="base"):
        pretrain.main()


def test_export_commands_write_what_the_readme_says_and_python_reads_it(place: Place, monkeypatch, capsys) -> None:
    """The merged directory of the first command then answers the Python block about one image."""
    export, run = script("export"), place.train(place.config(["--train_modules", "none"]))
    commands = [place.fill(command) for command in COMMANDS if command.startswith("python launch/export.py")]
    monkeypatch.chdir(place.folder)
    printed = []
    for command in commands:
        words = shlex.split(command.replace(str(place.folder / "output_sft" / RUN), str(run)))
        monkeypatch.setattr(sys, "argv", words[1:])
        capsys.readouterr()
        assert export.main() == 0
        printed.append(capsys.readouterr().out.strip())

    def lines(text: str) -> list[str]:
        return form(re.sub(r"(?<=\d),(?=\d)", "", re.sub(r"b?float\d+", "TYPE", text))).splitlines()

    assert lines(place.fill(block("text", "model.safetensors:"))) == lines(printed[0])
    assert (place.folder / "adapter" / "adapter_model.safetensors").is_file()
    text = place.fill(block("python", "from pathlib"))
    shutil.copyfile("data/images/Image_00L.png", "image.png")
    exec(compile(text.replace('"cuda"', '"cpu"'), "README.md", "exec"), {})
    with Image.open("mask.png") as mask, Image.open("image.png") as image:
        assert mask.size == image.size
    assert capsys.readouterr().out.strip().endswith(("True", "False"))


def test_verify_commands_are_understood_and_the_native_one_answers(place: Place, monkeypatch, capsys) -> None:
    verify = script("verify")
    native, both = (place.fill(command) for command in COMMANDS if command.startswith("python launch/verify.py"))
    assert shlex.split(both) == [*shlex.split(native), "--trust_remote_code"]
    monkeypatch.chdir(place.folder)
    words = shlex.split(native)[1:]
    assert verify.parse(shlex.split(both)[2:]).trust_remote_code
    monkeypatch.setattr(sys, "argv", [*words, "--device", "cpu", "--max_answer_tokens", "4"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert verify.main() == 0
    assert "not compared" in capsys.readouterr().out
    assert all((place.folder / name).is_file() for name in re.findall(r"`(output_verify/[\w.]+)`", ENGLISH))


def test_environment_of_the_published_code_is_where_verify_looks() -> None:
    (make,) = [command for command in COMMANDS if command.startswith("python3 -m venv")]
    (install,) = [command for command in COMMANDS if "/bin/pip install" in command]
    assert f"{make} && {install}" in HOW_TO_MAKE


@pytest.mark.parametrize("command", [command for command in COMMANDS if "launch/benchmark.py" in command])
def test_benchmark_command_is_understood(command: str, place: Place) -> None:
    _, left_for_the_runs = script("benchmark").parse(shlex.split(place.fill(command))[2:])
    assert left_for_the_runs == []


@pytest.mark.parametrize("command", [command for command in COMMANDS if "tune/search.py" in command])
def test_search_command_is_understood(command: str, place: Place) -> None:
    """tests/test_sweep.py runs such commands."""
    arguments = shlex.split(place.fill(command))[2:]
    if "--resume" not in arguments:
        plan = sweep_options.parse(arguments)
        assert plan.space.axes and plan.resumed is None
        return
    plan = sweep_options.parse([])
    record = trials.Sweep("a", vars(plan.seed_setting), spaces.as_record(plan.space), *RECORD, options=vars(plan.sweep))
    trials.write_sweep(place.folder / SWEEP, record)
    assert sweep_options.parse(arguments).resumed == place.folder / SWEEP


def test_cluster_commands_are_rays_own() -> None:
    from ray.scripts.scripts import cli

    for command in (command for command in COMMANDS if command.startswith("ray ")):
        _, name, *arguments = shlex.split(command)
        cli.commands[name].make_context(name, arguments)


def test_space_in_the_readme_is_a_part_of_the_shipped_one() -> None:
    shown = yaml.safe_load(block("yaml", "lora_rank"))
    whole = yaml.safe_load((ROOT / "tune" / "space.yaml").read_text())
    assert {name: whole[name] for name in shown} == shown


def test_watching_commands_find_the_runs_lines(place: Place, demo: Path) -> None:
    shown = [place.fill(c) for c in COMMANDS if c.startswith(("tail", "grep", "jq")) and "output_sft" in c]
    assert len(shown) == 4
    for command in shown:
        if command.startswith("jq") and not shutil.which("jq"):
            pytest.skip("jq is not installed; the other commands have run")
        ended = subprocess.run(["bash", "-c", command.replace("tail -f", "tail -n 2")], capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout.strip(), f"{command} finds nothing"


def test_jq_shows_the_architecture(place: Place) -> None:
    (command,) = [place.fill(command) for command in COMMANDS if command.startswith("jq") and "models" in command]
    if not shutil.which("jq"):
        pytest.skip("jq is not installed")
    printed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert printed == '["Sa2VAChatModel"]\n["Qwen2ForCausalLM"]\n'


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("bash ")])
def test_scripts_and_the_paths_they_are_given_exist(command: str) -> None:
    words = shlex.split(command)
    assert (ROOT / words[1]).is_file()
    assert subprocess.run(["bash", "-n", ROOT / words[1]]).returncode == 0
    assert all((ROOT / word).exists() for word in words[2:] if word.startswith("tests/"))


@pytest.mark.parametrize("program", INSTALLED)
def test_program_comes_with_the_dependencies(program: str) -> None:
    assert any(shlex.split(command)[0] == program for command in COMMANDS)
    assert shutil.which(program, path=str(Path(sys.executable).parent)), "not beside this Python: is .venv complete?"


def test_adapter_goes_onto_a_model_as_the_python_block_says(place: Place, monkeypatch, capsys) -> None:
    """The published model's part is played by the native one, whose language model has the same module paths."""
    import torch
    import transformers

    from sft.model import published

    text = block("python", "import torch")
    run = place.train(place.config(["--train_modules", "none"]))
    model = published.load(str(place.folder / "model"), dtype=torch.float32).model
    before = {name: tensor.clone() for name, tensor in model.language_model.state_dict().items()}
    model.cuda = lambda: model
    answer = {"prediction": "Sure, [SEG].", "prediction_masks": [torch.zeros(1, 12, 16)]}
    model.predict_forward = lambda image, text, tokenizer: answer
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(Image, "open", lambda name: Image.new("RGB", (16, 12)))
    exec(compile(text.replace(f"output_sft/{RUN}", str(run)), "README.md", "exec"), {})
    after = model.language_model.state_dict()
    moved = {name.rsplit(".", 2)[-2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(TrainConfig().lora_target_modules)
    assert "Sure, [SEG]." in capsys.readouterr().out


# What the README says of the program


TABLES = {"settings": settings_table(), "sweep": sweep_options.sweep_table()}


@pytest.mark.parametrize("table", TABLES)
def test_settings_table_is_the_generated_one(table: str) -> None:
    how = "take over what `python -m sft.config --table` or `python -m tune.options --table` prints"
    assert f"\n\n{TABLES[table]}\n\n" in ENGLISH, how


@pytest.mark.parametrize("table", TABLES)
def test_chinese_settings_table_has_the_same_keys_defaults_and_ranges(table: str) -> None:
    words = {"integer": "整数", "number": "数", "path": "路径", "text": "文本", "any of ": "可多选：", " or ": " 或 "}
    words |= {"names with commas between": "名称，逗号分隔", ", or none": "，或 none", ", or auto": "，或 auto"}
    words |= {" and at most ": " 且 <= ", " and below ": " 且 < "}
    words |= {" at least ": "，>= ", " above ": "，> ", " at most ": "，<= ", " below ": "，< "}
    pattern = re.compile("|".join(rf"\b{re.escape(word)}\b" for word in sorted(words, key=len, reverse=True)))

    def row(line: str) -> list[str]:
        return line.strip("| ").split(" | ")

    expected = []
    for line in TABLES[table].splitlines()[2:]:
        key, default, allowed, _ = row(line)
        expected.append([key, default, pattern.sub(lambda match: words[match[0]], allowed)])
    (lines,) = [part for part in CHINESE.split("\n\n") if f"| {expected[0][0]} |" in part and "| 键 |" in part]
    assert [row(line)[:3] for line in lines.splitlines()[2:]] == expected
    assert all(re.search(r"[一-鿿]", row(line)[3]) for line in lines.splitlines()[2:])


def tree(text: str) -> dict[str, set[str]]:
    """Folder -> the names shown in it, of a tree indented by two spaces; the root is "". A folder ends with a slash."""
    shown: dict[str, set[str]] = {"": set()}
    above: list[str] = []
    for line in text.splitlines():
        indent, names = re.match(r"((?:  )*)(\S+)", line).groups()
        above = above[: len(indent) // 2]
        shown.setdefault("".join(above), set()).add(names)
        if names.endswith("/"):
            above.append(names)
    return shown


def kept_files() -> list[Path]:
    """What belongs to the repository, new files included."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: what belongs to the repository is not known")
    return [Path(name) for name in listed.stdout.splitlines() if (ROOT / name).exists()]


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_layout_shows_every_entry_and_nothing_else(text: str) -> None:
    (layout,) = [part for part in blocks(text, "text") if part.startswith(".ci/")]
    shown = tree(layout)
    assert "sft/" in shown and "launch/" in shown
    for folder, names in shown.items():
        inside = [file.relative_to(folder) for file in kept_files() if file.is_relative_to(folder or ".")]
        there = {file.parts[0] + "/" * (len(file.parts) > 1) for file in inside}
        assert names == there - {"__init__.py", ".gitignore"}, folder


def test_results_show_what_a_run_leaves(place: Place, demo: Path) -> None:
    output = tree(block("text", "output_sft/"))
    checkpoint = tree(block("text", "checkpoint_best/"))

    def left(folder: Path) -> set[str]:
        names = {entry.name + "/" * entry.is_dir() for entry in folder.iterdir()}
        names = {re.sub(r"tfevents\..*", "tfevents.*", name) for name in names}
        return {re.sub(r"epoch_\d+", "epoch_3", re.sub(r"lora_sft_\d+_\d+(_\d+)?", RUN, name)) for name in names}

    assert output["output_sft/"] == left(demo.parent)
    assert output[f"output_sft/{RUN}/"] == left(demo)
    assert checkpoint["checkpoint_best/"] == left(demo / "checkpoint_best")


def form(text: str) -> str:
    """The text with a mark in every number's place."""
    return re.sub(r"[+-]?\d+(:\d\d)*(\.\d+)?(e[+-]\d+)?", "#", text)


def test_demo_output_has_the_form_of_todays_log(demo: Path) -> None:
    log = {form(line) for line in (demo / "training.log").read_text().splitlines()}
    shown = block("text", "setup:").splitlines()
    lines = [line for line in shown if line != "..." and not line.startswith(("setup:", "Run "))]
    assert len(lines) >= 7
    assert [line for line in lines if form(line) not in log] == []


def test_paths_and_links_exist() -> None:
    for text in (ENGLISH, CHINESE):
        paths = re.findall(r"`((?:sft|launch|tests|docs|deepspeed_configs)/[\w./-]+)`", text)
        links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
        assert [path for path in {*paths, *links} if not (ROOT / path).exists()] == []


def test_yaml_block_is_a_legal_config(place: Place) -> None:
    content = yaml.safe_load(block("yaml", "model_path"))
    assert TrainConfig(**content).model_path == "/models/Sa2VA-4B"


# Form


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_both_commands_and_the_picture_stand_before_line_40(text: str) -> None:
    head = "\n".join(text.splitlines()[:40])
    assert f"bash {JOB}" in head and "bash tests/run.sh" in head
    (picture,) = re.findall(r"!\[.+\]\((\S+)\)", head)
    assert (ROOT / picture).stat().st_size < 400_000
    with Image.open(ROOT / picture) as image:
        assert image.format == "PNG"


def test_both_languages_have_the_same_commands_and_headings() -> None:
    def commands(text: str, language: str) -> list[str]:
        return [re.sub(r"  +#.*", "", part) for part in blocks(text, language)]

    for language in ("bash", "python", "yaml"):
        assert commands(ENGLISH, language) == commands(CHINESE, language), language
    assert re.findall(r"^#+ ", ENGLISH, re.MULTILINE) == re.findall(r"^#+ ", CHINESE, re.MULTILINE)
    assert re.findall(r"^\$\$.*", ENGLISH, re.MULTILINE) == re.findall(r"^\$\$.*", CHINESE, re.MULTILINE)
    assert re.findall(r"<!-- \w+ -->", ENGLISH) == re.findall(r"<!-- \w+ -->", CHINESE)


def test_both_languages_show_the_same_output() -> None:
    for english, chinese in zip(blocks(ENGLISH, "text"), blocks(CHINESE, "text"), strict=True):
        if re.search(r"[一-鿿]", chinese):
            assert tree(english) == tree(chinese)
        else:
            assert english == chinese


@pytest.mark.parametrize("text", blocks(ENGLISH, "python"), ids=["native", "published"])
def test_python_block_imports_what_exists(text: str) -> None:
    modules = {
        name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert modules and all(importlib.util.find_spec(module) for module in modules)
