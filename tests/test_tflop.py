"""Operations: their count against the shapes of a network, and that they stop a run."""
import math

import pytest
import torch
from torch import nn

import train
from common import log_of, pictures, run, tiny_net
from model import Attention, Diffusion
from sft import SFT, SFTSettings

pytestmark = pytest.mark.usefixtures("little_work")


def multiplications(net, call) -> list[tuple[int, bool]]:
    """Of each convolution and linear layer that call() uses, from the shapes alone: how many
    multiplications it makes, and whether a gradient flows to its input."""
    found = []

    def note(layer, given, out):
        taps = math.prod(layer.weight.shape[1:])            # for one number of the output
        found.append((out.numel() * taps, given[0].requires_grad))
    hooks = [m.register_forward_hook(note) for m in net.modules()
             if isinstance(m, (nn.Conv2d, nn.Linear))]
    call()
    for hook in hooks:
        hook.remove()
    return found


def without_attention():
    net = tiny_net()
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Attention):
                setattr(parent, name, nn.Identity())
    return net


def test_a_step_of_sft_is_two_operations_a_multiplication_forward_once_and_backward_twice():
    net, generator = without_attention(), torch.Generator().manual_seed(0)
    method = SFT(net, Diffusion(net.config), None, generator, SFTSettings())
    layers = multiplications(net, lambda: method.diffusion.loss(net, *pictures(0), generator))
    # Backward once for the weights, and once for the input, but not for that of the network.
    want = sum(2 * n * (3 if inside else 2) for n, inside in layers)
    assert len(layers) > 20 and [inside for _, inside in layers].count(False) == 2
    _, count = train.counted_step(method, pictures(0))
    assert count * 1e12 == pytest.approx(want)


def test_operations_stop_a_run_and_are_kept(tmp_path):
    run("sft", tmp_path / "sft", "--every", "1", steps=1)
    one = log_of(tmp_path / "sft")[-1]["tflop"]
    state = run("sft", tmp_path / "sft", "--tflop", str(3.5 * one), "--resume", steps=50)
    assert state["step"] == 4 and state["finished"]
    rows = log_of(tmp_path / "sft")
    assert [row["tflop"] for row in rows] == pytest.approx([0, one, 2 * one, 3 * one, 4 * one])
    assert state["tflop"] == rows[-1]["tflop"]
    before = (tmp_path / "sft" / "last.pt").read_bytes()        # it is finished
    run("sft", tmp_path / "sft", "--tflop", str(3.5 * one), "--resume", steps=50)
    assert (tmp_path / "sft" / "last.pt").read_bytes() == before


def test_a_method_counts_the_training_of_its_reward_model(runs):
    frm, lrpo = log_of(runs / "frm"), log_of(runs / "lrpo")
    assert frm[0]["tflop"] > 0                                  # the pairs that were restored
    assert lrpo[0]["tflop"] == frm[-1]["tflop"] > frm[0]["tflop"]


def test_sft_goes_on_from_the_averaged_weights(runs, tmp_path):
    start = torch.load(runs / "sft" / "last.pt", weights_only=True)
    state = run("sft", tmp_path / "on", "--init", str(runs / "sft" / "last.pt"), "--lr", "1e-12",
                steps=1)
    moved = [name for name, v in start["ema"].items() if not torch.equal(v, start["model"][name])]
    assert moved and not state["args"]["resume"]
    for part in ("model", "ema"):
        for name, v in state[part].items():
            torch.testing.assert_close(v, start["ema"][name], rtol=0, atol=1e-9)
