"""Nothing lost, nothing let in: signals, full disks, NaN, two runs in one folder, foreign files."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
import train
from common import SMALL, run, same
from support import checkpoint
from support.cli import UserError
from support.photos import read_photo
from support.labels import read_labels

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("little_work")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, number):
    command = [sys.executable, ROOT / "train.py", "--mode", "sft", "--out", tmp_path / "sft",
               "--faces", "24", *SMALL, "--every", "100000", "--steps", "100000"]
    child = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=ROOT,
                             stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert "from step 0 to" in child.stdout.readline()
    time.sleep(0.5)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 128 + number and "--resume" in out and "Traceback" not in err
    state = checkpoint.load_run(tmp_path / "sft" / "last.pt", "")
    assert state["step"] >= 1 and not state["finished"]
    rows = (tmp_path / "sft" / "metrics.csv").read_text().splitlines()
    assert len(rows) == state["step"] + 2           # the head, step 0, every step
    with pytest.raises(UserError, match="stopped at step"):     # nobody starts from half a model
        train.main(["--mode", "frm", "--out", str(tmp_path / "frm"), *SMALL])


def test_a_finished_run_is_resumed_without_an_error(runs, capsys):
    before = (runs / "sft" / "last.pt").read_bytes()
    run("sft", runs / "sft", "--resume")
    assert "is finished" in capsys.readouterr().out
    assert (runs / "sft" / "last.pt").read_bytes() == before


def test_a_killed_run_goes_on_wherever_it_was_killed(tmp_path, monkeypatch):
    """After each write of a run in turn: the end is that of a run that nobody stopped."""
    whole = run("sft", tmp_path / "whole", "--every", "1")
    replace, writes = os.replace, []

    def killed(part, path):
        replace(part, path)
        writes.append(path)
        if len(writes) == stop:
            raise KeyboardInterrupt             # as SIGKILL: nothing is written after it
    monkeypatch.setattr(checkpoint.os, "replace", killed)
    for stop in range(2, 9):                    # the trial is the first write
        writes.clear()
        out = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            run("sft", out, "--every", "1")
        stop = 0
        if (out / "last.pt").exists():
            state = run("sft", out, "--every", "1", "--resume")
            for s in (state, whole):
                s["args"] = None
            same(state, whole)
            assert (out / "metrics.csv").read_text().count("\n") == 5
        assert not list(out.glob("*.part"))


def test_a_full_disk_is_one_sentence_and_the_old_checkpoint_stays(tmp_path, monkeypatch):
    run("sft", tmp_path / "sft")
    before = (tmp_path / "sft" / "last.pt").read_bytes()

    def full(state, part):
        Path(part).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos")
    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(UserError, match="cannot be written .the disk is full"):
        run("sft", tmp_path / "sft", "--resume", steps=6)
    assert (tmp_path / "sft" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "sft").glob("*.part"))


def test_two_runs_in_one_folder_are_noticed(tmp_path):
    with checkpoint.locked(tmp_path):
        with pytest.raises(UserError, match="another run is writing"):
            with checkpoint.locked(tmp_path):
                pass
    with checkpoint.locked(tmp_path):           # free again
        pass


def poison(tensor):
    return torch.full_like(tensor, float("nan"))


@pytest.mark.parametrize("mode, where, named", [
    ("sft", "batch", "loss"), ("sft", "gradient", "the gradient"), ("frm", "batch", "loss"),
    ("lrpo", "reward", "ssim"), ("lrpo", "batch", "ssim"), ("lrpo", "gradient", "the gradient"),
    ("refl", "reward", "ssim"), ("refl", "gradient", "the gradient"), ("darl", "reward", "ssim"),
    ("darl", "gradient", "the gradient")])
def test_what_is_not_finite_is_named_and_never_applied(runs, tmp_path, monkeypatch, mode, where,
                                                       named):
    flags = ["--every", "1"]
    if mode != "sft":
        flags += ["--init", str(runs / "sft" / "last.pt")]
    if mode in ("lrpo", "refl", "darl"):
        flags += ["--frm_weights", str(runs / "frm" / "last.pt"), "--rewards", "ssim=.5,face=.5"]
    step, calls = train.loop, []

    def spoiled(run_, method, *rest):
        original = method.step

        def second_is_bad(batch):
            calls.append(1)
            if len(calls) == 2:
                if where == "batch":
                    batch = [poison(u) for u in batch]
                elif where == "gradient":
                    next(iter(method.net.parameters())).register_hook(poison)
                else:
                    method.reward.terms["ssim"] = lambda x, gt: x.mean((1, 2, 3)) * float("nan")
            return original(batch)
        method.step = second_is_bad
        return step(run_, method, *rest)
    monkeypatch.setattr(train, "loop", spoiled)
    with pytest.raises(UserError, match=f"step 2: .*{named}.* not finite") as raised:
        run(mode, tmp_path / mode, *flags)
    assert "\n" not in str(raised.value)
    state = torch.load(tmp_path / mode / "last.pt", weights_only=True)
    assert state["step"] == 1
    assert all(v.isfinite().all() for v in state["model"].values())
    assert (tmp_path / mode / "metrics.csv").read_text().count("\n") == 3      # head, 0, 1


@pytest.mark.parametrize("sign, what", [(1, "--lr is too high"), (-1, "reward is being hacked")])
def test_a_collapse_is_announced_once(tmp_path, capsys, sign, what):
    log = train.Log(tmp_path / "metrics.csv", 0)
    for psnr in (24.0, 22.5, 22.0, 21.0, 20.0):
        log.rows.append({"step": len(log.rows), "seconds": 0, "heldout_psnr": psnr,
                         "heldout_reward": psnr * sign})
        train.warn_of_collapse(log, tmp_path)
    said = capsys.readouterr().out
    assert said.count("held-out PSNR") == 1 and what in said


def test_another_reward_model_is_noticed_on_resume(runs, tmp_path):
    frm = tmp_path / "frm"
    run("frm", frm, "--init", str(runs / "sft" / "last.pt"))
    flags = ["--init", str(runs / "sft" / "last.pt"), "--frm_weights", str(frm / "last.pt")]
    run("lrpo", tmp_path / "lrpo", *flags, steps=2)
    run("frm", frm, "--init", str(runs / "sft" / "last.pt"), "--overwrite", "--seed", "5")
    with pytest.raises(UserError, match="not the one that"):
        run("lrpo", tmp_path / "lrpo", *flags, "--resume")


def test_a_path_is_compared_as_a_place(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(runs)
    run("refl", tmp_path / "refl", "--init", str(runs / "sft" / "last.pt"), "--rewards", "ssim=1",
        steps=2)
    run("refl", tmp_path / "refl", "--init", "sft/last.pt", "--rewards", "ssim=1", "--resume")


def test_evaluate_leaves_face_out_where_there_is_no_reward_model(tmp_path, capsys):
    run("sft", tmp_path / "sft")
    evaluate.compare(evaluate.parser().parse_args(
        ["--ckpt", str(tmp_path / "sft" / "last.pt"), "--n", "4", "--out", str(tmp_path / "e")]))
    assert "face is left out" in capsys.readouterr().out


def test_a_huge_picture_is_refused_and_a_huge_jpeg_read_small(tmp_path):
    huge = Image.new("L", (9000, 9000))
    huge.save(tmp_path / "a.png")
    huge.save(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="64,000,000 pixels"):
        read_photo(tmp_path / "a.png", 16)
    assert read_photo(tmp_path / "a.jpg", 16).shape == (3, 16, 16)


def test_labels_of_a_spreadsheet(tmp_path):
    rows = ["path_a;path_b;preferred"] + [f"{i}.png;{i}.png;{p}" for i, p in
                                          enumerate(["A", "b ", " a"] * 4)]
    for i in range(12):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    assert read_labels(tmp_path / "pairs.csv", 16)[3].tolist() == [1, -1, 1] * 4
