"""Train a super-resolution network with dual regression, compress it, report: the whole of DRC from top to bottom.

    python train.py --arch drn_s --prune 0.3

                PSNR-Y    SSIM  parameters  MAdds 96x96  MAdds 720p  s/image
    bicubic     30.276  0.8065           -            -           -     0.01
    dense       31.226  0.8256   4,804,065     109.92 G     687.0 G     7.12
    cut         31.016  0.8210   2,770,529      67.46 G     421.7 G     4.64
    pruned      31.273  0.8261   2,770,529      67.46 G     421.7 G     4.46

Stages: 1 data · 2 primal and dual training · 3 search (how many channels) · 4 select and cut (which ones) ·
5 fine-tuning with distillation · 6 report. Every stage leaves `runs/<name>/<stage>.pt`; a run that was stopped, by ctrl-C
or by kill -9, continues where it was when the same command is given again, and ends with the same weights.

The mathematics is in dual.py and prune.py; this file holds the order of things, the numbers (PRESETS) and the one loop.
"""
import argparse
import io
import json
import math
import re
import signal
import time
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data
import dual
import evaluate
import kernels
import models
import prune

PRESETS = {
    "quick": dict(                     # a CPU, minutes: shows that everything works, not how good it can get
        pictures=24, side=384, patch=64, batch=4, steps=240, dual_steps=100, rate=4e-4, floor=1e-7, warmup=0.1, clip=20,
        search_steps=16, epoch=4, search_patch=64, search_batch=2, search_rate=1e-4, first_order=False,
        select_patch=48, select_batch=2, select_batches=2, per_round=16, reuse=True,
        tune_steps=80, tune_rate=2e-4),
    "default": dict(                   # one GPU, an hour or two
        pictures=400, side=512, patch=192, batch=16, steps=30_000, dual_steps=2_000, rate=4e-4, floor=1e-7, warmup=0.02,
        clip=20, search_steps=500, epoch=25, search_patch=192, search_batch=16, search_rate=1e-4, first_order=False,
        select_patch=192, select_batch=16, select_batches=4, per_round=8, reuse=True,
        tune_steps=15_000, tune_rate=4e-4),
    "paper": dict(                     # DRC Section 5.1 and the release, for DF2K and a cluster
        pictures=0, side=0, patch=384, batch=32, steps=1_000_000, dual_steps=100_000, rate=1e-4, floor=1e-7, warmup=0.0,
        clip=math.inf, search_steps=2_500, epoch=25, search_patch=192, search_batch=16, search_rate=1e-4, first_order=False,
        select_patch=192, select_batch=16, select_batches=10, per_round=1, reuse=False,
        tune_steps=1_000_000, tune_rate=1e-4),
}
COMMON = dict(                         # of all presets, for DRN; what the other networks have otherwise follows
    betas=(0.9, 0.999), milestones=(), # of the steps, where the rate is halved; none: cosine
    ema=0.0,                           # moving average of the weights, 0: none
    drop_path=0.0,                     # stochastic depth of the last block in training
    search_decay=3e-4, search_clip=5.0, select_rate=5e-5,
    epsilon=1e-4)                      # in the division that finds the true kernel of a blurred patch; the release: 1e-20
SWINIR = dict(search_decay=0.0, select_rate=1e-4)
SWINIR_PAPER = dict(patch=256, steps=500_000, rate=2e-4, milestones=(0.5, 0.8, 0.9, 0.95), warmup=0.008, ema=0.999,
                    drop_path=0.1, search_patch=256, search_rate=2e-4, select_patch=256, tune_steps=500_000, tune_rate=2e-4)
DCLS = dict(search_rate=1e-5, search_clip=0.1, search_decay=0.0, select_rate=1e-5)
OWN = {                                # first word of the arch, preset: what differs
    ("swinir", "quick"): dict(SWINIR, clip=1.0, steps=800, rate=1e-3, search_steps=32, per_round=8, tune_steps=300,
                              tune_rate=5e-4),
    ("swinir", "default"): dict(SWINIR, clip=1.0, ema=0.999),
    ("swinir", "paper"): dict(SWINIR, **SWINIR_PAPER),
    ("dat", "quick"): dict(SWINIR, clip=1.0, steps=400, rate=1e-3, patch=128, batch=2, search_patch=128,   # LR 32: a window
                           select_patch=128, tune_steps=160),
    ("dat", "default"): dict(SWINIR, clip=1.0, ema=0.999),
    ("dat", "paper"): dict(SWINIR, **{**SWINIR_PAPER, "ema": 0.0, "betas": (0.9, 0.99)}),
    ("dcls", "quick"): dict(DCLS, clip=1.0, patch=128, batch=2, tune_rate=5e-5, search_steps=8, search_patch=128,
                            search_batch=1, select_patch=128, select_batch=1),       # the kernel takes 31 of 32 LR pixels
    ("dcls", "default"): dict(DCLS, clip=1.0),
    ("dcls", "paper"): dict(DCLS, epsilon=1e-20, patch=256, batch=64, steps=500_000, rate=4e-4, milestones=(0.4, 0.8),
                            search_patch=256, select_patch=256, tune_steps=500_000, tune_rate=4e-4),
}
DUAL_WEIGHT = 0.1                      # λ of L_DR (DRN, Section 3.1)
DISTILL_WEIGHT = 1.0                   # of the distance to the teacher in fine-tuning (release)
CALIBRATION_PICTURES = 160             # selection looks at the first 160 pictures (DIV2K 1 to 160 in the release)
SAVE_SECONDS = 20                      # at most this much work is lost to kill -9


# ---- the run folder: what is finished, the state of what is not, the log ---------------------------------------------
class Run:
    """A folder with one file per finished stage, the state of the running stage (progress.pt) and log.jsonl."""
    def __init__(self, folder: Path, config: dict):
        self.folder, self.saved = folder, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        for rest in folder.glob(".*.tmp"):                # what kill -9 left half written
            rest.unlink()
        known = folder / "config.json"
        if known.exists() and any(folder.glob("*.pt")):
            check_same(json.loads(known.read_text()), config, folder)
        else:                                             # before any work is done, flags may still be corrected
            data.write(known, json.dumps(config, indent=1).encode())

    def write(self, name: str, content: dict) -> None:
        blob = io.BytesIO()
        torch.save(content, blob)
        data.write(self.folder / name, blob.getvalue())

    def read(self, name: str) -> dict | None:
        path = self.folder / name
        return evaluate.read_checkpoint(path) if path.exists() else None

    def finish(self, stage: str, content: dict, started: float, **facts) -> dict:
        self.write(f"{stage}.pt", content)
        (self.folder / "progress.pt").unlink(missing_ok=True)
        self.log(stage=stage, seconds=round(time.monotonic() - started, 1), **facts)
        return content

    def log(self, **line) -> None:
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def save(self, stage: str, step: int, parts: dict) -> None:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self.write("progress.pt", dict(stage=stage, step=step, random=torch.get_rng_state(), random_cuda=cuda,
                                       parts={name: part.state_dict() for name, part in parts.items()}))
        self.saved = time.monotonic()

    def resume(self, stage: str, parts: dict) -> int:
        """Puts the saved state of this stage into `parts`; returns the step to go on with, 0 where nothing is saved."""
        state = self.read("progress.pt")
        if state is None or state["stage"] != stage:
            return 0
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])
        return state["step"]

    def repeat(self, stage: str, steps: int, one_step, batches, parts: dict) -> None:
        """The one loop: one_step(k, batch) -> loss for k up to `steps`, with progress, saving and continuing. batches:
        step to start with -> iterator; parts: {name: object with state_dict}, all that a step changes."""
        start = self.resume(stage, parts)
        with closing(batches(start)) as source, stop_signals() as stopped, progress(stage, steps, start) as bar:
            for k in range(start, steps):
                loss = one_step(k, next(source))
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss became {loss} in step {k + 1} of {stage}: lower --rate, or look at "
                                             f"the data; finished stages are kept in {self.folder}")
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                bar.update()
                if (k + 1) % max(1, steps // 100) == 0:
                    self.log(stage=stage, step=k + 1, loss=round(loss, 4))
                if stopped or time.monotonic() - self.saved > SAVE_SECONDS:
                    self.save(stage, k + 1, parts)
                if stopped:
                    raise KeyboardInterrupt


def check_same(known: dict, config: dict, folder: Path) -> None:
    for name in sorted(config, key=lambda name: name != "preset"):                # it explains the others
        if known.get(name) != config[name]:
            flag = "--" + name.replace("_", "-")
            raise WrongUsage(f"{folder} was made with {flag} {known.get(name)}, now it is {config[name]}: give the same "
                             f"flags to continue it, or another folder with --run")


class WrongUsage(Exception):
    """A sentence for the user; the command ends with exit code 2."""


@contextmanager
def stop_signals():
    """A list that becomes true at the first ctrl-C (or SIGTERM), so that a step is never cut in half; the second one
    stops at once."""
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
    return tqdm(total=total, initial=start, desc=f"{stage:8}", unit=unit, delay=2, dynamic_ncols=True)


# ---- 1 data ----------------------------------------------------------------------------------------------------------
def open_data(args: SimpleNamespace, scales: tuple[int, ...]) -> data.Pictures:
    if args.data:
        pictures = data.open_folder(args.data, scales, limit=int(args.memory * 2**30))
        print(f"data      {len(pictures)} pictures of {args.data}, up to {args.memory:g} GiB of them kept decoded in memory")
    else:
        pictures = data.generate(args.pictures, args.side, scales, args.seed)
        print(f"data      {len(pictures)} generated dead-leaves pictures of {args.side}x{args.side}")
    return pictures


def to_device(batches, device: torch.device):
    """The batches {scale: (N, 3, h, w)} on the device, in the memory layout that convolutions like."""
    with closing(batches):
        for y in batches:
            yield {s: x.to(device, memory_format=torch.channels_last, non_blocking=True) for s, x in y.items()}


def stream(args: SimpleNamespace, model, pictures, patch: int, batch: int, start: int = 0):
    """The batches from step `start` on: what `model` needs, on the device."""
    batches = to_device(data.batches(pictures, patch, batch, args.seed, start), args.device)
    return data.blind(batches, model.kernel_size, args.seed, start, args.epsilon) if model.kernel_size else batches


# ---- 2 primal and dual training, 5 fine-tuning -----------------------------------------------------------------------
def fit(run: Run, stage: str, args: SimpleNamespace, pictures, model, duals, steps: int, rate: float, loss_of) -> nn.Module:
    """Minimises loss_of(y) over the parameters of model and duals that require gradients, by Adam. Returns the model, or
    the moving average of its weights where the preset asks for one."""
    weights = [p for p in (*model.parameters(), *duals.parameters()) if p.requires_grad]
    optimiser = torch.optim.Adam(weights, rate, args.betas)
    parts = dict(model=model, duals=duals, optimiser=optimiser)
    if args.ema:
        parts["ema"] = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema))

    def one_step(k: int, y: dict) -> float:
        optimiser.param_groups[0]["lr"] = scheduled(args, rate, k, steps)
        loss = loss_of(y)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, args.clip)
        optimiser.step()
        if args.ema:
            parts["ema"].update_parameters(model)
        return loss.item()

    def batches(start: int):
        return stream(args, model, pictures, args.patch, args.batch, start)

    run.repeat(stage, steps, one_step, batches, parts)
    return parts["ema"].module if args.ema else model


def scheduled(args: SimpleNamespace, rate: float, k: int, steps: int) -> float:
    """The learning rate of step k: linear warm-up, then halved at the milestones, or a cosine down to the floor."""
    warm = max(1, int(args.warmup * steps))
    if args.milestones:
        rate = rate * 0.5 ** sum(k >= part * steps for part in args.milestones)
    else:
        cosine = (1 + math.cos(math.pi * max(0, k - warm) / max(1, steps - warm))) / 2
        rate = args.floor + (rate - args.floor) * cosine
    return min((k + 1) / warm, 1) * rate


def checkpoint(model, duals) -> dict:
    """What rebuilds a network: evaluate.load_model reads it."""
    return dict(arch=model.arch, scale=model.scale, widths=model.widths, model=model.state_dict(),
                duals=[d.state_dict() for d in duals])


def restore(state: dict) -> tuple[nn.Module, nn.ModuleList]:
    model = models.build(state["arch"], state["scale"], state["widths"])
    models.load_state(model, state["model"])
    duals = dual.make_duals(model)
    for d, weights in zip(duals, state["duals"], strict=True):
        models.load_state(d, weights)
    return model, duals


def native_loss(model, duals):
    """L_DR in the network's own range, in which the paper's rates are given, plus |k − k*| where a kernel is estimated:
    (out, y) -> scalar."""
    def loss(out, y):
        images = model.rgb_range * dual.dr_loss(out.images, y, duals, DUAL_WEIGHT)
        return images if out.kernel is None else images + dual.blind_loss(out.kernel, y["kernel"])

    return loss


def pretrained(args: SimpleNamespace) -> tuple[nn.Module, nn.ModuleList, bool]:
    """(model, duals, whether the duals came with it) of --pretrained and --pretrained-dual."""
    model, states = evaluate.load_networks(args.pretrained, args.arch, args.scale, args.channels)
    duals, file = dual.make_duals(model), args.pretrained
    if args.pretrained_dual:
        file, states = args.pretrained_dual, evaluate.read_checkpoint(args.pretrained_dual, list)
    if states is None:
        return model, duals, False
    if len(states) != len(duals):
        raise ValueError(f"{file} holds {len(states)} duals, {args.arch} x{args.scale} has {len(duals)}")
    for i, (d, state) in enumerate(zip(duals, states)):
        try:
            models.load_state(d, state)
        except ValueError as error:
            raise ValueError(f"{file}, dual {i}: {error}") from error
    return model, duals, True


def train(run: Run, args: SimpleNamespace, pictures) -> dict:
    """Stage 2: L_DR from scratch; or pretrained weights, for which only missing duals are trained, unless --steps."""
    started = time.monotonic()
    torch.manual_seed(args.seed)
    if args.pretrained:
        model, duals, complete = pretrained(args)
        model.requires_grad_(args.continue_training)
        model.train(args.continue_training)
        steps = args.steps if args.continue_training else 0 if complete else args.dual_steps
    else:
        model, steps = models.build(args.arch, args.scale), args.steps
        duals = dual.make_duals(model)
        if args.preset != "paper":
            model.start_from_interpolation()
    model.drop_path = args.drop_path
    model.to(args.device, memory_format=torch.channels_last)
    duals.to(args.device)
    loss = native_loss(model, duals)
    model = fit(run, "train", args, pictures, model, duals, steps, args.rate, lambda y: loss(model(y[1]), y))
    return run.finish("train", checkpoint(model, duals), started, steps=steps)


def tune(run: Run, args: SimpleNamespace, pictures, student_state: dict, teacher_state: dict) -> dict:
    """Stage 5: L_DR plus the distance of the student to the teacher (DRC Section 4.3, release)."""
    started = time.monotonic()
    torch.manual_seed(args.seed)
    model, duals = restore(student_state)
    teacher = load_teacher(args) if args.teacher else restore(teacher_state)[0]
    teacher.eval().requires_grad_(False)
    for module in (model, teacher):
        module.to(args.device, memory_format=torch.channels_last)
    for module in model.modules():                       # the statistics of training are better than those of few patches
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model.drop_path = args.drop_path
    loss = native_loss(model, duals.to(args.device))

    def loss_of(y: dict):
        out = model(y[1])
        return loss(out, y) + DISTILL_WEIGHT * distance(y[1], out)

    with distillation(model, teacher) as distance:
        model = fit(run, "tune", args, pictures, model, duals, args.tune_steps, args.tune_rate, loss_of)
    return run.finish("tune", checkpoint(model, duals), started, steps=args.tune_steps)


@contextmanager
def distillation(student, teacher):
    """A function (x, student's output for x, just made) -> its distance to the teacher's, in the native range: of the
    last features where the backbone names them (DRN), else L1 of the images (SwinIR in the release; DAT, DCLS: ours)."""
    features = {}
    hooks = [network.get_submodule(network.feature).register_forward_pre_hook(
        lambda module, inputs, who=who: features.update({who: inputs[0]}))
        for who, network in (("student", student), ("teacher", teacher)) if student.feature]

    def distance(x, out):
        with torch.no_grad():
            wanted = teacher(x)
        if student.feature:
            return dual.distill_loss(features["student"], features["teacher"])
        return student.rgb_range * nn.functional.l1_loss(out.images[student.scale], wanted.images[student.scale])

    try:
        yield distance
    finally:
        for hook in hooks:
            hook.remove()


def load_teacher(args: SimpleNamespace) -> nn.Module:
    arch, _, path = args.teacher.partition(":")
    return evaluate.load_model(path, arch, args.scale)


# ---- 3 search: how many channels each pair keeps ---------------------------------------------------------------------
def find_widths(run: Run, args: SimpleNamespace, pictures, state: dict) -> dict:
    """Halves T and V of the pictures alternate; the last tenth is held out to choose the epoch."""
    started = time.monotonic()
    torch.manual_seed(args.seed)
    model, duals = restore(state)
    model.to(args.device, memory_format=torch.channels_last)
    searcher = prune.Search(model, native_loss(model, duals.to(args.device)), args.prune, duals.parameters(),
                            args.search_rate, args.search_decay, args.search_clip, not args.first_order, args.round)
    half, rest = split(len(pictures))

    def batches(part, start: int = 0):
        return stream(args, model, part, args.search_patch, args.search_batch, start)

    def both(start: int):
        with closing(batches(pictures[:half], start)) as train, closing(batches(pictures[half:rest], start)) as valid:
            yield from zip(train, valid)

    with closing(batches(pictures[rest:])) as source:
        held_out = list(islice(source, 4))

    def one_step(k: int, pair: tuple) -> float:
        loss, _ = searcher.step(*pair)
        if (k + 1) % args.epoch == 0 or k + 1 == args.search_steps:
            searcher.hold(held_out)
        return loss

    run.repeat("search", args.search_steps, one_step, both, dict(search=searcher))
    widths = searcher.widths(budget(args, model))
    data.write(run.folder / "channels.json", json.dumps(dict(arch=args.arch, scale=args.scale, dense=model.widths,
                                                             widths=widths), indent=1).encode())
    return run.finish("search", dict(widths=widths, alphas=torch.stack(searcher.best[1])), started,
                      kept=f"{sum(widths.values())}/{sum(model.widths.values())}", held_out=round(searcher.best[0], 4))


def split(count: int) -> tuple[int, int]:
    """Ends of T and of V; what follows is held out."""
    if count < 3:
        raise ValueError(f"the search needs at least 3 pictures (two halves and held-out ones), there are {count}: give more")
    rest = count - max(1, count // 10)
    return rest // 2, rest


def budget(args: SimpleNamespace, model) -> prune.Budget | None:
    if not args.budget:
        return None
    kind, target = args.budget

    def cost(widths: dict) -> int:
        with torch.device("meta"):
            return getattr(evaluate.count(model.with_widths(widths), 96, 96), kind)

    return prune.Budget(cost, int(target * cost(model.widths)))


# ---- 4 select which ones, then cut -----------------------------------------------------------------------------------
class Selection:
    """The model being masked and what has been selected so far, as one thing that can be saved."""
    def __init__(self, model):
        self.model, self.kept = model, {}

    def state_dict(self) -> dict:
        return dict(model=self.model.state_dict(), kept=self.kept)

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.kept = state["kept"]


def select_and_cut(run: Run, args: SimpleNamespace, pictures, state: dict, widths: dict) -> dict:
    started = time.monotonic()
    torch.manual_seed(args.seed)
    (original, _), (model, duals) = restore(state), restore(state)
    for module in (original, model):
        module.to(args.device, memory_format=torch.channels_last)
    duals.to(args.device).requires_grad_(False)
    with closing(stream(args, model, pictures[:CALIBRATION_PICTURES], args.select_patch, args.select_batch)) as batches:
        calibration = list(islice(batches, args.select_batches))
    selection = Selection(model)
    pair_number = run.resume("select", dict(selection=selection))
    with stop_signals() as stopped, progress("select", len(widths), pair_number, "layer") as bar:
        def on_pair(pair, kept, losses):
            selection.kept = kept
            bar.update()
            if stopped or time.monotonic() - run.saved > SAVE_SECONDS:
                run.save("select", len(kept), dict(selection=selection))
            if stopped:
                raise KeyboardInterrupt

        kept = prune.select(model, calibration, native_loss(model, duals), widths, rate=args.select_rate,
                            per_round=args.per_round, reuse=args.reuse, original=original, done=selection.kept, on_pair=on_pair)
    smaller = prune.cut(model, kept, calibration)
    return run.finish("select", {**checkpoint(smaller, duals), "kept": kept}, started)


# ---- 6 report --------------------------------------------------------------------------------------------------------
def report(run: Run, args: SimpleNamespace, states: dict[str, dict]) -> None:
    """Measures bicubic and the networks in `states` ({name: checkpoint}); writes report.json and comparison.png."""
    started, scale = time.monotonic(), args.scale
    pictures = data.open_folder(args.test, (1, scale)) if args.test else \
        data.photographs((1, scale), args.network.kernel_size)
    rows = {"bicubic": evaluate.evaluate(lambda low: data.imresize(low, scale), pictures)}
    costs = {"bicubic": {}}
    for name, state in states.items():
        model, _ = restore(state)
        rows[name] = evaluate.evaluate(models.inference(model).to(args.device), pictures)
        small, large = evaluate.count(model, 96, 96), evaluate.count(model, math.ceil(720 / scale), math.ceil(1280 / scale))
        costs[name] = dict(params=small.params, madds=small.madds, madds_720p=large.madds)
    table = {name: {**{key: float(np.mean([getattr(row, key) for row in found])) for key in ("psnr", "ssim", "seconds")},
                    **costs[name]} for name, found in rows.items()}
    data.write(run.folder / "report.json", json.dumps(table, indent=1).encode())
    data.write_image(run.folder / "comparison.png", comparison(rows, pictures, scale))
    run.log(stage="report", seconds=round(time.monotonic() - started, 1),
            **{name: round(line["psnr"], 3) for name, line in table.items()})


def print_table(run: Run) -> None:
    table = json.loads((run.folder / "report.json").read_text())
    print(f"\n{'':10}{'PSNR-Y':>8} {'SSIM':>7} {'parameters':>11} {'MAdds 96x96':>12} {'MAdds 720p':>11} {'s/image':>8}")
    for name, line in table.items():
        cost = f"{'-':>11} {'-':>12} {'-':>11}"
        if "params" in line:
            cost = f"{line['params']:>11,} {line['madds'] / 1e9:>10.2f} G {line['madds_720p'] / 1e9:>9.1f} G"
        print(f"{name:10}{line['psnr']:>8.3f} {line['ssim']:>7.4f} {cost} {line['seconds']:>8.2f}")
    files = ("comparison.png", "channels.json", "report.json", "log.jsonl", "train.pt", "search.pt", "select.pt", "tune.pt")
    print(f"\n{run.folder}/: {', '.join(name for name in files if (run.folder / name).exists())}")


def comparison(rows: dict[str, list], pictures, scale: int, side: int = 192):
    """uint8 (H, W, 3): a line per picture with the crop of most detail from every upscaler and the original, labelled;
    in the corners the middle of the estimated kernels and of the true one, where there are such."""
    font, bar, gap = ImageFont.load_default(13), 18, 4
    columns = [*rows, "original"]
    canvas = Image.new("RGB", (len(columns) * (side + gap) - gap, len(pictures) * (side + bar + gap) - gap), "white")
    draw = ImageDraw.Draw(canvas)
    for i, name in enumerate(pictures.names):
        high = pictures[i][scale]
        box = busiest(high, side)
        top = i * (side + bar + gap)
        for j, column in enumerate(columns):
            image = high if column == "original" else rows[column][i].image
            label = Path(name).stem if column == "original" else f"{column} {rows[column][i].psnr:.2f} dB"
            canvas.paste(Image.fromarray(image[box]), (j * (side + gap), top + bar))
            kernel = pictures[i].get("kernel") if column == "original" else rows[column][i].kernel
            if kernel is not None:
                middle = slice(max(0, len(kernel) - 15) // 2, (len(kernel) + 15) // 2)
                inset = evaluate.kernel_picture(kernel[middle, middle], 4)
                canvas.paste(Image.fromarray(inset), (j * (side + gap) + side - len(inset), top + bar + side - len(inset)))
            draw.text((j * (side + gap) + 2, top + 1), label, "black", font)
    return np.array(canvas)


def busiest(image, side: int) -> tuple[slice, slice]:
    """The side×side square, on a coarse grid, in which neighbouring pixels differ most."""
    y = torch.from_numpy(image).float().mean(2)
    detail = (y[1:, 1:] - y[:-1, 1:]).abs() + (y[1:, 1:] - y[1:, :-1]).abs()
    height, width = (min(side, n) for n in detail.shape)
    pooled = nn.functional.avg_pool2d(detail[None, None], (height, width), 16)[0, 0]
    top, left = divmod(int(pooled.argmax()), pooled.shape[1])
    return slice(16 * top, 16 * top + side), slice(16 * left, 16 * left + side)


# ---- the command -----------------------------------------------------------------------------------------------------
def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: a number in [low, high)."""
    def parse(text: str):
        value = kind(text)
        if not low <= value < high:
            wrong = f"is outside [{low}, {high})" if high < math.inf else f"is below {low}"
            raise argparse.ArgumentTypeError(f"{text} {wrong}")
        return value
    parse.__name__ = kind.__name__                       # argparse says "invalid float value"
    return parse


def positive(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return float(text)


def target(text: str) -> tuple[str, float]:
    match = re.fullmatch(r"(params|madds)=(0?\.\d+|1(?:\.0*)?)", text)
    if not match or not float(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not params=F or madds=F with F in (0, 1]")
    return match[1], float(match[2])


def teacher(text: str) -> str:
    arch, colon, path = text.partition(":")
    if not colon or arch not in models.ARCHS:
        raise argparse.ArgumentTypeError(f"{text!r} is not ARCH:FILE with ARCH one of {', '.join(models.ARCHS)}")
    return text


def parse_args(argv: list[str] | None = None) -> SimpleNamespace:
    parser = argparse.ArgumentParser(description="Train, compress and report: dual regression compression.", allow_abbrev=False)
    natural, share = number(int, 1), number(float, 0, 1)
    add = parser.add_argument_group("what").add_argument
    add("--arch", choices=models.ARCHS, required=True, help="the network")
    add("--scale", type=int, default=4, help="upscaling factor (default 4)")
    add("--prune", type=share, default=0.0, metavar="R", help="remove about this part of the hidden channels; 0 only trains")
    add("--budget", type=target, metavar="params=F|madds=F", help="compress the whole network to this part of its cost")
    add("--preset", choices=PRESETS, help="the numbers below (default: quick without a GPU, default with one)")
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="DIR", help="train on these pictures (default: generated ones)")
    add("--test", metavar="DIR", help="report on these pictures (default: eight photographs of scikit-image)")
    add("--memory", type=positive, default=4.0, metavar="GIB", help="for decoded pictures (default 4)")
    add("--pictures", type=natural, metavar="N", help="how many pictures to generate")
    add = parser.add_argument_group("training").add_argument
    add("--pretrained", metavar="FILE", help="start from these weights, official or ours, instead of training")
    add("--pretrained-dual", metavar="FILE", help="official file of the duals: a list of state dicts")
    add("--channels", metavar="FILE", help="channel numbers of a --pretrained network that is already pruned")
    add("--steps", type=natural, metavar="N", help="training steps; with --pretrained: train it further")
    add("--patch", type=natural, metavar="N", help="side of an HR training patch in pixels")
    add("--batch", type=natural, metavar="N", help="patches per training step")
    add("--rate", type=positive, metavar="F", help="learning rate of training")
    add = parser.add_argument_group("compression").add_argument
    add("--search-steps", type=natural, metavar="N", help="steps of the channel number search")
    add("--first-order", action="store_const", const=True, help="search without the second-order term: 3 passes, not 5")
    add("--round", type=int, choices=(4, 8), default=4, help="widths are multiples of this (default 4; 8 suits GPUs)")
    add("--tune-steps", type=natural, metavar="N", help="fine-tuning steps")
    add("--teacher", type=teacher, metavar="ARCH:FILE", help="distil from this network (default: the unpruned one)")
    add = parser.add_argument_group("run").add_argument
    add("--run", metavar="DIR", help="folder of this run (default: runs/<name>)")
    add("--seed", type=number(int, 0), default=0, help="of weights, pictures and patches")
    add("--kernels", choices=("torch", "triton"), help="default: triton where there is a GPU and Triton")
    add("--device", type=evaluate.usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    return settle(parser, parser.parse_args(argv))


def settle(parser: argparse.ArgumentParser, given: argparse.Namespace) -> SimpleNamespace:
    """Checks flags against each other and fills what was not given from the preset."""
    try:
        with torch.device("meta"):
            network = models.build(given.arch, given.scale)                     # without weights: for what it says of itself
    except ValueError as error:
        parser.error(f"--scale: {error}")
    gpu = given.device.type == "cuda"
    chosen = given.preset or ("default" if gpu else "quick")
    own = OWN.get((given.arch.partition("_")[0], chosen), {})
    args = SimpleNamespace(**{**COMMON, **PRESETS[chosen], **own, **{k: v for k, v in vars(given).items() if v is not None}})
    for name, value in vars(given).items():
        vars(args).setdefault(name, value)
    args.why = "given" if given.preset else "chosen, for there is a GPU" if gpu else \
        "chosen, for there is no GPU; --preset default trains longer"
    args.preset, args.continue_training = chosen, given.steps is not None
    for stage in ("search", "select"):                   # a patch or batch given smaller for training is meant for all
        for name, asked in (("patch", given.patch), ("batch", given.batch)):
            if asked:
                vars(args)[f"{stage}_{name}"] = min(vars(args)[f"{stage}_{name}"], asked)
    for name in ("patch", "search_patch", "select_patch"):
        if getattr(given, name, None) is None:           # a preset's, for every scale
            vars(args)[name] -= vars(args)[name] % args.scale
    if args.budget and not args.prune:
        args.prune = prune.budget_ratio(args.budget[1])
    problems = {
        f"--preset {chosen} needs --data DIR with DF2K or DIV2K in it": chosen == "paper" and not args.data,
        f"--patch {args.patch} is not a multiple of the scale {args.scale}": args.patch % args.scale,
        f"--batch {args.batch}: {args.arch} has BatchNorm over the patches of a step, give at least 2":
            args.batch < 2 and (args.continue_training or not args.pretrained)
            and any(isinstance(module, nn.BatchNorm2d) for module in network.modules()),
        "--pretrained-dual and --channels belong to --pretrained FILE":
            (args.pretrained_dual or args.channels) and not args.pretrained,
    }
    for sentence in (text for text, wrong in problems.items() if wrong):
        parser.error(sentence)
    suffix = f"{args.budget[0]}{100 * args.budget[1]:02.0f}" if args.budget else f"p{100 * args.prune:02.0f}"
    args.run = Path(args.run or f"runs/{args.arch}_x{args.scale}_{suffix}")
    args.fail, args.network = parser.error, network
    return args


def main() -> None:
    args = parse_args()
    using = kernels.choose(args.kernels)
    hidden = ("fail", "network", "why", "run", "memory", "device", "kernels")   # what does not change the result
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(args).items() if k not in hidden}
    try:
        run = Run(args.run, config)
    except WrongUsage as error:
        args.fail(str(error))
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.arch} x{args.scale} on {device}, preset {args.preset} ({args.why}), {using}, run folder {args.run}")

    # ---- 1 data; but first, weights that cannot be used are told now, not after hours
    if args.pretrained and not (args.run / "train.pt").exists():
        pretrained(args)
    if args.teacher and not (args.run / "tune.pt").exists():
        load_teacher(args)
    scales = tuple(sorted({1, args.scale, *(s for spec in args.network.dual_spec for s in spec[:2])}))
    compress = bool(args.prune or args.budget)
    trained = (args.run / ("tune.pt" if compress else "train.pt")).exists()
    pictures = None if trained else open_data(args, scales)

    # ---- 2 primal and dual training
    dense = run.read("train.pt") or train(run, args, pictures)
    states = dict(dense=dense)

    if compress:
        # ---- 3 search: how many channels each pair keeps
        widths = (run.read("search.pt") or find_widths(run, args, pictures, dense))["widths"]

        # ---- 4 select which ones, then cut
        states["cut"] = cut = run.read("select.pt") or select_and_cut(run, args, pictures, dense, widths)

        # ---- 5 fine-tuning with distillation
        states["pruned"] = run.read("tune.pt") or tune(run, args, pictures, cut, dense)

    # ---- 6 report
    if not (args.run / "report.json").exists():
        report(run, args, states)
    print_table(run)


if __name__ == "__main__":
    evaluate.run(main)
