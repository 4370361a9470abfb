"""Which checkpoints of a run stay and what each holds: the setting `keep`.

Takes a `Run`, writes into its directory. With `all`, checkpoint_epoch_N and checkpoint_best, each to go on from; with
`latest`, checkpoint_latest to go on from, replaced in place, and checkpoint_best with the adapter alone. It does not
know when the loop saves, nor how a checkpoint becomes complete (checkpoint.py).
"""

import shutil
from pathlib import Path

from sft import checkpoint, engine
from sft.model import lora
from sft.run import Run

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "*.model")
PROCESSOR_FILES = ("chat_template.*", "*processor_config.json")  # of the Qwen-VL families


def save_epoch(run: Run) -> Path:
    """Writes the checkpoint to go on from after the epoch that just ended; returns its directory. Collective."""
    match run.config.keep:
        case "all":
            name = f"checkpoint_epoch_{run.progress.epoch}"
        case "latest":
            name = checkpoint.LATEST
        case _:
            raise ValueError(f"keep {run.config.keep!r}: expected all or latest")
    return _save(run, name, resumable=True)


def save_best(run: Run) -> Path:
    """Writes checkpoint_best; returns its directory. Collective."""
    return _save(run, checkpoint.BEST, resumable=run.config.keep == "all")


def _save(run: Run, name: str, resumable: bool) -> Path:
    """Writes checkpoint NAME with adapter, tokenizer and, if `resumable`, training state."""
    trainable = engine.trainable_state(run.ds_engine)

    def write_model(directory: Path) -> None:
        lora.save_adapter(directory, run.peft_model, trainable, run.config.save_format)
        for pattern in (*TOKENIZER_FILES, *PROCESSOR_FILES):
            for file in run.loaded.directory.glob(pattern):
                shutil.copyfile(file, directory / file.name)

    directory = run.directory / name
    checkpoint.save(directory, run.ds_engine, run.ranks, write_model, run.progress, resumable)
    return directory
