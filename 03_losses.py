"""Stage 3 of VIVAT: the four losses and their sum (Sec. 3.1, Eq. 2 to 7, Table 3).

Reads   RUN/data/val (01_data.py), a few pictures to damage.
Writes  RUN/artifacts.png and a table: the five artifacts of Sec. 4 at three strengths, and what
        each loss term says about them.
Paper   Sec. 3.1 (Eq. 2-7), Sec. 4 (the artifacts), Table 3.

    python 03_losses.py --preset demo

Pictures x and x_hat are (b, 3, h, w) in [-1, 1]. Every term is a mean over elements (over
positions for the discriminator). The paper does not say how terms are reduced, but only means fit
its weights. A Gaussian decoder of variance s^2 weighs the two sums as |x - x_hat|^2 + 2 s^2 KL.
With N = 3 h w pixel values and J = N / 12 latents (f = 8, 16 channels), lambda_kl = 1e-4 between
means is 2 s^2 = 12e-4, so s = 0.024: a noise floor of 38 dB. Ten times more, which the paper found
blurred, is 28 dB, visible indeed. Between sums 1e-3 would be 39 dB, no blur at all; and a mean
against a summed KL would leave nothing of the picture.
"""
import importlib
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms.v2.functional import gaussian_blur

data = importlib.import_module("01_data")
model = importlib.import_module("02_model")


# ---------------- settings

@dataclass(frozen=True)
class Losses:
    """The weights of Eq. 7 and what the terms are made of."""
    lambda_kl: float = 1e-4     # Table 3; Sec. 5.2, blur: ten times more blurs
    lambda_recon: float = 1.0   # Table 3
    lambda_adv: float = 0.01    # Table 3; Sec. 5.2, grid: lower is the cure
    lambda_perc: float = 0.1    # Table 3
    # "untrained" needs no download
    perceptual_net: Literal["vgg", "alex", "untrained"] = "vgg"  # not in the paper: as LPIPS says
    # Eq. 5 as printed is "log", see adversarial_loss
    gan_loss: Literal["hinge", "log"] = "hinge"  # not in the paper: the base code trains with hinge
    disc_width: int = 64        # not in the paper: as in MoVQGAN's discriminator
    disc_layers: int = 2        # not in the paper: as in MoVQGAN; it judges patches of 34 x 34


@dataclass(frozen=True)
class Settings(data.Run, Losses):
    crop: int = 240             # Sec. 5.1: a crop of 240 x 240
    steps: int = 150            # steps of a fresh discriminator between whole and damaged crops


PRESETS = {
    "paper": {},
    "small": {},
    "demo": dict(perceptual_net="untrained", disc_width=24, crop=64),
}


# ---------------- KL divergence, reconstruction

def kl_loss(mu, logvar):  # KL to N(0, I), Eq. 2, in Eq. 3's form
    """Nats per latent value; mu and logvar (b, k, h/f, w/f)."""
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).mean()


def recon_loss(x, x_hat):  # L2 reconstruction, Eq. 4
    return (x - x_hat).square().mean()


def psnr(x, x_hat):
    """Peak signal-to-noise ratio of each picture in dB, (b,), between the 8 bits of a file."""
    error = to_uint8(x).float() - to_uint8(x_hat).float()
    return 10 * torch.log10(255 ** 2 / error.square().mean(dim=(1, 2, 3)))


def from_uint8(x):
    """0..255 to [-1, 1]."""
    return x.float() / 127.5 - 1


def to_uint8(x):
    """[-1, 1] to the 0..255 of a file."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte()


# ---------------- perceptual loss

class Perceptual(nn.Module):  # Eq. 6, as LPIPS
    """LPIPS from the lpips package, mean over pictures, with a gradient that is finite everywhere.

    Always in eval mode: LPIPS has dropout before its linear layers, and a parent's .train() would
    switch it on. "untrained" is a random AlexNet with a fixed seed and without the linear layers:
    for trying things out, not a perceptual distance.
    """
    def __init__(self, net="vgg"):
        super().__init__()
        import lpips
        files = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}
        trained = net in files
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")  # lpips calls torchvision by old names
            torch.manual_seed(0)
            try:
                self.lpips = lpips.LPIPS(net=net if trained else "alex", lpips=trained,
                                         pretrained=trained, pnet_rand=not trained, verbose=False)
            except Exception as error:  # no network, a cut-off file: many kinds
                url = f"https://download.pytorch.org/models/{files.get(net)}"
                folder = f"{torch.hub.get_dir()}/checkpoints"
                data.stop(f"LPIPS needs {files.get(net)} ({type(error).__name__}): put {url} into "
                          f"{folder}, or set TORCH_HOME, or choose another --perceptual-net")
        self.requires_grad_(False).train(False)

    def train(self, mode=True):
        return super().train(False)

    @staticmethod
    def unit_length(f):
        # The package divides by sqrt(sum) + 1e-10. At a feature that is zero everywhere that is
        # finite, but its gradient is NaN. So the 1e-10 goes under the root.
        return f / (f.square().sum(1, keepdim=True) + 1e-10).sqrt()

    def features(self, x):
        return [self.unit_length(f) for f in self.lpips.net(self.lpips.scaling_layer(x))]

    def forward(self, x, x_hat):
        with torch.no_grad():
            targets = self.features(x)
        total = 0.0
        for i, (f, f_hat) in enumerate(zip(targets, self.features(x_hat))):
            # not in the paper: Eq. 6 prints a norm of differences; LPIPS weighs their squares
            difference = (f - f_hat).square()  # (b, c_i, h_i, w_i)
            if self.lpips.lpips:
                difference = self.lpips.lins[i].model[-1](difference)
            total = total + difference.sum(1).mean()
        return total


# ---------------- adversarial pair

class Discriminator(nn.Module):
    """PatchGAN: pictures (b, 3, h, w) to one logit per patch (b, 1, h', w'); positive is real."""
    def __init__(self, width, layers):
        super().__init__()
        blocks = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        c = width
        for i in range(1, layers + 1):
            c_in = c
            c = width * min(2 ** i, 8)
            stride = 2 if i < layers else 1
            blocks += [nn.Conv2d(c_in, c, 4, stride=stride, padding=1, bias=False),
                       self.norm(c), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*blocks, nn.Conv2d(c, 1, 4, padding=1))
        for conv in self.main:
            if isinstance(conv, nn.Conv2d):
                nn.init.normal_(conv.weight, 0.0, 0.02)  # not in the paper: as in MoVQGAN

    @staticmethod
    def norm(c):
        # not in the paper: GroupNorm where the base code has BatchNorm. So the verdict on a picture
        # does not depend on its neighbors: batch 1, accumulation and several processes agree.
        return nn.GroupNorm(math.gcd(c, 32) if c > 32 else math.gcd(c, 8), c)

    def forward(self, x):
        return self.main(x)


def adversarial_loss(fake, kind="hinge"):  # Eq. 5
    """What the VAE minimizes, from the discriminator's logits of x_hat.

    "log" is Eq. 5 as printed, log(1 - D(x_hat)) with D = sigmoid(logit). Its gradient, sigmoid
    (logit), vanishes where the discriminator is sure, which it soon is when it trains from step 0.
    So the default is the base code's hinge form, whose gradient is constant.
    """
    if kind == "hinge":
        return -fake.mean()
    return -F.softplus(fake).mean()  # log(1 - sigmoid(l)) = -softplus(l)


def discriminator_loss(real, fake, kind="hinge"):
    """What the discriminator minimizes, from its logits of x and of x_hat."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


# ---------------- the whole

def total_loss(kl, recon, adv, perc, s):  # Eq. 7
    # not in the paper: each term is a mean over elements, the one reading that fits Table 3 (top)
    return (s.lambda_kl * kl + s.lambda_recon * recon
            + s.lambda_adv * adv + s.lambda_perc * perc)


# ---------------- the artifacts of Sec. 4, made

def tint(x, strength):
    """Color shift: all of the picture moves towards yellow (Fig. 2b)."""
    return x + strength * x.new_tensor([0.2, 0.15, -0.3])[:, None, None]


def grid(x, strength):
    """Grid: lines with the period of a latent, 8 pixels (Fig. 2c)."""
    rows = torch.arange(x.shape[2], device=x.device) % 8 == 0
    columns = torch.arange(x.shape[3], device=x.device) % 8 == 0
    return x - strength * 0.5 * (rows[:, None] | columns).to(x)


def blur(x, strength):
    """Blur: a Gaussian of up to 3 pixels (Fig. 2d)."""
    if not strength:
        return x
    return gaussian_blur(x, [19, 19], [3.0 * strength, 3.0 * strength])


def border(x, strength, frame=16):
    """Corner artifact: a frame of blur around the edges, `frame` pixels wide (Fig. 2e)."""
    rows = distance_to_ends(x.shape[2])
    columns = distance_to_ends(x.shape[3])
    mask = (1 - torch.minimum(rows[:, None], columns) / frame).clamp(min=0).to(x)
    return x + strength * mask * (gaussian_blur(x, [31, 31], [8.0, 8.0]) - 0.5 - x)


def distance_to_ends(n):
    """0, 1, 2, ..., 2, 1, 0."""
    return torch.minimum(torch.arange(n), torch.arange(n - 1, -1, -1))


def droplet(x, strength, seed=0):
    """Droplet: isolated bright spots, where activations grew too large (Fig. 2f and 3)."""
    b, _, h, w = x.shape
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(b, 3, 2, generator=generator).to(x) * 0.8 + 0.1  # three per picture
    dy = torch.arange(h, device=x.device) - centers[..., :1] * h  # (b, 3, h)
    dx = torch.arange(w, device=x.device) - centers[..., 1:] * w  # (b, 3, w)
    squared = dy[..., :, None].square() + dx[..., None, :].square()  # (b, 3, h, w)
    spots = torch.exp(-squared / (2 * (h / 40 + 1) ** 2)).amax(1, keepdim=True) # (b, 1, h, w)
    return x + strength * 1.5 * spots


ARTIFACTS = {"color shift": tint, "grid": grid, "blur": blur, "corner": border, "droplet": droplet}
STRENGTHS = (0.25, 0.5, 1.0)


# ---------------- main

def train_discriminator(disc, x, settings):
    """A discriminator knows only what it has been shown: a moment's training on all artifacts."""
    optimizer = torch.optim.Adam(disc.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for step in range(settings.steps):
        strength = STRENGTHS[step % 3]
        damaged = [artifact(x[i::5], strength) for i, artifact in enumerate(ARTIFACTS.values())]
        loss = discriminator_loss(disc(x), disc(torch.cat(damaged)), settings.gan_loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(settings):
    torch.manual_seed(settings.seed)
    disc = Discriminator(settings.disc_width, settings.disc_layers)
    if settings.dry_run:
        return data.print_settings(settings, discriminator=model.count(disc))
    device = data.pick_device(settings.device)
    x = from_uint8(data.val_crops(settings.run, settings.crop, 16).to(device))
    perceptual = Perceptual(settings.perceptual_net).to(device)
    if settings.perceptual_net == "untrained":
        print("perceptual net: untrained AlexNet (no download); its column is a feature distance, "
              "not LPIPS")
    disc = disc.to(device)
    train_discriminator(disc, x, settings)

    print(f"each term times its weight in Table 3, on {len(x)} validation pictures; the "
          "adversarial term less its value on whole pictures;\n"
          f"KL ({settings.lambda_kl:g}) looks at latents and says nothing about a picture\n")
    print(f"{'artifact':14}{'strength':>9}{'L2':>12}{'perceptual':>12}{'adversarial':>12}"
          f"{'PSNR, dB':>10}")
    rows = {}
    tiles = []
    with torch.no_grad():
        clean = adversarial_loss(disc(x), settings.gan_loss)
        for name, artifact in ARTIFACTS.items():
            tiles.append(to_uint8(x[0]))
            for strength in STRENGTHS:
                y = artifact(x, strength)
                recon = settings.lambda_recon * recon_loss(x, y).item()
                perc = settings.lambda_perc * perceptual(x, y).item()
                adv = adversarial_loss(disc(y), settings.gan_loss) - clean
                adv = settings.lambda_adv * adv.item()
                rows[name, strength] = (recon, perc, adv)
                print(f"{name:14}{strength:9.2f}{recon:12.5f}{perc:12.5f}{adv:12.5f}"
                      f"{psnr(x, y).mean():10.2f}")
                tiles.append(to_uint8(artifact(x[:1], strength)[0]))
    titles = ["original"] + [f"strength {strength:g}" for strength in STRENGTHS]
    data.save_sheet(Path(settings.run, "artifacts.png"), tiles, 4, titles, rows=list(ARTIFACTS))
    return rows


if __name__ == "__main__":
    data.command_line(main, Settings, PRESETS, __doc__)
