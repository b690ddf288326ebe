"""The trajectory of a diffusers scheduler at the noise levels of one of our runs, with the same network and noise."""

import torch

from ldm.models.diffusion.samplers.registry import make_sampler
from tests.models.diffusion.samplers.toy import COND, X_T, ToyModel, sample
from tests.reference import TOLERANCE, rel_error


def scheduler(cls, model, **config):
    betas = model.betas.double().numpy()
    return cls(num_train_timesteps=len(betas), trained_betas=betas, prediction_type="epsilon", **config)


def trajectory(sched, model, x, seed=0):
    """x after each step, under a scheduler whose timesteps are set."""
    torch.manual_seed(seed)
    xs = []
    for t in sched.timesteps:
        eps = model.apply_model(sched.scale_model_input(x, t), t.expand(len(x)), COND)
        x = sched.step(eps, t, x).prev_sample
        xs.append(x)
    return xs


def set_levels(sched, steps, calls=1):
    """Give the scheduler our timesteps and noise levels sigma / alpha; a step is `calls` network calls, the last 1."""
    sched.set_timesteps(len(steps.t))
    ends = torch.as_tensor([*steps.alphas[::-1], steps.alphas_prev[0]])
    sigmas, t = ((1 - ends) / ends).sqrt().float(), torch.as_tensor(steps.t[::-1].copy()).float()
    if calls == 2:
        t = torch.cat([t[:1], t[1:].repeat_interleave(2)])
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    sched.timesteps, sched.sigmas = t, sigmas
    sched.set_begin_index(0)


def assert_follows(name, cls, count, spacing, options=None, calls=1, divided=False, **config):
    """Our sampler follows the scheduler at every step; `divided` schedulers hold x / alpha."""
    model = ToyModel()
    ours = sample(name, model, count, options=options, ddim_discretize=spacing, log_every_t=1).intermediates["x_inter"]
    steps = make_sampler(name, model, **(options or {})).checked_steps(count, spacing=spacing)
    sched = scheduler(cls, model, **config)
    set_levels(sched, steps, calls)
    alpha = torch.as_tensor([*steps.alphas[::-1], steps.alphas_prev[0]]).sqrt().float()
    theirs = trajectory(sched, model, X_T / alpha[0] if divided else X_T)
    theirs = [*theirs[1::2], theirs[-1]] if calls == 2 else theirs
    for k, (x, expected) in enumerate(zip(ours[1:], theirs, strict=True)):
        assert rel_error(x, expected * alpha[k + 1] if divided else expected) < TOLERANCE, k
