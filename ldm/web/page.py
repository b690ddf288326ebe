"""The page: a tab for each task with the form of its script, and the results of the user's jobs beside it."""

from __future__ import annotations

import contextlib
import html
import itertools
import json
import secrets
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from ldm.cli import Parser, counted, one_line
from ldm.inference import requests
from ldm.output.images import read_metadata
from ldm.web.form import (
    MOST_CONTROLS,
    TASKS,
    Field,
    Form,
    controls_of,
    has_own_control,
    numbered,
    supported,
    taken_inputs,
)
from ldm.web.jobs import CANCELLED, FAILED, LOADING, WAITING, Job, Queue, collected_warnings
from ldm.web.models import Choice, Shelf, parse_strengths
from ldm.web.runs import hints_of, job_of, plan

SHOWN = 60  # newest images of a user
USERS = 100  # the newest; older ones, whose jobs have ended, are forgotten
KEPT = 24 * 3600  # seconds; uploads, previews and shown images that are older are removed from gradio's folder
TICK = 0.4  # seconds between the requests of a tab that follows a job
USER_ERRORS = (ValueError, OSError, ImportError)
THEME = gr.themes.Base(
    primary_hue="indigo",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
CSS = (Path(__file__).with_name("page.css")).read_text(encoding="utf-8")
_WITH_IMAGE = {"img2img": "Image to start from", "edit": "Image to edit", "upscale": "Image to upscale"}
_BLANK = {"seed": "random", "H": "as trained", "W": "as trained", "negative_prompt": "", "classes": "all, shuffled"}

_UPDATES = itertools.count()  # so that a message that is said twice is seen to be new

Updates = dict[Any, Any]


class User:
    """One browser: its job, and its images, those of the newest job first."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.RLock()
        self.job: Job | None = None
        self.jobs = 0
        self.files: list[Path] = []  # copies under a folder that nobody can guess

    def collect(self, job: Job) -> int:
        """Copy the images of a job that are not yet shown -> the number of its images."""
        with self.lock:
            for place, file in enumerate(found := list(job.files)):
                copy = self.folder / f"{file.parent.parent.name}-{file.name}"
                if copy not in self.files:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self.files.insert(place, Path(shutil.copyfile(file, copy)))
            for old in self.files[SHOWN:]:
                old.unlink(missing_ok=True)
            del self.files[SHOWN:]
            return len(found)


class Tab(NamedTuple):
    """The components of a task: `inputs` are its uploads and the form's fields, by name."""

    form: Form
    tab: gr.Tab
    inputs: dict[str, Any]
    generate: gr.Button


class Page:
    """The page of a shelf of models. shown: folder for the copies of images that browsers see; uploads: gradio's."""

    def __init__(self, shelf: Shelf, parsers: Mapping[str, Parser], shown: Path, uploads: Path) -> None:
        self.shelf, self.shown, self.uploads, self.queue = shelf, shown, uploads, Queue()
        self.lock = threading.Lock()
        self.users: dict[str, User] = {}  # the one that was active last comes last
        fixed = {"depth_model": shelf.opt.depth_model}
        forms = [Form(task, parsers[name], fixed) for name, task in TASKS.items()]
        with gr.Blocks(title="Latent diffusion", analytics_enabled=False, fill_width=True) as self.blocks:
            self._layout(forms)
            self._events()

    def close(self) -> None:
        """Cancel the jobs and end the server."""
        self.queue.close()
        self.blocks.close(verbose=False)

    # ------------------------------------------------------------------------------------------------------- layout

    def _layout(self, forms: Sequence[Form]) -> None:
        first = next(iter(self.shelf.models))
        reasons, taken = self._reasons(first), taken_inputs(self.shelf.info(first)[0])
        self.user = gr.BrowserState(None)
        # Not gr.State, for which every tab keeps a connection, and a browser opens six to a server.
        self.selected, self.seen = gr.Textbox(visible=False), gr.Textbox(visible=False)
        self.timer = gr.Timer(TICK, active=False)
        gr.HTML('<div class="title">Latent diffusion</div>', padding=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=380):
                self._model_row()
                with gr.Tabs(selected=self._usual_tab(first, reasons)) as self.tabs:
                    self.tasks = {form.task.name: self._tab(form, reasons, taken) for form in forms}
                    with gr.Tab("Image info", id="info", elem_id="tab-info"):
                        self._info_tab()
                inputs = [item for tab in self.tasks.values() for item in tab.inputs.items()]
                self.optional = {part: name for name, part in inputs if name in taken}
                self.reasons = gr.HTML(_reasons(reasons), elem_id="reasons", padding=False)
            with gr.Column(scale=1, min_width=380, elem_id="results"):
                self._results()

    def _model_row(self) -> None:
        names, lora, embedding = list(self.shelf.models), list(self.shelf.lora), self.shelf.embedding
        token = next((token or f"<{file.stem}>" for file, token in embedding.values()), "")
        several: Any = {"value": [], "multiselect": True, "scale": 2}
        self.model = gr.Dropdown(names, value=names[0], label="Model", elem_id="model", filterable=True)
        with gr.Row(visible=bool(lora or embedding)):
            self.lora = gr.Dropdown(lora, label="LoRA", elem_id="lora", visible=bool(lora), **several)
            self.strength = gr.Textbox(
                label="LoRA strength", placeholder="1, or 0.8 0.4", elem_id="lora-strength", visible=bool(lora)
            )
            label = f"Embedding (prompt: {token[:20]})"
            self.embedding = gr.Dropdown(
                list(embedding), label=label, elem_id="embedding", visible=bool(embedding), **several
            )

    def _tab(self, form: Form, reasons: Mapping[str, str], taken: Mapping[str, bool]) -> Tab:
        name, inputs = form.task.name, dict[str, Any]()
        fits = not reasons[name]
        with gr.Tab(form.task.title, id=name, elem_id=f"tab-{name}", visible=fits, interactive=fits) as tab:
            if name in _WITH_IMAGE:
                with gr.Row():
                    inputs["image"] = _image(_WITH_IMAGE[name], f"{name}-image")
                    if name == "img2img":
                        label = "Depth map (near is bright)"
                        inputs["depth"] = _image(label, f"{name}-depth", visible=taken["depth"])
            if name == "inpaint":
                inputs["drawn"] = gr.ImageEditor(
                    type="filepath",
                    label="Image: paint over what is to be generated",
                    placeholder="# Upload an image\nthen paint over what is to be generated",
                    sources=("upload", "clipboard"),
                    transforms=(),
                    layers=False,
                    format="png",
                    height=380,
                    brush=gr.Brush(colors=["#f43f5e"], color_mode="fixed", default_size=self._brush()),
                    elem_id="inpaint-editor",
                )
            if name == "control2img":
                inputs |= self._controls(form, taken)
            inputs |= _fields(form, taken)
            generate = gr.Button("Generate", variant="primary", interactive=False, elem_id=f"{name}-generate")
        return Tab(form, tab, inputs, generate)

    def _controls(self, form: Form, taken: Mapping[str, bool]) -> dict[str, Any]:
        """The inputs of each ControlNet, with the hint that its detector makes."""
        task, nets, inputs = form.task.name, list(self.shelf.controlnet), dict[str, Any]()
        self.controls, self.hints = list[gr.Accordion](), list[gr.Image]()
        for k in range(MOST_CONTROLS if nets else 1):
            with gr.Accordion(f"Control {k + 1}", open=k == 0) as control:
                self.controls.append(control)
                with gr.Row():
                    inputs[numbered("image", k)] = _image("Control image", f"{task}-{numbered('image', k)}")
                    hint = gr.Image(
                        label="Hint", interactive=False, height=240, elem_id=numbered("hint", k), format="png"
                    )
                    self.hints.append(hint)
                with gr.Row():
                    inputs[numbered("controlnet", k)] = gr.Dropdown(
                        [("none", ""), *((net, net) for net in nets)],
                        value=nets[0] if nets and k == 0 else "",
                        label="ControlNet",
                        min_width=130,
                        visible=bool(nets) and (k > 0 or taken["controlnet"]),
                        elem_id=f"{task}-{numbered('controlnet', k)}",
                    )
                    for field in form.fields:
                        if field.repeated:
                            inputs[numbered(field.name, k)] = _component(field, f"{task}-{numbered(field.name, k)}")
        return inputs

    def _brush(self) -> int:
        """Width of a stroke in pixels, an eighth of the first model's images."""
        info, _ = self.shelf.info(next(iter(self.shelf.models)))
        return max(2, min(info.own_size or (64,)) * (info.factor or 8) // 8)

    def _info_tab(self) -> None:
        gr.HTML(
            '<p class="hint">Upload a PNG of this page or of a script: the form takes its settings.</p>', padding=False
        )
        self.info_file = gr.File(file_types=[".png"], label="PNG", elem_id="info-file", height=120)
        self.info_fill = gr.Button("Fill in the form", elem_id="info-fill", interactive=False)
        self.info_table = gr.HTML(elem_id="info-table", padding=False)

    def _results(self) -> None:
        self.status = gr.HTML(_status("", "The images appear here."), elem_id="status", padding=False)
        self.cancel = gr.Button("Cancel", elem_id="cancel", variant="stop", size="md", visible=False)
        self.preview = gr.Image(
            label="Preview",
            interactive=False,
            visible=False,
            height=420,
            elem_id="preview",
            format="png",
            buttons=["fullscreen"],
        )
        self.gallery = gr.Gallery(
            label="Your images",
            show_label=False,
            columns=4,
            fit_columns=False,
            object_fit="contain",
            height="auto",
            format="png",
            elem_id="gallery",
            interactive=False,
            buttons=["download", "fullscreen"],
        )
        with gr.Accordion("Settings of the selected image", open=False, visible=False) as self.details:
            self.details_table = gr.HTML(elem_id="details", padding=False)
            self.details_fill = gr.Button("Use these settings", elem_id="details-fill")

    # ------------------------------------------------------------------------------------------------------- events

    def _events(self) -> None:
        quiet: Any = {"show_progress": "hidden", "api_visibility": "private"}
        live = [self.status, self.cancel, self.preview, self.gallery, self.seen, self.timer]
        common = [self.user, self.model, self.lora, self.strength, self.embedding]
        for name, tab in self.tasks.items():
            triggers = [tab.generate.click] + ([tab.inputs["prompt"].submit] if "prompt" in tab.inputs else [])
            gr.on(triggers, partial(self._generate, name), [*common, *tab.inputs.values()], live, **quiet)
        control = self.tasks["control2img"].inputs
        of_hint = ("image", "detector", "canny", "resolution")
        changes = [part.change for name, part in control.items() if name.partition("-")[0] in of_hint]
        alone = {"concurrency_limit": 1, "concurrency_id": "hint"}  # a detector may be a model
        gr.on(changes, self._show_hints, [self.model, *control.values()], self.hints, **alone, **quiet)
        self.timer.tick(self._follow, [self.user, self.seen], live, queue=False, **quiet)
        self.cancel.click(self._cancel, [self.user], [self.cancel], **quiet)
        self.model.input(self._show_model, [self.model], self._of_model, **quiet)
        buttons = [tab.generate for tab in self.tasks.values()]
        self.blocks.load(self._enter, [self.user], [self.user, *live, *buttons], **quiet)
        self.gallery.select(self._select, [self.user], [self.selected, self.details, self.details_table], **quiet)
        filled = [*self._of_model, *self.controls, self.status, self.model, self.lora, self.strength, self.embedding]
        filled += [part for tab in self.tasks.values() for part in tab.inputs.values() if part not in filled]
        self.details_fill.click(self._use_selected, [self.user, self.selected], filled, **quiet)
        self.info_file.change(self._read_info, [self.info_file], [self.info_table, self.info_fill], **quiet)
        self.info_fill.click(self._use_file, [self.info_file], filled, **quiet)

    @property
    def _of_model(self) -> list[Any]:
        """The components that depend on the model."""
        return [self.tabs, self.reasons, *self.optional, *(tab.tab for tab in self.tasks.values())]

    def _enter(self, user: str | None) -> Updates:
        """A browser opens the page, or reloads it: its images are shown again, and its job is followed."""
        with self.lock:
            if user not in self.users:
                user = secrets.token_urlsafe(16)
                self.users[user] = User(self.shown / user)
            idle = [name for name, each in self.users.items() if name != user and (not each.job or each.job.ended)]
            for name in idle[: max(0, len(self.users) - USERS)]:
                shutil.rmtree(self.users.pop(name).folder, ignore_errors=True)
        ready = {tab.generate: gr.update(interactive=True) for tab in self.tasks.values()}
        return {self.user: user, self.gallery: self._owner(user).files, **ready, **self._follow(user, "")}

    def _reasons(self, model: str) -> dict[str, str]:
        """Why the model does not do each task; '' if it does."""
        return supported(self.shelf.info(model)[0], bool(self.shelf.controlnet))

    def _usual_tab(self, model: str, reasons: Mapping[str, str]) -> str:
        """The tab of the task that a model is for."""
        name = requests.script_for(self.shelf.info(model)[0]).removeprefix("scripts/").partition(".")[0]
        return name if reasons.get(name) == "" else "info"

    def _show_model(self, model: str) -> Updates:
        reasons, taken = self._reasons(model), taken_inputs(self.shelf.info(model)[0])
        updates: Updates = {
            tab.tab: gr.update(visible=not reasons[name], interactive=not reasons[name])
            for name, tab in self.tasks.items()
        }
        updates |= {part: gr.update(visible=taken[name]) for part, name in self.optional.items()}
        updates[self.tabs] = gr.update(selected=self._usual_tab(model, reasons))
        return {**updates, self.reasons: _reasons(reasons)}

    def _generate(
        self,
        task: str,
        user: str,
        model: str,
        lora: list[str],
        strength: str | None,
        embedding: list[str],
        *values: Any,
    ) -> Updates:
        tab = self.tasks[task]
        notes: list[str] = []
        try:
            owner = self._owner(user)
            with owner.lock:
                if owner.job is not None and not owner.job.ended:  # in another tab: this one follows it from now on
                    gr.Warning("your last job is still running: wait for it, or cancel it")
                    return self._follow(user, "")
                info, names = self.shelf.info(model)
                taken = taken_inputs(info)
                settings = {name: value for name, value in zip(tab.inputs, values) if taken.get(name, True)}
                adapters = tuple(zip(lora or (), parse_strengths(strength, len(lora or ()))))
                nets = tuple(row["controlnet"] for row in controls_of(settings, by=["controlnet"]).values())
                choice = Choice(model, adapters, tuple(embedding or ()), nets)
                self.shelf.options(choice)
                with collected_warnings(notes):
                    run = plan(tab.form, settings, info, names)
                job = job_of(run, self.shelf, choice, Path(self.shelf.opt.outdir) / task)
                job.notes.extend(notes)
                owner.job, owner.jobs = job, owner.jobs + 1
        except USER_ERRORS as error:
            return {self.status: _status("failed", f"error: {one_line(error)}")}
        self.queue.add(job)
        remove_old(self.uploads)
        return self._follow(user, "")

    def _owner(self, user: str | None) -> User:
        with self.lock:
            owner = self.users.pop(user or "", None)
            if user is None or owner is None:
                raise ValueError("the server does not know this page any more: reload it")
            self.users[user] = owner
            return owner

    def _follow(self, user: str, seen: str) -> Updates:
        """Updates of the user's job since those that a tab has `seen`; its timer ticks until the job has ended.

        A tab asks again and again: one that waited for an answer would hold a connection, and a browser opens six.
        """
        try:
            owner = self._owner(user)
        except ValueError as error:
            return {self.status: _status("failed", f"error: {error}"), self.timer: gr.Timer(active=False)}
        with owner.lock:
            job, number = owner.job, owner.jobs
        if job is None:
            return {self.timer: gr.Timer(active=False)}
        version, ended = job.version, job.ended  # read first: what changes after them is seen at the next tick
        images = f"{number} {owner.collect(job)}"
        now = f"{images} {version} {self.queue.ahead(job)}"
        if now == seen:
            # Only an answer to a tab that knows the end stops its timer: a late one could be of the job before.
            return {self.timer: gr.Timer(active=False)} if ended else {self.seen: gr.skip()}
        updates: Updates = {self.seen: now, self.status: self._progress(job), self.timer: gr.Timer(active=True)}
        updates[self.cancel] = gr.update(visible=not ended)
        if ended:
            updates[self.preview] = gr.update(visible=False)
        elif (preview := job.preview) is not None:
            updates[self.preview] = gr.update(value=preview, visible=True)
        if not seen.startswith(f"{images} "):
            updates[self.gallery] = list(owner.files)
        return updates

    def _progress(self, job: Job) -> str:
        if job.state == FAILED:
            return _status("failed", f"error: {job.error}", notes=job.notes)
        count = counted(len(job.files), "image")
        if job.ended:
            where = f", saved in {job.files[0].parent}" if job.files else ""
            word = "cancelled after " if job.state == CANCELLED else ""
            return _status(job.state, f"{word}{count} in {job.seconds:.1f} s{where}", notes=job.notes)
        if ahead := self.queue.ahead(job):
            return _status(job.state, f"waiting: {counted(ahead, 'job')} before yours", notes=job.notes)
        if job.state in (WAITING, LOADING):
            return _status(job.state, "loading the model", notes=job.notes)
        text = f"step {job.step} of {job.steps} · {len(job.files)} of {counted(job.images, 'image')}"
        return _status(job.state, text, job.step / max(1, job.steps), job.notes)

    def _cancel(self, user: str) -> Updates:
        owner = self.users.get(user)
        if owner is not None and owner.job is not None:
            self.queue.cancel(owner.job)
        return {self.cancel: gr.skip()}

    def _show_hints(self, model: str, *values: Any) -> Updates:
        """The previews of the detectors; errors wait for Generate."""
        tab = self.tasks["control2img"]
        settings = dict(zip(tab.inputs, values))
        controls, hints = controls_of(settings, by=["image"]), list[Any]()
        if controls:
            with contextlib.suppress(*USER_ERRORS):
                *_, hints = hints_of(tab.form, settings, self.shelf.info(model)[0], list(controls.values()))
        found = dict(zip(controls, hints))
        return {component: found.get(k) for k, component in enumerate(self.hints)}

    # --------------------------------------------------------------------------------------------------- image info

    def _select(self, user: str, event: gr.SelectData) -> Updates:
        owner = self.users.get(user)
        files = owner.files if owner else []
        if event.index >= len(files):
            return {self.selected: None}
        file = files[event.index]
        shown = {self.details: gr.update(visible=True), self.details_table: _table(read_metadata(file))}
        return {self.selected: file.name, **shown}

    def _use_selected(self, user: str, selected: str | None) -> Updates:
        owner = self.users.get(user)
        files = {file.name: file for file in owner.files} if owner else {}
        return self._fill(str(files[selected])) if selected in files else {self.status: gr.skip()}

    def _read_info(self, path: str | None) -> Updates:
        if path is None:
            return {self.info_table: "", self.info_fill: gr.update(interactive=False)}
        try:
            table, task = _table(info := read_metadata(path)), info.get("task")
        except USER_ERRORS as error:
            table, task = _status("failed", f"error: {_named(error, path)}"), None
        return {self.info_table: table, self.info_fill: gr.update(interactive=task in self.tasks)}

    def _use_file(self, path: str | None) -> Updates:
        return {self.status: gr.skip()} if path is None else self._fill(path)

    def _fill(self, path: str) -> Updates:
        """The form with the settings of an image."""
        try:
            info = read_metadata(path)
            tab = self.tasks.get(str(info.get("task")))
            if tab is None:
                raise ValueError(f"{path}: generated by {info.get('task')}, which has no form here")
            values = tab.form.recorded(path, info)
            choice, notes = self.shelf.choice_of(info)
        except USER_ERRORS as error:
            return {self.status: _status("failed", f"error: {_named(error, path)}")}
        updates = {**self._show_model(choice.model), self.model: choice.model}
        updates[self.tabs] = gr.update(selected=tab.form.task.name)
        own = has_own_control(self.shelf.info(choice.model)[0])
        values["controlnet"] = [*[""] * own, *choice.controlnet]
        for name, value in values.items():
            for k, each in enumerate(value if isinstance(value, list) else [value]):
                if part := tab.inputs.get(numbered(name, k)):
                    updates[part] = {**updates.get(part, gr.update()), "value": each}
                    updates |= {self.controls[k]: gr.update(open=True)} if k else {}
        for name in ("init_img", "depth", "control_image"):
            if info.get(name):
                files = info[name] if isinstance(info[name], list) else [info[name]]
                notes.append(f"upload the image again: {', '.join(map(str, files))}")
        updates |= {self.lora: [name for name, _ in choice.lora], self.embedding: list(choice.embedding)}
        updates[self.strength] = " ".join(f"{strength:g}" for _, strength in choice.lora)
        return {**updates, self.status: _status("", "The form has the settings of the image.", notes=notes)}


# ------------------------------------------------------------------------------------------------------------ parts


def remove_old(folder: Path, age: float = KEPT) -> None:
    """Remove what is older than `age` seconds; gradio's `delete_cache` leaves files of components it has updated."""
    for path in sorted(folder.rglob("*"), reverse=True):  # files before their folders
        with contextlib.suppress(OSError):  # a folder that is not empty, a file that another request has removed
            if time.time() - path.lstat().st_ctime > age:
                path.rmdir() if path.is_dir() else path.unlink()


def _image(label: str, elem_id: str, visible: bool = True) -> gr.Image:
    return gr.Image(
        type="filepath",
        label=label,
        sources=["upload", "clipboard"],
        height=240,
        format="png",
        image_mode=None,
        elem_id=elem_id,
        visible=visible,
    )


def _fields(form: Form, taken: Mapping[str, bool]) -> dict[str, Any]:
    """The components of a form's fields, by name, laid out: texts, numbers in rows, the rest in an accordion."""
    components = dict[str, Any]()

    def add(*wanted: Field) -> None:
        for field in wanted:
            components[field.name] = _component(field, f"{form.task.name}-{field.name}", taken.get(field.name, True))

    main = [field for field in form.fields if field.main and not field.repeated]
    texts = [field for field in main if field.name in ("prompt", "negative_prompt")]
    add(*texts)
    with gr.Row():
        add(*(field for field in main if field not in texts))
    with gr.Accordion("More settings", open=False), gr.Row():
        add(*(field for field in form.fields if not field.main))
    return components


def _component(field: Field, elem_id: str, visible: bool = True) -> Any:
    shared: Any = {"label": field.label, "elem_id": elem_id, "value": field.default, "visible": visible}
    shared |= {"min_width": 130} if field.main else {"min_width": 240, "info": field.help}
    if field.kind is bool:
        return gr.Checkbox(**{**shared, "value": bool(field.default)})
    if field.choices:
        return gr.Dropdown(list(field.choices), **shared)
    if field.kind is str or field.count is not None or field.default is None:  # a Number cannot be blank
        lines = 2 if field.name == "prompt" else 1
        placeholder = field.help if field.name == "prompt" else _BLANK.get(field.name, "default")
        return gr.Textbox(lines=lines, placeholder=placeholder, **shared)
    step = 1 if field.kind is int else 0.05 if field.name == "strength" else 0.5
    return gr.Number(step=step, **shared)


def _status(state: str, text: str, share: float | None = None, notes: Sequence[str] = ()) -> str:
    bar = "" if share is None else f'<div class="bar"><i style="width:{100 * share:.1f}%"></i></div>'
    more = "".join(f"<li>{html.escape(note)}</li>" for note in dict.fromkeys(notes))
    more = f"<ul>{more}</ul>" if more else ""
    return f'<div class="job {state}" data-update="{next(_UPDATES)}">{html.escape(text)}{bar}{more}</div>'


def _reasons(reasons: Mapping[str, str]) -> str:
    missing = {TASKS[name].title: reason for name, reason in reasons.items() if reason}
    lines = "".join(f"<li><b>{html.escape(title)}</b> {html.escape(reason)}</li>" for title, reason in missing.items())
    return (
        f"<details><summary>Not with this model ({len(missing)})</summary><ul>{lines}</ul></details>" if lines else ""
    )


def _table(info: Mapping[str, Any]) -> str:
    given = {key: value for key, value in info.items() if value is not False and value not in (None, [], "")}
    rows = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(_short(value))}</td></tr>" for key, value in given.items()
    )
    return f'<table class="settings">{rows}</table>'


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 400 else text[:400] + "..."


def _named(error: BaseException, path: str) -> str:
    """An error's message with the name of an uploaded file instead of its path on the server."""
    return one_line(error).replace(path, Path(path).name)
