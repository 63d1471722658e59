"""LRPO's arithmetic against torch.distributions, closed forms and the paper's figure."""
import collections
import math

import pytest
import torch

from common import Reward, noise, parameters, pictures, run, tiny_net
from darl import DARL, DARLSettings
from fidelity import FIRST_WEIGHT
from lrpo import (LRPO, LRPOSettings, Transition, clipped_loss, gaussian_kl, gaussian_log_prob,
                  group_advantages, gt_likelihood_loss)
from model import Diffusion
from support.cli import UserError

BATCH = pictures(0)
GROUPS = [0, 0, 0, 1, 1, 1]         # of the three restorations of each of the two images
PAPER = dict(own_steps=0, gt_target="noised", gt_weight=0.001)
LIKENESS = Reward(lambda x, gt: -(x - gt).square().mean(dim=(1, 2, 3)))


def make(reward=LIKENESS, **changes):
    net = tiny_net()
    settings = LRPOSettings(**dict(ddim_steps=4, group=3) | changes)
    return LRPO(net, Diffusion(net.config), reward, torch.Generator().manual_seed(0), settings)


def normal_log_prob(x, mu, sigma):
    return torch.distributions.Normal(mu, sigma.float()).log_prob(x).mean(dim=(1, 2, 3))


# ---------------------------------------------------------------------------------------------
# The functions

def test_log_prob_and_kl_are_the_means_of_torch_distributions():
    x, mu, sigma = noise(0, 4, 3, 8, 8), noise(1, 4, 3, 8, 8), torch.rand(4, 1, 1, 1) + 0.1
    torch.testing.assert_close(gaussian_log_prob(x, mu, sigma).flatten(),
                               normal_log_prob(x, mu, sigma))
    assert gaussian_log_prob(x.bfloat16(), mu, sigma).dtype == torch.float32
    Normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(Normal(mu, sigma), Normal(x, sigma))
    torch.testing.assert_close(gaussian_kl(mu, x, sigma), want.mean(dim=(1, 2, 3)))


def test_advantages_of_the_papers_figure_of_groups_and_of_a_batch():
    def advantages(rewards, *std):
        return group_advantages(rewards[..., None, None], *std)[..., 0, 0]
    a = advantages(torch.tensor([[.47, .49, .62]]))
    assert [round(v, 2) for v in a[0].tolist()] == [-.85, -.55, 1.40]
    r = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.1, 0.1]])
    torch.testing.assert_close(advantages(r, "group"),
                               torch.tensor([[-1., 1.], [-1., 1.], [0., 0.]]), rtol=1e-3, atol=0)
    std = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.1, 0.1]).std(correction=0)
    torch.testing.assert_close(advantages(r, "batch"), torch.tensor(
        [[-.5, .5], [-1.5, 1.5], [0., 0.]]) / (std + 1e-4))


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
    log_prob = gaussian_log_prob(x, mu, torch.tensor(sigma)).flatten()
    A = x.flatten() - x.mean()
    loss, _ = clipped_loss(log_prob, log_prob.detach(), A, clip=0.1)
    (g,) = torch.autograd.grad(loss.mean(), w)
    exact = -(A * (x.flatten() - 0.3 * c) * c / sigma ** 2).mean()          # sample by sample
    torch.testing.assert_close(g, exact.float(), rtol=1e-3, atol=0)
    assert abs(g.item() + c) < 5 * c * math.sqrt(2 / n)                     # the closed form


# ---------------------------------------------------------------------------------------------
# Rollout and credit

@pytest.mark.parametrize("own", [0, 1, 2])
def test_members_of_a_group_are_trajectories_that_share_all_but_their_own_steps(own):
    """The whole rollout again from the same generator, a network call for each member."""
    method, sizes = make(own_steps=own), []
    method.net.register_forward_hook(lambda *given: sizes.append(len(given[2])))
    restored, steps = method.rollout(BATCH[0])
    assert sizes == {0: [6, 6, 6, 6], 1: [2, 2, 2, 6], 2: [2, 2, 6, 6]}[own]
    own = own or 3                      # all of those with noise
    assert [(step.t, step.s) for step in steps] == method.schedule[-1 - own:-1]

    generator, lq = torch.Generator().manual_seed(0), BATCH[0][GROUPS]
    def draw(shared):
        return torch.randn(2 if shared else 6, 3, 16, 16, generator=generator)[
            GROUPS if shared else slice(None)]
    x, seen = draw(own < 3), iter(steps)
    for k, (t, s) in enumerate(method.schedule[:-1]):
        with torch.no_grad():
            mu, sigma, x0_hat = method.diffusion.ddim_step(method.net, x, lq, t, s, 1.0)
        before, x = x, mu + sigma * draw(k < 3 - own)
        if k >= 3 - own:
            step = next(seen)
            for mine, want in ((step.x, before), (step.x0_hat, x0_hat)):
                rows = slice(None) if len(mine) == 6 else [0, 3]        # one for each group
                torch.testing.assert_close(mine, want[rows], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(step.action, x, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(step.log_prob.flatten(), normal_log_prob(
                step.action, mu, sigma), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        mu, sigma, _ = method.diffusion.ddim_step(method.net, x, lq, *method.schedule[-1], 1.0)
    torch.testing.assert_close(restored, mu, rtol=1e-4, atol=1e-5)      # unclamped, sigma = 0
    assert sigma == 0 and not torch.allclose(restored[0], restored[1], atol=1e-3)


def test_one_call_for_a_group_gives_the_gradient_of_a_call_for_each_member():
    method, gradients = make(), []
    x, weights = noise(3, 2, 3, 16, 16), noise(4, 6, 3, 16, 16)
    for given, images in ((x, BATCH[0]), (x[GROUPS], BATCH[0]), (x[GROUPS], BATCH[0][GROUPS])):
        mu, _, _ = method.policy(given, images, *method.schedule[-2])
        mu = mu if len(mu) == 6 else mu[GROUPS]
        g = torch.autograd.grad((mu * weights).sum(), method.net.parameters())
        gradients.append(torch.cat([u.flatten() for u in g]))
    for g in gradients[1:]:
        torch.testing.assert_close(g, gradients[0], rtol=1e-3, atol=1e-5 * g.abs().max().item())


@pytest.mark.parametrize("on", [True, False])
def test_credit_is_the_advantage_times_the_noise_level_up_to_the_clip(on):
    method = make(group=30, noise_level_weights="on" if on else "off", **PAPER)
    abar = [method.diffusion.abar[t].item() for t, _ in method.schedule]
    sigma = torch.tensor([math.sqrt((1 - prev) / (1 - a) * (1 - a / prev))      # DDPM, eta = 1
                          for a, prev in zip(abar, abar[1:])])
    weights = sigma / sigma.mean() if on else torch.ones(3)
    rewards = torch.stack([noise(0, 30), torch.zeros(30), torch.eye(30)[0]])    # one is far ahead
    for R in (rewards.view(1, 90), torch.stack([rewards.flatten() * k for k in (1, -2, 3)])):
        steps = [Transition(t, s, *[None] * 4) for t, s in method.schedule[:-1]]
        method.assign_advantages(steps, R[..., None, None])
        for step, w, r in zip(steps, weights, R.expand(3, 90)):
            r = r.view(3, 30)
            A = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + 1e-4)
            want = (A * w).clamp(-5, 5).flatten()
            torch.testing.assert_close(step.advantage.flatten(), want, rtol=1e-3, atol=1e-4)
            assert not step.advantage[30:60].any()
    assert any(step.advantage.abs().max() == 5 for step in steps)


# ---------------------------------------------------------------------------------------------
# The ground truth's likelihood

def test_posterior_target_is_minus_the_kl_from_ddpms_posterior():
    method, gt = make(own_steps=2), BATCH[1][GROUPS]
    _, steps = method.rollout(BATCH[0])
    assert [len(step.x) for step in steps] == [2, 6]        # shared by the group, and not
    for step in steps:
        mu, sigma, _ = method.policy(step.x, BATCH[0], step.t, step.s)
        x, mu = (u if len(u) == 6 else u[GROUPS] for u in (step.x, mu))
        a, prev = method.diffusion.abar[step.t].item(), method.diffusion.abar[step.s].item()
        alpha = a / prev                                            # DDPM eq. 6 and 7
        mean = math.sqrt(prev) * (1 - alpha) * gt + math.sqrt(alpha) * (1 - prev) * x
        mean, std = mean / (1 - a), math.sqrt((1 - prev) / (1 - a) * (1 - alpha))
        kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std),
                                               torch.distributions.Normal(mu, sigma.float()))
        torch.testing.assert_close(method.posterior_log_prob(step, gt, mu, sigma),
                                   -kl.mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-5)


def test_noised_target_is_noised_once_and_anew_in_each_rollout():
    """x_gt_s ~ N(sqrt(abar_s) x_gt, (1 - abar_s) I): mean and variance over all pixels."""
    method, gt, mu = make(**PAPER), BATCH[1][GROUPS], torch.zeros(6, 3, 16, 16)
    for t, s in method.schedule[:-1]:
        seen = []
        for _ in range(40):
            step = Transition(t, s, *[None] * 4)
            first, again = (method.noised_log_prob(step, gt, mu, torch.ones(())) for _ in range(2))
            assert torch.equal(first, again)
            torch.testing.assert_close(first, normal_log_prob(step.x_gt, mu, torch.ones(())))
            seen.append(step.x_gt)
        a = method.diffusion.abar[s].item()
        z = torch.stack(seen) - math.sqrt(a) * gt
        n = z.numel()
        assert abs(z.mean().item()) < 5 * math.sqrt((1 - a) / n)
        assert z.var().item() == pytest.approx(1 - a, rel=5 * math.sqrt(2 / n))
        assert not torch.equal(z[0], z[1]) and not torch.equal(z[0][0], z[0][1])


@pytest.mark.parametrize("last", [0, 1, 2])
def test_the_likelihood_acts_on_the_last_trained_steps(last):
    method = make(**PAPER | dict(gt_last=last, gt_weight=2.0, pg_weight=0.0))
    _, steps = method.rollout(BATCH[0])
    gt = BATCH[1][GROUPS]
    for k, step in enumerate(steps):
        step.x_gt = gt
        mu, sigma, _ = method.policy(step.x, BATCH[0], step.t, step.s)
        loss, terms = method.loss(step, gt, mu, sigma, torch.ones(6))
        want = 1 - (normal_log_prob(gt, mu, sigma) / 40).clamp(max=0).exp().mean()
        torch.testing.assert_close(terms["gt_loss"], want, rtol=1e-4, atol=1e-6)
        # 1 - exp(.) of size .03 keeps five digits of float32
        assert loss.item() == pytest.approx(2 * want.item() if k >= 3 - (last or 3) else 0,
                                            rel=1e-4)


def test_a_fixed_weight_is_not_steered_and_auto_is():
    fixed, auto = make(gt_weight=2.5), make()
    stats = [auto.step(BATCH) for _ in range(3)]
    assert stats[0]["gt_weight"] == FIRST_WEIGHT != stats[2]["gt_weight"]
    assert "gt_weight" not in fixed.step(BATCH) and not fixed.fidelity
    x, z = torch.zeros(6, 3, 16, 16), torch.ones(())
    for weight in (FIRST_WEIGHT, 3 * FIRST_WEIGHT):         # the loss follows it
        method = make()
        method.fidelity.integral = math.log(weight / FIRST_WEIGHT)
        step = Transition(*method.schedule[-2], BATCH[0], x, None, None)
        loss, terms = method.loss(step, BATCH[1][GROUPS], x, z, torch.zeros(6))
        assert loss.item() == pytest.approx(weight * terms["gt_loss"].item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------
# The optimiser steps

def plain(step, mu, sigma, pg):
    """A loss that is the policy gradient alone."""
    return pg.mean(), {"pg_loss": pg.mean()}


def ready(method, A, weights):
    """Two groups of three, rolled out; the advantages given instead of scored."""
    _, steps = method.rollout(BATCH[0])
    for step, w in zip(steps, weights, strict=True):
        step.advantage = (A * w).view(-1, 1, 1)
    return steps, BATCH[0], plain


@pytest.mark.parametrize("own", [0, 1])
def test_an_update_follows_the_policy_gradient_written_out(own):
    """-mean of A_i w_k grad log pi(action_i), one member and one step at a time."""
    method = make(**PAPER | dict(own_steps=own, lr=0.0))
    A, w = torch.tensor([0.3, -1.0, 0.7, 1.2, -0.2, -1.0]), torch.tensor([1.5, 0.9, 0.6])
    given = steps, *_ = ready(method, A, w[:own or 3])
    method.update(*given)
    mine = torch.cat([p.grad.flatten() for p in method.net.parameters()])
    loss, lq = 0.0, BATCH[0][GROUPS]
    for k, step in enumerate(steps):
        x = step.x if len(step.x) == 6 else step.x[GROUPS]
        for i in range(6):
            one = slice(i, i + 1)
            mu, sigma, _ = method.diffusion.ddim_step(method.net, x[one], lq[one], step.t, step.s,
                                                      1.0)
            loss = loss - A[i] * w[k] * normal_log_prob(step.action[one], mu, sigma).mean() / (
                6 * len(steps))
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, method.net.parameters())])
    want = want / max(1, want.norm())                       # the update's clipping
    torch.testing.assert_close(mine, want, rtol=1e-3, atol=1e-6)


def test_an_optimiser_step_for_each_group_of_steps():
    for n, updates, want in ((0, 1, 1), (1, 1, 3), (2, 2, 4)):
        method, taken = make(**PAPER, steps_per_update=n, updates=updates), []
        method.optimizer.register_step_post_hook(lambda *_: taken.append(1))
        method.step(BATCH)
        assert len(taken) == want


@pytest.mark.parametrize("own", [0, 1])
def test_ratio_is_exactly_one_before_the_first_update(own):
    method = make(own_steps=own)
    given = ready(method, torch.ones(6), torch.ones(own or 3))
    assert torch.equal(method.update(*given)["ratio"], torch.ones(own or 3, 6, 1, 1))
    assert not torch.equal(method.update(*given)["ratio"], torch.ones(own or 3, 6, 1, 1))
    stats = make(updates=1).step(BATCH)
    assert stats["first_off_max"] == stats["clip_fraction"] == 0 and stats["ratio_max"] == 1

    def drift(lq):
        found = LRPO.rollout(moved, lq)
        with torch.no_grad():
            moved.net.head[-1].bias.add_(0.01)
        return found
    moved = make(own_steps=own)
    moved.rollout = drift
    with pytest.raises(RuntimeError, match="off 1"):
        moved.step(BATCH)       # the policy has moved between rollout and update


# ---------------------------------------------------------------------------------------------
# Mini-batches

FOUR = pictures(5, n=4)


@pytest.mark.parametrize("own", [0, 1])
def test_a_minibatch_has_its_images_with_their_groups(own):
    method, seen = make(own_steps=own, gt_weight=1.0, minibatch=2, lr=0.0), []
    _, whole = method.rollout(FOUR[0])
    method.assign_advantages(whole, noise(7, 1, 12, 1, 1))
    def loss(step, mu, sigma, pg):
        seen.append(step)
        return method.loss(step, FOUR[1][step.images].repeat_interleave(3, 0), mu, sigma, pg)
    method.optimise(whole, FOUR[0], noise(7, 12, 1, 1), {}, loss)
    n = len(whole)
    assert len(seen) == 2 * 2 * n               # passes, mini-batches, DDIM steps
    for i, (first, second) in enumerate(zip(seen[:n], seen[n:2 * n])):
        assert (first.images, second.images) == (slice(0, 2), slice(2, 4))
        for name in ("x", "action", "log_prob", "x0_hat", "advantage"):
            u = getattr(whole[i], name)
            half = len(u) // 2
            assert torch.equal(getattr(first, name), u[:half])
            assert torch.equal(getattr(second, name), u[half:])


def test_the_minibatches_of_a_pass_have_the_gradient_of_all_images(monkeypatch):
    """At lr 0, where each is taken at the same weights, the mean of theirs, not clipped."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(()))
    gradients = {}
    for size in (0, 1, 2, 4):
        method, found = make(**PAPER | dict(gt_target="posterior", minibatch=size, lr=0.0,
                                            updates=1, gt_weight=1.0)), []
        method.optimizer.register_step_post_hook(lambda *_: found.append(torch.cat(
            [p.grad.flatten() for p in method.net.parameters()])))
        method.step(FOUR)
        assert len(found) == {0: 1, 1: 4, 2: 2, 4: 1}[size]
        gradients[size] = torch.stack(found).mean(dim=0)
    assert torch.equal(gradients[0], gradients[4])
    for size in (1, 2):
        torch.testing.assert_close(gradients[size], gradients[0], rtol=1e-3,
                                   atol=1e-5 * gradients[0].abs().max().item())


@pytest.mark.parametrize("method", ["lrpo", "darl"])
def test_all_images_are_one_minibatch(method):
    def moved(minibatch):
        if method == "lrpo":
            m = make(**PAPER, minibatch=minibatch)
        else:
            net = tiny_net()
            m = DARL(net, Diffusion(net.config), LIKENESS, torch.Generator().manual_seed(0),
                     DARLSettings(ddim_steps=4, group=3, minibatch=minibatch))
        return [m.step(FOUR) for _ in range(2)], parameters(m.net)
    (stats, base), (same, whole), (_, parts) = map(moved, (0, 4, 3))    # 3: the last has one
    assert stats == same and torch.equal(base, whole) and not torch.equal(base, parts)


def test_minibatches_bring_the_clip_into_action():
    """The published recipe, one pass, at a learning rate where the steps of one batch stay inside
    the clip range: those of four reach out of it."""
    def clipped(minibatch):
        method = make(**PAPER | dict(updates=1, steps_per_update=1, minibatch=minibatch, clip=1e-4,
                                     lr=3e-5))
        return method.step(FOUR)
    assert clipped(0)["clip_fraction"] == 0 < clipped(1)["clip_fraction"]


def after_a_step(**changes):
    method = make(**PAPER | dict(gt_weight=2.0) | changes)
    return method.step(BATCH), parameters(method.net)


def test_each_switch_changes_what_it_should_and_nothing_else():
    stats, base = after_a_step()
    assert torch.equal(base, after_a_step()[1])
    rolled = ("reward", "score", "reward_std", "equal_groups")
    for change in (dict(gt_weight=0.0), dict(noise_level_weights="off"), dict(pg_weight=0.0),
                   dict(gt_last=1), dict(adv_std="batch"), dict(clip=1e-9),
                   dict(gt_target="posterior"), dict(steps_per_update=1)):
        other, moved = after_a_step(**change)
        assert not torch.equal(base, moved), change
        assert all(stats[k] == other[k] for k in rolled), change    # the rollout is the same
    # without the policy gradient neither advantages nor their weights can matter
    assert torch.equal(after_a_step(pg_weight=0.0)[1], after_a_step(
        pg_weight=0.0, noise_level_weights="off", adv_std="batch")[1])
    # without strategy 2 its variants cannot matter
    assert torch.equal(after_a_step(gt_weight=0.0)[1], after_a_step(gt_weight=0.0, gt_last=2)[1])
    for name, value in (("noise_level_weights", "off"), ("steps_per_update", 1)):
        with pytest.raises(UserError, match="needs --own_steps 0"):
            make(**{name: value})


def test_a_reward_that_cannot_tell_moves_nothing_by_itself():
    method = make(reward=Reward(lambda x, gt: torch.full((len(x),), 0.3)), gt_weight=0.0)
    for group in method.optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = parameters(method.net)
    stats = method.step(BATCH)
    assert stats["equal_groups"] == 1 and stats["grad_norm"] == 0
    assert torch.equal(before, parameters(method.net))


@pytest.mark.parametrize("own", [0, 1])
def test_reinforce_raises_the_reward(own):
    """Policy gradient alone, no ground-truth likelihood: the mean brightness must go up."""
    method = make(reward=Reward(), gt_weight=0.0, group=8, lr=2e-3, own_steps=own, ddim_steps=3)
    history = [method.step(BATCH)["reward"] for _ in range(8)]
    assert sum(history[-3:]) / 3 > sum(history[:3]) / 3 + 0.01


# ---------------------------------------------------------------------------------------------

@pytest.mark.usefixtures("little_work")
@pytest.mark.parametrize("recipe", ["ours", "paper"])
def test_mode_lrpo_runs_the_rollout_and_the_likelihood_of_this_file(runs, tmp_path, monkeypatch,
                                                                     recipe):
    calls = collections.Counter()
    for name in ("rollout", "noised_log_prob", "posterior_log_prob"):
        def counted(*given, name=name, original=getattr(LRPO, name)):
            calls[name] += 1
            return original(*given)
        monkeypatch.setattr(LRPO, name, counted)
    run("lrpo", tmp_path / "lrpo", "--recipe", recipe, "--init", str(runs / "sft" / "last.pt"),
        "--rewards", "ssim=1", "--group", "2")
    # Three rollouts. Ours: two passes over one own step. The paper: one pass over the K - 1 = 2
    # steps of each of four images.
    assert calls == {"rollout": 3, {"ours": "posterior_log_prob", "paper": "noised_log_prob"}[
        recipe]: 3 * {"ours": 2, "paper": 4 * 2}[recipe]}
