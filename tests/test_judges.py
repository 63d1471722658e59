"""Judges against piq, lpips and a Fourier transform; what may judge; the picture that is shown."""
import argparse
import json
import warnings

import lpips
import numpy as np
import piq
import pytest
import torch
import torch.nn.functional as F

import evaluate
from common import noise
from support.cli import UserError
from support.pictures import CELL, FACES, GAP, comparison, detail

pytestmark = pytest.mark.usefixtures("little_work")


@pytest.mark.parametrize("side", [16, 64, 128])
def test_haarpsi_is_piqs_on_images_enlarged_twice_below_128_px(side):
    gt = F.interpolate(noise(0, 3, 3, side // 4, side // 4) / 2, size=side, mode="bilinear")
    x = gt + 0.2 * noise(1, 3, 3, side, side)       # partly outside [-1, 1]
    large = side if side == 128 else 2 * side
    by_hand = []
    for a, b in zip(x, gt):
        a, b = (F.interpolate(u[None], size=(large, large), mode="bicubic") for u in (a, b))
        by_hand.append(piq.haarpsi(((a + 1) / 2).clamp(0, 1), ((b + 1) / 2).clamp(0, 1)).item())
    got = evaluate.haarpsi(x, gt)
    assert got.tolist() == pytest.approx(by_hand, abs=1e-5) and max(by_hand) < 0.9
    assert evaluate.haarpsi(gt, gt).tolist() == pytest.approx([1] * 3, abs=1e-5)


@pytest.fixture(scope="module")
def alex(tmp_path_factory):
    """The package's LPIPS with a random AlexNet, and the file of that."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        judge = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    path = tmp_path_factory.mktemp("alex") / "alex.pth"
    torch.save({k.split(".", 1)[1]: v for k, v in judge.net.state_dict().items()}, path)
    return judge, str(path)


@pytest.fixture
def compare(runs, tmp_path, capsys):
    """Compares sft with a run that was trained on these rewards: the tables, each as its cells, the
    other lines, and metrics.json."""
    def compare(rewards, *flags, net="squeeze"):
        state = torch.load(runs / "lrpo" / "last.pt", weights_only=True)
        state["args"] |= {"rewards": rewards, "lpips_net": net}
        torch.save(state, tmp_path / "trained.pt")
        evaluate.compare(evaluate.parser().parse_args(
            ["--ckpt", str(runs / "sft" / "last.pt"), str(tmp_path / "trained.pt"), "--n", "4",
             "--device", "cpu", "--out", str(tmp_path / "e"), *flags]))
        lines = capsys.readouterr().out.splitlines()
        tables = [[]]
        for line in lines:
            if line.startswith("|"):
                tables[-1].append([cell.strip() for cell in line.split("|")[1:-1]])
            elif tables[-1]:
                tables.append([])
        facts = json.loads((tmp_path / "e" / "metrics.json").read_text())
        return tables, [line for line in lines if not line.startswith("|")], facts
    return compare


def test_a_term_of_a_reward_is_no_judge_and_has_the_other_table(compare):
    for rewards, judges in (("ssim=.5,dwt=.5", ["psnr", "haarpsi"]),
                            ("ssim=0,dwt=1", ["psnr", "ssim", "haarpsi"])):
        (first, second, *_), said, facts = compare(rewards)
        assert first[0] == ["", *judges, "TFLOP"]
        assert second[0] == ["", "reward", "r_ssim", "r_dwt"]
        assert [row[0] for row in first[2:]] == [row[0] for row in second[2:]] == [
            "LQ", "sft", "trained"]
        assert any(line.startswith("Judges, which no reward contains") for line in said)
        assert any("without the judge lpips_alex: " in line and "--judge_weights FILE" in line
                   for line in said)
        assert facts["rewarded"] == sorted({"ssim", "dwt"} - {*judges})


def test_the_lpips_that_judges_is_the_packages(compare, alex):
    judge, path = alex
    (first, *_), _, facts = compare("ssim=1", "--judge_weights", path)
    assert first[0] == ["", "psnr", "haarpsi", "lpips_alex", "TFLOP"]
    lq, gt = evaluate.held_out(None, 16, 4, "cpu")
    with torch.no_grad():
        want = judge(*(F.interpolate(u, scale_factor=2, mode="bicubic") for u in (lq, gt)))
    assert facts["rows"]["LQ"]["lpips_alex"] == pytest.approx(want.mean().item(), rel=1e-4)
    with pytest.raises(UserError, match="^--judge_weights .*: these are not the features of vgg"):
        compare("ssim=1", "--judge_weights", path, "--judge_net", "vgg")


def test_an_lpips_that_a_checkpoint_was_trained_on_is_no_judge(compare, tmp_path):
    with pytest.raises(UserError, match="^--judge_net alex: .*trained.pt was trained on") as raised:
        compare("lpips=.5,ssim=.5", net="alex")
    assert "\n" not in str(raised.value) and not (tmp_path / "e").exists()

    def found(judge, mode="refl", **args):
        states = [{"mode": mode, "args": {"rewards": "lpips=.5", "lpips_net": "alex"} | args}]
        return evaluate.rewards_of(states, argparse.Namespace(ckpt=["x.pt"], judge_net=judge))
    assert found("squeeze") == [{"lpips": 0.5}]
    assert found("alex", lpips_net="vgg") == [{"lpips": 0.5}]
    assert found("alex", rewards="lpips=0,ssim=1") == [{"lpips": 0, "ssim": 1}]     # not trained on
    assert found("alex", mode="sft") == []


# ---- the checkerboard ----

BOARD = torch.tensor([[1., -1.], [-1., 1.]]).repeat(8, 8)               # (16, 16)


def test_the_energy_of_the_checkerboard_is_that_of_the_highest_frequency():
    x = noise(0, 4, 3, 16, 16)
    highest = torch.fft.fft2(x.double())[..., 8, 8].abs() / 16 ** 2
    assert evaluate.checkerboard(x) == pytest.approx(highest.square().mean().item(), rel=1e-4)


def test_a_checkerboard_is_reported_from_ten_times_the_ground_truths_energy(compare, monkeypatch):
    base = F.interpolate(noise(1, 4, 3, 4, 4) / 3, size=16, mode="bilinear")
    base = base - (base * BOARD).mean(dim=(2, 3), keepdim=True) * BOARD
    images = [base + 0.01 * times ** 0.5 * BOARD for times in (9, 12)]
    monkeypatch.setattr(evaluate, "held_out", lambda *_: (base, base + 0.01 * BOARD))
    monkeypatch.setattr(evaluate, "restore", lambda *_: images.pop(0))
    _, said, _ = compare("ssim=1")
    # .01 * 12 ** .5 * 127.5 = 4.42
    assert [line for line in said if ": a checkerboard" in line] == [
        "trained: a checkerboard of 4.4 grey levels, which is 12 times the ground truth's energy "
        "at the highest spatial frequency"]


# ---- the picture ----

def columns(n=8):
    """Two restorations that differ in one window, of face 3 if there are so many."""
    gt = noise(2, n, 3, 16, 16).clamp(-1, 1)
    one, other = gt * 0.8, gt * 0.8
    other[min(3, n - 1), :, 8:12, 4:8] += 0.15
    return {"LQ": gt * 0.5, "sft": one, "lrpo": other, "ground truth": gt}


def test_the_detail_is_where_the_restorations_differ():
    _, one, other, _ = columns().values()
    assert detail(torch.stack([one, other])) == (3, 8, 4, 4)
    assert detail(torch.stack([one, one, other, other])) == (3, 8, 4, 4)


def pixels(images, r, c):
    """A cell of the picture, as an array."""
    top, left = 30 + r * (CELL + GAP), c * (CELL + GAP)
    return np.asarray(images)[top:top + CELL, left:left + CELL]


def test_the_picture_has_titles_faces_and_the_detail():
    given = columns()
    picture = comparison(given)
    assert picture.size == (4 * (CELL + GAP), 30 + (FACES + 1) * (CELL + GAP))
    for c, images in enumerate(given.values()):
        shown = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
        grown = shown.repeat_interleave(16, 2).repeat_interleave(16, 3).permute(0, 2, 3, 1).numpy()
        for r in (0, 5):
            assert (pixels(picture, r, c) == grown[r]).all()
        crop = shown[3, :, 8:12, 4:8].repeat_interleave(64, 1).repeat_interleave(64, 2)
        assert (pixels(picture, FACES, c) == crop.permute(1, 2, 0).numpy()).all()
        frame = pixels(picture, 3, c) != grown[3]           # a white frame marks the window
        y, x = frame.any(axis=2).nonzero()
        assert (y.min(), x.min(), y.max(), x.max()) == (128, 64, 192, 128)

    renamed = comparison({"LQ": given["LQ"], "A": given["sft"], "B": given["lrpo"],
                          "ground truth": given["ground truth"]})
    changed = (np.asarray(picture) != np.asarray(renamed)).any(axis=2)
    assert not changed[30:].any()
    assert [bool(part.any()) for part in np.split(changed[:30], 4, axis=1)] == [
        False, True, True, False]


def test_one_restoration_alone_has_a_picture():
    given = columns(n=1)
    assert comparison({name: given[name] for name in ("LQ", "sft", "ground truth")}).size == (
        3 * (CELL + GAP), 30 + 2 * (CELL + GAP))
