"""The terms of the reward and their weighted sum, which reinforcement learning maximises.

Papers   LRPO's composite reward, strategy 1 (Wu et al. 2025, arXiv 2509.23339): `CompositeReward`.
         Its terms: SSIM (Wang et al. 2004); LPIPS (Zhang et al. 2018, arXiv 1801.03924); CLIP-IQA
         (Wang et al. 2023, arXiv 2207.12396) on CLIP RN50 (Radford et al. 2021); a low-pass
         fidelity; and the Face Reward Model, which is in frm.py.
Departs  An average pool stands in for the low-pass band of the dual-tree wavelet. Every term sees
         the image clamped to [-1, 1]; the published code scores LPIPS without clamping. CLIP-IQA
         averages five antonym pairs, as pyiqa does and so LRPO's code; the paper's single pair is
         PROMPTS["paper"]. They give different numbers.

Every term maps (image, ground truth), both (B, 3, H, W) in [-1, 1], to (B,); higher is better. A
gradient flows through each. All but those of CLIP are means over places, or nearly, and so tell
where an image is better: `maps` of a term are maps whose means add up to it, and `CompositeReward`
averages them over patches. `ms` is for an image of 64 px (lpips: 1.35 times 7).

    name     range     ground truth  ms    source; the damage that it detects (docs/results.md)
    ssim     [-1, 1]   yes           .32   Wang et al., mean over RGB; all damage
    dwt      (0, 1]    yes           .02   LRPO: colours and layout; all damage but to fine detail
    lpips    (-inf,1]  yes           9     1 - LPIPS (squeeze), deep features; all damage
    clipiqa  (0, 1)    no            3.8   CLIP-IQA, "good" against "bad" image; not measured here
    face     (0, 1)    no            .65   Face Reward Model, ours (the papers': [-1, 1]); blur,
                                           low resolution, noise, colour casts; on photos hardly
                                           JPEG; not identity

`python -m tools.reward_report` measures how each term reacts to graded damage.
"""
import math
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.checkpoint import load_tensors
from support.cli import UserError

# ---------------------------------------------------------------------------------------------
# Terms that need the ground truth

SSIM_TAPS, SSIM_SIGMA = 11, 1.5             # Wang et al. 2004, section III-B
SSIM_C1, SSIM_C2 = 0.01 ** 2, 0.03 ** 2     # the same, for a data range of 1


def ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of images (B, 3, H, W) in [-1, 1], H and W at least 11, around each
    pixel: (B, H-10, W-10) in [-1, 1]. Gaussian window, no padding, mean over RGB: scikit-image's
    with gaussian_weights and without sample covariance. With means m, variances v and covariance
    cov under the window w (cov = sum w x y - m_x m_y), for images rescaled to [0, 1], it is
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

    c = x.mean(dim=(2, 3), keepdim=True)        # variances of numbers near 0 lose no digits
    x, y = x - c, y - c
    mx, my = blur(x), blur(y)                                           # (B, 3, H-10, W-10)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    mx, my = mx + c, my + c
    s = ((2 * mx * my + SSIM_C1) * (2 * cov + SSIM_C2)
         / ((mx * mx + my * my + SSIM_C1) * (vx + vy + SSIM_C2)))
    return s.mean(dim=1).to(dtype)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of two images, the mean of `ssim_map`: (B, 3, H, W) each -> (B,)."""
    return ssim_map(x, y).mean(dim=(1, 2))


LOW_PASS_SHARPNESS = 60.0   # LRPO's code: exp(-15 L1) of a band whose DC gain is 4; ours has gain 1


def low_pass(x: Tensor) -> Tensor:
    """The low-pass band of an image (B, 3, H, W), H and W at least 8: (B, 3, H/4-1, W/4-1).

    Level 3 of the dual-tree wavelet keeps the lowest eighth of the spectrum, sampled every 4
    pixels; so does an 8 x 8 mean. The reference wavelet code may be used for research only."""
    return F.avg_pool2d(x, kernel_size=8, stride=4)


def dwt(x: Tensor, y: Tensor) -> Tensor:
    """LRPO's low-pass fidelity exp(-60 L1), L1 the mean absolute difference of the low-pass bands,
    in units of [0, 1]; images (B, 3, H, W) in [-1, 1] -> (B,) in (0, 1]."""
    l1 = (low_pass(x) - low_pass(y)).abs().mean(dim=(1, 2, 3)) / 2      # /2: [-1, 1] to [0, 1]
    return torch.exp(-LOW_PASS_SHARPNESS * l1)


def dwt_map(x: Tensor, y: Tensor) -> Tensor:
    """`dwt` by place, to first order in the L1 of each place, so that its mean is `dwt`: images
    (B, 3, H, W) -> (B, H/4-1, W/4-1)."""
    l1 = (low_pass(x) - low_pass(y)).abs().mean(dim=1) / 2              # (B, H/4-1, W/4-1)
    score, excess = dwt(x, y)[:, None, None], l1 - l1.mean(dim=(1, 2), keepdim=True)
    return score * (1 - LOW_PASS_SHARPNESS * excess)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """PSNR in dB, over RGB, of images (B, 3, H, W) in [-1, 1]: (B,), at most 100, for equal images.
    It is a metric, never a reward."""
    mse = ((x - y) / 2).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse.clamp(min=1e-10))


class Frozen(nn.Module):
    """A pretrained judge, which stays in evaluation mode, whatever a parent's `train` says."""

    def train(self, mode: bool = True):
        """Does not change the mode."""
        return super().train(False)


LPIPS_NETS = ("squeeze", "alex", "vgg")
LPIPS_ENLARGED_BELOW = 128      # ours, px: its networks learnt from 224 px, and see little in less


class LPIPS(Frozen):
    """1 - LPIPS with a backbone `net` (squeeze, alex or vgg), through its authors' package, which
    holds the linear layers.

    `weights` is a file of the backbone's ImageNet features, which `flag` gave; without it
    torchvision fetches one. Raises UserError for another file, or if nothing can be fetched."""

    def __init__(self, net: str = "squeeze", weights: str = None, flag: str = "--lpips_weights"):
        super().__init__()
        import lpips        # slow to import, so it is imported only when it is needed
        with warnings.catch_warnings():     # the package calls torchvision by its old names
            warnings.simplefilter("ignore")
            try:
                self.lpips = lpips.LPIPS(net=net, pnet_rand=weights is not None, verbose=False)
            except Exception as error:      # of the network, or of a damaged file in the cache
                if weights is not None:
                    raise
                raise UserError(f"LPIPS: its {net} backbone could not be fetched, or what was is "
                                f"damaged ({type(error).__name__}); give the file with {flag} "
                                "FILE, or use --rewards offline") from None
        if weights is not None:
            load_backbone(self.lpips.net, weights, net, flag)
        self.eval().requires_grad_(False)

    def maps(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Of two images (B, 3, H, W) in [-1, 1], H and W at least 16, a map (B, h, w) for each
        layer. Their means add up to 1 - LPIPS. Images below 128 px are enlarged twice (bicubic),
        which takes seven times as long at 64 px. Raises UserError below 16 px."""
        if min(x.shape[-2:]) < MIN_SIDE:
            raise UserError(f"LPIPS needs images of {MIN_SIDE} px or more")
        if min(x.shape[-2:]) < LPIPS_ENLARGED_BELOW:
            x, y = (F.interpolate(u, scale_factor=2, mode="bicubic") for u in (x, y))
        features = [[F.normalize(f, dim=1, eps=1e-10) for f in self.lpips.net(
            self.lpips.scaling_layer(u))] for u in (x, y)]              # (B, C, h, w) for a layer
        distances = [lin((a - b).square())[:, 0] for lin, a, b in zip(self.lpips.lins, *features)]
        return [1 - distances[0], *(-d for d in distances[1:])]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """1 - LPIPS of two images (B, 3, H, W) in [-1, 1]: (B,), at most 1. Raises UserError as
        `maps` does."""
        return sum(m.mean(dim=(1, 2)) for m in self.maps(x, y))


def load_backbone(net: nn.Module, path: str, name: str, flag: str):
    """Copy a file's tensors into a backbone, in order (torchvision has other names than lpips).
    Raises UserError if the shapes differ."""
    source, target = (load_tensors(path, flag, "without it the backbone is fetched"),
                      list(net.state_dict().values()))
    if isinstance(source, dict):
        source = [v for k, v in source.items() if not k.startswith("classifier")]
    if [getattr(v, "shape", None) for v in source] != [v.shape for v in target]:
        raise UserError(f"{flag} {path}: these are not the features of {name}; "
                        f"{flag.replace('weights', 'net')} says which backbone is meant")
    for mine, theirs in zip(target, source):
        mine.copy_(theirs)


# ---------------------------------------------------------------------------------------------
# A term without ground truth: is a picture nearer to "good" or to "bad", as CLIP reads the words?

CLIP_RN50 = "RN50-quickgelu"        # open_clip's "RN50" has another GELU than OpenAI's weights
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)     # CLIP's preprocessing, of images in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIPIQA_MIN_SIDE = 32               # the trunk halves the side five times
PROMPTS = {                         # pairs: good, bad, good, bad, ...
    "paper": ["Good photo.", "Bad photo."],                             # CLIP-IQA, section 3
    "five": ["Good image", "bad image", "Sharp image", "blurry image",  # pyiqa's `clipiqa`
             "sharp edges", "blurry edges", "High resolution image", "low resolution image",
             "Noise-free image", "noisy image"]}


def normalise(x: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1], normalised as for CLIP's training: (B, 3, H, W)."""
    return torch.stack([((u + 1) / 2 - mean) / std      # numbers: a GPU would wait for a tensor
                        for u, mean, std in zip(x.unbind(1), CLIP_MEAN, CLIP_STD)], dim=1)


def attention_pool(pool: nn.Module, x: Tensor) -> Tensor:
    """CLIP's attention pooling without position embeddings, the query being the mean position:
    (B, C, h, w) -> (B, E). CLIP adds an embedding for each of its 7 x 7 positions, which fixes the
    size to 224 px; CLIP-IQA leaves that out, so that images of any size need no resizing."""
    x = x.flatten(2).transpose(1, 2)                                    # (B, hw, C)
    mean = x.mean(dim=1, keepdim=True)                                  # (B, 1, C)
    x = torch.cat([mean, x], dim=1)                                     # (B, 1 + hw, C)
    q, k, v = (proj(u).unflatten(2, (pool.num_heads, -1)).transpose(1, 2) for proj, u in
               ((pool.q_proj, mean), (pool.k_proj, x), (pool.v_proj, x)))
    y = F.scaled_dot_product_attention(q, k, v)                         # (B, heads, 1, C / heads)
    return pool.c_proj(y.transpose(1, 2).flatten(1))                    # (B, E)


class CLIPIQA(Frozen):
    """The probability of "good" against "bad", averaged over the antonym pairs of `prompts`.

    `clip` is the whole CLIP. Its text tower encodes the prompts once and is not kept.
    """

    def __init__(self, clip: nn.Module, prompts: str = "five"):
        super().__init__()
        import open_clip
        tokens = open_clip.get_tokenizer(CLIP_RN50)(PROMPTS[prompts])   # (2P, 77)
        with torch.no_grad():
            text = clip.logit_scale.exp() * clip.encode_text(tokens, normalize=True)
        self.register_buffer("text", text)                              # (2P, E), logit scale in
        self.visual = clip.visual
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor = None) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> (B,) in (0, 1); y is not used. Raises UserError below 32
        px."""
        if min(x.shape[-2:]) < CLIPIQA_MIN_SIDE:
            raise UserError(f"CLIP-IQA needs images of {CLIPIQA_MIN_SIDE} px or more")
        v = self.visual
        h = v.stem(normalise(x))                                        # (B, 64, H/4, W/4)
        h = v.layer4(v.layer3(v.layer2(v.layer1(h))))                   # (B, 2048, H/32, W/32)
        image = F.normalize(attention_pool(v.attnpool, h), dim=1)       # (B, E)
        pairs = (image @ self.text.T).unflatten(1, (-1, 2))             # (B, P, 2)
        return pairs.softmax(dim=2)[..., 0].mean(dim=1)                 # (B,)

    def maps(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """The score, for the whole image: one map (B, 1, 1)."""
        return [self(x).view(-1, 1, 1)]


def load_clipiqa(path=None, prompts: str = "five") -> CLIPIQA:
    """CLIP-IQA with the weights in a file of tensors; without a file open_clip fetches OpenAI's.
    Raises UserError if neither works. open_clip checks that no weight keeps a random value."""
    import open_clip        # slow to import, so it is imported only when it is needed
    if path is not None and not Path(path).is_file():
        raise UserError(f"--clip_weights {path}: no such file; leave it out to fetch OpenAI's")
    try:
        clip = open_clip.create_model(CLIP_RN50, str(path or "openai"), require_pretrained=True)
    except Exception as error:      # of torch, safetensors, the hub's client: they mean the same
        found = (f"--clip_weights {path}: not the tensors of CLIP RN50" if path else
                 "CLIP-IQA: OpenAI's RN50 could not be fetched")
        raise UserError(f"{found} ({type(error).__name__}); give a file of them with "
                        "--clip_weights FILE, or use --rewards offline") from None
    return CLIPIQA(clip, prompts)


# ---------------------------------------------------------------------------------------------
# The composite

SETS = {
    "paper": "face=.3,lpips=.3,clipiqa=.1,dwt=.3",      # LRPO's code, "recommended"
    "paper-alt": "face=.4,lpips=.2,clipiqa=.2,dwt=.2",  # LRPO's code, the alternative
    "default": "lpips=.7,face=.1,dwt=.1,ssim=.1",   # ours; measured in docs/results.md
    "no-face": "lpips=.4,clipiqa=.2,ssim=.4",   # ours: without a face reward model
    "offline": "face=1,ssim=.3"}    # ours: for refl, with nothing pretrained
REWARDS_HELP = f"name=weight,..., or a set: {', '.join(SETS)}"      # of the flag --rewards
MODELS = {      # terms with a model, from the files that the command line names; add your own
    "lpips": lambda files: LPIPS(files.lpips_net, files.lpips_weights),
    "clipiqa": lambda files: load_clipiqa(files.clip_weights)}
MIN_SIDE = 16       # the Face Reward Model halves the side four times; SSIM needs 11, dwt 8


def parse_rewards(text: str) -> dict[str, float]:
    """'ssim=.4,face=.6' or a name in SETS -> {'ssim': .4, 'face': .6}. Raises UserError for
    anything else."""
    weights = {}
    for item in SETS.get(text, text).split(","):
        name, _, weight = item.strip().partition("=")
        if name not in (terms := ("ssim", "dwt", "face", *MODELS)):
            raise UserError(f"--rewards: {name!r} is no reward; there are {', '.join(terms)}, and "
                            f"the sets {', '.join(SETS)}")
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
    """R = sum of weight * term (LRPO, strategy 1). `weights` = {name: weight}. `models` are those
    of the terms face, lpips and clipiqa, by name. Raises ValueError if one is missing."""

    def __init__(self, weights: dict[str, float], **models: nn.Module):
        if missing := weights.keys() - models.keys() - {"ssim", "dwt"}:
            raise ValueError(f"the rewards {missing} need their models")
        self.weights, self.models = weights, models
        maps = {"ssim": lambda x, y: [ssim_map(x, y)], "dwt": lambda x, y: [dwt_map(x, y)],
                **{name: model.maps for name, model in models.items()}}
        self.maps = {name: maps[name] for name in weights}

    def __call__(self, x: Tensor, gt: Tensor, g: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, 3, H, W), H and W at least 16 (32 for CLIP-IQA) -> R of each of g x g patches,
        (B, g, g), whose mean is R of the image; and each term of the image (B,), not weighted,
        float32. x is clamped to [-1, 1] here. Raises UserError if the images are smaller."""
        if min(x.shape[-2:]) < MIN_SIDE:
            raise UserError(f"--size: the rewards need images of {MIN_SIDE} px or more")
        x, R, terms = x.float().clamp(-1, 1), 0, {}
        for name, weight in self.weights.items():
            maps = self.maps[name](x, gt)                               # (B, h, w) each
            terms[name] = sum(m.mean(dim=(1, 2)) for m in maps)         # (B,)
            R = R + weight * sum(patch_means(m, g) for m in maps)       # (B, g, g)
        return R, terms


def patch_means(values: Tensor, g: int) -> Tensor:
    """The means of a map (B, h, w) over g x g patches, (B, g, g). Where g does not divide h the
    patches overlap or repeat; a constant then keeps their mean equal to the map's."""
    patches = F.adaptive_avg_pool2d(values, g)
    return patches + (values.mean(dim=(1, 2)) - patches.mean(dim=(1, 2)))[:, None, None]


def load_reward(weights: dict[str, float], files, face: nn.Module = None, device="cpu"):
    """The CompositeReward with the models that `weights` names. `files` has the paths that the
    command line gave for them (`support.cli.ModelSettings`); `face` is the Face Reward Model, from
    `frm.load_face_reward`. Raises UserError if a model cannot be had."""
    models = {name: make(files) for name, make in MODELS.items() if name in weights}
    if "face" in weights:
        models["face"] = face.eval().requires_grad_(False)
    return CompositeReward(weights, **{name: model.to(device) for name, model in models.items()})
