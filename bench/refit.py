"""What does the LayerNorm inside DAT's gated MLP cost when channels are cut, and what does a refit
give back?

    python -m bench.refit --weights DAT_light_x4.pth --data Set5 --train BSDS400

30 % of every hidden width go, by the L1 norm of fc2, without fine-tuning: PSNR-Y of the uncut
network, masked (the norm still sees all channels), cut, and cut with the norm fitted again.
"""
import argparse
import copy

import data
import models
import prune
from bench.channels import by_l1_norm
from bench.compression import psnr
from run import command


def masked_copy(model, kept: dict[str, list[int]]):
    """The network with the consumers' columns of all other channels zeroed."""
    masked = copy.deepcopy(model)
    for pair in model.pairs():
        gone = sorted(set(range(pair.width)) - set(kept[pair.name]))
        for layer, columns in pair.consumers:
            masked.get_submodule(layer).weight[:, columns[gone].flatten()] = 0
    return masked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--arch", default="dat_light")
    parser.add_argument("--data", required=True, help="folder of the test pictures")
    parser.add_argument("--train", required=True, help="folder of the calibration picture")
    args = parser.parse_args()
    model = models.load(args.weights, args.arch).eval().requires_grad_(False)
    pictures = data.open_folder(args.data, (1, model.scale))
    photographs = data.open_folder(args.train, (1, model.scale))
    calibration = [next(data.batches(photographs, 64 * model.scale, 1, 0))]
    widths = {pair.name: pair.heads * round(0.7 * pair.width) for pair in model.pairs()}
    kept = by_l1_norm(model, widths)
    masked = masked_copy(model, kept)
    networks = {
        "uncut": model,
        "masked": masked,
        "cut": prune.cut(masked, kept),
        "cut and refitted": prune.cut(masked, kept, calibration),
    }
    for name, network in networks.items():
        parameters = sum(p.numel() for p in network.parameters())
        print(f"{name:18} {psnr(network, pictures):8.3f} dB {parameters:10,} parameters")


if __name__ == "__main__":
    command(main)
