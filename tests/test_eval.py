"""06_eval.py: metrics against references, the meters against the artifacts they are for, rows of every kind of model."""
import importlib
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, refused
from study import reaction, read_meters
from test_model import peer_file, tiny


@pytest.fixture(scope="module")
def evaluation():
    return importlib.import_module("06_eval")


@pytest.fixture(scope="module")
def scenes(data):
    """Eight scenes at 256 pixels, as tensors in [-1, 1]."""
    from torchvision.transforms.v2.functional import pil_to_tensor
    crops = [data.center_crop(data.resize_shorter(pil_to_tensor(data.scene(0, i)[1]()), 256), 256) for i in range(8)]
    return torch.stack(crops).float() / 127.5 - 1


def settings(evaluation, run, **more):
    return evaluation.Settings(**(dict(run=str(run), size=64, perceptual_net="untrained", device="cpu") | more))


def data_module():
    return importlib.import_module("01_data")


def own_file(model, path, **more):
    vae = tiny(model, **more)
    data_module().save_checkpoint(path, stage="04_train_vae", architecture=vars(vae.architecture), model=vae.state_dict(), ema=vae.state_dict(),
                          latent_mean=torch.zeros(16), latent_std=torch.ones(16))
    return vae


def test_ssim_equals_the_reference(evaluation):
    """scikit-image's structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255), written with scipy; itself where it is installed."""
    from scipy.ndimage import gaussian_filter
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (48, 64, 3)).astype(float)
    y = (x + rng.normal(0, 20, x.shape)).clip(0, 255).round()
    values = []
    for c in range(3):
        a, b = x[..., c], y[..., c]
        blur = lambda v: gaussian_filter(v, 1.5, truncate=3.5)
        ma, mb = blur(a), blur(b)
        va, vb, vab = blur(a * a) - ma ** 2, blur(b * b) - mb ** 2, blur(a * b) - ma * mb
        s = (2 * ma * mb + 6.5025) * (2 * vab + 58.5225) / ((ma ** 2 + mb ** 2 + 6.5025) * (va + vb + 58.5225))
        values.append(s[5:-5, 5:-5].mean())
    to_tensor = lambda v: torch.from_numpy(v).permute(2, 0, 1)[None].byte()
    ours = evaluation.ssim(to_tensor(x), to_tensor(y)).item()
    assert ours == pytest.approx(np.mean(values), abs=1e-6)
    assert evaluation.ssim(to_tensor(x), to_tensor(x)).item() == pytest.approx(1.0)
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        return
    assert ours == pytest.approx(structural_similarity(x, y, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255), abs=1e-4)


def test_lab(evaluation):
    """Known CIELAB values of sRGB colours."""
    for rgb, expected in (((255, 255, 255), (0, 0)), ((128, 128, 128), (0, 0)), ((255, 0, 0), (80.09, 67.20)), ((0, 255, 0), (-86.18, 83.18)), ((0, 0, 255), (79.19, -107.86))):
        chroma = evaluation.lab_chroma(torch.tensor(rgb, dtype=torch.float)[None, :, None, None])
        assert chroma.flatten().tolist() == pytest.approx(expected, abs=0.05)


def test_a_perfect_reconstruction_is_ideal(evaluation, losses, scenes):
    x = losses.to_uint8(scenes).float()
    for name, reading in read_meters(x, x).items():
        assert reaction(name, reading) == pytest.approx(0, abs=1e-5), name


def test_meters_know_their_artifact(evaluation, losses, scenes):
    """Five meters, five artifacts, three strengths: each reacts to its own at least ten times more than to any other, and
    grows with it. JPEG at quality 10, whose blocks have steps of either sign, is a grid too."""
    x = losses.to_uint8(scenes).float()
    before = dict.fromkeys(evaluation.METERS, 1.0)                                          # the weakest artifact is outside the healthy range already
    cells = {meter: {a: [] for a in [*losses.ARTIFACTS, "JPEG 10"]} for meter in evaluation.METERS}
    write = lambda value: f"{value:.3g}" if value >= 0.01 else "0"
    for strength in losses.STRENGTHS:
        readings = {a: read_meters(x, losses.to_uint8(artifact(scenes, strength)).float()) for a, artifact in losses.ARTIFACTS.items()}
        for meter in evaluation.METERS:
            reactions = {a: reaction(meter, r[meter]) for a, r in readings.items()}
            for a, value in reactions.items():
                cells[meter][a].append(write(value))
            own = reactions.pop(meter)
            assert own >= 10 * max(reactions.values()), (meter, strength, own, reactions)
            assert own > before[meter], (meter, strength, own, before[meter])
            before[meter] = own
    for meter, reading in jpeg_readings(evaluation, losses, scenes, 10).items():
        cells[meter]["JPEG 10"].append(write(reaction(meter, reading)))
    assert float(cells["grid"]["JPEG 10"][0]) > 2
    lines = ["| meter | " + " | ".join([*losses.ARTIFACTS, "JPEG 10"]) + " |", "|---" * 7 + "|"]
    lines += [f"| {meter} | " + " | ".join(" / ".join(values) for values in row.values()) + " |" for meter, row in cells.items()]
    print("\n" + "\n".join(lines))
    written = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    numbers = lambda text: [[float(v) for v in cell.split("/")] for cell in text.split("|")[2:-1]]
    for line in lines[2:]:                                                                  # the table in tests/README.md is this one
        printed = next(row for row in written.splitlines() if row.startswith(line[:line.index("|", 2)] + "|") and "/" in row and row.count("|") == 8)
        for a, b in zip(numbers(line), numbers(printed)):
            assert a == pytest.approx(b, rel=0.05, abs=0.02)


def jpeg_readings(evaluation, losses, pictures, quality):
    y = torch.cat([losses.to_uint8(evaluation.jpeg(quality, x[None])) for x in pictures]).float()
    return read_meters(losses.to_uint8(pictures).float(), y)


def test_grid_meter_sees_either_sign(evaluation, losses, scenes):
    """Blocks and lines of random sign, checkerboards, JPEG by quality; blind to errors below a gray level, noise, blur and shifts."""
    x = losses.to_uint8(scenes).float()
    reading = lambda y: reaction("grid", read_meters(x, y.clamp(0, 255).round())["grid"])
    rng = torch.Generator().manual_seed(0)
    for period in (8, 4, 2):
        cells = torch.randn(8, 1, 256 // period, 256 // period, generator=rng)
        assert reading(x + 4 * torch.nn.functional.interpolate(cells, size=256)) > 1, period
    sign = (-1.0) ** (torch.arange(256)[:, None] + torch.arange(256))
    assert reading(x + 2 * sign) > 1 and reading(x + 2 * sign[:1]) > 1
    jpeg = [reaction("grid", jpeg_readings(evaluation, losses, scenes, q)["grid"]) for q in (10, 20, 40, 90)]
    assert jpeg == sorted(jpeg, reverse=True) and jpeg[0] > 2 > 0.5 > jpeg[-1]
    assert reading(x + 0.4 * torch.sign(torch.randn(x.shape, generator=rng))) == 0
    for healthy in (x + 8 * torch.randn(x.shape, generator=rng), x.roll(1, -1), losses.to_uint8(losses.blur(scenes, 0.3)).float(),
                    losses.to_uint8(evaluation.bicubic(8, scenes)).float()):
        assert reading(healthy) < 0.5


def test_peak_memory_begins_anew(evaluation):
    """Each row has the peak of its own model, not of the largest before it."""
    device = torch.device("cpu")
    if evaluation.peak_gib(device) is None:
        pytest.skip("this system does not tell")
    evaluation.reset_peak(device)
    large = torch.ones(2 ** 27)                                                             # half a GiB
    high = evaluation.peak_gib(device)
    del large
    evaluation.reset_peak(device)
    assert high - evaluation.peak_gib(device) > 0.4


def test_meters_mean_over_pictures(evaluation, losses, scenes):
    """Readings come from means of each picture's numbers: one at a time or together is the same."""
    x = losses.to_uint8(scenes[:4]).float()
    y = losses.to_uint8(losses.blur(losses.grid(scenes[:4], 0.3), 0.2)).float()
    for meter in evaluation.METERS.values():
        torch.testing.assert_close(meter.numbers(x, y), torch.cat([meter.numbers(x[i:i + 1], y[i:i + 1]) for i in range(4)]), atol=1e-3, rtol=1e-3)


def test_corner_splits_frame_and_interior(evaluation):
    x = torch.zeros(1, 3, 64, 64)
    y = x.clone()
    y[..., :16, :16] = 4.0
    frame, interior = evaluation.corner(x, y)[0].tolist()
    assert interior == 0 and frame == pytest.approx(16 * 256 / (64 * 64 - 32 * 32))


def test_rows(evaluation, model, losses, data, run):
    """Our file, every kind of peer (random weights), and the yardsticks, end to end; PSNR is the mean over pictures of the plain computation."""
    vae = own_file(model, run / "vae.pt")
    files = [str(run / "vae.pt")]
    for kind in ("flux", "sd3", "kl-f8", "sd1", "sdxl", "movqgan", "kandinsky3"):
        torch.save(peer_file(model, kind)[1], run / f"{kind}.pt")
        files.append(str(run / f"{kind}.pt"))
    rows = evaluation.main(settings(evaluation, run, vae=(*files, "bicubic:8", "jpeg:90"), latents=2))
    assert [r["name"] for r in rows] == ["vae", "flux", "sd3", "kl-f8", "sd1", "sdxl", "movqgan", "kandinsky3", "bicubic:8", "jpeg:90"]
    folder = run / "data" / "val"
    crops = [data.center_crop(data.resize_shorter(data.read_picture(folder, n), 64), 64)[None].float() / 127.5 - 1 for n in data.picture_names(folder, 32)]
    with torch.no_grad():
        expected = torch.cat([losses.psnr(x, vae.decode(vae.encode(x).mu)) for x in crops]).mean().item()
    assert rows[0]["psnr"] == pytest.approx(expected, abs=1e-5) and rows[0]["pictures"] == len(crops)
    assert rows[-1]["psnr"] > rows[-2]["psnr"] > rows[0]["psnr"]                             # jpeg:90, bicubic:8, an untrained network
    file = json.loads((run / "eval.json").read_text())
    assert set(file) == {"protocol", "rows"} and {"name", "psnr", "ssim", "lpips", *evaluation.METERS} <= set(file["rows"][0])
    assert all(math.isfinite(v) for r in rows for v in r.values() if isinstance(v, float))
    text = (run / "eval.md").read_text()
    assert "not LPIPS" in text and "posterior mean" in text and "center crop of 64" in text
    assert all((run / f"{n}.png").stat().st_size > 3000 for n in ("eval", "latents"))


def test_folder_of_pictures(evaluation, model, run, tmp_path_factory, capsys):
    """--images with a broken file among them: passed over, named, and the rest is measured; --pictures limits; models of one file name are told apart by folder."""
    from PIL import Image
    images = tmp_path_factory.mktemp("images")
    for i in range(3):
        Image.effect_noise((80, 60), 60).convert("RGB").save(images / f"{i}.png")
    (images / "broken.jpg").write_bytes(b"x")
    (images / "broken.tar").write_bytes(b"x")
    own_file(model, run / "vae.pt")
    for name in ("a", "b"):
        own_file(model, images / name / "vae.pt")
    alike = tuple(str(images / name / "vae.pt") for name in ("a", "b"))
    rows = evaluation.main(settings(evaluation, run, images=str(images), vae=("bicubic:2", *alike)))
    assert [r["name"] for r in rows] == ["bicubic:2", "a/vae.pt", "b/vae.pt"]
    told = capsys.readouterr().err
    assert rows[0]["pictures"] == 3 and "passed over broken.jpg" in told and "passed over broken.tar" in told and "subscriptable" not in told
    assert evaluation.main(settings(evaluation, run, images=str(images), vae=("bicubic:2",), pictures=2))[0]["pictures"] == 2


def test_an_exact_copy_counts_as_100_db(evaluation, run, tmp_path_factory):
    """Not as infinite, which would hide all other pictures, and is no JSON."""
    from PIL import Image
    images = tmp_path_factory.mktemp("white")
    Image.new("RGB", (64, 64), "white").save(images / "white.png")
    rows = evaluation.main(settings(evaluation, run, images=str(images), vae=("bicubic:2",)))
    assert rows[0]["psnr"] == 100 and "Infinity" not in (run / "eval.json").read_text()


def test_latent_report(evaluation, model):
    """A VAE whose posterior is known: 8 channels at the prior, 8 far from it and nearly certain."""
    vae = tiny(model)
    known = torch.zeros(1, 16, 4, 4)
    known[:, :8] = torch.linspace(-3, 3, 16).reshape(4, 4)
    logvar = torch.zeros(1, 16, 4, 4)
    logvar[:, :8] = -10.0
    vae.encode = lambda x: model.Posterior(known, logvar)
    report = evaluation.latent_report(vae, [torch.zeros(1, 3, 32, 32)] * 3, seed=0)
    assert report["active"] == 8 and report["channels"] == 16 and report["kl"][12] == pytest.approx(0, abs=1e-9)
    assert report["posterior_share"] == pytest.approx(0.5, abs=0.01) and report["std"][12] == pytest.approx(1)
    assert report["posterior_variance"] == pytest.approx((1 + math.exp(-10)) / 2)
    psnr = list(report["psnr_under_noise"].values())
    assert list(report["psnr_under_noise"]) == ["0.0", "0.05", "0.1", "0.2", "0.3", "0.5"] and psnr[-1] < psnr[1]


def test_activation_norms_see_a_droplet(evaluation, model):
    """One latent position a hundred times too large shows in the layers that follow (Fig. 3), there and not elsewhere."""
    vae = tiny(model, decoder_norm="group", attention_levels=())
    torch.manual_seed(0)
    z = torch.randn(1, 16, 8, 8)
    calm = evaluation.activation_norms(vae, z)
    z[..., 2, 5] *= 100
    norms = evaluation.activation_norms(vae, z)
    ratio = lambda v: (v.max() / v.median()).item()
    assert list(norms)[0] == "conv_in" and list(norms)[-1] == "conv_out" and len(norms) == len(calm)
    assert ratio(norms["conv_in"]) > 10 * ratio(calm["conv_in"])
    top = int(norms["conv_in"].argmax())
    assert abs(top // 8 - 2) <= 1 and abs(top % 8 - 5) <= 1


def test_sentences(evaluation, model, run, tmp_path_factory, capsys):
    own_file(model, run / "vae.pt")
    assert "--size 36" in refused(lambda: evaluation.main(settings(evaluation, run, size=36)), capsys)
    sentence = refused(lambda: evaluation.main(settings(evaluation, run, size=96, resize=64)), capsys)
    assert "at most --resize 64" in sentence and "add --resize 96" in sentence
    assert "multiple of 8" in refused(lambda: evaluation.main(settings(evaluation, run, size=68, resize=0)), capsys)
    assert "positive number" in refused(lambda: evaluation.main(settings(evaluation, run, vae=("jpeg:x",))), capsys)
    assert "run 04_train_vae.py first" in refused(lambda: evaluation.main(settings(evaluation, run, vae=(str(run / "none.pt"),))), capsys)
    assert "diffusers:" in refused(lambda: evaluation.main(settings(evaluation, run, vae=("diffusers:" + str(run / "nothing"),))), capsys)
    empty = tmp_path_factory.mktemp("empty")
    assert "no pictures" in refused(lambda: evaluation.main(settings(evaluation, run, images=str(empty))), capsys)
    assert "run 01_data.py first" in refused(lambda: evaluation.main(settings(evaluation, empty, vae=("bicubic:8",))), capsys)
