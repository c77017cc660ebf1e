"""Shared by all tests: the scripts as modules, pictures, processes. CPU, offline, tiny."""
import functools
import importlib
import json
import multiprocessing
import os
import re
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: bits are compared, so tests want the CPU
os.environ["HF_HUB_OFFLINE"] = "1"
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

data = importlib.import_module("01_data")
model = importlib.import_module("02_model")
losses = importlib.import_module("03_losses")
training = importlib.import_module("04_train_vae")
finetuning = importlib.import_module("05_finetune_decoder")
evaluation = importlib.import_module("06_eval")
dit = importlib.import_module("07_train_dit")
Perceptual = losses.Perceptual
losses.Perceptual = functools.cache(Perceptual)  # the untrained one is always the same

SMALL = dict(width=8, groups=4, res_blocks=1, attention_levels=())
TRAIN = dict(crop=32, batch=4, disc_width=8, lr=1e-3, muon_lr=0.0, lr_decay=0.0, log_every=1,
             val_every=2, val_pictures=2, workers=0, perceptual_net="untrained", device="cpu")
NETWORK = dict(width=48, ff_width=96, time_width=24, blocks=2, refiner_blocks=1,
               rope_axes=(4, 10, 10), text_width=32, pooled_width=32, text_length=12,
               text_encoder="bytes")
DIT = NETWORK | dict(size=48, batch=8, lr=1e-3, warmup=2, ema_decay=0.9, precision="fp32",
                     log_every=1, val_every=2, sample_steps=2, clip_score="", workers=0,
                     device="cpu")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A run folder with 24 scenes of shorter side 64 in data/."""
    run = tmp_path_factory.mktemp("prepared")
    data.main(data.Settings(run=str(run), count=24, min_side=64, resize=64, val_share=0.3,
                            workers=0))
    return run


@pytest.fixture
def new_run(prepared, tmp_path):
    """A function that makes run folders, which share the prepared pictures."""
    def make(name="run"):
        run = tmp_path / name
        run.mkdir()
        (run / "data").symlink_to(prepared / "data")
        return run

    return make


@pytest.fixture
def run(new_run):
    return new_run()


def vae_settings(run, **more):
    return training.Settings(**(SMALL | TRAIN | dict(run=str(run), steps=4) | more))


def decoder_settings(run, **more):
    return finetuning.Settings(**(TRAIN | dict(run=str(run), steps=4) | more))


def dit_settings(run, **more):
    return dit.Settings(**(DIT | dict(run=str(run), steps=4) | more))


def small_vae(path=None, **more):
    """A VAE with random weights, and its checkpoint as 04 writes it."""
    torch.manual_seed(1)
    a = model.Architecture(**(SMALL | more))
    vae = model.VAE(a).eval()
    if path:
        torch.save(dict(settings={}, step=1, architecture=vars(a), ema=vae.state_dict()), path)
    return vae


def peer_files():
    """{name: (weights under our names, what a project's file holds)}, random."""
    norm32 = dict(SMALL, width=32, groups=32, padding="zeros", decoder_norm="group")
    flux = small_vae(**norm32).state_dict()
    spatial = small_vae(**norm32 | dict(decoder_norm="spatial", attention_levels=(2, 3)))
    ldm = small_vae(**norm32, latent_channels=4, quant_conv=True).state_dict()
    matrices = {k: w[..., 0, 0] if w.shape[2:] == (1, 1) and "attn" in k else w
                for k, w in flux.items()}
    whole = {f"first_stage_model.{k}": w.half() for k, w in ldm.items()}
    return {"flux": (flux, flux), "matrices": (flux, matrices),
            "spatial": (spatial.state_dict(), spatial.state_dict()),
            "kl-f8": (ldm, {"state_dict": ldm | {"loss.logvar": torch.zeros(3)}, "epoch": 3}),
            "sd1": (ldm, {"state_dict": whole | {"cond_stage_model.x": torch.zeros(3)}})}


def tiny_models(folder):
    """Qwen2.5-VL and CLIP of width 32 and 24 with byte tokenizers, saved as transformers does."""
    import tokenizers
    import transformers
    torch.manual_seed(0)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])  # 256, 257, 258

    def save(name, net):
        net.save_pretrained(folder / name)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<|endoftext|>").save_pretrained(folder / name)

    text = dict(vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, pad_token_id=258,
                rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]})
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
    save("qwen", transformers.Qwen2_5_VLModel(transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision)))
    words.post_processor = tokenizers.processors.TemplateProcessing(  # CLIP's begin and end
        single="<|im_start|> $A <|endoftext|>",
        special_tokens=[("<|im_start|>", 256), ("<|endoftext|>", 258)])
    text = dict(vocab_size=259, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
                bos_token_id=256, eos_token_id=258, pad_token_id=258)
    vision = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                  patch_size=8)
    save("clip", transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text, vision_config=vision)))
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={
        "height": 32, "width": 32}).save_pretrained(folder / "clip")
    return dict(text_encoder="qwen-clip", qwen=str(folder / "qwen"), clip=str(folder / "clip"),
                text_length=40, text_width=32, pooled_width=24)


def checkpoint(path):
    return torch.load(path, weights_only=True)


def log(run, stage):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


def same(a, b, path=""):
    """Two checkpoints, or parts of them, bit for bit, but for the settings."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"settings"}:
            same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b)):
            same(*pair, f"{path}/{i}")
    elif torch.is_tensor(a):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def refused(call, capsys):
    """The sentence with which `call` stops; it must exit with 2."""
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    return [line for line in lines if line.strip() and "/s]" not in line][-1]  # less progress bars


class Calls(TorchDispatchMode):
    """Counts PyTorch's operations, which a GPU waits for."""
    count = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        self.count += 1
        return call(*args, **(kwargs or {}))


# ---------------- processes

FORK = multiprocessing.get_context("fork")  # so that nothing is imported again


def start(stage, s):
    """A stage in a process of its own."""
    def work():
        sys.stderr = open(os.devnull, "w")
        stage.main(s)

    process = FORK.Process(target=work)
    process.start()
    return process


def stop_at(stage, s, step, number):
    """Run a stage, and send it a signal when its log has `step`; its exit code."""
    process = start(stage, s)
    path = Path(s.run, "log.jsonl")
    while process.is_alive() and not (path.exists() and f'"step": {step},' in path.read_text()):
        time.sleep(0.002)
    os.kill(process.pid, number)
    process.join()  # a timeout would wait for its loader's workers too, which take 5 s to notice
    return process.exitcode


STAGES = {"vae": (training, vae_settings, {}, "vae.pt", "04_train_vae"),
          "plain": (finetuning, decoder_settings, {}, "vae_finetuned.pt", "05_finetune_decoder"),
          "denoising": (finetuning, decoder_settings, dict(denoising="demo"),
                        "vae_denoising.pt", "05_denoising_decoder"),
          "dit": (dit, dit_settings, {}, "dit.pt", "07_train_dit")}


def stage(kind, run, **more):
    """(module, settings, checkpoint, name in the log); all but 04 start from a VAE of two steps."""
    script, make, own, file, name = STAGES[kind]
    if kind != "vae":
        training.main(vae_settings(run, steps=2))
    return script, make(run, **own, **more), run / file, name


def whole_run(script, s, path):
    """What an uninterrupted run ends with; then everything it made is removed."""
    script.main(s)
    end = checkpoint(path)
    for file in (path, path.with_name("log.jsonl"), *path.parent.glob("latents-*.bin")):
        file.unlink()
    return end
