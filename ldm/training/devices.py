"""Devices of a run: the published `--gpus` and the current `accelerator` and `devices`, checked against the machine."""

from __future__ import annotations

from typing import Any, NamedTuple

from ldm.config.instantiate import ConfigError
from ldm.config.trainer_keys import DEVICE_KEYS


class Machine(NamedTuple):
    """The accelerators of a machine."""

    cuda: int = 0
    mps: bool = False

    @property
    def gpus(self) -> int:
        return self.cuda or int(self.mps)

    @property
    def gpu_kind(self) -> str:
        return "cuda" if self.cuda else "mps"

    def __str__(self) -> str:
        if self.cuda:
            return f"{self.cuda} GPU{'s' if self.cuda > 1 else ''} (CUDA)"
        return "1 GPU (MPS)" if self.mps else "no GPU (--gpus 0 is the CPU)"


class Devices(NamedTuple):
    """Arguments of the Trainer, the number of processes per node, and one line for the log."""

    accelerator: str
    devices: int | list[int]
    processes: int
    text: str


def choose_devices(settings: dict[str, Any], machine: Machine, where: str = "--") -> Devices:
    """Return the devices that Trainer settings ask for; by default one GPU if there is one, else the CPU.

    settings: modernized. A comma in `gpus` means indices, a bare number a count, 0 the CPU, -1 all GPUs.
    where: prefix of a setting's name in messages ('--' for flags). Raises ConfigError for devices that do not exist.
    """
    given = {name: settings[name] for name in DEVICE_KEYS if settings.get(name) is not None}
    if "gpus" in given:
        if given.get("accelerator") in ("gpu", "cuda", "auto"):
            del given["accelerator"]
        if others := [name for name in given if name != "gpus"]:
            raise ConfigError(f"{where}gpus and {where}{others[0]}: choose the devices by one setting only")
        return _gpus(given["gpus"], machine, where)
    accelerator = str(given.get("accelerator", "auto"))
    if accelerator == "auto":
        accelerator = machine.gpu_kind if machine.gpus else "cpu"
    wanted = given.get("devices", 1)
    if accelerator in ("gpu", "cuda", "mps"):
        if not {"gpu": machine.gpus, "cuda": machine.cuda, "mps": machine.mps}[accelerator]:
            raise ConfigError(f"{where}accelerator {accelerator}: this machine has {machine}; remove the setting")
        found = _gpus(machine.gpus if wanted in ("auto", "-1", -1) else wanted, machine, where, "devices")
        return found if "devices" in given else found._replace(text=_default_text(machine))
    count = 1 if wanted == "auto" else wanted
    if not str(count).isdigit() or int(count) < 1:
        raise ConfigError(
            f"{where}devices {count}: with accelerator {accelerator} it is a number of processes, at least 1"
        )
    text = f"{accelerator.upper()}, {count} processes" if int(count) > 1 else accelerator.upper()
    return Devices(accelerator, int(count), int(count), text)


def _default_text(machine: Machine) -> str:
    if machine.gpus == 1:
        return machine.gpu_kind.upper()
    return f"{machine.gpu_kind.upper()} 0, one of {machine.gpus} GPUs (--gpus {machine.gpus} uses all)"


def _gpus(value: Any, machine: Machine, where: str, name: str = "gpus") -> Devices:
    shown = f"{where}{name} {','.join(map(str, value)) if isinstance(value, list | tuple) else value}"
    if isinstance(value, list | tuple) or "," in str(value):
        words = [
            word.strip() for word in (value.split(",") if isinstance(value, str) else map(str, value)) if word.strip()
        ]
        if not words or not all(word.isdigit() for word in words):
            raise ConfigError(f"{shown}: expected indices such as 0,1 or 0,")
        indices = [int(word) for word in words]
        if len(set(indices)) < len(indices):
            raise ConfigError(f"{shown}: an index is given twice")
        if missing := [index for index in indices if index >= machine.gpus]:
            raise ConfigError(f"{shown}: no GPU {missing[0]}; this machine has {machine}")
    else:
        try:
            count = int(value)
        except (TypeError, ValueError):
            choices = "indices such as 0,1 or 0, or a count such as 2 (0 is the CPU, -1 all GPUs)"
            raise ConfigError(f"{shown}: expected {choices}") from None
        if count == 0:
            return Devices("cpu", 1, 1, f"CPU ({shown})")
        if count == -1 and machine.gpus:
            count = machine.gpus
        if count < 0 or count > machine.gpus:
            raise ConfigError(f"{shown}: this machine has {machine}")
        indices = list(range(count))
    numbers = ", ".join(map(str, indices))
    return Devices(machine.gpu_kind, indices, len(indices), f"{machine.gpu_kind.upper()} {numbers} ({shown})")
