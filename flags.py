"""The flags of train.py: their names, what they change, and which do not go together.

A run is decided by its settings (settings.Settings): a preset, changed by flags of the same names.
Flags that only say where and with what to work (device, kernels, memory, test pictures, run folder)
are no settings. Not here: the numbers and what they mean; they are in settings.py.
"""
import argparse
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import nn

import data
import evaluate
import models
import own
import parallel
import prune
from run import WrongUsage, filled, number, positive, usable_device
from settings import PRESETS, Settings


def target(text: str) -> tuple[str, float]:
    """The type of --budget: params=F, madds=F or latency=F."""
    match = re.fullmatch(r"(params|madds|latency)=(0?\.\d+|1(?:\.0*)?)", text)
    if not match or not float(match[2]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not params=F, madds=F or latency=F with F in (0, 1]")
    return match[1], float(match[2])


def teacher_file(text: str) -> str:
    """The type of --teacher: ARCH:FILE."""
    arch, colon, _ = text.partition(":")
    if not colon or arch not in models.PRESETS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not ARCH:FILE with ARCH one of {', '.join(models.PRESETS)}")
    return text


def share(text: str) -> float:
    """The type of --unpaired-share: a number in (0, 1)."""
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is outside (0, 1)")
    return float(text)


natural = number(int, 1, 10**9)


def make_parser() -> argparse.ArgumentParser:
    """All flags, without what depends on several of them."""
    parser = argparse.ArgumentParser(description="Train, compress and report: dual regression "
                                     "compression.", allow_abbrev=False)
    for name, add_flags in (("what", add_what), ("data", add_data), ("training", add_training),
                            ("compression", add_compression), ("run", add_run)):
        add_flags(parser.add_argument_group(name).add_argument)
    return parser


def add_what(add: Callable) -> None:
    """Which network, how far it is compressed."""
    add("--arch", choices=tuple(models.PRESETS), help="the network")
    own.add_flags(add)
    add("--scale", type=number(int, 1, 100), help="upscaling factor (default 4)")
    add("--prune", type=number(float, 0, 1), metavar="R",
        help="compress: a layer keeps about 1 - R of its hidden channels or less, down to half of "
             "that (default 0: only train)")
    add("--budget", type=target, metavar="params=F|madds=F|latency=F",
        help="compress the whole network to this part of its cost (latency: of its time, measured "
             "on this device)")
    add("--widths", choices=("searched", "uniform"),
        help="uniform: no search, every layer keeps the same part (default searched)")
    add("--preset", choices=("quick", "default", "paper"),
        help="the numbers below (default: quick without a GPU, default with one)")


def add_data(add: Callable) -> None:
    """The pictures to train and to measure on."""
    add("--data", type=filled, metavar="DIR",
        help="train on these pictures (default: generated ones)")
    add("--degradation", choices=data.KINDS,
        help="how small images are made of originals (default bicubic)")
    add("--unpaired", type=filled, metavar="DIR",
        help="adapt to these photographs without originals, such as your camera's")
    add("--unpaired-share", type=share, metavar="F",
        help="the part of a training batch that they are (default 0.3)")
    add("--test", type=filled, metavar="DIR",
        help="report on these pictures (default: eight photographs of scikit-image)")
    add("--memory", type=number(float, 0, 2**20), default=4.0, metavar="GIB",
        help="for decoded pictures (default 4); more of them are kept on disk, see --cache")
    add("--cache", type=lambda text: Path(filled(text)), metavar="DIR",
        help="keep the decoded pictures of --data here on disk, for all runs (default: "
             "runs/.cache, where --memory does not hold them)")
    add("--strict", action="store_true",
        help="stop where a picture of --data cannot be used (default: skip up to 5 %%)")
    add("--pictures", type=natural, metavar="N", help="how many pictures to generate")


def add_training(add: Callable) -> None:
    """Where it starts, and how it is trained."""
    add("--pretrained", type=filled, metavar="FILE",
        help="start from these weights, official or ours, instead of training")
    add("--pretrained-dual", type=filled, metavar="FILE",
        help="official file of the duals: a list of state dicts")
    add("--channels", type=filled, metavar="FILE",
        help="channel numbers of a --pretrained network that is already pruned")
    add("--steps", type=natural, metavar="N",
        help="training steps; with --pretrained: train it further")
    add("--patch", type=natural, metavar="N", help="side of an HR training patch in pixels")
    add("--batch", type=natural, metavar="N", help="patches per training step")
    add("--rate", type=positive, metavar="F", help="learning rate of training")
    add("--dual-weight", type=number(float, 0), metavar="F",
        help="weight of the way back in L_DR (default 0.1; 0: train without it)")
    add("--precision", choices=("fp32", "bf16"),
        help="bf16: products of training and fine-tuning in bfloat16 (default fp32)")
    add("--compile", action="store_const", const=True,
        help="train and fine-tune through torch.compile: a minute or more before the first step")
    add("--accumulate", type=natural, metavar="N",
        help="work on a training step's batch in N parts: the same gradients, 1/N of the memory")


def add_compression(add: Callable) -> None:
    """Search, selection, fine-tuning."""
    add("--search-steps", type=natural, metavar="N", help="steps of the channel number search")
    add("--first-order", action=argparse.BooleanOptionalAction,
        help="search without the second-order term, 3 passes and not 5: the default but in paper")
    add("--round", type=int, choices=(4, 8, 16),
        help="widths are multiples of this (default 4; 8 suits GPUs, 16 DRN on AVX-512)")
    add("--tune-steps", type=natural, metavar="N", help="fine-tuning steps")
    add("--teacher", type=teacher_file, metavar="ARCH:FILE",
        help="distil from this network (default: the unpruned one)")


def add_run(add: Callable) -> None:
    """What is no setting: where and with what to work."""
    add("--run", type=filled, metavar="DIR", help="folder of this run (default: runs/<name>)")
    add("--seed", type=number(int, 0, 2**63), help="of weights, pictures and patches (default 0)")
    add("--kernels", choices=("torch", "triton"),
        help="default: on a GPU whichever is faster there, timed at first use")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    """(args, settings) of the command line: resources and run folder, and all that decides the run.

    Wrong flags end the process with a sentence and exit code 2.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        settings = settle(args)
    except WrongUsage as error:
        parser.error(str(error))
    args.run = Path(args.run or default_folder(settings))
    return args, settings


def blueprint(arch: str, scale: int) -> nn.Module:
    """The network without memory for its weights: for what it says about itself."""
    with torch.device("meta"):
        return models.build(arch, scale)


def settle(args: argparse.Namespace) -> Settings:
    """The settings: a preset with what the flags change.

    WrongUsage: an unknown scale, a network without settings, flags that do not go together.
    """
    args.found = ""
    if bool(args.arch) == bool(args.network):
        raise WrongUsage("give --arch, or --network FILE.py:CLASS for a network of your own")
    if args.network:
        open_own(args)
    elif args.network_args or args.range:
        raise WrongUsage("--network-args and --range belong to --network FILE.py:CLASS")
    family = args.arch.partition("_")[0]
    preset = args.preset or ("default" if args.device.type == "cuda" else "quick")
    if (family, preset) not in PRESETS:
        raise WrongUsage(f"no settings for {args.arch}: add "
                         f"settings.PRESETS[{family!r}, {preset!r}]")
    settings = PRESETS[family, preset]
    given = {}
    for field in fields(settings):
        value = getattr(args, field.name, None)
        if value is not None:
            given[field.name] = value
    given["preset"] = preset
    given["continue_training"] = args.steps is not None
    settings = replace(settings, **given)
    try:
        network = blueprint(settings.arch, settings.scale)
    except ValueError as error:
        raise WrongUsage(f"--scale: {error}") from error
    settings = fitted(settings, args.patch, args.batch)
    if settings.widths == "uniform" and (args.search_steps or args.first_order is not None):
        raise WrongUsage("--search-steps and --first-order belong to --widths searched")
    if args.unpaired_share and not args.unpaired:
        raise WrongUsage("--unpaired-share belongs to --unpaired DIR")
    if settings.budget and not settings.prune:
        settings = replace(settings, prune=around(settings.budget, network))
    check(settings, network)
    check_shares(settings, args.device.type == "cuda")
    return settings


def around(budget: tuple[str, float], network: nn.Module) -> float:
    """The pruning ratio for --budget where none is given. How much of the latency belongs to no
    width is not known before it is measured: multiply-adds stand for it.
    """
    kind, part = budget
    fixed = evaluate.fixed_part(network, "params" if kind == "params" else "madds")
    return prune.budget_ratio(part, fixed)


def open_own(args: argparse.Namespace) -> None:
    """Runs the file of --network; sets `arch`, `scale`, `range`, and `found`, the table of what may
    be pruned. WrongUsage: flags that do not fit. ValueError: its network cannot be used.
    """
    if args.channels:
        raise WrongUsage("--channels is for official files: a pruned network of your own is a "
                         "checkpoint, which knows its widths")
    arch, scale, table = models.add_own(own.given(args), args.pretrained)
    if args.scale not in (None, scale):
        raise WrongUsage(f"--scale {args.scale}: {args.network} enlarges {scale} times")
    source = models.PRESETS[arch][1][scale]["source"]
    args.arch, args.scale, args.range = arch, scale, source["range"]
    args.found = (f"network   enlarges {scale} times, images in 0..{args.range:g}; widths that may "
                  f"be pruned (their channels), and layers that stay whole:\n{table}")
    if (args.prune or args.budget) and not source["pairs"]:
        raise ValueError(f"{args.network} has no width that can be pruned:\n{table}")
    if args.budget and own.shares_layers(source):
        raise WrongUsage("--budget needs widths whose costs add up, and in this network a layer "
                         "has two of them: use --prune")


def check(settings: Settings, network: nn.Module) -> None:
    """WrongUsage: settings that do not go together."""
    if settings.preset == "paper" and not settings.data:
        raise WrongUsage("--preset paper needs --data DIR with DF2K or DIV2K in it")
    if settings.budget and settings.budget[0] == "latency" and settings.widths == "uniform":
        raise WrongUsage("--budget latency=F needs the candidates of a search: leave --widths out")
    if settings.patch % settings.scale:
        raise WrongUsage(f"--patch {settings.patch} is not a multiple of the scale "
                         f"{settings.scale}")
    trains = settings.continue_training or not settings.pretrained
    normalises = any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    if trains and normalises and settings.batch < 2:
        raise WrongUsage(f"--batch {settings.batch}: {settings.arch} has BatchNorm over the "
                         f"patches of a step, give at least 2")
    if (settings.pretrained_dual or settings.channels) and not settings.pretrained:
        raise WrongUsage("--pretrained-dual and --channels belong to --pretrained FILE")
    if settings.unpaired:
        check_unpaired(settings, network)
    if settings.degradation != "bicubic" and network.kernel_size:
        raise WrongUsage(f"--degradation {settings.degradation}: {settings.arch} is blind and "
                         f"trained with blurs of its own, leave it out")
    if settings.widths == "uniform" and not settings.prune and not settings.budget:
        raise WrongUsage("--widths uniform compresses nothing by itself: add --prune R or --budget")


def check_unpaired(settings: Settings, network: nn.Module) -> None:
    """WrongUsage: settings with which photographs without originals teach nothing."""
    if network.kernel_size:
        raise WrongUsage(f"--unpaired: {settings.arch} is blind, it needs the true blur of every "
                         f"training picture: take another --arch")
    if not settings.dual_weight:
        raise WrongUsage("--dual-weight 0 leaves nothing to learn from --unpaired photographs: "
                         "give a weight above 0")
    if settings.batch < 2:
        raise WrongUsage(f"--batch {settings.batch} cannot hold a pair and a photograph of "
                         f"--unpaired: give at least 2")
    compress = settings.prune or settings.budget
    if settings.pretrained and not settings.continue_training and not compress:
        raise WrongUsage("--unpaired adapts --pretrained weights by training them: add --steps N")


def check_shares(settings: Settings, gpu: bool) -> None:
    """WrongUsage: batches that cannot be shared out to the processes there are (parallel.py).

    On GPUs the shares must be equal: the processes choose their kernels together, by size.
    """
    n = parallel.world()
    parts = [len(x) for x in torch.empty(settings.batch).chunk(settings.accumulate)]
    if min(parts) < n:
        raise WrongUsage(f"--batch {settings.batch} in {settings.accumulate} part(s) is too small "
                         f"for {n} processes: each needs a patch of every part")
    for count in (*parts, settings.search_batch, settings.select_batch):
        if gpu and count > n and count % n:
            raise WrongUsage(f"{count} patches do not divide equally among {n} GPUs: give a "
                             f"--batch that does (search and selection take no larger one)")


def fitted(settings: Settings, patch: int | None, batch: int | None) -> Settings:
    """The settings with patches that are multiples of the scale, and that fit into memory.

    patch, batch: what was given for training. A smaller one is meant for all stages, since somebody
    has little memory; the patch itself is left as it was given.
    """
    scale = settings.scale
    train_patch = settings.patch
    search_patch, select_patch = settings.search_patch, settings.select_patch
    search_batch, select_batch = settings.search_batch, settings.select_batch
    if patch is None:
        train_patch -= train_patch % scale
    else:
        search_patch = min(search_patch, patch)
        select_patch = min(select_patch, patch)
    if batch is not None:
        search_batch = min(search_batch, batch)
        select_batch = min(select_batch, batch)
    return replace(settings, patch=train_patch,
                   search_patch=search_patch - search_patch % scale, search_batch=search_batch,
                   select_patch=select_patch - select_patch % scale, select_batch=select_batch)


def default_folder(settings: Settings) -> str:
    """runs/drn_s_x4_p30, with a budget runs/drn_s_x4_params70; uniform widths are named, too."""
    if settings.budget:
        kind, part = settings.budget
        suffix = f"{kind}{100 * part:02.0f}"
    else:
        suffix = f"p{100 * settings.prune:02.0f}"
    if settings.widths == "uniform":
        suffix += "_uniform"
    return f"runs/{settings.arch}_x{settings.scale}_{suffix}"


def headline(args: argparse.Namespace, settings: Settings, using: str) -> str:
    """The first line of the output: what runs where, and why with this preset.

    using: what kernels.choose says.
    """
    gpu = args.device.type == "cuda"
    if args.preset:
        why = "given"
    elif gpu:
        why = "chosen because there is a GPU"
    else:
        why = "chosen because there is no GPU; --preset default trains longer"
    place = f"{torch.get_num_threads()} CPU threads"
    if gpu:
        place = torch.cuda.get_device_name(args.device)
    if parallel.world() > 1:
        place = f"{parallel.world()} processes, each with {place}"
    return (f"{settings.arch} x{settings.scale} on {place}, preset {settings.preset} ({why}), "
            f"{using}, run folder {args.run}")
