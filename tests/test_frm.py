"""The Face Reward Model: its loss, its pairs, and that it learns."""
import numpy as np
import torch

from frm import FaceRewardModel, FaceRewardTraining, graded, pair_loss
from rewards import psnr
from test_rewards import images


def test_pair_loss_is_bradley_terry():
    a, b = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])
    want = -torch.log(torch.exp(a) / (torch.exp(a) + torch.exp(b))).mean()
    torch.testing.assert_close(pair_loss(a, b), want)


def test_graded_makes_the_second_worse():
    gt = images(0, n=32).clamp(-1, 1)
    mild, heavy = graded(gt, np.random.default_rng(0))
    assert (psnr(mild, gt) > psnr(heavy, gt)).float().mean() > 0.9


def test_face_reward_model_learns_to_order_pairs():
    torch.manual_seed(0)
    gt = torch.cat([images(s, n=16) for s in range(4)]).clamp(-1, 1)
    lq = torch.nn.functional.avg_pool2d(gt, 3, 1, 1)
    face = FaceRewardModel()
    training = FaceRewardTraining(face, torch.Generator().manual_seed(0), lq, gt, lr=1e-3)
    for _ in range(30):
        stats = training.step((lq[:16], gt[:16]))
    assert stats["accuracy_degraded"] > 0.95 and stats["accuracy_restored"] > 0.9
    held = images(9, n=16).clamp(-1, 1)
    assert (face.score(held) > face.score(torch.nn.functional.avg_pool2d(held, 3, 1, 1))).all()
    r = face(held)
    assert r.shape == (16,) and 0 < r.min() and r.max() < 1
    order = face.score(held).argsort()
    assert torch.equal(order, r.argsort())      # squashing keeps the order
