"""ReFL: a reward's gradient through the last denoising steps, and a reward model that keeps up.

Papers   DiffusionReward (Wu et al. 2025, arXiv 2505.17910); ReFL is of ImageReward (Xu et al. 2023,
         arXiv 2304.05977).
Idea     Sample without gradient to one of the last steps, take that one step with gradient to
         x0_hat, and descend
           L_reward   sum of w (1 - term) over --rewards    up with the reward
         + L_struct   --struct_weight                       keep layout and colours of the photo
         + L_reg      --reg_weight, --reg                   stay near the network it was
         + L_denoise  --denoise_weight                      the supervised loss, at any noise level
         A reward model that stands still can be fooled: the network finds what it scores well and
         no face has. So every --frm_update_every steps the Face Reward Model takes a step of its
         own: the photo is preferred to this restoration.
Departs  - Published code: reward .005, LPIPS .01, struct .01, reg 1e-4. Ours (tiny): face .1 and
           SSIM .4, struct 15, reg .01, denoise 20, which hold PSNR while `face` rises. Nearest to
           it: --rewards face=1 --struct_weight 8 --reg_weight .02 --denoise_weight 0 (struct counts
           fourfold: our low-pass has gain 1, the band 4).
         - L_denoise: ImageReward's paper blends its pre-training loss in; its code leaves that out.
         - Published code compares a ControlNet's features; here the output of every residual block.
         - At an update of the reward model the photo is also preferred to its degraded self, or it
           forgets; lr 1e-4, not 2e-6, for a small network. (CLIP's: --frm_lr 2e-6.) The loss weight
           of .1 is left out: AdamW's step does not depend on it. Its scale is not calibrated anew,
           so compare runs by `heldout_r_face`, the score of the model that it started as.
"""
import copy
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from data import UserError
from frm import pair_loss
from model import MAX_GRAD_NORM, Diffusion, ResBlock, gaussian
from rewards import low_pass


@contextmanager
def block_outputs(net):
    """Collects the output of every residual block of the calls made inside: a list of tensors."""
    kept = []
    hooks = [module.register_forward_hook(lambda _, __, out: kept.append(out))
             for module in net.modules() if isinstance(module, ResBlock)]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def feature_distance(features: list[Tensor], frozen: list[Tensor]) -> Tensor:
    """Mean squared difference of each block's output, summed over the blocks: a scalar."""
    fine = torch.promote_types(features[0].dtype, torch.float32)        # bfloat16 is too coarse
    return sum(F.mse_loss(a.to(fine), b.to(fine)) for a, b in zip(features, frozen))


def weight_distance(net, frozen) -> Tensor:
    """Squared distance of all weights from the frozen copy's, without reference to any image."""
    return sum((p - q).square().sum() for p, q in zip(net.parameters(), frozen.parameters()))


def structure_loss(x: Tensor, gt: Tensor) -> Tensor:
    """L1 of the low-pass band, images in [0, 1]: a scalar."""
    return (low_pass(x) - low_pass(gt)).abs().mean() / 2


def check_gradients(reward, size: int, device):
    """UserError naming the first term that passes no (finite) gradient to the image."""
    x, y = torch.rand(2, 1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    for name, term in reward.terms.items():
        score = term(x.requires_grad_(), y)
        gradient = torch.autograd.grad(score.sum(), x)[0] if score.requires_grad else 0 * x
        if not (gradient.isfinite().all() and gradient.any()):
            raise UserError(f"--rewards {name}: passes no gradient to the image, which refl needs; "
                            "leave it out, or use --mode lrpo")


class ReFL:
    """One `step` = one sampling run without gradient, one step with it, one optimiser step.

    The reward that is given stays as it is, to measure by; a copy of its `face` is kept up to date.
    frm_update_every = 0 freezes that copy. UserError for a reward without gradient, ValueError for
    `last` beyond K.
    """

    def __init__(self, net, diffusion: Diffusion, reward, generator: torch.Generator, *, lr=1e-4,
                 K=10, last=2, struct_weight=15.0, reg_weight=0.01, reg="features",
                 denoise_weight=20.0, frm_update_every=10, frm_lr=1e-4):
        if not 1 <= last <= K:
            raise ValueError(f"last must be 1 to K = {K}, not {last}")
        check_gradients(reward, net.config.size, next(net.parameters()).device)
        self.net, self.diffusion, self.generator, self.last = net, diffusion, generator, last
        self.schedule, self.frozen = diffusion.schedule(K), copy.deepcopy(net).requires_grad_(False)
        self.struct_weight, self.reg_weight, self.reg = struct_weight, reg_weight, reg
        self.denoise_weight, self.every, self.taken = denoise_weight, frm_update_every, 0
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=lr, fused=True)
        self.reward, self.frm = copy.copy(reward), copy.deepcopy(reward.terms.get("face"))
        if self.frm is None:
            self.every = 0
        else:
            self.reward.terms = reward.terms | {"face": self.frm}
            self.frm_optimizer = torch.optim.AdamW(self.frm.trained(), lr=frm_lr)

    @torch.no_grad()
    def roll(self, lq: Tensor, k: int) -> Tensor:
        """From pure noise to x_t before sampling step k; a fresh eta ~ U(0, 1) at each step."""
        x = gaussian(lq, self.generator)
        for t, s in self.schedule[:k]:
            eta = torch.rand((), generator=self.generator).item()
            mu, sigma, _ = self.diffusion.ddim_step(self.net, x, lq, t, s, eta)
            x = mu + sigma * gaussian(x, self.generator)
        return x                                                        # (B, 3, H, W)

    def losses(self, x: Tensor, lq: Tensor, gt: Tensor, k: int):
        """Every loss at x_t before step k, unweighted; x0_hat (B, 3, H, W); parts of the reward."""
        t, s = self.schedule[k]
        with block_outputs(self.net) as features:
            _, _, x0_hat = self.diffusion.ddim_step(self.net, x, lq, t, s, eta=0)
        total, parts = self.reward(x0_hat, gt)                          # (B,)
        losses = {"reward": sum(self.reward.weights.values()) - total.mean(),
                  "struct": structure_loss(x0_hat, gt)}
        if self.reg == "weights":
            losses["reg"] = weight_distance(self.net, self.frozen)
        else:
            with torch.no_grad(), block_outputs(self.frozen) as frozen:
                self.diffusion.ddim_step(self.frozen, x, lq, t, s, eta=0)
            losses["reg"] = feature_distance(features, frozen)
        if self.denoise_weight:
            losses["denoise"] = self.diffusion.loss(self.net, lq, gt, self.generator).mean()
        return losses, x0_hat, parts

    def step(self, batch) -> dict[str, float]:
        """batch = (lq, gt), each (B, 3, H, W). Returns what happened, as floats."""
        lq, gt = batch
        back = torch.randint(self.last, (), generator=self.generator).item()
        k = len(self.schedule) - 1 - back
        losses, x0_hat, parts = self.losses(self.roll(lq, k), lq, gt, k)
        weights = {"reward": 1.0, "struct": self.struct_weight, "reg": self.reg_weight,
                   "denoise": self.denoise_weight}
        self.optimizer.zero_grad()
        sum(weights[name] * loss for name, loss in losses.items()).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.taken += 1
        stats = {name: part.mean().item() for name, part in parts.items()}
        stats |= {f"loss_{name}": loss.item() for name, loss in losses.items()}
        stats |= {"grad_norm": grad_norm.item(), "late_step": k}
        if self.every and self.taken % self.every == 0:
            stats |= self.update_frm(x0_hat.detach().clamp(-1, 1), lq, gt)
        return stats

    def update_frm(self, restored: Tensor, lq: Tensor, gt: Tensor) -> dict[str, float]:
        """The dynamic reward model: one step on (photo preferred to its current restoration) and,
        so that it does not forget what it knew, (photo preferred to its degraded self)."""
        for p in self.frm.trained():
            p.requires_grad_(True)
        photo, worse, worst = (self.frm.score(u) for u in (gt, restored, lq))   # (B,) each
        loss = (pair_loss(photo, worse) + pair_loss(photo, worst)) / 2
        self.frm_optimizer.zero_grad()
        loss.backward()
        self.frm_optimizer.step()
        self.frm.requires_grad_(False)      # the policy's backward pass has no use for its gradient
        return {"frm_loss": loss.item(), "frm_accuracy": (photo > worse).float().mean().item()}

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
