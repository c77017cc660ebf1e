"""The README's tables and picture on the five artifacts, from what the commands beside them left. Run by hand, after 06_eval.py.

    python tests/study.py runs/photos runs/scenes

Reads STUDY/eval.json (rows named ROW-SEED/vae.pt), STUDY/ROW-0/vae.pt, STUDY/data/val; prints Markdown; writes STUDY/study.png for each, and study.csv beside their folders.
"""
import importlib
import json
import sys
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
data, model, losses, evaluation = (importlib.import_module(n) for n in ("01_data", "02_model", "03_losses", "06_eval"))

# artifact: pairs of rows, before and after; the last one that was trained is drawn
PAIRS = {
    "color shift": [("early", "base"), ("base", "all"), ("all", "long"), ("all", "05"), ("adv-1", "all")],
    "grid": [("base", "grid"), ("adv-1", "all"), ("no-grid", "all")],
    "blur": [("base", "blur"), ("no-blur", "all"), ("kl-1e-2", "all")],
    "corner": [("base", "corner"), ("no-corner", "all")],
    "droplet": [("base", "droplet"), ("no-droplet", "all")],
}
ROWS = "early base grid blur corner droplet all long 05 nearest direct no-grid no-blur no-corner no-droplet adv-1 kl-1e-2".split()
COLUMNS = {"psnr": 2, "ssim": 3, "lpips": 3} | {name: 3 if name == "blur" else 2 for name in evaluation.METERS}     # and their digits


def read(study):
    """{row: {seed: readings}} of STUDY/eval.json; the row "05" is "all" with its decoder finetuned."""
    rows = {}
    for r in json.loads((study / "eval.json").read_text())["rows"]:
        folder, file = Path(r["name"]).parts[-2:]
        row, _, seed = folder.rpartition("-")
        rows.setdefault("05" if file == "vae_finetuned.pt" else row, {})[seed] = r
    return {row: rows[row] for row in ROWS if row in rows}


def change(rows, artifact, before, after):
    """Readings before and after, and their difference seed by seed: mean (least to most)."""
    if before not in rows or after not in rows:
        return "not run"
    a, b = ([rows[row][seed][artifact] for seed in sorted(rows[row])] for row in (before, after))
    differences, d = [v - u for u, v in zip(a, b, strict=True)], COLUMNS[artifact]
    return f"{mean(a):.{d}f}, {mean(b):.{d}f}: {mean(differences):+.{d}f} ({min(differences):+.{d}f} to {max(differences):+.{d}f})"


def print_tables(studies):
    line = lambda cells: print("| " + " | ".join(cells) + " |")
    head = lambda cells: (line(cells), print("|---" * len(cells) + "|"))
    head(["meter", "rows: before, after", *(f"{study.name}: before, after: difference (least to most over seeds)" for study in studies)])
    for artifact, pairs in PAIRS.items():
        for before, after in pairs:
            cells = [change(rows, artifact, before, after) for rows in studies.values()]
            if set(cells) != {"not run"}:
                line([artifact, f"{before}, {after}", *cells])
    for study, rows in studies.items():
        print(f"\n{study.name}: means, and half the range over the seeds")
        head(["row", *COLUMNS])
        for row, seeds in rows.items():
            cells = [torch.tensor([r[c] for r in seeds.values()]) for c in COLUMNS]
            line([row, *(f"{v.mean():.{d}f} ± {(v.max() - v.min()) / 2:.{d}f}" for v, d in zip(cells, COLUMNS.values()))])
        layers = [n for n in rows["base"]["0"].get("activation_max_over_median", {}) if "attn" not in n and not n.endswith(("block.0", "block_1", "upsample"))]
        print(f"\n{study.name}: largest activation norm over the median after each level of the decoder, first validation picture, means over the seeds")
        head(["row", *layers])
        for row in [row for row in ("base", "droplet", "no-droplet", "all") if row in rows]:
            line([row, *(f"{mean([r['activation_max_over_median'][n] for r in rows[row].values()]):.1f}" for n in layers)])


@torch.no_grad()
def draw(study, size=128):
    """A line an artifact: original, before, after; whole, then the piece whose error falls most. Seed 0; the picture whose meter falls most."""
    pictures, seen, tiles, labels = data.val_crops(study, size, 48), {}, [], []                             # (n, 3, size, size), uint8
    for artifact, pairs in PAIRS.items():
        pair = [p for p in pairs if all((study / f"{row}-0" / "vae.pt").is_file() for row in p)][-1]
        for row in set(pair) - seen.keys():
            vae = model.load_vae(study / f"{row}-0" / "vae.pt")
            seen[row] = torch.cat([losses.to_uint8(vae.decode(vae.encode(losses.from_uint8(x[None])).mean)) for x in pictures])
        before, after = (seen[row] for row in pair)
        reaction = lambda x, y: evaluation.reaction(artifact, evaluation.read_meters(x[None].float(), y[None].float())[artifact])
        fall = torch.tensor([reaction(x, u) - reaction(x, v) for x, u, v in zip(pictures, before, after)])
        x, u, v = (p[int(fall.argmax())] for p in (pictures, before, after))
        error = lambda y: (y.float() - x.float()).square().mean(dim=0, keepdim=True)
        gain = F.avg_pool2d(error(u) - error(v), size // 4, size // 16)[0]
        top, left = (int(n) * (size // 16) for n in divmod(int(gain.argmax()), gain.shape[1]))
        zoom = lambda t: F.interpolate(t[None, :, top:top + size // 4, left:left + size // 4], size=(size, size))[0]
        tiles += [x, u, v, zoom(x), zoom(u), zoom(v)]
        labels.append(f"{artifact}\n\n{pair[0]}\nto {pair[1]}")
    data.save_sheet(study / "study.png", tiles, 6, titles=["original", "before", "after"] * 2, rows=labels)


if __name__ == "__main__":
    studies = {Path(name): read(Path(name)) for name in sys.argv[1:]}
    print_tables(studies)
    lines = [",".join(["study", "row", "seed", *COLUMNS])]
    for study, rows in studies.items():
        lines += [",".join([study.name, row, seed, *(f"{r[c]:.5g}" for c in COLUMNS)]) for row, seeds in rows.items() for seed, r in seeds.items()]
        draw(study)
    data.write_aside(study.parent / "study.csv", lambda f: f.write(("\n".join(lines) + "\n").encode()))
