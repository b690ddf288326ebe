"""Evaluations of scripts/evaluate.py: of a model at one or several settings, of a first stage, of images."""

from __future__ import annotations

import hashlib
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.atomic import save_bytes, save_text
from ldm.checkpoint import WeightsSource, open_weights
from ldm.checkpoint.names import EMA
from ldm.config.model_info import ModelInfo, read_config
from ldm.data.datamodule import SPLITS
from ldm.data.image import load_image
from ldm.evaluation import first_stage, sweep
from ldm.evaluation.card import METRICS, Card, interval, shown
from ldm.evaluation.card import compare as compared
from ldm.evaluation.evaluate import (
    Measured,
    Real,
    clip_score,
    copies_of,
    figure_of,
    measure,
    real_of_features,
    real_of_images,
    real_of_statistics,
)
from ldm.evaluation.features import (
    METRIC_SIDE,
    Extractor,
    cached_features,
    default_extractor,
    features_of,
    make_extractor,
    trained_classifier,
)
from ldm.evaluation.figure import lettered, stacked
from ldm.evaluation.image_sets import (
    ArrayImages,
    DatasetImages,
    ImageSet,
    has_split,
    open_folder,
    open_split,
    read_npz,
)
from ldm.evaluation.plan import OUTPUTS, Point, of_model
from ldm.evaluation.sampling import Sampling, check_settings, saved_samples
from ldm.inference import cli
from ldm.inference.pipeline import Pipeline, identify
from ldm.inference.precision import choose_device
from ldm.inference.runs import SavedRun
from ldm.output.images import make_folder, png_bytes
from ldm.paths import find_file, fingerprint


def evaluate_model(
    opt: Namespace,
    run: SavedRun,
    info: ModelInfo,
    swept: dict[str, list[Any]],
    points: Sequence[Point],
    prepared: cli.Prepared,
) -> None:
    """Sample a model, once or at every point of a sweep, and write the cards."""
    require_ema(opt, prepared.weights)
    real = open_real(opt, run, tuple(side * (info.factor or 1) for side in info.image_size))
    conditions = real.held_out if real.held_out is not None else real.images
    identity = weights_of(opt, info, prepared)
    loaded: list[Pipeline] = []

    def pipeline() -> Pipeline:
        if not loaded:
            loaded.append(cli.load(opt, prepared))
        return loaded[0]

    root = Path(opt.outdir) if opt.outdir else OUTPUTS / default_name(opt, run, points[0], bool(swept))
    cards = []
    for point in points:
        folder = root / point.name if swept else root
        sampling = Sampling(point.request, info, conditions_of(info, conditions), opt.batch_size)
        if swept and (done := sweep.finished(folder, sampling.record, opt.n_samples, identity, data_record(real))):
            cards.append(done)
            continue
        settings = {**identity, "conditions": getattr(sampling.conditions, "fingerprint", None)}
        samples = saved_samples(folder / "samples", opt.n_samples, sampling, settings, pipeline)
        title = f"{run.folder.name}: {len(samples)} samples, {point.request.sampler}, {point.request.steps} steps"
        title += f", scale {point.request.scale:g}" if point.request.scale is not None else ""
        found = measure(samples, real, opt.batch_size)
        add_clip_score(opt, samples, found, [sampling.text(k) for k in range(len(samples))])
        found.seconds |= {"sampling": samples.seconds, "per sample": samples.seconds / len(samples)}
        cards.append(write_card(opt, folder, "samples", title, samples, real, found, sampling.record, identity))
    if swept:
        print(sweep.write(root, swept, points, cards))


def evaluate_images(opt: Namespace, run: SavedRun | None) -> None:
    """Compare images with real ones: a folder, an .npz, or a split of a run, which gives the floor of the metrics."""
    path = find_file(opt.images)
    images: ImageSet
    if run is not None and opt.images in SPLITS:
        images = open_split(run, opt.overrides, opt.images, "--images", limit=opt.n_real)
    elif path.is_dir():
        images = open_folder(path, "--images", opt.size, opt.n_real)
    elif path.is_file():
        arrays = read_npz(path, "--images")
        if "arr_0" not in arrays:
            raise ValueError(f"--images {path}: arr_0 (images) is missing")
        images = ArrayImages(str(path), arrays["arr_0"][: opt.n_real], arrays.get("arr_1"))
    else:
        raise FileNotFoundError(f"--images {opt.images}: no such file or folder; splits need the run in --ckpt")
    real = open_real(opt, run, images.image(0).shape[:2])
    folder = Path(opt.outdir) if opt.outdir else OUTPUTS / images.name.replace("/", "-").replace(" ", "-").strip("-.")
    identity = {"images": images.name, "fingerprint": images.fingerprint, "real": real.stats_name}
    check_settings(folder / "settings.json", identity)
    found = measure(images, real, opt.batch_size)
    write_card(opt, folder, "images", f"{len(images)} images: {images.name}", images, real, found)


def evaluate_first_stage(opt: Namespace, run: SavedRun) -> None:
    """Reconstruct held-out images with a first stage."""
    device, source = choose_device(opt.device), open_weights(run.ckpt)
    require_ema(opt, source)
    split = opt.held_out if opt.held_out not in (None, "none") else "validation"
    images = open_split(run, opt.overrides, split, "--held_out", limit=opt.n_samples)
    real = open_real(opt, run, None)
    weights = {**identify(source, run.configs[-1]), "step": source.step(), "use_ema": opt.use_ema}
    folder = Path(opt.outdir) if opt.outdir else OUTPUTS / run.folder.name
    check_settings(folder / "settings.json", {**weights, "images": images.fingerprint, "real": real.stats_name})
    model = first_stage.load_first_stage(read_config(run.configs, of_model(opt.overrides)), source, opt.use_ema, device)
    perceptual, reason = first_stage.load_lpips(device)
    start = time.perf_counter()
    found = first_stage.reconstruct(model, images, opt.batch_size, device, perceptual)
    seconds = time.perf_counter() - start
    originals = cached_features(Path(opt.cache), real.extractor, images)
    made = features_of(real.extractor, ArrayImages("reconstructions", found.images), opt.batch_size)

    card = Card(
        kind="first stage",
        title=f"{run.folder.name}: {len(images)} reconstructions of {images.name}",
        command=opt.command,
        metrics=first_stage.first_stage_metrics(found, originals, made),
        skipped={"lpips": reason} if reason else {},
        weights=weights,
        data={"images": f"{len(images)}, {images.name}", "fingerprint": images.fingerprint, **features_record(real)},
        latents=found.latents,
        seconds={"reconstruction": seconds, "per image": seconds / len(images)},
    )
    report(card, card.save(folder, first_stage.first_stage_figure(card.title, images, found, opt.seed)))


def compare_cards(opt: Namespace) -> None:
    """Write two cards side by side, as text and as a figure."""
    a, b = (Card.read(Path(path)) for path in opt.compare)
    paths = [path if path.is_dir() else path.parent for path in map(Path, opt.compare)]
    text = compared(a, b)
    digest = hashlib.sha256("\n".join(str(path.resolve()) for path in paths).encode()).hexdigest()[:8]
    name = f"compare-{paths[0].resolve().name}-and-{paths[1].resolve().name}-{digest}"
    folder = Path(opt.outdir) if opt.outdir else OUTPUTS / name
    figures = [lettered(letter, load_image(path / "card.png")) for letter, path in zip("AB", paths)]
    save_bytes(folder / "compare.png", png_bytes(stacked(figures, side_by_side=True)))
    print(text)
    print(f"compared in {save_text(folder / 'compare.md', text)}")


# --- parts


def default_name(opt: Namespace, run: SavedRun, point: Point, swept: bool) -> str:
    """Name of the folder of a model's card, by all that makes another card of it."""
    request, against = point.request, [opt.features, opt.real and Path(opt.real).stem]
    scale = f"-scale{request.scale:g}" if request.scale is not None else ""
    how = "sweep" if swept else f"{request.sampler}{request.steps}{scale}-seed{request.seed}"
    return "-".join([run.folder.resolve().name, how, *filter(None, against)])


def weights_of(opt: Namespace, info: ModelInfo, prepared: cli.Prepared) -> dict[str, Any]:
    """Identity of a model, for its card and its samples."""
    step, device = prepared.weights.step(), choose_device(opt.device).type
    others = {"step": step, "use_ema": opt.use_ema, "precision": opt.precision, "device": device}
    others |= {"quantize": opt.quantize, "lora": opt.lora or None, "embedding": opt.embedding or None}
    others |= {"lora_fingerprint": [fingerprint(path) for path, _ in prepared.lora] or None}
    others |= {"embedding_fingerprint": [fingerprint(path) for path, _ in prepared.embeddings] or None}
    others["overrides"] = of_model(opt.overrides) or None
    given = {name: value for name, value in others.items() if value is not None}
    return {**identify(prepared.weights, info.path), **given}


def require_ema(opt: Namespace, source: WeightsSource) -> None:
    """Raise ValueError if --use_ema asks for EMA weights that the file does not have."""
    if opt.use_ema and not source.averaged and not any(name.startswith(EMA) for name in source.tensors()):
        raise ValueError(f"--use_ema: {source.path} has no EMA weights; remove it")


def open_real(opt: Namespace, run: SavedRun | None, size: tuple[int, ...] | None) -> Real:
    """The real images, their features (cached), the classifier of their classes, and held-out images."""
    value, cache = opt.real or "train", Path(opt.cache)
    make_folder(cache)
    path = find_file(value)
    held_out = open_held_out(opt, run, value)
    images: ImageSet
    if run is not None and value in SPLITS:
        images = open_split(run, opt.overrides, value, "--real", limit=opt.n_real)
    elif path.is_dir():
        side = opt.size if opt.size or size is None or size[0] != size[1] else size[0]
        images = open_folder(path, "--real", side, opt.n_real)
    elif path.is_file():
        arrays = read_npz(path, "--real")
        if "arr_0" not in arrays:
            extractor = extractor_of(opt, None, None)
            if "features" in arrays:
                real = real_of_features(str(path), extractor, arrays["features"], held_out, cache)
            else:
                real = real_of_statistics(str(path), extractor, arrays["mu"], arrays["sigma"], held_out, cache)
            real.stats_name += f" ({fingerprint(path)})"
            check_dimensions(real, f"--real {path}", size or (METRIC_SIDE, METRIC_SIDE))
            return real
        images = ArrayImages(str(path), arrays["arr_0"][: opt.n_real], arrays.get("arr_1"))
    else:
        raise FileNotFoundError(f"--real {value}: no such file or folder; splits need the run in --ckpt")
    return real_of_images(images, lambda labels: extractor_of(opt, images, labels), held_out, cache, opt.batch_size)


def check_dimensions(real: Real, given: str, size: tuple[int, ...]) -> None:
    """Raise ValueError if features or statistics of a file have other dimensions than those of images of this size."""
    n, expected = len(real.stats.mean), real.extractor(torch.zeros(1, *size, 3, dtype=torch.uint8)).shape[1]
    if n != expected:
        text = f"{given}: its features have {n} dimensions, those of {real.extractor.name} have {expected}"
        raise ValueError(f"{text}; choose the file's with --features")


def open_held_out(opt: Namespace, run: SavedRun | None, real: str) -> DatasetImages | None:
    """The split of --held_out, by default validation; None without a run or such a split."""
    if run is None or opt.held_out == "none":
        return None
    split = opt.held_out or "validation"
    if opt.held_out is None and (split == real or not has_split(run, opt.overrides, split)):
        return None
    if split == real:
        raise ValueError(f"--held_out {split}: these are the real images of --real; choose another split, or none")
    return open_split(run, opt.overrides, split, "--held_out", limit=opt.n_real)


def extractor_of(opt: Namespace, images: ImageSet | None, labels: Any) -> Extractor:
    """The extractor of --features, or the default for these real images."""
    name = opt.features or default_extractor(labels)
    if name == "classifier":
        if images is None or labels is None:
            raise ValueError("--features classifier: the real images have no classes; choose another")
        return trained_classifier(Path(opt.cache), images, labels)
    weights = opt.clip_weights if name == "clip" and opt.clip_weights else opt.weights
    return make_extractor(name, weights, choose_device(opt.device), opt.clip_type)


def conditions_of(info: ModelInfo, images: Any) -> DatasetImages | None:
    """The set that gives the conditions of samples; None for unconditional models and without a dataset."""
    conditional = info.condition_name != "__is_unconditional__"
    if not conditional or not isinstance(images, DatasetImages):
        return None
    return None if info.n_classes is not None and images.label(0) is None else images


def add_clip_score(opt: Namespace, images: ImageSet, found: Measured, texts: Sequence[str | None]) -> None:
    """CLIP score of text-conditional samples, if CLIP's weights are given."""
    if None in texts:
        return
    if not opt.clip_weights:
        found.skipped["clip_score"] = "pass --clip_weights FILE"
        return
    device = choose_device(opt.device)
    prompts = [text for text in texts if text is not None]
    found.metrics["clip_score"] = clip_score(images, prompts, opt.clip_type, opt.clip_weights, device)


def features_record(real: Real) -> dict[str, Any]:
    return {"features": dict(real.extractor.identity), "dimensions": len(real.stats.mean)}


def data_record(real: Real) -> dict[str, Any]:
    """The real and the held-out images of a card, and their features."""
    record = {"real": real.stats_name, **features_record(real)}
    if real.held_out is not None:
        record["held_out"] = f"{len(real.held_out)}, {real.held_out.name} ({real.held_out.fingerprint[:16]})"
    if real.accuracy is not None:
        share = f"{shown('recognized', real.accuracy)} ({interval('recognized', real.accuracy)})"
        record["classifier"] = f"recognizes {share} of the held-out images"
    return record


def write_card(
    opt: Namespace,
    folder: Path,
    kind: str,
    title: str,
    images: ImageSet,
    real: Real,
    found: Measured,
    settings: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None,
) -> Card:
    """Write and print the card of samples or images."""
    data = {"images": f"{len(images)}, {images.name}", **data_record(real), **found.floor}
    card = Card(kind, title, opt.command, found.metrics, found.skipped, settings or {}, weights or {}, data)
    card.copies, card.seconds = copies_of(found), found.seconds
    report(card, card.save(folder, figure_of(title, images, real, found, opt.seed)))
    return card


def report(card: Card, path: Path) -> None:
    """Print a card's metrics."""
    print(f"\n{card.title}")
    width = max(len(METRICS[name].label) for name in card.metrics)
    for name, metric in card.metrics.items():
        print(f"{METRICS[name].label:{width}}  {shown(name, metric):>16}  {interval(name, metric)}".rstrip())
    for name, reason in card.skipped.items():
        print(f"{METRICS[name].label:{width}}  not measured: {reason}")
    print(f"card  {path.with_name('card.md')}")
