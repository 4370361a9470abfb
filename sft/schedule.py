"""The course of the learning rate: warm-up, then cosine, linear or constant, as a pure function of the step."""

import math


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int, kind: str) -> float:
    """What the learning rate is multiplied by at a step: a linear rise to 1, then the schedule towards 0.

    Args:
        step: 0-based optimizer step. No step has the factor 0: neither the first nor the last is wasted.
        kind: cosine | linear | constant.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    match kind:
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        case "linear":
            return 1.0 - done
        case "constant":
            return 1.0
        case _:
            raise ValueError(f"lr_scheduler {kind!r}: expected cosine, linear or constant")
