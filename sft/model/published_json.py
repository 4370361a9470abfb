"""A JSON file of a published directory -> its settings by name; imports nothing heavy, knows no file's meaning."""

import json
from pathlib import Path

from sft.config import UserError


def read_json(file: Path) -> dict:
    """A published JSON file; a UserError if it is none or holds no settings by name."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); copy the file from the published model again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no settings by name; copy the file from the published model again")
    return content
