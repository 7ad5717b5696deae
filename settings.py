"""Every number that decides the result of a run, and nothing else; `asdict` of it is config.json.

`Settings` names them all, with the paper's values. `PRESETS` holds three sets of them for every
family of networks:

    paper      the paper's numbers: DF2K and a cluster
    default    one GPU for hours; what differs from the paper is our choice
    quick      two CPU cores for minutes: shows that everything works, not how well

The rates, clips and steps of default and quick were found by trial on CPUs, with generated pictures
(none of the default presets has been run to its end yet). What says only where and with what to
work (device, memory, kernels, test pictures, run folder) is no setting; see flags.py. Begin with
train.py, which shows what the numbers are for.
"""
import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Settings:
    """One run's numbers. The defaults are the paper's for DRN; those of other networks are named
    after them. "Section" is one of DRC (arXiv 2207.07929), "release" its authors' code, "ours" a
    choice of this project.

    A patch is the side in pixels of a square cut from an original, a batch the number of patches
    in a step. A rate is a learning rate, for losses in the network's own range (Adam's, except
    `select_rate`, which is SGD's).
    """
    # what is to be made; these come from the flags
    arch: str = ""                    # the network, one of models.PRESETS
    network: str | None = None        # FILE.py:CLASS of the user's own (own.py), with its
    network_args: str | None = None   # arguments,
    range: float | None = None        # and the largest value of its images
    scale: int = 4                    # upscaling factor
    preset: str = ""                  # quick, default or paper: where the numbers below come from
    prune: float = 0.0                # R in [0, 1): the widest candidate of a layer keeps 1 − R of
    #                                   its hidden channels, the narrowest half of that, rounded to
    #                                   multiples of `round`; 0: no cut
    budget: tuple[str, float] | None = None  # ("params", "madds" or "latency", the part of it to
    #                                   keep; ours)
    widths: str = "searched"          # or "uniform": no search, the same part of every layer (ours)
    round: int = 4                    # widths are multiples of this (in attention: those of a
    #                                   head); release: 4; 8 suits GPUs, 16 DRN on AVX-512
    seed: int = 0                     # of weights, generated pictures and patches
    data: str | None = None           # folder of training pictures; None: generated ones
    degradation: str = "bicubic"      # how small images are made (degradation.KINDS)
    unpaired: str | None = None       # folder of photographs without originals to adapt to
    unpaired_share: float = 0.3       # the part of a batch that they are (DRN, arXiv 2003.07018)
    pretrained: str | None = None     # file of weights to start from
    pretrained_dual: str | None = None       # official file of its duals
    channels: str | None = None       # channel numbers of a pretrained network, already pruned
    teacher: str | None = None        # ARCH:FILE to distil from (release); None: the uncut network
    continue_training: bool = False   # --steps was given: train the pretrained network further
    precision: str = "fp32"           # or "bf16": training and fine-tuning under autocast (ours)
    tf32: bool = False                # a GPU may round float32's factors to 10 bits (ours: it does
    #                                   in quick and default)
    compile: bool = False             # train and fine-tune through torch.compile (ours)
    accumulate: int = 1               # a training step's batch is worked on in this many parts
    # 1 data
    pictures: int = 0                 # how many to generate (Section 5.1: DF2K instead)
    side: int = 0                     # their side, pixels
    epsilon: float = 1e-4             # in the division that finds a blur kernel (release: 1e-20)
    # 2 primal and dual training
    patch: int = 384                  # Section 5.1; SwinIR, DAT, DCLS: 256
    batch: int = 32                   # Section 5.1; DCLS: 64
    steps: int = 1_000_000            # Section 5.1; SwinIR, DAT, DCLS: 500,000
    dual_steps: int = 100_000         # for the duals of pretrained weights without duals (ours)
    dual_weight: float = 0.1          # λ of L_DR (DRN, arXiv 2003.07018, Section 3.1); 0: no dual
    dual_start: str = "random"        # weights of new duals (release), or "averages" (ours; with
    #                                   `unpaired` always), see dual.start_from_averages
    rate: float = 1e-4                # Section 5.1; SwinIR, DAT: 2e-4, DCLS: 4e-4
    floor: float = 1e-7               # where the cosine decay of the rate ends (Section 5.1)
    milestones: tuple[float, ...] = ()  # parts of the steps where the rate is halved; (): cosine;
    #                                   releases of SwinIR, DAT: .5 .8 .9 .95, of DCLS: .4 .8
    warmup: float = 0.0               # part of the steps in which the rate rises from 0; SwinIR,
    #                                   DAT: 4,000 steps, 0.008 (release)
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam, in training and fine-tuning; Section 5.1;
    #                                   DAT: (0.9, 0.99)
    clip: float = math.inf            # largest norm of the gradient; inf: not clipped (release)
    ema: float = 0.0                  # decay of the weights' moving average; 0: none; SwinIR: 0.999
    #                                   (release)
    drop_path: float = 0.0            # stochastic depth of the last block; SwinIR, DAT: 0.1 (their
    #                                   papers)
    # 3 search (Section 4.1)
    search_steps: int = 2_500         # 100 epochs (release)
    epoch: int = 25                   # steps between two looks at the held-out pictures (release)
    search_patch: int = 192           # release; SwinIR, DCLS: 256, and for DAT as for SwinIR
    search_batch: int = 16            # release; of each half of the pictures
    search_rate: float = 1e-4         # of the weights, release; SwinIR, DAT: 2e-4, DCLS: 1e-5
    alpha_rate: float = 3e-4          # of the numbers α that choose the widths, release
    alpha_decay: float = 1e-3         # weight decay of the α's, release
    search_decay: float = 3e-4        # weight decay in the trial step, release; others: 0
    search_clip: float = 5.0          # largest norm of the weights' gradient; release; DCLS: 0.1
    first_order: bool = False         # leave the second-order term out (DARTS offers it, too): 3
    #                                   passes a step, not 5
    # 4 select and cut (Section 4.2)
    calibration_pictures: int = 160   # it looks at the first so many (release: DIV2K 1 to 160)
    select_patch: int = 192           # release; SwinIR, DCLS: 256, and for DAT as for SwinIR
    select_batch: int = 16            # release
    select_batches: int = 10          # release: 160 pictures in batches of 16
    select_rate: float = 5e-5         # of SGD; release; SwinIR, DAT: 1e-4, DCLS: 1e-5
    per_round: int = 1                # channels taken after each scoring (Algorithm 2: 1)
    reuse: bool = False               # score with the gradients of the last tuning pass (ours)
    # 5 fine-tuning (Section 4.3)
    tune_steps: int = 1_000_000       # as in training
    tune_rate: float = 1e-4           # as in training
    distill_weight: float = 1.0       # of the distance to the teacher (release)


# (family, preset): numbers. A family is the first word of an arch, "swinir" of swinir_light. Only
# what differs from another preset is written; `replace` does not accept a name that is no field.
# `default` and `quick` differ from the papers also where bench.claims found something as good in
# short runs: duals that begin as averages, a search of the first order, several channels a round.
PRESETS = {("drn", "paper"): Settings()}
PRESETS["drn", "default"] = replace(
    PRESETS["drn", "paper"], tf32=True, pictures=400, side=512, patch=192, batch=16, steps=30_000,
    dual_steps=2_000, dual_start="averages", rate=4e-4, warmup=0.02, clip=20.0, search_steps=500,
    first_order=True, select_batches=4, per_round=8, reuse=True, tune_steps=15_000, tune_rate=4e-4)
PRESETS["drn", "quick"] = replace(
    PRESETS["drn", "default"], pictures=24, side=384, patch=64, batch=4, steps=240, dual_steps=100,
    warmup=0.1, search_steps=16, epoch=4, search_patch=64, search_batch=2,
    select_patch=48, select_batch=2, select_batches=2, per_round=16, tune_steps=80, tune_rate=2e-4)
PRESETS["swinir", "paper"] = replace(
    PRESETS["drn", "paper"], patch=256, steps=500_000, rate=2e-4, milestones=(0.5, 0.8, 0.9, 0.95),
    warmup=0.008, ema=0.999, drop_path=0.1, search_patch=256, search_rate=2e-4, search_decay=0.0,
    select_patch=256, select_rate=1e-4, tune_steps=500_000, tune_rate=2e-4)
PRESETS["swinir", "default"] = replace(
    PRESETS["drn", "default"], clip=1.0, ema=0.999, search_decay=0.0, select_rate=1e-4)
PRESETS["swinir", "quick"] = replace(
    PRESETS["drn", "quick"], steps=800, rate=1e-3, clip=1.0, search_steps=32, search_decay=0.0,
    select_rate=1e-4, per_round=8, tune_steps=300, tune_rate=5e-4)
PRESETS["dat", "paper"] = replace(PRESETS["swinir", "paper"], ema=0.0, betas=(0.9, 0.99))
PRESETS["dat", "default"] = PRESETS["swinir", "default"]
PRESETS["dat", "quick"] = replace(     # patches of 128 are 32 low-resolution pixels, one window
    PRESETS["drn", "quick"], patch=128, batch=2, steps=400, rate=1e-3, clip=1.0,
    search_patch=128, search_decay=0.0, select_patch=128, select_rate=1e-4, tune_steps=160)
PRESETS["dcls", "paper"] = replace(
    PRESETS["drn", "paper"], epsilon=1e-20, patch=256, batch=64, steps=500_000, rate=4e-4,
    milestones=(0.4, 0.8), search_patch=256, search_rate=1e-5, search_decay=0.0, search_clip=0.1,
    select_patch=256, select_rate=1e-5, tune_steps=500_000, tune_rate=4e-4)
PRESETS["dcls", "default"] = replace(
    PRESETS["drn", "default"], clip=1.0, search_rate=1e-5, search_decay=0.0, search_clip=0.1,
    select_rate=1e-5)
PRESETS["dcls", "quick"] = replace(    # the blur kernel takes 31 of 32 low-resolution pixels
    PRESETS["drn", "quick"], patch=128, batch=2, clip=1.0, search_steps=8, search_patch=128,
    search_batch=1, search_rate=1e-5, search_decay=0.0, search_clip=0.1,
    select_patch=128, select_batch=1, select_rate=1e-5, tune_rate=5e-5)
# Networks of the user's own (own.py). Their losses are in 0..255, as DRN's.
PRESETS["own", "paper"] = PRESETS["drn", "paper"]
PRESETS["own", "default"] = PRESETS["drn", "default"]
PRESETS["own", "quick"] = replace(PRESETS["drn", "quick"], steps=400, rate=1e-3, tune_steps=150)
