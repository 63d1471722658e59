"""tools/throughput.py: the widths of the peers, turns, ratios, and counts of network calls."""
import argparse
from collections import Counter

import pytest
import torch

from model import Config, UNet
from support.cli import UserError
from tools import throughput


def settings(**more):
    """The flags that most functions read, tiny."""
    return argparse.Namespace(**dict(size=16, channels=8, patch=2, rounds=4, seconds=0.0,
                                     bf16=False, device=torch.device("cpu")) | more)


@pytest.mark.parametrize("channels", [16, 32])
def test_the_nearest_width_is_within_five_per_cent_and_the_network_takes_our_images(channels):
    pytest.importorskip("diffusers")
    target = sum(p.numel() for p in UNet(Config(channels=channels)).parameters())
    width, n = throughput.nearest_width("diffusers", channels, target)
    net = throughput.PEERS["diffusers"][1](width)
    assert n == sum(p.numel() for p in net.parameters()) and abs(n / target - 1) < .05
    assert net(torch.zeros(2, 6, 16, 16), torch.zeros(2)).sample.shape == (2, 3, 16, 16)


def lines(width):
    """A network whose number of parameters is 100 times its width."""
    return torch.nn.Linear(100, width, bias=False)


def test_the_search_takes_the_nearest_and_refuses_beyond_five_per_cent(monkeypatch):
    monkeypatch.setattr(throughput, "PEERS", {"lines": (4, lines)})
    assert throughput.nearest_width("lines", 10, 1150) == (12, 1200)
    with pytest.raises(UserError, match="no width within 5 % of 1,000 parameters"):
        throughput.nearest_width("lines", 10, 1000)


def test_a_missing_peer_is_named_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(throughput, "PEERS", {"no_such_package": (1, None)})
    (ours,) = throughput.networks(settings())
    assert ours.startswith("ours, width 8, ")
    assert "no_such_package is not installed and left out" in capsys.readouterr().out


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what the test adds to clock[0]."""
    now = [0.0]
    monkeypatch.setattr(throughput, "perf_counter", lambda: now[0])
    return now


def test_everyone_is_measured_once_a_round_and_the_order_rotates(clock):
    seen = []
    found = throughput.turns({name: lambda name=name: seen.append(name) for name in "abc"},
                             settings())
    assert "".join(seen) == "abc" + "abc" + "bca" + "cab" + "abc"       # the first is the warm-up
    assert {name: len(times) for name, times in found.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_measurement_is_the_mean_over_as_many_calls_as_fill_the_time(clock):
    calls = []

    def call():
        calls.append(clock[0])
        clock[0] += .25
    assert throughput.turns({"a": call}, settings(seconds=1.0, rounds=1)) == {"a": [.25]}
    assert len(calls) == 1 + 4


def test_medians_and_ratios_are_those_of_the_rounds(clock, capsys):
    cost = {"ours": iter([9, 1, 2, 4]), "peer": iter([9, 4, 2, 16])}    # the first is the warm-up

    def competitor(name):
        def call():
            clock[0] += next(cost[name])
        return call
    throughput.compare("training, images", 16, {name: competitor(name) for name in cost},
                       settings(rounds=3))
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows == ["| ours | 8.00 (4.00 to 16.00) | 1.00 (1.00 to 1.00) |",
                    "| peer | 4.00 (1.00 to 8.00) | 4.00 (1.00 to 4.00) |"]


def test_the_bare_calls_are_those_of_the_step(monkeypatch):
    seen, forward = Counter(), UNet.forward

    def counted(net, x, lq, t):
        seen[len(x), torch.is_grad_enabled()] += 1
        return forward(net, x, lq, t)

    def compare(title, work, competitors, args):
        counts = []
        for call in competitors.values():
            seen.clear()
            call()
            counts.append(dict(seen))
        assert counts[0] == counts[1] != {}, title
        titles.append(title.split(",")[0])
    titles = []
    monkeypatch.setattr(UNet, "forward", counted)
    monkeypatch.setattr(throughput, "compare", compare)
    throughput.methods(UNet(Config(16, 8)), settings())
    assert titles == ["sft", "lrpo", "refl", "darl"]


def test_growth_fits_the_exponent(monkeypatch, capsys):
    """A step whose time is the square of G, and twelve times the side."""
    monkeypatch.setattr(throughput, "GROWTH", {"group": (2, 4, 8), "side": (16, 32)})
    monkeypatch.setattr(throughput, "turns", lambda steps, args: {
        v: [v ** 2.0 if 2 in steps else 12.0 * v] for v in steps})
    throughput.growth(settings())
    rows = capsys.readouterr().out.splitlines()[-4:]
    assert [row.split("|")[4].strip() for row in rows] == ["2.00", "1.00"] * 2
    assert "| LRPO, group | 2 4 8 | 4 16 64 |" in rows[0]


def test_the_operations_of_a_network_are_counted_as_for_a_convolution():
    """A 3 x 3 convolution of c to d channels costs 18 c d operations a pixel, and twice as many
    in the backward pass, where the first layer has no gradient of its input to compute."""
    class Two(torch.nn.Module):
        config = Config(16, 8)

        def __init__(self):
            super().__init__()
            self.a, self.b = (torch.nn.Conv2d(c, d, 3, padding=1) for c, d in ((6, 5), (5, 3)))

        def forward(self, x, lq, t):
            return self.b(self.a(torch.cat([x, lq], dim=1)))
    a, b = 18 * 6 * 5 * 256, 18 * 5 * 3 * 256
    assert throughput.operations(Two()) == (a + b, a + b + a + 2 * b)
