"""Output files: numbers are never reused, and metadata can be read back."""

import numpy as np
import pytest
from PIL import Image

from ldm.output.images import METADATA_KEY, GeneratedImage, NamedOutput, NumberedFiles, Output, read_metadata


def noise(side: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def make_image(**info) -> GeneratedImage:
    return GeneratedImage(noise(8), info)


def test_files_are_numbered_as_published(tmp_path):
    output = Output(tmp_path)
    assert output.save_sample(make_image()) == tmp_path / "samples" / "00000.png"
    assert output.save_sample(make_image()).name == "00001.png"
    assert output.save_grid(make_image()) == tmp_path / "grid-0000.png"


def test_no_file_is_overwritten_even_after_deletions_and_by_two_runs_at_once(tmp_path):
    first = NumberedFiles(tmp_path)
    paths = [first.save(make_image()) for _ in range(4)]
    paths[1].unlink()
    second = NumberedFiles(tmp_path)
    assert second.save(make_image()).name == "00004.png"
    assert first.save(make_image()).name == "00005.png"  # it meant to write 00004 itself
    assert second.save(make_image()).name == "00006.png"


def test_other_files_in_the_folder_do_not_count(tmp_path):
    for name in ("grid-0007.png", "notes.txt", "12.jpg", "x00009.png"):
        (tmp_path / name).touch()
    assert NumberedFiles(tmp_path).save(make_image()).name == "00000.png"
    assert NumberedFiles(tmp_path, "grid-{:04}.png").save(make_image()).name == "grid-0008.png"


def test_more_images_than_digits(tmp_path):
    (tmp_path / "99999.png").touch()
    folder = NumberedFiles(tmp_path)
    assert (
        folder.save(make_image()).name == "100000.png"
        and NumberedFiles(tmp_path).save(make_image()).name == "100001.png"
    )


def test_a_file_where_the_folder_should_be_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match="is a file"):
        NumberedFiles(tmp_path / "out")


@pytest.mark.parametrize(
    "prompt", ["a cat", "", "日本語 🎨", 'quotes " and \\ and \n lines', "x" * 100_000, "nul \x00"]
)
def test_metadata_comes_back_as_it_was_and_pixels_too(tmp_path, prompt):
    info = {"prompt": prompt, "seed": 42, "scale": 7.5, "n": None, "list": ["ä", 1]}
    path = NumberedFiles(tmp_path).save(GeneratedImage(noise(8), info))
    assert read_metadata(path) == info
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(noise(8)))


def test_a_file_without_settings_says_so(tmp_path):
    noise(8).save(tmp_path / "a.png")
    noise(8).save(tmp_path / "a.jpg")
    for name in ("a.png", "a.jpg"):
        with pytest.raises(ValueError, match=f"{name}: no settings"):
            read_metadata(tmp_path / name)


def test_the_text_chunk_is_plain_json_under_one_keyword(tmp_path):
    path = NumberedFiles(tmp_path).save(make_image(prompt="é"))
    assert Image.open(path).text == {METADATA_KEY: '{"prompt": "\\u00e9"}'}


def test_results_have_the_name_of_their_original_and_replace_none(tmp_path):
    output = NamedOutput(tmp_path / "a" / "b")
    assert [output.save(make_image(), "x").name for _ in range(3)] == ["x.png", "x-1.png", "x-2.png"]
    with pytest.raises(ValueError, match="is a file or inside one"):
        NamedOutput(tmp_path / "a" / "b" / "x.png" / "c")
