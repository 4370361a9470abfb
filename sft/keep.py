"""Which checkpoints of a run stay and what each holds: the setting `keep`.

Takes a `Run`, saves into its directory. With `all`, checkpoint_epoch_N and checkpoint_best, each to go on from; with
`latest`, checkpoint_latest to go on from, replaced in place, and checkpoint_best with the adapter alone. It does not
know when the loop saves, nor how a checkpoint becomes complete (checkpoint.py).
"""

import shutil
from pathlib import Path

from torch import Tensor

from sft import checkpoint
from sft.model import lora
from sft.run import Run

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "*.model")
PROCESSOR_FILES = ("chat_template.*", "*processor_config.json")  # of the Qwen-VL families


def save(run: Run, as_best: bool, to_resume: bool) -> None:
    """Has the state after an epoch written beside what comes next: as the best, to go on from, or as both. Collective.

    `run.writer.wait()` before anything reads it.
    """
    targets = {}
    if as_best:  # first: what one goes on from must not name a best that is not there
        targets[run.directory / checkpoint.BEST] = run.config.keep == "all"
    if to_resume:
        targets[to_resume_from(run)] = True

    def write_model(directory: Path, trainable: dict[str, Tensor]) -> None:
        lora.save_adapter(directory, run.peft_model, trainable, run.config.save_format)
        for pattern in (*TOKENIZER_FILES, *PROCESSOR_FILES):
            for file in run.loaded.directory.glob(pattern):
                shutil.copyfile(file, directory / file.name)

    checkpoint.save(targets, run.ds_engine, run.ranks, write_model, run.progress, run.writer)


def to_resume_from(run: Run) -> Path:
    """The directory of the checkpoint to go on from after the epoch that just ended."""
    match run.config.keep:
        case "all":
            return run.directory / f"checkpoint_epoch_{run.progress.epoch}"
        case "latest":
            return run.directory / checkpoint.LATEST
        case _:
            raise ValueError(f"keep {run.config.keep!r}: expected all or latest")
