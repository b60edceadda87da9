"""The access file: who has which role, read again when it changes, private or refused."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from controller.access import AccessFile, hash_of, issue_token
from controller.roles import Role
from engine.errors import InvalidRequestError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "access"


def test_a_token_is_made_printed_and_known_by_its_hash_alone(path: Path) -> None:
    token = issue_token(path, "alice", "operate")
    assert token not in path.read_text()
    assert path.read_text() == f"alice operate sha256:{hash_of(token)}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    right = AccessFile(path).find(token, ())
    assert right is not None
    assert (right.name, right.role) == ("alice", Role.OPERATE)
    assert len(token) >= 43  # 32 bytes of randomness


def test_other_tokens_are_nobodys(path: Path) -> None:
    token = issue_token(path, "alice", "read")
    access = AccessFile(path)
    for wrong in ("", token[:-1], token + "x", token.swapcase(), hash_of(token), "ünïcode\udcff"):
        assert access.find(wrong, ()) is None
    assert access.find(None, ()) is None
    assert access.find(None, ("alice",)) is None


def test_a_certificate_has_a_role_by_name_unless_a_token_is_given(path: Path) -> None:
    token = issue_token(path, "alice", "read")
    path.write_text(path.read_text() + "# a comment\n\nprobe operate certificate:probe.example\n")
    access = AccessFile(path)
    found = access.find(None, ("x", "probe.example"))
    assert found is not None
    assert (found.name, found.role) == ("probe", Role.OPERATE)
    right = access.find(token, ("probe.example",))
    assert right is not None
    assert right.name == "alice"
    assert access.find("wrong", ("probe.example",)) is None


def test_it_is_read_again_when_it_changes(path: Path) -> None:
    first = issue_token(path, "alice", "read")
    access = AccessFile(path)
    second = issue_token(path, "alice", "admin")  # while the old one is replaced, both count
    assert access.find(first, ())
    assert access.find(second, ())
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert access.find(first, ()) is None
    found = access.find(second, ())
    assert found is not None
    assert found.role is Role.ADMIN


@pytest.mark.parametrize("spoil", ["garbage", "mode", "binary"])
def test_what_cannot_be_read_leaves_the_last_good_rights(
    path: Path, spoil: str, caplog: pytest.LogCaptureFixture
) -> None:
    token = issue_token(path, "alice", "read")
    access = AccessFile(path)
    if spoil == "mode":
        os.chmod(path, 0o644)
    else:
        path.write_bytes(b"mallory admin oops-a-secret" if spoil == "garbage" else b"\xff\xfe")
    with caplog.at_level(logging.ERROR):
        assert access.find(token, ())
    assert "stay in force" in caplog.text
    assert "oops-a-secret" not in caplog.text
    assert access.num_failed_reloads == 1


def test_a_file_that_is_gone_leaves_nobody_any_right(path: Path) -> None:
    token = issue_token(path, "alice", "admin")
    access = AccessFile(path)
    path.unlink()
    assert access.find(token, ()) is None
    issue_token(path, "bob", "read")
    assert access.find(token, ()) is None


@pytest.mark.parametrize(
    "line",
    [
        "alice operate",
        "alice boss sha256:" + "0" * 64,
        "alice anyone sha256:" + "0" * 64,
        "alice read sha256:" + "0" * 63,
        "alice read sha256:" + "G" * 64,
        "alice read md5:" + "0" * 64,
        "alice read certificate:",
        "al/ice read sha256:" + "0" * 64,
    ],
)
def test_a_wrong_line_is_named_by_its_number(path: Path, line: str) -> None:
    path.touch(0o600)
    path.write_text(f"# rights\n{line}\n")
    with pytest.raises(InvalidRequestError, match="line 2 of the access file"):
        AccessFile(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_file_that_others_may_touch_is_refused_at_the_start(path: Path, mode: int) -> None:
    issue_token(path, "alice", "read")
    os.chmod(path, mode)
    with pytest.raises(InvalidRequestError, match="chmod 600"):
        AccessFile(path)
    with pytest.raises(InvalidRequestError, match="chmod 600"):
        issue_token(path, "bob", "read")


def test_no_file_and_no_name_are_refused(path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="--access"):
        AccessFile(path)
    with pytest.raises(InvalidRequestError, match="is no right"):
        issue_token(path, "alice\nroot admin", "read")
    assert not path.exists()
