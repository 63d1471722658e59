"""The commands as a user gives them, on networks and data sets as small as they come."""
import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import open_clip
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import evaluate
import sample
import settings
import train
from common import SMALL, Reward, log_of, run, same, tiny_net
from lrpo import LRPO
from model import Diffusion
from rewards import REWARDS_HELP
from settings import METHODS, Method
from support.cli import UserError, setting, settings_fields
from support.distributed import gaussian
from support.log import Log, to_floats
from tools import label_pairs

ROOT = Path(__file__).parents[1]
DRAW = Log.curves       # before small_presets replaces it
pytestmark = pytest.mark.usefixtures("little_work")


def test_a_run_leaves_what_the_readme_says(runs):
    for mode in ("sft", "frm", "lrpo"):
        names = {p.name for p in (runs / mode).iterdir()}
        assert {"last.pt", "best.pt", "metrics.csv", "curves.png", "args.json"} <= names
        state = torch.load(runs / mode / "last.pt", weights_only=True)
        assert state["mode"] == mode and json.loads((runs / mode / "args.json").read_text())
    assert Image.open(runs / "sft" / "samples_000003.png").size == (3 * 16 * 2, 8 * 16 * 2)
    with open(runs / "lrpo" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    for name in ("reward", "ssim", "face", "ratio_mean", "ratio_max", "clip_fraction",
                 "approx_kl", "equal_groups", "grad_norm", "heldout_psnr", "heldout_ssim"):
        float(rows[-1][name])


def test_curves_have_a_panel_for_each_column_but_step_and_seconds(runs, tmp_path, monkeypatch):
    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda fig, *given, **more: (
        drawn.extend(fig.axes), savefig(fig, *given, **more)))
    log = Log(runs / "lrpo" / "metrics.csv")
    DRAW(log, tmp_path / "curves.png")
    panels = {ax.get_title(): ax.lines[0].get_xydata() for ax in drawn if ax.get_title()}
    assert [*panels] == [name for name in log.rows[0] if name not in ("step", "seconds")]
    for name, values in (("reward", [1, 2, 3]), ("heldout_psnr", [0, 3]), ("tflop", [0, 1, 2, 3])):
        assert panels[name][:, 0].tolist() == values, name      # a panel skips empty cells
        assert panels[name][-1, 1] == float(log.rows[-1][name])
    assert Image.open(tmp_path / "curves.png").size[0] == 14 * 70


@pytest.mark.parametrize("mode", ["sft", "frm", "lrpo", "refl", "darl"])
def test_resume_is_bit_for_bit(runs, tmp_path, mode):
    """6 steps = 3 + stop + resume + 3: every tensor of the checkpoint, and the log."""
    beside = ["--init", str(runs / "sft" / "last.pt")] if mode != "sft" else []
    beside += ["--frm_weights", str(runs / "frm" / "last.pt")] if mode not in ("sft", "frm") else []
    beside += ["--struct_weight", "1", "--reg_weight", "1"] if mode == "refl" else []
    whole = run(mode, tmp_path / "whole", *beside, steps=6)
    run(mode, tmp_path / "parts", *beside, steps=3)
    parts = run(mode, tmp_path / "parts", *beside, "--resume", steps=6)
    for state in (whole, parts):
        for name in ("out", "resume", "overwrite"):
            state["args"].pop(name)
    same(whole, parts)
    logs = [log_of(tmp_path / name) for name in ("whole", "parts")]
    assert len(logs[0]) == 7 and logs[0] == logs[1] and logs[0][1]["tflop"] > 0


def test_a_face_reward_model_of_another_size_is_refused(runs, tmp_path):
    run("sft", tmp_path / "sft", "--size", "32")
    for mode in ("lrpo", "refl", "darl"):
        with pytest.raises(UserError, match="trained on 16 px, not 32 px"):
            run(mode, tmp_path / mode, "--frm_weights", str(runs / "frm" / "last.pt"))
        assert not (tmp_path / mode).exists()


def method_of(mode, given):
    """The method that train.py makes from these flags."""
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    run = settings.resolve(mode, settings.parse(["--mode", mode, *flags]))
    values = settings.method_values(run)
    net = tiny_net()
    return METHODS[mode].make(net, Diffusion(net.config), Reward(), torch.Generator(), values)


@pytest.mark.parametrize("mode", ["lrpo", "refl", "darl"])
def test_every_setting_has_a_flag_that_reaches_the_method(mode):
    """Each with a value of its own, none of them the default."""
    other = {int: 3, float: 0.7, "rewards": "ssim=1", "adv_std": "batch", "blend": "hard",
             "noise_level_weights": "off", "stepwise": "on", "gt_weight": "auto",
             "gt_target": "noised", "eta": 0.7, "credit": 4}
    own = settings_fields(METHODS[mode].settings)
    given = {name: other.get(name, other.get(f.type)) for name, f in own.items()}
    assert all(own[name].default != value for name, value in given.items() if value != "auto")
    method = method_of(mode, given)
    for name, value in given.items():
        assert getattr(method.settings, name) == value, name
    assert method.optimizer.defaults["lr"] == 0.7


def test_the_papers_recipe_is_the_published_settings_but_for_what_is_given():
    given = {"recipe": "paper", "group": 4, "clip_weights": "CLIP"}
    args = settings.resolve("lrpo", given)
    published = dict(ddim_steps=50, eta=1.0, lr=1e-6, adv_std="batch", gt_weight=0.001, gt_last=5,
                     steps_per_update=1, updates=1, rewards="paper", lpips_net="vgg", bf16="off",
                     own_steps=0, gt_target="noised", credit=0, clip=1e-4)
    assert {name: getattr(args, name) for name in published} == published and args.group == 4
    method = method_of("lrpo", given)
    assert type(method) is LRPO and not method.fidelity and method.settings.gt_last == 5
    args = settings.resolve("refl", {"recipe": "paper", "preset": "drawn64", "steps": 7})
    published = dict(steps=7, ddim_steps=50, refl_last=2, eta="random", lr=5e-5, lpips_net="vgg",
                     rewards="face=.005,lpips=.01", struct_weight=0.01, reg_weight=1e-4,
                     fidelity_weight=0.0, frm_update_every=10, frm_lr=2e-6)
    assert {name: getattr(args, name) for name in published} == published


@dataclass
class AscentSettings:
    """A method of ten lines: its settings."""
    steps: int = setting(3, None, "optimiser steps")
    batch_size: int = setting(4, None, "images in a step")
    lr: float = setting(1e-3, None, "learning rate")
    every: int = setting(3, None, "steps between measurements")
    rewards: str = setting("ssim=1", None, REWARDS_HELP)
    power: float = setting(1.0, None, "a flag of its own")


class Ascent:
    """Follows the gradient of the reward of the very first guess, from noise alone."""

    def __init__(self, net, diffusion, reward, generator, settings):
        self.net, self.diffusion, self.reward, self.generator = net, diffusion, reward, generator
        self.optimizer, self.power = torch.optim.SGD(net.parameters(), settings.lr), settings.power

    def step(self, batch):
        lq, gt = batch
        x, t = gaussian(gt, self.generator), self.diffusion.T - 1
        _, _, x0_hat = self.diffusion.ddim_step(self.net, x, lq, t, -1, eta=0)
        reward, _ = self.reward(x0_hat, gt)
        self.optimizer.zero_grad()
        (-self.power * reward.mean()).backward()
        self.optimizer.step()
        return to_floats({"reward": reward.mean().detach()})


def test_a_new_method_needs_its_class_its_settings_and_one_entry(runs, tmp_path, monkeypatch,
                                                                   capsys):
    monkeypatch.setitem(METHODS, "ascent", Method(Ascent, AscentSettings, ema=0.9, warmup=1))
    flags = ["--init", str(runs / "sft" / "last.pt"), "--power", "2"]
    whole = run("ascent", tmp_path / "whole", *flags, steps=6)
    run("ascent", tmp_path / "parts", *flags, steps=3)
    parts = run("ascent", tmp_path / "parts", *flags, "--resume", steps=6)
    assert whole["args"]["power"] == 2 and whole["args"]["rewards"] == "offline"    # the preset's
    same(*(state | {"args": None} for state in (whole, parts)))
    with open(tmp_path / "whole" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 and float(rows[-1]["heldout_r_ssim"])
    evaluate.compare(evaluate.parser().parse_args(
        ["--ckpt", flags[1], str(tmp_path / "whole" / "last.pt"), "--n", "4", "--device", "cpu",
         "--rewards", "ssim=1", "--out", str(tmp_path / "e")]))
    assert "| whole |" in capsys.readouterr().out
    with pytest.raises(UserError, match="--struct_weight: --mode ascent has no such flag"):
        settings.parse(["--mode", "ascent", "--struct_weight", "1"])
    assert settings.parse(["--mode", "demo", "--methods", "ascent"])["methods"] == ["ascent"]


# The arguments that an earlier program wrote in every mode, and no longer does in all of them.
OLD = dict(frm_weights=None, lpips_net="squeeze", lpips_weights=None, clip_weights=None, init=None,
           rewards="default", channels=8, mults="1,2", patch=2)
OLD_LRPO = dict(branch="on", recipe="steered", rewards="ssim=1")


def older(path, out, **args):
    """The checkpoint at `path` as that program wrote it."""
    state = torch.load(path, weights_only=True)
    state["args"] = {name: value for name, value in (state["args"] | OLD | args).items()
                     if name not in ("own_steps", "gt_target")}
    out.parent.mkdir(parents=True)
    torch.save(state | {"version": 2}, out)
    return str(out)


def test_checkpoints_of_an_older_program(runs, tmp_path, capsys):
    sft = older(runs / "sft" / "last.pt", tmp_path / "sft" / "last.pt")
    lrpo = older(runs / "lrpo" / "last.pt", tmp_path / "lrpo" / "last.pt", **OLD_LRPO)
    evaluate.compare(evaluate.parser().parse_args(
        ["--ckpt", sft, lrpo, str(runs / "lrpo" / "last.pt"), "--n", "4", "--device", "cpu",
         "--rewards", "ssim=1", "--out", str(tmp_path / "e")]))
    rows = json.loads((tmp_path / "e" / "metrics.json").read_text())["rows"]
    assert rows[lrpo] == rows[str(runs / "lrpo" / "last.pt")]
    Image.new("RGB", (20, 20)).save(tmp_path / "photo.png")
    sample.main(sample.parser().parse_args(["--ckpt", sft, "--input", str(tmp_path / "photo.png"),
                                            "--output", str(tmp_path / "restored")]))
    assert (tmp_path / "restored" / "photo.png").exists()
    run("refl", tmp_path / "refl", "--rewards", "ssim=1")       # starts from the old sft
    before = Path(lrpo).read_bytes()
    with pytest.raises(UserError, match="^--resume: .*--branch on") as raised:
        run("lrpo", tmp_path / "lrpo", "--resume", "--rewards", "ssim=1", steps=6)
    assert "\n" not in str(raised.value) and Path(lrpo).read_bytes() == before


def test_a_run_takes_nothing_but_its_own_files_away(tmp_path):
    for name in ("RN50.pt", "samples_of_mine.png"):
        (tmp_path / name).write_text("mine")
    run("sft", tmp_path, steps=1)
    run("sft", tmp_path, "--overwrite", steps=1)
    assert all((tmp_path / name).read_text() == "mine" for name in ("RN50.pt",
                                                                    "samples_of_mine.png"))
    (tmp_path / "metrics.csv").unlink()         # nor does a lost log stop a run
    run("sft", tmp_path, "--resume", steps=2)


def test_evaluate_and_sample(runs, tmp_path, capsys):
    ckpts = [str(runs / m / "last.pt") for m in ("sft", "lrpo")]
    evaluate.compare(evaluate.parser().parse_args(
        ["--ckpt", *ckpts, "--n", "6", "--out", str(tmp_path / "e"), "--device", "cpu",
         "--rewards", "ssim=.4,dwt=.3,face=.3", "--best_of", "2"]))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:5]] == ["LQ", "sft", "lrpo"]
    figures = json.loads((tmp_path / "e" / "metrics.json").read_text())
    row = figures["rows"]["lrpo"]
    want = sum(w * row[f"r_{name}"] for name, w in figures["rewards"].items())
    assert row["reward"] == pytest.approx(want, rel=1e-5) and figures["images"] == 6
    best = figures["rows"]["sft, best of 2"]
    assert best["reward"] > figures["rows"]["sft"]["reward"]    # of two, one is the row's own
    assert Image.open(tmp_path / "e" / "comparison.png").size == (5 * 260, 7 * 260 + 30)

    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a folder to write to"):
        evaluate.compare(evaluate.parser().parse_args(
            ["--ckpt", ckpts[0], "--device", "cpu", "--rewards", "ssim=1", "--out",
             str(tmp_path / "file")]))

    photos = tmp_path / "photos"
    (photos / "deep").mkdir(parents=True)
    Image.new("L", (40, 30), 90).save(photos / "grey.JPG")
    Image.new("RGBA", (20, 50), (9, 90, 200, 100)).save(photos / "deep" / "alpha.webp")
    (photos / "text.png").write_text("not a picture")
    command = ["--ckpt", ckpts[1], "--input", str(photos), "--output", str(tmp_path / "out"),
               "--sheet", str(tmp_path / "sheet.png"), "--device", "cpu"]
    sample.main(sample.parser().parse_args(command))
    assert "text.png" in capsys.readouterr().err
    made = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    assert made == {"deep/alpha.png", "grey.png"}
    assert Image.open(tmp_path / "out" / "grey.png").size == (16, 16)
    assert Image.open(tmp_path / "sheet.png").size == (2 * 128, 2 * 128)
    first = (tmp_path / "out" / "grey.png").read_bytes()
    command[3], command[5] = str(photos / "grey.JPG"), str(tmp_path / "alone")
    command += ["--overwrite"]
    sample.main(sample.parser().parse_args(command))
    assert (tmp_path / "alone" / "grey.png").read_bytes() == first      # alone or in a folder


def test_labels_of_an_svm_and_of_a_person(runs, tmp_path, capsys):
    """A person's round trip: pairs are written, labelled, and learnt from."""
    sft = str(runs / "sft" / "last.pt")
    write = ["--ckpt", sft, "--out", str(tmp_path / "pairs"), "--n", "12"]
    label_pairs.write_pairs(label_pairs.parser().parse_args(write))
    assert Image.open(tmp_path / "pairs" / "0003.png").size == (2 * 256, 256)
    path = tmp_path / "pairs" / "pairs.csv"
    path.write_text(path.read_text().replace("_b.png,,", "_b.png,a,"))
    with pytest.raises(UserError, match="may hold labels already"):
        label_pairs.write_pairs(label_pairs.parser().parse_args(write))
    for name, source in (("svm", "svm"), ("person", str(path))):
        run("frm", tmp_path / name, "--init", sft, "--labels", source)
        assert "an SVM trained on" in capsys.readouterr().out
        assert "accuracy_labelled" in (tmp_path / name / "metrics.csv").read_text()
    assert "accuracy_labelled" not in (runs / "frm" / "metrics.csv").read_text()


def no_network(*args, **kwargs):
    raise OSError("no network")


MISTAKES = {
    "LPIPS without backbone or network": (["--mode", "lrpo", "--init", "{sft}", "--rewards",
                                           "lpips=1"], "--lpips_weights"),
    "CLIP-IQA without weights": (["--mode", "lrpo", "--init", "{sft}", "--rewards", "clipiqa=1"],
                                 "--clip_weights FILE, or use --rewards offline"),
    "labels that are no file": (["--mode", "frm", "--init", "{sft}", "--labels", "yes"],
                                "--labels yes: known, svm, or"),
    "a restorer for a face reward model": (["--mode", "lrpo", "--init", "{sft}", "--frm_weights",
                                            "{sft}"], "not a checkpoint of --mode frm"),
    "a folder without photos": (["--mode", "sft", "--data", "{empty}"], "no photo in it"),
    "a missing folder": (["--mode", "sft", "--data", "{empty}/none"], "no such folder"),
    "only unreadable photos": (["--mode", "sft", "--data", "{text}"], "can be read"),
    "an unknown reward": (["--mode", "lrpo", "--init", "{sft}", "--rewards", "beauty=1"], "beauty"),
    "no sft run": (["--mode", "lrpo"], "run --mode sft first"),
    "nothing to resume": (["--mode", "sft", "--resume"], "--resume"),
    "another mode's run": (["--mode", "refl", "--resume", "--init", "{sft}", "--out",
                            "{runs}/lrpo"], "was run with --"),
    "a run that would replace what it starts from": (["--mode", "lrpo", "--out", "{runs}/sft",
                                                      "--overwrite"], "name another --out"),
    "step-wise rewards of one step": (["--mode", "darl", "--init", "{sft}", "--stepwise", "on"],
                                        "--own_steps 0"),
    "a late step beyond the first": (["--mode", "refl", "--init", "{sft}", "--refl_last", "4"],
                                     "at most --ddim_steps 3"),
    "difficulty by a missing LPIPS": (["--mode", "darl", "--init", "{sft}", "--rewards",
                                       "ssim=1,lpips=0", "--lpips_weights", "none.pth"],
                                      "none.pth: no such file"),
    "a folder for a checkpoint": (["--mode", "lrpo", "--init", "{runs}/sft"],
                                  "a folder; name the file in it"),
    "a negative reward": (["--mode", "lrpo", "--init", "{sft}", "--rewards", "ssim=-1"],
                          "weights of 0 or more"),
    "a reward named twice": (["--mode", "refl", "--init", "{sft}", "--rewards", "ssim=1,ssim=.5"],
                             "ssim is named twice"),
    "a run folder that is a file": (["--mode", "sft", "--out", "{runs}/sft/args.json"],
                                    "is a file"),
    "a run folder below a file": (["--mode", "sft", "--out", "{runs}/sft/args.json/x"],
                                  "is a file, or below one"),
    "no reward model to go on from": (["--mode", "frm", "--init", "{sft}", "--frm_weights",
                                       "none.pth"], "none.pth: no such file"),
    "a margin with a fixed weight": (["--mode", "lrpo", "--init", "{sft}", "--gt_weight", "1",
                                      "--fidelity_margin", ".1"],
                                     "a fixed --gt_weight is not steered"),
    "a weight without effect": (["--mode", "lrpo", "--init", "{sft}", "--noise_level_weights",
                                 "off"], "needs --own_steps 0"),
    "another network": (["--mode", "sft", "--resume", "--patch", "1", "--out", "{runs}/sft"],
                        "--patch 2, not 1"),
    "a face reward model for a restorer": (["--mode", "lrpo", "--init", "{runs}/frm/last.pt"],
                                           "not a restorer"),
    "a run in the way": (["--mode", "sft", "--out", "{runs}/sft"], "--overwrite"),
    "a size that no network fits": (["--mode", "sft", "--size", "30"], "multiple of"),
    "a flag of another method": (["--mode", "lrpo", "--init", "{sft}", "--struct_weight", "3"],
                                 "--struct_weight: --mode lrpo has no such flag"),
    "a network where another run's is used": (["--mode", "lrpo", "--init", "{sft}", "--channels",
                                               "8"], "--channels: --mode lrpo has no such flag"),
    "labels where no reward model is trained": (["--mode", "lrpo", "--init", "{sft}", "--rewards",
                                                 "ssim=1", "--labels", "svm"],
                                                "--labels: --mode lrpo has no such flag"),
    "another network than that of --init": (["--mode", "sft", "--init", "{sft}", "--channels", "8"],
                                            "--channels: --init has a network already"),
    "patches that do not fill the image": (["--mode", "lrpo", "--init", "{sft}", "--rewards",
                                            "ssim=1", "--credit", "3"], "--credit 3: must divide"),
    "drawn faces and photos": (["--mode", "sft", "--data", "{empty}", "--faces", "9"], "--faces"),
    "a missing face reward model, before any work": (["--mode", "demo", "--init", "{sft}",
                                                      "--frm_weights", "none"],
                                                     "none: no such file"),
    "an odd network": (["--mode", "sft", "--channels", "6"], "channels must be"),
    "a flag that the demo's methods do not read": (["--mode", "demo", "--init", "{sft}",
                                                    "--blend", "hard"],
                                                   "--blend: none of frm, refl, sft has such a"),
    "a demo's folder that holds a run": (["--mode", "demo", "--init", "{sft}", "--rewards",
                                          "ssim=1", "--out", "{runs}"], "holds a run already"),
    "no such device": (["--mode", "sft", "--device", "nonsense"], "--device"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_sentence_and_loses_nothing(name, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty, text = tmp_path / "empty", tmp_path / "text"
    empty.mkdir()
    text.mkdir()
    for i in range(3):
        (text / f"{i}.png").write_text("not a picture")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", no_network)
    before = (runs / "sft" / "last.pt").read_bytes()
    given, message = MISTAKES[name]
    sft = runs / "sft" / "last.pt"
    given = [g.format(empty=empty, text=text, runs=runs, sft=sft) for g in given]
    out = [] if "--out" in given else ["--out", str(tmp_path / "new" / "run")]
    with pytest.raises(UserError, match=message) as raised:
        train.main([*SMALL, *out, *given])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "new").exists() and (runs / "sft" / "last.pt").read_bytes() == before


@pytest.mark.parametrize("flag", [["--gt_weight", "-1"], ["--eta", "5"], ["--tflop", "nan"],
                                  ["--blend", "often"], ["--blend", "1.5"], ["--seed", "-1"],
                                  ["--eta", "0"], ["--group", "1"], ["--ddim_steps", "1"],
                                  ["--seed", "4294967295"]])
def test_a_number_out_of_range_is_refused(flag, capsys):
    with pytest.raises(SystemExit):
        settings.parse(["--mode", "darl" if flag[0] != "--gt_weight" else "lrpo", *flag])
    assert f"{flag[0]}: '{flag[1]}' is not a" in capsys.readouterr().err


def test_a_flag_that_takes_a_word_or_a_number_names_both(capsys):
    with pytest.raises(SystemExit):
        settings.parse(["--mode", "sft", "--workers", "some"])
    assert "'some' is not a whole number of at least 0, nor auto" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train.py", "--mode", "sft", "--data", "none"],
                                     ["sample.py", "--ckpt", "none", "--input", "x",
                                      "--output", "y"],
                                     ["evaluate.py", "--ckpt", "none"],
                                     ["tools/label_pairs.py", "--ckpt", "none"],
                                     ["tools/reward_report.py", "--frm_weights", "none"]])
def test_a_mistake_ends_the_program_without_a_trace(command, tmp_path):
    done = subprocess.run([sys.executable, ROOT / command[0], *command[1:]], capture_output=True,
                          text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode != 0 and done.stderr.startswith("error: ") and "none" in done.stderr
    assert done.stderr.count("\n") == 1
