"""Stage 3 of VIVAT: the four losses and their sum (Sec. 3.1, Eq. 2 to 7, Table 3).

Reads   RUN/data/val (01_data.py), a few pictures to damage.
Writes  RUN/artifacts.png and a table: the five artifacts of Sec. 4 at three strengths, and what each loss term says about them.
Paper   Sec. 3.1 (Eq. 2-7), Sec. 4 (the artifacts), Table 3.

    python 03_losses.py --preset demo

Pictures x and x_hat are (b, 3, h, w) in [-1, 1]. Every term is a mean over elements (over positions for the discriminator).
The paper does not say how terms are reduced; only means fit its weights. A Gaussian decoder of variance s^2 weighs the two sums as
|x - x_hat|^2 + 2 s^2 KL. With N = 3 h w pixel values and J = N / 12 latents (f = 8, 16 channels), lambda_kl = 1e-4 between means is
2 s^2 = 12e-4, so s = 0.024, a noise floor of 38 dB; ten times more, which the paper found blurred, is 28 dB, visible indeed.
Between sums 1e-3 would be 39 dB, no blur at all; and a mean against a summed KL would leave nothing of the picture.
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


@dataclass(frozen=True)
class Losses:
    """The weights of Eq. 7 and what the terms are made of."""
    lambda_kl: float = 1e-4      # Table 3; Sec. 5.2, blur: ten times more blurs
    lambda_recon: float = 1.0    # Table 3
    lambda_adv: float = 0.01     # Table 3; Sec. 5.2, grid: lower is the cure
    lambda_perc: float = 0.1     # Table 3
    perceptual_net: Literal["vgg", "alex", "untrained"] = "vgg"  # not in the paper: LPIPS's own choice for training; "untrained" needs no download
    gan_loss: Literal["hinge", "log"] = "hinge"   # not in the paper: Eq. 5 as printed is "log"; the base code trains with hinge, see adversarial_loss
    disc_width: int = 64         # not in the paper: of MoVQGAN's discriminator
    disc_layers: int = 2         # not in the paper: of MoVQGAN's discriminator: it judges patches of 34 x 34 pixels


@dataclass(frozen=True)
class Settings(Losses):
    run: str = ""                # folder that all stages share [runs/PRESET]
    crop: int = data.Settings.crop   # Sec. 5.1
    steps: int = 150             # not in the paper: steps of a fresh discriminator between whole and damaged crops
    seed: int = 0                # not in the paper
    device: str = "auto"         # not in the paper: cuda, mps or cpu
    dry_run: bool = False        # print the settings as JSON and stop


PRESETS = {
    "paper": {},
    "small": {},
    "demo": dict(perceptual_net="untrained", disc_width=24, crop=64),
}


# ---------------------------------------------------------------- KL divergence and reconstruction

def kl_loss(mean, logvar):                                              # KL to N(0, I), Eq. 2 in the closed form of Eq. 3
    """Nats per latent value; mean and logvar (b, k, h/f, w/f)."""
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).mean()


def recon_loss(x, x_hat):                                               # L2 reconstruction, Eq. 4
    return (x - x_hat).square().mean()


def psnr(x, x_hat):
    """Peak signal-to-noise ratio of each picture in dB, (b,), between the 8 bits that files would hold."""
    return 10 * torch.log10(255 ** 2 / (to_uint8(x).float() - to_uint8(x_hat).float()).square().mean(dim=(1, 2, 3)))


def from_uint8(x):
    """0..255 to [-1, 1]."""
    return x.float() / 127.5 - 1


def to_uint8(x):
    """[-1, 1] to the 0..255 of a file."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte()


# ---------------------------------------------------------------- perceptual loss

class Perceptual(nn.Module):                                            # Eq. 6, as LPIPS
    """LPIPS distance of the lpips package, mean over pictures, with a gradient that is finite everywhere.

    Always in eval mode: LPIPS has dropout before its linear layers, and a parent's .train() would switch it on.
    perceptual_net "untrained" is a random AlexNet with a fixed seed and no linear layers: for trying things out, not a perceptual distance.
    """
    def __init__(self, net="vgg"):
        super().__init__()
        import lpips
        file = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}.get(net)
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")                             # lpips calls torchvision by its old names
            torch.manual_seed(0)
            try:
                self.lpips = lpips.LPIPS(net=net if file else "alex", lpips=bool(file), pretrained=bool(file), pnet_rand=not file, verbose=False)
            except Exception as error:                                  # no network, a cut-off file: torchvision raises many kinds
                data.stop(f"LPIPS needs {file} ({type(error).__name__}): put https://download.pytorch.org/models/{file} into "
                          f"{torch.hub.get_dir()}/checkpoints, or set TORCH_HOME, or choose another --perceptual-net")
        self.requires_grad_(False).train(False)

    def train(self, mode=True):
        return super().train(False)

    @staticmethod
    def unit_length(f):
        # The package divides by sqrt(sum) + 1e-10: at an all-zero feature that is finite, but its gradient is NaN. So eps goes under the root.
        return f / (f.square().sum(1, keepdim=True) + 1e-10).sqrt()

    def features(self, x):
        return [self.unit_length(f) for f in self.lpips.net(self.lpips.scaling_layer(x))]

    def forward(self, x, x_hat):
        with torch.no_grad():
            target = self.features(x)
        total = 0.0
        for i, (f, f_hat) in enumerate(zip(target, self.features(x_hat))):
            difference = (f - f_hat).square()                           # (b, c_i, h_i, w_i)
            weighted = self.lpips.lins[i].model[-1](difference) if self.lpips.lpips else difference.sum(1)
            total = total + weighted.mean()
        return total


# ---------------------------------------------------------------- adversarial pair

class Discriminator(nn.Module):
    """PatchGAN: pictures (b, 3, h, w) to one logit for each patch (b, 1, h', w'); positive means real."""
    def __init__(self, width, layers):
        super().__init__()
        # not in the paper: GroupNorm where the base code has BatchNorm, so that a picture's verdict does not depend on its
        # neighbours in the batch: batch 1, accumulation and several processes then give the same gradients
        norm = lambda c: nn.GroupNorm(math.gcd(c, 32) if c > 32 else math.gcd(c, 8), c)
        blocks, c = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)], width
        for i in range(1, layers + 1):
            c_in, c = c, width * min(2 ** i, 8)
            blocks += [nn.Conv2d(c_in, c, 4, stride=2 if i < layers else 1, padding=1, bias=False), norm(c), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*blocks, nn.Conv2d(c, 1, 4, padding=1))
        for conv in self.main:
            if isinstance(conv, nn.Conv2d):
                nn.init.normal_(conv.weight, 0.0, 0.02)                 # not in the paper: of MoVQGAN, as the layers above

    def forward(self, x):
        return self.main(x)


def adversarial_loss(fake, kind="hinge"):                               # Eq. 5
    """What the VAE minimises, from the discriminator's logits of x_hat.

    "log" is Eq. 5 as printed, log(1 - D(x_hat)) with D = sigmoid(logit): it saturates, its gradient is sigmoid(logit), which
    vanishes where the discriminator is sure. From step 0 on it soon is, so the default is the base code's hinge form, whose gradient is constant.
    """
    return -fake.mean() if kind == "hinge" else -F.softplus(fake).mean()    # log(1 - sigmoid(l)) = -softplus(l)


def discriminator_loss(real, fake, kind="hinge"):
    """What the discriminator minimises, from its logits of x and of the detached x_hat."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


# ---------------------------------------------------------------- the whole

def total_loss(x, x_hat, mean, logvar, fake, perceptual, s):            # Eq. 7
    """The weighted sum, and its raw terms as {"kl", "recon", "adv", "perc"}; fake are the discriminator's logits of x_hat."""
    # not in the paper: how terms are reduced; a mean over elements for each, the only reading that fits Table 3 (see the top)
    terms = {"kl": kl_loss(mean, logvar), "recon": recon_loss(x, x_hat),
             "adv": adversarial_loss(fake, s.gan_loss), "perc": perceptual(x, x_hat)}
    return sum(getattr(s, f"lambda_{name}") * term for name, term in terms.items()), terms


# ---------------------------------------------------------------- the five artifacts of Sec. 4, made on purpose

def tint(x, strength):
    """Color shift: all of the picture moves towards yellow (Fig. 2b)."""
    return x + strength * x.new_tensor([0.2, 0.15, -0.3])[:, None, None]


def grid(x, strength):
    """Grid: lines with the period of a latent, 8 pixels (Fig. 2c)."""
    on = lambda n: (torch.arange(n, device=x.device) % 8 == 0).to(x)
    return x - strength * 0.5 * torch.maximum(on(x.shape[2])[:, None], on(x.shape[3]))


def blur(x, strength):
    """Blur: a Gaussian of up to 3 pixels (Fig. 2d)."""
    return gaussian_blur(x, [19, 19], [3.0 * strength, 3.0 * strength]) if strength else x


def border(x, strength, frame=16):
    """Corner artifact: a frame of blur around the edges, `frame` pixels wide (Fig. 2e)."""
    near = lambda n: torch.minimum(torch.arange(n, device=x.device), torch.arange(n - 1, -1, -1, device=x.device))
    mask = (1 - torch.minimum(near(x.shape[2])[:, None], near(x.shape[3])) / frame).clamp(min=0).to(x)
    return x + strength * mask * (gaussian_blur(x, [31, 31], [8.0, 8.0]) - 0.5 - x)


def droplet(x, strength, seed=0):
    """Droplet: isolated bright spots, where activations grew too large (Fig. 2f and 3)."""
    b, _, h, w = x.shape
    centre = torch.rand(b, 3, 2, generator=torch.Generator().manual_seed(seed)).to(x) * 0.8 + 0.1      # three a picture
    dy = (torch.arange(h, device=x.device) - centre[..., :1] * h)[..., :, None]
    dx = (torch.arange(w, device=x.device) - centre[..., 1:] * w)[..., None, :]
    spots = torch.exp(-(dy.square() + dx.square()) / (2 * (h / 40 + 1) ** 2)).amax(1, keepdim=True)      # (b, 1, h, w)
    return x + strength * 1.5 * spots


ARTIFACTS = {"color shift": tint, "grid": grid, "blur": blur, "corner": border, "droplet": droplet}
STRENGTHS = (0.25, 0.5, 1.0)


def main(settings):
    if settings.dry_run:
        return data.print_settings(settings, discriminator=model.count(Discriminator(settings.disc_width, settings.disc_layers)))
    device = model.pick_device(settings.device)
    x = from_uint8(data.val_crops(settings.run, settings.crop, 16).to(device))
    perceptual = Perceptual(settings.perceptual_net).to(device)
    if settings.perceptual_net == "untrained":
        print("perceptual net: untrained AlexNet (no download); its column is a feature distance, not LPIPS")

    # A discriminator knows only what it has been shown. This one is trained here for a moment, on all five artifacts.
    torch.manual_seed(settings.seed)
    disc = Discriminator(settings.disc_width, settings.disc_layers).to(device)
    optimizer = torch.optim.Adam(disc.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for step in range(settings.steps):
        damaged = torch.cat([artifact(x[i::5], STRENGTHS[step % 3]) for i, artifact in enumerate(ARTIFACTS.values())])
        loss = discriminator_loss(disc(x), disc(damaged), settings.gan_loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    print(f"each term times its weight in Table 3, on {len(x)} validation pictures; the adversarial term less its value on whole pictures;\n"
          f"KL ({settings.lambda_kl:g}) looks at latents and says nothing about a picture\n")
    print(f"{'artifact':14}{'strength':>9}{'L2':>12}{'perceptual':>12}{'adversarial':>12}{'PSNR, dB':>10}")
    rows, tiles = {}, [x[:1]]
    with torch.no_grad():
        clean = adversarial_loss(disc(x), settings.gan_loss)
        for name, artifact in ARTIFACTS.items():
            for strength in STRENGTHS:
                y = artifact(x, strength)
                rows[name, strength] = row = (settings.lambda_recon * recon_loss(x, y).item(), settings.lambda_perc * perceptual(x, y).item(),
                                              settings.lambda_adv * (adversarial_loss(disc(y), settings.gan_loss) - clean).item())
                print(f"{name:14}{strength:9.2f}" + "".join(f"{v:12.5f}" for v in row) + f"{psnr(x, y).mean():10.2f}")
            tiles += [artifact(x[:1], s) for s in STRENGTHS] + [x[:1]]
    tiles = [to_uint8(t[0]) for t in tiles[:-1]]
    data.save_sheet(Path(settings.run, "artifacts.png"), tiles, 4, titles=["original"] + [f"strength {s:g}" for s in STRENGTHS], rows=list(ARTIFACTS))
    return rows


if __name__ == "__main__":
    data.command_line(main, Settings, PRESETS, __doc__)
