"""Memory and arithmetic of a training step, counted in a pass over tensors that have shapes and no data."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ldm.models.diffusion.ddpm import LatentDiffusion


class Footprint(NamedTuple):
    """Bytes and floating-point operations of one training step of one device."""

    activations: int  # at their peak, everything that is neither a weight nor its gradient
    gradients: int
    optimizer: int | None  # its state; None if the optimizer cannot run without data
    flops: int  # forward and backward, two for each multiply-add
    without_gradient: tuple[str, ...]  # trainable parameters that the step does not reach


class _Meter(TorchDispatchMode):
    """Counts the bytes of living tensors and the floating-point operations of what runs within it."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.live = self.gradients = self.peak = self.flops = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, func._overloadpacket
        if packet is torch.ops.aten._local_scalar_dense:  # a value that a model checks, e.g. the largest label
            return 0
        out = func(*args, **kwargs)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.flops += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.flops += sdpa_backward_flop_count(*(x.shape for x in args[:4]))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live - self.gradients)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def add_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.gradients += nbytes(parameter.grad)


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def step_footprint(model: pl.LightningModule, batch: Any, batch_size: int, precision: str) -> Footprint:
    """Return the footprint of a training step with `batch_size` samples that have the shapes of those in `batch`.

    model: built on the meta device, with a learning rate; afterwards its parameters have no data, and are of no use.
    precision: the Trainer's, such as 32-true or bf16-mixed. Raises what the model raises for a batch that does not fit.
    """
    bits, _, kind = precision.partition("-")
    if kind == "true" and bits in ("16", "bf16", "64"):
        model.to({"16": torch.float16, "bf16": torch.bfloat16, "64": torch.float64}[bits])
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _replace_parameters(model)
        batch = _of_size(batch, batch_size)
    meter = _Meter(list(model.parameters()))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(meter.add_gradient) for parameter in trained]
    with mode, meter, torch.autocast("cpu", torch.bfloat16, enabled=kind == "mixed"):
        for loss in losses_of(model.train(), batch):
            if loss.requires_grad:
                loss.backward()
    for hook in hooks:
        hook.remove()
    missing = tuple(name for name, p in model.named_parameters() if p.requires_grad and p.grad is None)
    gradients = sum(nbytes(p.grad) for p in trained if p.grad is not None)
    state = None
    with mode, contextlib.suppress(Exception):  # kernels of other libraries need data
        optimizers = configured_optimizers(model)[0]
        for optimizer in optimizers:
            optimizer.step()
        values = (value for each in optimizers for state in each.state.values() for value in state.values())
        state = sum(nbytes(value) for value in values if isinstance(value, Tensor))
    return Footprint(meter.peak, gradients, state, meter.flops, missing)


def configured_optimizers(model: pl.LightningModule) -> tuple[list[torch.optim.Optimizer], list[Any]]:
    """Return the optimizers of a model and their learning-rate schedulers, from Lightning's forms."""
    made: Any = model.configure_optimizers()
    if isinstance(made, Mapping):
        made = [made["optimizer"]], [made["lr_scheduler"]] if "lr_scheduler" in made else []
    two = isinstance(made, list | tuple) and len(made) == 2 and all(isinstance(each, list | tuple) for each in made)
    optimizers, schedulers = made if two else (made, [])
    optimizers = list(optimizers) if isinstance(optimizers, list | tuple) else [optimizers]
    return optimizers, [each["scheduler"] if isinstance(each, Mapping) else each for each in schedulers]


def _replace_parameters(model: nn.Module) -> None:
    """Replace the parameters by ones without data on the CPU; modules that share one still share it."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and id(old) not in made:
                new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad)
            if old is not None:
                module._parameters[name] = made[id(old)]


def _of_size(batch: Any, size: int) -> Any:
    """Return a batch of `size` samples in the form of `batch`, its tensors without data."""
    if isinstance(batch, Tensor):
        return torch.empty((size, *batch.shape[1:]), dtype=batch.dtype) if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {key: _of_size(value, size) for key, value in batch.items()}
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor | Mapping | list | tuple):
        return [_of_size(value, size) for value in batch]
    return [batch[k % len(batch)] for k in range(size)] if isinstance(batch, list | tuple) and batch else batch


def losses_of(model: Any, batch: Any) -> Iterator[Tensor]:
    """Yield the losses of a training step in their order; the caller calls `backward` on each."""
    if isinstance(model, LatentDiffusion):
        model.cond_dropout = 0.0  # which samples lose their condition would be read from tensors without data
    if hasattr(model, "shared_step"):
        yield model.shared_step(batch)[0]
    elif hasattr(model, "loss_of"):
        model.require_loss()
        model.generator_updates = 2**31  # after `disc_start`
        inputs = model.get_input(batch, model.image_key)
        reconstructions, latent = model.reconstruct(inputs)
        yield model.loss_of(inputs, reconstructions, latent, 0, "train")[0]
        if model.adversarial:
            yield model.loss_of(inputs, reconstructions.detach(), latent, 1, "train")[0]
    else:
        raise NotImplementedError(f"{type(model).__name__} has no shared_step(batch)")
