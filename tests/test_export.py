"""tools/export.py: a file of half the precision and none of what only --resume needs."""
import sys

import pytest
import torch

from common import run
from model import load_restorer
from tools import export

pytestmark = pytest.mark.usefixtures("little_work")


def test_the_exported_restorer_is_the_average_of_the_run_to_half_precision(runs, tmp_path,
                                                                           monkeypatch):
    source, out = runs / "sft" / "last.pt", tmp_path / "faces.pt"
    monkeypatch.setattr(sys, "argv", ["export", str(source), str(out)])
    export.main()
    run_ = torch.load(source, weights_only=True)
    net, state = load_restorer(out)
    for name, v in net.state_dict().items():
        assert v.dtype == torch.float32
        error = (v - run_["ema"][name]).abs()       # a half has 11 bits, the last is rounded
        assert (error <= 2 ** -11 * run_["ema"][name].abs() + 2 ** -25).all(), name
    assert any(not torch.equal(v, run_["model"][name]) for name, v in net.state_dict().items())
    assert {name: state[name] for name in ("step", "config", "tflop")} == {
        name: run_[name] for name in ("step", "config", "tflop")}
    assert state["args"]["seed"] == 0 and not {"out", "device", "resume"} & state["args"].keys()
    size = sum(v.numel() for v in net.state_dict().values())
    assert out.stat().st_size < 2 * size + 60_000 < source.stat().st_size / 2
    assert run("refl", tmp_path / "refl", "--init", str(out), "--rewards", "ssim=1", steps=1)
