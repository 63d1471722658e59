"""LRPO: online reinforcement learning on a diffusion restorer, regularised by the ground truth.

Paper    LRPO, Likelihood-Regularised Policy Optimisation (Wu et al. 2025, arXiv 2509.23339).
         It builds on DDPO (arXiv 2305.13301), PPO (1707.06347) and GRPO (2402.03300). Each DDIM
         step is a Gaussian policy: pi(x_{t-1} | x_t, LQ) = N(mu, sigma^2 I).
Steps    of the algorithm, in the order of `LRPO.step` and `LRPO.optimise`:
         1. Restore each LQ image G times.                                `LRPO.rollout`
         2. Score the results by the composite reward (strategy 1).       rewards.py
         3. Compare the G results of one image with each other.           `group_advantages`
         4. Weight the advantage of each step by its noise (strategy 3).  `noise_level_weights`
         5. Raise the likelihood of the better trajectories, clipped.     `clipped_loss`
         6. Raise the likelihood of the ground truth (strategy 2).        `gt_likelihood_loss`
Shapes   P LQ images, G restorations of each, B = P * G. Rewards, advantages and the likelihoods
         of actions are given for each of g x g patches of D values (paper: g = 1). Its t-1 is s.
Departs  by the values of settings; `--recipe paper` takes the published ones. Ours: a group shares
         all noise but that of its last noisy DDIM step, which alone is trained (--own_steps); each
         patch has its own advantage, at 64 px (--credit); the likelihood places x_gt on the path of
         x_t (--gt_target), with a weight by the PSNR (--gt_weight). See docs/paper_to_code.md.
"""
import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fidelity import Fidelity
from model import MAX_GRAD_NORM, Diffusion
from rewards import REWARDS_HELP
from support.cli import UserError, amount, at_least_two, one_of, policy_eta, setting, whole
from support.distributed import gather, gaussian, own_rows
from support.log import to_floats
from support.optimise import optimiser_step

ADV_EPS, ADV_CLIP = 1e-4, 5.0   # LRPO's code: beside the deviation, and of the weighted advantage
TRUST = 1.64                # LRPO's code: a clip range of 1e-4 at D = 4*64*64. TRUST / D is ours
GT_TEMPERATURE = 40.0       # LRPO's code: L_gt = 1 - exp(log pi / 40)
MIN_STD = 1e-6              # ours: below it the float32 rewards of a group count as equal
RATIO_SLACK, BF16_SLACK = 1e-5, 1e-3    # ours: another order of summation moves it by 2e-7, 2e-4


@dataclass
class PolicySettings:
    """Rollout and policy gradient, which darl.py shares: default, published value and meaning.
    Raises UserError for a setting that has no effect on a single own step."""
    batch_size: int = setting(32, None, "P, the images of a rollout, with a group each")
    lr: float = setting(3e-4, 1e-6, "learning rate of AdamW")
    ddim_steps: int = setting(5, 50, "K, sampling steps", type=at_least_two)
    eta: float = setting(1.0, 1.0, "DDIM noise of the rollouts, above 0", type=policy_eta)
    group: int = setting(8, 9, "G, restorations of one image", type=at_least_two)
    own_steps: int = setting(1, 0, "the last n noisy DDIM steps are each member's own, and are "
                             "trained; a group shares those before (0: none)", type=whole)
    credit: int = setting(0, 0, "side of a patch with its own advantage, px (0: image)", type=whole)
    updates: int = setting(2, 1, "passes over a rollout")
    minibatch: int = setting(0, 1, "images of a process in an optimiser step (0: all)", type=whole)
    steps_per_update: int = setting(0, 1, "DDIM steps in an optimiser step (0: all)", type=whole)
    clip: float = setting(None, 1e-4, "clip range of the ratio; left out: 1.64 / D, which is ours")
    adv_std: str = setting("group", "batch", "whose std divides", choices=["group", "batch"])
    noise_level_weights: str = setting("on", "on", "of LRPO, strategy 3", choices=["on", "off"])

    def __post_init__(self):
        for name, idle in (("noise_level_weights", "on"), ("steps_per_update", 0)):
            if self.own_steps == 1 and getattr(self, name) != idle:
                raise UserError(f"--{name} {getattr(self, name)}: needs --own_steps 0")


@dataclass
class LRPOSettings(PolicySettings):
    """The settings of mode lrpo."""
    steps: int = setting(80, None, "rollouts in all")
    every: int = setting(20, None, "rollouts between measurements, with checkpoints")
    rewards: str = setting("default", "paper", REWARDS_HELP)
    pg_weight: float = setting(1.0, 1.0, "weight of the policy gradient")
    gt_target: str = setting("posterior", "noised", "the ground truth in the likelihood: by the "
                             "policy's step, or noised anew", choices=["posterior", "noised"])
    gt_weight: str | float = setting("auto", 0.001, "weight of the likelihood; auto: by the PSNR "
                                     "since the start", type=one_of("auto", otherwise=amount))
    gt_last: int = setting(0, 5, "likelihood on the last n trained steps (0: on all)", type=whole)
    fidelity_margin: float = setting(0.2, 0.2, "PSNR in dB that --gt_weight auto may give up")


def gaussian_log_prob(x: Tensor, mu: Tensor, sigma: Tensor, g: int = 1) -> Tensor:
    """log N(x; mu, sigma^2 I) = -(x - mu)^2 / (2 sigma^2) - log sigma - log(2 pi) / 2, in float32
    and averaged over the D values of each patch: x and mu (B, 3, H, W), sigma > 0 a scalar -> (B,
    g, g). DDPO's and LRPO's code take the mean as well: with the sum the ratio overflows."""
    x, mu, sigma = x.float(), mu.float(), sigma.float()
    log_prob = -((x - mu) / sigma) ** 2 / 2 - torch.log(sigma) - math.log(2 * math.pi) / 2
    return F.adaptive_avg_pool2d(log_prob.mean(dim=1), g)


def gaussian_kl(mu: Tensor, ref: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma^2 I) || N(ref, sigma^2 I)) = |mu - ref|^2 / (2 sigma^2), in nats, averaged
    over the dimensions instead of summed: mu and ref (B, 3, H, W) -> (B,)."""
    return (((mu - ref) / sigma) ** 2 / 2).mean(dim=(1, 2, 3))


def group_advantages(rewards: Tensor, std: str = "group") -> Tensor:
    """A_i = (R_i - mean of its group) / (std + 1e-4), patch by patch: (P, G, g, g), the same shape.
    std "group" takes the population standard deviation of the group (the paper's figure), "batch"
    that of all P * G rewards (the published code), of all patches. A group of std below MIN_STD
    gets exactly 0."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    group_std = centred.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()       # (P, 1, 1, 1)
    batch_std = (rewards - rewards.mean(dim=(0, 1), keepdim=True)).square().mean().sqrt()
    scale = group_std if std == "group" else batch_std
    return torch.where(group_std < MIN_STD, 0.0, centred / (scale + ADV_EPS))


def noise_level_weights(sigma: Tensor) -> Tensor:
    """w_t = sigma_t / mean sigma (strategy 3): (n,) -> (n,). Early, noisy steps decide more."""
    return sigma / sigma.mean()


def clipped_loss(log_prob: Tensor, old: Tensor, advantage: Tensor, clip: float):
    """PPO's objective with r = pi / pi_old, -min(A r, A clip(r, 1 - clip, 1 + clip)); log_prob,
    old, advantage (B, g, g) -> the loss and the ratio r, not clipped, (B, g, g) each."""
    ratio = torch.exp(log_prob - old)
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    return loss, ratio


def gt_likelihood_loss(log_prob: Tensor) -> Tensor:
    """Strategy 2: L_gt = 1 - exp(log pi(x_gt_{t-1} | x_t, LQ) / 40), exponent at most 0: log pi
    (B,) -> (B,) in [0, 1]."""
    return 1 - torch.exp((log_prob / GT_TEMPERATURE).clamp(max=0))


def repeat_to(u: Tensor, n: int) -> Tensor:
    """Repeat each row of u (N, ...) equally often, so that there are n: (n, ...)."""
    return u.repeat_interleave(n // len(u), dim=0)


@dataclass
class Transition:
    """One trained DDIM step t -> s of a rollout. N is P while a group shares its state, else B."""
    t: int
    s: int
    x: Tensor                   # (N, 3, H, W)  x_t, the state
    action: Tensor              # (B, 3, H, W)  x_{t-1}
    log_prob: Tensor            # (B, g, g)     log pi_old of the action
    x0_hat: Tensor              # (N, 3, H, W)  predicted from x_t; only darl.py reads it
    x_gt: Tensor = None         # (B, 3, H, W)  the ground truth, noised to level s
    advantage: Tensor = None    # (B, g, g)     A_{i,t}
    images: slice = field(default_factory=lambda: slice(None))      # of those of the rollout

    def of(self, images: slice, P: int):
        """The transition of some of its P images, with their groups."""
        return replace(self, images=images, **{
            name: u.unflatten(0, (P, -1))[images].flatten(0, 1)
            for name, u in vars(self).items() if isinstance(u, Tensor)})


class LRPO:
    """The paper's method. `net` is trained in place. `reward(x, gt, g)` returns R (B, g, g) and its
    terms {name: (B,)}. Raises UserError if the patches of --credit do not fill the image."""

    def __init__(self, net, diffusion: Diffusion, reward, generator: torch.Generator, settings):
        self.net, self.diffusion, self.reward, self.generator = net, diffusion, reward, generator
        self.settings, self.schedule = settings, diffusion.schedule(settings.ddim_steps)
        noisy = settings.ddim_steps - 1                 # DDIM steps: the last one has sigma = 0
        self.shared = max(0, noisy - (settings.own_steps or noisy))
        patch = settings.credit or net.config.size
        if net.config.size % patch:
            raise UserError(f"--credit {patch}: must divide the images' {net.config.size} px")
        self.g = net.config.size // patch
        self.clip = TRUST / (3 * patch ** 2) if settings.clip is None else settings.clip
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr, fused=True)
        self.fidelity = getattr(settings, "gt_weight", None) == "auto" and Fidelity(
            net, diffusion, len(self.schedule), settings.fidelity_margin, generator)

    def policy(self, x: Tensor, lq: Tensor, t: int, s: int):
        """mu (N, 3, H, W), sigma (), x0_hat (N, 3, H, W) of pi(x_s | x_t, LQ): N / P states x for
        each image of lq (P, 3, H, W)."""
        return self.diffusion.ddim_step(self.net, x, repeat_to(lq, len(x)), t, s, self.settings.eta)

    @torch.no_grad()
    def rollout(self, lq: Tensor) -> tuple[Tensor, list[Transition]]:
        """Restore lq (P, 3, H, W) G times: the results (B, 3, H, W), unclamped, and a Transition
        for each own DDIM step, with action = mu + sigma z. The last step gives mu (sigma = 0)."""
        B, steps = len(lq) * self.settings.group, []
        x = gaussian(lq if self.shared else repeat_to(lq, B), self.generator)       # x_T
        for k, (t, s) in enumerate(self.schedule[:-1]):
            mu, sigma, x0_hat = self.policy(x, lq, t, s)                # (N, 3, H, W)
            if k < self.shared:
                x = mu + sigma * gaussian(mu, self.generator)           # (P, 3, H, W)
                continue
            mu = repeat_to(mu, B)
            action = mu + sigma * gaussian(mu, self.generator)          # (B, 3, H, W)
            log_prob = gaussian_log_prob(action, mu, sigma, self.g)     # (B, g, g)
            steps.append(Transition(t, s, x, action, log_prob, x0_hat))
            x = action
        restored, _, _ = self.policy(x, lq, *self.schedule[-1])         # sigma = 0
        return restored, steps

    def assign_advantages(self, steps: list[Transition], rewards: Tensor):
        """A_{i,t} = clip(A_i w_t), from rewards of each step or of all: (n or 1, B, g, g)."""
        sigma = torch.stack([self.diffusion.sigma(u.t, u.s, self.settings.eta) for u in steps])
        weights = (noise_level_weights(sigma) if self.settings.noise_level_weights == "on" else
                   torch.ones_like(sigma))                              # (n,)
        for step, w, R in zip(steps, weights, rewards.expand(len(steps), -1, -1, -1)):
            groups = gather(R.unflatten(0, (-1, self.settings.group)))  # (all P, G, g, g)
            A = own_rows(group_advantages(groups, self.settings.adv_std)).flatten(0, 1)
            step.advantage = (A * w).clamp(-ADV_CLIP, ADV_CLIP)         # (B, g, g)

    def noised_log_prob(self, step: Transition, gt: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
        """The paper's target: log pi(x_gt_s | x_t, LQ) = log N(x_gt_s; mu, sigma^2 I), (B,). x_gt_s
        is gt (B, 3, H, W), noised to level s once for all optimiser steps on a rollout."""
        if step.x_gt is None:
            level = torch.full((len(gt),), step.s, device=gt.device)
            step.x_gt = self.diffusion.q_sample(gt, level, gaussian(gt, self.generator))
        return gaussian_log_prob(step.x_gt, mu, sigma).flatten()

    def posterior_log_prob(self, step: Transition, gt: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
        """Our target: E_q[log pi], q = q(x_s | x_t, x_gt) the step of a policy that knows gt (B, 3,
        H, W). Less a constant, the negative entropy of q, it is -KL(q || pi), a weighted
        |x0_hat - x_gt|^2, which is returned: (B,), at most 0."""
        x = repeat_to(step.x, len(gt))
        mu_gt = self.diffusion.posterior_mean(x, gt, step.t, step.s, self.settings.eta)
        return -gaussian_kl(mu_gt, mu, sigma)

    def loss(self, step: Transition, gt: Tensor, mu: Tensor, sigma: Tensor, pg: Tensor):
        """The loss of one transition, a scalar, and its terms by name. gt, mu (B, 3, H, W); sigma a
        scalar; pg (B, g, g) of `clipped_loss`."""
        target = {"noised": self.noised_log_prob, "posterior": self.posterior_log_prob}
        log_prob = target[self.settings.gt_target]
        likelihood = gt_likelihood_loss(log_prob(step, gt, mu, sigma)).mean()
        weight = self.fidelity.weight if self.fidelity else self.settings.gt_weight
        own = self.schedule[self.shared:-1]
        weight *= (step.t, step.s) in own[-(self.settings.gt_last or len(own)):]
        return (self.settings.pg_weight * pg.mean() + weight * likelihood,
                {"pg_loss": pg.mean(), "gt_loss": likelihood})

    def step(self, batch) -> dict[str, float]:
        """One rollout and the optimiser steps on it: (lq, gt), (P, 3, H, W) each -> the metrics."""
        lq, gt = batch
        restored, steps = self.rollout(lq)                                          # 1
        with torch.no_grad():
            R, terms = self.reward(restored, repeat_to(gt, len(restored)), self.g)  # 2: (B, g, g)
            self.assign_advantages(steps, R[None])                                  # 3 and 4
        stats = self.optimise(steps, lq, R, terms, lambda step, mu, sigma, pg: (    # 5 and 6
            self.loss(step, repeat_to(gt[step.images], len(mu)), mu, sigma, pg)))
        if not self.fidelity:
            return self.numbers(stats)
        stats = self.numbers(stats | {"fidelity_gap": self.fidelity.gap(self.net, lq, gt)})
        return stats | {"gt_weight": self.fidelity.update(stats["fidelity_gap"])}

    def optimise(self, steps: list[Transition], lq: Tensor, R: Tensor, terms: dict, loss):
        """The optimiser steps on a rollout: passes, in each mini-batches of images, in each DDIM
        steps, `steps_per_update` at a time. lq (P, 3, H, W), R (B, g, g), `terms` (B,) each;
        `loss(step, mu, sigma, pg)` returns a scalar and its terms by name. Returns the metrics (of
        the loss: in the last pass) as scalar tensors."""
        P, n, seen = len(lq), self.settings.steps_per_update or len(steps), []
        size = self.settings.minibatch or P
        batches = [[step.of(slice(i, i + size), P) for step in steps] for i in range(0, P, size)]
        for _ in range(self.settings.updates):
            for batch in batches:
                for i in range(0, len(batch), n):
                    seen.append(self.update(batch[i:i + n], lq, loss))
        first, last = seen[0]["ratio"], seen[-(len(seen) // self.settings.updates):]
        ratio = torch.cat([u.pop("ratio").flatten() for u in last])     # all of the last pass
        std = R.mean(dim=(1, 2)).view(-1, self.settings.group).std(dim=1, correction=0)     # (P,)
        return {"reward": R.mean(), **{k: v.mean() for k, v in terms.items()},
                "reward_std": std.mean(), "equal_groups": (std < MIN_STD).float().mean(),
                **{k: torch.cat([u[k] for u in last]).mean() for k in last[0]},
                "first_off_max": (first - 1).abs().max(),
                "ratio_mean": ratio.mean(), "ratio_max": ratio.max(),
                "clip_fraction": ((ratio - 1).abs() > self.clip).float().mean()}

    def update(self, steps: list[Transition], lq: Tensor, loss) -> dict[str, Tensor]:
        """One optimiser step on the mean loss of `steps`. Returns the terms of the loss, (n,), the
        norm (1,) and the ratio (n, B, g, g) before it."""
        self.optimizer.zero_grad()
        seen = []
        for step in steps:
            mu, sigma, _ = self.policy(step.x, lq[step.images], step.t, step.s)
            mu = repeat_to(mu, len(step.action))                                # (B, 3, H, W)
            log_prob = gaussian_log_prob(step.action, mu, sigma, self.g)        # (B, g, g)
            pg, ratio = clipped_loss(log_prob, step.log_prob, step.advantage, self.clip)
            value, parts = loss(step, mu, sigma, pg)
            (value / len(steps)).backward()
            parts |= {"approx_kl": (step.log_prob - log_prob).mean(), "ratio": ratio}   # KL / 3HW
            seen.append({k: v.detach() for k, v in parts.items()})
        metrics = {k: torch.stack([u[k] for u in seen]) for k in seen[0]}
        norm = optimiser_step(self.optimizer, MAX_GRAD_NORM)
        return metrics | {"grad_norm": norm[None]}

    def numbers(self, stats: dict[str, Tensor]) -> dict[str, float]:
        """The metrics as numbers. Raises RuntimeError if the first ratio is not 1, as it must."""
        stats = to_floats(stats)
        if (off := stats["first_off_max"]) > (BF16_SLACK if self.net.bf16 else RATIO_SLACK):
            raise RuntimeError(f"the ratio is off 1 by {off:.1e} before any update")
        return stats

    def state_dict(self) -> dict:
        """What a resumed run needs beside network and optimiser."""
        return self.fidelity.state_dict() if self.fidelity else {}

    def load_state_dict(self, state: dict):
        self.fidelity.load_state_dict(state)

