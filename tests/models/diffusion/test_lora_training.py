"""LoRA layers trained on a frozen base: what trains, its memory, what a checkpoint holds, resume, files, sampling."""

import pytest
import pytorch_lightning as pl
import torch

from ldm.callbacks import ExactResume, StepSeed
from ldm.checkpoint import CheckpointError, read_weights
from ldm.checkpoint.diffusers.lora import LoraNames, read_lora
from ldm.checkpoint.source import base_of
from ldm.config.instantiate import ConfigError, instantiate_from_config
from ldm.config.model_info import read_config
from ldm.config.validate import check_targets
from ldm.convert.lora import merge_lora
from ldm.inference import load_model
from ldm.modules.adapters.lora import adaptable, networks_of
from ldm.training.checkpoint_io import AtomicCheckpointIO
from tests.models.diffusion.test_adapters import Captions
from tests.models.diffusion.test_variants import batch
from tests.tiny import KINDS, save_model, save_text_model, text_model_config

LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.1, "targets": ["attention", "feed_forward", "text_encoder"]}


def build(base, seed=5, ema=False, **section):
    torch.manual_seed(seed)
    config = text_model_config(ckpt_path=str(base), adapters={**LORA, **section}, use_ema=ema)
    model = instantiate_from_config(config["model"])
    model.learning_rate = 0.02
    return model


def fit(model, folder, steps, resume=None):
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    callbacks, plugins = [ExactResume(), StepSeed(3)], [AtomicCheckpointIO()]
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", callbacks=callbacks, plugins=plugins, **off)
    batches = torch.utils.data.DataLoader(Captions(), batch_size=4)  # an epoch is two steps
    trainer.fit(model, batches, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return folder / f"{steps}.ckpt"


def adapter_state(state):
    return {name: x for name, x in state.items() if name.startswith(("adapters.", "model_ema."))}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_text_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=["lora", "dora-ema"])
def options(request):
    return {"lora": {}, "dora-ema": {"dora": True, "ema": True}}[request.param]


@pytest.fixture(scope="module")
def trained(base, options, tmp_path_factory):
    model = build(base.ckpt, **options)
    return model, fit(model, tmp_path_factory.mktemp("run"), 4)


def test_only_the_adapter_changes_and_the_base_keeps_every_bit(base, options, trained):
    model, _ = trained
    before, after = build(base.ckpt, **options).state_dict(), model.state_dict()
    changed = {name for name, x in before.items() if not torch.equal(x, after[name])}
    ups = {name for name in before if name.startswith("adapters.") and name.endswith(".up")}
    assert changed >= ups and len(ups) == len(model.adapters.layers())
    assert all(name.startswith(("adapters.", "model_ema.")) for name in changed)


def test_optimizer_and_gradients_are_of_the_size_of_the_adapter(trained):
    model, ckpt = trained
    size = sum(p.numel() for p in model.adapters.parameters())
    assert sum(p.numel() for p in model.trainable_parameters()) == size
    assert sum(p.grad.numel() for p in model.parameters() if p.grad is not None) == size
    (state,) = torch.load(ckpt, weights_only=True)["optimizer_states"]
    moments = [x for entry in state["state"].values() for x in entry.values() if x.ndim]
    assert sum(x.numel() for x in moments) == 2 * size
    assert size < 0.2 * sum(p.numel() for p in model.parameters())


def test_the_frozen_networks_stay_in_eval_mode(base):
    model = build(base.ckpt).train()
    assert model.adapters.training and not model.model.training and not model.cond_stage_model.training


@pytest.mark.parametrize("targets, distinct", [(["text_encoder"], True), (["attention"], False)])
def test_equal_captions_have_dropout_of_their_own_if_the_text_encoder_has_adapters(base, targets, distinct):
    model = build(base.ckpt, targets=targets).train()
    for layer in model.adapters.layers().values():
        torch.nn.init.ones_(layer.up)
    first, second = model.encode_distinct(["a cat", "a cat"])
    assert torch.equal(first, second) != distinct
    assert torch.equal(*model.eval().encode_distinct(["a cat", "a cat"]))


def test_a_checkpoint_holds_the_adapter_and_a_record_of_the_base(base, options, trained):
    model, ckpt = trained
    content = torch.load(ckpt, weights_only=True)
    assert set(content["state_dict"]) == set(adapter_state(model.state_dict()))
    assert base_of(ckpt).path == str(base.ckpt)
    assert any(name.startswith("model_ema.") for name in content["state_dict"]) == bool(options.get("ema"))


def test_a_resumed_run_equals_an_uninterrupted_one(base, options, trained, tmp_path):
    half = fit(build(base.ckpt, **options), tmp_path, 2)
    end = torch.load(fit(build(base.ckpt, seed=6, **options), tmp_path, 4, half), weights_only=True)
    whole = torch.load(trained[1], weights_only=True)
    assert end["state_dict"].keys() == whole["state_dict"].keys()
    assert [name for name, x in whole["state_dict"].items() if not torch.equal(end["state_dict"][name], x)] == []


def test_another_scale_is_refused_at_resume(base, options, trained, tmp_path):
    with pytest.raises(ValueError, match=r"adapters.alpha 8: .*trained with 4;"):
        fit(build(base.ckpt, **{**options, "alpha": 8.0}), tmp_path, 6, trained[1])


def test_new_dora_layers_start_from_the_lengths_of_the_loaded_weights(base):
    model = build(base.ckpt, dora=True, ema=True)
    key, layer = next(iter(model.adapters.layers().items()))
    weight = networks_of(model)["unet"].get_submodule(key.removeprefix("unet.")).weight
    assert torch.allclose(layer.magnitude.flatten(), weight.flatten(1).norm(dim=1))
    shadow = model.model_ema.m_name2s_name[f"adapters.{key}.magnitude"]
    assert torch.equal(model.model_ema.get_buffer(shadow), layer.magnitude)


def test_the_written_file_is_the_adapter_in_kohyas_names(options, trained, tmp_path):
    model, _ = trained
    model.write_adapter_files(tmp_path)
    names = LoraNames(adaptable(networks_of(model)), text_model_config())
    read = read_lora(tmp_path / "lora.safetensors", names)
    with model.ema_scope():
        weights = {key: lora.map(torch.clone) for key, lora in model.adapters.weights().items()}
    assert list(weights) and set(read) == set(weights)
    for key, lora in weights.items():
        assert torch.equal(read[key].up, lora.up) and torch.equal(read[key].down, lora.down)
        assert read[key].alpha == lora.alpha == 4.0


@pytest.mark.parametrize("ema", [False, True])
def test_sampling_uses_the_base_and_the_adapter(base, options, trained, ema):
    model, ckpt = trained
    if ema and not options.get("ema"):
        pytest.skip("trained without averages")
    config = text_model_config(ckpt_path=str(base.ckpt), adapters={**LORA, "dora": bool(options.get("dora"))})
    pipeline = load_model(config, ckpt, "cpu", "full", use_ema=ema)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 70])
    model.eval()
    with pipeline.sampling():
        cond, _ = pipeline.encode_prompts(["a seven", "an eight"])
        ours = pipeline.model.apply_model(x, t, cond)
    with torch.no_grad(), model.ema_scope() if ema else torch.no_grad():
        expected = model.apply_model(x, t, model.get_learned_conditioning(["a seven", "an eight"]))
    assert torch.allclose(ours, expected, atol=1e-5)
    untrained = build(base.ckpt)
    with torch.no_grad():
        unadapted = untrained.apply_model(x, t, untrained.get_learned_conditioning(["a seven", "an eight"]))
    assert not torch.allclose(ours, unadapted, atol=1e-3)


def test_a_run_may_start_from_an_adapter(base, options, trained):
    model = build(trained[1], seed=9, **options)
    state, saved = adapter_state(model.state_dict()), torch.load(trained[1], weights_only=True)["state_dict"]
    assert all(torch.equal(state[name], x) for name, x in saved.items())


def test_a_run_with_averages_continues_an_adapter_without_them(base, options, trained):
    saved = torch.load(trained[1], weights_only=True)["state_dict"]
    model = build(trained[1], **{**options, "ema": True})
    layers = {name: x for name, x in saved.items() if name.startswith("adapters.")}
    assert all(torch.equal(model.state_dict()[name], x) for name, x in layers.items())
    assert base_of(trained[1]) == model.base
    with model.ema_scope():
        averages = adapter_state(model.state_dict())
    averaged = any(name.startswith("model_ema.") for name in saved)
    assert averaged or all(torch.equal(averages[name], x) for name, x in layers.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ["attention"]}, "has other adapters: .* tensors differ, adapters.text"),
        (
            {"targets": ["attention", "feed_forward", "text_encoder", "convolutions"]},
            "has other adapters: .* tensors differ, adapters.unet",
        ),
        ({"alpha": 8.0}, r"adapters.alpha 8: .*trained with 4"),
    ],
)
def test_a_run_refuses_to_start_from_other_adapters(base, options, trained, change, message):
    with pytest.raises((CheckpointError, ValueError), match=message):
        build(trained[1], **{**options, **change})


def test_a_model_without_the_section_refuses_an_adapter(base, options, trained):
    config = text_model_config(ckpt_path=str(trained[1]))
    for lose in (
        lambda: instantiate_from_config(config["model"]),
        lambda: load_model(config, trained[1], "cpu", "full"),
        lambda: merge_lora(config, trained[1], [], trained[1].with_name("merged.ckpt")),
    ):
        with pytest.raises(CheckpointError, match=r"are adapters \(adapters.unet.*would be lost: .*merge_lora.py"):
            lose()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "control"])
def test_every_kind_of_model_trains_and_samples_with_adapters(tmp_path, kind):
    saved = save_model(tmp_path, kind)
    config = read_config(saved.config)
    config.model.params |= {"ckpt_path": str(saved.ckpt), "adapters": {"rank": 2, "targets": ["convolutions"]}}
    model = instantiate_from_config(config.model).eval()
    assert all(name.startswith("adapters.") for name, x in model.named_parameters() if x.requires_grad)
    for layer in model.adapters.layers().values():
        torch.nn.init.normal_(layer.up)
    if "target" in KINDS[kind]:
        model.shared_step(batch())[0].backward()
        assert all(x.grad.any() for x in model.adapters.parameters())
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "run.ckpt")
    pipeline = load_model(config, tmp_path / "run.ckpt", "cpu", "full", use_ema=False)
    theirs, ours = model.model.diffusion_model, pipeline.model.model.diffusion_model
    x, t, context = torch.randn(2, theirs.in_channels, 8, 8), torch.tensor([3, 70]), torch.randn(2, 5, 16)
    given = x, t, context if theirs.context_dim else None, t if theirs.num_classes else None
    with torch.no_grad():
        assert torch.allclose(ours(*given), theirs(*given), atol=1e-4)
        assert not torch.allclose(ours(*given), saved.model.model.diffusion_model(*given), atol=1e-2)


@pytest.mark.parametrize("section", [{"adapters": LORA}, {"token_embeddings": {"token": "<me>", "init": "seven"}}])
def test_a_controlldm_refuses_adapters_with_the_next_step(section):
    config = text_model_config(**{**KINDS["control"], "cond_stage_trainable": False, **section})
    (name,) = section
    with pytest.raises(ValueError, match=f"{name}: a ControlLDM trains its ControlNet alone; .*--lora or --embedding"):
        instantiate_from_config(config["model"])


def test_adapters_of_a_fine_tune_refuse_a_base_without_its_input_channels(base):
    """Frozen, the new channels would stay zero, and the record of the base would name weights that do not fit."""
    config = text_model_config(**{**KINDS["edit"], "cond_stage_trainable": False})
    del config["model"]["params"]["finetune_keys"]
    config["model"]["params"] |= {"adapters": LORA, "ckpt_path": str(base.ckpt)}
    with pytest.raises(
        CheckpointError, match=r"has 4 input channels, the model 8; .* pass the weights of a fine-tuned"
    ):
        instantiate_from_config(config["model"])


def test_whole_weights_of_a_run_are_the_base_and_the_adapter(base, trained):
    weights, own = read_weights(trained[1]), read_weights(base.ckpt, use_ema=True)
    assert all(torch.equal(weights[name], x) for name, x in own.items())
    assert any(name.startswith("adapters.unet.") for name in weights)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rnk": 4}, r"adapters.rnk.*did you mean 'rank'"),
        ({"rank": 0}, r"adapters.rank 0: expected an integer >= 1"),
        ({"targets": ["attn"]}, r"targets: 'attn' names none of the"),
    ],
)
def test_wrong_sections_are_refused(section, message):
    config = text_model_config(adapters=section)
    with pytest.raises((ConfigError, ValueError), match=message):
        check_targets(config)
        instantiate_from_config(config["model"])
