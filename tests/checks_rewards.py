"""The checks of the set rewards, see exercise_checks.py."""
import copy
import math
from unittest.mock import patch

import numpy as np
import torch
from skimage.metrics import structural_similarity

import darl
import frm
import model
import refl
import rewards
from exercise_checks import (Stub, check_walk, fake_policy, far, mean, near, noise, noises, shaped,
                             starts_as_noise, uniform)


def scikit_ssim(x, y, **changes):
    """scikit-image's map of each pair of images, as they are, without its border."""
    flags = dict(data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    maps = [structural_similarity(a.numpy(), b.numpy(), channel_axis=0, full=True,
                                  **flags | changes)[1] for a, b in zip(x, y)]
    return torch.from_numpy(np.stack(maps)).mean(1)[:, 5:-5, 5:-5]


def check_ssim_map(call):
    u = torch.rand(3, 3, 24, 20, generator=torch.Generator().manual_seed(0)).double()
    x, y = .06 * u, .04 * u + .01 * noise(1, 3, 3, 24, 20)      # faint: the constants matter
    shown, flat = ((x + 1) / 2, (y + 1) / 2), torch.ones(1, 3, 16, 16).double()
    got = call(rewards.ssim_map, x, y)
    assert torch.is_tensor(got) and got.dim() == 3, \
        "SSIM is asked for around each pixel, (B, H-10, W-10): the mean is over RGB alone."
    assert got.shape == (3, 14, 10), (f"The map of 24 x 20 pixels has the shape {tuple(got.shape)},"
                                      " not (3, 14, 10): does the window reach over the border?")
    near(call(rewards.ssim_map, x, x), torch.ones(3, 14, 10), "An image is equal to itself: SSIM "
         "is 1.")
    for wrong in (scikit_ssim(x, y, data_range=2), scikit_ssim(*shown, data_range=2),
                  scikit_ssim(x, y), scikit_ssim(x + 1, y + 1)):
        far(got, wrong, "The images and the constants C1 and C2 have to be of one data range: in "
            "which range do the images come, and in which are the constants?")
    far(got, scikit_ssim(*shown, use_sample_covariance=True), "Wang's variances and covariance are "
        "weighted means under the window, without the sample correction n / (n - 1).")
    far(got, scikit_ssim(*shown, gaussian_weights=False, win_size=11), "The window is a Gaussian: "
        "pixels at its middle count more.")
    closed = (2 * .6 * .2 + 1e-4) / (.36 + .04 + 1e-4)
    got_flat = call(rewards.ssim_map, .2 * flat, -.6 * flat)
    near(got_flat, torch.full((1, 6, 6), closed), "Two flat images have a SSIM in closed form. "
         "Does a constant belong to another data range?", 1e-4)
    strong = .3 * noise(2, 2, 3, 16, 16)
    assert call(rewards.ssim_map, strong, -strong).mean((1, 2)).max() < 0, \
        "SSIM is negative where one image is the other's negative."
    near(got, scikit_ssim(*shown), "Means, variances, covariance: one of them is not the weighted "
         "mean under the Gaussian window.", 1e-4)


def reference_low_pass(x):
    return x.unfold(2, 8, 4).unfold(3, 8, 4).mean((-1, -2))


def check_low_pass(call):
    x = noise(0, 2, 3, 32, 24)
    got = call(rewards.low_pass, x)
    assert got.shape == (2, 3, 7, 5), (f"The band has the shape {tuple(got.shape)}, not (2, 3, 7, "
                                       "5): one mean is taken every 4 pixels, without padding.")
    flat = call(rewards.low_pass, torch.ones(1, 3, 16, 16))
    near(flat, torch.ones(1, 3, 3, 3), "The band of a flat image is the same flat image: the gain "
         "is 1.")
    near(got, reference_low_pass(x), "Each value is the mean of a window of 8 x 8 pixels; the "
         "windows overlap.")


def check_dwt(call):
    flat = torch.zeros(2, 3, 32, 32).double()
    moved = flat + torch.tensor([.02, -.04]).view(2, 1, 1, 1)
    with patch.object(rewards, "low_pass", reference_low_pass):
        got = call(rewards.dwt, moved, flat)
        near(call(rewards.dwt, flat, flat), [1., 1.], "Equal images have the reward 1.")
        shaped(got, (2,), "The reward")
        assert (got < 1).all(), "A reward is higher for nearer images, and at most 1."
        far(got, [math.exp(-1.2), math.exp(-2.4)], "The images are in [-1, 1], but the formula "
            "is for images in [0, 1]: the distances differ by a factor.")
        near(got, [math.exp(-.6), math.exp(-1.2)], "The sharpness of the exponential, or the unit "
             "of the distance, is not the one in the docstring.")
        stripes = torch.ones(1, 3, 32, 32).double()
        stripes[..., ::2] = -1
        near(call(rewards.dwt, stripes, flat[:1]), [1.], "Only the low-pass bands are compared.")
        moved = flat.clone()
        moved[..., :16] = .04
        moved[..., 16:] = -.04
        near(call(rewards.dwt, moved, flat), [math.exp(-1.2 * 6 / 7)] * 2, "Differences of "
             "opposite sign must not cancel: L1 is the mean of absolute values.", 1e-4)


def check_pair_loss(call):
    a, b = torch.tensor([2., -1., 0.]).double(), torch.tensor([0., 3., 0.]).double()
    each = -torch.log(torch.special.expit(a - b))
    got = call(frm.pair_loss, a, b)
    assert torch.is_tensor(got) and got.shape == (), "The loss is a mean over the pairs: a scalar."
    far(got, -torch.log(torch.special.expit(b - a)).mean(), "The pair is the wrong way round: the "
        "loss should fall as the better picture's score rises.")
    far(got, each.sum(), "Take the mean over the pairs, not the sum.")
    near(got, each.mean(), "In the Bradley-Terry model the difference of two scores is a logit.")
    wrong = call(frm.pair_loss, torch.tensor([-1000.]).double(), torch.tensor([0.]).double())
    assert wrong.isfinite(), "For scores that are far apart the loss should be large, and finite."
    near(wrong, 1000, "For a surely wrong order the loss should grow with the distance.")


def late_method(call):
    method = refl.ReFL.__new__(refl.ReFL)
    method.schedule, method.net = [(9, 5), (5, 2), (2, 0), (0, -1)], None
    method.diffusion = fake_policy(method.schedule, call)
    method.generator = torch.Generator().manual_seed(1)
    return method


def check_roll(call):
    lq, seen, method = noise(0, 4, 3, 16, 16) / 2 + .3, call.seen, late_method(call)
    method.settings = Stub(eta="random")
    with torch.enable_grad():
        x = call(method.roll, lq, 3, draws=lambda x: [
            *noises(seen, [*(step.x for step in seen[1:]), x]),
            *(torch.as_tensor(step.eta) for step in seen)])
    assert [(step.t, step.s) for step in seen] == method.schedule[:3], \
        "To get to step k, take the k steps of the schedule before it, in its order."
    starts_as_noise(seen[0].x, lq)
    etas = [float(step.eta) for step in seen]
    assert len({*etas}) == 3, "Each step has a new eta."
    assert all(0 <= eta <= 1 for eta in etas), "eta is uniform in [0, 1]."
    assert all(torch.equal(step.lq, lq) for step in seen), "The network sees lq at each step."
    check_walk(seen, [*(step.x for step in seen[1:]), x])
    assert not x.requires_grad, \
        "Only the late step has a gradient: through all steps the memory grows with K."
    starts_as_noise(call(method.roll, lq, 0), lq)
    method.settings = Stub(eta=.4)
    call(method.roll, lq, 3)
    assert {float(step.eta) for step in seen} == {.4}, \
        "A number in the settings is the eta of every step: only \"random\" asks for a new one."
    method.settings, method.schedule = Stub(eta="random"), [(9, 5)] * 400
    call(method.roll, lq[:, :, :2, :2], 400)
    uniform(4, torch.tensor([int(4 * float(step.eta)) for step in seen]), "eta is uniform in "
            "[0, 1]: some values come far more often than others.")


class TwoOutputs:
    """A reward of two terms. It looks at x0_hat alone."""
    weights = {"a": .7, "b": .3}

    def __call__(self, x, gt):
        terms = {"a": mean(x), "b": mean((x - gt).abs().neg())}
        return (.7 * terms["a"] + .3 * terms["b"]).view(-1, 1, 1), terms


def losses_scene(dtype, **weights):
    """A method with a network and a frozen one that differs from it, and the steps it takes."""
    torch.manual_seed(0)
    net = model.UNet(model.Config(size=16, channels=8, mults=(1, 2), patch=2)).to(dtype)
    torch.nn.init.normal_(net.head[-1].weight, std=.05)
    frozen, seen = copy.deepcopy(net).requires_grad_(False), []
    with torch.no_grad():
        for p in net.parameters():
            p += (.02 * noise(p.numel(), *p.shape)).to(dtype)

    def ddim_step(net, x, lq, t, s, eta):
        out = net(x, lq, torch.full((len(x),), t))
        seen.append(Stub(t=t, s=s))
        return out + 3, torch.tensor(.1), out
    method = refl.ReFL.__new__(refl.ReFL)
    method.schedule, method.generator = [(9, 5), (5, 2), (2, 0), (0, -1)], torch.Generator()
    method.net, method.reward, method.fidelity = net, TwoOutputs(), Stub(reference=frozen)
    method.diffusion = Stub(ddim_step=ddim_step)
    method.settings = Stub(**{f"{name}_weight": w for name, w in weights.items()})
    return method, seen


def check_refl_losses(call):
    method, seen = losses_scene(torch.float64, struct=9., reg=9., fidelity=9.)
    net, frozen = method.net, method.fidelity.reference
    x, lq, gt = (noise(seed, 2, 3, 16, 16) for seed in range(3))
    params = [net.head[-1].weight, net.down[0][0].conv1.weight]
    with patch.object(refl, "low_pass", reference_low_pass):
        losses, x0_hat, terms = call(method.losses, x, lq, gt, 2, repeat=False)
        calls, method.settings = list(seen), Stub(struct_weight=0, reg_weight=0, fidelity_weight=0)
        alone, _, _ = call(method.losses, x, lq, gt, 2)
        struct, clamped = (refl.structure_loss(u, gt) for u in (
            net(x, lq, torch.tensor([2, 2])), net(x, lq, torch.tensor([2, 2])).clamp(-1, 1)))
        call(losses_scene(torch.float32, struct=1., reg=1., fidelity=1.)[0].losses,
             x.float(), lq.float(), gt.float(), 2)
    out = net(x, lq, torch.tensor([2, 2]))
    assert {(step.t, step.s) for step in calls} == {(2, 0)}, "The step with gradient is step k."
    assert {*losses} == {"reward", "struct", "reg", "fidelity"}, \
        "The losses are named reward, struct, reg and fidelity."
    assert {*alone} == {"reward"}, "A loss of weight 0 is not computed."
    assert not any(losses[name].shape for name in losses), "Each loss should be a scalar."
    near(x0_hat, out, "x0_hat is what the step predicts of the clean image, and not its mean mu.")
    assert terms.keys() == {"a", "b"}, "The terms of the reward are returned by name."
    total = TwoOutputs()(out, gt)[0].mean()
    far(losses["reward"], TwoOutputs()(out + 3, gt)[0].mean().neg() + 1, "The reward should see "
        "the predicted clean image x0_hat: mu is still noisy.")
    far(losses["reward"], total, "Descending the loss should raise the reward.")
    near(losses["reward"], 1 - total, "The best reward of all gives the loss 0.")
    for name in losses:
        assert losses[name].requires_grad, f"No gradient of the loss {name} reaches the network: " \
            "between the network and each loss nothing may be detached."
    grads = torch.autograd.grad(losses["reward"], params, retain_graph=True)
    for mine, theirs in zip(grads, torch.autograd.grad(total, params)):
        near(mine, -theirs, "The gradient of the reward should pass through the step, to the "
             "network's weights.")
    far(losses["struct"], clamped, "L_struct compares x0_hat as it is, not clamped.")
    for name in ("struct", "fidelity"):
        far(losses[name], 9 * (struct if name == "struct" else (out - gt).square().mean()),
            "The losses are returned without their weights.")
    near(losses["struct"], struct, "L_struct compares x0_hat with the photo.")
    features = []
    for which in (net, frozen):
        with refl.block_outputs(which) as kept:
            which(x, lq, torch.tensor([2, 2]))
        features.append(kept)
    near(losses["reg"], sum((a - b).square().mean() for a, b in zip(*features)), "L_reg compares "
         "the features of the trained and of the frozen network in the same step, from one x_t.")
    near(losses["fidelity"], (out - gt).square().mean(), "L_fidelity is the mean squared error of "
         "x0_hat against the photo.")


class Judge(torch.nn.Module):
    """A face reward model of three weights."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([.5, -1., .2]).double(), requires_grad=False)

    def trained(self):
        return [self.w]

    def score(self, x):
        return x.mean((2, 3)) @ self.w

    def forward(self, x, y=None):
        return self.score(x).sigmoid()


def judged_method(dtype):
    """A method with a reward model that has a gradient of another time."""
    method, judge = refl.ReFL.__new__(refl.ReFL), Judge().to(dtype)
    method.frm, method.frm_optimizer = judge, torch.optim.SGD([judge.w], lr=.1)
    judge.w.grad = torch.full((3,), 100., dtype=dtype)
    return method, judge


def check_update_frm(call):
    method, judge = judged_method(torch.float64)
    gt, restored, lq = (noise(seed, 9, 3, 4, 4) for seed in (1, 2, 3))
    w = judge.w.clone().requires_grad_()
    a, b, c = (u.mean((2, 3)) @ w for u in (gt, restored, lq))
    logit = torch.special.expit
    pairs = [-torch.log(logit(a - u)).mean() for u in (b, c)]
    turned = [-torch.log(logit(u - a)).mean() for u in (b, c)]
    (gradient,) = torch.autograd.grad((pairs[0] + pairs[1]) / 2, w)
    with patch.object(refl, "pair_loss",
                      lambda better, worse: -torch.log(logit(better - worse)).mean()):
        try:
            stats = call(method.update_frm, restored, lq, gt, repeat=False)
            call(judged_method(torch.float32)[0].update_frm,
                 *(u.float() for u in (restored, lq, gt)))
        except RuntimeError as error:
            if "grad" not in str(error):
                raise
            raise AssertionError("The reward model's parameters are frozen before the step: it "
                                 "cannot learn until they need gradients again.") from None
    assert stats.keys() >= {"frm_loss", "frm_accuracy"}, "The metrics are frm_loss, frm_accuracy."
    got = stats["frm_loss"]
    far(got, sum(turned) / 2, "The pairs are the wrong way round: the photo is the better picture.")
    squashed = [-torch.log(logit(logit(a) - logit(u))).mean() for u in (b, c)]
    far(got, sum(squashed) / 2, "The pair loss compares scores, in logits, and not rewards.")
    far(got, pairs[0], "The model forgets what damage is: it should also learn that the photo is "
        "better than its degraded self.")
    far(got, pairs[1], "The model should learn about the policy's own restorations, or the policy "
        "finds what no pair has shown.")
    far(got, sum(pairs), "The loss is the mean of the two pair losses.")
    near(got, sum(pairs) / 2, "The loss is the mean of the two pair losses.")
    assert not torch.equal(judge.w, w), "The reward model did not change: the step was not taken."
    near(judge.w, w - .1 * gradient, "The weights moved by another gradient than that of this "
         "loss: is a stale gradient of an earlier step still there?")
    near(stats["frm_accuracy"], (a > b).double().mean(), "The accuracy is the share of photos with "
         "a higher score than their restoration.")
    assert not judge.w.requires_grad, ("After the step requires_grad should be off: the policy's "
                                       "backward pass does not need this model's gradient.")
    assert not got.requires_grad, "A metric keeps no graph."


def check_blend_weight(call):
    rho = torch.tensor([0., .5, 1., 3., 1e6]).double()
    got = call(darl.blend_weight, rho, "adaptive")
    shaped(got, (5,), "lambda")
    assert got[3] > got[1], "lambda is the share of RL, and RL is for the hard images (rho > 1)."
    assert got.min() >= 0 and got.max() <= 1, "A share lies in [0, 1], however hard the image is."
    near(got[2], .5, "An image of mean difficulty gets both losses in equal parts.")
    near(got, [0, 1 / 3, .5, .75, 1], "The weight follows the ratio of difficulties.")
    hard, easy = (call(darl.blend_weight, rho, blend) for blend in ("hard", "easy"))
    near(hard, [0, 0, 0, 1, 1], "\"hard\" is RL for the images above the mean difficulty, and for "
         "no others.")
    near(easy, [1, 1, 1, 0, 0], "\"easy\" is the reverse of \"hard\".")
    got = call(darl.blend_weight, rho, ".3")
    shaped(got, (5,), "lambda")
    near(got, [.3] * 5, "A number is the share of every image.")
    assert hard.dtype == rho.dtype, "lambda should have rho's dtype."
