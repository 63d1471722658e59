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
         L_RL is lrpo.py's clipped policy gradient, its rollout and noise-level weights; L_SFT is
         SFT's loss on the same images; w balances the two.
"""
import copy

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lrpo import LRPO, gaussian_kl

MEAN_DECAY = 0.95       # ours: a running mean over some twenty rollouts, as the policy improves


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


class DARL(LRPO):
    """LRPO's rollout and policy gradient; the loss blended with SFT's by difficulty.

    ValueError for step-wise rewards with a branch: the members of a group share the state in which
    they part, so that its score would cancel.
    best.pt is chosen by the rewarded score, which can be hacked: last.pt is what is compared.
    """

    def __init__(self, *args, blend="adaptive", sft_weight=0.2, kl_weight=0.0, stepwise=False,
                 lpips=None, **kwargs):
        super().__init__(*args, gt_weight=0.0, **kwargs)
        if stepwise and self.branch:
            raise ValueError("step-wise rewards need --branch 0")
        self.blend, self.sft_weight, self.kl_weight = blend, sft_weight, kl_weight
        self.stepwise, self.lpips, self.mean = stepwise, lpips, None
        self.reference = copy.deepcopy(self.net).requires_grad_(False)

    def difficulty(self, restored: Tensor, gt: Tensor) -> Tensor:
        """d_i, the mean distance of a group's members from the ground truth: (P,)."""
        gt, restored = self.each(gt), restored.clamp(-1, 1)
        d = 1 - self.lpips(restored, gt) if self.lpips else (restored - gt).abs().mean((1, 2, 3))
        return d.view(-1, self.group).mean(dim=1)

    @torch.no_grad()
    def score(self, restored: Tensor, gt: Tensor):
        """LRPO's; on the way, the difficulty of each image and with it lambda."""
        self.d = self.difficulty(restored, gt)                                  # (P,)
        self.mean = self.d.mean() if self.mean is None else self.mean
        self.blend_weights = blend_weight(self.d / self.mean, self.blend)       # (P,)
        self.mean = self.mean.lerp(self.d.mean(), 1 - MEAN_DECAY)
        return super().score(restored, gt)

    def assign_advantages(self, steps, grouped: Tensor, weights: Tensor):
        """Step-wise: a step is credited with what the score still gained after it, R(x_0) minus the
        score of x0_hat as it was before the step."""
        if not self.stepwise:
            return super().assign_advantages(steps, grouped, weights)
        for step in steps:
            gained = grouped - self.reward(step.x0_hat, step.gt)[0].view_as(grouped)    # (P, G)
            super().assign_advantages([step], gained, weights)

    def loss(self, step, mu: Tensor, sigma: Tensor, pg: Tensor):
        lam = self.blend_weights.repeat_interleave(len(mu) // len(self.d))      # (R,)
        rl = (lam.repeat_interleave(len(pg) // len(mu)) * pg).mean()
        sft = ((1 - lam) * self.diffusion.loss(self.net, step.lq, step.gt, self.generator)).mean()
        with torch.no_grad():
            ref, _, _ = self.diffusion.ddim_step(self.reference, step.x, step.lq,
                                                 *self.trained_steps[step.k], self.eta)
        kl = gaussian_kl(mu, ref, sigma).mean()
        return (rl + self.sft_weight * sft + self.kl_weight * kl,
                {"pg_loss": rl, "sft_loss": sft, "kl": kl})

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
