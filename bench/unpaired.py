"""Does unpaired adaptation help on photographs that were reduced in a way the network never saw?

    python -m bench.unpaired                    # minutes a seed on one core
    python -m bench.unpaired --quick            # shows that it works
    python -m bench.unpaired --test Set5 --test Set14 --data T91 --unpaired BSDS400 --seeds 5

The protocol of DRN (arXiv 2003.07018, Section 4.2) at a small scale. A small DRN is trained on
bicubic pairs, with duals that begin as averages (dual.start_from_averages: with random weights so
few steps leave them at 20 grey levels). It is tested on pictures reduced by nearest neighbour and
by blur-down (degradation.py): as it is, and after as many further steps in each of these ways, from
the same weights:

    pairs alone        bicubic pairs without the dual term: what more steps do by themselves
    adapted            bicubic pairs and unpaired small pictures of that reduction, by L_DR
    adapted, D known   the same, but the unpaired ones come back by their true reduction, not by D:
                       what adaptation could do if D learned how they were made
    true pairs         pairs of that reduction: the ceiling

The unpaired pictures show other scenes than the test does. Networks of one seed share weights and
patches, so differences are taken seed by seed from the first row. "The way back" is the mean of
|D(P(x)) − x| on the test pictures in grey levels, which is what adaptation minimises. What is
finished is kept in the folder --run, so a run that was stopped continues.
"""
import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import consistency
import data
import dual
import evaluate
import flags
import models
import train
from bench import claims
from fitting import fit
from run import Run, command, number, positive
from settings import Settings

NETWORK = "drn_small"                # that of bench.claims
FULL = dict(steps=600, tune_steps=200)
QUICK = claims.QUICK | dict(steps=60, tune_steps=20)
SCALES = (1, 2, 4)                   # of its pictures
KINDS = ("nearest", "blur-down")
OTHER_SCENES = 1000                  # seed of generated pictures that are used without originals
WAYS = ("before", "pairs alone", "adapted", "adapted, D known", "true pairs")


class Lab(NamedTuple):
    """Where the networks of one seed are made, and with what."""
    folder: Path
    settings: Settings                           # of "before"
    further: dict                                # what differs in the steps after that,
    adapting: dict                               # and where unpaired pictures are among them
    pairs: dict[str, data.Pictures]              # by the kind of reduction, also bicubic
    photographs: dict[str, data.Pictures]        # without originals, by kind
    tests: dict[str, dict[str, data.Pictures]]   # by kind, then by name
    device: torch.device


# ---- pictures -----------------------------------------------------------------------------------
def originals(folder: str | None, settings: Settings, scales: tuple[int, ...],
              seed: int) -> data.Pictures:
    """The pictures of a folder; None: generated ones."""
    if folder:
        return data.open_folder(folder, scales)
    return data.generate(settings.pictures, settings.side, scales, seed)


def again(pictures: data.Pictures, kind: str) -> data.Pictures:
    """The same originals, reduced in another way."""
    scales = pictures.scales

    def load(i: int) -> data.Picture:
        return data.reduced(pictures[i].images[scales[-1]], scales, pictures.names[i], kind)

    return data.Pictures(pictures.names, data.cached(load, data.CACHE), scales)


def without_originals(pictures: data.Pictures) -> data.Pictures:
    """Their small images alone, as unpaired.open_photographs has them."""
    def load(i: int) -> data.Picture:
        return data.Picture({1: pictures[i].images[1]})

    return data.Pictures(pictures.names, load, (1,))


# ---- one network --------------------------------------------------------------------------------
def trained(lab: Lab, way: str, kind: str) -> tuple[Run, dict]:
    """(its run folder, the checkpoint) of the network that was adapted in this way."""
    start = lab.folder / "before"
    if way == "before":
        run = Run(start, asdict(lab.settings))
        return run, run.read("train.pt") or train.train(run, lab.settings, lab.device,
                                                        lab.pairs["bicubic"])
    settings = replace(lab.settings, pretrained=str(start / "train.pt"), continue_training=True,
                       **lab.further)
    pairs, photographs, name = lab.pairs["bicubic"], None, way
    if way == "pairs alone":
        settings = replace(settings, dual_weight=0.0)
    elif way == "true pairs":
        settings = replace(settings, degradation=kind)
        pairs, name = lab.pairs[kind], f"{kind}, {way}"
    else:
        photographs = lab.photographs[kind]
        settings = replace(settings, **lab.adapting)
        name = f"{kind}, {way}, {settings.unpaired_share:g} of a batch, λ {settings.dual_weight:g}"
    run = Run(lab.folder / f"{name}, {settings.steps} steps", asdict(settings))
    state = run.read("train.pt")
    if state is None and way == "adapted, D known":
        state = with_known_way_back(run, settings, lab.device, pairs, photographs, kind)
    if state is None:
        state = train.train(run, settings, lab.device, pairs, photographs)
    return run, state


def with_known_way_back(run: Run, settings: Settings, device, pairs, photographs,
                        kind: str) -> dict:
    """train.train where unpaired pictures come back by their reduction; returns the checkpoint."""
    started = time.monotonic()
    torch.manual_seed(settings.seed)
    model, duals, _ = train.pretrained(settings)
    model.to(device, memory_format=torch.channels_last)
    duals.to(device)
    loss_fn = known_loss(settings, model, duals, kind)
    batches = partial(train.training_stream, settings, device, model, pairs, photographs)
    model = fit(run, "train", settings, model, duals, settings.steps, settings.rate, loss_fn,
                batches)
    return run.finish("train", models.checkpoint(model, duals), started, steps=settings.steps)


def known_loss(settings: Settings, model, duals, kind: str) -> Callable:
    """(output, batch) -> dual.native_loss with the true reduction as the dual of what is unpaired.

    That goes from the largest scale to 1.
    """
    scale = settings.scale
    weight = settings.dual_weight

    def loss_fn(out, batch):
        low = batch.images[1]
        paired = len(batch.images[scale])
        y = {s: x[:paired] for s, x in batch.images.items()}
        images = {s: x[:paired] for s, x in out.images.items()}
        back = data.reduce_images(out.images[scale][paired:], scale, kind)
        loss = paired * dual.dr_loss(images, y, duals, weight)
        loss = loss + (len(low) - paired) * weight * F.l1_loss(back, low[paired:])
        return model.rgb_range * loss / len(low)

    return loss_fn


def measured(run: Run, state: dict, kind: str, tests: dict[str, data.Pictures], device) -> dict:
    """{"psnr": {test set: dB}, "back": {test set: grey levels}}; what result.json of the run folder
    holds is not measured again.
    """
    results = {}
    if run.has("result.json"):
        results = json.loads((run.folder / "result.json").read_text())
    result = results.setdefault(kind, dict(psnr={}, back={}))
    for name, pictures in tests.items():
        if name in result["psnr"]:
            continue
        model, duals = train.restore(state, device)
        rows = evaluate.evaluate(models.inference(model), pictures)
        back = [consistency.difference(picture.images[1], row.image, duals).mean()
                for picture, row in zip(pictures, rows)]
        result["psnr"][name] = float(np.mean([row.psnr for row in rows]))
        result["back"][name] = float(np.mean(back))
        run.write_json("result.json", results)
    return result


# ---- tables -------------------------------------------------------------------------------------
def table(rows: dict[str, list[dict]], tests: list[str]) -> str:
    """That of bench.claims (PSNR-Y, difference, seeds won), and the way back in grey levels."""
    lines = claims.table(rows, tests, timed=False).splitlines()
    lines[0] += " the way back |"
    lines[1] += " --- |"
    for i, results in enumerate(rows.values(), 2):
        values = [np.mean(list(result["back"].values())) for result in results]
        lines[i] += f" {claims.spread(values, 2)} |"
    return "\n".join(lines)


# ---- the command --------------------------------------------------------------------------------
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a wrong one ends with a sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--ways", type=claims.some_of(WAYS, "way"), default=list(WAYS), metavar="a,b",
        help=f"these rows after the first (default: all of {', '.join(WAYS[1:])})")
    add("--share", type=flags.share, default=0.3, metavar="F",
        help="the part of a batch that is unpaired (default 0.3)")
    add("--dual-weight", type=positive, default=0.1, metavar="F",
        help="λ of the adaptation (default 0.1)")
    add("--tune-steps", type=number(int, 1), metavar="N", help="further steps (default 200)")
    add("--unpaired", metavar="DIR",
        help="reduce these originals for the unpaired pictures (default: generated ones)")
    return claims.parse_shared(parser, argv, "unpaired")


def labs(args: argparse.Namespace) -> list[Lab]:
    """A Lab for every seed; all of them share the pictures."""
    sizes = QUICK if args.quick else FULL
    source = args.unpaired or "generated"            # names it; also for the duals of "before"
    settings = replace(claims.NETWORKS[NETWORK], **sizes, data=args.data, unpaired=source)
    further = dict(steps=args.tune_steps or settings.tune_steps, rate=settings.tune_rate)
    adapting = dict(dual_weight=args.dual_weight, unpaired_share=args.share)
    scale = settings.scale
    pairs = originals(args.data, settings, SCALES, 0)
    others = originals(args.unpaired, settings, (1, scale), OTHER_SCENES)
    tests = claims.open_tests(args)
    return [Lab(args.run / f"seed {seed}", replace(settings, seed=seed), further, adapting,
                dict(bicubic=pairs) | {kind: again(pairs, kind) for kind in KINDS},
                {kind: without_originals(again(others, kind)) for kind in KINDS},
                {kind: {name: again(test, kind) for name, test in tests.items()} for kind in KINDS},
                args.device) for seed in range(args.seeds)]


def main() -> None:
    args = parse_args()
    models.PRESETS.update(claims.SIZES)
    ways = ["before"] + [way for way in args.ways if way != "before"]
    results = {kind: {way: [] for way in ways} for kind in KINDS}
    finished = labs(args)
    with tqdm(total=args.seeds * len(KINDS) * len(ways), desc="unpaired", unit="network", delay=2,
              dynamic_ncols=True) as bar:
        for lab in finished:
            for kind in KINDS:
                for way in ways:
                    bar.set_postfix_str(f"{lab.folder.name}, {kind}: {way}")
                    run, state = trained(lab, way, kind)
                    results[kind][way].append(measured(run, state, kind, lab.tests[kind],
                                                       lab.device))
                    bar.update()
    for kind, rows in results.items():
        print(f"\n**{kind}**\n")
        print(table(rows, list(finished[0].tests[kind])), flush=True)


if __name__ == "__main__":
    command(main)
