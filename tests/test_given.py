"""Pairs that exist as files: their figures are those of the pairs in memory, whatever lies beside
them; and pictures of another method are one more row."""
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from model import load_restorer, restore
from rewards import psnr
from support.cli import UserError
from support.data import to_float, to_uint8
from support.given import read_given

N, SIZE = 5, 16
NAMES = ["2", "3.5", "4", "a/0", "a/1"]        # sorted; with a dot, and in a folder


def save(folder, images, suffix=".png"):
    """Write images (N, 3, S, S) in [-1, 1] as files of these names."""
    for name, image in zip(NAMES, to_uint8(images)):
        path = folder / (name + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return str(folder)


@pytest.fixture
def pairs(tmp_path):
    """Five held-out pairs as tensors, and their folders."""
    lq, gt = evaluate.held_out(None, SIZE, N, "cpu")
    return lq, gt, save(tmp_path / "lq", lq), save(tmp_path / "gt", gt, ".bmp")


def call(runs, out, *flags, mode="lrpo"):
    evaluate.compare(evaluate.parser().parse_args(
        ["--ckpt", str(runs / mode / "last.pt"), "--device", "cpu", "--rewards", "ssim=1,face=1",
         "--frm_weights", str(runs / "frm" / "last.pt"), "--out", str(out), *flags]))
    return json.loads((out / "metrics.json").read_text())


def test_pairs_in_files_have_the_figures_of_pairs_in_memory(runs, tmp_path, pairs):
    lq, gt, lq_folder, gt_folder = pairs
    files = call(runs, tmp_path / "e", "--lq", lq_folder, "--data", gt_folder)
    memory = call(runs, tmp_path / "m", "--n", str(N))
    assert files["rows"] == memory["rows"] and files["images"] == N
    assert files["data"] == f"{lq_folder}, ground truth {gt_folder}"
    few = call(runs, tmp_path / "e", "--lq", lq_folder, "--data", gt_folder, "--n", "2")
    assert few["images"] == 2
    assert few["rows"]["LQ"]["psnr"] == pytest.approx(psnr(lq[:2], gt[:2]).mean().item())


def test_pictures_of_another_method_are_a_row(runs, tmp_path, pairs, capsys):
    lq, gt, lq_folder, gt_folder = pairs
    net, state = load_restorer(runs / "lrpo" / "last.pt", "cpu")
    x = restore(net, lq, 3, 0.8, 0)
    other = save(tmp_path / "CodeFormer", x, ".tif")
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "CodeFormer" / "more.png")
    rows = call(runs, tmp_path / "e", "--lq", lq_folder, "--data", gt_folder, "--images", other,
                gt_folder, "--eta", ".8", "--best_of", "2")["rows"]
    assert [*rows] == ["LQ", "lrpo", "CodeFormer", "gt", "lrpo, best of 2"]
    assert rows["CodeFormer"]["psnr"] == pytest.approx(
        psnr(to_float(to_uint8(x)), gt).mean().item(), rel=1e-5)
    assert rows["CodeFormer"]["r_face"] == pytest.approx(rows["lrpo"]["r_face"], abs=.01)
    assert rows["gt"]["psnr"] == 100 and rows["gt"]["r_ssim"] == pytest.approx(1)
    found = capsys.readouterr()
    assert "| CodeFormer |" in found.out and found.err.count("more.png") == 1
    twin = save(tmp_path / "deep" / "CodeFormer", x)
    both = call(runs, tmp_path / "e", "--lq", lq_folder, "--images", other, twin)["rows"]
    assert {other, twin} < {*both}      # two folders of one name have their paths as labels
    with pytest.raises(UserError, match="^--images .*CodeFormer: give the LQ .* with --lq$"):
        call(runs, tmp_path / "e", "--images", other)


def test_without_ground_truth_there_are_the_columns_that_need_none(runs, tmp_path, pairs, capsys):
    lq, gt, lq_folder, gt_folder = pairs
    truth = call(runs, tmp_path / "e", "--lq", lq_folder, "--data", gt_folder)["rows"]
    capsys.readouterr()
    blind = call(runs, tmp_path / "e", "--lq", lq_folder)
    for label, row in blind["rows"].items():
        assert row.keys() == {"reward", "r_face"}
        assert row["reward"] == row["r_face"] == pytest.approx(truth[label]["r_face"])
    said = capsys.readouterr().out
    assert "psnr" not in said and "Judges" not in said and "ground truth" not in (
        said.splitlines()[-1])
    for flags, message in ((["--frontier"], "--frontier: needs the ground truth"),
                           (["--rewards", "ssim=1"], "--lq .*: give the ground truth")):
        with pytest.raises(UserError, match=message):
            call(runs, tmp_path / "e", "--lq", lq_folder, *flags)


def test_what_cannot_be_compared_is_named_in_one_sentence_and_left_out(tmp_path, pairs, capsys):
    lq, gt, *folders = pairs
    places = [*zip(("--lq", "--data"), folders)]
    whole = read_given(places, SIZE, 200)
    assert all(torch.equal(to_float(u), v) for u, v in zip(whole, (lq, gt)))
    assert capsys.readouterr().err == ""
    (tmp_path / "lq" / "4.png").rename(tmp_path / "lq" / "five.png")
    Image.new("RGB", (SIZE, SIZE - 4)).save(tmp_path / "gt" / "2.bmp")
    (tmp_path / "lq" / "a" / "0.png").write_text("no picture")
    left = read_given(places, SIZE, 200)
    assert all(torch.equal(u, v[[1, 4]]) for u, v in zip(left, whole))      # 3.5, a/1
    lines = sorted(capsys.readouterr().err.splitlines())
    assert len(lines) == 4      # the missing partner is missed in both folders
    for line, path, why in zip(lines, ("gt/2.bmp", "lq/a/0.png", "gt/4.bmp", "lq/five.png"), (
            "another shape, 16 x 12, than .*2.png, 16 x 16", "cannot be read as a photo",
            "no picture of this name", "no picture of this name")):
        assert line.startswith("left out") and path in line and re.search(why, line), line


def test_sizes_may_differ_and_shapes_by_a_pixel(tmp_path):
    big = np.random.default_rng(0).integers(0, 256, (90, 122, 3), dtype=np.uint8)
    for name, size in (("lq", (30, 23)), ("gt", (122, 90))):        # 4 times, rounded
        (tmp_path / name).mkdir()
        Image.fromarray(big).resize(size).save(tmp_path / name / "1.png")
    turned = Image.fromarray(np.rot90(big).copy())
    (tmp_path / "turned").mkdir()
    exif = Image.Exif()
    exif[0x112] = 6             # to be turned by 90 degrees clockwise: then it is `big`
    turned.save(tmp_path / "turned" / "1.png", exif=exif)
    lq, gt, upright = read_given([(f, str(tmp_path / f)) for f in ("lq", "gt", "turned")], SIZE, 9)
    assert torch.equal(gt, upright) and lq.shape == gt.shape == (1, 3, SIZE, SIZE)


def test_two_pictures_of_one_name_and_none_at_all(tmp_path, pairs):
    lq, gt, lq_folder, gt_folder = pairs
    with pytest.raises(UserError, match="--lq .*none of its pictures can be compared"):
        read_given([("--lq", lq_folder), ("--data", str(tmp_path / "gt" / "a"))], SIZE, 9)
    Image.new("RGB", (9, 9)).save(tmp_path / "gt" / "4.png")
    with pytest.raises(UserError, match="--data .*another picture has the name of .*4.*suffix"):
        read_given([("--lq", lq_folder), ("--data", gt_folder)], SIZE, 9)
