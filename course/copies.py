"""Copies of the project for the course: the student's, without the answers, and what is handed in.

Steps    1. Take the code of every exercise out of the files.            `sources`, `make`
         2. A student packs what an assignment asks for.                 `submit`
         3. Gradescope takes the student's copy and two scripts.         `autograder`
A student's copy holds its own source files once more, in PRISTINE. The checks run in a tree that is
written from there, so that a file that a student renames or breaks is one exercise's matter.
"""
import ast
import io
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from course.list import EXERCISES, Exercise
from support.cli import UserError, make_folder

ROOT = Path(__file__).parents[1]
GUIDE = "docs/instructor.md"        # has the answers; a student's copy is without it
PRISTINE = "course/pristine.zip"
RENAMED = {"docs/student.md": "README.md", "course/AGENTS.md": "AGENTS.md"}
SOURCES = ("*.py", "support/*.py", "tools/__init__.py", "tools/reward_report.py", "course/*.py",
           "course/exercises.ini", "tests/exercise_checks.py", "tests/checks_*.py")
PAPERS = ("tests/requirements.txt", "requirements.txt", "LICENSE", ".gitignore", "pretrained/*",
          "docs/reference.md", "docs/metrics.md", "docs/symptoms.png", "course/assignments/*.md",
          *RENAMED)
SETUP = """#!/usr/bin/env bash
# Gradescope runs this once, when it builds the machine.
set -e
cd "$(dirname "$0")"
apt-get update && apt-get install -y python3 python3-venv
python3 -m venv .venv && .venv/bin/pip install -r tests/requirements.txt
"""
RUN = """#!/usr/bin/env bash
# Gradescope runs this for each hand-in, and reads results/results.json.
root=$(cd "$(dirname "$0")" && pwd)
cd "$root/source"
"${PYTHON:-.venv/bin/python}" -m course check "$root/submission" \\
    --json "$root/results/results.json" \\
"""


def named(names: list[str]) -> list[Exercise]:
    """The exercises with these names, or all. Raises UserError for a name that there is not."""
    known = {e.name: e for e in EXERCISES}
    for name in names:
        if name not in known:
            raise UserError(f"{name}: no such exercise; there are {', '.join(known)}")
    return [known[name] for name in names] or EXERCISES


def find(tree: ast.Module, place: str):
    """The definition of module.function or module.Class.function in the module's tree. Raises
    LookupError if it is not there."""
    node = tree
    for name in place.split(".")[1:]:
        node = next((child for child in node.body if getattr(child, "name", None) == name), None)
        if node is None:
            raise LookupError(name)
    return node


def without_body(source: str, exercise: Exercise) -> str:
    """The module's source with the code of one exercise, all below its docstring, taken out."""
    node, lines = find(ast.parse(source), exercise.place), source.splitlines()
    indent = " " * (4 * exercise.place.count("."))
    text = f'"exercise {exercise.name}: {exercise.task}")'
    raised = [f"{indent}raise NotImplementedError({text}"]
    if len(raised[0]) > 100:
        raised = [f"{indent}raise NotImplementedError(", f"{indent}    {text}"]
    return "\n".join(lines[:node.body[0].end_lineno] + raised + lines[node.end_lineno:]) + "\n"


def sources() -> dict[str, bytes]:
    """The source files of a student's copy, without the answers: name -> content."""
    if (ROOT / PRISTINE).exists():
        with ZipFile(ROOT / PRISTINE) as file:
            return {name: file.read(name) for name in file.namelist()}
    files = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
             for pattern in SOURCES for path in sorted(ROOT.glob(pattern))}
    for exercise in EXERCISES:
        files[exercise.file] = without_body(files[exercise.file], exercise)
    return {name: text.encode() for name, text in files.items()}


def write_zip(path, files: dict[str, bytes]):
    """A zip of these files, in alphabetical order, all of them executable (the scripts must be)."""
    with ZipFile(path, "w") as out:
        for name, content in sorted(files.items()):
            info = ZipInfo(name)
            info.external_attr = 0o100755 << 16
            out.writestr(info, content, ZIP_DEFLATED)


def students_copy(command: str) -> dict[str, bytes]:
    """All files of a student's copy: name -> content. Raises UserError inside such a copy."""
    if not (ROOT / GUIDE).exists():
        raise UserError(f"{command}: this is a student's copy ({GUIDE} is not here); do it in the "
                        "folder of the project")
    names = {path.relative_to(ROOT).as_posix() for pattern in PAPERS for path in ROOT.glob(pattern)}
    code, packed = sources(), io.BytesIO()
    write_zip(packed, code)
    papers = {RENAMED.get(name, name): (ROOT / name).read_bytes() for name in names}
    return code | papers | {PRISTINE: packed.getvalue()}


def make(args):
    """Write a student's copy. Raises UserError if the folder holds something already, or if this
    is a student's copy itself."""
    files, out = students_copy("make"), make_folder(args.dir, "make")
    if any(out.iterdir()):
        raise UserError(f"make {out}: not empty; name a new folder")
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    print(f"{out}: a copy with {len(EXERCISES)} exercises. In it: python -m course list")


def asked_for(assignment: str) -> list[str]:
    """The files that an assignment asks for: the code and the report, or a run and the report."""
    code = dict.fromkeys(e.file for e in EXERCISES if e.set == assignment)
    own = [*code, f"reports/{assignment}.png"] if code else [
        "runs/open/last.pt", "runs/open/metrics.csv", "runs/open/entry.json"]
    return [*own, f"reports/{assignment}.md"]


def submit(args):
    """Pack what an assignment asks for. Raises UserError if something is missing."""
    names = asked_for(args.assignment)
    missing = [name for name in names if not (ROOT / name).is_file()]
    if missing:
        raise UserError(f"submit: {', '.join(missing)} missing; course/assignments/"
                        f"{args.assignment}.md says what to hand in")
    out = Path(args.out or f"{args.assignment}.zip")
    make_folder(out.parent)
    write_zip(out, {name: (ROOT / name).read_bytes() for name in names})
    print(f"{out}: {', '.join(names)}")


def autograder(args):
    """Write the bundle that Gradescope takes: the student's copy, setup.sh and run_autograder."""
    names = [e.name for e in named(args.only) if e.set == args.set or not args.set]
    run = f"{RUN}    --limit {args.limit} --only {' '.join(names)}\n"
    make_folder(Path(args.out).parent, "autograder")
    write_zip(args.out, students_copy("autograder") | {"setup.sh": SETUP.encode(),
                                                       "run_autograder": run.encode()})
    print(f"{args.out}: for Gradescope, with {len(names)} exercises")
