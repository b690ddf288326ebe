"""The quickstart's prompts, commands, grid and metrics; .ci/run runs all of it with --fast."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.digits import WORDS, captions
from ldm.evaluation.metrics import DigitReport
from ldm.output.images import GeneratedImage, Output, read_metadata

pytest.importorskip("sklearn")

from scripts import quickstart
from tests.scripts.refusals import help_without_heavy_imports

EVERY = [captions(digit) for digit in range(10)]


def test_prompts_ask_for_every_digit_in_many_phrasings():
    prompts = quickstart.prompts_for(EVERY, quickstart.SHOWN, quickstart.PER_DIGIT - quickstart.SHOWN)
    assert len(prompts) == 10 * quickstart.PER_DIGIT >= 500
    for digit in range(10):
        own = [prompt for asked, prompt in prompts if asked == digit]
        assert own[: quickstart.SHOWN] == [f"a handwritten {WORDS[digit]}"] * quickstart.SHOWN
        assert set(own) < set(captions(digit)) and len(set(own)) == 1 + quickstart.PER_DIGIT - quickstart.SHOWN


def test_configs_agree_on_the_first_stage_and_train_without_downloads():
    from omegaconf import OmegaConf

    autoencoder, text2image = (
        OmegaConf.load(quickstart.ROOT / path) for path in (quickstart.AUTOENCODER, quickstart.TEXT2IMAGE)
    )
    first_stage = text2image.model.params.first_stage_config
    assert first_stage.target == autoencoder.model.target
    for key in ("ddconfig", "embed_dim"):
        assert first_stage.params[key] == autoencoder.model.params[key]
    assert text2image.model.params.channels == first_stage.params.embed_dim
    assert text2image.model.params.image_size * 4 == first_stage.params.ddconfig.resolution == quickstart.SIZE
    assert autoencoder.model.params.lossconfig.params.perceptual_weight == 0
    for config in (autoencoder, text2image):  # the learning rate has decayed when training ends
        assert config.lightning.trainer.max_steps == config.model.params.scheduler_config.params.max_decay_steps


def test_captions_fit_the_text_encoder(caplog):
    from omegaconf import OmegaConf

    from ldm.modules.encoders.tokenizers import clip_tokenizer

    length = OmegaConf.load(quickstart.ROOT / quickstart.TEXT2IMAGE).model.params.cond_stage_config.params.max_seq_len
    every = [caption for digit in range(10) for caption in captions(digit)]
    assert clip_tokenizer()(every, length).shape == (len(every), length)
    assert not caplog.records, "a caption that does not fit is reported"


def test_a_stage_prints_a_command_that_can_be_repeated_and_gives_its_seconds(capfd, tmp_path, monkeypatch):
    (tmp_path / "hello.py").write_text("import sys; print(sys.argv[1:])")
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert quickstart.stage("greet", ["hello.py", "--prompt", "a handwritten seven"]) > 0
    out = capfd.readouterr().out
    assert (
        "=== greet\n$ python hello.py --prompt 'a handwritten seven'\n" in out
        and "['--prompt', 'a handwritten seven']" in out
    )


def test_a_failing_stage_ends_the_quickstart_with_its_exit_code(capfd, tmp_path, monkeypatch):
    (tmp_path / "fails.py").write_text("raise SystemExit(2)")
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        quickstart.stage("fail", ["fails.py"])
    assert stopped.value.code == 2 and "exit code 2" in capfd.readouterr().err


def test_fast_training_asks_main_for_a_twentieth_of_the_steps(tmp_path, monkeypatch):
    commands = []

    def pretend(title, command):
        commands.append(list(command))
        (tmp_path / "runs" / f"2026-01-0{len(commands)}T00-00-00_autoencoder").mkdir(parents=True)
        return 1.0

    monkeypatch.setattr(quickstart, "stage", pretend)
    stages = []
    for fast in (False, True):
        folder = quickstart.train(quickstart.AUTOENCODER, tmp_path, 7, fast, stages, "a.b=c")
    assert folder.name.startswith("2026-01-02"), "the newest run counts"
    full, fast = commands
    assert (
        full[:4] == ["main.py", "--base", quickstart.AUTOENCODER, "-t"]
        and full[-1] == "a.b=c"
        and "--max_steps" not in full
    )
    steps = quickstart_steps()
    assert fast[fast.index("--max_steps") + 1] == str(steps // 20)
    assert [name for name, _, _ in stages] == ["training, autoencoder"] * 2


def quickstart_steps() -> int:
    from omegaconf import OmegaConf

    return OmegaConf.load(quickstart.ROOT / quickstart.AUTOENCODER).lightning.trainer.max_steps


def test_the_grid_shows_every_digit_once_with_its_prompt():
    prompts = quickstart.prompts_for(EVERY, 4, 2)
    images = [Image.new("RGB", (32, 32), (20 * digit, 0, 0)) for digit, _ in prompts]
    pixels = np.asarray(quickstart.digit_grid(images, prompts))
    for digit in range(10):
        assert (pixels == (20 * digit, 0, 0)).all(axis=-1).sum() >= 4 * 64 * 64, f"four upscaled images of {digit}"


def test_the_grid_is_saved_with_metadata_and_never_overwrites(tmp_path):
    output = Output(tmp_path / "generated")
    files = [
        output.save_sample(GeneratedImage(Image.new("RGB", (8, 8)), {"prompt": word, "seed": 23}))
        for word in ("one", "two")
    ]
    image = Image.new("RGB", (300, 300), (90, 120, 90))
    assert [quickstart.save_grid(tmp_path, image, files).name for _ in range(2)] == ["grid.png", "grid-1.png"]
    info = read_metadata(tmp_path / "grid.png")
    expected = {
        "task": "quickstart",
        "seed": 23,
        "safety": "off",
        "flagged": None,
        "watermark": "StableDiffusionV1, dwtDct, 136 bits",
    }
    assert {key: info.get(key) for key in [*expected, "prompt"]} == {**expected, "prompt": None}


def test_metrics_have_a_value_and_a_target():
    report = DigitReport(count=600, recognized=0.985, accuracy=0.989, variety={0: 0.8, 1: 1.0}, novelty=1.1)
    text = quickstart.table(quickstart.metric_rows(36.04, report))
    for value in ("36.0 dB", "98.5 % of 600", "98.9 %", "0.90 (0.80 to 1.00)", "1.10", "at least 97 %", "0.7 to 1.3"):
        assert value in text


def test_metrics_of_real_digits_through_an_untrained_first_stage(tmp_path):
    import torch
    from omegaconf import OmegaConf

    from ldm.data.digits import Digits
    from ldm.data.image import from_array
    from ldm.util import instantiate_from_config

    torch.manual_seed(0)
    model = instantiate_from_config(OmegaConf.load(quickstart.ROOT / quickstart.AUTOENCODER).model)
    checkpoint = tmp_path / "last.ckpt"
    torch.save({"state_dict": model.state_dict()}, checkpoint)
    held_out = Digits("held_out")
    rows = quickstart.metrics(checkpoint, [from_array(image) for image in held_out.images[:60]], held_out.labels[:60])
    values = {name: value for name, value, _ in rows}
    assert float(values["first stage, PSNR on held-out scans"].split()[0]) < 20
    assert float(values["generated digits recognized as their prompt"].split()[0]) > 90


def test_without_scikit_learn_it_stops_in_one_line_before_anything_else(capfd, monkeypatch, tmp_path):
    from ldm.data import digits

    digits.load_scans.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert quickstart.run_command(quickstart.main, ["--outdir", str(tmp_path / "out")]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and "quickstart" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    digits.load_scans.cache_clear()


def test_a_seed_that_training_would_refuse_is_refused_as_it_was_written(capfd, tmp_path):
    assert quickstart.run_command(quickstart.main, ["--seed", "-3", "--outdir", str(tmp_path / "out")]) == 2
    assert capfd.readouterr().err == "error: --seed -3: expected an integer of at least 0\n"
    assert not (tmp_path / "out").exists()


def test_the_help_is_quick(tmp_path):
    script = Path(quickstart.__file__)
    assert "--outdir DIR" in help_without_heavy_imports(script, tmp_path)
