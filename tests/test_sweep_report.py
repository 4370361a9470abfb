"""The report of a sweep, from trials made by hand: figures one can compute on paper, pictures, page and table."""

import base64
import csv
import dataclasses
import io
import json
import math
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.ensemble import RandomForestRegressor

from sft.config import TrainConfig
from tune import importance, page, pictures, results, tally
from tune.scales import MISSING, scale, shown
from tune.space import Axis, Space, as_record
from tune.trials import SEED_SETTING, Sweep, Trial

EPOCHS = 10
SPACE = Space(
    (
        Axis("learning_rate", "loguniform", (1e-5, 1e-3)),
        Axis("lora_rank", "choice", (8, 16, 32)),
        Axis("lora_bias", "choice", ("none", "all")),
        Axis("lora_dropout", "uniform", (0.0, 0.2)),
    ),
    {"lora_alpha": "2 * lora_rank"},
)
PARAMS = {"learning_rate": 1e-4, "lora_rank": 16, "lora_bias": "none", "lora_dropout": 0.05}


def sweep_of(space: Space = SPACE, **changes) -> Sweep:
    base = json.loads(json.dumps(dataclasses.asdict(TrainConfig(num_epochs=EPOCHS))))
    known = {
        "name": "sweep_1", "base": base, "space": json.loads(json.dumps(as_record(space))), "search": "random",
        "num_trials": 4, "early_stop": True, "grace_epochs": 2, "reduction": 2, "seed": 0, "gpus_per_trial": 1.0,
        "started": "2026-11-25 21:00:00", "versions": {"torch": "2.13.0"}, "command": ["tune/search.py", "--seed", "0"],
        "options": {},
    }  # fmt: skip
    return Sweep(**known | changes)


def rows_of(dices, epoch_s: float = 20.0, start_s: float = 10.0, every: int = 1) -> tuple[dict, ...]:
    """Validations each `every` epochs; Dice_best lies 0.01 above Dice, at threshold 0.4."""
    return tuple(
        {"epoch": every * count, "dice": dice, "dice_so_far": max(dices[:count]), "dice_best": dice + 0.01,
         "threshold_best": 0.4, "iou": 0.5, "recall": 0.6, "precision": 0.7,
         "device_s": start_s + epoch_s * every * count, "time": 1.8e9}
        for count, dice in enumerate(dices, start=1)
    )  # fmt: skip


def trial(number: int, dices=(), status="finished", origin="random", params=PARAMS, settings=None, **more) -> Trial:
    return Trial(number, origin, dict(params), settings or {}, rows_of(dices, **more.pop("rows", {})), status, **more)


SEED_TRIAL = trial(0, [0.5, 0.8441, 0.84], origin=SEED_SETTING)
BEST = trial(2, [0.6, 0.8612, 0.85], settings={"learning_rate": 2e-4})
FAILED = trial(3, status="failed", reason="CUDA out of memory")


def repeat(number: int, of: int, seed: int, dice: float, status="finished") -> Trial:
    return trial(number, [dice], status, f"trial {of}, seed {seed}", settings={"seed": seed})


# Figures and sentences


@pytest.mark.parametrize(
    ("trials", "line"),
    [
        ([], "no trial has a Dice yet"),
        ([FAILED, trial(1, status="unfinished")], "no trial has a Dice yet: 1 failed, 1 unfinished"),
        ([SEED_TRIAL, BEST, FAILED], "trial 2: Dice 0.8612, seed setting 0.8441: +0.0171"),
        ([BEST], "trial 2: Dice 0.8612; the seed setting is not among the trials"),
        (
            [dataclasses.replace(FAILED, origin=SEED_SETTING), BEST],
            "trial 2: Dice 0.8612; the seed setting has no Dice: it failed: CUDA out of memory",
        ),
        ([SEED_TRIAL], "the seed setting is best: trial 0: Dice 0.8441"),
        (
            [SEED_TRIAL, trial(1, [0.84], "stopped")],
            "the seed setting is best: trial 0: Dice 0.8441, next trial 1 (stopped at epoch 1 of 10): 0.8400: -0.0041",
        ),
        (
            [dataclasses.replace(SEED_TRIAL, status="stopped"), BEST],
            "trial 2: Dice 0.8612, seed setting (stopped at epoch 3 of 10) 0.8441: +0.0171",
        ),
        (
            [SEED_TRIAL, BEST, repeat(4, 2, 43, 0.85), repeat(5, 2, 44, 0.86), repeat(6, 0, 43, 0.84)],
            "trial 2: Dice 0.8612, seed setting 0.8441: +0.0171; with other seeds 0.8550 ± 0.0071 (2), "
            "seed setting 0.8400 (1)",
        ),
    ],
)
def test_the_verdict_is_one_line(trials, line):
    assert tally.verdict(sweep_of(), trials) == line


def test_repeats_are_counted_without_the_trial_they_repeat_and_only_when_they_ran_to_the_end():
    trials = [BEST, repeat(4, 2, 43, 0.85), repeat(5, 2, 44, 0.86), repeat(6, 2, 45, 0.99, "unfinished")]
    found = tally.repeats(trials)
    assert found == {2: tally.Repeats(2, (0.85, 0.86))}
    assert found[2].mean == pytest.approx(0.855) and found[2].spread == pytest.approx(0.01 / math.sqrt(2))
    assert tally.best_trial(trials) is BEST


def test_device_time_used_and_saved_by_hand():
    """Half a GPU: 10 s to start, 20 s an epoch. Stopped at epoch 4, six epochs are spared; starting up is not."""
    trials = [trial(0, [0.5] * 10), trial(1, [0.4] * 4, "stopped"), FAILED, trial(4, [0.4] * 3, "unfinished")]
    sweep = sweep_of(gpus_per_trial=0.5)
    found = tally.costs(sweep, trials)
    assert found[0] == tally.Cost(105.0, 0.0) and found[1] == tally.Cost(45.0, 60.0)
    assert found[3] == tally.Cost(0.0, 0.0) and found[4] == tally.Cost(35.0, 0.0)
    assert tally.saved(sweep, trials) == (
        "3.08 GPU-minutes used, about 4.08 without early stopping: 24% saved by stopping 1 of 4 trials"
    )


def test_of_a_single_validation_the_whole_time_counts():
    stopped = trial(1, [0.4], "stopped", rows={"every": 2})
    assert tally.costs(sweep_of(), [stopped])[1] == tally.Cost(50.0, 8 * 25.0)


def test_of_a_trial_that_has_waited_starting_again_does_not_count_either():
    """10 s to start, 20 s an epoch, and after epoch 2 another 10 s."""
    rows = [{**row, "device_s": row["device_s"] + 10.0 * (row["epoch"] > 2)} for row in trial(1, [0.4] * 4).rows]
    stopped = dataclasses.replace(trial(1, [0.4] * 4, "stopped"), rows=tuple(rows))
    assert tally.costs(sweep_of(gpus_per_trial=1), [stopped])[1] == tally.Cost(100.0, 120.0)


def test_the_most_that_wait_are_the_best_third_of_each_rung():
    assert tally.most_waiting(sweep_of(grace_epochs=1, reduction=3, num_trials=27)) == 9 + 3 + 1
    assert tally.most_waiting(sweep_of(grace_epochs=1, reduction=3, num_trials=2)) == 2
    assert tally.most_waiting(sweep_of(early_stop=False, num_trials=27)) == 0


def test_epochs_that_are_left_are_those_that_asha_plans_and_all_of_the_repeats():
    """Ten epochs, rungs at 1, 3 and 9; of 27 trials 9, 3 and 1 go on, and the seed setting."""
    sweep = sweep_of(grace_epochs=1, reduction=3, num_trials=27)
    planned = 27 * 1 + 10 * 2 + 4 * 6 + 2 * 1
    assert tally.epochs_left(sweep, [], 27) == planned
    begun = [trial(0, [0.5] * 4, "unfinished"), trial(1, [0.5], "stopped"), trial(2, [0.5], "unfinished")]
    assert tally.epochs_left(sweep, begun, 27) == planned - 6
    one = dataclasses.replace(sweep, num_trials=3)
    late = [trial(0, [0.5] * 9, "unfinished"), trial(1, [0.5] * 9, "unfinished"), trial(2, [0.5] * 8, "unfinished")]
    assert tally.epochs_left(one, late, 3) == 1 + 1 + 1  # more came far than planned
    ended = [trial(0, [0.5] * 10), trial(1, [0.5], "stopped"), trial(2, [0.5], "stopped")]
    assert tally.epochs_left(one, ended, 3) == 0
    assert tally.epochs_left(one, [*ended, repeat(3, 0, 43, 0.5, "unfinished")], 5) == 9 + 10
    whole = dataclasses.replace(one, early_stop=False)
    assert tally.epochs_left(whole, [*late[:2], FAILED], 4) == 1 + 1 + 10


def test_hours_cpus_and_no_stopping_are_told_as_such():
    long = trial(0, [0.5] * 10, rows={"epoch_s": 719.0})
    assert tally.saved(sweep_of(), [long]) == "2.00 GPU-hours used; early stopping has spared nothing yet"
    assert tally.saved(sweep_of(early_stop=False, gpus_per_trial=0), [trial(0, [0.5] * 10)]) == (
        "3.50 minutes on CPUs used; early stopping was off"
    )


def test_rungs_are_the_epochs_at_which_a_trial_may_be_stopped():
    assert tally.rungs(sweep_of()) == [2, 4, 8]
    assert tally.rungs(sweep_of(grace_epochs=3, reduction=3)) == [3, 9]
    assert tally.rungs(sweep_of(early_stop=False)) == tally.rungs(sweep_of(grace_epochs=EPOCHS)) == []


# Scales


def test_places_on_axes_of_each_kind():
    log = scale(SPACE.axes[0], [1e-4])
    assert (log.place(1e-5), log.place(1e-4), log.place(1e-3)) == pytest.approx((0.0, 0.5, 1.0))
    assert log.place(0) is None and log.place(MISSING) is None and log.place(float("nan")) is None
    rank = scale(SPACE.axes[1], [])
    assert rank.kind == "log" and rank.ticks() == [(0.0, "8"), (0.5, "16"), (1.0, "32")]
    words = scale(SPACE.axes[2], ["lora_only"])
    assert [words.place(word) for word in ("none", "all", "lora_only")] == [0.0, 0.5, 1.0]
    assert words.place(MISSING) is None and scale(Axis("x", "choice", (None, 3)), []).place(None) == 0.0


def test_a_value_off_the_grid_widens_its_axis():
    rank = scale(SPACE.axes[1], [64])
    assert rank.place(64) == 1.0 and rank.place(32) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("axis", "labels"),
    [
        (Axis("x", "loguniform", (1e-5, 1e-2)), ["1e-5", "1e-4", "0.001", "0.01"]),
        (Axis("x", "loguniform", (2e-5, 1e-4)), ["2e-5", "5e-5", "1e-4"]),
        (Axis("x", "loguniform", (3e-5, 4e-5)), ["3e-5", "4e-5"]),
        (Axis("x", "uniform", (0.0, 0.15)), ["0", "0.02", "0.04", "0.06", "0.08", "0.1", "0.12", "0.14"]),
        (Axis("x", "randint", (1, 5)), ["1", "2", "3", "4", "5"]),
        (Axis("x", "choice", (0.0, 0.001, 0.1)), ["0", "0.1"]),
        (Axis("x", "choice", (7,)), ["7"]),
    ],
)
def test_ticks_are_round_and_apart(axis, labels):
    assert [text for _, text in scale(axis, []).ticks()] == labels


def test_values_as_text():
    assert [shown(value) for value in (2.345e-4, 0.00144, 12, True, None, ["a", "b c"], (), float("nan"), MISSING)] == [
        "2.35e-4", "0.00144", "12", "true", "none", "a, b c", "none", "–", "–",
    ]  # fmt: skip


# Importance


def drawn(count: int, dice_of, seed: int = 1) -> list[Trial]:
    generator = random.Random(seed)
    found = []
    for number in range(count):
        params = SPACE.draw(generator)
        found.append(trial(number, [dice_of(params, generator)], ("finished", "stopped")[number % 2], params=params))
    return found


def by_rate(params: dict, generator: random.Random) -> float:
    return 0.8 - 0.1 * abs(math.log10(params["learning_rate"]) + 4)


def test_importance_ranks_what_decides_above_what_does_not():
    trials = drawn(30, by_rate)
    found, sentence = importance.measure(SPACE, trials)
    assert next(iter(found.means)) == "learning_rate" and found.r2 > 0.8 and found.trials == 30
    others = [name for name in found.means if name != "learning_rate"]
    assert all(found.means["learning_rate"] > 10 * abs(found.means[name]) for name in others)
    assert found.spreads["learning_rate"] > 0 and found.warning == ""
    assert "permutation importance of a random forest" in sentence.lower() and f"R² is {found.r2:.2f}" in sentence
    assert "15 of the trials were stopped early: their Dice is a lower bound" in sentence
    assert importance.measure(SPACE, trials) == (found, sentence)


def test_a_category_that_decides_is_found():
    found, _ = importance.measure(SPACE, drawn(30, lambda params, _: 0.7 + 0.1 * (params["lora_bias"] == "all")))
    assert found.means["lora_bias"] > 1 and list(found.means)[0] == "lora_bias"


def test_the_out_of_bag_r2_is_scikit_learns():
    trials = drawn(24, lambda params, generator: by_rate(params, generator) + generator.gauss(0, 0.02))
    features = np.array(
        [
            [math.log10(one.params["learning_rate"]), math.log10(one.params["lora_rank"])]
            + [one.params["lora_bias"] == word for word in ("none", "all")]
            + [one.params["lora_dropout"]]
            for one in trials
        ],
        dtype=np.float32,
    )
    forest = RandomForestRegressor(importance.TREES, oob_score=True, random_state=importance.RANDOM_STATE)
    forest.fit(features, [tally.dice_of(one) for one in trials])
    assert importance.measure(SPACE, trials)[0].r2 == pytest.approx(forest.oob_score_, abs=1e-9)


def test_a_forest_that_explains_nothing_warns():
    found, sentence = importance.measure(SPACE, drawn(20, lambda _, generator: generator.uniform(0.6, 0.8)))
    assert found.r2 <= 0 and found.warning in sentence and "explains nothing" in sentence


def test_repeats_and_unfinished_trials_do_not_count():
    trials = drawn(12, by_rate)
    extra = [dataclasses.replace(repeat(20, 1, 43, 0.1), number=20), trial(21, [0.1], "unfinished")]
    extra += [trial(22, [0.1], "failed"), trial(23, [float("nan")])]
    assert importance.measure(SPACE, trials + extra) == importance.measure(SPACE, trials)


def test_a_constant_parameter_has_no_importance_and_is_named():
    trials = [dataclasses.replace(one, params=one.params | {"lora_rank": 16}) for one in drawn(12, by_rate)]
    found, sentence = importance.measure(SPACE, trials)
    assert found.means["lora_rank"] == found.spreads["lora_rank"] == 0.0 and "Did not vary: lora_rank." in sentence


def test_missing_values_are_taken():
    trials = drawn(16, by_rate)
    for index, name in ((0, "learning_rate"), (1, "lora_bias"), (2, "lora_rank")):
        params = {key: value for key, value in trials[index].params.items() if key != name}
        trials[index] = dataclasses.replace(trials[index], params=params)
    found, _ = importance.measure(SPACE, trials)
    assert all(math.isfinite(value) for value in [*found.means.values(), *found.spreads.values(), found.r2])
    bare = [dataclasses.replace(one, params={"learning_rate": one.params["learning_rate"]}) for one in trials[1:]]
    assert "Did not vary: lora_rank, lora_bias, lora_dropout." in importance.measure(SPACE, bare)[1]


@pytest.mark.parametrize(
    ("trials", "why"),
    [
        ([], "needs 8 finished or stopped trials; there are 0"),
        (drawn(7, by_rate), "there are 7"),
        (drawn(9, lambda *_: 0.5), "the same Dice"),
        ([trial(number, [0.1 * number]) for number in range(9)], "No parameter varies"),
    ],
)
def test_where_importance_would_be_noise_a_sentence_stands_instead(trials, why):
    found, sentence = importance.measure(SPACE, trials)
    assert found is None and why in sentence


# Pictures

TRIALS = [
    SEED_TRIAL,
    trial(1, [0.3, 0.4], "stopped"),
    BEST,
    FAILED,
    trial(4, [0.5, 0.7], "failed", reason="killed"),
    trial(5, [0.55], "unfinished"),
    repeat(6, 2, 43, 0.9),
]


def lines_of(figure) -> list[tuple[list, list]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines]


def legend_of(figure) -> set[str]:
    return {text.get_text() for text in figure.legends[0].get_texts()}


def test_learning_curves_draw_each_trial_to_where_it_ended_and_name_two():
    figure = pictures.learning_curves(sweep_of(), TRIALS)
    lines = lines_of(figure)
    for one in TRIALS[:3] + TRIALS[4:6]:
        assert ([row["epoch"] for row in one.rows], [row["dice"] for row in one.rows]) in lines
    assert ([1], [0.9]) not in lines, "repeats stand apart"
    labels = legend_of(figure)
    assert {"best: trial 2, 0.8612", "seed setting: trial 0, 0.8441", "stopped", "failed", "unfinished"} <= labels
    widths = {line.get_label(): line.get_linewidth() for line in figure.axes[0].lines}
    assert max(widths, key=widths.get) == "best: trial 2, 0.8612"
    stopped = next(line for line in figure.axes[0].lines if list(line.get_ydata()) == [0.3, 0.4])
    assert stopped.get_alpha() < 0.5


def test_a_few_trials_that_went_wrong_do_not_flatten_the_others_and_are_told():
    trials = [trial(number, [0.80 + 0.01 * number]) for number in range(6)] + [trial(6, [0.02])]
    axes = pictures.dice_against_cost(sweep_of(), trials).axes[0]
    assert 0.7 < axes.get_ylim()[0] < 0.8 and "1 of 7 values lie below, down to 0.020" in axes.texts[0].get_text()
    seed = dataclasses.replace(trials[6], origin=SEED_SETTING)
    assert pictures.dice_against_cost(sweep_of(), trials[:6] + [seed]).axes[0].get_ylim()[0] < 0.02


def test_parallel_coordinates_leave_gaps_and_end_at_the_dice():
    params = {"learning_rate": 1e-5, "lora_rank": 32, "lora_dropout": 0.2}
    trials = [SEED_TRIAL, trial(1, [0.9441], params=params), FAILED]
    lines = [heights for xs, heights in lines_of(pictures.parallel_coordinates(SPACE, trials)) if len(xs) == 5]
    failed, seed, best = sorted(lines, key=lambda heights: (not math.isnan(heights[4]), heights[4]))
    assert best == pytest.approx([0.0, 1.0, math.nan, 1.0, 1.0], nan_ok=True)
    assert seed[4] == 0.0 and seed[0] == pytest.approx(0.5) and seed[3] == pytest.approx(0.25)
    assert math.isnan(failed[4]) and failed[0] == pytest.approx(0.5)
    assert seed[1] != failed[1], "lines through one choice lie side by side"
    assert seed[1] == pytest.approx(0.5, abs=pictures.BAND)


def test_importance_bars_name_the_method_and_the_trust():
    found, sentence = importance.measure(SPACE, drawn(20, lambda _, generator: generator.uniform(0.6, 0.8)))
    axes = pictures.importance_bars(found, sentence).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == list(found.means)
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(list(found.means.values()))
    label = " ".join(axes.get_xlabel().split())
    assert importance.METHOD in label and f"{found.r2:.2f}" in label and found.warning in label
    nothing = pictures.importance_bars(None, "Too few trials.").axes[0]
    assert nothing.texts[0].get_text() == "Too few trials." and not nothing.patches


def test_device_time_bars_are_the_costs():
    trials = [trial(0, [0.5] * 10), trial(1, [0.4] * 4, "stopped"), trial(2, [0.4], "failed"), repeat(3, 0, 43, 0.5)]
    axes = pictures.device_time(sweep_of(), trials).axes[0]
    heights = {bars.get_label(): [bar.get_height() * 60 for bar in bars] for bars in axes.containers}
    assert heights["used"] == pytest.approx([210, 90, 0, 0])
    assert heights["used, then failed"] == pytest.approx([0, 0, 30, 0])
    assert heights["used by repeats"] == pytest.approx([0, 0, 0, 30])
    assert heights["saved by early stopping (estimate)"] == pytest.approx([0, 120, 0, 0])
    assert axes.get_ylabel() == "GPU-minutes" and "25% saved" in axes.get_title(loc="left")


def test_pictures_are_the_same_each_time_whatever_the_readers_style_and_leave_no_figure_behind():
    code = (
        "import sys, hashlib, matplotlib; sys.path.insert(0, 'tests'); from test_sweep_report import *\n"
        "matplotlib.rcParams['font.size'] = size = float(sys.argv[1])\n"
        "drawn = pictures.draw_all(sweep_of(), SPACE, TRIALS, *importance.measure(SPACE, TRIALS))\n"
        "assert 'matplotlib.pyplot' not in sys.modules and matplotlib.rcParams['font.size'] == size\n"
        "print(hashlib.sha256(b''.join(drawn.values())).hexdigest())"
    )
    done = [
        subprocess.run(
            [sys.executable, "-c", code, size], cwd=Path(__file__).parents[1], capture_output=True, text=True
        )
        for size in ("10", "30")
    ]
    assert done[0].returncode == 0, done[0].stderr
    assert done[0].stdout == done[1].stdout and len(done[0].stdout.strip()) == 64


# What is written


def csv_of(sweep: Sweep, trials: list[Trial]) -> list[dict]:
    return list(csv.DictReader(io.StringIO(results.trials_csv(sweep, trials))))


def test_the_table_reads_back():
    hostile = trial(
        7,
        [0.1],
        params={"lora_rank": 8},
        settings={"question": 'a "b", c\nd', "lora_scope": ["x", "y"], "save_every": None},
    )
    found = csv_of(sweep_of(), [*TRIALS, hostile])
    assert [int(line["number"]) for line in found] == list(range(8))
    best = found[2]
    assert float(best["dice"]) == 0.8612 and best["best_epoch"] == "2" and best["epochs"] == "3"
    assert float(best["dice_best"]) == pytest.approx(0.8712) and best["threshold_best"] == "0.4"
    assert float(best["device_s"]) == 70.0 and best["seg_rate"] == "" and best["recall"] == "0.6"
    assert float(best["params.learning_rate"]) == 1e-4 and best["params.lora_bias"] == "none"
    assert float(best["settings.learning_rate"]) == 2e-4
    assert float(found[0]["settings.learning_rate"]) == TrainConfig().learning_rate
    assert (best["repeats_dice"], best["repeats_spread"], best["repeats_count"]) == ("0.9", "", "1")
    assert found[6]["repeat_of"] == "2" and found[6]["origin"] == "trial 2, seed 43" and best["repeat_of"] == ""
    assert (found[3]["status"], found[3]["reason"], found[3]["dice"]) == ("failed", "CUDA out of memory", "")
    assert found[7]["settings.question"] == 'a "b", c\nd' and found[7]["settings.lora_scope"] == "x,y"
    assert found[7]["params.lora_bias"] == "" and found[7]["settings.save_every"] == "none"


class Page(HTMLParser):
    """What a browser would take from a page; fails on tags that do not match."""

    VOID = {"meta", "img", "br", "wbr"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.links, self.text, self.cells = [], [], [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + " "
            if "td" in self.open or "th" in self.open:
                self.cells[-1] += data


def test_everything_is_written_and_the_page_needs_nothing_else(tmp_path):
    line = results.write(tmp_path, sweep_of(), TRIALS)
    assert line == "trial 2: Dice 0.8612, seed setting 0.8441: +0.0171; with other seeds 0.9000 (1)"
    text = (tmp_path / "report.html").read_text()
    found = Page(text)
    assert line in found.text and "0.05" in found.cells
    prefix = "data:image/png;base64,"
    assert found.links and all(link.startswith(prefix) for link in found.links)
    assert not re.search(r"https?://|@import|url\(", text)
    drawn = {file.name: file.read_bytes() for file in (tmp_path / "pictures").iterdir()}
    names = {"learning_curves", "parallel_coordinates", "importance", "dice_against_cost", "device_time"}
    assert drawn.keys() == {f"{name}.png" for name in names}
    inside = {base64.b64decode(link.removeprefix(prefix)) for link in found.links}
    assert inside == {png for name, png in drawn.items() if name != "importance.png"}, "four trials are too few"
    assert "needs 8 finished or stopped trials; there are 3" in found.text
    assert all(Image.open(io.BytesIO(png)).width > 600 for png in drawn.values())
    assert (tmp_path / "trials.csv").read_text() == results.trials_csv(sweep_of(), TRIALS)
    assert not list(tmp_path.rglob("*.partial"))


def test_the_page_sets_the_best_settings_beside_the_seed_settings():
    found = Page(page.page(sweep_of(), TRIALS, pngs(), "why"))
    at = found.cells.index("learning_rate")
    assert found.cells[at : at + 3] == ["learning_rate", "1e-4", "2e-4"]
    at = found.cells.index("lora_bias")
    assert found.cells[at : at + 3] == ["lora_bias", "none", "none"]
    assert "0:01:10" in found.cells and "tune/search.py --seed 0" in found.cells
    assert "torch 2.13.0" in found.cells and any("at epochs 2, 4, 8 the best 1/2 go on" in cell for cell in found.cells)
    assert "CUDA out of memory" in found.cells and "43: 0.9000" in found.cells


def test_the_page_says_how_the_best_settings_are_used(tmp_path):
    folder = tmp_path / "my sweep"
    folder.mkdir()
    results.write(folder, sweep_of(), TRIALS)
    found = Page((folder / "report.html").read_text())
    assert f"python launch/train.py --config '{folder}/best.yaml'" in found.text
    assert f"{folder}/best_checkpoint" in found.text
    assert "launch/train.py --config" not in Page(page.page(sweep_of(), [FAILED], pngs(), "why")).text


def test_a_trial_that_failed_before_its_first_validation_counts_with_its_outcomes_time():
    failed = dataclasses.replace(FAILED, outcome_s=1800.0)
    assert tally.costs(sweep_of(gpus_per_trial=0.5), [failed])[3] == tally.Cost(900.0, 0.0)
    assert tally.saved(sweep_of(), [failed, trial(0)]).startswith("30.00 GPU-minutes used")
    assert "0:30:00" in Page(page.page(sweep_of(), [failed, SEED_TRIAL], pngs(), "why")).cells
    (line,) = csv.DictReader(io.StringIO(results.trials_csv(sweep_of(), [failed])))
    assert (line["epochs"], line["device_s"]) == ("0", "1800.0")


def pngs() -> dict[str, bytes]:
    return dict.fromkeys(("learning_curves", "parallel_coordinates", "dice_against_cost", "device_time"), b"png")


def test_hostile_text_is_text_everywhere(tmp_path):
    bad = "$x_{$</td><script>alert(1)</script>'\"&"
    space = Space((Axis("question", "choice", (bad, "plain")),), {})
    base = sweep_of().base | {"model_path": bad, "data_root": bad, "question": bad}
    sweep = sweep_of(space, name=bad, base=base, search=bad, versions={bad: bad}, command=["x", bad], started=bad)
    trials = [
        trial(0, [0.5], origin=SEED_SETTING, params={"question": bad}),
        trial(1, [0.6], origin=bad, params={"question": "plain"}, settings={"question": "plain", bad: bad}),
        trial(2, status="failed", reason=bad, params={"question": bad}),
    ]
    results.write(tmp_path, sweep, trials)
    text = (tmp_path / "report.html").read_text()
    found = Page(text)
    assert found.tags.count("script") == 1 and text.count("<script") == 1 and "alert(" in found.text
    assert found.text.count(bad) >= 8
    assert bad in Page(page.page(sweep, trials, pngs(), bad)).text


@pytest.mark.parametrize(
    "trials",
    [
        pytest.param([], id="none"),
        pytest.param([trial(0, status="unfinished", origin=SEED_SETTING)], id="no validation yet"),
        pytest.param([trial(0, [0.5], origin=SEED_SETTING)], id="one"),
        pytest.param([FAILED, dataclasses.replace(FAILED, number=4, params={})], id="all failed"),
        pytest.param([trial(number, [0.7]) for number in range(9)], id="nothing varies"),
        pytest.param([trial(0, [0.7]), trial(1, [0.6], params={"lora_rank": 64})], id="missing and off the grid"),
        pytest.param([trial(0, [float("nan")]), trial(1, [0.5, float("nan")]), SEED_TRIAL], id="not a number"),
        pytest.param([trial(0, [0.0], rows={"epoch_s": 0.0, "start_s": 0.0}), trial(1, [0.0])], id="zero"),
    ],
)
def test_there_is_a_report_of_any_sweep(tmp_path, trials):
    trials = [dataclasses.replace(one, number=number) for number, one in enumerate(trials)]
    results.write(tmp_path, sweep_of(), trials)
    found = Page((tmp_path / "report.html").read_text())
    table = (tmp_path / "trials.csv").read_text()
    assert not re.search(r"\b(nan|NaN|inf|Infinity|None)\b", found.text + table)
    assert len(table.splitlines()) == 1 + len(trials)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 5


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
    results.write(tmp_path, sweep_of(), TRIALS[:1])
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    before, seen, replace = {file: file.read_bytes() for file in files}, [], os.replace

    def watched(source: Path, target: Path) -> None:
        assert target.read_bytes() == before[target], "still the old one"
        new = source.read_bytes()
        replace(source, target)
        assert target.read_bytes() == new
        seen.append(target)

    monkeypatch.setattr(os, "replace", watched)
    results.write(tmp_path, sweep_of(), TRIALS)
    assert sorted(seen) == sorted(files) and all(file.read_bytes() != before[file] for file in files)


def test_what_is_heavy_is_imported_only_to_write():
    code = "import sys, tune.results; print(sorted(set(sys.modules) & {'matplotlib', 'sklearn', 'scipy', 'torch'}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
