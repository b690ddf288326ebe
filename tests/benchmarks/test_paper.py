"""The runs of the paper's claims: which are needed, which are done, and the page that is made from them."""

import json
from dataclasses import replace

import pytest

from benchmarks import paper
from benchmarks.cpu_budget import CPUBudget
from benchmarks.paper import CLAIMS, RUNS, Sampling, config_of, execute, pending, plan
from benchmarks.paper_page import draw, shown, write_page
from ldm.config.validate import check_config

QUALITY = {"fid": 12.0, "precision": 0.5, "recall": 0.25, "recognized": 0.9, "sampling_cpu_seconds": 2.0}


def write_result(out, run, seed, **changes):
    result = {"run": run.name, "seed": seed, "fingerprint": run.fingerprint(), "cpu_minutes": 1.5}
    result |= {"environment": {"machine": "two cores"}, "psnr": 28.0, "rfid": 3.0, "recognized": 1.0, "codes_used": 9}
    result["marks"] = [{"step": 100 * k, "cpu_seconds": 10.0 * k} for k in (1, 2, 3)]
    result["samplings"] = [{**sampling.__dict__, **QUALITY} for sampling in run.samplings]
    out.mkdir(exist_ok=True)
    (out / f"{run.name}-{seed}.json").write_text(json.dumps(result | changes))


@pytest.mark.parametrize("claim", CLAIMS)
def test_each_claim_trains_first_stages_before_the_models_on_them(claim):
    names = [run.name for run in plan([claim])]
    models = [run for run in plan([claim]) if run.samplings]
    assert models
    for model in models:
        if model.first_stage is not None:
            assert names.index(model.first_stage) < names.index(model.name)


def test_finished_runs_are_not_repeated_and_first_stages_only_for_models_that_miss_their_weights(tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    every = pending(out, work, [3], [1])
    assert [run.name for _, run in every] == ["kl-f4", "vq-f4", "latent-f4", "latent-vq-f4"]
    for _, run in every[:3]:
        write_result(out, run, 1)
    assert [run.name for _, run in pending(out, work, [3], [1])] == ["vq-f4", "latent-vq-f4"]
    (work / "1").mkdir(parents=True)
    (work / "1" / "vq-f4.ckpt").touch()
    assert [run.name for _, run in pending(out, work, [3], [1])] == ["latent-vq-f4"]
    assert len(pending(out, work, [3], [1, 2])) == 1 + len(every)


def test_a_changed_setting_invalidates_a_result(tmp_path, monkeypatch):
    run = RUNS[0]
    write_result(tmp_path, run, 1)
    assert paper.read_result(tmp_path, run, 1)
    assert paper.read_result(tmp_path, replace(run, dropout=0.3), 1) is None
    monkeypatch.setattr(paper, "FIRST_STAGE_STEPS", 1)
    assert paper.read_result(tmp_path, run, 1) is None


def test_an_interrupted_run_leaves_no_result_and_no_files(tmp_path, monkeypatch):
    def interrupted(run, seed, folder, stages):
        (folder / "0.ckpt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(paper, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute(RUNS[0], 1, tmp_path, None, tmp_path / "images.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_config_of_each_run_is_valid(run, tmp_path):
    from omegaconf import OmegaConf

    from ldm.config.instantiate import allow_targets

    allow_targets("benchmarks")
    config = OmegaConf.create(config_of(run, tmp_path, tmp_path))
    if run.first_stage is not None:
        assert config.model.params.first_stage_config.params.ckpt_path == str(tmp_path / f"{run.first_stage}.ckpt")
        config.model.params.first_stage_config.params.ckpt_path = None
    check_config(config, problems=True)


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


def page_of(tmp_path):
    names = ["cost", *(f"claim {number}" for number in CLAIMS)]
    marks = [f"<!-- {name}: python -m benchmarks.paper --report -->\n<!-- end of {name} -->" for name in names]
    (tmp_path / "results.md").write_text("before\n" + "\nwords\n".join(marks) + "\nafter\n")
    return tmp_path / "results.md"


def test_the_page_is_made_from_the_results_and_keeps_its_words(tmp_path):
    out, page = tmp_path / "out", page_of(tmp_path)
    for seed in (23, 24):
        for run in RUNS:
            write_result(out, run, seed)
    write_page(out, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and text.count("\nwords\n") == len(CLAIMS)
    assert (
        "22 runs, 33 CPU minutes in all, seeds 23, 24." in text
        and "12.0 (12.0 to 12.0)" in text
        and text.count("Not run for seed 25: every run.") == 1
    )
    plots = sorted(path.name for path in tmp_path.glob("results-*.svg"))
    assert plots == [f"results-{number}.svg" for number in CLAIMS]
    write_page(out, tmp_path)
    assert page.read_text() == text


def test_the_page_names_the_runs_that_are_missing(tmp_path):
    out, page = tmp_path / "out", page_of(tmp_path)
    for run in RUNS[:6]:
        write_result(out, run, 7)
    write_page(out, tmp_path)
    assert "Not run for seed 7: `latent-f2`, `latent-f8`, `latent-vq-f4`," in page.read_text()


def test_a_value_is_shown_with_the_range_of_its_seeds():
    assert shown([0.5, 0.25], percent=True) == "37.5 (25.0 to 50.0)"
    assert shown([123.4]) == "123" and shown([]) == ""


def test_bars_of_a_plot_reach_from_the_lowest_to_the_highest_seed():
    from benchmarks.paper_page import Point

    plot = draw({"a": [Point(1, [1.0, 3.0]), Point(2, [2.0])], "b": []}, "x", "y")
    assert plot.count("<circle") == 2 and plot.count('stroke="#1f77b4"/>') == 2 and ">a</text>" in plot


def test_invalid_claims_are_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"--claims 9: choose of 1, 2, 3, 4, 5, 6"):
        paper.main(["--claims", "9"])


def test_guidance_costs_two_network_evaluations_a_step():
    assert Sampling(steps=10, scale=1.0).evaluations == 10 and Sampling(steps=10, scale=2.0).evaluations == 20


def test_real_scans_are_judged_better_than_blurred_ones(monkeypatch):
    import numpy as np

    from benchmarks import paper_judge

    monkeypatch.setattr(paper_judge, "EPOCHS", 1)
    judge = paper_judge.Judge(32, 20, 10)
    images, labels = judge.held_out.images, judge.held_out.labels
    real, blurred = (judge.quality(x, labels) for x in (images, (images + np.roll(images, 4, axis=1)) / 2))
    assert blurred["fid"] > 2 * real["fid"]
    assert real["recognized"] > 0.95 and real["precision"] > 0.7 and real["recall"] > 0.7
