"""Two processes, as torchrun starts them, train what one process trains."""
import os
import socket
from unittest.mock import patch

import pytest
import torch

import sft
import train
from common import SMALL, log_of, run, small_presets
from support import distributed
from support.cli import UserError

METHODS = {"sft": [], "clipped": [], "frm": [], "lrpo": [],
           "plain": ["--recipe", "paper", "--minibatch", "0", "--group", "2", "--rewards", "ssim=1",
                     "--lr", "1e-3"],
           "refl": ["--rewards", "face=.5,ssim=.5", "--frm_update_every", "2"], "darl": []}


def every_mode(out, one, steps):
    """Each mode from the models of the single process."""
    for name, flags in METHODS.items():
        mode = {"plain": "lrpo", "clipped": "sft"}.get(name, name)
        if mode != "sft":
            flags = [*flags, "--init", str(one / "sft" / "last.pt")]
        if name in ("lrpo", "refl", "darl"):
            flags = [*flags, "--frm_weights", str(one / "frm" / "last.pt")]
        flags = flags if not (out / name).exists() else [*flags, "--resume"]
        with patch.object(sft, "MAX_GRAD_NORM", .01 if name == "clipped" else 1.0):
            run(mode, out / name, *flags, steps=steps)


def rank(number, port, out, one):
    """A process of the two."""
    os.environ |= dict(RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with small_presets():
        distributed.join()
        with pytest.raises(UserError, match="--batch_size 3: .* multiple of the 2"):
            run("sft", out / "odd", "--batch_size", "3")
        with pytest.raises(UserError, match="leave torchrun out"):
            train.main(["--mode", "demo", "--out", str(out), *SMALL])
        every_mode(out, one, 3)


@pytest.mark.usefixtures("little_work")
def test_two_ranks_train_what_one_process_trains_and_one_goes_on(tmp_path):
    """Three steps on two ranks and two more on one, against five on one, all but the operations,
    of which a rank counts its own. The bound is the rounding
    of float32, enlarged by AdamW where a gradient is nearly 0; a wrong share of a batch, noise or
    average makes a difference of 1e-3 or more."""
    one, two = tmp_path / "one", tmp_path / "two"
    every_mode(one, one, 5)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(rank, (port, two, one), 2)
    assert all(torch.load(two / name / "last.pt")["step"] == 3 for name in METHODS)
    every_mode(two, one, 5)
    for name in METHODS:
        a, b = (torch.load(root / name / "last.pt", weights_only=True) for root in (one, two))
        assert torch.equal(a["generator"], b["generator"]), name
        for part in ("model", "ema"):
            x, y = (torch.cat([v.flatten().double() for v in state[part].values()])
                    for state in (a, b))
            assert (x - y).norm() < 1e-5 * x.norm(), (name, part)
        for a, b in zip(*(log_of(root / name) for root in (one, two)), strict=True):
            a.pop("tflop"), b.pop("tflop")
            assert a == pytest.approx(b, rel=1e-3, abs=1e-4), name


def test_one_process_is_left_as_it_is():
    x = torch.arange(6.0).view(3, 2)
    assert distributed.place() == (0, 1) and distributed.is_first()
    assert distributed.own_rows(x) is x and distributed.gather(x) is x
    assert distributed.maximum(3, 0) == [3, 0]


def test_draws_are_those_of_the_generator_and_each_rank_has_its_rows(monkeypatch):
    like = torch.zeros(2, 3)
    for draw, whole in ((distributed.gaussian, lambda g: torch.randn(4, 3, generator=g)),
                        (lambda *given: distributed.uniform_integers(1000, *given),
                         lambda g: torch.randint(1000, (4,), generator=g))):
        want = whole(torch.Generator().manual_seed(5))
        for rank in (0, 1):
            monkeypatch.setattr(distributed, "place", lambda: (rank, 2))
            generator = torch.Generator().manual_seed(5)
            assert torch.equal(draw(like, generator), want[2 * rank:2 * rank + 2])
            after = torch.Generator().manual_seed(5)
            whole(after)                        # the generators of the ranks stay together
            assert torch.equal(generator.get_state(), after.get_state())
