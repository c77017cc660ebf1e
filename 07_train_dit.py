"""Stage 7 of VIVAT: text to image, a diffusion transformer on the frozen VAE's latents.

Reads   RUN/data with captions (01_data.py); RUN/vae_finetuned.pt, else RUN/vae.pt, or with --vae
        any that load_vae reads; RUN/dit.pt if this run was interrupted.
Writes  RUN/latents-HASH.bin, RUN/dit.pt, RUN/dit.png (prompts and their pictures), RUN/log.jsonl
        (Fig. 6: clip_score); with --sample only RUN/sample.png.
Paper   Sec. 3.3, 6.3, A.3, Table 4, Fig. 6.

    python 07_train_dit.py --preset small --run runs/mine
    python 07_train_dit.py --sample "a red circle on a striped cyan background"

Sec. 6.3 calls the network similar to LI-DiT. The numbers of A.3 are those of Kandinsky 5 Lite (by
the same authors, "K5" below): where the paper is silent, K5's layout is followed.
Shapes: b pictures, k latent channels, h and w sides of the latent, n = h w / patch^2 its patches,
l text tokens, d the width. c (b, d_t) is the condition: time, and the prompt as one vector.
"""
import copy
import functools
import hashlib
import importlib
import itertools
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

data = importlib.import_module("01_data")
model = importlib.import_module("02_model")
losses = importlib.import_module("03_losses")
training = importlib.import_module("04_train_vae")
finetuning = importlib.import_module("05_finetune_decoder")


# ---- settings

@dataclass(frozen=True)
class Network:
    """What dit.pt must carry to build its network again."""
    width: int = 1792          # A.3.2: hidden dimension d_h
    ff_width: int = 7168       # A.3.2: feed-forward dimension d_ff
    time_width: int = 512      # A.3.2: time embedding dimension d_t
    blocks: int = 32           # A.3.2: N, transformer blocks; here those with cross-attention
    refiner_blocks: int = 2    # not in the paper: K5
    # how many values of a head turn with frame, row and column; their sum is the head's width
    rope_axes: tuple[int, ...] = (16, 24, 24)  # not in the paper: K5
    absolute: bool = False     # not in the paper: sines of row and column added; K5 has none
    patch: int = 2             # A.3.2: latent patch size
    latent_channels: int = 16  # Table 2
    # bytes: a learned embedding of the prompt's bytes; needs no download
    text_encoder: Literal["qwen-clip", "bytes"] = "qwen-clip"  # A.3.1
    text_width: int = 3584     # A.3.1: d_Qwen
    text_length: int = 256     # A.3.1: L_Qwen, tokens of a prompt at most
    pooled_width: int = 768    # A.3.1: d_CLIP; not in the paper: as one pooled vector, as in K5


@dataclass(frozen=True)
class Settings(data.TrainingRun, Network):
    vae: str = ""              # whose latents to learn [RUN/vae_finetuned.pt, else RUN/vae.pt]
    qwen: str = "Qwen/Qwen2.5-VL-7B-Instruct"  # A.3.1; a name on the hub, or a folder
    clip: str = "openai/clip-vit-large-patch14"  # not in the paper: which CLIP; K5's, 768 wide
    size: int = 256            # Sec. 6.3: pictures of 256 x 256
    steps: int = 130_000       # Sec. 6.3
    batch: int = 1024          # Sec. 6.3
    lr: float = 1e-4           # Table 4
    beta1: float = 0.9         # Table 4
    beta2: float = 0.95        # Table 4
    eps: float = 1e-8          # Table 4
    weight_decay: float = 0.0  # Table 4
    clip_norm: float = 1.0     # Table 4: gradient clipping
    warmup: int = 1000         # Table 4: steps to the full rate, constant after
    t_shift: float = 1.0       # not in the paper: t is logit-normal as in SD 3, shifted by this
    drop: float = 0.1          # not in the paper: share of prompts left out, for guidance; as in K5
    ema_decay: float = 0.9999  # not in the paper: K5
    # weights, norms, modulation and sums stay FP32
    precision: Literal["fp32", "tf32", "bf16"] = "bf16"  # not in the paper: K5
    val_every: int = 5_000     # steps between two points of Fig. 6, and two checkpoints
    val_prompts: int = 1000    # not in the paper: captions of data/val that Fig. 6 is taken over
    clip_score: str = "openai/clip-vit-base-patch32"  # not in the paper: which; [16]'s; "": none
    sample: tuple[str, ...] = ()   # only draw these prompts, from RUN/dit.pt
    sample_steps: int = 50     # not in the paper: Euler steps, as in K5
    guidance: float = 5.0      # not in the paper: K5; 1 is the prompt alone
    shift: float = 3.0         # not in the paper: more steps where there is more noise, as in K5


SCENES = dict(text_encoder="bytes", clip_score="", absolute=True)
PRESETS = {
    "paper": {},
    "small": SCENES | dict(
        width=512, ff_width=2048, time_width=256, blocks=12, text_width=256, pooled_width=256,
        text_length=64, steps=20_000, batch=256, lr=3e-4, ema_decay=0.999),
    "demo": SCENES | dict(
        width=128, ff_width=512, time_width=128, blocks=4, refiner_blocks=1, rope_axes=(8, 12, 12),
        text_width=64, pooled_width=64, text_length=32, size=96, steps=2600, batch=32, lr=2e-3,
        muon_lr=0.02, lr_decay=0.7, t_shift=3.0, warmup=100, ema_decay=0.99, precision="fp32",
        workers=0, compile=False, val_every=400, sample_steps=16, guidance=4.0, shift=6.0),
}


# ---- parts of the transformer (A.3.2)

def rope_angles(axes, *positions):
    """Angles (n, head / 2): axes[i] values of a head turn with positions[i] (n,)."""
    return torch.cat([finetuning.sine_angles(place, size // 2)
                      for size, place in zip(axes, positions)], 1)


def apply_rope(x, angles):
    """Rotary positions: neighboring values of x (b, heads, n, head) turn by their angle."""
    cos = angles.cos()
    sin = angles.sin()
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # (b, heads, n, head / 2)
    turned = [even * cos - odd * sin, even * sin + odd * cos]
    return torch.stack(turned, -1).flatten(-2)


# Sec. 6.3; not in the paper: which AdaNorm: [51], cited for it, means something else; K5
def ada_norm(x, shift, scale):
    """Adaptive LayerNorm, in FP32: x (b, n, d), shift and scale (b, 1, d)."""
    return F.layer_norm(x.float(), x.shape[-1:]) * (1 + scale) + shift


def modulation(a, parts):
    """From c to shifts, scales and gates; zero at first, so each block begins as identity."""
    linear = nn.Linear(a.time_width, parts * a.width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


# not in the paper: RMSNorm on queries and keys, and rotary positions; K5
class Attention(nn.Module):
    """Multi-head attention."""
    def __init__(self, a):
        super().__init__()
        self.head = sum(a.rope_axes)
        self.q = nn.Linear(a.width, a.width)
        self.k = nn.Linear(a.width, a.width)
        self.v = nn.Linear(a.width, a.width)
        self.out = nn.Linear(a.width, a.width)
        self.q_norm = nn.RMSNorm(self.head)
        self.k_norm = nn.RMSNorm(self.head)

    def forward(self, x, source, angles=None, mask=None):
        """x (b, n, d) looks at source (b, l, d), where mask (b, 1, 1, l) is True."""
        q = self.q_norm(self.split(self.q(x)).float())  # (b, heads, n, head), FP32
        k = self.k_norm(self.split(self.k(source)).float())
        v = self.split(self.v(source))
        if angles is not None:
            q = apply_rope(q, angles)
            k = apply_rope(k, angles)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))  # (b, n, d)

    def split(self, x):  # (b, n, d) to (b, heads, n, head)
        return x.unflatten(-1, (-1, self.head)).transpose(1, 2)


class Block(nn.Module):
    """Self-attention, in visual blocks cross-attention to the text, feed-forward; each of them
    x = x + gate(c) * f(AdaNorm(x, c))."""
    def __init__(self, a, cross):
        super().__init__()
        self.modulation = modulation(a, 9 if cross else 6)
        self.self_attention = Attention(a)
        self.cross_attention = Attention(a) if cross else None
        self.feed_forward = nn.Sequential(nn.Linear(a.width, a.ff_width, bias=False), nn.GELU(),
                                          nn.Linear(a.ff_width, a.width, bias=False))

    def forward(self, x, c, angles, mask=None, text=None, text_mask=None):
        """x (b, n, d), c (b, d_t), text (b, l, d). Sums are FP32, since the gates are."""
        with torch.autocast(c.device.type, enabled=False):
            m = self.modulation(c)[:, None].split(x.shape[-1], -1)  # 6 or 9 of (b, 1, d)
        shift, scale, gate = m[:3]
        y = ada_norm(x, shift, scale)
        x = x + gate * self.self_attention(y, y, angles, mask)
        if self.cross_attention is not None:
            shift, scale, gate = m[3:6]
            y = ada_norm(x, shift, scale)
            x = x + gate * self.cross_attention(y, text, mask=text_mask)
        shift, scale, gate = m[-3:]
        return x + gate * self.feed_forward(ada_norm(x, shift, scale))


class DiT(nn.Module):
    """Token Refiner and cross-attention blocks (Sec. 6.3). forward gives the velocity at (x, t).

    Rotary positions only say how far apart two patches are. K5 must find out where a patch lies,
    which takes long training; for short runs `absolute` adds sines of row and column.
    """
    def __init__(self, a):
        super().__init__()
        values = a.patch ** 2 * a.latent_channels
        self.a = a
        self.bytes = Bytes(a) if a.text_encoder == "bytes" else None
        self.time = nn.Sequential(nn.Linear(a.width, a.time_width), nn.SiLU(),
                                  nn.Linear(a.time_width, a.time_width))
        self.text = nn.Sequential(nn.Linear(a.text_width, a.width), nn.LayerNorm(a.width))
        self.pooled = nn.Sequential(nn.Linear(a.pooled_width, a.time_width),
                                    nn.LayerNorm(a.time_width))
        self.patches = nn.Linear(values, a.width)
        self.refiner = nn.ModuleList(Block(a, cross=False) for _ in range(a.refiner_blocks))
        self.blocks = nn.ModuleList(Block(a, cross=True) for _ in range(a.blocks))
        self.out_modulation = modulation(a, 2)
        self.out = nn.Linear(a.width, values)
        # Of the latents, whatever the VAE; the network learns x = (z - mean) / std.
        self.register_buffer("latent_mean", torch.zeros(a.latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(a.latent_channels, 1, 1))

    def forward(self, x, t, tokens, mask, pooled):
        """x (b, k, h, w): normalized latents mixed with noise. t (b,): 0 is the picture, 1 noise.
        tokens (b, l, d_text) with mask (b, l), True at a prompt's own tokens, and pooled
        (b, d_pooled): what the text encoder gives."""
        with torch.autocast(t.device.type, enabled=False):
            angles = finetuning.sine_angles(1000 * t.float(), self.a.width // 2)
            c = self.time(torch.cat([angles.cos(), angles.sin()], 1))
            c = c + self.pooled(pooled.float())  # not in the paper: text beside time, as in K5
        mask = mask[:, None, None]  # (b, 1, 1, l)
        text = self.text(tokens)
        angles = rope_angles([sum(self.a.rope_axes)], torch.arange(text.shape[1], device=x.device))
        for block in self.refiner:  # Token Refiner
            text = block(text, c, angles, mask)

        p = self.a.patch
        rows = torch.arange(x.shape[2] // p, device=x.device)
        columns = torch.arange(x.shape[3] // p, device=x.device)
        row, column = torch.cartesian_prod(rows, columns).unbind(1)  # (n,)
        angles = rope_angles(self.a.rope_axes, 0 * row, row, column)  # a picture is frame 0
        x = self.patches(F.pixel_unshuffle(x, p).flatten(2).mT).float()  # (b, n, d)
        if self.a.absolute:
            sines = rope_angles([self.a.width // 2] * 2, row, column)  # (n, d / 2)
            x = x + torch.cat([sines.cos(), sines.sin()], 1)
        for block in self.blocks:
            x = block(x, c, angles, None, text, mask)

        with torch.autocast(x.device.type, enabled=False):
            shift, scale = self.out_modulation(c)[:, None].chunk(2, -1)
            x = self.out(ada_norm(x, shift, scale))  # (b, n, k p p)
        return F.pixel_shuffle(x.mT.unflatten(2, (len(rows), -1)), p)  # (b, k, h, w)


# ---- text (A.3.1): prompts to tokens (b, l, d_text), mask (b, l), pooled (b, d_pooled)

class Bytes(nn.Module):
    """Embeddings of words: the sum over their UTF-8 bytes, with a table per place in the word. What
    is longer than 16 bytes goes on in the next piece. It learns with the DiT."""
    def __init__(self, a):
        super().__init__()
        self.length = a.text_length
        self.table = nn.EmbeddingBag(1 + 16 * 256, a.text_width, mode="sum", padding_idx=0)

    def forward(self, prompts):
        index = torch.zeros(len(prompts), self.length, 16, dtype=torch.long)
        for row, prompt in zip(index, prompts):
            words = [word.encode() for word in re.findall(r"\w+|[^\w\s]", prompt)]
            pieces = [word[i:i + 16] for word in words for i in range(0, len(word), 16)]
            for slots, piece in zip(row, [b"\0", *pieces]):  # so that no prompt is empty
                for place, byte in enumerate(piece):
                    slots[place] = 1 + 256 * place + byte
        longest = index[..., 0].count_nonzero(1).max()
        index = index[:, :longest].to(self.table.weight.device)
        mask = index[..., 0] > 0  # (b, l)
        tokens = self.table(index.flatten(0, 1)).unflatten(0, mask.shape)  # (b, l, d_text)
        pooled = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return tokens, mask, pooled


# not in the paper: K5's, with its spelling; the states of its own tokens are cut off
TEMPLATE = ("<|im_start|>system\nYou are a promt engineer. Describe the image by detailing the "
            "color, shape, size, texture, quantity, text, spatial relationships of the objects "
            "and background:<|im_end|>\n<|im_start|>user\n")


def load_whole(kind, name, dtype):
    """A model of transformers, which would only warn of weights that a file lacks."""
    net, report = kind.from_pretrained(name, dtype=dtype, output_loading_info=True)
    missing = [key for key in report["missing_keys"] if "visual." not in key]
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights: {', '.join(missing[:3])}")
    return net.eval()


class QwenClip:  # not in the paper: which of their states; as in K5
    """Qwen's last hidden states, and CLIP's state at the end of the text. Frozen."""
    def __init__(self, s, device):
        with data.needs("qwen-clip needs pip install transformers, --qwen, --clip; or bytes"):
            from transformers import AutoModel, AutoTokenizer, CLIPTextModel
            self.qwen_tokenizer = AutoTokenizer.from_pretrained(s.qwen, padding_side="right")
            self.qwen = load_whole(AutoModel, s.qwen, torch.bfloat16).to(device)
            self.clip_tokenizer = AutoTokenizer.from_pretrained(s.clip)
            self.clip = load_whole(CLIPTextModel, s.clip, torch.float32).to(device)
        self.start = len(self.qwen_tokenizer(TEMPLATE).input_ids)
        self.length = s.text_length
        self.device = device

    @torch.no_grad()
    def __call__(self, prompts):
        # Causal attention, padded on the right: no token sees the padding.
        texts = [TEMPLATE + prompt + "<|im_end|>" for prompt in prompts]
        q = self.qwen_tokenizer(texts, padding=True, truncation=True, return_tensors="pt",
                                max_length=self.start + self.length).to(self.device)
        states = self.qwen(input_ids=q.input_ids, attention_mask=q.attention_mask)
        tokens = states.last_hidden_state[:, self.start:].float()  # (b, l, d_Qwen)
        mask = q.attention_mask[:, self.start:].bool()  # (b, l)
        c = self.clip_tokenizer(prompts, padding="max_length", truncation=True, max_length=77,
                                return_tensors="pt").to(self.device)  # A.3.1: L_CLIP
        return tokens, mask, self.clip(**c).pooler_output.float()  # (b, d_CLIP)


# ---- objective and sampler
# not in the paper: rectified flow; K5. For those new to it:
# - The line. x_t = (1 - t) x + t noise lies on a straight line from latents x (t = 0) to noise.
# - Its derivative, the velocity dx_t/dt = noise - x, is constant on the line. The network
#   sees x_t, t and the prompt, and is asked for it.
# - The average. Many lines, between other pictures and other noise, cross at x_t. Of all answers
#   their average velocity has the smallest mean square error, so that is what is learned. Points
#   that follow it from noise are at each t distributed as x_t is, so they end in pictures. Not in
#   a blur: at t = 1 it points at the mean of all pictures, but after each step fewer fit.
# - Euler's method follows the bent path: x becomes x + (t' - t) v, with t' < t, from t = 1 to 0.
# - Both shifts move times towards noise, where a picture's layout is decided: t_shift those that
#   are trained on, shift those at which Euler stops.
# - Guidance: v_empty + guidance * (v - v_empty) exaggerates what the prompt adds to the velocity
#   without one, which is learned where `drop` leaves it out.

def flow_loss(net, x, noise, t, text):
    """Squared error of the velocity, mean over a batch: x and noise (b, k, h, w), t (b,)."""
    level = t[:, None, None, None]
    x_t = (1 - level) * x + level * noise
    return (net(x_t, t, *text) - (noise - x)).square().mean()


def shifted(t, shift):
    """Times in [0, 1], moved towards noise."""
    return shift * t / (1 + (shift - 1) * t)


@torch.no_grad()
def draw(net, vae, encode_text, prompts, s):
    """uint8 pictures (n, 3, size, size) of some prompts."""
    shape = latent_shape(vae, s, net.latent_mean.device)
    pictures = []
    for i in range(0, len(prompts), 16):
        some = list(prompts[i:i + 16])
        x = torch.randn(len(some), *shape, generator=torch.Generator().manual_seed(s.seed + i))
        x = x.to(net.latent_mean.device)
        text = encode_text(some)
        empty = encode_text([""] * len(some))
        times = shifted(torch.linspace(1, 0, s.sample_steps + 1, device=x.device), s.shift)
        # Around all steps: so weights, if they may have a gradient, are cast only once.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=s.precision == "bf16"):
            for now, after in itertools.pairwise(times):
                t = now.expand(len(x))
                v = net(x, t, *text)
                v_empty = net(x, t, *empty)
                v = v_empty + s.guidance * (v - v_empty)
                x = x + (after - now) * v
        pictures += losses.to_uint8(vae.decode(x * net.latent_std + net.latent_mean)).cpu()
    return pictures


# ---- latents, once

def latent_shape(vae, s, device):
    """(k, h, w) of a picture's latents; stops where they do not fit the network."""
    with data.needs(f"--size {s.size} does not fit the VAE"):
        shape = vae.encode(torch.zeros(1, 3, s.size, s.size, device=device)).mu.shape[1:]
    if shape[0] != s.latent_channels or shape[1] % s.patch:
        data.fail(f"latents of {tuple(shape)} need --latent-channels {shape[0]}, and a --size that "
                  f"makes their sides multiples of --patch {s.patch}")
    return shape


def latents_key(s, vae_path, files):
    """A hash of what the latents follow from; of diffusers' models the name."""
    vae = data.file_hash(vae_path) if Path(vae_path).is_file() else vae_path
    names = [Path(file).name for file in files]
    return hashlib.sha256(repr((vae, s.size, s.seed, names)).encode()).hexdigest()


@torch.no_grad()
def encode_all(s, vae, key, files, device):
    """Latents of all pictures and their mirror images, float16 (n, 2, k, h, w), in a file mapped
    into memory. What is still zero is missing."""
    shape = (len(files), 2, *latent_shape(vae, s, device))
    z = torch.from_file(str(Path(s.run, f"latents-{key[:12]}.bin")), shared=True,
                        size=math.prod(shape), dtype=torch.float16).view(shape)
    todo = (z[:, -1, -1, -1, -1] == 0).nonzero()[:, 0]
    # not in the paper: shorter side to the size, by the resizing of Sec. 5.1, then the center
    loader = DataLoader(files, batch_size=None, sampler=todo, num_workers=s.workers,
                        collate_fn=functools.partial(data.read_square, size=s.size))
    for i, x in zip(tqdm(todo, desc="latents"), loader):
        if isinstance(x, str):
            data.fail(f"{x}: remove it, and run 01_data.py again")
        torch.manual_seed(1_000_000_000 * s.seed + i)
        x = losses.from_uint8(torch.stack([x, x.flip(-1)]).to(device))  # (2, 3, size, size)
        # not in the paper: one sample of the posterior, not a new one each time
        sample = vae.encode(x).sample().half()  # (2, k, h, w)
        if not sample.isfinite().all():
            data.fail(f"{files[i]}: latents are not finite")
        z[i] = sample.cpu()
    return z


# ---- training

def train(s, vae, vae_path, device):
    stage = "07_train_dit"
    out = Path(s.run, "dit.pt")
    pictures = [p for p in data.read_list(s.run, "train", s.size) if p["text"]]
    val = [p["text"] for p in data.read_list(s.run, "val", 1) if p["text"]][:s.val_prompts]
    if not pictures or not val:
        data.fail("no captions: 01_data.py takes them from .txt or .json files beside pictures")
    # What a run needs is opened before latents are made.
    frozen = QwenClip(s, device) if s.text_encoder == "qwen-clip" else None
    score = clip_scorer(s.clip_score, device) if s.clip_score else None
    training.part_size(s)
    if s.width % sum(s.rope_axes) or [n % 2 for n in s.rope_axes] != [0, 0, 0]:
        data.fail(f"--width {s.width} must be a multiple of the sum of three even --rope-axes")
    net = DiT(data.pick(Network, s)).to(device)
    ema = copy.deepcopy(net).eval()
    adamw = functools.partial(torch.optim.AdamW, lr=s.lr, betas=(s.beta1, s.beta2), eps=s.eps,
                              weight_decay=s.weight_decay, fused=device.type != "mps")  # Table 4
    # On modulation Muon costs more than it gains.
    inside = [w for name, w in net.named_parameters() if re.search("attention|feed", name)]
    optimizers = training.make_optimizers(net.parameters(), inside, adamw, s.muon_lr)
    state = dict(model=net, ema=ema, **optimizers)
    files = [picture["file"] for picture in pictures]
    key = latents_key(s, vae_path, files)
    step = data.resume(out, state, s, stage, parent=key)
    latents = encode_all(s, vae, key, files, device)
    some = latents[::math.ceil(len(latents) / 10_000)].float()
    for module in (net, ema):
        module.latent_mean.copy_(some.mean((0, 1, 3, 4))[:, None, None])
        module.latent_std.copy_(some.std((0, 1, 3, 4))[:, None, None])
    training.compile_parts(net.blocks, s, device)

    data.listen()
    bar = tqdm(range(step + 1, s.steps + 1), initial=step, total=s.steps, unit="step")
    for step in bar:
        data.seed_step(s, stage, step)
        loss = 0.0  # mean over the parts of a batch
        for _ in range(s.accumulate):
            part = batch_loss(net, frozen or net.bytes, latents, pictures, s) / s.accumulate
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), s.clip_norm)  # Table 4
        training.update(optimizers, training.rate_factor(step, s))
        training.update_ema(ema, net, training.ema_decay_at(step, s))

        milestone = step % s.val_every == 0 or step == s.steps
        if milestone or step % s.log_every == 0:
            terms = dict(loss=loss, grad=norm)
            if milestone:
                terms |= validate(ema, vae, frozen or ema.bytes, val, score, s)
            data.log(s.run, stage, step, terms, bar)
        data.save(out, state, s, step, milestone, parent=key, vae=vae_path)


def batch_loss(net, encode_text, latents, pictures, s):
    """The loss on one part of a batch, drawn with replacement."""
    b = training.part_size(s)
    device = net.latent_mean.device
    number = torch.randint(len(latents), (b,))
    mirrored = torch.randint(2, (b,))  # not in the paper: mirroring
    x = latents[number, mirrored].to(device).float()
    x = (x - net.latent_mean) / net.latent_std
    t = shifted(torch.sigmoid(torch.randn(b)), s.t_shift).to(device)  # as in SD 3
    dropped = torch.rand(b) < s.drop
    prompts = ["" if d else pictures[i]["text"] for i, d in zip(number, dropped)]
    text = encode_text(prompts)
    with torch.autocast(device.type, torch.bfloat16, enabled=s.precision == "bf16"):
        return flow_loss(net, x, torch.randn_like(x), t, text)


def validate(ema, vae, encode_text, val, score, s):
    """dit.png: the first twelve validation prompts. Fig. 6: the score of all of them."""
    tiles = draw(ema, vae, encode_text, val if score else val[:12], s)
    data.save_sheet(Path(s.run, "dit.png"), tiles[:12], 4, captions=val[:12])
    return {"clip_score": score(tiles, val)} if score else {}


def clip_scorer(name, device):
    """Fig. 6: a function of pictures and prompts, the mean of 100 max(cos, 0) of their CLIP
    features. ([16] has 2.5 for 100, and writes "A photo depicts" before each prompt.)"""
    with data.needs(f"--clip-score {name} needs pip install transformers, and that model"):
        from transformers import CLIPModel, CLIPProcessor
        clip = load_whole(CLIPModel, name, torch.float32).to(device)
        processor = CLIPProcessor.from_pretrained(name)

    @torch.no_grad()
    def score(pictures, prompts):
        cosines = []
        for i in range(0, len(prompts), 64):
            inputs = processor(text=prompts[i:i + 64], images=pictures[i:i + 64], padding=True,
                               truncation=True, return_tensors="pt", max_length=77)
            out = clip(**inputs.to(device))
            cosines.append(F.cosine_similarity(out.image_embeds, out.text_embeds))
        return 100 * torch.cat(cosines).clamp(min=0).mean().item()

    return score


# ---- main

def draw_samples(s, device):
    """RUN/sample.png: the prompts in --sample, from dit.pt and the VAE that it names."""
    checkpoint = model.read_checkpoint(Path(s.run, "dit.pt"))
    vae = finetuning.load_vae(s.vae or checkpoint["vae"], device)
    own = {"run", "sample", "seed", "sample_steps", "guidance", "shift"}
    own |= {n for n in ("qwen", "clip") if getattr(s, n) != getattr(Settings, n)}
    s = replace(s, **{n: v for n, v in checkpoint["settings"].items() if n not in own})
    net = DiT(data.pick(Network, s)).to(device).eval()
    net.load_state_dict(checkpoint["ema"])
    tiles = draw(net, vae, net.bytes or QwenClip(s, device), s.sample, s)
    data.save_sheet(Path(s.run, "sample.png"), tiles, min(4, len(tiles)), captions=s.sample)


def main(s):
    device = data.pick_device(s)
    if s.sample:
        return draw_samples(s, device)
    finetuned = Path(s.run, "vae_finetuned.pt")
    vae_path = s.vae or str(finetuned if finetuned.is_file() else Path(s.run, "vae.pt"))
    print(f"latents of {vae_path}")
    vae = finetuning.load_vae(vae_path, device)
    with data.alone(Path(s.run, "dit.pt")):
        train(s, vae, vae_path, device)


if __name__ == "__main__":
    data.start(main, Settings, PRESETS, __doc__)
