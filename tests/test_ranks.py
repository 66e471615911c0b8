"""Several processes under torchrun: equal networks, and what happens when one of them dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from whole_runs import ROOT, only_run, scalars

# What each rank ends with is only seen from inside: networks are noted as they are made, and saved
# when the progress bar is done, before the report loads the best.
DRIVER = """
import os, sys
sys.path.insert(0, {root!r})
import {module} as script
import torch

rank, made = os.environ["RANK"], []
open(f"pid{{rank}}", "w").write(str(os.getpid()))
for name in {networks}:
    class Noted(getattr(script, name)):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)
    setattr(script, name, Noted)
class Bar(script.tqdm):
    def close(self):
        if not os.path.exists(f"rank{{rank}}.pt"):
            torch.save([network.state_dict() for network in made], f"rank{{rank}}.pt")
        super().close()
script.tqdm = Bar
script.main()
"""
SCRIPTS = {
    "sac_clip_humanoid": (
        ["Actor", "TwinQ", "Normaliser"],
        ["--total-timesteps", "1600", "--num-envs", "2", "--learning-starts", "200",
         "--eval-every", "800", "--checkpoint-every", "800", "--eval-episodes", "2",
         "--final-episodes", "2", "--hidden", "32", "--batch-size", "32", "--device", "cpu"],
    ),
    "dqn_clip_playhouse": (
        ["QNetwork"],
        ["--total-timesteps", "1600", "--num-envs", "2", "--learning-starts", "200",
         "--eval-every", "800", "--checkpoint-every", "800", "--eval-episodes", "2",
         "--final-episodes", "2", "--batch-size", "8", "--calibration-episodes", "2",
         "--frame-size", "48", "--device", "cpu"],
    ),
}  # fmt: skip


def torchrun(folder: Path, script: str, *flags: str | Path) -> subprocess.Popen:
    driver = folder / "driver.py"
    driver.write_text(DRIVER.format(root=str(ROOT), module=script, networks=SCRIPTS[script][0]))
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         driver, *flags],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_ranks_end_with_equal_networks(script, tmp_path, random_clip):
    process = torchrun(tmp_path, script, *SCRIPTS[script][1], "--clip-model", random_clip)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    ranks = [torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in range(2)]
    for network, other in zip(*ranks, strict=True):
        for name, weight in network.items():
            assert torch.equal(weight, other[name]), name
    run = only_run(tmp_path)  # one folder, one report, one log
    assert output.count("run: ") == 1
    state = torch.load(run / "last.pt", weights_only=True)
    assert state["step"] == 1600 and len(state["ranks"]) == 2
    noise = [rank["generator"] for rank in state["ranks"]]
    assert not torch.equal(*noise)
    parts = [torch.load(next((run / "replay" / str(i)).glob("0-*.pt"))) for i in range(2)]
    seen = [part["frame"] if isinstance(part, dict) else part[0] for part in parts]
    assert not torch.equal(seen[0][0], seen[1][0])  # episodes of their own, from the first state on
    assert [event.step for event in scalars(run)["eval/success_rate"]] == [800, 1600]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_rank_that_dies_ends_the_others_and_the_run_resumes(script, tmp_path, random_clip):
    flags = [*SCRIPTS[script][1], "--clip-model", random_clip]
    process = torchrun(tmp_path, script, *flags, "--total-timesteps", "100000")
    deadline = time.time() + 300
    while not list(tmp_path.glob("runs/*/last.pt")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    time.sleep(1)
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "--resume continues" in errors, errors
    step = torch.load(only_run(tmp_path) / "last.pt", weights_only=True)["step"]
    process = torchrun(
        tmp_path, script, "--resume", only_run(tmp_path), "--total-timesteps", str(step + 800)
    )
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert torch.load(only_run(tmp_path) / "last.pt", weights_only=True)["step"] == step + 800


def test_another_number_of_ranks_is_refused(tmp_path, random_clip):
    script = "sac_clip_humanoid"
    flags = [*SCRIPTS[script][1], "--clip-model", random_clip, "--total-timesteps", "400"]
    train = [sys.executable, ROOT / f"{script}.py"]
    subprocess.run([*train, *flags], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    process = torchrun(tmp_path, script, "--resume", only_run(tmp_path))
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "has 1 rank(s); torchrun --nproc-per-node=1" in errors
