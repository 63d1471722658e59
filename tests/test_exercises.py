"""The course: the student's copy has no solution, the checks pass what is right and fail what is
wrong, each exercise by itself."""
import ast
import functools
import importlib
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from textwrap import dedent, indent
from unittest.mock import patch

import pytest
import torch

import evaluate
import settings
from common import SMALL
from course import __main__ as course
from course import copies, one
from course.list import EXERCISES
from exercise_checks import starts_as_noise, tensors, uniform
from right_solutions import RIGHT
from support.cli import UserError
from tools import reward_report
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
    copies.make(Namespace(dir=folder))
    return folder


@cache
def solution(place: str) -> str:
    """The source of a function, with its decorators."""
    source = (ROOT / f"{place.split('.')[0]}.py").read_text()
    node = copies.find(ast.parse(source), place)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return dedent("\n".join(source.splitlines()[first - 1:node.end_lineno]) + "\n")


def owner_of(exercise):
    module, *owner, name = exercise.place.split(".")
    module = importlib.import_module(module)
    return getattr(module, owner[0]) if owner else module, name


@contextmanager
def installed(exercise, function, before=""):
    """Puts a function in the place of an exercise's: its source, after other lines, or the thing
    itself."""
    owner, name = owner_of(exercise)
    with patch.object(owner, name, function):
        if isinstance(function, str):
            _, *owners, _ = exercise.place.split(".")
            text = f"class {owners[0]}:\n" + indent(function, "    ") if owners else function
            one.install(exercise, before + text)
        yield


def missing(*_, **__):
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------
# The copy

def test_the_copy_is_complete_without_solutions(copy):
    assert "--mode" in call(copy, "train.py", "--help")
    assert not (copy / ".git").exists() and not (copy / copies.GUIDE).exists()
    assert (copy / "README.md").read_text() == (ROOT / "docs/student.md").read_text()
    assert (copy / "AGENTS.md").read_text() == (ROOT / "course/AGENTS.md").read_text()
    assert (copy / "pretrained/faces64.pt").exists()
    for path in copy.glob("docs/*.md"):
        for picture in re.findall(r"\]\(([\w.]+png)\)", path.read_text()):
            assert (path.parent / picture).exists()
    done = subprocess.run([sys.executable, "train.py", "--mode", "sft", *SMALL, "--faces", "24"],
                          cwd=copy, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().startswith("error: exercise ")
    assert "\n" not in done.stderr.strip()


ALONE = """
import sys
sys.path.append(sys.argv[1] + "/tests")         # after the copy's own folder
import test_exercises as t
assert t.copies.ROOT.samefile(".")
for e in t.EXERCISES:
    print(e.name, t.one.verdict(e)[0])
    with t.installed(e, t.solution(e.place)):
        print(e.name, *t.one.verdict(e))
"""


def test_the_copy_scores_nothing_and_each_solution_passes_alone(copy):
    """One process of the student's copy, in which then one body at a time is put back."""
    said = call(copy, "-c", ALONE, str(ROOT)).splitlines()
    assert said == [line for name in NAMES for line in (f"{name} not done", f"{name} passed ")]


def test_the_original_passes_and_no_solution_is_needed_for_another():
    for exercise in EXERCISES:
        with ExitStack() as stack:
            for other in EXERCISES:
                if other is not exercise:
                    stack.enter_context(installed(other, missing))
            assert one.verdict(exercise) == ("passed", "")


def code_lines(place: str) -> list[str]:
    """The lines of a solution, without docstring, comments and spaces."""
    tree = ast.parse(solution(place))
    tree.body[0].body = tree.body[0].body[1:]
    return [line.replace(" ", "") for line in ast.unparse(tree).splitlines()
            if not line.lstrip().startswith(("def ", "@"))]


def test_no_file_of_the_copy_holds_a_line_of_a_solution(copy):
    """Lines that say something: longer than 25 characters, and not also outside the exercises."""
    everywhere = {path: path.read_text() for path in copy.rglob("*") if path.is_file()
                  and path.suffix not in (".png", ".zip", ".pt", ".pyc")}
    with patch.object(copies, "ROOT", copy):
        everywhere |= {Path(name): text.decode() for name, text in copies.sources().items()}
    for exercise in EXERCISES:
        for line in code_lines(exercise.place):
            holds = [path.name for path, text in everywhere.items()
                     if len(line) > 25 and line in text.replace(" ", "")]
            assert not holds, (exercise.name, line)


def test_make_refuses_what_is_in_the_way(copy, tmp_path):
    with pytest.raises(UserError, match="student: not empty"):
        copies.make(Namespace(dir=copy))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: not a folder"):
        copies.make(Namespace(dir=tmp_path / "file"))
    with patch.object(copies, "ROOT", copy), pytest.raises(UserError, match="student's copy"):
        copies.make(Namespace(dir=tmp_path / "new"))


def test_hints_list_and_experiments(capsys):
    course.show(None)
    said = capsys.readouterr().out
    assert all(f"  {name}, " in said for name in NAMES) and len(NAMES) >= 16
    course.hint(Namespace(name="sigma", number=2))
    assert capsys.readouterr().out == BY_NAME["sigma"].hint_2 + "\n"
    with pytest.raises(UserError, match="sigmas: no such exercise"):
        course.hint(Namespace(name="sigmas", number=1))
    guide = (ROOT / copies.GUIDE).read_text()
    for exercise in EXERCISES:
        assert exercise.set in ("diffusion", "policy", "rewards")
        assert f"`{exercise.name}`" in guide
        _, *words = shlex.split(exercise.experiment)        # each command has known flags
        if words[0] == "train.py":
            given = settings.parse(words[1:])
            settings.method_values(settings.resolve(given.pop("mode"), given))
        elif words[0] == "evaluate.py":
            evaluate.parser().parse_args(words[1:])
        else:
            assert words[:2] == ["-m", "tools.reward_report"]
            reward_report.parser().parse_args(words[2:])


@pytest.mark.parametrize("kind", course.SETS)
def test_a_page_names_the_exercises_and_points_of_its_set(kind):
    text = (ROOT / f"course/assignments/{kind}.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    found = [(row[1].strip(" `"), int(row[2])) for row in rows if row[1].strip(" `") in BY_NAME]
    assert found == [(e.name, e.points) for e in EXERCISES if e.set == kind]
    for name in copies.asked_for(kind):
        assert f"`{name}`" in text


# ---------------------------------------------------------------------------------------------
# What the checks say

def said_of(name, source, before=""):
    """The state and the text for an answer: changes of the right one, or another source."""
    with installed(BY_NAME[name], source, before):
        return one.verdict(BY_NAME[name])


@pytest.mark.parametrize("name, old, new, word", WRONG)
def test_a_wrong_solution_fails_with_a_message_about_its_idea(name, old, new, word):
    source = solution(BY_NAME[name].place)
    assert old in source
    state, message = said_of(name, source.replace(old, new))
    assert (state, word in message) == ("wrong", True), f"{state}: {message}"


def test_every_exercise_has_wrong_solutions():
    assert {name for name, *_ in WRONG} == {*NAMES} and len(WRONG) >= 40


@pytest.mark.parametrize("name", NAMES)
def test_another_right_solution_passes(name):
    before, _, source = RIGHT[name].rpartition("# ---\n")
    assert said_of(name, source, before) == ("passed", "")


def in_place(function, *args, **named):
    result = function(*args, **named)
    tensor = next(u for u in tensors(args) if u.is_floating_point() and u.dim())
    tensor.detach().add_(.01)
    return result


def changed(result, change):
    """A result of which every floating tensor has been replaced."""
    if torch.is_tensor(result):
        return change(result) if result.is_floating_point() else result
    if isinstance(result, (tuple, list)):
        return type(result)(changed(part, change) for part in result)
    if isinstance(result, dict):
        return {key: changed(part, change) for key, part in result.items()}
    if hasattr(result, "log_prob"):
        vars(result).update(changed(vars(result), change))
    return result


def with_generator(args, work):
    """work(the function's generator, a function that replaces it in args)."""
    i = next((i for i, u in enumerate(args) if isinstance(u, torch.Generator)), None)
    given = args[0].generator if i is None else args[i]

    def run(function, other, named):
        if i is not None:
            return function(*args[:i], other, *args[i + 1:], **named)
        args[0].generator = other
        try:
            return function(*args, **named)
        finally:
            args[0].generator = given
    return work(given, run)


def seeded(function, *args, **named):
    """A generator of its own, and the caller's moves as well."""
    def work(given, run):
        torch.rand((), generator=given)
        return run(function, torch.Generator().manual_seed(5), named)
    return with_generator(args, work)


def kept(function, *args, **named):
    """The numbers of the first call, for ever; the caller's generator moves as well."""
    def work(given, run):
        state = STATES.setdefault(function, given.get_state())
        torch.rand((), generator=given)
        other = torch.Generator()
        other.set_state(state)
        return run(function, other, named)
    return with_generator(args, work)


def cloned(function, *args, **named):
    """The right numbers, but the caller's generator does not move."""
    def work(given, run):
        other = torch.Generator()
        other.set_state(given.get_state())
        return run(function, other, named)
    return with_generator(args, work)


def half_detached(function, *args, **named):
    return changed(function(*args, **named), lambda u: (u + u.detach()) / 2)


def after(action):
    def cheat(function, *args, **named):
        result = function(*args, **named)
        action()
        return result
    return cheat


STATES = {}
FLOATS = [name for name in NAMES if name not in ("schedule", "sigma")]
GRADIENT = [e.name for e in EXERCISES if e.gradient] + ["clipped_loss", "refl_losses"]
RANDOM = [e.name for e in EXERCISES if e.random]
THREE = ["sigma", "rollout", "refl_losses"]
CHEATS = [      # what an answer does beside what is right, in which exercises, words of the message
    (in_place, FLOATS, "changed in place"),
    (lambda f, *args, **named: changed(f(*args, **named), torch.Tensor.double), FLOATS, "float32"),
    (torch.no_grad(), GRADIENT, "radient"),
    (lambda f, *args, **named: changed(f(*args, **named), torch.Tensor.detach), GRADIENT,
     "radient"),
    (half_detached, GRADIENT, "radient"),
    (seeded, RANDOM, "generator"),
    (kept, RANDOM, "earlier call"),
    (cloned, RANDOM, "moved"),
    (after(lambda: torch.set_grad_enabled(False)), THREE, "grad mode"),
    (after(lambda: torch.set_default_dtype(torch.float64)), THREE, "default dtype"),
    (after(lambda: os.chdir("/")), THREE, "folder"),
    (lambda *_, **__: None, NAMES, "returned None")]


@pytest.mark.parametrize("cheat, name, word", [
    pytest.param(cheat, name, word, id=f"{name}-{i}")
    for i, (cheat, names, word) in enumerate(CHEATS) for name in names])
def test_an_answer_with_a_side_effect_fails(cheat, name, word):
    right = getattr(*owner_of(BY_NAME[name]))
    STATES.clear()
    if isinstance(cheat, torch.no_grad):
        answer = cheat(right)
    else:
        @functools.wraps(right)
        def answer(*args, **named):
            return cheat(right, *args, **named)
    with installed(BY_NAME[name], answer):
        state, message = one.verdict(BY_NAME[name])
    assert (state, word in message) == ("wrong", True), f"{state}: {message}"
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert Path.cwd() != Path("/")


def test_honest_noise_is_not_refused():
    """At the size of the checks; the bounds are six standard errors."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        x = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
        starts_as_noise(x, x)
        uniform(8, torch.randint(8, (2000,), generator=generator), "refused")


RAISES = [      # (exercise, what stands in the right solution, what instead, what is said)
    ("q_sample", "a = self", "assert x0.dim() == 3\n    a = self",
     "AssertionError (model.py, line 5: assert x0.dim() == 3)"),
    ("q_sample", "a = self", "raise ValueError('x' * 5_000_000)\n    a = self", "xxx (model.py"),
    ("rollout", "self.schedule[:-1]", "self.diffusion.steps", "no `steps`: the function can do"),
    ("sigma", "return eta", "exit(3)\n    return eta", "SystemExit: 3 (model.py, line"),
    ("sigma", "return eta", "raise KeyboardInterrupt\n    return eta", "KeyboardInterrupt (mod"),
    ("sigma", "return eta", "import nowhere\n    return eta", "No module named 'nowhere' (model"),
    ("low_pass", "return", "raise NotImplementedError\n    return", "NotImplementedError (rew")]


@pytest.mark.parametrize("name, old, new, said", RAISES)
def test_what_an_answer_raises_is_said_briefly_with_file_and_line(name, old, new, said):
    source = solution(BY_NAME[name].place)
    assert old in source
    state, message = said_of(name, source.replace(old, new))
    assert state == "error" and said in message and len(message) < 500 and "\n" not in message
