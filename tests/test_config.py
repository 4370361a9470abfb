"""Settings: defaults, YAML and flags give one checked TrainConfig, and every mistake is one helpful line."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from sft.config import (
    TrainConfig,
    UserError,
    check_paths,
    deepspeed_config_path,
    override,
    parse_args,
    read_yaml,
    settings_table,
    to_yaml,
)
from sft.settings import Range, docs_of, settings_of

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "launch" / "configs"
HEAVY = ("torch", "transformers", "peft", "deepspeed", "ray", "numpy")


def run_train(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """launch/train.py in a new process, with every import listed on stderr."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "launch" / "train.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=30, check=False)


def error_of(done: subprocess.CompletedProcess) -> str:
    """The one line a user sees; fails on a traceback, a second line or a heavy import."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert imported.isdisjoint(HEAVY)
    assert done.returncode == 2
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def message_of(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_args(list(arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Defaults and the shipped files


def test_defaults_are_the_researchers_setting() -> None:
    config = TrainConfig()
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (64, 128, 0.05)
    assert (config.num_epochs, config.batch_size, config.learning_rate, config.lr_scheduler) == (15, 1, 1e-4, "cosine")
    assert (config.dice_weight, config.focal_weight, config.bce_weight) == (1.0, 1.0, 0.5)
    assert (config.precision, config.deepspeed_config, config.gradient_checkpointing) == ("bf16", "zero2", "auto")
    assert (config.save_every, config.val_fraction) == (3, 0.2)


def test_vessel_yaml_states_the_defaults() -> None:
    assert override(TrainConfig(), read_yaml(CONFIGS / "vessel.yaml")) == TrainConfig()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_yaml_is_a_legal_config(path: Path) -> None:
    assert parse_args(["--config", str(path)]) == TrainConfig(**yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", sorted((ROOT / "deepspeed_configs").glob("*.json")), ids=lambda path: path.name)
def test_deepspeed_files_hold_zero_and_communication_keys_only(path: Path) -> None:
    content = json.loads(path.read_text())
    assert set(content) == {"zero_optimization"}
    assert content["zero_optimization"]["stage"] == int(path.stem[4])
    assert content["zero_optimization"]["overlap_comm"] is False
    assert '"auto"' not in path.read_text()
    assert deepspeed_config_path(path.stem) == path


# Flags and YAML


def test_flags_go_on_top_of_yaml(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("learning_rate: 1e-3\nlora_rank: 8\n")
    config = parse_args(["--config", str(file), "--learning_rate", "5e-5"])
    assert (config.learning_rate, config.lora_rank, config.num_epochs) == (5e-5, 8, 15)


def test_yaml_text_that_looks_like_a_float_is_a_float(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("learning_rate: 1e-4\n")
    assert isinstance(yaml.safe_load(file.read_text())["learning_rate"], str)  # PyYAML wants 1.0e-4
    assert parse_args(["--config", str(file)]).learning_rate == 1e-4


def test_yaml_reads_off_as_false_and_the_config_as_off(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("feature_cache: off\ngpu: 3\nval_list: none\n")
    config = parse_args(["--config", str(file)])
    assert (config.feature_cache, config.gpu, config.val_list) == ("off", "3", None)


def test_the_seed_command_of_the_issue_parses() -> None:
    line = (
        "--model_path M --data_root D --lora_rank 64 --lora_alpha 128 --num_epochs 15 --gradient_checkpointing --gpu 3"
    )
    config = parse_args(line.split())
    assert (config.model_path, config.data_root, config.gpu) == ("M", "D", "3")
    assert config.gradient_checkpointing is True


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ("--gradient_checkpointing", True),
        ("--gradient_checkpointing true", True),
        ("--gradient_checkpointing auto", "auto"),
        ("--gradient_checkpointing false", False),
        ("--gradient_checkpointing=no", False),
        ("--no_gradient_checkpointing", False),
    ],
)
def test_a_boolean_can_be_written_every_usual_way(flags: str, value: bool) -> None:
    assert parse_args(flags.split()).gradient_checkpointing == value


def test_batch_size_is_a_number_or_auto_everywhere(tmp_path: Path, capsys) -> None:
    file = tmp_path / "mine.yaml"
    for value, text in (("auto", "auto"), (4, "4")):
        file.write_text(f"batch_size: {text}\n")
        config = parse_args(["--batch_size", text])
        assert config.batch_size == value
        assert config == parse_args(["--config", str(file)]) == TrainConfig(batch_size=text)
        file.write_text(to_yaml(config))
        assert parse_args(["--config", str(file)]) == config
        with pytest.raises(SystemExit):
            parse_args(["--batch_size", text, "--print_config"])
        assert f"batch_size: {text}" in capsys.readouterr().out.splitlines()
    for text in ("0", "-1", "1.5", "many", "Auto", "true"):
        assert message_of("--batch_size", text) == (f"batch_size = {text} is not allowed: integer at least 1, or auto")
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "auto: the largest that fits the GPU" in told and "[integer at least 1, or auto; default 1]" in told


def test_lists_take_commas_or_spaces_and_none_empties() -> None:
    both = ("text_hidden_fcs", "mask_decoder")
    assert parse_args(["--train_modules", "text_hidden_fcs,mask_decoder"]).train_modules == both
    assert parse_args(["--train_modules", "text_hidden_fcs", "mask_decoder"]).train_modules == both
    assert parse_args(["--train_modules", "none"]).train_modules == ()
    assert parse_args(["--train_modules_learning_rate", "none"]).train_modules_learning_rate is None


@pytest.mark.parametrize("flags", [["--local_rank", "1"], ["--local_rank=1"], ["--local-rank=1"]])
def test_the_launchers_local_rank_is_accepted_and_ignored(flags: list[str]) -> None:
    assert parse_args(flags) == TrainConfig()


def test_a_leading_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert TrainConfig(data_root="~/vessels").data_root == "/home/someone/vessels"


def test_print_config_can_be_read_back(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_args(["--print_config", "--learning_rate", "3e-5", "--feature_cache", "off", "--train_modules", "none"])
    assert stop.value.code == 0
    file = tmp_path / "resolved.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse_args(["--config", str(file)]) == TrainConfig(learning_rate=3e-5, feature_cache="off")
    assert set(yaml.safe_load(file.read_text())) == {field.name for field in dataclasses.fields(TrainConfig)}


def test_only_rank_0_prints_the_config(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse_args(["--print_config"])
    assert capsys.readouterr().out == ""


def test_the_demo_settings_stand_in_for_the_defaults_only_when_all_is_embedded() -> None:
    demo = CONFIGS / "demo.yaml"
    shipped = TrainConfig(**yaml.safe_load(demo.read_text()))
    assert shipped != TrainConfig()
    assert parse_args([], demo=demo) == shipped
    assert parse_args(["--model_path", "embedded", "--seed", "7"], demo=demo) == dataclasses.replace(shipped, seed=7)
    assert parse_args(["--data_root", "D"], demo=demo) == TrainConfig(data_root="D")
    assert parse_args(["--config", str(CONFIGS / "vessel.yaml")], demo=demo) == TrainConfig()


# Mistakes


def test_a_value_out_of_range_names_key_value_and_range() -> None:
    assert message_of("--lora_rank", "0") == "lora_rank = 0 is not allowed: integer at least 1 and at most 1024"
    assert message_of("--learning_rate", "2") == "learning_rate = 2 is not allowed: number above 0 and at most 1"
    assert "lora_dropout = 1" in message_of("--lora_dropout", "1")
    assert "threshold = nan" in message_of("--threshold", "nan")
    assert "dice_weight = inf" in message_of("--dice_weight", "inf")


def test_a_wrong_type_names_key_value_and_type() -> None:
    assert message_of("--lora_rank", "many") == "lora_rank = many is not allowed: integer at least 1 and at most 1024"
    assert "gradient_checkpointing = maybe is not allowed: true or false, or auto" in message_of(
        "--gradient_checkpointing=maybe"
    )
    for key, value in [
        ("num_epochs", 1.5),
        ("num_epochs", True),
        ("lora_rank", None),
        ("question", ""),
        ("augment", 1),
    ]:
        with pytest.raises(UserError, match=f"{key} = "):
            TrainConfig(**{key: value})


def test_an_unknown_choice_names_the_nearest() -> None:
    message = message_of("--lr_scheduler", "cosin")
    assert message == "lr_scheduler = cosin is not allowed: cosine or linear or constant; nearest: cosine"
    assert "nearest: mask_decoder" in message_of("--train_modules", "mask_decoders")


def test_an_unknown_flag_names_value_and_nearest_key_with_its_range() -> None:
    message = message_of("--learning_rte", "5")
    assert message == "unknown key --learning_rte = 5; nearest: --learning_rate (number above 0 and at most 1)"
    assert "nearest: --lora_rank" in message_of("--lora-rank=8")
    assert "unexpected argument vessel.yaml" in message_of("vessel.yaml")


def test_an_abbreviated_flag_is_an_error() -> None:
    assert "unknown key --learning = 5; nearest: --learning_rate" in message_of("--learning", "5")
    assert "unknown key --print_conf" in message_of("--print_conf")


def test_a_flag_without_its_value_is_an_error() -> None:
    assert "--lora_rank" in message_of("--lora_rank")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora_rnk: 8", "unknown key lora_rnk = 8; nearest: lora_rank (integer at least 1 and at most 1024)"),
        ("lora_rank: 0", "lora_rank = 0 is not allowed"),
        ("lora_rank: 8\nlora_rank: 9", "lora_rank is given twice"),
        ("lora_rank: [", "is not YAML"),
        ("- lora_rank", "holds no settings"),
        ("lora_rank", "holds no settings"),
        ("question: no", "question = false is not allowed"),
    ],
)
def test_a_mistake_in_a_yaml_file_names_the_file(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    message = message_of("--config", str(file))
    assert str(file) in message and expected in message


def test_an_empty_yaml_file_changes_nothing_and_a_missing_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert parse_args(["--config", str(tmp_path / "empty.yaml")]) == TrainConfig()
    assert "missing.yaml: No such file" in message_of("--config", str(tmp_path / "missing.yaml"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fold": 1}, "fold = 1 without folds"),
        ({"folds": 1}, "folds = 1"),
        ({"folds": 5, "fold": 5}, "fold = 5 must be below folds = 5"),
        ({"folds": 5, "val_list": "names.txt"}, "val_list and folds"),
        ({"dice_weight": 0, "focal_weight": 0, "bce_weight": 0}, "are all 0"),
        ({"gpu": "0", "include": "localhost:0"}, "gpu and include"),
        ({"lora_scope": ["mask_decoder"], "train_modules": ["mask_decoder"]}, "both name mask_decoder"),
        ({"lora_scope": []}, "lora_scope is empty"),
        ({"lora_target_modules": "none"}, "lora_target_modules is empty"),
        ({"lora_scope": "language_model,language_model"}, "names one thing twice"),
        ({"group_pattern": "("}, "no regular expression"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict, expected: str) -> None:
    with pytest.raises(UserError, match=expected.replace("(", r"\(")):
        override(TrainConfig(), changes)


def test_a_sweep_changes_settings_in_python() -> None:
    numpy = pytest.importorskip("numpy")
    config = dataclasses.replace(TrainConfig(), lora_rank=numpy.int64(16), learning_rate=numpy.float32(0.5))
    assert (config.lora_rank, config.learning_rate) == (16, 0.5)
    assert type(config.lora_rank) is int and type(config.learning_rate) is float
    with pytest.raises(UserError, match=r"space.yaml: unknown key rank = 8; nearest: lora_rank"):
        override(TrainConfig(), {"rank": 8}, source="space.yaml")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


# Paths


def test_paths_are_checked_one_by_one(tmp_path: Path) -> None:
    model, data, file = tmp_path / "model", tmp_path / "data", tmp_path / "file"
    model.mkdir(), data.mkdir(), file.write_text("x")
    (model / "weights.bin").write_text("x")
    good = TrainConfig(output_dir=str(tmp_path / "new" / "out"))
    check_paths(good)
    for changes, expected in [
        ({"model_path": str(tmp_path / "gone")}, "gone does not exist"),
        ({"model_path": str(file)}, "is a file"),
        ({"model_path": str(model)}, r"no config.json \(found: weights.bin\)"),
        ({"data_root": str(tmp_path / "gone")}, "data_root .*gone is not a directory"),
        ({"val_list": str(tmp_path / "gone")}, "val_list"),
        ({"resume": str(tmp_path / "gone")}, "resume"),
        ({"resume": "auto"}, "resume auto: no checkpoint of any run in .*out"),
        ({"deepspeed_config": "zero4"}, "one of: zero1, zero2, zero2_offload, zero3"),
        ({"output_dir": str(file / "out")}, "is a file; name another folder|Not a directory"),
        ({"data_root": "x" * 5000}, "too long"),
    ]:
        with pytest.raises(UserError, match=expected):
            check_paths(dataclasses.replace(good, **changes))
    (model / "config.json").write_text("{}")
    (tmp_path / "new" / "out" / "lora_sft_20261123_000000" / "checkpoint_best").mkdir(parents=True)
    check_paths(dataclasses.replace(good, model_path=str(model), data_root=str(data), resume="auto"))


# The command itself


def test_a_mistake_is_one_line_with_exit_code_2_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    assert "nearest: --lora_rank" in error_of(run_train("--lora_rang", "8"))
    assert "does not exist" in error_of(run_train("--model_path", "gone", cwd=tmp_path))
    assert "device 93 does not exist" in error_of(run_train("--gpu", "93", cwd=tmp_path))


@pytest.fixture
def train_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """launch/train.py as a module, about to run with settings that are right."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "launch" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_mistake_that_only_another_rank_makes_is_printed_after_rank_0_had_its_time(
    train_script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def claim(gpu: str | None, include: str | None) -> None:
        raise UserError("no such thing\nhere")

    slept = []
    monkeypatch.setattr(train_script, "claim", claim)
    monkeypatch.setattr(train_script.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "0")
    assert train_script.main() == 2
    assert (slept, capsys.readouterr().err) == ([], "error: no such thing here\n")
    monkeypatch.setenv("RANK", "1")
    assert train_script.main() == 2
    assert slept == [train_script.RANK_0_FIRST_S]
    assert capsys.readouterr().err == "error (rank 1): no such thing here\n"


def test_ctrl_c_ends_in_one_line(
    train_script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def claim(gpu: str | None, include: str | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_script, "claim", claim)
    monkeypatch.delenv("RANK", raising=False)
    assert train_script.main() == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_help_lists_every_setting_in_half_a_second() -> None:
    seconds = []
    for _ in range(3):  # the best of three, because other work may share the machine
        started = time.monotonic()
        command = [sys.executable, str(ROOT / "launch" / "train.py"), "--help"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds.append(time.monotonic() - started)
    assert all(f"--{name} " in text for name in settings_of(TrainConfig))
    assert "launch/configs/demo.yaml" in text
    assert min(seconds) < 0.5


def test_the_settings_table_has_one_row_per_setting() -> None:
    command = [sys.executable, "-m", "sft.config", "--table"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == settings_table()
    rows = settings_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(settings_of(TrainConfig))
    assert all(row.count("|") == 5 for row in rows)
    assert "| `lora_rank` | 64 | integer at least 1 and at most 1024 | Rank r of the LoRA matrices. |" in rows


def test_every_setting_has_its_doc_and_every_number_its_range() -> None:
    docs = docs_of(TrainConfig)
    for name, setting in settings_of(TrainConfig).items():
        assert docs[name].endswith(".")
        assert setting.range is not None or setting.kind not in (int, float)


def test_a_range_includes_and_excludes_its_ends() -> None:
    assert 0 in Range(at_least=0, below=1) and 1 not in Range(at_least=0, below=1)
    assert 0 not in Range(above=0, at_most=1) and 1 in Range(above=0, at_most=1)
    not_numbers = (float("nan"), float("inf"))
    assert not any(value in Range(at_least=0) for value in not_numbers)


def test_to_yaml_keeps_every_value() -> None:
    config = TrainConfig(question="血管在哪里? Segment: it.", learning_rate=1e-05, val_list="none", gpu="0")
    assert TrainConfig(**yaml.safe_load(to_yaml(config))) == config
