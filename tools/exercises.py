"""The exercises of the course: a student's copy of the project, its checks, hints and the score.

    python -m tools.exercises make DIR          a student's copy: the code of the exercises is out
    python -m tools.exercises list              the exercises, in order
    python -m tools.exercises hint NAME N       the first or the second hint
    python -m tools.exercises check [--only NAME ...] [--json FILE]
    python -m tools.exercises score CKPT --sft SFT_CKPT [--seed S] [--lpips_weights FILE]

Run them in the folder of the project or of the copy. `check` runs every exercise by itself: no
check needs the solution of another exercise. The JSON has the fields that Gradescope reads.
`score` is for the open assignment, to train the best restorer.
"""
import argparse
import ast
import importlib
import json
import shutil
import sys
from pathlib import Path

from support.cli import (ModelSettings, UserError, add_flags, make_folder, positive, run_main,
                         seed_number, settings_fields)
from tools.exercise_list import EXERCISES, Exercise

ROOT = Path(__file__).parents[1]
GUIDE = "docs/instructor.md"        # has the answers; a student's copy is without it
STUDENTS_README = "docs/student.md"
COPIED = ("*.py", "support/*.py", "tools/*.py", "tests/exercise_checks.py", "tests/checks_*.py",
          "tests/requirements.txt", "requirements.txt", "LICENSE", ".gitignore",
          "docs/reference.md", "docs/metrics.md", "docs/*.png")
LEFT_OUT = ("tools/throughput.py", "tools/tables.py", "tools/trials.py", "docs/long.png",
            "docs/refl.png", "docs/refl_curves.png")
SCORE_SEED = 1_000_003      # of the new faces, unless the instructor chooses another


def named(names: list[str]) -> list[Exercise]:
    """The exercises with these names, or all. Raises UserError for a name that there is not."""
    known = {e.name: e for e in EXERCISES}
    for name in names:
        if name not in known:
            raise UserError(f"{name}: no such exercise; there are {', '.join(known)}")
    return [known[name] for name in names] or EXERCISES


# ---------------------------------------------------------------------------------------------
# The student's copy

def find(tree: ast.Module, place: str) -> ast.FunctionDef:
    """The definition of module.function or module.Class.function in the module's tree."""
    node = tree
    for name in place.split(".")[1:]:
        node = next(child for child in node.body if getattr(child, "name", None) == name)
    return node


def body(source: str, place: str) -> tuple[int, int]:
    """The lines of a function's code below its docstring, as a slice (start, stop)."""
    node = find(ast.parse(source), place)
    return node.body[0].end_lineno, node.end_lineno


def without_body(source: str, exercise: Exercise) -> str:
    """The module's source with the code of one exercise taken out."""
    start, stop = body(source, exercise.place)
    lines = source.splitlines()
    indent = " " * (4 * exercise.place.count("."))
    text = f'"exercise {exercise.name}: {exercise.task}")'
    raised = [f"{indent}raise NotImplementedError({text}"]
    if len(raised[0]) > 100:
        raised = [f"{indent}raise NotImplementedError(", f"{indent}    {text}"]
    return "\n".join(lines[:start] + raised + lines[stop:]) + "\n"


def make(args):
    """Write a student's copy. Raises UserError if the folder holds something already, or if this
    is a student's copy itself."""
    if not (ROOT / GUIDE).exists():
        raise UserError(f"make: this is a student's copy ({GUIDE} is not here); make another one "
                        "in the folder of the project")
    out = make_folder(args.dir, "make")
    if any(out.iterdir()):
        raise UserError(f"make {out}: not empty; name a new folder")
    files = {path.relative_to(ROOT).as_posix(): path
             for pattern in COPIED for path in sorted(ROOT.glob(pattern))}
    for name in files.keys() - {*LEFT_OUT}:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(files[name], out / name)
    shutil.copyfile(ROOT / STUDENTS_README, out / "README.md")
    for exercise in EXERCISES:
        path = out / f"{exercise.place.split('.')[0]}.py"
        path.write_text(without_body(path.read_text(), exercise))
    print(f"{out}: a copy with {len(EXERCISES)} exercises. In it: python -m tools.exercises list")


# ---------------------------------------------------------------------------------------------
# The checks

def run_check(exercise: Exercise) -> tuple[str, str]:
    """("passed", "not done", "wrong" or "error", and what is to be said about it)."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))
    try:
        checks = importlib.import_module(f"checks_{exercise.set}")
        getattr(checks, f"check_{exercise.name}")()
    except NotImplementedError as error:
        if str(error).startswith(f"exercise {exercise.name}:"):
            return "not done", str(error)
        return "error", f"NotImplementedError: {error}"
    except ModuleNotFoundError as error:
        raise UserError(f"check: {error.name} is not installed; pip install -r "
                        "tests/requirements.txt") from None
    except AssertionError as error:
        return "wrong", str(error)
    except Exception as error:      # whatever a student's code raises is a finding, not the end
        return "error", f"{type(error).__name__}: {error}"
    return "passed", ""


def check(args):
    """Run the checks, print a table and the score, and write the JSON."""
    results = [(e, *run_check(e)) for e in named(args.only)]
    for e, state, text in results:
        print(f"{e.name:20} {e.set:10} {state:9} {text if state != 'not done' else ''}".rstrip())
    passed = sum(state == "passed" for _, state, _ in results)
    print(f"score: {passed} of {len(results)} ({100 * passed / len(results):.0f} %)")
    if args.json:
        rows = [{"name": e.name, "score": int(state == "passed"), "max_score": 1,
                 "status": "passed" if state == "passed" else "failed",
                 "output": f"{state}. {text}".strip(), "tags": [e.set]}
                for e, state, text in results]
        make_folder(Path(args.json).parent, "--json")
        Path(args.json).write_text(json.dumps({"score": passed, "tests": rows}, indent=1) + "\n")


def show(args):
    """Print the exercises of each set: minutes, what it teaches, the experiment."""
    for kind in dict.fromkeys(e.set for e in EXERCISES):
        chosen = [e for e in EXERCISES if e.set == kind]
        print(f"\n{kind}: {len(chosen)} exercises, {sum(e.minutes for e in chosen)} minutes")
        for e in chosen:
            file = e.place.split(".")[0] + ".py"
            print(f"  {e.name}, {e.minutes} min, {file}: {e.teaches}\n      {e.task}\n"
                  f"      Then try: {e.experiment}\n      {e.question}")
    print("\nAfter a training run: python evaluate.py --ckpt runs/sft/last.pt runs/NAME/last.pt "
          "--frontier")


def hint(args):
    """Print one hint."""
    print(named([args.name])[0].hints[args.number - 1])


def score(args):
    """Print the score of a checkpoint, as tools/exercise_score.py says."""
    from tools.exercise_score import score_checkpoint   # here: torch is slow to import
    score_checkpoint(args)


def parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    p = argparse.ArgumentParser(prog="python -m tools.exercises", description="The course.")
    commands = p.add_subparsers(required=True, metavar="make|list|hint|check|score")

    def command(run, name, text):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub
    command(make, "make", "write a student's copy").add_argument("dir", help="a new folder")
    command(show, "list", "list the exercises")
    sub = command(hint, "hint", "print a hint")
    sub.add_argument("name", help="of the exercise")
    sub.add_argument("number", type=int, choices=[1, 2], help="1, then 2")
    sub = command(check, "check", "check the exercises")
    sub.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these exercises alone")
    sub.add_argument("--json", help="a file for an autograder")
    sub = command(score, "score", "score a checkpoint of the open assignment")
    sub.add_argument("ckpt", help="the checkpoint")
    sub.add_argument("--sft", required=True, help="the SFT checkpoint that all start from")
    sub.add_argument("--seed", type=seed_number, default=SCORE_SEED,
                     help=f"of the faces, their degradation and the noise ({SCORE_SEED})")
    sub.add_argument("--n", type=positive, default=200, help="how many faces (200)")
    flags = settings_fields(ModelSettings)
    add_flags(sub, {name: flags[name] for name in ("lpips_net", "lpips_weights", "device")})
    return p


def main():
    args = parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    run_main(main)
