"""Random pictures, written to files and compared: what the tests of the data share."""
import numpy as np
from PIL import Image


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random uint8 (height, width, 3)."""
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def save(path, array: np.ndarray, **options):
    """Writes a picture and the folders above it; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def same_images(a: dict, b: dict) -> bool:
    """Whether two {scale: image} have the same scales and pixels."""
    return a.keys() == b.keys() and all(np.array_equal(a[s], b[s]) for s in a)
