"""Stage 2 of VIVAT: the autoencoder.

Reads   nothing; load_vae(path) reads our checkpoints and files from CompVis LDM, Stable Diffusion
        1.x, SDXL, SD 3, Flux, MoVQGAN and Kandinsky 3.
Writes  nothing; prints the network as a table from input to output, and its receptive field.
Paper   Sec. 3.1 (posterior), 3.2, 5.2 (padding, Spatially Conditional Normalization),
        Fig. 1, 7, 8, Table 2.

    python 02_model.py --preset paper --size 256

Shapes: b pictures, c channels, h and w the sides of the picture, or of a block's x; f the
down-sampling factor (8), k latent channels (16). Parameters have CompVis's names, so that peers'
files load unchanged.
"""
import functools
import importlib
import itertools
import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

data = importlib.import_module("01_data")  # a module name may not start with a digit


# ---------------- settings

@dataclass(frozen=True)
class Architecture:
    """What a checkpoint must carry to build its network again."""
    width: int = 128                # not in the paper: as in MoVQGAN-67M, the smallest base model
    width_mult: tuple[int, ...] = (1, 2, 2, 4)  # not in the paper: as in MoVQGAN; hence f = 8
    res_blocks: int = 2             # not in the paper: as in MoVQGAN; a decoder level has one more
    attention_levels: tuple[int, ...] = (3,)  # not in the paper: the last level, as in MoVQGAN
    latent_channels: int = 16       # Table 2: latent dimension d_z
    padding: Literal["reflect", "zeros"] = "reflect"  # Sec. 5.2: reflect cures the corner artifact
    decoder_norm: Literal["spatial", "group"] = "spatial"  # Sec. 5.2: spatial cures droplets
    groups: int = 32                # not in the paper: groups of GroupNorm, as in MoVQGAN
    quant_conv: bool = False        # 1x1 convolutions around the latent, which older peers have
    double_z: bool = True           # Sec. 3.2: mean and log-variance; False: a VQ peer's mean alone
    codebook: int = 0               # size of a VQ peer's codebook; 0: none, as in Sec. 3.2


@dataclass(frozen=True)
class Settings(data.Run, Architecture):
    size: int = 256  # side of the picture that the table is made for


CPU = dict(res_blocks=1, attention_levels=(), groups=8)
PRESETS = {
    "paper": {},
    "small": dict(width=64),
    "laptop": CPU | dict(width=24),
    "demo": CPU | dict(width=16),
}


# ---------------- blocks (Figures 7 and 8)

class SpatialNorm(nn.Module):
    """Spatially Conditional Normalization (Sec. 5.2, from MoVQ): GroupNorm(x) * y(z) + b(z).

    Every norm of the decoder sees the latent z. The 1x1 convolutions y and b commute with
    up-sampling by nearest neighbor, so they run at the latent's resolution.
    """
    fast = True

    def __init__(self, channels, a):
        super().__init__()
        # not in the paper: this eps, from MoVQGAN, and PyTorch's own initialization in all layers
        self.norm_layer = nn.GroupNorm(a.groups, channels, eps=1e-6)
        self.conv_y = nn.Conv2d(a.latent_channels, channels, 1)
        self.conv_b = nn.Conv2d(a.latent_channels, channels, 1)

    def forward(self, x, z):
        scale = self.conv_y(z)  # (b, c, h/f, w/f)
        shift = self.conv_b(z)
        up = functools.partial(F.interpolate, size=x.shape[2:], mode="nearest")
        return self.norm_layer(x) * up(scale) + up(shift)  # (b, c, h, w)


class GroupNorm(nn.GroupNorm):
    """The encoder's norm, and the baseline decoder's: it does not look at the latent."""
    fast = True

    def __init__(self, channels, a):
        super().__init__(a.groups, channels, eps=1e-6)

    def forward(self, x, z=None):
        return super().forward(x)


def norm_swish(norm, x, z=None):  # Fig. 7: before each convolution, a norm and swish
    if norm.fast:
        return fast_norm_swish(norm, x, z)  # the same, faster: at the end of this file
    return F.silu(norm(x, z))


class Conv3x3(nn.Conv2d):  # Sec. 5.2, corner artifact: "reflect" is the cure
    fast = True

    def __init__(self, c_in, c_out, a):
        super().__init__(c_in, c_out, 3, padding=1, padding_mode=a.padding)

    def forward(self, x):
        if self.fast and self.padding_mode == "reflect":
            return F.conv2d(ReflectPad.apply(x, (1, 1, 1, 1)), self.weight, self.bias)
        return super().forward(x)


class ResBlock(nn.Module):  # Fig. 7
    def __init__(self, c_in, c_out, norm, a):
        super().__init__()
        self.norm1 = norm(c_in, a)
        self.conv1 = Conv3x3(c_in, c_out, a)
        self.norm2 = norm(c_out, a)
        self.conv2 = Conv3x3(c_out, c_out, a)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, z=None):  # (b, c_in, ., .)
        y = self.conv1(norm_swish(self.norm1, x, z))
        y = self.conv2(norm_swish(self.norm2, y, z))
        return y + self.nin_shortcut(x)  # (b, c_out, ., .)


class AttnBlock(nn.Module):  # Fig. 8: self-attention over all positions, one head
    def __init__(self, channels, norm, a):
        super().__init__()
        self.norm = norm(channels, a)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, z=None):
        y = self.norm(x, z)  # (b, c, h, w)
        q, k, v = [conv(y).flatten(2).mT[:, None].contiguous()  # (b, 1, h w, c)
                   for conv in (self.q, self.k, self.v)]
        y = F.scaled_dot_product_attention(q, k, v)  # (b, 1, h w, c)
        return x + self.proj_out(y[:, 0].mT.reshape(x.shape))


class Downsample(nn.Module):
    # not in the paper: padded on the right and below only, as in MoVQGAN; here as --padding says
    fast = True

    def __init__(self, channels, a):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.mode = "reflect" if a.padding == "reflect" else "constant"

    def forward(self, x):
        if self.fast and self.mode == "reflect":
            return self.conv(ReflectPad.apply(x, (0, 1, 0, 1)))
        return self.conv(F.pad(x, (0, 1, 0, 1), mode=self.mode))


class Upsample(nn.Module):  # not in the paper: nearest neighbor, as in MoVQGAN
    def __init__(self, channels, a):
        super().__init__()
        self.conv = Conv3x3(channels, channels, a)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """ResNet blocks of one resolution, each followed by attention where the level has some."""
    def __init__(self, c_in, c_out, blocks, attention, norm, a):
        super().__init__()
        widths = itertools.pairwise([c_in] + [c_out] * blocks)
        self.block = nn.ModuleList(ResBlock(*pair, norm, a) for pair in widths)
        attentions = blocks if attention else 0
        self.attn = nn.ModuleList(AttnBlock(c_out, norm, a) for _ in range(attentions))

    def forward(self, x, z=None):
        for i, block in enumerate(self.block):
            x = block(x, z)
            if self.attn:
                x = self.attn[i](x, z)
        return x


def middle(channels, norm, a):
    return nn.ModuleDict({"block_1": ResBlock(channels, channels, norm, a),
                          "attn_1": AttnBlock(channels, norm, a),
                          "block_2": ResBlock(channels, channels, norm, a)})


# ---------------- encoder, decoder, VAE (Figure 1)

class Encoder(nn.Module):
    def __init__(self, a):
        super().__init__()
        widths = [a.width * m for m in a.width_mult]
        self.conv_in = Conv3x3(3, a.width, a)
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([a.width] + widths, widths)):
            attention = i in a.attention_levels
            self.down.append(Level(c_in, c_out, a.res_blocks, attention, GroupNorm, a))
            last = i == len(widths) - 1
            self.down[i].downsample = nn.Identity() if last else Downsample(c_out, a)
        self.mid = middle(widths[-1], GroupNorm, a)
        self.norm_out = GroupNorm(widths[-1], a)
        moments = a.latent_channels * (2 if a.double_z else 1)
        self.conv_out = Conv3x3(widths[-1], moments, a)

    def forward(self, x):  # (b, 3, h, w)
        x = self.conv_in(x)  # (b, width, h, w)
        for level in self.down:
            x = level.downsample(level(x))  # half the height and width, but for the last
        for block in self.mid.values():
            x = block(x)
        return self.conv_out(norm_swish(self.norm_out, x))  # (b, 2k, h/f, w/f)


class Decoder(nn.Module):
    def __init__(self, a):
        super().__init__()
        norm = SpatialNorm if a.decoder_norm == "spatial" else GroupNorm
        widths = [a.width * m for m in a.width_mult]
        self.conv_in = Conv3x3(a.latent_channels, widths[-1], a)
        self.mid = middle(widths[-1], norm, a)
        self.up = nn.ModuleList()  # up.0 has full resolution, so it runs last
        for i, (c_in, c_out) in enumerate(zip(widths[1:] + widths[-1:], widths)):
            attention = i in a.attention_levels
            self.up.append(Level(c_in, c_out, a.res_blocks + 1, attention, norm, a))
            self.up[i].upsample = Upsample(c_out, a) if i > 0 else nn.Identity()
        self.norm_out = norm(widths[0], a)
        self.conv_out = Conv3x3(widths[0], 3, a)

    def forward(self, x, z):  # both (b, k, h/f, w/f): what is decoded, and what norms see
        x = self.conv_in(x)
        for block in self.mid.values():
            x = block(x, z)
        for level in reversed(self.up):
            x = level.upsample(level(x, z))  # twice the height and width, but for the last
        return self.conv_out(norm_swish(self.norm_out, x, z))  # (b, 3, h, w)


class Posterior:  # q(z|x) = N(mu, exp(logvar)), Sec. 3.1
    """mu and logvar: (b, k, h/f, w/f)."""
    def __init__(self, mu, logvar):
        self.mu = mu
        self.logvar = logvar.clamp(-30.0, 20.0)  # not in the paper: as CompVis, against overflow

    def sample(self, noise=None):
        """z = mu + sigma * noise, with noise ~ N(0, I) in the shape of mu."""
        if noise is None:
            noise = torch.randn_like(self.mu)
        return self.mu + torch.exp(0.5 * self.logvar) * noise


class VAE(nn.Module):
    """The KL-VAE of VIVAT: pictures (b, 3, h, w) in [-1, 1], latents (b, k, h/f, w/f).

    latent_mean and latent_std, (k,), come with a finished checkpoint.
    """
    def __init__(self, a):
        super().__init__()
        k = a.latent_channels
        self.architecture = a
        self.factor = 2 ** (len(a.width_mult) - 1)
        self.multiple = self.factor  # of which a picture's sides must be
        self.smallest = 4 * self.factor  # side of a picture; a latent of 4 x 4 can be reflected
        self.latent_mean = None
        self.latent_std = None
        self.encoder = Encoder(a)
        self.decoder = Decoder(a)
        if a.quant_conv:
            moments = k * (2 if a.double_z else 1)
            self.quant_conv = nn.Conv2d(moments, moments, 1)
            self.post_quant_conv = nn.Conv2d(k, k, 1)
        if a.codebook:
            self.quantize = nn.ModuleDict({"embedding": nn.Embedding(a.codebook, k)})

    def takes(self, *sides):
        """Whether pictures of these sides can be encoded and decoded."""
        return all(side % self.multiple == 0 and side >= self.smallest for side in sides)

    def encode(self, x):
        """Pictures to a Posterior. ValueError where the sides do not fit."""
        if x.ndim != 4 or x.shape[1] != 3 or not self.takes(*x.shape[2:]):
            raise ValueError(f"pictures must be (b, 3, h, w) with h and w multiples of "
                             f"{self.multiple} from {self.smallest} up, not {tuple(x.shape)}")
        moments = self.encoder(x)  # (b, 2k, h/f, w/f)
        if self.architecture.quant_conv:
            moments = self.quant_conv(moments)
        if self.architecture.double_z:
            return Posterior(*moments.chunk(2, dim=1))
        if self.architecture.codebook:
            moments = self.nearest_codes(moments)
        return Posterior(moments, torch.full_like(moments, -30.0))  # sigma 3e-7: no noise

    def nearest_codes(self, z):
        """A VQ peer's bottleneck: each latent vector becomes the nearest of the codebook."""
        book = self.quantize["embedding"].weight  # (codebook, k)
        vectors = z.movedim(1, -1).flatten(1, 2)  # (b, h w, k)
        nearest = torch.cdist(vectors, book).argmin(-1)
        return F.embedding(nearest, book).mT.reshape(z.shape)

    def decode(self, z):
        """Latents to pictures."""
        if self.architecture.quant_conv:
            return self.decoder(self.post_quant_conv(z), z)
        return self.decoder(z, z)

    def normalize(self, z):
        """Latents as a diffusion model learns them: mean 0 and deviation 1 in each channel."""
        return (z - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def denormalize(self, z):
        return z * self.latent_std[:, None, None] + self.latent_mean[:, None, None]

    def forward(self, x, noise=None):
        """Encode, sample, decode: x_hat, mu, logvar."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(noise)), posterior.mu, posterior.logvar


def build(a):
    """A VAE from any settings that include an Architecture; stops where they are impossible."""
    a = Architecture(**{field.name: getattr(a, field.name) for field in fields(Architecture)})
    numbers = (a.width, a.groups, a.res_blocks, a.latent_channels, len(a.width_mult))
    too_small = min(*numbers, *a.width_mult) < 1
    if too_small or any(a.width * m % a.groups for m in a.width_mult):
        data.stop(f"--width {a.width} times --width-mult {a.width_mult} must be multiples of "
                  f"--groups {a.groups}, and all at least 1")
    return VAE(a)


# ---------------- what training does with gradients and weights

class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for weights with two or more dimensions (K. Jordan 2024,
    kellerjordan.github.io/posts/muon). A convolution counts as a matrix (c_out, the rest), which
    torch.optim.Muon does not take."""
    def __init__(self, weights, lr, momentum=0.95):
        super().__init__(weights, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                state = self.state[w]
                if not state:
                    state["average"] = torch.zeros_like(w.grad)
                state["average"].lerp_(w.grad, 1 - group["momentum"])
                g = w.grad.lerp(state["average"], group["momentum"])  # Nesterov's look ahead
                g = g.flatten(1)  # (c_out, the rest)
                scale = max(1, g.shape[0] / g.shape[1]) ** 0.5
                w.sub_(orthogonal(g).view(w.shape), alpha=group["lr"] * scale)


def orthogonal(g):
    """Nearly the orthogonal matrix closest to g: five rounds of Newton-Schulz, a polynomial that
    brings every singular value close to 1."""
    tall = g.shape[0] > g.shape[1]
    x = g.mT if tall else g
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.mT if tall else x


def make_optimizers(weights, inside, s, adam):
    """{name in the checkpoint: optimizer}: with --optimizer muon, Muon for the matrices among the
    weights `inside`; for the rest `adam`, a function of weights."""
    matrices = [w for w in inside if s.optimizer == "muon" and w.ndim > 1]
    taken = set(matrices)
    optimizers = {"optimizer": adam([w for w in weights if w not in taken])}
    if matrices:
        optimizers["muon_optimizer"] = Muon(matrices, s.muon_lr)
    return optimizers


def set_rates(optimizers, factor):
    """Set every rate to `factor` times the one that its optimizer was made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * factor


def rate_factor(step, steps, decay, warmup=0):
    """What a rate is multiplied with: linear up to 1 over the warm-up, linear down, almost to 0,
    over the last share `decay` of the steps."""
    rising = step / max(1, warmup)
    falling = (steps - step + 1) / max(1.0, decay * steps)
    return min(1.0, rising, falling)


@torch.no_grad()
def update_average(averaged, trained, step, decay):  # Table 2: EMA decay
    """Move each averaged weight towards the trained one; step counts from 1."""
    # not in the paper: the usual warm-up, so that the random start is forgotten
    decay = min(decay, (1 + step) / (10 + step))
    for average, weight in zip(averaged, trained):
        average.lerp_(weight, 1 - decay)


# ---------------- checkpoints, ours and peers'

# Latents of a peer are normalized as (z - shift) * scale, as its own pipeline does.
PEERS = {  # name: (k, scale, shift)
    "flux": (16, 0.3611, 0.1159),
    "sd3": (16, 1.5305, 0.0609),
    "sd1": (4, 0.18215, 0.0),
    "sdxl": (4, 0.13025, 0.0),
}
# How other names in a file of a whole model start, and whose it then is.
WHOLE_MODELS = {"conditioner.": "sdxl", "cond_stage_model.": "sd1",
                "model.diffusion_model.joint_blocks.": "sd3"}


def load_vae(path, device="cpu", peer=None):
    """The VAE in a file, in eval mode, on `device`; EMA weights where the file has them.

    Flux and SD 3 files have the same shapes, and so have SD 1.x and SDXL: only scale and shift
    differ. `peer`, one of PEERS, says which it is; without it a whole-model file does; where
    neither does, latent_mean stays None. Stops where a file is broken or does not fit.
    """
    file = data.read_checkpoint(Path(path))
    if file.get("stage") in ("04_train_vae", "05_finetune_decoder", "05_denoising_decoder"):
        vae = build(Architecture(**data.with_tuples(file["architecture"])))
        if file["stage"] == "05_denoising_decoder":
            let_denoise(vae, file["settings"]["unet"])
        vae.load_state_dict(file["ema"])
        if file["latent_mean"] is not None:
            vae.latent_mean = file["latent_mean"].to(device)
            vae.latent_std = file["latent_std"].to(device)
        return vae.to(device).eval()

    weights, inside = peer_weights(file, path)
    vae = build(infer_architecture(weights, path))
    try:
        vae.load_state_dict(weights)  # every key must be accounted for
    except RuntimeError as error:
        data.stop(f"{path} does not fit: {' '.join(str(error).split())}")
    k = vae.architecture.latent_channels
    peer = peer or inside
    if peer:
        channels, scale, shift = PEERS.get(peer, (0, 0, 0))
        if channels != k:
            data.stop(f"peer {peer!r} is not a model with {k} latent channels: known are "
                      f"{', '.join(PEERS)}")
        vae.latent_mean = torch.full((k,), shift, device=device)
        vae.latent_std = torch.full((k,), 1 / scale, device=device)
    return vae.to(device).eval()


def peer_weights(file, path):
    """The autoencoder's own tensors out of a peer's file, in our names; the peer, or None."""
    for wrap in ("state_dict", "model"):
        if isinstance(file.get(wrap), dict):
            file = file[wrap]
    if any(key.startswith("encoder.down_blocks.") for key in file):
        data.stop(f"{path} is in diffusers' format: convert it to the original layout, or give "
                  "06_eval.py diffusers:FOLDER")
    inside = None
    prefix = ""
    for key in file:
        for start, peer in WHOLE_MODELS.items():
            if key.startswith(start):
                inside = peer
        for start in ("first_stage_model.", "vae."):
            if key.startswith(start):
                prefix = start
    weights = {}
    for key, w in file.items():
        own = key.startswith(prefix) and torch.is_tensor(w)  # not the rest of a whole model
        key = key.removeprefix(prefix)
        # Trainers leave more beside the network: losses with their discriminator, EMA shadows.
        if own and not key.startswith(("loss.", "model_ema.", "ema_")):
            # Newer files keep the 1x1 convolutions of attention as matrices.
            if w.ndim == 2 and key != "quantize.embedding.weight":
                w = w[..., None, None]
            # Kandinsky 3 wraps the encoder's norms.
            weights[re.sub(r"^(encoder\..*)\.norm_layer\.", r"\1.", key)] = w
    return weights, inside


def infer_architecture(weights, path):
    """Read an Architecture off the names and shapes of CompVis's weights. Peers pad with zeros."""
    shape = {key: tuple(w.shape) for key, w in weights.items()}

    def how_many(pattern):
        found = [re.match(pattern, key) for key in shape]
        return len({match[1] for match in found if match})

    try:
        levels = how_many(r"encoder\.down\.(\d+)\.")
        width = shape["encoder.conv_in.weight"][0]
        k = shape["decoder.conv_in.weight"][1]
        widths = [shape[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
        attention = [i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in shape]
        spatial = "decoder.norm_out.conv_y.weight" in shape
        return Architecture(
            width=width,
            width_mult=tuple(w // width for w in widths),
            res_blocks=how_many(r"encoder\.down\.0\.block\.(\d+)\."),
            attention_levels=tuple(attention),
            latent_channels=k,
            padding="zeros",
            decoder_norm="spatial" if spatial else "group",
            quant_conv="quant_conv.weight" in shape,
            double_z=shape["encoder.conv_out.weight"][0] == 2 * k,
            codebook=shape.get("quantize.embedding.weight", (0,))[0])
    except KeyError as key:
        data.stop(f"{path} is not an autoencoder that load_vae knows: it has no {key}")


# ---------------- the neighbors: a decoder that denoises
# Not in VIVAT: pass over it on a first reading. From eps-VAE (arXiv 2410.04081, "E" here).

UNETS = {  # E, C.1: width, multipliers, blocks per level; levels with attention, see below
    "B": (64, (1, 1, 2, 2, 4), 2, (3,)),
    "M": (96, (1, 1, 2, 2, 4), 2, (3, 4)),
    "L": (128, (1, 1, 2, 2, 4), 2, (2, 3, 4)),
    "XL": (128, (1, 1, 2, 2, 4), 4, (2, 3, 4)),
    "H": (256, (1, 1, 2, 2, 4), 2, (2, 3, 4)),
    "laptop": (24, (1, 2, 2, 4), 1, ()),  # not in E
}
# E does not say where attention is. With these levels, and with blocks that change resolution and
# six outputs as in ADM, all five counts of parameters come out to the last digit.
OUTPUTS = 6     # as ADM, whose last three are for a variance; not used here
GAMMA = 0.6     # E, Table 4 (f): pictures are made so much darker, so that x_t is noisier at each t
DEVIATION = 0.5  # not in E: of a picture's values in [-1, 1], to bring x_t to deviation 1


def angles(positions, count):
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
        angle = angles(1000 * t, self.layers[0].in_features // 2)
        return self.layers(torch.cat([angle.cos(), angle.sin()], 1))


class UnetBlock(nn.Module):
    """ADM's residual block, with attention behind it where there is some. AdaGN: time gives the
    second norm's scale and shift. scale: 0.5 halves the sides, 2 doubles them."""
    def __init__(self, c_in, c_out, times, a, attention=False, scale=1):
        super().__init__()
        self.scale = scale
        self.norm1 = GroupNorm(c_in, a)
        self.conv1 = Conv3x3(c_in, c_out, a)
        self.time = nn.Linear(times, 2 * c_out)
        self.norm2 = GroupNorm(c_out, a)
        self.conv2 = Conv3x3(c_out, c_out, a)
        nn.init.zeros_(self.conv2.weight)  # as in ADM: a block begins as its shortcut
        nn.init.zeros_(self.conv2.bias)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attn = AttnBlock(c_out, GroupNorm, a) if attention else nn.Identity()

    def resized(self, x):
        if self.scale == 0.5:
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.scale == 2 else x

    def forward(self, x, c):  # (b, c_in, ., .), (b, times)
        y = self.conv1(self.resized(norm_swish(self.norm1, x)))
        scale, shift = self.time(c)[..., None, None].chunk(2, 1)  # (b, c_out, 1, 1)
        y = self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))
        return self.attn(y + self.nin_shortcut(self.resized(x)))  # (b, c_out, ., .)


class DenoisingDecoder(nn.Module):
    """In place of a Decoder: from noise, latents z (b, k, h/f, w/f) to pictures (b, 3, h, w).

    x_t = (1 - t) gamma x + t noise is the noisy picture. steps and seed are for sampling: the seed
    gives the noise, the same for each picture.
    """
    def __init__(self, a, unet):
        super().__init__()
        width, mult, blocks, attention = UNETS[unet]
        # not in E: zeros as in ADM; reflect is 1.2 dB worse
        a = replace(a, groups=math.gcd(32, width), padding="zeros")
        self.factor = 2 ** (len(a.width_mult) - 1)
        self.steps = 3  # E, Table 4 (g)
        self.seed = 0
        make = functools.partial(UnetBlock, times=4 * width, a=a)
        self.time = Time(width)
        self.conv_in = Conv3x3(3 + a.latent_channels, width, a)
        self.down = nn.ModuleList()
        c = width
        kept = [c]  # channels of what each block of `down` hands over to `up`
        for i, m in enumerate(mult):
            for _ in range(blocks):
                self.down.append(make(c, width * m, attention=i in attention))
                c = width * m
                kept.append(c)
            if i < len(mult) - 1:
                self.down.append(make(c, c, scale=0.5))
                kept.append(c)
        self.mid = nn.ModuleList([make(c, c, attention=True), make(c, c)])
        self.up = nn.ModuleList()
        for i, m in reversed(list(enumerate(mult))):
            for _ in range(blocks + 1):
                self.up.append(make(c + kept.pop(), width * m, attention=i in attention))
                c = width * m
            if i > 0:
                self.up.append(make(c, c, scale=2))
        self.norm_out = GroupNorm(c, a)
        self.conv_out = Conv3x3(c, OUTPUTS, a)

    def velocity(self, x_t, t, z):
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
            x = block(x if block.scale == 2 else torch.cat([x, kept.pop()], 1), c)
        return self.conv_out(norm_swish(self.norm_out, x))[:, :3]  # (b, 3, h, w)

    def forward(self, x, z):
        """As Decoder.forward, by Euler's method. x is not used."""
        shape = (1, 3, z.shape[2] * self.factor, z.shape[3] * self.factor)
        noise = torch.randn(shape, generator=data.generator(self.seed, "decoder"))
        x_t = noise.to(z.device).expand(len(z), -1, -1, -1)
        for now, after in itertools.pairwise(sampling_times(self.steps).to(z.device)):
            t = now.expand(len(z), 1, 1, 1)
            x_t = x_t + (after - now) * self.velocity(x_t, t, z).float()
        return x_t / GAMMA


def sampling_times(steps):  # E, Eq. 13 with m = 1, n = 100
    """Times from 1 to 0, close to each other where there is most noise."""
    u = torch.arange(steps + 1) / steps
    return (100 - 99 * u).log() / math.log(100)


def let_denoise(vae, unet):
    """Give a VAE a decoder that denoises."""
    vae.decoder = DenoisingDecoder(vae.architecture, unet)
    vae.multiple = max(vae.factor, 2 ** (len(UNETS[unet][1]) - 1))
    return vae


# ---------------- the network as a table

def describe(vae, size):
    """Rows (layer, output shape, parameters, multiply-adds) from input to output for one picture
    of size x size. The network must be on the meta device, and keeps hooks and the plain forms."""
    rows = []
    seen = {}
    ends = r"(encoder|decoder)\.(conv_in|norm_out|conv_out)|(post_)?quant_conv"

    def remember(name, module, inputs, out):
        seen[name] = (tuple(out.shape), module)

    for name, module in vae.named_modules():
        block = isinstance(module, (ResBlock, AttnBlock, Downsample, Upsample))
        if block or re.fullmatch(ends, name):
            module.register_forward_hook(functools.partial(remember, name))
    k = vae.architecture.latent_channels
    side = size // vae.factor
    set_fast(vae, False)  # so that the hooks see every norm
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        vae(torch.zeros(1, 3, size, size), torch.zeros(1, k, side, side))
    flops = counter.get_flop_counts()
    for name, (shape, module) in seen.items():
        rows.append((name, shape, count(module), sum(flops.get(f"VAE.{name}", {}).values()) // 2))
    return rows


def receptive_field(part):
    """Side of the square of an Encoder's or Decoder's input that one output position sees through
    its convolutions alone, in the input's own positions."""
    blocks = part.children()  # in the order in which they run
    if isinstance(part, Decoder):
        blocks = [part.conv_in, part.mid, *reversed(part.up), part.conv_out]
    field = 1.0
    step = 1.0  # input positions between neighbors at this depth
    for block in blocks:
        for module in block.modules():
            if isinstance(module, Upsample):
                step /= 2
            if isinstance(module, nn.Conv2d):  # 1x1 adds nothing
                field += (module.kernel_size[0] - 1) * step
                step *= module.stride[0]
    return field


def count(module):
    return sum(p.numel() for p in module.parameters())


def main(s):
    with torch.device("meta"):
        vae = build(s)
    totals = {"parameters": count(vae), "encoder": count(vae.encoder),
              "decoder": count(vae.decoder), "tensors": len(vae.state_dict())}
    if s.dry_run:
        return data.print_settings(s, **totals)
    try:
        rows = describe(vae, s.size)
    except ValueError as error:
        data.stop(f"--size {s.size}: {error}")
    print(f"{'layer':28}{'output shape':>22}{'parameters':>14}{'multiply-adds':>18}")
    for name, shape, parameters, products in rows:
        shape = " x ".join(map(str, shape[1:]))
        print(f"{name:28}{shape:>22}{parameters:14,}{products:18,}")
    products = sum(row[3] for row in rows)
    print(f"{'total':28}{'':>22}{totals['parameters']:14,}{products:18,}   "
          f"(encoder {totals['encoder']:,}, decoder {totals['decoder']:,})")
    encoder = receptive_field(vae.encoder)
    decoder = receptive_field(vae.decoder)
    print(f"receptive field of the convolutions: a latent sees {encoder:.0f} x {encoder:.0f} "
          f"pixels, a pixel {decoder:.1f} x {decoder:.1f} latents; the attention in mid sees all "
          "of the picture")


# ---------------- the same, faster
# Equal to the plain forms above by test, with gradients written out so that less is kept in
# memory.
# set_fast(vae, False) chooses the plain forms; --compile starts from those.

def set_fast(vae, fast):
    for module in vae.modules():
        if hasattr(module, "fast"):
            module.fast = fast
    return vae


def fast_norm_swish(norm, x, z):
    """norm_swish with gamma and beta of the GroupNorm folded into y and b:
    (gamma n + beta) y + b = (gamma y) n + (beta y + b), with n the normalized x."""
    if isinstance(norm, GroupNorm):
        y = norm.weight[:, None, None].expand(len(x), -1, 1, 1)
        b = norm.bias[:, None, None].expand(len(x), -1, 1, 1)
        return NormSwish.apply(x, y, b, norm.num_groups, norm.eps)
    inner = norm.norm_layer
    y = norm.conv_y(z)  # (b, c, h/f, w/f)
    b = inner.bias[:, None, None] * y + norm.conv_b(z)
    y = inner.weight[:, None, None] * y
    return NormSwish.apply(x, y, b, inner.num_groups, inner.eps)


class NormSwish(torch.autograd.Function):
    """swish(normalized(x) * y + b) for x (b, c, h, w), with y and b (b, c, h', w') broadcast over
    blocks of pixels.

    With a group's mean m and deviation 1/r, normalizing and modulating are one affine map of x:
    (r y) x + (b - m r y), with factors at the resolution of y. Of all full-size maps only x is
    kept; the input of swish is made again.
    """
    @staticmethod
    def forward(ctx, x, y, b, groups, eps):
        exact = torch.promote_types(x.dtype, torch.float32)  # bf16 has too few bits for sums
        m = group_mean(x.mean((2, 3), dtype=exact), groups)  # (b, c, 1, 1)
        # (x - m)^2 in one pass. E[x^2] - m^2 would cancel where the mean is large.
        square = F.mse_loss(x.to(exact), m.expand_as(x), reduction="none")
        r = (group_mean(square.mean((2, 3)), groups) + eps).rsqrt()
        ctx.save_for_backward(x, y, b, m, r)
        ctx.groups = groups
        return F.silu(scaled(x, r * y, b - m * r * y))

    @staticmethod
    def backward(ctx, g):
        x, y, b, m, r = ctx.saved_tensors
        g = torch.ops.aten.silu_backward(g, scaled(x, r * y, b - m * r * y))
        exact = g.to(m.dtype)
        # With n = r (x - m), swish has seen y n + b: sums of g and of g n over blocks.
        g_b = block_sum(exact, y)  # (b, c, h', w')
        g_y = r * (block_sum(exact * x, y) - m * g_b)
        # Normalizing gives g_x = r (y g - mean(y g) - n mean(y g n)), with means over a group.
        area = x.shape[2] * x.shape[3]
        mean_g = group_mean((y * g_b).sum((2, 3)) / area, ctx.groups)
        mean_gn = group_mean((y * g_y).sum((2, 3)) / area, ctx.groups)
        slope = -r.square() * mean_gn
        shared = scaled(x, slope, -r * mean_g - m * slope)  # -r (mean_g + n mean_gn)
        return scaled(g, r * y, shared), g_y, g_b, None, None


def group_mean(v, groups):
    """Means over the channels of each group, for each channel: (b, c) to (b, c, 1, 1)."""
    means = v.unflatten(1, (groups, -1)).mean(2)
    return means.repeat_interleave(v.shape[1] // groups, 1)[..., None, None]


def scaled(x, factor, offset):
    """factor x + offset for x (b, c, h, w), with factor (b, c, h', w') broadcast over blocks, and
    offset like factor or like x."""
    rows = factor.shape[2]
    out = torch.empty_like(x)

    def split(v):  # (b, c, h', h / h', w)
        if v.shape == x.shape:
            return v.unflatten(2, (rows, -1))
        return F.interpolate(v, (rows, x.shape[3]))[:, :, :, None]

    torch.addcmul(split(offset), split(x), split(factor), out=split(out))
    return out


def block_sum(v, y):
    """Sums of v (b, c, h, w) over the block that each value of y is broadcast over. Pooling is
    many times faster than a sum over two axes."""
    if y.shape[2:] == (1, 1):
        return v.sum((2, 3), keepdim=True)
    block = (v.shape[2] // y.shape[2], v.shape[3] // y.shape[3])
    return F.avg_pool2d(v, block, divisor_override=1)


class ReflectPad(torch.autograd.Function):
    """F.pad(x, sides, mode="reflect"), whose own gradient would keep x just to know its shape."""
    @staticmethod
    def forward(ctx, x, sides):  # (left, right, above, below)
        ctx.sides = sides
        return F.pad(x, sides, mode="reflect")

    @staticmethod
    def backward(ctx, g):
        left, right, above, below = ctx.sides
        inner = g[:, :, above:g.shape[2] - below, left:g.shape[3] - right]
        return torch.ops.aten.reflection_pad2d_backward(g, inner, ctx.sides), None


if __name__ == "__main__":
    data.command_line(main, Settings, PRESETS, __doc__)
