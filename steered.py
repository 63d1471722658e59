"""The default recipe of `--mode lrpo`: LRPO with three changes of ours. lrpo.py knows none of them.

1. Branch     A group shares all noise but that of the last step that has any, and only that step
              is trained. What differs between the rewards of a group is then that step's doing,
              and one network call serves the G states that are equal. (Flow-GRPO-Fast and MixGRPO
              branch too.)                                      `BranchedLRPO.rollout`, `policy`
2. Posterior  The paper evaluates the likelihood of x_gt noised by fresh noise, which lies on
              another trajectory than x_t does. Ours is the expectation over DDPM's posterior
              q(x_{t-1} | x_t, x_gt), the step that the policy would take if it knew x_gt; in closed
              form it is a weighted |x0_hat - x_gt|^2 at the states that the policy visits.
                                                                `SteeredLRPO.gt_log_prob`
3. Steering   The weight of that likelihood is a Lagrange multiplier: it rises while the policy is
              less faithful than the frozen policy that it started as, and falls while there is
              room. A proportional and an integral term (Stooke et al. 2020, arXiv 2007.03964) damp
              it.                                               `Multiplier`, `fidelity_gap`
"""
import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lrpo import LRPO, LRPOSettings, Step, gaussian_log_prob, setting
from model import gaussian
from rewards import psnr

FIRST_WEIGHT = 5.0          # ours: near where steering ends at 32 px
PROPORTIONAL = 8.0          # ours: per dB; .1 dB below the target multiplies the weight by 2.2
INTEGRAL = 0.4              # ours: per dB and rollout; .1 dB over 17 rollouts doubles the weight
SMOOTHING = 0.7             # ours: of the measured gap, over some three rollouts
LOG_RANGE = math.log(100)   # ours: the weight stays within a factor of 100 of the first
GAP_LIMIT = 0.3             # ours: dB; a single rollout cannot push the weight further than this
GAP_ETA = 0.8               # LRPO's code: eta at inference
GAP_IMAGES = 16             # ours: .03 dB of noise, for a tenth of a rollout's time


@dataclass
class BranchedSettings(LRPOSettings):
    """LRPO's settings, and the branch."""
    updates: int = setting(2, 1, "passes over a rollout")
    branch: str = setting("on", None, "a group shares all noise but that of the last step that has "
                          "any; off: full trajectories", choices=["on", "off"])


@dataclass
class SteeredSettings(BranchedSettings):
    """The default recipe's settings."""
    gt_weight: str = setting("auto", 0.001, "weight of strategy 2: a number, or auto, which steers "
                             "it by the fidelity of the rollouts")
    fidelity_margin: float = setting(0.15, None, "PSNR in dB that auto may give up")


class BranchedLRPO(LRPO):
    """LRPO in which the members of a group differ by the noise of one step (darl.py's too)."""

    def __init__(self, net, diffusion, reward, generator, settings):
        super().__init__(net, diffusion, reward, generator, settings)
        self.branch = self.schedule[-2] if settings.branch == "on" else None

    def policy(self, x: Tensor, lq: Tensor, t: int, s: int):
        """At the branch the states of a group are equal, and one network call serves them all."""
        if (t, s) != self.branch:
            return super().policy(x, lq, t, s)
        G = self.settings.group
        mu, sigma, x0_hat = super().policy(x[::G], lq[::G], t, s)       # (P, 3, H, W)
        return mu.repeat_interleave(G, dim=0), sigma, x0_hat.repeat_interleave(G, dim=0)

    @torch.no_grad()
    def rollout(self, lq: Tensor) -> tuple[Tensor, list[Step]]:
        """As LRPO's; with the branch, one trajectory for each group up to the last step."""
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
        return restored, [Step(*self.branch, x, action, log_prob, x0_hat)]


def gaussian_kl(mu: Tensor, ref: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma^2 I) || N(ref, sigma^2 I)), averaged over the D dimensions: (B,)."""
    return (((mu - ref) / sigma) ** 2 / 2).mean(dim=(1, 2, 3))


class Multiplier:
    """The weight of the likelihood, as a Lagrange multiplier of "gap >= -margin" (PSNR in dB)."""

    def __init__(self, margin: float):
        self.margin, self.error, self.integral = margin, 0.0, 0.0

    @property
    def weight(self) -> float:
        """exp of a proportional and an integral term, so that it is above 0 at every scale."""
        log = self.integral + PROPORTIONAL * self.error
        return FIRST_WEIGHT * math.exp(max(-LOG_RANGE, min(LOG_RANGE, log)))

    def update(self, gap: float):
        """gap: PSNR of the policy minus PSNR of the reference policy, in dB."""
        error = max(-GAP_LIMIT, min(GAP_LIMIT, -gap - self.margin))
        self.error = SMOOTHING * self.error + (1 - SMOOTHING) * error
        self.integral = max(-LOG_RANGE, min(LOG_RANGE, self.integral + INTEGRAL * error))


class SteeredLRPO(BranchedLRPO):
    """LRPO with branch, posterior and steering."""

    def __init__(self, net, diffusion, reward, generator, settings):
        super().__init__(net, diffusion, reward, generator, settings)
        self.reference = copy.deepcopy(net).requires_grad_(False)
        self.multiplier = Multiplier(settings.fidelity_margin)

    def gt_log_prob(self, step: Step, gt: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
        """E log pi(x | x_t, LQ) over q(x | x_t, x_gt), but for the entropy of q: (B,)."""
        eps = self.diffusion.eps_of(step.x, gt, step.t)
        mu_gt = self.diffusion.ddim_mean(gt, eps, step.t, step.s, self.settings.eta)
        return -gaussian_kl(mu_gt, mu, sigma)

    @torch.no_grad()
    def fidelity_gap(self, lq: Tensor, gt: Tensor) -> float:
        """Mean PSNR of the policy minus that of the reference policy, in dB, from equal noise, over
        the first images of a batch (P, 3, H, W)."""
        lq, gt = lq[:GAP_IMAGES], gt[:GAP_IMAGES]
        noise, scores = self.generator.get_state(), []
        for net in (self.net, self.reference):
            self.generator.set_state(noise)
            x = self.diffusion.sample(net, lq, len(self.schedule), GAP_ETA, self.generator)
            scores.append(psnr(x, gt))                                  # (P,)
        return (scores[0] - scores[1]).mean().item()

    def step(self, batch) -> dict[str, float]:
        """LRPO's step with the multiplier's weight, which is updated after it."""
        auto = self.settings.gt_weight == "auto"
        self.gt_weight = self.multiplier.weight if auto else self.settings.gt_weight
        stats = super().step(batch)
        gap = self.fidelity_gap(*batch)
        self.multiplier.update(gap)
        return stats | {"gt_weight": self.gt_weight, "fidelity_gap": gap}

    def state_dict(self) -> dict:
        """What a resumed run needs beside network and optimiser."""
        return {"reference": self.reference.state_dict(), "error": self.multiplier.error,
                "integral": self.multiplier.integral}

    def load_state_dict(self, state: dict):
        self.reference.load_state_dict(state["reference"])
        self.multiplier.error, self.multiplier.integral = state["error"], state["integral"]
