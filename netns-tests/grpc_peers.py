"""A gRPC server and a client, as processes: `grpc_peers.py server|client ADDRESS PORT [FILES]`.

FILES make them speak TLS: of the server a folder with tls.crt and tls.key, of the client the
certificates that it trusts; it expects the server `NAME`.

Messages are bytes as they are, so that no compiler is needed. The client prints one JSON object:
what each call gave, or its status code.
"""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

NAME = "api.example"
SERVICE = "demo.Echo"
CHUNK = b"x" * 16_384
STREAM_COUNT = 64
"""Messages of a long stream: 1 MiB, more than any window."""


def unary(request, context):
    context.set_trailing_metadata((("x-trailer", "kept"),))
    return b"echo " + request


def fails(request, context):
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not today: 100%")


def counts(request, context):
    for _ in range(int(request)):
        yield CHUNK


def sums(requests, context):
    return str(sum(len(request) for request in requests)).encode()


def both(requests, context):
    for request in requests:
        yield b"echo " + request


def serve(address: str, port: int, folder: str = "") -> None:
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Forbidden": grpc.unary_unary_rpc_method_handler(unary),
        "Fails": grpc.unary_unary_rpc_method_handler(fails),
        "Counts": grpc.unary_stream_rpc_method_handler(counts),
        "Sums": grpc.stream_unary_rpc_method_handler(sums),
        "Both": grpc.stream_stream_rpc_method_handler(both),
    }
    with ThreadPoolExecutor(16) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        if folder:
            key, chain = ((Path(folder) / name).read_bytes() for name in ("tls.key", "tls.crt"))
            credentials = grpc.ssl_server_credentials([(key, chain)])
            server.add_secure_port(f"{address}:{port}", credentials)
        else:
            server.add_insecure_port(f"{address}:{port}")
        server.start()
        print("serving", flush=True)
        server.wait_for_termination()


def outcome(call):
    """What a call gave: text, or its status and message."""
    try:
        return call()
    except grpc.RpcError as error:
        return [error.code().name, error.details()]


def turns(channel) -> list[str]:
    """Both sides speak in turn: each request is sent after the answer to the one before."""
    answered = threading.Semaphore(1)

    def requests():
        for number in range(5):
            assert answered.acquire(timeout=30)
            yield b"%d" % number

    seen = []
    for answer in channel.stream_stream(f"/{SERVICE}/Both")(requests(), timeout=60):
        seen.append(answer.decode())
        answered.release()
    return seen


def trailing(channel) -> list[str]:
    answer, call = channel.unary_unary(f"/{SERVICE}/Unary").with_call(b"hi", timeout=60)
    return [answer.decode(), dict(call.trailing_metadata())["x-trailer"]]


def many(channel) -> int:
    """Calls at the same time on one connection."""
    stub = channel.unary_unary(f"/{SERVICE}/Unary")
    calls = [stub.future(b"%d" % number, timeout=60) for number in range(80)]
    return sum(call.result() == b"echo %d" % number for number, call in enumerate(calls))


def opened(address: str, port: int, trusted: str) -> grpc.Channel:
    options = [("grpc.enable_http_proxy", 0)]
    if not trusted:
        return grpc.insecure_channel(f"{address}:{port}", options)
    options += [("grpc.ssl_target_name_override", NAME), ("grpc.default_authority", NAME)]
    credentials = grpc.ssl_channel_credentials(Path(trusted).read_bytes())
    return grpc.secure_channel(f"{address}:{port}", credentials, options)


def talk(address: str, port: int, trusted: str = "") -> None:
    with opened(address, port, trusted) as channel:
        short = {"timeout": 20}

        def unary_call(method):
            return channel.unary_unary(f"/{SERVICE}/{method}")(b"hi", **short).decode()

        def count():
            stream = channel.unary_stream(f"/{SERVICE}/Counts")(b"%d" % STREAM_COUNT, **short)
            return sum(map(len, stream))

        def total():
            stub = channel.stream_unary(f"/{SERVICE}/Sums")
            return int(stub(iter([CHUNK] * STREAM_COUNT), **short))

        seen = {
            "unary": outcome(lambda: unary_call("Unary")),
            "forbidden": outcome(lambda: unary_call("Forbidden")),
            "after": outcome(lambda: unary_call("Unary")),
            "fails": outcome(lambda: unary_call("Fails")),
            "trailing": outcome(lambda: trailing(channel)),
            "turns": outcome(lambda: turns(channel)),
            "counts": outcome(count),
            "sums": outcome(total),
            "many": outcome(lambda: many(channel)),
        }
    print(json.dumps(seen))


if __name__ == "__main__":
    {"server": serve, "client": talk}[sys.argv[1]](sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
