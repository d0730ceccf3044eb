"""Code that a model wrote runs, and can do no harm."""

import os
import socket

import pytest

from reprotune.evaluation import sandbox
from tests.evaluation.known import no_sandbox

pytestmark = pytest.mark.skipif(no_sandbox() != "", reason=no_sandbox() or "there is one")


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("print(1)", True),
        ("open('/tmp/x', 'w').write('a')", True),
        ("assert False", False),
        ("import socket; socket.create_connection(('127.0.0.1', PORT), 2)", False),
        ("import sys; open(sys.prefix + '/x', 'w')", False),
        ("import os; assert os.listdir(HOME)", False),
        ("import os; assert 'PATH' in os.environ", False),
        ("import os; os.kill(PID, 0)", False),
        ("while True: pass", False),
        ("x = bytearray(4 * 2**30)", False),
        ("open('/tmp/x', 'wb').write(b'0' * 2**25)", False),
        ("for number in range(9): open(f'/tmp/{number}', 'wb').write(b'0' * 2**23)", False),
        ("for number in range(9): open(f'/dev/shm/{number}', 'wb').write(b'0' * 2**23)", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
    ],
)
def test_code_can_do_no_harm(program, passes, tmp_path, monkeypatch):
    (tmp_path / "secret").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sandbox, "SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = program.replace("PORT", str(server.getsockname()[1]))
        program = program.replace("PID", str(os.getpid())).replace("HOME", repr(str(tmp_path)))
        assert sandbox.passes(program) is passes
