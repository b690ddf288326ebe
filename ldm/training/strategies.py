"""Distributed strategies: `ddp`, replicas that exchange only what trains, and `fsdp`, sharded training (FSDP2).

The other strategies of the Trainer are Lightning's own.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import strategies
from pytorch_lightning.strategies import StrategyRegistry
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from ldm.checkpoint.formats import PARTS, SplitTensor, read_checkpoint
from ldm.checkpoint.resume import remove_unused_parts
from ldm.checkpoint.write import CheckpointWriteError, split_tensors, write_checkpoint
from ldm.cli import default_signals
from ldm.config.instantiate import ConfigError
from ldm.config.suggest import did_you_mean
from ldm.models.diffusion.ddpm import DDPM
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import AttentionBlock, ResBlock, UNetTrunk
from ldm.modules.ema import LitEma
from ldm.modules.x_transformer import AttentionLayers

logger = logging.getLogger(__name__)

BLOCKS = (ResBlock, SpatialTransformer, AttentionBlock, UNetTrunk, AttentionLayers)
"""Modules whose weights `fsdp` gathers together while they compute; a UNetTrunk gathers those outside of its blocks."""

REPLICAS = {"ddp": False, "ddp_find_unused_parameters_false": False, "ddp_find_unused_parameters_true": True}
"""Names of `DDPStrategy`, and whether it looks for unused parameters."""


def make_strategy(name: str) -> str | strategies.Strategy:
    """Return the strategy of a name, for the Trainer. Raises ConfigError with the choices for an unknown one."""
    lightning = StrategyRegistry.available_strategies()  # its fsdp_* are another implementation
    known = ("auto", "ddp", "fsdp", *(each for each in lightning if each != "ddp" and not each.startswith("fsdp")))
    if name not in known:
        choices = ", ".join(each for each in known if each.count("_") < 2)  # the others are variants of these
        near = did_you_mean(name, known)
        raise ConfigError(f"lightning.trainer.strategy {name}: expected one of {choices} or a variant{near}")
    if name.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f'lightning.trainer.strategy {name}: DeepSpeed is not installed: pip install -e ".[deepspeed]", or choose '
            "fsdp, which needs no further package"
        )
    if name in REPLICAS:
        return DDPStrategy(find_unused_parameters=REPLICAS[name], gradient_as_bucket_view=True)
    return FSDPStrategy() if name == "fsdp" else name


class _Strategy(strategies.DDPStrategy):
    """Lightning's DDP; a signal ends a process that waits for the others at the start."""

    def setup_distributed(self) -> None:
        if self.num_nodes > 1 and self.cluster_environment is not None and self.global_rank == 0:
            place = f"{self.cluster_environment.main_address}:{self.cluster_environment.main_port}"
            logger.info("%-11s for %d nodes at %s", "waiting", self.num_nodes, place)
        with default_signals():
            super().setup_distributed()


class DDPStrategy(_Strategy):
    """Lightning's DDP without traffic for what no rank changes.

    By default torch sends all weights from the first rank to the others at the start, frozen ones too. In every forward
    pass it sends all buffers, among them the EMA averages, which are as large as the model. Frozen weights and averages
    are equal on all ranks already: each computes them from the same values. Gradients have no second copy.
    """

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        model._ddp_params_and_buffers_to_ignore = sorted(_unsynchronized(model))  # type: ignore[assignment]
        return super()._setup_model(model)


def _unsynchronized(model: nn.Module) -> Iterator[str]:
    """Keys of frozen parameters, and of buffers of frozen stages and averages."""
    yield from (name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    for prefix, module in model.named_modules():
        parameters = list(module.parameters())
        frozen = bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
        if frozen or isinstance(module, LitEma):
            yield from (name for name, _ in module.named_buffers(prefix))


class FSDPStrategy(_Strategy):
    """Fully sharded data parallelism (torch's `fully_shard`, FSDP2) of a diffusion model.

    Each rank holds a part of the rows of every trained weight, and of its gradient, optimizer state and average. The
    weights of a block (BLOCKS) are gathered while it computes. Frozen stages are whole on every rank.
    Checkpoints are an index and one file for each rank, see `ldm.checkpoint.formats`.
    """

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None and self.model is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)
        if trainer.state.fn == TrainerFn.FITTING:
            self._shard()
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _shard(self) -> None:
        """Shard the module, once, before its weights are loaded or moved: no device ever holds all of them."""
        module = self.lightning_module
        assert module is not None
        if isinstance(module, FSDPModule):
            return
        check_shardable(module)
        assert isinstance(module, DDPM)
        self.precision_plugin.convert_module(module)
        shard_module(module, init_device_mesh(self.root_device.type, (self.world_size,)))

    def teardown(self) -> None:
        """As the base class, but leave the module on its devices, which the layout of its weights names."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write the rows of this rank, then the index; a kill at any moment leaves the previous checkpoint whole."""
        path = Path(self.broadcast(filepath))
        name = self.broadcast(f"{checkpoint['global_step']}-{uuid.uuid4().hex[:8]}")
        files = [f"{PARTS}/{name}/{rank}-of-{self.world_size}.ckpt" for rank in range(self.world_size)]
        own, index = split_tensors(checkpoint, self._own_rows)
        failure: Exception | None = None
        try:
            write_checkpoint({"tensors": own}, path.parent / files[self.global_rank])
        except Exception as error:  # whatever it is, the others must not wait for this rank
            failure = error
        if not self.reduce_boolean_decision(failure is None):
            if self.is_global_zero:
                shutil.rmtree((path.parent / files[0]).parent, ignore_errors=True)
            raise failure or CheckpointWriteError(f"{path}: another rank could not write its part")
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint({**index, PARTS: files}, path, storage_options)
            remove_unused_parts(path.parent)

    def _own_rows(self, tensor: Tensor) -> Tensor | None:
        """Return what this rank writes of a tensor: its rows, or all of one that is not sharded on the first rank."""
        if not isinstance(tensor, DTensor):
            return tensor if self.is_global_zero else None
        if tensor.placements != (Shard(0),):
            raise ValueError(f"strategy fsdp: cannot save a tensor that is laid out as {tensor.placements}")
        return tensor.to_local()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        self._shard()
        return read_checkpoint(checkpoint_path, whole=False)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {name: _like(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        super().load_model_state_dict({**checkpoint, "state_dict": state}, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"]):
            parameters = dict(enumerate(each for group in optimizer.param_groups for each in group["params"]))
            state = {  # one of more parameters than there are stays so: the optimizer refuses it
                number: {name: _like(value, parameters.get(number)) for name, value in entries.items()}
                for number, entries in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def check_shardable(module: nn.Module) -> None:
    """Raise ConfigError for a module that `fsdp` cannot train."""
    adapters = bool(getattr(module, "trains_adapters", False))
    if not isinstance(module, DDPM) or adapters:
        reason = "trains only adapters" if adapters else "is not a diffusion model"
        raise ConfigError(f"lightning.trainer.strategy fsdp: {type(module).__name__} {reason}; choose ddp")
    if any(each.on_cpu for each in module.modules() if isinstance(each, LitEma)):
        place = "model.params.ema_config.device"
        raise ConfigError(f"{place} cpu: strategy fsdp shards the averages as it shards the weights; remove it")


def shard_module(module: DDPM, mesh: DeviceMesh) -> None:
    """Shard the trained weights of a module, those of each block together, and their averages, over a mesh of ranks."""
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    blocks = [each for each in module.modules() if isinstance(each, BLOCKS) and _trains(each)]
    # Resharded after each forward pass, so that outside of them every weight is a DTensor: EMA and optimizer see these.
    for block in (*reversed(blocks), module.model, module):  # inner ones first
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)
    parameters = dict(module.averaged_module().named_parameters())
    for average in (each for each in module.modules() if isinstance(each, LitEma)):
        for name, shadow in average.m_name2s_name.items():
            if isinstance(weight := parameters[name], DTensor):
                setattr(average, shadow, shard_rows(getattr(average, shadow), weight))


def shard_rows(value: Tensor | SplitTensor, like: DTensor) -> DTensor:
    """Return a value, whole on every rank, laid out as a tensor of its shape: this rank keeps its rows of it."""
    mesh, size = like.device_mesh, -(-like.shape[0] // like.device_mesh.size())
    start = mesh.get_local_rank() * size
    rows = value[start : start + size]
    rows = rows.to(like.device) if rows.device != like.device else rows.clone()
    return DTensor.from_local(rows, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _like(value: Any, target: Tensor | None) -> Any:
    """Return a value of a checkpoint as a tensor that is laid out as `target`, whose shape it has; else as it is."""
    if isinstance(target, DTensor) and isinstance(value, Tensor | SplitTensor) and value.shape == target.shape:
        return shard_rows(value, target)
    return value.whole() if isinstance(value, SplitTensor) else value
