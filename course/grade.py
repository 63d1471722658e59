"""Check a hand-in: a table and a score, or the JSON that Gradescope reads.

Steps    1. Write a fresh tree: the student's copy, without any answer.          `check`
         2. In it run each check in a process of its own, with a time limit.     `start`, `finish`
         3. Print each row as soon as it is known.                               `say`
What an answer does ends with its process: only its own row is affected.
"""
import json
import os
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

from course.copies import named, sources
from course.list import Exercise
from support.cli import UserError, make_folder

AT_ONCE = 4             # ours: processes, each of about 400 MB


def start(exercise: Exercise, handin: Path, tree: Path):
    """The process of one check, and the file that its result goes to."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"PYTHONPATH": os.pathsep.join([str(tree), str(tree / "tests")]),
            "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    result = tree / f"{exercise.name}.json"
    command = [sys.executable, "-B", "-m", "course.one", exercise.name, str(handin), str(result)]
    return subprocess.Popen(
        command, cwd=tree, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True), result


def stop(process):
    """End a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    except ProcessLookupError:
        pass
    process.wait()


def finish(process, result: Path, deadline: float) -> tuple[str, str, str]:
    """Wait for a check: its state, what is to be said about it, and what the answer printed."""
    try:
        code = process.wait(max(0, deadline - monotonic()))
    except subprocess.TimeoutExpired:
        return "error", "stopped at the time limit; is there an endless loop?", ""
    finally:
        stop(process)
    try:
        state, text, printed = json.loads(result.read_text())
    except (OSError, ValueError, TypeError):
        return "error", f"the answer ended the process of its check (exit code {code})", ""
    return state, text, printed


def run_all(exercises: list[Exercise], handin: Path, tree: Path, limit: float):
    """The result of each exercise, in their order. Some are checked at once, ahead of it."""
    waiting, running = deque(exercises), deque()
    try:
        while waiting or running:
            while waiting and len(running) < min(AT_ONCE, os.cpu_count()):
                running.append((*start(waiting.popleft(), handin, tree), monotonic() + limit))
            yield finish(*running[0])
            running.popleft()
    finally:
        for process, *_ in running:
            stop(process)


def say(text: str):
    """Print a line now. If nobody reads any more (| head -1), go on without."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check(args):
    """Run the checks, print a table and the score, and write the JSON. Raises UserError if the JSON
    cannot be written, or if there is no hand-in."""
    handin, rows, chosen = Path(args.handin).resolve(), [], named(args.only)
    if not handin.exists():
        raise UserError(f"check {args.handin}: no such folder or zip")
    if args.json:
        if Path(args.json).is_dir():
            raise UserError(f"--json {args.json}: a folder; name a file")
        make_folder(Path(args.json).parent, "--json")
        Path(args.json).unlink(missing_ok=True)         # of an earlier check
    with TemporaryDirectory() as tree:
        for name, content in sources().items():
            (Path(tree) / name).parent.mkdir(exist_ok=True)
            (Path(tree) / name).write_bytes(content)
        for e, (state, text, printed) in zip(
                chosen, run_all(chosen, handin, Path(tree), args.limit)):
            say(f"{e.name:20} {e.set:10} {state:9} {text if state != 'not done' else ''}".rstrip())
            if printed:
                say("    printed: " + printed.strip().replace("\n", "\n    "))
            passed = state == "passed"
            rows.append({"name": e.name, "score": e.points * passed, "max_score": e.points,
                         "status": "passed" if passed else "failed", "tags": [e.set],
                         "output": f"{state}. {text}\n{printed}".strip()})
    score, most = (sum(row[key] for row in rows) for key in ("score", "max_score"))
    done = sum(row["status"] == "passed" for row in rows)
    say(f"score: {score} of {most} points ({done} of {len(rows)} exercises)")
    if args.json:
        Path(args.json).write_text(json.dumps({"score": score, "tests": rows}, indent=1) + "\n")
