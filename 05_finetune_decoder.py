"""Stage 5 of VIVAT: freeze the encoder, train the decoder further (Sec. 5.3).

Reads   RUN/vae.pt (04_train_vae.py), or with --vae any file that load_vae reads, a peer's too; RUN/data (01_data.py).
Writes  RUN/vae_finetuned.pt, RUN/reconstructions.png, RUN/log.jsonl.
Paper   Sec. 5.3; Sec. 5.2 names it as a cure of the color shift.

    python 05_finetune_decoder.py --preset small --run runs/mine

It is the training of 04 with one difference: the encoder, and whatever else shapes the latents, stays as it is, bit for bit.
So latents of both checkpoints are interchangeable, and a step costs less: encoding builds no graph.
"""
import importlib
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

data = importlib.import_module("01_data")
model = importlib.import_module("02_model")
losses = importlib.import_module("03_losses")
training = importlib.import_module("04_train_vae")


@dataclass(frozen=True)
class Settings(training.Training):
    steps: int = 1_000_000     # Sec. 5.3 cites a stage even longer than the training of the whole; not in the paper: as long as 04
    vae: str = ""              # not in the paper: the file to start from [RUN/vae.pt]
    peer: str = ""             # not in the paper: whose --vae is, where neither file nor name tell: flux, sd3, sd1 or sdxl


PRESETS = {
    "paper": {},
    "small": losses.PRESETS["small"] | training.SMALL | dict(steps=30_000),
    "demo": losses.PRESETS["demo"] | training.DEMO | dict(steps=300, val_every=150, save_every=150),
}


def freeze_encoder(vae):
    """Keep what shapes the latents: the encoder, the convolution behind it, a VQ peer's codebook."""
    for name, p in vae.named_parameters():
        p.requires_grad_(name.startswith(("decoder.", "post_quant_conv.")))
    return vae


def main(s):
    source, out, pictures = Path(s.vae or Path(s.run, "vae.pt")), Path(s.run, "vae_finetuned.pt"), Path(s.run, "data", "train")
    if s.dry_run and not source.exists():                        # nothing to count yet
        return data.print_settings(s)
    # not in the paper: it starts from the EMA weights, which are what 04 is for
    vae = freeze_encoder(model.load_vae(source, peer=s.peer or None))
    disc = losses.Discriminator(s.disc_width, s.disc_layers)
    if s.dry_run:
        return training.print_counts(s, vae, disc)
    data.picture_names(pictures, s.crop)
    parent = model.parent(source)
    device, resume = training.prepare(s, "05_finetune_decoder", out, parent)
    # Our own discriminator goes on; a peer's file has none, and a new one learns from the first step.
    file = model.read_checkpoint(source)
    if isinstance(weights := file.get("disc"), dict):
        if file["latent_mean"] is None:
            data.stop(f"{source} is at step {file['step']} of its training: run {file['stage']}.py to its end first")
        if {k: w.shape for k, w in weights.items()} != {k: w.shape for k, w in disc.state_dict().items()}:
            data.stop(f"{source} has a discriminator of other --disc-width or --disc-layers than {s.disc_width} and {s.disc_layers}")
        disc.load_state_dict(weights)
    latents = None if vae.latent_mean is None else (vae.latent_mean, vae.latent_std)
    training.train(s, "05_finetune_decoder", out, vae.to(device), disc.to(device), parent, resume, latents)
    if dist.is_initialized():
        dist.destroy_process_group()
    return out


if __name__ == "__main__":
    data.command_line(main, Settings, PRESETS, __doc__)
