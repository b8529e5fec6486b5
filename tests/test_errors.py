"""Errors of commands are one sentence on stderr."""

from pathlib import Path

import pytest

from paddlemix.errors import UserError, command_main


def ended(capsys, main):
    with pytest.raises(SystemExit) as caught:
        command_main(main)()
    return caught.value.code, capsys.readouterr().err


def test_what_the_system_refuses_is_one_sentence(tmp_path, capsys):
    code, error = ended(capsys, lambda: (tmp_path / "none/file").write_text("x"))
    assert (code, error) == (1, f"error: {tmp_path}/none/file cannot be used (No such file or directory): check the path\n")
    code, error = ended(capsys, lambda: Path("/dev/full").write_text("x"))
    assert code == 1 and "disk is full" in error and error.count("\n") == 1


def test_faults_of_the_program_keep_their_traceback():
    for fault in (OSError("no path, no cause"), ValueError("not the user's")):
        with pytest.raises(type(fault)):
            command_main(lambda fault=fault: raise_(fault))()


def test_interruptions_and_user_errors_have_codes(capsys):
    assert ended(capsys, lambda: raise_(UserError("file x: wrong"))) == (1, "error: file x: wrong\n")
    assert ended(capsys, lambda: raise_(KeyboardInterrupt())) == (130, "interrupted\n")


def raise_(error):
    raise error
