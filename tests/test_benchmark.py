"""The benchmark's arithmetic and its output; never a speed."""

import json
import subprocess
import sys

import benchmark
import pytest
import tyro

STAGES = {
    "physics": (0.002, 0.002), "render": (0.003, 0.004), "clip": (0.004, 0.004),
    "update": (0.010, 0.010),
}  # fmt: skip
LOOP = {
    "seconds_per_step": 0.0125, "cpu_seconds_per_step": 0.022, "memory_mb": 900.0,
    "gpu_memory_mb": None, "gpu_busy": None,
}  # fmt: skip


def test_summary_on_a_cpu():
    result = benchmark.summarise(STAGES, LOOP, cores=2, on_gpu=False)
    assert result["cpu_seconds_per_step_stages"] == pytest.approx(0.020)
    assert result["cpu_ratio"] == pytest.approx(1.1)
    assert result["ceiling_steps_per_second"] == pytest.approx(2 / 0.020)
    assert result["steps_per_second"] == pytest.approx(80)
    assert result["ratio_to_ceiling"] == pytest.approx(0.8)
    assert result["stage_seconds_per_step"]["render"] == 0.003


@pytest.mark.parametrize(
    "cores, clip, ceiling",
    [(2, 0.004, 100), (1, 0.004, 100), (2, 0.02, 50)],  # updates, updates, CLIP
)
def test_ceiling_on_a_gpu_is_its_slowest_stage(cores, clip, ceiling):
    stages = STAGES | {"clip": (clip, clip)}
    result = benchmark.summarise(stages, LOOP, cores, on_gpu=True)
    assert result["ceiling_steps_per_second"] == pytest.approx(ceiling)


def test_ceiling_on_a_gpu_may_be_the_world():
    stages = STAGES | {"update": (0.001, 0.001), "clip": (0.0001, 0.0001)}
    result = benchmark.summarise(stages, LOOP, cores=2, on_gpu=True)
    assert result["ceiling_steps_per_second"] == pytest.approx(2 / 0.005)


def test_unmeasured_is_said():
    result = benchmark.summarise(STAGES, LOOP | {"cpu_seconds_per_step": None}, 2, False)
    assert result["cpu_ratio"] is None
    clip = {"device": "CPU", "precision": "fp32", "clip_tflops": 0.04, "matmul_tflops": 0.08}
    text = benchmark.table(result | clip | {"cores": 2})
    assert "ratio not measured here" in text and "| clip | 4.000 | 250 |" in text


@pytest.mark.parametrize(
    "flags", [["--clip-model", "no/such"], ["--clip-model", "nothing"], ["--batch-size", "0"]]
)
def test_bad_input_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(tyro.cli(benchmark.Args, args=flags))
    message = exit_.value.code  # python prints it, unless it is a number
    errors = capsys.readouterr().err + (f"{message}\n" if isinstance(message, str) else "")
    assert message not in (0, None) and errors.count("\n") == 1
    assert " ".join(flags) in errors


@pytest.mark.parametrize("printed", [True, False])
def test_why_a_script_stopped_is_passed_on(printed, monkeypatch):
    def main() -> None:
        print("step 3", file=sys.stderr)
        if printed:
            print("error: --flag 1: take 2", file=sys.stderr)
        sys.exit(2 if printed else "error: --flag 1: take 2")

    script = benchmark.sac_clip_humanoid
    for name, value in (("main", main), ("make_envs", None), ("parse_args", None)):
        monkeypatch.setattr(script, name, value)  # train sets the last two itself
    with pytest.raises(SystemExit, match="^error: --flag 1: take 2$"):
        benchmark.train(benchmark.Args(), still=False)


def test_a_short_benchmark_of_the_playhouse(random_clip):  # reproduce's test has the humanoid
    result = subprocess.run(
        [
            sys.executable, benchmark.__file__, "--script", "dqn", "--clip-model", random_clip,
            "--num-envs", "2", "--frame-size", "48", "--batch-size", "16", "--steps", "40",
            "--seconds", "0.1", "--device", "cpu", "--json",
        ],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    numbers = json.loads(result.stdout.splitlines()[-1])
    assert set(numbers["stage_seconds_per_step"]) == {"physics", "render", "clip", "update"}
    assert all(seconds > 0 for seconds in numbers["stage_seconds_per_step"].values())
    assert numbers["steps_per_second"] > 0 and numbers["clip_tflops"] > 0
    assert numbers["cpu_seconds_per_step_stages"] > 0
    if sys.platform == "linux":
        assert numbers["cpu_seconds_per_step"] > 0 and numbers["peak_memory_mb"] > 100
