"""Every setting of a training run: defaults, a YAML file and flags become one frozen, checked TrainConfig.

Takes command line arguments or keyword arguments, gives a TrainConfig or raises UserError with one line.
Imports nothing heavy, so that --help and a mistake answer at once. Does not know torch, devices or data.
"""

import argparse
import dataclasses
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from sft.settings import (
    PATH,
    FlagParser,
    Former,
    Range,
    UserError,
    add_flags,
    checked,
    docs_of,
    nearest,
    read_mapping,
    settings_of,
)

DEEPSPEED_CONFIGS = Path(__file__).resolve().parent.parent / "deepspeed_configs"
EMBEDDED = "embedded"  # the model and the data that come with the package
PathText = Annotated[str, PATH]
Weight = Annotated[float, Range(at_least=0)]


@dataclass(frozen=True)
class TrainConfig:
    """All settings of one run; the defaults are the researcher's setting (launch/configs/vessel.yaml).

    Raises:
        UserError: a value of the wrong type or out of its range, or settings that contradict each other.
    """

    model_path: PathText = EMBEDDED
    """Directory of a published Sa2VA checkpoint; `embedded` is the tiny base that comes with the package."""
    data_root: PathText = EMBEDDED
    """Folder of images and masks; `embedded` is the synthetic vessel data."""
    question: str = "Please segment the blood vessels in this image."
    """What the model is asked about every image."""
    output_dir: PathText = "output_sft"
    """Folder that receives training.log and one directory per run."""

    val_fraction: Annotated[float, Range(above=0, below=1)] = 0.2
    """Share of the pairs (or of the groups) held out for validation."""
    val_list: PathText | None = None
    """Text file with one validation image name a line, instead of a random split."""
    group_pattern: str | None = None
    """Regular expression on the file name; images whose match (its first group, if any) agrees stay on one side."""
    folds: Annotated[int, Range(at_least=0)] = 0
    """Number of cross-validation folds, 2 or more; 0 splits once by val_fraction."""
    fold: Annotated[int, Range(at_least=0)] = 0
    """Which fold validates, counted from 0; must be below folds."""
    seed: Annotated[int, Range(at_least=0, at_most=2**32 - 1)] = 42
    """Seed of the split, the LoRA initialisation and the order of samples."""

    lora_rank: Annotated[int, Range(at_least=1, at_most=1024)] = 64
    """Rank r of the LoRA matrices."""
    lora_alpha: Annotated[int, Range(at_least=1, at_most=65536)] = 128
    """LoRA scale: the update is multiplied by lora_alpha / lora_rank."""
    lora_dropout: Annotated[float, Range(at_least=0, below=1)] = 0.05
    """Dropout probability before the first LoRA matrix."""
    lora_target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers of the language model that get LoRA."""
    lora_scope: tuple[Literal["language_model", "mask_decoder", "sam2_encoder"], ...] = ("language_model",)
    """Parts of the model that get LoRA."""
    train_modules: tuple[Literal["text_hidden_fcs", "mask_decoder"], ...] = ()
    """Modules trained whole and saved with the adapter."""

    num_epochs: Annotated[int, Range(at_least=1)] = 15
    """Passes over the training images (epochs)."""
    batch_size: Annotated[int, Range(at_least=1)] | Literal["auto"] = 1
    """Images per rank and forward pass (samples). auto: the largest that fits the GPU, at most 32 (4 on a CPU) and no
    image twice in a step; learning rate, epochs and accumulation stay as given."""
    gradient_accumulation_steps: Annotated[int, Range(at_least=1)] = 1
    """Forward passes per optimizer step."""
    learning_rate: Annotated[float, Range(above=0, at_most=1)] = 1e-4
    """Peak learning rate of the LoRA matrices."""
    train_modules_learning_rate: Annotated[float, Range(above=0, at_most=1)] | None = None
    """Peak learning rate of train_modules; none means learning_rate."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_ratio: Annotated[float, Range(at_least=0, below=1)] = 0.03
    """Share of all optimizer steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Range(at_least=0, at_most=1)] = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Annotated[float, Range(above=0)] = 1.0
    """Gradients are scaled down to this global norm."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, slower steps. auto: of as many layers as memory asks."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the decoder layer, replay small batches as CUDA graphs. auto: on a GPU, where the run is long enough."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of the forward and backward pass."""
    deepspeed_config: PathText = "zero2"
    """Name of a file in deepspeed_configs/, or the path of a JSON with ZeRO and communication keys."""
    augment: bool = False
    """Random flips and quarter turns of the training images."""

    dice_weight: Weight = 1.0
    """Weight of the Dice loss."""
    focal_weight: Weight = 1.0
    """Weight of the focal loss."""
    bce_weight: Weight = 0.5
    """Weight of the binary cross entropy."""
    focal_alpha: Annotated[float, Range(at_least=0, at_most=1)] = 0.25
    """Weight of vessel pixels in the focal loss; background pixels get 1 - focal_alpha."""
    focal_gamma: Annotated[float, Range(at_least=0, at_most=10)] = 2.0
    """Exponent that lowers the focal loss of pixels already right."""
    dice_smooth: Annotated[float, Range(above=0)] = 1.0
    """Added above and below the Dice fraction, so that an empty mask is defined (pixels)."""
    text_weight: Weight = 0.0
    """Weight of the cross entropy on the answer's tokens."""

    val_batch_size: Annotated[int, Range(at_least=1)] = 4
    """Images per rank and validation batch (samples)."""
    threshold: Annotated[float, Range(above=0, below=1)] = 0.5
    """Probability above which a pixel counts as vessel."""
    validate_every: Annotated[int, Range(at_least=1)] = 1
    """Distance between validations (epochs); the last epoch is always validated."""
    save_every: Annotated[int, Range(at_least=1)] = 3
    """Distance between kept checkpoints (epochs); the best one is always kept."""
    keep: Literal["all", "latest"] = "all"
    """Checkpoints that stay: all of them, each with its training state, or checkpoint_latest and the best adapter."""
    save_format: Literal["safetensors", "bin"] = "safetensors"
    """File format of the adapter."""
    seg_rate_samples: Annotated[int, Range(at_least=0)] = 8
    """Validation images on which greedy decoding is tested for [SEG]; 0 leaves the test out."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    log_every_steps: Annotated[int, Range(at_least=1)] = 10
    """Distance between progress lines (optimizer steps)."""

    gpu: str | None = None
    """Devices as nvidia-smi numbers them, `3` or `0,1`; one rank each. none: the first visible device, or the CPU."""
    include: str | None = None
    """The same in DeepSpeed's words, `localhost:0,1`."""
    num_workers: Annotated[int, Range(at_least=0)] | Literal["auto"] = "auto"
    """Threads that read images ahead, per rank; 0 counts as 1. auto: the processors shared among ranks, 16 at most."""
    feature_cache: Annotated[
        Literal["auto", "gpu", "host", "disk", "off"], Former("memory", "auto, or host to insist on host memory")
    ] = "auto"
    """Where outputs of frozen encoders are kept; auto takes the first of gpu, host and disk with room for all."""
    feature_cache_dir: PathText | None = None
    """Folder of features that runs share; none: ~/.cache/sa2va-sft/features."""
    resume: PathText | None = None
    """Checkpoint directory to continue from; `auto` takes the latest in output_dir."""
    dry_run: bool = False
    """Check everything with one step in a temporary folder, report, and leave nothing behind."""

    def __post_init__(self) -> None:
        for name, value in checked(TrainConfig, vars(self)).items():
            object.__setattr__(self, name, value)  # frozen for everyone else: here "1e-4" becomes 1e-4, a list a tuple
        _check_contradictions(self)


SECTIONS = {  # first field -> heading in --help
    "model_path": "inputs",
    "val_fraction": "split",
    "lora_rank": "what is trained",
    "num_epochs": "optimisation",
    "dice_weight": "loss",
    "val_batch_size": "validation and outputs",
    "gpu": "running",
}


def override(config: TrainConfig, changes: dict[str, Any], source: str = "") -> TrainConfig:
    """The config with some settings changed.

    Args:
        config: where the other settings come from.
        changes: setting name -> value.
        source: named in errors, e.g. the YAML file the changes come from.

    Raises:
        UserError: an unknown key, an illegal value, or a contradiction.
    """
    return dataclasses.replace(config, **checked(TrainConfig, changes, source))


def parse_args(argv: list[str], demo: Path | None = None) -> TrainConfig:
    """Settings from the command line: defaults, then --config FILE, then flags.

    Args:
        argv: arguments without the program's name.
        demo: YAML used in place of --config when model and data are both the embedded ones.

    Raises:
        UserError: any mistake.
        SystemExit: with 0, after --help or --print_config.
    """
    if "-h" in argv or "--help" in argv:
        _print_and_exit(_parser().format_help())
    options, unknown = _parser().parse_known_args(argv)
    if unknown:
        raise UserError(_unknown_argument(unknown))
    flags = {key: ",".join(value) if isinstance(value, list) else value for key, value in vars(options).items()}
    flags.pop("local_rank", None)
    file, print_config = flags.pop("config", None), flags.pop("print_config", False)
    if file is None and demo and {flags.get(key, EMBEDDED) for key in ("model_path", "data_root")} == {EMBEDDED}:
        file = demo
    config = TrainConfig(**(read_yaml(Path(file)) if file else {}) | checked(TrainConfig, flags))
    if print_config:
        _print_and_exit(f"# {file or 'defaults'}, then flags\n{to_yaml(config)}")
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings of a YAML file, every key known and every value legal.

    Raises:
        UserError: no such file, not YAML, a key twice, an unknown key, an illegal value; names the file.
    """
    content = read_mapping(path, f"--config {path}", "a YAML file of settings")
    if content is None:
        raise UserError(f"{path} holds no settings; expected lines of `key: value`, e.g. `lora_rank: 64`")
    return checked(TrainConfig, content, str(path))


def to_yaml(config: TrainConfig) -> str:
    """All settings as YAML that `--config` reads back to the same TrainConfig."""
    import yaml

    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)


def settings_table() -> str:
    """The Markdown table of all settings that the README shows."""
    docs, lines = docs_of(TrainConfig), ["| key | default | range | meaning |", "|---|---|---|---|"]
    for name, setting in settings_of(TrainConfig).items():
        default = setting.default_text.replace(",", ", ") if setting.many else setting.default_text
        lines.append(f"| `{name}` | {default} | {setting.allowed} | {docs[name]} |")
    return "\n".join(lines)


def check_paths(config: TrainConfig) -> None:
    """Look at every path the settings name, without opening anything large.

    Raises:
        UserError: a path is missing, of the wrong kind, or cannot be read or written.
    """
    try:
        _check_inputs(config)
        _check_output("output_dir", Path(config.output_dir))
        if config.feature_cache_dir:
            _check_output("feature_cache_dir", Path(config.feature_cache_dir))
        if config.resume == "auto" and not any(Path(config.output_dir).glob("lora_sft_*/checkpoint_*")):
            raise UserError(f"resume auto: no checkpoint of any run in {config.output_dir}; leave --resume out")
    except OSError as error:  # even looking is forbidden, or the name is too long
        raise UserError(f"{error.filename}: {error.strerror}; name another path") from None


def deepspeed_config_path(name: str) -> Path:
    """The JSON file that `deepspeed_config` names: a path, or a shipped name such as zero2.

    Raises:
        UserError: neither; lists the shipped names.
    """
    for path in (Path(name), DEEPSPEED_CONFIGS / f"{name}.json", DEEPSPEED_CONFIGS / name):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in DEEPSPEED_CONFIGS.glob("*.json")))
    raise UserError(f"deepspeed_config {name}: no such file; give the path of a JSON file, or one of: {names}")


def _check_contradictions(config: TrainConfig) -> None:
    """Settings that are legal one by one and not together."""
    decoder_twice = "mask_decoder" in config.lora_scope and "mask_decoder" in config.train_modules
    weights = (config.dice_weight, config.focal_weight, config.bce_weight, config.text_weight)
    rules = (
        (config.folds == 1, "folds = 1 leaves nothing to train on; give 2 or more, or 0 for a single split"),
        (config.fold and not config.folds, f"fold = {config.fold} without folds; give folds as well, e.g. 5"),
        (config.folds and config.fold >= config.folds, f"fold = {config.fold} must be below folds = {config.folds}"),
        (config.folds and config.val_list, "val_list and folds both choose the validation images; give one of them"),
        (not any(weights), "dice_weight, focal_weight, bce_weight and text_weight are all 0; give one above 0"),
        (config.gpu and config.include, "gpu and include both choose the devices; give one of them"),
        (not config.lora_target_modules, "lora_target_modules is empty; name at least one, e.g. q_proj"),
        (not config.lora_scope, "lora_scope is empty; name at least one part, e.g. language_model"),
        (decoder_twice, "lora_scope and train_modules both name mask_decoder; keep it in one of them"),
    )
    for broken, message in rules:
        if broken:
            raise UserError(message)
    try:
        re.compile(config.group_pattern or "")
    except re.error as error:
        raise UserError(f"group_pattern = {config.group_pattern} is no regular expression: {error}") from None


def _parser() -> FlagParser:
    """The command line: what is not given stays absent, so that flags can go on top of a YAML file."""
    parser = FlagParser(
        prog="train.py",
        usage="train.py [--config FILE] [--key value ...]",
        description="Fine-tune a Sa2VA checkpoint on images with masks. "
        "A setting that is on is turned off by --key false or --no_key.",
        epilog="Without --config, and with model and data both embedded, the demo runs: "
        "launch/configs/demo.yaml then stands in place of the defaults above.",
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this text and exit")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; flags go on top of it")
    parser.add_argument("--print_config", action="store_true", help="print the resolved settings as YAML and exit")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    add_flags(parser, TrainConfig, SECTIONS)
    return parser


def _unknown_argument(unknown: list[str]) -> str:
    """The error for what the parser did not know."""
    flag = next((word for word in unknown if word.startswith("--")), None)
    if flag is None:
        return f"unexpected argument {unknown[0]}; a setting is given as --key value"
    key, _, value = flag.partition("=")
    after = unknown[unknown.index(flag) + 1 :]
    value = value or (after[0] if after and not after[0].startswith("--") else "")
    close = settings_of(TrainConfig)[nearest(key, settings_of(TrainConfig))]
    return f"unknown key {key}{value and f' = {value}'}; nearest: --{close.name} ({close.allowed})"


def _print_and_exit(text: str) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        try:
            print(text, flush=True)
        except BrokenPipeError:  # `| head` has read enough; what is left must not fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _check_inputs(config: TrainConfig) -> None:
    """What is read: model, data, lists and the DeepSpeed file."""
    if config.model_path != EMBEDDED:
        _check_model_directory(Path(config.model_path))
    if config.data_root != EMBEDDED and not Path(config.data_root).is_dir():
        raise UserError(f"data_root {config.data_root} is not a directory; expected a folder of images and masks")
    if config.val_list and not Path(config.val_list).is_file():
        raise UserError(f"val_list {config.val_list} is not a file; expected one image name a line")
    if config.resume not in (None, "auto") and not Path(config.resume).is_dir():
        raise UserError(f"resume {config.resume} is not a directory; expected a checkpoint directory, or auto")
    deepspeed_config_path(config.deepspeed_config)


def _check_output(setting: str, folder: Path) -> None:
    """A folder that can be written or made."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{setting} {folder}: {existing} is a file; name another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{setting} {folder}: no permission to write in {existing}; name another folder")


def _check_model_directory(path: Path) -> None:
    """A directory with a config.json; what is in it is checked when the model is read."""
    if not path.exists():
        raise UserError(f"model_path {path} does not exist; expected a downloaded Sa2VA directory, or {EMBEDDED}")
    if not path.is_dir():
        raise UserError(f"model_path {path} is a file; expected the Sa2VA directory that holds config.json")
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise UserError(f"model_path {path} has no config.json (found: {found}); expected a Sa2VA directory")


if __name__ == "__main__":
    if sys.argv[1:] != ["--table"]:
        sys.exit("usage: python -m sft.config --table")
    print(settings_table())
