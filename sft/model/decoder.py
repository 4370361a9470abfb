"""The language model's decoder layers, run one by one: recomputed, compiled and graphed as asked, cut short at the end.

Takes embeddings, gives the states at the positions that are read, before the final norm. Wraps the decoder of a
transformers model (Qwen2, Qwen3, Llama, Phi3, and the text halves of Qwen2.5-VL and Qwen3-VL), which keeps its modules,
names and weights. It does not know images, LoRA or losses.

Shapes: B samples, L positions, C width, R positions read per sample, K deepstack maps, M image positions in the batch.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import create_sliding_window_causal_mask

MOST_GRAPHS = 4  # each holds the activations of its shape for as long as the run lasts


class Decoder:
    """Runs the layers of a transformers text model; no module of its own, so that no name changes.

    Attributes:
        recomputed_layers: how many layers, counted from the first, are computed again in the backward pass.
        graph_tokens: largest batch (B * L positions) that is replayed as a CUDA graph while training; 0: none. A
            replay writes where the one before it wrote: take the gradients of a backward pass before the next forward
            pass (`Vector.take_gradients` does), or the next replay changes them.
    """

    def __init__(self, text_model: nn.Module):
        self.text_model = text_model
        self.recomputed_layers = 0
        self.graph_tokens = 0
        self._layer: Callable[..., Tensor] = _layer
        self._graphs: dict[tuple, Callable[..., Tensor]] = {}

    def __call__(
        self,
        embeddings_BLC: Tensor,
        read_BR: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_BL: Tensor | None = None,
        deepstack_KMC: Tensor | None = None,
    ) -> Tensor:
        """States at the read positions, (B, R, C), or at all, (B, L, C), before the final norm.

        Rows are right-padded and attention is causal, so nothing a state depends on is padding.

        Args:
            embeddings_BLC: input embeddings, vision tokens in place.
            read_BR: int64 positions whose state is wanted, None for all.
            position_ids: (1, L), or (3, B, L) for the Qwen-VL families; None counts from 0.
            image_BL: True where a vision token stands; with deepstack_KMC.
            deepstack_KMC: added to the image positions after the first K layers (Qwen3-VL).
        """
        if position_ids is None:
            position_ids = torch.arange(embeddings_BLC.shape[1], device=embeddings_BLC.device)[None]
        cos, sin = self.text_model.rotary_emb(embeddings_BLC, position_ids)
        if read_BR is None:
            read_BR = torch.arange(embeddings_BLC.shape[1], device=embeddings_BLC.device).expand(
                len(embeddings_BLC), -1
            )
        inputs = (embeddings_BLC, read_BR, cos, sin)
        if deepstack_KMC is not None:
            # Spread over all positions here: a graph has no room for a number of image positions that varies.
            maps = embeddings_BLC.new_zeros(len(deepstack_KMC), *embeddings_BLC.shape)
            inputs += (maps.masked_scatter(image_BL[None, ..., None], deepstack_KMC.to(maps.dtype)),)
        return self._graphed(inputs)(*inputs) if self._may_graph(embeddings_BLC) else self._run(*inputs)

    def compile(self) -> None:
        """Compiles the layer that all but the last one share, once per kind of batch; the first passes take some 15 s.

        The last one, cut short, would be compiled apart: 5 s of every start (H200) for a few thousandths of a step.
        """
        # By default torch gives up after 8 kinds: shapes, with and without gradients, with and without a mask.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        self._layer = torch.compile(_layer)

    @property
    def compiled(self) -> bool:
        """Whether `compile` has been called."""
        return self._layer is not _layer

    def _run(
        self, states_BLC: Tensor, read_BR: Tensor, cos: Tensor, sin: Tensor, deepstack_KBLC: Tensor | None = None
    ) -> Tensor:
        layers, masks = self.text_model.layers, self._masks(states_BLC)
        recomputed = self.recomputed_layers if self.text_model.training and torch.is_grad_enabled() else 0
        deepstack = [] if deepstack_KBLC is None else deepstack_KBLC
        for number, layer in enumerate(layers[:-1]):
            run = _recomputed(self._layer) if number < recomputed else self._layer
            states_BLC = run(layer, states_BLC, masks[number], cos, sin)
            if number < len(deepstack):
                states_BLC = states_BLC + deepstack[number]
        run = _recomputed(_end) if len(layers) <= recomputed else _end
        states_BRC = run(layers[-1], states_BLC, read_BR, masks[-1], cos, sin)
        if len(layers) <= len(deepstack):
            states_BRC = states_BRC + deepstack[len(layers) - 1].gather(1, read_BR[..., None].expand_as(states_BRC))
        return states_BRC

    def _masks(self, states_BLC: Tensor) -> list[Tensor | None]:
        """One per layer. None is plain causal attention; only a window shorter than the row needs a mask."""
        config, count = self.text_model.config, len(self.text_model.layers)
        window = getattr(config, "sliding_window", None)
        if window is None or window >= states_BLC.shape[1]:
            return [None] * count
        mask = create_sliding_window_causal_mask(config, states_BLC, None, None, position_ids=None)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * count  # Phi3 has no kinds
        return [mask if kind == "sliding_attention" else None for kind in kinds]

    def _may_graph(self, embeddings_BLC: Tensor) -> bool:
        training = self.text_model.training and torch.is_grad_enabled() and not self.recomputed_layers
        return training and embeddings_BLC.is_cuda and embeddings_BLC.shape[:2].numel() <= self.graph_tokens

    def _graphed(self, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        """The pair of CUDA graphs (forward, backward) of a shape, recorded when the shape comes first."""
        key = tuple((tuple(part.shape), part.dtype) for part in inputs)
        if key not in self._graphs:
            if len(self._graphs) == MOST_GRAPHS:
                return self._run
            samples = tuple(part.detach().clone() for part in inputs)
            # Recording draws dropout masks; a run that resumes records at another step than one that did not.
            random_state = torch.cuda.get_rng_state(inputs[0].device)
            with _capturing_this_thread_alone():
                self._graphs[key] = torch.cuda.make_graphed_callables(_Recorded(self), samples, allow_unused_input=True)
            torch.cuda.set_rng_state(random_state, inputs[0].device)
        return self._graphs[key]


class _Recorded(nn.Module):
    """What `make_graphed_callables` asks for: a module whose parameters the graph reads."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.text_model = decoder.text_model
        self._decoder = decoder

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._decoder._run(*inputs)


@contextlib.contextmanager
def _capturing_this_thread_alone() -> Iterator[None]:
    """Recording does not forbid other threads what it forbids: they put batches together and write features."""
    graph = torch.cuda.graph
    torch.cuda.graph = functools.partial(graph, capture_error_mode="thread_local")
    try:
        yield
    finally:
        torch.cuda.graph = graph


def _recomputed(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return functools.partial(checkpoint, run, use_reentrant=False)  # reentrant: frozen inputs would cut gradients


def _layer(layer: nn.Module, states_BLC: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    return layer(states_BLC, attention_mask=mask, position_embeddings=(cos, sin))


def _end(
    layer: nn.Module, states_BLC: Tensor, read_BR: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor
) -> Tensor:
    """The last layer: attention looks at all positions, but the MLP runs where the state is read and nowhere else."""
    rows_B1 = torch.arange(len(states_BLC), device=states_BLC.device)[:, None]
    if hasattr(layer, "resid_attn_dropout"):  # Phi3's layer does more than add
        return _layer(layer, states_BLC, mask, cos, sin)[rows_B1, read_BR]
    attended_BLC, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(states_BLC), attention_mask=mask, position_embeddings=(cos, sin)
    )
    read_BRC = states_BLC[rows_B1, read_BR] + attended_BLC[rows_B1, read_BR]
    return read_BRC + layer.mlp(layer.post_attention_layernorm(read_BRC))
