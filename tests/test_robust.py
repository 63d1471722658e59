"""Nothing lost, nothing let in: signals, full disks, NaN, two runs in one folder, foreign files."""
import argparse
import fcntl
import io
import json
import os
import shutil
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
from support.cli import UserError, run_main
from support.data import Photos
from support.labels import read_labels

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("little_work")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, number):
    command = [sys.executable, ROOT / "train.py", "--mode", "sft", "--out", tmp_path / "sft",
               "--faces", "24", *SMALL, "--every", "100000", "--steps", "100000"]
    child = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True,
                             cwd=tmp_path, stderr=subprocess.PIPE,
                             env=os.environ | {"PYTHONUNBUFFERED": "1"})
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

    def full(state, file):
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos")
    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(UserError, match="cannot be written .the disk is full"):
        run("sft", tmp_path / "sft", "--resume", steps=6)
    assert (tmp_path / "sft" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "sft").glob("*.part"))


class Windows:
    """What Python has there instead of fcntl: a lock on a byte of a file."""
    LK_NBLCK = 2

    @staticmethod
    def locking(file, mode, size):
        assert mode == Windows.LK_NBLCK and size == 1
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(13, "Permission denied") from None


@pytest.mark.parametrize("windows", [False, True])
def test_two_runs_in_one_folder_are_noticed(tmp_path, monkeypatch, windows):
    if windows:
        system_open = os.open

        def no_folders(path, *given, **more):
            if Path(path).is_dir():
                raise PermissionError(13, "Permission denied", str(path))
            return system_open(path, *given, **more)
        monkeypatch.setattr(os, "open", no_folders)
        monkeypatch.setattr(checkpoint, "fcntl", None)
        monkeypatch.setattr(checkpoint, "msvcrt", Windows, raising=False)
    with checkpoint.locked(tmp_path):
        with pytest.raises(UserError, match="another run is writing"):
            with checkpoint.locked(tmp_path):
                pass
    with checkpoint.locked(tmp_path):           # free again
        pass
    run("sft", tmp_path / "sft", steps=1)


def test_a_disk_without_locks_is_one_sentence(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(checkpoint.fcntl, "flock", none)
    with pytest.raises(UserError, match="no locks .Function not implemented"):
        with checkpoint.locked(tmp_path):
            pass


def test_half_a_file_of_a_killed_run_is_removed_and_no_other(tmp_path):
    for name in (".0123abcd.part", "film.part", "last.pt"):
        (tmp_path / name).write_text("half")
    with checkpoint.locked(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "film.part", "last.pt"}


def poison(tensor):
    return torch.full_like(tensor, float("nan"))


@pytest.mark.parametrize("mode, where, named", [
    ("sft", "batch", "loss"), ("sft", "gradient", "grad_norm"), ("frm", "batch", "loss"),
    ("lrpo", "reward", "ssim"), ("lrpo", "batch", "ssim"), ("lrpo", "gradient", "grad_norm"),
    ("refl", "reward", "ssim"), ("refl", "gradient", "grad_norm"), ("darl", "reward", "ssim"),
    ("darl", "gradient", "grad_norm")])
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
                    reward = getattr(method, "lrpo", method).reward     # darl has it there
                    reward.maps["ssim"] = lambda x, gt: [x.mean(dim=1) * float("nan")]
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
        ["--ckpt", str(tmp_path / "sft" / "last.pt"), "--n", "4", "--out", str(tmp_path / "e"),
         "--rewards", "ssim=.5,face=.5"]))
    assert "face is left out" in capsys.readouterr().out


def test_labels_of_a_spreadsheet(tmp_path):
    rows = ["path_a;path_b;preferred"] + [f"{i}.png;{i}.png;{p}" for i, p in
                                          enumerate(["A", "b ", " a"] * 4)]
    for i in range(12):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    assert read_labels(tmp_path / "pairs.csv", 16)[3].tolist() == [1, -1, 1] * 4


# ---- what a user changes between two calls ----

def test_other_photos_are_noticed_on_resume(tmp_path, monkeypatch):
    def digest():
        return Photos.from_folder("photos", 16, "train").digest()
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        Path("photos").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (i, 0, 0)).save(f"photos/{i:02}.png")
    out = argparse.Namespace(data="photos", out="run")
    saved = {"photos": digest()}
    checkpoint.check_photos(saved, out, digest())
    for begins in ({}, None):               # a run from before photos were kept, and a new one
        checkpoint.check_photos(begins, out, digest())
    checkpoint.check_photos({"photos": None}, out, None)        # drawn faces
    Path("photos").rename("moved")
    shutil.copytree("moved", "photos")                          # copies are the same photos
    checkpoint.check_photos(saved, out, digest())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")                   # "photos" is another folder now
    shutil.copytree(tmp_path / "photos", "photos")
    for change, message in (
            (lambda: Image.new("RGB", (16, 16)).save("photos/01.png"), "other pixels"),
            (lambda: Path("photos/01.png").rename("photos/01b.png"), "other names"),
            (lambda: Path("photos/01b.png").unlink(), "11 photos then, 10 now")):
        change()
        with pytest.raises(UserError, match=f"elsewhere/photos does not hold .*{message}"):
            checkpoint.check_photos(saved, out, digest())


def spreadsheet(text, kind):
    """metrics.csv as a spreadsheet saves it, in bytes."""
    rows = [line.split(",") for line in text.splitlines()]
    if kind == "quotes":
        rows = [[f'"{cell}"' for cell in row] for row in rows]
    mark, between, end = {"semicolons": ("\ufeff", ";", "\r\n"), "old Mac": ("", ",", "\r"),
                          "quotes": ("\ufeff", ",", "\n")}[kind]
    return (mark + "".join(between.join(row) + end for row in rows)).encode()


@pytest.mark.parametrize("kind", ["semicolons", "old Mac", "quotes"])
def test_a_log_that_a_spreadsheet_saved_goes_on(tmp_path, kind):
    run("sft", tmp_path, "--every", "1", steps=2)
    log = tmp_path / "metrics.csv"
    before = log.read_text()
    log.write_bytes(spreadsheet(before, kind))
    run("sft", tmp_path, "--every", "1", "--resume", steps=3)
    assert log.read_text().splitlines()[:4] == before.splitlines()[:4]
    assert len(log.read_text().splitlines()) == 5


@pytest.mark.parametrize("change", [
    lambda text: text.replace(",", "\t").encode(), lambda text: text.encode("utf-16"),
    lambda text: text.replace(".", ",").replace(",", ";", 2).encode(), lambda text: b"\0\xff",
    lambda text: text.replace("\n1,", "\n1.5,").encode(), lambda text: (text + "2,a\n").encode()])
def test_a_log_that_is_none_is_one_sentence(tmp_path, change):
    run("sft", tmp_path, "--every", "1", steps=1)
    log, before = tmp_path / "metrics.csv", (tmp_path / "last.pt").read_bytes()
    log.write_bytes(change(log.read_text()))
    with pytest.raises(UserError, match="metrics.csv: not as the run wrote it .*delete it"):
        run("sft", tmp_path, "--resume", steps=2)
    assert (tmp_path / "last.pt").read_bytes() == before
    log.unlink()
    run("sft", tmp_path, "--resume", steps=2)           # the remedy works


# ---- devices, terminals, one image ----

@pytest.mark.parametrize("name", ["cuda:99", "meta", "mps:3", "cuda:x", "hpu", "nonsense", "cpu:x"])
def test_a_device_that_is_not_there_is_one_sentence(name):
    with pytest.raises(UserError, match=f"--device {name}: no such device here"):
        checkpoint.pick_device(name)


@pytest.mark.parametrize("said", ["CUDA error: out of memory\nCUDA kernel errors might be",
                                  "CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0"])
def test_a_full_device_is_no_missing_one(monkeypatch, capsys, said):
    def full(*_, **__):
        raise RuntimeError(said)
    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(UserError, match="--device cpu: its memory is full .*out of memory"):
        checkpoint.pick_device("cpu")
    wanted = r" \(2.00 MiB more was wanted\)" if "allocate" in said else ""
    with pytest.raises(SystemExit, match=f"error: the memory is too small{wanted}; try --bf16 on"):
        run_main(full)


def test_a_terminal_without_the_sign_shows_another(monkeypatch):
    for encoding, want in (("ascii", "1 ?2"), ("cp1252", "1 ±2"), ("utf-8", "1 ±2")):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stdout)
        run_main(lambda: print("1 ±2", end="", flush=True))
        assert stdout.buffer.getvalue().decode(encoding) == want
    monkeypatch.setattr(sys, "stdout", io.StringIO())       # as a notebook's, without an encoding
    run_main(lambda: print("1 ±2"))


def test_a_single_image_has_no_error(runs, tmp_path, capsys):
    evaluate.compare(evaluate.parser().parse_args(
        ["--ckpt", *(str(runs / mode / "last.pt") for mode in ("sft", "lrpo")), "--n", "1",
         "--frontier", "--rewards", "ssim=1", "--device", "cpu", "--out", str(tmp_path)]))
    assert "nan" not in capsys.readouterr().out

    def wrong(name):
        raise ValueError(f"{name} is no JSON")
    json.loads((tmp_path / "metrics.json").read_text(), parse_constant=wrong)
