"""TextToImageRequest of the sampling scripts: what is accepted, what is refused, and that the refusal names the flag, the value and a way out."""

import subprocess
import sys

import pytest

from ldm.config.model_info import model_info, read_config
from ldm.inference.inputs import read_prompts
from ldm.inference.requests import Batch, TextToImageRequest, require_text_model
from ldm.paths import ROOT

AUTOENCODER = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"ddconfig": {"ch_mult": [1, 2, 4, 4]}}}
CLIP = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}


def config(**params) -> dict:
    unet = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {"channel_mult": [1, 2, 4, 4]}}
    defaults = {"channels": 4, "first_stage_config": AUTOENCODER, "cond_stage_config": CLIP, "unet_config": unet}
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {**defaults, **params}}}


def test_facts_of_stable_diffusion_are_read_off_its_yaml():
    info = model_info(read_config(ROOT / "configs/stable-diffusion/v1-inference.yaml"))
    assert (info.timesteps, info.channels, info.factor, info.latent_multiple, info.use_ema) == (
        1000,
        4,
        8,
        8,
        False,
    )
    require_text_model(info)


def test_facts_follow_the_constructors_defaults_where_the_yaml_is_silent():
    info = model_info(
        {"model": {"target": "ldm.models.diffusion.ddpm.DDPM", "params": {"unet_config": {"params": {}}}}}
    )
    assert (info.timesteps, info.channels, info.factor, info.latent_multiple, info.use_ema) == (
        1000,
        3,
        1,
        8,
        True,
    )
    identity = model_info(config(first_stage_config={"target": "ldm.models.autoencoder.IdentityFirstStage"}))
    assert identity.factor == 1


def test_the_published_defaults():
    s = TextToImageRequest().checked(model_info(config()))
    assert (s.steps, s.scale, s.eta, s.height, s.width, s.seed, s.n_samples, s.n_iter) == (
        50,
        7.5,
        0.0,
        512,
        512,
        42,
        3,
        2,
    )
    assert (s.sampler, s.fixed_code, s.negative_prompt, s.latent_shape) == ("ddim", False, "", (4, 64, 64))


@pytest.mark.parametrize("height", range(64, 257, 8))
@pytest.mark.parametrize("width", [64, 72, 200, 256])
def test_a_size_is_taken_or_refused_with_the_nearest_valid_ones(height, width):
    info = model_info(config())
    if height % 64 == 0 and width % 64 == 0:
        assert TextToImageRequest(height=height, width=width).checked(info).latent_shape == (4, height // 8, width // 8)
        return
    with pytest.raises(ValueError, match=f"--H {height} --W {width}: .* multiples of 64 ") as error:
        TextToImageRequest(height=height, width=width).checked(info)
    words = str(error.value).split("nearest are ")[1].split()
    near = TextToImageRequest(height=int(words[1]), width=int(words[3])).checked(info)
    assert abs(near.height - height) <= 32 and abs(near.width - width) <= 32


def test_the_multiple_follows_from_first_stage_and_unet():
    small = config(
        first_stage_config={"target": AUTOENCODER["target"], "params": {"ddconfig": {"ch_mult": [1, 2, 4]}}},
        unet_config={"params": {"channel_mult": [1, 2]}},
    )
    assert TextToImageRequest(height=32, width=40).checked(model_info(small)).latent_shape == (4, 8, 10)
    with pytest.raises(ValueError, match="multiples of 8 pixels"):
        TextToImageRequest(height=32, width=36).checked(model_info(small))


def test_f_replaces_the_models_factor_as_published():
    assert TextToImageRequest(height=512, width=256, factor=16).checked(model_info(config())).latent_shape == (
        4,
        32,
        16,
    )


def test_an_unknown_first_stage_needs_f():
    unknown = model_info(config(first_stage_config={"target": "my.Stage", "params": {}}))
    with pytest.raises(ValueError, match="--f"):
        TextToImageRequest().checked(unknown)
    assert TextToImageRequest(factor=8).checked(unknown).latent_shape == (4, 64, 64)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"steps": 0}, "--ddim_steps 0: choose 1 to 1000"),
        ({"steps": 1001}, "--ddim_steps 1001: choose 1 to 1000"),
        ({"n_samples": 0}, "--n_samples 0"),
        ({"n_iter": -1}, "--n_iter -1"),
        ({"height": 0}, "--H 0 --W 512.*--H 64 --W 512"),
        ({"width": -64}, "--W -64"),
        ({"channels": 3}, "--C 3: this model's latents have 4"),
        ({"channels": 0}, "--C 0"),
        ({"factor": 0}, "--f 0"),
        ({"sampler": "eular"}, "--sampler eular: choose one of ddim, plms, "),
        ({"eta": -0.1}, "--ddim_eta -0.1"),
        ({"eta": 0.5, "sampler": "plms"}, "--ddim_eta 0.5: plms is deterministic"),
        ({"eta": 0.5, "sampler": "dpm_solver"}, "dpm_solver is deterministic"),
        ({"eta": 0.5, "sampler": "ancestral"}, "ancestral has a fixed eta of 1; .* adjustable eta: ddim, "),
        ({"scale": float("nan")}, "--scale nan"),
        ({"scale": 1.0, "negative_prompt": "blurry"}, "--negative_prompt with --scale 1"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**32}, "--seed 4294967296"),
        ({"seed_mode": "picture"}, "--seed_mode picture: choose one of batch, image"),
        ({"seed_mode": "image", "fixed_code": True}, "--fixed_code with --seed_mode image"),
        ({"spacing": "karras"}, "--spacing karras: ddim supports uniform, quad, trailing"),
        ({"spacing": "quad", "sampler": "heun"}, "--spacing quad: heun supports uniform, logsnr, karras, trailing"),
        ({"guidance_rescale": 1.5}, "--guidance_rescale 1.5: choose 0"),
        ({"guidance_rescale": 0.7, "scale": 1.0}, "--guidance_rescale 0.7 with --scale 1"),
        ({"dynamic_threshold": 0.0}, "--dynamic_threshold 0.0: choose a quantile above 0"),
        ({"tiled": 20}, "--tiled 20: choose a multiple of 8 pixels, at least 32; 512 is usual"),
        ({"emphasis": True, "negative_prompt": "a (b"}, "--emphasis: .* never closed"),
        ({"chunks": 2}, "chunks 2: choose 1 or more, with long_prompts"),
    ],
)
def test_what_cannot_work_is_refused_with_flag_value_and_choices(change, words):
    with pytest.raises(ValueError, match=words):
        TextToImageRequest(**change).checked(model_info(config()))


@pytest.mark.parametrize("steps", [1, 2, 7, 999, 1000])
def test_every_step_count_of_the_schedule_is_accepted(steps):
    assert TextToImageRequest(steps=steps).checked(model_info(config())).steps == steps


@pytest.mark.parametrize(
    "sampler, eta", [("ddim", 0.0), ("plms", 0.0), ("ancestral", 1.0), ("euler_ancestral", 1.0), ("heun", 0.0)]
)
def test_without_eta_every_sampler_has_its_own(sampler, eta):
    assert TextToImageRequest(sampler=sampler).checked(model_info(config())).eta == eta
    assert TextToImageRequest(sampler=sampler, eta=eta).checked(model_info(config())).eta == eta


def test_where_no_signal_is_left_solvers_in_continuous_time_take_trailing_steps_alone():
    info = model_info(config(parameterization="v", zero_terminal_snr=True))
    with pytest.raises(
        ValueError, match=r"--spacing uniform: heun cannot start at zero terminal SNR, .* choose trailing"
    ):
        TextToImageRequest(sampler="heun").checked(info)
    assert (
        TextToImageRequest(sampler="heun", spacing="trailing").checked(info).spacing
        == TextToImageRequest(spacing="trailing").checked(info).spacing
    )


CLASSES = {"target": "ldm.modules.encoders.modules.ClassEmbedder"}


BOXES = {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": {"use_tokenizer": False}}


@pytest.mark.parametrize(
    "condition", ["__is_unconditional__", "__is_first_stage__", CLASSES, BOXES, {"target": "torch.nn.Identity"}]
)
def test_a_model_without_a_text_condition_is_refused(condition):
    with pytest.raises(ValueError, match="not text-conditional"):
        require_text_model(model_info(config(cond_stage_config=condition)))


@pytest.mark.parametrize("n_prompts", range(1, 8))
def test_every_prompt_is_in_one_batch_and_the_last_one_may_be_smaller(n_prompts):
    prompts = [f"p{k}" for k in range(n_prompts)]
    batches = [b.prompts for b in TextToImageRequest(prompt=prompts, n_samples=3, n_iter=1).batches]
    assert [p for batch in batches for p in batch] == prompts
    assert all(len(batch) == 3 for batch in batches[:-1]) and 1 <= len(batches[-1]) <= 3


def test_a_single_prompt_is_repeated_n_samples_times():
    assert TextToImageRequest(prompt="a cat", n_samples=3, n_iter=1).batches == [Batch(0, range(3), ["a cat"] * 3)]


def test_prompt_files_are_lines_of_utf8_with_or_without_a_mark(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa café\r\n\r\n日本\n".encode())
    assert read_prompts(file) == ["a café", "", "日本"]


@pytest.mark.parametrize("content, words", [(b"", "empty"), (b"caf\xe9\n", "UTF-8"), (None, "No such file")])
def test_unreadable_prompt_files_are_refused_by_name(tmp_path, content, words):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        read_prompts(file)
    assert str(file) in str(error.value)
    with pytest.raises(ValueError, match="directory"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "a: [1",
        "- 1\n- 2\n",
        "data: {}",
        "model: 3",
        "model: {params: {}}",
        "model: {target: x, a: '${nowhere}'}",
        "\x00",
    ],
)
def test_a_config_that_is_none_is_refused_in_one_line_by_name(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"c\.yaml"):
        read_config(file)
    with pytest.raises(FileNotFoundError, match="no such file; give --config"):
        read_config(tmp_path / "other.yaml")


def test_checks_need_neither_torch_nor_lightning():
    code = (
        "import sys; from ldm import inference; from ldm.inference import cli; from ldm.paths import ROOT;"
        "info = inference.read_model_info(ROOT / 'configs/stable-diffusion/v1-inference.yaml');"
        "inference.TextToImageRequest(prompt='a cat', emphasis=True).checked(info);"
        "print([m for m in ('torch', 'pytorch_lightning', 'numpy', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
