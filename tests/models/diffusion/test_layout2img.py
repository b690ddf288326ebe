"""Laws of layout-to-image models beyond those of every condition (test_condition_stage.py)."""

import pytest

from ldm.models.diffusion.layout2img import draw_layout
from ldm.modules.encoders.layout_tokens import Box
from tests.models.diffusion.modes import build
from tests.models.diffusion.tiny import LAYOUT, Samples


def test_the_meaning_of_tokens_comes_from_the_dataset_if_it_knows_them_else_from_class_names():
    model = build("boxes", "Layout2ImgDiffusion", class_names=["cat", "dog"])
    layout, name = model.layout_reader()
    assert layout.num_classes == 2 and name(1) == "dog"
    model.class_names = None
    assert model.layout_reader()[0].num_classes == 8191
    dataset = Samples()
    dataset.conditional_builders = {"coordinates_bbox": LAYOUT}
    dataset.get_textual_label_for_category_no = "thing {}".format

    class Trainer:
        datamodule = type("Module", (), {"datasets": {"train": dataset}})

    model._trainer = Trainer
    layout, name = model.layout_reader()
    assert layout is LAYOUT and name(3) == "thing 3"


def test_a_drawn_layout_shows_its_boxes():
    empty, full = (
        draw_layout(LAYOUT.encode(boxes), LAYOUT, (64, 48)) for boxes in ([], [Box(1, (0.1, 0.1, 0.5, 0.5))])
    )
    assert empty.shape == full.shape == (3, 48, 64) and (empty == 1).all() and (full < 1).any() and full.min() >= -1
    assert (full[:, 30:, 40:] == 1).all()


def test_other_conditions_are_refused():
    with pytest.raises(ValueError, match="Layout2ImgDiffusion requires 'coordinates_bbox'"):
        build("boxes", "Layout2ImgDiffusion", cond_stage_key="caption")
