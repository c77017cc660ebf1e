"""Stage 5 of VIVAT: freeze the encoder, train the decoder further (Sec. 5.3).

Reads   RUN/vae.pt (04_train_vae.py), or with --vae any file that load_vae reads, a peer's too;
        RUN/data (01_data.py).
Writes  RUN/vae_finetuned.pt, RUN/reconstructions.png, RUN/log.jsonl.
Paper   Sec. 5.3; Sec. 5.2 names it as a cure of the color shift.

    python 05_finetune_decoder.py --preset small --run runs/mine

It is the training of 04 with one difference: the encoder, and whatever else shapes the latents,
stays as it is, bit for bit. So latents of both checkpoints are interchangeable, and a step costs
less: encoding builds no graph.
"""
import importlib
from dataclasses import dataclass
from pathlib import Path

data = importlib.import_module("01_data")
model = importlib.import_module("02_model")
losses = importlib.import_module("03_losses")
training = importlib.import_module("04_train_vae")


# ---------------- settings

@dataclass(frozen=True)
class Settings(training.Training):
    # Sec. 5.3 cites a stage even longer than the training of the whole
    steps: int = 1_000_000  # not in the paper: as long as 04
    vae: str = ""           # the file to start from [RUN/vae.pt]
    peer: str = ""          # whose --vae is where the file does not tell: flux, sd3, sd1 or sdxl


DEMO = dict(steps=260, val_every=130, save_every=130, muon_lr=2e-3)
LAPTOP = DEMO | dict(steps=400, val_every=200, save_every=200)
PRESETS = {
    "paper": {},
    "small": training.SMALL | dict(steps=30_000),
    "laptop": losses.CPU | training.LAPTOP | LAPTOP,
    "demo": losses.CPU | training.DEMO | DEMO,
}


# ---------------- the method: frozen latents

def freeze_encoder(vae):
    """Keep what shapes the latents: the encoder, the convolution behind it, a peer's codebook."""
    for name, p in vae.named_parameters():
        p.requires_grad_(name.startswith(("decoder.", "post_quant_conv.")))
    return vae


def load_discriminator(disc, source, s):
    """Our own discriminator goes on; a peer's file has none, so a new one learns from step 1."""
    file = data.read_checkpoint(source)
    weights = file.get("disc")
    if not isinstance(weights, dict):
        return
    if file["latent_mean"] is None:
        data.stop(f"{source} is at step {file['step']} of its training: run {file['stage']}.py to "
                  "its end first")
    expected = {name: w.shape for name, w in disc.state_dict().items()}
    if {name: w.shape for name, w in weights.items()} != expected:
        data.stop(f"{source} has a discriminator of other --disc-width or --disc-layers than "
                  f"{s.disc_width} and {s.disc_layers}")
    disc.load_state_dict(weights)


# ---------------- main

def main(s):
    stage = "05_finetune_decoder"
    source = Path(s.vae or Path(s.run, "vae.pt"))
    out = Path(s.run, "vae_finetuned.pt")
    if s.dry_run and not source.exists():  # nothing to count yet
        return data.print_settings(s)
    # not in the paper: it starts from the EMA weights, which are what 04 is for
    vae = freeze_encoder(model.load_vae(source, peer=s.peer))
    disc = losses.Discriminator(s.disc_width, s.disc_layers)
    if s.dry_run:
        return training.print_counts(s, vae, disc)
    data.picture_names(Path(s.run, "data", "train"), s.crop)
    made_from = data.parent(source)
    device = data.start(s)
    file = data.resume(s, stage, out, made_from, free={"val_pictures", "vae"})
    load_discriminator(disc, source, s)
    latents = None
    if vae.latent_mean is not None:
        latents = (vae.latent_mean, vae.latent_std)
    training.train(s, stage, out, vae.to(device), disc.to(device), made_from, file, latents)
    data.finish()
    return out


if __name__ == "__main__":
    data.command_line(main, Settings, PRESETS, __doc__)
