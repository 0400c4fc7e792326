"""A teacher behind any OpenAI-compatible server (vLLM, llama.cpp, Ollama, TGI, hosted ones).

    teacher = ServerTeacher("http://localhost:8000/v1", model="Qwen/Qwen3-8B", key=os.environ["…"])

Retried with exponential backoff, or after the seconds that the server asks for (Retry-After):
timeouts, lost connections, 408, 409, 425, 429, 5xx, and answers that are not what the protocol
says. Anything else that a server refuses (a wrong key, an unknown model) ends the run at once.
The key goes into one header; every text of an error is searched for it before it is shown.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from huggingface_hub import ChatCompletionOutput, InferenceClient, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_any,
    stop_when_event_set,
    wait_random_exponential,
)

from posttrain.errors import ConfigError
from posttrain.self_instruct.teacher import Answer, NoAnswer, Request, TeacherError, estimate_tokens

RETRIED_STATUSES = {408, 409, 425, 429}  # and every 5xx
REFUSED_STATUSES = {401, 402, 403, 404, 405}  # nothing that another request could change
LONGEST_WAIT_SECONDS = 600  # a server that asks for more has run out of quota, not of breath
BACKOFF = wait_random_exponential(multiplier=1, max=60)


class ServerTeacher:
    """Answers by one chat completion per request, `concurrency` of them at the same time.

    timeout_seconds: longest silence of the server; max_attempts: attempts per request.
    key: None sends the word "none", never the Hugging Face token of this machine. setting: where
    the user wrote the URL, for messages. Tokens are the server's `usage`, else estimated from
    characters, which the answer says.
    """

    requests_per_call = 1

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        key: str | None = None,
        concurrency: int = 8,
        timeout_seconds: float = 120.0,
        max_attempts: int = 6,
        setting: str = "--teacher_url",
    ) -> None:
        check_url(url, setting)
        _check_online(setting)
        self.setting = setting
        self.url, self.model, self.calls_at_once = url, model, concurrency
        self.max_attempts = max_attempts
        self._key = key
        # Without a key InferenceClient would send the Hub's token to this server.
        self._client = InferenceClient(base_url=url, api_key=key or "none", timeout=timeout_seconds)
        self._closed = threading.Event()

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer to each; NoAnswer or TeacherError if the server gives none."""
        return [self._answer(request) for request in requests]

    def close(self) -> None:
        """End all waits between attempts."""
        self._closed.set()

    def _answer(self, request: Request) -> Answer:
        retrying = Retrying(
            retry=retry_if_exception_type(Passing),
            wait=wait_seconds_of,
            stop=stop_any(stop_after_attempt(self.max_attempts), stop_when_event_set(self._closed)),
            sleep=sleep_using_event(self._closed),
            reraise=True,
        )
        try:
            answer = retrying(self._ask_once, request)
        except Passing as problem:
            raise NoAnswer(str(problem), retrying.statistics["attempt_number"]) from None
        return replace(answer, attempts=retrying.statistics["attempt_number"])

    def _ask_once(self, request: Request) -> Answer:
        # Some servers refuse what they do not know: what says nothing new is not sent.
        settings = {
            "top_p": request.top_p if request.top_p != 1 else None,
            "presence_penalty": request.presence_penalty or None,
            "stop": list(request.stop) or None,
            "model": self.model,
        }
        if request.schema is not None:
            # vLLM's own way: the client rewrites a response_format with a schema to another
            # server's form, of which vLLM keeps only that the reply is JSON.
            settings["extra_body"] = {"structured_outputs": {"json": request.schema}}
        try:
            reply = self._client.chat_completion(
                [{"role": "user", "content": request.prompt}],
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                **settings,
            )
            return _read_reply(reply, request)
        except HfHubHTTPError as error:
            raise self._refusal(error, request) from None
        except HTTPError as error:  # no connection, a lost one, or a timeout
            raise Passing(self._clean(f"{type(error).__name__}: {error}")) from None
        except (ValueError, TypeError, AttributeError) as error:
            # The client reads the reply; what is no JSON, or JSON of another shape, ends in these.
            raise Passing(self._clean(f"not a chat completion ({error})")) from None

    def _refusal(self, error: HfHubHTTPError, request: Request) -> Exception:
        status = error.response.status_code
        said = self._clean(f"HTTP {status}: {_body(error) or error}")
        if status in RETRIED_STATUSES or status >= 500:
            return Passing(said, retry_after(error.response.headers.get("retry-after")))
        if status in REFUSED_STATUSES:
            return TeacherError(
                f"{self.setting} {self.url}: the server refuses {request.name}. {said}\n"
                "Check the URL (it mostly ends in /v1), the model's name and the key's variable."
            )
        return NoAnswer(said)  # this prompt alone may be what it refuses

    def _clean(self, text: str) -> str:
        text = " ".join(text.split())
        return text.replace(self._key, "<key>")[:300] if self._key else text[:300]


class Passing(Exception):
    """Raised for what may pass; the request is sent again, after `wait_seconds` if given."""

    def __init__(self, problem: str, wait_seconds: float | None = None) -> None:
        super().__init__(problem)
        self.wait_seconds = wait_seconds


def wait_seconds_of(state: RetryCallState) -> float:
    """Return the seconds until the next attempt; NoAnswer where the server asks for too many."""
    problem = state.outcome.exception()
    if problem.wait_seconds is None:
        return BACKOFF(state)
    if problem.wait_seconds > LONGEST_WAIT_SECONDS:
        raise NoAnswer(
            f"{problem}; the server asks to wait for {problem.wait_seconds:,.0f} s",
            state.attempt_number,
        )
    return problem.wait_seconds


def retry_after(header: str | None) -> float | None:
    """Return the seconds that a header asks to wait, as a number or a date, or None."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        then = parsedate_to_datetime(header)
    except ValueError:
        return None
    then = then if then.tzinfo else then.replace(tzinfo=timezone.utc)
    return max(0.0, (then - datetime.now(timezone.utc)).total_seconds())


def _read_reply(reply: ChatCompletionOutput, request: Request) -> Answer:
    """The answer in a reply; ValueError for a reply without text."""
    if not isinstance(reply.choices, list) or not reply.choices:
        raise ValueError(f"no choices in {str(reply)[:100]}")
    choice = reply.choices[0]
    text = choice.message.content
    if not isinstance(text, str):
        raise ValueError(f"no text in {str(choice)[:100]}")
    cut = choice.finish_reason == "length"
    usage = reply.usage
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    counted = all(isinstance(count, int) and count >= 0 for count in counts)
    if not counted:
        counts = [estimate_tokens(request.prompt), estimate_tokens(text)]
    return Answer(text, "length" if cut else "stop", *counts, estimated=not counted)


def _body(error: HfHubHTTPError) -> str:
    try:
        return error.response.text
    except RuntimeError:  # the body was never read from the connection
        return ""


def check_url(url: str, setting: str = "--teacher_url") -> None:
    """Raise ConfigError for what is no address of a server, or has a secret in it."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"{setting}: expected a URL such as http://localhost:8000/v1, found '{url}'."
        )
    if parts.username or parts.password or parts.query:
        raise ConfigError(
            f"{setting}: expected a URL without user, password or query, which would be written "
            "to the run folder. Put the key into the variable that key_variable names."
        )


def _check_online(setting: str) -> None:
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"{setting}: HF_HUB_OFFLINE is set, and under it huggingface_hub sends no request "
            "to any server, local ones included. Unset it for this command."
        )
