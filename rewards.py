"""The rewards: what reinforcement learning optimises is what it gets.

Papers   SSIM (Wang et al. 2004). LPIPS (Zhang et al. 2018), through its authors' package. LRPO's
         composite reward, strategy 1 (Wu et al. 2025, arXiv 2509.23339). CLIP-IQA is in clipiqa.py,
         the Face Reward Model in frm.py.
Departs  A low-pass of ours stands in for the dual-tree wavelet band.
         Every term sees the image clamped to [-1, 1]; the published code scores LPIPS unclamped.

Every term maps (image, ground truth), both (B, 3, H, W) in [-1, 1], to float32 (B,), higher better.
A gradient flows through each. `ms`: an image of 64 px, in a batch of 64, on two CPU cores.

    name     range     ground truth  ms    source; what it sees (docs/results.md, "The rewards")
    ssim     [-1, 1]   yes           .32   Wang et al., mean over RGB; all damage
    dwt      (0, 1]    yes           .02   LRPO: colours and layout; all damage but fine detail
    lpips    (-inf,1]  yes           1.35  1 - LPIPS (squeeze), deep features; all damage
    clipiqa  (0, 1)    no            3.8   CLIP-IQA, "good" against "bad" image; not measured here
    face     (0, 1)    no            .65   Face Reward Model, ours (the papers': [-1, 1]); blur,
                                           low resolution, grain, casts; hardly JPEG; not identity

`python rewards.py` reports how each reacts to graded damage, and what it does not see: report.py.
"""
import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipiqa import CLIPIQA, load_clipiqa
from data import UserError, run_main
from frm import load_face_reward
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
            except OSError:
                raise UserError(f"LPIPS: its {net} backbone could not be fetched; give the file "
                                "with --lpips_weights FILE, or use --rewards offline") from None
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
    source, target = (load_tensors(path, "--lpips_weights", "without it the backbone is fetched"),
                      list(net.state_dict().values()))
    if isinstance(source, dict):
        source = [v for k, v in source.items() if not k.startswith("classifier")]
    if [getattr(v, "shape", None) for v in source] != [v.shape for v in target]:
        raise UserError(f"--lpips_weights {path}: these are not the features of {name}; "
                        "--lpips_net says which backbone is meant")
    for mine, theirs in zip(target, source):
        mine.copy_(theirs)


# ---------------------------------------------------------------------------------------------
# The composite

SETS = {
    "paper": "face=.3,lpips=.3,clipiqa=.1,dwt=.3",      # LRPO's code, "recommended"
    "paper-alt": "face=.4,lpips=.2,clipiqa=.2,dwt=.2",  # the alternative in LRPO's code
    "default": "lpips=.7,face=.1,dwt=.1,ssim=.1",   # ours, by measurement: docs/results.md
    "card": "lpips=.4,clipiqa=.2,ssim=.4",  # ours: no face model; the judge without truth least
    "offline": "ssim=.2,dwt=.5,face=.3"}    # ours: nothing to download; docs/results.md says why
OFFLINE = SETS["offline"]
TERMS = ("ssim", "dwt", "lpips", "clipiqa", "face")
MIN_SIDE = 16       # the Face Reward Model halves the side four times; SSIM needs 11, dwt 8


def parse_rewards(text: str) -> dict[str, float]:
    """'ssim=.4,face=.6', or a name of SETS, -> {'ssim': .4, 'face': .6}; UserError says what is
    wrong."""
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
            if not 0 <= weights[name] < math.inf:
                raise ValueError
        except ValueError:
            raise UserError(f"--rewards {item}: write name=weight, as in ssim=.4,dwt=.6, "
                            "with weights of 0 or more") from None
    return weights


class CompositeReward:
    """R = sum of weight * term (LRPO, strategy 1). `weights` = {name: weight}."""

    def __init__(self, weights: dict[str, float], face: nn.Module = None,
                 lpips: LPIPS = None, clipiqa: CLIPIQA = None):
        terms = {"ssim": ssim, "dwt": dwt, "lpips": lpips, "clipiqa": clipiqa, "face": face}
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
                 lpips_weights=None, clip_weights=None, size: int = None) -> CompositeReward:
    """The composite with its models loaded; UserError where one of them is not to be had, or a
    face reward model of ours was trained on photos of another `size`."""
    face = lpips = clipiqa = None
    if "face" in weights:
        face = load_face_reward(frm_weights, size=size).to(device).eval().requires_grad_(False)
    if "lpips" in weights:
        lpips = LPIPS(lpips_net, lpips_weights).to(device)
    if "clipiqa" in weights:
        clipiqa = load_clipiqa(clip_weights).to(device)
    return CompositeReward(weights, face, lpips, clipiqa)


if __name__ == "__main__":
    from report import main     # not above: it needs the rewards
    run_main(main)
