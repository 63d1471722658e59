"""Every reward against another's arithmetic: scikit-image, the lpips package, closed forms."""
import warnings
from pathlib import Path

import lpips as lpips_package
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from frm import FaceRewardModel, load_face_reward
from rewards import LPIPS, SETS, CompositeReward, dwt, low_pass, parse_rewards, psnr, ssim
from support.cli import UserError
from support.data import Photos, pairs
from support.faces import draw_faces
from tools import reward_report as report


def images(seed, n=4, side=32):
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand((n, 3, side // 4, side // 4), generator=g)
    x = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear") * 2 - 1
    return x + 0.1 * torch.randn(x.shape, generator=g)


def as_skimage(x):
    return ((x.double() + 1) / 2).permute(1, 2, 0).numpy()


def test_ssim_and_psnr_equal_scikit_image():
    a = images(0).clamp(-1, 1)
    for b in (images(1).clamp(-1, 1), (a + 0.2 * images(2)).clamp(-1, 1), a * 0.5):
        want = [structural_similarity(as_skimage(x), as_skimage(y), data_range=1, channel_axis=-1,
                                      gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
                for x, y in zip(a, b)]
        torch.testing.assert_close(ssim(a, b).double(), torch.tensor(want), rtol=0, atol=1e-5)
        want = [peak_signal_noise_ratio(as_skimage(y), as_skimage(x), data_range=1)
                for x, y in zip(a, b)]
        torch.testing.assert_close(psnr(a, b).double(), torch.tensor(want), rtol=0, atol=1e-3)


def test_gradients_are_finite_where_nothing_differs():
    face = FaceRewardModel()
    for gt in (images(0).clamp(-1, 1), torch.zeros(2, 3, 32, 32)):
        for term in (ssim, dwt, face):
            x = gt.clone().requires_grad_()
            (g,) = torch.autograd.grad(term(x, gt).sum(), x)
            assert torch.isfinite(g).all()
    x, gt = images(0).requires_grad_(), images(1)
    for term in (ssim, dwt, face):
        assert torch.autograd.grad(term(x, gt).sum(), x)[0].abs().max() > 0


def test_dwt_is_the_papers_exponential_of_a_unit_gain_low_pass():
    gt = torch.zeros(1, 3, 32, 32)
    for shift in (0.005, 0.02):         # on [0, 1] images; the published band has a gain of 4
        want = torch.exp(torch.tensor([-15 * 4 * shift]))
        torch.testing.assert_close(dwt(gt + 2 * shift, gt), want, rtol=1e-4, atol=0)
    stripes = torch.ones(1, 3, 32, 32)
    stripes[..., ::2] = -1
    assert dwt(stripes, gt).item() == 1         # blind to detail, as a low-pass is
    assert low_pass(gt).shape == (1, 3, 7, 7)


# The dual-tree wavelet's low-pass taps: level 1, near_sym_b; levels 2 and 3, qshift_b of tree a.
LEVEL1 = [-.00175781, 0, .02226562, -.046875, -.04824219, .296875, .55546875]
QSHIFT = [.00325314, -.00388321, .03466035, -.0388728, -.11720389, .27529538, .75614564, .56881042,
          .01186609, -.1067118, .02382538, .01702522, -.00543948, -.0045569]


def dual_tree_low(x):
    """The level-3 low band of (..., S): along the last axis, S / 4, gain 2, mirrored at the edges.

    Even places are tree a, odd ones tree b, whose filter is a's turned round. Each tree takes every
    other of its own samples: output 2n is a's about place 4n + 1, output 2n + 1 b's about 4n + 2.
    """
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(6, 6)], mode="symmetric")
    taps = LEVEL1 + LEVEL1[-2::-1]
    x = sum(w * padded[..., k:k + x.shape[-1]] for k, w in enumerate(taps))
    for _ in range(2):
        size = x.shape[-1]
        padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(16, 16)], mode="symmetric")
        a, b = (sum(w * padded[..., 16 + middle - 13 + 2 * k:][..., :size:4][..., :size // 4]
                    for k, w in enumerate(taps))
                for middle, taps in ((1, QSHIFT), (2, QSHIFT[::-1])))
        x = np.stack([a, b], axis=-1).reshape(*x.shape[:-1], size // 2)
    return x


def dual_tree_reward(x, y):
    """LRPO's exp(-15 L1) of the band, images in [0, 1]."""
    def band(u):
        u = dual_tree_low((u.double().numpy() + 1) / 2)
        return dual_tree_low(u.swapaxes(-1, -2)).swapaxes(-1, -2)       # (B, 3, S/4, S/4), gain 4
    return np.exp(-15 * np.abs(band(x) - band(y)).mean(axis=(1, 2, 3)))


def test_dwt_is_near_the_dual_tree_band():
    """What was measured on held-out faces is in docs/results.md; this keeps it so."""
    band = dual_tree_low(np.ones((1, 64)))
    np.testing.assert_allclose(band, np.full((1, 16), 2.0), rtol=1e-3)
    ramp = dual_tree_low(np.arange(256.)[None])[0, 8:-8] / 2
    np.testing.assert_allclose(np.diff(ramp), 4, atol=0.3)      # evenly placed: the trees in step
    lq, gt = pairs(Photos.drawn(64, 0, 64, "heldout"), range(64), seed=0, epoch=0)
    want, got = dual_tree_reward(lq, gt), dwt(lq, gt).numpy()
    assert np.corrcoef(want, got)[0, 1] > 0.98 and np.abs(want - got).mean() < 0.05


@pytest.fixture
def backbone(tmp_path):
    """A file such as --lpips_weights takes: squeezenet's features, random, torchvision's names."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        judge = lpips_package.LPIPS(net="squeeze", pnet_rand=True, verbose=False).eval()
    state = {k.split(".", 1)[1]: v for k, v in judge.net.state_dict().items()}
    torch.save(state, tmp_path / "squeeze.pth")
    return judge, str(tmp_path / "squeeze.pth")


def test_lpips_equals_the_package(backbone):
    judge, path = backbone
    ours, a, b = LPIPS("squeeze", path), images(0), images(1)
    large = (torch.nn.functional.interpolate(u, scale_factor=2, mode="bicubic") for u in (a, b))
    torch.testing.assert_close(1 - ours(a, b), judge(*large).flatten(), rtol=1e-5, atol=1e-6)
    torch.nn.ModuleList([ours]).train()
    assert not any(m.training for m in ours.modules())      # a parent cannot wake its dropout
    assert not any(p.requires_grad for p in ours.parameters())
    with pytest.raises(UserError, match="16 px or more"):
        ours(a[..., :15, :15], b[..., :15, :15])


def test_lpips_with_the_real_backbone(monkeypatch):
    path = Path(__file__).parents[2] / "shared/weights/lpips_squeeze_backbone.pth"
    if not path.exists():
        pytest.skip("the real squeeze backbone is not here")
    monkeypatch.setattr("rewards.LPIPS_ENLARGED_BELOW", 0)      # as torchmetrics, which has .1008
    torch.manual_seed(123)
    a, b = (torch.rand(10, 3, 100, 100) * 2 - 1 for _ in range(2))
    assert (1 - LPIPS("squeeze", str(path))(a, b)).mean().item() == pytest.approx(0.1008, abs=5e-5)


def test_lpips_never_runs_on_other_weights(backbone, tmp_path):
    with pytest.raises(UserError, match="--lpips_weights FILE, or use --rewards"):
        LPIPS("squeeze")
    with pytest.raises(UserError, match="not the features of alex"):
        LPIPS("alex", backbone[1])
    with pytest.raises(UserError, match="no such file"):
        LPIPS("squeeze", str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="^--judge_weights .*the features of alex; --judge_net say"):
        LPIPS("alex", backbone[1], "--judge_weights")


def test_composite_is_the_weighted_sum_of_clamped_images():
    gt, face = images(0).clamp(-1, 1), FaceRewardModel().eval()
    reward = CompositeReward({"ssim": 0.5, "dwt": 0.2, "face": 0.3}, face=face)
    x = images(1) * 3       # far outside [-1, 1]
    total, parts = reward(x, gt)
    y = x.clamp(-1, 1)
    want = 0.5 * ssim(y, gt) + 0.2 * dwt(y, gt) + 0.3 * face(y)
    torch.testing.assert_close(total, want.view(4, 1, 1))
    assert list(parts) == ["ssim", "dwt", "face"] and total.dtype == torch.float32
    g = torch.autograd.grad(reward(y.requires_grad_(), gt)[0].sum(), y)[0]
    assert torch.isfinite(g).all() and g.abs().max() > 0        # what ReFL follows
    with pytest.raises(ValueError, match="lpips.* need their models"):
        CompositeReward({"lpips": 1.0})


def test_reward_names_and_files(tmp_path):
    assert parse_rewards("ssim=.4, face=1") == {"ssim": 0.4, "face": 1.0}
    for text, message in [("sim=1", "'sim' is no reward"), ("ssim", "name=weight"),
                          ("ssim=a", "name=weight"), ("", "''")]:
        with pytest.raises(UserError, match=message):
            parse_rewards(text)
    torch.save({"mode": "sft"}, tmp_path / "sft.pt")
    with pytest.raises(UserError, match="not a checkpoint of --mode frm"):
        load_face_reward(tmp_path / "sft.pt")
    with pytest.raises(UserError, match="no such file"):
        load_face_reward(tmp_path / "none.pt")
    assert set(parse_rewards(SETS["offline"])) <= {"ssim", "dwt", "face"}   # nothing to fetch
    assert parse_rewards("paper") == {"face": .3, "lpips": .3, "clipiqa": .1, "dwt": .3}
    assert parse_rewards("paper-alt") == {"face": .4, "lpips": .2, "clipiqa": .2, "dwt": .2}
    assert set(parse_rewards("no-face")) == {"clipiqa", "lpips", "ssim"}
    assert all(sum(parse_rewards(name).values()) == pytest.approx(1) for name in SETS
               if name != "offline")


def test_spearman_is_scipys():
    score = np.random.default_rng(0).integers(0, 4, (30, 5)).astype(float)     # many ties
    score[0] = 1        # a constant has no rank correlation: 0
    want = [0.0] + [spearmanr(row, range(5)).statistic if np.ptp(row) else 0.0 for row in score[1:]]
    assert report.spearman(score) == pytest.approx(np.mean(want))
    assert report.spearman(np.array([[5., 4, 3, 2, 1]])) == -1


def test_the_report_sees_what_each_term_sees(capsys):
    found = report.scores(CompositeReward({"ssim": 1.0, "dwt": 1.0}),
                          draw_faces(torch.arange(8), size=32), "cpu")
    for kind, rows in found.items():
        assert (rows["ssim"][:, 0] > 0.9999).all()                      # clean first
        assert (np.diff(rows["ssim"].mean(axis=0)) < 0).all(), kind     # then ever worse
    text = report.table({"x": {"a": np.array([[1., 1.5, 2]] * 3)},
                         "y": {"a": np.array([[1., .9, .2]] * 3)}})
    assert text.splitlines()[-1] == "| a | 1.00, -1.000* | -1.00, 0.800 |"
    report.report(report.parser().parse_args(["--rewards", "dwt=1", "--n", "3", "--size", "32",
                                              "--device", "cpu"]))
    assert "| dwt | -1.00" in capsys.readouterr().out
