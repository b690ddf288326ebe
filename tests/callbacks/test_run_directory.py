"""Files of a run directory."""

from types import SimpleNamespace

from omegaconf import OmegaConf

from ldm.callbacks.run_directory import SetupCallback


def test_the_class_names_are_saved_in_the_order_of_their_numbers(tmp_path):
    config = OmegaConf.create({"model": {}})
    callback = SetupCallback(None, "now", tmp_path, tmp_path / "c", tmp_path / "configs", config, config)
    for names, text in (([], None), (["tench", "ape"], "tench\nape\n")):
        callback.on_fit_start(SimpleNamespace(is_global_zero=True, datamodule=SimpleNamespace(class_names=names)), None)
        file = tmp_path / "configs" / "classes.txt"
        assert (file.read_text() if file.exists() else None) == text
