"""04_train_vae.py and 05_finetune_decoder.py: gradients, averages, bad runs, both decoders."""
import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import (Calls, checkpoint, data, decoder_settings, finetuning, log, losses, model,
                      refused, peer_files, small_vae, training, vae_settings)


@pytest.fixture
def trained(run):
    """A run folder whose VAE has learned for two steps."""
    training.main(vae_settings(run, steps=2))
    return run


@pytest.mark.parametrize("term", ["kl", "ve", "recon", "adv", "perc", "none"])
def test_gradient_reach(term):
    """Alone KL or VE reaches all of the encoder and no other weight, other terms all of the VAE.
    The discriminator gets its own loss's gradient, whatever the VAE's loss is."""
    torch.manual_seed(0)
    vae = small_vae().train()
    disc = losses.Discriminator(8)
    perceptual = losses.Perceptual("untrained")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    s = vae_settings("", **{f"lambda_{name}": float(name == term)
                            for name in ("kl", "ve", "recon", "adv", "perc")})
    torch.manual_seed(1)
    total, disc_loss, _ = training.compute_losses(x, vae, disc, perceptual, s)
    training.add_gradients(total, disc_loss, list(vae.parameters()), list(disc.parameters()))
    weights = dict(vae.named_parameters())
    reached = {name for name, p in weights.items() if p.grad.abs().max() > 0}
    part = {"kl": "encoder", "ve": "encoder", "none": "nothing"}.get(term, "")
    expected = {name for name in weights if name.startswith(part)}
    # A key's bias shifts all scores of a query alike, which softmax does not see.
    blind = {name for name in weights if name.endswith("attn_1.k.bias")}
    assert expected - blind <= reached <= expected
    gradients = [p.grad.clone() for p in disc.parameters()]
    disc.zero_grad()
    torch.manual_seed(1)
    losses.discriminator_loss(disc(x), disc(vae(x)[0].detach())).backward()
    for gradient, p in zip(gradients, disc.parameters()):
        torch.testing.assert_close(gradient, p.grad, atol=1e-7, rtol=1e-5)
    assert gradients[0].abs().max() > 0


def test_average_by_value(run):
    """The first step moves the average by 1 - 2 / 11 (a warm-up); in 05 by 1 - decay."""
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
    """Convolutions move as the matrices (c_out, the rest) do with torch.optim.Muon, but for the
    bfloat16 in which that multiplies."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("it came with PyTorch 2.9")
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in ((64, 32), (32, 64), (64, 32), (48, 48))]
    ours = [torch.nn.Parameter(w.clone().unflatten(1, (-1, 4, 4))) for w in starts]
    theirs = [torch.nn.Parameter(w.clone()) for w in starts]
    optimizers = (training.Muon(ours, 0.02), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0))
    for _ in range(4):
        for a, b in zip(ours, theirs):
            b.grad = torch.randn_like(b)
            a.grad = b.grad.clone().view(a.shape)
        for optimizer in optimizers:
            optimizer.step()
    for start, a, b in zip(starts, ours, theirs):
        assert (a.flatten(1) - b).norm() < 0.03 * (b - start).norm() > 0


def test_calls_of_a_step():
    """`small` but for its width and LPIPS, with Muon and without."""
    for muon_lr, most in ((5e-3, 700), (0.0, 20)):
        s = vae_settings("", res_blocks=2, attention_levels=(3,), muon_lr=muon_lr)
        vae, disc = model.VAE(model.architecture(s)), losses.Discriminator(8)
        ema = copy.deepcopy(vae)
        weights = list(vae.parameters()), list(disc.parameters())
        adam = functools.partial(torch.optim.Adam, fused=True)
        optimizers = training.make_optimizers(weights[0], weights[0], adam, s.muon_lr)
        for _ in range(2):  # the first makes their states
            with Calls() as both:
                total, disc_loss, _ = training.compute_losses(
                    torch.zeros(1, 3, 32, 32), vae, disc, losses.Perceptual("untrained"), s)
                training.add_gradients(total, disc_loss, *weights)
            with Calls() as update:
                training.update(optimizers, 1.0)
            with Calls() as average:
                training.update_ema(ema, vae, 0.9)
        assert both.count < 4000 and update.count <= most and average.count == 1


def test_it_learns(run):
    """In bf16 and in parts, too; weights stay FP32."""
    training.main(vae_settings(run, steps=30, val_every=30, lr=2e-3, accumulate=2,
                               precision="bf16"))
    weights = checkpoint(run / "vae.pt")["model"].values()
    assert {w.dtype for w in weights} == {torch.float32}
    rows = log(run, "04_train_vae")
    assert sum(r["recon"] for r in rows[-5:]) < 0.8 * sum(r["recon"] for r in rows[:5])
    assert rows[-1]["val_psnr"] > 10
    assert data.Image.open(run / "reconstructions.png").size == (2 * 164, 2 * 164)


def test_flags_that_contradict_the_run(trained, capsys):
    for name, more in (("width", dict(width=16)), ("seed", dict(seed=1)), ("batch", dict(batch=8)),
                       ("lr-decay", dict(steps=3, lr_decay=0.5))):
        assert f"--{name} " in refused(lambda: training.main(vae_settings(trained, **more)), capsys)
    with data.alone(trained / "vae.pt"):
        assert "another process" in refused(lambda: training.main(vae_settings(trained)), capsys)
    training.main(vae_settings(trained, lr=2e-3, clip_norm=0.5, precision="bf16", val_every=4,
                               accumulate=2))  # these may change


def test_not_finite_stops_and_keeps_what_is_good(trained, capsys, monkeypatch):
    good = (trained / "vae.pt").read_bytes()
    monkeypatch.setattr(losses, "recon_loss", lambda x, y: (x - y).sum() * math.inf)
    for every in (1, 100):
        s = vae_settings(trained, log_every=every, val_every=3)
        sentence = refused(lambda: training.main(s), capsys)
        assert "not finite" in sentence and "lower --lr" in sentence
        assert (trained / "vae.pt").read_bytes() == good


@pytest.mark.parametrize("file", ["vae.pt", "ae.ckpt"])
@pytest.mark.parametrize("kind, name", [("no", "vae_finetuned.pt"), ("demo", "vae_denoising.pt")])
def test_the_encoder_stays_bit_for_bit(file, kind, name, trained, capsys):
    """Of our own file, and of others'; when the file has changed, 05 does not go on."""
    if file == "ae.ckpt":
        torch.save(peer_files()["kl-f8"][1], trained / file)
    before = model.load_vae(trained / file).state_dict()
    s = decoder_settings(trained, vae=str(trained / file), denoising=kind, steps=1)
    finetuning.main(s)
    vae = finetuning.load_vae(trained / name)
    after = vae.state_dict()
    frozen = [k for k in before if k.startswith(("encoder", "quant_conv"))]
    assert len(frozen) > 30 and all(torch.equal(before[k], after[k]) for k in frozen)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert vae.decode(vae.encode(x).mu).shape == x.shape
    small_vae(trained / file)
    assert "another --vae" in refused(lambda: finetuning.main(s), capsys)


def test_flags_that_do_nothing_or_are_new(trained, capsys):
    finetuning.main(decoder_settings(trained, lambda_adv=0.1, steps=1))
    assert "vae.pt had --lambda-adv 0.01, not 0.1" in capsys.readouterr().out
    for words, more in (("changes nothing", dict(lambda_kl=1e-3)),
                        ("changes nothing", dict(denoising="B", gan_loss="log")),
                        ("another --disc-width", dict(disc_width=16))):
        assert words in refused(lambda: finetuning.main(decoder_settings(trained, **more)), capsys)


def test_unets_have_the_papers_sizes():
    """E, C.1, in millions, with its 8 latent channels."""
    for size, millions in (("B", 20.63), ("M", 49.33), ("L", 88.98), ("XL", 140.63), ("H", 355.62)):
        with torch.device("meta"):
            decoder = finetuning.DenoisingDecoder(model.Architecture(latent_channels=8), size)
        assert round(model.count(decoder) / 1e6, 2) == millions


def test_velocity_and_sampling(monkeypatch):
    """What the network sees, and Euler's three steps against a velocity that is known."""
    vae = small_vae()
    finetuning.give_denoising_decoder(vae, "demo")
    x_t, z = torch.randn(2, 3, 32, 48), torch.randn(2, 16, 4, 6)
    t = torch.tensor([0.3, 0.9]).view(2, 1, 1, 1)
    seen = []
    unet = vae.decoder.unet
    unet.conv_in.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    vae.decoder.unet(x_t, t, z)
    torch.testing.assert_close(seen[0][:, :3], x_t / ((1 - t) ** 2 * 0.09 + t ** 2).sqrt())
    assert torch.equal(seen[0][0, 3:, 8:16, :8], z[0, :, 1:2, :1].expand(-1, 8, 8))
    monkeypatch.setattr(vae.decoder.unet, "forward", lambda x_t, t, z: x_t + z[:, :1, :1, :1])
    x_t = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(2024))
    times = [math.log(100 - 99 * i / 3) / math.log(100) for i in range(4)]
    for now, after in zip(times, times[1:]):
        x_t = x_t + (after - now) * (x_t + z[1, 0, 0, 0])
    torch.testing.assert_close(vae.decode(z)[1:], x_t / 0.6, atol=1e-4, rtol=1e-4)


def test_denoising_losses_by_hand():
    """The estimate of a step, Eq. 9, 10 and 12, and R1."""
    s = decoder_settings("", denoising="B", lambda_perc=0.5, lambda_adv=0.5)
    vae = small_vae()
    finetuning.give_denoising_decoder(vae, "demo")
    disc = finetuning.PairDiscriminator(8)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    perceptual = losses.Perceptual("untrained")
    torch.manual_seed(2)
    total, disc_loss, _ = finetuning.denoising_losses(x, vae, disc, perceptual, s)
    torch.manual_seed(2)
    eps = torch.randn_like(x)
    t = torch.sigmoid(torch.randn(2, 1, 1, 1))
    x_t = (1 - t) * 0.6 * x + t * eps
    v = vae.decoder.unet(x_t, t, vae.encode(x).sample())
    x_hat = (x_t - t * v) / 0.6
    recon = (v - eps + 0.6 * x).square().mean()
    adv = F.softplus(-disc(x_hat, x_t, t)).mean()
    torch.testing.assert_close(total, recon + 0.5 * adv + 0.5 * perceptual(x, x_hat))
    picture = x.clone().requires_grad_()
    real = disc(picture, x_t, t)
    slope, = torch.autograd.grad(real.sum(), picture)
    judged = 0.5 * (F.softplus(-real).mean() + F.softplus(disc(x_hat, x_t, t)).mean())
    torch.testing.assert_close(disc_loss, judged + 0.01 * slope.square().mean())
