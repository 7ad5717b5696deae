"""Files that are whole or not there, and files from elsewhere that are read without trusting them.

`write_file` writes in full or not at all, power cuts included. `read_checkpoint` and `read_json`
look at the size before they read, execute nothing, and say in one sentence that names the file what
is wrong with it. `misfit` compares what they return with the form that is expected: it is the one
validator of checkpoints, stage files, config.json, report.json and channels.json.

Not here: what the forms are (models.CHECKPOINT, train.py, report.py).
"""
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

LARGEST = 4 << 30                    # bytes of a checkpoint: those of this project have up to 1 GB
LARGEST_TEXT = 64 << 20              # bytes of a text, and of a checkpoint's part without tensors


# ---- writing ------------------------------------------------------------------------------------
def write_file(path: str | os.PathLike, content: bytes | Iterable[bytes]) -> None:
    """Writes a file in full or not at all: under a temporary name beside it, then renamed.

    content: all of it, or pieces that are written as they come.
    When it returns, the file is on the disk and survives a power cut.
    OSError, naming the path: the folder is missing, the disk is full, or it is no plain file.
    """
    target = real(path)                      # a link stays a link: what it points to is replaced
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    if target.is_symlink() or (target.exists() and not target.is_file()):      # a ring of links
        raise OSError(f"cannot write {path}: it is not a plain file, choose another name")
    try:
        with open(temporary, "wb") as file:
            for piece in [content] if isinstance(content, bytes) else content:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror or error}): check the folder and its "
                      f"free space") from error
    finally:
        with suppress(OSError):   # it has been renamed when all went well
            temporary.unlink()


def real(path: str | os.PathLike) -> Path:
    """The absolute path without links; Path.resolve raises RuntimeError where links form a ring."""
    return Path(os.path.realpath(path))


def length(file: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return file.stat().st_size if file.exists() else 0


def check_parent(path: str | os.PathLike) -> None:
    """ValueError: the folder in which a file is to be written does not exist."""
    if not real(path).parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist, create it first")


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk; not every system can, which is no error."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def set_aside(file: Path) -> Path:
    """Renames a file that is of no use to the first free name of FILE.old, FILE.old2, ..."""
    number = 1
    while True:
        target = file.with_name(f"{file.name}.old{number if number > 1 else ''}")
        if not os.path.lexists(target):
            file.rename(target)
            return target
        number += 1


# ---- reading ------------------------------------------------------------------------------------
def read_checkpoint(path: str | os.PathLike, kind: type = dict) -> dict | list:
    """The dict (or the list: official files of duals) in a file of torch.save, on the CPU.

    Only plain tensors and plain containers are unpickled (`weights_only`), no code is executed.
    ValueError, naming the file: it is missing, damaged, too large, or holds anything else.
    """
    try:
        check_size(path, LARGEST)
        check_archive(path)
        with warnings.catch_warnings(action="ignore"):    # about old pickle protocols
            state = torch.load(path, weights_only=True, map_location="cpu")
        strange = [tensor for tensor in tensors_in(state) if not is_plain(tensor)]
    except pickle.UnpicklingError as error:
        sentence = f"refused: {path} is not a plain state dict; nothing in it was executed"
        raise ValueError(sentence) from error
    except Refused:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:       # garbage: torch.load raises whatever its parser stumbles over
        sentence = f"{path} is damaged or no checkpoint at all: copy or download it again"
        raise ValueError(sentence) from error
    if not isinstance(state, kind):
        raise ValueError(f"refused: {path} holds a {type(state).__name__}, "
                         f"not the {kind.__name__} of weights expected here")
    if strange:
        raise ValueError(f"refused: {path} holds tensors that are sparse, quantised, complex or "
                         f"without content: save plain ones")
    return state


class Refused(ValueError):
    """A file that is not even opened."""


def check_size(path: str | os.PathLike, largest: int) -> None:
    """Refused: the file is missing, no plain file (a pipe would wait for ever), or too large."""
    if not os.path.exists(path):
        raise Refused(f"{path} does not exist: check the path")
    if not os.path.isfile(path):
        raise Refused(f"{path} cannot be read: it is a folder or a device, give a file")
    size = os.path.getsize(path)
    if size > largest:
        raise Refused(f"refused: {path} has {size / 2**30:.1f} GiB, no such file of this project "
                      f"has more than {largest / 2**30:g}")


def check_archive(path: str | os.PathLike) -> None:
    """Refused: a zip file that would grow when it is unpacked. torch.save does not compress."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    size = sum(member.file_size for member in members)
    pickles = sum(member.file_size for member in members if member.filename.endswith(".pkl"))
    if size > os.path.getsize(path) or pickles > LARGEST_TEXT:
        raise Refused(f"refused: {path} would fill {size / 2**30:.1f} GiB when it is unpacked, no "
                      f"file of torch.save does: copy or download it again")


def tensors_in(content) -> Iterable[Tensor]:
    """All tensors in nested containers, each container once: a pickle may hold one in itself."""
    waiting = [content]
    seen = set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (dict, list, tuple, set)) and id(item) not in seen:
            seen.add(id(item))
            waiting += [*item, *item.values()] if isinstance(item, dict) else item


def is_plain(tensor: Tensor) -> bool:
    """Whether it is dense, has content, and holds real numbers."""
    return (tensor.layout == torch.strided and tensor.device.type == "cpu"
            and not tensor.is_quantized and not tensor.is_nested and not tensor.is_complex())


def read_text(path: str | os.PathLike, largest: int = LARGEST_TEXT) -> str:
    """The text of a file. ValueError, naming it: missing, too large, or no text."""
    check_size(path, largest)
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def read_json(path: str | os.PathLike, form=dict):
    """The content of a JSON file. ValueError, naming it: see read_text; damaged; another form."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = str(error) if isinstance(error, ValueError) else "nested too deep"
        raise ValueError(f"{path} is damaged or no JSON ({what})") from error
    wrong = misfit(content, form, "it")
    if wrong:
        raise ValueError(f"{path} is damaged or another file: {wrong}")
    return content


# ---- the one validator --------------------------------------------------------------------------
def misfit(value, form, name: str) -> str | None:
    """What is wrong with a value from a file, as half a sentence; None: it has this form.

    form: a type (int: but no bool; float: or int) | (form, ...): one of them fits, None: None |
    [form]: a list of such | {str: form}: a dict with any names | {"a": form, ...}: a dict that
    holds at least these. name: what the sentence calls the value.
    """
    if isinstance(form, tuple):
        found = [misfit(value, each, name) for each in form]
        return None if None in found else found[0]
    if form is None:
        return None if value is None else f"{name} is no None"
    if isinstance(form, type):
        return None if is_a(value, form) else f"{name} is {kind(type(value))}, not {kind(form)}"
    if not is_a(value, type(form)):
        return f"{name} is {kind(type(value))}, not {kind(type(form))}"
    if isinstance(form, list):
        entries = [(f"{name}[{i}]", each, form[0]) for i, each in enumerate(value)]
    elif str in form:
        strange = [key for key in value if not isinstance(key, str)]
        if strange:
            return f"{name} has {kind(type(strange[0]))} where a name should be"
        entries = [(f"{name}[{key[:60]!r}]", each, form[str]) for key, each in value.items()]
    else:
        missing = [key for key in form if key not in value]
        if missing:
            return f"{name} lacks the entry {missing[0]!r}"
        entries = [(key, value[key], each) for key, each in form.items()]
    found = (misfit(each, inner, label) for label, each, inner in entries)
    return next((wrong for wrong in found if wrong), None)


def is_a(value, form: type) -> bool:
    """isinstance, but True is no number, and 1 is a float."""
    if isinstance(value, bool) and form is not bool:
        return False
    return isinstance(value, (int, float) if form is float else form)


def kind(form: type) -> str:
    """The name of a type with its article."""
    article = "an" if form.__name__[0] in "aeiou" else "a"
    return f"{article} {form.__name__}"
