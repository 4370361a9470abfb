"""One trial where it runs, in this process: what is noted before anyone is told, what a second attempt goes on from."""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.train
import ray.tune
import small_runs
import small_sweeps as small
import torch
from ray.train import collective

from sft import checkpoint, losses
from sft.config import TrainConfig
from sft.feature_store.place import free_gpu_bytes
from sft.settings import DiskError, UserError
from sft.train import prepare
from tune import trial_run, trials
from tune.trial_run import CRASH_FILE, SPLIT_FILE, run_trial, train_trial
from tune.trials import OUTCOME_FILE, ROWS_FILE, Trial

pytestmark = pytest.mark.usefixtures("ranks")
EPOCHS = 4
CPUS = 1
GIB = 2**30
TIMES = {"device_s", "start_s", "time"}
SPARSE = {"validate_every": 2, "num_epochs": EPOCHS}


class ProcessEnds(BaseException):
    """In place of the end that Ray makes of a trial's process."""


class Ray:
    """What a trial reports to; ends its process at an epoch."""

    def __init__(self, folder: Path, ends_at: int | None = None):
        self._folder, self._ends_at = folder, ends_at
        self.told: list[int] = []

    def __call__(self, result: dict) -> None:
        noted = trials.read(self._folder)
        assert result == {"epoch": noted.epoch, "dice_so_far": noted.dice_so_far, "number": noted.number}
        assert (noted.status == "finished") is (result["epoch"] == EPOCHS)
        (run,) = self._folder.glob(checkpoint.RUN_PATTERN)
        assert checkpoint.read_progress(checkpoint.newest(run)).epoch == result["epoch"]
        self.told.append(result["epoch"])
        if result["epoch"] == self._ends_at:
            raise ProcessEnds


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, ranks) -> Path:
    """The folder of a sweep, with its split."""
    place = tmp_path_factory.mktemp("sweep")
    inputs = small_runs.write_inputs(tmp_path_factory.mktemp("inputs"))
    base = small_runs.settings(inputs, place, num_epochs=EPOCHS, lora_dropout=0.1, save_every=3, gpu="7")
    trials.write_sweep(place, small.sweep(base=base))
    trials.write_json(place / SPLIT_FILE, prepare(small_runs.settings(inputs, place, lora_rank=8)).split)
    return place


@pytest.fixture(scope="module")
def whole(sweep) -> Trial:
    """A trial that nothing interrupted."""
    ray = begin(sweep, 0)
    train_trial(sweep, 0, CPUS, ray)
    assert ray.told == [1, 2, 3, 4]
    return trials.read(trials.folder_of(sweep, 0))


def begin(sweep: Path, number: int, ends_at: int | None = None, **settings) -> Ray:
    """A new trial, and what it will report to."""
    return Ray(trials.create(sweep, Trial(number, "random", {}, {"lora_rank": 2} | settings)), ends_at)


def figures(trial: Trial) -> list[dict]:
    """Its validations without what is time."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in trial.rows]


def log_of(folder: Path) -> str:
    (run,) = folder.glob(checkpoint.RUN_PATTERN)
    return (run / "training.log").read_text()


def fail(*_) -> None:
    pytest.fail("trained")


# A trial from its beginning to its end


def test_a_trial_notes_every_validation_and_its_end(sweep, whole):
    assert (whole.status, whole.reason, whole.epoch) == ("finished", "", EPOCHS)
    (run,) = trials.folder_of(sweep, 0).glob(checkpoint.RUN_PATTERN)
    told = [row for row in small_runs.rows(run, "val") if row["epoch"]]
    assert [row["dice"] for row in whole.rows] == [row["dice"] for row in told]
    assert [row["dice_so_far"] for row in whole.rows] == [max(row["dice"] for row in told[:end]) for end in range(1, 5)]
    assert {"dice_best", "threshold_best", "iou", "recall", "precision", "seg_rate"} < whole.rows[0].keys()
    times = [row["device_s"] for row in whole.rows]
    assert 0 < whole.rows[0]["start_s"] < times[0] and times == sorted(times) and whole.device_s == times[-1]


def test_a_trial_has_its_settings_in_its_folder_and_the_split_of_the_sweep(sweep, whole):
    (run,) = trials.folder_of(sweep, 0).glob(checkpoint.RUN_PATTERN)
    record = json.loads((run / "config.json").read_text())
    assert (record["lora_rank"], record["lora_alpha"], record["gpu"], record["keep"]) == (2, 8, None, "latest")
    assert json.loads((run / "split.json").read_text()) == json.loads((sweep / SPLIT_FILE).read_text())
    assert {path.name for path in run.glob("checkpoint_*")} == {checkpoint.BEST, checkpoint.LATEST}


def test_a_trial_saves_at_every_validation(tmp_path):
    sweep = small.sweep(base=small_runs.settings(tmp_path, tmp_path, **SPARSE, include="localhost:1"))
    config = trial_run.settings_of(sweep, small.trial(3, settings={"lora_rank": 2}), tmp_path, None)
    assert (config.save_every, config.keep, config.resume, config.include) == (2, "latest", None, None)
    assert (config.lora_rank, config.output_dir) == (2, str(tmp_path))


# A second attempt


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_second_attempt_goes_on_from_the_epoch_of_the_first(sweep, whole, epoch):
    number = 10 + epoch
    ray = begin(sweep, number, ends_at=epoch)
    folder = trials.folder_of(sweep, number)
    with pytest.raises(ProcessEnds):
        train_trial(sweep, number, CPUS, ray)
    first = trials.read(folder)
    assert (first.status, first.epoch) == ("unfinished", epoch) and not (folder / CRASH_FILE).exists()
    ray = Ray(folder)
    train_trial(sweep, number, CPUS, ray)
    assert ray.told == list(range(epoch + 1, EPOCHS + 1))
    second = trials.read(folder)
    assert second.status == "finished" and figures(second) == figures(whole)
    assert f"Resumed after epoch {epoch} " in log_of(folder)
    assert second.rows[:epoch] == first.rows
    assert second.rows[epoch]["device_s"] > first.device_s + second.rows[epoch]["start_s"]  # the attempts are summed


@pytest.mark.parametrize("kept", [0, 1])
def test_validations_that_a_kill_kept_from_the_folder_are_caught_up(sweep, whole, kept):
    number = 20 + kept
    ray = begin(sweep, number, ends_at=2)
    folder = trials.folder_of(sweep, number)
    with pytest.raises(ProcessEnds):
        train_trial(sweep, number, CPUS, ray)
    lines = (folder / ROWS_FILE).read_text().splitlines()
    (folder / ROWS_FILE).write_text("".join(f"{line}\n" for line in lines[:kept]) + lines[kept][:9])
    ray = Ray(folder)
    train_trial(sweep, number, CPUS, ray)
    assert ray.told == [3, 4]
    found = trials.read(folder)
    assert figures(found) == figures(whole)
    assert [json.loads(line)["epoch"] for line in (folder / ROWS_FILE).read_text().splitlines() if line[-1] == "}"] == (
        [1, 2, 3, 4]
    )


@pytest.mark.parametrize("kept", [3, 4])
def test_a_trial_that_was_killed_at_its_very_end_is_not_trained_again(sweep, whole, kept, monkeypatch):
    folder = trials.folder_of(sweep, 0)
    before = (folder / ROWS_FILE).read_text()
    (folder / ROWS_FILE).write_text("".join(before.splitlines(keepends=True)[:kept]))
    (folder / OUTCOME_FILE).unlink()
    monkeypatch.setattr(trial_run, "_train", fail)
    ray = Ray(folder)
    train_trial(sweep, 0, CPUS, ray)
    assert ray.told == [EPOCHS] and figures(trials.read(folder)) == figures(whole)
    assert trials.read(folder).status == "finished"


# Failures


def test_settings_that_contradict_each_other_fail_with_their_reason(sweep):
    ray = begin(sweep, 30, lora_scope=["mask_decoder"], train_modules=["mask_decoder"])
    train_trial(sweep, 30, CPUS, ray)
    found = trials.read(trials.folder_of(sweep, 30))
    assert (found.status, ray.told, found.rows) == ("failed", [], ())
    assert found.reason == "lora_scope and train_modules both name mask_decoder; keep it in one of them"
    assert found.device_s > 0


def test_a_mistake_that_training_finds_fails_with_its_reason(sweep):
    ray = begin(sweep, 31, lora_target_modules=["no_such_layer"])
    train_trial(sweep, 31, CPUS, ray)
    found = trials.read(trials.folder_of(sweep, 31))
    assert found.status == "failed" and "no_such_layer" in found.reason and ray.told == []


def test_a_loss_that_is_no_number_fails_after_the_validations_before_it(sweep, whole, monkeypatch):
    calls, combo = [], losses.combo

    def nan_later(*arguments):
        terms = combo(*arguments)
        if arguments[0].requires_grad:  # of a training step
            calls.append(1)
        return terms | {"total": terms["total"] * math.nan} if len(calls) > steps else terms

    (run,) = trials.folder_of(sweep, 0).glob(checkpoint.RUN_PATTERN)
    steps = small_runs.rows(run, "train")[0]["step"] * 2  # a batch has images of two sizes
    monkeypatch.setattr(losses, "combo", nan_later)
    ray = begin(sweep, 32)
    train_trial(sweep, 32, CPUS, ray)
    found = trials.read(trials.folder_of(sweep, 32))
    assert found.status == "failed" and "is not finite" in found.reason
    assert ray.told == list(range(1, found.epoch + 1)) and 0 < found.epoch < EPOCHS
    assert figures(found) == figures(whole)[: found.epoch]
    assert found.device_s > found.rows[-1]["device_s"]


def test_what_nobody_expected_is_written_down_and_raised(sweep, monkeypatch):
    def crash(*_):
        raise RuntimeError("a worm in the disk")

    monkeypatch.setattr(trial_run, "_train", crash)
    ray = begin(sweep, 33)
    folder = trials.folder_of(sweep, 33)
    for attempt in (1, 2):
        with pytest.raises(RuntimeError, match="worm"):
            train_trial(sweep, 33, CPUS, ray)
        text = (folder / CRASH_FILE).read_text()
        assert text.count("Traceback") == attempt and text.endswith("RuntimeError: a worm in the disk\n")
    assert trials.read(folder).status == "unfinished" and ray.told == []  # Ray tries again


# Ranks, GPUs, ports


def test_of_several_ranks_one_writes_and_all_tell(sweep, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    rows = [{"epoch": epoch, "dice": dice, "dice_best": 1.0} for epoch, dice in enumerate([0.9, 0.2, 0.4, 0.3, 0.1])]
    monkeypatch.setattr(trial_run, "_train", lambda config, cpus, split, told: list(map(told, rows)))
    told = []
    begin(sweep, 40)
    train_trial(sweep, 40, CPUS, told.append, lambda told: {"resume": None})
    folder = trials.folder_of(sweep, 40)
    assert [path.name for path in folder.iterdir()] == [trials.TRIAL_FILE]
    # The base's Dice, of epoch 0, is none of the trial's.
    assert [(row["epoch"], row["dice_so_far"]) for row in told] == [(1, 0.2), (2, 0.4), (3, 0.4), (4, 0.4)]

    def mistaken(*_):
        raise UserError("rank 0 tells it")

    monkeypatch.setattr(trial_run, "_train", mistaken)
    train_trial(sweep, 40, CPUS, told.append, lambda told: {"resume": None})
    assert not (folder / OUTCOME_FILE).exists()


@pytest.fixture
def rank_1(sweep, monkeypatch):
    """Starts rank 1 of a new trial of which rank 0 says `told`; gives the settings it trained with, and its reports."""
    monkeypatch.setenv("RANK", "1")
    configs, reports = [], []
    monkeypatch.setattr(trial_run, "_train", lambda config, *_: configs.append(config))

    def start(number: int, told: dict | None, meanwhile=lambda folder: None):
        begin(sweep, number)

        def share(mine):
            assert mine is None
            meanwhile(trials.folder_of(sweep, number))
            return told

        train_trial(sweep, number, CPUS, reports.append, share)
        return configs, reports

    return start


def test_other_ranks_look_at_the_trial_after_rank_0_has_waited_for_it(rank_1):
    """A process whose driver was killed may train on until then."""

    def orphan(folder):
        for row in small.rows([0.5] * EPOCHS):
            trials.append_row(folder, row)

    configs, reports = rank_1(41, {"resume": None}, orphan)
    assert configs == [] and [row["epoch"] for row in reports] == [EPOCHS]


def test_other_ranks_go_on_from_the_checkpoint_that_rank_0_tells(rank_1, tmp_path):
    rows = lambda folder: trials.append_row(folder, small.rows([0.5])[0])  # noqa: E731
    (config,), reports = rank_1(42, {"resume": str(tmp_path)}, rows)
    assert config.resume == str(tmp_path)
    assert [row["epoch"] for row in reports] == [1]


def test_other_ranks_end_where_rank_0_could_not_start(rank_1, sweep):
    assert rank_1(43, None) == ([], [])
    assert [path.name for path in trials.folder_of(sweep, 43).iterdir()] == [trials.TRIAL_FILE]


def test_rank_0_tells_the_others_where_the_trial_stands_once_it_has_it(sweep, whole, monkeypatch):
    folder = trials.folder_of(sweep, 0)
    before = (folder / ROWS_FILE).read_text()
    (folder / ROWS_FILE).write_text("".join(before.splitlines(keepends=True)[:3]))
    (folder / OUTCOME_FILE).unlink()
    monkeypatch.setattr(trial_run, "_train", fail)
    shared = []

    def share(told):
        code = f"import fcntl; fcntl.flock(open({str(folder / trials.LOCK_FILE)!r}), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        held = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        shared.append((told, "BlockingIOError" in held.stderr, trials.read(folder).epoch))
        return told

    train_trial(sweep, 0, CPUS, lambda row: None, share)
    (run,) = folder.glob(checkpoint.RUN_PATTERN)
    assert shared == [({"resume": str(checkpoint.newest(run))}, True, EPOCHS)]


@pytest.mark.parametrize("error", [RuntimeError("another process still runs this trial"), UserError("changed")])
def test_rank_0_tells_the_others_that_it_could_not_start(sweep, monkeypatch, error):
    def refuse(_):
        raise error

    monkeypatch.setattr(trial_run, "_caught_up", refuse)
    number, shared = (44 if isinstance(error, RuntimeError) else 45), []
    begin(sweep, number)
    with pytest.raises(RuntimeError) if number == 44 else contextlib.nullcontext():
        train_trial(sweep, number, CPUS, fail, shared.append)
    found = trials.read(trials.folder_of(sweep, number))
    assert shared == [None] and (found.status, found.reason) == (
        ("unfinished", "") if number == 44 else ("failed", "changed")
    )


def test_ranks_of_a_trial_share_through_ray_and_rank_0_notes_what_they_hold(tmp_path, monkeypatch):
    called, held = [], SimpleNamespace(id=ray.PlacementGroupID.from_random())
    monkeypatch.setattr(trial_run, "train_trial", lambda *arguments: called.append(arguments))
    monkeypatch.setattr(ray.util, "get_current_placement_group", lambda: held)
    place = {"sweep": str(tmp_path), "number": 3, "ranks": 2, "needs": {"CPU": 5, "GPU": 1}}
    file = trials.create(tmp_path, small.trial(3)) / trial_run.RANKS_FILE
    for rank in (1, 0):
        monkeypatch.setattr(ray.train, "get_context", lambda rank=rank: SimpleNamespace(get_world_rank=lambda: rank))
        assert not file.exists()
        trial_run._rank_of_trial(place)
    assert called == 2 * [(str(tmp_path), 3, 5, ray.train.report, collective.broadcast_from_rank_zero)]
    removed = []
    monkeypatch.setattr(sys.modules["ray.util.placement_group"], "remove_placement_group", removed.append)
    trial_run.free_ranks(file.parent)
    assert [group.id for group in removed] == [held.id] and not file.exists()
    trial_run.free_ranks(file.parent)
    assert len(removed) == 1


@pytest.mark.parametrize("is_warm", [False, True])
def test_a_trial_of_one_rank_is_forked_and_counts_from_when_it_got_its_devices(monkeypatch, is_warm):
    """The first one has them while Ray's process starts; the next ones from their own start on."""
    ran, now = [], time.time()
    monkeypatch.setattr(
        trial_run, "_forks", SimpleNamespace(is_warm=is_warm, run=lambda *arguments: ran.append(arguments))
    )
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    forks = {"there": "far", "here": "near"}
    run_trial({"sweep": "/a", "number": 3, "ranks": 1, "needs": {"CPU": 4, "GPU": 0}, "forks": forks})
    ((place, report, source),) = ran
    assert (
        report is ray.tune.report
        and source == "near"
        and place.items() >= {"sweep": "/a", "number": 3, "cpus": 4}.items()
    )
    assert (place["began"] >= now) is is_warm and place["began"] >= trial_run.start_of_process()


@pytest.mark.parametrize(("num_workers", "cpus", "readers"), [("auto", 5, 5), ("auto", 48, 16), (0, 5, 0), (9, 5, 9)])
def test_a_trial_reads_with_its_own_cpus_unless_a_number_is_given(monkeypatch, num_workers, cpus, readers):
    """Otherwise each of the trials on a machine would take all of it."""
    trained = []
    monkeypatch.setattr("sft.train.train", lambda config, *_: trained.append(config.num_workers))
    trial_run._train(TrainConfig(num_workers=num_workers), cpus, Path(SPLIT_FILE), fail)
    assert trained == [readers]


@pytest.mark.parametrize(
    ("gpus", "asked"), [(0.25, [0.125]), (0.5, [0.375]), (0.01, [0.005]), (1.0, []), (2.0, []), (0.0, [])]
)
def test_a_trial_takes_its_share_of_a_gpus_memory_before_it_trains(sweep, tmp_path, monkeypatch, gpus, asked):
    shares = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    # Of a GPU of which CUDA takes an eighth in each process; of a share too small for that, half is left.
    total = SimpleNamespace(total_memory=8 * trial_run.CONTEXT_BYTES)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)

    def stop(*_):
        shares.append("training")
        raise UserError("enough")

    monkeypatch.setattr(trial_run, "_train", stop)
    trials.write_sweep(tmp_path, small.sweep(gpus_per_trial=gpus))
    train_trial(tmp_path, 0, CPUS, begin(tmp_path, 0))
    assert shares == [*asked, "training"]


@pytest.mark.parametrize(
    ("share", "free_gib", "wanted_gib"),
    [(1.0, 60, 60 + 10 - 6), (0.25, 60, 20 - 6), (0.5, 5, 5 + 10 - 6)],  # alone; its share; what others left
)
def test_free_memory_is_that_of_the_share(monkeypatch, share, free_gib, wanted_gib):
    for name, value in {
        "mem_get_info": (free_gib * GIB, 80 * GIB),
        "memory_reserved": 10 * GIB,
        "memory_allocated": 6 * GIB,
        "get_per_process_memory_fraction": share,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_gpu_bytes(torch.device("cuda")) == wanted_gib * GIB


def test_two_trials_at_once_never_get_the_same_port():
    code = (
        "import os, sys; from sft.ranks import ensure_rank, reserve_port; ensure_rank(); "
        "print(os.environ['MASTER_PORT'], *(reserve_port() for _ in range(200)), flush=True); sys.stdin.read()"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "RANK", "WORLD_"))}
    options = {"env": clean, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], **options) for _ in range(2)]
    ports = [process.stdout.readline().split() for process in both]  # both still hold theirs
    for process in both:
        process.communicate()
        assert process.returncode == 0
    assert [len(found) for found in ports] == [201, 201] and len(set(ports[0] + ports[1])) == 402


def test_a_trial_waits_for_one_whose_driver_was_killed_and_gives_up_in_the_end(tmp_path, monkeypatch):
    folder, waited = trials.create(tmp_path, Trial(0, "random", {}, {})), []
    with trials.alone(folder):
        clock = iter(range(0, 1000, 50))
        monkeypatch.setattr(trials.time, "monotonic", lambda: next(clock))
        monkeypatch.setattr(trials.time, "sleep", waited.append)
        with pytest.raises(RuntimeError, match="another process still runs this trial"), trials.alone(folder):
            raise AssertionError("two processes would write the same files")
        assert len(waited) == 2
    with trials.alone(folder):
        pass


def test_a_trial_without_room_for_its_checkpoint_has_not_failed(sweep, tmp_path, monkeypatch):
    def full(*_):
        raise DiskError("checkpoint_latest: the checkpoint could not be written (No space left); free some space")

    monkeypatch.setattr(trial_run, "_train", full)
    trials.write_sweep(tmp_path, small.sweep())
    ray = begin(tmp_path, 0)
    with pytest.raises(DiskError):
        train_trial(tmp_path, 0, CPUS, ray)
    folder = trials.folder_of(tmp_path, 0)
    assert trials.read(folder).status == "unfinished"
    assert "DiskError: checkpoint_latest" in (folder / trial_run.CRASH_FILE).read_text()


def test_ray_train_starts_no_process_that_outlives_a_trial_ended_from_outside():
    """It would wait for Ray's dashboard, which is not there: one process for every trial that is stopped or waits."""
    from ray.train.torch import TorchTrainer

    def callbacks(kind):
        return [type(one).__name__ for one in kind(lambda: None)._create_default_callbacks()]

    rays = callbacks(TorchTrainer)
    assert "PlacementGroupCleanerCallback" in rays
    assert callbacks(trial_run._trainer_class()) == [one for one in rays if one != "PlacementGroupCleanerCallback"]
