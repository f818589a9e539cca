"""Requests to `/v1/completions` for the most probable tokens after each token of a text, and the reading of answers.

Two forms are read: vLLM's `prompt_logprobs`, {token id: {"logprob": …}} for each token, and `echo` with `logprobs`,
whose tokens are named by their texts. A server is first requested for the first form. Nothing is sent but to the one
address: a redirection is an error, so that no key reaches another host.
"""

import http.client
import json
import math
import os
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from distill.errors import DistillError
from distill.teachers.endpoints.token_texts import TokenTexts
from distill.teachers.retries import TRANSIENT

KEY = "DISTILL_API_KEY"
PATH = "/v1/completions"
BYTES_A_TOKEN, BYTES_BESIDE = 400, 2**20
"""The most bytes that an answer may have: for each token that it names, and beside these."""
PIECE = 2**18


class _Secret:
    """A key that is printed nowhere."""

    def __init__(self, value: str | None) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "…" if self.value else "None"


class Busy(OSError):
    """An answer that says to try again later."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"status {status}: {message}")
        self.status_code = status


class Completions:
    """A model of a server with OpenAI's `/v1/completions`.

    Args:
        address: http:// or https://, with the path of the API where it is not /v1/completions.
        model: its name there.
        texts: reads tokens that are named by their texts.
        key: sent as "Bearer"; None takes that of the environment variable `DISTILL_API_KEY`, if there is one.
        timeout: the longest wait for an answer [s].
    """

    def __init__(self, address: str, model: str, texts: TokenTexts, key: str | None, timeout: float) -> None:
        parts = urlsplit(address)
        if parts.username or parts.password:
            raise DistillError(
                "an address with a name or a password would be written down; give the key by itself: api_key=…, or "
                f"{KEY}=… in the environment."
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise DistillError(f"Served({address!r}) is no address of a server; write Served('http://host:8000', …).")
        self.address, self.model, self.texts, self.timeout = address, model, texts, timeout
        self._parts, self._key = parts, _Secret(os.environ.get(KEY) if key is None else key)
        self._echoes = False
        path = parts.path.rstrip("/")
        whole = path.endswith("/completions")
        self._path = path if whole else path + "/completions" if path.endswith("/v1") else path + PATH

    def most_probable(
        self, texts: Sequence[Sequence[int]], k: int, classes: int
    ) -> list[tuple[list[list[int]], list[list[float]]]]:
        """Return the k most probable tokens after each token of each text, and their log-probabilities.

        Args:
            texts: token ids.
            k: how many tokens.
            classes: the number of token ids.

        Raises:
            DistillError: a server that refuses, or whose answer is none.
            OSError: one that was not reached, or says to try again.
        """
        answer: Any = None
        if not self._echoes:
            try:
                answer = self._post(texts, {"prompt_logprobs": k, "logprobs": k, "return_tokens_as_token_ids": True}, k)
            except DistillError as error:
                if "prompt_logprobs" not in str(error):
                    raise
            choices = answer.get("choices") if isinstance(answer, Mapping) else None
            self._echoes = answer is None or (
                isinstance(choices, list)
                and bool(choices)
                and all(isinstance(each, Mapping) and each.get("prompt_logprobs") is None for each in choices)
            )
        if self._echoes:
            answer = self._post(texts, {"echo": True, "logprobs": k}, k)
        found = self._choices(answer, len(texts))
        return [self._read(choice, len(text), k, classes) for choice, text in zip(found, texts, strict=True)]

    def _choices(self, answer: Any, count: int) -> list[Mapping[str, Any]]:
        """Return what was answered to each text, in their order."""
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        if not isinstance(choices, list) or not all(isinstance(each, Mapping) for each in choices):
            raise self._odd(f"without a list of choices ({_short(answer)})")
        if len(choices) != count:
            raise self._odd(f"{len(choices)} of {count} texts")
        by_index = {each.get("index", place): each for place, each in enumerate(choices)}
        if by_index.keys() != set(range(count)):
            raise self._odd(f"with the indices {sorted(map(str, by_index))} for {count} texts")
        return [by_index[place] for place in range(count)]

    def _read(
        self, choice: Mapping[str, Any], length: int, k: int, classes: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return tokens and log-probabilities of an answer to one text."""
        logprobs = choice.get("logprobs")
        after = logprobs.get("top_logprobs") if isinstance(logprobs, Mapping) else None
        if not isinstance(after, list):
            raise self._odd("without choices[…].logprobs.top_logprobs")
        if self._echoes:
            after = after[1:]
        else:
            before = choice.get("prompt_logprobs")
            if not isinstance(before, list) or len(before) != length:
                count = len(before) if isinstance(before, list) else None
                raise self._odd(f"with prompt_logprobs of {count} tokens for a text of {length}")
            after = [*before[1:], *after]
        if len(after) != length:
            raise self._odd(f"with the probabilities after {len(after)} tokens for a text of {length}")
        numbered = 0 if self._echoes else length - 1
        read = [self._at_token(each, k, classes, numbered=place < numbered) for place, each in enumerate(after)]
        return [tokens for tokens, _ in read], [values for _, values in read]

    def _at_token(self, entries: Any, k: int, classes: int, *, numbered: bool) -> tuple[list[int], list[float]]:
        """Return the k most probable of the tokens that were named after one token, the most probable first."""
        if not isinstance(entries, Mapping):
            raise self._odd(f"with {_short(entries)} in place of the probabilities after a token")
        found = dict[int, float]()
        for name, entry in entries.items():
            value = entry.get("logprob") if isinstance(entry, Mapping) else entry
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise self._odd(f"with the log-probability {_short(value)}")
            if value > 1e-3:
                raise self._odd(f"with the log-probability {value}, which is above 0")
            text = entry.get("decoded_token") if isinstance(entry, Mapping) else None
            number = self.texts.number_of(name, text, self.address, numbered=numbered)
            if not 0 <= number < classes:
                raise DistillError(
                    f"{self.address} names token {number}, and the tokenizer has {classes}; give the one of its model: "
                    "Served(…, tokenizer='FOLDER_OR_NAME')."
                )
            found[number] = float(value)
        if len(found) < k:
            raise DistillError(
                f"{self.address} gives {len(found)} of {k} tokens; let it give more (vLLM: --max-logprobs {k}), or "
                f"request fewer: top_k={max(1, len(found))}."
            )
        chosen = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:k]
        return [number for number, _ in chosen], [value for _, value in chosen]

    def _post(self, texts: Sequence[Sequence[int]], settings: Mapping[str, Any], k: int) -> Any:
        """Return the JSON of an answer to texts, with the k most probable tokens after each token."""
        body = {"model": self.model, "prompt": [list(each) for each in texts], "max_tokens": 1, "temperature": 1.0}
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key.value:
            headers["Authorization"] = f"Bearer {self._key.value}"
        tokens = sum(map(len, texts)) + len(texts)
        most = BYTES_BESIDE + BYTES_A_TOKEN * tokens * (k + 2)
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(self._parts.hostname), self._parts.port, timeout=self.timeout)
        try:
            connection.request("POST", self._path, json.dumps({**body, **settings}), headers)
            response = connection.getresponse()
            content = self._content(response, most)
        except DistillError:
            raise
        except http.client.HTTPException as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        except ssl.SSLCertVerificationError as error:
            raise DistillError(f"the certificate of {self.address} is not valid: {error.verify_message}.") from error
        except (ValueError, UnicodeError) as error:  # a key with a line in it, a host that is no name
            raise DistillError(f"{self.address} cannot be requested: {self._hidden(str(error))}.") from None
        finally:
            connection.close()
        self._check_status(response, content)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise self._odd(f"with no JSON ({_short(content[:60].decode(errors='replace'))})") from None

    def _content(self, response: http.client.HTTPResponse, most: int) -> bytes:
        """Return the body of an answer, which may have so many bytes and take so long."""
        found, ends = bytearray(), time.monotonic() + self.timeout
        while piece := response.read(PIECE):
            found += piece
            if len(found) > most:
                raise DistillError(
                    f"{self.address} answers with more than {most} bytes, which is no answer to what was requested; "
                    "see what runs there."
                )
            if time.monotonic() > ends:
                raise TimeoutError(f"the answer took more than {self.timeout:g} s")
        length = response.getheader("Content-Length")
        if length is not None and length.isdecimal() and len(found) < int(length):
            raise ConnectionError(f"the answer broke off after {len(found)} of {length} bytes")
        return bytes(found)

    def _check_status(self, response: http.client.HTTPResponse, content: bytes) -> None:
        """Raise an error for an answer that is none."""
        status, message = response.status, self._hidden(_message(content) or response.reason)
        if status == 200:
            return
        if status >= 500 or status in TRANSIENT:
            raise Busy(status, message)
        if 300 <= status < 400:
            where = urlsplit(response.getheader("Location") or "")
            raise DistillError(
                f"{self.address} redirects to {where.scheme}://{where.hostname}, and nothing is sent to another host "
                "by itself; give that address."
            )
        way_out = f"; give its key: api_key=…, or {KEY}=… in the environment" if status in (401, 403) else ""
        raise DistillError(f"{self.address} refuses (status {status}: {message}){way_out}.")

    def _odd(self, how: str) -> DistillError:
        return DistillError(
            f"{self.address} answers {how}, where {self._path} gives the probabilities at each token of each text; see "
            "what runs there, e.g. vllm serve MODEL."
        )

    def _hidden(self, message: str) -> str:
        """Return a message without the key."""
        return message.replace(self._key.value, "…") if self._key.value else message


def _message(content: bytes) -> str:
    """Return the message in the body of an error."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return content[:200].decode(errors="replace").strip()
    error = found.get("error", found) if isinstance(found, Mapping) else found
    return str(error.get("message", error) if isinstance(error, Mapping) else error)[:300]


def _short(value: Any) -> str:
    return repr(value)[:60]
