"""DARL: reinforcement learning for the faces that are hard, supervision for those that are easy.

Paper    "Difficulty-adaptive RL with an IQA reward" (Xu et al. 2025, arXiv 2511.01645). No code of
         it is public and only its abstract is known to us: every formula here is our reading.
Claims   of the abstract, in our words; each can be put to the test by a flag:
           1. an image quality score without ground truth is the better reward, because supervised
              training has used up what the ground truth can teach          --rewards
           2. RL is for hard samples, those far from their ground truth     --blend hard, easy, 1
           3. as samples come near, supervised training is blended in, by a weight that follows
              their relative difficulty                                     --blend adaptive, .5
           4. rewards are given step by step along the trajectory (off)     --stepwise on
           5. a KL term keeps the policy near the pretrained one (off)      --kl_weight .1
Reading  (ours) For each LQ image i of a rollout, with its group of G restorations:
           d_i      = their mean distance from the ground truth: LPIPS where loaded, else L1
           rho_i    = d_i / running mean of d
           lambda_i = rho_i / (1 + rho_i)                   1/2 at the mean, towards 1 when hard
           L        = mean over i of lambda_i L_RL + w (1 - lambda_i) L_SFT  + beta KL(pi || pi_ref)
         L_RL is lrpo.py's clipped policy gradient on steered.py's branched rollout; L_SFT is SFT's
         loss on the same images; w balances the two.
"""
import copy
from dataclasses import dataclass, field

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lrpo import setting
from steered import BranchedLRPO, BranchedSettings, gaussian_kl

MEAN_DECAY = 0.95       # ours: a running mean over some twenty rollouts, as the policy improves


@dataclass
class DARLSettings(BranchedSettings):
    """LRPO's settings but for its loss weights, and DARL's own. No published value is known."""
    pg_weight: float = field(default=1.0, init=False)
    gt_weight: float = field(default=0.0, init=False)
    gt_last: int = field(default=0, init=False)
    blend: str = setting("adaptive", None, "share of RL in an image's loss: adaptive, hard (above "
                         "the mean difficulty only), easy, or a number from 0 to 1")
    sft_weight: float = setting(0.2, None, "weight of the supervised loss")
    kl_weight: float = setting(0.0, None, "weight of the KL from the policy it started as")
    stepwise: str = setting("off", None, "credit each step with what is gained after it",
                            choices=["on", "off"])


def blend_weight(rho: Tensor, blend: str) -> Tensor:
    """lambda of relative difficulty rho (P,): "adaptive" (the method), "hard" or "easy" (RL on one
    side of the mean only), or a number for all. In [0, 1]."""
    if blend == "adaptive":
        return rho / (1 + rho)
    if blend in ("hard", "easy"):
        return ((rho > 1) == (blend == "hard")).to(rho.dtype)
    return torch.full_like(rho, float(blend))


def by_quartile(values: Tensor, difficulty: Tensor) -> list[float]:
    """Mean of `values` (P,) over the easiest quarter of the images, ..., the hardest."""
    return [part.mean().item() for part in values[difficulty.argsort()].tensor_split(4)
            if len(part)]


class DARL(BranchedLRPO):
    """LRPO's rollout and policy gradient; the loss blended with SFT's by difficulty.

    ValueError for step-wise rewards with a branch: the members of a group share the state in which
    they part, so that its score would cancel.
    best.pt is chosen by the rewarded score, which can be hacked: last.pt is what is compared.
    """

    def __init__(self, net, diffusion, reward, generator, settings, lpips=None):
        super().__init__(net, diffusion, reward, generator, settings)
        if settings.stepwise == "on" and self.branch:
            raise ValueError("step-wise rewards need --branch off")
        self.lpips, self.mean = lpips, None
        self.reference = copy.deepcopy(net).requires_grad_(False)

    def difficulty(self, restored: Tensor, gt: Tensor) -> Tensor:
        """d_i, the mean distance of a group's members from the ground truth: (B, ...) -> (P,)."""
        restored = restored.clamp(-1, 1)
        d = 1 - self.lpips(restored, gt) if self.lpips else (restored - gt).abs().mean((1, 2, 3))
        return d.view(-1, self.settings.group).mean(dim=1)

    def score(self, restored: Tensor, gt: Tensor):
        """LRPO's; on the way, the difficulty of each image and with it lambda."""
        self.gt, self.d = gt, self.difficulty(restored, gt)                     # d: (P,)
        self.mean = self.d.mean() if self.mean is None else self.mean
        self.blend_weights = blend_weight(self.d / self.mean, self.settings.blend)      # (P,)
        self.mean = self.mean.lerp(self.d.mean(), 1 - MEAN_DECAY)
        return super().score(restored, gt)

    def assign_advantages(self, steps, rewards: Tensor, weights: Tensor):
        """Step-wise: a step is credited with what the score still gained after it, R(x_0) minus the
        score of x0_hat as it was before the step."""
        if self.settings.stepwise == "off":
            return super().assign_advantages(steps, rewards, weights)
        for step, w in zip(steps, weights):
            gained = rewards - self.reward(step.x0_hat, self.gt)[0].view_as(rewards)    # (P, G)
            super().assign_advantages([step], gained, [w])

    def loss(self, step, lq: Tensor, gt: Tensor, mu: Tensor, sigma: Tensor, pg: Tensor):
        """lambda_i L_RL + w (1 - lambda_i) L_SFT + beta KL, and its terms by name."""
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

    def step(self, batch) -> dict[str, float]:
        stats = super().step(batch)
        lam = self.blend_weights
        stats |= {"difficulty": self.d.mean().item(), "lambda": lam.mean().item(),
                  "lambda_std": lam.std(correction=0).item()}
        for name, values in (("difficulty", self.d), ("lambda", lam)):
            stats |= {f"{name}_q{q}": v for q, v in enumerate(by_quartile(values, self.d), 1)}
        return stats

    def picture(self, rows: list[dict], folder):
        """blend.png: lambda against difficulty, each rollout's quartiles, coloured by step."""
        points = [(float(row[f"difficulty_q{q}"]), float(row[f"lambda_q{q}"]), int(row["step"]))
                  for row in rows for q in range(1, 5) if row.get(f"lambda_q{q}", "") != ""]
        fig = Figure(figsize=(6, 4))
        ax = fig.subplots()
        d, lam, step = zip(*points)
        fig.colorbar(ax.scatter(d, lam, c=step, s=10), label="rollout")
        ax.set(xlabel="difficulty (mean of a quartile)", ylabel="lambda, the share of RL")
        fig.tight_layout()
        fig.savefig(folder / "blend.png", dpi=80)

    def state_dict(self) -> dict:
        return {"mean": self.mean, "reference": self.reference.state_dict()}

    def load_state_dict(self, state: dict):
        self.mean = state["mean"].to(next(self.net.parameters()).device)
        self.reference.load_state_dict(state["reference"])
