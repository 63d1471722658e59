"""Credit for patches: maps whose means are the rewards, and the gradient that they give."""
import lpips
import pytest
import torch

from frm import FaceRewardModel
from lrpo import (ADV_EPS, LRPO, TRUST, LRPOSettings, clipped_loss, gaussian_log_prob,
                  group_advantages)
from model import Config, Diffusion, UNet
from rewards import LPIPS, CompositeReward, dwt, patch_means, ssim
from support.cli import UserError


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def random_lpips():
    """The package's LPIPS, its backbone drawn at random: arithmetic needs no trained one."""
    torch.manual_seed(0)
    own = LPIPS.__new__(LPIPS)
    torch.nn.Module.__init__(own)
    own.lpips = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    return own.eval().requires_grad_(False)


PAIR = (noise(1, 3, 3, 32, 32).clamp(-1, 1), noise(2, 3, 3, 32, 32).clamp(-1, 1))


def test_lpips_is_the_packages_on_images_enlarged_twice_below_128_px(random_lpips):
    x, y = PAIR
    big = [torch.nn.functional.interpolate(u, scale_factor=2, mode="bicubic") for u in PAIR]
    torch.testing.assert_close(random_lpips(x, y), 1 - random_lpips.lpips(*big).flatten())
    x, y = noise(3, 2, 1, 3, 128, 128).clamp(-1, 1)
    torch.testing.assert_close(random_lpips(x, y), 1 - random_lpips.lpips(x, y).flatten())
    with pytest.raises(UserError, match="16 px or more"):
        random_lpips(x[..., :8, :8], y[..., :8, :8])


@pytest.mark.parametrize("g", [1, 2, 4, 8])
def test_the_means_of_the_patches_are_the_rewards(random_lpips, g):
    torch.manual_seed(0)
    face = FaceRewardModel().eval()
    weights = {"ssim": 0.4, "dwt": 0.3, "lpips": 0.2, "face": 0.1}
    R, terms = CompositeReward(weights, lpips=random_lpips, face=face)(*PAIR, g)
    plain = {"ssim": ssim(*PAIR), "dwt": dwt(*PAIR), "lpips": random_lpips(*PAIR),
             "face": face.out(face.features(PAIR[0]).mean(dim=(2, 3)))[:, 0].sigmoid()}
    assert R.shape == (3, g, g)
    for name, value in plain.items():
        torch.testing.assert_close(terms[name], value, rtol=0, atol=1e-5)
    want = sum(weight * plain[name] for name, weight in weights.items())
    torch.testing.assert_close(R.mean(dim=(1, 2)), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["ssim", "dwt"])
def test_a_damaged_place_lowers_the_reward_of_its_patch_most(name):
    """Smooth pictures, and noise or a brighter corner: the maps say where."""
    gt = torch.nn.functional.interpolate(noise(5, 4, 3, 4, 4) / 3, size=64, mode="bicubic")
    x = gt.clone()
    x[:, :, 32:, :32] += 0.5 if name == "dwt" else noise(6, 4, 3, 32, 32)
    reward = CompositeReward({name: 1.0})
    fall = reward(gt, gt, 2)[0] - reward(x, gt, 2)[0]                   # (B, 2, 2)
    assert (fall.flatten(1).argmax(dim=1) == 2).all()


def test_patch_means_are_plain_means_where_the_map_divides():
    m = noise(7, 2, 12, 12)
    want = m.reshape(2, 3, 4, 3, 4).mean(dim=(2, 4))
    torch.testing.assert_close(patch_means(m, 3), want)


def test_the_likelihood_of_a_patch_is_that_of_its_values():
    x, mu, sigma = noise(8, 2, 3, 8, 8), noise(9, 2, 3, 8, 8), torch.tensor(0.7)
    want = torch.distributions.Normal(mu, sigma).log_prob(x)            # (2, 3, 8, 8)
    got = gaussian_log_prob(x, mu, sigma, 2)
    assert got.shape == (2, 2, 2)
    torch.testing.assert_close(got[:, 0, 1], want[:, :, :4, 4:].mean(dim=(1, 2, 3)))
    torch.testing.assert_close(gaussian_log_prob(x, mu, sigma)[:, 0, 0], want.mean(dim=(1, 2, 3)))


def test_a_patch_is_compared_with_itself_and_an_image_has_one_standard_deviation():
    rewards = noise(10, 4, 5, 3, 3) * torch.linspace(1, 5, 9).view(3, 3) + 7
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    variance = centred.var(dim=1, correction=0).mean(dim=(1, 2))        # of the group, over patches
    want = centred / (variance.sqrt().view(4, 1, 1, 1) + ADV_EPS)
    torch.testing.assert_close(group_advantages(rewards), want)
    torch.testing.assert_close(group_advantages(rewards[..., :1, :1], "batch"), (
        centred[..., :1, :1] / (rewards[..., :1, :1].std(correction=0) + ADV_EPS)))


def test_the_gradient_pushes_a_pixel_by_the_reward_of_its_own_patch_alone():
    """A closed form: the action is the image, and the reward of a patch is the mean of its D
    values. Then E[A (a - mu)_k] = Cov(R, a_k) / std(R) = sigma / sqrt(D) at each value k of a patch
    that is rewarded. Here only the left half is; in the right half the expectation is 0. A group of
    G members leaves an error of about sigma / sqrt(G)."""
    G, sigma = 20_000, torch.tensor(0.5)
    mu = torch.zeros(1, 3, 2, 4, requires_grad=True)                    # two patches of D = 12
    action = sigma * noise(11, G, 3, 2, 4)
    log_prob = lambda mean: gaussian_log_prob(action.flatten(2).unflatten(2, (2, 4)), (
        mean.expand(G, -1, -1, -1)), sigma, 2)                          # (G, 2, 2): 1 x 2 px each
    rewards = torch.nn.functional.adaptive_avg_pool2d(action.mean(dim=1), 2)        # (G, 2, 2)
    rewards[..., 1] = 0                                                 # the right half
    A = group_advantages(rewards[None])[0]
    loss, ratio = clipped_loss(log_prob(mu), log_prob(mu).detach(), A, 10.0)
    assert torch.equal(ratio, torch.ones_like(ratio))
    (gradient,) = torch.autograd.grad(loss.mean(), mu)
    D, patches = 6, 4                   # 3 x 1 x 2 values in each of 2 x 2 patches
    pushed = -gradient[0] * sigma ** 2 * D * patches                    # E[A (a - mu)]
    # One standard deviation for the image: half of the patches vary, so that it is 2^-1/2 of theirs
    want = sigma / D ** 0.5 * 2 ** 0.5
    error = 5 * sigma * 2 ** 0.5 / G ** 0.5
    assert (pushed[..., :2] - want).abs().max() < error and pushed[..., 2:].abs().max() == 0
    assert want > 10 * error


def brightness(x, gt, g=1):
    r = torch.nn.functional.adaptive_avg_pool2d(x.mean(dim=1), g)
    return r, {"brightness": r.mean(dim=(1, 2))}


def make(**changes):
    torch.manual_seed(0)
    net = UNet(Config(size=16, channels=8, mults=(1, 2), patch=2))
    torch.nn.init.normal_(net.head[-1].weight, std=0.05)
    settings = LRPOSettings(**dict(ddim_steps=4, group=3, lr=1e-3) | changes)
    return LRPO(net, Diffusion(net.config), brightness, torch.Generator().manual_seed(0), settings)


@pytest.mark.parametrize("recipe", [{}, {"own_steps": 0, "gt_target": "noised", "gt_weight": .1}])
def test_one_patch_the_size_of_the_image_is_the_papers_form(recipe):
    batch = PAIR[0][:2, :, :16, :16], PAIR[1][:2, :, :16, :16]
    paper, whole = make(**recipe), make(credit=16, **recipe)
    assert paper.step(batch) == whole.step(batch)
    for a, b in zip(paper.net.parameters(), whole.net.parameters()):
        assert torch.equal(a, b)
    parts = make(credit=8, **recipe)
    parts.step(batch)
    assert any(not torch.equal(a, b) for a, b in zip(paper.net.parameters(),
                                                     parts.net.parameters()))


def test_the_clip_range_is_that_of_a_patch_and_the_patches_must_fill_the_image():
    assert make(credit=4).clip == TRUST / 48 and make().clip == TRUST / (3 * 16 * 16)
    with pytest.raises(UserError, match="--credit 5: must divide the images' 16 px"):
        make(credit=5)
