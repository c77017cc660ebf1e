"""Stage 5 of VIVAT: freeze the encoder, train the decoder further.

Reads   RUN/data; RUN/vae.pt (04_train_vae.py), or with --vae any file that 02 reads.
Writes  RUN/vae_finetuned.pt, or with --denoising RUN/vae_denoising.pt; the rest as 04.
Paper   Sec. 5.3; Sec. 5.2 names it as a cure of the color shift.

    python 05_finetune_decoder.py --preset small --run runs/mine

It is the training of 04 from its EMA weights, with new optimizers, other crops and one difference:
the encoder stays as it is, bit for bit. So latents of all these checkpoints are interchangeable.
"""
import functools
import importlib
import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

data = importlib.import_module("01_data")
model = importlib.import_module("02_model")
losses = importlib.import_module("03_losses")
training = importlib.import_module("04_train_vae")


# ---- settings

@dataclass(frozen=True)
class Settings(training.Training):
    """Those of 04; the architecture is that of the file."""
    steps: int = 1_000_000  # not in the paper: as long as 04; Sec. 5.3 cites a longer stage
    vae: str = ""           # the file to start from [RUN/vae.pt]
    # "a neighbor" below; 20 to 356 M parameters, demo 2 M
    denoising: Literal["no", "demo", "B", "M", "L", "XL", "H"] = "no"  # not in VIVAT


PRESETS = {"paper": {}, "small": training.SMALL | dict(steps=30_000),
           "demo": training.DEMO | dict(muon_lr=2e-3, steps=240, val_every=120)}


# ---- the method: frozen latents

def freeze_encoder(vae):
    """Let nothing learn that shapes the latents."""
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)


# ---- a neighbor: a decoder that denoises
# Not in VIVAT: pass over it on a first reading. From eps-VAE (arXiv 2410.04081, "E" here), which
# trains the encoder along with it; here that stays as it is. With the numbers of E, C.2:
#     python 05_finetune_decoder.py --preset small --denoising B --lambda-perc 0.5
#         --lambda-adv 0.5 --beta1 0 --beta2 0.999 --ema-decay 0.999 --warmup 5000

UNETS = {  # E, C.1: width, multipliers, blocks per level; levels with attention
    "B": (64, (1, 1, 2, 2, 4), 2, (3,)),
    "M": (96, (1, 1, 2, 2, 4), 2, (3, 4)),
    "L": (128, (1, 1, 2, 2, 4), 2, (2, 3, 4)),
    "XL": (128, (1, 1, 2, 2, 4), 4, (2, 3, 4)),
    "H": (256, (1, 1, 2, 2, 4), 2, (2, 3, 4)),
    "demo": (24, (1, 2, 2, 4), 1, ()),  # not in E
}
# E leaves open where attention is. With these levels, and ADM's resizing blocks and six outputs,
# all five counts of parameters match, with E's 8 latent channels.
OUTPUTS = 6     # as ADM, whose last three are for a variance; not used here
GAMMA = 0.6     # E, Table 4 (f): scales pictures, so that x_t is noisier at each t
DEVIATION = 0.5  # not in E: of a picture's values in [-1, 1], to bring x_t to deviation 1
R1 = 0.02       # E gives none; at 1 the discriminator goes silent


def sine_angles(positions, count):
    """Angles (m, count) of positions (m,), at frequencies from 1 to almost 1/10,000 of a radian."""
    steps = torch.arange(count, dtype=torch.float32, device=positions.device)
    return positions[:, None] * torch.exp(-math.log(10_000) * steps / count)


class Time(nn.Module):
    """Times (b,) in [0, 1] to (b, 4 width), as in ADM."""
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(),
                                    nn.Linear(4 * width, 4 * width), nn.SiLU())

    def forward(self, t):
        angles = sine_angles(1000 * t, self.layers[0].in_features // 2)
        return self.layers(torch.cat([angles.cos(), angles.sin()], 1))


class UnetBlock(nn.Module):
    """ADM's residual block, perhaps with attention behind it. AdaGN: time gives the second norm's
    scale and shift. resize: a module that halves or doubles the sides, or leaves them."""
    def __init__(self, c_in, c_out, times, a, attention=False, resize=nn.Identity()):
        super().__init__()
        self.resize = resize
        self.norm1 = model.GroupNorm(c_in, a)
        self.conv1 = model.conv3x3(c_in, c_out, a)
        self.time = nn.Linear(times, 2 * c_out)
        self.norm2 = model.GroupNorm(c_out, a)
        self.conv2 = model.conv3x3(c_out, c_out, a)
        nn.init.zeros_(self.conv2.weight)  # as in ADM: a block begins as its shortcut
        nn.init.zeros_(self.conv2.bias)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attn = model.AttnBlock(c_out, model.GroupNorm, a) if attention else nn.Identity()

    def forward(self, x, c):  # (b, c_in, ., .), (b, times)
        y = self.conv1(self.resize(F.silu(self.norm1(x))))
        scale, shift = self.time(c)[..., None, None].chunk(2, 1)  # (b, c_out, 1, 1)
        y = self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))
        return self.attn(y + self.nin_shortcut(self.resize(x)))  # (b, c_out, ., .)


class Unet(nn.Module):
    """The velocity at a noisy picture x_t = (1 - t) gamma x + t noise, given its latents z. `down`
    halves the sides level by level, `up` doubles them again; each block of `up` that does not
    resize is handed what a block of `down` made, the last one first."""
    def __init__(self, a, size):
        super().__init__()
        width, mult, blocks, attention = UNETS[size]
        # not in E: zeros as in ADM; reflect is 1.2 dB worse
        a = replace(a, groups=math.gcd(32, width), padding="zeros")
        make = functools.partial(UnetBlock, times=4 * width, a=a)
        self.time = Time(width)
        self.conv_in = model.conv3x3(3 + a.latent_channels, width, a)
        self.down = nn.ModuleList()
        c = width
        kept = [c]  # channels of what `up` will be handed
        for i, m in enumerate(mult):
            for _ in range(blocks):
                self.down.append(make(c, width * m, attention=i in attention))
                c = width * m
                kept.append(c)
            if i < len(mult) - 1:
                self.down.append(make(c, c, resize=nn.AvgPool2d(2)))
                kept.append(c)
        self.mid = nn.ModuleList([make(c, c, attention=True), make(c, c)])
        self.up = nn.ModuleList()
        for i, m in reversed(list(enumerate(mult))):
            for _ in range(blocks + 1):
                self.up.append(make(c + kept.pop(), width * m, attention=i in attention))
                c = width * m
            if i > 0:
                self.up.append(make(c, c, resize=nn.Upsample(scale_factor=2)))
        self.norm_out = model.GroupNorm(c, a)
        self.conv_out = model.conv3x3(c, OUTPUTS, a)

    def forward(self, x_t, t, z):
        """x_t (b, 3, h, w), t (b, 1, 1, 1), z (b, k, h/f, w/f); gives (b, 3, h, w)."""
        # not in E: read as in Chen, 2023: gamma scales the picture, before noise is added
        deviation = ((1 - t).square() * (GAMMA * DEVIATION) ** 2 + t.square()).sqrt()
        z = F.interpolate(z, size=x_t.shape[2:], mode="nearest")  # (b, k, h, w)
        c = self.time(t.flatten())
        x = self.conv_in(torch.cat([x_t / deviation, z], 1))  # (b, width, h, w)
        kept = [x]
        for block in self.down:
            x = block(x, c)
            kept.append(x)
        for block in self.mid:
            x = block(x, c)
        for block in self.up:
            if not isinstance(block.resize, nn.Upsample):
                x = torch.cat([x, kept.pop()], 1)
            x = block(x, c)
        return self.conv_out(F.silu(self.norm_out(x)))[:, :3]  # (b, 3, h, w)


class DenoisingDecoder(nn.Module):
    """In place of a Decoder: from noise, latents z (b, k, h/f, w/f) to pictures (b, 3, h, w)."""
    def __init__(self, a, size):
        super().__init__()
        self.unet = Unet(a, size)
        self.factor = 2 ** (len(a.width_mult) - 1)
        self.multiple = max(self.factor, 2 ** (len(UNETS[size][1]) - 1))
        self.steps = 3  # E, Table 4 (g)

    def forward(self, z):
        """By Euler's method, from the same noise for each picture."""
        shape = (1, 3, z.shape[2] * self.factor, z.shape[3] * self.factor)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(2024))
        x_t = noise.to(z.device).expand(len(z), -1, -1, -1)
        # E, Eq. 13 with m = 1, n = 100: dense where there is most noise; here 1, 0.91, 0.77, 0
        times = (100 - 99 * torch.arange(self.steps + 1) / self.steps).log() / math.log(100)
        for now, after in itertools.pairwise(times.to(z.device)):
            t = now.expand(len(z), 1, 1, 1)
            x_t = x_t + (after - now) * self.unet(x_t, t, z).float()
        return x_t / GAMMA


class PairDiscriminator(losses.Discriminator):
    """03's PatchGAN of pairs: a picture or its estimate, and the x_t it belongs to. Time gives
    each norm's scale and shift (AdaGN)."""
    def __init__(self, width):
        super().__init__(width, channels=6)
        self.time = Time(width)
        norms = [layer for layer in self.main if isinstance(layer, nn.GroupNorm)]
        self.ada = nn.ModuleList(nn.Linear(4 * width, 2 * norm.num_channels) for norm in norms)

    def forward(self, x, x_t, t):
        c = self.time(t.flatten())  # (b, 4 width)
        x = torch.cat([x, x_t], 1)  # (b, 6, h, w)
        ada = iter(self.ada)
        for layer in self.main:
            x = layer(x)
            if isinstance(layer, nn.GroupNorm):
                scale, shift = next(ada)(c)[..., None, None].chunk(2, 1)
                x = x * (1 + scale) + shift
        return x  # (b, 1, h', w')


def denoising_losses(x, vae, disc, perceptual, s):
    """As 04's compute_losses. What is judged is the picture that one step from x_t arrives at."""
    eps = torch.randn_like(x)
    t = torch.sigmoid(torch.randn(len(x), 1, 1, 1, device=x.device))  # E: logit-normal
    y = GAMMA * x
    x_t = (1 - t) * y + t * eps
    with torch.autocast(x.device.type, torch.bfloat16, enabled=s.precision == "bf16"):
        with torch.no_grad():
            z = vae.encode(x).sample()
        v = vae.decoder.unet(x_t, t, z).float()
    x_hat = (x_t - t * v) / GAMMA  # E, Eq. 10

    leaf = x.detach().requires_grad_()  # for R1, the slope of the verdict on real pictures
    real = disc(leaf, x_t, t)
    fake = disc(x_hat, x_t, t)
    slope, = torch.autograd.grad(real.sum(), leaf, create_graph=True)
    r1 = slope.square().mean()  # not in E: a mean over values, and of the picture alone
    disc_loss = losses.discriminator_loss(real, fake, "log") + 0.5 * R1 * r1

    recon = (v - (eps - y)).square().mean()  # E, Eq. 9
    adv = F.softplus(-fake).mean()  # E, Eq. 12 for the decoder, non-saturating: -log D
    perc = perceptual(x, x_hat)
    vae_loss = losses.total_loss(0.0, recon, adv, perc, s)
    return vae_loss, disc_loss, dict(total=vae_loss, recon=recon, adv=adv, perc=perc, r1=r1,
                                     disc=disc_loss, d_real=real.mean(), d_fake=fake.mean())


def give_denoising_decoder(vae, size):
    vae.post_quant_conv = nn.Identity()  # it belongs to the old decoder
    vae.decoder = DenoisingDecoder(vae.architecture, size)
    vae.multiple = vae.decoder.multiple


def load_vae(path, device="cpu"):
    """02's load_vae for both decoders; for 06 and 07."""
    def adapt(vae, checkpoint):
        size = checkpoint.get("settings", {}).get("denoising", "no")
        if size != "no":
            give_denoising_decoder(vae, size)

    return model.load_vae(path, device, adapt)


# ---- main

def main(s):
    idle = ["lambda_kl", "lambda_ve"] + ["gan_loss"] * (s.denoising != "no")
    for name in idle:
        if getattr(s, name) != getattr(Settings, name):
            data.fail(f"{data.flag(name)} changes nothing here")
    device = data.pick_device(s)
    source = Path(s.vae or Path(s.run, "vae.pt"))
    checkpoint = model.read_checkpoint(source)
    # not in the paper: it starts from the EMA weights, which are what 04 is for
    vae = model.build_vae(checkpoint, source)
    freeze_encoder(vae)
    if s.denoising == "no":
        disc = losses.Discriminator(s.disc_width)
        stage, name, compute = "05_finetune_decoder", "vae_finetuned.pt", training.compute_losses
        if "disc" in checkpoint:  # not in the paper: ours goes on; others' files have none
            with data.needs(f"{source} has a discriminator of another --disc-width"):
                disc.load_state_dict(checkpoint["disc"])
            for flag in ("lambda_recon", "lambda_adv", "lambda_perc", "gan_loss", "perceptual_net"):
                before = checkpoint["settings"][flag]
                if before != getattr(s, flag):
                    print(f"{source} had {data.flag(flag)} {before}, not {getattr(s, flag)}")
    else:
        give_denoising_decoder(vae, s.denoising)
        disc = PairDiscriminator(s.disc_width)
        stage, name, compute = "05_denoising_decoder", "vae_denoising.pt", denoising_losses
    print(f"from {source}, step {checkpoint.get('step', 'unknown')}")
    out = Path(s.run, name)
    with data.alone(out):
        training.train(s, stage, out, vae.to(device), disc.to(device), compute,
                       parent=data.file_hash(source), fresh=s.denoising != "no")


if __name__ == "__main__":
    data.start(main, Settings, PRESETS, __doc__)
