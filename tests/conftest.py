"""Shared by all tests: the scripts as modules, a prepared data folder, and a runner for command lines. CPU, offline, tiny."""
import importlib
import multiprocessing
import os
import pickle
import runpy
import subprocess
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""                  # before torch: bits are compared, so these tests want the CPU
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"                       # transformers, where it is installed, would ask the network several times
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data():
    return importlib.import_module("01_data")


@pytest.fixture(scope="session")
def model():
    return importlib.import_module("02_model")


@pytest.fixture(scope="session")
def losses():
    return importlib.import_module("03_losses")


@pytest.fixture(scope="session")
def train():
    return importlib.import_module("04_train_vae")


@pytest.fixture(scope="session")
def prepared(data, tmp_path_factory):
    """A run folder with 24 scenes of shorter side 48 in data/."""
    run = tmp_path_factory.mktemp("prepared")
    data.main(data.Settings(run=str(run), count=24, resize=48, val_share=0.3, workers=0))
    return run


@pytest.fixture
def run(prepared, tmp_path):
    """A fresh run folder that shares the prepared pictures."""
    (tmp_path / "data").symlink_to(prepared / "data")
    return tmp_path


def command(*args, check=None, env=None, timeout=120):
    """Run a script as a user would; returns the finished process, and fails unless its exit code is `check`."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}))
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
    return done


def torchrun(*args):
    """A script on two processes (gloo)."""
    command("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", *args, check=0, timeout=150)


# Forked from a process that has PyTorch imported already: each start would take seconds.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torchvision.transforms.v2.functional", "lpips"])


def started(line, printed):
    """A script in a process of its own, in a session of its own, as `python *line` would run it.
    What it prints goes into the file `printed`."""
    process = SERVER.Process(target=run_script, args=(list(map(str, line)), str(printed)))
    process.start()
    return process


def run_script(line, printed):
    os.setsid()
    os.chdir(ROOT)
    with open(printed, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    sys.argv = line
    code = 0
    try:
        runpy.run_path(line[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    # Raised anew: the first one's traceback would keep the loader, and its workers, alive.
    raise SystemExit(code)


def finished(process, printed, code=0):
    """Wait for its end; it must exit with `code`. Returns what it printed."""
    process.join(120)
    text = Path(printed).read_text()
    assert process.exitcode == code, text[-3000:]
    return text


def killed(line, run, counts):
    """Run a command line again and again, and kill -9 it when RUN/log.jsonl has so many lines; the
    last time it may end."""
    log = Path(run, "log.jsonl")
    printed = Path(run, "printed.txt")
    for count in counts:
        process = started(line, printed)
        while process.is_alive() and (not log.exists() or len(log.read_text().splitlines()) < count):
            time.sleep(0.002)
        process.kill()
        process.join()
    finished(started(line, printed), printed)


# ---------------------------------------------------------------- beside the tests
# Some tests do little but wait for processes of their own. What they wait for begins with the
# session, in one more process, so that both cores work; the tests themselves come last.

JOBS = {}  # {test: its job, a function of a fresh run folder}


def beside(job):
    """Decorate a test that asks for `outcome`: (run, what job(run) returned)."""
    def keep(test):
        JOBS[test] = job
        return test
    return keep


def has_job(item):
    return item.function in JOBS


def pytest_collection_modifyitems(items):
    items.sort(key=has_job)


def run_jobs(jobs):
    for fd in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
    for job, run in jobs:
        try:
            outcome = job(run), None
        except BaseException as error:
            outcome = None, f"{type(error).__name__}: {error}"
        (run / "outcome.tmp").write_bytes(pickle.dumps(outcome))
        (run / "outcome.tmp").rename(run / "outcome")


@pytest.fixture(scope="session", autouse=True)
def jobs(request, tmp_path_factory):
    """{test: (its run folder, the process that all jobs run in)}."""
    tests = [item.function for item in request.session.items if has_job(item)]
    if not tests:
        yield {}
        return
    prepared = request.getfixturevalue("prepared")
    runs = {}
    for test in tests:
        runs[test] = tmp_path_factory.mktemp(test.__name__)
        (runs[test] / "data").symlink_to(prepared / "data")
    process = SERVER.Process(target=run_jobs, args=([(JOBS[test], runs[test]) for test in tests],))
    process.start()
    yield {test: (run, process) for test, run in runs.items()}
    process.kill()
    process.join()


@pytest.fixture
def outcome(request, jobs):
    run, process = jobs[request.function]
    while not (run / "outcome").exists():
        assert process.is_alive()
        time.sleep(0.05)
    result, error = pickle.loads((run / "outcome").read_bytes())
    assert error is None, error
    return run, result


def refused(call, capsys):
    """The one sentence with which `call` stops; it must exit with 2."""
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if "/s]" not in line]       # less progress bars
    return lines[-1]
