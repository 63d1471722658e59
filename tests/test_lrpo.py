"""LRPO's arithmetic against torch.distributions, closed forms and the paper's figure."""
import math

import pytest
import torch

from lrpo import (LRPO, clipped_loss, default_clip, gaussian_log_prob, group_advantages,
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
    settings = dict(K=4, group=3, updates=2, lr=1e-4, branch=2) | changes
    return LRPO(net, Diffusion(net.config), reward, torch.Generator().manual_seed(seed), **settings)


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
    lrpo = make(branch=0)
    sigma = [lrpo.policy(BATCH[0], BATCH[0], t, s, x0=BATCH[0])[1].flatten()[0].item()
             for t, s in lrpo.trained_steps]
    want = torch.tensor(sigma) / (sum(sigma) / 3)
    torch.testing.assert_close(lrpo.weights(BATCH[0]), want)
    assert torch.equal(make(noise_weights=False).weights(BATCH[0]), torch.ones(3))
    branched = make(branch=2).weights(BATCH[0])             # mean 1 over the steps that are drawn
    torch.testing.assert_close(branched, want / want[1:].mean())


def test_clipped_loss_is_ppos():
    """Gradient only where moving on would still be inside the trust region, by the sign of A."""
    for A, shift, moves in [(1, 0.0, True), (1, 0.2, False), (1, -0.2, True),
                            (-1, 0.0, True), (-1, 0.2, True), (-1, -0.2, False)]:
        lp = torch.tensor([shift], requires_grad=True)
        loss, ratio = clipped_loss(lp, torch.zeros(1), torch.tensor([float(A)]), clip=0.1)
        (g,) = torch.autograd.grad(loss.sum(), lp)
        assert ratio.item() == pytest.approx(math.exp(shift))
        assert g.item() == pytest.approx(-A * math.exp(shift) if moves else 0.0)
    assert default_clip(4 * 64 * 64) == pytest.approx(1e-4, rel=2e-3)      # the published setting


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


def test_rollout_groups_share_one_lq_and_its_log_probs_are_the_policys():
    lrpo = make(branch=0)
    restored, steps = lrpo.rollout(*BATCH)
    assert restored.shape == (6, 3, 16, 16) and [step.k for step in steps] == [0, 1, 2]
    assert lrpo.schedule[-1][1] == -1 and len(lrpo.trained_steps) == 3      # sigma = 0 is left out
    assert not torch.equal(steps[0].x[0], steps[0].x[1])
    for step, after in zip(steps, steps[1:]):
        assert torch.equal(step.action, after.x)
    for step in steps:
        for group, lq, gt in zip(range(2), *BATCH):
            for i in range(3):
                assert torch.equal(step.lq[3 * group + i], lq)
                assert torch.equal(step.gt[3 * group + i], gt)
        mu, sigma, _ = lrpo.policy(step.x, step.lq, *lrpo.trained_steps[step.k])
        want = torch.distributions.Normal(mu, sigma).log_prob(step.action).mean(dim=(1, 2, 3))
        torch.testing.assert_close(step.log_prob, want, rtol=1e-4, atol=1e-5)


def test_branched_members_differ_in_the_noise_of_one_step_only():
    """The whole rollout again, from the same generator: every member a trajectory of the policy,
    every noise but that of the branch shared by its group."""
    lrpo, seen = make(branch=2), set()
    for seed in range(8):
        lrpo.generator.manual_seed(seed)
        restored, (step,) = lrpo.rollout(*BATCH)
        seen.add(step.k)
        assert torch.equal(step.lq, BATCH[0]) and torch.equal(step.gt, BATCH[1])
        generator = torch.Generator().manual_seed(seed)
        assert step.k == 2 - torch.randint(2, (), generator=generator).item()
        draw = lambda n: torch.randn(n, 3, 16, 16, generator=generator)
        x, lq = draw(2)[[0, 0, 0, 1, 1, 1]], BATCH[0][[0, 0, 0, 1, 1, 1]]
        for k, (t, s) in enumerate(lrpo.schedule):
            with torch.no_grad():
                mu, sigma, _ = lrpo.policy(x, lq, t, s)
            if k == step.k:
                torch.testing.assert_close(step.x[[0, 0, 0, 1, 1, 1]], x, rtol=1e-4, atol=1e-5)
                x = mu + sigma * draw(6)
                torch.testing.assert_close(step.action, x, rtol=1e-4, atol=1e-5)
                want = torch.distributions.Normal(mu, sigma).log_prob(x).mean(dim=(1, 2, 3))
                torch.testing.assert_close(step.log_prob, want, rtol=1e-4, atol=1e-5)
            elif s >= 0:
                x = mu + sigma * draw(2)[[0, 0, 0, 1, 1, 1]]
        torch.testing.assert_close(restored, mu, rtol=1e-4, atol=1e-5)
    assert seen == {1, 2}               # drawn anew, among the last two of three trained steps


@pytest.mark.parametrize("branch", [0, 2])
def test_an_update_follows_the_policy_gradient_written_out(branch):
    """-mean of A_i w_k grad log pi(action_i), one member and one step at a time."""
    lrpo = make(branch=branch, gt_weight=0.0, lr=0.0)
    _, steps = lrpo.rollout(*BATCH)
    A, w = torch.tensor([0.3, -1.0, 0.7, 1.2, -0.2, -1.0]), torch.tensor([1.5, 0.9, 0.6])
    for step in steps:
        step.advantage = A * w[step.k]
    lrpo.update(steps, first=True)
    mine = torch.cat([p.grad.flatten() for p in lrpo.net.parameters()])
    loss, rows = 0.0, [0, 0, 0, 1, 1, 1] if branch else range(6)
    for step in steps:
        for i, row in enumerate(rows):
            one = slice(row, row + 1)
            mu, sigma, _ = lrpo.policy(step.x[one], step.lq[one], *lrpo.trained_steps[step.k])
            log_prob = torch.distributions.Normal(mu, sigma).log_prob(step.action[i:i + 1]).mean()
            loss = loss - A[i] * w[step.k] * log_prob / (6 * len(steps))
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, lrpo.net.parameters())])
    want = want / max(1, want.norm())                       # the update's clipping
    torch.testing.assert_close(mine, want, rtol=1e-3, atol=1e-6)


def test_each_step_is_credited_by_its_noise_level_up_to_the_clip():
    lrpo, w = make(branch=0), torch.tensor([4.0, 0.5, -0.25])
    _, steps = lrpo.rollout(*BATCH)
    lrpo.assign_advantages(steps, torch.tensor([[.47, .49, .62], [3., 3., 3.]]), w)
    for step in steps:
        want = torch.tensor([-.8522, -.5514, 1.4035, 0, 0, 0]) * w[step.k]
        torch.testing.assert_close(step.advantage, want.clamp(-5, 5), rtol=3e-3, atol=0)


def test_a_branched_step_is_rewarded_and_held_by_its_own_ground_truth():
    pairs = []
    lrpo = make(branch=1, gt_last=1,
                reward=lambda x, gt: (pairs.append(gt), brightness(x, gt))[1])
    assert lrpo.step(BATCH)["gt_loss"] > 0
    assert torch.equal(pairs[0], BATCH[1][[0, 0, 0, 1, 1, 1]])
    for seed in range(6):               # the likelihood's last step is not always the one drawn
        lrpo = make(seed=seed, branch=2, gt_last=1)
        stats = lrpo.step(BATCH)
        assert (stats["gt_loss"] > 0) == (stats["branch_step"] == 2)


@pytest.mark.parametrize("branch", [0, 2])
def test_ratio_is_exactly_one_before_the_first_update(branch):
    lrpo = make(branch=branch)
    _, steps = lrpo.rollout(*BATCH)
    for step in steps:
        step.advantage = torch.ones(6)
    first = lrpo.update(steps, first=True)
    assert first["ratio_mean"] == 1.0 and first["ratio_max"] == 1.0 and first["clip_fraction"] == 0
    second = lrpo.update(steps, first=False)
    assert second["ratio_max"] != 1.0
    with pytest.raises(RuntimeError, match="off 1"):
        lrpo.update(steps, first=True)     # the policy has moved: that must not pass for first


def parameters(lrpo):
    return torch.cat([p.detach().flatten() for p in lrpo.net.parameters()])


def after_a_step(**changes):
    lrpo = make(**changes)
    stats = lrpo.step(BATCH)
    return parameters(lrpo), stats


def test_each_switch_changes_what_it_should_and_nothing_else():
    base, stats = after_a_step(branch=0)
    again, _ = after_a_step(branch=0)
    assert torch.equal(base, again)
    rolled = ("reward", "mse", "reward_std", "no_spread")
    for change in (dict(gt_weight=0.0), dict(noise_weights=False), dict(pg_weight=0.0),
                   dict(gt_target="marginal"), dict(gt_last=1), dict(adv_std="batch")):
        moved, other = after_a_step(branch=0, **change)
        assert not torch.equal(base, moved), change
        assert all(stats[k] == other[k] for k in rolled), change    # the rollout is the same
    # without the policy gradient neither advantages nor their weights can matter
    assert torch.equal(after_a_step(pg_weight=0.0)[0],
                       after_a_step(pg_weight=0.0, noise_weights=False, adv_std="batch")[0])
    # without strategy 2 its variants cannot matter
    assert torch.equal(after_a_step(gt_weight=0.0)[0],
                       after_a_step(gt_weight=0.0, gt_target="marginal", gt_last=2)[0])


def test_a_reward_that_cannot_tell_moves_nothing_by_itself():
    flat = lambda x, gt: (torch.full((len(x),), 0.3), {})
    lrpo = make(reward=flat, gt_weight=0.0)
    for group in lrpo.optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = parameters(lrpo)
    stats = lrpo.step(BATCH)
    assert stats["no_spread"] == 1 and stats["grad_norm"] == 0
    assert torch.equal(before, parameters(lrpo))


@pytest.mark.parametrize("branch", [0, 2])
def test_reinforce_raises_the_reward(branch):
    """Policy gradient alone, no ground-truth likelihood: the mean brightness must go up."""
    lrpo = make(reward=lambda x, gt: (x.mean(dim=(1, 2, 3)), {}), gt_weight=0.0, group=16, lr=1e-3,
                branch=branch)
    history = [lrpo.step(BATCH)["reward"] for _ in range(12)]
    assert sum(history[-3:]) / 3 > sum(history[:3]) / 3 + 0.02


def test_posterior_target_is_minus_the_kl_from_ddpms_posterior():
    lrpo = make(gt_target="posterior", branch=0)
    for step in lrpo.rollout(*BATCH)[1]:
        x, (t, s) = step.x, lrpo.trained_steps[step.k]
        mu, sigma, _ = lrpo.policy(x, step.lq, t, s)
        a, prev = lrpo.diffusion.abar[t].item(), lrpo.diffusion.abar[s].item()
        alpha = a / prev                                            # DDPM eq. 6 and 7
        mean = math.sqrt(prev) * (1 - alpha) * step.gt + math.sqrt(alpha) * (1 - prev) * x
        mean = mean / (1 - a)
        std = math.sqrt((1 - prev) / (1 - a) * (1 - alpha))
        kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std),
                                               torch.distributions.Normal(mu, sigma))
        torch.testing.assert_close(lrpo.gt_log_prob(step, mu, sigma),
                                   -kl.mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-5)


def test_marginal_target_is_the_ground_truth_noised_once():
    """E log N(x_gt_s; mu, sigma) in closed form, x_gt_s ~ N(sqrt(abar_s) x_gt, (1 - abar_s) I)."""
    lrpo = make(gt_target="marginal", branch=0)
    step = lrpo.rollout(*BATCH)[1][0]
    t, s = lrpo.schedule[0]
    mu, sigma, _ = lrpo.policy(step.x, step.lq, t, s)
    prev = lrpo.diffusion.abar[s].item()
    draws = torch.stack([lrpo.gt_log_prob(step, mu, sigma) for _ in range(400)])
    square = (mu - math.sqrt(prev) * step.gt) ** 2 + (1 - prev)
    want = (-square / sigma ** 2 / 2 - sigma.log() - math.log(2 * math.pi) / 2).mean(dim=(1, 2, 3))
    error = draws.std(0) / math.sqrt(400)
    assert ((draws.mean(0) - want).abs() < 5 * error).all() and draws.std() > 0


def test_eta_zero_and_a_branch_out_of_range_are_refused():
    with pytest.raises(ValueError, match="eta must be above 0"):
        make(eta=0.0)
    with pytest.raises(ValueError, match="branch must be 0 to K - 1 = 3, not 4"):
        make(branch=4)
