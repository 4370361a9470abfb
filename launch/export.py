"""Merge a run's adapter into its base: a complete directory in the published format, or the adapter alone."""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # a checkout's scripts run the checkout's package, installed or not

from sft.config import UserError
from sft.ranks import USER_ERROR


def main() -> int:
    """Export as the command line says; returns the exit code."""
    arguments = parse(sys.argv[1:])
    try:
        return export(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint directory of a run")
    parser.add_argument("--output", type=Path, required=True, help="directory to write; must not exist")
    parser.add_argument("--model_path", help="the base; default: the one the run's adapter_config.json names")
    parser.add_argument("--adapter_only", action="store_true", help="copy the adapter and tokenizer, merge nothing")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of all weights; default: each one's own")
    parser.add_argument(
        "--validate", action="store_true", help="compute the validation Dice of what was written, as the run did"
    )
    return parser.parse_args(argv)


def export(arguments: argparse.Namespace) -> int:
    """Write, say what was written, and validate it on request."""
    import torch

    from sft.model import export as exporting
    from sft.model import published

    if arguments.adapter_only:
        check_adapter_only(arguments)
        exporting.export_adapter(arguments.checkpoint, arguments.output)
        print(f"adapter in {arguments.output}")
        print(seg_rate_line(arguments.checkpoint))
        return 0
    base = published.resolve(arguments.model_path or exporting.base_of(arguments.checkpoint))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.get(arguments.dtype)
    written = exporting.export(base, arguments.checkpoint, arguments.output, dtype, tell=_tell)
    print(f"{written.tensors:,} tensors, {', '.join(written.dtypes)}, {written.bytes:,} bytes in {arguments.output}")
    print(f"  {written.merged:,} with LoRA merged, {written.replaced:,} replaced by trained ones, read back in order")
    if written.left_out:
        print(f"  left out: {', '.join(written.left_out)}: not read, so not merged")
    print(seg_rate_line(arguments.checkpoint))
    if arguments.validate:
        from sft.validation import validate_directory

        before, after = validate_directory(arguments.checkpoint, arguments.output)
        print(f"validation Dice {before:.4f} in the run, {after:.4f} of the merged model ({after - before:+.4f})")
    return 0


def check_adapter_only(arguments: argparse.Namespace) -> None:
    """A copy of the adapter has no base, no other dtype and no Dice of its own."""
    given = [name for name in ("model_path", "dtype", "validate") if getattr(arguments, name)]
    if given:
        raise UserError(f"adapter_only: merges nothing, so --{given[0]} means nothing with it; leave one of them out")


def seg_rate_line(checkpoint_directory: Path) -> str:
    """The [SEG] rate that the run found before and after, for those who go on to generate freely."""
    from sft import checkpoint, provenance

    what = "[SEG] rate (how often the model, asked freely, arrives at [SEG])"
    run_directory = checkpoint_directory.resolve().parent
    try:
        checkpoint.check_complete(checkpoint_directory)
        epoch = checkpoint.read_progress(checkpoint_directory).epoch
        rates = provenance.seg_rates(run_directory)
        samples = provenance.settings_of_run(run_directory).seg_rate_samples
    except UserError as error:
        return f"{what}: not known: {error}"
    if not rates:
        return f"{what}: not measured by this run (seg_rate_samples {samples})"
    before, after = (f"{rates[one]:.2f}" if one in rates else "not measured" for one in (0, epoch))
    return f"{what}: base {before}, epoch {epoch} {after}, on up to {samples} validation images"


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
