r"""The outcome verifier: the last boxed answer of a response against the gold answer.

Exact comparison settles most answers at once, in the caller's thread. What needs algebra goes to worker processes:
started when first needed, killed and replaced when one answer takes too long. They are programs of their own and no
forks, since the caller holds torch, an engine and a CUDA context.
"""

import asyncio
import json
import os
import queue
import re
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Literal, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from rlsp_fast.answer import Exact
from rlsp_fast.notation import MAX_CHARS, compare

Mode = Literal["strict", "lenient"]

START_TIMEOUT_S = 120.0
"""Importing sympy takes half a second; on a busy file system it has taken a minute."""
MAX_CACHED = 20_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one response was judged."""

    verdict: str
    """`correct`, `wrong`, `no_answer`, `timeout` (comparing took too long) or `error` (it failed)."""
    seconds: float
    """Time the judging took, without waiting for a free worker."""
    answer: str | None
    """What was found in the response, at most MAX_CHARS of it; None without an answer."""


# --- what the answer is -----------------------------------------------------------------------------------------------

_BRACES = re.compile(r"(?P<box>\\{1,2}(?:boxed|fbox)\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_JOINED = re.compile(
    r"(?:[ \t$]|\\[()\[\] ,;]|\\quad)*(?:,|;|,?[ \t]*(?:\\text\{)?[ \t]*(?:and|or)\b[ \t]*\}?)"
    r"(?:[ \t$]|\\[()\[\] ,;]|\\quad)*(?:[A-Za-z](?:_\{?\w\}?)?[ \t]*=[ \t$]*)?"
)
_ANSWER_IS = re.compile(r"(?i)\b(?:answer|option|choice)(?:[^.\n]{0,60}?\b(?:is|are)\b|\W{0,3}?[:=])[\s:=*]*|####\s*")
_CLAUSE = re.compile(r"\.(?:\s|$)|,? (?:because|since|so|which|as) ")
_DOLLARS = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\d])\$([^$\n]+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])[-−]?\$?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?%?(?![\w])")
_LENIENT_CHARS = 4_000


def extract_answer(text: str, mode: Mode = "strict") -> str | None:
    r"""The final answer in a response, or None.

    Args:
        text: The response. Only what follows its last `</think>` counts.
        mode: `strict` wants the last complete `\boxed{...}` (or `\fbox{...}`). `lenient` takes, without one, what the
            last `answer is ...` or `#### ...` says, else the last `$...$`, else the last number.

    Returns:
        The text of the answer; None where there is none, or where the last complete box is empty.

    Cost:
        One scan for braces, linear in the text.
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0]  # a thought without an end is no answer
    box = _last_box(text)
    if box is not None or mode == "strict":
        return box or None
    tail = text[-_LENIENT_CHARS:]
    if announced := _last(_ANSWER_IS, tail):
        line = tail[announced.end() :].partition("\n")[0]
        formula = _DOLLARS.search(line)
        answer = formula[formula.lastindex] if formula else _CLAUSE.split(line)[0]
    elif formula := _last(_DOLLARS, tail):
        answer = formula[formula.lastindex]
    elif number := _last(_NUMBER, tail):
        answer = number[0]
    else:
        return None
    return answer.strip(" *_\t") or None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = deque(pattern.finditer(text), maxlen=1)
    return found[0] if found else None


def _last_box(text: str) -> str | None:
    """Content of the complete box that ends last; None without one. Escaped braces do not count.

    Boxes joined by a comma, `and` or `or` are one answer, a list: to box everything wins nothing.
    """
    open_: list[tuple[int, int]] = []  # where each open brace's command and its content start; -1 if it is no box
    last: list[tuple[int, int, int]] = []  # command, content and end of the boxes that make up the answer
    for m in _BRACES.finditer(text):
        if m["box"]:
            open_.append((m.start(), m.end()))
        elif m["open"]:
            open_.append((-1, -1))
        elif m["close"] and open_:
            start, content = open_.pop()
            if start >= 0:
                while last and last[-1][0] > start:  # those inside it
                    last.pop()
                if last and not (start - last[-1][2] < 60 and _JOINED.fullmatch(text, last[-1][2] + 1, start)):
                    last.clear()
                last.append((start, content, m.start()))
    parts = [text[content:end].strip() for _, content, end in last]
    return None if not parts else ", ".join(dict.fromkeys(parts)) if parts[-1] else ""


def gold_answer(text: str) -> str:
    r"""The answer in a gold text: what its last box holds, what follows `####`, or all of it."""
    if (box := _last_box(text)) is not None:
        return box
    return text.rpartition("####")[2].strip()


# --- worker processes -------------------------------------------------------------------------------------------------

_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "HOME", "TMPDIR", "LANG")


class WorkerError(RuntimeError):
    """A verifier process cannot be started: the installation is at fault, not an answer."""


class _Worker:
    """One process that answers one question at a time. Used by one thread."""

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._spent = False

    def ask(self, gold: str, answer: str) -> tuple[str, float]:
        """The verdict and the seconds it took; a worker that is late or lost is replaced at the next question."""
        if self._process is None or self._spent or self._process.poll() is not None:
            self.kill()
            self._start()
        start = time.perf_counter()  # the worker is idle, so it starts now
        job = json.dumps({"gold": gold, "answer": answer, "timeout_s": self._timeout_s}) + "\n"
        reply = self._exchange(job.encode("ascii"), 0.99 * self._timeout_s)  # noticing that it is late takes time too
        seconds = time.perf_counter() - start
        if reply not in ("correct", "wrong", "error"):
            self._process.kill()  # without waiting: the answer is judged, and a large process takes its time to go
            self._spent = True
        return reply if reply in ("correct", "wrong", "error", "timeout") else "error", seconds

    def _start(self) -> None:
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        # The same verdict from every process: no order of terms that hangs on hash seeds or on gmpy2 being there.
        environment |= {"PYTHONHASHSEED": "0", "SYMPY_GROUND_TYPES": "python", "OMP_NUM_THREADS": "1"}
        try:
            self._errors = tempfile.TemporaryFile()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rlsp_fast.verify_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                cwd=Path(__file__).parent.parent,  # where `-m` finds this package, installed or not
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal is for the parent, which then ends this
            )
        except OSError as error:
            raise WorkerError(f"the verifier's worker process did not start: {error}") from None
        if self._exchange(b"", START_TIMEOUT_S) != "ready":
            self._errors.seek(0)
            last_words = self._errors.read()[-2000:].decode(errors="replace").strip()
            self.kill()
            raise WorkerError(f"the verifier's worker process did not start: {last_words or 'no message'}")

    def _exchange(self, message: bytes, timeout_s: float) -> str:
        """Sends a line and reads one. `timeout` after the limit, "" when the worker is gone."""
        deadline = time.perf_counter() + timeout_s
        try:
            self._process.stdin.write(message)
            self._process.stdin.flush()
        except BrokenPipeError:
            return ""
        stdout = self._process.stdout.fileno()
        poll = select.poll()  # select() fails on descriptors above 1023
        poll.register(stdout, select.POLLIN)
        reply = b""
        while not reply.endswith(b"\n"):
            left = deadline - time.perf_counter()
            if left <= 0 or not poll.poll(left * 1000):
                return "timeout"
            piece = os.read(stdout, 64)
            if not piece or len(reply) > 64:
                return ""
            reply += piece
        return reply.decode("ascii", "replace").strip()

    def interrupt(self) -> None:
        """Ends the process from another thread; the one that waits for it then finds it lost."""
        process = self._process
        if process is not None:
            process.kill()

    def kill(self) -> None:
        """Ends the process and forgets it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass  # what was left in its buffer has no reader
            self._errors.close()
            self._process = None
        self._spent = False


# --- the verifier -----------------------------------------------------------------------------------------------------


class Verifier:
    """Judges responses. Safe to use from threads, from asyncio, and on every rank of a job.

    >>> with Verifier() as verifier:
    ...     [v.verdict for v in verifier.verify_many([(r"so \\boxed{1/2}", "0.5"), ("I do not know", "7")])]
    ['correct', 'no_answer']
    """

    def __init__(self, mode: Mode = "strict", timeout_s: float = 5.0, workers: int = 2):
        """
        Args:
            mode: How the answer is found: see `extract_answer`.
            timeout_s: Seconds one symbolic comparison may take before its worker is killed.
            workers: Processes for symbolic comparisons, started when first needed.
        """
        if mode not in ("strict", "lenient"):
            raise ValueError(f"want mode strict or lenient, got {mode!r}")
        if timeout_s <= 0 or workers < 1:
            raise ValueError(f"want timeout_s > 0 and workers >= 1, got {timeout_s} and {workers}")
        self.mode = mode
        self.timeout_s = timeout_s
        self.workers = workers
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[str, str, float, Future[Verdict]] | None] = queue.SimpleQueue()
        self._pool: list[tuple[threading.Thread, _Worker]] = []
        self._cache: OrderedDict[tuple[str, str], Future[Verdict]] = OrderedDict()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def submit(self, response: str, gold: str) -> Future[Verdict]:
        """Starts judging a response; the future is done at once unless the answer needs algebra.

        Args:
            response: What the model wrote.
            gold: The right answer; one with a box or `####` in it is cut out as from a solution.

        Raises:
            ValueError: if the gold answer is empty.
            WorkerError: from the future's `result()`, if no worker process can be started.
        """
        start = time.perf_counter()
        gold = gold_answer(gold)
        if not gold:
            raise ValueError("the gold answer is empty")
        answer = extract_answer(response, self.mode)
        result = None if answer is None else compare(gold, answer, Exact())
        if answer is not None and result is None:
            return self._submit_symbolic(gold, answer, time.perf_counter() - start)
        verdict = "no_answer" if answer is None else "correct" if result else "wrong"
        future: Future[Verdict] = Future()
        future.set_result(Verdict(verdict, time.perf_counter() - start, answer and answer[:MAX_CHARS]))
        return future

    def verify_many(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Judges (response, gold) pairs, in order; one that hangs or fails harms no other."""
        return [future.result() for future in [self.submit(response, gold) for response, gold in pairs]]

    async def verify(self, response: str, gold: str) -> Verdict:
        """Judges one response without blocking the event loop while a worker is at it."""
        return await asyncio.wrap_future(self.submit(response, gold))

    def close(self) -> None:
        """Ends the workers. Futures not yet done fail with WorkerError."""
        with self._lock:
            self._closed = True
            pool = list(self._pool)
        for _ in pool:
            self._jobs.put(None)
        for thread, worker in pool:
            worker.interrupt()
            thread.join()

    def _submit_symbolic(self, gold: str, answer: str, seconds: float) -> Future[Verdict]:
        """The samples of a problem often share an answer, so equal questions share a future."""
        with self._lock:
            if self._closed:
                raise ValueError("the verifier is closed")
            key = (gold, answer)
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            future: Future[Verdict] = Future()
            future.set_running_or_notify_cancel()  # it may be shared, so nobody may cancel it
            self._cache[key] = future
            if len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
            self._jobs.put((gold, answer, seconds, future))
            if len(self._pool) < self.workers:
                worker = _Worker(self.timeout_s)
                thread = threading.Thread(target=self._serve, args=(worker,), name="verifier", daemon=True)
                self._pool.append((thread, worker))
                thread.start()
        return future

    def _serve(self, worker: _Worker) -> None:
        while (job := self._jobs.get()) is not None:
            gold, answer, seconds, future = job
            if self._closed:
                future.set_exception(WorkerError("the verifier was closed"))
                continue
            try:
                verdict, worked = worker.ask(gold, answer)
            except WorkerError as error:
                future.set_exception(error)
                continue
            if self._closed and verdict == "error":  # lost because it was told to end
                future.set_exception(WorkerError("the verifier was closed"))
            else:
                future.set_result(Verdict(verdict, seconds + worked, answer))
        worker.kill()


# --- files ------------------------------------------------------------------------------------------------------------


class RowError(ValueError):
    """A file of responses that cannot be graded; the message names the file and the line."""


def verify_file(
    path: str, out: str | None = None, mode: Mode = "strict", timeout_s: float = 5.0, workers: int = 2
) -> dict[str, int]:
    """Grades a file of responses, many at a time, with a progress bar on standard error.

    Args:
        path: JSONL rows with `gold` (text or a number) and `response` (text); `-` is standard input.
        out: Where the rows go, with `verdict` and `seconds` added; `-` is standard output, None nowhere.
        mode, timeout_s, workers: As for `Verifier`.

    Returns:
        How many rows got each verdict. Also printed: on standard output, or on standard error if the rows are there.

    Raises:
        RowError: for a row that is not such a row (naming file and line), or an `out` that is the input.
    """
    if out not in (None, "-") and path != "-" and Path(out).resolve() == Path(path).resolve():
        raise RowError(f"{out} is the input: write the graded rows to another file")
    counts = Counter({v: 0 for v in ("correct", "wrong", "no_answer", "timeout", "error")})
    errors = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,} rows"), TimeElapsedColumn()
    with ExitStack() as stack:
        source = stack.enter_context(_open_rows(path))
        if out not in (None, "-"):
            Path(out).parent.mkdir(parents=True, exist_ok=True)
        sink = sys.stdout if out == "-" else stack.enter_context(open(out, "w", encoding="utf-8")) if out else None
        verifier = stack.enter_context(Verifier(mode, timeout_s, workers))
        progress = stack.enter_context(Progress(*columns, console=errors))
        task = progress.add_task("verifying", total=None)
        waiting: deque[tuple[dict, Future[Verdict]]] = deque()

        def finish_one() -> None:
            row, future = waiting.popleft()
            result = future.result()
            counts[result.verdict] += 1
            if sink is not None:
                row |= {"verdict": result.verdict, "seconds": round(result.seconds, 6)}
                sink.write(json.dumps(row) + "\n")
            progress.advance(task)

        for row, response, gold in _rows(source, path):
            waiting.append((row, verifier.submit(response, gold)))
            if len(waiting) >= 1000:
                finish_one()
        while waiting:
            finish_one()
        progress.update(task, total=progress.tasks[0].completed)
    print("  ".join(f"{verdict} {n}" for verdict, n in counts.items()), file=sys.stderr if out == "-" else sys.stdout)
    return dict(counts)


def _open_rows(path: str) -> AbstractContextManager[IO[str]]:
    """The file, or standard input for `-`. A byte that is no UTF-8 becomes a lone surrogate, so that its row can be named."""
    if path == "-":
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        return nullcontext(sys.stdin)
    try:
        return open(path, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise RowError(f"{path}: {error.strerror}") from None


def _rows(source: IO[str], path: str) -> Iterator[tuple[dict, str, str]]:
    """(row, response, gold) of each line that is not blank."""
    name = "standard input" if path == "-" else path
    for number, line in enumerate(source, 1):
        if not line.strip():
            continue
        try:
            line.encode()
            row = json.loads(line)
        except UnicodeEncodeError:
            raise RowError(f"{name}, line {number}: not UTF-8") from None
        except ValueError as error:
            raise RowError(f"{name}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("response"), str):
            raise RowError(f'{name}, line {number}: want {{"gold": ..., "response": "text"}}, got {line.strip()[:80]}')
        gold = row.get("gold")
        if isinstance(gold, bool) or not isinstance(gold, (str, int, float)) or not gold_answer(str(gold)):
            raise RowError(f"{name}, line {number}: want a gold answer (text or a number), got {json.dumps(gold)}")
        yield row, row["response"], str(gold)
