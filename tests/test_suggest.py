"""Which point is tried next: the same one in any session, a grid whole and once, Optuna told all there was."""

import importlib.util
import sys

import pytest
import small_sweeps as small
from small_sweeps import GRID, SPACE, ended, repeat

from sft.config import TrainConfig
from sft.settings import UserError
from tune import suggest
from tune.space import Axis, Space
from tune.suggest import FEWEST_RANDOM, Suggestions
from tune.trials import SEED_SETTING, Trial

needs_optuna = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs the package optuna")


def drawn(suggestions: Suggestions) -> list[Trial]:
    """All that are left."""
    return list(iter(suggestions.next, None))


def session(plan, known=(), count: int = 99) -> list[Trial]:
    """Trials of one session that starts from what earlier ones left, and ends after so many new ones."""
    suggestions = Suggestions(plan, known)
    new = [suggestions.next() for _ in range(min(count, suggestions.left))]
    return [*known, *(ended(trial, 0.5) for trial in new)]


# The beginning


def test_the_seed_setting_and_the_given_points_come_first():
    plan = small.plan(points=[{"lora_rank": 16, "lora_alpha": 32}, {"learning_rate": 5e-4}], num_trials=4)
    seed, first, second, third = drawn(Suggestions(plan, ()))
    assert seed == Trial(0, SEED_SETTING, {"lora_rank": 64, "learning_rate": 1e-4}, {})
    assert first == Trial(1, "points", {"lora_rank": 16, "learning_rate": 1e-4}, {"lora_rank": 16, "lora_alpha": 32})
    assert (second.number, second.params["learning_rate"], second.settings) == (2, 5e-4, {"learning_rate": 5e-4})
    assert (third.number, third.origin) == (3, "random")
    assert third.settings == third.params | {"lora_alpha": 2 * third.params["lora_rank"]}


# Random


def test_trial_n_is_the_same_point_in_any_session():
    plan = small.plan(num_trials=10)
    whole = session(plan)
    known = []
    while len(known) < 10:
        known = session(plan, known, count=3)
    assert known == whole
    assert len({trial.params["learning_rate"] for trial in whole}) == 10
    assert all(SPACE.holds(trial.params) for trial in whole[1:])
    other = small.plan(base=TrainConfig(seed=43), num_trials=10)
    assert session(other)[1:] != whole[1:]


def test_a_raised_number_of_trials_continues():
    few, many = session(small.plan(num_trials=5)), session(small.plan(num_trials=9))
    assert many[:5] == few
    assert session(small.plan(num_trials=9), few) == many
    suggestions = Suggestions(small.plan(num_trials=5), few)
    assert suggestions.left == 0 and suggestions.next() is None


def test_repeats_take_numbers_and_no_points():
    whole = session(small.plan(num_trials=9))
    known = [*whole[:5], repeat(5, of=2, seed=43), repeat(6, of=0, seed=43)]
    suggestions = Suggestions(small.plan(num_trials=9), known)
    assert suggestions.left == 4
    later = drawn(suggestions)
    assert [trial.number for trial in later] == [7, 8, 9, 10]
    assert [trial.params for trial in later] == [trial.params for trial in whole[5:]]
    again = Suggestions(small.plan(num_trials=11), [*known, *later, repeat(11, of=8, seed=43)])
    assert (again.left, again.next().params) == (2, session(small.plan(num_trials=11))[9].params)


# Grid


def test_a_grid_is_gone_through_whole_and_once():
    plan = small.plan(GRID, search="grid", num_trials=32)
    found = session(plan)
    assert suggest.new_trials(plan) == len(found) == 1 + 6 and suggest.left_out(plan) == 0
    assert [trial.params for trial in found[1:]] == list(GRID.grid())
    assert [trial.number for trial in found] == list(range(7))
    known = [*found[:3], repeat(3, of=0, seed=43)]
    assert [trial.params for trial in session(plan, known)[4:]] == list(GRID.grid())[2:]


def test_of_a_grid_that_has_no_room_the_rest_is_counted():
    plan = small.plan(GRID, points=[{"lora_rank": 8}], search="grid", num_trials=4)
    assert suggest.new_trials(plan) == len(session(plan)) == 4
    assert suggest.left_out(plan) == 1 + 1 + 6 - 4
    assert suggest.left_out(small.plan(num_trials=4)) == 0


SEED_IN_GRID = TrainConfig(lora_rank=16, lora_dropout=0.1)  # the fifth combination


def test_what_the_seed_setting_tries_is_no_second_trial_of_a_grid():
    plan = small.plan(GRID, search="grid", num_trials=32, base=SEED_IN_GRID)
    found, combinations = session(plan), list(GRID.grid())
    assert [trial.params for trial in found[1:]] == combinations[:4] + combinations[5:]
    assert found[0].params == combinations[4] and found[0].origin == SEED_SETTING
    assert (len(found), suggest.new_trials(plan), suggest.left_out(plan), suggest.tried_anyway(plan)) == (6, 6, 0, 1)
    fewer = small.plan(GRID, search="grid", num_trials=4, base=SEED_IN_GRID)
    assert (suggest.new_trials(fewer), suggest.left_out(fewer)) == (4, 2)
    for count in range(1, 6):  # whenever it is interrupted
        assert session(plan, session(plan, count=count)) == found
    assert suggest.tried_anyway(small.plan(GRID, search="grid")) == 0
    assert suggest.tried_anyway(small.plan(GRID, base=SEED_IN_GRID)) == 0  # a random search tries no combinations


def test_what_a_given_point_tries_is_no_second_trial_of_a_grid():
    points = [{"lora_dropout": 0.0}, {"lora_rank": 8, "lora_dropout": 0.2}, {"lora_rank": 64}]  # the last is none of it
    plan = small.plan(GRID, points, SEED_IN_GRID, search="grid", num_trials=32)
    found, combinations = session(plan), list(GRID.grid())
    assert [trial.params for trial in found[4:]] == [combinations[number] for number in (0, 1, 5)]
    assert (suggest.new_trials(plan), suggest.tried_anyway(plan)) == (7, 3)


def test_a_grid_whose_only_combination_is_the_seed_settings_has_one_trial():
    plan = small.plan(Space((Axis("lora_rank", "choice", (64,)),), {}), search="grid")
    assert session(plan) == [ended(Trial(0, SEED_SETTING, {"lora_rank": 64}, {}), 0.5)]
    assert suggest.new_trials(plan) == 1


def test_a_grid_that_has_tried_the_seed_setting_twice_leaves_no_other_combination_out():
    """A sweep may have been begun when it did."""
    plan = small.plan(GRID, search="grid", num_trials=32, base=SEED_IN_GRID)
    known = [Trial(0, SEED_SETTING, {"lora_rank": 16, "lora_dropout": 0.1}, {})]
    known += [Trial(number, "grid", params, params) for number, params in enumerate(list(GRID.grid())[:5], start=1)]
    known = [ended(trial, 0.5) for trial in known]
    assert suggest.new_trials(plan, known) == 7
    (last,) = drawn(Suggestions(plan, known))
    assert (last.number, last.params) == (6, {"lora_rank": 16, "lora_dropout": 0.2})


# Optuna


def test_optuna_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    suggest.check(small.plan())
    with pytest.raises(UserError, match=r"pip install 'sa2va-sft\[optuna\]'"):
        suggest.check(small.plan(search="optuna"))


@pytest.fixture
def tpe():
    """A sweep under Optuna whose axes are of every kind."""
    pytest.importorskip("optuna", reason="needs the package optuna")
    names = Axis("lora_target_modules", "choice", (("q_proj",), ("k_proj", "v_proj")))
    space = Space(
        (*SPACE.axes, Axis("lora_dropout", "uniform", (0.0, 0.1)), Axis("batch_size", "randint", (1, 3)), names), {}
    )
    return small.plan(space, search="optuna", num_trials=40)


@pytest.mark.filterwarnings("error")
def test_optuna_asks_for_nothing_out_of_range(tpe):
    suggest.check(tpe)
    suggestions = Suggestions(tpe, ())
    for count in range(30):
        trial = suggestions.next()
        assert trial.number == count and (count == 0 or tpe.space.holds(trial.params))
        suggestions.told(ended(trial, 0.5 + count / 100))


@pytest.mark.parametrize("good", [(1e-5, 4e-5), (2.5e-4, 1e-3)])  # of two decades three fifths of one
def test_optuna_is_told_what_earlier_sessions_found(tpe, good):
    """Good trials lie at one end of the learning rate: there it asks next."""
    point = {"lora_rank": 8, "lora_dropout": 0.05, "batch_size": 1, "lora_target_modules": ("q_proj",)}
    known = [small.trial(0, [0.5])]
    for number in range(1, 25):
        rate = 10 ** -(3 + 2 * (number - 0.5) / 24)
        dice = 0.9 if good[0] <= rate <= good[1] else 0.1
        known.append(ended(Trial(number, "optuna", point | {"learning_rate": rate}, {}), dice))
    suggestions, asked = Suggestions(tpe, known), []
    for trial in iter(suggestions.next, None):
        rate = trial.params["learning_rate"]
        asked.append(good[0] <= rate <= good[1])
        suggestions.told(ended(trial, 0.9 if asked[-1] else 0.1))
    assert len(asked) == 15 and sum(asked) >= 9  # at random 4.5


@needs_optuna
def test_optuna_counts_each_trial_once_with_its_last_dice_and_not_while_it_runs():
    plan = small.plan(search="optuna", num_trials=20)
    begun = drawn(Suggestions(plan, ()))[:6]
    known = [ended(begun[0], 0.5), ended(begun[1], 0.6), ended(begun[2], 0.7, status="stopped")]
    known += [ended(begun[3], 0.8, status="unfinished"), begun[4], ended(begun[5], status="failed"), repeat(6, 1, 43)]
    suggestions = Suggestions(plan, known)
    states = lambda: [trial.state.name for trial in suggestions._tpe.study(0).trials]  # noqa: E731
    # The seed setting's rank is none of the choices, and a repeat is none of the search's.
    assert states() == ["COMPLETE", "COMPLETE", "RUNNING", "RUNNING", "FAIL"]
    suggestions.told(ended(begun[4], 0.9))
    suggestions.told(ended(begun[3], 0.8, 0.85))
    assert states() == ["COMPLETE", "COMPLETE", "COMPLETE", "COMPLETE", "FAIL"]
    assert [trial.value for trial in suggestions._tpe.study(0).trials] == [0.6, 0.7, 0.85, 0.9, None]
    new = suggestions.next()
    assert states()[5:] == ["RUNNING"]
    suggestions.told(ended(new, 0.4, status="unfinished"))  # it waits at a rung
    assert states()[5:] == ["COMPLETE"] and new.number == 7
    suggestions.told(ended(new, 0.4, 0.95))
    assert [trial.value for trial in suggestions._tpe.study(0).trials][5:] == [0.95]


@needs_optuna
def test_a_resumed_search_does_not_begin_with_the_first_points_again():
    plan = small.plan(search="optuna", num_trials=2 * FEWEST_RANDOM)
    first = session(plan, count=4)
    later = drawn(Suggestions(plan, first))
    assert not {trial.params["learning_rate"] for trial in later} & {trial.params["learning_rate"] for trial in first}


# Repeats with other seeds


def test_the_best_and_the_seed_setting_are_repeated():
    known = [small.trial(number, [dice]) for number, dice in enumerate([0.1, 0.5, 0.9, 0.7, 0.8])]
    known += [small.trial(5, [0.6], settings={"lora_rank": 8}), small.trial(6, status="failed")]
    found = suggest.repeats(known, TrainConfig(seed=42), seeds=3)
    assert [trial.origin for trial in found] == [
        f"trial {number}, seed {seed}" for number in (2, 4, 3, 0) for seed in (43, 44)
    ]
    assert [trial.number for trial in found] == list(range(7, 15))
    assert all(trial.is_repeat for trial in found) and found[0].settings == {"seed": 43}
    assert suggest.repeats(known, TrainConfig(), seeds=1) == []
    there = [*known, *(ended(trial, 0.99) for trial in found[:3])]
    assert [trial.origin for trial in suggest.repeats(there, TrainConfig(seed=42), seeds=3)] == [
        trial.origin for trial in found[3:]
    ]
    assert [trial.number for trial in suggest.repeats(there, TrainConfig(seed=42), seeds=3)][0] == 10


def test_a_seed_setting_among_the_best_is_repeated_once_with_its_settings():
    known = [small.trial(0, [0.9]), small.trial(1, [0.5], settings={"lora_rank": 8})]
    found = suggest.repeats(known, TrainConfig(), seeds=2)
    assert [(trial.origin, trial.settings) for trial in found] == [
        ("trial 0, seed 43", {"seed": 43}),
        ("trial 1, seed 43", {"lora_rank": 8, "seed": 43}),
    ]
