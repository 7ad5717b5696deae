"""Several processes that train one network: `torchrun --nproc_per_node=N train.py ...`.

Every process holds the whole network and works on its share of the batch. The loss is a mean over
the patches, so the mean of the shares' losses, weighted by their sizes, is the loss of the whole
batch, and the same holds for every gradient. `average` and `add_up` compute it by a sum over the
processes ("all-reduce"), after which all of them hold the same numbers, take the same step and make
the same choice. So the batch is --batch, however many processes share it.

    process 0     has the word: only it writes files, logs, prints and makes the report
    CPUs, GPUs    the sums go through gloo on CPUs and through NCCL on GPUs, a GPU to each process
    BatchNorm     takes its statistics from the whole batch (`BatchNorm` below)
    data          every process cuts the whole batch and keeps its share: content stays a matter of
                  (seed, step) alone
    drop path     each process draws for its own patches, from (seed, step, process): other draws
                  than those of one process, of the same chance

On CPUs the shares may be unequal. Sums of another order differ in the last bits, and training
enlarges that; N processes are as one only so far. PyTorch's DistributedDataParallel is not used: it
sees neither the gradients of the search, which no backward() puts in place, nor those of the
selection, and takes equal shares for granted. What it does better is to send while it computes.

Without torchrun every function here does nothing. Not here: what is shared out (fitting.py and
train.py). Read fitting.py next.
"""
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

PATIENCE = timedelta(seconds=50)     # a process that does not answer for so long has ended
PATIENT = None                       # the group whose members wait for process 0, whatever it takes


# ---- who there is -------------------------------------------------------------------------------
def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """The number of this process, 0 for the one that has the word."""
    return int(os.environ["RANK"]) if launched() else 0


def is_main() -> bool:
    return rank() == 0


def world() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# ---- begin and end ------------------------------------------------------------------------------
def start() -> None:
    """Joins the processes that torchrun started, if it did. From here on all but one are silent.

    Comes before anything is put on a GPU: "cuda" then is the GPU of this process.
    """
    global PATIENT
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1:
        return
    if not is_main():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        # a sum that is not answered then raises an error here and does not abort the process
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    with connected():
        dist.init_process_group(backend, timeout=PATIENCE)
        PATIENT = dist.new_group(backend="gloo", timeout=timedelta(days=30))


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ["LOCAL_RANK"])


def place(device: torch.device) -> torch.device:
    """The device of this process: its own GPU where `device` is one.

    ValueError: the machine has fewer GPUs than processes.
    """
    if world() == 1 or device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if int(os.environ["LOCAL_WORLD_SIZE"]) > count:
        raise ValueError(f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes here, and "
                         f"there are {count} GPUs: give --nproc_per_node={count}, or --device cpu")
    return torch.device("cuda", local_rank())


def leave() -> None:
    """Parts from the others: what follows is the matter of one process."""
    if world() > 1:
        barrier()                    # nobody is cut off in the middle of the last sum
        dist.destroy_process_group()


def audible() -> str:
    """Lets a process speak again, for its error; returns "process 1 of 2: " if it was silent."""
    if is_main():
        return ""
    sys.stderr = sys.__stderr__
    return f"process {rank()} of {os.environ['WORLD_SIZE']}: "


# ---- sums over the processes --------------------------------------------------------------------
@contextmanager
def connected():
    """Within it, an error of the connection becomes a sentence (ConnectionError)."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"another process of this run has ended or did not answer for {PATIENCE.seconds} "
            f"seconds: give the same command again, it continues from what was saved last; any "
            f"number of processes may do that") from error


def add_up(tensors: list[Tensor]) -> None:
    """Replaces each tensor, all on one device, by its sum over the processes."""
    if world() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])       # one sum, not hundreds
    with connected():
        dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(total.view(tensor.shape))


def gradients(weights: list[Tensor]) -> list[Tensor]:
    """The gradients to be added up. A weight that this share of the batch does not reach gets a
    zero one: photographs without originals (unpaired.py) do not reach every weight, pairs do.
    """
    if world() == 1:
        return []
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    return [weight.grad for weight in weights]


def average(tensors: list[Tensor], share: float) -> list[Tensor]:
    """The mean of each tensor over the processes, each with the weight `share`."""
    if world() == 1:
        return tensors
    result = [share * tensor for tensor in tensors]
    add_up(result)
    return result


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    total = torch.tensor([float(flag)])
    add_up([total])
    return bool(total)


def barrier() -> None:
    """Waits until all processes have come here."""
    any_of(False)


def from_main(make: Callable):
    """The result of make() in process 0, for all; the others wait, be it for hours."""
    if world() == 1:
        return make()
    result = [make() if is_main() else None]
    with connected():
        dist.broadcast_object_list(result, 0, PATIENT, torch.device("cpu"))
    return result[0]


@contextmanager
def main_first():
    """Within it process 0 comes first; the others wait, be it for hours, and find what it left."""
    if not is_main():
        from_main(None)
    yield
    if is_main():
        from_main(lambda: None)


# ---- shares -------------------------------------------------------------------------------------
def part(count: int) -> slice:
    """Which of `count` patches are this process's: as many as the others', or one more or less."""
    return slice(count * rank() // world(), count * (rank() + 1) // world())


def share(count: int) -> float:
    """The part of `count` patches that this process works on, between 0 and 1."""
    own = part(count) if world() > 1 else slice(0, count)
    return (own.stop - own.start) / count


def own(batch):
    """This process's share of a batch (SR). Where there are fewer patches than processes, those
    that get none work on the first one, and as their `share` is 0, it does not count.
    """
    if world() == 1:
        return batch
    count = len(batch.images[1])
    return patches(batch, part(count) if share(count) else slice(0, 1))


def patches(batch, at: slice):
    """Some patches of a batch (SR). If only its first inputs have originals, so it is here."""
    images = {s: x[at] for s, x in batch.images.items()}
    return type(batch)(images, None if batch.kernel is None else batch.kernel[at])


def seed(*numbers: int) -> None:
    """Random numbers of this process alone from here on, which depend on the numbers."""
    if world() > 1:
        mixed = np.random.default_rng((*numbers, rank())).integers(1 << 32)
        torch.manual_seed(int(mixed))


# ---- BatchNorm ----------------------------------------------------------------------------------
class Sum(torch.autograd.Function):
    """The sum of a tensor over the processes; its gradient is the sum of theirs."""
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        add_up([total])
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return Sum.forward(ctx, gradient)


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d, in training with the mean and variance of the whole batch.

    (nn.SyncBatchNorm does the same on GPUs only.)
    """
    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) stays; N may differ between the processes."""
        if not self.training:
            return super().forward(x)
        dtype = x.dtype
        x = x.float()
        pixels = x.new_tensor([x.numel() / x.shape[1]])
        total = Sum.apply(torch.cat((x.sum((0, 2, 3)), pixels)))           # (C + 1,)
        mean = total[:-1] / total[-1]
        centred = x - mean[:, None, None]
        variance = Sum.apply(centred.square().sum((0, 2, 3))) / total[-1]  # (C,)
        with torch.no_grad():
            unbiased = variance * total[-1] / (total[-1] - 1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()                # (C,)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(dtype)


def join_norms(model: nn.Module) -> None:
    """Every BatchNorm of the network becomes one over the whole batch, where batches are shared."""
    for module in model.modules():
        if world() > 1 and type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNorm     # it keeps its weights, statistics and names
