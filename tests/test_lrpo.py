"""LRPO's arithmetic against torch.distributions, closed forms and the paper's figure."""
import math

import pytest
import torch

from lrpo import (LRPO, LRPOSettings, clipped_loss, gaussian_log_prob, group_advantages,
                  gt_likelihood_loss, noise_level_weights)
from model import Config, Diffusion, UNet


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def brightness(x, gt):
    """A reward with a part, for networks too small to restore anything."""
    r = -(x - gt).square().mean(dim=(1, 2, 3))
    return r, {"mse": r}


def make(seed=0, reward=brightness, **changes):
    torch.manual_seed(seed)
    net = UNet(Config(size=16, channels=8, mults=(1, 2), patch=2))
    torch.nn.init.normal_(net.head[-1].weight, std=0.05)
    settings = LRPOSettings(**dict(ddim_steps=4, group=3, updates=2, steps_per_update=0) | changes)
    return LRPO(net, Diffusion(net.config), reward, torch.Generator().manual_seed(seed), settings)


BATCH = (noise(1, 2, 3, 16, 16).clamp(-1, 1), noise(2, 2, 3, 16, 16).clamp(-1, 1))


def test_log_prob_is_the_mean_of_torch_distributions():
    x, mu, sigma = noise(0, 4, 3, 8, 8), noise(1, 4, 3, 8, 8), torch.rand(4, 1, 1, 1) + 0.1
    want = torch.distributions.Normal(mu, sigma).log_prob(x).mean(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian_log_prob(x, mu, sigma), want)
    assert gaussian_log_prob(x.bfloat16(), mu, sigma).dtype == torch.float32


def test_advantages_of_the_papers_figure():
    a = group_advantages(torch.tensor([[.47, .49, .62]]))
    assert [round(v, 2) for v in a[0].tolist()] == [-.85, -.55, 1.40]


def test_advantages_group_and_batch():
    r = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.1, 0.1]])
    torch.testing.assert_close(group_advantages(r, "group"),
                               torch.tensor([[-1., 1.], [-1., 1.], [0., 0.]]), rtol=1e-3, atol=0)
    std = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.1, 0.1]).std(correction=0)
    torch.testing.assert_close(group_advantages(r, "batch"), torch.tensor(
        [[-.5, .5], [-1.5, 1.5], [0., 0.]]) / (std + 1e-4))


def test_noise_level_weights_average_one_and_follow_sigma():
    w = noise_level_weights(torch.tensor([3.0, 2.0, 1.0]))
    assert w.mean() == 1 and w.tolist() == [1.5, 1.0, 0.5]
    lrpo = make()
    _, steps = lrpo.rollout(BATCH[0])
    abar = [lrpo.diffusion.abar[t].item() for t, _ in lrpo.schedule]
    sigma = torch.tensor([math.sqrt((1 - prev) / (1 - a) * (1 - a / prev))      # eta = 1
                          for a, prev in zip(abar, abar[1:])], dtype=torch.float64)
    torch.testing.assert_close(lrpo.step_weights(steps), sigma / sigma.mean(), rtol=1e-5,
                               atol=0)       # abar is float32
    assert torch.equal(make(noise_level_weights="off").step_weights(steps),
                       torch.ones(3, dtype=torch.float64))


def test_clipped_loss_is_ppos():
    """Gradient only where moving on would still be inside the trust region, by the sign of A."""
    for A, shift, moves in [(1, 0.0, True), (1, 0.2, False), (1, -0.2, True),
                            (-1, 0.0, True), (-1, 0.2, True), (-1, -0.2, False)]:
        lp = torch.tensor([shift], requires_grad=True)
        loss, ratio = clipped_loss(lp, torch.zeros(1), torch.tensor([float(A)]), clip=0.1)
        (g,) = torch.autograd.grad(loss.sum(), lp)
        assert ratio.item() == pytest.approx(math.exp(shift))
        assert g.item() == pytest.approx(-A * math.exp(shift) if moves else 0.0)
    assert 3 * 16 * 16 * make().clip == pytest.approx(4 * 64 * 64 * 1e-4, rel=2e-3)    # published


def test_gt_likelihood_is_bounded():
    lp = torch.tensor([-80.0, -4.0, -0.4, 0.0, 2.0])
    want = [1 - math.exp(-2), 1 - math.exp(-.1), 1 - math.exp(-.01), 0, 0]      # never negative
    torch.testing.assert_close(gt_likelihood_loss(lp), torch.tensor(want))


def test_policy_gradient_of_a_linear_gaussian_policy():
    """One step, mu = w c, R = x: at ratio 1 the loss' gradient is -mean(A d log pi / dw), whose
    expectation for A = R - mean is -dE[R]/dw = -c."""
    c, sigma, n = 0.7, 0.5, 200_000
    w = torch.tensor(0.3, requires_grad=True)
    mu = (w * c).expand(n, 1, 1, 1)
    x = (mu + sigma * noise(0, n, 1, 1, 1)).detach()
    log_prob = gaussian_log_prob(x, mu, torch.full((n, 1, 1, 1), sigma))
    A = x.flatten() - x.mean()
    loss, _ = clipped_loss(log_prob, log_prob.detach(), A, clip=0.1)
    (g,) = torch.autograd.grad(loss.mean(), w)
    exact = -(A * (x.flatten() - 0.3 * c) * c / sigma ** 2).mean()          # sample by sample
    torch.testing.assert_close(g, exact.float(), rtol=1e-3, atol=0)
    assert abs(g.item() + c) < 5 * c * math.sqrt(2 / n)                     # the closed form


def test_rollout_is_the_policys_and_groups_share_one_lq():
    lrpo, seen = make(), []
    lrpo.rollout = lambda lq, rollout=lrpo.rollout: (seen.append(lq), rollout(lq))[1]
    lrpo.step(BATCH)
    assert torch.equal(seen[0], BATCH[0][[0, 0, 0, 1, 1, 1]])
    restored, steps = make().rollout(seen[0])
    assert restored.shape == (6, 3, 16, 16) and len(steps) == 3     # sigma = 0 is left out
    assert (steps[-1].t, steps[-1].s) == lrpo.schedule[-2] and lrpo.schedule[-1][1] == -1
    assert not torch.equal(steps[0].x[0], steps[0].x[1])            # each member its own noise
    lrpo = make()
    for step, after in zip(steps, [step.x for step in steps[1:]] + [steps[-1].action]):
        assert torch.equal(step.action, after)
        mu, sigma, x0_hat = lrpo.policy(step.x, seen[0], step.t, step.s)
        want = torch.distributions.Normal(mu, sigma.float()).log_prob(step.action).mean(
            dim=(1, 2, 3))
        torch.testing.assert_close(step.log_prob, want, rtol=1e-4, atol=1e-5)
        assert torch.equal(step.x0_hat, x0_hat)
    with torch.no_grad():
        assert torch.equal(restored, lrpo.policy(steps[-1].action, seen[0], *lrpo.schedule[-1])[0])


def ready(lrpo, A, weights):
    """Two groups of three, rolled out; the advantages given instead of scored."""
    lq, gt = (u[[0, 0, 0, 1, 1, 1]] for u in BATCH)
    _, steps = lrpo.rollout(lq)
    for step, w in zip(steps, weights):
        step.advantage, step.x_gt = A * w, gt
    return steps, lq, gt


def test_an_update_follows_the_policy_gradient_written_out():
    """-mean of A_i w_k grad log pi(action_i), one member and one step at a time."""
    lrpo = make(gt_weight=0.0, lr=0.0)
    A, w = torch.tensor([0.3, -1.0, 0.7, 1.2, -0.2, -1.0]), torch.tensor([1.5, 0.9, 0.6])
    steps, lq, gt = ready(lrpo, A, w)
    lrpo.update(steps, lq, gt)
    mine = torch.cat([p.grad.flatten() for p in lrpo.net.parameters()])
    loss = 0.0
    for k, step in enumerate(steps):
        for i in range(6):
            one = slice(i, i + 1)
            mu, sigma, _ = lrpo.policy(step.x[one], lq[one], step.t, step.s)
            log_prob = torch.distributions.Normal(mu, sigma).log_prob(step.action[one]).mean()
            loss = loss - A[i] * w[k] * log_prob / (6 * len(steps))
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, lrpo.net.parameters())])
    want = want / max(1, want.norm())                       # the update's clipping
    torch.testing.assert_close(mine, want, rtol=1e-3, atol=1e-6)


def test_each_step_is_credited_by_its_noise_level_up_to_the_clip():
    lrpo, w = make(), torch.tensor([4.0, 0.5, -0.25])
    _, steps = lrpo.rollout(BATCH[0])
    lrpo.assign_advantages(steps, torch.tensor([[.47, .49, .62], [3., 3., 3.]]), w)
    for step, weight in zip(steps, w):
        want = torch.tensor([-.8522, -.5514, 1.4035, 0, 0, 0]) * weight
        torch.testing.assert_close(step.advantage, want.clamp(-5, 5), rtol=3e-3, atol=0)


@pytest.mark.parametrize("last", [0, 1, 2])
def test_the_likelihood_acts_on_the_last_trained_steps(last):
    lrpo = make(gt_last=last, gt_weight=2.0, pg_weight=0.0)
    steps, lq, gt = ready(lrpo, torch.ones(6), torch.ones(3))
    for k, step in enumerate(steps):
        mu, sigma, _ = lrpo.policy(step.x, lq, step.t, step.s)
        loss, terms = lrpo.loss(step, lq, gt, mu, sigma, torch.ones(6))
        want = 1 - (gaussian_log_prob(gt, mu, sigma) / 40).clamp(max=0).exp().mean()
        torch.testing.assert_close(terms["gt_loss"], want)
        # 1 - exp(.) of size .03 keeps five digits of float32
        assert loss.item() == pytest.approx(2 * want.item() if k >= 3 - (last or 3) else 0,
                                            rel=1e-4)


def test_an_optimiser_step_for_each_group_of_steps():
    for n, updates, want in ((0, 1, 1), (1, 1, 3), (2, 2, 4)):
        lrpo, taken = make(steps_per_update=n, updates=updates), []
        lrpo.optimizer.register_step_post_hook(lambda *_: taken.append(1))
        lrpo.step(BATCH)
        assert len(taken) == want


def test_ratio_is_exactly_one_before_the_first_update():
    lrpo = make()
    given = ready(lrpo, torch.ones(6), torch.ones(3))
    assert torch.equal(lrpo.update(*given)["ratio"], torch.ones(3, 6))
    assert not torch.equal(lrpo.update(*given)["ratio"], torch.ones(3, 6))
    stats = make(updates=1).step(BATCH)
    assert stats["first_off_max"] == stats["clip_fraction"] == 0 and stats["ratio_max"] == 1
    moved = make()
    moved.rollout = lambda lq, rollout=moved.rollout: (rollout(lq), drift(moved.net))[0]
    with pytest.raises(RuntimeError, match="off 1"):
        moved.step(BATCH)       # the policy has moved between rollout and update


def drift(net):
    with torch.no_grad():
        net.head[-1].bias.add_(0.01)


def parameters(lrpo):
    return torch.cat([p.detach().flatten() for p in lrpo.net.parameters()])


def after_a_step(**changes):
    lrpo = make(**changes)
    stats = lrpo.step(BATCH)
    return parameters(lrpo), stats


def test_each_switch_changes_what_it_should_and_nothing_else():
    base, stats = after_a_step(gt_weight=2.0)
    again, _ = after_a_step(gt_weight=2.0)
    assert torch.equal(base, again)
    rolled = ("reward", "mse", "reward_std", "equal_groups")
    for change in (dict(gt_weight=0.0), dict(noise_level_weights="off"), dict(pg_weight=0.0),
                   dict(gt_last=1), dict(adv_std="batch"), dict(clip=1e-9),
                   dict(steps_per_update=1)):
        moved, other = after_a_step(**{"gt_weight": 2.0} | change)
        assert not torch.equal(base, moved), change
        assert all(stats[k] == other[k] for k in rolled), change    # the rollout is the same
    # without the policy gradient neither advantages nor their weights can matter
    assert torch.equal(after_a_step(pg_weight=0.0)[0], after_a_step(
        pg_weight=0.0, noise_level_weights="off", adv_std="batch")[0])
    # without strategy 2 its variant cannot matter
    assert torch.equal(after_a_step(gt_weight=0.0)[0], after_a_step(gt_weight=0.0, gt_last=2)[0])


def test_a_reward_that_cannot_tell_moves_nothing_by_itself():
    flat = lambda x, gt: (torch.full((len(x),), 0.3), {})
    lrpo = make(reward=flat, gt_weight=0.0)
    for group in lrpo.optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = parameters(lrpo)
    stats = lrpo.step(BATCH)
    assert stats["equal_groups"] == 1 and stats["grad_norm"] == 0
    assert torch.equal(before, parameters(lrpo))


def test_reinforce_raises_the_reward():
    """Policy gradient alone, no ground-truth likelihood: the mean brightness must go up."""
    lrpo = make(reward=lambda x, gt: (x.mean(dim=(1, 2, 3)), {}), gt_weight=0.0, group=16, lr=1e-3)
    history = [lrpo.step(BATCH)["reward"] for _ in range(12)]
    assert sum(history[-3:]) / 3 > sum(history[:3]) / 3 + 0.02


def test_the_ground_truth_is_noised_once_and_anew_in_each_rollout():
    """x_gt_s ~ N(sqrt(abar_s) x_gt, (1 - abar_s) I): mean and variance over all pixels."""
    lrpo, gt, update = make(lr=0.0), [], LRPO.update

    def keep(steps, *given):
        seen = update(lrpo, steps, *given)
        gt.append([step.x_gt for step in steps])
        return seen
    lrpo.update = keep
    for _ in range(40):
        lrpo.step(BATCH)
    assert all(torch.equal(a, b) for first, second in zip(gt[::2], gt[1::2])    # two updates
               for a, b in zip(first, second))
    gt = gt[::2]
    for k, (t, s) in enumerate(lrpo.schedule[:-1]):
        a = lrpo.diffusion.abar[s].item()
        z = torch.stack([x[k] for x in gt]) - math.sqrt(a) * BATCH[1][[0, 0, 0, 1, 1, 1]]
        n = z.numel()
        assert abs(z.mean().item()) < 5 * math.sqrt((1 - a) / n)
        assert z.var().item() == pytest.approx(1 - a, rel=5 * math.sqrt(2 / n))
    assert not torch.equal(gt[0][0], gt[1][0]) and not torch.equal(gt[0][0][0], gt[0][0][1])
    assert not torch.equal(gt[0][0], gt[0][1])      # rollouts, members and steps: each its own
