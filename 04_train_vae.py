"""Stage 4 of VIVAT: train the VAE and its discriminator together.

Reads   RUN/data (01_data.py); RUN/vae.pt if this run was interrupted.
Writes  RUN/vae.pt, RUN/reconstructions.png (validation pictures over their reconstructions),
        RUN/log.jsonl.
Paper   Sec. 3.1 (Eq. 7), 5.2, Table 2 (training), Table 3 (weights).

    python 04_train_vae.py --preset small --run runs/mine
    torchrun --nproc-per-node 8 -- 04_train_vae.py --preset paper --run runs/mine

The same command again goes on where the last one stopped, on a CPU bit for bit: all that is random
is a function of (stage, seed, step).
"""
import collections
import copy
import functools
import importlib
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

data = importlib.import_module("01_data")
model = importlib.import_module("02_model")
losses = importlib.import_module("03_losses")


# ---------------- settings

@dataclass(frozen=True)
class Training(data.TrainingRun, losses.Losses):
    """All but the architecture, so that 05 can have it too."""
    crop: int = losses.Settings.crop  # Sec. 5.1: side of a crop
    lr: float = 1e-4                 # Table 2 (VAE); not in the paper: the discriminator's too
    ema_decay: float = 0.9999        # Table 2
    # bf16: the VAE alone under autocast; weights and losses stay FP32, on a GPU with TF32 products
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # Table 2: FP32
    steps: int = 1_000_000           # not in the paper: MoVQGAN took 1.3 to 2.4 million
    batch: int = 64                  # not in the paper: over all processes; MoVQGAN 8 to 20 per GPU
    # muon: for convolutions and matrices, at a rate of its own; Adam for the rest
    optimizer: Literal["adam", "muon"] = "adam"  # not in the paper: as in MoVQGAN
    muon_lr: float = 5e-3            # not in the paper: best of a few short runs on scenes
    warmup: int = 0                  # not in the paper: first steps, in which rates rise from 0
    decay: float = 0.0               # not in the paper: last share of steps, where rates fall to 0
    beta1: float = 0.5               # not in the paper: as in MoVQGAN; low: its target moves
    beta2: float = 0.9               # not in the paper: Adam as in MoVQGAN
    clip: float = 1.0                # not in the paper: gradient norm; MoVQGAN clips each value
    val_pictures: int = 256          # at most so many validation pictures are looked at
    latent_pictures: int = 10_000    # not in the paper: crops behind latent mean and deviation


@dataclass(frozen=True)
class Settings(Training, model.Architecture):
    pass


DEMO = dict(batch=4, lr=1e-3, ema_decay=0.995, val_every=500, save_every=500, val_pictures=64,
            latent_pictures=256, optimizer="muon", decay=1.0)
LAPTOP = DEMO | dict(batch=8)
SMALL = dict(batch=16, ema_decay=0.999, precision="bf16")
PRESETS = {
    "paper": {},
    "small": model.PRESETS["small"] | SMALL | dict(steps=60_000),
    "laptop": model.PRESETS["laptop"] | losses.CPU | LAPTOP | dict(steps=2500),
    "demo": model.PRESETS["demo"] | losses.CPU | DEMO | dict(steps=1200),
}


# ---------------- one step of both players

def add_gradients(x, noise, vae, disc, perceptual, trained, judging, s):
    """Add one part's gradients to both players' weights, `trained` and `judging`. Returns what is
    logged: total, the four terms before their weights, D's loss and its mean logits.

    x: pictures (b, 3, crop, crop) in [-1, 1]. noise: N(0, I) in the latents' shape.
    """
    with data.autocast(x.device, s):
        x_hat, mu, logvar = [v.float() for v in vae(x, noise)]
    share = 1 / (s.accumulate * data.processes()[1])  # of this part in the mean over the batch

    # Table 2: the discriminator plays from step 0.
    # not in the paper: one x_hat serves both players, judged once. Each backward pass reaches the
    # weights of its own player only.
    real = disc(x)
    fake = disc(x_hat)
    disc_loss = losses.discriminator_loss(real, fake, s.gan_loss)
    (share * disc_loss).backward(inputs=judging, retain_graph=True)

    kl = losses.latent_loss(mu, logvar, noise, s)  # Eq. 3: kl_loss, if nothing else is chosen
    recon = losses.recon_loss(x, x_hat)  # Eq. 4
    adv = losses.adversarial_loss(fake, s.gan_loss)  # Eq. 5
    perc = perceptual(x, x_hat)  # Eq. 6
    total = losses.total_loss(kl, recon, adv, perc, s)  # Eq. 7
    (share * total).backward(inputs=trained)
    return dict(total=total, kl=kl, recon=recon, adv=adv, perc=perc,
                disc=disc_loss, d_real=real.mean(), d_fake=fake.mean())


def train_step(parts, vae, disc, perceptual, optimizers, s, add=add_gradients):
    """One step of both players; returns 0-d tensors for the log.

    parts: this process's share of the batch as (x, noise), of which one at a time is in memory.
    """
    trained = [p for p in vae.parameters() if p.requires_grad]
    judging = list(disc.parameters())
    values = collections.defaultdict(float)
    for x, *noise in parts:
        terms = add(x, *noise, vae, disc, perceptual, trained, judging, s)
        for name in terms:
            values[name] += terms[name].detach() / s.accumulate
        del terms  # and with them the discriminator's graph, before the next part
    data.sum_gradients(trained)
    data.sum_gradients(judging)
    values["grad_vae"] = torch.nn.utils.clip_grad_norm_(trained, s.clip)
    values["grad_disc"] = torch.nn.utils.clip_grad_norm_(judging, s.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return values


# ---------------- the loop

def train(s, stage, out, vae, disc, made_from, file, add=add_gradients, more_noise=()):
    """Train `disc` and what requires a gradient in `vae` up to s.steps; the result is in `out`.

    file: what an interrupted run left in `out`, or None. add: add_gradients, or 05's own;
    more_noise: the shapes of the noise that it takes besides.
    """
    rank, _ = data.processes()
    if file and file["step"] == s.steps and file["latent_mean"] is not None:
        if rank == 0:
            print(f"{out} is finished at step {s.steps}; more --steps go on from there")
        return
    if not vae.takes(s.crop):
        data.stop(f"--crop {s.crop} must be a multiple of {vae.multiple}, from {vae.smallest} up")
    device = next(vae.parameters()).device
    torch.backends.cudnn.benchmark = True  # crops have one size
    layout = dict(memory_format=torch.channels_last)  # in which convolutions are fastest
    perceptual = losses.Perceptual(s.perceptual_net).to(device, **layout)
    if s.perceptual_net == "untrained" and rank == 0:
        print("perceptual net: untrained (no download): 'perc' is a feature distance, not LPIPS; "
              "--perceptual-net vgg is the real one")
    vae = vae.to(**layout)
    disc = disc.to(**layout)
    ema = copy.deepcopy(vae).eval().requires_grad_(False)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizers = both_optimizers(trained, disc, device, s)
    state = dict(model=vae, ema=ema, disc=disc, **optimizers)
    step = data.load_state(file, state)
    about = dict(stage=stage, settings=asdict(s), architecture=asdict(vae.architecture),
                 parent=made_from)
    forward = torch.compile(model.set_fast(vae, False)) if s.compile else vae

    crops = data.Crops(Path(s.run, "data", "train"), s.crop, stage, s.seed)
    loader, bar = data.begin(crops, s, stage, step, device)
    if rank == 0:
        val = losses.from_uint8(data.val_crops(s.run, s.crop, s.val_pictures).to(device))
    clock = time.time()
    since = step
    for step in range(step + 1, s.steps + 1):
        parts = load_parts(loader, vae, more_noise, stage, step, device, s)
        factor = model.rate_factor(step, s.steps, s.decay, s.warmup)
        model.set_rates(optimizers.values(), factor)
        now = replace(s, lambda_kl=losses.latent_weight(s, step))  # at this step
        values = train_step(parts, forward, disc, perceptual, optimizers.values(), now, add)
        model.update_average(ema.parameters(), vae.parameters(), step, s.ema_decay)
        bar.update()

        last = step == s.steps
        looking = last or step % s.val_every == 0
        logging = looking or step % s.log_every == 0
        saving = last or step % s.save_every == 0
        stopping = rank == 0 and bool(data.SIGNALS)
        if logging or saving or stopping:
            values = data.gather(values, alone=not (logging or saving))
            data.check_finite(values, step, out, bar)
        if logging and rank == 0:
            entry = log_entry(values, stage, step, now)
            entry["pictures_per_second"] = (step - since) * s.batch / (time.time() - clock)
            if looking:
                entry |= validate(ema, val, perceptual, s)
            bar.write(status(entry, s.steps))
            data.log(s.run, **entry)
        if logging:
            clock = time.time()
            since = step
        if rank == 0 and (saving or stopping):
            data.save_state(out, state, step=step, latent_mean=None, latent_std=None, **about)
        if stopping:
            bar.close()
            data.leave(stage, out, step)
    bar.close()
    data.stop_listening()
    if rank == 0:
        mean, std = vae.latent_mean, vae.latent_std  # 05 leaves them as they are
        if mean is None:
            mean, std = latent_statistics(ema, crops, s, device)
        data.save_state(out, state, step=step, latent_mean=mean, latent_std=std, **about)
        print(f"{out}: step {step}; latent mean {mean.mean():.3f}, deviation {std.min():.3f} to "
              f"{std.max():.3f} over {len(std)} channels")


def both_optimizers(trained, disc, device, s):
    # not in the paper: Adam, one for each player, as in MoVQGAN
    adam = functools.partial(torch.optim.Adam, lr=s.lr, betas=(s.beta1, s.beta2),
                             fused=device.type in ("cuda", "cpu"))
    optimizers = model.make_optimizers(trained, trained, s, adam)
    optimizers["disc_optimizer"] = adam(disc.parameters())
    return optimizers


def load_parts(loader, vae, more_noise, stage, step, device, s):
    """(x, noise) of each part of a step, on the device, and more noise of the shapes given.

    The noise of the whole batch is drawn on the CPU, then cut into the processes' shares and their
    parts: the same on any device and with any number of processes.
    """
    rank, world = data.processes()
    generator = data.generator(stage, s.seed, step)
    side = s.crop // vae.factor
    shapes = [(vae.architecture.latent_channels, side, side), *more_noise]
    pin = device.type == "cuda"  # to copy while it computes
    drawn = [torch.randn(s.batch, *shape, generator=generator, pin_memory=pin) for shape in shapes]
    parts = [whole.chunk(world)[rank].chunk(s.accumulate) for whole in drawn]
    for part in zip(*parts):
        x = next(loader).to(device, non_blocking=pin, memory_format=torch.channels_last)
        noise = [v.to(device, non_blocking=pin) for v in part]
        yield losses.from_uint8(x), *noise


# ---------------- looking

@torch.no_grad()
def validate(ema, x, perceptual, s):
    """Mean PSNR and perceptual distance of what the EMA weights make of x (n, 3, crop, crop) from
    the posterior's mean; draws the first eight."""
    psnr = []
    perc = 0.0
    shown = []
    for part in x.split(part_size(s)):
        x_hat = ema.decode(ema.encode(part).mu)
        psnr.append(losses.psnr(part, x_hat))
        perc += perceptual(part, x_hat).item() * len(part) / len(x)
        shown += list(x_hat)[:8 - len(shown)]
    tiles = [losses.to_uint8(picture) for picture in [*x[:len(shown)], *shown]]
    data.save_sheet(Path(s.run, "reconstructions.png"), tiles, len(shown),
                    rows=["original", "reconstruction"])
    return {"val_psnr": torch.cat(psnr).mean().item(), "val_perc": perc}


@torch.no_grad()
def latent_statistics(vae, crops, s, device):
    """Mean and deviation of each latent channel, (k,), of z drawn from training crops' posteriors:
    E[z] = E[mu], E[z^2] = E[mu^2 + sigma^2]."""
    n = 0
    total = 0
    squares = 0
    numbers = torch.arange(s.latent_pictures).split(part_size(s))
    for part in tqdm(numbers, unit="batch", desc="latents", **data.BAR):
        x = losses.from_uint8(torch.stack([crops[int(i)] for i in part]).to(device))
        q = vae.encode(x)
        mu = q.mu.cpu().double()  # (b, k, h/f, w/f)
        variance = q.logvar.exp().cpu().double()
        n += mu[:, 0].numel()
        total += mu.sum(dim=(0, 2, 3))  # (k,)
        squares += (mu.square() + variance).sum(dim=(0, 2, 3))
    mean = total / n
    return mean.float(), (squares / n - mean.square()).sqrt().float()


def part_size(s):
    """How many pictures a process has in memory at once."""
    return s.batch // (s.accumulate * data.processes()[1])


def log_entry(values, stage, step, s):
    weights = dict(kl=s.lambda_kl, recon=s.lambda_recon, adv=s.lambda_adv, perc=s.lambda_perc)
    weighted = {f"weighted_{name}": values[name] * weight for name, weight in weights.items()
                if name in values}
    return dict(stage=stage, step=step) | values | weighted


def status(e, steps):
    """One line: each term raw, and times its weight."""
    line = f"{e['step']:7d}/{steps}  loss {e['total']:.4f}"
    for name in ("recon", "perc", "adv", "kl"):
        if name in e:
            line += f"  {name} {e[name]:.4g} > {e['weighted_' + name]:.4g}"
    line += f"  D {e['disc']:.3f} real {e['d_real']:+.2f} fake {e['d_fake']:+.2f}"
    line += f"  grad {e['grad_vae']:.2g} {e['grad_disc']:.2g}"
    line += f"  {e['pictures_per_second']:.0f} pictures/s"
    if "val_psnr" in e:
        line += f"  val {e['val_psnr']:.2f} dB, perc {e['val_perc']:.4f}"
    return line


# ---------------- main

def print_counts(s, vae, disc):
    data.print_settings(s, parameters=model.count(vae), encoder=model.count(vae.encoder),
                        decoder=model.count(vae.decoder), discriminator=model.count(disc))


def main(s):
    stage = "04_train_vae"
    if s.dry_run:
        with torch.device("meta"):
            disc = losses.Discriminator(s.disc_width, s.disc_layers)
            return print_counts(s, model.build(s), disc)
    out = Path(s.run, "vae.pt")
    folder = Path(s.run, "data", "train")
    data.picture_names(folder, s.crop)
    made_from = data.parent(folder / "index.json")
    device = data.start(s)
    file = data.resume(s, stage, out, made_from, free={"val_pictures"})
    vae = model.build(s).to(device)
    disc = losses.Discriminator(s.disc_width, s.disc_layers).to(device)
    train(s, stage, out, vae, disc, made_from, file)
    data.finish()


if __name__ == "__main__":
    data.command_line(main, Settings, PRESETS, __doc__)
