"""Trains a super-resolution network with dual regression, compresses it, reports: the whole of DRC.

    python train.py --arch drn_s --prune 0.3

                PSNR-Y    SSIM  parameters  MAdds 720p  MAdds 96x96  fewer  s 96x96  faster
    bicubic     30.276  0.8065           -           -            -      -        -       -
    dense       31.200  0.8252   4,804,065     687.0 G     109.92 G   1.00    0.795    1.00
    cut         30.995  0.8205   2,761,305     417.9 G      66.87 G   1.64    0.632    1.30
    pruned      31.276  0.8260   2,761,305     417.9 G      66.87 G   1.64    0.632    1.30

The stages of DRC (arXiv 2207.07929), in the order of this file: 1 data, 2 primal and dual training,
3 search (how many channels each layer keeps), 4 select and cut (which ones), 5 fine-tuning with
distillation, 6 report. Every stage leaves `runs/<name>/<stage>.pt`. A run that was stopped, even by
kill -9, continues when the same command is given again; on a CPU it ends with the same weights, to
the last bit.

Begin with `main` at the end of this file. Not here: the mathematics (dual.py, search.py, prune.py),
the training loop (fitting.py), the numbers (settings.py), the run folder (run.py), the flags
(flags.py), the report (report.py). Read settings.py next, then data.py.
"""
import quiet  # noqa: F401, first: what follows takes seconds to import

# isort: split
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from itertools import islice

import torch
from torch import nn

import data
import dual
import flags
import gather
import kernels
import latency
import models
import parallel
import preflight
import prune
import report
import unpaired
from fitting import allow_tf32, autocast, fit
from preflight import cost_limit, load_teacher, new_duals, pretrained, split
from run import Run, command
from settings import Settings


# ---- 1 data -------------------------------------------------------------------------------------
def open_data(run: Run, settings: Settings, args) -> data.Pictures:
    """The training pictures at all scales of the duals; args: memory, cache, strict of flags.py."""
    scales = {1, settings.scale}
    for source, goal, _ in flags.blueprint(settings.arch, settings.scale).dual_spec:
        scales |= {source, goal}
    scales = tuple(sorted(scales))
    if settings.data:
        patch = settings.patch
        if settings.prune:
            patch = max(patch, settings.search_patch, settings.select_patch)
        memory = int(args.memory * 2**30 / parallel.world())
        wishes = gather.Wishes(patch, memory, args.cache, args.strict, settings.degradation)
        with parallel.main_first():      # it fills the cache
            return gather.training_pictures(settings.data, scales, wishes, run.folder)
    side = settings.side
    pictures = parallel.from_main(
        lambda: data.generate(settings.pictures, side, scales, settings.seed,
                              degradation=settings.degradation))
    print(f"data      {len(pictures)} generated dead-leaves pictures of {side}x{side}")
    return pictures


def stream(settings: Settings, device, model, patch: int, batch: int, pictures, start: int = 0):
    """The endless batches (SR, on the device) that `model` needs, from step `start` on."""
    batches = data.batches(pictures, patch, batch, settings.seed, start, device.type == "cuda")
    batches = data.to_device(batches, device)
    if not model.kernel_size:
        return batches
    return data.blind(batches, model.kernel_size, settings.seed, start, settings.epsilon)


def open_unpaired(settings: Settings, memory: float) -> data.Pictures | None:
    """The photographs without originals (unpaired.py), if there are any."""
    if not settings.unpaired:
        return None
    limit = int(memory * 2**30 / parallel.world())
    photographs = unpaired.open_photographs(settings.unpaired, limit)
    count = unpaired.alone(settings.batch, settings.unpaired_share)
    print(f"unpaired  {len(photographs)} photographs of {settings.unpaired}, {count} of the "
          f"{settings.batch} patches of a step")
    return photographs


def training_stream(settings: Settings, device, model, pictures, photographs, start: int = 0):
    """The batches of stages 2 and 5: where there are photographs, they stand beside the pairs."""
    if not photographs:
        return stream(settings, device, model, settings.patch, settings.batch, pictures, start)
    batches = unpaired.batches(pictures, photographs, settings.patch, settings.batch,
                               settings.unpaired_share, settings.seed, start)
    return data.to_device(batches, device)


# ---- 2 primal and dual training -----------------------------------------------------------------
def train(run: Run, settings: Settings, device, pictures, photographs=None) -> dict:
    """Minimises L_DR (dual.py) from scratch; returns the checkpoint of the dense network.

    Pretrained weights stay as they are: only missing duals are trained, unless --steps is given.
    photographs: those of `open_unpaired`.
    """
    started = time.monotonic()
    torch.manual_seed(settings.seed)
    steps = settings.steps
    if settings.pretrained:
        model, duals, complete = pretrained(settings)
        further = settings.continue_training
        model.train(further)
        if not further:
            model.requires_grad_(False)
            needed = settings.dual_weight and not complete
            steps = settings.dual_steps if needed else 0
    else:
        model = models.build(settings.arch, settings.scale)
        duals = new_duals(settings, model)
        if settings.preset != "paper":
            model.start_from_interpolation()
    model.set_drop_path(settings.drop_path)
    model.to(device, memory_format=torch.channels_last)
    duals.to(device)
    batches = partial(training_stream, settings, device, model, pictures, photographs)
    model = fit(run, "train", settings, model, duals, steps, settings.rate,
                native_loss(settings, model, duals), batches)
    return run.finish("train", models.checkpoint(model, duals), started, steps=steps)


def native_loss(settings: Settings, model, duals) -> Callable:
    """(output, batch) -> L_DR in the network's own range, see dual.native_loss."""
    return partial(dual.native_loss, duals=duals, weight=settings.dual_weight,
                   rgb_range=model.rgb_range)


def restore(state: dict, device) -> tuple:
    """(network, its duals) of a checkpoint, on the device."""
    model = models.from_checkpoint(state)
    duals = dual.restore_duals(model, state["duals"])
    model.to(device, memory_format=torch.channels_last)
    duals.to(device)
    return model, duals


# ---- 3 search: how many channels each layer keeps -----------------------------------------------
def search(run: Run, settings: Settings, device, pictures, dense: dict) -> dict:
    """Channel number search on `dense`, the checkpoint of stage 2; returns {"widths": {pair: n},
    ...}. Uniform widths need no search (prune.uniform_widths).

    Two halves of the pictures, T and V, train the weights and the α's (search.py). The last tenth
    is held out: after each epoch it shows whether the α's are the best so far.
    """
    started = time.monotonic()
    torch.manual_seed(settings.seed)
    model, duals = restore(dense, device)
    if settings.widths == "uniform":
        budget = cost_limit(run, settings, device, model)
        widths = prune.uniform_widths(model.pairs(), settings.prune, settings.round, budget)
        return finish_search(run, settings, model, dict(widths=widths), started)
    searcher = prune.Search(
        model, native_loss(settings, model, duals), settings.prune, extra=duals.parameters(),
        rate=settings.search_rate, decay=settings.search_decay, clip=settings.search_clip,
        alpha_rate=settings.alpha_rate, alpha_decay=settings.alpha_decay,
        second_order=not settings.first_order, multiple=settings.round,
        reduce=partial(parallel.average, share=parallel.share(settings.search_batch)))
    budget = cost_limit(run, settings, device, model, searcher.sizes())
    if budget:
        searcher.widths(budget)      # one that cannot be met is refused now, not after the search
    # the pictures of T, of V, and those held out
    end_of_t, end_of_v = split(len(pictures))
    batches = partial(stream, settings, device, model, settings.search_patch,
                      settings.search_batch)

    def both(start):
        with (closing(batches(pictures[:end_of_t], start)) as t,
              closing(batches(pictures[end_of_t:end_of_v], start)) as v):
            yield from zip(map(parallel.own, t), map(parallel.own, v))

    # the same few batches are looked at after every epoch
    with closing(batches(pictures[end_of_v:])) as source:
        held_out = [parallel.own(batch) for batch in islice(source, 4)]

    def one_step(k, t_and_v):
        loss, _ = searcher.step(*t_and_v)
        if (k + 1) % settings.epoch == 0 or k + 1 == settings.search_steps:
            searcher.hold(held_out)
        return loss

    run.repeat("search", settings.search_steps, one_step, both, dict(search=searcher),
               lambda: dict(alpha=searcher.chances()))
    loss, alphas = searcher.best
    facts = dict(held_out=round(loss, 4), decision=prune.decision(alphas))
    measured = {}
    if settings.budget and settings.budget[0] == "latency":
        run.save("search", settings.search_steps, dict(search=searcher))
        widths, measured["latency"] = in_time(searcher, model, budget, settings, device)
    else:
        widths = searcher.widths(budget)
    found = dict(widths=widths, alphas=torch.stack(alphas))
    return finish_search(run, settings, model, found, started, measured, **facts)


def finish_search(run: Run, settings: Settings, model, found: dict, started: float,
                  measured: dict | None = None, **facts) -> dict:
    """Writes channels.json and search.pt, prints what was found; returns it, {"widths": ...}.

    measured: more for channels.json; facts: more for the log.
    """
    widths = found["widths"]
    channels = dict(arch=settings.arch, scale=settings.scale, dense=model.widths)
    run.write_json("channels.json", channels | (measured or {}) | dict(widths=widths))
    kept = f"{sum(widths.values())}/{sum(model.widths.values())}"
    print(f"search    {kept} channels stay, {facts.get('decision', 'uniform widths, no search')}")
    return run.finish("search", found, started, kept=kept, widths=settings.widths, **facts)


def in_time(searcher, model, budget: prune.Budget, settings: Settings,
            device) -> tuple[dict[str, int], dict]:
    """The widths that take the time of --budget latency=F, and what channels.json says of it."""
    part = settings.budget[1]
    widths, timing = parallel.from_main(
        lambda: latency.fit(searcher.widths, model, budget, part, device))
    where = latency.device_name(device)
    print(f"latency   {timing.ratio:.3f} of the dense network's time, asked for were {part:g} "
          f"(spread {timing.ratio_spread:.3f}), on {where}")
    return widths, dict(device=where, asked=part, **timing._asdict())


# ---- 4 select which ones, then cut --------------------------------------------------------------
class Selection:
    """The network being masked, and what it keeps so far, as one thing that can be saved."""
    def __init__(self, model):
        self.model = model
        self.kept = {}

    def state_dict(self) -> dict:
        return dict(model=self.model.state_dict(), kept=self.kept)

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.kept = state["kept"]


def select_and_cut(run: Run, settings: Settings, device, pictures, dense: dict,
                   widths: dict[str, int]) -> dict:
    """Selects `widths[name]` channels of each pair and removes the others (prune.py).

    Returns the checkpoint of the smaller network, with what was selected under "kept".
    """
    started = time.monotonic()
    torch.manual_seed(settings.seed)
    original, _ = restore(dense, device)
    model, duals = restore(dense, device)
    duals.requires_grad_(False)
    # calibration: batches of the first pictures, the same in all passes
    with closing(stream(settings, device, model, settings.select_patch, settings.select_batch,
                        pictures[:settings.calibration_pictures])) as batches:
        calibration = list(islice(batches, settings.select_batches))
    selection = Selection(model)
    # fills `selection` from a stopped run; count(n) shows and saves that n layers are finished
    with run.resumable("select", len(widths), dict(selection=selection), "layer") as (_, count):

        def on_pair(pair, kept, rounds):
            selection.kept = kept
            count(len(kept))

        kept = prune.select(
            model, [parallel.own(batch) for batch in calibration],
            native_loss(settings, model, duals), widths,
            rate=settings.select_rate, per_round=settings.per_round, reuse=settings.reuse,
            replay=model.replays, original=original, done=selection.kept, on_pair=on_pair,
            reduce=partial(parallel.average, share=parallel.share(settings.select_batch)))
    smaller = prune.cut(model, kept, calibration)
    return run.finish("select", dict(models.checkpoint(smaller, duals), kept=kept), started)


# ---- 5 fine-tuning with distillation ------------------------------------------------------------
def tune(run: Run, settings: Settings, device, pictures, cut: dict, dense: dict,
         photographs=None) -> dict:
    """Minimises L_DR plus the distance to the teacher; returns the checkpoint."""
    started = time.monotonic()
    torch.manual_seed(settings.seed)
    model, duals = restore(cut, device)
    teacher = load_teacher(settings) if settings.teacher else restore(dense, device)[0]
    teacher.to(device, memory_format=torch.channels_last)
    teacher.eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()            # statistics of training are better than those of few patches
    model.set_drop_path(settings.drop_path)
    dr_loss = native_loss(settings, model, duals)
    with dual.distillation(model, teacher) as distance:

        def loss_fn(out, batch):
            with autocast(settings, device):                 # the teacher, too
                away = distance(batch.images[1], out)
            return dr_loss(out, batch) + settings.distill_weight * away

        batches = partial(training_stream, settings, device, model, pictures, photographs)
        model = fit(run, "tune", settings, model, duals, settings.tune_steps, settings.tune_rate,
                    loss_fn, batches)
    return run.finish("tune", models.checkpoint(model, duals), started, steps=settings.tune_steps)


# ---- the command --------------------------------------------------------------------------------
def main() -> None:
    """The stages in order; what the run folder already holds is not done again."""
    parallel.start()
    args, settings = flags.parse_args()
    device = args.device = parallel.place(args.device)
    using = kernels.choose(args.kernels)
    allow_tf32(settings.tf32)
    run = Run(args.run, asdict(settings))
    complete = run.look(preflight.stages(settings))
    kernels.remember_in(run.folder / "kernels.json")
    print(flags.headline(args, settings, using))
    if args.found:
        print(args.found)

    # what cannot be used is rejected now, not after hours of work
    preflight.check(run, settings, device)
    reported = complete and report.is_current(run, args.test)
    if not reported:
        parallel.from_main(lambda: preflight.check_test(settings, args.test))

    # 1 data, unless all that needs it is done
    pictures = photographs = None
    if not complete:
        photographs = open_unpaired(settings, args.memory)
        pictures = open_data(run, settings, args)
        preflight.check_count(run, settings, len(pictures))
        report.log_start(run, device, processes=parallel.world())

    # 2 primal and dual training
    dense = run.done("train") or train(run, settings, device, pictures, photographs)
    networks = dict(dense=dense)
    if settings.prune or settings.budget:
        # 3 search: how many channels each layer keeps
        found = run.done("search") or search(run, settings, device, pictures, dense)

        # 4 select which ones, then cut
        cut = run.done("select") or select_and_cut(run, settings, device, pictures, dense,
                                                    found["widths"])

        # 5 fine-tuning with distillation
        pruned = run.done("tune") or tune(run, settings, device, pictures, cut, dense,
                                           photographs)
        networks = dict(dense=dense, cut=cut, pruned=pruned)

    # 6 report, by one process
    parallel.leave()
    if not parallel.is_main():
        return
    if not reported:
        report.measure(run, networks, args.test, device)
    report.print_table(run)
    gather.print_skipped(run.folder)


if __name__ == "__main__":
    command(main)
