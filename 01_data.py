"""Stage 1 of VIVAT: from any pictures to a training set.

Reads   --images DIR: a folder tree of pictures, with captions beside them in .txt or .json files,
        as img2dataset writes them; or nothing: then scenes are drawn here, with exact captions.
Writes  RUN/data: train and val, each lossless WebP and metadata.jsonl; rejected.jsonl.
Paper   Sec. 5.1 (data selection; resize first, then crop).

    python 01_data.py --preset small --images ~/Pictures --run runs/mine

Run it again and it makes only what is missing. The end of this file is a shelf for all stages.
"""
import argparse
import collections
import contextlib
import dataclasses
import errno
import functools
import hashlib
import inspect
import io
import json
import math
import os
import random
import re
import signal
import sys
import textwrap
import typing
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock  # torch needs it, too
import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, PngImagePlugin
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm


# ---- settings

@dataclass(frozen=True)
class Run:
    """What belongs to a run, not to the method. All scripts take these flags."""
    run: str = ""          # folder that all stages share [runs/PRESET]
    seed: int = 0          # all that is random follows from it
    device: str = "auto"   # cuda, mps or cpu; auto: the first of them that is there
    workers: int = 8       # processes that read pictures beside this one


@dataclass(frozen=True)
class TrainingRun(Run):
    """The same for the stages that train."""
    muon_lr: float = 0.0   # not in the paper: above 0, Muon for matrices; for short runs
    lr_decay: float = 0.0  # not in the paper: last share of the steps, where rates fall to 0
    accumulate: int = 1    # parts that a batch is cut into, for memory
    compile: bool = True   # torch.compile the network, on CUDA
    log_every: int = 100   # steps between two lines of the log


@dataclass(frozen=True)
class Settings(Run):
    images: str = "synthetic"  # a folder; Sec. 5.1: LAION Aesthetic HighRes
    min_side: int = 720        # Sec. 5.1: HD sources; a shorter side below this is rejected
    # not in the paper: a picture without a score is kept
    min_score: float = 4.5     # Sec. 5.1: keep aesthetic scores above this
    resize: int = 480          # Sec. 5.1: shorter side after the resize
    interpolation: typing.Literal["bicubic", "nearest"] = "bicubic"  # Sec. 5.1 warns of nearest
    val_share: float = 0.01    # not in the paper: share that validates; of few pictures more
    count: int = 10_000        # scenes to draw, of height --min-side, where no folder is given


# Without --preset it is demo, which divides the paper's 480 and 240 by about four.
PRESETS = {"paper": {}, "small": dict(count=20_000),
           "demo": dict(min_side=360, resize=128, count=2200, val_share=0.03)}
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"}
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")  # whatever a file's name says
UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's orientation: Pillow's Transpose


# ---- resize, then crop (Sec. 5.1)

def resize_shorter(im, side, how="bicubic"):
    """A PIL picture with a shorter side of `side`. Pillow's bicubic is antialiased."""
    scale = side / min(im.size)
    size = [round(length * scale) for length in im.size]
    if max(size) > 16383:  # WebP's limit
        raise ValueError(f"{im.width}x{im.height} is too narrow")
    return im.resize(size, Image.Resampling[how.upper()])


def center_crop(im, side):
    """The middle square of a PIL picture, uint8 (3, side, side)."""
    left = (im.width - side) // 2
    top = (im.height - side) // 2
    return pil_to_tensor(im.crop((left, top, left + side, top + side)))


class Crops(Dataset):
    """Random crops of the training pictures, drawn with replacement: uint8 (3, crop, crop). Crop n
    follows from (stage, seed, n) alone, so a resumed run sees what the whole one would have."""
    def __init__(self, run, crop, stage, seed):
        self.files = [picture["file"] for picture in read_list(run, "train", crop)]
        self.crop = crop
        self.key = f"{stage}/{seed}"

    def __getitem__(self, n):
        rng = random.Random(f"{self.key}/{n}")
        im = Image.open(rng.choice(self.files))
        # not in the paper: where the crop lies, and mirroring half of them
        left = rng.randint(0, im.width - self.crop)
        top = rng.randint(0, im.height - self.crop)
        x = pil_to_tensor(im.crop((left, top, left + self.crop, top + self.crop)))
        return x.flip(-1) if rng.random() < 0.5 else x


def read_square(path, size):
    """Shorter side to `size`, the middle: uint8 (3, size, size); or in words why not."""
    try:
        return center_crop(resize_shorter(open_picture(path), size), size)
    except Exception as error:
        return f"passed over {str(path)!r}: {error}"


def read_list(run, split, side):
    """[{"file": path, "text": caption}, ...] of RUN/data/train or val, for crops of `side`."""
    folder = Path(run, "data", split)
    path = folder / "metadata.jsonl"
    if not path.is_file():
        fail(f"{path} is missing: run 01_data.py first")
    with open(path, encoding="utf-8") as f:
        lines = [json.loads(line) for line in f]
    pictures = [{"file": str(folder / line["file_name"]), "text": line["text"]} for line in lines]
    for picture in pictures:
        if not is_whole(Path(picture["file"])):
            fail(f"{picture['file']} is gone: run 01_data.py again")
    stored = min(Image.open(pictures[0]["file"]).size)
    if stored < side:
        fail(f"pictures in {folder} have a shorter side of {stored}, not {side}: run 01_data.py "
             "with a larger --resize and another --run first, or ask for less")
    return pictures


def is_whole(path):
    return path.is_file() and path.stat().st_size > 0


def val_crops(run, crop, count):
    """The centers of the first `count` validation pictures, uint8 (n, 3, crop, crop)."""
    pictures = read_list(run, "val", crop)[:count]
    return torch.stack([center_crop(Image.open(p["file"]), crop) for p in pictures])


def find_pictures(folder, *but):
    """Paths of all pictures below a folder, each folder once, behind links too; not below `but`."""
    paths = []
    others = collections.Counter()
    seen = {os.path.realpath(path) for path in but}
    for root, folders, files in os.walk(folder, onerror=print, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # Less what systems leave: .Trash, ._name, @eaDir.
        folders[:] = sorted(f for f in folders if not f.startswith((".", "@eaDir", "__MACOSX")))
        for path in (Path(root, name) for name in sorted(files) if name[0] != "."):
            if path.suffix.lower() in SUFFIXES and os.path.isfile(path):
                paths.append(path)
            elif path.suffix.lower() not in (".txt", ".json"):
                others[path.suffix] += 1
    if others:
        print(f"left out, by suffix: {dict(others)}")
    if not paths:
        fail(f"{folder}: no pictures there")
    return paths


# ---- one picture in, one picture out

def name_number(source, s):
    """A number in [0, 1) that follows from a picture's place in its folder, or a scene's number."""
    name = f"scene {source}" if isinstance(source, int) else os.path.relpath(source, s.images)
    return int(hashlib.sha256(os.fsencode(name)).hexdigest()[:8], 16) / 16 ** 8


def prepare(source, s, val_below):
    """Filter, resize and store one picture, a path or the number of a scene. Returns its list
    ("train", "val" or "rejected"), and its line there."""
    split = "val" if name_number(source, s) < val_below else "train"
    scene = isinstance(source, int)
    try:
        if scene:
            caption = scene_caption(s.seed, source, split)
            made_from = s.seed
        else:
            caption, score = read_caption(source)
            if score is not None and score <= s.min_score:
                raise ValueError(f"aesthetic score {score:g} is not above {s.min_score:g}")
            made_from = source.stat().st_size, source.stat().st_mtime_ns
        # Whatever changes the stored picture changes its name.
        key = repr((str(source), made_from, s.min_side, s.resize, s.interpolation))
        digits = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        file_name = f"{digits[:2]}/{digits}.webp"  # 256 folders, so that millions can be listed
        stored = Path(s.run, "data", split, file_name)
        line = {"file_name": file_name, "text": caption}
        if is_whole(stored):
            return split, line
        im = draw_scene(s.seed, source, split, s.min_side) if scene else open_picture(source)
        if min(im.size) < s.min_side:
            raise ValueError(f"{im.width}x{im.height}: the shorter side is below {s.min_side}")
        im = resize_shorter(im, s.resize, s.interpolation)
    except Exception as error:  # one bad file of a million stops nothing
        # But not a disk that is full or gone.
        if getattr(error, "errno", None) not in (None, errno.EACCES, errno.EINVAL):
            raise
        return "rejected", {"source": str(source), "reason": f"{type(error).__name__}: {error}"}
    # Lossless, smaller than PNG, written in half the time.
    write_aside(stored, lambda f: im.save(f, "WEBP", lossless=True, quality=0, method=0))
    return split, line


def open_picture(path):
    """A PIL picture: sRGB, upright, transparency over white. Raises what Pillow raises."""
    # not in the paper: all of this
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # large ones are sound
    im = Image.open(path, formats=FORMATS)
    if im.mode[0] in "IF":  # Pillow would clip it, and does not say what white is
        raise ValueError(f"more than 8 bits per value (mode {im.mode}): convert it first")
    profile = im.info.get("icc_profile")
    im.load()
    with contextlib.suppress(Exception):  # broken EXIF: many kinds
        im = im.transpose(UPRIGHT[im.getexif()[ExifTags.Base.Orientation]])
    if im.has_transparency_data:
        im = im.convert("RGBA")
    elif im.mode == "P":
        im = im.convert("RGB")
    if profile:  # phones take Display P3
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # broken, or for another mode
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            im = ImageCms.profileToProfile(im, source, ImageCms.createProfile("sRGB"),
                                           outputMode="RGBA" if im.mode == "RGBA" else "RGB")
    if im.mode == "RGBA":
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
    return im.convert("RGB")


def read_caption(path):
    """(caption or "", aesthetic score or None) from the .txt and .json beside a picture."""
    meta = json.loads(read_beside(path, ".json") or "{}")
    if not isinstance(meta, dict):
        meta = {}
    caption = read_beside(path, ".txt").strip() or meta.get("caption")
    scores = [value for key, value in meta.items()
              if key.lower().startswith("aesthetic") and type(value) in (int, float)]
    return caption.strip() if isinstance(caption, str) else "", scores[0] if scores else None


def read_beside(path, suffix):
    """The text in the file beside a picture that ends in `suffix`, or "": UTF-8, or UTF-16."""
    for name in (path.with_suffix(suffix), path.with_suffix(suffix.upper())):
        if os.path.isfile(name):
            content = name.read_bytes()
            wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
            return content.decode("utf-16" if wide else "utf-8-sig", "replace").replace("\0", "")
    return ""


# ---- scenes, for trying things out without a download

COLORS = {"red": (220, 45, 40), "yellow": (240, 205, 50), "green": (50, 165, 70),
          "cyan": (60, 195, 215), "blue": (45, 80, 210), "purple": (150, 60, 190)}
# Corners, and how far from the middle the outline is halfway between two of them.
SHAPES = {"circle": (30, 1.0), "square": (4, 0.707), "triangle": (3, 0.5), "star": (5, 0.42)}
PATTERNS = ("plain", "striped", "checkered", "dotted")
# Pairs of color and shape that data/val shows, and only it: 07's prompts ask for what is new.
HELD_OUT = (("red", "circle"), ("yellow", "square"), ("green", "triangle"), ("cyan", "star"))


def choose(seed, index, split):
    """What scene number `index` shows, and the generator to draw it with."""
    rng = random.Random(f"scene/{seed}/{index}")
    while True:
        color, ground = rng.sample(list(COLORS), 2)
        shape = rng.choice(list(SHAPES))
        if ((color, shape) in HELD_OUT) == (split == "val"):
            return rng, color, shape, rng.choice(PATTERNS), ground


def scene_caption(seed, index, split):
    _, color, shape, pattern, ground = choose(seed, index, split)
    return f"a {color} {shape} on a {pattern} {ground} background"


def draw_scene(seed, index, split, height):
    """A PIL picture of 16:9. All that the caption names lies in the middle square."""
    rng, color, shape, pattern, ground = choose(seed, index, split)
    width = height * 16 // 9
    y = torch.linspace(-1, 1, height)[:, None]  # (h, 1)
    x = torch.linspace(-width / height, width / height, width)  # (w,)
    wave = math.pi / rng.uniform(0.2, 0.3)
    across = (wave * x).sin() + 0 * y  # (h, w)
    down = (wave * y).sin() + 0 * x
    marks = {"plain": 0 * across, "striped": across > 0, "checkered": across * down > 0,
             "dotted": across + down > 1.1}[pattern]

    middle_x = (width + rng.uniform(-0.2, 0.2) * height) / 2
    middle_y = (height + rng.uniform(-0.12, 0.12) * height) / 2
    radius = rng.uniform(0.25, 0.33) * height
    turn = rng.uniform(-0.2, 0.2)
    figure = draw_figure(shape, width, height, middle_x, middle_y, radius, turn)
    light = 1 + rng.uniform(-0.15, 0.15) * x + rng.uniform(-0.1, 0.1) * y
    light = torch.where(figure, light, light * (1 - 0.34 * marks))
    palette = torch.tensor([COLORS[ground], COLORS[color]])[figure.long()]  # (h, w, 3)
    grain = torch.randn(light.shape, generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    picture = palette * light[..., None] + 4 * grain[..., None]
    return Image.fromarray(picture.clamp(0, 255).byte().numpy())


def draw_figure(shape, width, height, x, y, radius, turn):
    """A mask (h, w) of a shape around (x, y), turned by an angle."""
    corners, halfway = SHAPES[shape]
    if shape == "square":
        turn += math.pi / 4  # it stands on a side
    outline = []
    for i in range(2 * corners):
        reach = radius * (halfway if i % 2 else 1)
        angle = turn + math.pi * i / corners
        outline.append((x + reach * math.sin(angle), y - reach * math.cos(angle)))
    mask = Image.new("1", (width, height))
    ImageDraw.Draw(mask).polygon(outline, fill=1)
    return torch.from_numpy(np.array(mask))


# ---- main

def main(s):
    if not 0 < s.resize <= s.min_side:
        fail(f"--resize {s.resize} must lie between 1 and --min-side {s.min_side} (Sec. 5.1)")
    folder = Path(s.run, "data")
    sources = range(s.count)
    if s.images != "synthetic":
        sources = find_pictures(s.images, folder)
    # Five files at least, or a quarter of a small folder, before any is rejected.
    numbers = sorted(name_number(source, s) for source in sources)
    val_below = max(s.val_share, numbers[min(5, len(numbers) // 4)])
    lists = {"train": [], "val": [], "rejected": []}
    # Its processes prepare one source at a time.
    work = functools.partial(prepare, s=s, val_below=val_below)
    loader = DataLoader(sources, batch_size=None, collate_fn=work,
                        num_workers=min(s.workers, os.cpu_count()))
    with alone(folder / "rejected.jsonl"):
        for name, line in tqdm(loader, unit="picture"):
            lists[name].append(json.dumps(line, ensure_ascii=False) + "\n")
        write_text(folder / "rejected.jsonl", "".join(lists["rejected"]))
        print(f"{folder}: " + ", ".join(f"{name} {len(lines)}" for name, lines in lists.items()))
        if not lists["train"] or not lists["val"]:
            fail("train or val is empty: see rejected.jsonl, give more pictures or --val-share")
        for split in ("train", "val"):
            write_text(folder / split / "metadata.jsonl", "".join(sorted(lists[split])))


# ==== the shelf
# Skip it on a first reading.

def fail(sentence):
    """Bad input: one sentence on stderr, exit code 2."""
    tqdm.write(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)  # beside a bar, too
    raise SystemExit(2)


@contextlib.contextmanager
def needs(what):
    """Around what may fail for want of a package or a file: says what it needs."""
    try:
        yield
    except Exception as error:  # no package, no network, half a file: many kinds
        fail(f"{what} ({type(error).__name__}: {' '.join(str(error).split())[:200]})")


def start(main, Settings, presets, doc):
    """main() with the command line's settings."""
    try:
        main(parse_cli(Settings, presets, doc))
    except OSError as error:  # a disk that is full, or gone
        fail(str(error).splitlines()[-1])
    except RuntimeError as error:
        if not re.search("out of memory|allocate memory", str(error)):
            raise
        fail("out of memory: train with --accumulate 2, 4, ..., measure at a smaller --size")


def flag(name):
    return "--" + name.replace("_", "-")


def parse_cli(Settings, presets, doc, argv=None):
    """A Settings from the command line: default < preset < flag. Comments are the help texts."""
    notes = {}
    for cls in reversed(Settings.__mro__[:-1]):
        notes |= dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(presets), default="demo",
                        help="sets of values; in brackets below: what they leave alone [demo]")
    for field in dataclasses.fields(Settings):
        options = {"type": field.type}
        if field.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(field.type) is tuple:
            options = {"type": typing.get_args(field.type)[0], "nargs": "*", "action": "extend"}
        elif typing.get_origin(field.type) is typing.Literal:
            options = {"choices": typing.get_args(field.type)}
        note = f"{notes.get(field.name, '')} [{field.default}]".replace("%", "%%")
        parser.add_argument(flag(field.name), help=note,
                            default=argparse.SUPPRESS, **options)
    given = vars(parser.parse_args(argv))
    may_be_0 = {"seed", "workers", "warmup", "pictures", "attention_levels", "refiner_blocks"}
    for name, value in given.items():
        for number in value if isinstance(value, list) else [value]:
            least = 0 if type(number) is float or name in may_be_0 else 1
            if type(number) in (int, float) and not least <= number < math.inf:
                fail(f"{flag(name)} {number} is out of range")
    preset = given.pop("preset")
    values = {"run": f"runs/{preset}"} | presets[preset] | given
    return Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def pick(cls, s):
    """The fields of a dataclass among a stage's settings."""
    return cls(**{field.name: getattr(s, field.name) for field in dataclasses.fields(cls)})


@contextlib.contextmanager
def alone(path):
    """Around the making of `path`: only one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0):
            yield
    except filelock.Timeout:
        fail(f"another process makes {path}")


def write_aside(path, write):
    """Write beside `path`, then rename: nobody ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "wb") as f:
        write(f)
    os.replace(aside, path)


def write_text(path, text):  # "replace": a caption may hold half a character
    write_aside(path, lambda f: f.write(text.encode("utf-8", "replace")))


def file_hash(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---- shelf: device and seeds

def pick_device(s):
    """The device, after setting seed and precision."""
    torch.manual_seed(s.seed)
    exact = getattr(s, "precision", "fp32") == "fp32"
    torch.backends.cudnn.allow_tf32 = not exact
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.benchmark = True  # crops have one size
    if s.device == "auto" and torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    with needs(f"--device {s.device}"):
        return torch.zeros(1, device="cpu" if s.device == "auto" else s.device).device


def seed_step(s, stage, step):
    """Make all that a step draws a function of (stage, seed, step)."""
    torch.manual_seed(random.Random(f"{stage}/{s.seed}/{step}").getrandbits(32))


# ---- shelf: saving, resuming and stopping

# What may change when a run goes on: where it runs, how one looks at it, ways out of a NaN.
FREE = {"run", "device", "workers", "compile", "accumulate", "precision", "lr", "clip",
        "muon_lr", "clip_norm", "log_every", "val_every", "val_pictures", "val_prompts", "vae",
        "qwen", "clip_score", "sample", "sample_steps", "guidance", "shift"}


def save(path, state, s, step, milestone, **about):
    """Write a checkpoint at a milestone, or if a signal asked to stop, and then stop.
    state: {name: module or optimizer}; about: what else a reader of the file needs."""
    if not (milestone or INTERRUPTS):
        return
    if not all(weights.isfinite().all() for weights in state["model"].parameters()):
        fail(f"step {step}: weights are not finite; {NOT_FINITE}")
    tensors = {name: module.state_dict() for name, module in state.items()}
    contents = dict(settings=asdict(s), step=step, **about, **tensors)
    write_aside(path, lambda f: torch.save(contents, f))
    if INTERRUPTS:
        print(f"saved {path} at step {step}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(128 + INTERRUPTS[0])


NOT_FINITE = "go on from what is saved with a lower --lr and --muon-lr, or --precision fp32"


def resume(path, state, s, stage, parent=""):
    """Fill `state` from an interrupted run; returns its step, or 0. Refuses settings that
    contradict it, and another `parent`."""
    step = 0
    if path.exists():
        with needs(f"{path} cannot be read: remove it, or take another --run"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            settings = checkpoint["settings"]
        for name, now in asdict(s).items():
            before = settings.get(name, now)
            if now != before and name not in FREE and (name != "steps" or s.lr_decay > 0):
                fail(f"{path} was begun with {flag(name)} {before}: keep it, or take another --run")
        if checkpoint["parent"] != parent:
            fail(f"{path} was begun from another --vae or data: name those, or take another --run")
        with needs(f"{path} does not fit these settings: keep its own"):
            for name, module in state.items():
                module.load_state_dict(checkpoint[name])
        step = checkpoint["step"]
        print(f"{path} goes on after step {step} of {s.steps}")
    if Path(s.run, "log.jsonl").exists():
        # Less what came after the checkpoint, or those steps would stand there twice.
        whole, _, _ = Path(s.run, "log.jsonl").read_text().rpartition("\n")
        lines = [json.loads(line) for line in whole.splitlines()]
        lines = [line for line in lines if line["stage"] != stage or line["step"] <= step]
        write_text(Path(s.run, "log.jsonl"), "".join(json.dumps(line) + "\n" for line in lines))
    return step


INTERRUPTS = []  # signals that asked this process to stop


def listen():
    """From now on Ctrl-C and SIGTERM only fill INTERRUPTS: the step ends, and is saved."""
    def note(number, frame):
        INTERRUPTS.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C kills

    INTERRUPTS.clear()
    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)


# ---- shelf: logs and sheets

def log(run, stage, step, terms, bar):
    """One line on the screen, one in RUN/log.jsonl. Stops at what is not finite."""
    numbers = {name: float(value) for name, value in terms.items()}
    for name, number in numbers.items():
        if not math.isfinite(number):
            fail(f"step {step}: {name} is not finite; {NOT_FINITE}")
    bar.write(f"step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
    with open(Path(run, "log.jsonl"), "a") as f:
        f.write(json.dumps(dict(stage=stage, step=step) | numbers) + "\n")


def save_sheet(path, tiles, columns, titles=(), captions=()):
    """Uint8 pictures (3, side, side) as one PNG, `columns` in a row, titles over the columns."""
    side = tiles[0].shape[2]
    side *= math.ceil(160 / side)  # each pixel becomes a whole square
    step_y = side + 4 + (54 if captions else 0)
    top = 22 if titles else 0
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * (side + 4), top + rows * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for i, tile in enumerate(tiles):
        x = i % columns * (side + 4)
        y = top + i // columns * step_y
        sheet.paste(to_pil_image(tile.cpu()).resize((side, side), Image.NEAREST), (x, y))
        if captions:
            text = textwrap.wrap(captions[i], side // 8, max_lines=3, placeholder=" ...")
            draw.multiline_text((x + 2, y + side + 1), "\n".join(text), "black", font, spacing=2)
    for i, title in enumerate(titles):
        draw.text((i * (side + 4) + 2, 3), title, "black", font)
    write_aside(Path(path), lambda f: sheet.save(f, "PNG"))


if __name__ == "__main__":
    start(main, Settings, PRESETS, __doc__)
