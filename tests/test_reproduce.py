"""The list of experiments: its smallest entry, and a training run that was interrupted."""

import json
import re
import shlex
import sys
import time
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
import reproduce
import sac_clip_humanoid
import dqn_clip_playhouse
import benchmark
import clip_accuracy
import home_accuracy
import train_tiny_clip
import tyro
import unseen_prompts
from test_sac_clip_humanoid import SMALL
from whole_runs import kill_after_a_checkpoint


def test_the_smallest_entry(tmp_path, monkeypatch):
    smallest = min(reproduce.EXPERIMENTS, key=lambda name: reproduce.EXPERIMENTS[name].hours)
    experiment = reproduce.EXPERIMENTS[smallest]
    assert experiment.command == "python tests/benchmark.py --json"
    short = experiment._replace(command=f"{experiment.command} --steps 320 --seconds 0.2")
    monkeypatch.setitem(reproduce.EXPERIMENTS, smallest, short)
    reproduce.main(reproduce.Args((smallest,), results=tmp_path))
    result = json.loads((tmp_path / f"{smallest}.json").read_text())
    assert result["command"] == short.command
    assert set(result["stage_seconds_per_step"]) == {"physics", "render", "clip", "update"}
    assert result["steps_per_second"] > 0 and result["cpu_seconds_per_step_stages"] > 0


def test_an_interrupted_run_is_resumed_and_a_result_is_kept(
    tmp_path, random_clip, monkeypatch, capsys
):
    flags = [*SMALL, "--clip-model", str(random_clip)]
    command = f"python sac_clip_humanoid.py {shlex.join(flags)}"
    monkeypatch.setitem(reproduce.EXPERIMENTS, "short", reproduce.Experiment("", command, 0, 1))
    folder = tmp_path / "runs" / "short" / "1"
    folder.mkdir(parents=True)
    run = kill_after_a_checkpoint("sac_clip_humanoid.py", folder, *flags, "--seed", "1")
    started = {"command": f"{command} --seed 1", "clip": reproduce.digest(random_clip)}
    (folder / "experiment.json").write_text(json.dumps(started))
    args = reproduce.Args(("short",), results=tmp_path, runs=tmp_path / "runs")
    reproduce.main(args)
    assert (run / "report.json").exists()
    (summary,) = json.loads((tmp_path / "short.json").read_text())["runs"]
    assert summary["command"] == f"{command} --seed 1"
    assert summary["clip"] == reproduce.digest(random_clip) != reproduce.digest(tmp_path)
    assert summary["curve"]["step"] == [800, 1600]
    assert len(summary["curve"]["clip_return"]) == 2 and "best" in summary["report"]

    before = (tmp_path / "short.json").read_text()
    run.rename(tmp_path / "elsewhere")
    reproduce.main(args)
    assert (tmp_path / "short.json").read_text() == before
    assert "is there" in capsys.readouterr().out


def test_a_kill_ends_the_run_that_was_started_too(tmp_path):
    line = [sys.executable, reproduce.__file__, "kneeling", "--results", tmp_path]
    started = Popen([*line, "--runs", tmp_path / "runs"], stderr=PIPE, text=True)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    while not (run := children.read_text().split()):
        assert started.poll() is None
        time.sleep(0.1)
    started.terminate()
    assert "the same command goes on" in started.communicate(timeout=60)[1]
    assert started.returncode == 1
    deadline = time.time() + 10
    while Path(f"/proc/{run[0]}").exists():  # killed, and not yet gone
        assert time.time() < deadline
        time.sleep(0.1)


def test_seeds_that_a_result_lacks_are_added_one_by_one(tmp_path, monkeypatch, capsys):
    experiment = reproduce.Experiment("two dice", "python dice.py", 0, 3)
    monkeypatch.setitem(reproduce.EXPERIMENTS, "dice", experiment)
    path = tmp_path / "dice.json"
    today = reproduce.digest(reproduce.HERE / "tiny_clip")
    runs = [
        {"command": "python dice.py --seed 2", "clip": today},
        {"command": "python dice.py --sides 4 --seed 3", "clip": today},  # of other flags
        {"command": "python dice.py --seed 2 --sides 4", "clip": today},
        {"command": "python dice.py --seed 1"},  # of before results told their CLIP
        {"command": "python dice.py --seed 3", "clip": "another"},
    ]
    path.write_text(json.dumps({"what": "two dice", "runs": runs}))
    reproduce.main(reproduce.Args(results=tmp_path))
    assert re.search(r"dice +1 of 3 ", capsys.readouterr().out)
    trained = []

    def train(command, folder, runs):
        trained.append((command, folder))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return {"command": command, "clip": today}

    monkeypatch.setattr(reproduce, "train", train)
    with pytest.raises(KeyboardInterrupt):
        reproduce.main(reproduce.Args(("dice",), results=tmp_path, runs=tmp_path))
    assert trained == [
        (f"python dice.py --seed {seed}", tmp_path / "dice" / str(seed)) for seed in (1, 3)
    ]
    runs = {run["command"]: run["clip"] for run in json.loads(path.read_text())["runs"]}
    assert runs == {  # seed 3 was interrupted
        "python dice.py --seed 1": today,
        "python dice.py --seed 2": today,
        "python dice.py --seed 3": "another",
    }


def test_numbers_of_another_bundled_clip_or_of_other_flags_are_measured_again(tmp_path):
    today = reproduce.digest(reproduce.HERE / "tiny_clip")
    lacks = {"none": True, today: False, "another": True}
    for name in ("clip_accuracy", "home_accuracy", "unseen_prompts"):
        path, command = tmp_path / f"{name}.json", reproduce.EXPERIMENTS[name].command
        for clip, again in lacks.items():
            if clip != "none":
                path.write_text(json.dumps({"command": command, "clip": clip}))
            assert bool(reproduce.missing(reproduce.EXPERIMENTS[name], path)) == again
        path.write_text(json.dumps({"command": f"{command} --states 300", "clip": today}))
        assert reproduce.missing(reproduce.EXPERIMENTS[name], path)
    named = reproduce.EXPERIMENTS["w4_on_default"]  # whose command names the CLIP
    path.write_text(json.dumps({"command": named.command, "clip": "w4"}))
    assert not reproduce.missing(named, path)


def test_a_program_s_result_has_the_command_that_was_asked_for(tmp_path, monkeypatch):
    """Not where this machine keeps what it names."""
    experiment = reproduce.EXPERIMENTS["w4_on_default"]

    def run(line, **options):
        (line[-1]).write_text(json.dumps({"command": shlex.join(map(str, line)), "clip": "w4"}))

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    (tmp_path / "clips" / "w4").mkdir(parents=True)
    path = tmp_path / "w4_on_default.json"
    reproduce.measure("w4_on_default", path, tmp_path)
    assert json.loads(path.read_text()) == {"command": experiment.command, "clip": "w4"}
    assert not reproduce.missing(experiment, path)


def test_a_run_of_other_flags_or_of_another_clip_is_not_taken_for_this_one(tmp_path, monkeypatch):
    started = []

    def run(line, cwd, check):
        started.append(line[2:])
        (cwd / "runs" / "one").mkdir(parents=True, exist_ok=True)
        (cwd / "runs" / "one" / "last.pt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    folder, command = tmp_path / "kneeling" / "1", "python sac_clip_humanoid.py --seed 1"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            reproduce.train(command, folder, tmp_path)
    assert started == [["--seed", "1"], ["--resume", str(folder / "runs" / "one")]]
    with pytest.raises(SystemExit, match="move it away"):
        reproduce.train(f"{command} --alpha 1", folder, tmp_path)
    monkeypatch.setattr(reproduce, "digest", lambda clip: "another")
    with pytest.raises(SystemExit, match="move it away"):
        reproduce.train(command, folder, tmp_path)
    assert len(started) == 2


@pytest.mark.parametrize("name", ["clip_accuracy", "home_accuracy"])
def test_the_committed_accuracy_is_that_of_the_bundled_clip(name):
    result = json.loads((reproduce.HERE / "results" / f"{name}.json").read_text())
    assert result["clip"] == reproduce.digest(reproduce.HERE / "tiny_clip")


def test_a_clip_that_an_experiment_names_is_trained_once(tmp_path, monkeypatch):
    """A killed training does not pass for a whole one."""
    started = []

    def run(line, **options):
        started.append([str(word) for word in line[1:]])
        folder = Path(started[-1][-1])
        folder.mkdir(exist_ok=True)
        if len(started) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    (tmp_path / "clips").mkdir()
    command = reproduce.EXPERIMENTS["kneeling_w4"].command
    with pytest.raises(KeyboardInterrupt):
        reproduce.command_line(command, tmp_path)
    for _ in range(2):
        line = reproduce.command_line(f"{command} --seed 2", tmp_path)
        script = reproduce.HERE.parent / "sac_clip_humanoid.py"
        clip = str(tmp_path / "clips" / "w4")
        assert line == [sys.executable, script, "--clip-model", clip, "--seed", "2"]
    assert [path.name for path in (tmp_path / "clips").iterdir()] == ["w4"]
    line = [str(reproduce.HERE / "train_tiny_clip.py"), *shlex.split(reproduce.CLIPS["w4"])]
    assert started == [[*line, "--output", str(tmp_path / "clips" / "w4.part")]] * 2


def test_a_run_that_an_experiment_is_about_is_found(tmp_path):
    command = reproduce.EXPERIMENTS["unseen_prompts"].command
    with pytest.raises(SystemExit, match="first python tests/reproduce.py all_tasks"):
        reproduce.command_line(command, tmp_path)
    run = tmp_path / "all_tasks" / "1" / "runs" / "HumanoidCLIP-v0__1"
    run.mkdir(parents=True)
    assert reproduce.command_line(command, tmp_path)[2:] == [str(run)]


def test_every_command_is_one_that_its_program_takes():
    modules = (
        sac_clip_humanoid, dqn_clip_playhouse, clip_accuracy, home_accuracy, benchmark,
        unseen_prompts,
    )  # fmt: skip
    programs = {module.__name__: module for module in modules}
    for experiment in reproduce.EXPERIMENTS.values():
        _, script, *words = shlex.split(experiment.command)
        tyro.cli(programs[Path(script).stem].Args, args=words)
    for flags in reproduce.CLIPS.values():
        tyro.cli(train_tiny_clip.Args, args=["--output", "clip", *shlex.split(flags)])


def test_the_list_names_every_experiment(capsys):
    reproduce.main(reproduce.Args())
    listed = capsys.readouterr().out
    assert all(name in listed for name in reproduce.EXPERIMENTS)
    with pytest.raises(SystemExit, match="no such experiment"):
        reproduce.main(reproduce.Args(("nothing",)))
