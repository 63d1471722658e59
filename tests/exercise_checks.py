"""What the checks of the exercises share. They are in checks_SET.py beside this file.

`python -m course check` runs them. check_NAME(call) tests one function alone: whatever else that
function calls is replaced by a stand-in, so that no check needs the solution of another exercise.
The references are torch.distributions, autograd, scikit-image, closed forms and numbers written
out. Each message speaks of the idea behind a mistake.

A check calls the function through `call` (a `Call`), which looks at what no value shows: arguments
changed in place, the type of the result, its gradient, the origin of its randomness, torch's state.
"""
import copy
import inspect
import os
from dataclasses import is_dataclass
from types import SimpleNamespace

import torch

NAN = "The result is not a number somewhere: think of the smallest and largest inputs."
SURE = 6.0              # standard errors: 1 in 500 million honest draws is further away


class Stub(SimpleNamespace):
    """An object that holds no more than a check needs."""

    def __getattr__(self, name):
        raise AttributeError(f"what the check hands over has no `{name}`: the function can do with "
                             "what its docstring names")


class Call:
    """`call(function, *args)` calls a student's function, and looks at how it behaves.

    At once, because nothing that follows would make sense: it returns as many things as it should,
    changes no argument in place, and leaves torch as it was. At the end of the check (`finish`),
    because the check's own sentences say more: what the exercise declares of dtypes, gradient and
    randomness. For that the first call is repeated with float32 arguments, with arguments moved by
    a little (the slope of the value has to be the gradient), and with the same and another state
    of the generator; draws(result) lists the random numbers of a call.
    Stand-ins note in `seen` what they are given; it begins anew with each call. The stand-in of a
    network multiplies its output by `weight`, which is 1.
    """

    def __init__(self, exercise):
        self.exercise, self.found, self.seen, self.fresh = exercise, [], [], True
        self.weight = torch.ones((), dtype=torch.float64, requires_grad=True)
        self.dtypes = set()                                 # of the arguments of all calls

    def __call__(self, function, *args, draws=None, repeat=True):
        repeat, self.fresh = repeat and self.fresh, False
        if repeat:
            owner = getattr(function, "__self__", None)
            generator = next((u for u in (*args, getattr(owner, "generator", None))
                              if isinstance(u, torch.Generator)), None)
            kept = [(u, dict(vars(u))) for u in args if has_fields(u)]
            state = generator and generator.get_state()

            def restore(state=state):
                for thing, fields in kept:
                    vars(thing).clear()
                    vars(thing).update(fields)
                if generator:
                    generator.set_state(state)

            def run(args=args, state=state):
                restore(state)
                return self.once(function, args)
            for look in (lambda: self.check_draws(run, generator, draws),
                         lambda: run([single(u) for u in args]),
                         lambda: self.check_gradients(run, function, args)):
                try:
                    look()
                except Exception as error:      # in the call below it is raised again, or it is
                    self.found.append(          # of other arguments only
                        f"With other arguments of the same kind: {type(error).__name__}: {error}")
            restore()
        return self.once(function, args)

    def once(self, function, args):
        """A call, and what can be said about it at once."""
        name, world = self.exercise.name, torch_state()
        given = [*tensors(args), *tensors(vars(getattr(function, "__self__", Stub())))]
        before = [u.detach().clone() for u in given]
        self.seen.clear()
        try:
            result = function(*args)
            changed = torch_state() != world
        finally:
            torch.set_grad_enabled(world[0])
            torch.set_default_dtype(world[1])
            os.chdir(world[2])
        assert result is not None, f"{name} returned None: is the return missing?"
        if self.exercise.results > 1:
            assert isinstance(result, (tuple, list)) and len(result) == self.exercise.results, \
                f"{name} should return {self.exercise.results} things: see its docstring."
        assert all(torch.equal(u, v) for u, v in zip(given, before)), (
            "An argument was changed in place (by an operation such as x += 1, x[0] = 1 or "
            "x.clamp_()): whoever called still needs it. Make a new tensor.")
        assert not changed, ("After the call torch's grad mode or default dtype, or the working "
                             "folder, is another one: every later computation would suffer.")
        kinds = {u.dtype for u in tensors(args) if u.is_floating_point() and u.dim()}
        self.dtypes |= kinds
        wrong = {u.dtype for u in tensors(result) if u.is_floating_point()
                 and (u.dim() or not self.exercise.float64)} - {torch.float32}
        if kinds == {torch.float32} and wrong:
            self.found.append(f"float32 arguments give a result in {wrong.pop()}: the networks are "
                              "in float32, and training needs one dtype throughout.")
        return result

    def check_draws(self, run, generator, draws):
        """Equal states of the generator give equal draws, other states others, and the state has
        moved, whatever torch's global generator does."""
        if not self.exercise.random:
            return
        own, other = generator.get_state(), torch.Generator().manual_seed(77).get_state()
        drawn, moved = [], True
        for seed, state in enumerate((own, other, own)):
            torch.manual_seed(seed)
            result = run(state=state)
            moved &= not torch.equal(generator.get_state(), state)
            drawn.append([u.detach().clone() for u in draws(result)])
        if not moved or any(not torch.equal(*u) for u in zip(drawn[0], drawn[2])):
            self.found.append("The same generator should give the same numbers, and should have "
                              "moved: draw from the caller's own generator, not from torch's "
                              "global one, and not from one with a seed of your own.")
        if any(torch.equal(*u) for u in zip(drawn[0], drawn[1])):
            self.found.append("In another state the generator should give other numbers: is there "
                              "a fixed seed, or are they kept from an earlier call?")

    def check_gradients(self, run, function, args):
        """The gradient of a weighted sum of all results, against its slope."""
        names = [*inspect.signature(function).parameters]
        for name in self.exercise.gradient:
            leaf, moved = self.weight, list(args)
            if name != "net":
                leaf = args[names.index(name)].detach().clone().requires_grad_()
                moved[names.index(name)] = leaf

            def total():
                parts = [u for u in tensors(run(moved)) if u.is_floating_point()]
                return sum((u.double() * noise(i, *u.shape)).sum() for i, u in enumerate(parts))
            with torch.enable_grad():
                value = total()
                mine = torch.zeros_like(leaf)
                if value.requires_grad:
                    mine, = torch.autograd.grad(value, leaf, allow_unused=True,
                                                materialize_grads=True)
            way, size = noise(99, *leaf.shape), .01 * leaf.detach().abs().mean()
            with torch.no_grad():
                leaf += size * way
                slope = total()
                leaf -= 2 * size * way
                slope = (slope - total()) / (2 * size)
                leaf += size * way
            off, mine = (slope - (mine * way).sum()).abs(), (mine * way).sum()
            if off > .02 * max(slope.abs(), mine.abs()) + 1e-6 * value.detach().abs() / size:
                self.found.append(
                    f"The gradient does not pass from the result to {name}" + (
                        "'s output" if name == "net" else "") + ", or only a part of it does: "
                    "nothing between may be detached, computed under no_grad or outside torch.")

    def finish(self):
        """Say what was found beside the check's own sentences."""
        assert not self.found, self.found[0]


def has_fields(value) -> bool:
    return isinstance(value, Stub) or is_dataclass(value)


def tensors(value):
    """Every tensor in a value: in tuples, lists, dicts, stubs and dataclasses."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (list, tuple, dict)) or has_fields(value):
        value = vars(value) if has_fields(value) else value
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def single(value):
    """The same in float32; a scalar stays as it is, because sigma is float64."""
    if has_fields(value):
        value = copy.copy(value)
        vars(value).update({name: single(part) for name, part in vars(value).items()})
    is_double = torch.is_tensor(value) and value.is_floating_point() and value.dim()
    return value.float() if is_double else value


def torch_state():
    return torch.is_grad_enabled(), torch.get_default_dtype(), os.getcwd()


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


def rows(u, n):
    """Each row of u equally often, so that there are n: the group of image i stands together."""
    return u.repeat_interleave(n // len(u), dim=0)


def fake_policy(schedule, call):
    """A stand-in for a diffusion process: its steps need no network, and note what they are given.
    The last step, s = -1, has sigma = 0."""
    def ddim_step(net, x, lq, t, s, eta):
        assert not isinstance(eta, str), "A step takes a number as its eta."
        mu, sigma = .9 * call.weight * x + lq / 10, torch.tensor((.3 + .1 * t) * (s >= 0)).double()
        call.seen.append(Stub(x=x.clone(), lq=lq.clone(), t=t, s=s, eta=eta, mu=mu.clone(),
                              sigma=sigma, x0_hat=3 * mu))
        return mu, sigma, 3 * mu
    return Stub(schedule=lambda K: schedule[:K], ddim_step=ddim_step)


def noises(seen, states):
    """The noise that a walk began with, and that of each step: (x_s - mu) / sigma."""
    return [seen[0].x, *((x - rows(call.mu, len(x))) / call.sigma
                         for call, x in zip(seen, states))]


def standard(z, message):
    """Whether z looks like N(0, I), and no number of it stands in two places."""
    z, n = z.detach().double(), z.numel()
    assert z.std() < .01 or (1e7 * z).round().unique().numel() > .99 * n, \
        "Each image, channel and pixel needs its own noise: some of it is used twice."
    assert abs(z.mean()) < SURE / n ** .5 and abs(z.std() - 1) < SURE / (2 * n) ** .5, message


def uniform(bins, fell, message):
    """Whether draws that fell into equal bins, numbered from 0, look uniform (chi-square)."""
    counts = torch.bincount(fell, minlength=bins).double()
    want = counts.sum() / bins
    bound = bins + SURE * (2 * bins) ** .5 + SURE ** 2          # Laurent & Massart 2000, lemma 1
    assert len(counts) == bins and ((counts - want) ** 2 / want).sum() < bound, message


def starts_as_noise(x, lq):
    assert x.shape == lq.shape and not torch.allclose(x[0], x[1]), \
        "Each image starts at its own noise."
    standard(x, "Sampling should start at pure noise, which does not depend on lq.")


def check_walk(seen, states):
    """x_s = mu + sigma z with a fresh z, from each of the calls seen to the next state, which may
    hold more members of each group."""
    drawn = []
    for call, x in zip(seen, states):
        mu = rows(call.mu, len(x))
        assert not torch.equal(x, mu), ("A step is a sample of its Gaussian: without its noise "
                                        "there is nothing to explore.")
        assert len(x) == len(call.mu) or (x - mu).square().mean() < 4 * call.sigma ** 2, (
            "The members of a group stand together: each row is repeated, not the whole batch.")
        drawn.append((x - mu) / call.sigma)
        assert not torch.allclose(drawn[-1][0], drawn[-1][1]), "Each image needs its own noise."
        standard(drawn[-1], "The noise of a step should have the standard deviation sigma of this "
                 "very step.")
    assert not any(torch.allclose(rows(a, len(b)), b) for a, b in zip(drawn, drawn[1:])), \
        "Each step needs fresh noise."
    for call, z in zip(seen, drawn):
        mu = rows(call.mu, len(z)).flatten()
        both = torch.corrcoef(torch.stack([z.flatten(), mu]))[0, 1]
        assert abs(both) < SURE / z.numel() ** .5, \
            "A step adds its noise to the mean as it is, and the noise does not depend on it."
