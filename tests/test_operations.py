"""Operations against the arithmetic of a convolution; and that counting changes nothing."""
import torch

from common import parameters, pictures, tiny_net
from model import Diffusion
from sft import SFT, SFTSettings
from support.operations import Operations


def test_operations_are_those_of_convolutions_and_products():
    """A 3 x 3 convolution of c to d channels costs 18 c d operations a pixel, and twice as many in
    the backward pass, where the first layer has no gradient of its input to compute."""
    a, b = (torch.nn.Conv2d(c, d, 3, padding=1) for c, d in ((6, 5), (5, 3)))
    cost = [18 * c * d * 256 for c, d in ((6, 5), (5, 3))]
    with Operations() as counter:
        out = b(a(torch.zeros(1, 6, 16, 16)))
        assert counter.total == sum(cost)
        out.square().sum().backward()
    assert counter.total == 2 * cost[0] + 3 * cost[1]
    with Operations() as counter:
        torch.zeros(2, 3) @ torch.zeros(3, 5)
    assert counter.total == 2 * 2 * 3 * 5


def test_a_counted_step_is_the_step_that_is_not_counted():
    ends = []
    for counted in (False, True):
        net = tiny_net()
        sft = SFT(net, Diffusion(net.config), None, torch.Generator().manual_seed(0),
                  SFTSettings(lr=1e-3))
        for _ in range(3):
            if counted:
                with Operations() as counter:
                    sft.step(pictures(0))
                assert counter.total > 1e6
            else:
                sft.step(pictures(0))
        ends.append(parameters(net))
    assert torch.equal(*ends)
