"""Fidelity: how far a policy may fall behind the network it started from, in PSNR.

A reward that is maximised without limit gets hacked: the restorations leave the ground truth. LRPO
holds the policy by a likelihood of fixed weight. Here that weight is a Lagrange multiplier (ours),
so that one setting serves every image size and data set.
Steps    1. Keep a frozen copy of the network, the reference policy.      `Fidelity.reference`
         2. Restore some images with both, from the same noise, and take
            the difference of their PSNR.                                 `Fidelity.gap`
         3. Raise the weight's integral term while the policy is more than
            `margin` dB below the reference policy, and lower it otherwise.
                                                                          `Fidelity.update`
A proportional term beside the integral damps the oscillation (Stooke et al. 2020, arXiv
2007.03964). One object serves any method: lrpo.py weights its likelihood with it, refl.py the
squared error.
"""
import math

import torch
from torch import Tensor

from model import EVAL_ETA, Diffusion
from rewards import psnr
from sft import frozen_copy
from support.distributed import alone, gather

FIRST_WEIGHT = 5.0          # ours: in LRPO it ends at about 7 at 32 px, at .5 to 4 at 64 px
PROPORTIONAL = 8.0          # ours: per dB; .1 dB below the target multiplies the weight by 2.2
INTEGRAL = 0.4              # ours: per dB and update; .1 dB over 17 updates doubles the weight
SMOOTHING = 0.7             # ours: of the proportional term's error, over about three updates
LOG_RANGE = math.log(100)   # ours: the weight stays within a factor of 100 of the first
GAP_LIMIT = 0.3             # ours: dB; a larger error counts as this much
GAP_IMAGES = 16             # ours: leaves about .03 dB of noise (.12 dB for one image)


class Fidelity:
    """The reference policy, the gap to it, and the weight that follows from the gap. `K` is the
    number of sampling steps, `generator` the run's: a measurement moves it. `gain` multiplies both
    terms: the faster the PSNR follows the weight, the less may the weight follow the PSNR."""

    def __init__(self, net, diffusion: Diffusion, K: int, margin: float, generator,
                 gain: float = 1.0):
        self.reference = frozen_copy(net)
        self.diffusion, self.K, self.margin, self.generator = diffusion, K, margin, generator
        self.error, self.integral, self.gain = 0.0, 0.0, gain

    @property
    def weight(self) -> float:
        """The Lagrange multiplier of "gap >= -margin": exp of a proportional and an integral term,
        so that it is always above 0."""
        log = self.integral + self.gain * PROPORTIONAL * self.error
        return FIRST_WEIGHT * math.exp(max(-LOG_RANGE, min(LOG_RANGE, log)))

    @torch.no_grad()
    def gap(self, net, lq: Tensor, gt: Tensor) -> Tensor:
        """Mean PSNR of `net` minus that of the reference policy, in dB, a scalar. Both restore the
        first images of a batch (P, 3, H, W), that of all ranks, from the same noise."""
        lq, gt = (gather(u)[:GAP_IMAGES] for u in (lq, gt))             # (<= 16, 3, H, W)
        noise, scores = self.generator.get_state(), []
        for policy in (net, self.reference):
            self.generator.set_state(noise)
            with alone():
                x = self.diffusion.sample(policy, lq, self.K, EVAL_ETA, self.generator)
            scores.append(psnr(x, gt))                                  # (<= 16,)
        return (scores[0] - scores[1]).mean()

    def update(self, gap: float) -> float:
        """Move the weight. gap: the result of `gap`, in dB. Returns the weight before it."""
        before = self.weight
        error = max(-GAP_LIMIT, min(GAP_LIMIT, -gap - self.margin))
        self.error = SMOOTHING * self.error + (1 - SMOOTHING) * error
        integral = self.integral + self.gain * INTEGRAL * error
        self.integral = max(-LOG_RANGE, min(LOG_RANGE, integral))
        return before

    def state_dict(self) -> dict:
        """What a resumed run needs."""
        return {"reference": self.reference.state_dict(), "error": self.error,
                "integral": self.integral}

    def load_state_dict(self, state: dict):
        self.reference.load_state_dict(state["reference"])
        self.error, self.integral = state["error"], state["integral"]
