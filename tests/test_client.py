"""The client against a server that misbehaves on purpose, and against a real one."""

import time

import openai
import pytest
from fake_server import FakeServer

from config import UserError
from evaluator.judges.cache import JudgementCache, judge_texts
from workspace.client import (
    Client,
    complete,
    complete_all,
    complete_by_any,
    cost,
    key_for,
    make_client,
    make_clients,
    yes_probabilities,
)

KEY = "sk-a-key-that-must-not-show"
TEXTS = [f"text {i}" for i in range(6)]
NO_NAME = b'{"choices": [{"text": "A", "finish_reason": "stop"}], "model": 5}'


def upper(request: dict) -> dict:
    return {"text": request["prompt"].upper()}


def ask_all(client: Client, model: str, texts: list[str]):
    """(text, its completion) for each."""
    return (
        (text, done.choices[0].text) for text, done in complete_all(client, model, texts, max_tokens=9, temperature=0)
    )


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("SERVER_API_KEY", KEY)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.05)
    with FakeServer(upper) as server:
        yield server


def client_of(server, concurrency=2, **settings) -> Client:
    return make_client(server.url, concurrency, **{"timeout_s": 0.5, "max_retries": 2, **settings})


def test_every_text_gets_its_own_answer(server):
    assert dict(ask_all(client_of(server, 4), "m", TEXTS)) == {text: text.upper() for text in TEXTS}
    assert {request["temperature"] for request in server.requests} == {0} and len(server.requests) == 6
    server.answer = lambda request: {"text": request["prompt"] + f" {request['max_tokens']}", "finish_reason": "length"}
    completions = dict(complete_all(client_of(server), "m", TEXTS, max_tokens=7, stop=["\n"]))
    assert [completions[text].choices[0].text for text in TEXTS] == [f"{text} 7" for text in TEXTS]
    assert completions[TEXTS[0]].choices[0].finish_reason == "length" and server.requests[-1]["stop"] == ["\n"]


@pytest.mark.parametrize("key", [KEY, None])
def test_what_the_environment_says_to_openai_goes_to_no_other_server(server, monkeypatch, key):
    monkeypatch.delenv("SERVER_API_KEY")
    if key:
        monkeypatch.setenv("SERVER_API_KEY", key)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.setenv("OPENAI_ORG_ID", "an organisation")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "a project")
    headers = "X-Api-Key: sk-secret\nAuthorization: Bearer sk-another\nContent-Type: application/json"
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", headers)
    assert dict(ask_all(client_of(server), "m", TEXTS[:1]))
    (sent,) = server.headers
    assert sent.get("authorization") == (f"Bearer {key}" if key else None)
    assert not {"openai-organization", "openai-project", "x-api-key"} & {*sent} and "sk-" not in str(
        {name: value for name, value in sent.items() if name != "authorization"}
    )


@pytest.mark.parametrize("fault", ["500", "half", "stall"])
def test_what_passes_is_retried(server, fault):
    server.faults = [fault]
    assert dict(ask_all(client_of(server), "m", TEXTS)) == {text: text.upper() for text in TEXTS}
    assert len(server.requests) == 7


def test_an_answer_that_comes_too_late_is_no_other_texts_answer(server):
    """It was given up and asked for again, when it comes."""
    server.faults = ["late 0.8", None, "late 0.8"]
    assert dict(ask_all(client_of(server), "m", TEXTS)) == {text: text.upper() for text in TEXTS}
    assert len(server.requests) == 8


def test_what_a_server_says_twice_is_no_other_texts_answer(server):
    """The second reply waits in the connection, where the next request would find it first."""
    server.faults = ["twice"] * 6
    assert dict(ask_all(client_of(server, 1), "m", TEXTS)) == {text: text.upper() for text in TEXTS}


@pytest.mark.parametrize("name", ["judge-2", "judge-1-mini", "judge-10", "org/other", "x\ny"])
def test_an_answer_of_another_model_is_refused(server, name):
    server.faults = [None, f"model {name}"]
    answers = []
    with pytest.raises(UserError, match="another model.*what was answered is kept") as error:
        for text, _ in ask_all(client_of(server, 1), "judge-1", TEXTS):
            answers.append(text)
    assert f"answers as {name!r}" in str(error.value) and len(answers) == 1 and len(server.requests) == 2


@pytest.mark.parametrize(
    "asked, answered",
    [
        ("gpt-4o", "gpt-4o-2024-08-06"),
        ("gpt-4", "gpt-4-0613"),
        ("openai/gpt-4o", "gpt-4o-2024-08-06"),
        ("org/Some-instruct", "org/Some-instruct@main"),
        ("some-instruct", "org/Some-instruct"),
    ],
)
def test_a_model_by_its_longer_name_is_itself(server, asked, answered):
    server.faults = [f"model {answered}"]
    assert list(ask_all(client_of(server), asked, ["a"])) == [("a", "A")]


def test_a_retry_waits_as_long_as_the_server_asks(server):
    server.faults = ["429"]
    start = time.monotonic()
    assert list(ask_all(client_of(server), "m", ["a"])) == [("a", "A")]
    assert time.monotonic() - start > 0.95 and len(server.requests) == 2


@pytest.mark.parametrize(
    "fault, tries, said",
    [
        ("500", 3, "500 no, Bearer ***"),
        ("half", 3, "hangs up"),
        ("stall", 3, "no whole answer within 0.2 s, 3 times"),
        ("not json", 1, "not a completion in OpenAI's format"),
        (b'{"id": "1"', 1, "not a completion in OpenAI's format"),
        ("401", 1, "check SERVER_API_KEY"),
        ("403", 1, "this key may not use judge-1"),
        ("404", 1, "a model judge-1"),
        ("400", 1, "400 no"),
    ],
)
def test_what_lasts_is_one_line_with_all_finished_judgements_kept(tmp_path, server, capfd, fault, tries, said):
    client = client_of(server, 1, timeout_s=0.2)
    cache = JudgementCache(tmp_path)

    def judge():
        return judge_texts(cache, "m", "1", TEXTS, lambda texts: ask_all(client, "judge-1", texts), "test")

    server.faults = [None, None, None] + [fault] * tries
    with pytest.raises(UserError, match="judge-1") as error:
        judge()
    line = str(error.value)
    assert said in line and "\n" not in line and server.url in line and KEY not in line
    assert len(server.requests) == 3 + tries
    server.requests.clear()
    assert judge() == [text.upper() for text in TEXTS]
    assert sorted(request["prompt"] for request in server.requests) == TEXTS[3:]
    assert judge() == [text.upper() for text in TEXTS] and len(server.requests) == 3
    out, err = capfd.readouterr()
    assert KEY not in out + err and KEY.encode() not in (tmp_path / "evaluation" / "judgements.sqlite").read_bytes()


@pytest.mark.parametrize("body", [b'{"choices": []}', b'{"choices": [{}]}', b"{}", b"[1]", b'"x"', NO_NAME])
def test_what_is_json_but_no_completion(server, body):
    server.faults = [body]
    with pytest.raises(UserError, match="not a completion in OpenAI's format"):
        list(ask_all(client_of(server), "m", ["a"]))


def test_a_request_that_the_protocol_does_not_know(server):
    with pytest.raises(UserError, match="unexpected keyword argument 'colour'"):
        list(complete_all(client_of(server), "m", ["a"], colour="red"))
    assert not server.requests


def test_too_many_requests_to_the_end(server):
    server.faults = ["429"] * 2
    with pytest.raises(UserError, match="still so after 1 retries; wait, or lower --concurrency"):
        list(ask_all(client_of(server, max_retries=1), "m", ["a"]))


def test_a_server_that_is_not_there():
    with pytest.raises(UserError, match="cannot be reached"):
        list(ask_all(make_client("http://127.0.0.1:9/v1", 1, max_retries=0), "m", ["a"]))


def test_what_is_under_way_at_a_failure_is_handed_over(server):
    """Two at a time: the second fails while the first is still being answered."""

    def answer(request):
        time.sleep(0.4 if request["prompt"] == "text 0" else 0.1)
        if request["prompt"] == "text 1":
            server.faults.append("401")
        return upper(request)

    server.answer = answer
    actual = []
    with pytest.raises(UserError, match="401"):
        for pair in ask_all(client_of(server, timeout_s=9), "m", TEXTS):
            actual.append(pair)
    assert ("text 0", "TEXT 0") in actual and len(server.requests) < 6


def test_a_caller_that_stops_listening_asks_no_more(server):
    actual = ask_all(client_of(server, 1), "m", [f"text {i}" for i in range(50)])
    next(actual)
    actual.close()
    assert len(server.requests) < 10


@pytest.fixture
def two_servers(monkeypatch):
    """Servers that say what they were asked; of each the prompts that it answered."""
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.05)
    answered = ([], [])

    def answer(number):
        def say(request):
            answered[number].append(request["prompt"])
            time.sleep(0.01)
            return {"text": request["prompt"].upper()}

        return say

    with FakeServer(answer(0)) as first, FakeServer(answer(1)) as second:
        yield (first, second), answered


def test_several_servers_share_the_prompts(two_servers):
    servers, answered = two_servers
    clients = make_clients(",".join(server.url for server in servers), 2, flag="server_url", max_retries=1)
    prompts = [f"prompt {i}" for i in range(40)]
    answers = dict((p, c.choices[0].text) for p, c in complete_by_any(clients, "m", prompts))
    assert answers == {prompt: prompt.upper() for prompt in prompts}
    assert sorted(answered[0] + answered[1]) == sorted(prompts) and min(map(len, answered)) >= 5


def test_what_a_server_that_is_killed_has_not_answered_goes_to_the_other(two_servers, capsys):
    """Nothing is lost, and nothing that was answered is asked again."""
    servers, answered = two_servers
    clients = make_clients(",".join(server.url for server in servers), 2, flag="server_url", max_retries=1)
    prompts, answers = [f"prompt {i}" for i in range(100)], []
    for prompt, completion in complete_by_any(clients, "m", prompts):
        answers.append((prompt, completion.choices[0].text))
        if len(answers) == 10:
            servers[0].faults += ["500"] * 1000  # from now on, whatever it is asked
    assert sorted(answers) == sorted((prompt, prompt.upper()) for prompt in prompts)
    asked_of_second = [request["prompt"] for request in servers[1].requests]
    done_by_first = {prompt for prompt, _ in answers} - set(asked_of_second)
    assert len(asked_of_second) == len(set(asked_of_second)) and done_by_first and len(asked_of_second) > 40
    assert capsys.readouterr().err.count("the others go on") == 1


def test_without_a_server_left_what_was_answered_is_kept(two_servers):
    servers, _ = two_servers
    clients = make_clients(",".join(server.url for server in servers), 2, flag="server_url", max_retries=1)
    answers = []
    with pytest.raises(UserError, match="what was answered is kept"):
        for prompt, _ in complete_by_any(clients, "m", [f"prompt {i}" for i in range(60)]):
            answers.append(prompt)
            if len(answers) == 10:
                for server in servers:
                    server.faults += ["500"] * 1000
    assert 10 <= len(answers) < 60 and len(set(answers)) == len(answers)


def test_a_prompt_at_which_two_servers_fail_ends_it_and_no_server_is_given_up(two_servers, capsys):
    servers, _ = two_servers
    for server in servers:
        rule = server.answer
        server.answer = lambda request, rule=rule: "500" if request["prompt"] == "bad" else rule(request)
    clients = make_clients(",".join(server.url for server in servers), 1, flag="server_url", max_retries=0)
    answers = []
    with pytest.raises(UserError, match="500"):
        for prompt, _ in complete_by_any(clients, "m", ["bad", *(f"prompt {i}" for i in range(9))]):
            answers.append(prompt)
    assert "bad" not in answers and "the others go on" not in capsys.readouterr().err
    assert [sum(request["prompt"] == "bad" for request in server.requests) for server in servers] == [1, 1]


def test_the_last_server_takes_the_prompt_at_which_it_failed(two_servers, capsys):
    """The other one, which the prompt waits for, goes."""
    servers, _ = two_servers
    first, second = servers
    clients = make_clients(",".join(server.url for server in servers), 1, flag="server_url", max_retries=0)
    first.answer, rule = (lambda request: "500" if first.requests[1:] == [] else rule(request)), first.answer

    def gone(request):
        while len(first.requests) < 2:  # until the first has failed, and goes on
            time.sleep(0.01)
        return "gone"

    second.answer = gone
    prompts = [f"prompt {i}" for i in range(6)]
    assert sorted(prompt for prompt, _ in complete_by_any(clients, "m", prompts)) == prompts
    assert capsys.readouterr().err.count("the others go on") == 1


def test_a_slow_prompt_is_the_prompts_fault_and_no_server_is_given_up(two_servers, capsys):
    servers, _ = two_servers
    for server in servers:
        rule = server.answer
        server.answer = lambda request, rule=rule: time.sleep(4) if request["prompt"] == "slow" else rule(request)
    clients = [make_client(server.url, 1, flag="server_url", timeout_s=2, max_retries=0) for server in servers]
    answers = []
    with pytest.raises(UserError, match="no whole answer within 2 s"):
        for prompt, _ in complete_by_any(clients, "m", ["slow", *(f"prompt {i}" for i in range(60))]):
            answers.append(prompt)
    assert len(answers) >= 20 and "the others go on" not in capsys.readouterr().err


@pytest.mark.parametrize("urls", [",", "http://127.0.0.1:1/v1,", "http://127.0.0.1:1/v1,http://127.0.0.1:1/v1/"])
def test_an_empty_address_or_one_twice_is_refused(urls):
    with pytest.raises(UserError, match="name each server once"):
        make_clients(urls, 1, flag="server_url")


def test_one_failure_gives_up_no_server(two_servers, capsys):
    servers, answered = two_servers
    servers[0].faults += ["500"] * 2  # one request and its retry
    clients = make_clients(",".join(server.url for server in servers), 1, flag="server_url", max_retries=1)
    prompts = [f"prompt {i}" for i in range(100)]
    assert sorted(prompt for prompt, _ in complete_by_any(clients, "m", prompts)) == sorted(prompts)
    assert capsys.readouterr().err == "" and min(len(set(done)) for done in answered) >= 5


def test_a_mistake_at_one_of_several_servers_ends_it(two_servers):
    servers, _ = two_servers
    servers[1].faults += ["404"] * 1000
    clients = make_clients(",".join(server.url for server in servers), 1, flag="server_url", max_retries=1)
    with pytest.raises(UserError, match="has it a model m"):
        list(complete_by_any(clients, "m", [f"prompt {i}" for i in range(60)]))
    with pytest.raises(UserError, match="name each server once"):
        make_clients(f"{servers[0].url},{servers[0].url}", 1, flag="server_url", max_retries=1)


def test_the_probability_of_yes(server):
    tops = {"a": {" yes": -0.5, " no": -1.0}, "b": {" no": -0.01, "\n": -5.0}, "c": {"▁yes": -0.25, "▁no": -3.0}}
    server.answer = lambda request: {"text": " ?", "logprobs": {"top_logprobs": [tops[request["prompt"]]]}}
    actual = dict(yes_probabilities(client_of(server), "ft:x", list(tops)))
    assert actual == pytest.approx({"a": 0.60653066, "b": 0.0, "c": 0.77880078})
    request = server.requests[0]
    assert (request["max_tokens"], request["temperature"], request["logprobs"]) == (1, 0, 5)
    tops["a"] = {" maybe": -0.1}
    with pytest.raises(UserError, match="neither yes nor no"):
        list(yes_probabilities(client_of(server), "ft:x", ["a"]))
    server.answer = lambda request: {"text": " yes"}
    with pytest.raises(UserError, match="gives no logprobs"):
        list(yes_probabilities(client_of(server), "ft:x", ["a"]))


def test_a_server_gets_its_own_key_or_none(monkeypatch, server):
    """OpenAI's key leaves for no other server, whichever way that is named."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openais-own")
    assert list(ask_all(client_of(server), "m", ["a"])) == [("a", "A")]
    assert server.keys == {f"Bearer {KEY}"}
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    list(ask_all(make_client(None, 1), "m", ["b"]))
    assert server.keys == {f"Bearer {KEY}"}
    server.keys.clear()
    monkeypatch.delenv("SERVER_API_KEY")
    assert list(ask_all(client_of(server), "m", ["c"])) == [("c", "C")]
    assert server.keys == {None}


def test_openai_gets_its_own_key(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("SERVER_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        make_client(None, 1)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openais-own")
    assert make_client(None, 1).api.api_key == "sk-openais-own"


@pytest.mark.parametrize("url", ["http://10.0.0.7/v1", "http://judge.example/v1", "http://localhost.example/v1"])
def test_a_key_goes_over_plain_http_to_this_machine_only(monkeypatch, url):
    monkeypatch.setenv("SERVER_API_KEY", KEY)
    with pytest.raises(UserError, match="would send the key over plain http") as error:
        make_client(url, 1)
    assert KEY not in str(error.value)
    assert key_for("http://localhost:8000/v1", "judge_url") == key_for("https://judge.example/v1", "judge_url") == KEY
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openais-own")
    with pytest.raises(UserError, match="over plain http"):
        make_client("http://api.openai.com/v1", 1)
    monkeypatch.delenv("SERVER_API_KEY")
    assert key_for(url, "judge_url") is None


def test_a_redirect_is_not_followed(server):
    """It would carry texts, and between ports of one host the key, to an address that nobody gave."""
    with FakeServer(upper) as other:
        server.faults = [f"redirect {other.url}/completions"]
        with pytest.raises(UserError, match=f"it sends elsewhere, to {other.url}/completions"):
            list(ask_all(client_of(server), "m", ["a"]))
        other.shutdown()
    assert other.requests == []


def test_addresses_are_checked():
    for url in ("localhost:8000", "ftp://x", "http://"):
        with pytest.raises(UserError, match="must be an address such as"):
            make_client(url, 1)
    for url in ("http://user:secret@localhost/v1", "http://secret@localhost/v1", "http://localhost/v1?key=secret"):
        with pytest.raises(UserError, match="--server_url: holds a user, password or query") as error:
            make_client(url, 1, flag="server_url", max_retries=1)
        assert "secret" not in str(error.value)


def test_what_a_dry_run_says():
    openai_url = "https://api.openai.com/v1"
    # 10 texts of 1000 tokens at 30 and of 100 at 60 USD per million: 0.30 + 0.06
    line = cost("gpt-4-0613", ["abcd" * 1000] * 10, 100, openai_url)
    assert "10 requests" in line and "about 10000 tokens in (estimated" in line and "at most 1000 out" in line
    assert "0.36 USD" in line
    assert "price of ft:davinci-002:org:truth:1 is not known" in cost(
        "ft:davinci-002:org:truth:1", ["a"], 1, openai_url
    )
    assert "price of gpt-4.1 is not known" in cost("gpt-4.1", ["a"], 1, openai_url)
    assert "that server's own" in cost("gpt-4", ["a"], 1, "http://localhost:8000/v1")


@pytest.mark.slow
def test_a_real_server_answers(real_server):
    url, model = real_server
    client = make_client(url, 2)
    asked = {"max_tokens": 5, "temperature": 0}
    first, again = (
        {text: answer.choices[0].text for text, answer in complete_all(client, model, TEXTS[:3], **asked)}
        for _ in range(2)
    )
    assert set(first) == set(TEXTS[:3]) and all(first.values()) and again == first
    chat = complete(client.api, model=model, messages=[{"role": "user", "content": "A fox"}], **asked)
    assert chat.choices[0].message.content and chat.usage.completion_tokens <= 5
    with pytest.raises(UserError, match="gives no logprobs"):
        list(yes_probabilities(client, model, ["Q: a\nA: b\nTrue:"]))
    with pytest.raises(UserError, match="400 .*detail.*; see its log"):  # its errors are not in OpenAI's format
        list(complete_all(client, "no-such-model", ["a"]))
