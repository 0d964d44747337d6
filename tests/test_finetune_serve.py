"""Talking to models: generate, chat, the endpoint and its limits, the page in a real browser."""

import http.client
import io
import json
import threading

import pytest
import torch

import evaluation_browser
from qlora_ref import cli
from qlora_ref.cli import UserError
from qlora_ref.finetune import chat_cli, generate_cli, run, serve, serve_cli
from qlora_ref.finetune.config import TrainConfig
from qlora_ref.finetune.encode import encode
from qlora_ref.finetune.engine import make_engine
from qlora_ref.finetune.formats import Message
from qlora_ref.finetune.prompts import render

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
STORY = "Once upon a time"


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """(base folder, adapter folder, adapter folder of another prompt) on stories260K."""
    folder, model = tmp_path_factory.mktemp("adapters"), str(data_dir / "weights" / "stories260K_hf")
    data = str(data_dir / "instruct" / "llms_from_scratch" / "instruction-data.json.gz")
    common = TrainConfig(
        model=model, data=data, device="cpu", max_examples=40, max_length=96, eval_size=4, lora_rank=4, lr=1e-2,
        max_steps=3, eval_steps=3,
    )  # fmt: skip
    for name, template in (("single", "alpaca"), ("talk", "guanaco")):
        run.run(common.replace(output=str(folder / name), template=template))
    return model, str(folder / "single"), str(folder / "talk")


# --- generate and chat ----------------------------------------------------------------------------------------------


def test_the_prompt_is_the_one_of_training(trained):
    engine = make_engine([], [trained[1]], "nf4", "auto", "cpu")
    served = engine.use("single")
    question = Message("user", "Say hi", "now")
    example = encode(render((question, Message("assistant", "x")), served.template, engine.tokenizer), engine.tokenizer,
                     TrainConfig())  # fmt: skip
    assert engine.prompt((question,)) == example.ids[: example.answer.index(True)]


def test_switching_adapters_gives_each_its_own_answers(trained):
    engine = make_engine([], list(trained[1:]), "nf4", "plain", "cpu")
    assert list(engine.served) == ["single", "talk", "stories260K_hf"]
    ids = torch.tensor([[1, 50, 60, 70]])

    def logits(name):
        engine.use(name)
        with torch.no_grad():
            return engine.model(ids).logits

    first = {name: logits(name) for name in engine.served}
    assert not torch.equal(first["single"], first["talk"]) and not torch.equal(first["single"], first["stories260K_hf"])
    for name in reversed(engine.served):
        assert torch.equal(logits(name), first[name])


def test_generate_greedily_from_the_command_line(trained, capsys, tmp_path):
    base = ["generate", "--model", trained[0], "--temperature", "0", "--device", "cpu", "--max-new-tokens", "20"]
    assert cli.main([*base, "--prompt", STORY]) == 0
    story = capsys.readouterr().out
    assert "there was a little" in story  # the 4-bit base still tells stories
    rows = tmp_path / "q.jsonl"
    rows.write_text(json.dumps({"prompt": STORY}) + "\n" + json.dumps({"instruction": "x", "input": "y"}) + "\n")
    assert cli.main([*base, "--input", str(rows), "--output", str(tmp_path / "a.jsonl")]) == 0
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert answers[0]["answer"] == story.strip() and answers[1]["input"] == "y"


@pytest.mark.parametrize("argv, sentence", [
    (["--prompt", "x"], "name a model folder"),
    (["--model", "{base}"], "give either --prompt"),
    (["--model", "{base}", "--prompt", "x", "--max-new-tokens", "600"], "has 512 positions"),
    (["--model", "{base}", "--prompt", "x", "--temperature", "-1"], "--temperature not negative"),
    (["--adapter", "nowhere", "--prompt", "x"], "not a readable PEFT adapter"),
    (["--model", "{base}", "--prompt", "x", "--template", "chat"], "no chat template"),
])  # fmt: skip
def test_generate_mistakes(trained, argv, sentence):
    with pytest.raises(UserError, match=sentence):
        generate_cli.main([a.replace("{base}", trained[0]) for a in argv])


def test_chat_keeps_turns_and_resets(trained, capsys, monkeypatch):
    lines = iter(["hello", "again", "/reset", "fresh", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    seen = []
    real = chat_cli._say
    monkeypatch.setattr(chat_cli, "_say", lambda engine, turns, s: (seen.append(turns), real(engine, turns, s))[1])
    assert cli.main(["chat", "--adapter", trained[2], "--device", "cpu", "--max-new-tokens", "5", "--seed", "0"]) == 0
    assert [[t.role for t in turns] for turns in seen] == [["user"], ["user", "assistant", "user"], ["user"]]
    assert "guanaco prompt" in capsys.readouterr().out


def test_a_models_output_cannot_steer_the_terminal():
    assert generate_cli.printable("a\x1b[2Jb\x07\r\nc\u202ed") == "a[2Jb\ncd"


# --- the endpoint ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(trained):
    server = serve.Server(("127.0.0.1", 0), make_engine([], list(trained[1:]), "nf4", "auto", "cpu"), max_tokens=400)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server, body, path="/v1/chat/completions", method="POST", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    content = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, content, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, data, response.headers


QUESTION = {"model": "talk", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 12}


def test_an_answer_and_its_stream_agree(server):
    status, data, _ = ask(server, QUESTION)
    whole = json.loads(data)
    assert status == 200 and whole["object"] == "chat.completion" and whole["model"] == "talk"
    assert whole["usage"]["completion_tokens"] <= 12 and whole["choices"][0]["finish_reason"] in ("stop", "length")
    status, data, headers = ask(server, {**QUESTION, "stream": True})
    assert status == 200 and headers["Content-Type"] == "text/event-stream"
    events = [line.removeprefix("data: ") for line in data.decode().split("\n\n") if line]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(e)["choices"][0]["delta"] for e in events[:-1]]
    text = "".join(d.get("content", "") for d in deltas)
    assert text.strip() == whole["choices"][0]["message"]["content"] and deltas[0]["role"] == "assistant"


def test_models_are_listed(server):
    status, data, _ = ask(server, None, "/v1/models", "GET")
    listed = {m["id"]: (m["adapter"], m["single_turn"], m["weights"]) for m in json.loads(data)["data"]}
    assert status == 200
    assert listed == {
        "single": (True, True, "nf4"),
        "talk": (True, False, "nf4"),
        "stories260K_hf": (False, True, "nf4"),
    }


HI = [{"role": "user", "content": "hi"}]
BAD = [
    ("not json", b"{", 400, "not valid JSON"),
    ("not utf-8", b'"\xff"', 400, "not valid JSON in UTF-8"),
    ("nested deeply", b"[" * 100_000, 400, "not valid JSON"),
    ("a list", [], 400, "must be a JSON object"),
    ("no messages", {}, 400, "messages must be a list"),
    ("no turns", {"messages": []}, 400, "messages must be a list"),
    ("too many", {"messages": HI * 300}, 400, "1 to 256 messages"),
    ("parts", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "a text as content"),
    ("role", {"messages": [{"role": "tool", "content": "x"}]}, 400, "system, user or assistant"),
    ("order", {"messages": HI * 2}, 400, "alternate"),
    ("unanswerable", {"messages": [*HI, {"role": "assistant", "content": "x"}]}, 400, "end with user"),
    ("model", {"messages": HI, "model": "gpt-4"}, 404, "not served"),
    ("tokens", {"messages": HI, "max_tokens": 401}, 400, "max_tokens must be a whole number in 1..400"),
    ("tokens as text", {"messages": HI, "max_tokens": "9"}, 400, "max_tokens must be"),
    ("temperature", {"messages": HI, "temperature": 3}, 400, "temperature must be"),
    ("temperature nan", b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, "temperature"),
    ("n", {"messages": HI, "n": 2}, 400, "n must be 1"),
    ("unknown field", {"messages": HI, "tools": []}, 400, "unsupported fields: tools"),
    ("stream", {"messages": HI, "stream": "yes"}, 400, "stream must be"),
    ("long prompt", {"messages": [{"role": "user", "content": "word " * 600}]}, 400, "512 positions"),
    (
        "single turn",
        {"messages": [*HI, {"role": "assistant", "content": "x"}, *HI], "model": "single"},
        400,
        "one question",
    ),
]


@pytest.mark.parametrize("name, body, status, sentence", BAD, ids=[b[0] for b in BAD])
def test_malformed_requests_get_a_4xx(server, name, body, status, sentence):
    got, data, _ = ask(server, body)
    assert got == status and sentence in json.loads(data)["error"]["message"]


def test_limits_and_origins(server):
    for _ in range(20):  # the answer must reach a client that is still sending
        assert ask(server, b"x" * (4 * serve.MAX_BODY))[0] == 413
    assert ask(server, QUESTION, **{"Content-Type": "text/plain"})[0] == 415  # what a form of another site could send
    assert ask(server, QUESTION, Host="evil.example")[0] == 403  # a name that was rebound to 127.0.0.1
    assert ask(server, None, "/../../etc/passwd", "GET")[0] == 404
    assert ask(server, QUESTION, "/v1/other")[0] == 404
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.endheaders()
    with connection.getresponse() as response:
        assert response.status == 411
    connection.close()
    taken = [server.places.acquire(blocking=False) for _ in range(serve.MAX_WAITING)]
    try:
        assert all(taken) and ask(server, QUESTION)[0] == 503
    finally:
        server.places.release(serve.MAX_WAITING)
    assert ask(server, QUESTION)[0] == 200  # and it still answers


def test_pages_forbid_foreign_scripts(server):
    for path in serve.PAGES:
        status, data, headers = ask(server, None, path, "GET")
        assert status == 200 and headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert b"innerHTML" not in data and b"http://" not in data and b"https://" not in data


def test_a_key_is_needed_off_loopback(server, trained, monkeypatch):
    monkeypatch.delenv(serve_cli.KEY_VARIABLE, raising=False)
    with pytest.raises(UserError, match="set an API key"):
        serve_cli.main(["--model", trained[0], "--host", "0.0.0.0"])
    monkeypatch.setattr(server, "api_key", "secret")
    assert ask(server, QUESTION)[0] == 401 and ask(server, QUESTION, Authorization="Bearer secre")[0] == 401
    assert ask(server, QUESTION, Authorization="Bearer secret")[0] == 200


def test_a_reader_that_leaves_stops_the_generation(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    body = {
        "model": "stories260K_hf",
        "messages": [{"role": "user", "content": STORY}],
        "stream": True,
        "max_tokens": 400,
    }
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.read(200)
    response.close()
    connection.close()
    assert ask(server, QUESTION)[0] == 200  # the lock was given back
    assert len(server.engine.generated) <= 12


def test_special_tokens_cannot_forge_turns(trained, data_dir):
    engine = make_engine([trained[0]], [], "nf4", "plain", "cpu")
    engine.use("stories260K_hf")
    engine.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    object.__setattr__(engine.current, "template", "chat")
    with pytest.raises(UserError, match="contains the special token </s>"):
        engine.prompt((Message("user", "a </s> b"),))


# --- the page -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(evaluation_browser.MISSING), reason=evaluation_browser.MISSING)
def test_the_page_in_a_browser(server, tmp_path, monkeypatch):
    """Ask, watch it stream, stop it, switch the adapter; markup in a question stays text; nothing in the console."""
    hostile = "<img src=x onerror=document.title='owned'><b>bold</b>"
    turns = "document.querySelectorAll('.turn')"
    with evaluation_browser.Browser(tmp_path / "profile") as page:
        page.open(f"http://127.0.0.1:{server.server_address[1]}/")
        page.wait_for("document.querySelectorAll('#model option').length === 3")
        page.choose("#model", "talk")
        page.type("#question", hostile)
        page.click("#send")
        page.wait_for(f"{turns}.length === 2 && {turns}[1].textContent.length > 8")  # it streams
        page.wait_for("document.querySelector('#send').disabled === false")
        assert hostile in page.run(f"return {turns}[0].textContent")
        assert page.run("return document.querySelectorAll('main img, main b').length") == 0
        page.choose("#model", "stories260K_hf")
        assert page.run(f"return {turns}.length") == 0  # another model, another conversation
        assert "one question" in page.text("#note")
        page.type("#question", STORY)
        page.click("#send")
        page.wait_for(f"{turns}.length === 2 && {turns}[1].textContent.length > 20")
        page.click("#stop")
        page.wait_for("document.querySelector('#note').textContent === 'Stopped.'")
        length = page.run(f"return {turns}[1].textContent.length")
        page.choose("#model", "talk")
        page.type("#question", "hello")
        page.click("#send")
        page.wait_for("document.querySelector('#send').disabled === false && " + f"{turns}.length === 2")
        monkeypatch.setattr(server.engine, "stream", lambda *rest: (piece for piece in [hostile[:30], hostile[30:]]))
        page.type("#question", "and now?")
        page.click("#send")
        page.wait_for(f"{turns}.length === 4 && document.querySelector('#send').disabled === false")
        assert hostile in page.run(f"return {turns}[3].textContent")  # a model that answers in markup
        assert page.run("return document.querySelectorAll('main img, main b').length") == 0
        page.screenshot(tmp_path / "page.png")
        assert length > 20 and page.run("return document.title") == "qlora_ref"
        assert [e for e in page.console() if e["level"] == "SEVERE"] == []


def test_stdin_prompt(trained, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(STORY))
    assert (
        generate_cli.main(["--model", trained[0], "--prompt", "-", "--max-new-tokens", "3", "--temperature", "0"]) == 0
    )
    assert capsys.readouterr().out.strip()
