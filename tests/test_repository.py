"""The READMEs' commands, how the scripts are written, and how long things are."""
import ast
import dataclasses
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
    found = []
    texts = [block for path in READMES
             for block in re.findall(r"```bash\n(.*?)```", read(path), re.S)]
    texts += [ast.get_docstring(ast.parse(read(path))) for path in SCRIPTS]
    for line in "\n".join(texts).splitlines():
        for match in re.finditer(r"(0\d_\w+)\.py((?: [^#;&|]*)?)", line):
            if "python" in line[:match.start()] or "torchrun" in line[:match.start()]:
                found.append((match[1], match[2].split("  ")[0]))
    return found


def test_commands_parse():
    assert len(commands()) >= 18
    for script, flags in commands():
        stage = importlib.import_module(script)
        data.parse_cli(stage.Settings, stage.PRESETS, "", shlex.split(flags))


def test_links_lead_somewhere():
    for path in READMES:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", read(path)):
            assert (path.parent / link).exists(), link


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script(path, capsys):
    """Head, imports, settings, the order of reading, plain lines; importing only defines things."""
    tree = ast.parse(read(path))
    head = ast.get_docstring(tree)
    places = [head.index(word) for word in ("Stage", "Reads", "Writes", "Paper", "    python 0")]
    assert places == sorted(places)
    stage = importlib.import_module(path.stem)
    for name in re.findall(r'import_module\("(0\d_\w+)"\)', read(path)):
        assert name < path.stem
    for cls in stage.Settings.__mro__[:-1]:
        own = {field for field in cls.__dict__.get("__annotations__", {})}
        noted = re.findall(r"^    (\w+):[^#\n]*#\s*\S", inspect.getsource(cls), re.M)
        assert own == set(noted), cls
    last = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.If))]
    assert isinstance(last[-1], ast.If) and (path.stem == "01_data" or last[-2].name == "main")
    if path.stem != "05_finetune_decoder":  # which wants a file to count
        stage.main(dataclasses.replace(stage.Settings(), dry_run=True))
        assert capsys.readouterr().out.startswith("{")
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
    assert sum(sizes) <= 133_000 and max(sizes) <= 31_000
    assert sum(len(read(path).splitlines()) for path in SCRIPTS) <= 3_000
    code = sorted((ROOT / "tests").glob("*.py"))
    lines = {path.name: read(path).splitlines() for path in code}
    assert sum(map(len, lines.values())) <= 2_300
    assert max(len(line) for path in code + SCRIPTS for line in read(path).splitlines()) <= 100
    assert (ROOT / "tests" / "reference.json").stat().st_size <= 40_000
    assert len(read(READMES[0]).splitlines()) <= 150
    assert len(read(READMES[1]).splitlines()) <= 200
