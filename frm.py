"""The Face Reward Model: a network learns from pairs what a good face looks like.

Paper    DiffusionReward (Wu et al. 2025, arXiv 2505.17910): preference pairs, the pair loss, and
         `ClipFaceRewardModel`, CLIP ViT-H-14 tuned on people's preferences (HPSv2's, to start).
Departs  Ours by default is a small network without text, trained here in a minute on pairs whose
         order is known. For CLIP one sentence (`CAPTION`) stands in for a caption of each photo.
Found    (docs/results.md) Taught by blurred and compressed pictures alone, it puts a photo with
         grain on it above the photo in 99 of 100 pairs. Hence `spoil`, which mends that; a policy
         gradient or ReFL with nothing to hold it still fools the model.

Both models have one interface: `score(x)` is the Bradley-Terry strength in logits, (B,), which the
pair loss compares; calling the model gives the reward, (B,), higher better.
Pairs whose order is not known are labelled in labels.py: python frm.py --ckpt runs/sft/last.pt
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipiqa import build_clip, normalise
from data import UserError, degrade, draw_degradation, run_main, to_float, to_uint8
from model import gaussian, load_tensors, norm


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

    def trained(self) -> list[nn.Parameter]:
        """What a reward model's training may move."""
        return list(self.parameters())

    def score(self, x: Tensor) -> Tensor:
        return self.out(self.features(x).mean(dim=(2, 3)))[:, 0]        # (B,)

    def forward(self, x: Tensor, y: Tensor = None) -> Tensor:
        return torch.sigmoid((self.score(x) - self.mean) / self.std)    # (B,)

    @torch.no_grad()
    def calibrate(self, scores: Tensor):
        """Keep a running mean and spread of the scores, over some twenty batches (ours)."""
        self.mean.lerp_(scores.mean(), 1 / 20)
        self.std.lerp_(scores.std(), 1 / 20)


CLIP_ARCHITECTURE = "ViT-H-14"          # HPSv2's, and so DiffusionReward's
TRAINED_IMAGE, TRAINED_TEXT = 20, 11    # DiffusionReward: the last blocks of each tower train
CAPTION = "a clear, natural photo of a face"     # ours: no captions here; the paper has one a photo


class ClipFaceRewardModel(nn.Module):
    """The papers' model: the cosine of picture and caption embedding, (B,) in [-1, 1].

    `clip`: a CLIP with a ViT, from `build_clip`. Pictures of any size are resized to its own.
    """

    def __init__(self, clip: nn.Module):
        super().__init__()
        import open_clip
        self.clip = clip.requires_grad_(False)
        tokens = open_clip.get_tokenizer(CLIP_ARCHITECTURE)([CAPTION], clip.context_length)
        self.register_buffer("tokens", tokens, persistent=False)        # (1, 77)

    def forward(self, x: Tensor, y: Tensor = None) -> Tensor:
        x = F.interpolate(normalise(x), self.clip.visual.image_size, mode="bicubic", antialias=True)
        image = self.clip.encode_image(x, normalize=True)               # (B, E)
        text = self.clip.encode_text(self.tokens, normalize=True)       # (1, E)
        return (image * text).sum(dim=1)                                # (B,)

    def trained(self) -> list[nn.Parameter]:
        blocks = (self.clip.visual.transformer.resblocks[-TRAINED_IMAGE:],
                  self.clip.transformer.resblocks[-TRAINED_TEXT:])
        return [p for part in blocks for p in part.parameters()]

    def score(self, x: Tensor) -> Tensor:
        return self.clip.logit_scale.exp() * self(x)                    # (B,)

    def calibrate(self, scores: Tensor):
        """Nothing to do: a cosine has its range already."""


def load_face_reward(path, config: dict = None, size: int = None) -> nn.Module:
    """The model that a file holds: one of ours (--mode frm), or the published FaceRewardModel.pth,
    a dict whose `state_dict` is an open_clip model's. `config`: of a CLIP other than ViT-H-14.
    `size`: of the pictures to be judged, in pixels; ours must have been trained at that size."""
    remedy = "train one with train.py --mode frm, or use --rewards ssim=.5,dwt=.5"
    source, state = f"--frm_weights {path}", load_tensors(path, "--frm_weights", remedy)
    ours = isinstance(state, dict) and state.get("mode") == "frm"
    weights = state["ema"] if ours else isinstance(state, dict) and state.get("state_dict")
    if not isinstance(weights, dict):
        raise UserError(f"{source}: not a checkpoint of --mode frm, nor a published one; {remedy}")
    if ours and "out.weight" in weights:
        if size not in (None, state["args"]["size"]):
            raise UserError(f"{source}: trained on {state['args']['size']} px, not {size} px; give "
                            "its --size, name another, or train anew (--mode frm --overwrite)")
        face = FaceRewardModel()
        face.load_state_dict(weights)
        return face
    if config is None:
        import open_clip
        config = open_clip.get_model_config(CLIP_ARCHITECTURE)
    weights = {name.removeprefix("clip."): v for name, v in weights.items()}
    return ClipFaceRewardModel(build_clip(config, weights, source))


def pair_loss(better: Tensor, worse: Tensor) -> Tensor:
    """-log P(better preferred to worse) under Bradley and Terry, from two scores (B,): a scalar."""
    return F.softplus(worse - better).mean()


class FaceRewardTraining:
    """Teaches a FaceRewardModel pairs whose order is known: a photo is better than its degraded
    self, a mild degradation better than a heavy one, a photo better than its restoration, and
    photo or restoration better than itself with grain or a cast on it.

    `restored`, `photos`: (N, 3, H, W) each, restorations by the model to be rewarded.
    `labelled`: (better, worse), (M, 3, H, W) each, pairs that a person or an SVM put in order.
    """

    def __init__(self, model: nn.Module, generator: torch.Generator, restored: Tensor,
                 photos: Tensor, lr=1e-3, labelled: tuple[Tensor, Tensor] = None):
        self.net, self.generator, self.restored, self.photos = model, generator, restored, photos
        self.labelled = labelled
        trained = [p.requires_grad_() for p in model.trained()]
        self.optimizer = torch.optim.AdamW(trained, lr=lr, fused=True)

    def pairs(self, lq: Tensor, gt: Tensor):
        """Four or five kinds of (better, worse), each (B, 3, H, W)."""
        pick, seed = (torch.randint(n, (k,), generator=self.generator)
                      for n, k in ((len(self.photos), len(gt)), (2 ** 31, 1)))
        mild, heavy = graded(gt, np.random.default_rng(seed.item()))
        clean = torch.cat([gt[::2], self.restored[pick][1::2]])
        kinds = {"degraded": (gt, lq), "graded": (mild, heavy),
                 "restored": (self.photos[pick], self.restored[pick]),
                 "spoilt": (clean, spoil(clean, self.generator))}
        if self.labelled:
            pick = torch.randint(len(self.labelled[0]), (len(gt),), generator=self.generator)
            kinds["labelled"] = tuple(u[pick] for u in self.labelled)
        return kinds

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


GRAIN, CAST = 30 / 255, 0.15    # ours: standard deviations at full strength, of a range of 1


def spoil(x: Tensor, generator: torch.Generator) -> Tensor:
    """Grain or a colour cast over the picture, of random strength (ours). The blind degradation
    blurs and enlarges, so that whoever knows only that takes grain for detail."""
    coin, strength = torch.rand(2, len(x), 1, 1, 1, generator=generator).to(x.device)
    grain = GRAIN * gaussian(x, generator)
    cast = CAST * gaussian(x[:, :, :1, :1], generator)                  # (B, 3, 1, 1)
    return (x + 2 * strength * torch.where(coin < 0.5, grain, cast)).clamp(-1, 1)


def graded(gt: Tensor, rng) -> tuple[Tensor, Tensor]:
    """The same photos, each degraded from the milder and from the heavier half of the ranges."""
    photos, size = to_uint8(gt).cpu(), gt.shape[-1]
    return tuple(to_float(torch.stack([degrade(photo, draw_degradation(rng, size, lo, hi), rng)
                                       for photo in photos])).to(gt.device)
                 for lo, hi in ((0.0, 0.5), (0.5, 1.0)))


if __name__ == "__main__":
    from labels import main     # not above: it needs the rewards, and they need this file
    run_main(main)
