"""What each cure does: train with all of them, and with all but one, on photographs.

    python tests/study.py ~/Pictures/many ~/Pictures/unseen runs/study

Seven rows, two seeds, two at a time on a thread each: two hours. The same command goes on
where it stopped. Then 06 measures them on UNSEEN, and RUNS/study.png shows each cure left out.
"""
import collections
import concurrent.futures
import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from pictures import unhealthy

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
data, model, losses, evaluation = [importlib.import_module(name) for name in (
    "01_data", "02_model", "03_losses", "06_eval")]
SEEDS = (0, 1)
SIZE = 256
PIECE = 80  # side of what is shown magnified
COMMON = "--width 32 --crop 96 --batch 2 --steps 1200 --perceptual-net vgg"
ROWS = {"all": "", "spatial": "--decoder-norm group", "reflect": "--padding zeros",
        "adversarial": "--lambda-adv 0.1", "kl": "--lambda-kl 1e-3"}
ROWS["none"] = " ".join(ROWS.values())
ROWS["kl.01"] = "--lambda-kl 1e-2"  # because 1e-3 is too little for blur to show
# The row without the cure of each artifact.
ARTIFACTS = {"color shift": "adversarial", "grid": "adversarial", "blur": "kl.01",
             "corner": "reflect", "droplet": "spatial"}


def run(script, *words):
    """A stage in a process of its own, on one thread."""
    command = [sys.executable, str(ROOT / script), "--preset", "demo", *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})


def train(runs, name):
    row, seed = name.split("-")
    folder = runs / name
    folder.mkdir(exist_ok=True)
    if not (folder / "data").exists():
        (folder / "data").symlink_to((runs / "data").resolve())
    run("04_train_vae.py", "--run", folder, "--seed", seed, *COMMON.split(), *ROWS[row].split())


def print_table(table):
    """What 06 measured, a row per training, seed by seed."""
    names = [name for name, value in table["all-0"].items() if type(value) is float]
    print("| row | " + " | ".join(names) + " |\n" + "|---" * (1 + len(names)) + "|")
    for row in ROWS:
        lines = [table[f"{row}-{seed}"] for seed in SEEDS]
        cells = [" / ".join(f"{line[name]:.3g}" for line in lines) for name in names]
        print("| " + " | ".join([row, *cells]) + " |")


def verdict(artifact, table):
    """Whether each seed without the cure is worse than all with it; the flag, and the readings."""
    rows = (ARTIFACTS[artifact], "none", "all")
    readings = [[table[f"{row}-{seed}"][artifact] for seed in SEEDS] for row in rows]
    away = [[unhealthy(artifact, reading) for reading in row] for row in readings]
    shows = "shows" if min(away[0]) > max(away[2]) else "does not show here"
    words = [" and ".join(f"{reading:.3g}" for reading in row) for row in readings]
    return [f"{artifact}: {shows}", f"{ROWS[rows[0]]} {words[0]}", *words[1:]]


@torch.no_grad()
def reconstructions(runs, row, pictures):
    vae = model.load_vae(runs / f"{row}-{SEEDS[0]}" / "vae.pt")
    return [losses.to_uint8(vae.decode(vae.encode(losses.from_uint8(x)[None]).mu))[0].float()
            for x in pictures]


def worst_piece(artifact, x, without, none, cured):
    """(how much worse the meter gets, and the error in one piece without the cure, top, left)"""
    ill = [unhealthy(artifact, evaluation.METERS[artifact](x[None], y[None]).item())
           for y in (without, none, cured)]
    errors = [y - x for y in (without, cured)]
    if artifact in ("grid", "blur"):  # which are in the fine detail
        errors = [evaluation.fine(error) for error in errors]
    excess = errors[0].square() - errors[1].square()  # (3, side, side)
    excess = F.avg_pool2d(excess, PIECE, stride=8).mean(0)
    top, left = divmod(excess.argmax().item(), excess.shape[1])
    return max(ill[:2]) - ill[2], excess.max().item(), 8 * top, 8 * left


def draw(runs, pictures, table):
    """A row per artifact: the picture that tells most, without the cure, with all; and pieces."""
    rows = {*ARTIFACTS.values(), "none", "all"}
    done = {row: reconstructions(runs, row, pictures) for row in rows}
    tiles, captions = [], []
    for artifact, row in ARTIFACTS.items():
        found = []
        for i, views in enumerate(zip(pictures, done[row], done["none"], done["all"])):
            found.append((*worst_piece(artifact, *views), i, views))  # i decides a tie
        _, _, top, left, _, views = max(found)
        pieces = [views[k][:, top:top + PIECE, left:left + PIECE] for k in (0, 1, 3)]
        for tile in [*views, *pieces]:
            tiles.append(F.interpolate(tile[None], size=2 * PIECE, mode="area")[0].byte())
        captions += [*verdict(artifact, table), "", "", ""]
    titles = ["original", "without its cure", "no cure", "all cures", "a piece", "without", "all"]
    data.save_sheet(runs / "study.png", tiles, 7, titles, captions)
    Image.open(runs / "study.png").quantize(256).save(runs / "study.png", optimize=True)


@torch.no_grad()
def print_norms(runs, pictures):
    """Fig. 3: the largest norm of activations over its layer's median, per level of the decoder."""
    for row in [f"{row}-{seed}" for row in ("all", "spatial") for seed in SEEDS]:
        vae = model.load_vae(runs / row / "vae.pt")
        peaks = collections.Counter()
        for x in pictures:
            z = vae.encode(losses.from_uint8(x)[None]).mu
            for layer, norms in evaluation.activation_norms(vae, z).items():
                level = layer[:4].strip(".")  # conv, mid, up.3, up.2, up.1, up.0
                peaks[level] = max(peaks[level], norms.max().item())
        print(row, {level: round(peak, 1) for level, peak in peaks.items()})


def main(photos, unseen, runs):
    runs = Path(runs)
    run("01_data.py", "--run", runs, "--images", photos, "--min-side", 320, "--resize", 320)
    names = [f"{row}-{seed}" for seed in SEEDS for row in ROWS]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(functools.partial(train, runs), names))  # raises what they raise
    files = [runs / name / "vae.pt" for name in names]
    run("06_eval.py", "--run", runs, "--images", unseen, "--size", SIZE, "--perceptual-net", "vgg",
        "--vae", *files)
    lines = json.loads((runs / "eval.json").read_text()).values()
    table = {Path(line["name"]).parent.name: line for line in lines}
    pictures = [data.read_square(path, SIZE).float() for path in data.find_pictures(unseen)]
    draw(runs, pictures, table)
    print_table(table)
    print_norms(runs, pictures)


if __name__ == "__main__":
    main(*sys.argv[1:])
