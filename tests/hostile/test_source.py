"""What the code itself may call: the doors that the other tests knock at are the only ones."""

import ast
from pathlib import Path

import pytest

from ldm.paths import ROOT

FILES = sorted((*(ROOT / "ldm").rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), ROOT / "main.py"))
NEVER = {
    *(
        "eval",
        "exec",
        "compile",
        "__import__",
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "marshal.loads",
        "shelve.open",
    ),
    *(
        "torch.jit.load",
        "torch.hub.load",
        "joblib.load",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "runpy.run_path",
    ),
    *("os.system", "os.popen", "shutil.unpack_archive", "tempfile.mktemp", "ctypes.CDLL"),
}
ONLY_IN = {  # a call -> the files that may hold it
    "torch.load": {"ldm/checkpoint/formats.py"},
    "OmegaConf.load": {"ldm/config/files.py", "scripts/quickstart.py"},  # the quickstart reads its own YAMLs
    "importlib.import_module": {  # all but the first import names that are written in the file
        *("ldm/config/instantiate.py", "ldm/models/diffusion/ddpm.py", "ldm/models/diffusion/samplers/registry.py"),
        *("ldm/modules/encoders/modules.py", "main.py"),
    },
    "subprocess.Popen": {"scripts/quickstart.py"},
    "subprocess.run": set(),
    "subprocess.call": set(),
    "tarfile.open": {"ldm/data/archives.py"},
}
ASKS_FOR = {  # a call -> what has to be among its arguments
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
}
METHODS = ("extractall", "extract")


def calls(file: Path):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_nothing_runs_what_it_reads(file):
    place = file.relative_to(ROOT).as_posix()
    for name, node in calls(file):
        keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        assert name not in NEVER, f"{place}:{node.lineno} calls {name}"
        assert place in ONLY_IN.get(name, {place}), f"{place}:{node.lineno} calls {name}, which belongs elsewhere"
        if name in ASKS_FOR:
            key, value = ASKS_FOR[name]
            assert keywords.get(key) is value, f"{place}:{node.lineno}: {name} without {key}={value}"
        assert not keywords.get("shell") and not keywords.get("trust_remote_code"), f"{place}:{node.lineno}"
        if name.endswith(".from_pretrained"):
            assert keywords.get("use_safetensors") is True and keywords.get("local_files_only") is True, (
                f"{place}:{node.lineno}"
            )
        assert name.rpartition(".")[2] not in METHODS, f"{place}:{node.lineno} calls {name}; ldm.data.archives unpacks"
