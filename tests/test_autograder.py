"""Grading: each answer has a process of its own, and nothing but the functions of a hand-in counts.
The bundle runs here as Gradescope lays it out, in a temporary folder."""
import ast
import json
import os
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path
from unittest.mock import patch

import pytest

from common import run
from course import __main__ as course
from course import board, copies, grade
from course.list import EXERCISES
from support.cli import UserError

ROOT = Path(__file__).parents[1]
BY_NAME = {e.name: e for e in EXERCISES}


def answer(folder, name, lines):
    """Begin the body of an exercise in a hand-in with these lines."""
    path = folder / BY_NAME[name].file
    source = path.read_text()
    text = source.splitlines(True)
    node = copies.find(ast.parse(source), BY_NAME[name].place)
    first = node.body[0].end_lineno
    indent = " " * node.body[0].col_offset
    path.write_text("".join(text[:first] + [f"{indent}{line}\n" for line in lines] + text[first:]))


def command(*words):
    """Run `python -m course` here."""
    args = course.parser().parse_args([*map(str, words)])
    args.run(args)


def bundle(folder, *flags):
    """Unpack the autograder as Gradescope does."""
    folder.mkdir()
    command("autograder", folder / "a.zip", *flags)
    with zipfile.ZipFile(folder / "a.zip") as packed:
        packed.extractall(folder / "source")
    (folder / "run_autograder").write_bytes((folder / "source/run_autograder").read_bytes())
    (folder / "results").mkdir()
    return folder


def graded(root, handin):
    """The points of each exercise, and what is said of it, of one hand-in. It is run in another
    folder, as Gradescope does."""
    (root / "submission").unlink(missing_ok=True)
    (root / "submission").symlink_to(handin)
    (root / "results/results.json").write_text("of an earlier run")
    subprocess.run(["bash", root / "run_autograder"], cwd="/", check=True, capture_output=True,
                   env=os.environ | {"PYTHON": sys.executable})
    found = json.loads((root / "results/results.json").read_text())
    assert found["score"] == sum(row["score"] for row in found["tests"])
    return {row["name"]: (row["score"], row["output"]) for row in found["tests"]}


@pytest.fixture
def solved(tmp_path):
    """A hand-in with every answer."""
    handin = tmp_path / "handin"
    handin.mkdir()
    for file in {e.file for e in EXERCISES}:
        (handin / file).write_text((ROOT / file).read_text())
    return handin


LOOPS = {
    "schedule": ["while True:", "    import time; time.sleep(1)"],
    "sigma": ["import time", "while True:", "    print('x' * 10 ** 7); time.sleep(.1)"]}
HOSTILE = {         # exercise: (the first lines of its body, words of what is said)
    "q_sample": (["import os", "while os.fork():", "    pass"], "may start no process"),
    "ddim_mean": (["import glob", "name = glob.glob('**/checks_diffusion.py', recursive=True)[0]",
                   "text = open(name).read()"], "may open no file"),
    "sample": (["import sys; sys.exit(0)"], "SystemExit"),
    "low_pass": (["import os; os._exit(0)"], "ended the process"),
    "gaussian_kl": (["import os, signal; os.kill(os.getppid(), signal.SIGKILL)"],
                    "may start no process"),
    "noise_level_weights": (["import os; os.chdir('/')", "print('y' * 10 ** 7)"], "folder")}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Gradescope is Linux")
def test_the_bundle_on_a_solved_an_empty_and_hostile_hand_ins(tmp_path, solved):
    root = bundle(tmp_path / "root", "--only", "clipped_loss", "low_pass", "--limit", 200)
    assert graded(root, solved) == {"clipped_loss": (4, "passed."), "low_pass": (1, "passed.")}
    copies.make(Namespace(dir=tmp_path / "empty"))
    said = graded(root, tmp_path / "empty")
    assert [score for score, _ in said.values()] == [0, 0] and all(
        text.startswith(f"not done. exercise {name}:") for name, (_, text) in said.items())

    for name, lines in LOOPS.items():       # a slow machine may not even reach them in the limit
        answer(solved, name, lines)
    root = bundle(tmp_path / "loops", "--only", *LOOPS, "--limit", 5)
    assert all(row == (0, "error. stopped at the time limit; is there an endless loop?")
               for row in graded(root, solved).values())

    for name, (lines, _) in HOSTILE.items():
        answer(solved, name, lines)
    (solved / "frm.py").write_text("def pair_loss(:")
    (solved / "darl.py").rename(solved / "Darl.py")
    (solved / "support").mkdir()
    (solved / "support/cli.py").write_text("raise SystemExit('all passed')")
    (solved / "sitecustomize.py").write_text("raise SystemExit('all passed')")
    with open(solved / "refl.py", "a") as file:
        file.write("import nowhere\nraise SystemExit\n")
    root = bundle(tmp_path / "again", "--limit", 200, "--only", *HOSTILE, "dwt", "pair_loss",
                  "blend_weight", "roll")
    said = graded(root, solved)
    for name, (_, words) in HOSTILE.items():
        assert said[name][0] == 0 and words in said[name][1] and len(said[name][1]) < 2000, said
    assert "yyy" in said["noise_level_weights"][1]
    assert said["dwt"] == (2, "passed.") and said["roll"] == (2, "passed.")
    assert "SyntaxError" in said["pair_loss"][1] and "frm.py, line 1" in said["pair_loss"][1]
    assert "darl.py is not in" in said["blend_weight"][1]


def test_helpers_imports_and_constants_are_taken_along_from_a_zip(tmp_path, solved, capsys,
                                                                  monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit")      # Python would import it
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    source = (solved / "lrpo.py").read_text()
    for old, new in (("import math\n", "import math\nimport numpy as np\nHALF = .5\n"),
                     ("@dataclass\nclass LRPOSettings",
                      "def double(u):\n    return 2 * u / np.mean(u.tolist())\n\n\n"
                      "@dataclass\nclass LRPOSettings"),
                     ("return sigma / sigma.mean()", "return HALF * double(sigma)")):
        assert old in source
        source = source.replace(old, new, 1)
    copies.write_zip(tmp_path / "a.zip", {"lrpo.py": source.encode()})
    command("check", tmp_path / "a.zip", "--limit", 200, "--only", "noise_level_weights",
            "ssim_map")
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["noise_level_weights", "policy", "passed"]
    assert "rewards.py is not in a.zip" in said[1]
    assert said[2] == "score: 1 of 9 points (1 of 2 exercises)"


def test_check_refuses_a_folder_for_its_json_and_a_hand_in_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="--json .*: a folder; name a file"):
        grade.check(Namespace(handin=tmp_path, only=[], json=str(tmp_path), limit=9))
    with pytest.raises(UserError, match="nowhere: no such folder or zip"):
        grade.check(Namespace(handin=tmp_path / "nowhere", only=[], json=None, limit=9))


def test_an_interrupted_check_leaves_no_old_json_and_no_process(tmp_path, solved):
    (tmp_path / "old.json").touch()
    with patch.object(grade, "finish", side_effect=KeyboardInterrupt) as finish, \
            pytest.raises(KeyboardInterrupt):
        grade.check(Namespace(handin=solved, only=["sigma"], json=str(tmp_path / "old.json"),
                              limit=99))
    assert not (tmp_path / "old.json").exists()
    assert finish.call_args.args[0].returncode is not None


def test_nobody_reads_the_table(tmp_path):
    copies.make(Namespace(dir=tmp_path / "empty"))
    done = subprocess.run(f"{sys.executable} -m course check --json score.json | head -1",
                          shell=True, cwd=tmp_path / "empty", capture_output=True, text=True)
    assert done.stdout.split() == ["schedule", "diffusion", "not", "done"] and not done.stderr
    found = json.loads((tmp_path / "empty/score.json").read_text())
    assert found["score"] == 0 and [row["name"] for row in found["tests"]] == [*BY_NAME]


def test_submit_packs_what_is_asked_for_and_names_what_is_missing(tmp_path, capsys):
    with patch.object(copies, "ROOT", tmp_path):
        args = Namespace(assignment="rewards", out=str(tmp_path / "new" / "rewards.zip"))
        for name in copies.asked_for("rewards")[:-1]:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
        with pytest.raises(UserError, match="^submit: reports/rewards.md missing; course/assign"):
            copies.submit(args)
        (tmp_path / "reports/rewards.md").touch()
        copies.submit(args)
    with zipfile.ZipFile(args.out) as packed:
        assert packed.namelist() == ["darl.py", "frm.py", "refl.py", "reports/rewards.md",
                                     "reports/rewards.png", "rewards.py"]
        assert packed.read("frm.py") == b"frm.py"
    assert copies.asked_for("open") == ["runs/open/last.pt", "runs/open/metrics.csv",
                                        "runs/open/entry.json", "reports/open.md"]


def test_an_entry_is_scored_on_new_faces_and_the_table_has_the_best_first(runs, tmp_path, capsys):
    import torch

    class Likeness(torch.nn.Module):
        def __init__(self, *_):
            super().__init__()

        def forward(self, x, y):
            return 1 - (x - y).abs().mean(dim=(1, 2, 3))

    def score(ckpt, *more):
        with patch("evaluate.LPIPS", Likeness):
            command("score", ckpt, "--sft", runs / "sft/last.pt", "--n", 4, "--device", "cpu",
                    *more)
    score(runs / "lrpo/last.pt", "--name", "first", "--json", tmp_path / "1.json")
    entry = json.loads((tmp_path / "1.json").read_text())
    assert {key: type(value) for key, value in entry.items()} == board.FIELDS
    assert [*entry.values()][:2] == ["first", "lpips_alex"]
    assert entry["images"] == 4 and entry["size"] == 16
    (tmp_path / "2.json").write_text(json.dumps(entry | {"name": "a|b", "score": 9.}))
    capsys.readouterr()
    board.leaderboard(Namespace(entries=[tmp_path / "1.json", tmp_path / "2.json"]))
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].startswith("| 1 | a/b | +9.0000 ± ") and rows[3].startswith("| 2 | first | ")
    for text in ("{}", "no json", "[]"):
        (tmp_path / "3.json").write_text(text)
        with pytest.raises(UserError, match="3.json: not an entry"):
            board.leaderboard(Namespace(entries=[tmp_path / "3.json"]))
    for other in ({"seed": 5}, {"judge": "haarpsi"}):
        (tmp_path / "3.json").write_text(json.dumps(entry | other))
        with pytest.raises(UserError, match="different faces"):
            board.leaderboard(Namespace(entries=[tmp_path / "1.json", tmp_path / "3.json"]))
    state = torch.load(runs / "lrpo/last.pt", weights_only=True)
    state["args"] |= {"rewards": "lpips=1", "lpips_net": "alex"}
    torch.save(state, tmp_path / "judged.pt")
    with pytest.raises(UserError, match="it is no judge"):
        score(tmp_path / "judged.pt")
    run("sft", tmp_path / "wide", "--channels", "16", "--size", "16", "--faces", "24")
    with pytest.raises(UserError, match="another network"):
        score(tmp_path / "wide/last.pt")
