"""Identity on real faces: the distance of dlib's 128 numbers of a face (King 2017).

Its authors take two photos of .6 or less apart for one person. They mean faces of 150 px: at 64 px
even another person's face is only about .7 away, and a blurred one .5 from itself. Therefore a
second number is reported, the share of faces that are nearer to themselves than to any other.
`pip install dlib-bin face-recognition-models` brings the weights; their licence is CC0.
"""
import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from support.cli import UserError
from support.data import to_uint8

CENTRE, SIDE = (.5, .6), .67    # ours: of the face in CelebA's aligned photos, in sides of a square
CHIP = 150                      # dlib: the side of its input, px
WEIGHTS = "models/dlib_face_recognition_resnet_model_v1.dat"


class Identity:
    """The judge of restorations whose ground truth is gt (N, 3, S, S). Raises UserError if dlib or
    its weights are not installed."""

    def __init__(self, gt: Tensor):
        try:
            import dlib     # the package of the weights is not imported: it needs an old setuptools
            home = importlib.util.find_spec("face_recognition_models").submodule_search_locations[0]
        except (ImportError, AttributeError):       # AttributeError: there is no such package
            raise UserError("--identity: dlib or its weights are not installed; "
                            "pip install dlib-bin face-recognition-models") from None
        self.net = dlib.face_recognition_model_v1(str(Path(home) / WEIGHTS))
        self.gt = self.numbers(gt)

    def numbers(self, x: Tensor) -> Tensor:
        """dlib's numbers of the central faces of x (N, 3, S, S) in [-1, 1]: (N, 128)."""
        side = round(SIDE * x.shape[-1])
        left, top = (round((c - SIDE / 2) * x.shape[-1]) for c in CENTRE)
        x = x[..., top:top + side, left:left + side].float().cpu()      # (N, 3, side, side)
        chips = to_uint8(F.interpolate(x, CHIP, mode="bicubic")).movedim(1, 3).contiguous().numpy()
        return torch.from_numpy(np.array([self.net.compute_face_descriptor(c) for c in chips]))

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Of restorations x (N, 3, S, S) the distance from their own ground truth, and whether it
        is the nearest of all (rank-1, 0 or 1): (N,) each."""
        d = torch.cdist(self.numbers(x), self.gt)                       # (N, N)
        return {"identity": d.diag(), "rank1": (d.argmin(dim=1) == torch.arange(len(d))).float()}
