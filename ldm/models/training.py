"""Base of all trained modules: initial weights, frozen parts, averaged weights, batches, optimizers and logs."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ldm import checkpoint
from ldm.checkpoint.names import EMA
from ldm.config.instantiate import ConfigError, instantiate_from_config
from ldm.models.lightning import LightningModule
from ldm.models.optimizers import OptimizerConfig, make_optimizers
from ldm.modules.ema import EMAConfig, LitEma, PowerEma
from ldm.modules.ranks import average_over_ranks, number_of_ranks, rank_weight
from ldm.rng import current_samples, preserve_torch_rng, samples_set

Module = TypeVar("Module", bound=nn.Module)
Losses = tuple[Tensor, dict[str, Tensor]]
"""A scalar loss and its named logs."""

FINGERPRINT = 8  # number of leading values of a weight that tell whether it still is as it was initialized


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite; raised before the optimizer step, so the weights are still good."""


class _WeightsAfterConstruction(ABCMeta):
    """Metaclass that loads `ckpt_path` once the whole object exists, including the parts that subclasses add."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        module = super().__call__(*args, **kwargs)
        module._initial = {
            name: (parameter._version, _leading_values(parameter))
            for name, parameter in module.named_parameters()
            if parameter.ndim > 1 and not name.startswith("loss.") and not parameter.is_meta
        }
        path, ignore_keys = module._initial_weights
        if path is not None:
            only = {"only_model": True} if module.load_only_unet else {}
            module.init_from_ckpt(path, ignore_keys, **only)
        return module


class TrainedModule(LightningModule, metaclass=_WeightsAfterConstruction):
    """Base of the modules that main.py trains. Subclasses pass unknown keywords to this constructor.

    ckpt_path, ignore_keys: initial weights, loaded by `init_from_ckpt` after construction.
    optimizer_config: the optimizer and its groups of parameters, see OptimizerConfig.
    """

    model: nn.Module
    model_ema: LitEma
    load_only_unet = False
    key_settings = "first_stage_key or cond_stage_key"  # settings that name keys of the batch, for error messages

    def __init__(
        self,
        ckpt_path: str | Path | None = None,
        ignore_keys: Sequence[str] = (),
        optimizer_config: Annotated[Mapping[str, Any], "ldm.models.optimizers.OptimizerConfig"] | None = None,
    ) -> None:
        super().__init__()
        self._initial_weights = (ckpt_path, ignore_keys)
        self.learning_rate: float | None = None  # main.py computes it from base_learning_rate
        self.scheduler_config: Mapping[str, Any] | None = None
        self.optimizer_config = None if optimizer_config is None else OptimizerConfig(**optimizer_config)
        self.optimizer_options: dict[str, Any] = {}  # of the published optimizer, and of others that take them
        self._loaded: set[str] = set()
        self._initial: dict[str, tuple[int, Tensor]] = {}  # version and leading values of each weight at first
        self.use_ema = False
        self._ema_options: dict[str, Any] = {}
        self._ema_depth = 0
        self._step_sums: dict[str, tuple[Any, int]] = {}  # logged values of an unfinished optimizer step: sum, samples

    # ------------------------------------------------------------------------------------------------------ weights

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        """Load weights from a file; `only_model` loads `model.*`, the network, alone. Raises CheckpointError."""
        self.load_tensors(path, checkpoint.read_weights(path), ignore_keys, only_model)

    def load_tensors(
        self, path: str, tensors: Mapping[str, Tensor], ignore_keys: Sequence[str], only_model: bool
    ) -> None:
        """Load the tensors of the file at `path`."""
        only = "model." if only_model else None
        widths = [name for name in tensors if name.startswith(EMA) and name.endswith(".sigma_rel")]
        tensors = {name: tensor for name, tensor in tensors.items() if name not in widths}
        checkpoint.load_weights(self, path, ignore_keys, only=only, weights=tensors)
        if self.use_ema:  # a published file has the first average alone, and its count is not of this run
            self.model_ema.continue_with_own_settings()
            for average in self.model_ema.all_averages():
                if average is not self.model_ema or isinstance(average, PowerEma):
                    average.restart(self.averaged_module())

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._loaded |= {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)}

    def untrained_weights(self) -> list[str]:
        """Return the keys of the weights that were neither loaded nor trained, those of the loss and constants aside.

        Decided by the weights themselves, however they came: a weight is untrained if nothing was written to it, or to
        the one that it is a copy of.
        """
        now = dict(self.named_parameters())
        return [
            name
            for name, (version, before) in self._initial.items()
            if name in now
            and name not in self._loaded
            and now[name]._version <= version
            and bool((before != before[0]).any())
            and torch.allclose(_leading_values(now[name]), before, rtol=1e-2)
        ]

    def on_fit_start(self) -> None:
        checkpoint.ensure_weights(self)

    # ------------------------------------------------------------------------------------------------------ batches

    def batch_value(self, batch: Mapping[str, Any], key: str, settings: str | None = None) -> Any:
        """Return `batch[key]`. Raises ConfigError with the keys of the batch if it is missing.

        settings: those that name the key, for the message.
        """
        if key not in batch:
            keys = ", ".join(sorted(batch))
            raise ConfigError(
                f"the batch has no {key!r}, it has {keys}: set {settings or self.key_settings} to one of these, "
                f"or let the dataset return {key!r}"
            )
        return batch[key]

    def get_images(self, batch: Mapping[str, Any], key: str, bs: int | None = None) -> Tensor:
        """Return the first `bs` images `batch[key]`, (B, H, W[, C]), as (B, C, H, W) float32 on this device."""
        x = self.batch_value(batch, key)[:bs]
        x = x[..., None] if x.ndim == 3 else x
        return x.to(self.device).permute(0, 3, 1, 2).contiguous().float()

    # ---------------------------------------------------------------------------------------------------- optimizer

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return all parameters with `requires_grad`, in the published order: submodules first, then own ones (logvar).

        Optimizer states in checkpoints refer to parameters by position.
        """
        named = sorted(self.named_parameters(), key=lambda item: "." not in item[0])
        return [parameter for _, parameter in named if parameter.requires_grad]

    def make_optimizers(
        self, cls: type[torch.optim.Optimizer], parts: Sequence[tuple[Sequence[nn.Parameter], float]]
    ) -> list[torch.optim.Optimizer]:
        """Return an optimizer for each of (parameters, factor of `learning_rate`), see `optimizer_config`.

        cls: the published optimizer. Raises ValueError if no learning rate is set.
        """
        if self.learning_rate is None:
            raise ValueError(
                "learning_rate is not set: assign model.learning_rate first (main.py takes it from base_learning_rate)"
            )
        rates = [(parameters, factor * self.learning_rate) for parameters, factor in parts]
        return make_optimizers(self, rates, self.optimizer_config, cls, self.optimizer_options)

    def with_schedule(self, optimizers: Sequence[torch.optim.Optimizer]) -> Any:
        """Return `optimizers` in Lightning's form, each with the schedule of `scheduler_config` if there is one."""
        if self.scheduler_config is None:
            return optimizers if len(optimizers) > 1 else optimizers[0]
        schedule = instantiate_from_config(self.scheduler_config).schedule
        return optimizers, [{"scheduler": LambdaLR(o, lr_lambda=schedule), "interval": "step"} for o in optimizers]

    def configure_optimizers(self) -> Any:
        return self.with_schedule(self.make_optimizers(torch.optim.AdamW, [(self.trainable_parameters(), 1.0)]))

    def compile_network(self, backend: str) -> None:
        """Compile the denoising network (`torch.compile`). Raises ConfigError for a model without one."""
        raise ConfigError(f"--compile: {type(self).__name__} has no denoising network to compile; leave it out")

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """Scaler of float16 losses; None in other precisions."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    @property
    def loss_scale(self) -> float:
        """Factor of float16 losses, else 1. It shrinks when an infinite gradient made the scaler skip a step."""
        return 1.0 if self.grad_scaler is None else self.grad_scaler.get_scale()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        scale = self.loss_scale
        super().optimizer_step(*args, **kwargs)
        # Here and not after the batch: a checkpoint written then holds this step's average.
        if self.loss_scale >= scale:
            self.update_ema()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients such that an optimizer step averages over its samples, not over its batches and ranks."""
        samples = current_samples()
        if samples is not None and samples.gradient_scale != 1.0:
            loss = loss * samples.gradient_scale
        super().backward(loss, *args, **kwargs)

    @property
    def logging_step(self) -> int:
        """Optimizer steps so far, the step of image logs."""
        return self.global_step

    # --------------------------------------------------------------------------------------------- averaged weights

    def averaged_module(self) -> nn.Module:
        """Return the module whose weights `model_ema` averages."""
        return self.model

    def add_ema(self, config: EMAConfig | None = None, **options: Any) -> None:
        """Average the trainable weights that exist now, as `model_ema`; options: those of LitEma, without a config."""
        self.use_ema, self._ema_options = True, {"config": config, **options}
        module = self.averaged_module()
        self.model_ema = LitEma(module, **options) if config is None else config.build(module)

    @property
    def ema_config(self) -> EMAConfig | None:
        """The section `ema_config`, if this model has one."""
        return self._ema_options.get("config")

    def restart_ema(self) -> None:
        """Average the weights that are trainable now, from their present values on."""
        self.add_ema(**self._ema_options)

    def update_ema(self) -> None:
        if self.use_ema:
            for average in self.model_ema.all_averages():
                average(self.averaged_module())

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Use the averaged weights within the scope; the trained ones return even after an error. Scopes may nest."""
        if not self.use_ema or self._ema_depth > 0:
            yield
            return
        module, names = self.averaged_module(), self.model_ema.m_name2s_name
        averaged = [parameter for name, parameter in module.named_parameters() if name in names]
        self.model_ema.store(averaged)
        self.model_ema.copy_to(module)
        self._ema_depth += 1
        try:
            yield
        finally:
            self._ema_depth -= 1
            self.model_ema.restore(averaged)

    # --------------------------------------------------------------------------------------------------------- logs

    def step_means(self, values: Mapping[str, Any], batch_size: int, last: bool) -> tuple[Mapping[str, Any], int]:
        """Average named scalars over the ranks, and over the batches so far of an optimizer step that accumulates.

        last: whether this is the last batch of the step. Returned with the number of samples, for the mean over the
        epoch: it counts the last batch's means, which are those of the step, and 0 for the others.
        """
        samples = current_samples()
        count = batch_size if samples is None else samples.total
        if number_of_ranks() > 1:
            scalars = [torch.as_tensor(value).detach().float() for value in values.values()]
            scalars = [value.to(self.device, non_blocking=True) for value in scalars]  # numbers do not wait for a GPU
            values = dict(zip(values, average_over_ranks(torch.stack(scalars), rank_weight())))
        if last and not self._step_sums:
            return values, count
        for name, value in values.items():
            total, seen = self._step_sums.get(name, (0.0, 0))
            self._step_sums[name] = total + float(count) * torch.as_tensor(value).detach().float(), seen + count
        means = {name: self._step_sums[name][0] / self._step_sums[name][1] for name in values}
        count = max(self._step_sums[name][1] for name in values) if last else 0
        if last:
            for name in values:
                del self._step_sums[name]
        return means, count

    def log_training(self, loss: Tensor, logs: Mapping[str, Any], batch_size: int) -> None:
        """Log the named losses of a training step, the loss in the progress bar, and a scheduled learning rate."""
        last = self._trainer is None or not self._trainer.fit_loop.epoch_loop._should_accumulate()
        means, count = self.step_means({"loss": loss.detach(), **logs}, batch_size, last)
        self.log_dict({name: means[name] for name in logs}, on_step=True, on_epoch=True, batch_size=count)
        self.log("loss", means["loss"], prog_bar=True, logger=False, batch_size=count)
        if self.scheduler_config is not None:
            lr = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.log("lr_abs", lr, on_step=True, on_epoch=False, batch_size=batch_size)

    def log_validation(self, logs: Mapping[str, Any], batch_size: int) -> None:
        if rank_weight() == 0:  # the batch only fills the last round
            batch_size = 0
        batch_size *= number_of_ranks()  # Lightning rounds the mean over the ranks of the number of samples
        self.log_dict(logs, on_step=False, on_epoch=True, batch_size=batch_size, sync_dist=True)


def _leading_values(parameter: Tensor) -> Tensor:
    return parameter.detach().reshape(-1)[:FINGERPRINT].cpu().float().clone()


def disabled_train(self: Module, mode: bool = True) -> Module:
    """Replacement of `train` for a frozen module: its mode no longer changes."""
    return self


def freeze(module: Module) -> Module:
    """Put a module in eval mode without gradients, and keep it in eval mode when its parent switches to training."""
    module.requires_grad_(False).eval()
    module.__dict__["train"] = partial(disabled_train, module)
    return module


@contextmanager
def fixed_noise(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the random generators within the scope and restore their states afterwards.

    The current samples, if any, use the same numbers in every scope.
    """
    samples = current_samples()
    with preserve_torch_rng(device), samples_set(samples and replace(samples, calls={})):
        torch.manual_seed(seed)
        yield
