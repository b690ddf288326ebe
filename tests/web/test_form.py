"""Laws of the forms: every setting of a script, with its default and its words."""

import pytest

from ldm.config.model_info import read_model_info
from ldm.inference import cli
from ldm.paths import ROOT
from ldm.web.form import MOST_IMAGES, TASKS, Form, check_share, parse_classes, supported
from scripts import app
from tests.tiny import KINDS, save_model


def form(task: str) -> Form:
    return Form(TASKS[task], app.TASKS[task]())


@pytest.mark.parametrize("task", TASKS)
def test_a_form_that_is_left_as_it_is_gives_the_defaults_of_the_script(task):
    made = form(task)
    opt = made.options({field.name: field.default for field in made.fields})
    start, script = vars(opt), vars(made.parser.parse_args([]))
    changed = {name for name in script if start[name] != script[name]}
    assert changed <= {"prompt", "sampler", "seed", "n_samples", "n_iter", "control_scale", "detector"}
    assert not {"H", "W"} & opt.given
    known = cli.request_fields(opt, made.task.request)
    assert {field.key for field in made.fields} - {"height", "width"} <= set(known)


def test_a_value_of_another_type_names_the_flag():
    text = form("txt2img")
    for name, value, wanted in (("ddim_steps", 2.5, "a whole number"), ("scale", "much", "a number")):
        with pytest.raises(ValueError, match=f"--{name} {value}: expected {wanted}"):
            text.options({name: value})
    with pytest.raises(ValueError, match="--guidance_interval 1 x: expected 2 numbers"):
        text.options({"guidance_interval": "1 x"})
    assert text.options({"guidance_interval": "0.3 5"}).guidance_interval == [0.3, 5.0]


def test_a_blank_seed_is_random_and_an_image_has_it():
    seeds = {form("inpaint").options({"seed": ""}).seed for _ in range(3)}
    assert len(seeds) > 1 and form("inpaint").options({"seed": "7"}).seed == 7


def test_metadata_become_what_the_form_shows_and_invalid_ones_are_refused():
    info = {"steps": 9, "guidance_interval": [0.3, 5.0], "prompt": "a tent", "eta": None, "height": 64}
    shown = form("txt2img").recorded("a.png", info)
    assert shown == {"ddim_steps": 9, "guidance_interval": "0.3 5.0", "prompt": "a tent", "ddim_eta": None, "H": 64}
    assert form("sample_diffusion").recorded("a.png", {"steps": 9, "vanilla": True})["vanilla_sample"] is True
    assert form("sample_diffusion").recorded("a.png", {"class": 3}) == {"classes": "3"}
    assert form("control2img").recorded("a.png", {"detector": ["canny", "none"]}) == {"detector": ["canny", "none"]}
    with pytest.raises(ValueError, match="invalid steps in the metadata"):
        form("txt2img").recorded("a.png", {"steps": "<script>"})


@pytest.mark.parametrize(
    ("kind", "tasks"),
    [
        ("text", {"txt2img", "img2img", "inpaint", "control2img"}),
        ("class", {"sample_diffusion"}),
        ("unconditional", {"sample_diffusion"}),
        ("inpaint", {"inpaint"}),
        ("sd-inpaint", {"inpaint"}),
        ("depth", {"img2img"}),
        ("upscale", {"upscale"}),
        ("x4", {"upscale"}),
        ("edit", {"edit"}),
        ("control", {"txt2img", "img2img", "inpaint", "control2img"}),
    ],
)
def test_a_model_has_the_tasks_that_fit_it_and_reasons_for_the_others(tmp_path, kind, tasks):
    assert kind in KINDS
    info = read_model_info(save_model(tmp_path, kind).config)
    reasons = supported(info, controlnets=True)
    assert {name for name, reason in reasons.items() if not reason} >= tasks
    assert set(reasons) == set(TASKS)
    assert {name for name, reason in reasons.items() if not reason} - tasks <= {"inpaint", "img2img"}


def test_a_job_is_no_larger_than_one_of_many_users_may_have():
    check_share(MOST_IMAGES, 512, 512)
    with pytest.raises(ValueError, match="at most 100"):
        check_share(MOST_IMAGES + 1, 512, 512)
    with pytest.raises(ValueError, match="4096x4096 pixels"):
        check_share(1, 4096, 4096)


def test_classes_are_numbers_ranges_and_names():
    names = ["tench", "great white shark", "ray"]
    assert parse_classes("2, 0-1, great white shark", names) == (2, 0, 1, 1)
    assert parse_classes(" ", names) is None


def test_the_help_of_every_task_is_that_of_its_script():
    assert {(ROOT / "scripts" / f"{task}.py").is_file() for task in TASKS} == {True}
    assert all(field.help for task in TASKS for field in form(task).fields)
