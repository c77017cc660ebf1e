"""Stage 3 of VIVAT: the four losses and their sum.

Reads   RUN/data/val (01_data.py), a few pictures to damage.
Writes  RUN/artifacts.png; prints L2, LPIPS and PSNR of Sec. 4's five at three strengths.
Paper   Sec. 3.1 (Eq. 2-7), Sec. 4 (the artifacts), Table 3.

    python 03_losses.py --preset demo

Pictures x and x_hat are (b, 3, h, w) in [-1, 1]. All losses are means, also over the batch: KL and
L2 over elements, GAN over logits, LPIPS over the positions of each layer. Eq. 3 and 4 print sums.
Why means? Eq. 1 with a Gaussian p(x|z) of mean x_hat and variance v is, up to a constant,
    -|x - x_hat|^2 / (2 v) - KL,               to be maximized. Times -2 v:
    |x - x_hat|^2 + 2 v KL,                    to be minimized: Eq. 7, if both terms are sums.
A picture has N = 3 h w values and J = N / 12 latents (f = 8, 16 channels: 16 / (3 * 8 * 8)).
Divided by N both terms become means:
    mean (x - x_hat)^2 + 2 v / 12 * mean KL.
So lambda_kl is 2 v if both are sums, and v / 6 if both are means. sqrt(v) is the error of a pixel
that the model takes for noise: fainter details cost more KL than they save in L2, so they are
dropped. As a PSNR, for values in a range of 2, that is 10 log10(2^2 / v):
    lambda_kl                        if sums              if means
    1e-4 (Table 3)                   49 dB                38 dB
    1e-3 (Sec. 5.2: ten times more)  39 dB, invisible     28 dB, a visible blur
The paper saw a blur that ten times less cured. That fits means (LPIPS and GAN left aside).
MoVQGAN's code takes means, too: LPIPS's weight is 0.1, as in Table 3, GAN's 0.1, ten times more.
"""
import importlib
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import lpips
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms.v2.functional import gaussian_blur

data = importlib.import_module("01_data")


# ---- settings

@dataclass(frozen=True)
class Settings(data.Run):
    crop: int = 240  # Sec. 5.1: a crop of 240 x 240
    # "untrained" needs no download
    perceptual_net: Literal["vgg", "alex", "untrained"] = "vgg"  # not in the paper: LPIPS's choice


PRESETS = {"paper": {}, "small": {}, "demo": dict(perceptual_net="untrained", crop=64)}


# ---- KL divergence, reconstruction

def kl_values(mu, logvar):  # KL to N(0, I), Eq. 2, in Eq. 3's form
    """Nats of each latent value; mu and logvar (b, k, h/f, w/f)."""
    return -0.5 * (1 + logvar - mu.square() - logvar.exp())


def kl_loss(mu, logvar):
    return kl_values(mu, logvar).mean()  # not in the paper: a mean (top); Eq. 3 sums over j


def recon_loss(x, x_hat):  # L2 reconstruction, Eq. 4
    return (x - x_hat).square().mean()  # not in the paper: a mean (top); Eq. 4 prints a sum


def psnr(x, x_hat):
    """Peak signal-to-noise ratio of each picture in dB, (b,), in 8 bits; 100 for an exact copy."""
    error = to_uint8(x).float() - to_uint8(x_hat).float()
    return (10 * torch.log10(255 ** 2 / error.square().mean((1, 2, 3)))).clamp(max=100)


def from_uint8(x):
    """0..255 to [-1, 1]."""
    return x.float() / 127.5 - 1


def to_uint8(x):
    """[-1, 1] to the 0..255 of a file."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte()


# ---- perceptual loss

class Perceptual(nn.Module):  # Eq. 6
    """LPIPS from the lpips package, mean over pictures, with a gradient that is finite everywhere.
    "untrained" is a random AlexNet without LPIPS's weights, for trying things out."""
    def __init__(self, net="vgg"):
        super().__init__()
        files = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}
        self.trained = net in files
        needed = (f"LPIPS needs https://download.pytorch.org/models/{files.get(net)} in "
                  f"{torch.hub.get_dir()}/checkpoints, or another --perceptual-net")
        # lpips calls torchvision by old names
        with warnings.catch_warnings(action="ignore"), torch.random.fork_rng(), data.needs(needed):
            torch.manual_seed(0)
            self.lpips = lpips.LPIPS(net=net if self.trained else "alex", lpips=self.trained,
                                     pretrained=self.trained, pnet_rand=not self.trained,
                                     verbose=False)
        self.eval().requires_grad_(False)

    def features(self, x):
        """Of each layer, features (b, c, h', w') of unit length at each position."""
        # The package divides by sqrt(sum) + 1e-10, whose gradient is NaN where a feature is zero
        # in all channels. So the 1e-10 goes under the root.
        return [f / (f.square().sum(1, keepdim=True) + 1e-10).sqrt()
                for f in self.lpips.net(self.lpips.scaling_layer(x))]

    def forward(self, x, x_hat):
        total = 0.0
        for i, (f, f_hat) in enumerate(zip(self.features(x), self.features(x_hat))):
            # not in the paper: Eq. 6 prints an L1 norm at one l; LPIPS sums squares over all l
            difference = (f - f_hat).square()  # (b, c, h', w')
            if self.trained:
                difference = self.lpips.lins[i](difference)  # weighs channels: (b, 1, ., .)
            total = total + difference.sum(1).mean()
        return total


# ---- adversarial pair

class Discriminator(nn.Module):
    """PatchGAN: pictures (b, 3, h, w) to one logit per patch (b, 1, h', w'); positive is real."""
    # not in the paper: PatchGAN, width and layers, as in MoVQGAN; it judges patches of 34 x 34
    def __init__(self, width=64, layers=2, channels=3):
        super().__init__()
        blocks = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        c = width
        for i in range(1, layers + 1):
            c_in = c
            c = width * min(2 ** i, 8)
            stride = 2 if i < layers else 1
            # not in the paper: GroupNorm for the base code's BatchNorm, so that the verdict on a
            # picture does not depend on the batch
            blocks += [nn.Conv2d(c_in, c, 4, stride=stride, padding=1, bias=False),
                       nn.GroupNorm(math.gcd(c, 8), c), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*blocks, nn.Conv2d(c, 1, 4, padding=1))
        for conv in self.main:
            if isinstance(conv, nn.Conv2d):
                nn.init.normal_(conv.weight, 0.0, 0.02)  # not in the paper: MoVQGAN

    def forward(self, x):
        return self.main(x)


def adversarial_loss(fake, kind="hinge"):  # Eq. 5
    """What the VAE minimizes, from the discriminator's logits of x_hat.

    "log" is Eq. 5 as printed, log(1 - D(x_hat)) with D = sigmoid(logit). Its gradient in the logit,
    -D, vanishes where D is sure that x_hat is false, and from step 0 on it soon is. So the default
    is the base code's hinge form, whose gradient is constant.
    """
    if kind == "hinge":
        return -fake.mean()
    return -F.softplus(fake).mean()  # log(1 - sigmoid(l)) = -softplus(l)


def discriminator_loss(real, fake, kind="hinge"):
    """What the discriminator minimizes, from its logits of x and of x_hat."""
    # not in the paper: which loss; as in VQGAN, with its factor 0.5
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


# ---- the whole

def total_loss(kl, recon, adv, perc, s):  # Eq. 7
    """s has the weights of Table 3."""
    return s.lambda_kl * kl + s.lambda_recon * recon + s.lambda_adv * adv + s.lambda_perc * perc


# ---- a neighbor: Variance Expansion, in KL's place
# Not in VIVAT: pass over it on a first reading.

# arXiv 2603.21085; delta is "tiny" there, hold_weight its lambda_2 in units of lambda_1
def variance_expansion(z, logvar, delta=1e-6, tau=1.0, hold_weight=1e-5):
    """Both (b, k, h/f, w/f), in FP32; z is the sample. Reconstruction would shrink sigma to 0:
    1 / sigma^2 resists. z could also grow to drown the noise: exp(|z| - tau) stops that."""
    expand = 1 / (logvar.exp() + delta)  # Eq. 9
    hold = (z.abs() - tau).clamp(max=30).exp()  # Eq. 10; clamped against overflow
    return expand.mean() + hold_weight * hold.mean()  # Eq. 11


# ---- the artifacts of Sec. 4, made
# not in the paper: how; forms and sizes are chosen by eye

def tint(x, strength):
    """Color shift: all of the picture moves towards yellow (Fig. 2b)."""
    return x + strength * x.new_tensor([0.2, 0.15, -0.3])[:, None, None]


def grid(x, strength):
    """Grid: lines with the period of a latent, 8 pixels (Fig. 2c)."""
    lines = torch.zeros_like(x)
    lines[:, :, ::8] = 1
    lines[..., ::8] = 1
    return x - strength * 0.5 * lines


def blur(x, strength):
    """Blur: a Gaussian of up to 3 pixels (Fig. 2d)."""
    return gaussian_blur(x, [19, 19], [3.0 * strength, 3.0 * strength])


def border(x, strength):
    """Corner artifact: a frame of blur, 16 pixels wide (Fig. 2e), here darker too, to be seen."""
    inside = torch.zeros_like(x)
    inside[..., 8:-8, 8:-8] = 1
    mask = 1 - gaussian_blur(inside, [17, 17], [3.0, 3.0])  # 1 at the edge, 0 from 16 px on
    return x + strength * mask * (gaussian_blur(x, [31, 31], [8.0, 8.0]) - 0.5 - x)


def droplet(x, strength):
    """Droplet: an isolated bright spot, where activations grew too large (Fig. 2f and 3)."""
    h, w = x.shape[2:]
    dy = torch.arange(h, device=x.device)[:, None] - 0.3 * h
    dx = torch.arange(w, device=x.device) - 0.6 * w
    spot = torch.exp(-(dy.square() + dx.square()) / (2 * (h / 40 + 1) ** 2))  # (h, w)
    return x + strength * 1.5 * spot


ARTIFACTS = {"color shift": tint, "grid": grid, "blur": blur, "corner": border, "droplet": droplet}


# ---- main

@torch.no_grad()
def main(s):
    device = data.pick_device(s)
    x = from_uint8(data.val_crops(s.run, s.crop, 16).to(device))
    perceptual = Perceptual(s.perceptual_net).to(device)
    measure = "LPIPS" if perceptual.trained else "untrained"
    print(f"{'artifact':14}{'strength':>9}{'L2':>12}{measure:>12}{'PSNR, dB':>10}")
    tiles = []
    for name, artifact in ARTIFACTS.items():
        tiles.append(to_uint8(x[0]))
        for strength in (0.25, 0.5, 1.0):
            y = artifact(x, strength)
            print(f"{name:14}{strength:9.2f}{recon_loss(x, y):12.5f}{perceptual(x, y):12.5f}"
                  f"{psnr(x, y).mean():10.2f}")
            tiles.append(to_uint8(y[0]))
    data.save_sheet(Path(s.run, "artifacts.png"), tiles, 4, ["original", "0.25", "0.5", "1"])


if __name__ == "__main__":
    data.start(main, Settings, PRESETS, __doc__)
