"""The check: every fault of a file, or between files, is named with its file."""

import shutil

import numpy as np
import pytest
from data_files import MASK_HW, H, W, add_five_good_pairs, add_pair, mask_image, only, photo
from PIL import Image

from sft.config import TrainConfig
from sft.data import brief, check, find_pairs, load


@pytest.fixture
def good(tmp_path):
    return add_five_good_pairs(tmp_path / "good")


def findings_of(root):
    return check(find_pairs(root).pairs)


def test_sizes_are_told_by_name_and_not_of_what_cannot_be_read(good):
    (good / "masks/p2.png").write_bytes(b"")
    assert findings_of(good).sizes_hw == dict.fromkeys(("p0", "p1", "p3", "p4"), MASK_HW.shape)


def test_sizes_that_differ_are_an_error_with_both_sizes(good):
    photo(9, height=H, width=W + 1).save(good / "images/p2.png")
    only(findings_of(good).errors, "images/p2.png: sizes differ", f"{W + 1}x{H}", f"{W}x{H}", "masks/p2.png")


@pytest.mark.parametrize("part", ["images", "masks"])
@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif", ".bmp", ".gif"])
def test_a_truncated_file_is_an_error(good, part, ending):
    (good / part / "p2.png").unlink()
    path = good / part / f"p2{ending}"
    (photo(2, 64, 64) if part == "images" else Image.fromarray(np.full((64, 64), 255, np.uint8))).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    only(findings_of(good).errors, str(path), "cannot be decoded")


def test_empty_and_foreign_and_missing_files_are_each_named(good):
    (good / "images/p0.png").write_bytes(b"")
    (good / "images/p1.png").write_text("no image at all")
    (good / "masks/p1.png").write_text("no mask at all")
    pairs = find_pairs(good).pairs
    (good / "masks/p4.png").unlink()
    errors = check(pairs).errors
    assert ["p0.png" in errors[0], "0 bytes" in errors[0]] == [True, True]
    assert sorted(line.split(":")[0] for line in errors[1:3]) == [
        str(good / part / "p1.png") for part in ("images", "masks")
    ]
    assert "p4.png: no such file" in errors[3]
    assert len(errors) == 4


def test_several_frames_are_an_error(good):
    photo(2).save(good / "images/p2.tif", save_all=True, append_images=[photo(3)])
    (good / "images/p2.png").unlink()
    only(findings_of(good).errors, "p2.tif", "holds 2 frames")


def test_a_mask_that_is_not_binary_is_an_error_with_its_values(good):
    values = np.zeros((H, W), np.uint8)
    values[0, :3] = (1, 2, 7)
    Image.fromarray(values).save(good / "masks/p1.png")
    Image.fromarray(np.arange(H * W, dtype=np.uint8).reshape(H, W)).save(good / "masks/p2.png")
    two = np.where(MASK_HW, 200, 100).astype(np.uint8)
    Image.fromarray(two).save(good / "masks/p3.png")
    errors = findings_of(good).errors
    assert "p1.png: mask is not binary, it holds 4 values (0, 1, 2, 7)" in errors[0]
    assert "192 values (0, 1, 2, 3, 4, 5, 6, 7, ...)" in errors[1]
    assert "2 values (100, 200)" in errors[2]


def test_an_empty_mask_and_a_mostly_full_one_are_warnings(good):
    Image.new("L", (W, H)).save(good / "masks/p1.png")
    Image.fromarray(np.where(MASK_HW, 0, 255).astype(np.uint8)).save(good / "masks/p2.png")
    findings = findings_of(good)
    assert not findings.errors
    assert "masks/p1.png: empty mask" in findings.warnings[0]
    assert "masks/p2.png: more than half of the frame is marked (91%)" in findings.warnings[1]
    assert findings.summary.fraction_min == 0
    assert findings.summary.fraction_max == pytest.approx(174 / 192)


def test_equal_pixels_under_two_names_are_a_warning_and_kept_together(good):
    Image.open(good / "images/p1.png").save(good / "images/p3.bmp")
    (good / "images/p3.png").unlink()
    findings = findings_of(good)
    only(findings.warnings, "images/p1.png: same pixels as", "p3.bmp", "their masks differ")
    assert findings.duplicates == [("p1", "p3")]
    shutil.copy(good / "masks/p1.png", good / "masks/p3.png")
    only(findings_of(good).warnings, "same pixels as", "the split keeps them together")
    for seed in range(6):
        val = load(TrainConfig(data_root=str(good), val_fraction=0.4, seed=seed)).val
        assert len({"p1", "p3"} & {pair.name for pair in val}) != 1


def test_one_image_in_both_split_folders_is_an_error(tmp_path):
    for part, names in (("train", "ab"), ("val", "cd")):
        for name in names:
            add_pair(tmp_path / part, name, ord(name))
    assert not findings_of(tmp_path).errors
    shutil.copy(tmp_path / "train/images/b.png", tmp_path / "val/images/d.png")
    only(findings_of(tmp_path).errors, "b.png: the same image is in both splits", "d.png")


def test_one_mask_under_two_images_is_a_warning(good):
    shutil.copy(good / "masks/p1.png", good / "masks/p2.png")
    only(findings_of(good).warnings, "masks/p1.png: same mask as", "masks/p2.png", "is the pairing right?")


def test_files_that_disagree_on_foreground_or_depth_are_warnings(good):
    mask_image(1, seed=2).save(good / "masks/p2.png")
    Image.fromarray(np.full((H, W), 4000, np.uint16)).save(good / "images/p4.png")
    foreground, bits = findings_of(good).warnings
    assert "masks/p2.png: masks use different foreground values (255 in 4, 1 in 1 files; 1 here)" in foreground
    assert "images/p4.png: images use different bit depths (8 in 4, 12 in 1 files; 12 here)" in bits


def test_long_lists_are_shortened_by_kind():
    lines = [f"a{i}.png: empty mask; right?" for i in range(5)] + ["b.png: has 2 masks in x", "c.png: has 3 masks in x"]
    assert brief(lines, per_kind=2) == [*lines[:2], "... and 3 more like it", *lines[5:]]
