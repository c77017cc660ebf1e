"""04, both decoders of 05, and 07: killed or interrupted, they go on exactly."""
import signal

import pytest
import torch
from torch._dynamo.utils import counters
from conftest import (STAGES, checkpoint, log, same, small_vae, stage, start, stop_at, training,
                      whole_run)


@pytest.mark.parametrize("kind, more", [
    ("vae", dict(muon_lr=5e-3, lr_decay=1.0, workers=1)), ("vae", dict(lambda_ve=0.01)),
    ("plain", {}), ("denoising", {}),
    ("dit", dict(muon_lr=0.02, lr_decay=0.5, accumulate=2))])
def test_after_kill(kind, more, run):
    """kill -9 after the third step, whose checkpoint is of the second, in 07 also while latents are
    made: weights, averages, optimizers and the log end bit for bit as if nothing had happened."""
    script, s, path, name = stage(kind, run, steps=5, **more)
    whole = whole_run(script, s, path)
    if kind == "dit":
        process = start(script, s)
        while not list(run.glob("latents-*")):
            assert process.is_alive()
        process.kill()
        process.join()
    assert stop_at(script, s, 3, signal.SIGKILL) == -signal.SIGKILL
    script.main(s)
    same(checkpoint(path), whole)
    assert [line["step"] for line in log(run, name)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind, number", [
    ("vae", signal.SIGINT), ("plain", signal.SIGTERM), ("denoising", signal.SIGINT),
    ("dit", signal.SIGTERM)])
def test_after_signals(kind, number, run):
    """Ctrl-C and SIGTERM: the step ends, is saved between checkpoints, and it goes on exactly."""
    script, s, path, name = stage(kind, run, steps=10, val_every=100)
    whole = whole_run(script, s, path)
    assert stop_at(script, s, 1, number) == 128 + number
    assert 1 <= checkpoint(path)["step"] < 10
    script.main(s)
    same(checkpoint(path), whole)
    assert [line["step"] for line in log(run, name)] == list(range(1, 11))


@pytest.mark.parametrize("kind, more", [("vae", dict(width_mult=(1, 2))), ("plain", {}),
                                        ("denoising", {}), ("dit", dict(size=24, drop=0.7))])
def test_compiled(kind, more, run, monkeypatch):
    """Encoder, and decoder or U-Net, are a graph each. All blocks of the DiT share one for the
    first length of prompts and one for any. Nothing breaks them, or makes them compile again."""
    script, make, own, file, name = STAGES[kind]
    if kind != "vae":
        small_vae(run / "vae.pt", width_mult=(1, 2))
    monkeypatch.setattr(training, "compile_parts", lambda parts, s, device: [
        part.compile(backend="aot_eager") for part in parts])
    torch.compiler.reset()
    counters.clear()
    script.main(make(run, steps=3, accumulate=2, precision="bf16", **own, **more))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2


def test_without_a_compiler(capsys):
    training.compile_parts([], STAGES["vae"][1](""), torch.device("cuda"))  # the tests hide it
    assert "not compiled" in capsys.readouterr().out
