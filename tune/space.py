"""The space of a sweep: a YAML file whose keys are settings of TrainConfig becomes checked axes, and points in it.

Takes a file and the seed setting, gives parameters (what is drawn) and settings (what a trial's TrainConfig gets:
drawn values, expressions of them, weights brought to one sum). Imports nothing heavy: a mistake answers at once. Does
not know Ray, trials or how a search proceeds.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.config import TrainConfig, override
from sft.settings import Setting, UserError, as_text, nearest, read_mapping, settings_of
from tune import expression

KINDS = ("choice", "uniform", "loguniform", "randint", "expression")
SAME_SUM = "same_sum"  # the one key that is no parameter: weights scaled so that their sum is the seed setting's
# What Dice is measured on, how long a trial may take, where it runs: the same for all trials, or Dice says nothing.
FIXED = {"model_path", "data_root", "output_dir", "val_fraction", "val_list", "group_pattern", "folds", "fold", "seed"}
FIXED |= {"num_epochs", "validate_every", "save_every", "save_format", "keep", "threshold", "tensorboard", "gpu"}
FIXED |= {"include", "num_workers", "feature_cache", "feature_cache_dir", "resume", "dry_run", "log_every_steps"}
PROBES = 64  # points drawn to see that a space has legal ones between its corners, too
CLOSE = 1e-9  # relative: a value written in a file and the same one computed

Values = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """One parameter that is drawn: a setting, or a name that expressions use."""

    name: str
    kind: str
    """choice, uniform, loguniform or randint."""
    values: tuple[Any, ...]
    """The choices, or lowest and highest value (both can be drawn)."""

    def draw(self, generator: random.Random) -> Any:
        """One value, at random."""
        match self.kind:
            case "choice":
                return generator.choice(self.values)
            case "uniform":
                return generator.uniform(*self.values)
            case "loguniform":
                low, high = self.values
                return min(max(math.exp(generator.uniform(math.log(low), math.log(high))), low), high)
            case "randint":
                return generator.randint(*self.values)
            case _:
                raise ValueError(f"{self.kind}: expected choice, uniform, loguniform or randint")

    def __contains__(self, value: Any) -> bool:
        if self.kind == "choice":
            return value in self.values
        number = int if self.kind == "randint" else int | float
        return isinstance(value, number) and self.values[0] <= value <= self.values[1]


@dataclass(frozen=True)
class Space:
    """Axes, the expressions over them, and the settings whose sum stays that of the seed setting."""

    axes: tuple[Axis, ...]
    expressions: dict[str, str]
    """Setting -> arithmetic over axes and settings of the space, in an order in which each can be computed."""
    same_sum: tuple[str, ...] = ()

    def draw(self, generator: random.Random) -> Values:
        """Parameters at random, one value per axis."""
        return {axis.name: axis.draw(generator) for axis in self.axes}

    def grid(self) -> Iterator[Values]:
        """Every combination of the choices, the last axis fastest.

        Raises:
            UserError: an axis is no choice.
        """
        for axis in self.axes:
            if axis.kind != "choice":
                raise UserError(f"search grid: {axis.name} is {axis.kind}; a grid needs {axis.name}: {{choice: [...]}}")
        for values in itertools.product(*(axis.values for axis in self.axes)):
            yield dict(zip((axis.name for axis in self.axes), values, strict=True))

    def settings(self, params: Values, seed_setting: TrainConfig) -> Values:
        """The settings of TrainConfig that these parameters stand for.

        Args:
            params: one value per axis.
            seed_setting: whose sum the weights of `same_sum` keep.

        Raises:
            UserError: an expression has no legal value, or the weights are all 0.
        """
        known, fields = dict(params), settings_of(TrainConfig)
        for name, text in self.expressions.items():
            known[name] = _evaluated(name, text, known, fields.get(name))
        found = {name: value for name, value in known.items() if name in fields}
        if self.same_sum:
            now = sum(found[name] for name in self.same_sum)
            wanted = sum(getattr(seed_setting, name) for name in self.same_sum)
            if now <= 0:
                raise UserError(f"{', '.join(self.same_sum)} are all 0; raise the lower end of one of them")
            if wanted <= 0:
                raise UserError(
                    f"{SAME_SUM}: {', '.join(self.same_sum)} are all 0 in the seed setting; set one above 0"
                )
            factor = wanted / now
            found |= {name: found[name] * factor for name in self.same_sum}
        return found

    def trial(self, params: Values, seed_setting: TrainConfig) -> TrainConfig:
        """The configuration of a trial: the seed setting with these parameters."""
        settings = self.settings(params, seed_setting)
        try:
            return override(seed_setting, settings)
        except UserError as error:
            raise UserError(f"a trial with {_listed(params)}: {error}") from None

    def params_of(self, config: TrainConfig) -> Values:
        """The parameters that give a config; an axis that no setting tells (or none that is in reach) is left out."""
        known = {axis.name: getattr(config, axis.name) for axis in self.axes if hasattr(config, axis.name)}
        for axis in self.axes:
            if axis.name not in known and axis.kind == "choice":
                fits = [value for value in axis.values if self._explains(axis, value, config, known)]
                known |= {axis.name: fits[0]} if fits else {}
        return {axis.name: known[axis.name] for axis in self.axes if axis.name in known}

    def combinations_of(self, config: TrainConfig, seed_setting: TrainConfig) -> Iterator[Values]:
        """The combinations of a grid whose trial would have this config: none, one, or several that come to the same.

        Args:
            config: the seed setting, or it with some settings of the space.
            seed_setting: see `settings`.
        """
        told = settings_of(TrainConfig).keys() - set(self.same_sum)  # the others are told by the settings alone
        choices = [
            [value for value in axis.values if axis.name not in told or _alike(value, getattr(config, axis.name))]
            for axis in self.axes
        ]
        for values in itertools.product(*choices):
            params = dict(zip((axis.name for axis in self.axes), values, strict=True))
            settings = self.settings(params, seed_setting)
            if all(_alike(value, getattr(config, name)) for name, value in settings.items()):
                yield params

    def holds(self, params: Values) -> bool:
        """Whether a search may have drawn these parameters: each axis has a value that lies on it."""
        return all(axis.name in params and params[axis.name] in axis for axis in self.axes)

    def _explains(self, axis: Axis, value: Any, config: TrainConfig, known: Values) -> bool:
        """Whether a choice gives the config's values of all expressions that name its axis, as far as is known."""
        fields, known = settings_of(TrainConfig), known | {axis.name: value}
        computable = {
            name: text for name, text in self.expressions.items() if axis.name in expression.names(text) <= known.keys()
        }
        try:
            pairs = [
                (_evaluated(name, text, known, fields[name]), getattr(config, name))
                for name, text in computable.items()
            ]
        except UserError:  # the seed setting lies where the expression has no value, such as batch_size auto
            return False
        return bool(pairs) and all(_alike(computed, there) for computed, there in pairs)


def read(path: Path, seed_setting: TrainConfig) -> Space:
    """Reads and checks a space.

    Args:
        path: YAML: `setting: {kind: values}`, see tune/space.yaml.
        seed_setting: the configuration that the sweep starts from.

    Raises:
        UserError: no such file, no YAML, a key that is no setting and no part of an expression, a value that the
            setting does not allow; names the file and the key.
    """
    content = read_mapping(path, f"--space {path}", "a YAML file such as tune/space.yaml")
    if not content:
        raise UserError(f"{path} holds no space; expected lines such as `learning_rate: {{loguniform: [1e-5, 1e-3]}}`")
    try:
        return _checked(content, seed_setting)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _checked(content: dict[str, Any], seed_setting: TrainConfig) -> Space:
    content = {str(key): entry for key, entry in content.items()}
    same_sum = content.pop(SAME_SUM, ())
    entries = {key: _entry(key, entry) for key, entry in content.items()}
    expressions = {key: str(values) for key, (kind, values) in entries.items() if kind == "expression"}
    if len(expressions) == len(entries):
        raise UserError("nothing varies; give at least one choice, uniform, loguniform or randint")
    for key, text in expressions.items():
        expression.check(key, text)
    used = {name for text in expressions.values() for name in expression.names(text)}
    for key in content:
        _check_key(key, used, key in expressions)
    for name in sorted(used - content.keys()):
        raise UserError(f"an expression uses {name}, which is not in the space; {_remedy(name, content, seed_setting)}")
    axes = [_axis(key, kind, values) for key, (kind, values) in entries.items() if kind != "expression"]
    space = Space(tuple(axes), _in_order(expressions), _same_sum(same_sum, content))
    for params in probes(space):
        space.trial(params, seed_setting)
    return space


def probes(space: Space) -> Iterator[Values]:
    """Points that show what a space may ask for: every value, every end of an interval, and some between."""
    yield from _corners(space)
    for number in range(PROBES):
        yield space.draw(random.Random(number))


def _entry(key: str, entry: Any) -> tuple[str, Any]:
    if isinstance(entry, dict) and "expression" in entry and len(entry) > 1:
        raise UserError(f"{key}: YAML ends an expression at its comma; write it in quotes, {{expression: 'min(a, b)'}}")
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UserError(
            f"{key}: {as_text(str(entry))} is not allowed; give one of {', '.join(KINDS)}, e.g. choice: [1, 2]"
        )
    ((kind, values),) = entry.items()
    if kind not in KINDS:
        raise UserError(
            f"{key}: unknown kind {kind}; nearest: {nearest(str(kind), KINDS)} (allowed: {', '.join(KINDS)})"
        )
    return kind, values


def _axis(key: str, kind: str, values: Any) -> Axis:
    """An axis whose values are legal for its setting."""
    setting = settings_of(TrainConfig).get(key)
    if not isinstance(values, list) or not values or (kind != "choice" and len(values) != 2):
        wanted = "a list of values" if kind == "choice" else "[lowest, highest]"
        raise UserError(f"{key}: {kind} takes {wanted}, not {as_text(str(values))}")
    values = [setting.convert(value) if setting else _number(key, value) for value in values]
    if len(set(values)) < len(values) and kind == "choice":
        raise UserError(f"{key}: choice names one value twice: {', '.join(map(_text, values))}")
    if kind != "choice":
        _check_interval(key, kind, values, setting)
    return Axis(key, kind, tuple(values))


def _check_interval(key: str, kind: str, values: list[Any], setting: Setting | None) -> None:
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise UserError(f"{key}: {kind} takes numbers, not {', '.join(map(_text, values))}; give choice")
    if kind == "randint" and setting is not None and setting.kind is float:
        raise UserError(f"{key} is any number: give uniform, loguniform or choice, not randint")
    if kind == "randint" and not all(isinstance(value, int) for value in values):
        raise UserError(f"{key}: randint takes whole numbers, not {', '.join(map(_text, values))}")
    if values[0] >= values[1]:
        raise UserError(f"{key}: the lowest value {values[0]} must be below the highest {values[1]}")
    if kind == "loguniform" and values[0] <= 0:
        raise UserError(f"{key}: loguniform starts above 0, not at {values[0]}")
    if setting is not None and setting.kind is int and kind != "randint":
        raise UserError(f"{key} is a whole number: give randint or choice, not {kind}")


def _number(key: str, value: Any) -> int | float:
    """A value that only expressions use."""
    try:
        number = value if isinstance(value, int) else float(value)  # YAML reads 1e-5 as text
        if not isinstance(value, bool) and math.isfinite(number):
            return number
    except (OverflowError, TypeError, ValueError):
        pass
    raise UserError(f"{key}: {_text(value)} is no number; a name that is no setting stands for one in expressions")


def _check_key(key: str, used: set[str], is_expression: bool) -> None:
    fields = settings_of(TrainConfig)
    if key in FIXED:
        raise UserError(f"{key} is the same for all trials, or their Dice could not be compared; set it for the sweep")
    if key not in fields and is_expression:
        raise UserError(f"{key} is no setting, which an expression gives; nearest setting: {nearest(key, fields)}")
    if key not in fields and key not in used:
        raise UserError(f"{key} is no setting, and no expression uses it; nearest setting: {nearest(key, fields)}")


def _remedy(name: str, content: dict[str, Any], seed_setting: TrainConfig) -> str:
    if name in settings_of(TrainConfig):
        return f"to use the seed setting's, add {name}: {{choice: [{_text(getattr(seed_setting, name))}]}}"
    return f"nearest: {nearest(name, content)}"


def _same_sum(names: Any, content: dict[str, Any]) -> tuple[str, ...]:
    if not isinstance(names, list | tuple):
        raise UserError(f"{SAME_SUM} takes a list of settings in the space, not {as_text(str(names))}")
    fields = settings_of(TrainConfig)
    for name in map(str, names):
        if name not in content:
            raise UserError(f"{SAME_SUM} names {name}, which is not in the space; nearest: {nearest(name, content)}")
        if name not in fields or fields[name].kind is not float:
            raise UserError(f"{SAME_SUM} names {name}, which is no setting that takes any number, such as dice_weight")
        if list(names).count(name) > 1:
            raise UserError(f"{SAME_SUM} names {name} twice; keep one")
    return tuple(map(str, names))


def _in_order(expressions: dict[str, str]) -> dict[str, str]:
    """So that an expression comes after those it uses."""
    left, ordered = dict(expressions), {}
    while left:
        ready = [name for name, text in left.items() if not expression.names(text) & left.keys()]
        if not ready:
            raise UserError(f"the expressions of {', '.join(left)} need each other; write one without the other")
        ordered |= {name: left.pop(name) for name in ready}
    return ordered


def _corners(space: Space) -> Iterator[Values]:
    """Points at which every value and every end of an interval occurs: each axis in turn, and all ends together."""
    lowest = {axis.name: axis.values[0] for axis in space.axes}
    yield lowest
    yield {axis.name: axis.values[-1] for axis in space.axes}
    for axis in space.axes:
        for value in axis.values[1:]:
            yield lowest | {axis.name: value}
    inside = [
        axis for axis in space.axes if any(axis.name in expression.names(text) for text in space.expressions.values())
    ]
    for values in itertools.product(*(axis.values for axis in inside)):
        yield lowest | {axis.name: value for axis, value in zip(inside, values, strict=True)}


def _evaluated(name: str, text: str, known: Values, setting: Setting | None) -> Any:
    """An expression's value, a whole number where the setting is one."""
    try:
        value = expression.compute(text, known)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(f"{name} = {text} with {_listed(known)}: {error}") from None
    whole = setting is not None and setting.kind is int and isinstance(value, float) and math.isfinite(value)
    return round(value) if whole else value


def _listed(values: Values) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in values.items())


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else as_text(value)


def _alike(computed: Any, there: Any) -> bool:
    if isinstance(computed, float) and isinstance(there, int | float):
        return math.isclose(computed, there, rel_tol=CLOSE)
    return computed == there


def scale_of(axis: Axis) -> str:
    """How an axis is drawn in a picture: log, linear, or categories for choices that are no numbers."""
    numbers = [value for value in axis.values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(axis.values):
        return "categories"
    return "log" if axis.kind == "loguniform" or (axis.kind == "choice" and min(numbers) > 0) else "linear"


def as_record(space: Space) -> dict[str, Any]:
    """The space in plain types, for a sweep's record."""
    return dataclasses.asdict(space)


def from_record(record: dict[str, Any]) -> Space:
    """The space that `as_record` gave."""
    axes = tuple(Axis(axis["name"], axis["kind"], tuple(map(_hashable, axis["values"]))) for axis in record["axes"])
    return Space(axes, dict(record["expressions"]), tuple(record["same_sum"]))


def _hashable(value: Any) -> Any:
    """JSON has lists only; a choice of several names is a tuple."""
    return tuple(value) if isinstance(value, list) else value
