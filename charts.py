"""The charts of the report: matplotlib figures as SVG elements that stand inside an HTML page.

An element takes the colours of text and lines from the page (`--ink`, `--line`), so that it can be
read on light and on dark ground, and its font, too. Every function returns one such element, or a
list of them, as a string. Not here: the page around them (page.py, to be read next).
"""
import io
import re
from html import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# these can be told from white and from black, and from each other
COLOURS = ("#2f81f7", "#e16f24", "#2da44e", "#a371f7", "#d4a72c", "#e85aad")
GREY = "#8b949e"
INK, LINE = "#010203", "#040506"     # stand for the page's colours until the figure is text
STYLE = {
    "svg.fonttype": "none",          # letters stay letters, in the font of the page
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "legend.frameon": False,
}
STYLE |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor",
                        "ytick.labelcolor"), INK)
SMALL = (4.4, 2.9)                   # inches; two or three of these stand side by side
WIDE = (12, 2.9)
LONGEST = 22                         # letters of a network's name beside its point
STAGES = {"train": "Training", "search": "Search", "tune": "Fine-tuning"}
SHADES = LinearSegmentedColormap.from_list("shades", [COLOURS[0] + "00", COLOURS[0] + "ff"])


def chart(size: tuple[float, float], title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """An empty chart; size in inches of 72 units, x and y: what the axes show, with its unit."""
    figure = Figure(size, layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes


def svg(figure: Figure, name: str, says: str) -> str:
    """The figure as an SVG element.

    name: of letters; it makes the element's ids different from those of other charts in the page.
    says: what a screen reader says in place of it.
    """
    blob = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(blob, format="svg", transparent=True, metadata=nothing)
    text = blob.getvalue()
    text = text[text.index("<svg"):].replace(INK, "var(--ink)").replace(LINE, "var(--line)")
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(says)}"', 1)


# ---- losses -------------------------------------------------------------------------------------
@matplotlib.rc_context(STYLE)
def losses(logs: dict[str, list[dict]], ranges: dict[str, float]) -> list[str]:
    """A chart per stage that has a loss, with a line per run.

    logs: {run: lines of its log.jsonl}; ranges: {run: largest value of a pixel inside its network}.
    """
    largest = set(ranges.values())
    unit = f"pixels 0 to {largest.pop():g}" if len(largest) == 1 else "each network's own pixels"
    result = []
    for stage, title in STAGES.items():
        figure, axes = chart(SMALL, title, "step", f"loss ({unit})")
        for colour, (run, log) in zip(colours(), logs.items()):
            steps, values = curve(log, stage)
            if steps:
                axes.plot(steps, values, color=colour, alpha=0.35, linewidth=0.8)
                axes.plot(steps, running_mean(values), color=colour, linewidth=1.8, label=run)
        if axes.lines:
            finish(axes, len(logs))
            result.append(svg(figure, f"loss-{stage}", f"{title}: loss over the steps"))
    return result


def colours():
    """The colours, again and again."""
    while True:
        yield from COLOURS


def finish(axes: Axes, lines: int) -> None:
    """Axes from zero, with whole steps; a legend where there is more than one line."""
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if lines > 1:
        axes.legend(fontsize=8)


def curve(log: list[dict], stage: str) -> tuple[list[int], list[float]]:
    """(steps, losses) of a stage. A step that was repeated after kill -9 counts once."""
    found = {}
    for line in log:
        if line["stage"] == stage and "loss" in line:
            found[line["step"]] = line["loss"]
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def running_mean(values: list[float]) -> np.ndarray:
    """Each value's mean with its neighbours, a tenth of all together; at the ends there are fewer.
    """
    half = len(values) // 20
    means = [np.mean(values[max(0, k - half):k + half + 1]) for k in range(len(values))]
    return np.array(means)


# ---- the search ---------------------------------------------------------------------------------
@matplotlib.rc_context(STYLE)
def chances(log: list[dict], name: str) -> list[str]:
    """softmax(α) over the steps of the search: three charts, none where the log has no α.

    Lines of the log hold "alpha", the six chances of every layer. name: as in `svg`.
    """
    found = {line["step"]: line["alpha"] for line in log
             if line["stage"] == "search" and "alpha" in line}
    if not found:
        return []
    steps = sorted(found)
    p = np.array([found[step] for step in steps])                  # (steps, layers, 6)
    return [likeliest(steps, p, name), average(steps, p, name), final(p[-1], name)]


def likeliest(steps: list[int], p: np.ndarray, name: str) -> str:
    """The chance of every layer's likeliest width; p: (steps, layers, 6)."""
    figure, axes = chart(SMALL, "Has the search decided?", "step", "chance of the likeliest width")
    largest = p.max(2)
    axes.plot(steps, largest, color=COLOURS[0], alpha=0.25, linewidth=0.7)
    axes.plot(steps, np.median(largest, 1), color=COLOURS[0], linewidth=2, label="median layer")
    axes.axhline(1 / p.shape[2], color=GREY, linestyle="--", label="all widths equal")
    finish(axes, 0)
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize=8, ncols=2, loc="lower right")
    return svg(figure, f"{name}-likeliest", "Chance of each layer's likeliest width over the steps")


def average(steps: list[int], p: np.ndarray, name: str) -> str:
    """The six chances, each averaged over the layers; p: (steps, layers, 6)."""
    figure, axes = chart(SMALL, "The six widths, mean of all layers", "step", "chance")
    for k, colour in zip(range(p.shape[2]), colours()):
        label = {0: "narrowest", p.shape[2] - 1: "widest"}.get(k, f"{k + 1}")
        axes.plot(steps, p[..., k].mean(1), color=colour, label=label)
    finish(axes, 0)
    axes.legend(fontsize=8, ncols=3)
    axes.set_ylim(top=1.4 * p.mean(1).max())                       # room for the legend
    return svg(figure, f"{name}-average", "Mean chance of each of the six widths over the steps")


def final(p: np.ndarray, name: str) -> str:
    """The chances at the last step; p: (layers, 6). The fields get the id "<name>-final-fields"."""
    figure, axes = chart(SMALL, "Chances at the last step", "layer", "candidate width")
    axes.grid(False)
    layers, options = p.shape
    shown = axes.pcolormesh(np.arange(layers + 1) - 0.5, np.arange(options + 1) - 0.5, p.T,
                            cmap=SHADES, vmin=0, vmax=1, snap=True, gid="fields")
    names = ["narrowest", *(f"{k}" for k in range(2, options)), "widest"]
    axes.set_yticks(range(options), names)
    bar = figure.colorbar(shown, label="chance", ticks=[0, 0.5, 1])
    bar.solids.set(edgecolor="face", rasterized=False)
    return svg(figure, f"{name}-final", "Chance of each candidate width for each layer")


# ---- widths -------------------------------------------------------------------------------------
@matplotlib.rc_context(STYLE)
def widths(dense: dict[str, int], kept: dict[str, int], name: str) -> str:
    """The channels of every layer, dense and kept, side by side.

    dense, kept: {layer: channels}. The bar of layer i gets the id "<name>-bar-<i>".
    """
    figure, axes = chart(WIDE, "", "hidden layer, from the input to the output", "channels")
    places = range(len(dense))
    whole = axes.bar(places, list(dense.values()), 0.84, color=GREY, alpha=0.35, label="dense")
    axes.bar(places, [kept[layer] for layer in dense], 0.84, color=COLOURS[0], label="kept")
    for i, bar in enumerate(whole):
        bar.set_gid(f"bar-{i}")
    axes.set_xlim(-0.7, len(dense) - 0.3)
    axes.grid(False, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    figure.legend(loc="outside upper right", ncols=2)
    return svg(figure, name, "Channels of every layer, dense and kept")


# ---- quality against cost -----------------------------------------------------------------------
@matplotlib.rc_context(STYLE)
def quality(table: dict[str, dict], cost: str, unit: float, title: str, label: str) -> str:
    """PSNR-Y against a cost, a point per network; bicubic interpolation is a dashed line.

    table: {network: its line of report.json}; cost: the name of a number in these lines, shown
    divided by `unit`; title: its name; label: the same with the unit, on the axis.
    """
    figure, axes = chart(SMALL, f"PSNR against {title}", label, "PSNR-Y (dB)")
    xs = [line[cost] / unit for line in table.values() if "params" in line]
    for colour, (name, line) in zip(colours(), table.items()):
        if "params" not in line:
            axes.axhline(line["psnr"], color=GREY, linestyle="--")
            axes.annotate(name, (0.99, line["psnr"]), xycoords=("axes fraction", "data"),
                          xytext=(0, 3), textcoords="offset points", ha="right", color=INK)
            continue
        x = line[cost] / unit
        axes.plot(x, line["psnr"], "o", color=colour, markersize=8)
        aside, side = (7, "left") if x < 0.75 * max(xs) else (-7, "right")
        short = name if len(name) <= LONGEST else f"…{name[1 - LONGEST:]}"
        axes.annotate(short, (x, line["psnr"]), xytext=(aside, 5), textcoords="offset points",
                      ha=side, color=INK)
    axes.margins(y=0.15)
    axes.set_xlim(0, 1.1 * max(xs))
    return svg(figure, f"cost-{cost}", f"PSNR-Y against {label}, a point per network")
