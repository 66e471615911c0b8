r"""Rewards from a sentence: how well does a frame match a goal prompt, in the eyes of a CLIP?

Is a prompt any good? Ask before training on it, on a few frames that reach the goal or miss it:

    python clip_reward.py --goal "a humanoid robot kneeling" --baseline "a humanoid robot" \
        --clip-model ViT-B-32/laion2b_s34b_b79k frames/*.png

Papers: Rocamonde et al., "Vision-Language Models are Zero-Shot Reward Models for Reinforcement
Learning" (arXiv 2310.12921); Baumli et al., "Vision-Language Models as a Source of Rewards"
(arXiv 2312.09187).
"""

import copy
import difflib
import logging
import math
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import tyro
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transform import center_crop_or_pad
from open_clip.transformer import VisionTransformer
from PIL import Image, ImageDraw, ImageOps
from torch.nn.utils.fusion import fuse_conv_bn_eval


def goal_baseline_reward(
    image: torch.Tensor, goal: torch.Tensor, baseline: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Goal-baseline regularised reward (arXiv 2310.12921, Definition 1) of each image and goal.

        R(s) = 1 - 1/2 || alpha * proj_L(s) + (1 - alpha) * s - g ||^2,   L the line through b and g

    Image s [..., D], goal g [G, D] and baseline b, [D] or [G, D], have unit norm; returns [..., G].
    alpha = 0 is the cosine similarity, alpha = 1 sees only what tells the goal from the baseline.
    Where g == b there is no line, and only alpha = 0 means anything.
    """
    # s - g has a part along L, kept whole, and a part across it, shrunk by 1 - alpha. So two dot
    # products do what the definition does with a D x D projection matrix.
    u = F.normalize(goal - baseline, dim=-1)  # [G, D]
    c = (1 - alpha) ** 2
    sg, su = (image @ torch.cat((goal, u)).T).chunk(2, dim=-1)  # [..., G] each
    gu = (goal * u).sum(-1)  # [G]
    return 1 - c * (1 - sg) - (1 - c) / 2 * (su - gu) ** 2


def contrastive_reward(rewards: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probability of each goal among all G (arXiv 2312.09187): cosines s.g [..., G] -> [..., G].

    `rewards` is `goal_baseline_reward` at alpha = 0; the paper then thresholds the probability.
    """
    return torch.softmax(rewards / temperature, dim=-1)


def auto_precision(device: str) -> Literal["fp32", "bf16"]:
    """The faster one for CLIP: bf16 on CUDA (older than Ampere: take fp32), and on a CPU with AMX
    or AMD's AVX512-BF16, which alone was slower than fp32 on another CPU. Starts no CUDA."""
    if device == "cpu" and not torch.cpu._is_amx_tile_supported():
        has_bf16 = torch.cpu._is_avx512_bf16_supported()
        if not has_bf16 or "AuthenticAMD" not in Path("/proc/cpuinfo").read_text():
            return "fp32"
    return "bf16"


def nearest(name: str, known: list[str], otherwise: list[str]) -> str:
    return " or ".join(difflib.get_close_matches(name, known, cutoff=0.4) or otherwise)


def load_clip(model: str, device: str | torch.device) -> tuple[torch.nn.Module, object, dict]:
    """The CLIP that a `--clip-model` string names, its tokenizer and its preprocessing settings.

    Raises ValueError, of one line, for whatever keeps it from loading.
    """
    options = {}
    if os.path.isdir(model):  # False, too, where it may not be read
        name = f"local-dir:{model}"
    elif model.startswith("hf-hub:"):
        name = model
    else:
        name, _, weights = model.partition("/")
        models, tags = open_clip.list_models(), open_clip.list_pretrained_tags_by_model(name)
        if name not in models:
            raise ValueError(
                f"--clip-model {model}: no such folder, and open_clip has no architecture {name!r};"
                f" pass a folder, hf-hub:ID, or {nearest(name, models, ['ViT-B-32'])} with a /TAG"
            )
        tag = open_clip.get_pretrained_cfg(name, weights)
        if not tag and not os.path.isfile(weights):
            raise ValueError(
                f"--clip-model {model}: {weights!r} is neither a tag of {name} nor a file; pass"
                f" {name}/FILE or {name}/TAG with the tag {nearest(weights, tags, tags[:3])}"
            )
        options = {
            "pretrained": weights,
            # For ViT-B-32/openai and such, open_clip only warns and takes the wrong activation.
            "force_quick_gelu": tag.get("quick_gelu", False),
            # A bare file would get OpenAI's mean and std even if it is a SigLIP: ask a tag.
            "force_preprocess_cfg": tag or open_clip.get_pretrained_cfg(name, (tags or [""])[0]),
        }

    logged = logging.root.manager.disable
    logging.disable()  # open_clip logs the errors that it raises
    try:
        # Without require_pretrained, a folder or a hub without weights gives a random CLIP.
        clip = open_clip.create_model(name, device=device, require_pretrained=True, **options)
        return clip.eval(), open_clip.get_tokenizer(name), open_clip.get_model_preprocess_cfg(clip)
    except Exception as error:  # missing files, broken pickles, wrong shapes, networks, ...
        raise ValueError(
            f"--clip-model {model}: could not be loaded ({textwrap.shorten(str(error), 160)}); pass"
            " ARCH/TAG or hf-hub:ID (each needs a network once), ARCH/FILE, or a folder with"
            " open_clip_config.json and open_clip_model.safetensors"
        ) from error
    finally:
        logging.disable(logged)


def fold_batch_norms(resnet: ModifiedResNet) -> None:
    """Folds each one into the convolution before it: the same embeddings with less work."""
    for block in list(resnet.modules()):
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")):
            parts = [getattr(block, name, None) for name in (conv, norm)]
            if isinstance(parts[1], torch.nn.BatchNorm2d):
                setattr(block, conv, fuse_conv_bn_eval(*parts))
                setattr(block, norm, torch.nn.Identity())


def without_stride(layer: torch.nn.Sequential) -> torch.nn.Sequential:
    """A copy of a ResNet's layer, with the same weights, that does not halve its map: the stride
    becomes 1, and the convolutions after it are dilated instead (arXiv 1412.7062). Every second
    cell of every second row is the layer's own output."""
    layer = copy.deepcopy(layer, memo={id(weight): weight for weight in layer.parameters()})
    for pool in layer.modules():
        if isinstance(pool, torch.nn.AvgPool2d):
            pool.stride = 1
    for block in layer[1:]:
        block.conv2.padding = block.conv2.dilation = (2, 2)
    return layer


class CLIPReward(torch.nn.Module):
    """Scores frames against goal prompts: uint8 [B, H, W, 3] -> rewards [B, G], without gradient.

    `model`: a folder in open_clip's format (an existing folder wins), `ARCH/TAG`, `ARCH/FILE` as in
        `ViT-B-32//path/to/weights.pt` (OpenAI's take `ViT-B-32-quickgelu`), or `hf-hub:ID`
    `goals`: G of them, each a prompt, or a sequence of prompts whose mean embedding is the goal
    `baseline`: a prompt for what all goals have in common, such as "a humanoid robot"
    `alpha`: strength of the goal-baseline regularisation, 0 to 1
    `precision`: `fp32`, or `bf16` autocast for the frames (prompts are encoded once, in float32)
    `batch_size`: frames per pass through CLIP; bounds the memory, not the number of frames. Unset
        it is 128, and 32 on a CPU, whose caches a small CLIP's features of 32 frames still fit
    `compile`: torch.compile the image tower

    Raises ValueError for a model that cannot be loaded, a value out of range, and, while alpha > 0,
    a goal that equals the baseline.
    """

    def __init__(
        self,
        model: str,
        goals: Sequence[str | Sequence[str]],
        baseline: str,
        alpha: float = 0.0,
        device: str | torch.device = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
        batch_size: int | None = None,
        compile: bool = False,
    ):
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"--alpha {alpha}: must be from 0 (plain cosine) to 1")
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision {precision!r}: must be fp32 or bf16")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: must be at least 1")
        if isinstance(goals, str) or not goals:
            raise ValueError(f"goals {goals!r}: must be a sequence of at least one prompt")
        self.model, self.alpha = model, alpha
        self.precision, self.batch_size = precision, batch_size

        self.clip, self.tokenizer, self.preprocessing = load_clip(model, device)
        self.clip.requires_grad_(False)
        self.temperature = 1 / self.clip.logit_scale.exp().item()  # of the loss it was trained with
        if isinstance(self.clip.visual, ModifiedResNet):
            fold_batch_norms(self.clip.visual)
            self.dense_layer4 = without_stride(self.clip.visual.layer4)
        if compile:
            self.clip.visual.compile()
            self._tower_and_cells = torch.compile(self._tower_and_cells)
        words = Path(model) / "vocabulary.txt"
        self.vocabulary = set(words.read_text().split()) if words.is_file() else None

        # (x / 255 - mean) / std as one multiply-add on bytes, x * scale + shift
        mean_std = [self.preprocessing["mean"], self.preprocessing["std"]]
        mean, std = torch.tensor(mean_std, device=device).view(2, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

        g = torch.stack([self.encode_text(prompts).mean(0) for prompts in goals])
        self.register_buffer("goal", F.normalize(g, dim=-1), persistent=False)  # [G, D]
        self.register_buffer("baseline", self.encode_text(baseline)[0], persistent=False)  # [D]
        for prompts, g in zip(goals, self.goal, strict=True):
            # Not ==: the last bits of an embedding may depend on the batch it was computed in.
            if alpha > 0 and torch.dist(g, self.baseline) < 1e-4:
                raise ValueError(
                    f"--baseline {baseline!r}: CLIP does not tell it from the goal {prompts!r}, so"
                    " no line runs through the two; change one of them, or take alpha 0"
                )

    @torch.no_grad()
    def encode_text(self, prompts: str | Sequence[str]) -> torch.Tensor:
        """P prompts (or a single one) -> unit-norm float32 [P, D].

        Warns of a prompt with a word that is missing from a model folder's `vocabulary.txt`, and of
        one that CLIP does not read to its end.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        for prompt in prompts if self.vocabulary else []:
            unknown = sorted(set(re.findall(r"\w+", prompt.lower())) - self.vocabulary)
            if unknown:
                warnings.warn(
                    f"this CLIP was never taught the word(s) {', '.join(map(repr, unknown))}: it "
                    f"cannot judge {prompt!r}; pass a real CLIP, e.g. --clip-model "
                    "ViT-bigG-14/laion2b_s39b_b160k",
                    stacklevel=3,  # past torch.no_grad's wrapper
                )
        tokens = self.tokenizer(prompts)  # [P, L], cut at L
        longer = self.tokenizer([f"{prompt} robot" for prompt in prompts])
        for prompt, full in zip(prompts, (tokens == longer).all(1), strict=True):
            if full:
                warnings.warn(
                    f"{prompt!r} fills the {tokens.shape[1]} tokens that this CLIP reads: it does "
                    "not see what comes after; write a shorter one",
                    stacklevel=3,
                )
        tokens = tokens.to(self.scale.device)
        return F.normalize(self.clip.encode_text(tokens).float(), dim=-1)

    def encode_frames(self, frames: np.ndarray | torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3], numpy or torch, on any device -> unit-norm float32 [B, D]."""
        s = self._in_batches(self.clip.encode_image, frames)
        nothing = torch.empty(0, self.goal.shape[-1], device=self.goal.device)  # for B = 0
        return F.normalize(torch.cat([nothing, *s]).float(), dim=-1)

    def encode_maps(
        self, frames: np.ndarray | torch.Tensor, side: int = 8
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [B, D] as of `encode_frames`, and of each cell of a frame, [B, h, w, D], which
        is at most `side` cells high and wide.

        They have unit norm too: the product of a cell's and a prompt's embedding says how well the
        cell shows what the prompt names (MaskCLIP, arXiv 2112.01071). Raises ValueError for an
        image tower other than CLIP's ResNet or ViT.
        """
        visual = self.clip.visual
        known = isinstance(visual, (ModifiedResNet, VisionTransformer))
        if not known or getattr(visual, "attn_pool", None) is not None:  # CoCa's ViT has one
            raise ValueError(
                f"--clip-model {self.model}: its {type(visual).__name__} does not embed the cells "
                "of a frame; take one with CLIP's ResNet or ViT, or --policy-input pixels"
            )
        outputs = self._in_batches(self._tower_and_cells, frames)
        s, x = (torch.cat(parts).float() for parts in zip(*outputs, strict=True))
        x = x.permute(0, 3, 1, 2)  # [B, D, h, w]
        x = F.adaptive_avg_pool2d(x, [min(side, length) for length in x.shape[-2:]])
        return F.normalize(s, dim=-1), F.normalize(x, dim=1).permute(0, 2, 3, 1)

    def _tower_and_cells(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the image tower makes of images, [B, D], and of their cells [B, h, w, D], of which
        each attends in the last layer to itself alone."""
        visual = self.clip.visual
        if isinstance(visual, ModifiedResNet):
            x = visual.layer3(visual.layer2(visual.layer1(visual.stem(images))))
            x, pool = self.dense_layer4(x), visual.attnpool
            # Two linear maps in a row, with no attention between them, are one.
            weight = pool.c_proj.weight @ pool.v_proj.weight
            cells = F.linear(x.permute(0, 2, 3, 1), weight, pool.c_proj(pool.v_proj.bias))
            return pool(x[..., ::2, ::2]), cells  # every second cell is layer4's own output
        output = self.clip.forward_intermediates(images, image_indices=2)  # of the last two layers
        x = output["image_intermediates"][0]  # [B, C, h, w], which the last layer reads
        n = x.shape[-2] * x.shape[-1]
        itself = torch.full((n, n), -math.inf, device=x.device).fill_diagonal_(0)
        tokens = visual.transformer.resblocks[-1](x.flatten(2).mT, attn_mask=itself)  # [B, n, C]
        cells = (visual.ln_post(tokens) @ visual.proj).unflatten(1, x.shape[-2:])
        return output["image_features"], cells

    @torch.no_grad()
    def _in_batches(self, tower: Callable, frames: np.ndarray | torch.Tensor) -> list:
        """What an image tower makes of each batch of frames."""
        if isinstance(frames, np.ndarray):
            # torch takes neither the flipped views of a renderer nor read-only arrays.
            frames = torch.from_numpy(np.require(frames, requirements=["C", "W"]))
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"frames {frames.dtype} {list(frames.shape)}: not uint8 [B, H, W, 3]")
        device = self.goal.device
        frames, outputs = frames.to(device, non_blocking=True), []  # at once if it is pinned
        size = self.batch_size or (32 if device.type == "cpu" else 128)
        for start in range(0, len(frames), size):
            images = self.preprocess(frames[start : start + size])
            with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                outputs.append(tower(images))
        return outputs

    def preprocess(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, 3, h, w], as open_clip's PIL transform would do it."""
        images, settings = frames.permute(0, 3, 1, 2), self.preprocessing
        height, width = images.shape[-2:]
        h, w = [settings["size"]] * 2 if isinstance(settings["size"], int) else settings["size"]
        if settings["resize_mode"] == "squash":
            resized = (h, w)
        else:
            # "shortest" covers h x w, and torchvision rounds down; "longest" fits into it, and
            # open_clip rounds to the nearest.
            covers = settings["resize_mode"] == "shortest"
            scale = (max if covers else min)(Fraction(h, height), Fraction(w, width))
            whole = int if covers else round
            resized = (max(1, whole(height * scale)), max(1, whole(width * scale)))
        if resized != (height, width):
            # A CPU resizes bytes as PIL does, ten times faster than floats; CUDA knows only floats.
            images = images.float() if images.is_cuda else images
            mode = "bilinear" if settings["interpolation"] == "bilinear" else "bicubic"
            images = F.interpolate(images, resized, mode=mode, antialias=True)
            images = images.clamp(0, 255).round()  # bicubic overshoots, and PIL keeps bytes
        images = center_crop_or_pad(images, (h, w), fill=settings["fill_color"])
        return torch.addcmul(self.shift, images.float(), self.scale)

    @torch.no_grad()
    def forward(self, frames: np.ndarray | torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> goal-baseline rewards [B, G]."""
        s = self.encode_frames(frames)  # [B, D]
        return goal_baseline_reward(s, self.goal, self.baseline, self.alpha)


@dataclass
class Args:
    """Print the reward of each image for several alphas, and write a contact sheet, best first."""

    images: tyro.conf.Positional[tuple[Path, ...]]  # files, best of goals reached and goals missed
    goal: str  # prompt for what the agent should do
    baseline: str  # prompt for what every image shows, such as "a humanoid robot"
    clip_model: str = str(Path(__file__).parent / "tests" / "tiny_clip")
    """a model folder, ARCH/TAG, ARCH/FILE or hf-hub:ID"""
    output: Path = Path("contact_sheet.png")  # file for the contact sheet


def check(condition: object, message: str) -> None:
    if not condition:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def contact_sheet(images: list[Image.Image], captions: list[str], tile: int = 224) -> Image.Image:
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * tile, rows * (tile + 24)), "white")
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * tile, i // columns * (tile + 24)
        sheet.paste(ImageOps.pad(image, (tile, tile), color="white"), (x, y))
        ImageDraw.Draw(sheet).text((x + 4, y + tile + 3), caption, fill="black", font_size=14)
    return sheet


def main(args: Args) -> None:
    check(args.images, "IMAGES: none given; add image files, e.g. frames/*.png")
    check(args.goal.strip(), "--goal '': empty; describe the goal in a few words")
    check(args.baseline.strip(), "--baseline '': empty; describe what every image shows")
    images = []
    for path in args.images:
        try:
            images.append(Image.open(path).convert("RGB"))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # all of PIL's
            check(False, f"IMAGES {path}: {error}; pass files that PIL can read, such as PNG")
    alphas = (0.0, 0.25, 0.5, 0.75, 1.0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        reward = CLIPReward(args.clip_model, [args.goal], args.baseline, max(alphas), device)
    except ValueError as error:
        check(False, str(error))

    s = torch.cat([reward.encode_frames(np.asarray(image)[None]) for image in images])  # [B, D]
    g, b = reward.goal, reward.baseline
    rewards = torch.cat([goal_baseline_reward(s, g, b, alpha) for alpha in alphas], dim=1)
    order = rewards[:, 0].argsort(descending=True).tolist()
    print("reward of each image, best first at alpha = 0")
    print(*(f"alpha={alpha:<5g}" for alpha in alphas), "image")
    for i in order:
        print(*(f"{r:<11.4f}" for r in rewards[i].tolist()), args.images[i])

    captions = [f"{rewards[i, 0]:.4f}  {args.images[i].name}" for i in order]
    try:
        contact_sheet([images[i] for i in order], captions).save(args.output)
    except (OSError, ValueError) as error:
        check(False, f"--output {args.output}: {error}; pass a .png file in an existing folder")
    print(f"contact sheet: {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
