"""The README's tables and picture on the five artifacts, from what the commands beside them left.
Run by hand, after 06_eval.py:

    python tests/study.py runs/photos runs/scenes

Reads STUDY/eval.json (rows named ROW-SEED/vae.pt), STUDY/ROW-0/vae.pt and STUDY/data/val. Prints
Markdown; writes STUDY/study.png for each, and study.csv beside the first.
"""
import argparse
import importlib
import json
import sys
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
data = importlib.import_module("01_data")
model = importlib.import_module("02_model")
losses = importlib.import_module("03_losses")
evaluation = importlib.import_module("06_eval")

# artifact: pairs of rows, before and after; the last pair that was trained is drawn
PAIRS = {
    "color shift": [("early", "base"), ("base", "all"), ("all", "long"), ("all", "05"),
                    ("adv-1", "all")],
    "grid": [("base", "grid"), ("adv-1", "all"), ("no-grid", "all")],
    "blur": [("base", "blur"), ("no-blur", "all"), ("kl-1e-2", "all")],
    "corner": [("base", "corner"), ("no-corner", "all")],
    "droplet": [("base", "droplet"), ("no-droplet", "all")],
}
ROWS = ("early", "base", "grid", "blur", "corner", "droplet", "all", "long", "05", "nearest",
        "direct", "no-grid", "no-blur", "no-corner", "no-droplet", "adv-1", "kl-1e-2")
DIGITS = {"psnr": 2, "ssim": 3, "lpips": 3} | dict.fromkeys(evaluation.METERS, 2) | {"blur": 3}


# ---------------------------------------------------------------- tables

def read(study):
    """{row: {seed: readings}} of STUDY/eval.json; the row "05" is "all" with its decoder
    finetuned."""
    rows = {}
    for readings in json.loads((study / "eval.json").read_text())["rows"]:
        path = Path(readings["name"])
        # 06 names a file by its folder only beside others of the same name.
        if len(path.parts) < 2:
            data.stop(f"{study}/eval.json has a row {path}: give 06_eval.py the files of two "
                      "seeds or more")
        row, _, seed = path.parts[-2].rpartition("-")
        if path.name == "vae_finetuned.pt":
            row = "05"
        rows.setdefault(row, {})[seed] = readings
    return {row: rows[row] for row in ROWS if row in rows}


def change(rows, artifact, before, after):
    """Readings before and after, and their difference seed by seed: mean (least to most)."""
    if before not in rows or after not in rows:
        return "not run"
    a = [rows[before][seed][artifact] for seed in sorted(rows[before])]
    b = [rows[after][seed][artifact] for seed in sorted(rows[after])]
    differences = [v - u for u, v in zip(a, b, strict=True)]
    d = DIGITS[artifact]
    return (f"{mean(a):.{d}f}, {mean(b):.{d}f}: {mean(differences):+.{d}f} "
            f"({min(differences):+.{d}f} to {max(differences):+.{d}f})")


def print_row(cells):
    print("| " + " | ".join(cells) + " |")


def print_head(cells):
    print_row(cells)
    print("|---" * len(cells) + "|")


def print_changes(studies):
    titles = [f"{study.name}: before, after: difference (least to most over seeds)"
              for study in studies]
    print_head(["meter", "rows: before, after", *titles])
    for artifact, pairs in PAIRS.items():
        for before, after in pairs:
            cells = [change(rows, artifact, before, after) for rows in studies.values()]
            if set(cells) != {"not run"}:
                print_row([artifact, f"{before}, {after}", *cells])


def print_readings(study, rows):
    print(f"\n{study.name}: means, and half the range over the seeds")
    print_head(["row", *DIGITS])
    for row, seeds in rows.items():
        cells = []
        for column, d in DIGITS.items():
            values = [readings[column] for readings in seeds.values()]
            half = (max(values) - min(values)) / 2
            cells.append(f"{mean(values):.{d}f} ± {half:.{d}f}")
        print_row([row, *cells])


def print_norms(study, rows):
    """Fig. 3 as a table; nothing where 06 ran with --latents 0."""
    key = "activation_max_over_median"
    shown = {row: rows[row] for row in ("base", "droplet", "no-droplet", "all") if row in rows}
    measured = [readings for seeds in shown.values() for readings in seeds.values()]
    if not measured or key not in measured[0]:
        return
    # The last block of each level, and both ends.
    inside = ("block.0", "block_1", "upsample")
    layers = [layer for layer in measured[0][key]
              if "attn" not in layer and not layer.endswith(inside)]
    print(f"\n{study.name}: largest activation norm over the median after each level of the "
          "decoder, first validation picture, means over the seeds")
    print_head(["row", *layers])
    for row, seeds in shown.items():
        means = [mean(readings[key][layer] for readings in seeds.values()) for layer in layers]
        print_row([row, *(f"{value:.1f}" for value in means)])


def csv(studies):
    """Every reading of every seed, as text."""
    lines = [",".join(["study", "row", "seed", *DIGITS])]
    for study, rows in studies.items():
        for row, seeds in rows.items():
            for seed, readings in seeds.items():
                cells = [f"{readings[column]:.5g}" for column in DIGITS]
                lines.append(",".join([study.name, row, seed, *cells]))
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- the picture

def draw(study, size):
    """A line for each artifact, seed 0: original, before, after, of the picture whose meter falls
    most; whole, then the piece whose error falls most."""
    pictures = data.val_crops(study, size, 48)              # (n, 3, size, size), uint8
    reconstructions = {}
    tiles = []
    labels = []
    for artifact, pairs in PAIRS.items():
        trained = [pair for pair in pairs if all(checkpoint(study, row).is_file() for row in pair)]
        if not trained:
            continue
        pair = trained[-1]
        for row in pair:
            if row not in reconstructions:
                reconstructions[row] = reconstruct(checkpoint(study, row), pictures)
        before, after = [reconstructions[row] for row in pair]
        falls = [reading(artifact, x, u) - reading(artifact, x, v)
                 for x, u, v in zip(pictures, before, after)]
        best = falls.index(max(falls))
        shown = [pictures[best], before[best], after[best]]
        tiles += shown + zoom(*shown)
        labels.append(f"{artifact}\n\n{pair[0]}\nto {pair[1]}")
    if tiles:
        titles = ["original", "before", "after"] * 2
        data.save_sheet(study / "study.png", tiles, 6, titles, labels)


def checkpoint(study, row):
    return study / f"{row}-0" / "vae.pt"


@torch.no_grad()
def reconstruct(path, pictures):
    """What a checkpoint makes of uint8 pictures, one at a time."""
    vae = model.load_vae(path)
    decoded = [vae.decode(vae.encode(losses.from_uint8(x[None])).mu) for x in pictures]
    return losses.to_uint8(torch.cat(decoded))


def reaction(name, reading):
    """Distance from the ideal in units of the healthy range: above 1 it is an artifact."""
    meter = evaluation.METERS[name]
    return abs(reading - meter.ideal) / abs(meter.edge - meter.ideal)


def read_meters(x, y):
    """{name: reading} of a batch of pictures in 0..255."""
    return {name: meter.read(meter.numbers(x, y).mean(dim=0)).item()
            for name, meter in evaluation.METERS.items()}


def reading(artifact, x, y):
    """The artifact's meter on one picture (3, h, w), as its distance from ideal."""
    readings = read_meters(x[None].float(), y[None].float())
    return reaction(artifact, readings[artifact])


def zoom(x, before, after):
    """The quarter of the side whose squared error falls most, of all three, magnified."""
    size = x.shape[1]
    side = size // 4
    step = size // 16
    fall = squared_error(x, before) - squared_error(x, after)
    fall = F.avg_pool2d(fall, side, step)[0]
    row, column = divmod(int(fall.argmax()), fall.shape[1])
    top = row * step
    left = column * step
    pieces = [picture[:, top:top + side, left:left + side] for picture in (x, before, after)]
    return [F.interpolate(piece[None], size=(size, size))[0] for piece in pieces]


def squared_error(x, y):
    return (y.float() - x.float()).square().mean(dim=0, keepdim=True)


# ---------------------------------------------------------------- main

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, help="run folders")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures drawn [128]")
    a = parser.parse_args()
    studies = {folder: read(folder) for folder in a.studies}
    print_changes(studies)
    for study, rows in studies.items():
        print_readings(study, rows)
        print_norms(study, rows)
        draw(study, a.size)
    data.write_text(a.studies[0].parent / "study.csv", csv(studies))


if __name__ == "__main__":
    main()
