"""04, both decoders of 05, and 07: killed or interrupted, they go on exactly."""
import signal

import pytest
from conftest import (checkpoint, decoder_settings, dit, dit_settings, finetuning, log, same,
                      start, stop_at, training, vae_settings)

STAGES = {"vae": (training, vae_settings, {}, "vae.pt", "04_train_vae"),
          "plain": (finetuning, decoder_settings, {}, "vae_finetuned.pt", "05_finetune_decoder"),
          "denoising": (finetuning, decoder_settings, dict(denoising="demo"),
                        "vae_denoising.pt", "05_denoising_decoder"),
          "dit": (dit, dit_settings, {}, "dit.pt", "07_train_dit")}


def stage(kind, run, **more):
    """(module, settings, checkpoint, name in the log); all but 04 start from a VAE of two steps."""
    script, make, own, file, name = STAGES[kind]
    if kind != "vae":
        training.main(vae_settings(run, steps=2))
    return script, make(run, **own, **more), run / file, name


def whole_run(script, s, path):
    """What an uninterrupted run ends with; then everything it made is removed."""
    script.main(s)
    end = checkpoint(path)
    for file in (path, path.with_name("log.jsonl"), *path.parent.glob("latents-*.bin")):
        file.unlink()
    return end


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
