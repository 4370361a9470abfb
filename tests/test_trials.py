"""A sweep's trials as files: what is written is read back, and what a kill cut off costs no more than itself."""

import json
import os

import pytest
import small_sweeps as small

from sft.config import TrainConfig, override
from sft.settings import UserError
from tune import keeping, results, trials
from tune.trials import OUTCOME_FILE, ROWS_FILE, SEED_SETTING, TRIAL_FILE, Trial, best_of


@pytest.fixture
def folder(tmp_path):
    """The folder of a trial that has begun."""
    return trials.create(
        tmp_path, Trial(7, "random", {"lora_rank": 8}, {"lora_rank": 8, "train_modules": ("mask_decoder",)})
    )


def row(epoch: int, dice: float = 0.5, device_s: float = 1.0) -> dict:
    return {"epoch": epoch, "dice": dice, "dice_so_far": dice, "device_s": device_s}


def test_a_trial_is_read_as_it_was_written(tmp_path, folder):
    assert folder == tmp_path / "trials" / "007"
    found = trials.read(folder)
    assert found == Trial(7, "random", {"lora_rank": 8}, {"lora_rank": 8, "train_modules": ("mask_decoder",)})
    assert (found.epoch, found.dice_so_far, found.device_s, found.status) == (0, None, 0.0, "unfinished")
    for one in (row(1, 0.4, 10.0), row(2, 0.6, 20.0)):
        trials.append_row(folder, one)
    trials.write_outcome(folder, "stopped", "at epoch\n2 not among  the best")
    found = trials.read(folder)
    assert (found.epoch, found.dice_so_far, found.device_s) == (2, 0.6, 20.0)
    assert (found.status, found.reason) == ("stopped", "at epoch 2 not among the best")
    assert override(TrainConfig(), found.settings).train_modules == ("mask_decoder",)


def test_what_is_there_is_not_written_again(tmp_path, folder):
    trials.create(tmp_path, Trial(7, "optuna", {}, {}))
    assert trials.read(folder).origin == "random"


def test_device_time_is_the_larger_of_validations_and_outcome(folder):
    trials.write_outcome(folder, "failed", "out of memory", 12.5)
    assert trials.read(folder).device_s == 12.5  # it failed before its first validation
    trials.append_row(folder, row(1, device_s=10.0))
    assert trials.read(folder).device_s == 12.5
    trials.append_row(folder, row(2, device_s=20.0))
    assert trials.read(folder).device_s == 20.0
    trials.write_outcome(folder, "finished")
    assert json.loads((folder / OUTCOME_FILE).read_text()) == {"status": "finished", "reason": ""}
    assert trials.read(folder).device_s == 20.0


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_was_cut_off_is_none_and_spoils_no_other(folder, cut):
    trials.append_row(folder, row(1, 0.4))
    whole = json.dumps(row(2, 0.5))
    with (folder / ROWS_FILE).open("a") as file:
        file.write(whole[:-cut])
    assert [one["epoch"] for one in trials.read(folder).rows] == [1]
    trials.append_row(folder, row(2, 0.6))
    assert [(one["epoch"], one["dice"]) for one in trials.read(folder).rows] == [(1, 0.4), (2, 0.6)]


def test_of_an_epoch_told_twice_the_later_counts_and_rows_ascend(folder):
    for one in (row(1, 0.1), row(2, 0.2), row(3, 0.3), row(2, 0.9)):
        trials.append_row(folder, one)
    assert [(one["epoch"], one["dice"]) for one in trials.read(folder).rows] == [(1, 0.1), (2, 0.9), (3, 0.3)]


def test_a_row_is_on_the_disk_before_anyone_is_told(folder, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    trials.append_row(folder, row(1))
    assert synced == [(folder / ROWS_FILE).stat().st_size] != [0]


def test_trials_are_in_order_of_number_and_other_folders_are_none(tmp_path):
    for number in (1000, 2, 999, 10):
        small.put(tmp_path, small.trial(number))
    (tmp_path / "trials" / "011").mkdir()  # killed before its trial.json was written
    (tmp_path / "trials" / "notes.txt").write_text("mine")
    assert [trial.number for trial in trials.read_all(tmp_path)] == [2, 10, 999, 1000]
    assert trials.read_all(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (TRIAL_FILE, '{"number": 7'),
        (TRIAL_FILE, '{"number": 7}'),
        (TRIAL_FILE, "[]"),
        (OUTCOME_FILE, ""),
        (OUTCOME_FILE, '"finished"'),
        (ROWS_FILE, '{"dice": 1}\n'),
        (ROWS_FILE, "7\n"),
    ],
)
def test_a_damaged_file_is_named(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(UserError, match="007"):
        trials.read(folder)


def test_json_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    trials.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        trials.write_json(file, {"a": object()})
    assert trials.read_json(file) == {"a": 1}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        trials.write_json(file, {"a": 2})
    assert trials.read_json(file) == {"a": 1}


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    file, calls, replace = tmp_path / "a", [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(os.fstat(descriptor).st_size))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replaced") or replace(*paths))
    trials.write_whole(file, b"\x89content")
    assert calls == [8, "replaced"] and file.read_bytes() == b"\x89content"
    assert list(tmp_path.iterdir()) == [file]


def test_what_could_not_be_written_takes_no_room(tmp_path, monkeypatch):
    file = tmp_path / "a"
    trials.write_whole(file, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        trials.write_whole(file, b"new")
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == b"old"


@pytest.mark.parametrize("write", [keeping.write_best, lambda *given: results.write(*given[:3])])
def test_what_is_written_whole_is_written_in_one_way(tmp_path, monkeypatch, write):
    written = []
    monkeypatch.setattr(os, "replace", lambda source, target: pytest.fail("beside it"))
    for place in (trials, results):
        monkeypatch.setattr(place, "write_whole", lambda file, content: written.append(file.name))
    write(tmp_path, small.sweep(), [small.trial(0, [0.5])], [])
    assert written and all(name.endswith((".yaml", ".csv", ".png", ".html")) for name in written)


def test_the_best_is_the_earliest_of_the_highest_and_no_repeat():
    found = [small.trial(0, [0.5]), small.trial(1), small.trial(2, [0.7, 0.6]), small.trial(3, [0.7], "failed")]
    assert best_of([*found, small.repeat(4, of=2, seed=43, dices=[0.9])]).number == 2
    assert best_of([small.trial(1), small.repeat(2, of=1, seed=43)]) is None


def test_settings_that_contradict_each_other_are_told():
    settings = {"lora_scope": ["mask_decoder"], "train_modules": ["mask_decoder"]}
    with pytest.raises(UserError, match="lora_scope and train_modules both name mask_decoder"):
        override(TrainConfig(), settings)


def test_a_sweep_is_read_as_it_was_written(tmp_path):
    sweep = small.sweep(points=[{"lora_rank": 8}])
    trials.write_sweep(tmp_path, sweep)
    found = trials.read_sweep(tmp_path)
    assert found.num_epochs == 9 and found.points == [{"lora_rank": 8}]
    assert json.loads(json.dumps(vars(sweep))) == json.loads(json.dumps(vars(found)))
    assert TrainConfig(**found.base) == TrainConfig(num_epochs=9)


def test_the_seed_setting_is_no_repeat():
    assert not Trial(0, SEED_SETTING, {}, {}).is_repeat and small.repeat(3, of=0, seed=43).is_repeat
