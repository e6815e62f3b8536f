"""A WebSocket through the proxy, with aiohttp at both ends."""

import sys

import pytest
from test_l7proxy_transparent import World

pytestmark = pytest.mark.needs("tproxy", "tproxy6", "socket", "socket6", "ipv6")

SERVER = """
from aiohttp import web
async def echo(request):
    socket = web.WebSocketResponse(max_msg_size=0)
    await socket.prepare(request)
    async for message in socket:
        await socket.send_bytes(message.data[::-1])
    return socket
app = web.Application()
app.add_routes([web.get("/public/ws", echo), web.get("/admin", echo)])
web.run_app(app, port=80, print=lambda *_: print("serving", flush=True))
"""

CLIENT = """
import asyncio, sys, aiohttp
async def main(server):
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(f"http://{server}/public/ws", max_msg_size=0) as socket:
            for size in (1, 1000, 1 << 20):
                data = bytes(range(256)) * (size // 256 + 1)
                await socket.send_bytes(data)
                assert (await socket.receive_bytes(timeout=30)) == data[::-1]
        try:
            await session.ws_connect(f"http://{server}/admin")
        except aiohttp.WSServerHandshakeError as error:
            print("denied", error.status)
asyncio.run(main(sys.argv[1]))
"""


def test_websocket_carries_messages_both_ways_where_a_rule_allows_it(lab, tmp_path):
    world = World(lab, tmp_path)
    server = world.server.popen([sys.executable, "-c", SERVER])
    try:
        assert "serving" in str(server.stdout.readline())
        with world.live:
            done = world.client.run([sys.executable, "-c", CLIENT, world.server.address4])
            assert done.returncode == 0, done.stdout + done.stderr + world.live.log()
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    assert done.stdout.strip() == "denied 403"
    assert '"GET /public/ws HTTP/1.1" 101 - ' in world.live.access_log.read_text(encoding="ascii")
