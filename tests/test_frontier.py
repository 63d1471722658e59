"""The frontier against scipy's convex hull, and `beyond` against distances that are known."""
import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull

from support.frontier import (beyond, distances_beyond, draw_frontier, hull, sampler_points,
                              verdict)


def test_hull_is_the_descending_part_of_scipys_upper_hull():
    rng = np.random.default_rng(0)
    for n in (3, 5, 20, 60):
        points = rng.standard_normal((n, 2)) @ [[1, -.7], [0, .5]]
        corners = set(ConvexHull(points).vertices)
        mine = hull([tuple(p) for p in points])
        assert set(mine) <= corners and points[mine[0], 1] == points[:, 1].max()
        assert points[mine[-1], 0] == points[:, 0].max()
        assert (np.diff(points[mine, 0]) > 0).all() and (np.diff(points[mine, 1]) < 0).all()
        for x, y in points:         # no point lies above the hull
            if x >= points[mine[0], 0]:
                assert y <= np.interp(x, points[mine, 0], points[mine, 1]) + 1e-12
    assert hull([(1.0, 2.0)]) == [0]
    assert hull([(1.0, 2.0), (2.0, 3.0)]) == [1]        # better in both: the other is not on it


def plane(*points, n=50, seed=0):
    """(S, n, 2): images scattered about each (PSNR, quality) point, the same scatter for all."""
    scatter = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    scatter -= scatter.mean(dim=0)
    return torch.stack([torch.tensor(p) + scatter for p in points])


def test_beyond_is_the_height_above_the_chord():
    samplers = plane((24.0, .90), (23.0, .96), (22.0, .97), (22.5, .95))
    for point, want in [((23.5, .94), .01), ((23.25, .945), 0), ((22.5, .955), -.01),
                        ((25.0, .91), .01), ((21.0, .96), -.01)]:       # outside: the nearer end
        distance, error = beyond(plane(point)[0], samplers)
        assert distance == pytest.approx(want, abs=1e-5)
        assert error < 1e-5                         # no image differs from the chord by its own


def test_the_error_is_that_of_the_vertical_distance():
    """Many sets of noisy images: the distances scatter by what `beyond` says."""
    samplers, found = plane((24.0, .90), (23.0, .96), n=400), []
    for seed in range(200):
        noise = torch.randn(400, 2, generator=torch.Generator().manual_seed(seed))
        method = plane((23.4, .95), n=400)[0] + noise * torch.tensor([.3, .02])
        found.append(beyond(method, samplers))
    distances, errors = torch.tensor(found).T
    assert distances.std().item() == pytest.approx(errors.mean().item(), rel=.2)
    assert distances.mean().item() == pytest.approx(.95 - .936, abs=5 * errors.mean().item() / 14)


def test_lpips_counts_as_lower_better_and_the_picture_is_drawn(tmp_path):
    def row(psnr, lpips):
        return {"psnr": plane((psnr, 0.0))[0][:, 0], "lpips": plane((lpips, 0.0))[0][:, 0]}
    def row_of(K, eta):
        return row(24.5 - K / 10, .06 + .2 / K + eta / 100)
    points = sampler_points(row_of, [5, 7], 0.3)
    assert len(points) == 4 * 5 + 6 and (7, 0.3) in points      # the rows' own K and eta as well
    near = row_of(5, 0)
    near["lpips"] = near["lpips"] + .01 * torch.linspace(-1, 1, 50)     # mean 0, error .0008
    rows = {"sft": near, "good": row(24, .08), "bad": row(24, .12)}
    places = distances_beyond(rows, points, "lpips")
    assert [verdict(label, "lpips", *place).split(" lies ")[1].split()[0]
            for label, place in places.items()] == ["on", "beyond", "behind"]
    draw_frontier(tmp_path / "f.png", rows, points, ["lpips"], "sft")
    assert (tmp_path / "f.png").stat().st_size > 5000
