"""How fast our UNet is against other UNets, and a method's step against its bare network calls.

    python -m tools.throughput [--size 64] [--batch 16] [--methods | --growth | --count]

The peers (tools/requirements.txt) are as they ship, with three levels and, within 5 %, our number
of parameters. Only ours has a pixel-unshuffle stem; --patch 1 is without. A step also draws noise,
computes rewards and metrics, and clips the gradient. Weights and images are random. Competitors
take turns, because a shared machine's speed drifts. A figure is the median over the rounds (and the
range); the ratio of a table's first row to each row is formed within a round. --growth measures how
the time of an LRPO step grows with G, K and the side of the images. --count counts the operations
of each preset instead of measuring, and needs no GPU.
"""
import argparse
from copy import deepcopy
from importlib import import_module, util
from statistics import median
from time import perf_counter

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from darl import DARL
from model import Config, Diffusion, UNet
from refl import ReFL
from rewards import CompositeReward
from lrpo import LRPO, LRPOSettings
from settings import PRESETS, method_settings
from sft import SFT
from steered import GAP_IMAGES, SteeredLRPO, SteeredSettings
from support.checkpoint import pick_device
from support.cli import TYPES, UserError, run_main

TOLERANCE = 0.05        # ours: of the number of parameters
SIDE = 2048             # ours: of the matrices whose product rates the machine
P, G = 4, 8             # ours: images and restorations of each, for the methods
PEERS = {       # package: the step between the widths tried, and the network of a width (ours)
    "diffusers": (4, lambda width: import_module("diffusers").UNet2DModel(
        block_out_channels=(width, 2 * width, 4 * width), layers_per_block=1, norm_num_groups=4,
        in_channels=6, out_channels=3, down_block_types=["DownBlock2D"] * 2 + ["AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * 2)),     # blocks and attention as ours
    "denoising_diffusion_pytorch": (2, lambda width: import_module(     # more of both
        "denoising_diffusion_pytorch").Unet(width, channels=6, out_dim=3, dim_mults=(1, 2, 4)))}
# Network calls: on P images without gradient, the same on P * G; updates; with gradient in each.
METHODS = {"sft": (SFT, {}, (0, 0, 1, 1)),      # below: K - 1 = 4 (refl_last 2 draws 3 or 4) and
           "lrpo": (SteeredLRPO, {"group": G}, (4 + 10, 1, 2, 1)),  # 2K for the gap; the branch
           "refl": (ReFL, {"refl_last": 1}, (4 + 1, 0, 1, 2)),      # frozen; last step, L_denoise
           "darl": (DARL, {"group": G}, (4, 1, 2, 2))}              # the branch, L_SFT
GROWTH = {"group": (2, 4, 8, 16), "ddim_steps": (5, 10, 20, 40), "side": (16, 32, 64, 128)}
AT = {"group": 4, "ddim_steps": 5, "side": 32}      # ours: the values of those that do not vary


def nearest_width(package: str, channels: int, target: int) -> tuple[int, int]:
    """The width, up to twice `channels`, at which a peer's number of parameters is nearest to
    `target`, and that number. Raises UserError if it is more than 5 % off."""
    unit, build = PEERS[package]
    with torch.device("meta"):          # counting needs no memory
        counts = {width: sum(p.numel() for p in build(width).parameters())
                  for width in range(unit, 2 * channels + unit, unit)}
    width = min(counts, key=lambda width: abs(counts[width] - target))
    if abs(counts[width] - target) > TOLERANCE * target:
        raise UserError(f"--channels: {package} has no width within 5 % of {target:,} parameters")
    return width, counts[width]


def networks(args) -> dict:
    """Our network and the peers that are installed, by name, width and number of parameters."""
    for name in (name for name in PEERS if not util.find_spec(name)):
        print(f"{name} is not installed and left out (tools/requirements.txt)")
    ours = UNet(Config(args.size, args.channels, patch=args.patch)).to(args.device)
    ours.bf16, target = args.bf16, sum(p.numel() for p in ours.parameters())
    nets = {f"ours, width {args.channels}, {target:,} parameters": ours}
    for name in filter(util.find_spec, PEERS):
        w, n = nearest_width(name, args.channels, target)
        net = nets[f"{name}, width {w}, {n:,} parameters"] = PEERS[name][1](w).to(args.device)
        net.register_forward_hook(lambda _, __, out: getattr(out, "sample", out))   # diffusers'
        net.forward = torch.autocast(args.device.type, torch.bfloat16, args.bf16)(net.forward)
    return nets


def bare(net, batch: int, args, free: int, free_group: int, updates: int, trained: int):
    """A function that makes these network calls, with the backward passes and optimiser steps."""
    x, lq, target = torch.randn(3, batch, 3, args.size, args.size, device=args.device)
    t = torch.randint(1000, (batch,), device=args.device)
    few = (x, lq, t) if isinstance(net, UNet) else (torch.cat([x, lq], dim=1), t)
    many = [u.repeat_interleave(G, dim=0) for u in few]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def call():
        with torch.no_grad():
            for images in [few] * free + [many] * free_group:
                net(*images)
        for _ in range(updates):
            optimizer.zero_grad()
            sum((net(*few) - target).square().mean() for _ in range(trained)).backward()
            optimizer.step()
    return call


def turns(competitors: dict, args) -> dict[str, list[float]]:
    """The seconds of one call of each competitor in each round. Their order rotates."""
    found = {name: [] for name in competitors}
    for call in competitors.values():
        call()                          # the first call is slow
    for r in range(args.rounds):
        for name in [*found, *found][r % len(found):][:len(found)]:
            start, n = perf_counter(), 0
            while not n or perf_counter() - start < args.seconds:
                competitors[name]()
                torch.get_device_module(args.device).synchronize()
                n += 1
            found[name].append((perf_counter() - start) / n)
    return found


def compare(title: str, work: float, competitors: dict, args):
    """Print a table: each competitor's `work` per second, and the ratio of the first to it."""
    text = lambda v: f"{median(v):.2f} ({min(v):.2f} to {max(v):.2f})"
    print(f"\n| {title} | per second | first / this |\n|---|---|---|")
    for name, times in (found := turns(competitors, args)).items():
        ratios = [a / b for a, b in zip(times, next(iter(found.values())))]
        print(f"| {name} | {text([work / u for u in times])} | {text(ratios)} |")


def methods(ours: UNet, args):
    """Compare the step of each method with its bare calls."""
    batch = torch.rand(2, P, 3, args.size, args.size, device=args.device) * 2 - 1
    for name, (method, changes, calls) in METHODS.items():
        reward = [] if method is SFT else [CompositeReward({"ssim": .5, "dwt": .5})]
        step = method(deepcopy(ours), Diffusion(ours.config, args.device), *reward,
                      torch.Generator(), method_settings(name)(**changes)).step
        compare(f"{name}, images", P, {"step": lambda: step(batch),
                "bare calls": bare(deepcopy(ours), P, args, *calls)}, args)


def growth(args):
    """Print the seconds of an LRPO step against G, K and the side of the images, for full
    trajectories (lrpo.py) and our recipe, and the exponent that fits their logarithms best."""
    print("\n| LRPO step | values | seconds | exponent |\n|---|---|---|---|")
    for method, kind in ((LRPO, LRPOSettings), (SteeredLRPO, SteeredSettings)):
        for name, values in GROWTH.items():
            steps = {}
            for value in values:
                at = AT | {name: value}
                net = UNet(Config(side := at.pop("side"), args.channels)).to(args.device)
                reward = CompositeReward({"ssim": .5, "dwt": .5})
                lrpo = method(net, Diffusion(net.config, args.device), reward, torch.Generator(),
                              kind(**at))
                batch = torch.rand(2, P, 3, side, side, device=args.device) * 2 - 1
                steps[value] = lambda lrpo=lrpo, batch=batch: lrpo.step(batch)
            seconds = [median(times) for times in turns(steps, args).values()]
            exponent = np.polyfit(np.log(values), np.log(seconds), 1)[0]
            print(f"| {method.__name__}, {name} | {' '.join(map(str, values))} | "
                  f"{' '.join(f'{s:.3g}' for s in seconds)} | {exponent:.2f} |")


def operations(net: UNet) -> tuple[float, float]:
    """The operations of the network for one image, forward alone and with the backward pass. A
    multiplication and an addition count as two."""
    x = torch.zeros(2, 1, 3, net.config.size, net.config.size)
    with FlopCounterMode(display=False) as counter:
        out = net(*x, torch.zeros(1, dtype=torch.int64))
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops()


def count():
    """Print the operations of the networks' calls in a whole run of sft and of lrpo, in 1e15."""
    print("\n| | parameters | sft, PFLOP | lrpo, PFLOP |\n|---|---|---|---|")
    for name, preset in PRESETS.items():
        net = UNet(Config(preset["size"], preset["channels"], patch=preset["patch"],
                          mults=tuple(map(int, preset["mults"].split(",")))))
        forward, both = operations(net)
        sft, lrpo, K = preset["sft"], preset["lrpo"], preset["ddim_steps"]
        images, group = lrpo["batch_size"], preset.get("group", SteeredSettings.group)
        members, updates = images * group, SteeredSettings.updates
        step = (images * ((K - 1) * forward + updates * both) + members * forward
                if preset.get("branch", SteeredSettings.branch) == "on"
                else members * (K * forward + updates * (K - 1) * both))
        step += 2 * K * min(images, GAP_IMAGES) * forward
        print(f"| {name} | {sum(p.numel() for p in net.parameters()):,} | "
              f"{sft['steps'] * sft['batch_size'] * both / 1e15:,.2f} | "
              f"{lrpo['steps'] * step / 1e15:,.2f} |")


def main():
    p = argparse.ArgumentParser(description="How fast the network and the methods are.")
    for name, value in {"size": 64, "channels": 32, "patch": 2, "batch": 16, "rounds": 5,
                        "seconds": 1.5, "device": "auto"}.items():
        p.add_argument(f"--{name}", default=value, type=TYPES[type(value)], help=f"({value})")
    p.add_argument("--bf16", default="off", choices=["on", "off"])
    p.add_argument("--methods", action="store_true", help="measure the methods as well")
    p.add_argument("--growth", action="store_true", help="only measure how an LRPO step grows "
                   "(with --channels, --rounds, --seconds and --device)")
    p.add_argument("--count", action="store_true", help="only count operations")
    args = p.parse_args()
    if args.count:
        return count()
    args.device, args.bf16 = pick_device(args.device), args.bf16 == "on"
    print(f"torch {torch.__version__}, threads {torch.get_num_threads()}",
          *(f"{name} {value}" for name, value in vars(args).items()), sep=", ")
    if args.growth:
        return growth(args)
    a = torch.randn(SIDE, SIDE, device=args.device).to(torch.bfloat16 if args.bf16 else torch.float)
    compare("GFLOP", 2e-9 * SIDE ** 3, {f"{SIDE} x {SIDE} matrix product": lambda: a @ a}, args)
    nets = networks(args)
    for what, calls in {"training": (0, 0, 1, 1), "inference": (1, 0, 0, 0)}.items():
        compare(f"{what}, images", args.batch, {
            name: bare(net, args.batch, args, *calls) for name, net in nets.items()}, args)
    if args.methods:
        methods(next(iter(nets.values())), args)


if __name__ == "__main__":
    run_main(main)
