"""What every test starts from: no hub, no user's cache, one thread, and no GPU tests where there is no GPU."""

import os
import shutil
import signal
import tempfile

import pytest

# Set before any test file imports a library, and inherited by pytest-xdist's workers, which start later: what one
# test generates another finds.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums in one order on every machine; workers do not fight for cores
# A shell ignores Ctrl-C in what it runs in the background, and children inherit that: tests send Ctrl-C to children.
signal.signal(signal.SIGINT, signal.default_int_handler)
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_WORKER:
    os.environ["SA2VA_SFT_CACHE"] = tempfile.mkdtemp(prefix="sa2va-sft-tests-")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where torch sees none; torch is imported only if something is so marked."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none"))


@pytest.fixture(scope="module")
def ranks():
    """The process as the only rank of a group, which ends with the file."""
    from sft import engine
    from sft.config import TrainConfig

    before = dict(os.environ)
    yield engine.start(TrainConfig(precision="fp32"))
    engine.shut_down()
    os.environ.clear()
    os.environ.update(before)


def pytest_unconfigure() -> None:
    if not IS_WORKER:
        shutil.rmtree(os.environ["SA2VA_SFT_CACHE"], ignore_errors=True)
