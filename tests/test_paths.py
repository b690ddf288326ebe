"""Paths and fingerprints."""

from pathlib import Path

from ldm.paths import expand_user, find_file, fingerprint, lines_of


def test_a_fingerprint_changes_with_the_content(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(bytes(3_000_000))
    before = fingerprint(file)
    file.write_bytes(bytes(2_999_999) + b"\x01")
    assert fingerprint(file) != before and len(before) == 16
    file.write_bytes(b"")
    assert len(fingerprint(file)) == 16


def test_the_tilde_of_an_unknown_user_is_part_of_a_name(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_user("~/a") == Path("/home/me/a") and expand_user("~no-such-user/a") == Path("~no-such-user/a")
    assert find_file("~no-such-user/a") == Path("~no-such-user/a")


def test_only_line_ends_end_a_line():
    assert lines_of("a\r\nb\rc\nd\u2028e\x85f\x0cg\n") == ["a", "b", "c", "d\u2028e\x85f\x0cg", ""]
