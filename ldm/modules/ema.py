"""Averages of a model's parameters over training, under the names of the published checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ldm.config.instantiate import ConfigError
from ldm.config.suggest import did_you_mean
from ldm.config.types import NonNegativeInt, PositiveInt, Probability

PUBLISHED_DECAY = 0.9999
KINDS = ("decay", "sigma_rel")  # of averages, by the key that sets their width
CHUNK = 64  # parameters per fused call: enough for speed, and temporaries are far smaller than the model
CPU_CHUNK = 4  # on the CPU, where temporaries in the cache matter more than fewer calls


class LitEma(nn.Module):
    """Averages s ("shadows") of the trainable parameters p: a call after each optimizer step sets s <- d s + (1 - d) p.

    d is min(decay, (1 + n) / (10 + n)) in call n, or `decay` if `use_num_upates` (published spelling) is false. The
    shadow of `input_blocks.0.0.weight` is the buffer `input_blocks00weight`. Shadows of 16-bit models are float32:
    steps of 1 - d = 1e-4 vanish in bfloat16.

    every: number of calls per update; it uses the product of the decays of these calls, so that the average spans the
    same time. on_cpu: keep the shadows on the CPU, whatever the device of the model.
    """

    decay: Tensor
    num_updates: Tensor  # number of calls, or -1 without warm-up

    def __init__(
        self,
        model: nn.Module,
        decay: Probability = PUBLISHED_DECAY,
        use_num_upates: bool = True,
        *,
        every: PositiveInt = 1,
        on_cpu: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay={decay}: must be between 0 and 1")
        self.every, self.on_cpu = every, on_cpu
        self.configured_decay, self.counts = decay, use_num_upates or every > 1  # a count is needed to skip calls
        self.warm_up = use_num_upates or every == 1
        self._calls: int | None = None  # num_updates, known without waiting for the device
        self.m_name2s_name: dict[str, str] = {}
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if self.counts else -1, dtype=torch.int))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                shadow_name = name.replace(".", "")
                if hasattr(self, shadow_name):
                    raise ValueError(f"parameter {name!r}: its EMA name without dots, {shadow_name!r}, is already used")
                self.m_name2s_name[name] = shadow_name
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                device = "cpu" if on_cpu and not parameter.is_meta else parameter.device
                self.register_buffer(shadow_name, parameter.detach().to(device, dtype, copy=True))
        self._stored: list[list[Tensor]] = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LitEma:
        """Move to another device, unless `on_cpu`, but keep the dtype (see the class)."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            device = torch.device("cpu") if self.on_cpu and not moved.is_meta else moved.device
            if tensor.is_meta:
                return moved.to(device, tensor.dtype)
            return moved if (moved.dtype, moved.device) == (tensor.dtype, device) else tensor.to(device)

        return super()._apply(move, recurse)

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        # By their paths: `named_parameters` would take three times as long, 1 % of a small model's step.
        try:
            parameters = [_parameter(model, name).detach() for name in self.m_name2s_name]
        except (KeyError, AttributeError):  # a wrapper has names of its own
            named = dict(model.named_parameters())
            missing = [name for name in self.m_name2s_name if name not in named]
            if missing:
                text = f"EMA: the model has no parameter {missing[0]!r} ({len(missing)} missing)"
                raise ValueError(f"{text}: built from another model?") from None
            parameters = [named[name].detach() for name in self.m_name2s_name]
        shadows: dict[str, Any] = self._buffers
        return [shadows[name] for name in self.m_name2s_name.values()], parameters

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._calls = None

    def all_averages(self) -> Iterator[LitEma]:
        """Yield this average and the further ones of the same model, see EMAConfig."""
        yield from (module for module in self.modules() if isinstance(module, LitEma))

    @property
    def time(self) -> int:
        """Number of calls up to the last update; reading it waits for the device."""
        return int(self.num_updates) // self.every * self.every

    @torch.no_grad()
    def continue_with_own_settings(self) -> None:
        """Continue averages of another run's file with this average's decay; their number of calls is kept."""
        self.decay.fill_(self.configured_decay)
        if self.counts:
            self.num_updates.clamp_(min=0)
        else:
            self.num_updates.fill_(-1)
        self._calls = None

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Average from the present parameters of `model` on."""
        for shadow, parameter in zip(*self._pairs(model)):
            shadow.copy_(parameter)
        self.num_updates.fill_(0)
        self.continue_with_own_settings()

    def _one_minus_decay(self) -> Tensor:
        """1 - d of this update, (), on the device of the counter."""
        n = self.num_updates.float() - torch.arange(self.every, device=self.num_updates.device)  # calls, (every,)
        limited = (1.0 + n) / (10.0 + n) if self.warm_up else torch.ones_like(n)
        warm_up = torch.where(self.num_updates >= 0, limited, torch.ones_like(n))
        return 1.0 - torch.minimum(self.decay, warm_up).prod()

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Move the averages one step towards the parameters of `model`, without synchronizing with the CPU."""
        self.num_updates += (self.num_updates >= 0).to(self.num_updates.dtype)
        if self.every > 1:
            self._calls = int(self.num_updates) if self._calls is None else self._calls + 1
            if self._calls % self.every:
                return
        one_minus_decay = self._one_minus_decay()
        for s, p in self._chunks(*self._pairs(model)):
            step = torch._foreach_sub(s, p)
            torch._foreach_mul_(step, one_minus_decay)
            torch._foreach_sub_(s, step)

    @staticmethod
    def _chunks(shadows: list[Tensor], parameters: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Yield shadows and parameters in their dtype and on their device; copies from a GPU run one chunk ahead."""
        ahead: list[tuple[list[Tensor], list[Tensor], torch.Event | None]] = []
        on_cpu = all(tensors[0].device.type == "cpu" for tensors in (shadows, parameters) if tensors)
        chunk = CPU_CHUNK if on_cpu else CHUNK
        for start in range(0, len(shadows), chunk):
            s, p = shadows[start : start + chunk], parameters[start : start + chunk]
            leaves_gpu = p[0].is_cuda and not s[0].is_cuda
            values = [value.to(shadow.device, shadow.dtype, non_blocking=leaves_gpu) for value, shadow in zip(p, s)]
            ahead.append((s, values, torch.cuda.current_stream(p[0].device).record_event() if leaves_gpu else None))
            if len(ahead) > 1 or not leaves_gpu:
                yield _arrived(*ahead.pop(0))
        for each in ahead:
            yield _arrived(*each)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of `model` with the averages."""
        for shadow, parameter in zip(*self._pairs(model)):
            parameter.copy_(shadow)

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Save copies of the parameters for `restore`; calls nest."""
        self._stored.append([parameter.detach().clone() for parameter in parameters])

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Restore the parameters of the last `store`, and forget them. Raises RuntimeError without a `store`."""
        if not self._stored:
            raise RuntimeError("EMA: restore() without a store() before it")
        for stored, parameter in zip(self._stored.pop(), parameters, strict=True):
            parameter.copy_(stored)


def _parameter(module: Any, name: str) -> Tensor:
    """The parameter of this name. Raises KeyError or AttributeError if there is none at that place."""
    *path, leaf = name.split(".")
    for part in path:
        module = module._modules[part]
    return module._parameters[leaf]


def _arrived(
    shadows: list[Tensor], values: list[Tensor], copied: torch.Event | None
) -> tuple[list[Tensor], list[Tensor]]:
    if copied is not None:
        copied.synchronize()
    return shadows, values


class PowerEma(LitEma):
    """Averages with a power-function profile (Karras et al. 2024, arXiv 2312.02696, section 3.1).

    Call t sets s <- b s + (1 - b) p with b = (1 - 1 / t)^(gamma + 1), so the weight of call k is proportional to
    k^gamma, and the average always spans the same fraction of the training so far. sigma_rel: the relative standard
    deviation of the profile, its width. `decay` is the b of the last update.
    """

    sigma_rel: Tensor

    def __init__(
        self,
        model: nn.Module,
        sigma_rel: Annotated[float, "(0, 0.28)"],
        *,
        every: PositiveInt = 1,
        on_cpu: bool = False,
    ) -> None:
        super().__init__(model, decay=0.0, every=every, on_cpu=on_cpu)
        self.width, self.gamma = sigma_rel, power_gamma(sigma_rel)
        self.register_buffer("sigma_rel", torch.tensor(sigma_rel, dtype=torch.float32))

    def _one_minus_decay(self) -> Tensor:
        # The product of `every` decays; log1p and expm1, because 1 - b is near the rounding of float32.
        step = -torch.expm1((self.gamma + 1.0) * torch.log1p(-self.every / self.num_updates.float()))
        self.decay.copy_(1.0 - step)
        return step

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Raise ConfigError if the saved average has another width."""
        saved = state_dict.get(f"{prefix}sigma_rel")
        if saved is not None and abs(float(saved) / self.width - 1.0) > 1e-5:
            raise ConfigError(
                f"model.params.ema_config.averages: sigma_rel {self.width:g}, but the checkpoint's average has "
                f"{float(saved):g}; set it to that, or start a new run with model.params.ckpt_path"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def power_gamma(sigma_rel: float) -> float:
    """Return the exponent gamma of the profile of width sigma_rel in (0, 0.28) (arXiv 2312.02696, appendix C).

    sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2); 0.05 gives 16.97, 0.10 gives 6.94.
    """
    if not 0.0 < sigma_rel < 0.28:
        raise ValueError(f"sigma_rel {sigma_rel:g}: choose a number between 0 and 0.28, e.g. 0.05 or 0.1")
    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def average_name(key: str, value: float) -> str:
    """Return the name of an average in checkpoints and snapshots: decay_0_999, sigma_rel_0_05."""
    return f"{key}_{value:g}".replace(".", "_")


@dataclass(frozen=True)
class EMAConfig:
    """The section `ema_config` of a model: which averages a run keeps.

    averages: a list of `{decay: 0.9999}` (with `warm_up: false` without the published warm-up) and `{sigma_rel: 0.1}`
        (a power-function profile, see PowerEma). The first is `model_ema`, which validation and sampling use; the
        others are `model_ema.averages.NAME`.
    every: optimizer steps between updates, see LitEma. device: `cpu` keeps the averages there.
    snapshot_every: optimizer steps between stored snapshots of the power-function averages, from which
        scripts/posthoc_ema.py reconstructs other widths; 0 stores none. snapshots: the largest number of them; when it
        is reached, every second one is deleted and the interval doubles.
    """

    averages: Annotated[Sequence[Mapping[str, Any]], "e.g. [{decay: 0.9999}]"] = ({"decay": PUBLISHED_DECAY},)
    every: PositiveInt = 1
    device: Literal["cpu"] | None = None
    snapshot_every: NonNegativeInt = 0
    snapshots: PositiveInt = 64

    def __post_init__(self) -> None:
        names: list[str] = []
        for place, average in enumerate(self.averages):
            where, kinds = f"ema_config.averages[{place}]", [key for key in KINDS if key in average]
            for key in average:
                if key not in (*KINDS, "warm_up"):
                    raise ValueError(f"{where}.{key}: unknown key{did_you_mean(key, (*KINDS, 'warm_up'))}")
            if len(kinds) != 1 or (kinds == ["sigma_rel"] and "warm_up" in average):
                raise ValueError(
                    f"{where} {dict(average)}: expected {{decay: D}}, with or without warm_up, or {{sigma_rel: S}}"
                )
            value = average[kinds[0]]
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{where}.{kinds[0]} {value!r}: expected a number")
            if kinds == ["decay"] and not 0.0 <= value <= 1.0:
                raise ValueError(f"{where}.decay {value:g}: choose a number between 0 and 1, e.g. 0.9999")
            if kinds == ["sigma_rel"] and not 0.0 < value < 0.28:
                raise ValueError(f"{where}.sigma_rel {value:g}: choose a number between 0 and 0.28, e.g. 0.05 or 0.1")
            names.append(average_name(kinds[0], value))
            if names.count(names[-1]) > 1:
                raise ValueError(f"{where} {dict(average)}: an earlier one is the same; remove one of them")
        if not self.averages:
            raise ValueError("ema_config.averages []: expected at least one; set use_ema: false to train without EMA")
        if self.snapshot_every and not any(name.startswith("sigma_rel") for name in names):
            raise ValueError(
                "ema_config.snapshot_every: only power-function averages can be combined afterwards; "
                "add {sigma_rel: 0.05} and {sigma_rel: 0.1} to averages"
            )
        if self.snapshot_every % self.every:
            raise ValueError(
                f"ema_config.snapshot_every {self.snapshot_every}: expected a multiple of every {self.every}"
            )

    def build(self, model: nn.Module) -> LitEma:
        """Return the first average of `model`, with the others as its `averages`."""
        first, *others = (self._average(model, average) for average in self.averages)
        if others:
            names = [average_name(key, each[key]) for each in self.averages for key in KINDS if key in each]
            first.add_module("averages", nn.ModuleDict(dict(zip(names[1:], others))))
        return first

    def _average(self, model: nn.Module, average: Mapping[str, Any]) -> LitEma:
        on_cpu = self.device == "cpu"
        if "sigma_rel" in average:
            return PowerEma(model, average["sigma_rel"], every=self.every, on_cpu=on_cpu)
        return LitEma(model, average["decay"], average.get("warm_up", True), every=self.every, on_cpu=on_cpu)


def checked_ema(
    section: Mapping[str, Any] | None, use_ema: bool, ema_decay: float = PUBLISHED_DECAY
) -> EMAConfig | None:
    """Return the section `ema_config`, None without one. Raises ValueError if it contradicts the other settings."""
    if section is None:
        return None
    if not use_ema:
        raise ValueError("ema_config: use_ema is false; remove the section, or set use_ema: true")
    if ema_decay != PUBLISHED_DECAY:
        raise ValueError(f"ema_decay {ema_decay:g}: remove it, ema_config.averages has the decays")
    return EMAConfig(**section)
