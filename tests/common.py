"""What tests share: noise and a tiny network, runs of tiny presets, and the comparison of runs."""
import csv
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import settings
import train
from model import Config, UNet
from support.checkpoint import replacing
from support.log import Log

SMALL = ["--batch_size", "4", "--device", "cpu", "--ddim_steps", "3", "--every", "3"]


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(seed, n=2):
    """(lq, gt), each (n, 3, 16, 16) in [-1, 1]."""
    return tuple(noise(seed + i, n, 3, 16, 16).clamp(-1, 1) for i in (1, 2))


def tiny_net(seed=0):
    """A network of 16 px that answers something, which a fresh one does not."""
    torch.manual_seed(seed)
    net = UNet(Config(size=16, channels=8, mults=(1, 2), patch=2))
    torch.nn.init.normal_(net.head[-1].weight, std=0.05)
    return net


def parameters(net):
    return torch.cat([p.detach().flatten().clone() for p in net.parameters()])


class Reward:
    """A reward of one term for networks too small to restore anything: (B,) from score(x, gt), the
    same for each patch. `models` are looked up by name, as those of CompositeReward."""

    def __init__(self, score=lambda x, gt: x.mean(dim=(1, 2, 3)), **models):
        self.score, self.models = score, models

    def __call__(self, x, gt, g=1):
        r = self.score(x, gt)
        return r[:, None, None].expand(-1, g, g), {"score": r}


def run(mode, out, *more, steps=3):
    train.main(["--mode", mode, "--out", str(out), "--steps", str(steps), *SMALL, *more])
    return torch.load(out / "last.pt", weights_only=True)


def no_curves(log, path):
    """An empty file: to draw curves takes twice as long as a tiny run."""
    with replacing(path) as part:
        part.touch()


@contextmanager
def small_presets(rewards="offline"):
    """Networks, data sets, rollouts and measurements as small as they come."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "curves", no_curves)
        patch.setattr(settings, "VALIDATION", 8)
        patch.setattr(settings, "RESTORED_PAIRS", 8)
        patch.setitem(settings.PRESETS, "tiny", dict(
            size=16, channels=8, mults="1,2", faces=24, steps=3, batch_size=4, every=3, group=2,
            rewards=rewards))
        yield


def log_of(folder, but="seconds"):
    """The rows of metrics.csv, numbers by name, without the column `but`."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v and k != but}
                for row in csv.DictReader(file)]


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
