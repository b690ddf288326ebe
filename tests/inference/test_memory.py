"""Sampling and decoding by memory: as many images at a time as fit; parts decode to the same images."""

import copy
import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.inference import memory
from ldm.inference.memory import (
    batch_by_memory,
    decoded_at_once,
    decoder_bytes,
    encoder_bytes,
    free_memory,
    known_free_memory,
    network_bytes,
)
from ldm.inference.requests import ControlRequest, TextToImageRequest
from ldm.models.diffusion.tiling import TiledModel, Tiling
from ldm.training.doctor.footprint import _Meter


@pytest.fixture
def z():
    return torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(0))


def with_room_for(images: float, pipeline, z, monkeypatch) -> None:
    each = decoder_bytes(pipeline.model.first_stage_model.decoder, *z.shape[2:], torch.float32)
    monkeypatch.setattr(memory, "free_memory", lambda device: int(images * each))


@pytest.mark.parametrize("room, count", [(9.0, 3), (3.0, 3), (2.5, 2), (1.0, 1), (0.1, 1)])
def test_as_many_images_are_decoded_at_a_time_as_fit(pipeline, z, monkeypatch, caplog, room, count):
    with_room_for(room, pipeline, z, monkeypatch)
    with caplog.at_level(logging.INFO, "ldm"):
        assert decoded_at_once(pipeline.model, z) == count
    assert len(caplog.records) == (count < 3) and ("--tiled" in caplog.text) == (room < 1)


@pytest.mark.parametrize("room", [2.0, 0.5])
def test_parts_give_the_images_of_the_whole_batch(pipeline, z, monkeypatch, room):
    whole = pipeline.decode(z)
    with_room_for(room, pipeline, z, monkeypatch)
    sizes, decode = [], pipeline.model.decode_first_stage
    monkeypatch.setattr(pipeline.model, "decode_first_stage", lambda z: sizes.append(len(z)) or decode(z))
    assert torch.allclose(pipeline.decode(z), whole, atol=1e-5) and sum(sizes) == 3 and len(sizes) > 1


def test_float32_after_an_overflow_has_parts_of_its_own(pipeline, z, monkeypatch):
    model, sizes = copy.deepcopy(pipeline.model), []
    half = pipeline.with_model(model)
    half.dtype = torch.bfloat16
    monkeypatch.setattr("ldm.inference.pipeline.decoded_at_once", lambda model, z, dtype: {2: 2, 4: 1}[dtype.itemsize])
    bad = [torch.tensor(float("inf")), torch.tensor(float("inf"))]

    def decode(z):
        sizes.append(len(z))
        return torch.zeros(len(z), 3, 2, 2) + (bad.pop() if bad else 0.0)

    monkeypatch.setattr(model, "decode_first_stage", decode)
    assert half.decode(z).shape == (3, 3, 2, 2) and sizes == [2, 1, 1, 1, 1]


def test_a_tile_is_what_must_fit_where_the_first_stage_works_in_tiles(pipeline, monkeypatch):
    z = torch.zeros(2, 4, 16, 16)
    with_room_for(1.0, pipeline, z, monkeypatch)
    assert decoded_at_once(pipeline.model, z) == 1
    assert decoded_at_once(TiledModel(pipeline.model, Tiling((8, 8), (4, 4)), 4), z) == 2


def test_tiles_are_advised_for_a_single_image_that_does_not_fit(pipeline, z, monkeypatch, caplog):
    with_room_for(0.5, pipeline, z, monkeypatch)
    with caplog.at_level(logging.INFO, "ldm"):
        assert decoded_at_once(pipeline.model, z[:1]) == 1
    assert "decoding 1 of 1" in caplog.text and "--tiled" in caplog.text


def test_a_model_with_another_first_stage_decodes_the_whole_batch(z):
    assert decoded_at_once(torch.nn.Identity(), z) == 3


def batch(pipeline, free, monkeypatch, most=5, encodes=False, request=TextToImageRequest, **changes):
    """The size of a batch of 16x24 pixels with so many bytes free."""
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    checked = request(prompt="a cat", height=16, width=24, **changes).checked(pipeline.info)
    return batch_by_memory(pipeline, checked, most, encodes)


def test_a_batch_is_as_many_images_as_fit_and_at_least_one(pipeline, monkeypatch):
    each = network_bytes(pipeline.model.model.diffusion_model, 4, 6, torch.float32)
    for room, count in ((0.0, 1), (1.9, 1), (4.0, 2), (6.1, 3), (99.0, 5)):  # guided: two predictions an image
        assert batch(pipeline, int(room * each), monkeypatch) == count
    assert batch(pipeline, 4 * each, monkeypatch, scale=1.0) == 4
    assert batch(pipeline, 4 * each, monkeypatch, scale=1.0, request=ControlRequest) == 2


def test_the_encoder_of_the_first_stage_needs_memory_for_each_image_unless_a_tile_is_smaller(pipeline, monkeypatch):
    encoder, changes = pipeline.model.first_stage_model.encoder, {"scale": 1.0, "encodes": True}
    free = 3 * encoder_bytes(encoder, 16, 24, torch.float32)
    assert batch(pipeline, free, monkeypatch, **changes) == 3 < batch(pipeline, free, monkeypatch, scale=1.0)
    assert batch(pipeline, free, monkeypatch, tiled=16, **changes) == 4


def test_the_estimate_of_the_network_is_above_the_tensors_of_a_call(pipeline):
    unet = pipeline.model.model.diffusion_model
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = torch.empty(1, 4, 32, 48), torch.zeros(1, dtype=torch.int64), torch.empty(1, 12, 16)
        meter = _Meter([*unet.parameters(), *given])
        with meter, torch.no_grad():
            unet(*given)
    assert meter.peak < network_bytes(unet, 32, 48, torch.float32) < 3 * meter.peak


def test_an_unknown_free_memory_is_refused():
    with pytest.raises(ValueError, match="--n_samples auto: the free memory of meta is unknown"):
        known_free_memory(torch.device("meta"))


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A system with 1000 kB available, and a job with a limit of its own; `limit` sets it."""
    job = tmp_path / "cgroup" / "jobs" / "one"
    job.mkdir(parents=True)
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemFree:  5 kB\nMemAvailable:  1000 kB\nBuffers:  1 kB\n")
    (tmp_path / "self" / "cgroup").write_text("4:memory:/other\n0::/jobs/one\n")
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "kept_memory", lambda: 7)

    def limit(group, most, used):
        for name, text in (("max", most), ("current", used), ("stat", "anon 3\nactive_file 20\ninactive_file 30\n")):
            (group / f"memory.{name}").write_text(f"{text}\n")

    limit(job, "max", 0)
    return job, limit


def test_the_free_memory_of_the_cpu_is_what_is_available_within_limits_and_what_the_process_keeps(system):
    job, limit = system
    cpu = torch.device("cpu")
    assert free_memory(cpu) == 1000 * 1024 + 7 and free_memory(torch.device("meta")) is None
    limit(job.parent, 5000, 4000)
    assert free_memory(cpu) == 5000 - 4000 + 50 + 7
    limit(job, 300, 200)
    assert free_memory(cpu) == 300 - 200 + 50 + 7
    limit(job, 300, 900)
    assert free_memory(cpu) == 7
    (job / "memory.max").write_text("damaged")
    assert free_memory(cpu) == 5000 - 4000 + 50 + 7
