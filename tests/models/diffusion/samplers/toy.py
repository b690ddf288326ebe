"""Small models that samplers can run, shared inputs, and the exact solution for Gaussian data."""

import torch
from torch import Tensor, nn

from ldm.models.diffusion.samplers.registry import SAMPLERS, make_sampler
from ldm.modules.diffusionmodules.parameterization import get_parameterization
from ldm.modules.diffusionmodules.schedule import Schedule, make_beta_schedule
from tests.reference import randn, rel_error

SHAPE = (4, 6, 6)
X0, X_T, COND, UNCOND = randn(1, 2, *SHAPE), randn(2, 2, *SHAPE), randn(3, 2, 4, 1, 1), randn(4, 2, 4, 1, 1)
GUIDED = {"unconditional_guidance_scale": 5.0, "unconditional_conditioning": UNCOND}


def sample(name, model, steps=8, seed=0, options=None, **kwargs):
    """(samples, intermediates) of two latents from X_T; `options` are the sampler's constructor arguments."""
    torch.manual_seed(seed)
    kwargs = {"conditioning": COND, "x_T": X_T, "verbose": False, **kwargs}
    return make_sampler(name, model, **(options or {})).sample(steps, 2, SHAPE, **kwargs)


class ToyModel(nn.Module):
    """Everything that a sampler may ask of a model, with a smooth made-up network (that of the reference figures)."""

    def __init__(self, parameterization: str = "eps", timesteps: int = 1000, zero_terminal_snr: bool = False) -> None:
        super().__init__()
        self.parameterization, self.num_timesteps, self.device = parameterization, timesteps, torch.device("cpu")
        self.calls: list[tuple[Tensor, Tensor]] = []
        betas = make_beta_schedule("linear", timesteps, linear_start=0.00085, linear_end=0.0120)
        for name, table in Schedule.from_betas(betas, zero_terminal_snr=zero_terminal_snr).tables().items():
            self.register_buffer(name, torch.from_numpy(table).float())

    def apply_model(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        self.calls.append((x, t))
        w = 0.5 + 0.4 * torch.cos(t.float() / 300.0)
        return torch.tanh(0.9 * x) * w[:, None, None, None] + 0.1 * c

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        noise = torch.randn_like(x0) if noise is None else noise
        return (
            self.sqrt_alphas_cumprod[t][:, None, None, None] * x0
            + self.sqrt_one_minus_alphas_cumprod[t][:, None, None, None] * noise
        )


class GaussianModel(ToyModel):
    """The exact denoiser of data distributed as N(mean, std^2), in any parameterization."""

    def __init__(self, parameterization: str = "eps", mean: float = 0.7, std: float = 0.3, **kwargs: bool) -> None:
        super().__init__(parameterization, **kwargs)
        self.mean, self.std = mean, std

    def apply_model(self, x: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
        position = t.float().clamp(0, self.num_timesteps - 1)
        low = position.floor().long()
        high = (low + 1).clamp(max=self.num_timesteps - 1)
        log_alpha = self.alphas_cumprod.log() / 2
        between = torch.lerp(log_alpha[low], log_alpha[high], position - low).exp()
        alpha = torch.where(position == low, self.sqrt_alphas_cumprod[low], between)[:, None, None, None]
        sigma = (1 - alpha**2).sqrt()
        x0 = self.clean(x, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        return get_parameterization(self.parameterization).target(x0, eps, alpha, sigma)

    def clean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x], by Gaussian conjugacy."""
        return self.mean + alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * (x - alpha * self.mean)


class GaussianConsistencyModel(GaussianModel):
    """The exact consistency function of the same data: the clean end of the probability flow through x."""

    def clean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.mean + self.std * (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2).sqrt()


def on_the_flow(model, alphas, u):
    """Where the exact probability flow of the data passes at a product of (1 - beta), for standard normal u."""
    return (alphas**0.5 * model.mean + (alphas * model.std**2 + 1 - alphas) ** 0.5 * u).float()


def error_between_fixed_times(name, steps, spacing="uniform", **options):
    """Relative error of a run that starts on the exact flow, at timestep 0 or the first timestep of DDIM's spacing.

    The last step of a k-sampler goes on to the clean latent, where the noise level jumps: the error is taken before it.
    """
    model, u = GaussianModel(), randn(3, 1, *SHAPE)
    sampler, eta = make_sampler(name, model, **options), 0.0 if SAMPLERS[name].takes_eta else None
    run = sampler.checked_steps(steps, eta, spacing)
    kwargs = {"x_T": on_the_flow(model, run.alphas[-1], u), "eta": eta, "ddim_discretize": spacing, "log_every_t": 1}
    x, inter = sampler.sample(steps, 1, SHAPE, verbose=False, **kwargs)
    if run.alphas_prev[0] == 1.0:
        return rel_error(inter["x_inter"][-2], on_the_flow(model, run.alphas[0], u))
    return rel_error(x, on_the_flow(model, run.alphas_prev[0], u))


def assert_order(name, order, spacing, counts=(23, 47), /, **options):
    coarse, fine = (error_between_fixed_times(name, steps, spacing, **options) for steps in counts)
    assert coarse / fine > 0.85 * (counts[1] / counts[0]) ** order
