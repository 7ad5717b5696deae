"""What every command and every run folder needs; nothing here knows about super-resolution.

A command ends with one sentence where the user can put something right (`command`). Files are
written in full or not at all (`write_file`) and read without executing anything in them
(`read_checkpoint`). `Run` is the folder of one training run: stopped at any moment, by ctrl-C or by
kill -9, it continues where it was, and on a CPU it ends with the same weights, to the last bit.

Not here: what the stages of a run do. Read train.py next.
"""
import argparse
import io
import json
import math
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

SAVE_SECONDS = 20                    # at most this much work is lost to kill -9


# ---- commands -----------------------------------------------------------------------------------
class WrongUsage(Exception):
    """A sentence about the flags, for the user; the command ends with exit code 2."""


def command(main: Callable[[], None]) -> None:
    """Calls main() and ends the process as a user expects.

    What a user can put right becomes one sentence on stderr (`python -X dev`: and the traceback),
    with exit code 2 for wrong flags, else 1; 130 after ctrl-C. A bug keeps its traceback.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        if sys.flags.dev_mode:
            traceback.print_exc()
        print("error:", sentence, file=sys.stderr)
        sys.exit(2 if isinstance(error, WrongUsage) else 1)


def explain(error: Exception) -> str | None:
    """The sentence for the user; None for a bug."""
    full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if full or "can't allocate memory" in str(error):
        return "out of memory: use smaller tiles, patches or batches"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    known = isinstance(error, (WrongUsage, ValueError, OSError, FloatingPointError))
    return str(error) if known else None


# ---- types of flags, for argparse ---------------------------------------------------------------
def at_least(least: int) -> Callable[[str], int]:
    """The type of an integer of at least `least`."""
    def integer(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least {least}")
        return int(text)
    return integer


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """The type of a number in [low, high); kind: int or float."""
    def parse(text: str):
        value = kind(text)
        if not low <= value < high:
            wrong = f"outside [{low}, {high})"
            if high == math.inf:
                wrong = f"below {low}" if value < low else "no finite number"
            raise argparse.ArgumentTypeError(f"{text} is {wrong}")
        return value
    parse.__name__ = kind.__name__   # argparse then says "invalid float value"
    return parse


def positive(text: str) -> float:
    """The type of a finite number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return float(text)


def usable_device(text: str) -> torch.device:
    """The type of a device on which a tensor can be made."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:    # AssertionError: PyTorch without CUDA
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: try cpu") from error


# ---- files --------------------------------------------------------------------------------------
def write_file(path: str | os.PathLike, content: bytes | Iterable[bytes]) -> None:
    """Writes a file in full or not at all: under a temporary name beside it, then renamed.

    content: all of it, or pieces that are written as they come.
    OSError, naming the path: the folder is missing, the disk is full, or it is no plain file.
    """
    target = Path(os.path.realpath(path))    # a link stays a link: what it points to is replaced
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    if target.exists() and not target.is_file():
        raise OSError(f"cannot write {path}: it is not a plain file, choose another name")
    try:
        with open(temporary, "wb") as file:
            for piece in [content] if isinstance(content, bytes) else content:
                file.write(piece)
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror or error}): check the folder and its "
                      f"free space") from error
    finally:
        with suppress(OSError):   # it has been renamed when all went well
            temporary.unlink()


def read_checkpoint(path: str | os.PathLike, kind: type = dict) -> dict | list:
    """The dict (or the list: official files of duals) in a file of torch.save, on the CPU.

    Only tensors and plain containers are unpickled (`weights_only`), no code is executed.
    ValueError, naming the file: it is missing, damaged, or holds anything else.
    """
    try:
        with warnings.catch_warnings(action="ignore"):    # about old pickle protocols
            state = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: give the path of a checkpoint") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        sentence = f"refused: {path} is not a plain state dict; nothing in it was executed"
        raise ValueError(sentence) from error
    except Exception as error:       # garbage: torch.load raises whatever its parser stumbles over
        sentence = f"{path} is damaged or no checkpoint at all: copy or download it again"
        raise ValueError(sentence) from error
    if not isinstance(state, kind):
        raise ValueError(f"refused: {path} holds a {type(state).__name__}, "
                         f"not the {kind.__name__} of weights expected here")
    return state


# ---- the run folder -----------------------------------------------------------------------------
class Run:
    """The folder of a run: config.json, `<stage>.pt` of finished stages, progress.pt, log.jsonl.

    config: flat and fit for JSON, all that makes a run the same. WrongUsage: the folder holds work
    of another config. parts, below: {name: object with a state_dict}, all that a stage changes.
    """
    def __init__(self, folder: Path, config: dict):
        self.folder = folder
        self.saved = time.monotonic()             # when progress.pt was last written
        check_config(folder, config)
        folder.mkdir(parents=True, exist_ok=True)
        for rest in folder.glob(".*.tmp"):        # what kill -9 left half written
            rest.unlink()
        if not has_work(folder) or not self.has("config.json"):
            self.write_json("config.json", config)

    def write(self, name: str, content: dict) -> None:
        """Writes a file of torch.save, in full or not at all."""
        blob = io.BytesIO()
        torch.save(content, blob)
        write_file(self.folder / name, blob.getvalue())

    def write_json(self, name: str, content: dict) -> None:
        """Likewise, of JSON."""
        write_file(self.folder / name, json.dumps(content, indent=1).encode())

    def has(self, name: str) -> bool:
        """Whether the folder holds this file."""
        return (self.folder / name).exists()

    def read(self, name: str) -> dict | None:
        """The content of a file of torch.save; None where there is no such file."""
        return read_checkpoint(self.folder / name) if self.has(name) else None

    def log(self, **line) -> None:
        """Appends a line to log.jsonl."""
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def finish(self, stage: str, content: dict, started: float, **facts) -> dict:
        """Writes `<stage>.pt`, drops the saved progress, logs the stage; returns the content.

        started: time.monotonic() at its beginning; facts: more for its line in the log.
        """
        self.write(f"{stage}.pt", content)
        (self.folder / "progress.pt").unlink(missing_ok=True)
        self.log(stage=stage, seconds=round(time.monotonic() - started, 1), **facts)
        return content

    def save(self, stage: str, step: int, parts: dict) -> None:
        """Writes to progress.pt how many steps are done, with the parts and random states."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        states = {name: part.state_dict() for name, part in parts.items()}
        self.write("progress.pt", dict(stage=stage, step=step, random=torch.get_rng_state(),
                                       random_cuda=cuda, parts=states))
        self.saved = time.monotonic()

    def resume(self, stage: str, parts: dict) -> int:
        """Puts the saved state of this stage into `parts`; returns how many steps are done."""
        state = self.read("progress.pt")
        if state is None or state["stage"] != stage:
            return 0
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])
        return state["step"]

    @contextmanager
    def resumable(self, stage: str, steps: int, parts: dict, unit: str = "step") -> Iterator[tuple]:
        """A stage that can be stopped and continued after every step, with a progress bar.

        Yields (steps done already, a function to call with the number of steps done after each
        further one). That function raises KeyboardInterrupt when the user asks to stop.
        """
        start = self.resume(stage, parts)
        with stop_signals() as stopped, progress(stage, steps, start, unit) as bar:
            def done(step: int, text: str = "") -> None:
                bar.set_postfix_str(text, refresh=False)
                bar.update()
                if stopped or time.monotonic() - self.saved > SAVE_SECONDS:
                    self.save(stage, step, parts)
                if stopped:
                    raise KeyboardInterrupt
            yield start, done

    def repeat(self, stage: str, steps: int, one_step: Callable, batches: Callable,
               parts: dict, facts: Callable[[], dict] = dict) -> None:
        """The one training loop. FloatingPointError: the loss is not finite.

        one_step: (k, batch) -> loss as a float, for k = 0 .. steps − 1
        batches: the step to start with -> generator of batches
        facts: what the stage adds to its lines in the log, of which there are at most 100
        """
        every = max(1, math.ceil(steps / 100))
        with (self.resumable(stage, steps, parts) as (start, done),
              closing(batches(start)) as source):
            for k in range(start, steps):
                loss = one_step(k, next(source))
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss became {loss} in step {k + 1} of {stage}: lower --rate, or look "
                        f"at the data; finished stages are kept in {self.folder}")
                if (k + 1) % every == 0:
                    self.log(stage=stage, step=k + 1, loss=round(loss, 4), **facts())
                done(k + 1, f"loss {loss:.3f}")


def has_work(folder: Path) -> bool:
    """Whether anything is finished or saved there; before that, flags may still be corrected."""
    return any(folder.glob("*.pt"))


def check_config(folder: Path, config: dict) -> None:
    """WrongUsage: the folder's config.json is not that of a run with this config."""
    file = folder / "config.json"
    if not file.exists() and not has_work(folder):
        return
    known = {}
    with suppress(ValueError, FileNotFoundError):
        known = json.loads(file.read_text())
    if not isinstance(known, dict) or known.keys() != config.keys():
        raise WrongUsage(f"{folder} was made by another version of this program, its config.json "
                         f"is missing or has other entries: give another folder with --run")
    now = json.loads(json.dumps(config))     # as it would be read back: tuples become lists
    for name in sorted(now, key=lambda name: name != "preset"):      # it explains the others
        if known[name] != now[name] and has_work(folder):
            flag = "--" + name.replace("_", "-")
            raise WrongUsage(f"{folder} was made with {flag} {known[name]}, now it is {now[name]}: "
                             f"give the same flags to continue it, or another folder with --run")


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Within it: a list that the first ctrl-C (or SIGTERM) fills; the second interrupts at once."""
    caught = []

    def note(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def progress(stage: str, total: int, start: int = 0, unit: str = "step") -> tqdm:
    """A progress bar for a stage, shown after two seconds."""
    return tqdm(total=total, initial=start, desc=f"{stage:8}", unit=unit, delay=2,
                dynamic_ncols=True)
