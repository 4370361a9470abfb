"""The background writer: training does not wait for it, and no failure is lost."""

import threading

import pytest

from sft.config import UserError
from sft.writer import Writer

PATIENCE_S = 60  # only where a test fails


def fail():
    raise UserError("disk full") from OSError("the reason")


def test_a_job_runs_beside_the_loop_until_it_is_waited_for(ranks):
    release, done = threading.Event(), []

    def job():
        assert release.wait(PATIENCE_S)
        done.append(threading.current_thread())

    with Writer(print) as writer:
        writer.submit(job)
        writer.check()
        assert not done
        release.set()
        writer.wait()
        assert done and done != [threading.main_thread()]
        writer.wait()
        writer.check()


def test_a_failure_is_raised_once_with_its_cause(ranks):
    told = []
    with Writer(told.append) as writer:
        writer.submit(fail)
        with pytest.raises(UserError, match="^disk full$") as error:
            writer.wait()
        assert str(error.value.__cause__) == "the reason"
        writer.wait()
        writer.submit(lambda: None)
    assert told == []


def test_no_job_starts_before_the_one_before_was_asked_for_its_failure(ranks):
    with Writer(print) as writer:
        writer.submit(lambda: None)
        with pytest.raises(AssertionError, match="wait"):
            writer.submit(lambda: None)


@pytest.mark.parametrize("reason", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_whatever_ends_the_loop_a_job_ends_and_its_failure_is_told(ranks, reason):
    begun, release, done, told = threading.Event(), threading.Event(), [], []

    def job():
        begun.set()
        assert release.wait(PATIENCE_S)
        done.append(True)
        fail()

    with pytest.raises(reason), Writer(told.append) as writer:
        writer.submit(job)
        assert begun.wait(PATIENCE_S)
        shut_down = writer._thread.shutdown
        writer._thread.shutdown = lambda: (release.set(), shut_down())  # the loop is left while the job is at work
        raise reason
    assert done == [True]
    assert told == ["error: disk full"]
