"""The checks of the set policy, see exercise_checks.py."""
import math
from unittest.mock import patch

import torch
from torch.distributions import Normal, kl_divergence

import lrpo
import steered
from exercise_checks import (Stub, check_walk, fake_policy, far, mean, near, noise, noises, shaped,
                             standard, starts_as_noise)


def check_gaussian_log_prob(call):
    x, mu, sigma = noise(0, 4, 3, 8, 6), noise(1, 4, 3, 8, 6), torch.tensor(.7).double()
    log_prob = lambda *given: call(lrpo.gaussian_log_prob, *given)
    each = Normal(mu, sigma).log_prob(x)
    got = log_prob(x, mu, sigma)
    far(got, each.flatten(1).sum(1), "This is the sum over D: a ratio of such densities overflows, "
        "because 1.01 to the power of D is huge. Take the average over D.")
    shaped(got, (4,), "The log density")
    half = log_prob(mu, mu, torch.tensor(.5).double())
    near(half - log_prob(mu, mu, torch.tensor(1.).double()), [math.log(2)] * 4,
         "A Gaussian of half the width is twice as high at its mean: the density depends on sigma.")
    far(got - log_prob(mu, mu, sigma), mean(-((x - mu) ** 2) / .49), "The exponent "
        "of a Gaussian has a factor of one half.")
    near(got - log_prob(mu, mu, sigma), mean(-((x - mu) ** 2) / .98),
         "Distances from the mean count in units of sigma, squared.")
    near(got, mean(each), "A density integrates to one: the constant of the normalisation is "
         "missing or wrong.")
    low = log_prob(x.bfloat16(), mu.bfloat16(), sigma.bfloat16())
    assert low.dtype == torch.float32, "Compute in float32: bfloat16 cannot tell a ratio from 1."


def check_group_advantages(call):
    got = call(lrpo.group_advantages, torch.tensor([[0., 1.], [10., 13.], [5., 5.]]))
    shaped(got, (3, 2), "The advantage")
    near(got.mean(1), torch.zeros(3), "Each image is compared with its own group: hard images "
         "should not count as bad samples, so that every group has the mean 0.", 1e-4)
    got = call(lrpo.group_advantages, torch.arange(.1, 1, .1)[:, None].repeat(1, 7))
    assert got.isfinite().all() and (got == 0).all(), \
        "A group of equal rewards says nothing: its advantages are exactly 0. The mean " \
        "of equal float32 numbers may differ from them by rounding."
    got = call(lrpo.group_advantages, torch.tensor([[.47, .49, .62]], dtype=torch.float64))
    assert abs(got[0, 0] + .695) > .01, ("This divides by the standard deviation of a sample "
                                         "(n - 1); the paper's figure has that of the population.")
    near(got, [[-.8522, -.5514, 1.4035]], "The advantage is in units of the standard deviation.",
         2e-3)
    same = call(lrpo.group_advantages, torch.tensor([[.5, .5 + 1e-7]], dtype=torch.float64))
    assert (same == 0).all(), "Rewards that differ by rounding alone count as equal."
    small = call(lrpo.group_advantages, torch.tensor([[0., 2e-4]], dtype=torch.float64))
    near(small, [[-.5, .5]], "Where rewards hardly differ the advantage should stay bounded: the "
         "divisor is never much below 1e-4.", 1e-3)
    r = torch.tensor([[0., 1.], [0., 3.], [.1, .1]], dtype=torch.float64)
    std = math.sqrt(sum((u - .7) ** 2 for u in (0, 1, 0, 3, .1, .1)) / 6)
    many = torch.tensor([[.1] * 7, [.1, .2, .3, .4, .5, .6, .7]])
    assert (call(lrpo.group_advantages, many, "batch")[0] == 0).all(), \
        "Whether the rewards of a group are equal is judged within the group, whatever divides."
    got = call(lrpo.group_advantages, r, "batch")
    near(got * std, [[-.5, .5], [-1.5, 1.5], [0, 0]], "With std = \"batch\" every group is divided "
         "by the standard deviation of all rewards.", 2e-3)


def check_noise_level_weights(call):
    got = call(lrpo.noise_level_weights, torch.tensor([4., 1.5, .5]).double())
    shaped(got, (3,), "The weight")
    assert got[0] > got[2], "The noisy steps decide more: they should get the larger weight."
    near(got.mean(), 1, "On average over the steps the weight should be 1, or the learning rate "
         "changes with the number of steps.")
    near(got, [2, .75, .25], "The weights should be proportional to the standard deviation.")


def check_clipped_loss(call):
    def at(shift, A, clip=.1):
        new = torch.tensor([shift], dtype=torch.float64, requires_grad=True)
        loss, ratio = call(lrpo.clipped_loss, new - 3., torch.tensor([-3.]).double(),
                           torch.tensor([A]).double(), clip)
        shaped(loss, (1,), "The loss")
        assert loss.requires_grad, \
            "No gradient reaches the policy: the ratio is the only way to it, and is detached."
        return loss, ratio, torch.autograd.grad(loss.sum(), new)[0].item()
    loss, ratio, _ = at(.2, 1.)
    near(ratio, [math.exp(.2)], "The ratio is that of the two densities, new to old, whose "
         "logarithms are given. It is returned as it is, without the clip.")
    assert at(0., 1.)[2] < 0 < at(0., -1.)[2], \
        "Descending the loss should make better actions more likely, and worse ones less."
    near(at(0., 1.)[2], -1, "At ratio 1 the gradient should be the plain policy gradient.")
    for A, shift, side in ((1., .2, "above"), (-1., -.2, "below")):
        assert at(shift, A)[2] == 0, ("Once the ratio has left the trust region in the direction "
                                      f"that the advantage asks for ({side}), no gradient is left.")
    for A, shift in ((1., -.2), (-1., .2)):
        assert at(shift, A)[2] != 0, ("A policy that has moved the wrong way must be able to come "
                                      "back: the objective is the more pessimistic of the two.")
    for A, shift, clip, want in ((1., .2, .1, -1.1), (-1., -.2, .1, .9), (1., .2, .15, -1.15),
                                 (-1., -.2, .15, .85)):
        near(at(shift, A, clip)[0], [want], "Outside the trust region the loss is that of its "
             "edge, 1 - clip or 1 + clip.")
    both = torch.cat([at(.05, 2.5)[0], at(.05, -2.5)[0]])
    near(both / math.exp(.05), [-2.5, 2.5], "The loss is proportional to the advantage: how much "
         "better counts, not only whether.")


def check_gt_likelihood_loss(call):
    call(lrpo.gt_likelihood_loss, torch.tensor([-400., -40., -4., -1.]).double())
    got = call(lrpo.gt_likelihood_loss, torch.tensor([-400., -40., -4., 0.]).double())
    shaped(got, (4,), "L_gt")
    assert got[1] > got[2], "The loss should fall as the ground truth gets more likely."
    assert got.min() >= 0 and got.max() <= 1, "The loss should lie in [0, 1]."
    near(got[3], 0, "Where the likelihood is 1, nothing is left to gain: the loss is 0.")
    near(got[1], 1 - math.exp(-1), "The temperature is not the paper's.")
    near(got[[0, 2]], [1 - math.exp(-10), 1 - math.exp(-.1)], "The loss should be an "
         "exponential of the log-likelihood.")
    got = call(lrpo.gt_likelihood_loss, torch.tensor([2.]).double())
    near(got, [0.], "A density can exceed 1. The loss should then be at its lower bound, and not "
         "below it.")


def reference_log_prob(x, mu, sigma):
    return mean(Normal(mu, sigma.to(mu.dtype)).log_prob(x))


def check_rollout(call):
    seen, lq = call.seen, noise(0, 4, 3, 16, 16) / 2 + .3
    method, schedule = lrpo.LRPO.__new__(lrpo.LRPO), [(9, 5), (5, 2), (2, 0), (0, -1)]
    method.net, method.schedule, method.settings = None, schedule, Stub(eta=.7)
    method.diffusion = fake_policy(schedule, call)
    method.generator = torch.Generator().manual_seed(1)
    with patch.object(lrpo, "gaussian_log_prob", reference_log_prob), torch.enable_grad():
        restored, steps = call(method.rollout, lq,
                               draws=lambda result: noises(seen, [u.action for u in result[1]]))
    assert [(step.t, step.s) for step in seen] == schedule, \
        "The policy acts once at each step of the schedule, in its order."
    assert len(steps) == 3, ("The last step has sigma = 0 and so no density: every step but the "
                             "last becomes a transition.")
    assert [(u.t, u.s) for u in steps] == schedule[:-1], "A transition notes its own t and s."
    assert all(torch.equal(step.lq, lq) for step in seen), "The policy sees lq at each step."
    assert {step.eta for step in seen} == {.7}, "eta is a setting of the policy."
    starts_as_noise(seen[0].x, lq)
    for step, given, after in zip(steps, seen, seen[1:]):
        assert torch.equal(step.x, given.x), "A transition keeps the state before the step."
        assert torch.equal(step.action, after.x), \
            "The action of a step is the state of the next: they make one trajectory."
        near(step.x0_hat, given.x0_hat, "A transition keeps x0_hat of its step.")
    check_walk(seen, [step.action for step in steps])
    for step, given in zip(steps, seen):
        near(step.log_prob, reference_log_prob(step.action, given.mu, given.sigma), "log_prob "
             "should be that of the action taken, under mu and sigma of the same step.")
    near(restored, seen[-1].mu, "The last step arrives at the restored image: it adds no noise, "
         "and nothing is clamped here.")
    assert not restored.requires_grad and not any(u.log_prob.requires_grad for u in steps), \
        "A rollout keeps no gradient: the old policy is a constant in the ratio."


def check_gt_log_prob(call):
    abar = {5: .1, 2: .9}

    def q_sample(x0, t, z):
        assert torch.is_tensor(t) and t.shape == (4,), "q_sample takes a level for each image."
        a = torch.tensor([abar[u] for u in t.tolist()]).to(x0.dtype).view(-1, 1, 1, 1)
        return x0 * a ** .5 + z * (1 - a) ** .5
    method = lrpo.LRPO.__new__(lrpo.LRPO)
    method.diffusion, method.generator = Stub(q_sample=q_sample), torch.Generator().manual_seed(1)
    gt, mu = noise(0, 4, 3, 16, 16) + 5, noise(1, 4, 3, 16, 16).requires_grad_()
    step = lrpo.Transition(5, 2, gt + 1, gt + 2, gt, gt)
    sigma = torch.tensor(.7).double()
    with patch.object(lrpo, "gaussian_log_prob", reference_log_prob):
        got = call(method.gt_log_prob, step, gt, mu, sigma, draws=lambda _: [step.x_gt])
        assert torch.is_tensor(step.x_gt), "The noised ground truth should be kept in step.x_gt."
        first = step.x_gt.clone()
        again = call(method.gt_log_prob, step, gt, mu, sigma)
    shaped(got, (4,), "The log-likelihood")
    assert step.x_gt.mean() > 4, ("The noised ground truth plays the action's part, so it should "
                                  "lie at the level where the step arrives, s.")
    assert torch.equal(first, step.x_gt) and torch.equal(got, again), \
        "The ground truth is noised once for all updates of a rollout."
    standard((first - math.sqrt(.9) * gt) / math.sqrt(.1),
             "The ground truth should be noised: a clean image is no state of level s.")
    near(got, reference_log_prob(first, mu, sigma), "This is not the likelihood of the noised "
         "ground truth under the policy's own mu and sigma.")


def check_branch(call):
    seen, G, schedule = call.seen, 3, [(9, 5), (5, 2), (2, 0), (0, -1)]
    lq = (noise(0, 4, 3, 16, 16) / 2 + .3).repeat_interleave(G, dim=0)
    method = steered.BranchedLRPO.__new__(steered.BranchedLRPO)
    method.net, method.schedule, method.branch = None, schedule, schedule[-2]
    method.settings, method.generator = Stub(eta=.7, group=G), torch.Generator().manual_seed(1)
    method.diffusion = fake_policy(schedule, call)

    def draws(result):
        last = seen[2].mu.repeat_interleave(12 // len(seen[2].mu), dim=0)
        return [*noises(seen[:2], [seen[1].x, result[1][0].x[::G]]), result[1][0].action - last]
    with patch.object(steered, "gaussian_log_prob", reference_log_prob), torch.enable_grad():
        restored, steps = call(method.rollout, lq, draws=draws)
    seen = list(seen)
    assert {step.eta for step in seen} == {.7}, "eta is a setting of the policy."
    assert [(step.t, step.s) for step in seen] == schedule, \
        "The policy acts once at each step of the schedule, in its order."
    assert len(steps) == 1 and (steps[0].t, steps[0].s) == method.branch, \
        "Only the step at the branch is trained: it is the single transition."
    step, groups = steps[0], steps[0].x[::G]
    shaped(step.x, (12, 3, 16, 16), "The state at the branch")
    assert torch.equal(step.x, groups.repeat_interleave(G, dim=0)), \
        "Up to the branch the members of a group share their state."
    assert not torch.allclose(groups[0], groups[1]), "Different groups have different noise."
    assert [len(given.x) for given in seen[:2]] == [4, 4], \
        "Before the branch one trajectory is enough for each group: G of them cost G times as much."
    for given in seen:
        assert torch.equal(given.lq, lq if len(given.x) == 12 else lq[::G]), \
            "The policy sees the low-quality image of each trajectory: one of each group, or all."
    starts_as_noise(seen[0].x, lq[::G])
    check_walk(seen[:2], [seen[1].x, groups])
    mu, sigma = seen[2].mu.repeat_interleave(12 // len(seen[2].mu), dim=0), seen[2].sigma
    assert not torch.allclose(step.action[0], step.action[1]), \
        "At the branch each member needs its own noise, or there is nothing to compare."
    check_walk([Stub(mu=mu, sigma=sigma)], [step.action])
    near(step.x0_hat, seen[2].x0_hat.repeat_interleave(12 // len(seen[2].mu), dim=0),
         "A transition keeps x0_hat of its step.")
    near(step.log_prob, reference_log_prob(step.action, mu, sigma), "log_prob should be that of "
         "each member's action at the branch.")
    assert torch.equal(seen[3].x, step.action), "After the branch each member goes its own way."
    near(restored, seen[3].mu, "The last step arrives at the restored image: it adds no noise.")
    assert not restored.requires_grad and not step.log_prob.requires_grad, \
        "A rollout keeps no gradient: the old policy is a constant in the ratio."
    method.branch = None
    with patch.object(lrpo.LRPO, "rollout", lambda self, lq: ("full", [])):
        assert call(method.rollout, lq) == ("full", []), \
            "Without the branch it is the rollout of LRPO."


def check_gaussian_kl(call):
    mu, ref, sigma = noise(0, 4, 3, 8, 8), noise(1, 4, 3, 8, 8), torch.tensor(.5).double()
    got = call(steered.gaussian_kl, mu, ref, sigma)
    each = kl_divergence(Normal(mu, sigma), Normal(ref, sigma))
    far(got, each.flatten(1).sum(1), "This is the sum over D; take the average, as the log density "
        "does, so that the two stay comparable.")
    shaped(got, (4,), "The KL divergence")
    far(got, mean(each) * 2, "Means that are one sigma apart are half a nat apart.")
    far(got, mean(each) / 2, "The distance of the means counts in units of sigma, squared.")
    near(got, mean(each), "The KL divergence grows with the squared distance of the means, in "
         "units of sigma.")
