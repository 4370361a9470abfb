"""Numbers from a seed and a name: the same on every machine, in every version of numpy.

Takes a name and a shape, gives float32. It does not know models; the name alone decides the scale. Only the raw bits of
PCG64 are used: numpy keeps those the same for ever, its distributions not.
"""

import hashlib
import math

import numpy as np

SEED = 20


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 in [-1, 1), its stream chosen by the name."""
    digest = hashlib.sha256(f"{SEED}:{name}".encode()).digest()
    bits = np.random.PCG64(int.from_bytes(digest[:8], "little")).random_raw(math.prod(shape))
    return ((bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - np.float32(1)).reshape(shape)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight of a scale at which every part counts in the result: no default initialisation, no zeros or ones."""
    numbers = uniform(name, shape)
    if name.endswith("bias"):
        return numbers * np.float32(0.2)
    if len(shape) <= 1:  # norms and layer scales
        return numbers * np.float32(0.3) + np.float32(1)
    if "gaussian_matrix" in name:
        return numbers
    fan_in = math.prod(shape[1:])
    gain = (
        0.25 if ".lora_B" in name else 1
    )  # as after some training; larger ones make attention's gradients ill-conditioned
    return numbers * np.float32(gain * math.sqrt(3 / fan_in))
