"""Laws of the doctor's estimates."""

from types import SimpleNamespace

import pytest
import torch

from ldm.training.doctor.estimates import memory_rows
from ldm.training.doctor.footprint import Footprint
from tests.models.diffusion.tiny import ATTEND, CAPTIONS, latent_diffusion

ROW = "weights, first stage (frozen)"


@pytest.mark.parametrize(("precision", "device", "each"), [(None, "cuda", 4), ("bf16", "cuda", 2), ("fp16", "cpu", 6)])
def test_frozen_precision_halves_the_weights_of_frozen_stages_and_a_cpu_keeps_those_before_the_cast(
    precision, device, each
):
    model = latent_diffusion("crossattn", ATTEND, CAPTIONS, frozen_precision=precision)
    model.first_stage_model.more = torch.nn.Linear(1024, 1024).requires_grad_(False)
    codebook = torch.nn.Embedding(512, 1024).requires_grad_(False)
    codebook.keeps_float32 = True
    devices = SimpleNamespace(accelerator=device)
    run = SimpleNamespace(model=model, devices=devices, footprint=Footprint(0, 0, 0, 0, ()), strategy="auto", ranks=1)
    count = sum(weight.numel() for weight in model.first_stage_model.parameters())
    assert dict(memory_rows(run))[ROW] == each * count
    model.first_stage_model.codebook = codebook
    assert dict(memory_rows(run))[ROW] == each * count + 4 * codebook.weight.numel()
