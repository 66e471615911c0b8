import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import clip_reward
from clip_reward import (
    CLIPReward,
    auto_precision,
    contrastive_reward,
    goal_baseline_reward,
)

GOALS = ["a humanoid robot kneeling", "a humanoid robot standing up"]
BASELINE = "a humanoid robot"
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
SCRIPT = Path(clip_reward.__file__)


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def pictures(*sizes: tuple[int, int]) -> list[np.ndarray]:
    """Frames with both smooth colours and hard edges, one [H, W, 3] for each (H, W)."""
    random = np.random.default_rng(0)
    frames = []
    for height, width in sizes:
        colours = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        image = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        for _ in range(12):
            x, y = random.integers(0, width), random.integers(0, height)
            colour = tuple(random.integers(0, 256, 3).tolist())
            draw.ellipse((x, y, x + width // 5, y + height // 7), fill=colour)
            draw.line((x, y, *random.integers(0, min(height, width), 2)), fill=colour, width=2)
        frames.append(np.asarray(image))
    return frames


def definition_1(s, g, b, alpha):
    """One image and one goal, with the D x D projection matrix, in float64."""
    s, g, b = s.double(), g.double(), b.double()
    projection = torch.outer(g - b, g - b) / (g - b).dot(g - b)
    on_line = b + projection @ (s - b)
    return 1 - 0.5 * (alpha * on_line + (1 - alpha) * s - g).square().sum()


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("D", [4, 64, 1280])
@pytest.mark.parametrize("distance", [1e-3, 0.1, 1.0])
def test_reward_is_definition_1(alpha, D, distance):
    torch.manual_seed(0)
    b = unit(D)
    g = F.normalize(b + distance * unit(3, D), dim=-1)
    s = torch.cat((unit(4, D), F.normalize(g + 0.1 * unit(3, D), dim=-1), g))
    expected = torch.stack([torch.stack([definition_1(i, j, b, alpha) for j in g]) for i in s])
    rewards = goal_baseline_reward(s, g, b, alpha)
    assert rewards.dtype == torch.float32
    assert (rewards - expected).abs().max() < 2e-6


def test_reward_keeps_leading_dimensions_and_takes_a_baseline_per_goal():
    torch.manual_seed(0)
    s, g, b = unit(2, 5, 16), unit(3, 16), unit(3, 16)
    rewards = goal_baseline_reward(s, g, b, 0.3)
    assert rewards.shape == (2, 5, 3)
    for index in np.ndindex(2, 5, 3):
        expected = definition_1(s[index[:2]], g[index[2]], b[index[2]], 0.3)
        assert rewards[index].item() == pytest.approx(expected.item(), abs=2e-6)


def test_reward_at_alpha_0_is_the_cosine_even_where_goal_is_baseline():
    torch.manual_seed(0)
    s, g = unit(10, 32), unit(2, 32)
    assert (goal_baseline_reward(s, g, g[0], 0.0) - s @ g.T).abs().max() < 1e-6


def test_contrastive_reward_is_the_softmax_of_the_paper():
    torch.manual_seed(0)
    sg, tau = torch.rand(4, 3), 0.07
    p = contrastive_reward(sg, tau)
    for i, row in enumerate(sg.tolist()):
        total = sum(math.exp(x / tau) for x in row)
        assert p[i].tolist() == pytest.approx([math.exp(x / tau) / total for x in row], rel=1e-4)


def test_the_clips_own_temperature(random_clip):
    weights = load_file(random_clip / "open_clip_model.safetensors")
    own = CLIPReward(str(random_clip), GOALS, BASELINE).temperature
    assert own == pytest.approx(math.exp(-weights["logit_scale"].item())) == pytest.approx(0.07)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory) -> Path:
    """Weights for ViT-S-32-alt, one of the smallest architectures that open_clip knows by name."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "vit_s.pt"
    torch.save(open_clip.CLIP(**open_clip.get_model_config("ViT-S-32-alt")).state_dict(), file)
    return file


def pil_embedding(model, transform, frame: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model.encode_image(transform(Image.fromarray(frame))[None], normalize=True)[0]


def test_frames_are_encoded_as_by_open_clip_for_an_architecture_and_a_file(weights_file):
    reward = CLIPReward(f"ViT-S-32-alt/{weights_file}", GOALS, BASELINE)
    model, transform = open_clip.create_model_from_pretrained("ViT-S-32-alt", str(weights_file))
    model.eval()
    sizes = [(480, 480), (224, 224), (64, 64), (300, 480), (481, 301), (1, 1)]
    frames = pictures(*sizes)
    expected = torch.stack([pil_embedding(model, transform, frame) for frame in frames])
    s = torch.cat([reward.encode_frames(frame[None]) for frame in frames])
    assert (s * expected).sum(-1).min() > 0.9999
    # Random weights do tell pictures apart, or the line above would mean little.
    assert ((s @ expected.T).fill_diagonal_(0) < 0.99).all()

    tokens = open_clip.get_tokenizer("ViT-S-32-alt")(GOALS)
    with torch.no_grad():
        expected = model.encode_text(tokens, normalize=True)
    assert (reward.encode_text(GOALS) - expected).abs().max() < 1e-6
    assert (reward.goal - expected).abs().max() < 1e-6


def test_a_resnet_is_encoded_as_by_open_clip(tmp_path):
    """Its batch norms are folded into its convolutions."""
    vision = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 16, "head_width": 32}
    text = {"context_length": 32, "vocab_size": 49408, "layers": 1, "width": 64, "heads": 2}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    frames = pictures((64, 64), (64, 64))
    images = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()
    model.encode_image(images / 100 - 1)  # some statistics
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    document = {"model_cfg": config, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(document))
    reward = CLIPReward(str(tmp_path), GOALS, BASELINE)
    assert len(norms) == 3 + 3 * 5 + 4
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in reward.modules())
    _, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    expected = torch.stack([pil_embedding(model.eval(), transform, frame) for frame in frames])
    s = reward.encode_frames(np.stack(frames))
    assert (s - expected).abs().max() < 1e-5
    assert (s[0] - s[1]).abs().max() > 1e-4  # the two are told apart


SIGLIP = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
LETTERBOX = {"resize_mode": "longest", "interpolation": "bilinear", "fill_color": 90}


pillow_resize = Image.Image.resize


def resize_width_first(image, size, *options, **named):
    """Pillow rounds to bytes between two passes; from 13 on, tall images take the height first."""
    image = pillow_resize(image, (size[0], image.height), *options, **named)
    return pillow_resize(image, size, *options, **named)


@pytest.mark.parametrize("settings", [SIGLIP, LETTERBOX, {"resize_mode": "shortest"}])
@pytest.mark.parametrize("image_size", [48, (64, 48)])
def test_preprocessing_is_the_models_own(settings, image_size, random_clip, tmp_path, monkeypatch):
    config = json.loads((random_clip / "open_clip_config.json").read_text())["model_cfg"]
    config["vision_cfg"]["image_size"] = image_size
    config |= {"custom_text": True, "init_logit_bias": -10}
    torch.manual_seed(0)
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    weights = open_clip.CustomTextCLIP(**arguments).state_dict()
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": settings})
    )
    reward = CLIPReward(str(tmp_path), GOALS, BASELINE)
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    model.eval()
    for frame in pictures((480, 480), (64, 48), (30, 20), (120, 250), (251, 119), (48, 48)):
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "resize", resize_width_first)
            expected = transform(Image.fromarray(frame))
        pixels = reward.preprocess(torch.tensor(frame)[None])[0]
        assert pixels.shape == expected.shape
        error = ((pixels - expected) / reward.scale).abs()  # in steps of a byte
        assert error.max() < 2.1 and error.mean() < 0.1
        s = reward.encode_frames(frame[None])[0]
        assert s @ pil_embedding(model, transform, frame) > 0.998
        # The mean that most code has built in would be noticed.
        wrong_mean = (0.5,) * 3 if settings is not SIGLIP else OPENAI_MEAN
        transform.transforms[-1].mean, mean = wrong_mean, transform.transforms[-1].mean
        assert (transform(Image.fromarray(frame)) - pixels).abs().max() > 0.05
        transform.transforms[-1].mean = mean


def test_floats_resized_as_on_cuda_give_the_same_embeddings(reward, monkeypatch):
    for frame in pictures((480, 480), (64, 48), (30, 20), (120, 250)):
        frames = torch.tensor(frame)[None]
        from_bytes = reward.preprocess(frames)
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        from_floats = reward.preprocess(frames)
        monkeypatch.undo()
        levels = (from_floats - reward.shift) / reward.scale
        assert (levels - levels.round()).abs().max() < 1e-3  # whole bytes, from 0 to 255
        assert levels.min() > -1e-3 and levels.max() < 255.001
        assert 0 < ((from_floats - from_bytes) / reward.scale).abs().mean() < 0.5
        s = reward.clip.encode_image(torch.cat((from_bytes, from_floats)), normalize=True)
        assert s[0] @ s[1] > 0.9995


@pytest.fixture(scope="module")
def reward(random_clip) -> CLIPReward:
    return CLIPReward(str(random_clip), GOALS, BASELINE, alpha=0.5, batch_size=3)


@pytest.mark.parametrize("B", [0, 1, 3, 7])
def test_any_number_of_frames(reward, B):
    frames = np.stack(pictures(*[(40, 50)] * 8))[:B]
    batches = []
    hook = reward.clip.visual.register_forward_pre_hook(lambda _, x: batches.append(len(x[0])))
    s = reward.encode_frames(frames)
    hook.remove()
    assert batches == {0: [], 1: [1], 3: [3], 7: [3, 3, 1]}[B]
    assert s.shape == (B, 64) and s.dtype == torch.float32
    assert torch.allclose(s.norm(dim=-1), torch.ones(B), atol=1e-6)
    for i in range(B):
        assert (s[i] - reward.encode_frames(frames[i : i + 1])[0]).abs().max() < 1e-5
    assert reward(frames).shape == (B, 2)


def test_numpy_and_torch_frames_agree(reward):
    frames = np.stack(pictures((40, 50), (40, 50)))
    expected = reward.encode_frames(torch.tensor(frames))
    assert torch.equal(reward.encode_frames(frames), expected)
    frames.flags.writeable = False
    assert torch.equal(reward.encode_frames(frames), expected)
    flipped = frames[:, ::-1].copy()[:, ::-1]
    assert torch.equal(reward.encode_frames(flipped), expected)
    assert not torch.allclose(reward.encode_frames(frames[:, ::-1]), expected, atol=1e-3)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 4), np.uint8),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_other_frames_are_refused(reward, frames):
    with pytest.raises(ValueError, match=r"uint8 \[B, H, W, 3\]"):
        reward.encode_frames(frames)


def test_forward_is_the_reward_of_the_embeddings(reward):
    frames = np.stack(pictures((32, 32), (32, 32)))
    with torch.no_grad():
        g = reward.clip.encode_text(reward.tokenizer(GOALS), normalize=True)
        b = reward.clip.encode_text(reward.tokenizer([BASELINE]), normalize=True)[0]
    s = reward.encode_frames(frames)
    expected = torch.stack([torch.stack([definition_1(i, j, b, 0.5) for j in g]) for i in s])
    assert (reward(frames) - expected).abs().max() < 2e-6


def dense_layer4(layer: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """The last stage of the bundled CLIP, two blocks with folded batch norms, without its stride:
    [B, C, 9, 9] -> [B, C', 8, 8]."""
    first, second = layer
    squares = lambda x: sum(x[..., i : i + 8, j : j + 8] for i in (0, 1) for j in (0, 1)) / 4
    y = first.conv3(squares(F.relu(first.conv2(F.relu(first.conv1(x))))))
    x = F.relu(y + first.downsample[1](squares(x)))
    around = F.pad(F.relu(second.conv1(x)), [2] * 4)
    y = second.conv2.bias[:, None, None]
    for i in range(3):
        for j in range(3):  # the neighbours are two cells away
            there = around[..., 2 * i : 2 * i + 8, 2 * j : 2 * j + 8]
            y = y + torch.einsum("oc,bcyz->boyz", second.conv2.weight[..., i, j], there)
    return F.relu(second.conv3(F.relu(y)) + x)


@pytest.mark.parametrize("side", [8, 4])
def test_maps_of_a_resnet_are_its_last_stage_without_stride_or_attention(side):
    reward = CLIPReward(str(SCRIPT.parent / "tests" / "tiny_clip"), ["a red ball"], "a room")
    (frame,) = pictures((144, 144))
    changed = frame.copy()
    changed[:40, -40:] = 255 - changed[:40, -40:]  # top right
    frames, visual = np.stack([frame, changed]), reward.clip.visual
    s, maps = reward.encode_maps(frames, side)
    assert (s - reward.encode_frames(frames)).abs().max() < 1e-5
    assert maps.shape == (2, side, side, 128)
    assert (maps.norm(dim=-1) - 1).abs().max() < 1e-5
    with torch.no_grad():
        images = reward.preprocess(torch.from_numpy(frames))
        output = reward.clip.forward_intermediates(images, image_indices=2)
        x = output["image_intermediates"][0]
        cells, pool = dense_layer4(visual.layer4, x), visual.attnpool
        assert (cells[..., ::2, ::2] - visual.layer4(x)).abs().max() < 1e-5
        places = pool.c_proj(pool.v_proj(cells.movedim(1, -1))).movedim(-1, 1)
    expected = F.normalize(F.adaptive_avg_pool2d(places, side), dim=1).permute(0, 2, 3, 1)
    assert (maps - expected).abs().max() < 1e-5
    other = (maps[0] - maps[1]).abs().amax(-1)  # [h, w]
    assert other[0, -1] > 10 * max(other[0, 0], other[-1, -1], other[-1, 0])


@pytest.mark.parametrize("B", [1, 3])
def test_maps_of_a_vit_are_its_last_layer_with_each_cell_alone(reward, B):
    frames = np.stack(pictures(*[(40, 50)] * B))
    s, maps = reward.encode_maps(frames)
    assert (s - reward.encode_frames(frames)).abs().max() < 1e-5
    whole, reward.batch_size = reward.batch_size, 1
    assert torch.allclose(maps, reward.encode_maps(frames)[1], atol=1e-4)
    reward.batch_size = whole
    visual, (height, width) = reward.clip.visual, reward.clip.visual.grid_size
    with torch.no_grad():
        images = reward.preprocess(torch.from_numpy(frames))
        output = reward.clip.forward_intermediates(images, image_indices=2)
        x = output["image_intermediates"][0]
        for y in range(height):
            for z in range(width):
                token = visual.transformer.resblocks[-1](x[:, None, :, y, z])  # a sequence of one
                expected = F.normalize((visual.ln_post(token) @ visual.proj)[:, 0], dim=-1)
                assert (maps[:, y, z] - expected).abs().max() < 1e-4
    assert maps.shape == (B, height, width, 64)


def test_maps_of_other_image_towers_are_refused(random_clip):
    reward = CLIPReward(str(random_clip), GOALS, BASELINE)
    frames = np.stack(pictures((32, 32)))
    reward.clip.visual.attn_pool = torch.nn.Identity()  # as CoCa has
    with pytest.raises(ValueError, match="VisionTransformer does not embed.*--policy-input pixels"):
        reward.encode_maps(frames)
    reward.clip.visual = torch.nn.Identity()
    with pytest.raises(ValueError, match="Identity does not embed.*--policy-input pixels"):
        reward.encode_maps(frames)


def test_several_prompts_make_one_goal_of_unit_norm(random_clip):
    reward = CLIPReward(str(random_clip), [GOALS, "a robot"], BASELINE)
    mean = reward.encode_text(GOALS).sum(0) / 2
    assert reward.goal.shape == (2, 64)
    assert (reward.goal[0] - mean / mean.norm()).abs().max() < 1e-6
    assert (reward.goal[1] - reward.encode_text("a robot")[0]).abs().max() < 1e-6


def test_nothing_carries_a_gradient_and_results_can_enter_autograd(reward):
    frames = np.stack(pictures((32, 32)))
    results = reward(frames), reward.encode_frames(frames), reward.encode_text(GOALS)
    assert not any(result.requires_grad for result in results)
    assert not reward.clip.training
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    weight = torch.ones(2, requires_grad=True)
    (results[0] * weight).sum().backward()
    assert torch.equal(weight.grad, results[0][0])
    results[0].mul_(2)


def test_bf16_is_close_to_fp32_and_not_the_same(random_clip, reward):
    half = CLIPReward(str(random_clip), GOALS, BASELINE, precision="bf16")
    frames = np.stack(pictures(*[(32, 32)] * 8))
    s, s_half = reward.encode_frames(frames), half.encode_frames(frames)
    assert s_half.dtype == torch.float32
    assert torch.allclose(s_half.norm(dim=-1), torch.ones(8), atol=1e-6)
    assert (s * s_half).sum(-1).min() > 0.999 and not torch.allclose(s, s_half, atol=1e-6)
    assert torch.equal(half.goal, reward.goal)


def test_compiled_embeddings_are_the_same(random_clip, reward, monkeypatch):
    compile_eagerly = torch.compile
    calls = []

    def count(function, *args, **kwargs):
        calls.append(function)
        return compile_eagerly(function, backend="eager")

    monkeypatch.setattr(torch, "compile", count)
    compiled = CLIPReward(str(random_clip), GOALS, BASELINE, compile=True)
    frames = np.stack(pictures((32, 32), (32, 32)))
    assert (compiled.encode_frames(frames) - reward.encode_frames(frames)).abs().max() < 1e-5
    assert len(calls) == 2  # for the embeddings alone, and with the maps
    s, maps = compiled.encode_maps(frames)
    assert (s - reward.encode_frames(frames)).abs().max() < 1e-5
    assert (maps - reward.encode_maps(frames)[1]).abs().max() < 1e-4


def test_state_dict_has_no_buffers_of_the_reward(reward):
    assert all(name.startswith("clip.") for name in reward.state_dict())


@pytest.mark.parametrize("goal", [BASELINE, [BASELINE, BASELINE], "A  Humanoid robot"])
def test_a_goal_that_is_the_baseline_is_refused(random_clip, goal):
    with pytest.raises(ValueError, match="no line runs") as caught:
        CLIPReward(str(random_clip), [GOALS[0], goal], BASELINE, alpha=0.1)
    assert repr(goal) in str(caught.value) and "\n" not in str(caught.value)
    reward = CLIPReward(str(random_clip), [goal], BASELINE, alpha=0)
    frames = np.stack(pictures((32, 32)))
    assert (reward(frames) - reward.encode_frames(frames) @ reward.goal.T).abs().max() < 1e-6


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha": -0.1}, "--alpha -0.1"),
        ({"alpha": 1.1}, "--alpha 1.1"),
        ({"alpha": math.nan}, "--alpha nan"),
        ({"precision": "fp16"}, "precision 'fp16'"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"goals": []}, r"goals \[\]"),
        ({"goals": "a robot"}, "goals 'a robot'"),
    ],
)
def test_values_out_of_range_are_refused(random_clip, options, message):
    with pytest.raises(ValueError, match=message):
        CLIPReward(**{"model": str(random_clip), "goals": GOALS, "baseline": BASELINE} | options)


@pytest.mark.parametrize(
    ("device", "vendor", "amx", "avx512_bf16", "precision"),
    [
        ("cuda", "", False, False, "bf16"),
        ("cpu", "GenuineIntel", True, True, "bf16"),
        ("cpu", "GenuineIntel", False, True, "fp32"),
        ("cpu", "AuthenticAMD", False, True, "bf16"),
        ("cpu", "AuthenticAMD", False, False, "fp32"),
        ("cpu", None, False, False, "fp32"),  # no Linux
    ],
)
def test_auto_precision_is_the_faster_one(device, vendor, amx, avx512_bf16, precision, monkeypatch):
    def read_text(path):
        assert str(path) == "/proc/cpuinfo" and vendor is not None
        return f"vendor_id: {vendor}"

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert auto_precision(device) == precision


BROKEN_MODELS = {
    "ViT-B-31/openai": "ViT-B-32",
    "ViT-B-32/laion2b_s34b_b79": "laion2b_s34b_b79k",
    "ViT-B-32": "openai",
    "ViT-S-32-alt//no/such/file.pt": "neither a tag of ViT-S-32-alt nor a file",
    "ViT-S-32-alt/{tmp}/broken.pt": "could not be loaded",
    "ViT-M-32-alt/{weights_file}": "could not be loaded",
    "{tmp}/no_config": "open_clip_config.json",
    "{tmp}/bad_config": "open_clip_config.json",
    "{tmp}/no_weights": "open_clip_model.safetensors",
    "{tmp}/broken_weights": "could not be loaded",
    "{tmp}/missing": "no such folder",
    "x" * 300: "no such folder",  # no file system takes the name
    "hf-hub:nobody/nothing": "need",
    "": "no such folder",
}


@pytest.mark.parametrize("model", BROKEN_MODELS)
def test_a_model_that_cannot_be_loaded_is_one_line(
    model, random_clip, weights_file, tmp_path, monkeypatch, capfd, caplog
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "broken.pt").write_bytes(b"not weights")
    for folder in ("no_config", "bad_config", "no_weights", "broken_weights"):
        shutil.copytree(random_clip, tmp_path / folder)
    (tmp_path / "no_config" / "open_clip_config.json").unlink()
    (tmp_path / "bad_config" / "open_clip_config.json").write_text("{")
    (tmp_path / "no_weights" / "open_clip_model.safetensors").unlink()
    (tmp_path / "broken_weights" / "open_clip_model.safetensors").write_bytes(b"not weights")
    name = model.format(tmp=tmp_path, weights_file=weights_file)
    with pytest.raises(ValueError) as caught:
        CLIPReward(name, GOALS, BASELINE)
    message = str(caught.value)
    assert message.startswith(f"--clip-model {name}: ") and "\n" not in message
    assert "; pass " in message and BROKEN_MODELS[model] in message
    assert "loaded ()" not in message and "loaded; pass" not in message  # it says why
    assert capfd.readouterr().err == "" and not caplog.records


def test_tags_and_files_get_their_own_activation_and_preprocessing(monkeypatch, tmp_path):
    asked = {}

    def record(name, **options):
        asked[name] = options
        raise RuntimeError("enough")

    monkeypatch.setattr(open_clip, "create_model", record)
    (tmp_path / "weights.pt").touch()
    for model in ("ViT-B-32/openai", "ViT-B-16/laion2b_s34b_b88k", f"ViT-B-16-SigLIP/{tmp_path}"):
        with pytest.raises(ValueError):
            CLIPReward(model + "/weights.pt" * model.endswith(str(tmp_path)), GOALS, BASELINE)
    assert asked["ViT-B-32"][
        "force_quick_gelu"
    ]  # OpenAI trained with it, the architecture has none
    assert not asked["ViT-B-16"]["force_quick_gelu"]
    assert asked["ViT-B-16"]["force_preprocess_cfg"]["mean"] == OPENAI_MEAN
    siglip = asked["ViT-B-16-SigLIP"]["force_preprocess_cfg"]
    assert siglip["mean"] == (0.5, 0.5, 0.5) and siglip["resize_mode"] == "squash"


def test_words_outside_the_vocabulary_are_warned_about(random_clip, tmp_path):
    folder = shutil.copytree(random_clip, tmp_path / "clip")
    (folder / "vocabulary.txt").write_text("a\nhumanoid\nrobot\nkneeling\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward = CLIPReward(str(folder), ["A humanoid robot, kneeling."], BASELINE)
    with pytest.warns(UserWarning) as caught:
        reward.encode_text([BASELINE, "a robot waving its hand"])
    (warning,) = caught
    with pytest.warns(UserWarning, match="'2', '机器人'"):
        reward.encode_text("a robot, 2 机器人")
    assert "'hand', 'its', 'waving'" in str(warning.message)
    assert "cannot judge 'a robot waving its hand'" in str(warning.message)
    assert warning.filename == __file__


def test_what_clip_does_not_read_is_warned_about(random_clip):
    reward = CLIPReward(str(random_clip), GOALS, BASELINE)
    read, cut = " ".join(["robot"] * 29), " ".join(["robot"] * 31)  # start and end take two of 32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward.encode_text([BASELINE, read])
    with pytest.warns(UserWarning, match="fills the 32 tokens that this CLIP reads") as caught:
        reward.encode_text([BASELINE, cut])
    (warning,) = caught
    assert cut in str(warning.message) and warning.filename == __file__


@pytest.fixture
def images(tmp_path) -> list[Path]:
    paths = []
    for colour in ("red", "green", "blue"):
        paths.append(tmp_path / f"{colour}.png")
        Image.new("RGB", (60, 40), colour).save(paths[-1])
    return paths


def test_command_line(random_clip, images, tmp_path):
    arguments = ["--goal", GOALS[0], "--baseline", BASELINE, "--clip-model", str(random_clip)]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, *map(str, images)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and result.stderr == ""
    table = re.findall(r"^(.+?)\s+(\S+\.png)$", result.stdout, re.MULTILINE)[:3]
    printed = {name: [float(number) for number in numbers.split()] for numbers, name in table}
    assert set(printed) == set(map(str, images))
    frames = np.stack([np.asarray(Image.open(name)) for name in printed])
    for column, alpha in enumerate((0, 0.25, 0.5, 0.75, 1)):
        rewards = CLIPReward(str(random_clip), [GOALS[0]], BASELINE, alpha)(frames)[:, 0].tolist()
        assert [row[column] for row in printed.values()] == pytest.approx(rewards, abs=1e-4)
        assert column > 0 or rewards == sorted(rewards, reverse=True)

    sheet = Image.open(tmp_path / "contact_sheet.png")
    tile = sheet.width // 2
    centres = [(tile // 2, tile // 2), (tile * 3 // 2, tile // 2), (tile // 2, tile * 5 // 3)]
    for name, centre in zip(printed, centres, strict=True):
        assert sheet.getpixel(centre) == Image.open(name).getpixel((30, 20))
    assert np.asarray(sheet)[tile : sheet.height // 2, :tile].min() < 100  # the first caption


def test_command_line_reports_a_bad_value_without_a_traceback(random_clip, images):
    arguments = ["--goal", BASELINE, "--baseline", BASELINE, "--clip-model", str(random_clip)]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, *map(str, images)], capture_output=True, text=True
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: --baseline {BASELINE!r}: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"images": ()}, "IMAGES: none"),
        ({"images": (Path("missing.png"),)}, "IMAGES missing.png: "),
        ({"images": (SCRIPT,)}, f"IMAGES {SCRIPT}: "),
        ({"goal": " "}, "--goal '': "),
        ({"baseline": ""}, "--baseline '': "),
        ({"clip_model": "ViT-B-32/nothing"}, "--clip-model ViT-B-32/nothing: "),
        ({"output": Path("missing/sheet.png")}, "--output missing/sheet.png: "),
        ({"output": Path("sheet.unknown")}, "--output sheet.unknown: "),
    ],
)
def test_command_line_errors(options, message, random_clip, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = {"goal": GOALS[0], "baseline": BASELINE, "clip_model": str(random_clip)}
    with pytest.raises(SystemExit) as caught:
        clip_reward.main(clip_reward.Args(**{"images": tuple(images)} | arguments | options))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1 and "; " in error


def test_default_clip_lies_beside_the_script():
    default = Path(clip_reward.Args(images=(), goal="", baseline="").clip_model)
    assert default.is_absolute() and default == SCRIPT.parent / "tests" / "tiny_clip"
