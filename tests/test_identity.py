"""Identity: distances measured on real faces, and one sentence where it cannot be had."""
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

import evaluate
from support import identity
from support.cli import UserError
from support.data import to_float
from support.identity import CHIP, Identity
from support.photos import read_photo

FACES = Path(__file__).parents[2] / "shared" / "faces" / "celeba"
PACKAGES = [importlib.util.find_spec(name) for name in ("dlib", "face_recognition_models")]


@pytest.mark.skipif(not FACES.is_dir(), reason=f"no real faces in {FACES}")
@pytest.mark.skipif(None in PACKAGES, reason="pip install dlib-bin face-recognition-models")
def test_distances_of_forty_blurred_faces():
    gt = to_float(torch.stack([read_photo(path, 64) for path in sorted(FACES.glob("*"))[:40]]))
    judge = Identity(gt)
    blurred = torch.from_numpy(gaussian_filter(gt.numpy(), (0, 0, 1.5, 1.5)))
    found = judge(blurred)
    assert found["identity"].mean().item() == pytest.approx(.525, abs=.03)
    others = torch.cdist(judge.numbers(blurred), judge.gt)[~torch.eye(40, dtype=torch.bool)]
    assert others.mean().item() == pytest.approx(.712, abs=.03)
    assert found["rank1"].mean().item() == pytest.approx(.8, abs=.03)


def find(monkeypatch, spec):
    """Let this be what Python knows of the package of the weights."""
    monkeypatch.setattr(identity, "importlib", SimpleNamespace(util=SimpleNamespace(
        find_spec={"face_recognition_models": spec}.get)))


@pytest.fixture
def eyes(monkeypatch):
    """A dlib whose 128 numbers are the brightness of the central pixel."""
    class Net:
        def __init__(self, path):
            assert path.endswith("dlib_face_recognition_resnet_model_v1.dat")

        def compute_face_descriptor(self, chip):
            assert chip.shape == (CHIP, CHIP, 3) and chip.dtype == np.uint8
            return [chip[CHIP // 2, CHIP // 2, 0] / 255] * 128
    monkeypatch.setitem(sys.modules, "dlib", SimpleNamespace(face_recognition_model_v1=Net))
    find(monkeypatch, SimpleNamespace(submodule_search_locations=["weights"]))


def test_distance_and_rank_by_hand(eyes):
    """The centre of the face lies at (.5, .6): here five pixels around column 10 and row 12."""
    gt = torch.full((3, 3, 20, 20), -1.0)
    gt[:, :, 10:15, 8:13] = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1)
    x = gt.clone()
    x[2, :, 10:15, 8:13] = 0.0          # now it looks like the second
    found = Identity(gt)(x)
    assert found["rank1"].tolist() == [1, 1, 0]
    torch.testing.assert_close(found["identity"], torch.tensor([0, 0, 127 / 255 * 128 ** .5]).to(
        found["identity"].dtype), rtol=1e-6, atol=1e-6)


def test_evaluate_shows_it_with_the_flag_alone(runs, tmp_path, eyes, capsys):
    for i in range(12):
        (tmp_path / "photos").mkdir(exist_ok=True)
        face = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(face).save(tmp_path / "photos" / f"{i:02}.png")
    flags = ["--ckpt", str(runs / "sft" / "last.pt"), "--device", "cpu", "--rewards", "ssim=1",
             "--out", str(tmp_path / "e")]
    photos = ["--data", str(tmp_path / "photos")]
    evaluate.compare(evaluate.parser().parse_args([*flags, *photos, "--identity"]))
    assert "| identity | rank1 |" in capsys.readouterr().out
    evaluate.compare(evaluate.parser().parse_args([*flags, *photos]))
    assert "identity" not in capsys.readouterr().out
    for more in ([], ["--lq", photos[1], "--rewards", "face=1", "--frm_weights",
                      str(runs / "frm" / "last.pt")]):
        with pytest.raises(UserError, match="^--identity: needs real faces as ground truth"):
            evaluate.compare(evaluate.parser().parse_args([*flags, "--identity", *more]))


@pytest.mark.parametrize("missing", ["dlib", "face_recognition_models"])
def test_what_is_missing_is_one_sentence(eyes, monkeypatch, missing):
    if missing == "dlib":
        monkeypatch.setitem(sys.modules, "dlib", None)
    else:
        find(monkeypatch, None)
    with pytest.raises(UserError, match="^--identity: .*pip install dlib-bin face-recognition-mod"):
        Identity(torch.zeros(1, 3, 16, 16))
