"""From a filled form to a job: the script's request, checked, and the images that it gives."""

from __future__ import annotations

import hashlib
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from PIL import Image, ImageChops

from ldm import inference
from ldm.atomic import save_bytes
from ldm.config.instantiate import value_at
from ldm.config.model_info import ModelInfo
from ldm.inference import cli, requests
from ldm.output.images import GeneratedImage, Output, png_bytes
from ldm.web.form import Form, check_share, parse_classes, takes_depth
from ldm.web.jobs import RUNNING, Job
from ldm.web.models import Choice, Loaded, Shelf

if TYPE_CHECKING:
    from torch import Tensor

PREVIEW_EVERY = 0.4  # seconds

Generate = Callable[[Loaded, inference.Pipeline], Iterable[GeneratedImage]]


class Uploads(NamedTuple):
    """Uploads and choices of a task besides its settings; None if there are none."""

    image: str | None = None  # a file
    depth: str | None = None  # a file, for depth-to-image models
    drawn: Mapping[str, Any] | None = None  # the editor's `background` and `layers`, PIL images
    controlnet: str | None = None  # by the name that the page offers


class Run(NamedTuple):
    """A checked form: the sampler's steps over all batches, the number of images, and how they are generated."""

    steps: int
    images: int
    generate: Generate
    files: Mapping[str, cli.Files] = {}  # that the images are made from, for the metadata
    shown: Image.Image | None = None  # the hint of a ControlNet


def plan(
    form: Form, values: Mapping[str, Any], uploads: Uploads, info: ModelInfo, names: Sequence[str], inputs: Path
) -> Run:
    """The run that a form asks for, by the request of its script. Raises ValueError with the script's words.

    names: of the model's classes. inputs: folder for uploaded images, so that the metadata name a file that stays.
    """
    opt, kind = form.options(values), form.task.request
    if kind is requests.ClassConditionalRequest:
        return _of_classes(opt, info, names)
    if kind is requests.InpaintRequest:
        return _inpainting(opt, info, uploads, inputs)
    if kind is requests.UpscaleRequest:
        return _upscaling(opt, info, uploads, inputs)
    if kind is requests.ControlRequest:
        return _controlled(opt, info, uploads, inputs)
    if kind is requests.TextToImageRequest:
        request = kind(**cli.request_fields(opt, kind)).checked(info)
        return _of_text(request, lambda loaded, pipeline: inference.text_to_image(pipeline, request, progress=False))
    return _from_image(opt, kind, info, uploads, inputs)


def _of_text(request: Any, generate: Generate, steps: int | None = None, **rest: Any) -> Run:
    batches = request.batches
    count = batches[-1].indices.stop
    check_share(count, *request.size)
    return Run(len(batches) * (request.steps if steps is None else steps), count, generate, **rest)


def _of_classes(opt: Namespace, info: ModelInfo, names: Sequence[str]) -> Run:
    kind = requests.ClassConditionalRequest
    request = kind(**cli.request_fields(opt, kind, classes=parse_classes(opt.classes, names))).checked(info)
    assert request.steps is not None
    check_share(request.n_samples, *(side * (info.factor or 1) for side in info.image_size))
    steps = info.timesteps if request.vanilla else request.steps

    def generate(loaded: Loaded, pipeline: inference.Pipeline) -> Iterable[GeneratedImage]:
        for image in inference.generate_samples(pipeline, request, progress=False):
            number = image.info["class"]
            named = {"class_name": names[number]} if number is not None and number < len(names) else {}
            yield image._replace(info={**image.info, **named})

    return Run(-(-request.n_samples // request.batch_size) * steps, request.n_samples, generate)


def _from_image(opt: Namespace, kind: Any, info: ModelInfo, uploads: Uploads, inputs: Path) -> Run:
    """Image to image, and edits by instructions."""
    image = _uploaded(uploads.image, "--init-img", info.multiple)
    if kind is requests.EditRequest:
        if not opt.prompt:
            raise ValueError('--prompt: pass an instruction, e.g. "make it winter"')
        request = kind(**cli.request_fields(opt, kind)).fitted(image.height, image.width, info).checked(info)
        saved = {"init_img": keep(image, inputs)}
        return _of_text(request, lambda _, pipeline: inference.edit(pipeline, image, request, False), files=saved)
    by_depth = takes_depth(info)
    if by_depth and uploads.depth is None:
        raise ValueError("--depth: this model is conditioned on depth; upload a depth map (near is bright)")
    depth = inference.find_depth(cast(str, uploads.depth), image.size) if by_depth else None
    request = kind(**cli.request_fields(opt, kind, depth=by_depth)).fitted(image.height, image.width, info)
    request = request.checked(info)
    saved = {"init_img": keep(image, inputs)}
    if by_depth:
        saved["depth"] = keep(Image.open(cast(str, uploads.depth)), inputs)

    def generate(loaded: Loaded, pipeline: inference.Pipeline) -> Iterable[GeneratedImage]:
        return inference.image_to_image(pipeline, image, request, depth, False)

    return _of_text(request, generate, request.encode_steps, files=saved)


def _inpainting(opt: Namespace, info: ModelInfo, uploads: Uploads, inputs: Path) -> Run:
    kind = requests.InpaintRequest
    request = kind(**cli.request_fields(opt, kind)).checked(info)
    image, mask = drawn_mask(uploads.drawn)
    saved = {"init_img": keep(image, inputs), "mask": keep(mask, inputs)}
    inference.check_pairs([(Path(saved["init_img"]), Path(saved["mask"]))], info.multiple)

    def generate(loaded: Loaded, pipeline: inference.Pipeline) -> Iterable[GeneratedImage]:
        yield inference.inpaint(pipeline, image, mask, request, False)

    return Run(request.steps or 0, 1, generate, saved)


def _upscaling(opt: Namespace, info: ModelInfo, uploads: Uploads, inputs: Path) -> Run:
    kind = requests.UpscaleRequest
    request = kind(**cli.request_fields(opt, kind)).checked(info)
    image = _uploaded(uploads.image, "--init-img", info.latent_multiple)
    factor = info.factor or 1
    check_share(1, factor * image.height, factor * image.width)

    def generate(loaded: Loaded, pipeline: inference.Pipeline) -> Iterable[GeneratedImage]:
        yield inference.upscale(pipeline, image, request, False)

    return Run(request.steps or 0, 1, generate, {"init_img": keep(image, inputs)})


def _controlled(opt: Namespace, info: ModelInfo, uploads: Uploads, inputs: Path) -> Run:
    own = value_at(info.config, "model", "params", "control_stage_config") is not None
    if own == (uploads.controlnet is not None):
        text = "the model has its own; choose none" if own else "choose one of the ControlNets"
        raise ValueError(f"--controlnet: {text}")
    request, hint = hint_of(opt, info, uploads)
    image = _uploaded(uploads.image, "--control-image", info.multiple)
    saved: dict[str, cli.Files] = {"control_image": [keep(image, inputs)], "depth_model": opt.depth_model}

    def generate(loaded: Loaded, pipeline: inference.Pipeline) -> Iterable[GeneratedImage]:
        return inference.control_to_image(pipeline, [hint], request, loaded.controlnets, False)

    return _of_text(request, generate, files=saved, shown=hint)


def hint_of(opt: Namespace, info: ModelInfo, uploads: Uploads) -> tuple[Any, Image.Image]:
    """The request under a ControlNet, and the hint that its detector makes of the uploaded image."""
    kind = requests.ControlRequest
    several = {"control_scale": tuple(opt.control_scale or [1.0]), "detector": tuple(opt.detector or ["none"])}
    request = kind(**cli.request_fields(opt, kind, canny=tuple(opt.canny), **several))
    image = _uploaded(uploads.image, "--control-image", info.multiple)
    request = request.fitted(image.height, image.width, info).checked(info)
    check_share(1, *request.size)
    (hint,) = inference.make_hints([image], request, opt.depth_model)
    return request, hint


def _uploaded(path: str | None, flag: str, multiple: int) -> Image.Image:
    if path is None:
        raise ValueError(f"{flag}: upload an image first")
    return inference.check_image(path, flag, multiple)


def drawn_mask(drawn: Mapping[str, Any] | None) -> tuple[Image.Image, Image.Image]:
    """The image of an editor, RGB, and its mask, 255 where a layer is drawn on. Raises ValueError as `check_share`."""
    background = None if drawn is None else drawn.get("background")
    if drawn is None or background is None:
        raise ValueError("--init-img: upload an image first, and paint over what is to be generated")
    check_share(1, background.height, background.width)  # before anything of this size is made
    mask = Image.new("L", background.size)
    for layer in drawn.get("layers") or ():
        alpha = layer.convert("RGBA").getchannel("A").resize(background.size, Image.Resampling.NEAREST)
        mask = ImageChops.lighter(mask, alpha.point(lambda level: 255 if level >= 128 else 0))
    return background.convert("RGB"), mask


def keep(image: Image.Image, folder: Path) -> str:
    """Save an uploaded image under the hash of its content -> the path, which metadata name."""
    content = png_bytes(image)
    path = folder / f"{hashlib.sha256(content).hexdigest()[:16]}.png"
    if not path.is_file():
        save_bytes(path, content)
    return str(path)


def job_of(run: Run, shelf: Shelf, choice: Choice, folder: Path) -> Job:
    """The job that saves the images of a run in `folder`, as the scripts do."""

    def work(job: Job) -> None:
        loaded = shelf.load(choice)
        job.report(RUNNING)
        output = Output(folder, loaded.prepared.watermark, loaded.prepared.safety)
        last = -PREVIEW_EVERY

        def watch(x0: Tensor, i: int) -> None:
            nonlocal last
            job.step += 1
            now = time.perf_counter()
            if loaded.previews is not None and now - last >= PREVIEW_EVERY:
                job.preview, last = loaded.previews(x0), now
            job.report()

        pipeline = loaded.pipeline.watched(watch)
        pipeline.identity = {**pipeline.identity, **cli.record_files(**run.files)}
        for image in run.generate(loaded, pipeline):
            job.files.append(output.save_sample(image))
            job.report()

    return Job(work, run.steps, run.images)
