"""06_eval.py: SSIM, meters against the artifacts they are for, latents, every kind of model."""
import json
import math
import types

import numpy as np
import pytest
import torch
from conftest import (ROOT, checkpoint, data, evaluation, finetuning, losses, model, refused,
                      small_vae)
from pictures import spoilt, unhealthy


def settings(run, **more):
    return evaluation.Settings(**(dict(run=str(run), size=64, perceptual_net="untrained", workers=0,
                                       device="cpu") | more))


def rows(run):
    return list(json.loads((run / "eval.json").read_text()).values())


def first_pictures(run, count):
    pictures = data.read_list(run, "val", 1)[:count]
    return losses.from_uint8(torch.stack([data.read_square(p["file"], 64) for p in pictures]))


def test_ssim_is_its_definition():
    """At one place: means, variances and covariance under the Gaussian window."""
    torch.manual_seed(0)
    x = torch.randint(200, 256, (1, 3, 11, 11)).double()
    y = (x + 2 * torch.randn(x.shape)).clamp(0, 255).round()
    d = (torch.arange(11) - 5).double() ** 2
    window = torch.exp(-(d[:, None] + d) / (2 * 1.5 ** 2))

    def mean(v):
        return (window * v).sum((2, 3), keepdim=True) / window.sum()

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean((x - mx) ** 2), mean((y - my) ** 2), mean((x - mx) * (y - my))
    expected = ((2 * mx * my + 6.5025) * (2 * cov + 58.5225)
                / ((mx ** 2 + my ** 2 + 6.5025) * (vx + vy + 58.5225))).mean()
    assert evaluation.ssim(x, y).item() == pytest.approx(expected.item(), abs=2e-5)


def reaction(name, x, y):
    """How unhealthy a meter's mean reading of some pictures is."""
    meter = evaluation.METERS[name]
    return unhealthy(name, np.mean([meter(a[None], b[None]).item() for a, b in zip(x, y)]))


def test_meters_know_their_artifact():
    """At full strength ten times more than any other, and it grows; noise is no artifact, however
    much there is. tests/README.md has the table."""
    drawn = [data.resize_shorter(data.draw_scene(0, i, "train", 360), 256) for i in range(8)]
    pictures = losses.from_uint8(torch.stack([data.center_crop(im, 256) for im in drawn]))
    x = losses.to_uint8(pictures).float()
    series = {name: [make(pictures, strength) for strength in (0.25, 0.5, 1.0)]
              for name, make in losses.ARTIFACTS.items()}
    series |= {"noise": spoilt(pictures, False), "smooth error": spoilt(pictures, True)}
    series = {name: [losses.to_uint8(y).float() for y in ys] for name, ys in series.items()}
    lines = []
    for name in evaluation.METERS:
        row = {of: [reaction(name, x, y) for y in ys] for of, ys in series.items()}
        lines.append(f"| {name} | " + " | ".join(
            " / ".join(f"{v:.2g}" for v in values) for values in row.values()) + " |")
        own = row.pop(name)
        assert own[0] > 0.5 and own[0] < own[1] < own[2], (name, own)
        assert reaction(name, 0 * x + 99, 0 * x + 99) == 0  # a copy of what has no detail
        for other, values in row.items():
            assert own[2] > 10 * max(values), (name, other, own, values)
    written = (ROOT / "tests" / "README.md").read_text()
    assert all(line in written for line in lines), "\n" + "\n".join(lines)


def test_every_kind_of_model(run):
    """Our own files with both decoders, TorchScript, yardsticks; the tables have a row each."""
    small_vae(run / "vae.pt")
    vae = small_vae()
    finetuning.give_denoising_decoder(vae, "demo")
    torch.save(dict(settings=dict(denoising="demo"), ema=vae.state_dict(),
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
    noise = found[0]["latents"]["psnr_under_noise"]
    assert noise["0.0"] == pytest.approx(found[0]["psnr"], abs=0.01)
    evaluation.main(settings(run, vae=("bicubic:8",), pictures=2, size=96,
                             images=f"{run}/data/val"))
    evaluation.main(settings(run, vae=("bicubic:8",), pictures=2))  # takes its own row's place
    assert [row["of"].split(", ")[1] for row in rows(run)] == 4 * ["64 px"] + ["96 px"]
    text = (run / "eval.md").read_text()
    assert all(f"| {spec} | 2 of {run}/data/val, 64 px | " in text for spec in specs)
    assert "not LPIPS" in text
    assert all((run / f"{name}.png").is_file() for name in ("eval", "activations"))


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
    assert "is missing" in stops("bicubic:8", "nothing.pt") and not (run / "eval.json").exists()
    assert "bicubic:100 fails" in stops("bicubic:100")
    assert "more than one picture" in stops("jpeg:9", fid=True, pictures=1)
    small_vae(run / "vae.pt")
    assert "multiples of 8" in stops(size=68, images=f"{run}/data/val")
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
    assert "peak" not in first and "peak" not in second  # Fig. 3 knows our decoders only
