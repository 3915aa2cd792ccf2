"""Dockerfile, compose file, proxy, Prometheus and Grafana: they agree with each other and with the server.

The proxy runs if nginx is installed. The steps of the Dockerfile install the package from the index, which
takes minutes, and run in the nightly tests only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import yaml

from tests.support.scripts import ROOT
from tests.support.servers import Running, tiny_converted
from tnnlm.cli import serve
from tnnlm.serving.metrics import Metrics
from tnnlm.serving.settings import Limits

DEPLOY = ROOT / "deploy"
SERVERS = ("server-1", "server-2")


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile with their arguments."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined]


def argument_of(name: str) -> str:
    (found,) = [argument for instruction, argument in instructions() if instruction == name]
    return found


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8")))


def copies() -> list[tuple[list[str], str]]:
    """Return the sources and the target of every COPY of the Dockerfile."""
    words = [argument.split() for instruction, argument in instructions() if instruction == "COPY"]
    return [(given[:-1], given[-1]) for given in words]


def test_image_copies_what_exists_and_the_build_needs() -> None:
    copied = {source for sources, _ in copies() for source in sources}
    assert all((ROOT / source).exists() for source in copied)
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    assert {line[1:] for line in allowed if line.startswith("!")} == copied
    built = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "tnnlm", "configs", "constraints.txt"}
    assert copied == {name for name in built if (ROOT / name).exists()}


def test_image_is_pinned_and_runs_as_a_user_without_secrets() -> None:
    image = argument_of("FROM")
    name, _, tag = image.partition(":")
    assert (name, tag.split("-")[0]) == ("python", "3.13")
    order = [instruction for instruction, _ in instructions()]
    assert argument_of("USER") not in ("root", "0")
    assert order.index("USER") > max(i for i, name in enumerate(order) if name in ("RUN", "COPY"))
    installs = [argument for name, argument in instructions() if name == "RUN" and "pip install" in argument]
    assert all("-c constraints.txt" in argument for argument in installs)
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert not re.search(r"^(ARG|ENV).*(KEY|TOKEN|SECRET|PASSWORD)", text, re.MULTILINE)
    for service in compose()["services"].values():
        assert re.fullmatch(r"tnnlm|[\w./-]+:v?\d[\w.-]*", service["image"])


def test_command_of_the_image_and_of_the_services_is_valid() -> None:
    entry, default = json.loads(argument_of("ENTRYPOINT")), json.loads(argument_of("CMD"))
    assert entry[:2] == ["tnnlm", "serve"]
    args = serve.parse([*entry[2:], *default])
    assert (args.host, str(args.port), args.model) == ("0.0.0.0", argument_of("EXPOSE"), "/model")
    for name in SERVERS:
        service = compose()["services"][name]
        args = serve.parse([*entry[2:], *service["command"]])
        assert any(volume.endswith(f":{args.model}:ro") for volume in service["volumes"])


def test_health_check_asks_the_server(server: Running) -> None:
    _, _, command = argument_of("HEALTHCHECK").partition("CMD ")
    words = json.loads(command)
    assert words[0] == "python"
    code = words[2].replace("http://127.0.0.1:8000", server.url)
    assert code != words[2]
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as unused:
        port = unused.getsockname()[1]
    code = words[2].replace(":8000", f":{port}")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300).returncode


def test_files_and_names_of_the_services_agree() -> None:
    services = compose()["services"]
    assert {name for name in services if services[name]["image"] == "tnnlm"} == set(SERVERS)
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).is_file(), source
    proxy = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    addresses = [f"{name}:8000" for name in SERVERS]
    assert re.findall(r"^ +server ([\w-]+:\d+)", proxy, re.MULTILINE) == addresses
    scrape = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert scrape[0]["static_configs"][0]["targets"] == addresses
    assert scrape[0]["authorization"]["credentials_file"] == "/run/secrets/api_key"
    assert compose()["secrets"]["api_key"]["environment"] == serve.KEY
    assert services["proxy"]["ports"][0].endswith(f":{re.findall('listen (.*);', proxy)[0]}")


def test_limits_of_the_proxy_are_at_least_those_of_the_server() -> None:
    proxy = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    (size,) = re.findall(r"client_max_body_size (\d+)m;", proxy)
    assert int(size) << 20 >= Limits().max_body_bytes
    (seconds,) = re.findall(r"proxy_read_timeout (\d+)s;", proxy)
    assert int(seconds) > Limits().timeout
    assert "proxy_buffering off;" in proxy
    assert int(compose()["services"]["server-1"]["stop_grace_period"].rstrip("s")) > serve.GRACE


def test_board_shows_metrics_of_the_server() -> None:
    exported = set()
    for family in Metrics().registry.collect():
        endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        exported |= {family.name + ending for ending in endings}
    board = json.loads((DEPLOY / "grafana/tnnlm.json").read_text(encoding="utf-8"))
    shown = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\btnnlm_\w+", target["expr"])
    }
    assert shown <= exported
    families = {name for name in exported if not name.endswith(("_sum", "_count"))}
    assert shown == families, "the board shows every metric"
    sources = yaml.safe_load((DEPLOY / "grafana/datasources.yaml").read_text(encoding="utf-8"))
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {sources["datasources"][0]["uid"]}


@contextlib.contextmanager
def named_server(name: str) -> Iterator[int]:
    """Run a server that answers with its name, and return its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(name)))
            self.end_headers()
            self.wfile.write(name.encode())

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def proxy(folder: Path, ports: dict[str, int]) -> Iterator[str]:
    """Run the proxy in front of servers on these ports."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        own = free.getsockname()[1]
    text = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    for name, port in ports.items():
        text = text.replace(f"{name}:8000", f"127.0.0.1:{port}")
    text = text.replace("listen 8080;", f"listen 127.0.0.1:{own};").replace("/tmp/nginx.pid", f"{folder}/pid")
    paths = "".join(
        f"  {kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = text.replace("http {\n", "http {\n" + paths).replace("worker_processes auto", "worker_processes 1")
    (folder / "nginx.conf").write_text(f"daemon off;\n{text}", encoding="utf-8")
    words = ["nginx", "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    try:
        for _ in range(3000):
            assert process.poll() is None, process.communicate()[1]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", own), 1):
                break
            time.sleep(0.01)
        yield f"http://127.0.0.1:{own}"
    finally:
        process.terminate()
        process.communicate()


def answer_of(url: str, conversation: str) -> str:
    headers = {"Content-Type": "application/json", "X-Conversation": conversation}
    with urlopen(Request(f"{url}/v1/chat/completions", b"{}", headers), timeout=60) as answer:
        return str(answer.read().decode())


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_proxy_keeps_a_conversation_on_one_server_and_survives_its_end(tmp_path: Path) -> None:
    talks = [f"talk-{i}" for i in range(24)]
    with contextlib.ExitStack() as stack:
        second = stack.enter_context(named_server("server-2"))
        with named_server("server-1") as first:
            url = stack.enter_context(proxy(tmp_path, {"server-1": first, "server-2": second}))
            before = {talk: answer_of(url, talk) for talk in talks}
            assert set(before.values()) == set(SERVERS), "both servers have conversations"
            assert {talk: answer_of(url, talk) for talk in reversed(talks)} == before
        after = {talk: answer_of(url, talk) for talk in talks}
        assert set(after.values()) == {"server-2"}, "the other one answers, and reads again"


@pytest.mark.skipif(not os.environ.get("TNNLM_NIGHTLY"), reason="installs from the index; make nightly")
def test_steps_of_the_image_install_a_server_in_an_empty_environment(tmp_path: Path) -> None:
    place, environment = tmp_path / "image", tmp_path / "environment"
    place.mkdir()
    for sources, target in copies():
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, place / target)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "PIP_EXTRA_INDEX_URL": os.environ.get("PIP_EXTRA_INDEX_URL", "")}
    variables.pop("PYTHONPATH", None)
    for name, argument in instructions():
        if name == "RUN" and not argument.startswith("useradd"):  # a user of this machine is not needed
            subprocess.run(["sh", "-ec", argument], cwd=place, env=variables, check=True)
    model = tiny_converted(tmp_path / "model")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = str(free.getsockname()[1])
    words = [*json.loads(argument_of("ENTRYPOINT")), "--model", str(model), "--port", port]
    words[0] = str(environment / "bin" / words[0])
    words[words.index("0.0.0.0")] = "127.0.0.1"
    with subprocess.Popen(words, cwd=tmp_path, env=variables) as process:
        try:
            _, _, command = argument_of("HEALTHCHECK").partition("CMD ")
            code = json.loads(command)[2].replace(":8000", f":{port}")
            check = [str(environment / "bin" / "python"), "-c", code]
            for _ in range(600):
                assert process.poll() is None
                if not subprocess.run(check, capture_output=True, env=variables).returncode:
                    break
                time.sleep(0.2)
            body = json.dumps({"prompt": "the ", "max_tokens": 4}).encode()
            headers = {"Content-Type": "application/json"}
            request = Request(f"http://127.0.0.1:{port}/v1/completions", body, headers)
            with urlopen(request, timeout=300) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] > 0
        finally:
            process.terminate()
