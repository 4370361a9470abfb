"""InternLM2's LoRA in Llama's terms: LoRA of q, k and v each, on the published fused `attention.wqkv`. Reference side.

Three LoRA of rank r on three parts of one linear are one LoRA of rank 3 r on the whole: A stacked, each B in the rows
of its part and in its own r columns, zero elsewhere. The gradients of those places are the gradients of the three.

Rows of wqkv: for each key/value head its queries' heads, its key, its value, as the published code takes them apart.
"""

import numpy as np

from parity import seeded

_NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def llama_path(path: str) -> str:
    """What Llama calls a linear of InternLM2; other paths stay."""
    for ours, llamas in _NAMES.items():
        path = path.replace(ours, llamas)
    return path


def join(path: str, shape: tuple[int, int], config: dict) -> np.ndarray:
    """lora_A or lora_B of wqkv, from the seeded matrices of its three parts."""
    whole = np.zeros(shape, np.float32)
    for key, place in _places(path, shape, config).items():
        whole[place] = seeded.weight(key, whole[place].shape)
    return whole


def split(path: str, gradient: np.ndarray, config: dict) -> dict[str, np.ndarray]:
    """The gradient of lora_A or lora_B of wqkv -> those of its three parts."""
    return {key: gradient[place] for key, place in _places(path, gradient.shape, config).items()}


def _places(path: str, shape: tuple[int, int], config: dict) -> dict[str, tuple]:
    groups = config["num_key_value_heads"]
    per_group = config["num_attention_heads"] // groups + 2
    head = config["hidden_size"] // config["num_attention_heads"]
    kinds = np.tile(np.repeat(["q"] * (per_group - 2) + ["k", "v"], head), groups)
    is_a = ".lora_A." in path
    rank = (shape[0] if is_a else shape[1]) // 3
    places = {}
    for index, part in enumerate("qkv"):
        of_part = np.arange(index * rank, (index + 1) * rank)
        rows = of_part if is_a else np.flatnonzero(kinds == part)
        columns = np.arange(shape[1]) if is_a else of_part
        places[path.replace("attention.wqkv", f"self_attn.{part}_proj")] = np.ix_(rows, columns)
    return places
