"""The loop: the same figures on any number of ranks and after any interruption, and what a run leaves behind.

Runs are of a small random model (small_runs.py) but for the last part, which pins what the embedded base learns. Run as
a program (`python tests/test_train.py PART FOLDER`) it is one rank of two, or the run that is killed.
"""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_runs
import torch
import toy
from small_runs import only_run, rows, settings, values

import sft.data
from sft import batch_size, checkpoint, engine, losses, metrics, pace, provenance, synthetic, validation
from sft import run as runs
from sft import train as loop
from sft.config import TrainConfig, UserError
from sft.features import Features, Item
from sft.finite import DivergedError
from sft.memory import ModelSize
from sft.model import lora, published
from sft.model.export import export
from sft.model.sa2va import upsample
from sft.model.sa2va_internvl import Sa2VAInternVL
from sft.schedule import learning_rate_factor
from sft.train import train
from sft.validation import validate_directory

# Everything at once that could make a continued run differ: random numbers, accumulation, views, recomputation.
RESTLESS = {"lora_dropout": 0.3, "gradient_accumulation_steps": 2, "batch_size": 1, "augment": True, "num_epochs": 3}
RESTLESS |= {"text_weight": 0.1, "gradient_checkpointing": True, "train_modules": ("text_hidden_fcs",)}
PATIENCE_S = 60  # only where a test fails
FEW_TOKENS = 3  # a random model never says [SEG]; under ZeRO-3 each token takes long


def zero3(folder, whole_up_to):
    """ZeRO-3 that slices even small parameters: the shipped one would leave all of these whole."""
    zero = {"stage": 3, "overlap_comm": False, "reduce_bucket_size": 10_000, "stage3_prefetch_bucket_size": 10_000}
    zero |= {"stage3_param_persistence_threshold": whole_up_to, "stage3_max_live_parameters": 50_000}
    path = Path(folder) / "zero3_slices.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    return {"deepspeed_config": str(path)}


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(result):
    """Makes a finished run look as if it had ended after its first epoch's checkpoint; gives its rows before."""
    before = rows(result)
    for kept in result.directory.glob("checkpoint_*"):
        if kept.name != "checkpoint_epoch_1":
            shutil.rmtree(kept)
    return before


# One of two ranks


def part_ranks(inputs, out):
    """What two ranks do; `one` holds what one rank did. Prints nothing of the runs."""
    ranks = engine.start(settings(inputs, out))
    hooked, found = [], {}
    result = train(settings(inputs, out / "two", batch_size=1), hooked.append)
    found["hooked"] = hooked
    found["auto"] = with_auto(settings(inputs, out / "auto", batch_size="auto"), ranks)
    config = settings(inputs, out / "dropout", batch_size=1, lora_dropout=0.3)
    whole = train(config)
    engine.barrier()
    before = interrupted(whole) if ranks.is_main else None
    engine.barrier()
    train(dataclasses.replace(config, resume="auto"))
    found["dropout"] = not ranks.is_main or before == rows(whole)
    # One validation batch for two ranks: the other has to take part in its forward pass.
    config = settings(inputs, out / "zero3", batch_size=1, val_batch_size=2, **zero3(out / f"rank{ranks.rank}", 1500))
    train(config)
    found["resumed from one"] = train(settings(inputs, out / "one", resume="auto")).dice
    for name, changes in (("data", {"data_root": str(out)}), ("disk", {"save_every": 1, "num_epochs": 10**9})):
        with pytest.raises(UserError) as error:
            train(settings(inputs, out / "refused", **changes))
        found[name] = str(error.value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "save_adapter", full_disk)
        with pytest.raises(UserError) as error:
            train(settings(inputs, out / "full", batch_size=1, num_epochs=1))
    found["full"] = str(error.value)
    train(
        settings(inputs, out / "dry", dry_run=True, resume=str(result.directory / "checkpoint_epoch_1"), batch_size=1)
    )
    (out / f"rank{ranks.rank}" / "found.json").write_text(json.dumps(found))
    engine.barrier()
    engine.shut_down()


def with_auto(config, ranks):
    """What is proposed where the second GPU has half the memory; what a run tries where it has room for one image."""
    step, tried = batch_size._step, []
    size = ModelSize(10**9, 10**8, 0, layers=36, hidden=2048, intermediate=11008, tokens=320, mask_pixels=0)

    def limited(model, features, most, config, *rest):
        tried.append(config.batch_size)
        if ranks.rank == 1 and config.batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(model, features, most, config, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "usable_bytes", lambda device: 2**36 >> ranks.rank)
        proposed, _ = batch_size.choose(TrainConfig(batch_size="auto"), size, 1000, ranks, lambda config: 0)
        patch.setattr(batch_size, "_step", limited)
        patch.setattr(pace, "usable_bytes", lambda device: 2**31)
        train(config)
    return proposed.batch_size, tried


def part_killed_writing(inputs, out):
    """A run that is killed in its third epoch, while the checkpoint of its second is being written."""
    writing, to_disk, train_epoch = threading.Event(), checkpoint._to_disk, loop.train_epoch

    def stuck(path):
        if path.parent.name == "checkpoint_epoch_2.partial":
            writing.set()
            threading.Event().wait()
        to_disk(path)

    def kill(run, epoch):
        if epoch == 3:
            assert writing.wait(PATIENCE_S)
            os.kill(os.getpid(), signal.SIGKILL)
        train_epoch(run, epoch)

    checkpoint._to_disk, loop.train_epoch = stuck, kill
    train(settings(inputs, out, **RESTLESS))


def part_killed(inputs, out):
    """A run that is killed while its second epoch is being validated."""

    def kill(row):
        if row["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    train(settings(inputs, out, **RESTLESS), kill)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return small_runs.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module", autouse=True)
def alone():
    """The process group of these runs, and the environment it is described in, end with the file."""
    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "MAX_ANSWER_TOKENS", FEW_TOKENS)
        yield
    engine.shut_down()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def plain(inputs, tmp_path_factory):
    """A run nobody changes: its Result, output_dir, the rows its hook saw, and what JSON and log held at each."""
    out, seen = tmp_path_factory.mktemp("plain"), []

    def look(row):
        log = (out / "training.log").read_text()
        seen.append((row, json.loads((only_run(out) / "training_log.json").read_text()), log))

    return train(settings(inputs, out, tensorboard=True), look), out, seen


@pytest.fixture(scope="module")
def pair(inputs, tmp_path_factory):
    """The folder in which two ranks have done their part, what they printed, what they found."""
    if torch.cuda.device_count() == 1:
        pytest.skip("two ranks need two GPUs or none")
    folder = tmp_path_factory.mktemp("pair")
    for name in ("one", "rank0", "rank1", "tmp"):
        (folder / name).mkdir()
    one = train(settings(inputs, folder / "one", num_epochs=2))
    shutil.copytree(folder / "one", folder / "one_before")
    interrupted(one)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder / "tmp"))
        outputs = toy.run_ranks(__file__, "ranks", str(inputs), str(folder))
    return folder, outputs, [json.loads((folder / f"rank{rank}" / "found.json").read_text()) for rank in range(2)]


# Ranks


def test_base_is_validated_to_the_same_digit_on_two_ranks(pair):
    one, two = (rows(only_run(pair[0] / name), "val") for name in ("one_before", "two"))
    assert one[0] == two[0]
    assert len(one[0]["dice_per_image"]) == 2


def test_two_ranks_train_what_one_rank_with_twice_the_batch_trains(pair):
    one, two = (only_run(pair[0] / name) for name in ("one_before", "two"))
    for term in ("loss", "dice", "focal", "bce"):
        assert values(two, "train", term) == pytest.approx(values(one, "train", term), rel=1e-5)
    assert values(two, "val", "dice") == pytest.approx(values(one, "val", "dice"), abs=1e-3)
    assert values(two, "train", "step") == values(one, "train", "step") == [2, 4]


def test_every_rank_hears_of_every_validation(pair):
    first, second = (found["hooked"] for found in pair[2])
    assert first == second
    assert [row["epoch"] for row in first] == [0, 1, 2]


def test_two_ranks_resume_bit_by_bit(pair):
    assert pair[2][0]["dropout"], "the rows of the continued run differ from those of the uninterrupted one"


def test_two_ranks_of_zero3_train_what_one_rank_trains(pair):
    one, two = (only_run(pair[0] / name) for name in ("one_before", "zero3"))
    assert values(two, "train", "loss") == pytest.approx(values(one, "train", "loss"), rel=1e-5)
    assert values(two, "val", "dice") == pytest.approx(values(one, "val", "dice"), abs=1e-3)


def test_two_ranks_go_on_from_one(pair):
    """An epoch has half the steps then; no row of the first is lost, none is there twice."""
    before, after = (rows(only_run(pair[0] / name)) for name in ("one_before", "one"))
    of_epoch_1 = [row for row in before if row["epoch"] < 2]
    assert after[: len(of_epoch_1)] == of_epoch_1
    assert [(row["kind"], row["epoch"], row["step"]) for row in after[len(of_epoch_1) :]] == [
        ("step", 2, 2),
        ("train", 2, 2),
        ("val", 2, 2),
    ]
    assert pair[2][0]["resumed from one"] == pair[2][1]["resumed from one"]


def test_ranks_take_the_number_that_fits_all_of_them(pair):
    assert pair[2][0]["auto"] == pair[2][1]["auto"] == [8, [2, 1]]  # the first alone would take 16
    run = only_run(pair[0] / "auto")
    assert json.loads((run / "config.json").read_text())["batch_size"] == 1
    assert rows(run) == rows(only_run(pair[0] / "two"))


def test_one_rank_goes_on_from_two(pair, inputs, tmp_path):
    shutil.copytree(pair[0] / "two", tmp_path / "two")
    shutil.rmtree(only_run(tmp_path / "two") / "checkpoint_epoch_2")
    shutil.rmtree(only_run(tmp_path / "two") / "checkpoint_best")
    before = [row for row in rows(only_run(tmp_path / "two")) if row["epoch"] < 2]
    after = rows(train(settings(inputs, tmp_path / "two", batch_size=1, resume="auto")))
    assert after[: len(before)] == before
    assert [row["step"] for row in after[len(before) :] if row["kind"] == "step"] == [5, 6, 7, 8]


def test_a_mistake_is_one_error_on_both_ranks_and_leaves_nothing(pair):
    first, second = pair[2]
    assert first["data"] == second["data"] and "has no such layout" in first["data"]
    assert first["disk"] == second["disk"] and "GiB free, but 1000000001 checkpoints" in first["disk"]
    assert not (pair[0] / "refused").exists()


def test_a_full_disk_is_one_error_on_both_ranks_at_the_end_at_the_latest(pair):
    first, second = pair[2]
    assert first["full"] == second["full"] and "checkpoint could not be written (OSError" in first["full"]
    log = (pair[0] / "full" / "training.log").read_text().splitlines()
    assert log[-1] == f"error: {first['full']}" and any(line.startswith("Val 1/1") for line in log)


def test_a_dry_run_of_two_ranks_leaves_nothing(pair):
    assert not (pair[0] / "dry").exists()
    assert list((pair[0] / "tmp").iterdir()) == []


def test_only_rank_0_prints(pair):
    assert pair[1][1] == ""
    assert "WARNING" not in pair[1][0] and "Warning" not in pair[1][0]


# Batches and accumulation


def test_accumulated_batches_are_one_batch(inputs, tmp_path):
    together = train(settings(inputs, tmp_path / "one", batch_size=4, num_epochs=3))
    accumulated = train(settings(inputs, tmp_path / "two", batch_size=1, gradient_accumulation_steps=4, num_epochs=3))
    for term in ("loss", "dice", "focal", "bce"):
        expected = values(together, "train", term)
        assert values(accumulated, "train", term) == pytest.approx(expected, rel=1e-5)
    assert values(accumulated, "train", "step") == values(together, "train", "step") == [1, 2, 3]


def fake_run(config, images, rank=0, world_size=1):
    pairs = tuple(SimpleNamespace(name=f"p{number}") for number in range(images))
    ranks = engine.Ranks(rank, rank, world_size, torch.device("cpu"))
    steps = batch_size.count_steps(images, config, world_size)
    return SimpleNamespace(config=config, ranks=ranks, data=SimpleNamespace(train=pairs), steps_per_epoch=steps)


def planned(config, images, epoch, world_size=1):
    """Names in the order of training: per micro-batch of all ranks, sorted within."""
    plans = [loop.epoch_plan(fake_run(config, images, rank, world_size), epoch) for rank in range(world_size)]
    return [sorted(item.pair.name for batch in batches for item in batch) for batches in zip(*plans, strict=True)]


@pytest.mark.parametrize(("images", "batch", "accumulation"), [(7, 4, 1), (8, 2, 2), (2, 8, 1), (1, 2, 3), (10, 2, 1)])
def test_epoch_plan_is_the_same_on_any_number_of_ranks_and_leaves_no_image_out(inputs, images, batch, accumulation):
    one = settings(inputs, "out", batch_size=batch, gradient_accumulation_steps=accumulation)
    two = dataclasses.replace(one, batch_size=batch // 2)
    plan = planned(one, images, epoch=1)
    assert plan == planned(two, images, epoch=1, world_size=2)
    assert len(plan) % accumulation == 0 and all(len(names) == batch for names in plan)
    counted = [name for names in plan for name in names]
    assert {counted.count(f"p{number}") for number in range(images)} <= {
        len(counted) // images,
        -(-len(counted) // images),
    }
    assert len(counted) - images < batch * accumulation, "no more is filled up than the last step needs"


def test_epoch_plan_follows_seed_and_epoch(inputs):
    config = settings(inputs, "out")
    orders = [str(planned(config, 9, epoch)) for epoch in (1, 2)]
    orders.append(str(planned(dataclasses.replace(config, seed=1), 9, 1)))
    assert len(set(orders)) == 3
    assert orders[0] == str(planned(config, 9, 1))
    views = [item.view for batch in loop.epoch_plan(fake_run(config, 40), 1) for item in batch]
    assert set(views) == {0}
    config = dataclasses.replace(config, augment=True)
    views = [item.view for batch in loop.epoch_plan(fake_run(config, 400), 1) for item in batch]
    assert all(30 <= views.count(view) <= 70 for view in range(8)), "each about every eighth time"


def test_loss_is_the_mean_over_images_whatever_their_sizes(inputs):
    """Two sizes in one batch of three: each image counts a third, not each size a half."""
    config = settings(inputs, "out")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 8, 8, generator=generator)
    masks = tuple(torch.rand(size, generator=generator) > 0.7 for size in ((8, 8), (12, 6), (8, 8)))
    terms = loop.loss_terms(SimpleNamespace(logits_Bhw=logits), SimpleNamespace(masks=masks), config)
    alone = [
        losses.combo(upsample(logits[row : row + 1], tuple(mask.shape)), mask[None], config)
        for row, mask in enumerate(masks)
    ]
    assert terms.keys() == alone[0].keys() >= {"dice", "focal", "bce", "total"}
    for name in terms:
        torch.testing.assert_close(terms[name], torch.stack([one[name] for one in alone]).mean())


def test_two_images_are_enough_and_a_batch_may_be_larger_than_the_set(inputs, tmp_path):
    data_root = small_runs.write_images(tmp_path / "two", count=2)
    changes = {"data_root": str(data_root), "val_list": None, "val_fraction": 0.5, "batch_size": 4, "val_batch_size": 4}
    result = train(settings(inputs, tmp_path, **changes))
    split = json.loads((result.directory / "split.json").read_text())
    assert sorted(split["train"] + split["val"]) == ["v0", "v1"] and len(split["train"]) == 1
    assert values(result, "train", "step") == [1, 2]


# Continuing


def test_resumed_run_equals_the_uninterrupted_one_bit_by_bit(inputs, tmp_path):
    config = settings(inputs, tmp_path, **RESTLESS)
    whole = train(config)
    before, weights = rows(whole), lora.read_adapter(whole.directory / "checkpoint_epoch_3")
    interrupted(whole)
    assert train(dataclasses.replace(config, resume="auto")) == whole
    assert rows(whole) == before
    after = lora.read_adapter(whole.directory / "checkpoint_epoch_3")
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    log = (tmp_path / "training.log").read_text()
    assert "Resumed after epoch 1 (step 2)" in log and log.count("Epoch 1/3") == 1
    assert [path.name for path in tmp_path.glob("lora_sft_*")] == [whole.directory.name]


@pytest.mark.parametrize("part", ["killed", "killed writing"])
def test_killed_run_goes_on_with_auto_as_if_never_killed(inputs, tmp_path, part):
    command = [sys.executable, __file__, part, str(inputs), str(tmp_path / "killed")]
    environ = os.environ | {"PYTHONPATH": toy.PYTHONPATH}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        environ.pop(name, None)
    process = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr
    killed = only_run(tmp_path / "killed")
    assert [row["epoch"] for row in rows(killed, "val")] == [0, 1, 2], "training_log.json is valid after kill -9"
    left = {path.name for path in killed.glob("checkpoint_epoch_2*")}
    assert left == {"checkpoint_epoch_2" if part == "killed" else "checkpoint_epoch_2.partial"}
    resumed = train(settings(inputs, tmp_path / "killed", resume="auto", **RESTLESS))
    whole = train(settings(inputs, tmp_path / "whole", **RESTLESS))
    assert resumed.directory == killed
    assert list(killed.glob("*.partial")) == []
    assert rows(resumed) == rows(whole)
    assert resumed.dice == whole.dice


def test_latest_alone_goes_on_bit_by_bit_with_the_best_figures(inputs, tmp_path):
    """The hook sees what a process that ends in it would leave; one such state goes on in another place."""
    config, hooked = settings(inputs, tmp_path / "one", keep="latest", **RESTLESS), []

    def end(row):
        if row["epoch"]:
            run = only_run(tmp_path / "one")
            hooked.append(checkpoint.read_progress(run / "checkpoint_latest"))
            shutil.copytree(run, tmp_path / f"after{row['epoch']}" / run.name)

    whole = train(config, end)
    dice = values(whole, "val", "dice")[1:]
    for epoch, progress in enumerate(hooked, start=1):
        best = max(dice[:epoch])
        assert (progress.epoch, progress.best_dice, progress.best_epoch) == (epoch, best, 1 + dice.index(best))
    for epoch in (1, 2):
        resumed = train(dataclasses.replace(config, resume="auto", output_dir=str(tmp_path / f"after{epoch}")))
        assert f"Resumed after epoch {epoch} " in (resumed.directory / "training.log").read_text()
        assert dataclasses.replace(resumed, directory=whole.directory) == whole
        assert rows(resumed) == rows(whole)
        for name in ("checkpoint_best/adapter_model.safetensors", "checkpoint_latest/training_state.pt"):
            assert (resumed.directory / name).read_bytes() == (whole.directory / name).read_bytes(), name


def test_resume_with_other_settings_names_them(inputs, plain):
    config = settings(inputs, plain[1], tensorboard=True)
    with pytest.raises(UserError) as error:
        train(dataclasses.replace(config, resume="auto"))
    assert "finished: epoch 2/2" in str(error.value)
    best = plain[0].directory / "checkpoint_best"
    with pytest.raises(UserError) as error:
        train(
            dataclasses.replace(config, resume=str(best), lora_dropout=0.1, batch_size=1, gradient_checkpointing=True)
        )
    assert str(error.value) == (
        f"{plain[0].directory}/config.json: the run was started with lora_dropout 0.0 (now 0.1), batch_size 2 (now 1); "
        "resume with its settings, or start a new run"
    )


def test_what_decides_no_figure_may_differ_after_a_resume(inputs, tmp_path):
    config = settings(inputs, tmp_path / "one")
    whole = train(config)
    before = interrupted(whole)
    free = {
        "gradient_checkpointing": True,
        "feature_cache": "off",
        "output_dir": str(tmp_path / "two"),
        "num_workers": 1,
        "keep": "latest",
    }
    file = whole.directory / "config.json"
    older = {name: value for name, value in json.loads(file.read_text()).items() if name != "keep"}
    file.write_text(json.dumps(older))
    train(dataclasses.replace(config, resume=str(whole.directory / "checkpoint_epoch_1"), **free))
    assert rows(whole) == before
    assert "Resumed" in (tmp_path / "two" / "training.log").read_text(), "the latest log is where one asked for it"
    assert not list((tmp_path / "two").glob("lora_sft_*"))


def test_a_merged_model_is_compared_with_a_validated_epoch_only(inputs, tmp_path):
    result = train(settings(inputs, tmp_path, validate_every=2))
    with pytest.raises(UserError, match="epoch 1 was not validated; take another checkpoint"):
        validate_directory(result.directory / "checkpoint_epoch_1", inputs / "model")


def test_resume_needs_the_settings_beside_the_checkpoint(inputs, tmp_path, plain):
    shutil.copytree(plain[0].directory / "checkpoint_epoch_1", tmp_path / "checkpoint_epoch_1")
    with pytest.raises(UserError, match="config.json: not found; a checkpoint is used inside its run's own directory"):
        train(settings(inputs, tmp_path, resume=str(tmp_path / "checkpoint_epoch_1")))


def test_a_second_run_in_one_process_is_the_same_run(inputs, plain, tmp_path):
    """As trials of a search are."""
    seen = []
    again = train(settings(inputs, tmp_path), seen.append)
    assert rows(again) == rows(plain[0])
    assert [row for row, _, _ in plain[2]] == seen


# What a run leaves and shows


def test_files_of_a_run(plain):
    result, out, _ = plain
    names = {path.name for path in result.directory.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {
        *("checkpoint_best", "checkpoint_epoch_1", "checkpoint_epoch_2", "comparison.png", "config.json"),
        *("report.html", "split.json", "training.log", "training_log.json"),
    }
    assert re.fullmatch(r"lora_sft_\d{8}_\d{6}", result.directory.name)
    assert {path.name for path in out.iterdir()} == {result.directory.name, "training.log"}
    for name in ("checkpoint_best", "checkpoint_epoch_1", "checkpoint_epoch_2"):
        assert {path.name for path in (result.directory / name).iterdir()} == {
            *("adapter_config.json", "adapter_model.safetensors", "checkpoint.json"),
            *("tokenizer.json", "tokenizer_config.json", "training_state.pt"),
        }


def test_config_json_holds_what_decides_the_result(plain, inputs):
    record = json.loads((plain[0].directory / "config.json").read_text())
    config = settings(inputs, plain[1], tensorboard=True)
    assert {name: record[name] for name in vars(config)} == json.loads(json.dumps(dataclasses.asdict(config)))
    assert set(record["versions"]) == {"sa2va-sft", "python", *provenance.PACKAGES}
    assert record["command"] == sys.argv and record["ranks"] == 1
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=toy.ROOT, capture_output=True, text=True)
    if commit.returncode == 0:
        assert record["git_commit"].removesuffix("+changes") == commit.stdout.strip()


def test_a_package_inside_somebodys_repository_is_not_that_repositorys_commit(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "__init__.py").touch()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "site-packages" / "provenance.py"))
    assert provenance.git_commit() is None


def test_split_is_written_as_it_was_used(plain):
    split = json.loads((plain[0].directory / "split.json").read_text())
    assert split == {"train": ["v0", "v2", "v3", "v5"], "val": ["v1", "v4"]}


def test_log_can_be_followed_and_json_is_valid_at_every_moment(plain):
    """At each call of the hook, in the midst of the run, both files hold all that happened."""
    result, out, seen = plain
    assert [row["epoch"] for row, _, _ in seen] == [0, 1, 2]
    for epoch, (row, stored, log) in enumerate(seen):
        assert stored[-1] == {"kind": "val"} | row
        assert [line.split()[0] for line in log.splitlines() if line.startswith(("Epoch", "Val"))] == [
            "Val",
            *["Epoch", "Val"] * epoch,
        ]
    log = (out / "training.log").read_text()
    assert log == (result.directory / "training.log").read_text()
    assert re.search(r"^Val 0/2 \| Dice 0\.\d{4} .* \| seg_rate 0\.00 \| base$", log, re.MULTILINE)
    assert re.search(r"^Epoch 2/2 \| loss \d\.\d{4} = dice .* \| ETA 0:00:00$", log, re.MULTILINE)
    assert "trainable params: 3,712 || all params:" in log
    assert "Gradient check: every LoRA B moved, no frozen parameter did" in log
    assert f"base {result.base_dice:.4f}: gain {result.dice - result.base_dice:+.4f}" in log


def test_rows_tell_loss_speed_and_scores(plain):
    stored = json.loads((plain[0].directory / "training_log.json").read_text())
    assert [row["kind"] for row in stored] == ["val", *["step", "step", "train", "val"] * 2]
    train_row = next(row for row in stored if row["kind"] == "train")
    assert train_row.keys() >= {"loss", "dice", "focal", "bce", "lr", "samples_per_s", "eta_s"}
    parts = [train_row[f"{part}_s"] for part in ("data", "forward", "backward", "optimizer")]
    assert all(part > 0 for part in parts) and sum(parts) <= train_row["step_s"]
    weighted = train_row["dice"] + train_row["focal"] + 0.5 * train_row["bce"]
    assert train_row["loss"] == pytest.approx(weighted, rel=1e-5)
    assert stored[-1].keys() >= {"dice", "iou", "recall", "precision", "dice_best", "threshold_best", "seg_rate"}
    assert [row["lr"] for row in stored if row["kind"] == "step"] == pytest.approx(
        [0.01 * learning_rate_factor(step, 4, 1, "cosine") for step in range(4)]
    )


def test_events_hold_the_rows(plain):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(plain[0].directory)).Reload()
    assert [event.value for event in events.Scalars("val/dice")] == pytest.approx(values(plain[0], "val", "dice"))
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]


def test_terminal_shows_the_log_and_nothing_of_the_libraries(inputs, tmp_path, capsys):
    config = settings(
        inputs, tmp_path, precision="bf16", gradient_checkpointing=True, seg_rate_samples=2, text_weight=0.1
    )
    train(dataclasses.replace(config, train_modules=("mask_decoder",), lora_scope=("language_model", "sam2_encoder")))
    out, err = capsys.readouterr()
    assert err == ""
    assert out == (tmp_path / "training.log").read_text()


def validation_dice(config, directory):
    """Dice of an adapter on a base that knows of no run: what somebody else would measure."""
    loaded = published.load(config.model_path, dtype=torch.float32)
    peft_model = lora.wrap(loaded.model, config)
    lora.load_adapter(peft_model, directory)
    features = Features(loaded.model, loaded.preprocess, config, torch.device("cpu"))
    names = [Path(config.data_root) / "images" / f"{name}.png" for name in ("v1", "v4")]
    pairs = [sft.data.Pair(path.stem, path, path.parent.parent / "masks" / path.name) for path in names]
    counted = []
    with torch.no_grad():
        for batch in features.batches([[Item(pair)] for pair in pairs]):
            logits = peft_model.eval()(batch.prompt, batch.vision, batch.sam2).masks.logits_Bhw
            counted.append(metrics.counts(upsample(logits, tuple(batch.masks[0].shape)), batch.masks[0][None])[0])
    features.close()
    return metrics.summarize(torch.stack(counted), 0.5)["dice"]


@pytest.mark.parametrize("save_format", ["safetensors", "bin"])
def test_best_adapter_alone_gives_the_best_dice_again(inputs, tmp_path, save_format):
    changes = {"train_modules": ("text_hidden_fcs", "mask_decoder"), "save_format": save_format, "num_epochs": 4}
    config = settings(inputs, tmp_path, lora_scope=("language_model", "sam2_encoder"), save_every=3, **changes)
    result = train(config)
    best, ending = result.directory / "checkpoint_best", {"safetensors": "safetensors", "bin": "bin"}[save_format]
    assert {path.name for path in best.glob("adapter_model.*")} == {f"adapter_model.{ending}"}
    assert {path.name for path in result.directory.glob("checkpoint_*")} == {
        *("checkpoint_best", "checkpoint_epoch_3", "checkpoint_epoch_4")
    }
    dice = values(result, "val", "dice")[1:]
    assert result.dice == max(dice) and result.epoch == 1 + dice.index(max(dice))
    (best / "training_state.pt").unlink()
    assert validation_dice(config, best) == result.dice
    merged = export(inputs / "model", result.directory / "checkpoint_epoch_3", tmp_path / "merged", torch.float32)
    before, after = validate_directory(result.directory / "checkpoint_epoch_3", tmp_path / "merged")
    assert merged.replaced and before == dice[2]
    assert after == pytest.approx(before, abs=1e-3), "merging rounds"


def test_latest_leaves_a_best_adapter_that_is_merged_and_validated_as_any(inputs, tmp_path):
    config = settings(inputs, tmp_path / "out", keep="latest", num_epochs=5, save_every=2)
    result, adapter = train(config), {"adapter_config.json", "adapter_model.safetensors", "checkpoint.json"}
    adapter |= {"tokenizer.json", "tokenizer_config.json"}
    left = {kept.name: {file.name for file in kept.iterdir()} for kept in result.directory.glob("checkpoint_*")}
    assert left == {"checkpoint_best": adapter, "checkpoint_latest": adapter | {"training_state.pt"}}
    assert checkpoint.read_progress(result.directory / "checkpoint_latest").epoch == 5
    best = result.directory / "checkpoint_best"
    assert checkpoint.read_progress(best).epoch == result.epoch
    assert validation_dice(config, best) == result.dice
    export(inputs / "model", best, tmp_path / "merged", torch.float32)
    before, after = validate_directory(best, tmp_path / "merged")
    assert before == result.dice and after == pytest.approx(before, abs=1e-3), "merging rounds"
    with pytest.raises(UserError, match="holds an adapter without training_state.pt.*: checkpoint_latest$"):
        train(dataclasses.replace(config, resume=str(best)))


def test_conv_s0_and_conv_s1_train_with_the_mask_decoder(inputs, tmp_path):
    config = settings(inputs, tmp_path, train_modules=("mask_decoder",))
    result = train(config)
    tuned = lora.read_adapter(result.directory / "checkpoint_epoch_2")
    base = published.load(config.model_path, dtype=torch.float32).model.sam2.mask_decoder
    for name in ("conv_s0.weight", "conv_s1.bias"):
        key = f"base_model.model.grounding_encoder.sam2_model.sam_mask_decoder.{name}"
        assert (tuned[key] - base.get_parameter(name)).abs().max() > 1e-4, f"{name} has not moved"


def test_sam2_encoder_gets_gradients_through_its_lora(inputs, tmp_path):
    result = train(settings(inputs, tmp_path, lora_scope=("sam2_encoder",), num_epochs=1))
    tuned = lora.read_adapter(result.directory / "checkpoint_epoch_1")
    assert all("image_encoder.trunk" in name for name in tuned)
    assert all(tensor.abs().max() > 0 for name, tensor in tuned.items() if "lora_B" in name)


def test_new_runs_of_one_second_get_directories_of_their_own(tmp_path):
    made = {runs._new_directory(tmp_path) for _ in range(3)}
    assert len(made) == 3 and all(path.is_dir() for path in made)


# Settings that change how, not what


@pytest.mark.parametrize("name", ["zero1", "zero2_offload", "zero3", "zero3 in slices"])
def test_every_zero_stage_trains_the_same(inputs, tmp_path, plain, name):
    chosen = {"deepspeed_config": name} if " " not in name else zero3(tmp_path, 0) | {"seg_rate_samples": 0}
    result = train(settings(inputs, tmp_path, **chosen))
    assert values(result, "step", "loss") == pytest.approx(values(plain[0], "step", "loss"), rel=1e-5)
    base, expected = (rows(place, "val")[0] for place in (result, plain[0]))
    assert base == {key: expected[key] for key in base}


def test_gradient_checkpointing_recomputes_and_changes_no_figure(inputs, tmp_path, plain, monkeypatch):
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    calls, forward = [], Qwen2MLP.forward

    def counted(self, *arguments, **keywords):
        calls.append(self.training and torch.is_grad_enabled())
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(Qwen2MLP, "forward", counted)
    result = train(settings(inputs, tmp_path / "off"))
    kept = calls.count(True)
    assert kept == 4 * 2  # steps x layers
    checkpointed = train(settings(inputs, tmp_path / "on", gradient_checkpointing=True))
    assert calls.count(True) - kept == 2 * kept
    assert rows(checkpointed) == rows(result) == rows(plain[0])


def test_bf16_is_near_fp32(inputs, tmp_path, plain):
    result = train(settings(inputs, tmp_path, precision="bf16"))
    assert values(result, "step", "loss") == pytest.approx(values(plain[0], "step", "loss"), rel=1e-2)
    assert result.base_dice == pytest.approx(plain[0].base_dice, abs=5e-3)
    tuned = lora.read_adapter(result.directory / "checkpoint_best")
    assert {tensor.dtype for tensor in tuned.values()} == {torch.bfloat16}


def test_feature_cache_changes_no_figure(inputs, tmp_path, plain):
    assert rows(train(settings(inputs, tmp_path, feature_cache="off"))) == rows(plain[0])


def test_text_loss_is_trained_and_logged_with_its_weight(inputs, tmp_path):
    result = train(settings(inputs, tmp_path, text_weight=0.25, num_epochs=4))
    text = values(result, "train", "text")
    assert text[-1] < text[0]
    row = rows(result, "train")[0]
    assert row["loss"] == pytest.approx(row["dice"] + row["focal"] + 0.5 * row["bce"] + 0.25 * row["text"], rel=1e-5)
    assert f"+ text {0.25 * text[0]:.4f} |" in (tmp_path / "training.log").read_text()


def test_validation_and_checkpoints_come_as_often_as_asked(inputs, tmp_path):
    result = train(settings(inputs, tmp_path, num_epochs=5, validate_every=2, save_every=4))
    assert values(result, "val", "epoch") == [0, 2, 4, 5]
    kept = {path.name for path in result.directory.glob("checkpoint_*")}
    assert kept == {"checkpoint_best", "checkpoint_epoch_4", "checkpoint_epoch_5"}


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("place", ["host", "off"])
def test_validation_leaves_nothing_that_a_step_could_not_save(inputs, tmp_path, stage, place):
    """Its passes run in inference mode but for ZeRO-3; weights, buffers and features are ordinary tensors after it."""
    trained = {"lora_scope": ("language_model", "mask_decoder", "sam2_encoder"), "train_modules": ("text_hidden_fcs",)}
    chosen = {"deepspeed_config": stage} if stage == "zero2" else zero3(tmp_path, 1500)
    chosen |= {"feature_cache": place, "seg_rate_samples": 0}
    with runs.prepared(settings(inputs, tmp_path, **chosen, **trained)) as run:
        modes, model = [], run.loaded.model
        model.text_hidden_fcs.register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
        runs.keep_features(run, loop.all_items(run))
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        validation.validate(run)
        assert set(modes) == {stage == "zero2"}
        assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
        (batch,) = run.features.batches([[Item(pair) for pair in run.data.val]])
        kept = [*model.parameters(), *model.buffers(), *batch.tensors()]
        assert not any(tensor.is_inference() for tensor in kept)
        run.log.start(run.steps_per_epoch)
        loop.train_epoch(run, 1)
        assert len(modes) > 2 and modes[-1] is False
        model.layers.compile()  # whose graphs last as well
        assert validation._quietly(run) is torch.no_grad


# [SEG] in free generation


def test_seg_rate_decodes_after_the_question_alone(inputs, tmp_path, monkeypatch):
    """Half of four answers arrive; the model has seen the image and the question, and no word of an answer."""
    asked, loaded = [], published.load(str(inputs / "model"))
    seg, answer = loaded.preprocess.seg_token_id, loaded.preprocess.answer_ids()

    def generate(self, question, vision, stop_token_ids, max_tokens):
        before = sum(len(ids) for ids, *_ in asked)
        asked.append((question.input_ids_BL, len(vision.tokens_MC), stop_token_ids, max_tokens))
        arrives = (before + torch.arange(len(question.input_ids_BL))) % 2 == 0
        return torch.stack(
            [torch.full_like(arrives, answer[0], dtype=torch.long), torch.where(arrives, seg, answer[1])], 1
        )

    monkeypatch.setattr(Sa2VAInternVL, "generate", generate)
    chosen = {"val_list": None, "val_fraction": 0.7, "seg_rate_samples": 8, "val_batch_size": 2, "num_epochs": 1}
    result = train(settings(inputs, tmp_path, **chosen))
    assert values(result, "val", "seg_rate") == [0.5, 0.5]
    count = len(json.loads((result.directory / "split.json").read_text())["val"])
    assert sum(len(ids) for ids, *_ in asked) == 2 * count == 8
    assert {len(ids) for ids, *_ in asked} == {1, 2}, "questions of one length together, at most two"
    for ids, tokens, stops, most in asked:
        question = loaded.preprocess.question_ids(settings(inputs, "out").question, (1, 1, tokens // len(ids)))
        assert ids.tolist() == [question] * len(ids) and most == validation.MAX_ANSWER_TOKENS
        assert stops == loaded.preprocess.stop_token_ids


def test_a_falling_seg_rate_is_warned_about(inputs, tmp_path, monkeypatch):
    rates = iter([0.75, 0.75, 0.25])
    monkeypatch.setattr(validation, "seg_rate", lambda run: next(rates))
    train(settings(inputs, tmp_path))
    warned = [line for line in (tmp_path / "training.log").read_text().splitlines() if line.startswith("warning: seg")]
    assert len(warned) == 1 and "fell from 0.75 to 0.25" in warned[0] and "--text_weight" in warned[0]


def test_seg_rate_can_be_left_out(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(Sa2VAInternVL, "generate", None)
    result = train(settings(inputs, tmp_path, seg_rate_samples=0, num_epochs=1))
    assert "seg_rate" not in rows(result, "val")[0]
    assert "| seg_rate" not in (tmp_path / "training.log").read_text()


# Trying out


@pytest.mark.parametrize("keep", ["all", "latest"])
def test_dry_run_does_everything_once_and_leaves_nothing(inputs, tmp_path, monkeypatch, capsys, keep):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    config = settings(inputs, tmp_path / "out", dry_run=True, tensorboard=True, num_epochs=15, save_every=3, keep=keep)
    result = train(config)
    assert not (tmp_path / "out").exists() and not result.directory.exists()
    assert list((tmp_path / "tmp").iterdir()) == []
    out = capsys.readouterr().out
    assert re.search(r"^Memory estimate of a GPU: weights \d.* = \d+\.\d\d GiB$", out, re.MULTILINE)
    assert "for 6 images" in out, "the estimate is of the whole data set"
    assert out.count("\nEpoch 1/15 ") == 1 and "\nEpoch 2" not in out
    assert "one checkpoint are in order" in out.splitlines()[-1]


def test_dry_run_of_a_resume_leaves_the_run_as_it_is(inputs, plain):
    def state():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(plain[1].rglob("*"))}

    before = state()
    changes = {"dry_run": True, "resume": str(plain[0].directory / "checkpoint_epoch_1"), "tensorboard": True}
    train(settings(inputs, plain[1], **changes))
    assert state() == before


def test_dry_run_looks_at_the_disk_the_run_would_fill(inputs, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    asked = []

    def little(path):
        asked.append(Path(path))
        return SimpleNamespace(free=2**20)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", little)
    with pytest.raises(UserError, match="0.00 GiB free, but 6 checkpoints and the one being replaced"):
        train(settings(inputs, tmp_path / "a" / "b", dry_run=True, num_epochs=13, save_every=3))
    assert asked == [tmp_path] and not (tmp_path / "a").exists()
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("keep", "resumed", "whole", "adapters"),
    [
        *(("all", None, 7, 0), ("all", "checkpoint_epoch_6", 5, 0)),
        *(("latest", None, 2, 1), ("latest", "checkpoint_epoch_6", 2, 1), ("latest", "checkpoint_latest", 1, 1)),
    ],
)
def test_disk_must_hold_what_stays_and_one_more(inputs, tmp_path, monkeypatch, keep, resumed, whole, adapters):
    """13 epochs, a checkpoint every 3; bf16: an adapter of 2 bytes a weight, 12 more to go on from it."""
    config = settings(inputs, tmp_path, keep=keep, num_epochs=13, save_every=3, precision="bf16")
    if resumed:
        resumed = tmp_path / "lora_sft_20250101_000000" / resumed
        resumed.mkdir(parents=True)
        record = {"progress": dataclasses.asdict(checkpoint.Progress(epoch=6, num_epochs=13, step=12))}
        (resumed / "checkpoint.json").write_text(json.dumps(record))
    size = SimpleNamespace(lora_parameters=10**9, whole_parameters=0)
    needed, free = whole * (14 * 10**9 + 2**24) + adapters * (2 * 10**9 + 2**24), []
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[-1]))
    free.append(needed)
    runs._check_disk(config, size, resumed)
    free.append(needed - 1)
    with pytest.raises(UserError, match="need .* GiB; free some space"):
        runs._check_disk(config, size, resumed)


# Ending early


def test_a_dry_run_that_fails_leaves_nothing(inputs, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(loop, "train_epoch", lambda run, epoch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(settings(inputs, tmp_path / "out", dry_run=True))
    assert not (tmp_path / "out").exists() and list((tmp_path / "tmp").iterdir()) == []


def broken_model(inputs, folder, damage):
    shutil.copytree(inputs / "model", folder / "model")
    damage(folder / "model")
    return {"model_path": str(folder / "model")}


def without_tensors(model):
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "text_hidden_fcs" not in name}, model / "model.safetensors"
    )


def of_another_family(model):
    config = json.loads((model / "config.json").read_text())
    config["llm_config"]["architectures"] = ["GemmaForCausalLM"]
    (model / "config.json").write_text(json.dumps(config))


def spoiled_mask(folder):
    small_runs.write_images(folder / "data")
    (folder / "data" / "masks" / "v3.png").write_bytes(b"no picture")
    return {"data_root": str(folder / "data")}


MISTAKES = {
    "missing tensors": (lambda i, f: broken_model(i, f, without_tensors), r"missing \(.*text_hidden_fcs"),
    "unsupported": (lambda i, f: broken_model(i, f, of_another_family), "GemmaForCausalLM is not supported yet"),
    "unreadable mask": (lambda i, f: spoiled_mask(f), r"1 error.*v3\.png"),
    "no such target": (lambda i, f: {"lora_target_modules": ("wqkv",)}, "wqkv is no linear layer"),
    "deepspeed key": (
        lambda i, f: {"deepspeed_config": str(write(f / "ds.json", '{"bf16": {}}'))},
        "zero_optimization",
    ),
    "unwritable": (lambda i, f: {"output_dir": str(write(f / "file", "") / "out")}, "file: cannot write there"),
    "a word of the model": (lambda i, f: {"question": "Segment <IMG_CONTEXT>."}, "IMG_CONTEXT"),
}


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_leaves_no_half_made_run(inputs, tmp_path, mistake):
    changes, expected = MISTAKES[mistake]
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "training.log", "of an earlier run\n")
    config = dataclasses.replace(settings(inputs, tmp_path / "out"), **changes(inputs, tmp_path))
    with pytest.raises(UserError, match=re.compile(expected, re.DOTALL)):
        train(config)
    assert list((tmp_path / "out").glob("lora_sft_*")) == []
    log = (tmp_path / "out" / "training.log").read_text()
    assert log.splitlines()[-1] == "of an earlier run"


def test_missing_tensorboard_leaves_no_half_made_run(inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="tensorboard cannot be imported"):
        train(settings(inputs, tmp_path, tensorboard=True))
    assert list(tmp_path.glob("lora_sft_*")) == []


def test_a_loss_that_is_not_finite_stops_the_run_and_earlier_checkpoints_stay(inputs, tmp_path, monkeypatch):
    config, combo, calls, steps = settings(inputs, tmp_path, num_epochs=3, batch_size=1), losses.combo, [], 4

    def spoiled(*arguments):
        calls.append(1)
        terms = combo(*arguments)
        return terms | {"total": terms["total"] * math.nan} if len(calls) > 2 * steps else terms

    monkeypatch.setattr(losses, "combo", spoiled)
    with pytest.raises(DivergedError, match="^step 9: the loss or its gradient is not finite"):
        train(config)
    run = only_run(tmp_path)
    assert (tmp_path / "training.log").read_text().splitlines()[-1].startswith("error: step 9: ")
    assert values(run, "train", "epoch") == [1, 2]
    kept = sorted(path.name for path in run.glob("checkpoint_*"))
    assert kept == ["checkpoint_best", "checkpoint_epoch_1", "checkpoint_epoch_2"]
    monkeypatch.setattr(losses, "combo", combo)
    assert train(dataclasses.replace(config, resume="auto")).directory == run


def test_running_out_of_gpu_memory_ends_with_advice(inputs, tmp_path, monkeypatch):
    def full(run, batch, watch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(loop, "train_step", full)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    with pytest.raises(UserError) as error:
        train(settings(inputs, tmp_path))
    line = str(error.value)
    assert line.startswith("CUDA out of memory on asking for 2.00 GiB (the GPU has 80 GiB")
    assert all(f"({number}) " in line for number in (1, 2, 3)) and "--batch_size 1" in line
    assert (tmp_path / "training.log").read_text().splitlines()[-1] == f"error: {line}"
    assert list(tmp_path.glob("lora_sft_*")) == []


def test_a_full_disk_ends_the_run_with_one_line(inputs, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "report.html"))

    monkeypatch.setattr(runs, "write_html", full)
    with pytest.raises(UserError, match="report.html: No space left on device; free some space, then resume"):
        train(settings(inputs, tmp_path))
    monkeypatch.undo()
    assert train(settings(inputs, tmp_path, resume="auto")).directory == only_run(tmp_path)


def test_a_full_disk_that_names_no_file_is_told_without_one(monkeypatch):
    """A write gives none, only an open does."""
    monkeypatch.setattr(engine, "gather_objects", lambda own: [own])

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError) as error:
        runs.on_main(SimpleNamespace(is_main=True), full)
    assert str(error.value) == "No space left on device; give a path you may use, or free some space"


def test_a_slow_write_holds_up_no_step(inputs, tmp_path, monkeypatch):
    """The first checkpoint stays unwritten until the second epoch is trained; everything is written in its order."""
    trained, to_disk, train_epoch, seen = threading.Event(), checkpoint._to_disk, loop.train_epoch, []

    def slow(path):
        assert trained.wait(PATIENCE_S)
        to_disk(path)

    def watched(run, epoch):
        train_epoch(run, epoch)
        if epoch == 2:
            seen.extend(path.name for path in run.directory.glob("checkpoint_*") if "." not in path.name)
            trained.set()

    def noted(directory, *arguments):
        write(directory, *arguments)
        written.append((directory.name, checkpoint.read_progress(directory).epoch))

    write, written = checkpoint._write, []
    monkeypatch.setattr(checkpoint, "_to_disk", slow)
    monkeypatch.setattr(checkpoint, "_write", noted)
    monkeypatch.setattr(loop, "train_epoch", watched)
    result = train(settings(inputs, tmp_path, num_epochs=3))
    assert seen == []
    dice = values(result, "val", "dice")[1:]
    best = [epoch for epoch in (1, 2, 3) if dice[epoch - 1] > max([-1, *dice[: epoch - 1]])]
    expected = [
        (name, epoch)
        for epoch in (1, 2, 3)
        for name in (["checkpoint_best"] if epoch in best else []) + [f"checkpoint_epoch_{epoch}"]
    ]
    assert written == expected
    for name, _ in expected:
        checkpoint.check_complete(result.directory / name)


@pytest.mark.parametrize(("failing", "trained"), [(1, [1, 2]), (2, [1, 2, 3]), (3, [1, 2, 3])])
def test_a_failed_write_ends_the_run_one_epoch_later_or_at_its_end(inputs, tmp_path, monkeypatch, failing, trained):
    def save_adapter(directory, *arguments):
        if directory.name == f"checkpoint_epoch_{failing}.partial":
            full_disk()
        write(directory, *arguments)

    write = lora.save_adapter
    monkeypatch.setattr(lora, "save_adapter", save_adapter)
    config = settings(inputs, tmp_path, num_epochs=3)
    with pytest.raises(UserError) as error:
        train(config)
    run = only_run(tmp_path)
    assert str(error.value) == (
        f"{run}/checkpoint_epoch_{failing}: the checkpoint could not be written (OSError: [Errno 28] No space left on "
        "device); an earlier one is intact; free some space or set another output_dir, then resume"
    )
    assert (tmp_path / "training.log").read_text().splitlines()[-1] == f"error: {error.value}"
    assert values(run, "train", "epoch") == trained
    kept = {path.name for path in run.glob("checkpoint_*")}
    assert kept == {"checkpoint_best", *(f"checkpoint_epoch_{epoch}" for epoch in range(1, failing))}
    monkeypatch.undo()
    if failing < 3:
        assert train(dataclasses.replace(config, resume="auto")).directory == run


def test_a_failed_write_is_told_after_an_epoch_that_saves_nothing(inputs, tmp_path, monkeypatch):
    def written_by_then(run, epoch):
        train_epoch(run, epoch)
        if epoch == 3:
            futures.wait([run.writer._job])

    train_epoch = loop.train_epoch
    monkeypatch.setattr(loop, "train_epoch", written_by_then)
    monkeypatch.setattr(lora, "save_adapter", full_disk)
    with pytest.raises(UserError, match="checkpoint_epoch_2: the checkpoint could not be written"):
        train(settings(inputs, tmp_path, num_epochs=6, save_every=2, validate_every=6))
    assert values(only_run(tmp_path), "train", "epoch") == [1, 2, 3]


@pytest.mark.parametrize("reason", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
@pytest.mark.parametrize("fails", [False, True])
def test_whatever_ends_the_run_a_write_in_progress_ends_first(inputs, tmp_path, monkeypatch, reason, fails):
    release, to_disk, train_epoch = threading.Event(), checkpoint._to_disk, loop.train_epoch

    def slow(path):
        assert release.wait(PATIENCE_S)
        if fails:
            full_disk()
        to_disk(path)

    def stop(run, epoch):
        if epoch == 2:
            shut_down = run.writer._thread.shutdown
            run.writer._thread.shutdown = lambda: (release.set(), shut_down())
            raise reason
        train_epoch(run, epoch)

    monkeypatch.setattr(checkpoint, "_to_disk", slow)
    monkeypatch.setattr(loop, "train_epoch", stop)
    with pytest.raises(reason):
        train(settings(inputs, tmp_path))
    run, log = only_run(tmp_path), (tmp_path / "training.log").read_text().splitlines()
    assert log[-1].startswith("Failed after step 2" if reason is ZeroDivisionError else "Interrupted after step 2")
    assert ("error: " in log[-2] and "checkpoint_best: the checkpoint could not be written" in log[-2]) is fails
    assert {path.name for path in run.glob("checkpoint_*")} == (
        set() if fails else {"checkpoint_best", "checkpoint_epoch_1"}
    )
    for path in run.glob("checkpoint_*"):
        checkpoint.check_complete(path)


def test_a_model_too_large_for_the_gpu_says_so(inputs, tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(published, "load", full)
    with pytest.raises(UserError, match="while the model was loaded .CUDA out of memory.; another program may"):
        train(settings(inputs, tmp_path))


def test_weights_that_do_not_learn_stop_the_run_after_the_first_step(inputs, tmp_path):
    with pytest.raises(DivergedError, match="14 LoRA B matrices got no update: base_model.*layers.0"):
        train(settings(inputs, tmp_path, learning_rate=1e-300))


@pytest.mark.parametrize(("epoch", "reason"), [(0, KeyboardInterrupt), (1, KeyboardInterrupt), (1, SystemExit)])
def test_an_interrupted_run_is_closed_and_says_so(inputs, tmp_path, epoch, reason):
    def stop(row):
        if row["epoch"] == epoch:
            raise reason

    with pytest.raises(reason):
        train(settings(inputs, tmp_path), stop)
    log = (tmp_path / "training.log").read_text()
    assert log.splitlines()[-1] == f"Interrupted after step {2 * epoch}"
    if epoch == 0:
        assert list(tmp_path.glob("lora_sft_*")) == [], "nothing was learned"
    else:
        assert (only_run(tmp_path) / "training.log").read_text() == log
        assert checkpoint.read_progress(only_run(tmp_path) / "checkpoint_best").epoch == 1


def test_an_image_that_vanishes_is_named(inputs, tmp_path):
    data_root = small_runs.write_images(tmp_path / "data")

    def remove(row):
        (data_root / "images" / "v2.png").unlink()

    with pytest.raises(UserError, match="v2.png"):
        train(settings(inputs, tmp_path / "out", data_root=str(data_root), feature_cache="off"), remove)


# What the embedded base learns in four steps, recorded: fp32, without dropout, five of the demo's images

LOSSES = [0.78618, 0.51610, 0.30538, 0.33283]
DICE = [0.27402, 0.41257, 0.56194]  # of the base, and after each epoch
DICE_BEST = [0.31294, 0.42640, 0.56746]


def test_embedded_base_learns_what_it_learned_when_this_was_written(tmp_path):
    synthetic.write_dataset(tmp_path / "data", "demo", count=5, seed=7)
    learning = {"lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0, "learning_rate": 1e-3, "batch_size": 2}
    learning |= {"train_modules": ("text_hidden_fcs", "mask_decoder"), "num_epochs": 2, "precision": "fp32"}
    logging = {"save_every": 1, "log_every_steps": 1, "seg_rate_samples": 2, "tensorboard": False}
    places = {"data_root": str(tmp_path / "data"), "output_dir": str(tmp_path / "out")}
    config = TrainConfig(**places, **learning, **logging, gradient_checkpointing=False)
    result = train(config)

    def check():
        assert values(result, "step", "loss") == pytest.approx(LOSSES, rel=1e-3)
        assert values(result, "val", "dice") == pytest.approx(DICE, rel=1e-3)
        assert values(result, "val", "dice_best") == pytest.approx(DICE_BEST, rel=1e-3)
        assert values(result, "val", "seg_rate") == [1.0, 1.0, 1.0]

    check()
    picture = result.directory / "comparison.png"
    drawn = picture.read_bytes()
    interrupted(result)
    picture.unlink()
    assert train(dataclasses.replace(config, resume="auto")) == result
    check()
    assert picture.read_bytes() == drawn, "the base's masks are computed again, with the adapter off"
    assert (result.base_dice, result.base_dice_best, result.epoch) == pytest.approx(
        (DICE[0], DICE_BEST[0], 2), rel=1e-3
    )


if __name__ == "__main__":
    validation.MAX_ANSWER_TOKENS = FEW_TOKENS
    {"ranks": part_ranks, "killed": part_killed, "killed writing": part_killed_writing}[sys.argv[1]](
        *map(Path, sys.argv[2:])
    )
