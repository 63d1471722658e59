"""LRPO: online reinforcement learning on a diffusion restorer, kept honest by the ground truth.

Paper    "LRPO", Likelihood-Regularised Policy Optimisation (Wu et al. 2025, arXiv 2509.23339).
Idea     Each DDIM step is a Gaussian policy pi(x_{t-1} | x_t, LQ). Restore each LQ image G times,
         score the G results, and raise the likelihood of the steps that led to the better ones:
           1. composite reward            rewards.py; off: --rewards with a single term
           2. ground-truth likelihood     `gt_likelihood_loss`; off: --gt_weight 0
           3. noise-level advantages      `noise_level_weights`; off: --noise_level_weights off
Departs  (the published code does the first of each pair)
         - The ground truth is noised cumulatively, q_sample of q_sample: here once, from x_gt.
         - Groups are keyed by caption and come out uneven: here by image, one LQ tensor, exactly G.
         - An optimiser step at every timestep: here the loss is a mean over a rollout's trained
           steps (with `branch`, one), and `updates` optimiser steps are taken on it. With one, the
           ratio is always 1 and the clip never acts: that is REINFORCE.
         - The exponent of the likelihood term can be positive: here it is at most 0.
         - Advantages divided by the spread of the whole batch: here of the group (the figure).
         - Likelihood weight .001 on the last 5 of 50 steps, where it does next to nothing: here 2.7
           (32 px; less for larger images) wherever a step is trained, with the `posterior` target.
         - Every noise of every trajectory its own: here a group parts at one step (`branch`; 0 is
           the paper's form, and what --preset base keeps).
         The last DDIM step has sigma = 0, so no density: it is left out, see `trained_steps`.
Found    (docs/results.md; drawn faces, 32 px, K = 10) With full trajectories the policy gradient of
         512 samples cannot be told from noise: what one step's noise did to the reward is lost
         among the others. Over fifty rollouts it still lifts `face` by .12; with a branch, by .21
         in the same time.
         Likelihood and policy gradient pull against each other: the one raises PSNR and lowers
         `face`, the other the other way round. gt_weight sets the balance, which tips towards the
         likelihood as training goes on: 80 rollouts at 1e-4 lift every part, more do not. A higher
         rate wears the restorer out. `marginal` adds grain and loses PSNR, hence `posterior`; the
         published weight of .001 cannot be told from none.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model import MAX_GRAD_NORM, Diffusion, gaussian

ADV_EPS = 1e-4              # LRPO's code: keeps a group with little spread from exploding
ADV_CLIP = 5.0              # LRPO's code
TRUST = 1.64                # clip * D in LRPO's code (1e-4 at D = 4*64*64): see `default_clip`
GT_TEMPERATURE = 40.0       # LRPO's code: L_gt = 1 - exp(log pi / 40)
NO_SPREAD = 1e-6            # ours: float32 rewards this close are one reward
RATIO_SLACK = 1e-5          # ours: 1 on the CPU to the last bit; a GPU may pick another kernel


def default_clip(D: int) -> float:
    """The ratio is a geometric mean over D pixels, so the same trust region is 1.64 / D (ours)."""
    return TRUST / D


def gaussian_log_prob(x: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """log N(x; mu, sigma^2 I), averaged over the D dimensions, in float32: (B,).

    The mean, not the sum: a sum over thousands of pixels overflows the ratio (DDPO's code, LRPO's).
    """
    x, mu, sigma = x.float(), mu.float(), sigma.float()
    log_prob = -((x - mu) / sigma) ** 2 / 2 - torch.log(sigma) - math.log(2 * math.pi) / 2
    return log_prob.mean(dim=(1, 2, 3))


def gaussian_kl(mu: Tensor, ref: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(ref, sigma^2)), averaged over the D dimensions: (B,)."""
    return (((mu - ref) / sigma) ** 2 / 2).mean(dim=(1, 2, 3))


def group_advantages(rewards: Tensor, std: str = "group") -> Tensor:
    """A_i = (R_i - mean of its group) / (std + 1e-4): (P, G) -> (P, G).

    std "group" is the paper's figure (population std); "batch", over all P * G, the published code.
    A group without spread says nothing about what is better: 0.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    spread = rewards.std(dim=1, keepdim=True, correction=0)             # (P, 1)
    scale = spread if std == "group" else rewards.std(correction=0)
    return torch.where(spread < NO_SPREAD, 0.0, centred / (scale + ADV_EPS))


def noise_level_weights(sigma: Tensor) -> Tensor:
    """w_t = sigma_t / mean of sigma (LRPO, strategy 3): (n,) -> (n,), mean 1.

    The paper's reason: noisy early steps decide the layout and leave the most room. (Here the LQ
    image decides the layout: the late steps move the reward most, see docs/results.md.)
    """
    return sigma / sigma.mean()


def clipped_loss(log_prob: Tensor, old: Tensor, advantage: Tensor, clip: float):
    """PPO's clipped objective, r = pi / pi_old: returns the loss (B,) and the ratio (B,)."""
    ratio = torch.exp(log_prob - old)
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    return loss, ratio


def gt_likelihood_loss(log_prob: Tensor) -> Tensor:
    """L_gt = 1 - exp(log pi(x_gt_{t-1} | x_t, LQ) / 40), exponent at most 0: (B,) in [0, 1]."""
    return 1 - torch.exp((log_prob / GT_TEMPERATURE).clamp(max=0))


@dataclass
class Step:
    """Step k of a rollout, to be trained. B = P * G, a group's members side by side; R = B, or P
    where the members of a group have had one state so far."""
    k: int                  # which of the trained steps
    x: Tensor               # (R, 3, H, W) x_t
    lq: Tensor              # (R, 3, H, W)
    gt: Tensor              # (R, 3, H, W)
    x0_hat: Tensor          # (R, 3, H, W) what the clean image looked like from x_t
    action: Tensor          # (B, 3, H, W) x_{t-1}
    log_prob: Tensor        # (B,) under the policy that acted
    advantage: Tensor = None    # (B,) once the restorations are scored


class LRPO:
    """One `step` = one rollout and `updates` optimiser steps on it.

    gt_weight scales strategy 2, over the last `gt_last` trained steps (0: all; with a branch, only
    in the rollouts whose step is one of them). Its target:
    gt_target "marginal"  x_gt noised to level t-1 by one q_sample (the paper);
    gt_target "posterior" q(x_{t-1} | x_t, x_gt), the step the policy would take if it knew x_gt
        (ours). The draw is averaged exactly: but for the entropy of q, E log pi = -KL(q || pi),
        without noise of its own: a weighted |x0_hat - x_gt|^2 on the states the policy visits.
    pg_weight scales the policy gradient.
    branch = n > 0: one of the last n trained steps is drawn for each rollout. There the members of
        a group part; all other noise, x_T's too, they share. Each is still a sample of the policy,
        and nothing else moves the reward within the group. Only that step is trained, by both
        terms. Before the division by the spread the gradient for that step is unbiased (but for
        the factor 1 - 1/G of any group mean); the division gives every step the same say, however
        little it moves the reward. One state x_t
        serves the group: at K = 10 a step on 32 groups costs half the network calls of a full one
        on 4, a backward pass counted as two. (Ours; Flow-GRPO-Fast and MixGRPO, as we know them,
        turn the other noise off.)
    branch = 0: full trajectories, every noise its own, every step trained (the paper).
    ValueError for eta <= 0, or a branch that has no such steps.
    """

    def __init__(self, net, diffusion: Diffusion, reward, generator: torch.Generator, *, lr=1e-4,
                 K=10, eta=1.0, group=8, updates=2, clip=None, adv_std="group",
                 noise_weights=True, pg_weight=1.0, gt_weight=2.7, gt_target="posterior",
                 gt_last=0, branch=4):
        if eta <= 0:
            raise ValueError("eta must be above 0: without noise a step has no likelihood")
        if not 0 <= branch < K:
            raise ValueError(f"branch must be 0 to K - 1 = {K - 1}, not {branch}")
        self.net, self.diffusion, self.reward, self.generator = net, diffusion, reward, generator
        self.eta, self.group, self.updates, self.clip = eta, group, updates, clip
        self.adv_std, self.noise_weights, self.pg_weight = adv_std, noise_weights, pg_weight
        self.gt_weight, self.gt_target, self.gt_last = gt_weight, gt_target, gt_last
        self.schedule, self.branch = diffusion.schedule(K), branch
        self.trained_steps = self.schedule[:-1]     # sigma = 0 at the last: no density there
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=lr, fused=True)

    def policy(self, x, lq, t, s, x0=None):
        return self.diffusion.ddim_step(self.net, x, lq, t, s, self.eta, x0)

    @torch.no_grad()
    def rollout(self, lq: Tensor, gt: Tensor) -> tuple[Tensor, list[Step]]:
        """Restore each of lq (P, 3, H, W) `group` times: (B, 3, H, W) and the steps to train."""
        P, steps, branch = len(lq), [], None
        if self.branch:
            back = torch.randint(self.branch, (), generator=self.generator).item()
            branch = len(self.trained_steps) - 1 - back
        else:
            lq, gt = self.each(lq), self.each(gt)                               # (B, 3, H, W)
        x = gaussian(lq, self.generator)
        for k, (t, s) in enumerate(self.schedule):
            mu, sigma, x0_hat = self.policy(x, lq, t, s)
            if s < 0:
                return mu, steps
            before = x, lq                                                      # (R, 3, H, W)
            if k == branch:
                mu, sigma, lq = self.each(mu), self.each(sigma), self.each(lq)
            if branch in (None, k):             # to each member of a group a noise of its own
                x = mu + sigma * gaussian(mu, self.generator)                   # (B, 3, H, W)
                log_prob = gaussian_log_prob(x, mu, sigma)
                steps.append(Step(k, *before, gt, x0_hat, x, log_prob))
            else:                               # one noise for the group
                z = gaussian(mu[:P], self.generator)                            # (P, 3, H, W)
                x = mu + sigma * z.repeat_interleave(len(mu) // P, dim=0)

    def each(self, u: Tensor) -> Tensor:
        """One copy for each member of a group: (P, ...) -> (B, ...)."""
        return u.repeat_interleave(self.group, dim=0)

    def weights(self, like: Tensor) -> Tensor:
        """The noise-level weight of each trained step, (n,), mean 1 over those that can be drawn;
        ones with strategy 3 off."""
        sigma = torch.stack([self.policy(like, like, t, s, x0=like)[1].flatten()[0]
                             for t, s in self.trained_steps])
        weights = noise_level_weights(sigma)
        return weights / weights[-self.branch:].mean() if self.noise_weights else torch.ones_like(
            sigma)

    def gt_log_prob(self, step: Step, mu: Tensor, sigma: Tensor):
        """How likely the policy's step N(mu, sigma^2) makes the noised ground truth: (R,)."""
        t, s = self.trained_steps[step.k]
        z = gaussian(mu, self.generator)    # drawn in either case: the target changes nothing else
        if self.gt_target == "marginal":
            level = torch.full((len(mu),), s, device=mu.device)
            return gaussian_log_prob(self.diffusion.q_sample(step.gt, level, z), mu, sigma)
        mu_gt, _, _ = self.policy(step.x, step.lq, t, s, x0=step.gt)
        return -gaussian_kl(mu_gt, mu, sigma)

    @torch.no_grad()
    def score(self, restored: Tensor, gt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The reward of each restoration (B,) and its parts; gt (P, 3, H, W)."""
        return self.reward(restored, self.each(gt))

    def assign_advantages(self, steps: list[Step], grouped: Tensor, weights: Tensor):
        """Every step of a trajectory is credited with its reward, `grouped` (P, G)."""
        advantage = group_advantages(grouped, self.adv_std).flatten()           # (B,)
        for step in steps:
            step.advantage = (advantage * weights[step.k]).clamp(-ADV_CLIP, ADV_CLIP)

    def loss(self, step: Step, mu: Tensor, sigma: Tensor, pg: Tensor) -> tuple[Tensor, dict]:
        """What one trained step adds to the loss, and its terms; mu, sigma (R, ...), pg (B,)."""
        first = len(self.trained_steps) - self.gt_last if self.gt_last else 0
        gt = gt_likelihood_loss(self.gt_log_prob(step, mu, sigma)).mean() * (step.k >= first)
        pg = pg.mean()
        return self.pg_weight * pg + self.gt_weight * gt, {"pg_loss": pg, "gt_loss": gt}

    def step(self, batch) -> dict[str, float]:
        """batch = (lq, gt), each (P, 3, H, W). Returns what happened, as floats."""
        restored, steps = self.rollout(*batch)
        rewards, parts = self.score(restored, batch[1])                         # (B,)
        grouped = rewards.view(-1, self.group)                                  # (P, G)
        self.assign_advantages(steps, grouped, self.weights(batch[0][:1]))
        for u in range(self.updates):       # the figures of the last update are the ones that tell
            stats = self.update(steps, first=u == 0)
        if self.branch:
            stats["branch_step"] = steps[0].k       # the other figures depend on it
        spread = grouped.std(dim=1, correction=0)                               # (P,)
        return {"reward": rewards.mean().item(), **{k: v.mean().item() for k, v in parts.items()},
                "reward_std": spread.mean().item(), **stats,
                "no_spread": (spread < NO_SPREAD).float().mean().item()}

    def update(self, steps: list[Step], first: bool) -> dict:
        """One optimiser step, on the mean over the steps of a rollout."""
        D = steps[0].x[0].numel()
        clip = default_clip(D) if self.clip is None else self.clip
        ratios, terms = [], []
        self.optimizer.zero_grad()
        for step in steps:
            mu, sigma, _ = self.policy(step.x, step.lq, *self.trained_steps[step.k])
            copies = len(step.action) // len(mu)                                # G or 1
            log_prob = gaussian_log_prob(                                       # (B,)
                step.action, *(u.repeat_interleave(copies, dim=0) for u in (mu, sigma)))
            pg, ratio = clipped_loss(log_prob, step.log_prob, step.advantage, clip)
            loss, parts = self.loss(step, mu, sigma, pg)
            (loss / len(steps)).backward()
            ratios.append(ratio.detach())
            terms.append(parts)
        ratio = torch.stack(ratios)                                             # (steps, B)
        if first and not (ratio - 1).abs().max() <= RATIO_SLACK:      # `not <=` catches NaN too
            raise RuntimeError(f"the ratio is off 1 by {(ratio - 1).abs().max():.1e} before any "
                               "update: rollout and update do not see the same policy")
        grad_norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        return {**{name: sum(part[name].item() for part in terms) / len(terms)
                   for name in terms[0]}, "grad_norm": grad_norm.item(),
                "ratio_mean": ratio.mean().item(), "ratio_max": ratio.max().item(),
                "clip_fraction": ((ratio - 1).abs() > clip).float().mean().item(),
                "approx_kl": -ratio.log().mean().item()}     # E_old log(old / new), a dimension
