"""The terms of the reward and their weighted sum, which reinforcement learning maximises.

Papers   SSIM (Wang et al. 2004). LRPO's composite reward, strategy 1 (Wu et al. 2025, arXiv
         2509.23339). LPIPS and CLIP-IQA are in support/, the Face Reward Model is in frm.py.
Departs  An average pool stands in for the low-pass band of the dual-tree wavelet. Every term sees
         the image clamped to [-1, 1]; the published code scores LPIPS without clamping.

Every term maps (image, ground truth), both (B, 3, H, W) in [-1, 1], to float32 (B,); higher is
better. A gradient flows through each. `ms` is the time for one image of 64 px on two CPU cores.

    name     range     ground truth  ms    source; the damage that it detects (docs/results.md)
    ssim     [-1, 1]   yes           .32   Wang et al., mean over RGB; all damage
    dwt      (0, 1]    yes           .02   LRPO: colours and layout; all damage but to fine detail
    lpips    (-inf,1]  yes           1.35  1 - LPIPS (squeeze), deep features; all damage
    clipiqa  (0, 1)    no            3.8   CLIP-IQA, "good" against "bad" image; not measured here
    face     (0, 1)    no            .65   Face Reward Model, ours (the papers': [-1, 1]); blur,
                                           low resolution, noise, colour casts; hardly JPEG; not
                                           identity

`python -m tools.reward_report` measures how each term reacts to graded damage.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.cli import UserError

# ---------------------------------------------------------------------------------------------
# Terms that need the ground truth

SSIM_TAPS, SSIM_SIGMA = 11, 1.5             # Wang et al. 2004, section III-B
SSIM_C1, SSIM_C2 = 0.01 ** 2, 0.03 ** 2     # the same, for a data range of 1


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of images (B, 3, H, W) in [-1, 1], H and W at least 11: (B,) in
    [-1, 1]. Gaussian window, no padding, mean over RGB: scikit-image's with gaussian_weights and
    without sample covariance. With means m, variances v and the covariance cov under the window w
    (cov = sum w x y - m_x m_y), for images rescaled to [0, 1], SSIM is the mean of
    (2 m_x m_y + C1) (2 cov + C2) / ((m_x^2 + m_y^2 + C1) (v_x + v_y + C2))."""
    dtype = x.dtype
    if x.is_cuda:       # a GPU's convolutions use TF32, whose rounding moves SSIM by .01
        x, y = x.double(), y.double()
    x, y = (x + 1) / 2, (y + 1) / 2                                     # to [0, 1]
    d = torch.arange(SSIM_TAPS, device=x.device, dtype=x.dtype) - SSIM_TAPS // 2
    w = torch.exp(-d ** 2 / (2 * SSIM_SIGMA ** 2))
    w = w / w.sum()                                                     # (11,)

    def blur(u: Tensor) -> Tensor:
        u = F.conv2d(u.flatten(0, 1)[:, None], w.view(1, 1, 1, -1))     # (3B, 1, H, W-10)
        return F.conv2d(u, w.view(1, 1, -1, 1)).unflatten(0, x.shape[:2]).squeeze(2)

    mx, my = blur(x), blur(y)                                           # (B, 3, H-10, W-10)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    s = ((2 * mx * my + SSIM_C1) * (2 * cov + SSIM_C2)
         / ((mx * mx + my * my + SSIM_C1) * (vx + vy + SSIM_C2)))
    return s.mean(dim=(1, 2, 3)).to(dtype)


LOW_PASS_SHARPNESS = 60.0   # LRPO's code: exp(-15 L1) of a band whose DC gain is 4; ours has gain 1


def low_pass(x: Tensor) -> Tensor:
    """The low-pass band of an image (B, 3, H, W), H and W at least 8: (B, 3, H/4-1, W/4-1).

    Level 3 of the dual-tree wavelet keeps the lowest eighth of the spectrum, sampled every 4
    pixels; so does an 8 x 8 mean taken every 4 pixels. The reference wavelet code may be used for
    research only, so it is not used here.
    """
    return F.avg_pool2d(x, kernel_size=8, stride=4)


def dwt(x: Tensor, y: Tensor) -> Tensor:
    """LRPO's low-pass fidelity exp(-60 L1), L1 the mean absolute difference of the low-pass bands,
    in units of [0, 1]; images (B, 3, H, W) in [-1, 1] -> (B,) in (0, 1]."""
    l1 = (low_pass(x) - low_pass(y)).abs().mean(dim=(1, 2, 3)) / 2      # /2: [-1, 1] to [0, 1]
    return torch.exp(-LOW_PASS_SHARPNESS * l1)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, over RGB, of images (B, 3, H, W) in [-1, 1]: (B,). At most
    100 dB, for equal images. It is a metric, never a reward."""
    mse = ((x - y) / 2).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse.clamp(min=1e-10))


# ---------------------------------------------------------------------------------------------
# The composite

SETS = {
    "paper": "face=.3,lpips=.3,clipiqa=.1,dwt=.3",      # LRPO's code, "recommended"
    "paper-alt": "face=.4,lpips=.2,clipiqa=.2,dwt=.2",  # LRPO's code, the alternative
    "default": "lpips=.7,face=.1,dwt=.1,ssim=.1",   # ours; measured in docs/results.md
    "no-face": "lpips=.4,clipiqa=.2,ssim=.4",   # ours: without a face reward model
    "offline": "ssim=.2,dwt=.5,face=.3"}    # ours; nothing has to be downloaded
TERMS = ("ssim", "dwt", "lpips", "clipiqa", "face")
MIN_SIDE = 16       # the Face Reward Model halves the side four times; SSIM needs 11, dwt 8


def parse_rewards(text: str) -> dict[str, float]:
    """'ssim=.4,face=.6' or a name in SETS -> {'ssim': .4, 'face': .6}. Raises UserError for
    anything else."""
    weights = {}
    for item in SETS.get(text, text).split(","):
        name, _, weight = item.strip().partition("=")
        if name not in TERMS:
            raise UserError(f"--rewards: {name!r} is no reward; there are {', '.join(TERMS)}, "
                            f"and the sets {', '.join(SETS)}")
        if name in weights:
            raise UserError(f"--rewards: {name} is named twice")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = math.nan
        if not 0 <= weights[name] < math.inf:
            raise UserError(f"--rewards {item}: write name=weight, as in ssim=.4,dwt=.6, "
                            "with weights of 0 or more")
    return weights


class CompositeReward:
    """R = sum of weight * term (LRPO, strategy 1). `weights` = {name: weight}.

    The models of the terms face, lpips and clipiqa are given. Raises ValueError if one is missing.
    """

    def __init__(self, weights: dict[str, float], face: nn.Module = None,
                 lpips: nn.Module = None, clipiqa: nn.Module = None):
        terms = {"ssim": ssim, "dwt": dwt, "lpips": lpips, "clipiqa": clipiqa, "face": face}
        self.weights, self.terms = weights, {name: terms[name] for name in weights}
        missing = [name for name, term in self.terms.items() if term is None]
        if missing:
            raise ValueError(f"reward {missing[0]} needs its model")

    def __call__(self, x: Tensor, gt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, 3, H, W), H and W at least 16 (17 for LPIPS, 32 for CLIP-IQA) -> R (B,) and
        each term (B,), not weighted, float32. x is clamped to [-1, 1] here. Raises UserError if the
        images are smaller."""
        if min(x.shape[-2:]) < MIN_SIDE:
            raise UserError(f"--size: the rewards need images of {MIN_SIDE} px or more")
        x = x.float().clamp(-1, 1)
        terms = {name: term(x, gt) for name, term in self.terms.items()}
        return sum(w * terms[name] for name, w in self.weights.items()), terms
