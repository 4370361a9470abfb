"""The log of a run, its picture and its page: exact lines, JSON valid at every moment, resume, and files that open."""

import json
import math
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sft.report
from sft.config import TrainConfig, UserError
from sft.report import NullLog, Progress, RunLog, format_duration, format_epoch, format_val
from sft.report.charts import line_chart
from sft.report.page import write_html
from sft.report.pictures import FALSE_ALARM, FOUND, MISSED, ComparisonRow, comparison_picture

PLAIN = TrainConfig(tensorboard=False)

EPOCH_ROW = {
    "epoch": 3, "step": 300, "loss": 0.4321, "dice": 0.31, "focal": 0.0213, "bce": 0.2016, "lr": 9.1234e-5,
    "samples_per_s": 12.34, "step_s": 0.081, "data_s": 0.00081, "forward_s": 0.0243, "backward_s": 0.0405,
    "optimizer_s": 0.01539, "gpu_gib": 11.24, "eta_s": 723.4,
}  # fmt: skip
VAL_ROW = {
    "epoch": 3, "step": 300, "dice": 0.81234, "iou": 0.69, "recall": 0.8, "precision": 0.834, "dice_best": 0.82006,
    "threshold_best": 0.35, "seg_rate": 1.0, "dice_per_image": [0.9, 0.72468],
}  # fmt: skip


def step_row(step: int) -> dict:
    return {"epoch": 1 + step // 10, "step": step, "loss": 1 / step, "dice": 0.5, "focal": 0.01, "bce": 0.2, "lr": 1e-4}


def rows_on_disk(run_dir: Path) -> list[dict]:
    return json.loads((run_dir / "training_log.json").read_text())


def test_epoch_line_holds_the_weighted_terms_that_add_up_to_the_loss():
    assert format_epoch(EPOCH_ROW, PLAIN) == (
        "Epoch 3/15 | loss 0.4321 = dice 0.3100 + focal 0.0213 + bce 0.1008 | lr 9.1e-05 | 12.3 samples/s"
        " | step 81 ms (data 1% forward 30% backward 50% optimizer 19%) | GPU 11.2 GiB | ETA 0:12:03"
    )


def test_epoch_line_without_a_gpu_and_with_the_text_term():
    config = TrainConfig(text_weight=0.5)
    line = format_epoch(EPOCH_ROW | {"gpu_gib": None, "text": 0.3}, config)
    assert "+ bce 0.1008 + text 0.1500 |" in line
    assert "GPU" not in line


def test_val_line():
    assert format_val(VAL_ROW, PLAIN) == (
        "Val 3/15 | Dice 0.8123 | IoU 0.69 | recall 0.80 | precision 0.83 | Dice_best 0.8201 at 0.35 | seg_rate 1.00"
    )


def test_val_line_of_the_base_says_so_and_may_lack_the_seg_rate():
    line = format_val(VAL_ROW | {"epoch": 0, "seg_rate": None}, PLAIN)
    assert line.startswith("Val 0/15 | Dice 0.8123") and line.endswith("at 0.35 | base")


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (723.4, "0:12:03"), (360061, "100:01:01"), (math.inf, "?"), (-1, "0:00:00")],
)
def test_durations(duration_s, text):
    assert format_duration(duration_s) == text


def test_both_logs_hold_every_line_at_once(tmp_path, capsys):
    (tmp_path / "training.log").write_text("an older run\n")
    run_dir = tmp_path / "run"
    with RunLog(tmp_path, run_dir, PLAIN) as log:
        log.line("血管")
        log.epoch(EPOCH_ROW)
        log.val(VAL_ROW)
        expected = f"血管\n{format_epoch(EPOCH_ROW, PLAIN)}\n{format_val(VAL_ROW, PLAIN)}\n"
        # Read while the log is open: nothing waits in a buffer.
        assert (tmp_path / "training.log").read_text(encoding="utf-8") == expected
        assert (run_dir / "training.log").read_text(encoding="utf-8") == expected
        assert capsys.readouterr().out == expected
        assert rows_on_disk(run_dir) == [{"kind": "train"} | EPOCH_ROW, {"kind": "val"} | VAL_ROW] == log.rows


def test_json_is_a_valid_list_before_the_first_row_and_holds_every_row_after_close(tmp_path):
    with RunLog(tmp_path, tmp_path, PLAIN) as log:
        assert rows_on_disk(tmp_path) == []
        for step in range(1, 200):
            log.step(step_row(step))
    assert [row["step"] for row in rows_on_disk(tmp_path)] == list(range(1, 200))
    assert rows_on_disk(tmp_path)[0] == {"kind": "step"} | step_row(1)


def test_one_directory_for_output_and_run_still_has_every_line_once(tmp_path):
    with RunLog(tmp_path, tmp_path, PLAIN) as log:
        log.line("once")
    assert (tmp_path / "training.log").read_text() == "once\n"


def test_nan_and_infinity_are_null_in_json(tmp_path):
    with RunLog(tmp_path, tmp_path / "run", PLAIN) as log:
        log.step(step_row(1) | {"loss": math.nan, "bce": math.inf})
        log.val(VAL_ROW | {"dice_per_image": [0.5, -math.inf]})
    (step, val) = json.loads((tmp_path / "run/training_log.json").read_text(), parse_constant=pytest.fail)
    assert step["loss"] is None and step["bce"] is None and val["dice_per_image"] == [0.5, None]


def test_a_reader_never_sees_a_list_that_is_not_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sft.report, "REWRITE_EVERY_S", 0.0)
    lengths, done = [], threading.Event()

    def read():
        while not done.is_set():
            lengths.append(len(rows_on_disk(tmp_path)))

    with RunLog(tmp_path, tmp_path, PLAIN) as log:
        reader = threading.Thread(target=read)
        reader.start()
        for step in range(1, 500):
            log.step(step_row(step))
        done.set()
        reader.join()
    assert len(lengths) > 10 and lengths == sorted(lengths)


def test_json_is_valid_after_kill_9(tmp_path):
    script = (
        "import sys, sft.report; from pathlib import Path; from sft.config import TrainConfig\n"
        "sft.report.REWRITE_EVERY_S = 0.0\n"
        "log = sft.report.RunLog(Path(sys.argv[1]), Path(sys.argv[1]), TrainConfig(tensorboard=False))\n"
        "for step in range(10**9): log.step({'epoch': 1, 'step': step, 'loss': 0.5})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    deadline_s = time.monotonic() + 20
    while not (tmp_path / "training_log.json").exists() or len(rows_on_disk(tmp_path)) < 50:
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = rows_on_disk(tmp_path)
    assert [row["step"] for row in rows] == list(range(len(rows)))


def test_resume_drops_rows_after_the_resumed_step_and_keeps_the_rest(tmp_path):
    run_dir = tmp_path / "run"
    with RunLog(tmp_path, run_dir, PLAIN) as log:
        for step in (10, 20, 30):
            log.step(step_row(step))
        log.line("before")
    (tmp_path / "training.log").write_text("another run came between\n")
    with RunLog(tmp_path, run_dir, PLAIN, resume_step=20) as log:
        assert [row["step"] for row in log.rows] == [10, 20]
        log.step(step_row(30) | {"loss": 7.0})
        log.line("after")
    assert [(row["step"], row["loss"]) for row in rows_on_disk(run_dir)] == [(10, 0.1), (20, 0.05), (30, 7.0)]
    for path in (tmp_path / "training.log", run_dir / "training.log"):
        assert path.read_text() == "before\nafter\n"


def test_resume_into_a_directory_without_a_log_starts_one(tmp_path):
    with RunLog(tmp_path, tmp_path / "new", PLAIN, resume_step=20) as log:
        log.line("hello")
    assert rows_on_disk(tmp_path / "new") == []


def test_an_output_dir_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file.*--output_dir"):
        RunLog(tmp_path / "file", tmp_path / "file" / "run", PLAIN)


def test_a_full_disk_at_the_beginning_names_the_folder(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")  # a write names no file

    monkeypatch.setattr(RunLog, "_rewrite", full)
    with pytest.raises(UserError, match=f"cannot write {tmp_path / 'run'}: No space left"):
        RunLog(tmp_path, tmp_path / "run", TrainConfig(tensorboard=False))


def test_tensorboard_events_hold_every_number_and_survive_a_resume(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(tmp_path, tmp_path / "run", TrainConfig()) as log:
        log.step(step_row(10))
        log.step(step_row(20))
        log.val(VAL_ROW | {"step": 20})
    with RunLog(tmp_path, tmp_path / "run", TrainConfig(), resume_step=10) as log:
        log.step(step_row(20) | {"loss": 7.0})
    events = accumulators.EventAccumulator(str(tmp_path / "run")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("step/loss")] == [(10, pytest.approx(0.1)), (20, 7.0)]
    assert "val/dice" in events.Tags()["scalars"] and "val/epoch" not in events.Tags()["scalars"]


def test_null_log_has_every_public_method_of_run_log(tmp_path, capsys):
    public = {name for name in vars(RunLog) if not name.startswith("_")} | {"rows", "__enter__", "__exit__"}
    assert public <= set(vars(NullLog))
    with NullLog() as log:
        log.start(10)
        log.advance()
        log.line("text")
        log.step({})
        log.epoch({})
        log.val({})
    assert capsys.readouterr().out == ""


def test_progress_off_a_terminal_is_a_plain_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(sft.report, "PLAIN_PROGRESS_EVERY_S", 0.0)
    with Progress("Training", total=4, done=2) as progress:
        progress.note("loss 0.5000")
        progress.advance()
    assert capsys.readouterr().err == "Training: step 3/4 | loss 0.5000 | ETA 0:00:00\n"
    monkeypatch.setattr(sft.report, "PLAIN_PROGRESS_EVERY_S", 1000.0)
    with Progress("Training", total=4) as progress:
        progress.advance()
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_is_a_bar_with_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("Features", total=4, unit="image") as progress:
        progress.advance(2)
        progress.note("warm")
    assert "Features" in capsys.readouterr().err


def test_a_run_log_without_a_started_progress_takes_rows(tmp_path):
    with RunLog(tmp_path, tmp_path, PLAIN) as log:
        log.step(step_row(1))
        log.start(total_steps=3, step=1)
        log.advance()
        log.step(step_row(2))


def comparison_rows() -> list[ComparisonRow]:
    image = np.full((40, 30, 3), 200, np.uint8)
    mask, base, tuned = np.zeros((3, 40, 30), bool)
    mask[:, 10] = True  # one pixel wide
    base[:, 11] = True
    tuned[:20, 10] = True
    return [
        ComparisonRow("thin", image, mask, base, tuned),
        ComparisonRow("empty", image, *np.zeros((3, 40, 30), bool)),
    ]


def count(pixels_HW3: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((pixels_HW3 == colour).all(-1).sum())


def test_picture_shows_thin_vessels_sharply_in_their_three_colours(tmp_path):
    comparison_picture(tmp_path / "picture.png", comparison_rows()[:1], cell_px=80)
    with Image.open(tmp_path / "picture.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    # Enlarged twice, 60 wide, 10 apart; titles above of 1.6 x 14 px.
    truth, base, tuned = (pixels[22:102, left : left + 60] for left in (80, 150, 220))
    # A column of 40 pixels, each 2 x 2.
    assert count(truth, FOUND) == 160
    assert (count(base, MISSED), count(base, FALSE_ALARM), count(base, FOUND)) == (160, 160, 0)
    assert (count(tuned, FOUND), count(tuned, MISSED), count(tuned, FALSE_ALARM)) == (80, 80, 0)


def test_picture_of_images_larger_than_a_cell_and_of_different_shapes(tmp_path):
    wide = [np.zeros((20, 200, 3), np.uint8), *np.ones((3, 20, 200), bool)]
    comparison_picture(tmp_path / "picture.png", [*comparison_rows(), ("w" * 300, *wide)], cell_px=50)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width == 4 * 50 + 50


def test_picture_refuses_no_rows_and_masks_of_another_size(tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        comparison_picture(tmp_path / "picture.png", [])
    row = comparison_rows()[0]._replace(base_HW=np.zeros((4, 4), bool))
    with pytest.raises(ValueError, match="thin: mask .* differ in size"):
        comparison_picture(tmp_path / "picture.png", [row])


def page_of(tmp_path: Path, rows: list[dict], **more) -> str:
    config = {
        "num_epochs": 15,
        "lora_rank": 8,
        "bce_weight": 0.5,
        "lora_scope": ["language_model"],
        "versions": {"a": "1"},
    }
    write_html(tmp_path / "report.html", "run <1>", config, rows, **more)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_page_shows_gain_images_and_changed_settings_and_needs_no_network(tmp_path):
    base = VAL_ROW | {"kind": "val", "epoch": 0, "step": 0, "dice": 0.5, "dice_best": 0.7, "dice_per_image": [0.6, 0.4]}
    rows = [base, {"kind": "step"} | step_row(5), {"kind": "step"} | step_row(6), {"kind": "train"} | EPOCH_ROW]
    rows += [{"kind": "val"} | VAL_ROW, VAL_ROW | {"kind": "val", "epoch": 4, "step": 400, "dice": 0.6}]
    comparison_picture(tmp_path / "picture.png", comparison_rows())
    page = page_of(tmp_path, rows, image_names=["A", "B&C"], picture=tmp_path / "picture.png")
    assert "<h1>run &lt;1&gt;</h1>" in page
    assert "best epoch 3" in page
    assert "0.500 → 0.812" in page and "+0.312" in page  # Dice
    assert "0.700 → 0.820" in page and "+0.120" in page  # each at its best threshold
    assert "0.700 → 0.812" in page and "+0.112" in page  # the base at its best
    assert page.index("B&amp;C") < page.index("<td>A</td>")  # worst first
    assert "<div class=changed><span>lora_rank</span><span>8</span>" in page
    assert "<div><span>lora_scope</span><span>language_model</span>" in page  # JSON's list equals the default's tuple
    assert "<span>versions.a</span>" in page
    assert page.count("<svg") == 3 and "data:image/png;base64," in page
    assert "http" not in page and "<script" not in page


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [VAL_ROW | {"kind": "val", "epoch": 0, "step": 0}],
        [VAL_ROW | {"kind": "val"}],
        [{"kind": "step"} | step_row(1) | {"loss": None, "lr": None}],
    ],
    ids=["nothing", "the base alone", "no base", "a loss of NaN"],
)
def test_page_of_a_run_that_is_not_complete(tmp_path, rows):
    page = page_of(tmp_path, rows)
    assert page.startswith("<!DOCTYPE html>") and page.endswith("</html>\n")


@pytest.mark.parametrize(
    ("points", "log_y"),
    [
        ([(0, 1.0)], False),
        ([(0, 1e-4), (10, 1e-4)], False),
        ([(0, -3.0), (10, 250.0)], False),
        ([(0, 1.0)], True),
        ([(0, 1e-9), (5, 0.0), (7, None), (10, 3e3)], True),
        ([(0, math.nan)], False),
        ([(step, math.sin(step)) for step in range(1000)], False),
        ([], True),
    ],
)
def test_charts_are_well_formed_and_stay_inside_their_frame(points, log_y):
    chart = ElementTree.fromstring(line_chart("a < b", {"one": points}, "step", log_y))
    width, height = map(float, chart.get("viewBox").split()[2:])
    for circle in chart.iter("circle"):
        assert 0 <= float(circle.get("cx")) <= width and 0 <= float(circle.get("cy")) <= height
    for path in chart.findall("path[@class='line']"):
        numbers = [tuple(map(float, point.split())) for point in path.get("d")[1:].split("L")]
        assert len(numbers) <= 300 and all(0 <= x <= width and 0 <= y <= height for x, y in numbers)
