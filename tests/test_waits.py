"""How often a step of each method would wait for a GPU."""
import collections
import traceback

import pytest
import torch

import train
from common import run

pytestmark = pytest.mark.usefixtures("little_work")
MODES = {"sft": [], "frm": [], "lrpo": ["--rewards", "ssim=1"], "darl": ["--rewards", "ssim=1"],
         "refl": ["--rewards", "face=.5,ssim=.5", "--frm_update_every", "3"]}


def counted(monkeypatch, seen):
    """Counts every call that reads a tensor, but not masks and copies. Not counted: inside torch,
    reading what the CPU's generator has just drawn, and the bytes of a JPEG."""
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        def read(self, *given, name=name, original=getattr(torch.Tensor, name)):
            caller = traceback.extract_stack(limit=2)[0]
            if not any(word in caller.line + caller.filename
                       for word in ("generator=", "Image.fromarray", "site-packages")):
                seen[f"{name} in {caller.name}"] += 1
            return original(self, *given)
        monkeypatch.setattr(torch.Tensor, name, read)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_waits_at_most_three_times(runs, tmp_path, monkeypatch, mode):
    start = [] if mode == "sft" else ["--init", str(runs / "sft" / "last.pt")]
    start += ["--frm_weights", str(runs / "frm" / "last.pt")] if mode == "refl" else []
    steps, loop = [], train.loop

    def watched(run_, method, *rest):
        def step(batch, original=method.step):
            with pytest.MonkeyPatch.context() as patch:
                steps.append(collections.Counter())
                counted(patch, steps[-1])
                return original(batch)
        method.step = step
        return loop(run_, method, *rest)
    monkeypatch.setattr(train, "loop", watched)
    run(mode, tmp_path / mode, *start, *MODES[mode])
    assert len(steps) == 3
    for seen in steps:
        assert 1 <= seen.total() <= 3, seen     # at least the one in to_floats
