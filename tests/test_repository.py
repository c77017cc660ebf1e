"""What stands in the READMEs and in the scripts' heads, and how the scripts are written: commands
that parse, names and defaults that exist, one order of reading, plain lines."""
import ast
import dataclasses
import functools
import importlib
import inspect
import json
import re
import shlex

import pytest
import torch
from conftest import ROOT, beside, command

README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASURED = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(ROOT.glob("0[1-9]_*.py"))
BY_NUMBER = {path.name[:2]: path for path in SCRIPTS}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=[path.name for path in SCRIPTS])


def read(path):
    return path.read_text(encoding="utf-8")


# ---------------------------------------------------------------- commands

def commands():
    """(script, flags) of every command line that runs one of the scripts, in both READMEs and in
    the scripts' heads; loops and torchrun unrolled. The study's rows are 04's."""
    base = re.search(r'^base="(.*)"', MEASURED, re.M)[1]
    for flags in re.findall(r"^  (?:from=\S+ +)?row \S+ *([^#\n]*)", MEASURED, re.M):
        yield "04_train_vae.py", flags.replace("$base", base)
    fenced = re.findall(r"```(\w*)\n(.*?)```", README + MEASURED, re.S)
    blocks = [block for language, block in fenced if language != "python"]
    for path in SCRIPTS:
        head = ast.get_docstring(ast.parse(read(path)))
        blocks += re.findall(r"^    ((?:python|torchrun) .*)", head, re.M)
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            for part in unrolled(line):
                match = re.search(r"(0\d_\w+\.py)(.*)", part.split("#")[0])
                if match:
                    yield match[1], match[2]


def unrolled(line):
    """The commands of a shell line, that in a loop over $s once for each word."""
    loop = re.search(r"for s in ([\w ]+); do (.*?)(\|\||;)", line)
    if loop:
        return [loop[2].replace("$s", word) for word in loop[1].split()]
    return re.split(r"&&|\|\|", line)


def test_there_are_commands():
    assert {script for script, _ in commands()} == {path.name for path in SCRIPTS}


@pytest.mark.parametrize("script, rest", sorted(set(commands())))
def test_commands_parse(script, rest, data, tmp_path, capsys):
    """Each with --dry-run, as its command line would read it: JSON, and nothing written."""
    flags = shlex.split(rest)
    if "--run" not in flags:
        flags += ["--run", str(tmp_path / "run")]
    module = importlib.import_module(script[:-3])
    module.main(data.parse_cli(module.Settings, module.PRESETS, "", [*flags, "--dry-run"]))
    assert json.loads(capsys.readouterr().out)["run"] and not list(tmp_path.iterdir())


def test_lines_of_python(data, model, tmp_path):
    """README's way to use a VAE in other code, on a checkpoint of a tiny one."""
    block, = re.findall(r"```python\n(.*?)```", README, re.S)
    vae = model.build(model.Architecture(width=8, groups=8))
    data.save_checkpoint(tmp_path / "vae.pt", stage="04_train_vae", ema=vae.state_dict(),
                         architecture=dataclasses.asdict(vae.architecture), latent_mean=None,
                         latent_std=None)
    names = dict(x=torch.rand(2, 3, 32, 48) * 2 - 1)
    exec(block.replace("runs/demo/vae_finetuned.pt", str(tmp_path / "vae.pt")), names)
    assert names["x_hat"].shape == (2, 3, 32, 48)
    assert torch.equal(names["x_hat"], vae.decode(vae.encode(names["x"]).mu))


def two_commands(run):
    done = command("04_train_vae.py", "--preset", "paper", "--run", run / "new", "--dry-run",
                   check=0)
    written = [path.name for path in run.iterdir()]
    return done.stdout, written, command("04_train_vae.py", "--lrr", "1", check=2).stderr


@beside(two_commands)
def test_command_line(outcome):
    """The real thing once: a process, JSON on stdout, exit code 0, nothing written; and a typo is a
    sentence and exit code 2."""
    _, (settings, written, refusal) = outcome
    assert json.loads(settings)["parameters"] == 68_227_747 and written == ["data"]
    assert "--lrr" in refusal


# ---------------------------------------------------------------- heads, settings, choices

@each_script
def test_script_head(path, data, capsys):
    """Docstring with stage, reads, writes, paper and a command; imports from smaller numbers only;
    importing only defines things."""
    source = read(path)
    number = int(path.name[:2])
    tree = ast.parse(source)
    doc = ast.get_docstring(tree)
    assert doc.startswith(f"Stage {number} of VIVAT")
    for words in ("Reads ", "Writes ", "Paper ", f"python {path.name}"):
        assert words in doc
    assert all(int(n) < number for n in re.findall(r'import_module\("(\d\d)_', source))
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.If,
               ast.Expr)
    assert all(isinstance(node, allowed) for node in tree.body)
    module = importlib.import_module(path.stem)
    with pytest.raises(SystemExit) as stop:
        data.parse_cli(module.Settings, module.PRESETS, module.__doc__, ["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and doc.splitlines()[0] in shown
    assert "--dry-run" in shown and "--preset" in shown


@each_script
def test_every_setting_has_a_comment(path):
    """Behind its value, in the class that defines it, data.Run and TrainingRun included."""
    classes = importlib.import_module(path.stem).Settings.__mro__[:-1]
    sources = {cls: inspect.getsource(cls) for cls in classes}
    for field in dataclasses.fields(classes[0]):
        owner = next(cls for cls in classes if field.name in inspect.get_annotations(cls))
        assert re.search(rf"^    {field.name}: .*# \S", sources[owner], re.M), field.name


def test_choices_have_reasons():
    """grep "not in the paper" lists every open choice, each with its reason on the same line."""
    lines = [line for path in SCRIPTS for line in read(path).splitlines()]
    choices = [line for line in lines if "not in the paper" in line]
    assert len(choices) >= 40
    for line in choices:
        assert re.search(r"# (.*; )?not in the paper: \S", line), line


@functools.cache
def definitions(path):
    """{name: its lines, and the comments right above} of what stands at the top of a script or in
    one of its classes."""
    lines = read(path).splitlines()
    tree = ast.parse(read(path))
    nodes = list(tree.body)
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            nodes += node.body
    found = {}
    for node in nodes:
        first = node.lineno - 1
        while lines[first - 1].strip().startswith("#"):
            first -= 1
        for name in names_of(node):
            found.setdefault(name, "\n".join(lines[first:node.end_lineno]))
    return found


def names_of(node):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def test_names_in_the_readmes_exist():
    """Each name behind a script's number, as in 03 `kl_loss`, `recon_loss`."""
    found = re.findall(r"\b(0[1-7]) ((?:`\w+`(?:, )?)+)", README + MEASURED)
    assert len(found) >= 25
    for number, names in found:
        missing = set(re.findall(r"\w+", names)) - definitions(BY_NUMBER[number]).keys()
        assert not missing, (number, missing)


def test_table_of_choices():
    """Each row names a setting or function that is marked as no choice of the paper's, and has the
    default that stands in the code."""
    section = README.split("## What the paper leaves open")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (0\d) \| `(\w+)` \| (.+?) \| .+ \|$", section, re.M)
    assert len(rows) == section.count("\n| 0") >= 15
    for number, name, value in rows:
        path = BY_NUMBER[number]
        text = definitions(path)[name]
        module = importlib.import_module(path.stem)
        assert "not in the paper: " in text, (number, name)
        defaults = {field.name: field.default for field in dataclasses.fields(module.Settings)}
        if name in defaults:
            assert ast.literal_eval(value.strip("`")) == defaults[name], (number, name)
        else:
            assert hasattr(module, name), (number, name)


def test_links_lead_somewhere():
    """Pictures, files and headings that the READMEs link to."""
    texts = {ROOT / "README.md": README, ROOT / "tests" / "README.md": MEASURED}
    for source, text in texts.items():
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if "://" in link:
                continue
            place, _, heading = link.partition("#")
            target = (source.parent / place).resolve() if place else source
            assert target.is_file(), link
            assert not heading or heading in headings(texts[target]), link


def headings(text):
    """Anchors as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)", text, re.M)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_presets_and_precedence(data, train, capsys):
    """default < preset < flag; defaults are the paper's."""
    def parse(*argv):
        return data.parse_cli(train.Settings, train.PRESETS, "", argv)

    assert parse().run == "runs/demo"
    assert parse("--preset", "paper").run == "runs/paper"
    assert parse("--run", "x").run == "x"
    paper = parse("--preset", "paper")
    assert paper == dataclasses.replace(train.Settings(), run="runs/paper")
    assert parse().lr == train.PRESETS["demo"]["lr"]
    assert parse("--lr", "3e-4").lr == 3e-4
    assert parse("--width-mult", "1", "2").width_mult == (1, 2)
    assert (paper.lr, paper.ema_decay) == (1e-4, 0.9999)                           # Table 2
    assert (paper.latent_channels, paper.precision) == (16, "fp32")                # Table 2
    assert (paper.lambda_kl, paper.lambda_recon) == (1e-4, 1.0)                    # Table 3
    assert (paper.lambda_adv, paper.lambda_perc) == (0.01, 0.1)                    # Table 3
    assert (paper.padding, paper.decoder_norm) == ("reflect", "spatial")           # Sec. 5.2
    assert paper.crop == 240                                                       # Sec. 5.1
    d = data.parse_cli(data.Settings, data.PRESETS, "", ["--preset", "paper"])
    assert (d.min_side, d.resize, d.min_score) == (720, 480, 4.5)                  # Sec. 5.1
    for bad in (["--steps", "1e3"], ["--padding", "mirror"], ["--lrr", "1"], ["--preset", "huge"]):
        with pytest.raises(SystemExit) as stop:
            parse(*bad)
        assert stop.value.code == 2 and bad[0] in capsys.readouterr().err


# ---------------------------------------------------------------- how the scripts are written

def below(tree, *kinds):
    """Nodes of these kinds under a node, itself left out."""
    return [node for node in ast.walk(tree) if isinstance(node, kinds) and node is not tree]


def all_scripts(*kinds):
    return [node for path in SCRIPTS for node in below(ast.parse(read(path)), *kinds)]


def is_tuple_to_tuple(node):
    """a, b = x, y, from a generator too."""
    targets = node.targets[0]
    return isinstance(targets, ast.Tuple) and isinstance(node.value, (ast.Tuple, ast.GeneratorExp))


@each_script
def test_script_is_plain(path):
    wide = [line for line in read(path).splitlines() if len(line) > 100]
    assert not wide, wide
    tree = ast.parse(read(path))
    for node in below(tree, ast.Assign, ast.AnnAssign, ast.NamedExpr):
        assert not isinstance(node.value, ast.Lambda), f"line {node.lineno}: a lambda with a name"
    for node in below(tree, ast.Lambda):
        assert not below(node, ast.Lambda), f"line {node.lineno}: a lambda in a lambda"
    for node in below(tree, ast.IfExp):
        assert not below(node, ast.IfExp), f"line {node.lineno}: a condition in a condition"
    for node in below(tree, *COMPREHENSIONS):
        assert not below(node, ast.NamedExpr), f"line {node.lineno}: := in a comprehension"
    for node in below(tree, ast.Assign):
        few = not is_tuple_to_tuple(node) or len(node.targets[0].elts) <= 2
        assert few, f"line {node.lineno}: more than two names, more than two values"


@each_script
def test_functions_are_short(path):
    for node in below(ast.parse(read(path)), ast.FunctionDef, ast.AsyncFunctionDef):
        loop = node.name == "train" and path.name[:2] in ("04", "07")
        length = node.end_lineno - node.lineno + 1
        assert length < 90 if loop else length <= 60, f"{node.name} has {length} lines"


def test_dense_forms_are_rare():
    assert len(all_scripts(ast.Lambda)) <= 10
    assert len(all_scripts(ast.NamedExpr)) <= 3
    assert sum(is_tuple_to_tuple(node) for node in all_scripts(ast.Assign)) <= 20


def characters():
    return sum(len(read(path)) for path in SCRIPTS)


@pytest.mark.xfail(strict=True, reason="asked for, not reached: see the note on issue 14")
def test_scripts_are_short_enough_to_read():
    assert characters() <= 140_000, characters()


def test_scripts_do_not_grow():
    """Until then, no longer than they were, with 25,000 for the two neighbors (issue 16)."""
    assert characters() <= 172_500 + 25_000, characters()


def test_readme_is_short_enough_to_read():
    assert len(README.splitlines()) <= 250  # 230, and 20 for the neighbors (issue 16)
