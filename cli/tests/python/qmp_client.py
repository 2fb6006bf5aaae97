"""A client of the daemon as people write them, with the package qemu.qmp.

Usage: qmp_client.py SOCKET DISK TARGET

SOCKET is the daemon's for QMP, DISK the name of a disk that it has, TARGET a file of the disk's length. Ends with 0 if all
that the daemon said is as it should be.
"""

import asyncio
import contextlib
import sys
from typing import Any

from qemu.qmp import EventListener, ExecuteError, QMPClient

_PATIENCE_SECONDS = 60


def _states(events: list[dict[str, Any]]) -> list[str]:
    """What a job went through, a word for each event, without pauses."""
    words = [
        event["data"]["status"] if event["event"] == "JOB_STATUS_CHANGE" else event["event"]
        for event in events
    ]
    return [word for word in words if word != "paused"]


async def _until(listener: EventListener, last: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    async for event in listener:
        assert event["timestamp"]["seconds"] > 0, event
        events.append(dict(event))
        if _states(events)[-1:] == [last]:
            break
    return events


async def _refused(client: QMPClient, command: str, arguments: dict[str, Any], *expected: str) -> None:
    try:
        result = await client.execute(command, arguments)
    except ExecuteError as error:
        found = (error.error.error.class_, error.error.error.desc)
        assert found == expected, f"{command}: {found}, not {expected}"
    else:
        raise AssertionError(f"{command} was not refused: {result}")


async def _refusals(client: QMPClient) -> None:
    await _refused(client, "no-such", {}, "CommandNotFound", "The command no-such has not been found")
    await _refused(client, "job-pause", {"id": "j"}, "GenericError", "Job not found")
    await _refused(
        client, "block-job-pause", {"device": "j"}, "DeviceNotActive", "Block job 'j' not found"
    )
    await _refused(
        client, "job-pause", {}, "GenericError", "Parameter 'id' is missing"
    )


async def _backup(client: QMPClient, disk: str, target: str) -> None:
    node = {"driver": "raw", "node-name": "t", "file": {"driver": "file", "filename": target}}
    assert await client.execute("blockdev-add", node) == {}
    arguments = {"job-id": "j", "device": disk, "target": "t", "sync": "full"}
    with client.listener() as listener:
        assert await client.execute("blockdev-backup", {**arguments, "speed": 65536}) == {}
        jobs = await client.execute("query-jobs")
        assert [job["id"] for job in jobs] == ["j"], jobs
        busy = "Node 't' is busy: block device is in use by block job: backup"
        await _refused(client, "blockdev-backup", arguments, "GenericError", busy)
        await client.execute("block-job-set-speed", {"device": "j", "speed": 0})
        events = await _until(listener, "null")
    expected = ["created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
    assert _states(events) == expected, events
    completed = next(event["data"] for event in events if event["event"] == "BLOCK_JOB_COMPLETED")
    assert completed["offset"] == completed["len"] and "error" not in completed, completed
    assert await client.execute("query-jobs") == []


async def _session(socket: str, disk: str, target: str) -> None:
    client = QMPClient("test")
    await client.connect(socket)
    version = await client.execute("query-version")
    assert version["qemu"] == client.greeting.QMP.version["qemu"], version
    await _refusals(client)
    # Replies find their commands, whoever waits for which first.
    names = await asyncio.gather(*(client.execute("query-named-block-nodes") for _ in range(20)))
    assert all(found == names[0] for found in names)
    await _backup(client, disk, target)
    with client.listener() as listener:
        arguments = {"job-id": "k", "device": disk, "target": "t", "sync": "none"}
        await client.execute("blockdev-backup", arguments)
        assert await client.execute("quit") == {}
        assert "BLOCK_JOB_CANCELLED" in _states(await _until(listener, "null"))
    # The daemon may have hung up by now, as it was told to.
    with contextlib.suppress(EOFError):
        await client.disconnect()


async def _main() -> None:
    await asyncio.wait_for(_session(*sys.argv[1:]), _PATIENCE_SECONDS)


asyncio.run(_main())
