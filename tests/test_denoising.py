"""The decoder that denoises (eps-VAE; 02, 05, 06): counts, times of sampling, its losses by hand, exact resume,
and that every later stage takes it."""
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import beside, finished, killed, refused, started
from test_train import FLAGS as TRAIN_FLAGS, checkpoint, one_trunk, same, settings as train_settings  # noqa: F401  (one_trunk applies here too)


@pytest.fixture(scope="module")
def finetune():
    return importlib.import_module("05_finetune_decoder")


@pytest.fixture(scope="module")
def evaluation():
    return importlib.import_module("06_eval")


FLAGS = dict(batch=2, crop=32, disc_width=8, workers=0, log_every=1, val_every=4, val_pictures=2, save_every=2,
             lr=1e-3, steps=4, decoder="denoising", unet="laptop", decay=0.0)


def settings(finetune, run, **more):
    return finetune.Settings(**(finetune.PRESETS["demo"] | FLAGS | dict(run=str(run)) | more))


@pytest.fixture
def trained(train, run):
    train.main(train_settings(train, run, steps=2))
    return run


def test_parameters_are_the_papers(model):
    """Appendix C.1, millions, with its latent of 8 channels."""
    a = model.Architecture(latent_channels=8)
    expected = {"B": 20.63, "M": 49.33, "L": 88.98, "XL": 140.63, "H": 355.62}
    for name, millions in expected.items():
        with torch.device("meta"):
            assert round(model.count(model.DenoisingDecoder(a, name)) / 1e6, 2) == millions


def test_sampling_times(model):
    """Eq. 13: rho(t) = (log m - log(t (m - n) + n)) / (log m - log n), m = 1, n = 100."""
    expected = {1: [1, 0], 2: [1, 0.852, 0], 3: [1, 0.913, 0.766, 0], 5: [1, 0.952, 0.890, 0.804, 0.659, 0]}
    for steps, times in expected.items():
        assert model.sampling_times(steps).tolist() == pytest.approx(times, abs=6e-4)


@pytest.fixture(scope="module")
def small(model):
    torch.manual_seed(0)
    a = model.Architecture(width=8, res_blocks=1, attention_levels=(), groups=8)
    return model.let_denoise(model.build(a), "laptop").eval()


def test_unet_is_as_plain_as_its_blocks(small, model):
    """Unit input whatever t, all latents and times looked at, halves and doubles in pairs, and the same plain or fast."""
    torch.manual_seed(0)
    for p in small.decoder.parameters():                                                   # a block begins as its shortcut
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    x_t, z, t = torch.randn(2, 3, 32, 48), torch.randn(2, 16, 4, 6), torch.tensor([0.3, 0.9]).view(2, 1, 1, 1)
    seen = []
    hook = small.decoder.conv_in.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    v = small.decoder.velocity(x_t, t, z)
    hook.remove()
    expected = x_t / ((1 - t) ** 2 * 0.09 + t ** 2).sqrt()                                  # gamma 0.6 times deviation 0.5, squared
    assert torch.allclose(seen[0][:, :3], expected) and torch.equal(seen[0][0, 3:, 8:16, :8], z[0, :, 1:2, :1].expand(-1, 8, 8))
    assert v.shape == x_t.shape and not torch.allclose(v, small.decoder.velocity(x_t, 0.5 * t, z), atol=1e-4)
    assert not torch.allclose(v, small.decoder.velocity(x_t, t, z.flip(0)), atol=1e-4)
    model.set_fast(small, False)
    assert torch.allclose(v, small.decoder.velocity(x_t, t, z), atol=1e-5)
    model.set_fast(small, True)


def test_sampling_is_eulers(small, monkeypatch):
    """Against a velocity that is known: v = x_t + z's first value. Three steps by hand; neighbors in a batch do not matter."""
    monkeypatch.setattr(small.decoder, "velocity", lambda x_t, t, z: x_t + z[:, :1, :1, :1])
    z = torch.randn(2, 16, 4, 4)
    made = small.decode(z)
    x = small.decoder(None, z[1:])
    assert torch.equal(made[1:], x) and made.shape == (2, 3, 32, 32)
    start = torch.randn(1, 3, 32, 32, generator=importlib.import_module("01_data").generator(0, "decoder"))
    times = [math.log(100 - 99 * i / 3) / math.log(100) for i in range(4)]
    x_t = start
    for now, after in zip(times, times[1:]):
        x_t = x_t + (after - now) * (x_t + z[1, 0, 0, 0])
    assert torch.allclose(x, x_t / 0.6, atol=1e-4)


def test_gradients_are_the_losses(finetune, model, losses, small):
    """The estimate of a step, Eq. 9, 10 and 12, R1, by hand; each player gets its own gradient only."""
    torch.manual_seed(1)
    s = finetune.denoising_settings(settings(finetune, "x"))
    assert (s.lambda_perc, s.lambda_adv, s.beta1, s.beta2, s.ema_decay) == (0.5, 0.5, 0, 0.999, 0.999)
    x, eps = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 3, 32, 32)
    noise, u = torch.randn(2, 16, 4, 4), torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    disc = finetune.PairDiscriminator(8, 2)
    finetune.freeze_encoder(small, "decoder.")
    trained, judging = list(small.decoder.parameters()), list(disc.parameters())
    terms = finetune.denoising_gradients(x.clone(), noise, eps, u, small, disc, lambda a, b: (a - b).abs().mean(), trained, judging, s)
    t = torch.tensor([0.5, 0.7310586]).view(2, 1, 1, 1)
    x_t = (1 - t) * 0.6 * x + t * eps
    v = small.decoder.velocity(x_t, t, small.encode(x).sample(noise))
    x_hat = (x_t - t * v) / 0.6
    recon, adv, perc = (v - eps + 0.6 * x).square().mean(), F.softplus(-disc(x_hat, x_t, t)).mean(), (x - x_hat).abs().mean()
    for name, value in dict(recon=recon, adv=adv, perc=perc, total=recon + 0.5 * adv + 0.5 * perc).items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-4)
    picture = x.clone().requires_grad_()
    real = disc(picture, x_t, t)
    slope, = torch.autograd.grad(real.sum(), picture, create_graph=True)
    judged = 0.5 * (F.softplus(-real).mean() + F.softplus(disc(x_hat.detach(), x_t, t)).mean()) + 0.01 * slope.square().mean()
    own = torch.autograd.grad(recon + 0.5 * adv + 0.5 * perc, trained, allow_unused=True)
    for p, g in zip(trained, own):
        assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-6)
    for p, g in zip(judging, torch.autograd.grad(judged, judging)):
        assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-6)
    small.zero_grad()


def test_trains_and_every_stage_takes_it(finetune, evaluation, model, data, trained):
    """The encoder bit for bit, latents' scale carried over, decode in three steps; 06 with FILE@N; the log has its terms."""
    finetune.main(settings(finetune, trained))
    before, after = checkpoint(trained), torch.load(trained / "vae_denoising.pt", weights_only=True)
    for name, w in after["ema"].items():
        assert name.startswith("decoder.") or torch.equal(w, before["ema"][name])
    same(before["latent_mean"], after["latent_mean"])
    log = [line for line in data.read_jsonl(trained / "log.jsonl") if line["stage"] == "05_denoising_decoder"]
    assert len(log) == 4 and "weighted_perc" in log[0] and "kl" not in log[0]
    vae = model.load_vae(trained / "vae_denoising.pt")
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    made = vae.decode(vae.encode(x).mu)
    assert torch.equal(made, vae.decode(vae.encode(x).mu)) and made.shape == x.shape
    path = str(trained / "vae_denoising.pt")
    rows = evaluation.main(evaluation.Settings(**(evaluation.PRESETS["demo"] | dict(
        run=str(trained), size=64, resize=0, pictures=2, latents=0, vae=(path, f"{path}@1", f"{path}@5")))))
    assert [row["name"] for row in rows] == ["vae_denoising", "vae_denoising@1", "vae_denoising@5"]
    assert len({row["psnr"] for row in rows}) == 3


def whole_and_killed(run):
    finished(started(["04_train_vae.py", "--run", run, *TRAIN_FLAGS, "--steps", 2], run / "printed.txt"), run / "printed.txt")
    line = ["05_finetune_decoder.py", "--run", run, "--decoder", "denoising", "--unet", "laptop", "--crop", 32,
            "--batch", 2, "--disc-width", 8, "--log-every", 1, "--save-every", 2, "--val-every", 3, "--val-pictures", 2]
    finished(started([*line, "--steps", 6], run / "printed.txt"), run / "printed.txt")
    (run / "vae_denoising.pt").rename(run / "whole.pt")
    log = run / "log.jsonl"
    kept = [text for text in log.read_text().splitlines() if "denoising" not in text]
    log.write_text("".join(text + "\n" for text in kept))
    killed([*line, "--steps", 6], run, (len(kept) + 3,))


@beside(whole_and_killed)
def test_resume_after_kill_is_exact(outcome):
    run, _ = outcome
    same(*[torch.load(run / name, weights_only=True) for name in ("vae_denoising.pt", "whole.pt")])


def test_sentences(finetune, evaluation, model, trained, capsys):
    assert "--crop 40" in refused(lambda: finetune.main(settings(finetune, trained, crop=40, unet="B")), capsys)
    finetune.main(settings(finetune, trained, steps=1))
    path = str(trained / "vae_denoising.pt")
    assert "start from the file" in refused(lambda: finetune.main(settings(finetune, trained, vae=path, decoder="plain")), capsys)
    assert "--compile" in refused(lambda: finetune.main(settings(finetune, trained, compile=True)), capsys)
    for spec in (f"{path}@0", f"{trained / 'vae.pt'}@3"):
        s = evaluation.Settings(run=str(trained), vae=(spec,), size=64, perceptual_net="untrained", latents=0)
        assert "decoder that denoises" in refused(lambda: evaluation.main(s), capsys)


def test_the_smallest_picture_it_takes_can_be_made(model):
    """Where the encoder halves twice, the U-Net halves four times: a side of 16 leaves it one position, which zero padding allows."""
    vae = model.VAE(model.Architecture(width=8, width_mult=(1, 1, 2), res_blocks=1, groups=4, attention_levels=()))
    assert vae.takes(16)
    model.let_denoise(vae, "B")
    assert vae.takes(16) and not vae.takes(24)
    assert all(net.padding == (1, 1) and net.padding_mode == "zeros" for net in vae.decoder.modules()
               if isinstance(net, torch.nn.Conv2d) and net.kernel_size == (3, 3))
    with torch.no_grad():
        assert vae.eval().decode(torch.zeros(1, 16, 4, 4)).shape == (1, 3, 16, 16)
