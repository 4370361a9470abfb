"""Protects the end of a process: no gloo thread may still hold tensors when the interpreter goes."""

import pytest

from sft import gloo


@pytest.fixture
def thread_files(tmp_path, monkeypatch):
    """Writes what the kernel would say of a thread; its files are read instead of the process's own."""
    monkeypatch.setattr(gloo, "THREADS", tmp_path)

    def write(number: int, name: str, state: str, switches: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        text = f"Name:\t{name}\nState:\t{state} (word)\nvoluntary_ctxt_switches:\t{switches}\n"
        (folder / "status").write_text(text)

    return write


def polls_until_idle(monkeypatch, changes) -> int:
    """Waits, making one of the changes at each poll; gives the number of polls."""
    polls = []

    def poll(_seconds):
        polls.append(0)
        if len(polls) <= len(changes):
            changes[len(polls) - 1]()

    monkeypatch.setattr(gloo.time, "sleep", poll)
    gloo.wait_until_idle()
    return len(polls)


def test_without_gloo_nothing_is_waited_for(thread_files, monkeypatch):
    thread_files(1, "python", "R", 5)
    assert polls_until_idle(monkeypatch, []) == 0


def test_idle_threads_are_seen_to_sleep_once(thread_files, monkeypatch):
    thread_files(1, gloo.NAME, "S", 5)
    assert polls_until_idle(monkeypatch, []) == 1


def test_a_running_thread_and_one_that_waits_for_the_interpreter_are_waited_for(thread_files, monkeypatch):
    thread_files(1, gloo.NAME, "R", 5)
    changes = [
        lambda: thread_files(1, gloo.NAME, "S", 6),
        lambda: thread_files(1, gloo.NAME, "S", 7),  # the timed wait for the interpreter
        lambda: thread_files(1, gloo.NAME, "S", 8),
    ]
    assert polls_until_idle(monkeypatch, changes) == 4


def test_a_thread_that_never_rests_is_left_alone_in_the_end(thread_files, monkeypatch):
    thread_files(1, gloo.NAME, "R", 5)
    clock = iter(range(1000))
    monkeypatch.setattr(gloo.time, "monotonic", lambda: next(clock))
    assert polls_until_idle(monkeypatch, []) == gloo.AT_MOST_S - 1


def test_the_real_threads_are_found(ranks):
    assert gloo._states()
    gloo.wait_until_idle()
    assert gloo._all_sleep(gloo._states())
