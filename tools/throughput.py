"""How fast our UNet is against that of diffusers, and how fast a step of each method is.

    python -m tools.throughput [--size 64] [--batch 16] [--patch 1]

diffusers' network has as many levels, blocks and channels, attention in the same level and,
within 5 %, our number of parameters. Only ours has a pixel-unshuffle stem; --patch 1 is without it.
A method's step has its default settings and the reward .5 SSIM + .5 low-pass. Weights and images
are random. Competitors take turns, because a shared machine's speed drifts: a figure is the median
(and range) over the rounds of the images per second, and the ratio of the first row is formed
within a round.
"""
import argparse
from functools import partial
from statistics import median
from time import perf_counter

import torch

from model import Config, Diffusion, UNet
from rewards import CompositeReward
from settings import METHODS
from support.checkpoint import pick_device
from support.cli import TYPES, run_main

FLAGS = {"size": 64, "channels": 32, "patch": 2, "batch": 16, "rounds": 5, "seconds": 1.5,
         "device": "auto"}


def peer(width: int):
    """diffusers' UNet of this width, built as ours is."""
    from diffusers import UNet2DModel
    return UNet2DModel(block_out_channels=(width, 2 * width, 4 * width), layers_per_block=1,
                       norm_num_groups=4, in_channels=6, out_channels=3,
                       down_block_types=["DownBlock2D"] * 2 + ["AttnDownBlock2D"],
                       up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * 2)


def parameters(net) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in net.parameters())


def training(call, net):
    """One optimiser step on the mean square of call()."""
    loss = call().square().mean()
    net.zero_grad()
    loss.backward()
    net.optimizer.step()


def compare(title: str, images: int, competitors: dict, args):
    """Call the competitors {name: function} in turns, and print a table of images per second."""
    found = {name: [] for name in competitors}
    for r in range(args.rounds + 1):                    # the first round is slow and does not count
        for name in [*found, *found][r % len(found):][:len(found)]:
            start, n = perf_counter(), 0
            while not n or perf_counter() - start < args.seconds * (r > 0):
                competitors[name]()
                torch.get_device_module(args.device).synchronize(args.device)
                n += 1
            found[name] += [(perf_counter() - start) / n] * (r > 0)
    print(f"\n| {title} | images per second | first / this |\n|---|---|---|")
    first = next(iter(found.values()))
    for name, times in found.items():
        cells = [images / t for t in times], [b / a for a, b in zip(first, times)]
        print(f"| {name} | " + " | ".join(f"{median(v):.2f} ({min(v):.2f} to {max(v):.2f})"
                                          for v in cells) + " |")


def main(argv=None):
    p = argparse.ArgumentParser(description="How fast the network and the methods are.")
    for name, value in FLAGS.items():
        p.add_argument(f"--{name}", default=value, type=TYPES[type(value)], help=f"({value})")
    args = p.parse_args(argv)
    args.device = pick_device(args.device)
    print(f"torch {torch.__version__}, threads {torch.get_num_threads()}", vars(args))
    config = Config(args.size, args.channels, patch=args.patch)
    ours = UNet(config).to(args.device)
    other = peer(args.channels).to(args.device)
    x, lq = torch.rand(2, args.batch, 3, args.size, args.size, device=args.device) * 2 - 1
    t = torch.randint(1000, (args.batch,), device=args.device)
    calls = {ours: partial(ours, x, lq, t), other: lambda: other(torch.cat([x, lq], 1), t).sample}
    names = {net: f"{name}, {parameters(net):,} parameters"
             for net, name in ((ours, "ours"), (other, "diffusers"))}
    for net in names:
        net.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    compare("training", args.batch, {name: partial(training, calls[net], net)
                                     for net, name in names.items()}, args)
    compare("inference", args.batch, {name: torch.no_grad()(calls[net])
                                      for net, name in names.items()}, args)
    reward, steps = CompositeReward({"ssim": .5, "dwt": .5}), {}
    for name, entry in METHODS.items():
        if name != "frm":
            method = entry.make(UNet(config).to(args.device), Diffusion(config, args.device),
                                reward, torch.Generator(), entry.settings())
            steps[name] = partial(method.step, (lq, x))
    compare("a step", args.batch, steps, args)


if __name__ == "__main__":
    run_main(main)
