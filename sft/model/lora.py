"""LoRA on the native Sa2VA through peft: which linears, wrap, report, check, save, load.

Takes a `Sa2VA` and a TrainConfig, gives a PeftModel; writes adapters whose keys are the published module paths, so that
`peft.PeftModel.from_pretrained` puts them on the original model. It does not know DeepSpeed, steps or checkpoints.
"""

import json
import pickle
import re
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sft.config import TrainConfig, UserError
from sft.model import dropout, internlm2, key_map, phi3, published
from sft.model.sa2va import Sa2VA

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_SAFETENSORS, ADAPTER_BIN = "adapter_model.safetensors", "adapter_model.bin"
Whole = Callable[[list[nn.Parameter]], AbstractContextManager]
_PREFIX = "base_model.model."  # peft's own, before every module path
_DECODER = "grounding_encoder.sam2_model.mask_decoder"
_ENCODER = "grounding_encoder.sam2_model.vision_encoder.backbone"
_TRAINED_WHOLE = {"text_hidden_fcs": "text_hidden_fcs", "mask_decoder": _DECODER}


def wrap(model: Sa2VA, config: TrainConfig) -> PeftModel:
    """Freezes the model, puts LoRA on the linears of `lora_scope` and frees the modules of `train_modules`.

    Raises:
        UserError: a target name matches no linear of its scope.
    """
    scopes = {scope: _scope_pattern(model, scope, config) for scope in config.lora_scope}
    lora_config = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="|".join(scopes.values()),
        modules_to_save=[_TRAINED_WHOLE[name] for name in config.train_modules] or None,
    )
    torch.manual_seed(config.seed)  # lora_A is drawn here: the same on every rank and in every run of this seed
    peft_model = get_peft_model(model, lora_config)
    dropout.replace_in(peft_model)
    # peft empties it for a plain module; a path, since peft looks for a bare name on the Hub.
    peft_model.peft_config["default"].base_model_name_or_path = str(published.resolve(config.model_path))
    return peft_model


def describe(peft_model: PeftModel, config: TrainConfig) -> list[str]:
    """What LoRA matched and what trains, one line each, for the log."""
    lines = []
    for scope in config.lora_scope:
        root = _scope_root(peft_model.get_base_model(), scope)
        names = [name for name in _lora_layers(peft_model) if name.startswith(root)]
        kinds = Counter(name.rsplit(".", 1)[-1] for name in names)
        listed = ", ".join(f"{kind} x{count}" for kind, count in sorted(kinds.items()))
        lines.append(f"LoRA on {scope}: {len(names)} linears ({listed})")
        if scope == "language_model":
            lines += _language_note(peft_model.get_base_model(), config)
    for module in config.train_modules:
        lines.append(f"Trained whole: {module}")
    trainable, total = peft_model.get_nb_trainable_parameters()
    lines.append(
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
    )
    return lines


class GradientCheck:
    """Proves after the first optimizer step that what should learn moved and nothing else did.

    Zero LoRA gradients leave a finite loss, so nothing else shows them.
    """

    def __init__(self, peft_model: PeftModel, whole: Whole = lambda parameters: nullcontext()):
        """Args: whole: makes parameters whole while inside, where ranks hold slices of them (ZeRO-3)."""
        self._whole = whole
        self.before = _fingerprints(peft_model, self._whole)

    def problems(self, peft_model: PeftModel) -> list[str]:
        """One line per kind of failure, with the names; empty when all is well."""
        after = _fingerprints(peft_model, self._whole)
        moved = {name for name, value in after.items() if not torch.equal(value, self.before[name])}
        trainable = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
        still = sorted(name for name in trainable if ".lora_B." in name and name not in moved)
        thawed = sorted(moved - trainable)
        lines = [f"{len(still)} LoRA B matrices got no update: {', '.join(still[:4])}"] if still else []
        return lines + ([f"{len(thawed)} frozen parameters moved: {', '.join(thawed[:4])}"] if thawed else [])


def save_adapter(directory: Path, peft_model: PeftModel, trainable: dict[str, Tensor], save_format: str) -> None:
    """Writes adapter_config.json and the adapter's weights under published names. Training may go on meanwhile.

    Args:
        directory: exists already.
        peft_model: gives the configuration and peft's naming; its weights are not read.
        trainable: every trainable parameter by its name in `peft_model.named_parameters()`, whole, on the CPU.
        save_format: "safetensors" or "bin".
    """
    state = get_peft_model_state_dict(peft_model, state_dict=trainable, save_embedding_layers=False)
    assert len(state) == len(trainable), "peft dropped parameters"
    heads = internlm2.heads_of(peft_model.get_base_model().decoder.config)
    state = internlm2.fuse_adapter(state, heads) if heads else state
    published = {_rename(name, key_map.published_name, heads): tensor.contiguous() for name, tensor in state.items()}
    assert len(published) == len(state), "two parameters share one published name"
    if save_format == "bin":
        with (directory / ADAPTER_BIN).open("wb") as file:  # given a path, torch would forget why writing failed
            torch.save(published, file)
    else:
        save_file(published, directory / ADAPTER_SAFETENSORS, metadata={"format": "pt"})
    settings = peft_model.peft_config["default"].to_dict()
    settings = internlm2.adapter_settings(settings) if heads else settings
    settings["target_modules"] = _published_pattern(settings["target_modules"])
    settings["modules_to_save"] = [key_map.published_name(name) for name in settings["modules_to_save"] or []] or None
    settings["inference_mode"] = True
    text = json.dumps(settings, indent=2, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    (directory / ADAPTER_CONFIG).write_text(text + "\n")


def load_adapter(peft_model: PeftModel, directory: Path) -> None:
    """Reads an adapter that `save_adapter` wrote into a model wrapped with the same settings.

    Raises:
        UserError: no adapter there, or its tensors are not exactly those the settings ask for.
    """
    published = read_adapter(directory)
    heads = internlm2.heads_of(peft_model.get_base_model().decoder.config)
    native = {_rename(name, key_map.native_name, heads): tensor for name, tensor in published.items()}
    if heads:
        targets = {name.rsplit(".", 1)[-1] for name in _lora_layers(peft_model) if name.startswith("language_model.")}
        native = internlm2.split_adapter(native, targets, heads, directory)
    trainable = {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    expected = get_peft_model_state_dict(peft_model, state_dict=trainable, save_embedding_layers=False)
    missing, left_over = sorted(set(expected) - set(native)), sorted(set(native) - set(expected))
    misshapen = [name for name in set(native) & set(expected) if native[name].shape != expected[name].shape]
    if missing or left_over or misshapen:
        raise UserError(
            f"{directory}: the adapter does not fit these settings: {len(missing)} tensors missing {missing[:2]}, "
            f"{len(left_over)} left over {left_over[:2]}, {len(misshapen)} of another shape {sorted(misshapen)[:2]}; "
            "use the lora_* and train_modules settings in its run's config.json"
        )
    set_peft_model_state_dict(peft_model, native)


def read_adapter(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter directory under their published names; raises UserError if there are none to read."""
    file = next((directory / name for name in (ADAPTER_SAFETENSORS, ADAPTER_BIN) if (directory / name).is_file()), None)
    if file is None:
        raise UserError(
            f"{directory}: no {ADAPTER_SAFETENSORS} and no {ADAPTER_BIN}; give a checkpoint directory of a run"
        )
    try:
        return load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: unreadable adapter ({reason}); give another checkpoint directory") from error


def _scope_root(model: Sa2VA, scope: str) -> str:
    paths = {"language_model": model.decoder_path, "mask_decoder": _DECODER, "sam2_encoder": _ENCODER}
    return paths[scope] + "."


def _scope_pattern(model: Sa2VA, scope: str, config: TrainConfig) -> str:
    """A regular expression for the scope's linears; bare suffixes would also match inside SAM2 and vision towers."""
    root = re.escape(_scope_root(model, scope))
    match scope:
        case "language_model":
            targets = _language_targets(model, config)
            pattern = rf"{root}layers\.\d+\.(self_attn|mlp)\.({'|'.join(targets)})"
            _check_targets(model, root, targets)
        case "mask_decoder":
            pattern = rf"{root}transformer\..*\.(q_proj|k_proj|v_proj|o_proj|proj_in|proj_out)"
        case "sam2_encoder":
            pattern = rf"{root}blocks\.\d+\.(attn\.qkv|attn\.proj|mlp\.proj_in|mlp\.proj_out)"
        case _:
            raise ValueError(f"lora_scope {scope!r}: choose language_model, mask_decoder or sam2_encoder")
    assert any(re.fullmatch(pattern, name) for name, _ in model.named_modules()), f"{scope}: {pattern} matches nothing"
    return pattern


def _language_targets(model: Sa2VA, config: TrainConfig) -> tuple[str, ...]:
    """`lora_target_modules` as this language model's own names."""
    is_phi3 = model.decoder.config.architectures == [phi3.ARCHITECTURE]
    return phi3.lora_targets(config.lora_target_modules) if is_phi3 else config.lora_target_modules


def _check_targets(model: Sa2VA, root: str, targets: tuple[str, ...]) -> None:
    found = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.match(root + r"layers\.", name)
    }
    unknown = [target for target in targets if target not in found]
    if unknown:
        raise UserError(
            f"lora_target_modules: {', '.join(unknown)} is no linear layer of this language model; "
            f"it has {', '.join(sorted(found))}"
        )


def _language_note(model: Sa2VA, config: TrainConfig) -> list[str]:
    """A line where what trains or is saved has other names than lora_target_modules."""
    wanted, targets = config.lora_target_modules, _language_targets(model, config)
    if targets != wanted:
        return [f"  lora_target_modules {', '.join(wanted)} are {', '.join(targets)} in this language model"]
    if internlm2.heads_of(model.decoder.config):
        return ["  saved in InternLM2's own terms: q_proj, k_proj and v_proj as one LoRA of attention.wqkv, exactly"]
    return []


# The native linears of SAM2 and what the published model calls them, as fragments of the target pattern.
_PATTERN_WORDS = (
    (re.escape(f"{_DECODER}."), re.escape("grounding_encoder.sam2_model.sam_mask_decoder.")),
    (re.escape(f"{_ENCODER}."), re.escape("grounding_encoder.sam2_model.image_encoder.trunk.")),
    (r"(q_proj|k_proj|v_proj|o_proj|proj_in|proj_out)", r"(q_proj|k_proj|v_proj|out_proj|layers\.0|layers\.1)"),
    (r"mlp\.proj_in|mlp\.proj_out", r"mlp\.layers\.0|mlp\.layers\.1"),
)


def _published_pattern(pattern: str) -> str:
    for native, outside in _PATTERN_WORDS:
        pattern = pattern.replace(native, outside)
    return pattern


def _lora_layers(peft_model: PeftModel) -> list[str]:
    return [
        name.removeprefix(_PREFIX).removesuffix(".lora_A")
        for name, _ in peft_model.named_modules()
        if name.endswith(".lora_A")
    ]


def _rename(name: str, rename, heads: internlm2.Heads | None) -> str:
    """Renames the module path inside peft's key, leaving peft's prefix and lora suffix."""
    inner = name.removeprefix(_PREFIX)
    path, lora, suffix = inner.partition(".lora_")
    return _PREFIX + rename(path, heads) + lora + suffix


@torch.no_grad()
def _fingerprints(peft_model: PeftModel, whole: Whole) -> dict[str, Tensor]:
    """Two sums per parameter in fp64: enough to see any single update, without keeping a copy of the weights."""
    values = {}
    for name, parameter in peft_model.named_parameters():
        with whole([parameter]):
            flat = parameter.detach().flatten()
            values[name] = torch.stack([flat.sum(dtype=torch.float64), flat.abs().sum(dtype=torch.float64)])
    return values
