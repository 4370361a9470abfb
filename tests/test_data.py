"""Data sets on disk: which layouts are found, what the folders lack, and what a run and the command make of it."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_files import MASK_HW, H, W, add_five_good_pairs, add_pair, mask_image, only, photo
from PIL import Image

from sft import data
from sft.config import TrainConfig, UserError
from sft.data import Pair, check, find_pairs, load, read


@pytest.fixture
def good(tmp_path):
    return add_five_good_pairs(tmp_path / "good")


def test_a_good_data_set_has_no_findings_and_a_summary(good):
    found = find_pairs(good)
    assert [pair.name for pair in found.pairs] == ["p0", "p1", "p2", "p3", "p4"]
    assert found.pairs[0] == Pair("p0", good / "images/p0.png", good / "masks/p0.png")
    findings = check(found.pairs)
    assert (found.errors, found.warnings, findings.errors, findings.warnings) == ([], [], [], [])
    assert findings.summary.count == 5
    assert findings.summary.sizes == {(W, H): 5}
    assert findings.summary.fraction_mean == pytest.approx(18 / 192)


@pytest.mark.parametrize("ending", [".png", ".PNG", ".jpg", ".Jpeg", ".tif", ".TIFF", ".bmp", ".gif"])
@pytest.mark.parametrize("suffix", ["", "_mask", "_MASK", "_gt", "_1stHO", "_manual1", "_label"])
def test_endings_and_suffixes_are_paired(tmp_path, ending, suffix):
    add_pair(tmp_path, "Image_01L", 0, ending=ending, mask_name=f"Image_01L{suffix}.png")
    found = find_pairs(tmp_path)
    assert [pair.name for pair in found.pairs] == ["Image_01L"]
    assert not found.errors + found.warnings
    assert np.array_equal(read(found.pairs[0]).mask_HW, MASK_HW)


@pytest.mark.parametrize(
    "images, masks", [("Images", "Labels"), ("img", "gt"), ("image", "mask"), ("imgs", "annotations")]
)
def test_other_names_of_the_folders_are_known(tmp_path, images, masks):
    add_pair(tmp_path, "a", 0, images, masks)
    assert [pair.mask for pair in find_pairs(tmp_path).pairs] == [tmp_path / masks / "a.png"]


def test_drive_is_read_with_its_vessels_and_not_its_field_of_view(tmp_path):
    add_pair(tmp_path / "training", "21_training", 0, "images", "1st_manual", ".tif", "21_manual1.gif")
    add_pair(tmp_path / "training", "21_training", 0, "images", "mask", ".tif", "21_training_mask.gif")
    add_pair(tmp_path / "test", "01_test", 1, "images", "1st_manual", ".tif", "01_manual1.gif")
    found = find_pairs(tmp_path)
    assert [(pair.mask.name, pair.split) for pair in found.pairs] == [("21_manual1.gif", None)]
    assert [line.split(": ")[0] for line in found.warnings] == [str(tmp_path / "test"), str(tmp_path / "training/mask")]


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_train_and_val_folders_give_the_split_and_unique_names(tmp_path, val):
    for part, names in (("train", "abc"), (val, "cd")):
        for name in names:
            add_pair(tmp_path / part, name, ord(name) + 100 * (part == val))
    found = find_pairs(tmp_path)
    assert [(pair.name, pair.split) for pair in found.pairs] == [
        ("a", "train"),
        ("b", "train"),
        ("d", "val"),
        ("train-c", "train"),
        ("val-c", "val"),
    ]
    loaded = load(TrainConfig(data_root=str(tmp_path)))
    assert [pair.name for pair in loaded.val] == ["d", "val-c"]


def test_both_layouts_may_stand_in_the_split_folders(tmp_path):
    add_pair(tmp_path / "train", "a", 0)
    add_pair(tmp_path / "val", "b", 1, masks="unused")
    ring = [3, 2, 9, 2, 9, 5, 3, 5]
    (tmp_path / "val/annotations.json").write_text(f'[{{"image": "b.png", "mask": [[{ring}]], "text": ["vessels"]}}]')
    pairs = find_pairs(tmp_path).pairs
    assert [pair.split for pair in pairs] == ["train", "val"]
    assert np.array_equal(read(pairs[1]).mask_HW, MASK_HW)


def test_a_folder_without_a_layout_is_refused_with_what_it_holds(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_pairs(tmp_path / "missing")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match=r"it holds pictures/\); expected images/ \+ masks/"):
        find_pairs(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        find_pairs(tmp_path)


def test_two_layouts_at_once_are_refused(good):
    (good / "annotations.json").write_text("[]")
    with pytest.raises(UserError, match="both masks/ and annotations.json"):
        find_pairs(good)
    shutil.copytree(good / "images", good / "train/images")
    with pytest.raises(UserError, match="both at the root and in train/"):
        find_pairs(good)


def test_a_val_folder_alone_is_refused(tmp_path):
    add_pair(tmp_path / "val", "a", 0)
    with pytest.raises(UserError, match="expected one train/"):
        find_pairs(tmp_path)


# Findings of the folders


def test_an_image_without_a_mask_is_an_error_with_the_nearest_mask(good):
    (good / "masks/p3.png").rename(good / "masks/P3.png")
    errors = find_pairs(good).errors
    assert len(errors) == 2
    assert "images/p3.png: has no mask" in errors[0]
    assert "(nearest: P3.png)" in errors[0]
    assert "masks/P3.png: has no image" in errors[1]


def test_two_masks_or_two_images_of_one_name_are_errors(good):
    mask_image().save(good / "masks/p1_gt.png")
    only(find_pairs(good).errors, "images/p1.png: has 2 masks", "p1.png, p1_gt.png")
    (good / "masks/p1_gt.png").unlink()
    photo(9).save(good / "images/p1.bmp")
    only(find_pairs(good).errors, "images/p1.png: has the same name as p1.bmp")


def test_files_that_are_no_images_are_warned_about_and_litter_is_not(good):
    for name in ("notes.txt", ".DS_Store", "Thumbs.db"):
        (good / "images" / name).write_text("x")
    (good / "masks/old").mkdir()
    mask_image().save(good / "masks/p1_2ndHO.png")
    found = find_pairs(good)
    assert len(found.pairs) == 5
    assert not found.errors
    for line, part in zip(
        sorted(found.warnings), ("notes.txt: not an image", "old: a folder", "second obs"), strict=True
    ):
        assert part in line


# The run's view, and the command


def test_load_refuses_errors_in_one_message_with_the_first_ten(tmp_path):
    for seed in range(13):
        add_pair(tmp_path, f"p{seed:02d}", seed)
        (tmp_path / f"masks/p{seed:02d}.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        load(TrainConfig(data_root=str(tmp_path)))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"data_root {tmp_path}: 13 errors; correct the files first:"
    assert ["p00.png" in lines[1], "p09.png" in lines[10], len(lines)] == [True, True, 12]
    assert "3 more: `python -m sft.data" in lines[11]


def test_load_reuses_a_recorded_split(good, tmp_path):
    config = TrainConfig(data_root=str(good))
    first = load(config)
    assert ([len(first.train), len(first.val)], first.findings.errors) == ([4, 1], [])
    data.write_split(tmp_path / "split.json", first.val, first.train)
    again = load(config, split_file=tmp_path / "split.json")
    assert (again.train, again.val) == (first.val, first.train)


def test_load_finds_the_embedded_data_set(good, monkeypatch):
    synthetic = type(sys)("sft.synthetic")
    synthetic.embedded_dataset = lambda: good
    monkeypatch.setitem(sys.modules, "sft.synthetic", synthetic)
    monkeypatch.setattr("sft.synthetic", synthetic, raising=False)
    assert len(load(TrainConfig(data_root="embedded")).train) == 4


def test_the_command_prints_summary_and_split(good, capsys):
    assert data.main([str(good), "--val_fraction", "0.4", "--group_pattern", r"p\d"]) == 0
    printed, errors = capsys.readouterr()
    assert "5 of 5 read in" in printed
    assert f"{W}x{H} (5)" in printed
    assert "mean 9.38%, min 9.38%, max 9.38%" in printed
    assert "3 for training, 2 for validation (seed 42)" in printed
    assert errors == ""


def test_the_command_tells_errors_from_warnings_and_exits_with_2(good, capsys):
    (good / "masks/p1.png").write_bytes(b"")
    Image.new("L", (W, H)).save(good / "masks/p2.png")
    assert data.main([str(good)]) == 2
    printed = capsys.readouterr().out
    assert printed.index("1 error\n") < printed.index("masks/p1.png") < printed.index("1 warning\n")
    assert printed.index("1 warning\n") < printed.index("masks/p2.png")


@pytest.mark.parametrize("arguments", [["missing"], ["--seed", "x"], ["--group_pattern", "q"], ["--val_fraction", "2"]])
def test_the_command_ends_a_mistake_with_one_line_and_2(good, capsys, arguments):
    root = [] if arguments == ["missing"] else [str(good)]
    assert data.main(root + arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1


def test_the_data_room_imports_no_torch():
    code = "import sft.data, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False).returncode == 0
