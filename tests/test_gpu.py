"""tests/gpu.py, with everything made tiny, on the CPU: it stops at what fails, goes on from there,
and prints the rows."""
import contextlib
import importlib
import io

import pytest
from conftest import beside, finished, refused, started


@pytest.fixture
def gpu():
    return importlib.import_module("gpu")


def test_dry_run_prints_the_plan(gpu, tmp_path, capsys):
    gpu.main(["--dry-run", "--out", str(tmp_path / "gpu")])
    shown = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    for words in ("--device cuda", "07_train_dit.py --preset small", "study all-2", "hours"):
        assert words in shown


def test_without_a_gpu_it_says_so(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    line = refused(lambda: gpu.main(["--out", str(tmp_path / "gpu")]), capsys)
    assert "no GPU here" in line and not list(tmp_path.iterdir())


def two_tries(run):
    """small's 04 fails; the second try goes on there."""
    gpu = importlib.import_module("gpu")
    names = [part.name for part in gpu.plan(run / "gpu", tiny=True)]
    failing = names.index("small 04_train_vae.py") + 1
    lines = []

    def execute(line, printed):
        lines.append(line)
        if len(lines) == failing:
            return 1
        finished(started(line, printed), printed)
        return 0

    gpu.execute = execute
    shown = io.StringIO()
    errors = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(errors):
        with pytest.raises(SystemExit) as stop:
            gpu.main(["--tiny", "--out", str(run / "gpu")])
        sentence = errors.getvalue().strip().splitlines()[-1]
        gpu.main(["--tiny", "--out", str(run / "gpu")])
    return stop.value.code, sentence, lines, failing, shown.getvalue()


@beside(two_tries)
def test_tiny_from_end_to_end(gpu, outcome):
    run, (code, sentence, lines, failing, shown) = outcome
    assert code == 2 and "small 04_train_vae.py ended with exit code 1" in sentence
    parts = gpu.plan(run / "gpu", tiny=True)
    assert len(lines) == len(parts) + 1 and lines[failing - 1] == lines[failing]
    assert all((run / "gpu" / f"{gpu.slug(part.name)}.txt").is_file() for part in parts)
    for row in ("| 04_train_vae, CPU and GPU | 2 | 0 |", "| 07_train_dit, CPU and GPU | 2 | 0 |",
                "| sum over 8 x 8 blocks: pooling, sum |", "| vae_finetuned |", "| 07_train_dit |",
                "| color shift | base, all |"):
        assert row in shown
