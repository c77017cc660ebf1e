"""Stage 2 of VIVAT: the autoencoder (Sec. 3.2 and 5.2, Figures 1, 7 and 8).

Reads   nothing; load_vae(path) reads our checkpoints and CompVis LDM, SD 1.x/SDXL, SD 3, Flux, MoVQGAN, Kandinsky-3 files.
Writes  nothing; prints the network as a table from input to output, and its receptive field.
Paper   Sec. 3.1 (posterior), 3.2, 5.2 (padding, Spatially Conditional Normalization), Fig. 1, 7, 8, Table 2.

    python 02_model.py --preset paper --size 256

Shapes: b pictures, c channels, h and w the input's sides, f the down-sampling factor (8), k latent channels (16).
Parameter names are CompVis's (encoder.down.0.block.0.conv1.weight), so peers' files load unchanged.
"""
import hashlib, importlib, re, sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

data = importlib.import_module("01_data")   # a module name may not start with a digit, so no plain import


@dataclass(frozen=True)
class Architecture:
    """What a checkpoint must carry to build its network again."""
    width: int = 128                               # not in the paper: of MoVQGAN-67M, the smallest published base model
    width_mult: tuple[int, ...] = (1, 2, 2, 4)     # not in the paper: of MoVQGAN; one level each, hence f = 8
    res_blocks: int = 2                            # not in the paper: ResNet blocks a level, of MoVQGAN-67M
    attention_levels: tuple[int, ...] = (3,)       # not in the paper: of MoVQGAN, at its lowest resolution
    latent_channels: int = 16                      # Table 2: latent dimension d_z
    padding: Literal["reflect", "zeros"] = "reflect"       # Sec. 5.2, corner artifact: reflect is the cure
    decoder_norm: Literal["spatial", "group"] = "spatial"  # Sec. 5.2, droplet artifact: Spatially Conditional Normalization is the cure
    groups: int = 32                               # not in the paper: of GroupNorm, of MoVQGAN
    quant_conv: bool = False                       # not in the paper: 1x1 convolutions around the latent, which older peers have
    double_z: bool = True                          # Sec. 3.2: the encoder predicts mean and log-variance; False: a VQ peer's mean alone
    codebook: int = 0                              # a VQ peer's codebook size; 0: none, Sec. 3.2 takes it out


@dataclass(frozen=True)
class Settings(Architecture):
    run: str = ""             # unused here, for a uniform command line
    size: int = 256           # not in the paper: side of the picture that the table is made for
    dry_run: bool = False     # print settings and parameter counts as JSON and stop


PRESETS = {
    "paper": {},
    "small": dict(width=64),
    "demo": dict(width=16, res_blocks=1, attention_levels=(), groups=8),
}


# ---------------------------------------------------------------- blocks (Figures 7 and 8)

class Modulate(torch.autograd.Function):
    """GroupNorm(x) * y + b, then swish if asked, for x (b, c, h, w) with y and b (b, c, h', w') broadcast over blocks of pixels.

    With mean m and deviation 1/r of its group, that is one affine map of x, (r y) x + (b - m r y), whose factors stay at the
    resolution of y. The gradients are written out so that of all full-size maps only x is kept, and swish's input made again.
    """
    @staticmethod
    def affine(x, a, d):                                                                  # a x + d; a (b, c, h', w'), d the same or full-size
        n, out = a.shape[2], torch.empty_like(x)
        rows = lambda v: v.unflatten(2, (n, -1)) if v.shape == x.shape else F.interpolate(v, (n, x.shape[3]))[:, :, :, None]
        torch.addcmul(rows(d), rows(x), rows(a), out=rows(out))                           # (b, c, h', h / h', w)
        return out

    @staticmethod
    def forward(ctx, x, y, b, groups, eps, swish):
        share = lambda v: v.unflatten(1, (groups, -1)).mean(2).repeat_interleave(x.shape[1] // groups, 1)[..., None, None]
        exact = torch.promote_types(x.dtype, torch.float32)                               # bf16's 8 bits are too few for a variance
        m, square = share(x.mean((2, 3), dtype=exact)), share(x.to(exact).square().mean((2, 3)))              # (b, c, 1, 1)
        r = ((square - m.square()).clamp(min=0) + eps).rsqrt()
        ctx.save_for_backward(x, y, b, m, r)
        ctx.share, ctx.swish = share, swish
        out = Modulate.affine(x, r * y, b - m * r * y)
        return F.silu(out) if swish else out

    @staticmethod
    def backward(ctx, g):
        x, y, b, m, r = ctx.saved_tensors
        a = r * y
        if ctx.swish:
            g = torch.ops.aten.silu_backward(g, Modulate.affine(x, a, b - m * a))
        block = x.shape[2] // y.shape[2], x.shape[3] // y.shape[3]
        # The sum over blocks, as pooling: many times faster than a sum over two broadcast axes.
        total = lambda v: block[0] * block[1] * (v.mean((2, 3), keepdim=True) if y.shape[2:] == (1, 1) else F.avg_pool2d(v, block))
        exact = g.to(m.dtype)
        g_b = total(exact)                                                                # (b, c, h', w')
        g_y = r * (total(exact * x) - m * g_b)
        # What the group's mean and deviation pass on is the same for all its pixels, but for a factor x.
        from_mean, from_deviation = (ctx.share((y * v).sum((2, 3)) / x[0, 0].numel()) for v in (g_b, g_y))
        factor = -r.square() * from_deviation
        return Modulate.affine(g, a, Modulate.affine(x, factor, -r * from_mean - m * factor)), g_y, g_b, None, None, None


class SpatialNorm(nn.Module):
    """Spatially Conditional Normalization (Sec. 5.2; MoVQ): out = GroupNorm(x) * y(z) + b(z), with y and b 1x1 convolutions.

    A 1x1 convolution commutes with nearest-neighbour up-sampling, so both run at latent resolution,
    and their results are broadcast instead of being stored up-sampled.
    """
    def __init__(self, channels, a):
        super().__init__()
        # not in the paper: PyTorch's own initialisation here and everywhere in the network, and this eps, of MoVQGAN
        self.norm_layer = nn.GroupNorm(a.groups, channels, eps=1e-6)
        self.conv_y = nn.Conv2d(a.latent_channels, channels, 1)
        self.conv_b = nn.Conv2d(a.latent_channels, channels, 1)

    def forward(self, x, z, swish=False):                                                 # x (b, c, s h/f, s w/f), z (b, k, h/f, w/f)
        gamma, beta = self.norm_layer.weight[:, None, None], self.norm_layer.bias[:, None, None]
        y, b = self.conv_y(z), self.conv_b(z)                                             # (gamma x + beta) y + b
        return Modulate.apply(x, gamma * y, beta * y + b, self.norm_layer.num_groups, self.norm_layer.eps, swish)


class GroupNorm(nn.GroupNorm):
    """The encoder's norm, and the baseline decoder's: the latent is not looked at."""
    def __init__(self, channels, a):
        super().__init__(a.groups, channels, eps=1e-6)

    def forward(self, x, z=None, swish=False):
        gamma, beta = (v[:, None, None].expand(len(x), -1, 1, 1) for v in (self.weight, self.bias))
        return Modulate.apply(x, gamma, beta, self.num_groups, self.eps, swish)


class ReflectPad(torch.autograd.Function):
    """F.pad(x, sides, mode="reflect"), whose own gradient would keep x in memory only to know its shape."""
    @staticmethod
    def forward(ctx, x, sides):                                                           # (left, right, above, below)
        ctx.sides = sides
        return F.pad(x, sides, mode="reflect")

    @staticmethod
    def backward(ctx, g):
        left, right, above, below = ctx.sides
        inner = g[:, :, above:g.shape[2] - below, left:g.shape[3] - right]
        return torch.ops.aten.reflection_pad2d_backward(g, inner, ctx.sides), None


class Conv3x3(nn.Conv2d):                           # Sec. 5.2, corner artifact: "reflect" is the cure
    def __init__(self, c_in, c_out, a):
        super().__init__(c_in, c_out, 3, padding=1, padding_mode=a.padding)

    def forward(self, x):
        if self.padding_mode == "zeros":
            return super().forward(x)
        return F.conv2d(ReflectPad.apply(x, (1, 1, 1, 1)), self.weight, self.bias)


class ResBlock(nn.Module):                          # Fig. 7: norm, swish, convolution, twice, and a shortcut
    def __init__(self, c_in, c_out, norm, a):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in, a), Conv3x3(c_in, c_out, a)
        self.norm2, self.conv2 = norm(c_out, a), Conv3x3(c_out, c_out, a)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, z=None):                   # (b, c_in, h, w)
        y = self.conv1(self.norm1(x, z, swish=True))
        y = self.conv2(self.norm2(y, z, swish=True))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)          # (b, c_out, h, w)


class AttnBlock(nn.Module):                         # Fig. 8: single-head self-attention over all positions
    def __init__(self, channels, norm, a):
        super().__init__()
        self.norm = norm(channels, a)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x, z=None):
        y = self.norm(x, z)
        q, k, v = (conv(y).flatten(2).mT[:, None].contiguous() for conv in (self.q, self.k, self.v))  # (b, 1, h w, c)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape)                         # (b, c, h, w)
        return x + self.proj_out(y)


class Downsample(nn.Module):                        # not in the paper: padded on the right and below only, of MoVQGAN; reflect there too
    def __init__(self, channels, a):
        super().__init__()
        self.conv, self.pad = nn.Conv2d(channels, channels, 3, stride=2), ReflectPad.apply if a.padding == "reflect" else F.pad

    def forward(self, x):
        return self.conv(self.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):                          # not in the paper: nearest neighbour, then a convolution, of MoVQGAN
    def __init__(self, channels, a):
        super().__init__()
        self.conv = Conv3x3(channels, channels, a)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """ResNet blocks, an attention block after each where the level has attention, and a change of resolution."""
    def __init__(self, c_in, c_out, blocks, attention, norm, a):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, norm, a) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out, norm, a) for _ in range(blocks if attention else 0))

    def forward(self, x, z=None):
        for i, block in enumerate(self.block):
            x = block(x, z)
            if self.attn:
                x = self.attn[i](x, z)
        return x


def middle(channels, norm, a):
    return nn.ModuleDict({"block_1": ResBlock(channels, channels, norm, a), "attn_1": AttnBlock(channels, norm, a),
                          "block_2": ResBlock(channels, channels, norm, a)})


# ---------------------------------------------------------------- encoder, decoder, VAE (Figure 1)

class Encoder(nn.Module):
    def __init__(self, a):
        super().__init__()
        widths = [a.width * m for m in a.width_mult]
        self.conv_in = Conv3x3(3, a.width, a)
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([a.width] + widths, widths)):
            self.down.append(Level(c_in, c_out, a.res_blocks, i in a.attention_levels, GroupNorm, a))
            if i < len(widths) - 1:
                self.down[i].downsample = Downsample(c_out, a)
        self.mid = middle(widths[-1], GroupNorm, a)
        self.norm_out = GroupNorm(widths[-1], a)
        self.conv_out = Conv3x3(widths[-1], a.latent_channels * (2 if a.double_z else 1), a)

    def forward(self, x):                                                       # (b, 3, h, w)
        x = self.conv_in(x)                                                     # (b, width, h, w)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)                                         # (b, width_mult[i] width, h/2^(i+1), w/2^(i+1))
        for block in self.mid.values():
            x = block(x)
        return self.conv_out(self.norm_out(x, swish=True))                      # (b, 2k, h/f, w/f)


class Decoder(nn.Module):
    def __init__(self, a):
        super().__init__()
        norm = SpatialNorm if a.decoder_norm == "spatial" else GroupNorm
        widths = [a.width * m for m in a.width_mult]
        self.conv_in = Conv3x3(a.latent_channels, widths[-1], a)
        self.mid = middle(widths[-1], norm, a)
        self.up = nn.ModuleList()                                               # up.0 has full resolution, so it runs last
        for i, (c_in, c_out) in enumerate(zip(widths[1:] + widths[-1:], widths)):
            self.up.append(Level(c_in, c_out, a.res_blocks + 1, i in a.attention_levels, norm, a))
            if i > 0:
                self.up[i].upsample = Upsample(c_out, a)
        self.norm_out = norm(widths[0], a)
        self.conv_out = Conv3x3(widths[0], 3, a)

    def forward(self, x, z):                                                    # x (b, k, h/f, w/f); z conditions every norm
        x = self.conv_in(x)
        for block in self.mid.values():
            x = block(x, z)
        for level in reversed(self.up):
            x = level(x, z)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(self.norm_out(x, z, swish=True))                   # (b, 3, h, w)


class Posterior:
    """q(z|x) = N(mean, exp(logvar)), Sec. 3.1. Both (b, k, h/f, w/f)."""
    def __init__(self, mean, logvar):
        self.mean, self.logvar = mean, logvar.clamp(-30.0, 20.0)   # not in the paper: the clamp of CompVis, against overflow

    def sample(self, noise=None):
        """z = mean + std * noise, with noise ~ N(0, I) of the mean's shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * (torch.randn_like(self.mean) if noise is None else noise)


class VAE(nn.Module):
    """KL-VAE of VIVAT. encode: pictures (b, 3, h, w) in [-1, 1] to a Posterior; decode: latents (b, k, h/f, w/f) to pictures.

    latent_mean and latent_std, (k,), are what a diffusion model normalises latents with; they come with a finished checkpoint.
    """
    def __init__(self, a):
        super().__init__()
        self.architecture, self.factor = a, 2 ** (len(a.width_mult) - 1)
        self.latent_mean = self.latent_std = None
        self.encoder, self.decoder = Encoder(a), Decoder(a)
        k = a.latent_channels
        if a.quant_conv:
            self.quant_conv = nn.Conv2d(2 * k if a.double_z else k, 2 * k if a.double_z else k, 1)
            self.post_quant_conv = nn.Conv2d(k, k, 1)
        if a.codebook:
            self.quantize = nn.ModuleDict({"embedding": nn.Embedding(a.codebook, k)})

    def takes(self, *sides):
        """Whether pictures of these sides in pixels can be encoded: the latent is whole, and large enough to be reflected."""
        return all(side % self.factor == 0 and side >= 4 * self.factor for side in sides)

    def encode(self, x):
        if x.ndim != 4 or x.shape[1] != 3 or not self.takes(*x.shape[2:]):
            raise ValueError(f"pictures must be (b, 3, h, w) with h and w multiples of {self.factor} from {4 * self.factor} up, not {tuple(x.shape)}")
        moments = self.encoder(x)                                               # (b, 2k, h/f, w/f)
        if self.architecture.quant_conv:
            moments = self.quant_conv(moments)
        if self.architecture.double_z:
            return Posterior(*moments.chunk(2, dim=1))
        if self.architecture.codebook:                                          # a VQ peer: the nearest codebook vector
            book = self.quantize["embedding"].weight                            # (codebook, k)
            moments = F.embedding(torch.cdist(moments.movedim(1, -1).flatten(1, 2), book).argmin(-1), book).mT.reshape(moments.shape)
        return Posterior(moments, torch.full_like(moments, -30.0))

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z) if self.architecture.quant_conv else z, z)

    def forward(self, x, noise=None):
        """Encode, sample and decode in one call, so that DistributedDataParallel sees all of it: (x_hat, mean, logvar)."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(noise)), posterior.mean, posterior.logvar


def build(a):
    """A VAE from any settings that include an Architecture; impossible values stop with a sentence."""
    a = Architecture(**{f.name: getattr(a, f.name) for f in fields(Architecture)})
    bad = [a.width * m for m in a.width_mult if a.width * m % a.groups]
    if bad or min(a.width, a.groups, a.res_blocks, a.latent_channels, len(a.width_mult)) < 1:
        data.stop(f"--width {a.width} times --width-mult {a.width_mult} must be multiples of --groups {a.groups}, and all at least 1")
    return VAE(a)


# ---------------------------------------------------------------- checkpoints, ours and peers'

# Latents of a peer are normalised as (z - shift) * scale, as its own pipeline does.  name: (k, scale, shift)
PEERS = {"flux": (16, 0.3611, 0.1159), "sd3": (16, 1.5305, 0.0609), "sd1": (4, 0.18215, 0.0), "sdxl": (4, 0.13025, 0.0)}


def load_vae(path, device="cpu", peer=None):
    """The VAE in a file, in eval mode, EMA weights where it has them, on `device`.

    Flux and SD 3 files have the same shapes, SD 1.x and SDXL too: only scale and shift differ. `peer` names one of PEERS;
    without it the other parts of a whole-model file tell, then the file's name, else latent_mean stays None.
    Stops with a sentence where the file is missing, broken or has keys that are unexpected or missing.
    """
    path = Path(path)
    file = read_checkpoint(path)
    if file.get("stage") in ("04_train_vae", "05_finetune_decoder"):
        a = file["architecture"]
        vae = build(Architecture(**{k: tuple(v) if isinstance(v, list) else v for k, v in a.items()}))
        vae.load_state_dict(file["ema"])
        vae.latent_mean, vae.latent_std = (v if v is None else v.to(device) for v in (file["latent_mean"], file["latent_std"]))
        return vae.to(device).eval()

    weights, peer = peer_weights(file, path.name, peer)
    vae = build(infer_architecture(weights, path))
    expected = vae.state_dict()
    # Newer files keep the 1x1 convolutions of attention as matrices.
    weights = {k: w[..., None, None] if w.ndim == 2 and k in expected and expected[k].ndim == 4 else w for k, w in weights.items()}
    wrong = {"missing": sorted(expected.keys() - weights.keys()), "unexpected": sorted(weights.keys() - expected.keys()),
             "of another shape": sorted(k for k in expected.keys() & weights.keys() if expected[k].shape != weights[k].shape)}
    if any(wrong.values()):
        data.stop(f"{path} does not fit: " + "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in wrong.items() if keys))
    vae.load_state_dict({k: w.float() for k, w in weights.items()})
    if peer:
        k, scale, shift = PEERS[peer]
        vae.latent_mean, vae.latent_std = torch.full((k,), shift, device=device), torch.full((k,), 1 / scale, device=device)
    return vae.to(device).eval()


def peer_weights(file, name, peer):
    """The autoencoder's own tensors out of a peer's file, in our names, and which of PEERS it is (None if unknown)."""
    for wrap in ("state_dict", "model"):
        if isinstance(file.get(wrap), dict):
            file = file[wrap]
    if any(k.startswith("encoder.down_blocks.") for k in file):
        data.stop(f"{name} is in diffusers' format: convert it to the original layout, or give 06_eval.py diffusers:FOLDER")
    whole = [("sdxl", "conditioner."), ("sd1", "cond_stage_model."), ("sd3", "model.diffusion_model.joint_blocks.")]
    inside = next((p for p, start in whole if any(k.startswith(start) for k in file)), None)
    prefix = next((p for p in ("first_stage_model.", "vae.") if any(k.startswith(p) for k in file)), "")
    file = {k[len(prefix):]: w for k, w in file.items() if k.startswith(prefix) and torch.is_tensor(w)}
    # What trainers leave beside the network: losses with their discriminator, EMA shadows.
    drop = ("loss.", "model_ema.", "ema_")
    weights = {re.sub(r"^(encoder\..*)\.norm_layer\.", r"\1.", k): w for k, w in file.items() if not k.startswith(drop)}
    k = weights["decoder.conv_in.weight"].shape[1] if "decoder.conv_in.weight" in weights else 0
    by_name = [p for p, hint in (("sdxl", "xl"), ("sd3", "sd3"), ("flux", "flux"), ("flux", "ae.safetensors"), ("sd1", "sd"), ("sd1", "v1"))
               if hint in name.lower() and PEERS[p][0] == k]
    if peer and (peer not in PEERS or PEERS[peer][0] != k):
        data.stop(f"peer {peer!r} is not a model with {k} latent channels; known: {PEERS}")
    return weights, peer or inside or (by_name[0] if by_name and "quantize.embedding.weight" not in weights else None)


def infer_architecture(weights, path):
    """Read an Architecture off the names and shapes of CompVis-style weights. Peers pad with zeros."""
    shape = {k: tuple(w.shape) for k, w in weights.items()}
    count = lambda pattern: len({m[1] for k in shape if (m := re.match(pattern, k))})
    try:
        levels, width, k = count(r"encoder\.down\.(\d+)\."), shape["encoder.conv_in.weight"][0], shape["decoder.conv_in.weight"][1]
        return Architecture(
            width=width, width_mult=tuple(shape[f"encoder.down.{i}.block.0.conv1.weight"][0] // width for i in range(levels)),
            res_blocks=count(r"encoder\.down\.0\.block\.(\d+)\."), latent_channels=k, padding="zeros",
            attention_levels=tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in shape),
            decoder_norm="spatial" if "decoder.norm_out.conv_y.weight" in shape else "group",
            quant_conv="quant_conv.weight" in shape, double_z=shape["encoder.conv_out.weight"][0] == 2 * k,
            codebook=shape.get("quantize.embedding.weight", (0,))[0])
    except KeyError as key:
        data.stop(f"{path} is not an autoencoder that load_vae knows: it has no {key}")


def read_checkpoint(path, stages=(), remedy="run 04_train_vae.py first"):
    """The dict in a checkpoint; stops with a sentence and a remedy if it is missing, damaged, or not one of `stages`."""
    if not Path(path).is_file():
        data.stop(f"{path} is missing: {remedy}")
    try:
        if str(path).endswith(".safetensors"):
            try:
                from safetensors.torch import load_file
            except ImportError:
                data.stop(f"{path} needs the safetensors package: pip install safetensors")
            file = load_file(path)
        else:
            file = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        data.stop(f"{path} cannot be read ({type(error).__name__}), it is damaged or not a checkpoint: {remedy}")
    if not isinstance(file, dict) or (stages and file.get("stage") not in stages):
        data.stop(f"{path} is not a checkpoint of {' or '.join(stages) or 'an autoencoder'}: {remedy}")
    return file


def save_checkpoint(path, **contents):
    """Plain dicts, tensors, numbers and strings, written aside and renamed."""
    data.write_aside(Path(path), lambda f: torch.save(contents, f))


def parent(path):
    """How a checkpoint names the file it was made from."""
    with open(path, "rb") as f:
        return {"path": str(path), "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def pick_device(name):
    """torch.device for --device; "auto" is cuda, then mps, then cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        data.stop(f"--device {name} is not to be had here: {str(error).splitlines()[0]}")


def loader_workers(number, device):             # processes for --workers; a CPU's cores are busy training
    return number if number >= 0 else 8 if device.type == "cuda" else 0


# ---------------------------------------------------------------- the network as a table

def describe(vae, size):
    """Rows (layer, output shape, parameters, multiply-adds) from input to output for one size x size picture, on the meta device."""
    rows, hooks, order = [], [], {}
    keep = (ResBlock, AttnBlock, Downsample, Upsample)
    for name, module in vae.named_modules():
        if isinstance(module, keep) or re.fullmatch(r"(encoder|decoder)\.(conv_in|norm_out|conv_out)|(post_)?quant_conv", name):
            hooks.append(module.register_forward_hook(lambda m, i, out, name=name: order.update({name: (tuple(out.shape), m)})))
    with FlopCounterMode(display=False) as counter:
        vae(torch.zeros(1, 3, size, size, device="meta"), torch.zeros(1, vae.architecture.latent_channels, size // vae.factor, size // vae.factor, device="meta"))
    for hook in hooks:
        hook.remove()
    flops = counter.get_flop_counts()
    for name, (shape, module) in order.items():
        rows.append((name, shape, count(module), sum(flops.get(f"VAE.{name}", {}).values()) // 2))
    return rows


def receptive_field(part):
    """Side of the input square that one output position of an Encoder or Decoder sees through its convolutions alone, in its input's pixels."""
    field, step = 1.0, 1.0                              # step: input pixels between two neighbours at this depth
    blocks = [part.conv_in, *part.mid.values(), *part.up[::-1]] if isinstance(part, Decoder) else [part.conv_in, *part.down, *part.mid.values()]
    for block in [*blocks, part.conv_out]:
        for module in block.modules():
            if isinstance(module, Upsample):
                step /= 2
            if isinstance(module, nn.Conv2d):           # shortcuts and 1x1 add nothing, so the order inside a block does not matter
                field += (module.kernel_size[0] - 1) * step
                step *= module.stride[0]
    return field


def count(module):
    return sum(p.numel() for p in module.parameters())


def main(settings):
    with torch.device("meta"):
        vae = build(settings)
    totals = {"parameters": count(vae), "encoder": count(vae.encoder), "decoder": count(vae.decoder), "tensors": len(vae.state_dict())}
    if settings.dry_run:
        return data.print_settings(settings, **totals)
    try:
        rows = describe(vae, settings.size)
    except ValueError as error:
        data.stop(f"--size {settings.size}: {error}")
    print(f"{'layer':28}{'output shape':>22}{'parameters':>14}{'multiply-adds':>18}")
    for name, shape, parameters, macs in rows:
        print(f"{name:28}{' x '.join(map(str, shape[1:])):>22}{parameters:14,}{macs:18,}")
    print(f"{'total':28}{'':>22}{count(vae):14,}{sum(r[3] for r in rows):18,}   (encoder {count(vae.encoder):,}, decoder {count(vae.decoder):,})")
    encoder, decoder = receptive_field(vae.encoder), receptive_field(vae.decoder)
    print(f"receptive field of the convolutions: a latent sees {encoder:.0f} x {encoder:.0f} pixels, a pixel {decoder:.1f} x {decoder:.1f} latents; "
          "the attention in mid sees all of the picture")
    return rows


if __name__ == "__main__":
    data.command_line(main, Settings, PRESETS, __doc__)
