"""One image-mask pair, from files to pixels at native size.

Takes a `Pair`; gives a `Sample`, or the decoded parts with remarks for the check. Knows nothing of folders, splits or
other pairs.

What becomes of each kind of file:

- Image, 8 bits: to RGB; an alpha channel is dropped, a palette resolved, grey repeated.
- Image, 16-bit grey: scaled from the smallest of 8, 10, 12, 14 and 16 bits that holds its highest value (a 12-bit
  camera's file is then not black): value * 255 / (2^bits - 1), so 16 bits are divided by 257. 16-bit RGB loses its
  low byte (Pillow).
- Image, floating point: 0..1 is scaled by 255, 0..255 is kept.
- Mask: foreground is whatever is not 0 (not black), and there may be one such value only: 0/1, 0/255, 0/65535, one
  bit, a palette or RGB with two colours, one of them black. Transparent parts are background. A palette whose colours
  do not differ is read by index.
- JPEG mask: cut at 128, if at most 1 % of its pixels lie in 64..191 (quality 30 or better on real vessels; a
  photograph has 45 %).
- EXIF orientation: a mask is turned by its own tag; an image by its tag too, as viewers and annotation tools show it,
  unless only the stored size fits the mask. With polygons the stored pixels count, as upstream reads them.

Shapes: H, W = height and width in pixels; 3 = RGB. Sizes in messages are width x height.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from sft.config import UserError
from sft.data.annotations import OUTSIDE_TOLERANCE_PX, rasterise

GREY_BITS = (8, 10, 12, 14, 16)
JPEG_FORMATS = ("JPEG", "MPO")
JPEG_MASK_CUT = 128
JPEG_MASK_GREY = (64, 192)
JPEG_MASK_GREY_SHARE = 0.01
VALUES_SHOWN = 8


@dataclass(frozen=True)
class Pair:
    """An image and what marks its vessels: a mask file, or polygons (objects of rings); neither is read yet."""

    name: str
    """Unique in the data set."""
    image: Path
    mask: Path | None = None
    polygons: tuple | None = None
    split: str | None = None
    """`train` or `val` if the folders say so."""
    phrase: str | None = None
    """What the mask shows, if the data set says so; None: the configured question."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One pair's pixels at native size."""

    name: str
    image_HW3: np.ndarray
    """uint8, RGB."""
    mask_HW: np.ndarray
    """bool, True on the vessels."""
    phrase: str | None


class Mask(NamedTuple):
    """A decoded mask file."""

    mask_HW: np.ndarray
    """bool."""
    foreground: str
    """The file's value for the vessels, as text; "" if the mask is empty."""
    noisy: bool
    """Whether JPEG noise was cut."""


class Decoded(NamedTuple):
    """A pair's pixels, the bits its image used, and remarks that a reader should see."""

    image_HW3: np.ndarray
    mask_HW: np.ndarray
    bits: int
    remarks: list[str]


def read(pair: Pair) -> Sample:
    """Reads one pair at native size.

    Args:
        pair: as `find_pairs` gives it, with a mask file or polygons.

    Returns:
        The sample: `image_HW3` uint8 RGB and `mask_HW` bool, of equal height and width.

    Raises:
        UserError: a file is missing, broken, of an unknown kind, not binary, or the sizes differ; the message names it.
    """
    mask = None if pair.mask is None else decode_mask(pair.mask)
    decoded = assemble(pair, open_image(pair.image), mask)
    return Sample(pair.name, decoded.image_HW3, decoded.mask_HW, pair.phrase)


def read_image(path: Path) -> np.ndarray:
    """Reads an image that has no mask: uint8 RGB (H, W, 3), turned upright by its EXIF tag.

    Raises:
        UserError: the file is missing, broken, of an unknown kind, or its values cannot be shown.
    """
    image = open_image(path)
    return _to_rgb(path, image if orientation(image) == 1 else ImageOps.exif_transpose(image))[0]


def read_mask(pair: Pair) -> np.ndarray:
    """A pair's mask alone, as `read` gives it: bool (H, W), the size of the image too.

    Raises:
        UserError: as `read` does.
    """
    if pair.mask is not None:
        return decode_mask(pair.mask).mask_HW
    if pair.polygons is None:
        raise UserError(f"{pair.image}: has no mask; add one, or remove the image")
    try:
        with Image.open(pair.image) as image:  # only its header is read
            width, height = image.size
    except Exception:  # as in `open_image`, which tells what is wrong
        width, height = open_image(pair.image).size
    return rasterise(pair.polygons, height, width).mask_HW


def read_image_of(pair: Pair, mask_HW: np.ndarray) -> np.ndarray:
    """A pair's image alone, as `read` gives it: uint8 RGB (H, W, 3).

    Args:
        pair: whose image it is.
        mask_HW: its mask, from `read_mask`: an image is turned like its mask.

    Raises:
        UserError: as `read` does.
    """
    mask = None if pair.mask is None else Mask(mask_HW, "", False)
    return assemble(pair, open_image(pair.image), mask).image_HW3


def open_image(path: Path) -> Image.Image:
    """Opens an image file and decodes all of it.

    Raises:
        UserError: the file is missing, empty, broken, truncated, or holds several frames.
    """
    try:
        with Image.open(path) as image:
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise UserError(
                    f"{path}: holds {image.n_frames} frames; only single images are read: save one frame per file"
                )
            image.load()
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; look at data_root again") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on broken bytes
        reason = "0 bytes" if path.is_file() and not path.stat().st_size else _first_line(error, path)
        raise UserError(f"{path}: cannot be decoded ({reason}); replace the file or remove it") from None
    return image


def decode_mask(path: Path) -> Mask:
    """Decodes a mask file into foreground and background; the module's docstring states the rule.

    Raises:
        UserError: the file cannot be read or is not binary; the message lists its values.
    """
    image = open_image(path)
    jpeg = image.format in JPEG_FORMATS
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if jpeg:
        return _decode_jpeg_mask(path, np.asarray(image.convert("L")))
    levels_HW, colours = _levels(path, image)
    values = _distinct(levels_HW)
    foreground = [value for value in values if value]
    if len(foreground) > 1:
        shown = ", ".join(_shown(value, colours) for value in values[:VALUES_SHOWN])
        more = ", ..." if len(values) > VALUES_SHOWN else ""
        raise UserError(
            f"{path}: mask is not binary, it holds {len(values)} values ({shown}{more});"
            " allowed are 0 and one other value: threshold it, or save each label as its own mask"
        )
    return Mask(levels_HW != 0, _shown(foreground[0], colours) if foreground else "", False)


def assemble(pair: Pair, image: Image.Image, mask: Mask | None) -> Decoded:
    """Turns the image like its mask, converts it to RGB and draws polygons.

    Args:
        pair: whose files these are.
        image: from `open_image`.
        mask: from `decode_mask`; None draws the pair's polygons.

    Raises:
        UserError: no mask at all, sizes differ, or pixels cannot be converted.
    """
    remarks: list[str] = []
    if mask is not None:
        height, width = mask.mask_HW.shape
        image = _turn_like(pair, image, (width, height), remarks)
        if image.size != (width, height):
            raise UserError(
                f"{pair.image}: sizes differ, the image is {image.width}x{image.height}"
                f" and its mask {pair.mask} is {width}x{height}; export both at one size"
            )
        mask_HW = mask.mask_HW
        if mask.noisy:
            remarks.append(
                f"{pair.mask}: JPEG mask, its compression noise is cut at {JPEG_MASK_CUT}; PNG would be exact"
            )
    elif pair.polygons is not None:
        mask_HW = _draw(pair, image, remarks)
    else:
        raise UserError(f"{pair.image}: has no mask; add one, or remove the image")
    image_HW3, bits = _to_rgb(pair.image, image)
    return Decoded(image_HW3, mask_HW, bits, remarks)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation tag, 1 (upright) to 8; 1 if there is none or it is broken."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1
    return value if value in range(1, 9) else 1


def _first_line(error: Exception, path: Path) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.replace(f" {str(path)!r}", "")


def _decode_jpeg_mask(path: Path, levels_HW: np.ndarray) -> Mask:
    low, high = JPEG_MASK_GREY
    highest = int(levels_HW.max())
    grey_share = float(((levels_HW >= low) & (levels_HW < high)).mean())
    if grey_share > JPEG_MASK_GREY_SHARE or 0 < highest < JPEG_MASK_CUT:
        raise UserError(
            f"{path}: mask is not binary, a JPEG with values up to {highest} and {grey_share:.1%} of its pixels in"
            f" {low}..{high - 1} (allowed: 255 and {JPEG_MASK_GREY_SHARE:.0%}); save the mask as PNG with 0 and 255"
        )
    mask_HW = levels_HW >= JPEG_MASK_CUT
    noisy = bool(((levels_HW > 0) & (levels_HW < 255)).any())
    return Mask(mask_HW, "255" if highest else "", noisy)


def _levels(path: Path, image: Image.Image) -> tuple[np.ndarray, bool]:
    """One number per pixel, 0 = black or transparent, and whether the numbers are colours 0xRRGGBB."""
    if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;"):
        levels_HW = np.asarray(image)
        return (levels_HW.astype(np.uint8) if levels_HW.dtype == bool else levels_HW), False
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        rgba_HW4 = np.asarray(image.convert("RGBA")).astype(np.uint16)
        rgb_HW3 = (rgba_HW4[..., :3] * rgba_HW4[..., 3:] // 255).astype(np.uint8)
    else:
        rgb_HW3 = _as_rgb(path, image)
    if image.mode == "P" and (rgb_HW3 == rgb_HW3[:1, :1]).all():
        return np.asarray(image), False  # a palette without colours, as label tools that only write indices leave it
    red_HW, green_HW, blue_HW = (rgb_HW3[..., channel] for channel in range(3))
    if np.array_equal(red_HW, green_HW) and np.array_equal(red_HW, blue_HW):
        return red_HW, False
    return (red_HW.astype(np.uint32) << 16) | (green_HW.astype(np.uint32) << 8) | blue_HW, True


def _distinct(levels_HW: np.ndarray) -> list:
    if levels_HW.size:  # nearly always there are two, which is seen in a tenth of the time
        lowest, highest = levels_HW.min(), levels_HW.max()
        if ((levels_HW == lowest) | (levels_HW == highest)).all():
            return np.unique([lowest, highest]).tolist()
    if levels_HW.dtype == np.uint8:  # counting is ten times faster than the sort in np.unique
        return np.nonzero(np.bincount(levels_HW.ravel(), minlength=256))[0].tolist()
    return np.unique(levels_HW).tolist()


def _shown(value: float, colours: bool) -> str:
    return f"#{value:06x}" if colours else f"{value:g}"


def _turn_like(pair: Pair, image: Image.Image, size: tuple[int, int], remarks: list[str]) -> Image.Image:
    tag = orientation(image)
    if tag == 1:
        return image
    turned = ImageOps.exif_transpose(image)
    if image.size == size and turned.size != size:
        remarks.append(
            f"{pair.image}: EXIF orientation {tag} is not applied, because only the stored size fits its mask"
        )
        return image
    if image.size == size:
        remarks.append(
            f"{pair.image}: EXIF orientation {tag} is applied, as viewers do; the size cannot tell whether the mask was"
            " drawn so: look at one, or save the image without the tag"
        )
    return turned


def _draw(pair: Pair, image: Image.Image, remarks: list[str]) -> np.ndarray:
    if (tag := orientation(image)) != 1:
        remarks.append(
            f"{pair.image}: EXIF orientation {tag} is not applied, because polygons count on stored pixels; check one"
        )
    raster = rasterise(pair.polygons, image.height, image.width)
    if raster.holes:
        remarks.append(
            f"{pair.image}: rings inside rings are read as holes ({raster.holes} in {pair.name}); else split the object"
        )
    if raster.outside_px > OUTSIDE_TOLERANCE_PX:
        remarks.append(
            f"{pair.image}: polygons leave the frame by {raster.outside_px:.0f} px and are cut off; the image is"
            f" {image.width}x{image.height}, were they drawn at another size?"
        )
    return raster.mask_HW


def _to_rgb(path: Path, image: Image.Image) -> tuple[np.ndarray, int]:
    """RGB as uint8 and the bits that one channel of the file used."""
    if image.mode == "F" or image.mode == "I" or image.mode.startswith("I;"):
        grey_HW = np.asarray(image).astype(np.float64)
        low, high = float(grey_HW.min()), float(grey_HW.max())
        limit = 255 if image.mode == "F" else 2 ** GREY_BITS[-1] - 1
        if not 0 <= low <= high <= limit:
            raise UserError(
                f"{path}: values {low:g} to {high:g} cannot be shown; a {image.mode} image may hold 0 to {limit}:"
                " rescale it to 8 or 16 bits"
            )
        if image.mode == "F":
            bits, top = 8, 1.0 if high <= 1 else 255.0
        else:
            bits = next(bits for bits in GREY_BITS if high < 2**bits)
            top = 2.0**bits - 1
        grey_HW = np.rint(grey_HW * (255.0 / top)).astype(np.uint8)
        return np.repeat(grey_HW[..., None], 3, axis=2), bits
    return _as_rgb(path, image), 8


def _as_rgb(path: Path, image: Image.Image) -> np.ndarray:
    try:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except ValueError:  # Pillow has no conversion from LAB, for one
        raise UserError(f"{path}: colours of mode {image.mode} cannot be converted; save the file as RGB") from None
