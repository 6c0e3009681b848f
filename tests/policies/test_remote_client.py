"""Requests to a chat API on this machine: faults, budget, cache, and a key that is written nowhere."""

import base64
import io
import json
import sys
import time
import traceback

import numpy as np
import pytest
from PIL import Image

from manako.policies.remote.client import RemoteClient, Reply, Request, check_settings
from manako.policies.remote.errors import RemoteError
from manako.policies.remote.ledger import DOLLAR, Ledger
from manako.policies.remote.pictures import data_url, most_tokens
from manako.policies.remote.settings import RemoteSettings
from tests.helpers.chat_server import ChatServer, Fault, completion, letters

pytest.importorskip("openai", reason="the extra `remote` is not installed")
KEY = "sk-secret/0123456789"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("manako.policies.remote.client.FIRST_WAIT", 0.01)


@pytest.fixture
def client(tmp_path):
    """Makes clients of a server, with the cache in the test's folder."""

    def make(server, **settings):
        options = {"remote_model": "m", "remote_cache": str(tmp_path / "cache"), "remote_timeout": 2.0, **settings}
        own = RemoteSettings(remote_url=server.url, **options)
        return RemoteClient(own, Ledger(own))

    return make


def request(text="go", **options):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": text}]}]
    return Request(messages, **{"most_tokens": 4, "temperature": 0.0, "image_tokens": 0, **options})


def scripted(*answers):
    """One after another, the last one for ever."""
    left = list(answers)
    return lambda body: left.pop(0) if len(left) > 1 else left[0]


def texts(replies):
    return [reply.text for reply in replies]


# ---- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "side", "factor"), [((24, 24), 336, 14), ((16, 40), 336, 21), ((64, 64), 32, 1)])
def test_a_frame_is_sent_whole_and_scaled_by_a_whole_factor(shape, side, factor):
    frame = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    head, data = data_url(frame, side).split(",")
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert head == "data:image/png;base64" and picture.shape == (shape[0] * factor, shape[1] * factor, 3)
    for row in range(factor):
        assert np.array_equal(picture[row::factor, factor - 1 - row :: factor], frame)


def test_the_bound_of_a_pictures_tokens_by_hand():
    assert most_tokens((24, 24, 3), 336) == 2833 + 5667  # 336 x 336: one tile
    assert most_tokens((24, 48, 3), 336) == 2833 + 2 * 5667  # 336 x 672: two


# ---- cache -----------------------------------------------------------------------------------------------------------


def test_what_was_answered_is_not_asked_again(client):
    with ChatServer(lambda body: body["messages"][1]["content"][0]["text"].upper()) as server:
        asks = [request("a"), request("b"), request("a"), request("a", seed=1), request("a", temperature=0.5)]
        assert texts(client(server).ask_all(asks)) == ["A", "B", "A", "A", "A"] and len(server.bodies) == 4
        again = client(server, remote_requests=0)
        assert texts(again.ask_all(asks)) == ["A", "B", "A", "A", "A"] and len(server.bodies) == 4
        assert again.ledger.read()["cached"] == 4 and again.ledger.read()["requests"] == 0
        client(server, remote_model="other").ask_all([request("a")])
        assert len(server.bodies) == 5 and server.bodies[-1]["model"] == "other"


@pytest.mark.parametrize("content", ['{"choices": [', "[]", '{"choices": []}'])
def test_a_damaged_file_is_asked_again(client, tmp_path, caplog, content):
    with ChatServer(scripted("up")) as server:
        client(server).ask_all([request()])
        files = [file for file in (tmp_path / "cache").rglob("*.json") if file.parent.name != "accounts"]
        files[0].write_text(content)
        assert texts(client(server).ask_all([request()])) == ["up"] and len(server.bodies) == 2
        assert "is sent again" in caplog.text and len(files) == 1
        assert json.loads(files[0].read_text())["choices"][0]["message"]["content"] == "up"


# ---- faults ----------------------------------------------------------------------------------------------------------

PASSING = {
    "429": Fault(429, '{"error": {"message": "slow down"}}', JSON),
    "500": Fault(500, "oops"),
    "cut": Fault(200, '{"choices": [', JSON, cut=True),
    "slow": Fault(200, "{}", JSON, seconds=0.6),
    "no JSON": Fault(200, "<html>welcome</html>"),
    "half JSON": Fault(200, '{"choices": [', JSON),
    "no choices": Fault(200, '{"choices": []}', JSON),
    "a list": Fault(200, "[1]", JSON),
    "null": Fault(200, '{"choices": [{"message": null}]}', JSON),
}


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_is_asked_again_and_counted(client, name):
    with ChatServer(scripted(PASSING[name], PASSING[name], "up")) as server:
        asking = client(server, remote_timeout=0.3)
        assert texts(asking.ask_all([request()])) == ["up"]
        assert len(server.bodies) == asking.ledger.read()["requests"] == 3


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_stays_ends_in_a_sentence(client, name):
    with ChatServer(scripted(PASSING[name])) as server:
        asking = client(server, remote_timeout=0.3, remote_retries=1)
        with pytest.raises(RemoteError, match=r"gave no answer in 2 attempts, the last time: .*; look at it, or give"):
            asking.ask_all([request()])
        assert len(server.bodies) == asking.ledger.read()["requests"] == 2


def test_a_server_that_is_not_there(client):
    with ChatServer(scripted("up")) as server:
        pass
    with pytest.raises(RemoteError, match=r"gave no answer in 2 attempts, the last time: Connect"):
        client(server, remote_retries=1).ask_all([request()])


@pytest.mark.parametrize(
    ("headers", "least"), [({"Retry-After": "0.4"}, 0.4), ({"Retry-After-Ms": "300"}, 0.3), ({"Retry-After": "x"}, 0.0)]
)
def test_the_wait_that_a_server_asks_for_is_kept(client, headers, least):
    with ChatServer(scripted(Fault(429, "slow down", headers), "up")) as server:
        start = time.monotonic()
        assert texts(client(server).ask_all([request()])) == ["up"]
        assert least <= time.monotonic() - start < least + 1.5


def test_a_wait_that_is_too_long_is_not_waited_for(client):
    with (
        ChatServer(scripted(Fault(429, "tomorrow", {"Retry-After": "86400"}))) as server,
        pytest.raises(RemoteError, match=r"asks to wait for 86,400 s"),
    ):
        client(server).ask_all([request()])


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (401, "bad key", r"refuses the key in OPENAI_API_KEY \(401: bad key\)"),
        (403, "no", r"answers 403 \(no\): expected a model that this key may use"),
        (404, "no model m", r"answers 404 \(no model m\).* --remote_model and --remote_url"),
        (400, "too wide", r"refuses the request \(400: too wide\)"),
        (429, '{"error": {"code": "insufficient_quota"}}', r"has no more quota"),
    ],
)
def test_a_fault_that_does_not_pass_ends_at_once(client, status, text, said):
    with ChatServer(scripted(Fault(status, text))) as server:
        with pytest.raises(RemoteError, match=said):
            client(server).ask_all([request()])
        assert len(server.bodies) == 1


def test_what_is_under_way_when_another_fails_is_kept(client):
    def answer(body):
        return Fault(401, "no") if body["messages"][1]["content"][0]["text"] == "bad" else completion("up")

    with ChatServer(lambda body: answer(body)) as server:
        asking = client(server, remote_concurrency=4)
        with pytest.raises(RemoteError, match="401"):
            asking.ask_all([request(text) for text in ("a", "b", "bad", "c")])
        assert len(server.bodies) == 4
        kept = client(server, remote_requests=0).ask_all([request(text) for text in ("a", "b", "c")])
        assert texts(kept) == ["up"] * 3


def test_a_refusal_a_filter_and_a_cut_answer_are_answers(client):
    refusal = completion(None, message={"content": None, "refusal": "I cannot"})
    filtered, cut = completion("", finish_reason="content_filter"), completion("u", finish_reason="length")
    with ChatServer(scripted(refusal, filtered, cut, "up")) as server:
        asking = client(server, remote_concurrency=1)
        said = asking.ask_all([request(str(number)) for number in range(4)])
    assert said[0] == Reply("I cannot", False, True, None) and said[1] == Reply("", False, True, None)
    assert said[2] == Reply("u", True, False, None) and said[3] == Reply("up", False, False, None)


# ---- what a server does not know -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_tokens", "seed", "temperature"])
def test_a_parameter_that_a_server_refuses_is_left_out_from_then_on(client, name, caplog):
    def answer(body):
        return Fault(400, f"Unsupported parameter: '{name}'") if name in body else "up"

    asked = request(seed=7, temperature=0.5)
    with ChatServer(answer) as server:
        assert texts(client(server).ask_all([asked])) == ["up"] and len(server.bodies) == 2
        assert caplog.text.count(f"is asked without {name}") == 1
        another = client(server)
        assert texts(another.ask_all([request("other", seed=7, temperature=0.5)])) == ["up"]
        assert len(server.bodies) == 3 and name not in server.bodies[-1]
        assert ("max_completion_tokens" in server.bodies[-1]) == (name == "max_tokens")
        another.ask_all([request("other", seed=8, temperature=0.5)])  # another draw is another sample
        assert len(server.bodies) == 4


def test_a_refusal_that_stays_ends(client):
    with ChatServer(scripted(Fault(400, "'max_tokens' and 'max_completion_tokens' and 'seed'"))) as server:
        with pytest.raises(RemoteError, match="refuses the request"):
            client(server).ask_all([request(seed=1)])
        assert len(server.bodies) == 3


@pytest.mark.parametrize("fault", [Fault(400, "'logprobs' is not supported"), completion("A")], ids=["said", "silent"])
def test_a_server_without_logprobs_is_known_by_then(client, fault):
    with ChatServer(scripted(fault)) as server:
        asked = [request(logprobs=True)]
        first = client(server)
        assert first.gives_logprobs and first.ask_all(asked) == [None] and not first.gives_logprobs
        assert client(server).ask_all(asked) == [None] and len(server.bodies) == 1
    with ChatServer(scripted(letters({"A": -0.1, "B": -3.0}))) as server:
        assert client(server).ask_all(asked)[0].top == [("A", -0.1), ("B", -3.0)]
        assert server.bodies[0]["logprobs"] is True and server.bodies[0]["top_logprobs"] == 20


# ---- budget ----------------------------------------------------------------------------------------------------------


def test_a_budget_of_requests_holds_with_16_threads(client):
    with ChatServer(lambda body: Fault(text=json.dumps(completion("up")), headers=JSON, seconds=0.02)) as server:
        asking = client(server, remote_requests=10, remote_concurrency=16)
        with pytest.raises(RemoteError, match=r"--remote_requests 10 is used up"):
            asking.ask_all([request(str(number)) for number in range(40)])
        assert len(server.bodies) == asking.ledger.read()["requests"] == 10 and server.most_at_once > 4
        kept = [file for file in asking.cache.folder.rglob("*.json") if file.parent.name != "accounts"]
        assert len(kept) == 10  # all that was paid


def test_a_budget_counts_every_attempt(client):
    with ChatServer(scripted(Fault(500, "oops"))) as server:
        with pytest.raises(RemoteError, match=r"--remote_requests 3 is used up"):
            client(server, remote_requests=3).ask_all([request()])
        assert len(server.bodies) == 3


def test_a_budget_of_dollars_holds_with_16_threads(client):
    """A prompt of 67 tokens at most (s, go: 3 bytes, 2 x 32) and 4 of an answer; the server counts 40 and 2.

    At 1 dollar a thousand tokens of prompt and 10 of answer: 0.107 at most, 0.06 in the end. Of 1 dollar 15 are paid
    with 0.9, and a further one might cost more than what is left.
    """
    prices = {"remote_input_price": 1000.0, "remote_output_price": 10_000.0}
    paid = Fault(text=json.dumps(completion("up", (40, 2))), headers=JSON, seconds=0.02)
    with ChatServer(lambda body: paid) as server:
        asking = client(server, remote_cost=1.0, remote_concurrency=16, **prices)
        assert asking.most_cost(request()) == round(0.107 * DOLLAR)
        asks, start = [request(f"{number:02}") for number in range(40)], time.monotonic()
        with pytest.raises(RemoteError, match=r"--remote_cost 1 is used up: \$0.9000 are spent in 15 requests"):
            asking.ask_all(asks)
        assert time.monotonic() - start < 3  # nothing is waited for that could make no room
        account = asking.ledger.read()
        assert len(server.bodies) == 15 and account["booked"] == 0 and account["spent"] == round(0.9 * DOLLAR)
        assert server.most_at_once <= 9  # 9 x 0.107 < 1 < 10 x 0.107


@pytest.mark.parametrize(
    ("fault", "paid"), [(Fault(500, "oops"), 1), (Fault(200, "{", JSON), 1), (Fault(429, "slow"), 0)]
)
def test_what_may_have_been_paid_counts_as_paid(client, fault, paid):
    prices = {"remote_input_price": 1.0, "remote_output_price": 1.0}
    with ChatServer(scripted(fault, completion("up", None))) as server:  # nor does its answer say what it cost
        asking = client(server, remote_cost=1.0, **prices)
        asking.ask_all([request()])
        assert asking.ledger.read()["spent"] == (1 + paid) * asking.most_cost(request())


def test_a_count_above_the_bound_ends_the_run(client):
    prices = {"remote_cost": 1.0, "remote_input_price": 1.0, "remote_output_price": 1.0}
    with ChatServer(scripted(completion("up", (100, 1)), completion("up", (10, 9)))) as server:
        with pytest.raises(
            RemoteError, match=r"100 tokens of a prompt where at most 67 .* --remote_image_tokens 33 or"
        ):
            client(server, **prices).ask_all([request()])
        with pytest.raises(RemoteError, match=r"9 tokens of an answer where 4 were asked for"):
            client(server, **prices).ask_all([request("or")])


def test_one_account_for_several_processes(client, tmp_path):
    with ChatServer(scripted("up")) as server:
        first = client(server, remote_requests=2)
        shared = RemoteClient(first.settings, Ledger(first.settings, first.ledger.file))
        first.ask_all([request("a")])
        shared.ask_all([request("b")])
        with pytest.raises(RemoteError, match="used up"):
            first.ask_all([request("c")])
        with pytest.raises(RemoteError, match=r"is not on this machine.*all rollout workers see"):
            Ledger(first.settings, tmp_path / "elsewhere.json")


# ---- settings and the key --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"remote_model": None}, "--remote_model is missing"),
        ({"remote_key": KEY}, "--remote_key names no environment variable"),
        ({"remote_key": "sk_abcdefghij"}, "--remote_key names no environment variable"),
        ({"remote_key": "NOT_SET"}, "The environment variable that --remote_key names is not set"),
        ({"remote_url": "localhost:8000"}, "--remote_url is no plain address"),
        ({"remote_url": f"https://me:{KEY}@host/v1"}, "--remote_url is no plain address"),
        ({"remote_url": f"https://host/v1?key={KEY}"}, "--remote_url is no plain address"),
        ({"remote_cost": 1.0}, "--remote_cost is 1, and the price of m is not known: give --remote_input_price"),
        ({"remote_cost": 1.0, "remote_input_price": 1.0}, "--remote_input_price and --remote_output_price"),
    ],
)
def test_settings_that_cannot_be_used(settings, said):
    with pytest.raises(RemoteError) as caught:
        check_settings(RemoteSettings(**{"remote_model": "m", **settings}))
    assert said in str(caught.value) and KEY not in str(caught.value) and "sk_abc" not in str(caught.value)


def test_a_key_is_needed_where_it_is(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    check_settings(RemoteSettings(remote_model="m", remote_url="http://localhost:1/v1"))
    with pytest.raises(RemoteError, match="OPENAI_API_KEY is not set"):
        check_settings(RemoteSettings(remote_model="m"))


def test_the_client_is_an_extra(client, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with ChatServer(scripted("up")) as server, pytest.raises(RemoteError, match=r"needs the package openai.*remote"):
        client(server)


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RemoteError, match="--remote_cache .* cannot be written to"):
        Ledger(RemoteSettings(remote_cache=str(tmp_path / "file")))


ESCAPED = KEY.replace("/", "\\/")


@pytest.mark.parametrize(
    "echo",
    [
        Fault(401, json.dumps({"error": {"message": f"Incorrect key {KEY}"}}), JSON),
        Fault(401, f'{{"error": "{ESCAPED}"}}', JSON),
        Fault(400, f"bad {KEY} and {ESCAPED}"),
        Fault(500, KEY),
        Fault(200, f"<html>{KEY}</html>"),
        Fault(200, f'{{"choices": [{{"message": {{"content": "{ESCAPED}"}}}}], "{ESCAPED}": "{KEY}"}}', JSON),
    ],
)
def test_a_key_that_a_server_sends_back_goes_nowhere(client, tmp_path, caplog, echo):
    with ChatServer(scripted(echo)) as server:
        said = ""
        try:
            said = str(client(server, remote_retries=1).ask_all([request()]))
        except RemoteError as error:
            said = "".join(traceback.format_exception(error))
        assert server.keys[0] == f"Bearer {KEY}" and "<key>" in said
    written = "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    assert all(form not in said + caplog.text + written for form in (KEY, ESCAPED, "0123456789")) and written
