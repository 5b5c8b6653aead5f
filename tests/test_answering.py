"""Answers of one model: batches, single prompts, caches and padding agree token for token, and nothing else is changed."""

from __future__ import annotations

import copy
import random
import threading

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_generation import greedy, random_prompts, sharp_model

from hf_sft.answering import Answer, Answerer
from hf_sft.attention.backends import backend_named
from hf_sft.decoding.stepwise import padding_error
from hf_sft.generation import generate_wedlm
from hf_sft.models.inference import load_for_inference
from hf_sft.models.mask_token import record_mask_token
from hf_sft.models.wrappers import base_model

ROWS, MASK, EOS, COUNT = 20, 19, 3, 14
TOKENIZER = tiny.tiny_tokenizer()
PROMPTS = random_prompts(6, ROWS, longest=15)


def model_of(family: str = "llama", mask: int | None = None, **overrides):
    """A random float64 model over 20 tokens, of which 3 ends a turn."""
    model = sharp_model(family, ROWS, tie_word_embeddings=False, **overrides)
    model.generation_config.eos_token_id = [EOS]
    if mask is not None:
        record_mask_token(model, mask)
    return model


def with_adapter(model):
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.5)
    torch.manual_seed(1)
    return get_peft_model(model, config).double()


def tokens_of(answers: list[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


def streamed(answerer: Answerer, prompt: list[int]) -> list[int]:
    return [token for new in answerer.stream(prompt) for token in new]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "mamba"])
def test_batches_single_prompts_and_no_cache_agree(family) -> None:
    model = model_of(family)
    want = [greedy(model, prompt, None, EOS, COUNT) for prompt in PROMPTS]
    assert len({len(row) for row in want}) > 1, "rows end at different times"
    answerer = Answerer(model, TOKENIZER, max_new_tokens=COUNT)
    answers = answerer(PROMPTS)
    assert tokens_of(answers) == want and not answerer.is_parallel
    assert tokens_of([answerer([prompt])[0] for prompt in PROMPTS]) == want
    assert [streamed(answerer, prompt) for prompt in PROMPTS] == want
    assert [answer.stopped for answer in answers] == [row[-1] == EOS for row in want]
    assert [answer.forwards for answer in answers] == [answer.processed for answer in answers] == list(map(len, want))


def test_stories260k(shared_data) -> None:
    model, tokenizer = load_for_inference(str(shared_data / "models" / "stories260k"))
    model.double()
    texts = ("Once upon a time", "Lily and Tim went to", "The dog", "One day a little boy named Ben saw a big red")
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    answerer = Answerer(model, tokenizer, max_new_tokens=24)
    want = [greedy(model, prompt, None, None, 24) for prompt in prompts]
    assert tokens_of(answerer(prompts)) == want == [streamed(answerer, prompt) for prompt in prompts]
    assert answerer.text(answerer(prompts[:1])[0]).startswith(", there was a little girl named")


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_parallel_answers_agree_with_those_of_one_prompt(family) -> None:
    model = model_of(family, MASK)
    for options in ({}, {"window": 5, "entropy_threshold": 1.5}, {"verify": True, "entropy_threshold": 2.0}):
        answerer = Answerer(model, TOKENIZER, max_new_tokens=COUNT, parallel=options)
        want = [generate_wedlm(model, prompt, max_new_tokens=COUNT, use_cache=False, **options) for prompt in PROMPTS]
        answers = answerer(PROMPTS)
        assert tokens_of(answers) == [output.sequences[0] for output in want] and answerer.is_parallel
        assert [answer.forwards for answer in answers] == [output.forwards[0] for output in want]
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert streamed(answerer, prompt) == answer.tokens
            assert answerer.streamed == answer
    alone = Answerer(model, TOKENIZER, max_new_tokens=COUNT, autoregressive=True)(PROMPTS)
    assert tokens_of(alone) == tokens_of(answers) == [greedy(model, prompt, MASK, EOS, COUNT) for prompt in PROMPTS]


def test_the_mask_token_is_never_written() -> None:
    model = model_of(mask=MASK)
    with torch.no_grad():
        model.lm_head.weight[MASK] = 3 * model.lm_head.weight[2]
    assert any(MASK in greedy(model, prompt, None, EOS, COUNT) for prompt in PROMPTS)
    want = [greedy(model, prompt, MASK, EOS, COUNT) for prompt in PROMPTS]
    for options in ({"autoregressive": True}, {"parallel": {"verify": True}}):
        assert tokens_of(Answerer(model, TOKENIZER, max_new_tokens=COUNT, **options)(PROMPTS)) == want


def test_every_family_pads_exactly_or_is_found_out(caplog) -> None:
    exact = ("llama", "qwen3", "mistral", "gemma2", "gpt2", "bloom", "falcon_alibi", "qwen3_moe", "mamba", "mamba2")
    assert {family: padding_error(tiny.tiny_model(family)) < 1e-5 for family in exact} == dict.fromkeys(exact, True)
    model = model_of()
    attend = model.model.forward

    def unmasked(input_ids, attention_mask, **inputs):  # as a model that knows nothing of padding
        return attend(input_ids, attention_mask=torch.ones_like(attention_mask), **inputs)

    want = [greedy(model, prompt, None, EOS, COUNT) for prompt in PROMPTS]
    model.model.forward = unmasked
    assert padding_error(model) > 1e-2
    answerer = Answerer(model, TOKENIZER, max_new_tokens=COUNT)
    assert tokens_of(answerer([*PROMPTS, PROMPTS[0]])) == [*want, want[0]]
    assert tokens_of(answerer(PROMPTS)) == want
    assert caplog.text.count("only prompts of the same length are answered together") == 1


def test_no_cache_at_all() -> None:
    model = model_of()
    forward = model.forward

    def without(input_ids, attention_mask, position_ids):
        return forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)

    want = [greedy(model, prompt, None, EOS, COUNT) for prompt in PROMPTS]
    model.forward = without
    assert tokens_of(Answerer(model, TOKENIZER, max_new_tokens=COUNT)(PROMPTS)) == want


def random_states() -> tuple:
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


@pytest.mark.parametrize("mask", [None, MASK], ids=["causal", "wedlm"])
@pytest.mark.parametrize("state", ["bare", "adapter", "segment", "dense", "checkpointing"])
def test_models_as_training_leaves_them(state, mask) -> None:
    model = model_of("gemma2", mask, attention_dropout=0.5) if state != "dense" else model_of("qwen3", mask)
    if state == "adapter":
        model = with_adapter(model)
    options = dict(max_new_tokens=COUNT, parallel={"entropy_threshold": 1.0} if mask else None)
    want = tokens_of(Answerer(model, TOKENIZER, **options)(PROMPTS))
    base = base_model(model)
    if state in ("segment", "dense"):
        backend_named(state).install(base)
    if state == "checkpointing":
        tiny.checkpoint_activations(model)
    base.config.use_cache = False
    model.train()
    base.model.layers[0].eval()  # a part in a mode of its own
    base.generation_config.do_sample = True  # what the options say counts
    before = copy.deepcopy(vars(base.generation_config)), copy.deepcopy(vars(base.config))
    config, modes = base.generation_config, [part.training for part in model.modules()]
    draws, graphs = random_states(), []
    base.get_output_embeddings().register_forward_pre_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    answerer = Answerer(model, TOKENIZER, **options)
    assert tokens_of(answerer(PROMPTS)) == want
    stream = answerer.stream(PROMPTS[0])
    first = next(stream)
    assert torch.is_grad_enabled() and model.training, "between two tokens too"
    assert first + [token for new in stream for token in new] == want[0]
    assert random_states() == draws and not any(graphs)
    assert base.generation_config is config and (vars(base.generation_config), vars(base.config)) == before
    assert [part.training for part in model.modules()] == modes
    model(torch.tensor(PROMPTS[:1])).logits.sum().backward()


class Meeting:
    """``together`` of processes that are threads, and their forwards between two meetings."""

    def __init__(self, models) -> None:
        self.barrier = threading.Barrier(len(models), timeout=30)
        self.working, self.forwards = [False] * len(models), [0] * len(models)
        self.uneven: list[list[int]] = []
        for number, model in enumerate(models):
            model.get_output_embeddings().register_forward_pre_hook(lambda *_, number=number: self.count(number))

    def count(self, number: int) -> None:
        self.forwards[number] += 1

    def of(self, number: int):
        def together(work: bool) -> bool:
            self.working[number] = work
            self.barrier.wait()
            found = any(self.working)
            if len(set(self.forwards)) > 1:
                self.uneven.append(list(self.forwards))
            self.barrier.wait()
            return found

        return together


@pytest.mark.parametrize("mask", [None, MASK], ids=["causal", "wedlm"])
def test_processes_make_the_same_number_of_forwards(mask) -> None:
    batches = [[PROMPTS[:3], PROMPTS[3:5], [], PROMPTS[5:]], [PROMPTS[4:], [], [], [[1, 2]]], [[], [], [], []]]
    models = [model_of("qwen3", mask) for _ in batches]
    alone = Answerer(models[0], TOKENIZER, max_new_tokens=COUNT)
    want = [[alone(batch) for batch in shares] for shares in batches]
    meeting, got = Meeting(models), [[] for _ in batches]

    def process(number: int) -> None:
        answerer = Answerer(models[number], TOKENIZER, max_new_tokens=COUNT, together=meeting.of(number))
        got[number] = [answerer(batch) for batch in batches[number]]

    threads = [threading.Thread(target=process, args=(number,), daemon=True) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert got == want and not meeting.uneven
    assert len(set(meeting.forwards)) == 1 and meeting.forwards[0] >= sum(
        max((answer.forwards for share in round for answer in share), default=0) for round in zip(*want, strict=True)
    )


@pytest.mark.parametrize("mask", [None, MASK], ids=["causal", "wedlm"])
def test_answers_end_where_the_positions_do(mask) -> None:
    for family in ("llama", "gpt2") if mask is None else ("llama",):
        model = model_of(family, mask, **{"n_positions" if family == "gpt2" else "max_position_embeddings": 18})
        model.generation_config.eos_token_id = None
        answerer = Answerer(model, TOKENIZER, max_new_tokens=COUNT)
        answers = answerer([[1] * length for length in (3, 10, 17)])
        assert [len(answer.tokens) for answer in answers] == [COUNT, 8, 1]
        assert not any(answer.stopped for answer in answers)
        with pytest.raises(ValueError, match=r"prompt 1 of the batch has 18 tokens, and the model .* 18 positions"):
            answerer([[1], [1] * 18])


@pytest.mark.parametrize("mask", [None, MASK], ids=["causal", "wedlm"])
def test_draws_depend_on_the_seed_and_the_batch(mask) -> None:
    model = model_of(mask=mask)

    def draw(**options) -> list[list[list[int]]]:
        answerer = Answerer(model, TOKENIZER, max_new_tokens=8, temperature=5.0, **options)
        return [tokens_of(answerer([PROMPTS[0], PROMPTS[0]])) for _ in range(3)]

    first = draw(seed=1)
    assert first == draw(seed=1) != draw(seed=2) and first[0] != first[1] and first[0][0] != first[0][1]
    late = Answerer(model, TOKENIZER, max_new_tokens=8, temperature=5.0, seed=1)
    late.batches = 2
    assert tokens_of(late([PROMPTS[0], PROMPTS[0]])) == first[2]
    assert all(token != MASK for batch in first for row in batch for token in row) or mask is None
    one = Answerer(model, TOKENIZER, max_new_tokens=8, temperature=0.5, top_k=1)(PROMPTS)
    assert tokens_of(one) == tokens_of(Answerer(model, TOKENIZER, max_new_tokens=8)(PROMPTS))


def test_texts() -> None:
    answerer = Answerer(model_of(), TOKENIZER)
    ids = TOKENIZER("Hi <|im_start|> you")["input_ids"]
    assert answerer.text(Answer([*ids, EOS], 1, 1, True)) == TOKENIZER.decode(ids, skip_special_tokens=True)
    assert answerer.text(Answer(ids, 1, 1, False)) == "Hi  you"


def test_wrong_input() -> None:
    model = model_of()
    for options, message in (
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(top_k=3), "temperature 0 draws nothing"),
        (dict(parallel={"window": 3}), "was not trained as WeDLM and is decoded token by token; leave out window"),
    ):
        with pytest.raises(ValueError, match=message):
            Answerer(model, TOKENIZER, **options)
    with pytest.raises(ValueError, match="window decodes in parallel, and autoregressive does not"):
        Answerer(model_of(mask=MASK), TOKENIZER, parallel={"window": 3}, autoregressive=True)
    answerer = Answerer(model, TOKENIZER, max_new_tokens=2)
    assert answerer([]) == []
    for prompts, message in (([[1], []], "prompt 1 has no tokens"), ([[ROWS]], "prompt 0 holds 20")):
        with pytest.raises(ValueError, match=message):
            answerer(prompts)
