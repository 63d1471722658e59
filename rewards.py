"""The rewards: what reinforcement learning optimises is what it gets.

Papers   SSIM (Wang et al. 2004). LPIPS (Zhang et al. 2018), through its authors' package. LRPO's
         composite reward, strategy 1 (Wu et al. 2025, arXiv 2509.23339). The Face Reward Model is
         in frm.py.
Departs  A low-pass of ours stands in for the dual-tree wavelet band.
         Every term sees the image clamped to [-1, 1]; the published code scores LPIPS unclamped.

Every term maps (image, ground truth), both (B, 3, H, W) in [-1, 1], to float32 (B,), higher better:

    name   range    ground truth  gradient  what it is
    ssim   [-1, 1]  yes           yes       structural similarity, mean over RGB
    dwt    (0, 1]   yes           yes       low-pass fidelity: colours and layout, blind to detail
    lpips  (-inf,1] yes           yes       1 - LPIPS: the distance of deep features
    face   (0, 1)   no            yes       Face Reward Model: does it look like a clean photo?
"""
import math
import warnings
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import UserError
from frm import FaceRewardModel
from model import load_tensors

# ---------------------------------------------------------------------------------------------
# Measured against the ground truth

SSIM_TAPS, SSIM_SIGMA = 11, 1.5         # Wang et al. 2004, section III-B
SSIM_C1, SSIM_C2 = 0.01 ** 2, 0.03 ** 2     # the same, for a data range of 1


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity, Gaussian window, no padding, mean over RGB: (B,) in [-1, 1].

    At least 11 px a side. scikit-image's with gaussian_weights and without sample covariance.
    """
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
    return s.mean(dim=(1, 2, 3))


DWT_SHARPNESS = 60.0    # LRPO's code: exp(-15 L1) of a band whose DC gain is 4; ours has gain 1


def low_pass(x: Tensor) -> Tensor:
    """Unit-gain low-pass standing in for the level-3 dual-tree band (ours): (B, 3, H/4-1, W/4-1).

    That band keeps the lowest eighth of the spectrum, sampled every 4 pixels; so does an 8 x 8
    mean taken every 4 pixels. The reference wavelet code is for research only: not used.
    """
    return F.avg_pool2d(x, kernel_size=8, stride=4)


def dwt(x: Tensor, y: Tensor) -> Tensor:
    """LRPO's low-pass fidelity exp(-60 L1), images in [0, 1]: (B,) in (0, 1]."""
    delta = (low_pass(x) - low_pass(y)).abs().mean(dim=(1, 2, 3)) / 2    # /2: [-1, 1] to [0, 1]
    return torch.exp(-DWT_SHARPNESS * delta)


LPIPS_MIN_SIDE = {"alex": 31, "vgg": 16, "squeeze": 17}     # below: a pool has no output


class LPIPS(nn.Module):
    """1 - LPIPS, through the `lpips` package, which has its linear layers but not its backbone.

    `weights`: a file of the ImageNet backbone's features. Without it torchvision fetches one.
    """

    def __init__(self, net: str = "squeeze", weights: str = None):
        super().__init__()
        import lpips        # slow to import, so only where it is asked for
        self.min_side = LPIPS_MIN_SIDE[net]
        with warnings.catch_warnings():     # the package calls torchvision by its old names
            warnings.simplefilter("ignore")
            try:
                self.lpips = lpips.LPIPS(net=net, pnet_rand=weights is not None, verbose=False)
            except (URLError, OSError):
                raise UserError(f"LPIPS: its {net} backbone could not be fetched; give the file "
                                f"with --lpips_weights FILE, or use --rewards {OFFLINE}") from None
        if weights is not None:
            load_backbone(self.lpips.net, weights, net)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True):
        return super().train(False)     # its dropout must stay asleep, whatever the parent does

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if min(x.shape[-2:]) < self.min_side:
            raise UserError(f"LPIPS: this backbone needs images of {self.min_side} px or more")
        return 1 - self.lpips(x, y).flatten()                           # (B, 1, 1, 1) -> (B,)


def load_backbone(net: nn.Module, path: str, name: str):
    """Copy a file's tensors into a backbone in order: torchvision's names differ from lpips'."""
    source, target = load_tensors(path, "--lpips_weights"), list(net.state_dict().values())
    if isinstance(source, dict):
        source = [v for k, v in source.items() if not k.startswith("classifier")]
    if [getattr(v, "shape", None) for v in source] != [v.shape for v in target]:
        raise UserError(f"--lpips_weights {path}: these are not the features of {name}; "
                        "--lpips_net says which backbone is meant")
    for mine, theirs in zip(target, source):
        mine.copy_(theirs)


# ---------------------------------------------------------------------------------------------
# The composite

OFFLINE = "ssim=.2,dwt=.5,face=.3"      # ours: what needs no download; docs/results.md says why
TERMS = ("ssim", "dwt", "lpips", "face")
MIN_SIDE = 16       # the Face Reward Model halves the side four times; SSIM needs 11, dwt 8


def parse_rewards(text: str) -> dict[str, float]:
    """'ssim=.4,face=.6' -> {'ssim': .4, 'face': .6}; UserError names what is wrong."""
    weights = {}
    for item in text.split(","):
        name, _, weight = item.strip().partition("=")
        if name not in TERMS:
            raise UserError(f"--rewards: {name!r} is no reward; there are {', '.join(TERMS)}")
        try:
            weights[name] = float(weight)
            if not math.isfinite(weights[name]):
                raise ValueError
        except ValueError:
            raise UserError(f"--rewards {item}: write name=weight, as in ssim=.4,dwt=.6") from None
    return weights


class CompositeReward:
    """R = sum of weight * term (LRPO, strategy 1). `weights` = {name: weight}."""

    def __init__(self, weights: dict[str, float], face: FaceRewardModel = None,
                 lpips: LPIPS = None):
        terms = {"ssim": ssim, "dwt": dwt, "lpips": lpips, "face": face}
        self.weights, self.terms = weights, {name: terms[name] for name in weights}
        missing = [name for name, term in self.terms.items() if term is None]
        if missing:
            raise ValueError(f"reward {missing[0]} needs its model")

    def __call__(self, x: Tensor, gt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Total (B,) and each part (B,), unweighted, float32. Gradient flows through every term."""
        if min(x.shape[-2:]) < MIN_SIDE:
            raise UserError(f"the rewards need images of {MIN_SIDE} px or more")
        x = x.float().clamp(-1, 1)
        parts = {name: term(x, gt) for name, term in self.terms.items()}
        return sum(w * parts[name] for name, w in self.weights.items()), parts


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio over RGB, in dB, of images in [-1, 1] (B, 3, H, W): (B,)."""
    mse = ((x - y) / 2).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse.clamp(min=1e-10))      # at most 100 dB, for identical images


def build_reward(weights: dict[str, float], device, frm_weights=None, lpips_net="squeeze",
                 lpips_weights=None) -> CompositeReward:
    """The composite with its models loaded; UserError where one of them is not to be had."""
    face = lpips = None
    if "face" in weights:
        face = FaceRewardModel()
        state = load_tensors(frm_weights, "--frm_weights")
        if not isinstance(state, dict) or state.get("mode") != "frm":
            raise UserError(f"--frm_weights {frm_weights}: not a checkpoint of --mode frm; without "
                            "one use --rewards ssim=.5,dwt=.5")
        face.load_state_dict(state["ema"])
        face = face.to(device).eval().requires_grad_(False)
    if "lpips" in weights:
        lpips = LPIPS(lpips_net, lpips_weights).to(device)
    return CompositeReward(weights, face, lpips)
