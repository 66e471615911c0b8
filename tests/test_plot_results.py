"""The figures, drawn from small made-up results."""

import itertools
import json

import imageio
import numpy as np
import plot_results

JUDGES = [f"{j}_{f}" for j in ("success_rate", "clip_success") for f in plot_results.FAMILIES]


def run(success: float) -> dict:
    values = {name: [0.1, success] for name in ("success_rate", "clip_return", *JUDGES)}
    return {
        "minutes": 50.0,
        "report": {"best": {"success_rate": success}, "last": {"success_rate": success / 2}},
        "curve": {"step": [16000, 32000], **values},
    }


def test_figures_are_drawn_from_what_is_there(tmp_path, capsys):
    def write(name: str, result: dict) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps(result))

    args = plot_results.Args(tmp_path, runs=tmp_path)
    plot_results.main(args)
    assert not list(tmp_path.glob("*.png"))
    assert capsys.readouterr().out.count("first python tests/reproduce.py") == 9

    for name in ("playhouse", "playhouse_relabel"):
        write(name, {"runs": [run(0.5), run(0.9)]})
    write("no_layer_norm", {"runs": [run(0.7)]})
    for task in plot_results.PAPER:
        write(task, {"runs": [run(0.8), run(1.0)] if task == "kneeling" else [run(0.9)]})
    of_each = {f"success_rate_{task}": 0.5 for task in plot_results.PAPER}
    write("all_tasks", {"runs": [{"report": {"best": of_each, "last": of_each}}]})
    alphas = {alpha: {"auc": 0.9, "epic": 0.2} for alpha in ("0", "0.5")}
    tasks = dict.fromkeys(plot_results.PAPER, alphas)
    write("clip_accuracy", {"tasks": tasks, "mean": alphas})
    for width in (4, 8, 12, 16):
        write(f"w{width}_on_default", {"image_parameters": 1000 * width**2, "mean": alphas})
        write(f"kneeling_w{width}", {"runs": [run(width / 20), run(1.0)]})
    for clip, look in itertools.product(("w16", "plain", "track"), ("plain", "track")):
        write(f"{clip}_on_{look}", {"mean": alphas})
    for clip in ("plain", "track"):
        write(f"{clip}_on_default", {"mean": alphas})
    over_beta = {
        "0.5": {"precision": 0.9, "recall_in_view": 0.8},
        "0.9": {"precision": None, "recall_in_view": 0.0},
    }
    family = {"average_precision_in_view": 0.9, "over_beta": over_beta}
    families = dict.fromkeys(plot_results.FAMILIES, family)
    write("home_accuracy", {"alphas": {"0": {"train": families, "heldout": families}}})
    plot_results.main(args)
    drawn = {path.stem for path in tmp_path.glob("*.png") if path.stat().st_size > 1000}
    assert drawn == {draw.__name__ for draw in plot_results.FIGURES}
    assert "not drawn" not in capsys.readouterr().out


def test_an_agents_video_becomes_an_animated_image(tmp_path):
    video = tmp_path / "lotus" / "1" / "runs" / "name" / "videos" / "best.mp4"
    video.parent.mkdir(parents=True)
    film = np.repeat(np.arange(100, dtype=np.uint8)[:, None], 320 * 320 * 3, 1)
    imageio.mimwrite(video, film.reshape(100, 320, 320, 3), fps=30)
    plot_results.main(plot_results.Args(tmp_path, runs=tmp_path))
    frames = np.stack(imageio.mimread(tmp_path / "lotus.gif"))
    assert frames.shape[:3] == (25, 160, 160)
    np.testing.assert_allclose(frames[:, 0, 0, 0], np.arange(0, 100, 4), atol=6)


def test_videos_of_one_run_stand_side_by_side(tmp_path):
    for seed, names in ("1", ("best_a_ball", "best_a_ball_in_the_hand")), ("2", ("best_a_ball",)):
        folder = tmp_path / "playhouse" / seed / "runs" / "name" / "videos"
        folder.mkdir(parents=True)
        for value, name in zip((50, 200), names, strict=False):
            film = np.full((100, 320, 320, 3), value, np.uint8)
            imageio.mimwrite(folder / f"{name}.mp4", film, fps=10)
    plot_results.main(plot_results.Args(tmp_path, runs=tmp_path))
    frames = np.stack(imageio.mimread(tmp_path / "playhouse.gif"))
    assert frames.shape[1:3] == (160, 320)
    np.testing.assert_allclose(frames[0, 80, [80, 240], 0], (50, 200), atol=6)


def test_the_band_spans_the_seeds():
    figure, axis = plot_results.plt.subplots()
    plot_results.over_seeds(axis, [run(0.5), run(0.9)], "success_rate", 100, minutes=True)
    (line,), (band,) = axis.lines, axis.collections
    assert line.get_xdata().tolist() == [25, 50] and line.get_ydata().tolist() == [10, 70]
    assert {y for _, y in band.get_paths()[0].vertices} >= {50, 90}
    plot_results.plt.close(figure)
