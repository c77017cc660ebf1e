"""A whole step of 04 beside the same losses on diffusers' modules of the same shapes, in turn:

    pip install diffusers && python tests/benchmark.py [--width 32 --crop 240 --batch 2 --pairs 9]

Both have a GroupNorm decoder with zero padding (which diffusers has), LPIPS on a VGG16 with random
weights, a discriminator, and Adam. Prints medians, and quartiles of how many times as fast ours is.
"""
import argparse
import importlib
import statistics
import sys
import time
import warnings
from pathlib import Path

import lpips
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
model = importlib.import_module("02_model")
losses = importlib.import_module("03_losses")
training = importlib.import_module("04_train_vae")


def random_vgg():
    perceptual = losses.Perceptual("untrained")
    with warnings.catch_warnings(action="ignore"):
        perceptual.lpips = lpips.LPIPS(net="vgg", lpips=False, pnet_rand=True, verbose=False)
    return perceptual.eval().requires_grad_(False)


class Theirs(torch.nn.Module):
    """diffusers' AutoencoderKL behind the call of 02's VAE."""
    def __init__(self, width):
        super().__init__()
        import diffusers
        self.net = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(width, 2 * width, 2 * width, 4 * width), layers_per_block=2,
            latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)

    def forward(self, x):
        q = self.net.encode(x).latent_dist
        z = q.sample()
        return self.net.decode(z).sample, q.mean, q.logvar, z


def stepper(vae, perceptual, s, device):
    """A function that does one step of 04 on a fixed batch."""
    disc = losses.Discriminator(s.disc_width)
    for module in (vae, disc, perceptual):
        module.to(device, memory_format=torch.channels_last)
    players = [list(vae.parameters()), list(disc.parameters())]
    optimizers = {str(i): torch.optim.Adam(weights, lr=1e-4, betas=(0.5, 0.9), fused=True)
                  for i, weights in enumerate(players)}
    x = torch.rand(s.batch, 3, s.crop, s.crop, device=device) * 2 - 1
    x = x.to(memory_format=torch.channels_last)

    def step():
        total, disc_loss, _ = training.compute_losses(x, vae, disc, perceptual, 1, s)
        training.add_gradients(total, disc_loss, *players)
        training.update(optimizers, 1.0)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(width=32, crop=240, batch=2, pairs=9).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    s = training.Settings(crop=a.crop, batch=a.batch)
    torch.manual_seed(0)
    ours = model.VAE(model.Architecture(width=a.width, attention_levels=(), padding="zeros",
                                        decoder_norm="group"))
    steps = [stepper(vae, random_vgg(), s, device) for vae in (ours, Theirs(a.width))]
    ratios = []
    seconds = [[], []]
    for pair in range(a.pairs + 1):
        for times, step in zip(seconds, steps):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        if pair > 0:  # the first warms up
            ratios.append(seconds[1][-1] / seconds[0][-1])
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{device}, {torch.get_num_threads()} threads, width {a.width}, {a.batch} x {a.crop} px: "
          f"ours {statistics.median(seconds[0][1:]):.3f} s, diffusers "
          f"{statistics.median(seconds[1][1:]):.3f} s a step; ours is {middle:.2f} times as fast "
          f"({low:.2f} to {high:.2f}, {a.pairs} pairs)")


if __name__ == "__main__":
    main()
