"""Small images in the layouts of the published data sets."""

import numpy as np
from PIL import Image


def pixels(seed=0, height=24, width=32):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)


def save_image(path, seed=0, height=24, width=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, height, width)).save(path)
    return path
