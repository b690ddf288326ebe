"""Laws of frozen stages that are held in 16 bits while a diffusion model trains."""

import pytest
import pytorch_lightning as pl
import torch

from ldm.models.frozen import FrozenIn16Bits, hold_frozen_stages
from ldm.modules.quantize import VectorQuantizer2
from tests.models.diffusion.tiny import ATTEND, CAPTIONS, QUIET, batch, fit, latent_diffusion, loader
from tests.reference import randn


def text_model(**changes):
    return latent_diffusion("crossattn", ATTEND, CAPTIONS, cond_stage_key="caption", **changes)


def frozen_state(model):
    return {name: x for name, x in model.state_dict().items() if not name.startswith("model.")}


class DuringTraining(pl.Callback):
    """Outputs and state of a run's model between two steps."""

    def on_train_batch_end(self, trainer, model, *_):
        stages = (model.first_stage_model, model.cond_stage_model)
        self.dtypes = {x.dtype for stage in stages for x in stage.parameters()}
        self.state = {name: x.clone() for name, x in frozen_state(model).items()}
        with torch.no_grad():
            self.posterior = model.encode_first_stage(torch.tanh(randn(1, 2, 3, 32, 32))).parameters
            self.cond = model.get_learned_conditioning(["a", "b c"])


@pytest.mark.parametrize(("name", "dtype", "error"), [("bf16", torch.bfloat16, 0.03), ("fp16", torch.float16, 4e-3)])
def test_frozen_stages_are_in_16_bits_in_training_and_unchanged_in_checkpoints_and_afterwards(name, dtype, error):
    model, seen = text_model(frozen_precision=name), DuringTraining()
    before = {key: x.clone() for key, x in frozen_state(model).items()}
    posterior = model.encode_first_stage(torch.tanh(randn(1, 2, 3, 32, 32))).parameters
    cond = model.get_learned_conditioning(["a", "b c"])
    fit(model, steps=1, callbacks=[seen])
    assert seen.dtypes == {dtype}
    for out, exact in ((seen.posterior, posterior), (seen.cond, cond)):
        assert out.dtype == torch.float32
        assert 0 < (out - exact).norm() / exact.norm() < error
    for state in (seen.state, frozen_state(model)):
        assert state.keys() == before.keys()
        assert all(x.dtype == before[key].dtype and torch.equal(x, before[key]) for key, x in state.items())


def test_the_network_trains_in_float32_on_outputs_of_16_bits():
    gradients = []
    for name in (None, "bf16"):
        model = text_model(frozen_precision=name)
        if name:
            model.stages_in_16_bits = hold_frozen_stages(
                {"first": model.first_stage_model, "text": model.cond_stage_model}, name
            )
        torch.manual_seed(0)
        loss, _ = model.shared_step(batch())
        loss.backward()
        gradients.append(model.model.diffusion_model.out[2].weight.grad)
    assert gradients[0].dtype == gradients[1].dtype == torch.float32
    assert 0 < (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 0.1


def test_a_run_that_failed_saves_the_weights_before_the_cast_and_resumes(tmp_path):
    model = text_model(frozen_precision="bf16")
    before = {key: x.clone() for key, x in frozen_state(model).items()}

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "last.ckpt")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit(model, steps=2, callbacks=[Stop()])
    fit(model, steps=1)  # the stages return after it, as they do after a first one
    assert all(
        torch.equal(x, before[key])
        for key, x in dict(model.first_stage_model.named_parameters(prefix="first_stage_model")).items()
    )
    assert not model.first_stage_model._state_dict_hooks
    resumed = text_model(frozen_precision="bf16")
    resumed.learning_rate = 1e-3
    trainer = pl.Trainer(**QUIET, max_steps=2, limit_val_batches=0)
    trainer.fit(resumed.train(), loader(2), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert trainer.global_step == 2
    assert all(torch.equal(x, before[key]) for key, x in frozen_state(resumed).items())


def test_weights_that_16_bits_hold_exactly_are_not_kept_twice():
    layer = torch.nn.Linear(4, 4)
    layer.weight.data = layer.weight.data.bfloat16().float()
    before = {key: x.clone() for key, x in layer.state_dict().items()}
    held = FrozenIn16Bits(layer, torch.bfloat16)
    assert [torch.is_tensor(kept) for kept in held._before.values()] == [False, True]
    assert all(x.dtype == torch.float32 and torch.equal(x, before[key]) for key, x in layer.state_dict().items())


def test_tied_weights_and_codebooks_keep_their_values():
    tied = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    stage = torch.nn.ModuleList([tied, VectorQuantizer2(8, 4, beta=0.25)])
    before = {key: x.clone() for key, x in stage.state_dict().items()}
    FrozenIn16Bits(stage, torch.bfloat16)
    assert tied[1].weight is tied[0].weight and tied[0].weight.dtype == torch.bfloat16
    assert stage[1].embedding.weight.dtype == torch.float32
    assert all(torch.equal(x, before[key]) for key, x in stage.state_dict().items())


def test_a_trained_encoder_stays_in_float32_and_is_named(caplog):
    model, seen = text_model(frozen_precision="bf16", cond_stage_trainable=True), DuringTraining()
    with caplog.at_level("INFO"):
        fit(model, steps=1, callbacks=[seen])
    assert seen.dtypes == {torch.bfloat16, torch.float32}
    assert {x.dtype for x in model.cond_stage_model.parameters()} == {torch.float32}
    assert "first stage in bf16 (condition stage: trained, unchanged)" in caplog.text


def test_a_model_without_frozen_weights_and_unknown_precisions_are_refused():
    model = text_model(
        frozen_precision="bf16",
        first_stage_config={"target": "ldm.models.autoencoder.IdentityFirstStage"},
        cond_stage_trainable=True,
    )
    with pytest.raises(ValueError, match="frozen_precision bf16: this model has no frozen stage"):
        model.on_fit_start()
    with pytest.raises(ValueError, match="frozen_precision 'bf8': expected one of bf16, fp16"):
        text_model(frozen_precision="bf8")
