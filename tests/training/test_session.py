"""What a run does before torch is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import main
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


@pytest.mark.parametrize(
    "command", [("main.py", "-t", "-b", "configs/quickstart/autoencoder.yaml"), ("scripts/quickstart.py",)]
)
def test_entry_points_watch_for_other_processes_before_torch_is_imported(tmp_path, command):
    """Seen by a module of torch's name, which ends the process."""
    code = "import os, threading; print(*(t.name for t in threading.enumerate()), sep=';', flush=True); os._exit(0)"
    (tmp_path / "torch.py").write_text(code)
    environ = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    words = [sys.executable, ROOT / command[0], *command[1:]]
    environ["PYTHONPATH"] = str(tmp_path)
    result = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert ("watch for other processes" in result.stdout) == (sys.platform == "linux"), result.stderr


@pytest.mark.parametrize(
    "override, message",
    [
        ("lightning.trainer.max_steps=3.7", "lightning.trainer.max_steps 3.7: expected an integer >= -1 or null"),
        ("lightning.trainer.check_val_every_n_epoch=0", "expected an integer >= 1 or null"),
        ("lightning.trainer.limit_train_batches=-0.5", "expected an integer >= 0 or a number in [0, 1] or null"),
        ("lightning.trainer.gradient_clip_val=.nan", "expected a number >= 0 or null"),
        ("lightning.trainer.benchmark=maybe", "expected true or false or null"),
        ("lightning.seed=-1", "lightning.seed -1: expected an integer in [0, 4294967295] or null"),
        ("model.base_learning_rate=0", "model.base_learning_rate 0: expected a number > 0 or null"),
        ("model.base_learning_rate=.inf", "expected a number > 0 or null"),
        ("model.params.timesteps=ten", "model.params.timesteps 'ten': expected an integer >= 1"),
        ("model.params.timesteps=0", "expected an integer >= 1"),
        ("model.params.linear_start=-1", "model.params.linear_start -1: expected a number in (0, 1)"),
        ("model.params.scale_factor=0", "model.params.scale_factor 0: expected a number > 0"),
        ("model.params.l_simple_weight=-1", "model.params.l_simple_weight -1: expected a number >= 0"),
        ("model.params.ema_decay=1.5", "expected a number in [0, 1]"),
        ("model.params.logvar_init=.nan", "expected a finite number"),
        ("model.params.use_ema=maybe", "expected true or false"),
        ("model.params.unet_config.params.channel_mult=2", "expected a list (each item: an integer >= 1)"),
        ("model.params.unet_config.params.channel_mult=[1,0]", "expected a list (each item: an integer >= 1)"),
        ("model.params.unet_config.params.num_heads=0", "expected -1 or an integer >= 1"),
        ("model.params.unet_config.params.dropout=1", "expected a number in [0, 1)"),
        ("model.params.unet_config=3", "model.params.unet_config 3: expected a mapping"),
        ("model.params.first_stage_config.params.ddconfig.ch=a", "ddconfig.ch 'a': expected an integer >= 1"),
        ("model.params.first_stage_config.params.ddconfig=a", "ddconfig 'a': expected a mapping"),
        ("model.params.cond_stage_config.params.vocab_rows=0", "vocab_rows 0: expected an integer >= 1"),
        ("model.params.cond_stage_config.params.heads=0", "heads 0: expected an integer >= 1"),
        ("data.params.batch_size=2.5", "data.params.batch_size 2.5: expected an integer >= 1"),
        ("data.params.num_workers=-1", "data.params.num_workers -1: expected an integer >= 0 or null"),
        ("data.params.train.params.size=[1,2,3]", "data.params.train.params.size [1, 2, 3]: expected an integer"),
    ],
)
def test_a_value_of_another_type_or_range_is_refused_in_one_line(override, message, capsys):
    assert main.main(["-t", "-b", "configs/quickstart/text2image.yaml", override]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {override.partition('=')[0]} ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize("flag", ["--max_steps 3.7", "--check_val_every_n_epoch 0", "--accumulate_grad_batches -2"])
def test_trainer_flags_have_the_ranges_of_the_yaml(flag, capsys):
    assert main.main(["-b", "configs/quickstart/text2image.yaml", "-t", *flag.split()]) == 2
    said = capsys.readouterr().err
    assert flag.split()[0] in said and "expected" in said and said.count("\n") == 1
