"""Fine-tune a Sa2VA checkpoint: settings, devices, then sft.train. A mistake ends in one line and exit code 2."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # a checkout's scripts run the checkout's package, installed or not

from sft.config import UserError, check_paths, parse_args
from sft.devices import claim
from sft.ranks import USER_ERROR

RANK_0_FIRST_S = 5.0


def main() -> int:
    """Train with the settings of the command line; returns the exit code."""
    try:
        config = parse_args(sys.argv[1:], demo=HERE / "configs" / "demo.yaml")
        check_paths(config)
        exit_code = claim(config.gpu, config.include)
        if exit_code is not None:
            return exit_code
        from sft.train import train  # torch and all the rest load here

        if os.environ["RANK"] == "0":  # it has files to close; the others end at once
            signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
        train(config)
    except UserError as error:
        print_error(error)
        return USER_ERROR
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        return 130
    return 0


def print_error(error: UserError) -> None:
    """Print the mistake in one line, once: another rank's launcher ends it while it waits for rank 0 to speak."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(RANK_0_FIRST_S)
    message = " ".join(str(error).split("\n"))
    print(f"error: {message}" if rank == "0" else f"error (rank {rank}): {message}", file=sys.stderr)


def leave(exit_code: int) -> NoReturn:
    """Leave the process group, which complains otherwise, and end."""
    if engine := sys.modules.get("sft.engine"):
        engine.shut_down()
    sys.exit(exit_code)


if __name__ == "__main__":
    leave(main())
