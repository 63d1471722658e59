"""ReFL's gradient against finite differences, and what may hold a graph, move or stay."""
import pytest
import torch

from common import noise, parameters, pictures, tiny_net
from fidelity import FIRST_WEIGHT
from frm import FaceRewardModel
from model import Diffusion, ResBlock
from refl import GAP_EVERY, ReFL, ReFLSettings, feature_distance, structure_loss
from rewards import CompositeReward, ssim
from support.cli import UserError

BATCH = pictures(0)


class Exact:
    """As CompositeReward, in the precision of its input (that one is float32 by contract)."""

    def __init__(self, reward):
        self.weights, self.terms = reward.weights, reward.models | {"ssim": ssim}

    def __call__(self, x, gt):
        parts = {name: term(x, gt) for name, term in self.terms.items()}
        return sum(w * parts[name] for name, w in self.weights.items()), parts


def make(reward=None, **changes):
    net = tiny_net()
    reward = reward or CompositeReward({"face": 0.7, "ssim": 0.3},
                                       face=FaceRewardModel().requires_grad_(False))
    return ReFL(net, Diffusion(net.config), reward, torch.Generator().manual_seed(0),
                ReFLSettings(**dict(ddim_steps=4, lr=1e-3, refl_last=2, eta="random",
                                    frm_update_every=10, fidelity_weight=0.0) | changes))


def test_the_gradient_of_each_loss_is_its_finite_difference():
    refl = make(struct_weight=1.0, reg_weight=1.0, fidelity_weight=1.0)
    lq, gt, x = (u.double() for u in (*BATCH, noise(3, 2, 3, 16, 16)))
    for net in (refl.net, refl.fidelity.reference, refl.frm):
        net.double()
    refl.reward = Exact(refl.reward)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():           # away from the frozen copy, where the distance is not flat
        for p in refl.net.parameters():
            p += 0.02 * torch.randn(p.shape, generator=g, dtype=p.dtype)

    def losses():
        return refl.losses(x, lq, gt, k=2)[0]
    names, params = ["reward", "struct", "reg", "fidelity"], list(refl.net.parameters())
    values = losses()
    assert list(values) == names
    grads = {name: torch.autograd.grad(values[name], params, retain_graph=True, allow_unused=True)
             for name in names}

    @torch.no_grad()
    def move(direction, h):
        for p, v in zip(params, direction):
            p += h * v
    for _ in range(6):
        direction = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in params]
        ends = []
        for h in (1e-6, -2e-6):         # to +1e-6, then from there to -1e-6
            move(direction, h)
            ends.append({k: loss.item() for k, loss in losses().items()})
        move(direction, 1e-6)
        for name in names:
            want = (ends[0][name] - ends[1][name]) / 2e-6
            mine = sum((u * v).sum().item() for u, v in zip(grads[name], direction)
                       if u is not None)
            assert mine == pytest.approx(want, rel=1e-5, abs=1e-7), name


def test_exactly_one_network_call_holds_a_graph():
    refl, graded = make(reg_weight=1.0), []
    for net in (refl.net, refl.fidelity.reference):
        net.register_forward_hook(lambda net, _, out: graded.append(out.requires_grad))
    for _ in range(4):
        graded.clear()
        k = refl.step(BATCH)["late_step"]
        assert graded == [False] * k + [True, False]        # the roll, the step, the frozen copy


def test_the_late_step_is_one_of_the_last():
    refl = make(ddim_steps=5, refl_last=3)
    assert {refl.step(BATCH)["late_step"] for _ in range(20)} == {2, 3, 4}
    assert {make(refl_last=1).step(BATCH)["late_step"]} == {3}
    with pytest.raises(UserError, match="--refl_last 5: at most --ddim_steps 4"):
        make(refl_last=5)


@pytest.mark.parametrize("given", ["random", 0.6])
def test_roll_has_one_eta_or_draws_a_fresh_one_for_each_step(given):
    refl, g = make(eta=given), torch.Generator().manual_seed(0)
    x = torch.randn(BATCH[0].shape, generator=g)
    for t, s in refl.schedule[:3]:
        eta = torch.rand((), generator=g).item() if given == "random" else given
        with torch.no_grad():
            mu, sigma, _ = refl.diffusion.ddim_step(refl.net, x, BATCH[0], t, s, eta)
        x = mu + sigma * torch.randn(x.shape, generator=g)
    torch.testing.assert_close(refl.roll(BATCH[0], 3), x)


def test_the_distances_in_closed_form():
    a, b = [torch.zeros(2, 3), torch.ones(4)], [torch.full((2, 3), 2.0), torch.full((4,), 4.0)]
    assert feature_distance(a, b).item() == 4 + 9
    flat = torch.zeros(1, 3, 16, 16)
    assert structure_loss(flat + 0.2, flat).item() == pytest.approx(0.1)        # on [0, 1]


def test_the_feature_distance_sees_every_residual_block():
    refl = make(reg_weight=1.0)
    x = noise(3, 2, 3, 16, 16)
    assert refl.losses(x, *BATCH, k=3)[0]["reg"].item() == 0
    for block in (m for m in refl.net.modules() if isinstance(m, ResBlock)):
        with torch.no_grad():
            block.conv2.bias += 0.1
            assert refl.losses(x, *BATCH, k=3)[0]["reg"].item() > 0
            block.conv2.bias -= 0.1


@pytest.mark.parametrize("change", [dict(struct_weight=0.0), dict(reg_weight=0.0),
                                    dict(fidelity_weight=5.0)])
def test_each_switch_changes_the_update_and_not_the_roll(change):
    ends = []
    for settings in ({}, {}, change):
        refl = make(**dict(reg_weight=1.0, struct_weight=5.0, frm_update_every=0) | settings)
        first = refl.step(BATCH)["face"]
        refl.step(BATCH)                # the distance from the frozen copy is 0 at the first
        ends.append((first, parameters(refl.net)))
    assert torch.equal(ends[0][1], ends[1][1]) and not torch.equal(ends[0][1], ends[2][1])
    assert ends[0][0] == ends[2][0]


def test_the_weight_of_the_squared_error_holds_the_psnr_of_the_start():
    refl, seen = make(fidelity_weight=0.2, fidelity_margin=0.0), []
    loss, gap = refl.losses, refl.fidelity.gap
    refl.losses = lambda *given: (seen.append(refl.fidelity.weight), loss(*given))[1]
    refl.fidelity.gap = lambda *given: gap(*given) - 1      # as if a decibel had been lost
    history = [refl.step(BATCH) for _ in range(2 * GAP_EVERY)]
    assert ["fidelity_gap" in stats for stats in history] == ([False] * (GAP_EVERY - 1)
                                                              + [True]) * 2
    assert seen[0] == seen[GAP_EVERY - 1] == FIRST_WEIGHT < seen[GAP_EVERY]
    assert history[GAP_EVERY - 1]["fidelity_weight"] == FIRST_WEIGHT
    lq, gt = BATCH
    losses, x0_hat, _ = loss(noise(3, 2, 3, 16, 16), lq, gt, 3)
    assert losses["fidelity"].item() == pytest.approx((x0_hat - gt).square().mean().item())
    assert "fidelity_gap" not in make().step(BATCH)


def test_the_reward_rises_and_the_judge_stays():
    face = FaceRewardModel().requires_grad_(False)
    reward = CompositeReward({"face": 1.0}, face=face)
    refl, before = make(reward=reward, frm_update_every=2, frm_lr=1e-3), parameters(face)
    history = [refl.step(BATCH) for _ in range(8)]
    assert torch.equal(before, parameters(face))            # the reward that judges is not moved
    assert not torch.equal(before, parameters(refl.frm))    # its copy is
    assert all(p.grad is None for p in face.parameters())
    assert ["frm_loss" in stats for stats in history] == [False, True] * 4
    frozen = make(reward=reward, frm_update_every=0, struct_weight=0.0, reg_weight=0.0)
    history = [frozen.step(BATCH) for _ in range(8)]
    assert history[-1]["loss_reward"] < history[0]["loss_reward"] - 0.01
    assert not any("frm_loss" in stats for stats in history)
    assert torch.equal(before, parameters(frozen.frm))


def test_the_dynamic_reward_model_learns_to_prefer_the_photo():
    refl = make(frm_lr=1e-3)
    restored, lq, gt = (noise(s, 8, 3, 16, 16).clamp(-1, 1) * w
                        for s, w in ((6, 1), (7, .5), (8, .2)))
    for _ in range(30):
        stats = refl.update_frm(restored, lq, gt)
    assert stats["frm_accuracy"] == 1 and stats["frm_loss"] < 0.3
    refl = make(frm_lr=1e-3)
    for _ in range(30):         # a restoration that cannot be told: it still learns what LQ is
        stats = refl.update_frm(gt, lq, gt)
    assert stats["frm_accuracy"] == 0 and (refl.frm.score(gt) > refl.frm.score(lq)).all()
    assert not any(p.requires_grad for p in refl.frm.parameters())
