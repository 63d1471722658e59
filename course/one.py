"""The check of one exercise, in a process of its own: python -m course.one NAME HANDIN RESULT.

Steps    1. Take the student's function, and the new helpers that it uses.       `parts`
         2. Put it into the module of this tree, which is the instructor's.      `install`
         3. From here on refuse to open files and to start processes.            `refuse`
         4. Run the check, and write what it found to RESULT.                    `verdict`
Nothing else of a hand-in is used. A function that is bent on it can still reach the check that
calls it: they share a process (docs/instructor.md).
"""
import ast
import contextlib
import importlib
import io
import json
import linecache
import os
import sys
import traceback
import warnings
from pathlib import Path
from zipfile import Path as ZippedPath
from zipfile import is_zipfile

from course.copies import ROOT, find
from course.list import EXERCISES, Exercise

LONGEST = 300           # characters of a message
PRINTED = 1000          # characters of what an answer prints
LIBRARIES = tuple(path for path in map(os.path.realpath, filter(None, sys.path))
                  if not path.startswith(os.path.realpath(ROOT)))
STARTS = {"os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system", "os.kill", "os.killpg",
          "subprocess.Popen"}


def bound(node) -> set[str]:
    """The names that an import, a definition or an assignment binds."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = getattr(node, "targets", [getattr(node, "target", node)])
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}


def used(node) -> set[str]:
    """The names that a piece of code mentions, attributes too."""
    return {getattr(n, "id", None) or getattr(n, "attr", None) for n in ast.walk(node)}


def parts(function, *bodies) -> list[list]:
    """From each list of statements those that bind a new name, one that the function or another
    part uses. A body is (statements, names that are there)."""
    new = []
    for statements, there in bodies:
        for node in statements:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                node.names = [alias for alias in node.names
                              if not bound(ast.Import([alias])) & {*there}]
        kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign,
                 ast.AnnAssign)
        new.append([node for node in statements if isinstance(node, kinds) and bound(node)
                    and not bound(node) & {*there}])
    wanted, size = used(function), -1
    while len(wanted) > size:
        size = len(wanted)
        wanted |= {name for nodes in new for node in nodes if bound(node) & wanted
                   for name in used(node)}
    return [[node for node in nodes if bound(node) & wanted] for nodes in new]


def install(exercise: Exercise, source: str):
    """Put the function of an exercise, from the source of its module, in the place of the one that
    is loaded. Its lines keep their numbers. Raises LookupError if the source does not have it."""
    module, tree = importlib.import_module(exercise.place.split(".")[0]), ast.parse(source)
    function = find(tree, exercise.place)
    _, *owner, _ = exercise.place.split(".")
    owner = getattr(module, owner[0]) if owner else module
    body = find(tree, exercise.place.rpartition(".")[0]).body if owner is not module else []
    helpers, methods = parts(function, (tree.body, vars(module)), (body, vars(owner)))
    linecache.cache[exercise.file] = len(source), None, source.splitlines(True), exercise.file

    def execute(nodes, names):
        tree = ast.fix_missing_locations(ast.Module(nodes, []))
        exec(compile(tree, exercise.file, "exec"), vars(module), names)
    execute(helpers, vars(module))
    execute([*methods, function], made := {})
    for name, value in made.items():
        setattr(owner, name, value)


def verdict(exercise: Exercise) -> tuple[str, str]:
    """("passed", "not done", "wrong" or "error", and what is to be said about it)."""
    from exercise_checks import Call
    call = Call(exercise)
    try:
        getattr(importlib.import_module(f"checks_{exercise.set}"), f"check_{exercise.name}")(call)
        call.finish()
    except BaseException as error:      # whatever a student's code raises is a finding, not the end
        return judged(exercise, error)
    return "passed", ""


def judged(exercise: Exercise, error: BaseException) -> tuple[str, str]:
    """What an exception says about an answer. A check's own sentence stands alone; to any other the
    student's file and line are added."""
    said, frames = str(error)[:LONGEST].strip(), traceback.extract_tb(error.__traceback__)
    if isinstance(error, NotImplementedError) and said.startswith(f"exercise {exercise.name}:"):
        return "not done", said
    if isinstance(error, AssertionError) and Path(frames[-1].filename).parent.name == "tests":
        return "wrong", said
    own = [frame for frame in frames if frame.filename == exercise.file]
    where = f" ({exercise.file}, line {own[-1].lineno}: {(own[-1].line or '')[:80]})" if own else ""
    said = ": " * bool(said) + " ".join(said.split())
    return "error", f"{type(error).__name__}{said}{where}"


def refuse(event: str, given: tuple):
    """An audit hook: no new process, and no file but the installed packages', to read."""
    if event == "open" and not isinstance(given[0], int) and (
            given[2] & (os.O_WRONLY | os.O_RDWR)
            or not os.path.realpath(os.fsdecode(given[0])).startswith(LIBRARIES)):
        raise PermissionError(f"an answer may open no file, not {os.fsdecode(given[0])}")
    if event in STARTS:
        raise PermissionError(f"an answer may start no process ({event})")


class Printed(io.StringIO):
    """Keeps the beginning of what is printed."""

    def write(self, text: str) -> int:
        """As that of a file."""
        super().write(text[:max(0, PRINTED - self.tell())])
        return len(text)


def checked(exercise: Exercise, handin: Path, watched: list) -> tuple[str, str]:
    """As `verdict`, for the hand-in, a folder or a zip. While `watched` is not empty, `refuse`
    is at work."""
    place = (ZippedPath(handin) if is_zipfile(handin) else handin) / exercise.file
    if not place.exists():
        return "error", f"{exercise.file} is not in {handin.name}"
    source, given = (path.read_text(encoding="utf-8") for path in (place, ROOT / exercise.file))
    try:
        mine, empty = (find(ast.parse(text, exercise.file), exercise.place)
                       for text in (source, given))
    except LookupError as error:
        return "error", f"{exercise.file} has no {error.args[0]}"
    if ast.dump(mine) == ast.dump(empty):
        return "not done", f"exercise {exercise.name}: {exercise.task}"
    importlib.import_module(f"checks_{exercise.set}")
    watched.append(True)
    install(exercise, source)
    return verdict(exercise)


def main(name: str, handin: str, result: str):
    exercise, watched = next(e for e in EXERCISES if e.name == name), []
    sys.addaudithook(lambda event, given: watched and refuse(event, given))
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(Printed()) as printed, contextlib.redirect_stderr(printed):
        try:
            state, text = checked(exercise, Path(handin), watched)
        except BaseException as error:      # of the student's syntax or imports
            state, text = judged(exercise, error)
    watched.clear()
    Path(result).write_text(json.dumps([state, text, printed.getvalue()]))
    os._exit(0)         # nothing of the answer, a thread for one, may hold this process up


if __name__ == "__main__":
    main(*sys.argv[1:])
