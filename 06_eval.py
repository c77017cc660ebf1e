"""Stage 6 of VIVAT: measure any autoencoder, with a number for each artifact.

Reads   the run's autoencoders, or with --vae FILE, diffusers:FOLDER_OR_ID[@SUBFOLDER], jit:FILE
        (TorchScript, as Cosmos), bicubic:8, jpeg:75. Pictures from --images, else RUN/data/val.
Writes  RUN/eval.md and RUN/eval.json, which keep other models', pictures' and sizes' rows;
        RUN/eval.png (Fig. 5), RUN/activations.png (Fig. 3).
Paper   Sec. 4, 6.1, 6.2, Table 1, Fig. 3, Fig. 5.

    python 06_eval.py --preset imagenet256 --images /data/imagenet/val --vae vae.pt ae.safetensors

One picture at a time, so no result depends on a batch size.
"""
import collections
import functools
import importlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import (gaussian_blur, pil_to_tensor, rgb_to_grayscale,
                                                  to_pil_image)
from tqdm import tqdm

data = importlib.import_module("01_data")
model = importlib.import_module("02_model")
losses = importlib.import_module("03_losses")
finetuning = importlib.import_module("05_finetune_decoder")


# ---- settings

@dataclass(frozen=True)
class Settings(data.Run):
    vae: tuple[str, ...] = ()  # files, diffusers:, jit:, bicubic:N, jpeg:Q [those of the run]
    images: str = ""           # a folder of pictures [RUN/data/val]
    size: int = 256            # Table 1: side of the pictures; not in the paper: a center crop
    pictures: int = 0          # how many at most, folder by folder; 0: all
    perceptual_net: Literal["vgg", "alex", "untrained"] = "vgg"  # not in the paper: LPIPS's trunk
    fid: bool = False          # Sec. 5.3, "FID": rFID; needs torchmetrics and torch-fidelity


PRESETS = {"paper": {}, "imagenet256": {}, "imagenet512": dict(size=512),  # Table 1's columns
           "coco512": dict(size=512), "ffhq1024": dict(size=1024),
           "small": dict(size=240),
           "demo": dict(size=128, perceptual_net="untrained", workers=0)}


# ---- similarity (Sec. 6.2)

def ssim(x, y):
    """Structural similarity of pictures (b, 3, h, w) in 0..255, a mean over values: (b,)."""
    # not in the paper: a Gaussian window of deviation 1.5, 11 x 11, as in the SSIM paper; on RGB
    window = torch.signal.windows.gaussian(11, std=1.5).to(x.device)
    window = (window / window.sum()).expand(3, 1, 1, 11)

    def mean(v):
        return F.conv2d(F.conv2d(v, window, groups=3), window.mT, groups=3)

    x = x.float() - 128  # around 0 the variances do not cancel in float32
    y = y.float() - 128
    mean_x, mean_y, xx, yy, xy = mean(torch.cat([x, y, x * x, y * y, x * y])).chunk(5)
    var_x = xx - mean_x ** 2
    var_y = yy - mean_y ** 2
    cov = xy - mean_x * mean_y
    mean_x = mean_x + 128
    mean_y = mean_y + 128
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x ** 2 + mean_y ** 2 + c1)
    contrast_structure = (2 * cov + c2) / (var_x + var_y + c2)
    return (luminance * contrast_structure).mean(dim=(1, 2, 3))


# ---- the five artifacts, metered
# not in the paper: a number for each, of an original x and its reconstruction y, (1, 3, h, w) in
# 0..255.

def color_shift(x, y):
    """Gray levels by which colors have moved: blind to spots, lines and frames. 0 is ideal."""
    shift = (y - x).flatten(2).median(2).values  # (1, 3)
    return (shift - shift.mean()).norm()  # without brightness, which is no color


def grid(x, y):
    """Mean step of the error between neighbors at each of 8 columns (rows) modulo 8, the largest
    divided by the median, and by the same of x, since stripes raise it: lines or blocks every 8
    pixels, one latent at f = 8. 1 is ideal."""
    def worst(v):
        steps = v.diff().abs().mean((0, 1))  # (w - 1,)
        phases = steps[:len(steps) // 8 * 8].view(-1, 8).mean(0)  # (8,)
        return (phases.max() / phases.median().clamp(min=1)).clamp(min=1)  # 1 level is rounding

    original = gray(x)
    error = gray(y) - original
    across = worst(error) / worst(original)
    down = worst(error.mT) / worst(original.mT)
    return max(across, down).clamp(min=1)


def blur(x, y):
    """Share of x's fine detail that y keeps; detail that is made up does not count. 1 is ideal."""
    fine_x = fine(gray(x))[:, 16:-16, 16:-16]  # the frame belongs to `corner`
    fine_y = fine(gray(y))[:, 16:-16, 16:-16]
    return ((fine_x * fine_y).sum() + 1) / (fine_x.square().sum() + 1)  # 1 if flat


def corner(x, y):
    """Squared error in the 16 px frame over that inside it. Above 1 is the artifact."""
    error = y - x
    error = error - error.flatten(2).median(2).values[..., None, None]  # that all of it shares
    error = error.square().mean(1)[0]  # (h, w)
    inside = error[16:-16, 16:-16]
    frame = (error.sum() - inside.sum()) / (error.numel() - inside.numel())
    return (frame + 1) / (inside.mean() + 1)  # one gray level is no artifact


def droplet(x, y):
    """Gray levels by which the brightest spot of y, 9 px wide, stands above all of x near it, less
    five deviations of the error. 0 is ideal."""
    error = gray(y) - gray(x)
    error = error - error.median()  # that all of it shares
    deviation = F.avg_pool2d(error, 9, stride=1).abs().median() / 0.674  # a Gaussian's
    excess = gray(x) + error - F.max_pool2d(gray(x), 19, stride=1, padding=9)
    spot = F.avg_pool2d(excess, 9, stride=1).max()
    return (spot - 5 * deviation).clamp(min=0)


METERS = {"color shift": color_shift, "grid": grid, "blur": blur, "corner": corner,
          "droplet": droplet}


def gray(x):
    return rgb_to_grayscale(x)[:, 0]


def fine(x):
    return x - gaussian_blur(x, [7, 7], [1.0, 1.0])


# ---- activations and latents

@torch.no_grad()
def activation_norms(vae, z):
    """Fig. 3: norms across channels after each block of the decoder, divided by their median,
    {layer: (h, w)}, for one latent z (1, k, h/f, w/f)."""
    norms = {}

    def keep(name, module, inputs, out):
        norm = out[0].float().norm(dim=0)
        norms[name] = norm / norm.median().clamp(min=1e-6)

    blocks = (model.ResBlock, model.AttnBlock, model.Upsample, finetuning.UnetBlock)
    hooks = [module.register_forward_hook(functools.partial(keep, name))
             for name, module in vae.decoder.named_modules()
             if isinstance(module, blocks) or name.endswith("conv_in")]
    vae.decode(z)
    for hook in hooks:
        hook.remove()
    return norms


@torch.no_grad()
def latent_report(vae, pictures):
    """What the latents of some pictures (1, 3, h, w) are like, and the PSNR with noise on them, in
    units of each channel's deviation."""
    posteriors = [vae.encode(x) for x in pictures]
    mu = torch.cat([q.mu for q in posteriors]).cpu().double()  # (n, k, h/f, w/f)
    variance = mu.var((0, 2, 3))  # (k,)
    report = {"channels": len(variance)}
    if posteriors[0].logvar is not None:
        logvar = torch.cat([q.logvar for q in posteriors]).cpu().double()
        kl = losses.kl_values(mu, logvar).mean((0, 2, 3))
        sigma2 = logvar.exp().mean((0, 2, 3))
        variance = variance + sigma2
        # not in the paper: a channel is active above 0.01 nats per value
        report |= {"active": int((kl > 0.01).sum()), "kl": kl.tolist(),
                   "posterior_variance": sigma2.mean().item()}
    std = variance.sqrt().float()[:, None, None]
    generator = torch.Generator().manual_seed(0)
    under_noise = dict.fromkeys((0.0, 0.05, 0.1, 0.2, 0.3, 0.5), 0.0)
    for strength in under_noise:
        for x, q in zip(pictures, posteriors):
            noise = (std * torch.randn(q.mu.shape, generator=generator)).to(x.device)
            psnr = losses.psnr(x, vae.decode(q.mu + strength * noise))
            under_noise[strength] += psnr.item() / len(pictures)
    return report | {"std": std.flatten().tolist(), "psnr_under_noise": under_noise}


# ---- what can be measured
# A function for each kind, from a picture (1, 3, h, w) in [-1, 1] to its reconstruction.

def bicubic(factor, x):
    small = F.interpolate(x, size=x.shape[2] // factor, mode="bicubic", antialias=True)
    return F.interpolate(small, size=x.shape[2:], mode="bicubic")


def jpeg(quality, x):
    file = io.BytesIO()
    to_pil_image(losses.to_uint8(x[0]).cpu()).save(file, "JPEG", quality=quality)
    return losses.from_uint8(pil_to_tensor(Image.open(file)).to(x)[None])


def scripted(net, x):
    out = net(x.to(next((p.dtype for p in net.parameters()), x.dtype)))
    return (out if torch.is_tensor(out) else out[0]).float()


def autoencoder(vae, x):
    return vae.decode(vae.encode(x).mu)  # not in the paper: the posterior's mean, not a sample


def open_model(spec, device):
    """(function of a picture, the VAE or None) for one entry of --vae."""
    kind, _, rest = spec.partition(":")
    if kind in ("bicubic", "jpeg"):
        with data.needs(f"--vae {spec}: a number must follow {kind}:"):
            return functools.partial({"bicubic": bicubic, "jpeg": jpeg}[kind], int(rest)), None
    if kind == "jit":
        with data.needs(f"--vae {spec} is not TorchScript"):
            net = torch.jit.load(rest, map_location=device).eval()
            return functools.partial(scripted, net), None
    vae = finetuning.load_vae(spec, device)
    return functools.partial(autoencoder, vae), vae


# ---- one model, measured

@torch.no_grad()
def evaluate(spec, reconstruct, vae, s, device, perceptual, paths):
    """{"row": numbers, "shown": three (original, reconstruction)}, of a VAE "norms" (Fig. 3)."""
    if s.fid:
        with data.needs("--fid needs pip install torchmetrics torch-fidelity, and Inception"):
            from torchmetrics.image.fid import FrechetInceptionDistance
            # Published figures resize without antialiasing.
            fid = FrechetInceptionDistance(feature=2048, antialias=False).to(device)
    lpips = f"LPIPS {s.perceptual_net}" if perceptual.trained else "untrained features"
    sums = collections.Counter()
    pictures = []
    shown = []
    read = functools.partial(data.read_square, size=s.size)
    loader = DataLoader(paths, batch_size=None, collate_fn=read, num_workers=s.workers)
    for x8 in tqdm(loader, unit="picture", desc=spec[-30:]):
        if isinstance(x8, str):
            print(x8)
            continue
        x8 = x8[None].to(device)  # (1, 3, size, size)
        x = losses.from_uint8(x8)
        with data.needs(f"--vae {spec} fails at --size {s.size}"):
            x_hat = reconstruct(x)
        if x_hat.shape != x.shape or not x_hat.isfinite().all():
            data.fail(f"--vae {spec} gives {tuple(x_hat.shape)}, or values that are not finite")
        y8 = losses.to_uint8(x_hat)
        sums["pictures"] += 1
        sums["psnr"] += losses.psnr(x, x_hat).item()
        sums["ssim"] += ssim(x8, y8).item()
        sums[lpips] += perceptual(x, losses.from_uint8(y8)).item()
        for name, meter in METERS.items():
            sums[name] += meter(x8.float(), y8.float()).item()
        if s.fid:
            fid.update(x8, real=True)
            fid.update(y8, real=False)
        if len(shown) < 3:
            shown.append((x8[0].cpu(), y8[0].cpu()))
        if len(pictures) < 16:
            pictures.append(x)
    count = sums.pop("pictures", 0)
    if not count:
        data.fail("no picture could be read")
    row = {"name": spec, "of": f"{count} of {s.images or f'{s.run}/data/val'}, {s.size} px"}
    row |= {name: sums[name] / count for name in sums}
    if s.fid:
        row["rfid"] = fid.compute().item()
    result = {"row": row, "shown": shown}
    if vae is None:
        return result
    if hasattr(vae, "decoder"):  # Fig. 3
        norms = [activation_norms(vae, vae.encode(x).mu) for x in pictures]
        result["norms"] = norms[0]
        row["peak"] = sum(max(v.max().item() for v in n.values()) for n in norms) / len(norms)
    row["latents"] = latent_report(vae, pictures)
    return result


# ---- tables and pictures

def table(rows):
    """eval.md: a row per model and set of pictures, how they were made, what is inside."""
    names = list(dict.fromkeys(k for row in rows for k, v in row.items() if type(v) is float))
    lines = ["| model | pictures | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for row in rows:
        numbers = [f"{row[name]:.4g}" if name in row else "" for name in names]
        lines.append("| " + " | ".join([row["name"], row["of"], *numbers]) + " |")
    lines.append("""
Means over pictures: shorter side to the size by antialiased bicubic, the middle. EMA weights where
a file has them, the posterior's mean, 8 bits. PSNR in dB; untrained features are not LPIPS. Without
artifacts color shift and droplet read 0, grid, blur and corner 1. peak (Fig. 3): the largest norm
of activations over its layer's median, for the first 16.""")
    for row in rows:
        if "latents" in row:
            inside = {k: v for k, v in row["latents"].items() if not isinstance(v, list)}
            lines.append(f"\n{row['name']}, {row['of']}: {json.dumps(inside)}")
    return "\n".join(lines) + "\n"


def draw(run, results):
    """eval.png: each picture, and its middle magnified; activations.png."""
    size = results[0]["shown"][0][0].shape[1]
    zoom = slice(size // 2 - size // 8, size // 2 + size // 8)
    names = [result["row"]["name"][-30:] for result in results]
    tiles = []
    for i, (x, _) in enumerate(results[0]["shown"]):
        whole = [x] + [result["shown"][i][1] for result in results]
        tiles += whole
        tiles += [F.interpolate(v[None, :, zoom, zoom], size=size)[0] for v in whole]
    data.save_sheet(run / "eval.png", tiles, 1 + len(results), ["original", *names])
    tiles = []
    captions = []
    for result, name in zip(results, names):
        for layer, v in result.get("norms", {}).items():
            bright = (64 * v).clamp(max=255)  # white: four times the layer's median
            tiles.append(F.interpolate(bright[None, None], size=size)[0].byte())
            captions.append(f"{name} {layer} max {v.max():.1f}")
    if tiles:
        data.save_sheet(run / "activations.png", tiles, 8, captions=captions)


# ---- main

def main(s):
    if s.size < 64:
        data.fail("--size must be 64 at least: meters look inside a frame of 16 px")
    run = Path(s.run)
    usual = [run / name for name in ("vae.pt", "vae_finetuned.pt", "vae_denoising.pt")]
    specs = s.vae or [str(path) for path in usual if path.is_file()]
    if not specs:
        data.fail(f"nothing to measure in {run}: run 04_train_vae.py first, or give --vae")
    if s.images:
        paths = data.find_pictures(s.images)
    else:
        paths = [picture["file"] for picture in data.read_list(s.run, "val", s.size)]
    paths = paths[:s.pictures or None]
    if s.fid and len(paths) < 2:
        data.fail("--fid needs more than one picture")
    device = data.pick_device(s)
    models = [open_model(spec, device) for spec in specs]  # all, before work begins
    perceptual = losses.Perceptual(s.perceptual_net).to(device)
    results = []
    for spec, (reconstruct, vae) in zip(specs, models):
        results.append(evaluate(spec, reconstruct, vae, s, device, perceptual, paths))
        row = results[-1]["row"]
        rows = {}
        if (run / "eval.json").is_file():
            rows = json.loads((run / "eval.json").read_text())
        rows[f"{row['name']}, {row['of']}"] = row
        # After each model, so that nothing measured is lost.
        data.write_text(run / "eval.json", json.dumps(rows))
        data.write_text(run / "eval.md", table(rows.values()))
    print(table(rows.values()))
    draw(run, results)


if __name__ == "__main__":
    data.start(main, Settings, PRESETS, __doc__)
