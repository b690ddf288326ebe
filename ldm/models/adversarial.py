"""Training of a first stage against a discriminator, under Lightning's manual optimization: the base of the KL and VQ autoencoders."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer, do_nothing_closure
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from ldm import checkpoint
from ldm.config.instantiate import ConfigError, accepted_params, instantiate_from_config
from ldm.config.suggest import did_you_mean
from ldm.models.training import NonFiniteError
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.losses.contperceptual import DummyLoss
from ldm.modules.losses.lpips import PerceptualWeightsError
from ldm.modules.losses.reconstruction import DISCRIMINATOR, GENERATOR

CLIP_ALGORITHMS = ("norm", "value")
ADAM_BETAS = (0.5, 0.9)


class AdversarialAutoencoder(pl.LightningModule):
    """Encoder, decoder, loss, and the two-optimizer training loop. Subclasses own the latent: `reconstruct`, `loss_of`, `encode`, `decode`.

    Batches are dicts; `batch[image_key]` holds pictures (B, H, W, C) in [-1, 1].
    Whoever trains sets `learning_rate`, and `accumulate_grad_batches`, `gradient_clip_val` and `gradient_clip_algorithm`, which a Trainer
    refuses under manual optimization. `generator_updates` counts batches / accumulation: it is what `disc_start` refers to, what
    `trainer.global_step` and so `max_steps` count too, and it is saved beside the state_dict.
    """

    loss_target = "ldm.modules.losses.LPIPSWithDiscriminator"  # what a config without a loss is told to name
    lr_g_factor = 1.0  # the generator's learning rate as a multiple of `learning_rate`

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        image_key: str,
        colorize_nlabels: int | None,
        monitor: str | None,
        scheduler_config: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.learning_rate: float | None = None
        self.accumulate_grad_batches = 1
        self.gradient_clip_val: float | None = None
        self.gradient_clip_algorithm = "norm"
        self.generator_updates = 0
        self.image_key = image_key
        self.scheduler_config = scheduler_config
        if monitor is not None:
            self.monitor = monitor
        check_ddconfig(ddconfig)
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig)
        if colorize_nlabels is not None:
            if not isinstance(colorize_nlabels, int):
                raise ValueError(f"colorize_nlabels={colorize_nlabels!r}: expected the number of labels, an int")
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        self._window: list[
            Mapping[str, Tensor]
        ] = []  # named losses since the last check, to say which one is not finite

    # ---------------------------------------------------------------------------------------- what a subclass provides

    def reconstruct(self, inputs: Tensor) -> tuple[Tensor, Any]:
        """(reconstructions (B, C, H, W), whatever `loss_of` needs of the latent)."""
        raise NotImplementedError

    def loss_of(
        self, inputs: Tensor, reconstructions: Tensor, latent: Any, optimizer_idx: int, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The configured loss of the generator (0) or the discriminator (1), and its named logs."""
        raise NotImplementedError

    def latent_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters between encoder and decoder."""
        raise NotImplementedError

    def on_generator_update(self) -> None:
        """Called after each step of the generator's optimizer that moved its weights."""

    # --------------------------------------------------------------------------------------------------------- weights

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load weights from a file. CheckpointError says what is wrong."""
        checkpoint.load_weights(self, path, ignore_keys)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["generator_updates"] = self.generator_updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Checkpoints of the published implementation counted the same in Lightning 1's global_step.
        self.generator_updates = int(checkpoint.get("generator_updates", checkpoint.get("global_step", 0)))

    def get_last_layer(self) -> nn.Parameter:
        """The weight against which the adaptive discriminator weight is measured: (out_ch, ch, 3, 3)."""
        return self.decoder.conv_out.weight

    # --------------------------------------------------------------------------------------------------------- batches

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """Pictures under key `k`: (B, H, W[, C]) -> (B, C, H, W) float32, contiguous."""
        if k not in batch:
            raise ValueError(
                f"the batch has no {k!r}, it has {', '.join(sorted(batch))}: set image_key to one of these"
            )
        x = batch[k]
        if x.ndim == 3:
            x = x[..., None]
        return x.to(self.device).permute(0, 3, 1, 2).contiguous().float()

    # -------------------------------------------------------------------------------------------------------- training

    @property
    def logging_step(self) -> int:
        """Generator updates so far: what names image logs."""
        return self.generator_updates

    @property
    def adversarial(self) -> bool:
        """Whether the loss has a discriminator that is, or will be, trained."""
        return getattr(self.loss, "discriminator", None) is not None and getattr(self.loss, "adversarial", True)

    def on_fit_start(self) -> None:
        if self.accumulate_grad_batches < 1:
            raise ValueError(f"accumulate_grad_batches={self.accumulate_grad_batches}: must be at least 1")
        if self.gradient_clip_algorithm not in CLIP_ALGORITHMS:
            raise ValueError(
                f"gradient_clip_algorithm={self.gradient_clip_algorithm!r}: choose one of {', '.join(CLIP_ALGORITHMS)}"
            )
        self._prepare_loss()

    def on_validation_start(self) -> None:
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._prepare_loss()

    def _prepare_loss(self) -> None:
        """Stop in one line where there is no loss to train with, or where its perceptual network has no weights and cannot get them."""
        if isinstance(self.loss, (nn.Identity, DummyLoss)):
            raise ValueError(
                f"lossconfig.target is {type(self.loss).__name__}, which cannot train: this config only encodes and decodes; "
                f"name {self.loss_target} with its params to train"
            )
        load = getattr(self.loss, "load_pretrained", None)
        if load is None:
            return
        failure = None
        if self.trainer.is_global_zero:  # one rank downloads; the others find the file
            try:
                load()
            except PerceptualWeightsError as error:
                failure = str(error)
        failure = self.trainer.strategy.broadcast(failure)
        if failure:
            raise PerceptualWeightsError(failure)
        load()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.accumulate_grad_batches:
            # Lightning's loggers count batches here, since the Trainer knows nothing of the accumulation; give them generator updates.
            self.trainer.fit_loop.epoch_loop._batches_that_stepped -= 1

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """One micro-batch: the generator's gradient, the discriminator's on the same reconstruction, and the updates at a window's end.

        The published loop ran the autoencoder a second time for the discriminator; the reconstruction of the first serves as well.
        """
        inputs = self.get_input(batch, self.image_key)
        generator, discriminator = self._optimizers()
        update = (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        with self._gradients_of(generator, sync=update):
            reconstructions, latent = self.reconstruct(inputs)
            loss, log = self.loss_of(inputs, reconstructions, latent, GENERATOR, "train")
            self._backward(loss, log)
            moved = self._update(generator, discriminator) if update else False
        self.log("aeloss", loss.detach(), prog_bar=True, on_step=True, on_epoch=True, batch_size=len(inputs))
        self.log_dict(log, on_step=True, on_epoch=False, batch_size=len(inputs))

        if self.adversarial:
            with self._gradients_of(discriminator, sync=update):
                loss, log = self.loss_of(inputs, reconstructions.detach(), latent, DISCRIMINATOR, "train")
                if loss.requires_grad:  # it is a plain 0 before disc_start
                    self._backward(loss, log)
                    if update:
                        self._update(discriminator)
            self.log("discloss", loss.detach(), prog_bar=True, on_step=True, on_epoch=True, batch_size=len(inputs))
            self.log_dict(log, on_step=True, on_epoch=False, batch_size=len(inputs))

        if update:
            self.generator_updates += 1
            if moved:
                self.on_generator_update()
            self._step_schedules()

    def _step_schedules(self) -> None:
        schedulers = self.lr_schedulers() or []
        with warnings.catch_warnings():  # PyTorch finds it odd that the discriminator's optimizer waits for disc_start
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
                scheduler.step()

    def _optimizers(self) -> tuple[LightningOptimizer, LightningOptimizer | None]:
        """(generator's, discriminator's); only the former advances `trainer.global_step`."""
        optimizers = self.optimizers()
        if not isinstance(optimizers, list):
            return optimizers, None
        generator, discriminator = optimizers
        # The training loop sets these at every batch to count steps: left alone, max_steps would count every update twice.
        discriminator._on_before_step = discriminator._on_after_step = do_nothing_closure
        return generator, discriminator

    @contextmanager
    def _gradients_of(self, optimizer: LightningOptimizer, sync: bool) -> Iterator[None]:
        """Within it only this optimizer's parameters collect gradients, exchanged between ranks at the end of a window alone."""
        block_sync = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        self.toggle_optimizer(optimizer)
        try:
            with nullcontext() if sync else block_sync():
                yield
        finally:
            self.untoggle_optimizer(optimizer)

    def _backward(self, loss: Tensor, log: Mapping[str, Tensor]) -> None:
        self._window.append({"loss": loss.detach(), **log})
        self.manual_backward(loss / self.accumulate_grad_batches)

    def _update(self, optimizer: LightningOptimizer, waiting: LightningOptimizer | None = None) -> bool:
        """One optimizer's step -> whether its weights moved: float16's scaler leaves them alone where it met an infinite gradient.

        `waiting` holds gradients of this window's earlier micro-batches; they follow where the step changes float16's loss scale.
        """
        scaler = self._scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        try:
            optimizer.step()
        finally:
            self._window.clear()
            optimizer.zero_grad()
        change = 1.0 if scaler is None else scaler.get_scale() / scale
        if waiting is not None and change != 1.0:
            for p in (p for group in waiting.param_groups for p in group["params"] if p.grad is not None):
                p.grad.mul_(change)
        return change >= 1.0

    @property
    def _scaler(self) -> Any:
        """The scaler of float16's losses; None in other precisions."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient of a whole window, after float16's unscaling; raise NonFiniteError where it, or a loss, must not be learned."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters])
        total = sum(log["loss"] for log in self._window)
        # Under float16's loss scaling an infinite gradient is normal, and the scaler skips that step.
        if not bool(
            torch.isfinite(total if self._scaler is not None else total + norm)
        ):  # one read from the device for both
            self._raise_non_finite(norm)
        if self.gradient_clip_val is not None and self.gradient_clip_val > 0:
            if self.gradient_clip_algorithm == "norm":
                clip_grads_with_norm_(parameters, self.gradient_clip_val, norm)
            else:
                clip_grad_value_(parameters, self.gradient_clip_val)

    def _raise_non_finite(self, norm: Tensor) -> None:
        bad = sorted(
            {name for log in self._window for name, value in log.items() if not bool(torch.isfinite(value).all())}
        )
        what = f"{', '.join(bad)} not finite" if bad else f"gradient norm {float(norm):g}"
        raise NonFiniteError(
            f"generator update {self.generator_updates}, rank {self.trainer.global_rank}: {what}; stopped before the optimizer's step, so "
            f"the weights are good; a lower model.base_learning_rate, --gradient_clip_val 1 or --precision 32 often helps"
        )

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the losses on held-out pictures, `val/rec_loss` among them, the published monitor."""
        self._log_validation(batch, split="val")

    def _log_validation(self, batch: Mapping[str, Any], split: str) -> None:
        inputs = self.get_input(batch, self.image_key)
        reconstructions, latent = self.reconstruct(inputs)
        _, logs = self.loss_of(inputs, reconstructions, latent, GENERATOR, split)
        if self.adversarial:
            logs |= self.loss_of(inputs, reconstructions, latent, DISCRIMINATOR, split)[1]
        self.log_dict(logs, on_step=False, on_epoch=True, batch_size=len(inputs), sync_dist=True)

    def generator_parameters(self) -> list[nn.Parameter]:
        """What the generator's optimizer moves."""
        return [*self.encoder.parameters(), *self.decoder.parameters(), *self.latent_parameters()]

    def configure_optimizers(self) -> Any:
        if self.learning_rate is None:
            raise ValueError(
                "learning_rate is not set: assign model.learning_rate first (main.py takes it from base_learning_rate)"
            )
        optimizers = [self._adam(self.generator_parameters(), self.lr_g_factor * self.learning_rate)]
        discriminator = getattr(self.loss, "discriminator", None)
        if discriminator is not None:
            optimizers.append(self._adam(discriminator.parameters(), self.learning_rate))
        if self.scheduler_config is None:
            return optimizers
        schedule = instantiate_from_config(self.scheduler_config)
        return optimizers, [
            {"scheduler": LambdaLR(o, lr_lambda=schedule.schedule), "interval": "step", "frequency": 1}
            for o in optimizers
        ]

    def _adam(self, parameters: Any, lr: float) -> torch.optim.Adam:
        # On a CPU the fused step saves a Python loop over hundreds of small tensors; on a GPU the default already is foreach.
        fused = True if self.device.type == "cpu" else None
        return torch.optim.Adam(parameters, lr=lr, betas=ADAM_BETAS, fused=fused)

    # ---------------------------------------------------------------------------------------------------------- pictures

    def to_rgb(self, x: Tensor) -> Tensor:
        """Segmentation maps to colors, one fixed random color a label: (B, labels, H, W) -> (B, 3, H, W) in [-1, 1]."""
        if self.image_key != "segmentation":
            raise ValueError(
                f"cannot draw {x.shape[1]} channels of {self.image_key!r}: only image_key 'segmentation' gets colors"
            )
        if not hasattr(self, "colorize"):
            self.register_buffer("colorize", torch.randn(3, x.shape[1], 1, 1, device=x.device))
        x = nn.functional.conv2d(x, self.colorize.to(x))
        return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0

    def as_pictures(self, x: Tensor) -> Tensor:
        """(B, C, H, W) ready to be drawn: at most three channels, in [-1, 1]."""
        return (self.to_rgb(x) if x.shape[1] > 3 else x).clamp(-1.0, 1.0)


def check_ddconfig(ddconfig: Mapping[str, Any]) -> None:
    """Raise ConfigError where a key of `ddconfig` is unknown to the networks, or a required one is missing."""
    accepted, required = accepted_params(Encoder)
    for key in ddconfig:
        if key not in accepted:
            raise ConfigError(f"ddconfig.{key}: no such parameter{did_you_mean(key, accepted)}")
    missing = sorted(required - set(ddconfig))
    if missing:
        raise ConfigError(f"ddconfig: needs {', '.join(missing)}")
