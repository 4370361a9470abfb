"""Search better settings for launch/train.py under Ray Tune. A mistake ends in one line and exit code 2."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout: its sft, and this folder as the package tune

from sft.ranks import USER_ERROR
from sft.settings import UserError
from tune.options import parse


def main() -> int:
    """Run or continue a sweep with the settings of the command line; returns the exit code."""
    try:
        plan = parse(sys.argv[1:])
        from tune.sweep import run

        return run(plan)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
