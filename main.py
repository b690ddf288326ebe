"""Train latent diffusion models and their first stages: python main.py --base CONFIG.yaml -t --gpus 0, (see --help).

Also the published home of `main.DataModuleFromConfig` and the callbacks, which configs name as targets.
"""

import os
import signal
import sys

if __name__ == "__main__":  # before the imports, which take seconds

    def _stop(number: int, frame: object) -> None:
        os.write(2, f"stopped by {signal.Signals(number).name} before training began\n".encode())
        os._exit(128 + number)

    for _name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) is not signal.SIG_IGN:
            signal.signal(getattr(signal, _name), _stop)
    for _name in ("SIGUSR1", "SIGUSR2"):  # there is nothing to save or to debug yet
        if hasattr(signal, _name):
            signal.signal(getattr(signal, _name), signal.SIG_IGN)

from ldm.published import published_names
from ldm.training.session import run_training

__getattr__ = published_names("main", __name__)  # imported on first use: `--help` needs none of them


def main(argv: list[str] | None = None) -> int:
    """Run a command line (default: sys.argv); return 0 (done), 1 (failed), 2 (invalid), 129, 130 or 143 (stopped)."""
    return run_training(argv)


if __name__ == "__main__":
    code = main()
    if code > 128:  # stopped by a signal: all is saved, and the interpreter's own end takes seconds on a busy machine
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
