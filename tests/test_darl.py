"""DARL against torch.distributions, and against SFT and LRPO at the two ends of its blend."""
import pytest
import torch

from darl import DARL, DARLSettings, blend_weight
from model import Config, Diffusion, UNet
from sft import SFT, SFTSettings
from steered import BranchedLRPO, gaussian_kl


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def brightness(x, gt):
    r = x.mean(dim=(1, 2, 3))
    return r, {"brightness": r}


def make(method=DARL, seed=0, lpips=None, **changes):
    torch.manual_seed(seed)
    net = UNet(Config(size=16, channels=8, mults=(1, 2), patch=2))
    torch.nn.init.normal_(net.head[-1].weight, std=0.05)
    settings = DARLSettings(**dict(ddim_steps=4, group=3, lr=1e-4) | changes)
    return method(net, Diffusion(net.config), brightness, torch.Generator().manual_seed(seed),
                  settings, **{"lpips": lpips} if lpips else {})


BATCH = (noise(1, 4, 3, 16, 16).clamp(-1, 1), noise(2, 4, 3, 16, 16).clamp(-1, 1))
ROWS = [i // 3 for i in range(12)]      # a group's members side by side


def parameters(method):
    return torch.cat([p.detach().flatten().clone() for p in method.net.parameters()])


def test_kl_is_that_of_torch_distributions():
    mu, ref, sigma = noise(0, 4, 3, 8, 8), noise(1, 4, 3, 8, 8), torch.rand(4, 1, 1, 1) + 0.1
    Normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(Normal(mu, sigma), Normal(ref, sigma))
    torch.testing.assert_close(gaussian_kl(mu, ref, sigma), want.mean(dim=(1, 2, 3)))


def test_lambda_is_a_half_at_the_mean_and_rises_with_difficulty():
    rho = torch.tensor([0.01, 0.5, 1.0, 2.0, 100.0])
    lam = blend_weight(rho, "adaptive")
    assert lam[2] == 0.5 and (lam.diff() > 0).all() and 0 < lam.min() and lam.max() < 1
    torch.testing.assert_close(lam, torch.tensor([1 / 101, 1 / 3, 1 / 2, 2 / 3, 100 / 101]))
    assert blend_weight(rho, "hard").tolist() == [0, 0, 0, 1, 1]
    assert blend_weight(rho, "easy").tolist() == [1, 1, 1, 0, 0]
    assert blend_weight(rho, ".25").tolist() == [0.25] * 5


@pytest.mark.parametrize("branch", ["on", "off"])
def test_forced_to_one_it_is_an_rl_step_bit_for_bit(branch):
    darl, lrpo = make(blend="1", branch=branch), make(BranchedLRPO, branch=branch)
    lrpo.gt_log_prob = lambda step, gt, mu, sigma: torch.zeros(12)  # no likelihood, as in DARL
    darl.step(BATCH), lrpo.step(BATCH)
    assert torch.equal(parameters(darl), parameters(lrpo))
    assert not torch.equal(parameters(darl), parameters(make()))


def test_forced_to_zero_it_is_an_sft_step_bit_for_bit():
    darl, before = make(blend="0", updates=1, sft_weight=1.0), make()
    seen = []
    update = darl.update
    darl.update = lambda *given: (seen.append(darl.generator.get_state()), update(*given))[1]
    darl.step(BATCH)
    sft = SFT(before.net, before.diffusion, before.generator, SFTSettings(lr=1e-4))
    sft.generator.set_state(seen[0])        # as it was where the update began
    sft.step(BATCH)
    assert torch.equal(parameters(darl), parameters(sft))


def test_difficulty_and_its_running_mean():
    darl, seen, mean = make(), [], None
    rolled = darl.rollout
    darl.rollout = lambda lq: (out := rolled(lq), seen.append(out[0]))[0]
    for _ in range(3):
        stats = darl.step(BATCH)
        x = seen[-1].clamp(-1, 1).view(4, 3, -1)
        d = (x - BATCH[1].view(4, 1, -1)).abs().mean(dim=(1, 2))
        mean = d.mean() if mean is None else mean
        torch.testing.assert_close(darl.blend_weights, (d / mean) / (1 + d / mean))
        mean = 0.95 * mean + 0.05 * d.mean()
        torch.testing.assert_close(darl.mean, mean)
    assert stats["difficulty"] == pytest.approx(d.mean().item())
    assert stats["lambda"] == pytest.approx(darl.blend_weights.mean().item())
    halves = lambda a, b: torch.full((len(a),), 0.75)
    assert torch.equal(make(lpips=halves).difficulty(seen[-1], BATCH[1][ROWS]),
                       torch.full((4,), 0.25))


def test_each_image_is_blended_by_its_own_lambda():
    """The gradient is the sum of LRPO's over the images with RL and SFT's over the others."""
    darl, (lq, gt) = make(lr=0.0, sft_weight=3.0, kl_weight=2.0), (u[ROWS] for u in BATCH)
    _, (step,) = darl.rollout(lq)
    with torch.no_grad():               # away from the reference, where KL is not flat
        for p in darl.net.parameters():
            p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    darl.d, darl.blend_weights = torch.arange(4.0), torch.tensor([0.1, 0.9, 0.4, 1.0])
    mu, sigma, _ = darl.policy(step.x, lq, step.t, step.s)
    pg, state = noise(5, 12), darl.generator.get_state()
    loss, parts = darl.loss(step, lq, gt, mu, sigma, pg)
    darl.generator.set_state(state)
    supervised = darl.diffusion.loss(darl.net, *BATCH, darl.generator)
    want = sum(darl.blend_weights[i // 3] * pg[i] for i in range(12)) / 12
    want = want + 3 * sum((1 - darl.blend_weights[i]) * supervised[i] for i in range(4)) / 4
    ref = darl.diffusion.ddim_step(darl.reference, step.x, lq, step.t, step.s, 1.0)[0]
    kl = ((mu - ref) ** 2 / (2 * sigma ** 2)).mean()
    torch.testing.assert_close(loss, want + 2 * kl)
    assert parts["kl"].item() == pytest.approx(kl.item(), rel=1e-4) and kl > 0


def test_stepwise_credit_is_what_is_gained_after_the_step():
    darl = make(stepwise="on", branch="off")
    lq, gt = (u[ROWS] for u in BATCH)
    restored, steps = darl.rollout(lq)
    darl.score(restored, gt)
    grouped = restored.mean(dim=(1, 2, 3)).view(4, 3)
    with torch.no_grad():
        darl.assign_advantages(steps, grouped, torch.ones(3))
    for step in steps:
        x0_hat = darl.diffusion.ddim_step(darl.net, step.x, lq, step.t, step.s, 1.0)[2]
        gained = grouped - x0_hat.mean(dim=(1, 2, 3)).view(4, 3)
        centred = gained - gained.mean(dim=1, keepdim=True)
        want = centred / (gained.std(dim=1, keepdim=True, correction=0) + 1e-4)
        torch.testing.assert_close(step.advantage, want.flatten(), rtol=1e-3, atol=1e-3)
    assert not torch.equal(steps[0].advantage, steps[-1].advantage)
    with pytest.raises(ValueError, match="needs --branch off"):
        make(stepwise="on")

