"""The examples in the documents run, and their tables, flags, figures and links are right."""

import importlib
import re
import runpy
import sys

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from PIL import Image

import main
from ldm.config.validate import check_config
from ldm.inference.settings import PRECISIONS, SEED_MODES
from ldm.models.diffusion import loss_weighting
from ldm.models.diffusion.conditioning import ROUTES
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.loss_weighting import LossWeighting, SNRWeighting
from ldm.models.diffusion.samplers.registry import SAMPLERS
from ldm.paths import ROOT
from ldm.training.flags import _parser as training_parser
from ldm.util import instantiate_from_config
from tests.models.first_stages import QUIET
from tests.reference import randn, seed_weights

SAMPLING = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROVENANCE = (ROOT / "docs" / "provenance.md").read_text(encoding="utf-8")
EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


DOCUMENTS = "".join(
    path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", EXTENDING, re.S)


@pytest.fixture
def unload_example():
    """Unload the example package afterwards."""
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_project"]:
        del sys.modules[name]


@pytest.mark.usefixtures("unload_example")
def test_the_example_of_a_conditioning_key_trains(tmp_path, monkeypatch):
    (tmp_path / "my_project").mkdir()
    (tmp_path / "my_project" / "keys.py").write_text(blocks("python")[0])
    (tmp_path / "blurred.yaml").write_text(blocks("yaml")[0])
    for name in ("ape", "tench"):
        (tmp_path / "folders" / name).mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (16, 16), (100 * k, 50, 0)).save(tmp_path / "folders" / name / f"{k}.png")
    words = blocks("bash")[0].strip().replace("/path/to/folders", "folders").split()
    assert words[:3] == ["PYTHONPATH=.", "python", "main.py"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("ldm.config.instantiate._user_prefixes", [])
    monkeypatch.setattr("ldm.models.diffusion.conditioning.ROUTES", dict(ROUTES))
    small = [
        "model.params.unet_config.params.model_channels=32",
        "model.params.timesteps=8",
        "data.params.train.params.split=null",
    ]
    small += ["+data.params.num_workers=0"]
    assert main.main([*words[3:], *small, "--max_steps", "2", "-n", "own"]) == 0
    (run,) = (tmp_path / "logs").iterdir()
    assert (run / "checkpoints" / "last.ckpt").is_file() and list((run / "images").rglob("samples_gs-*.png"))


@pytest.mark.usefixtures("unload_example")
def test_the_example_of_a_part_of_another_name_trains_and_samples(tmp_path, monkeypatch):
    (tmp_path / "my_project").mkdir()
    (tmp_path / "my_project" / "style.py").write_text(blocks("python")[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("ldm.config.instantiate._user_prefixes", ["my_project"])
    monkeypatch.setattr("ldm.models.diffusion.conditioning.ROUTES", dict(ROUTES))
    params = OmegaConf.load(ROOT / "configs" / "quickstart" / "text2image.yaml").model.params
    params.conditioning_key, params.timesteps, params.scale_by_std = "crossattn-style", 8, False
    params.unet_config.target, params.unet_config.params.style_dim = "my_project.style.StyledUNet", 6
    model = instantiate_from_config({"target": "my_project.style.StyledDiffusion", "params": params})
    seed_weights(model)
    samples = [{"image": randn(i, 32, 32, 3), "caption": str(i), "style": randn(i, 6)} for i in range(4)]
    loader = torch.utils.data.DataLoader(samples, batch_size=2)
    before = model.model.diffusion_model.style_embed.weight.detach().clone()
    model.learning_rate = 1e-3
    pl.Trainer(**QUIET, max_steps=2).fit(model, loader, loader)
    assert not torch.equal(model.eval().model.diffusion_model.style_embed.weight, before)

    def sample(style: torch.Tensor) -> torch.Tensor:
        cond, uncond = (
            {"c_crossattn": [model.get_learned_conditioning([text] * 2)], "c_style": style} for text in ("seven", "")
        )
        options = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": uncond, "verbose": False}
        return DDIMSampler(model).sample(2, 2, (4, 8, 8), cond, x_T=randn(7, 2, 4, 8, 8), **options).samples

    assert sample(randn(1, 2, 6)).isfinite().all()
    assert not torch.allclose(sample(randn(1, 2, 6)), sample(randn(2, 2, 6)), atol=1e-4)


def test_the_python_example_generates_images(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = OmegaConf.load("configs/quickstart/text2image.yaml")
    torch.save({"state_dict": instantiate_from_config(config.model).state_dict()}, tmp_path / "last.ckpt")
    namespace: dict = {}
    exec(blocks("python")[2].replace("last.ckpt", str(tmp_path / "last.ckpt")).replace("S=25", "S=2"), namespace)
    assert namespace["images"].shape == (4, 3, 32, 32) and namespace["images"].isfinite().all()


def test_the_readmes_python_example_generates_images(tmp_path, monkeypatch):
    config = OmegaConf.load(ROOT / "configs" / "quickstart" / "text2image.yaml")
    torch.save({"state_dict": instantiate_from_config(config.model).state_dict()}, tmp_path / "quickstart.ckpt")
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    for published, here in (
        ("configs/stable-diffusion/v1-inference.yaml", str(ROOT / "configs" / "quickstart" / "text2image.yaml")),
        ("sd-v1-4.ckpt", "quickstart.ckpt"),
        ("steps=25, ", "steps=2, height=32, width=32, "),
    ):
        assert published in example
        example = example.replace(published, here)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert [Image.open(path).size for path in sorted(tmp_path.glob("kite-*.png"))] == [(32, 32)] * 3


def test_the_tables_of_samplers_match_the_code():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in SAMPLING.splitlines()
        if line.startswith("| `")
    ]
    table = {name: cells[-1] for cells in rows for name in re.findall(r"`(\w+)`", cells[0])}
    assert {name: table[name] for name in SAMPLERS} == {
        name: ", ".join(entry.spacings) for name, entry in SAMPLERS.items()
    }
    assert {*PRECISIONS, *SEED_MODES} == table.keys() - SAMPLERS.keys()
    (takers,) = re.findall(r"`--ddim_eta` is for (.*)\. `--guidance", SAMPLING)
    assert re.findall(r"`(\w+)`", takers) == [name for name, entry in SAMPLERS.items() if entry.takes_eta]


def test_every_flag_in_the_documents_exists():
    named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]+", DOCUMENTS))
    known = {"--help", *training_parser().flags}
    known |= {
        "--nnodes",
        "--nproc-per-node",
        "--rdzv-id",
        "--rdzv-backend",
        "--rdzv-endpoint",
        "--max-restarts",
    }  # torchrun
    known |= {"--nodes", "--ntasks-per-node", "--requeue"}  # sbatch
    scripts = [path.stem for path in (ROOT / "scripts").glob("*.py") if "\ndef parser(" in path.read_text()]
    others = ("scripts.tests.test_watermark", "benchmarks.__main__", "benchmarks.paper")
    for name in (*(f"scripts.{script}" for script in scripts), *others):
        known |= set(importlib.import_module(name).parser().flags)
    assert named and not named - known


def test_the_architecture_figure_is_up_to_date():
    figure = runpy.run_path(str(ROOT / "docs" / "architecture.py"))["architecture"]()
    assert figure == (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")


def test_links_between_documents_exist():
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "configs" / "README.md",
        *(ROOT / "docs").glob("*.md"),
    ]
    links = [
        (page, link) for page in pages for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8"))
    ]
    assert links and not [(page.name, link) for page, link in links if not (page.parent / link).exists()]


def test_every_page_is_in_the_list_of_pages_and_in_the_navigation_of_the_site():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    index, site = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/index.md", "mkdocs.yml"))
    assert not {page for page in pages if f"]({page})" not in index}
    assert not {page for page in pages if f": {page}\n" not in site}


def test_the_sections_of_objectives_are_valid_and_its_table_has_every_weighting():
    page = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    base = OmegaConf.load(ROOT / "configs" / "recipes" / "text-to-image-folder.yaml")
    blocks = [OmegaConf.create(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    sections = [block if "lightning" in block else {"model": {"params": block}} for block in blocks]
    config = OmegaConf.merge(base, *sections)
    check_config(config, weights=False)
    for section in ("loss_weighting_config", "noise_config", "timestep_config"):
        assert instantiate_from_config(config.model.params[section])
    classes = {each.__name__ for base in (LossWeighting, SNRWeighting) for each in base.__subclasses__()}
    named = {name for name in classes if f"| `{name}`" in page}
    assert {name for name in classes if name != "SNRWeighting" and hasattr(loss_weighting, name)} <= named
