"""The DeepSpeed JSON: reads the file and checks that it holds ZeRO and communication keys only.

Takes a name or a path, gives the dictionary or a UserError that names file and key. Imports nothing heavy, so a wrong
name is answered before torch is loaded. It does not know which keys inside zero_optimization exist: engine.py does.
"""

import json
from collections.abc import Iterator
from typing import Any

from sft.config import UserError, deepspeed_config_path

ALLOWED = ("zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor")


def read(name: str) -> dict[str, Any]:
    """The checked content of a name's or path's file.

    Raises:
        UserError: no such file, no JSON, a key that does not belong there, "auto", NVMe offload, or a ZeRO stage other
            than 1, 2, 3.
    """
    path = deepspeed_config_path(name)
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(keys, dict) or not isinstance(keys.get("zero_optimization"), dict):
        raise UserError(f'{path}: expected an object with "zero_optimization": {{"stage": 1, 2 or 3, ...}}')
    for key in keys:
        if key not in ALLOWED:
            raise UserError(
                f"{path}: key {key!r} does not belong here; batch size, accumulation, optimizer, schedule, clipping "
                f"and precision are settings of the run; allowed are {', '.join(ALLOWED)}"
            )
    for key, value in _leaves(keys):
        if value == "auto":
            raise UserError(f'{path}: {key} is "auto", which only the Hugging Face Trainer fills in; give a value')
        if value == "nvme":
            raise UserError(f'{path}: {key} is "nvme"; allowed are "cpu" and "none"')
    stage = keys["zero_optimization"].get("stage")
    if type(stage) is not int or stage not in (1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}; allowed are 1, 2, 3")
    return keys


def offloads(keys: dict[str, Any]) -> bool:
    """True if the optimizer's state lives in CPU memory."""
    return ((keys["zero_optimization"].get("offload_optimizer") or {}).get("device") or "none") != "none"


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value
