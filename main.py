"""Train latent diffusion models and their first stages: python main.py --base CONFIG.yaml -t --gpus 0, (see --help).

Also the published home of `main.DataModuleFromConfig` and the callbacks, which configs name as targets.
"""

import importlib
import sys
from typing import Any

from ldm.config.instantiate import ALIASES
from ldm.training.session import run_training

_EXPORTS = {name.removeprefix("main."): home for name, home in ALIASES.items() if name.startswith("main.")}


def __getattr__(name: str) -> Any:
    """Import a published name on first use: `--help` needs none of them."""
    if name in _EXPORTS:
        module, _, attribute = _EXPORTS[name].rpartition(".")
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main(argv: list[str] | None = None) -> int:
    """Run a command line (default: sys.argv); return 0 if done, 1 if failed, 2 if invalid, 130 or 143 if stopped."""
    return run_training(argv)


if __name__ == "__main__":
    sys.exit(main())
