"""Restoring photos: each to a file of its own, none lost, none twice, whatever its name."""
import os
import weakref

import numpy as np
import pytest
from PIL import Image

import evaluate
import sample
from support import checkpoint
from support.cli import UserError

pytestmark = pytest.mark.usefixtures("little_work")


def photos(folder, *names):
    """Photos of these names, each of one grey."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (30 * i,) * 3).save(folder / name)
    return folder


@pytest.fixture
def call(runs, tmp_path):
    """Calls sample.py on tmp_path/photos, to tmp_path/out."""
    def call(*more, into=tmp_path / "out"):
        sample.main(sample.parser().parse_args(
            ["--ckpt", str(runs / "sft" / "last.pt"), "--input", str(tmp_path / "photos"),
             "--output", str(into), "--device", "cpu", *map(str, more)]))
    return call


def made(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_nothing_is_lost_and_a_stopped_call_goes_on(tmp_path, call, capsys):
    folder, out = photos(tmp_path / "photos", "a.jpg", "a.tif", "b.gif"), tmp_path / "out"
    (folder / "c.heic").write_text("not read")
    out.mkdir()
    (out / "b.png").write_text("kept")
    call()
    captured = capsys.readouterr()
    assert made(out) == ["a.jpg.png", "a.tif.png", "b.png"] and "kept 1" in captured.out
    assert (out / "b.png").read_text() == "kept" and ".heic" in captured.err
    call()                                      # nothing left to do
    call("--overwrite")
    assert Image.open(out / "b.png").size == (16, 16)


def test_one_photo_by_any_name(tmp_path, call):
    folder, out = photos(tmp_path / "photos", "a.jpg"), tmp_path / "out"
    (folder / "link.jpg").symlink_to(folder / "a.jpg")
    (folder / "a.jpg").with_suffix("").write_bytes((folder / "a.jpg").read_bytes())
    odd = os.fsdecode(b"\xff\n.jpg")
    (folder / odd).write_bytes((folder / "a.jpg").read_bytes())
    for name in ("link.jpg", "a", odd):
        call("--input", folder / name)
    assert made(out) == sorted(["link.png", "a.png", odd[:-4] + ".png"])
    os.mkfifo(folder / "pipe.jpg")
    for name in ("b.jpg", "pipe.jpg"):
        with pytest.raises(UserError, match=f"--input .*{name}: no such photo or folder"):
            call("--input", folder / name)
    (tmp_path / "new" / "a.png").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be written .Is a directory"):
        call("--input", folder / "a.jpg", into=tmp_path / "new")


# ---- no restoration becomes an input, or replaces one ----

@pytest.mark.parametrize("where", ["photos", "photos/../photos", "photos/out", "photos/deep/out",
                                   "link"])
def test_no_output_in_the_input(tmp_path, call, where):
    photos(tmp_path / "photos", "a.jpg", "deep/b.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    with pytest.raises(UserError, match="lies in --input"):
        call(into=tmp_path / where)
    assert made(tmp_path / "photos") == ["a.jpg", "deep/b.jpg"]


def test_an_output_that_the_input_links_to_is_not_restored_again(tmp_path, call, capsys):
    folder, out = photos(tmp_path / "photos", "a.jpg"), tmp_path / "out"
    (folder / "earlier").symlink_to(out)
    for _ in range(3):
        call()
        assert made(out) == ["a.png"]


def test_no_photo_is_replaced(tmp_path, call):
    folder = photos(tmp_path / "photos", "a.png", "c.PNG", "d.jpg")
    before = {name: (folder / name).read_bytes() for name in made(folder)}
    for name in ("a.png", "c.PNG"):
        with pytest.raises(UserError, match="that of a photo"):
            call("--input", folder / name, "--overwrite", into=folder)
    (folder / "a.png").rename(tmp_path / "a.png")
    (folder / "a.png").symlink_to(tmp_path / "a.png")       # the photo lies where the output goes
    with pytest.raises(UserError, match="that of a photo"):
        call("--overwrite", into=tmp_path)
    with pytest.raises(UserError, match="is a file"):
        call(into=folder / "d.jpg" / "out")
    assert {name: (folder / name).read_bytes() for name in made(folder)} == before


# ---- two photos, two files ----

@pytest.mark.parametrize("names", [["a.jpg", "a.tif", "a.jpg.png"], ["a.jpg", "a.png/b.jpg"]])
def test_photos_that_would_share_an_output_are_named_before_any_work(tmp_path, call, names):
    photos(tmp_path / "photos", *names)
    with pytest.raises(UserError, match="needs .*png, which is that of .*jpg"):
        call()
    assert not (tmp_path / "out").exists()


def test_outputs_differ_on_a_disk_that_knows_no_upper_case(tmp_path, call):
    photos(tmp_path / "photos", "a.jpg", "A.tif")
    call()
    assert made(tmp_path / "out") == ["A.tif.png", "a.jpg.png"]


@pytest.mark.parametrize("stem", ["a" * 251, "脸" * 83 + "ab"])
def test_names_as_long_as_the_disk_allows(tmp_path, call, stem):
    photos(tmp_path / "photos", f"{stem}.jpg", "b.jpg")
    call()
    assert made(tmp_path / "out") == sorted([f"{stem}.png", "b.png"])


def test_a_name_too_long_for_its_output_is_one_sentence(tmp_path, call):
    photos(tmp_path / "photos", f"{'a' * 252}.bw")          # .png is longer than .bw
    with pytest.raises(UserError, match="cannot be written .File name too long") as raised:
        call()
    assert "\n" not in str(raised.value) and not made(tmp_path / "out")


# ---- memory, and other processes ----

def test_no_picture_is_kept(tmp_path, call, monkeypatch):
    photos(tmp_path / "photos", *(f"{i}.png" for i in range(6)))
    restore, alive = sample.restore, []

    def watched(net, lq, *rest):
        assert not [ref for ref in alive[:-2] if ref() is not None]
        x = restore(net, lq, *rest)
        alive.extend([weakref.ref(lq), weakref.ref(x)])
        return x
    monkeypatch.setattr(sample, "restore", watched)
    call()
    assert len(alive) == 12


def test_two_processes_never_write_to_one_file(tmp_path):
    path = tmp_path / "a.png"
    with checkpoint.replacing(path) as one, checkpoint.replacing(path) as two:
        assert one != two and one.parent == two.parent == tmp_path
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one" and made(tmp_path) == ["a.png"]    # whole, and nothing else


# ---- the sheet ----

def test_the_sheet_has_every_photo_after_a_stopped_call(tmp_path, call, monkeypatch):
    photos(tmp_path / "photos", *(f"{i}.png" for i in range(4)))
    call("--sheet", tmp_path / "new" / "whole.png", into=tmp_path / "whole")
    restore, calls = sample.restore, []

    def stopped(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return restore(*given)
    monkeypatch.setattr(sample, "restore", stopped)
    for _ in range(2):
        try:
            call("--sheet", tmp_path / "s.png")
        except KeyboardInterrupt:
            assert len(made(tmp_path / "out")) == 2 and not (tmp_path / "s.png").exists()
    whole, after = (np.asarray(Image.open(tmp_path / name)) for name in ("new/whole.png", "s.png"))
    assert len(calls) == 5 and whole.shape == (4 * 128, 2 * 128, 3) and (whole == after).all()


def test_a_sheet_is_no_photo_and_no_restoration(tmp_path, call):
    folder = photos(tmp_path / "photos", "a.jpg")
    (tmp_path / "there.png").write_text("mine")
    for sheet in (folder / "s.png", folder / "new" / "s.png", tmp_path / "out" / "a.png",
                  tmp_path / "s.txt", folder / "a.jpg" / "s.png", tmp_path / "there.png"):
        with pytest.raises(UserError, match="--sheet .*(name a .png|is there already)"):
            call("--sheet", sheet)
    assert not (tmp_path / "out").exists()
    call("--sheet", tmp_path / "out" / "s.png")             # a natural place
    call("--sheet", tmp_path / "out" / "s.png", "--overwrite")
    assert made(tmp_path / "out") == ["a.png", "s.png"]


@pytest.mark.parametrize("program, flag", [
    *((sample, flag) for flag in ("--ckpt", "--input", "--output", "--sheet")),
    *((evaluate, flag) for flag in ("--ckpt", "--data", "--out", "--rewards"))])
def test_an_empty_argument_is_refused(program, flag, capsys):
    with pytest.raises(SystemExit):
        program.parser().parse_args([flag, ""])
    assert f"argument {flag}: is empty" in capsys.readouterr().err
