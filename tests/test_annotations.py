"""Polygons: what annotations.json means in pixels, and what is wrong with it in words."""

import json

import numpy as np
import pytest
from PIL import Image

from sft.config import UserError
from sft.data.annotations import rasterise, read_annotations
from sft.data.check import check
from sft.data.find import find_pairs
from sft.data.read import read

# Drawn once with pycocotools 2.0.11 (frPyObjects, decode) on an 8 x 10 frame.
PYCOCOTOOLS = {
    "rectangle": ([2, 1, 6, 1, 6, 4, 2, 4], ". ..####.... ..####.... ..####.... . . . ."),
    "triangle": ([1, 1, 9, 1, 1, 7], ". .#######.. .######... .#####.... .###...... .##....... .#........ ."),
    "bow tie": ([1, 1, 9, 7, 9, 1, 1, 7], ". .#......#. .##....##. .###..###. .###..###. .##....##. .#......#. ."),
    "keyhole": (
        [0, 0, 10, 0, 10, 8, 0, 8, 0, 0, 3, 2, 3, 6, 7, 6, 7, 2, 3, 2],
        "########## ########## ###....### ###....### ###....### ###....### ########## ##########",
    ),
    "cut off": ([-3, -3, 5, -3, 5, 4, -3, 4], "#####..... #####..... #####..... #####..... . . . ."),
    "fractions": ([1.3, 0.7, 8.6, 2.1, 6.2, 6.9], ". ..###..... ...#####.. ....####.. ....###... .....##... . ."),
}


def box(left, top, right, bottom):
    return (left, top, right, top, right, bottom, left, bottom)


def frame(*boxes):
    """An 8 x 10 mask with (value, left, top, right, bottom) written in turn."""
    mask_HW = np.zeros((8, 10), dtype=bool)
    for value, left, top, right, bottom in boxes:
        mask_HW[top:bottom, left:right] = value
    return mask_HW


@pytest.mark.parametrize("name", PYCOCOTOOLS)
def test_one_ring_has_the_pixels_that_pycocotools_gives(name):
    ring, rows = PYCOCOTOOLS[name]
    expected = np.array([[character == "#" for character in row.ljust(10, ".")] for row in rows.split()])
    assert np.array_equal(rasterise(((tuple(ring),),), 8, 10).mask_HW, expected)


OUTER, INNER, ISLAND = box(0, 0, 10, 8), box(2, 1, 9, 7), box(4, 3, 6, 5)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_rings_in_rings_alternate_between_hole_and_island_in_any_order(order):
    rings = tuple((OUTER, INNER, ISLAND)[index] for index in order)
    raster = rasterise((rings,), 8, 10)
    expected = frame((True, 0, 0, 10, 8), (False, 2, 1, 9, 7), (True, 4, 3, 6, 5))
    assert np.array_equal(raster.mask_HW, expected)
    assert raster.holes == 1


def test_overlapping_rings_of_one_object_are_united():
    raster = rasterise(((box(0, 0, 6, 5), box(3, 2, 10, 8)),), 8, 10)
    assert np.array_equal(raster.mask_HW, frame((True, 0, 0, 6, 5), (True, 3, 2, 10, 8)))
    assert raster.holes == 0


def test_a_ring_given_twice_is_no_hole():
    assert np.array_equal(rasterise(((INNER, INNER),), 8, 10).mask_HW, frame((True, 2, 1, 9, 7)))


def test_a_hole_in_two_overlapping_rings_is_a_hole_of_both_and_no_island():
    raster = rasterise(((box(0, 0, 8, 8), box(2, 0, 10, 8), box(4, 3, 6, 5)),), 8, 10)
    assert np.array_equal(raster.mask_HW, frame((True, 0, 0, 10, 8), (False, 4, 3, 6, 5)))


def test_another_ring_over_a_hole_fills_only_what_it_covers():
    raster = rasterise(((box(0, 0, 8, 8), box(2, 2, 6, 6), box(5, 4, 10, 8)),), 8, 10)
    expected = frame((True, 0, 0, 8, 8), (False, 2, 2, 6, 6), (True, 5, 4, 10, 8))
    assert np.array_equal(raster.mask_HW, expected)


def test_objects_are_united_and_cut_no_hole_into_each_other():
    raster = rasterise(((OUTER,), (INNER,)), 8, 10)
    assert raster.mask_HW.all()
    assert raster.holes == 0


def test_nothing_drawn_is_an_empty_mask():
    for polygons in ((), ((),), ((box(20, 20, 30, 30),),), ((box(0.6, 0.6, 0.9, 0.9),),)):
        assert not rasterise(polygons, 8, 10).mask_HW.any()
    assert rasterise(((box(20, 20, 30, 30),),), 8, 10).outside_px == 22


def write(folder, entries, images=("a.png", "b.png")):
    (folder / "images").mkdir(parents=True)
    for index, name in enumerate(images):
        pixels = np.random.default_rng(index).integers(0, 255, (8, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
    (folder / "annotations.json").write_text(json.dumps(entries))
    return folder


def entry(image="a.png", mask=None, text=("vessels",)):
    return {"image": image, "mask": mask or [[list(OUTER), list(INNER)]], "text": list(text)}


def test_each_phrase_of_an_image_is_a_sample_and_equal_phrases_are_united(tmp_path):
    masks = [[list(box(0, 0, 2, 2))], [list(box(4, 4, 6, 6))], [list(box(8, 0, 9, 1))]]
    entries = [entry("a.png", masks, ("Arteries.", "veins", "arteries")), entry("b.png", [masks[0]], ("veins",))]
    pairs = find_pairs(write(tmp_path / "data", entries)).pairs
    assert [(pair.name, pair.phrase) for pair in pairs] == [
        ("a--arteries", "arteries"),
        ("a--veins", "veins"),
        ("b", "veins"),
    ]
    sample = read(pairs[0])
    assert sample.phrase == "arteries"
    assert np.array_equal(sample.mask_HW, frame((True, 0, 0, 2, 2), (True, 8, 0, 9, 1)))
    assert sample.image_HW3.shape == (8, 10, 3)


def test_without_texts_there_is_one_sample_per_image_and_no_phrase(tmp_path):
    given = entry("a.png", [[list(box(0, 0, 2, 2))], [list(box(4, 4, 6, 6))]])
    del given["text"]
    found = find_pairs(write(tmp_path / "data", [given]))
    assert [(pair.name, pair.phrase, len(pair.polygons)) for pair in found.pairs] == [("a", None, 2)]
    assert "b.png: has no entry" in found.warnings[0]


@pytest.mark.parametrize(
    "broken, message",
    [
        (entry(image="c.png"), "there is no file"),
        (entry(text=("one", "two")), "1 masks but 2 texts"),
        (entry(text=("  . ",)), "give a phrase"),
        (entry(mask=[[[1, 2, 3, 4, 5, 6, 7]]]), "ring of 7 numbers"),
        (entry(mask=[[[1, 2, float("nan"), 4, 5, 6]]]), "finite numbers"),
        (entry(mask=[[[[1, 2], [3, 4], [5, 6]]]]), "flat list"),
        (entry(mask=[{"size": [8, 10], "counts": "abc"}]), "RLE"),
        ({"image": "a.png", "mask": [], "text": []}, "holds no mask"),
        ({"file_name": "a.png"}, 'needs "image"'),
        ("a.png", 'needs "image"'),
    ],
)
def test_a_broken_entry_is_an_error_that_names_it_and_spares_the_others(tmp_path, broken, message):
    folder = write(tmp_path / "data", [entry("b.png"), broken])
    entries, errors, _ = read_annotations(folder / "annotations.json", folder / "images")
    assert len(entries) == 1
    assert len(errors) == 1
    assert message in errors[0]
    assert "entry 1" in errors[0]


def test_a_ring_of_two_points_is_left_out_and_not_read_as_a_box(tmp_path):
    folder = write(tmp_path / "data", [entry(mask=[[[1, 1, 5, 5], list(ISLAND)]])])
    found = find_pairs(folder)
    assert "1 ring(s) of mask 0 have fewer than 3 points" in found.warnings[0]
    assert read(found.pairs[0]).mask_HW.sum() == 4


@pytest.mark.parametrize("text", ["[", '{"images": [], "annotations": []}', "3"])
def test_a_file_of_another_kind_is_refused_with_the_format_expected(tmp_path, text):
    (tmp_path / "annotations.json").write_text(text)
    with pytest.raises(UserError, match="expected a list of"):
        read_annotations(tmp_path / "annotations.json", tmp_path)


def test_holes_and_points_beyond_the_frame_are_warned_about(tmp_path):
    folder = write(tmp_path / "data", [entry("a.png"), entry("b.png", [[list(box(0, 0, 14, 3))]])])
    warnings = check(find_pairs(folder).pairs).warnings
    assert any("a.png" in line and "read as holes (1 in a)" in line for line in warnings)
    assert any("b.png" in line and "leave the frame by 4 px" in line for line in warnings)
