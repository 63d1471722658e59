"""LRPO: online reinforcement learning on a diffusion restorer, regularised by the ground truth.

Paper    LRPO, Likelihood-Regularised Policy Optimisation (Wu et al. 2025, arXiv 2509.23339).
         It builds on DDPO (arXiv 2305.13301), PPO (1707.06347) and GRPO (2402.03300).
Policy   Each DDIM step is a Gaussian policy: pi(x_{t-1} | x_t, LQ) = N(mu, sigma^2 I).
Steps    of the algorithm, in the order of `LRPO.improve`:
         1. Restore each LQ image G times, with independent noise.        `LRPO.rollout`
         2. Score the results by the composite reward (strategy 1).       rewards.py
         3. Compare the G results of one image with each other.           `group_advantages`
         4. Weight the advantage of each step by its noise (strategy 3).  `noise_level_weights`
         5. Raise the likelihood of the better trajectories, clipped.     `clipped_loss`
         6. Raise the likelihood of the ground truth (strategy 2).        `gt_likelihood_loss`
Shapes   P LQ images, G restorations of each, B = P * G, D = 3HW. t-1 in the paper is s here.
Settings `LRPOSettings`; `--recipe paper` uses all published values. Our recipe is in steered.py.
Departs  The published code                             here
         noises the ground truth cumulatively           q(x_s | x_gt), noised once
         groups images by their caption                 a group is one LQ image
         divides w_t by the mean sigma of all K steps   by the mean over the trained steps
         drops samples of advantage 0                   every sample counts in the likelihood
         lets the exponent of the likelihood be > 0     at most 0
         has leading steps and scaled-linear betas      trailing steps, DDPM's linear betas
         has no warm-up and no average of the weights   both, see settings.py
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model import MAX_GRAD_NORM, Diffusion, gaussian
from support.cli import at_least_two, policy_eta, setting, whole
from support.log import to_floats
from support.optimise import optimiser_step
from support.ranks import gather, own_rows

ADV_EPS = 1e-4              # LRPO's code: bounds the advantage where the rewards hardly differ
ADV_CLIP = 5.0              # LRPO's code: bounds the weighted advantage
TRUST = 1.64                # LRPO's code: its clip range times its D, 1e-4 * 4*64*64. The ratio is
#                             a geometric mean over D, so that TRUST / D suits every size (ours)
GT_TEMPERATURE = 40.0       # LRPO's code: L_gt = 1 - exp(log pi / 40)
MIN_STD = 1e-6              # ours: below it the float32 rewards of a group count as equal
RATIO_SLACK, BF16_SLACK = 1e-5, 1e-3    # ours: another order of summation moves it by 2e-7, 2e-4


@dataclass
class LRPOSettings:
    """Default, published value and meaning. A preset or --recipe paper replaces the default."""
    lr: float = setting(1e-4, 1e-6, "learning rate of AdamW")
    ddim_steps: int = setting(5, 50, "K, sampling steps", type=at_least_two)
    eta: float = setting(1.0, 1.0, "DDIM noise of the rollouts, above 0", type=policy_eta)
    group: int = setting(8, 9, "G, restorations of one image", type=at_least_two)
    updates: int = setting(2, 1, "passes over a rollout")
    steps_per_update: int = setting(0, 1, "DDIM steps whose mean loss makes one optimiser step "
                                    "(0: all)", type=whole)
    clip: float = setting(None, None, "clip range of the ratio; left out: 1.64 / D, the published "
                          "1e-4 at D = 4*64*64")
    adv_std: str = setting("group", "batch", "standard deviation in the advantage",
                           choices=["group", "batch"])
    noise_level_weights: str = setting("on", "on", "strategy 3 of LRPO", choices=["on", "off"])
    pg_weight: float = setting(1.0, 1.0, "weight of the policy gradient")
    gt_weight: float = setting(0.001, 0.001, "weight of the ground-truth likelihood; 0: off")
    gt_last: int = setting(0, 5, "likelihood on the last n trained steps (0: on all)", type=whole)


def gaussian_log_prob(x: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """log N(x; mu, sigma^2 I) = -(x - mu)^2 / (2 sigma^2) - log sigma - log(2 pi) / 2, in float32
    and averaged over the D dimensions: x and mu (B, 3, H, W), sigma > 0 a scalar -> (B,).
    DDPO's and LRPO's code take the mean as well: with the sum over D the ratio overflows."""
    x, mu, sigma = x.float(), mu.float(), sigma.float()
    log_prob = -((x - mu) / sigma) ** 2 / 2 - torch.log(sigma) - math.log(2 * math.pi) / 2
    return log_prob.mean(dim=(1, 2, 3))


def group_advantages(rewards: Tensor, std: str = "group") -> Tensor:
    """A_i = (R_i - mean of its group) / (std + 1e-4): (P, G) -> (P, G).

    std "group" takes the population standard deviation of the group (the paper's figure), "batch"
    that of all P * G rewards (the published code). A group of std below MIN_STD gets exactly 0.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    group_std = rewards.std(dim=1, keepdim=True, correction=0)          # (P, 1)
    scale = group_std if std == "group" else rewards.std(correction=0)
    return torch.where(group_std < MIN_STD, 0.0, centred / (scale + ADV_EPS))


def noise_level_weights(sigma: Tensor) -> Tensor:
    """w_t = sigma_t / mean of sigma (strategy 3): (n,) -> (n,), mean 1. The paper's reason: the
    noisy early steps decide more, so they get a larger advantage."""
    return sigma / sigma.mean()


def clipped_loss(log_prob: Tensor, old: Tensor, advantage: Tensor, clip: float):
    """PPO's objective with r = pi / pi_old, -min(A r, A clip(r, 1 - clip, 1 + clip)); log_prob,
    old, advantage (B,) -> the loss (B,) and the ratio r (B,), not clipped."""
    ratio = torch.exp(log_prob - old)
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    return loss, ratio


def gt_likelihood_loss(log_prob: Tensor) -> Tensor:
    """Strategy 2: L_gt = 1 - exp(log pi(x_gt_{t-1} | x_t, LQ) / 40), exponent at most 0: log pi
    (B,) -> (B,) in [0, 1]."""
    return 1 - torch.exp((log_prob / GT_TEMPERATURE).clamp(max=0))


@dataclass
class Transition:
    """One trained DDIM step t -> s of the B trajectories of a rollout."""
    t: int
    s: int
    x: Tensor                   # (B, 3, H, W)  x_t, the state
    action: Tensor              # (B, 3, H, W)  x_{t-1}
    log_prob: Tensor            # (B,)          log pi_old of the action
    x0_hat: Tensor              # (B, 3, H, W)  predicted from x_t; only darl.py reads it
    x_gt: Tensor = None         # (B, 3, H, W)  the ground truth, noised to level s
    advantage: Tensor = None    # (B,)          A_{i,t}


class LRPO:
    """The paper's method. One `step` is one rollout and the optimiser steps on it. `net` is trained
    in place. `reward(x, gt)` returns (total (B,), {name: (B,)})."""

    def __init__(self, net, diffusion: Diffusion, reward, generator: torch.Generator, settings):
        self.net, self.diffusion, self.reward, self.generator = net, diffusion, reward, generator
        self.settings, self.gt_weight, self.scores = settings, settings.gt_weight, {}
        self.schedule = diffusion.schedule(settings.ddim_steps)
        self.clip = TRUST / (3 * net.config.size ** 2) if settings.clip is None else settings.clip
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr, fused=True)

    def policy(self, x: Tensor, lq: Tensor, t: int, s: int):
        """mu (B, 3, H, W), sigma (), x0_hat (B, 3, H, W) of pi(x_s | x_t, LQ)."""
        return self.diffusion.ddim_step(self.net, x, lq, t, s, self.settings.eta)

    @torch.no_grad()
    def rollout(self, lq: Tensor) -> tuple[Tensor, list[Transition]]:
        """Restore lq (B, 3, H, W): the results (B, 3, H, W), unclamped, and a Transition for each
        step but the last, with action = mu + sigma z. The last step gives mu: it has sigma = 0."""
        x, steps = gaussian(lq, self.generator), []                     # x_T
        for t, s in self.schedule[:-1]:
            mu, sigma, x0_hat = self.policy(x, lq, t, s)
            action = mu + sigma * gaussian(x, self.generator)
            log_prob = gaussian_log_prob(action, mu, sigma)
            steps.append(Transition(t, s, x, action, log_prob, x0_hat))
            x = action
        restored, _, _ = self.policy(x, lq, *self.schedule[-1])         # sigma = 0
        return restored, steps

    def score(self, restored: Tensor, gt: Tensor):
        """The composite reward R (B,) and its terms by name, (B,) each."""
        return self.reward(restored, gt)

    def step_weights(self, steps: list[Transition]) -> Tensor:
        """The noise-level weight of each step, (n,); ones with strategy 3 off."""
        sigma = torch.stack([self.diffusion.sigma(step.t, step.s, self.settings.eta)
                             for step in steps])
        on = self.settings.noise_level_weights == "on"
        return noise_level_weights(sigma) if on else torch.ones_like(sigma)

    def assign_advantages(self, steps: list[Transition], rewards: Tensor, weights: Tensor):
        """A_{i,t} = clip(A_i w_t), from one reward for each trajectory: rewards (P, G)."""
        A = group_advantages(gather(rewards), self.settings.adv_std)    # of the groups of all ranks
        for step, w in zip(steps, weights):
            step.advantage = (own_rows(A).flatten() * w).clamp(-ADV_CLIP, ADV_CLIP)     # (B,)

    def gt_log_prob(self, step: Transition, gt: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
        """log pi(x_gt_s | x_t, LQ) = log N(x_gt_s; mu, sigma^2 I), averaged over D: (B,). x_gt_s,
        kept in step.x_gt, is gt (B, 3, H, W), noised by `q_sample` to level s."""
        if step.x_gt is None:       # noised once for all updates of a rollout
            level = torch.full((len(gt),), step.s, device=gt.device)
            step.x_gt = self.diffusion.q_sample(gt, level, gaussian(gt, self.generator))
        return gaussian_log_prob(step.x_gt, mu, sigma)

    def loss(self, step: Transition, lq: Tensor, gt: Tensor, mu: Tensor, sigma: Tensor, pg: Tensor):
        """The loss of one transition, a scalar, and its terms by name. lq, gt, mu (B, 3, H, W);
        sigma a scalar; pg (B,) is the result of `clipped_loss`."""
        likelihood = gt_likelihood_loss(self.gt_log_prob(step, gt, mu, sigma)).mean()
        last = self.schedule[:-1][-self.settings.gt_last:]              # [-0:] is all of them
        weight = self.gt_weight if (step.t, step.s) in last else 0.0
        return (self.settings.pg_weight * pg.mean() + weight * likelihood,
                {"pg_loss": pg.mean(), "gt_loss": likelihood})

    def step(self, batch) -> dict[str, float]:
        """One rollout and its updates. batch = (lq, gt), each (P, 3, H, W). Returns the metrics.
        Raises RuntimeError if the ratio was not 1 at the first update: then rollout and update do
        not compute the same policy."""
        stats = to_floats(self.improve(batch))
        off, slack = stats["first_off_max"], BF16_SLACK if self.net.bf16 else RATIO_SLACK
        if off > slack:
            raise RuntimeError(f"the ratio is off 1 by {off:.1e} before any update")
        return stats

    def improve(self, batch) -> dict[str, Tensor]:
        """The work of `step`. The metrics are scalar tensors, so that a GPU is not waited for."""
        G = self.settings.group
        lq, gt = (u.repeat_interleave(G, dim=0) for u in batch)         # (B, 3, H, W)
        restored, steps = self.rollout(lq)
        with torch.no_grad():
            R, terms = self.score(restored, gt)                         # (B,)
            self.scores = terms         # named by `optimiser_step` if one is not finite
            self.assign_advantages(steps, R.view(-1, G), self.step_weights(steps))
        n = self.settings.steps_per_update or len(steps)
        seen = [[self.update(steps[i:i + n], lq, gt) for i in range(0, len(steps), n)]
                for _ in range(self.settings.updates)]                  # a list for each pass
        first, last = seen[0][0]["ratio"], seen[-1]
        ratio = torch.cat([u.pop("ratio") for u in last])               # (n, B), the last pass
        std = R.view(-1, G).std(dim=1, correction=0)                    # (P,)
        return {"reward": R.mean(), **{k: v.mean() for k, v in terms.items()},
                "reward_std": std.mean(), "equal_groups": (std < MIN_STD).float().mean(),
                **{k: torch.stack([u[k] for u in last]).mean() for k in last[0]},
                "first_off_max": (first - 1).abs().max(),
                "ratio_mean": ratio.mean(), "ratio_max": ratio.max(),
                "clip_fraction": ((ratio - 1).abs() > self.clip).float().mean()}

    def update(self, steps: list[Transition], lq: Tensor, gt: Tensor) -> dict[str, Tensor]:
        """One optimiser step on the mean loss of `steps`. Returns the terms of the loss, scalars,
        and the ratio (n, B) before it."""
        self.optimizer.zero_grad()
        seen, ratios = [], []
        for step in steps:
            mu, sigma, _ = self.policy(step.x, lq, step.t, step.s)
            log_prob = gaussian_log_prob(step.action, mu, sigma)                # (B,)
            pg, ratio = clipped_loss(log_prob, step.log_prob, step.advantage, self.clip)
            loss, terms = self.loss(step, lq, gt, mu, sigma, pg)
            (loss / len(steps)).backward()
            ratios.append(ratio.detach())
            terms["approx_kl"] = (step.log_prob - log_prob).mean()      # KL(pi_old || pi) / D
            seen.append({k: v.detach() for k, v in terms.items()})
        metrics = {k: torch.stack([u[k] for u in seen]).mean() for k in seen[0]}
        grad_norm = optimiser_step(self.optimizer, self.scores | metrics, MAX_GRAD_NORM)
        return {**metrics, "grad_norm": grad_norm, "ratio": torch.stack(ratios)}
