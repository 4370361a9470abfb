"""Features: each image is encoded once and comes out as the encoders give it, in every view and whatever is kept."""

import dataclasses
import errno
import os
import shutil
import threading

import numpy as np
import pytest
import small_runs
import torch
from small_runs import NAMES, SIZES_HW

from sft import engine
from sft import features as room
from sft.config import TrainConfig, UserError
from sft.data import Pair, check, read
from sft.data.views import VIEWS, turned
from sft.feature_store import disk as disk_room
from sft.features import Features, Item
from sft.model import lora, published
from sft.model.sa2va_internvl import Sa2VAInternVL

GUARD_S = 30  # for what a test waits for; nothing takes that long
ALONE = engine.Ranks(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def alone():
    """Places are chosen together by all ranks: here there is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "gather_objects", lambda value: [value])
        patch.setenv("WORLD_SIZE", "1")
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return small_runs.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def pairs(inputs):
    return all_pairs(inputs)


@pytest.fixture
def made(inputs, monkeypatch, tmp_path):
    """A function that makes Features, and which calls its encoders have had, by name."""
    calls, opened = {"vision_features_of": 0, "sam2_features": 0}, []

    def counted(name, method):
        def call(self, images, **keywords):
            calls[name] += len(images)
            return method(self, images, **keywords)

        return call

    for name in calls:
        monkeypatch.setattr(Sa2VAInternVL, name, counted(name, getattr(Sa2VAInternVL, name)))

    def make(keeps=True, **changes):
        changes = {"feature_cache": "host" if keeps else "off", "feature_cache_dir": str(tmp_path / "cache")} | changes
        config = TrainConfig(precision="fp32", num_workers=0, lora_rank=2, **changes)
        loaded = published.load(str(inputs / "model"), dtype=torch.float32)
        peft_model = lora.wrap(loaded.model, config)
        opened.append(Features(loaded.model, loaded.preprocess, config, torch.device("cpu")))
        if keeps:
            opened[-1].choose([Item(pair) for pair in all_pairs(inputs)], ALONE, 0)
        opened[-1].calls, opened[-1].loaded, opened[-1].peft_model = calls, loaded, peft_model
        opened[-1].config = config
        return opened[-1]

    yield make
    for features in opened:
        features.close()


def all_pairs(inputs):
    data = inputs / "data"
    return [Pair(name, data / "images" / f"{name}.png", data / "masks" / f"{name}.png") for name in NAMES]


def plan(pairs, size, view=0):
    return [[Item(pair, view) for pair in pairs[start : start + size]] for start in range(0, len(pairs), size)]


def only(features, items):
    (batch,) = features.batches([items])
    return batch


# Readers


@pytest.mark.parametrize(
    ("processors", "ranks", "readers"),
    [(1, 1, 1), (6, 1, 6), (7, 2, 3), (2, 4, 1), (16, 1, 16), (96, 1, 16), (96, 8, 12)],
)
def test_auto_is_a_reader_for_each_processor_of_this_rank_and_16_at_most(monkeypatch, processors, ranks, readers):
    """Ranks of one machine share what it has; more readers only wait for each other."""
    monkeypatch.setattr(room, "processors", lambda: processors)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)  # of a run before
    monkeypatch.setenv("WORLD_SIZE", "64")  # over many machines
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert room._reader_count(TrainConfig(num_workers="auto")) == readers


@pytest.mark.parametrize(("given", "readers"), [(0, 1), (1, 1), (5, 5), (40, 40)])
def test_a_given_number_of_readers_is_taken_as_it_is(monkeypatch, given, readers):
    monkeypatch.setattr(room, "processors", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert room._reader_count(TrainConfig(num_workers=given)) == readers


# Once


def test_each_image_is_encoded_once_in_a_run(made, pairs):
    features = made()
    for _ in range(3):
        assert len(list(features.batches(plan(pairs, 2)))) == 3
    assert features.calls == {"vision_features_of": 6, "sam2_features": 6}


def test_with_a_full_disk_each_rank_computes_all_and_says_so(made, pairs, monkeypatch):
    """What other ranks have computed does not reach this one then."""
    features = made()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk_room.os, "replace", full)
    text = features.fill([Item(pair) for pair in pairs], engine.Ranks(0, 0, 2, torch.device("cpu")))
    assert features.calls == {"vision_features_of": 6, "sam2_features": 6}
    assert "of 6 computed" in text
    (told,) = features.rejected()
    assert "No space left" in told and "kept in memory for this run" in told


def test_an_image_that_comes_again_before_it_is_encoded_is_read_and_encoded_once(made, pairs, monkeypatch):
    """The last batch of an epoch is filled up with the first images, and two batches are read ahead."""
    reads = []
    load = room.read_image_of
    monkeypatch.setattr(room, "read_image_of", lambda pair, mask: reads.append(pair.name) or load(pair, mask))
    features = made()
    items = [Item(pair) for pair in pairs[:3]]
    batches = list(features.batches([items[:2], [items[2], items[0]], [items[0], items[0]]]))
    assert [[item.pair.name for item in batch.items] for batch in batches] == [["v0", "v1"], ["v2", "v0"], ["v0", "v0"]]
    assert features.calls["sam2_features"] == 3
    assert sorted(reads) == ["v0", "v1", "v2"]


def test_sizes_that_the_check_found_save_a_look_at_every_mask_and_change_no_entry(made, pairs, monkeypatch):
    """A thousand masks take a second, in which the GPU would wait."""
    alone = made()
    found = check(pairs).sizes_hw
    reads: list[str] = []
    read_mask = room.read_mask
    monkeypatch.setattr(room, "read_mask", lambda pair: reads.append(pair.name) or read_mask(pair))
    features = made()
    assert len(reads) == len(pairs)
    told = Features(features.loaded.model, features.loaded.preprocess, features.config, torch.device("cpu"), found)
    reads.clear()
    told.choose([Item(pair) for pair in pairs], ALONE, 0)
    assert not reads
    assert [told._key(Item(pair)) for pair in pairs] == [alone._key(Item(pair)) for pair in pairs]
    told.close()


@pytest.mark.parametrize(
    "changes", [{}, {"text_weight": 0.1, "train_modules": ("mask_decoder",)}, {"lora_scope": ("sam2_encoder",)}]
)
def test_a_blank_batch_is_like_one_of_real_images_of_its_size_and_encoded_once(made, pairs, changes):
    features = made(keeps=False, **changes)
    blank, calls = features.blank(SIZES_HW[0], 3), dict(features.calls)
    assert calls == {"vision_features_of": 1, "sam2_features": 0 if "lora_scope" in changes else 1}
    real = only(features, [Item(pairs[0])] * 3)

    def shapes(value):
        """All tensors in it, by shape and dtype."""
        if isinstance(value, torch.Tensor):
            return [(tuple(value.shape), value.dtype)]
        parts = vars(value).values() if dataclasses.is_dataclass(value) else value
        return [shape for part in parts if not isinstance(part, bool | None) for shape in shapes(part)]

    for name in ("prompt", "vision", "sam2", "masks"):
        assert shapes(getattr(blank, name)) == shapes(getattr(real, name)) != []
    assert torch.equal(blank.prompt.input_ids_BL, real.prompt.input_ids_BL)


def test_off_reads_ahead_and_encodes_an_image_once_a_batch(made, pairs):
    features = made(keeps=False)
    items = [Item(pair) for pair in pairs[:2]]
    batches = list(features.batches([items, [items[0], items[0]]]))
    assert features.calls["sam2_features"] == 3
    assert torch.equal(batches[1].sam2.embedding_BDHW[0], batches[0].sam2.embedding_BDHW[0])
    assert torch.equal(batches[1].sam2.embedding_BDHW[1], batches[0].sam2.embedding_BDHW[0])


def test_off_keeps_nothing_and_gives_the_same(made, pairs):
    kept, off = made(), made(keeps=False)
    first = [only(kept, [Item(pair) for pair in pairs]) for _ in range(2)]
    calls = dict(off.calls)
    second = [only(off, [Item(pair) for pair in pairs]) for _ in range(2)]
    assert off.calls["sam2_features"] - calls["sam2_features"] == 2 * len(pairs)
    for batch in (*first, *second):
        assert torch.equal(batch.vision.tokens_MC, first[0].vision.tokens_MC)
        assert torch.equal(batch.sam2.embedding_BDHW, first[0].sam2.embedding_BDHW)
        assert all(map(torch.equal, batch.masks, first[0].masks))


def test_no_more_than_the_next_batches_are_read_ahead(made, pairs, monkeypatch):
    reads = []
    load = room.read_image_of
    monkeypatch.setattr(room, "read_image_of", lambda pair, mask: reads.append(pair.name) or load(pair, mask))
    features = made(keeps=False)
    batches = features.batches(plan(pairs, 1))
    next(batches)
    features.close()  # waits for what has begun
    assert set(reads) <= set(NAMES[: 1 + room.READ_AHEAD_BATCHES])


def test_off_decodes_an_image_once_as_far_as_host_memory_goes(made, pairs, monkeypatch):
    """Two of the images have room: later epochs decode only the others."""
    reads, load = [], room.read_image_of
    monkeypatch.setattr(room, "read_image_of", lambda pair, mask: reads.append(pair.name) or load(pair, mask))
    size = read(pairs[0]).image_HW3.nbytes
    monkeypatch.setattr(room.feature_store, "free_host_bytes", lambda: 4 * 2 * size + 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    features, epochs = made(keeps=False), []
    features.choose([], ALONE, 0)
    for _ in range(3):
        epochs.append(list(features.batches([[Item(pair)] for pair in pairs[:3]])))
    assert sorted(reads) == sorted([pair.name for pair in pairs[:3]] + 2 * [reads[2]])
    assert all(torch.equal(a.vision.tokens_MC, b.vision.tokens_MC) for a, b in zip(epochs[0], epochs[2], strict=True))


# What comes out


def test_a_batch_is_what_the_encoders_give(made, pairs):
    features = made()
    batch = only(features, [Item(pair) for pair in pairs[:2]])
    model, preprocess = features.loaded.model, features.loaded.preprocess
    images = [read(pair).image_HW3 for pair in pairs[:2]]
    tiles = [preprocess.tiles(image) for image in images]
    with torch.no_grad():
        tokens = model.vision_tokens(torch.cat(tiles))
        sam2 = model.sam2_features(torch.stack([preprocess.sam2_image(image) for image in images]))
    assert [len(one) for one in tiles] == [13, 13] and batch.vision.deepstack_KMC is None
    torch.testing.assert_close(batch.vision.tokens_MC, tokens.flatten(0, 1))
    for name in ("level0_BCHW", "level1_BCHW", "embedding_BDHW"):
        torch.testing.assert_close(getattr(batch.sam2, name), getattr(sam2, name))
    assert batch.sam2.projected and batch.prompt.labels_BL is None
    assert not any(part.requires_grad for part in (batch.vision.tokens_MC, batch.sam2.embedding_BDHW))


def test_masks_of_one_batch_keep_their_own_sizes(made, pairs):
    batch = only(made(), [Item(pair) for pair in pairs])
    assert [tuple(mask.shape) for mask in batch.masks] == list(SIZES_HW)
    for mask, pair in zip(batch.masks, pairs, strict=True):
        assert mask.dtype == torch.bool and np.array_equal(mask.numpy(), read(pair).mask_HW)


def test_prompts_ask_for_the_data_sets_own_phrase_or_the_configured_question(made, pairs):
    features = made(question="Where is it?", text_weight=0.1)
    named = dataclasses.replace(pairs[0], name="named", phrase="thin dark vessels")
    prompt = only(features, [Item(pairs[0]), Item(named)]).prompt
    preprocess = features.loaded.preprocess
    for row, question in enumerate(("Where is it?", "Please segment thin dark vessels in this image.")):
        ids = preprocess.question_ids(question, preprocess.layout(13))
        assert prompt.input_ids_BL[row, : len(ids)].tolist() == ids
        assert prompt.input_ids_BL[row, prompt.seg_position_B[row]] == preprocess.seg_token_id
    assert prompt.labels_BL is not None
    assert features.longest_prompt_tokens == prompt.input_ids_BL.shape[1]


def test_a_trained_mask_decoder_gets_the_maps_before_its_own_convolutions(made, pairs):
    features = made(train_modules=("mask_decoder",))
    sam2 = only(features, [Item(pairs[0])]).sam2
    assert not sam2.projected
    assert sam2.level0_BCHW.shape[1] == sam2.level1_BCHW.shape[1] == sam2.embedding_BDHW.shape[1] == 32


def test_a_trained_encoder_gets_images_and_its_lora_gets_gradients(made, pairs):
    features = made(lora_scope=("sam2_encoder",))
    batch = only(features, [Item(pair) for pair in pairs[:2]])
    assert isinstance(batch.sam2, torch.Tensor) and batch.sam2.shape == (2, 3, 128, 128)
    assert features.calls == {"vision_features_of": 2, "sam2_features": 0}, "vision tokens are still kept"
    output = features.peft_model(batch.prompt, batch.vision, batch.sam2)
    output.masks.logits_Bhw.square().mean().backward()
    assert features.calls["sam2_features"] == 2, "both images, by the model itself"
    trained = {name: p for name, p in features.peft_model.named_parameters() if p.requires_grad}
    assert all("vision_encoder" in name for name in trained)
    assert all(p.grad.abs().max() > 0 for name, p in trained.items() if "lora_B" in name)


def test_an_unreadable_file_is_named_in_its_turn(made, pairs, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    bad = Pair("bad", tmp_path / "bad.png", pairs[0].mask)
    batches = made().batches([[Item(pairs[0])], [Item(bad)]])
    assert next(batches).items == (Item(pairs[0]),)
    with pytest.raises(UserError, match=r"bad\.png"):
        next(batches)


# Views


def test_the_eight_views_are_all_flips_and_quarter_turns():
    pixels = np.arange(6).reshape(2, 3)
    views = [turned(pixels, view) for view in range(VIEWS)]
    assert np.array_equal(views[0], pixels)
    assert np.array_equal(views[1], [[2, 5], [1, 4], [0, 3]])  # a quarter turn against the clock
    assert np.array_equal(views[4], [[2, 1, 0], [5, 4, 3]])  # the mirror image
    assert len({(view.shape, view.tobytes()) for view in views}) == 8
    assert all(view.flags.c_contiguous for view in views)


@pytest.mark.parametrize("view", range(VIEWS))
def test_image_and_mask_turn_together(made, tmp_path, view):
    """A picture that is white where its mask is: whatever the view, they stay on each other."""
    from PIL import Image

    mask = np.zeros((56, 56), dtype=np.uint8)
    mask[4:20, 8:50] = 255
    mask[20:30, 8:14] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(np.repeat(mask[..., None], 3, axis=2)).save(tmp_path / "image.png")
    features = made(augment=True, lora_scope=("sam2_encoder",))
    batch = only(features, [Item(Pair("p", tmp_path / "image.png", tmp_path / "mask.png"), view)])
    shown = torch.nn.functional.interpolate(batch.sam2[:, :1], size=(56, 56), mode="area")[0, 0] > 0
    assert torch.equal(shown, batch.masks[0])
    assert np.array_equal(batch.masks[0].numpy(), turned(mask > 0, view))


def test_views_are_kept_apart(made, pairs):
    features = made(augment=True)
    views = [only(features, [Item(pairs[0], view)]) for view in (0, 1, 0, 1, 5)]
    assert features.calls["sam2_features"] == 3
    assert torch.equal(views[1].vision.tokens_MC, views[3].vision.tokens_MC)
    assert not torch.equal(views[0].vision.tokens_MC, views[1].vision.tokens_MC)
    assert views[1].masks[0].shape == views[0].masks[0].T.shape


# The end


def test_closing_ends_the_readers(made, pairs):
    before = threading.active_count()
    features = made()
    only(features, [Item(pairs[0])])
    assert threading.active_count() > before
    features.close()
    assert threading.active_count() == before


@pytest.fixture
def filled(made):
    """A function that fills Features for pairs whose images others have encoded: their masks are all that is read."""
    opened = []

    def make(pairs):
        items, first = [Item(pair) for pair in pairs], made()
        first.choose(items, ALONE, 0)
        first.fill(items, ALONE)
        first.close()
        model, preprocess, sizes = first.loaded.model, first.loaded.preprocess, check(pairs).sizes_hw
        opened.append(Features(model, preprocess, first.config, torch.device("cpu"), sizes))  # with one reader
        opened[-1].choose(items, ALONE, 0)
        return opened[-1], lambda: opened[-1].fill(items, ALONE)

    yield make
    for features in opened:
        features.close()


def test_closing_while_masks_are_read_behind_a_filling_ends_what_has_begun_and_begins_no_other(
    filled, pairs, monkeypatch
):
    """A run may end before the readers are through with the masks that `fill` has left to them."""
    features, fill = filled(pairs)
    begun, closing, reads, coming = threading.Event(), threading.Event(), [], []
    read_mask, submit = room.read_mask, features._readers.submit

    def held(pair):
        reads.append(pair.name)
        begun.set()
        assert closing.wait(GUARD_S)
        return read_mask(pair)

    monkeypatch.setattr(room, "read_mask", held)
    monkeypatch.setattr(features._readers, "submit", lambda *call: coming.append(submit(*call)))
    assert fill().startswith("Frozen features: 0 of 6 computed")
    assert begun.wait(GUARD_S)
    coming[-1].add_done_callback(lambda _: closing.set())  # called off
    features.close()
    assert reads == NAMES[:1] and not {one.name[:4] for one in threading.enumerate()} & {"read", "keep", "writ"}
    assert [mask.cancelled() for mask in coming] == [False, *[True] * 5]
    assert np.array_equal(coming[0].result(), read_mask(pairs[0]))


def test_a_mask_that_cannot_be_read_behind_a_filling_is_told_by_the_step_that_needs_it(
    filled, pairs, tmp_path, monkeypatch
):
    mask = tmp_path / "mask.png"
    shutil.copyfile(pairs[1].mask, mask)
    broken = dataclasses.replace(pairs[1], mask=mask)
    features, fill = filled([pairs[0], broken])
    mask.write_bytes(b"no picture")
    coming, submit = [], features._readers.submit
    monkeypatch.setattr(features._readers, "submit", lambda *call: coming.append(submit(*call)))
    fill()
    assert isinstance(coming[-1].exception(), UserError)
    batches = features.batches([[Item(pairs[0])], [Item(broken)]])
    assert next(batches).items == (Item(pairs[0]),)
    with pytest.raises(UserError, match=r"mask\.png"):
        next(batches)


# Encoders beside the model


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, ("mask_decoder.transformer", "prompt_encoder", "language_model", "text_hidden_fcs")),
        ({"train_modules": ("mask_decoder",)}, ("conv_s0", "conv_s1", "language_model")),
        ({"lora_scope": ("sam2_encoder",)}, ("vision_encoder", "no_memory_embedding", "conv_s0", "conv_s1")),
    ],
)
def test_encoders_set_aside_answer_as_before_and_are_no_parameters(made, pairs, changes, kept):
    features = made(**changes)
    before = only(features, [Item(pairs[0])])
    model = features.loaded.model
    count = len(list(model.parameters()))
    features.set_encoders_aside()
    names = [name for name, _ in features.peft_model.named_parameters()]
    assert len(list(model.parameters())) < count
    assert not any("vision_model" in name or "mlp1" in name for name in names)
    for part in kept:
        assert any(part in name for name in names), part
    after = only(features, [Item(pairs[0], 1)])
    again = only(features, [Item(dataclasses.replace(pairs[0], name="again"))])
    assert torch.equal(again.vision.tokens_MC, before.vision.tokens_MC)
    assert not torch.equal(after.vision.tokens_MC, before.vision.tokens_MC)
    with torch.no_grad():
        outputs = [features.peft_model(b.prompt, b.vision, b.sam2) for b in (before, again)]
    assert torch.equal(outputs[0].masks.logits_Bhw, outputs[1].masks.logits_Bhw)
