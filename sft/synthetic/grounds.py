"""Grounds, distractors and optics of the synthetic images: everything in them but the vessels.

Takes a random generator, sizes and, to draw on, an image; gives grounds, masks of distractors and the developed
picture. Knows nothing of trees, targets or files; `sft.synthetic.looks` puts the parts together.

Array legend: CHW float32 image planes in 0..255, one plane when grey; HW rows and columns. Lengths are px of a
512x512 image.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from sft.synthetic.trees import CENTRE_PX, FRAME_PX, reduced


def retina(rng: np.random.Generator, size_px: int, centre: np.ndarray, radius: float) -> np.ndarray:
    """Coloured ground with vignette, light from one side and choroidal texture, CHW."""
    match rng.choice(4, p=(0.6, 0.2, 0.1, 0.1)):
        case 0:
            colour = rng.uniform((110, 44, 4), (238, 84, 22))
        case 1:
            colour = rng.uniform((150, 85, 40), (225, 140, 105))
        case 2:
            colour = rng.uniform((80, 90, 40), (140, 140, 90))
        case _:
            colour = rng.uniform((90, 60, 50), (235, 110, 70))
    y, x = _grid(size_px)
    x, y = (x - centre[0]) / radius, (y - centre[1]) / radius
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 - rng.uniform(0.0, 0.4) * (x * x + y * y) + rng.uniform(0, 0.4) * (x * np.cos(angle) + y * np.sin(angle))
    light = light + rng.uniform(0.03, 0.12) * smooth_field(rng, size_px, (3, 7))
    image = np.repeat(np.maximum(light, 0.05)[None], 3, 0).astype(np.float32)
    patches = smooth_field(rng, size_px, (10, 24, 48)) * rng.uniform(0.02, 0.09)
    sheen = _streaks(rng, size_px, int(rng.integers(0, 7))) * rng.uniform(0.1, 0.5)
    image[0] += patches * 0.6 + sheen * 0.25
    image[1] += patches * rng.uniform(0.5, 1.3) + sheen
    image[2] += patches + sheen * 0.8
    image *= colour.astype(np.float32)[:, None, None]
    return image


def draw_macula(rng: np.random.Generator, image: np.ndarray, place: np.ndarray, disc_px: float) -> None:
    """A soft dark spot."""
    window, x, y = _window(image, place, 4 * disc_px)
    spot = np.exp(-(x * x + y * y) / (2 * (disc_px * rng.uniform(0.8, 1.5)) ** 2))
    darken(window, spot.astype(np.float32), np.array((0.25, 0.4, 0.3)) * rng.uniform(0.2, 1.2))


def draw_optic_disc(rng: np.random.Generator, image: np.ndarray, place: np.ndarray, disc_px: float) -> None:
    """A bright oval, orange to yellow, with a brighter cup."""
    window, x, y = _window(image, place, 2.2 * disc_px)
    y = y * rng.uniform(0.82, 1.0)
    edge = rng.uniform(0.8, 4.5)
    oval = 1 / (1 + np.exp(np.clip((np.hypot(x, y) - disc_px) / edge, -30, 30)))
    cup_x, cup_y = x - rng.normal(0, 0.25) * disc_px, y - rng.normal(0, 0.15) * disc_px
    cup = np.exp(-(cup_x**2 + cup_y**2) / (2 * (disc_px * rng.uniform(0.25, 0.5)) ** 2))
    colour = image.mean((1, 2)) * rng.uniform((1.3, 1.4, 1.2), (1.6, 2.3, 2.0)) + np.array((25, 15, 3))
    lighten(window, (oval * rng.uniform(0.3, 1.0)).astype(np.float32), np.minimum(colour, 255))
    lighten(window, (cup * oval * rng.uniform(0.1, 0.9)).astype(np.float32), np.array((255, 225, 110)))


def planar_ground(rng: np.random.Generator, look: str, size_px: int, dark: tuple[bool, ...]) -> np.ndarray:
    """The ground behind the trees of a planar look: one plane, or three when it is coloured."""
    light = 1 + rng.uniform(0.03, 0.2) * smooth_field(rng, size_px, (2, 4, 9))
    match look:
        case "octa":
            level = rng.uniform(75, 150) if any(dark) else rng.uniform(20, 65)
            fine, coarse = rng.uniform(0.08, 0.24, 2)
            speckle = fine * smooth_field(rng, size_px, (128,)) + coarse * smooth_field(rng, size_px, (70, 170))
            plane = level * light * (1 + speckle)
        case "angiogram":
            plane = rng.uniform(95, 190) * light * (1 + rng.uniform(0.05, 0.2) * _ribs(rng, size_px))
            plane *= 1 + rng.uniform(0.01, 0.06) * smooth_field(rng, size_px, (24, 60))
        case "cine":
            y, x = _grid(size_px)
            vignette = 1 - rng.uniform(0.25, 0.5) * ((x / CENTRE_PX - 1) ** 2 + (y / CENTRE_PX - 1) ** 2)
            plane = rng.uniform(160, 200) * light * vignette * (1 + 0.12 * _streaks(rng, size_px, 5))
            plane *= 1 + 0.06 * smooth_field(rng, size_px, (16, 36))
        case _:
            grain = rng.uniform(0.01, 0.12) * smooth_field(rng, size_px, (20, 50, 110))
            plane = rng.uniform(80, 165) * light * (1 + grain)
            if rng.random() < 0.7:
                tint = rng.uniform(0.5, 1.3, 3).astype(np.float32)
                return (plane[None] * tint[:, None, None]).astype(np.float32)
    return plane[None].astype(np.float32)


def draw_discs(
    rng: np.random.Generator, image: np.ndarray, probability: float, dark_share: float, tint: np.ndarray
) -> np.ndarray:
    """Round blobs 5-50 px wide, dark or bright, added to the image in place; returns their mask."""
    scale = image.shape[1] / FRAME_PX * 2
    mask = np.zeros(image.shape[1:], bool)
    if rng.random() >= probability:
        return mask
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    radii = (2.5, 9) if rng.random() < 0.5 else (4, 25)
    dark_N = rng.random(int(rng.integers(1, 14))) < dark_share
    for dark in np.unique(dark_N):
        canvas = Image.new("L", (image.shape[1] * 2,) * 2)
        pen = ImageDraw.Draw(canvas)
        for _ in range((dark_N == dark).sum()):
            x, y = rng.uniform(20, FRAME_PX - 20, 2)
            wobble = rng.uniform(*radii) * (1 + 0.08 * np.cos(2 * turn + x) + 0.05 * np.cos(3 * turn + y))
            outline = np.stack((x + wobble * np.cos(turn), y + wobble * np.sin(turn)), 1) * scale
            pen.polygon(outline.ravel().tolist(), fill=int(rng.integers(90, 256)))
        mask |= _blend(rng, image, canvas, bool(dark), tint)
    return mask


def draw_lines(rng: np.random.Generator, image: np.ndarray, probability: float) -> np.ndarray:
    """Long straight or barely bent strokes 1.5-5 px wide, added in place; returns their mask."""
    scale = image.shape[1] / FRAME_PX * 2
    if rng.random() >= probability:
        return np.zeros(image.shape[1:], bool)
    canvas = Image.new("L", (image.shape[1] * 2,) * 2)
    pen = ImageDraw.Draw(canvas)
    along = np.linspace(-1, 1, 13)
    for _ in range(int(rng.integers(1, 6))):
        middle, angle = rng.uniform(0.15, 0.85, 2) * FRAME_PX, rng.uniform(0, np.pi)
        reach = rng.uniform(60, 420)
        sag = rng.normal(0, 0.04) * reach if rng.random() < 0.4 else 0.0
        points = middle + np.outer(along * reach, (np.cos(angle), np.sin(angle)))
        points += np.outer(sag * along**2, (-np.sin(angle), np.cos(angle)))
        width = max(2, round(rng.uniform(1.4, 4.6) * scale))
        pen.line((points * scale).ravel().tolist(), int(rng.integers(110, 256)), width, "curve")
    return _blend(rng, image, canvas, bool(rng.random() < 0.5), rng.uniform(0.6, 1.0, len(image)))


def draw_exudates(rng: np.random.Generator, image: np.ndarray) -> None:
    """Clusters of small bright specks; they are background."""
    scale = image.shape[1] / FRAME_PX
    canvas = Image.new("L", (image.shape[1],) * 2)
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(0, 4)) if rng.random() < 0.5 else 0):
        cluster = rng.uniform(60, FRAME_PX - 60, 2)
        for x, y in cluster + rng.normal(0, 16, (int(rng.integers(3, 20)), 2)):
            half_x, half_y = rng.uniform(0.8, 3.5, 2)
            box = np.array((x - half_x, y - half_y, x + half_x, y + half_y)) * scale
            pen.ellipse(box.tolist(), fill=int(rng.integers(80, 220)))
    if canvas.getbbox():
        alpha = np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.8)), np.float32) / np.float32(300)
        lighten(image, alpha, np.array((250, 215, 120)))


def field_of_view(rng: np.random.Generator, size_px: int, centre: np.ndarray, radius: float) -> np.ndarray:
    """A soft-edged round field of view, sometimes cut off above and below, in [0, 1]."""
    y, x = _grid(size_px)
    soft = rng.uniform(0.6, 2.5)
    view = np.clip((radius - np.hypot(x - centre[0], y - centre[1])) / soft + 0.5, 0, 1)
    if rng.random() < 0.1:
        view = view * (np.abs(y - centre[1]) < radius * rng.uniform(0.75, 0.95))
    return view.astype(np.float32)


def finish(
    rng: np.random.Generator, image: np.ndarray, cast: np.ndarray, grain: float, blur: float, coarse: float
) -> np.ndarray:
    """Blur as of the optics, then grain that grows with the signal; one or three planes become HW3 uint8."""
    size_px = image.shape[1]
    noise = rng.standard_normal((size_px, size_px), dtype=np.float32)
    if coarse > 0:
        half = rng.standard_normal((size_px // 2, size_px // 2), dtype=np.float32) * np.float32(1.6)
        noise *= np.float32(1 - coarse)
        noise += _upsampled(Image.fromarray(half), size_px, coarse)
    pixels = [Image.fromarray(plane.astype(np.uint8)).filter(ImageFilter.BoxBlur(blur)) for plane in image]
    planes = [np.asarray(plane).astype(np.float32) for plane in pixels]
    noise *= np.float32(grain / 16) * np.sqrt(planes[len(planes) // 2] + np.float32(5))
    result = np.empty((size_px, size_px, 3), np.uint8)
    for channel, gain in enumerate(rng.uniform(0.7, 1.3, 3) if len(planes) == 3 else np.ones(3)):
        value = planes[channel % len(planes)] + noise * np.float32(gain)
        value *= np.float32(cast[channel])
        result[..., channel] = np.clip(value + np.float32(0.5), 0, 255, out=value)
    return result


def darken(image: np.ndarray, alpha_HW: np.ndarray, absorbed_C: np.ndarray) -> None:
    """Multiply by 1 - alpha * absorbed, plane by plane."""
    for plane, share in zip(image, absorbed_C, strict=True):
        plane *= 1 - alpha_HW * np.float32(share)


def lighten(image: np.ndarray, alpha_HW: np.ndarray, colour_C: np.ndarray) -> None:
    """Move by alpha towards a colour, plane by plane."""
    for plane, level in zip(image, colour_C, strict=True):
        plane += alpha_HW * (np.float32(level) - plane)


def smooth_field(rng: np.random.Generator, size_px: int, cells: tuple[int, ...]) -> np.ndarray:
    """A smooth random field of about unit standard deviation, the sum of one octave per number of cells; HW float32."""
    grid_px = min(size_px, max(128, 2 * max(cells)))
    total = np.zeros((grid_px, grid_px), np.float32)
    for count in cells:
        knots = Image.fromarray(rng.standard_normal((count + 1, count + 1), dtype=np.float32))
        total += np.asarray(knots.resize((grid_px, grid_px), Image.Resampling.BICUBIC))
    total *= np.float32(1.25 / np.sqrt(len(cells)))
    np.tanh(total / 2, out=total)  # no blots
    total *= 2
    return np.asarray(Image.fromarray(total).resize((size_px, size_px), Image.Resampling.BILINEAR))


def _blend(
    rng: np.random.Generator, image: np.ndarray, canvas: Image.Image, dark: bool, tint: np.ndarray
) -> np.ndarray:
    """Blend a 2x canvas of strengths into the image; returns the pixels it covers by more than half."""
    alpha = np.asarray(canvas.reduce(2), np.float32) * np.float32(rng.uniform(0.25, 0.8) / 255)
    if dark:
        darken(image, alpha, tint)
    else:
        lighten(image, alpha, np.maximum(image.mean((1, 2)) * 1.5, 150 + 100 * tint[::-1]))
    return reduced(np.asarray(canvas) != 0, 2) > 0.5


def _ribs(rng: np.random.Generator, size_px: int) -> np.ndarray:
    """Broad soft bands, as bones leave on an X-ray, in about [-1, 1]."""
    canvas = Image.new("L", (128, 128))
    pen = ImageDraw.Draw(canvas)
    tilt, gap = rng.uniform(-0.5, 0.5), rng.uniform(20, 40)
    x = np.linspace(-10, 138, 12)
    for number in range(int(rng.integers(0, 6))):
        y = rng.uniform(-10, 30) + number * gap + tilt * x + 14 * np.sin(x / 60 + rng.uniform(0, 6))
        pen.line(np.stack((x, y), 1).ravel().tolist(), int(rng.integers(60, 255)), int(rng.integers(4, 13)))
    return _upsampled(canvas.filter(ImageFilter.GaussianBlur(rng.uniform(1, 3))), size_px)


def _streaks(rng: np.random.Generator, size_px: int, count: int) -> np.ndarray:
    """A few soft bright streaks of any direction, in [0, 1]."""
    canvas = Image.new("L", (128, 128))
    pen = ImageDraw.Draw(canvas)
    for _ in range(count):
        start, angle = rng.uniform(0, 128, 2), rng.uniform(0, 2 * np.pi)
        steps = np.cumsum(np.full(6, rng.uniform(2, 7)))
        heading = angle + np.cumsum(rng.normal(0, 0.25, 6))
        points = start + np.stack((steps * np.cos(heading), steps * np.sin(heading)), 1)
        pen.line(points.ravel().tolist(), int(rng.integers(80, 255)), int(rng.integers(1, 6)))
    return _upsampled(canvas.filter(ImageFilter.GaussianBlur(rng.uniform(1, 2.5))), size_px)


def _upsampled(image: Image.Image, size_px: int, scale: float = 1 / 255) -> np.ndarray:
    """Bilinear enlargement of a small picture to HW float32."""
    plane = Image.fromarray(np.asarray(image, np.float32))
    return np.asarray(plane.resize((size_px, size_px), Image.Resampling.BILINEAR)) * np.float32(scale)


def _window(image: np.ndarray, place: np.ndarray, reach_px: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The part of the image (a view) around a place, with x of shape (1, W) and y of shape (H, 1) from there."""
    size_px = image.shape[1]
    y, x = _grid(size_px)
    (left, top), (right, bottom) = (
        np.clip((place + sign * reach_px) * size_px / FRAME_PX, 0, size_px).astype(int) for sign in (-1, 1)
    )
    return image[:, top:bottom, left:right], x[:, left:right] - place[0], y[top:bottom] - place[1]


def _grid(size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres (y of shape (H, 1), x of shape (1, W)) in px at 512, float32."""
    centres = ((np.arange(size_px) + 0.5) * FRAME_PX / size_px).astype(np.float32)
    return centres[:, None], centres[None, :]
