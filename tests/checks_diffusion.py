"""The checks of the set diffusion, see exercise_checks.py."""
import math

import torch

import model
from exercise_checks import (Stub, check_walk, fake_policy, far, mean, near, noise, noises, shaped,
                             standard, starts_as_noise, uniform)
from support.cli import UserError


def process(*abar):
    """A diffusion process with these few levels."""
    d = model.Diffusion(model.Config(prior=0, timesteps=10))
    d.abar, d.T = torch.tensor(abar), len(abar)
    d.abar_cpu = d.abar.double()
    return d


def called(*_):
    """A network that should not be called."""
    raise AssertionError("v is predicted by `self.predict`, which adds the prior to the network.")


def check_schedule(call):
    d = model.Diffusion(model.Config())
    steps = call(d.schedule, 5)
    assert isinstance(steps, list) and len(steps) == 5, "K = 5 should be a list of five steps."
    assert all(len(step) == 2 for step in steps), "A step is a pair (t, s): from t to s."
    assert all(isinstance(step, tuple) for step in steps), "A step is a tuple (t, s)."
    assert all(t > s for t, s in steps), "A step goes from a noisier level t to a cleaner level s."
    assert all(a[0] > b[0] for a, b in zip(steps, steps[1:])), \
        "Sampling goes from noise to image: the order should be noisiest first."
    assert steps[0][0] == 999, ("With T = 1000 the noisiest level has the index 999. Sampling "
                                "starts there, at almost pure noise, or the brightness is biased.")
    assert steps[-1][1] == -1, "The last step should end at the clean image, which is s = -1."
    assert all(a[1] == b[0] for a, b in zip(steps, steps[1:])), \
        "Each step should begin where the one before it ended."
    assert steps == [(999, 799), (799, 599), (599, 399), (399, 199), (199, -1)], \
        "The steps should be evenly spaced."
    assert call(d.schedule, 3) == [(999, 666), (666, 332), (332, -1)], \
        "Where K does not divide T, t is rounded: the rounding is not the one in the docstring."
    assert call(d.schedule, 1) == [(999, -1)], \
        "K = 1 is a single step from noise to the clean image."
    assert all(type(u) is int for step in d.schedule(3) for u in step), "t and s should be ints."
    assert model.Diffusion(model.Config(timesteps=10)).schedule(2) == [(9, 4), (4, -1)], \
        "A process may have another number of levels than 1000."
    for K in (0, 1, 1000, 1001):
        refused = False
        try:
            d.schedule(K)
        except UserError:
            refused = True
        assert refused == (K in (0, 1001)), \
            f"With T = 1000, K = 0 and 1001 steps are impossible, 1 and 1000 are not: see K = {K}."


def check_q_sample(call):
    d, one = process(.99, .36, .04), torch.ones(3, 3, 4, 4, dtype=torch.float64)
    t = torch.tensor([0, 1, 2])
    image, z = call(d.q_sample, one, t, 0 * one), call(d.q_sample, 0 * one, t, one)
    shaped(image, (3, 3, 4, 4), "x_t")
    assert image[0].mean() > .9 and z[0].mean() < .3, \
        "At t = 0 the image should be nearly whole: which part is the signal's, which the noise's?"
    far(image[:, 0, 0, 0], [.99, .36, .04], "abar is a variance, and x_t is no variance: if all "
        "weights are squared and added, the variance of x_t should be one.")
    near(image ** 2 + z ** 2, one, "The variances of signal and noise should add up to one at "
         "every level.")
    near(image[:, 0, 0, 0], [.9949874, .6, .2], "Each image of the batch has its own level t.")
    x, e = noise(0, 3, 3, 4, 4), noise(1, 3, 3, 4, 4)
    near(call(d.q_sample, x, t, e), image * x + z * e,
         "x_t should be a sum of the signal and the noise.")


def check_v_loss(call):
    n, T, seen = 2000, 8, call.seen
    d = process(*torch.linspace(.95, .05, T).tolist())
    gt, lq, error = noise(0, n, 3, 2, 2), noise(1, n, 3, 2, 2), noise(2, n, 3, 2, 2)

    def roots(t, x):
        return [u.sqrt()[t].to(x.dtype).view(-1, 1, 1, 1) for u in (d.abar, 1 - d.abar)]

    def q_sample(x0, t, z):
        a, b = roots(t, x0)
        return a * x0 + b * z

    def predict(net, x, lq, t):
        """Knows v from x_t and the photo, and errs by `error`."""
        (a, b), y = roots(t, x), gt.to(x.dtype)
        z = (x - a * y) / b
        seen.append(Stub(t=t, lq=lq, z=z, other=error + 2 * (a * z - b * y),    # of another sign
                         swapped=error + a * (z - y) - b * (y - z)))
        return (a * z - b * y + error.to(x.dtype)) * call.weight
    d.predict, d.q_sample = predict, q_sample
    loss = call(d.loss, called, lq, gt, torch.Generator().manual_seed(3),
                draws=lambda _: [seen[0].t, seen[0].z])
    assert len(seen) == 1, "v is predicted once, by `self.predict`, at x_t."
    seen, = seen
    assert seen.lq is lq, "The network restores lq: predict from it, not from the ground truth."
    assert torch.is_tensor(seen.t) and seen.t.shape == (n,) and seen.t.dtype == torch.int64, \
        "Each image should get its own level t, an int64 tensor (B,)."
    assert seen.t.unique().tolist() == list(range(T)), \
        "t should be uniform over all levels, 0 to T-1, or some are never trained."
    uniform(T, seen.t, "t should be uniform over all levels: some come far more often than others.")
    standard(seen.z, "x_t should hold standard normal noise, drawn anew, at the level t.")
    assert torch.is_tensor(loss) and loss.shape == (n,), \
        "There should be one loss for each image, (B,): average over the pixels, not the batch."
    far(loss, error.square().flatten(1).sum(1), "Take the mean over the pixels, not the sum: the "
        "loss should not grow with the size of the image.")
    far(loss, mean(error.abs()), "The error should be squared.")
    far(loss, mean(seen.other ** 2), "The target has a wrong sign: v has its own convention.")
    far(loss, mean(seen.swapped ** 2), "In the target, signal and noise have changed places.")
    near(loss, mean(error ** 2), "The target should be v of this image, this noise and this level.")


def check_sigma(call):
    d = process(.9, .5, .1)
    got = call(d.sigma, 2, 1, 1.0)
    assert torch.is_tensor(got) and got.dtype == torch.float64, "sigma is a float64 tensor."
    assert math.isfinite(got), "A step goes from the noisier t to the cleaner s: are they mixed up?"
    near(call(d.sigma, 2, 1, 0.0), 0, "eta = 0 is the deterministic sampler: its sigma is 0.")
    near(call(d.sigma, 2, -1, 1.0), 0, "The last step ends at the clean image, and adds no noise.")
    far(got, 4 / 9, "This is the variance; sigma is a standard deviation.")
    near(call(d.sigma, 2, 1, .5), got / 2, "sigma should be proportional to eta.")
    far(call(d.sigma, 2, 0, 1.0), 2 / 3, "A step may skip levels: s need not be t - 1.")
    near(got, 2 / 3, "At eta = 1 the step is DDPM's posterior q(x_s | x_t, x_0), whose variance is "
         "(1 - abar_s) / (1 - abar_t) times the beta between the two levels.")
    near(call(d.sigma, 1, 0, 1.0), math.sqrt(.2 * 4 / 9), "sigma belongs to both ends of a step.")


def check_ddim_mean(call):
    d, one = process(.9, .5, .1), torch.ones(2, 3, 4, 4, dtype=torch.float64)
    ratio = lambda t, s: ((1 - d.abar[s]) / (1 - d.abar[t]) * (1 - d.abar[t] / d.abar[s])).double()
    d.sigma = lambda t, s, eta: eta * ratio(t, s).sqrt() if s >= 0 else torch.zeros(()).double()
    zero, mu = 0 * one, lambda *given: call(d.ddim_mean, *given)
    shaped(mu(one, one, 2, 1, 1.0), (2, 3, 4, 4), "The mean")
    far(mu(one, zero, 2, 1, 0.0), math.sqrt(.1) * one, "x_s lies at the level s, where the step "
        "arrives, and not at the level where it departs.")
    near(mu(one, zero, 2, 1, 0.0), math.sqrt(.5) * one, "The share of the clean image in x_s "
         "follows from abar at the level where the step arrives.")
    near(mu(zero, one, 2, 1, 0.0), math.sqrt(.5) * one, "Without fresh noise, eps alone should "
         "bring the variance of x_s to that of its level.")
    far(mu(zero, one, 2, 1, 1.0), math.sqrt(.5) * one, "eta is ignored: fresh noise of variance "
        "sigma^2 comes later, and the mean has to leave room for it.")
    near(mu(zero, one, 2, 1, 1.0), math.sqrt(.5 - 4 / 9) * one, "The variances of fresh noise and "
         "of the kept noise should add up to that of the level s.")
    near(mu(one, one, 2, -1, 1.0), one, "The last step arrives at the clean image, s = -1.")
    d.sigma = lambda t, s, eta: torch.tensor(math.sqrt(.5) * (1 + 1e-7), dtype=torch.float64)
    assert mu(one, one, 2, 1, 1.0).isfinite().all(), \
        "Rounding can make the argument of a root slightly negative: the result must not be nan."


def check_ddim_step(call):
    d = process(.9, .5, .1)
    x0, eps, lq = 2 * noise(0, 2, 3, 4, 4), noise(1, 2, 3, 4, 4), noise(2, 2, 3, 4, 4)
    signal, rest = math.sqrt(d.abar[2].double()), math.sqrt(1 - d.abar[2].double())
    x = signal * x0 + rest * eps

    def predict(net, x, lq, t):
        call.seen.append(Stub(x=x, lq=lq, t=t))
        return (signal * eps - rest * x0).to(x.dtype) * call.weight
    d.predict, d.sigma = predict, lambda t, s, eta: torch.tensor(.3 * eta + .1 * s)
    d.ddim_mean = lambda x0, eps, t, s, eta: math.sqrt(.5) * x0 + eta * eps - s
    mu, sigma, x0_hat = call(d.ddim_step, called, x, lq, 2, 1, .7)
    assert len(call.seen) == 1, "A step takes one prediction of v, by `self.predict`."
    seen, = call.seen
    assert seen.x is x and seen.lq is lq, "The network sees x_t and the low-quality image."
    assert torch.is_tensor(seen.t) and seen.t.shape == (2,) and (seen.t == 2).all(), \
        "The network takes t as a tensor (B,), the level before the step for each image."
    assert seen.t.dtype == torch.int64, "The network takes t as an int64 tensor."
    shaped(x0_hat, (2, 3, 4, 4), "x0_hat")
    far(x0_hat, eps, "x0_hat and eps have changed places: which of the two is the image?")
    far(x0_hat, x0.clamp(-1, 1), "The predicted image should not be clamped here: the step is an "
        "affine map of x_t and v.")
    near(x0_hat, x0, "The predicted image does not come back: (x_t, v) is (x_0, eps), rotated, and "
         "the way back is a rotation too.")
    near(mu, math.sqrt(.5) * x0 + .7 * eps - 1, "The mean needs the noise eps that v and x_t "
         "imply, and t, s and eta of this step.")
    near(sigma, .31, "sigma should be that of this step and this eta.")


def check_sample(call):
    seen, lq = call.seen, noise(0, 4, 3, 16, 16) / 2 + .3
    d, fake = process(.9), fake_policy([(9, 5), (5, 2), (2, -1)], call)
    d.schedule, d.ddim_step = fake.schedule, fake.ddim_step
    with torch.enable_grad():
        x = call(d.sample, None, lq, 3, .7, torch.Generator().manual_seed(1),
                 draws=lambda _: noises(seen, [step.x for step in seen[1:]]))
    assert [(step.t, step.s) for step in seen] == [(9, 5), (5, 2), (2, -1)], \
        "The steps should be those of the schedule, in its order."
    assert {step.eta for step in seen} == {.7}, "Each step needs the eta that was asked for."
    assert all(torch.equal(step.lq, lq) for step in seen), "The network sees lq at each step."
    starts_as_noise(seen[0].x, lq)
    check_walk(seen, [step.x for step in seen[1:]])
    assert x.min() >= -1 and x.max() <= 1, "A restored image should be clamped to [-1, 1]."
    near(x, seen[-1].mu.clamp(-1, 1), "The last step arrives at the clean image: it adds no noise.")
    assert not x.requires_grad, "Sampling should keep no gradient: it would hold every activation."
