"""What a sweep leaves: the best adapter, trials.csv, report.html and pictures/, brought up to date when a trial ends.

Takes the records of trials.py and makes what is to be read from them anew. Knows nothing of Ray. What is heavy,
matplotlib and scikit-learn, is imported when something is written.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft.settings import as_text
from tune import keeping
from tune import space as spaces
from tune.scales import MISSING, finite
from tune.tally import Repeats, best_row, dice_of, repeat_of, repeats, verdict
from tune.trials import Sweep, Trial, write_whole

CSV_FILE, HTML_FILE, PICTURES = "trials.csv", "report.html", "pictures"
SCORES = ("dice_best", "threshold_best", "iou", "recall", "precision", "seg_rate")
"""Of the epoch of the best Dice; a score that was not taken stays empty."""


def update(folder: Path, sweep: Sweep, trials: Sequence[Trial], live: Sequence[int]) -> None:
    """Brings all that a sweep leaves up to date, the best adapter first: that makes room on a disk.

    Args:
        folder: the sweep's.
        sweep: what is run.
        trials: by number.
        live: numbers of those that run.
    """
    keeping.keep_best(folder, trials, live)
    keeping.write_best(folder, sweep, trials, live)
    write(folder, sweep, trials)


def write(folder: Path, sweep: Sweep, trials: Sequence[Trial]) -> str:
    """Writes all results of a sweep as it stands; a reader finds each file whole, the old one or the new.

    Args:
        folder: the sweep's.
        sweep: what is run.
        trials: by number.

    Returns:
        The verdict, one line.
    """
    from tune import importance, page, pictures  # seconds, which a sweep's --help need not take

    space = spaces.from_record(sweep.space)
    found, sentence = importance.measure(space, trials)
    pngs = pictures.draw_all(sweep, space, trials, found, sentence)
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    for name, png in pngs.items():
        write_whole(folder / PICTURES / f"{name}.png", png)
    write_whole(folder / CSV_FILE, trials_csv(sweep, trials).encode())
    if found is None:
        del pngs["importance"]  # the page says why in words
    write_whole(folder / HTML_FILE, page.page(sweep, trials, pngs, sentence, str(folder)).encode())
    return verdict(sweep, trials)


def trials_csv(sweep: Sweep, trials: Sequence[Trial]) -> str:
    """A table with a line per trial; a figure that is not known is empty.

    Columns: number, origin, status, reason, epochs, dice, best_epoch and the scores of that epoch, device_s; repeat_of
    with the number that a repeat repeats; repeats_dice, repeats_spread and repeats_count of a repeated trial;
    params.NAME for each axis of the space; settings.NAME for each setting in which any trial differs from the seed
    setting, whose value stands where a trial does not.
    """
    params = [axis["name"] for axis in sweep.space["axes"]]
    params += sorted({name for trial in trials for name in trial.params} - set(params))
    settings = list(dict.fromkeys(name for trial in trials for name in trial.settings))
    repeated, file = repeats(trials), io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    lines = []
    for trial in trials:
        line = _figures(trial) | {"repeat_of": repeat_of(trial)} | _repeats(repeated.get(trial.number))
        line = {name: MISSING if value is None else value for name, value in line.items()}
        line |= {f"params.{name}": trial.params.get(name, MISSING) for name in params}
        line |= {f"settings.{name}": trial.settings.get(name, sweep.base.get(name, MISSING)) for name in settings}
        lines.append(line)
    writer.writerow(lines[0] if lines else ["number"])
    writer.writerows([_csv_text(value) for value in line.values()] for line in lines)
    return file.getvalue()


def _figures(trial: Trial) -> dict[str, Any]:
    row = best_row(trial) or {}
    return {
        "number": trial.number,
        "origin": trial.origin,
        "status": trial.status,
        "reason": trial.reason,
        "epochs": trial.epoch,
        "dice": dice_of(trial),
        "best_epoch": row.get("epoch"),
        **{name: row.get(name) for name in SCORES},
        "device_s": trial.device_s,
    }


def _repeats(found: Repeats | None) -> dict[str, Any]:
    mean, spread, count = (found.mean, found.spread, len(found.dices)) if found else (None, None, None)
    return {"repeats_dice": mean, "repeats_spread": spread, "repeats_count": count}


def _csv_text(value: Any) -> str:
    if value is MISSING or (isinstance(value, float) and finite(value) is None):
        return ""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return as_text(value) if value is None or isinstance(value, bool) else str(value)
