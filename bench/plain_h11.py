"""A plain asyncio proxy, as one writes it with h11 and streams: `bench.plain_h11 PORT HOST`.

A request is allowed by one compiled pattern and sent on through h11, answers likewise; one
connection to the server for each client. What `l7proxy` is measured against, not a part of it.
"""

import asyncio
import re
import sys

import h11

_ALLOWED = re.compile(rb"/public/.*")
_DENIED = b"Access denied\r\n"
_PORT = 80


async def _event(codec: h11.Connection, reader: asyncio.StreamReader) -> h11.Event:
    while (event := codec.next_event()) is h11.NEED_DATA:
        codec.receive_data(await reader.read(65536))
    assert isinstance(event, h11.Event)  # wrk and we pipeline nothing, so never PAUSED
    return event


async def _pass(
    first: h11.Event,
    source: tuple[h11.Connection, asyncio.StreamReader],
    sink: tuple[h11.Connection, asyncio.StreamWriter],
) -> None:
    """Copy one message from its head to its end."""
    event = first
    while True:
        sink[1].write(sink[0].send(event) or b"")
        if isinstance(event, h11.EndOfMessage):
            await sink[1].drain()
            return
        event = await _event(*source)


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
    client = h11.Connection(h11.SERVER)
    server = h11.Connection(h11.CLIENT)
    there: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    try:
        while isinstance(request := await _event(client, reader), h11.Request):
            if request.method != b"GET" or not _ALLOWED.fullmatch(request.target):
                while not isinstance(await _event(client, reader), h11.EndOfMessage):
                    pass
                length = [("Content-Length", str(len(_DENIED)))]
                for event in (
                    h11.Response(status_code=403, headers=length),
                    h11.Data(data=_DENIED),
                    h11.EndOfMessage(),
                ):
                    writer.write(client.send(event) or b"")
                await writer.drain()
                client.start_next_cycle()
                continue
            if there is None:
                there = await asyncio.open_connection(host, _PORT)
            await _pass(request, (client, reader), (server, there[1]))
            await _pass(await _event(server, there[0]), (server, there[0]), (client, writer))
            client.start_next_cycle()
            server.start_next_cycle()
    except (h11.ProtocolError, ConnectionError):
        pass
    finally:
        writer.close()
        if there is not None:
            there[1].close()


async def _main(port: int, host: str) -> None:
    server = await asyncio.start_server(lambda r, w: _serve(r, w, host), "0.0.0.0", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), sys.argv[2]))
