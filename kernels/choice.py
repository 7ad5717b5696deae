"""The choice between ways to compute an operation, by timing them on the GPU that is there.

Which is fastest depends on the GPU, on the versions of everything, and on the sizes. So when an
operation first meets a class of inputs, every way is timed on these inputs, forward with backward
where gradients are wanted: several in PyTorch, and the Triton kernels in several variants of their
tiles. At inference what counts is the time of the GPU, without the launches: a CUDA graph has none
(graphs.py). A step of training waits for the GPU or for Python, depending on its size; there the
time of both is added up. The fastest is kept

    in this process                   `chosen`
    in the cache folder of Triton     for the same GPU, versions, source of the kernels
    in the folder of a training run   `remember_in`: a run that continues computes the same bits

and one line says so. A way that fails for whatever reason counts as infinitely slow, and Triton
must win by 3 %, for PyTorch is the more tested of the two. While a CUDA graph is captured or
torch.compile traces, nothing is timed. If several processes train together, the first one decides.

Not here: the ways themselves (attention.py, pixel_shuffle.py, mlp.py), the variants
(triton_tiles.py), and who may use Triton (switch.py).
"""
import hashlib
import json
import math
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

import parallel
import run
from kernels import switch

CALLS = 4                            # of a way, one after the other, and their mean
CYCLES = 2e9                         # of a GPU in a second, about
ROUNDS = 5                           # in which the ways take turns; the fastest mean counts
MARGIN = 1.03                        # by which Triton must be faster
clock = time.perf_counter

chosen: dict[str, str] = {}          # {class of inputs: name of the way} in this process
failed: dict[str, str] = {}          # {operation: why Triton failed}; PyTorch has taken over
timing = False                       # whether ways are being timed right now
recorded: dict[str, str] = {}        # the choices of the training run,
record: Path | None = None           # and its file for them


# ---- the call -----------------------------------------------------------------------------------
def call(operation: str, kind: str, ways: dict[str, Callable], tensors: tuple, settings: dict):
    """Calls the way of `switch.IMPL` ("triton", or the fastest) and returns its result.

    kind: in words, what the time depends on: sizes, types. ways: {name: function(*tensors,
    **settings)}; "triton" is one of them, others that begin so are its variants, and the first of
    the rest takes over if one of these fails. Then that operation stays with PyTorch, which is said
    once; but if Triton was asked for by name, ValueError.
    """
    torch_way = next(name for name in ways if not is_triton(name))
    compiling = torch.compiler.is_compiling()
    if switch.IMPL == "triton":
        way = "triton"
    elif compiling:
        way = known(f"{operation} {kind}", trains(tensors), tensors[0].device, tuple(ways))
    else:
        way = fastest(f"{operation} {kind}", ways, tensors, settings)
        if operation in failed and is_triton(way):
            way = torch_way
    if compiling or not is_triton(way):
        return ways[way or torch_way](*tensors, **settings)
    try:
        return ways[way](*tensors, **settings)
    except Exception as error:       # the compiler, the driver and Triton each have their own
        give_up(operation, error)
        return ways[torch_way](*tensors, **settings)


def is_triton(way: str | None) -> bool:
    """Whether a way is the Triton kernels, in whatever variant."""
    return way is not None and way.startswith("triton")


def give_up(operation: str, error: Exception) -> None:
    """Leaves an operation to PyTorch from now on, and says so; to be called where Triton failed.

    Raises the error while the ways are timed, where it has its own meaning, or if it is a lack of
    memory, which PyTorch would need more of; ValueError if the kernels were asked for by name.
    """
    if timing or isinstance(error, torch.OutOfMemoryError):
        raise error
    if switch.IMPL == "triton":
        raise ValueError(f"kernels triton: {operation} failed ({reason(error)}); without "
                         f"--kernels triton PyTorch takes over") from error
    if operation not in failed:
        failed[operation] = reason(error)
        switch.say(f"kernels: PyTorch takes over {operation}, Triton failed ({reason(error)})")


def reason(error: Exception) -> str:
    """An exception in a line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:150]}"


def trains(tensors: tuple) -> bool:
    """Whether gradients of any of these are wanted."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def bucket(count: int) -> int:
    """The next power of two, as an exponent: sizes of one bucket share a choice."""
    exponent = 0                     # a loop, since torch.compile may not know the number
    while count > 2**exponent:
        exponent += 1
    return exponent


# ---- the choice ---------------------------------------------------------------------------------
def fastest(kind: str, ways: dict[str, Callable], tensors: tuple, settings: dict) -> str | None:
    """The name of the fastest way for this class of inputs; None where nobody may time them."""
    train = trains(tensors)
    key = full_key(kind, train, tensors[0].device)
    if key in chosen:
        return chosen[key]
    if not may_time(tensors):
        return None

    def decide() -> str:
        return known(kind, train, tensors[0].device, tuple(ways)) or time_all(
            key, ways, tensors, settings, train)

    # In training all processes come here with the same class, and shall compute alike. At
    # inference a process may be on its own, and nobody should wait for the others.
    chosen[key] = parallel.from_main(decide) if train else decide()
    if parallel.is_main():
        note(key, chosen[key])
    return chosen[key]


def may_time(tensors: tuple) -> bool:
    """Whether these are numbers on a device that may be waited for."""
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return all(t is None or type(t) in (Tensor, Parameter) for t in tensors)    # no fakes


def known(kind: str, train: bool, device: torch.device, names: tuple) -> str | None:
    """The choice made before; None where there is none, or one of a way that is no more."""
    key = full_key(kind, train, device)
    way = chosen.get(key) or recorded.get(key) or stored(key)
    return way if way in names else None


known._dynamo_marked_constant = True           # torch.compile asks it, see switch.constant


def time_all(key: str, ways: dict[str, Callable], tensors: tuple, settings: dict,
             train: bool) -> str:
    """Times every way, says the result, and keeps it in Triton's cache folder."""
    global timing
    errors = {}
    seconds = dict.fromkeys(ways, math.inf)
    timing = True
    for name, way in list(ways.items()) * ROUNDS:
        if name not in errors:
            try:
                seconds[name] = min(seconds[name], time_one(way, tensors, settings, train))
            except Exception as error:         # even a lack of memory: another way may need less
                errors[name] = reason(error)
                seconds[name] = math.inf
    timing = False
    triton = min(filter(is_triton, ways), key=seconds.get)
    way = min((name for name in ways if not is_triton(name)), key=seconds.get)
    if triton not in errors and seconds[triton] * MARGIN <= seconds[way]:
        way = triton
    words = [f"{name} {seconds[name] * 1e6:.0f}" for name in ways if name not in errors]
    words += [f"{name} failed ({errors[name]})" for name in errors]
    switch.say(f"kernels: {way} for {key.partition(';')[0]} (µs: {', '.join(words)})")
    if triton not in errors:                   # else the reason is to be said the next time, too
        store(key, way)
    return way


def time_one(way: Callable, tensors: tuple, settings: dict, train: bool) -> float:
    """Seconds of a call of one way; if `train`, with the gradients and with what Python takes."""
    inputs = []
    for t in tensors:
        inputs.append(None if t is None else t.detach().requires_grad_(train and t.requires_grad))
    wanted = [t for t in inputs if t is not None and t.requires_grad]

    def once():
        out = way(*inputs, **settings)
        if train:
            torch.autograd.grad(out, wanted, torch.ones_like(out))

    def all_calls() -> float:
        start = clock()
        for _ in range(CALLS):
            once()
        return clock() - start

    once()                                     # compiles, and fills caches
    if tensors[0].is_cuda:
        with torch.cuda.device_of(tensors[0]):
            of_python, of_gpu = on_the_gpu(all_calls)
        return (of_gpu + of_python if train else of_gpu) / CALLS
    return all_calls() / CALLS


def on_the_gpu(function: Callable[[], float]) -> tuple[float, float]:
    """(seconds that Python takes to ask the GPU, seconds that the GPU takes for it).

    function: asks, and returns how long that took. That the GPU need not wait for Python, it sleeps
    while it is asked.
    """
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    asked = function()
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2 * asked * CYCLES))
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return asked, begin.elapsed_time(end) / 1000


# ---- the memory ---------------------------------------------------------------------------------
def full_key(kind: str, train: bool, device: torch.device) -> str:
    """All that a time depends on, in words."""
    precision = f"tf32 {switch.allows_tf32('matmul')} {switch.allows_tf32('conv')}"
    return f"{kind}, {'training' if train else 'inference'}; {precision}; {surroundings(device)}"


@lru_cache
def surroundings(device: torch.device) -> str:
    """The GPU, the versions, and a hash of the files in this folder."""
    import triton
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    where = "interpreted"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        where = f"{torch.cuda.get_device_name(device)} {major}.{minor}"
    return (f"{where}; torch {torch.__version__}, triton {triton.__version__}, "
            f"cuDNN {torch.backends.cudnn.version()}; source {digest.hexdigest()[:16]}")


def shelf(key: str):
    """The place in Triton's cache folder for one key."""
    from triton.runtime.cache import get_cache_manager
    return get_cache_manager(hashlib.sha256(key.encode()).hexdigest())


def stored(key: str) -> str | None:
    """What an earlier process kept there; None where it kept nothing that can be read."""
    try:
        return Path(shelf(key).get_file("choice.txt")).read_text()
    except (OSError, RuntimeError, TypeError, ValueError):
        return None


def store(key: str, way: str) -> None:
    """Keeps a choice for later processes; a folder that cannot be written to is no error."""
    try:
        shelf(key).put(way, "choice.txt", binary=False)
    except (OSError, RuntimeError):
        return


def remember_in(file: Path | str) -> None:
    """Makes the choices of a training run those in this file, a JSON that further ones join.

    What the file does not hold is decided anew where it is first needed. ValueError: no such file
    of ours.
    """
    global record
    record = Path(file)
    recorded.clear()
    chosen.clear()
    if record.exists():
        try:
            recorded.update(run.read_json(record, {str: str}))
        except ValueError as error:
            raise ValueError(f"{record} is damaged: delete it, and the kernels are timed "
                             f"again") from error


def note(key: str, way: str) -> None:
    """Writes a choice to the file of the training run, in full or not at all."""
    if record is None or recorded.get(key) == way:
        return
    recorded[key] = way
    run.write_file(record, json.dumps(recorded, indent=1).encode())
