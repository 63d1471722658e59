"""The restorer: a compact UNet and the diffusion process around it.

Papers   DDPM (Ho et al. 2020): the linear noise schedule, q(x_t | x_0).
         DDIM (Song et al. 2020), eq. 12 and 16: the sampler; eta = 0 is an ODE, eta = 1 is DDPM.
         v-prediction (Salimans & Ho 2022): v = sqrt(abar) eps - sqrt(1 - abar) x_0.
         Trailing time steps (Lin et al. 2024): sampling starts at t = T-1, at almost pure noise.
         Preconditioning (EDM, Karras et al. 2022), here around the LQ image: `Diffusion.prior_v`.
Departs  Unlike DiffBIR, the base model of LRPO, it has no ControlNet, no VAE and no text: the
         low-quality face (LQ) is concatenated to x_t. It has no dropout, because a policy must give
         the same likelihood in rollout and update.

Contract An image is float32 (B, 3, H, W), RGB, in [-1, 1]. The network takes t as an int64 tensor
         (B,), 0 .. T-1. A sampling step goes from an int t to an int s < t, and s = -1 is the clean
         image (abar = 1). Only `Diffusion` sees v; everything else sees mu, sigma and x0_hat.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.checkpoint import fits, load_run
from support.cli import UserError
from support.distributed import alone, gaussian, uniform_integers

MAX_GRAD_NORM = 1.0     # LRPO's code; for sft, lrpo, refl and darl, not for reward models
EVAL_ETA = 0.8          # LRPO's code: eta at inference (it trains with 1.0)
BETAS = 1e-4, 0.02      # DDPM, section 4: the first and the last beta
BATCH = 100             # ours: how many images are restored or scored at a time


@dataclass
class Config:
    """Everything needed to build the network again. A checkpoint holds it as a plain dict.

    Raises UserError if the levels cannot halve the size, or channels is no multiple of 4."""
    size: int = 32                  # side of the square image, in pixels
    channels: int = 32              # width of the first level
    mults: tuple = (1, 2, 4)        # width of each level, as a multiple; the next has half the side
    blocks: int = 1                 # residual blocks in each level
    attention: int = 1              # how many of the lowest levels have self-attention
    patch: int = 2                  # pixel-unshuffle stem: 2 quarters the cost, 1 is a plain UNet
    prior: float = 0.15             # see Diffusion.prior_v; 0 turns it off
    timesteps: int = 1000           # T (DDPM)

    def __post_init__(self):
        self.mults = tuple(self.mults)
        unit = self.patch * 2 ** (len(self.mults) - 1)
        if self.channels < 4 or self.channels % 4:
            raise UserError(f"--channels must be a multiple of 4, not {self.channels}")
        if self.size < unit or self.size % unit:
            raise UserError(f"--size {self.size}: must be a multiple of {unit} for this network")


# ---------------------------------------------------------------------------------------------
# The network

def norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with at most 8 groups of at least 4 channels (ours)."""
    return nn.GroupNorm(math.gcd(8, channels // 4), channels)


def zero(layer: nn.Module):
    """Let a layer start with the output 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of t at geometrically spaced frequencies (DDPM): (B,) -> (B, dim)."""
    freq = 10_000 ** (-torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t.float()[:, None] * freq                                   # (B, dim/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResBlock(nn.Module):
    """norm, SiLU, conv, twice. The time embedding scales and shifts the second norm."""

    def __init__(self, cin: int, cout: int, cemb: int):
        super().__init__()
        self.norm1, self.conv1 = norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.emb = nn.Linear(cemb, 2 * cout)
        self.norm2, self.conv2 = norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        zero(self.conv2)        # each block starts as its skip connection

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, cin, h, w), emb (B, cemb) -> (B, cout, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))                           # (B, cout, h, w)
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)  # (B, cout, 1, 1) each
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the pixels of a level, 32 channels a head, added to its input."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = math.gcd(max(1, channels // 32), channels)
        self.norm, self.qkv = norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(3, 4).unbind(1)                         # (B, heads, HW, C/heads)
        y = F.scaled_dot_product_attention(q, k, v)                     # (B, heads, HW, C/heads)
        return x + self.out(y.transpose(2, 3).reshape(B, C, H, W))


class UNet(nn.Module):
    """The network. Its output plus `Diffusion.prior_v` is v.

    Whatever replaces it must be called as net(x_t, lq, t) like `forward`, and have two attributes:
    `config` (a Config), from which a checkpoint builds it again, and `bf16` (a bool, may be set),
    which makes it compute in bfloat16: fast on GPUs, and on CPUs with AMX or AVX512-BF16."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.bf16 = config, False
        widths = [config.channels * m for m in config.mults]
        cemb, depth, p2 = 4 * config.channels, len(widths), config.patch ** 2
        self.time = nn.Sequential(nn.Linear(config.channels, cemb), nn.SiLU(),
                                  nn.Linear(cemb, cemb), nn.SiLU())
        self.stem = nn.Conv2d(2 * 3 * p2, widths[0], 3, padding=1)
        attend = lambda i, c: Attention(c) if i >= depth - config.attention else nn.Identity()

        self.down, self.up, skips, c = nn.ModuleList(), nn.ModuleList(), [widths[0]], widths[0]
        for level, width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(nn.ModuleList([ResBlock(c, width, cemb), attend(level, width)]))
                c = width
                skips.append(c)
            if level < depth - 1:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.middle = nn.ModuleList([ResBlock(c, c, cemb), Attention(c), ResBlock(c, c, cemb)])
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):      # a skip of each block, one of the level's input
                self.up.append(nn.ModuleList([ResBlock(c + skips.pop(), width, cemb),
                                              attend(level, width)]))
                c = width
            if level > 0:
                self.up.append(nn.Conv2d(c, c, 3, padding=1))           # after doubling the side
        self.head = nn.Sequential(norm(c), nn.SiLU(), nn.Conv2d(c, 3 * p2, 3, padding=1))
        zero(self.head[-1])
        self.to(memory_format=torch.channels_last)                      # the quick layout for convs

    def forward(self, x: Tensor, lq: Tensor, t: Tensor) -> Tensor:
        """x = x_t and lq (B, 3, H, W), t (B,) -> (B, 3, H, W) in the dtype of x."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            emb = self.time(time_embedding(t, self.config.channels).to(x.dtype))        # (B, 4C)
            h = F.pixel_unshuffle(torch.cat([x, lq], dim=1), self.config.patch)
            h = h.contiguous(memory_format=torch.channels_last)         # (B, 6p², H/p, W/p)
            h = self.stem(h)                                            # (B, C, H/p, W/p)
            skips = [h]
            for layer in self.down:
                if isinstance(layer, nn.Conv2d):
                    h = layer(h)                                        # half the side
                else:
                    h = layer[1](layer[0](h, emb))
                skips.append(h)
            h = self.middle[2](self.middle[1](self.middle[0](h, emb)), emb)
            for layer in self.up:
                if isinstance(layer, nn.Conv2d):
                    h = layer(F.interpolate(h, scale_factor=2.0, mode="nearest"))
                else:
                    h = layer[1](layer[0](torch.cat([h, skips.pop()], dim=1), emb))
            return F.pixel_shuffle(self.head(h), self.config.patch).to(x.dtype)     # (B, 3, H, W)


# ---------------------------------------------------------------------------------------------
# The process

class Diffusion:
    """The noise schedule and what follows from it. `net(x_t, lq, t)` is a UNet."""

    def __init__(self, config: Config, device="cpu"):
        beta = torch.linspace(*BETAS, config.timesteps, dtype=torch.float64)
        abar = torch.cumprod(1 - beta, dim=0).float()                   # (T,)
        # The second is for the numbers of a sampling step, each a kernel of its own on a GPU.
        self.abar, self.abar_cpu = abar.to(device), abar.double()
        self.T, self.prior = config.timesteps, config.prior

    def abar_at(self, t: Tensor, like: Tensor) -> Tensor:
        """abar_t for t (B,), as (B, 1, 1, 1) in the dtype of `like`."""
        return self.abar[t].to(like.dtype).view(-1, 1, 1, 1)

    def q_sample(self, x0: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) z, for noise z ~ N(0, I) (DDPM eq. 4): x0 and
        z (B, 3, H, W), t (B,) -> (B, 3, H, W)."""
        a = self.abar_at(t, x0)
        return a.sqrt() * x0 + (1 - a).sqrt() * z

    def prior_v(self, x: Tensor, lq: Tensor, t: Tensor) -> Tensor:
        """v of the posterior mean E[x_0 | x_t] under x_0 ~ N(LQ, prior^2 I): (B, 3, H, W).
        The network learns the difference to this prior prediction. It is EDM's skip connection
        (Karras et al. 2022, table 1, c_skip alone) with the mean LQ instead of 0. prior = 0.15 is
        the measured root mean square of GT - LQ. It gains 2.8 dB in 800 SFT steps of 16 faces."""
        a = self.abar_at(t, x)
        k = self.prior ** 2 / (self.prior ** 2 + (1 - a) / a)   # weight of x_t against LQ
        x0 = lq + k * (x / a.sqrt() - lq)
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        return a.sqrt() * eps - (1 - a).sqrt() * x0

    def predict(self, net, x: Tensor, lq: Tensor, t: Tensor) -> Tensor:
        """The predicted v: the network's output plus the prior prediction, (B, 3, H, W)."""
        out = net(x, lq, t)
        return out + self.prior_v(x, lq, t) if self.prior else out

    def loss(self, net, lq: Tensor, gt: Tensor, generator: torch.Generator) -> Tensor:
        """The supervised loss, the mean squared error of `predict` against v = sqrt(abar_t) z -
        sqrt(1 - abar_t) gt at x_t, for uniform t and noise z: lq, gt (B, 3, H, W) -> (B,)."""
        t, z = uniform_integers(self.T, gt, generator), gaussian(gt, generator)
        a = self.abar_at(t, gt)
        v = a.sqrt() * z - (1 - a).sqrt() * gt
        out = self.predict(net, self.q_sample(gt, t, z), lq, t)
        return (out - v).square().mean(dim=(1, 2, 3))

    def schedule(self, K: int) -> list[tuple[int, int]]:
        """K sampling steps (t, s), noisiest first: t = round(T (K - k) / K) - 1 for k = 0 .. K-1, s
        is the next t, the last s is -1. Raises UserError unless 1 <= K <= T."""
        if not 1 <= K <= self.T:
            raise UserError(f"--ddim_steps: the number of sampling steps is 1 to {self.T}, not {K}")
        tau = [round(self.T * (K - k) / K) - 1 for k in range(K)] + [-1]
        return list(zip(tau[:-1], tau[1:]))

    def levels(self, t: int, s: int) -> tuple[Tensor, Tensor]:
        """abar_t and abar_s as float64 scalars on the CPU; abar_s = 1 for s = -1, a clean image."""
        a = self.abar_cpu
        return a[t], a[s] if s >= 0 else torch.ones_like(a[t])

    def sigma(self, t: int, s: int, eta: float) -> Tensor:
        """Standard deviation of the step t -> s, eta sqrt((1 - abar_s) / (1 - abar_t))
        sqrt(1 - abar_t / abar_s) (DDIM eq. 16), a float64 scalar; 0 in the last step, s = -1."""
        a, a_prev = self.levels(t, s)
        return eta * ((1 - a_prev) / (1 - a)).sqrt() * (1 - a / a_prev).sqrt()

    def ddim_mean(self, x0: Tensor, eps: Tensor, t: int, s: int, eta: float) -> Tensor:
        """Mean of the step t -> s, sqrt(abar_s) x0 + sqrt(1 - abar_s - sigma^2) eps (DDIM eq. 12),
        from the clean image x0 and the noise eps, all (B, 3, H, W). Rounding may make the second
        root's argument negative: it counts as 0."""
        _, a_prev = self.levels(t, s)
        direction = (1 - a_prev - self.sigma(t, s, eta) ** 2).clamp(min=0).sqrt()
        return a_prev.sqrt() * x0 + direction * eps

    def posterior_mean(self, x: Tensor, x0: Tensor, t: int, s: int, eta: float) -> Tensor:
        """Mean of q(x_s | x_t, x_0), the step of a sampler that knows x0 (DDIM eq. 7; for eta = 1
        DDPM eq. 7), all (B, 3, H, W). Its standard deviation is `sigma`."""
        a, _ = self.levels(t, s)
        return self.ddim_mean(x0, (x - a.sqrt() * x0) / (1 - a).sqrt(), t, s, eta)

    def ddim_step(self, net, x: Tensor, lq: Tensor, t: int, s: int, eta: float):
        """One step t -> s as a Gaussian (DDIM eq. 12 and 16): x_s ~ N(mu, sigma^2 I), with
        eps = sqrt(abar_t) v + sqrt(1 - abar_t) x and x0_hat = sqrt(abar_t) x - sqrt(1 - abar_t) v.
        Returns mu (B, 3, H, W), sigma (a float64 scalar), x0_hat (B, 3, H, W), not clamped."""
        level = torch.full((len(x),), t, device=x.device)
        a, v = self.abar_at(level, x), self.predict(net, x, lq, level)
        eps, x0_hat = a.sqrt() * v + (1 - a).sqrt() * x, a.sqrt() * x - (1 - a).sqrt() * v
        return self.ddim_mean(x0_hat, eps, t, s, eta), self.sigma(t, s, eta), x0_hat

    @torch.no_grad()
    def sample(self, net, lq: Tensor, K: int, eta: float, generator: torch.Generator) -> Tensor:
        """Restore lq (B, 3, H, W) in K steps, clamped to [-1, 1]: from noise, x_s = mu + sigma z at
        each step, mu alone at the last."""
        x = gaussian(lq, generator)
        for t, s in self.schedule(K):
            mu, sigma, _ = self.ddim_step(net, x, lq, t, s, eta)
            x = mu if s < 0 else mu + sigma * gaussian(x, generator)
        return x.clamp(-1, 1)


def restore(net, lq: Tensor, K: int, eta: float, seed: int) -> Tensor:
    """Restore lq (N, 3, H, W), `BATCH` at a time. The noise depends on seed and N alone."""
    generator, diffusion = torch.Generator().manual_seed(seed), Diffusion(net.config, lq.device)
    with alone():       # by one rank
        return torch.cat([diffusion.sample(net, u, K, eta, generator) for u in lq.split(BATCH)])


def load_restorer(path, device="cpu", flag: str = "--ckpt") -> tuple[UNet, dict]:
    """The network with its averaged weights, and the whole checkpoint. Raises UserError naming
    `flag` if the file is not a restorer's, or cannot be used."""
    state = load_run(path, flag)
    if not fits(state["config"], {name: type(v) for name, v in vars(Config()).items()}):
        raise UserError(f"{flag} {path}: not a restorer's checkpoint of train.py")
    try:
        net = UNet(Config(**state["config"]))
        net.load_state_dict(state["ema"])
    except (TypeError, RuntimeError, AttributeError, ValueError):       # fields or shapes differ
        raise UserError(f"{flag} {path}: a damaged checkpoint; train it again") from None
    if not all(p.isfinite().all() for p in net.parameters()):
        raise UserError(f"{flag} {path}: its weights are not finite; use an earlier checkpoint")
    return net.to(device).eval(), state
