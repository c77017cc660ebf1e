"""Stage 5 of VIVAT: freeze the encoder, train the decoder further.

Reads   RUN/vae.pt (04_train_vae.py), or with --vae any file that load_vae reads, a peer's too;
        RUN/data (01_data.py).
Writes  RUN/vae_finetuned.pt, or with --decoder denoising RUN/vae_denoising.pt;
        RUN/reconstructions.png, RUN/log.jsonl.
Paper   Sec. 5.3; Sec. 5.2 names it as a cure of the color shift.

    python 05_finetune_decoder.py --preset small --run runs/mine
    python 05_finetune_decoder.py --preset small --run runs/mine --decoder denoising

It is the training of 04 from its EMA weights, with new optimizers and one difference: the encoder,
and whatever else shapes the latents, stays as it is, bit for bit. So latents of both checkpoints
are interchangeable, and a step costs less: encoding builds no graph.
"""
import importlib
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


# ---------------- settings

@dataclass(frozen=True)
class Settings(training.Training):
    steps: int = 1_000_000  # not in the paper: as long as 04; Sec. 5.3 cites a longer stage
    vae: str = ""           # the file to start from [RUN/vae.pt]
    peer: str = ""          # whose file --vae is, if it does not tell: flux, sd3, sd1 or sdxl
    # not in VIVAT: a decoder that denoises, see "the neighbors"; it takes these values for 04's
    decoder: Literal["plain", "denoising"] = "plain"  # denoising: a new one
    unet: Literal["B", "M", "L", "XL", "H", "laptop"] = "B"  # 20 to 356, laptop 2 M parameters
    denoise_perc: float = 0.5       # E, C.2: lambda of LPIPS
    denoise_adv: float = 0.5        # E, C.2: lambda of the adversarial loss
    denoise_r1: float = 0.02        # not in E, where it is lost: at 1 the discriminator goes silent
    denoise_beta1: float = 0.0      # E, C.2: Adam
    denoise_beta2: float = 0.999    # E, C.2: Adam
    denoise_ema: float = 0.999      # E, C.2: decay of the averaged weights
    denoise_warmup: int = 5000      # E, C.2: steps to the full rate


DEMO = dict(steps=240, val_every=120, save_every=120, muon_lr=2e-3, unet="laptop",
            denoise_warmup=100)
LAPTOP = DEMO | dict(steps=400, val_every=200, save_every=200)
PRESETS = {
    "paper": {},
    "small": training.SMALL | dict(steps=30_000),
    "laptop": losses.CPU | training.LAPTOP | LAPTOP,
    "demo": losses.CPU | training.DEMO | DEMO,
}


# ---------------- the method: frozen latents

def freeze_encoder(vae, trained=("decoder.", "post_quant_conv.")):
    """Let only weights learn whose names start with `trained`; the others shape the latents."""
    for name, p in vae.named_parameters():
        p.requires_grad_(name.startswith(trained))
    return vae


def load_discriminator(disc, source, s):
    """Our own discriminator goes on; a peer's file has none, so a new one learns from step 1, and
    so does a pair's. Stops where the file's training is not over."""
    file = data.read_checkpoint(source)
    if "disc" not in file:
        return
    if file["latent_mean"] is None:
        data.stop(f"{source} is at step {file['step']} of its training: run {file['stage']}.py to "
                  "its end first")
    if s.decoder == "plain":
        try:
            disc.load_state_dict(file["disc"])
        except RuntimeError:
            data.stop(f"{source} has a discriminator of other --disc-width or --disc-layers than "
                      f"{s.disc_width} and {s.disc_layers}")


# ---------------- the neighbors: a decoder that denoises
# Not in VIVAT: pass over it on a first reading. From eps-VAE (arXiv 2410.04081, "E" here), which
# trains the encoder along with it; here that stays as it is.

def denoising_gradients(x, noise, eps, u, vae, disc, perceptual, trained, judging, s):
    """As 04's add_gradients. What is judged is the picture that one step from x_t arrives at.

    eps, u: N(0, I), (b, 3, h, w) and (b, 1, 1, 1).
    """
    t = torch.sigmoid(u)  # not in E: with mean 0 and deviation 1; it says logit-normal
    y = model.GAMMA * x
    x_t = (1 - t) * y + t * eps
    with data.autocast(x.device, s):
        with torch.no_grad():
            z = vae.encode(x).sample(noise)
        v = vae.decoder.velocity(x_t, t, z).float()
    x_hat = (x_t - t * v) / model.GAMMA  # E, Eq. 10
    share = 1 / (s.accumulate * data.processes()[1])

    x.requires_grad_()
    real = disc(x, x_t, t)
    fake = disc(x_hat, x_t, t)
    slope, = torch.autograd.grad(real.sum(), x, create_graph=True)
    r1 = slope.square().mean()  # not in E: a mean over values, so that no size matters
    x = x.detach()
    disc_loss = losses.discriminator_loss(real, fake, "log") + 0.5 * s.denoise_r1 * r1
    (share * disc_loss).backward(inputs=judging, retain_graph=True)

    recon = (v - (eps - y)).square().mean()  # E, Eq. 9
    adv = F.softplus(-fake).mean()  # E, Eq. 12 for the decoder, non-saturating: -log D
    perc = perceptual(x, x_hat)
    total = losses.total_loss(0.0, recon, adv, perc, s)
    (share * total).backward(inputs=trained)
    return dict(total=total, recon=recon, adv=adv, perc=perc, r1=r1,
                disc=disc_loss, d_real=real.mean(), d_fake=fake.mean())


class PairDiscriminator(losses.Discriminator):
    """03's PatchGAN of pairs: a picture or its estimate, and the x_t it belongs to. Time gives
    each norm's scale and shift (AdaGN)."""
    def __init__(self, width, layers):
        super().__init__(width, layers, channels=6)
        self.time = model.Time(width)
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


def denoising_settings(s):
    """The settings, with the denoising decoder's values for 04's."""
    if s.compile:
        data.stop("--compile is for --decoder plain")
    return replace(s, lambda_perc=s.denoise_perc, lambda_adv=s.denoise_adv, beta1=s.denoise_beta1,
                   beta2=s.denoise_beta2, ema_decay=s.denoise_ema, warmup=s.denoise_warmup)


# ---------------- main

def main(s):
    denoising = s.decoder == "denoising"
    stage = "05_denoising_decoder" if denoising else "05_finetune_decoder"
    source = Path(s.vae or Path(s.run, "vae.pt"))
    out = Path(s.run, "vae_denoising.pt" if denoising else "vae_finetuned.pt")
    if denoising:
        s = denoising_settings(s)
    if s.dry_run and not source.exists():  # nothing to count yet
        return data.print_settings(s)
    # not in the paper: it starts from the EMA weights, which are what 04 is for
    vae = freeze_encoder(model.load_vae(source, peer=s.peer))
    if isinstance(vae.decoder, model.DenoisingDecoder):
        data.stop(f"{source} has a denoising decoder: start from the file that it was made from")
    torch.manual_seed(s.seed)  # what is new starts alike in all processes
    variant = {}
    if denoising:
        variant = dict(add=denoising_gradients, more_noise=[(3, s.crop, s.crop), (1, 1, 1)])
        vae = freeze_encoder(model.let_denoise(vae, s.unet), trained="decoder.")
        disc = PairDiscriminator(s.disc_width, s.disc_layers)
    else:
        disc = losses.Discriminator(s.disc_width, s.disc_layers)
    if s.dry_run:
        return training.print_counts(s, vae, disc)
    data.picture_names(Path(s.run, "data", "train"), s.crop)
    made_from = data.parent(source)
    device = data.start(s)
    file = data.resume(s, stage, out, made_from, free={"val_pictures", "vae"})
    load_discriminator(disc, source, s)
    training.train(s, stage, out, vae.to(device), disc.to(device), made_from, file, **variant)
    data.finish()


if __name__ == "__main__":
    data.command_line(main, Settings, PRESETS, __doc__)
