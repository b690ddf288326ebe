"""Time of a sampler's own Python, above a bare loop over the same tensor operations, with a network that costs nothing.

    python benchmarks/sampler_overhead.py [--steps 50] [--repeats 30] [--plain]

The network returns a constant tensor. The bare loop has the tables of the run as Python numbers, made before its clock
starts, and per step nothing but the operations that the result depends on: the two halves of guidance joined, the
network's call, `torch.lerp`, the update of the latent, and the step's random numbers where a seed's published image
needs them. It has no options, callbacks, masks, checks, progress bar or intermediates. Its latents must be equal to the
sampler's. Both alternate; a row has the median and the 10th and 90th percentile of (sampler - bare loop) / steps, in
microseconds, for the loop alone and for the whole call of `sample`, which makes the tables of the run, too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from ldm.models.diffusion.samplers.denoiser import SamplingOptions, Steps
from ldm.models.diffusion.samplers.registry import make_sampler
from ldm.modules.diffusionmodules.schedule import Schedule, make_beta_schedule

Predict = Callable[[Tensor, int], Tensor]  # (x, k) -> eps


class NullModel:
    """A model whose network returns the same tensor at every call."""

    num_timesteps, parameterization, device = 1000, "eps", torch.device("cpu")

    def __init__(self, shape: tuple[int, ...]) -> None:
        betas = make_beta_schedule("linear", 1000, linear_start=0.00085, linear_end=0.0120)
        for name, table in Schedule.from_betas(betas).tables().items():
            setattr(self, name, torch.from_numpy(table).float())
        self.outputs = {size: torch.randn(size, *shape[1:]) for size in (shape[0], 2 * shape[0])}

    def apply_model(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.outputs[len(x)]


def ddim(x: Tensor, eps_of: Predict, S: int, c: dict[str, Any]) -> Tensor:
    for k in range(S - 1, -1, -1):
        eps = eps_of(x, k)
        x0 = (x - c["noise"][k] * eps) / c["signal"][k]
        x = c["signal_prev"][k] * x0 + c["direction"][k] * eps + c["sigma"][k] * torch.randn(x.shape)
    return x


def ancestral(x: Tensor, eps_of: Predict, S: int, c: dict[str, Any]) -> Tensor:
    for k in range(S - 1, -1, -1):
        x0 = (x - c["noise"][k] * eps_of(x, k)) / c["signal"][k]
        x = c["mean_x0"][k] * x0 + c["mean_xt"][k] * x + c["sigma"][k] * torch.randn(x.shape)
    return x


def euler(x: Tensor, eps_of: Predict, S: int, c: dict[str, Any]) -> Tensor:
    for k in range(S - 1, -1, -1):
        eps = eps_of(x, k)
        x = c["signal_prev"][k] * ((x - c["noise"][k] * eps) / c["signal"][k]) + c["noise_prev"][k] * eps
    return x


def plms(x: Tensor, eps_of: Predict, S: int, c: dict[str, Any]) -> Tensor:
    def move(x: Tensor, eps: Tensor, k: int) -> Tensor:
        torch.randn(x.shape)  # of the published code: its scale is 0, but it advances the generator
        return c["signal_prev"][k] * ((x - c["noise"][k] * eps) / c["signal"][k]) + c["noise_prev"][k] * eps

    old: list[Tensor] = []
    for k in range(S - 1, -1, -1):
        eps = eps_of(x, k)
        if not old:
            slope = (eps + eps_of(move(x, eps, k), max(k - 1, 0))) / 2
        elif len(old) == 1:
            slope = (3 * eps - old[0]) / 2
        elif len(old) == 2:
            slope = (23 * eps - 16 * old[1] + 5 * old[0]) / 12
        else:
            slope = (55 * eps - 59 * old[2] + 37 * old[1] - 9 * old[0]) / 24
        old = [*old, eps][-3:]
        x = move(x, slope, k)
    return x


def dpm_solver(x: Tensor, eps_of: Predict, S: int, c: dict[str, Any]) -> Tensor:
    last = None
    for k in range(S - 1, -1, -1):
        x0 = (x - c["noise"][k] * eps_of(x, k)) / c["signal"][k]
        x = c["keep"][k] * x + c["move"][k] * x0
        if last is not None:
            x = x + c["second"][k] * (x0 - last)
        last = x0
    return x


def unipc(x: Tensor, eps_of: Predict, S: int, c: dict[str, Any]) -> Tensor:
    base, old = x, list[Tensor]()
    for k in range(S - 1, -1, -1):
        x0 = (x - c["noise"][k] * eps_of(x, k)) / c["signal"][k]
        if old:
            order = min(2, len(old), k + 2)
            weight = c["correct"][k + 1][order - 1]
            x = c["keep"][k + 1] * base + c["move"][k + 1] * old[0]
            for i, other in enumerate([*old[1:order], x0]):
                x = x + weight[i] * (other - old[0])
        recent = [x0, *old][:2]
        order = min(len(recent), k + 1)
        base, old = x, recent
        weight = c["predict"][k][order - 1]
        x = c["keep"][k] * x + c["move"][k] * x0
        for i, other in enumerate(recent[1:order]):
            x = x + weight[i] * (other - x0)
    return x


LOOPS = {
    "ddim": ddim,
    "plms": plms,
    "dpm_solver": dpm_solver,
    "euler": euler,
    "unipc": unipc,
    "ancestral": ancestral,
}


def numbers(steps: Steps) -> dict[str, Any]:
    """The tables of a run as Python numbers, from float32 values."""
    alphas, ends = (np.asarray(a, dtype=np.float32) for a in (steps.alphas, steps.alphas_prev))
    scales = {"signal": alphas, "noise": 1 - alphas, "signal_prev": ends, "noise_prev": 1 - ends}
    tables = {name: np.sqrt(table) for name, table in scales.items()} | {"sigma": steps.sigmas, **steps.coefs}
    return {name: np.asarray(table, dtype=np.float32).tolist() for name, table in tables.items()}


def measured(name: str, shape: tuple[int, ...], S: int, repeats: int, guided: bool) -> dict[str, list[float]]:
    """Seconds a step of "bare", and of the sampler's "loop" and whole "call" above it."""
    model: Any = NullModel(shape)
    sampler, x_T = make_sampler(name, model), torch.randn(shape)
    cond, uncond = torch.randn(shape[0], 77, 768), torch.randn(shape[0], 77, 768) if guided else None
    scale = 5.0 if guided else 1.0
    steps = sampler.checked_steps(S)
    c, joined = numbers(steps), torch.cat([uncond, cond]) if uncond is not None else cond
    t = torch.as_tensor(steps.t, dtype=torch.int64 if steps.t.dtype.kind == "i" else torch.float32)
    times = t[:, None].expand(S, shape[0])

    def eps_of(x: Tensor, k: int) -> Tensor:
        t = times[k]
        if not guided:
            return model.apply_model(x, t, joined)
        uncond, cond = model.apply_model(torch.cat([x, x]), torch.cat([t, t]), joined).chunk(2)
        return torch.lerp(uncond, cond, scale)

    options: dict[str, Any] = {"verbose": False, "log_every_t": S + 1}

    def run_bare() -> Tensor:
        return LOOPS[name](x_T, eps_of, S, c)

    def run_loop() -> Tensor:
        return sampler.loop(x_T, run, S, **options).samples

    def run_call() -> Tensor:
        guidance: dict[str, Any] = {"unconditional_guidance_scale": scale, "unconditional_conditioning": uncond}
        return sampler.sample(S, shape[0], shape[1:], cond, x_T=x_T, **guidance, **options).samples

    seconds: dict[str, list[float]] = {"bare": [], "loop": [], "call": []}
    for repeat in range(repeats + 3):
        outputs, spent = [], []
        for each in (run_bare, run_loop, run_call):
            run = sampler._start(steps, x_T, cond, scale, uncond, SamplingOptions())
            torch.manual_seed(0)
            begin = time.perf_counter()
            outputs.append(each())
            spent.append((time.perf_counter() - begin) / S)
        assert all(torch.equal(outputs[0], x) for x in outputs), name
        if repeat >= 3:
            seconds["bare"].append(spent[0])
            seconds["loop"].append(spent[1] - spent[0])
            seconds["call"].append(spent[2] - spent[0])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--plain", action="store_true", help="without guidance")
    parser.add_argument("--samplers", default=",".join(LOOPS), help="comma-separated")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a second one would only join conditions, and waits where another job has its core
    print("| sampler | latents | bare loop | loop above it | call above it | microseconds a step: median (p10, p90)")
    print("|---|---|---|---|---|")
    with torch.no_grad():
        for name in args.samplers.split(","):
            for shape in ((1, 4, 8, 8), (1, 4, 64, 64)):
                seconds = measured(name, shape, args.steps, args.repeats, not args.plain)
                cells = []
                for values in seconds.values():
                    p10, median, p90 = np.percentile(np.array(values) * 1e6, (10, 50, 90))
                    cells.append(f"{median:.1f} ({p10:.1f}, {p90:.1f})")
                print(f"| {name} | {'x'.join(map(str, shape))} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
