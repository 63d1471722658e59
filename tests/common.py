"""What the tests of whole runs share: a tiny network, tiny presets, and the comparison of runs."""
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import build
import settings
import train

SMALL = ["--size", "16", "--channels", "8", "--mults", "1,2", "--batch_size", "4",
         "--device", "cpu", "--ddim_steps", "3", "--every", "3"]


def run(mode, out, *more, steps=3):
    train.main(["--mode", mode, "--out", str(out), "--steps", str(steps), *SMALL, *more])
    return torch.load(out / "last.pt", weights_only=True)


@contextmanager
def small_presets():
    """Data sets, rollouts and measurements as small as they come."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "VALIDATION", 8)
        patch.setattr(build, "RESTORED_PAIRS", 8)
        patch.setitem(settings.PRESETS, "tiny", quick_preset("offline"))
        yield


def quick_preset(rewards):
    tiny = settings.PRESETS["tiny"] | {"group": 2, "faces": 24, "rewards": rewards}
    return {name: value | {"steps": 3, "batch_size": 4, "every": 3} if isinstance(value, dict)
            else value for name, value in tiny.items()}


def same(a, b, where=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            same(*pair, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def gradient(height=64, width=64):
    """Smooth colours in which left, right, top and bottom all differ: uint8 (H, W, 3)."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / (width - 1), 255 * y / (height - 1), 255 * (x + y)
                     / (height + width - 2)], axis=-1).round().astype(np.uint8)
