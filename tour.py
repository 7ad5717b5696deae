"""Dual regression compression (DRC, arXiv 2207.07929) in one minute: read and run this file first.

`python tour.py` trains a small network, compresses it, shows every step, and draws tour.png.
Seconds stand for the paper's days: it shows how the method works, not how well. Next: dual.py.
"""
import copy
from dataclasses import replace
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import nn

import data
import dual
import evaluate
import fitting
import models
import own
import prune
import report
from settings import PRESETS


# ---- a network as you may have one: it knows nothing of this project ----------------------------
class Block(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class EDSR(nn.Module):
    """Lim et al. 2017 (arXiv 1707.02921), here added to bicubic: that needs less training."""
    def __init__(self, scale, feats, blocks):
        super().__init__()
        def conv(inputs, outputs):
            return nn.Conv2d(inputs, outputs, 3, padding=1)

        self.head = conv(3, feats)
        body = [Block(conv(feats, feats), nn.ReLU(), conv(feats, feats)) for _ in range(blocks)]
        self.body = nn.Sequential(*body, conv(feats, feats))
        self.tail = nn.Sequential(conv(feats, feats * scale**2), nn.PixelShuffle(scale),
                                  conv(feats, 3))
        self.bicubic = nn.Upsample(scale_factor=scale, mode="bicubic")

    def forward(self, low):                     # (N, 3, H, W) in 0..255 -> (N, 3, 2H, 2W)
        x = self.head(low)
        return self.bicubic(low) + self.tail(x + self.body(x))


# A file and a flag are enough for all commands: python train.py --network tour.py:EDSR
# --network-args scale=2,feats=16,blocks=4 --range 255 --prune 0.4; here the same from Python.
NETWORK = own.Given(f"{__file__}:EDSR", "scale=2,feats=16,blocks=4", 255.0)
S = replace(
    PRESETS["own", "quick"], pictures=12, side=256, batch=8, steps=600, rate=4e-3, search_steps=12,
    search_rate=1e-4, alpha_rate=0.1, select_rate=5e-5, tune_steps=120, tune_rate=5e-4)


def fit(model, duals, batches, loss_fn, steps, rate):        # fitting.fit can be stopped, too
    optimiser = torch.optim.Adam([*model.parameters(), *duals.parameters()], rate)
    for k, batch in zip(range(steps), batches):
        optimiser.param_groups[0]["lr"] = fitting.scheduled(S, rate, k, steps)
        optimiser.zero_grad()
        loss_fn(model(batch.images[1]), batch).backward()    # 1: the scale of the small images
        optimiser.step()


if __name__ == "__main__":
    print("""\
1 DUAL REGRESSION (DRN eq. 3; dual.py). Many pictures shrink to the same x: which is right? P learns
x -> y, a small D, the dual, learns the way back; both minimise |P(x) - y| + λ |D(P(x)) - x|. They
train on "dead leaves", pictures drawn from a seed: first without the dual (λ = 0), then 0.1.""")
    pictures = data.generate(S.pictures, S.side, (1, 2), S.seed)
    batches = partial(data.batches, pictures, S.patch, S.batch, S.seed)
    photograph = data.photographs((1, 2))[:1]
    rows = {"bicubic": evaluate.evaluate(lambda low: data.imresize(low, 2), photograph)}
    arch, scale, found = models.add_own(NETWORK)                # looks at the network, see own.py
    for name, weight in ("without dual", 0), ("dense", 0.1):       # the second is used further on
        torch.manual_seed(S.seed)
        model = models.build(arch, scale)
        duals = dual.make_duals(model)
        loss_fn = partial(dual.native_loss, duals=duals, weight=weight, rgb_range=model.rgb_range)
        fit(model, duals, batches(), loss_fn, S.steps, S.rate)
        rows[name] = evaluate.evaluate(model, photograph)
    print(f"""
What may be pruned was not declared, but found, and tried: between the layers on the left and right
of an arrow, which may lose channels if nothing else takes these in (pairs.py):
{found}""")
    print("""
2 SEARCH (Section 4.1; search.py): how many channels each layer keeps. It may get one of six widths,
with the chances softmax(α). A width n means the n channels of largest L1 norm, so channel j is
multiplied by m_j, the total chance of the widths that would keep it. A step moves α to where the
loss is lower: by about 0.1, the rate of Adam here. At the real 3e-4, 12 steps show nothing.""")
    searcher = prune.Search(copy.deepcopy(model), loss_fn, ratio=0.4, rate=S.search_rate,
                            alpha_rate=S.alpha_rate, multiple=1)
    block0 = searcher.pairs[0], searcher.alphas[0], searcher.candidates[0]
    before = [round(m, 2) for m in searcher.factors(*block0).tolist()]
    stream = batches()
    for _ in range(S.search_steps):
        searcher.step(next(stream), next(stream))      # for w, for α; train.py splits the pictures
    searcher.hold([next(stream)])                      # widths() reads the α's remembered here
    after = [round(m, 2) for m in searcher.factors(*block0).tolist()]
    print(f"Block 0 has 16 channels and may keep one of {block0[2]}. Its m_j before:\n{before}\n"
          f"after {S.search_steps} steps:\n{after}\nThe largest α belong to {searcher.widths()}")
    print("""
3 SELECT (Section 4.2; prune.py): which channels, and not by their norms. The weight that takes them
in, body.b.2, is set to zero. Its gradient tells which channel is missed most: that one gets its
weights back, all that are back are tuned, and so on. Block 0 (loss: L_DR + distance to dense):""")
    rounds = []
    selected = copy.deepcopy(model)
    kept = prune.select(selected, [next(stream), next(stream)], loss_fn, searcher.widths(),
                        rate=S.select_rate, on_pair=lambda _, __, of_pair: rounds.append(of_pair))
    for channel, (loss, [score]) in zip(kept["body.0.0"], rounds[0]):
        print(f"loss {loss:6.1f}, largest gradient {score:7.1f}: channel {channel}")
    print("""
4 CUT (prune.py): the others go, rows of the layer that makes them, columns of the one that takes
them in; what the network computes stays the same. The two layers of block 0, and the whole:""")
    smaller = prune.cut(selected, kept)
    for name in ("net.body.0.0.weight", "net.body.0.2.weight"):
        print(name, model.get_parameter(name).shape, "->", smaller.get_parameter(name).shape)
    print(evaluate.count(model, 96, 96), "->", evaluate.count(smaller, 96, 96))
    rows["cut"] = evaluate.evaluate(smaller, photograph)
    print("\n5 TUNE (Section 4.3; dual.distillation): L_DR plus the distance to the dense output.")
    with dual.distillation(smaller, model) as distance:
        fit(smaller, duals, batches(), lambda out, batch: loss_fn(out, batch)
            + distance(batch.images[1], out), S.tune_steps, S.tune_rate)
    rows["tuned"] = evaluate.evaluate(smaller, photograph)
    figure = Figure((14, 7), layout="constrained")
    axes = figure.subplot_mosaic([["m", "dense", "selected", "cut"], ["crops"] * 4])
    axes["m"].set(title="m_j: grey before, blue after the search", xticks=range(16))
    axes["m"].bar(range(16), before, color="lightgrey")
    axes["m"].bar(range(16), after, 0.4)
    for name, network in dict(dense=model, selected=selected, cut=smaller).items():
        weight = network.net.body[0][2].weight.norm(dim=(2, 3)).detach()     # a number a filter
        axes[name].imshow(weight, cmap="Blues", vmin=0)
        axes[name].set(title=f"{name}: a column a channel", xticks=range(0, weight.shape[1], 2))
    axes["crops"].imshow(report.comparison(rows, photograph, scale=2))
    axes["crops"].axis("off")
    figure.savefig("tour.png", dpi=150)
    fit(model, duals, batches(), loss_fn, S.tune_steps, S.tune_rate)
    rows["dense, trained on as long"] = evaluate.evaluate(model, photograph)
    print("""
6 RESULT. PSNR-Y of a photograph, and how many grey levels it is off x when bicubic shrinks it. By
neither does a gain from the dual show here: seeds differ more. Compare tuned with the last row.""")
    for name, [row] in rows.items():
        apart = abs(data.imresize(row.image, 0.5).astype(int) - photograph[0].images[1]).mean()
        print(f"{row.psnr:.2f} dB, {apart:.2f}  {name}")
