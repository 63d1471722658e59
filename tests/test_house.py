"""The house: imports run one way, files stay short, every public definition says what it does."""
import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(
    [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("tools/*.py"),
     *ROOT.glob("course/*.py")])
    if path.name != "__init__.py"}


def imports(path) -> set[str]:
    """The project's own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & FILES.keys()


def test_imports_make_no_circle_and_run_upwards():
    list(TopologicalSorter({name: imports(path) for name, path in FILES.items()}).static_order())
    for name, path in FILES.items():        # support serves the top, and the top no one
        if name.startswith("support."):
            assert all(other.startswith("support.") for other in imports(path)), name
        elif not name.startswith(("tools.", "course.")):
            assert not any(other.startswith(("tools.", "course.")) for other in imports(path)), name


def test_no_file_is_long():
    for name, path in FILES.items():
        lines = path.read_text().splitlines()
        assert len(lines) <= (340 if name == "rewards" else 300), name
        assert max(map(len, lines)) <= 100, name


@pytest.mark.parametrize("name", FILES)
def test_every_public_definition_has_a_docstring(name):
    tree = ast.parse(FILES[name].read_text())
    assert ast.get_docstring(tree)
    for parent in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        for node in parent.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_" \
                    and name != "support.faces" and node.name not in ("main", "load_state_dict"):
                assert ast.get_docstring(node), f"{name}.{node.name}"


def test_the_readmes_order_of_reading_is_the_order_of_imports():
    table = (ROOT / "README.md").read_text().split("## What is where")[1]
    order = [line.split("`")[1].removesuffix(".py") for line in table.splitlines()
             if line.startswith("| `") and ".py`" in line]
    assert {*order} == {name for name in FILES if "." not in name}
    for i, name in enumerate(order):
        assert not imports(FILES[name]) & {*order[i:]}, name
