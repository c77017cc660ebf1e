"""Stage 7 of VIVAT: text to image, a diffusion transformer on the frozen VAE's latents.

Reads   RUN/data with captions (01_data.py); RUN/vae_finetuned.pt, else RUN/vae.pt, or with --vae
        any file that load_vae reads; RUN/dit.pt if this run was interrupted.
Writes  RUN/latents (once), RUN/dit.pt, RUN/dit.png (prompts and their pictures), RUN/curve.png
        (Fig. 6), RUN/log.jsonl; with --sample instead RUN/sample.png.
Paper   Sec. 3.3, 6.3, A.3, Table 4, Fig. 6.

    python 07_train_dit.py --preset small --run runs/mine
    python 07_train_dit.py --sample "a red circle on a striped cyan background"

Sec. 6.3 calls the network similar to LI-DiT. The numbers of A.3 are those of Kandinsky 5 Lite (by
the same authors, "K5" below): where the paper is silent, that network's layout is followed.
Shapes: b pictures, k latent channels, h and w sides of the latent, n = h w / patch^2 its patches,
l text tokens, d the width. c (b, d_t) is the condition: time, and the prompt as one vector.
"""
import copy
import functools
import importlib
import itertools
import json
import math
import re
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

data = importlib.import_module("01_data")
model = importlib.import_module("02_model")
losses = importlib.import_module("03_losses")


# ---------------- settings

@dataclass(frozen=True)
class Network:
    """What dit.pt must carry to build its network and its text encoder again."""
    width: int = 1792          # A.3.2: hidden dimension d_h
    ff_width: int = 7168       # A.3.2: feed-forward dimension d_ff
    time_width: int = 512      # A.3.2: time embedding dimension d_t
    blocks: int = 32           # A.3.2: N, transformer blocks; here those with cross-attention
    refiner_blocks: int = 2    # not in the paper: as in K5
    # how many values of a head turn with frame, row and column; their sum is the head's width
    head_axes: tuple[int, ...] = (16, 24, 24)  # not in the paper: as in K5
    absolute: bool = False     # not in the paper: sines of row and column added; K5 has none
    linear_guess: bool = False  # not in the paper: adds the best multiple of x_t; K5 has none
    patch: int = 2             # A.3.2: latent patch size
    latent_channels: int = model.Architecture.latent_channels  # Table 2
    # bytes: a learned embedding of the prompt's bytes; needs no download
    text_encoder: Literal["qwen-clip", "bytes"] = "qwen-clip"  # A.3.1
    qwen: str = "Qwen/Qwen2.5-VL-7B-Instruct"  # A.3.1; a name on the hub, or a folder
    text_width: int = 3584     # A.3.1: d_Qwen
    text_length: int = 256     # A.3.1: L_Qwen, tokens of a prompt at most
    clip: str = "openai/clip-vit-large-patch14"  # not in the paper: which CLIP; K5's, 768 wide
    pooled_width: int = 768    # A.3.1: d_CLIP; not in the paper: as one pooled vector, as in K5
    pooled_length: int = 77    # A.3.1: L_CLIP


@dataclass(frozen=True)
class Settings(data.TrainingRun, Network):
    vae: str = ""              # whose latents to learn [RUN/vae_finetuned.pt, else RUN/vae.pt]
    peer: str = ""             # whose file --vae is, if it does not tell: flux, sd3, sd1, sdxl
    size: int = 256            # Sec. 6.3: pictures of 256 x 256
    flip: bool = True          # not in the paper: latents of mirrored pictures too
    steps: int = 130_000       # Sec. 6.3
    batch: int = 1024          # Sec. 6.3; over all processes
    lr: float = 1e-4           # Table 4
    beta1: float = 0.9         # Table 4
    beta2: float = 0.95        # Table 4
    eps: float = 1e-8          # Table 4
    weight_decay: float = 0.0  # Table 4
    # muon: for the matrices of the blocks, at a rate of its own; AdamW for the rest
    optimizer: Literal["adamw", "muon"] = "adamw"  # Table 4
    muon_lr: float = 0.02      # not in the paper: as its author found for transformers
    decay: float = 0.0         # not in the paper: last share of steps, where rates fall to 0
    clip_norm: float = 1.0     # Table 4: gradient clipping
    warmup: int = 1000         # Table 4: steps to the full rate, constant after
    t_shift: float = 1.0       # not in the paper: t is logit-normal as in SD 3, shifted by this
    drop: float = 0.1          # not in the paper: share of prompts left out, for guidance; as in K5
    ema_decay: float = 0.9999  # not in the paper: as in K5
    # weights, norms, modulation and sums stay FP32
    precision: Literal["fp32", "tf32", "bf16"] = "bf16"  # not in the paper: as in K5
    checkpointing: bool = False  # compute each block again in the backward pass, for less memory
    val_every: int = 5_000     # steps between two points of Fig. 6
    save_every: int = 1_000    # steps between two checkpoints
    val_prompts: int = 1000    # not in the paper: prompts that Fig. 6 is taken over, at most
    clip_score: str = "openai/clip-vit-base-patch32"  # not in the paper: which; [16]'s; "": none
    sample: tuple[str, ...] = ()  # only draw these prompts, from RUN/dit.pt
    sample_steps: int = 50     # not in the paper: Euler steps, as in K5
    guidance: float = 5.0      # not in the paper: as in K5; 1 is the prompt alone
    shift: float = 3.0         # not in the paper: more steps where there is more noise, as in K5


# Found on scenes: "Quality per minute" in tests/README.md has what was tried.
SCENES = dict(text_encoder="bytes", clip_score="", absolute=True, t_shift=2.0)
DEMO = SCENES | dict(
    width=128, ff_width=512, time_width=128, blocks=4, refiner_blocks=1, head_axes=(8, 12, 12),
    text_width=64, text_length=32, size=96, steps=1200, batch=32, lr=2e-3, ema_decay=0.99,
    optimizer="muon", decay=0.7, t_shift=4.0, warmup=100, precision="fp32", val_prompts=80,
    linear_guess=True, sample_steps=16, val_every=300, save_every=300)
PRESETS = {
    "paper": {},
    "small": SCENES | dict(
        width=512, ff_width=2048, time_width=256, blocks=12, text_width=256, text_length=64,
        steps=20_000, batch=256, lr=3e-4, ema_decay=0.999),
    "laptop": DEMO | dict(steps=6000, val_every=500),
    "demo": DEMO,
}


# ---------------- parts of the transformer (A.3.2)

def full_precision(x):
    """A context without autocast on the device of x."""
    return torch.autocast(x.device.type, enabled=False)


def turns(axes, *positions):
    """Cosines and sines (n, head / 2) for rotate. positions[i] (n,): each token's place on axis i,
    with which axes[i] values of a head turn."""
    parts = [model.angles(place, size // 2) for size, place in zip(axes, positions)]
    angle = torch.cat(parts, 1)
    return angle.cos(), angle.sin()


def rotate(x, turn):
    """Rotary positions: neighboring values of x (b, heads, n, head) turn by their angle."""
    cos, sin = turn
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


# Sec. 6.3; not in the paper: which AdaNorm, for the cited [51] means another; this is K5's
def ada_norm(x, shift, scale):
    """Adaptive LayerNorm, in FP32: x (b, n, d), shift and scale (b, 1, d)."""
    return F.layer_norm(x.float(), x.shape[-1:]) * (1 + scale) + shift


def modulation(a, parts):
    """From c to shifts, scales and gates; zero at first, so each block begins as identity."""
    linear = nn.Linear(a.time_width, parts * a.width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


# not in the paper: RMSNorm on queries and keys, and rotary positions; as in K5
class Attention(nn.Module):
    """Multi-head attention."""
    def __init__(self, a):
        super().__init__()
        self.head = sum(a.head_axes)
        self.q = nn.Linear(a.width, a.width)
        self.k = nn.Linear(a.width, a.width)
        self.v = nn.Linear(a.width, a.width)
        self.out = nn.Linear(a.width, a.width)
        self.q_norm = nn.RMSNorm(self.head)
        self.k_norm = nn.RMSNorm(self.head)

    def forward(self, x, source, turn=None, mask=None):
        """x (b, n, d) looks at source (b, l, d), where mask (b, 1, 1, l) is True."""
        q = self.q_norm(self.split(self.q(x)).float())  # (b, heads, n, head), FP32
        k = self.k_norm(self.split(self.k(source)).float())
        v = self.split(self.v(source))
        if turn is not None:
            q = rotate(q, turn)
            k = rotate(k, turn)
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

    def forward(self, x, c, turn, mask=None, text=None, text_mask=None):
        """x (b, n, d), c (b, d_t), text (b, l, d). Sums are FP32, since the gates are."""
        with full_precision(c):
            m = self.modulation(c)[:, None].split(x.shape[-1], -1)  # 6 or 9 of (b, 1, d)
        shift, scale, gate = m[:3]
        y = ada_norm(x, shift, scale)
        x = x + gate * self.self_attention(y, y, turn, mask)
        if self.cross_attention is not None:
            shift, scale, gate = m[3:6]
            y = ada_norm(x, shift, scale)
            x = x + gate * self.cross_attention(y, text, mask=text_mask)
        shift, scale, gate = m[-3:]
        return x + gate * self.feed_forward(ada_norm(x, shift, scale))


WORD = 16  # bytes of a word that are looked at


class Bytes(nn.Module):
    """Embeddings of words: the sum over their UTF-8 bytes, with one table per place in the word."""
    def __init__(self, a):
        super().__init__()
        self.table = nn.EmbeddingBag(1 + WORD * 256, a.text_width, mode="sum", padding_idx=0)

    def forward(self, words, mask):
        """words (b, l, WORD): byte + 1, 0 after a word's end; gives tokens and their mean."""
        place = 256 * torch.arange(WORD, device=words.device)
        index = torch.where(words > 0, words + place, 0)
        tokens = self.table(index.flatten(0, 1)).unflatten(0, mask.shape)  # (b, l, d_text)
        own = mask[..., None]
        return tokens, (tokens * own).sum(1) / own.sum(1)


class DiT(nn.Module):
    """Token Refiner and cross-attention blocks (Sec. 6.3). forward gives the velocity at (x, t).

    Rotary positions are relative: were all patches equal, so would be all outputs. Where a
    picture's middle is must be read off its noise. K5 learns that in time; in a run of minutes
    sines of row and column (`absolute`) give each patch its place, and `linear_guess` leaves to
    the network only what no linear map of x knows.
    """
    def __init__(self, a):
        super().__init__()
        values = a.patch ** 2 * a.latent_channels
        self.a = a
        self.bytes = Bytes(a) if a.text_encoder == "bytes" else None
        pooled_width = a.text_width if self.bytes else a.pooled_width
        self.time = nn.Sequential(nn.Linear(a.width, a.time_width), nn.SiLU(),
                                  nn.Linear(a.time_width, a.time_width))
        self.text = nn.Sequential(nn.Linear(a.text_width, a.width), nn.LayerNorm(a.width))
        self.pooled = nn.Sequential(nn.Linear(pooled_width, a.time_width),
                                    nn.LayerNorm(a.time_width))
        self.patches = nn.Linear(values, a.width)
        self.refiner = nn.ModuleList(Block(a, cross=False) for _ in range(a.refiner_blocks))
        self.blocks = nn.ModuleList(Block(a, cross=True) for _ in range(a.blocks))
        self.out_modulation = modulation(a, 2)
        self.out = nn.Linear(a.width, values)
        self.checkpointing = False

    def forward(self, x, t, tokens, mask, pooled):
        """x (b, k, h, w): normalized latents mixed with noise. t (b,): 0 is the picture, 1 noise.
        tokens (b, l, d_text) with mask (b, l), True at a prompt's own tokens, and pooled
        (b, d_pooled). With "bytes", tokens are words (b, l, WORD), and pooled is ignored."""
        if self.bytes is not None:
            tokens, pooled = self.bytes(tokens, mask)
        c = self.condition(t, pooled)
        mask = mask[:, None, None]  # (b, 1, 1, l)
        text = self.refine(tokens.to(x.dtype), mask, c)

        guess = linear_velocity(x, t) if self.a.linear_guess else 0
        p = self.a.patch
        rows = x.shape[2] // p
        columns = x.shape[3] // p
        place = torch.arange(rows * columns, device=x.device)  # (n,)
        row = place // columns
        column = place % columns
        turn = turns(self.a.head_axes, 0 * row, row, column)  # a picture is frame 0
        x = self.patches(to_patches(x, p))  # (b, n, d)
        if self.a.absolute:
            half = self.a.width // 2
            x = x + torch.cat(turns((half, half), row, column), 1)
        for block in self.blocks:
            x = self.through(block, x, c, turn, None, text, mask)

        with full_precision(x):
            shift, scale = self.out_modulation(c)[:, None].chunk(2, -1)
            x = self.out(ada_norm(x, shift, scale))  # (b, n, k p p)
        return guess + from_patches(x, p, rows)  # (b, k, h, w)

    def condition(self, t, pooled):
        """What every AdaNorm sees, c (b, d_t)."""
        with full_precision(t):
            wave = model.angles(1000 * t.float(), self.a.width // 2)
            time = self.time(torch.cat([wave.cos(), wave.sin()], 1))
            # not in the paper: text beside time, as in K5
            return time + self.pooled(pooled.float())

    def refine(self, tokens, mask, c):
        """Token Refiner: from tokens (b, l, d_text) to the text that patches look at, (b, l, d)."""
        text = self.text(tokens)
        place = torch.arange(text.shape[1], dtype=torch.float32, device=text.device)
        turn = turns((sum(self.a.head_axes),), place)
        for block in self.refiner:
            text = self.through(block, text, c, turn, mask)
        return text

    def through(self, block, *inputs):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def to_patches(x, p):
    """A latent (b, k, h, w) cut into patches of p x p, row by row: (b, n, p p k)."""
    x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (b, k, rows, p, columns, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def from_patches(x, p, rows):
    """Patches (b, n, k p p) put together: (b, k, h, w). Not the inverse of to_patches, whose
    values have channels last; both as in K5."""
    x = x.unflatten(2, (-1, p, p)).unflatten(1, (rows, -1))  # (b, rows, columns, k, p, p)
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def linear_velocity(x, t):
    """The multiple of x_t that comes closest to the velocity, were latents independent and of
    variance 1: cov(v, x_t) / var(x_t) = (t - (1 - t)) / (t^2 + (1 - t)^2)."""
    t = t[:, None, None, None]
    return (2 * t - 1) / (t**2 + (1 - t)**2) * x


def build(a):
    """A DiT from any settings that include a Network; stops where they are impossible."""
    a = Network(**{field.name: getattr(a, field.name) for field in fields(Network)})
    odd = any(axis % 2 for axis in a.head_axes)
    if len(a.head_axes) != 3 or odd or a.width % sum(a.head_axes) or a.width % 4:
        data.stop(f"--width {a.width} must be a multiple of 4 and of the sum of --head-axes "
                  f"{a.head_axes}, three even numbers")
    return DiT(a)


# ---------------- objective and sampler

# not in the paper: rectified flow, as in K5: x_t lies on the straight line from picture to noise
def flow_loss(net, x, noise, t, tokens, mask, pooled):
    """Squared error of the velocity dx_t/dt = noise - x, one mean per picture: (b,)."""
    share = t[:, None, None, None]  # of noise
    x_t = (1 - share) * x + share * noise
    velocity = net(x_t, t, tokens, mask, pooled).float()
    return (velocity - (noise - x)).square().mean(dim=(1, 2, 3))


def shifted(t, shift):
    """Times in [0, 1], moved towards noise."""
    return shift * t / (1 + (shift - 1) * t)


@torch.no_grad()
def sample(net, x, prompt, empty, steps, guidance, shift):
    """Follow the velocity from noise x (b, k, h, w), t = 1, to latents, t = 0, by Euler's method.

    prompt, empty: (tokens, mask, pooled) of the prompts and of the empty prompt.
    """
    times = shifted(torch.linspace(1, 0, steps + 1, device=x.device), shift)
    for now, after in itertools.pairwise(times):
        t = now.expand(len(x))
        v = net(x, t, *prompt).float()
        if guidance != 1:
            v_empty = net(x, t, *empty).float()
            v = v_empty + guidance * (v - v_empty)
        x = x + (after - now) * v
    return x


DRAWN_AT_ONCE = 16  # prompts


@torch.no_grad()
def draw(net, vae, encoded, prompts, s):
    """A uint8 picture (3, size, size) for each prompt, from noise that is a function of (seed, its
    number). Each process draws prompts[rank::world] and gets all; `encoded` has that share."""
    rank, world = data.processes()
    device = vae.latent_mean.device
    k = len(vae.latent_mean)
    side = s.size // vae.factor
    own = range(rank, len(prompts), world)
    pictures = []
    for first in range(0, len(own), DRAWN_AT_ONCE):
        numbers = own[first:first + DRAWN_AT_ONCE]
        noise = [torch.randn(k, side, side, generator=data.generator(s.seed, "sample", i))
                 for i in numbers]
        prompt = pad([encoded[prompts[i]] for i in numbers], device=device)
        empty = pad([encoded[""]] * len(numbers), device=device)
        with data.autocast(device, s):
            z = sample(net, torch.stack(noise).to(device), prompt, empty, s.sample_steps,
                       s.guidance, s.shift)
        for part in vae.denormalize(z).split(8):
            # A view would take its whole part along.
            pictures += [x.clone() for x in losses.to_uint8(vae.decode(part)).cpu()]
    shares = [pictures] * world
    if world > 1:
        dist.all_gather_object(shares, pictures)
    return [shares[i % world][i // world] for i in range(len(prompts))]


# ---------------- text (A.3.1)
# An encoder turns each prompt into a pair (tokens, pooled), l tokens long. qwen-clip: Qwen's states
# (l, d_text), bfloat16, and CLIP's vector (d_pooled,). bytes: words (l, WORD), int16, and nothing.

# not in the paper: K5's, with its spelling; the states of its own tokens are cut off in `encode`
TEMPLATE = ("<|im_start|>system\nYou are a promt engineer. Describe the image by detailing the "
            "color, shape, size, texture, quantity, text, spatial relationships of the objects "
            "and background:<|im_end|>\n<|im_start|>user\n")


def text_encoder(a, device):
    if a.text_encoder == "bytes":
        return functools.partial(encode_bytes, a)
    return QwenClip(a, device)


def encode_bytes(a, prompts):
    pairs = []
    for prompt in prompts:
        words = re.findall(r"\w+|[^\w\s]", prompt)[:a.text_length - 1]
        words = [word.encode("utf-8", "replace")[:WORD] for word in words]
        words.append(b"\0")  # so that no prompt is empty
        rows = [[byte + 1 for byte in word] + [0] * (WORD - len(word)) for word in words]
        pairs.append((torch.tensor(rows, dtype=torch.int16), torch.zeros(0)))
    return pairs


class QwenClip:  # not in the paper: which of their states; as in K5
    """Qwen's last hidden states, and CLIP's state at the end of the text."""
    def __init__(self, a, device):
        try:
            from transformers import AutoModel, AutoTokenizer, CLIPTextModel
        except ImportError:
            data.stop("--text-encoder qwen-clip needs the transformers package: pip install "
                      "transformers; or take --text-encoder bytes")
        try:
            self.qwen_tokenizer = AutoTokenizer.from_pretrained(a.qwen, padding_side="right")
            self.qwen = AutoModel.from_pretrained(a.qwen, dtype=torch.bfloat16).to(device).eval()
            self.clip_tokenizer = AutoTokenizer.from_pretrained(a.clip)
            self.clip = CLIPTextModel.from_pretrained(a.clip).to(device).eval()
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            data.stop(f"--qwen {a.qwen} or --clip {a.clip} cannot be loaded: {reason}")
        self.check(a.qwen, self.qwen, a.text_width, "--text-width")
        self.check(a.clip, self.clip, a.pooled_width, "--pooled-width")
        self.a = a
        self.device = device
        self.start = len(self.qwen_tokenizer(TEMPLATE).input_ids)

    def check(self, name, net, width, flag):
        config = getattr(net.config, "text_config", net.config)
        if config.hidden_size != width:
            data.stop(f"{name} has width {config.hidden_size}: give {flag} {config.hidden_size}")

    def __call__(self, prompts):
        pairs = []
        for first in range(0, len(prompts), 16):
            pairs += self.encode(prompts[first:first + 16])
        return pairs

    @torch.no_grad()
    def encode(self, prompts):
        # With causal attention and padding on the right, no token sees what is padded.
        texts = [TEMPLATE + prompt + "<|im_end|>" for prompt in prompts]
        q = self.qwen_tokenizer(texts, padding=True, truncation=True, return_tensors="pt",
                                max_length=self.start + self.a.text_length).to(self.device)
        states = self.qwen(input_ids=q.input_ids, attention_mask=q.attention_mask)
        states = states.last_hidden_state[:, self.start:].bfloat16().cpu()
        c = self.clip_tokenizer(prompts, padding="max_length", truncation=True,
                                return_tensors="pt",
                                max_length=self.a.pooled_length).to(self.device)
        pooled = self.clip(**c).pooler_output.float().cpu()
        lengths = (q.attention_mask.sum(1) - self.start).tolist()
        return [(tokens[:length], p) for tokens, length, p in zip(states, lengths, pooled)]


def encode_once(a, prompts, device):
    """{prompt: its pair}, the empty prompt too. A large encoder does not stay in memory."""
    texts = ["", *prompts]
    return dict(zip(texts, text_encoder(a, device)(texts)))


def pad(pairs, length=0, device="cpu"):
    """Encoded prompts as a batch: tokens (b, l, .), mask (b, l), pooled (b, .), with l that of the
    longest, or `length`."""
    own, pooled = zip(*pairs)
    tokens = nn.utils.rnn.pad_sequence(own, batch_first=True)
    tokens = F.pad(tokens, (0, 0, 0, max(0, length - tokens.shape[1])))
    mask = torch.arange(tokens.shape[1]) < torch.tensor([*map(len, own)])[:, None]
    return tokens.to(device), mask.to(device), torch.stack(pooled).to(device)


# ---------------- latents, once
# RUN/latents: 00000.pt, 00001.pt, ... of PER_FILE pictures each. A file is complete or absent.

PER_FILE = 1024
ENCODED_AT_ONCE = 16  # pictures
# not in the paper: scenes that are never trained on, for prompts to ask for: a red circle, a yellow
# square, a green triangle, a cyan star.
HELD_OUT = tuple(zip(data.COLORS, data.SHAPES))


def captions(s, split):
    """Yield (file name, caption) of pictures that have one; of scenes without what is held out.
    Stops where pictures or captions are missing, or pictures are too small."""
    folder = Path(s.run, "data", split)
    data.picture_names(folder, s.size)
    leave_out = is_scenes(s) and split == "train"
    found = False
    for line in data.read_jsonl(folder / "metadata.jsonl"):
        text = line["text"]
        if text.strip() and not (leave_out and data.told(text)[:2] in HELD_OUT):
            found = True
            yield line["file_name"], text
    if not found:
        data.stop(f"no picture in {folder} has a caption: 01_data.py takes them from .txt or "
                  ".json files beside the pictures")


def is_scenes(s):
    settings = json.loads(Path(s.run, "data", "settings.json").read_text())
    return settings["images"] == "synthetic"


def read_squares(s, names):
    """Training pictures of these file names, uint8 (b, 3, size, size)."""
    pictures = [data.read_picture(Path(s.run, "data", "train"), name) for name in names]
    # not in the paper: shorter side to the size, by the resizing of Sec. 5.1, then the center
    resized = [data.resize_shorter(x, s.size) for x in pictures]
    return torch.stack([data.center_crop(x, s.size) for x in resized])


def own_files(s, folder):
    """Yield (path, number of the first picture, [(file name, caption)]) of each file that this
    process must make."""
    rank, world = data.processes()
    source = captions(s, "train")
    for number in itertools.count():
        pictures = list(itertools.islice(source, PER_FILE))
        if not pictures:
            return
        path = folder / f"{number:05d}.pt"
        if number % world == rank and not path.exists():
            yield path, number * PER_FILE, pictures


def cache(s, vae, vae_parent, device):
    """Encode pictures and prompts into RUN/latents, or go on where that stopped; the folder."""
    folder = Path(s.run, "latents")
    made_from = check_cache(s, vae, vae_parent, folder)
    if next(own_files(s, folder), None):
        encode = text_encoder(s, device)  # which may not be there
        if data.processes()[0] == 0:
            data.write_text(folder / "made_from.json", json.dumps(made_from, indent=1))
        make_files(s, vae, encode, folder, device)
    if dist.is_initialized():
        dist.barrier()
    return folder


def make_files(s, vae, encode, folder, device):
    """Encode the pictures and prompts of this process's files."""
    bar = tqdm(unit="picture", desc="latents", disable=data.processes()[0] > 0, **data.BAR)
    read = functools.partial(read_squares, s)
    workers = data.loader_workers(s, device)
    for path, number, pictures in own_files(s, folder):
        names, texts = zip(*pictures)
        latents = []
        for x in DataLoader(names, ENCODED_AT_ONCE, collate_fn=read, num_workers=workers):
            x = losses.from_uint8(x.to(device))  # (b, 3, size, size)
            latents.append(encode_views(x, vae, number, s))
            number += len(x)
            bar.update(len(x) * data.processes()[1])
        tokens, pooled = zip(*encode(["", *texts]))
        # Prompt i has tokens[bounds[i]:bounds[i + 1]]; the empty prompt stands first.
        bounds = torch.tensor([0, *map(len, tokens)]).cumsum(0)
        data.save_checkpoint(path, latents=torch.cat(latents), bounds=bounds,
                             tokens=torch.cat(tokens), pooled=torch.stack(pooled))
    bar.close()


@torch.no_grad()
def encode_views(x, vae, number, s):
    """Normalized latents of pictures x (b, 3, size, size), and with --flip of their mirror images:
    float16 (b, 1 or 2, k, h, w). number: the first picture's, from which noise follows."""
    views = []
    for flipped in range(1 + s.flip):
        q = vae.encode(x.flip(-1) if flipped else x)
        # not in the paper: one sample of the posterior, not a new one each time it is seen
        keys = [(s.seed, "latent", number + i, flipped) for i in range(len(x))]
        noise = [torch.randn(q.mu.shape[1:], generator=data.generator(*key)) for key in keys]
        z = q.sample(torch.stack(noise).to(x.device))  # (b, k, h, w)
        views.append(vae.normalize(z).half().cpu())
    return torch.stack(views, 1)


def check_cache(s, vae, vae_parent, folder):
    """What RUN/latents is made from, {name: value}; stops where it was made from other things."""
    index = Path(s.run, "data", "train", "index.json")
    made_from = {"vae": vae_parent["sha256"], "data": data.parent(index)["sha256"],
                 "scale": [vae.latent_mean.tolist(), vae.latent_std.tolist()]}
    for name in ("size", "flip", "seed", "text_encoder", "text_width", "text_length",
                 "pooled_width", "pooled_length", "qwen", "clip"):
        made_from[name] = getattr(s, name)
    path = folder / "made_from.json"
    if path.exists():
        kept = json.loads(path.read_text())
        others = {"vae": f"another VAE than {vae_parent['path']}", "data": "other data than now",
                  "scale": "latents of another mean and deviation, by --peer"}
        for name, other in others.items():
            if kept[name] != made_from[name]:
                data.stop(f"{folder} was made from {other}: take another --run, or remove it")
        data.check_settings(kept, made_from, set(), folder)
    return made_from


@functools.lru_cache(maxsize=1024)
def read_latents(path):
    return torch.load(path, mmap=True, weights_only=True)


class Examples(Dataset):
    """Latents and prompts in RUN/latents, with all that is random about a step: item number i is
    a function of (seed, i) alone."""
    def __init__(self, folder, s):
        self.files = sorted(Path(folder).glob("*.pt"))
        last = read_latents(self.files[-1])
        self.pictures = (len(self.files) - 1) * PER_FILE + len(last["latents"])
        self.s = s

    def __getitem__(self, number):
        generator = data.generator(self.s.seed, number)
        i = int(torch.randint(self.pictures, (), generator=generator))
        flipped = int(torch.randint(1 + self.s.flip, (), generator=generator))
        file = read_latents(self.files[i // PER_FILE])
        place = i % PER_FILE
        x = file["latents"][place, flipped].float()  # (k, h, w)
        noise = torch.randn(x.shape, generator=generator)
        t = torch.sigmoid(torch.randn((), generator=generator))  # as in SD 3, see t_shift
        dropped = torch.rand((), generator=generator) < self.s.drop
        prompt = 0 if dropped else 1 + place  # the empty prompt stands first
        start, end = file["bounds"][prompt:prompt + 2].tolist()
        # A copy, or a loader process would send the whole file.
        tokens = file["tokens"][start:end].clone()
        return x, noise, shifted(t, self.s.t_shift), (tokens, file["pooled"][prompt].clone())


def collate(items, length):
    x, noise, t, pairs = zip(*items)
    return torch.stack(x), torch.stack(noise), torch.stack(t), *pad(pairs, length)


# ---------------- training

def train_step(parts, net, optimizers, window, s):
    """One step on this process's share of the batch; returns the norm of the gradient.

    parts: (x, noise, t, tokens, mask, pooled), one at a time in memory. window (2, 4): sums and
    numbers of losses since the last line of the log, by quarter of t.
    """
    share = 1 / (s.accumulate * data.processes()[1])
    for x, noise, t, *text in parts:
        with data.autocast(x.device, s):
            loss = flow_loss(net, x, noise, t, *text)  # (b,)
        (share * loss.mean()).backward()
        quarter = (4 * t).long().clamp(max=3)
        window.index_add_(1, quarter, torch.stack([loss.detach(), torch.ones_like(loss)]))
    weights = list(net.parameters())
    data.sum_gradients(weights)
    norm = torch.nn.utils.clip_grad_norm_(weights, s.clip_norm)  # Table 4
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return norm


def train(s, out, vae, vae_parent, folder, device, file):
    """Train a DiT on the latents in `folder` up to s.steps. file: what an interrupted run left."""
    rank, world = data.processes()
    stage = "07_train_dit"
    torch.manual_seed(s.seed)  # the same network whether latents were made just now or not
    net = build(s).to(device)
    net.checkpointing = s.checkpointing
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    inside = [*net.refiner.parameters(), *net.blocks.parameters()]
    adamw = functools.partial(torch.optim.AdamW, lr=s.lr, betas=(s.beta1, s.beta2), eps=s.eps,
                              weight_decay=s.weight_decay,  # Table 4
                              fused=device.type in ("cuda", "cpu"))
    optimizers = model.make_optimizers(net.parameters(), inside, s, adamw)
    state = dict(model=net, ema=ema, **optimizers)
    step = data.load_state(file, state)
    window = torch.zeros(2, 4, device=device)
    if file and rank == 0:
        window += file["window"].to(device)
    about = dict(stage=stage, settings=asdict(s), architecture=asdict(net.a), parent=vae_parent)
    forward = torch.compile(net) if s.compile else net

    judge = Judge(s, device)
    # Another length of prompts would be compiled anew.
    padded = functools.partial(collate, length=s.text_length if s.compile else 0)
    loader, bar = data.begin(Examples(folder, s), s, stage, step, device, padded)
    clock = time.time()
    since = step
    for step in range(step + 1, s.steps + 1):
        parts = ([v.to(device, non_blocking=device.type == "cuda") for v in next(loader)]
                 for _ in range(s.accumulate))
        # Table 4: constant + warmup
        factor = model.rate_factor(step, s.steps, s.decay, s.warmup)
        model.set_rates(optimizers.values(), factor)
        norm = train_step(parts, forward, optimizers.values(), window, s)
        model.update_average(ema.parameters(), net.parameters(), step, s.ema_decay)
        bar.update()

        last = step == s.steps
        looking = last or step % s.val_every == 0
        logging = looking or step % s.log_every == 0
        saving = last or step % s.save_every == 0
        stopping = rank == 0 and bool(data.SIGNALS)
        if (logging or saving) and world > 1:
            dist.all_reduce(window)
            if rank > 0:
                window.zero_()  # the first process has their sums
        if logging or saving or stopping:
            values = {"loss": window[0].sum().item(), "gradient": norm.item()}
            data.check_finite(values, step, out, bar)
        rate = (step - since) * s.batch / (time.time() - clock)
        if looking:
            pictures = draw(ema, vae, judge.encoded, judge.prompts, s)
        if logging and rank == 0:
            entry = log_entry(stage, step, window, norm, rate)
            if looking:
                entry |= judge.look(pictures)
            bar.write(status(entry, s.steps))
            data.log(s.run, **entry)
            if looking:
                draw_curve(s.run)
        if logging:
            window.zero_()
            clock = time.time()
            since = step
        # Stopped between two lines of the log, only the first process's losses are kept.
        if rank == 0 and (saving or stopping):
            data.save_state(out, state, step=step, window=window.cpu(), **about)
        if stopping:
            bar.close()
            data.leave(stage, out, step)
    bar.close()


def log_entry(stage, step, window, norm, rate):
    sums, counts = window.tolist()
    entry = dict(stage=stage, step=step, loss=sum(sums) / sum(counts), grad=norm.item(),
                 pictures_per_second=rate)
    for i in range(4):
        entry[f"loss_t{i}"] = sums[i] / counts[i] if counts[i] else None
    return entry


def status(e, steps):
    line = f"{e['step']:7d}/{steps}  loss {e['loss']:.4f}  by quarter of t"
    for i in range(4):
        loss = e[f"loss_t{i}"]
        line += " -" if loss is None else f" {loss:.3f}"
    line += f"  grad {e['grad']:.2f}  {e['pictures_per_second']:.0f} pictures/s"
    for name in CURVES:
        if name in e:
            line += f"  {name.replace('_', ' ')} {e[name]:.2f}"
    return line


# ---------------- is the prompt followed? (Fig. 6)

# How often a scene drawn at random would fit the prompt.
CHANCE = {"color": 1 / 6, "shape": 1 / 4, "pattern": 1 / 4, "ground": 1 / 6, "all four": 1 / 480}
CURVES = (*CHANCE, "clip_score")


def scene_prompts():
    """Every prompt for a color and shape that are held out: 80."""
    return [f"a {color} {shape} on a {pattern} {ground} background"
            for (color, shape), pattern, ground
            in itertools.product(HELD_OUT, data.PATTERNS, data.COLORS) if ground != color]


class Judge:
    """The validation prompts, and how well pictures follow them."""
    def __init__(self, s, device):
        self.s = s
        self.scenes = is_scenes(s)
        if self.scenes:
            prompts = scene_prompts()
        else:
            prompts = [text for _, text in captions(s, "val")]
        self.prompts = prompts[::math.ceil(len(prompts) / s.val_prompts)]
        rank, world = data.processes()
        self.encoded = encode_once(s, self.prompts[rank::world], device)
        self.scorer = None
        if s.clip_score and rank == 0:
            self.scorer = clip_scorer(s.clip_score, device)

    def look(self, pictures):
        """Draw at most twelve of these pictures; return the scores for the log."""
        every = math.ceil(len(self.prompts) / 12)
        data.save_sheet(Path(self.s.run, "dit.png"), pictures[::every], 4,
                        captions=self.prompts[::every])
        result = {}
        if self.scenes:
            result |= follow(pictures, self.prompts)
        if self.scorer:
            result["clip_score"] = self.scorer(pictures, self.prompts)
        return result


def follow(pictures, prompts):
    """Shares of scene prompts whose color, shape, pattern and ground the pictures show."""
    right = []
    for picture, prompt in zip(pictures, prompts):
        pairs = zip(data.read_scene(picture), data.told(prompt))
        right.append([seen == wanted for seen, wanted in pairs])
    right = torch.tensor(right).float()  # (prompts, 4)
    shares = dict(zip(("color", "shape", "pattern", "ground"), right.mean(0).tolist()))
    shares["all four"] = right.prod(1).mean().item()
    return shares


def clip_scorer(name, device):
    """A function of pictures and prompts: the mean of 100 max(cos, 0) of their CLIP features. ([16]
    has 2.5 for 100, and writes "A photo depicts" before each prompt.)"""
    try:
        from transformers import CLIPModel, CLIPProcessor
        clip = CLIPModel.from_pretrained(name).to(device).eval()
        processor = CLIPProcessor.from_pretrained(name)
    except Exception as error:
        data.stop(f"--clip-score {name} needs pip install transformers, and that model "
                  f"({type(error).__name__}); --clip-score '' goes without")

    @torch.no_grad()
    def score(pictures, prompts):
        total = 0.0
        for i in range(0, len(prompts), 64):
            inputs = processor(text=prompts[i:i + 64], images=pictures[i:i + 64], padding=True,
                               truncation=True, return_tensors="pt", max_length=77)
            out = clip(**inputs.to(device))
            cosine = F.cosine_similarity(out.image_embeds, out.text_embeds)
            total += 100 * cosine.clamp(min=0).sum().item()
        return total / len(prompts)

    return score


def draw_curve(run):
    """Fig. 6 from the log: each measure over steps; a thin line is chance, where that is known."""
    lines = [line for line in data.read_jsonl(Path(run, "log.jsonl"))
             if any(name in line for name in CURVES)]
    if not lines:
        return
    names = [name for name in CURVES if all(name in line for line in lines)]
    w, h = 300, 200
    last = lines[-1]["step"]
    im = Image.new("RGB", (len(names) * w, h), "white")
    pen = ImageDraw.Draw(im)
    font = ImageFont.load_default(12)
    for i, name in enumerate(names):
        top = 1 if name in CHANCE else 40

        def point(step, value):
            return i * w + 40 + (w - 60) * step / last, h - 25 - (h - 60) * value / top

        title = f"{name.replace('_', ' ')} {lines[-1][name]:.3g}"
        pen.text((i * w + 40, 8), title, "black", font)
        pen.line([point(0, top), point(0, 0), point(last, 0)], "black")
        if name in CHANCE:
            pen.line([point(0, CHANCE[name]), point(last, CHANCE[name])], (200, 120, 120))
        pen.line([point(line["step"], line[name]) for line in lines], (30, 60, 160), 3)
        pen.text((i * w + 16, 28), f"{top}", "black", font)
        pen.text((i * w + 16, h - 32), "0", "black", font)
        pen.text((i * w + 190, h - 22), f"{last} steps", "black", font)
    data.write_aside(Path(run, "curve.png"), lambda f: im.save(f, "PNG"))


# ---------------- main

def table(s):
    """Parameters of each component, {name: number}, without memory for them."""
    with torch.device("meta"):
        net = build(s)
    out = nn.ModuleList([net.out_modulation, net.out])
    rows = {"bytes": net.bytes, "time embedding": net.time, "text projection": net.text,
            "pooled projection": net.pooled, "patches": net.patches,
            f"token refiner, {s.refiner_blocks} blocks": net.refiner,
            f"cross-attention, {s.blocks} blocks": net.blocks, "out": out, "total": net}
    return {name: model.count(part) for name, part in rows.items() if part is not None}


def main_sample(s):
    """Pictures of the prompts in --sample, from dit.pt and the VAE that it names."""
    path = Path(s.run, "dit.pt")
    device = data.pick_device(s.device)
    file = data.read_checkpoint(path, ("07_train_dit",), "run 07_train_dit.py without --sample")
    made_from = file["parent"]
    vae_path = Path(s.vae or made_from["path"])
    if not s.vae and not vae_path.is_file():
        vae_path = path.with_name(vae_path.name)
    if not vae_path.is_file():
        data.stop(f"{vae_path}, the VAE that {path} was trained on, is gone: give --vae FILE")
    if data.parent(vae_path)["sha256"] != made_from["sha256"]:
        data.stop(f"{vae_path} is not the VAE of {path}: it has another hash")
    trained = file["settings"]
    vae = model.load_vae(vae_path, device, trained["peer"])
    a = Network(**data.with_tuples(file["architecture"]))
    net = build(a).to(device).eval()
    net.load_state_dict(file["ema"])
    encoded = encode_once(a, s.sample, device)
    for prompt in s.sample:
        if len(encoded[prompt][0]) == a.text_length:
            start = " ".join(prompt.split())[:60]
            print(f"perhaps cut to {a.text_length} tokens: {start} ...")
    s = replace(s, size=trained["size"], precision=trained["precision"])
    pictures = draw(net, vae, encoded, s.sample, s)
    out = Path(s.run, "sample.png")
    data.save_sheet(out, pictures, min(4, len(pictures)), captions=s.sample)
    print(f"wrote {out}: {len(pictures)} pictures of {path} at step {file['step']}")
    return pictures


def main(s):
    if s.dry_run:
        return data.print_settings(s, parameters=table(s))
    if s.sample_steps < 1 or s.val_prompts < 1 or s.shift <= 0:
        data.stop(f"--sample-steps ({s.sample_steps}) and --val-prompts ({s.val_prompts}) must be "
                  f"at least 1, and --shift ({s.shift}) above 0")
    if s.sample:
        return main_sample(s)
    out = Path(s.run, "dit.pt")
    vae_path = Path(s.vae or Path(s.run, "vae_finetuned.pt"))
    if not s.vae and not vae_path.is_file():
        vae_path = Path(s.run, "vae.pt")
    device = data.start(s)
    vae = model.load_vae(vae_path, device, s.peer)
    if vae.latent_mean is None:
        data.stop(f"{vae_path} has no mean and deviation of its latents: run the stage that made "
                  "it to its end, or say whose it is with --peer")
    k = len(vae.latent_mean)
    if k != s.latent_channels:
        data.stop(f"{vae_path} has {k} latent channels: give --latent-channels {k}")
    if not vae.takes(s.size) or s.size // vae.factor % s.patch:
        data.stop(f"--size {s.size} must be a multiple of {vae.factor * s.patch}, from "
                  f"{vae.smallest} up")
    # Settings that no network fits, and pictures without captions, stop before latents are made.
    with torch.device("meta"):
        build(s)
    next(captions(s, "train"))
    next(captions(s, "val"))
    vae_parent = data.parent(vae_path)
    # These may differ from the interrupted run: they shape no weight, or a hash is compared.
    free = {"vae", "checkpointing", "val_prompts", "sample", "sample_steps", "guidance", "shift",
            "clip_score"}
    file = data.resume(s, "07_train_dit", out, vae_parent, free)
    if file and file["step"] == s.steps:
        if data.processes()[0] == 0:
            print(f"{out} is finished at step {s.steps}; more --steps go on from there")
    else:
        folder = cache(s, vae, vae_parent, device)
        train(s, out, vae, vae_parent, folder, device, file)
    data.finish()


if __name__ == "__main__":
    data.command_line(main, Settings, PRESETS, __doc__)
