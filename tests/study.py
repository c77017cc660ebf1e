"""What each cure does: train with all of them, and with all but one, on photographs.

    python tests/study.py ~/Pictures/many ~/Pictures/unseen runs/study

Twelve rows, two at a time, a thread each: 25 minutes each. The same command goes on where it
stopped; a finished row takes seconds. Then 06 measures all of them on the unseen pictures, and
RUNS/study.png shows each artifact where its cure is left out. LPIPS needs VGG16.
"""
import concurrent.futures
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
data, model, losses, evaluation = [importlib.import_module(name) for name in (
    "01_data", "02_model", "03_losses", "06_eval")]
SEEDS = (0, 1)
SIZE = 256
COMMON = "--width 32 --crop 128 --batch 2 --steps 1500 --perceptual-net vgg"
ROWS = {"all": "", "spatial": "--decoder-norm group", "reflect": "--padding zeros",
        "adversarial": "--lambda-adv 0.1", "kl": "--lambda-kl 1e-3"}
ROWS["none"] = " ".join(ROWS.values())
# The row without the cure of each artifact. That of the color shift is training, the smallest part.
ARTIFACTS = {"color shift": "none", "grid": "adversarial", "blur": "kl", "corner": "reflect",
             "droplet": "spatial"}


def run(script, *words):
    """A stage in a process of its own, on one thread."""
    command = [sys.executable, str(ROOT / script), "--preset", "demo", *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})


def train(runs, row, seed):
    folder = runs / f"{row}-{seed}"
    folder.mkdir(exist_ok=True)
    if not (folder / "data").exists():
        (folder / "data").symlink_to((runs / "data").resolve())
    run("04_train_vae.py", "--run", folder, "--seed", seed, *COMMON.split(), *ROWS[row].split())


def read_rows(runs):
    """{(row, seed): numbers} from eval.json."""
    measured = json.loads((runs / "eval.json").read_text()).values()
    return {tuple(Path(line["name"]).parent.name.split("-")): line for line in measured}


def distance(artifact, line):
    """Of a meter's reading from the ideal; above 1 only for the corner."""
    ideal = {"color shift": 0, "droplet": 0}.get(artifact, 1)
    away = line[artifact] - ideal
    return max(away, 0) if artifact == "corner" else abs(away)


def verdicts(artifact, table):
    """Whether each seed without the cure is worse than all with it, and the meter's readings."""
    lines = {row: [table[row, str(seed)] for seed in SEEDS] for row in (ARTIFACTS[artifact], "all")}
    without, cured = lines.values()
    worse = (min(distance(artifact, line) for line in without)
             > max(distance(artifact, line) for line in cured))
    readings = [" ".join(f"{line[artifact]:.3g}" for line in row) for row in (without, cured)]
    return [f"{artifact}: " + ("it shows" if worse else "does not show here"), *readings]


@torch.no_grad()
def reconstructions(runs, row, pictures):
    vae = model.load_vae(runs / f"{row}-{SEEDS[0]}" / "vae.pt")
    return [losses.to_uint8(vae.decode(vae.encode(losses.from_uint8(x)[None]).mu))[0]
            for x in pictures]


def worst_piece(x, without, cured, side=64):
    """Where the error without the cure exceeds that with it most: (how much, top, left)."""
    error = [(y.float() - x.float()).square().mean(0) for y in (without, cured)]
    excess = F.avg_pool2d((error[0] - error[1])[None, None], side, stride=8)[0, 0]
    top, left = divmod(excess.argmax().item(), excess.shape[1])
    return excess.max().item(), 8 * top, 8 * left


def draw(runs, pictures, table):
    """A row per artifact: the picture, without the cure, with all; and a piece of each."""
    done = {row: reconstructions(runs, row, pictures) for row in set(ARTIFACTS.values()) | {"all"}}
    tiles, captions = [], []
    for artifact, row in ARTIFACTS.items():
        found = [(*worst_piece(x, *pair), i) for i, (x, *pair) in enumerate(
            zip(pictures, done[row], done["all"]))]
        _, top, left, i = max(found)
        views = [pictures[i], done[row][i], done["all"][i]]
        pieces = [v[:, top:top + 64, left:left + 64] for v in views]
        for tile in views + pieces:
            tiles.append(F.interpolate(tile[None].float(), size=160, mode="area")[0].byte())
        captions += [*verdicts(artifact, table), "", "", ""]
    titles = ["original", "without its cure", "all four cures", "a piece of it", "without", "all"]
    data.save_sheet(runs / "study.png", tiles, 6, titles, captions)
    Image.open(runs / "study.png").quantize(256).save(runs / "study.png", optimize=True)


@torch.no_grad()
def print_norms(runs, picture):
    """Fig. 3: per layer of the decoder, the largest norm of activations over the median."""
    for row in ("all", "spatial"):
        vae = model.load_vae(runs / f"{row}-{SEEDS[0]}" / "vae.pt")
        norms = evaluation.activation_norms(vae, vae.encode(losses.from_uint8(picture)[None]).mu)
        print(row, " ".join(f"{name} {v.max():.1f}" for name, v in norms.items()))


def main(photos, unseen, runs):
    runs = Path(runs)
    runs.mkdir(parents=True, exist_ok=True)
    run("01_data.py", "--run", runs, "--images", photos, "--min-side", 320, "--resize", 320)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(train, runs, row, seed) for seed in SEEDS for row in ROWS]
    for job in jobs:
        job.result()  # raises what it raised
    files = [runs / f"{row}-{seed}" / "vae.pt" for seed in SEEDS for row in ROWS]
    run("06_eval.py", "--run", runs, "--images", unseen, "--size", SIZE, "--perceptual-net", "vgg",
        "--vae", *files)
    table = read_rows(runs)
    pictures = [data.read_square(path, SIZE) for path in data.find_pictures(unseen)]
    draw(runs, pictures, table)
    print_norms(runs, pictures[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
