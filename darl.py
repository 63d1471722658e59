"""DARL: reinforcement learning for difficult faces, supervised training for easy ones.

Paper    "Difficulty-adaptive RL with an IQA reward" (Xu et al. 2025, arXiv 2511.01645). Its code is
         not public, and we know only the abstract: every formula here is our reading of it.
Claims   of the abstract, in our words, and the flags that test them:
           1. An image quality score without ground truth is the better reward, because supervised
              training has already used the ground truth.                   --rewards
           2. RL is for hard samples, those far from their ground truth.    --blend hard, easy, 1
           3. As samples come near, supervised training is blended in, with a weight that follows
              their relative difficulty.                                    --blend adaptive, .5
           4. Rewards are given step by step along the trajectory (off by   --stepwise on
              default).
           5. A KL term keeps the policy near the pretrained one (off by    --kl_weight .1
              default).
Reading  (ours) For each LQ image i of a rollout, with its group of G restorations:
           d_i      = mean distance from the ground truth, LPIPS or L1      `difficulty`
           rho_i    = d_i / running mean of d
           lambda_i = rho_i / (1 + rho_i)                                   `blend_weight`
           L        = mean over i of lambda_i L_RL + w (1 - lambda_i) L_SFT  + beta KL(pi || pi_ref)
         L_RL is the clipped policy gradient of lrpo.py on the branched rollout of steered.py, L_SFT
         the loss of SFT on the same images; w balances the two.            `loss`
"""
import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steered import BranchedLRPO, BranchedSettings, gaussian_kl
from support.cli import UserError, setting, share
from support.ranks import gather

MEAN_DECAY = 0.95       # ours: a running mean over about twenty rollouts, as the policy improves


def blend_choice(text: str) -> str:
    """An argparse type: adaptive, hard, easy or a number from 0 to 1."""
    if text not in ("adaptive", "hard", "easy"):
        share(text)
    return text


@dataclass
class DARLSettings(BranchedSettings):
    """LRPO's settings without its loss weights, and DARL's own. No published value is known;
    "paper" in --help is LRPO's.

    Raises UserError for step-wise rewards with a branch: the members of a group share the state
    before the branch, so that its score cancels in the advantage."""
    pg_weight: float = field(default=1.0, init=False)       # init=False: no flag of this mode
    gt_weight: float = field(default=0.0, init=False)
    gt_last: int = field(default=0, init=False)
    blend: str = setting("adaptive", None, "share of RL in an image's loss: adaptive, hard (above "
                         "the mean difficulty only), easy, or a number from 0 to 1",
                         type=blend_choice)
    sft_weight: float = setting(0.2, None, "weight of the supervised loss")
    kl_weight: float = setting(0.0, None, "weight of the KL from the starting policy")
    stepwise: str = setting("off", None, "credit each step with the reward gained after it",
                            choices=["on", "off"])

    def __post_init__(self):
        super().__post_init__()
        if self.stepwise == "on" and self.branch == "on":
            raise UserError("--stepwise on: needs --branch off (and a smaller --batch_size)")


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


class DARL(BranchedLRPO):
    """LRPO's rollout and policy gradient, with a loss blended with SFT's by difficulty."""

    def __init__(self, net, diffusion, reward, generator, settings, lpips=None):
        super().__init__(net, diffusion, reward, generator, settings)
        self.lpips, self.mean = lpips, None
        self.reference = copy.deepcopy(net).requires_grad_(False)

    def difficulty(self, restored: Tensor, gt: Tensor) -> Tensor:
        """d_i, the mean distance of a group's members from the ground truth: (B, 3, H, W) each ->
        (P,). LPIPS if it is loaded, else L1."""
        restored = restored.clamp(-1, 1)
        d = 1 - self.lpips(restored, gt) if self.lpips else (restored - gt).abs().mean((1, 2, 3))
        return d.view(-1, self.settings.group).mean(dim=1)

    def score(self, restored: Tensor, gt: Tensor):
        """As LRPO.score. Side effect: keeps the difficulty and lambda of each image, (P,) each, for
        `loss`, and gt for `assign_advantages`."""
        self.gt, self.d = gt, self.difficulty(restored, gt)                     # d: (P,)
        mean = gather(self.d).mean()                                            # over all ranks
        self.mean = mean if self.mean is None else self.mean
        self.blend_weights = blend_weight(self.d / self.mean, self.settings.blend)      # (P,)
        self.mean = self.mean.lerp(mean, 1 - MEAN_DECAY)
        return super().score(restored, gt)

    def assign_advantages(self, steps, rewards: Tensor, weights: Tensor):
        """As LRPO.assign_advantages. Step-wise: a step is credited with the reward gained from it
        on, R(x_0) minus the reward of x0_hat before the step."""
        if self.settings.stepwise == "off":
            return super().assign_advantages(steps, rewards, weights)
        for step, w in zip(steps, weights):
            gained = rewards - self.reward(step.x0_hat, self.gt)[0].view_as(rewards)    # (P, G)
            super().assign_advantages([step], gained, [w])

    def loss(self, step, lq: Tensor, gt: Tensor, mu: Tensor, sigma: Tensor, pg: Tensor):
        """lambda_i L_RL + w (1 - lambda_i) L_SFT + beta KL, a scalar, and its terms by name."""
        settings, G = self.settings, self.settings.group
        lam = self.blend_weights                                                # (P,)
        rl = (lam.repeat_interleave(G) * pg).mean()
        sft = self.diffusion.loss(self.net, lq[::G], gt[::G], self.generator)   # (P,)
        sft, terms = ((1 - lam) * sft).mean(), {}
        loss = rl + settings.sft_weight * sft
        if settings.kl_weight:
            with torch.no_grad():
                ref, _, _ = self.diffusion.ddim_step(self.reference, step.x, lq, step.t, step.s,
                                                     settings.eta)
            terms["kl"] = gaussian_kl(mu, ref, sigma).mean()
            loss = loss + settings.kl_weight * terms["kl"]
        return loss, {"pg_loss": rl, "sft_loss": sft, **terms}

    def improve(self, batch) -> dict[str, Tensor]:
        """As LRPO.improve. The metrics also hold difficulty and lambda, their mean and standard
        deviation over the images."""
        stats = super().improve(batch)
        d, lam = gather(self.d), gather(self.blend_weights)                     # of all ranks
        return stats | {"difficulty": d.mean(), "difficulty_std": d.std(correction=0),
                        "lambda": lam.mean(), "lambda_std": lam.std(correction=0)}

    def state_dict(self) -> dict:
        """What a resumed run needs beside network and optimiser."""
        return {"mean": self.mean, "reference": self.reference.state_dict()}

    def load_state_dict(self, state: dict):
        self.mean = state["mean"].to(next(self.net.parameters()).device)
        self.reference.load_state_dict(state["reference"])
