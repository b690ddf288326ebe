"""Laws of scripts/app.py: its errors come before anything is loaded, and other computers need a token."""

import socket
import subprocess
import sys

import pytest

from ldm.cli import run_command
from ldm.paths import ROOT
from ldm.web import server
from ldm.web.server import Address
from scripts import app


def test_help_imports_neither_torch_nor_gradio():
    code = "import sys, scripts.app as a\ntry: a.main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "--token" in shown and not {"torch", "gradio", "pytorch_lightning"} & set(shown.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ckpt", "none.ckpt"], "checkpoint none.ckpt: no such file"),
        (["--models", "nowhere"], "--models nowhere: no such folder"),
        (["--port", "0"], "--port 0: choose 1 to 65535"),
        (["--port", "65536"], "--port 65536: choose 1 to 65535"),
        (["--host", "203.0.113.1"], "--host 203.0.113.1 --port 7860: cannot listen there"),
        (["--host", "no such name"], "--host no such name --port 7860: cannot listen there"),
        (["--host", "a" * 70], "--port 7860: cannot listen there (not a name)"),
        (["--host", ""], "--host (empty) --port 7860: cannot listen there"),
        (["--token", " "], "--token '': choose a word"),
        (["--token", "\udcff"], "--token: not UTF-8 text"),
        (["--lora", "none.safetensors"], "--lora none.safetensors: no such file"),
    ],
)
def test_what_cannot_be_served_is_one_line(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run_command(app.main, argv) == 2
    assert message in capsys.readouterr().err


def test_without_gradio_the_error_names_the_extra(monkeypatch, capsys, tmp_path):
    (tmp_path / "a.ckpt").touch()
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    assert run_command(app.main, ["--ckpt", str(tmp_path / "a.ckpt")]) == 2
    assert 'pip install -e ".[web]"' in capsys.readouterr().err


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_address_that_others_reach_has_a_token_and_the_local_one_has_none(port):
    everywhere = Address("0.0.0.0", port).checked()
    assert everywhere.token is not None and len(everywhere.token) >= 20 and everywhere.random
    assert Address("0.0.0.0", port).checked().token != everywhere.token
    assert Address("0.0.0.0", port, "mine").checked().token == "mine"
    for host in ("127.0.0.1", "127.0.0.2", "127.1", "localhost"):
        assert Address(host, port).checked().token is None
    assert Address("*", port).checked().token  # all addresses for the system, as 0.0.0.0


def test_the_token_may_be_in_the_environment_and_the_flag_wins(port, monkeypatch):
    monkeypatch.setenv("LDM_APP_TOKEN", "of the environment")
    assert Address("127.0.0.1", port).checked() == Address("127.0.0.1", port, "of the environment")
    assert Address("127.0.0.1", port, "of the flag").checked().token == "of the flag"
    monkeypatch.setenv("LDM_APP_TOKEN", "")
    with pytest.raises(ValueError, match="LDM_APP_TOKEN '': choose a word"):
        Address("127.0.0.1", port).checked()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])  # gradio tries the port on 127.0.0.1 for every address
def test_a_port_in_use_is_one_line(host, port, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        assert run_command(app.main, ["--host", host, "--port", str(port)]) == 2
    assert f"--host {host} --port {port}: cannot listen there (Address already in use)" in capsys.readouterr().err
