"""The remote engine: what it asks, what it makes of the answers, and what it refuses."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from remote_made import TEMPLATE, WORDS, ChatServer, completion

from msgrpo_lab.config import ConfigError, conf_dir
from msgrpo_lab.config.validation import validate
from msgrpo_lab.engines.remote.dialect import Chat, ChatBytes, RequestWriter, read_chat
from msgrpo_lab.engines.remote.engine import OpenAIEngine
from msgrpo_lab.engines.remote.transport import MalformedAnswerError, RemoteModelError, read_answer
from msgrpo_lab.lap.prompt import PromptBuilder
from msgrpo_lab.types import Completion, Sampling

CHAT = Chat(({"role": "user", "content": "go"},), "")
TOP_K = Sampling(temperature=0.5, top_k=3, top_p=0.9, max_new_tokens=200, stop=("</action>",))


def prompts(engine: OpenAIEngine, *observations: str) -> list[np.ndarray]:
    prompt = engine.prompt(TEMPLATE)
    return [prompt.render("rules", observation, WORDS) for observation in observations]


def rngs(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, number]) for number in range(count)]


def asked(answer: dict[str, Any], sampling: Sampling = Sampling(), **keys: Any) -> Completion:  # noqa: B008
    """What the engine makes of one answer."""
    with ChatServer(answer=lambda _: answer) as server:
        engine = server.engine(**keys)
        return engine.generate(prompts(engine, "here"), sampling, rngs(1))[0]


# The prompt -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opening", ["", "Move:", ' ["and', "]"])
@pytest.mark.parametrize("observation", ["Goal: 2 down", 'a "quoted" {brace} \\ [bracket]', "日本 🐍 é\n\tend", ""])
def test_a_chat_comes_back_out_of_its_bytes(observation: str, opening: str) -> None:
    template = replace(TEMPLATE, opening=opening, examples=[("seen", "Left")])
    prompt = PromptBuilder(template, ChatBytes()).render("rules", observation, ("Left", "Up"))
    assert prompt.min() >= 0
    assert prompt.max() < 256
    assert read_chat(prompt) == Chat(
        (
            {"role": "system", "content": "rules Reply: Left or Up."},
            {"role": "user", "content": "seen"},
            {"role": "assistant", "content": "Left"},
            {"role": "user", "content": observation},
        ),
        opening,
    )


@pytest.mark.parametrize("ids", [[7, 8, 9], [300, 2], [-1], [255], list(b"[1]"), list(b'{"a": 1}'), []])
def test_token_ids_are_not_taken_for_a_chat(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="these token ids are no chat"):
        read_chat(np.array(ids, dtype=np.int64))


# The request ----------------------------------------------------------------------------------------------------------

COMMON = {"model": "m", "messages": [{"role": "user", "content": "go"}], "seed": 5}


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        (
            "vllm",
            {"top_k": 3, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 200}
            | {"stop": ["</action>"], "include_stop_str_in_output": True},
        ),
        (
            "sglang",
            {"top_k": 3, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 200}
            | {"stop": ["</action>"], "no_stop_trim": True},
        ),
        ("llama_cpp", {"top_k": 3, "min_p": 0.0, "typical_p": 1.0, "repeat_penalty": 1.0, "max_tokens": 200}),
    ],
)
def test_a_rule_is_written_as_each_server_has_it(server: Any, expected: dict[str, Any]) -> None:
    """And what a server would fill in from the model's own settings is named, so that it does not."""
    body = RequestWriter(server=server).body("m", CHAT, TOP_K, 5)
    assert body == COMMON | {"temperature": 0.5, "top_p": 0.9} | expected


@pytest.mark.parametrize(("server", "unlimited"), [("vllm", -1), ("sglang", -1), ("llama_cpp", 0)])
def test_no_top_k_is_said_and_not_left_out(server: Any, unlimited: int) -> None:
    body = RequestWriter(server=server).body("m", CHAT, Sampling(), 5)
    assert (body["top_k"], body["top_p"], body["temperature"]) == (unlimited, 1.0, 1.0)


def test_transformers_serve_is_told_to_draw() -> None:
    body = RequestWriter(server="transformers").body("m", CHAT, TOP_K, 5)
    rule = json.loads(body.pop("generation_config"))
    assert body == COMMON | {"temperature": 0.5, "top_p": 0.9, "max_tokens": 200}
    assert rule == {"do_sample": True, "top_k": 3, "min_p": None, "typical_p": 1.0, "repetition_penalty": 1.0}


def test_openai_itself_gets_nothing_that_it_does_not_know() -> None:
    body = RequestWriter(server="openai").body("m", CHAT, replace(TOP_K, top_k=None), 5)
    assert body == COMMON | {"temperature": 0.5, "top_p": 0.9, "max_completion_tokens": 200}
    with pytest.raises(ValueError, match=r"server=openai: it has no top-k"):
        RequestWriter(server="openai").body("m", CHAT, TOP_K, 5)


@pytest.mark.parametrize("server", ["vllm", "sglang", "llama_cpp", "transformers", "openai"])
def test_greedy_is_temperature_zero_and_cuts_nothing(server: Any) -> None:
    body = RequestWriter(server=server).body("m", CHAT, replace(TOP_K, greedy=True), None)
    assert (body["temperature"], body["top_p"]) == (0.0, 1.0)
    assert body.get("top_k", 0) in (0, -1)
    assert "seed" not in body


def test_extra_fields_go_into_every_request() -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    assert RequestWriter(server="vllm", extra_body=extra).body("m", CHAT, Sampling(), 1).items() >= extra.items()


@pytest.mark.parametrize(
    ("server", "fields"),
    [
        ("vllm", {"continue_final_message": True, "add_generation_prompt": False}),
        ("sglang", {"continue_final_message": True}),
        ("llama_cpp", {}),
    ],
)
def test_an_opening_is_an_assistants_message_to_go_on_from(server: Any, fields: dict[str, Any]) -> None:
    plain = RequestWriter(server=server).body("m", CHAT, Sampling(), 1)
    body = RequestWriter(server=server).body("m", CHAT._replace(opening="Move:"), Sampling(), 1)
    messages = [*plain.pop("messages"), {"role": "assistant", "content": "Move:"}]
    assert body == plain | {"messages": messages} | fields


@pytest.mark.parametrize("server", ["transformers", "openai"])
def test_an_opening_is_refused_where_no_server_goes_on_from_it(server: Any) -> None:
    engine = OpenAIEngine(model="m", server=server)
    with pytest.raises(ValueError, match=r"prompt\.opening='Move:': .*use prompt\.opening='' or one of: vllm, sglang"):
        engine.check_rule(Sampling(), "Move:")
    engine.check_rule(Sampling())


@pytest.mark.parametrize(
    ("way", "fields"),
    [
        ("structured_outputs", {"structured_outputs": {"choice": ["Left", "a.b"]}}),
        ("guided_choice", {"guided_choice": ["Left", "a.b"]}),
        ("regex", {"regex": r"(Left|a\.b)"}),
        ("grammar", {"grammar": 'root ::= "Left" | "a.b"'}),
    ],
)
def test_legal_words_are_constrained_in_the_servers_way(way: Any, fields: dict[str, Any]) -> None:
    choices = PromptBuilder(TEMPLATE, ChatBytes()).choices(("Left", "a.b"))
    body = RequestWriter(server="vllm", constrain_by=way).body("m", CHAT, Sampling(choices=choices), 1)
    assert body.items() >= fields.items()


def test_constrained_decoding_is_refused_unless_a_way_is_named() -> None:
    engine = OpenAIEngine(model="m")
    choices = engine.prompt(TEMPLATE).choices(WORDS)
    with pytest.raises(ValueError, match=r"rollout\.sampling\.constrain=true: .*constrain_by"):
        engine.generate(prompts(engine, "here"), Sampling(choices=choices), rngs(1))


def test_a_server_that_ignores_the_constraint_is_found_out() -> None:
    choices = OpenAIEngine(model="m").prompt(TEMPLATE).choices(WORDS)
    with pytest.raises(RemoteModelError, match=r"constrain_by=regex: the server answered 'I think', which"):
        asked(completion("I think"), Sampling(choices=choices), constrain_by="regex")


# The answer -----------------------------------------------------------------------------------------------------------


def test_an_answer_becomes_a_completion() -> None:
    made = asked(completion("Left", usage={"prompt_tokens": 9, "completion_tokens": 2}))
    assert (made.text, made.finish_reason, made.policy_version) == ("Left", "stop", 0)
    assert made.token_ids.tolist() == [-1, -1], "two tokens, nobody knows which"
    assert np.isnan(made.logprobs).all()


@pytest.mark.parametrize(("reason", "expected"), [("stop", "stop"), ("length", "length"), ("eos", "stop")])
def test_the_reason_of_an_end(reason: str, expected: str) -> None:
    assert asked(completion("Left", finish_reason=reason)).finish_reason == expected


def test_an_answer_without_text_is_an_empty_one() -> None:
    assert asked(completion(None)).text == ""


def test_an_answer_ends_after_the_first_stop_text() -> None:
    made = asked(completion("<action>up</action> so</b> more</action>", finish_reason="length"), TOP_K)
    assert (made.text, made.finish_reason) == ("<action>up</action>", "stop")
    made = asked(completion("a</b>c</action>"), replace(TOP_K, stop=("</action>", "</b>")))
    assert made.text == "a</b>"


def test_answers_that_are_not_counted_are_said_to_be() -> None:
    with ChatServer(answer=lambda _: completion("Left")) as server:
        engine = server.engine()
        (made,) = engine.generate(prompts(engine, "here"), Sampling(), rngs(1))
        assert len(made.token_ids) == len(made.logprobs) == 0
        assert engine.metrics()["remote_uncounted"] == 1


@pytest.mark.parametrize(
    ("of", "changes", "kept"),
    [
        ("model", {}, True),
        ("model", {"greedy": True}, True),
        ("model", {"temperature": 0.5}, False),
        ("model", {"top_k": 3}, False),
        ("model", {"top_p": 0.9}, False),
        ("sampling", {"temperature": 0.5, "top_k": 3, "top_p": 0.9}, True),
        ("sampling", {"greedy": True}, False),
        (None, {}, False),
    ],
)
def test_log_probabilities_are_kept_where_they_are_of_what_was_sampled_from(
    of: Any, changes: dict[str, Any], kept: bool
) -> None:
    answer = completion("Left", usage={"completion_tokens": 2}, logprobs=[-0.5, -1.25])
    made = asked(answer, Sampling(**changes), logprobs=of)
    assert len(made.logprobs) == 2
    assert made.logprobs.tolist() == [-0.5, -1.25] if kept else np.isnan(made.logprobs).all()


def test_log_probabilities_are_asked_for_only_if_they_are_wanted() -> None:
    assert "logprobs" not in RequestWriter(server="vllm").body("m", CHAT, Sampling(), 1)
    assert RequestWriter(server="vllm", logprobs=True).body("m", CHAT, Sampling(), 1)["logprobs"] is True


def test_a_content_type_with_a_charset_is_json() -> None:
    content = json.dumps(completion("Left")).encode()
    assert read_answer("application/json; charset=utf-8", content).text == "Left"
    with pytest.raises(MalformedAnswerError, match="missing"):
        read_answer("", content)


# Asking many ----------------------------------------------------------------------------------------------------------


def test_answers_come_back_in_the_order_of_the_prompts() -> None:
    def slow(body: dict[str, Any]) -> dict[str, Any]:
        time.sleep(random.Random(body["messages"][-1]["content"]).uniform(0.0, 0.05))
        return completion(body["messages"][-1]["content"])

    with ChatServer(answer=slow) as server:
        engine = server.engine()
        observations = [f"state {number}" for number in range(30)]
        answers = engine.generate(prompts(engine, *observations), Sampling(), rngs(30))
    assert [answer.text for answer in answers] == observations


def test_each_distinct_prompt_is_asked_once_if_greedy() -> None:
    with ChatServer() as server:
        engine = server.engine()
        greedy = Sampling(greedy=True)
        engine.generate(prompts(engine, "a", "b", "a", "a"), greedy, rngs(4))
        assert len(server.seen) == 2
        engine.generate(prompts(engine, "b", "c"), greedy, rngs(2))
        assert len(server.seen) == 3
        engine.generate(prompts(engine, "a"), replace(greedy, max_new_tokens=2), rngs(1))
        assert len(server.seen) == 4, "another rule is another question"
        engine.sync(version=7)
        (again,) = engine.generate(prompts(engine, "a"), greedy, rngs(1))
        assert (len(server.seen), again.policy_version) == (5, 7)
        assert engine.metrics()["remote_requests"] == 1


def test_equal_prompts_are_drawn_for_each() -> None:
    with ChatServer() as server:
        engine = server.engine()
        answers = engine.generate(prompts(engine, *["a"] * 40), Sampling(), rngs(40))
        assert len({seen.body["seed"] for seen in server.seen}) == 40
        assert set(Counter(answer.text for answer in answers)) == set(WORDS)
        again = engine.generate(prompts(engine, *["a"] * 40), Sampling(), rngs(40))
        assert [answer.text for answer in answers] == [answer.text for answer in again]
        other = engine.generate(prompts(engine, *["a"] * 40), Sampling(), rngs(40, seed=1))
        assert [answer.text for answer in answers] != [answer.text for answer in other]


def test_greedy_decoding_draws_nothing() -> None:
    with ChatServer() as server:
        engine = server.engine()
        generators = rngs(1)
        engine.generate(prompts(engine, "a"), Sampling(greedy=True), generators)
        assert generators[0].random() == rngs(1)[0].random()


def test_usage_is_added_up() -> None:
    with ChatServer(["429", "500"]) as server:
        engine = server.engine(retries=4)
        engine.generate(prompts(engine, "a", "b", "c"), Sampling(), rngs(3))
        counts = dict(engine.metrics())
    assert counts.pop("remote_s") > 0
    assert counts == {
        "remote_requests": 5,
        "remote_retries": 2,
        "remote_prompt_tokens": 30,
        "remote_completion_tokens": 9,
        "remote_uncounted": 0,
    }


def test_no_prompts_no_requests() -> None:
    with ChatServer() as server:
        assert server.engine().generate([], Sampling(), []) == []
        assert server.seen == []


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("server", "ollama", "must be one of: vllm, sglang, llama_cpp, transformers, openai"),
        ("logprobs", "yes", "must be one of: null, model, sampling"),
        ("constrain_by", "hope", "must be one of: null, structured_outputs"),
        ("concurrency", 0, "at least 1"),
        ("retries", -1, "at least 0"),
        ("request_timeout_s", 0.0, "above 0"),
        ("total_timeout_s", float("inf"), "above 0"),
        ("first_wait_s", float("nan"), "above 0"),
        ("extra_body", {"temperature": 2}, "set by the lab itself"),
    ],
)
def test_what_makes_no_sense_is_refused(key: str, value: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key}=.*{problem}"):
        OpenAIEngine(**{"model": "m", key: value})


def test_a_model_must_be_named() -> None:
    engine = OpenAIEngine()
    with pytest.raises(ValueError, match=r"model=null"):
        engine.generate(prompts(engine, "a"), Sampling(), rngs(1))
    with pytest.raises(ValueError, match=r"model=null"):
        engine.check_rule(Sampling())


def test_training_refuses_it() -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("train", ["engine=openai", "model=tiny"])
    with pytest.raises(ConfigError, match=r"engine=openai: its answers are not the policy's and cannot train it"):
        validate(config, choices={"engine": "openai"})
