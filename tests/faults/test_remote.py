"""A store behind a connection that breaks, and objects in it that are not what they were."""

import hashlib
import json
import random
import selectors
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.faults.laboratory import Child, Laboratory, made, tail, until

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
pytestmark = pytest.mark.full


class Line:
    """A connection to a server that can be cut: refused, reset in the middle, or silent."""

    def __init__(self, port: int) -> None:
        self._behind, self.port, self._open = port, free_port(), True
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock, self._stop, self.silent = threading.Lock(), threading.Event(), threading.Event()
        self._listener: socket.socket | None = None
        self.connect()

    def connect(self) -> None:
        """Begins to answer."""
        self._listener = socket.create_server(("127.0.0.1", self.port), reuse_port=True)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Refuses connections, and resets those that there are."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.reset()

    def reset(self) -> None:
        """Resets the connections that there are."""
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._stop.set()
        self.cut()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._behind), timeout=10)
            except OSError:
                return
            with self._lock:
                self._pairs.add((near, far))
            threading.Thread(target=self._carry, args=(near, far), daemon=True).start()

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        with near, far, selectors.DefaultSelector() as ready:
            ready.register(near, selectors.EVENT_READ, far)
            ready.register(far, selectors.EVENT_READ, near)
            try:
                while not self._stop.is_set():
                    for key, _ in ready.select(0.5):
                        while self.silent.is_set() and not self._stop.is_set():
                            time.sleep(0.05)
                        content = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                        if not content:
                            return
                        key.data.sendall(content)
            except OSError:
                return
            finally:
                with self._lock:
                    self._pairs.discard((near, far))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Bucket:
    """A bucket in a server of its own, behind a line."""

    def __init__(self, log: Path) -> None:
        port = free_port()
        command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
        with log.open("wb") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out)
        self._direct = f"http://127.0.0.1:{port}"
        self._number = 0
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if self._process.poll() is not None or time.monotonic() > end:
                    raise AssertionError(f"no server:\n{tail(log)}") from None
                time.sleep(0.1)
        self.line = Line(port)
        self.environment = {
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.line.port}",
            "FSSPEC_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.line.port}",
        }
        import boto3

        self.client: Any = boto3.client(
            "s3",
            endpoint_url=self._direct,
            aws_access_key_id="nobody",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        self.client.create_bucket(Bucket="bucket")

    def url(self) -> str:
        self._number += 1
        return f"s3://bucket/store{self._number}"

    def names(self, url: str) -> list[str]:
        """What is below a URL."""
        prefix = url.removeprefix("s3://bucket/") + "/"
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=prefix)
        return [entry["Key"].removeprefix(prefix) for page in pages for entry in page.get("Contents", ())]

    def objects(self, url: str) -> dict[str, bytes]:
        """All below a URL."""
        found: dict[str, bytes] = {}
        for name in self.names(url):
            key = f"{url.removeprefix('s3://bucket/')}/{name}"
            with suppress(self.client.exceptions.NoSuchKey):  # Gone since it was listed.
                found[name] = self.client.get_object(Bucket="bucket", Key=key)["Body"].read()
        return found

    def put(self, url: str, name: str, content: bytes | None) -> None:
        """Replaces an object, or deletes it."""
        key = f"{url.removeprefix('s3://bucket/')}/{name}"
        if content is None:
            self.client.delete_object(Bucket="bucket", Key=key)
        else:
            self.client.put_object(Bucket="bucket", Key=key, Body=content)

    def close(self) -> None:
        self.line.close()
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def bucket(lab: Laboratory) -> Iterator[Bucket]:
    found = Bucket(lab.path("server"))
    try:
        yield found
    finally:
        found.close()


def start(lab: Laboratory, bucket: Bucket, url: str, **befalls: Any) -> Child:
    """A run whose own machine has nothing yet of what is in the store."""
    cache = lab.path("cache")
    environment = {**bucket.environment, "LINGRAFT_CACHE": str(cache), **befalls.pop("environment", {})}
    given = (*lab.run(Path(lab.path("unused")))[:-4], "--store", url, "--out", str(lab.path("out")))
    return lab.start(cache, arguments=given, environment=environment, **befalls)


def verb(lab: Laboratory, bucket: Bucket, *arguments: str) -> Child:
    """`lingraft store …`."""
    cache = lab.path("cache")
    environment = {**bucket.environment, "LINGRAFT_CACHE": str(cache)}
    return lab.start(cache, arguments=("store", *arguments), environment=environment)


def check(lab: Laboratory, bucket: Bucket, url: str) -> None:
    """Every step is in the bucket once, with the right content."""
    objects = bucket.objects(url)
    pointers = {n: json.loads(c) for n, c in objects.items() if n.count("/") == 1 and n.endswith(".json")}
    assert {name.removesuffix(".json") for name in pointers if not name.startswith("damaged/")} == set(lab.baseline)
    for name, pointer in pointers.items():
        step = name.removesuffix(".json")
        if step.startswith("damaged/"):
            continue
        below = f"{step}/{pointer['attempt']}/"
        files = {
            n.removeprefix(below): hashlib.sha256(c).hexdigest()
            for n, c in objects.items()
            if n.startswith(below) and not n.endswith("/step.json")
        }
        assert files == pointer["record"]["files"] == lab.baseline[step]["files"], step
    assert verb(lab, bucket, "gc", url).wait() == 0
    assert [name for name in bucket.names(url) if name.endswith(".lock")] == []
    again = start(lab, bucket, url)
    assert again.wait() == 0 and "nothing to do" in again.said(), tail(again.spec.log)


def seen(bucket: Bucket, url: str) -> int:
    """How many steps are in the bucket."""
    names = bucket.names(url)
    return sum(n.count("/") == 1 and n.endswith(".json") and not n.startswith("damaged") for n in names)


def test_the_same_content_comes_of_a_bucket(lab: Laboratory, bucket: Bucket) -> None:
    url = bucket.url()
    child = start(lab, bucket, url)
    assert child.wait() == 0, tail(child.spec.log)
    check(lab, bucket, url)


def test_the_line_is_cut_for_a_moment(lab: Laboratory, bucket: Bucket) -> None:
    """A retry mends it."""
    url = bucket.url()
    child = start(lab, bucket, url)
    try:
        for enough in (5, 20):
            until(lambda enough=enough: seen(bucket, url) >= enough, child)
            bucket.line.cut()
            time.sleep(1)
            bucket.line.connect()
        assert child.wait() == 0, tail(child.spec.log)
    finally:
        if bucket.line._listener is None:
            bucket.line.connect()
    check(lab, bucket, url)


def test_the_line_is_cut_for_good(lab: Laboratory, bucket: Bucket) -> None:
    """What is wrong is said; with the line back, the same command finishes, from another machine."""
    url = bucket.url()
    child = start(lab, bucket, url)
    until(lambda: seen(bucket, url) >= 10, child)
    bucket.line.cut()
    try:
        code = child.wait(300)
    finally:
        bucket.line.connect()
    said = child.said()
    assert code == 1 and "Traceback" not in said and "unexpected" not in said, tail(child.spec.log)
    time.sleep(4.5)  # The lease of the last step, which could not be given back, runs out.
    again = start(lab, bucket, url)
    assert again.wait() == 0, tail(again.spec.log)
    check(lab, bucket, url)


def test_connections_are_reset_all_the_time(lab: Laboratory, bucket: Bucket) -> None:
    url, stop = bucket.url(), threading.Event()

    def harm() -> None:
        rng = random.Random(0)
        while not stop.wait(rng.uniform(0.3, 1.5)):
            bucket.line.reset()

    thread = threading.Thread(target=harm, daemon=True)
    thread.start()
    try:
        child = start(lab, bucket, url)
        code = child.wait(240)
    finally:
        stop.set()
        thread.join(10)
    said = child.said()
    assert code in (0, 1) and "Traceback" not in said and "unexpected" not in said, tail(child.spec.log)
    if code:
        assert start(lab, bucket, url).wait() == 0
    check(lab, bucket, url)


def test_kills_while_a_bucket_is_written(lab: Laboratory, bucket: Bucket) -> None:
    url, rng = bucket.url(), random.Random(0)
    for _ in range(8):
        child = start(lab, bucket, url)
        child.process.join(rng.uniform(0.3, 3))
        child.kill()
    child = start(lab, bucket, url)
    assert child.wait() == 0, tail(child.spec.log)
    check(lab, bucket, url)


def test_two_machines_on_one_bucket(lab: Laboratory, bucket: Bucket) -> None:
    """Each has a cache of its own, and the other's name and locks mean nothing to it."""
    url, notes = bucket.url(), lab.path("made")
    children = [start(lab, bucket, url, made=notes, lockless=True) for _ in range(2)]
    codes = [child.wait(240) for child in children]
    assert codes == [0, 0], "\n".join(tail(child.spec.log) for child in children)
    assert Counter(made(notes)).keys() == lab.baseline.keys()
    check(lab, bucket, url)


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_damaged_objects(lab: Laboratory, bucket: Bucket, how: str) -> None:
    """Noticed where they are read, and made anew."""
    url = bucket.url()
    child = start(lab, bucket, url)
    assert child.wait() == 0, tail(child.spec.log)
    (adapter,) = lab.steps("train", "train kind en")
    (scores, *_) = lab.steps("score", "eng-ft seed 0 sw")
    objects = bucket.objects(url)
    for step in (adapter, scores):
        name = next(n for n in sorted(objects) if n.startswith(f"{step}/") and not n.endswith("step.json"))
        content = bytearray(objects[name])
        content[len(content) // 2] ^= 1
        changed = {"flip": bytes(content), "truncate": objects[name][:-7], "delete": None}[how]
        bucket.put(url, name, changed)
    for step in lab.dependants(adapter):
        if step != scores:
            bucket.put(url, f"{step}.json", None)
    child = start(lab, bucket, url)
    assert child.wait() == 0, tail(child.spec.log)
    aside = [name for name in bucket.names(url) if name.startswith("damaged/")]
    assert all(any(step.replace("/", "-") in name for name in aside) for step in (adapter, scores)), aside
    check(lab, bucket, url)


def test_damaged_pointers(lab: Laboratory, bucket: Bucket) -> None:
    """What says that a step is finished may be damaged, too, or lead out of its folder."""
    url = bucket.url()
    child = start(lab, bucket, url)
    assert child.wait() == 0, tail(child.spec.log)
    steps = [lab.steps(kind)[0] for kind in ("train", "score", "predict", "merge", "select", "compare")]
    for number, step in enumerate(steps):
        name = f"{step}.json"
        text = bucket.objects(url)[name]
        pointer = json.loads(text)
        pointer["attempt"] = "../../elsewhere"
        bucket.put(url, name, [text[: len(text) // 2], b"", json.dumps(pointer).encode(), b"[]"][number % 4])
    for _ in range(2):
        child = start(lab, bucket, url)
        assert child.wait() in (0, 1) and "Traceback" not in child.said(), tail(child.spec.log)
        # What nobody has to read is found by the store's own verb.
        child = verb(lab, bucket, "verify", "--repair", url)
        assert child.wait() == 0, tail(child.spec.log)
    child = start(lab, bucket, url)
    assert child.wait() == 0, tail(child.spec.log)
    check(lab, bucket, url)


def test_nothing_is_left_beside_the_store(lab: Laboratory, bucket: Bucket) -> None:
    """A cache that is thrown away in the middle costs time alone."""
    url, cache = bucket.url(), lab.path("cache")
    child = start(lab, bucket, url, environment={"LINGRAFT_CACHE": str(cache)})
    until(lambda: seen(bucket, url) >= 10, child)
    child.kill()
    shutil.rmtree(cache, ignore_errors=True)
    again = start(lab, bucket, url)
    assert again.wait() == 0, tail(again.spec.log)
    check(lab, bucket, url)
