"""The config of a model in the shape of Stable Diffusion v1, as facts and requests read it; nothing is built."""

AUTOENCODER = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"ddconfig": {"ch_mult": [1, 2, 4, 4]}}}
CLIP = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}


def config(**params) -> dict:
    unet = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {"channel_mult": [1, 2, 4, 4]}}
    defaults = {"channels": 4, "first_stage_config": AUTOENCODER, "cond_stage_config": CLIP, "unet_config": unet}
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {**defaults, **params}}}
