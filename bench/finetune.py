"""How close does a pruned network of real weights come to what it was cut from?

    python -m bench.finetune --uncut --on Set5 --on Set14 --arch dat_light --prune 0.3 \\
        --pretrained DAT_light_x4.pth --data PHOTOGRAPHS --tune-steps 2000 --run runs/ceiling
    python -m bench.finetune --on Set5 --on Set14 --arch dat_light --prune 0.3 --widths uniform \\
        --pretrained DAT_light_x4.pth --data PHOTOGRAPHS --tune-steps 2000 --run runs/pruned

All stages of train.py, with its flags, and a look at PSNR-Y on the first folder after 0, 25, 50,
100, 200, ... steps of fine-tuning; in the end on all of them and on the eight built-in photographs.
With --uncut the network is fine-tuned whole by the same recipe on the same pictures: the ceiling,
since data and rate may by themselves cost something. --set changes numbers of settings.py for which
train.py has no flag. A stopped call continues.
"""
import argparse
import json
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import numpy as np

import data
import evaluate
import flags
import kernels
import models
import preflight
import train
from fitting import allow_tf32
from run import Run, command
from settings import Settings


class Watched(Run):
    """A run that measures the network after some steps of its last stage, into curve.json."""
    tests: dict[str, data.Pictures]
    curve: dict[str, dict[str, float]]

    def repeat(self, stage, steps, one_step, batches, parts, facts=dict):
        def and_look(k, batch):
            loss = one_step(k, batch)
            if stage == "tune" and is_mark(k + 1) and k + 1 < steps:
                self.watch(k + 1, parts["ema"].module if "ema" in parts else parts["model"])
            return loss

        super().repeat(stage, steps, and_look, batches, parts, facts)

    def watch(self, step: int, network) -> None:
        """Adds {test set: mean PSNR-Y in dB} of the network after this many steps."""
        fast = models.inference(network)
        found = {}
        for name, pictures in self.tests.items():
            rows = evaluate.evaluate(fast, pictures)
            found[name] = float(np.mean([row.psnr for row in rows]))
            found[f"{name} SSIM"] = float(np.mean([row.ssim for row in rows]))
        self.curve[str(step)] = found
        self.write_json("curve.json", self.curve)


def is_mark(step: int) -> bool:
    """25, 50, 100, 200, 400, ... and every 1000."""
    return step % 1000 == 0 or (step % 25 == 0 and (step // 25).bit_count() == 1)


def halved(pictures: data.Pictures) -> data.Pictures:
    """Pictures of half the size: what JPEG did to blocks of 8×8 pixels is then hardly seen."""
    largest = pictures.scales[-1]

    def load(i: int) -> data.Picture:
        high = data.imresize(pictures[i].images[largest], 0.5)
        return data.reduced(high, pictures.scales, pictures.names[i])

    return data.Pictures(pictures.names, data.cached(load, data.CACHE), pictures.scales)


def setting(text: str) -> tuple[str, float]:
    """The type of --set NAME=VALUE: a number of settings.Settings."""
    name, _, value = text.partition("=")
    numbers = {field.name for field in fields(Settings) if type(field.default) in (int, float)}
    if name not in numbers:
        raise argparse.ArgumentTypeError(f"{text!r}: settings.py has no number {name!r}")
    try:
        return name, type(getattr(Settings, name))(float(value))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER, as in "
                                         f"tune_rate=1e-4") from None


def print_curve(curve: dict[str, dict[str, float]]) -> None:
    """A line per look, a column per test set."""
    names = list(list(curve.values())[-1])
    print("steps  " + "  ".join(f"{name:>16}" for name in names))
    for step, found in curve.items():
        cells = [f"{found[name]:16.4f}" if name in found else f"{'':16}" for name in names]
        print(f"{step:>5}  " + "  ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        epilog=f"and the flags of train.py: {flags.make_parser().format_usage()}")
    add = parser.add_argument
    add("--uncut", action="store_true", help="cut nothing: the ceiling")
    add("--halved", action="store_true", help="train on the pictures at half their size")
    add("--on", action="append", default=[], metavar="DIR", help="measure there; repeatable")
    add("--set", action="append", default=[], type=setting, metavar="NAME=VALUE")
    own, rest = parser.parse_known_args()
    args, settings = flags.parse_args(rest)
    settings = replace(settings, **dict(own.set))
    kernels.choose(args.kernels)
    allow_tf32(settings.tf32)
    run = Watched(args.run, asdict(settings) | dict(uncut=own.uncut, halved=own.halved))
    run.look(preflight.stages(settings))
    tests = {}
    for folder in own.on:
        tests[Path(folder).name] = data.open_folder(folder, (1, settings.scale))
    tests["photographs"] = data.photographs((1, settings.scale))
    run.tests = dict(list(tests.items())[:1])
    run.curve = {}
    if run.has("curve.json"):
        run.curve = json.loads((run.folder / "curve.json").read_text())
    pictures = train.open_data(run, settings, args)
    if own.halved:
        pictures = halved(pictures)
    step = partial(train_stage, run, settings, args.device, pictures)
    dense = step("train", train.train)
    cut = dense
    if not own.uncut:
        found = step("search", train.search, dense)
        cut = step("select", train.select_and_cut, dense, found["widths"])
    model = models.from_checkpoint(cut)
    if not run.curve:
        run.watch(0, model)
    tuned = models.from_checkpoint(step("tune", train.tune, cut, dense))
    run.tests = tests
    if "photographs" not in run.curve.get(str(settings.tune_steps), {}):
        run.watch(settings.tune_steps, tuned)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    print_curve(run.curve)


def train_stage(run: Run, settings: Settings, device, pictures, name: str, stage, *given) -> dict:
    """The checkpoint of a stage of train.py, from the run folder or made now."""
    return run.done(name) or stage(run, settings, device, pictures, *given)


if __name__ == "__main__":
    command(main)
