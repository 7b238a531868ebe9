"""Drawn scenes: rectangles of flat colours, whose colour is their class or tells their depth."""

import numpy as np
import torch
from PIL import Image

from proteus.models import create_model

COLOURS = np.array([[200, 30, 30], [30, 200, 30], [40, 40, 210], [220, 220, 40]], np.uint8)
METRES = np.array([1, 2, 4, 8], np.float32)


class Scenes:
    """Scenes of 40 x 48 pixels; odd ones are 48 x 36. shuffled: each has another scene's classes."""

    def __init__(self, count, seed, shuffled=False, depth=False):
        self.classes = [] if depth else ["red", "green", "blue", "yellow"]
        self.count, self.seed, self.shuffled, self.depth = count, seed, shuffled, depth

    def __len__(self):
        return self.count

    def name(self, index):
        return f"scene {index}"

    def colours(self, index, other=0):
        rng = np.random.default_rng((self.seed, index + other))
        scene = np.zeros((40, 48) if index % 2 == 0 else (48, 36), np.uint8)
        for colour in rng.permutation(4):
            top, left = rng.integers(0, 30), rng.integers(0, 24)
            scene[top : top + rng.integers(10, 24), left : left + rng.integers(10, 24)] = colour
        return scene

    def load(self, index):
        return Image.fromarray(COLOURS[self.colours(index)])

    def target(self, index):
        colours = self.colours(index, 1000 if self.shuffled else 0)
        return METRES[colours] if self.depth else colours


def tiny(**arch):
    """An encoder of patch 4 with random weights."""
    torch.manual_seed(0)
    return create_model(
        "timm/vit_tiny_patch16_224",
        image_size=16,
        **{"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2} | arch,
    )
