"""DARL against PSNR written out, and against SFT and LRPO at the two ends of its blend."""
import pytest
import torch

from common import Reward, noise, parameters, pictures, tiny_net
from darl import DARL, DARLSettings, blend_weight
from lrpo import LRPO, LRPOSettings
from model import Diffusion
from sft import SFT, SFTSettings
from support.cli import UserError

BATCH = pictures(0, n=4)
ROWS = [i // 3 for i in range(12)]      # a group's members side by side


def make(method=DARL, reward=None, settings=DARLSettings, **changes):
    net = tiny_net()
    return method(net, Diffusion(net.config), reward or Reward(), torch.Generator().manual_seed(0),
                  settings(**dict(ddim_steps=4, group=3, lr=1e-4) | changes))


def test_lambda_is_a_half_at_the_mean_and_rises_with_difficulty():
    rho = torch.tensor([0.01, 0.5, 1.0, 2.0, 100.0])
    torch.testing.assert_close(blend_weight(rho, "adaptive"),
                               torch.tensor([1 / 101, 1 / 3, 1 / 2, 2 / 3, 100 / 101]))
    assert blend_weight(rho, "hard").tolist() == [0, 0, 0, 1, 1]
    assert blend_weight(rho, "easy").tolist() == [1, 1, 1, 0, 0]
    assert blend_weight(rho, ".25").tolist() == [0.25] * 5


@pytest.mark.parametrize("own", [0, 1])
def test_forced_to_one_it_is_an_rl_step_bit_for_bit(own):
    darl = make(blend="1", own_steps=own)
    lrpo = make(LRPO, settings=LRPOSettings, own_steps=own, gt_weight=0.0)
    darl.step(BATCH), lrpo.step(BATCH)
    assert torch.equal(parameters(darl.net), parameters(lrpo.net))
    assert not torch.equal(parameters(darl.net), parameters(tiny_net()))


def test_forced_to_zero_it_is_an_sft_step_bit_for_bit():
    darl, before, seen = make(blend="0", updates=1, sft_weight=1.0), make(), []
    update = darl.lrpo.update
    darl.lrpo.update = lambda *given: (seen.append(darl.lrpo.generator.get_state()),
                                       update(*given))[1]
    darl.step(BATCH)
    generator = torch.Generator().set_state(seen[0])        # as it was where the update began
    sft = SFT(before.net, Diffusion(before.net.config), None, generator, SFTSettings(lr=1e-4))
    sft.step(BATCH)
    assert torch.equal(parameters(darl.net), parameters(sft.net))


def test_difficulty_its_running_mean_and_what_the_loss_gets():
    darl, seen, mean = make(), [], None
    rollout, loss = darl.lrpo.rollout, darl.loss
    darl.lrpo.rollout = lambda lq: (seen.append(rollout(lq)), seen[-1])[1]
    darl.loss = lambda *given: (seen.append(given[3]), loss(*given))[1]
    for _ in range(3):
        seen.clear()
        stats = darl.step(BATCH)
        (restored, _), lam, again = seen            # a rollout and two passes over its one step
        x = restored.clamp(-1, 1).view(4, 3, -1)
        d = (x - BATCH[1].view(4, 1, -1)).abs().mean(dim=(1, 2))
        mean = d.mean() if mean is None else mean
        torch.testing.assert_close(lam, (d / mean) / (1 + d / mean))
        assert torch.equal(lam, again)
        mean = 0.95 * mean + 0.05 * d.mean()
        torch.testing.assert_close(darl.mean, mean)
    for name, values in (("difficulty", d), ("lambda", lam)):
        assert stats[name] == pytest.approx(values.mean().item())
        assert stats[f"{name}_std"] == pytest.approx(values.std(correction=0).item(), rel=1e-4)


def test_a_reward_with_lpips_of_any_weight_measures_the_difficulty_by_it():
    quarters = torch.arange(12) / 16
    darl = make(reward=Reward(lpips=lambda a, b: 1 - quarters))
    torch.testing.assert_close(darl.difficulty(*[torch.zeros(12, 3, 16, 16)] * 2),
                               quarters.view(4, 3).mean(dim=1))


def test_each_image_is_blended_by_its_own_lambda():
    darl, (lq, gt) = make(lr=0.0, sft_weight=3.0, kl_weight=2.0), BATCH
    _, (step,) = darl.lrpo.rollout(lq)
    with torch.no_grad():               # away from the reference, where KL is not flat
        for p in darl.net.parameters():
            p += 0.01 * noise(p.numel(), *p.shape)
    diffusion, lam = darl.lrpo.diffusion, torch.tensor([0.1, 0.9, 0.4, 1.0])
    mu, sigma, _ = diffusion.ddim_step(darl.net, step.x, lq, step.t, step.s, 1.0)
    pg, state = noise(5, 12, 2, 2), darl.lrpo.generator.get_state()
    loss, parts = darl.loss(step, lq, gt, lam, mu[ROWS], sigma, pg)
    supervised = diffusion.loss(darl.net, lq, gt, torch.Generator().set_state(state))
    want = sum(lam[i // 3] * pg[i].mean() for i in range(12)) / 12
    want = want + 3 * sum((1 - lam[i]) * supervised[i] for i in range(4)) / 4
    ref = diffusion.ddim_step(tiny_net(), step.x, lq, step.t, step.s, 1.0)[0]
    Normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(*[Normal(u, sigma.float()) for u in (mu, ref)]).mean()
    torch.testing.assert_close(loss, want + 2 * kl)
    assert parts["kl"].item() == pytest.approx(kl.item(), rel=1e-4) and kl > 0


def test_stepwise_credit_is_what_is_gained_after_the_step():
    darl = make(stepwise="on", own_steps=2)             # its first step still starts as a group
    restored, steps = darl.lrpo.rollout(BATCH[0])
    with torch.no_grad():
        R = restored.mean(dim=(1, 2, 3)).view(-1, 1, 1)
        credit = darl.step_rewards(R, steps, BATCH[1][ROWS])
        for step, mine in zip(steps, credit, strict=True):
            rows = ROWS if len(step.x) == 4 else slice(None)
            x0_hat = darl.lrpo.diffusion.ddim_step(darl.net, step.x[rows], BATCH[0][ROWS], step.t,
                                                   step.s, 1.0)[2]
            want = (restored - x0_hat).mean(dim=(1, 2, 3))
            torch.testing.assert_close(mine.flatten(), want, rtol=1e-3, atol=1e-5)
    assert torch.equal(make().step_rewards(R, steps, None), R[None])
    with pytest.raises(UserError, match="needs --own_steps 0"):
        make(stepwise="on")
