"""Who is compared: a server, and for backups the options which they are started with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from servers import EngineServer, NbdkitServer, QemuServer, Server
from units import KIB

ENGINE = "engine"
_ENGINE_LIMITED = "engine-limit"

# What people set who want more of a backup than the defaults give.
_MANY_SMALL = {"x-perf": {"max-workers": 64, "max-chunk": 64 * KIB}}


@dataclass(frozen=True)
class Peer:
    """One competitor. `rival` names ours, to which it is compared."""

    name: str
    program: str
    serve: Callable[[str, str], Server]
    rival: str
    # The part that it takes: an idle disk differs by program only, and nbdkit makes no backups.
    idle: bool = False
    backs_up: bool = False
    backup_options: Mapping[str, object] | None = None
    is_limited: bool = False


NAMES = [ENGINE, "qemu", "qemu-64", _ENGINE_LIMITED, "qemu-limit", "nbdkit"]


def all_peers(binary: str, qemu_aio: str) -> list[Peer]:
    """Everybody in `NAMES`."""
    engine = partial(EngineServer, binary)
    qemu = partial(QemuServer, qemu_aio)
    program = QemuServer.program
    return [
        Peer(ENGINE, binary, engine, ENGINE, idle=True, backs_up=True),
        Peer("qemu", program, qemu, ENGINE, idle=True, backs_up=True),
        Peer("qemu-64", program, qemu, ENGINE, backs_up=True, backup_options=_MANY_SMALL),
        Peer(_ENGINE_LIMITED, binary, engine, _ENGINE_LIMITED, backs_up=True, is_limited=True),
        Peer("qemu-limit", program, qemu, _ENGINE_LIMITED, backs_up=True, is_limited=True),
        Peer("nbdkit", NbdkitServer.program, NbdkitServer, ENGINE, idle=True),
    ]
