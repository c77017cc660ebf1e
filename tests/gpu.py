"""What needs a GPU and was not run, for whoever has one:

    python tests/gpu.py --dry-run
    python tests/gpu.py
    python tests/gpu.py --only agree

Four groups of parts: `agree` (20 steps of 04 and 07 on the CPU and on the GPU, whose losses should
be the same), `benchmark` (tests/benchmark.py on cuda: fp32, bf16, bf16 compiled), `small` (all seven
stages with --preset small, on scenes) and `study` (the five artifacts at 240 px, three seeds). It
needs no network; without VGG16's weights in TORCH_HOME the feature distance is the untrained one,
and it says so. --dry-run prints the commands and how long each part should take; --only takes the
parts with these words in their name. Ctrl-C stops; the same command again passes over the parts
that are finished and goes on in the one that is not.

Writes runs/gpu/PART.txt (what a part printed; complete or absent) and the stages' run folders, and
at the end prints the rows for tests/README.md. --tiny makes everything so small that a CPU does it
in a minute: that is how the test runs it.
"""
import argparse
import importlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
data = importlib.import_module("01_data")
benchmark = importlib.import_module("benchmark")

STAGES = ("01_data.py", "02_model.py", "03_losses.py", "04_train_vae.py",
          "05_finetune_decoder.py", "06_eval.py", "07_train_dit.py")
BASE = "--padding zeros --decoder-norm group --lambda-kl 1e-3 --lambda-adv 0.1"
ROWS = {  # as in tests/README.md: no cure, each alone, all four
    "base": BASE,
    "grid": f"{BASE} --lambda-adv 0.01",
    "blur": f"{BASE} --lambda-kl 1e-4",
    "corner": f"{BASE} --padding reflect",
    "droplet": f"{BASE} --decoder-norm spatial",
    "all": "",
}
SEEDS = (0, 1, 2)
# Minutes are arithmetic for one H100 at 100 TFLOP/s: small's step in 04 is 16 pictures of 0.6
# TFLOP, that of 05 16 of 0.5, that of 07 256 of 0.1. A benchmark's item is a guess.
MINUTES = {"01_data.py": 3, "02_model.py": 1, "03_losses.py": 2, "04_train_vae.py": 96,
           "05_finetune_decoder.py": 40, "06_eval.py": 3, "07_train_dit.py": 85}
STUDY_STEPS = 3000

# Flags that make a part tiny, behind its own.
TINY_PICTURES = "--min-side 64 --resize 64 --workers 0"
TINY_TRAINING = ("--preset demo --device cpu --batch 2 --crop 32 --disc-width 8 --steps 2 "
                 "--val-pictures 2 --latent-pictures 2")
TINY = {
    "01_data.py": f"--preset demo --count 40 --val-share 0.2 {TINY_PICTURES}",
    "02_model.py": "--preset demo --size 32",
    "03_losses.py": "--preset demo --device cpu --crop 32 --steps 1",
    "04_train_vae.py": f"{TINY_TRAINING} --width 8",
    "05_finetune_decoder.py": TINY_TRAINING,
    "06_eval.py": "--device cpu --perceptual-net untrained --size 64 --resize 64 --pictures 2 "
                  "--latents 1",
    "07_train_dit.py": "--preset demo --device cpu --size 32 --steps 2 --batch 4 --val-prompts 4 "
                       "--sample-steps 1",
}
TINY_BENCHMARK = "sum over 8 x 8 blocks: pooling, sum"


@dataclass
class Part:
    name: str
    minutes: float
    line: list
    source: Path | None = None  # the run folder whose data this part's run folder shares


# ---------------------------------------------------------------- the plan

def plan(out, tiny):
    """All parts, in the order in which they run."""
    net = "vgg" if has_vgg() and not tiny else "untrained"
    return [*agree_parts(out, tiny), *benchmark_parts(out, tiny), *small_parts(out, net, tiny),
            *study_parts(out, net, tiny)]


def has_vgg():
    return Path(torch.hub.get_dir(), "checkpoints", "vgg16-397923af.pth").is_file()


def agree_parts(out, tiny):
    """The demo's first steps in fp32, once on each; both have the same seeds, so the same noise."""
    source = out / "agree"
    parts = [stage("agree 01_data.py", "01_data.py", f"--count 400 --run {source}", 1, tiny)]
    for device in ("cpu", "cuda"):
        flags = f"--run {out / f'agree-{device}'} --device {device} --steps 20 --log-every 1"
        for script, more in (("04_train_vae.py", ""), ("07_train_dit.py", "--sample-steps 1")):
            name = f"agree {device} {script}"
            parts.append(stage(name, script, f"{flags} {more}", 1, tiny, source))
    return parts


def benchmark_parts(out, tiny):
    parts = []
    for name in [TINY_BENCHMARK] if tiny else benchmark.NAMES:
        report = out / f"benchmark-{slug(name)}.json"
        line = ["tests/benchmark.py", "--only", name, "--out", str(report), "--device"]
        if tiny:
            line += shlex.split("cpu --width 8 --size 32 --batch 1 --repeats 2")
        else:
            line += ["cuda"]
        parts.append(Part(f"benchmark {name}", 3, line))
    return parts


def small_parts(out, net, tiny):
    parts = []
    for script in STAGES:
        flags = f"--preset small --run {out / 'small'}"
        if script[:2] in ("03", "04", "05", "06"):
            flags += f" --perceptual-net {net}"
        parts.append(stage(f"small {script}", script, flags, MINUTES[script], tiny))
    return parts


def study_parts(out, net, tiny):
    folder = out / "study"
    count = "--count 2000 --val-share 0.05"
    parts = [stage("study 01_data.py", "01_data.py", f"--preset small {count} --run {folder}", 1,
                   tiny)]
    files = []
    for seed in SEEDS[:2] if tiny else SEEDS:
        for row in ("base", "all") if tiny else ROWS:
            run = folder / f"{row}-{seed}"
            files.append(str(run / "vae.pt"))
            flags = (f"--preset small --run {run} --seed {seed} --steps {STUDY_STEPS} "
                     f"--perceptual-net {net} {ROWS[row]}")
            minutes = MINUTES["04_train_vae.py"] * STUDY_STEPS / 60_000
            name = f"study {row}-{seed}"
            parts.append(stage(name, "04_train_vae.py", flags, minutes, tiny, folder))
    flags = (f"--run {folder} --size 240 --resize 480 --latents 1 --perceptual-net {net} "
             f"--vae {' '.join(files)}")
    parts.append(stage("study 06_eval.py", "06_eval.py", flags, 5, tiny))
    size = "64" if tiny else "240"
    parts.append(Part("study tables", 2, ["tests/study.py", str(folder), "--size", size]))
    return parts


def stage(name, script, flags, minutes, tiny, source=None):
    tail = TINY[script] if tiny else ""
    # Before the flags that take several values, or --vae would swallow them.
    head, vae, files = flags.partition("--vae")
    return Part(name, minutes, [script, *shlex.split(f"{head} {tail} {vae}{files}")], source)


def slug(name):
    return re.sub(r"\W+", "-", name).strip("-")


# ---------------------------------------------------------------- running it

def execute(line, printed):
    """Run a script; what it prints goes to the file `printed` too. Returns its exit code."""
    with open(printed, "w") as f:
        process = subprocess.Popen([sys.executable, *line], text=True, stdout=subprocess.PIPE)
        for text in process.stdout:
            print(text, end="", flush=True)
            f.write(text)
        return process.wait()


def run_parts(parts, out):
    for part in parts:
        done = out / f"{slug(part.name)}.txt"
        if done.exists():
            print(f"--- {part.name}: done before")
            continue
        print(f"--- {part.name}, about {part.minutes:.0f} min: python {shlex.join(part.line)}",
              flush=True)
        share_data(part)
        unfinished = done.with_suffix(".part")
        code = execute(part.line, unfinished)
        if code:
            data.stop(f"{part.name} ended with exit code {code}, see above; the same command "
                      "goes on from there")
        unfinished.rename(done)


def share_data(part):
    if part.source is None:
        return
    run = Path(part.line[part.line.index("--run") + 1])
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "data").exists():
        (run / "data").symlink_to((part.source / "data").resolve())


# ---------------------------------------------------------------- rows for tests/README.md

def report(parts, out):
    """The tables that the finished parts printed, and what the logs say of speed."""
    for part in parts:
        printed = out / f"{slug(part.name)}.txt"
        rows = [line for line in printed.read_text().splitlines() if line.startswith("|")]
        if rows:
            print(f"\n{part.name}\n")
            print("\n".join(rows))
    logs = [out / f"agree-{device}" / "log.jsonl" for device in ("cpu", "cuda")]
    if all(path.exists() for path in logs):
        print_agreement(*[list(data.read_jsonl(path)) for path in logs])
    path = out / "small" / "log.jsonl"
    if path.exists():
        print_speed(list(data.read_jsonl(path)))


def print_agreement(cpu, cuda):
    print("\n| stage | steps | loss on the GPU beside the CPU's, largest relative difference |"
          "\n|---|---|---|")
    for name, key in (("04_train_vae", "total"), ("07_train_dit", "loss")):
        ours, other = [[line[key] for line in lines if line["stage"] == name]
                       for lines in (cpu, cuda)]
        apart = max(abs(a - b) / abs(a) for a, b in zip(ours, other, strict=True))
        print(f"| {name}, CPU and GPU | {len(ours)} | {apart:.1g} |")


def print_speed(lines):
    print("\nsmall, from its log\n\n| stage | steps | pictures per second, median | last readings |"
          "\n|---|---|---|---|")
    for name in ("04_train_vae", "05_finetune_decoder", "07_train_dit"):
        own = [line for line in lines if line["stage"] == name]
        if not own:
            continue
        rate = statistics.median(line["pictures_per_second"] for line in own)
        readings = {key: round(own[-1][key], 3) for key in own[-1]
                    if key in ("val_psnr", "val_perc", "color", "shape", "pattern", "ground",
                               "all four")}
        print(f"| {name} | {own[-1]['step']} | {rate:.1f} | {json.dumps(readings)} |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--only", default="", help="parts with these words in their name")
    parser.add_argument("--out", default="runs/gpu", help="folder for all of it [runs/gpu]")
    parser.add_argument("--tiny", action="store_true", help="everything made small, on the CPU")
    a = parser.parse_args(argv)
    os.chdir(ROOT)  # where the parts run
    out = Path(a.out)
    parts = [part for part in plan(out, a.tiny) if a.only in part.name]
    if not parts:
        data.stop(f"--only {a.only}: no such part; --dry-run prints all")
    if not has_vgg():
        print("VGG16's weights are not here: the perceptual net is the untrained one, and what is "
              "called lpips is a feature distance")
    if a.dry_run:
        for part in parts:
            print(f"{part.minutes:4.0f} min  {part.name}: python {shlex.join(part.line)}")
        print(f"{sum(part.minutes for part in parts) / 60:.1f} hours, by arithmetic for one H100")
        return
    if not (a.tiny or torch.cuda.is_available()):
        data.stop("no GPU here: --dry-run prints the plan, --tiny tries it on the CPU")
    out.mkdir(parents=True, exist_ok=True)
    run_parts(parts, out)
    report(parts, out)


if __name__ == "__main__":
    main()
