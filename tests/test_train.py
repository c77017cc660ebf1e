"""04_train_vae.py and 05_finetune_decoder.py: gradients, averages, bad runs, frozen encoders, the
denoising decoder."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import (checkpoint, data, decoder_settings, finetuning, log, losses, model, refused,
                      small_vae, training, vae_settings)
from test_model import peer_files

@pytest.fixture
def trained(run):
    """A run folder whose VAE has learned for two steps."""
    training.main(vae_settings(run, steps=2))
    return run


# ---------------- one step

@pytest.mark.parametrize("term", ["kl", "recon", "adv", "perc", "none"])
def test_gradient_reach(term):
    """Each term alone reaches every weight that it should and no other, KL the encoder, the others
    all of the VAE; the discriminator gets its own loss's gradient, whatever the VAE's loss is."""
    torch.manual_seed(0)
    vae = small_vae().train()
    disc = losses.Discriminator(8)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    s = vae_settings("", **{f"lambda_{name}": float(name == term)
                            for name in ("kl", "recon", "adv", "perc")})
    torch.manual_seed(1)
    perceptual = losses.Perceptual("untrained")
    total, disc_loss, terms = training.compute_losses(x, vae, disc, perceptual, 1, s)
    training.add_gradients(total, disc_loss, list(vae.parameters()), list(disc.parameters()))
    weights = dict(vae.named_parameters())
    reached = {name for name, p in weights.items() if p.grad.abs().max() > 0}
    expected = {"none": set(), "kl": {name for name in weights if name.startswith("encoder")}}
    expected = expected.get(term, set(weights))
    # A key's bias shifts all scores of a query alike, which softmax does not see.
    blind = {name for name in weights if name.endswith("attn_1.k.bias")}
    assert expected - blind <= reached <= expected
    if term != "none":
        assert total.item() == pytest.approx(terms[term].item(), rel=1e-6)
    gradients = [p.grad.clone() for p in disc.parameters()]
    disc.zero_grad()
    torch.manual_seed(1)
    losses.discriminator_loss(disc(x), disc(vae(x)[0].detach())).backward()
    for gradient, p in zip(gradients, disc.parameters()):
        torch.testing.assert_close(gradient, p.grad, atol=1e-7, rtol=1e-5)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


def test_average_by_value(run):
    """After the first step the average has moved by 1 - 2 / 11 from the start (Table 2's decay is
    warmed up); in 05, whose start is good, by 1 - decay."""
    s = vae_settings(run, steps=1)
    data.pick_device(s)
    start = model.VAE(model.architecture(s)).state_dict()
    training.main(s)
    after = checkpoint(run / "vae.pt")
    for name, w in after["model"].items():
        torch.testing.assert_close(after["ema"][name], torch.lerp(start[name], w, 9 / 11))
    finetuning.main(decoder_settings(run, steps=1, ema_decay=0.75))
    later = checkpoint(run / "vae_finetuned.pt")
    for name, w in later["model"].items():
        torch.testing.assert_close(later["ema"][name], torch.lerp(after["ema"][name], w, 0.25))


def test_muon_is_torchs_on_matrices():
    """Beside torch.optim.Muon, which multiplies in bfloat16: equal to its rounding. A convolution
    moves as the matrix (c_out, the rest)."""
    torch.manual_seed(0)
    for shape in ((64, 32), (32, 64), (48, 48)):
        start, *gradients = torch.randn(5, *shape)
        matrices = [torch.nn.Parameter(w) for w in
                    (start.clone(), start.clone().unflatten(1, (-1, 4, 4)), start.clone())]
        optimizers = (training.Muon(matrices[:1], 0.02), training.Muon(matrices[1:2], 0.02),
                      torch.optim.Muon(matrices[2:], lr=0.02, weight_decay=0.0))
        for gradient in gradients:
            for w, optimizer in zip(matrices, optimizers):
                w.grad = gradient.clone().view(w.shape)
                optimizer.step()
        ours, conv, theirs = matrices
        assert (ours - theirs).norm() < 0.03 * (theirs - start).norm() > 0
        torch.testing.assert_close(conv.flatten(1), ours)


def test_it_learns(run):
    training.main(vae_settings(run, steps=50, val_every=50, lr=2e-3))
    rows = log(run, "04_train_vae")
    assert sum(r["recon"] for r in rows[-10:]) < 0.7 * 2 * sum(r["recon"] for r in rows[:5])
    assert rows[-1]["val_psnr"] > 10 and (run / "curve.png").is_file()
    assert data.Image.open(run / "reconstructions.png").size == (2 * 164, 2 * 164)


def test_accumulation_and_precision(new_run):
    """Four parts of one picture have the gradient of the four, but for the noise that is drawn;
    under autocast (bf16) weights stay FP32 and losses are near."""
    rows = []
    for i, more in enumerate(({}, dict(accumulate=4), dict(precision="bf16"))):
        run = new_run(str(i))
        training.main(vae_settings(run, steps=1, **more))
        rows.append(log(run, "04_train_vae")[0])
        weights = checkpoint(run / "vae.pt")["model"].values()
        assert all(w.dtype == torch.float32 for w in weights)
    for name in ("total", "recon", "perc", "d_real"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=0.02), name
        assert rows[0][name] == pytest.approx(rows[2][name], rel=0.05), name
    assert rows[0]["kl"] == pytest.approx(rows[1]["kl"], rel=1e-5) and rows[0] != rows[2]


def test_flags_that_contradict_the_run(trained, capsys):
    for name, value in (("width", 16), ("padding", "zeros"), ("seed", 1), ("batch", 8)):
        sentence = refused(lambda: training.main(vae_settings(trained, **{name: value})), capsys)
        assert f"--{name} " in sentence
    decaying = vae_settings(trained, steps=3, lr_decay=0.5)
    assert "--lr-decay" in refused(lambda: training.main(decaying), capsys)
    training.main(vae_settings(trained, lr=2e-3, val_every=4, accumulate=2))  # these may change
    assert checkpoint(trained / "vae.pt")["step"] == 4


def test_not_finite_stops_and_keeps_what_is_good(trained, capsys, monkeypatch):
    """Also between two lines of the log; and a lower rate may go on from there."""
    good = (trained / "vae.pt").read_bytes()
    recon_loss = losses.recon_loss
    monkeypatch.setattr(losses, "recon_loss", lambda x, y: recon_loss(x, y) * math.inf)
    for every in (1, 100):
        s = vae_settings(trained, log_every=every, val_every=3)
        sentence = refused(lambda: training.main(s), capsys)
        assert "not finite" in sentence and "lower --lr" in sentence
        assert (trained / "vae.pt").read_bytes() == good
    monkeypatch.undo()
    training.main(vae_settings(trained, lr=1e-4))


def test_sentences(run, capsys):
    for words, more in (("--batch 5", dict(batch=5, accumulate=2)), ("--crop 36", dict(crop=36)),
                        ("not 64", dict(crop=64)),
                        ("--free-bits", dict(free_bits=1.0, accumulate=2))):
        assert words in refused(lambda: training.main(vae_settings(run, **more)), capsys)
    (run / "vae.pt").write_bytes(b"half a file")
    assert "cannot be read" in refused(lambda: training.main(vae_settings(run)), capsys)
    assert (run / "vae.pt").read_bytes() == b"half a file"


# ---------------- 05: frozen encoders

def test_the_encoder_stays_bit_for_bit(trained, capsys):
    """With both decoders, whose files load_vae of 05 reads; another vae.pt is refused then."""
    before = checkpoint(trained / "vae.pt")["ema"]
    for kind, name in (("plain", "vae_finetuned.pt"), ("denoising", "vae_denoising.pt")):
        finetuning.main(decoder_settings(trained, decoder=kind, steps=2))
        after = checkpoint(trained / name)["ema"]
        frozen = [k for k in before if not k.startswith("decoder.")]
        assert len(frozen) > 30 and all(torch.equal(before[k], after[k]) for k in frozen)
        vae = finetuning.load_vae(trained / name)
        x = torch.rand(2, 3, 32, 32) * 2 - 1
        x_hat = vae.decode(vae.encode(x).mu)
        assert x_hat.shape == x.shape and torch.equal(x_hat, vae.decode(vae.encode(x).mu))
    training.main(vae_settings(trained, steps=3))
    again = decoder_settings(trained, steps=4)
    assert "has changed" in refused(lambda: finetuning.main(again), capsys)


def test_files_of_others_can_be_finetuned(run):
    """Where the old decoder has a convolution before it, the denoising one does without."""
    weights, contents = peer_files()["kl-f8"]
    torch.save(contents, run / "ae.ckpt")
    for kind, name in (("plain", "vae_finetuned.pt"), ("denoising", "vae_denoising.pt")):
        finetuning.main(decoder_settings(run, vae=str(run / "ae.ckpt"), steps=1, decoder=kind))
        after = checkpoint(run / name)["ema"]
        frozen = [k for k in weights if k.startswith(("encoder", "quant_conv"))]
        assert all(torch.equal(weights[k], after[k]) for k in frozen)
        assert any(k.startswith("post_quant_conv") for k in after) == (kind == "plain")


def test_idle_flags_are_refused(trained, capsys):
    for more in (dict(lambda_kl=1e-3), dict(decoder="denoising", gan_loss="log"),
                 dict(decoder="denoising", compile=True)):
        sentence = refused(lambda: finetuning.main(decoder_settings(trained, **more)), capsys)
        assert "changes nothing" in sentence
    wider = decoder_settings(trained, disc_width=16)
    assert "another --disc-width" in refused(lambda: finetuning.main(wider), capsys)


# ---------------- the denoising decoder

def test_unets_have_the_papers_sizes():
    """E, C.1, in millions, with its 8 latent channels."""
    millions = {"B": 20.63, "M": 49.33, "L": 88.98, "XL": 140.63, "H": 355.62}
    for unet, expected in millions.items():
        with torch.device("meta"):
            decoder = finetuning.DenoisingDecoder(model.Architecture(latent_channels=8), unet)
        assert round(model.count(decoder) / 1e6, 2) == expected


def test_velocity_and_sampling(monkeypatch):
    """What the network sees, and Euler's three steps against a velocity that is known."""
    vae = small_vae()
    finetuning.give_denoising_decoder(vae, "demo")
    decoder = vae.decoder
    x_t = torch.randn(2, 3, 32, 48)
    z = torch.randn(2, 16, 4, 6)
    t = torch.tensor([0.3, 0.9]).view(2, 1, 1, 1)
    seen = []
    decoder.conv_in.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    decoder.velocity(x_t, t, z)
    torch.testing.assert_close(seen[0][:, :3], x_t / ((1 - t) ** 2 * 0.09 + t ** 2).sqrt())
    assert torch.equal(seen[0][0, 3:, 8:16, :8], z[0, :, 1:2, :1].expand(-1, 8, 8))
    monkeypatch.setattr(decoder, "velocity", lambda x_t, t, z: x_t + z[:, :1, :1, :1])
    x_t = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(2024))
    times = [math.log(100 - 99 * i / 3) / math.log(100) for i in range(4)]
    for now, after in zip(times, times[1:]):
        x_t = x_t + (after - now) * (x_t + z[1, 0, 0, 0])
    torch.testing.assert_close(vae.decode(z)[1:], x_t / 0.6, atol=1e-4, rtol=1e-4)


def test_denoising_losses_by_hand():
    """The estimate of a step, Eq. 9, 10 and 12, and R1."""
    s = decoder_settings("", decoder="denoising", lambda_perc=0.5, lambda_adv=0.5)
    vae = finetuning.freeze_encoder(small_vae(width=8))
    finetuning.give_denoising_decoder(vae, "demo")
    torch.manual_seed(1)
    disc = finetuning.PairDiscriminator(8)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.manual_seed(2)
    perceptual = losses.Perceptual("untrained")
    total, disc_loss, terms = finetuning.denoising_losses(x, vae, disc, perceptual, 1, s)
    torch.manual_seed(2)
    eps = torch.randn_like(x)
    t = torch.sigmoid(torch.randn(2, 1, 1, 1))
    x_t = (1 - t) * 0.6 * x + t * eps
    v = vae.decoder.velocity(x_t, t, vae.encode(x).sample())
    x_hat = (x_t - t * v) / 0.6
    recon = (v - eps + 0.6 * x).square().mean()
    adv = F.softplus(-disc(x_hat, x_t, t)).mean()
    by_hand = recon + 0.5 * adv + 0.5 * perceptual(x, x_hat)
    assert total.item() == pytest.approx(by_hand.item(), rel=1e-5)
    picture = x.clone().requires_grad_()
    real = disc(picture, x_t, t)
    slope, = torch.autograd.grad(real.sum(), picture)
    judged = 0.5 * (F.softplus(-real).mean() + F.softplus(disc(x_hat, x_t, t)).mean())
    judged = judged + 0.01 * slope.square().mean()
    assert disc_loss.item() == pytest.approx(judged.item(), rel=1e-5)
