"""The split: the same for the same names and seed, and nothing that belongs together on both sides."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from sft.config import UserError
from sft.data.read import Pair
from sft.data.split import read_split, split, write_split


def pairs_named(*names, part=None):
    return [Pair(name, Path(f"images/{name}.png"), Path(f"masks/{name}.png"), split=part) for name in names]


def names_of(pairs):
    return [pair.name for pair in pairs]


TEN = pairs_named(*(f"p{number}" for number in range(10)))
EYES = pairs_named(*(f"Image_{child:02d}{side}" for child in range(1, 11) for side in "LR"))
DEFAULTS = {"seed": 42, "val_fraction": 0.2}


def test_the_split_depends_on_names_and_seed_and_not_on_order():
    shuffled = random.Random(0).sample(TEN, len(TEN))
    assert split(TEN, **DEFAULTS) == split(shuffled, **DEFAULTS)
    held_out = {tuple(names_of(split(TEN, seed=seed, val_fraction=0.2)[1])) for seed in range(20)}
    assert len(held_out) > 5


def test_the_split_of_a_seed_never_changes():
    # A recorded result: another one would make old runs incomparable.
    assert names_of(split(TEN, **DEFAULTS)[1]) == ["p1", "p9"]


@pytest.mark.parametrize("fraction, expected", [(0.2, 2), (0.25, 3), (0.01, 1), (0.99, 9)])
def test_the_share_is_rounded_and_leaves_at_least_one_on_each_side(fraction, expected):
    train, val = split(TEN, seed=1, val_fraction=fraction)
    assert (len(train), len(val)) == (10 - expected, expected)
    assert sorted(names_of(train + val)) == names_of(TEN)


def test_a_patient_stays_on_one_side():
    train, val = split(EYES, **DEFAULTS, group_pattern=r"(\d+)[LR]")
    assert len(val) == 4
    assert not {name[6:8] for name in names_of(train)} & {name[6:8] for name in names_of(val)}
    whole_match = split(EYES, **DEFAULTS, group_pattern=r"\d+")
    assert whole_match == (train, val)


def test_a_group_larger_than_the_share_is_taken_only_when_there_is_no_smaller_one():
    pairs = pairs_named("a1", "a2", "a3", "a4", "b1", "b2", "b3")
    _, val = split(pairs, seed=0, val_fraction=0.2, group_pattern="[ab]")
    assert names_of(val) == ["b1", "b2", "b3"]


def test_folds_part_the_groups_and_each_validates_once():
    held_out = [split(EYES, **DEFAULTS, group_pattern=r"\d+", folds=5, fold=fold)[1] for fold in range(5)]
    assert Counter(name for val in held_out for name in names_of(val)) == dict.fromkeys(names_of(EYES), 1)
    assert [len(val) for val in held_out] == [4] * 5


def test_folds_of_uneven_groups_are_nearly_equal():
    pairs = pairs_named("a1", "a2", "a3", "b1", "b2", "c1", "d1", "e1")
    sizes = [len(split(pairs, **DEFAULTS, group_pattern="[a-e]", folds=2, fold=fold)[1]) for fold in range(2)]
    assert sizes == [4, 4]


def test_equal_images_and_samples_of_one_image_stay_together():
    together = [("p0", "p5", "p7"), ("p1", "p9"), ("gone", "p2")]
    for seed in range(10):
        val = set(names_of(split(TEN, seed=seed, val_fraction=0.4, together=together)[1]))
        assert len(val & {"p0", "p5", "p7"}) in (0, 3)
        assert len(val & {"p1", "p9"}) in (0, 2)
    phrases = [Pair(f"{image}--{phrase}", Path(image)) for image in "abcd" for phrase in ("arteries", "veins")]
    _, val = split(phrases, seed=0, val_fraction=0.3)
    assert len(val) == 2
    assert val[0].image == val[1].image


def test_explicit_folders_win(tmp_path):
    pairs = pairs_named("a", "b", "c", part="train") + pairs_named("d", part="val")
    assert [names_of(part) for part in split(pairs, seed=0, val_fraction=0.9)] == [["a", "b", "c"], ["d"]]
    with pytest.raises(UserError, match="folds contradicts the train/ and val/ folders"):
        split(pairs, **DEFAULTS, folds=2)
    with pytest.raises(UserError, match="val_list contradicts"):
        split(pairs, **DEFAULTS, val_list=tmp_path / "val.txt")


def test_explicit_folders_that_share_a_patient_are_refused():
    pairs = pairs_named("p1L", "p2L", part="train") + pairs_named("p1R", part="val")
    assert len(split(pairs, **DEFAULTS)[1]) == 1
    with pytest.raises(
        UserError, match=r"same image or patient on both sides \(1 found\): images/p1L.png and images/p1R"
    ):
        split(pairs, **DEFAULTS, group_pattern=r"p\d")


def test_a_list_names_the_validation_images_in_any_usual_form(tmp_path):
    listed = tmp_path / "val.txt"
    listed.write_text("\ufeffp1\n\n  p2.png  \nimages/p3.png # the third\n# nothing here\n", encoding="utf-8")
    train, val = split(TEN, **DEFAULTS, val_list=listed)
    assert names_of(val) == ["p1", "p2", "p3"]
    assert len(train) == 7


def test_a_list_with_unknown_names_is_refused_with_the_nearest(tmp_path):
    listed = tmp_path / "val.txt"
    listed.write_text("Image_01L\nImage_1R\n")
    with pytest.raises(UserError, match=r"1 names are not in the data set: Image_1R \(nearest: Image_\d+R"):
        split(EYES, **DEFAULTS, val_list=listed)
    listed.write_text("# empty\n")
    with pytest.raises(UserError, match="names no image"):
        split(EYES, **DEFAULTS, val_list=listed)
    with pytest.raises(UserError, match="cannot be read"):
        split(EYES, **DEFAULTS, val_list=tmp_path / "missing.txt")


def test_a_list_may_not_part_a_patient_or_take_everything(tmp_path):
    listed = tmp_path / "val.txt"
    listed.write_text("Image_01L\n")
    with pytest.raises(UserError, match="on both sides"):
        split(EYES, **DEFAULTS, val_list=listed, group_pattern=r"\d+")
    listed.write_text("\n".join(names_of(TEN)))
    with pytest.raises(UserError, match="leaves none of 10 images for training"):
        split(TEN, **DEFAULTS, val_list=listed)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"group_pattern": r"(\d+)X"}, r"finds no patient in 10 of 10 names: p0.png, p1.png"),
        ({"group_pattern": "("}, "no regular expression"),
        ({"group_pattern": "p"}, "a split needs 2 groups .* there are 1"),
        ({"folds": 11}, "folds 11 needs 11 groups .* there are 10"),
        ({"folds": 3, "fold": 3}, "fold is 0 to folds - 1"),
        ({"folds": 3, "val_list": "x"}, "contradict"),
        ({"val_fraction": 1.0}, "above 0 and below 1"),
    ],
)
def test_a_split_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        split(TEN, **(DEFAULTS | settings))


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_cannot_be_split(count):
    with pytest.raises(UserError, match="needs 2 groups"):
        split(TEN[:count], **DEFAULTS)


def test_a_written_split_is_read_back_and_tied_to_its_data(tmp_path):
    path = tmp_path / "split.json"
    train, val = split(TEN, **DEFAULTS)
    write_split(path, train, val)
    assert json.loads(path.read_text()) == {"train": names_of(train), "val": names_of(val)}
    assert list(tmp_path.iterdir()) == [path]
    assert read_split(path, TEN) == (train, val)
    with pytest.raises(UserError, match="has lost p0"):
        read_split(path, TEN[1:])
    with pytest.raises(UserError, match="has gained new"):
        read_split(path, TEN + pairs_named("new"))
    path.write_text("{}")
    with pytest.raises(UserError, match="is no split file"):
        read_split(path, TEN)
