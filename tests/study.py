"""What each cure does: train with all of them, and with all but one, on photographs.

    python tests/study.py ~/Pictures/many ~/Pictures/unseen runs/study

Seven rows, two seeds, several at a time: minutes on a large GPU, two hours on two cores. The same
command goes on where it stopped. 06 measures them on UNSEEN, RUNS/study.png shows what they make.
"""
import collections
import concurrent.futures
import functools
import importlib
import json
import multiprocessing
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from pictures import unhealthy

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
data, model, losses, training, evaluation = [importlib.import_module(name) for name in (
    "01_data", "02_model", "03_losses", "04_train_vae", "06_eval")]
SEEDS = (0, 1)
SIZE = 256
PIECE = 80  # side of what is shown magnified
DEVICE = "cpu"
JOBS = 2
RESIZE = 320
COMMON = "--preset demo --width 32 --crop 96 --batch 2 --steps 1200 --perceptual-net vgg"
if torch.cuda.is_available():
    DEVICE = "cuda"
    JOBS = 6
    RESIZE = 480
    COMMON = ("--preset small --no-compile --batch 4 --workers 2 --steps 600 --lr 5e-4 "
              "--muon-lr 5e-3 --lr-decay 1")
ROWS = {"all": "", "spatial": "--decoder-norm group", "reflect": "--padding zeros",
        "adversarial": "--lambda-adv 0.1", "kl": "--lambda-kl 1e-3"}
ROWS["none"] = " ".join(ROWS.values())
ROWS["kl.01"] = "--lambda-kl 1e-2"  # because 1e-3 is too little for blur to show
# The row without the cure of each artifact.
ARTIFACTS = {"color shift": "adversarial", "grid": "adversarial", "blur": "kl.01",
             "corner": "reflect", "droplet": "spatial"}


def run(stage, *words):
    """A stage, with these words as its command line."""
    stage.main(data.parse_cli(stage.Settings, stage.PRESETS, "", [str(word) for word in words]))


def make(photos, unseen, runs, name):
    """Train a row with one seed, where it is not yet, and measure it: 06's numbers."""
    torch.set_num_threads(1)
    row, seed = name.split("-")
    folder = runs / name
    run(data, "--run", folder, "--images", photos, "--min-side", RESIZE, "--resize", RESIZE)
    run(training, "--run", folder, "--seed", seed, *COMMON.split(), *ROWS[row].split())
    (folder / "eval.json").unlink(missing_ok=True)
    run(evaluation, "--run", folder, "--images", unseen, "--size", SIZE, "--perceptual-net", "vgg")
    line, = json.loads((folder / "eval.json").read_text()).values()
    return line


def verdict(artifact, table):
    """Is each seed without the cure, or without any, worse than all with it? And the readings."""
    rows = (ARTIFACTS[artifact], "none", "all")
    readings = [[table[f"{row}-{seed}"][artifact] for seed in SEEDS] for row in rows]
    away = [[unhealthy(artifact, reading) for reading in row] for row in readings]
    shows = "does not show here"
    if min(away[1]) > max(away[2]):
        shows = "shows with no cure"
    if min(away[0]) > max(away[2]):
        shows = "shows"
    words = [" and ".join(f"{reading:.3g}" for reading in row) for row in readings]
    return [f"{artifact}: {shows}", f"{ROWS[rows[0]]} {words[0]}", *words[1:]]


@torch.no_grad()
def reconstructions(runs, row, pictures):
    vae = model.load_vae(runs / f"{row}-{SEEDS[0]}" / "vae.pt", DEVICE)
    done = [evaluation.autoencoder(vae, losses.from_uint8(x)[None]) for x in pictures]
    return [losses.to_uint8(x_hat)[0].float() for x_hat in done]


def worst_piece(artifact, x, without, none, cured):
    """(how much worse the meter gets, and the error in one piece without cure, top, left)"""
    ill = [unhealthy(artifact, evaluation.METERS[artifact](x[None], y[None]).item())
           for y in (without, none, cured)]
    worse = without if ill[0] > ill[2] else none
    errors = [y - x for y in (worse, cured)]
    if artifact in ("grid", "blur"):  # which are in the fine detail
        errors = [evaluation.fine(error) for error in errors]
    excess = errors[0].square() - errors[1].square()  # (3, side, side)
    excess = F.avg_pool2d(excess, PIECE, stride=8).mean(0)
    top, left = divmod(excess.argmax().item(), excess.shape[1])
    return max(ill[:2]) - ill[2], excess.max().item(), 8 * top, 8 * left


def draw(runs, pictures, table):
    """A row per artifact, of the picture that tells most, and of a piece of it."""
    rows = {*ARTIFACTS.values(), "none", "all"}
    done = {row: reconstructions(runs, row, pictures) for row in rows}
    tiles, captions = [], []
    for artifact, row in ARTIFACTS.items():
        found = []
        for i, views in enumerate(zip(pictures, done[row], done["none"], done["all"])):
            found.append((*worst_piece(artifact, *views), i, views))  # i decides a tie
        _, _, top, left, _, views = max(found)
        pieces = [view[:, top:top + PIECE, left:left + PIECE] for view in views]
        for tile in [*views, *pieces]:
            tiles.append(F.interpolate(tile[None], size=2 * PIECE, mode="area")[0].byte())
        captions += [*verdict(artifact, table), *[""] * 4]
    titles = ["original", "without its cure", "no cure", "all cures"] * 2
    data.save_sheet(runs / "study.png", tiles, 8, titles, captions)
    Image.open(runs / "study.png").quantize(256).save(runs / "study.png", optimize=True)


@torch.no_grad()
def print_norms(runs, pictures):
    """Fig. 3: the largest norm of activations over its layer's median, per level of the decoder."""
    for row in [f"{row}-{seed}" for row in ("all", "spatial") for seed in SEEDS]:
        vae = model.load_vae(runs / row / "vae.pt", DEVICE)
        peaks = collections.Counter()
        for x in pictures:
            z = vae.encode(losses.from_uint8(x)[None]).mu
            for layer, norms in evaluation.activation_norms(vae, z).items():
                level = layer[:4].strip(".")  # conv, mid, up.3, up.2, up.1, up.0
                peaks[level] = max(peaks[level], norms.max().item())
        print(row, {level: round(peak, 1) for level, peak in peaks.items()})


def main(photos, unseen, runs):
    runs = Path(runs)
    names = [f"{row}-{seed}" for seed in SEEDS for row in ROWS]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(JOBS, spawn) as pool:
        table = dict(zip(names, pool.map(functools.partial(make, photos, unseen, runs), names)))
    squares = [data.read_square(path, SIZE) for path in data.find_pictures(unseen)]
    # What is a str could not be read, as 06 has said.
    pictures = [x.float().to(DEVICE) for x in squares if torch.is_tensor(x)]
    draw(runs, pictures, table)
    print(evaluation.table(table.values()))
    print_norms(runs, pictures)


if __name__ == "__main__":
    main(*sys.argv[1:])
