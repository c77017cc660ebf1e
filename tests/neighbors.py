"""Table 2 of the Variance Expansion paper in small: is there a KL weight that gives what VE gives?
Run by hand, beside a folder that 01_data.py filled:

    python 01_data.py --run runs/neighbors
    python tests/neighbors.py runs/neighbors --seeds 0 1 2

For each row and seed: 04 with the row's flags, 06 on what it gives, 07 on its latents, and pictures
of the prompts that 07 never saw. Two rows at once, one thread each. The numbers go to --readings, a
line per row and seed; what has a line is not made again, so that several machines can share the
work. Prints Markdown; writes RUN/neighbors.png, PSNR over the noise on latents.
"""
import argparse
import importlib
import json
import math
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import pil_to_tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
data = importlib.import_module("01_data")
losses = importlib.import_module("03_losses")
transformer = importlib.import_module("07_train_dit")

ROWS = {
    "kl-1e-6": ["--lambda-kl", "1e-6"],
    "kl-1e-4": [],
    "kl-1e-2": ["--lambda-kl", "1e-2"],
    "kl-1e-1": ["--lambda-kl", "1e-1"],
    "ve": ["--regularizer", "ve"],
    "kl-1e-2-warmup": ["--lambda-kl", "1e-2", "--kl-warmup", "1200"],
    "kl-1e-2-free": ["--lambda-kl", "1e-2", "--free-bits", "0.5"],
}
COLORS = ("#1f4e9c", "#4f9bd9", "#58a55c", "#8a6d3b", "#c0392b", "#9b59b6", "#888888")


# ---------------- making

def run(script, *flags):
    print("python", script, *flags, file=sys.stderr)
    subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], check=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})


def make(row, seed, trunk, s):
    """Train and measure one row with one seed; its readings."""
    own = s.folder / f"{row}-{seed}"
    own.mkdir(exist_ok=True)
    if not (own / "data").exists():
        (own / "data").symlink_to("../data")
    common = ["--run", own, "--seed", seed]
    run("04_train_vae.py", *common, "--steps", s.steps, *ROWS[row])
    run("06_eval.py", "--run", own, "--pictures", s.pictures, "--vae", own / "vae.pt")
    reading, = json.loads((own / "eval.json").read_text())["rows"]
    if s.dit_steps:
        run("07_train_dit.py", *common, "--steps", s.dit_steps)
        reading |= look_at_samples(own, seed, trunk)
    return dict(row=row, seed=seed, steps=s.steps, dit_steps=s.dit_steps) | reading


def look_at_samples(own, seed, trunk):
    """How well 07's pictures follow the prompts, and how far they are from real scenes of them."""
    prompts = transformer.scene_prompts()
    settings = transformer.PRESETS["demo"] | dict(run=str(own), seed=seed, sample=tuple(prompts))
    s = transformer.Settings(**settings)
    pictures = transformer.main_sample(s)
    scenes = [real_scene(prompt, number, s.size) for number, prompt in enumerate(prompts)]
    distance = kernel_distance(mean_features(trunk, pictures), mean_features(trunk, scenes))
    return transformer.follow(pictures, prompts) | {"sample_distance": distance}


def real_scene(prompt, number, size):
    color, shape, pattern, ground = data.told(prompt)
    im = data.draw_scene(random.Random(number), 360, shape, color, pattern, ground, word=None)
    return data.center_crop(data.resize_shorter(pil_to_tensor(im), size), size)


@torch.no_grad()
def mean_features(trunk, pictures):
    """Features of a Perceptual, means over positions: (pictures, channels of all levels)."""
    rows = []
    for picture in pictures:
        levels = trunk.features(losses.from_uint8(picture[None]))
        rows.append(torch.cat([level.mean(dim=(0, 2, 3)) for level in levels]))
    return torch.stack(rows).double()


def kernel_distance(a, b):
    """Unbiased squared maximum mean discrepancy of two sets (n, d), as in KID, with the kernel
    (1 + a . b)^3. Item i of both has the same prompt, so that such pairs are left out too."""
    def alike(v, w):
        kernel = (1 + v @ w.T) ** 3
        return (kernel.sum() - kernel.trace()) / (len(v) * (len(v) - 1))

    return (alike(a, a) + alike(b, b) - 2 * alike(a, b)).item()


# ---------------- telling

def columns(reading):
    """{title: number} of one line of the readings."""
    latents = reading["latents"]
    noise = latents["psnr_under_noise"]
    numbers = {"PSNR, dB": reading["psnr"], "untrained features": reading["lpips"],
               "posterior variance": latents["posterior_variance"],
               "its share": latents["posterior_share"], "active channels": latents["active"]}
    numbers |= {f"PSNR at {strength}": noise[strength] for strength in ("0.1", "0.3", "0.5")}
    if reading["dit_steps"]:
        for name in ("shape", "pattern", "all four"):
            numbers[name] = reading[name]
        numbers["samples from scenes, 1e-3"] = 1e3 * reading["sample_distance"]
    return numbers


def print_table(rows):
    titles = list(columns(next(iter(rows.values()))[0]))
    print("| row | seeds | " + " | ".join(titles) + " |")
    print("|---" * (len(titles) + 2) + "|")
    for row, readings in rows.items():
        cells = [row, ", ".join(str(reading["seed"]) for reading in readings)]
        for title in titles:
            values = [columns(reading)[title] for reading in readings]
            half = (max(values) - min(values)) / 2
            cells.append(f"{mean(values):.3g}" + (f" ± {half:.2g}" if half else ""))
        print("| " + " | ".join(cells) + " |")


def print_verdict(rows):
    """The paper's claim: tuning KL alone does not reach the point of VE."""
    def point(row):
        readings = [columns(reading) for reading in rows[row]]
        titles = ("PSNR, dB", "PSNR at 0.5")
        return [mean(reading[title] for reading in readings) for title in titles]

    psnr, noisy = point("ve")
    for row in rows:
        if row == "ve":
            continue
        its_psnr, its_noisy = point(row)
        reached = "reaches" if its_psnr >= psnr and its_noisy >= noisy else "does not reach"
        print(f"{row} {reached} VE's point: {its_psnr - psnr:+.1f} dB, under noise of half a "
              f"deviation {its_noisy - noisy:+.1f} dB")


def draw(rows, path):
    """PSNR over the noise on the latents, in their deviations: a line per row, mean over seeds."""
    w, h = 640, 420
    im = Image.new("RGB", (w, h), "white")
    pen = ImageDraw.Draw(im)
    font = ImageFont.load_default(13)
    curves = {}
    for row, readings in rows.items():
        noise = [reading["latents"]["psnr_under_noise"] for reading in readings]
        curves[row] = {float(x): mean(curve[x] for curve in noise) for x in noise[0]}
    low = math.floor(min(min(curve.values()) for curve in curves.values()))
    high = math.ceil(max(max(curve.values()) for curve in curves.values()))

    def point(x, y):
        return 50 + (w - 220) * x / 0.5, h - 45 - (h - 80) * (y - low) / max(1, high - low)

    for y in range(low, high + 1, 2):
        pen.line([point(0, y), point(0.5, y)], (225, 225, 225))
        pen.text((12, point(0, y)[1] - 8), f"{y} dB", "black", font)
    for x in (0, 0.1, 0.2, 0.3, 0.4, 0.5):
        pen.text((point(x, low)[0] - 8, h - 40), f"{x}", "black", font)
    pen.text((130, h - 22), "noise on the latents, in their deviations", "black", font)
    for i, (row, curve) in enumerate(curves.items()):
        pen.line([point(x, y) for x, y in curve.items()], COLORS[i], 3)
        pen.line([(w - 150, 40 + 22 * i), (w - 125, 40 + 22 * i)], COLORS[i], 3)
        pen.text((w - 118, 31 + 22 * i), row, "black", font)
    im.save(path)


# ---------------- main

def read(s):
    """{row: its readings, one per seed} of the lines in --readings that fit the settings."""
    rows = {row: [] for row in s.rows}
    if s.readings.exists():
        for line in data.read_jsonl(s.readings):
            fits = (line["steps"], line["dit_steps"]) == (s.steps, s.dit_steps)
            if fits and line["row"] in s.rows and line["seed"] in s.seeds:
                rows[line["row"]].append(line)
    for readings in rows.values():
        readings.sort(key=lambda reading: reading["seed"])
    return {row: readings for row, readings in rows.items() if readings}


def make_missing(s):
    there = {(line["row"], line["seed"]) for lines in read(s).values() for line in lines}
    missing = [(row, seed) for seed in s.seeds for row in s.rows if (row, seed) not in there]
    torch.set_num_threads(1)
    # Once, before there are threads: its weights come from PyTorch's global seed, which they share.
    trunk = losses.Perceptual("untrained")

    def make_one(pair):
        line = json.dumps(make(*pair, trunk, s))
        with open(s.readings, "a") as f:
            f.write(line + "\n")

    with ThreadPoolExecutor(s.together) as pool:
        list(pool.map(make_one, missing))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--readings", type=Path, help="[FOLDER/readings.jsonl]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=2400, help="of 04: twice the demo's")
    parser.add_argument("--dit-steps", type=int, default=1200, help="of 07; 0: without it")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--together", type=int, default=2, help="rows at once")
    parser.add_argument("--only-tell", action="store_true", help="make nothing, tell what is there")
    s = parser.parse_args()
    s.readings = s.readings or s.folder / "readings.jsonl"
    if not s.only_tell:
        if not (s.folder / "data").exists():
            data.stop(f"{s.folder} has no pictures: run 01_data.py --run {s.folder} first")
        make_missing(s)
    rows = read(s)
    if not rows:
        data.stop(f"{s.readings} has no line of these rows, seeds and steps")
    print_table(rows)
    if "ve" in rows:
        print_verdict(rows)
    s.folder.mkdir(parents=True, exist_ok=True)
    draw(rows, s.folder / "neighbors.png")


if __name__ == "__main__":
    main()
