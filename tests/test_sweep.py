"""Protects a sweep as its user runs it: the command, what it leaves, going on, and what a kill costs."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sweep_drill
import yaml

from sft.config import parse_args
from tune import trials

ROOT = Path(__file__).resolve().parents[1]
EPOCHS, TRIALS = 3, 4
pytestmark = pytest.mark.slow


def search(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tune" / "search.py"), *arguments]
    limit_s, whole = sweep_drill.LIMIT_S, os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=whole)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Small inputs, a space in which one choice fits no module, and a point that takes it."""
    folder = tmp_path_factory.mktemp("sweep")
    sweep_drill.write_inputs(folder)
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"num_epochs": EPOCHS}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    targets = "lora_target_modules: {choice: [[q_proj, v_proj], [no_proj]]}\n"
    (folder / "space.yaml").write_text(sweep_drill.SPACE + targets)
    (folder / "point.yaml").write_text("lora_target_modules: [no_proj]\n")
    return folder


@pytest.fixture(scope="module")
def ended(folder) -> tuple[Path, subprocess.CompletedProcess]:
    """A sweep that has ended, and what it printed."""
    paths = ["--config", folder / "config.yaml", "--space", folder / "space.yaml", "--points", folder / "point.yaml"]
    words = ["--storage_path", folder / "sweeps", "--name", "first", "--num_trials", TRIALS, "--grace", 1]
    return folder / "sweeps" / "first", search(*map(str, paths + words))


def test_it_ends_with_a_table_a_verdict_and_code_0(ended):
    sweep, done = ended
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{TRIALS} of {TRIALS} trials ended" in done.stdout
    assert "0 (seed setting)" in done.stdout
    assert str(sweep / "best.yaml") in done.stdout


def test_the_seed_setting_is_first_and_a_trial_that_cannot_run_has_its_reason(ended):
    found = trials.read_all(ended[0])
    assert [trial.number for trial in found] == list(range(TRIALS))
    assert [trial.origin for trial in found[:2]] == ["seed setting", "points"]
    assert found[0].settings == {}
    assert found[1].status == "failed" and "no_proj" in found[1].reason
    assert all(trial.status in ("finished", "stopped", "failed") for trial in found)
    assert found[0].epoch == EPOCHS


def test_the_best_is_the_highest_dice_and_its_yaml_trains(ended):
    sweep, _ = ended
    found = [trial for trial in trials.read_all(sweep) if trial.rows]
    best = max(found, key=lambda trial: max(row["dice"] for row in trial.rows))
    config = parse_args(["--config", str(sweep / "best.yaml")])
    assert config.learning_rate == best.settings.get("learning_rate", config.learning_rate)
    assert json.loads((sweep / "best_checkpoint" / "trial.json").read_text())["number"] == best.number
    assert json.loads((sweep / "best_checkpoint" / "checkpoint.json").read_text())["progress"]["best_dice"] == (
        max(row["dice"] for row in best.rows)
    )


def test_only_the_best_adapter_stays_on_the_disk(ended):
    sweep, _ = ended
    assert (sweep / "best_checkpoint" / "adapter_model.safetensors").is_file()
    assert list(sweep.glob("trials/*/*/checkpoint_*")) == []
    assert not (sweep / "best_checkpoint" / "training_state.pt").exists()


def test_it_leaves_what_the_readme_shows(ended):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^output_tune/\w+/\n((?:  .*\n)+)```", readme, re.MULTILINE)
    there = {path.name + "/" * path.is_dir() for path in ended[0].iterdir()}
    assert {line.split()[0] for line in shown.splitlines()} == there


def test_every_trial_has_the_sweeps_split(ended):
    sweep, _ = ended
    splits = {path.read_text() for path in sweep.glob("trials/*/lora_sft_*/split.json")}
    assert [json.loads(text) for text in splits] == [json.loads((sweep / "split.json").read_text())]


def test_csv_and_report_hold_every_trial(ended):
    sweep, _ = ended
    rows = list(csv.DictReader((sweep / "trials.csv").open()))
    assert [row["number"] for row in rows] == [str(number) for number in range(TRIALS)]
    assert "best.yaml" in (sweep / "report.html").read_text()


def test_a_finished_sweep_can_be_made_longer_and_repeats_its_best_with_other_seeds(ended):
    sweep, _ = ended
    before = sweep_drill.state(sweep)
    done = search("--resume", str(sweep), "--num_trials", str(TRIALS + 1), "--seeds", "2")
    assert (done.returncode, done.stderr) == (0, "")
    after = sweep_drill.state(sweep)
    assert {name: after[name] for name in before} == before
    found = trials.read_all(sweep)
    assert found[TRIALS].origin == "random"
    repeated = [trial for trial in found if trial.is_repeat]
    assert all(trial.epoch == EPOCHS for trial in repeated) and len(repeated) >= 2
    assert len({json.dumps(trial.settings) for trial in found}) == len(found)


@pytest.mark.parametrize("kind", ["driver", "trial", "actor"])
def test_a_kill_loses_nothing_finished_and_at_most_one_epoch(tmp_path_factory, kind):
    folder = tmp_path_factory.mktemp(kind)
    sweep_drill.write_inputs(folder)
    found = sweep_drill.drill(folder, kind, kind, after=5)
    assert found["finished lost"] == 0
    assert found["epochs again, at most"] <= 1
    assert found["ended after"] == found["of"]


def test_a_trial_of_two_ranks_that_is_stopped_gives_its_devices_to_the_next(tmp_path):
    """Two ranks take all there is: with what Ray Train keeps of a stopped trial the sweep would stand still."""
    sweep_drill.write_inputs(tmp_path)
    paths = ["--config", tmp_path / "config.yaml", "--space", tmp_path / "space.yaml", "--storage_path", tmp_path]
    words = ["--name", "ranks", "--num_trials", 3, "--grace", 1, "--ranks_per_trial", 2, "--max_concurrent", 1]
    done = search(*map(str, paths + words))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    found = trials.read_all(tmp_path / "ranks")
    assert {trial.status for trial in found} == {"finished", "stopped"} and len(found) == 3


def test_two_nodes_of_an_existing_cluster_share_a_sweep(tmp_path):
    sweep_drill.write_inputs(tmp_path)
    environment = sweep_drill.environment_of(tmp_path)
    paths = ["--config", tmp_path / "config.yaml", "--space", tmp_path / "space.yaml", "--storage_path", tmp_path]
    cluster = sweep_drill.Cluster(os.environ | environment)
    try:
        words = ["--name", "nodes", "--num_trials", 2, "--no_early_stop", "--address", cluster.address]
        done = search(*map(str, paths + words), **environment)
    finally:
        cluster.stop()
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "2 trials, 2 at a time, each with 0 GPUs and 1 cores" in done.stdout  # of nodes with one core each
    first, other = trials.read_all(tmp_path / "nodes")
    assert first.status == other.status == "finished"
    assert other.rows[0]["time"] - other.rows[0]["device_s"] < first.rows[-1]["time"]  # beside each other


def test_ctrl_c_ends_with_one_line_the_table_and_code_130(folder):
    sweep = folder / "sweeps" / "interrupted"
    paths = ["--config", folder / "config.yaml", "--space", folder / "space.yaml", "--storage_path", sweep.parent]
    words = ["--name", sweep.name, "--num_trials", TRIALS, "--grace", 1]
    command = [sys.executable, str(ROOT / "tune" / "search.py"), *map(str, paths + words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    sweep_drill.wait_for(lambda: sweep_drill.validations(sweep) or process.poll() is not None, "validation")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=sweep_drill.LIMIT_S)
    assert (process.returncode, err) == (130, "")
    before, _, after = out.partition("stopping: the trials end, the table follows; press Ctrl-C again")
    assert "0 (seed setting)" not in before and "0 (seed setting)" in after
    assert f"trials have not ended: python tune/search.py --resume {sweep}" in after
