"""The space of a sweep: what a YAML file may say, what is drawn from it, what a trial's settings become."""

import json
import math
import random
import re
from pathlib import Path

import pytest
from small_sweeps import GRID, SPACE

from sft.config import TrainConfig
from sft.settings import UserError, settings_of
from tune import options, space
from tune.space import Axis, Space

BASE = TrainConfig()


@pytest.fixture
def read(tmp_path):
    def read_text(text: str, base: TrainConfig = BASE) -> Space:
        (tmp_path / "space.yaml").write_text(text)
        return space.read(tmp_path / "space.yaml", base)

    return read_text


# Drawing


def test_an_axis_is_drawn_within_its_ends_and_each_choice_comes():
    generator = random.Random(0)
    axes = {kind: Axis("x", kind, (2, 5)) for kind in ("uniform", "loguniform", "randint")}
    drawn = {kind: [axis.draw(generator) for _ in range(2000)] for kind, axis in axes.items()}
    assert all(2 <= value <= 5 for values in drawn.values() for value in values)
    assert set(drawn["randint"]) == {2, 3, 4, 5}
    assert {Axis("x", "choice", ("a", None, 3)).draw(generator) for _ in range(100)} == {"a", None, 3}


def test_loguniform_is_even_in_the_logarithm():
    axis, generator = Axis("x", "loguniform", (1e-5, 1e-2)), random.Random(1)
    exponents = [math.log10(axis.draw(generator)) for _ in range(6000)]
    counts = [sum(low <= exponent < low + 1 for exponent in exponents) for low in (-5, -4, -3)]
    assert all(count == pytest.approx(2000, abs=6 * math.sqrt(6000 * 2 / 9)) for count in counts)
    assert sum(counts) == 6000


def test_draws_are_those_of_the_generator():
    draws = [SPACE.draw(random.Random(seed)) for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]
    assert all(SPACE.holds(draw) for draw in draws)


@pytest.mark.parametrize(
    ("axis", "inside", "outside"),
    [
        (Axis("x", "uniform", (0, 1)), [0, 0.5, 1], [-0.1, 1.1, None, "auto"]),
        (Axis("x", "randint", (1, 4)), [1, 4], [0, 5, 2.5, "auto"]),
        (Axis("x", "choice", ("auto", 2)), ["auto", 2], [3, None]),
        (Axis("x", "choice", (("q_proj",), ("k_proj", "v_proj"))), [("q_proj",)], [("v_proj",)]),
    ],
)
def test_what_lies_on_an_axis(axis, inside, outside):
    assert all(value in axis for value in inside) and not any(value in axis for value in outside)


def test_a_grid_has_every_combination_once_the_last_axis_fastest():
    found = list(GRID.grid())
    assert found[:4] == [
        {"lora_rank": 8, "lora_dropout": 0.0},
        {"lora_rank": 8, "lora_dropout": 0.1},
        {"lora_rank": 8, "lora_dropout": 0.2},
        {"lora_rank": 16, "lora_dropout": 0.0},
    ]
    assert len(found) == 6
    with pytest.raises(UserError, match="learning_rate is loguniform; a grid needs learning_rate: {choice:"):
        next(SPACE.grid())


# Settings of a trial


def test_expressions_are_computed_in_any_order_and_whole_where_the_setting_is(read):
    found = read(
        "lora_dropout: {expression: lora_alpha / 4096}\n"
        "lora_alpha: {expression: 'round(min(max(ratio * lora_rank, sqrt(4)), 2 ** log2(512)))'}\n"
        "ratio: {choice: [0.1, 2]}\nlora_rank: {choice: [8, 64]}\n"
    )
    assert list(found.expressions) == ["lora_alpha", "lora_dropout"]
    assert found.settings({"ratio": 0.1, "lora_rank": 8}, BASE) == {
        "lora_rank": 8,
        "lora_alpha": 2,
        "lora_dropout": 2 / 4096,
    }
    assert found.settings({"ratio": 2, "lora_rank": 64}, BASE)["lora_alpha"] == 128
    trial = found.trial({"ratio": 2, "lora_rank": 8}, BASE)
    assert (trial.lora_rank, trial.lora_alpha, trial.lora_dropout) == (8, 16, 16 / 4096)
    halved = read("lora_alpha: {expression: lora_rank / 2}\nlora_rank: {choice: [9]}")
    assert halved.settings({"lora_rank": 9}, BASE)["lora_alpha"] == 4


def test_same_sum_keeps_the_sum_of_the_seed_setting():
    base = TrainConfig(dice_weight=1.0, focal_weight=2.0, bce_weight=0.5)
    names = ("dice_weight", "focal_weight", "bce_weight")
    found = Space(tuple(Axis(name, "uniform", (0.0, 2.0)) for name in names), {}, names)
    params = {"dice_weight": 0.5, "focal_weight": 0.25, "bce_weight": 1.0}
    assert found.settings(params, base) == {"dice_weight": 1.0, "focal_weight": 0.5, "bce_weight": 2.0}
    for seed in range(20):
        assert sum(found.settings(found.draw(random.Random(seed)), base).values()) == pytest.approx(3.5)
    with pytest.raises(UserError, match="are all 0; raise the lower end"):
        found.settings(dict.fromkeys(names, 0.0), base)


def test_the_seed_settings_parameters_are_told_where_something_tells_them():
    ratio = Axis("ratio", "choice", (0.1, 0.5, 2))
    found = Space((*SPACE.axes, ratio), {"lora_alpha": "ratio * lora_rank"})
    assert found.params_of(BASE) == {"lora_rank": 64, "learning_rate": 1e-4, "ratio": 2}
    assert "ratio" not in found.params_of(TrainConfig(lora_rank=64, lora_alpha=64))
    decay = Space((ratio, SPACE.axes[1]), {"weight_decay": "ratio * learning_rate"})
    assert decay.params_of(TrainConfig(learning_rate=3e-4, weight_decay=3e-5))["ratio"] == 0.1  # 0.1 * 3e-4 != 3e-5
    unrelated = Space((*found.axes, Axis("free", "choice", (1, 2))), found.expressions | {"focal_gamma": "free * 3"})
    assert "free" not in unrelated.params_of(BASE)
    dropout, two = Axis("lora_dropout", "uniform", (0, 0.5)), (Axis("a", "choice", (1, 2)), Axis("b", "choice", (1, 2)))
    either = Space((*two, dropout), {"lora_alpha": "64 * a * b", "weight_decay": "0 * lora_dropout"})
    assert either.params_of(BASE) == {"lora_dropout": 0.05}  # 1 and 2, or 2 and 1
    assert not found.holds(found.params_of(BASE))  # rank 64 is none of the choices


def test_the_combinations_that_come_to_a_config():
    rank, ratio = Axis("lora_rank", "choice", (32, 64)), Axis("ratio", "choice", (0.1, 1, 2))
    found = Space((rank, ratio), {"lora_alpha": "ratio * lora_rank", "weight_decay": "0.003 * ratio"})
    for config, wanted in (
        (TrainConfig(lora_rank=64, lora_alpha=128, weight_decay=0.006), [{"lora_rank": 64, "ratio": 2}]),
        (TrainConfig(lora_rank=32, lora_alpha=3, weight_decay=0.0003), [{"lora_rank": 32, "ratio": 0.1}]),
        (TrainConfig(lora_rank=64, lora_alpha=64, weight_decay=0.006), []),
        (TrainConfig(lora_rank=16, lora_alpha=32, weight_decay=0.006), []),
    ):
        assert list(found.combinations_of(config, BASE)) == wanted
    assert 0.003 * 0.1 != 0.0003  # nor need a computed number be the written one
    weights = ("dice_weight", "bce_weight")
    scaled = Space(tuple(Axis(name, "choice", (0.5, 1.0, 2.0)) for name in weights), {}, weights)
    same = [{"dice_weight": 1.0, "bce_weight": 0.5}, {"dice_weight": 2.0, "bce_weight": 1.0}]
    assert list(scaled.combinations_of(BASE, BASE)) == same  # 1 and 0.5 once the sum is brought to 1.5


def test_a_seed_setting_that_an_expression_cannot_take_tells_no_parameter():
    found = Space(
        (Axis("batch_size", "choice", (1, 2)), Axis("rate", "choice", (1e-4, 1e-3))),
        {"learning_rate": "rate * batch_size"},
    )
    assert found.params_of(TrainConfig(batch_size="auto")) == {"batch_size": "auto"}


# What a file may say


@pytest.mark.parametrize("name", ["SPACE", "DEMO_SPACE"])
def test_the_shipped_spaces_are_legal_for_their_seed_settings(name):
    config = options.parse([]).seed_setting if name == "DEMO_SPACE" else BASE
    found = space.read(getattr(options, name), config)
    assert {"lora_rank", "learning_rate", "dice_weight"} <= {axis.name for axis in found.axes}
    assert found.expressions == {"lora_alpha": "alpha_ratio * lora_rank"}
    for seed in range(50):
        trial = found.trial(found.draw(random.Random(seed)), config)
        assert trial.dice_weight + trial.focal_weight + trial.bce_weight == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("learning_rate: {loguniform: [1e-5, 1e-3]}", (1e-5, 1e-3)),  # which YAML reads as text
        ("ratio: {choice: [1e-1, 2]}\nlora_dropout: {expression: ratio / 4}", (0.1, 2)),
        ("lora_target_modules: {choice: [[q_proj, v_proj], 'k_proj']}", (("q_proj", "v_proj"), ("k_proj",))),
        ("train_modules: {choice: [none, mask_decoder]}", ((), ("mask_decoder",))),
        ("train_modules_learning_rate: {choice: [none, 1e-4]}", (None, 1e-4)),
        ("augment: {choice: [true, false]}", (True, False)),
        ("batch_size: {choice: [auto, 4]}", ("auto", 4)),
        ("lora_rank: {randint: [4, 64]}", (4, 64)),
    ],
)  # fmt: skip
def test_values_take_the_type_of_their_setting(read, text, values):
    found = read(text)
    assert found.axes[0].values == values
    assert all(type(got) is type(wanted) for got, wanted in zip(found.axes[0].values, values, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: {uniform: [0, 1]}", "learning_rat is no setting, .* nearest setting: learning_rate"),
        ("lora_target_module: {choice: [[q_proj], [k_proj]]}", "nearest setting: lora_target_modules"),
        ("1: {choice: [1, 2]}", "1 is no setting"),
        ("seed: {randint: [1, 9]}", "seed is the same for all trials"),
        ("num_epochs: {choice: [1, 2]}", "num_epochs is the same for all trials"),
        ("lora_rank: 8", "lora_rank: 8 is not allowed; give one of choice, uniform"),
        ("lora_rank: {choise: [8]}", "lora_rank: unknown kind choise; nearest: choice"),
        ("lora_rank: {choice: []}", "choice takes a list of values"),
        ("lora_rank: {choice: [8, 8]}", "names one value twice: 8, 8"),
        ("lora_rank: {choice: [8, 2000]}", "lora_rank = 2000 is not allowed: integer at least 1 and at most 1024"),
        ("lora_dropout: {uniform: [0, 1]}", "lora_dropout = 1 is not allowed: number at least 0 and below 1"),
        ("lora_dropout: {uniform: [0, 0.1, 0.2]}", r"uniform takes \[lowest, highest\]"),
        ("lora_dropout: {uniform: [0.2, 0.1]}", "the lowest value 0.2 must be below the highest 0.1"),
        ("weight_decay: {loguniform: [0, 0.1]}", "loguniform starts above 0"),
        ("lora_rank: {uniform: [4, 8]}", "lora_rank is a whole number: give randint or choice, not uniform"),
        ("focal_gamma: {randint: [1, 4]}", "focal_gamma is any number: give uniform, loguniform or choice"),
        ("precision: {uniform: [bf16, fp32]}", "precision: uniform takes numbers, not bf16, fp32; give choice"),
        ("r: {uniform: [0, .inf]}\nlora_dropout: {expression: r}", "r: inf is no number"),
        ("r: {choice: [a]}\nlora_dropout: {expression: r}", "r: a is no number"),
        ("r: {choice: [true]}\naugment: {expression: r}", "r: true is no number"),
        ("r: {randint: [1.5, 4]}\nlora_rank: {expression: r}", "r: randint takes whole numbers, not 1.5, 4"),
        ("lora_alpha: {expression: 2 * lora_rank}\nlora_dropout: {choice: [0]}", r"add lora_rank: {choice: \[64\]}"),
        ("lora_alpha: {expression: 2 * lora_rnk}\nlora_rank: {choice: [8]}", "uses lora_rnk, .* nearest: lora_rank"),
        ("a: {expression: 2 * lora_rank}\nlora_rank: {choice: [8]}", "a is no setting, which an expression gives"),
        ("lora_alpha: {expression: lora_alpha + lora_rank}\nlora_rank: {choice: [8]}", "lora_alpha need each other"),
        ("lora_alpha: {expression: 2 *}\nlora_rank: {choice: [8]}", r"lora_alpha: 2 \* is no arithmetic"),
        ("lora_alpha: {expression: open('x')}\nlora_rank: {choice: [8]}", "is not allowed; an expression has"),
        ("lora_alpha: {expression: lora_rank.real}\nlora_rank: {choice: [8]}", "is not allowed; an expression has"),
        ("lora_alpha: {expression: min(9, lora_rank)}\nlora_rank: {choice: [8]}", "ends an expression at its comma"),
        ("lora_alpha: {expression: 3 / (lora_rank - 8)}\nlora_rank: {choice: [8]}", "division by zero"),
        ("lora_alpha: {expression: lora_rank ** 400}\nlora_rank: {choice: [8]}",
         r"lora_alpha = lora_rank \*\* 400 with lora_rank 8: a number beyond 1.8e\+308; keep what it multiplies or"),
        ("lora_alpha: {expression: 1 << 99}\nlora_rank: {choice: [8]}", "lora_alpha: 1 << 99 is not allowed; an expr"),
        ("lora_alpha: {expression: 9 * precision}\nprecision: {choice: [bf16]}", "9 .* precision is bf16, which is no"),
        ("lora_alpha: {expression: 9 * lora_scope}\nlora_scope: {choice: [[mask_decoder]]}", r"'mask_decoder',\), "),
        (f"r: {{choice: [1{'0' * 400}]}}\nlora_dropout: {{expression: r}}", "r: 10+ is no number"),
        ("lora_alpha: {expression: 99 * lora_rank}\nlora_rank: {choice: [8, 1024]}", "lora_rank 1024: .*101376"),
        ("x: {uniform: [0, 1]}\nlora_dropout: {expression: 5 * x * (1 - x)}", "with x 0[.].* lora_dropout = "),
        ("lora_alpha: {expression: 16}", "nothing varies"),
        ("same_sum: [dice_weight]", "nothing varies"),
        ("dice_weight: {uniform: [0, 1]}\nsame_sum: dice_weight", "same_sum takes a list"),
        ("dice_weight: {uniform: [0, 1]}\nsame_sum: [dice_weigth]", "dice_weigth, .* nearest: dice_weight"),
        ("lora_rank: {choice: [8]}\nsame_sum: [lora_rank]", "lora_rank, which is no setting that takes any number"),
        ("dice_weight: {uniform: [1, 2]}\nsame_sum: [dice_weight, dice_weight]", "dice_weight twice"),
        ("text_weight: {uniform: [1, 2]}\nsame_sum: [text_weight]", "all 0 in the seed setting"),
        ("lora_rank: {choice: [8]}\nlora_rank: {choice: [16]}", "lora_rank is given twice"),
        ("lora_scope: {choice: [language_model, mask_decoder]}\ntrain_modules: {choice: [none, mask_decoder]}",
         "a trial with lora_scope mask_decoder, train_modules mask_decoder: lora_scope and train_modules both"),
        ("- lora_rank", "holds no space"),
        ("# nothing", "holds no space"),
        ("lora_rank: {choice: [8", "is not YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_file_and_remedy(read, tmp_path, text, message):
    with pytest.raises(UserError) as caught:
        read(text)
    assert str(caught.value).startswith(str(tmp_path / "space.yaml")) and "\n" not in str(caught.value)
    assert re.search(message, str(caught.value))


def test_a_file_that_is_not_there_is_told_with_its_flag(tmp_path):
    with pytest.raises(UserError, match=r"--space .*none.yaml: No such file"):
        space.read(tmp_path / "none.yaml", BASE)


def test_what_must_not_vary_names_settings_alone():
    assert settings_of(TrainConfig).keys() >= space.FIXED


# The record


def test_a_record_gives_the_same_space_after_json(read):
    found = read(
        "lora_target_modules: {choice: [[q_proj], [k_proj, v_proj]]}\nlora_rank: {randint: [1, 8]}\n"
        "lora_alpha: {expression: 2 * lora_rank}\ndice_weight: {uniform: [0.5, 1]}\nsame_sum: [dice_weight]"
    )
    assert space.from_record(json.loads(json.dumps(space.as_record(found)))) == found


def test_probes_show_every_value_and_every_end():
    found = list(space.probes(SPACE))
    assert {params["lora_rank"] for params in found} == {8, 16, 32}
    assert {1e-5, 1e-3} < {params["learning_rate"] for params in found}
    assert all(SPACE.holds(params) for params in found)


@pytest.mark.parametrize(
    ("axis", "scale"),
    [
        (Axis("x", "loguniform", (1e-5, 1e-3)), "log"),
        (Axis("x", "uniform", (1, 2)), "linear"),
        (Axis("x", "choice", (8, 16)), "log"),
        (Axis("x", "choice", (0.0, 0.1)), "linear"),
        (Axis("x", "choice", (True, False)), "categories"),
        (Axis("x", "choice", ("auto", 4)), "categories"),
    ],
)
def test_how_an_axis_is_drawn_in_a_picture(axis, scale):
    assert space.scale_of(axis) == scale


def test_yaml_files_of_the_folder_are_the_spaces_that_are_tested():
    folder = Path(space.__file__).parent
    assert {file.name for file in folder.glob("*space*.yaml")} == {options.SPACE.name, options.DEMO_SPACE.name}
