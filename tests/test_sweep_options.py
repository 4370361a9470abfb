"""The command line of a sweep: what it gives, what may be given anew, every mistake in one line before Ray loads."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import small_sweeps as small
import yaml

from sft.config import EMBEDDED, TrainConfig, override, to_yaml
from sft.settings import UserError, docs_of, settings_of
from tune import options, trials
from tune.options import OURS, SweepConfig, parse

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "peft", "deepspeed", "ray", "numpy", "optuna", "matplotlib", "sklearn"}


def message_of(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(list(map(str, arguments)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def config(tmp_path) -> Path:
    """A YAML file that is not the demo's."""
    return written(tmp_path / "config.yaml", num_epochs=12, learning_rate="3e-4")


def written(file: Path, **settings) -> Path:
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture
def begun(tmp_path) -> Path:
    """The folder of a sweep of 4 trials."""
    folder = tmp_path / "begun"
    folder.mkdir()
    trials.write_sweep(folder, small.sweep(options=dataclasses.asdict(SweepConfig(num_trials=4, grace=1))))
    return folder


# What a command line gives


def test_without_arguments_a_small_sweep_of_the_embedded_model_runs():
    plan = parse([])
    assert (plan.sweep.num_trials, plan.sweep.grace, plan.seed_setting.num_epochs) == (8, 2, 6)
    assert plan.seed_setting.model_path == plan.seed_setting.data_root == EMBEDDED
    assert plan.sweep.space == str(options.DEMO_SPACE) and plan.resumed is None and plan.points == ()
    assert parse(["--num_trials", "3", "--lora_rank", "8"]).sweep.num_trials == 3
    assert parse(["--space", str(options.SPACE)]).space.axes != plan.space.axes


def test_a_file_then_flags_make_the_seed_setting(config):
    plan = parse(["--config", str(config), "--num_epochs", "20", "--no_augment", "--train_modules", "mask_decoder"])
    assert (plan.sweep.num_trials, plan.sweep.grace) == (32, 3)
    base = plan.seed_setting
    assert (base.num_epochs, base.learning_rate, base.train_modules) == (20, 3e-4, ("mask_decoder",))
    assert [axis.name for axis in plan.space.axes][:2] == ["lora_rank", "alpha_ratio"]


@pytest.mark.parametrize("name", sorted(settings_of(TrainConfig).keys() - OURS.keys()))
def test_every_setting_of_a_run_is_a_flag(name, config):
    plan = parse(["--config", str(config), f"--{name}", settings_of(TrainConfig)[name].default_text.strip("'")])
    assert getattr(plan.seed_setting, name) == getattr(TrainConfig(), name)


@pytest.mark.parametrize("name", OURS)
def test_what_a_sweep_decides_is_no_flag_and_is_left_out_of_a_file(name, tmp_path, config):
    if name != "resume":  # which is a flag of the sweep's own
        assert message_of("--config", config, f"--{name}", "1") == (
            f"--{name} is decided by the sweep for its trials; use {OURS[name]}"
        )
    full = tmp_path / "full.yaml"
    full.write_text(
        to_yaml(TrainConfig(output_dir="elsewhere", save_every=7, keep="latest", resume="auto", dry_run=True))
    )
    default, given = TrainConfig(), parse(["--config", str(full)]).seed_setting
    assert getattr(given, name) == getattr(default, name)


def test_paths_hold_in_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("images", "zero2"):
        (tmp_path / name).mkdir()
    base = parse(["--data_root", "images", "--feature_cache_dir", "to_be_made"]).seed_setting
    assert (base.data_root, base.feature_cache_dir) == (str(tmp_path / "images"), str(tmp_path / "to_be_made"))
    assert base.deepspeed_config == "zero2"  # a shipped file, not the folder of that name
    assert base.model_path == EMBEDDED and base.output_dir == TrainConfig().output_dir


def test_best_yaml_of_another_sweep_is_a_point_in_what_varies(tmp_path, config):
    best = tmp_path / "best.yaml"
    other = override(TrainConfig(), {"lora_rank": 16, "lora_alpha": 8, "num_epochs": 3, "weight_decay": 0.1})
    best.write_text(to_yaml(other))
    few = written(tmp_path / "few.yaml", learning_rate="2e-4")
    (point, second) = parse(["--config", str(config), "--points", str(best), str(few)]).points
    assert point["lora_rank"] == 16 and point["lora_alpha"] == 8 and second == {"learning_rate": 2e-4}
    assert not {"num_epochs", "weight_decay", "alpha_ratio"} & point.keys()


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_trails", "3"], "unknown key --num_trails; nearest: --num_trials"),
        (["--lora_rnk", "3"], "unknown key --lora_rnk; nearest: --lora_rank"),
        (["here"], "unexpected argument here"),
        (["--num_trials", "0"], "num_trials = 0 is not allowed: integer at least 1"),
        (["--search", "rand"], "search = rand is not allowed: random or grid or optuna; nearest: random"),
        (["--reduction", "1"], "reduction = 1 is not allowed: integer at least 2"),
        (["--gpus_per_trial", "1.5"], "gpus_per_trial = 1.5: give a share below 1, or a whole number"),
        (["--gpus_per_trial", "0.001"], "gpus_per_trial = 0.001 is not allowed: number at least 0.01"),
        (["--gpus_per_trial", "0.3", "--ranks_per_trial", "2"], "a rank has one GPU or one share"),
        (["--gpus_per_trial", "4", "--ranks_per_trial", "1"], "a rank has one GPU or one share"),
        (["--name", "a/b"], "name = a/b is no folder name"),
        (["--name", "..."], "name = ... is no folder name"),
        (["--time_budget_s", "0"], "time_budget_s = 0 is not allowed"),
        (["--grace", "7"], "grace = 7 validations end after epoch 7, but a trial has 6"),
        (["--validate_every", "3", "--grace", "3"], "grace = 3 validations end after epoch 9, but a trial has 6"),
        (["--validate_every", "4", "--grace", "1"], "validate_every = 4 does not divide num_epochs = 6"),
        (["--search", "grid"], "search grid: learning_rate is loguniform; a grid needs"),
        (["--space", "nowhere.yaml"], "--space nowhere.yaml: No such file"),
        (["--points", "nowhere.yaml"], "--points nowhere.yaml is no file"),
        (["--points", "POINT", "--num_trials", "1"], "num_trials = 1 leaves no room for the seed setting and 1 points"),
        (["--points", "OTHER"], "sets nothing that varies; expected some of"),
        (["--points", "WRONG"], "lora_rank = 0 is not allowed"),
        (["--data_root", "nowhere"], "data_root .*nowhere is not a directory"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: No such file"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path):
    files = {
        "POINT": written(tmp_path / "point.yaml", lora_rank=16),
        "OTHER": written(tmp_path / "other.yaml", weight_decay=0.1),
        "WRONG": written(tmp_path / "wrong.yaml", lora_rank=0),
    }
    found = message_of(*(files.get(word, word) for word in arguments))
    assert message in found or re.search(message, found)


def test_sparse_validations_are_legal_where_they_can_be_compared():
    assert parse(["--validate_every", "2", "--grace", "2"]).seed_setting.validate_every == 2
    assert parse(["--validate_every", "4", "--no_early_stop"]).sweep.early_stop is False
    assert parse(["--gpus_per_trial", "0.3", "--ranks_per_trial", "1"]).sweep.ranks(0.3) == 1
    assert [parse(["--gpus_per_trial", "2"]).sweep.ranks(gpus) for gpus in (2.0, 0.0)] == [2, 1]  # on CPUs of no effect


def test_a_mistake_answers_before_anything_heavy_is_loaded():
    command = [sys.executable, "-X", "importtime", str(ROOT / "tune" / "search.py"), "--name", "a/b"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 2 and len(told) == 1 and told[0].startswith("error: name = a/b")
    assert "tune.options" in loaded and not loaded & HEAVY


def test_help_and_table_tell_every_setting_of_a_sweep(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    shown, table = capsys.readouterr().out, options.sweep_table()
    assert ended.value.code == 0
    for name, doc in docs_of(SweepConfig).items():
        assert f"--{name}" in shown and f"| `{name}` |" in table and doc in table


# Going on


def test_a_sweep_goes_on_as_it_was_begun(begun):
    plan = parse(["--resume", str(begun)])
    assert plan.resumed == begun and plan.space == small.SPACE and plan.seed_setting == TrainConfig(num_epochs=9)
    assert (plan.sweep.num_trials, plan.sweep.grace, plan.sweep.resume) == (4, 1, str(begun))


def test_what_is_given_anew_stays_for_the_next_time(begun, monkeypatch):
    monkeypatch.chdir(begun.parent)
    plan = parse(["--resume", "begun", "--num_trials", "9", "--seeds", "3", "--time_budget_s", "60"])
    assert (plan.sweep.num_trials, plan.sweep.seeds, plan.sweep.time_budget_s) == (9, 3, 60.0)
    trials.write_sweep(begun, small.sweep(options=dataclasses.asdict(plan.sweep) | {"resume": None}, num_trials=9))
    again = parse(["--resume", "begun"])
    assert (again.sweep.num_trials, again.sweep.seeds, again.sweep.time_budget_s) == (9, 3, None)


def test_devices_given_anew_take_the_place_of_the_former(begun):
    trials.write_sweep(begun, small.sweep(base=TrainConfig(num_epochs=9, gpu="0,1")))
    assert parse(["--resume", str(begun)]).seed_setting.gpu == "0,1"
    base = parse(["--resume", str(begun), "--include", "localhost:2"]).seed_setting
    assert (base.gpu, base.include) == (None, "localhost:2")


def test_points_are_those_of_the_beginning(begun):
    gone = dataclasses.asdict(SweepConfig(points=("gone.yaml",)))
    trials.write_sweep(begun, small.sweep(options=gone, points=[{"lora_rank": 16, "train_modules": ["mask_decoder"]}]))
    (point,) = parse(["--resume", str(begun)]).points
    assert override(TrainConfig(), point).train_modules == ("mask_decoder",)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--search", "grid"], "--search with --resume: a sweep goes on as it was begun; may be given anew: address"),
        (["--learning_rate", "1"], "--learning_rate with --resume"),
        (["--name", "b", "--no_early_stop"], "--no_early_stop with --resume"),
        (["--config", "x.yaml"], "--config with --resume"),
        (["--num_trials", "3"], "num_trials = 3: the sweep has 4; it can only be raised"),
        (["--num_trials", "x"], "num_trials = x is not allowed"),
    ],
)
def test_what_may_not_be_given_anew_is_refused(begun, extra, message):
    assert message in message_of("--resume", begun, *extra)


def test_what_is_no_sweep_is_told(tmp_path, begun):
    for place in (tmp_path / "nowhere", tmp_path, begun / trials.SWEEP_FILE):
        assert "sweep.json: not found; expected a sweep's folder" in message_of("--resume", place)
    for content in ("[1]", "{}", '{"format": 99}', '{"format": 1, "name": "x"}'):
        (tmp_path / trials.SWEEP_FILE).write_text(content)
        assert "sweep.json: not a sweep of this version; start a new one" in message_of("--resume", tmp_path)
    (tmp_path / trials.SWEEP_FILE).write_text('{"format": ')
    assert "sweep.json: not valid JSON" in message_of("--resume", tmp_path)
    trials.write_sweep(begun, dataclasses.replace(small.sweep(), base={"lora_rnk": 3}))
    assert "sweep.json: unknown key lora_rnk = 3; nearest: lora_rank" in message_of("--resume", begun)
