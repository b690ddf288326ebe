"""Adapters trained on a frozen base: what trains, what a checkpoint holds, resume and use of the checkpoint."""

import pytest
import pytorch_lightning as pl
import torch

from ldm.callbacks import ExactResume, StepSeed
from ldm.checkpoint import CheckpointError, read_weights
from ldm.checkpoint.diffusers.embeddings import read_embeddings
from ldm.checkpoint.source import base_of
from ldm.config.instantiate import instantiate_from_config
from ldm.data.datamodule import DataModuleFromConfig
from ldm.inference import load_model
from ldm.modules.adapters.token_embeddings import initial_vectors
from ldm.training.checkpoint_io import AtomicCheckpointIO
from tests.tiny import save_text_model, text_model_config

TOKEN = {"token": "<me>", "init": "handwritten seven", "vectors": 2}
KEY = "cond_stage_model.token_embeddings.vectors.0"


class Captions(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, k):
        return {"image": torch.sin(torch.arange(3072.0) + k).reshape(32, 32, 3), "caption": f"a photo of <me> {k}"}


def config_on(base, **params):
    return text_model_config(ckpt_path=str(base), token_embeddings=TOKEN, use_ema=False, **params)


def build(base, **params):
    torch.manual_seed(5)
    model = instantiate_from_config(config_on(base, **params)["model"])
    model.learning_rate = 0.05
    return model


def fit(model, folder, steps, resume=None):
    """Train to `steps` and return the checkpoint."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("ldm.config.instantiate._user_prefixes", ["tests"])
        data = DataModuleFromConfig(2, {"target": f"{__name__}.Captions"}, num_workers=0)
        data.setup("fit")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=folder,
        enable_checkpointing=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[StepSeed(3), ExactResume()],
        **quiet,
    )
    trainer.fit(model, data, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return folder / f"{steps}.ckpt"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_text_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    model = build(base.ckpt)
    return model, fit(model, tmp_path_factory.mktemp("run"), 4)


def test_a_token_starts_from_the_embeddings_of_its_words(base):
    model = build(base.ckpt)
    encoder = model.cond_stage_model
    words = encoder.embed_words("handwritten seven")
    assert torch.equal(encoder.token_embeddings.vectors[0], initial_vectors(words, 2)) and len(words) > 1


def test_only_the_vectors_change_and_the_base_keeps_every_bit(base, trained):
    model, _ = trained
    fresh = build(base.ckpt)
    changed = [name for name, x in fresh.state_dict().items() if not torch.equal(x, model.state_dict()[name])]
    assert changed == [KEY]
    assert list(model.trainable_parameters()) == [model.cond_stage_model.token_embeddings.vectors[0]]


def test_the_base_is_its_ema_weights(base):
    model = build(base.ckpt)
    averages = read_weights(base.ckpt, use_ema=True)
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, averages[f"model.{name}"]), name


def test_a_checkpoint_holds_the_vectors_and_a_record_of_the_base(base, trained):
    _, ckpt = trained
    content = torch.load(ckpt, weights_only=True)
    assert set(content["state_dict"]) == {KEY}
    assert base_of(ckpt).path == str(base.ckpt) and ckpt.stat().st_size < 100_000


def test_a_checkpoint_of_vectors_reads_as_whole_weights(base, trained):
    model, ckpt = trained
    weights = read_weights(ckpt)
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items() if name in weights)
    pipeline = load_model(config_on(base.ckpt), ckpt, "cpu", "full")
    with pipeline.sampling():
        ours, _ = pipeline.encode_prompts(["a <me>"])
    with torch.no_grad():
        assert torch.equal(ours, model.get_learned_conditioning(["a <me>"]))


def test_a_resumed_run_equals_an_uninterrupted_one(base, trained, tmp_path):
    half = fit(build(base.ckpt), tmp_path, 2)
    resumed = build(base.ckpt)
    end = torch.load(fit(resumed, tmp_path, 4, half), weights_only=True)
    whole = torch.load(trained[1], weights_only=True)
    assert torch.equal(end["state_dict"][KEY], whole["state_dict"][KEY])


def test_another_base_is_refused(base, trained, tmp_path):
    other = save_text_model(tmp_path)
    content = torch.load(other.ckpt, weights_only=True)
    content["state_dict"]["cond_stage_model.transformer.norm.weight"] += 1
    torch.save(content, other.ckpt)
    with pytest.raises(CheckpointError, match="other base weights"):
        fit(build(other.ckpt), tmp_path, 4, trained[1])
    moved = tmp_path / "moved.ckpt"
    record = torch.load(trained[1], weights_only=True)
    torch.save({**record, "base": {"path": "/nowhere/tiny.ckpt", "fingerprint": "0" * 16}}, moved)
    with pytest.raises(CheckpointError, match="other base weights"):  # tiny.ckpt next to it is another file
        read_weights(moved)
    other.ckpt.unlink()
    with pytest.raises(CheckpointError, match=r"adapters only; their base weights /nowhere/tiny.ckpt are missing"):
        read_weights(moved)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"token_embeddings": {**TOKEN, "vectors": 3}}, r"vectors.0 is \(3, \d+\) here and \(2, \d+\) there"),
        ({"token_embeddings": {**TOKEN, "token": "<other>"}}, "token_embeddings.token <other>: .* trained with <me>"),
        ({"adapters": {"rank": 2}}, "other adapters: .* tensors differ, adapters.* here and none there"),
        ({"use_ema": True}, "other adapters: .* model_ema"),
    ],
)
def test_a_checkpoint_with_other_adapters_is_refused_by_what_differs(base, trained, tmp_path, params, message):
    torch.manual_seed(5)
    model = instantiate_from_config(
        text_model_config(**{"ckpt_path": str(base.ckpt), "token_embeddings": TOKEN, "use_ema": False, **params})[
            "model"
        ]
    )
    model.learning_rate = 0.05
    with pytest.raises(CheckpointError, match=message):
        fit(model, tmp_path, 5, trained[1])


def test_a_trained_token_that_no_prompt_has_is_warned_of(base, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        fit(build(base.ckpt), tmp_path, 1)
    assert "token_embeddings" not in caplog.text
    config = text_model_config(ckpt_path=str(base.ckpt), use_ema=False, token_embeddings={**TOKEN, "token": "<none>"})
    model = instantiate_from_config(config["model"])
    model.learning_rate = 0.05
    with caplog.at_level("WARNING"):
        fit(model, tmp_path, 2)
    assert caplog.text.count("none of the 2 prompts of the first batch has <none>") == 1


@pytest.mark.parametrize("tokens", [["<lora>"], ["<my cat>", "<my-cat>"]])
def test_tokens_whose_files_would_overwrite_others_are_refused(tokens):
    sections = [{"token": token, "init": "cat"} for token in tokens]
    with pytest.raises(ValueError, match="would overwrite that of"):
        instantiate_from_config(text_model_config(token_embeddings=sections)["model"])


def test_too_many_vectors_are_refused_before_they_are_allocated():
    with pytest.raises(ValueError, match=f"{10**12} vectors, but a prompt has room"):
        instantiate_from_config(text_model_config(token_embeddings={**TOKEN, "vectors": 10**12})["model"])


def test_a_token_that_is_a_word_is_warned_of(caplog):
    with caplog.at_level("WARNING"):
        instantiate_from_config(text_model_config(token_embeddings={**TOKEN, "token": "<me>"})["model"])
        assert "is a word" not in caplog.text
        instantiate_from_config(text_model_config(token_embeddings={**TOKEN, "token": "Seven"})["model"])
    assert "the token 'Seven' is a word" in caplog.text


def test_training_without_a_base_is_refused(tmp_path):
    model = instantiate_from_config(text_model_config(token_embeddings=TOKEN)["model"])
    model.learning_rate = 0.1
    with pytest.raises(ValueError, match=r"set model.params.ckpt_path"):
        fit(model, tmp_path, 1)


def test_an_embedding_file_is_written_for_each_token(trained, tmp_path):
    model, _ = trained
    model.write_adapter_files(tmp_path)
    ((token, vectors),) = read_embeddings(tmp_path / "me.safetensors")
    assert token == "<me>" and torch.equal(vectors, model.cond_stage_model.token_embeddings.vectors[0])


def test_files_and_sampling_use_the_averages_of_vectors_and_layers(base, tmp_path):
    config = text_model_config(
        ckpt_path=str(base.ckpt), token_embeddings=TOKEN, adapters={"rank": 2, "alpha": 2.0}, use_ema=True
    )
    model = instantiate_from_config(config["model"])
    model.learning_rate = 0.05
    ckpt = fit(model, tmp_path, 2)
    model.write_adapter_files(tmp_path)
    trained = model.cond_stage_model.token_embeddings.vectors[0].detach().clone()
    with model.ema_scope():
        average = model.cond_stage_model.token_embeddings.vectors[0].detach().clone()
    ((_, written),) = read_embeddings(tmp_path / "me.safetensors")
    assert torch.equal(written, average) and not torch.equal(written, trained)
    for use_ema, expected in ((True, average), (False, trained)):
        sampled = load_model(config, ckpt, "cpu", "full", use_ema=use_ema).model
        assert torch.equal(sampled.cond_stage_model.token_embeddings.vectors[0], expected)


def test_training_continues_from_a_checkpoint_of_vectors(base, trained):
    _, ckpt = trained
    model = build(ckpt)
    assert torch.equal(model.state_dict()[KEY], torch.load(ckpt, weights_only=True)["state_dict"][KEY])
    assert model.base == base_of(ckpt)


def test_a_model_without_text_takes_no_tokens():
    config = text_model_config(
        token_embeddings=TOKEN, cond_stage_config={"target": "torch.nn.Identity"}, cond_stage_trainable=False
    )
    with pytest.raises(ValueError, match="token_embeddings: requires a text encoder of CLIP's tokens, not Identity"):
        instantiate_from_config(config["model"])
