"""Stage 7 of VIVAT: text to image, a diffusion transformer on the latents of the frozen VAE (Sec. 6.3, A.3).

Reads   RUN/data with captions (01_data.py); RUN/vae_finetuned.pt, else RUN/vae.pt, or with --vae any file that load_vae reads;
        RUN/dit.pt if this run was interrupted.
Writes  RUN/latents (once), RUN/dit.pt, RUN/dit.png (prompts and their pictures), RUN/curve.png (Fig. 6), RUN/log.jsonl;
        with --sample instead RUN/sample.png.
Paper   Sec. 3.3, 6.3, A.3, Table 4, Fig. 6.

    python 07_train_dit.py --preset small --run runs/mine
    python 07_train_dit.py --run runs/mine --sample "a red star on a plain blue background" --steps 50 --guidance 5 --seed 0

The numbers of A.3 are those of Kandinsky 5 Lite (same authors, "K5" below): where the paper is silent, that network's layout is followed.
Shapes: b pictures, k latent channels, h and w sides of the latent, n = hw/4 its patches, l text tokens, d the width.
"""
import copy, importlib, itertools, json, math, re, sys, time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

data = importlib.import_module("01_data")
model = importlib.import_module("02_model")
losses = importlib.import_module("03_losses")
training = importlib.import_module("04_train_vae")


@dataclass(frozen=True)
class Network:
    """What dit.pt must carry to build its network and its text encoder again."""
    width: int = 1792                           # A.3.2: hidden dimension d_h
    ff_width: int = 7168                        # A.3.2: feed-forward dimension d_ff
    time_width: int = 512                       # A.3.2: time embedding dimension d_t
    blocks: int = 32                            # A.3.2: N, cross-attention blocks
    refiner_blocks: int = 2                     # not in the paper: of K5
    head_axes: tuple[int, ...] = (16, 24, 24)   # not in the paper: of K5; what part of a head (their sum) turns with frame, row and column
    absolute: bool = False                      # not in the paper: sines of row and column added to patches; K5 has none, see DiT
    patch: int = 2                              # A.3.2: latent patch size
    latent_channels: int = model.Architecture.latent_channels   # Table 2: of the VAE
    text_encoder: Literal["qwen-clip", "bytes"] = "qwen-clip"   # A.3.1; bytes learns an embedding of the prompt's bytes and needs nothing
    qwen: str = "Qwen/Qwen2.5-VL-7B-Instruct"   # A.3.1: on the hub, or a folder
    text_width: int = 3584                      # A.3.1: d_Qwen
    text_length: int = 256                      # A.3.1: L_Qwen, tokens of a prompt at most
    clip: str = "openai/clip-vit-large-patch14" # A.3.1 names CLIP; not in the paper: which, 768 is this one's width and K5's choice
    pooled_width: int = 768                     # A.3.1: d_CLIP
    pooled_length: int = 77                     # A.3.1: L_CLIP


@dataclass(frozen=True)
class Sampling:
    """The flags beside --sample."""
    sample: tuple[str, ...] = ()   # prompts, a picture each
    run: str = ""                  # folder that all stages share [runs/PRESET]
    steps: int = 50                # not in the paper: Euler steps, of K5
    guidance: float = 5.0          # not in the paper: classifier-free guidance, of K5 (3.5 for its larger text to image model); 1 is the prompt alone
    shift: float = 3.0             # not in the paper: more of the steps where there is more noise, of K5's text to image; 1 is evenly
    dit: str = ""                  # not in the paper: the network [RUN/dit.pt]
    vae: str = ""                  # not in the paper: the VAE it was trained on, if that file has moved
    seed: int = 0                  # not in the paper: of the noise that pictures are made from
    device: str = "auto"           # not in the paper: cuda, mps or cpu
    dry_run: bool = False          # print the settings as JSON and stop


@dataclass(frozen=True)
class Settings(Network):
    run: str = ""                      # folder that all stages share [runs/PRESET]
    vae: str = ""                      # not in the paper: the file whose latents to learn [RUN/vae_finetuned.pt, else RUN/vae.pt]
    peer: str = ""                     # not in the paper: whose --vae is, where neither file nor name tell: flux, sd3, sd1 or sdxl
    size: int = 256                    # Sec. 6.3: pictures of 256 x 256
    flip: bool = True                  # not in the paper: mirrored pictures' latents too
    steps: int = 130_000               # Sec. 6.3
    batch: int = 1024                  # Sec. 6.3: over all processes
    accumulate: int = 1                # not in the paper: parts that a process's share of the batch goes through memory in
    lr: float = 1e-4                   # Table 4
    beta1: float = 0.9                 # Table 4
    beta2: float = 0.95                # Table 4
    eps: float = 1e-8                  # Table 4
    weight_decay: float = 0.0          # Table 4
    clip_norm: float = 1.0             # Table 4: gradient clipping
    warmup: int = 1000                 # Table 4: steps to the full rate, constant after
    t_shift: float = 1.0               # not in the paper: t is logit-normal, as in SD 3, and moved towards noise as --shift moves it; 1 is not at all
    drop: float = 0.1                  # not in the paper: share of prompts taken away, for guidance; of K5
    ema_decay: float = 0.9999          # not in the paper: of K5
    precision: Literal["fp32", "tf32", "bf16"] = "bf16"   # not in the paper: of K5; weights, norms, modulation and sums stay FP32
    checkpointing: bool = False        # not in the paper: compute each block again in the backward pass, for less memory
    compile: bool = False              # not in the paper: torch.compile the network
    val_prompts: int = 1000            # not in the paper: validation prompts that Fig. 6 is taken over, at most
    val_steps: int = Sampling.steps    # not in the paper: Euler steps for them
    guidance: float = Sampling.guidance    # not in the paper: as with --sample
    shift: float = Sampling.shift      # not in the paper: as with --sample
    clip_score: str = "openai/clip-vit-base-patch32"   # Fig. 6: the CLIP that scores, here that of the cited [16]; "": none
    seed: int = 0                      # not in the paper: any; all that is random follows from it and the step
    device: str = "auto"               # not in the paper: cuda, mps or cpu
    workers: int = -1                  # not in the paper: loader processes; -1 is 8 beside a GPU, 0 on a CPU
    log_every: int = 100               # not in the paper: steps between two lines of the log
    val_every: int = 5_000             # not in the paper: steps between two points of Fig. 6
    save_every: int = 1_000            # not in the paper: steps between two checkpoints
    dry_run: bool = False              # print settings and the table of parameters as JSON and stop


SCENES = dict(text_encoder="bytes", clip_score="", absolute=True, t_shift=2.0)
PRESETS = {
    "paper": {},
    "small": SCENES | dict(width=512, ff_width=2048, time_width=256, blocks=12, text_width=256, text_length=64,
                           steps=20_000, batch=256, lr=3e-4, ema_decay=0.999),
    "demo": SCENES | dict(width=128, ff_width=512, time_width=128, blocks=4, refiner_blocks=1, head_axes=(8, 12, 12), text_width=64,
                          text_length=32, size=96, steps=750, batch=64, lr=2e-3, ema_decay=0.99, warmup=100, precision="fp32",
                          val_prompts=80, val_steps=16, guidance=3.0, val_every=250, save_every=250),
}
FREE = {"run", "vae", "steps", "device", "workers", "compile", "checkpointing", "log_every", "val_every", "save_every", "dry_run",
        "val_prompts", "val_steps", "guidance", "shift", "clip_score"}   # may change on resume


# ---------------------------------------------------------------- parts of the transformer (Sec. 6.3, A.3.2)

def full_precision(x):
    return torch.autocast(x.device.type, enabled=False)


def waves(positions, n):
    """Angles of positions (m,) at n frequencies, from 1 down to almost 1/10,000 of a radian a position: (m, n)."""
    return positions[:, None] * torch.exp(-math.log(10_000) * torch.arange(n, dtype=torch.float32, device=positions.device) / n)


def rotate(x, turn):
    """Rotary positions: pairs of neighbouring values of x (b, heads, n, head) turn by their angles, given as cosines and sines (n, head/2)."""
    (even, odd), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), turn
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def turns(axes, *positions):
    """Cosines and sines for rotate, of positions (n,) along each axis, which has `size` values of a head."""
    a = torch.cat([waves(p, size // 2) for size, p in zip(axes, positions)], 1)                                            # (n, head/2)
    return a.cos(), a.sin()


def modulation(n, parts):
    """AdaNorm's part that looks at time: zero at first, so that each block begins as the identity."""
    linear = nn.Linear(n.time_width, parts * n.width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


def ada_norm(x, shift, scale):
    """Adaptive LayerNorm, in FP32: x (b, n, d), shift and scale (b, 1, d)."""
    return F.layer_norm(x.float(), x.shape[-1:]) * (1 + scale) + shift


class Attention(nn.Module):
    """Multi-head attention with RMSNorm on queries and keys; mask (b, 1, 1, l) is True where a key may be looked at."""
    def __init__(self, n):
        super().__init__()
        self.head = sum(n.head_axes)
        self.q, self.k, self.v, self.out = (nn.Linear(n.width, n.width) for _ in range(4))
        self.q_norm, self.k_norm = nn.RMSNorm(self.head), nn.RMSNorm(self.head)

    def forward(self, x, source, turn=None, mask=None):                                       # x (b, n, d), source (b, l, d)
        q, k, v = (linear(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for linear, y in ((self.q, x), (self.k, source), (self.v, source)))
        q, k = self.q_norm(q.float()), self.k_norm(k.float())                                 # (b, heads, n, head), FP32
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))                                         # (b, n, d)


class Block(nn.Module):
    """Self-attention, in visual blocks cross-attention to the text, feed-forward: x = x + gate(t) * f(AdaNorm(x, t)) for each."""
    def __init__(self, n, cross):
        super().__init__()
        self.modulation = modulation(n, 9 if cross else 6)
        self.self_attention = Attention(n)
        self.cross_attention = Attention(n) if cross else None
        self.feed_forward = nn.Sequential(nn.Linear(n.width, n.ff_width, bias=False), nn.GELU(), nn.Linear(n.ff_width, n.width, bias=False))

    def forward(self, x, c, turn, mask=None, text=None, text_mask=None):                      # x (b, n, d), c (b, d_t), text (b, l, d)
        with full_precision(c):
            m = self.modulation(c)[:, None].split(x.shape[-1], -1)                            # 6 or 9 of (b, 1, d)
        y = ada_norm(x, m[0], m[1])
        x = x + m[2] * self.self_attention(y, y, turn, mask)                                  # sums in FP32, since gates are
        if self.cross_attention is not None:
            x = x + m[5] * self.cross_attention(ada_norm(x, m[3], m[4]), text, mask=text_mask)
        return x + m[-1] * self.feed_forward(ada_norm(x, m[-3], m[-2]))


class Bytes(nn.Module):
    """An embedding of words as the sum of their UTF-8 bytes' embeddings, one for each place in the word."""
    def __init__(self, n):
        super().__init__()
        self.table = nn.EmbeddingBag(1 + WORD * 256, n.text_width, mode="sum", padding_idx=0)

    def forward(self, words, mask):                                                           # (b, l, WORD) of byte + 1, 0 after a word's end
        index = torch.where(words > 0, words + 256 * torch.arange(WORD, device=words.device), 0)
        tokens = self.table(index.flatten(0, 1)).unflatten(0, mask.shape)                     # (b, l, d_text)
        return tokens, tokens.mul(mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class DiT(nn.Module):
    """Token Refiner and cross-attention blocks (Sec. 6.3). forward gives the velocity at (x, t), in x's shape.

    x (b, k, h, w): latents normalised by their channels' mean and deviation, mixed with noise. t (b,): 0 is the picture, 1 is noise.
    tokens (b, l, d_text) with mask (b, l), True at a prompt's own tokens, and pooled (b, d_pooled); with "bytes": words, and pooled is not looked at.
    Rotary positions are relative: equal patches get equal outputs wherever they lie, so that where a picture's middle is must be read off its noise.
    K5 has nothing else and learns it in time; in a run of minutes sines (`absolute`) are what puts things in their place (README, Measured).
    """
    def __init__(self, n):
        super().__init__()
        self.n, values = n, n.patch ** 2 * n.latent_channels
        self.bytes = Bytes(n) if n.text_encoder == "bytes" else None
        self.time = nn.Sequential(nn.Linear(n.width, n.time_width), nn.SiLU(), nn.Linear(n.time_width, n.time_width))
        self.text = nn.Sequential(nn.Linear(n.text_width, n.width), nn.LayerNorm(n.width))
        self.pooled = nn.Sequential(nn.Linear(n.text_width if self.bytes else n.pooled_width, n.time_width), nn.LayerNorm(n.time_width))
        self.patches = nn.Linear(values, n.width)
        self.refiner = nn.ModuleList(Block(n, cross=False) for _ in range(n.refiner_blocks))
        self.blocks = nn.ModuleList(Block(n, cross=True) for _ in range(n.blocks))
        self.out_modulation, self.out = modulation(n, 2), nn.Linear(n.width, values)
        self.checkpointing = False

    def forward(self, x, t, tokens, mask, pooled):
        p, (h, w) = self.n.patch, (side // self.n.patch for side in x.shape[2:])
        run = (lambda *a: checkpoint(*a, use_reentrant=False)) if self.checkpointing and torch.is_grad_enabled() else (lambda f, *a: f(*a))
        place = lambda size: torch.arange(size, dtype=torch.float32, device=x.device)
        if self.bytes is not None:
            tokens, pooled = self.bytes(tokens, mask)
        elif tokens.dtype == torch.int16:                                                     # the bits of bfloat16, as they are cached
            tokens = tokens.view(torch.bfloat16)
        with full_precision(x):
            a = waves(1000 * t.float(), self.n.width // 2)                                    # (b, d/2)
            c = self.time(torch.cat([a.cos(), a.sin()], 1)) + self.pooled(pooled.float())     # (b, d_t)

        text, mask = self.text(tokens.to(x.dtype)), mask[:, None, None]                       # (b, l, d), (b, 1, 1, l)
        turn = turns((sum(self.n.head_axes),), place(text.shape[1]))
        for block in self.refiner:
            text = run(block, text, c, turn, mask)

        row, column = place(h).repeat_interleave(w), place(w).repeat(h)                       # (n,), n = h w patches
        turn = turns(self.n.head_axes, 0 * row, row, column)                                 # a picture is frame 0
        x = x.unflatten(3, (w, p)).unflatten(2, (h, p)).permute(0, 2, 4, 3, 5, 1)             # (b, h, w, p, p, k)
        x = self.patches(x.flatten(3).flatten(1, 2))                                          # (b, n, d)
        if self.n.absolute:
            a = torch.cat([waves(row, self.n.width // 4), waves(column, self.n.width // 4)], 1)
            x = x + torch.cat([a.cos(), a.sin()], 1)
        for block in self.blocks:
            x = run(block, x, c, turn, None, text, mask)

        with full_precision(x):
            shift, scale = self.out_modulation(c)[:, None].chunk(2, -1)
            x = self.out(ada_norm(x, shift, scale))                                           # (b, n, k p p)
        return x.unflatten(2, (-1, p, p)).unflatten(1, (h, w)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)   # (b, k, hp, wp)


def build(n):
    n = Network(**{f.name: getattr(n, f.name) for f in fields(Network)})
    if n.width % sum(n.head_axes) or len(n.head_axes) != 3 or any(a % 2 for a in n.head_axes):
        data.stop(f"--width {n.width} must be a multiple of the sum of --head-axes {n.head_axes}, three even numbers")
    return DiT(n)


# ---------------------------------------------------------------- objective and sampler

# not in the paper: rectified flow (x_t on a straight line from picture to noise, its velocity as target), as K5 is trained
def flow_loss(net, x, noise, t, tokens, mask, pooled):
    """Squared error of the velocity, a mean for each picture: (b,)."""
    s = t[:, None, None, None]
    v = net((1 - s) * x + s * noise, t, tokens, mask, pooled)
    return (v.float() - (noise - x)).square().mean(dim=(1, 2, 3))


def shifted(t, shift):
    """Times in [0, 1], moved towards noise."""
    return shift * t / (1 + (shift - 1) * t)


@torch.no_grad()
def sample(net, x, prompt, empty, steps, guidance, shift):
    """Follow the velocity from noise x (b, k, h, w), t = 1, to latents, t = 0, by Euler's method.

    prompt, empty: (tokens, mask, pooled) of the prompts and of the empty prompt. Guidance w goes along v_empty + w (v_prompt - v_empty).
    """
    t = shifted(torch.linspace(1, 0, steps + 1, device=x.device), shift)
    for now, after in itertools.pairwise(t):
        v = net(x, now.expand(len(x)), *prompt).float()
        if guidance != 1:
            v_empty = net(x, now.expand(len(x)), *empty).float()
            v = v_empty + guidance * (v - v_empty)
        x = x + (after - now) * v
    return x


@torch.no_grad()
def draw(net, vae, encoded, prompts, s, size, steps, batch, autocast):
    """A uint8 picture (3, size, size) for each prompt, as a list; its noise is a function of (seed, its number) alone.
    Each process draws its share, prompts[rank::world], and gets all; `encoded` has that share and the empty prompt."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = list(enumerate(prompts))[rank::world]
    pictures, device, side = [], vae.latent_mean.device, size // vae.factor
    mean, std = vae.latent_mean[:, None, None], vae.latent_std[:, None, None]
    for i in tqdm(range(0, len(mine), batch), unit="batch", desc="sampling", disable=len(mine) <= batch or rank > 0, **data.BAR):
        numbers, some = zip(*mine[i:i + batch])
        noise = torch.stack([torch.randn(len(mean), side, side, generator=data.generator(s.seed, "sample", n)) for n in numbers])
        prompt, empty = (tuple(v.to(device) for v in pad([encoded[p] for p in texts])) for texts in (some, [""] * len(some)))
        with autocast:
            z = sample(net, noise.to(device), prompt, empty, steps, s.guidance, s.shift)
        pictures += list(losses.to_uint8(torch.cat([vae.decode(part) for part in (z * std + mean).split(8)])).cpu())
    shares = [pictures] * world
    if world > 1:
        dist.all_gather_object(shares, pictures)
    return [shares[i % world][i // world] for i in range(len(prompts))]


# ---------------------------------------------------------------- text (A.3.1)
# An encoder turns a list of prompts into a list of (tokens (l, ·) int16, pooled (·,)), l being a prompt's own length.

WORD = 16   # bytes of a word that are looked at
# not in the paper: of K5, its spelling too; tokens of all before the caption (41 of them) are cut off again
TEMPLATE = ("<|im_start|>system\nYou are a promt engineer. Describe the image by detailing the color, shape, size, texture, quantity, text, spatial "
            "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n")


def bytes_encoder(n, device):
    def encode(prompts):
        pairs = []
        for prompt in prompts:
            words = [w.encode("utf-8", "replace")[:WORD] for w in re.findall(r"\w+|[^\w\s]", prompt)[:n.text_length - 1]] + [b"\0"]   # a last one, so that none is empty
            pairs.append((torch.tensor([[b + 1 for b in w] + [0] * (WORD - len(w)) for w in words], dtype=torch.int16), torch.zeros(0)))
        return pairs
    return encode


def qwen_clip_encoder(n, device):
    """Qwen's last hidden states, as the bits of bfloat16, and CLIP's state at the end of the text. Both frozen."""
    try:
        from transformers import AutoModel, AutoTokenizer, CLIPTextModel
    except ImportError:
        data.stop("--text-encoder qwen-clip needs the transformers package: pip install transformers; or take --text-encoder bytes")
    try:
        words, qwen = AutoTokenizer.from_pretrained(n.qwen, padding_side="right"), AutoModel.from_pretrained(n.qwen, dtype=torch.bfloat16).to(device).eval()
        pieces, clip = AutoTokenizer.from_pretrained(n.clip), CLIPTextModel.from_pretrained(n.clip).to(device).eval()
    except Exception as error:
        data.stop(f"--qwen {n.qwen} or --clip {n.clip} cannot be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}")
    for name, net, width, flag in ((n.qwen, qwen, n.text_width, "text"), (n.clip, clip, n.pooled_width, "pooled")):
        config = getattr(net.config, "text_config", net.config)
        if config.hidden_size != width:
            data.stop(f"{name} has width {config.hidden_size}: give --{flag}-width {config.hidden_size}")
    start = len(words(TEMPLATE).input_ids)

    @torch.no_grad()
    def encode(prompts):
        if len(prompts) > 16:
            return encode(prompts[:16]) + encode(prompts[16:])
        # With causal attention and padding on the right, no token sees what is padded.
        q = words([TEMPLATE + p + "<|im_end|>" for p in prompts], padding=True, truncation=True, max_length=start + n.text_length, return_tensors="pt").to(device)
        states = qwen(input_ids=q.input_ids, attention_mask=q.attention_mask).last_hidden_state[:, start:].bfloat16().view(torch.int16).cpu()
        c = pieces(prompts, padding="max_length", truncation=True, max_length=n.pooled_length, return_tensors="pt").to(device)
        pooled = clip(**c).pooler_output.float().cpu()
        return [(tokens[:length], p) for tokens, length, p in zip(states, (q.attention_mask.sum(1) - start).tolist(), pooled)]
    return encode


ENCODERS = {"bytes": bytes_encoder, "qwen-clip": qwen_clip_encoder}


def encode_once(n, prompts, device):
    """{prompt: its pair}, the empty prompt too; a large encoder does not stay in memory."""
    return dict(zip(texts := ["", *prompts], ENCODERS[n.text_encoder](n, device)(texts)))


def pad(pairs, length=0):
    """Encoded prompts as a batch: tokens (b, l, ·), mask (b, l), pooled (b, ·), l that of the longest or `length`."""
    tokens = nn.utils.rnn.pad_sequence([t for t, _ in pairs], batch_first=True)
    tokens = F.pad(tokens, (0, 0, 0, max(0, length - tokens.shape[1])))
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(t) for t, _ in pairs])[:, None]
    return tokens, mask, torch.stack([p for _, p in pairs])


# ---------------------------------------------------------------- latents, once

CHUNK = 1024   # pictures after which an interrupted cache goes on
HELD_OUT = tuple(zip(data.COLORS, data.SHAPES))   # of the synthetic scenes: red circle, yellow square, green triangle, cyan star are never trained on


def captions(s, split):
    """(file name, caption) of the pictures that have one, in order of their names; of scenes without what is held out."""
    folder = Path(s.run, "data", split)
    data.picture_names(folder, s.size)
    lines = sorted((line["file_name"], line["text"]) for line in data.read_jsonl(folder / "metadata.jsonl") if line["text"].strip())
    if is_scenes(s) and split == "train":
        lines = [line for line in lines if not line[1].startswith(tuple(f"a {color} {shape} " for color, shape in HELD_OUT))]
    return lines or data.stop(f"no picture in {folder} has a caption: 01_data.py takes them from .txt or .json files beside the pictures")


def is_scenes(s):
    return json.loads(Path(s.run, "data", "settings.json").read_text())["images"] == "synthetic"


class Squares(Dataset):
    def __init__(self, s, names):
        self.folder, self.size, self.names = Path(s.run, "data", "train"), s.size, names

    def __getitem__(self, i):
        # not in the paper: shorter side to the size, by the resizing of Sec. 5.1, then the centre
        return i, data.centre_crop(data.resize_shorter(data.read_picture(self.folder, self.names[i]), self.size), self.size)   # (3, size, size)


@torch.no_grad()
def cache(s, vae, vae_parent, device):
    """Encode pictures and prompts into RUN/latents, or go on where that stopped; returns the folder. What another VAE made is refused.

    latents.npy (pictures, 1 or 2 with the mirrored, k, h, w) float16, normalised; tokens.npy, lengths.npy, pooled.npy: prompts, the empty one first.
    """
    folder = Path(s.run, "latents")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    made = {"data": model.parent(Path(s.run, "data", "train", "metadata.jsonl"))["sha256"], "vae": vae_parent["sha256"], "done": 0}
    made |= {k: getattr(s, k) for k in ("size", "flip", "seed", "text_encoder", "text_width", "text_length", "pooled_width", "pooled_length", "qwen", "clip")}
    if (index := folder / "index.json").exists():
        kept = json.loads(index.read_text())
        for key, what in (("vae", f"another VAE than {vae_parent['path']}"), ("data", "other data than there are now")):
            if kept[key] != made[key]:
                data.stop(f"{folder} was made from {what}: take another --run, or remove that folder")
        data.check_settings(kept, made, {"done"}, folder)
        if kept["done"] == kept["pictures"]:
            return folder
        made = kept
    lines, side = captions(s, "train"), s.size // vae.factor
    made["pictures"], encode = len(lines), ENCODERS[s.text_encoder](s, device)
    empty, = encode([""])
    shapes = {"latents": ("f2", (len(lines), 1 + s.flip, len(vae.latent_mean), side, side)), "tokens": ("i2", (1 + len(lines), s.text_length, empty[0].shape[1])),
              "lengths": ("i4", (1 + len(lines),)), "pooled": ("f4", (1 + len(lines), len(empty[1])))}
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0 and not made["done"]:                          # tokens.npy is sparse: what no token is written to takes no room
        for name, (kind, shape) in shapes.items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, shape).flush()
    if world > 1:
        dist.barrier()
    files = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in shapes}
    def write(i, tokens, pooled):
        files["tokens"][i, :len(tokens)], files["lengths"][i], files["pooled"][i] = tokens, len(tokens), pooled
    write(0, *empty)
    mean, std = vae.latent_mean[:, None, None], vae.latent_std[:, None, None]
    squares, workers = Squares(s, [name for name, _ in lines]), model.loader_workers(s.workers, device)
    bar = tqdm(total=len(lines), initial=made["done"], unit="picture", desc="latents", disable=rank > 0, **data.BAR)
    for start in range(made["done"], len(lines), CHUNK):
        end = min(start + CHUNK, len(lines))
        for numbers, x in DataLoader(torch.utils.data.Subset(squares, range(start + rank, end, world)), batch_size=16, num_workers=workers):
            x = losses.from_uint8(x.to(device))                                                                   # (b, 3, size, size)
            for flipped in range(1 + s.flip):
                q = vae.encode(x.flip(-1) if flipped else x)
                # not in the paper: one sample of the posterior a picture, not a new one each time it is seen
                noise = torch.stack([torch.randn(q.mean.shape[1:], generator=data.generator(s.seed, "latent", int(i), flipped)) for i in numbers])
                files["latents"][numbers, flipped] = ((q.sample(noise.to(device)) - mean) / std).half().cpu()     # (b, k, h, w)
            for i, pair in zip(numbers.tolist(), encode([lines[i][1] for i in numbers])):
                write(1 + i, *pair)
            bar.update(len(x) * world)
        if world > 1:
            dist.barrier()
        if rank == 0:
            for file in files.values():
                file.flush()
            data.write_aside(index, lambda f: f.write(json.dumps(made | {"done": end}, indent=1).encode()))
    bar.close()
    return folder


class Pairs(Dataset):
    """Latents and prompts in RUN/latents, with all that is random about a training step: item n is a function of (seed, n) alone."""
    def __init__(self, folder, s):
        self.folder, self.drop, self.t_shift, self.seed, self.files = folder, s.drop, s.t_shift, s.seed, None

    def __getitem__(self, n):
        if self.files is None:                                  # opened in the process that reads
            self.files = [np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("latents", "tokens", "lengths", "pooled")]
        latents, tokens, lengths, pooled = self.files
        generator = data.generator(self.seed, n)
        i, flipped = (int(torch.randint(size, (), generator=generator)) for size in latents.shape[:2])
        x = torch.from_numpy(latents[i, flipped].astype(np.float32))                                              # (k, h, w)
        noise = torch.randn(x.shape, generator=generator)
        t = shifted(torch.sigmoid(torch.randn((), generator=generator)), self.t_shift)
        i = 0 if torch.rand((), generator=generator) < self.drop else 1 + i
        return x, noise, t, (torch.from_numpy(tokens[i, :lengths[i]].copy()), torch.from_numpy(pooled[i].copy()))


# ---------------------------------------------------------------- does the picture follow the prompt? (Fig. 6)

CHANCE = {"color": 1 / 6, "shape": 1 / 4, "pattern": 1 / 4, "ground": 1 / 6, "all four": 1 / 480}   # of a scene drawn for another prompt


def scene_prompts():
    """Every prompt of a held-out colour and shape: 80."""
    return [f"a {color} {shape} on a {pattern} {ground} background" for (color, shape), pattern, ground
            in itertools.product(HELD_OUT, data.PATTERNS, data.COLORS) if ground != color]


def read_scene(picture):
    """(color, shape, pattern, ground) that the pixels of a square scene (3, side, side) show, by a rule without a network."""
    x, side = picture.float() / 255, picture.shape[-1]
    chroma = lambda r, g, b: torch.complex(r - (g + b) / 2, 3 ** 0.5 / 2 * (g - b))             # its angle is the hue
    palette = torch.tensor(list(data.COLORS.values())) / 255
    hues, c = chroma(*palette.T), chroma(*x)
    label = (c[..., None] * (hues / hues.abs()).conj()).real.argmax(-1)                         # (side, side): nearest of the six hues
    label[c.abs() < 0.15 * x.amax(0).clamp(min=0.2)] = -1                                       # grey: the word
    most = lambda v: int(v[v >= 0].mode().values) if (v >= 0).any() else 0
    frame = torch.ones(side, side, dtype=torch.bool)
    frame[side // 12:-(side // 12), side // 12:-(side // 12)] = False
    ground = most(label[frame])
    figure = 1 - F.max_pool2d(((label == ground) | (label < 0)).float()[None], 3, 1, 1)[0]      # less a pixel: edges mix hues
    color = most(label.where(figure.bool() & (label != ground), -1))

    # Shape: how strongly what has its colour repeats 3, 4 or 5 times around its centre, in units of a perfect one.
    y, z = torch.nonzero((label == color) & (label != ground)).T.double()
    z = torch.complex(z - z.mean(), y - y.mean()) if len(z) else torch.ones(1, dtype=torch.complex128)
    folds = {"triangle": (3, 0.66), "square": (4, 0.43), "star": (5, 0.79)}
    strength = {name: (z ** n).mean().abs() / (z.abs() ** n).mean() / full for name, (n, full) in folds.items()}
    shape = max(strength, key=strength.get)
    shape = shape if strength[shape] > 0.25 else "circle"

    # Pattern: marks are darker than all of the ground's gradient. How much of the ground they cover, and whether columns tell it all.
    on = label == ground
    dark = (x.mean(0) / palette[ground].mean() < 0.75) & on
    share = dark.sum() / on.sum().clamp(min=1)
    columns, mean = on.sum(0).clamp(min=1), share * (1 - share)
    striped = (columns * (dark.sum(0) / columns - share).square()).sum() / columns.sum() / mean.clamp(min=1e-6)
    pattern = "plain" if share < 0.07 else "striped" if striped > 0.5 else "dotted" if share < 0.33 else "checkered"
    return [*data.COLORS][color], shape, pattern, [*data.COLORS][ground]


def clip_scorer(name, device):
    """A function of pictures and prompts: 100 times the cosine of their CLIP features, not below 0, a mean over pictures; by torchmetrics."""
    try:
        from torchmetrics.multimodal.clip_score import CLIPScore
        from transformers import CLIPModel, CLIPProcessor
        clip, processor = CLIPModel.from_pretrained(name), CLIPProcessor.from_pretrained(name)
    except Exception as error:
        data.stop(f"--clip-score {name} needs pip install torchmetrics transformers, and that model ({type(error).__name__}); --clip-score '' goes without")
    for get in ("get_image_features", "get_text_features"):     # transformers 5 gives more than the tensor that torchmetrics 1.9 expects
        setattr(clip, get, lambda *inputs, f=getattr(clip, get): (lambda out: out if torch.is_tensor(out) else out.pooler_output)(f(*inputs)))
    cut = dict(truncation=True, max_length=clip.config.text_config.max_position_embeddings)                # torchmetrics would lose the end token
    metric = CLIPScore(lambda: (clip, lambda **inputs: processor(**inputs, **(cut if "text" in inputs else {})))).to(device).eval()
    return lambda pictures, prompts: sum(metric(p.to(device), prompt).item() for p, prompt in zip(pictures, prompts)) / len(prompts)


def follow(pictures, prompts, scenes, scorer):
    """Fig. 6 for these pictures: on scenes the shares of prompts whose shape's color, shape, pattern and ground were followed; the CLIP score."""
    result = {}
    if scenes:
        right = torch.tensor([[a == b for a, b in zip(read_scene(p), itertools.compress(prompt.split(), (0, 1, 1, 0, 0, 1, 1)))] for p, prompt in zip(pictures, prompts)])
        result |= dict(zip(CHANCE, right.float().mean(0).tolist() + [right.all(1).float().mean().item()]))
    return result | ({"clip_score": scorer(pictures, prompts)} if scorer else {})


def draw_curve(path, lines):
    """Fig. 6: what the log's lines have of `follow` over steps, chance as a thin line."""
    names = [name for name in (*CHANCE, "clip_score") if name in lines[0]]
    w, h, font = 300, 200, ImageFont.load_default(12)
    im = Image.new("RGB", (len(names) * w, h), "white")
    d = ImageDraw.Draw(im)
    for i, name in enumerate(names):
        top = 1 if name in CHANCE else 40
        point = lambda step, v: (i * w + 40 + (w - 60) * step / lines[-1]["step"], h - 25 - (h - 60) * v / top)
        d.text((i * w + 40, 8), f"{name.replace('_', ' ')} {lines[-1][name]:.3g}", "black", font)
        d.line([point(0, top), point(0, 0), point(lines[-1]["step"], 0)], "black")
        d.line([point(0, CHANCE.get(name, 0)), point(lines[-1]["step"], CHANCE.get(name, 0))], (200, 120, 120))
        d.line([point(line["step"], line[name]) for line in lines], (30, 60, 160), 3)
        for text, where in ((f"{top}", point(0, top)), ("0", point(0, 0)), (f"{lines[-1]['step']} steps", point(lines[-1]["step"] * 0.7, -0.02 * top))):
            d.text((where[0] - (22 if len(text) < 3 else 0), where[1] - (7 if len(text) < 3 else 0)), text, "black", font)
    data.write_aside(path, lambda f: im.save(f, "PNG"))


# ---------------------------------------------------------------- training

def train(s, out, vae, vae_parent, folder, device, resume):
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = s.batch // world                                # prompts of each step that this process sees
    micro = share // s.accumulate                           # and of these, what is in memory at once
    torch.manual_seed(s.seed)                               # the same network whether latents were made just now or long ago
    net = build(s).to(device)
    net.checkpointing = s.checkpointing
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=s.lr, betas=(s.beta1, s.beta2), eps=s.eps, weight_decay=s.weight_decay,
                                  fused=device.type in ("cuda", "cpu"))                        # Table 4
    step, window = 0, torch.zeros(2, 4, device=device)      # losses and their number since the last line of the log, by quarter of t
    if resume:
        step = resume["step"]
        window += resume["window"].to(device) * (rank == 0)
        for module, key in ((net, "model"), (ema, "ema"), (optimizer, "optimizer")):
            module.load_state_dict(resume[key])
    save = lambda: rank == 0 and model.save_checkpoint(
        out, stage="07_train_dit", step=step, settings=asdict(s), architecture={f.name: getattr(s, f.name) for f in fields(Network)}, parent=vae_parent,
        model=net.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), window=window.cpu())
    forward = torch.compile(net) if s.compile else net
    if world > 1:
        forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)               # one copy of the gradients, not two

    scenes = is_scenes(s)
    prompts = scene_prompts() if scenes else [text for _, text in captions(s, "val")]
    prompts = prompts[::-(-len(prompts) // s.val_prompts)]
    scorer = clip_scorer(s.clip_score, device) if s.clip_score and rank == 0 else None
    encoded = encode_once(s, prompts[rank::world], device)
    positions = ([i * s.batch + rank * share + a * micro + j for j in range(micro)] for i in range(step, s.steps) for a in range(s.accumulate))
    def collate(items):
        x, noise, t, text = zip(*items)
        return (torch.stack(x), torch.stack(noise), torch.stack(t), *pad(text, s.text_length if s.compile else 0))   # compiled: one length
    loader = iter(DataLoader(Pairs(folder, s), batch_sampler=positions, collate_fn=collate, num_workers=model.loader_workers(s.workers, device),
                             pin_memory=device.type == "cuda", worker_init_fn=training.ignore_signals))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=s.precision == "bf16")
    stopping = training.catch_signals()
    bar = tqdm(total=s.steps, initial=step, unit="step", desc="07_train_dit", disable=rank > 0, **data.BAR)
    clock, since = time.time(), step

    for step in range(step + 1, s.steps + 1):
        for part in range(s.accumulate):
            forward.require_backward_grad_sync = part == s.accumulate - 1
            x, noise, t, *text = (v.to(device, non_blocking=True) for v in next(loader))       # x, noise (micro, k, h, w), t (micro,)
            with autocast:
                loss = flow_loss(forward, x, noise, t, *text)                                  # (micro,)
            (loss.mean() / s.accumulate).backward()
            quarter = (4 * t).long().clamp(max=3)
            window.index_add_(1, quarter, torch.stack([loss.detach(), torch.ones_like(loss)]))
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), s.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = s.lr * min(1.0, step / max(1, s.warmup))                             # Table 4: constant + warmup
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():                               # not in the paper: the usual warm-up of the average, as in 04
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - min(s.ema_decay, (1 + step) / (10 + step)))
        bar.update()

        last, stop_now = step == s.steps, stopping(device)
        looking = step % s.val_every == 0 or last
        saving, logging = step % s.save_every == 0 or last or stop_now, step % s.log_every == 0 or looking
        if saving or logging:
            if world > 1:
                dist.all_reduce(window)
                window *= rank == 0                         # the others begin again
            if not (math.isfinite(norm.item()) and window.isfinite().all()):
                bar.close()
                data.stop(f"step {step}: loss or gradient is not finite; {out} still holds the last good step: lower --lr, or use --precision fp32")
        rate = (step - since) * s.batch / (time.time() - clock)
        pictures = draw(ema, vae, encoded, prompts, s, s.size, s.val_steps, min(micro, 64), autocast) if looking else None
        if logging and rank == 0:
            sums, counts = window.tolist()
            entry = dict(stage="07_train_dit", step=step, loss=sum(sums) / sum(counts), grad=norm.item())
            entry |= {f"loss_t{i}": a / b if b else None for i, (a, b) in enumerate(zip(sums, counts))} | dict(pictures_per_second=rate)
            if looking:
                entry |= follow(pictures, prompts, scenes, scorer)
                sheet = slice(0, None, -(-len(prompts) // 12))
                data.save_sheet(Path(s.run, "dit.png"), pictures[sheet], 4, captions=prompts[sheet])
            bar.write(status(entry, s.steps))
            data.log(s.run, **entry)
            if looking and (scenes or scorer):
                draw_curve(Path(s.run, "curve.png"), [e for e in data.read_jsonl(Path(s.run, "log.jsonl")) if "color" in e or "clip_score" in e])
        if logging:
            window.zero_()
            clock, since = time.time(), step
        if saving:
            save()
        if stop_now:
            bar.close()
            print(f"07_train_dit: saved {out} at step {step}; the same command goes on from there", file=sys.stderr)
            raise SystemExit(128 + stop_now)
    bar.close()


def status(e, steps):
    quarters = " ".join("-" if e[f"loss_t{i}"] is None else f"{e[f'loss_t{i}']:.3f}" for i in range(4))
    shares = "".join(f"  {k.replace('_', ' ')} {e[k]:.2f}" for k in (*CHANCE, "clip_score") if k in e)
    return f"{e['step']:7d}/{steps}  loss {e['loss']:.4f}  by quarter of t {quarters}  grad {e['grad']:.2f}  {e['pictures_per_second']:.0f} pic/s{shares}"


# ---------------------------------------------------------------- main

def table(s):
    """Parameters of each component, {name: number}, without memory for them."""
    with torch.device("meta"):
        net = build(s)
    rows = {"bytes": net.bytes, "time embedding": net.time, "text projection": net.text, "pooled projection": net.pooled, "patches": net.patches,
            f"token refiner, {s.refiner_blocks} blocks": net.refiner, f"cross-attention, {s.blocks} blocks": net.blocks, "out": nn.ModuleList([net.out_modulation, net.out])}
    return {name: model.count(part) for name, part in rows.items() if part is not None} | {"total": model.count(net)}


def main_sample(s):
    """Pictures of prompts, from dit.pt and the VAE it names."""
    if s.dry_run:
        return data.print_settings(s)
    if not s.sample or s.steps < 1 or s.shift <= 0:
        data.stop(f"--sample wants a prompt or more, --steps ({s.steps}) at least 1 and --shift ({s.shift}) above 0")
    path, device = Path(s.dit or Path(s.run, "dit.pt")), model.pick_device(s.device)
    file = model.read_checkpoint(path, ("07_train_dit",), "run 07_train_dit.py without --sample first")
    named = Path(file["parent"]["path"])
    vae_path = next((p for p in ([Path(s.vae)] if s.vae else [named, path.parent / named.name]) if p.is_file()), None)
    if vae_path is None:
        data.stop(f"{s.vae or named}, the VAE that {path} was trained on, is gone: give --vae FILE")
    if model.parent(vae_path)["sha256"] != file["parent"]["sha256"]:
        data.stop(f"{vae_path} is not the VAE that {path} was trained on: its contents have another hash")
    vae = model.load_vae(vae_path, device, file["settings"]["peer"] or None)
    n = Network(**{k: tuple(v) if isinstance(v, list) else v for k, v in file["architecture"].items()})
    net = build(n).to(device).eval()
    net.load_state_dict(file["ema"])
    encoded = encode_once(n, s.sample, device)
    for prompt in s.sample:
        if len(encoded[prompt][0]) == n.text_length:
            print(f"cut to {n.text_length} tokens: {' '.join(prompt.split())[:60]} ...")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=file["settings"]["precision"] == "bf16")
    pictures = draw(net, vae, encoded, s.sample, s, file["settings"]["size"], s.steps, 16, autocast)
    out = Path(s.run, "sample.png")
    data.save_sheet(out, pictures, min(4, len(pictures)), captions=s.sample)
    print(f"wrote {out}: {len(pictures)} pictures of {path} at step {file['step']}")
    return pictures


def main(s):
    if isinstance(s, Sampling):
        return main_sample(s)
    if s.dry_run:
        return data.print_settings(s, parameters=table(s))
    out, finetuned = Path(s.run, "dit.pt"), Path(s.run, "vae_finetuned.pt")
    vae_path = Path(s.vae) if s.vae else finetuned if finetuned.is_file() else Path(s.run, "vae.pt")
    vae = model.load_vae(vae_path, peer=s.peer or None)
    if vae.latent_mean is None:
        data.stop(f"{vae_path} has no mean and deviation of its latents: run the stage that made it to its end, or say whose it is with --peer")
    if len(vae.latent_mean) != s.latent_channels:
        data.stop(f"{vae_path} has {len(vae.latent_mean)} latent channels: give --latent-channels {len(vae.latent_mean)}")
    if not vae.takes(s.size) or s.size // vae.factor % s.patch:
        data.stop(f"--size {s.size} must be a multiple of {vae.factor * s.patch}, from {4 * vae.factor} up")
    table(s)                                                # what cannot be built or has no captions is told before latents are made
    captions(s, "train")
    vae_parent = model.parent(vae_path)
    device, resume = training.prepare(s, "07_train_dit", out, vae_parent, FREE)
    vae, vae.latent_mean, vae.latent_std = vae.to(device), vae.latent_mean.to(device), vae.latent_std.to(device)
    folder = cache(s, vae, vae_parent, device)
    if resume and resume["step"] == s.steps:
        print(f"{out} is finished at step {s.steps}; more --steps go on from there")
    else:
        train(s, out, vae, vae_parent, folder, device, resume)
    if dist.is_initialized():
        dist.destroy_process_group()
    return out


if __name__ == "__main__":
    sampling = "--sample" in sys.argv
    data.command_line(main, Sampling if sampling else Settings, dict.fromkeys(PRESETS, {}) if sampling else PRESETS, __doc__)
