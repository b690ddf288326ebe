"""The array of all samples of a run."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ldm.output.sample_array import SampleArray
from ldm.paths import ROOT


def noise(side: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("classes", [None, [3, 1, 2]])
def test_the_array_of_samples_is_what_numpy_writes(tmp_path, classes):
    images = [noise(8, seed) for seed in range(3)]
    array = SampleArray(tmp_path / "numpy", 3)
    for k, image in enumerate(images):
        array.append(image, classes[k] if classes else None)
    path = array.finish()
    array.close()
    loaded = np.load(path)
    assert path.name == "3x8x8x3-samples.npz" and [p.name for p in path.parent.iterdir()] == [path.name]
    assert (
        np.array_equal(loaded["arr_0"], np.stack([np.asarray(image) for image in images]))
        and loaded["arr_0"].dtype == np.uint8
    )
    assert (loaded["arr_1"].tolist() == classes) if classes else loaded.files == ["arr_0"]


def test_an_array_that_lacks_samples_is_never_written(tmp_path):
    array = SampleArray(tmp_path, 3)
    array.append(noise(8))
    with pytest.raises(ValueError, match="expected 3 samples, got 1"):
        array.finish()
    array.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("samples", [1, 40])
def test_on_a_full_disk_the_error_is_of_the_array_and_nothing_remains(tmp_path, samples):
    """In an interpreter of its own, whose last lines would show errors of destructors."""
    code = f"""
import resource, sys
from PIL import Image
from ldm.output.sample_array import SampleArray
array = SampleArray({str(tmp_path)!r}, {samples})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    for _ in range({samples}):
        array.append(Image.new("RGB", (32, 32)))
    array.finish()
except OSError as error:
    print(error, file=sys.stderr)
finally:
    array.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
    assert f"{samples}x32x32x3-samples.npz: could not be written: File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []
