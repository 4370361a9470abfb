"""What of a sweep stays on the disk, and who may drive it."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import small_sweeps as small

from sft.config import TrainConfig, override, read_yaml
from sft.settings import UserError
from tune import keeping, trials
from tune.keeping import BEST, BEST_FILE, keep_best
from tune.space import Axis, Space

GIB = 2**30


@pytest.fixture
def folder(tmp_path):
    """A sweep: 0 finished, 1 stopped, 2 unfinished and the best so far, 3 failed before anything was saved."""
    for one in (
        small.trial(0, [0.5, 0.6]), small.trial(1, [0.4], "stopped"), small.trial(2, [0.9], "unfinished"),
        small.trial(3, status="failed"),
    ):  # fmt: skip
        place = small.put(tmp_path, one)
        if one.rows:
            run = place / "lora_sft_20261125_210000"
            for name in ("checkpoint_latest", "checkpoint_best", "checkpoint_latest.previous"):
                (run / name).mkdir(parents=True)
            (run / "checkpoint_best" / "adapter.txt").write_text(f"of trial {one.number}")
            for name in keeping.BEST_FILES:
                (run / name).write_text(f'"of trial {one.number}"')
    return tmp_path


def checkpoints(folder) -> list[int]:
    """Numbers of the trials that have some."""
    return sorted({int(path.parts[-3]) for path in folder.glob("trials/*/*/checkpoint_*")})


def best_of(folder) -> str:
    return (folder / BEST / "adapter.txt").read_text()


# Who drives it


def test_a_sweep_is_driven_by_one_process_at_a_time(tmp_path):
    held = keeping.lock(tmp_path)
    code = f"from pathlib import Path; from tune import keeping; keeping.lock(Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "another process is running this sweep; wait for it, or end it" in done.stderr
    os.close(held)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # its end frees it
    os.close(keeping.lock(tmp_path))


def test_a_folder_that_cannot_be_locked_is_told(tmp_path):
    with pytest.raises(UserError, match=r"sweep.lock: No such file"):
        keeping.lock(tmp_path / "nowhere")


# The best adapter


def test_the_best_adapter_is_kept_and_what_losers_leave_is_deleted(folder):
    keep_best(folder, trials.read_all(folder), live=[2])
    assert best_of(folder) == "of trial 0"  # trial 2 may be writing
    assert (folder / BEST / trials.TRIAL_FILE).exists()
    assert [(folder / name).read_text() for name in keeping.BEST_FILES] == ['"of trial 0"'] * 2
    assert checkpoints(folder) == [2]
    assert (folder / "trials" / "000" / "lora_sft_20261125_210000" / "config.json").exists()


def test_a_trial_that_waits_to_go_on_keeps_its_checkpoint_and_may_be_the_best(folder):
    keep_best(folder, trials.read_all(folder), live=[])
    assert best_of(folder) == "of trial 2" and checkpoints(folder) == [2]


def test_a_better_one_takes_its_place_and_a_worse_one_does_not(folder):
    keep_best(folder, trials.read_all(folder), live=[1, 2])
    assert checkpoints(folder) == [1, 2]
    keep_best(folder, trials.read_all(folder), live=[2])
    assert best_of(folder) == "of trial 0"
    trials.write_outcome(trials.folder_of(folder, 2), "finished")
    (folder / f"{BEST}.partial").mkdir()  # of a copy that was cut off
    keep_best(folder, trials.read_all(folder), live=[])
    assert best_of(folder) == "of trial 2" and checkpoints(folder) == []
    keep_best(folder, trials.read_all(folder), live=[])  # its own is gone by now
    assert best_of(folder) == "of trial 2"
    assert not list(folder.glob("*.partial"))


def test_a_copy_that_fails_leaves_the_former_whole(folder, monkeypatch):
    keep_best(folder, trials.read_all(folder), live=[1, 2])
    trials.write_outcome(trials.folder_of(folder, 2), "finished")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space"):
            keep_best(folder, trials.read_all(folder), live=[1])
    assert best_of(folder) == "of trial 0" and 2 in checkpoints(folder)


def test_on_a_full_disk_what_losers_leave_is_deleted_before_the_best_is_copied(folder, monkeypatch):
    trials.write_outcome(trials.folder_of(folder, 2), "finished")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(OSError, match="No space"):
        keep_best(folder, trials.read_all(folder), live=[])
    assert checkpoints(folder) == [2]


# Its settings


def test_best_yaml_is_the_best_trials_settings_for_train(folder):
    base = TrainConfig(num_epochs=9, feature_cache="disk", gpu="3", question="Vessels?")
    sweep, found = small.sweep(base=base), trials.read_all(folder)
    found[0] = trials.Trial(
        0, "random", {}, {"lora_rank": 8, "train_modules": ("mask_decoder",)}, found[0].rows, "finished"
    )
    keeping.write_best(folder, sweep, found, live=[2])
    text = (folder / BEST_FILE).read_text()
    assert text.startswith("# Trial 0 of sweep_1: validation Dice 0.6000, 2 epochs\n")
    wanted = {"lora_rank": 8, "train_modules": "mask_decoder", "feature_cache": "auto", "gpu": None}
    assert TrainConfig(**read_yaml(folder / BEST_FILE)) == override(base, wanted)
    keeping.write_best(folder, sweep, found, live=[])
    assert (folder / BEST_FILE).read_text().startswith("# Trial 2 ")


def test_without_a_dice_there_is_no_best(tmp_path):
    small.put(tmp_path, small.trial(0, status="failed"))
    keep_best(tmp_path, trials.read_all(tmp_path), [])
    keeping.write_best(tmp_path, small.sweep(), trials.read_all(tmp_path), [])
    assert not (tmp_path / BEST).exists() and not (tmp_path / BEST_FILE).exists()


# Room


def test_too_little_room_is_told_before_the_first_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=11 * GIB))
    keeping.check_disk(tmp_path, 2 * GIB, concurrent=2)  # 2 * (2.2 * 2 + 1) = 10.8
    with pytest.raises(UserError) as caught:
        keeping.check_disk(tmp_path, 2 * GIB, concurrent=3)
    assert "11.00 GiB free, but checkpoints of 2.00 GiB of 3 trials at a time need 15.20 GiB" in str(caught.value)
    assert "--max_concurrent or set another --storage_path" in str(caught.value)
    with pytest.raises(UserError) as caught:
        keeping.check_disk(tmp_path, 2 * GIB, concurrent=2, waiting=1)
    told = "of 2 trials at a time, and of up to 1 that wait at ASHA's rungs, need 13.20 GiB"
    assert told in str(caught.value) and "--max_concurrent or --num_trials or set" in str(caught.value)


def test_the_highest_rank_is_that_of_space_seed_setting_and_points():
    power = Axis("power", "randint", (2, 5))
    for space, points, wanted in (
        (small.SPACE, (), 64),
        (small.SPACE, ({"lora_rank": 128}, {"learning_rate": 1e-3}), 128),
        (Space((Axis("lora_rank", "choice", (256, 8)),), {}), (), 256),
        (Space((Axis("lora_rank", "randint", (4, 100)),), {}), (), 100),
        (Space((power,), {"lora_rank": "3 * 2 ** power"}), (), 96),
        (Space((small.RATE,), {}), (), 64),
    ):
        assert keeping.highest_rank(TrainConfig(lora_rank=64), space, points) == wanted
