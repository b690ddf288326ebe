"""Which devices a run uses: the published `--gpus` and today's `accelerator` and `devices`, checked against what the machine has."""

from __future__ import annotations

from typing import Any, NamedTuple

from ldm.config.instantiate import ConfigError
from ldm.config.trainer_keys import DEVICE_KEYS


class Machine(NamedTuple):
    """The accelerators that are there."""

    cuda: int = 0
    mps: bool = False

    @property
    def gpus(self) -> int:
        return self.cuda or int(self.mps)

    @property
    def gpu_kind(self) -> str:
        return "cuda" if self.cuda else "mps"


class Devices(NamedTuple):
    """What the Trainer is given, how many processes of a node that makes, and one line that says so."""

    accelerator: str
    devices: int | list[int] | str
    count: int
    text: str


def this_machine() -> Machine:
    """The accelerators of this machine, as torch sees them."""
    import torch

    return Machine(torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.backends.mps.is_available())


def choose(settings: dict[str, Any], machine: Machine, where: str = "--") -> Devices:
    """The devices that Trainer settings ask for; without any setting one GPU where there is one, else the CPU.

    settings: modernized Trainer settings. A comma in `gpus` means indices, a bare number a count, 0 the CPU, -1 all GPUs.
    Raises ConfigError in one line for devices that are not there; `where` stands before the setting's name ('--' for flags).
    """
    given = {name: settings[name] for name in DEVICE_KEYS if settings.get(name) is not None}
    if "gpus" in given:
        if others := [
            name
            for name in given
            if name != "gpus" and not (name == "accelerator" and given[name] in ("gpu", "cuda", "auto"))
        ]:
            raise ConfigError(f"{where}gpus and {where}{others[0]}: give the devices in one way only")
        return _from_gpus(given["gpus"], machine, where)
    accelerator = str(given.get("accelerator", "auto"))
    if accelerator == "auto":
        accelerator = machine.gpu_kind if machine.gpus else "cpu"
    if accelerator in ("gpu", "cuda", "mps"):
        missing = {"gpu": not machine.gpus, "cuda": not machine.cuda, "mps": not machine.mps}[accelerator]
        if missing:
            raise ConfigError(
                f"{where}accelerator {accelerator}: this machine has {_what(machine)}; leave it out to use what is there"
            )
        wanted = given.get("devices", 1)
        if wanted in ("auto", "-1", -1):
            wanted = machine.gpus
        found = _from_gpus(wanted, machine, where, "devices")
        return found._replace(text=found.text if "devices" in given else _default_text(machine))
    devices = given.get("devices", 1)
    if devices in ("auto", None):
        devices = 1
    if not str(devices).isdigit() or int(devices) < 1:
        raise ConfigError(f"{where}devices {devices}: on the {accelerator} it is a number of processes, at least 1")
    text = f"{accelerator.upper()}, {devices} processes" if int(devices) > 1 else accelerator.upper()
    return Devices(accelerator, int(devices), int(devices), text)


def _default_text(machine: Machine) -> str:
    if machine.gpus == 1:
        return machine.gpu_kind.upper()
    return f"{machine.gpu_kind.upper()} 0, one of {machine.gpus} GPUs (--gpus {machine.gpus} uses all)"


def _from_gpus(value: Any, machine: Machine, where: str, name: str = "gpus") -> Devices:
    shown = f"{where}{name} {','.join(map(str, value)) if isinstance(value, list | tuple) else value}"
    if isinstance(value, list | tuple) or (isinstance(value, str) and "," in value):
        words = (
            [word.strip() for word in value.split(",") if word.strip()]
            if isinstance(value, str)
            else list(map(str, value))
        )
        if not words or not all(word.isdigit() for word in words):
            raise ConfigError(f"{shown}: expected indices such as 0,1 or 0,")
        indices = [int(word) for word in words]
        if len(set(indices)) < len(indices):
            raise ConfigError(f"{shown}: an index is named twice")
        if absent := [index for index in indices if index >= machine.gpus]:
            raise ConfigError(f"{shown}: there is no GPU {absent[0]}; this machine has {_what(machine)}")
        numbers = ", ".join(map(str, indices))
        return Devices(machine.gpu_kind, indices, len(indices), f"{machine.gpu_kind.upper()} {numbers} ({shown})")
    try:
        count = int(value)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{shown}: expected indices such as 0,1 or 0, or a count such as 2 (0 is the CPU, -1 all GPUs)"
        ) from None
    if count == 0:
        return Devices("cpu", 1, 1, f"CPU ({shown})")
    if count == -1 and machine.gpus:
        count = machine.gpus
    if count < 0 or count > machine.gpus:
        raise ConfigError(f"{shown}: this machine has {_what(machine)}")
    first = ", ".join(map(str, range(count)))
    return Devices(machine.gpu_kind, list(range(count)), count, f"{machine.gpu_kind.upper()} {first} ({shown})")


def _what(machine: Machine) -> str:
    if machine.cuda:
        return f"{machine.cuda} GPU{'s' if machine.cuda > 1 else ''} (CUDA)"
    return "1 GPU (MPS)" if machine.mps else "no GPU (--gpus 0 is the CPU)"
