"""Compare our native model with a published directory's own remote code on one image: figures, masks, a verdict.

Without --trust_remote_code the native model alone answers, and nothing of the directory is run. Exit code: 0 the same
(or nothing was to be compared), 1 different or undecided, 2 a mistake.
"""

import argparse
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # a checkout's scripts run the checkout's package, installed or not

from sft.config import UserError
from sft.ranks import USER_ERROR

QUESTION = "Please segment the blood vessels in this image."


def main() -> int:
    """Verify as the command line says; returns the exit code."""
    arguments = parse(sys.argv[1:])
    try:
        check_files(arguments)
        choose_device(arguments.device)
        return verify(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model_path", type=Path, required=True, help="directory of a published or merged checkpoint")
    parser.add_argument("--image", type=Path, required=True, help="image file")
    parser.add_argument("--question", default=QUESTION, help=f"default: {QUESTION!r}")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the directory's own Python files for the other side"
    )
    parser.add_argument("--published_python", help="Python in which they work; default: .venv_published/bin/python")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output_verify"),
        help="folder for verify.png and verify.json; default: output_verify",
    )
    parser.add_argument("--device", help="cpu, cuda, or a GPU's number as nvidia-smi counts; default: cuda if there")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="fp32 decides; bf16 halves the memory"
    )
    parser.add_argument("--max_answer_tokens", type=int, default=64, help="where an answer without an end is cut off")
    return parser.parse_args(argv)


def check_files(arguments: argparse.Namespace) -> None:
    """What needs no libraries: paths are there."""
    for name, path in (("model_path", arguments.model_path), ("image", arguments.image)):
        if not path.exists():
            raise UserError(f"{name} {path}: does not exist; look at the path again")
    if not arguments.model_path.is_dir():
        raise UserError(f"model_path {arguments.model_path}: is a file; give the directory with config.json")
    if not (arguments.model_path / "config.json").is_file():
        raise UserError(f"model_path {arguments.model_path}: no config.json in it; give a Sa2VA directory")
    if not arguments.image.is_file():
        raise UserError(f"image {arguments.image}: is a folder; give one image file")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise UserError(f"output {arguments.output}: is a file; give a folder")
    if arguments.max_answer_tokens < 1:
        raise UserError(f"max_answer_tokens {arguments.max_answer_tokens}: give at least 1")


def choose_device(device: str | None) -> None:
    """Leaves both sides the chosen device alone to see; before torch is imported."""
    match device:
        case None | "cuda":
            return
        case "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        case number if number.isdigit():
            os.environ |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": number}
        case _:
            raise UserError(f"device {device!r}: allowed are cpu, cuda, or the number of one GPU")


def verify(arguments: argparse.Namespace) -> int:
    """Both sides, one after the other, so that memory holds one model at a time."""
    from sft.data.read import read_image
    from sft.verify.published_side import find_python, remote_files

    image_HW3 = read_image(arguments.image)
    directory, python = arguments.model_path.resolve(), None
    if arguments.trust_remote_code:
        files = remote_files(directory)
        python = find_python(arguments.published_python)
        print(f"--trust_remote_code: these files of {directory} will run, under {python}:")
        print(f"  {', '.join(file.name for file in files)}", flush=True)
    import torch

    device = "cpu" if arguments.device == "cpu" or not torch.cuda.is_available() else "cuda"
    if device == "cpu" and arguments.device not in (None, "cpu"):
        raise UserError(f"device {arguments.device}: torch sees no such GPU; give --device cpu")
    from sft.verify import both_sides

    started_s = time.monotonic()
    size_gb = sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e9
    print(f"native: loading {size_gb:.1f} GB of {directory} in {arguments.precision} on {device}", flush=True)
    settings = {"precision": arguments.precision, "max_answer_tokens": arguments.max_answer_tokens}
    native = both_sides.native_side(str(directory), image_HW3, arguments.question, device=device, **settings)
    if device == "cuda":
        torch.cuda.empty_cache()  # the other side's turn
    print(f"native: answered in {time.monotonic() - started_s:.0f} s, none of the directory's code was run")
    print("\n".join(both_sides.answer_remarks(native)), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    same = True
    if python is None:
        both_sides.write_native_alone(native, image_HW3, arguments.output)
        print("not compared: prompt, vision tokens, state at [SEG], logits and mask of the directory's own code;")
        print("to compare, read its *.py files and add --trust_remote_code")
    else:
        print(f"published: running (its output: {arguments.output / both_sides.LOG})", flush=True)
        places = (python, directory, image_HW3, arguments.output)
        same = both_sides.side_by_side(native, *places, say=print, **settings)
    print(f"{arguments.output / both_sides.PICTURE}, {arguments.output / both_sides.REPORT}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
