"""Train latent diffusion models and their first stages: `python main.py --base configs/....yaml -t --gpus 0,`; `--help` lists all flags.

Also the published home of `main.DataModuleFromConfig` and the callbacks, which configs name as targets.
"""

import importlib
import sys
from typing import Any

from ldm.config.instantiate import ALIASES
from ldm.training import session

_EXPORTS = {name.removeprefix("main."): home for name, home in ALIASES.items() if name.startswith("main.")}


def __getattr__(name: str) -> Any:
    """The published names, imported when they are asked for: `--help` needs none of them."""
    if name in _EXPORTS:
        module, _, attribute = _EXPORTS[name].rpartition(".")
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main(argv: list[str] | None = None) -> int:
    """Run a command line (default: this process's) -> exit code: 0 done, 1 failed in training, 2 a mistake to mend, 130 and 143 stopped."""
    return session.main(argv)


if __name__ == "__main__":
    sys.exit(main())
