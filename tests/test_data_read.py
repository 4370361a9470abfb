"""Reading a pair: the pixels that every kind of image and mask file gives."""

import struct
import zlib

import numpy as np
import pytest
from data_files import MASK_HW, H, W, mask_image, only, photo
from PIL import Image

from sft.config import UserError
from sft.data import Pair, check, read


def save_palette(path, colours, indices=None):
    image = Image.fromarray((MASK_HW if indices is None else indices).astype(np.uint8), "L")
    image = Image.frombytes("P", (W, H), image.tobytes())
    image.putpalette([channel for colour in colours for channel in colour])
    image.save(path)


def rgba_mask():
    """White paint that is transparent where there is no vessel."""
    return Image.fromarray(np.dstack([np.full((H, W, 3), 255, np.uint8), MASK_HW.astype(np.uint8) * 255]))


MASK_FORMS = {
    "0/1": lambda path: mask_image(1).save(path),
    "0/255": lambda path: mask_image(255).save(path),
    "one bit": lambda path: mask_image(255).convert("1").save(path),
    "0/65535": lambda path: Image.fromarray(MASK_HW.astype(np.uint16) * 65535).save(path),
    "0/1 in 16 bits": lambda path: Image.fromarray(MASK_HW.astype(np.uint16)).save(path),
    "RGB": lambda path: mask_image().convert("RGB").save(path),
    "RGBA opaque": lambda path: mask_image().convert("RGBA").save(path),
    "RGBA transparent": lambda path: rgba_mask().save(path),
    "LA": lambda path: mask_image().convert("LA").save(path),
    "red on black": lambda path: Image.fromarray(
        np.dstack([MASK_HW * np.uint8(255), *[MASK_HW * np.uint8(0)] * 2])
    ).save(path),
    "palette": lambda path: save_palette(path, [(0, 0, 0), (128, 0, 0)]),
    "palette, white first": lambda path: save_palette(path, [(255, 255, 255), (0, 0, 0)], ~MASK_HW),
    "palette without colours": lambda path: save_palette(path, [(0, 0, 0), (0, 0, 0)]),
}


@pytest.mark.parametrize("form", MASK_FORMS)
def test_every_binary_form_of_a_mask_gives_the_same_pixels(tmp_path, form):
    photo(0).save(tmp_path / "a.png")
    MASK_FORMS[form](tmp_path / "mask.png")
    sample = read(Pair("a", tmp_path / "a.png", tmp_path / "mask.png"))
    assert sample.mask_HW.dtype == bool
    assert np.array_equal(sample.mask_HW, MASK_HW)


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, 255.0)])
def test_a_floating_point_mask_is_read(tmp_path, values):
    photo(0).save(tmp_path / "a.png")
    Image.fromarray(np.where(MASK_HW, values[1], values[0]).astype(np.float32)).save(tmp_path / "mask.tif")
    assert np.array_equal(read(Pair("a", tmp_path / "a.png", tmp_path / "mask.tif")).mask_HW, MASK_HW)


def test_colours_beside_black_must_be_one(tmp_path):
    colours = np.zeros((H, W, 3), np.uint8)
    colours[0, 0], colours[0, 1] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(colours).save(tmp_path / "mask.png")
    photo(0).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"3 values \(#000000, #0000ff, #ff0000\)"):
        read(Pair("a", tmp_path / "a.png", tmp_path / "mask.png"))


def vessel_mask(size=96):
    """Curved lines of 2 and 3 px: what JPEG blurs most."""
    y, x = np.mgrid[:size, :size]
    lines = (abs(y - 30 - 8 * np.sin(x / 9)) < 1.5) | (abs(x - 60 - 9 * np.cos(y / 7)) < 1)
    return lines, Image.fromarray(lines.astype(np.uint8) * 255)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_mask_is_cut_exactly_and_warned_about(tmp_path, mode):
    lines_HW, image = vessel_mask()
    image.convert(mode).save(tmp_path / "mask.jpg", quality=75)
    photo(0, 96, 96).save(tmp_path / "a.png")
    pair = Pair("a", tmp_path / "a.png", tmp_path / "mask.jpg")
    assert np.array_equal(read(pair).mask_HW, lines_HW)
    only(check([pair]).warnings, "mask.jpg: JPEG mask", "cut at 128")


def test_a_jpeg_that_is_no_black_and_white_mask_is_an_error(tmp_path):
    photo(0, 96, 96).save(tmp_path / "a.png")
    for image in (photo(1, 96, 96), Image.fromarray(vessel_mask()[0].astype(np.uint8))):
        image.save(tmp_path / "mask.jpg", quality=95)
        if np.asarray(Image.open(tmp_path / "mask.jpg")).any():
            only(check([Pair("a", tmp_path / "a.png", tmp_path / "mask.jpg")]).errors, "not binary, a JPEG")


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_grey_images_of_more_bits_keep_their_brightness(tmp_path, bits):
    top = 2**bits - 1
    grey_HW = np.zeros((H, W), np.uint16)
    grey_HW[0, :3] = (top, top // 2, 1)
    Image.fromarray(grey_HW).save(tmp_path / "a.png")
    mask_image().save(tmp_path / "mask.png")
    image_HW3 = read(Pair("a", tmp_path / "a.png", tmp_path / "mask.png")).image_HW3
    assert image_HW3.dtype == np.uint8
    assert image_HW3[0, :3, 0].tolist() == [255, 127, 1 if bits == 8 else 0]
    assert np.array_equal(image_HW3[..., 0], image_HW3[..., 2])


def write_png_rgb16(path, rgb_HW3):
    height, width, _ = rgb_HW3.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb_HW3)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_colour_images_of_16_bits_lose_the_low_byte(tmp_path):
    rgb_HW3 = np.zeros((H, W, 3), np.uint16)
    rgb_HW3[0, 0] = (65535, 0x8123, 0x00FF)
    write_png_rgb16(tmp_path / "a.png", rgb_HW3)
    mask_image().save(tmp_path / "mask.png")
    assert read(Pair("a", tmp_path / "a.png", tmp_path / "mask.png")).image_HW3[0, 0].tolist() == [255, 0x81, 0]


IMAGE_FORMS = {
    "RGB": (photo(0), np.asarray(photo(0))),
    "RGBA": (photo(0).convert("RGBA"), np.asarray(photo(0))),
    "transparent RGBA": (Image.merge("RGBA", [*photo(0).split(), Image.new("L", (W, H))]), np.asarray(photo(0))),
    "grey": (photo(0).convert("L"), np.asarray(photo(0).convert("L").convert("RGB"))),
    "palette": (photo(0).quantize(16), np.asarray(photo(0).quantize(16).convert("RGB"))),
    "float 0..1": (Image.fromarray(np.full((H, W), 0.5, np.float32)), np.full((H, W, 3), 128)),
    "float 0..255": (Image.fromarray(np.full((H, W), 9.0, np.float32)), np.full((H, W, 3), 9)),
}


@pytest.mark.parametrize("form", IMAGE_FORMS)
def test_every_form_of_an_image_becomes_rgb(tmp_path, form):
    image, expected = IMAGE_FORMS[form]
    image.save(tmp_path / "a.tif")
    mask_image().save(tmp_path / "mask.png")
    image_HW3 = read(Pair("a", tmp_path / "a.tif", tmp_path / "mask.png")).image_HW3
    assert image_HW3.dtype == np.uint8
    assert np.array_equal(image_HW3, expected)


def test_values_beyond_the_range_are_refused(tmp_path):
    Image.fromarray(np.full((H, W), -1.0, np.float32)).save(tmp_path / "a.tif")
    mask_image().save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="a.tif: values -1 to -1"):
        read(Pair("a", tmp_path / "a.tif", tmp_path / "mask.png"))


def save_turned(path, image, tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    image.save(path, exif=exif)


def test_an_image_with_an_exif_turn_is_turned_like_its_mask(tmp_path):
    upright = photo(0)
    save_turned(tmp_path / "a.png", upright.transpose(Image.Transpose.ROTATE_90), 6)  # stored 12 wide, shown 16 wide
    mask_image().save(tmp_path / "mask.png")
    pair = Pair("a", tmp_path / "a.png", tmp_path / "mask.png")
    assert np.array_equal(read(pair).image_HW3, np.asarray(upright))
    assert not check([pair]).warnings


def test_an_exif_turn_that_the_mask_contradicts_is_not_applied_and_warned_about(tmp_path):
    save_turned(tmp_path / "a.png", photo(0), 6)
    mask_image().save(tmp_path / "mask.png")
    pair = Pair("a", tmp_path / "a.png", tmp_path / "mask.png")
    assert np.array_equal(read(pair).image_HW3, np.asarray(photo(0)))
    only(check([pair]).warnings, "a.png: EXIF orientation 6 is not applied")


def test_an_exif_turn_that_the_size_cannot_settle_is_applied_and_warned_about(tmp_path):
    save_turned(tmp_path / "a.png", photo(0), 3)
    mask_image().save(tmp_path / "mask.png")
    pair = Pair("a", tmp_path / "a.png", tmp_path / "mask.png")
    assert np.array_equal(read(pair).image_HW3, np.asarray(photo(0))[::-1, ::-1])
    only(check([pair]).warnings, "a.png: EXIF orientation 3 is applied")


def test_a_mask_is_turned_by_its_own_tag(tmp_path):
    photo(0).save(tmp_path / "a.png")
    save_turned(tmp_path / "mask.png", mask_image().transpose(Image.Transpose.ROTATE_90), 6)
    assert np.array_equal(read(Pair("a", tmp_path / "a.png", tmp_path / "mask.png")).mask_HW, MASK_HW)


def test_polygons_count_on_the_stored_pixels(tmp_path):
    save_turned(tmp_path / "a.png", photo(0), 6)
    pair = Pair("a", tmp_path / "a.png", polygons=(((3, 2, 9, 2, 9, 5, 3, 5),),))
    sample = read(pair)
    assert np.array_equal(sample.image_HW3, np.asarray(photo(0)))
    assert np.array_equal(sample.mask_HW, MASK_HW)
    only(check([pair]).warnings, "a.png: EXIF orientation 6 is not applied, because polygons")
