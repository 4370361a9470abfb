"""Where a parameter's value lies on its axis: log, linear or one of some categories.

Takes an axis of the space and the values that trials had, which may lie outside it; gives numbers for a forest, places
between 0 and 1 and labelled ticks for a picture, and values as short text. Knows no library and no Dice.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sft.settings import as_text
from tune.space import Axis, scale_of

TICK_GAP = 0.055
"""Least distance of two labels on an axis of length 1."""
MISSING: Any = object()
"""In place of a value that a trial does not tell; None is a value, the `none` of a setting."""
SMALL = 1e-3
"""Numbers below it are shown with an exponent."""


@dataclass(frozen=True)
class Scale:
    """One axis, wide enough for every value that was tried."""

    name: str
    kind: str
    """log, linear or categories."""
    low: float
    """In the unit of `number`."""
    high: float
    choices: tuple[str, ...]
    """Of categories all that occur, of other choices those of the axis; none of an interval."""
    numbers: tuple[float, ...]
    """Where the choices lie."""

    def number(self, value: Any) -> float | None:
        """The value as this scale counts it: its logarithm, itself or the index of its category; None for no place."""
        if self.kind == "categories":
            text = shown(value)
            return float(self.choices.index(text)) if value is not MISSING and text in self.choices else None
        return _number(value, self.kind)

    def place(self, value: Any) -> float | None:
        """Between 0, the lowest value of the axis, and 1; None for a value without a place."""
        number = self.number(value)
        return None if number is None else self._between(number)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels, ascending; none is so near to another that the two cannot be read."""
        if self.choices:
            found = [(self._between(number), text) for number, text in zip(self.numbers, self.choices, strict=True)]
        else:
            found = [(self._between(number), self._text(number)) for number in _round_numbers(self)]
        kept: list[tuple[float, str]] = []
        for place, text in sorted(found):
            if not kept or place - kept[-1][0] >= TICK_GAP:
                kept.append((place, text))
        return kept

    def _between(self, number: float) -> float:
        return 0.5 if self.high == self.low else (number - self.low) / (self.high - self.low)

    def _text(self, number: float) -> str:
        return shown(10**number) if self.kind == "log" else shown(number)


def scale(axis: Axis, values: Iterable[Any]) -> Scale:
    """The scale of an axis that also holds these values, those MISSING aside."""
    kind = scale_of(axis)
    values = [value for value in values if value is not MISSING]
    if kind == "categories":
        choices = tuple(dict.fromkeys(shown(value) for value in [*axis.values, *values]))
        return Scale(axis.name, kind, 0.0, float(len(choices) - 1), choices, tuple(map(float, range(len(choices)))))
    own = [_number(value, kind) for value in axis.values]
    tried = [number for value in values if (number := _number(value, kind)) is not None]
    choices = tuple(shown(value) for value in axis.values) if axis.kind == "choice" else ()
    return Scale(axis.name, kind, min(own + tried), max(own + tried), choices, tuple(own) if choices else ())


def finite(value: Any) -> float | None:
    """A number that is one; None for text, true and false, infinity and NaN."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def shown(value: Any) -> str:
    """A value in few characters: three digits of a number, small ones as 2.5e-4, the names of a list."""
    if value is MISSING:
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "none"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "–"
        small = 0 < abs(value) < SMALL
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}" if small else f"{value:.3g}"
    return value if isinstance(value, str) and value else as_text(value)


def _number(value: Any, kind: str) -> float | None:
    number = finite(value)
    if number is None or (kind == "log" and number <= 0):
        return None
    return math.log10(number) if kind == "log" else number


def _round_numbers(scale: Scale) -> list[float]:
    """Numbers within the scale that read well: powers of ten, or 1-2-5 steps, and at least its two ends."""
    inside: list[float] = []
    if scale.kind == "log":
        factors = (1, 2, 5) if scale.high - scale.low < 3 else (1,)
        powers = range(math.floor(scale.low), math.ceil(scale.high) + 1)
        inside = [power + math.log10(factor) for power in powers for factor in factors]
    elif scale.high > scale.low:
        step = round_step(scale.high - scale.low)
        inside = [index * step for index in range(math.ceil(scale.low / step), math.floor(scale.high / step) + 1)]
    slack = 1e-9 * (scale.high - scale.low)
    inside = [number for number in inside if scale.low - slack <= number <= scale.high + slack]
    return inside if len(inside) > 1 else sorted({scale.low, scale.high})


def round_step(span: float) -> float:
    """The step of 1, 2 or 5 times a power of ten that divides a span into four to ten parts."""
    power = 10 ** math.floor(math.log10(span / 4))
    return max(power * factor for factor in (1, 2, 5) if power * factor <= span / 4)
