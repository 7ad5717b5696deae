"""The one training loop: minimises a loss over batches, by Adam.

Training and fine-tuning (stages 2 and 5 of train.py) are the same loop with another loss. What it
adds to a textbook's five lines: a learning rate that changes with the step, clipped gradients, a
moving average of the weights, batches in several parts, processes that share them (parallel.py),
and bfloat16 where it pays.

bfloat16 has the range of float32 and 8 bits of precision. With `precision="bf16"` PyTorch's
autocast computes products (convolutions, linear layers, attention) in it, while the weights, the
sums along the trunk, the layers that form the image (`Backbone.float32`), the losses and Adam stay
in float32. float16 is not offered: its range is too small for these networks.

Not here: which loss, which data (train.py); how a run is stopped and continued (run.py).
"""
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import parallel
from run import Run
from settings import Settings


def fit(run: Run, stage: str, settings: Settings, model: nn.Module, duals: nn.Module, steps: int,
        rate: float, loss_fn: Callable, batches: Callable) -> nn.Module:
    """Minimises loss_fn(output, batch) by Adam, over the parameters that require gradients.

    batches: the step to start with -> generator of whole batches. Returns the model, or the moving
    average of its weights where the settings ask for one.
    """
    if settings.compile:
        model.compile()                          # in place: names and weights stay
    weights = [p for p in (*model.parameters(), *duals.parameters()) if p.requires_grad]
    optimiser = torch.optim.Adam(weights, rate, settings.betas)
    parts = dict(model=model, duals=duals, optimiser=optimiser)
    if settings.ema:
        average = get_ema_multi_avg_fn(settings.ema)
        parts["ema"] = AveragedModel(model, multi_avg_fn=average)
    parallel.join_norms(model)

    def one_step(k, batch):
        optimiser.param_groups[0]["lr"] = scheduled(settings, rate, k, steps)
        optimiser.zero_grad()
        parallel.seed(settings.seed, k)
        losses = []
        for part in divided(batch, settings.accumulate):
            count = len(part.images[1])
            share = count / len(batch.images[1]) * parallel.share(count)
            own = parallel.own(part)
            with autocast(settings, own.images[1].device):
                out = model(own.images[1])
            loss = share * loss_fn(out, own)
            loss.backward()
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        parallel.add_up([loss, *parallel.gradients(weights)])
        nn.utils.clip_grad_norm_(weights, settings.clip)
        optimiser.step()
        if settings.ema:
            parts["ema"].update_parameters(model)
        return loss.item()

    # calls one_step(k, batch) for every step, and saves `parts` every 20 seconds
    run.repeat(stage, steps, one_step, batches, parts)
    return parts["ema"].module if settings.ema else model


def scheduled(settings: Settings, rate: float, k: int, steps: int) -> float:
    """The learning rate of step k: a linear rise, then halved at the milestones, or a cosine."""
    warm = max(1, int(settings.warmup * steps))
    if settings.milestones:
        rate = rate * 0.5 ** sum(k >= part * steps for part in settings.milestones)
    else:
        cosine = (1 + math.cos(math.pi * max(0, k - warm) / max(1, steps - warm))) / 2
        rate = settings.floor + (rate - settings.floor) * cosine
    return min((k + 1) / warm, 1) * rate


def autocast(settings: Settings, device: torch.device) -> torch.autocast:
    """Within it, networks compute in `settings.precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")


def divided(batch, parts: int) -> list:
    """A batch (SR) as `parts` smaller ones, the last ones smaller still where it does not divide.

    The sum of their gradients, weighted by their sizes, is that of the whole batch; only a
    BatchNorm (DAT) sees the parts one by one.
    """
    if parts == 1:
        return [batch]
    count = len(batch.images[1])
    size = math.ceil(count / parts)
    return [parallel.patches(batch, slice(i, i + size)) for i in range(0, count, size)]


def allow_tf32(allowed: bool) -> None:
    """Whether a GPU may round the factors of float32 products to TensorFloat-32 (10 bits)."""
    precision = "tf32" if allowed else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision
