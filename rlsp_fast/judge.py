"""The judge: an LLM behind an OpenAI-compatible endpoint reads a response and answers by a rubric.

Two rubrics: `grades`, effort and exploration in [0, 1] for the reward, and `counts`, how often each behaviour occurs, for the
monitors. Requests run in threads beside generation and wait on sockets, not on the interpreter: http.client of the standard
library is enough. A judge that fails gives the rubric's fall-back, counted; it stops a run only if `max_failed` says so. What
the judge reads is written by a policy that is paid for its grade: it is fenced by markers that it cannot know, and an answer
out of bounds is no answer.
"""

import email.utils
import hashlib
import http.client
import json
import logging
import math
import os
import random
import re
import socket
import threading
import time
import tomllib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

log = logging.getLogger(__name__)

SHIPPED_SETTINGS = Path(str(files("rlsp_fast") / "judge.toml"))
SHIPPED_RUBRIC = Path(str(files("rlsp_fast") / "judge_rubric.md"))
DIMENSIONS = ("diversity", "depth", "creativity", "persistence")
RETRIED = {408, 409, 425, 429}
"""HTTP statuses worth another request, besides all from 500 on."""
MAX_BACKOFF_S = 30.0
CONNECT_S = 10.0
MAX_REPLY_BYTES = 2**20
WINDOW = 200
"""Responses over which `max_failed` is a share."""
MAX_COUNT = 10_000
"""A judge that counts more of one behaviour in one response has not counted."""

Seconds = Annotated[float, Field(gt=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Answer = TypeVar("Answer")


class JudgeError(ValueError):
    """Settings that cannot be used, or more failures than they allow."""


class JudgeSettings(BaseModel):
    """What judge.toml holds; its comments explain each key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    url: Annotated[str, Field(pattern=r"^https?://[^/\s]+")]
    model: str
    api_key_env: str = ""
    rubric: str = ""
    structured: Literal["json_schema", "json_object", "none"] = "json_schema"
    max_characters: Annotated[int, Field(ge=100)] = 48_000
    max_concurrent: Positive = 16
    timeout_s: Seconds = 60.0
    total_s: Seconds = 180.0
    retries: Annotated[int, Field(ge=0)] = 5
    backoff_s: Seconds = 0.5
    fallback: Share = 0.5
    dead_after: Positive = 16
    dead_s: Annotated[float, Field(ge=0)] = 60.0
    max_failed: Share = 1.0
    cache: str = "outputs/judge_cache"
    request: dict[str, Any] = {}


def load_settings(path: str | None, key: str = "reward.judge") -> JudgeSettings:
    """The settings in a TOML file, of the shipped one without a path.

    Args:
        key: The setting that names the file.

    Raises:
        JudgeError: naming the file and the key.
    """
    where = Path(path) if path is not None else SHIPPED_SETTINGS
    try:
        tree = tomllib.loads(where.read_text())
        settings = JudgeSettings.model_validate_json(json.dumps(tree, default=str))
        if settings.rubric and not Path(settings.rubric).is_file():
            raise JudgeError(f"{where}: rubric = {settings.rubric!r}: there is no such file")
    except OSError as error:
        raise JudgeError(f"{key} = {str(where)!r}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JudgeError(f"{where}: {error}") from None
    except ValidationError as error:
        lines = [f"{where}: {'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()]
        raise JudgeError("\n".join(lines)) from None
    try:
        url = urlsplit(settings.url)
        usable = url.hostname and (url.port or True) and "@" not in url.netloc  # what is in a URL shows in messages
    except ValueError:
        usable = False
    if not usable:
        raise JudgeError(f"{where}: url: want http(s)://host[:port][/path], without a user or a password in it")
    try:
        _api_key(settings)
    except JudgeError as error:
        raise JudgeError(f"{where}: {error}") from None
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.max_concurrent < ranks:
        raise JudgeError(f"{where}: max_concurrent = {settings.max_concurrent}: want at least 1 for each of {ranks} ranks")
    return settings


def _api_key(settings: JudgeSettings) -> str:
    """The key, "" when none is wanted. Errors name the variable and never show what is in it."""
    key = os.environ.get(settings.api_key_env, "").strip() if settings.api_key_env else ""
    if settings.api_key_env and not re.fullmatch(r"[!-~]+", key):
        what = "holds more than one word of ASCII" if key else "is not set, or empty"
        raise JudgeError(f"api_key_env names {settings.api_key_env}, which {what}")
    return key


# --- rubrics ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Rubric(Generic[Answer]):
    """What a judge is asked, and how its answer is read."""

    name: str
    """Of the answer's schema."""
    prompt: str
    """The system prompt."""
    task: str
    """What the message asks for after the response."""
    keys: tuple[str, ...]
    """A JSON object with all of these is an answer."""
    schema: dict[str, Any]
    """JSON schema of the answer."""
    read: Callable[[dict[str, Any]], Answer | None]
    """The value of an answer, None for one out of bounds."""
    wanted: str
    """What an answer without a value lacks, for messages."""
    fallback: Answer | None
    """Of a response that could not be judged."""

    def find(self, content: str) -> dict[str, Any] | None:
        """The last JSON object with this rubric's keys in what a judge said; None if there is none, or it is out of bounds.

        Thoughts before `</think>`, fences and talk around the object are passed over. The last object counts, not the first:
        a judge may quote the response before it answers.
        """
        found, position = None, 0
        content = content.rpartition("</think>")[2]
        decoder = json.JSONDecoder()
        for brace in [match.start() for match in re.finditer(r"\{", content)][-200:]:
            if brace < position:  # inside an object that was read whole
                continue
            try:
                value, position = decoder.raw_decode(content, brace)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict) and value.keys() >= set(self.keys):
                found = value
        return found if self.value(found) is not None else None

    def value(self, answer: object) -> Answer | None:
        """What an answer says; None for what is none."""
        return self.read(answer) if isinstance(answer, dict) and answer.keys() >= set(self.keys) else None


def grades(settings: JudgeSettings) -> Rubric[float]:
    """Effort and exploration, in [0, 1]."""
    return Rubric(
        name="grade",
        prompt=(Path(settings.rubric) if settings.rubric else SHIPPED_RUBRIC).read_text(),
        task="Grade the exploration shown in the response as your rubric says.",
        keys=("score",),
        # `score` comes last, when the dimensions have been weighed.
        schema=_object({"evidence": "string"} | dict.fromkeys((*DIMENSIONS, "score"), "number")),
        read=lambda answer: _number(answer["score"], 1),
        wanted="score in [0, 1]",
        fallback=settings.fallback,
    )


def counts(names: Sequence[str], prompt: str) -> Rubric[dict[str, int]]:
    """How often each of some behaviours occurs. A response that could not be judged has no counts: None."""

    def read(answer: dict[str, Any]) -> dict[str, int] | None:
        found = {name: _number(answer[name], MAX_COUNT) for name in names}
        whole = all(value is not None and value.is_integer() for value in found.values())
        return {name: int(value) for name, value in found.items()} if whole else None

    return Rubric(
        name="counts",
        prompt=prompt,
        task=f"Count {', '.join(names)} in the response as your rubric says.",
        keys=tuple(names),
        schema=_object({"evidence": "string"} | dict.fromkeys(names, "integer")),
        read=read,
        wanted=f"whole number from 0 to {MAX_COUNT:,} for each of {', '.join(names)}",
        fallback=None,
    )


def _object(types: dict[str, str]) -> dict[str, Any]:
    """JSON schema of an object with these properties and no others. A model writes them in this order."""
    properties = {name: {"type": kind} for name, kind in types.items()}
    return {"type": "object", "properties": properties, "required": list(types), "additionalProperties": False}


def _number(value: object, most: float) -> float | None:
    """A number from 0 to `most`, also one in quotes; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:  # NaN is not
        return None
    return float(value)


# --- the judge --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Judgement(Generic[Answer]):
    """What one response was given."""

    answer: Answer | None
    """The rubric's fall-back when it failed."""
    failed: bool
    requests: int
    """Sent for this response: 0 when the answer was in the cache or the judge counts as dead."""


class _FailedTry(Exception):
    """One request that gave no answer. `wait` is the server's Retry-After in seconds, None when there is no use in another."""

    def __init__(self, why: str, wait: float | None = 0.0):
        super().__init__(why)
        self.wait = wait


class Judge(Generic[Answer]):
    """Judges responses by one rubric through one endpoint. Close it when done."""

    def __init__(self, settings: JudgeSettings, rubric: Rubric[Answer]):
        """
        Raises:
            JudgeError: when the cache folder cannot be made, or the API key is missing.
        """
        self._settings = settings
        self._key = _api_key(settings)
        self._rubric = rubric
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self._threads = ThreadPoolExecutor(settings.max_concurrent // ranks, thread_name_prefix="judge")
        self._cache = Path(settings.cache) if settings.cache else None
        if self._cache is not None:
            try:
                self._cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise JudgeError(f"cache = {settings.cache!r} of the judge cannot be made: {error.strerror}") from None
        self._lock = threading.Lock()
        self._asked: dict[str, Future[Judgement[Answer]]] = {}  # in flight, by content: equal responses share one request
        self._sockets: set[socket.socket] = set()
        self._jitter = random.Random()  # apart from the generator that a run seeds
        self._closing = threading.Event()
        self._not_before = 0.0  # what Retry-After says to one request holds for all
        self._failures_in_a_row = 0
        self._dead_until = 0.0
        self._outcomes: deque[bool] = deque(maxlen=WINDOW)
        self._num_failed = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every wait and request; what was not judged yet fails."""
        self._closing.set()
        with self._lock:
            sockets = list(self._sockets)
        for sock in sockets:
            _cut(sock)
        self._threads.shutdown(cancel_futures=True)

    def submit(self, problem: str, response: str) -> Future[Judgement[Answer]]:
        """Starts judging and returns at once. The future raises JudgeError when more failed than `max_failed` allows."""
        body = self._body(problem, response)
        key = hashlib.sha256(self._settings.url.encode() + b"\0" + body).hexdigest()
        cached = self._read(key)
        if cached is not None:
            done: Future[Judgement[Answer]] = Future()
            done.set_result(Judgement(cached, failed=False, requests=0))
            return done
        with self._lock:
            running = self._asked.get(key)
            if running is not None:
                return running
            running = self._asked[key] = self._threads.submit(self._judge, key, body)
        running.add_done_callback(lambda _: self._asked.pop(key, None))
        return running

    # --- one response -------------------------------------------------------------------------

    def _judge(self, key: str, body: bytes) -> Judgement[Answer]:
        settings = self._settings
        start = time.monotonic()  # not at submit: waiting for a free slot is not the judge's time
        requests, why = 0, f"it counts as dead for {settings.dead_s:g} s, or asked for a longer wait than total_s"
        retries = 0 if self._failures_in_a_row >= settings.dead_after else settings.retries  # a probe, after dead_s
        while not self._closing.is_set() and start >= self._dead_until:
            left = start + settings.total_s - time.monotonic()
            pause = self._not_before - time.monotonic()
            if left <= max(pause, 0):
                break
            if pause > 0:
                self._closing.wait(pause)
                continue
            requests += 1
            try:
                answer = self._ask(body, min(settings.timeout_s, left))
            except _FailedTry as failure:
                why = str(failure)
                if failure.wait is None or requests > retries:
                    break
                if failure.wait:
                    self._not_before = max(self._not_before, time.monotonic() + failure.wait)
                backoff = min(settings.backoff_s * 2 ** (requests - 1), MAX_BACKOFF_S) * self._jitter.uniform(0.5, 1.0)
                self._closing.wait(min(backoff, max(0.0, start + settings.total_s - time.monotonic())))
            else:
                self._write(key, answer)
                self._count(failed=False, why="")
                return Judgement(self._rubric.read(answer), failed=False, requests=requests)
        if not self._closing.is_set():
            self._count(failed=True, why=why)
        return Judgement(self._rubric.fallback, failed=True, requests=requests)

    def _count(self, *, failed: bool, why: str) -> None:
        settings = self._settings
        with self._lock:
            self._outcomes.append(failed)
            self._failures_in_a_row = self._failures_in_a_row + 1 if failed else 0
            if not failed:
                return
            self._num_failed += 1
            num, share = self._num_failed, sum(self._outcomes) / WINDOW
            if self._failures_in_a_row >= settings.dead_after and time.monotonic() >= self._dead_until:
                self._dead_until = time.monotonic() + settings.dead_s
        if num & (num - 1) == 0:  # 1, 2, 4, 8, ...: a dead judge must be seen, and must not fill the log
            log.warning("the judge (%s) failed for %d responses so far; last: %s", self._rubric.name, num, why)
        if share > settings.max_failed:
            raise JudgeError(
                f"the judge at {settings.url} failed for {100 * share:.0f} % of {WINDOW} responses, more than max_failed = "
                f"{settings.max_failed:g} of reward.judge allows; last: {why}. The same command continues from the last save"
            )

    def _body(self, problem: str, response: str) -> bytes:
        """The request. Everything that the answer depends on is in it, so its hash is the cache's key."""
        settings = self._settings
        problem, response = (_shown(text, settings.max_characters) for text in (problem, response))
        # A policy cannot write the marker of its own response: the marker is a hash of that response.
        name = hashlib.sha256(f"{problem}\0{response}".encode()).hexdigest()[:16]
        begin, middle, end = (f"=== {part} {name} ===" for part in ("PROBLEM", "RESPONSE", "END"))
        message = (
            f"The marker lines carry the name {name}.\n\n{begin}\n{problem}\n{middle}\n{response}\n{end}\n\n"
            f"The material ended at the line {end!r}. {self._rubric.task} Answer with the JSON object."
        )
        messages = [{"role": "system", "content": self._rubric.prompt}, {"role": "user", "content": message}]
        body = {"model": settings.model, "messages": messages, **settings.request}
        if settings.structured == "json_schema":
            schema = {"name": self._rubric.name, "strict": True, "schema": self._rubric.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif settings.structured == "json_object":
            body["response_format"] = {"type": "json_object"}
        return json.dumps(body).encode()

    # --- one request --------------------------------------------------------------------------

    def _ask(self, body: bytes, seconds: float) -> dict[str, Any]:
        """The answer that one request gives, or _FailedTry."""
        url = urlsplit(self._settings.url)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.hostname, url.port, timeout=min(seconds, CONNECT_S))
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        deadline = time.monotonic() + seconds
        sock = limit = None
        try:
            connection.connect()
            sock = connection.sock  # a reply that ends with its connection takes it from there
            sock.settimeout(seconds)
            with self._lock:
                self._sockets.add(sock)
            # A socket's own limit starts anew with every byte; this one does not.
            limit = threading.Timer(max(0.0, deadline - time.monotonic()), _cut, [sock])
            limit.daemon = True
            limit.start()
            connection.request("POST", f"{url.path.rstrip('/')}/chat/completions", body, headers)
            reply = connection.getresponse()
            text = reply.read(MAX_REPLY_BYTES)
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() >= deadline:
                raise _FailedTry(f"no answer within {seconds:.3g} s") from None
            raise _FailedTry(self._without_key(f"{type(error).__name__}: {error}")) from None
        finally:
            if limit is not None:
                limit.cancel()
            with self._lock:
                self._sockets.discard(sock)
            connection.close()
        if reply.status != 200:
            excerpt = self._without_key(text.decode(errors="replace"))[:300]
            wait = retry_after(reply.getheader("Retry-After"))
            again = reply.status in RETRIED or reply.status >= 500
            raise _FailedTry(f"HTTP {reply.status} {reply.reason}: {excerpt}", wait if again else None)
        try:
            content = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise _FailedTry("the reply is no chat completion") from None
        answer = self._rubric.find(content) if isinstance(content, str) else None
        if answer is None:
            raise _FailedTry(f"the reply holds no {self._rubric.wanted}")
        return answer

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    # --- the cache: a file an answer, written whole, so that ranks and kills do no harm -----------

    def _read(self, key: str) -> Answer | None:
        if self._cache is None:
            return None
        try:
            return self._rubric.value(json.loads(self._place(key).read_text()))
        except (OSError, ValueError):  # not there, or not whole: a disk that was full
            return None

    def _write(self, key: str, answer: dict[str, Any]) -> None:
        if self._cache is None:
            return
        path = self._place(key)
        part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            path.parent.mkdir(exist_ok=True)
            part.write_text(json.dumps(answer) + "\n")
            part.replace(path)
        except OSError as error:
            log.warning("the judge's cache cannot be written: %s", error)

    def _place(self, key: str) -> Path:
        return self._cache / key[:2] / f"{key}.json"


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for: a number or a date; 0 without one or with one that says neither."""
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _shown(text: str, most: int) -> str:
    """Text that JSON and a server can carry: no control characters, no lone surrogates, at most about `most` characters."""
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", " ", text).encode(errors="replace").decode()
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def _cut(sock: socket.socket) -> None:
    """Ends a request from another thread: its blocked read returns."""
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of the plain socket: TLS's own would change it under the reader
    except OSError:  # closed meanwhile
        pass
