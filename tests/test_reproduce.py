"""The list of experiments: its smallest entry, and a training run that was interrupted."""

import json
import shlex

import pytest
import reproduce
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
    args = reproduce.Args(("short",), results=tmp_path, runs=tmp_path / "runs")
    reproduce.main(args)
    assert (run / "report.json").exists()
    (summary,) = json.loads((tmp_path / "short.json").read_text())["runs"]
    assert summary["command"] == f"{command} --seed 1"
    assert summary["curve"]["step"] == [800, 1600]
    assert len(summary["curve"]["clip_return"]) == 2 and "best" in summary["report"]

    (tmp_path / "short.json").write_text("kept")
    reproduce.main(args)
    assert (tmp_path / "short.json").read_text() == "kept"
    assert "is there" in capsys.readouterr().out


def test_the_list_names_every_experiment(capsys):
    reproduce.main(reproduce.Args())
    listed = capsys.readouterr().out
    assert all(name in listed for name in reproduce.EXPERIMENTS)
    with pytest.raises(SystemExit, match="no such experiment"):
        reproduce.main(reproduce.Args(("nothing",)))
