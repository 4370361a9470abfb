"""report.html: one page about one run that opens anywhere, offline.

Takes the run's settings, its rows (the content of training_log.json), the names of the validation images and the
comparison picture; gives one file with everything inside it. Computes no score: every figure stands in the rows.
"""

import base64
import html
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from sft.config import TrainConfig
from sft.report import format_duration
from sft.report.charts import line_chart

STYLE = """
body{font:15px/1.5 system-ui,"Segoe UI",Roboto,"Noto Sans","Noto Sans CJK SC",sans-serif;color:#20242a;background:#fff;
 max-width:1100px;margin:32px auto;padding:0 20px}
h1{font-size:24px;margin:0}h2{font-size:17px;margin:36px 0 10px;border-bottom:1px solid #e3e6ea;padding-bottom:4px}
p{margin:6px 0}.faint{color:#6a7078}.cards{display:flex;gap:14px;flex-wrap:wrap;margin:22px 0 8px}
.card{flex:1 1 240px;border:1px solid #e3e6ea;border-radius:8px;padding:12px 16px}
.card b{font-size:25px;font-weight:600}
.card .gain{font-size:17px;margin-left:8px}.up{color:#2b8a3e}.down{color:#c92a2a}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:24px}
svg{width:100%;height:auto;font-size:12px}svg text{fill:#6a7078}
svg .title{fill:#20242a;font-weight:600;font-size:13px}
svg .grid{stroke:#eceef1}svg .line{fill:none;stroke-width:1.8;stroke-linejoin:round}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:3px 14px 3px 0;text-align:left;vertical-align:top}
th{font-weight:600;border-bottom:1px solid #cfd4da}td{border-bottom:1px solid #f0f2f4}.number{text-align:right}
.track{width:220px;background:#eef1f4;margin-top:7px}.track div{background:#1f6feb;height:9px}
.settings{columns:2;column-gap:40px;font-size:14px}
.settings div{break-inside:avoid;display:flex;gap:10px;border-bottom:1px solid #f0f2f4;padding:2px 0}
.settings span{overflow-wrap:anywhere;min-width:0}.settings span:first-child{flex:0 0 48%;color:#6a7078}
.changed span:last-child{font-weight:600}
img{width:100%;border:1px solid #e3e6ea;border-radius:4px}
@media(max-width:700px){.settings{columns:1}.pair{grid-template-columns:1fr}}
"""
SCORES = {
    "dice": "Dice",
    "iou": "IoU",
    "recall": "recall",
    "precision": "precision",
    "dice_best": "Dice at the best threshold",
    "threshold_best": "the best threshold",
    "seg_rate": "seg_rate",
}
"""Rows of the table of scores: key of a val row -> how it is called."""


def write_html(
    path: Path,
    name: str,
    config: dict,
    rows: Sequence[dict],
    image_names: Sequence[str] = (),
    picture: Path | None = None,
) -> None:
    """Write the page of a run; also of one that is still going on, or that ended early.

    Args:
        path: the .html file, replaced in one go.
        name: the run's name, the title.
        config: what config.json holds: TrainConfig's fields and, in any depth, anything else worth showing.
        rows: of training_log.json.
        image_names: of the validation images, in the order of dice_per_image; without them the images are numbered.
        picture: the comparison picture, taken into the page.
    """
    validations = [row for row in rows if row["kind"] == "val" and row["dice"] is not None]
    base = next((row for row in validations if row["epoch"] == 0), None)
    best = max((row for row in validations if row["epoch"] > 0), key=lambda row: row["dice"], default=None)
    sections = [
        _heading(name, config, rows, best),
        _headline(config, base, best),
        _validation(config, rows, base, best),
        _training(config, rows),
        _picture(picture),
        _images(base, best, image_names),
        _settings(config),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(name)}</title><style>{STYLE}</style></head>\n<body>{''.join(sections)}</body></html>\n"
    )
    partial = Path(path).with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)


def _heading(name: str, config: dict, rows: Sequence[dict], best: dict | None) -> str:
    epochs = max((row["epoch"] for row in rows if row["kind"] != "step"), default=0)
    facts = [
        f"model {config.get('model_path')}",
        f"data {config.get('data_root')}",
        f"LoRA rank {config.get('lora_rank')}, alpha {config.get('lora_alpha')}",
        f"{epochs} of {config.get('num_epochs')} epochs",
    ]
    if best is not None:
        facts.append(f"best epoch {best['epoch']}, {len(best['dice_per_image'])} validation images")
    return f'<h1>{html.escape(name)}</h1><p class="faint">{html.escape(" · ".join(facts))}</p>'


def _headline(config: dict, base: dict | None, best: dict | None) -> str:
    before, after, threshold = base or {}, best or {}, config.get("threshold", 0.5)
    cards = (
        (f"Dice at {threshold:g}", before.get("dice"), after.get("dice")),
        ("Dice, each at its best threshold", before.get("dice_best"), after.get("dice_best")),
        (f"Base at its best threshold, tuned at {threshold:g}", before.get("dice_best"), after.get("dice")),
    )
    boxes = [
        f"<div class=card>{label}<br><b>{_number(old)} → {_number(new)}</b>{_gain(old, new)}</div>"
        for label, old, new in cards
    ]
    return f'<div class="cards">{"".join(boxes)}</div>'


def _validation(config: dict, rows: Sequence[dict], base: dict | None, best: dict | None) -> str:
    validations = [row for row in rows if row["kind"] == "val"]
    if not validations:
        return "<h2>Validation</h2><p>None has been run yet.</p>"
    scores = {
        f"at {config.get('threshold', 0.5):g}": [(row["step"], row["dice"]) for row in validations],
        "at the best threshold": [(row["step"], row["dice_best"]) for row in validations],
    }
    before, after = base or {}, best or {}
    lines = [
        f"<tr><td>{shown}</td><td class=number>{_number(before.get(key))}</td>"
        f"<td class=number>{_number(after.get(key))}</td></tr>"
        for key, shown in SCORES.items()
        if before.get(key) is not None or after.get(key) is not None
    ]
    head = "<tr><th></th><th class=number>base</th><th class=number>tuned</th></tr>"
    chart = line_chart("Validation Dice", scores, "optimizer step")
    return f'<h2>Validation</h2><div class="pair">{chart}<div><table>{head}{"".join(lines)}</table></div></div>'


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _gain(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    return f'<span class="gain {"up" if after >= before else "down"}">{after - before:+.3f}</span>'


def _training(config: dict, rows: Sequence[dict]) -> str:
    steps = [row for row in rows if row["kind"] == "step"]
    if len(steps) < 2:
        steps = [row for row in rows if row["kind"] == "train"]
    losses = {"loss": [(row["step"], row["loss"]) for row in steps]}
    for name in ("dice", "focal", "bce", "text"):
        weight = config.get(f"{name}_weight") or 0
        losses[name] = [(row["step"], weight * row[name]) for row in steps if row.get(name) is not None]
    rates = {"": [(row["step"], row["lr"]) for row in steps]}
    loss_chart = line_chart("Loss and its weighted terms", losses, "optimizer step", log_y=True)
    rate_chart = line_chart("Learning rate", rates, "optimizer step")
    return f'<h2>Training</h2>{_speed(rows)}<div class="pair">{loss_chart}{rate_chart}</div>'


def _speed(rows: Sequence[dict]) -> str:
    epochs = [row for row in rows if row["kind"] == "train"]
    if not epochs:
        return ""
    last = epochs[-1]
    text = f"{last['samples_per_s']:.1f} samples/s, {1000 * last['step_s']:.0f} ms a step"
    text += f", GPU memory {last['gpu_gib']:.1f} GiB" if last.get("gpu_gib") is not None else ""
    text += f"; {format_duration(last['eta_s'])} to go" if last["eta_s"] else ""
    return f'<p class="faint">{text}</p>'


def _picture(picture: Path | None) -> str:
    if picture is None:
        return ""
    data = base64.b64encode(Path(picture).read_bytes()).decode()
    return f'<h2>Pictures</h2><img alt="image, truth, base and tuned side by side" src="data:image/png;base64,{data}">'


def _images(base: dict | None, best: dict | None, image_names: Sequence[str]) -> str:
    if best is None:
        return ""
    afters = best["dice_per_image"]
    befores = base["dice_per_image"] if base else [None] * len(afters)
    names = image_names or [f"image {number}" for number in range(1, len(afters) + 1)]
    lines = [
        f"<tr><td>{html.escape(name)}</td><td class=number>{_number(before)}</td><td class=number>{_number(after)}</td>"
        f"<td class=number>{_gain(before, after)}</td>"
        f'<td><div class=track><div style="width:{after:.1%}"></div></div></td></tr>'
        for after, before, name in sorted(zip(afters, befores, names, strict=True), key=lambda line: line[0])
    ]
    head = "<th>image</th><th class=number>base</th><th class=number>tuned</th><th class=number>change</th><th></th>"
    return f"<h2>Dice per image, worst first</h2><table><tr>{head}</tr>{''.join(lines)}</table>"


def _settings(config: dict) -> str:
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    lines = []
    for name, value in _flatten(config):
        changed = name in defaults and _plain(value) != _plain(defaults[name])
        lines.append(
            f"<div{' class=changed' if changed else ''}><span>{html.escape(name)}</span>"
            f"<span>{html.escape(_plain(value))}</span></div>"
        )
    note = '<p class="faint">What differs from the defaults is bold.</p>'
    return f'<h2>Settings</h2>{note}<div class="settings">{"".join(lines)}</div>'


def _flatten(config: dict, prefix: str = "") -> list[tuple[str, object]]:
    lines = []
    for name, value in config.items():
        lines += _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return lines


def _plain(value: object) -> str:
    """A tuple and the list that JSON made of it read the same."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
