"""The [SEG] rate of a run's base and of one of its checkpoints, in words, for those who go on to generate freely.

Takes a checkpoint directory and reads the log of the run around it. It measures nothing: train.py does.
"""

from pathlib import Path

from sft import checkpoint, provenance
from sft.config import UserError

_WHAT = "[SEG] rate (how often the model, asked freely, arrives at [SEG])"


def seg_rate_line(checkpoint_directory: Path) -> str:
    """One line: the rate before and after, that the run did not measure it, or why that is not known."""
    try:
        checkpoint.check_complete(checkpoint_directory)
        epoch = checkpoint.read_progress(checkpoint_directory).epoch
        run_directory = Path(checkpoint_directory).resolve().parent
        rates = provenance.seg_rates(run_directory)
        samples = provenance.settings_of_run(run_directory).seg_rate_samples
    except UserError as error:
        return f"{_WHAT}: not known: {error}"
    if not rates:
        return f"{_WHAT}: not measured by this run (seg_rate_samples {samples})"
    before, after = (f"{rates[one]:.2f}" if one in rates else "not measured" for one in (0, epoch))
    return f"{_WHAT}: base {before}, epoch {epoch} {after}, on up to {samples} validation images"
