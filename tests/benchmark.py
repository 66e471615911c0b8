"""How fast is each stage alone, and how near to them is the training loop of them all?

    python tests/benchmark.py                       # sac_clip_humanoid.py with its defaults
    python tests/benchmark.py --script dqn --json
    python tests/benchmark.py --clip-model ViT-bigG-14 --frame-size 224 --device cuda

Four stages are timed alone, on one core (CLIP and updates: or on the GPU): physics, render, CLIP
(with the transfer of its frames), and update (with the choice of actions), for which the script's
own main loop runs in a world where nothing happens. Then the loop runs as it is, and its CPU
seconds per environment step are compared with the sum of the stages' own. An architecture of
open_clip without a tag gets random weights, which are as fast as trained ones.
"""

# ruff: noqa: E402, I001

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import dqn_clip_playhouse  # first: both tell MuJoCo how to render
import sac_clip_humanoid

import numpy as np
import open_clip
import torch
import tyro
from clip_reward import CLIPReward, auto_precision
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Args:
    script: Literal["sac", "dqn"] = "sac"
    """sac_clip_humanoid.py or dqn_clip_playhouse.py"""
    clip_model: str = str(HERE / "tiny_clip")
    """as the script takes it, or an architecture of open_clip alone: random weights"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where CLIP, networks and replay live"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """of CLIP"""
    frame_size: int | None = None
    """width and height in pixels of the frames; unset, as every setting below: the script's own"""
    num_envs: int | None = None
    """environments"""
    score_every: int | None = None
    """steps of all environments whose frames make one CLIP batch"""
    batch_size: int | None = None
    """transitions per update"""
    updates_per_step: float | None = None
    """gradient updates per environment step"""
    steps: int = 6400
    """environment steps of the loop that are timed"""
    seconds: float = 3.0
    """for which each of the other stages is timed"""
    json: bool = False
    """print the numbers as one JSON object too, as the last line"""


WARM_UP = 24  # vector steps before the clock starts: the first scores and updates


def script_of(args: Args):
    return {"sac": sac_clip_humanoid, "dqn": dqn_clip_playhouse}[args.script]


def script_args(args: Args, still: bool = False):
    """The script's own arguments, with the benchmark's on top; training never ends or stops.
    `still`: without CLIP's reward."""
    chosen = {
        name: value
        for name in ("clip_model", "device", "precision", "frame_size", "num_envs", "score_every",
                     "batch_size", "updates_per_step")
        if (value := getattr(args, name)) is not None
    }  # fmt: skip
    if still:
        chosen["reward"] = "env"
    elif args.script == "dqn":
        chosen["beta"] = 0.5  # there is nothing to calibrate
    endless = dict.fromkeys(("total_timesteps", "eval_every", "checkpoint_every"), 10**9)
    return script_of(args).Args(**chosen, **endless, learning_starts=0, capture_video=False)


def steps_per_frame(args: Args) -> int:
    """Environment steps for each frame that is drawn and scored."""
    return script_args(args).action_repeat if args.script == "sac" else 1


def save_random_clip(architecture: str, folder: Path) -> None:
    """A model folder as CLIPReward takes it, with the weights that open_clip draws."""
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise SystemExit(f"--clip-model {architecture}: open_clip has no such architecture")
    model = open_clip.create_model(architecture, pretrained=None)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    document = {"model_cfg": config, "preprocess_cfg": open_clip.get_model_preprocess_cfg(model)}
    (folder / "open_clip_config.json").write_text(json.dumps(document))


# ---- The loop, watched from the environment's side


class StillCLIP(CLIPReward):
    """Encodes a number of frames once, and then always says the same of as many."""

    def encode_maps(self, frames, *side):
        self.known = getattr(self, "known", {})
        if len(frames) not in self.known:
            self.known[len(frames)] = super().encode_maps(frames, *side)
        return self.known[len(frames)]


class Measured(BaseException):
    """Ends the training when the clock has been read; no `except Exception` stops it."""


class Watched:
    """A vector environment that reads the clocks before and after the timed steps."""

    def __init__(self, envs, steps: int):
        self.envs, self.last = envs, WARM_UP + max(1, steps // envs.num_envs)
        self.calls, self.marks = 0, []

    def __getattr__(self, name: str):
        return getattr(self.envs, name)

    def step_wait(self, timeout: float | None = None):
        result = self.envs.step_wait(timeout)
        self.calls += 1
        if self.calls in (WARM_UP, self.last):
            self.marks.append((time.perf_counter(), cpu_seconds(self.envs.processes)))
        if self.calls == self.last:
            self.memory = memory_mb(self.envs.processes)
            self.envs.close(terminate=True)
            raise Measured
        return result


class Still:
    """The same interface without a world: what the first reset gave comes back at every step."""

    processes, parent_pipes = (), ()

    def __init__(self, envs):
        envs.reset_async(seed=list(range(envs.num_envs)))
        self.start = envs.reset_wait()
        envs.step_async(np.stack([envs.single_action_space.sample()] * envs.num_envs))
        observation, reward, terminated, truncated, info = envs.step_wait()
        self.after = observation, reward, terminated & False, truncated & False, info
        self.num_envs = envs.num_envs
        self.single_observation_space = envs.single_observation_space
        self.single_action_space = envs.single_action_space
        envs.close(terminate=True)

    def reset_async(self, **options) -> None:
        pass

    def reset_wait(self, **options):
        return self.start

    def step_async(self, action) -> None:
        pass

    def step_wait(self, timeout: float | None = None):
        return self.after

    def close(self, **options) -> None:
        pass


def cpu_seconds(workers) -> float | None:
    """Of this process and of its workers, so far; None if there is no /proc to ask about them."""
    if workers and not Path("/proc/self/stat").exists():
        return None
    total = time.process_time()
    for worker in workers:
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def memory_mb(workers) -> float | None:
    """Resident memory of this process and its workers, what they share counted once."""
    if not Path("/proc/self/smaps_rollup").exists():
        return None
    pids = [os.getpid(), *(worker.pid for worker in workers)]
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return sum(int(text.split("Pss:")[1].split()[0]) for text in rollups) / 1024


@contextlib.contextmanager
def gpu_watch():
    """Twice a second: when, and the share of the time that the GPU is busy; empty without one."""
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    samples, over = [], threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            percent = subprocess.check_output(query, text=True).split()[0]
            samples.append((time.perf_counter(), float(percent) / 100))

    thread = threading.Thread(target=watch)
    if shutil.which(query[0]):
        thread.start()
    try:
        yield samples
    finally:
        over.set()
        if thread.is_alive():
            thread.join()


def train(args: Args, still: bool) -> dict:
    """Run the script's main loop for the timed steps; `still`: no world, and no CLIP."""
    script, settings, watched = script_of(args), script_args(args, still), []
    make_envs = script.make_envs

    def make_watched_envs(*arguments):
        envs = make_envs(*arguments)
        watched.append(Watched(Still(envs) if still else envs, args.steps))
        return watched[0]

    script.make_envs = make_watched_envs
    if still:
        script.CLIPReward = StillCLIP
    script.parse_args = lambda: settings
    # runs/ goes into the folder
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), gpu_watch() as busy:
        bar = io.StringIO()  # of the progress; also takes what the script refuses
        try:
            with contextlib.redirect_stderr(bar):
                script.main()
        except Measured:
            pass
        except SystemExit as stop:  # it says why itself, or has printed it
            sys.exit(stop.code if isinstance(stop.code, str) else bar.getvalue().splitlines()[-1])
    (start, cpu_start), (end, cpu_end) = watched[0].marks
    steps = (watched[0].last - WARM_UP) * watched[0].num_envs * steps_per_frame(args)
    busy = [share for moment, share in busy if start < moment < end]
    on_cuda = torch.cuda.is_initialized()
    return {
        "seconds_per_step": (end - start) / steps,
        "cpu_seconds_per_step": None if cpu_end is None else (cpu_end - cpu_start) / steps,
        "memory_mb": watched[0].memory,
        "gpu_memory_mb": torch.cuda.max_memory_allocated() / 2**20 if on_cuda else None,
        "gpu_busy": float(np.mean(busy)) if on_cuda and busy else None,
    }


# ---- Stages alone


def clock(work: Callable[[], None], least: float) -> tuple[float, float]:
    """Seconds, and CPU seconds of this process, of one call: the mean over `least` seconds, after a
    first call that does not count."""
    work()
    calls, start, cpu_start = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < least:
        work()
        calls += 1
    return (time.perf_counter() - start) / calls, (time.process_time() - cpu_start) / calls


def world_stages(args: Args) -> dict[str, tuple[float, float]]:
    """(seconds, CPU seconds) per environment step of physics, with its resets, and of rendering."""
    settings, rng = script_args(args), np.random.default_rng(0)
    size = {"width": settings.frame_size, "height": settings.frame_size}
    if args.script == "sac":
        env = sac_clip_humanoid.HumanoidEnv(render_mode="rgb_array", **size)
        draw = env.render
    else:
        env = dqn_clip_playhouse.PlayhouseEnv("rgb_array", **size)
        draw, nothing = env._frame, np.zeros((1, 1, 3), np.uint8)
    env.reset(seed=0)
    env.action_space.seed(0)
    render = clock(draw, args.seconds)
    if args.script == "dqn":
        env._frame = lambda: nothing  # its steps would draw

    def episode() -> None:
        env.reset(seed=int(rng.integers(2**31)))
        for _ in range(100):
            env.step(env.action_space.sample())

    physics = clock(episode, args.seconds)
    env.close()
    return {
        "physics": tuple(value / 100 for value in physics),
        "render": tuple(value / steps_per_frame(args) for value in render),
    }


def clip_stage(args: Args) -> dict:
    """(seconds, CPU seconds) per environment step, floating-point rate, and that of a matmul."""
    settings, script = script_args(args), script_of(args)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = settings.precision
    if precision == "auto":
        precision = auto_precision(device)
    torch.set_num_threads(1)
    task = sac_clip_humanoid.TASKS["kneeling"]
    prompts, baseline = [task.goal], sac_clip_humanoid.BASELINE
    if args.script == "dqn":
        prompts, baseline = [goal.prompt for goal in script.GOALS], settings.baseline
    clip = CLIPReward(settings.clip_model, prompts, baseline, device=device, precision=precision)
    each_step = args.script == "dqn" and settings.policy_input == "clip"  # the policy needs it
    count = settings.num_envs * (1 if each_step else settings.score_every)
    shape = count, settings.frame_size, settings.frame_size, 3
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    encode = clip.encode_maps if each_step else clip.encode_frames
    seconds, cpu = clock(lambda: encode(frames)[0].cpu(), args.seconds)
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not know the fused kernels
    with FlopCounterMode(display=False) as counter:
        clip(frames[:1])
    side = 8192 if device == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(side, side, device=device, dtype=dtype)
    matmul = clock(lambda: (a @ a)[0, 0].item(), args.seconds)[0]
    return {
        "clip": (seconds / count / steps_per_frame(args), cpu / count / steps_per_frame(args)),
        "clip_tflops": counter.get_total_flops() * count / seconds / 1e12,
        "matmul_tflops": 2 * side**3 / matmul / 1e12,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "precision": precision,
    }


# ---- The report


def summarise(stages: dict[str, tuple[float, float]], loop: dict, cores: int, on_gpu: bool) -> dict:
    """The numbers of the report from (seconds, CPU seconds) per step of each stage, and the loop's.

    The ceiling on a CPU: all cores busy with the stages and nothing else. On a GPU: its slower
    stage, or all cores busy with the world, whichever is slower.
    """
    cpu = sum(cpu for _, cpu in stages.values())
    seconds = {name: seconds for name, (seconds, _) in stages.items()}
    if on_gpu:
        world = (seconds["physics"] + seconds["render"]) / cores
        ceiling = 1 / max(world, seconds["clip"], seconds["update"])
    else:
        ceiling = cores / cpu
    rate, loop_cpu = 1 / loop["seconds_per_step"], loop["cpu_seconds_per_step"]
    return {
        "steps_per_second": rate,
        "ceiling_steps_per_second": ceiling,
        "ratio_to_ceiling": rate / ceiling,
        "stage_seconds_per_step": seconds,
        "cpu_seconds_per_step": loop_cpu,
        "cpu_seconds_per_step_stages": cpu,
        "cpu_ratio": None if loop_cpu is None else loop_cpu / cpu,
        "peak_memory_mb": loop["memory_mb"],
        "peak_gpu_memory_mb": loop["gpu_memory_mb"],
        "gpu_busy": loop["gpu_busy"],
    }


def table(result: dict) -> str:
    def number(value: float | None, unit: str = "") -> str:
        return "not measured here" if value is None else f"{value:.3g}{unit}"

    lines = [
        "| stage | ms per env step | steps/s alone |",
        "| ----- | --------------- | ------------- |",
    ]
    for name, seconds in result["stage_seconds_per_step"].items():
        lines.append(f"| {name} | {1000 * seconds:.3f} | {1 / seconds:.0f} |")
    rate = result["steps_per_second"]
    lines += [
        f"| the loop | {1000 / rate:.3f} | {rate:.0f} |",
        "",
        f"{result['cores']} cores, {result['device']}, {result['precision']}. The loop reaches "
        f"{result['ratio_to_ceiling']:.0%} of its ceiling of "
        f"{result['ceiling_steps_per_second']:.0f} steps/s.",
        f"CPU seconds per step: {number(result['cpu_seconds_per_step'])} in the loop, "
        f"{number(result['cpu_seconds_per_step_stages'])} in the stages, ratio "
        f"{number(result['cpu_ratio'])}.",
        f"CLIP: {result['clip_tflops']:.3g} TFLOP/s, of {result['matmul_tflops']:.3g} in a large "
        "matmul.",
        f"Memory: {number(result['peak_memory_mb'], ' MB')}; of the GPU "
        f"{number(result['peak_gpu_memory_mb'], ' MB')}; GPU busy {number(result['gpu_busy'])}.",
    ]
    return "\n".join(lines)


def alone(function, *arguments):
    """In a new process, so that no stage inherits another's memory, threads or CUDA context."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def main(args: Args) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        if "/" not in args.clip_model and not Path(args.clip_model).exists():
            save_random_clip(args.clip_model, Path(folder))
            args.clip_model = folder
        script_of(args).check_args(script_args(args))
        try:
            clip = alone(clip_stage, args)
        except ValueError as error:  # --clip-model: what was tried, and what to pass instead
            sys.exit(str(error))
        stages = alone(world_stages, args) | {"clip": clip.pop("clip")}
        update = alone(train, args, True)
        stages["update"] = update["seconds_per_step"], update["cpu_seconds_per_step"]
        loop = alone(train, args, False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    result = summarise(stages, loop, cores, clip["device"] != "CPU") | clip | {"cores": cores}
    print(table(result))
    if args.json:
        print(json.dumps(result))
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
