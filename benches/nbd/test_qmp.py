"""The QMP client against a made-up daemon."""

import os
import socket
import sys
import tempfile
import threading
import unittest
from collections.abc import Iterator
from contextlib import contextmanager

sys.path.append(os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "common"))

from qmp import Qmp, QmpFailed, seconds_of

_GREETING = b'{"QMP": {}}\r\n'
_DONE = b'{"return": {}}\n'
_EVENT = b'{"event": "ENDED", "timestamp": {"seconds": 7, "microseconds": 250000}}\n'


@contextmanager
def daemon(*answers: bytes) -> Iterator[Qmp]:
    """A client of a daemon that greets, agrees, answers one command with each of the answers, and hangs up."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        path = os.path.join(directory, "q")
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as requests:
                connection.sendall(_GREETING)
                for answer in (_DONE, *answers):
                    requests.readline()
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        client = Qmp(path, timeout=5)
        try:
            yield client
        finally:
            client.close()
            thread.join()


class Client(unittest.TestCase):
    """`Qmp`."""

    def test_events_wait_until_they_are_asked_for(self) -> None:
        other = _EVENT.replace(b"ENDED", b"OTHER")
        with daemon(other + _EVENT + b'{"return": 1}\n') as client:
            self.assertEqual(client.command("go"), 1)
            self.assertEqual(seconds_of(client.wait_for("ENDED", 5)), 7.25)

    def test_an_event_that_comes_later(self) -> None:
        with daemon(_DONE + _EVENT[:9], _EVENT[9:]) as client:
            client.command("go")
            # The made-up daemon sends the rest with its next answer.
            client._socket.sendall(b"\n")
            self.assertEqual(client.wait_for("ENDED", 5)["event"], "ENDED")

    def test_refusals_and_the_end(self) -> None:
        with daemon(b'{"error": {"class": "GenericError", "desc": "no such thing"}}\n') as client:
            with self.assertRaisesRegex(QmpFailed, "go: no such thing"):
                client.command("go")
            with self.assertRaises(QmpFailed):
                client.wait_for("ENDED", 5)

    def test_patience_ends(self) -> None:
        with daemon(_DONE, b"") as client:
            client.command("go")
            with self.assertRaisesRegex(QmpFailed, "no answer in time"):
                client.wait_for("ENDED", 0.05)
            client._socket.sendall(b"\n")


if __name__ == "__main__":
    unittest.main()
