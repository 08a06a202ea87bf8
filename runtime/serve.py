"""The command `runtime.serve`, which serves an exported .pte to OpenAI's clients and to a browser.

python -m runtime.serve llama.pte
python -m runtime.serve llama.pte --host 0.0.0.0 --port 8080 --api-key SECRET --sessions 8
"""

from runtime.cli import command

if __name__ == "__main__":
    command.start("runtime.serve")

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import InputError
from preproc.chat_template import NAMED, named
from preproc.jinja_template import from_file
from runtime.cli.flags import add_threads_flag
from runtime.cli.terminal import progress
from runtime.engine.program import Program
from runtime.serving.running import SESSIONS
from runtime.serving.scheduler import Scheduler
from runtime.serving.served_model import Access, Model

if TYPE_CHECKING:
    import uvicorn

LIBRARIES = ("pydantic", "starlette", "uvicorn")

KEY_VARIABLE = "LLAMA_PTE_API_KEY"

GRACE = 5
"""Seconds that the server waits at shutdown for clients to receive the end of their answers."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command: serves until SIGINT or SIGTERM ends it.

    Returns:
        exit code 0, also after a signal; for bad input the command ends with 2.
    """
    options = _parser().parse_args(arguments)
    if missing := [name for name in LIBRARIES if find_spec(name) is None]:
        raise InputError(f"serving needs {', '.join(missing)}, not installed here; run: pip install 'llama-pte[serve]'")
    if options.api_key == "":
        raise InputError("--api-key '' is invalid; give at least one character, or leave it out")
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns if a client disconnects during its answer
    with progress(f"load {options.file}"):
        model = open_model(options.file, options.chat_template, options.threads)
    scheduler = Scheduler(model.program, options.sessions, options.max_queue)
    try:
        listener = _listener(options.host, options.port)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)  # because uvicorn raises them again when it has ended
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(f"serving {model.name} at http://{host}:{listener.getsockname()[1]}; Ctrl-C ends", file=sys.stderr)
        access = Access(options.api_key, options.max_body, options.cors_origin)
        create_server(model, scheduler, access).run([listener])
    finally:
        scheduler.close()
    return 0


def open_model(file: Path, template: str | None = None, threads: int | None = None) -> Model:
    """Opens a file to be served under its own name.

    Args:
        template: the name of a chat template to use instead of the file's own.

    Raises:
        InputError: the file cannot be run or has no tokenizer, or the template does not match the tokenizer.
    """
    program = Program(file, threads=threads)
    tokenizer = program.tokenizer
    if tokenizer is None:
        raise InputError(f"{file} has no tokenizer, which the server needs; export it again with --tokenizer")
    chosen = from_file(program.metadata.chat_template)
    if template is not None:
        chosen = named(template, tokenizer)
    return Model(file.stem, int(file.stat().st_mtime), program, tokenizer, chosen)


def create_server(model: Model, scheduler: Scheduler, access: Access) -> "uvicorn.Server":
    """Returns a server that closes the scheduler when it ends."""
    import uvicorn

    from runtime.serving.http_app import create_app

    class Server(uvicorn.Server):
        """A server that ends the answers first, because it would wait for them otherwise."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await asyncio.to_thread(scheduler.close)
            await super().shutdown(sockets)

    app = create_app(model, scheduler, access)
    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", log_level="warning", timeout_graceful_shutdown=GRACE
    )
    return Server(config)


def _listener(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at an address.

    Raises:
        InputError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--host {host} --port {port} is not available ({error}); give another address or port"
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("runtime.serve", "Serves a .pte file over OpenAI's HTTP API.", __doc__)
    add = parser.add_argument
    add("file", type=Path, help=".pte file, or folder of shards or slices")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default: %(default)s)")
    add("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: %(default)s)")
    add(
        "--api-key",
        metavar="KEY",
        default=os.environ.get(KEY_VARIABLE) or None,
        help=f"key that clients must send (default: ${KEY_VARIABLE}, or no key)",
    )
    add("--chat-template", metavar="NAME", help=f"chat template: {', '.join(NAMED)} (default: the file's)")
    add(
        "--sessions",
        type=int,
        metavar="N",
        help="number of texts that are kept and answered at the same time (default: the file's --batch-size, or "
        f"{SESSIONS} in turns)",
    )
    add(
        "--max-queue",
        type=_count,
        default=64,
        metavar="N",
        help="maximum number of waiting requests (default: %(default)s)",
    )
    add(
        "--max-body",
        type=_count,
        default=1 << 20,
        metavar="BYTES",
        help="maximum size of a request (default: %(default)s)",
    )
    add(
        "--cors-origin",
        metavar="ORIGIN",
        action="append",
        default=[],
        help="origin such as https://example.com whose pages may use the server, or '*' for all; repeatable (default: "
        "only this machine's)",
    )
    add_threads_flag(parser)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is invalid; give a whole number, 0 or more")
    return int(text)
