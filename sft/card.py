"""The tables of the embedded base's model card, made from what pre-training recorded.

`python -m sft.card DIR` refreshes them in DIR/README.md, between their markers. Takes pretraining.json and the weights'
shapes; everything else in the card is written by hand.
"""

import json
import math
import re
import sys
from pathlib import Path

from safetensors import safe_open

PARTS = {
    "vision_model.": "`vision_model`: InternViT",
    "mlp1.": "`mlp1`: projector after pixel shuffle",
    "language_model.": "`language_model`: Qwen2",
    "text_hidden_fcs.": "`text_hidden_fcs`: [SEG] state to SAM2",
    "grounding_encoder.sam2_model.image_encoder.": "SAM2's image encoder: Hiera and FPN",
    "grounding_encoder.sam2_model.sam_mask_decoder.": "SAM2's mask decoder",
    "grounding_encoder.": "SAM2's prompt encoder",
}


def refresh(directory: Path) -> str:
    """The text of DIR/README.md with its tables as pretraining.json and the weights have them."""
    text = (directory / "README.md").read_text(encoding="utf-8")
    figures = json.loads((directory / "pretraining.json").read_text())
    tables = {
        "parts": _parts(directory / "model.safetensors"),
        "settings": _table(("setting", "value"), [(f"`{k}`", f"{v:g}") for k, v in figures["settings"].items()]),
        "curve": _curve(figures["curve"]),
        "gate": _gate(figures["gate"]),
    }
    for name, table in tables.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = block.subn(lambda match, table=table: match[1] + table + match[2], text)
        assert count == 1, f"README.md has {count} blocks <!-- {name} -->"
    return text


def _parts(weights: Path) -> str:
    counts = dict.fromkeys(PARTS.values(), 0)
    with safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - an open file is no mapping
            if name.endswith("gaussian_matrix"):  # of SAM2's positions: drawn once, never trained
                continue
            part = next(words for prefix, words in PARTS.items() if name.startswith(prefix))
            counts[part] += math.prod(file.get_slice(name).get_shape())
    rows = [(part, f"{count:,}") for part, count in counts.items()]
    return _table(("part", "parameters"), [*rows, ("all", f"{sum(counts.values()):,}")])


def _curve(curve: list[dict]) -> str:
    """The rows where the gate was asked, with the mean training terms of the rows since the last one."""
    rows = []
    for row in (row for row in curve if "held_out" in row):
        recent = [other for other in curve if row["step"] - 1000 < other["step"] <= row["step"]]
        terms = [f"{sum(other[term] for other in recent) / len(recent):.3f}" for term in ("dice", "bce", "iou")]
        held_out = sum(row["held_out"].values()) / len(row["held_out"])
        rows.append((f"{row['step']:,}", f"{row['seconds']}", *terms, f"{held_out:.3f}"))
    return _table(("step", "s", "Dice loss", "BCE", "IoU", "held-out Dice, mean over phrases"), rows)


def _gate(gate: dict) -> str:
    rows = [(phrase, f"{dice:.2f}") for phrase, dice in gate["dice"].items()]
    rows += [("mean", f"{gate['mean_dice']:.2f}"), ("spread of logits across questions", f"{gate['spread']:.1f}")]
    return _table(("phrase", "Dice"), rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) + ("---:",) * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    chosen = Path(sys.argv[1])
    (chosen / "README.md").write_text(refresh(chosen), encoding="utf-8")
