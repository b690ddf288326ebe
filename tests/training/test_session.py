"""What a run does before torch is imported."""

import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

from tests.config.toys import toy_config

ROOT = Path(__file__).parents[2]


def test_help_and_refusals_import_neither_torch_nor_lightning(tmp_path):
    toy = tmp_path / "toy.yaml"
    OmegaConf.save(OmegaConf.create(toy_config()), toy)
    code = (
        "import sys, main\n"
        "for words in sys.argv[1:]:\n"
        "    assert main.main(words.split()) == (0 if words == '--help' else 2), words\n"
        "assert not {'torch', 'pytorch_lightning', 'transformers', 'torchvision'} & set(sys.modules)\n"
    )
    words = ["--help", "-b nowhere.yaml", "-b a --max_epoch 3", f"-b {toy} -t model.params.widht=3"]
    words += [
        "-t -b configs/recipes/class-conditional-folder.yaml model.params.first_stage_config.params.ckpt_path=gone.ckpt"
    ]
    words += ["-t -b configs/recipes/class-conditional-folder.yaml model.target=os.system"]
    result = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("error: ") == 5 and "Traceback" not in result.stderr
