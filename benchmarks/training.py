"""Training steps of main.py, in turns with those of a bare loop within one run, and loaders."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import Alternated, Pair, Sample, Work, flop_counter, in_process, synchronize
from benchmarks.models import Models
from ldm.data.datamodule import DataModuleFromConfig
from ldm.inference.precision import has_bfloat16
from ldm.models.cached import EMBEDDING, MOMENTS
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.training.session import run_training
from scripts import cache_latents

QUICKSTART = ["--base", "configs/quickstart/text2image.yaml", "-t"]
CALLBACK = "benchmarks.training.Alternate"
FINETUNE = "configs/stable-diffusion/v1-finetune.yaml"


class Parts(NamedTuple):
    """The modules of a bare loop."""

    latents: Callable[[Any], Tensor]  # batch -> z (B, c, h, w), scaled
    context: Callable[[Any], Tensor]  # batch -> (B, L, D)
    predict: Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_noisy, t, context) -> (B, c, h, w)
    trained: list[torch.nn.Parameter]
    predicts_v: bool = False


class Alternate(Callback):
    """After each block of the Trainer's steps, as many of a bare loop on its own batches of the same dataset."""

    parts: ClassVar[list[Callable[[Any], Parts]]]  # of the model that is trained
    block: ClassVar[int]
    repeat: ClassVar[int]
    seconds: ClassVar[float]
    pairs: ClassVar[list[Pair]]
    flop: ClassVar[float]  # of a block

    def on_train_start(self, trainer: Any, model: Any) -> None:
        type(self).pairs = []
        self.steps, self.end = 0, time.perf_counter() + self.seconds
        self.bare = bare_loop(self.parts[0](model), model, trainer.datamodule)
        for _ in range(2):
            next(self.bare)
        with flop_counter() as counter:
            next(self.bare)
        type(self).flop = counter.get_total_flops() * self.block
        self.mark(model.device)

    def mark(self, device: torch.device) -> None:
        synchronize(device)
        self.clock = time.perf_counter(), time.process_time()

    def sample(self, device: torch.device) -> Sample:
        synchronize(device)
        return Sample(time.perf_counter() - self.clock[0], time.process_time() - self.clock[1])

    def on_train_batch_end(self, trainer: Any, model: Any, *_: Any) -> None:
        self.steps += 1
        if self.steps % self.block == 0:
            ours = self.sample(model.device)
            self.mark(model.device)
            for _step in range(self.block):
                next(self.bare)
            self.pairs.append((ours, self.sample(model.device)))
            trainer.should_stop = len(self.pairs) > self.repeat or time.perf_counter() > self.end
            self.mark(model.device)


def bare_loop(parts: Parts, model: Any, data: Any) -> Iterator[Tensor]:
    """Yield the loss after each step: load, encode, add noise, predict, mean squared error, AdamW. No EMA, no logs."""
    optimizer = torch.optim.AdamW(parts.trained, lr=1e-5, fused=True)
    alphas, device = model.alphas_cumprod.clone(), model.device
    dtype = torch.bfloat16 if "bf16" in str(model.trainer.precision) else None
    options = {
        "num_workers": data.num_workers,
        "persistent_workers": data.num_workers > 0,
        "pin_memory": device.type == "cuda",
    }
    loader = DataLoader(data.datasets["train"], data.batch_size, shuffle=True, **options)
    while True:
        for batch in loader:
            moved = {name: x.to(device, non_blocking=True) if torch.is_tensor(x) else x for name, x in batch.items()}
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                with torch.no_grad():
                    z = parts.latents(moved).float()
                t = torch.randint(len(alphas), (len(z),), device=device)
                noise, alpha = torch.randn_like(z), alphas[t][:, None, None, None]
                out = parts.predict(alpha.sqrt() * z + (1 - alpha).sqrt() * noise, t, parts.context(moved))
            target = alpha.sqrt() * noise - (1 - alpha).sqrt() * z if parts.predicts_v else noise
            loss = torch.nn.functional.mse_loss(out.float(), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            yield loss.detach()


def run(
    argv: list[str], make_parts: Callable[[Any], Parts], block: int, repeat: int, seconds: float
) -> tuple[list[Pair], float]:
    """Train by main.py's own code with `Alternate` among the callbacks -> (pairs of blocks, operations of a block)."""
    Alternate.parts = [make_parts]
    Alternate.block, Alternate.repeat, Alternate.seconds = block, repeat, seconds
    argv = [*argv, "--allow-targets", "benchmarks", f"+lightning.callbacks.alternate.target={CALLBACK}"]
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        code = run_training(argv)
    if code or len(Alternate.pairs) < 2:
        raise RuntimeError(f"main.py: exit code {code}: {printed.getvalue().strip().splitlines()[-1]}")
    return Alternate.pairs[1:], Alternate.flop


def quickstart(models: Models) -> Alternated:
    """The quickstart's text-to-image model with every default: logs, EMA, checks, image logs, checkpoints."""

    def parts(model: Any) -> Parts:
        unet, stage, encoder = (
            deepcopy(part) for part in (model.model.diffusion_model, model.first_stage_model, model.cond_stage_model)
        )

        def latents(batch: Any) -> Tensor:
            return stage.encode(batch["image"].permute(0, 3, 1, 2)).sample() * float(model.scale_factor)

        return Parts(
            latents,
            lambda batch: encoder.encode(batch["caption"]),
            lambda x, t, c: unet(x, t, context=c),
            [*unet.parameters(), *encoder.parameters()],
            predicts_v=True,
        )

    block, (device, logs) = (2 if models.size == "tiny" else 20), _where(models)
    argv = [*QUICKSTART, *device, "-l", str(logs), "model.params.untrained_first_stage=true"]
    return Alternated(
        "training step of the quickstart's model, batch 32",
        "step",
        block,
        lambda repeat, seconds: run(argv, parts, block, repeat, seconds),
        against="a bare loop",
    )


def finetune(models: Models, side: int, cached: bool) -> Alternated:
    """Stable Diffusion's UNet on a captioned folder, or on its cached latents and embeddings, beside diffusers'."""
    models.release()
    if models.device.type == "cpu" and models.size == "full":
        models = replace(models, size="small")  # 860 M parameters train for minutes a step
    side = side if models.size == "full" else side // 4 if models.size == "small" else models.side
    batch = {"full": 64 * 256**2 // side**2, "small": 4}.get(models.size, 2)
    folder = captioned_folder(models.folder / f"images-{side}-{batch}", side, 32 * batch)
    device, logs = _where(models)
    overrides = [f"data.params.train.params.root={folder}", f"data.params.train.params.size={side}"]
    overrides += [f"data.params.batch_size={batch}", "data.params.train.params.split=null"]
    overrides += [f"model.params.ckpt_path={models.file}", *models.overrides, "~data.params.validation"]
    workers = "0" if models.device.type == "cpu" else "8"
    base = [FINETUNE]
    if cached:
        out = models.folder / f"cache-{models.size}-{side}"
        words = ["--base", FINETUNE, "--out", str(out), "--device", str(models.device), "--num_workers", workers]
        cache_latents.main([*words, *overrides])
        base.append(str(out / "data.yaml"))
        overrides = [word for word in overrides if not word.startswith("data.params.train.")]
    bf16 = has_bfloat16(models.device)
    argv = ["--base", *base, "-t", *device, "-l", str(logs), *overrides, f"+data.params.num_workers={workers}"]
    argv += [f"lightning.trainer.precision={'bf16-mixed' if bf16 else '32-true'}"]
    argv += ["lightning.trainer.accumulate_grad_batches=1", "+lightning.trainer.enable_checkpointing=false"]
    argv += ["lightning.callbacks.image_logger=null", "model.params.unet_config.params.use_checkpoint=false"]

    def parts(model: Any) -> Parts:
        pipe = models.diffusers("fp32")
        pipe.unet.train().requires_grad_(True)

        def latents(batch: Any) -> Tensor:
            if cached:
                posterior = DiagonalGaussianDistribution(batch[MOMENTS].float())
            else:
                posterior = pipe.vae.encode(batch[model.first_stage_key].permute(0, 3, 1, 2)).latent_dist
            return posterior.sample() * pipe.vae.config.scaling_factor

        @torch.no_grad()
        def context(batch: Any) -> Tensor:
            if cached:
                return batch[EMBEDDING].float()
            options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
            tokens = pipe.tokenizer(batch[model.cond_stage_key], **options).input_ids
            return pipe.text_encoder(tokens.to(models.device))[0]

        trained = list(pipe.unet.parameters())
        return Parts(latents, context, lambda x, t, c: pipe.unet(x, t, encoder_hidden_states=c).sample, trained)

    kind, block = "cached latents" if cached else "images", 2 if models.size == "tiny" else 5
    return Alternated(
        f"training on {kind}, {side}x{side}, batch {batch}, {'bf16' if bf16 else 'fp32'}",
        "image",
        block * batch,
        lambda repeat, seconds: run(argv, parts, block, repeat, seconds),
        against="diffusers in a bare loop",
        dtype=torch.bfloat16 if bf16 else torch.float32,
        size=models.size,
    )


def _where(models: Models) -> tuple[list[str], Path]:
    device = ["--accelerator", "cpu"] if models.device.type == "cpu" else ["--gpus", "0,"]
    return device, models.folder / "logs"


def captioned_folder(folder: Path, side: int, count: int) -> Path:
    """Write JPEGs of 4:3 with a text file each, 16 different ones, whose shorter side is 1.5 times `side`."""
    random, different = np.random.default_rng(0), []
    for _ in range(16):
        small = Image.fromarray(random.integers(0, 256, (side // 8, side // 6, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((side * 2, side * 3 // 2), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        different.append(file.getvalue())
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        (folder / f"{k:05}.jpg").write_bytes(different[k % 16])
        (folder / f"{k:05}.txt").write_text(f"a photograph of thing number {k % 16}", encoding="utf-8")
    return folder


class TorchvisionFolder(Dataset):
    """Images and captions by torchvision's transforms, as in diffusers' training scripts."""

    def __init__(self, folder: Path, side: int) -> None:
        from torchvision import transforms

        self.files = sorted(folder.glob("*.jpg"))
        resize = transforms.Resize(side, interpolation=transforms.InterpolationMode.LANCZOS)
        steps = [resize, transforms.RandomCrop(side), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        file = self.files[index]
        with Image.open(file) as image:
            pixels = self.transform(image.convert("RGB"))
        return {"image": pixels, "caption": file.with_suffix(".txt").read_text(encoding="utf-8")}


def loader(models: Models, side: int = 512) -> Work:
    """An epoch of a captioned folder in this process, without workers: the work of one core."""
    side, count = (models.side, 4) if models.size == "tiny" else (side, 32)
    folder = captioned_folder(models.folder / f"images-{side}", side, count)
    params = {"root": str(folder), "captions": "sidecar", "size": side, "random_crop": True, "split": None}
    data = DataModuleFromConfig(4, {"target": "ldm.data.folder.ImageFolder", "params": params}, num_workers=0)
    data.setup("fit")
    ours: Any = data.train_dataloader()
    files = TorchvisionFolder(folder, side)
    theirs = DataLoader(files, 4, shuffle=True)

    def epoch(batches: Any) -> Callable[[], Tensor]:
        return lambda: torch.tensor(sum(len(batch["caption"]) for batch in batches))

    device = torch.device("cpu")
    return Work(
        f"loader, {side}x{side} from JPEGs, one process",
        "image",
        len(files),
        in_process(epoch(ours), device),
        in_process(epoch(theirs), device),
        exact=True,
        against="torchvision",
    )
