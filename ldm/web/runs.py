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
from ldm.config.model_info import ModelInfo
from ldm.inference import cli, requests
from ldm.output.images import GeneratedImage, Output, png_bytes
from ldm.web.form import Form, check_share, controls_of, parse_classes, takes_depth
from ldm.web.jobs import RUNNING, Job
from ldm.web.models import Choice, Loaded, Shelf

if TYPE_CHECKING:
    from torch import Tensor

PREVIEW_EVERY = 0.4  # seconds

Generate = Callable[[Loaded, inference.Pipeline], Iterable[GeneratedImage]]


class Run(NamedTuple):
    """A checked form: the sampler's steps over all batches, the number of images, and how they are generated."""

    steps: int
    images: int
    generate: Generate
    uploads: Mapping[str, Image.Image | list[Image.Image]] = {}  # that the images are made from, by their metadata
    files: Mapping[str, cli.Files] = {}  # of the server, likewise
    prompts: Sequence[str] = ()  # the negative prompt included


def plan(form: Form, values: Mapping[str, Any], info: ModelInfo, names: Sequence[str]) -> Run:
    """The run that a form asks for, by the request of its script. Raises ValueError with the script's words.

    values: the settings by the names of the form's fields, and the uploads: `image`, `depth`, `drawn`, and those of
    `controls_of`. names: of the model's classes.
    """
    opt, kind = form.options(values), form.task.request
    if kind is requests.ClassConditionalRequest:
        return _of_classes(opt, info, names)
    if kind is requests.InpaintRequest:
        run = _inpainting(opt, info, values)
    elif kind is requests.UpscaleRequest:
        run = _upscaling(opt, info, values)
    elif kind is requests.ControlRequest:
        run = _controlled(form, info, values)
    elif kind is requests.TextToImageRequest:
        request = kind(**cli.request_fields(opt, kind)).checked(info)
        run = _of_text(request, lambda loaded, pipeline: inference.text_to_image(pipeline, request, progress=False))
    else:
        run = _from_image(opt, kind, info, values)
    return run._replace(prompts=[opt.prompt, opt.negative_prompt])


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


def _from_image(opt: Namespace, kind: Any, info: ModelInfo, values: Mapping[str, Any]) -> Run:
    """Image to image, and edits by instructions."""
    image = _uploaded(values["image"], "--init-img", info.multiple)
    if kind is requests.EditRequest:
        if not opt.prompt:
            raise ValueError('--prompt: pass an instruction, e.g. "make it winter"')
        request = kind(**cli.request_fields(opt, kind)).fitted(image.height, image.width, info).checked(info)
        uploads = {"init_img": image}
        return _of_text(request, lambda _, pipeline: inference.edit(pipeline, image, request, False), uploads=uploads)
    by_depth, path = takes_depth(info), cast(str, values.get("depth"))
    if by_depth and path is None:
        raise ValueError("--depth: this model is conditioned on depth; upload a depth map (near is bright)")
    depth = inference.find_depth(path, image.size) if by_depth else None
    request = kind(**cli.request_fields(opt, kind, depth=by_depth)).fitted(image.height, image.width, info)
    request = request.checked(info)
    uploads = {"init_img": image, **({"depth": Image.open(path).copy()} if by_depth else {})}

    def generate(loaded: Loaded, pipeline: inference.Pipeline) -> Iterable[GeneratedImage]:
        return inference.image_to_image(pipeline, image, request, depth, False)

    return _of_text(request, generate, request.encode_steps, uploads=uploads)


def _inpainting(opt: Namespace, info: ModelInfo, values: Mapping[str, Any]) -> Run:
    kind = requests.InpaintRequest
    request = kind(**cli.request_fields(opt, kind)).checked(info)
    drawn = values["drawn"] or {}
    image = _uploaded(drawn.get("background"), "--init-img", info.multiple)
    check_share(1, image.height, image.width)
    mask = drawn_mask(image.size, drawn["layers"])

    def generate(loaded: Loaded, pipeline: inference.Pipeline) -> Iterable[GeneratedImage]:
        yield inference.inpaint(pipeline, image, mask, request, False)

    return Run(request.steps or 0, 1, generate, {"init_img": image, "mask": mask})


def _upscaling(opt: Namespace, info: ModelInfo, values: Mapping[str, Any]) -> Run:
    kind = requests.UpscaleRequest
    request = kind(**cli.request_fields(opt, kind)).checked(info)
    image = _uploaded(values["image"], "--init-img", info.latent_multiple)
    factor = info.factor or 1
    check_share(1, factor * image.height, factor * image.width)

    def generate(loaded: Loaded, pipeline: inference.Pipeline) -> Iterable[GeneratedImage]:
        yield inference.upscale(pipeline, image, request, False)

    return Run(request.steps or 0, 1, generate, {"init_img": image})


def _controlled(form: Form, info: ModelInfo, values: Mapping[str, Any]) -> Run:
    controls = list(controls_of(values).values())
    given = [sum(bool(row[name]) for row in controls) for name in ("controlnet", "image")]
    requests.require_controls(info, *given)
    own = sum(not row["controlnet"] for row in controls)
    if any(row["controlnet"] for row in controls[:own]):
        text = "the image of the model's own ControlNet comes first; choose the other ControlNets below it"
        raise ValueError(f"--controlnet: {text}")
    request, images, hints = hints_of(form, values, info, controls)

    def generate(loaded: Loaded, pipeline: inference.Pipeline) -> Iterable[GeneratedImage]:
        return inference.control_to_image(pipeline, hints, request, loaded.controlnets, False)

    files = {"depth_model": form.fixed.get("depth_model")}
    return _of_text(request, generate, uploads={"control_image": images}, files=files)


def hints_of(
    form: Form, values: Mapping[str, Any], info: ModelInfo, controls: Sequence[Mapping[str, Any]]
) -> tuple[requests.ControlRequest, list[Image.Image], list[Image.Image]]:
    """The request under ControlNets, their images, and the hints that the detectors make of these."""
    kind, several = requests.ControlRequest, ("control_scale", "detector")
    opt = form.options({**values, **{name: [row[name] for row in controls] for name in several}})
    images = [_uploaded(row["image"], "--control-image", info.multiple) for row in controls]
    tuples = {name: tuple(getattr(opt, name)) for name in (*several, "canny")}
    request = kind(**cli.request_fields(opt, kind, controls=len(images), **tuples))
    request = request.fitted(images[0].height, images[0].width, info).checked(info)
    check_share(1, *request.size)
    return request, images, inference.make_hints(images, request, opt.depth_model)


def _uploaded(path: str | None, flag: str, multiple: int) -> Image.Image:
    if path is None:
        raise ValueError(f"{flag}: upload an image first")
    return inference.check_image(path, flag, multiple)


def drawn_mask(size: tuple[int, int], layers: Iterable[str]) -> Image.Image:
    """The mask of an editor's layers, 255 where one is drawn on. Raises ValueError if none is."""
    mask = Image.new("L", size)
    for layer in layers:
        opened = Image.open(layer)
        if opened.width * opened.height > 4 * size[0] * size[1]:
            raise ValueError(f"--mask: {opened.width}x{opened.height} pixels for an image of {size[0]}x{size[1]}")
        alpha = opened.convert("RGBA").getchannel("A").resize(size, Image.Resampling.NEAREST)
        mask = ImageChops.lighter(mask, alpha.point(lambda level: 255 if level >= 128 else 0))
    if mask.getbbox() is None:
        raise ValueError("--mask: paint over what is to be generated")
    return mask


def keep(image: Image.Image, folder: Path) -> str:
    """Save an uploaded image under the hash of its content -> the path, which metadata name."""
    content = png_bytes(image)
    path = folder / f"{hashlib.sha256(content).hexdigest()[:16]}.png"
    if not path.is_file():
        save_bytes(path, content)
    return str(path)


def job_of(run: Run, shelf: Shelf, choice: Choice, folder: Path) -> Job:
    """The job that saves the images of a run in `folder`, as the scripts do, and its uploads beside it in inputs/."""

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
        if loaded.prepared.embeddings:
            inference.warn_unused(pipeline.model.cond_stage_model, run.prompts)
        inputs = folder.parent / "inputs"
        kept = {
            name: [keep(each, inputs) for each in upload] if isinstance(upload, list) else keep(upload, inputs)
            for name, upload in run.uploads.items()
        }
        pipeline.identity = {**pipeline.identity, **cli.record_files(**run.files, **kept)}
        for image in run.generate(loaded, pipeline):
            job.files.append(output.save_sample(image))
            job.report()

    return Job(work, run.steps, run.images)
