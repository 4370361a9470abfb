"""Protects how many processors a process counts as its own: what it is bound to, and what a container lets it use."""

import math
import os

import pytest

from sft import ranks


@pytest.mark.parametrize(("bound", "granted", "own"), [(8, math.inf, 8), (8, 2.0, 2), (8, 2.5, 3), (2, 64.0, 2)])
def test_processors_are_those_it_is_bound_to_and_no_more_than_the_quota(monkeypatch, bound, granted, own):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(bound)), raising=False)
    monkeypatch.setattr(ranks, "_granted_processors", lambda: granted)
    assert ranks.processors() == own


GROUPS_OF_VERSION_1 = "7:memory:/pods\n4:cpu,cpuacct:/pods/mine\n3:cpuset:/\n0::/elsewhere\n"


@pytest.mark.parametrize(
    ("own", "files", "granted"),
    [
        ("0::/\n", {}, math.inf),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
        ("0::/pod/mine\n", {"pod/cpu.max": "300000 100000\n", "pod/mine/cpu.max": "max 100000\n"}, 3),
        ("0::/pod/mine\n", {"pod/cpu.max": "300000 100000\n", "pod/mine/cpu.max": "100000 50000\n"}, 2),
        ("0::/as/the/host/says\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/mine\n", {"others/cpu.max": "100000 100000\n"}, math.inf),
        (GROUPS_OF_VERSION_1, {}, math.inf),
        (GROUPS_OF_VERSION_1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        (GROUPS_OF_VERSION_1, {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        (
            GROUPS_OF_VERSION_1,
            {"cpu/pods/mine/cpu.cfs_quota_us": "200000\n", "cpu/pods/mine/cpu.cfs_period_us": "100000\n"},
            2,
        ),
    ],
)
def test_the_tightest_quota_among_the_groups_of_a_process_counts(tmp_path, own, files, granted):
    mounted, names = tmp_path / "mounted", tmp_path / "own"
    names.write_text(own)
    for name, text in files.items():
        (mounted / name).parent.mkdir(parents=True, exist_ok=True)
        (mounted / name).write_text(text)
    assert ranks._granted_processors(mounted, names) == granted


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert ranks._granted_processors(tmp_path, tmp_path / "none") == math.inf
