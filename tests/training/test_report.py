"""Console output of a run."""

import logging
import re
import warnings

from ldm.training.report import console


def test_lightnings_warnings_are_silent_and_others_are_one_line(capsys):

    with console():
        warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck.", stacklevel=1)
        warnings.warn("something\nto know", stacklevel=1)
        logging.getLogger("ldm.anything").info("%-11s %s", "event", 1)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^[\d:]{8}  ", "", line) for line in lines] == ["warning     something to know", "event       1"]
    assert not logging.getLogger("ldm").handlers


def test_a_line_is_logged_once_within_a_command_that_logs_too(capsys):
    from ldm.cli import TerminalHandler

    root, outer = logging.getLogger(), TerminalHandler()
    root.addHandler(outer)
    try:
        with console():
            logging.getLogger("ldm.anything").info("once")
        assert capsys.readouterr().err.count("once") == 1
        logging.getLogger("ldm.anything").warning("after")
        assert "after" in capsys.readouterr().err
    finally:
        root.removeHandler(outer)
