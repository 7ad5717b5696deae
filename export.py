"""Writes networks for the world outside: ONNX for any runtime, safetensors for other tools.

    python export.py runs/drn_s_x4_p30/tune.pt --to drn.onnx
    python export.py DAT_light_x4.pth --arch dat_light --to dat.safetensors

drn.onnx holds all that it needs, in any program: one image (1, 3, H, W), float32 in 0..1, of any
height and width goes in as "low", the image (1, 3, H·s, W·s) comes out as "high", about 0..1. It
is compared with PyTorch before it is written. `python upscale.py photo.jpg --weights drn.onnx`
runs it. A blind network has a second input, "kernel", and a second output, "kernel_used", so that
the tiles of a picture can share one. Left out, or all zeros, it is estimated.

dat.safetensors holds the weights under their official names; its metadata say arch, scale and
widths, so that `models.load` rebuilds the network. Neither file holds the duals.

Not here: int8 or float16 (which overflows in these networks). Read upscale.py next.
"""
import argparse
import json
import logging
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import models
import own
from backbones.base import SR, Backbone
from run import WrongUsage, at_least, check_parent, command, need, write_file

SIZES = ((64, 64), (45, 76), (7, 9))         # height, width: whole windows, none, less than one
CLOSE = 1e-4                                 # largest difference to PyTorch, for images in 0..1


# ---- ONNX, written ------------------------------------------------------------------------------
class Face(nn.Module):
    """What an exported network computes."""
    def __init__(self, network: Backbone):
        super().__init__()
        self.network = network

    def forward(self, low: Tensor) -> Tensor:
        """(1, 3, H, W) -> (1, 3, H·s, W·s)."""
        return self.network(low).images[self.network.scale]


class BlindFace(Face):
    """The same of a blind network."""
    def forward(self, low: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """(1, 3, H, W), (1, 1, k, k) -> (1, 3, H·s, W·s), and the kernel that was used: the given
        one, or where that is all zeros the estimated one.
        """
        given = kernel.abs().sum() > 0
        kernel = torch.where(given, kernel, self.network.estimate(low))
        return self.network(low, kernel).images[self.network.scale], kernel


def to_onnx(model: Backbone) -> bytes:
    """The ONNX file of a network, folded for inference (`models.inference`).

    ValueError: onnx or onnxscript is not installed.
    """
    need("onnx", "writing ONNX")
    need("onnxscript", "writing ONNX")
    network = models.inference(model.cpu())
    network.make_portable()
    inputs = {"low": torch.rand(1, 3, *SIZES[1])}            # no whole windows: padding is seen
    shapes = {"low": {2: "height", 3: "width"}}
    face, outputs = Face(network).eval(), ["high"]
    if network.kernel_size:
        inputs["kernel"] = torch.zeros(1, 1, network.kernel_size, network.kernel_size)
        shapes["kernel"] = {}
        face, outputs = BlindFace(network).eval(), ["high", "kernel_used"]
    with torch.no_grad(), quiet():
        face(**inputs)       # fills the caches of kernels/attention.py with tensors, not with fakes
        program = torch.onnx.export(
            face, kwargs=inputs, input_names=list(inputs), output_names=outputs,
            dynamic_shapes=shapes, dynamo=True, verbose=False)
    return finish(program, network)


def finish(program: "torch.onnx.ONNXProgram", network: Backbone) -> bytes:
    """Adds what the file says about itself, and removes what it says about this machine."""
    graph = program.model
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()                          # stack traces, with paths
    graph.metadata_props.update(facts(network))
    model = program.model_proto
    if network.kernel_size:                                  # a default, so that it may be left out
        side = network.kernel_size
        zeros = model.graph.initializer.add(name="kernel", data_type=1, dims=[1, 1, side, side])
        zeros.float_data.extend([0.0] * side ** 2)
    return model.SerializeToString()


def facts(model: Backbone) -> dict[str, str]:
    """What an exported file says about its network."""
    about = dict(arch=model.arch, scale=str(model.scale), widths=json.dumps(model.widths))
    return about | dict(network=own.as_json(model.source)) if model.source else about


@torch.inference_mode()
def largest_difference(model: Backbone, other: "OnnxNetwork") -> float:
    """Between the images (0..1) of a network and of its ONNX file, at the three SIZES."""
    model = models.inference(model)
    differences = []
    for size in SIZES:
        low = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
        high, theirs = (each(low).images[model.scale] for each in (model, other))
        differences.append((high - theirs).abs().max().item())
    return max(differences)


@contextmanager
def quiet():
    """Within it the exporter does not speak of what it could do with other packages."""
    logging.disable(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        yield
    logging.disable(logging.NOTSET)


# ---- ONNX, run ----------------------------------------------------------------------------------
class OnnxNetwork(nn.Module):
    """An exported network, run by onnxruntime; it is used like any other network for inference."""
    def __init__(self, content: bytes, device: torch.device):
        """content: that of an ONNX file of `to_onnx`. KeyError: it does not know its scale."""
        super().__init__()
        ort = need("onnxruntime", "running an ONNX file")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4                       # errors are raised
        wanted = ["CPUExecutionProvider"]
        if device.type == "cuda":
            wanted.insert(0, "CUDAExecutionProvider")
        providers = [name for name in wanted if name in ort.get_available_providers()]
        self.session = ort.InferenceSession(content, options, providers=providers)
        self.device = "cuda" if self.session.get_providers()[0].startswith("CUDA") else "cpu"
        meta = self.session.get_modelmeta().custom_metadata_map
        self.arch = meta["arch"]
        self.scale = int(meta["scale"])
        kernels = [each.shape[-1] for each in self.session.get_overridable_initializers()]
        self.kernel_size = kernels[0] if kernels else 0
        self.only_wanted = ort.RunOptions()
        self.only_wanted.only_execute_path_to_fetches = True

    def forward(self, low: Tensor, kernel: Tensor | None = None) -> SR:
        """As `Backbone.forward`, for one image on the CPU.

        ValueError: onnxruntime fails, on an image that is too small or for want of memory.
        """
        given = {} if kernel is None else {"kernel": kernel}
        return SR({self.scale: self.run("high", low=low, **given)}, kernel)

    def estimate(self, low: Tensor) -> Tensor:
        """As `Backbone.estimate`."""
        return self.run("kernel_used", low=low)

    def run(self, output: str, **inputs: Tensor) -> Tensor:
        arrays = {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
        try:
            [result] = self.session.run([output], arrays, self.only_wanted)
        except Exception as error:           # onnxruntime has a dozen kinds, without a common base
            height, width = inputs["low"].shape[2:]
            raise ValueError(f"onnxruntime cannot run this network on {width}x{height} pixels "
                             f"({str(error).splitlines()[0][:200]}): try other tiles") from error
        return torch.from_numpy(result)


def open_onnx(path: str | Path, device: torch.device) -> OnnxNetwork:
    """The network in an ONNX file of ours.

    device: cuda is used where onnxruntime can.
    ValueError: the file is missing, damaged or not of `to_onnx`; onnxruntime is not installed.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check the path") from error
    try:
        return OnnxNetwork(content, device)
    except KeyError:
        raise ValueError(f"{path} does not say its arch and scale: only ONNX files of export.py "
                         f"run here") from None
    except ValueError:
        raise
    except Exception as error:               # as in OnnxNetwork.run
        raise ValueError(f"{path} is damaged or no ONNX file at all "
                         f"({str(error).splitlines()[0][:200]}): export it again") from error


# ---- safetensors --------------------------------------------------------------------------------
def to_safetensors(model: Backbone) -> bytes:
    """The safetensors file of a network: its state dict, and `facts` as metadata.

    ValueError: safetensors is not installed.
    """
    save = need("safetensors.torch", "writing safetensors").save
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    return save(state, facts(model))


# ---- the command --------------------------------------------------------------------------------
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a wrong one ends with a sentence and exit code 2."""
    parser = argparse.ArgumentParser(description="Export a network.", allow_abbrev=False)
    add = parser.add_argument
    add("weights", metavar="FILE", help="a checkpoint of train.py or an official file")
    add("--to", required=True, metavar="FILE", help="where to: a name with .onnx or .safetensors")
    add("--arch", choices=tuple(models.PRESETS), help="network of an official file")
    add("--scale", type=at_least(2), help="scale of an official file (default 4)")
    add("--channels", metavar="FILE",
        help="channel numbers of an official pruned file, one integer per line")
    own.add_flags(add)
    add("--force", action="store_true", help="overwrite a file that exists")
    args = parser.parse_args(argv)
    if Path(args.to).suffix not in (".onnx", ".safetensors"):
        parser.error(f"--to {args.to}: use a name with .onnx or .safetensors")
    return args


def main() -> None:
    args = parse_args()
    target = Path(args.to)
    if target.exists() and not args.force:
        raise WrongUsage(f"{target} exists already: give another --to, or --force to overwrite it")
    check_parent(target)
    model = models.load(args.weights, args.arch, args.scale, args.channels, own.given(args))
    note = ""
    if target.suffix == ".safetensors":
        content = to_safetensors(model)
    else:
        print(f"exporting {model.arch} x{model.scale}: some minutes for the large networks",
              flush=True)
        content = to_onnx(model)
        note = "; " + checked(model, content)
    write_file(target, content)
    print(f"{target}: {model.arch} x{model.scale}, {len(content) / 1e6:.1f} MB{note}")


def checked(model: Backbone, content: bytes) -> str:
    """Says how far onnxruntime is from PyTorch. ValueError: too far; nothing is written then."""
    try:
        other = OnnxNetwork(content, torch.device("cpu"))
    except ValueError as error:
        return f"not compared with PyTorch: {error}"
    worst = largest_difference(model, other)
    sizes = ", ".join(f"{width}x{height}" for height, width in SIZES)
    if not worst <= CLOSE:
        raise ValueError(f"the exported {model.arch} differs from PyTorch by {worst:.1e} at "
                         f"{sizes}, {CLOSE:.0e} is allowed: try another version of PyTorch or "
                         f"onnxruntime")
    return f"differs from PyTorch by at most {worst:.1e} at {sizes}"


if __name__ == "__main__":
    command(main)
