"""Stage 1 of VIVAT: from any pictures to a training set (Sec. 5.1).

Reads   --images DIR: a folder tree, an img2dataset folder or its .tar shards;
        or --images synthetic (the default): scenes drawn here, each with an exact caption.
Writes  RUN/data/train and RUN/data/val (lossless WebP, metadata.jsonl), RUN/data/rejected.jsonl;
        with --compare instead RUN/compare.png and a table: direct crop, nearest, bicubic.
Paper   Sec. 5.1 (data selection, resize, then crop).

    python 01_data.py --preset small --images ~/Pictures --run runs/mine

Run it again and it does only what is missing.
"""
import argparse, hashlib, inspect, io, itertools, json, math, os, random, re, sys, tarfile, time, typing, warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torchvision.io
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import InterpolationMode
from tqdm import tqdm


@dataclass(frozen=True)
class Settings:
    run: str = ""                 # folder that all stages share [runs/PRESET]
    images: str = "synthetic"     # a folder of pictures or .tar shards, or "synthetic"; Sec. 5.1: LAION Aesthetic HighRes
    min_side: int = 720           # Sec. 5.1: HD sources; a shorter side below this is rejected
    min_score: float = 4.5        # Sec. 5.1: keep aesthetic scores > 4.5; a picture without a score is kept
    resize: int = 480             # Sec. 5.1: shorter side after the bicubic resize
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
        self.names = picture_names(folder)

    def __getitem__(self, n):
        rng = random.Random(f"{self.seed}/{n}")
        # not in the paper: pictures are drawn with replacement, so any step can be made again without an epoch's order
        x = read_picture(self.folder / str(self.names[rng.randrange(len(self.names))]), self.crop)  # (3, h, w)
        top, left = (rng.randint(0, side - self.crop) for side in x.shape[1:])
        x = x[:, top:top + self.crop, left:left + self.crop]                                         # (3, crop, crop)
        return x.flip(-1) if rng.random() < 0.5 else x.contiguous()   # not in the paper: random crop and flip


def centre_crop(x, crop):
    """The middle crop x crop of (..., h, w): how pictures are cropped wherever nothing is trained."""
    top, left = (x.shape[-2] - crop) // 2, (x.shape[-1] - crop) // 2
    return x[..., top:top + crop, left:left + crop]


def read_picture(path, at_least=1):
    """A prepared picture as uint8 (3, h, w)."""
    x = torchvision.io.decode_image(str(path), mode="RGB")
    if min(x.shape[1:]) < at_least:
        stop(f"{path} is {x.shape[2]}x{x.shape[1]}: smaller than the crop of {at_least}; run 01_data.py with a larger --resize")
    return x


def picture_names(folder):
    """File names in metadata.jsonl, as a numpy array: workers share one copy, however many there are."""
    import numpy as np
    path = Path(folder) / "metadata.jsonl"
    if not path.is_file() or not path.stat().st_size:
        stop(f"{path} is missing or empty: run 01_data.py first (a larger --val-share puts more pictures into data/val)")
    return np.array(sorted(line["file_name"] for line in read_jsonl(path)))


# ---------------------------------------------------------------- one picture in, one picture out

def prepare(item, settings):
    """Filter, resize and store one picture; return its line for metadata.jsonl, or for rejected.jsonl if it has a "reason"."""
    record = {"source": item["name"].encode("utf-8", "replace").decode()}
    try:
        caption, score = describe(item)
        if score is not None and score <= settings.min_score:
            raise ValueError(f"aesthetic score {score:g} is not above {settings.min_score:g}")
        x, (width, height) = to_rgb(item, settings)
        x = resize_shorter(x, settings.resize)                                        # (3, h, w), uint8
        key = hashlib.sha256(os.fsencode(item["name"])).hexdigest()
        # The split looks at the bare name alone, so it never changes as a folder grows or moves.
        share = int(hashlib.sha256(os.fsencode(os.path.basename(item["name"]))).hexdigest()[:8], 16) / 2 ** 32
        split = "val" if share < settings.val_share else "train"
        stem = re.sub(r"[^\w-]", "_", Path(record["source"]).stem)[:40]
        name = f"{key[:2]}/{stem}-{key[2:10]}.webp"                                     # 256 folders: millions of files stay listable
        path = Path(settings.run, "data", split, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Lossless WebP: 14 ms to write and 6 ms to read at 480p, where PNG level 1 takes 22 and 9 and a third more space.
        write_aside(path, lambda f: F.to_pil_image(x).save(f, "WEBP", lossless=True, quality=0, method=0))
        record |= {"split": split, "file_name": name, "text": caption, "score": score, "original_width": width, "original_height": height}
    except Exception as error:                             # one bad file among a million never stops the run
        record["reason"] = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
    return record


def to_rgb(item, settings):
    """Decode to uint8 RGB (3, h, w), upright, alpha over white. Raises on what is broken, tiny or enormous."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if callable(item.get("draw")):
            return F.pil_to_tensor(item["draw"]()), (1280, 720)
        blob = item["read"]()
        im = Image.open(io.BytesIO(blob))                  # reads the header only
        if im.width * im.height > settings.max_pixels:
            raise ValueError(f"{im.width}x{im.height} is more than {settings.max_pixels} pixels")
        if min(im.size) < settings.min_side:
            raise ValueError(f"shorter side of {im.width}x{im.height} is below {settings.min_side}")
        size = im.size
        if im.format == "JPEG" and im.mode in ("RGB", "L"):   # torchvision's decoder hands over a tensor without a copy
            blob = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
            return torchvision.io.decode_jpeg(blob, mode="RGB", apply_exif_orientation=True), size
        im = ImageOps.exif_transpose(im)
        if im.mode.startswith("I") or im.mode == "F":         # 16 or 32 bits a pixel; Pillow's own conversion would clip
            import numpy as np
            values = np.asarray(im).astype(np.float32)
            top = next((t for t in (1, 255, 65535) if values.max() <= t), float(values.max())) if im.mode in ("F", "I") else 65535
            im = Image.fromarray((values * (255 / top)).clip(0, 255).round().astype(np.uint8))
        if im.has_transparency_data:
            im = im.convert("RGBA")
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
        return F.pil_to_tensor(im.convert("RGB")), size


def describe(item):
    """Caption and aesthetic score from the .txt and .json that img2dataset leaves beside a picture; (str, float or None)."""
    caption = (item.get("text") or b"").decode("utf-8-sig", "replace").strip()
    try:
        meta = json.loads(item.get("json") or b"{}")
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
    """Prepares the share of the pictures that falls to one DataLoader worker and yields a record for each."""
    def __init__(self, settings, done):
        self.settings, self.done = settings, done
        self.units = list_units(settings)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        k, n = (worker.id, worker.num_workers) if worker else (0, 1)
        for item in read_units(self.units, k, n, self.settings):
            if "reason" in item:
                yield item
            elif item["name"].encode("utf-8", "replace").decode() not in self.done:
                yield prepare(item, self.settings)


def list_units(settings):
    """What there is to do: scene numbers, or paths of pictures and .tar shards."""
    if settings.images == "synthetic":
        return list(range(settings.count))
    root = Path(settings.images).expanduser()
    if not root.is_dir():
        stop(f"--images {settings.images}: no such folder")
    units = [os.path.join(folder, name) for folder, folders, names in os.walk(root, followlinks=False)
             for name in sorted(names) if os.path.splitext(name)[1].lower() in PICTURES | {".tar"}]
    return units or stop(f"--images {settings.images}: no pictures ({', '.join(sorted(PICTURES))}) and no .tar shards in it")


def read_units(units, k, n, settings):
    """Yield worker k of n its items: {"name", "read" or "draw", "text", "json"}, or {"source", "reason"} for a broken shard."""
    tars = [u for u in units if str(u).endswith(".tar")]
    for unit in [u for u in units if not str(u).endswith(".tar")][k::n]:
        if isinstance(unit, int):
            caption, draw = scene(settings.seed, unit)
            yield {"name": f"scene-{unit:06d}", "draw": draw, "text": caption.encode()}
        else:
            path = Path(unit)
            yield {"name": os.path.relpath(unit, Path(settings.images).expanduser()), "read": lambda p=path: read_file(p),
                   **{s: p.read_bytes() for s in ("text", "json") if (p := path.with_suffix({"text": ".txt"}.get(s, ".json"))).is_file()}}
    by_shard = len(tars) >= n                             # with fewer shards than workers, every worker takes each n-th picture
    for path in tars[k::n] if by_shard else tars:
        shard = os.path.relpath(path, Path(settings.images).expanduser())
        try:
            with tarfile.open(path) as tar:
                groups = itertools.groupby((m for m in tar if m.isfile()), key=lambda m: os.path.splitext(m.name)[0])
                for number, (key, members) in enumerate(groups):
                    if by_shard or number % n == k:
                        parts = {os.path.splitext(m.name)[1].lower(): m for m in members}
                        side = {s: tar.extractfile(parts[e]).read() for s, e in (("text", ".txt"), ("json", ".json")) if e in parts}
                        for member in (m for e, m in parts.items() if e in PICTURES):
                            yield {"name": f"{shard}/{member.name}", "read": lambda m=member: tar.extractfile(m).read(), **side}
        except (tarfile.TarError, OSError, EOFError) as error:
            if by_shard or k == 0:
                yield {"source": shard, "reason": f"shard: {type(error).__name__}: {error}"}


def read_file(path):
    """Bytes of a regular file: a pipe named .jpg would never end."""
    if not path.is_file():
        raise ValueError("not a regular file")
    return path.read_bytes()


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
    ramp = lambda turn: Image.linear_gradient("L").rotate(turn).resize((w, h))       # black to white
    im = Image.composite(Image.new("RGB", (w, h), shade(ground, 0.85)), Image.new("RGB", (w, h), shade(ground, 1.1)), ramp(rng.choice((0, 90, 180, 270))))
    marks, step = Image.new("L", (w, h)), rng.randint(70, 110)
    d = ImageDraw.Draw(marks)
    for x in range(0, w, step) if pattern != "plain" else ():
        if pattern == "striped":
            d.rectangle((x, 0, x + step // 2, h), fill=255)
        for y in range(0, h, step) if pattern != "striped" else ():
            if pattern == "dotted":
                d.ellipse((x, y, x + step // 2, y + step // 2), fill=255)
            elif (x // step + y // step) % 2:
                d.rectangle((x, y, x + step - 1, y + step - 1), fill=255)
    im.paste(shade(ground, 0.55), mask=marks)

    r, cx, cy, turn = rng.randint(130, 200), w // 2 + rng.randint(-110, 110), h // 2 + rng.randint(-90, 90), rng.uniform(-0.25, 0.25)
    corners = {"square": 4, "triangle": 3, "star": 10}.get(shape, 90)
    points = []
    for i in range(corners):
        angle = turn - math.pi / 2 + (2 * math.pi * i + (math.pi if corners == 4 else 0)) / corners
        reach = r * (0.42 if shape == "star" and i % 2 else 1.15 if corners < 90 else 1)
        points.append((cx + reach * math.cos(angle), cy + reach * math.sin(angle)))
    mask = Image.new("L", (w, h))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    im.paste(Image.composite(Image.new("RGB", (w, h), shade(color, 0.8)), Image.new("RGB", (w, h), shade(color, 1.15)), ramp(rng.choice((0, 90)))), mask=mask)
    ImageDraw.Draw(im).line(points + points[:2], fill=shade(color, 0.5), width=5, joint="curve")
    if word:
        ImageDraw.Draw(im).text((w // 2 + rng.randint(-250, 60), rng.choice((20, h - 80))), word, fill=rng.choice(("white", "black")),
                                font=ImageFont.load_default(rng.randint(34, 52)))
    grain = Image.frombytes("L", (w // 2, h // 2), rng.randbytes(w * h // 4)).resize((w, h)).point(lambda v: 120 + v // 16)
    return ImageChops.add(im, Image.merge("RGB", (grain,) * 3), offset=-128)


# ---------------------------------------------------------------- --compare: what Sec. 5.1 says, in figures

def high_frequency_energy(x):
    """Power of a grey picture (h, w) in 0..255 above half the Nyquist frequency, in squared grey levels a pixel (Hann window)."""
    h, w = x.shape
    window = torch.hann_window(h)[:, None] * torch.hann_window(w)
    power = torch.fft.fft2((x - x.mean()) * window).abs().square() / (h * w * window.square().sum())
    radius = (torch.fft.fftfreq(h)[:, None].square() + torch.fft.fftfreq(w).square()).sqrt()
    return power[radius > 0.25].sum().item()


def compare(settings):
    """Print and draw the three ways to a crop; returns {way: (energy, false detail in percent)}."""
    nearest, bicubic = InterpolationMode.NEAREST, InterpolationMode.BICUBIC
    ways = {"direct crop": lambda x: x, "nearest, crop": lambda x: resize_shorter(x, settings.resize, nearest),
            "bicubic, crop": lambda x: resize_shorter(x, settings.resize, bicubic)}
    rows, tiles = {way: [] for way in ways}, []
    units = list_units(settings)
    for item in read_units(units[:: max(1, len(units) // 16)], 0, 1, settings):
        try:
            full, _ = to_rgb(item, settings)
        except Exception:                                 # the real run lists what is broken; here it is only passed over
            continue
        for way, resize in ways.items():
            small = resize(full)
            energy = high_frequency_energy(centre_crop(F.rgb_to_grayscale(small)[0].float(), settings.crop))
            # An alias is a frequency the small picture shows and the large one does not have: it stays as error
            # in what both must share, here everything below a quarter of the small picture's Nyquist frequency.
            coarse = lambda x: resize_shorter(x, settings.resize // 4).float()
            alias = (coarse(small) - coarse(full)).square().mean().sqrt().item()
            rows[way].append((energy, alias))
            tiles.append(resize_shorter(centre_crop(small, settings.crop), 240, nearest))
        if len(tiles) == 16 * len(ways):
            break
    if not tiles:
        stop(f"--images {settings.images}: no picture with a shorter side of {settings.min_side} px or more could be read")
    print(f"Sec. 5.1 on {len(tiles) // 3} pictures, {settings.crop} px crops (median)\n{'':16}{'energy above Nyquist/2':>24}{'aliasing, grey levels':>24}")
    result = {way: [torch.tensor(v).median().item() for v in zip(*r)] for way, r in rows.items()}
    for way, (energy, alias) in result.items():
        print(f"{way:16}{energy:24.2f}{alias:24.2f}")
    sheet = contact_sheet(tiles[:12], 3, titles=list(ways))
    write_aside(Path(settings.run, "compare.png"), lambda f: sheet.save(f, "PNG"))
    print(f"wrote {settings.run}/compare.png")
    return result


def contact_sheet(tiles, columns, titles=(), rows=()):
    """Pillow picture of uint8 tensors (3, h, w) in rows of `columns`, with a title over each column and a label left of each row."""
    h, w = tiles[0].shape[1:]
    left, top = (150 if rows else 0), (22 if titles else 0)
    sheet = Image.new("RGB", (left + columns * (w + 4), top + -(-len(tiles) // columns) * (h + 4)), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(F.to_pil_image(tile.cpu()), (left + i % columns * (w + 4), top + i // columns * (h + 4)))
    d, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, title in enumerate(titles):
        d.text((left + i * (w + 4) + 2, 3), title, "black", font)
    for i, label in enumerate(rows):
        d.text((4, top + i * (h + 4) + 4), label, "black", font)
    return sheet


# ---------------------------------------------------------------- main

def main(settings):
    if settings.dry_run:
        return print_settings(settings)
    if not 0 < settings.resize <= settings.min_side:
        stop(f"--resize {settings.resize} must lie between 1 and --min-side {settings.min_side}: enlarged pictures lack the detail Sec. 5.1 asks for")
    if settings.compare:
        return compare(settings)
    root, start = Path(settings.run, "data"), time.time()
    keep_settings(root / "settings.json", settings, free={"run", "workers", "count", "compare", "dry_run", "crop"})
    files = {split: root / split / "metadata.jsonl" for split in ("train", "val")} | {"rejected": root / "rejected.jsonl"}
    done = {line["source"] for path in files.values() if path.exists() for line in read_jsonl(path, mend=True)}
    source = Source(settings, done)
    workers = os.cpu_count() if settings.workers < 0 else settings.workers
    loader = DataLoader(source, batch_size=None, num_workers=workers, prefetch_factor=16 if workers else None)
    counts, reasons = {"train": 0, "val": 0, "rejected": 0}, {}
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    handles = {key: open(path, "a", encoding="utf-8") for key, path in files.items()}
    total = None if any(str(u).endswith(".tar") for u in source.units) else max(0, len(source.units) - len(done))
    bar = tqdm(loader, total=total, unit="picture", desc="01_data", **BAR)
    for record in bar:
        key = record.pop("split", "rejected")
        handles[key].write(json.dumps(record, ensure_ascii=False) + "\n")
        handles[key].flush()
        counts[key] += 1
        bar.set_postfix(counts, refresh=False)
        if key == "rejected":
            kind = re.sub(r"[\d.x]+", "N", record["reason"])[:60]
            reasons[kind] = reasons.get(kind, 0) + 1
    for handle in handles.values():
        handle.close()
    there = {split: sum(1 for _ in read_jsonl(files[split])) for split in ("train", "val")}
    log(settings.run, stage="01_data", **counts, seconds=round(time.time() - start, 2), pictures=there)
    print(f"{root}: {there['train']} training and {there['val']} validation pictures ({len(done)} were done before; {counts['rejected']} rejected now)")
    for kind, number in sorted(reasons.items(), key=lambda r: -r[1])[:10]:
        print(f"  rejected {number:6d}: {kind}")
    if not there["train"] or not there["val"]:
        stop(f"{root} has no {'training' if not there['train'] else 'validation'} pictures: "
             "see rejected.jsonl for reasons, give more pictures, or another --val-share with a new --run")
    return there


# ---------------------------------------------------------------- plumbing that all stages share

BAR = dict(dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 20)   # a log file wants fewer lines than a terminal


def stop(sentence):
    """Bad input: one sentence on stderr, exit code 2, no traceback."""
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def parse_cli(Settings, presets, doc, argv=None):
    """A Settings from the command line: default < preset < flag. A flag for each field, its comment as the help text."""
    types = typing.get_type_hints(Settings)
    notes = {}
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


def keep_settings(path, settings, free):
    """Store the settings a folder is made with; on a later run a flag that contradicts them is an error that names it."""
    if path.exists():
        check_settings(json.loads(path.read_text()), asdict(settings), free, path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda f: f.write(json.dumps(asdict(settings), indent=2).encode()))


def check_settings(stored, now, free, what):
    """Stop where `now` differs from `stored` in anything that shapes the result; `free` names what may change."""
    for key in now.keys() - set(free):
        if key in stored and (list(now[key]) if isinstance(now[key], tuple) else now[key]) != (list(stored[key]) if isinstance(stored[key], tuple) else stored[key]):
            stop(f"{what} was made with --{key.replace('_', '-')} {stored[key]}, now it is {now[key]}: keep the old value, or take another --run")


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


def log(run, **entry):
    """Append one line to RUN/log.jsonl."""
    with open(Path(run, "log.jsonl"), "a", encoding="utf-8") as f:
        f.write(json.dumps(entry) + "\n")


def start(main, Settings, presets, doc):
    """The command line of every script. Ctrl-C ends with a sentence."""
    try:
        main(parse_cli(Settings, presets, doc))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    start(main, Settings, PRESETS, __doc__)
