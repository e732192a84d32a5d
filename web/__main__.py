"""Chats with the characters of a data root: a page and an OpenAI-compatible API, or the terminal.

    python -m web --model_path model_weights/MMRole-Agent --data_root ../MMRole_dataset
    python -m web --terminal --character "Hermione Granger"

`bash scripts/chat.sh` starts it with the settings of the other scripts. The server is reachable from this machine only.
To listen elsewhere, set MMROLE_KEY, which clients then send as their API key and browsers ask for as a password.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data_utils.endpoint import checked_url
from data_utils.errors import MMRoleError, four_parts, raise_problems, run_main
from data_utils.flag_types import positive
from web.cast import Cast, read_cast
from web.chats import Limits

KEY_VARIABLE = "MMROLE_KEY"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m web", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_path", type=Path, help="a checkpoint or a LoRA adapter")
    parser.add_argument(
        "--endpoint", metavar="URL", help="an OpenAI-compatible endpoint instead of a checkpoint (…/v1)"
    )
    parser.add_argument("--model", help="the model's name at the endpoint")
    parser.add_argument("--data_root", type=Path, help="the data root with the characters")
    parser.add_argument("--save_to", type=Path, help="the data root into which chats are saved")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda:1, … (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, … (%(default)s)")
    parser.add_argument("--quantization", choices=["4bit", "8bit"], help="weights in bitsandbytes' 4 or 8 bits")
    parser.add_argument(
        "--max_new_tokens",
        type=positive,
        help=f"longest answer (default: the checkpoint's; clients of the API may ask for up to {Limits.new_tokens})",
    )
    parser.add_argument("--no_page", action="store_true", help="only the API; needs no gradio")
    parser.add_argument("--terminal", action="store_true", help="chat here instead of in a browser")
    parser.add_argument("--character", help="--terminal: the character to talk with")
    parser.add_argument("--partner", help="--terminal: the other character that you play")
    parser.add_argument("--image", type=Path, help="--terminal: the picture to talk about")
    options = parser.parse_args(arguments)
    raise_problems(_problems(options))
    cast = read_cast(options.data_root)
    if options.terminal:
        from web.terminal import check_terminal, talk

        check_terminal(options, cast)
        return talk(_service(options), cast, options, limits_of(options))
    return _serve(options, cast)


def _problems(options: argparse.Namespace) -> list[MMRoleError]:
    """Return the problems that show before anything is loaded."""
    problems = []
    if (options.model_path is None) == (options.endpoint is None):
        fix = "give --model_path, or --endpoint with --model"
        problems.append(
            MMRoleError("neither --model_path nor --endpoint, or both", None, "--model_path and --endpoint", fix)
        )
    idle = ["device", "dtype", "quantization"] if options.endpoint else ["model"]
    idle += [] if options.terminal else ["character", "partner", "image"]
    if given := [f"--{name}" for name in idle if getattr(options, name) not in (None, "auto")]:
        what = "flags without effect here"
        fix = "leave them out; --model is for --endpoint, --device for --model_path, --character for --terminal"
        problems.append(MMRoleError(what, ", ".join(given), "the command line or the settings", fix))
    if options.endpoint and not options.model:
        problems.append(MMRoleError("the endpoint's model is missing", None, "--model", "give the model's name there"))
    if options.endpoint:
        try:
            checked_url(options.endpoint)
        except MMRoleError as error:
            problems.append(error)
    if options.model_path is not None:
        from qwen_vl.checkpoint import checkpoint_problems

        problems += four_parts(checkpoint_problems(options.model_path))
    if options.data_root is not None and not options.data_root.is_dir():
        problems.append(MMRoleError("there is no such data root", options.data_root, "--data_root", "check the path"))
    if options.quantization and not find_spec("bitsandbytes"):
        what, fix = "--quantization needs a package that is not installed", "pip install bitsandbytes, or leave it out"
        problems.append(MMRoleError(what, "bitsandbytes", "--quantization", fix))
    if not 0 < options.port < 65536:
        problems.append(MMRoleError("not a port", options.port, "--port", "choose one from 1 to 65535"))
    elif not options.terminal and (reason := listen_problem(options.host, options.port)):
        where, fix = f"{options.host}:{options.port}", "choose another --port, or end the program that has it"
        problems.append(MMRoleError(f"the server cannot listen there: {reason}", where, "--host and --port", fix))
    if not is_loopback(options.host) and not os.environ.get(KEY_VARIABLE) and not options.terminal:
        fix = f"set {KEY_VARIABLE} to a long random text, or leave out --host"
        problems.append(MMRoleError("other machines could connect without a key", options.host, "--host", fix))
    return problems


def listen_problem(host: str, port: int) -> str | None:
    """Return why a server cannot have this address, before a model is loaded for it; or None."""
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[:1]:
            with socket.socket(family, kind) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _service(options: argparse.Namespace) -> Any:
    from web.service import EndpointService, EngineService

    if options.endpoint:
        return EndpointService(options.endpoint, options.model)
    import qwen_vl

    try:
        model, tokenizer = qwen_vl.load(
            options.model_path, dtype=options.dtype, device=options.device, quantization=options.quantization
        )
    except (ValueError, OSError, RuntimeError) as error:
        fix = "check the folder, --device and --dtype"
        raise MMRoleError(f"the checkpoint cannot be loaded: {error}", None, options.model_path, fix) from None
    return EngineService(model, tokenizer, options.model_path.resolve().name)


def _serve(options: argparse.Namespace, cast: Cast) -> int:
    try:
        import uvicorn
    except ModuleNotFoundError:
        raise _missing("uvicorn") from None
    from web.server import LOOPBACK, build_app

    limits = limits_of(options)
    hosts = frozenset({*LOOPBACK, options.host, *os.environ.get("MMROLE_HOSTS", "").split()})
    key = os.environ.get(KEY_VARIABLE) or None
    with tempfile.TemporaryDirectory(prefix="mmrole-chat-") as uploads:
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        service = _service(options)
        app = build_app(service, cast, hosts=hosts, key=key, limits=limits)
        if not options.no_page:
            try:
                from web.page import Page, mount_page
            except ModuleNotFoundError:
                raise _missing("gradio") from None
            app = mount_page(app, Page(service, cast, Path(uploads), options.save_to, limits))
        host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host  # noqa: S104
        address = f"http://{f'[{host}]' if ':' in host else host}:{options.port}"
        _tell(address, service.name, cast, page=not options.no_page, key=key is not None)
        try:
            uvicorn.run(app, host=options.host, port=options.port, log_level="warning", access_log=False)
        finally:
            service.close()
    return 0


def limits_of(options: argparse.Namespace) -> Limits:
    """Return the limits of a request."""
    most = options.max_new_tokens
    return Limits() if most is None else Limits(new_tokens=most, usual_tokens=most)


def _tell(address: str, name: str, cast: Cast, *, page: bool, key: bool) -> None:
    if page:
        print(f"The page: {address}/")
    characters = f", mmrole/<one of {len(cast.roles)} characters>" if cast.roles else ""
    print(f"The API:  {address}/v1 (models: {name}{characters})")
    model = f"mmrole/{next(iter(cast.roles))}" if cast.roles else name
    body = {"model": model, "messages": [{"role": "user", "content": "Who are you?"}]}
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    header = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if key else ""
    print(f"  curl {address}/v1/chat/completions{header} -H 'Content-Type: application/json' \\\n    -d {data}")
    print("Ctrl-C ends it.", flush=True)


def is_loopback(host: str) -> bool:
    """Return whether only programs of this machine can reach a server at this host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _missing(package: str) -> MMRoleError:
    fix = "bash scripts/chat.sh installs it (pip install '.[web]')"
    return MMRoleError("a package of the chat is missing", package, None, fix)


if __name__ == "__main__":
    sys.exit(run_main(main))
