"""The array of all samples of a run."""

import numpy as np
import pytest
from PIL import Image

from ldm.output.sample_array import SampleArray


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
