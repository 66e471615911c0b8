"""Several processes under torchrun: equal networks, what happens when one dies, and resuming."""

import importlib
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
# when the progress bar is done, before the report loads the best. The script's own last lines
# start it, with what they do about a signal.
DRIVER = """
__file__ = {path!r}
with open(__file__) as file:
    before, guard, after = file.read().partition('if __name__ == "__main__":')
exec(compile(before, __file__, "exec"))
rank, made = os.environ["RANK"], []
with open(f"pid{{rank}}", "w") as file:
    file.write(str(os.getpid()))
for network in {networks}:
    class Noted(globals()[network]):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)
    globals()[network] = Noted
class Bar(tqdm):
    def close(self):
        if not os.path.exists(f"rank{{rank}}.pt"):
            torch.save([network.state_dict() for network in made], f"rank{{rank}}.pt")
        super().close()
tqdm = Bar
exec(compile(guard + after, __file__, "exec"))
"""
SCRIPTS = {
    "sac_clip_humanoid": (
        ["Actor", "TwinQ", "Normaliser"],
        ["--task", "all", "--num-envs", "2", "--learning-starts", "200",
         "--eval-every", "800", "--checkpoint-every", "800", "--eval-episodes", "1",
         "--final-episodes", "1", "--hidden", "32", "--batch-size", "32", "--device", "cpu",
         "--frame-size", "48", "--updates-per-step", "0.1"],
    ),
    "dqn_clip_playhouse": (
        ["QNetwork"],
        ["--num-envs", "2", "--learning-starts", "200",
         "--eval-every", "800", "--checkpoint-every", "800", "--eval-episodes", "2",
         "--final-episodes", "2", "--batch-size", "8", "--calibration-episodes", "2",
         "--frame-size", "48", "--device", "cpu"],
    ),
}  # fmt: skip


def torchrun(folder: Path, script: str, *flags: str | Path) -> subprocess.Popen:
    driver = folder / "driver.py"
    path = str(ROOT / f"{script}.py")
    driver.write_text(DRIVER.format(path=path, networks=SCRIPTS[script][0]))
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         driver, *flags],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.fixture(scope="module", params=SCRIPTS)
def ended(request, tmp_path_factory, random_clip):
    """A run of two ranks of which one was killed, and which was then resumed to its end: the
    folder, the script, what the other rank said, and the output of the second part."""
    folder, script = tmp_path_factory.mktemp("ranks"), request.param
    flags = [*SCRIPTS[script][1], "--clip-model", random_clip]
    process = torchrun(folder, script, *flags, "--total-timesteps", "100000")
    try:
        deadline = time.time() + 300
        while not list(folder.glob("runs/*/last.pt")):
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.1)
        time.sleep(1)
        os.kill(int((folder / "pid1").read_text()), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)  # within a minute
    finally:
        process.terminate()
    assert process.returncode != 0
    run = only_run(folder)
    step = torch.load(run / "last.pt", weights_only=True)["step"]
    for path in folder.glob("rank*.pt"):  # of a bar that an error closed
        path.unlink()
    more = ["--resume", run, "--total-timesteps", str(step + 800)]
    process = torchrun(folder, script, *more)
    output, resumed_errors = process.communicate(timeout=600)
    assert process.returncode == 0, resumed_errors
    assert torch.load(run / "last.pt", weights_only=True)["step"] == step + 800
    return run, script, errors, output


def test_a_rank_that_dies_ends_the_others_in_one_line(ended):
    *_, errors, _ = ended
    assert "--resume continues" in errors, errors
    assert 'clip_humanoid.py", line' not in errors and 'clip_playhouse.py", line' not in errors


def test_each_rank_finds_its_own_replay_again(tmp_path):
    """With termination the ranks' rings grow at their own pace."""
    flags = [*SCRIPTS["sac_clip_humanoid"][1][2:], "--reward", "env", "--no-capture-video"]
    process = torchrun(tmp_path, "sac_clip_humanoid", *flags, "--total-timesteps", "800")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    run = only_run(tmp_path)
    ranks = torch.load(run / "last.pt", weights_only=True)["ranks"]
    assert ranks[0]["replay_head"] != ranks[1]["replay_head"]
    more = ["--resume", run, "--total-timesteps", "1600"]
    process = torchrun(tmp_path, "sac_clip_humanoid", *more)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


def test_ranks_end_with_equal_networks_in_one_folder(ended):
    run, _, _, output = ended
    folder = run.parents[1]
    ranks = [torch.load(folder / f"rank{i}.pt", weights_only=True) for i in range(2)]
    for network, other in zip(*ranks, strict=True):
        for name, weight in network.items():
            assert torch.equal(weight, other[name]), name
    assert output.count("run: ") == 1  # one folder, one report, one log
    state = torch.load(run / "last.pt", weights_only=True)
    assert len(state["ranks"]) == 2
    noise = [rank["generator"] for rank in state["ranks"]]
    assert not torch.equal(*noise)
    parts = [torch.load(next((run / "replay" / str(i)).glob("0-*.pt"))) for i in range(2)]
    seen = [part["seen"] if "seen" in part else part["data"][0] for part in parts]
    assert not torch.equal(seen[0][0], seen[1][0])  # episodes of their own, from the first state on
    logged = [event.step for event in scalars(run)["eval/success_rate"]]
    assert logged == list(range(800, state["step"] + 1, 800))  # each once


def test_another_number_of_ranks_is_refused(ended, monkeypatch, capsys):
    run, script, *_ = ended
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--resume", str(run)])
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(script).main()
    errors = capsys.readouterr().err
    assert exit_.value.code == 2 and errors.count("\n") == 1
    assert f"--resume {run}: has 2 rank(s); start as many with torchrun" in errors
