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
from common import SMALL, run, small_presets
from support.cli import UserError
from tools import exercises, reward_report
from tools.exercise_list import EXERCISES
from wrong_solutions import WRONG

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
    assert (copy / "README.md").read_text() == (ROOT / "docs/student.md").read_text()
    done = subprocess.run([sys.executable, "train.py", "--mode", "sft", *SMALL, "--faces", "24"],
                          cwd=copy, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().startswith("error: exercise ")
    assert "\n" not in done.stderr.strip()


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


# ---------------------------------------------------------------------------------------------
# Wrong solutions

@pytest.mark.parametrize("name, old, new, word", WRONG)
def test_a_wrong_solution_fails_with_a_message_about_its_idea(name, old, new, word):
    place, source = BY_NAME[name].place, solution(BY_NAME[name].place)
    assert old in source
    with installed(place, source.replace(old, new)):
        state, message = exercises.run_check(BY_NAME[name])
    assert (state, word in message) == ("wrong", True), f"{state}: {message}"


def test_every_exercise_has_wrong_solutions():
    assert {name for name, *_ in WRONG} == {*NAMES} and len(WRONG) >= 40
