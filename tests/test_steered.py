"""The default recipe: branch, posterior and steering, each against what it claims to equal."""
import math

import pytest
import torch

from lrpo import LRPO
from model import EVAL_ETA, Config, Diffusion, UNet
from rewards import psnr
from steered import FIRST_WEIGHT, Multiplier, SteeredLRPO, SteeredSettings


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def brightness(x, gt):
    r = x.mean(dim=(1, 2, 3))
    return r, {"brightness": r}


def make(seed=0, **changes):
    torch.manual_seed(seed)
    net = UNet(Config(size=16, channels=8, mults=(1, 2), patch=2))
    torch.nn.init.normal_(net.head[-1].weight, std=0.05)
    settings = SteeredSettings(**dict(ddim_steps=4, group=3, lr=1e-4) | changes)
    return SteeredLRPO(net, Diffusion(net.config), brightness, torch.Generator().manual_seed(seed),
                       settings)


BATCH = (noise(1, 2, 3, 16, 16).clamp(-1, 1), noise(2, 2, 3, 16, 16).clamp(-1, 1))
GROUPS = [0, 0, 0, 1, 1, 1]


def test_branched_members_differ_in_the_noise_of_the_last_step_only():
    """The whole rollout again, from the same generator: every member a trajectory of the policy."""
    method = make()
    restored, (step,) = method.rollout(BATCH[0][GROUPS])
    generator, lq = torch.Generator().manual_seed(0), BATCH[0][GROUPS]
    draw = lambda n: torch.randn(n, 3, 16, 16, generator=generator)
    x, shared = draw(2)[GROUPS], [draw(2)[GROUPS] for _ in range(2)]
    for (t, s), z in zip(method.schedule, [*shared, draw(6), None]):
        with torch.no_grad():
            mu, sigma, _ = LRPO.policy(method, x, lq, t, s)
        if (t, s) == (step.t, step.s):
            torch.testing.assert_close(step.x, x, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(step.action, mu + sigma * z, rtol=1e-4, atol=1e-5)
            want = torch.distributions.Normal(mu, sigma.float()).log_prob(step.action).mean(
                dim=(1, 2, 3))
            torch.testing.assert_close(step.log_prob, want, rtol=1e-4, atol=1e-5)
        x = mu if z is None else mu + sigma * z
    torch.testing.assert_close(restored, x, rtol=1e-4, atol=1e-5)
    assert (step.t, step.s) == method.schedule[-2]
    assert not torch.allclose(restored[0], restored[1], atol=1e-3)


def test_one_call_for_a_group_gives_the_gradient_of_a_call_for_each_member():
    method = make()
    x, lq, weights = noise(3, 2, 3, 16, 16)[GROUPS], BATCH[0][GROUPS], noise(4, 6, 3, 16, 16)
    gradients = []
    for policy in (method.policy, super(SteeredLRPO.__mro__[1], method).policy):
        mu, _, _ = policy(x, lq, *method.branch)
        g = torch.autograd.grad((mu * weights).sum(), method.net.parameters())
        gradients.append(torch.cat([u.flatten() for u in g]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5 * gradients[0].abs().max().item())


def test_branch_off_is_the_plain_rollout():
    method = make(branch="off")
    plain = LRPO(method.net, method.diffusion, brightness, torch.Generator().manual_seed(0),
                 method.settings)
    for mine, theirs in zip(method.rollout(BATCH[0])[1], plain.rollout(BATCH[0])[1], strict=True):
        assert torch.equal(mine.action, theirs.action)
        assert torch.equal(mine.log_prob, theirs.log_prob)


def test_posterior_target_is_minus_the_kl_from_ddpms_posterior():
    method = make(branch="off")
    for step in method.rollout(BATCH[0])[1]:
        mu, sigma, _ = method.policy(step.x, BATCH[0], step.t, step.s)
        a, prev = method.diffusion.abar[step.t].item(), method.diffusion.abar[step.s].item()
        alpha = a / prev                                            # DDPM eq. 6 and 7
        mean = math.sqrt(prev) * (1 - alpha) * BATCH[1] + math.sqrt(alpha) * (1 - prev) * step.x
        mean, std = mean / (1 - a), math.sqrt((1 - prev) / (1 - a) * (1 - alpha))
        kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std),
                                               torch.distributions.Normal(mu, sigma.float()))
        torch.testing.assert_close(method.gt_log_prob(step, BATCH[1], mu, sigma),
                                   -kl.mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-5)


def test_the_fidelity_gap_is_a_difference_of_psnr_under_equal_noise():
    method = make()
    assert method.fidelity_gap(*BATCH) == 0         # the policy is still its own reference
    with torch.no_grad():
        for p in method.net.parameters():
            p += 0.02 * noise(p.numel(), *p.shape)
    method.generator.manual_seed(7)
    gap = method.fidelity_gap(*BATCH)
    restored = [method.diffusion.sample(net, BATCH[0], 4, EVAL_ETA,
                                        torch.Generator().manual_seed(7))
                for net in (method.net, method.reference)]
    want = [psnr(x, BATCH[1]).mean().item() for x in restored]
    assert gap == pytest.approx(want[0] - want[1], abs=1e-4) and gap != 0


def simulate(multiplier, rollouts, slope=0.02, noise_std=0.03):
    """A policy whose PSNR drifts by slope * log(weight / 10) a rollout, measured with noise: it
    loses fidelity below a weight of 10 and gains above. The model is ours and rough; what it asks
    is whether the control loop is stable with an integrating plant."""
    gap, gaps, generator = 0.0, [], torch.Generator().manual_seed(0)
    for _ in range(rollouts):
        gap += slope * math.log(multiplier.weight / 10)
        gaps.append(gap)
        multiplier.update(gap + noise_std * torch.randn((), generator=generator).item())
    return torch.tensor(gaps)


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_steering_settles_at_the_margin_with_little_overshoot(margin):
    multiplier = Multiplier(margin)
    gaps = simulate(multiplier, 200)
    assert (gaps[100:].mean() + margin).abs() < 0.03
    assert gaps.min() > -margin - 0.15 and 5 < multiplier.weight < 20


def test_the_weight_rises_below_the_margin_falls_above_it_and_is_bounded():
    multiplier = Multiplier(0.1)
    multiplier.update(-0.1)
    assert multiplier.weight == FIRST_WEIGHT        # exactly as faithful as was asked for
    multiplier.update(-0.2)
    assert multiplier.weight > FIRST_WEIGHT
    for gap in (-50.0, 50.0):
        for _ in range(300):
            multiplier.update(gap)
        assert 0.0099 < multiplier.weight / FIRST_WEIGHT < 100.1
    assert multiplier.weight < FIRST_WEIGHT


def test_a_fixed_weight_is_not_steered_and_auto_is():
    fixed, auto = make(gt_weight=2.5), make()
    seen = [(auto.step(BATCH)["gt_weight"], fixed.step(BATCH) and fixed.gt_weight)
            for _ in range(3)]
    assert [weight for _, weight in seen] == [2.5] * 3
    assert seen[0][0] == FIRST_WEIGHT != seen[2][0]


def test_the_ratio_is_one_before_the_first_update_and_the_reward_rises():
    method = make(gt_weight=0.0, group=16, lr=1e-3)     # `update` raises if the ratio is off 1
    history = [method.step(BATCH)["reward"] for _ in range(12)]
    assert sum(history[-3:]) / 3 > sum(history[:3]) / 3 + 0.01


def test_its_state_carries_reference_and_multiplier():
    method, other = make(), make(seed=1)
    method.step(BATCH)
    other.load_state_dict(method.state_dict())
    assert other.multiplier.weight == method.multiplier.weight != FIRST_WEIGHT
    assert all(torch.equal(a, b) for a, b in zip(other.reference.parameters(),
                                                 method.reference.parameters()))
