"""Stage 6 of VIVAT: measure any autoencoder (Sec. 6.1, 6.2, Table 1), and give the five artifacts of Sec. 4 a number each.

Reads   RUN/vae.pt and RUN/vae_finetuned.pt, or --vae with any of: a file that load_vae reads (04, 05, peers), diffusers:FOLDER_OR_ID[@SUBFOLDER],
        and two yardsticks without weights, bicubic:8 and jpeg:75. Pictures from --images DIR, else RUN/data/val.
Writes  RUN/eval.md, RUN/eval.json, RUN/eval.png (Fig. 5), RUN/activations.png (Fig. 3), RUN/latents.png (interpolations).
Paper   Sec. 4, 6.1, 6.2, Table 1, Fig. 3, Fig. 5.

    python 06_eval.py --preset imagenet256 --images /data/imagenet/val --vae runs/mine/vae_finetuned.pt ae.safetensors jpeg:75

One picture at a time: the result cannot depend on a batch size, and memory does not grow with their number.
"""
import importlib, io, itertools, json, os, resource, sys, time
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


@dataclass(frozen=True)
class Settings:
    run: str = ""               # folder that all stages share [runs/PRESET]
    vae: tuple[str, ...] = ()   # files, diffusers:FOLDER_OR_ID, bicubic:N or jpeg:Q [RUN/vae.pt RUN/vae_finetuned.pt]
    images: str = ""            # a folder of pictures or .tar shards [RUN/data/val]
    size: int = 256             # Table 1: side of the centre crop
    resize: int = 0             # not in the paper: shorter side before the crop; 0 is --size, all of the shorter side
    pictures: int = 0           # not in the paper: how many at most, in order of their names; 0 is all
    latents: int = 16           # not in the paper: pictures for the report on latents and activations; 0 leaves it out
    sample: bool = False        # not in the paper: decode a sample of the posterior, not its mean
    perceptual_net: Literal["vgg", "alex", "untrained"] = "vgg"   # not in the paper: trunk of the LPIPS column
    fid: bool = False           # Sec. 5.3: rFID; needs the torchmetrics and torch-fidelity packages and their Inception weights
    seed: int = 0               # not in the paper: of posterior samples and of the noise on latents
    device: str = "auto"        # not in the paper: cuda, mps or cpu
    dry_run: bool = False       # print the settings as JSON and stop


PRESETS = {
    "paper": {}, "imagenet256": {}, "imagenet512": dict(size=512), "coco512": dict(size=512), "ffhq1024": dict(size=1024),  # Table 1
    "small": dict(size=240, resize=480),
    "demo": dict(size=64, resize=128, perceptual_net="untrained"),
}


# ---------------------------------------------------------------- similarity (Sec. 6.2)

def ssim(x, y):
    """Structural similarity of 8-bit pictures (b, 3, h, w) in 0..255: Gaussian window of deviation 1.5, 11 x 11, mean over valid positions and channels: (b,)."""
    # not in the paper: the window, of the SSIM paper and of scikit-image's gaussian_weights
    t = torch.arange(-5, 6, dtype=torch.float64)
    g = torch.exp(-t.square() / (2 * 1.5 ** 2))
    g = (g / g.sum()).expand(3, 1, 1, 11)
    mean = lambda v: F.conv2d(F.conv2d(v, g, groups=3), g.mT, groups=3)
    x, y = x.cpu().double(), y.cpu().double()                   # in float32 the variances below would cancel
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean(dim=(1, 2, 3))


# ---------------------------------------------------------------- the five artifacts, metered (Sec. 4)
# Each meter looks at originals x and reconstructions y, (b, 3, h, w) in 0..255, and gives a few numbers for each picture, (b, n).
# Their means over pictures give one reading. METERS below has the reading, its ideal value and the edge of its healthy range.

def color_shift(x, y):
    """Medians of the differences in CIELAB's a* and b*. The reading is the length of their mean over pictures: a bias, in delta E units.

    Sec. 4: "the color of all generated images is moved towards one color". A median is blind to spots, lines and frames.
    """
    return (lab_chroma(y) - lab_chroma(x)).flatten(2).median(dim=2).values


def grid(x, y):
    """Power of the luminance residual at the frequencies of periods 8, 4, 8/3 and 2 pixels, and around them in frequency; the reading is the
    amplitude of what stands above, in grey levels (root mean square).

    Sec. 4, Fig. 2c: up-sampling by 2, 4 and 8 and a discriminator's strides have these periods. Residuals without a grid are alike at neighbours.
    """
    r = (gray(y) - gray(x))[..., :x.shape[2] // 8 * 8, :x.shape[3] // 8 * 8]                                  # (b, h, w)
    power = (torch.fft.fft2(r).abs() / r[0].numel()).square()
    along = lambda dim: sum(power.roll(shift, dim) for shift in (-3, -2, 2, 3)) / 4
    around = torch.maximum(along(1), along(2))                  # edges of a frame or a picture have power along one axis only
    on_grid = lambda p: p[:, ::r.shape[1] // 8, ::r.shape[2] // 8].flatten(1)[:, 1:].sum(1)                  # 63 bins, not the mean
    return torch.stack([on_grid(power), on_grid(around)], 1)


def blur(x, y):
    """Inner product of the pictures' frequencies above half of Nyquist, and the original's own power there; the reading is the ratio: the share kept.

    Sec. 4, Fig. 2d. Detail that is made up (a grid, noise) does not count as kept. The 16 px frame belongs to the corner meter.
    """
    inner = lambda v: gray(v)[:, 16:-16, 16:-16]
    pairs = [(data.high_frequencies(a), data.high_frequencies(b)) for a, b in zip(inner(x), inner(y))]
    return torch.stack([torch.stack([(a * b.conj()).real.sum(), a.abs().square().sum()]) for a, b in pairs])


def corner(x, y):
    """Squared error in the 16 px frame, in the interior, and of the frame in its edges and in its corners; the reading is frame over interior.

    Sec. 4, Fig. 2e: "a frame of blur around the edges", from zero padding.
    """
    e = (y - x).square().mean(dim=1)                                                                       # (b, h, w)
    side = lambda n: (torch.arange(n) < 16) | (torch.arange(n) >= n - 16)
    row, column = side(e.shape[1])[:, None].to(e.device), side(e.shape[2])[None].to(e.device)
    return torch.stack([e[:, m].mean(dim=1) for m in (row | column, ~(row | column), row ^ column, row & column)], 1)


def droplet(x, y):
    """How far the brightest spot of y stands above all of x within 9 pixels, after a shift that all of the picture shares; in grey levels.

    Sec. 4, Fig. 2f: "bright spots in the pixel space". Blur cannot exceed the neighbourhood it averages, nor can darker lines or frames.
    """
    lx, ly = gray(x), gray(y)
    shift = (ly - lx).flatten(1).median(dim=1).values[:, None, None]
    return (ly - shift - F.max_pool2d(lx, 19, stride=1, padding=9)).flatten(1).amax(dim=1, keepdim=True).clamp(min=0)


# not in the paper: numbers for artifacts; the edges are our judgement
# name: (meter, reading from its means, ideal, edge of the healthy range, unit)
METERS = {
    "color shift": (color_shift, lambda m: m.norm(), 0.0, 1.0, "delta E"),
    "grid": (grid, lambda m: (m[0] - m[1]).clamp(min=0).sqrt(), 0.0, 1.0, "grey levels"),
    "blur": (blur, lambda m: m[0] / m[1].clamp(min=1e-6), 1.0, 0.9, "share kept"),
    "corner": (corner, lambda m: (m[0] + 1) / (m[1] + 1), 1.0, 2.0, "ratio"),      # 1: an error of one grey level is no artifact
    "droplet": (droplet, lambda m: m[0], 0.0, 8.0, "grey levels"),
}


def reaction(name, reading):
    """How far a reading is from its ideal, in units of its healthy range: above 1 it is an artifact."""
    _, _, ideal, edge, _ = METERS[name]
    return abs(reading - ideal) / abs(edge - ideal)


def read_meters(x, y):
    """{name: reading} of a batch of pictures in 0..255."""
    return {name: read(meter(x, y).mean(dim=0)).item() for name, (meter, read, *_) in METERS.items()}


def gray(x):
    return rgb_to_grayscale(x)[:, 0]


def lab_chroma(x):
    """a* and b* of CIELAB (D65) of sRGB pictures (b, 3, h, w) in 0..255: (b, 2, h, w)."""
    x = x / 255
    linear = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055).clamp(min=0) ** 2.4)
    to_xyz = x.new_tensor([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
    t = torch.einsum("ij,bjhw->bihw", to_xyz / to_xyz.sum(1, keepdim=True), linear)                        # relative to white
    f = torch.where(t > (6 / 29) ** 3, t.clamp(min=1e-6) ** (1 / 3), t * (29 / 6) ** 2 / 3 + 4 / 29)
    return torch.stack([500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


# ---------------------------------------------------------------- activations and latents

@torch.no_grad()
def activation_norms(vae, z):
    """Norms over channels after each block of the decoder, as {layer: (h, w)} for one latent z (1, k, h/f, w/f): Fig. 3."""
    norms, hooks = {}, []
    for name, module in vae.decoder.named_modules():
        if isinstance(module, (model.ResBlock, model.AttnBlock, model.Upsample)) or name in ("conv_in", "conv_out"):
            hooks.append(module.register_forward_hook(lambda m, i, out, name=name: norms.update({name: out[0].float().norm(dim=0)})))
    vae.decode(z)
    for hook in hooks:
        hook.remove()
    return norms


@torch.no_grad()
def latent_report(vae, pictures, seed):
    """What the latents of some pictures (1, 3, h, w) are like, and how well decoding bears noise on them."""
    q = [vae.encode(x) for x in pictures]
    mean, logvar = (torch.cat([getattr(p, k).movedim(1, -1).flatten(0, -2) for p in q]).cpu().double() for k in ("mean", "logvar"))   # (n, k)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(dim=0)                                     # Eq. 3, nats a channel
    variance = mean.var(dim=0) + logvar.exp().mean(dim=0)
    generator, robustness = torch.Generator().manual_seed(seed), {}
    for strength in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5):
        psnr = []
        for x, p in zip(pictures, q):
            noise = torch.randn(p.mean.shape, generator=generator) * variance.sqrt().float()[:, None, None]
            psnr.append(losses.psnr(x, vae.decode(p.mean + strength * noise.to(x.device))))
        robustness[str(strength)] = torch.cat(psnr).mean().item()
    return {"mean": mean.mean(dim=0).tolist(), "std": variance.sqrt().tolist(), "kl": kl.tolist(), "active": int((kl > 0.01).sum()), "channels": len(kl),
            "posterior_share": (logvar.exp().mean(dim=0) / variance).mean().item(), "psnr_under_noise": robustness}


# ---------------------------------------------------------------- what can be measured

def open_model(spec, s, device):
    """(name, reconstruct, VAE or None): reconstruct takes a picture (1, 3, h, w) in [-1, 1] and gives one."""
    kind, _, rest = spec.partition(":")
    if kind in ("bicubic", "jpeg") and not (rest.isdigit() and int(rest) > 0):
        data.stop(f"--vae {spec}: a positive number must follow {kind}:")
    if kind == "bicubic":
        def reconstruct(x):
            small = F.interpolate(x, scale_factor=1 / int(rest), mode="bicubic", antialias=True)
            return F.interpolate(small, size=x.shape[2:], mode="bicubic")
        return spec, reconstruct, None
    if kind == "jpeg":
        def reconstruct(x):
            to_pil_image(losses.to_uint8(x[0]).cpu()).save(file := io.BytesIO(), "JPEG", quality=int(rest))
            return losses.from_uint8(pil_to_tensor(Image.open(file)).to(x)[None])
        return spec, reconstruct, None
    noise = lambda q: torch.randn(q.mean.shape, generator=torch.Generator().manual_seed(s.seed)).to(device)
    if kind == "diffusers":
        try:
            from diffusers import AutoModel
        except ImportError:
            data.stop(f"--vae {spec} needs the diffusers package: pip install diffusers")
        try:
            name, _, subfolder = rest.partition("@")
            net = AutoModel.from_pretrained(name, subfolder=subfolder or None).to(device).eval()
        except Exception as error:
            data.stop(f"--vae {spec} cannot be loaded: {str(error).splitlines()[0]}")
        def reconstruct(x):
            q = net.encode(x)
            q = getattr(q, "latent_dist", q)
            z = next(getattr(q, k) for k in ("mean", "latents", "latent") if hasattr(q, k))
            return net.decode(z + q.std * noise(q) if s.sample and hasattr(q, "std") else z).sample
        return name.rstrip("/").rsplit("/", 1)[-1], reconstruct, None
    vae = model.load_vae(spec, device)
    if not vae.takes(s.size):
        data.stop(f"--size {s.size} must be a multiple of {vae.factor}, from {4 * vae.factor} up, for {spec}")
    def reconstruct(x):
        q = vae.encode(x)
        return vae.decode(q.sample(noise(q)) if s.sample else q.mean)
    alike = [os.path.abspath(Path(v).parent) for v in s.vae if Path(v).stem == Path(spec).stem]
    return os.path.relpath(spec, os.path.commonpath(alike)) if len(alike) > 1 else Path(spec).stem, reconstruct, vae


def read_pictures(s, skipped):
    """Yield (name, uint8 (3, size, size)) of the pictures to measure on: shorter side resized, centre crop. What is broken goes into `skipped` with its reason."""
    own = Path(s.run, "data", "val")
    source = data.Settings(images=s.images or str(own), min_side=1)
    units = sorted(data.list_units(source)) if s.images else [str(own / os.fsdecode(n)) for n in data.picture_names(own, 1)]
    for name, parts in itertools.islice(data.pictures(units, source), s.pictures or None):
        try:
            x, _ = data.to_rgb(parts, source)
        except Exception as error:
            skipped[name] = error
            continue
        yield name, data.centre_crop(data.resize_shorter(x, s.resize or s.size), s.size)


@torch.no_grad()
def evaluate(spec, s, device, perceptual, skipped):
    """The row of one model, the reconstructions of the first three pictures, and the VAE itself or None."""
    name, reconstruct, vae = open_model(spec, s, device)
    if s.fid:
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
            fid = FrechetInceptionDistance(feature=2048).to(device)
        except Exception as error:
            data.stop(f"--fid needs pip install torchmetrics torch-fidelity, and their Inception weights ({type(error).__name__})")
    sums, partials, shown, n, began = {"psnr": 0.0, "ssim": 0.0, "lpips": 0.0}, {}, [], 0, time.time()
    for picture, x8 in tqdm(read_pictures(s, skipped), unit="picture", desc=name[-30:], **data.BAR):
        x8 = x8[None].to(device)
        x = losses.from_uint8(x8)                                                                          # (1, 3, size, size)
        y8 = losses.to_uint8(reconstruct(x))
        y = losses.from_uint8(y8)
        for key, value in (("psnr", losses.psnr(x, y)), ("ssim", ssim(x8, y8)), ("lpips", perceptual(x, y))):
            sums[key] += value.mean().item()
        for key, (meter, *_) in METERS.items():
            partials[key] = partials.get(key, 0) + meter(x8.float(), y8.float())[0].cpu()
        if s.fid:
            fid.update(x8, real=True)
            fid.update(y8, real=False)
        if n < 3:
            shown.append((picture, x8[0].cpu(), y8[0].cpu()))
        n += 1
    row = {"name": name, "pictures": n} | {key: value / n for key, value in sums.items()}
    row |= {key: read(partials[key] / n).item() for key, (_, read, *_) in METERS.items()}
    row |= {"corner_edges": ((partials["corner"][2] + n) / (partials["corner"][1] + n)).item(), "corner_corners": ((partials["corner"][3] + n) / (partials["corner"][1] + n)).item()}
    if s.fid:
        row["rfid"] = fid.compute().item()
    row["seconds_a_picture"] = (time.time() - began) / n
    row["peak_memory_gib"] = (torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)) / 2 ** 30
    return row, shown, vae


# ---------------------------------------------------------------- tables and pictures

def table(rows, protocol):
    """Aligned Markdown: a row for each model, the protocol below."""
    columns = ["psnr", "ssim", "lpips", *METERS, *(["rfid"] if "rfid" in rows[0] else [])]
    heads = ["model", "PSNR, dB", "SSIM", protocol["lpips"], *(f"{k}, {METERS[k][4]}" for k in METERS), *(["rFID"] if "rfid" in rows[0] else [])]
    digits = {"psnr": 2, "ssim": 4, "lpips": 4, "blur": 3}
    cells = [heads] + [[r["name"]] + [f"{r[c]:.{digits.get(c, 2)}f}" for c in columns] for r in rows]
    cells.insert(1, ["healthy", "", "", "", *(f"{'>' if METERS[k][3] < METERS[k][2] else '<'} {METERS[k][3]:g}" for k in METERS), *([""] if "rfid" in rows[0] else [])])
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines) + "\n\n" + "\n".join(f"{k}: {v}" for k, v in protocol.items()) + "\n"


def draw_comparison(path, results):
    """Fig. 5: three pictures, whole, a zoomed piece with most detail, and five times the error, original first, then each model."""
    tiles, labels = [], []
    for i in range(len(results[0][1])):
        x = results[0][1][i][1]
        side = max(16, x.shape[1] // 4)
        fine = gray(x[None].float())
        fine = (fine - F.avg_pool2d(fine, 9, 1, 4, count_include_pad=False)).square()                       # (1, size, size)
        detail = F.avg_pool2d(fine, side, side // 2)[0]
        top, left = (int(v) * (side // 2) for v in divmod(int(detail.argmax()), detail.shape[1]))
        zoom = lambda v: F.interpolate(v[None, :, top:top + side, left:left + side].float(), size=x.shape[1:], mode="nearest")[0].byte()
        pictures = [x] + [shown[i][2] for _, shown, _ in results]
        error = lambda v: ((v.float() - x.float()) * 5 + 128).clamp(0, 255).byte()
        tiles += [*pictures, *(zoom(v) for v in pictures), *(error(v) for v in pictures)]
        labels += ["picture", "zoom", "error x 5"]
    data.save_sheet(path, tiles, 1 + len(results), titles=["original"] + [f"{r['name'][:18]} {r['psnr']:.1f} dB" for r, _, _ in results], rows=labels)


def draw_activations(path, vaes, pictures):
    """Fig. 3: norms over channels after each block of the decoder, dark to bright, scaled by their median; returns {model: {layer: largest over median}}."""
    tiles, rows, result, names = [], [], {}, []
    for name, vae in vaes.items():
        norms = activation_norms(vae, vae.encode(pictures[0]).mean)
        result[name] = {layer: (v.max() / v.median().clamp(min=1e-6)).item() for layer, v in norms.items()}
        names = [f"{layer.replace('.block', '')} {result[name][layer]:.1f}" for layer in norms]
        size = max(v.shape[0] for v in norms.values())
        tiles += [F.interpolate((v / v.median().clamp(min=1e-6) * 64).clamp(0, 255)[None, None], size=size)[0].byte().expand(3, -1, -1) for v in norms.values()]
        rows.append(name[:14])
    if len({len(v) for v in result.values()}) == 1:             # only models of one depth fit side by side
        data.save_sheet(path, tiles, len(names), titles=names if len(result) == 1 else list(norms), rows=rows)
        print(f"wrote {path.name}")
    else:
        print(f"{path.name} is not drawn: these decoders have different numbers of layers")
    return result


@torch.no_grad()
def main(s):
    if s.dry_run:
        return data.print_settings(s)
    if s.size < 64 or 0 < s.resize < s.size:
        data.stop(f"--size {s.size} must be at least 64, for an interior beside a frame of 16 pixels, and at most --resize {s.resize or s.size} (0: as --size)")
    device, run = model.pick_device(s.device), Path(s.run)
    specs = s.vae or tuple(str(run / n) for n in ("vae.pt", "vae_finetuned.pt") if (run / n).is_file()) or (str(run / "vae.pt"),)
    perceptual = losses.Perceptual(s.perceptual_net).to(device)
    torch.backends.cudnn.allow_tf32 = False
    skipped = {}
    pictures = [losses.from_uint8(x[None].to(device)) for _, x in itertools.islice(read_pictures(s, skipped), max(1, s.latents))]
    if not pictures:
        data.stop(f"no picture in {s.images or run / 'data' / 'val'} could be read")
    results = [evaluate(spec, s, device, perceptual, skipped) for spec in specs]
    for name, error in skipped.items():
        print(f"passed over {name}: {error}", file=sys.stderr)
    rows = [row for row, _, _ in results]
    vaes = {row["name"]: vae for row, _, vae in results if vae is not None and s.latents}
    protocol = {
        "pictures": f"{rows[0]['pictures']} from {s.images or run / 'data' / 'val'}, {len(skipped)} passed over",
        "preparation": f"shorter side to {s.resize or s.size} by antialiased bicubic, centre crop of {s.size}, 8 bits to [-1, 1]",
        "reconstruction": f"EMA weights where the file has them, posterior {'sample' if s.sample else 'mean'}, clamped and rounded to 8 bits, one picture at a time",
        "metrics": "a value for each picture, then the mean; SSIM with a Gaussian window of deviation 1.5, 11 x 11, over channels",
        "lpips": "untrained features (not LPIPS)" if s.perceptual_net == "untrained" else f"LPIPS ({s.perceptual_net})",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type}
    for name, activations in draw_activations(run / "activations.png", vaes, pictures).items() if vaes else ():
        row = next(r for r in rows if r["name"] == name)
        row["activation_max_over_median"] = activations
        row["latents"] = latent_report(vaes[name], pictures, s.seed)
    text = table(rows, protocol)
    for row in rows:
        if "latents" in row:
            q, worst = row["latents"], max(row["activation_max_over_median"].items(), key=lambda kv: kv[1])
            text += (f"\n{row['name']}: {q['active']} of {q['channels']} latent channels active, KL {sum(q['kl']) / q['channels']:.2f} nats a value, "
                     f"posterior's share of variance {q['posterior_share']:.4f}\n  PSNR with noise on the latent, in its deviations: "
                     + ", ".join(f"{k}: {v:.2f}" for k, v in q["psnr_under_noise"].items())
                     + f"\n  largest activation norm over the median: {worst[1]:.1f} after decoder.{worst[0]}\n")
    print(text)
    data.write_aside(run / "eval.md", lambda f: f.write(text.encode()))
    data.write_aside(run / "eval.json", lambda f: f.write(json.dumps({"protocol": protocol, "rows": rows}, indent=1).encode()))
    draw_comparison(run / "eval.png", results)
    if vaes and len(pictures) > 1:                              # from one picture to another in seven steps, a row for each VAE
        tiles = []
        for vae in vaes.values():
            a, b = (vae.encode(x).mean for x in pictures[:2])
            tiles += [losses.to_uint8(vae.decode(torch.lerp(a, b, t / 6)))[0] for t in range(7)]
        data.save_sheet(run / "latents.png", tiles, 7, rows=[name[:14] for name in vaes])
        print("wrote latents.png")
    print(f"wrote eval.md, eval.json and eval.png in {run}")
    return rows


if __name__ == "__main__":
    data.command_line(main, Settings, PRESETS, __doc__)
