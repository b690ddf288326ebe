"""Small images in the layouts of the published data sets, and in tar shards."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def pixels(seed=0, height=24, width=32):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)


def save_image(path, seed=0, height=24, width=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, height, width)).save(path)
    return path


def image_bytes(seed=0, height=24, width=32, format="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels(seed, height, width)).save(file, format)
    return file.getvalue()


def save_shard(path, members):
    """Write a tar file of {name: bytes, text, or an object for JSON}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            text = content if isinstance(content, str) else json.dumps(content) if isinstance(content, dict) else None
            data = content if text is None else text.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def save_shards(folder, shards=3, samples=4, **size):
    """Write shards of samples with a PNG, a caption and a JSON, numbered over all shards -> their paths."""
    paths = []
    for shard in range(shards):
        members = {}
        for number in range(shard * samples, (shard + 1) * samples):
            members[f"{number:03d}.png"] = image_bytes(number, **size)
            members[f"{number:03d}.txt"] = f"caption {number}"
            members[f"{number:03d}.json"] = {"score": number / 2, "url": f"https://x/{number}"}
        paths.append(save_shard(folder / f"{shard:05d}.tar", members))
    return paths
