"""The split of a folder, the degradation against other people's code, the streams."""
import math
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio
from skimage.transform import resize

from common import gradient
from support import data
from support.cli import UserError
from support.data import Photos
from support.faces import draw_faces

NONE = dict(sigma_x=.01, sigma_y=.01, angle=0., factor=1., noise=0., quality=100)   # spoils nothing


def faces(n, size=32):
    return Photos.drawn(n, 0, size, "train")


def folder(tmp_path, n, bad=()):
    """n photos, each of one grey level, which tells its number; those in `bad` are text."""
    for i in range(n):
        path = tmp_path / f"{i:03}.png"
        if i in bad:
            path.write_text("no picture")
        else:
            Image.new("L", (16, 16), i).save(path)
    return tmp_path


# ---- the split ----

@pytest.mark.parametrize("n, held_out", [(2, 1), (19, 1), (20, 2), (57, 5)])
def test_split_is_disjoint_and_complete(tmp_path, n, held_out):
    train = Photos.from_folder(folder(tmp_path, n), 16, "train")
    heldout = Photos.from_folder(tmp_path, 16, "heldout")
    assert len(heldout) == held_out and len(train) == n - held_out
    assert train.names + heldout.names == [f"{i:03}.png" for i in range(n)]
    assert train.images[:, 0, 0, 0].tolist() == list(range(n - held_out))   # names fit the photos
    assert train.images.dtype == torch.uint8 and train.images.shape[1:] == (3, 16, 16)
    assert Photos.from_folder(tmp_path, 16, "heldout", limit=1).names == heldout.names[:1]


def test_held_out_part_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_HELD_OUT", 3)
    assert len(Photos.from_folder(folder(tmp_path, 50), 16, "heldout")) == 3


def test_unreadable_files_are_named_and_move_no_other(tmp_path, capsys):
    folder(tmp_path, 40)
    whole = {split: Photos.from_folder(tmp_path, 16, split).names for split in ("train", "heldout")}
    assert capsys.readouterr().err == ""
    bad = [*range(3, 15), 38]
    folder(tmp_path, 40, bad)
    for split, count in [("train", 12), ("heldout", 1)]:
        photos = Photos.from_folder(tmp_path, 16, split)
        assert photos.names == [n for n in whole[split] if int(n[:3]) not in bad]
        assert photos.images[:, 0, 0, 0].tolist() == [int(name[:3]) for name in photos.names]
        err = capsys.readouterr().err
        assert f"{count} of {len(whole[split])} {split} photos" in err
        assert err.count("cannot be read") == min(10, count)
    assert "038.png" in err


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="single photo"):
        Photos.from_folder(folder(tmp_path, 1), 16, "heldout")
    with pytest.raises(UserError, match="none of its train photos"):
        Photos.from_folder(folder(tmp_path, 5, bad=range(5)), 16, "train")


def test_few_photos_are_read_at_a_time(tmp_path, monkeypatch):
    now, most, lock, read = [0], [], threading.Lock(), data.read_photo

    def counted(path, size):
        with lock:
            now[0] += 1
            most.append(now[0])
        time.sleep(.01)
        photo = read(path, size)
        with lock:
            now[0] -= 1
        return photo
    monkeypatch.setattr(data, "read_photo", counted)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    Photos.from_folder(folder(tmp_path, 40), 16, "train")
    assert 1 < max(most) <= data.READERS


def test_too_small_a_memory_is_no_bad_photo(tmp_path, monkeypatch):
    def full(path, size):
        raise MemoryError
    monkeypatch.setattr(data, "read_photo", full)
    with pytest.raises(MemoryError):
        Photos.from_folder(folder(tmp_path, 5), 16, "train")


def test_a_set_of_photos_is_told_from_others(tmp_path):
    def found():
        return Photos.from_folder(tmp_path, 16, "train").digest()
    folder(tmp_path, 25)
    was = found()
    assert found() == was and was["number"] == 23
    (tmp_path / "000.png").touch()                  # its time alone
    assert found() == was

    def changed(now):
        return [name for name in was if now[name] != was[name]]
    Image.new("L", (16, 16), 77).save(tmp_path / "003.png")
    assert changed(found()) == ["pixels"]           # of as many bytes, and the same name
    Image.new("L", (16, 16), 3).save(tmp_path / "003.png")
    (tmp_path / "003.png").rename(tmp_path / "003a.png")
    assert changed(found()) == ["names"]
    (tmp_path / "003a.png").unlink()
    assert changed(found()) == ["number", "names", "pixels"]


def test_drawn_faces_held_out_do_not_depend_on_the_seed():
    train, other = Photos.drawn(3, 0, 16, "train"), Photos.drawn(3, 1, 16, "train")
    heldout = [Photos.drawn(3, seed, 16, "heldout") for seed in (0, 1)]
    assert torch.equal(heldout[0].images, heldout[1].images)
    assert not torch.equal(train.images, other.images)
    assert not torch.equal(train.images, heldout[0].images)
    assert train.images.shape == (3, 3, 16, 16) and len(train.names) == len(train) == 3
    for n in (0, 1_000_001):
        with pytest.raises(UserError):
            Photos.drawn(n, 0, 16, "train")


# ---- the degradation ----

@pytest.mark.parametrize("sigma", [.3, 1., 2.5])
def test_round_blur_equals_scipy(sigma):
    x = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0)) * 255
    radius = math.ceil(3 * sigma)
    expected = gaussian_filter(x.double().numpy(), (0, sigma, sigma), mode="mirror", radius=radius)
    for angle in (0., 1.):      # of no importance to a round kernel; mirror = our reflected edges
        assert abs(data.blur(x, sigma, sigma, angle).numpy() - expected).max() < 1e-2


def test_ellipse_has_its_axes_and_angle():
    """The variances of a blurred point are the covariance matrix of the Gaussian."""
    point = torch.zeros(3, 65, 65)
    point[:, 32, 32] = 1
    sigma_x, sigma_y, angle = 4., 1.5, .5
    spread = data.blur(point, sigma_x, sigma_y, angle)[0].double().numpy()
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    y, x = np.mgrid[-32:33, -32:33]
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    expected = turn @ np.diag([sigma_x ** 2, sigma_y ** 2]) @ turn.T
    measured = [[(spread * a * b).sum() for b in (x, y)] for a in (x, y)]
    np.testing.assert_allclose(measured, expected, rtol=.05)    # 3 sigma hold 99 % of the variance
    # in the plane of the picture: y grows downwards


def degraded(photo, seed=0, **change):
    return data.degrade(photo, {**NONE, **change}, np.random.default_rng(seed))


def test_nothing_drawn_spoils_nothing():
    photo = torch.from_numpy(gradient().transpose(2, 0, 1).copy())
    assert (degraded(photo).int() - photo.int()).abs().max() <= 4       # JPEG of quality 100


def test_noise_has_its_sigma_and_comes_before_jpeg():
    grey = torch.full((3, 128, 128), 128, dtype=torch.uint8)
    noisy = degraded(grey, noise=10.).float()
    y = (noisy * torch.tensor([.299, .587, .114])[:, None, None]).sum(0)    # JPEG keeps Y whole
    assert y.std().item() == pytest.approx(10 * math.hypot(.299, .587, .114), rel=.05)
    assert abs(noisy.mean().item() - 128) < .5
    assert not torch.equal(degraded(grey, 1, noise=10.).float(), noisy)
    assert degraded(torch.full_like(grey, 255), noise=10.).min() > 150      # clipped: white stays
    # Coarse quantisation after the noise wipes out most of it; noise after JPEG would stay.
    assert degraded(grey, noise=10., quality=10).float().std() < .75 * noisy.std()


def test_noise_and_jpeg_act_on_the_small_image():
    """A quarter of the size: noise that is enlarged is smooth, so neighbours agree."""
    grey = torch.full((3, 128, 128), 128, dtype=torch.uint8)
    x = degraded(grey, noise=10., factor=4.).float()[1]
    x = x - x.mean()
    assert (x[:, 1:] * x[:, :-1]).mean() / x.var() > .8


@pytest.mark.parametrize("sigma", [.01, 1.5])
def test_blur_then_plain_bilinear_resizing_like_scipy_and_skimage(sigma):
    plain = dict(order=1, mode="edge", anti_aliasing=False, preserve_range=True)
    grey = np.random.default_rng(0).integers(0, 256, (60, 60)).astype(np.uint8)
    blurred = gaussian_filter(grey.astype(float), sigma, mode="mirror")
    expected = resize(resize(blurred, (24, 24), **plain), (60, 60), **plain)
    lq = degraded(torch.from_numpy(grey).repeat(3, 1, 1), sigma_x=sigma, sigma_y=sigma, factor=2.42)
    assert abs(lq.numpy() - expected).max() <= 4        # int(60 // 2.42) = 24; JPEG keeps grey


def test_ranges_are_published_ones_at_512_and_scaled_below():
    for size, worst in [(512, 12.), (64, 3.), (32, 12 / 16 ** (2 / 3))]:
        rng = np.random.default_rng(0)
        draws = [data.draw_degradation(rng, size) for _ in range(2000)]
        for name, low, high in [("sigma_x", .1, worst), ("sigma_y", .1, worst), ("noise", 0, 15),
                                ("factor", 1, worst), ("quality", 30, 100),
                                ("angle", -math.pi, math.pi)]:
            values = np.array([d[name] for d in draws])
            room = .02 * (high - low)
            assert low <= values.min() < low + room and high - room < values.max() <= high, name
            assert values.mean() == pytest.approx((low + high) / 2, abs=2.5 * room), name
        assert .45 < np.mean([d["sigma_x"] == d["sigma_y"] for d in draws]) < .55


def test_lo_and_hi_cut_every_range():
    rng = np.random.default_rng(0)
    mild = [data.draw_degradation(rng, 64, 0, .3) for _ in range(200)]
    heavy = [data.draw_degradation(rng, 64, .7, 1) for _ in range(200)]
    for name in ("sigma_x", "sigma_y", "factor", "noise"):
        assert max(d[name] for d in mild) < min(d[name] for d in heavy)
    assert min(d["quality"] for d in mild) > max(d["quality"] for d in heavy)


@pytest.mark.parametrize("size", [8, 32, 64])
def test_mild_is_nearer_than_heavy(size):
    def psnr(lo, hi):
        rng = np.random.default_rng(0)
        lq = [data.degrade(x, data.draw_degradation(rng, size, lo, hi), rng) for x in photos.images]
        return np.mean([peak_signal_noise_ratio(a.numpy(), b.numpy())
                        for a, b in zip(photos.images, lq)])
    photos = faces(16, size)
    assert psnr(0, .3) > psnr(.3, .7) + .5 > psnr(.7, 1) + 1


# ---- pairs and batches ----

def test_pair_is_the_same_in_every_batch():
    photos = faces(8)
    lq, gt = data.pairs(photos, [5, 1, 6], seed=3, epoch=2)
    assert lq.dtype == gt.dtype == torch.float32 and lq.shape == gt.shape == (3, 3, 32, 32)
    assert torch.equal(data.to_uint8(gt), photos.images[[5, 1, 6]]) and lq.abs().max() <= 1
    again, _ = data.pairs(photos, np.array([6, 5]), seed=3, epoch=2)
    assert torch.equal(again, lq[[2, 0]])
    for seed, epoch in [(3, 1), (4, 2)]:
        assert not torch.equal(data.pairs(photos, [5], seed, epoch)[0][0], lq[0])


def test_pairs_of_one_photo_differ_by_number():
    photos = faces(1)
    twins = Photos(photos.images.repeat(2, 1, 1, 1), photos.names * 2)
    lq, _ = data.pairs(twins, range(2), 0, 0)
    assert not torch.equal(lq[0], lq[1])


@pytest.mark.parametrize("n, batch_size", [(12, 4), (13, 4), (4, 4)])
def test_stream_visits_every_photo_once_an_epoch(n, batch_size):
    steps = n // batch_size
    orders = []
    for epoch in range(3):
        batches = [data.batch_index(n, batch_size, 0, epoch * steps + i) for i in range(steps)]
        assert [e for e, _ in batches] == [epoch] * steps
        orders.append(np.concatenate([index for _, index in batches]).tolist())
        assert len(orders[-1]) == len(set(orders[-1])) == steps * batch_size    # none twice
        assert set(orders[-1]) <= set(range(n))
    assert orders[0] != orders[1] != orders[2]
    assert data.batch_index(n, batch_size, 1, 0)[1].tolist() != orders[0][:batch_size]


def test_fewer_photos_than_a_batch_are_repeated():
    epoch, index = data.batch_index(3, 8, 0, 5)
    assert epoch == 5 and len(index) == 8 and sorted(set(index.tolist())) == [0, 1, 2]
    assert np.bincount(index).max() == 3


def test_train_batch_is_stateless():
    photos = faces(8)
    stream = [data.train_batch(photos, 3, 7, step) for step in range(4)]
    lq, gt = data.train_batch(photos, 3, 7, 3)      # a run resumed at step 3
    assert torch.equal(lq, stream[3][0]) and torch.equal(gt, stream[3][1])
    assert not torch.equal(stream[0][1], stream[2][1])
    epoch, index = data.batch_index(8, 3, 7, 3)
    assert epoch == 1 and torch.equal(data.to_uint8(gt), photos.images[index])
    assert torch.equal(lq, data.pairs(photos, index, 7, epoch=1)[0])


# ---- pictures ----

def test_conversions():
    levels = torch.arange(256, dtype=torch.uint8)
    x = data.to_float(levels)
    assert x[0] == -1 and x[255] == 1 and x.dtype == torch.float32
    assert torch.equal(data.to_uint8(x), levels)
    assert data.to_uint8(x + .9 / 255).tolist() == levels.tolist()      # rounded, not cut off
    assert data.to_uint8(x - .9 / 255).tolist() == levels.tolist()
    assert data.to_uint8(torch.tensor([-3., 3.])).tolist() == [0, 255]


def test_sheet_has_a_line_an_image_and_a_column_a_tensor():
    images = data.to_float(faces(4, 16).images).reshape(2, 2, 3, 16, 16)
    picture = np.array(data.sheet(list(images), scale=2))
    assert picture.shape == (2 * 16 * 2, 2 * 16 * 2, 3)
    for column in range(2):
        for line in range(2):
            tile = picture[line * 32:line * 32 + 32:2, column * 32:column * 32 + 32:2]
            expected = data.to_uint8(images[column, line]).permute(1, 2, 0).numpy()
            assert (tile == expected).all()


def test_workers_draw_the_same_faces():
    here, there = (data.Photos.drawn(300, 5, 16, "train", workers) for workers in (0, 1))
    assert torch.equal(here.images, there.images) and here.names == there.names
    assert torch.equal(here.images[-1:], data.to_uint8(draw_faces([299], 5, 16)))


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_makes_the_same_batches(workers):
    photos, before = Photos.drawn(12, 0, 16, "train"), torch.get_rng_state()
    here = [data.train_batch(photos, 4, 7, step) for step in range(2, 7)]
    there = data.loader(photos, 4, 7, range(2, 7), workers, torch.device("cpu"))
    for (lq, gt), (lq2, gt2) in zip(here, there, strict=True):
        assert torch.equal(lq, lq2) and torch.equal(gt, gt2)
    assert torch.equal(before, torch.get_rng_state())       # the weights' first values hang on it


def test_graded_pairs_come_with_the_batch_and_hang_on_the_step_alone():
    photos, cpu = Photos.drawn(12, 0, 16, "train"), torch.device("cpu")
    whole = list(data.loader(photos, 4, 7, range(5), 0, cpu, with_graded=True))
    later = list(data.loader(photos, 4, 7, range(3, 5), 2, cpu, with_graded=True))
    for here, there in zip(whole[3:], later, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    lq, gt, mild, heavy = (torch.cat(column) for column in zip(*whole))
    error = [(u - gt).square().mean() for u in (mild, heavy)]
    assert 0 < error[0] < error[1]
    assert not torch.equal(whole[0][2], whole[3][2])        # the same photos in another epoch


@pytest.mark.parametrize("cores, ranks, want", [(1, 1, 0), (8, 1, 7), (8, 4, 1), (200, 1, 16)])
def test_workers_by_the_cores_beside_a_gpu(monkeypatch, cores, ranks, want):
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(data, "place", lambda: (0, ranks))
    assert data.spare_cores(torch.device("cuda")) == want
    assert data.spare_cores(torch.device("cpu")) == 0
