"""What Sec. 5.1 says of three ways to a crop, in figures: a direct crop lacks detail, nearest-neighbor
resizing aliases, bicubic resizing and then a crop does neither. Run by hand:

    python tests/resizing.py --preset paper --images ~/Pictures

It takes the flags of 01_data.py, reads 16 pictures, prints a table and writes RUN/resizing.png.
"""
import importlib
import sys
from pathlib import Path

import torch
from torchvision.transforms import InterpolationMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
data = importlib.import_module("01_data")
losses = importlib.import_module("03_losses")
evaluation = importlib.import_module("06_eval")

WAYS = {"direct crop": None, "nearest, crop": InterpolationMode.NEAREST,
        "bicubic, crop": InterpolationMode.BICUBIC}


def main(s):
    """Print and draw the three ways; {way: (energy, energy over bicubic's, aliasing)}, medians.

    Energy is the power above half of the Nyquist frequency. An alias is a frequency that the small
    picture shows and the large one has not. It stays as a difference in what both must share: all
    below a quarter of the small one's Nyquist frequency.
    """
    units = list(range(s.count))
    if s.images != "synthetic":
        units = data.find_units(s.images)
    crop = min(losses.Settings.crop, s.resize // 2)
    rows = []
    tiles = []
    some = units[::max(1, len(units) // 16)]
    for _, parts in data.pictures(some, s.images, s.seed, s.min_side):
        try:
            full, _ = data.to_rgb(parts["picture"], s.min_side, s.max_pixels)
        except Exception:  # 01_data.py lists what is broken; passed over
            continue
        coarse = data.resize_shorter(full, s.resize // 4).float()
        small = [resized(full, how, s.resize) for how in WAYS.values()]
        crops = [data.center_crop(picture, crop) for picture in small]
        energies = [energy(picture) for picture in crops]
        aliasing = [alias(picture, coarse) for picture in small]
        rows.append([(e, e / energies[-1], a) for e, a in zip(energies, aliasing)])
        tiles += crops
        if len(rows) == 16:
            break
    if not rows:
        data.stop(f"--images {s.images}: no picture with a shorter side of {s.min_side} px or more "
                  "could be read")
    result = dict(zip(WAYS, torch.tensor(rows).median(dim=0).values.tolist()))
    print(f"Sec. 5.1 on {len(rows)} pictures, {crop} px crops, medians")
    print(f"{'':14}{'energy above Nyquist/2':>24}{'over bicubic':>14}{'aliasing, gray levels':>24}")
    for way, (power, ratio, aliased) in result.items():
        print(f"{way:14}{power:24.2f}{ratio:14.2f}{aliased:24.2f}")
    data.save_sheet(Path(s.run, "resizing.png"), tiles[:12], 3, titles=list(WAYS))
    return result


def resized(full, how, side):
    if how is None:
        return full
    return data.resize_shorter(full, side, how)


def energy(picture):
    gray = evaluation.gray(picture[None].float())[0]
    return evaluation.high_frequencies(gray).abs().square().sum().item()


def alias(picture, coarse):
    """What is left of `picture` against the original at the size of `coarse`, in gray levels."""
    small = data.resize_shorter(picture, min(coarse.shape[1:])).float()
    return (small - coarse).square().mean().sqrt().item()


if __name__ == "__main__":
    data.command_line(main, data.Settings, data.PRESETS, __doc__)
