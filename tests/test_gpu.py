"""tests/gpu.py, with everything made tiny, on the CPU: it stops at what fails, goes on from there,
and prints the rows."""
import importlib

import pytest
from conftest import finished, refused, started


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


def test_tiny_from_end_to_end(gpu, tmp_path, monkeypatch, capsys):
    out = tmp_path / "gpu"
    lines = []

    def execute(line, printed):
        lines.append(line)
        if len(lines) == 5:
            return 1
        finished(started(line, printed), printed)
        return 0

    monkeypatch.setattr(gpu, "execute", execute)
    sentence = refused(lambda: gpu.main(["--tiny", "--out", str(out)]), capsys)
    assert "small 04_train_vae.py ended with exit code 1" in sentence
    gpu.main(["--tiny", "--out", str(out)])
    parts = gpu.plan(out, tiny=True)
    assert len(lines) == len(parts) + 1 and lines[4] == lines[5]
    assert all((out / f"{gpu.slug(part.name)}.txt").is_file() for part in parts)
    shown = capsys.readouterr().out
    for row in ("| sum over 8 x 8 blocks: pooling, sum |", "| vae_finetuned |", "| 07_train_dit |",
                "| color shift | base, all |"):
        assert row in shown
