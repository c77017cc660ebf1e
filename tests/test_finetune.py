"""05_finetune_decoder.py: what shapes latents stays bit for bit, the decoder moves, it resumes exactly, and a peer's decoder can be trained too."""
import importlib

import pytest
import torch
from conftest import refused
from test_train import checkpoint, one_trunk, same, settings as train_settings  # noqa: F401  (one_trunk applies to this module too)


@pytest.fixture(scope="module")
def finetune():
    return importlib.import_module("05_finetune_decoder")


def settings(finetune, run, **more):
    base = dict(run=str(run), batch=4, crop=32, disc_width=8, workers=0, latent_pictures=8, log_every=1, val_every=4, val_pictures=4, save_every=2, lr=1e-3, steps=4, optimizer="adam", decay=0.0)
    return finetune.Settings(**(finetune.PRESETS["demo"] | base | more))


def read(path):
    return torch.load(path, weights_only=True)


@pytest.fixture
def trained(train, run):
    train.main(train_settings(train, run, steps=2))
    return run


def test_encoder_is_bit_equal(finetune, model, data, trained):
    finetune.main(settings(finetune, trained))
    before, after = checkpoint(trained), read(trained / "vae_finetuned.pt")
    assert after["stage"] == "05_finetune_decoder" and after["parent"] == data.parent(trained / "vae.pt")
    for part in ("model", "ema"):
        for name, w in after[part].items():
            assert torch.equal(w, before["ema"][name]) == name.startswith("encoder."), (part, name)
    same(before["latent_mean"], after["latent_mean"])
    same(before["latent_std"], after["latent_std"])
    assert any(not torch.equal(w, before["disc"][k]) for k, w in after["disc"].items())
    # The latents are the same numbers whichever checkpoint made them, and either decodes the other's.
    a, b = model.load_vae(trained / "vae.pt"), model.load_vae(trained / "vae_finetuned.pt")
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(a.encode(x).mu, b.encode(x).mu) and not torch.equal(a.decode(a.encode(x).mu), b.decode(a.encode(x).mu))


def test_resume_is_exact(finetune, trained):
    finetune.main(settings(finetune, trained))
    whole = read(trained / "vae_finetuned.pt")
    (trained / "vae_finetuned.pt").unlink()
    finetune.main(settings(finetune, trained, steps=2))
    finetune.main(settings(finetune, trained))
    same(read(trained / "vae_finetuned.pt") | {"settings": None}, whole | {"settings": None})


def test_peer(finetune, model, data, run):
    """Flux's shape in small, its own file: zero padding stays, a discriminator starts afresh, scale and shift are carried over."""
    torch.manual_seed(0)
    peer = model.build(model.Architecture(width=32, width_mult=(1, 1, 1, 1), res_blocks=1, attention_levels=(), padding="zeros", decoder_norm="group"))
    torch.save(peer.state_dict(), run / "flux_ae.pt")
    results = []
    for ours in range(2):                                                                   # whatever was random before, as in two processes
        torch.manual_seed(ours)
        (run / "vae_finetuned.pt").unlink(missing_ok=True)
        finetune.main(settings(finetune, run, vae=str(run / "flux_ae.pt"), peer="flux", steps=2))
        results.append(read(run / "vae_finetuned.pt"))
    after = results[1]
    assert all(torch.equal(w, after["disc"][k]) for k, w in results[0]["disc"].items())
    assert after["architecture"]["padding"] == "zeros" and torch.allclose(after["latent_std"], torch.tensor(1 / 0.3611))
    assert all(torch.equal(w, peer.state_dict()[k]) == k.startswith("encoder.") for k, w in after["ema"].items())


def test_sentences(finetune, train, trained, capsys):
    assert "--batch" in refused(lambda: finetune.main(settings(finetune, trained, batch=3, accumulate=2)), capsys)
    for flag in ("accumulate", "log_every", "val_every", "save_every"):
        assert "at least 1" in refused(lambda: finetune.main(settings(finetune, trained, **{flag: 0})), capsys)
    assert "--disc-width" in refused(lambda: finetune.main(settings(finetune, trained, disc_width=16)), capsys)
    finetune.main(settings(finetune, trained, steps=1))
    assert "--lr" in refused(lambda: finetune.main(settings(finetune, trained, lr=5e-4)), capsys)
    train.main(train_settings(train, trained, steps=3))                                    # 04 went on: this is another parent
    assert "has changed" in refused(lambda: finetune.main(settings(finetune, trained)), capsys)
    (trained / "vae_finetuned.pt").unlink()
    unfinished = checkpoint(trained) | {"latent_mean": None, "latent_std": None}
    torch.save(unfinished, trained / "half.pt")
    assert "run 04_train_vae.py to its end" in refused(lambda: finetune.main(settings(finetune, trained, vae=str(trained / "half.pt"))), capsys)
    assert "run 04_train_vae.py first" in refused(lambda: finetune.main(settings(finetune, trained, vae=str(trained / "none.pt"))), capsys)
