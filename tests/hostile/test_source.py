"""No source file calls a function that could run what it reads, except at the entry points that other tests attack."""

import ast
from pathlib import Path

from ldm.paths import ROOT

FILES = sorted((*(ROOT / "ldm").rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), ROOT / "main.py"))
NEVER = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads",
    "shelve.open", "torch.jit.load", "torch.hub.load", "joblib.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "runpy.run_path", "os.system", "os.popen", "shutil.unpack_archive", "tempfile.mktemp",
}  # fmt: skip
ONLY_IN = {  # a call -> the files that may contain it
    "torch.load": {"ldm/checkpoint/formats.py"},
    "OmegaConf.load": {"ldm/config/files.py"},
    "importlib.import_module": {"ldm/config/instantiate.py", "ldm/models/diffusion/samplers/registry.py"},
    "import_module": {"ldm/published.py"},
    "subprocess.Popen": {"scripts/quickstart.py"},
    "subprocess.run": {"ldm/data/shards.py"},  # pipe: URLs of shards, which only the flag --allow-pipe permits
    "subprocess.call": set(),
    "tarfile.open": {"ldm/data/archives.py", "ldm/data/shards.py"},  # the latter reads, and extracts nothing
    "ctypes.CDLL": {"ldm/machine/allocator.py", "ldm/checkpoint/mapped.py"},  # of the process itself
}
ASKS_FOR = {  # a call -> a required argument
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
}
SHELL = {"ldm/data/shards.py"}
METHODS = ("extractall", "extract")


def calls(file: Path):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def problems(file: Path):
    place = file.relative_to(ROOT).as_posix()
    for name, node in calls(file):
        where = f"{place}:{node.lineno}: {name}"
        keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        if name in NEVER or name.rpartition(".")[2] in METHODS:
            yield f"{where} is forbidden"
        if place not in ONLY_IN.get(name, {place}):
            yield f"{where} belongs in {', '.join(ONLY_IN[name])}"
        if name in ASKS_FOR and keywords.get(ASKS_FOR[name][0]) is not ASKS_FOR[name][1]:
            yield f"{where} without {ASKS_FOR[name]}"
        if (keywords.get("shell") and place not in SHELL) or keywords.get("trust_remote_code"):
            yield f"{where} with shell or trust_remote_code"
        safe = keywords.get("use_safetensors") is True and keywords.get("local_files_only") is True
        if name.endswith(".from_pretrained") and not safe:
            yield f"{where} without use_safetensors and local_files_only"


def test_no_source_file_calls_what_could_run_what_it_reads():
    assert len(FILES) > 100 and [problem for file in FILES for problem in problems(file)] == []
