"""What stands in the README and in the scripts' heads: commands that parse, complete lists, one order of reading."""
import ast
import dataclasses
import importlib
import json
import re
import shlex

import pytest
from conftest import ROOT, command

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(ROOT.glob("0[1-9]_*.py"))


def commands():
    """Every command line in the README that runs one of the scripts, loops and torchrun unrolled; the study's rows are 04's."""
    base = re.search(r'^base="(.*)"', README, re.M)[1]
    for row, flags in re.findall(r"^  (?:from=\S+ +)?row (\S+) *([^#\n]*)", README, re.M):
        yield "04_train_vae.py", flags.replace("$base", base)
    for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", README, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            loop = re.search(r"for s in ([\w ]+); do (.*?)(\|\||;)", line)
            for part in ([loop[2].replace("$s", s) for s in loop[1].split()] if loop else re.split(r"&&|\|\|", line)):
                if match := re.search(r"(0\d_\w+\.py)(.*)", part.split("#")[0]):
                    yield match[1], match[2]


def test_there_are_commands():
    assert {script for script, _ in commands()} == {p.name for p in SCRIPTS}


@pytest.mark.parametrize("script, rest", sorted(set(commands())))
def test_readme_commands_parse(script, rest, tmp_path, capsys):
    """Each with --dry-run, as its command line would read it: JSON, and nothing written."""
    flags = shlex.split(rest)
    if "--run" not in flags:
        flags += ["--run", str(tmp_path / "run")]
    module = importlib.import_module(script[:-3])
    Settings = module.Sampling if "--sample" in flags else module.Settings
    module.main(importlib.import_module("01_data").parse_cli(Settings, module.PRESETS if Settings is module.Settings else {"demo": {}}, "", flags + ["--dry-run"]))
    assert json.loads(capsys.readouterr().out)["run"] and not list(tmp_path.iterdir())


def test_command_line(tmp_path):
    """The real thing once: a process, JSON on stdout, exit code 0, nothing written; and a typo is a sentence and exit code 2."""
    done = command("04_train_vae.py", "--preset", "paper", "--run", tmp_path / "run", "--dry-run", check=0)
    assert json.loads(done.stdout)["parameters"] == 68_227_747 and not list(tmp_path.iterdir())
    assert "--lrr" in command("04_train_vae.py", "--lrr", "1", check=2).stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_script_head(path, capsys):
    """Docstring with stage, reads, writes, paper and a command; imports from smaller numbers only; importing only defines things."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    doc = ast.get_docstring(tree)
    assert doc.startswith(f"Stage {int(path.name[:2])} of VIVAT") and all(w in doc for w in ("Reads ", "Writes ", "Paper ", f"python {path.name}"))
    assert all(int(n) < int(path.name[:2]) for n in re.findall(r'import_module\("(\d\d)_', source))
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.If, ast.Expr)
    assert all(isinstance(node, allowed) for node in tree.body)
    module = importlib.import_module(path.stem)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("01_data").parse_cli(module.Settings, module.PRESETS, module.__doc__, ["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and doc.splitlines()[0] in shown and "--dry-run" in shown and "--preset" in shown


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_choices_the_paper_leaves_open_are_listed(path):
    """Each setting that is not the paper's, and each other line marked so, stands in the README; each setting says where it is from."""
    section = README.split("## What the paper leaves open")[1].split("\n## ")[0]
    module = importlib.import_module(path.stem)
    for name in re.findall(r"^    (\w+): .*# not in the paper", path.read_text(encoding="utf-8"), re.M):
        assert f"`{name}`" in section, f"{path.name}: {name}"
    others = [line for line in path.read_text(encoding="utf-8").splitlines() if "# not in the paper: " in line and not re.match(r"^    \w+: ", line)]
    assert section.count(f"| {path.name} | line |") == len(others), f"{path.name}: {others}"
    for field in dataclasses.fields(module.Settings):
        assert re.search(rf"^    {field.name}: .*# \S", "".join(p.read_text(encoding="utf-8") for p in SCRIPTS), re.M), f"{path.name}: {field.name} has no comment"


def test_presets_and_precedence(data, train, capsys):
    """default < preset < flag; defaults are the paper's."""
    parse = lambda *argv: data.parse_cli(train.Settings, train.PRESETS, "", argv)
    assert parse().run == "runs/demo" and parse("--preset", "paper").run == "runs/paper" and parse("--run", "x").run == "x"
    assert parse("--preset", "paper") == dataclasses.replace(train.Settings(), run="runs/paper")
    assert parse().lr == train.PRESETS["demo"]["lr"] and parse("--lr", "3e-4").lr == 3e-4 and parse("--width-mult", "1", "2").width_mult == (1, 2)
    paper = parse("--preset", "paper")
    assert (paper.lr, paper.ema_decay, paper.latent_channels, paper.precision) == (1e-4, 0.9999, 16, "fp32")                 # Table 2
    assert (paper.lambda_kl, paper.lambda_recon, paper.lambda_adv, paper.lambda_perc) == (1e-4, 1.0, 0.01, 0.1)             # Table 3
    assert (paper.padding, paper.decoder_norm, paper.crop) == ("reflect", "spatial", 240)                                   # Sec. 5.1, 5.2
    d = data.parse_cli(data.Settings, data.PRESETS, "", ["--preset", "paper"])
    assert (d.min_side, d.resize, d.crop, d.min_score) == (720, 480, 240, 4.5)                                              # Sec. 5.1
    for bad in (["--steps", "1e3"], ["--padding", "mirror"], ["--lrr", "1"], ["--preset", "huge"]):
        with pytest.raises(SystemExit) as stop:
            parse(*bad)
        assert stop.value.code == 2 and bad[0] in capsys.readouterr().err


def test_files_are_small_enough_to_read():
    lengths = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in SCRIPTS}
    assert max(lengths.values()) <= 750 and sum(lengths.values()) <= 2760, lengths
