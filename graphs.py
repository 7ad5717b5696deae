"""CUDA graphs: a GPU replays a whole network without waiting for Python.

A network is hundreds of small operations, and Python takes longer to ask for one than a GPU to do
it, unless the picture is large. A CUDA graph is a recording of all that a call asks of the GPU; it
is replayed at once, on the same memory. So it fits one size of input only, which is what tiles
are: `upscale.py` cuts a picture into tiles of one size. latency.py times networks so, too: without,
a GPU would be found as slow as Python, whatever the widths.

The first call of a size runs as usual; by then the kernels are compiled and their choice is made
(kernels/choice.py). The second records, and every further one replays. Where a network cannot be
recorded, because something in it waits for the GPU, it runs as usual, and one line says so.

Not here: training, which is bound by the GPU. Read upscale.py next.
"""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels import choice, switch

MOST = 4                             # recordings kept, each with the memory of its results


def use(model: nn.Module) -> None:
    """From now on a network on a GPU replays CUDA graphs when it is called without gradients.

    model: a `models.inference` that returns an SR, or some layers of one; its weights must stay
    where they are.
    """
    model.forward = Recorder(model.forward)


def copied(result):
    """A copy of an SR, or of a tensor."""
    if isinstance(result, Tensor):
        return result.clone()
    kernel = None if result.kernel is None else result.kernel.clone()
    images = {s: x.clone() for s, x in result.images.items()}
    return result._replace(images=images, kernel=kernel)


class Recorder:
    """A function of tensors that returns an SR or a tensor, and its recordings by the sizes of its
    inputs.
    """
    def __init__(self, function: Callable):
        self.function = function
        self.seen = set()
        self.recordings = {}
        self.pool = None             # of memory, shared: recordings are replayed one at a time
        self.off = False

    def __call__(self, *inputs: Tensor):
        if self.off or torch.is_grad_enabled():
            return self.function(*inputs)
        size = tuple((x.shape, x.dtype) for x in inputs)
        if size not in self.seen:
            self.seen.add(size)
            return self.function(*inputs)
        if size not in self.recordings and not self.add(size, inputs):
            return self.function(*inputs)
        graph, held, result = self.recordings[size]
        for mine, given in zip(held, inputs):
            mine.copy_(given)
        graph.replay()
        return copied(result)                    # the next replay writes over it

    def add(self, size: tuple, inputs: tuple) -> bool:
        """Records a call; False, and never again, where that fails."""
        if len(self.recordings) == MOST:
            del self.recordings[next(iter(self.recordings))]
        try:
            self.recordings[size] = self.record(inputs)
        except Exception as error:   # PyTorch, the driver and Triton each have their own
            self.off = True
            self.recordings.clear()
            switch.say(f"no CUDA graph: {choice.reason(error)}")
        return not self.off

    def record(self, inputs: tuple) -> tuple:
        """(graph, the tensors that it reads, the SR that it writes); nothing is computed yet."""
        with torch.cuda.device(inputs[0].device):
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            held = [x.clone() for x in inputs]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                result = self.function(*held)
        return graph, held, result
