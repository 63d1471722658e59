"""The course: the student's copy has no solution, the checks pass what is right and fail what is
wrong, each exercise by itself."""
import ast
import importlib
import json
import os
import shlex
import subprocess
import sys
from argparse import Namespace
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from textwrap import dedent, indent
from unittest.mock import patch

import pytest
import torch

import evaluate
import settings
from common import run, small_presets
from support.cli import UserError
from tools import exercises, reward_report
from tools.exercise_list import EXERCISES

ROOT = Path(__file__).parents[1]
BY_NAME = {e.name: e for e in EXERCISES}
NAMES = list(BY_NAME)


def call(folder, *command):
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course") / "student"
    exercises.make(Namespace(dir=folder))
    return folder


@cache
def solution(place: str) -> str:
    """The source of a function, with its decorators."""
    source = (ROOT / f"{place.split('.')[0]}.py").read_text()
    node = exercises.find(ast.parse(source), place)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return dedent("\n".join(source.splitlines()[first - 1:node.end_lineno]) + "\n")


def installed(place: str, function):
    """A patch that puts a function in the place of an exercise's: its source, or the thing."""
    module, *owner, name = place.split(".")
    module = importlib.import_module(module)
    if isinstance(function, str):
        made, function = {}, indent(function, "    ")           # __class__ is for super()
        exec(f"def make(__class__):\n{function}\n    return {name}", vars(module), made)
        function = made["make"](getattr(module, owner[0]) if owner else None)
    return patch.object(getattr(module, owner[0]) if owner else module, name, function)


def missing(*_, **__):
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------
# The copy

def test_the_copy_is_complete_without_solutions(copy):
    assert "--mode" in call(copy, "train.py", "--help")
    assert not (copy / ".git").exists() and not (copy / exercises.GUIDE).exists()


ALONE = """
import sys
sys.path.append(sys.argv[1] + "/tests")         # after the copy's own folder
import test_exercises as t
assert t.exercises.ROOT.samefile(".")
t.exercises.check(t.Namespace(only=[], json=sys.argv[2]))
for e in t.EXERCISES:
    with t.installed(e.place, t.solution(e.place)):
        print(e.name, *t.exercises.run_check(e))
"""


def test_the_copy_scores_nothing_and_each_solution_passes_alone(copy, tmp_path):
    """One process of the student's copy, in which then one body at a time is put back."""
    said = call(copy, "-c", ALONE, str(ROOT), str(tmp_path / "new" / "score.json")).splitlines()
    assert said[len(NAMES):] == [f"score: 0 of {len(NAMES)} (0 %)",
                                 *(f"{name} passed " for name in NAMES)]
    found = json.loads((tmp_path / "new" / "score.json").read_text())
    assert found["score"] == 0 and [row["name"] for row in found["tests"]] == NAMES
    assert all(row["output"].startswith("not done. exercise " + row["name"])
               for row in found["tests"])


def test_the_original_passes_and_no_solution_is_needed_for_another(capsys):
    for exercise in EXERCISES:
        with ExitStack() as stack:
            for other in EXERCISES:
                if other is not exercise:
                    stack.enter_context(installed(other.place, missing))
            assert exercises.run_check(exercise) == ("passed", "")
    exercises.check(Namespace(only=["sigma", "ssim"], json=None))
    assert "score: 2 of 2 (100 %)" in capsys.readouterr().out


def code_lines(place: str) -> list[str]:
    """The lines of a solution, without docstring, comments and spaces."""
    tree = ast.parse(solution(place))
    tree.body[0].body = tree.body[0].body[1:]
    return [line.replace(" ", "") for line in ast.unparse(tree).splitlines()
            if not line.lstrip().startswith(("def ", "@"))]


def test_no_file_of_the_copy_holds_a_line_of_a_solution(copy):
    """Lines that say something: longer than 25 characters, and not also outside the exercises."""
    everywhere = {path: path.read_text() for path in copy.rglob("*") if path.suffix != ".png"
                  and path.is_file() and "__pycache__" not in path.parts}
    for exercise in EXERCISES:
        for line in code_lines(exercise.place):
            holds = [path.name for path, text in everywhere.items()
                     if len(line) > 25 and line in text.replace(" ", "")]
            assert not holds, (exercise.name, line)


def test_make_refuses_what_is_in_the_way(copy, tmp_path):
    with pytest.raises(UserError, match="student: not empty"):
        exercises.make(Namespace(dir=copy))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: not a folder"):
        exercises.make(Namespace(dir=tmp_path / "file"))
    with patch.object(exercises, "ROOT", copy), pytest.raises(UserError, match="student's copy"):
        exercises.make(Namespace(dir=tmp_path / "new"))


def test_hints_list_and_experiments(capsys):
    exercises.show(None)
    said = capsys.readouterr().out
    assert all(f"  {name}, " in said for name in NAMES) and len(NAMES) >= 16
    exercises.hint(Namespace(name="sigma", number=2))
    assert capsys.readouterr().out == BY_NAME["sigma"].hints[1] + "\n"
    with pytest.raises(UserError, match="sigmas: no such exercise"):
        exercises.hint(Namespace(name="sigmas", number=1))
    guide = (ROOT / exercises.GUIDE).read_text()
    for exercise in EXERCISES:
        assert len(exercise.hints) == 2 and exercise.set in ("diffusion", "policy", "rewards")
        assert f"`{exercise.name}`" in guide
        _, *words = shlex.split(exercise.experiment)        # each command has known flags
        if words[0] == "train.py":
            settings.parse(words[1:])
        elif words[0] == "evaluate.py":
            evaluate.parser().parse_args(words[1:])
        else:
            assert words[:2] == ["-m", "tools.reward_report"]
            reward_report.parser().parse_args(words[2:])


def test_the_score_is_the_distance_beyond_the_sft_samplers_frontier(tmp_path, capsys):
    with small_presets():
        run("sft", tmp_path / "sft")
        run("sft", tmp_path / "wide", "--channels", "16")

    class Likeness(torch.nn.Module):
        def __init__(self, *_):
            super().__init__()

        def forward(self, x, y):
            return 1 - (x - y).abs().mean(dim=(1, 2, 3))
    given = ["score", str(tmp_path / "sft/last.pt"), "--sft", str(tmp_path / "sft/last.pt"),
             "--n", "4", "--device", "cpu"]
    args = exercises.parser().parse_args(given)
    capsys.readouterr()
    with patch("tools.exercise_score.LPIPS", Likeness):
        exercises.score(args)
        said = capsys.readouterr().out.splitlines()
        assert said[1].split()[1:] == said[2].split()[1:]       # SFT against itself
        assert float(said[-1].split()[1]) <= 0                  # nothing is beyond its own frontier
        args.ckpt = str(tmp_path / "wide/last.pt")
        with pytest.raises(UserError, match="another network .* in channels"):
            exercises.score(args)
        with installed(BY_NAME["sample"].place, missing), \
                pytest.raises(UserError, match="needs the finished code"):
            exercises.score(exercises.parser().parse_args(given))


# ---------------------------------------------------------------------------------------------
# Wrong solutions: (exercise, what stands in the right one, what stands there now, a word that the
# message must have). Each is a mistake that people make.

Z, POLICY = "sigma * gaussian(x, generator)", "self.policy(x, lq, *self.schedule[-1])"
PAIRS = "(pair_loss(photo, worse) + pair_loss(photo, worst)) / 2"
CLIPPED = "torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))"
WRONG = [
    ("schedule", "tau[1:]))", "tau[1:]))[::-1]", "noisiest"),
    ("schedule", "(K - k) / K) - 1", "(K - k - 1) / K)", "999"),
    ("schedule", "+ [-1]", "+ [0]", "clean"),
    ("schedule", "round(", "int(", "rounding"),
    ("schedule", "tau[1:]", "[-1] * K", "one before"),
    ("schedule", "not 1 <= K <= self.T", "False", "impossible"),
    ("q_sample", "a.sqrt() * x0 + (1 - a).sqrt() * z", "a * x0 + (1 - a) * z", "variance"),
    ("q_sample", "(1 - a).sqrt()", "(1 - a)", "variance"),
    ("q_sample", "a.sqrt() * x0 + (1 - a).sqrt() * z", "(1 - a).sqrt() * x0 + a.sqrt() * z",
     "signal"),
    ("q_sample", "abar_at(t, x0)", "abar_at(t[:1], x0)", "own level"),
    ("v_loss", "a.sqrt() * z - (1 - a).sqrt() * gt", "z", "target"),
    ("v_loss", "a.sqrt() * z - (1 - a).sqrt() * gt", "gt", "target"),
    ("v_loss", "a.sqrt() * z - (1 - a).sqrt() * gt", "a.sqrt() * gt - (1 - a).sqrt() * z",
     "places"),
    ("v_loss", "a.sqrt() * z - ", "a.sqrt() * z + ", "target"),
    ("v_loss", ".mean(dim=(1, 2, 3))", ".sum(dim=(1, 2, 3))", "mean"),
    ("v_loss", ".mean(dim=(1, 2, 3))", ".mean()", "each image"),
    ("v_loss", "(len(gt),)", "(1,)", "own level"),
    ("v_loss", "z), lq, t)", "z), gt, t)", "restores lq"),
    ("v_loss", "randint(self.T,", "randint(self.T - 1,", "levels"),
    ("v_loss", ", generator=generator).to", ").to", "same generator"),
    ("sigma", "self.levels(t, s)", "self.levels(t, t - 1 if s >= 0 else s)", "skip"),
    ("sigma", "((1 - a_prev) / (1 - a)).sqrt() * (1 - a / a_prev).sqrt()",
     "(1 - a_prev) / (1 - a) * (1 - a / a_prev)", "variance"),
    ("sigma", "return eta * ", "return ", "eta"),
    ("sigma", "(1 - a / a_prev)", "(1 - a)", "posterior"),
    ("ddim_mean", "_, a_prev", "a_prev, _", "arrives"),
    ("ddim_mean", " - self.sigma(t, s, eta) ** 2", "", "eta is ignored"),
    ("ddim_mean", "(t, s, eta) ** 2", "(t, s, eta)", "add up"),
    ("ddim_mean", ".clamp(min=0)", "", "Rounding"),
    ("ddim_mean", "a_prev.sqrt() * x0", "a_prev * x0", "share"),
    ("ddim_step", "eps, x0_hat =", "x0_hat, eps =", "places"),
    ("ddim_step", "* x - (1 - a)", "* x + (1 - a)", "rotat"),
    ("ddim_step", "return self", "x0_hat = x0_hat.clamp(-1, 1)\n    return self", "clamped"),
    ("ddim_step", "(len(x),), t,", "(len(x),), s,", "before"),
    ("ddim_step", "self.sigma(t, s, eta)", "self.sigma(t, s, 1.0)", "this eta"),
    ("sample", "mu if s < 0 else mu", "mu", "adds no noise"),
    ("sample", "x.clamp(-1, 1)", "x", "clamped"),
    ("sample", "self.schedule(K)", "self.schedule(K)[::-1]", "order"),
    ("sample", "x = gaussian(lq, generator)", "x = lq", "pure noise"),
    ("sample", "x = gaussian(lq, generator)", "x = lq + gaussian(lq, generator)", "pure noise"),
    ("sample", "@torch.no_grad()\n", "", "gradient"),
    ("sample", f"mu + {Z}", "mu", "explore"),
    ("sample", Z, "sigma * torch.randn_like(x)", "same generator"),
    ("sample", Z, "sigma * gaussian(x, torch.Generator().manual_seed(0))", "fresh"),
    ("sample", Z, f"sigma * {Z}", "standard deviation"),
    ("sample", "s, eta)", "s, 1.0)", "eta"),
    ("gaussian_log_prob", ".mean(", ".sum(", "sum over D"),
    ("gaussian_log_prob", ".mean(dim=(1, 2, 3))", ".mean()", "shape"),
    ("gaussian_log_prob", "** 2 / 2", "** 2", "half"),
    ("gaussian_log_prob", " - torch.log(sigma)", "", "depends on sigma"),
    ("gaussian_log_prob", " - math.log(2 * math.pi) / 2", "", "normalisation"),
    ("gaussian_log_prob", "((x - mu) / sigma) ** 2", "(x - mu) ** 2 / sigma", "squared"),
    ("gaussian_log_prob", "= x.float(), mu.float(), sigma.float()", "= x, mu, sigma", "float32"),
    ("group_advantages", "rewards.mean(dim=1, keepdim=True)", "rewards.mean()", "own group"),
    ("group_advantages", "keepdim=True, correction=0)", "keepdim=True)", "of a sample"),
    ("group_advantages", "(scale + ADV_EPS)", "scale", "bounded"),
    ("group_advantages", "torch.where(group_std < MIN_STD, 0.0, centred / (scale + ADV_EPS))",
     "centred / (scale + ADV_EPS)", "exactly 0"),
    ("group_advantages", "else rewards.std(correction=0)", "else group_std", "all rewards"),
    ("group_advantages", "centred / (scale + ADV_EPS)", "centred", "units"),
    ("noise_level_weights", "sigma.mean()", "sigma.sum()", "average"),
    ("noise_level_weights", "sigma / sigma.mean()", "sigma.mean() / sigma", "noisy"),
    ("noise_level_weights", "sigma / sigma.mean()", "sigma ** 2 / (sigma ** 2).mean()",
     "standard deviation"),
    ("clipped_loss", "maximum", "minimum", "trust region"),
    ("clipped_loss", "-advantage", "advantage", "better actions"),
    ("clipped_loss", "(log_prob - old)", "(log_prob - old).detach()", "detached"),
    ("clipped_loss", CLIPPED, "-advantage * ratio", "trust region"),
    ("clipped_loss", CLIPPED, "-advantage * ratio.clamp(1 - clip, 1 + clip)", "come back"),
    ("clipped_loss", "torch.exp(log_prob - old)", "log_prob / old", "logarithms"),
    ("clipped_loss", "log_prob - old", "old - log_prob", "new to old"),
    ("clipped_loss", "return loss, ratio", "return loss, ratio.clamp(1 - clip, 1 + clip)",
     "without the clip"),
    ("gt_likelihood_loss", ".clamp(max=0)", "", "exceed 1"),
    ("gt_likelihood_loss", "1 - torch.exp", "torch.exp", "fall"),
    ("gt_likelihood_loss", "log_prob / GT_TEMPERATURE", "log_prob", "temperature"),
    ("gt_likelihood_loss", "1 - torch.exp((log_prob / GT_TEMPERATURE).clamp(max=0))", "-log_prob",
     "[0, 1]"),
    ("rollout", "in self.schedule[:-1]", "in self.schedule[::-1][1:]", "order"),
    ("rollout", "gaussian_log_prob(action,", "gaussian_log_prob(mu,", "action taken"),
    ("rollout", "(action, mu, sigma)", "(action, mu, sigma ** 2)", "same step"),
    ("rollout", "x, action, log_prob", "action, action, log_prob", "before the step"),
    ("rollout", "@torch.no_grad()\n", "", "gradient"),
    ("rollout", "mu + sigma * gaussian(x, self.generator)", "mu", "explore"),
    ("rollout", "x = action\n", "x = mu\n", "one trajectory"),
    ("rollout", POLICY, f"{POLICY}\n    restored = restored + .1 * gaussian(x, self.generator)",
     "adds no noise"),
    ("rollout", "restored, _, _", "_, _, restored", "restored image"),
    ("gt_log_prob", "step.s", "step.t", "arrives"),
    ("gt_log_prob", "step.x_gt is None", "True", "once"),
    ("gt_log_prob", "self.diffusion.q_sample(gt, level, gaussian(gt, self.generator))", "gt",
     "noised"),
    ("gt_log_prob", "(step.x_gt, mu", "(step.action, mu", "noised ground truth"),
    ("gt_log_prob", "(step.x_gt, mu", "(step.x_gt, mu.detach()", "gradient"),
    ("branch", "(mu, self.generator)", "(mu[::G], self.generator).repeat_interleave(G, dim=0)",
     "own noise"),
    ("branch", "(action, mu, sigma)", "(mu, mu, sigma)", "each member's action"),
    ("branch", "self.policy(action,", "self.policy(x,", "its own way"),
    ("branch", "x = x.repeat_interleave(G, dim=0)", "x = x.repeat(G, 1, 1, 1)", "share"),
    ("branch", "self.schedule[:-2]", "self.schedule[:-3]", "once at each step"),
    ("branch", "@torch.no_grad()\n", "", "gradient"),
    ("gaussian_kl", ".mean(", ".sum(", "sum over D"),
    ("gaussian_kl", " / 2)", ")", "half a nat"),
    ("gaussian_kl", "((mu - ref) / sigma) ** 2", "(mu - ref) ** 2 / sigma", "squared"),
    ("ssim", "x, y = (x + 1) / 2, (y + 1) / 2", "", "data range"),
    ("ssim", "(x + 1) / 2, (y + 1) / 2", "x + 1, y + 1", "data range"),
    ("ssim", "torch.exp(-d ** 2 / (2 * SSIM_SIGMA ** 2))", "torch.ones_like(d)", "Gaussian"),
    ("ssim", "s = ((2", "vx, vy, cov = (u * 121 / 120 for u in (vx, vy, cov))\n    s = ((2",
     "sample correction"),
    ("ssim", "w.view(1, 1, 1, -1))", "w.view(1, 1, 1, -1), padding=(0, 5))", "border"),
    ("ssim", "blur(x * y) - mx * my", "blur(x * y)", "equal to itself"),
    ("ssim", "s.mean(dim=(1, 2, 3))", "s.mean()", "shape"),
    ("low_pass", "stride=4", "stride=8", "every 4"),
    ("low_pass", "avg_pool2d", "max_pool2d", "mean of a window"),
    ("low_pass", "F.avg", "8 * F.avg", "gain"),
    ("low_pass", "stride=4", "stride=4, padding=2", "padding"),
    ("dwt", "3)) / 2", "3))", "[0, 1]"),
    ("dwt", ".abs()", ".square()", "sharpness"),
    ("dwt", "-LOW_PASS_SHARPNESS", "-15", "sharpness"),
    ("dwt", "low_pass(x) - low_pass(y)", "x - y", "low-pass"),
    ("dwt", ".abs().mean(dim=(1, 2, 3))", ".mean(dim=(1, 2, 3)).abs()", "cancel"),
    ("pair_loss", "worse - better", "better - worse", "wrong way"),
    ("pair_loss", ".mean()", ".sum()", "mean over the pairs"),
    ("pair_loss", "F.softplus(worse - better)", "-torch.log(torch.sigmoid(better - worse))",
     "finite"),
    ("pair_loss", "F.softplus(worse - better)", "F.relu(1 + worse - better)", "logit"),
    ("roll", "@torch.no_grad()\n", "", "late step"),
    ("roll", "torch.rand((), generator=self.generator).item()", "1.0", "new eta"),
    ("roll", "schedule[:k]", "schedule", "k steps"),
    ("roll", "schedule[:k]", "schedule[-k:]", "k steps"),
    ("roll", "x = gaussian(lq, self.generator)", "x = lq", "pure noise"),
    ("refl_losses", "self.reward(x0_hat,", "self.reward(x0_hat.detach(),", "detached"),
    ("refl_losses", "with block_outputs", "with torch.no_grad(), block_outputs", "No gradient"),
    ("refl_losses", "sum(self.reward.weights.values()) - total.mean()", "total.mean()", "raise"),
    ("refl_losses", "_, _, x0_hat", "x0_hat, _, _", "mean mu"),
    ("refl_losses", "self.schedule[k]", "self.schedule[-1]", "step k"),
    ("refl_losses", "features, frozen)", "[u.detach() for u in features], frozen)", "regularises"),
    ("refl_losses", "self.frozen", "self.net", "frozen network"),
    ("refl_losses", "if self.settings.denoise_weight", "if True", "not computed"),
    ("refl_losses", "structure_loss(x0_hat, gt)", "structure_loss(x0_hat, lq)", "photo"),
    ("update_frm", PAIRS, "(pair_loss(worse, photo) + pair_loss(worst, photo)) / 2", "wrong way"),
    ("update_frm", PAIRS, "pair_loss(photo, worse)", "forgets"),
    ("update_frm", PAIRS, "pair_loss(photo, worst)", "own restorations"),
    ("update_frm", "self.frm.requires_grad_(False)", "pass", "should be off"),
    ("update_frm", "p.requires_grad_(True)", "pass", "frozen"),
    ("update_frm", "self.frm_optimizer.zero_grad()", "pass", "stale"),
    ("update_frm", 'optimiser_step(self.frm_optimizer, {"frm_loss": loss})', "pass", "did not"),
    ("blend_weight", "rho / (1 + rho)", "1 / (1 + rho)", "for the hard"),
    ("blend_weight", "rho / (1 + rho)", "rho", "share"),
    ("blend_weight", "rho / (1 + rho)", "rho.clamp(max=2) / 2", "ratio"),
    ("blend_weight", 'blend == "hard"', 'blend == "easy"', "above the"),
]


@pytest.mark.parametrize("name, old, new, word", WRONG)
def test_a_wrong_solution_fails_with_a_message_about_its_idea(name, old, new, word):
    place, source = BY_NAME[name].place, solution(BY_NAME[name].place)
    assert old in source
    with installed(place, source.replace(old, new)):
        state, message = exercises.run_check(BY_NAME[name])
    assert (state, word in message) == ("wrong", True), f"{state}: {message}"


def test_every_exercise_has_wrong_solutions():
    assert {name for name, *_ in WRONG} == {*NAMES} and len(WRONG) >= 40
