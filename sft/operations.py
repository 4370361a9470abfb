"""How many floating point operations a training step needs, and how many a second the device can do.

Takes a model and its prompts, gives operations (a multiplication and an addition are two) and, with seconds, the share
of the device that they use (MFU). Counts what the result needs, whatever the implementation does: nothing for
activations computed twice, nothing for padding, nothing for encoders whose outputs are kept.

Shapes: B samples, L positions of the longest row.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sft.model.preprocess import IGNORED
from sft.model.sa2va import Prompt, Sa2VA

GPU_SIDE, CPU_SIDE = 8192, 1024  # of the square matrices whose product is the measure
PEAK_IN_WORDS = f"""the product of two square matrices in the runs' precision, measured here; {GPU_SIDE} x {GPU_SIDE}
on a GPU, {CPU_SIDE} x {CPU_SIDE} on a CPU, the fastest of five""".replace("\n", " ")
FORMULA = {
    "frozen": "4 x parameters of the frozen linears x tokens: 2 forward, 2 for the gradient with respect to "
    "activations, none for weights that do not train; of the last layer's MLP only at the positions read",
    "lora": "6 x LoRA parameters x tokens: 2 forward, 2 for activations, 2 for weights; the last MLP as above",
    "attention": "6 x layers x heads x head width x tokens^2 of each sample: two products of 2 x tokens^2, half of "
    "which causality leaves, and twice that backward",
    "head": "4 x parameters of the language model head x positions with a label; none without a text loss",
    "mask_decoder": "2 x the forward operations of its linears and convolutions (3 x where it trains), its attention "
    "left out",
}


@dataclass(frozen=True)
class Sizes:
    """What of a model the count depends on."""

    frozen: int
    """Parameters of the linears in the decoder's layers, without the last layer's MLP."""
    frozen_end: int
    """Those of the last layer's MLP."""
    lora: int
    lora_end: int
    attention: int
    """layers x heads x head width."""
    head: int


def sizes_of(model: Sa2VA) -> Sizes:
    """Reads the sizes off a model, wrapped with LoRA or not, also while ZeRO-3 holds its parameters."""
    config, layers = model.decoder.config, model.decoder.layers
    last_mlp = f"{len(layers) - 1}.mlp."
    counts = {(lora, end): 0 for lora in (False, True) for end in (False, True)}
    for name, parameter in layers.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if len(shape) == 2:
            counts[".lora_" in name, name.startswith(last_mlp)] += shape.numel()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head = getattr(model.head.weight, "ds_shape", model.head.weight.shape).numel()
    return Sizes(
        counts[False, False],
        counts[False, True],
        counts[True, False],
        counts[True, True],
        len(layers) * config.num_attention_heads * width,
        head,
    )


def of_tokens(sizes: Sizes, lengths: list[int], labelled: int = 0) -> dict[str, int]:
    """Operations of the language model, forward and backward, by their reason; see FORMULA.

    Args:
        sizes: of the model.
        lengths: tokens of each sample, padding not counted.
        labelled: positions with a label, over all samples.
    """
    tokens, squares = sum(lengths), sum(length**2 for length in lengths)
    return _counted(sizes, tokens, squares, read=len(lengths) + labelled, labelled=labelled)


def _counted(sizes: Sizes, tokens: int, squares: int, read: int, labelled: int) -> dict[str, int]:
    return {
        "frozen": 4 * (sizes.frozen * tokens + sizes.frozen_end * read),
        "lora": 6 * (sizes.lora * tokens + sizes.lora_end * read),
        "attention": 6 * sizes.attention * squares,
        "head": 4 * sizes.head * labelled,
    }


def forward_of(module: nn.Module, call: Callable[[], object]) -> int:
    """Operations of the linears and convolutions of a module in one call, by what passes through them."""
    with _Counter(module) as counter:
        call()
    return counter.total


class _Counter:
    """Adds up the operations of a module's linears and convolutions until it is closed."""

    def __init__(self, module: nn.Module):
        self.total = 0
        kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
        self._handles = [
            part.register_forward_hook(self._count) for part in module.modules() if isinstance(part, kinds)
        ]

    def _count(self, part: nn.Module, inputs: tuple, output: Tensor) -> None:
        match part:
            case nn.Linear():
                self.total += 2 * output.numel() * part.in_features
            case nn.ConvTranspose2d():
                self.total += 2 * inputs[0].numel() * part.weight[0].numel()
            case nn.Conv2d():
                self.total += 2 * output.numel() * part.weight[0].numel()

    def close(self) -> None:
        """Counts no more."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> "_Counter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of two square matrices: the denominator of every MFU. Takes 50 ms on a GPU.

    A run's own random numbers stay as they are: it is asked once in a process, be it for one run or several.
    """
    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE
    own = torch.Generator(device)
    left, right = (torch.randn(side, side, device=device, generator=own).to(dtype) for _ in range(2))
    best_s, rounds = float("inf"), 5
    for number in range(rounds + 2):  # the first two warm up
        _wait(device)
        started_s = time.perf_counter()
        torch.matmul(left, right)
        _wait(device)
        if number >= 2:
            best_s = min(best_s, time.perf_counter() - started_s)
    return 2 * side**3 / best_s


class Effort:
    """The operations of an epoch's batches, without waiting for the GPU.

    The mask decoder's are counted in the first batch, where all pass through its modules, and are the same for all.
    """

    def __init__(self, model: Sa2VA, device: torch.device):
        self._model, self._device = model, device
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)  # tokens, their squares, samples, labels
        self._counter, self._decoder_per_sample = _Counter(model.sam2.mask_decoder), None

    def add(self, prompt: Prompt) -> None:
        """One more batch, whose forward pass is done."""
        lengths_B = lengths_of(prompt).double()
        if self._decoder_per_sample is None:
            self._counter.close()
            trains = any(parameter.requires_grad for parameter in self._model.sam2.mask_decoder.parameters())
            self._decoder_per_sample = (3 if trains else 2) * self._counter.total / len(lengths_B)
        labels = prompt.labels_BL
        labelled = lengths_B.new_zeros(()) if labels is None else (labels != IGNORED).sum().double()
        count = torch.full((), len(lengths_B), dtype=torch.float64, device=self._device)
        self._sums += torch.stack([lengths_B.sum(), lengths_B.square().sum(), count, labelled])

    def row(self, elapsed_s: float) -> dict[str, float]:
        """{"mfu": share of the device's measured peak}, after the first batch."""
        tokens, squares, samples, labelled = (int(value) for value in self._sums.tolist())
        needed = sum(_counted(sizes_of(self._model), tokens, squares, samples + labelled, labelled).values())
        needed += samples * self._decoder_per_sample
        dtype = next(self._model.parameters()).dtype
        return {"mfu": needed / elapsed_s / measured_peak(self._device, dtype)}


def lengths_of(prompt: Prompt) -> Tensor:
    """Tokens of each row without padding: a row ends at [SEG], or behind the last token that has a label."""
    if prompt.labels_BL is None:
        return prompt.seg_position_B + 1
    places_L = torch.arange(prompt.labels_BL.shape[1], device=prompt.labels_BL.device)
    return (places_L * (prompt.labels_BL != IGNORED)).amax(1) + 2  # a label stands before the token it names


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
