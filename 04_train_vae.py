"""Stage 4 of VIVAT: train the VAE and its discriminator together, from step 0 (Sec. 3.1, Tables 2 and 3).

Reads   RUN/data (01_data.py); RUN/vae.pt if this run was interrupted.
Writes  RUN/vae.pt, RUN/reconstructions.png (validation pictures over their reconstructions), RUN/log.jsonl.
Paper   Sec. 3.1 (Eq. 7), 5.2, Table 2 (training), Table 3 (weights).

    python 04_train_vae.py --preset small --run runs/mine
    torchrun --nproc-per-node 8 -- 04_train_vae.py --preset paper --run runs/mine

The same command again goes on where the last one stopped, exactly: everything random is a function of (seed, step).
"""
import copy, datetime, importlib, json, math, os, signal, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

data = importlib.import_module("01_data")
model = importlib.import_module("02_model")
losses = importlib.import_module("03_losses")


@dataclass(frozen=True)
class Training(losses.Losses):
    """All but the architecture, so that 05 can have it too."""
    run: str = ""                      # folder that all stages share [runs/PRESET]
    crop: int = data.Settings.crop     # Sec. 5.1
    lr: float = 1e-4                   # Table 2, of both networks
    ema_decay: float = 0.9999          # Table 2
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"   # Table 2; bf16: the VAE under autocast, losses and weights stay FP32
    steps: int = 1_000_000             # not in the paper: of the order of MoVQGAN's 1.3 to 2.4 million
    batch: int = 64                    # not in the paper: pictures a step over all processes; MoVQGAN had 8 to 20 on each of its GPUs
    accumulate: int = 1                # not in the paper: parts that a process's share of the batch goes through memory in
    beta1: float = 0.5                 # not in the paper: Adam, of MoVQGAN; low, since the other player moves
    beta2: float = 0.9                 # not in the paper: Adam, of MoVQGAN
    clip: float = 1.0                  # not in the paper: largest gradient norm; MoVQGAN clips each value at 1.0
    seed: int = 0                      # not in the paper: any; all that is random follows from it and the step
    device: str = "auto"               # not in the paper: cuda, mps or cpu
    compile: bool = False              # not in the paper: torch.compile the VAE
    workers: int = -1                  # not in the paper: loader processes; -1 is 8 beside a GPU, 0 on a CPU
    log_every: int = 100               # not in the paper: steps between two lines of the log
    val_every: int = 2_000             # not in the paper: steps between two looks at the validation pictures
    save_every: int = 2_000            # not in the paper: steps between two checkpoints
    val_pictures: int = 256            # not in the paper: validation pictures that are looked at, at most
    latent_pictures: int = 10_000      # not in the paper: training crops that latent mean and deviation are taken over
    dry_run: bool = False              # print settings and parameter counts as JSON and stop


@dataclass(frozen=True)
class Settings(Training, model.Architecture):
    pass


DEMO = dict(batch=4, lr=1e-3, ema_decay=0.995, val_every=500, save_every=500, val_pictures=64, latent_pictures=256)
SMALL = dict(batch=16, ema_decay=0.999, precision="bf16")
PRESETS = {
    "paper": {},
    "small": model.PRESETS["small"] | losses.PRESETS["small"] | SMALL | dict(steps=60_000),
    "demo": model.PRESETS["demo"] | losses.PRESETS["demo"] | DEMO | dict(steps=1500),
}
FREE = {"run", "vae", "steps", "device", "workers", "compile", "log_every", "val_every", "save_every", "val_pictures", "dry_run"}  # may change on resume


def train(s, stage, out, vae, disc, parent, resume, latents=None):
    """Train the parameters of `vae` that require a gradient, and `disc`, up to step s.steps, and leave the result in `out`.

    resume: what an interrupted run left in `out`, or None. latents: (mean, std) of the latents if they are known, else they are measured.
    """
    if resume and resume["step"] == s.steps and resume["latent_mean"] is not None:
        print(f"{out} is finished at step {s.steps}; more --steps go on from there")
        return
    if not vae.takes(s.crop):
        data.stop(f"--crop {s.crop} must be a multiple of {vae.factor}, from {4 * vae.factor} up")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(vae.parameters()).device
    share = s.batch // world                                # pictures of each step that this process sees
    micro = share // s.accumulate                           # and of these, what is in memory at once
    perceptual = losses.Perceptual(s.perceptual_net).to(device, memory_format=torch.channels_last)
    if s.perceptual_net == "untrained" and rank == 0:
        print("perceptual net: untrained (no download): 'perc' is a feature distance, not LPIPS; --perceptual-net vgg is the real one")
    vae, disc = (net.to(memory_format=torch.channels_last) for net in (vae, disc))      # as above, the layout convolutions are fastest in
    ema = copy.deepcopy(vae).eval().requires_grad_(False)
    trained, judging = [p for p in vae.parameters() if p.requires_grad], list(disc.parameters())
    averaged = [e for e, p in zip(ema.parameters(), vae.parameters()) if p.requires_grad]
    # not in the paper: Adam, one for each player, of MoVQGAN
    adam = dict(lr=s.lr, betas=(s.beta1, s.beta2), fused=device.type in ("cuda", "cpu"))
    optimizer, disc_optimizer = torch.optim.Adam(trained, **adam), torch.optim.Adam(judging, **adam)
    step = 0
    if resume:
        step = resume["step"]
        for module, key in ((vae, "model"), (ema, "ema"), (disc, "disc"), (optimizer, "optimizer"), (disc_optimizer, "disc_optimizer")):
            module.load_state_dict(resume[key])
    save = lambda mean=None, std=None: rank == 0 and model.save_checkpoint(
        out, stage=stage, step=step, settings=asdict(s), architecture=asdict(vae.architecture), parent=parent, latent_mean=mean, latent_std=std,
        model=vae.state_dict(), ema=ema.state_dict(), disc=disc.state_dict(),
        optimizer=optimizer.state_dict(), disc_optimizer=disc_optimizer.state_dict())
    vae_net, disc_net = torch.compile(vae) if s.compile else vae, disc
    if world > 1:
        vae_net, disc_net = DistributedDataParallel(vae_net), DistributedDataParallel(disc_net)

    crops = data.Crops(Path(s.run, "data", "train"), s.crop, s.seed)
    val = losses.from_uint8(data.val_crops(s.run, s.crop, s.val_pictures).to(device)) if rank == 0 else None
    positions = ([t * s.batch + rank * share + a * micro + i for i in range(micro)] for t in range(step, s.steps) for a in range(s.accumulate))
    loader = iter(DataLoader(crops, batch_sampler=positions, num_workers=model.loader_workers(s.workers, device), pin_memory=device.type == "cuda", worker_init_fn=ignore_signals))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=s.precision == "bf16")
    stopping = catch_signals()
    bar = tqdm(total=s.steps, initial=step, unit="step", desc=stage, disable=rank > 0, **data.BAR)
    clock, since = time.time(), step

    for step in range(step + 1, s.steps + 1):
        # Noise of the whole batch on the CPU, then this process's rows: the same on any device and number of processes.
        # (Of a seed, PyTorch's CPU generator looks at 32 bits: seed and step must differ within those.)
        noise = torch.randn(s.batch, vae.architecture.latent_channels, s.crop // vae.factor, s.crop // vae.factor, generator=torch.Generator().manual_seed(1_000_003 * s.seed + step))
        noise = noise[rank * share:(rank + 1) * share]
        noise = (noise.pin_memory() if device.type == "cuda" else noise).split(micro)      # copied without the host waiting
        values = {}
        for part in range(s.accumulate):
            vae_net.require_backward_grad_sync = disc_net.require_backward_grad_sync = part == s.accumulate - 1
            x = losses.from_uint8(next(loader).to(device, non_blocking=True, memory_format=torch.channels_last))   # (micro, 3, crop, crop)
            with autocast:
                x_hat, mean, logvar = vae_net(x, noise[part].to(device, non_blocking=True))
            x_hat, mean, logvar = x_hat.float(), mean.float(), logvar.float()

            # One look of the discriminator at x_hat serves both players, each backward pass reaching its own parameters only.
            fake, real = disc_net(x_hat), disc_net(x)
            disc_loss = losses.discriminator_loss(real, fake, s.gan_loss)
            (disc_loss / s.accumulate).backward(inputs=judging, retain_graph=True)
            total, terms = losses.total_loss(x, x_hat, mean, logvar, fake, perceptual, s)           # Eq. 7
            (total / s.accumulate).backward(inputs=trained)
            for name, value in dict(total=total, **terms, disc=disc_loss, d_real=real.mean(), d_fake=fake.mean()).items():
                values[name] = values.get(name, 0) + value.detach() / s.accumulate
            del real, disc_loss                             # and with them the graph that was retained
        values["grad_vae"] = torch.nn.utils.clip_grad_norm_(trained, s.clip)
        values["grad_disc"] = torch.nn.utils.clip_grad_norm_(judging, s.clip)
        optimizer.step()
        disc_optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        disc_optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():                               # not in the paper: the usual warm-up of the average
            torch._foreach_lerp_(averaged, trained, 1 - min(s.ema_decay, (1 + step) / (10 + step)))
        bar.update()

        last, stop_now = step == s.steps, stopping(device)
        saving, logging = step % s.save_every == 0 or last or stop_now, step % s.log_every == 0 or step % s.val_every == 0 or last
        if saving or logging:
            values = gather(values, world)
            if not all(math.isfinite(v) for v in values.values()):
                bar.close()
                wrong = ", ".join(name for name, v in values.items() if not math.isfinite(v))
                data.stop(f"step {step}: {wrong} not finite; {out} still holds the last good step: lower --lr or --clip, or use --precision fp32")
        if logging:
            rate = (step - since) * s.batch / (time.time() - clock)
            weighted = {f"weighted_{k}": values[k] * w for k, w in dict(kl=s.lambda_kl, recon=s.lambda_recon, adv=s.lambda_adv, perc=s.lambda_perc).items()}
            entry = dict(stage=stage, step=step) | values | weighted | dict(pictures_per_second=rate)
            if (step % s.val_every == 0 or last) and rank == 0:
                entry |= validate(ema, val, perceptual, micro, Path(s.run, "reconstructions.png"))
            if rank == 0:
                bar.write(status(entry, s.steps))
                data.log(s.run, **entry)
            clock, since = time.time(), step
        if saving:
            save()
        if stop_now:
            bar.close()
            print(f"{stage}: saved {out} at step {step}; the same command goes on from there", file=sys.stderr)
            raise SystemExit(128 + stop_now)
    bar.close()
    if rank == 0:
        mean, std = latents or latent_statistics(ema, crops, s, micro, device)
        save(mean, std)
        print(f"{out}: step {step}; latent mean {mean.mean():.3f}, deviation {std.min():.3f} to {std.max():.3f} over {len(std)} channels")


@torch.no_grad()
def validate(ema, x, perceptual, batch, picture):
    """Mean PSNR and perceptual distance of the EMA weights' reconstructions from the posterior's mean; draws the first eight."""
    psnr, perc, shown = [], [], x[:0]
    for part in x.split(batch):
        x_hat = ema.decode(ema.encode(part).mean)
        psnr.append(losses.psnr(part, x_hat))
        perc.append(perceptual(part, x_hat) * len(part))
        shown = torch.cat([shown, x_hat])[:8]
    data.save_sheet(picture, [losses.to_uint8(t) for t in (*x[:len(shown)], *shown)], len(shown), rows=["original", "reconstruction"])
    return {"val_psnr": torch.cat(psnr).mean().item(), "val_perc": (sum(perc) / len(x)).item()}


@torch.no_grad()
def latent_statistics(vae, crops, s, batch, device):
    """Mean and standard deviation of each latent channel, (k,), of z drawn from the posteriors of training crops."""
    n, sums, squares = 0, 0, 0
    for i in tqdm(range(0, s.latent_pictures, batch), unit="batch", desc="latents", **data.BAR):
        x = losses.from_uint8(torch.stack([crops[j] for j in range(i, min(i + batch, s.latent_pictures))]).to(device))
        q = vae.encode(x)
        mean, var = (t.cpu().double() for t in (q.mean, q.logvar.exp()))                # (b, k, h/f, w/f)
        n += mean[:, 0].numel()
        sums = sums + mean.sum(dim=(0, 2, 3))
        squares = squares + (mean.square() + var).sum(dim=(0, 2, 3))                    # E[z^2] = mean^2 + var
    return (sums / n).float(), (squares / n - (sums / n).square()).sqrt().float()


# ---------------------------------------------------------------- plumbing

def status(e, steps):
    """One line: each term raw, and times its weight."""
    terms = "  ".join(f"{k} {e[k]:.4g} > {e['weighted_' + k]:.4g}" for k in ("recon", "perc", "adv", "kl"))
    val = f"  val {e['val_psnr']:.2f} dB, perc {e['val_perc']:.4f}" if "val_psnr" in e else ""
    return (f"{e['step']:7d}/{steps}  loss {e['total']:.4f}  {terms}  D {e['disc']:.3f} real {e['d_real']:+.2f} fake {e['d_fake']:+.2f}"
            f"  grad {e['grad_vae']:.2g} {e['grad_disc']:.2g}  {e['pictures_per_second']:.0f} pic/s{val}")


def gather(values, world):
    """Python numbers of the step's 0-d tensors, means over all processes; the only place where the host waits for the device."""
    numbers = torch.stack([v.float() for v in values.values()])
    if world > 1:
        dist.all_reduce(numbers)
        numbers /= world
    return dict(zip(values, numbers.tolist()))


def catch_signals():
    """After Ctrl-C or SIGTERM the returned function gives the signal's number, in all processes at the same step; a second Ctrl-C kills."""
    caught, asked = [], []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, frame: (caught.append(n), signal.signal(n, signal.SIG_DFL)))

    def stopping(device):
        if not dist.is_initialized():
            return caught[0] if caught else 0
        asked.append(torch.full((), float(caught[0] if caught else 0), device=device))
        dist.all_reduce(asked[-1], op=dist.ReduceOp.MAX)
        return int(asked.pop(0)) if len(asked) > 1 else 0       # what was asked a step ago: so the host need not wait for this step
    return stopping


def ignore_signals(worker):
    """Loader processes leave it to the main process to end: Ctrl-C reaches them too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def prepare(s, stage, out, parent, free=FREE):
    """Device, processes and what an interrupted run left: (device, checkpoint or None). What contradicts it is an error."""
    torch.manual_seed(s.seed)
    torch.backends.cudnn.allow_tf32 = s.precision != "fp32"
    torch.set_float32_matmul_precision("highest" if s.precision == "fp32" else "high")
    device = model.pick_device(s.device)
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=3))   # a text encoder may load for long
    world = dist.get_world_size() if dist.is_initialized() else 1
    if s.batch < 1 or s.batch % (world * s.accumulate):
        data.stop(f"--batch {s.batch} must be a multiple of {world} processes times --accumulate {s.accumulate}")
    file = None
    if out.exists():
        file = model.read_checkpoint(out, (stage,), "take another --run, or remove it")
        data.check_settings(file["settings"], asdict(s), free, out)
        if file["parent"]["sha256"] != parent["sha256"]:
            data.stop(f"{parent['path']} has changed since {out} was begun: take another --run for what is new")
        if file["step"] > s.steps:
            data.stop(f"{out} is at step {file['step']}, beyond --steps {s.steps}")
    # The log goes back to the checkpoint too: lines of steps that were lost would otherwise stand in it twice.
    log = Path(s.run, "log.jsonl")
    if log.exists() and int(os.environ.get("RANK", 0)) == 0:
        keep = [line for line in data.read_jsonl(log) if line.get("stage") != stage or (file and line["step"] <= file["step"])]
        data.write_aside(log, lambda f: f.write("".join(json.dumps(line) + "\n" for line in keep).encode()))
    return device, file


def print_counts(s, vae, disc):
    data.print_settings(s, parameters=model.count(vae), encoder=model.count(vae.encoder), decoder=model.count(vae.decoder), discriminator=model.count(disc))


def main(s):
    if s.dry_run:
        with torch.device("meta"):
            return print_counts(s, model.build(s), losses.Discriminator(s.disc_width, s.disc_layers))
    out, pictures = Path(s.run, "vae.pt"), Path(s.run, "data", "train")
    data.picture_names(pictures, s.crop)
    parent = model.parent(pictures / "metadata.jsonl")
    device, resume = prepare(s, "04_train_vae", out, parent)
    vae, disc = model.build(s).to(device), losses.Discriminator(s.disc_width, s.disc_layers).to(device)
    train(s, "04_train_vae", out, vae, disc, parent, resume)
    if dist.is_initialized():
        dist.destroy_process_group()
    return out


if __name__ == "__main__":
    data.command_line(main, Settings, PRESETS, __doc__)
