"""The one client of OpenAI-compatible servers: OpenAI itself, vLLM, `transformers serve`, ...

OPENAI_API_KEY goes to OpenAI's own address and nowhere else; another server gets SERVER_API_KEY, or no key. Retries,
waits (Retry-After included) and time-outs are the openai package's own; what they do not mend ends in one UserError,
after everything that was answered has been handed over.
"""

import ipaddress
import math
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from urllib.parse import urlsplit

import openai
from openai.types import Completion
from openai.types.chat import ChatCompletion

from config import UserError

OPENAI_URL = "https://api.openai.com/v1"
NO_KEY = "no key"  # the openai package wants one; it is not sent
OF_HTTP = ("host", "content-type", "content-length", "connection")  # headers without which there is no request
FAILURES_IN_A_ROW = 3  # after which a server among several is given up
MAX_RETRIES = 8  # waits double from 0.5 s to at most 8 s (or as the server's Retry-After says): 40 s in all
TIMEOUT_S = 120.0  # without a whole answer
SNAPSHOT = re.compile(r"-(\d{4}-\d\d-\d\d|\d{8}|\d{4})$")  # the date of a model, at the end of its name

# USD per million tokens (input, output) of the models that the judges name, as public price lists of that month give
# them; the vendor's own list is at https://openai.com/api/pricing
PRICES_DATE = "2026-04"
PRICES = {
    "gpt-4": (30.00, 60.00),
    "gpt-4-turbo": (10.00, 30.00),
    "gpt-4-1106-preview": (10.00, 30.00),
    "gpt-4o": (2.50, 10.00),
    "gpt-4o-mini": (0.15, 0.60),
}


class ServerGone(UserError):
    """A server that cannot be reached: another one might do its work."""


class ServerFailed(UserError):
    """A server that failed at a request (5xx), would take no more (429) or gave no whole answer in time, to the end of
    the retries."""


@dataclass(frozen=True)
class Client:
    """A server and how many requests it is given at a time."""

    api: openai.OpenAI
    concurrency: int


def server_url(given: str | None, flag: str = "judge_url") -> str:
    """The address given by `flag`, else OPENAI_BASE_URL, else OpenAI's own. UserError if it is no http(s) address."""
    url = given or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:  # it would stand in every score's run.json
        raise UserError(
            f"--{flag}: holds a user, password or query; give the bare address, and the key in SERVER_API_KEY"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--{flag} {url}: must be an address such as http://localhost:8000/v1")
    return url


def make_client(
    given_url: str | None,
    concurrency: int,
    *,
    flag: str = "judge_url",
    timeout_s: float = TIMEOUT_S,
    max_retries: int = MAX_RETRIES,
) -> Client:
    """The client of a server, with the key that is its own. UserError as `key_for` raises it."""
    url = server_url(given_url, flag)
    key = key_for(url, flag)
    api = openai.OpenAI(
        base_url=url,
        api_key=key or NO_KEY,
        timeout=timeout_s,
        max_retries=max_retries,
        # a connection for each answer: what a server sends behind an answer would be taken for the next one
        default_headers={"Connection": "close"},
        http_client=openai.DefaultHttpxClient(
            follow_redirects=False,  # texts and key go where the user said
            event_hooks={"request": [] if is_openai(url) else [with_key_alone(key)]},
        ),
    )
    return Client(api, concurrency)


def make_clients(given_urls: str, concurrency: int, *, flag: str, max_retries: int = MAX_RETRIES) -> list[Client]:
    """A client of each address, comma-separated. UserError as `make_client` raises it, and for one that is empty,
    or stands twice."""
    urls = [url.strip().rstrip("/") for url in given_urls.split(",")]
    if "" in urls or len(set(urls)) < len(urls):
        raise UserError(f"--{flag} {given_urls}: name each server once, with commas between")
    return [make_client(url, concurrency, flag=flag, max_retries=max_retries) for url in urls]


def with_key_alone(key: str | None) -> Callable:
    """What leaves a server's own key (or none) in an HTTP request, of all that the openai package puts there: a key in
    any case, and whatever the environment says to OpenAI (OPENAI_ORG_ID, OPENAI_PROJECT_ID, OPENAI_CUSTOM_HEADERS)."""
    lines = os.environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines()
    custom = {name for line in lines if (name := line.partition(":")[0].strip().lower())} - {*OF_HTTP}

    def mend(request) -> None:
        for name in ("Authorization", "OpenAI-Organization", "OpenAI-Project", *custom):
            request.headers.pop(name, None)
        if key is not None:
            request.headers["Authorization"] = f"Bearer {key}"

    return mend


def is_openai(url: str) -> bool:
    """Whether an address is OpenAI's own."""
    return urlsplit(url).hostname == urlsplit(OPENAI_URL).hostname


def key_for(url: str, flag: str) -> str | None:
    """The key that a server may see: OPENAI_API_KEY for OpenAI's own address, SERVER_API_KEY (or none) for another.

    UserError where OpenAI's is not set, and where a key would go over plain http to another machine.
    """
    parts = urlsplit(url)
    key = os.environ.get("OPENAI_API_KEY" if is_openai(url) else "SERVER_API_KEY")
    if is_openai(url) and not key:
        raise UserError(f"OPENAI_API_KEY is not set: OpenAI needs it; set it, or name another server with --{flag}")
    if key and parts.scheme == "http" and not is_loopback(parts.hostname):
        raise UserError(
            f"--{flag} {url}: would send the key over plain http; give an https address, or unset SERVER_API_KEY"
        )
    return key or None


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def complete_all(client: Client, model: str, prompts: list[str], **sampling) -> Iterator[tuple[str, Completion]]:
    """(prompt, its completion) by /v1/completions, as each is done, in any order.

    sampling: max_tokens, temperature, top_p, stop, seed, logprobs, ... as the protocol names them.
    """
    return _ask_all(client, prompts, lambda prompt: complete(client.api, model=model, prompt=prompt, **sampling))


def complete_by_any(
    clients: list[Client], model: str, prompts: list[str], **sampling
) -> Iterator[tuple[str, Completion]]:
    """As `complete_all`, by several servers of one model: whoever is free takes the next prompt. What a server that is
    gone has not answered goes to the others, with a warning; a server is gone if it cannot be reached, or fails at
    FAILURES_IN_A_ROW, too slow for them or otherwise. UserError when none is left, and for a prompt at which two
    servers failed."""
    if len(clients) == 1:
        yield from complete_all(clients[0], model, prompts, **sampling)
        return
    waiting, answers = queue.SimpleQueue(), queue.SimpleQueue()
    for prompt in dict.fromkeys(prompts):
        waiting.put(prompt)
    left, stop = len(dict.fromkeys(prompts)), threading.Event()
    gone: dict[str, UserError] = {}
    failed_at: dict[str, set[str]] = {}  # the servers that failed at a prompt
    in_a_row: dict[str, int] = {}
    addresses = {str(client.api.base_url) for client in clients}

    def work(client: Client) -> None:
        address = str(client.api.base_url)
        while not stop.is_set() and address not in gone:
            try:
                prompt = waiting.get(timeout=0.05)
            except queue.Empty:
                continue
            failed = failed_at.get(prompt, set())
            if address in failed and addresses - gone.keys() - failed:  # for another one
                waiting.put(prompt)
                time.sleep(0.05)
                continue
            try:
                answers.put((prompt, complete(client.api, model=model, prompt=prompt, **sampling)))
                in_a_row[address] = 0
            except (ServerGone, ServerFailed) as error:
                in_a_row[address] = in_a_row.get(address, 0) + 1
                if isinstance(error, ServerFailed):
                    failed_at.setdefault(prompt, set()).add(address)
                if len(failed_at.get(prompt, ())) > 1:
                    answers.put((prompt, error))  # the prompt's fault, not the servers'
                    continue
                waiting.put(prompt)
                is_gone = isinstance(error, ServerGone) or in_a_row[address] >= FAILURES_IN_A_ROW
                if is_gone and gone.setdefault(address, error) is error and len(gone) < len(addresses):
                    print(f"warning: {error}; the others go on", file=sys.stderr)
            except Exception as error:
                answers.put((prompt, error))
        answers.put(None)  # one worker less

    workers = [client for client in clients for _ in range(client.concurrency)]
    with ThreadPoolExecutor(len(workers)) as pool:
        try:
            for client in workers:
                pool.submit(work, client)
            working, failure = len(workers), None
            while left and working:
                answer = answers.get()
                if answer is None:
                    working -= 1
                elif isinstance(answer[1], Exception):
                    failure = failure or answer[1]
                    stop.set()  # what is under way is still handed over
                else:
                    left -= 1
                    yield answer
        finally:
            stop.set()
    if left:
        raise failure or list(gone.values())[-1]


def yes_probabilities(client: Client, model: str, texts: list[str]) -> Iterator[tuple[str, float]]:
    """(text, p(" yes") of its next token) by /v1/completions with logprobs, as each is done, in any order.

    How TruthfulQA asks its fine-tuned engines (https://github.com/sylinrl/TruthfulQA); texts end in "True:" or
    "Helpful:". UserError if the server gives no logprobs, or an engine that answers with neither yes nor no.
    """
    for text, completion in complete_all(client, model, texts, max_tokens=1, temperature=0, logprobs=5):
        logprobs = completion.choices[0].logprobs
        if not getattr(logprobs, "top_logprobs", None):
            raise UserError(
                f"{client.api.base_url}: gives no logprobs, which the score of {model} is; serve the judge "
                "with vLLM, or load it here by naming its folder or hub id as --judge"
            )
        try:
            likeliest = {str(token): float(p) for token, p in logprobs.top_logprobs[0].items()}
            if not all(p <= 1e-3 for p in likeliest.values()):  # but for rounding; NaN is not
                raise ValueError("no logarithms of probabilities")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{client.api.base_url}: the logprobs of {model} are not in OpenAI's format ({error})"
            ) from error
        yes, no = (
            max((min(math.exp(p), 1.0) for token, p in likeliest.items() if token.strip(" ▁") == word), default=0.0)
            for word in ("yes", "no")
        )
        if not yes and not no:
            raise UserError(
                f"--judge_model {model}: answers with {sorted(likeliest)}, neither yes nor no; it is not a "
                "truth or information judge"
            )
        yield text, yes


def complete(api: openai.OpenAI, **request) -> ChatCompletion | Completion:
    """One answer: a chat completion if the request has messages, else a legacy one. UserError for any failure."""
    create = api.chat.completions.create if "messages" in request else api.completions.create
    try:
        completion = create(**request)
    except (openai.APITimeoutError, openai.InternalServerError, openai.RateLimitError) as error:
        kind = ServerGone if never_connected(error) else ServerFailed
        raise kind(_explain(error, api, request["model"])) from error
    except openai.APIConnectionError as error:
        raise ServerGone(_explain(error, api, request["model"])) from error
    except (openai.APIError, ValueError) as error:  # not the body asked for
        raise UserError(_explain(error, api, request["model"])) from error
    except TypeError as error:  # from a configuration of the user's
        raise UserError(f"the request to {request['model']} is none of the openai package's: {error}") from error
    try:
        check_form(completion, chat="messages" in request)
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # the package takes whatever the body has
        raise UserError(_explain(error, api, request["model"])) from error
    if completion.model and not is_model(request["model"], completion.model):
        raise UserError(
            f"the server {api.base_url} asked for {request['model']}: answers as {completion.model!r}, another model; "
            "name that one if it is the one you want (what was answered is kept)"
        )
    return completion


def never_connected(error: Exception) -> bool:
    """Whether a time-out is one of connecting, which says nothing of the prompt. (The openai package's HTTP library has
    had several names.)"""
    return type(error.__cause__).__name__ == "ConnectTimeout"


def is_model(asked: str, answered: str) -> bool:
    """Whether a server's name of the model that answered is that of the one asked for: it may leave out or add the
    owner, and add a revision or the date of a snapshot."""

    def short(name: str) -> str:
        return name.rpartition("/")[2].partition("@")[0].casefold()

    return short(answered) == short(asked) or SNAPSHOT.sub("", short(answered)) == short(asked)


def check_form(completion: ChatCompletion | Completion, chat: bool) -> None:
    """ValueError, or another error of values, for a completion without a text, or whose parts are of other kinds."""
    answer, usage = completion.choices[0], completion.usage
    if chat and answer.message.content is None:  # a refusal, a call of a tool
        answer.message.content = ""
    text = answer.message.content if chat else answer.text
    if not isinstance(text, str):
        raise ValueError("no text")
    text.encode()  # or an error: half a character, which no file can hold
    if not isinstance(answer.finish_reason, str | None):
        raise ValueError("no finish_reason")
    if not isinstance(completion.model, str | None):
        raise ValueError("no model's name")
    if usage is not None and not isinstance(usage.completion_tokens, int):
        raise ValueError("no number of tokens")


def cost(model: str, texts: list[str], max_tokens: int, url: str) -> str:
    """One line for --dry_run: requests, tokens and price of asking for up to `max_tokens` on each text."""
    tokens_in, tokens_out = sum(math.ceil(len(text) / 4) for text in texts), max_tokens * len(texts)
    line = (
        f"{len(texts)} requests to {model} at {url}: about {tokens_in} tokens in (estimated as characters / 4) and "
        f"at most {tokens_out} out"
    )
    if not is_openai(url):
        return f"{line}; the price is that server's own"
    price = PRICES.get(model) or PRICES.get(SNAPSHOT.sub("", model))
    if price is None:
        return f"{line}; the price of {model} is not known here (those of {', '.join(PRICES)} are)"
    dollars = (tokens_in * price[0] + tokens_out * price[1]) / 1e6
    return f"{line}, at most about {dollars:.2f} USD by the prices of {PRICES_DATE}"


def _ask_all(client: Client, texts: list[str], ask: Callable[[str], object]) -> Iterator[tuple[str, object]]:
    """(text, ask(text)) as each is done. After a failure nothing more is asked; what is under way is still handed over
    (it may have cost money), and then the failure is raised."""
    stop, failure = threading.Event(), None

    def answer(text: str) -> tuple[str, object] | None:
        if stop.is_set():
            return None
        try:
            return text, ask(text)
        except Exception:
            stop.set()
            raise

    with ThreadPoolExecutor(client.concurrency) as pool:
        try:
            for future in as_completed([pool.submit(answer, text) for text in texts]):
                if future.exception() is not None:
                    failure = failure or future.exception()
                elif future.result() is not None:
                    yield future.result()
        finally:
            stop.set()  # also when the caller stops listening
    if failure is not None:
        raise failure


def _explain(error: Exception, api: openai.OpenAI, model: str) -> str:
    """One line: which server, what is wrong, what to do; never the key, whatever the server echoes."""
    if isinstance(error, openai.APITimeoutError) and not never_connected(error):
        problem = f"no whole answer within {api.timeout:g} s, {api.max_retries + 1} times; is it overloaded?"
    elif isinstance(error, openai.APIConnectionError):
        problem = f"cannot be reached, or hangs up ({error.__cause__ or error}); is it running?"
    elif isinstance(error, openai.APIStatusError):
        remedy = {
            openai.AuthenticationError: f"check {'OPENAI' if is_openai(str(api.base_url)) else 'SERVER'}_API_KEY",
            openai.PermissionDeniedError: f"this key may not use {model}",
            openai.NotFoundError: f"has it a model {model}, and does the address end in /v1?",
            openai.RateLimitError: f"still so after {api.max_retries} retries; wait, or lower --concurrency",
        }.get(type(error), "see its log")
        if 300 <= error.status_code < 400:
            remedy = (
                f"it sends elsewhere, to {error.response.headers.get('location')}: give that address if you trust it"
            )
        said = error.body.get("message") if isinstance(error.body, dict) else None
        problem = f"{error.status_code} {said or error.response.text[:300]}; {remedy}"
    else:
        problem = "its answer is not a completion in OpenAI's format; does the address end in /v1?"
    line = " ".join(f"the server {api.base_url} asked for {model}: {problem}".split())
    return line.replace(api.api_key, "***")[:600] + " (what was answered is kept)"
