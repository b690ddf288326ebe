"""The one "did you mean"."""

from ldm.config.suggest import closest, did_you_mean


def test_the_most_similar_name_is_suggested_and_otherwise_all():
    choices = ["width", "height", "depth"]
    assert closest("widht", choices) == "width" and closest("zzz", choices) is None
    assert did_you_mean("widht", choices) == "; did you mean 'width'?"
    assert did_you_mean("zzz", choices) == "; choices: depth, height, width"
    assert did_you_mean("zzz", []) == ""
    assert closest("adamw", ["Adam", "AdamW"]) == "AdamW"  # the same but for its case, before a shorter one


def test_a_higher_cutoff_suggests_less():
    assert closest("wide", ["width"], cutoff=0.5) == "width" and closest("wide", ["width"], cutoff=0.9) is None
