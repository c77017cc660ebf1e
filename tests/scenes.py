"""Does a text-to-image run follow its prompts? Scenes can be read by fixed rules, no network:

    python tests/scenes.py runs/demo

draws the 80 prompts for pairs of color and shape that were never trained on, from RUN/dit.pt, and
prints how many pictures show the prompt's color, shape, pattern, ground, and all four.
"""
import importlib
import itertools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
data = importlib.import_module("01_data")
model = importlib.import_module("02_model")
dit = importlib.import_module("07_train_dit")
COLORS = list(data.COLORS)


def read_scene(picture):
    """(color, shape, pattern, ground) that a square scene, uint8 (3, side, side), shows."""
    x = picture.float() / 255
    side = x.shape[-1]
    palette = torch.tensor(list(data.COLORS.values())) / 255  # (6, 3)
    hues = chroma(*palette.T)
    # The index of the color whose hue is nearest: (side, side)
    label = (chroma(*x)[..., None] * (hues / hues.abs()).conj()).real.argmax(-1)
    margin = side // 12
    frame = torch.ones(side, side, dtype=torch.bool)
    frame[margin:-margin, margin:-margin] = False
    ground = int(label[frame].mode().values)
    # The figure is what is not ground, less a pixel, because edges mix hues.
    figure = F.max_pool2d((label == ground).float()[None], 3, 1, 1)[0] == 0
    color = int(label[figure].mode().values) if figure.any() else ground
    shape = read_shape((label == color) & (label != ground))
    pattern = read_pattern(x.mean(0) / palette[ground].mean(), label == ground)
    return COLORS[color], shape, pattern, COLORS[ground]


def chroma(r, g, b):
    """A complex number whose angle is the hue."""
    return torch.complex(r - (g + b) / 2, 3 ** 0.5 / 2 * (g - b))


def read_shape(figure):
    """The shape that covers a mask (side, side) best, when laid over it a little turned, with the
    mask's own center and area."""
    if not figure.any():
        return "circle"
    y, x = torch.nonzero(figure).double().mean(0).tolist()
    best = {}
    for shape, turn in itertools.product(data.SHAPES, (-0.2, -0.1, 0.0, 0.1, 0.2)):
        count, halfway = data.SHAPES[shape]
        area = count * halfway * math.sin(math.pi / count)  # with radius 1
        radius = (figure.sum().item() / area) ** 0.5
        mask = data.draw_figure(shape, *figure.shape[::-1], x, y, radius, turn)
        overlap = (mask & figure).sum().item() / (mask | figure).sum().item()
        best[shape] = max(overlap, best.get(shape, 0))
    return max(best, key=best.get)


def read_pattern(brightness, ground):
    """One of PATTERNS. brightness (side, side), ground a mask of that shape."""
    # Dots cover 0.2 of the ground, checks and stripes 0.5; only stripes differ between columns.
    dark = (brightness < 0.83) & ground
    dark_share = dark.sum() / ground.sum().clamp(min=1)
    if dark_share < 0.05:
        return "plain"
    columns = ground.sum(0).clamp(min=1)
    spread = (columns * (dark.sum(0) / columns - dark_share).square()).sum() / columns.sum()
    if spread > 0.5 * dark_share * (1 - dark_share):
        return "striped"
    return "dotted" if dark_share < 0.33 else "checkered"


def prompts():
    """Every prompt for a pair that is held out: 80."""
    return [f"a {color} {shape} on a {pattern} {ground} background"
            for (color, shape), pattern, ground
            in itertools.product(data.HELD_OUT, data.PATTERNS, COLORS) if ground != color]


def main(run):
    checkpoint = model.read_checkpoint(Path(run, "dit.pt"))
    s = dit.Settings(**checkpoint["settings"])
    net = dit.DiT(data.pick(dit.Network, s)).eval()
    net.load_state_dict(checkpoint["ema"])
    vae = dit.finetuning.load_vae(checkpoint["vae"])
    right = []
    for picture, prompt in zip(dit.draw(net, vae, net.bytes, prompts(), s), prompts()):
        words = prompt.split()
        told = words[1], words[2], words[5], words[6]
        right.append([seen == wanted for seen, wanted in zip(read_scene(picture), told)])
    right = torch.tensor(right).float()  # (80, 4)
    for name, share in zip(("color", "shape", "pattern", "ground"), right.mean(0).tolist()):
        print(f"{name} {share:.2f}", end="  ")
    print(f"all four {right.prod(1).mean():.2f}")


if __name__ == "__main__":
    main(sys.argv[1])
