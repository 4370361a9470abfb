"""report.html of a sweep: one page that opens anywhere, offline.

Takes the records of a sweep and its pictures as PNG, gives one page with everything inside it. Reads well without its
few lines of JavaScript, which sort the table of trials. All text from the sweep is escaped. Computes no score.
"""

import base64
import shlex
from collections.abc import Sequence
from html import escape
from typing import Any

from sft.report import format_duration
from sft.report.page import STYLE
from sft.settings import as_text
from tune.keeping import BEST, BEST_FILE
from tune.scales import MISSING, finite, shown
from tune.space import KINDS, SAME_SUM
from tune.tally import best_row, best_trial, counted, dice_of, repeat_of, repeats, rungs, saved, seed_trial, verdict
from tune.trials import Sweep, Trial

MORE_STYLE = """
body{max-width:1180px}.verdict{font-size:21px;font-weight:600;margin:18px 0 4px}
img{border:0}.pair{align-items:start}.wide{overflow-x:auto}
.wide table{font-size:13.5px}
.wide td,.wide th{padding:3px 12px 3px 0;white-space:nowrap;max-width:240px;overflow:hidden;
 text-overflow:ellipsis}
.wide th{white-space:normal;vertical-align:bottom}
.wide small{display:block;max-width:190px;overflow:hidden;text-overflow:ellipsis;color:#6a7078}
tr.best td{background:#e8f2fa}tr.seed td{background:#fdf0e6}
.sortable th{cursor:pointer}.sortable th[aria-sort=ascending]::after{content:" ▲"}
.sortable th[aria-sort=descending]::after{content:" ▼"}
h3{font-size:15px;margin:22px 0 6px}
pre{background:#f6f7f9;border-radius:4px;padding:10px 14px;overflow-x:auto;font-size:13px}
summary{cursor:pointer;margin:14px 0 6px}
"""
SORT = """
for (const table of document.querySelectorAll(".sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.onclick = () => {
    const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign < 0 ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.key ?? row.cells[column].textContent;
    const number = text => text === "" ? NaN : Number(text);
    body.append(...[...body.rows].sort((a, b) => {
      const x = key(a), y = key(b), difference = number(x) - number(y);
      if (!isNaN(difference)) return sign * difference;
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * x.localeCompare(y);
    }));
  });
}
"""
CAPTIONS = {
    "learning_curves": "Dice of each validated epoch. Stopped trials are faint and end where they were stopped.",
    "parallel_coordinates": (
        "One line per trial; darker is better. Lines through one choice are spread a little; a gap is a value that the "
        "trial's settings do not tell."
    ),
    "dice_against_cost": "The grey steps join the trials that no cheaper one beats.",
    "device_time": ("Saved is an estimate: the mean time of the trial's own epochs times those it did not run."),
}
"""Picture -> what stands below it."""
CHOSEN = (
    "The best trial is chosen by its Dice on the validation images, so that Dice is on the high side; repeats with "
    "other seeds and images that no trial has seen tell more."
)


def page(
    sweep: Sweep, trials: Sequence[Trial], pictures: dict[str, bytes], importance: str, folder: str = "SWEEP"
) -> str:
    """The page of a sweep; also of one that is still going on.

    Args:
        sweep: what was run.
        trials: by number.
        pictures: name -> PNG, as pictures.draw_all gives them.
        importance: the sentence that importance.measure gives; stands alone where the picture is missing.
        folder: the sweep's, for the commands that use its best trial.
    """
    sections = [
        _heading(sweep, trials),
        _best_settings(sweep, trials, folder),
        _repeats(trials),
        _pictures(pictures, importance) if best_trial(trials) else "",
        _trials(sweep, trials),
        _what_was_run(sweep),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(sweep.name)}</title><style>{STYLE}{MORE_STYLE}</style></head>\n"
        f"<body>{''.join(sections)}<script>{SORT}</script></body></html>\n"
    )


def _heading(sweep: Sweep, trials: Sequence[Trial]) -> str:
    searched = [trial for trial in trials if not trial.is_repeat]
    facts = [
        f"model {sweep.base.get('model_path')}",
        f"data {sweep.base.get('data_root')}",
        f"search {sweep.search}",
        f"{len(searched)} of {sweep.num_trials} trials: {counted(searched) or 'none yet'}",
        f"up to {sweep.num_epochs} epochs",
    ]
    return (
        f'<h1>{escape(sweep.name)}</h1><p class="faint">{escape(" · ".join(facts))}</p>'
        f'<p class="verdict">{escape(verdict(sweep, trials))}</p><p>{escape(saved(sweep, trials))}</p>'
    )


def _best_settings(sweep: Sweep, trials: Sequence[Trial], folder: str) -> str:
    best, seed = best_trial(trials), seed_trial(trials)
    if best is None:
        return ""
    lines = []
    for name in _names(sweep, best):
        before = sweep.base[name] if name in sweep.base else _param(seed, name)
        after = best.settings.get(name, sweep.base.get(name, _param(best, name)))
        changed = _text(after) if _text(before) == _text(after) else f"<b>{_text(after)}</b>"
        cells = f"<td class=number>{_text(before)}</td><td class=number>{changed}</td>"
        lines.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    head = f"<tr><th></th><th class=number>seed setting</th><th class=number>trial {best.number}</th></tr>"
    note = f'<p class="faint">What differs is bold. {CHOSEN}</p>'
    return f"<h2>Best settings</h2><table>{head}{''.join(lines)}</table>{note}{_how_to_use(folder)}"


def _how_to_use(folder: str) -> str:
    """What one does with the best settings."""
    command = f"python launch/train.py --config {shlex.quote(f'{folder}/{BEST_FILE}')}"
    adapter = f"<code>{escape(f'{folder}/{BEST}')}</code>"
    return (
        f"<p>Train with the best settings:</p><pre>{escape(command)}</pre>"
        f"<p>The adapter of the best trial that has ended, of its best epoch, lies in {adapter}.</p>"
    )


def _names(sweep: Sweep, best: Trial) -> list[str]:
    """Settings and parameters of the space, and whatever else the best trial sets."""
    names = [axis["name"] for axis in sweep.space["axes"]] + list(sweep.space["expressions"]) + list(best.settings)
    return list(dict.fromkeys(names))


def _param(trial: Trial | None, name: str) -> Any:
    return trial.params.get(name, MISSING) if trial else MISSING


def _repeats(trials: Sequence[Trial]) -> str:
    found, by_number = repeats(trials), {trial.number: trial for trial in trials}
    if not found:
        return ""
    lines = []
    for number, one in found.items():
        own = dice_of(by_number[number]) if number in by_number else None
        each = ", ".join(
            f"{shown(trial.settings['seed'])}: {_dice(dice_of(trial)) if trial.status == 'finished' else trial.status}"
            for trial in trials
            if repeat_of(trial) == number
        )
        cells = (_dice(own), _dice(one.mean), _dice(one.spread), escape(each))
        lines.append(f"<tr><td>{number}</td>{''.join(f'<td class=number>{cell}</td>' for cell in cells)}</tr>")
    heads = ("Dice of its own", "mean of the repeats", "standard deviation", "seed: Dice")
    head = f"<tr><th>trial</th>{''.join(f'<th class=number>{head}</th>' for head in heads)}</tr>"
    note = (
        '<p class="faint">The same settings with other seeds. A trial\'s own Dice, by which it was chosen, is not part '
        "of its mean.</p>"
    )
    return f"<h2>Repeats with other seeds</h2><table>{head}{''.join(lines)}</table>{note}"


def _pictures(pictures: dict[str, bytes], importance: str) -> str:
    part = {name: _picture(name, png) for name, png in pictures.items()}
    bars = f'<div>{part.get("importance", "")}<p class="faint">{escape(importance)}</p></div>'
    pair = f'<div class="pair">{bars}{part["dice_against_cost"]}</div>'
    return f"<h2>Pictures</h2>{part['learning_curves']}{part['parallel_coordinates']}{pair}{part['device_time']}"


def _picture(name: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    caption = f'<p class="faint">{escape(CAPTIONS[name])}</p>' if name in CAPTIONS else ""
    return f'<div><img alt="{escape(name.replace("_", " "))}" src="data:image/png;base64,{data}">{caption}</div>'


def _trials(sweep: Sweep, trials: Sequence[Trial]) -> str:
    searched, repeated = ([trial for trial in trials if trial.is_repeat is kind] for kind in (False, True))
    note = (
        '<p class="faint">Best first; a click on a heading sorts. Blue: the best trial; orange: the seed setting. '
        "Dice is that of the trial's best epoch, at the threshold of the settings; Dice_best is of the same epoch, at "
        "the threshold that suits it best. The same figures, with every setting, stand in trials.csv.</p>"
    )
    failed = "".join(
        f"<tr><td>{trial.number}</td><td>{escape(trial.reason)}</td></tr>"
        for trial in trials
        if trial.status == "failed"
    )
    reasons = (
        f"<h3>Why trials failed</h3><table><tr><th>trial</th><th>reason</th></tr>{failed}</table>" if failed else ""
    )
    apart = f"<h3>Repeats</h3>{_table(sweep, repeated, trials)}" if repeated else ""
    return f"<h2>All trials</h2>{note}{_table(sweep, searched, trials)}{apart}{reasons}"


def _table(sweep: Sweep, shown: Sequence[Trial], trials: Sequence[Trial]) -> str:
    best, seed = best_trial(trials), seed_trial(trials)
    names = [axis["name"] for axis in sweep.space["axes"]]
    heads = [
        "trial",
        "status",
        "epochs",
        "Dice",
        "at epoch",
        "Dice_best",
        "at threshold",
        "device time",
        *names,
        "origin",
    ]
    lines = []
    for trial in sorted(shown, key=lambda trial: (-(dice_of(trial) or -1.0), trial.number)):
        css = " class=best" if trial is best else " class=seed" if trial is seed else ""
        lines.append(f"<tr{css}>{''.join(_cells(trial, names))}</tr>")
    head = "".join(f"<th>{escape(head).replace('_', '_<wbr>')}</th>" for head in heads)
    return (
        f'<div class="wide"><table class=sortable><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cells(trial: Trial, names: Sequence[str]) -> list[str]:
    """A trial's line; data-key is what the table sorts by."""
    row = best_row(trial) or {}
    reason = f'<small title="{escape(trial.reason)}">{escape(trial.reason)}</small>' if trial.reason else ""
    cells = [
        _cell(trial.number, str(trial.number)),
        f"<td>{escape(trial.status)}{reason}</td>",
        _cell(trial.epoch, str(trial.epoch)),
        _cell(dice_of(trial), _dice(dice_of(trial))),
        _cell(row.get("epoch"), _text(row.get("epoch", MISSING))),
        _cell(row.get("dice_best"), _dice(row.get("dice_best"))),
        _cell(row.get("threshold_best"), _text(row.get("threshold_best", MISSING))),
        _cell(trial.device_s, format_duration(trial.device_s) if trial.device_s else "–"),
    ]
    params = [trial.params.get(name, MISSING) for name in names]
    return [*cells, *(_cell(value, _text(value)) for value in params), f"<td>{escape(trial.origin)}</td>"]


def _cell(key: Any, text: str) -> str:
    if text == "–":
        return '<td data-key="">–</td>'
    return f"<td>{text}</td>" if finite(key) is None else f'<td data-key="{finite(key)!r}">{text}</td>'


def _what_was_run(sweep: Sweep) -> str:
    stops = (
        f"ASHA on the best validation Dice so far: at epochs {', '.join(map(str, rungs(sweep)))} the best "
        f"1/{sweep.reduction} go on (grace {sweep.grace_epochs} epochs, reduction {sweep.reduction})"
        if rungs(sweep)
        else f"none before the last epoch (grace {sweep.grace_epochs} epochs)"
        if sweep.early_stop
        else "off"
    )
    facts = {
        "command": shlex.join(sweep.command),
        "started": sweep.started,
        "search": f"{sweep.search}, seed {sweep.seed}, {sweep.num_trials} trials",
        "early stopping": stops,
        "GPUs of one trial": shown(sweep.gpus_per_trial) if sweep.gpus_per_trial else "none, on CPUs",
        "versions": ", ".join(f"{name} {version}" for name, version in sweep.versions.items()),
    }
    lines = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in facts.items())
    settings = "".join(
        f"<div><span>{escape(name)}</span><span>{_text(value)}</span></div>" for name, value in sweep.base.items()
    )
    return (
        f"<h2>What was run</h2><table>{lines}</table>"
        f"<h2>The space</h2><pre>{escape(_space(sweep))}</pre>"
        f"<details><summary>The seed setting, whole</summary><div class=settings>{settings}</div></details>"
    )


def _space(sweep: Sweep) -> str:
    """The space as its YAML would say it."""
    lines = [f"{axis['name']}: {{{axis['kind']}: {_yaml(axis['values'])}}}" for axis in sweep.space["axes"]]
    lines += [f"{name}: {{{KINDS[-1]}: {text}}}" for name, text in sweep.space["expressions"].items()]
    lines += [f"{SAME_SUM}: {_yaml(sweep.space['same_sum'])}"] if sweep.space["same_sum"] else []
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return as_text(value) if isinstance(value, str) else shown(value)


def _dice(value: Any) -> str:
    return "–" if (number := finite(value)) is None else f"{number:.4f}"


def _text(value: Any) -> str:
    return escape(shown(value))
