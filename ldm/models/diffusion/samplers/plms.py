"""PLMS: linear multistep on DDIM's steps."""

from __future__ import annotations

from torch import Tensor

from ldm.models.diffusion.published import PublishedSampler
from ldm.models.diffusion.samplers.base import Sampler
from ldm.models.diffusion.samplers.ddim import ddim_steps
from ldm.models.diffusion.samplers.denoiser import SamplingRun, Steps


class PLMSSampler(Sampler):
    """Pseudo linear multistep, https://arxiv.org/abs/2202.09778 (Algorithm 2, its first step a Heun step)."""

    mask_blend = "before"
    published_loop = "plms_sampling"
    plms_sampling = PublishedSampler.sampling_loop

    def make_steps(self, S: int, eta: float, spacing: str) -> Steps:
        return ddim_steps(self.model, S, eta, spacing)

    def step(self, x: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        eps, x0 = run.predict(x, k)
        if run.starts_from_noise(k):  # `transfer` divides by alpha: take an Euler step and start the history after it
            return run.alpha_prev[k].sqrt() * x0 + (1 - run.alpha_prev[k]).sqrt() * eps, x0
        match run.history:
            case []:  # Heun: average with the noise after an Euler step
                x_euler, _ = self.transfer(x, eps, k, run)
                eps_next, _ = run.predict(x_euler, max(k - 1, 0))
                slope = (eps + eps_next) / 2
            case [a]:
                slope = (3 * eps - a) / 2  # Adams-Bashforth, orders 2 to 4 (eq. 9)
            case [b, a]:
                slope = (23 * eps - 16 * a + 5 * b) / 12
            case [c, b, a]:
                slope = (55 * eps - 59 * a + 37 * b - 9 * c) / 24
        run.history = [*run.history, eps][-3:]
        return self.transfer(x, slope, k, run)

    def transfer(self, x: Tensor, eps: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        """DDIM's step with a given noise (eq. 11) -> (x_prev, predicted x_0)."""
        alpha, alpha_prev = run.alpha[k], run.alpha_prev[k]
        x0 = run.refine((x - (1 - alpha).sqrt() * eps) / alpha.sqrt())
        run.noise(x)  # its scale is 0; generated so that a seed gives the published image
        return alpha_prev.sqrt() * x0 + (1 - alpha_prev).sqrt() * eps, x0
