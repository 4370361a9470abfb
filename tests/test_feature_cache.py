"""Runs with frozen features on the GPU, in host memory, on the disk or nowhere: the same figures, computed once."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import small_qwen
import small_runs
import small_sa2va
import torch
import toy
from PIL import Image
from small_runs import NAMES, only_run, rows, settings

import sft.data
from sft import encoders, engine, feature_store, provenance, validation
from sft import train as loop
from sft.config import TrainConfig, UserError, parse_args
from sft.encoders import Encoders, Sizes
from sft.feature_store import DiskStore
from sft.features import Features, Item
from sft.model import published
from sft.model.preprocess import IMAGENET_MEAN, IMAGENET_STD
from sft.train import train

FEW_TOKENS = 3
SAM2_BYTES = 4 * (4 * 32 * 32 + 8 * 16 * 16 + 32 * 8 * 8)  # of the small model, after conv_s0 and conv_s1


def part_two_ranks(inputs, out):
    """One of two ranks; writes how many images it encoded in each of two runs."""
    counts, encode = [], Encoders.encode

    def counted(self, loaded):
        counts.append(sum(len(one.pixels) for one in loaded))
        return encode(self, loaded)

    Encoders.encode = counted
    config = settings(inputs, out / "run", batch_size=1, feature_cache_dir=str(out / "cache"), feature_cache="host")
    found = []
    for directory in ("run", "again"):
        counts.clear()
        train(dataclasses.replace(config, output_dir=str(out / directory)))
        found.append(sum(counts))
    counts.clear()
    with pytest.MonkeyPatch.context() as patch:  # the disk is full: each rank needs all of them in its own memory
        patch.setattr(feature_store, "free_disk_bytes", lambda root: 0)
        train(dataclasses.replace(config, output_dir=str(out / "full"), feature_cache_dir=str(out / "other")))
    found.append(sum(counts))
    rank = engine.gather_objects(None) and torch.distributed.get_rank()
    (out / f"rank{rank}.json").write_text(json.dumps(found))
    engine.barrier()
    engine.shut_down()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return small_runs.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module", autouse=True)
def alone():
    """The process group of these runs ends with the file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "MAX_ANSWER_TOKENS", FEW_TOKENS)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        yield
        engine.shut_down()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Every test begins with an empty cache."""
    monkeypatch.setenv("SA2VA_SFT_CACHE", str(tmp_path / "own"))
    return tmp_path / "own" / "features"


@pytest.fixture
def encoded(monkeypatch):
    """The list of how many images each call of the encoders took."""
    counts, encode = [], Encoders.encode

    def counted(self, loaded):
        entries = encode(self, loaded)
        counts.append(len(entries))
        return entries

    monkeypatch.setattr(Encoders, "encode", counted)
    return counts


@pytest.fixture(scope="module")
def off(inputs, tmp_path_factory):
    """Rows of runs that compute features in every step."""
    made = {}

    def run(**changes):
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            out = tmp_path_factory.mktemp("off")
            made[key] = rows(train(settings(inputs, out, feature_cache="off", **changes)))
        return made[key]

    return run


def log_of(directory):
    return (directory / "training.log").read_text()


def entries_in(cache):
    return sorted(cache.glob("v1-*/*.safetensors"))


# The same figures


@pytest.mark.parametrize("place", ["auto", "host", "disk"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"augment": True}, {"lora_scope": ("sam2_encoder",)}, {"train_modules": ("mask_decoder",)}],
    ids=["plain", "augment", "encoder trains", "decoder trains"],
)
def test_every_place_gives_the_figures_of_none(inputs, tmp_path, off, place, changes):
    """To the last digit: on a CPU images are encoded one by one, so no neighbour changes their rounding."""
    assert rows(train(settings(inputs, tmp_path, feature_cache=place, **changes))) == off(**changes)


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["gpu", "host", "disk"])
def test_places_agree_on_a_gpu(inputs, tmp_path, place):
    """Images are encoded in other company than without a cache: bf16 rounds otherwise, the run is the same."""
    expected = train(settings(inputs, tmp_path / "off", feature_cache="off", precision="bf16"))
    result = train(settings(inputs, tmp_path / place, feature_cache=place, precision="bf16"))
    for one, other in zip(rows(result, "step"), rows(expected, "step"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-2)
    again = train(settings(inputs, tmp_path / "again", feature_cache=place, precision="bf16"))
    assert rows(again, "step")[0]["loss"] == rows(result, "step")[0]["loss"], "the same entries"


def test_zero3_fills_and_reads_too(inputs, tmp_path, off):
    result = train(settings(inputs, tmp_path, feature_cache="disk", deepspeed_config="zero3"))
    losses_of = [row["loss"] for row in rows(result, "step")]
    assert losses_of == pytest.approx([row["loss"] for row in off() if row["kind"] == "step"], rel=1e-5)


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "qwen3_vl"])
def test_images_encoded_together_are_those_encoded_alone(family):
    """Several images at once, of different sizes: 1e-5 apart in fp32, since sums may run in another order."""
    if family == "internvl":
        model, preprocess = small_sa2va.model(), small_sa2va.preprocess()
    else:
        model, preprocess = small_qwen.model(family), small_qwen.preprocess(family)
    config = TrainConfig(precision="fp32", num_workers=0)
    pictures = small_sa2va.images(5)
    one_by_one = Encoders(model, preprocess, config, torch.device("cpu"))
    together = Encoders(model, preprocess, config, torch.device("cpu"))
    together.sizes = Sizes(images=5, sam2_images=2, vision_tokens=sum(_counts(preprocess, pictures)[:3]))
    with torch.no_grad():
        alone = one_by_one.encode([one_by_one.load([picture]) for picture in pictures])
        made = together.encode([together.load(pictures[:2]), together.load(pictures[2:])])
    for entry, expected, picture in zip(made, alone, pictures, strict=True):
        assert entry.keys() == expected.keys()
        assert ("deepstack" in entry) == (family == "qwen3_vl")
        for name, tensor in expected.items():
            torch.testing.assert_close(entry[name], tensor, rtol=1e-4, atol=1e-5)
        layout = preprocess.image_layout(*picture.shape[:2])
        assert together.entry_bytes(layout) == sum(tensor.nbytes for tensor in entry.values())


def test_memory_that_ends_is_taken_from_the_recorded_encoder_before_anyone_hears_of_it(monkeypatch):
    """As on a GPU, where a recording holds its memory; without one the error is the caller's."""
    encoders = Encoders(
        small_sa2va.model(), small_sa2va.preprocess(), TrainConfig(precision="fp32"), torch.device("cpu")
    )
    given = [encoders.load([picture]) for picture in small_sa2va.images(2)]
    expected, vision_of = encoders.encode(given), encoders.model.vision_features_of

    def short_beside_a_recording(images):
        if encoders._sam2_parts._recordings:
            raise torch.OutOfMemoryError
        return vision_of(images)

    def short(images):
        raise torch.OutOfMemoryError

    # The model is other tests' too.
    monkeypatch.setattr(encoders.model, "vision_features_of", short_beside_a_recording)
    encoders._sam2_parts._recordings[torch.Size([0])] = None
    for entry, own in zip(encoders.encode(given), expected, strict=True):
        assert all(torch.equal(entry[name], own[name]) for name in own)
    assert not encoders._sam2_parts._recordings
    monkeypatch.setattr(encoders.model, "vision_features_of", short)
    with pytest.raises(torch.OutOfMemoryError):
        encoders.encode(given)


def _counts(preprocess, pictures):
    return [int(np.prod(preprocess.image_layout(*picture.shape[:2]))) for picture in pictures]


def test_normalising_by_table_is_the_published_arithmetic_to_the_last_bit():
    levels_HW3 = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 3, axis=-1)
    preprocess = dataclasses.replace(small_sa2va.preprocess(), sam2_px=16)
    expected = (torch.from_numpy(levels_HW3).float() / 255.0 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    assert torch.equal(preprocess.sam2_image(levels_HW3), expected.permute(2, 0, 1))
    pixels = preprocess.sam2_pixels(levels_HW3)[None]
    assert torch.equal(preprocess.normalise_sam2(pixels, torch.bfloat16)[0], expected.permute(2, 0, 1).bfloat16())


# Once


@pytest.mark.parametrize(
    "changes",
    [{"lora_dropout": 0.2}, {"train_modules": ("mask_decoder",), "batch_size": 1}],
    ids=["LoRA", "decoder trains on one at a time"],
)
def test_a_second_run_reads_what_the_first_wrote(inputs, tmp_path, encoded, own_cache, changes):
    """The second one reads entries while it trains, also while layers hold others for their backward pass."""
    config = settings(inputs, tmp_path / "one", **changes)
    first = train(config)
    assert sum(encoded) == len(NAMES) == len(entries_in(own_cache))
    assert "Frozen features: 6 of 6 computed" in log_of(tmp_path / "one")
    for place in ("auto", "host", "disk"):
        second = train(dataclasses.replace(config, output_dir=str(tmp_path / place), feature_cache=place))
        assert rows(second) == rows(first)
        assert "Frozen features: 0 of 6 computed" in log_of(tmp_path / place)
    assert sum(encoded) == len(NAMES), "also the validation of the base computes nothing"


def test_other_weights_or_settings_have_entries_of_their_own(inputs, tmp_path, encoded, own_cache):
    train(settings(inputs, tmp_path, num_epochs=1))
    other = tmp_path / "model"
    small_sa2va.write(other, seed=1)
    train(settings(inputs, tmp_path, num_epochs=1, model_path=str(other)))
    train(settings(inputs, tmp_path, num_epochs=1, train_modules=("mask_decoder",)))
    train(settings(inputs, tmp_path, num_epochs=1, precision="bf16"))
    assert sum(encoded) == 4 * len(NAMES)
    assert len(list(own_cache.glob("v1-*"))) == 4
    about = json.loads(next(own_cache.glob("v1-*/about.json")).read_text())
    assert about["model_path"] in (str(inputs / "model"), str(other))


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_what_a_preprocess_was_asked_before_names_no_other_store(family):
    """`batch_size auto` asks for prompts and pixels before the store is chosen."""
    model = small_sa2va.model() if family == "internvl" else small_qwen.model(family)
    preprocess = small_sa2va.preprocess() if family == "internvl" else small_qwen.preprocess(family)
    encoders = Encoders(model, preprocess, TrainConfig(precision="fp32"), torch.device("cpu"))
    before, _ = encoders.scope()
    picture = small_sa2va.images(1)[0]
    preprocess.prompt(["Where?"], [preprocess.vision_input(picture).layout])
    preprocess.sam2_image(picture)
    assert encoders.scope()[0] == before
    encoders.preprocess = dataclasses.replace(preprocess, sam2_px=preprocess.sam2_px * 2)
    assert encoders.scope()[0] != before


@pytest.mark.parametrize(
    "file", ["sft/data/read.py", "sft/data/views.py", "sft/encoders.py", "sft/model/preprocess.py"]
)
def test_an_edit_of_what_reads_or_encodes_images_names_another_store(file, tmp_path, monkeypatch):
    """Otherwise entries of before a mended reading of, say, 16-bit images would be used for ever."""
    encoders = Encoders(
        small_sa2va.model(), small_sa2va.preprocess(), TrainConfig(precision="fp32"), torch.device("cpu")
    )
    before, of_file = encoders.scope()[0], feature_store.file_fingerprint
    edited = lambda path: of_file(path) + ("edited" if str(path).endswith(file) else "")  # noqa: E731
    monkeypatch.setattr(feature_store, "file_fingerprint", edited)
    assert encoders.scope()[0] != before


def test_an_interrupted_filling_goes_on(inputs, tmp_path, monkeypatch, own_cache, off):
    put, done = DiskStore.put, []

    def interrupted(self, key, entry):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(key)
        put(self, key, entry)

    monkeypatch.setattr(DiskStore, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(settings(inputs, tmp_path, feature_cache="disk"))
    assert list(tmp_path.glob("lora_sft_*")) == [] and len(entries_in(own_cache)) == 3
    monkeypatch.setattr(DiskStore, "put", put)
    result = train(settings(inputs, tmp_path, feature_cache="disk"))
    assert "Frozen features: 3 of 6 computed" in log_of(tmp_path)
    assert rows(result) == off()


def test_groups_do_not_depend_on_what_is_there(inputs, tmp_path, monkeypatch, encoded, own_cache):
    """Where images are encoded together, all of a group are, so that an entry has the same bits after an interrupt."""
    monkeypatch.setitem(encoders.SIZES, "cpu", Sizes(images=2, sam2_images=2, vision_tokens=10_000))
    train(settings(inputs, tmp_path, num_epochs=1))
    assert encoded == [2, 2, 2]
    before = {path.name: path.read_bytes() for path in entries_in(own_cache)}
    entries_in(own_cache)[0].unlink()
    train(settings(inputs, tmp_path, num_epochs=1))
    assert encoded == [2, 2, 2, 2]
    assert {path.name: path.read_bytes() for path in entries_in(own_cache)} == before


def test_a_damaged_entry_is_computed_again_and_named(inputs, tmp_path, encoded, own_cache, off):
    train(settings(inputs, tmp_path / "one"))
    damaged, gone, *_ = entries_in(own_cache)
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    gone.unlink()
    result = train(settings(inputs, tmp_path / "two"))
    assert rows(result) == off()
    text = log_of(tmp_path / "two")
    assert "Frozen features: 1 of 6 computed" in text
    assert text.count(f"warning: {damaged}: not used, its checksum is wrong; computed again") == 1
    assert sum(encoded) == len(NAMES) + 2
    assert len(entries_in(own_cache)) == 6 and damaged.read_bytes() != content


def test_a_cache_deleted_in_the_middle_is_computed_again(inputs, tmp_path, own_cache, off):
    def delete(row):
        shutil.rmtree(own_cache, ignore_errors=True)

    assert rows(train(settings(inputs, tmp_path, feature_cache="disk"), delete)) == off()


def test_resuming_without_the_cache_changes_no_figure(inputs, tmp_path, own_cache):
    config = settings(inputs, tmp_path, lora_dropout=0.2, save_every=1, augment=True)
    whole = train(config)
    before = rows(whole)
    for kept in whole.directory.glob("checkpoint_*"):
        if kept.name != "checkpoint_epoch_1":
            shutil.rmtree(kept)
    shutil.rmtree(own_cache)
    elsewhere = {"feature_cache": "host", "feature_cache_dir": str(tmp_path / "elsewhere")}
    train(dataclasses.replace(config, resume="auto", **elsewhere))
    assert rows(whole) == before and list((tmp_path / "elsewhere").glob("v1-*"))


def test_two_ranks_share_the_filling_and_each_fills_alone_without_a_disk(inputs, tmp_path):
    toy.run_ranks(__file__, str(inputs), str(tmp_path))
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [one[0] for one in found] == [3, 3], "each rank its half"
    assert [one[1] for one in found] == [0, 0]
    assert [one[2] for one in found] == [6, 6], "memory is not shared"
    tables = [rows(only_run(tmp_path / name)) for name in ("run", "again", "full")]
    assert tables[0] == tables[1] == tables[2]


# What is kept


def test_pairs_of_one_image_share_an_entry_and_keep_their_own_masks_and_questions(inputs, tmp_path, encoded, own_cache):
    data = tmp_path / "data"
    shutil.copytree(inputs / "data", data)
    shutil.copyfile(data / "images" / "v0.png", data / "images" / "v2.png")
    mask = np.array(Image.open(data / "masks" / "v0.png"))
    Image.fromarray(mask[:, ::-1].copy()).save(data / "masks" / "v2.png")
    config = settings(inputs, tmp_path / "out", data_root=str(data), feature_cache="disk", num_epochs=1)
    train(config)
    assert sum(encoded) == len(entries_in(own_cache)) == 5
    features = made(inputs, config)
    pairs = [sft.data.Pair(name, data / "images" / f"{name}.png", data / "masks" / f"{name}.png") for name in NAMES]
    pairs[2] = dataclasses.replace(pairs[2], phrase="thin dark vessels")
    (batch,) = features.batches([[Item(pairs[0]), Item(pairs[2])]])
    features.close()
    tokens = batch.vision.tokens_MC.chunk(2)
    assert torch.equal(*tokens) and torch.equal(batch.masks[0].flip(1), batch.masks[1])
    assert not torch.equal(*batch.prompt.input_ids_BL)


def made(inputs, config):
    loaded = published.load(str(inputs / "model"), dtype=torch.float32)
    return Features(loaded.model, loaded.preprocess, config, torch.device("cpu"))


def test_an_image_turned_by_its_tag_is_not_the_stored_one(inputs, tmp_path):
    """The same file beside a mask of the stored size and one of the turned size: two images."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(inputs / "data" / "images" / "v0.png").save(tmp_path / "image.png", exif=exif)
    Image.fromarray(np.zeros((96, 128), np.uint8)).save(tmp_path / "stored.png")
    Image.fromarray(np.zeros((128, 96), np.uint8)).save(tmp_path / "turned.png")
    features = made(inputs, settings(inputs, tmp_path))
    items = [
        Item(sft.data.Pair(name, tmp_path / "image.png", tmp_path / f"{name}.png")) for name in ("stored", "turned")
    ]
    assert len({features._key(item) for item in items}) == 2
    (batch,) = features.batches([items])
    features.close()
    assert not torch.equal(*batch.vision.tokens_MC.chunk(2))


def test_augment_keeps_the_views_that_its_epochs_use_and_no_others(inputs, tmp_path, encoded, own_cache):
    config = settings(inputs, tmp_path, augment=True, num_epochs=3, seed=3)
    result = train(config)
    used = set()
    for epoch in range(1, 4):
        generator = torch.Generator().manual_seed(3 * 100_003 + epoch)
        order = torch.randperm(4, generator=generator).tolist()
        views = torch.randint(8, (4,), generator=generator).tolist()
        used |= {(index, views[index]) for index in order}
    assert sum(encoded) == len(entries_in(own_cache)) == len(used) + 2, "and the validation images as they are"
    assert result.epoch >= 1
    assert f" GiB for {len(used) + 2} views of 6 images; " in log_of(tmp_path)


def test_an_encoder_that_trains_keeps_its_images_and_says_so(inputs, tmp_path, own_cache):
    train(settings(inputs, tmp_path, lora_scope=("language_model", "sam2_encoder"), num_epochs=1))
    assert "SAM2's encoder trains, so it is not among them: its input images are kept" in log_of(tmp_path)
    from safetensors.torch import load_file

    entry = load_file(entries_in(own_cache)[0])
    assert entry.keys() == {"vision_tokens", "image"}
    assert entry["image"].dtype == torch.uint8 and entry["image"].shape == (3, 128, 128)


def test_encoders_that_rest_are_fetched_to_compute_and_put_back(inputs, tmp_path):
    config = settings(inputs, tmp_path)
    features = made(inputs, config)
    parts, moves = features._encoders, []
    parts._move = lambda device: moves.append(str(device)) or 7
    assert parts.rest() == 7
    pair = sft.data.Pair("v0", *(inputs / "data" / kind / "v0.png" for kind in ("images", "masks")))
    list(features.batches([[Item(pair)]]))
    features.close()
    assert moves == ["cpu", "cpu", "cpu"]  # here the device is the CPU, too


# Where


def test_auto_takes_the_first_place_with_room_and_says_why(inputs, tmp_path, monkeypatch):
    entry = 13 * 4 * 32 * 4 + SAM2_BYTES  # 13 tiles of 4 tokens
    need = 6 * entry
    rooms = {
        "host": (0, need / 0.8 + 1, 0),
        "disk": (0, need / 0.8 - 1, need / 0.9 + 1),
        "off": (0, need / 0.8 - 1, need / 0.9 - 1),
    }
    for place, (gpu, host, disk) in rooms.items():
        monkeypatch.setattr(feature_store, "free_gpu_bytes", lambda device, free=gpu: int(free))
        monkeypatch.setattr(feature_store, "free_host_bytes", lambda free=host: int(free))
        monkeypatch.setattr(feature_store, "free_disk_bytes", lambda root, free=disk: int(free))
        cache = {"feature_cache_dir": str(tmp_path / f"cache {place}")}
        train(settings(inputs, tmp_path / place, num_epochs=1, **cache))
        (line,) = [line for line in log_of(tmp_path / place).splitlines() if "for 6 images" in line]
        words = {"host": "in host memory, not on the disk", "disk": "on the disk", "off": "computed anew in every step"}
        assert words[place] in line and "gpu: there is none" in line
        assert bool(list((tmp_path / f"cache {place}").glob("v1-*/*.safetensors"))) == (place == "disk")


def test_a_wanted_place_without_room_is_refused_before_the_first_step(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "free_host_bytes", lambda: 2**10)
    with pytest.raises(
        UserError, match="^feature_cache host: features take .* for [0-9]+ views of 6 images; host: .*augment"
    ):
        train(settings(inputs, tmp_path, feature_cache="host", augment=True))
    with pytest.raises(UserError, match="feature_cache gpu: .*; gpu: there is none; use --feature_cache disk"):
        train(settings(inputs, tmp_path, feature_cache="gpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["training.log"]
    assert log_of(tmp_path).splitlines()[-1].startswith("error: feature_cache gpu")


def test_a_place_that_cannot_be_written_is_named(inputs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="^feature_cache_dir .*file: .* is a file; name another folder"):
        loop.train(parse_and_check(inputs, tmp_path, "file"))


def parse_and_check(inputs, tmp_path, name):
    from sft.config import check_paths

    config = settings(inputs, tmp_path / "out", feature_cache_dir=str(tmp_path / name))
    check_paths(config)
    return config


def test_the_old_value_is_refused_with_what_stands_in_its_place(tmp_path):
    expected = "feature_cache = memory is not allowed: .*; memory is no more, give auto, or host"
    with pytest.raises(UserError, match=expected):
        TrainConfig(feature_cache="memory")
    with pytest.raises(UserError, match=expected):
        parse_args(["--feature_cache", "memory"])


def test_a_run_of_before_is_resumed_and_read(inputs, tmp_path):
    config = settings(inputs, tmp_path, num_epochs=2)
    result = train(config)
    file = result.directory / "config.json"
    content = json.loads(file.read_text()) | {"feature_cache": "memory"}
    content.pop("feature_cache_dir")
    file.write_text(json.dumps(content))
    assert provenance.settings_of_run(result.directory).feature_cache == "auto"
    provenance.check_same_settings(file, dataclasses.replace(config, feature_cache="disk"))


def test_a_dry_run_tells_the_decision_and_leaves_nothing(inputs, tmp_path, capsys, own_cache):
    train(settings(inputs, tmp_path, dry_run=True, feature_cache="disk"))
    out = capsys.readouterr().out
    assert "Frozen features: computed once and kept on the disk, 0.0 GiB for 6 images" in out
    assert "Frozen features: 3 of 3 computed" in out
    assert f"Feature cache: {own_cache} holds no features" in out
    assert not own_cache.exists()
    train(settings(inputs, tmp_path / "run"))
    train(settings(inputs, tmp_path, dry_run=True))
    assert "delete any with rm -r" in capsys.readouterr().out


def test_an_unreadable_image_ends_the_filling_with_its_name(inputs, tmp_path, monkeypatch):
    data = small_runs.write_images(tmp_path / "data")
    check = sft.data._inspect

    def break_one(root, progress=None):
        found = check(root, progress=progress)
        (data / "images" / "v3.png").write_bytes(b"no picture")
        return found

    monkeypatch.setattr(sft.data, "_inspect", break_one)
    with pytest.raises(UserError, match=r"v3\.png: cannot be decoded"):
        train(settings(inputs, tmp_path / "out", data_root=str(data)))
    assert list((tmp_path / "out").glob("lora_sft_*")) == []


if __name__ == "__main__":
    validation.MAX_ANSWER_TOKENS = FEW_TOKENS
    part_two_ranks(*map(Path, sys.argv[1:]))
