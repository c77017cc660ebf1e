"""Table 2 of the Variance Expansion paper in small: is there a KL weight that gives what VE gives?
Run by hand, beside a folder that 01_data.py filled:

    python 01_data.py --run runs/neighbors
    python tests/neighbors.py runs/neighbors --seeds 0 1 2

Trains 04 with each row's flags (what is finished stays), with --dit-steps 07 on its latents, then
measures all with 06. Prints Markdown; writes RUN/neighbors.png, PSNR over the noise on latents.
"""
import argparse
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import mean

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
data = importlib.import_module("01_data")

ROWS = {
    "kl-1e-6": ["--lambda-kl", "1e-6"],
    "kl-1e-4": [],
    "kl-1e-2": ["--lambda-kl", "1e-2"],
    "kl-1e-1": ["--lambda-kl", "1e-1"],
    "ve": ["--regularizer", "ve"],
    "kl-1e-2-warmup": ["--lambda-kl", "1e-2", "--kl-warmup", "1300"],
    "kl-1e-2-free": ["--lambda-kl", "1e-2", "--free-bits", "0.5"],
}
COLORS = ("#1f4e9c", "#4f9bd9", "#58a55c", "#8a6d3b", "#c0392b", "#9b59b6", "#888888")


def run(script, *flags):
    print("python", script, *flags, file=sys.stderr)
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)])
    if done.returncode:
        raise SystemExit(done.returncode)


def train(folder, s):
    """Each row and seed in a folder of its own."""
    for seed in s.seeds:
        for row in s.rows:
            own = folder / f"{row}-{seed}"
            own.mkdir(exist_ok=True)
            if not (own / "data").exists():
                (own / "data").symlink_to("../data")
            run("04_train_vae.py", "--run", own, "--seed", seed, "--steps", s.steps, *ROWS[row])
            if s.dit_steps:
                run("07_train_dit.py", "--run", own, "--seed", seed, "--steps", s.dit_steps)


def read(folder, s):
    """{row: [readings of each seed]}, as 06 has them, with 07's last shares."""
    files = {(row, seed): folder / f"{row}-{seed}" / "vae.pt" for row in s.rows for seed in s.seeds}
    run("06_eval.py", "--run", folder, "--pictures", s.pictures, "--vae", *files.values())
    readings = json.loads((folder / "eval.json").read_text())["rows"]
    rows = {row: [] for row in s.rows}
    for (row, _), file, reading in zip(files, files.values(), readings, strict=True):
        lines = [line for line in data.read_jsonl(file.parent / "log.jsonl") if "shape" in line]
        rows[row].append(reading | (lines[-1] if lines else {}))
    return rows


def columns(reading):
    """{title: number} of one row of the table."""
    latents = reading["latents"]
    noise = latents["psnr_under_noise"]
    numbers = {"PSNR, dB": reading["psnr"], "untrained features": reading["lpips"],
               "posterior variance": latents["posterior_variance"],
               "its share": latents["posterior_share"], "active channels": latents["active"]}
    numbers |= {f"PSNR at {strength}": noise[strength] for strength in ("0.1", "0.3", "0.5")}
    return numbers | {name: reading[name] for name in ("shape", "all four") if name in reading}


def print_table(rows):
    titles = list(columns(next(iter(rows.values()))[0]))
    print("| row | " + " | ".join(titles) + " |")
    print("|---" * (len(titles) + 1) + "|")
    for row, readings in rows.items():
        cells = []
        for title in titles:
            values = [columns(reading)[title] for reading in readings]
            half = (max(values) - min(values)) / 2
            cells.append(f"{mean(values):.3g}" + (f" ± {half:.2g}" if half else ""))
        print(f"| {row} | " + " | ".join(cells) + " |")


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


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=2600, help="twice the demo's")
    parser.add_argument("--dit-steps", type=int, default=0, help="steps of 07; 0: without it")
    parser.add_argument("--pictures", type=int, default=64)
    s = parser.parse_args()
    if not (s.folder / "data").exists():
        data.stop(f"{s.folder} has no pictures: run 01_data.py --run {s.folder} first")
    train(s.folder, s)
    rows = read(s.folder, s)
    print_table(rows)
    draw(rows, s.folder / "neighbors.png")


if __name__ == "__main__":
    main()
