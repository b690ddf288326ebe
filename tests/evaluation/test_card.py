"""Cards: written, read, shown, compared."""

import json

import pytest
from PIL import Image

from ldm.evaluation.card import Card, Metric, compare, interval, shown, verdict


def card(**changes) -> Card:
    values = {"metrics": {"fid": Metric(2.0, 1.5, 2.5), "kid": Metric(0.004, spread=0.001)}, "skipped": {}}
    values |= {"settings": {"scale": 1.5, "steps": 25}, "data": {"features": {"name": "pixels"}, "real": "10, train"}}
    return Card(**{"kind": "samples", "title": "a", "command": "python scripts/evaluate.py", **values, **changes})


def test_a_card_is_read_as_it_was_written(tmp_path):
    written = card(skipped={"lpips": "no weights"}, copies=[{"image": 3, "training_image": 5, "distance": 0.01}])
    written.save(tmp_path, Image.new("RGB", (4, 4)))
    assert Card.read(tmp_path) == written == Card.read(tmp_path / "card.json")
    text = (tmp_path / "card.md").read_text()
    assert "| Frechet distance | 2.000 | 1.500 to 2.500 | lower |" in text and "4.000 ± 1.000" in text
    assert "LPIPS: not measured, no weights" in text and "| 3 | 5 | 0.01 |" in text and "| scale | 1.5 |" in text


WHOLE = {"kind": "samples", "title": "a", "command": "b", "metrics": {"fid": {"value": 1.0}}, "skipped": {}}


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "no json",
        "[]",
        "null",
        '{"metrics": {"fid": {"wrong": 1}}}',
        *(
            json.dumps(WHOLE | change)
            for change in (
                {"metrics": {"fid": {"value": None}}},
                {"metrics": {"fid": {"value": "1"}}},
                {"metrics": []},
                {"data": []},
                {"data": {"images": 5}},
                {"settings": None},
                {"title": 3},
                {"seconds": {"sampling": "1"}},
            )
        ),
    ],
)
def test_another_file_is_no_card(tmp_path, content):
    (tmp_path / "card.json").write_text(content)
    with pytest.raises(ValueError, match="not a card"):
        Card.read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no card\.json"):
        Card.read(tmp_path / "gone")


def test_two_cards_say_which_is_better_only_if_their_intervals_are_apart():
    near, far = Metric(2.2, 1.9, 2.6), Metric(4.0, 3.5, 4.5)
    assert verdict("fid", Metric(2.0, 1.5, 2.5), near) == "intervals overlap"
    assert verdict("fid", Metric(2.0, 1.5, 2.5), far) == "A is better"
    assert verdict("recall", Metric(0.2, 0.1, 0.3), Metric(0.6, 0.5, 0.7)) == "B is better"
    assert verdict("kid", Metric(0.004, spread=0.001), Metric(0.001, spread=0.001)) == ""
    assert verdict("novelty", Metric(1.0), Metric(0.5)) == "" == verdict("fid", None, near)


def test_a_comparison_lists_the_settings_that_differ_and_warns_of_other_features():
    text = compare(card(), card(settings={"scale": 3, "steps": 25}))
    assert "| scale | 1.5 | 3 |" in text and "steps" not in text and "do not compare" not in text
    fewer = {**card().data, "images": "5, samples"}
    assert "numbers of images differ" in compare(card(data={**fewer, "images": "9, samples"}), card(data=fewer))
    assert "do not compare" in compare(card(), card(data={"features": {"name": "inception"}, "real": "10, train"}))


def test_values_are_shown_in_the_units_of_their_metric():
    assert shown("recognized", Metric(0.957)) == "95.7 %" and shown("psnr", Metric(36.7)) == "36.70 dB"
    assert shown("rfid", Metric(6.9e-5)) == "6.9e-05" and shown("rfid", Metric(0.0131)) == "0.013"
    assert interval("copies", Metric(0.0, 1e-18, 0.009)) == "0.0 to 0.9"
