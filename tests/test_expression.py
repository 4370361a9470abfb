"""Expressions of a space: what they compute, and that none takes time or memory of note."""

import subprocess
import sys
from pathlib import Path

import pytest

from sft.settings import UserError
from tune import expression
from tune.expression import LARGEST, MOST_LEVELS, check, compute, names

ROOT = Path(__file__).resolve().parents[1]
GUARD_S = 120  # of a process that would never end


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 * a + b / 4 - 1", 5.5),
        ("-a ** 2 // 2", -5),  # -(3 ** 2) // 2
        ("+a - -b", 5),
        ("2 ** 3 ** 2", 512),
        ("2 ** -1", 0.5),
        ("min(a, b, 7) + max(a, b)", 5),
        ("round(sqrt(b) * 10 ** 3, -2)", 1400.0),
        ("round(7 / 3, 2)", 2.33),
        ("log2(8 * b)", 4.0),
        ("0 ** 10 ** 300 + 1 ** 10 ** 300 + (-1) ** 10 ** 300", 2),
        ("3 * on", 3),
    ],
)
def test_what_an_expression_computes(text, value):
    check("x", text)
    found = compute(text, {"a": 3, "b": 2, "on": True})
    assert found == value and type(found) is type(value)


def test_a_name_alone_is_its_value_whatever_it_is():
    for value in ("bf16", ("q_proj",), None, 3):
        assert compute("a", {"a": value}) is value
    assert names("min(a, 2 * b) - round(a)") == {"a", "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2 ** 1024", "beyond 1.8e.308"),
        ("(-2) ** 1025", "beyond"),
        ("big * 10", "beyond"),  # a whole number
        ("1.0 * big * 10", "beyond"),  # infinity
        ("2.0 ** 1024", "beyond"),
        ("1e999", "beyond"),
        ("1e999 - 1e999", "beyond"),
        ("huge - huge", "beyond"),
        ("9" * 400, "beyond"),
        ("text * 3", "text is auto, which is no number"),
        ("text + text", "no number"),
        ("several * 3", "no number"),
        ("max(several)", "no number"),
        ("(0 - 8) ** 0.5", "no number"),
        ("min", "min has no value"),
        ("2 * min", "min has no value"),
        ("1 / 0", "division by zero"),
        ("sqrt(0 - 1)", "."),
        ("round(1, 2, 3)", "."),
    ],
)
def test_what_has_no_value_says_why(text, message):
    check("x", text)
    known = {"big": 10**308, "huge": 10**400, "text": "auto", "several": ("q_proj", "v_proj")}
    with pytest.raises((ArithmeticError, TypeError, ValueError), match=message):
        compute(text, known)


def test_numbers_go_up_to_the_largest():
    assert compute("2 ** 1023", {}) == 2**1023
    assert compute("a - 1", {"a": LARGEST}) == LARGEST
    assert compute("a + 0", {"a": int(LARGEST)}) == int(LARGEST)
    with pytest.raises(OverflowError):
        compute("a + 1", {"a": int(LARGEST)})


def test_round_gives_zero_where_all_digits_are_gone_without_computing_them(monkeypatch):
    asked = []
    monkeypatch.setattr(expression, "round", lambda *given: asked.append(given) or round(*given), raising=False)
    assert compute("round(12345, 0 - 10 ** 12)", {}) == 0
    assert asked == [(12345, -309)]
    assert compute("round(1.5, 10 ** 12)", {}) == 1.5


def test_an_expression_is_as_deep_as_it_may_be_and_no_deeper():
    check("x", "-" * (MOST_LEVELS - 3) + "a")  # two levels of the tree are its root and the name's way of use
    assert compute("-" * 60 + "a", {"a": 3}) == 3
    for text in ("-" * MOST_LEVELS + "a", "-" * 10_000 + "a", "1" + "+1" * 50_000, "(" * 10_000):
        with pytest.raises(UserError, match="^x: "):
            check("x", text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("9 ** 9 ** 9", "lora_alpha = 9 ** 9 ** 9 with lora_rank 8: a number beyond"),
        ("round(lora_rank, 0 - 9 ** 9)", "a trial with lora_rank 8: lora_alpha = 0 is not allowed"),
    ],
)
def test_the_program_answers_whatever_a_space_asks_it_to_compute(tmp_path, text, told):
    space = tmp_path / "space.yaml"
    space.write_text(f"lora_alpha: {{expression: '{text}'}}\nlora_rank: {{choice: [8]}}\n")
    command = [sys.executable, str(ROOT / "tune" / "search.py"), "--space", str(space)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=GUARD_S)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {space}: {told}") and done.stderr.count("\n") == 1
