"""DARL: reinforcement learning for difficult faces, supervised training for easy ones.

Paper    "Enhancing Diffusion-based Restoration Models via Difficulty-Adaptive Reinforcement
         Learning with IQA Reward" (Xu et al. 2025, arXiv 2511.01645). Its code is not public, and
         we know only the abstract and a summary by others: every formula is our reading of them.
Claims   of the abstract (1 to 3) and of the summary (4, 5), and the flags that test them:
           1. An image quality score without ground truth, above all one from a multimodal language
              model, is the better reward, because supervised training has already used the ground
              truth. (Here `face` or CLIP-IQA stands for it.)               --rewards
           2. RL is for hard samples, those far from their ground truth.    --blend hard, easy, 1
           3. As samples come near, supervised training is blended in, with a weight that follows
              their relative difficulty.                                    --blend adaptive, .5
           4. Rewards are given step by step along the trajectory (off by   --stepwise on
              default).                                                     --own_steps 0
           5. A KL term keeps the policy near the pretrained one (off by    --kl_weight .1
              default).
Reading  (ours) For each LQ image i of a rollout, with its group of G restorations:
           d_i      = mean distance from the ground truth, LPIPS or L1      `difficulty`
           rho_i    = d_i / running mean of d
           lambda_i = rho_i / (1 + rho_i)                                   `blend_weight`
           L        = mean over i of lambda_i L_RL + w (1 - lambda_i) L_SFT  + beta KL(pi || pi_ref)
         L_RL is the clipped policy gradient of lrpo.py, L_SFT the loss of SFT on the same images;
         w balances the two.                                                `loss`
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from lrpo import LRPO, PolicySettings, gaussian_kl, repeat_to
from rewards import REWARDS_HELP
from sft import frozen_copy
from support.cli import UserError, one_of, setting, share
from support.distributed import gather

MEAN_DECAY = 0.95       # ours: a running mean over about twenty rollouts, as the policy improves


@dataclass
class DARLSettings(PolicySettings):
    """LRPO's rollout and policy gradient, and DARL's own. No published value is known.

    Raises UserError for step-wise rewards of a single own step: the members of a group share the
    state before it, so that its score cancels in the advantage."""
    steps: int = setting(45, None, "rollouts in all")
    lr: float = setting(1e-4, None, "learning rate of AdamW")
    every: int = setting(15, None, "rollouts between measurements, with checkpoints")
    rewards: str = setting("face=1", None, REWARDS_HELP)
    blend: str = setting("adaptive", None, "share of RL in an image's loss: adaptive, hard (above "
                         "the mean difficulty only), easy, or a number from 0 to 1",
                         type=one_of("adaptive", "hard", "easy", otherwise=share))
    sft_weight: float = setting(0.2, None, "weight of the supervised loss")
    kl_weight: float = setting(0.0, None, "weight of the KL from the starting policy")
    stepwise: str = setting("off", None, "credit each step with the reward gained after it",
                            choices=["on", "off"])

    def __post_init__(self):
        super().__post_init__()
        if self.stepwise == "on" and self.own_steps == 1:
            raise UserError("--stepwise on: needs --own_steps 0 (and a smaller --batch_size)")


def blend_weight(rho: Tensor, blend: str) -> Tensor:
    """lambda, the share of RL, from the relative difficulty rho: (P,) -> (P,) in [0, 1].

    "adaptive" is the method, rho / (1 + rho): 1/2 at the mean difficulty, towards 1 for hard
    images. "hard" is RL alone (1) where rho > 1 and 0 elsewhere, "easy" the reverse of it; a number
    is the share of every image. The result has rho's dtype."""
    if blend == "adaptive":
        return rho / (1 + rho)
    if blend in ("hard", "easy"):
        return ((rho > 1) == (blend == "hard")).to(rho.dtype)
    return torch.full_like(rho, float(blend))


class DARL:
    """LRPO's rollout and policy gradient, with a loss blended with SFT's by difficulty. A reward
    with the term `lpips`, of whatever weight, measures the difficulty by it."""

    def __init__(self, net, diffusion, reward, generator, settings):
        self.lrpo = LRPO(net, diffusion, reward, generator, settings)
        self.net, self.optimizer, self.settings = net, self.lrpo.optimizer, settings
        self.reference = frozen_copy(net)
        self.mean = None            # the running mean of d, (), from the first rollout on

    def difficulty(self, restored: Tensor, gt: Tensor) -> Tensor:
        """d_i, the mean distance of a group's members from the ground truth: (B, 3, H, W) each ->
        (P,). LPIPS if the reward has it, else L1."""
        restored, lpips = restored.clamp(-1, 1), self.lrpo.reward.models.get("lpips")
        d = 1 - lpips(restored, gt) if lpips else (restored - gt).abs().mean((1, 2, 3))
        return d.view(-1, self.settings.group).mean(dim=1)

    def step_rewards(self, R: Tensor, steps, gt: Tensor) -> Tensor:
        """The reward that each DDIM step is credited with, (1 or n, B, g, g). Step-wise it is what
        is gained from the step on, R(x_0) (B, g, g) minus the reward of x0_hat before the step."""
        if self.settings.stepwise == "off":
            return R[None]
        before = [self.lrpo.reward(repeat_to(step.x0_hat, len(gt)), gt, self.lrpo.g)[0]
                  for step in steps]
        return R - torch.stack(before)

    def loss(self, step, lq: Tensor, gt: Tensor, lam: Tensor, mu: Tensor, sigma: Tensor,
             pg: Tensor):
        """lambda_i L_RL + w (1 - lambda_i) L_SFT + beta KL, a scalar, and its terms by name. lq, gt
        (P, 3, H, W), lam (P,), mu (B, 3, H, W), sigma a scalar, pg (B, g, g) of
        `clipped_loss`."""
        settings, diffusion = self.settings, self.lrpo.diffusion
        rl = (repeat_to(lam, len(pg)) * pg.mean(dim=(1, 2))).mean()
        sft = diffusion.loss(self.net, lq, gt, self.lrpo.generator)             # (P,)
        sft, terms = ((1 - lam) * sft).mean(), {}
        loss = rl + settings.sft_weight * sft
        if settings.kl_weight:
            with torch.no_grad():
                ref, _, _ = diffusion.ddim_step(self.reference, step.x, repeat_to(lq, len(step.x)),
                                                step.t, step.s, settings.eta)
            terms["kl"] = gaussian_kl(mu, repeat_to(ref, len(mu)), sigma).mean()
            loss = loss + settings.kl_weight * terms["kl"]
        return loss, {"pg_loss": rl, "sft_loss": sft, **terms}

    def step(self, batch) -> dict[str, float]:
        """One rollout and the optimiser steps on it. batch = (lq, gt), each (P, 3, H, W). Returns
        LRPO's metrics, and of difficulty and lambda the mean and standard deviation over the
        images. Raises RuntimeError as LRPO does."""
        lq, gt = batch
        restored, steps = self.lrpo.rollout(lq)
        targets = repeat_to(gt, len(restored))                                  # (B, 3, H, W)
        with torch.no_grad():
            d = self.difficulty(restored, targets)                              # (P,)
            all_d = gather(d)                                                   # of all ranks
            self.mean = all_d.mean() if self.mean is None else self.mean
            rho = d / self.mean
            self.mean = self.mean.lerp(all_d.mean(), 1 - MEAN_DECAY)
            lam = blend_weight(rho, self.settings.blend)                        # (P,)
            R, terms = self.lrpo.reward(restored, targets, self.lrpo.g)         # (B, g, g)
            self.lrpo.assign_advantages(steps, self.step_rewards(R, steps, targets))
        stats = self.lrpo.optimise(steps, lq, R, terms, lambda step, mu, sigma, pg: (
            self.loss(step, *(u[step.images] for u in (lq, gt, lam)), mu, sigma, pg)))
        all_lam = gather(lam)
        return self.lrpo.numbers(stats | {
            "difficulty": all_d.mean(), "difficulty_std": all_d.std(correction=0),
            "lambda": all_lam.mean(), "lambda_std": all_lam.std(correction=0)})

    def state_dict(self) -> dict:
        """What a resumed run needs beside network and optimiser."""
        return {"mean": self.mean, "reference": self.reference.state_dict()}

    def load_state_dict(self, state: dict):
        self.mean = state["mean"].to(next(self.net.parameters()).device)
        self.reference.load_state_dict(state["reference"])
