"""The folder of one training run: stopped at any moment, it continues where it was.

Stopped by ctrl-C, by kill -9 or by a power cut, a run ends on a CPU with the same weights, to the
last bit, when the same command is given again. Only one process works in a folder at a time. Every
finished stage is a file that says of which settings and of which earlier stage it was made: what is
damaged is set aside and made again, what belongs to another run is refused.

Nothing here knows about super-resolution. How commands end (commands.py) and how files are written
and read (disk.py) is offered here, too. Not here: what the stages of a run do. Read train.py next.
"""
import io
import json
import math
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

import parallel
from commands import (
    Bar,
    Terminated,
    WrongUsage,
    at_least,
    command,
    explain,
    filled,
    need,
    number,
    positive,
    progress,
    usable_device,
)
from disk import (
    check_parent,
    length,
    misfit,
    read_checkpoint,
    read_json,
    read_text,
    real,
    set_aside,
    write_file,
)
from owner import (
    NAMES,
    STAGES,
    as_json,
    check_config,
    digest,
    has_work,
    known_config,
    lock,
    refuse_strangers,
)

__all__ = ["Bar", "Run", "WrongUsage", "at_least", "check_parent", "command", "explain", "filled",
           "length", "misfit", "need", "number", "positive", "progress", "read_checkpoint",
           "read_json", "read_text", "real", "usable_device", "write_file"]

SAVE_SECONDS = 20                    # at most this much work is lost to kill -9
MADE = dict(made=dict(config=str, before=(str, None)))       # what every stage file says of itself
PROGRESS = dict(stage=str, step=int, random=Tensor, random_cuda=[Tensor], parts={str: dict})


class Run:
    """The folder of a run: config.json, `<stage>.pt` of finished stages, progress.pt, log.jsonl.

    config: flat and fit for JSON, all that makes a run the same. parts, below: {name: object with a
    state_dict}, all that a stage changes.
    WrongUsage: the folder holds work of another config, or somebody else's files. ValueError: a
    process works in it already.

    Of several processes (parallel.py) all read and only one writes; so they all must see the folder
    and call the methods together.
    """
    def __init__(self, folder: Path, config: dict):
        self.folder = folder
        self.saved = time.monotonic()             # when progress.pt was last written
        self.before = None                        # digest of the latest stage that is done
        self.found = {}                           # finished stages that `look` found,
        self.digests = {}                         # and the digests of their contents
        refuse_strangers(folder)
        known = known_config(folder)
        if known is not None:
            check_config(folder, known, config)
        work = has_work(folder)
        # paths may be spelled in another way now: what stands there decides
        self.config = digest(known if work and known is not None else as_json(config))
        if work and known is None:
            self.check_origin()
        if parallel.is_main():
            self.take(config, keep=work and known is not None)
        parallel.barrier()

    def take(self, config: dict, keep: bool) -> None:
        """Locks the folder, and writes config.json unless that of now is kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock(self.folder)
        for rest in self.folder.glob(".*.tmp"):        # what kill -9 left half written
            if re.sub(r"^\.|\.\d+\.tmp$", "", rest.name) in NAMES:
                rest.unlink()
        if keep:
            return
        if has_work(self.folder) and self.has("config.json"):
            self.set_aside("config.json", "is damaged")
        self.write_json("config.json", config)

    def check_origin(self) -> None:
        """WrongUsage: there is work and no config.json, and no file says that it is of this run."""
        origins = set()
        for stage in ("progress", *STAGES):
            with suppress(ValueError):
                content = read_checkpoint(self.folder / f"{stage}.pt")
                origins.add(None if misfit(content, MADE, "") else content["made"]["config"])
        if origins != {self.config}:
            raise WrongUsage(f"{self.folder} was made with other flags or by another version of "
                             f"this program, its config.json is missing or damaged: give another "
                             f"folder with --run")

    def write(self, name: str, content: dict) -> None:
        """Writes a file of torch.save, in full or not at all."""
        if parallel.is_main():
            blob = io.BytesIO()
            torch.save(content, blob)
            write_file(self.folder / name, blob.getvalue())

    def write_json(self, name: str, content: dict) -> None:
        """Likewise, of JSON."""
        if parallel.is_main():
            write_file(self.folder / name, json.dumps(content, indent=1).encode())

    def has(self, name: str) -> bool:
        """Whether the folder holds this file."""
        return (self.folder / name).exists()

    def read(self, name: str, form=dict) -> dict | None:
        """The content of a file of torch.save; None where there is no such file, or a damaged one,
        which is set aside with a sentence. form: see disk.misfit.
        """
        if not parallel.from_main(lambda: self.has(name)):     # one answer for all processes
            return None
        try:
            content = read_checkpoint(self.folder / name)
            wrong = misfit(content, form, "it")
        except ValueError as error:
            wrong = str(error)
        if wrong is None:
            return content
        self.drop(name, f"is damaged ({wrong})")
        return None

    def drop(self, name: str, why: str) -> None:
        """Sets a file aside when all processes have read it; they all call this."""
        parallel.barrier()
        if parallel.is_main():
            self.set_aside(name, why)
        parallel.barrier()

    def set_aside(self, name: str, why: str) -> None:
        """Sets a file aside, with a sentence; why: what is wrong, "is damaged"."""
        aside = set_aside(self.folder / name)
        print(f"note: {self.folder / name} {why}: it is called {aside.name} now, and made again")

    def log(self, **line) -> None:
        """Appends a line to log.jsonl."""
        if not parallel.is_main():
            return
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    # ---- finished stages ------------------------------------------------------------------------
    def look(self, checks: dict[str, Callable[[dict], object]]) -> bool:
        """Reads all finished stages before any work is done; whether all are there.

        checks: {stage: raises ValueError where the content cannot be of this run}, in order.
        WrongUsage: a stage of another run.
        """
        before = None
        for stage, check in checks.items():
            content = self.read(f"{stage}.pt")
            if content is not None:
                self.refuse_other(stage, content, before)
                try:
                    check(content)
                except ValueError as error:
                    self.drop(f"{stage}.pt", f"is damaged ({error})")
                    content = None
            self.found[stage] = content
            before = self.digests[stage] = content and digest(content)
        return None not in self.found.values()

    def refuse_other(self, stage: str, content: dict, before: str | None) -> None:
        """WrongUsage: a stage made with other settings, or of another file of the stage before.

        before: the digest of that stage; None: it is the first one, or the file is missing.
        """
        file = self.folder / f"{stage}.pt"
        made = content.get("made")
        if misfit(content, MADE, "") or made["config"] != self.config:
            raise WrongUsage(f"{file} belongs to another run or version of this program: move it "
                             f"away, and the stage is done again, or give another folder with "
                             f"--run")
        if before and made["before"] != before:
            raise WrongUsage(f"{file} was not made from the stage before it in this folder: move "
                             f"it away, and the stage is done again, or give another folder with "
                             f"--run")

    def done(self, stage: str) -> dict | None:
        """The content of a stage that `look` found; None: it has to be done (again).

        To be asked in order: where the stage before had to be done again, and came out otherwise,
        this one is of no use any more.
        """
        content = self.found.get(stage)
        if content is None:
            return None
        if content["made"]["before"] != self.before:
            self.drop(f"{stage}.pt", "was made from what is gone")
            return None
        self.before = self.digests[stage]
        return content

    def made(self) -> dict:
        """What a file of this run says of itself."""
        return dict(made=dict(config=self.config, before=self.before))

    def finish(self, stage: str, content: dict, started: float, **facts) -> dict:
        """Writes `<stage>.pt`, drops the saved progress and the report of what was before, logs the
        stage; returns the content.

        started: time.monotonic() at its beginning; facts: more for its line in the log.
        """
        content = content | self.made()
        self.write(f"{stage}.pt", content)
        if parallel.is_main():
            for of_before in ("progress.pt", "report.json"):
                (self.folder / of_before).unlink(missing_ok=True)
        self.log(stage=stage, seconds=round(time.monotonic() - started, 1), **facts)
        self.before = parallel.from_main(lambda: digest(content))
        return content

    # ---- a stage that is under way --------------------------------------------------------------
    def save(self, stage: str, step: int, parts: dict) -> None:
        """Writes to progress.pt how many steps are done, with the parts and random states."""
        if not parallel.is_main():
            return
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        states = {name: part.state_dict() for name, part in parts.items()}
        self.write("progress.pt", dict(stage=stage, step=step, random=torch.get_rng_state(),
                                       random_cuda=cuda, parts=states) | self.made())
        self.saved = time.monotonic()

    def resume(self, stage: str, parts: dict) -> int:
        """Puts the saved state of this stage into `parts`; returns how many steps are done.

        WrongUsage: it is of another run. ValueError: it does not fit.
        """
        state = self.read("progress.pt", PROGRESS)
        parallel.barrier()           # all have read it before one of them writes it anew
        if state is None:
            return 0
        self.refuse_other("progress", state, None)
        if state["stage"] != stage or state["made"]["before"] != self.before:
            return 0
        try:
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])
            torch.set_rng_state(state["random"])
            if state["random_cuda"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["random_cuda"])
        except Exception as error:           # each kind of part raises something else
            raise ValueError(f"{self.folder / 'progress.pt'} does not fit stage {stage} of this "
                             f"run: move it away, and the stage is begun again") from error
        return state["step"]

    @contextmanager
    def resumable(self, stage: str, steps: int, parts: dict, unit: str = "step") -> Iterator[tuple]:
        """A stage that can be stopped and continued after every step, with a progress bar.

        Yields (steps done already, a function to call with the number of steps done after each
        further one). That function raises KeyboardInterrupt when the user asks to stop, in all
        processes after the same step.
        """
        start = self.resume(stage, parts)
        with stop_signals() as stopped, progress(stage, steps, start, unit) as bar:
            def done(step: int, text: str = "") -> None:
                bar.set_postfix_str(text, refresh=False)
                bar.update()
                stopping = parallel.any_of(bool(stopped))
                if stopping or time.monotonic() - self.saved > SAVE_SECONDS:
                    self.save(stage, step, parts)
                if stopping:
                    parallel.barrier()       # torchrun ends the others when the first one ends
                    raise stop(*stopped)
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


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Within it: a list that the first ctrl-C (or SIGTERM) fills; the second interrupts at once."""
    caught = []

    def note(number, frame):
        if caught:
            raise stop(number)
        caught.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop(number: int = signal.SIGINT, *_) -> KeyboardInterrupt:
    """What a signal, of this process or of another one, raises when all is saved."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
