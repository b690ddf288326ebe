"""Training of a first stage against a discriminator: the base of the KL and VQ autoencoders."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ldm.config.instantiate import ConfigError, accepted_params, instantiate_from_config
from ldm.config.suggest import did_you_mean
from ldm.config.types import PositiveInt
from ldm.models.training import Losses, NonFiniteError, TrainedModule, fixed_noise
from ldm.modules.diffusionmodules.model import Decoder, Encoder, Network
from ldm.modules.dtype import in_dtype, weights_dtype
from ldm.modules.losses.contperceptual import DummyLoss
from ldm.modules.losses.lpips import PerceptualWeightsError
from ldm.modules.losses.reconstruction import DISCRIMINATOR, GENERATOR

if TYPE_CHECKING:
    from pytorch_lightning.core.optimizer import LightningOptimizer

CLIP_ALGORITHMS = ("norm", "value")
ADAM_BETAS = (0.5, 0.9)


class AdversarialAutoencoder(TrainedModule):
    """Encoder, decoder, loss, and the training loop with two optimizers (Lightning's manual optimization).

    Subclasses own the latent: `encode`, `reconstruct`, `loss_of`. Batches are dicts; `batch[image_key]` holds
    images (B, H, W, C) in [-1, 1].

    ddconfig: arguments of Encoder and Decoder. monitor: logged value that selects checkpoints.
    scheduler_config: schedule of ldm.lr_scheduler over generator updates, for both optimizers.
    optimizer_config: of both optimizers, see OptimizerConfig; names of the discriminator's parameters begin with
    `loss.discriminator`, so that a group can give it other settings.

    main.py sets `learning_rate`, `accumulate_grad_batches`, `gradient_clip_val` and `gradient_clip_algorithm`; the
    Trainer refuses the last three under manual optimization. `generator_updates` counts batches / accumulation, as
    `disc_start`, `trainer.global_step` and `max_steps` do; it is saved in the checkpoint.
    """

    key_settings = "image_key"
    trainable_loss = "ldm.modules.losses.LPIPSWithDiscriminator"  # for the error of a config without a loss
    lr_g_factor = 1.0  # the generator's learning rate as a multiple of `learning_rate`
    quant_conv: nn.Conv2d
    post_quant_conv: nn.Conv2d

    def __init__(
        self,
        ddconfig: Annotated[Mapping[str, Any], "ldm.modules.diffusionmodules.model.Encoder"],
        lossconfig: Mapping[str, Any],
        ckpt_path: str | Path | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: PositiveInt | None = None,
        monitor: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        optimizer_config: Annotated[Mapping[str, Any], "ldm.models.optimizers.OptimizerConfig"] | None = None,
    ) -> None:
        super().__init__(ckpt_path, ignore_keys, optimizer_config)
        self.optimizer_options = {"betas": ADAM_BETAS}
        self.automatic_optimization = False
        self.accumulate_grad_batches = 1
        self.gradient_clip_val: float | None = None
        self.gradient_clip_algorithm = "norm"
        self.generator_updates = 0
        self.image_key, self.scheduler_config = image_key, scheduler_config
        if monitor is not None:
            self.monitor = monitor
        check_ddconfig(ddconfig)
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss: Any = instantiate_from_config(lossconfig)
        if colorize_nlabels is not None:
            if not isinstance(colorize_nlabels, int):
                raise ValueError(f"colorize_nlabels={colorize_nlabels!r}: expected the number of labels, an int")
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        self._window: list[Mapping[str, Tensor]] = []  # named losses since the last check for NaN

    @abstractmethod
    def reconstruct(self, inputs: Tensor) -> tuple[Tensor, Any]:
        """Return reconstructions (B, C, H, W) and what `loss_of` needs of the latent."""

    @abstractmethod
    def loss_of(self, inputs: Tensor, reconstructions: Tensor, latent: Any, optimizer_idx: int, split: str) -> Losses:
        """Return the loss of the generator (0) or the discriminator (1), and its named logs."""

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Return moments, or latents before quantization, (B, n, H/f, W/f), of images x (B, C, H, W) in [-1, 1]."""
        return in_dtype(weights_dtype(self.encoder), lambda x: self.quant_conv(self.encoder(x)), x)

    def decode(self, z: Tensor) -> Tensor:
        """Return images (B, C, H, W), about [-1, 1], of latents z (B, embed_dim, H/f, W/f)."""
        return self.decode_latent(z)

    def decode_latent(self, z: Tensor) -> Tensor:
        return in_dtype(weights_dtype(self.decoder), lambda z: self.decoder(self.post_quant_conv(z)), z)

    def get_last_layer(self) -> Tensor:
        """Weight (out_ch, ch, 3, 3) for the adaptive discriminator weight."""
        return self.decoder.conv_out.weight

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["generator_updates"] = self.generator_updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Checkpoints of the published implementation counted the same in Lightning 1's global_step.
        self.generator_updates = int(checkpoint.get("generator_updates", checkpoint.get("global_step", 0)))

    # -------------------------------------------------------------------------------------------------- before training

    @property
    def logging_step(self) -> int:
        return self.generator_updates

    @property
    def adversarial(self) -> bool:
        """True if a discriminator is trained, now or after `disc_start`."""
        return getattr(self.loss, "discriminator", None) is not None and getattr(self.loss, "adversarial", True)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.accumulate_grad_batches < 1:
            raise ValueError(f"accumulate_grad_batches={self.accumulate_grad_batches}: must be at least 1")
        if self.gradient_clip_algorithm not in CLIP_ALGORITHMS:
            raise ValueError(
                f"gradient_clip_algorithm={self.gradient_clip_algorithm!r}: choose one of {', '.join(CLIP_ALGORITHMS)}"
            )
        self._prepare_loss()

    def on_validation_start(self) -> None:
        if self.trainer.state.fn != "fit":
            self._prepare_loss()

    def _prepare_loss(self) -> None:
        """Raise ValueError if the loss cannot train, PerceptualWeightsError if its perceptual weights are missing."""
        self.require_loss()
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

    def require_loss(self) -> None:
        """Raise ValueError if the loss cannot train."""
        if isinstance(self.loss, (nn.Identity, DummyLoss)):
            raise ValueError(
                f"lossconfig.target is {type(self.loss).__name__}, which cannot train: this config only encodes and "
                f"decodes; set it to {self.trainable_loss} with its params to train"
            )

    def generator_parameters(self) -> list[nn.Parameter]:
        """Return all trainable parameters except the discriminator's, those of the loss last.

        Optimizer states in checkpoints refer to parameters by position.
        """
        named = sorted(self.named_parameters(), key=lambda item: item[0].startswith("loss."))
        return [p for name, p in named if p.requires_grad and not name.startswith("loss.discriminator.")]

    def configure_optimizers(self) -> Any:
        parts = [(self.generator_parameters(), self.lr_g_factor)]
        discriminator = getattr(self.loss, "discriminator", None)
        if discriminator is not None:
            parts.append((list(discriminator.parameters()), 1.0))
        return self.with_schedule(self.make_optimizers(torch.optim.Adam, parts))

    # --------------------------------------------------------------------------------------------------- training step

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """Return images `batch[k]`, (B, H, W[, C]), as (B, C, H, W) float32."""
        images = self.get_images(batch, k)
        # A CPU computes convolutions of few channels a quarter faster in this layout.
        return images.to(memory_format=torch.channels_last) if images.device.type == "cpu" else images

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.accumulate_grad_batches:
            # Lightning's loggers count batches, since the Trainer does not know of the accumulation: undo this one.
            self.trainer.fit_loop.epoch_loop._batches_that_stepped -= 1

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add the gradients of one micro-batch, and update both networks at the end of an accumulation window.

        The discriminator uses the same reconstruction; the published loop ran the autoencoder again for it.
        """
        inputs = self.get_input(batch, self.image_key)
        generator, discriminator = self._optimizers()
        update = (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        stepped = False
        with self._gradients_of(generator, sync=update):
            reconstructions, latent = self.reconstruct(inputs)
            loss, log = self.loss_of(inputs, reconstructions, latent, GENERATOR, "train")
            self._backward(loss, log)
            if update:
                stepped = self._update(generator, waiting=discriminator)
        self._log_losses("aeloss", loss, log, len(inputs), last=update)

        if discriminator is not None and self.adversarial:
            with self._gradients_of(discriminator, sync=update):
                loss, log = self.loss_of(inputs, reconstructions.detach(), latent, DISCRIMINATOR, "train")
                if loss.requires_grad:  # it is a constant 0 before disc_start
                    self._backward(loss, log)
                    if update:
                        self._update(discriminator)
            self._log_losses("discloss", loss, log, len(inputs), last=update)

        if update:
            self.generator_updates += 1
            if stepped:
                self.update_ema()
            self._step_schedules()

    def _optimizers(self) -> tuple[LightningOptimizer, LightningOptimizer | None]:
        """Return the generator's and the discriminator's optimizer; only the former advances `trainer.global_step`."""
        optimizers = self.optimizers()
        if not isinstance(optimizers, list):
            return optimizers, None
        generator, discriminator = optimizers
        # The training loop sets these at every batch to count steps: otherwise max_steps would count each update twice.
        discriminator._on_before_step = discriminator._on_after_step = lambda: None
        return generator, discriminator

    @contextmanager
    def _gradients_of(self, optimizer: LightningOptimizer, sync: bool) -> Iterator[None]:
        """Compute gradients of this optimizer's parameters only, exchanged between ranks if `sync`."""
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
        """Step an optimizer. Return False if float16's scaler skipped the step because of an infinite gradient.

        `waiting` holds gradients of this window's earlier micro-batches: they are rescaled if the loss scale changes.
        """
        scale = self.loss_scale
        try:
            optimizer.step()
        finally:
            self._window.clear()
            optimizer.zero_grad()
        change = self.loss_scale / scale
        if waiting is not None and change != 1.0:
            for p in (p for group in waiting.param_groups for p in group["params"] if p.grad is not None):
                p.grad.mul_(change)
        return change >= 1.0

    def _step_schedules(self) -> None:
        schedulers = self.lr_schedulers() or []
        with warnings.catch_warnings():  # PyTorch warns because the discriminator's optimizer waits for disc_start
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
                if not isinstance(scheduler, ReduceLROnPlateau):  # needs a metric
                    scheduler.step()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients of a whole window. Raises NonFiniteError if a loss or gradient is NaN or infinite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters])
        total = sum((log["loss"] for log in self._window), torch.zeros(()))
        # With float16's loss scaling an infinite gradient is normal, and the scaler skips that step.
        checked = total if self.grad_scaler is not None else total + norm
        if not bool(checked.isfinite()):  # one read from the device
            self._raise_non_finite(norm)
        if self.gradient_clip_val is not None and self.gradient_clip_val > 0:
            if self.gradient_clip_algorithm == "norm":
                clip_grads_with_norm_(parameters, self.gradient_clip_val, norm)
            else:
                clip_grad_value_(parameters, self.gradient_clip_val)

    def _raise_non_finite(self, norm: Tensor) -> None:
        bad = sorted({name for log in self._window for name, value in log.items() if not bool(value.isfinite().all())})
        what = f"{', '.join(bad)} not finite" if bad else f"gradient norm {float(norm):g}"
        raise NonFiniteError(
            f"generator update {self.generator_updates}, rank {self.trainer.global_rank}: {what}; stopped before the "
            f"optimizer step, so the weights are good; a lower model.base_learning_rate, --gradient_clip_val 1 or "
            f"--precision 32 often helps"
        )

    def _log_losses(self, name: str, loss: Tensor, log: Mapping[str, Any], batch_size: int, last: bool) -> None:
        means, count = self.step_means({name: loss.detach(), **log}, batch_size, last)
        self.log(name, means[name], prog_bar=True, on_step=True, on_epoch=True, batch_size=count)
        self.log_dict({key: means[key] for key in log}, on_step=True, on_epoch=False, batch_size=count)

    # ----------------------------------------------------------------------------------------- validation, image logs

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the losses as `val/...`, e.g. `val/rec_loss`; with `use_ema` those of the averages as `val_ema/...`."""
        with fixed_noise(batch_idx, self.device):
            self._validate(batch, split="val")
        if self.use_ema:
            with self.ema_scope(), fixed_noise(batch_idx, self.device):
                self._validate(batch, split="val_ema")

    def _validate(self, batch: Mapping[str, Any], split: str) -> None:
        inputs = self.get_input(batch, self.image_key)
        reconstructions, latent = self.reconstruct(inputs)
        _, logs = self.loss_of(inputs, reconstructions, latent, GENERATOR, split)
        if self.adversarial:
            logs |= self.loss_of(inputs, reconstructions, latent, DISCRIMINATOR, split)[1]
        self.log_validation(logs, len(inputs))

    def to_rgb(self, x: Tensor) -> Tensor:
        """Color segmentation maps, one fixed random color a label: (B, labels, H, W) -> (B, 3, H, W) in [-1, 1]."""
        if self.image_key != "segmentation":
            raise ValueError(f"cannot show {x.shape[1]} channels of {self.image_key!r}: only 'segmentation' has colors")
        if not hasattr(self, "colorize"):
            self.register_buffer("colorize", torch.randn(3, x.shape[1], 1, 1, device=x.device))
        colors: Any = self.colorize
        x = nn.functional.conv2d(x, colors.to(x))
        return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0

    def as_images(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) as images: at most three channels, in [-1, 1]."""
        return (self.to_rgb(x) if x.shape[1] > 3 else x).clamp(-1.0, 1.0)


def check_ddconfig(ddconfig: Mapping[str, Any]) -> None:
    """Raise ConfigError if a key of `ddconfig` is unknown to the networks, or a required one is missing."""
    accepted, required = accepted_params(Encoder) or (dict(ddconfig), set())
    _, shared = accepted_params(Network) or ({}, set())  # required by the base, to which Encoder passes them on
    for key in ddconfig:
        if key not in accepted:
            raise ConfigError(f"ddconfig.{key}: no such parameter{did_you_mean(key, accepted)}")
    missing = sorted((required | shared) - set(ddconfig))
    if missing:
        raise ConfigError(f"ddconfig: needs {', '.join(missing)}")
