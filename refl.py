"""ReFL: the gradient of a reward through a late denoising step, with an up-to-date reward model.

Papers   DiffusionReward (Wu et al. 2025, arXiv 2505.17910). ReFL is from ImageReward (Xu et al.
         2023, arXiv 2304.05977).
Steps    of the algorithm, in the order of `ReFL.step`:
         1. Sample without gradient from noise to one of the last steps.     `ReFL.roll`
         2. Take that one step with gradient, to x0_hat.                     `ReFL.losses`
         3. Descend the sum of four losses:                                  `ReFL.losses`
              L_reward   sum of w (1 - term) over --rewards    raise the reward
            + L_struct   --struct_weight                       keep layout and colours of the photo
            + L_reg      --reg_weight, --reg                   stay near the starting network
            + L_denoise  --denoise_weight                      the supervised loss
         4. Every --frm_update_every steps, train the Face Reward Model to prefer the photo to this
            restoration. A fixed reward model gets hacked.                   `ReFL.update_frm`
Departs  - Published weights: reward .005, LPIPS .01, struct .01, reg 1e-4. Ours (tiny): face .1 and
           SSIM .4, struct 15, reg .01, denoise 20, which kept PSNR while `face` rose (K = 10).
           Nearest to the published ones: --rewards face=1 --struct_weight 8 --reg_weight .02
           --denoise_weight 0 (struct: .01 / .005, times 4, because our low-pass has gain 1 and the
           published band gain 4).
         - L_denoise is in ImageReward's paper, but not in its code.
         - Published code compares features of a ControlNet; here the output of each residual block.
         - Published code clamps x0_hat in L_struct, does not clip the policy's gradient, and gives
           the reward model weight decay .35, a gradient clip of 1, lr 2e-6, loss weight .1 and its
           first update at step 0. Here L_struct does not clamp (the reward's terms do), the
           policy's gradient is clipped at 1, and the reward model has AdamW's defaults, lr 1e-4 (it
           is small; for CLIP use --frm_lr 2e-6), and its first update after 10 steps.
         - At an update the photo is also preferred to its degraded self, or the model forgets that.
           It is not calibrated again: compare runs by `heldout_r_face`, of the model at the start.
"""
import copy
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from frm import pair_loss
from model import MAX_GRAD_NORM, Diffusion, ResBlock
from rewards import REWARDS_HELP, CompositeReward, low_pass
from support.cli import UserError, setting, whole
from support.distributed import gaussian
from support.log import to_floats
from support.optimise import optimiser_step


@dataclass
class ReFLSettings:
    """Default, published value and meaning. Raises UserError for
    refl_last > ddim_steps."""
    steps: int = setting(240, None, "optimiser steps in all")
    batch_size: int = setting(16, None, "images in a step")
    lr: float = setting(1e-4, 5e-5, "learning rate of AdamW")
    every: int = setting(60, None, "steps between measurements, with checkpoints")
    rewards: str = setting("face=.1,ssim=.4", None, REWARDS_HELP)
    ddim_steps: int = setting(5, 50, "K, sampling steps")
    refl_last: int = setting(2, 2, "the step with gradient is one of the last n")
    struct_weight: float = setting(15.0, 0.01, "weight of L_struct, low-pass L1 to the photo")
    reg_weight: float = setting(0.01, 1e-4, "weight of L_reg, the distance from the starting "
                                "network")
    reg: str = setting("features", "features", "what L_reg compares",
                       choices=["features", "weights"])
    denoise_weight: float = setting(20.0, 0.0, "weight of L_denoise, the supervised loss")
    frm_update_every: int = setting(10, 10, "steps between updates of the reward model (0: none)",
                                    type=whole)
    frm_lr: float = setting(1e-4, 2e-6, "learning rate of the reward model")

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


def weight_distance(net, frozen) -> Tensor:
    """Squared distance of all weights from those of the frozen copy: a scalar."""
    return sum((p - q).square().sum() for p, q in zip(net.parameters(), frozen.parameters()))


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
        self.frozen = copy.deepcopy(net).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr, fused=True)
        self.reward, self.frm = reward, copy.deepcopy(reward.terms.get("face"))
        if self.frm is not None:
            self.reward = CompositeReward(reward.weights, **reward.terms | {"face": self.frm})
            self.frm_optimizer = torch.optim.AdamW(self.frm.trained(), lr=settings.frm_lr)

    @torch.no_grad()
    def roll(self, lq: Tensor, k: int) -> Tensor:
        """From noise to x_t before sampling step k (the first k steps of the schedule), x_s = mu +
        sigma z with a new eta ~ U(0, 1) at each step: lq (B, 3, H, W) -> (B, 3, H, W)."""
        x = gaussian(lq, self.generator)
        for t, s in self.schedule[:k]:
            eta = torch.rand((), generator=self.generator).item()
            mu, sigma, _ = self.diffusion.ddim_step(self.net, x, lq, t, s, eta)
            x = mu + sigma * gaussian(x, self.generator)
        return x

    def losses(self, x: Tensor, lq: Tensor, gt: Tensor, k: int):
        """Step k with gradient, from x_t (eta = 0): every loss, a scalar without its weight, by
        name; x0_hat (B, 3, H, W); the terms of the reward, (B,) each, by name. The losses are
        "reward", the sum of w (1 - term) over the terms of weight w, which is the sum of the
        weights minus the mean total; "struct", `structure_loss` of x0_hat; "reg", by settings.reg
        the `weight_distance` from the frozen network, or the `feature_distance` of the two networks
        in this step, their `block_outputs`; "denoise", the mean of `Diffusion.loss`, only if
        settings.denoise_weight is not 0."""
        t, s = self.schedule[k]
        with block_outputs(self.net) as features:
            _, _, x0_hat = self.diffusion.ddim_step(self.net, x, lq, t, s, eta=0)
        total, terms = self.reward(x0_hat, gt)                          # (B,)
        losses = {"reward": sum(self.reward.weights.values()) - total.mean(),
                  "struct": structure_loss(x0_hat, gt)}
        if self.settings.reg == "weights":
            losses["reg"] = weight_distance(self.net, self.frozen)
        else:
            with torch.no_grad(), block_outputs(self.frozen) as frozen:
                self.diffusion.ddim_step(self.frozen, x, lq, t, s, eta=0)
            losses["reg"] = feature_distance(features, frozen)
        if self.settings.denoise_weight:
            losses["denoise"] = self.diffusion.loss(self.net, lq, gt, self.generator).mean()
        return losses, x0_hat, terms

    def step(self, batch) -> dict[str, float]:
        """One optimiser step. batch = (lq, gt), each (B, 3, H, W). Returns the metrics."""
        lq, gt = batch
        back = torch.randint(self.settings.refl_last, (), generator=self.generator).item()
        k = len(self.schedule) - 1 - back
        losses, x0_hat, terms = self.losses(self.roll(lq, k), lq, gt, k)
        weights = {"reward": 1.0, "struct": self.settings.struct_weight,
                   "reg": self.settings.reg_weight, "denoise": self.settings.denoise_weight}
        self.optimizer.zero_grad()
        sum(weights[name] * loss for name, loss in losses.items()).backward()
        grad_norm = optimiser_step(self.optimizer, terms | losses, MAX_GRAD_NORM)
        self.taken += 1
        stats = {name: term.detach().mean() for name, term in terms.items()}
        stats |= {f"loss_{name}": loss.detach() for name, loss in losses.items()}
        stats |= {"grad_norm": grad_norm}
        every = self.settings.frm_update_every
        if self.frm is not None and every and self.taken % every == 0:
            stats |= self.update_frm(x0_hat.detach().clamp(-1, 1), lq, gt)
        return to_floats(stats) | {"late_step": k}

    def update_frm(self, restored: Tensor, lq: Tensor, gt: Tensor) -> dict[str, Tensor]:
        """The dynamic reward model: one `optimiser_step` of `frm_optimizer` on the mean of two pair
        losses of the scores, (photo preferred to its restoration) and (photo preferred to its
        degraded self), images (B, 3, H, W). `frm.trained()` needs gradients for it, and none after
        it. Returns the metrics: frm_loss, and frm_accuracy, the share of photos scored above their
        restoration."""
        for p in self.frm.trained():
            p.requires_grad_(True)
        photo, worse, worst = (self.frm.score(u) for u in (gt, restored, lq))   # (B,) each
        loss = (pair_loss(photo, worse) + pair_loss(photo, worst)) / 2
        self.frm_optimizer.zero_grad()
        loss.backward()
        optimiser_step(self.frm_optimizer, {"frm_loss": loss})
        self.frm.requires_grad_(False)      # the policy's backward pass does not need its gradient
        return {"frm_loss": loss.detach(), "frm_accuracy": (photo > worse).float().mean()}

    def state_dict(self) -> dict:
        """What a resumed run needs beside network and optimiser."""
        return {"taken": self.taken, "frozen": self.frozen.state_dict()} | ({} if self.frm is None
            else {"frm": self.frm.state_dict(), "frm_optimizer": self.frm_optimizer.state_dict()})

    def load_state_dict(self, state: dict):
        self.taken = state["taken"]
        self.frozen.load_state_dict(state["frozen"])
        if self.frm is not None:
            self.frm.load_state_dict(state["frm"])
            self.frm_optimizer.load_state_dict(state["frm_optimizer"])
