"""main.py with the real models, tiny: a first stage, then latent diffusion on its latents, stopped and resumed."""

import os
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import main
from ldm.checkpoint import read_weights
from ldm.inference import find_run, load_model, read_model_info
from ldm.models.diffusion.classifier import ClassifierGuidance
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.util import instantiate_from_config
from tests.reference import rel_error, seed_weights
from tests.test_main import differences, folder_of, last, training_state
from tests.tiny import FIRST_STAGE, KINDS, UNET, text_model_config

ROOT = Path(__file__).parents[1]
VQ_LOSS = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with captioned images and the YAMLs of both stages."""
    monkeypatch.chdir(tmp_path)
    random = np.random.RandomState(0)
    for split, count in (("train", 8), ("val", 4)):
        (tmp_path / split).mkdir()
        for index in range(count):
            Image.fromarray(random.randint(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / split / f"{index}.png")
            (tmp_path / split / f"{index}.txt").write_text(f"image number {index}")
    folders = {
        key: {
            "target": "ldm.data.folder.ImageFolder",
            "params": {"root": str(tmp_path / split), "size": 16, "captions": "sidecar"},
        }
        for key, split in (("train", "train"), ("validation", "val"))
    }
    common = {
        "data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 2, "num_workers": 0, **folders}},
        "lightning": {
            "trainer": {
                "max_steps": 4,
                "accelerator": "cpu",
                "logger": False,
                "num_sanity_val_steps": 0,
                "val_check_interval": 2,
            },
            "callbacks": {"image_logger": {"params": {"max_images": 2, "batch_frequency": 2}}},
        },
    }
    first = deepcopy(FIRST_STAGE)
    first["params"]["ddconfig"]["resolution"] = 16
    diffusion = text_model_config(timesteps=8, image_size=4, cond_dropout=0.2, monitor="val/loss_simple_ema")["model"]
    diffusion["params"] |= {"first_stage_config": deepcopy(first), "untrained_first_stage": True}
    diffusion["params"]["unet_config"]["params"]["image_size"] = 4
    loss = {"disc_start": 1, "perceptual_weight": 0.0, "disc_num_layers": 1, "disc_ndf": 8}
    vq = deepcopy(first)
    vq["target"] = "ldm.models.autoencoder.VQModel"
    vq["params"]["ddconfig"]["double_z"] = False
    vq["params"] |= {"n_embed": 16, "use_ema": True}
    for model, target in ((first, "ldm.modules.losses.LPIPSWithDiscriminator"), (vq, VQ_LOSS)):
        model["params"] |= {"monitor": "val/rec_loss", "lossconfig": {"target": target, "params": loss}}
    control = deepcopy(diffusion)
    control["target"] = "cldm.cldm.ControlLDM"
    control["params"] |= {**deepcopy(KINDS["control"]), "cond_stage_trainable": False, "use_ema": True}
    del control["params"]["target"]
    for name, model in (("first", first), ("vq", vq), ("diffusion", diffusion), ("control", control)):
        config = OmegaConf.create({"model": {"base_learning_rate": 1e-4, **model}, **common})
        for key in ("train", "validation") if name == "control" else ():
            config.data.params[key].target = "ldm.data.control.ControlFolder"
            config.data.params[key].params.detector = "canny"
        OmegaConf.save(config, f"{name}.yaml")
    return tmp_path


def start(name, yaml, *words):
    return main.main(["-b", f"{yaml}.yaml", "-t", "-n", name, *words]), folder_of(name)


def stop_after(monkeypatch, module, batches):
    """Send SIGTERM in the training step with this number; once."""
    import signal

    original = module.training_step
    count = iter(range(1000))

    def step(self, batch, batch_idx):
        if next(count) == batches - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(module, "training_step", step)


@pytest.mark.parametrize(
    "yaml, words, steps",
    [
        ("first", ["--accumulate_grad_batches", "2", "--val_check_interval", "4"], 2),
        ("vq", ["--accumulate_grad_batches", "2", "--val_check_interval", "4"], 2),
        ("diffusion", [], 3),
        ("control", [], 3),
    ],
)
def test_a_stopped_model_resumes_bitwise(here, monkeypatch, yaml, words, steps):
    from ldm.models.adversarial import AdversarialAutoencoder
    from ldm.models.diffusion.ddpm import LatentDiffusion

    code, whole = start("whole", yaml, *words)
    assert code == 0 and last(whole)["global_step"] == 4
    latent = yaml in ("diffusion", "control")
    stop_after(monkeypatch, LatentDiffusion if latent else AdversarialAutoencoder, 3)
    code, folder = start("stopped", yaml, *words, "lightning.callbacks.image_logger=null")  # image logs change nothing
    assert code == 143 and last(folder)["global_step"] == steps
    assert main.main(["-r", str(folder), "-t"]) == 0
    assert differences(training_state(last(whole)), training_state(last(folder))) == []
    assert last(folder).get("generator_updates") == last(whole).get("generator_updates") == (None if latent else 4)


def test_diffusion_trains_on_a_first_stage_that_was_trained_before(here, monkeypatch, capsys):
    """The second stage starts in another folder."""
    code, first = start("first", "first", "--max_steps", "2")
    assert code == 0
    images = {path.name.split("_gs-")[0] for path in (first / "images" / "val").iterdir()}
    assert images == {"inputs", "reconstructions", "samples"}
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    weights = here / first / "checkpoints" / "last.ckpt"
    words = [
        "-b",
        "../diffusion.yaml",
        "-t",
        "-n",
        "ldm",
        f"+model.params.first_stage_config.params.ckpt_path={weights}",
    ]
    monkeypatch.chdir(elsewhere)
    capsys.readouterr()
    code, err = main.main(words), capsys.readouterr().err
    assert code == 0, err
    (run,) = (elsewhere / "logs").iterdir()
    trained = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert trained["global_step"] == 4 and trained["latent_diffusion"]["cond_dropout"] == 0.2
    before = torch.load(weights, weights_only=True)["state_dict"]
    for name, value in before.items():
        if name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")):
            assert torch.equal(trained["state_dict"][f"first_stage_model.{name}"], value)
    images = {path.name.split("_gs-")[0] for path in (run / "images" / "train").iterdir()}
    assert {"inputs", "reconstruction", "conditioning", "samples", "denoise_row", "samples_cfg_scale_3.00"} <= images
    assert "warning" not in err, err
    place = run.relative_to(elsewhere)
    assert f'next        python scripts/txt2img.py --ckpt {place} --prompt "..."' in err
    assert "images      on the CPU early logs are at steps 1, 4, 16, ..., with N 4, ddim_steps 20" in err

    weights.unlink()
    capsys.readouterr()
    assert main.main(["-t", "-r", str(run), "--max_steps", "5"]) == 0
    assert f"{weights}: no such file" in capsys.readouterr().err
    later = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert later["global_step"] == 5
    assert all(
        torch.equal(later["state_dict"][name], value)
        for name, value in trained["state_dict"].items()
        if "first_stage" in name
    )


def test_a_classifier_trains_on_a_runs_latents_by_its_recipe_and_guides_samples(here):
    for index, path in enumerate(sorted(here.glob("*/*.png"))):
        folder = here / "classes" / ("even", "odd")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / f"{index}.png")
    network = {**UNET["params"], "image_size": 4, "num_heads": -1, "num_head_channels": 16}
    config = text_model_config(
        timesteps=8, image_size=4, **{**KINDS["class"], "unet_config": {**UNET, "params": network}}
    )
    run = here / "logs" / "diffusion"
    (run / "configs").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    OmegaConf.save(OmegaConf.create(config), run / "configs" / "2026-01-01T00-00-00-project.yaml")
    diffusion = seed_weights(instantiate_from_config(OmegaConf.create(config["model"])))
    torch.save({"state_dict": diffusion.state_dict()}, run / "checkpoints" / "last.ckpt")

    data = ["data.params.train.params.root=classes", "data.params.train.params.size=16", "data.params.batch_size=2"]
    model = [
        f"model.params.diffusion_path={run}",
        "model.params.diffusion_ckpt_path=null",
        "model.params.num_classes=2",
    ]
    model += ["model.params.log_steps=2", "+data.params.num_workers=0"]
    words = ["--gpus", "0", "--max_steps", "3", "lightning.callbacks.image_logger.params.batch_frequency=2"]
    recipe = str(ROOT / "configs" / "recipes" / "noisy-classifier-folder.yaml")
    assert main.main(["-b", recipe, "-t", "-n", "judge", *words, *data, *model]) == 0
    judge = folder_of("judge")
    images = {path.name.split("_gs-")[0] for path in (judge / "images" / "train").iterdir()}
    assert images == {"inputs", "noisy", "labels", "predictions"}

    params = {
        "diffusion_path": str(run),
        "num_classes": 2,
        "log_steps": 2,
        "ckpt_path": str(judge / "checkpoints" / "last.ckpt"),
    }
    classifier = instantiate_from_config(
        {"target": "ldm.models.diffusion.classifier.NoisyLatentImageClassifier", "params": params}
    ).eval()
    state = classifier.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in last(judge)["state_dict"].items())
    cond, labels = (
        diffusion.eval().get_learned_conditioning({"class_label": torch.tensor([0, 1])}),
        torch.tensor([0, 1]),
    )

    def sample(**options):
        x_T = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        return DDIMSampler(diffusion).sample(4, 2, (4, 4, 4), cond, x_T=x_T, verbose=False, **options).samples

    guided = sample(score_corrector=ClassifierGuidance(classifier, labels, 50.0))
    assert torch.isfinite(guided).all() and not torch.allclose(guided, sample(), atol=1e-3)


def test_muon_with_groups_and_several_averages_resumes_bitwise_and_its_snapshots_combine(here, monkeypatch, capsys):
    """From main.py to weights of another EMA width, which sampling loads."""
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from scripts import posthoc_ema

    optimizer, averages = "model.params.optimizer_config", "[{decay: 0.99}, {sigma_rel: 0.05}, {sigma_rel: 0.1}]"
    words = [
        f"{optimizer}.target=torch.optim.Muon",
        f"{optimizer}.no_decay=true",
        f"{optimizer}.groups=[{{match: attn2, lr_factor: 0.1}}]",
        f"model.params.ema_config={{averages: {averages}, device: cpu, snapshot_every: 1}}",
        "lightning.callbacks.image_logger=null",
        "data.params.validation=null",
    ]
    code, whole = start("whole", "diffusion", *words)
    assert code == 0
    stop_after(monkeypatch, LatentDiffusion, 3)
    code, folder = start("stopped", "diffusion", *words)
    assert code == 143 and main.main(["-r", str(folder), "-t"]) == 0
    assert differences(training_state(last(whole)), training_state(last(folder))) == []
    steps = [[each.name for each in sorted((run / "ema_snapshots").iterdir())] for run in (whole, folder)]
    assert steps[0] == steps[1] == [f"step={step:09}.safetensors" for step in (1, 2, 3, 4)]
    assert main.main(["-r", str(folder), "-t", f"~{optimizer}", "--max_steps", "6"]) == 2
    assert "the checkpoint's optimizer is" in capsys.readouterr().err

    posthoc_ema.main([str(folder), "--sigma-rel", "0.1", "0.15"])
    state = last(folder)["state_dict"]
    made = read_weights(folder / "checkpoints" / "ema_sigma_rel_0.1.safetensors")
    name, average = "model.diffusion_model.out.2.weight", "model_ema.averages.sigma_rel_0_1.diffusion_modelout2weight"
    assert rel_error(made[name], state[average]) < 2e-3 and set(made) == {key for key in state if "ema." not in key}
    pipeline = load_model(
        read_model_info(find_run(folder).configs), folder / "checkpoints" / "ema_sigma_rel_0.15.safetensors"
    )
    assert "no EMA weights" not in capsys.readouterr().err
    loaded = pipeline.model.model.diffusion_model.time_embed[0].weight.float()  # 16 bit; the average of few steps
    assert rel_error(loaded, made["model.diffusion_model.time_embed.0.weight"]) < 0.05
    for words, message in (
        (["0.2", "0.2000001"], "two of them agree to 6 digits"),
        (["0.2", "--out", "x.ckpt"], "--out x.ckpt: expected a folder or a .safetensors file"),
    ):
        with pytest.raises(ValueError, match=message):
            posthoc_ema.main([str(folder), "--sigma-rel", *words])
