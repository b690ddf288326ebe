"""Paths and fingerprints."""

from ldm.paths import fingerprint


def test_a_fingerprint_changes_with_the_content(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(bytes(3_000_000))
    before = fingerprint(file)
    file.write_bytes(bytes(2_999_999) + b"\x01")
    assert fingerprint(file) != before and len(before) == 16
    file.write_bytes(b"")
    assert len(fingerprint(file)) == 16
