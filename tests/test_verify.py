"""Protects the comparison with a directory's own code: rows, verdict, picture, the second process, and all mistakes."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_sa2va as small
from PIL import Image
from safetensors.torch import load_file, save_file
from small_saying import SAID, teach

from sft.config import UserError
from sft.model import published
from sft.verify import both_sides, compare, picture
from sft.verify.published_side import NEEDED, find_python, remote_files, run_published

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launch" / "verify.py"
SEG = 7
IMAGE = small.images(2)[1]

# Stands for the published code: gives back the figures that lie in the directory, with one of them changed if asked.
STAND_IN = """
import json, sys
import numpy as np
request = json.load(open(sys.argv[1]))
print("loading", request["directory"])
asked = json.load(open(request["directory"] + "/stand_in.json"))
if asked.get("fails"):
    raise SystemExit("this code is broken")
arrays = dict(np.load(request["directory"] + "/stand_in.npz"))
assert np.load(request["image"]).dtype == np.uint8
assert request["text"].startswith("<image>\\n") and request["precision"] in ("fp32", "bf16")
np.savez(request["arrays"], **arrays)
words = {"answer": "It is [SEG].", "masks": 1, "versions": {"transformers": "4.57.1"}, "device": "cpu"}
json.dump(words, open(request["words"], "w"))
"""


def sides(rng_seed: int = 0) -> tuple[dict, dict]:
    """Two equal records of a 6 x 4 image; the second mask of three has the highest predicted IoU."""
    rng = np.random.default_rng(rng_seed)
    native = {
        "input_ids": np.arange(5),
        "pixel_values": rng.normal(size=(1, 3, 2, 2)).astype(np.float32),
        "sam2_image": rng.normal(size=(3, 2, 2)).astype(np.float32),
        "vision_tokens": rng.normal(size=(4, 8)).astype(np.float32),
        "answer_ids": np.array([3, 4, SEG]),
        "seg_state": rng.normal(size=8).astype(np.float32),
        "candidate_logits": rng.normal(size=(3, 2, 3)).astype(np.float32),
        "predicted_iou": np.array([0.2, 0.8, 0.5], np.float32),
        "mask_logits": rng.normal(size=(3, 4, 6)).astype(np.float32),
    }
    theirs = {name: array.copy() for name, array in native.items() if name != "mask_logits"}
    theirs["answer_ids"] = np.array([3, 4, SEG, 9])
    theirs["mask"] = native["mask_logits"][1] > 0
    return native, theirs


def compared(native: dict, theirs: dict, precision: str = "fp32") -> tuple[bool, str]:
    return compare.verdict(compare.compare(native, theirs, precision, SEG))


def test_equal_records_are_the_same_and_words_after_seg_do_not_count():
    assert compared(*sides()) == (True, "same")


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("input_ids", "prompt"),
        ("pixel_values", "pixels for the vision encoder"),
        ("sam2_image", "pixels for SAM2"),
        ("vision_tokens", "vision tokens"),
        ("seg_state", "state at [SEG]"),
        ("candidate_logits", "logits of the three masks"),
        ("predicted_iou", "their predicted IoUs"),
    ],
)
def test_each_quantity_is_compared_and_the_first_different_one_is_named(name, first):
    native, theirs = sides()
    theirs[name].flat[1] += 1 if name == "input_ids" else np.abs(theirs[name]).max() * 0.01
    theirs["mask"] = ~theirs["mask"]  # and what follows from it
    same, line = compared(native, theirs)
    assert not same and line.startswith(f"differs: first in {first}; after it also:") and line.endswith("mask")


def test_differences_by_hand():
    """|2.5 - 2| = 0.5 of the largest published magnitude 4; not finite is never the same, nor is 0 against 1."""
    assert compare.differences(np.array([1.0, 2.5]), np.array([-4.0, 2.0]) + [5.0, 0]) == (0.5, 0.25)
    assert compare.differences(np.array([np.nan]), np.array([np.nan])) == (float("inf"), float("inf"))
    assert compare.differences(np.zeros(2), np.zeros(2)) == (0.0, 0.0)
    assert compare.differences(np.ones(1), np.zeros(1))[1] == float("inf")


def test_what_fp32_and_bf16_allow():
    """Just within and just beyond: 1e-4 in fp32, 16 roundings of 2^-8 in bf16."""
    for precision, limit in (("fp32", 1e-4), ("bf16", 16 / 256)):
        for factor, expected in ((0.9, True), (1.1, False)):
            native, theirs = sides()
            theirs["seg_state"][0] = 100.0
            native["seg_state"][0] = np.float32(100.0 * (1 + factor * limit))
            assert compared(native, theirs, precision)[0] is expected
    with pytest.raises(ValueError, match="fp32, bf16"):
        compare.allowed("seg_state", "fp16")


def test_a_mask_pixel_may_differ_only_where_its_logit_is_near_zero():
    native, theirs = sides()
    top = float(np.abs(theirs["candidate_logits"][1]).max())
    native["mask_logits"][1, 0, 0], theirs["mask"][0, 0] = 0.9e-4 * top, False
    assert compared(native, theirs)[0]
    row = compare.compare(native, theirs, "fp32", SEG)[-1]
    assert (row.absolute, row.relative, row.allowed) == (1, 1 / 24, "1 px near 0")
    native["mask_logits"][1, 0, 0] = 1.1e-4 * top
    assert compared(native, theirs) == (False, "differs: first in mask")


def test_two_masks_of_one_predicted_iou_may_change_places():
    native, theirs = sides()
    native["predicted_iou"] = np.array([0.2, 0.8, 0.80001], np.float32)
    theirs["predicted_iou"] = np.array([0.2, 0.80001, 0.8], np.float32)
    assert compared(native, theirs)[0]  # the published choice, the second, is compared
    native["predicted_iou"] = np.array([0.2, 0.7, 0.9], np.float32)
    assert "chosen mask" in compared(native, theirs)[1]


def test_shapes_and_absent_quantities_differ():
    native, theirs = sides()
    theirs["vision_tokens"] = theirs["vision_tokens"][:-1]
    assert compared(native, theirs)[1] == "differs: first in vision tokens"
    native, theirs = sides()
    theirs["image_grid_thw"] = np.array([[1, 4, 4]])
    assert compared(native, theirs)[1] == "differs: first in patches in time, height, width"
    native["image_grid_thw"] = np.array([[1, 4, 4]])
    assert compared(native, theirs)[0]
    native, theirs = sides()
    theirs["mask"] = theirs["mask"].T
    assert compared(native, theirs)[1] == "differs: first in mask"


def test_answers():
    """Another answer is a difference; the same one without [SEG] decides nothing."""
    native, theirs = sides()
    theirs["answer_ids"] = np.array([3, 5, SEG])
    assert compared(native, theirs)[1] == "differs: first in answer up to [SEG]"
    for side in (native, theirs):
        side["answer_ids"] = np.array([3, 4])
        side.pop("seg_state")
    same, line = compared(native, theirs)
    assert not same and line.startswith("undecided")
    text = compare.table(compare.compare(*sides(), "fp32", SEG))
    assert len({line.index("published") for line in text.splitlines()[:1]}) == 1 and "DIFFERS" not in text


def test_the_picture_shows_where_masks_differ(tmp_path):
    """A pixel of ours alone is red and one of theirs blue in the last of four cells; equal masks show neither."""
    image = np.full((64, 64, 3), 120, np.uint8)
    ours, theirs = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
    ours[10, 10] = theirs[40, 40] = True

    def colours() -> set:
        pixels = np.asarray(Image.open(tmp_path / "a.png")).reshape(-1, 3)
        return set(map(tuple, pixels.tolist()))

    picture.side_by_side(tmp_path / "a.png", image, ours, theirs, "differs")
    assert {picture.ONLY_NATIVE, picture.ONLY_PUBLISHED} <= colours()
    four = Image.open(tmp_path / "a.png").width
    picture.side_by_side(tmp_path / "a.png", image, ours, ours, "same")
    assert not {picture.ONLY_NATIVE, picture.ONLY_PUBLISHED} & colours()
    picture.side_by_side(tmp_path / "a.png", image, ours, None)
    assert abs(2 * Image.open(tmp_path / "a.png").width - four) < 20


@pytest.mark.parametrize("shape", [(1, 1), (20, 3000)])
def test_the_picture_of_an_odd_image(tmp_path, shape):
    mask = np.ones(shape, bool)
    picture.side_by_side(tmp_path / "a.png", np.zeros((*shape, 3), np.uint8), mask, ~mask)
    assert Image.open(tmp_path / "a.png").size[0] > 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small directory that says SAID about IMAGE, an image file, and code that stands for the published one."""
    folder = tmp_path_factory.mktemp("verify")
    directory = folder / "model"
    model = small.build()
    teach(model, small.preprocess(), SAID, IMAGE)
    settings = small.config() | {"auto_map": {"AutoModel": "modeling_own.Own"}}
    published.save(directory, model, settings, small.tokenizer(), dtype=published.torch.float32)
    (directory / "modeling_own.py").write_text("from .part import thing\n")
    (directory / "part.py").write_text("thing = 1\n")
    (directory / "not_needed.py").write_text("")
    (directory / "stand_in.json").write_text("{}")
    Image.fromarray(IMAGE).save(folder / "image.png")
    (folder / "stand_in.py").write_text(STAND_IN)
    return folder


@pytest.fixture(scope="module")
def native(checkpoint) -> both_sides.NativeSide:
    return both_sides.native_side(
        str(checkpoint / "model"), IMAGE, small.QUESTION, precision="fp32", device="cpu", max_answer_tokens=8
    )


def beside(checkpoint: Path, native, output: Path, **changed) -> tuple[bool, str]:
    """The comparison with a stand-in that gives back our own figures, some of them changed."""
    arrays = {name: array for name, array in native.arrays.items() if name != "mask_logits"}
    chosen = native.arrays["predicted_iou"].argmax()
    arrays |= {"mask": native.arrays["mask_logits"][chosen] > 0} | changed
    np.savez(checkpoint / "model" / "stand_in.npz", **arrays)
    output.mkdir()
    said: list[str] = []
    places = (Path(sys.executable), checkpoint / "model", IMAGE, output)
    settings = {"precision": "fp32", "max_answer_tokens": 8, "script": checkpoint / "stand_in.py"}
    same = both_sides.side_by_side(native, *places, say=said.append, **settings)
    return same, "\n".join(said)


def test_the_same_figures_from_a_second_process_are_the_same(checkpoint, native, tmp_path):
    same, said = beside(checkpoint, native, tmp_path / "out")
    assert same and said.splitlines()[-1] == "verdict: same"
    assert "its answer: 'It is [SEG].'" in said and "(transformers 4.57.1)" in said
    report = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert report["verdict"] == "same, fp32" and [row["ok"] for row in report["rows"]] == [True] * 10
    assert Image.open(tmp_path / "out" / "verify.png").width > 900
    assert (tmp_path / "out" / "published.log").read_text().startswith("loading")


def test_other_figures_from_a_second_process_differ(checkpoint, native, tmp_path):
    logits = native.arrays["candidate_logits"] * 1.001
    same, said = beside(checkpoint, native, tmp_path / "out", candidate_logits=logits)
    assert not same and said.splitlines()[-1] == "verdict: differs: first in logits of the three masks"
    assert json.loads((tmp_path / "out" / "verify.json").read_text())["verdict"].startswith("differs")


def test_what_the_native_mask_follows_is_said(checkpoint, native):
    """This model says "It is [SEG]", not the training's words: both masks are spoken of."""
    assert native.forced is not native.prediction
    said = "\n".join(both_sides.answer_remarks(native))
    assert "its answer: 'It is [SEG]'" in said and re.search(r"Dice with this one is \d\.\d{4}", said)


def test_the_compared_mask_goes_through_1024_as_the_published_one(native):
    """At 112 x 56 both ways of resizing agree but for a few outline pixels; the shape is the image's."""
    chosen = native.arrays["predicted_iou"].argmax()
    two_steps_HW = native.arrays["mask_logits"][chosen]
    one_step_HW = native.prediction.mask_logits_HW.numpy()
    assert two_steps_HW.shape == one_step_HW.shape == (56, 112)
    assert ((two_steps_HW > 0) != (one_step_HW > 0)).mean() < 0.02


def test_a_failing_second_process_shows_its_last_words(checkpoint, tmp_path):
    (tmp_path / "stand_in.json").write_text('{"fails": true}')
    settings = {"precision": "fp32", "max_answer_tokens": 8, "log": tmp_path / "log"}
    with pytest.raises(UserError, match=r"(?s)exit code 1.*log.*this code is broken"):
        run_published(Path(sys.executable), tmp_path, IMAGE, "What?", script=checkpoint / "stand_in.py", **settings)


def test_the_files_that_will_run_are_named(checkpoint, tmp_path):
    """Those of auto_map and what they import; not every Python file that lies there."""
    assert [file.name for file in remote_files(checkpoint / "model")] == ["modeling_own.py", "part.py"]
    config = tmp_path / "config.json"
    config.write_text("{}")
    with pytest.raises(UserError, match="no auto_map"):
        remote_files(tmp_path)
    config.write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        remote_files(tmp_path)
    config.write_text('{"auto_map": {"AutoModel": "someone/model--modeling_own.Own"}}')
    with pytest.raises(UserError, match="outside of the directory"):
        remote_files(tmp_path)
    config.write_text('{"auto_map": {"AutoModel": "modeling_own.Own"}}')
    with pytest.raises(UserError, match=r"modeling_own\.py: no such file"):
        remote_files(tmp_path)
    (tmp_path / "modeling_own.py").write_text("class :")
    with pytest.raises(UserError, match="not Python"):
        remote_files(tmp_path)
    (tmp_path / "modeling_own.py").write_text("")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["words.Words", null]}}')
    (tmp_path / "words.py").write_text("")
    assert [file.name for file in remote_files(tmp_path)] == ["modeling_own.py", "words.py"]


def fake_python(folder: Path, says: str) -> str:
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{says}\n")
    python.chmod(0o755)
    return str(python)


def test_the_other_python_is_tried_out_first(tmp_path, monkeypatch):
    good = fake_python(tmp_path, 'echo " 4.57.1"')
    assert str(find_python(good)) == good
    for says, message in (
        ('echo "timm,einops 4.57.1"', "lacks timm, einops; make one: python3 -m venv"),
        ('echo " 5.23.0"', "transformers 5.23.0, under which the published code does not load"),
        ("echo broken >&2; exit 3", r"does not start \(broken\)"),
    ):
        with pytest.raises(UserError, match=message):
            find_python(fake_python(tmp_path, says))
    with pytest.raises(UserError, match="no such program; .*published_requirements.txt"):
        find_python(str(tmp_path / "absent"))
    monkeypatch.setattr("sft.verify.published_side.CHECKOUT", tmp_path)
    with pytest.raises(UserError, match=r"no .*\.venv_published/bin/python; .*make one"):
        find_python(None)
    (tmp_path / ".venv_published" / "bin").mkdir(parents=True)
    fake_python(tmp_path / ".venv_published" / "bin", 'echo " 4.57.1"')
    assert find_python(None) == tmp_path / ".venv_published" / "bin" / "python"


def test_the_probe_asks_a_real_python():
    """This project's own environment has transformers 5 and, by its rules, not all of what the published code needs."""
    with pytest.raises(UserError, match="lacks|does not load"):
        find_python(sys.executable)


def test_the_requirements_name_all_that_is_probed():
    lines = (ROOT / "launch" / "published_requirements.txt").read_text().splitlines()
    named = {line.partition("==")[0] for line in lines if line and not line.startswith("#")}
    assert {"pillow" if name == "PIL" else name for name in NEEDED} <= named
    assert "transformers==4.57.1" in lines


def launch(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, check=False)


def test_the_command_without_remote_code(checkpoint, tmp_path):
    """Loads, answers, writes the native mask, says what was not compared; nothing of the directory runs."""
    output = tmp_path / "out"
    done = launch("--model_path", checkpoint / "model", "--image", checkpoint / "image.png", "--output", output)
    assert done.returncode == 0, done.stderr
    assert "not compared" in done.stdout and "--trust_remote_code" in done.stdout
    assert (output / "verify.png").is_file() and not (output / "published.log").exists()
    assert json.loads((output / "verify.json").read_text())["verdict"] == "not compared"


def test_mistakes_are_one_line_and_found_before_torch(checkpoint, tmp_path, monkeypatch, capsys):
    """In this process: a mistake among the paths never gets as far as `verify`."""
    spec = importlib.util.spec_from_file_location("verify_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "verify", lambda _: pytest.fail("went on"))
    model, image = checkpoint / "model", checkpoint / "image.png"
    (tmp_path / "empty").mkdir()
    for words, message in (
        (("--model_path", tmp_path / "x", "--image", image), "model_path .*x: does not exist"),
        (("--model_path", image, "--image", image), "is a file; give the directory"),
        (("--model_path", tmp_path / "empty", "--image", image), "no config.json"),
        (("--model_path", model, "--image", tmp_path / "x.png"), "image .*x.png: does not exist"),
        (("--model_path", model, "--image", tmp_path), "is a folder"),
        (("--model_path", model, "--image", image, "--output", image), "output .*: is a file"),
        (("--model_path", model, "--image", image, "--device", "gpu"), "allowed are cpu, cuda"),
        (("--model_path", model, "--image", image, "--max_answer_tokens", 0), "give at least 1"),
    ):
        monkeypatch.setattr(sys, "argv", ["verify.py", *map(str, words)])
        assert script.main() == 2
        assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)


def test_an_unreadable_image_and_a_missing_python_are_one_line(checkpoint, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"none")
    done = launch("--model_path", checkpoint / "model", "--image", tmp_path / "broken.png")
    assert done.returncode == 2 and re.fullmatch(r"error: .*broken.png: cannot be decoded.*\n", done.stderr)
    files = ("--model_path", checkpoint / "model", "--image", checkpoint / "image.png", "--trust_remote_code")
    done = launch(*files, "--published_python", tmp_path / "none")
    assert done.returncode == 2 and done.stdout == "" and "make one: python3 -m venv" in done.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys, runpy; sys.argv = ['verify.py', '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "--trust_remote_code" in done.stdout


def test_a_checkpoint_without_the_words_is_followed_by_the_training_s(checkpoint, tmp_path):
    """Zero heads say token 0 for ever: the native mask follows the training's words and that is said."""
    directory = tmp_path / "model"
    directory.mkdir()
    for file in (checkpoint / "model").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    weights = load_file(directory / "model.safetensors")
    weights["language_model.lm_head.weight"].zero_()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    native = both_sides.native_side(
        str(directory), IMAGE, small.QUESTION, precision="fp32", device="cpu", max_answer_tokens=3
    )
    assert native.prediction.forced and "mask_logits" not in native.arrays
    assert "does not say [SEG]" in "\n".join(both_sides.answer_remarks(native))
