"""06_eval.py: metrics against references, meters against the artifacts they are for, every kind of
model."""
import itertools
import json
import math
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, data, evaluation, finetuning, losses, model, refused, small_vae


def scenes(count=8, side=256):
    """Scenes in [-1, 1], (count, 3, side, side)."""
    crops = [data.center_crop(data.resize_shorter(data.draw_scene(0, i, "train", 360), side), side)
             for i in range(count)]
    return losses.from_uint8(torch.stack(crops))


def settings(run, **more):
    return evaluation.Settings(**(dict(run=str(run), size=64, perceptual_net="untrained", workers=0,
                                       device="cpu") | more))


def rows(run):
    return json.loads((run / "eval.json").read_text())["rows"]


def test_ssim_is_its_definition():
    """Means, variances and covariance under the Gaussian window, one place at a time."""
    torch.manual_seed(0)
    x = torch.randint(0, 256, (1, 3, 18, 20)).double()
    y = (x + 20 * torch.randn(x.shape)).clamp(0, 255).round()
    d = torch.arange(11) - 5
    window = torch.exp(-(d[:, None] ** 2 + d ** 2) / (2 * 1.5 ** 2)).double()
    window = window / window.sum()
    values = []
    for top, left in itertools.product(range(8), range(10)):
        a = x[0, :, top:top + 11, left:left + 11]
        b = y[0, :, top:top + 11, left:left + 11]
        ma, mb = [(window * v).sum((1, 2), keepdim=True) for v in (a, b)]
        va, vb, cov = [(window * v).sum((1, 2)) for v in
                       ((a - ma) ** 2, (b - mb) ** 2, (a - ma) * (b - mb))]
        ma, mb = ma.flatten(), mb.flatten()
        values.append((2 * ma * mb + 6.5025) * (2 * cov + 58.5225)
                      / ((ma ** 2 + mb ** 2 + 6.5025) * (va + vb + 58.5225)))
    assert evaluation.ssim(x, y).item() == pytest.approx(torch.stack(values).mean().item())
    assert evaluation.ssim(x, x).item() == pytest.approx(1.0)


def reaction(name, x, y):
    """How far a meter's mean reading is from ideal, in units of what we call healthy."""
    meter = evaluation.METERS[name]
    reading = np.mean([meter(x[i:i + 1], y[i:i + 1]).item() for i in range(len(x))])
    ideal, edge = {"color shift": (0, 4), "grid": (1, 1.1), "blur": (1, 0.9), "corner": (1, 2),
                   "droplet": (0, 8)}[name]
    return max((reading - ideal) / (edge - ideal), 0)


def test_meters_know_their_artifact():
    """Five meters, five artifacts, three strengths: each reacts to its own more than to any other,
    at full strength ten times more, and grows with it. The table is in tests/README.md."""
    pictures = scenes()
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
    assert all(reaction(name, x, x) == 0 for name in evaluation.METERS)  # an exact copy
    blocky = torch.cat([evaluation.jpeg(10, v[None]) for v in pictures])
    assert reaction("grid", x, losses.to_uint8(blocky).float()) > 2
    written = (ROOT / "tests" / "README.md").read_text()
    assert all(line in written for line in lines), "\n" + "\n".join(lines)


def test_every_kind_of_model(run, capsys):
    """Our own files with both decoders, TorchScript, yardsticks; the tables have a row each, and
    the yardstick's numbers are what they should be."""
    small_vae(run / "vae.pt")
    denoising = small_vae()
    finetuning.give_denoising_decoder(denoising, "demo")
    torch.save(dict(settings=dict(decoder="denoising", unet="demo"), ema=denoising.state_dict(),
                    architecture=vars(denoising.architecture)), run / "vae_denoising.pt")

    class Codec(torch.nn.Module):
        def forward(self, x):
            return 0.5 * x, x

    torch.jit.script(Codec()).save(run / "autoencoder.jit")
    specs = [str(run / "vae.pt"), str(run / "vae_denoising.pt"), f"jit:{run / 'autoencoder.jit'}",
             "bicubic:8", "jpeg:75"]
    evaluation.main(settings(run, vae=tuple(specs), pictures=2))
    found = rows(run)
    assert [row["name"] for row in found] == specs
    paths = [picture["file"] for picture in data.read_list(run, "val", 1)]
    x = torch.stack([data.read_square(path, 64) for path in paths[:2]])
    half = losses.psnr(losses.from_uint8(x), 0.5 * losses.from_uint8(x)).mean().item()
    assert found[2]["psnr"] == pytest.approx(half, abs=1e-3)
    text = (run / "eval.md").read_text()
    assert all(f"| {spec} | " in text for spec in specs) and "is not LPIPS" in text
    assert "bicubic:8 |" in capsys.readouterr().out
    latents = found[0]["latents"]
    assert latents["channels"] == 16 and len(latents["kl"]) == len(latents["std"]) == 16
    noise = latents["psnr_under_noise"]
    assert noise["0.0"] == pytest.approx(found[0]["psnr"], abs=0.01)
    assert "mid.block_1" in found[0]["activation_max_over_median"]
    for name in ("eval.png", "activations.png", "latents.png"):
        assert data.Image.open(run / name).width > 100
    evaluation.main(settings(run, pictures=2))  # the run's own
    assert rows(run) == found[:2]


def test_latent_report_by_value():
    """Known posteriors: two channels, of which one carries nothing."""
    mu = torch.stack([3 * torch.randn(128, 64), torch.zeros(128, 64)])[None]
    logvar = torch.stack([torch.full((128, 64), math.log(0.25)), torch.zeros(128, 64)])[None]
    vae = types.SimpleNamespace(encode=lambda x: model.Posterior(mu, logvar),
                                decode=lambda z: z[:, :1].expand(-1, 3, -1, -1))
    report = evaluation.latent_report(vae, [torch.zeros(1, 3, 128, 64)])
    assert report["active"] == 1 and report["channels"] == 2 and report["kl"][1] == 0
    assert report["kl"][0] == pytest.approx(0.5 * (9 + 0.25 - 1 - math.log(0.25)), rel=0.05)
    assert report["std"] == pytest.approx([9.25 ** 0.5, 1], rel=0.05)
    assert report["posterior_variance"] == pytest.approx((0.25 + 1) / 2, rel=1e-6)


def test_bad_models_and_pictures(run, tmp_path, capsys):
    """A sentence names the model; broken pictures are passed over; nothing measured is lost."""
    def stops(**more):
        return refused(lambda: evaluation.main(settings(run, **more)), capsys)

    assert "run 04_train_vae.py first" in stops()
    assert "bicubic:x" in stops(vae=("bicubic:x",)) and "--size 60" in stops(size=60)
    small_vae(run / "vae.pt")
    vae = str(run / "vae.pt")
    assert "multiples of 8" in stops(vae=(vae,), size=68)
    checkpoint = torch.load(run / "vae.pt")
    checkpoint["ema"]["decoder.conv_out.bias"] += math.nan
    torch.save(checkpoint, run / "nan.pt")
    assert "not finite" in stops(vae=(vae, str(run / "nan.pt"))) and len(rows(run)) == 1
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        data.draw_scene(0, i, "train", 80).save(pictures / f"{i}.png")
    (pictures / "1.png").write_bytes(b"broken")
    evaluation.main(settings(run, images=str(pictures), vae=("jpeg:75",)))
    assert rows(run)[0]["pictures"] == 2 and "passed over" in capsys.readouterr().out
    (pictures / "0.png").unlink()
    (pictures / "2.png").unlink()
    assert "no picture" in stops(images=str(pictures), vae=("jpeg:75",))


def test_diffusers(run):
    """Autoencoders that the package knows: with a posterior, and without one."""
    diffusers = pytest.importorskip("diffusers")
    kl = diffusers.AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
                                 up_block_types=("UpDecoderBlock2D",) * 2,
                                 block_out_channels=(32, 32)).eval()
    kl.save_pretrained(run / "model" / "vae")
    tiny = diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                                     decoder_block_out_channels=(8, 8), num_decoder_blocks=(1, 1))
    tiny.save_pretrained(run / "tiny")
    specs = (f"diffusers:{run / 'model'}@vae", f"diffusers:{run / 'tiny'}")
    evaluation.main(settings(run, vae=specs, pictures=1))
    x = losses.from_uint8(data.read_square(data.read_list(run, "val", 1)[0]["file"], 64)[None])
    with torch.no_grad():
        x_hat = kl.decode(kl.encode(x).latent_dist.mean).sample
    first, second = rows(run)
    assert first["psnr"] == pytest.approx(losses.psnr(x, x_hat).item(), abs=0.01)
    assert "active" in first["latents"] and "active" not in second["latents"]


