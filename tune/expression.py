"""Arithmetic that a space writes in words: checked when the space is read, computed for each of its points.

Takes an expression's text and the values of its names, gives a number. No number may exceed LARGEST, on the way to the
result, either, so that no text (9 ** 9 ** 9) takes time or memory of note. Does not know settings or axes.
"""

import ast
import math
import operator
import sys
from collections.abc import Callable, Mapping
from typing import Any

from sft.settings import UserError

LARGEST = sys.float_info.max
MOST_LEVELS = 100  # of operations, one within the other
MOST_DIGITS = sys.float_info.max_10_exp + 1  # no number has more before its point


def check(name: str, text: str) -> None:
    """Raises UserError where a setting's expression is anything but arithmetic."""
    tree = _parsed(name, text)
    for node in ast.walk(tree):
        numeric = not isinstance(node, ast.Constant) or isinstance(node.value, int | float)
        called = not isinstance(node, ast.Call) or (isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS)
        if not isinstance(node, SYNTAX) or not numeric or not called:
            raise UserError(
                f"{name}: {text} is not allowed; an expression has numbers, names, + - * / // ** and "
                f"{', '.join(FUNCTIONS)}"
            )


def names(text: str) -> set[str]:
    """Parameters in an expression that `check` has passed."""
    return {node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)} - FUNCTIONS.keys()


def compute(text: str, known: Mapping[str, Any]) -> Any:
    """An expression's value.

    Args:
        text: what `check` has passed.
        known: a value for each of its names.

    Returns:
        A number; where the expression is a name alone, that name's value as it is.

    Raises:
        ArithmeticError, TypeError, ValueError: there is none; the message says why.
    """
    tree = ast.parse(text, mode="eval").body
    if isinstance(tree, ast.Name) and tree.id in known:
        return known[tree.id]
    try:
        return _value(tree, known)
    except OverflowError:
        raise OverflowError(f"a number beyond {LARGEST:.2g}; keep what it multiplies or raises smaller") from None


def _parsed(name: str, text: str) -> ast.Expression:
    try:
        tree = ast.parse(text, mode="eval")
        if _depth(tree) <= MOST_LEVELS:
            return tree
    except (SyntaxError, ValueError):  # a null byte is the latter
        raise UserError(f"{name}: {text} is no arithmetic; expected e.g. alpha_ratio * lora_rank") from None
    except (MemoryError, RecursionError):  # Python's own limits
        pass
    raise UserError(f"{name}: {text} has more than {MOST_LEVELS} operations one within the other; write it shorter")


def _depth(node: ast.AST) -> int:
    return 1 + max([_depth(child) for child in ast.iter_child_nodes(node)], default=0)


def _value(node: ast.AST, known: Mapping[str, Any]) -> int | float:
    match node:
        case ast.Constant(found):
            pass
        case ast.Name(name) if name in known:
            found = known[name]
        case ast.UnaryOp(sign, operand):
            found = OPERATORS[type(sign)](_value(operand, known))
        case ast.BinOp(left, sign, right):
            found = OPERATORS[type(sign)](_value(left, known), _value(right, known))
        case ast.Call(ast.Name(function), arguments):
            found = FUNCTIONS[function](*[_value(argument, known) for argument in arguments])
        case _:
            raise TypeError(f"{ast.unparse(node)} has no value")
    if not isinstance(found, int | float):
        raise TypeError(f"{ast.unparse(node)} is {found}, which is no number")
    if not -LARGEST <= found <= LARGEST:  # infinity and what is no number, too
        raise OverflowError
    return found


def _power(base: int | float, exponent: int | float) -> int | float:
    """`**`, refused where a whole number would be far beyond LARGEST: it would be computed digit by digit."""
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and (base.bit_length() - 1) * exponent > sys.float_info.max_exp:
        raise OverflowError
    return base**exponent


def _round(number: int | float, digits: int | None = None) -> int | float:
    """`round`, which computes 10 ** -digits for a whole number."""
    return round(number) if digits is None else round(number, max(digits, -MOST_DIGITS))


FUNCTIONS: dict[str, Callable] = {"min": min, "max": max, "round": _round, "sqrt": math.sqrt, "log2": math.log2}
OPERATORS: dict[type, Callable] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
OPERATORS |= {ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Pow: _power}
OPERATORS |= {ast.USub: operator.neg, ast.UAdd: operator.pos}
SYNTAX = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Name, ast.Load, ast.Constant, ast.Call, *OPERATORS)
