"""The diffusion's equations against diffusers and closed forms; the network's contract."""
import pytest
import torch
from diffusers import DDIMScheduler

from common import noise
from model import Config, Diffusion, UNet, load_restorer
from sft import EMA
from support.checkpoint import ARGUMENTS, VERSION, load_tensors, pick_device, save
from support.cli import UserError

TINY = dict(size=16, channels=8, mults=(1, 2), patch=2)


@pytest.mark.parametrize("eta", [0.0, 0.8, 1.0])
def test_ddim_step_equals_diffusers(eta):
    d = Diffusion(Config(prior=0))
    judge = DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False, set_alpha_to_one=True,
                          prediction_type="v_prediction", timestep_spacing="trailing")
    judge.set_timesteps(10)
    assert [t for t, _ in d.schedule(10)] == judge.timesteps.tolist()
    x, out, z = noise(0, 2, 3, 8, 8), noise(1, 2, 3, 8, 8), noise(2, 2, 3, 8, 8)
    for t, s in d.schedule(10):
        mu, sigma, x0_hat = d.ddim_step(lambda *_: out, x, x, t, s, eta)
        want = judge.step(out, t, x, eta=eta, variance_noise=z)
        torch.testing.assert_close(mu + sigma * z, want.prev_sample, rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(x0_hat, want.pred_original_sample, rtol=1e-4, atol=2e-3)


def test_ddim_at_eta_1_is_ddpms_posterior():
    """DDPM eq. 6 and 7 at every one of the T steps, in float64."""
    d = Diffusion(Config(timesteps=50))
    abar = d.abar.double()
    want = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 50, dtype=torch.float64), 0)
    torch.testing.assert_close(abar, want, rtol=1e-6, atol=0)
    beta = 1 - abar / torch.cat([torch.ones(1), abar[:-1]])     # of the float32 abar that d has
    x, x0 = noise(0, 1, 3, 4, 4).double(), noise(1, 1, 3, 4, 4).double()
    assert d.schedule(50)[0] == (49, 48) and d.schedule(50)[-1] == (0, -1)
    for t, s in d.schedule(50):
        mu, sigma = d.posterior_mean(x, x0, t, s, 1.0), d.sigma(t, s, 1.0)
        prev = abar[s] if s >= 0 else torch.ones(())
        mean = (prev.sqrt() * beta[t] * x0 + (1 - beta[t]).sqrt() * (1 - prev) * x) / (1 - abar[t])
        var = (1 - prev) / (1 - abar[t]) * beta[t]
        torch.testing.assert_close(mu, mean, rtol=0, atol=1e-9)
        torch.testing.assert_close(sigma ** 2, var, rtol=0, atol=1e-9)


def test_q_sample_moments():
    d = Diffusion(Config())
    x0, t = torch.full((20_000, 1, 1, 1), 0.7), torch.full((20_000,), 300)
    x = d.q_sample(x0, t, noise(0, 20_000, 1, 1, 1))
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[300].item()
    assert abs(x.mean().item() - 0.7 * abar ** 0.5) < 4 * (1 - abar) ** 0.5 / 20_000 ** 0.5
    assert abs(x.var().item() / (1 - abar) - 1) < 4 * (2 / 20_000) ** 0.5


def test_a_perfect_network_has_no_loss_and_restores_exactly():
    d, gt = Diffusion(Config(prior=0)), noise(0, 4, 3, 8, 8).clamp(-1, 1)

    def oracle(x, lq, t):
        a = d.abar[t].view(-1, 1, 1, 1)
        eps = (x - a.sqrt() * gt) / (1 - a).sqrt()
        return a.sqrt() * eps - (1 - a).sqrt() * gt
    g = torch.Generator().manual_seed(0)
    assert d.loss(oracle, gt, gt, g).max() < 1e-4
    for eta in (0.0, 1.0):
        assert (d.sample(oracle, gt, 7, eta, g) - gt).abs().max() < 5e-3


def test_the_prior_prediction_is_the_posterior_mean_of_a_gaussian_prior():
    """x_0 ~ N(LQ, .15^2), x_t = q_sample of it: regress x_0 on x_t by least squares."""
    d, n, lq = Diffusion(Config()), 200_000, 0.4
    x0 = lq + 0.15 * noise(0, n, 1, 1, 1)
    silent = lambda x, lq, t: torch.zeros_like(x)       # only the prior prediction
    for t in (50, 200):
        x = d.q_sample(x0, torch.full((n,), t), noise(1, n, 1, 1, 1))
        _, _, x0_hat = d.ddim_step(silent, x, torch.full_like(x, lq), t, -1, 0.0)
        A = torch.stack([x.flatten(), torch.ones(n)], dim=1).double()
        fit = A @ torch.linalg.lstsq(A, x0.flatten().double()[:, None]).solution
        assert (fit.flatten() - x0_hat.flatten()).abs().max() < 0.01


def test_sampling_any_K_and_the_seed_decides():
    torch.manual_seed(0)
    net = UNet(Config(**TINY))
    torch.nn.init.normal_(net.head[-1].weight, std=0.1)     # else the fresh network answers 0
    d, lq = Diffusion(net.config), noise(0, 2, 3, 16, 16)
    run = lambda K, eta, seed: d.sample(net, lq, K, eta, torch.Generator().manual_seed(seed))
    for K in (1, 3, 10):
        assert run(K, 1.0, 0).shape == lq.shape and run(K, 1.0, 0).abs().max() <= 1
        assert torch.equal(run(K, 1.0, 0), run(K, 1.0, 0))
    assert not torch.equal(run(3, 1.0, 0), run(3, 1.0, 1))
    assert not torch.equal(run(3, 1.0, 0), run(3, 0.0, 0))
    with pytest.raises(UserError, match="1 to 1000"):
        d.schedule(0)


def test_network_uses_all_its_inputs_and_has_no_dropout():
    torch.manual_seed(0)
    net = UNet(Config(**TINY))
    assert net(*[noise(0, 2, 3, 16, 16)] * 2, torch.tensor([1, 2])).abs().max() == 0   # calm start
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, lq, t = noise(0, 2, 3, 16, 16), noise(1, 2, 3, 16, 16), torch.tensor([10, 900])
    y = net(x, lq, t)
    assert y.shape == x.shape and torch.equal(y, net(x, lq, t))
    assert torch.equal(y, net.eval()(x, lq, t))
    for other in (net(lq, lq, t), net(x, x, t), net(x, lq, t.flip(0))):
        assert not torch.allclose(y, other, atol=1e-3)
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    net.bf16 = True
    assert 0 < (net(x, lq, t) - y).abs().max() < 0.1 * y.abs().max()


def test_config_refuses_what_cannot_be_built():
    with pytest.raises(UserError, match="multiple of 8"):
        Config(size=36)


def test_ema_against_its_recurrence():
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    early, late = EMA(net, 0.5), EMA(net, 0.5, from_scratch=False)
    wants = [0.0, 0.0]
    for n in range(1, 20):
        net.weight.data.fill_(float(n))
        for i, (ema, decay) in enumerate([(early, min(0.5, (1 + n) / (10 + n))), (late, 0.5)]):
            ema.update(net)
            wants[i] = decay * wants[i] + (1 - decay) * n
            assert ema.net.weight.item() == pytest.approx(wants[i], rel=1e-5)


def test_checkpoint_files(tmp_path):
    net = UNet(Config(**TINY))
    good = tmp_path / "good.pt"
    args = dict.fromkeys(ARGUMENTS, 0) | {"data": None, "rewards": ""}
    state = {"version": VERSION, "mode": "sft", "args": args, "step": 1,
             "best": 0.5, "finished": True, "frm": None, "config": vars(net.config), "model": {},
             "ema": net.state_dict(), "ema_updates": 1, "optimizer": {}, "method": {},
             "generator": torch.zeros(1)}
    save(good, state)
    again, _ = load_restorer(good)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))
    assert [p.name for p in tmp_path.iterdir()] == ["good.pt"]
    text, pickled = tmp_path / "text.pt", tmp_path / "pickle.pt"
    text.write_text("hello")
    torch.save(torch.nn.Linear(1, 1), pickled)      # a whole object: loading it would run code
    for path in (text, pickled):
        with pytest.raises(UserError, match=f"--ckpt {path}: not a PyTorch file"):
            load_tensors(path, "--ckpt")
    with pytest.raises(UserError, match="no such file"):
        load_restorer(tmp_path / "none.pt")
    broken = {key: value.clone() for key, value in net.state_dict().items()}
    broken["stem.bias"][0] = float("nan")
    for content, message in (({"a": 1}, "not a checkpoint of train.py"), ([1], "not a checkpoint"),
                             (state | {"version": 1}, "another version"),
                             ({k: v for k, v in state.items() if k != "method"}, "damaged"),
                             (state | {"config": {}}, "not a restorer"),
                             (state | {"config": {"size": "a"}}, "not a restorer"),
                             (state | {"config": vars(net.config) | {"unknown": 1}},
                              "damaged"),
                             (state | {"ema": {}}, "damaged"), (state | {"ema": 7}, "damaged"),
                             (state | {"args": {"size": 16}}, "damaged"),
                             (state | {"ema": broken}, "not finite")):
        torch.save(content, text)
        with pytest.raises(UserError, match=message):
            load_restorer(text)
    with pytest.raises(UserError, match="--device nonsense"):
        pick_device("nonsense")
