"""Fields of a settings dataclass taken apart: what is legal, how text becomes a value, which flag it has.

Takes a frozen dataclass whose annotations carry Range, PATH or Literal and whose fields have a doc string beneath;
gives Setting records, converted values and argparse flags. Does not know which settings there are.
"""

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import numbers
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

PATH = "path"  # in an annotation: a leading ~ is the home directory


class UserError(ValueError):
    """A user's mistake in one line: what was given, what is allowed, what to do next."""


class DiskError(UserError):
    """A place has no room or may not be written: what was refused goes through once that is mended."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Legal values of a number; an infinite or undefined number is never legal."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        bounds = ((name.replace("_", " "), bound) for name, bound in vars(self).items())
        return " and ".join(f"{words} {bound}" for words, bound in bounds if math.isfinite(bound))


@dataclass(frozen=True)
class Former:
    """A value that was legal once, and what stands in its place now."""

    value: str
    now: str


@dataclass(frozen=True)
class Setting:
    """One field of a settings dataclass."""

    name: str
    default: Any
    kind: type  # str, int, float or bool
    optional: bool  # None is legal
    many: bool  # a tuple of `kind`
    choices: tuple[str, ...]
    range: Range | None
    is_path: bool
    words: tuple[str, ...] = ()  # legal besides `kind`, such as auto
    former: Former | None = None

    @property
    def allowed(self) -> str:
        """The legal values in words, for errors, --help and the settings table."""
        names = {str: "path" if self.is_path else "text", int: "integer", float: "number", bool: "true or false"}
        words = " or ".join(self.choices) or names[self.kind] + (f" {self.range}" if self.range else "")
        if self.many:
            words = f"any of {', '.join(self.choices)}" if self.choices else "names with commas between"
        words = ", or ".join([words, *self.words])
        return f"{words}, or none" if self.optional else words

    @property
    def default_text(self) -> str:
        """The default as one would write it after the flag."""
        if self.default in (None, ()):
            return "none"
        return ",".join(self.default) if self.many else as_text(self.default)

    def convert(self, value: Any) -> Any:
        """The value in the field's own type; text such as "1e-4" is read as the type asks.

        Raises:
            UserError: wrong type, out of range, or not one of the choices.
        """
        if self.optional and value in (None, "none"):
            return None
        if not self.many:
            return self._convert_one(value)
        if isinstance(value, str):
            value = () if value.strip() in ("", "none") else [part.strip() for part in value.split(",")]
        if not isinstance(value, (list, tuple)):
            self._refuse(value)
        items = tuple(self._convert_one(item) for item in value)
        if len(set(items)) < len(items):
            raise UserError(f"{self.name} = {','.join(items)} names one thing twice")
        return items

    def _convert_one(self, given: Any) -> Any:
        value = given
        if isinstance(value, str) and value in self.words:
            return value
        if isinstance(value, bool) and "off" in self.choices:
            value = "on" if value else "off"  # YAML reads a bare off as false
        try:
            value = _as_type(self.kind, value)
        except (KeyError, TypeError, ValueError, OverflowError):
            self._refuse(given)
        if self.choices and value not in self.choices or self.range and value not in self.range:
            self._refuse(given)
        if self.kind is str and not value.strip():
            self._refuse(given)
        return os.path.expanduser(value) if self.is_path else value

    def _refuse(self, value: Any) -> NoReturn:
        hint = f"; nearest: {nearest(str(value), self.choices)}" if self.choices else ""
        if self.former and value == self.former.value:
            hint = f"; {value} is no more, give {self.former.now}"
        raise UserError(f"{self.name} = {as_text(value)} is not allowed: {self.allowed}{hint}")


class FlagParser(argparse.ArgumentParser):
    """A parser whose errors are the user's mistakes like all others."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of ending the process."""
        raise UserError(message)


def read_mapping(path: Path, named: str, expected: str) -> dict[Any, Any] | None:
    """The keys and values of a YAML file, {} of an empty one; None if it holds something else.

    Args:
        path: the file.
        named: what stands before an error about opening it, e.g. the flag with the path.
        expected: what the file should be, in words.

    Raises:
        UserError: no such file, not YAML, or a key twice.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        root, content = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{named}: {error.strerror}; expected {expected}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if root is None:
        return {}
    if not isinstance(content, dict):
        return None
    keys = [key.value for key, _ in root.value]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(f"{path}: {twice} is given twice; keep one")
    return content


@functools.cache
def settings_of(cls: type) -> dict[str, Setting]:
    """The fields of a settings dataclass by name, in order."""
    return {field.name: _setting(field) for field in dataclasses.fields(cls)}


def docs_of(cls: type) -> dict[str, str]:
    """Field name -> the doc string beneath it, read from the source."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    return {
        field.target.id: " ".join(ast.literal_eval(doc.value).split())
        for field, doc in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    }


def checked(cls: type, values: dict[str, Any], source: str = "") -> dict[str, Any]:
    """The values converted to their fields' types.

    Args:
        cls: the settings dataclass.
        values: setting name -> value, of any type YAML or a flag gives.
        source: stands before every error, e.g. the file the values come from.

    Raises:
        UserError: an unknown key (names the nearest one) or an illegal value.
    """
    known, converted = settings_of(cls), {}
    prefix = f"{source}: " if source else ""
    for key, value in values.items():
        if key not in known:
            close = known[nearest(str(key), known)]
            raise UserError(f"{prefix}unknown key {key} = {as_text(value)}; nearest: {close.name} ({close.allowed})")
        try:
            converted[key] = known[key].convert(value)
        except UserError as error:
            raise UserError(f"{prefix}{error}") from None
    return converted


def add_flags(parser: argparse.ArgumentParser, cls: type, sections: dict[str, str]) -> None:
    """Give the parser one flag per field; a value stays text, which `checked` converts.

    Args:
        parser: should leave out what is not given (argument_default=SUPPRESS).
        cls: the settings dataclass.
        sections: first field of a section -> its heading.
    """
    group, docs = parser, docs_of(cls)
    for name, setting in settings_of(cls).items():
        if name in sections:
            group = parser.add_argument_group(sections[name])
        text = f"{docs[name]} [{setting.allowed}; default {setting.default_text}]".replace("%", "%%")
        if setting.kind is bool:
            group.add_argument(f"--{name}", nargs="?", const=True, metavar="BOOL", help=text)
            group.add_argument(f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
        else:
            metavar = {str: "PATH" if setting.is_path else "TEXT", int: "N", float: "X"}[setting.kind]
            several = {"nargs": "+", "metavar": "NAME"} if setting.many else {"metavar": metavar}
            group.add_argument(f"--{name}", help=text, **several)


def nearest(word: str, names: typing.Iterable[str]) -> str:
    """The name most like `word`."""
    return difflib.get_close_matches(word.lstrip("-").replace("-", "_"), names, n=1, cutoff=0)[0]


def as_text(value: Any) -> str:
    """A value as the user would write it: true, none, 1e-05, 'two words'."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, str) and (not value or " " in value) else str(value)


def _setting(field: dataclasses.Field) -> Setting:
    """Take an annotation apart: X | None, X | Literal["auto"], tuple[X, ...], Annotated[X, Range or PATH], Literal."""
    is_union = typing.get_origin(field.type) in (types.UnionType, typing.Union)
    parts = typing.get_args(field.type) if is_union else (field.type,)
    literals = [part for part in parts if typing.get_origin(part) is Literal]
    kind, *literals = [part for part in parts if part is not types.NoneType and part not in literals] + literals
    marks = []
    many = typing.get_origin(kind) is tuple
    if many:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is Annotated:
        kind, *marks = typing.get_args(kind)
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    return Setting(
        name=field.name,
        default=field.default,
        kind=str if choices else kind,
        optional=types.NoneType in parts,
        many=many,
        choices=choices,
        range=next((mark for mark in marks if isinstance(mark, Range)), None),
        is_path=PATH in marks,
        words=tuple(word for literal in literals for word in typing.get_args(literal)),
        former=next((mark for mark in marks if isinstance(mark, Former)), None),
    )


def _as_type(kind: type, value: Any) -> Any:
    """`value` as str, int, float or bool; raises when that would change its meaning."""
    if kind is bool and isinstance(value, str):
        return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}[value.lower()]
    accepted = {bool: bool, int: (numbers.Integral, str), float: (numbers.Real, str), str: (str, numbers.Integral)}
    if not isinstance(value, accepted[kind]) or isinstance(value, bool) is not (kind is bool):
        raise TypeError
    return kind(value)
