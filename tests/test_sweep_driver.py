"""A sweep and its driver without a cluster: whose folder it is, what is asked of Ray, how it ends."""

import contextlib
import dataclasses
import io
import os
import signal
from types import SimpleNamespace

import pytest
import small_sweeps as small
from ray.tune.tune import _setup_signal_catching

from sft.config import TrainConfig
from sft.settings import UserError
from tune import driver, keeping, nodes, results, suggest, sweep, trials
from tune.driver import Queue
from tune.options import SweepConfig
from tune.progress import STOPPING, LiveTable
from tune.rungs import Rungs
from tune.space import Axis, Space
from tune.trials import Trial

# The folder


@pytest.fixture
def without_ray(monkeypatch):
    """Up to where Ray would be asked what there is."""

    def refuse(_):
        raise UserError("gpus_per_trial = 9, but there are 0 GPUs")

    monkeypatch.setattr(nodes, "start_ray", lambda *_: None)
    monkeypatch.setattr(nodes, "resources", refuse)
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)


def test_a_sweep_that_does_not_come_to_a_trial_leaves_its_name_free(tmp_path, without_ray):
    plan = small.plan(storage_path=str(tmp_path / "sweeps"), name="a")
    for _ in range(2):
        with pytest.raises(UserError, match="there are 0 GPUs"):
            sweep.run(plan)
    assert list((tmp_path / "sweeps").iterdir()) == []


def test_where_ray_is_missing_or_broken_the_name_stays_free(tmp_path, without_ray, monkeypatch):
    plan = small.plan(storage_path=str(tmp_path / "sweeps"), name="a")
    with monkeypatch.context() as patch:
        patch.setattr(sweep.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(UserError, match=r"a sweep needs the package ray: pip install 'ray\[tune\]'"):
            sweep.run(plan)
    assert not (tmp_path / "sweeps").exists()
    monkeypatch.setattr(sweep, "record", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sweep.run(plan)
    assert list((tmp_path / "sweeps").iterdir()) == []


def test_a_sweep_that_is_continued_is_never_deleted_nor_changed_by_a_mistake(tmp_path, without_ray):
    trials.write_sweep(tmp_path, small.sweep())
    before = (tmp_path / trials.SWEEP_FILE).read_text()
    plan = small.plan(resumed=tmp_path, num_trials=99)
    with pytest.raises(UserError, match="there are 0 GPUs"):
        sweep.run(plan)
    held = keeping.lock(tmp_path)
    with pytest.raises(UserError, match="another process is running this sweep"):
        sweep.run(plan)
    os.close(held)
    assert (tmp_path / trials.SWEEP_FILE).read_text() == before


@pytest.fixture
def without_trials(monkeypatch):
    """Up to the search, whose place `sweep.search` is, and after it."""
    monkeypatch.setattr(nodes, "start_ray", lambda *_: None)
    monkeypatch.setattr(nodes, "resources", lambda _: ({"CPU": 1, "GPU": 0.0}, 1))
    monkeypatch.setattr(nodes, "Forks", lambda *_: SimpleNamespace(addresses=dict))
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sweep, "prepare", lambda plan, record, *_: (plan, record))
    monkeypatch.setattr(sweep, "search", lambda *_: True)


@pytest.mark.parametrize("where", ["search", "conclude"])
def test_a_full_disk_ends_in_one_line_that_says_how_to_go_on(tmp_path, without_trials, monkeypatch, where):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sweep, where, full)
    plan = small.plan(storage_path=str(tmp_path), name="a")
    with pytest.raises(UserError, match=rf"No space left on device; free some space, .* --resume {tmp_path / 'a'}$"):
        sweep.run(plan)
    assert (tmp_path / "a" / trials.SWEEP_FILE).exists()


@pytest.mark.parametrize("interrupted", [False, True])
def test_once_a_sweep_has_ended_ctrl_c_does_not_disturb_rays_own_end(
    tmp_path, without_trials, monkeypatch, interrupted
):
    def conclude(*_):
        if interrupted:
            raise KeyboardInterrupt

    handlers = []
    monkeypatch.setattr(sweep, "conclude", conclude)
    monkeypatch.setattr(sweep.signal, "signal", lambda *given: handlers.append(given))
    with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext():
        sweep.run(small.plan(storage_path=str(tmp_path), name="a"))
    assert [number for number, _ in handlers] == [signal.SIGTERM, signal.SIGINT]
    assert handlers[-1] == (signal.SIGINT, signal.SIG_IGN)


def test_any_other_failure_keeps_its_traceback(tmp_path, without_trials, monkeypatch):
    def lost(*_):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(sweep, "search", lost)
    with pytest.raises(FileNotFoundError):
        sweep.run(small.plan(storage_path=str(tmp_path), name="a"))


def test_a_folder_that_exists_or_cannot_be_made_is_told(tmp_path):
    plan = small.plan(storage_path=str(tmp_path / "my sweeps"), name="a")
    folder = sweep.make_folder(plan)
    with pytest.raises(UserError) as caught:
        sweep.make_folder(plan)
    assert str(caught.value) == f"{folder} exists; give another --name, or continue it: --resume '{folder}'"
    (tmp_path / "file").touch()
    for settings in ({"storage_path": str(tmp_path / "file")}, {"storage_path": str(tmp_path), "name": "n" * 300}):
        with pytest.raises(UserError, match="give another --storage_path or --name"):
            sweep.make_folder(small.plan(**{"name": "a"} | settings))


def test_the_record_of_a_sweep_holds_what_a_later_session_needs(tmp_path):
    plan = small.plan(
        points=[{"lora_rank": 16}], num_trials=5, search="random", grace=2, base=TrainConfig(validate_every=3)
    )
    made = sweep.record(plan, tmp_path / "s")
    assert (made.name, made.num_trials, made.grace_epochs, made.points) == ("s", 5, 6, [{"lora_rank": 16}])
    trials.write_sweep(tmp_path, made)
    again = sweep.record(dataclasses.replace(small.plan(num_trials=8, seeds=2), resumed=tmp_path), tmp_path)
    assert (again.num_trials, again.options["seeds"], again.options["resume"]) == (8, 2, None)
    assert (again.started, again.points, again.grace_epochs) == (made.started, made.points, 6)
    grid = small.plan(small.GRID, search="grid")
    assert sweep.record(grid, tmp_path / "g").num_trials == 1 + 6


def test_the_first_look_asks_for_the_room_of_one_trial_at_the_highest_rank(tmp_path, monkeypatch):
    """With keep all it would refuse a disk that lacks room for a checkpoint per epoch, which no trial writes."""
    asked = []

    def look(config, needs):
        asked.append((config.keep, config.lora_rank, config.output_dir))
        return [SimpleNamespace(features="none", batch_size=1, split={}, checkpoint_bytes=1)]

    monkeypatch.setattr(nodes, "prepare_nodes", look)
    plan = small.plan(base=TrainConfig(lora_rank=8))
    sweep.prepare(plan, small.sweep(), tmp_path, {"CPU": 1, "GPU": 0.0}, 1)
    assert asked == [("latest", 32, str(tmp_path))]


@pytest.fixture
def no_features(monkeypatch):
    """In place of the first look on every node; a batch of 4 fits."""
    found = SimpleNamespace(features="none", batch_size=4, split={}, checkpoint_bytes=1)
    monkeypatch.setattr(nodes, "prepare_nodes", lambda *_: [found])


@pytest.mark.parametrize(("rank", "told"), [(16, "1 combinations of the grid are tried as seed setting"), (64, "")])
def test_that_a_grid_does_not_try_the_seed_setting_again_is_told(tmp_path, no_features, capsys, rank, told):
    plan = small.plan(small.GRID, search="grid", base=TrainConfig(lora_rank=rank, lora_dropout=0.1))
    record = sweep.record(plan, tmp_path)
    assert record.num_trials == (6 if told else 7)
    sweep.prepare(plan, record, tmp_path, {"CPU": 1, "GPU": 0.0}, 1)
    shown = capsys.readouterr().out
    assert shown.startswith(f"{record.num_trials} trials") and shown.count("combinations") == bool(told)
    assert told in shown


def test_a_grid_is_counted_anew_where_the_batch_size_is_settled(tmp_path, no_features):
    space = Space((Axis("batch_size", "choice", (2, 4, 8)),), {})
    plan = small.plan(space, search="grid", base=TrainConfig(batch_size="auto"))
    record = sweep.record(plan, tmp_path)
    assert record.num_trials == 1 + 3
    plan, record = sweep.prepare(plan, record, tmp_path, {"CPU": 1, "GPU": 0.0}, 1)
    assert (plan.seed_setting.batch_size, record.num_trials, trials.read_sweep(tmp_path).num_trials) == (4, 3, 3)
    assert len(list(iter(suggest.Suggestions(plan, ()).next, None))) == 3


def test_trials_read_features_from_the_disk_they_share():
    for given, gpus, wanted in (
        ("auto", 0.0, "disk"),
        ("auto", 0.5, "disk"),
        ("auto", 1.0, "auto"),
        ("off", 0.0, "off"),
    ):
        assert sweep.share_features(TrainConfig(feature_cache=given), gpus).feature_cache == wanted


# What Ray asks, and is told


def test_the_queue_gives_what_has_begun_then_what_is_new_and_makes_the_folders(tmp_path):
    plan = small.plan(num_trials=3)
    known = [small.trial(0, [0.5]), small.trial(1, [0.4], "unfinished")]
    queue = Queue(tmp_path, known[1:], suggest.Suggestions(plan, known), {"ranks": 1}, None, 2)
    assert queue.suggest("a") == {"ranks": 1, "number": 1} and queue.suggest("b") == {"ranks": 1, "number": 2}
    assert queue.suggest("c") is None  # two at a time
    queue.on_trial_complete("a")
    assert queue.suggest("c") is None  # what runs may have to be run again
    queue.on_trial_complete("b")
    assert queue.suggest("c") == Queue.FINISHED
    assert [trial.number for trial in trials.read_all(tmp_path)] == [1, 2]
    assert Queue(tmp_path, [], None, {}, None, 2).suggest("d") == Queue.FINISHED


@pytest.mark.parametrize("soon", [True, False])
def test_a_trial_that_waits_at_a_rung_is_given_once_it_may_go_on(tmp_path, soon):
    """Rungs at 1 and 3 of 9 epochs. What depends on trials that run is asked for again."""
    plan, known = small.plan(num_trials=5), [small.trial(0, [0.1] * 9)]
    known += [small.trial(number, [dice], "unfinished") for number, dice in ((1, 0.5), (2, 0.4))]
    known += [small.trial(3, status="unfinished")]
    for one in known:
        small.put(tmp_path, one)
    rungs = Rungs(small.sweep(num_trials=5), known, soon)
    queue = Queue(tmp_path, known[1:], suggest.Suggestions(plan, known), {}, rungs, 4)
    given = [queue.suggest(name)["number"] for name in ("a", *("bc" if soon else "cb"))]
    assert given == ([3, 1, 4] if soon else [3, 4, 1])  # begun; then the best of three or a new one
    assert queue.suggest("d") is None
    assert rungs.report(3, 1, 0.45) is False
    queue.on_trial_complete("a")
    assert queue.waits(3) and not queue.waits(1)
    assert rungs.report(1, 3, 0.6) is False
    queue.on_trial_complete("b")
    assert queue.suggest("e") is None and rungs.waiting == {1}  # of five trials one goes on: 2 and 3 are out
    queue.on_trial_complete("c", error=True)
    assert queue.suggest("f") is None
    queue.forget("c")  # 4 has failed: nobody comes any more
    assert queue.suggest("f") == {"number": 1}  # alone at its rung with the seed setting, and better
    stopped = [trial.number for trial in trials.read_all(tmp_path) if trial.status == "stopped"]
    assert stopped == [2, 3] and queue.suggest("g") is None
    queue.on_trial_complete("f")
    assert queue.suggest("h") == Queue.FINISHED


def test_the_search_is_told_what_a_trial_that_waits_has_come_to(tmp_path):
    known = [small.trial(1, [0.5], "unfinished"), small.trial(2, status="unfinished")]
    heard = []
    suggestions = SimpleNamespace(told=heard.append, next=lambda: None)
    Queue(tmp_path, known, suggestions, {}, Rungs(small.sweep(num_trials=5), known), 2)
    assert heard == known[:1]


def test_a_search_that_ends_between_two_trials_has_not_ended(tmp_path, monkeypatch):
    """Otherwise the repeats would follow, and trials that never began would be forgotten."""
    monkeypatch.setattr(driver.tune, "Tuner", lambda *_, **__: SimpleNamespace(fit=lambda: None))
    small.put(tmp_path, small.trial(0, [0.5]))
    for num_trials, ended in ((1, True), (2, False)):
        plan = small.plan(num_trials=num_trials, seeds=1)
        phase = driver.Phase(plan, small.sweep(), tmp_path, {"CPU": 1, "GPU": 0.0}, 1)
        assert sweep.search(phase, plan, tmp_path) is ended


# Ctrl-C


@pytest.fixture
def tuner(tmp_path, monkeypatch):
    """In place of Ray's: asks for Ctrl-C as Ray does, then does what a test says; what is shown is in `shown`."""
    stream, made = io.StringIO(), SimpleNamespace(shown=lambda: stream.getvalue(), during=lambda stopped: None)

    class Tuner:
        def __init__(self, *_, run_config, **__):
            made.watch = run_config.callbacks[0]

        def fit(self):
            stopped = _setup_signal_catching()
            made.watch.setup(stop=None, num_samples=1, total_num_samples=1)
            made.during(stopped)

    monkeypatch.setattr(driver.tune, "Tuner", Tuner)
    monkeypatch.setattr(driver, "LiveTable", lambda record, total: LiveTable(record, total, stream))
    before = signal.getsignal(signal.SIGINT)
    small.put(tmp_path, small.trial(0, [0.5], "unfinished"))
    made.plan = small.plan(num_trials=1)
    made.phase = driver.Phase(made.plan, small.sweep(num_trials=1), tmp_path, {"CPU": 1, "GPU": 0.0}, 1)
    yield made
    signal.signal(signal.SIGINT, before)


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def test_at_ctrl_c_a_line_is_told_before_ray_has_ended_its_trials(tmp_path, tuner):
    told = []

    def once(stopped):
        assert not stopped.is_set()
        ctrl_c()
        told.append((stopped.is_set(), tuner.shown()))

    tuner.during = once
    assert sweep.search(tuner.phase, tuner.plan, tmp_path) is False and tuner.phase.interrupted
    assert told == [(True, f"{STOPPING}\n")] and STOPPING.startswith("stopping: ")


def test_after_ctrl_c_the_table_follows_and_a_second_one_leaves_without_it(tmp_path, tuner, capsys, monkeypatch):
    monkeypatch.setattr(results, "write", lambda *_: None)
    monkeypatch.setattr(results, "verdict", lambda *_: "a verdict")
    record = small.sweep(num_trials=1)
    tuner.during = lambda stopped: ctrl_c()
    assert sweep._search_and_conclude(tuner.phase, tuner.plan, record, tmp_path) is False
    assert "a verdict" in capsys.readouterr().out
    tuner.during = lambda stopped: (ctrl_c(), ctrl_c())
    with pytest.raises(KeyboardInterrupt):
        sweep._search_and_conclude(tuner.phase, tuner.plan, record, tmp_path)
    assert capsys.readouterr().out == "" and tuner.shown().count(STOPPING) == 2


def test_ctrl_c_between_two_runs_of_ray_is_told_too(tmp_path, tuner, capsys, monkeypatch):
    monkeypatch.setattr(results, "write", lambda *_: None)
    monkeypatch.setattr(results, "verdict", lambda *_: "a verdict")
    monkeypatch.setattr(sweep, "search", lambda *_: ctrl_c())
    assert sweep._search_and_conclude(tuner.phase, tuner.plan, small.sweep(num_trials=1), tmp_path) is False
    shown = capsys.readouterr().out
    assert shown.startswith(STOPPING) and "a verdict" in shown


def test_a_run_of_ray_that_nobody_interrupts_leaves_ctrl_c_as_it_was(tmp_path, tuner):
    """Otherwise the first one after it would be swallowed, and the second of a later run."""
    before = signal.getsignal(signal.SIGINT)
    sweep.search(tuner.phase, tuner.plan, tmp_path)
    assert signal.getsignal(signal.SIGINT) is before and not tuner.phase.interrupted


def test_a_terminal_that_is_held_up_keeps_no_sweep_from_stopping(tmp_path, tuner, monkeypatch):
    def held_up(*_):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

    monkeypatch.setattr(LiveTable, "say", held_up)
    seen = []
    tuner.during = lambda stopped: (ctrl_c(), seen.append(stopped.is_set()))
    sweep.search(tuner.phase, tuner.plan, tmp_path)
    assert seen == [True]


# Time


@pytest.mark.parametrize(
    ("waited_s", "during", "code", "told"),
    [
        (60.0, lambda stopped: None, 0, "time_budget_s = 60 is over, and 2 trials have not ended: python tune/"),
        (59.0, lambda stopped: None, 130, "\n2 trials have not ended: python tune/"),  # a disk was full
        (60.0, lambda stopped: ctrl_c(), 130, "\n2 trials have not ended: python tune/"),
    ],
)
def test_a_sweep_whose_time_is_over_has_ended_as_asked(
    tuner, tmp_path, monkeypatch, capsys, waited_s, during, code, told
):
    plan = small.plan(num_trials=2, time_budget_s=60, storage_path=str(tmp_path / "sweeps"), name="a")
    folder, now = tmp_path / "sweeps" / "a", {"s": 0.0}
    monkeypatch.setattr(driver.time, "monotonic", lambda: now["s"])
    monkeypatch.setattr(nodes, "start_ray", lambda *_: None)
    monkeypatch.setattr(nodes, "resources", lambda _: ({"CPU": 1, "GPU": 0.0}, 1))
    monkeypatch.setattr(nodes, "Forks", lambda *_: SimpleNamespace(addresses=dict))
    monkeypatch.setattr(sweep, "prepare", lambda plan, record, *_: (plan, record))
    monkeypatch.setattr(results, "write", lambda *_: None)
    monkeypatch.setattr(results, "verdict", lambda *_: "a verdict")

    def some_time(stopped):
        small.put(folder, small.trial(0, [0.5], "unfinished"))
        during(stopped)
        now["s"] += waited_s

    tuner.during = some_time
    assert sweep.run(plan) == code
    shown = capsys.readouterr().out
    assert f"{told}search.py --resume {folder}\n" in shown and shown.count("have not ended") == 1


ENDED = [small.trial(number, [0.5 + number / 10]) for number in range(4)]  # the seed setting is none of the best three


@pytest.mark.parametrize(
    ("seeds", "begun", "left"),
    [
        (1, [small.trial(0, [0.5])], 3),  # of 4
        (3, [small.trial(0, [0.5], "unfinished"), small.trial(1, [0.6])], 3),  # repeats are not known yet
        (3, ENDED, 8),
        (2, [*ENDED, small.repeat(4, 0, 43, status="unfinished")], 4),
        (1, ENDED, 0),
    ],
)
def test_trials_that_are_left_are_counted_with_the_repeats_to_come(tmp_path, monkeypatch, capsys, seeds, begun, left):
    monkeypatch.setattr(results, "write", lambda *_: None)
    for one in begun:
        small.put(tmp_path, one)
    record = small.sweep(options=dataclasses.asdict(SweepConfig(seeds=seeds)))
    sweep.conclude(tmp_path, record, finished=False)
    assert f"\n{left} trials have not ended" in capsys.readouterr().out


def test_repeats_have_what_time_the_search_has_left(tmp_path, monkeypatch):
    small.put(tmp_path, small.trial(0, [0.5]))
    asked = []

    class Tuner:
        def __init__(self, *_, tune_config, **__):
            asked.append(tune_config.time_budget_s)

        def fit(self):
            small.put(tmp_path, small.repeat(1, of=0, seed=43))

    monkeypatch.setattr(driver.tune, "Tuner", Tuner)
    for waited_s, asked_s, ended in ((100.0, [], False), (99.0, [1.0], True)):
        plan = small.plan(num_trials=1, seeds=2, time_budget_s=100)
        phase = driver.Phase(plan, small.sweep(), tmp_path, {"CPU": 1, "GPU": 0.0}, 1)
        now_s = phase._started_s + waited_s
        with monkeypatch.context() as patch:
            patch.setattr(driver.time, "monotonic", lambda now_s=now_s: now_s)
            assert sweep.search(phase, plan, tmp_path) is ended
        assert asked == pytest.approx(asked_s)


def test_repeats_that_a_kill_has_left_do_not_keep_the_search_from_ending(tmp_path, monkeypatch):
    """Otherwise the others would have to wait for a second --resume."""
    for one in (small.trial(0, [0.5]), small.trial(1, [0.4]), small.repeat(2, of=0, seed=43, status="unfinished")):
        small.put(tmp_path, one)
    fits = []

    class Tuner:
        def __init__(self, *_, **__):
            pass

        def fit(self):
            fits.append(1)
            if len(fits) == 1:
                small.put(tmp_path, small.trial(3, [0.3]))
            for number in range(len(trials.read_all(tmp_path))):
                trials.write_outcome(trials.folder_of(tmp_path, number), "finished") if len(fits) == 2 else None

    monkeypatch.setattr(driver.tune, "Tuner", Tuner)
    monkeypatch.setattr(suggest.Suggestions, "left", property(lambda self: 0 if fits else 1))
    plan = small.plan(num_trials=3, seeds=2)
    phase = driver.Phase(plan, small.sweep(num_trials=3), tmp_path, {"CPU": 1, "GPU": 0.0}, 1)
    assert sweep.search(phase, plan, tmp_path) and len(fits) == 2


def test_a_sweep_whose_trials_have_all_ended_starts_nothing(tmp_path):
    for number in range(2):
        small.put(tmp_path, small.trial(number, [0.5]))
    plan = small.plan(num_trials=2)
    phase = driver.Phase(plan, small.sweep(), tmp_path, {"CPU": 1, "GPU": 0.0}, 1)
    assert sweep.search(phase, plan, tmp_path)
    small.put(tmp_path, Trial(2, "trial 1, seed 43", {}, {"seed": 43}, status="finished"))
    assert sweep.search(phase, plan, tmp_path)


# The results


@pytest.fixture
def updates(monkeypatch):
    """Epochs of every trial each time the results are written."""
    told = []
    monkeypatch.setattr(results, "verdict", lambda *_: "a verdict")
    monkeypatch.setattr(results, "update", lambda _, record, found, live: told.append([one.epoch for one in found]))
    return told


def test_a_sweep_that_ends_by_itself_writes_its_results_once(tmp_path, tuner, updates):
    trials.write_sweep(tmp_path, small.sweep())

    def end(stopped):
        tuner.watch.on_trial_start(0, [], small.of_ray(0))
        trials.write_outcome(trials.folder_of(tmp_path, 0), "finished")
        tuner.watch.on_trial_complete(0, [], small.of_ray(0))

    tuner.during = end
    assert sweep._search_and_conclude(tuner.phase, tuner.plan, small.sweep(num_trials=1), tmp_path)
    assert updates == [[1]]


@pytest.mark.parametrize("interrupted", [False, True])
def test_what_a_stopped_trial_has_come_to_is_in_the_results_once(tmp_path, tuner, updates, interrupted):
    def stop(stopped):
        tuner.watch.on_trial_start(0, [], small.of_ray(0))
        trials.append_row(trials.folder_of(tmp_path, 0), small.rows([0.5, 0.6])[1])
        if interrupted:
            ctrl_c()
        tuner.watch.on_trial_complete(0, [], small.of_ray(0))

    tuner.during = stop
    assert not sweep._search_and_conclude(tuner.phase, tuner.plan, small.sweep(num_trials=1), tmp_path)
    assert updates == [[2]]


def test_a_sweep_that_is_continued_with_nothing_to_do_writes_its_results_anew(tmp_path, tuner, updates):
    """A kill may have come before they were written."""
    trials.write_outcome(trials.folder_of(tmp_path, 0), "finished")
    assert sweep._search_and_conclude(tuner.phase, tuner.plan, small.sweep(num_trials=1), tmp_path)
    assert updates == [[1]]


@pytest.mark.parametrize(("time_budget_s", "soon"), [(None, False), (3600, True)])
def test_a_sweep_that_may_run_out_of_time_has_whole_trials_early(tmp_path, monkeypatch, time_budget_s, soon):
    asked = []

    class Tuner:
        def __init__(self, *_, tune_config, **__):
            asked.append(tune_config)

        def fit(self):
            pass

    monkeypatch.setattr(driver.tune, "Tuner", Tuner)
    plan = small.plan(num_trials=5, time_budget_s=time_budget_s)
    phase = driver.Phase(plan, small.sweep(num_trials=5), tmp_path, {"CPU": 1, "GPU": 0.0}, 1)
    sweep.search(phase, plan, tmp_path)
    assert [(one.scheduler._rungs._soon, one.num_samples) for one in asked] == [(soon, -1)]
