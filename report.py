"""What a person looks at after a run: a table on the screen, report.html, comparison.png.

    python report.py runs/drn_s_x4_p30                  # measures a run anew, rewrites its report
    python report.py runs/a runs/b other.pt             # several runs or networks in compare.html

The networks of a run (dense, cut, pruned) and bicubic interpolation are measured on test pictures:
PSNR and SSIM of the luma, parameters, multiply-adds (evaluate.py), and how long they take, measured
in turns (latency.py). Pictures come from --test, or are the eight photographs of scikit-image,
blurred for a blind network.

Not here: the measures themselves (evaluate.py), the look of the page (page.py), and what led to the
networks. Read run.py next.
"""
import quiet  # noqa: F401, first: what follows takes seconds to import

# isort: split

import argparse
import json
import math
import platform
import shlex
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import data
import evaluate
import kernels
import latency
import models
import own
import page
import zoo
from crops import comparison
from run import (
    Run,
    WrongUsage,
    command,
    filled,
    misfit,
    read_checkpoint,
    read_json,
    usable_device,
    write_file,
)

# the forms of what is read back, see disk.misfit
CONFIG = dict(prune=float, budget=(list, None))
QUALITY = dict(psnr=float, ssim=float)
COST = QUALITY | dict(params=int, madds=int, madds_720p=int)
LATENCY = dict(seconds=float, ratio=float)
START = dict(command=str, machine=str, versions=str, date=str)


# ---- measuring ----------------------------------------------------------------------------------
def measure(run: Run, states: dict[str, dict], test: str | None, device: torch.device) -> None:
    """Measures bicubic and the networks of `states`; writes comparison.png, report.html and, last,
    report.json.

    states: {"dense": checkpoint, ...}, all of one scale.
    test: folder of pictures; None: the photographs.
    """
    started = time.monotonic()
    # report.json comes last: where it stands, the pictures and the log belong to it
    (run.folder / "report.json").unlink(missing_ok=True)
    config = json.loads((run.folder / "config.json").read_text())
    degradation = config.get("degradation", "bicubic")           # what it was trained for
    table, rows, pictures = measure_all(states, test, device, degradation)
    shown = {name: results for name, results in rows.items() if name != "cut"}
    scale = states["dense"]["scale"]
    data.write_image(run.folder / "comparison.png", comparison(shown, pictures, scale))
    facts = surroundings(device)
    story = tell(run.folder, states["dense"])
    title = f"{states['dense']['arch']} ×{scale}, run {story.name}"
    html = page.build(title, timed(table), shown, pictures, [story], facts)
    write_file(run.folder / "report.html", html.encode())
    psnr = {name: round(line["psnr"], 3) for name, line in table.items()}
    seconds = round(time.monotonic() - started, 1)
    run.log(stage="report", seconds=seconds, test=test, **psnr, **facts)
    run.write_json("report.json", table)


def measure_all(states: dict[str, dict], test: str | None, device: torch.device,
                degradation: str = "bicubic") -> tuple[dict, dict, data.Pictures]:
    """({upscaler: its line of the table}, {upscaler: its evaluate.Rows}, the pictures) of bicubic
    and, after it, of the networks in their order; arguments as in `measure` and `data.open_folder`.
    """
    first = models.from_checkpoint(next(iter(states.values())))
    pictures = open_pictures(test, first.scale, first.kernel_size, degradation)
    measured = evaluate.evaluate(partial(data.imresize, scale=first.scale), pictures)
    rows = dict(bicubic=measured)
    table = dict(bicubic=means(measured))
    networks = {}
    for name, state in states.items():
        network = models.from_checkpoint(state)
        fast = models.inference(network, device=device)
        measured = evaluate.evaluate(fast, pictures)
        rows[name] = measured
        # the costs are counted on the network itself: folding changes them
        table[name] = means(measured) | costs(network)
        networks[name] = network
    for name, timing in times(networks, device).items():
        table[name]["latency"] = timing._asdict()
    return table, rows, pictures


def surroundings(device: torch.device) -> dict[str, str]:
    """The command, the machine, the versions and the date, for the log and the page."""
    script, *flags = sys.argv
    machine = latency.device_name(device)
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    return dict(command=shlex.join(["python", Path(script).name, *flags]), machine=machine,
                versions=f"{versions}, NumPy {np.__version__}", date=time.strftime("%Y-%m-%d"))


def log_start(run: Run, device: torch.device, **more) -> None:
    """Logs what a run is begun or continued with, and says so where it is not the same as before:
    sums in another order are equal only up to rounding. more: further facts for the log.
    """
    facts = surroundings(device) | dict(threads=torch.get_num_threads())
    before = [line for line in read_log(run.folder) if line["stage"] == "start"]
    for name in ("threads", "machine", "versions"):
        if before and before[-1].get(name) != facts[name]:
            print(f"note: this run was begun with {name} {before[-1].get(name)}, now it is "
                  f"{facts[name]}: its weights will not be the same to the last bit")
            break
    run.log(stage="start", **more, **facts)


def is_current(run: Run, test: str | None) -> bool:
    """Whether there is a report, and its pictures were these: log.jsonl tells which they were."""
    if not run.has("report.json"):
        return False
    try:
        read_table(run.folder)
    except ValueError as error:
        print(f"note: {error}: the networks are measured again")
        return False
    return last_test(run.folder) == test


def last_test(folder: Path) -> str | None:
    """The folder of the pictures that a run was last measured on; None: the photographs."""
    reports = [line for line in read_log(folder) if line["stage"] == "report"]
    return reports[-1]["test"] if reports else None


def read_log(folder: Path) -> list[dict]:
    """The lines of log.jsonl, if there is one; half a line, which kill -9 may leave, is skipped."""
    lines = []
    file = folder / "log.jsonl"
    text = file.read_text(errors="replace") if file.exists() else ""
    for text_line in text.splitlines():
        with suppress(ValueError, RecursionError):
            line = json.loads(text_line)
            if is_line(line):
                lines.append(line)
    return lines


def is_line(line) -> bool:
    """Whether this is a line of a log, with all that the page takes from it."""
    if misfit(line, dict(stage=str), "it"):
        return False
    form = {}
    if line["stage"] == "start":
        form |= START
    if line["stage"] == "report":
        form |= dict(test=(str, None))
    for name, kind in (("loss", float), ("alpha", [[float]])):
        if name in line:
            form |= {name: kind, "step": int}
    if "seconds" in line:
        form |= dict(seconds=float)
    return misfit(line, form, "it") is None


def read_table(folder: Path) -> dict[str, dict]:
    """The content of report.json. ValueError: it is missing, or damaged."""
    file = folder / "report.json"
    table = read_json(file, {str: QUALITY})
    for name, line in table.items():
        form = dict(COST) if "params" in line else {}
        if "latency" in line:
            form["latency"] = LATENCY
        wrong = misfit(line, form, name)
        if not wrong and "params" in line and line["madds"] <= 0:
            wrong = f"{name} has {line['madds']} multiply-adds"
        if not wrong and "latency" in line and line["latency"]["ratio"] <= 0:
            wrong = f"{name} takes no time"
        if wrong:
            raise ValueError(f"{file} is damaged ({wrong})")
    return table


def open_pictures(test: str | None, scale: int, kernel_size: int, degradation: str = "bicubic",
                  limit: int = data.CACHE) -> data.Pictures:
    """The test pictures at scales 1 and `scale`; limit: as in data.open_folder."""
    if test:
        return data.open_folder(test, (1, scale), limit, degradation=degradation)
    return data.photographs((1, scale), kernel_size, degradation)


def means(rows: list) -> dict:
    """PSNR-Y in dB, SSIM and seconds, each the mean over the evaluate.Rows of all pictures."""
    result = {}
    for name in ("psnr", "ssim", "seconds"):
        values = [getattr(row, name) for row in rows]
        result[name] = float(np.mean(values))
    return result


def costs(network: nn.Module) -> dict:
    """Parameters, and multiply-adds for a 96×96 input and for a 1280×720 output."""
    s = network.scale
    small = evaluate.count(network, 96, 96)
    large = evaluate.count(network, math.ceil(720 / s), math.ceil(1280 / s))
    return dict(params=small.params, madds=small.madds, madds_720p=large.madds)


def times(networks: dict[str, nn.Module], device) -> dict[str, latency.Timing]:
    """How long each network takes beside the first; those of the same widths are timed as one."""
    shapes = {name: tuple(network.widths.values()) for name, network in networks.items()}
    distinct = {shapes[name]: network for name, network in networks.items()}
    ready = {shape: latency.ready(network, device) for shape, network in distinct.items()}
    measured = latency.interleaved(ready, latency.noise(device))
    return {name: measured[shape] for name, shape in shapes.items()}


def timed(table: dict) -> dict:
    """The table for the page, where `seconds` are those that the networks took in turns."""
    return {name: line | dict(seconds=line.get("latency", line)["seconds"])
            for name, line in table.items()}


# ---- the table ----------------------------------------------------------------------------------
def print_table(run: Run) -> None:
    """Prints report.json as a table, and which files the run folder holds.

    "fewer" and "faster" say how many times fewer multiply-adds the network needs than the first
    one, and how many times faster it is, both for an input of 96×96.
    """
    table = read_table(run.folder)
    # 10 characters of name, then the columns, each as wide as its head
    print()
    print("            PSNR-Y    SSIM  parameters  MAdds 720p  MAdds 96x96  fewer  s 96x96  faster")
    first = next((line for line in table.values() if "madds" in line), {})
    for name, line in table.items():
        quality = f"{line['psnr']:>8.3f} {line['ssim']:>7.4f}"
        print(f"{name:10}{quality} {cost_columns(line, first)}")
    found = []
    for name in ("report.html", "comparison.png", "channels.json", "latency.json", "report.json",
                 "log.jsonl", "train.pt", "search.pt", "select.pt", "tune.pt"):
        if run.has(name):
            found.append(name)
    print(f"\n{run.folder}/: {', '.join(found)}")


def cost_columns(line: dict, first: dict) -> str:
    """Parameters, MAdds and time of one line, beside those of the first network; dashes for
    bicubic, which has none.
    """
    if "params" not in line:
        return "          -           -            -      -        -       -"
    madds = line["madds"] / 1e9
    madds_720p = line["madds_720p"] / 1e9
    fewer = first["madds"] / line["madds"]
    size = f"{line['params']:>11,} {madds_720p:>9.1f} G {madds:>10.2f} G {fewer:>6.2f}"
    if "latency" not in line:        # a report of before it was measured
        return f"{size}        -       -"
    timing = line["latency"]
    return f"{size} {timing['seconds']:>8.3f} {1 / timing['ratio']:>7.2f}"


# ---- what the page tells of a run ---------------------------------------------------------------
def tell(folder: Path, dense: dict) -> page.Story:
    """What a run folder knows of how its networks came about; dense: the checkpoint of train.pt."""
    config = read_json(folder / "config.json")
    widths = kept = orders = {}
    if (folder / "select.pt").exists():
        selected = read_checkpoint(folder / "select.pt")
        widths, kept, orders = dense["widths"], selected["widths"], selected["kept"]
    largest = models.from_checkpoint(dense).rgb_range
    return page.Story(folder.resolve().name, read_log(folder), config, largest, widths, kept,
                      orders)


def check_orders(selected: dict | None) -> None:
    """ValueError: the content of select.pt does not say which channels each layer keeps, in the
    order of selection. None: nothing was cut.
    """
    if selected is None:
        return
    wrong = misfit(selected, models.SELECTED, "it")
    if wrong:
        raise ValueError(wrong)
    if selected["kept"].keys() != selected["widths"].keys() or not all(selected["kept"].values()):
        raise ValueError("it lacks the channels of some layers")


def networks_of(folder: Path) -> dict[str, dict]:
    """{"dense": checkpoint, ...} of a finished run; ValueError where it is none."""
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is no run folder of train.py: it has no config.json")
    config = read_json(folder / "config.json", CONFIG)
    stages = dict(dense="train.pt")
    if config["prune"] or config["budget"]:
        stages |= dict(cut="select.pt", pruned="tune.pt")
    for file in stages.values():
        if not (folder / file).exists():
            raise ValueError(f"{folder} is not finished, it has no {file}: give its train.py "
                             f"command again")
    states = {name: network_of(folder / file) for name, file in stages.items()}
    try:
        check_orders(states.get("cut"))
    except ValueError as error:
        raise ValueError(f"{folder / 'select.pt'} is damaged ({error}): give the train.py command "
                         f"again, it makes it anew") from error
    return states


def network_of(file: Path) -> dict:
    """The checkpoint in a file, or of a released network ("zoo:drn_s30"); ValueError where it is
    neither.
    """
    if zoo.is_name(file):
        return models.checkpoint(models.load(str(file)), nn.ModuleList())
    state = read_checkpoint(file)
    if not models.is_checkpoint(state):
        raise ValueError(f"{file} does not say what network it is: python evaluate.py --weights "
                         f"{file} --arch ARCH measures it")
    models.from_file(state, file)
    return state


# ---- the command --------------------------------------------------------------------------------
def rebuild(folder: Path, test: str | None, device: torch.device) -> None:
    """Measures a finished run anew: report.html, comparison.png, report.json, the table."""
    states = networks_of(folder)
    run = Run(folder, read_json(folder / "config.json"))
    measure(run, states, test or last_test(folder), device)
    print_table(run)


def compare(paths: list[Path], output: Path, test: str | None, device: torch.device) -> None:
    """Measures the networks of several runs and files on the same pictures; writes the page."""
    states = {}
    stories = []
    for path in paths:
        if path.is_dir():
            found = networks_of(path)
            stories.append(tell(path, found["dense"])._replace(name=str(path)))
            found.pop("cut", None)
            states |= {f"{path} {name}": state for name, state in found.items()}
        else:
            states[str(path)] = network_of(path)
    kinds = {(state["scale"], models.from_checkpoint(state).kernel_size)
             for state in states.values()}
    if len(kinds) > 1:
        raise ValueError("these networks do not enlarge the same small pictures (other scales, or "
                         "only some are blind), so they cannot be compared: give others")
    table, rows, pictures = measure_all(states, test, device)
    html = page.build("Comparison", timed(table), rows, pictures, stories, surroundings(device))
    write_file(output, html.encode())
    print(f"wrote {output}")


def check_output(output: Path, force: bool) -> None:
    """WrongUsage: the file is there and was not written by this program."""
    if output.exists() and not force:
        with open(output, errors="replace") as file:
            if page.MARK not in file.read(1000):
                raise WrongUsage(f"{output} exists and is no page of report.py: give another "
                                 f"--output, or --force to overwrite it")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a wrong one ends with a sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        description="Measure a finished run anew and rewrite its report, or compare several.",
        allow_abbrev=False)
    add = parser.add_argument
    add("paths", nargs="+", type=lambda text: Path(filled(text)), metavar="RUN",
        help="run folders of train.py, checkpoints (.pt) of them, and released networks by name "
        "(zoo:drn_s30)")
    add("--output", type=lambda text: Path(filled(text)), metavar="FILE",
        help="the page that compares several (default compare.html); one run has its report.html")
    add("--force", action="store_true", help="overwrite FILE, whatever it is")
    add("--network", type=filled, metavar="FILE.py:CLASS",
        help="for runs of a network of your own; the file is run")
    add("--test", type=filled, metavar="DIR",
        help="measure on these pictures (default: for one run those of its last report, for "
             "several the eight photographs of scikit-image)")
    add("--kernels", choices=("torch", "triton"),
        help="default: on a GPU whichever is faster there, timed at first use")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.single = len(args.paths) == 1 and args.paths[0].is_dir()
    if args.single and (args.output or args.force):
        parser.error(f"--output and --force are for several runs: the page of one is "
                     f"{args.paths[0] / 'report.html'}")
    if len(set(args.paths)) < len(args.paths):
        parser.error("a run or checkpoint is given twice")
    return args


def main() -> None:
    args = parse_args()
    kernels.choose(args.kernels)
    if args.network:
        own.open_file(args.network)
    if args.single:
        rebuild(args.paths[0], args.test, args.device)
        return
    output = args.output or Path("compare.html")
    check_output(output, args.force)
    compare(args.paths, output, args.test, args.device)


if __name__ == "__main__":
    command(main)
