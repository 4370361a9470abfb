"""Checkpoints are complete or absent, and training goes on from one bit by bit.

Run as a program (`python tests/test_checkpoint.py FOLDER`, once per rank) it is the two-rank half of the tests.
"""

import errno
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from safetensors.torch import save_file

from sft import checkpoint, engine
from sft.checkpoint import Progress
from sft.config import TrainConfig, UserError
from sft.finite import DivergedError
from sft.writer import Writer

HALF = toy.TOTAL_STEPS // 2
PROGRESS = Progress(epoch=1, num_epochs=2, step=HALF, best_dice=0.5, best_epoch=1, figures={"base_dice": 0.25})
ONE_RANK_CASES = [(1, False, "bf16"), (2, False, "bf16"), (2, False, "fp32"), (3, False, "bf16"), (2, True, "bf16")]
TWO_RANK_CASES = [(2, False, "bf16"), (2, False, "fp32"), (3, False, "bf16")]


def write_model(directory, trainable=None):
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(b"weights")


def save(directory, ds_engine, ranks, write_model=write_model, resumable=True):
    """A checkpoint that is on the disk afterwards."""
    with Writer(print) as writer:
        checkpoint.save({directory: resumable}, ds_engine, ranks, write_model, PROGRESS, writer)
        writer.wait()


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def everything(ds_engine):
    """Masters and AdamW's moments, counters, and compute copies."""
    return engine.training_tensors(ds_engine), engine.trainable_state(ds_engine)


def first_difference(one, other):
    """Path to the first value that is not equal bit by bit; None if there is none."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        found = (f"{key}: {what}" for key in one if (what := first_difference(one[key], other[key])))
        return next(found, None)
    equal = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return None if equal else f"{one} != {other}"


def difference_after_resume(ranks, folder, stage, offload, precision):
    """Trains 6 steps with a save after 3, then 3 from that save on an engine that started elsewhere."""
    settings = toy.config(folder, stage, offload, precision=precision)
    directory = folder / f"checkpoint_{stage}_{offload}_{precision}"
    uninterrupted = toy.build(settings, ranks, dropout=0.2)
    toy.train(uninterrupted, settings, ranks, range(HALF))
    save(directory, uninterrupted, ranks)
    losses = toy.train(uninterrupted, settings, ranks, range(HALF, toy.TOTAL_STEPS))
    expected = {"losses": losses, "draws": draws(), "state": dict(enumerate(everything(uninterrupted)))}
    resumed = toy.build(settings, ranks, other_start=True, dropout=0.2)
    assert checkpoint.load(directory, resumed, ranks) == PROGRESS
    losses = toy.train(resumed, settings, ranks, range(HALF, toy.TOTAL_STEPS))
    actual = {"losses": losses, "draws": draws(), "state": dict(enumerate(everything(resumed)))}
    return first_difference(expected, actual)


def half_run(ranks, folder, per_rank):
    """fp32, no dropout: saves after 3 steps as `folder`/half, and the state after 6 steps beside it."""
    settings = toy.config(folder, precision="fp32", batch_size=per_rank)
    ds_engine = toy.build(settings, ranks)
    toy.train(ds_engine, settings, ranks, range(HALF))
    save(folder / "half", ds_engine, ranks)
    toy.train(ds_engine, settings, ranks, range(HALF, toy.TOTAL_STEPS))
    save_state(ranks, ds_engine, folder / "end.pt")


def other_half(ranks, directory, folder, per_rank, stage):
    """The other three steps from a checkpoint that another number of ranks wrote."""
    settings = toy.config(folder, stage, precision="fp32", batch_size=per_rank)
    ds_engine = toy.build(settings, ranks, other_start=True)
    checkpoint.load(directory, ds_engine, ranks)
    toy.train(ds_engine, settings, ranks, range(HALF, toy.TOTAL_STEPS))
    save_state(ranks, ds_engine, folder / "resumed.pt")


def save_state(ranks, ds_engine, path):
    state = engine.training_tensors(ds_engine)
    if ranks.is_main:
        torch.save(state, path)


def two_ranks(folder):
    """What each of two ranks does; `one` holds a half run of one rank, `two` gets one of two ranks."""
    ranks = engine.start(TrainConfig(precision="fp32"))
    own = folder / f"rank{ranks.rank}"
    own.mkdir()
    found = {}
    for case in TWO_RANK_CASES:
        shared = folder / f"bitwise_{case[0]}_{case[2]}"
        shared.mkdir(exist_ok=True)
        found[str(case)] = difference_after_resume(ranks, shared, *case)
    half_run(ranks, folder / "two", per_rank=2)
    other_half(ranks, folder / "one" / "half", folder / "two", per_rank=2, stage=3)
    found["failed write"] = failed_write(ranks, folder / "two")
    (own / "found.json").write_text(json.dumps(found))
    engine.barrier()
    engine.shut_down()


def failed_write(ranks, folder):
    """The errors here when the main rank's disk is full: at the next save, and when the write is waited for."""

    def full_disk(directory, trainable):
        raise OSError(errno.ENOSPC, "No space left on device")

    ds_engine = toy.build(toy.config(folder, precision="fp32"), ranks)
    found = []
    with Writer(print) as writer:

        def start(write):
            checkpoint.save({folder / "half": True}, ds_engine, ranks, write, PROGRESS, writer)

        for told_by in (lambda: start(write_model), writer.wait):
            start(full_disk)
            with pytest.raises(UserError) as error:
                told_by()
            found.append(str(error.value))
    return found


@pytest.fixture(scope="module")
def pair(ranks, tmp_path_factory):
    """The folder in which two ranks have done their part, and what they printed."""
    if torch.cuda.device_count() == 1:
        pytest.skip("two ranks need two GPUs or none")
    folder = tmp_path_factory.mktemp("pair")
    (folder / "one").mkdir()
    (folder / "two").mkdir()
    half_run(ranks, folder / "one", per_rank=4)
    outputs = toy.run_ranks(__file__, str(folder))
    found = [json.loads((folder / f"rank{rank}" / "found.json").read_text()) for rank in range(2)]
    return folder, outputs, found


@pytest.fixture
def saved(ranks, tmp_path):
    """A run directory with checkpoint_best, and its engine."""
    run = tmp_path / "lora_sft_20250101_000000"
    run.mkdir()
    ds_engine = toy.build(toy.config(tmp_path), ranks)
    save(run / "checkpoint_best", ds_engine, ranks)
    return run, ds_engine


def fake(directory, epoch, step=None, num_epochs=3, holds="training_state.pt"):
    """A complete checkpoint without tensors."""
    directory.mkdir(parents=True)
    progress = {"epoch": epoch, "num_epochs": num_epochs, "step": step or epoch * 10}
    record = {"format": checkpoint.FORMAT, "progress": progress, "files": {holds: 1}}
    (directory / holds).write_text("a")
    (directory / "checkpoint.json").write_text(json.dumps(record))
    return directory


# Going on as if never stopped


@pytest.mark.parametrize(("stage", "offload", "precision"), ONE_RANK_CASES)
def test_one_rank_resumes_bit_by_bit(ranks, tmp_path, stage, offload, precision):
    assert difference_after_resume(ranks, tmp_path, stage, offload, precision) is None


@pytest.mark.parametrize("case", TWO_RANK_CASES, ids=str)
def test_two_ranks_resume_bit_by_bit(pair, case):
    assert [found[str(case)] for found in pair[2]] == [None, None]


def assert_same_state(path, other):
    one, two = (torch.load(p, weights_only=True) for p in (path, other))
    torch.testing.assert_close(one["parameters"], two["parameters"], rtol=1e-4, atol=1e-5)
    assert one["adam_step"] == two["adam_step"] == toy.TOTAL_STEPS
    assert one["schedule_step"] == two["schedule_step"]


def test_two_ranks_train_what_one_rank_trains(pair):
    assert_same_state(pair[0] / "one" / "end.pt", pair[0] / "two" / "end.pt")


def test_two_zero3_ranks_go_on_from_one_zero2_rank(pair):
    assert_same_state(pair[0] / "one" / "end.pt", pair[0] / "two" / "resumed.pt")


def test_one_rank_goes_on_from_two(ranks, pair, tmp_path):
    other_half(ranks, pair[0] / "two" / "half", tmp_path, per_rank=4, stage=2)
    assert_same_state(pair[0] / "two" / "end.pt", tmp_path / "resumed.pt")


def test_two_ranks_print_nothing(pair):
    assert pair[1] == ["", ""]


def test_a_full_disk_stops_every_rank_with_the_same_line(pair):
    first, second = (found["failed write"] for found in pair[2])
    assert first == second
    expected = (
        f"{pair[0]}/two/half: the checkpoint could not be written (OSError: [Errno 28] No space left on device); "
    )
    expected += "an earlier one is intact; free some space or set another output_dir, then resume"
    assert first == [expected, expected]
    assert checkpoint.read_progress(pair[0] / "two" / "half") == PROGRESS


def test_a_rank_beyond_the_saved_ones_draws_its_own_numbers(ranks, saved):
    run, ds_engine = saved
    numbers = []
    for rank in (0, 1, 2, 1):
        checkpoint.load(run / "checkpoint_best", ds_engine, engine.Ranks(rank, 0, 3, ranks.device))
        numbers.append(draws())
    assert len(set(numbers)) == 3
    assert numbers[1] == numbers[3]


# The files


def test_layout_and_plain_types(saved):
    run, ds_engine = saved
    names = {path.name for path in (run / "checkpoint_best").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "training_state.pt", "checkpoint.json"}
    assert [path.name for path in run.iterdir()] == ["checkpoint_best"]
    state = torch.load(run / "checkpoint_best" / "training_state.pt", weights_only=True)
    assert {name: tuple(p["master"].shape) for name, p in state["parameters"].items()} == engine.parameter_shapes(
        ds_engine
    )
    assert all(value.dtype == torch.float32 for p in state["parameters"].values() for value in p.values())
    assert checkpoint.read_progress(run / "checkpoint_best") == PROGRESS


def test_estimated_size_is_that_of_the_file():
    """Measured for a large count: 12 bytes per parameter, and the adapter."""
    assert checkpoint.checkpoint_bytes(10**9, adapter_bytes_per_parameter=2) == pytest.approx(14e9, rel=0.01)
    assert checkpoint.checkpoint_bytes(10**9, 2, resumable=False) == pytest.approx(2e9, rel=0.01)


def test_an_adapter_alone_is_complete_and_nothing_to_go_on_from(ranks, saved):
    run, ds_engine = saved
    best = run / "checkpoint_best"
    os.rename(best, run / "checkpoint_latest")
    save(best, ds_engine, ranks, resumable=False)
    names = {path.name for path in best.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "checkpoint.json"}
    checkpoint.check_complete(best)
    assert checkpoint.read_progress(best) == PROGRESS
    expected = (
        f"{best}: holds an adapter without training_state.pt, so training cannot go on from it; resumable ones beside "
        "it: checkpoint_latest"
    )
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        checkpoint.load(best, ds_engine, ranks)
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        checkpoint.find_resume(run.parent, str(best))


def test_missing_left_over_and_reshaped_parameters_are_listed(ranks, saved):
    run, ds_engine = saved
    path = run / "checkpoint_best" / "training_state.pt"
    state = torch.load(path, weights_only=True)
    state["parameters"]["stranger"] = state["parameters"].pop("head.bias")
    state["parameters"]["head.weight"]["master"] = torch.zeros(2, 2)
    torch.save(state, path)
    record = json.loads((path.parent / "checkpoint.json").read_text())
    record["files"]["training_state.pt"] = path.stat().st_size
    (path.parent / "checkpoint.json").write_text(json.dumps(record))
    before = everything(ds_engine)
    with pytest.raises(UserError) as error:
        checkpoint.load(path.parent, ds_engine, ranks)
    assert "missing 1: head.bias" in str(error.value)
    assert "not trained here 1: stranger" in str(error.value)
    assert "of another shape 1: head.weight (2, 2) instead of (3, 32)" in str(error.value)
    assert first_difference(dict(enumerate(before)), dict(enumerate(everything(ds_engine)))) is None


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda d: (d / "checkpoint.json").unlink(), "no checkpoint.json"),
        (lambda d: (d / "checkpoint.json").write_text("{"), "checkpoint.json is damaged"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda d: (d / "training_state.pt").write_bytes(b""), "training_state.pt has 0 bytes"),
        (shutil.rmtree, "no such directory"),
    ],
)
def test_a_damaged_checkpoint_is_named(ranks, saved, damage, named):
    run, ds_engine = saved
    damage(run / "checkpoint_best")
    with pytest.raises(UserError, match=named):
        checkpoint.load(run / "checkpoint_best", ds_engine, ranks)


def test_an_unreadable_state_of_the_right_size_is_named(ranks, saved):
    run, ds_engine = saved
    path = run / "checkpoint_best" / "training_state.pt"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(UserError, match=r"training_state.pt: cannot be read"):
        checkpoint.load(run / "checkpoint_best", ds_engine, ranks)


def test_weights_that_are_not_finite_are_not_saved(ranks, tmp_path):
    ds_engine = toy.build(toy.config(tmp_path), ranks)
    state = engine.training_tensors(ds_engine)
    state["parameters"]["head.bias"]["master"][1] = float("nan")
    engine.restore_training_tensors(ds_engine, state)
    for resumable in (True, False):
        with pytest.raises(DivergedError, match="not written"):
            save(tmp_path / "checkpoint_best", ds_engine, ranks, resumable=resumable)
    assert not (tmp_path / "checkpoint_best").exists()


def safetensors_says(directory, trainable):
    save_file({"a": torch.zeros(1)}, directory / "no such folder" / "adapter.safetensors")


def torch_says(directory, trainable):
    with open("/dev/full", "wb") as file:
        torch.save({"a": torch.zeros(2**20)}, file)


def test_the_reason_is_found_in_the_errors_of_the_libraries(ranks, saved, monkeypatch):
    """They wrap or reword what the operating system said."""
    run, ds_engine = saved
    monkeypatch.setattr(checkpoint, "USER_ERRNOS", (errno.ENOSPC, errno.ENOENT))
    for write in (safetensors_says, torch_says):
        with pytest.raises(UserError, match="could not be written .*; free some space or set another output_dir"):
            save(run / "checkpoint_best", ds_engine, ranks, write)
    monkeypatch.setattr(checkpoint, "USER_ERRNOS", ())
    with pytest.raises(RuntimeError, match="could not be written .*; an earlier one is intact$"):
        save(run / "checkpoint_best", ds_engine, ranks, torch_says)
    assert [path.name for path in run.iterdir()] == ["checkpoint_best"]
    checkpoint.check_complete(run / "checkpoint_best")


# A crash at any point


class Crash(BaseException):
    """Like a kill: no handler of ours may tidy up after it."""


def crash_points(monkeypatch, point):
    """Makes the `point`-th rename, removal or write to the disk from now on the last thing that happens."""
    calls = iter(range(1000))

    def until_crash(function):
        def counted(*arguments, **keywords):
            if next(calls) == point:
                raise Crash
            return function(*arguments, **keywords)

        return counted

    monkeypatch.setattr(checkpoint.os, "replace", until_crash(os.replace))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", until_crash(shutil.rmtree))
    monkeypatch.setattr(checkpoint, "_to_disk", until_crash(checkpoint._to_disk))
    monkeypatch.setattr(checkpoint.torch, "save", until_crash(lambda state, file: file.write(b"tensors")))


@pytest.mark.parametrize("existing", [True, False])
def test_a_crash_at_any_point_leaves_the_old_or_the_new(tmp_path, monkeypatch, existing):
    outcomes = []
    for point in range(20):
        run = tmp_path / f"run{point}"
        run.mkdir()
        target = run / "checkpoint_best"
        if existing:
            fake(target, epoch=1)
        with monkeypatch.context() as patch:
            crash_points(patch, point)
            try:
                checkpoint._write(target, {}, write_model, Progress(epoch=2, num_epochs=3, step=20))
                finished = True
            except Crash:
                finished = False
        checkpoint.clean_leftovers(run)
        assert {path.name for path in run.iterdir()} <= {"checkpoint_best"}
        outcomes.append(checkpoint.read_progress(target).epoch if target.exists() else None)
        if target.exists():
            checkpoint.check_complete(target)
        if finished:
            break
    assert finished and outcomes[-1] == 2
    assert outcomes == sorted(outcomes, key=[None, 1, 2].index), "first the old one, from some point on the new one"
    assert outcomes[0] == (1 if existing else None)


def test_a_crash_while_cleaning_up_after_a_crash_loses_nothing(tmp_path, monkeypatch):
    for point in range(20):
        run = tmp_path / f"run{point}"
        fake(run / "checkpoint_best.previous", epoch=1)
        fake(run / "checkpoint_best.partial", epoch=2)
        with monkeypatch.context() as patch:
            crash_points(patch, point)
            try:
                checkpoint.clean_leftovers(run)
                finished = True
            except Crash:
                finished = False
        checkpoint.clean_leftovers(run)
        assert [path.name for path in run.iterdir()] == ["checkpoint_best"]
        assert checkpoint.read_progress(run / "checkpoint_best").epoch == 2
        if finished:
            return
    raise AssertionError("the number of steps is bounded")


def test_cleaning_touches_nothing_but_checkpoints(tmp_path):
    kept = [tmp_path / "film.partial", tmp_path / "checkpoint_notes.partial"]
    for path in kept:
        path.write_text("mine")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "checkpoint_best.partial").mkdir()
    checkpoint.clean_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["other.partial", *(p.name for p in kept)])


# Finding where to go on


def test_auto_takes_the_newest_checkpoint_of_the_newest_unfinished_run(tmp_path):
    fake(tmp_path / "lora_sft_20250101_000000" / "checkpoint_epoch_1", 1)
    run = tmp_path / "lora_sft_20250102_000000"
    fake(run / "checkpoint_epoch_9", 9, num_epochs=12)
    fake(run / "checkpoint_epoch_10", 10, num_epochs=12)
    fake(run / "checkpoint_best", 8, num_epochs=12)
    (run / "checkpoint_epoch_11.partial").mkdir()
    fake(tmp_path / "lora_sft_20250103_000000" / "checkpoint_best", 3, num_epochs=3)
    (tmp_path / "lora_sft_20250104_000000").mkdir()
    assert checkpoint.find_resume(tmp_path, "auto") == run / "checkpoint_epoch_10"
    assert not (run / "checkpoint_epoch_11.partial").exists()


def test_auto_passes_over_an_adapter_alone(tmp_path):
    fake(tmp_path / "lora_sft_20250101_000000" / "checkpoint_latest", 1)
    fake(tmp_path / "lora_sft_20250101_000000" / "checkpoint_best", 2, holds="adapter_model.safetensors")
    fake(tmp_path / "lora_sft_20250102_000000" / "checkpoint_best", 2, holds="adapter_model.safetensors")
    found = checkpoint.find_resume(tmp_path, "auto")
    assert found == tmp_path / "lora_sft_20250101_000000" / "checkpoint_latest"


def test_auto_finds_a_checkpoint_that_a_crash_left_under_another_name(tmp_path):
    run = tmp_path / "lora_sft_20250101_000000"
    fake(run / "checkpoint_best.previous", 1)
    fake(run / "checkpoint_best.partial", 2)
    found = checkpoint.find_resume(tmp_path, "auto")
    assert found == run / "checkpoint_best"
    assert checkpoint.read_progress(found).epoch == 2


def test_auto_without_anything_to_resume_says_what_it_found(tmp_path):
    with pytest.raises(UserError, match="found: no run"):
        checkpoint.find_resume(tmp_path, "auto")
    fake(tmp_path / "lora_sft_20250101_000000" / "checkpoint_best", 3, num_epochs=3)
    (tmp_path / "lora_sft_20250102_000000").mkdir()
    with pytest.raises(UserError) as error:
        checkpoint.find_resume(tmp_path, "auto")
    assert "lora_sft_20250101_000000 (finished: epoch 3/3)" in str(error.value)
    assert "lora_sft_20250102_000000 (no complete checkpoint with training_state.pt)" in str(error.value)


def test_an_explicit_path_is_taken_or_its_neighbours_are_named(tmp_path):
    good = fake(tmp_path / "checkpoint_best", 1)
    assert checkpoint.find_resume(tmp_path, str(good)) == good
    with pytest.raises(UserError, match="checkpoint_epoch_3: no such directory.*checkpoint_best"):
        checkpoint.find_resume(tmp_path, str(tmp_path / "checkpoint_epoch_3"))
    with pytest.raises(UserError, match="nowhere.*no such directory"):
        checkpoint.find_resume(tmp_path, str(tmp_path / "nowhere" / "checkpoint_best"))


# The disk


def test_enough_space_and_permission_pass(tmp_path):
    checkpoint.check_disk(tmp_path / "new" / "folder", 1000, "3 checkpoints", "raise save_every")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_too_little_space_says_how_much(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 3 * 2**30))
    checkpoint.check_disk(tmp_path, 3 * 2**30, "3 checkpoints", "raise save_every")
    with pytest.raises(UserError) as error:
        checkpoint.check_disk(tmp_path, 4 * 2**30, "4 checkpoints", "raise save_every")
    assert str(error.value) == (
        f"{tmp_path}: 3.00 GiB free, but 4 checkpoints need 4.00 GiB; free some space, raise save_every or set another "
        "output_dir"
    )


def test_a_place_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        checkpoint.check_disk(tmp_path / "file" / "run", 1, "1 checkpoint", "")

    def refuse(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        checkpoint.check_disk(tmp_path, 1, "1 checkpoint", "")


if __name__ == "__main__":
    two_ranks(Path(sys.argv[1]))
