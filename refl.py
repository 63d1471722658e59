"""ReFL: the gradient of a reward through a late denoising step, with an up-to-date reward model.

Papers   DiffusionReward (Wu et al. 2025, arXiv 2505.17910). ReFL is from ImageReward (Xu et al.
         2023, arXiv 2304.05977).
Steps    of the algorithm, in the order of `ReFL.step`:
         1. Sample without gradient from noise to one of the last steps.     `ReFL.roll`
         2. Take that one step with gradient, to x0_hat.                     `ReFL.losses`
         3. Descend the sum of the losses:                                   `ReFL.losses`
              L_reward    sum of w (1 - term) over --rewards   raise the reward
            + L_struct    --struct_weight                      keep layout and colours of the photo
            + L_reg       --reg_weight                         stay near the starting network
            + L_fidelity  --fidelity_weight                    keep the PSNR near that of the start
         4. Every --frm_update_every steps, train the Face Reward Model to prefer the photo to this
            restoration and to LQ. A fixed model gets hacked.                `ReFL.update_frm`
Departs  by the values of settings: `ReFLSettings` has the published values beside ours, and
         `--recipe paper` takes them. Ours is the last step alone instead of one of the last two,
         rollouts of one eta, the reward model updated at every step, and, instead of the fixed
         weights of L_struct and L_reg, one L_fidelity: the squared error to the ground truth, with
         the weight that holds the PSNR near the start's (fidelity.py). The other two are computed
         only where they have a weight.
         What differs from the published code in every recipe: docs/paper_to_code.md.
"""
import copy
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fidelity import Fidelity
from frm import pair_loss
from model import MAX_GRAD_NORM, Diffusion, ResBlock
from rewards import REWARDS_HELP, CompositeReward, low_pass
from support.cli import UserError, one_of, setting, share, whole
from support.distributed import gaussian
from support.log import to_floats
from support.optimise import optimiser_step

GAP_EVERY = 2       # ours: steps between measurements of the PSNR, which cost as much as a step
GAIN = 3 / 8        # ours: of fidelity.py; with 1 the PSNR swings further (docs/results.md)


@dataclass
class ReFLSettings:
    """Default, published value and meaning. Raises UserError for refl_last > ddim_steps."""
    steps: int = setting(120, None, "optimiser steps in all")
    batch_size: int = setting(16, None, "images in a step")
    lr: float = setting(1e-3, 5e-5, "learning rate of AdamW")
    every: int = setting(30, None, "steps between measurements, with checkpoints")
    rewards: str = setting("lpips=.7,face=.3,ssim=.1", "face=.005,lpips=.01", REWARDS_HELP)
    ddim_steps: int = setting(5, 50, "K, sampling steps")
    refl_last: int = setting(1, 2, "the step with gradient is one of the last n")
    eta: str | float = setting(1.0, "random", "DDIM noise of the rollouts; random: a new one from "
                               "0 to 1 at each step", type=one_of("random", otherwise=share))
    struct_weight: float = setting(0.0, 0.01, "weight of L_struct, low-pass L1 to the photo")
    reg_weight: float = setting(0.0, 1e-4, "weight of L_reg, distance from the starting network")
    fidelity_weight: float = setting(0.8, 0.0, "weight of L_fidelity, times that of fidelity.py")
    fidelity_margin: float = setting(0.0, None, "PSNR in dB that L_fidelity may give up")
    frm_update_every: int = setting(1, 10, "steps between updates of the reward model (0: none)",
                                    type=whole)
    frm_lr: float = setting(1e-3, 2e-6, "learning rate of the reward model")

    def __post_init__(self):
        if self.refl_last > self.ddim_steps:
            raise UserError(f"--refl_last {self.refl_last}: at most --ddim_steps {self.ddim_steps}")


@contextmanager
def block_outputs(net):
    """Collects the output of every residual block in the calls made inside: a list of tensors
    (B, C, h, w)."""
    kept = []
    hooks = [module.register_forward_hook(lambda _, __, out: kept.append(out))
             for module in net.modules() if isinstance(module, ResBlock)]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def feature_distance(features: list[Tensor], frozen: list[Tensor]) -> Tensor:
    """Mean squared difference of each block's output, summed over the blocks: a scalar, computed in
    float32 or finer."""
    fine = torch.promote_types(features[0].dtype, torch.float32)
    return sum(F.mse_loss(a.to(fine), b.to(fine)) for a, b in zip(features, frozen))


def structure_loss(x: Tensor, gt: Tensor) -> Tensor:
    """L_struct, L1 of the low-pass band of images (B, 3, H, W) in [-1, 1], here rescaled to [0, 1]:
    a scalar."""
    return (low_pass(x) - low_pass(gt)).abs().mean() / 2


class ReFL:
    """DiffusionReward's method. One `step` is one sampling run and one optimiser step.

    The given reward is not changed, because it is the metric. A copy of its `face` is kept up to
    date. Every term of the reward must pass a gradient to the image.
    """

    def __init__(self, net, diffusion: Diffusion, reward, generator: torch.Generator, settings):
        self.net, self.diffusion, self.generator = net, diffusion, generator
        self.settings, self.taken = settings, 0
        self.schedule = diffusion.schedule(settings.ddim_steps)
        self.fidelity = Fidelity(net, diffusion, settings.ddim_steps, settings.fidelity_margin,
                                 generator, GAIN)
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr, fused=True)
        self.reward, self.frm = reward, copy.deepcopy(reward.models.get("face"))
        if self.frm is not None:
            self.reward = CompositeReward(reward.weights, **reward.models | {"face": self.frm})
            self.frm_optimizer = torch.optim.AdamW(self.frm.trained(), lr=settings.frm_lr)

    @torch.no_grad()
    def roll(self, lq: Tensor, k: int) -> Tensor:
        """From noise to x_t before sampling step k (the first k steps of the schedule), x_s = mu +
        sigma z. With settings.eta "random" each step draws a new eta ~ U(0, 1), before z: lq (B, 3,
        H, W) -> (B, 3, H, W)."""
        x = gaussian(lq, self.generator)
        for t, s in self.schedule[:k]:
            eta = self.settings.eta
            if eta == "random":
                eta = torch.rand((), generator=self.generator).item()
            mu, sigma, _ = self.diffusion.ddim_step(self.net, x, lq, t, s, eta)
            x = mu + sigma * gaussian(x, self.generator)
        return x

    def losses(self, x: Tensor, lq: Tensor, gt: Tensor, k: int):
        """Step k with gradient, from x_t (eta = 0): every loss that has a weight, a scalar without
        it, by name; x0_hat (B, 3, H, W); the terms of the reward, (B,) each, by name. The losses
        are "reward", the sum of w (1 - term) over the terms of weight w, which is the sum of the
        weights minus the mean total; "struct", `structure_loss` of x0_hat; "reg", the
        `feature_distance` of the network and the frozen one in this step, their `block_outputs`;
        "fidelity", the mean squared error of x0_hat against gt."""
        t, s = self.schedule[k]
        with block_outputs(self.net) as features:
            _, _, x0_hat = self.diffusion.ddim_step(self.net, x, lq, t, s, eta=0)
        total, terms = self.reward(x0_hat, gt)                          # (B, 1, 1), (B,)
        losses = {"reward": sum(self.reward.weights.values()) - total.mean()}
        if self.settings.struct_weight:
            losses["struct"] = structure_loss(x0_hat, gt)
        if self.settings.reg_weight:
            frozen = self.fidelity.reference
            with torch.no_grad(), block_outputs(frozen) as theirs:
                self.diffusion.ddim_step(frozen, x, lq, t, s, eta=0)
            losses["reg"] = feature_distance(features, theirs)
        if self.settings.fidelity_weight:
            losses["fidelity"] = F.mse_loss(x0_hat, gt)
        return losses, x0_hat, terms

    def step(self, batch) -> dict[str, float]:
        """One optimiser step. batch = (lq, gt), each (B, 3, H, W). Returns the metrics."""
        lq, gt = batch
        back = torch.randint(self.settings.refl_last, (), generator=self.generator).item()
        k = len(self.schedule) - 1 - back
        losses, x0_hat, terms = self.losses(self.roll(lq, k), lq, gt, k)        # 1 and 2
        weights = {"reward": 1.0, "struct": self.settings.struct_weight,
                   "reg": self.settings.reg_weight,
                   "fidelity": self.settings.fidelity_weight * self.fidelity.weight}
        self.optimizer.zero_grad()
        sum(weights[name] * loss for name, loss in losses.items()).backward()   # 3
        grad_norm = optimiser_step(self.optimizer, MAX_GRAD_NORM)
        self.taken += 1
        stats = {name: term.detach().mean() for name, term in terms.items()}
        stats |= {f"loss_{name}": loss.detach() for name, loss in losses.items()}
        stats |= {"grad_norm": grad_norm}
        every = self.settings.frm_update_every
        if self.frm is not None and every and self.taken % every == 0:
            stats |= self.update_frm(x0_hat.detach().clamp(-1, 1), lq, gt)      # 4
        steered = self.settings.fidelity_weight and self.taken % GAP_EVERY == 0
        if steered:
            stats["fidelity_gap"] = self.fidelity.gap(self.net, lq, gt)
        stats = to_floats(stats) | {"late_step": k}
        if steered:
            stats["fidelity_weight"] = self.fidelity.update(stats["fidelity_gap"])
        return stats

    def update_frm(self, restored: Tensor, lq: Tensor, gt: Tensor) -> dict[str, Tensor]:
        """The dynamic reward model: one `optimiser_step` of `frm_optimizer` on the mean of two pair
        losses of the scores, (photo preferred to its restoration) and (photo preferred to its
        degraded self), images (B, 3, H, W). `frm.trained()` needs gradients for it, and none after
        it. Returns the metrics: frm_loss, frm_accuracy (the share of photos scored above their
        restoration) and frm_grad_norm."""
        for p in self.frm.trained():
            p.requires_grad_(True)
        photo, worse, worst = (self.frm.score(u) for u in (gt, restored, lq))   # (B,) each
        loss = (pair_loss(photo, worse) + pair_loss(photo, worst)) / 2
        self.frm_optimizer.zero_grad()
        loss.backward()
        norm = optimiser_step(self.frm_optimizer)
        self.frm.requires_grad_(False)      # the policy's backward pass does not need its gradient
        return {"frm_loss": loss.detach(), "frm_accuracy": (photo > worse).float().mean(),
                "frm_grad_norm": norm}

    def state_dict(self) -> dict:
        """What a resumed run needs beside network and optimiser."""
        return {"taken": self.taken, **self.fidelity.state_dict()} | ({} if self.frm is None
            else {"frm": self.frm.state_dict(), "frm_optimizer": self.frm_optimizer.state_dict()})

    def load_state_dict(self, state: dict):
        self.taken = state["taken"]
        self.fidelity.load_state_dict(state)
        if self.frm is not None:
            self.frm.load_state_dict(state["frm"])
            self.frm_optimizer.load_state_dict(state["frm_optimizer"])
