"""What the checks of the exercises share. They are in checks_SET.py beside this file.

`python -m tools.exercises check` runs them. check_NAME() tests one function alone: whatever else
that function calls is replaced by a stand-in, so that no check needs the solution of another
exercise. The references are torch.distributions, autograd, scikit-image, closed forms and numbers
written out. Each message speaks of the idea behind a mistake.
"""
from types import SimpleNamespace as Stub

import torch

NAN = "The result is not a number somewhere: think of the smallest and largest inputs."


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaped(value, shape, what):
    assert torch.is_tensor(value), f"{what} should be a tensor, not a {type(value).__name__}."
    assert tuple(value.shape) == shape, (f"{what} has the shape {tuple(value.shape)}, but should "
                                         f"have {shape}: the docstring says over what to average.")


def near(value, want, message, tolerance=1e-5):
    value, want = (torch.as_tensor(u).detach().double() for u in (value, want))
    assert value.isfinite().all(), NAN
    assert torch.allclose(value, want, rtol=tolerance, atol=tolerance), message


def far(value, wrong, message):
    """What a known mistake would give, and what to say to someone who made it."""
    value, wrong = (torch.as_tensor(u).detach().double() for u in (value, wrong))
    assert value.shape != wrong.shape or not torch.allclose(value, wrong, rtol=1e-4, atol=1e-5), \
        message


def mean(x):
    return x.flatten(1).mean(1)


def fake_policy(schedule, seen, weight):
    """A stand-in for a diffusion process: its steps need no network, and note what they are given.
    The last step, s = -1, has sigma = 0."""
    def ddim_step(net, x, lq, t, s, eta):
        mu, sigma = weight * x + lq / 10, torch.tensor((.3 + .1 * t) * (s >= 0)).double()
        seen.append(Stub(x=x, lq=lq, t=t, s=s, eta=eta, mu=mu, sigma=sigma, x0_hat=3 * mu))
        return mu, sigma, seen[-1].x0_hat
    return Stub(schedule=lambda K: schedule[:K], ddim_step=ddim_step)


def starts_as_noise(x, lq):
    assert abs(x.mean()) < .1 and abs(x.std() - 1) < .1 and x.shape == lq.shape, \
        "Sampling should start at pure noise, which does not depend on lq."
    assert not torch.equal(x[0], x[1]), "Each image starts at its own noise."


def check_walk(seen, states):
    """x_s = mu + sigma z with a fresh z, from each of the calls seen to the next state."""
    drawn = []
    for call, x in zip(seen, states):
        assert not torch.equal(x, call.mu), ("A step is a sample of its Gaussian: without its "
                                             "noise there is nothing to explore.")
        drawn.append((x - call.mu) / call.sigma)
        assert .85 < drawn[-1].std() < 1.15 and abs(drawn[-1].mean()) < .15, \
            "The noise of a step should have the standard deviation sigma of this very step."
        assert not torch.allclose(drawn[-1][0], drawn[-1][1]), "Each image needs its own noise."
    assert not any(torch.allclose(a, b) for a, b in zip(drawn, drawn[1:])), \
        "Each step needs fresh noise."
    for call, z in zip(seen, drawn):
        assert abs(torch.corrcoef(torch.stack([z.flatten(), call.mu.flatten()]))[0, 1]) < .2, \
            "A step adds its noise to the mean as it is, and the noise does not depend on it."
