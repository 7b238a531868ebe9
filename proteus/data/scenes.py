"""Small rooms drawn by code, with the exact class and distance of every pixel: dense tasks without a data set.

A camera 1.5 m above a floor looks at a wall; balls, boxes and cones stand between. Nearer things are larger, lower in
the picture and less hazy, so that there is something to read distance from.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

CLASSES = ["wall", "floor", "ball", "box", "cone"]
CAMERA = 1.5  # metres above the floor
FARTHEST = 9.0  # metres: no wall stands farther away
HAZE = 8.0  # metres after which 1/e of a colour is left
COLOURS = np.array([[150, 160, 175], [120, 100, 80], [225, 70, 55], [60, 190, 80], [245, 210, 70]], dtype=np.float64)


class Scene(NamedTuple):
    """image: [H, W, 3] uint8.  classes: [H, W] uint8, numbers of CLASSES.  depth: [H, W] float32, metres."""

    image: np.ndarray
    classes: np.ndarray
    depth: np.ndarray


def draw_scene(seed: int, index: int, height: int = 32, width: int = 32) -> Scene:
    """The scene that (seed, index) stand for; nothing else decides it."""
    rng = np.random.default_rng((seed, index))
    rows, columns = np.mgrid[:height, :width] + 0.5  # centres of pixels
    focal, horizon = 0.9 * width, 0.35 * height  # pixels
    wall = rng.uniform(4.0, FARTHEST)
    below = np.maximum(rows - horizon, 1e-6)
    depth = np.minimum(focal * CAMERA / below, wall)  # of the floor where it is nearer than the wall
    classes = np.where(depth < wall, 1, 0)
    base = COLOURS + rng.normal(0, 18, COLOURS.shape)
    # Boards of the floor run away from the viewer, bricks of the wall along it.
    across = (columns - width / 2) * depth / focal
    texture = np.where(classes == 1, np.floor(across * 2) % 2, np.floor((rows - horizon) * depth / focal * 2) % 2)
    colour = base[classes] + 12 * (texture[..., None] - 0.5)
    # Painted from the farthest to the nearest: a nearer thing hides what is behind it.
    for distance in np.sort(rng.uniform(2.0, wall - 0.3, rng.integers(2, 5)))[::-1]:
        label, side = int(rng.integers(2, 5)), rng.uniform(0.8, 1.5) * focal / distance
        left = rng.uniform(-side / 3, width - side * 2 / 3)
        x = (columns - left) / side  # 0 to 1 from left to right
        y = (horizon + focal * CAMERA / distance - rows) / side  # 0 to 1 from the floor up
        inside = {
            2: (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.25,
            3: (abs(x - 0.5) < 0.5) & (abs(y - 0.5) < 0.5),
            4: (abs(x - 0.5) < (1 - y) / 2) & (y > 0),
        }[label]
        shade = {2: 60 * (y - 0.5), 3: 50 * (np.floor(x * 4) % 2 - 0.5), 4: 60 * (0.5 - x)}[label]
        classes, depth = np.where(inside, label, classes), np.where(inside, distance, depth)
        tint = base[label] + rng.normal(0, 18, 3)
        colour = np.where(inside[..., None], tint + shade[..., None], colour)
    left_of_it = np.exp(-depth / HAZE)[..., None]
    image = colour * left_of_it + 200 * (1 - left_of_it) + rng.normal(0, 5, colour.shape)
    return Scene(image.clip(0, 255).round().astype(np.uint8), classes.astype(np.uint8), depth.astype(np.float32))


class SceneSource:
    """`count` drawn scenes as a DenseSource: of their classes, or of their depths."""

    def __init__(self, count: int, seed: int, depth: bool = False, height: int = 32, width: int = 32):
        self.classes = [] if depth else list(CLASSES)
        self._count, self._seed, self._depth, self._size = count, seed, depth, (height, width)

    def __len__(self) -> int:
        return self._count

    def _scene(self, index: int) -> Scene:
        return draw_scene(self._seed, int(index), *self._size)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self._scene(index).image)

    def target(self, index: int) -> np.ndarray:
        scene = self._scene(index)
        return scene.depth if self._depth else scene.classes

    def name(self, index: int) -> str:
        return f"scene {self._seed}:{index}"
