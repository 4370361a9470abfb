"""How much each parameter of a sweep matters: permutation importance of a random forest.

Takes the space and the trials, gives per parameter the R^2 that a forest loses on trials it has not seen when that
parameter's values are shuffled among them (Breiman, Random Forests, 2001, section 10: out-of-bag). Each tree is asked
about the trials left out of its own sample alone, so that a forest that learned the trials by heart explains nothing.
The one file that imports scikit-learn. Does not draw.

Shapes: N trials, P parameters, F features (a number is one, a category one per value), R shuffles, T trees.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.ensemble import RandomForestRegressor

from tune.scales import MISSING, Scale, scale
from tune.space import Space
from tune.tally import dice_of
from tune.trials import Trial

METHOD = "permutation importance of a random forest"
LEAST_TRIALS = 8
"""With fewer a forest has next to nothing to leave out, and what it finds is chance."""
TREES, SHUFFLES, RANDOM_STATE = 200, 20, 0
WEAK_R2 = 0.3
"""Below it a forest explains little."""


@dataclass(frozen=True)
class Importance:
    """What the forest found."""

    means: dict[str, float]
    """Parameter -> lost R^2, mean over the shuffles; the most important first."""
    spreads: dict[str, float]
    """Parameter -> standard deviation over the shuffles."""
    r2: float
    """Out-of-bag R^2 of the forest: 1 explains Dice wholly, 0 not at all."""
    trials: int

    @property
    def warning(self) -> str:
        """What a reader must know of a forest that explains little; empty for one that explains enough."""
        if self.r2 <= 0:
            return "Warning: the forest explains nothing of Dice, and the bars are chance."
        if self.r2 < WEAK_R2:
            return "Warning: the forest explains little of Dice; read no order into bars of like length."
        return ""


def measure(space: Space, trials: Sequence[Trial]) -> tuple[Importance | None, str]:
    """The importance of each parameter for Dice.

    Args:
        space: whose parameters are measured.
        trials: of which those finished or stopped count, repeats aside.

    Returns:
        The importance with a sentence on how far to trust it; or None with a sentence that says why there is none.
    """
    kept = [trial for trial in trials if _counts(trial)]
    if len(kept) < LEAST_TRIALS:
        return None, (
            f"The importance of the parameters needs {LEAST_TRIALS} finished or stopped trials; there are {len(kept)}."
        )
    dice_N = np.array([dice_of(trial) for trial in kept])
    if np.ptp(dice_N) == 0:
        return None, f"All {len(kept)} finished or stopped trials have the same Dice: no parameter tells them apart."
    blocks = [
        _features(scale(axis, (trial.params.get(axis.name, MISSING) for trial in kept)), axis.name, kept)
        for axis in space.axes
    ]
    if not any(_varies(block_NF) for block_NF in blocks):
        return None, f"No parameter varies among the {len(kept)} finished or stopped trials."
    r2, lost_PR = _lost_r2(blocks, dice_N)
    names = [axis.name for axis in space.axes]
    order = sorted(range(len(names)), key=lambda index: -lost_PR[index].mean())
    found = Importance(
        {names[index]: float(lost_PR[index].mean()) for index in order},
        {names[index]: float(lost_PR[index].std()) for index in order},
        r2,
        len(kept),
    )
    constant = [name for name, block_NF in zip(names, blocks, strict=True) if not _varies(block_NF)]
    return found, _how_far(found, sum(trial.status == "stopped" for trial in kept), constant)


def _counts(trial: Trial) -> bool:
    return trial.status in ("finished", "stopped") and not trial.is_repeat and dice_of(trial) is not None


def _features(scale: Scale, name: str, trials: Sequence[Trial]) -> np.ndarray:
    """N x F. A missing number stays NaN, which the forest takes; a missing category is none of them."""
    numbers = [scale.number(trial.params.get(name, MISSING)) for trial in trials]
    if scale.kind == "categories":
        return np.array([[number == index for index in scale.numbers] for number in numbers], dtype=np.float32)
    return np.array([[np.nan if number is None else number] for number in numbers], dtype=np.float32)


def _varies(block_NF: np.ndarray) -> bool:
    return len(np.unique(np.where(np.isnan(block_NF), np.inf, block_NF), axis=0)) > 1


def _lost_r2(blocks: list[np.ndarray], dice_N: np.ndarray) -> tuple[float, np.ndarray]:
    """The forest's out-of-bag R^2, and what it loses of it: P x R."""
    features_NF, count = np.concatenate(blocks, axis=1), len(dice_N)
    forest = RandomForestRegressor(TREES, random_state=RANDOM_STATE).fit(features_NF, dice_N)
    generator = np.random.default_rng(RANDOM_STATE)
    versions, column = [features_NF], 0
    for block_NF in blocks:
        columns = slice(column, column := column + block_NF.shape[1])
        for _ in range(SHUFFLES):
            shuffled_NF = features_NF.copy()
            shuffled_NF[:, columns] = block_NF[generator.permutation(count)]
            versions.append(shuffled_NF)
    stacked = np.concatenate(versions)
    total_VN, voters_N = np.zeros((len(versions), count)), np.zeros(count)
    for tree, drawn in zip(forest.estimators_, forest.estimators_samples_, strict=True):
        left_out_N = np.ones(count, dtype=bool)
        left_out_N[drawn] = False
        total_VN += tree.predict(stacked).reshape(-1, count) * left_out_N
        voters_N += left_out_N
    # With 200 trees the chance that none leaves a given trial out is below 1e-35.
    errors_V = ((total_VN / voters_N - dice_N) ** 2).mean(axis=1)
    r2_V = 1 - errors_V / dice_N.var()
    return float(r2_V[0]), (r2_V[0] - r2_V[1:]).reshape(len(blocks), SHUFFLES)


def _how_far(found: Importance, stopped: int, constant: list[str]) -> str:
    lines = [f"{METHOD[0].upper()}{METHOD[1:]} (scikit-learn) over {found.trials} trials: the out-of-bag R² that it"]
    lines += [f"loses when a parameter's values are shuffled. The forest's own out-of-bag R² is {found.r2:.2f}."]
    if found.warning:
        lines.append(found.warning)
    if stopped:
        lines.append(f"{stopped} of the trials were stopped early: their Dice is a lower bound, so what learns fast")
        lines.append("also counts as good.")
    if constant:
        lines.append(f"Did not vary: {', '.join(constant)}.")
    return " ".join(lines)
