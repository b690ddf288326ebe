"""The runs of the paper's claims: which are needed, which are done, and the page that is made from them."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

from benchmarks import paper
from benchmarks.cpu_budget import CPUBudget
from benchmarks.paper import CLAIMS, DIGITS, RUNS, Samples, Study, config_of, execute, fingerprint, pending, plan
from benchmarks.paper_judge import request_of
from benchmarks.paper_page import Point, draw, finding, shown, write_page
from ldm.config.model_info import model_info
from ldm.config.validate import check_config

QUALITY = {"fid": 12.0, "precision": 0.5, "recall": 0.25, "recognized": 0.9, "sampling_cpu_seconds": 2.0}
REAL = {"training_images": 1442, "held_out_images": 355, "compared_with": 1442, "classes": 10, "features": "classifier"}


def write_result(out, run, seed, study=DIGITS, claims=tuple(CLAIMS)):
    result = {"run": run.name, "seed": seed, "fingerprint": fingerprint(run, study), "cpu_minutes": 1.5}
    result |= {"environment": {"machine": "two cores"}, "real": {**REAL, **QUALITY}}
    if run.diffusion:
        result["marks"] = [{"step": 100 * k, "cpu_seconds": 10.0 * k} for k in (1, 2, 3)]
        result["samples"] = [{**asdict(each), **QUALITY} for each in run.samples(claims)]
        result["parameters"] = 1_000_000
        Image.new("RGB", (320, 64)).save(out / f"{run.name}-scale1.png")
        Image.new("RGB", (320, 64)).save(out / f"{run.name}-scale2.png")
    else:
        result |= {"psnr": 28.0, "rfid": 3.0, "codes_used": 9, "training_cpu_seconds": 20.0}
    (out / f"{run.name}-{seed}.json").write_text(json.dumps(result))


@pytest.fixture
def class_folder(tmp_path):
    """Twenty images in each of two classes."""
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(20):
            pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{k}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("claim", CLAIMS)
def test_each_claim_trains_first_stages_before_the_models_on_them(claim):
    names = [run.name for run in plan([claim])]
    models = [run for run in plan([claim]) if run.diffusion]
    assert models and all(model.samples([claim]) for model in models)
    for model in models:
        if model.first_stage is not None:
            assert names.index(model.first_stage.name) < names.index(model.name)


def test_finished_runs_are_not_repeated_and_first_stages_only_for_models_that_miss_their_weights(tmp_path):
    out, work = tmp_path, tmp_path / "work"
    every = pending(out, work, DIGITS, [3], [1])
    assert [run.name for _, run in every] == ["kl-f4", "vq-f4", "latent-f4", "latent-vq-f4"]
    for _, run in every[:3]:
        write_result(out, run, 1)
    assert [run.name for _, run in pending(out, work, DIGITS, [3], [1])] == ["vq-f4", "latent-vq-f4"]
    (work / "1").mkdir(parents=True)
    (work / "1" / "vq-f4.ckpt").touch()
    assert [run.name for _, run in pending(out, work, DIGITS, [3], [1])] == ["latent-vq-f4"]
    assert len(pending(out, work, DIGITS, [3], [1, 2])) == 1 + len(every)


def test_a_claim_whose_samples_are_missing_repeats_its_run(tmp_path):
    latent = next(run for run in RUNS if run.name == "latent-f4")
    write_result(tmp_path, latent, 1, claims=[1, 4])
    assert paper.read_result(tmp_path, latent, DIGITS, 1, [4]) and paper.read_result(tmp_path, latent, DIGITS, 1)
    assert paper.read_result(tmp_path, latent, DIGITS, 1, [4, 5]) is None


def test_a_changed_setting_config_or_first_stage_invalidates_a_result(tmp_path, monkeypatch):
    run = next(run for run in RUNS if run.name == "latent-f4")
    write_result(tmp_path, run, 1)
    assert paper.read_result(tmp_path, run, DIGITS, 1)
    assert paper.read_result(tmp_path, replace(run, dropout=0.3), DIGITS, 1) is None
    assert paper.read_result(tmp_path, run, replace(DIGITS, stage_steps=100), 1) is None
    for changed, place in enumerate(DIGITS.configs):
        original = paper.load(place)
        original["model"]["base_learning_rate"] *= 2
        with monkeypatch.context() as patch:
            before = paper.load
            patch.setattr(paper, "load", lambda name, c=original, p=place, b=before: c if name == p else b(name))
            assert paper.read_result(tmp_path, run, DIGITS, 1) is None, changed


def test_changed_images_invalidate_a_result_and_a_moved_folder_does_not(class_folder, tmp_path):
    run, names = RUNS[0], []
    names.append(fingerprint(run, Study(class_folder)))
    moved = class_folder.rename(tmp_path / "moved")
    names.append(fingerprint(run, Study(moved)))
    Image.new("RGB", (32, 32)).save(moved / "a" / "100.png")
    names.append(fingerprint(run, Study(moved)))
    assert names[0] == names[1] != names[2]


def test_an_interrupted_run_leaves_no_result_and_no_files(tmp_path, monkeypatch):
    from types import SimpleNamespace

    def interrupted(run, study, seed, folder, stages):
        (folder / "0.ckpt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(paper, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute(RUNS[0], 1, tmp_path, SimpleNamespace(study=DIGITS), tmp_path, [1])
    assert not list(tmp_path.iterdir())


def check(run, study, folder):
    from omegaconf import OmegaConf

    from ldm.config.instantiate import allow_targets

    allow_targets("benchmarks")
    config = OmegaConf.create(config_of(run, study, folder, folder))
    if run.first_stage is not None:
        assert config.model.params.first_stage_config.params.ckpt_path == str(folder / f"{run.first_stage.name}.ckpt")
        config.model.params.first_stage_config.params.ckpt_path = None
    check_config(config, problems=True)
    return config


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_config_of_each_run_is_valid(run, tmp_path):
    check(run, DIGITS, tmp_path)


@pytest.mark.parametrize("run", [run for run in RUNS if run.diffusion], ids=lambda run: run.name)
def test_no_sample_is_of_the_class_that_means_no_class(run, tmp_path):
    info = model_info({"model": check(run, DIGITS, tmp_path).model})
    for each in run.samples(tuple(CLAIMS)):
        assert request_of(each, DIGITS, info, 0).null_class == DIGITS.n_classes == info.n_classes - 1


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_config_of_each_run_on_a_class_folder_is_valid(run, class_folder, tmp_path):
    config = check(run, Study(class_folder), tmp_path)
    if run.diffusion:
        assert config.model.params.cond_stage_config.params.n_classes == 3  # with "no class"


def test_captions_in_a_table_or_beside_the_images_condition_the_models(class_folder, tmp_path):
    run = RUNS[-1]
    for image in class_folder.rglob("*.png"):
        image.with_suffix(".txt").write_text("noise")
    config = check(run, Study(class_folder), tmp_path)
    assert config.model.params.cond_stage_key == "caption" and config.data.params.train.params.captions == "sidecar"
    (class_folder / "captions.csv").write_text("file_name,text\na/0.png,noise\na/1.png,noise\nb/2.png,noise\n")
    assert check(run, Study(class_folder), tmp_path).data.params.train.params.captions == "captions.csv"


def test_a_budget_saves_at_its_cpu_seconds_and_stops_after_the_last(tmp_path, monkeypatch):
    from types import SimpleNamespace

    clock = iter([0.0, 1.0, 1.0, 3.0, 50.0, 52.5, 52.5])  # 47 of these seconds are spent on saving
    monkeypatch.setattr("benchmarks.cpu_budget.time.process_time", lambda: next(clock))
    saved = []
    trainer = SimpleNamespace(save_checkpoint=lambda path: saved.append(path.name), global_step=0, should_stop=False)
    budget = CPUBudget(str(tmp_path), [2.0, 5.0])
    budget.on_train_start(trainer, None)
    for step, stopped in ((1, False), (2, False), (3, True)):
        trainer.global_step = step
        budget.on_train_batch_end(trainer)
        assert trainer.should_stop == stopped
    assert saved == ["0.ckpt", "1.ckpt"]
    marks = json.loads((tmp_path / "marks.json").read_text())
    assert marks == [{"step": 2, "cpu_seconds": 3.0}, {"step": 3, "cpu_seconds": 5.5}]


def page_of(folder):
    names = ["setup", *(f"claim {number}" for number in CLAIMS)]
    marks = [f"<!-- {name}: python -m benchmarks.paper --report -->\n<!-- end of {name} -->" for name in names]
    (folder / "results.md").write_text("before\n" + "\nwords\n".join(marks) + "\nafter\n")
    return folder / "results.md"


def test_the_page_is_made_from_the_results_and_keeps_its_words(tmp_path):
    page = page_of(tmp_path)
    for seed in (23, 24):
        for run in RUNS:
            write_result(tmp_path, run, seed)
    write_page(tmp_path, DIGITS, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and text.count("\nwords\n") == len(CLAIMS)
    assert "| runs | 22, 33 CPU minutes in all |" in text and "12.0 (12.0 to 12.0)" in text
    assert "| seeds | 23, 24 |" in text and text.count("| not run for seed 25 | every run |") == 1
    plots = sorted(path.name for path in tmp_path.glob("results-*.svg"))
    assert plots == [f"results-{number}.svg" for number in CLAIMS]
    write_page(tmp_path, DIGITS, tmp_path)
    assert page.read_text() == text


def test_the_page_names_the_runs_that_are_missing(tmp_path):
    page = page_of(tmp_path)
    for run in RUNS[:6]:
        write_result(tmp_path, run, 7)
    write_page(tmp_path, DIGITS, tmp_path)
    assert "| not run for seed 7 | `latent-f2`, `latent-f8`, `latent-vq-f4`," in page.read_text()
    assert page.read_text().count("No seed has finished") == 3  # claims 2, 3 and 6


def test_a_folder_has_a_section_of_its_own_which_is_added_once(class_folder, tmp_path):
    page, study = page_of(tmp_path), Study(class_folder)
    digits = page.read_text()
    for run in plan(study.claims):
        write_result(tmp_path, run, 23, study, study.claims)
    write_page(tmp_path, study, tmp_path)
    text = page.read_text()
    assert text.startswith(digits) and text.count("## photos\n") == 1 and "--data photos --report" in text
    assert (tmp_path / "results-photos-1.svg").is_file() and not (tmp_path / "results-photos-5.svg").exists()
    write_page(tmp_path, study, tmp_path)
    assert page.read_text() == text


def test_a_finding_counts_the_seeds_in_which_it_holds():
    assert finding("x", {1: 3.0, 2: 1.0}, {1: 1.0, 2: 2.0, 3: 9.0}) == [
        "x", "**1 of 2**", "a factor of 1.75 (0.500 to 3.00)",
    ]  # fmt: skip
    assert finding("x", {1: 0.5}, {1: 0.25}, "points") == ["x", "**1 of 1**", "25.0 points"]


def test_a_value_is_shown_with_the_range_of_its_seeds():
    assert shown([0.5, 0.25], percent=True) == "37.5 (25.0 to 50.0)"
    assert shown([123.4]) == "123" and shown([]) == ""


def test_bars_of_a_plot_reach_from_the_lowest_to_the_highest_seed():
    plot = draw({"a": [Point(1, [1.0, 3.0]), Point(2, [2.0])], "b": []}, "x", "y")
    assert plot.count("<circle") == 2 and plot.count('stroke="#1f77b4"/>') == 2 and ">a</text>" in plot
    assert "mean of 2 seeds; bars: lowest and highest" in plot


def test_invalid_claims_and_folders_are_refused_with_the_choices(tmp_path):
    with pytest.raises(ValueError, match=r"--claims 9: choose of 1, 2, 3, 4, 5, 6"):
        paper.main(["--claims", "9"])
    with pytest.raises(ValueError, match=r"--data .*none: no such folder"):
        paper.main(["--data", str(tmp_path / "none")])


def test_guidance_costs_two_network_evaluations_a_step():
    assert Samples(steps=10, scale=1.0).evaluations == 10 and Samples(steps=10, scale=2.0).evaluations == 20


def test_real_scans_are_judged_better_than_blurred_ones(tmp_path, monkeypatch):
    from benchmarks.paper_judge import Judge

    monkeypatch.setattr("ldm.evaluation.classifier.train_classifier.__defaults__", (0, 60, False))
    judge = Judge(replace(DIGITS, count=100), tmp_path)
    images = np.stack([judge.held_out.image(k) for k in range(0, 355, 3)])
    labels = [judge.held_out.label(k) for k in range(0, 355, 3)]
    mixed = (images.astype(int) + np.roll(images, 4, axis=1)) // 2
    real, blurred = judge.quality(images, labels), judge.quality(mixed.astype(np.uint8), labels)
    assert blurred["fid"] > 2 * real["fid"] and judge.facts["recognized"] > 0.8
    assert real["recognized"] > 0.8 and real["precision"] > 0.7 and real["recall"] > 0.7


def test_a_folder_with_too_few_held_out_images_is_refused_before_anything_is_trained(class_folder, tmp_path):
    from benchmarks.paper_judge import Judge

    with pytest.raises(ValueError, match=r"--data .*photos: \d of its images are held out; .* more than 3"):
        Judge(Study(class_folder), tmp_path)
