"""Stage 4 of VIVAT: train the VAE and its discriminator together.

Reads   RUN/data (01_data.py); RUN/vae.pt if this run was interrupted.
Writes  RUN/vae.pt, RUN/log.jsonl, RUN/reconstructions.png (pictures over what becomes of them).
Paper   Sec. 3.1 (Eq. 7), 5.2, Table 2 (training), Table 3 (weights).

    python 04_train_vae.py --preset small --run runs/mine

The same command again goes on where the last one stopped, on a CPU bit for bit: all that is random
is a function of (stage, seed, step).
"""
import collections
import copy
import functools
import importlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

data = importlib.import_module("01_data")
model = importlib.import_module("02_model")
losses = importlib.import_module("03_losses")


# ---- settings

@dataclass(frozen=True)
class Training(data.TrainingRun):
    """All but the architecture, so that 05 can have it too."""
    lambda_kl: float = 1e-4     # Table 3; Sec. 5.2, blur: ten times more blurs
    lambda_recon: float = 1.0   # Table 3
    lambda_adv: float = 0.01    # Table 3; Sec. 5.2, grid: lower is the cure
    lambda_perc: float = 0.1    # Table 3
    # Its paper's 0.1 between sums, times J / N (head of 03), is 0.0083.
    lambda_ve: float = 0.0      # not in VIVAT: Variance Expansion, see 03; with --lambda-kl 0
    # Eq. 5 as printed is "log", see adversarial_loss
    gan_loss: Literal["hinge", "log"] = "hinge"  # not in the paper: the base code has hinge
    perceptual_net: Literal["vgg", "alex", "untrained"] = "vgg"  # not in the paper: LPIPS's choice
    disc_width: int = 64        # not in the paper: MoVQGAN's discriminator
    crop: int = 240             # Sec. 5.1: side of a crop
    lr: float = 1e-4            # Table 2 (VAE); not in the paper: the discriminator's too
    ema_decay: float = 0.9999   # Table 2
    # bf16: the VAE alone under autocast; weights and losses stay FP32, with TF32 products
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # Table 2: FP32
    steps: int = 1_000_000      # not in the paper: MoVQGAN took 1.3 to 2.4 million
    batch: int = 64             # not in the paper: MoVQGAN took 8 to 20 on each GPU
    beta1: float = 0.5          # not in the paper: MoVQGAN; low: its target moves
    beta2: float = 0.9          # not in the paper: Adam as in MoVQGAN
    warmup: int = 0             # not in the paper: steps in which rates rise from 0
    clip_norm: float = 1.0      # not in the paper: norm of the gradient at most
    val_every: int = 2_000      # steps between two validations, and two checkpoints
    val_pictures: int = 256     # at most so many validation pictures are looked at


@dataclass(frozen=True)
class Settings(Training, model.Architecture):
    pass


SMALL = dict(batch=16, ema_decay=0.999, precision="bf16")
DEMO = losses.PRESETS["demo"] | dict(
    workers=0, compile=False, disc_width=24, batch=4, lr=1e-3, muon_lr=5e-3, lr_decay=1.0,
    ema_decay=0.995, val_every=500, val_pictures=64)
PRESETS = {"paper": {}, "small": model.PRESETS["small"] | SMALL | dict(steps=60_000),
           "demo": model.PRESETS["demo"] | DEMO | dict(steps=1500)}


# ---- one step of both players

def compute_losses(x, vae, disc, perceptual, s):
    """Of pictures x (b, 3, crop, crop): what the VAE minimizes (Eq. 7), what the discriminator
    minimizes, and for the log the terms before their weights."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=s.precision == "bf16"):
        x_hat, mu, logvar, z = [v.float() for v in vae(x)]
    real = disc(x)
    fake = disc(x_hat)
    disc_loss = losses.discriminator_loss(real, fake, s.gan_loss)

    kl = losses.kl_loss(mu, logvar)  # Eq. 3
    recon = losses.recon_loss(x, x_hat)  # Eq. 4
    adv = losses.adversarial_loss(fake, s.gan_loss)  # Eq. 5
    perc = perceptual(x, x_hat)  # Eq. 6
    vae_loss = losses.total_loss(kl, recon, adv, perc, s)  # Eq. 7
    if s.lambda_ve > 0:  # a neighbor
        vae_loss = vae_loss + s.lambda_ve * losses.variance_expansion(z, logvar)
    return vae_loss, disc_loss, dict(total=vae_loss, kl=kl, recon=recon, adv=adv, perc=perc,
                                     disc=disc_loss, d_real=real.mean(), d_fake=fake.mean())


def add_gradients(vae_loss, disc_loss, vae_weights, disc_weights):
    """Add each player's gradient to its own weights.

    not in the paper: both players use one x_hat, judged once, which saves the usual second run of
    both networks. So both losses hang on one graph, which leads from `fake` through the
    discriminator into the VAE, and each backward pass must be kept from the other's weights:
    - `inputs=` names the weights that get gradients. The discriminator's loss stops short of the
      VAE, as if x_hat were detached; the VAE's loss leaves none on the discriminator's weights.
    - `retain_graph=True` keeps the shared part, disc(x_hat), which the first pass would free.
    No optimizer moves before both gradients are there.
    """
    disc_loss.backward(inputs=disc_weights, retain_graph=True)
    vae_loss.backward(inputs=vae_weights)


# ---- the loop

def train(s, stage, out, vae, disc, compute=compute_losses, parent="", fresh=True):
    """Train `disc` and what requires a gradient in `vae` up to s.steps, into the file `out`.

    compute: compute_losses, or 05's own. parent: hash of the file that training began from.
    fresh: weights begin at random, which their average must forget.
    """
    device = next(vae.parameters()).device
    perceptual = losses.Perceptual(s.perceptual_net).to(device)
    for module in (perceptual, vae, disc):
        module.to(memory_format=torch.channels_last)  # in which convolutions are fastest
    ema = copy.deepcopy(vae).eval().requires_grad_(False)
    vae_weights = [p for p in vae.parameters() if p.requires_grad]
    disc_weights = list(disc.parameters())
    # not in the paper: Adam, one for each player, as in MoVQGAN
    adam = functools.partial(torch.optim.Adam, lr=s.lr, betas=(s.beta1, s.beta2),
                             fused=device.type != "mps")
    optimizers = make_optimizers(vae_weights, vae_weights, adam, s.muon_lr)
    optimizers["disc_adam"] = adam(disc_weights)
    state = dict(model=vae, ema=ema, disc=disc, **optimizers)
    step = data.resume(out, state, s, stage, parent)
    compile_parts((vae.encoder, getattr(vae.decoder, "unet", vae.decoder)), s, device)

    loader = load_crops(s, stage, step, vae)
    val = losses.from_uint8(data.val_crops(s.run, s.crop, s.val_pictures)).to(device)
    bar = tqdm(range(step + 1, s.steps + 1), initial=step, total=s.steps, unit="step")
    for step in bar:
        data.seed_step(s, stage, step)
        terms = collections.defaultdict(float)  # means over the parts of a batch
        for _ in range(s.accumulate):
            x = losses.from_uint8(next(loader).to(device, memory_format=torch.channels_last))
            vae_loss, disc_loss, logged = compute(x, vae, disc, perceptual, s)
            add_gradients(vae_loss / s.accumulate, disc_loss / s.accumulate, vae_weights,
                          disc_weights)  # Table 2: the discriminator plays from step 0
            for name in logged:
                terms[name] += logged[name].detach() / s.accumulate
            del vae_loss, disc_loss, logged  # and with them the graph, before the next one
        terms["grad_vae"] = torch.nn.utils.clip_grad_norm_(vae_weights, s.clip_norm)
        terms["grad_disc"] = torch.nn.utils.clip_grad_norm_(disc_weights, s.clip_norm)
        update(optimizers, rate_factor(step, s))
        update_ema(ema, vae, ema_decay_at(step, s) if fresh else s.ema_decay)

        milestone = step % s.val_every == 0 or step == s.steps
        if milestone or step % s.log_every == 0:
            if milestone:
                terms |= validate(ema, val, perceptual, s)
            data.log(s.run, stage, step, terms, bar)
        data.save(out, state, s, step, milestone, parent=parent,
                  architecture=asdict(vae.architecture))


def load_crops(s, stage, step, vae):
    """Parts of batches after `step`, uint8 (b, 3, crop, crop). Crops are numbered over steps."""
    if s.crop % vae.multiple or s.crop < 32:
        data.fail(f"--crop {s.crop} must be a multiple of {vae.multiple}, and 32 at least")
    crops = data.Crops(s.run, s.crop, stage, s.seed)
    numbers = range(step * s.batch, s.steps * s.batch)
    data.listen()
    return iter(DataLoader(crops, part_size(s), sampler=numbers, num_workers=s.workers))


def compile_parts(parts, s, device):
    """Compile modules in place, on CUDA, if a compiler works."""
    if not s.compile or device.type != "cuda":
        return
    try:
        torch.compile(torch.sin)(torch.zeros(9, device=device))
    except Exception as error:
        print(f"not compiled ({' '.join(str(error).split())[:200]})")
        return
    # Channels last, which Inductor would turn off for this network.
    torch._inductor.config.force_layout_optimization = True
    for part in parts:
        part.compile()


def part_size(s):
    """Pictures that are in memory at once: a batch is cut into parts."""
    if s.batch % s.accumulate:
        data.fail(f"--batch {s.batch} must be a multiple of --accumulate {s.accumulate}")
    return s.batch // s.accumulate


def update(optimizers, factor):
    """One step of each optimizer, at `factor` times its own rate."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = factor * optimizer.defaults["lr"]
        optimizer.step()
        optimizer.zero_grad()


def rate_factor(step, s):
    """What a rate is multiplied with: linear up over the warm-up, linear down, almost to 0, over
    the last share `lr_decay` of the steps."""
    rising = step / max(1, s.warmup)
    falling = (s.steps - step + 1) / max(1.0, s.lr_decay * s.steps)
    return min(1.0, rising, falling)


@torch.no_grad()
def update_ema(ema, net, decay):  # Table 2: EMA decay
    """Move each averaged weight towards the trained one, all by one call."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def ema_decay_at(step, s):
    # not in the paper: the usual warm-up, so that the random start is forgotten
    return min(s.ema_decay, (1 + step) / (10 + step))


# ---- Muon, for short runs

class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (K. Jordan 2024, kellerjordan.github.io/posts/muon). A convolution
    counts as a matrix (c_out, the rest), which torch.optim.Muon does not take."""
    def __init__(self, matrices, lr):
        super().__init__(matrices, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        weights = self.param_groups[0]["params"]
        gradients = [w.grad for w in weights]
        if not self.state:
            for w in weights:
                self.state[w]["momentum"] = torch.zeros_like(w)
        momenta = [self.state[w]["momentum"] for w in weights]
        torch._foreach_lerp_(momenta, gradients, 0.05)
        ahead = torch._foreach_lerp(gradients, momenta, 0.95)  # Nesterov's look ahead
        # All of one shape at once: a GPU would wait for many small calls.
        shapes = collections.defaultdict(list)
        for i, w in enumerate(weights):
            shapes[w.shape].append(i)
        for shape, numbers in shapes.items():
            g = torch.stack([ahead[i] for i in numbers]).flatten(2)  # (n, c_out, the rest)
            scale = self.param_groups[0]["lr"] * max(1, g.shape[1] / g.shape[2]) ** 0.5
            moves = (scale * orthogonal(g)).view(-1, *shape)
            torch._foreach_sub_([weights[i] for i in numbers], moves.unbind())


def orthogonal(g):
    """Nearly the orthogonal matrices closest to g (n, rows, columns): five rounds of Newton-Schulz,
    a polynomial that brings every singular value close to 1."""
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = torch.bmm(x, x.mT)
        square = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, square, x, beta=3.4445)
    return x.mT if tall else x


def make_optimizers(weights, candidates, adam, muon_lr):
    """{name: optimizer}: Muon for the matrices among the candidates, where muon_lr is above 0;
    `adam`, a function of weights, for the rest."""
    matrices = [w for w in candidates if w.ndim > 1 and muon_lr > 0]
    taken = set(matrices)
    optimizers = {"adam": adam([w for w in weights if w not in taken])}
    if matrices:
        optimizers["muon"] = Muon(matrices, muon_lr)
    return optimizers


# ---- looking

@torch.no_grad()
def validate(ema, x, perceptual, s):
    """Mean PSNR and perceptual distance of what the EMA weights make of x (n, 3, crop, crop) from
    the posterior's mean; draws the first eight."""
    psnr = 0.0
    perc = 0.0
    shown = []
    for part in x.split(part_size(s)):
        x_hat = ema.decode(ema.encode(part).mu)
        psnr += losses.psnr(part, x_hat).sum().item() / len(x)
        perc += perceptual(part, x_hat).item() * len(part) / len(x)
        shown += list(losses.to_uint8(x_hat))[:8 - len(shown)]
    originals = list(losses.to_uint8(x[:8]))
    data.save_sheet(Path(s.run, "reconstructions.png"), originals + shown, len(shown))
    return dict(val_psnr=psnr, val_perc=perc)


# ---- main

def main(s):
    device = data.pick_device(s)
    vae = model.VAE(model.architecture(s)).to(device)
    disc = losses.Discriminator(s.disc_width).to(device)
    out = Path(s.run, "vae.pt")
    with data.alone(out):
        train(s, "04_train_vae", out, vae, disc)


if __name__ == "__main__":
    data.start(main, Settings, PRESETS, __doc__)
