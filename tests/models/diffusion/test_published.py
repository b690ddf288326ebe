"""Research code on this package, a small sample of each form: subclasses, replaced methods, the reverse process."""

import types

import pytest
import torch
from torch import nn

from ldm.models.autoencoder import AutoencoderKL, VQModel, VQModelInterface
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.models.diffusion.plms import PLMSSampler
from ldm.modules.attention import CrossAttention, SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import EncoderUNetModel, TimestepEmbedSequential, UNetModel
from ldm.modules.diffusionmodules.util import timestep_embedding
from tests.models.diffusion.samplers.toy import COND, SHAPE, UNCOND, X_T, ToyModel
from tests.models.diffusion.tiny import ATTEND, AUTOENCODER, CLASSES, batch, fit, latent_diffusion, unet
from tests.reference import randn, rel_error, seed_weights

CLASS = {"cond_stage_key": "class_label"}


def class_model(**changes):
    return latent_diffusion("crossattn", ATTEND, CLASSES, **CLASS, **changes)


@pytest.fixture(scope="module")
def model():
    return class_model()


def params(**changes):
    """Arguments of the constructor of a subclass."""
    shared = {"timesteps": 20, "image_size": 8, "channels": 4, "scale_factor": 0.2, "use_ema": False, **CLASS}
    stages = {"first_stage_config": AUTOENCODER, "cond_stage_config": CLASSES, "unet_config": unet(**ATTEND)}
    return {**shared, **stages, "conditioning_key": "crossattn", **changes}


# --------------------------------------------------------------------------------------------- subclasses of the model


class Controlled(LatentDiffusion):
    """The overrides of ControlNet's model, and the other published hooks, each counted."""

    def __init__(self, control_key, *args, **kwargs):
        self.__dict__["called"] = set()
        super().__init__(*args, **kwargs)
        self.control_key = control_key
        self.control_model = nn.Conv2d(3, 4, 4, stride=4)

    def register_schedule(
        self,
        given_betas=None,
        beta_schedule="linear",
        timesteps=1000,
        linear_start=1e-4,
        linear_end=2e-2,
        cosine_s=8e-3,
    ):
        self.called.add("register_schedule")
        super().register_schedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)

    def instantiate_first_stage(self, config):
        self.called.add("instantiate_first_stage")
        super().instantiate_first_stage(config)

    def instantiate_cond_stage(self, config):
        self.called.add("instantiate_cond_stage")
        super().instantiate_cond_stage(config)

    @torch.no_grad()
    def get_input(self, batch, k, bs=None, *args, **kwargs):
        self.called.add("get_input")
        x, c, *rest = super().get_input(batch, self.first_stage_key, *args, bs=bs, **kwargs)
        control = batch[self.control_key][:bs].permute(0, 3, 1, 2).float()
        return [x, {"c_crossattn": [c], "c_concat": [control]}, *rest]

    def apply_model(self, x_noisy, t, cond, *args, **kwargs):
        self.called.add("apply_model")
        context = torch.cat(cond["c_crossattn"], 1)
        control = self.control_model(torch.cat(cond["c_concat"], 1))
        return self.model.diffusion_model(x=x_noisy + control, timesteps=t, context=context)

    def training_step(self, batch, batch_idx):
        self.called.add("training_step")
        return super().training_step(batch, batch_idx)

    def shared_step(self, batch, **kwargs):
        self.called.add("shared_step")
        return super().shared_step(batch, **kwargs)

    def forward(self, x, c, *args, **kwargs):
        self.called.add("forward")
        t = torch.randint(0, self.num_timesteps, (x.shape[0],), device=self.device).long()
        return self.p_losses(x, c, t, *args, **kwargs)

    def p_losses(self, x_start, cond, t, noise=None):
        self.called.add("p_losses")
        noise = torch.randn_like(x_start) if noise is None else noise
        out = self.apply_model(self.q_sample(x_start=x_start, t=t, noise=noise), t, cond)
        loss_simple = self.get_loss(out, noise, mean=False).mean([1, 2, 3])
        logvar_t = self.logvar[t].to(self.device)
        loss = self.l_simple_weight * (loss_simple / torch.exp(logvar_t) + logvar_t).mean()
        loss += self.original_elbo_weight * (self.lvlb_weights[t] * loss_simple).mean()
        return loss, {f"{'train' if self.training else 'val'}/loss": loss.detach()}

    def get_unconditional_conditioning(self, N):
        self.called.add("get_unconditional_conditioning")
        return self.get_learned_conditioning({"class_label": torch.full((N,), 9)})

    @torch.no_grad()
    def log_images(self, batch, N=4, n_row=2, sample=False, ddim_steps=50, ddim_eta=0.0, **kwargs):
        self.called.add("log_images")
        z, c = self.get_input(batch, self.first_stage_key, bs=N)
        uncond = {**c, "c_crossattn": [self.get_unconditional_conditioning(N)]}
        samples, inter = self.sample_log(
            cond=c, batch_size=N, ddim=True, ddim_steps=2, eta=0.0,
            unconditional_guidance_scale=2.0, unconditional_conditioning=uncond,
        )  # fmt: skip
        row = self._get_denoise_row_from_list(inter["x_inter"])
        return {
            "reconstruction": self.decode_first_stage(z),
            "samples": self.decode_first_stage(samples),
            "row": row[None],
        }

    def configure_optimizers(self):
        self.called.add("configure_optimizers")
        return torch.optim.AdamW(list(self.control_model.parameters()), lr=self.learning_rate)


HOOKS = {name for name, value in vars(Controlled).items() if callable(value) and name != "__init__"}


def test_every_published_hook_that_a_subclass_overrides_is_called():
    model = seed_weights(Controlled("image", **params()))
    before = {name: p.clone() for name, p in model.named_parameters()}
    fit(model, steps=1)
    images = model.eval().log_images(batch(), N=2)
    assert images["row"].shape[2:] == (2 * 32, 3 * 32) and all(image.isfinite().all() for image in images.values())
    assert model.called == HOOKS
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"control_model"}


def test_the_packages_image_log_takes_an_override_of_the_unconditional_condition_and_of_get_input():
    model = seed_weights(Controlled("image", **params()))
    log = LatentDiffusion.log_images(model, batch(), N=2, sample=False, plot_diffusion_rows=False)
    assert {"inputs", "reconstruction"} <= set(log)
    plain = class_model(timesteps=20)
    plain.get_unconditional_conditioning = lambda N: torch.zeros(N, 1, 16)
    log = plain.log_images(batch(), 2, 2, True, 2, 0.0, plot_denoise_rows=False, unconditional_guidance_scale=2.0)
    assert "samples_cfg_scale_2.00" in log


def test_sampling_runs_through_an_overridden_step_of_the_reverse_process(model):
    class Still(LatentDiffusion):
        def p_mean_variance(self, x, c, t, clip_denoised, **kwargs):
            _, variance, log_variance, x0 = super().p_mean_variance(x, c, t, clip_denoised, **kwargs)
            return x, variance, torch.full_like(log_variance, -100.0), x0

    still = seed_weights(Still(**params()))
    cond = still.get_learned_conditioning({"class_label": torch.tensor([1, 2])})
    x_T = randn(0, 2, 4, 8, 8)
    assert rel_error(still.sample(cond, 2, x_T=x_T), x_T) < 1e-5


# ------------------------------------------------------------------------------------------- replaced methods of layers


def reference(self, x, context=None, mask=None):
    """Attention as research code writes it, from the members of the layer."""
    context = x if context is None else context
    q, k, v = (
        y.reshape(len(y), -1, self.heads, y.shape[-1] // self.heads).transpose(1, 2)
        for y in (self.to_q(x), self.to_k(context), self.to_v(context))
    )
    out = (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v
    return self.to_out(out.transpose(1, 2).flatten(2))


def edited(self, x, encoder_hidden_states=None, attention_mask=None, context=None, mask=None):
    """The signature that attention editors put in place: other arguments come before the context."""
    assert encoder_hidden_states is None and attention_mask is None
    return reference(self, x, context, mask)


@pytest.mark.parametrize("scope", ["class", "instance"])
@pytest.mark.parametrize("forward", [reference, edited])
def test_attention_may_be_replaced_for_the_class_or_one_layer(model, monkeypatch, scope, forward):
    network, calls = model.model.diffusion_model, []
    args = randn(0, 2, 4, 8, 8), torch.tensor([1, 500]), randn(1, 2, 3, 16)
    expected = network(*args)

    def counted(self, *args, **kwargs):
        calls.append(self)
        return forward(self, *args, **kwargs)

    layers = [module for module in network.modules() if type(module).__name__ == "CrossAttention"]
    if scope == "class":
        monkeypatch.setattr(CrossAttention, "forward", counted)
    else:
        for layer in layers:
            monkeypatch.setitem(layer.__dict__, "forward", types.MethodType(counted, layer))
    assert torch.allclose(network(*args), expected, atol=1e-5) and len(calls) == len(layers) > 1


def test_a_spatial_transformer_may_be_replaced(model, monkeypatch):
    args = randn(0, 2, 4, 8, 8), torch.tensor([1, 500]), randn(1, 2, 3, 16)
    monkeypatch.setattr(SpatialTransformer, "forward", lambda self, x, context=None: x + context.sum() * 0 + 1)
    assert not torch.equal(model.model.diffusion_model(*args), class_model().model.diffusion_model(*args) + 1)


class ControlledUNet(UNetModel):
    """A copy of the published forward pass, with something added at each skip connection."""

    def forward(self, x, timesteps=None, context=None, control=None, **kwargs):
        hs = []
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels, repeat_only=False))
        h = x.type(self.dtype)
        for module in self.input_blocks:
            h = module(h, emb, context)
            hs.append(h)
        h = self.middle_block(h, emb, context)
        for module in self.output_blocks:
            skip = hs.pop()
            h = module(torch.cat([h, skip if control is None else skip + control], dim=1), emb, context)
        return self.out(h.type(x.dtype))


def test_a_copy_of_the_published_forward_pass_gives_the_same_output():
    plain, copied = (seed_weights(cls(**unet(**ATTEND)["params"])) for cls in (UNetModel, ControlledUNet))
    args = randn(0, 2, 4, 8, 8), torch.tensor([1, 500]), randn(1, 2, 3, 16)
    assert torch.allclose(copied(*args), plain(*args), atol=1e-6)
    assert not torch.allclose(copied(*args, control=1.0), plain(*args))


def test_a_plain_layer_whose_forward_takes_a_context_gets_it():
    class Adds(nn.Module):
        def forward(self, x, scale=1.0, context=None):
            return x + scale * context.mean()

    class Ignores(nn.Module):
        def forward(self, x):
            return x * 2

    out = TimestepEmbedSequential(Adds(), Ignores())(torch.zeros(1, 2), None, torch.full((1, 1, 1), 3.0))
    assert torch.equal(out, torch.full((1, 2), 6.0))


# ------------------------------------------------------------------------------------------------ subclassed samplers


@pytest.mark.parametrize("base, name", [(DDIMSampler, "p_sample_ddim"), (PLMSSampler, "p_sample_plms")])
@pytest.mark.parametrize("guided", [False, True])
def test_an_overridden_step_is_called_and_one_that_calls_ours_changes_nothing(base, name, guided):
    calls = []

    def step(self, x, c, t, index, **kwargs):
        calls.append(index)
        assert t.shape == (2,)
        return getattr(base, name)(self, x, c, t, index, **kwargs)

    options = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": UNCOND} if guided else {}
    given = {"conditioning": COND, "x_T": X_T, "verbose": False, **options}
    outs = []
    for cls in (base, type("Own", (base,), {name: step})):
        torch.manual_seed(0)
        outs.append(cls(ToyModel()).sample(6, 2, SHAPE, **given).samples)
    assert torch.equal(*outs) and calls == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("base, name", [(DDIMSampler, "ddim_sampling"), (PLMSSampler, "plms_sampling")])
def test_an_overridden_loop_is_called_and_one_that_calls_ours_changes_nothing(base, name):
    calls = []

    def loop(self, cond, shape, **kwargs):
        calls.append(tuple(shape))
        return getattr(base, name)(self, cond, shape, **kwargs)

    given = {"conditioning": COND, "x_T": X_T, "verbose": False}
    outs = [cls(ToyModel()).sample(6, 2, SHAPE, **given) for cls in (base, type("Own", (base,), {name: loop}))]
    assert torch.equal(outs[0].samples, outs[1].samples) and calls == [(2, *SHAPE)]


def test_a_sampler_may_set_its_own_tables(model):
    class Own(DDIMSampler):
        def make_schedule(self, ddim_num_steps, ddim_discretize="uniform", ddim_eta=0.0, verbose=True):
            super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta, verbose)
            self.register_buffer("ddim_alphas", self.ddim_alphas / 2)

    sampler = Own(model)
    sampler.make_schedule(5, verbose=False)
    expected = 1 - model.alphas_cumprod[sampler.ddim_timesteps] / 2
    assert torch.allclose(sampler.ddim_sqrt_one_minus_alphas**2, expected)
    assert sampler.ddpm_num_timesteps == 1000 and torch.equal(sampler.alphas_cumprod, model.alphas_cumprod)
    assert sampler.ddim_sigmas_for_original_num_steps.shape == (1000,)
    with pytest.raises(AttributeError, match="no_such"):
        sampler.no_such  # noqa: B018


@pytest.mark.parametrize("original", [False, True])
def test_ddim_inversion_is_undone_by_decoding(original):
    model = ToyModel(timesteps=40)
    model.apply_model = lambda x, t, c: torch.full_like(x, 0.5)  # the same at both ends of a step
    sampler = DDIMSampler(model)
    sampler.make_schedule(40, verbose=False)
    z = randn(0, 2, *SHAPE)
    encoded, out = sampler.encode(z, None, 30, use_original_steps=original, return_intermediates=3)
    decoded = sampler.decode(encoded, None, 30, use_original_steps=original, verbose=False)
    assert not torch.allclose(encoded, z, atol=0.1) and torch.allclose(decoded, z, atol=1e-4)
    assert torch.equal(out["x_encoded"], encoded) and out["intermediate_steps"] == [0, 10, 20, 28, 29]
    assert torch.equal(out["intermediates"][-1], encoded)
    with pytest.raises(ValueError, match="t_enc 41: choose 0 to 40"):
        sampler.encode(z, None, 41)


# ------------------------------------------------------------------------------------------------ the reverse process


def test_the_reverse_process_has_the_published_members(model):
    cond = model.get_learned_conditioning({"class_label": torch.tensor([1, 2])})
    x, t = randn(0, 2, 4, 8, 8), torch.tensor([0, 700])
    mean, variance, log_variance, x0 = model.p_mean_variance(x, cond, t, clip_denoised=True, return_x0=True)
    assert float(x0.detach().abs().max()) <= 1.0 and torch.allclose(mean, model.q_posterior(x0, x, t).mean)
    assert variance.shape == log_variance.shape == (2, 1, 1, 1)
    out, _ = model.p_sample(x, cond, t, clip_denoised=True, return_x0=True)
    assert torch.equal(out[0], mean[0]) and not torch.equal(out[1], mean[1])  # no noise in the last step
    same = model.p_sample(x, cond, torch.tensor([700, 700]), repeat_noise=True, temperature=0.0)
    assert torch.equal(same, model.p_mean_variance(x, cond, torch.tensor([700, 700]), clip_denoised=False)[0])
    with pytest.raises(ValueError, match="return_codebook_ids is not supported"):
        model.p_mean_variance(x, cond, t, True, return_codebook_ids=True)


def test_progressive_denoising_returns_predictions_and_loops_return_latents(model):
    cond = model.get_learned_conditioning({"class_label": torch.tensor([1, 2, 3])})
    seen, options = [], {"verbose": False, "log_every_t": 1}
    x, predictions = model.progressive_denoising(
        cond, (4, 8, 8), batch_size=2, start_T=3, callback=seen.append, **options
    )
    assert x.shape == (2, 4, 8, 8) and len(predictions) == 3 and seen == [2, 1, 0]
    x, latents = model.p_sample_loop(cond[:2], (2, 4, 8, 8), return_intermediates=True, timesteps=3, **options)
    assert len(latents) == 4 and torch.equal(latents[-1], x)
    mask, x0 = torch.ones(2, 1, 8, 8), randn(3, 2, 4, 8, 8)
    kept = model.p_sample_loop(cond[:2], (2, 4, 8, 8), timesteps=2, mask=mask, x0=x0, verbose=False)
    assert rel_error(kept, x0) < 0.1


def test_a_model_of_pixels_takes_no_condition():
    model = seed_weights(DDPM(unet(in_channels=3, out_channels=3), 10, image_size=8, use_ema=False))
    x, t = randn(0, 2, 3, 8, 8), torch.tensor([3, 4])
    assert len(model.p_mean_variance(x, t, True)) == 3 and model.p_sample(x, t).shape == x.shape
    assert model.sample(2).shape == (2, 3, 8, 8)
    x, latents = model.p_sample_loop((2, 3, 8, 8), True)
    assert torch.equal(latents[-1], x)


@pytest.mark.parametrize("extended", [True, False])
def test_a_strict_load_takes_the_log_variance_of_a_file(model, extended):
    target = class_model()
    state = {**target.state_dict(), **({"logvar": torch.full((1000,), 0.5)} if extended else {})}
    target.load_state_dict(state)
    assert bool((target.logvar == (0.5 if extended else 0.0)).all()) and "logvar" not in target.state_dict()


# ------------------------------------------------------------------------------------------- positional constructors


def test_constructors_take_positional_arguments_in_the_published_order():
    ddconfig, loss = AUTOENCODER["params"]["ddconfig"], {"target": "torch.nn.Identity"}
    first = AutoencoderKL(ddconfig, loss, 4, None, [], "img", None, "val/rec_loss")
    assert (first.image_key, first.monitor, first.embed_dim) == ("img", "val/rec_loss", 4)
    vq = VQModel({**ddconfig, "double_z": False}, loss, 16, 4, None, [], "img", None, "m", None, None, 2.0)
    assert (vq.n_embed, vq.embed_dim, vq.image_key, vq.lr_g_factor) == (16, 4, "img", 2.0)
    interface = VQModelInterface(4, {**ddconfig, "double_z": False}, loss, 16)
    assert (interface.embed_dim, interface.n_embed) == (4, 16)
    encoder = EncoderUNetModel(8, 4, 32, 10, 1, [1], 0, [1, 2], True, 2, False, False, 2)
    assert encoder(randn(0, 2, 4, 8, 8), torch.tensor([1, 2])).shape == (2, 10)
    stages = (AUTOENCODER, CLASSES, 1, "class_label", False, True, None, "crossattn", 0.5, False)
    ldm = LatentDiffusion(
        *stages, unet(**ATTEND), 30, "cosine", "l1", None, [], False, "val/loss", False, "picture", 8, 4
    )
    assert (ldm.num_timesteps, ldm.loss_type, ldm.scale_factor, ldm.first_stage_key) == (30, "l1", 0.5, "picture")
    assert ldm.model.conditioning_key == "crossattn" and ldm.image_size == 8 and not ldm.use_ema


def test_log_images_takes_positional_arguments_in_the_published_order(model):
    log = model.log_images(batch(), 2, 2, False, 200, 1.0, ["inputs"], True, True)
    assert list(log) == ["inputs"]
