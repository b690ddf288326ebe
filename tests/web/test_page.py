"""Laws of the page, in a real browser: a headless Chromium, with tiny models of random weights."""

import shutil
import socket
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoint.diffusers.embeddings import write_embedding
from ldm.config.model_info import read_model_info
from ldm.inference.from_metadata import parse_given
from ldm.inference.requests import TextToImageRequest
from ldm.output.images import read_metadata
from ldm.web import page as page_module
from ldm.web.jobs import DONE, Job
from ldm.web.models import Shelf
from ldm.web.server import Address, launch
from scripts import app, control2img, edit, img2img, txt2img
from tests.inference.test_lora import write as write_lora
from tests.tiny import save_model

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason='tests of the page need pip install -e ".[test]"')
pytest.importorskip("gradio", reason='the page needs pip install -e ".[web]"')
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore:.*(no_silent_downcasting|copy keyword is deprecated)"),  # gradio's pandas
]
PATIENCE = 30_000  # milliseconds, for a machine that is busy
LONG = {"ddim_steps": 100, "n_samples": 25, "n_iter": 4}  # a job that is stopped before its end
KINDS = ("text", "class", "upscale", "edit", "depth", "control")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--use-gl=angle", "--use-angle=swiftshader"]  # the editor needs WebGL
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """Start a page with these flags -> its address, output folder and models; all are closed at the end."""
    pages = []

    def start(*argv: str, token: str | None = None) -> SimpleNamespace:
        folder = tmp_path_factory.mktemp("page")
        flags = ["--device", "cpu", "--precision", "full", "--safety", "off", "--outdir", str(folder / "out")]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shelf = Shelf(parse_given(app.parser(), [*argv, *flags]))
        parsers = {name: make() for name, make in app.TASKS.items()}
        pages.append(page := launch(shelf, parsers, Address("127.0.0.1", port, token), folder))
        return SimpleNamespace(url=f"http://127.0.0.1:{port}", out=folder / "out", shelf=shelf, page=page)

    yield start
    for page in pages:
        page.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in (*KINDS, "lora", "embedding", "controlnet"):
        (folder / kind).mkdir()
    saved = {kind: save_model(folder / kind, kind) for kind in KINDS}
    for seed, name in enumerate(("style", "paint")):
        write_lora(folder / "lora" / f"{name}.safetensors", saved["text"], seed, targets=("attention",))
    write_embedding(folder / "embedding" / "cat.safetensors", "<my-cat>", torch.linspace(-3, 3, 32).reshape(2, 16))
    weights = saved["control"].model.state_dict().items()
    weights = {name: weight for name, weight in weights if name.startswith("control_model.")}
    for name in ("edges", "pose"):
        torch.save(weights, folder / "controlnet" / f"{name}.pth")
    return folder


@pytest.fixture(scope="module")
def server(serve, models):
    """A page of several models; that of text comes first."""
    return serve("--ckpt", str(models / "text" / "tiny.ckpt"), "--models", str(models))


@pytest.fixture
def visit(browser, server):
    """Open the page as a new user."""
    contexts = []

    def open_page(url: str | None = None):
        contexts.append(context := browser.new_context(viewport={"width": 1300, "height": 1000}))
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.requested = []
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto(url or server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()


def fill(page, task: str, **fields) -> None:
    for name, value in fields.items():
        page.fill(f"#{task}-{name} :is(textarea, input)", str(value))


def value(page, task: str, name: str) -> str:
    return page.input_value(f"#{task}-{name} :is(textarea, input)")


def run(page, task: str, state: str = "done", **fields) -> str:
    """Fill in the form, generate, wait for the end -> what the status says."""
    fill(page, task, **fields)
    before = page.get_attribute("#status .job", "data-update")
    page.click(f"#{task}-generate")
    page.wait_for_function("n => document.querySelector('#status .job').dataset.update != n", arg=before)
    return ended(page, state)


def ended(page, state: str = "done") -> str:
    page.wait_for_selector("#status .job:is(.done, .failed, .cancelled)")
    said = page.inner_text("#status .job")
    assert page.query_selector(f"#status .job.{state}"), said
    return said


def samples(server, task: str) -> list[Path]:
    return sorted((server.out / task / "samples").glob("*.png"))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_prompt_gives_images_that_are_saved_as_the_script_saves_them(server, visit, models, tmp_path):
    page = visit()
    said = run(page, "txt2img", prompt="a red kite", ddim_steps=4, n_samples=2, seed=7)
    first = samples(server, "txt2img")[-2]
    assert said.startswith("2 images in ") and str(first.parent) in said
    page.wait_for_function("document.querySelectorAll('#gallery .thumbnail-item img').length == 2")
    txt2img.main(["--from-metadata", str(first), "--outdir", str(tmp_path)])
    assert (pixels(tmp_path / "samples" / "00000.png") == pixels(first)).all()
    elsewhere = [url for url in page.requested if not url.startswith((server.url, "data:", "blob:"))]
    assert not elsewhere and len(page.requested) > 10


def test_a_job_shows_its_steps_and_a_preview_and_cancel_stops_it_cleanly(server, visit):
    page = visit()
    run(page, "txt2img", prompt="a red kite", ddim_steps=3, n_samples=1, seed=3)
    wanted = pixels(samples(server, "txt2img")[-1])
    fill(page, "txt2img", prompt="a red kite", seed=3, **LONG)
    page.click("#txt2img-generate")
    page.wait_for_selector("#preview img")
    page.wait_for_selector("text=/step \\d+ of 400/")
    page.click("#cancel")
    assert "cancelled after" in ended(page, "cancelled")
    assert page.locator("#cancel").is_hidden()
    run(page, "txt2img", prompt="a red kite", ddim_steps=3, n_samples=1, n_iter=1, seed=3)
    assert (pixels(samples(server, "txt2img")[-1]) == wanted).all()


def test_a_reload_shows_the_images_again_and_follows_the_job(server, visit):
    page = visit()
    run(page, "txt2img", prompt="a tent", ddim_steps=2, n_samples=1)
    fill(page, "txt2img", **LONG)
    page.click("#txt2img-generate")
    page.wait_for_selector("text=/step \\d+ of 400/")
    page.reload()
    page.wait_for_selector("#gallery .thumbnail-item img")
    page.wait_for_selector("text=/step \\d+ of 400/")
    page.click("#cancel")
    ended(page, "cancelled")


def test_a_tab_that_follows_a_job_keeps_no_connection_open(server, visit):
    """A browser opens six to a server: with one for each tab that follows a job, the next tab would wait for them."""
    page = visit()
    opened: set[str] = set()
    page.on("request", lambda request: opened.add(request.url))
    for end in ("requestfinished", "requestfailed"):
        page.on(end, lambda request: opened.discard(request.url))
    fill(page, "txt2img", prompt="a tent", **LONG)
    page.click("#txt2img-generate")
    page.wait_for_selector("text=/step \\d+ of 400/")
    for _ in range(2):
        page.wait_for_event("requestfinished", lambda request: "predict" in request.url)
    assert not [url for url in opened if "predict" not in url and "file=" not in url]
    page.click("#cancel")
    ended(page, "cancelled")


def test_the_server_forgets_the_oldest_browsers_except_those_whose_jobs_run(server, tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "USERS", 3)
    parsers = {name: make() for name, make in app.TASKS.items()}
    page = page_module.Page(server.shelf, parsers, tmp_path / "shown", tmp_path / "uploads")
    first, second, *_ = names = [page._enter(None)[page.user] for _ in range(3)]
    page.users[first].job = Job(lambda job: None)
    page.users[second].folder.mkdir(parents=True)
    folder = page.users[second].folder
    newest = page._enter(None)[page.user]
    assert list(page.users) == [first, names[2], newest] and not folder.exists()
    assert page._enter(first)[page.user] == first and list(page.users)[-1] == first  # the last one that was active
    page.users[first].job.report(DONE)
    assert page._enter(second)[page.user] != second and next(iter(page.users)) == newest
    sessions = server.page.blocks.state_holder  # gradio's own, half a megabyte each
    assert [sessions[str(k)] for k in range(120)] and len(sessions.session_data) < 110


def test_uploads_and_shown_images_are_removed_from_gradios_folder_when_nobody_uses_them(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "upload.png").touch()
    page_module.remove_old(tmp_path, 60)
    assert (tmp_path / "a" / "upload.png").exists()
    page_module.remove_old(tmp_path, -1)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_setting_has_the_words_of_the_script(server, visit, models):
    page = visit()
    with pytest.raises(ValueError, match="multiples") as refusal:
        TextToImageRequest(height=100).checked(read_model_info(models / "text" / "tiny.yaml"))
    assert run(page, "txt2img", "failed", prompt="x", H=100, W=32) == f"error: {refusal.value}"
    assert run(page, "txt2img", "failed", H="tall", W="") == "error: --H tall: expected a whole number"
    assert "at most 100" in run(page, "txt2img", "failed", H="", n_samples=101)
    assert "upload an image" in (page.click("#tab-img2img-button") or run(page, "img2img", "failed"))


def test_inpainting_changes_what_was_painted_over_and_nothing_else(server, visit, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    page = visit()
    page.click("#tab-inpaint-button")
    page.wait_for_selector("#inpaint-editor .pixi-target canvas")
    page.set_input_files("#inpaint-editor input[type=file]", tmp_path / "a.png")
    page.wait_for_selector("#inpaint-editor [aria-label='Brush Size']")  # there is an image
    page.wait_for_selector("#inpaint-editor [aria-label='Undo']:not([disabled])")
    box = page.locator("#inpaint-editor .pixi-target canvas").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 30, y, steps=4)
    page.mouse.up()
    run(page, "inpaint", prompt="a tent", steps=3, seed=1, scale=2)
    result = samples(server, "inpaint")[-1]
    info = read_metadata(result)
    mask, before = pixels(Path(info["mask"])) > 0, pixels(Path(info["init_img"]))
    assert before.shape == (48, 64, 3) and 0 < mask.mean() < 0.8
    changed = (pixels(result) != before).any(axis=2)
    assert changed[mask].mean() > 0.9 and not changed[~mask].any()


def test_image_info_fills_in_the_form_which_then_gives_the_same_image(server, visit, tmp_path):
    page = visit()
    run(page, "txt2img", prompt="a <b>bold</b> tent", ddim_steps=3, n_samples=1, n_iter=1, seed=11, scale=3)
    source = shutil.copy(samples(server, "txt2img")[-1], tmp_path / "mine.png")
    page = visit()
    page.click("#tab-info-button")
    page.set_input_files("#info-file input[type=file]", source)
    page.wait_for_selector("#info-table td:text-is('a <b>bold</b> tent')")
    page.click("#info-fill:not([disabled])")
    page.wait_for_selector("#txt2img-prompt textarea")
    assert value(page, "txt2img", "prompt") == "a <b>bold</b> tent"
    assert (value(page, "txt2img", "seed"), value(page, "txt2img", "ddim_steps")) == ("11", "3")
    run(page, "txt2img")
    assert (pixels(samples(server, "txt2img")[-1]) == pixels(source)).all()
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    page = visit()
    page.click("#tab-info-button")
    page.set_input_files("#info-file input[type=file]", tmp_path / "other.png")
    page.wait_for_selector("#info-table :text('other.png: no settings in the metadata')")


def test_the_selected_image_of_the_gallery_shows_its_settings_and_fills_in_the_form(server, visit):
    page = visit()
    run(page, "txt2img", prompt="a lamp", ddim_steps=2, n_samples=1, seed=5)
    fill(page, "txt2img", prompt="something else", seed=6)
    page.click("#gallery .thumbnail-item")
    page.click("text=Settings of the selected image")
    page.wait_for_selector("#details td:text-is('a lamp')")
    page.click("#details-fill")
    page.wait_for_selector("text=The form has the settings of the image.")
    assert (value(page, "txt2img", "prompt"), value(page, "txt2img", "seed")) == ("a lamp", "5")


def test_two_users_have_their_own_settings_results_and_cancel(server, visit):
    ours, theirs = visit(), visit()
    fill(ours, "txt2img", prompt="a red kite", **LONG)
    ours.click("#txt2img-generate")
    ours.wait_for_selector("text=/step \\d+ of 400/")
    fill(theirs, "txt2img", prompt="a tent", ddim_steps=2, n_samples=1)
    theirs.click("#txt2img-generate")
    theirs.wait_for_selector("text=waiting: 1 job before yours")
    theirs.click("#cancel")
    assert ended(theirs, "cancelled").startswith("cancelled after 0 images")
    ours.wait_for_selector("text=/step \\d+ of 400/")
    assert value(ours, "txt2img", "prompt") == "a red kite"
    theirs.click("#txt2img-generate")
    theirs.wait_for_selector("text=waiting: 1 job before yours")
    ours.click("#cancel")
    ended(ours, "cancelled")
    assert ended(theirs).startswith("1 image in ")
    assert theirs.locator("#gallery .thumbnail-item").count() == 1


def test_another_model_has_the_form_that_fits_it(server, visit, tmp_path):
    page = visit()
    for name, tab in (("class/tiny.ckpt", "sample_diffusion"), ("upscale/tiny.ckpt", "upscale")):
        page.click("#model input")
        page.click(f"[role=option]:has-text('{name}')")
        page.wait_for_selector(f"#tab-{tab}-button[aria-selected=true]")
        page.wait_for_function("!document.querySelector('#tab-txt2img-button')?.offsetParent")
        assert "this model is not text-conditional" in page.inner_html("#reasons")
        if tab == "upscale":
            Image.new("RGB", (8, 8), "teal").save(tmp_path / "small.png")
            page.set_input_files("#upscale-image input[type=file]", tmp_path / "small.png")
            page.wait_for_selector("#upscale-image img")
            run(page, tab, steps=2)
            assert Image.open(samples(server, tab)[-1]).size == (32, 32)
        else:
            run(page, tab, classes="3, 1-2", n_samples=3, custom_steps=2, scale=2)
            assert [read_metadata(path)["class"] for path in samples(server, tab)[-3:]] == [3, 1, 2]


def upload(page, elem_id: str, path: Path) -> None:
    page.set_input_files(f"#{elem_id} input[type=file]", path)
    page.wait_for_selector(f"#{elem_id} img")


def choose(page, elem_id: str, *options: str) -> None:
    for option in options:
        page.click(f"#{elem_id} input")
        page.click(f"[role=option]:has-text('{option}')")
    page.keyboard.press("Escape")


def assert_repeated(script, result: Path, folder: Path) -> None:
    """The script gives the same image from the metadata."""
    script.main(["--from-metadata", str(result), "--outdir", str(folder / "again")])
    assert (pixels(folder / "again" / "samples" / "00000.png") == pixels(result)).all()


@pytest.fixture
def photo(tmp_path):
    """An image of a dark square on light gray, and its file."""
    path = tmp_path / "photo.png"
    image = Image.new("RGB", (48, 32), "lightgray")
    image.paste("navy", (16, 8, 32, 24))
    image.save(path)
    return path


def test_image_to_image_starts_from_the_upload_and_a_depth_map(server, visit, photo, tmp_path):
    page = visit()
    page.click("#tab-img2img-button")
    assert page.locator("#img2img-depth").count() == 0
    upload(page, "img2img-image", photo)
    run(page, "img2img", prompt="a tent", ddim_steps=4, n_samples=1, strength=0.5, seed=3)
    plain = samples(server, "img2img")[-1]
    assert (pixels(Path(read_metadata(plain)["init_img"])) == pixels(photo)).all()
    assert_repeated(img2img, plain, tmp_path)
    choose(page, "model", "depth/tiny.ckpt")
    assert "--depth: this model is conditioned on depth" in run(page, "img2img", "failed")
    upload(page, "img2img-depth", photo)
    run(page, "img2img")
    assert read_metadata(samples(server, "img2img")[-1])["depth"].endswith(".png")


def test_an_edit_follows_an_instruction(server, visit, photo, tmp_path):
    page = visit()
    choose(page, "model", "edit/tiny.ckpt")
    upload(page, "edit-image", photo)
    assert "--prompt: pass an instruction" in run(page, "edit", "failed")
    run(page, "edit", prompt="make it winter", ddim_steps=3, seed=3)
    assert_repeated(edit, samples(server, "edit")[-1], tmp_path)


def test_several_controlnets_have_each_its_image_and_the_hint_of_its_detector(server, visit, photo, tmp_path):
    page = visit()
    page.click("#tab-control2img-button")
    upload(page, "control2img-image", photo)
    page.wait_for_selector("#hint img")
    page.click("text=Control 2")
    upload(page, "control2img-image-2", photo)
    page.wait_for_selector("#hint-2 img")
    said = run(page, "control2img", "failed", prompt="a tent", ddim_steps=3, seed=3)
    assert said == "error: --control-image is given 2 times, for 1 ControlNets: pass one for each"
    choose(page, "control2img-controlnet-2", "pose.pth")
    choose(page, "control2img-detector-2", "none")
    run(page, "control2img", **{"control_scale-2": 0.5})
    result = samples(server, "control2img")[-1]
    info = read_metadata(result)
    assert (info["detector"], info["control_scale"]) == (["canny", "none"], [1.0, 0.5])
    assert [Path(path).name for path in info["controlnet"]] == ["edges.pth", "pose.pth"]
    assert_repeated(control2img, result, tmp_path)
    page = visit()
    fill_in(page, result)
    assert value(page, "control2img", "control_scale-2") == "0.5"
    assert value(page, "control2img", "controlnet-2") == "pose.pth"
    choose(page, "model", "control/tiny.ckpt")
    page.wait_for_selector("#tab-control2img-button[aria-selected=true]")
    page.wait_for_function("!document.querySelector('#control2img-controlnet')?.offsetParent")
    said = run(page, "control2img", "failed")
    assert (
        said
        == "error: --control-image is given 0 times, for 2 ControlNets, that of the model included: pass one for each"
    )


def test_each_lora_has_its_strength_and_the_prompt_names_the_embedding(server, visit, tmp_path):
    page = visit()
    choose(page, "lora", "style.safetensors", "paint.safetensors")
    choose(page, "embedding", "cat.safetensors")
    for text, reason in (("1 2 3", "3 numbers for 2 LoRAs"), ("x", "expected numbers"), ("9999", "strength of -1000")):
        page.fill("#lora-strength :is(textarea, input)", text)
        assert reason in run(page, "txt2img", "failed")
    page.fill("#lora-strength :is(textarea, input)", "0.5 -1")
    said = run(page, "txt2img", prompt="a tent", ddim_steps=3, n_samples=1, seed=3)
    assert "no prompt contains <my-cat> or <cat>" in said
    assert "no prompt" not in run(page, "txt2img", prompt="a <my-cat>")
    result = samples(server, "txt2img")[-1]
    assert [text.rpartition("/")[2] for text in read_metadata(result)["lora"]] == [
        "style.safetensors:0.5",
        "paint.safetensors:-1.0",
    ]
    assert_repeated(txt2img, result, tmp_path)
    page = visit()
    fill_in(page, result)
    assert page.input_value("#lora-strength :is(textarea, input)") == "0.5 -1"


def fill_in(page, path: Path) -> None:
    """Fill in the form from a PNG."""
    page.click("#tab-info-button")
    page.set_input_files("#info-file input[type=file]", path)
    page.click("#info-fill:not([disabled])")
    page.wait_for_selector("text=The form has the settings of the image.")


# No test below uploads a file: a second server in this process takes over gradio's folder of uploads.


def test_a_page_with_a_token_shows_nothing_without_it(serve, visit, models):
    page_server = serve("--ckpt", str(models / "text" / "tiny.ckpt"), token="a long secret")
    for path in ("/config", "/gradio_api/info", "/gradio_api/file=setup.py"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(page_server.url + path)
        assert refused.value.code == 401
    assert status_of(f"{page_server.url}/", "images.example.org") == 200  # of a proxy: the token is asked for
    assert status_of(f"{page_server.url}/config", "images.example.org") == 401
    page = visit(page_server.url)
    for word, selector in (("a wrong secret", "text=/[Ii]ncorrect/"), ("a long secret", "#txt2img-generate")):
        page.fill("input >> nth=0", "anyone")
        page.fill("input[type=password]", word)
        page.click("button:has-text('Login')")
        page.wait_for_selector(selector)


def status_of(url: str, host: str, **headers: str) -> int:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers={"Host": host, **headers})).status
    except urllib.error.HTTPError as refused:
        return refused.code


def test_another_name_of_this_computer_is_refused_without_a_token(server):
    """As of a page of another site whose name resolves to 127.0.0.1 (DNS rebinding)."""
    for host in ("localhost:7860", "LOCALHOST", "[::1]:7860", "127.0.0.2:80", "127.9.9.9"):
        assert status_of(f"{server.url}/config", host) == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7860", "10.0.0.1", "[::1"):
        assert status_of(f"{server.url}/config", host) == 400


def test_a_page_of_another_site_can_send_nothing_without_a_token(server):
    assert status_of(f"{server.url}/config", "localhost", Origin="http://localhost:7860") == 200
    for origin in ("http://evil.example", "https://localhost.evil.example", "null"):
        assert status_of(f"{server.url}/config", "localhost", Origin=origin) == 400


def test_no_file_of_the_server_and_no_url_can_be_read_through_the_page(server, visit):
    page = visit()
    run(page, "txt2img", prompt="private", ddim_steps=2, n_samples=1)
    for path in (samples(server, "txt2img")[-1], Path(__file__), Path("setup.py").resolve()):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.url}/gradio_api/file={path}")
        assert refused.value.code in (403, 404)
    page.click("#tab-info-button")
    said = page.evaluate(
        """async path => {
            const config = window.gradio_config;
            const target = config.dependencies.find(each => each.inputs.length == 1 && each.targets[0][1] == 'change'
                && config.components.find(c => c.id == each.inputs[0]).props.elem_id == 'info-file');
            const data = [{path, meta: {_type: 'gradio.FileData'}}], session_hash = 'x';
            await fetch('/gradio_api/queue/join', {method: 'POST', headers: {'Content-Type': 'application/json'},
                body: JSON.stringify({data, fn_index: target.id, session_hash})});
            const events = await (await fetch('/gradio_api/queue/data?session_hash=' + session_hash)).text();
            return events;
        }""",
        str(samples(server, "txt2img")[-1]),
    )
    assert '"success":false' in said and "private" not in said


def test_a_gradio_that_fetches_urls_by_another_function_is_refused(monkeypatch, tmp_path):
    """The page replaces that function: without it, an upload that is a URL would be fetched by the server."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # restored at the end
    monkeypatch.delattr("gradio.processing_utils.async_ssrf_protected_get")
    with pytest.raises(ImportError, match="fetches URLs in another way"):
        launch(None, {}, Address(), tmp_path)
