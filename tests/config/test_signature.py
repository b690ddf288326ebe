"""Constructor arguments read from source text."""

import pytest

from ldm.config.instantiate import accepted_params
from ldm.config.signature import class_attributes, constructor_arguments
from ldm.util import get_obj_from_str


@pytest.mark.parametrize(
    "target",
    [
        "tests.toys.Toy",
        "tests.toys.ToyGan",
        "main.DataModuleFromConfig",
        "main.ImageLogger",
        "ldm.modules.encoders.modules.FrozenCLIPEmbedder",  # imported on first use
        "ldm.modules.losses.LPIPSWithDiscriminator",  # re-exported
        "ldm.callbacks.CheckpointPolicy",
        "ldm.models.autoencoder.AutoencoderKL",
        "ldm.models.diffusion.ddpm.LatentDiffusion",
        "ldm.modules.adapters.lora.LoRASpec",  # a dataclass
        "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "pytorch_lightning.callbacks.ModelCheckpoint",
        "torch.optim.AdamW",
    ],
)
def test_arguments_read_from_source_agree_with_the_imported_class(target):
    names = constructor_arguments(target)
    accepted = accepted_params(get_obj_from_str(target))
    assert names is not None and accepted is not None and names.keys() == accepted[0].keys()


@pytest.mark.parametrize(
    "target",
    [
        "nowhere.Nothing",
        "ldm.util.Nothing",
        "ldm",
        "tests.toys.nn",
        "torch.nn.Sequential",
        "ldm.models.diffusion.ddim.DDIMSampler",  # takes anything
    ],
)
def test_unknown_constructors_give_none(target):
    assert constructor_arguments(target) is None


def test_literal_attributes_of_a_class_include_inherited_ones():
    heun = class_attributes("ldm.models.diffusion.samplers.karras.HeunSampler")
    assert heun["spacings"] == ("uniform", "logsnr", "karras", "trailing") and heun["adds_noise"] is False
    assert class_attributes("ldm.models.diffusion.samplers.karras.Missing") == {}
