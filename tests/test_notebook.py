"""The notebook: it runs from top to bottom, its numbers are right, and it repeats no code."""
import ast
import importlib
import re
from functools import reduce
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

ROOT = Path(__file__).parents[1]
FILE, RESTORER = ROOT / "notebooks" / "walkthrough.ipynb", ROOT / "pretrained" / "faces64.pt"
QUICK = "FACES, G, FRM_STEPS, ASCENT = 2, 4, 8, 12"     # as small as its figures allow
NAMES = """gt states predictions sampled paper_advantages R A w advantages R_patch R_image sigma
           mu_new ratio moved x0_hat gradients curves results margins update""".split()
SAVE = f"""
mu_old = diffusion.ddim_step(net, transition.x, lq[:P], transition.t, transition.s, 1.0)[0]
torch.save({{**{{name: globals()[name] for name in {NAMES}}}, "scores": scores["restored"],
            "action": transition.action, "advantage": transition.advantage,
            "mu_old": mu_old.detach()}}, "{{path}}")"""


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(FILE, as_version=4)


@pytest.fixture(scope="module")
def seen(notebook, tmp_path_factory):
    """The notebook's variables after a run of every cell, with small parameters."""
    if not RESTORER.exists():
        pytest.skip("pretrained/faces64.pt is not there, from which the notebook starts")
    folder, copy = tmp_path_factory.mktemp("notebook"), nbformat.from_dict(notebook)
    (parameters,) = [c for c in copy.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source = QUICK
    path = folder / "seen.pt"
    copy.cells.append(nbformat.v4.new_code_cell(SAVE.replace("{path}", path.as_posix())))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
            patch.setenv(name, str(folder))
        NotebookClient(copy, timeout=600, resources={"metadata": {"path": FILE.parent}}).execute()
    return torch.load(path, weights_only=True)


def unit(x):
    """An image (3, H, W) in [-1, 1] as numpy (H, W, 3) in [0, 1], clipped."""
    return (x.double().clamp(-1, 1).permute(1, 2, 0).numpy() + 1) / 2


def skimage_ssim(x, gt):
    return structural_similarity(unit(x), unit(gt), channel_axis=2, data_range=1.0, sigma=1.5,
                                 gaussian_weights=True, use_sample_covariance=False)


def low_pass_fidelity(x, gt):
    """exp(-60 L1) of the means of 8 x 8 windows, every 4 pixels."""
    windows = np.lib.stride_tricks.sliding_window_view(unit(x) - unit(gt), (8, 8), axis=(0, 1))
    return np.exp(-60 * np.abs(windows[::4, ::4].mean(axis=(3, 4))).mean())


def process(K):
    """abar_t, abar_s and sigma (eta = 1) of the K steps, from DDPM's schedule and DDIM's eq. 16."""
    abar = np.append(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), 1.0)
    times = [round(1000 * (K - k) / K) - 1 for k in range(K)] + [-1]
    a, a_prev = abar[times[:-1]], abar[times[1:]]
    return a, a_prev, np.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))


def test_the_samplers_states_are_ddims(seen):
    states, x0 = ([u.double() for u in seen[name]] for name in ("states", "predictions"))
    a, a_prev, sigma = (torch.from_numpy(u) for u in process(len(states)))
    for k in range(len(states) - 1):
        s = 0.8 * sigma[k]
        eps = (states[k] - a[k].sqrt() * x0[k]) / (1 - a[k]).sqrt()
        mu = a_prev[k].sqrt() * x0[k] + (1 - a_prev[k] - s ** 2).sqrt() * eps
        z = (states[k + 1] - mu) / s            # standard normal: five standard errors
        assert abs(z.mean()) < 5 / z.numel() ** 0.5
        assert abs(z.std() - 1) < 5 / (2 * z.numel()) ** 0.5
    torch.testing.assert_close(seen["sampled"].double(), x0[-1].clamp(-1, 1), rtol=0, atol=1e-5)


def test_the_metrics_are_scikit_images(seen):
    for i, (x, gt) in enumerate(zip(seen["sampled"], seen["gt"])):
        scores = {name: values[i].item() for name, values in seen["scores"].items()}
        assert scores["psnr"] == pytest.approx(peak_signal_noise_ratio(unit(gt), unit(x)), abs=1e-3)
        assert scores["r_ssim"] == pytest.approx(skimage_ssim(x, gt), abs=1e-4)
        assert scores["r_dwt"] == pytest.approx(low_pass_fidelity(x, gt), abs=1e-4)
        want = 0.2 * scores["r_ssim"] + 0.5 * scores["r_dwt"] + 0.3 * scores["r_face"]
        assert scores["reward"] == pytest.approx(want, abs=1e-6)


def test_the_advantages_are_the_papers_and_ours_follow_its_formula(seen):
    assert [round(a, 2) for a in seen["paper_advantages"].tolist()] == [-0.85, -0.55, 1.40]
    R = seen["R"].double().flatten()
    want = (R - R.mean()) / (R.std(correction=0) + 1e-4)
    torch.testing.assert_close(seen["A"].double(), want, rtol=0, atol=1e-3)
    for K, w in seen["w"].items():
        sigma = process(K)[2][:-1]              # the last step has no noise
        np.testing.assert_allclose(w.numpy(), sigma / sigma.mean(), atol=1e-4)
    K = len(seen["states"])
    torch.testing.assert_close(seen["advantages"].double(), torch.outer(
        want, seen["w"][K].double()).clamp(-5, 5), rtol=0, atol=2e-3)


def test_the_patches_rewards_average_to_the_reward_and_each_is_compared_with_itself(seen):
    R, G = seen["R_patch"].double(), len(seen["A"])
    torch.testing.assert_close(R.mean(dim=(1, 2)), seen["R_image"].double().flatten(),
                               rtol=0, atol=1e-6)
    for group, A in zip(R.split(G), seen["advantage"].double().split(G)):
        centred = group - group.mean(dim=0)
        want = centred / (centred.square().mean().sqrt() + 1e-4)
        torch.testing.assert_close(A, want.clamp(-5, 5), rtol=0, atol=1e-3)


def test_the_ratio_is_that_of_two_normal_densities_and_the_update_follows_the_advantages(seen):
    action, sigma = seen["action"].double(), seen["sigma"].double()
    G, (new, old) = len(seen["A"]), (seen[name].double() for name in ("mu_new", "mu_old"))
    log_prob = [torch.distributions.Normal(mu.repeat_interleave(G, dim=0), sigma).log_prob(action)
                for mu in (new, old)]
    patches = (log_prob[0] - log_prob[1]).unflatten(3, (8, 8)).unflatten(2, (8, 8))
    want = patches.mean(dim=(1, 3, 5)).exp()
    ratio = seen["ratio"].double()
    torch.testing.assert_close(ratio, want, rtol=0, atol=1e-5)
    assert (want - 1).abs().max() > 1e-3        # it moved, a hundred times the tolerance
    assert seen["update"]["first_off_max"] < 1e-5
    assert seen["update"]["reward"] == pytest.approx(seen["R_patch"].mean().item(), abs=1e-5)
    assert (seen["advantage"].double() * (ratio - 1)).mean() > 0
    assert seen["moved"].max() > 0.005


@pytest.mark.parametrize("name, reward", [("ssim", skimage_ssim), ("dwt", low_pass_fidelity)])
def test_the_gradient_is_the_slope_of_an_independent_reward(seen, name, reward):
    """(r(x + h g) - r(x - h g)) / 2h = |g|^2. The low-pass term has kinks, so that h is small."""
    x, gt, g = (u[0].double() for u in (seen["x0_hat"], seen["gt"], seen["gradients"][name]))
    g = torch.where(x.abs() < 0.999, g, 0.0)    # beyond it the clamp comes between
    h = 1e-4 / g.abs().max()
    slope = (reward(x + h * g, gt) - reward(x - h * g, gt)) / (2 * h)
    assert slope == pytest.approx(g.square().sum().item(), rel=0.02)


def test_a_hacked_reward_rises_while_judges_fall(seen):
    start, gt = seen["sampled"], seen["gt"]
    for name, hacked in (("face alone", True), ("composite", False)):
        rewards = [reward for reward, _, _ in seen["curves"][name]]
        assert rewards[-1] - rewards[0] > 0.1 * (1 - rewards[0])     # 1 is the most
        for judge, change in ((skimage_ssim, 0.03),
                              (lambda a, b: peak_signal_noise_ratio(unit(b), unit(a)), 0.3)):
            before, after = (np.mean([judge(a, b) for a, b in zip(u, gt)])
                             for u in (start, seen["results"][name]))
            assert after < before - change if hacked else after > before + change, (name, change)
    assert seen["margins"][0] < 0 and seen["margins"][-1] > seen["margins"][0] + 1


def test_the_committed_notebook_has_its_outputs_and_defines_nothing(notebook):
    assert FILE.stat().st_size < 1.5e6
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [out for cell in code for out in cell.outputs]
    assert {out.output_type for out in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(out.name == "stdout" for out in outputs if out.output_type == "stream")
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 12
    assert "the paper's figure: -0.85, -0.55, 1.40" in "".join(out.get("text", "")
                                                               for out in outputs)
    for cell in code:
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)), cell.source


def test_what_the_text_names_exists_and_the_badge_opens_what_is_cloned(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    named = re.findall(r"`([\w/]+)\.py`: ((?:`[\w.]+`(?:, )?)+)", text)
    assert len(named) >= 20
    for file, names in named:
        module = importlib.import_module(file.replace("/", "."))
        for name in re.findall(r"`([\w.]+)`", names):
            reduce(getattr, name.split("."), module)
    badge = re.search(r"github/([\w-]+/nanoLRPO)/blob/main/(\S+)\)", text)
    (clone,) = [url for cell in notebook.cells if cell.cell_type == "code"
                for url in re.findall(r"github\.com/([\w-]+/nanoLRPO)", cell.source)]
    assert badge[1] == clone and (ROOT / badge[2]) == FILE
