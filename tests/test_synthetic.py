"""Protects the synthetic images: same seed, same pixels; masks that agree; sets that are whole or absent."""

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sft import synthetic
from sft.config import UserError
from sft.synthetic.trees import POINTS, Tree, draw, visible_area_px

SMALL_PX = 192
PLANAR_LOOKS = ("angiogram", "octa", "mixed trees", "cine")


def digest(scene: synthetic.Scene) -> str:
    parts = [scene.image_HW3, scene.label_HW, *(scene.masks[name] for name in sorted(scene.masks))]
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


def straight_tree(width_px: float, y_px: float = 256.0) -> Tree:
    """One horizontal vessel from x = 100 to x = 400."""
    x = np.linspace(100, 400, POINTS)[None]
    return Tree(x, np.full_like(x, y_px), np.full_like(x, width_px))


@pytest.mark.parametrize("width_px", [1.5, 2.0, 3.0, 5.0, 8.0])
def test_a_drawn_vessel_is_as_wide_as_told(width_px):
    drawn = draw(straight_tree(width_px), 512)
    across = drawn.coverage_HW[:, 200:300].sum(0)
    assert across.mean() == pytest.approx(width_px, abs=0.35)
    assert drawn.width_HW[drawn.mask_HW].mean() == pytest.approx(width_px, abs=0.1)
    assert np.abs(np.average(np.arange(512) + 0.5, weights=drawn.coverage_HW[:, 250]) - 256) < 0.35


def test_visible_area_is_width_times_length():
    assert visible_area_px(straight_tree(4.0)) == pytest.approx(4 * 300 * POINTS / (POINTS - 1))


def test_same_seed_gives_the_same_pixels_here_and_in_another_process():
    seeds = (0, 1, 2)
    here = [digest(synthetic.render(seed, size_px=SMALL_PX)) for seed in seeds]
    assert here == [digest(synthetic.render(seed, size_px=SMALL_PX)) for seed in seeds]
    assert len(set(here)) == len(seeds)
    code = (
        "import sys; sys.path.insert(0, 'tests'); from test_synthetic import digest, synthetic\n"
        f"print([digest(synthetic.render(seed, size_px={SMALL_PX})) for seed in {seeds}])"
    )
    root = Path(__file__).parents[1]
    there = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str(here)


def test_the_global_random_state_is_neither_used_nor_touched():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    synthetic.render(3, size_px=SMALL_PX)
    assert np.array_equal(before, np.random.get_state()[1])


@pytest.mark.parametrize("look", ["fundus", *PLANAR_LOOKS])
def test_masks_agree_with_each_other(look):
    for seed in range(6):
        scene = synthetic.render(seed, look)
        masks = scene.masks
        nothing = np.zeros((512, 512), bool)
        assert scene.image_HW3.shape == (512, 512, 3) and scene.image_HW3.dtype == np.uint8
        assert set(masks) <= set(synthetic.TARGETS)
        assert all(mask.dtype == bool and mask.shape == (512, 512) and mask.any() for mask in masks.values())
        everything = masks["blood vessels"]
        dark, bright = masks.get("dark vessels", nothing), masks.get("bright vessels", nothing)
        assert np.array_equal(dark | bright, everything)
        thick, thin = masks.get("thick vessels", nothing), masks.get("thin vessels", nothing)
        assert not (thick & thin).any() and not ((thick | thin) & ~everything).any()
        assert 0.005 < everything.mean() < 0.25


def test_left_and_right_tree_come_together_and_lie_apart():
    found = 0
    for seed in range(12):
        masks = synthetic.render(seed, "mixed trees", SMALL_PX).masks
        assert ("left tree" in masks) == ("right tree" in masks)
        if "left tree" in masks:
            found += 1
            left, right = masks["left tree"], masks["right tree"]
            assert not (left & right).any()
            assert np.array_equal(left | right, masks["blood vessels"])
            assert np.nonzero(left)[1].mean() < np.nonzero(right)[1].mean()
    assert found >= 3


def test_every_target_occurs_in_pretraining_and_none_on_every_image_but_the_vessels():
    counts = dict.fromkeys(synthetic.TARGETS, 0)
    for seed in range(40):
        for name in synthetic.render(seed, size_px=SMALL_PX).masks:
            counts[name] += 1
    assert counts["blood vessels"] == 40
    assert all(count >= 4 for count in counts.values()), counts
    assert counts["discs"] < 40 and counts["lines"] < 40 and counts["bright vessels"] < 40


def test_thin_and_thick_are_told_by_width():
    for seed in range(3):
        scene = synthetic.render(seed, "angiogram")
        if {"thick vessels", "thin vessels"} <= set(scene.masks):
            # A pixel deep inside a vessel has vessel on all sides within 2 px only when the vessel is wide.
            assert eroded_share(scene.masks["thick vessels"], scene) > eroded_share(scene.masks["thin vessels"], scene)


def eroded_share(part_HW: np.ndarray, scene: synthetic.Scene) -> float:
    padded = np.pad(scene.masks["blood vessels"], 1)
    inner = padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return float((inner & part_HW).sum() / part_HW.sum())


def test_the_demo_labels_thick_dark_vessels_alone_and_all_vessels_score_low():
    scores = []
    for index in range(12):
        scene = synthetic.render(synthetic.image_seed(7, index), "cine")
        thick_and_dark = scene.masks["thick vessels"] & scene.masks["dark vessels"]
        assert scene.label_HW.sum() > 500
        padded = np.pad(thick_and_dark, 1)
        grown = np.any([padded[y : y + 512, x : x + 512] for y in range(3) for x in range(3)], axis=0)
        # The label knows which tree a pixel belongs to; where a thick bright tree crosses a dark one, the masks do not.
        assert not (scene.label_HW & ~grown).any()
        assert (grown & ~scene.label_HW).sum() < 0.35 * grown.sum()
        every = scene.masks["blood vessels"]
        scores.append(2 * (every & scene.label_HW).sum() / (every.sum() + scene.label_HW.sum()))
    assert np.mean(scores) < 0.5


def test_sparse_vessels_fill_about_half_a_percent():
    preset = synthetic.PRESETS["sparse"]
    shares = [
        synthetic.render(seed, preset.look, target_fraction=preset.target_fraction).masks["blood vessels"].mean()
        for seed in range(16)
    ]
    assert 0.003 < np.mean(shares) < 0.008
    assert max(shares) < 0.01


def test_unknown_looks_and_sizes_are_refused():
    with pytest.raises(ValueError, match="allowed are mixed, fundus"):
        synthetic.render(0, "ultrasound")
    with pytest.raises(ValueError, match="at least 64"):
        synthetic.render(0, size_px=32)


def test_a_written_set_is_complete_and_kept(tmp_path):
    folder = synthetic.write_dataset(tmp_path / "set", "demo", 2, seed=7)
    card = json.loads((folder / "dataset.json").read_text())
    version = synthetic.GENERATOR_VERSION
    assert card == {"preset": "demo", "seed": 7, "count": 2, "generator_version": version}
    names = sorted(path.name for path in (folder / "images").iterdir())
    assert len(names) == 2 and names == sorted(path.name for path in (folder / "masks").iterdir())
    mask = np.asarray(Image.open(folder / "masks" / names[0]))
    assert mask.shape == (512, 512) and set(np.unique(mask)) == {0, 255}
    scene = synthetic.render(synthetic.image_seed(7, 0), "cine")
    assert np.array_equal(np.asarray(Image.open(folder / "images" / names[0])), scene.image_HW3)
    stamp = (folder / "images" / names[0]).stat().st_mtime_ns
    assert synthetic.write_dataset(folder, "demo", 2, seed=7) == folder
    assert (folder / "images" / names[0]).stat().st_mtime_ns == stamp
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_any_number_of_processes_writes_the_same_set(tmp_path):
    for name, workers in (("one", "1"), ("two", "2")):
        assert synthetic.main([str(tmp_path / name), "--count", "5", "--seed", "3", "--workers", workers]) == 0
    written = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    ]
    assert written[0] == written[1] and len(written[0]) == 11


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("stopped half-way")

    monkeypatch.setattr(synthetic, "render", broken)
    with pytest.raises(RuntimeError):
        synthetic.write_dataset(tmp_path / "set", "demo", 2, seed=7)
    assert not list(tmp_path.iterdir())


def test_two_processes_may_write_the_same_set(tmp_path):
    with ProcessPoolExecutor(2) as pool:
        jobs = [pool.submit(synthetic.write_dataset, tmp_path / "set", "demo", 2, 7) for _ in range(2)]
        assert [job.result() for job in jobs] == [tmp_path / "set"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_folder_with_other_contents_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        synthetic.write_dataset(tmp_path, "demo", 1, seed=7)
    with pytest.raises(UserError, match="allowed are pretrain, demo, sparse"):
        synthetic.write_dataset(tmp_path / "new", "dome", 1, seed=7)
    with pytest.raises(UserError, match="at least 1"):
        synthetic.write_dataset(tmp_path / "new", "demo", 0, seed=7)
    with pytest.raises(UserError, match="workers -1"):
        synthetic.write_dataset(tmp_path / "new", "demo", 1, seed=7, workers=-1)


def test_the_embedded_set_goes_to_the_cache_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SA2VA_SFT_CACHE", str(tmp_path / "cache"))
    folder = synthetic.embedded_dataset(count=1)
    assert folder.parent == tmp_path / "cache" and f"-v{synthetic.GENERATOR_VERSION}-" in folder.name
    assert synthetic.embedded_dataset(count=1, cache_dir=tmp_path / "other").parent == tmp_path / "other"


def test_the_command_writes_sets_and_contact_sheets_and_names_mistakes(tmp_path, capsys):
    assert synthetic.main([str(tmp_path / "set"), "--preset", "sparse", "--count", "1", "--seed", "3"]) == 0
    assert (tmp_path / "set" / "dataset.json").exists()
    assert synthetic.main([str(tmp_path / "sheet"), "--contact_sheet", "--count", "2"]) == 0
    assert Image.open(tmp_path / "sheet" / "contact_sheet.png").size == (640, 640)
    assert synthetic.main([str(tmp_path / "sheet"), "--count", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
