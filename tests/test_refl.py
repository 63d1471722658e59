"""ReFL's gradient against finite differences, and what may hold a graph, move or stay."""
import pytest
import torch

from common import noise, parameters, pictures, tiny_net
from fidelity import FIRST_WEIGHT
from frm import FaceRewardModel
from model import Diffusion, ResBlock
from refl import GAP_EVERY, ReFL, ReFLSettings, feature_distance, structure_loss
from rewards import CompositeReward
from support.cli import UserError

BATCH = pictures(0)
EVERY_LOSS = dict(struct_weight=5.0, reg_weight=1.0, fidelity_weight=0.2)


class Exact:
    """As CompositeReward, in the precision of its input (that one is float32 by contract)."""

    def __init__(self, reward):
        self.weights, self.maps = reward.weights, reward.maps

    def __call__(self, x, gt):
        terms = {name: sum(m.mean(dim=(1, 2)) for m in maps(x, gt))
                 for name, maps in self.maps.items()}
        return sum(w * terms[name] for name, w in self.weights.items())[:, None, None], terms


def make(reward=None, **changes):
    net = tiny_net()
    torch.manual_seed(1)
    reward = reward or CompositeReward({"face": 0.7, "ssim": 0.3},
                                       face=FaceRewardModel().requires_grad_(False))
    return ReFL(net, Diffusion(net.config), reward, torch.Generator().manual_seed(0),
                ReFLSettings(**dict(ddim_steps=4, lr=1e-3) | changes))


def test_the_gradient_of_each_loss_is_its_finite_difference():
    refl = make(**EVERY_LOSS)
    lq, gt, x = (u.double() for u in (*BATCH, noise(3, 2, 3, 16, 16)))
    for net in (refl.net, refl.fidelity.reference, refl.frm):
        net.double()
    refl.reward = Exact(refl.reward)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():           # away from the reference, where the distance is not flat
        for p in refl.net.parameters():
            p += 0.02 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    names, params = ["reward", "struct", "reg", "fidelity"], list(refl.net.parameters())
    losses = lambda: refl.losses(x, lq, gt, k=2)[0]
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


def test_the_losses_are_means_over_images_written_out():
    refl = make(**EVERY_LOSS)
    losses, x0_hat, terms = refl.losses(noise(3, 2, 3, 16, 16), *BATCH, k=3)
    want = 0.7 * (1 - terms["face"]) + 0.3 * (1 - terms["ssim"])
    torch.testing.assert_close(losses["reward"], want.mean())
    torch.testing.assert_close(losses["fidelity"], (x0_hat - BATCH[1]).square().mean())
    assert [*make().losses(noise(3, 2, 3, 16, 16), *BATCH, k=3)[0]] == ["reward", "fidelity"]
    assert [*make(fidelity_weight=0.0).losses(noise(3, 2, 3, 16, 16), *BATCH, k=3)[0]] == ["reward"]


def test_exactly_one_network_call_holds_a_graph():
    refl, graded = make(refl_last=2, **EVERY_LOSS), []
    refl.net.register_forward_hook(lambda net, _, out: graded.append(out.requires_grad))
    refl.fidelity.reference.register_forward_hook(
        lambda net, _, out: graded.append(out.requires_grad))
    for n in range(1, 5):
        graded.clear()
        k = refl.step(BATCH)["late_step"]       # the roll, the step, the reference, the gap
        assert graded == [False] * k + [True, False] + [False] * 2 * 4 * (n % GAP_EVERY == 0)


def test_the_late_step_is_one_of_the_last():
    refl = make(ddim_steps=5, refl_last=3, fidelity_weight=0.0)
    assert {refl.step(BATCH)["late_step"] for _ in range(20)} == {2, 3, 4}
    assert {make().step(BATCH)["late_step"]} == {3}
    with pytest.raises(UserError, match="--refl_last 5: at most --ddim_steps 4"):
        make(refl_last=5)


@pytest.mark.parametrize("eta", ["random", 1.0, 0.3])
def test_roll_draws_a_fresh_eta_for_each_step_or_takes_the_given_one(eta):
    refl, g = make(eta=eta), torch.Generator().manual_seed(0)
    x = torch.randn(BATCH[0].shape, generator=g)
    for t, s in refl.schedule[:3]:
        own = torch.rand((), generator=g).item() if eta == "random" else eta
        with torch.no_grad():
            mu, sigma, _ = refl.diffusion.ddim_step(refl.net, x, BATCH[0], t, s, own)
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
        refl = make(**EVERY_LOSS | dict(frm_update_every=0) | settings)
        first = refl.step(BATCH)["face"]
        refl.step(BATCH)                # the distance from the reference is 0 at the first
        ends.append((first, parameters(refl.net)))
    assert torch.equal(ends[0][1], ends[1][1]) and not torch.equal(ends[0][1], ends[2][1])
    assert ends[0][0] == ends[2][0]


# ---------------------------------------------------------------------------------------------
# Fidelity

@pytest.mark.parametrize("gap", [-0.2, 0.2])
def test_the_multiplier_rises_below_the_reference_and_falls_above_it(gap):
    refl = make()
    refl.fidelity.gap = lambda *_: torch.tensor(gap)
    stats = [refl.step(BATCH) for _ in range(6)]
    assert [s.get("fidelity_gap") for s in stats] == [None, pytest.approx(gap)] * 3
    weights = [s["fidelity_weight"] for s in stats[1::2]] + [refl.fidelity.weight]
    assert weights[0] == FIRST_WEIGHT           # that of the step which measured the gap
    assert weights == sorted(weights, reverse=gap > 0) and len({*weights}) == 4


def test_the_gap_may_be_as_large_as_the_margin():
    refl = make(fidelity_margin=0.2)
    refl.fidelity.gap = lambda *_: torch.tensor(-0.2)
    for _ in range(4):
        refl.step(BATCH)
    assert refl.fidelity.weight == pytest.approx(FIRST_WEIGHT, rel=1e-5)


def test_a_step_descends_the_reward_and_the_fidelity_times_the_multiplier():
    refl, same = make(fidelity_weight=0.2), make()
    refl.fidelity.integral = 1.5
    torch.randint(1, (), generator=same.generator)          # a step draws the late step first
    x = same.roll(BATCH[0], 3)
    refl.step(BATCH)
    losses, _, _ = same.losses(x, *BATCH, k=3)
    loss = losses["reward"] + 0.2 * FIRST_WEIGHT * torch.tensor(1.5).exp() * losses["fidelity"]
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, same.net.parameters())])
    want = want / max(1, want.norm())                       # the update's clipping
    mine = torch.cat([p.grad.flatten() for p in refl.net.parameters()])
    torch.testing.assert_close(mine, want, rtol=1e-3, atol=1e-6)


def test_without_the_loss_nothing_is_steered():
    refl = make(fidelity_weight=0.0)
    refl.fidelity.gap = None                                # not called
    stats = [refl.step(BATCH) for _ in range(2)]
    assert not any("fidelity" in name for s in stats for name in s)


def test_it_goes_on_from_its_state():
    whole, parts, later = make(refl_last=2), make(refl_last=2), make(refl_last=2)
    stats = [whole.step(BATCH) for _ in range(5)]
    for _ in range(3):
        parts.step(BATCH)
    later.load_state_dict(parts.state_dict())
    later.net.load_state_dict(parts.net.state_dict())               # and what train.py keeps
    later.optimizer.load_state_dict(parts.optimizer.state_dict())
    later.generator.set_state(parts.generator.get_state())
    assert [later.step(BATCH) for _ in range(2)] == stats[3:]
    assert torch.equal(parameters(later.net), parameters(whole.net))
    assert torch.equal(parameters(later.frm), parameters(whole.frm))
    assert later.fidelity.weight == whole.fidelity.weight != FIRST_WEIGHT


# ---------------------------------------------------------------------------------------------
# The reward model

def test_the_reward_model_changes_at_every_step_and_the_given_one_never():
    face = FaceRewardModel().requires_grad_(False)
    refl, given = make(reward=CompositeReward({"face": 1.0}, face=face)), parameters(face)
    before = given
    for _ in range(4):
        stats = refl.step(BATCH)
        assert {"frm_loss", "frm_accuracy"} <= stats.keys()
        now = parameters(refl.frm)
        assert not torch.equal(before, now)
        before = now
    assert torch.equal(parameters(face), given) and all(p.grad is None for p in face.parameters())
    x0 = BATCH[1]
    torch.testing.assert_close(refl.reward(x0, x0)[1]["face"], refl.frm(x0))    # it is followed


def test_the_reward_rises_where_its_model_is_fixed():
    face = FaceRewardModel().requires_grad_(False)
    reward = CompositeReward({"face": 1.0}, face=face)
    rare = make(reward=reward, frm_update_every=2, fidelity_weight=0.0)
    assert ["frm_loss" in rare.step(BATCH) for _ in range(4)] == [False, True] * 2
    fixed, before = make(reward=reward, frm_update_every=0, fidelity_weight=0.0), parameters(face)
    history = [fixed.step(BATCH) for _ in range(8)]
    assert history[-1]["loss_reward"] < history[0]["loss_reward"] - 0.01
    assert not any("frm_loss" in stats for stats in history)
    assert torch.equal(before, parameters(fixed.frm))


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
