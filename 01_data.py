"""Stage 1 of VIVAT: from any pictures to a training set.

Reads   --images DIR: a folder tree of pictures, with captions beside them in .txt or .json files
        (as img2dataset writes them; its shards unpack by: for t in *.tar; do tar -xf $t; done);
        or nothing: then scenes are drawn here, each with an exact caption.
Writes  RUN/data/train and RUN/data/val: lossless WebP, and metadata.jsonl (file_name, text);
        RUN/data/rejected.jsonl.
Paper   Sec. 5.1 (data selection; resize first, then crop).

    python 01_data.py --preset small --images ~/Pictures --run runs/mine

Run it again and it makes only what is missing. The end of this file is the shelf: what all stages
use and no paper speaks of.
"""
import argparse
import collections
import contextlib
import dataclasses
import datetime
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

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps
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
    dry_run: bool = False  # print settings and counts of parameters, and stop


@dataclass(frozen=True)
class TrainingRun(Run):
    """The same for the stages that train."""
    muon_lr: float = 0.0   # not in the paper: above 0, Muon for matrices; for short runs
    lr_decay: float = 0.0  # not in the paper: last share of the steps, where rates fall to 0
    accumulate: int = 1    # parts that a process cuts its share of a batch into, for memory
    compile: bool = False  # torch.compile the network
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


# ---- resize, then crop (Sec. 5.1)

def resize_shorter(im, side, how="bicubic"):
    """A PIL picture with a shorter side of `side`. Pillow's bicubic is antialiased."""
    scale = side / min(im.size)
    size = [round(length * scale) for length in im.size]
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
    """Shorter side to `size`, the middle: uint8 (3, size, size); or, in words, why not."""
    try:
        return center_crop(resize_shorter(open_picture(path), size), size)
    except Exception as error:
        return f"passed over {path}: {error}"


def read_list(run, split, side):
    """[{"file": path, "text": caption}, ...] of RUN/data/train or val, for crops of `side`."""
    folder = Path(run, "data", split)
    path = folder / "metadata.jsonl"
    if not path.is_file():
        fail(f"{path} is missing: run 01_data.py first")
    with open(path, encoding="utf-8") as f:
        lines = [json.loads(line) for line in f]
    pictures = [{"file": str(folder / line["file_name"]), "text": line["text"]} for line in lines]
    stored = min(Image.open(pictures[0]["file"]).size)
    if stored < side:
        fail(f"pictures in {folder} have a shorter side of {stored}, not {side}: run 01_data.py "
             "with a larger --resize and another --run first")
    return pictures


def val_crops(run, crop, count):
    """The centers of the first `count` validation pictures, uint8 (n, 3, crop, crop)."""
    pictures = read_list(run, "val", crop)[:count]
    return torch.stack([center_crop(Image.open(p["file"]), crop) for p in pictures])


def find_pictures(folder):
    """Paths of all pictures in a folder and below."""
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        fail(f"{folder}: no pictures there ({' '.join(sorted(SUFFIXES))})")
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
        if stored.exists() and stored.stat().st_size:
            return split, line
        im = draw_scene(s.seed, source, split, s.min_side) if scene else open_picture(source)
        if min(im.size) < s.min_side:
            raise ValueError(f"{im.width}x{im.height}: the shorter side is below {s.min_side}")
        im = resize_shorter(im, s.resize, s.interpolation)
        if max(im.size) > 16383:
            raise ValueError(f"{im.width}x{im.height} is too long for WebP")
    except Exception as error:  # one bad file of a million stops nothing
        return "rejected", {"source": str(source), "reason": f"{type(error).__name__}: {error}"}
    # Lossless, smaller than PNG, written in half the time. A full disk ends the run.
    write_aside(stored, lambda f: im.save(f, "WEBP", lossless=True, quality=0, method=0))
    return split, line


def open_picture(path):
    """A PIL picture: sRGB, upright, transparency over white. Raises what Pillow raises."""
    # not in the paper: all of this
    im = Image.open(path, formats=FORMATS)
    if im.mode[0] in "IF":  # Pillow would clip it, and does not say what white is
        raise ValueError(f"more than 8 bits per value (mode {im.mode}): convert it first")
    profile = im.info.get("icc_profile")
    im = ImageOps.exif_transpose(im)
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
    meta = {}
    if path.with_suffix(".json").is_file():
        meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8-sig"))
    caption = meta.get("caption")
    if path.with_suffix(".txt").is_file():
        caption = path.with_suffix(".txt").read_text(encoding="utf-8-sig", errors="replace")
    scores = [value for key, value in meta.items()
              if key.lower().startswith("aesthetic") and type(value) in (int, float)]
    return caption.strip() if isinstance(caption, str) else "", scores[0] if scores else None


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
    if s.dry_run:
        return show(s)
    if not 0 < s.resize <= s.min_side:
        fail(f"--resize {s.resize} must lie between 1 and --min-side {s.min_side} (Sec. 5.1)")
    sources = list(range(s.count))
    if s.images != "synthetic":
        sources = [p for p in find_pictures(s.images) if Path(s.run, "data") not in p.parents]
    if not sources:
        fail(f"--images {s.images}, --count {s.count}: nothing to do")
    # Of a small folder five pictures, or a quarter.
    numbers = sorted(name_number(source, s) for source in sources)
    val_below = max(s.val_share, numbers[min(5, len(numbers) // 4)])
    lists = {"train": [], "val": [], "rejected": []}
    # Its processes call prepare() on one source at a time.
    work = functools.partial(prepare, s=s, val_below=val_below)
    loader = DataLoader(sources, batch_size=None, collate_fn=work,
                        num_workers=min(s.workers, os.cpu_count()))
    for name, line in tqdm(loader, unit="picture"):
        lists[name].append(json.dumps(line, ensure_ascii=False) + "\n")
    folder = Path(s.run, "data")
    write_text(folder / "rejected.jsonl", "".join(lists["rejected"]))
    print(f"{folder}: " + ", ".join(f"{name} {len(lines)}" for name, lines in lists.items()))
    if not lists["train"] or not lists["val"]:
        fail("train or val is empty (see rejected.jsonl): give more pictures")
    for split in ("train", "val"):
        write_text(folder / split / "metadata.jsonl", "".join(sorted(lists[split])))


# ==== the shelf
# What all stages use: skip it on a first reading.

def fail(sentence):
    """Bad input: one sentence on stderr, exit code 2, no traceback."""
    tqdm.write(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)  # beside a bar, too
    raise SystemExit(2)


@contextlib.contextmanager
def needs(what):
    """Around what may fail for want of a package or a file: says what it needs."""
    try:
        yield
    except Exception as error:  # no package, no network, half a file: many kinds
        fail(f"{what} ({type(error).__name__}: {' '.join(str(error).split())[:200]})")


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
            options = {"type": typing.get_args(field.type)[0], "nargs": "*"}
        elif typing.get_origin(field.type) is typing.Literal:
            options = {"choices": typing.get_args(field.type)}
        note = f"{notes.get(field.name, '')} [{field.default}]".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), help=note,
                            default=argparse.SUPPRESS, **options)
    given = vars(parser.parse_args(argv))
    preset = given.pop("preset")
    values = {"run": f"runs/{preset}"} | presets[preset] | given
    return Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def pick(cls, s):
    """The fields of a dataclass among a stage's settings."""
    return cls(**{field.name: getattr(s, field.name) for field in dataclasses.fields(cls)})


def show(s, **parameters):  # for --dry-run
    print(json.dumps(asdict(s) | {"parameters": parameters}, indent=1))


def write_aside(path, write):
    """Write beside `path`, then rename: nobody ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "wb") as f:
        write(f)
    os.replace(aside, path)


def write_text(path, text):  # "replace": a caption may hold half a character
    write_aside(path, lambda f: f.write(text.encode("utf-8", "replace")))


def read_checkpoint(path, remedy):
    """The dict in a checkpoint, ours or others'; stops with the remedy where there is none."""
    if not Path(path).is_file():
        fail(f"{path} is missing: {remedy}")
    with open(path, "rb") as f:
        safetensors = f.read(9)[8:] == b"{"  # it begins with a length, then JSON
    if safetensors:
        with needs(f"{path} must be whole, and needs pip install safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
    with needs(f"{path} cannot be read as weights: {remedy}"):
        # Lightning leaves classes beside weights: all but tensors and the like become Stubs.
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Stub, name) for name in unknown]):
            return torch.load(path, map_location="cpu", weights_only=True)


class Stub(dict):
    """In place of any class in others' checkpoints: none of theirs is ever run."""
    def __new__(cls, *args):
        return super().__new__(cls)

    def __init__(self, *args):
        super().__init__()

    def __setstate__(self, state):
        pass


def file_hash(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---- shelf: device and processes

def pick_device(s):
    """The device, after setting seed and precision. Under torchrun each process has its own GPU."""
    torch.manual_seed(s.seed)
    exact = getattr(s, "precision", "fp32") == "fp32"
    torch.backends.cudnn.allow_tf32 = not exact
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.benchmark = True  # crops have one size
    name = s.device
    if name == "auto" and torch.accelerator.is_available():
        name = str(torch.accelerator.current_accelerator())
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(name)
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if name.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    return torch.device("cpu" if name == "auto" else name)


def processes():
    """This process's number, and how many there are: (0, 1) without torchrun."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def average(tensors):
    """Make each tensor its mean over processes; in one order, so that rounding repeats."""
    if dist.is_initialized():
        for v in tensors:
            dist.all_reduce(v)
            v /= dist.get_world_size()


def part_size(s):
    """Pictures that a process has in memory at once: its share of a batch, cut into parts."""
    size, rest = divmod(s.batch, processes()[1] * s.accumulate)
    if size < 1 or rest:
        fail(f"--batch {s.batch} must be a multiple of {processes()[1]} processes times "
             f"--accumulate {s.accumulate}")
    return size


def seed_step(s, stage, step):
    """Make all that is drawn in a step a function of (stage, seed, step, process)."""
    key = f"{stage}/{s.seed}/{step}/{processes()[0]}"
    torch.manual_seed(random.Random(key).getrandbits(32))


# ---- shelf: saving, resuming and stopping

# What may change when a run goes on: where it runs, how one looks at it, ways out of a NaN.
FREE = {"run", "device", "workers", "dry_run", "compile", "accumulate", "precision", "lr", "clip",
        "muon_lr", "clip_norm", "log_every", "val_every", "val_pictures", "val_prompts", "vae",
        "qwen", "clip_score", "sample", "sample_steps", "guidance", "shift"}


def save(path, state, s, step, milestone, **about):
    """Write a checkpoint at a milestone, or if a signal asked to stop, and then stop. Only the
    first process does; the others end with it. state: {name: module or optimizer}; about: what
    else a reader of the file needs."""
    if processes()[0] > 0 or not (milestone or INTERRUPTS):
        return
    if not all(weights.isfinite().all() for weights in state["model"].parameters()):
        fail(f"step {step}: weights are not finite; {NOT_FINITE}")
    tensors = {name: module.state_dict() for name, module in state.items()}
    contents = dict(settings=asdict(s), step=step, **about, **tensors)
    write_aside(path, lambda f: torch.save(contents, f))
    if INTERRUPTS:
        print(f"saved {path} at step {step}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(128 + INTERRUPTS[0])


NOT_FINITE = "what is saved is good: go on from there with a lower --lr, or --precision fp32"


def resume(path, state, s, stage, parent=""):
    """Fill `state` from an interrupted run; returns its step, or 0. Refuses settings that
    contradict it, and another `parent`."""
    step = 0
    if path.exists():
        checkpoint = read_checkpoint(path, "remove it, or take another --run")
        for name, now in asdict(s).items():
            before = checkpoint["settings"].get(name)
            if now != before and name not in FREE and (name != "steps" or s.lr_decay > 0):
                fail(f"{path} was begun with --{name.replace('_', '-')} {before}, not {now}: keep "
                     "the old value, or take another --run")
        if checkpoint["parent"] != parent:
            fail(f"what {path} was begun from has changed: take another --run, or remove it")
        with needs(f"{path} does not fit these settings: keep its own"):
            for name, module in state.items():
                module.load_state_dict(checkpoint[name])
        step = checkpoint["step"]
        print(f"{path} goes on after step {step} of {s.steps}")
    if processes()[0] == 0 and Path(s.run, "log.jsonl").exists():
        # Less what came after the checkpoint, or those steps would stand there twice.
        lines = [line for line in read_log(s.run) if line["stage"] != stage or line["step"] <= step]
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


# ---- shelf: logs, curves, sheets

def gather(terms, step):
    """0-d tensors as numbers, means over processes; stops where one is not finite."""
    values = torch.stack([value.detach().float() for value in terms.values()])
    average([values])
    numbers = dict(zip(terms, values.tolist()))
    for name, number in numbers.items():
        if not math.isfinite(number):
            fail(f"step {step}: {name} is not finite; {NOT_FINITE}")
    return numbers


def log(run, stage, step, numbers, bar):
    """One line on the screen, one in RUN/log.jsonl; RUN/curve.png. In the first process."""
    if processes()[0] > 0:
        return
    bar.write(f"step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
    with open(Path(run, "log.jsonl"), "a") as f:
        f.write(json.dumps(dict(stage=stage, step=step) | numbers) + "\n")
    draw_curves(run)


def read_log(run):
    """The lines of RUN/log.jsonl, less one that a crash cut off."""
    with open(Path(run, "log.jsonl")) as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def draw_curves(run):
    """RUN/curve.png: each quantity in the log over its stage's steps, from its least to its
    largest value."""
    curves = collections.defaultdict(list)
    for line in read_log(run):
        for name in line.keys() - {"stage", "step"}:
            curves[line["stage"], name].append((line["step"], line[name]))
    w, h = 290, 110
    sheet = Image.new("RGB", (4 * w, math.ceil(len(curves) / 4) * h), "white")
    draw = ImageDraw.Draw(sheet)
    for i, ((stage, name), points) in enumerate(sorted(curves.items())):
        left = i % 4 * w + 10
        top = i // 4 * h
        values = [value for _, value in points]
        low = min(values)
        height = max(values) - low or 1
        scaled = [(left + (w - 30) * step / points[-1][0], top + h - 8 - 72 * (v - low) / height)
                  for step, v in points]
        title = f"{stage[:2]} {name}: {low:.3g} to {low + height:.3g}, at last {values[-1]:.3g}"
        draw.text((left, top + 8), title, "black")
        draw.line(scaled, (30, 60, 160), 2)
    write_aside(Path(run, "curve.png"), lambda f: sheet.save(f, "PNG"))


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
    main(parse_cli(Settings, PRESETS, __doc__))
