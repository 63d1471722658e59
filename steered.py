"""The default recipe of `--mode lrpo`: LRPO with three ideas and other settings of ours.

lrpo.py contains none of them.
1. Branch     The members of a group share all noise but that of the last step with sigma above 0,
              and only that step is trained. The rewards of a group then differ because of that step
              alone, and one network call serves the G states that are equal. Flow-GRPO-Fast and
              MixGRPO branch too.                              `BranchedLRPO.rollout`, `policy`
2. Posterior  The paper adds fresh noise to x_gt. The noised x_gt is then not on the trajectory of
              x_t. Here it is replaced by DDIM's posterior q(x_{t-1} | x_t, x_gt) (DDPM's for
              eta = 1), the step of a policy that knows x_gt. -KL(q || pi), which is E_q[log pi]
              plus a constant, replaces log pi in L_gt. It is a weighted |x0_hat - x_gt|^2 at the
              policy's own states.                             `SteeredLRPO.gt_log_prob`
3. Steering   The weight of that likelihood is a Lagrange multiplier. It rises while the policy's
              PSNR is more than `fidelity_margin` below that of the frozen policy from which the run
              started, and falls otherwise. A proportional term beside the integral damps its
              oscillation (Stooke et al. 2020, arXiv 2007.03964).  `Multiplier`, `fidelity_gap`
"""
import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lrpo import LRPO, LRPOSettings, Transition, gaussian_log_prob
from model import EVAL_ETA, gaussian
from rewards import psnr
from support.cli import UserError, amount, setting
from support.ranks import alone, gather

FIRST_WEIGHT = 5.0          # ours: steering ends at about 7 at 32 px, at .5 to 4 at 64 px
PROPORTIONAL = 8.0          # ours: per dB; .1 dB below the target multiplies the weight by 2.2
INTEGRAL = 0.4              # ours: per dB and rollout; .1 dB over 17 rollouts doubles the weight
SMOOTHING = 0.7             # ours: of the proportional term's error, over about three rollouts
LOG_RANGE = math.log(100)   # ours: the weight stays within a factor of 100 of the first
GAP_LIMIT = 0.3             # ours: dB; a larger error counts as this much
GAP_IMAGES = 16             # ours: leaves about .03 dB of noise (.12 dB for one image)


def auto_or_amount(text: str):
    """An argparse type: "auto", or a number of 0 or more."""
    return text if text == "auto" else amount(text)


@dataclass
class BranchedSettings(LRPOSettings):
    """LRPO's settings, and whether a group branches. Raises UserError if a setting has no effect
    because of the branch."""
    branch: str = setting("on", None, "a group shares all noise but that of the last noisy step; "
                          "off: full trajectories", choices=["on", "off"])

    def __post_init__(self):
        for name, idle in (("noise_level_weights", "on"), ("steps_per_update", 0), ("gt_last", 0)):
            if self.branch == "on" and getattr(self, name) != idle:
                raise UserError(f"--{name} {getattr(self, name)}: with a branch a single step is "
                                "trained, so that it has no effect; give --branch off as well")


@dataclass
class SteeredSettings(BranchedSettings):
    """The settings of the default recipe."""
    gt_weight: str | float = setting(
        "auto", 0.001, "weight of the ground-truth likelihood: a number, or auto: steered by the "
        "PSNR lost against the starting policy", type=auto_or_amount)
    fidelity_margin: float = setting(0.2, None, "PSNR in dB that auto may give up")


class BranchedLRPO(LRPO):
    """LRPO in which the members of a group differ by the noise of one step; darl.py uses it too."""

    def __init__(self, net, diffusion, reward, generator, settings):
        super().__init__(net, diffusion, reward, generator, settings)
        self.branch = self.schedule[-2] if settings.branch == "on" else None

    def policy(self, x: Tensor, lq: Tensor, t: int, s: int):
        """As LRPO.policy. At the branch the states of a group are equal, so that the network is
        called on one member of each group."""
        if (t, s) != self.branch:
            return super().policy(x, lq, t, s)
        G = self.settings.group
        mu, sigma, x0_hat = super().policy(x[::G], lq[::G], t, s)       # (P, 3, H, W)
        return mu.repeat_interleave(G, dim=0), sigma, x0_hat.repeat_interleave(G, dim=0)

    @torch.no_grad()
    def rollout(self, lq: Tensor) -> tuple[Tensor, list[Transition]]:
        """As LRPO.rollout, for lq (B, 3, H, W) of P groups of G equal images. Without the branch it
        is that one. With it each group has one trajectory as far as the step `self.branch`, the
        last but one, in which each of its G members draws its own noise: its single Transition."""
        if not self.branch:
            return super().rollout(lq)
        G = self.settings.group
        x = gaussian(lq[::G], self.generator)                           # (P, 3, H, W)
        for t, s in self.schedule[:-2]:
            mu, sigma, _ = super().policy(x, lq[::G], t, s)
            x = mu + sigma * gaussian(x, self.generator)
        x = x.repeat_interleave(G, dim=0)                               # (B, 3, H, W)
        mu, sigma, x0_hat = self.policy(x, lq, *self.branch)
        action = mu + sigma * gaussian(mu, self.generator)
        restored, _, _ = self.policy(action, lq, *self.schedule[-1])
        log_prob = gaussian_log_prob(action, mu, sigma)
        return restored, [Transition(*self.branch, x, action, log_prob, x0_hat)]


def gaussian_kl(mu: Tensor, ref: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma^2 I) || N(ref, sigma^2 I)) = |mu - ref|^2 / (2 sigma^2), averaged over the D
    dimensions instead of summed, in nats: mu and ref (B, 3, H, W) -> (B,)."""
    return (((mu - ref) / sigma) ** 2 / 2).mean(dim=(1, 2, 3))


class Multiplier:
    """The weight of the likelihood, as a Lagrange multiplier of "gap >= -margin" (PSNR in dB)."""

    def __init__(self, margin: float):
        self.margin, self.error, self.integral = margin, 0.0, 0.0

    @property
    def weight(self) -> float:
        """exp of a proportional and an integral term, so that it is always above 0."""
        log = self.integral + PROPORTIONAL * self.error
        return FIRST_WEIGHT * math.exp(max(-LOG_RANGE, min(LOG_RANGE, log)))

    def update(self, gap: float):
        """Move the weight. gap: PSNR of the policy minus that of the reference policy, in dB."""
        error = max(-GAP_LIMIT, min(GAP_LIMIT, -gap - self.margin))
        self.error = SMOOTHING * self.error + (1 - SMOOTHING) * error
        self.integral = max(-LOG_RANGE, min(LOG_RANGE, self.integral + INTEGRAL * error))


class SteeredLRPO(BranchedLRPO):
    """LRPO with branch, posterior and steering."""

    def __init__(self, net, diffusion, reward, generator, settings):
        super().__init__(net, diffusion, reward, generator, settings)
        self.reference = copy.deepcopy(net).requires_grad_(False)
        self.multiplier = Multiplier(settings.fidelity_margin)

    def gt_log_prob(self, step: Transition, gt: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
        """-KL(q || pi) with q = q(x_s | x_t, x_gt), that is E_q log pi plus the entropy of q, which
        does not depend on the policy: (B,), at most 0."""
        mu_gt = self.diffusion.posterior_mean(step.x, gt, step.t, step.s, self.settings.eta)
        return -gaussian_kl(mu_gt, mu, sigma)

    @torch.no_grad()
    def fidelity_gap(self, lq: Tensor, gt: Tensor) -> Tensor:
        """Mean PSNR of the policy minus that of the reference policy, in dB, a scalar. Both restore
        the first images of a batch (P, 3, H, W), that of all ranks, from the same noise."""
        lq, gt = (gather(u)[:GAP_IMAGES] for u in (lq, gt))             # (<= 16, 3, H, W)
        noise, scores = self.generator.get_state(), []
        for net in (self.net, self.reference):
            self.generator.set_state(noise)
            with alone():
                x = self.diffusion.sample(net, lq, len(self.schedule), EVAL_ETA, self.generator)
            scores.append(psnr(x, gt))                                  # (<= 16,)
        return (scores[0] - scores[1]).mean()

    def improve(self, batch) -> dict[str, Tensor]:
        """As LRPO.improve, and with gt_weight auto the policy's lead in PSNR after it."""
        stats = super().improve(batch)
        auto = self.settings.gt_weight == "auto"
        return stats | ({"fidelity_gap": self.fidelity_gap(*batch)} if auto else {})

    def step(self, batch) -> dict[str, float]:
        """LRPO's step. With gt_weight auto the multiplier gives the weight and is updated."""
        if self.settings.gt_weight != "auto":
            return super().step(batch)
        self.gt_weight = self.multiplier.weight
        stats = super().step(batch)
        self.multiplier.update(stats["fidelity_gap"])
        return stats | {"gt_weight": self.gt_weight}

    def state_dict(self) -> dict:
        """What a resumed run needs beside network and optimiser."""
        return {"reference": self.reference.state_dict(), "error": self.multiplier.error,
                "integral": self.multiplier.integral}

    def load_state_dict(self, state: dict):
        self.reference.load_state_dict(state["reference"])
        self.multiplier.error, self.multiplier.integral = state["error"], state["integral"]
