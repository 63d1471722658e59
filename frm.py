"""The Face Reward Model: a network learns from pairs of pictures what a good face looks like.

Paper    DiffusionReward (Wu et al. 2025, arXiv 2505.17910): preference pairs, the pair loss, labels
         in two stages, and CLIP ViT-H-14 tuned on preferences (`ClipFaceRewardModel`).
Steps    of the training:
         1. Make pairs (better, worse) whose order is known.              `preference_pairs`
         2. Optionally let an SVM label pairs whose order is not known.   support/labels.py
         3. Raise the score of the better picture over the other's.       `pair_loss`
Departs  Ours by default is a small network without text, trained here in minutes. For CLIP one
         sentence (`CAPTION`) stands in for a caption of each photo.
Found    Trained on blurred and compressed pictures alone, the model takes noise for detail (see the
         tests); `add_artefacts` corrects this. Still, a policy gradient without regularisation
         hacks the model (docs/results.md), and so does its gradient alone (the notebook).

Both models have one interface: `score(x)` is the Bradley-Terry score in logits, (B,), which the
pair loss compares. Calling the model gives the reward, (B,), higher is better.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import norm, restore
from rewards import dwt, normalise, psnr, ssim
from support.checkpoint import check_finished, load_run, load_tensors
from support.cli import UserError, policy_eta, setting
from support.data import Photos, pairs
from support.distributed import gaussian, uniform, uniform_integers
from support.log import to_floats
from support.optimise import optimiser_step


class FaceRewardModel(nn.Module):
    """Our no-reference score of a face, a small convolutional network.

    The pair loss fixes only differences of scores. So the reward is the score, standardised over
    the training pictures (`calibrate`) and squashed by a sigmoid: (0, 1).
    """
    WIDTHS = (32, 64, 96, 128)      # ours: 0.2 M parameters, which learn in minutes on two cores

    def __init__(self):
        super().__init__()
        layers, cin = [], 3
        for width in self.WIDTHS:
            layers += [nn.Conv2d(cin, width, 3, padding=1), norm(width), nn.SiLU(),
                       nn.AvgPool2d(2)]
            cin = width
        self.features = nn.Sequential(*layers)
        self.out = nn.Linear(cin, 1)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def trained(self) -> list[nn.Parameter]:
        """The parameters that training may change."""
        return list(self.parameters())

    def score_map(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1], H and W at least 16 -> (B, H/16, W/16), in logits."""
        return self.out(self.features(x).movedim(1, 3))[..., 0]

    def score(self, x: Tensor) -> Tensor:
        """The mean of `score_map`: x (B, 3, H, W) -> (B,)."""
        return self.score_map(x).mean(dim=(1, 2))

    def maps(self, x: Tensor, y: Tensor = None) -> list[Tensor]:
        """One map whose mean is the reward: x (B, 3, H, W) -> (B, H/16, W/16). The sigmoid is taken
        to first order around the mean score. y is not used."""
        z = (self.score_map(x) - self.mean) / self.std
        centre = z.mean(dim=(1, 2), keepdim=True)
        reward = torch.sigmoid(centre)                                  # (B, 1, 1)
        return [reward + reward * (1 - reward) * (z - centre)]

    def forward(self, x: Tensor, y: Tensor = None) -> Tensor:
        """The reward of x (B, 3, H, W) in [-1, 1]: (B,) in (0, 1). y is not used."""
        return torch.sigmoid((self.score(x) - self.mean) / self.std)

    @torch.no_grad()
    def calibrate(self, scores: Tensor):
        """Running mean and standard deviation of the scores (B,), over about 20 batches (ours)."""
        self.mean.lerp_(scores.mean(), 1 / 20)
        self.std.lerp_(scores.std(), 1 / 20)


CLIP_ARCHITECTURE = "ViT-H-14"          # HPSv2's, and so DiffusionReward's
IMAGE_GROUPS, TEXT_GROUPS = 20, 11      # DiffusionReward: unlocked, a projection or a block each
CAPTION = "a clear, natural photo of a face"    # ours: the paper has a caption for each photo


class ClipFaceRewardModel(nn.Module):
    """The papers' model: the cosine of the image's and the caption's embeddings.

    `clip` is a CLIP with a ViT, from `build_clip`. Images are resized to CLIP's input size
    bilinearly and without antialiasing, as the published code resizes tensors.
    """

    def __init__(self, clip: nn.Module):
        super().__init__()
        import open_clip
        self.clip = clip.requires_grad_(False)
        tokens = open_clip.get_tokenizer(CLIP_ARCHITECTURE)([CAPTION], clip.context_length)
        self.register_buffer("tokens", tokens, persistent=False)        # (1, 77)

    def forward(self, x: Tensor, y: Tensor = None) -> Tensor:
        """The reward of x (B, 3, H, W) in [-1, 1]: (B,) in [-1, 1]. y is not used."""
        x = F.interpolate(normalise(x), self.clip.visual.image_size, mode="bilinear")
        image = self.clip.encode_image(x, normalize=True)               # (B, E)
        text = self.clip.encode_text(self.tokens, normalize=True)       # (1, E)
        return (image * text).sum(dim=1)                                # (B,)

    def maps(self, x: Tensor, y: Tensor = None) -> list[Tensor]:
        """The reward, for the whole image: one map (B, 1, 1)."""
        return [self(x).view(-1, 1, 1)]

    def trained(self) -> list[nn.Parameter]:
        """The parameters that training may change: what open_clip's lock functions leave, called as
        in the published code. That is the last blocks, norms and projections of both towers, and
        logit_scale. None has requires_grad afterwards."""
        self.clip.requires_grad_(True)
        self.clip.lock_image_tower(IMAGE_GROUPS)
        self.clip.lock_text_tower(TEXT_GROUPS)
        found = [p for p in self.clip.parameters() if p.requires_grad]
        self.clip.requires_grad_(False)
        return found

    def score(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> (B,), in logits."""
        return self.clip.logit_scale.exp() * self(x)

    def calibrate(self, scores: Tensor):
        """Does nothing: a cosine has its range already."""


def build_clip(config: dict, state: dict, source: str) -> nn.Module:
    """open_clip's CLIP of this config with exactly the tensors of `state`, frozen, in float32.
    Raises UserError, naming `source`, if names or shapes differ."""
    import open_clip
    clip = open_clip.CLIP(**config)
    try:
        clip.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, AttributeError):       # names, shapes, or no tensors at all
        raise UserError(f"{source}: not the weights of this CLIP, or not all of them; "
                        "--rewards offline needs none") from None
    return clip.float().eval().requires_grad_(False)


def load_face_reward(path, config: dict = None, size: int = None) -> nn.Module:
    """The model in a file: one of ours (--mode frm), or the published FaceRewardModel.pth, a dict
    whose `state_dict` is an open_clip model's. Raises UserError if the file is neither.

    `config`: of a CLIP other than ViT-H-14. `size`: side of the images to be scored, in pixels;
    Raises UserError if a model of ours was trained at another size."""
    remedy = "train one with train.py --mode frm, or use --rewards ssim=.5,dwt=.5"
    source, state = f"--frm_weights {path}", load_tensors(path, "--frm_weights", remedy)
    ours = isinstance(state, dict) and state.get("mode") == "frm"
    weights = state.get("ema") if ours else isinstance(state, dict) and state.get("state_dict")
    if not isinstance(weights, dict):
        raise UserError(f"{source}: not a checkpoint of --mode frm, nor a published one; {remedy}")
    if ours and "out.weight" in weights:
        check_finished(load_run(path, "--frm_weights", remedy), path, "--frm_weights")
        if size not in (None, state["args"]["size"]):
            raise UserError(f"{source}: trained on {state['args']['size']} px, not {size} px; "
                            "name another, or train anew (--mode frm --overwrite)")
        face = FaceRewardModel()
        try:
            face.load_state_dict(weights)
        except (RuntimeError, AttributeError):      # names or shapes that differ
            raise UserError(f"{source}: a damaged checkpoint; {remedy}") from None
        return face
    weights = {name.removeprefix("clip."): v for name, v in weights.items()}
    if "visual.proj" not in weights:        # before ViT-H-14 takes 4 GB
        raise UserError(f"{source}: not a face reward model; {remedy}")
    if config is None:
        import open_clip
        config = open_clip.get_model_config(CLIP_ARCHITECTURE)
    return ClipFaceRewardModel(build_clip(config, weights, source))


def pair_loss(better: Tensor, worse: Tensor) -> Tensor:
    """-log P(better preferred to worse) in the Bradley-Terry model, P = sigmoid(better - worse),
    from scores (B,): the mean over the pairs, a scalar."""
    return F.softplus(worse - better).mean()


@dataclass
class FRMSettings:
    """Default, published value and meaning."""
    steps: int = setting(200, None, "optimiser steps in all")
    batch_size: int = setting(32, None, "images in a step")
    lr: float = setting(1e-3, None, "learning rate of AdamW")
    every: int = setting(50, None, "steps between measurements, with checkpoints")
    frm_weights: str = setting(None, None, "model to start from; left out: a new one of ours")
    eta: float = setting(1.0, None, "DDIM noise of the restorations in the pairs", type=policy_eta)
    labels: str = setting("known", None, "known (pairs of known order), svm (also pairs that an "
                          "SVM labels), or a CSV file of a person's labels, which train the SVM")


class FaceRewardTraining:
    """Trains a Face Reward Model (mode frm). One `step` is one optimiser step on pairs whose order
    is known, or labelled.

    `restored` and `photos` (N, 3, H, W): restorations by the policy to be rewarded, and the photos.
    `labelled`: (better, worse), (M, 3, H, W) each, pairs that a person or an SVM has labelled.
    """

    def __init__(self, model: nn.Module, generator: torch.Generator, settings, restored: Tensor,
                 photos: Tensor, labelled: tuple[Tensor, Tensor] = None):
        self.net, self.generator, self.restored, self.photos = model, generator, restored, photos
        self.labelled = labelled
        trained = [p.requires_grad_() for p in model.trained()]
        self.optimizer = torch.optim.AdamW(trained, lr=settings.lr, fused=True)

    def preference_pairs(self, lq, gt, mild, heavy) -> dict[str, tuple[Tensor, Tensor]]:
        """From lq, gt and two degradations of gt, a milder and a heavier one, (B, 3, H, W) each:
        each kind of pair (better, worse), (B, 3, H, W) each."""
        pick = uniform_integers(len(self.photos), gt, self.generator)       # (B,)
        # Half photos, half restorations: artefacts must lower the score of both.
        clean = torch.cat([gt[::2], self.restored[pick][1::2]])
        kinds = {"degraded": (gt, lq), "graded": (mild, heavy),
                 "restored": (self.photos[pick], self.restored[pick]),
                 "artefacts": (clean, add_artefacts(clean, self.generator))}
        if self.labelled:
            pick = uniform_integers(len(self.labelled[0]), gt, self.generator)
            kinds["labelled"] = tuple(u[pick] for u in self.labelled)
        return kinds

    def step(self, batch) -> dict[str, float]:
        """batch = (lq, gt, mild, heavy), as for `preference_pairs`. Returns the loss, the norm of
        its gradient and the accuracy of each kind."""
        scores = {kind: (self.net.score(a), self.net.score(b))
                  for kind, (a, b) in self.preference_pairs(*batch).items()}
        loss = sum(pair_loss(a, b) for a, b in scores.values()) / len(scores)
        self.optimizer.zero_grad()
        loss.backward()
        norm = optimiser_step(self.optimizer)
        self.net.calibrate(torch.cat([s for pair in scores.values() for s in pair]).detach())
        right = {f"accuracy_{kind}": (a > b).float().mean() for kind, (a, b) in scores.items()}
        return to_floats({"loss": loss.detach(), "grad_norm": norm} | right)


NOISE, CAST = 30 / 255, 0.15    # ours: standard deviations at full strength, for images in [0, 1]


def add_artefacts(x: Tensor, generator: torch.Generator) -> Tensor:
    """Add noise or a colour cast of random strength to images (B, 3, H, W) in [-1, 1] (ours). The
    blind degradation only blurs and enlarges: without these a model takes noise for detail."""
    coin, strength = (uniform(x, generator).view(-1, 1, 1, 1) for _ in range(2))
    noise = NOISE * gaussian(x, generator)
    cast = CAST * gaussian(x[:, :, :1, :1], generator)                  # (B, 3, 1, 1)
    return (x + 2 * strength * torch.where(coin < 0.5, noise, cast)).clamp(-1, 1)


def metric_vector(x: Tensor, gt: Tensor = None) -> np.ndarray:
    """What the SVM compares of images (N, 3, H, W): (N, 6), without ground truth (N, 3).

    The log energy of the three finest octaves, which tells blur and noise, then SSIM, low-pass
    fidelity and PSNR. These metrics are ours; the paper uses others.
    """
    columns, fine = [], x
    for _ in range(3):
        coarse = F.avg_pool2d(fine, 2)
        detail = fine - F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear")
        columns.append((detail.square().mean(dim=(1, 2, 3)) + 1e-8).log())  # 1e-8: a flat image
        fine = coarse
    if gt is not None:
        columns += [ssim(x, gt), dwt(x, gt), psnr(x, gt)]
    return torch.stack(columns, dim=1).double().cpu().numpy()


def unknown_pairs(net, photos: Photos, n: int, K: int, eta: float, seed: int):
    """Pairs whose order is not known: a, b, gt, at most (n, 3, H, W) each. n photos are degraded
    twice and restored by `net` in K steps."""
    index = np.random.default_rng(seed).permutation(len(photos))[:n]
    device, both = next(net.parameters()).device, []
    for epoch in (0, 1):        # another epoch is another degradation of the same photo
        lq, gt = (u.to(device) for u in pairs(photos, index, seed, epoch))
        both.append(restore(net, lq, K, eta, seed + epoch))
    return both[0], both[1], gt
