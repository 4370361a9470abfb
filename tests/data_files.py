"""Small data sets for tests: pictures and masks with known pixels."""

import numpy as np
from PIL import Image

H, W = 12, 16
MASK_HW = np.zeros((H, W), dtype=bool)
MASK_HW[2:5, 3:9] = True  # 18 of 192 pixels, and different under every turn


def photo(seed, height=H, width=W):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def mask_image(value=255, seed=0):
    """A mask like MASK_HW, moved by seed pixels so that no two are equal."""
    return Image.fromarray(np.roll(MASK_HW, seed, axis=0).astype(np.uint8) * value)


def add_pair(folder, name, seed, images="images", masks="masks", ending=".png", mask_name=None):
    for part in (images, masks):
        (folder / part).mkdir(parents=True, exist_ok=True)
    photo(seed).save(folder / images / f"{name}{ending}")
    mask_image(seed=seed).save(folder / masks / (mask_name or f"{name}.png"))


def add_five_good_pairs(folder):
    """p0 to p4, without a fault."""
    for seed in range(5):
        add_pair(folder, f"p{seed}", seed)
    return folder


def only(lines, *parts):
    """The one line expected, which names all the parts."""
    assert len(lines) == 1, lines
    for part in parts:
        assert part in lines[0]
