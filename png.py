"""Writes a PNG while its rows are being made, so that the picture never has to be in memory.

Pillow writes a picture that it holds as a whole, at four bytes a pixel: for a photograph of
6000×4000 enlarged four times that is 1.5 GB, beside an array of 1.2 GB. The format asks for
neither. It is a signature and a sequence of chunks: IHDR says what follows, the IDATs together are
one zlib stream of all rows, IEND ends it (https://www.w3.org/TR/png-3, Sections 5, 9 and 10). Every
row begins with a byte that says how it was filtered, which is to say, predicted: zlib packs what
the prediction missed, and the small numbers of a photograph's misses pack well.

Not here: files, and other formats (files.py).
"""
import struct
import zlib
from collections.abc import Iterable, Iterator

import numpy as np

COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}      # by channels: grey, with alpha; RGB, with alpha
PAETH = 4                                    # the number of the filter below
ROWS = 32                                    # that are filtered at a time: it bounds the memory


def encode(bands: Iterable[np.ndarray], height: int, width: int, channels: int) -> Iterator[bytes]:
    """Yields a PNG file of height × width pixels, piece by piece.

    bands: uint8 arrays of (rows, width), for one channel, or (rows, width, channels), which follow
    each other from top to bottom; channels: 1 grey, 2 with alpha, 3 RGB, 4 with alpha.
    """
    yield b"\x89PNG\r\n\x1a\n"
    depth, method, filters, interlaced = 8, 0, 0, 0
    yield chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, COLOUR_TYPES[channels],
                                     method, filters, interlaced))
    packer = zlib.compressobj()
    above = np.zeros((1, width, channels), np.uint8)         # the format's row above the first
    for band in bands:
        band = band.reshape(-1, width, channels)
        for top in range(0, len(band), ROWS):
            rows = np.concatenate((above, band[top:top + ROWS]))
            packed = packer.compress(filtered(rows))
            if packed:                       # zlib keeps what is too little to pack
                yield chunk(b"IDAT", packed)
            above = rows[-1:]
    yield chunk(b"IDAT", packer.flush())
    yield chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    """Length, kind, content, and a checksum of the two latter."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(
        ">I", zlib.crc32(kind + content))


def filtered(rows: np.ndarray) -> bytes:
    """Predicts each row but the first by Paeth's rule: (h + 1, w, c) -> the bytes of h rows.

    The neighbours a (left), b (above) and c (above left) predict a + b − c, a plane through them.
    What is subtracted is the neighbour that comes nearest to it. Outside of the picture all is 0.
    """
    left = np.zeros_like(rows)
    left[:, 1:] = rows[:, :-1]
    a, b, c = left[1:].astype(np.int16), rows[:-1].astype(np.int16), left[:-1].astype(np.int16)
    from_a, from_b, from_c = abs(b - c), abs(a - c), abs(a + b - 2 * c)      # of a + b − c
    nearest = np.where(from_b <= from_c, b, c)
    nearest = np.where((from_a <= from_b) & (from_a <= from_c), a, nearest)
    height, width, channels = a.shape
    out = np.full((height, 1 + width * channels), PAETH, np.uint8)
    out[:, 1:] = (rows[1:] - nearest.astype(np.uint8)).reshape(height, -1)   # modulo 256
    return out.tobytes()
