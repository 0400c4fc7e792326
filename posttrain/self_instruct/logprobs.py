"""A teacher's top-k log-probs from an OpenAI-compatible server, at every token of given ids.

    ask = LogprobServer("http://localhost:8000/v1", top_k=20, tokenizer=tokenizer, model="…")
    ask.check(example)               # one request, before anything is trained
    examples = ask(examples)         # with `top_ids` and `top_logps` for each trained token

Two ways of asking, both by /v1/completions with token ids as the prompt: `prompt_logprobs`, as vLLM
and its relatives have it, and `echo` with `logprobs`, as OpenAI's protocol had it. Answers are
written to a file, from which a resumed run, or another one, reads them instead of asking again.
"""

from __future__ import annotations

import json
import math
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from posttrain.errors import DataError
from posttrain.run.folder import append_log
from posttrain.self_instruct.server import (
    RETRIED_STATUSES,
    Passing,
    check_url,
    retry_after,
    wait_seconds_of,
)
from posttrain.self_instruct.teacher import NoAnswer, TeacherError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = dict[str, Any]
Api = Literal["prompt_logprobs", "echo"]

TOKEN_ID = "token_id:"  # how vLLM names a token by its id
LEAST_ALIKE = 0.5  # share of tokens whose texts must be those of the student's tokenizer


class LogprobServer:
    """Asks for the k most likely tokens at each trained token of examples.

    Args:
        top_k: tokens at each place; a server may add the token itself as one more.
        tokenizer: the student's, which must be the teacher's too.
        path: file of answers; None keeps none.
    """

    def __init__(
        self,
        url: str,
        *,
        top_k: int,
        tokenizer: PreTrainedTokenizerBase,
        model: str | None = None,
        key: str | None = None,
        api: Api = "prompt_logprobs",
        max_attempts: int = 6,
        path: Path | None = None,
    ) -> None:
        check_url(url)
        self.url, self.model, self.top_k, self.api = url.rstrip("/"), model, top_k, api
        self.tokenizer, self.path, self.max_attempts = tokenizer, path, max_attempts
        self.timeout_seconds, self.calls_at_once = 120.0, 8
        self._key = key
        self._known: dict[str, Example] | None = None
        self._ids_by_text: dict[str, int] | None = None
        self._lock = threading.Lock()

    def check(self, example: Example) -> None:
        """Ask once, about the example's first tokens.

        Raises:
            TeacherError: The server gives no log-probs, or its tokenizer is another one.
        """
        ids = list(example["input_ids"])[:64]
        reply = self._asked(ids)
        texts = [
            (entry["decoded_token"], self.tokenizer.decode([ids[place]]))
            for place, entries in enumerate(reply.get("prompt_logprobs") or ())
            for token, entry in (entries or {}).items()
            if token == str(ids[place]) and entry.get("decoded_token")
        ]
        alike = sum(theirs.strip("▁ ") == ours.strip() for theirs, ours in texts)
        if texts and alike < LEAST_ALIKE * len(texts):
            raise TeacherError(
                f"--teacher_url {self.url}: the server's tokenizer is not the student's: of "
                f"{len(texts)} tokens {alike} have the same text. Top-k log-probs need one "
                "tokenizer; --method sft learns from texts."
            )
        self._read(reply, ids)

    def __call__(self, examples: Sequence[Example]) -> list[Example]:
        """Return the examples with `top_ids` and `top_logps`; those that are known are not asked.

        Raises:
            TeacherError: The server gives no answer.
        """
        if self._known is None:
            self._known = {_name(row): row for row in _rows_of(self.path)}
        with ThreadPoolExecutor(self.calls_at_once) as threads:
            return list(threads.map(self._answered, examples))

    def _answered(self, example: Example) -> Example:
        known = self._known.get(_name(example))
        if known is None:
            found = self._read(self._asked(list(example["input_ids"])), example["input_ids"])
            places = [place for place, trained in enumerate(example["trained"]) if trained]
            known = {
                "input_ids": list(example["input_ids"]),
                "trained": list(example["trained"]),
                "top_ids": [list(found[place]) for place in places],
                "top_logps": [list(found[place].values()) for place in places],
            }
            with self._lock:
                self._known[_name(example)] = known
                if self.path is not None:
                    append_log(self.path, known)
        return {**example, "top_ids": known["top_ids"], "top_logps": known["top_logps"]}

    # One request.

    def _asked(self, ids: list[int]) -> dict[str, Any]:
        """The choice of the reply about these ids."""
        body: dict[str, Any] = {"prompt": ids, "max_tokens": 1, "temperature": 1.0}
        if self.model is not None:
            body["model"] = self.model
        if self.api == "prompt_logprobs":
            body["prompt_logprobs"] = self.top_k
        else:
            body |= {"echo": True, "logprobs": self.top_k, "return_tokens_as_token_ids": True}
        retrying = Retrying(
            retry=retry_if_exception_type(Passing),
            wait=wait_seconds_of,
            stop=stop_after_attempt(self.max_attempts),
            reraise=True,
        )
        try:
            return retrying(self._ask_once, body)
        except (Passing, NoAnswer) as problem:
            raise TeacherError(
                f"--teacher_url {self.url}: no answer in {self.max_attempts} attempts ({problem})."
            ) from None

    def _ask_once(self, body: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"content-type": "application/json"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(
            f"{self.url}/completions", json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as reply:
                return json.loads(reply.read())["choices"][0]
        except urllib.error.HTTPError as error:
            said = self._clean(f"HTTP {error.code}: {error.read().decode(errors='replace')}")
            if error.code in RETRIED_STATUSES or error.code >= 500:
                raise Passing(said, retry_after(error.headers.get("retry-after"))) from None
            raise TeacherError(f"--teacher_url {self.url}: the server refuses. {said}") from None
        except OSError as error:  # no connection, a lost one, or a timeout
            raise Passing(self._clean(f"{type(error).__name__}: {error}")) from None
        except (ValueError, LookupError, TypeError) as error:
            raise Passing(self._clean(f"not a completion ({error})")) from None

    def _clean(self, text: str) -> str:
        text = " ".join(text.split())
        return (text.replace(self._key, "<key>") if self._key else text)[:300]

    def _read(self, choice: Mapping[str, Any], ids: Sequence[int]) -> list[dict[int, float]]:
        """Token id -> log-prob at each place; nothing at the first, which nothing predicts."""
        if self.api == "prompt_logprobs":
            given = choice.get("prompt_logprobs")
        else:
            given = (choice.get("logprobs") or {}).get("top_logprobs")
        if not isinstance(given, list) or len(given) < len(ids):
            found = f"{len(given)} places" if isinstance(given, list) else "none"
            raise TeacherError(
                f"--teacher_url {self.url}: expected log-probs of all {len(ids)} tokens that were "
                f"sent, found {found}. Does the server know {self.api}? See --teacher_api."
            )
        places = [self._place(entries or {}) for entries in given[: len(ids)]]
        if any(not place for place in places[1:]):
            raise TeacherError(
                f"--teacher_url {self.url}: a token came without a log-prob that the student's "
                "vocabulary knows. Is the tokenizer another one?"
            )
        return places

    def _place(self, entries: Mapping[str, Any]) -> dict[int, float]:
        found: dict[int, float] = {}
        for token, entry in entries.items():
            logp = entry["logprob"] if isinstance(entry, Mapping) else entry
            number = self._id_of(token)
            if number is not None and math.isfinite(logp):
                found[number] = float(logp)
        return found

    def _id_of(self, token: str) -> int | None:
        """The id that a server's name of a token means; None where it may mean several."""
        if self.api == "prompt_logprobs" or token.startswith(TOKEN_ID):
            return int(token.removeprefix(TOKEN_ID))
        with self._lock:
            if self._ids_by_text is None:
                self._ids_by_text = _unique_texts(self.tokenizer)
        return self._ids_by_text.get(token)


def _unique_texts(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text -> id of the tokens whose text no other token has; the others stay in the tail."""
    texts = tokenizer.batch_decode([[number] for number in range(len(tokenizer))])
    found: dict[str, int] = {}
    twice = set()
    for number, text in enumerate(texts):
        if text in found:
            twice.add(text)
        found[text] = number
    return {text: number for text, number in found.items() if text not in twice}


def _name(example: Mapping[str, Any]) -> str:
    """The tokens and which of them are trained, as one key."""
    return f"{list(example['input_ids'])} {[int(x) for x in example['trained']]}"


def _rows_of(path: Path | None) -> list[Example]:
    """Read the answers of a run that was stopped, in the middle of a line at worst."""
    if path is None or not path.exists():
        return []
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    if rest:
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        raise DataError(f"{path} is damaged: delete it, and the teacher is asked again.") from None
