"""Which point is tried next: the seed setting, given points, then at random, on a grid, or by Optuna.

Takes the plan and the trials so far, gives new trials one by one. Trial number n of a random search (repeats with other
seeds not counted) is the same point whenever it is asked for, and a grid goes on with the combinations that have no
trial yet: a resumed or longer sweep goes on where it was. Optuna is told every earlier trial anew. Knows nothing of
Ray; only this file imports optuna.
"""

import dataclasses
import itertools
import math
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from sft.config import TrainConfig, override
from sft.settings import UserError
from tune.options import Plan
from tune.space import Axis, Space
from tune.trials import SEED_NUMBER, SEED_SETTING, Trial

FEWEST_RANDOM = 8  # points before TPE's model is trusted


class Suggestions:
    """New trials of a sweep, in order of number."""

    def __init__(self, plan: Plan, known: Sequence[Trial]):
        self._plan, self._base, self._space = plan, plan.seed_setting, plan.space
        self._given = _given(plan)
        self._number = 1 + max((trial.number for trial in known), default=-1)
        self._index, self._total = _searched(known), new_trials(plan, known)
        self._grid = _untried(plan, known) if plan.sweep.search == "grid" else None
        self._tpe = _Tpe(plan.space, plan.seed_setting.seed) if plan.sweep.search == "optuna" else None
        for trial in known:
            self._hear(trial, runs=trial.status == "unfinished")

    @property
    def left(self) -> int:
        """How many new trials are still to come."""
        return max(0, self._total - self._index)

    def next(self) -> Trial | None:
        """The next new trial; None where all have been given."""
        if not self.left:
            return None
        index, given = self._index, len(self._given)
        found = self._given[index] if index < given else self._found(index)
        found = dataclasses.replace(found, number=self._number)
        self._index, self._number = index + 1, self._number + 1
        self._hear(found, runs=True)
        return found

    def told(self, trial: Trial) -> None:
        """Tells the search what a trial has come to, at its end or at a rung where it waits."""
        self._hear(trial, runs=False)

    def _hear(self, trial: Trial, runs: bool) -> None:
        if self._tpe is not None and not trial.is_repeat and self._space.holds(trial.params):
            self._tpe.hear(trial, runs)

    def _found(self, index: int) -> Trial:
        search = self._plan.sweep.search
        match search:
            case "random":
                params = self._space.draw(random.Random(f"{self._base.seed} {index}"))
            case "grid":
                params = next(self._grid)
            case "optuna":
                params = self._tpe.ask(self._number)
            case _:
                raise ValueError(f"search {search!r}: expected random, grid or optuna")
        return Trial(index, search, params, self._space.settings(params, self._base))


def repeats(known: Sequence[Trial], base: TrainConfig, seeds: int, best: int = 3) -> list[Trial]:
    """The best trials and the seed setting with other seeds: those that are not there yet.

    Args:
        known: all trials so far.
        base: whose seed the sweep's own trials have.
        seeds: how many seeds each of them has in the end, the sweep's own among them.
        best: how many of the best.
    """
    own = [trial for trial in known if trial.rows and not trial.is_repeat]
    chosen = sorted(own, key=lambda trial: -trial.dice_so_far)[:best]
    chosen += [trial for trial in own if trial.origin == SEED_SETTING and trial not in chosen]
    there = {trial.origin for trial in known}
    number, found = 1 + max((trial.number for trial in known), default=-1), []
    for trial, seed in itertools.product(chosen, range(base.seed + 1, base.seed + seeds)):
        origin = f"trial {trial.number}, seed {seed}"
        if origin not in there:
            found.append(Trial(number + len(found), origin, trial.params, trial.settings | {"seed": seed}))
    return found


def new_trials(plan: Plan, known: Sequence[Trial] = ()) -> int:
    """Trials of the sweep in all, repeats with other seeds aside: a grid may have fewer points than asked for.

    Args:
        plan: of the sweep.
        known: its trials so far.
    """
    wanted = plan.sweep.num_trials
    return min(wanted, _grid_trials(plan, known)) if plan.sweep.search == "grid" else wanted


def left_out(plan: Plan, known: Sequence[Trial] = ()) -> int:
    """Combinations of a grid that num_trials has no room for."""
    return max(0, _grid_trials(plan, known) - plan.sweep.num_trials) if plan.sweep.search == "grid" else 0


def tried_anyway(plan: Plan) -> int:
    """Combinations of a grid that are no trials of their own: the seed setting's, and those of given points."""
    return len(_tried(plan)) if plan.sweep.search == "grid" else 0


def check(plan: Plan) -> None:
    """Raises UserError where the wanted search is not installed."""
    if plan.sweep.search == "optuna":
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise UserError("search optuna needs the package optuna: pip install 'sa2va-sft[optuna]'") from None


def _grid_trials(plan: Plan, known: Sequence[Trial]) -> int:
    begun = max(len(_given(plan)), _searched(known))
    return begun + math.prod(len(axis.values) for axis in plan.space.axes) - len(_tried(plan, known))


def _untried(plan: Plan, known: Sequence[Trial]) -> Iterator[dict[str, Any]]:
    tried = _tried(plan, known)
    return (params for params in plan.space.grid() if tuple(params.values()) not in tried)


def _tried(plan: Plan, known: Sequence[Trial] = ()) -> set[tuple]:
    """Combinations of a grid that a trial has: the seed setting, a given point, or one of an earlier session."""
    configs = [override(plan.seed_setting, trial.settings) for trial in _given(plan)]
    found = [params for config in configs for params in plan.space.combinations_of(config, plan.seed_setting)]
    found += [trial.params for trial in known if trial.origin == "grid"]
    return {tuple(params[axis.name] for axis in plan.space.axes) for params in found}


def _searched(known: Sequence[Trial]) -> int:
    """How many trials the search has given; repeats, which have numbers of their own, are none of them."""
    repeated = [trial.number for trial in known if trial.is_repeat]
    own = [trial.number for trial in known if not trial.is_repeat]
    return 1 + max((number - sum(other < number for other in repeated) for number in own), default=-1)


def _given(plan: Plan) -> list[Trial]:
    """What is tried before any search: the seed setting, and the points of --points."""
    base, space = plan.seed_setting, plan.space
    found = [Trial(SEED_NUMBER, SEED_SETTING, space.params_of(base), {})]
    for number, settings in enumerate(plan.points, start=1):
        config = override(base, settings)
        found.append(Trial(number, "points", space.params_of(config), settings))
    return found


class _Tpe:
    """Optuna's tree-structured Parzen estimator; parameters that were tried together are modelled together.

    Each point is asked of a study made anew, in which a trial that has waited counts with its last Dice, and drawn with
    a seed of its own: it depends on what is known, not on the session.
    """

    def __init__(self, space: Space, seed: int):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._seed = optuna, seed
        self._heard: dict[int, tuple[Trial, bool]] = {}
        """Number of a trial -> the trial, and whether it runs."""
        self._distributions = {axis.name: self._distribution(axis) for axis in space.axes}

    def hear(self, trial: Trial, runs: bool) -> None:
        self._heard[trial.number] = trial, runs

    def ask(self, number: int) -> dict[str, Any]:
        return dict(self.study(self._seed + number).ask(self._distributions).params)

    def study(self, seed: int) -> Any:
        """All that is known, for a sampler of this seed."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            # Other trials are still running: constant_liar keeps it from asking for the same point twice.
            options = {"multivariate": True, "group": True, "constant_liar": True, "n_startup_trials": FEWEST_RANDOM}
            sampler = self._optuna.samplers.TPESampler(seed=seed, **options)
        study, states = self._optuna.create_study(direction="maximize", sampler=sampler), self._optuna.trial.TrialState
        for trial, runs in self._heard.values():
            state = states.RUNNING if runs else states.COMPLETE if trial.rows else states.FAIL
            value = trial.dice_so_far if state == states.COMPLETE else None
            params = {axis: trial.params[axis] for axis in self._distributions}
            told = {"params": params, "distributions": self._distributions}
            study.add_trial(self._optuna.trial.create_trial(state=state, value=value, **told))
        return study

    def _distribution(self, axis: Axis) -> Any:
        distributions = self._optuna.distributions
        match axis.kind:
            case "choice":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # several names: nothing is kept outside this process
                    return distributions.CategoricalDistribution(axis.values)
            case "randint":
                return distributions.IntDistribution(*axis.values)
            case _:
                return distributions.FloatDistribution(*axis.values, log=axis.kind == "loguniform")
