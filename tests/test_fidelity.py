"""Fidelity: the gap against PSNR written out, the multiplier against what it should settle at."""
import copy
import math

import pytest
import torch

from common import noise, pictures, tiny_net
from fidelity import FIRST_WEIGHT, GAP_IMAGES, Fidelity
from model import EVAL_ETA, Diffusion
from refl import GAIN


def make(seed=0, margin=0.1, gain=1.0):
    net = tiny_net(seed)
    return net, Fidelity(net, Diffusion(net.config), 4, margin, torch.Generator().manual_seed(7),
                         gain)


def test_the_gap_is_a_difference_of_psnr_under_equal_noise():
    net, fidelity = make()
    lq, gt = pictures(0, n=GAP_IMAGES + 2)
    assert fidelity.gap(net, lq, gt) == 0       # the policy is still its own reference
    start = copy.deepcopy(net)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.02 * noise(p.numel(), *p.shape)
    before = fidelity.generator.get_state()
    gap = fidelity.gap(net, lq, gt)
    psnr = []
    for policy in (net, start):
        x = fidelity.diffusion.sample(policy, lq[:GAP_IMAGES], 4, EVAL_ETA,
                                      torch.Generator().set_state(before))
        mse = ((x - gt[:GAP_IMAGES]).double() / 2).square().mean(dim=(1, 2, 3))
        psnr.append(10 * torch.log10(1 / mse).mean())
    assert gap == pytest.approx((psnr[0] - psnr[1]).item(), abs=1e-4) and gap != 0


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_steering_settles_at_the_margin_with_little_overshoot(margin):
    """A policy whose PSNR drifts by .02 log(weight / 10) a rollout, measured with noise: it loses
    fidelity below a weight of 10 and gains above. The model is rough; what it asks is whether the
    control loop is stable with an integrating plant."""
    _, fidelity = make(margin=margin)
    gap, gaps, generator = 0.0, [], torch.Generator().manual_seed(0)
    for _ in range(200):
        gap += 0.02 * math.log(fidelity.weight / 10)
        gaps.append(gap)
        fidelity.update(gap + 0.03 * torch.randn((), generator=generator).item())
    gaps = torch.tensor(gaps)
    assert (gaps[100:].mean() + margin).abs() < 0.03
    assert gaps.min() > -margin - 0.15 and 5 < fidelity.weight < 20


def test_a_smaller_gain_calms_a_quick_policy_that_follows_its_weight_late():
    """The same policy, but three times as quick, and three measurements late, as by the momentum of
    Adam: with a gain of 1 its PSNR swings for ever."""
    swing = {}
    for gain in (1.0, GAIN):
        _, fidelity = make(margin=0.0, gain=gain)
        gap, gaps, weights = -0.2, [], [10.0] * 3
        for _ in range(200):
            weights.append(fidelity.weight)
            gap += 0.06 * math.log(weights[-4] / 10)
            gaps.append(gap)
            fidelity.update(gap)
        swing[gain] = max(gaps[100:]) - min(gaps[100:])
    assert swing[1.0] > 0.5 and swing[GAIN] < 0.05


def test_the_weight_rises_below_the_margin_falls_above_it_and_is_bounded():
    _, fidelity = make(margin=0.1)
    assert fidelity.update(-0.1) == FIRST_WEIGHT == fidelity.weight     # as faithful as was asked
    assert fidelity.update(-0.2) == FIRST_WEIGHT < fidelity.weight      # returned: before the move
    for gap in (-50.0, 50.0):
        for _ in range(300):
            fidelity.update(gap)
        assert 0.0099 < fidelity.weight / FIRST_WEIGHT < 100.1
    assert fidelity.weight < FIRST_WEIGHT


def test_its_state_carries_reference_and_multiplier():
    (_, one), (net, other) = make(), make(seed=1)
    one.update(-0.5)
    other.load_state_dict(one.state_dict())
    assert other.weight == one.weight != FIRST_WEIGHT
    assert all(torch.equal(a, b) for a, b in zip(other.reference.parameters(),
                                                 one.reference.parameters()))
    assert not any(p.requires_grad for p in other.reference.parameters())
    assert all(p.requires_grad for p in net.parameters())
