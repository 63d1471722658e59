"""The checks of the set policy, see exercise_checks.py."""
import math
from unittest.mock import patch

import torch
from torch.distributions import Normal, kl_divergence

import lrpo
from exercise_checks import (Stub, check_walk, fake_policy, far, mean, near, noise, noises, rows,
                             shaped, standard, starts_as_noise)


def reference_log_prob(x, mu, sigma, g=1):
    """(B, g, g) by torch.distributions; g divides H and W."""
    each = Normal(mu, sigma.to(mu.dtype)).log_prob(x).mean(1)           # (B, H, W)
    return each.unflatten(2, (g, -1)).unflatten(1, (g, -1)).mean((2, 4))


def check_gaussian_log_prob(call):
    x, mu, sigma = noise(0, 4, 3, 8, 6), noise(1, 4, 3, 8, 6), torch.tensor(.7).double()
    log_prob = lambda *given: call(lrpo.gaussian_log_prob, *given)
    each = Normal(mu, sigma).log_prob(x)
    got = log_prob(x, mu, sigma)
    far(got.flatten(), each.flatten(1).sum(1), "This is the sum over D: a ratio of such densities "
        "overflows, because 1.01 to the power of D is huge. Take the average over D.")
    shaped(got, (4, 1, 1), "The log density")
    got = got.flatten()
    far(got, 3 * mean(each), "D counts the three colours of each pixel as well: average over them.")
    half = log_prob(mu, mu, torch.tensor(.5).double()).flatten()
    near(half - log_prob(mu, mu, torch.tensor(1.).double()).flatten(), [math.log(2)] * 4,
         "A Gaussian of half the width is twice as high at its mean: the density depends on sigma.")
    exponent = got - log_prob(mu, mu, sigma).flatten()
    far(exponent, mean(-((x - mu) ** 2) / .49), "The exponent of a Gaussian has a factor of one "
        "half.")
    near(exponent, mean(-((x - mu) ** 2) / .98),
         "Distances from the mean count in units of sigma, squared.")
    near(got, mean(each), "A density integrates to one: the constant of the normalisation is "
         "missing or wrong.")
    low = log_prob(x.bfloat16(), mu.bfloat16(), sigma.bfloat16())
    assert low.dtype == torch.float32, "Compute in float32: bfloat16 cannot tell a ratio from 1."
    got = log_prob(x, mu, sigma, 2)
    shaped(got, (4, 2, 2), "With g = 2 the log density")
    near(got, reference_log_prob(x, mu, sigma, 2), "With g = 2 each of the 2 x 2 patches has a "
         "log density of its own, at its own place: the average over its values alone.")


def check_group_advantages(call):
    def whole(*given, std="group"):
        """Of whole images, g = 1: (P, G)."""
        rewards = torch.tensor(given, dtype=torch.float64)
        got = call(lrpo.group_advantages, rewards[..., None, None], std)
        shaped(got, (*rewards.shape, 1, 1), "The advantage")
        return got[..., 0, 0]
    near(whole([0., 1.], [10., 13.], [5., 5.]).mean(1), torch.zeros(3), "Each image is compared "
         "with its own group: hard images should not count as bad samples, so that every group has "
         "the mean 0.", 1e-4)
    got = call(lrpo.group_advantages, torch.arange(.1, 1, .1).view(9, 1, 1, 1).repeat(1, 7, 1, 1))
    assert got.isfinite().all() and (got == 0).all(), \
        "A group of equal rewards says nothing: its advantages are exactly 0. The mean " \
        "of equal float32 numbers may differ from them by rounding."
    got = whole([.47, .49, .62])
    assert abs(got[0, 0] + .695) > .01, ("This divides by the standard deviation of a sample "
                                         "(n - 1); the paper's figure has that of the population.")
    near(got, [[-.8522, -.5514, 1.4035]], "The advantage is in units of the standard deviation.",
         2e-3)
    assert (whole([.5, .5 + 1e-6]) == 0).all(), \
        "Rewards that differ by rounding alone count as equal."
    near(whole([0., 2e-4]), [[-.5, .5]], "Where rewards hardly differ the advantage should stay "
         "bounded: the divisor is never much below 1e-4.", 1e-3)
    std = math.sqrt(sum((u - .7) ** 2 for u in (0, 1, 0, 3, .1, .1)) / 6)
    many = whole([.1] * 7, [.1, .2, .3, .4, .5, .6, .7], std="batch")
    assert (many[0] == 0).all(), \
        "Whether the rewards of a group are equal is judged within the group, whatever divides."
    near(whole([0., 1.], [0., 3.], [.1, .1], std="batch") * std, [[-.5, .5], [-1.5, 1.5], [0, 0]],
         "With std = \"batch\" every group is divided by the standard deviation of all rewards.",
         2e-3)
    patches = noise(0, 2, 5, 2, 2) * torch.tensor([[1., 2.], [4., 8.]]) + noise(1, 2, 1, 2, 2)
    got, centred = call(lrpo.group_advantages, patches), patches - patches.mean(1, keepdim=True)
    near(got.mean(1), torch.zeros(2, 2, 2), "A patch is compared with the same patch of the other "
         "members of its group, not with other places.", 1e-4)
    near(got, centred / centred.square().flatten(1).mean(1).sqrt().view(2, 1, 1, 1), "An image has "
         "one standard deviation, over all its patches: a patch in which the members hardly differ "
         "should not count as much as one in which they do.", 1e-3)


def check_noise_level_weights(call):
    got = call(lrpo.noise_level_weights, torch.tensor([4., 1.5, .5]).double())
    shaped(got, (3,), "The weight")
    assert got[0] > got[2], "The noisy steps decide more: they should get the larger weight."
    near(got.mean(), 1, "On average over the steps the weight should be 1, or the learning rate "
         "changes with the number of steps.")
    near(got, [2, .75, .25], "The weights should be proportional to the standard deviation.")


def check_clipped_loss(call):
    def at(shift, A, clip=.1):
        new = torch.tensor([[[shift]]], dtype=torch.float64, requires_grad=True)
        loss, ratio = call(lrpo.clipped_loss, new - 3., torch.tensor([[[-3.]]]).double(),
                           torch.tensor([[[A]]]).double(), clip)
        shaped(loss, (1, 1, 1), "The loss")
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
    near(both.flatten() / math.exp(.05), [-2.5, 2.5], "The loss is proportional to the advantage: "
         "how much better counts, not only whether.")


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


def reference_kl(mu, ref, sigma):
    return mean(kl_divergence(Normal(mu, sigma.to(mu.dtype)), Normal(ref, sigma.to(mu.dtype))))


def bare(**fields):
    """The method with these fields alone."""
    method = lrpo.LRPO.__new__(lrpo.LRPO)
    vars(method).update(generator=torch.Generator().manual_seed(1), **fields)
    return method


def check_rollout(call):
    """Full trajectories, then a group that shares all noise but that of its last noisy step."""
    lq, G, schedule = noise(0, 2, 3, 16, 16) / 2 + .3, 3, [(9, 5), (5, 2), (2, 0), (0, -1)]
    method = bare(net=None, schedule=schedule, settings=Stub(eta=.7, group=G), g=2, shared=0,
                  diffusion=fake_policy(schedule, call))
    for method.shared in (0, 2):
        call.fresh = True                   # of both its randomness is looked at
        with patch.object(lrpo, "gaussian_log_prob", reference_log_prob), torch.enable_grad():
            restored, steps = call(method.rollout, lq, draws=lambda result: noises(
                call.seen, [u.action for u in result[1]]))
        seen, own = list(call.seen), schedule[method.shared:-1]
        assert [(step.t, step.s) for step in seen] == schedule, \
            "The policy acts once at each step of the schedule, in its order."
        assert [(u.t, u.s) for u in steps] == own, ("The own steps, those after the first "
            "`self.shared`, become transitions, each with its t and s. The last step has sigma = 0 "
            "and so no density: it becomes none.")
        wide = 2 * G if not method.shared else 2
        assert all(len(step.x) == wide for step in seen[:method.shared + 1]), (
            "Up to the end of the shared steps one trajectory is enough for each image, and G of "
            "them cost G times as much; without shared steps each member starts for itself.")
        assert all(torch.equal(step.lq, rows(lq, len(step.x))) for step in seen), \
            "The policy sees the low-quality image of each trajectory."
        assert {step.eta for step in seen} == {.7}, "eta is a setting of the policy."
        starts_as_noise(seen[0].x, rows(lq, wide))
        for step, given, after in zip(steps, seen[method.shared:], seen[method.shared + 1:]):
            shaped(step.x, tuple(given.x.shape), "The state before the step")
            assert torch.equal(step.x, given.x), "A transition keeps the state before the step."
            assert torch.equal(step.action, after.x), (
                "The action of a step is the state of the next: they make one trajectory, and "
                "each member goes its own way.")
            near(step.x0_hat, given.x0_hat, "A transition keeps x0_hat of its step.")
        check_walk(seen[:-1], [step.x for step in seen[1:]])
        for step, given in zip(steps, seen[method.shared:]):
            near(step.log_prob, reference_log_prob(
                step.action, rows(given.mu, 2 * G), given.sigma, 2), "log_prob should be that of "
                "each member's action taken, under mu and sigma of the same step, in self.g x "
                "self.g patches.")
        near(restored, seen[-1].mu, "The last step arrives at the restored image: it adds no "
             "noise, and nothing is clamped here.")
        assert not restored.requires_grad and not any(u.log_prob.requires_grad for u in steps), \
            "A rollout keeps no gradient: the old policy is a constant in the ratio."


def check_noised_log_prob(call):
    abar = {5: .1, 2: .9}

    def q_sample(x0, t, z):
        assert torch.is_tensor(t) and t.shape == (4,), "q_sample takes a level for each image."
        a = torch.tensor([abar[u] for u in t.tolist()]).to(x0.dtype).view(-1, 1, 1, 1)
        return x0 * a ** .5 + z * (1 - a) ** .5
    method = bare(diffusion=Stub(q_sample=q_sample))
    gt, mu = noise(0, 4, 3, 16, 16) + 5, noise(1, 4, 3, 16, 16).requires_grad_()
    step = lrpo.Transition(5, 2, gt + 1, gt + 2, gt, gt)
    sigma = torch.tensor(.7).double()
    with patch.object(lrpo, "gaussian_log_prob", reference_log_prob):
        got = call(method.noised_log_prob, step, gt, mu, sigma, draws=lambda _: [step.x_gt])
        assert torch.is_tensor(step.x_gt), "The noised ground truth should be kept in step.x_gt."
        first = step.x_gt.clone()
        again = call(method.noised_log_prob, step, gt, mu, sigma)
    shaped(got, (4,), "The log-likelihood")
    assert step.x_gt.mean() > 4, ("The noised ground truth plays the action's part, so it should "
                                  "lie at the level where the step arrives, s.")
    assert torch.equal(first, step.x_gt) and torch.equal(got, again), \
        "The ground truth is noised once for all updates of a rollout."
    standard((first - math.sqrt(.9) * gt) / math.sqrt(.1),
             "The ground truth should be noised: a clean image is no state of level s.")
    near(got, reference_log_prob(first, mu, sigma).flatten(), "This is not the likelihood of the "
         "noised ground truth under the policy's own mu and sigma.")


def check_posterior_log_prob(call):
    def posterior_mean(x, x0, t, s, eta):
        shaped(x, tuple(x0.shape), "The state of each member")
        call.seen.append(Stub(x=x, x0=x0, t=t, s=s, eta=eta))
        return .5 * x + .3 * x0
    method = bare(diffusion=Stub(posterior_mean=posterior_mean), settings=Stub(eta=.7, group=3))
    x, gt, mu = noise(0, 2, 3, 8, 8), rows(noise(1, 2, 3, 8, 8), 6), noise(2, 6, 3, 8, 8)
    step, sigma = lrpo.Transition(5, 2, x, mu + 1, None, x + 2), torch.tensor(.7).double()
    with patch.object(lrpo, "gaussian_kl", reference_kl):
        got = call(method.posterior_log_prob, step, gt, mu, sigma)
    assert len(call.seen) == 1, "The policy that knows the ground truth is `posterior_mean`."
    given, = call.seen
    assert torch.equal(given.x, rows(x, 6)), \
        "Both policies leave the state before the step, step.x, of which each row is one group's."
    assert torch.equal(given.x0, gt), "The other policy knows the ground truth."
    assert (given.t, given.s, given.eta) == (5, 2, .7), \
        "Both policies take the same step: its t and s, and eta of the settings."
    shaped(got, (6,), "The expected log-likelihood")
    want = reference_kl(.5 * rows(x, 6) + .3 * gt, mu, sigma)
    far(got, want, "A policy that is nearer to the ground truth is more likely to take its step: "
        "the divergence has a minus sign.")
    near(got, -want, "Less the constant it is minus the KL divergence of the two Gaussians, 0 "
         "where their means agree.")


def check_gaussian_kl(call):
    mu, ref, sigma = noise(0, 4, 3, 8, 8), noise(1, 4, 3, 8, 8), torch.tensor(.5).double()
    got = call(lrpo.gaussian_kl, mu, ref, sigma)
    each = kl_divergence(Normal(mu, sigma), Normal(ref, sigma))
    far(got, each.flatten(1).sum(1), "This is the sum over D; take the average, as the log density "
        "does, so that the two stay comparable.")
    shaped(got, (4,), "The KL divergence")
    far(got, mean(each) * 2, "Means that are one sigma apart are half a nat apart.")
    far(got, mean(each) / 2, "The distance of the means counts in units of sigma, squared.")
    near(got, mean(each), "The KL divergence grows with the squared distance of the means, in "
         "units of sigma.")
