"""06_eval.py: SSIM, meters against the artifacts they are for, latents, every kind of model."""
import json
import math
import types

import numpy as np
import pytest
import torch
from conftest import (ROOT, checkpoint, data, evaluation, finetuning, losses, model, refused,
                      small_vae)


def settings(run, **more):
    return evaluation.Settings(**(dict(run=str(run), size=64, perceptual_net="untrained", workers=0,
                                       device="cpu") | more))


def rows(run):
    return json.loads((run / "eval.json").read_text())["rows"]


def first_pictures(run, count):
    pictures = data.read_list(run, "val", 1)[:count]
    return losses.from_uint8(torch.stack([data.read_square(p["file"], 64) for p in pictures]))


def test_ssim_is_its_definition():
    """Means, variances and covariance under the Gaussian window, at each place."""
    torch.manual_seed(0)
    x = torch.randint(0, 256, (1, 3, 18, 20)).double()
    y = (x + 20 * torch.randn(x.shape)).clamp(0, 255).round()
    d = torch.arange(11) - 5
    window = torch.exp(-(d[:, None] ** 2 + d ** 2) / (2 * 1.5 ** 2)).double()
    window = window / window.sum()

    def mean(v):
        return (window * v).sum((-2, -1), keepdim=True)

    a, b = [v.unfold(2, 11, 1).unfold(3, 11, 1) for v in (x, y)]  # (1, 3, 8, 10, 11, 11)
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean((a - ma) ** 2), mean((b - mb) ** 2), mean((a - ma) * (b - mb))
    expected = ((2 * ma * mb + 6.5025) * (2 * cov + 58.5225)
                / ((ma ** 2 + mb ** 2 + 6.5025) * (va + vb + 58.5225))).mean()
    assert evaluation.ssim(x, y).item() == pytest.approx(expected.item())


def reaction(name, x, y):
    """How far a meter's mean reading is from ideal, in units of what we call healthy."""
    meter = evaluation.METERS[name]
    reading = np.mean([meter(x[i:i + 1], y[i:i + 1]).item() for i in range(len(x))])
    ideal, edge = {"color shift": (0, 4), "grid": (1, 1.1), "blur": (1, 0.9), "corner": (1, 2),
                   "droplet": (0, 8)}[name]
    return max((reading - ideal) / (edge - ideal), 0)


def test_meters_know_their_artifact():
    """At full strength ten times more than any other, and it grows; tests/README.md's table."""
    drawn = [data.resize_shorter(data.draw_scene(0, i, "train", 360), 256) for i in range(8)]
    pictures = losses.from_uint8(torch.stack([data.center_crop(im, 256) for im in drawn]))
    x = losses.to_uint8(pictures).float()
    cells = {name: {a: [] for a in losses.ARTIFACTS} for name in evaluation.METERS}
    for strength in (0.25, 0.5, 1.0):
        for artifact, make in losses.ARTIFACTS.items():
            y = losses.to_uint8(make(pictures, strength)).float()
            for name in evaluation.METERS:
                cells[name][artifact].append(reaction(name, x, y))
    lines = []
    for name, row in cells.items():
        lines.append(f"| {name} | " + " | ".join(
            " / ".join(f"{v:.2g}" for v in values) for values in row.values()) + " |")
        own = row[name]
        assert own[0] > 0.5 and own[0] < own[1] < own[2], (name, own)
        for artifact, values in row.items():
            assert artifact == name or own[2] > 10 * values[2], (name, artifact, own, values)
    written = (ROOT / "tests" / "README.md").read_text()
    assert all(line in written for line in lines), "\n" + "\n".join(lines)


def test_every_kind_of_model(run):
    """Our own files with both decoders, TorchScript, yardsticks; the tables have a row each."""
    small_vae(run / "vae.pt")
    vae = small_vae()
    finetuning.give_denoising_decoder(vae, "demo")
    torch.save(dict(settings=dict(decoder="denoising", unet="demo"), ema=vae.state_dict(),
                    architecture=vars(vae.architecture)), run / "vae_denoising.pt")

    class Codec(torch.nn.Module):
        def forward(self, x):
            return 0.5 * x, x

    torch.jit.script(Codec()).save(run / "autoencoder.jit")
    specs = [f"{run}/vae.pt", f"{run}/vae_denoising.pt", f"jit:{run}/autoencoder.jit", "bicubic:8"]
    evaluation.main(settings(run, vae=tuple(specs), pictures=2))
    found = rows(run)
    assert [row["name"] for row in found] == specs
    x = first_pictures(run, 2)
    assert found[2]["psnr"] == pytest.approx(losses.psnr(x, 0.5 * x).mean().item(), abs=1e-3)
    text = (run / "eval.md").read_text()
    assert all(f"| {spec} | " in text for spec in specs) and "not LPIPS" in text
    noise = found[0]["latents"]["psnr_under_noise"]
    assert noise["0.0"] == pytest.approx(found[0]["psnr"], abs=0.01)
    assert all((run / f"{name}.png").is_file() for name in ("eval", "activations", "latents"))


def test_latent_report_by_value():
    """Known posteriors: two channels, of which one carries nothing."""
    used = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    mu = 3 * used * torch.randn(1, 2, 128, 64)
    q = model.Posterior(mu, math.log(0.25) * used.expand_as(mu))
    vae = types.SimpleNamespace(encode=lambda x: q, decode=lambda z: z[:, :1].expand(-1, 3, -1, -1))
    report = evaluation.latent_report(vae, [torch.zeros(1, 3, 128, 64)])
    kl = 0.5 * (9 + 0.25 - 1 - math.log(0.25))
    assert report["active"] == 1 and report["kl"] == pytest.approx([kl, 0], rel=0.05)
    assert report["std"] == pytest.approx([9.25 ** 0.5, 1], rel=0.05)


def test_bad_models(run, capsys):
    """A sentence names the model; nothing measured is lost."""
    def stops(*specs, **more):
        return refused(lambda: evaluation.main(settings(run, vae=specs, **more)), capsys)

    assert "run 04_train_vae.py first" in stops()
    small_vae(run / "vae.pt")
    assert "multiples of 8" in stops(size=68)
    broken = checkpoint(run / "vae.pt")
    broken["ema"]["decoder.conv_out.bias"] += math.nan
    torch.save(broken, run / "nan.pt")
    assert "not finite" in stops("bicubic:8", str(run / "nan.pt")) and len(rows(run)) == 1


def test_diffusers(run):
    """Autoencoders that the package knows: with a posterior, and without one."""
    diffusers = pytest.importorskip("diffusers")
    kl = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4).eval()
    kl.save_pretrained(run / "model" / "vae")
    diffusers.AutoencoderTiny().save_pretrained(run / "tiny")
    specs = (f"diffusers:{run}/model@vae", f"diffusers:{run}/tiny")
    evaluation.main(settings(run, vae=specs, pictures=1))
    x = first_pictures(run, 1)
    with torch.no_grad():
        x_hat = kl.decode(kl.encode(x).latent_dist.mean).sample
    first, second = rows(run)
    assert first["psnr"] == pytest.approx(losses.psnr(x, x_hat).item(), abs=0.01)
    assert "active" in first["latents"] and "active" not in second["latents"]
