"""Stage 6 of VIVAT: measure any autoencoder, with a number for each artifact.

Reads   RUN/vae.pt, vae_finetuned.pt, vae_denoising.pt, or --vae with any of: a file that load_vae
        reads (FILE@N: a denoising decoder in N steps), diffusers:FOLDER_OR_ID[@SUBFOLDER], and two
        yardsticks without weights, bicubic:8 and jpeg:75. Pictures from --images DIR, else
        RUN/data/val.
Writes  RUN/eval.md, RUN/eval.json, RUN/eval.png (Fig. 5); for VAEs that load_vae reads also
        RUN/activations.png (Fig. 3), RUN/latents.png (interpolations).
Paper   Sec. 4, 6.1, 6.2, Table 1, Fig. 3, Fig. 5.

    python 06_eval.py --preset imagenet256 --images /data/imagenet/val --vae vae.pt ae.safetensors

One picture at a time: no result depends on a batch size, and memory does not grow.
"""
import functools
import importlib
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, rgb_to_grayscale, to_pil_image
from tqdm import tqdm

data = importlib.import_module("01_data")
model = importlib.import_module("02_model")
losses = importlib.import_module("03_losses")


# ---------------- settings

@dataclass(frozen=True)
class Settings(data.Run):
    vae: tuple[str, ...] = ()  # files, FILE@N, diffusers:FOLDER, bicubic:N, jpeg:Q [the run's own]
    images: str = ""           # a folder of pictures or .tar shards [RUN/data/val]
    size: int = 256            # Table 1: side of the pictures; not in the paper: a center crop
    resize: int = 0            # not in the paper: shorter side before the crop; 0: as --size
    pictures: int = 0          # how many at most, in order of their names; 0 is all
    latents: int = 16          # pictures for the report on latents, 0: none; activations: the first
    sample: bool = False       # not in the paper: a sample of the posterior, not its mean
    perceptual_net: Literal["vgg", "alex", "untrained"] = "vgg"  # not in the paper: LPIPS's trunk
    fid: bool = False          # Sec. 5.3, "FID": rFID; needs torchmetrics and torch-fidelity


PRESETS = {
    "paper": {},
    # The columns of Table 1.
    "imagenet256": {},
    "imagenet512": dict(size=512),
    "coco512": dict(size=512),
    "ffhq1024": dict(size=1024),
    "small": dict(size=240, resize=480),
    "laptop": dict(size=128, perceptual_net="untrained"),
    "demo": dict(size=128, perceptual_net="untrained", latents=8),
}


# ---------------- similarity (Sec. 6.2)

def ssim(x, y):
    """Structural similarity of pictures (b, 3, h, w) in 0..255, mean over positions and channels:
    (b,)."""
    # not in the paper: a Gaussian window of deviation 1.5, 11 x 11, as in the SSIM paper
    window = torch.signal.windows.gaussian(11, std=1.5, dtype=torch.float64)
    window = (window / window.sum()).expand(3, 1, 1, 11)

    def mean(v):
        return F.conv2d(F.conv2d(v, window, groups=3), window.mT, groups=3)

    x = x.cpu().double()  # in float32 the variances would cancel; MPS has no float64
    y = y.cpu().double()
    mean_x = mean(x)
    mean_y = mean(y)
    var_x = mean(x * x) - mean_x ** 2
    var_y = mean(y * y) - mean_y ** 2
    cov = mean(x * y) - mean_x * mean_y
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x ** 2 + mean_y ** 2 + c1)
    contrast_structure = (2 * cov + c2) / (var_x + var_y + c2)
    return (luminance * contrast_structure).mean(dim=(1, 2, 3))


# ---------------- the five artifacts, metered
# 03_losses.py makes the artifacts; functions of the same names here measure them. Each compares
# originals x and reconstructions y, (b, 3, h, w) in 0..255, and gives n numbers per picture.

@dataclass(frozen=True)
class Meter:
    numbers: Callable   # (x, y) to (b, n)
    read: Callable      # means of the numbers over all pictures, (n,), to the reading
    ideal: float        # the reading of a perfect copy
    edge: float         # from the ideal to here a reading is healthy
    unit: str


def color_shift(x, y):
    """Medians of the differences in CIELAB's a* and b*: blind to spots, lines and frames.

    Sec. 4: "the color of all generated images is moved towards one color". The reading is the
    length of their mean over pictures: a bias.
    """
    return (lab_chroma(y) - lab_chroma(x)).flatten(2).median(dim=2).values


def grid(x, y):
    """Four means of steps, the differences of neighboring pixels, in four views: (b, 16).

    The means: steps at borders of 8 px cells, inside cells; differences of steps 7 or 9 px apart,
    8 px apart. The views: luminance residual along rows, along columns, then the original likewise.
    Two pairs of means, since there are two kinds of grid: blocks of random sign (as in JPEG) step
    at borders; lines and checkerboards with a period of 8, 4 or 2 px repeat after 8 px.
    Sec. 4: it "arose when the adversarial loss had too much weight".
    """
    # not in the paper: cells of 8 px, one latent at f = 8; peers with another f are measured alike
    residual = gray(y) - gray(x)  # (b, h, w)
    numbers = []
    for v in (residual, residual.mT, gray(x), gray(x).mT):
        steps = v.diff(dim=2)  # (b, h, w - 1)
        numbers += [*steps_at_borders(steps), *steps_that_repeat(steps)]
    return torch.stack(numbers, 1)


def steps_at_borders(steps):
    """Mean size of the steps across borders of 8 px cells, and of those inside; each (b,)."""
    end = steps.shape[2] // 8 * 8  # whole cells; the last step of a cell crosses its border
    cells = steps[..., :end].abs().unflatten(2, (-1, 8))  # (b, h, cells, 8)
    sizes = cells.mean(dim=(1, 2))  # (b, 8)
    # In VAEs the two steps beside a border are raised too: they are neither border nor inside.
    return sizes[:, 7], sizes[:, 1:6].mean(dim=1)


def steps_that_repeat(steps):
    """Mean differences between steps 7 or 9 px apart, and 8 px apart, which are small where a
    pattern repeats; each (b,)."""
    apart = {n: (steps[..., n:] - steps[..., :-n]).abs().mean(dim=(1, 2)) for n in (7, 8, 9)}
    return (apart[7] + apart[9]) / 2, apart[8]


def grid_reading(means):
    """How much larger steps are at borders than inside, or differ 7 or 9 px apart than 8: the
    larger of these two ratios of the residual, over the original's own (stripes raise it)."""
    means = means.view(2, 2, 4).mean(dim=1)  # (residual or original, four means)
    large = means[:, [0, 2]]  # at borders; 7 or 9 px apart
    small = means[:, [1, 3]]  # inside; 8 px apart
    # Steps below one gray level are rounding, so no ratio is taken over less.
    residual, original = large / small.clamp(min=1)
    return (residual / original.clamp(min=1)).max().clamp(min=1)


def blur(x, y):
    """What y keeps of x above half the Nyquist frequency: their inner product, and x's power.

    Sec. 4, Fig. 2d. The reading is the ratio, the share kept. Detail that is made up (a grid,
    noise) does not count as kept. The 16 px frame belongs to the corner meter.
    """
    a = high_frequencies(gray(x)[:, 16:-16, 16:-16])  # (b, n)
    b = high_frequencies(gray(y)[:, 16:-16, 16:-16])
    return torch.stack([(a * b.conj()).real.sum(dim=1), a.abs().square().sum(dim=1)], 1)


def corner(x, y):
    """Mean squared error in the 16 px frame, and inside it.

    Sec. 4, Fig. 2e: "a frame of blur around the edges", from zero padding. The reading is frame
    over interior.
    """
    error = (y - x).square().mean(dim=1)  # (b, h, w)
    frame = torch.ones_like(error[0], dtype=torch.bool)
    frame[16:-16, 16:-16] = False
    return torch.stack([error[:, frame].mean(dim=1), error[:, ~frame].mean(dim=1)], 1)


def droplet(x, y):
    """How far the brightest spot of y stands above all of x within 9 pixels, in gray levels.

    Sec. 4, Fig. 2f: "bright spots in the pixel space". A shift that all of the picture shares is
    taken out. Blur, darker lines and frames do not exceed the brightest pixel nearby. The mean
    over pictures dilutes a droplet that is in few of them.
    """
    before = gray(x)
    after = gray(y)
    shift = (after - before).flatten(1).median(dim=1).values[:, None, None]
    above = after - shift - F.max_pool2d(before, 19, stride=1, padding=9)
    return above.flatten(1).amax(dim=1, keepdim=True).clamp(min=0)


# not in the paper: numbers for artifacts; the edges are our judgement
METERS = {
    "color shift": Meter(color_shift, torch.Tensor.norm, 0.0, 1.0, "delta E"),
    "grid": Meter(grid, grid_reading, 1.0, 1.1, "ratio"),
    "blur": Meter(blur, lambda m: m[0] / m[1].clamp(min=1e-6), 1.0, 0.9, "share kept"),
    # 1 is added since an error of one gray level is no artifact
    "corner": Meter(corner, lambda m: (m[0] + 1) / (m[1] + 1), 1.0, 2.0, "ratio"),
    "droplet": Meter(droplet, lambda m: m[0], 0.0, 8.0, "gray levels"),
}


def high_frequencies(x):
    """What gray pictures (..., h, w) in 0..255 have above half the Nyquist frequency: complex
    values of a Hann-windowed spectrum, (..., n), whose squares add up to a power per pixel."""
    h, w = x.shape[-2:]
    window = (torch.hann_window(h)[:, None] * torch.hann_window(w)).to(x)
    x = x - x.mean(dim=(-2, -1), keepdim=True)
    spectrum = torch.fft.fft2(x * window) / (h * w * window.square().sum()).sqrt()
    rows = torch.fft.fftfreq(h)[:, None]
    columns = torch.fft.fftfreq(w)
    high = (rows.square() + columns.square()).sqrt() > 0.25
    return spectrum[..., high.to(x.device)]


def gray(x):
    return rgb_to_grayscale(x)[:, 0]


def lab_chroma(x):
    """a* and b* of CIELAB (D65) of sRGB pictures (b, 3, h, w) in 0..255: (b, 2, h, w)."""
    x = x / 255
    linear = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055).clamp(min=0) ** 2.4)
    to_xyz = x.new_tensor([[0.4124564, 0.3575761, 0.1804375],
                           [0.2126729, 0.7151522, 0.0721750],
                           [0.0193339, 0.1191920, 0.9503041]])
    to_xyz = to_xyz / to_xyz.sum(1, keepdim=True)  # relative to white
    t = torch.einsum("ij,bjhw->bihw", to_xyz, linear)
    dark = t * (29 / 6) ** 2 / 3 + 4 / 29
    f = torch.where(t > (6 / 29) ** 3, t.clamp(min=1e-6) ** (1 / 3), dark)
    return torch.stack([500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


# ---------------- activations and latents

@torch.no_grad()
def activation_norms(vae, z):
    """Fig. 3: norms over channels after each block of the decoder, over their median,
    {layer: (h, w)}, for one latent z (1, k, h/f, w/f)."""
    norms = {}

    def remember(name, module, inputs, out):
        # A denoising decoder runs its blocks once per step: the last step stays.
        norm = out[0].float().norm(dim=0)
        norms[name] = norm / norm.median().clamp(min=1e-6)

    blocks = (model.ResBlock, model.AttnBlock, model.Upsample, model.UnetBlock)
    hooks = []
    for name, module in vae.decoder.named_modules():
        if isinstance(module, blocks) or name in ("conv_in", "conv_out"):
            hooks.append(module.register_forward_hook(functools.partial(remember, name)))
    vae.decode(z)
    for hook in hooks:
        hook.remove()
    return norms


@torch.no_grad()
def latent_report(vae, pictures, seed):
    """What the latents of some pictures (1, 3, h, w) are like, and what PSNR is left when noise is
    added to them."""
    posteriors = [vae.encode(x) for x in pictures]
    mu = torch.cat([q.mu for q in posteriors]).cpu().double()  # (n, k, h/f, w/f)
    logvar = torch.cat([q.logvar for q in posteriors]).cpu().double()
    kl = losses.kl_values(mu, logvar).mean((0, 2, 3))  # (k,)
    sigma2 = logvar.exp().mean((0, 2, 3))
    variance = mu.var((0, 2, 3)) + sigma2
    std = variance.sqrt().float()[:, None, None]
    generator = torch.Generator().manual_seed(seed)
    robustness = {}
    for strength in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5):
        psnr = []
        for x, q in zip(pictures, posteriors):
            noise = torch.randn(q.mu.shape, generator=generator) * std
            x_hat = vae.decode(q.mu + strength * noise.to(x.device))
            psnr.append(losses.psnr(x, x_hat).clamp(max=100))
        robustness[str(strength)] = torch.cat(psnr).mean().item()
    # not in the paper: a channel is active above 0.01 nats per value
    return {"mean": mu.mean((0, 2, 3)).tolist(), "std": variance.sqrt().tolist(), "kl": kl.tolist(),
            "active": int((kl > 0.01).sum()), "channels": len(kl),
            "posterior_share": (sigma2 / variance).mean().item(),
            "posterior_variance": sigma2.mean().item(), "psnr_under_noise": robustness}


# ---------------- what can be measured
# reconstruct takes a picture (1, 3, h, w) in [-1, 1] and gives one; one function per kind.

def bicubic(factor, x):
    small = F.interpolate(x, scale_factor=1 / factor, mode="bicubic", antialias=True)
    return F.interpolate(small, size=x.shape[2:], mode="bicubic")


def jpeg(quality, x):
    file = io.BytesIO()
    to_pil_image(losses.to_uint8(x[0]).cpu()).save(file, "JPEG", quality=quality)
    return losses.from_uint8(pil_to_tensor(Image.open(file)).to(x)[None])


def ours(vae, s, x):
    q = vae.encode(x)
    return vae.decode(q.sample(seeded_noise(q.mu, s)) if s.sample else q.mu)


def theirs(net, s, x):
    q = net.encode(x)
    q = getattr(q, "latent_dist", q)
    names = [name for name in ("mean", "latents", "latent") if hasattr(q, name)]
    if not names:
        data.stop(f"--vae: {type(net).__name__} gives no mean, latents or latent")
    z = getattr(q, names[0])
    if s.sample and hasattr(q, "std"):
        z = z + q.std * seeded_noise(z, s)
    return net.decode(z).sample


def seeded_noise(z, s):
    """The same noise for every picture, so that their order does not matter."""
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(s.seed)).to(z)


def open_model(spec, s, device):
    """(name, reconstruct, VAE or None) for one word of --vae."""
    kind, _, rest = spec.partition(":")
    if kind in ("bicubic", "jpeg"):
        if not (rest.isdigit() and int(rest) > 0):
            data.stop(f"--vae {spec}: a positive number must follow {kind}:")
        return spec, functools.partial({"bicubic": bicubic, "jpeg": jpeg}[kind], int(rest)), None
    if kind == "diffusers":
        return open_diffusers(spec, rest, s, device)
    path, steps = split_steps(spec)
    vae = model.load_vae(path, device)
    if not vae.takes(s.size):
        data.stop(f"--size {s.size} must be a multiple of {vae.multiple}, from {vae.smallest} "
                  f"up, for {spec}")
    if steps is not None:
        if steps < 1 or not isinstance(vae.decoder, model.DenoisingDecoder):
            data.stop(f"--vae {spec}: @N is for a decoder that denoises, in at least one step")
        vae.decoder.steps = steps
    name = model_name(spec)
    if [model_name(other) for other in s.vae].count(name) > 1:
        name = "/".join(Path(spec).parts[-2:])  # files of one name are told apart by folder
    return name, functools.partial(ours, vae, s), vae


def split_steps(spec):
    """(FILE, N) of FILE@N, (FILE, None) of FILE."""
    path, _, steps = spec.rpartition("@")
    if steps.isdigit() and not Path(spec).exists():
        return path, int(steps)
    return spec, None


def model_name(spec):
    path, steps = split_steps(spec)
    return Path(path).stem if steps is None else f"{Path(path).stem}@{steps}"


def open_diffusers(spec, place, s, device):
    try:
        from diffusers import AutoModel
    except ImportError:
        data.stop(f"--vae {spec} needs the diffusers package: pip install -U diffusers")
    try:
        name, _, subfolder = place.partition("@")
        net = AutoModel.from_pretrained(name, subfolder=subfolder or None).to(device).eval()
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        data.stop(f"--vae {spec} cannot be loaded: {reason}")
    return Path(name).resolve().name, functools.partial(theirs, net, s), None


def read_pictures(s, skipped):
    """Yield uint8 (1, 3, size, size): shorter side resized, center crop. What is broken goes into
    `skipped` with its reason."""
    folder = Path(s.run, "data", "val")
    if s.images:
        units = data.find_units(s.images)
    else:
        units = [str(folder / os.fsdecode(name)) for name in data.picture_names(folder, 1)]
    found = data.pictures(units, s.images or folder)
    for name, parts in itertools.islice(found, s.pictures or None):
        try:
            if isinstance(parts, Exception):  # a shard or file that could not be opened
                raise parts
            x, _ = data.to_rgb(parts["picture"], 1, data.Settings.max_pixels)
        except Exception as error:
            skipped[name] = error
            continue
        yield data.center_crop(data.resize_shorter(x, s.resize or s.size), s.size)[None]


# ---------------- one model, measured

@torch.no_grad()
def evaluate(spec, s, device, perceptual, pictures, skipped):
    """Measure one model; it is freed on return.

    Returns {"row": numbers, "shown": first three (original, reconstruction), and for ours "norms":
    Fig. 3, "between": an interpolation}. pictures: those for the report on latents.
    """
    reset_peak(device)
    name, reconstruct, vae = open_model(spec, s, device)
    fid = open_fid(device) if s.fid else None
    sums = dict.fromkeys(["psnr", "ssim", "lpips", *METERS], 0.0)
    shown = []
    count = 0
    began = time.time()
    for x8 in tqdm(read_pictures(s, skipped), unit="picture", desc=name[-30:], **data.BAR):
        x8 = x8.to(device)
        x = losses.from_uint8(x8)  # (1, 3, size, size)
        y8 = losses.to_uint8(reconstruct(x))
        y = losses.from_uint8(y8)
        sums["psnr"] += losses.psnr(x, y).clamp(max=100).item()  # of an exact copy it is infinite
        sums["ssim"] += ssim(x8, y8).item()
        sums["lpips"] += perceptual(x, y).item()
        for key, meter in METERS.items():
            sums[key] += meter.numbers(x8.float(), y8.float())[0].cpu()
        if fid:
            fid.update(x8, real=True)
            fid.update(y8, real=False)
        if count < 3:
            shown.append((x8[0].cpu(), y8[0].cpu()))
        count += 1
    row = {"name": name, "pictures": count} | {key: v / count for key, v in sums.items()}
    row |= {key: meter.read(row[key]).item() for key, meter in METERS.items()}
    if fid:
        row["rfid"] = fid.compute().item()
    # Of the whole measurement, not of the model alone.
    row["seconds_per_picture"] = (time.time() - began) / count
    row["peak_memory_gib"] = peak_gib(device)
    result = {"row": row, "shown": shown}
    if vae is not None and s.latents:
        norms = activation_norms(vae, vae.encode(pictures[0]).mu)
        row["activation_max_over_median"] = {layer: v.max().item() for layer, v in norms.items()}
        row["latents"] = latent_report(vae, pictures, s.seed)
        result["norms"] = norms
        result["between"] = interpolate(vae, pictures)
    return result


def interpolate(vae, pictures):
    """Seven decoded pictures on the line between the latents of the first two pictures."""
    ends = [vae.encode(x).mu for x in pictures[:2]]  # a single picture is its own partner
    steps = [torch.lerp(ends[0], ends[-1], t / 6) for t in range(7)]
    return [losses.to_uint8(vae.decode(z))[0] for z in steps]


def open_fid(device):
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        return FrechetInceptionDistance(feature=2048).to(device)
    except Exception as error:
        data.stop("--fid needs pip install torchmetrics torch-fidelity, and their Inception "
                  f"weights ({type(error).__name__})")


def reset_peak(device):
    """The peak of memory begins anew (on a CPU where Linux counts it)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if sys.platform != "linux":
        return None
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2 ** 20


# ---------------- tables and pictures

def table(rows, protocol_lines):
    """Aligned Markdown, the protocol below."""
    columns = {"psnr": ("PSNR, dB", "", 2), "ssim": ("SSIM", "", 4),
               "lpips": (protocol_lines["lpips"], "", 4)}
    for name, meter in METERS.items():
        sign = ">" if meter.edge < meter.ideal else "<"
        digits = 3 if name == "blur" else 2
        columns[name] = (f"{name}, {meter.unit}", f"{sign} {meter.edge:g}", digits)
    if "rfid" in rows[0]:
        columns["rfid"] = ("rFID", "", 2)
    heads, healthy, digits = zip(*columns.values())
    cells = [["model", *heads], ["healthy", *healthy]]
    for row in rows:
        cells.append([row["name"], *(f"{row[key]:.{d}f}" for key, d in zip(columns, digits))])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        padded = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("| " + " | ".join(padded) + " |")
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    lines += ["", *(f"{key}: {value}" for key, value in protocol_lines.items()), ""]
    return "\n".join(lines)


def latent_lines(row):
    q = row["latents"]
    noise = ", ".join(f"{k}: {v:.2f}" for k, v in q["psnr_under_noise"].items())
    peaks = row["activation_max_over_median"]
    worst = max(peaks, key=peaks.get)
    return (f"\n{row['name']}: {q['active']} of {q['channels']} latent channels active, "
            f"KL {sum(q['kl']) / q['channels']:.2f} nats per value, posterior's share of variance "
            f"{q['posterior_share']:.4f}, mean posterior variance {q['posterior_variance']:.2g}\n"
            f"  PSNR with noise on the latent, in its deviations: {noise}\n"
            f"  largest activation norm over the median: {peaks[worst]:.1f} after "
            f"decoder.{worst}\n")


def protocol(s, pictures, skipped, device):
    """How the numbers were made, {key: words}."""
    lines = {
        "pictures": f"{pictures} from {s.images or Path(s.run, 'data', 'val')}, "
                    f"{skipped} passed over",
        "preparation": f"shorter side to {s.resize or s.size} by antialiased bicubic (smaller "
                       f"pictures enlarged), center crop of {s.size}, 8 bits to [-1, 1]",
        "reconstruction": "EMA weights where the file has them, posterior "
                          f"{'sample' if s.sample else 'mean'}, clamped and rounded to 8 bits, one "
                          "picture at a time",
        "metrics": "means over pictures; PSNR of an exact copy counts as 100 dB; SSIM with a "
                   "Gaussian window of 11 x 11, deviation 1.5",
        "lpips": f"LPIPS ({s.perceptual_net})",
        "device": device.type}
    if s.perceptual_net == "untrained":
        lines["lpips"] = "untrained features (not LPIPS)"
    if device.type == "cuda":
        lines["device"] = torch.cuda.get_device_name()
    return lines


def draw_comparison(path, results):
    """Fig. 5: three pictures, each whole, its most detailed part magnified, and five times the
    error; the original first, then each model."""
    tiles = []
    labels = []
    for i, (x, _) in enumerate(results[0]["shown"]):
        side = x.shape[1] // 4
        half = side // 2
        fine = gray(x[None].float())
        fine = (fine - F.avg_pool2d(fine, 9, 1, 4, count_include_pad=False)).square()
        detail = F.avg_pool2d(fine, side, half)[0]
        best = int(detail.argmax())
        top = best // detail.shape[1] * half
        left = best % detail.shape[1] * half
        shown = [x] + [result["shown"][i][1] for result in results]
        pieces = [picture[:, top:top + side, left:left + side] for picture in shown]
        tiles += shown
        tiles += [data.resize_shorter(piece, x.shape[1], data.NEAREST) for piece in pieces]
        tiles += [((v.float() - x.float()) * 5 + 128).clamp(0, 255).byte() for v in shown]
        labels += ["picture", "zoom", "error x 5"]
    rows = [result["row"] for result in results]
    titles = ["original"] + [f"{row['name'][:18]} {row['psnr']:.1f} dB" for row in rows]
    data.save_sheet(path, tiles, 1 + len(results), titles, labels)


def draw_activations(path, results):
    """Fig. 3: norms after each block of the decoder, each layer over its own median; white is four
    times that. Decoders with other layers than the first one's are left out."""
    layers = list(results[0]["norms"])
    alike = [result for result in results if list(result["norms"]) == layers]
    if len(alike) < len(results):
        print(f"{path.name} leaves out {len(results) - len(alike)} decoders with other layers")
    tiles = []
    for result in alike:
        norms = result["norms"].values()
        size = max(v.shape[0] for v in norms)
        for v in norms:
            scaled = (v * 64).clamp(0, 255)
            tiles.append(F.interpolate(scaled[None, None], size=size)[0].byte().expand(3, -1, -1))
    titles = [layer.replace(".block", "") for layer in layers]
    names = [result["row"]["name"][:14] for result in alike]
    data.save_sheet(path, tiles, len(layers), titles, names)


# ---------------- main

def main(s):
    if s.dry_run:
        return data.print_settings(s)
    if s.size < 64:
        data.stop(f"--size {s.size} must be at least 64: meters look inside a frame of 16 pixels")
    if 0 < s.resize < s.size:
        data.stop(f"--size {s.size} must be at most --resize {s.resize} (the preset's, unless you "
                  f"gave it): add --resize {s.size}, or --resize 0 for the same as --size")
    device = data.pick_device(s.device)
    run = Path(s.run)
    own = [run / name for name in ("vae.pt", "vae_finetuned.pt", "vae_denoising.pt")]
    specs = s.vae or [str(path) for path in own if path.is_file()] or [str(own[0])]
    perceptual = losses.Perceptual(s.perceptual_net).to(device)
    skipped = {}
    some = itertools.islice(read_pictures(s, skipped), max(1, s.latents))
    pictures = [losses.from_uint8(x.to(device)) for x in some]
    if not pictures:
        data.stop(f"no picture in {s.images or run / 'data' / 'val'} could be read")
    results = [evaluate(spec, s, device, perceptual, pictures, skipped) for spec in specs]
    for name, error in skipped.items():
        print(f"passed over {name}: {error}", file=sys.stderr)
    rows = [result["row"] for result in results]
    made = protocol(s, rows[0]["pictures"], len(skipped), device)
    text = table(rows, made) + "".join(latent_lines(row) for row in rows if "latents" in row)
    print(text)
    data.write_text(run / "eval.md", text)
    data.write_text(run / "eval.json", json.dumps({"protocol": made, "rows": rows}, indent=1))
    draw_comparison(run / "eval.png", results)
    with_latents = [result for result in results if "norms" in result]
    if with_latents:
        draw_activations(run / "activations.png", with_latents)
        tiles = [picture for result in with_latents for picture in result["between"]]
        names = [result["row"]["name"][:14] for result in with_latents]
        data.save_sheet(run / "latents.png", tiles, 7, rows=names)
    print(f"wrote eval.md, eval.json and pictures in {run}")
    return rows


if __name__ == "__main__":
    data.command_line(main, Settings, PRESETS, __doc__)
