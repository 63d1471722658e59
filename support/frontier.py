"""The frontier between distortion and perception that the sampler of one checkpoint spans.

Idea     A diffusion restorer trades fidelity for perceptual quality without any training: fewer
         steps give a higher PSNR and a worse LPIPS, and so does more noise (eta), but little (Blau
         & Michaeli 2018, arXiv 1711.06077, prove that such a trade-off exists). A method has gained
         something only if it lies beyond that frontier. `evaluate.py --frontier` draws it.
Steps    1. Restore the held-out images with every (K, eta).         `sampler_points`
         2. Keep the upper concave hull of their (PSNR, quality).    `hull`
         3. Measure how far above it a method lies, at its own PSNR. `beyond`
"""
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

FRONTIER_STEPS, FRONTIER_ETAS = (2, 3, 5, 10, 20), (0.0, 0.5, 0.8, 1.0)    # ours


def standard_error(values: torch.Tensor) -> float:
    """The standard error of the mean of values (N,); nan for a single value."""
    return values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")


def hull(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the upper concave hull of (PSNR, quality) points, by rising PSNR, from the point
    of best quality on. A chord of it is reachable: restore a share of the images with each end."""
    kept = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        while kept and points[kept[-1]][1] <= points[i][1]:     # worse in both
            kept.pop()
        while len(kept) > 1 and cross(*(points[j] for j in (*kept[-2:], i))) >= 0:
            kept.pop()
        kept.append(i)
    return kept


def cross(a, b, c) -> float:
    """Above 0 where the path a, b, c turns left, so that b lies below the chord from a to c."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def beyond(method: torch.Tensor, samplers: torch.Tensor) -> tuple[float, float | None]:
    """How far a method lies above the hull of the samplers at its own PSNR, and the standard error.

    method (N, 2) and samplers (S, N, 2) hold (PSNR, quality) of the same N images, quality higher
    better. Outside the hull's PSNR the nearer end is the comparison (a method to the right of the
    hull is more faithful than any sampler, whatever the distance). The error is that of the mean
    over the images of the vertical distance, to first order in the two means; None for one image.
    """
    means = samplers.mean(dim=1)                                        # (S, 2)
    corners = hull([tuple(p) for p in means.tolist()])
    p = method[:, 0].mean()
    ends = next(((a, b) for a, b in zip(corners, corners[1:]) if means[a, 0] <= p <= means[b, 0]),
                None)
    if ends is None:
        best = corners[0] if p < means[corners[0], 0] else corners[-1]
        d = (method - samplers[best])[:, 1]
    else:
        (xa, ya), (xb, yb) = means[list(ends)]
        w, slope = (p - xa) / (xb - xa), (yb - ya) / (xb - xa)
        d = method - (samplers[ends[0]] * (1 - w) + samplers[ends[1]] * w)      # (N, 2)
        d = d[:, 1] - slope * d[:, 0]
    return d.mean().item(), standard_error(d) if len(d) > 1 else None       # nan is no JSON


def sampler_points(measured, Ks, eta: float) -> dict[tuple, dict]:
    """{(K, eta): {metric: (N,)}} for every sampler, the rows' own Ks and eta among them;
    measured(K, eta) restores and measures."""
    choices = [(K, e) for e in FRONTIER_ETAS for K in FRONTIER_STEPS]
    choices += [c for c in ((K, eta) for K in sorted({*FRONTIER_STEPS, *Ks})) if c not in choices]
    return {choice: measured(*choice) for choice in tqdm(choices, "frontier", disable=None)}


def sign(name: str) -> int:
    """1 for a measure of which more is better, -1 for LPIPS."""
    return -1 if name.startswith("lpips") else 1


def distances_beyond(rows: dict, points: dict, name: str) -> dict[str, tuple]:
    """For each row, `beyond` in the plane of PSNR and `name`: {label: (distance, error)}."""
    plane = lambda row: torch.stack([row["psnr"], row[name] * sign(name)], 1)
    samplers = torch.stack([plane(row) for row in points.values()])         # (S, N, 2)
    return {label: beyond(plane(row), samplers) for label, row in rows.items()}


def verdict(label: str, name: str, distance: float, error: float | None) -> str:
    """One sentence. A distance within two standard errors, or without an error, is "on" it."""
    near = error is None or abs(distance) <= 2 * error
    place = "on" if near else "beyond" if distance > 0 else "behind"
    value = f"{distance:+.4f} ± " + ("unknown" if error is None else f"{error:.4f}")
    return (f"{label} lies {place} the sampler's frontier: {value} in {name} (above 0 is better) "
            "against the sampler at the same PSNR, or the nearest it reaches")


def draw_frontier(path, rows: dict, points: dict, names: list[str], first: str):
    """A panel for each measure against PSNR: the samplers of the first checkpoint, a curve for each
    eta, their frontier, and every row with the standard error of its difference from the first."""
    fig = Figure(figsize=(6.5 * len(names), 5))
    for ax, name in zip(fig.subplots(1, len(names), squeeze=False)[0], names):
        xy = {c: (row["psnr"].mean().item(), row[name].mean().item()) for c, row in points.items()}
        for eta in FRONTIER_ETAS:
            ax.plot(*zip(*(xy[K, eta] for K in FRONTIER_STEPS)), "o-", ms=3, lw=.8, color=str(
                .45 + .4 * eta), label=f"{first}, eta {eta:g}, K = {FRONTIER_STEPS[0]} ... "
                f"{FRONTIER_STEPS[-1]} (right to left)")
        edge = hull([(x, sign(name) * y) for x, y in xy.values()])
        ax.plot(*zip(*(list(xy.values())[i] for i in edge)), "k--", lw=1.2, label="frontier")
        for label, row in rows.items():
            error = [standard_error(row[k] - rows[first][k]) for k in ("psnr", name)]
            ax.errorbar(row["psnr"].mean(), row[name].mean(), error[1], error[0], fmt="s", ms=6,
                        capsize=2, lw=.8, label=label)
        if sign(name) < 0:
            ax.invert_yaxis()       # up is better in every panel
        ax.set(xlabel="PSNR, dB (right is more faithful)", ylabel=f"{name} (up is better)")
        ax.legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=90)
