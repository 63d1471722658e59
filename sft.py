"""SFT: supervised training of the restorer, and the moving average of its weights.

Paper    DDPM (Ho et al. 2020), algorithm 1, with v instead of eps (Salimans & Ho 2022).
Steps    of the algorithm:
         1. Noise the ground truth to a random level t, and predict v.    `Diffusion.loss`
         2. Take an optimiser step on the mean squared error.             `SFT.step`
         3. Average the weights; train.py does it after each step, in every mode.   `EMA`
AdamW has its default weight decay of .01 in every method.
"""
import copy
from dataclasses import dataclass

import torch
from torch import nn

from model import MAX_GRAD_NORM, Diffusion
from support.cli import multiples, setting
from support.log import to_floats
from support.optimise import optimiser_step


@dataclass
class SFTSettings:
    """Default, published value and meaning. The network's are here, because every other mode
    starts from the network of this one."""
    steps: int = setting(4500, None, "optimiser steps in all")
    batch_size: int = setting(16, None, "images in a step")
    lr: float = setting(1e-3, None, "learning rate of AdamW")
    every: int = setting(500, None, "steps between measurements, with checkpoints")
    size: int = setting(32, None, "side of the images in pixels")
    channels: int = setting(32, None, "width of the first level of the network")
    mults: str = setting("1,2,4", None, "width of each level, as multiples", type=multiples)
    patch: int = setting(2, None, "pixel-unshuffle before the network: 1 is none")


class SFT:
    """Supervised training (mode sft): one `step` is one optimiser step on `Diffusion.loss`. The
    reward is not used."""

    def __init__(self, net, diffusion: Diffusion, reward, generator: torch.Generator, settings):
        self.net, self.diffusion, self.generator = net, diffusion, generator
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr, fused=True)

    def step(self, batch) -> dict[str, float]:
        """batch = (lq, gt), each (B, 3, H, W). Returns the metrics."""
        loss = self.diffusion.loss(self.net, *batch, self.generator).mean()
        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = optimiser_step(self.optimizer, MAX_GRAD_NORM)
        return to_floats({"loss": loss.detach(), "grad_norm": grad_norm})


def frozen_copy(net: nn.Module) -> nn.Module:
    """A copy that is not trained: for evaluation, without gradients, and compiled if `net` is."""
    frozen = copy.deepcopy(net).eval().requires_grad_(False)
    if net._compiled_call_impl:         # deepcopy leaves it out
        frozen.compile()
    return frozen


class EMA:
    """An exponential moving average of the weights. It is what is evaluated and sampled from."""

    def __init__(self, net: nn.Module, decay: float, from_scratch: bool = True):
        self.net = frozen_copy(net)
        self.decay, self.from_scratch, self.updates = decay, from_scratch, 0

    @torch.no_grad()
    def update(self, net: nn.Module):
        """Move the average towards the weights of `net`, by 1 - decay."""
        self.updates += 1
        decay = self.decay
        if self.from_scratch:   # TensorFlow's rule: a short average forgets the random start
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.net.parameters()), list(net.parameters()), 1 - decay)
        for mine, theirs in zip(self.net.buffers(), net.buffers()):
            mine.copy_(theirs)          # the reward model's mean and std; the UNet has none
