"""The 8 views of an image: as it is, its mirror image, and their quarter turns."""

import numpy as np

VIEWS = 8


def turned(pixels_HWx: np.ndarray, view: int) -> np.ndarray:
    """An image or mask in one of its 8 views: `view % 4` quarter turns, after mirroring from 4 on."""
    mirrored = pixels_HWx[:, ::-1] if view >= 4 else pixels_HWx
    return np.ascontiguousarray(np.rot90(mirrored, view % 4))
