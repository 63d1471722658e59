"""The documents: names, flags, links and pictures in them exist; their tables are the data's."""
import argparse
import ast
import importlib
import json
import re
from pathlib import Path

import pytest
import torch
import torchvision

import evaluate
import rewards
import sample
import settings
from common import log_of, run, small_presets
from course import __main__ as course
from support.data import to_uint8
from tools import arms

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")),
             *sorted(ROOT.glob("course/assignments/*.md"))]
TOOLS = [path.stem for path in sorted(ROOT.glob("tools/*.py")) if path.stem != "__init__"]
LEAST_ROWS = 90         # of docs/paper_to_code.md, so that nothing passes by finding nothing
LEAST_FLAGS = 3         # of each document
MARKED = re.compile(r"<!-- tools\.arms table (\S+) -->\n((?:\|.*\n)*)")
FOREIGN = {"sudo", "apt-get", "pip", "venv", "pytest"}       # programs that are not the project's


def names_in(path) -> set[str]:
    """Every function, class and constant of a file, and `A.b` for methods and fields."""
    def targets(node):
        nodes = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [u for t in nodes for u in (t.elts if isinstance(t, ast.Tuple) else [t])]
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            found |= {t.id for t in targets(node) if isinstance(t, ast.Name)}
        for part in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(part, ast.FunctionDef):
                found.add(f"{node.name}.{part.name}")
            elif isinstance(part, (ast.Assign, ast.AnnAssign)):
                found |= {f"{node.name}.{t.id}" for t in targets(part)}
    return found


def places(text: str) -> list[tuple[str, str]]:
    """(file, name) of every name in the second column of the tables: "`a.py`: `f`; `b.py`: `g`".
    The rows are those with a file there. Raises ValueError for a name before any file."""
    found = []
    for line in text.splitlines():
        cells = line.split("|")
        if len(cells) == 5 and ".py`" in cells[2]:
            file = None
            for token in re.findall(r"`([^`]+)`", cells[2]):
                if token.endswith(".py"):
                    file = token
                elif file is None:
                    raise ValueError(f"{token} has no file: {line}")
                else:
                    found.append((file, token))
    return found


def test_every_name_in_paper_to_code_exists():
    text = (ROOT / "docs" / "paper_to_code.md").read_text().split("## What differs")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")
            and not line.startswith(("| paper |", "| abstract |", "| idea |"))]
    assert len(rows) >= LEAST_ROWS and len(places(text)) >= len(rows)
    assert all(places(row) for row in rows)         # a row without a place would go unchecked
    for file, name in places(text):
        assert (ROOT / file).is_file(), file
        assert name in names_in(ROOT / file), f"{file} has no {name}"


def test_every_name_in_the_other_columns_exists_somewhere():
    anywhere = set().union(*map(names_in, [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]))
    anywhere |= {name.split(".")[-1] for name in anywhere}
    anywhere |= {"face", "approx_kl", "lrpo_perception"}     # strings, and the authors' other model
    text = (ROOT / "docs" / "paper_to_code.md").read_text()
    for name in re.findall(r"`([A-Za-z_][\w.]*)`", text):
        assert name in anywhere or (ROOT / name).exists(), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_and_picture_exists(path):
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)", path.read_text()):
        link = "".join(link)
        if not link.startswith(("http://", "https://", "#", "../../actions/")):    # GitHub's
            assert (path.parent / link.partition("#")[0]).exists(), link


class Captured(Exception):
    """Carries the parser of a program whose main() has begun to parse."""


def flags_of(parser) -> set[str]:
    """The flags of a program and of its commands."""
    found = {*parser._option_string_actions}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set().union(*map(flags_of, action.choices.values()))
    return found


def tool_flags(name: str, monkeypatch) -> set[str]:
    """The flags of tools/NAME.py, whether it has a function parser() or parses in main()."""
    def capture(parser, *_):
        raise Captured(parser)
    module = importlib.import_module(f"tools.{name}")
    if not hasattr(module, "main"):
        return set()
    if hasattr(module, "parser"):
        return flags_of(module.parser())
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", capture)
    with pytest.raises(Captured) as caught:
        module.main()
    monkeypatch.undo()
    return flags_of(caught.value.args[0])


def test_every_flag_in_the_documents_is_one_of_a_program(monkeypatch):
    known = {flag for mode in (*settings.METHODS, "demo")
             for flag in settings.parser(mode)._option_string_actions}
    for program in (evaluate, sample):
        known |= {*program.parser()._option_string_actions}
    known |= {flag for name in TOOLS for flag in tool_flags(name, monkeypatch)}
    assert {"--gt_weight", "--frontier", "--sheet", "--patch", "--recipe"} <= known
    known |= flags_of(course.parser()) | {"--nproc_per_node"}       # torchrun's
    for path in DOCUMENTS:
        flags = {*re.findall(r"(?<![\w-])--[a-z]\w*", path.read_text())}
        assert len(flags) >= LEAST_FLAGS and not flags - known, (path.name, flags - known)


def test_every_program_in_the_documents_exists():
    for path in DOCUMENTS:
        for name in re.findall(r"python -m ([\w.]+)", path.read_text()):
            path = ROOT / name.replace(".", "/")
            assert name in FOREIGN or path.with_suffix(".py").is_file() \
                or (path / "__main__.py").is_file()


def test_the_table_of_presets_is_that_of_the_settings():
    text = (ROOT / "docs" / "reference.md").read_text().split("## Presets")[1].split("\n## ")[0]
    head, _, *rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]]
                      for line in text.splitlines() if line.startswith("|")]
    assert head[1:] == [*settings.PRESETS] and len(rows) > len(settings.METHODS)
    for name, *cells in rows:
        mode, _, names = name.rpartition(": ")
        keys = names.replace("batch", "batch_size").split(", ") if mode else [name[2:]]
        mode = mode or next(m for m in settings.METHODS if keys[0] in settings.fields_of(m))
        for preset, cell in zip(head[1:], cells, strict=True):
            run = vars(settings.resolve(mode, {"preset": preset}))
            want = [f"{v:,}" if type(v) is int else str(v) for v in map(run.get, keys)]
            assert cell == ", ".join(want), (name, preset)


def test_the_marked_tables_are_what_the_command_prints():
    used = set()
    for path in DOCUMENTS:
        for file, table in MARKED.findall(path.read_text()):
            used.add(ROOT / file)
            assert table == arms.table(json.loads((ROOT / file).read_text())), (path.name, file)
    assert used == {*(ROOT / "docs" / "data").iterdir()} != set()       # no data without a document


def test_the_reward_of_ones_own_in_the_reference_is_trained_on(runs, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "reference.md").read_text()
    code, = [part for part in re.findall(r"```python\n(.*?)```", text, re.S) if "JpegSize" in part]
    monkeypatch.setattr(rewards, "MODELS", dict(rewards.MODELS))
    own = {"__name__": "own"}
    exec(code, own)
    flat, noisy = torch.zeros(1, 3, 32, 32), torch.rand(1, 3, 32, 32) * 2 - 1
    score, terms = rewards.CompositeReward({"jpeg": 1.0}, jpeg=own["JpegSize"]())(
        torch.cat([flat, noisy]), None, g=2)
    bits = 8 * len(torchvision.io.encode_jpeg(to_uint8(noisy)[0], 75)) / 32 ** 2
    assert terms["jpeg"][1].item() == pytest.approx(bits, rel=.02)
    assert terms["jpeg"][0] < terms["jpeg"][1] and torch.equal(score[1, 0, 0], score[1].mean())

    with small_presets():
        run("lrpo", tmp_path / "own", "--init", str(runs / "sft" / "last.pt"), "--rewards",
            "jpeg=1")
    assert log_of(tmp_path / "own")[0]["heldout_r_jpeg"] > 1
    monkeypatch.undo()              # evaluate.py has never heard of it
    evaluate.compare(evaluate.parser().parse_args([
        "--ckpt", str(tmp_path / "own" / "last.pt"), "--rewards", "ssim=1", "--n", "2", "--out",
        str(tmp_path / "e")]))
    assert "trained on jpeg=1, which is not measured here" in capsys.readouterr().out
