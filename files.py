"""Picture files: read any kind, write one in full or not at all; and where results go.

Everything inside the project is 8-bit RGB. `decode` turns what people have into that: 16-bit grey,
palettes, CMYK, transparency, pictures that a camera took sideways. What it cannot read becomes one
sentence that names the file. `plan` finds the pictures that a user names and decides what their
enlargements are called, so that nothing is overwritten by accident.

Not here: folders and sets of pictures (data.py, which offers all this again).
"""
import glob
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

import png
from run import WrongUsage, check_parent, real, write_file

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
WHOLE_PIXELS = 1 << 28  # the largest picture written in a format that needs all of it at once
MAX_PIXELS = 1 << 29  # the largest picture read: 536 million pixels, 1.6 GB as RGB
Image.MAX_IMAGE_PIXELS = None  # Pillow's own bound is lower and warns; `decode` checks ours
PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20  # of a PNG's comments and colour profile; Pillow's is 1 MB
# What Pillow may take a file for, whatever it is called. It knows many more, and one of them, EPS,
# starts a program (Ghostscript) on what the file says.
KINDS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000")
ORIENTATION = 0x0112  # the EXIF tag: how the camera was held
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
           4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
           6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}
SAVE_OPTIONS = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}


class Format(NamedTuple):
    """What a file format can hold."""
    alpha: bool
    longest: int                 # side, in pixels


FORMATS = {
    ".png": Format(True, 2**31),
    ".tif": Format(True, 2**31),
    ".tiff": Format(True, 2**31),
    ".webp": Format(True, 16383),
    ".bmp": Format(False, 2**15),
    ".jpg": Format(False, 65500),
    ".jpeg": Format(False, 65500),
}


class Decoded(NamedTuple):
    """A picture file as uint8 arrays."""
    rgb: np.ndarray           # (H, W, 3)
    alpha: np.ndarray | None  # (H, W), where the file has transparency
    grey: bool                # the file has one colour channel; the three of `rgb` are equal


def decode(path: str | os.PathLike) -> Decoded:
    """Reads a picture file of one of KINDS, turned upright as its EXIF tag says.

    Of several frames it is the first. 16-bit grey becomes 8-bit by division by 257, rounded
    (65535 → 255). Colour profiles are ignored.
    Raises ValueError, naming the file, where it is missing, damaged, no picture or too large.
    """
    try:
        with open_picture(path) as image:
            if image.width * image.height <= MAX_PIXELS:
                return to_arrays(image)
            pixels = f"{image.width}x{image.height}"
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: check the path") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ValueError(f"cannot read {path} as a picture ({error}): replace or remove the "
                         f"file") from error
    raise ValueError(f"{path} has {pixels} pixels, above the limit of {MAX_PIXELS}: cut it into "
                     f"smaller pictures")


def open_picture(path: str | os.PathLike) -> Image.Image:
    """Opens a picture file of one of KINDS and reads its header."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is a folder or a device")         # a pipe would be waited for for ever
    return Image.open(path, formats=KINDS)


def to_arrays(image: Image.Image) -> Decoded:
    """Converts any mode of Pillow's; alpha comes from the mode or from a transparent colour."""
    if image.mode == "F":
        raise ValueError("it holds floating-point values, save it with 8 or 16 bits")
    grey = "LA;16B" in raw_modes(image)      # of grey with alpha, 16 bits, Pillow makes RGBA
    image.load()                     # what is damaged raises here, before EXIF is looked at
    turn = UPRIGHT.get(orientation(image))
    if image.mode.startswith("I"):  # I;16 in both byte orders, and I, Pillow's mode of 16-bit PGM
        image = to_8_bit(image)
    if turn is not None:
        image = image.transpose(turn)
    grey = grey or image.mode in ("1", "L", "LA", "La")
    if not image.has_transparency_data:
        return Decoded(np.array(image.convert("RGB")), None, grey)
    rgba = np.array(image.convert("RGBA"))
    return Decoded(np.ascontiguousarray(rgba[..., :3]), rgba[..., 3].copy(), grey)


def orientation(image: Image.Image) -> int:
    """What EXIF says of how the camera was held; 1, upright, where it cannot be read.

    (ImageOps.exif_transpose also writes the other EXIF data anew, and fails where they are broken.)
    """
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:                        # Pillow's parser raises nearly anything
        return 1


def raw_modes(image: Image.Image) -> list[str]:
    """How the samples lie in the file before they are decoded: "RGB", "RGB;16B", "LA;16B"."""
    modes = []
    for _, _, _, arguments in image.tile:
        first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
        modes.append(str(first))
    return modes


def to_8_bit(image: Image.Image) -> Image.Image:
    """Converts 16-bit grey: 65535 / 257 = 255, so white stays white; one grey may be transparent.
    """
    wide = np.asarray(image).astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise ValueError("it holds values outside 0..65535, save it with 8 or 16 bits")
    rounded = ((wide + 128) // 257).astype(np.uint8)
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return Image.fromarray(rounded)
    seen = np.where(wide == key, 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([rounded, seen]))       # LA


def write_image(path: str | os.PathLike, array: np.ndarray) -> None:
    """Writes a picture in the format of the path's extension, in full or not at all.

    array: uint8 (H, W), (H, W, 2) for grey with alpha, (H, W, 3) or (H, W, 4). JPEG gets quality
    95, WebP is lossless.
    Raises ValueError for an unknown extension or an array that the format cannot hold, OSError as
    `run.write_file` does.
    """
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    blob = io.BytesIO()
    try:
        if kind not in Image.SAVE:
            raise ValueError("unknown extension")
        Image.fromarray(array).save(blob, kind, **SAVE_OPTIONS.get(kind, {}))
    except (OSError, TypeError, ValueError) as error:
        what = f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"cannot write {path} from {what} ({error}): use .png and uint8 "
                         f"(H, W, 3)") from error
    write_file(path, blob.getvalue())


def write_rows(path: str | os.PathLike, bands: Iterable[np.ndarray], height: int, width: int,
               channels: int) -> None:
    """Writes a picture that comes in bands of rows from top to bottom, in full or not at all.

    bands: uint8 (rows, width) or (rows, width, channels), as many as make `height` rows; channels
    as in `png.encode`. A PNG is written while they come, so that memory does not grow with the
    picture; for other formats, which Pillow writes, they are put together first.
    Raises as `write_image` does.
    """
    if Path(path).suffix.lower() == ".png":
        write_file(path, png.encode(bands, height, width, channels))
        return
    whole = np.empty((height, width, channels), np.uint8)
    y = 0
    for band in bands:
        whole[y:y + len(band)] = band.reshape(-1, width, channels)
        y += len(band)
    write_image(path, whole[..., 0] if channels == 1 else whole)


def size(image: np.ndarray) -> str:
    """Returns "WxH", as people write it."""
    return f"{image.shape[1]}x{image.shape[0]}"


# ---- which files, and where their results go -----------------------------------------------------
def list_pictures(folder: Path) -> list[Path]:
    """Returns all picture files below a folder, sorted by path.

    Names with a leading dot are leftovers of other programs.
    """
    files = [file for file in folder.rglob("*") if is_picture(file)]
    return sorted(file for file in files if not file.name.startswith("."))


def check_folder(path: str | os.PathLike, what: str = "pictures") -> Path:
    """The path of a folder. ValueError: there is none; what: the pictures that it should hold."""
    folder = Path(path)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "missing"
        raise ValueError(f"{path} is {found}: give a folder of {what}")
    return folder


def some_pictures(folder: Path, what: str = "pictures") -> list[Path]:
    """`list_pictures`; ValueError where there is none."""
    files = list_pictures(folder)
    if not files:
        raise ValueError(f"{folder} holds no picture ({' '.join(sorted(EXTENSIONS))}): give a "
                         f"folder of {what}")
    return files


def is_picture(file: Path) -> bool:
    """Whether it is a file, by its name of a picture."""
    return file.suffix.lower() in EXTENSIONS and file.is_file()


class Job(NamedTuple):
    """A picture and where its enlargement goes."""
    source: Path
    target: Path


def find_inputs(given: list[str]) -> list[tuple[Path, Path]]:
    """[(file, its name within the folder it was found in)] for files, folders and patterns.

    ValueError: one that names no picture.
    """
    found = []
    for text in given:
        path = Path(text)
        if not text:
            raise WrongUsage("a picture's name is empty: give a file, a folder or a pattern")
        if path.is_dir():
            files = list_pictures(path)
            names = [file.relative_to(path) for file in files]
        elif path.exists() or not glob.has_magic(text):
            files = [path]
            names = [Path(path.name)]
        else:
            matches = sorted(Path(match) for match in glob.glob(text, recursive=True))
            files = [file for file in matches if is_picture(file)]
            names = [Path(file.name) for file in files]
        if not files:
            raise ValueError(f"{text}: no picture found ({' '.join(sorted(EXTENSIONS))}), check "
                             f"the path")
        if not files[0].exists():
            raise ValueError(f"{text} does not exist: check the path")
        found += zip(files, names)
    return found


def plan(given: list[str], output: str | None, scale: int, force: bool) -> list[Job]:
    """The pictures to make; WrongUsage where one would overwrite something.

    Without `output` a picture goes beside its original as name_x4.png; `output` may be a file (for
    one picture) or a folder, in which the sub-folders of a given folder are kept.
    """
    inputs = find_inputs(given)
    as_file = output is not None and is_file_name(output)
    if as_file and len(inputs) > 1:
        raise WrongUsage(f"--output {output} is one file, {len(inputs)} pictures were given: "
                         f"give a folder")
    jobs = []
    for source, name in inputs:
        target = source.with_name(f"{source.stem}_x{scale}.png")
        if as_file:
            target = Path(output)
        elif output:
            target = Path(output) / name.parent / target.name
        jobs.append(Job(source, target))
    jobs = without_results(jobs, given, scale)
    check_targets(jobs, force)
    return jobs


def consistency_name(target: Path) -> Path:
    """Where the heat map of an enlarged picture goes (consistency.py)."""
    return target.with_name(f"{target.stem}_consistency.png")


def is_file_name(output: str) -> bool:
    """Whether --output names a file, and no folder: it has the extension of a picture.

    WrongUsage: another extension. What is a folder, or ends with a slash, may be called anything.
    """
    path = Path(output)
    if path.is_dir() or output.endswith(("/", os.sep)) or not path.suffix:
        return False
    if path.suffix.lower() not in FORMATS:
        raise WrongUsage(f"--output {output}: unknown extension, use one of {' '.join(FORMATS)}; "
                         f"for a folder write {output}/")
    return True


def without_results(jobs: list[Job], given: list[str], scale: int) -> list[Job]:
    """Leaves out what an earlier call made of the same folder, and what was given twice.

    scale: as in `plan`; photo_x4.png beside photo.jpg is a result, unless it was given by name.
    """
    named = {real(Path(text)) for text in given}
    resolved = [(real(job.source), real(job.target)) for job in jobs]
    results = {target for source, target in resolved if target != source}
    results |= {source.with_name(f"{source.stem}_x{scale}.png") for source, _ in resolved}
    results |= {consistency_name(target) for target in results}
    results -= named
    kept = {}
    for job, (source, target) in zip(jobs, resolved):
        if source not in results:
            kept.setdefault((source, target), job)
    return list(kept.values())


def check_targets(jobs: list[Job], force: bool) -> None:
    """WrongUsage where two pictures would go to one file, or a file would be overwritten."""
    sources = {real(job.source) for job in jobs}
    taken = {}
    for job in jobs:
        target = real(job.target)
        if target in taken:
            raise WrongUsage(f"{taken[target]} and {job.source} would both be written to "
                             f"{job.target}: give them one by one, with --output FILE")
        if target in sources:
            raise WrongUsage(f"{job.target} is one of the pictures to enlarge, it would be "
                             f"overwritten: give another --output")
        if target.exists() and not force:
            raise WrongUsage(f"{job.target} exists already: give another --output, or --force to "
                             f"overwrite it")
        taken[target] = job.source


def make_folders(jobs: list[Job], output: str | None) -> None:
    """Makes the folder of --output DIR; that of --output FILE must be there.

    ValueError: it is not there, or cannot be made.
    """
    for job in jobs:
        folder = job.target.parent
        if output and job.target == Path(output):
            check_parent(job.target)
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the folder {folder} ({error.strerror}): give another "
                             f"--output") from error


def check_size(job: Job, shape: tuple[int, int], scale: int) -> None:
    """ValueError where the target's format cannot hold the enlarged picture, or not within a few
    gigabytes of memory: all but PNG are written from the whole picture (`write_rows`).
    """
    suffix = job.target.suffix.lower()
    longest = FORMATS[suffix].longest
    height, width = shape
    if max(shape) * scale > longest:
        raise ValueError(f"{job.target}: its format holds {longest} pixels a side, "
                         f"{width}x{height} times {scale} is more: use .png")
    if suffix != ".png" and height * width * scale ** 2 > WHOLE_PIXELS:
        raise ValueError(f"{job.target}: {width}x{height} times {scale} is more than "
                         f"{WHOLE_PIXELS:,} pixels, which only a PNG is written row by row for: "
                         f"use .png")


class Header(NamedTuple):
    """What a picture file says about itself before it is decoded."""
    height: int
    width: int
    wide: bool                   # 16 bits a sample


def look(path: Path) -> Header:
    """Reads the header of a picture file; 1×1 where it cannot be: `decode` will say why.

    Of 16-bit colour Pillow keeps the upper 8 bits without a word. It shows only in the "raw mode",
    how the samples lie in the file: RGB;16B. (BGR;16 is 16 bits for all three colours.)
    """
    try:
        with open_picture(path) as image:
            wide = image.mode.startswith("I")
            for raw in raw_modes(image):
                wide = wide or (";16" in raw and "BGR;16" not in raw)
            return Header(image.height, image.width, wide)
    except Exception:                        # Pillow's decoders raise nearly anything
        return Header(1, 1, False)
