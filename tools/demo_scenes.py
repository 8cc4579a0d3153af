"""Scenes of textured, overlapping shapes, drawn with NumPy and OpenCV.

Classes share textures, and families of colours or parts of them: neither tells the
class alone. Both together do, and so does the outline. Size, turn, light and the
surroundings are drawn independently of the class.
"""

from dataclasses import dataclass

import cv2
import numpy as np

# Label 1 is the background, 2 the first shape, and so on; 0 is unlabelled.
COLOURS = dict(
    background=(64, 64, 64),
    disk=(230, 25, 75),
    ring=(60, 180, 75),
    triangle=(255, 225, 25),
    square=(0, 130, 200),
    star=(245, 130, 48),
    cross=(145, 30, 180),
)
CLASSES, PALETTE = tuple(COLOURS), tuple(COLOURS.values())
UNLABELLED, BACKGROUND = 0, 1

# What the classes are made of: a family of colours and a texture.
MATERIALS = dict(
    disk=('warm', 'stripes'),
    ring=('green', 'stripes'),
    triangle=('violet', 'grain'),
    square=('green', 'dots'),
    star=('warm', 'dots'),
    cross=('blue', 'dots'),
)
# Degrees; blue and violet overlap.
HUES = dict(warm=(-20, 50), green=(85, 165), blue=(195, 262), violet=(245, 310))
SATURATION = (0.45, 0.9)
GREY = (0.0, 0.25)  # saturation of backgrounds
TEXTURES = ('grain', 'gradient', 'stripes', 'checks', 'dots', 'clouds')

# How hard the scenes are. Lengths are fractions of the image's side.
SHAPES_PER_SCENE = (3, 7)
RADIUS = (0.14, 0.30)
ASPECT = (0.7, 1.0)
MIN_VISIBLE = 0.5  # of a shape's area, else nobody could tell its class
MIN_CONTRAST = 60.0  # between a shape's colour and what it covers, of 0 ... 441
TEXTURE_STRENGTH = (35.0, 60.0)  # how far a texture brightens and darkens
ROD_SHARE = 0.3  # of the scenes have a rod, an object that no class describes
CROWD_SHARE = 0.1  # of the scenes have a pack of tiny shapes (iscrowd)
CROWD_RADIUS = (0.045, 0.055)
MIN_PIXELS = 16  # an object with fewer visible pixels stays unlabelled

SUPERSAMPLING = 4  # shapes are filled this much finer, for smooth edges


def circle(radius=1.0, start=0.0, stop=2 * np.pi):
    """Returns points (48, 2) of an arc around the origin."""
    angle = np.linspace(start, stop, 48)
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def star(points, inner):
    """Returns corners (2 * points, 2) on the unit circle and an inner one."""
    angle = np.arange(2 * points) * np.pi / points
    radius = np.where(np.arange(2 * points) % 2, inner, 1.0)[:, None]
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def cross(width):
    """Returns the corners (12, 2) of four arms of half that width."""
    arm = np.array([[1, -width], [1, width], [width, width]])
    quarter = np.array([[0, 1], [-1, 0]])
    return np.concatenate([arm @ np.linalg.matrix_power(quarter, n) for n in range(4)])


# Outlines (N, 2) in the unit circle; a second one is a hole.
OUTLINES = dict(
    disk=[circle()],
    ring=[circle(), circle(0.55)],
    triangle=[star(3, 0.5)],
    square=[star(4, np.sqrt(0.5))],
    star=[star(5, 0.42)],
    cross=[cross(0.3)],
)


@dataclass
class Scene:
    """One picture and what is to be seen in it.

    Attributes:
        image: (S, S, 3) uint8, BGR.
        owner: (S, S) int, the index of the object on top, or -1.
        labels: the label of each object.
        crowd: whether an object is a pack of tiny shapes.
    """

    image: np.ndarray
    owner: np.ndarray
    labels: list
    crowd: list

    def objects(self):
        """Yields (label, crowd, visible mask) of what is large enough to see."""
        for index, (label, crowd) in enumerate(
            zip(self.labels, self.crowd, strict=True)
        ):
            mask = self.owner == index
            if label != UNLABELLED and mask.sum() >= MIN_PIXELS:
                yield label, crowd, mask

    def label_map(self):
        """Returns the labels (S, S) uint8 of ADE20K's layout."""
        labels = np.where(self.owner < 0, BACKGROUND, UNLABELLED).astype(np.uint8)
        for label, _, mask in self.objects():
            labels[mask] = label
        return labels


def texture(rng, size, kind):
    """Returns a pattern (S, S, 1) in [0, 1] of random scale and direction."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    u = x * np.cos(angle) + y * np.sin(angle)
    v = y * np.cos(angle) - x * np.sin(angle)
    frequency = 2 * np.pi * rng.uniform(5, 12)
    if kind == 'grain':
        noise = rng.random((size, size), np.float32)
        pattern = 0.5 + 1.5 * (cv2.GaussianBlur(noise, (0, 0), 0.8) - 0.5)
    elif kind == 'gradient':
        pattern = (u - u.min()) / (u.max() - u.min())
    elif kind == 'stripes':
        pattern = 0.5 + np.sin(frequency * u + phase)
    elif kind == 'checks':
        pattern = 0.5 + 2 * np.sin(frequency * u + phase) * np.sin(frequency * v)
    elif kind == 'dots':
        pattern = 2 * np.sin(frequency * u + phase) * np.sin(frequency * v) - 0.5
    else:
        pattern = sum(
            cv2.resize(
                rng.random((n, n), np.float32),
                (size, size),
                interpolation=cv2.INTER_CUBIC,
            )
            * 2
            / n
            for n in (4, 8, 16)
        )
        pattern = (pattern - pattern.min()) / np.ptp(pattern)
    return np.clip(pattern, 0, 1)[..., None].astype(np.float32)


def surface_of(rng, size, material, avoid=None):
    """Returns a surface (S, S, 3), BGR.

    Args:
        rng: the scene's random generator.
        size: side in pixels.
        material: family of colours and texture, or None for greyish surroundings.
        avoid: (3,) BGR that the colour keeps away from.
    """
    family, kind = material or (None, rng.choice(TEXTURES))
    hues, saturation = (HUES[family], SATURATION) if family else ((0, 360), GREY)
    while True:
        hsv = [
            rng.uniform(*hues) % 360,
            rng.uniform(*saturation),
            rng.uniform(0.3, 0.95),
        ]
        colour = 255 * cv2.cvtColor(np.float32([[hsv]]), cv2.COLOR_HSV2BGR)[0, 0]
        if avoid is None or np.linalg.norm(colour - avoid) >= MIN_CONTRAST:
            break
    spread = rng.uniform(*TEXTURE_STRENGTH) * rng.uniform(0.7, 1.0, 3)
    return (colour + spread * (2 * texture(rng, size, kind) - 1)).astype(np.float32)


def fill(outlines, size):
    """Returns the share (S, S) of every pixel that lies inside, even-odd."""
    fine = np.zeros((size * SUPERSAMPLING,) * 2, np.uint8)
    points = [np.round(p * SUPERSAMPLING * 256).astype(np.int32) for p in outlines]
    cv2.fillPoly(fine, points, 255, shift=8)
    small = cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32) / 255


def place(rng, outlines, centre, radius):
    """Turns, squeezes and moves outlines given in the unit circle."""
    angle = rng.uniform(0, 2 * np.pi)
    tilt = rng.uniform(0, np.pi)

    def turn(a):
        return np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])

    squeeze = turn(tilt) @ np.diag([1.0, rng.uniform(*ASPECT)]) @ turn(-tilt)
    return [radius * p @ turn(angle) @ squeeze + centre for p in outlines]


def paint(rng, image, cover, light, material):
    """Paints a textured, shaded surface and its shadow onto the image in place.

    Args:
        rng: the scene's random generator.
        image: (S, S, 3) float32.
        cover: (S, S) float32, the share of each pixel that is covered.
        light: (2,) unit vector in the picture, towards the light.
        material: family of colours and texture, or None.
    """
    size = len(image)
    mask = cover >= 0.5
    avoid = image[mask].mean(0) if mask.any() else None
    shift = np.float32(
        [[1, 0, -0.03 * size * light[0]], [0, 1, -0.03 * size * light[1]]]
    )
    shadow = cv2.warpAffine(cover, shift, (size, size))
    shadow = cv2.GaussianBlur(shadow, (0, 0), 0.015 * size)
    image *= 1 - rng.uniform(0.2, 0.5) * shadow[..., None]

    # Edges that face the light are brighter, as on a cushion.
    height = cv2.GaussianBlur(cover, (0, 0), 0.02 * size)
    slope_y, slope_x = np.gradient(height * 0.05 * size)
    facing = -(slope_x * light[0] + slope_y * light[1])
    shade = 1 + rng.uniform(0.2, 0.6) * facing[..., None]
    surface = surface_of(rng, size, material, avoid) * shade
    image += cover[..., None] * (surface - image)


def develop(rng, image):
    """Returns the image as uint8 under the scene's light, cast and sensor noise."""
    size = len(image)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    falloff = 1 + x * rng.uniform(-0.3, 0.3) + y * rng.uniform(-0.3, 0.3)
    cast = rng.uniform(0.85, 1.15, 3)
    image = 128 + rng.uniform(0.7, 1.15) * (image - 128) + rng.uniform(-25, 25)
    image = image * falloff[..., None] * cast
    image = image + rng.normal(0, rng.uniform(1, 6), image.shape)
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def rod(rng):
    """Returns the outline of a bent rod across the unit square."""
    angle = rng.uniform(0, 2 * np.pi)
    angles = angle + np.array([0, rng.uniform(-np.pi, np.pi), rng.uniform(2.3, 4)])
    radii = np.array([0.8, rng.uniform(0, 0.4), 0.8])
    start, bend, stop = 0.5 + np.stack(
        [radii * np.cos(angles), radii * np.sin(angles)], 1
    )
    t = np.linspace(0, 1, 48)[:, None]
    line = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * stop
    along = np.gradient(line, axis=0)
    across = along[:, ::-1] * [-1, 1] / np.linalg.norm(along, axis=1, keepdims=True)
    half = rng.uniform(0.012, 0.025) * across
    return [np.concatenate([line + half, (line - half)[::-1]])]


def arrange(rng, kind, label):
    """Returns an object's parts, each a list of outlines in the unit square."""
    if kind == 'rod':
        return [rod(rng)]
    outlines = OUTLINES[CLASSES[label - 1]]
    if kind == 'single':
        centre, radius = rng.uniform(0.05, 0.95, 2), rng.uniform(*RADIUS)
        return [place(rng, outlines, centre, radius)]
    centre, radius = rng.uniform(0.2, 0.8, 2), rng.uniform(*CROWD_RADIUS)
    cells = rng.permutation([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)])
    cells = cells + rng.uniform(-0.15, 0.15, cells.shape)
    return [
        place(rng, outlines, centre + 2.3 * radius * cell, radius)
        for cell in cells[: rng.integers(5, 9)]
    ]


def area_of(parts):
    """Returns the area of an object, also of what lies beyond the picture."""
    return sum(
        cv2.contourArea(np.float32(outline)) * (-1) ** hole
        for part in parts
        for hole, outline in enumerate(part)
    )


def draw_scene(seed, split, number, size):
    """Draws one scene, which depends on the arguments alone."""
    rng = np.random.default_rng([seed, split, number])
    image = surface_of(rng, size, None)
    owner = np.full((size, size), -1)
    labels, crowd, needs = [], [], []
    angle = rng.uniform(0, 2 * np.pi)
    light = np.array([np.cos(angle), np.sin(angle)])

    kinds = ['single'] * rng.integers(*SHAPES_PER_SCENE, endpoint=True)
    if rng.random() < ROD_SHARE:
        kinds.insert(rng.integers(1, len(kinds) + 1), 'rod')
    if rng.random() < CROWD_SHARE:
        kinds.insert(0, 'crowd')
    for kind in kinds:
        label = int(rng.integers(BACKGROUND + 1, len(CLASSES) + 1))
        for _ in range(20):  # places to try; a scene may be too full for one more
            parts = arrange(rng, kind, label)
            covers = [fill([size * p for p in part], size) for part in parts]
            mask = np.max(covers, 0) >= 0.5
            # Nobody minds how little is seen of a rod: it has no class.
            needed = 0.0 if kind == 'rod' else MIN_VISIBLE * area_of(parts) * size**2
            seen = np.bincount(owner[~mask] + 1, minlength=len(needs) + 1)[1:]
            if mask.sum() >= needed and np.all(seen >= needs):
                break
        else:
            continue
        material = None if kind == 'rod' else MATERIALS[CLASSES[label - 1]]
        for cover in covers:
            paint(rng, image, cover, light, material)
        owner[mask] = len(needs)
        labels.append(UNLABELLED if kind == 'rod' else label)
        crowd.append(kind == 'crowd')
        needs.append(needed)
    return Scene(develop(rng, image), owner, labels, crowd)
