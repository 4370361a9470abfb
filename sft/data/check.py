"""Checks a data set's pairs before training: decodes every file once, and compares the pairs with one another.

Takes pairs; gives errors, warnings, a summary, and which images are the same. Knows nothing of folders' layouts or of
how to split.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sft.config import UserError
from sft.data.read import Pair, assemble, decode_mask, open_image
from sft.ranks import processors

FRACTION_HIGH = 0.5
"""Share of the frame beyond which a mask is no vessel tree: it is inverted, or marks the field of view."""


class Summary(NamedTuple):
    """What was read: samples, sizes (width, height) -> samples, vessel share of a frame (0 to 1, over samples)."""

    count: int
    sizes: dict[tuple[int, int], int]
    fraction_mean: float
    fraction_min: float
    fraction_max: float


@dataclass(frozen=True)
class Findings:
    """What the check found; every line of `errors` and `warnings` names its file."""

    errors: list[str]
    warnings: list[str]
    summary: Summary
    duplicates: list[tuple[str, ...]]
    """Names of pairs whose images have the same pixels: `split` keeps them on one side."""
    sizes_hw: dict[str, tuple[int, int]]
    """Height and width (pixels) of each pair that could be read, by name."""


def check(
    pairs: Sequence[Pair], *, workers: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Findings:
    """Decodes every image and mask in a pool of threads and compares the pairs.

    Errors: missing or broken files, sizes that differ, masks that are not binary, one image in both split folders.
    Warnings: empty or mostly full masks, JPEG masks, unclear EXIF turns, polygons with holes or beyond the frame,
    duplicates, masks that occur twice, foreground values or bit depths that differ between files.

    Args:
        pairs: with unique names.
        workers: threads; None takes the processors this process may use (Pillow decodes without the interpreter lock).
        progress: called with (done, all) after each pair, from the calling thread.

    Returns:
        The findings, in the order of the pairs, those about several files first.
    """
    facts: list[_Facts] = []
    pool = ThreadPoolExecutor(workers or processors())
    try:
        for done, result in enumerate(pool.map(_look, pairs), start=1):
            facts.append(result)
            if progress is not None:
                progress(done, len(pairs))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for a thousand files
    duplicates, errors, warnings = _same_images(facts)
    warnings += _same_masks(facts) + _mixed(facts, "foreground") + _mixed(facts, "bits")
    for result in facts:
        errors += result.errors
        warnings += result.warnings
    # Samples of one image repeat what is wrong with it.
    sizes_hw = {result.pair.name: result.size[::-1] for result in facts if result.size is not None}
    return Findings(list(dict.fromkeys(errors)), list(dict.fromkeys(warnings)), _summary(facts), duplicates, sizes_hw)


def brief(messages: Sequence[str], per_kind: int = 3) -> list[str]:
    """Shortens a list of findings: the first of each kind, then how many more there are of it.

    Args:
        messages: lines `file: what is wrong ...`; a kind is the start of what is wrong, up to a digit or a mark.
        per_kind: at least 1.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for message in messages:
        kinds[re.split(r"[\d(;,'\[/]", message.partition(": ")[2])[0].strip()].append(message)
    lines = []
    for group in kinds.values():
        lines += group[:per_kind]
        if len(group) > per_kind:
            lines.append(f"... and {len(group) - per_kind:,} more like it")
    return lines


@dataclass(frozen=True)
class _Facts:
    """What one pair's files said; `size` is None if they could not be read."""

    pair: Pair
    errors: list[str]
    warnings: list[str]
    size: tuple[int, int] | None = None
    fraction: float = 0.0
    image_digest: bytes = b""
    mask_digest: bytes = b""
    foreground: str = ""
    bits: int = 8


def _look(pair: Pair) -> _Facts:
    errors: list[str] = []
    mask = None
    if pair.mask is not None:
        try:
            mask = decode_mask(pair.mask)
        except UserError as error:
            errors.append(str(error))
    try:
        image = open_image(pair.image)
        if errors:
            return _Facts(pair, errors, [])
        decoded = assemble(pair, image, mask)
    except UserError as error:
        return _Facts(pair, [*errors, str(error)], [])
    height, width = decoded.mask_HW.shape
    fraction = float(decoded.mask_HW.mean())
    return _Facts(
        pair,
        errors,
        decoded.remarks + _remarks_on(fraction, _mask_of(pair)),
        (width, height),
        fraction,
        _digest(decoded.image_HW3),
        _digest(np.packbits(decoded.mask_HW), decoded.mask_HW.shape),
        "" if mask is None else mask.foreground,
        decoded.bits,
    )


def _remarks_on(fraction: float, where: str) -> list[str]:
    if fraction == 0:
        return [f"{where}: empty mask; right only if the image shows no vessel"]
    if fraction > FRACTION_HIGH:
        return [
            f"{where}: more than half of the frame is marked ({fraction:.0%}); is it inverted, or the field of view?"
        ]
    return []


def _mask_of(pair: Pair) -> str:
    return f"{pair.image} ({pair.phrase or pair.name})" if pair.mask is None else str(pair.mask)


def _digest(array: np.ndarray, shape: tuple[int, ...] | None = None) -> bytes:
    digest = hashlib.blake2b(repr(shape or array.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array))
    return digest.digest()


def _same_images(facts: list[_Facts]) -> tuple[list[tuple[str, ...]], list[str], list[str]]:
    """Groups of names with equal pixels, errors for groups in both split folders, warnings for the others."""
    groups: dict[bytes, list[_Facts]] = defaultdict(list)
    for result in facts:
        if result.image_digest:
            groups[result.image_digest].append(result)
    duplicates, errors, warnings = [], [], []
    for group in groups.values():
        files = list(dict.fromkeys(result.pair.image for result in group))
        if len(files) < 2:
            continue
        duplicates.append(tuple(result.pair.name for result in group))
        first, others = files[0], ", ".join(map(str, files[1:]))
        if len({result.pair.split for result in group}) > 1:
            errors.append(f"{first}: the same image is in both splits: {others}; remove it from one of them")
            continue
        differ = len({(result.pair.phrase, result.mask_digest) for result in group}) > len(
            {result.pair.phrase for result in group}
        )
        masks = "their masks differ: keep the right one" if differ else "the split keeps them together"
        warnings.append(f"{first}: same pixels as {others}; {masks}")
    return duplicates, errors, warnings


def _same_masks(facts: list[_Facts]) -> list[str]:
    """A mask that is not empty and belongs to two different images is most often paired wrongly once."""
    groups: dict[bytes, list[_Facts]] = defaultdict(list)
    for result in facts:
        if result.size is not None and result.fraction > 0:
            groups[result.mask_digest].append(result)
    warnings = []
    for group in groups.values():
        if len({result.image_digest for result in group}) > 1:
            others = ", ".join(dict.fromkeys(_mask_of(result.pair) for result in group[1:]))
            warnings.append(
                f"{_mask_of(group[0].pair)}: same mask as {others}, but the images differ; is the pairing right?"
            )
    return warnings


def _mixed(facts: list[_Facts], field: str) -> list[str]:
    """Warns if files disagree on the value that means vessel, or on the bits their brightness is scaled from."""
    counts = Counter(getattr(result, field) for result in facts if result.size is not None and getattr(result, field))
    if len(counts) < 2:
        return []
    rare = min(counts, key=lambda value: (counts[value], str(value)))
    example = next(result for result in facts if getattr(result, field) == rare)
    listed = ", ".join(f"{value} in {count:,}" for value, count in counts.most_common())
    if field == "foreground":
        file, what, ask = example.pair.mask, "masks use different foreground values", "do they all mean vessel?"
    else:
        file, what, ask = example.pair.image, "images use different bit depths", "is their brightness comparable?"
    return [f"{file}: {what} ({listed} files; {rare} here); {ask}"]


def _summary(facts: list[_Facts]) -> Summary:
    read = [result for result in facts if result.size is not None]
    fractions = [result.fraction for result in read] or [0.0]
    sizes = dict(Counter(result.size for result in read).most_common())
    return Summary(len(read), sizes, sum(fractions) / len(fractions), min(fractions), max(fractions))
