"""Stage 3 of VIVAT: the four losses and their sum.

Reads   RUN/data/val (01_data.py), a few pictures to damage.
Writes  RUN/artifacts.png; prints a table: the five artifacts of Sec. 4 at three strengths, and
        what each loss term says about them.
        With --toy instead RUN/toy.png: two regularizers of latents in the plane (not in VIVAT).
Paper   Sec. 3.1 (Eq. 2-7), Sec. 4 (the artifacts), Table 3.

    python 03_losses.py --preset demo
    python 03_losses.py --preset demo --toy

Pictures x and x_hat are (b, 3, h, w) in [-1, 1]. KL and L2 are means over elements; logits and
each layer of LPIPS, over positions. Eq. 3 and 4 print sums, but only means fit Table 3's weights.
Eq. 1 with a Gaussian p(x|z) of variance s^2, times -2 s^2, is |x - x_hat|^2 + 2 s^2 KL plus a
constant, with sums over elements.
With N = 3 h w pixel values and J = N / 12 latents (f = 8, 16 channels), lambda_kl = 1e-4 between
means is 2 s^2 = 12e-4: a noise floor of 10 log10(4 / s^2) = 38 dB. Ten times more, which the paper
found blurred, is 28 dB, visible. Between sums 1e-3 would be 39 dB, no blur at all.
"""
import importlib
import math
import random
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
    perceptual_net: Literal["vgg", "alex", "untrained"] = "vgg"  # not in the paper: LPIPS's choice
    # Eq. 5 as printed is "log", see adversarial_loss
    gan_loss: Literal["hinge", "log"] = "hinge"  # not in the paper: the base code trains with hinge
    disc_width: int = 64        # not in the paper: as in MoVQGAN's discriminator
    disc_layers: int = 2        # not in the paper: as in MoVQGAN; it judges patches of 34 x 34
    # not in VIVAT: Variance Expansion for KL, and two ways to ease KL; see "the neighbors"
    regularizer: Literal["kl", "ve"] = "kl"  # "ve": Variance Expansion for KL
    lambda_ve: float = 0.1 / 12  # its paper's 0.1, read as between sums, times J / N = 1 / 12 (top)
    kl_warmup: int = 0          # steps in which lambda_kl rises from 0 in a line
    free_bits: float = 0.0      # nats per latent value that a channel may carry for nothing


@dataclass(frozen=True)
class Settings(data.Run, Losses):
    crop: int = 240             # Sec. 5.1: a crop of 240 x 240
    steps: int = 150            # steps of a fresh discriminator between intact and damaged crops
    toy: bool = False           # only draw toy.png: Variance Expansion in the plane
    toy_width: int = 512        # toy: Appendix C
    toy_batch: int = 4096       # toy: Appendix C
    toy_steps: int = 200_000    # toy: Appendix C
    toy_lr: float = 1e-3        # toy: number lost, and another schedule: falls to 0
    toy_kl: float = 1e-6        # toy: number lost; so weak that latents become a needle
    toy_ve: float = 3e-5        # toy: number lost; the noise is as wide as a branch


CPU = dict(perceptual_net="untrained", disc_width=24, crop=64)
TOY = dict(toy_width=128, toy_batch=512, toy_steps=1500, toy_lr=2e-3)
PRESETS = {
    "paper": {},
    "small": {},
    "laptop": CPU | TOY,
    "demo": CPU | TOY,
}


# ---------------- KL divergence, reconstruction

def kl_values(mu, logvar):  # KL to N(0, I), Eq. 2, in Eq. 3's form
    """Nats of each latent value; mu and logvar (b, k, h/f, w/f)."""
    return -0.5 * (1 + logvar - mu.square() - logvar.exp())


def kl_loss(mu, logvar):
    return kl_values(mu, logvar).mean()  # not in the paper: a mean (top); Eq. 3 sums over j


def recon_loss(x, x_hat):  # L2 reconstruction, Eq. 4
    return (x - x_hat).square().mean()  # not in the paper: a mean (top); Eq. 4 prints a sum


def psnr(x, x_hat):
    """Peak signal-to-noise ratio of each picture in dB, (b,), after rounding to 8 bits."""
    error = to_uint8(x).float() - to_uint8(x_hat).float()
    return 10 * torch.log10(255 ** 2 / error.square().mean(dim=(1, 2, 3)))


def from_uint8(x):
    """0..255 to [-1, 1]."""
    return x.float() / 127.5 - 1


def to_uint8(x):
    """[-1, 1] to the 0..255 of a file."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte()


# ---------------- perceptual loss

class Perceptual(nn.Module):  # Eq. 6
    """LPIPS from the lpips package, mean over pictures, with a gradient that is finite everywhere.

    "untrained" is a random AlexNet with a fixed seed and without the linear layers:
    for trying things out, not a perceptual distance.
    """
    def __init__(self, net="vgg"):
        super().__init__()
        import lpips
        files = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}
        trained = net in files
        # lpips calls torchvision by old names
        with warnings.catch_warnings(action="ignore"), torch.random.fork_rng():
            torch.manual_seed(0)
            try:
                self.lpips = lpips.LPIPS(net=net if trained else "alex", lpips=trained,
                                         pretrained=trained, pnet_rand=not trained, verbose=False)
            except Exception as error:  # no network, a cut-off file: many kinds
                data.stop(f"LPIPS needs https://download.pytorch.org/models/{files.get(net)} "
                          f"({type(error).__name__}): put it into {torch.hub.get_dir()}/checkpoints"
                          ", or set TORCH_HOME, or choose another --perceptual-net")
        self.requires_grad_(False)

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
            # not in the paper: Eq. 6 prints an L1 norm at one l; LPIPS sums squares over all l
            difference = (f - f_hat).square()  # (b, c_i, h_i, w_i)
            if self.lpips.lpips:
                difference = self.lpips.lins[i].model[-1](difference)  # [-1]: past its dropout
            total = total + difference.sum(1).mean()
        return total


# ---------------- adversarial pair

class Discriminator(nn.Module):
    """PatchGAN: pictures (b, 3, h, w) to one logit per patch (b, 1, h', w'); positive is real."""
    def __init__(self, width, layers, channels=3):
        super().__init__()
        blocks = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
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
        return nn.GroupNorm(math.gcd(c, 32 if c > 32 else 8), c)

    def forward(self, x):
        return self.main(x)


def adversarial_loss(fake, kind="hinge"):  # Eq. 5
    """What the VAE minimizes, from the discriminator's logits of x_hat.

    "log" is Eq. 5 as printed, log(1 - D(x_hat)) with D = sigmoid(logit). Its gradient, -D, vanishes
    where the discriminator is sure, which it soon is when it trains from step 0. So the default is
    the base code's hinge form, whose gradient is constant.
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


# ---------------- the whole

def total_loss(kl, recon, adv, perc, s):  # Eq. 7
    return (s.lambda_kl * kl + s.lambda_recon * recon
            + s.lambda_adv * adv + s.lambda_perc * perc)


# ---------------- the artifacts of Sec. 4, made
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
    if not strength:
        return x
    return gaussian_blur(x, [19, 19], [3.0 * strength, 3.0 * strength])


def border(x, strength):
    """Corner artifact: a frame of blur, 16 pixels wide (Fig. 2e); darker too, to be seen."""
    rows = distance_to_ends(x.shape[2])
    columns = distance_to_ends(x.shape[3])
    mask = (1 - torch.minimum(rows[:, None], columns) / 16).clamp(min=0).to(x)
    return x + strength * mask * (gaussian_blur(x, [31, 31], [8.0, 8.0]) - 0.5 - x)


def distance_to_ends(n):
    """0, 1, 2, ..., 2, 1, 0."""
    return torch.minimum(torch.arange(n), torch.arange(n - 1, -1, -1))


def droplet(x, strength):
    """Droplet: isolated bright spots, where activations grew too large (Fig. 2f and 3)."""
    b, _, h, w = x.shape
    generator = torch.Generator().manual_seed(0)
    centers = torch.rand(b, 3, 2, generator=generator).to(x) * 0.8 + 0.1  # three per picture
    dy = torch.arange(h, device=x.device) - centers[..., :1] * h  # (b, 3, h)
    dx = torch.arange(w, device=x.device) - centers[..., 1:] * w  # (b, 3, w)
    squared = dy[..., :, None].square() + dx[..., None, :].square()  # (b, 3, h, w)
    spots = torch.exp(-squared / (2 * (h / 40 + 1) ** 2)).amax(1, keepdim=True) # (b, 1, h, w)
    return x + strength * 1.5 * spots


ARTIFACTS = {"color shift": tint, "grid": grid, "blur": blur, "corner": border, "droplet": droplet}
STRENGTHS = (0.25, 0.5, 1.0)


# ---------------- the neighbors: what else could regularize latents
# Not in VIVAT: pass over it on a first reading.

def latent_loss(mu, logvar, noise, s):
    """What stands in KL's place in Eq. 7, for --regularizer and --free-bits. noise: what made z."""
    if s.regularizer == "ve":
        return variance_expansion(mu, logvar, noise)
    if s.free_bits:
        return free_bits(mu, logvar, s.free_bits)
    return kl_loss(mu, logvar)


def latent_weight(s, step):
    """The weight of latent_loss at `step`, from 1; KL's warm-up is linear (Bowman et al., 2015)."""
    if s.regularizer == "ve":
        return s.lambda_ve
    return s.lambda_kl * min(1.0, step / max(1, s.kl_warmup))


# Variance Expansion (arXiv 2603.21085), Eq. 9 to 11
def variance_expansion(mu, logvar, noise):
    """1 / sigma^2 pushes against the reconstruction, which wants no noise in z; exp(|z| - tau)
    keeps z from growing instead. All (b, k, h/f, w/f), in FP32."""
    delta = 1e-6  # "tiny" in its paper, no number
    tau = 1.0
    share = 1e-6 / 0.1  # lambda_2 in units of lambda_1
    variance = logvar.float().exp()
    z = mu.float() + variance.sqrt() * noise
    expand = 1 / (variance + delta)  # Eq. 9
    hold = (z.abs() - tau).clamp(max=30).exp()  # Eq. 10; clamped against overflow
    return expand.mean() + share * hold.mean()  # Eq. 11


def free_bits(mu, logvar, nats):  # Kingma et al., 2016: max(nats, KL) for each channel
    return kl_values(mu, logvar).mean((0, 2, 3)).clamp(min=nats).mean()


# ---------------- the neighbors: Variance Expansion in the plane (its Fig. 1, Appendix C)

def tree():
    """A distribution in the plane: a branch is eight Gaussians in a row; it splits in two, six
    times. Mean 0, deviation 0.5 along each axis."""
    rng = random.Random(0)
    means = []
    spreads = []
    weights = []
    branches = [(0.0, 0.0, math.pi / 2, 1.0, 1.0)]  # x, y, angle, length, weight
    for _ in range(7):
        split = []
        for x, y, angle, length, weight in branches:
            along = torch.tensor([math.cos(angle), math.sin(angle)])
            across = torch.stack([-along[1], along[0]])
            for i in range(8):
                means.append(torch.tensor([x, y]) + along * length * (i + 0.5) / 8)
                spreads.append(torch.outer(along, along) * (length / 16) ** 2
                               + torch.outer(across, across) * (length / 60) ** 2)
                weights.append(weight)
            for side in (-1, 1):
                turned = angle + side * rng.uniform(0.35, 0.65)
                split.append((x + along[0].item() * length, y + along[1].item() * length, turned,
                              length * rng.uniform(0.6, 0.8), 0.5 * weight))
        branches = split
    means = torch.stack(means)  # (1016, 2)
    spreads = torch.stack(spreads)  # (1016, 2, 2)
    weights = torch.tensor(weights)
    share = weights / weights.sum()
    center = share @ means
    variance = share @ ((means - center).square() + spreads.diagonal(dim1=1, dim2=2))
    scale = torch.diag(0.5 / variance.sqrt())
    own = torch.distributions.MultivariateNormal((means - center) @ scale, scale @ spreads @ scale)
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(share), own)


def mlp(inputs, outputs, width):
    """Eight linear layers with ReLU between them."""
    layers = [nn.Linear(inputs, width), nn.ReLU()]
    for _ in range(6):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def fit(parameters, loss, s):
    """Minimize loss() with Adam, the rate falling to 0."""
    optimizer = torch.optim.Adam(parameters, lr=s.toy_lr)
    for step in range(1, s.toy_steps + 1):
        model.set_rates([optimizer], model.rate_factor(step, s.toy_steps, 1.0))
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def toy_tokenizer(own, weight, x, s):
    """Encoder and decoder of points x (n, 2), with the regularizer that the Losses `own` name."""
    encoder = mlp(2, 4, s.toy_width)
    decoder = mlp(2, 2, s.toy_width)

    def loss():
        batch = x[torch.randint(len(x), (s.toy_batch,))]
        q = model.Posterior(*encoder(batch).chunk(2, 1))  # mu and logvar (b, 2)
        noise = torch.randn_like(q.mu)
        x_hat = decoder(q.sample(noise))
        return recon_loss(batch, x_hat) + weight * latent_loss(q.mu, q.logvar, noise, own)

    fit([*encoder.parameters(), *decoder.parameters()], loss, s)
    return encoder, decoder


def toy_flow(z, s):
    """Fit a velocity field to latents z (n, 2) by flow matching; returns samples (4096, 2)."""
    net = mlp(3, 2, s.toy_width)

    def loss():
        batch = z[torch.randint(len(z), (s.toy_batch,))]
        noise = torch.randn_like(batch)
        t = torch.rand(len(batch), 1)
        velocity = net(torch.cat([(1 - t) * batch + t * noise, t], 1))
        return (velocity - (noise - batch)).square().mean()

    fit(net.parameters(), loss, s)
    with torch.no_grad():
        sample = torch.randn(4096, 2)
        for step in range(20):  # Euler, from t = 1 to 0
            t = torch.full((len(sample), 1), 1 - step / 20)
            sample = sample - net(torch.cat([sample, t], 1)) / 20
    return sample


def density(points, side=256):
    """Where points (n, 2) lie, as a picture (3, side, side) of the square around them."""
    middle = points.median(0).values
    reach = 1.2 * (points - middle).abs().quantile(0.995)
    place = ((points - middle) / reach + 1) * side / 2  # 0..side inside
    place = place[((place >= 0) & (place < side)).all(1)].long()
    pixel = (side - 1 - place[:, 1]) * side + place[:, 0]
    count = torch.bincount(pixel, minlength=side * side).float()
    dark = (count / count.quantile(0.999).clamp(min=1)).clamp(max=1).sqrt()
    return (255 * (1 - dark)).byte().view(1, side, side).expand(3, -1, -1)


def toy(s):
    """RUN/toy.png: for weak KL and for Variance Expansion the points, their latents, and what the
    latents made by a flow decode to."""
    torch.manual_seed(s.seed)
    distribution = tree()
    x = distribution.sample((32_768,))
    rare = distribution.log_prob(x[:4096]).quantile(0.01)
    points = density(x)
    weights = {"kl": s.toy_kl, "ve": s.toy_ve}
    tiles = []
    rows = {}
    for name, weight in weights.items():
        encoder, decoder = toy_tokenizer(Losses(regularizer=name), weight, x, s)
        with torch.no_grad():
            q = model.Posterior(*encoder(x).chunk(2, 1))
            z = q.sample()
        sample = toy_flow((z - z.mean(0)) / z.std(0), s) * z.std(0) + z.mean(0)
        with torch.no_grad():
            made = decoder(sample)
            error = recon_loss(x, decoder(z)).sqrt()
        lost = (distribution.log_prob(made) < rare).float().mean()
        row = dict(posterior_variance=q.logvar.exp().mean().item(),
                   variance=z.var(0).mean().item(), error=error.item(), lost=lost.item())
        print(f"{name}: posterior variance {row['posterior_variance']:.2g} of "
              f"{row['variance']:.2g}; points come back with an error of {row['error']:.3f}; "
              f"{row['lost']:.3f} of the decoded samples are rarer than all but 0.010 of the "
              "points")
        rows[name] = row
        tiles += [points, density(z), density(made)]
    data.save_sheet(Path(s.run, "toy.png"), tiles, 3, ["points", "latents", "samples, decoded"],
                    list(weights))
    return rows


# ---------------- main

def train_discriminator(disc, x, s):
    """Train briefly on all artifacts: a discriminator knows only what it has been shown."""
    optimizer = torch.optim.Adam(disc.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for step in range(s.steps):
        strength = STRENGTHS[step % 3]
        damaged = [artifact(x[i::5], strength) for i, artifact in enumerate(ARTIFACTS.values())]
        loss = discriminator_loss(disc(x), disc(torch.cat(damaged)), s.gan_loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(s):
    torch.manual_seed(s.seed)
    disc = Discriminator(s.disc_width, s.disc_layers)
    if s.dry_run:
        return data.print_settings(s, discriminator=model.count(disc))
    device = data.pick_device(s.device)
    if s.toy:
        with device:
            return toy(s)
    x = from_uint8(data.val_crops(s.run, s.crop, 16).to(device))
    perceptual = Perceptual(s.perceptual_net).to(device)
    if s.perceptual_net == "untrained":
        print("perceptual: a distance of features of an untrained AlexNet, not LPIPS")
    disc = disc.to(device)
    train_discriminator(disc, x, s)

    print(f"each term times its weight in Eq. 7, on {len(x)} validation pictures; the "
          "adversarial term less its value on intact pictures;\n"
          f"KL ({s.lambda_kl:g}) looks at latents and says nothing about a picture\n")
    print(f"{'artifact':14}{'strength':>9}{'L2':>12}{'perceptual':>12}{'adversarial':>12}"
          f"{'PSNR, dB':>10}")
    tiles = []
    with torch.no_grad():
        clean = adversarial_loss(disc(x), s.gan_loss)
        for name, artifact in ARTIFACTS.items():
            tiles.append(to_uint8(x[0]))
            for strength in STRENGTHS:
                y = artifact(x, strength)
                recon = s.lambda_recon * recon_loss(x, y).item()
                perc = s.lambda_perc * perceptual(x, y).item()
                adv = adversarial_loss(disc(y), s.gan_loss) - clean
                adv = s.lambda_adv * adv.item()
                print(f"{name:14}{strength:9.2f}{recon:12.5f}{perc:12.5f}{adv:12.5f}"
                      f"{psnr(x, y).mean():10.2f}")
                tiles.append(to_uint8(y[0]))
    titles = ["original"] + [f"strength {strength:g}" for strength in STRENGTHS]
    data.save_sheet(Path(s.run, "artifacts.png"), tiles, 4, titles, rows=list(ARTIFACTS))


if __name__ == "__main__":
    data.command_line(main, Settings, PRESETS, __doc__)
