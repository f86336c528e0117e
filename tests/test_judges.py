import contextlib
import dataclasses
import email.utils
import html.parser
import http.server
import json
import os
import pathlib
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import scipy.optimize

from conftest import longer
from prefalign_jax import commands
from prefalign_jax.files import locked
from prefalign_jax.generation.sample_files import Sample, write_jsonl
from prefalign_jax.judges import endpoint as endpoint_module
from prefalign_jax.judges import page as page_module
from prefalign_jax.judges import reward_model, rewards, scoring
from prefalign_jax.judges.cache import open_cache
from prefalign_jax.judges.endpoint import endpoint, fill, read_reply
from prefalign_jax.judges.judge import (
    Comparison,
    Scores,
    Verdict,
    by_reward,
    pair_samples,
    read_verdicts,
    write_verdicts,
)
from prefalign_jax.judges.win_rate import fit_logistic, length_controlled, win_rate
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.models.hf_io import save_params
from prefalign_jax.types import UserError
from small import CONFIG as SMALL

ROOT = pathlib.Path(__file__).parents[1]
KEY = "sk-very-secret-123"
LONG, SHORT = "a long good answer", "short"


def comparisons(count=3):
    return [Comparison(f"prompt {i}", f"{LONG} {i}", f"{SHORT} {i}", str(i)) for i in range(count)]


# Samples side by side, and judges by reward


def test_samples_meet_by_id_else_by_prompt_the_kth_with_the_kth_and_the_rest_is_counted():
    first = [Sample("p", "1", "a"), Sample("p", "2", "a"), Sample("q", "3", "a", "7"), Sample("r", "4", "a", "8")]
    second = [Sample("q", "x", "b", "7"), Sample("p", "y", "b"), Sample("p", "z", "b"), Sample("s", "w", "b", "8")]
    second.append(Sample("p", "v", "b"))
    found, dropped = pair_samples(first + [Sample("t", "5", "a")], second)
    assert [(c.prompt, c.first, c.second) for c in found] == [("p", "1", "y"), ("p", "2", "z"), ("q", "3", "x")]
    assert dropped == {"prompts differ": 1, "only in the first": 1, "only in the second": 1}
    assert len({c.id for c in found}) == 3


def test_the_higher_score_wins_equal_ones_tie_and_a_missing_one_is_lost_with_its_reason():
    table = {"good": 2.0, "fair": 1.0, "same": 1.0, "none": np.nan}

    def score(prompts, responses):
        return Scores(np.array([table[r] for r in responses]), ["broken" if r == "none" else "" for r in responses])

    pairs = [("good", "fair"), ("fair", "good"), ("fair", "same"), ("good", "none"), ("none", "good")]
    verdicts = by_reward(score)([Comparison("p", *pair) for pair in pairs])
    assert [(v.preference, v.reason) for v in verdicts] == [
        (1.0, ""),
        (0.0, ""),
        (0.5, ""),
        (None, "broken"),
        (None, "broken"),
    ]
    assert verdicts[1].scores == (1.0, 2.0)


@pytest.mark.parametrize(
    ("name", "options", "response", "value"),
    [
        ("fewer_words", {}, "Two words.", -2),
        ("more_words", {}, "Don't count: three", 3),
        ("more_words", {}, "", 0),
        ("distinct", {}, "a b a b a", 2 / 4),
        ("distinct", {"n": 1}, "a b a b a", 2 / 5),
        ("distinct", {}, "alone", 0),
        ("kindness", {}, "The kind dog hugged a sad cat.", (2 - 1) / 7),
        ("kindness", {}, "", 0),
        ("matches", {"pattern": "^Once"}, "Once upon", 1),
        ("matches", {"pattern": "^Once"}, "At once", 0),
    ],
)
def test_rewards_are_what_they_say(name, options, response, value):
    assert rewards.scorer(name, **options)(["p"], [response]).values == pytest.approx([value])


def test_no_word_is_both_kind_and_unkind():
    assert rewards.KIND and rewards.UNKIND and not rewards.KIND & rewards.UNKIND


def test_a_reward_of_ones_own_has_options_and_may_have_no_value(monkeypatch):
    def mine(prompt, response, *, scale=1.0):
        return float("nan") if response == "bad" else scale * len(response) + len(prompt)

    monkeypatch.setitem(rewards.REWARDS, "mine", mine)
    values, reasons = rewards.scorer("mine", scale=2.0)([[{"role": "user", "content": "abc"}]] * 2, ["xy", "bad"])
    assert values[0] == 7 and np.isnan(values[1]) and reasons == ["", "the reward is nan"]
    with pytest.raises(UserError, match="no hyper-parameter 'scal'; did you mean 'scale'"):
        rewards.scorer("mine", scal=1.0)
    with pytest.raises(UserError, match="reward='mne' is unknown; did you mean 'mine'"):
        rewards.scorer("mne")


# A trained reward model

CONFIG = dataclasses.replace(SMALL, vocab_size=384, max_position=64, reward=True)


@pytest.fixture(scope="module")
def reward_directory(tmp_path_factory, tiny_tokenizer):
    directory = tmp_path_factory.mktemp("reward") / "export"
    params = make_decoder(CONFIG).init(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * np.random.default_rng(1).normal(size=x.shape).astype(x.dtype), params)
    save_params(params, CONFIG, directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory, params


def test_a_reward_models_scores_are_those_of_each_text_alone(reward_directory, tiny_tokenizer, tmp_path):
    """One row a text, no packing, no padding: the head on the hidden state of the end-of-sequence token."""
    directory, params = reward_directory
    prompts = ["The policy", "Is the sky blue?", [{"role": "user", "content": "Tea?"}], "x", "The policy"]
    responses = [" should prefer", "Yes.", "Boil the water.", "word " * 80, ""]
    score = reward_model.scorer(directory, tmp_path / "scores.jsonl", batch_size=2)
    values, reasons = score(prompts, responses)
    model = make_decoder(CONFIG)

    @jax.jit
    def rewards_at(params, tokens):
        """[64] what the head says at every position of one row; what lies beyond the text is not seen from within."""
        ones, places = np.ones((1, 64), np.int32), np.arange(64)[None]
        return (model.hidden(params, tokens, places, ones, 0 * ones) @ model.head(params)[0])[0]

    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if i == 3:
            assert np.isnan(values[i]) and reasons[i] == "too long for the reward model"
            continue
        if isinstance(prompt, str):
            ids = tiny_tokenizer(prompt + response).input_ids + [tiny_tokenizer.eos_token_id]
        else:
            text = tiny_tokenizer.apply_chat_template(
                [*prompt, {"role": "assistant", "content": response}], tokenize=False
            )
            ids = tiny_tokenizer(text.rstrip("\n")).input_ids
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(ids)] = ids
        expected = rewards_at(params, tokens)[len(ids) - 1]
        assert values[i] == pytest.approx(float(expected), rel=1e-4, abs=1e-5)
        assert reasons[i] == ""
    assert np.nanstd(values) > 0.1, "the scores are put to no test"


def test_finished_scores_are_not_computed_again(reward_directory, tmp_path, monkeypatch):
    directory, _ = reward_directory
    cache = tmp_path / "scores.jsonl"
    before = reward_model.scorer(directory, cache)(["a", "b"], ["x", "y"]).values

    def no_batches(data):
        raise AssertionError("computed again")

    monkeypatch.setattr(scoring, "eval_batches", no_batches)
    again = reward_model.scorer(directory, cache)
    np.testing.assert_array_equal(again(["b", "a"], ["y", "x"]).values, before[::-1])
    with pytest.raises(AssertionError, match="computed again"):
        again(["a"], ["z"])
    with pytest.raises(AssertionError, match="computed again"):  # another computation has other numbers
        reward_model.scorer(directory, cache, dtype="bfloat16")(["a"], ["x"])


def test_a_language_model_is_no_judge(tmp_path, tiny_tokenizer):
    config = dataclasses.replace(CONFIG, reward=False)
    save_params(make_decoder(config).init(jax.random.key(0)), config, tmp_path / "lm")
    with pytest.raises(UserError, match="is a language model, not a reward model"):
        reward_model.scorer(tmp_path / "lm")


# The endpoint: a server in a thread, told what to do with each request


class Server:
    """`answer(question, number, headers)` -> (status, headers, body) None to say nothing in time, () to hang up."""

    def __init__(self):
        self.answer, self.requests, self.lock = prefers_long, [], threading.Lock()
        self.released = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((time.monotonic(), self.path, dict(self.headers), body))
                    number = len(outer.requests)
                found = outer.answer(body["messages"][0]["content"], number, self.headers)
                if found is None:
                    outer.released.wait(10)
                if not found:
                    return
                status, headers, text = found
                data = text.encode()
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(data)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def reply(content, finish="stop", **message):
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return 200, {"Content-Type": "application/json"}, json.dumps({"choices": [choice], "usage": usage})


def prefers_long(question, number, headers):
    shown_first = re.search(r"<answer_A>\n(.*?)\n</answer_A>", question, re.DOTALL)[1]
    return reply("Because.\nVerdict: " + ("A" if shown_first.startswith(LONG) else "B"))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    yield server
    server.close()


@pytest.fixture
def ask(server, tmp_path):
    """ask(comparisons, **options) -> verdicts, through the same cache file each time."""

    def run(asked, **options):
        options = {"model": "judge", "backoff": 0.01, "timeout": 5.0, "threads": 1, "retries": 2, **options}
        return endpoint(server.url, tmp_path / "replies.jsonl", **options)(asked)

    return run


def outcomes(verdicts):
    return [v.reason if v.preference is None else v.preference for v in verdicts]


def test_both_orders_are_asked_and_the_request_is_the_documented_one(server, ask):
    verdicts = ask(comparisons(2), body='{"temperature": 0, "max_tokens": 9}')
    assert [(v.preference, v.orders) for v in verdicts] == [(1.0, (1.0, 1.0))] * 2
    assert len(server.requests) == 4
    _, path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert {k: v for k, v in body.items() if k != "messages"} == {"model": "judge", "temperature": 0, "max_tokens": 9}
    assert [m["role"] for m in body["messages"]] == ["user"] and "Authorization" not in headers
    assert "prompt 0" in body["messages"][0]["content"]


def test_a_judge_that_looks_at_the_position_alone_is_found_out(server, ask):
    server.answer = lambda *_: reply("Verdict: A")
    result = win_rate(ask(comparisons(5)))
    assert (result.rate.mean, result.ties, result.inconsistent, result.shown_first) == (0.5, 5, 1.0, 1.0)


def test_many_threads_keep_verdicts_with_their_comparisons(server, ask):
    def slowly(question, number, headers):
        time.sleep(0.002 * (number % 5))
        return prefers_long(question, number, headers)

    server.answer = slowly
    asked = [c if i % 3 else c._replace(first=c.second, second=c.first) for i, c in enumerate(comparisons(12))]
    verdicts = ask(asked, threads=6)
    assert [v.comparison for v in verdicts] == asked
    assert outcomes(verdicts) == [float(bool(i % 3)) for i in range(12)]


def test_equal_responses_tie_without_a_request(server, ask):
    assert outcomes(ask([Comparison("p", "same", "same")])) == [0.5]
    assert server.requests == []


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_asked_again(server, ask, status):
    failing = (status, {}, "no")
    server.answer = lambda q, number, h: failing if number <= 2 else prefers_long(q, number, h)
    assert outcomes(ask(comparisons(1))) == [1.0]
    assert len(server.requests) == 4


def test_retry_after_is_waited_for_and_backoff_grows(server, ask):
    def answer(question, number, headers):
        if number == 1:
            return 429, {"Retry-After": "0.4"}, ""
        if number == 2:
            return 503, {"Retry-After": email.utils.formatdate(time.time() - 5, usegmt=True)}, ""
        return prefers_long(question, number, headers)

    server.answer = answer
    assert outcomes(ask(comparisons(1), backoff=0.05)) == [1.0]
    times = [entry[0] for entry in server.requests]
    assert 0.4 <= times[1] - times[0] < 2
    assert 0.05 <= times[2] - times[1] < 0.4  # 2 * backoff, times 0.5 to 1.5


def test_a_server_that_wants_too_long_a_wait_is_not_waited_for(server, ask):
    server.answer = lambda *_: (429, {"Retry-After": "86400"}, "")
    began = time.monotonic()
    assert outcomes(ask(comparisons(1))) == ["HTTP 429"]
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("answer", "reason", "requests"),
    [
        (None, "timeout", 3),
        ((500, {}, ""), "HTTP 500", 3),
        ((200, {}, "{not json"), "malformed reply", 3),
        ((200, {}, '{"choices": []}'), "malformed reply", 3),
        ((200, {}, '{"choices": [{"message": {"content": [1]}}]}'), "malformed reply", 3),
        ((), "connection broken", 3),
        ((200, {"Content-Length": "100"}, '{"choices": ['), "malformed reply", 3),
        ((400, {}, '{"error": {"message": "too\\nlong"}}'), "HTTP 400: too long", 1),
        ((302, {"Location": "http://elsewhere.invalid/"}, ""), "HTTP 302", 1),
        (reply("I like both."), "no verdict in the reply", 1),
        (reply("Verdict: A or maybe B"), "no verdict in the reply", 1),
        (reply("Verdict: A\nThat is all."), "no verdict in the reply", 1),
        (reply(""), "no verdict in the reply", 1),
        (reply("Let me think", finish="length"), "reply cut off", 1),
        (reply(None, refusal="I will not."), "refused", 1),
        (reply(None, finish="content_filter"), "refused", 1),
    ],
)
def test_one_bad_answer_costs_its_own_verdict_and_no_other(server, ask, answer, reason, requests):
    def sometimes(question, number, headers):
        return answer if "prompt 1" in question and f"A>\n{LONG}" in question else prefers_long(question, 0, headers)

    server.answer = sometimes
    verdicts = ask(comparisons(3), timeout=0.3)
    assert outcomes(verdicts) == [1.0, reason, 1.0]
    assert len(server.requests) == 5 + requests
    result = win_rate(verdicts)
    assert (result.wins, result.lost) == (2, {reason: 1})


STATUS, LENGTH = b"HTTP/1.1 200 OK\r\n", b"Content-Length: 1000\r\n\r\n"
DRIPPED = {  # what a server sends, and then again and again
    "nothing": (b"", b""),
    "a status line": (b"", b"H"),
    "headers": (STATUS, b"A"),
    "many headers": (STATUS, b"A: b\r\n"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a body": (STATUS + LENGTH, b" "),
    "a body without length": (STATUS + b"\r\n", b" "),
    "no body": (STATUS + LENGTH, b""),
    "an error's body": (b"HTTP/1.1 400 No\r\n" + LENGTH, b" "),
}


@pytest.mark.parametrize("proxy", [False, longer(True)], ids=["direct", "proxy"])
@pytest.mark.parametrize("dripped", [name if name in ("headers", "a body") else longer(name) for name in DRIPPED])
def test_an_exchange_ends_at_its_deadline_whatever_the_server_sends(tmp_path, monkeypatch, dripped, proxy):
    first, again = DRIPPED[dripped]
    over = threading.Event()

    class Drips(socketserver.BaseRequestHandler):
        def handle(self):
            with contextlib.suppress(OSError):
                self.request.recv(2**16)
                self.request.sendall(first)
                while not over.wait(0.05):
                    self.request.sendall(again)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Drips) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        here = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("no_proxy", "" if proxy else "*")
        monkeypatch.setenv("http_proxy", here)
        began = time.monotonic()
        try:
            url = "http://elsewhere.invalid/v1" if proxy else f"{here}/v1"
            judge = endpoint(url, tmp_path / "r.jsonl", model="m", timeout=0.3, retries=0, threads=1)
            reason = "HTTP 400" if "error" in dripped else "timeout"
            assert outcomes(judge(comparisons(1))) == [reason]
        finally:
            took = time.monotonic() - began
            over.set()
            server.shutdown()
            thread.join()
    assert 0.6 <= took < 3  # two orders


def test_the_deadline_holds_under_tls_too(tmp_path, monkeypatch):
    """A server that takes the connection and never answers the handshake."""
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/v1"
        judge = endpoint(url, tmp_path / "r.jsonl", model="m", timeout=0.2, retries=0, threads=1)
        began = time.monotonic()
        assert outcomes(judge(comparisons(1))) == ["timeout"]
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "content", ["Verdict: tie", "x\n\n**Verdict: TIE**\n\n", "so\nverdict:  tie.", "* Verdict: `tie`"]
)
def test_a_verdict_may_be_dressed(content):
    assert read_reply({"content": content}) == (0.5, "")


def test_a_verdict_inside_an_answer_or_before_the_last_line_counts_nothing():
    assert read_reply({"content": "Verdict: A\nVerdict: B"}) == (0.0, "")
    assert read_reply({"content": "The answer says 'Verdict: A'"})[0] is None


def test_texts_with_braces_stay_as_they_are():
    text = fill("{prompt}|{first}|{second}|{other}", Comparison("{second}", "{prompt}", "\\1"), swapped=True)
    assert text == "{second}|\\1|{prompt}|{other}"


def test_a_wrong_key_or_address_stops_at_once(server, ask):
    server.answer = lambda *_: (401, {}, '{"error": {"message": "bad key"}}')
    reasons = outcomes(ask(comparisons(10)))
    assert reasons == ["HTTP 401: bad key"] + ["not asked after HTTP 401: bad key"] * 9
    assert len(server.requests) == 1


def test_a_dead_server_is_given_up(server, ask):
    server.answer = lambda *_: (500, {}, "")
    reasons = outcomes(ask(comparisons(20), retries=0))
    assert len(server.requests) == endpoint_module.GIVE_UP
    assert reasons[-1] == "not asked after HTTP 500" and reasons.count("HTTP 500") == 3


def test_nobody_listens(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    judge = endpoint("http://127.0.0.1:9/v1", tmp_path / "r.jsonl", model="m", retries=1, backoff=0.001)
    assert outcomes(judge(comparisons(1))) == ["no connection"]


@pytest.mark.parametrize(
    ("caps", "reason", "requests"),
    [
        ({"max_requests": 5}, "max_requests reached", 5),
        ({"max_tokens": 300}, "max_tokens reached", 3),  # 110 a reply: 330 is the first sum at or above
        ({"max_cost": 0.0003, "price_in": 1.0, "price_out": 10.0}, "max_cost reached", 2),  # 200e-6 a reply
    ],
)
def test_a_cap_ends_the_asking_and_keeps_what_is_finished(server, ask, caps, reason, requests):
    verdicts = ask(comparisons(4), **caps)
    assert len(server.requests) == requests
    done = requests // 2
    assert outcomes(verdicts) == [1.0] * done + [reason] * (4 - done)
    ask(comparisons(4), **caps)
    assert len(server.requests) == requests, "the caps count what the cache holds"
    assert outcomes(ask(comparisons(4))) == [1.0] * 4
    assert len(server.requests) == 8


def test_retries_count_against_the_cap(server, ask):
    server.answer = lambda *_: (500, {}, "")
    assert outcomes(ask(comparisons(2), max_requests=3, retries=9)) == ["max_requests reached"] * 2
    assert len(server.requests) == 3


def test_a_cap_that_cannot_be_held_stops(server, ask):
    without = json.dumps({"choices": [{"message": {"content": "Verdict: A"}}]})
    server.answer = lambda *_: (200, {}, without)
    [reason, *_] = set(outcomes(ask(comparisons(3), max_tokens=1000)))
    assert "reports no usage" in reason and len(server.requests) == 1
    assert outcomes(ask(comparisons(3))) == [0.5] * 3


# The cache


def test_a_finished_reply_is_not_asked_again_whatever_else_is(server, ask):
    ask(comparisons(3))
    server.requests.clear()
    assert outcomes(ask(comparisons(3), threads=3)) == [1.0] * 3 and server.requests == []
    assert outcomes(ask([comparisons(1)[0]._replace(first=comparisons()[0].second, second=comparisons()[0].first)]))
    assert server.requests == [], "the same two texts the other way round are the same two questions"
    for change in (
        {"model": "other"},
        {"template": "{prompt} <answer_A>\n{first}\n</answer_A> {second} Verdict: A, Verdict: B"},
        {"body": '{"temperature": 1}'},
    ):
        server.requests.clear()
        ask(comparisons(1), **change)
        assert len(server.requests) == 2, change


def test_a_nonsense_reply_is_kept_and_a_failure_is_asked_again(server, ask):
    server.answer = lambda *_: reply("Hm.")
    ask(comparisons(1))
    server.requests.clear()
    assert outcomes(ask(comparisons(1))) == ["no verdict in the reply"] and server.requests == []
    server.answer = lambda *_: (500, {}, "")
    assert outcomes(ask(comparisons(2)))[1] == "HTTP 500"
    server.answer = prefers_long
    assert outcomes(ask(comparisons(2))) == ["no verdict in the reply", 1.0]


def test_a_line_cut_short_loses_itself_alone(server, ask, tmp_path):
    ask(comparisons(2))
    path = tmp_path / "replies.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-25])
    server.requests.clear()
    assert outcomes(ask(comparisons(3))) == [1.0] * 3
    assert len(server.requests) == 3
    server.requests.clear()
    assert outcomes(ask(comparisons(3))) == [1.0] * 3 and server.requests == []


def test_one_process_at_a_time(tmp_path):
    with open_cache(tmp_path / "c.jsonl"), pytest.raises(UserError, match="another process is writing there"):
        with open_cache(tmp_path / "c.jsonl"):
            pass


def test_a_killed_run_goes_on_where_it_was(server, tmp_path):
    """SIGKILL while requests are out; the second run asks what the first has not finished, and nothing else."""
    code = (
        "import sys; from prefalign_jax.judges.endpoint import endpoint; from prefalign_jax.judges.judge import *\n"
        "judge = endpoint(sys.argv[1], sys.argv[2], model='m', threads=2)\n"
        f"asked = [Comparison(f'prompt {{i}}', f'{LONG} {{i}}', f'{SHORT} {{i}}', str(i)) for i in range(6)]\n"
        "print([v.preference for v in judge(asked)])"
    )
    reached, finished = threading.Event(), []

    def answer(question, number, headers):
        if number > 7 and not finished:
            reached.set()
            return None
        return prefers_long(question, number, headers)

    server.answer = answer
    command = [sys.executable, "-c", code, server.url, str(tmp_path / "r.jsonl")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as first:
        assert reached.wait(60)
        time.sleep(0.2)
        os.kill(first.pid, signal.SIGKILL)
    kept = len((tmp_path / "r.jsonl").read_text().splitlines())
    assert 6 <= kept <= 7
    finished.append(True)
    server.requests.clear()
    second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert second.stdout == "[1.0, 1.0, 1.0, 1.0, 1.0, 1.0]\n"
    assert len(server.requests) == 12 - kept


# The key


def test_the_key_goes_to_the_server_and_nowhere_else(server, ask, tmp_path, monkeypatch, capfd):
    def echoing(question, number, headers):
        if number == 1:
            return 500, {}, headers["Authorization"]
        if "prompt 1" in question:
            return 400, {}, json.dumps({"error": {"message": f"wrong: {headers['Authorization']}"}})
        return reply(f"You sent {headers['Authorization']}.\nVerdict: A")

    monkeypatch.setenv("JUDGE_KEY", KEY + "\n")
    server.answer = echoing
    verdicts = ask(comparisons(2), key_env="JUDGE_KEY")
    assert {entry[2]["Authorization"] for entry in server.requests} == {f"Bearer {KEY}"}
    assert outcomes(verdicts) == [0.5, "HTTP 400: wrong: Bearer [key]"]
    write_verdicts(tmp_path / "verdicts.jsonl", verdicts)
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "You sent Bearer [key]" in written
    for text in (written, *capfd.readouterr(), repr(verdicts)):
        assert KEY not in text and "very-secret" not in text


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (KEY, None, "the NAME of an environment variable"),
        ("verysecret123", None, "the NAME of an environment variable"),
        ("JUDGE_KEY", None, "JUDGE_KEY is not set"),
        ("JUDGE_KEY", "very secret", "holds something else than a key"),
    ],
)
def test_a_key_in_the_wrong_place_is_not_shown(tmp_path, monkeypatch, name, value, says):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(UserError, match=says) as error:
        endpoint("http://127.0.0.1:9/v1", tmp_path / "r.jsonl", model="m", key_env=name)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"base_url": "localhost:8000"}, "expected a URL such as"),
        ({"base_url": "http://me:secret@host/v1"}, "holds a user name or password"),
        ({"model": ""}, "no model named"),
        ({"template": "{prompt} {first}"}, "the template has no {second}"),
        ({"template": "{prompt} {first} {second} Say [[A]] or [[B]]."}, "does not ask for 'Verdict: A'"),
        ({"template": "{prompt} {first} {second} Verdict: [[A]] or Verdict: [[B]]"}, "does not ask for 'Verdict: A'"),
        ({"template": "{prompt} {first} {second} Verdict: A or Verdict: Both"}, "does not ask for 'Verdict: B'"),
        ({"template": "{prompt} {first} {second} Your verdict is: A or B"}, "does not ask for 'Verdict: A'"),
        ({"threads": 0}, "threads=0 is out of range"),
        ({"timeout": 0.0}, "timeout=0.0 is out of range"),
        ({"max_cost": 1.0}, "max_cost applies with prices"),
        ({"body": "temperature=0"}, "expected a JSON object"),
        ({"body": '{"model": "x"}'}, "without model"),
    ],
)
def test_endpoint_options_are_checked(tmp_path, options, says):
    options = {"base_url": "http://host/v1", "model": "m", **options}
    with pytest.raises(UserError, match=re.escape(says)) as error:
        endpoint(options.pop("base_url"), tmp_path / "r.jsonl", **options)
    assert "secret" not in str(error.value)


SPELLED = {  # a key, and how a reply may spell it
    "sk/very+secret-1": ["sk/very+secret-1", "sk\\/very+secret-1", "sk%2Fvery%2bsecret-1", "sk\\\\/very+secret-1",
                         "".join(f"\\u00{ord(c):02X}" for c in "sk/very+secret-1"), "\\u0073k/very\\u002bsecret-1",
                         "sk%252Fvery%252bsecret-1", "\\\\x73k/very\\\\x2Bsecret-1",
                         "".join(f"&#{ord(c)};" for c in "sk/very+secret-1"), "sk&#x2F;very&#x02b;secret-1"],
    'k"e\\y': ['k\\"e\\\\y', 'k\\u0022e\\u005cy', 'k&quot;e\\\\y', 'k&#34;e&#92;y'],
}  # fmt: skip


@pytest.mark.parametrize(("key", "spelled"), [(key, one) for key, some in SPELLED.items() for one in some])
@pytest.mark.parametrize("where", ["content", "error", "refusal", "finish"])
def test_the_key_is_removed_however_a_reply_spells_it(server, ask, tmp_path, monkeypatch, key, spelled, where):
    monkeypatch.setenv("JUDGE_KEY", key)
    texts = {name: "echo SPELLED end" if name == where else "" for name in ("content", "error", "refusal", "finish")}
    choice = {"finish_reason": texts["finish"], "message": {"content": texts["content"], "refusal": texts["refusal"]}}
    body = {"error": {"message": texts["error"]}} if where == "error" else {"choices": [choice]}
    server.answer = lambda *_: (400 if where == "error" else 200, {}, json.dumps(body).replace("SPELLED", spelled))
    (found,) = ask(comparisons(1), key_env="JUDGE_KEY")
    kept = (tmp_path / "replies.jsonl").read_text()
    if where == "error":
        assert found.reason == "HTTP 400: echo [key] end" and kept == ""
    else:
        assert kept.count("echo [key] end") == 2  # both orders


def test_control_characters_of_a_server_are_not_shown(server, ask):
    server.answer = lambda *_: (400, {}, json.dumps({"error": {"message": "a\x1b[2J\x1b]0;t\x07\x9b\u202eb\ud800 c"}}))
    assert outcomes(ask(comparisons(1))) == ["HTTP 400: a?[2J?]0;t???b? c"]


COUNTS = [10**4000, 10**5000, -1, 1.5, "7", None, True, [1]]


@pytest.mark.parametrize("count", COUNTS, ids=lambda x: type(x).__name__)
def test_a_count_of_tokens_that_is_none_is_unknown_and_harms_no_later_run(server, ask, tmp_path, count):
    digits = "1" + "0" * (4000 if count == COUNTS[0] else 5000)
    text = "COUNT" if type(count) is int and count > 0 else count
    usage = json.dumps({"prompt_tokens": text, "completion_tokens": 1}).replace('"COUNT"', digits)
    changed = f'"usage": {usage}, "was": {{'
    server.answer = lambda *args: (200, {}, prefers_long(*args)[2].replace('"usage": {', changed))
    assert outcomes(ask(comparisons(1))) == [1.0]
    server.requests.clear()
    assert outcomes(ask(comparisons(1))) == [1.0] and server.requests == []
    # As an earlier version kept it.
    kept = tmp_path / "replies.jsonl"
    kept.write_text(kept.read_text().replace('"tokens_in": null', f'"tokens_in": {digits}'))
    assert outcomes(ask(comparisons(1))) == [1.0] and server.requests == []
    assert outcomes(ask(comparisons(2), max_tokens=100)) == [1.0, "not asked: the server reports no usage, which "
                                                             "max_tokens and max_cost need"]  # fmt: skip


@pytest.mark.parametrize("usage", ["[]", "5", '"7"', "[{}]", "true", '{"prompt_tokens": {}}'])
def test_usage_of_another_shape_is_unknown_and_costs_no_second_request(server, ask, usage):
    server.answer = lambda *args: (
        200,
        {},
        prefers_long(*args)[2].replace('"usage": {', f'"usage": {usage}, "was": {{'),
    )
    assert outcomes(ask(comparisons(1))) == [1.0] and len(server.requests) == 2


@pytest.mark.parametrize("value", ["null", "5", "[]", "{}", '{"content": 5}', "[" * 5000 + "]" * 5000])
def test_what_is_no_reply_in_the_cache_is_asked_again(server, ask, tmp_path, value):
    ask(comparisons(1))
    kept = tmp_path / "replies.jsonl"
    keys = [json.loads(line)["key"] for line in kept.read_text().splitlines()]
    kept.write_text("".join(f'{{"key": "{key}", "value": {value}}}\n' for key in keys))
    server.requests.clear()
    assert outcomes(ask(comparisons(1))) == [1.0] and len(server.requests) == 2
    server.requests.clear()
    assert outcomes(ask(comparisons(1))) == [1.0] and server.requests == []


# Win rates


def verdict(preference, prompt="p", first="aa", second="b", **fields):
    return Verdict(Comparison(prompt, first, second), preference, **fields)


def test_ties_count_half_and_lost_verdicts_count_only_as_lost():
    verdicts = [verdict(x, str(i)) for i, x in enumerate([1, 1, 0.75, 0.5, 0, 0.25])]
    result = win_rate([*verdicts, verdict(None, "x", reason="refused"), verdict(None, "y", reason="refused")])
    assert result.rate.mean == pytest.approx(3.5 / 6)
    assert (result.wins, result.ties, result.losses, result.lost) == (3, 1, 2, {"refused": 2})
    assert (result.prompts, result.mean_length, result.inconsistent) == (6, (2.0, 1.0), None)


def test_without_a_verdict_there_is_no_rate():
    result = win_rate([verdict(None, reason="timeout")])
    assert (result.rate, result.length_controlled, result.lost) == (None, None, {"timeout": 1})
    assert win_rate([]).rate is None


def mean_rate(preferences, prompts):
    """The win rate of verdicts of one preference each."""
    return win_rate([verdict(float(x), str(p)) for x, p in zip(preferences, prompts, strict=True)]).rate


def test_the_interval_of_independent_wins_is_wilsons():
    """scipy's Wilson interval, at n - 1 in place of n as the variance is estimated."""
    import scipy.stats

    found = mean_rate(np.array([1.0] * 30 + [0.0] * 71), np.arange(101))
    expected = scipy.stats.binomtest(30, 101).proportion_ci(method="wilson")
    np.testing.assert_allclose(found[1:], expected, atol=1e-3)


def test_repeating_every_verdict_of_a_prompt_says_nothing_new():
    preferences = np.random.default_rng(0).choice([0.0, 1.0], 40)
    once = mean_rate(preferences, np.arange(40))
    np.testing.assert_allclose(mean_rate(np.repeat(preferences, 5), np.repeat(np.arange(40), 5)), once)
    independent = mean_rate(np.repeat(preferences, 5), np.arange(200))
    assert independent.high - independent.low < 0.6 * (once.high - once.low)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_equal_verdicts_leave_a_doubt_that_shrinks(value):
    few, many = (mean_rate(np.full(n, value), np.arange(n)) for n in (5, 500))
    assert few.mean == value and few.high - few.low > 0.3 > 0.1 > many.high - many.low > 0
    assert mean_rate(np.array([value]), np.array([0])).low <= value


def simulated(rng, theta, phi, count=2000):
    longer = rng.normal(150, 300, count).round()
    chance = 1 / (1 + np.exp(-(theta + phi * np.tanh(longer / longer.std(ddof=1)))))
    return (rng.random(count) < chance).astype(float), longer


def test_the_regression_is_the_minimum_of_its_objective():
    """scipy's minimiser on the formula in the docstring, with ties among the targets."""
    wins, longer = simulated(np.random.default_rng(0), 0.3, 1.5, 200)
    wins[:40] = 0.5
    x = np.tanh(longer / longer.std(ddof=1))

    def objective(w):
        p = 1 / (1 + np.exp(-(w[0] + w[1] * x)))
        return -(wins * np.log(p) + (1 - wins) * np.log(1 - p)).sum() + 0.005 * (w @ w)

    expected = scipy.optimize.minimize(
        objective, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12}
    )
    weights, hessian = fit_logistic(np.stack([np.ones(200), x], 1), wins)
    np.testing.assert_allclose(weights, expected.x, atol=1e-5)
    steps = 1e-4 * np.eye(2)
    second = [
        [(objective(weights + a + b) - objective(weights + a) - objective(weights + b) + objective(weights)) / 1e-8
         for b in steps]
        for a in steps
    ]  # fmt: skip
    np.testing.assert_allclose(hessian, second, rtol=2e-2)


def test_length_control_takes_out_what_length_bought():
    """Equal models, a judge who likes length, longer answers from the first: it wins more, but not when controlled."""
    wins, longer = simulated(np.random.default_rng(1), 0.0, 2.0, 5000)
    found = length_controlled(wins, longer, np.arange(5000))
    assert wins.mean() > 0.6 and found.low < 0.5 < found.high and found.high - found.low < 0.06
    without, longer = simulated(np.random.default_rng(2), 0.4, 0.0, 5000)
    found = length_controlled(without, longer, np.arange(5000))
    assert abs(found.mean - without.mean()) < 0.01


def test_the_length_controlled_interval_covers_the_truth():
    rng, hits, truth = np.random.default_rng(3), 0, 1 / (1 + np.exp(-0.4))
    for _ in range(300):
        wins, longer = simulated(rng, 0.4, 1.0, 120)
        found = length_controlled(np.repeat(wins, 2), np.repeat(longer, 2), np.repeat(np.arange(120), 2))
        hits += found.low <= truth <= found.high
    assert 0.91 <= hits / 300 <= 0.985


@pytest.mark.parametrize(
    ("preferences", "longer"), [([1, 0, 1, 0], [5, 5, 5, 5]), ([1, 1, 1, 1], [1, 2, 3, 4]), ([1, 0], [1, 2])]
)
def test_length_control_is_silent_where_it_knows_nothing(preferences, longer):
    assert length_controlled(np.array(preferences, float), np.array(longer, float), np.arange(len(longer))) is None


def test_length_control_survives_perfect_separation():
    longer = np.array([-3.0, -2, -1, 1, 2, 3] * 50)
    found = length_controlled((longer > 0).astype(float), longer, np.arange(300))
    assert found.mean == pytest.approx(0.5, abs=1e-6) and np.isfinite(found).all()


# Verdicts on disk, and the page


def test_verdicts_come_back_as_they_were_written(tmp_path):
    verdicts = [
        verdict(0.75, [{"role": "user", "content": "é\n"}], orders=(1.0, 0.5)),
        verdict(None, reason="timeout"),
        verdict(1.0, scores=(0.5, -2.0)),
    ]
    # A conversation that went on after the prompt is judged, and shown, as the text of its messages.
    went_on = [{"role": role, "content": "y?"} for role in ("assistant", "user", "assistant")]
    talk = verdicts[0].comparison._replace(first=went_on)
    verdicts[0] = verdicts[0]._replace(comparison=talk)
    assert talk.texts[0].startswith("[assistant]\ny?\n\n[user]\ny?") and talk.texts[1] == talk.second
    assert json.dumps(talk.texts[0]) in elements_of(page_module.page(verdicts, ("a", "b"))).data
    scores = rewards.scorer("fewer_words")([talk.prompt] * 2, [talk.first, talk.texts[0]])
    assert scores.values[0] == scores.values[1]
    write_verdicts(tmp_path / "v.jsonl", verdicts)
    assert read_verdicts(tmp_path / "v.jsonl") == verdicts


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"preference": 1.5}, "row 1: field 'preference': expected null or 0 to 1, found 1.5"),
        ({"preference": "A"}, "field 'preference'"),
        ({"preference": True}, "field 'preference'"),
        ({"first": None}, "field 'first': expected a string"),
        ({"orders": [1]}, "field 'orders': expected two numbers"),
    ],
)
def test_malformed_verdicts_are_named(tmp_path, change, says):
    row = {"prompt": "p", "first": "a", "second": "b", "preference": 1, **change}
    (tmp_path / "v.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=says):
        read_verdicts(tmp_path / "v.jsonl")


HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> & {DATA} TITLE \u2028 \\u003c"


class Elements(html.parser.HTMLParser):
    """The tags of a page, and the text of the element with id=data."""

    def __init__(self):
        super().__init__()
        self.tags, self.data, self.inside = [], "", False

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("id") == "data"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        self.data += data if self.inside else ""


def elements_of(text):
    parser = Elements()
    parser.feed(text)
    parser.close()
    return parser


def test_no_text_of_the_data_becomes_markup():
    hostile = [Verdict(Comparison(HOSTILE, HOSTILE, HOSTILE + "2", HOSTILE), None, HOSTILE)]
    found = elements_of(page_module.page(hostile, (HOSTILE, HOSTILE), HOSTILE))
    plain = elements_of(page_module.page([verdict(None, reason="plain")], ("a", "b")))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
    assert [tag for tag, _ in found.tags].count("script") == 2
    data = json.loads(found.data)
    assert data["rows"][0]["prompt"] == data["rows"][0]["first"] == data["names"][0] == HOSTILE


def test_the_page_loads_nothing_and_does_not_write_markup():
    text = page_module.page([verdict(1.0)], ("a", "b"))
    assert not re.search(r"(src|href)=|https?:|@import|innerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert "default-src 'none'" in text


def test_the_page_says_the_win_rate_and_how_much_is_lost():
    verdicts = [Verdict(c, 1.0 if i < 15 else 0.5) for i, c in enumerate(comparisons(20))]
    text = page_module.page([*verdicts, verdict(None, reason="timeout")], ("a & b", "c"), "j")
    result = win_rate(verdicts)
    assert f"a &amp; b wins {result.rate.mean:.1%} [{result.rate.low:.1%}, {result.rate.high:.1%}] against c" in text
    assert "15 won, 5 tied, 0 lost; 20 prompts" in text and "1 timeout" in text
    assert '<option value="first">the judge prefers a &amp; b</option>' in text
    assert "wins no verdict" not in text


def test_sides_do_not_tell_the_models():
    verdicts = [Verdict(c, 1.0) for c in comparisons(400)]
    turned = [Verdict(c._replace(first=c.second, second=c.first), 0.0) for c in comparisons(400)]
    one, other = (
        np.array([row["swapped"] for row in json.loads(elements_of(page_module.page(v, ("a", "b"))).data)["rows"]])
        for v in (verdicts, turned)
    )
    assert 150 < one.sum() < 250
    np.testing.assert_array_equal(one, ~other)  # the same text on the left, whichever model wrote it


# The command


@pytest.fixture
def judge(capsys):
    """judge(*arguments) -> (status, stdout, stderr) of `prefalign judge` with these."""

    def run(*arguments):
        return commands.main(["judge", *arguments]), *capsys.readouterr()

    return run


@pytest.fixture
def files(tmp_path):
    for name, text in (("a", LONG), ("b", SHORT)):
        samples = [Sample(f"prompt {i}", f"{text} {i}", name) for i in range(4)]
        write_jsonl(tmp_path / f"{name}.jsonl", (sample._asdict() for sample in samples))
    return [f"--first={tmp_path / 'a.jsonl'}", f"--second={tmp_path / 'b.jsonl'}", f"--out={tmp_path / 'out'}"]


def test_the_command_writes_what_it_prints(judge, files, tmp_path):
    status, out, err = judge(*files, "--judge=reward:more_words")
    assert (status, err) == (0, "")
    assert "a against b" in out and "1.000 [0.510, 1.000]" in out and "4, 0, 0 on 4 prompts" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["rate"]["mean"], summary["wins"], summary["first"]) == (1.0, 4, "a")
    assert win_rate(read_verdicts(tmp_path / "out" / "verdicts.jsonl")).wins == 4
    assert (tmp_path / "out" / "pairs.html").read_text().startswith("<!DOCTYPE html>")


def test_an_output_that_another_process_writes_is_refused(judge, files, tmp_path):
    with locked(tmp_path / "out"):
        status, _, err = judge(*files, "--judge=reward:more_words")
    assert status == 2 and err.startswith("error: --out=") and "another run is writing there" in err


def test_the_command_goes_on_where_an_endpoint_failed(judge, files, server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    options = [*files, f"--judge=endpoint:{server.url}", "--option=model=m", "--option=key_env=JUDGE_KEY"]
    options += ["--option=retries=0", "--option=threads=1"]
    server.answer = lambda q, n, h: (500, {}, "") if "prompt 2" in q else prefers_long(q, n, h)
    status, out, err = judge(*options)
    assert status == 0 and "lost: HTTP 500" in out and "3, 0, 0 on 3 prompts" in out and KEY not in out + err
    server.answer = prefers_long
    server.requests.clear()
    assert "4, 0, 0 on 4 prompts" in judge(*options)[1]
    assert len(server.requests) == 2


def test_the_command_reads_a_persons_verdicts_and_a_reward_of_ones_own(judge, files, tmp_path):
    row = {"prompt": "prompt 1", "first": f"{LONG} 1", "second": f"{SHORT} 1", "preference": 0.5}
    (tmp_path / "human.jsonl").write_text(json.dumps(row) + "\n")
    _, out, _ = judge(*files, f"--judge=human:{tmp_path / 'human.jsonl'}")
    assert "0, 1, 0 on 1 prompts" in out and re.search(r"lost: not judged +3", out)
    (tmp_path / "mine.py").write_text(
        "from prefalign_jax.judges.rewards import REWARDS\n"
        "REWARDS['shortest'] = lambda prompt, response, *, scale=1.0: -scale * len(response)\n"
    )
    try:
        mine = [f"--load={tmp_path / 'mine.py'}", "--judge=reward:shortest", "--option=scale=2"]
        assert "0, 0, 4 on 4 prompts" in judge(*files, *mine)[1]
    finally:
        rewards.REWARDS.pop("shortest", None)


def test_the_command_judges_whole_conversations_of_mt_bench(judge, tmp_path):
    questions = [{"question_id": n, "category": "c", "turns": ["Why?", "And then?"][:n]} for n in (1, 2)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    for name, text in (("a", LONG), ("b", SHORT)):
        rows = [
            {"question_id": n, "model_id": name, "choices": [{"index": 0, "turns": [text, f"{text} {name}"][:n]}]}
            for n in (1, 2)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, err = judge(
        f"--first={tmp_path / 'a.jsonl'}", f"--second={tmp_path / 'b.jsonl'}", f"--questions={tmp_path / 'q.jsonl'}",
        "--judge=reward:more_words", f"--out={tmp_path / 'out'}"
    )  # fmt: skip
    assert (status, err) == (0, "") and "2, 0, 0 on 2 prompts" in out
    one, two = (v.comparison for v in read_verdicts(tmp_path / "out" / "verdicts.jsonl"))
    assert (one.prompt, one.first) == ("Why?", LONG)
    assert two.prompt == "[question 1]\nWhy?\n\n[question 2]\nAnd then?"
    assert two.second == f"[answer 1]\n{SHORT}\n\n[answer 2]\n{SHORT} b"


def test_the_command_judges_by_a_reward_model(judge, files, reward_directory):
    status, out, _ = judge(*files, f"--judge=model:{reward_directory[0]}", "--option=batch_size=4")
    assert status == 0 and "on 4 prompts" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--judge must be given"),
        (["--judge=reward:kindnes"], "did you mean 'kindness'"),
        (["--judge=oracle:x"], "--judge='oracle' is unknown"),
        (["--judge=reward"], "write reward: and a name"),
        (["--judge=reward:distinct", "--option=m=3"], "no hyper-parameter 'm'"),
        (["--judge=reward:distinct", "--option=n=x"], "--option=n: expected a value of type int"),
        (["--judge=reward:distinct", "--option=n"], "write NAME=VALUE"),
        (["--judge=reward:distinct", "--option=n=0"], "n=0 is out of range; write at least 1"),
        (["--judge=reward:matches"], "needs a pattern"),
        (["--judge=reward:kindness", "--load=nowhere.py"], "--load=nowhere.py: FileNotFoundError"),
        (["--judge=model:./nowhere"], "no such directory"),
        (["--judge=reward:kindness", "--fist=x"], "--fist: no such option; did you mean '--first'?"),
        (["--judge=reward:kindness", "extra"], "unexpected argument 'extra'"),
    ],
)
def test_mistakes_are_one_line_and_status_2(judge, files, arguments, says):
    status, out, err = judge(*files, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and says in err and err.count("\n") == 1


def test_samples_without_a_prompt_in_common_are_a_mistake(judge, files, tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [Sample("other", "x", "b")._asdict()])
    status, _, err = judge(*files, "--judge=reward:kindness")
    assert status == 2 and "no prompt in common" in err
