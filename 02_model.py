"""Stage 2 of VIVAT: the autoencoder.

Reads   nothing; load_vae(path) reads checkpoints of 04 and 05 (a denoising decoder: 05's load_vae),
        files with CompVis's names (Flux, SD 3, SDXL, SD 1.x), and diffusers' models.
Writes  nothing; prints the network as a table from input to output.
Paper   Sec. 3.1 (posterior), 3.2, 5.2 (padding, normalization), Fig. 1, 7, 8, Table 2.

    python 02_model.py --preset paper --size 256

Shapes: b pictures, c channels, h and w the sides of the picture, or of a block's x; f the
down-sampling factor (8), k latent channels (16).
"""
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

data = importlib.import_module("01_data")  # a module name may not start with a digit


# ---- settings

@dataclass(frozen=True)
class Architecture:
    """What a checkpoint must carry to build its network again."""
    width: int = 128                # not in the paper: MoVQGAN-67M, the smallest base model
    width_mult: tuple[int, ...] = (1, 2, 2, 4)  # not in the paper: MoVQGAN; hence f = 8
    res_blocks: int = 2             # not in the paper: MoVQGAN; a decoder level has one more
    attention_levels: tuple[int, ...] = (3,)  # not in the paper: the last level, as in MoVQGAN
    latent_channels: int = 16       # Table 2: latent dimension d_z
    padding: Literal["reflect", "zeros"] = "reflect"  # Sec. 5.2: reflect cures the corner artifact
    decoder_norm: Literal["spatial", "group"] = "spatial"  # Sec. 5.2: spatial cures droplets
    groups: int = 32                # not in the paper: groups of GroupNorm, as in MoVQGAN
    quant_conv: bool = False        # 1x1 convolutions around the latent, which some others have


@dataclass(frozen=True)
class Settings(data.Run, Architecture):
    size: int = 256  # side of the picture that the table is made for


PRESETS = {"paper": {}, "small": dict(width=64),
           "demo": dict(width=16, res_blocks=1, attention_levels=(), groups=8)}


# ---- blocks (Figures 7 and 8)

class GroupNorm(nn.GroupNorm):
    """The encoder's norm, and the baseline decoder's: it does not look at the latent z."""
    def __init__(self, channels, a):
        # not in the paper: this eps, from MoVQGAN, and PyTorch's own initialization in all layers
        super().__init__(a.groups, channels, eps=1e-6)

    def forward(self, x, z=None):
        return super().forward(x)


class SpatialNorm(nn.Module):
    """Spatially Conditional Normalization, from MoVQ: GroupNorm(x) * scale(z) + shift(z).

    Sec. 5.2: it normalizes, and it lets every norm of the decoder see the latent z, place by place.
    1x1 convolutions commute with up-sampling by nearest neighbor, so they run where z is small.
    """
    def __init__(self, channels, a):
        super().__init__()
        self.norm_layer = GroupNorm(channels, a)
        self.conv_y = nn.Conv2d(a.latent_channels, channels, 1)  # y and b are MoVQGAN's names
        self.conv_b = nn.Conv2d(a.latent_channels, channels, 1)

    def forward(self, x, z):  # (b, c, h, w), (b, k, h', w')
        x = self.norm_layer(x)
        # One value of z for s x s positions of x; F.interpolate has a slow gradient on GPUs.
        x = x.unflatten(3, (z.shape[3], -1)).unflatten(2, (z.shape[2], -1))  # (b, c, h', s, w', s)
        scale = self.conv_y(z)[..., None, :, None]  # (b, c, h', 1, w', 1)
        shift = self.conv_b(z)[..., None, :, None]
        return (x * scale + shift).flatten(4).flatten(2, 3)  # (b, c, h, w)


def conv3x3(c_in, c_out, a):  # Sec. 5.2, corner artifact: "reflect" is the cure
    return nn.Conv2d(c_in, c_out, 3, padding=1, padding_mode=a.padding)


class ResBlock(nn.Module):  # Fig. 7
    def __init__(self, c_in, c_out, norm, a):
        super().__init__()
        self.norm1 = norm(c_in, a)
        self.conv1 = conv3x3(c_in, c_out, a)
        self.norm2 = norm(c_out, a)
        self.conv2 = conv3x3(c_out, c_out, a)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, z=None):  # (b, c_in, ., .)
        y = self.conv1(F.silu(self.norm1(x, z)))
        y = self.conv2(F.silu(self.norm2(y, z)))
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
    def __init__(self, channels, a):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.mode = "reflect" if a.padding == "reflect" else "constant"

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1), mode=self.mode))


class Upsample(nn.Module):  # not in the paper: nearest neighbor, as in MoVQGAN
    def __init__(self, channels, a):
        super().__init__()
        self.conv = conv3x3(channels, channels, a)

    def forward(self, x):  # (b, c, h, w)
        x = x.movedim(1, -1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)  # (b, h, 2, w, 2, c)
        return self.conv(x.flatten(3, 4).flatten(1, 2).movedim(-1, 1))  # (b, c, 2h, 2w)


class Level(nn.Module):
    """ResNet blocks of one resolution, each followed by attention where the level has some."""
    def __init__(self, c_in, c_out, blocks, attention, norm, a):
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        for i in range(blocks):
            self.block.append(ResBlock(c_in if i == 0 else c_out, c_out, norm, a))
            if attention:
                self.attn.append(AttnBlock(c_out, norm, a))

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


# ---- encoder, decoder, VAE (Figure 1)

class Encoder(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.conv_in = conv3x3(3, a.width, a)
        self.down = nn.ModuleList()
        c = a.width
        for i, mult in enumerate(a.width_mult):
            attention = i in a.attention_levels
            level = Level(c, a.width * mult, a.res_blocks, attention, GroupNorm, a)
            c = a.width * mult
            last = i == len(a.width_mult) - 1
            level.downsample = nn.Identity() if last else Downsample(c, a)
            self.down.append(level)
        self.mid = middle(c, GroupNorm, a)
        self.norm_out = GroupNorm(c, a)
        self.conv_out = conv3x3(c, 2 * a.latent_channels, a)  # mean and log-variance

    def forward(self, x):  # (b, 3, h, w)
        x = self.conv_in(x)  # (b, width, h, w)
        for level in self.down:
            x = level.downsample(level(x))  # half the height and width, except after the last level
        for block in self.mid.values():
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # (b, 2k, h/f, w/f)


class Decoder(nn.Module):
    def __init__(self, a):
        super().__init__()
        norm = SpatialNorm if a.decoder_norm == "spatial" else GroupNorm
        c = a.width * a.width_mult[-1]
        self.conv_in = conv3x3(a.latent_channels, c, a)
        self.mid = middle(c, norm, a)
        levels = []
        for i, mult in reversed(list(enumerate(a.width_mult))):
            attention = i in a.attention_levels
            level = Level(c, a.width * mult, a.res_blocks + 1, attention, norm, a)
            c = a.width * mult
            level.upsample = Upsample(c, a) if i > 0 else nn.Identity()
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # up.0 has full resolution, as CompVis counts
        self.norm_out = norm(c, a)
        self.conv_out = conv3x3(c, 3, a)

    def forward(self, z):  # (b, k, h/f, w/f): what is decoded, and what every norm sees
        x = self.conv_in(z)
        for block in self.mid.values():
            x = block(x, z)
        for level in reversed(self.up):
            x = level.upsample(level(x, z))  # twice the height and width, except after the last
        return self.conv_out(F.silu(self.norm_out(x, z)))  # (b, 3, h, w)


class Posterior:  # q(z|x) = N(mu, exp(logvar)), Sec. 3.1
    """mu and logvar: (b, k, h/f, w/f). Without a logvar (others' autoencoders) a sample is mu."""
    def __init__(self, mu, logvar=None):
        self.mu = mu
        # not in the paper: as CompVis, against overflow
        self.logvar = None if logvar is None else logvar.clamp(-30.0, 20.0)

    def sample(self):
        if self.logvar is None:
            return self.mu
        return self.mu + torch.exp(0.5 * self.logvar) * torch.randn_like(self.mu)


class VAE(nn.Module):
    """The KL-VAE of VIVAT: pictures (b, 3, h, w) in [-1, 1], latents (b, k, h/f, w/f)."""
    def __init__(self, a):
        super().__init__()
        self.architecture = a
        self.multiple = 2 ** (len(a.width_mult) - 1)  # f, of which sides must be multiples
        k = a.latent_channels
        self.encoder = Encoder(a)
        self.quant_conv = nn.Conv2d(2 * k, 2 * k, 1) if a.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(k, k, 1) if a.quant_conv else nn.Identity()
        self.decoder = Decoder(a)

    def encode(self, x):
        if any(side % self.multiple or not side for side in x.shape[2:]):
            raise ValueError(f"sides must be multiples of {self.multiple}, not {tuple(x.shape)}")
        return Posterior(*self.quant_conv(self.encoder(x)).chunk(2, dim=1))

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x):
        """Encode, sample, decode: x_hat, mu, logvar, z."""
        q = self.encode(x)
        z = q.sample()
        return self.decode(z), q.mu, q.logvar, z


def architecture(s):
    """The Architecture among a stage's settings; stops where no network fits it."""
    a = data.pick(Architecture, s)
    if not set(a.attention_levels) <= set(range(len(a.width_mult))):
        data.fail(f"--attention-levels {a.attention_levels}: there are {len(a.width_mult)} levels")
    if a.width % a.groups:
        data.fail(f"--width {a.width} must be a multiple of --groups {a.groups}")
    return a


def count(module):
    return sum(p.numel() for p in module.parameters())


# ---- checkpoints, ours and others'

def read_checkpoint(path):
    """The dict in a checkpoint, ours or others'; or stops, and says why."""
    path = Path(path)
    if path.is_dir():
        data.fail(f"{path} is a folder; 06 and 07 read diffusers:{path}")
    if not path.is_file():
        ours = {"vae.pt": "04_train_vae.py", "dit.pt": "07_train_dit.py"}.get(path.name)
        data.fail(f"{path} is missing" + (f": run {ours} first" if ours else ""))
    with open(path, "rb") as f:
        head = f.read(30)
    if head.startswith(b"version https://git-lfs"):
        data.fail(f"{path} is a pointer of Git LFS: git lfs pull fetches the file itself")
    if head[8:9] == b"{":  # it begins with a length, then JSON
        with data.needs(f"{path} must be whole, and needs pip install safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
    with data.needs(f"{path} cannot be read as weights"):
        # Lightning leaves classes beside weights: all but tensors and the like become Stubs.
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Stub, name) for name in unknown]):
            return torch.load(path, map_location="cpu", weights_only=True)


class Stub(dict):
    """In place of any class in others' checkpoints: none of theirs is ever run."""
    def __new__(cls, *args):
        return super().__new__(cls)

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def load_vae(path, device="cpu", adapt=None):
    """A VAE in eval mode: of 04 or 05 (EMA weights), of a file with CompVis's names, or
    diffusers:FOLDER_OR_ID[@SUBFOLDER]. Stops where a weight does not fit."""
    if str(path).startswith("diffusers:"):
        return Diffusers(str(path).removeprefix("diffusers:")).to(device).eval()
    return build_vae(read_checkpoint(path), path, adapt).to(device)


def build_vae(checkpoint, path, adapt=None):
    """The VAE in a checkpoint. adapt(vae, checkpoint) may change it before it is filled."""
    with data.needs(f"{path} is not an autoencoder that load_vae knows"):
        if "architecture" in checkpoint:
            a = Architecture(**checkpoint["architecture"])
            weights = checkpoint["ema"]
        else:
            weights = compvis_weights(checkpoint)
            a = compvis_architecture(weights, path)
        vae = VAE(a)
        if adapt:
            adapt(vae, checkpoint)
        vae.load_state_dict(weights)
    return vae.eval()


def compvis_weights(checkpoint):
    """The autoencoder's own weights in others' files, which may hold a whole model beside it."""
    checkpoint = checkpoint.get("state_dict", checkpoint)
    weights = {}
    for name, w in checkpoint.items():
        match = re.fullmatch(r"(?:first_stage_model\.|vae\.)?"
                             r"((?:encoder|decoder|quant_conv|post_quant_conv)\..+)", name)
        if match:
            # Newer files keep the 1x1 convolutions of attention as matrices.
            weights[match[1]] = w[..., None, None] if w.ndim == 2 else w
    return weights


def compvis_architecture(weights, path):
    """Read an Architecture off names and shapes. These networks pad with zeros."""
    sizes = {name.removesuffix(".bias"): len(w) for name, w in weights.items() if w.ndim == 1}
    firsts = [name for name in sizes if re.fullmatch(r"encoder\.down\.\d\.block\.0\.conv1", name)]
    blocks = [name for name in sizes if re.fullmatch(r"encoder\.down\.0\.block\.\d\.conv1", name)]
    if not firsts or not {"encoder.conv_in", "encoder.conv_out"} <= sizes.keys():
        data.fail(f"{path} is not an autoencoder with CompVis's names (encoder.conv_in, ...): "
                  "06 and 07 read diffusers:FOLDER")
    width = sizes["encoder.conv_in"]
    return Architecture(
        width=width,
        width_mult=tuple(sizes[name] // width for name in sorted(firsts)),
        res_blocks=len(blocks),
        attention_levels=tuple(i for i in range(len(firsts))
                               if f"encoder.down.{i}.attn.0.q" in sizes),
        latent_channels=sizes["encoder.conv_out"] // 2,
        padding="zeros",
        decoder_norm="spatial" if "decoder.norm_out.conv_y" in sizes else "group",
        quant_conv="quant_conv" in sizes)


class Diffusers(nn.Module):
    """Another autoencoder behind VAE's methods, for Table 1 and Fig. 6."""
    def __init__(self, place):
        super().__init__()
        name, _, subfolder = place.partition("@")
        with data.needs(f"diffusers:{place} needs pip install diffusers, and that model"):
            from diffusers import AutoModel
            self.net = AutoModel.from_pretrained(name, subfolder=subfolder or None)

    def encode(self, x):
        q = self.net.encode(x)
        if hasattr(q, "latent_dist"):
            return Posterior(q.latent_dist.mean, q.latent_dist.logvar)
        return Posterior(q.latents if hasattr(q, "latents") else q.latent)

    def decode(self, z):
        return self.net.decode(z).sample


# ---- the network as a table

def main(s):
    with torch.device("meta"):  # shapes without memory
        vae = VAE(architecture(s))
        x = torch.zeros(1, 3, s.size, s.size)
    names = {module: name for name, module in vae.named_modules()}

    def print_row(module, inputs, out):
        shape = " x ".join(map(str, out.shape[1:]))
        print(f"{names[module]:28}{shape:>18}{count(module):14,}")

    for module in names:
        if isinstance(module, (ResBlock, AttnBlock, Downsample, Upsample, Encoder, Decoder)):
            module.register_forward_hook(print_row)
    with data.needs(f"--size {s.size}"):
        vae(x)


if __name__ == "__main__":
    data.start(main, Settings, PRESETS, __doc__)
