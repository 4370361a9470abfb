"""What follows when one of Ray's trials ends or fails: what is noted, kept and written, and how often."""

import io
import json
import shutil
from types import SimpleNamespace

import pytest
import small_sweeps as small

from tune import keeping, results, trials
from tune import watch as watching
from tune.driver import Queue
from tune.progress import LiveTable
from tune.trial_run import CRASH_FILE
from tune.watch import Watch


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """Over two trials, of which 1 has begun; the report is not drawn."""
    monkeypatch.setattr(results, "write", lambda *_: None)
    trials.write_sweep(tmp_path, small.sweep())
    for one in (small.trial(0, [0.5]), small.trial(1, status="unfinished")):
        small.put(tmp_path, one)
    queue = Queue(tmp_path, trials.read_all(tmp_path)[1:], None, {}, None, 2)
    assert queue.suggest("id1") == {"number": 1}
    made = Watch(tmp_path, LiveTable(small.sweep(), 2, io.StringIO()), None, queue)
    made.on_trial_start(0, [], small.of_ray(1))
    return made


def test_a_trial_that_crashes_for_good_is_noted_with_its_reason_and_its_time(tmp_path, watch, monkeypatch):
    crash = trials.folder_of(tmp_path, 1) / CRASH_FILE
    crash.write_text("Traceback\n  File\nRuntimeError: first\nTraceback\nRuntimeError: a worm\n\n")
    begun_s = watch._since_s["id1"]
    monkeypatch.setattr(watching.time, "monotonic", lambda: begun_s + 42.0)
    watch.on_trial_start(0, [], small.of_ray(1))  # a further attempt
    watch.on_trial_error(0, [], small.of_ray(1))
    found = trials.read(crash.parent)
    assert (found.status, found.reason) == ("failed", "crashed 3 times: RuntimeError: a worm")
    assert found.device_s == pytest.approx(42.0)
    watch.on_trial_error(0, [], small.of_ray(1))
    assert trials.read(crash.parent) == found  # what is noted stays


@pytest.mark.parametrize("crash", [None, "", "\n"])
def test_a_process_that_died_without_a_word_is_noted_so(tmp_path, watch, crash):
    folder = trials.folder_of(tmp_path, 1)
    if crash is not None:
        (folder / CRASH_FILE).write_text(crash)
    watch.on_trial_error(0, [], small.of_ray(1))
    assert trials.read(folder).reason == "crashed 3 times: its process died"


def test_when_a_trial_ends_the_search_hears_of_it_and_the_best_is_written(tmp_path, watch, monkeypatch):
    heard = []
    watch._suggestions = SimpleNamespace(told=heard.append)
    folder = trials.folder_of(tmp_path, 1)
    for row in small.rows([0.7]):
        trials.append_row(folder, row)
    trials.write_outcome(folder, "stopped", "behind")
    (folder / "ray").mkdir()
    freed = []
    monkeypatch.setattr(watching, "free_ranks", freed.append)
    watch.on_trial_complete(0, [], small.of_ray(1))
    assert freed == [folder]
    assert heard == [trials.read(folder)] and not (folder / "ray").exists()
    assert (tmp_path / keeping.BEST_FILE).read_text().startswith("# Trial 1 of sweep_1: validation Dice 0.7000")
    assert json.loads((folder / "outcome.json").read_text())["status"] == "stopped"


@pytest.mark.parametrize(("dice", "best"), [(0.7, 1), (0.4, None)])
def test_a_trial_that_waits_is_written_where_it_is_the_best_so_far(tmp_path, watch, dice, best):
    trials.append_row(trials.folder_of(tmp_path, 1), small.rows([dice])[0])
    watch.on_trial_complete(0, [], small.of_ray(1))
    written = tmp_path / keeping.BEST_FILE
    assert written.exists() == (best is not None)
    assert best is None or written.read_text().startswith(f"# Trial {best} of sweep_1: validation Dice 0.7000")


@pytest.mark.parametrize("waits", [True, False])
def test_a_trial_that_waits_is_told_of_and_one_that_is_interrupted_is_not(watch, monkeypatch, waits):
    told = []
    monkeypatch.setattr(watch._queue, "waits", lambda number: waits and number == 1)
    monkeypatch.setattr(watch._shown, "waits", lambda trial: told.append(trial.number))
    watch.on_trial_complete(0, [], small.of_ray(1))
    assert told == [1] * waits


COPY_ERROR = shutil.Error([("a/adapter", "b/adapter", "[Errno 28] No space left on device")] * 2)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError("no more"), "MemoryError: no more"),  # Ray would run the trial again
        (COPY_ERROR, "b/adapter: [Errno 28] No space left on device"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),  # a write names no file
        (OSError(13, "Permission denied", "b/best.yaml"), "b/best.yaml: Permission denied"),
    ],
)
def test_what_cannot_be_written_when_a_trial_ends_is_told_in_words(tmp_path, watch, monkeypatch, capsys, error, told):
    def full(*_):
        raise error

    monkeypatch.setattr(keeping, "keep_best", full)
    trials.write_outcome(trials.folder_of(tmp_path, 1), "failed", "a reason")
    watch.on_trial_complete(0, [], small.of_ray(1))
    assert capsys.readouterr().out == f"warning: {told}; the results are of before trial 1\n"


def test_a_trial_that_lacked_room_on_a_disk_goes_on_later(tmp_path, watch, capsys):
    folder = trials.folder_of(tmp_path, 1)
    (folder / CRASH_FILE).write_text("Traceback\nsft.settings.DiskError: checkpoint_latest: No space left; free some\n")
    watch.on_trial_error(0, [], small.of_ray(1))
    assert trials.read(folder).status == "unfinished"
    assert "warning: trial 1 has not ended: checkpoint_latest: No space left; free some" in capsys.readouterr().out


# The results


@pytest.fixture
def updates(monkeypatch):
    """Status of every trial, and who runs, each time the results are written."""
    told = []
    monkeypatch.setattr(
        results, "update", lambda _, record, found, live: told.append(([trial.status for trial in found], live))
    )
    return told


def test_results_are_those_of_the_end_once_nobody_runs(tmp_path, watch, updates):
    """Of a trial that has ended, but not in Ray's eyes, the checkpoints are still to be deleted."""
    watch.on_trial_start(0, [], small.of_ray(0))
    trials.write_outcome(trials.folder_of(tmp_path, 1), "finished")
    watch.on_trial_complete(0, [], small.of_ray(1))
    assert updates == [(["finished", "finished"], [0])] and watch.reported is None
    watch.on_trial_complete(0, [], small.of_ray(0))
    assert updates[1:] == [(["finished", "finished"], [])] and watch.reported == trials.read_all(tmp_path)


def test_a_trial_that_has_not_ended_changes_no_results(tmp_path, watch, updates):
    """Ray stops all at once when time is over, and after Ctrl-C."""
    heard = []
    watch._suggestions = SimpleNamespace(told=heard.append)
    watch.on_trial_complete(0, [], small.of_ray(1))
    assert updates == [] and watch.reported is None and [trial.number for trial in heard] == [1]


def test_results_that_could_not_be_written_are_not_taken_for_written(tmp_path, watch, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "update", full)
    trials.write_outcome(trials.folder_of(tmp_path, 1), "finished")
    watch.on_trial_complete(0, [], small.of_ray(1))
    assert watch.reported is None


# Trials that Ray loses


def test_a_trial_whose_kept_process_had_died_is_run_again_and_no_failure(tmp_path, watch):
    """Ray keeps the process of a trial that waits for the next one, and does not see it die."""
    small.put(tmp_path, small.trial(2, [0.4], "unfinished"))
    folder, queue = trials.folder_of(tmp_path, 2), watch._queue
    queue._queue.append(trials.read(folder))
    for attempt in range(3):
        assert queue.suggest(f"lost{attempt}") == {"number": 2}
        queue.on_trial_complete(f"lost{attempt}", error=True)
        watch.on_trial_error(0, [], SimpleNamespace(trial_id=f"lost{attempt}", config={"number": 2}))
        assert trials.read(folder).status == ("failed" if attempt == 2 else "unfinished")
    assert queue.suggest("x") is None and queue.holds("id1") and not queue.holds("lost2")


def test_a_trial_that_ray_ends_without_a_word_is_run_again(tmp_path, watch):
    """Otherwise it would hold a place for ever, and trials that wait would wait for it."""
    lost = SimpleNamespace(trial_id="id1", config={"number": 1}, is_finished=lambda: True)
    for attempt in range(3):
        watch.on_step_end(0, [lost])
        assert trials.read(trials.folder_of(tmp_path, 1)).status == ("failed" if attempt == 2 else "unfinished")
        watch.on_step_end(0, [lost])  # told once
        assert not watch._running
        assert watch._queue.suggest("id1") == ({"number": 1} if attempt < 2 else Queue.FINISHED)
