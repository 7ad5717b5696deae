"""Do the claims of the paper show on small networks? With and without each part of the method.

    python -m bench.claims                          # about two hours on two cores
    python -m bench.claims --quick                  # minutes: shows that it works
    python -m bench.claims --data BSDS400 --test Set5 --test Set14 --only b,c --seeds 5

A small DRN and a small SwinIR are trained and compressed in many ways, from several seeds:

    a   dense training with several weights of the dual term, and duals that begin in two ways
    b   which channels, at the same widths: the selection of DRC, parts of it, and other rules
    c   how many channels, at an equal number of parameters: searched, uniform, random, by L1 norms
    d   fine-tuning with and without distillation and the dual term
    e   the selection with several channels a round, with and without reused gradients
    f   as c, at an equal number of multiply-adds, and the search done in several ways

Each table compares its rows with its first one, seed by seed, since networks of one seed share
weights and patches. Printed are PSNR-Y on test pictures, the difference, and how many seeds are
better; means and standard deviations. What is finished is kept in the folder --run, so a run that
was stopped continues. "Cut" is before fine-tuning, on the first test set.
"""
import argparse
import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import evaluate
import models
import prune
import train
from backbones.drn import DRN
from backbones.swinir import SwinIR
from bench.channels import by_chance, by_l1_norm, by_reconstruction, greedy, lasso
from bench.compression import psnr
from run import Run, command, number, usable_device
from settings import PRESETS, Settings

SIZES = {
    "drn_small": (DRN, {4: dict(feats=8, blocks=4)}),                      # 235,097 parameters
    "swinir_small": (SwinIR, {4: dict(dim=24, depths=(2, 2), heads=2, direct=True)}),     # 48,096
}

# Widths are multiples of 2, not 4: of 8 channels, 30 % off would always be 4. The budget lies in
# the middle of what the search's candidates cost. Duals and search begin as the paper's do.
SHARED = dict(round=2, patch=48, batch=4, search_patch=48, search_batch=2, epoch=10,
              select_patch=48, select_batch=4, per_round=4, reuse=True,
              dual_start="random", first_order=False)
FULL = dict(steps=600, search_steps=100, tune_steps=200, select_batches=2)
QUICK = dict(pictures=8, side=192, steps=60, search_steps=10, tune_steps=20, select_batches=1)
NETWORKS = {
    "drn_small": replace(PRESETS["drn", "quick"], **SHARED, arch="drn_small", rate=1e-3,
                         tune_rate=5e-4, prune=0.2, budget=("params", 0.6)),
    "swinir_small": replace(PRESETS["swinir", "quick"], **SHARED, arch="swinir_small", ema=0.0,
                            prune=0.3, budget=("params", 0.8)),
}
PHOTOGRAPHS = "photographs"          # the built-in test set


# ---- what the rows of the tables are ------------------------------------------------------------
class Recipe(NamedTuple):
    """How a dense network becomes a smaller one. Without arguments: as DRC does, but searched.

    search, select, tune: settings that differ in this stage alone.
    """
    widths: str = "uniform"          # or searched, random, L1 norm
    channels: str = "features + L_DR"
    search: tuple = ()               # (setting, value) pairs
    select: tuple = ()
    tune: tuple = ()

    def folder(self) -> str:
        """A name of its own: what differs from Recipe()."""
        parts = []
        for name, value, usual in zip(self._fields, self, Recipe()):
            if value != usual:
                changes = [f"{n} {v}" for n, v in value] if isinstance(value, tuple) else [value]
                parts.append(", ".join([name, *changes]))
        return "; ".join(parts) or "reference"


MADDS = ("budget", "madds")          # a part of them that lies in the middle of the candidates:
PARTS = {"drn_small": 0.6, "swinir_small": 0.725}


def equal_madds() -> dict[str, Recipe]:
    """The rows of f: as c, but the budget is of multiply-adds; and the search in several ways."""
    def searched(*more) -> Recipe:
        return Recipe("searched", search=(MADDS, *more))

    return {
        "uniform": Recipe(search=(MADDS,)),
        "searched": searched(),
        "searched, first order": searched(("first_order", True)),
        "searched, rate of α 0.03": searched(("alpha_rate", 0.03)),
        "searched, twice the batch": searched(("search_batch", 4)),
        "searched, α does not decay": searched(("alpha_decay", 0.0)),
        "searched, no decay, rate 0.03": searched(("alpha_decay", 0.0), ("alpha_rate", 0.03)),
        "random": Recipe("random", search=(MADDS,)),
        "equal L1 mass": Recipe("L1 norm", search=(MADDS,)),
    }


def rounds_and_reuse() -> dict[str, Recipe]:
    """The rows of e; the first is the paper's."""
    rows = {}
    for reuse in (False, True):
        for n in (1, 4, 8, 16):
            name = f"{n} a round, " + ("gradients reused" if reuse else "scored anew")
            usual = (n, reuse) == (SHARED["per_round"], SHARED["reuse"])
            select = (("per_round", n), ("reuse", reuse))
            rows[name] = Recipe() if usual else Recipe(select=select)
    return rows


# {question: (title, {row: recipe})}; in a, settings of the training: (name, value) pairs
AVERAGES = ("dual_start", "averages")
QUESTIONS = {
    "a": ("dense, weight λ of the dual term", {
        "λ = 0": (("dual_weight", 0.0),),
        "0.01": (("dual_weight", 0.01),),
        "0.1": (),
        "1": (("dual_weight", 1.0),),
        "0.1, D begins as averages": (AVERAGES,),
        "1, D begins as averages": (("dual_weight", 1.0), AVERAGES)}),
    "b": ("which channels, uniform widths", {
        "features + L_DR (DRC)": Recipe(),
        "features + L_DR at λ = 0": Recipe(select=(("dual_weight", 0),)),
        "features (DCP)": Recipe(channels="features"),
        "L_DR": Recipe(channels="L_DR"),
        "L1 norm": Recipe(channels="L1 norm"),
        "random": Recipe(channels="random"),
        "greedy (ThiNet)": Recipe(channels="greedy"),
        "lasso (CP)": Recipe(channels="lasso")}),
    "c": ("how many channels, equal parameters", {
        "uniform": Recipe(),
        "searched": Recipe("searched"),
        "searched, rate of α 0.03": Recipe("searched", search=(("alpha_rate", 0.03),)),
        "searched, rate of α 0.1": Recipe("searched", search=(("alpha_rate", 0.1),)),
        "random": Recipe("random"),
        "equal L1 mass": Recipe("L1 norm")}),
    "d": ("fine-tuning, the same cut network", {
        "L1 loss alone": Recipe(tune=(("distill_weight", 0), ("dual_weight", 0))),
        "and dual": Recipe(tune=(("distill_weight", 0),)),
        "and distillation": Recipe(tune=(("dual_weight", 0),)),
        "and both (DRC)": Recipe()}),
    "e": ("selection, channels a round", rounds_and_reuse()),
    "f": ("how many channels, equal multiply-adds", equal_madds()),
}


# ---- how many -----------------------------------------------------------------------------------
class Lab(NamedTuple):
    """Where the cells of one network and seed are made, and with what."""
    folder: Path
    settings: Settings
    pictures: data.Pictures
    tests: dict[str, data.Pictures]
    device: torch.device


def dense(lab: Lab, changes: tuple = ()) -> tuple[Run, dict]:
    """(its run folder, the checkpoint) of the uncut network; changes: (setting, value) pairs."""
    settings = replace(lab.settings, **dict(changes))
    name = ", ".join(["dense", *(f"{name} {value}" for name, value in changes)])
    run = Run(lab.folder / name, asdict(settings))
    return run, run.read("train.pt") or train.train(run, settings, lab.device, lab.pictures)


def numbers(lab: Lab, recipe: Recipe, network: dict) -> dict[str, int]:
    """{pair: channels} for the budget, by the rule `recipe.widths`."""
    changes = dict(recipe.search)
    if MADDS in recipe.search:
        changes["budget"] = ("madds", PARTS[lab.settings.arch])
    settings = replace(lab.settings, **changes)
    if recipe.widths in ("searched", "uniform"):
        settings = replace(settings, widths=recipe.widths)
        run = Run(lab.folder / Recipe(recipe.widths, search=recipe.search).folder() / "widths",
                  asdict(settings))
        found = run.read("search.pt") or train.search(run, settings, lab.device, lab.pictures,
                                                      network)
        return found["widths"]
    model, _ = train.restore(network, lab.device)
    pairs = model.pairs()
    budget = train.cost_limit(None, settings, lab.device, model)      # of parameters: no run
    if recipe.widths == "random":
        rng = np.random.default_rng(settings.seed)
        sizes = []
        for pair in pairs:
            options = prune.candidates(pair.width, settings.prune, settings.round)
            sizes.append([pair.heads * n for n in options])
        names = [pair.name for pair in pairs]
        picks = prune.fit_budget(rng.normal(size=(len(pairs), 6)), sizes, names, budget)
        return {name: options[k] for name, options, k in zip(names, sizes, picks)}
    return by_l1_mass(model, settings.round, budget)


def by_l1_mass(model, multiple: int, budget: prune.Budget) -> dict[str, int]:
    """The widths with which the largest columns hold the same part of the L1 norm everywhere."""
    pairs = model.pairs()
    steps = []
    for i, pair in enumerate(pairs):
        norms = prune.importance(model, pair).sort(descending=True).values
        share = norms.cumsum(0) / norms.sum()
        for n in prune.widenings(pair, multiple):
            # the layer needs n channels when one multiple less holds too little
            steps.append((share[n - multiple - 1].item(), i, pair, n))
    steps.sort(key=lambda step: step[:2])
    return prune.widen(pairs, [step[2:] for step in steps], multiple, budget)


# ---- which --------------------------------------------------------------------------------------
LARGE = 1e6


def choose(lab: Lab, recipe: Recipe, network: dict, widths: dict[str, int]) -> dict:
    """The checkpoint of the network cut to `widths`, with the CPU seconds that choosing took: they
    do not depend on what else the machine is doing.
    """
    settings = replace(lab.settings, **dict(recipe.select))
    torch.manual_seed(settings.seed)
    model, duals = train.restore(network, lab.device)
    duals.requires_grad_(False)
    with closing(train.stream(settings, lab.device, model, settings.select_patch,
                              settings.select_batch, lab.pictures)) as batches:
        calibration = list(islice(batches, settings.select_batches))
    started = time.process_time()
    if recipe.channels == "L1 norm":
        kept = by_l1_norm(model, widths)
    elif recipe.channels == "random":
        kept = by_chance(model, widths, settings.seed)
    elif recipe.channels in ("greedy", "lasso"):
        rule = dict(greedy=greedy, lasso=lasso)[recipe.channels]
        kept = by_reconstruction(model, calibration, widths, rule)
    else:
        loss_fn, rate = selection_loss(recipe.channels, train.native_loss(settings, model, duals),
                                       settings.select_rate)
        kept = prune.select(model, calibration, loss_fn, widths, rate=rate,
                            per_round=settings.per_round, reuse=settings.reuse)
    seconds = time.process_time() - started
    smaller = prune.cut(model, kept, calibration)
    return dict(models.checkpoint(smaller, duals), seconds=seconds)


def selection_loss(channels: str, loss_fn: Callable, rate: float) -> tuple[Callable, float]:
    """(loss of the output, rate) for `prune.select`, which adds the distance of the features.

    To leave that out, the loss is made very large and the rate small by the same factor: scores are
    only compared, so nothing else changes.
    """
    if channels == "features":
        return lambda out, batch: 0.0, rate
    if channels == "L_DR":
        return lambda out, batch: LARGE * loss_fn(out, batch), rate / LARGE
    return loss_fn, rate


# ---- a cell: one row of one table for one seed --------------------------------------------------
def cell(lab: Lab, recipe: Recipe | tuple) -> dict:
    """{"psnr": {test set: dB}}, for a recipe also "cut" in dB, "seconds", "params" and "madds".

    Everything that is finished is read from the cell's folder.
    """
    if not isinstance(recipe, Recipe):
        run, network = dense(lab, recipe)
        return measured(run, lab, dict(psnr={}), network)
    settings = replace(lab.settings, **dict(recipe.tune))
    run = Run(lab.folder / recipe.folder(), asdict(settings))
    _, original = dense(lab)
    cut = run.read("select.pt")
    if cut is None:
        started = time.monotonic()
        widths = numbers(lab, recipe, original)
        cut = run.finish("select", choose(lab, recipe, original, widths), started)
    tuned = run.read("tune.pt") or train.tune(run, settings, lab.device, lab.pictures, cut,
                                              original)
    cost = evaluate.count(models.from_checkpoint(tuned), 96, 96)
    result = dict(psnr={}, seconds=cut["seconds"])
    return measured(run, lab, result, tuned, cut) | cost._asdict()


def measured(run: Run, lab: Lab, result: dict, network: dict, cut: dict | None = None) -> dict:
    """The result with the PSNR of all test sets; what result.json holds is not measured again."""
    if run.has("result.json"):
        result = json.loads((run.folder / "result.json").read_text())
    for name, pictures in lab.tests.items():
        if name not in result["psnr"]:
            result["psnr"][name] = psnr(models.from_checkpoint(network), pictures)
        if cut and "cut" not in result:
            result["cut"] = psnr(models.from_checkpoint(cut), pictures)
    run.write_json("result.json", result)
    return result


# ---- tables -------------------------------------------------------------------------------------
def spread(values: list[float], digits: int, sign: str = "") -> str:
    """Mean ± standard deviation (of a sample; none for one value)."""
    text = f"{np.mean(values):{sign}.{digits}f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.{digits}f}"
    return text


def table(rows: dict[str, list[dict]], tests: list[str], timed: bool) -> str:
    """Markdown. rows: {name: a result for each seed}; the first row is the reference."""
    reference = next(iter(rows.values()))
    compressed = "cut" in reference[0]
    head = [""]
    if timed:
        head.append("CPU seconds")
    if compressed:
        head += ["parameters", "MAdds", "cut"]
    for test in tests:
        head += [test, "difference", "won"]
    lines = [head, ["---"] * len(head)]
    for name, results in rows.items():
        line = [name]
        if timed:
            line.append(spread([result["seconds"] for result in results], 1))
        if compressed:
            line.append(f"{np.mean([result['params'] for result in results]):,.0f}")
            madds = np.mean([result["madds"] for result in results])
            line.append(f"{madds / 1e9:.3f} G")
            line.append(spread([result["cut"] for result in results], 3))
        for test in tests:
            values = [result["psnr"][test] for result in results]
            against = [result["psnr"][test] for result in reference]
            differences = np.subtract(values, against)
            line.append(spread(values, 3))
            if results is reference:
                line += ["–", "–"]
            else:
                line.append(spread(differences, 3, "+"))
                line.append(f"{(differences > 0).sum()} of {len(differences)}")
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- the command --------------------------------------------------------------------------------
def some_of(all_of_them, what: str) -> Callable:
    """The type of a flag that takes a few of these names, separated by commas."""
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in all_of_them:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is no {what}: choose among {', '.join(all_of_them)}")
        return [name for name in all_of_them if name in chosen]
    return parse


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a wrong one ends with a sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--only", type=some_of(QUESTIONS, "question"), default=list(QUESTIONS), metavar="a,b",
        help="these questions (default: all)")
    add("--networks", type=some_of(NETWORKS, "network"), default=list(NETWORKS), metavar="NAME",
        help=f"these networks (default: {','.join(NETWORKS)})")
    return parse_shared(parser, argv, "claims")


def parse_shared(parser: argparse.ArgumentParser, argv: list[str] | None,
                 name: str) -> argparse.Namespace:
    """Adds the flags that bench.unpaired has, too, and parses; name: that of the folder --run."""
    add = parser.add_argument
    add("--quick", action="store_true", help="networks that are hardly trained: minutes")
    add("--seeds", type=number(int, 1), default=3, metavar="N", help="how many (default 3)")
    add("--data", metavar="DIR", help="train on these pictures (default: generated ones)")
    add("--test", metavar="DIR", action="append", default=[],
        help="measure on these pictures, too, besides the photographs of scikit-image; repeatable")
    add("--run", metavar="DIR", help=f"folder of what is finished (default runs/{name})")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.run = Path(args.run or (f"runs/{name}_quick" if args.quick else f"runs/{name}"))
    return args


def open_tests(args: argparse.Namespace) -> dict[str, data.Pictures]:
    """{name: pictures at scales 1 and 4}: the built-in photographs and the folders of --test."""
    photographs = data.photographs((1, 4))
    tests = {PHOTOGRAPHS: photographs[:2] if args.quick else photographs}
    for folder in args.test:
        tests[Path(folder).name] = data.open_folder(folder, (1, 4))
    return tests


def labs(args: argparse.Namespace, name: str, tests: dict) -> list[Lab]:
    """A Lab for every seed; all of them share the training pictures."""
    sizes = FULL | (QUICK if args.quick else {})
    settings = replace(NETWORKS[name], **sizes, data=args.data)
    folder = args.run / name                # notes which pictures there are
    folder.mkdir(parents=True, exist_ok=True)
    pictures = train.open_data(SimpleNamespace(folder=folder), settings,
                               SimpleNamespace(memory=2.0, cache=None, strict=False))
    return [Lab(args.run / name / f"seed {seed}", replace(settings, seed=seed), pictures, tests,
                args.device) for seed in range(args.seeds)]


def main() -> None:
    args = parse_args()
    models.PRESETS.update(SIZES)
    tests = open_tests(args)
    cells = args.seeds * sum(len(QUESTIONS[q][1]) for q in args.only)
    for name in args.networks:
        results = {q: {row: [] for row in QUESTIONS[q][1]} for q in args.only}
        with tqdm(total=cells, desc=name, unit="cell", delay=2, dynamic_ncols=True) as bar:
            for lab in labs(args, name, tests):
                for q in args.only:
                    for row, recipe in QUESTIONS[q][1].items():
                        bar.set_postfix_str(f"{lab.folder.name}, {q}: {row}")
                        results[q][row].append(cell(lab, recipe))
                        bar.update()
        for q in args.only:
            print(f"\n**{q}, {name}: {QUESTIONS[q][0]}**\n")
            print(table(results[q], list(tests), timed=q == "e"), flush=True)


if __name__ == "__main__":
    command(main)
