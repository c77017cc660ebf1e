"""Stage 1 of VIVAT: from any pictures to a training set (Sec. 5.1).

Reads   --images DIR: a folder tree, an img2dataset folder or its .tar shards;
        or --images synthetic (the default): scenes drawn here, each with an exact caption.
Writes  RUN/data/train and RUN/data/val (lossless WebP, metadata.jsonl), RUN/data/rejected.jsonl;
        with --compare instead RUN/compare.png and a table: direct crop, nearest, bicubic.
Paper   Sec. 5.1 (data selection, resize, then crop).

    python 01_data.py --preset small --images ~/Pictures --run runs/mine

Run it again and it does only what is missing.
"""
import argparse, collections, hashlib, inspect, io, itertools, json, math, os, random, re, sys, tarfile, textwrap, time, typing, warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import InterpolationMode
from tqdm import tqdm


@dataclass(frozen=True)
class Settings:
    run: str = ""                 # folder that all stages share [runs/PRESET]
    images: str = "synthetic"     # a folder of pictures or .tar shards, or "synthetic"; Sec. 5.1: LAION Aesthetic HighRes
    min_side: int = 720           # Sec. 5.1: HD sources; a shorter side below this is rejected
    min_score: float = 4.5        # Sec. 5.1: keep aesthetic scores > 4.5; not in the paper: a picture without a score is kept
    resize: int = 480             # Sec. 5.1: shorter side after the bicubic resize
    interpolation: typing.Literal["bicubic", "nearest"] = "bicubic"   # Sec. 5.1, which warns of nearest
    crop: int = 240               # Sec. 5.1: cropped at training time (04); here only --compare crops
    val_share: float = 0.01       # not in the paper: 1% is enough to validate on and costs little
    count: int = 10_000           # not in the paper: scenes to draw when --images is "synthetic"
    max_pixels: int = 100_000_000 # not in the paper: a decompression bomb must not take the machine down
    workers: int = -1             # not in the paper: processes; -1 is one per core, 0 is none
    seed: int = 0                 # not in the paper: of the synthetic scenes
    compare: bool = False         # only show what Sec. 5.1 claims about crop and resize, on 16 pictures
    dry_run: bool = False         # print the settings as JSON and stop


PRESETS = {
    "paper": {},
    "small": dict(count=20_000),
    # The paper's 480 -> 240 at about a quarter of the size: a crop still shows half of the shorter side.
    "demo": dict(count=600, resize=128, crop=64, val_share=0.1),
}
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"}
SCORES = {"aesthetic_score", "aesthetic", "aesthetics", "aesthetics_score", "aesthetic_score_laion_v2", "score"}  # lower case


# ---------------------------------------------------------------- resize, then crop (Sec. 5.1)

def resize_shorter(x, side, how=InterpolationMode.BICUBIC):
    """Resize a uint8 picture so that its shorter side is `side`, antialiased unless `how` is NEAREST."""
    h, w = x.shape[-2:]
    size = [round(h * side / min(h, w)), round(w * side / min(h, w))]
    return F.resize(x, size, interpolation=how, antialias=how != InterpolationMode.NEAREST)


class Crops(Dataset):
    """The training pictures of RUN/data/train as uint8 crops (3, crop, crop).

    Item n is a function of (seed, n) alone: which picture, where the crop lies, whether it is flipped.
    So no step depends on workers, on processes or on where a run was interrupted.
    """
    def __init__(self, folder, crop, seed):
        self.folder, self.crop, self.seed = Path(folder), crop, seed
        self.names = picture_names(folder, crop)

    def __getitem__(self, n):
        rng = random.Random(f"{self.seed}/{n}")
        # not in the paper: pictures are drawn with replacement, so any step can be made again without an epoch's order
        x = read_picture(self.folder, self.names[rng.randrange(len(self.names))])                    # (3, h, w)
        top, left = (rng.randint(0, side - self.crop) for side in x.shape[1:])
        x = x[:, top:top + self.crop, left:left + self.crop]                                         # (3, crop, crop)
        return x.flip(-1) if rng.random() < 0.5 else x.contiguous()   # not in the paper: random crop and flip


def centre_crop(x, crop):
    """The middle crop x crop of (..., h, w): how pictures are cropped wherever nothing is trained."""
    top, left = (x.shape[-2] - crop) // 2, (x.shape[-1] - crop) // 2
    return x[..., top:top + crop, left:left + crop]


def read_picture(folder, name):
    """A prepared picture as uint8 (3, h, w)."""
    return F.pil_to_tensor(Image.open(Path(folder, os.fsdecode(name))).convert("RGB"))


def picture_names(folder, crop):
    """File names (bytes) of RUN/data/train or val, as a numpy array: workers share one copy, however many there are."""
    path, kept = Path(folder, "metadata.jsonl"), Path(folder).parent / "settings.json"
    if not path.is_file() or not path.stat().st_size or not kept.is_file():
        stop(f"{path} is missing or empty: run 01_data.py first")
    if (resize := json.loads(kept.read_text())["resize"]) < crop:
        stop(f"a side of {crop} is larger than the pictures in {folder}, whose shorter side is {resize}: run 01_data.py with a larger --resize first")
    return np.array(sorted(os.fsencode(line["file_name"]) for line in read_jsonl(path)))


def val_crops(run, crop, count):
    """The centres of the first `count` validation pictures, uint8 (n, 3, crop, crop)."""
    folder = Path(run, "data", "val")
    return torch.stack([centre_crop(read_picture(folder, name), crop) for name in picture_names(folder, crop)[:count]])


# ---------------------------------------------------------------- one picture in, one picture out

def prepare(name, parts, settings):
    """Filter, resize and store one picture; return its line for metadata.jsonl, or one with a "reason" for rejected.jsonl."""
    record = {"source": os.fsencode(name).decode("utf-8", "replace")}
    try:
        if isinstance(parts, Exception):
            raise parts
        caption, score = describe(parts)
        if score is not None and score <= settings.min_score:
            raise ValueError(f"aesthetic score {score:g} is not above {settings.min_score:g}")
        x, (width, height) = to_rgb(parts, settings)
        x = resize_shorter(x, settings.resize, InterpolationMode(settings.interpolation))  # (3, h, w), uint8
        # The split looks at the bare name alone, so it never changes as a folder grows or moves.
        digest = lambda text: hashlib.sha256(os.fsencode(text)).hexdigest()
        split = "val" if int(digest(os.path.basename(name))[:8], 16) / 2 ** 32 < settings.val_share else "train"
        key, stem = digest(name), re.sub(r"[^\w-]", "_", Path(record["source"]).stem)[:40]
        file_name = f"{key[:2]}/{stem}-{key[2:10]}.webp"                                # 256 folders: millions of files stay listable
        # Lossless WebP: about half the time of PNG level 1 to write, faster to read and smaller (README, Measured).
        write_aside(Path(settings.run, "data", split, file_name), lambda f: F.to_pil_image(x).save(f, "WEBP", lossless=True, quality=0, method=0))
        record |= dict(split=split, file_name=file_name, text=caption, score=score, original_width=width, original_height=height)
    except Exception as error:                              # one bad file among a million never stops the run
        text = re.sub(r" <_io.*>", "", str(error))          # addresses in memory help nobody
        record["reason"] = text if type(error) is ValueError else f"{type(error).__name__}: {text}"
    return record


def to_rgb(parts, settings):
    """Decode to uint8 RGB (3, h, w), upright, alpha over white; also the original size. Raises on what is broken, tiny or enormous."""
    Image.MAX_IMAGE_PIXELS = None                           # Pillow's own guard; --max-pixels is ours
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        im = parts["picture"]()
        im = im if isinstance(im, Image.Image) else Image.open(io.BytesIO(im))          # reads the header only
        size = im.size
        if size[0] * size[1] > settings.max_pixels:
            raise ValueError(f"{size[0]}x{size[1]} is more than {settings.max_pixels} pixels")
        if min(size) < settings.min_side:
            raise ValueError(f"shorter side of {size[0]}x{size[1]} is below {settings.min_side}")
        ImageOps.exif_transpose(im, in_place=True)          # in place and without a second convert: copies cost as much as decoding
        if im.mode.startswith("I") or im.mode == "F":       # 16 or 32 bits a value, which Pillow's own conversion would clip
            values = np.asarray(im).astype(np.float32)
            top = 65535 if im.mode.startswith("I;16") else next((t for t in (1, 255, 65535) if values.max() <= t), values.max())
            im = Image.fromarray((values * (255 / top)).clip(0, 255).round().astype(np.uint8))
        if im.has_transparency_data:
            im = im.convert("RGBA")
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
        return F.pil_to_tensor(im if im.mode == "RGB" else im.convert("RGB")), size


def describe(parts):
    """Caption (str) and aesthetic score (float or None) from the .txt and .json that img2dataset leaves beside a picture."""
    caption = parts[".txt"]().decode("utf-8-sig", "replace").strip() if ".txt" in parts else ""
    try:
        meta = json.loads(parts[".json"]()) if ".json" in parts else {}
    except ValueError:
        meta = {}
    meta = {str(k).lower(): v for k, v in meta.items()} if isinstance(meta, dict) else {}
    caption = caption or str(meta.get("caption") or meta.get("text") or "")
    for key in SCORES & meta.keys():
        try:
            if math.isfinite(score := float(meta[key])):
                return caption, score
        except (TypeError, ValueError):
            pass
    return caption, None


# ---------------------------------------------------------------- where pictures come from

class Source(IterableDataset):
    """The record of every n-th picture, prepared: n DataLoader workers share the work, and each passes over what is not its own."""
    def __init__(self, units, settings, done):
        self.units, self.settings, self.done = units, settings, done

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        k, n = (worker.id, worker.num_workers) if worker else (0, 1)
        for number, (name, parts) in enumerate(pictures(self.units, self.settings)):
            if number % n == k and os.fsencode(name).decode("utf-8", "replace") not in self.done:
                yield prepare(name, parts, self.settings)


def list_units(settings):
    """What there is to read: numbers of synthetic scenes, or paths of pictures and .tar shards."""
    if settings.images == "synthetic":
        return list(range(settings.count))
    root = Path(settings.images).expanduser()
    if not root.is_dir():
        stop(f"--images {settings.images}: no such folder")
    own = Path(settings.run, "data").resolve()              # a run folder may lie among the pictures: what is there is not read again
    units = [os.path.join(folder, name) for folder, _, names in os.walk(root) if not (settings.run and Path(folder).resolve().is_relative_to(own))
             for name in sorted(names) if suffix(name) in PICTURES | {".tar"}]
    return units or stop(f"--images {settings.images}: no pictures ({' '.join(sorted(PICTURES))}) and no .tar shards in it")


def pictures(units, settings):
    """Yield (name, parts) of each picture: parts maps "picture", ".txt" and ".json" to functions that read them; an Exception for a broken shard."""
    for unit in units:
        if isinstance(unit, int):
            caption, draw = scene(settings.seed, unit)
            yield f"scene-{unit:06d}", {"picture": draw, ".txt": caption.encode}
            continue
        path, name = Path(unit), os.path.relpath(unit, Path(settings.images).expanduser())
        if not path.is_file():
            yield name, ValueError("not a regular file")    # a pipe named .jpg would never end
            continue
        if suffix(unit) in PICTURES:
            yield name, {"picture": path.read_bytes} | {end: p.read_bytes for end in (".txt", ".json") if (p := path.with_suffix(end)).is_file()}
            continue
        try:
            with tarfile.open(path) as tar:
                for _, members in itertools.groupby((m for m in tar if m.isfile()), key=lambda m: os.path.splitext(m.name)[0]):
                    parts = {suffix(m.name): (m, tar.extractfile(m).read) for m in members}
                    for member, read in [parts.pop(end) for end in parts.keys() & PICTURES]:
                        yield f"{name}/{member.name}", {"picture": read} | {end: r for end, (_, r) in parts.items()}
        except (tarfile.TarError, OSError, EOFError) as error:
            yield name, error


def suffix(name):
    return os.path.splitext(name)[1].lower()


# ---------------------------------------------------------------- synthetic scenes

COLORS = {"red": (220, 45, 40), "yellow": (240, 205, 50), "green": (50, 165, 70),
          "cyan": (60, 195, 215), "blue": (45, 80, 210), "purple": (150, 60, 190)}
SHAPES = ("circle", "square", "triangle", "star")
PATTERNS = ("plain", "striped", "checkered", "dotted")
WORDS = "harbor lantern meadow pebble thistle walnut copper violin saffron glacier marble orchard".split()


def scene(seed, index):
    """Scene number `index`: its exact caption, and a function that draws it at 1280x720 (everything told lies in the middle square)."""
    rng = random.Random(f"scene/{seed}/{index}")
    shape, pattern = rng.choice(SHAPES), rng.choice(PATTERNS)
    color, ground = rng.sample(sorted(COLORS), 2)
    word = rng.choice(WORDS) if rng.random() < 0.5 else ""
    caption = f"a {color} {shape} on a {pattern} {ground} background" + (f', with the word "{word}"' if word else "")
    return caption, lambda: draw_scene(rng, shape, color, pattern, ground, word)


def draw_scene(rng, shape, color, pattern, ground, word):
    w, h = 1280, 720
    shade = lambda name, k: tuple(min(255, round(c * k)) for c in COLORS[name])
    def ramp(name, dark, light):                            # a gradient between two shades, in one of four directions
        mask = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((w, h))
        return Image.composite(Image.new("RGB", (w, h), shade(name, dark)), Image.new("RGB", (w, h), shade(name, light)), mask)

    im, marks, step = ramp(ground, 0.85, 1.1), Image.new("L", (w, h)), rng.randint(70, 110)
    d = ImageDraw.Draw(marks)
    for x in range(0, w, step) if pattern != "plain" else ():
        for y in range(0, h, step):
            if pattern == "dotted":
                d.ellipse((x, y, x + step // 2, y + step // 2), fill=255)
            elif pattern == "striped" or (x // step + y // step) % 2:
                d.rectangle((x, y, x + (step // 2 if pattern == "striped" else step - 1), y + step - 1), fill=255)
    im.paste(shade(ground, 0.66), mask=marks)

    cx, cy, r, turn = w // 2 + rng.randint(-110, 110), h // 2 + rng.randint(-90, 90), rng.randint(130, 200), rng.uniform(-0.25, 0.25)
    n = {"square": 4, "triangle": 3, "star": 10, "circle": 90}[shape]
    reach = [r * (0.48 if shape == "star" and i % 2 else 1.0 if shape == "circle" else 1.15) for i in range(n)]
    angle = [turn + math.pi * ((2 * i + (shape == "square")) / n - 0.5) for i in range(n)]
    points = [(cx + a * math.cos(t), cy + a * math.sin(t)) for a, t in zip(reach, angle)]
    mask = Image.new("L", (w, h))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    im.paste(ramp(color, 0.8, 1.15), mask=mask)
    d = ImageDraw.Draw(im)
    d.line(points + points[:2], fill=shade(color, 0.5), width=5, joint="curve")
    if word:
        d.text((w // 2 + rng.randint(-250, 60), rng.choice((20, h - 80))), word, rng.choice(("white", "black")), ImageFont.load_default(rng.randint(34, 52)))
    im = im.filter(ImageFilter.GaussianBlur(1))             # edges as soft as a lens and a sensor leave them, not stair-steps
    grain = Image.frombytes("L", (w // 2, h // 2), rng.randbytes(w * h // 4)).resize((w, h)).point(lambda v: 120 + v // 16)
    return ImageChops.add(im, Image.merge("RGB", (grain,) * 3), offset=-128)


# ---------------------------------------------------------------- --compare: what Sec. 5.1 says, in figures

def high_frequencies(x):
    """What a grey picture (h, w) in 0..255 has above half the Nyquist frequency (Hann window): complex, squares add up to a power a pixel."""
    h, w = x.shape
    window = (torch.hann_window(h)[:, None] * torch.hann_window(w)).to(x)
    spectrum = torch.fft.fft2((x - x.mean()) * window) / (h * w * window.square().sum()).sqrt()
    radius = (torch.fft.fftfreq(h)[:, None].square() + torch.fft.fftfreq(w).square()).sqrt()
    return spectrum[radius.to(x.device) > 0.25]


def compare(settings):
    """Print and draw the three ways to a crop; returns {way: (energy, energy over bicubic's, aliasing)}, medians over pictures."""
    ways = {"direct crop": None, "nearest, crop": InterpolationMode.NEAREST, "bicubic, crop": InterpolationMode.BICUBIC}
    # An alias is a frequency that the small picture shows and the large one has not: it stays as a difference
    # in what both must share, everything below a quarter of the small picture's Nyquist frequency.
    coarse = lambda x: resize_shorter(x, settings.resize // 4).float()
    rows, tiles, units = [], [], list_units(settings)
    for _, parts in pictures(units[::max(1, len(units) // 16)], settings):
        try:
            full, _ = to_rgb(parts, settings)
        except Exception:                                   # the real run lists what is broken; here it is passed over
            continue
        resized = [resize_shorter(full, settings.resize, how) if how else full for how in ways.values()]
        crops = [centre_crop(x, settings.crop) for x in resized]
        energy = [high_frequencies(F.rgb_to_grayscale(x)[0].float()).abs().square().sum().item() for x in crops]
        rows.append([(e, e / energy[-1], (coarse(x) - coarse(full)).square().mean().sqrt().item()) for e, x in zip(energy, resized)])
        tiles += crops
        if len(rows) == 16:
            break
    if not rows:
        stop(f"--images {settings.images}: no picture with a shorter side of {settings.min_side} px or more could be read")
    result = dict(zip(ways, torch.tensor(rows).median(dim=0).values.tolist()))
    print(f"Sec. 5.1 on {len(rows)} pictures, {settings.crop} px crops, medians\n{'':14}{'energy above Nyquist/2':>24}{'over bicubic':>14}{'aliasing, grey levels':>24}")
    for way, (energy, ratio, alias) in result.items():
        print(f"{way:14}{energy:24.2f}{ratio:14.2f}{alias:24.2f}")
    save_sheet(Path(settings.run, "compare.png"), tiles[:12], 3, titles=list(ways))
    return result


def save_sheet(path, tiles, columns, titles=(), rows=(), captions=()):
    """Write uint8 pictures (3, h, w) as one PNG, `columns` in a row, small ones magnified; a title over each column, a label beside each row, a caption under each picture."""
    tiles = [resize_shorter(t.cpu(), max(160, *t.shape[1:]), InterpolationMode.NEAREST) for t in tiles]
    (th, w), left, top = tiles[0].shape[1:], 120 if rows else 0, 22 if titles else 0
    h = th + (54 if captions else 0)
    sheet = Image.new("RGB", (left + columns * (w + 4), top + -(-len(tiles) // columns) * (h + 4)), "white")
    d, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, tile in enumerate(tiles):
        sheet.paste(F.to_pil_image(tile), (left + i % columns * (w + 4), top + i // columns * (h + 4)))
    for i, text in enumerate(captions):
        lines = textwrap.wrap(text, w // 8, max_lines=3, placeholder=" ...")
        d.multiline_text((left + i % columns * (w + 4) + 2, top + i // columns * (h + 4) + th + 1), "\n".join(lines), "black", font, spacing=2)
    for i, title in enumerate(titles):
        d.text((left + i * (w + 4) + 2, 3), title, "black", font)
    for i, label in enumerate(rows):
        d.text((4, top + i * (h + 4) + 4), label, "black", font)
    write_aside(path, lambda f: sheet.save(f, "PNG"))


# ---------------------------------------------------------------- main

def main(settings):
    if settings.dry_run:
        return print_settings(settings)
    if not 0 < settings.resize <= settings.min_side:
        stop(f"--resize {settings.resize} must lie between 1 and --min-side {settings.min_side}: enlarged pictures lack the detail Sec. 5.1 asks for")
    if settings.compare:
        return compare(settings)
    root, began, units = Path(settings.run, "data"), time.time(), list_units(settings)
    if (kept := root / "settings.json").exists():
        check_settings(json.loads(kept.read_text()), asdict(settings), {"run", "workers", "count", "compare", "dry_run", "crop"}, root)
    write_aside(kept, lambda f: f.write(json.dumps(asdict(settings), indent=2).encode()))
    files = {key: root / key / "metadata.jsonl" for key in ("train", "val")} | {"rejected": root / "rejected.jsonl"}
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    done = {line["source"] for path in files.values() for line in read_jsonl(path, mend=True)}
    for stale in root.rglob(".*.tmp"):                      # of a run that was killed while it wrote
        stale.unlink()
    workers = os.cpu_count() if settings.workers < 0 else settings.workers
    loader = DataLoader(Source(units, settings, done), batch_size=None, num_workers=workers, prefetch_factor=16 if workers else None)
    total = None if any(str(u).endswith(".tar") for u in units) else max(0, len(units) - len(done))
    counts, reasons = collections.Counter(), collections.Counter()
    for record in (bar := tqdm(loader, total=total, unit="picture", desc="01_data", **BAR)):
        key = record.pop("split", "rejected")
        with open(files[key], "a", encoding="utf-8") as f:  # one line at a time: after a crash at most the last is lost
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
        counts[key] += 1
        if key == "rejected":
            reasons[re.sub(r"\d+(x\d+|\.\d+)?", "N", record["reason"])[:70]] += 1
        bar.set_postfix(counts, refresh=False)
    there = {split: sum(1 for _ in read_jsonl(files[split])) for split in ("train", "val")}
    log(settings.run, stage="01_data", **counts, seconds=round(time.time() - began, 2), pictures=there)
    print(f"{root}: {there['train']} training and {there['val']} validation pictures ({len(done)} done before, {counts['rejected']} rejected now)")
    for reason, number in reasons.most_common(10):
        print(f"  rejected {number:6d}: {reason}")
    if empty := [split for split, number in there.items() if not number]:
        stop(f"{root}/{empty[0]} is empty: rejected.jsonl has reasons; give more pictures, or another --val-share with a new --run")
    return there


# ---------------------------------------------------------------- plumbing that all stages share

BAR = dict(dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 20)   # a log file wants fewer lines than a terminal


def stop(sentence):
    """Bad input: one sentence on stderr, exit code 2, no traceback."""
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def parse_cli(Settings, presets, doc, argv=None):
    """A Settings from the command line: default < preset < flag. A flag for each field, its comment as the help text."""
    types, notes = typing.get_type_hints(Settings), {}
    for cls in reversed(Settings.__mro__[:-1]):
        notes |= dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--preset", choices=list(presets), default="demo", help="named sets of values [demo]")
    for f in fields(Settings):
        kind, options = types[f.name], {"default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            options |= dict(type=typing.get_args(kind)[0], nargs="*")
        elif typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        else:
            options["type"] = kind
        parser.add_argument("--" + f.name.replace("_", "-"), help=f"{notes.get(f.name, '')} [{f.default}]".replace("%", "%%"), **options)
    given = vars(parser.parse_args(argv))
    preset = given.pop("preset")
    values = {"run": f"runs/{preset}"} | presets[preset] | given
    return Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def print_settings(settings, **more):
    """What --dry-run prints: the resolved settings, and parameter counts where there is a model."""
    print(json.dumps(asdict(settings) | more, indent=2))


def check_settings(stored, now, free, what):
    """Stop where `now` differs from `stored` in anything that shapes the result; `free` names what may change."""
    stored, now = (json.loads(json.dumps(v)) for v in (stored, now))        # tuples and lists alike
    for key in sorted(now.keys() - free):
        if now[key] != (old := stored.get(key, "unknown")):
            stop(f"{what} was made with --{key.replace('_', '-')} {old}, now it is {now[key]}: keep the old value, or take another --run")


def write_aside(path, write):
    """Write to a temporary file beside `path`, then rename: a reader never sees half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(aside, "wb") as f:
            write(f)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_jsonl(path, mend=False):
    """Yield the objects of a .jsonl file; a last line cut off by a crash is passed over, and with `mend` removed."""
    with open(path, "rb") as f:
        for line in f:
            if not line.endswith(b"\n"):
                if mend:
                    os.truncate(path, f.tell() - len(line))
                return
            yield json.loads(line)


def generator(*key):
    """Random numbers that are a function of `key`. (Of a seed given to manual_seed, PyTorch's CPU generator looks at 32 bits.)"""
    return torch.Generator().manual_seed(random.Random("/".join(map(str, key))).getrandbits(32))


def log(run, **entry):
    """Append one line to RUN/log.jsonl."""
    with open(Path(run, "log.jsonl"), "a", encoding="utf-8") as f:
        f.write(json.dumps(entry) + "\n")


def command_line(main, Settings, presets, doc):
    """The command line of every script. Ctrl-C ends with a sentence."""
    try:
        main(parse_cli(Settings, presets, doc))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    command_line(main, Settings, PRESETS, __doc__)
