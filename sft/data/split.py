"""Divides pairs into training and validation, so that what belongs together stays together; writes and reads the
division.

Takes pairs and settings; gives two tuples of pairs. Knows nothing of pixels: which images are equal it is told.

A group is never divided. It holds all samples of one image, all images of one patient (`group_pattern`), and images
with the same pixels (`together`). Groups are ordered by a hash of seed and name, so neither the file system's order
nor Python's version matters, and a new image moves few others.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from sft.config import UserError
from sft.data.read import Pair

NAMES_SHOWN = 5

Division = tuple[tuple[Pair, ...], tuple[Pair, ...]]


def split(
    pairs: Sequence[Pair],
    *,
    seed: int,
    val_fraction: float,
    group_pattern: str | None = None,
    folds: int = 0,
    fold: int = 0,
    val_list: str | Path | None = None,
    together: Iterable[Sequence[str]] = (),
) -> Division:
    """Divides the pairs, the same way for the same names and settings.

    What decides, in this order: `train/` and `val/` folders (`folds` and `val_list` contradict them), `val_list`,
    `folds`, `val_fraction`. Whatever decides, no group may end on both sides.

    Args:
        pairs: in any order, names unique.
        seed: any integer.
        val_fraction: share of samples for validation, above 0 and below 1; whole groups are taken as long as they fit.
        group_pattern: regular expression, searched in the image's file name without its ending; its first group, or
            the whole match, is the patient.
        folds: 0, or the number of parts (2 or more) of nearly equal size that the groups are dealt to.
        fold: which part validates, 0 to folds - 1.
        val_list: text file with the names of the validation images, one a line, with or without their ending; `#`
            starts a comment.
        together: names of pairs that must not be divided, as `Findings.duplicates` has them.

    Returns:
        Training and validation pairs, each sorted by name, neither empty.

    Raises:
        UserError: settings contradict each other, a name does not match, or a part would be empty or share a group.
    """
    ordered = sorted(pairs, key=lambda pair: pair.name)
    groups = _groups(ordered, group_pattern, together)
    if any(pair.split for pair in ordered):
        if folds or val_list:
            given = "folds" if folds else "val_list"
            raise UserError(
                f"{given} contradicts the train/ and val/ folders of the data set: drop {given},"
                " or put all images in one folder"
            )
        val = {pair.name for pair in ordered if pair.split == "val"}
        rule = "the train/ and val/ folders"
    elif val_list:
        if folds:
            raise UserError(f"val_list {val_list} and folds {folds} contradict each other: give one of them")
        val = _listed(ordered, Path(val_list))
        rule = f"val_list {val_list}"
    elif len(groups) < max(folds, 2):
        need = f"folds {folds} needs {folds}" if folds else "a split needs 2"
        raise UserError(
            f"{need} groups of images that may be parted, but there are {len(groups)} ({_few(groups)});"
            f" {_more(group_pattern)}"
        )
    elif folds:
        val = _dealt(groups, seed, folds, fold)
        rule = f"folds {folds}"
    else:
        val = _drawn(groups, seed, val_fraction)
        rule = f"val_fraction {val_fraction}"
    _refuse_shared(groups, val, rule)
    train, held_out = (tuple(pair for pair in ordered if (pair.name in val) == part) for part in (False, True))
    if not train or not held_out:
        raise UserError(
            f"{rule} leaves none of {len(ordered)} images for {'validation' if train else 'training'}; each needs one"
        )
    return train, held_out


def write_split(path: Path, train: Sequence[Pair], val: Sequence[Pair]) -> None:
    """Writes the names of both parts as JSON, complete or not at all."""
    text = json.dumps(
        {part: [pair.name for pair in pairs] for part, pairs in (("train", train), ("val", val))}, indent=1
    )
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_split(path: Path, pairs: Sequence[Pair]) -> Division:
    """Reads a division back and finds its pairs.

    Raises:
        UserError: the file is broken, or the data set has lost or gained pairs since it was written.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        parts = [list(content[part]) for part in ("train", "val")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is no split file ({type(error).__name__}: {error}); start a new run instead of resuming"
        ) from None
    known = {pair.name: pair for pair in pairs}
    recorded = {name for part in parts for name in part}
    for names, what in ((recorded - known.keys(), "lost"), (known.keys() - recorded, "gained")):
        if names:
            raise UserError(
                f"{path}: since this split was written the data set has {what} {_few(names)};"
                " undo that, or start a new run"
            )
    train, val = (tuple(known[name] for name in part) for part in parts)
    return train, val


def _groups(pairs: Sequence[Pair], pattern: str | None, together: Iterable[Sequence[str]]) -> dict[str, list[Pair]]:
    """Group name -> its pairs, where a group is what any chain of same image, same patient and same pixels connects."""
    leader = {pair.name: pair.name for pair in pairs}

    def root(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    patients = _patients(pairs, pattern)
    linked: dict[tuple[str, str], list[str]] = defaultdict(list)
    for pair in pairs:
        linked["image", str(pair.image)].append(pair.name)
        if patients:
            linked["patient", patients[pair.name]].append(pair.name)
    known_together = ([name for name in names if name in leader] for names in together)
    for names in (*linked.values(), *known_together):
        for name in names[1:]:
            first, second = sorted((root(names[0]), root(name)))
            leader[second] = first
    members: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        members[root(pair.name)].append(pair)
    return {min(patients[pair.name] for pair in group) if patients else name: group for name, group in members.items()}


def _patients(pairs: Sequence[Pair], pattern: str | None) -> dict[str, str]:
    """Pair name -> patient; empty without a pattern."""
    if not pattern:
        return {}
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"group_pattern {pattern!r} is no regular expression ({error}); an example is '(\\d+)[LR]'"
        ) from None
    patients, unmatched = {}, []
    for pair in pairs:
        match = expression.search(pair.image.stem)
        patient = match and match.group(1 if expression.groups else 0)
        if patient:
            patients[pair.name] = patient
        else:
            unmatched.append(pair.image.name)
    if unmatched:
        raise UserError(
            f"group_pattern {pattern!r} finds no patient in {len(unmatched)} of {len(pairs)} names: {_few(unmatched)};"
            " every name must match: widen the pattern"
        )
    return patients


def _listed(pairs: Sequence[Pair], path: Path) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"val_list {path}: cannot be read ({error}); give a text file with one name a line") from None
    aliases: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        for alias in (pair.name, pair.image.name, pair.image.stem):
            aliases[alias].add(pair.name)
    val: set[str] = set()
    unknown = []
    for line in lines:
        entry = line.partition("#")[0].strip()
        if entry in aliases:
            val |= aliases[entry]
        elif Path(entry).name in aliases:
            val |= aliases[Path(entry).name]
        elif entry:
            near = difflib.get_close_matches(entry, aliases, n=1) if len(unknown) < NAMES_SHOWN else []
            unknown.append(f"{entry} (nearest: {near[0]})" if near else entry)
    if unknown:
        raise UserError(
            f"val_list {path}: {len(unknown)} names are not in the data set: {_few(unknown)};"
            " give image names, one a line"
        )
    if not val:
        raise UserError(f"val_list {path}: names no image; give image names, one a line")
    return val


def _shuffled(groups: dict[str, list[Pair]], seed: int) -> list[str]:
    return sorted(groups, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())


def _dealt(groups: dict[str, list[Pair]], seed: int, folds: int, fold: int) -> set[str]:
    """The largest group first, each to the smallest part so far."""
    if folds < 2 or not 0 <= fold < folds:
        raise UserError(f"folds {folds} with fold {fold}: folds is 2 or more, fold is 0 to folds - 1")
    parts: list[list[Pair]] = [[] for _ in range(folds)]
    for name in sorted(_shuffled(groups, seed), key=lambda name: -len(groups[name])):
        min(parts, key=len).extend(groups[name])
    return {pair.name for pair in parts[fold]}


def _drawn(groups: dict[str, list[Pair]], seed: int, val_fraction: float) -> set[str]:
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction {val_fraction}: must be above 0 and below 1, for example 0.2")
    order = _shuffled(groups, seed)
    total = sum(map(len, groups.values()))
    target = min(max(1, int(val_fraction * total + 0.5)), total - 1)
    val: list[Pair] = []
    for name in order:
        if len(val) + len(groups[name]) <= target:
            val += groups[name]
    # No group fits when even the smallest is above the target.
    return {pair.name for pair in val or groups[min(order, key=lambda name: len(groups[name]))]}


def _refuse_shared(groups: dict[str, list[Pair]], val: set[str], rule: str) -> None:
    shared = [
        f"{train[0].image} and {held_out[0].image}"
        for group in groups.values()
        if (train := [pair for pair in group if pair.name not in val])
        and (held_out := [pair for pair in group if pair.name in val])
    ]
    if shared:
        raise UserError(
            f"{rule} puts the same image or patient on both sides ({len(shared)} found): {_few(shared)};"
            " move one of each to the other side"
        )


def _few(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:NAMES_SHOWN]) + (", ..." if len(listed) > NAMES_SHOWN else "")


def _more(pattern: str | None) -> str:
    return f"does group_pattern {pattern!r} catch the patient?" if pattern else "add images"
