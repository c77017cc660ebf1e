"""The READMEs' commands, how the scripts are written, and how long things are."""
import ast
import importlib
import inspect
import re
import shlex

import pytest
from conftest import ROOT, data

SCRIPTS = sorted(ROOT.glob("0*.py"))
READMES = [ROOT / "README.md", ROOT / "tests" / "README.md"]


def read(path):
    return path.read_text(encoding="utf-8")


def commands():
    """Every command line of one of the scripts in the READMEs and in the scripts' heads."""
    texts = [block for path in READMES
             for block in re.findall(r"```bash\n(.*?)```", read(path), re.S)]
    texts += [ast.get_docstring(ast.parse(read(path))) for path in SCRIPTS]
    command = r"python (0\d_\w+)\.py((?: [^ #;&|\n]+)*)"
    return re.findall(command, "\n".join(texts))


def test_commands_parse():
    assert len(commands()) >= 17
    for script, flags in commands():
        stage = importlib.import_module(script)
        data.parse_cli(stage.Settings, stage.PRESETS, "", shlex.split(flags))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script(path):
    """Head, settings, plain lines."""
    tree = ast.parse(read(path))
    head = ast.get_docstring(tree)
    places = [head.index(word) for word in ("Stage", "Reads", "Writes", "Paper", "    python 0")]
    assert places == sorted(places)
    stage = importlib.import_module(path.stem)
    for cls in stage.Settings.__mro__[:-1]:
        noted = re.findall(r"^    (\w+):[^#\n]*#\s*\S", inspect.getsource(cls), re.M)
        assert set(noted) == set(cls.__dict__.get("__annotations__", {})), cls
    for node in ast.walk(tree):
        assert not isinstance(node, ast.NamedExpr)
        if isinstance(node, ast.IfExp):
            assert not any(isinstance(child, ast.IfExp) for child in ast.iter_child_nodes(node))
        if isinstance(node, ast.Assign):
            assert not isinstance(node.value, ast.Lambda)
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_how_long_things_are():
    """Minimal is the first word of the order. Lower these, never raise them."""
    sizes = [len(read(path)) for path in SCRIPTS]
    assert sum(sizes) <= 124_800 and max(sizes) <= 27_500
    assert sum(len(read(path).splitlines()) for path in SCRIPTS) <= 2_750
    code = sorted((ROOT / "tests").glob("*.py"))
    by_hand = {"gpu.py": 120, "study.py": 150}
    lines = {path.name: read(path).splitlines() for path in code}
    assert all(len(lines.pop(name)) <= most for name, most in by_hand.items())
    assert sum(map(len, lines.values())) <= 1_800
    assert sum(len(lines[name]) for name in lines if name.startswith("test_")) <= 1_100
    assert max(len(line) for path in code + SCRIPTS for line in read(path).splitlines()) <= 100
    assert (ROOT / "tests" / "reference.json").stat().st_size <= 40_000
    assert len(read(READMES[0]).splitlines()) <= 150
    assert len(read(READMES[1]).splitlines()) <= 200
