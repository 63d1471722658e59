"""The Face Reward Model: a network learns from pairs what a good face looks like.

Paper    DiffusionReward (Wu et al. 2025, arXiv 2505.17910): preference pairs, the pair loss.
Departs  A small network without text, trained here in a minute on pairs whose order is known.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import degrade, draw_degradation, to_float, to_uint8
from model import norm


class FaceRewardModel(nn.Module):
    """A no-reference score of a face (B, 3, H, W); at least 16 px a side, any size above.

    `score` is the Bradley-Terry strength, in logits. The pair loss fixes only differences, so the
    reward is the score standardised over training pictures (`calibrate`) and squashed: (0, 1).
    """
    WIDTHS = (32, 64, 96, 128)      # ours: 0.2 M parameters learn in a minute on two cores

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

    def score(self, x: Tensor) -> Tensor:
        return self.out(self.features(x).mean(dim=(2, 3)))[:, 0]        # (B,)

    def forward(self, x: Tensor, y: Tensor = None) -> Tensor:
        return torch.sigmoid((self.score(x) - self.mean) / self.std)    # (B,)

    @torch.no_grad()
    def calibrate(self, scores: Tensor):
        """Keep a running mean and spread of the scores, over some twenty batches (ours)."""
        self.mean.lerp_(scores.mean(), 1 / 20)
        self.std.lerp_(scores.std(), 1 / 20)


def pair_loss(better: Tensor, worse: Tensor) -> Tensor:
    """-log P(better preferred to worse) under Bradley and Terry, from two scores (B,): a scalar."""
    return F.softplus(worse - better).mean()


class FaceRewardTraining:
    """Teaches a FaceRewardModel pairs whose order is known: a photo is better than its degraded
    self, a mild degradation better than a heavy one, a photo better than its restoration.

    `restored`, `photos`: (N, 3, H, W) each, restorations by the model to be rewarded.
    """

    def __init__(self, model: FaceRewardModel, generator: torch.Generator, restored: Tensor,
                 photos: Tensor, lr=1e-3):
        self.net, self.generator, self.restored, self.photos = model, generator, restored, photos
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)

    def pairs(self, lq: Tensor, gt: Tensor):
        """Three kinds of (better, worse), each (B, 3, H, W)."""
        pick, seed = (torch.randint(n, (k,), generator=self.generator)
                      for n, k in ((len(self.photos), len(gt)), (2 ** 31, 1)))
        mild, heavy = graded(gt, np.random.default_rng(seed.item()))
        return {"degraded": (gt, lq), "graded": (mild, heavy),
                "restored": (self.photos[pick], self.restored[pick])}

    def step(self, batch) -> dict[str, float]:
        pairs = self.pairs(*batch)
        scores = {kind: (self.net.score(a), self.net.score(b)) for kind, (a, b) in pairs.items()}
        loss = sum(pair_loss(a, b) for a, b in scores.values()) / len(scores)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.net.calibrate(torch.cat([s for pair in scores.values() for s in pair]).detach())
        return {"loss": loss.item(), **{f"accuracy_{kind}": (a > b).float().mean().item()
                                        for kind, (a, b) in scores.items()}}


def graded(gt: Tensor, rng) -> tuple[Tensor, Tensor]:
    """The same photos, each degraded from the milder and from the heavier half of the ranges."""
    def spoil(lo, hi):
        return torch.stack([degrade(photo, draw_degradation(rng, gt.shape[-1], lo, hi), rng)
                            for photo in to_uint8(gt).cpu()])
    return tuple(to_float(spoil(*half)).to(gt.device) for half in ((0.0, 0.5), (0.5, 1.0)))
