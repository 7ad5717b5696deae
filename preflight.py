"""What a run is given from outside, looked at before hours of work depend on it.

`check` opens the weights and the teacher, meets the budget on an untrained network, and counts what
needs memory; `check_test` opens the pictures of the report. What they accept does not fail in a
later stage; what they refuse can be corrected, since nothing is done yet. The stages (train.py)
take from here what they need of it.

Not here: which flags go together (flags.py), training pictures that are broken (data.py). Read
data.py next.
"""
import os

import torch
from torch import nn

import dual
import evaluate
import flags
import latency
import models
import parallel
import prune
import report
from run import Bar, Run, WrongUsage, misfit, read_checkpoint
from settings import Settings

SEARCHED = dict(widths={str: int})       # see disk.misfit
counted = {}                             # what `costs` returned: the search asks again


# ---- weights from elsewhere ---------------------------------------------------------------------
def pretrained(settings: Settings) -> tuple:
    """(model, duals, whether the duals came with it) of --pretrained and --pretrained-dual."""
    file = settings.pretrained
    model, states = models.load_networks(file, settings.arch, settings.scale, settings.channels)
    duals = new_duals(settings, model)
    if settings.pretrained_dual:
        file = settings.pretrained_dual
        states = read_checkpoint(file, list)
    if states is None:
        return model, duals, False
    if len(states) != len(duals):
        raise ValueError(f"{file} holds {len(states)} duals, "
                         f"{settings.arch} x{settings.scale} has {len(duals)}")
    for i, state in enumerate(states):
        try:
            models.load_state(duals[i], state)
        except ValueError as error:
            raise ValueError(f"{file}, dual {i}: {error}") from error
    return model, duals, True


def load_teacher(settings: Settings) -> nn.Module:
    """The network of --teacher ARCH:FILE. ValueError: the file, or it cannot teach this network."""
    arch, _, path = settings.teacher.partition(":")
    teacher = models.load(path, arch, settings.scale)
    try:
        dual.check_teacher(flags.blueprint(settings.arch, settings.scale), teacher)
    except ValueError as error:
        raise ValueError(f"--teacher {settings.teacher}: {error}") from error
    return teacher


def new_duals(settings: Settings, model) -> nn.ModuleList:
    """Duals with random weights; for photographs without originals, such as work at once."""
    duals = dual.make_duals(model)
    if settings.unpaired or settings.dual_start == "averages":
        dual.start_from_averages(duals)
    return duals


# ---- a budget -----------------------------------------------------------------------------------
def cost_limit(run: Run, settings: Settings, device, model,
               sizes: dict[str, list[int]] | None = None) -> prune.Budget | None:
    """What --budget asks for: the cost of the whole network as a function of its widths.

    sizes: the candidates, {pair name: widths}; latency is measured for these.
    """
    if not settings.budget:
        return None
    kind, part = settings.budget
    if kind == "latency":
        table = parallel.from_main(
            lambda: latency.measure_pairs(model, sizes, device, run.folder / "latency.json"))
        return latency.budget(table, part, sizes)

    dense, of_channel = costs(model, kind)

    def cost(widths):
        saved = sum(of_channel[name] * (model.widths[name] - n) for name, n in widths.items())
        return dense - saved

    return prune.Budget(cost, int(part * dense))


def costs(model, kind: str) -> tuple[int, dict[str, float]]:
    """(the cost of the network as it is, {pair name: that of a channel}); kind: params or madds.

    Both are linear in every width: one network more for each pair is enough.
    """
    key = (kind, model.arch, model.scale, str(model.source), str(model.widths))
    if key in counted:
        return counted[key]

    dense = evaluate.count_with(model, model.widths, kind)
    of_channel = {}
    for pair in Bar(model.pairs(), "budget", leave=False, delay=2):
        whole = model.widths[pair.name]
        smallest = evaluate.count_with(model, {**model.widths, pair.name: pair.heads}, kind)
        of_channel[pair.name] = (dense - smallest) / max(1, whole - pair.heads)
    counted[key] = dense, of_channel
    return dense, of_channel


# ---- before anything is done --------------------------------------------------------------------
def stages(settings: Settings) -> dict:
    """{stage: a function that raises ValueError where its file cannot be of this run}."""
    checks = dict(train=lambda content: check_network(settings, content))
    if settings.prune or settings.budget:
        checks["search"] = lambda content: check_widths(settings, content)
        checks["select"] = lambda content: check_selected(settings, content)
        checks["tune"] = checks["train"]
    return checks


def check_network(settings: Settings, content: dict) -> None:
    """ValueError: this is no checkpoint of the run's network and its duals."""
    wrong = misfit(content, models.CHECKPOINT, "it")
    if wrong:
        raise ValueError(wrong)
    if (content["arch"], content["scale"]) != (settings.arch, settings.scale):
        raise ValueError(f"it holds {content['arch']} x{content['scale']}")
    model = models.from_checkpoint(content)
    try:
        dual.restore_duals(model, content["duals"])
    except (RuntimeError, ValueError) as error:      # PyTorch's sentence has many lines
        raise ValueError("its duals do not fit") from error


def check_selected(settings: Settings, content: dict) -> None:
    """ValueError: this is no such checkpoint, or not with the channels of all its layers."""
    report.check_orders(content)
    check_network(settings, content)


def check_widths(settings: Settings, content: dict) -> None:
    """ValueError: these are not the widths of all layers."""
    wrong = misfit(content, SEARCHED, "it")
    if wrong:
        raise ValueError(wrong)
    widths = flags.blueprint(settings.arch, settings.scale).with_widths(content["widths"]).widths
    if widths.keys() != content["widths"].keys():
        raise ValueError("it lacks the widths of some layers")


def check(run: Run, settings: Settings, device: torch.device) -> None:
    """Sentences now instead of failures in a later stage; what is finished is not looked at again.

    ValueError: a file, a budget. WrongUsage: too little memory.
    """
    if not all(run.found.values()):
        check_memory(settings)
    # by one process, which may have to fetch them
    parallel.from_main(lambda: check_weights(run, settings))
    if settings.budget and not run.found["search"]:
        check_budget(run, settings, device)


def check_weights(run: Run, settings: Settings) -> None:
    """ValueError: weights that were given, and that are still needed, cannot be used."""
    if settings.pretrained and not run.found["train"]:
        pretrained(settings)
    if settings.teacher and not run.found.get("tune"):
        load_teacher(settings)


def check_budget(run: Run, settings: Settings, device: torch.device) -> None:
    """ValueError: no widths meet --budget. Costs do not depend on what the weights are."""
    model = models.build(settings.arch, settings.scale)
    if settings.pretrained:
        model, _, _ = pretrained(settings)
    model.to(device)
    pairs = model.pairs()
    if settings.widths == "uniform":
        limit = cost_limit(run, settings, device, model)
        prune.uniform_widths(pairs, settings.prune, settings.round, limit)
        return
    searcher = prune.Search(model, None, settings.prune, multiple=settings.round)
    searcher.widths(cost_limit(run, settings, device, model, searcher.sizes()))


def check_test(settings: Settings, test: str | None) -> None:
    """ValueError, naming the picture: one cannot be read, or is too small to be compared.

    test: folder of the pictures to report on; None: the photographs.
    """
    network = flags.blueprint(settings.arch, settings.scale)
    pictures = report.open_pictures(test, settings.scale, network.kernel_size,
                                    settings.degradation, limit=0)
    count = len(pictures) if test else 1          # of the photographs one stands for all
    for i in Bar(range(count), "test", unit="picture", leave=False, delay=2):
        high = pictures[i].images[settings.scale]
        try:
            evaluate.luma_pair(high, high, settings.scale, least=evaluate.WINDOW)
        except ValueError as error:
            raise ValueError(f"--test {test}, {pictures.names[i]}: {error}") from error


def check_count(run: Run, settings: Settings, count: int) -> None:
    """ValueError: `count` training pictures are too few for a search that is still to be done."""
    compress = settings.prune or settings.budget
    if compress and settings.widths == "searched" and not run.found["search"]:
        split(count)


def split(count: int) -> tuple[int, int]:
    """Where T and V end among `count` pictures; what follows is held out."""
    if count < 3:
        raise ValueError(f"the search needs at least 3 pictures (two halves and held-out ones), "
                         f"there are {count}: give more")
    end_of_v = count - max(1, count // 10)
    return end_of_v // 2, end_of_v


def check_memory(settings: Settings) -> None:
    """WrongUsage: pictures or batches that no memory of this machine holds."""
    pixels = settings.batch * settings.patch ** 2
    what = f"--batch {settings.batch} patches of {settings.patch} pixels"
    need = 3 * 4 * pixels                    # float32
    generated = 0 if settings.data else 3 * settings.pictures * settings.side ** 2
    if generated > need:
        what = f"--pictures {settings.pictures} of {settings.side} pixels"
        need = generated
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        raise WrongUsage(f"{what} need {need / 2**30:,.0f} GiB, this machine has "
                         f"{have / 2**30:,.0f}: give fewer")
    if not settings.data and settings.patch > settings.side:
        raise WrongUsage(f"--patch {settings.patch} is larger than the generated pictures of "
                         f"{settings.side} pixels: give a smaller one, or --data")
