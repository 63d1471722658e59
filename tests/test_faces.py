"""Drawn faces: the hash behind them, their determinism, and whether they are worth restoring."""
import zlib

import pytest
import torch
import torch.nn.functional as F

from support.faces import draw_faces, hash32, uniform


def plain_hash(x):
    """hash32 by unbounded Python integers, step by step, reduced modulo 2**32."""
    x ^= x // 2 ** 16
    x = x * 0x21F0AAAD % 2 ** 32
    x ^= x // 2 ** 15
    x = x * 0x735A2D97 % 2 ** 32
    return x ^ x // 2 ** 15


def distance(a, b):
    return (a - b).abs().mean().item()


def test_hash_equals_exact_integer_arithmetic():
    values = [0, 1, 2, 12345, 2 ** 31 - 1, 2 ** 31, 0xDEADBEEF, 2 ** 32 - 1]
    assert hash32(torch.tensor(values)).tolist() == [plain_hash(v) for v in values]
    key = plain_hash(7 ^ plain_hash(zlib.crc32(b"yaw")))
    expected = [(plain_hash(v ^ key) // 256) / 2 ** 24 for v in values]
    assert uniform("yaw", torch.tensor(values), seed=7).tolist() == expected


def test_hash_is_uniform_and_its_streams_are_independent():
    n, bins = 1 << 16, 64
    u = uniform("skin", torch.arange(n), seed=0).double()
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 1 / 2) < 4 * (1 / 12 / n) ** 0.5       # four standard errors
    assert abs(u.var() - 1 / 12) < 4 * (1 / 180 / n) ** 0.5      # Var (u - 1/2)^2 = 1/80 - 1/144
    counts = torch.histc(u, bins, 0, 1)
    chi2 = ((counts - n / bins) ** 2 / (n / bins)).sum().item()
    assert abs(chi2 - (bins - 1)) < 4 * (2 * (bins - 1)) ** 0.5
    others = [uniform("hair", torch.arange(n), 0), uniform("skin", torch.arange(n), 1), u.roll(1)]
    for other in others:     # another name, another seed, the next face
        assert abs(torch.corrcoef(torch.stack([u, other.double()]))[0, 1]) < 4 / n ** 0.5


@pytest.mark.parametrize("size", [8, 32, 50])
def test_pictures_keep_the_image_contract(size):
    faces = draw_faces(torch.arange(5), size=size)
    assert faces.shape == (5, 3, size, size) and faces.dtype == torch.float32
    assert faces.isfinite().all() and faces.min() >= -1 and faces.max() <= 1
    assert faces.max() - faces.min() > 1.5                       # and they use most of the range
    assert draw_faces([], size=size).shape == (0, 3, size, size)


def test_a_face_does_not_depend_on_its_batch():
    numbers = list(range(70))                                    # more than one chunk of 32
    faces = draw_faces(numbers)
    torch.testing.assert_close(draw_faces(numbers[::-1]).flip(0), faces, atol=1e-5, rtol=0)
    torch.testing.assert_close(draw_faces([69]), faces[69:], atol=1e-5, rtol=0)


def test_number_and_seed_change_the_face():
    a, b = draw_faces([3, 4], seed=0)
    assert distance(a, b) > 0.1
    assert distance(a, draw_faces([3], seed=1)[0]) > 0.1
    assert distance(a, draw_faces([2], seed=1)[0]) > 0.1         # seed + number is not the key


@pytest.mark.parametrize("size", [64, 128])
def test_a_face_is_the_same_at_every_size(size):
    small, large = draw_faces(range(12)), draw_faces(range(12), size=size)
    shrunk = F.avg_pool2d(large, size // 32)
    same = (small - shrunk).abs().mean(dim=(1, 2, 3))
    other = (small - shrunk.roll(1, 0)).abs().mean(dim=(1, 2, 3))
    assert same.max() < 0.015                                    # of a range of 2
    assert (same < other / 20).all()


def test_blur_destroys_detail():
    faces = draw_faces(range(32))
    blurred = F.interpolate(F.avg_pool2d(faces, 4), scale_factor=4, mode="bilinear")
    around_mean = faces - faces.mean(dim=(2, 3), keepdim=True)
    lost = (faces - blurred).square().sum(dim=(1, 2, 3)) / around_mean.square().sum(dim=(1, 2, 3))
    assert lost.min() > 0.05 and lost.mean() > 0.15 and lost.max() < 0.8


def test_faces_vary():
    faces = draw_faces(range(48))
    pairs = torch.pdist(faces.flatten(1), p=1) / faces[0].numel()
    assert pairs.mean() > 0.35 and pairs.min() > 0.1


@pytest.mark.parametrize("bad", [
    dict(index=[0, -1]), dict(index=[2 ** 32]), dict(index=[0], seed=-1), dict(index=[0], size=33),
    dict(index=[0], size=6), dict(index=[0], size=0)])
def test_bad_input_is_refused(bad):
    with pytest.raises(ValueError, match="must"):
        draw_faces(**bad)
