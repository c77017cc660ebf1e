"""Stage 1 of VIVAT: from any pictures to a training set.

Reads   --images DIR: a folder tree, an img2dataset folder or its .tar shards;
        or --images synthetic (the default): scenes drawn here, each with an exact caption.
Writes  RUN/data/train and RUN/data/val (lossless WebP, metadata.jsonl, names.npy, index.json),
        RUN/data/rejected.jsonl.
Paper   Sec. 5.1 (data selection, resize, then crop).

    python 01_data.py --preset small --images ~/Pictures --run runs/mine

Run it again and it does only what is missing. The last third of this file is the shelf of all
stages: command line, checkpoints, devices, logs.
"""
import argparse
import collections
import contextlib
import copy
import datetime
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import tarfile
import textwrap
import time
import typing
import warnings
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageChops, ImageCms, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision.transforms import InterpolationMode
from tqdm import tqdm


# ---------------- settings

@dataclass(frozen=True)
class Run:
    """What belongs to a run and not to the method. Every stage has these flags."""
    run: str = ""          # folder that all stages share [runs/PRESET]
    seed: int = 0          # all that is random follows from it
    device: str = "auto"   # cuda, mps or cpu; auto: the first of them that is there
    workers: int = -1      # to read pictures with; -1: 8 beside a GPU, else 0; in 01 one per core
    dry_run: bool = False  # print the settings (and parameter counts) as JSON and stop


@dataclass(frozen=True)
class TrainingRun(Run):
    """The same for the stages that train."""
    accumulate: int = 1       # parts that a process cuts its share of a batch into, for memory
    compile: bool = False     # torch.compile the network
    log_every: int = 100      # steps between two lines of the log
    val_every: int = 2_000    # steps between two validations
    save_every: int = 2_000   # steps between two checkpoints


@dataclass(frozen=True)
class Settings(Run):
    images: str = "synthetic"  # a folder, pictures or .tar shards; Sec. 5.1: LAION Aesthetic
    # not in the paper: "HD" read as 720 lines, and that a picture without a score is kept
    min_side: int = 720        # Sec. 5.1: HD sources; a shorter side below this is rejected
    min_score: float = 4.5     # Sec. 5.1: keep aesthetic scores above this
    resize: int = 480          # Sec. 5.1: shorter side after the bicubic resize
    interpolation: typing.Literal["bicubic", "nearest"] = "bicubic"  # Sec. 5.1 warns of nearest
    # at least five pictures (at most a quarter) validate, where a folder is small
    val_share: float = 0.01    # not in the paper: share of pictures that validate; 1% is enough
    # a scene's height is --min-side
    count: int = 10_000        # not in the paper: scenes to draw when --images is "synthetic"
    max_pixels: int = 10**8    # not in the paper: larger is rejected, as a decompression bomb


# The paper's 480 and 240 divided by about four: a crop still shows half of the shorter side.
CPU = dict(min_side=360, resize=128)
PRESETS = {
    "paper": {},
    "small": dict(count=20_000),
    "laptop": CPU | dict(count=10_000),
    "demo": CPU | dict(count=2200, val_share=0.03),
}
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"}
# The first of these keys that holds a number counts. A bare "score" may be a similarity of
# picture and text, so it does not.
SCORES = ("aesthetic_score", "aesthetic", "aesthetics", "aesthetics_score",
          "aesthetic_score_laion_v2")


# ---------------- resize, then crop (Sec. 5.1)

def resize_shorter(x, side, how=InterpolationMode.BICUBIC):
    """A uint8 picture (3, h, w) with a shorter side of `side`; antialiased unless nearest."""
    h, w = x.shape[-2:]
    size = [round(h * side / min(h, w)), round(w * side / min(h, w))]
    return TF.resize(x, size, interpolation=how)


class Crops(Dataset):
    """Random crops of RUN/data/train, uint8 (3, crop, crop), mirrored half of the time.

    Crop n is a function of (stage, seed, n) and the data set alone, so no step depends on workers,
    processes, or where a run was interrupted.
    """
    def __init__(self, folder, crop, stage, seed):
        self.folder = Path(folder)
        self.crop = crop
        self.key = f"{stage}/{seed}"
        picture_names(folder, crop)  # stops early where pictures are missing or too small

    def __getitem__(self, n):
        rng = random.Random(f"{self.key}/{n}")
        # not in the paper: drawn with replacement, so that any step can be made again
        x = read_picture(self.folder, rng.choice(read_names(self.folder)))  # (3, h, w)
        top = rng.randint(0, x.shape[1] - self.crop)
        left = rng.randint(0, x.shape[2] - self.crop)
        x = x[:, top:top + self.crop, left:left + self.crop]  # (3, crop, crop)
        # not in the paper: where the crop lies, and mirroring; both are random
        return x.flip(-1) if rng.random() < 0.5 else x


def center_crop(x, crop):
    """The middle crop x crop of (..., h, w): all but the VAE's training pictures."""
    top = (x.shape[-2] - crop) // 2
    left = (x.shape[-1] - crop) // 2
    return x[..., top:top + crop, left:left + crop]


def read_picture(folder, name):
    """A prepared picture as uint8 (3, h, w)."""
    return TF.pil_to_tensor(Image.open(Path(folder, os.fsdecode(name))).convert("RGB"))


@functools.lru_cache
def read_names(folder):
    """names.npy of RUN/data/train or val, memory-mapped: processes share what is read of it."""
    return np.load(Path(folder, "names.npy"), mmap_mode="r")


def picture_names(folder, crop):
    """File names (bytes) in RUN/data/train or val; stops where they are missing or too small."""
    if not Path(folder, "index.json").is_file():
        stop(f"{folder} is not finished: run 01_data.py first")
    resize = json.loads(Path(folder).with_name("settings.json").read_text())["resize"]
    if resize < crop:
        stop(f"a side of {crop} is larger than the pictures in {folder}, whose shorter side is "
             f"{resize}: run 01_data.py with a larger --resize first")
    read_names.cache_clear()  # 01 may have written the file anew since
    return read_names(Path(folder))


def val_crops(run, crop, count):
    """The centers of the first `count` validation pictures, uint8 (n, 3, crop, crop)."""
    folder = Path(run, "data", "val")
    names = picture_names(folder, crop)[:count]
    return torch.stack([center_crop(read_picture(folder, name), crop) for name in names])


# ---------------- one picture in, one picture out

def prepare(name, parts, s):
    """Filter, resize and store one picture.

    parts: what belongs to the picture, as functions that read it, {"picture": read} and perhaps
    ".txt" and ".json"; or the Exception that reading a shard raised. Returns a line for
    metadata.jsonl with the key "split", or one for rejected.jsonl with the key "reason". A picture
    that could not be read is not tried again.
    """
    record = {"source": printable(name)}
    try:
        if isinstance(parts, Exception):
            raise parts
        caption, score = describe(parts)
        if score is not None and score <= s.min_score:
            raise ValueError(f"aesthetic score {score:g} is not above {s.min_score:g}")
        x, size = to_rgb(parts["picture"], s.min_side, s.max_pixels)
        x = resize_shorter(x, s.resize, InterpolationMode(s.interpolation))
        # The split looks at the bare name alone: it never changes as a folder grows.
        split = "val" if name_number(name) < s.val_share else "train"
        file_name = stored_name(name)
        file = io.BytesIO()
        # Written in half the time of a PNG, and smaller.
        TF.to_pil_image(x).save(file, format="WEBP", lossless=True, quality=0, method=0)
        record |= dict(split=split, file_name=file_name, text=caption, score=score,
                       original_width=size[0], original_height=size[1])
    except Exception as error:  # one bad file of a million stops nothing
        text = re.sub(r" <_io.*>", "", str(error))  # addresses in memory help nobody
        known = type(error) is ValueError
        record["reason"] = text if known else f"{type(error).__name__}: {text}"
        return record
    # A full disk is no fault of the picture: it ends the run, and the next one tries again.
    write_aside(Path(s.run, "data", split, file_name), lambda f: f.write(file.getvalue()))
    return record


def printable(name):
    """A file name as text that JSON can hold, whatever bytes are in it."""
    return os.fsencode(name).decode("utf-8", "replace")


def name_hash(name):
    return hashlib.sha256(os.fsencode(name)).hexdigest()


def name_number(name):
    """A number in [0, 1) that follows from a file's bare name."""
    return int(name_hash(os.path.basename(name))[:8], 16) / 2 ** 32


def stored_name(name):
    """Where a picture is stored: in one of 256 folders, so that millions can still be listed."""
    key = name_hash(name)
    stem = re.sub(r"[^\w-]", "_", Path(printable(name)).stem, flags=re.ASCII)[:40]
    return f"{key[:2]}/{stem}-{key[2:10]}.webp"


def to_rgb(read, min_side, max_pixels):
    """uint8 sRGB (3, h, w), upright, transparency over white; and the file's own (width, height).

    read: a function that gives the file's bytes, or a PIL picture. Raises ValueError or Pillow's
    errors on what is broken, too small or enormous.
    """
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own guard; --max-pixels is ours
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        im = read()
        if isinstance(im, bytes):
            im = Image.open(io.BytesIO(im))  # reads the header only
        w, h = im.size
        if w * h > max_pixels:
            raise ValueError(f"{w}x{h} is more than {max_pixels} pixels")
        if min(w, h) < min_side:
            raise ValueError(f"shorter side of {w}x{h} is below {min_side}")
        profile = im.info.get("icc_profile")
        # In place and with no second convert: copies cost as much as decoding.
        ImageOps.exif_transpose(im, in_place=True)
        if im.mode.startswith("I") or im.mode == "F":
            im = eight_bits(im)
        elif profile:
            im = to_srgb(im, profile)
        if im.has_transparency_data:
            im = im.convert("RGBA")
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
        if im.mode != "RGB":
            im = im.convert("RGB")
        return TF.pil_to_tensor(im), (w, h)


def to_srgb(im, profile):
    """From the colors of the file's own profile (phones take Display P3) to sRGB."""
    if im.mode == "P":
        im = im.convert("RGBA" if im.has_transparency_data else "RGB")
    mode = "RGBA" if im.mode == "RGBA" else "RGB"
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(im, own, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError):  # a broken profile, or one of another mode
        return im


def eight_bits(im):
    """A picture of 16 or 32 bits per value, which Pillow's own conversion would clip."""
    values = np.nan_to_num(np.asarray(im).astype(np.float32))
    white = 65535
    if not im.mode.startswith("I;16"):
        # These modes do not say what white is: the smallest usual one that no value exceeds.
        largest = values.max()
        white = min((top for top in (1, 255, 65535) if largest <= top), default=largest)
    return Image.fromarray((values * (255 / white)).clip(0, 255).round().astype(np.uint8))


def describe(parts):
    """(caption or "", aesthetic score or None) from img2dataset's .txt and .json beside a picture.
    """
    meta = {}
    with contextlib.suppress(KeyError, ValueError, AttributeError):  # absent, broken, no dict
        meta = {key.lower(): value for key, value in json.loads(parts[".json"]()).items()}
    caption = str(meta.get("caption") or meta.get("text") or "")
    if ".txt" in parts:
        caption = parts[".txt"]().decode("utf-8-sig", "replace").strip() or caption
    for key in SCORES:
        with contextlib.suppress(TypeError, ValueError):
            score = float(meta.get(key, math.nan))
            if math.isfinite(score):
                return caption, score
    return caption, None


# ---------------- where pictures come from
# A unit is what one worker takes as a whole: a scene's number, a picture's path, a shard's path.

class Source(IterableDataset):
    """The records of all units, prepared; DataLoader workers share the units out."""
    def __init__(self, units, s, done):
        self.units = units
        self.s = s
        self.done = done

    def __iter__(self):
        worker = get_worker_info()
        units = self.units[worker.id::worker.num_workers] if worker else self.units
        for name, parts in pictures(units, self.s.images, self.s.seed, self.s.min_side):
            if printable(name) not in self.done:
                yield prepare(name, parts, self.s)


def find_units(images, own=None):
    """Paths of pictures and .tar shards under the folder `images`, without what this run itself
    wrote, should its folder `own` lie there."""
    root = Path(images).expanduser()
    if not root.is_dir():
        stop(f"--images {images}: no such folder")
    units = []
    for folder, _, names in os.walk(root):
        here = Path(folder).resolve()
        if own and (here == own.resolve() or here.is_relative_to(own.resolve() / "data")):
            continue
        units += [os.path.join(folder, name) for name in names
                  if suffix(name) in PICTURES | {".tar"}]
    if not units:
        stop(f"--images {images}: no pictures ({' '.join(sorted(PICTURES))}) and no .tar shards")
    return sorted(units)


def pictures(units, images, seed=0, height=Settings.min_side):
    """Yield (name, parts) of each picture in some units; see prepare for what parts are."""
    for unit in units:
        if isinstance(unit, int):
            caption, draw = scene(seed, unit, height)
            yield scene_name(unit), {"picture": draw, ".txt": caption.encode}
            continue
        name = os.path.relpath(unit, Path(images).expanduser())
        path = Path(unit)
        if not path.is_file():
            yield name, ValueError("not a regular file")  # a pipe named .jpg would never end
        elif suffix(unit) == ".tar":
            yield from shard(name, path)
        else:
            beside = [path.with_suffix(end) for end in (".txt", ".json")]
            parts = {file.suffix: file.read_bytes for file in beside if file.is_file()}
            yield name, parts | {"picture": path.read_bytes}


def shard(name, path):
    """(name, parts) of each picture in a .tar, where files of one stem follow each other."""
    try:
        with tarfile.open(path) as tar:
            files = (member for member in tar if member.isfile())
            for _, members in itertools.groupby(files, key=stem):
                members = {suffix(member.name): member for member in members}
                beside = {end: functools.partial(read_member, tar, member)
                          for end, member in members.items()}
                for end in sorted(members.keys() & PICTURES):
                    parts = beside | {"picture": beside[end]}
                    yield f"{name}/{members[end].name}", parts
    except (tarfile.TarError, OSError, EOFError) as error:
        yield name, error


def read_member(tar, member):
    return tar.extractfile(member).read()


def stem(member):
    return os.path.splitext(member.name)[0]


def suffix(name):
    return os.path.splitext(name)[1].lower()


def scene_name(unit):
    return f"scene-{unit:06d}"


# ---------------- main

def main(s):
    if s.dry_run:
        return print_settings(s)
    if not 0 < s.resize <= s.min_side:
        stop(f"--resize {s.resize} must lie between 1 and --min-side {s.min_side}: enlarged "
             "pictures lack the detail that Sec. 5.1 asks for")
    root = Path(s.run, "data")
    began = time.time()
    units = list(range(s.count))
    if s.images != "synthetic":
        units = find_units(s.images, own=Path(s.run))
    s = replace(s, val_share=fix_settings(root, units, s))

    files = {split: root / split / "metadata.jsonl" for split in ("train", "val")}
    files["rejected"] = root / "rejected.jsonl"
    done = set()
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        done |= {line["source"] for line in read_jsonl(path, mend=True)}
    for split in ("train", "val"):  # until it is there again, later stages refuse the folder
        (root / split / "index.json").unlink(missing_ok=True)
    for stale in root.rglob(".*.tmp"):  # from a run that was killed
        stale.unlink()
    workers = os.cpu_count() if s.workers < 0 else s.workers
    loader = DataLoader(Source(units, s, done), batch_size=None, num_workers=workers,
                        prefetch_factor=16 if workers else None)
    shards = any(str(unit).endswith(".tar") for unit in units)
    total = None if shards else max(0, len(units) - len(done))
    counts = collections.Counter()
    reasons = collections.Counter()
    for record in tqdm(loader, total=total, unit="picture", desc="01_data", **BAR):
        key = record.pop("split", "rejected")
        # A crash costs one line at most; a caption may hold half a character, which no file can.
        with open(files[key], "a", encoding="utf-8", errors="replace") as f:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
        counts[key] += 1
        if key == "rejected":
            # Reasons that differ only in their numbers are counted together.
            reasons[re.sub(r"\d+(x\d+|\.\d+)?", "N", record["reason"])[:70]] += 1

    there = {split: write_index(root / split) for split in ("train", "val")}
    log(s.run, stage="01_data", **counts, seconds=round(time.time() - began, 2), pictures=there)
    print(f"{root}: {there['train']} training and {there['val']} validation pictures "
          f"({len(done)} done before, {counts['rejected']} rejected now)")
    for reason, number in reasons.most_common(10):
        print(f"  rejected {number:6d}: {reason}")
    for split, number in there.items():
        if not number:
            # Later stages refuse a folder without it.
            (root / split / "index.json").unlink()
            stop(f"{root}/{split} is empty: rejected.jsonl has reasons; give more pictures, "
                 "or another --val-share with a new --run")
    return there


def fix_settings(root, units, s):
    """Keep the settings in RUN/data/settings.json and refuse others later. Returns val_share.

    In a small folder val_share may amount to no picture. Then it is raised, once, so that five
    pictures (at most a quarter) validate; the split still follows from names alone.
    """
    kept = root / "settings.json"
    share = s.val_share
    if kept.exists():
        stored = json.loads(kept.read_text())
        check_settings(stored, asdict(s), {"run", "device", "workers", "count", "dry_run"}, root)
        share = stored["share"]
    elif not any(str(unit).endswith(".tar") for unit in units):
        names = (scene_name(unit) if isinstance(unit, int) else unit for unit in units)
        handful = min(5, len(units) // 4)
        numbers = sorted(map(name_number, names))
        share = max(share, numbers[handful]) if handful else share
    write_text(kept, json.dumps(asdict(s) | {"share": share}, indent=2))
    return share


def write_index(folder):
    """Sort metadata.jsonl by file name; write names.npy and, last, index.json with its hash.
    Returns the number of pictures.

    So the order of workers does not matter, later stages need not parse 100 million lines for the
    names, and a changed data set has another index.json.
    """
    path = folder / "metadata.jsonl"
    kind = [("name", "S64"), ("start", np.int64), ("end", np.int64)]
    table = np.fromiter(line_positions(path), dtype=kind)
    table = table[np.argsort(table["name"], kind="stable")]

    def write_sorted(f):
        with open(path, "rb") as lines:
            for _, start, end in table:
                lines.seek(start)
                f.write(lines.read(end - start))

    write_aside(path, write_sorted)
    write_aside(folder / "names.npy", lambda f: np.save(f, table["name"]))
    index = {"pictures": len(table), "sha256": parent(path)["sha256"]}
    write_text(folder / "index.json", json.dumps(index))
    return len(table)


def line_positions(path):
    """(file name, first byte, last byte + 1) of each line in a metadata.jsonl."""
    start = 0
    with open(path, "rb") as f:
        for line in f:
            yield json.loads(line)["file_name"], start, start + len(line)
            start += len(line)


# ---------------- synthetic scenes: drawn

COLORS = {"red": (220, 45, 40), "yellow": (240, 205, 50), "green": (50, 165, 70),
          "cyan": (60, 195, 215), "blue": (45, 80, 210), "purple": (150, 60, 190)}
SHAPES = ("circle", "square", "triangle", "star")
PATTERNS = ("plain", "striped", "checkered", "dotted")
WORDS = ("harbor", "lantern", "meadow", "pebble", "thistle", "walnut", "copper", "violin",
         "saffron", "glacier", "marble", "orchard")


def scene(seed, index, height=Settings.min_side):
    """Scene number `index`: its exact caption, and a function that draws it as a PIL picture, to be
    called once. All that the caption names lies in the middle square."""
    rng = random.Random(f"scene/{seed}/{index}")
    shape = rng.choice(SHAPES)
    pattern = rng.choice(PATTERNS)
    color, ground = rng.sample(sorted(COLORS), 2)
    word = rng.choice(WORDS) if rng.random() < 0.5 else ""
    caption = f"a {color} {shape} on a {pattern} {ground} background"
    if word:
        caption += f', with the word "{word}"'
    draw = functools.partial(draw_scene, rng, height, shape, color, pattern, ground, word)
    return caption, draw


def told(caption):
    """(color, shape, pattern, ground) of a scene's caption."""
    words = caption.split()
    return words[1], words[2], words[5], words[6]


def draw_scene(rng, height, shape, color, pattern, ground, word):
    size = (height * 16 // 9, height)
    unit = height / 720  # lengths below are of a scene of 1280 x 720
    im = ramp(rng, size, ground, 0.85, 1.1)
    step = round(unit * rng.randint(70, 110))
    im.paste(shade(ground, 0.66), mask=draw_marks(size, pattern, step))
    x = size[0] / 2 + unit * rng.randint(-80, 80)
    y = size[1] / 2 + unit * rng.randint(-50, 50)
    radius = unit * rng.randint(180, 240)
    outline = corners(shape, x, y, radius, turn=rng.uniform(-0.25, 0.25))
    figure = Image.new("L", size)
    ImageDraw.Draw(figure).polygon(outline, fill=255)
    im.paste(ramp(rng, size, color, 0.8, 1.15), mask=figure)
    draw = ImageDraw.Draw(im)
    draw.line(outline + outline[:2], shade(color, 0.5), width=round(5 * unit), joint="curve")
    if word:
        where = (size[0] / 2 + unit * rng.randint(-250, 60), unit * rng.choice((20, 640)))
        fill = rng.choice(("white", "black"))
        draw.text(where, word, fill, ImageFont.load_default(unit * rng.randint(34, 52)))
    # Edges as soft as a lens leaves them, and the grain of a sensor.
    im = im.filter(ImageFilter.GaussianBlur(unit))
    grain = Image.frombytes("L", (640, 360), rng.randbytes(640 * 360)).resize(size)
    grain = grain.point([120 + value // 16 for value in range(256)])
    return ImageChops.add(im, Image.merge("RGB", (grain,) * 3), offset=-128)


def shade(name, brightness):
    return tuple(min(255, round(value * brightness)) for value in COLORS[name])


def ramp(rng, size, name, dark, light):
    """A gradient between two shades of a color, in one of four directions."""
    mask = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize(size)
    first = Image.new("RGB", size, shade(name, dark))
    return Image.composite(first, Image.new("RGB", size, shade(name, light)), mask)


def draw_marks(size, pattern, step):
    """Mask of the ground's darker marks, `step` pixels apart."""
    marks = Image.new("L", size)
    draw = ImageDraw.Draw(marks)
    half = step // 2
    for column, x in enumerate(range(0, size[0], step)):
        for row, y in enumerate(range(0, size[1], step)):
            if pattern == "dotted":
                draw.ellipse((x, y, x + half, y + half), fill=255)
            if pattern == "striped":
                draw.rectangle((x, y, x + half, y + step - 1), fill=255)
            if pattern == "checkered" and (column + row) % 2:
                draw.rectangle((x, y, x + step - 1, y + step - 1), fill=255)
    return marks


def corners(shape, x, y, radius, turn):
    count = {"square": 4, "triangle": 3, "star": 10, "circle": 90}[shape]
    outline = []
    for i in range(count):
        reach = radius if shape == "circle" else 1.15 * radius
        if shape == "star" and i % 2:
            reach = 0.48 * radius
        angle = turn + math.pi * ((2 * i + (shape == "square")) / count - 0.5)
        outline.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return outline


# ---------------- synthetic scenes: read
# Fixed rules, no network: 07 checks with them what a generated picture shows of its prompt.

def read_scene(picture):
    """(color, shape, pattern, ground) that the pixels of a square scene (3, side, side) show."""
    x = picture.float() / 255
    side = x.shape[-1]
    palette = torch.tensor(list(COLORS.values())) / 255  # (6, 3)
    hues = chroma(*palette.T)
    c = chroma(*x)  # (side, side)
    nearest = (c[..., None] * (hues / hues.abs()).conj()).real.argmax(-1)  # index into COLORS
    gray = c.abs() < 0.15 * x.amax(0).clamp(min=0.2)                       # the word
    label = torch.where(gray, -1, nearest)

    margin = side // 12
    frame = torch.ones(side, side, dtype=torch.bool)
    frame[margin:-margin, margin:-margin] = False
    ground = most_frequent(label[frame])
    # The figure is what is not ground, less a pixel, because edges mix hues.
    outside = ((label == ground) | (label < 0)).float()
    figure = F.max_pool2d(outside[None], 3, 1, 1)[0] == 0
    color = most_frequent(label[figure])
    names = list(COLORS)
    shape = read_shape((label == color) & (label != ground))
    pattern = read_pattern(x.mean(0) / palette[ground].mean(), label == ground)
    return names[color], shape, pattern, names[ground]


def chroma(r, g, b):
    """A complex number whose angle is the hue."""
    return torch.complex(r - (g + b) / 2, 3 ** 0.5 / 2 * (g - b))


def most_frequent(labels):
    labels = labels[labels >= 0]
    return int(labels.mode().values) if len(labels) else 0


def read_shape(figure):
    """The shape that covers a mask (side, side) best, when laid over it a little turned, with
    the mask's own center and area."""
    if not figure.any():
        return "circle"
    y, x = torch.nonzero(figure).double().mean(0).tolist()
    best = {}
    for shape, turn in itertools.product(SHAPES, (-0.2, -0.1, 0.0, 0.1, 0.2)):
        unit = polygon_area(corners(shape, 0, 0, 1, turn))
        radius = (figure.sum().item() / unit) ** 0.5
        mask = Image.new("1", figure.shape[::-1])
        ImageDraw.Draw(mask).polygon(corners(shape, x, y, radius, turn), fill=1)
        mask = torch.from_numpy(np.array(mask))
        overlap = (mask & figure).sum().item() / (mask | figure).sum().item()
        best[shape] = max(overlap, best.get(shape, 0))
    return max(best, key=best.get)


def polygon_area(outline):
    after = outline[1:] + outline[:1]
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(outline, after)) / 2


def read_pattern(brightness, ground):
    """One of PATTERNS. brightness (side, side), ground a mask of that shape."""
    # Dots cover 0.2 of the ground, checks and stripes 0.5; only stripes differ between columns.
    dark = (brightness < 0.75) & ground
    share = dark.sum() / ground.sum().clamp(min=1)
    if share < 0.07:
        return "plain"
    columns = ground.sum(0).clamp(min=1)
    spread = (columns * (dark.sum(0) / columns - share).square()).sum() / columns.sum()
    if spread > 0.5 * share * (1 - share):
        return "striped"
    return "dotted" if share < 0.33 else "checkered"


# ================ the shelf
# What all stages share: skip it on a first reading.

NEAREST = InterpolationMode.NEAREST
BAR = dict(dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 20)  # fewer log lines


def stop(sentence):
    """Bad input: one sentence on stderr, exit code 2, no traceback."""
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    raise SystemExit(2)


# ---------------- shelf: the command line

def parse_cli(Settings, presets, doc, argv=None):
    """A Settings from the command line: default < preset < flag.

    There is a flag for each field, with the comment behind the field as its help text.
    """
    notes = {}
    for cls in reversed(Settings.__mro__[:-1]):
        notes |= dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(presets), default="demo",
                        help="named sets of values [demo]")
    for name, kind in typing.get_type_hints(Settings).items():
        options = {"type": kind}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is tuple:
            options = {"type": typing.get_args(kind)[0], "nargs": "*"}
        elif typing.get_origin(kind) is typing.Literal:
            options = {"choices": typing.get_args(kind)}
        note = f"{notes.get(name, '')} [{getattr(Settings, name)}]".replace("%", "%%")
        parser.add_argument("--" + name.replace("_", "-"), help=note,
                            default=argparse.SUPPRESS, **options)
    given = vars(parser.parse_args(argv))
    preset = given.pop("preset")
    return Settings(**with_tuples({"run": f"runs/{preset}"} | presets[preset] | given))


def with_tuples(values):
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def command_line(main, Settings, presets, doc):
    try:
        main(parse_cli(Settings, presets, doc))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    except RuntimeError:
        if not SIGNALS or processes()[0] == 0:  # else: the first process has saved and left
            raise
        raise SystemExit(128 + SIGNALS[0]) from None


def print_settings(s, **counts):
    """What --dry-run prints; counts: parameters of a model."""
    print(json.dumps(asdict(s) | counts, indent=2))


def check_settings(stored, now, free, what):
    """Stop where `now` differs from `stored` in what shapes the result; `free` may differ."""
    now, stored = json.loads(json.dumps([now, stored]))  # tuples become lists
    for key in sorted(now.keys() - free):
        old = stored.get(key, "unknown")
        if now[key] != old:
            stop(f"{what} was made with --{key.replace('_', '-')} {old}, now it is {now[key]}: "
                 "keep the old value, or take another --run")


# ---------------- shelf: files

def aside(path):
    return path.with_name(f".{path.name}.tmp")


def write_aside(path, write):
    """Write to a file beside `path`, then rename it: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(aside(path), "wb") as f:
            write(f)
        os.replace(aside(path), path)
    finally:
        aside(path).unlink(missing_ok=True)


def write_text(path, text):
    write_aside(path, lambda f: f.write(text.encode()))


def read_jsonl(path, mend=False):
    """Yield the objects of a .jsonl file. A last line that a crash cut off is passed over; `mend`
    removes it."""
    with open(path, "rb") as f:
        for line in f:
            if not line.endswith(b"\n"):
                if mend:
                    os.truncate(path, f.tell() - len(line))
                return
            yield json.loads(line)


def read_checkpoint(path, stages=(), remedy="run 04_train_vae.py first"):
    """The dict in a checkpoint, memory-mapped. Stops with the remedy where it is missing, damaged,
    or not from one of `stages`."""
    if not Path(path).is_file():
        stop(f"{path} is missing: {remedy}")
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            file = load_file(path)
        else:
            mapped = zipfile.is_zipfile(path)  # PyTorch's older format cannot be
            file = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except ImportError:
        stop(f"{path} needs the safetensors package: pip install safetensors")
    except Exception as error:
        stop(f"{path} cannot be read ({type(error).__name__}), it is damaged or not a "
             f"checkpoint: {remedy}")
    if not isinstance(file, dict) or (stages and file.get("stage") not in stages):
        stop(f"{path} is not a checkpoint of {' or '.join(stages) or 'an autoencoder'}: {remedy}")
    return file


def save_checkpoint(path, **contents):
    write_aside(Path(path), lambda f: torch.save(contents, f))


def parent(path):
    """How a checkpoint names the file it was made from."""
    with open(path, "rb") as f:
        return {"path": str(path), "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def log(run, **entry):
    with open(Path(run, "log.jsonl"), "a", encoding="utf-8") as f:
        f.write(json.dumps(entry) + "\n")


# ---------------- shelf: device and processes

def pick_device(name):
    """torch.device for --device. Under torchrun each process takes a GPU of its own at once."""
    torch.backends.cudnn.allow_tf32 = False  # Table 2: FP32
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        stop(f"--device {name} is not to be had here: {str(error).splitlines()[0]}")


def loader_workers(s, device):
    """Processes for --workers; a CPU's cores are busy training."""
    if s.workers >= 0:
        return s.workers
    return 8 if device.type == "cuda" else 0


def start(s):
    """Seed, precision, device and processes of a stage that trains; returns the device."""
    torch.manual_seed(s.seed)
    device = pick_device(s.device)
    exact = s.precision == "fp32"
    torch.backends.cudnn.allow_tf32 = not exact
    torch.set_float32_matmul_precision("highest" if exact else "high")
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))  # caching is slow
    _, world = processes()
    if min(s.accumulate, s.log_every, s.val_every, s.save_every) < 1:
        stop("--accumulate, --log-every, --val-every and --save-every must be at least 1")
    if s.batch < 1 or s.batch % (world * s.accumulate):
        stop(f"--batch {s.batch} must be a multiple of {world} processes times --accumulate "
             f"{s.accumulate}")
    return device


def autocast(device, s):
    """The context in which a network computes: bf16 with --precision bf16, else no other."""
    return torch.autocast(device.type, torch.bfloat16, enabled=s.precision == "bf16")


def processes():
    """This process's number, and how many there are: (0, 1) without torchrun."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def finish():
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_gradients(parameters):
    """Sum gradients over processes; each loss was divided by the number of processes.

    Always in this order, so that a resumed run rounds alike. (DistributedDataParallel orders its
    buckets anew after the first step.)
    """
    if dist.is_initialized():
        pending = [dist.all_reduce(p.grad, async_op=True) for p in parameters]
        for work in pending:
            work.wait()


def gather(values, alone=False):
    """Python numbers of 0-d tensors, means over processes; here the host waits for the device.
    alone: only this process calls."""
    numbers = torch.stack([value.float() for value in values.values()])
    if dist.is_initialized() and not alone:
        dist.all_reduce(numbers)
        numbers /= dist.get_world_size()
    return dict(zip(values, numbers.tolist()))


def check_finite(values, step, out, bar):
    wrong = ", ".join(name for name, value in values.items() if not math.isfinite(value))
    if wrong:
        bar.close()
        stop(f"step {step}: {wrong} not finite; what is saved in {out} is good: lower --lr, or use "
             "--precision fp32")


def positions(s, step):
    """Lists of the numbers of the pictures that this process sees, one list per part of a step."""
    rank, world = processes()
    share = s.batch // world
    part = share // s.accumulate
    for first in range(step * s.batch + rank * share, s.steps * s.batch, s.batch):
        for begin in range(first, first + share, part):
            yield list(range(begin, begin + part))


def generator(*key):
    """Random numbers that are a function of `key`."""
    # PyTorch's CPU generator uses 32 bits of a seed.
    bits = random.Random("/".join(map(str, key))).getrandbits(32)
    return torch.Generator().manual_seed(bits)


# ---------------- shelf: resuming and stopping

def resume(s, stage, out, made_from, free=()):
    """What an interrupted run left in `out`, or None; what contradicts the settings is an error."""
    aside(out).unlink(missing_ok=True)  # from a save that was killed
    file = None
    if out.exists():
        file = read_checkpoint(out, (stage,), "take another --run, or remove it")
        free = {field.name for field in fields(TrainingRun)} - {"seed"} | {"steps", *free}
        check_settings(file["settings"], asdict(s), free, out)
        if file["parent"]["sha256"] != made_from["sha256"]:
            stop(f"{made_from['path']} has changed since {out} was begun: take another --run")
        if file["step"] > s.steps:
            stop(f"{out} is at step {file['step']}, beyond --steps {s.steps}")
    # Cut the log back to the checkpoint, or repeated steps would stand in it twice.
    path = Path(s.run, "log.jsonl")
    if path.exists() and processes()[0] == 0:
        last = file["step"] if file else 0
        kept = [line for line in read_jsonl(path) if line["stage"] != stage or line["step"] <= last]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return file


def load_state(file, state):
    """Fill networks and optimizers, {name: module}, from a checkpoint. Returns its step, else 0."""
    if file is None:
        return 0
    for name, module in state.items():
        module.load_state_dict(copy.deepcopy(file[name]) if "optimizer" in name else file[name])
    return file["step"]


def save_state(out, state, **about):
    tensors = {name: module.state_dict() for name, module in state.items()}
    save_checkpoint(out, **about, **tensors)


SIGNALS = []  # signals that asked this process to stop


def begin(dataset, s, stage, step, device, collate_fn=None):
    """A loader for the steps after `step`, one item per part of a step; and a progress bar."""
    listen()  # before loader processes start: from then on Ctrl-C reaches them too
    loader = DataLoader(dataset, batch_sampler=positions(s, step), collate_fn=collate_fn,
                        num_workers=loader_workers(s, device), pin_memory=device.type == "cuda",
                        worker_init_fn=ignore_signals)
    rank, _ = processes()
    bar = tqdm(total=s.steps, initial=step, unit="step", desc=stage, disable=rank > 0, **BAR)
    return iter(loader), bar


def listen():
    """From now on Ctrl-C and SIGTERM only fill SIGNALS, so that a step can end and be saved.

    Only the first process looks there: all have the same weights, and the others end with it.
    """
    SIGNALS.clear()
    on_signals(remember)


def stop_listening():
    """From now on both end the process at once: nothing is left that could be lost."""
    on_signals(signal.default_int_handler)


def on_signals(handler):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def remember(number, frame):
    SIGNALS.append(number)
    signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C kills


def ignore_signals(worker):
    """Ctrl-C reaches loader processes too, but the main process decides when they end."""
    on_signals(signal.SIG_IGN)


def leave(stage, out, step):
    print(f"{stage}: saved {out} at step {step}; the same command goes on from there",
          file=sys.stderr)
    raise SystemExit(128 + SIGNALS[0])


# ---------------- shelf: sheets of pictures

def save_sheet(path, tiles, columns, titles=(), rows=(), captions=()):
    """Write uint8 pictures (3, side, side) as one PNG, `columns` in a row, small ones magnified.

    A title stands over each column, a label beside each row, a caption under each picture.
    """
    side = tiles[0].shape[2]
    side *= math.ceil(160 / side)  # each pixel becomes a whole square
    tiles = [resize_shorter(t.cpu(), side, NEAREST) for t in tiles]
    tile_h, tile_w = tiles[0].shape[1:]
    left = 120 if rows else 0
    top = 22 if titles else 0
    step_x = tile_w + 4
    step_y = tile_h + 4 + (54 if captions else 0)
    lines = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (left + columns * step_x, top + lines * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for i, tile in enumerate(tiles):
        x = left + i % columns * step_x
        y = top + i // columns * step_y
        sheet.paste(TF.to_pil_image(tile), (x, y))
        if captions:
            text = textwrap.wrap(captions[i], tile_w // 8, max_lines=3, placeholder=" ...")
            draw.multiline_text((x + 2, y + tile_h + 1), "\n".join(text), "black", font, spacing=2)
    for i, title in enumerate(titles):
        draw.text((left + i * step_x + 2, 3), title, "black", font)
    for i, label in enumerate(rows):
        draw.text((4, top + i * step_y + 4), label, "black", font)
    write_aside(path, lambda f: sheet.save(f, "PNG"))


if __name__ == "__main__":
    command_line(main, Settings, PRESETS, __doc__)
