"""The restorer: a compact UNet and the diffusion process around it.

Papers   DDPM (Ho et al. 2020): linear noise schedule, q(x_t | x_0).
         DDIM (Song et al. 2020), eq. 12 and 16: the sampler, eta = 0 (an ODE) to eta = 1 (DDPM).
         v-prediction (Salimans & Ho 2022): v = sqrt(abar) eps - sqrt(1 - abar) x_0.
         Trailing time steps (Lin et al. 2024): sampling starts at t = T-1, all but pure noise.
         Preconditioning (EDM, Karras et al. 2022), here around the LQ image: `Diffusion.guess`.
Departs  The low-quality face (LQ) is concatenated to x_t: no ControlNet, no VAE, no text. No
         dropout: a policy must give the same likelihood in the rollout and in the update.

Contract An image is float32 (B, 3, H, W), RGB, in [-1, 1]. t is int64 (B,), 0 .. T-1; s is the step
         that t is followed by, with s = -1 the clean image (abar = 1). Outside `Diffusion` nobody
         sees v or eps, only mu, sigma and x0_hat.
"""
import copy
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import UserError


@dataclass
class Config:
    """Everything needed to build the network again; a checkpoint carries it as a plain dict."""
    size: int = 32                  # side of the square image, in pixels
    channels: int = 32              # width of the first level
    mults: tuple = (1, 2, 4)        # width of each level, as a multiple; each level halves the side
    blocks: int = 1                 # residual blocks a level
    attention: int = 1              # how many of the lowest levels attend
    patch: int = 2                  # pixel-unshuffle stem: 2 quarters the cost; 1 is the plain UNet
    prediction: str = "v"           # the network works on "v" or on "eps"
    prior: float = 0.15             # see Diffusion.guess; 0 leaves the network on its own
    timesteps: int = 1000           # T (DDPM)

    def __post_init__(self):
        self.mults = tuple(self.mults)
        unit = self.patch * 2 ** (len(self.mults) - 1)
        if self.size % unit:
            raise ValueError(f"size {self.size} must be a multiple of {unit} for this network")
        if self.channels < 4 or self.channels % 4 or min(self.mults) < 1:
            raise ValueError("channels must be a multiple of 4 and each of mults 1 or more, not "
                             f"{self.channels} and {self.mults}")
        if self.prediction not in ("v", "eps"):
            raise ValueError(f"prediction must be 'v' or 'eps', not {self.prediction!r}")


# ---------------------------------------------------------------------------------------------
# The network

def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(8, channels // 4), channels)    # ours: groups of four channels or more


def zero(layer: nn.Module):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of t at geometrically spaced frequencies (DDPM): (B,) -> (B, dim)."""
    freq = 10_000 ** (-torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t.float()[:, None] * freq                                   # (B, dim/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResBlock(nn.Module):
    """norm, SiLU, conv, twice; the time embedding scales and shifts the second norm."""

    def __init__(self, cin: int, cout: int, cemb: int):
        super().__init__()
        self.norm1, self.conv1 = norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.emb = nn.Linear(cemb, 2 * cout)
        self.norm2, self.conv2 = norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        zero(self.conv2)        # each block starts as its skip: a calm first step

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
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
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(3, 4).unbind(1)                         # (B, heads, HW, C/heads)
        y = F.scaled_dot_product_attention(q, k, v)                     # (B, heads, HW, C/heads)
        return x + self.out(y.transpose(2, 3).reshape(B, C, H, W))


class UNet(nn.Module):
    """(x_t, LQ, t) -> what v (or eps) is beyond `Diffusion.guess`, (B, 3, H, W).

    With `bf16` set it computes in bfloat16, which is quick on GPUs and on CPUs with AMX.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.bf16 = config, False
        widths = [config.channels * m for m in config.mults]
        cemb, depth, p2 = 4 * config.channels, len(widths), config.patch ** 2
        self.time = nn.Sequential(nn.Linear(config.channels, cemb), nn.SiLU(),
                                  nn.Linear(cemb, cemb), nn.SiLU())
        self.stem = nn.Conv2d(2 * 3 * p2, widths[0], 3, padding=1)
        attend = lambda level, c: (Attention(c) if level >= depth - config.attention
                                   else nn.Identity())

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
            for _ in range(config.blocks + 1):      # one skip a block, one for its input
                self.up.append(nn.ModuleList([ResBlock(c + skips.pop(), width, cemb),
                                              attend(level, width)]))
                c = width
            if level > 0:
                self.up.append(nn.Conv2d(c, c, 3, padding=1))           # after doubling the side
        self.head = nn.Sequential(norm(c), nn.SiLU(), nn.Conv2d(c, 3 * p2, 3, padding=1))
        zero(self.head[-1])
        self.to(memory_format=torch.channels_last)                      # the quick layout for convs

    def forward(self, x: Tensor, lq: Tensor, t: Tensor) -> Tensor:
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

BETA_FIRST, BETA_LAST = 1e-4, 0.02      # DDPM, section 4
MAX_GRAD_NORM = 1.0                     # LRPO's code


class Diffusion:
    """The noise schedule and what follows from it. `net(x_t, lq, t)` is the UNet or a stand-in."""

    def __init__(self, config: Config, device="cpu"):
        beta = torch.linspace(BETA_FIRST, BETA_LAST, config.timesteps, dtype=torch.float64)
        self.abar = torch.cumprod(1 - beta, dim=0).float().to(device)   # (T,)
        self.T, self.prediction, self.prior = config.timesteps, config.prediction, config.prior

    def abar_at(self, t: Tensor, like: Tensor) -> Tensor:
        """abar_t as (B, 1, 1, 1) in the dtype of `like`; 1 where t = -1, the clean image."""
        return torch.where(t < 0, 1.0, self.abar[t.clamp(min=0)]).to(like.dtype).view(-1, 1, 1, 1)

    def q_sample(self, x0: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0), with z the standard normal noise (DDPM eq. 4)."""
        a = self.abar_at(t, x0)
        return a.sqrt() * x0 + (1 - a).sqrt() * z

    def guess(self, x: Tensor, lq: Tensor, t: Tensor) -> Tensor:
        """v (or eps) of a restorer that knows only x_0 ~ N(LQ, prior^2 I): (B, 3, H, W).

        The network learns what is missing from this guess: EDM's skip connection (Karras et al.
        2022, table 1, c_skip alone), whose prior is N(0, sigma_data^2 I), around a far better
        mean. prior = 0.15 is the measured rms of GT - LQ. It was worth 2.8 dB after two minutes
        of SFT on one core (800 steps of 16 drawn faces: 22.3 dB with it, 19.5 without).
        """
        a = self.abar_at(t, x)
        k = self.prior ** 2 / (self.prior ** 2 + (1 - a) / a)   # how far to trust x_t over LQ
        x0 = lq + k * (x / a.sqrt() - lq)
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        return eps if self.prediction == "eps" else a.sqrt() * eps - (1 - a).sqrt() * x0

    def predict(self, net, x: Tensor, lq: Tensor, t: Tensor) -> Tensor:
        """v (or eps), as the network and the guess together say: (B, 3, H, W)."""
        out = net(x, lq, t)
        return out + self.guess(x, lq, t) if self.prior else out

    def loss(self, net, lq: Tensor, gt: Tensor, generator: torch.Generator) -> Tensor:
        """The supervised loss: mean squared error of v (or eps) at a uniform t. Returns (B,)."""
        t = torch.randint(self.T, (len(gt),), generator=generator).to(gt.device)
        z = gaussian(gt, generator)
        a = self.abar_at(t, gt)
        target = z if self.prediction == "eps" else a.sqrt() * z - (1 - a).sqrt() * gt
        out = self.predict(net, self.q_sample(gt, t, z), lq, t)
        return (out - target).square().mean(dim=(1, 2, 3))

    def schedule(self, K: int) -> list[tuple[int, int]]:
        """K pairs (t, s), noisiest first, evenly spaced and ending at s = -1. UserError
        unless 1 <= K <= T."""
        if not 1 <= K <= self.T:
            raise UserError(f"--ddim_steps: the number of sampling steps is 1 to {self.T}, not {K}")
        tau = [round(self.T * (K - k) / K) - 1 for k in range(K)] + [-1]
        return list(zip(tau[:-1], tau[1:]))

    def levels(self, t: int, s: int) -> tuple[Tensor, Tensor]:
        """abar_t and abar_s as float64 scalars; abar_s = 1 for s = -1, the clean image."""
        abar = self.abar.double()
        return abar[t], abar[s] if s >= 0 else torch.ones_like(abar[t])

    def sigma(self, t: int, s: int, eta: float) -> Tensor:
        """Standard deviation of the step t -> s (DDIM eq. 16), a float64 scalar. It is 0 at eta = 0
        and at the last step, s = -1."""
        a, a_prev = self.levels(t, s)
        return eta * ((1 - a_prev) / (1 - a)).sqrt() * (1 - a / a_prev).sqrt()

    def ddim_mean(self, x0: Tensor, eps: Tensor, t: int, s: int, eta: float) -> Tensor:
        """Mean of the step t -> s for a clean image x0 and the noise eps (DDIM eq. 12): as x0."""
        _, a_prev = self.levels(t, s)
        direction = (1 - a_prev - self.sigma(t, s, eta) ** 2).clamp(min=0).sqrt()
        return a_prev.sqrt() * x0 + direction * eps

    def posterior_mean(self, x: Tensor, x0: Tensor, t: int, s: int, eta: float) -> Tensor:
        """Mean of q(x_s | x_t, x_0), the step of a sampler that knows x0 (DDIM eq. 7; at eta = 1
        DDPM eq. 7): as x. Its standard deviation is `sigma`."""
        a, _ = self.levels(t, s)
        return self.ddim_mean(x0, (x - a.sqrt() * x0) / (1 - a).sqrt(), t, s, eta)

    def ddim_step(self, net, x: Tensor, lq: Tensor, t: int, s: int, eta: float):
        """One step t -> s as a Gaussian (DDIM eq. 12 and 16): x_s ~ N(mu, sigma^2 I).

        Returns mu (B, 3, H, W), sigma (a scalar tensor), x0_hat (B, 3, H, W).
        """
        level = torch.full((len(x),), t, device=x.device)
        a, out = self.abar_at(level, x), self.predict(net, x, lq, level)
        if self.prediction == "eps":
            eps, x0_hat = out, (x - (1 - a).sqrt() * out) / a.sqrt()
        else:
            eps, x0_hat = a.sqrt() * out + (1 - a).sqrt() * x, a.sqrt() * x - (1 - a).sqrt() * out
        return self.ddim_mean(x0_hat, eps, t, s, eta), self.sigma(t, s, eta), x0_hat

    @torch.no_grad()
    def sample(self, net, lq: Tensor, K: int, eta: float, generator: torch.Generator) -> Tensor:
        """Restore lq (B, 3, H, W) in K steps; the result is clamped to [-1, 1]."""
        x = gaussian(lq, generator)
        for t, s in self.schedule(K):
            mu, sigma, _ = self.ddim_step(net, x, lq, t, s, eta)
            x = mu if s < 0 else mu + sigma * gaussian(x, generator)
        return x.clamp(-1, 1)


def gaussian(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise shaped like `like`. Drawn on the CPU: the same on every device."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


class SFT:
    """Supervised training: the mean squared error of v at a random noise level."""

    def __init__(self, net, diffusion, generator, lr):
        self.net, self.diffusion, self.generator = net, diffusion, generator
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=lr, fused=True)

    def step(self, batch):
        loss = self.diffusion.loss(self.net, *batch, self.generator).mean()
        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        return {"loss": loss.item(), "grad_norm": grad_norm.item()}


class EMA:
    """An exponential moving average of the weights; it is what gets evaluated and sampled from."""

    def __init__(self, net: nn.Module, decay: float, from_scratch: bool = True):
        self.from_scratch = from_scratch
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, net: nn.Module):
        self.updates += 1
        decay = self.decay
        if self.from_scratch:   # average over the few steps there are, or the random start lingers
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        for mine, theirs in zip(self.net.parameters(), net.parameters()):
            mine.lerp_(theirs, 1 - decay)
        for mine, theirs in zip(self.net.buffers(), net.buffers()):
            mine.copy_(theirs)


# ---------------------------------------------------------------------------------------------
# Checkpoints: one file of plain types, so that torch.load(weights_only=True) reads it

def load_tensors(path, flag: str, remedy: str = "") -> dict:
    """A file of plain types; never one that could run code. UserError names flag and remedy."""
    remedy = remedy and f"; {remedy}"
    if not Path(path).is_file():
        what = "a folder, not the last.pt in it" if Path(path).is_dir() else "no such file"
        raise UserError(f"{flag} {path}: {what}{remedy}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # torch raises many kinds; each means: not such a file
        raise UserError(f"{flag} {path}: not a PyTorch file of plain tensors, or a damaged one "
                        f"({type(error).__name__}){remedy}") from None


def save_checkpoint(path, state: dict):
    """Write to a temporary name, then move into place: a stopped run leaves no half a file."""
    part = f"{path}.part"
    torch.save(state, part)
    os.replace(part, path)


def load_restorer(path, device="cpu", flag: str = "--ckpt") -> tuple[UNet, dict]:
    """The network with its averaged weights, ready to restore, and the whole checkpoint."""
    state = load_tensors(path, flag)
    if not isinstance(state, dict) or not state.get("config"):
        raise UserError(f"{flag} {path}: not a restorer's checkpoint of train.py")
    net = UNet(Config(**state["config"]))
    net.load_state_dict(state["ema"])
    return net.to(device).eval(), state


def pick_device(name: str) -> torch.device:
    """'auto' is a CUDA GPU where there is one; UserError for a device that is not there."""
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" \
            else torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: no such device here; --device cpu works") from None
    return device
