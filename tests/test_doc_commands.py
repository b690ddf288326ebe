"""Every command in the documents is valid: its own code checks flags, config and request, up to the weights."""

import importlib
import re
import runpy
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from PIL import Image

from ldm import inference
from ldm.config.merge import merge
from ldm.config.model_info import read_model_info
from ldm.config.validate import check_config
from ldm.data.shard_writer import write_config
from ldm.inference import cli
from ldm.inference.requests import TextToImageRequest
from ldm.output.images import GeneratedImage, write_new
from ldm.paths import ROOT, find_file
from ldm.training.flags import parse as parse_training
from ldm.training.settings import resolve_settings
from ldm.util import instantiate_from_config

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
RUN = "logs/run"  # stands for every run directory; holds the config that the page has trained, or else one of these
RUNS = {
    "txt2img": "configs/quickstart/text2image.yaml",
    "sample_conditional": "configs/recipes/super-resolution-folder.yaml",
}
STAND_INS = {"config.yaml": "configs/recipes/text-to-image-folder.yaml"}
SHELL = {".", "cd", "git", "mkdocs", "pre-commit", "printf", "sbatch", "tensorboard"}  # programs that are not ours


class CheckedError(Exception):
    """Raised where a script would read files of the user: its flags and its request are valid."""


def commands(page: Path) -> list[list[str]]:
    """The words of each command in the page's bash blocks, with RUN for every run directory."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        text = re.sub(r"\\\n|^RUN=.*$|^for .*; do$|^done$", " ", block, flags=re.MULTILINE)
        text = re.sub(r"\$\(.*?\)|\$\w+|logs/<[^>]*>|logs/RUN\b", RUN, text)
        lines = [shlex.split(line, comments=True) for line in re.split(r"\n|&&", text)]
        found += [words[1:] if re.fullmatch(r"[A-Z]+=\S*", words[0]) else words for words in lines if words]
    return found


def named_blocks(page: Path) -> dict[str, str]:
    """Files in the page: code blocks that begin with a comment with the name."""
    text = page.read_text(encoding="utf-8")
    return {
        name: block
        for block, name in re.findall(r"```(?:yaml|python)\n(# ([\w/.-]+\.(?:yaml|py)).*?)```", text, re.DOTALL)
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory in which scripts end at their first look at weights."""
    monkeypatch.chdir(tmp_path)

    def stop(*args, **kwargs):
        raise CheckedError

    monkeypatch.setattr(cli, "prepare", stop)
    monkeypatch.setattr(inference, "make_hints", stop, raising=False)
    monkeypatch.setattr("ldm.config.instantiate._user_prefixes", [])
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_is_valid(page, folder):
    for name, content in named_blocks(page).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    for words in commands(page):
        check(words, folder)


def check(words: list[str], folder: Path) -> None:
    program, *rest = words
    if program == "torchrun":
        program, rest = "python", rest[rest.index("main.py") :]
    if program == "python" and rest[0] == "main.py":
        check_training(rest[1:], folder)
    elif program == "python" and rest[:2] in (["-m", "benchmarks"], ["-m", "benchmarks.paper"]):
        importlib.import_module("benchmarks.paper" if "." in rest[1] else "benchmarks.__main__").parser().parse_args(
            rest[2:]
        )
    elif program == "python" and rest[0].endswith(".py"):
        check_script(ROOT / rest[0], rest[1:], folder)
    elif program == "python":
        assert rest[:2] in (["-m", "venv"], ["-m", "tests.full"])
    elif program == "pip":
        extras = re.findall(r"\[(\w+)\]", " ".join(rest))
        assert all(re.search(rf'"{extra}"(: |\] = )\[', (ROOT / "setup.py").read_text()) for extra in extras)
    elif program in ("bash", "pytest"):
        assert all((ROOT / word).exists() for word in rest if "/" in word)
    else:
        assert program in SHELL, f"{program}: check it here, or name it in SHELL"


def check_training(words: list[str], folder: Path) -> None:
    """The checks of main.py before it builds anything; the config becomes that of RUN."""
    options = parse_training(words)
    assert options.train
    config = merge([base(path, folder) for path in options.base], options.overrides)
    if not options.allow_targets:
        check_config(config, weights=False)
        instantiate_from_config(config.data)
    resolve_settings(options, config.get("lightning") or OmegaConf.create())
    save_run(config, folder)


def base(path: str, folder: Path) -> Path:
    """The YAML at a path, or one that stands for a file that the reader or another command has written."""
    if path.endswith("data.yaml"):
        if not path.startswith("my-shards"):  # scripts/cache_latents.py writes it
            (folder / "data.yaml").write_text("{}")
            return folder / "data.yaml"
        made = SimpleNamespace(captioned=True, several=False, caption_policy=SimpleNamespace(missing="raise"))
        written = folder / Path(path).parent
        written.mkdir(parents=True, exist_ok=True)
        return write_config(made, written, written.name, 512)
    return find_file(STAND_INS.get(path.lower(), path))


def save_run(config, folder: Path) -> None:
    for part in ("configs", "checkpoints"):
        (folder / RUN / part).mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / RUN / "configs" / "now-project.yaml")
    (folder / RUN / "checkpoints" / "last.ckpt").touch()


def check_script(path: Path, words: list[str], folder: Path) -> None:
    """The checks of a script before it reads weights, with images and prompts in the place of the reader's."""
    if not (folder / RUN).exists():
        save_run(OmegaConf.load(ROOT / RUNS.get(path.stem, RUNS["txt2img"])), folder)
    for name in re.findall(r"[^\s=]+\.(?:png|txt)", " ".join(words)):
        make_input(folder / name)
    if "--classes" in words:
        (folder / RUN / "configs" / "classes.txt").write_text("\n".join(filter(str.isalpha, words)))
    script = runpy.run_path(str(path))
    if "main" not in script or "parser" not in script:
        assert not words
    elif "prepare" not in path.read_text():
        script["parser"]().parse_args(words)
    else:
        with pytest.raises(CheckedError):
            script["main"](words)


def make_input(path: Path) -> None:
    """A file of prompts, or an image with the metadata of txt2img, for --from-metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".txt":
        path.write_text("a red kite\n")
    elif not path.exists():
        info = read_model_info(ROOT / STAND_INS["config.yaml"])
        request = TextToImageRequest(prompt="a red kite").checked(info)
        write_new(iter([path]), GeneratedImage(Image.new("RGB", (512, 512)), request.record()))
