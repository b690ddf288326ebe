"""Devices of a run: the published `--gpus` and the current `accelerator` and `devices`, checked against the machine."""

from __future__ import annotations

from typing import Any, NamedTuple

from ldm.config.instantiate import ConfigError
from ldm.config.trainer_keys import DEVICE_KEYS


class Machine(NamedTuple):
    """The GPUs of a machine, and whether they are "cuda" or "mps"."""

    gpus: int = 0
    kind: str = "cuda"

    def __str__(self) -> str:
        count = f"{self.gpus} GPU{'s' if self.gpus > 1 else ''} ({self.kind.upper()})"
        return count if self.gpus else "no GPU (--gpus 0 is the CPU)"


class Devices(NamedTuple):
    """Arguments of the Trainer, the number of processes per node, and a text for the log."""

    accelerator: str
    devices: int | list[int]
    processes: int
    text: str

    @property
    def first(self) -> str:
        """Name of the first of these devices, for work before the Trainer starts."""
        if isinstance(self.devices, list) and self.accelerator == "cuda":
            return f"cuda:{self.devices[0]}"
        return self.accelerator if self.accelerator in ("cpu", "mps") else "auto"


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
        return _gpus(given["gpus"], machine, f"{where}gpus")
    accelerator, wanted = str(given.get("accelerator", "auto")), given.get("devices", 1)
    if accelerator == "auto":
        accelerator = machine.kind if machine.gpus else "cpu"
    if accelerator in ("gpu", "cuda", "mps"):
        if not machine.gpus or accelerator not in ("gpu", machine.kind):
            raise ConfigError(f"{where}accelerator {accelerator}: this machine has {machine}; remove the setting")
        found = _gpus(machine.gpus if wanted in ("auto", "-1", -1) else wanted, machine, f"{where}devices")
        if "devices" in given:
            return found
        more = f" 0, one of {machine.gpus} GPUs (--gpus {machine.gpus} uses all)" if machine.gpus > 1 else ""
        return found._replace(text=machine.kind.upper() + more)
    count = 1 if wanted == "auto" else wanted
    if not str(count).isdigit() or int(count) < 1:
        expected = f"with accelerator {accelerator} it is a number of processes, at least 1"
        raise ConfigError(f"{where}devices {count}: {expected}")
    text = f"{accelerator.upper()}, {count} processes" if int(count) > 1 else accelerator.upper()
    return Devices(accelerator, int(count), int(count), text)


def _gpus(value: Any, machine: Machine, name: str) -> Devices:
    words = ",".join(map(str, value)) + "," if isinstance(value, list | tuple) else str(value)
    shown = f"{name} {words}"
    if "," in words:
        parts = [word.strip() for word in words.split(",") if word.strip()]
        if not parts or not all(part.isdigit() for part in parts):
            raise ConfigError(f"{shown}: expected indices such as 0,1 or 0,")
        indices = [int(part) for part in parts]
        if len(set(indices)) < len(indices):
            raise ConfigError(f"{shown}: an index is given twice")
        if missing := [index for index in indices if index >= machine.gpus]:
            raise ConfigError(f"{shown}: no GPU {missing[0]}; this machine has {machine}")
    else:
        try:
            count = int(words)
        except ValueError:
            choices = "indices such as 0,1 or 0, or a count such as 2 (0 is the CPU, -1 all GPUs)"
            raise ConfigError(f"{shown}: expected {choices}") from None
        if count == 0:
            return Devices("cpu", 1, 1, f"CPU ({shown})")
        if count == -1 and machine.gpus:
            count = machine.gpus
        if count < 0 or count > machine.gpus:
            raise ConfigError(f"{shown}: this machine has {machine}")
        indices = list(range(count))
    text = f"{machine.kind.upper()} {', '.join(map(str, indices))} ({shown})"
    return Devices(machine.kind, indices, len(indices), text)
