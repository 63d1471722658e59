"""tools/throughput.py: the width of the peer, turns, medians and ratios."""
import argparse

import pytest
import torch

from model import Config, UNet
from tools import throughput


@pytest.mark.parametrize("channels", [16, 32])
def test_the_peer_has_our_number_of_parameters_and_takes_our_images(channels):
    net, ours = throughput.peer(channels), UNet(Config(channels=channels))
    assert abs(throughput.parameters(net) / throughput.parameters(ours) - 1) < .05
    assert net(torch.zeros(2, 6, 16, 16), torch.zeros(2)).sample.shape == (2, 3, 16, 16)


def test_everyone_has_a_turn_a_round_and_ratios_are_formed_within_a_round(monkeypatch, capsys):
    now, seen = [0.0], []
    monkeypatch.setattr(throughput, "perf_counter", lambda: now[0])
    cost = {"ours": iter([9, 1, 2, 4]), "peer": iter([9, 4, 2, 16])}    # the first does not count

    def call(name):
        seen.append(name[0])
        now[0] += next(cost[name])
    args = argparse.Namespace(rounds=3, seconds=.5, device=torch.device("cpu"))
    throughput.compare("training", 16, {name: lambda name=name: call(name) for name in cost}, args)
    assert "".join(seen) == "op" + "po" + "op" + "po"           # the order rotates
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "| ours | 8.00 (4.00 to 16.00) | 1.00 (1.00 to 1.00) |",
        "| peer | 4.00 (1.00 to 8.00) | 4.00 (1.00 to 4.00) |"]


def test_the_program_measures_both_networks_and_every_method(capsys):
    throughput.main(["--size", "16", "--channels", "16", "--batch", "2", "--rounds", "1",
                     "--seconds", "0", "--device", "cpu"])
    rows = [line.split("|")[1].split(",")[0].strip()
            for line in capsys.readouterr().out.splitlines()
            if line.startswith("|") and "---" not in line]
    assert rows == ["training", "ours", "diffusers", "inference", "ours", "diffusers", "a step",
                    "sft", "lrpo", "refl", "darl"]
