"""Parallel decoding: against greedy decoding token by token, and against a plain implementation without cache or batch."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import BatchEncoding, TopKLogitsWarper, TopPLogitsWarper

from hf_sft.attention.backends import BACKENDS, layer_windows
from hf_sft.decoding.draws import filter_logits
from hf_sft.generation import WeDLMOutput, generate_wedlm
from hf_sft.models.mask_token import record_mask_token

FAMILIES = ["llama", "qwen2", "qwen3", "wedlm", "mistral", "gemma2", "gemma3_text", "gpt_neox"]
START, MASK, EOS = 40, 258, 256  # of the trained model


def sharp_model(family: str, vocabulary: int = 8, seed: int = 0, **overrides):
    """A random model in float64 with opinions. Over few tokens drafts are right, and turns end, by chance often enough."""
    fields = dict(vocab_size=vocabulary, pad_token_id=None, eos_token_id=None, **overrides)
    if family == "wedlm":
        from hf_sft.models.wedlm import WeDLMConfig, WeDLMForCausalLM

        torch.manual_seed(seed)
        model = WeDLMForCausalLM(WeDLMConfig(**{**tiny._COMMON, **fields}, head_dim=8))
    else:
        model = tiny.tiny_model(family, seed, **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(3 if "mlp" in name or "attn" in name else 12)
    return model.double().eval()


def random_prompts(count: int, vocabulary: int = 8, seed: int = 0, longest: int = 19) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocabulary - 1) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@torch.no_grad()
def greedy(model, prompt: list[int], mask: int | None, eos: int | None, count: int) -> list[int]:
    """Greedy decoding token by token, everything computed again for each token."""
    row = list(prompt)
    while len(row) < len(prompt) + count:
        logits = model(torch.tensor([row]), use_cache=False).logits[0, -1]
        if mask is not None:
            logits[mask] = -torch.inf
        row.append(int(logits.argmax()))
        if row[-1] == eos:
            break
    return row[len(prompt) :]


@torch.no_grad()
def plain_wedlm(model, prompt, mask, eos, count, window, threshold, penalty) -> WeDLMOutput:
    """Streaming parallel decoding of one row with lists: no cache, the mask written out by the rule, one slot after another."""
    new: dict[int, int] = {}
    order: dict[int, int] = {}
    passes = processed = committed = 0
    while True:
        stops = [place for place, token in new.items() if token == eos]
        end = min([count, *(place + 1 for place in stops)])
        front = next((place for place in range(end) if place not in new), end)
        if front == end:
            break
        inside = range(front, min(front + window, end))
        shown = [place for place in range(min(front + window, end)) if place in new]
        slots = [place for place in inside if place not in new]
        passes += 1
        processed += len(shown) - committed + len(slots)  # with a cache, what was committed is not repeated
        committed = front
        positions = [*range(len(prompt)), *(len(prompt) + place for place in shown + slots)]
        ids = [*prompt, *(new[place] for place in shown), *(mask for _ in slots)]
        logits = logits_of(model, ids, positions)[len(prompt) + len(shown) :]
        logits[:, mask] = -torch.inf
        scores = []
        for place, row in zip(slots, logits, strict=True):
            probability = torch.softmax(row, 0).tolist()
            entropy = -sum(p * math.log(p) for p in probability if p > 0)
            scores.append(entropy + penalty * (place - front))
        chosen = [n for n, score in enumerate(scores) if score < threshold] or [scores.index(min(scores))]
        for n in chosen:
            new[slots[n]], order[slots[n]] = int(logits[n].argmax()), passes
    return WeDLMOutput([[new[p] for p in range(end)]], [passes], [[order[p] for p in range(end)]], [processed])


def logits_of(model, ids: list[int], positions: list[int]) -> torch.Tensor:
    """One causal pass over tokens at the given logical positions."""
    kinds = {}
    for kind, window in layer_windows(model.config).items():
        rule = [[k <= q and (window is None or positions[q] - positions[k] < window) for k in range(len(ids))]
                for q in range(len(ids))]  # fmt: skip
        allowed = torch.tensor(rule)[None, None]
        eager = model.config._attn_implementation == "eager"  # which adds its mask
        kinds[kind] = torch.zeros(allowed.shape, dtype=model.dtype).masked_fill(~allowed, -1e300) if eager else allowed
    mask = kinds if len(kinds) > 1 else next(iter(kinds.values()))
    return model(
        torch.tensor([ids]), position_ids=torch.tensor([positions]), attention_mask=mask, use_cache=False
    ).logits[0]


# A language of words in a fixed order: each word begins with its name, and the end of turn follows the last one.
def words() -> list[list[int]]:
    rng = random.Random(0)
    return [[START + 1 + n, *(rng.randrange(12) for _ in range(rng.randint(2, 4)))] for n in range(6)]


@pytest.fixture(scope="module")
def trained():
    """A small model trained on the mask slots and the next tokens of the language; (model, prompts, answers)."""
    rng, steps = random.Random(0), 400
    torch.manual_seed(0)
    model = tiny.tiny_model("llama").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        loss = language_loss(model, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    record_mask_token(model, MASK)
    model.generation_config.eos_token_id = [EOS]
    texts = words()
    prompts = [[START, *texts[n]] for n in range(len(texts) - 1)]
    answers = [[token for word in texts[n + 1 :] for token in word] + [EOS] for n in range(len(texts) - 1)]
    return model.double().eval(), prompts, answers


def language_loss(model, rng: random.Random, batch: int = 16, window: int = 16) -> torch.Tensor:
    """[prefix; observed; masks] in one causal row: the masks predict their own tokens, the prefix its next ones."""
    texts = words()
    rows = [
        [START, *(token for word in texts[rng.randrange(len(texts)) :] for token in word), EOS] for _ in range(batch)
    ]
    length = max(map(len, rows))
    ids = torch.tensor([row + [EOS] * (length - len(row)) for row in rows])
    lengths = torch.tensor([[len(row)] for row in rows])
    start = torch.tensor([[rng.randint(1, len(row))] for row in rows])
    position = torch.arange(length).expand(batch, -1)
    beyond = position >= start + window
    masked = (position >= start) & ~beyond & (torch.rand(batch, length) < torch.rand(batch, 1))
    order = (masked + 2 * beyond).argsort(dim=1, stable=True)
    position, masked, tokens = position.gather(1, order), masked.gather(1, order), ids.gather(1, order)
    logits = model(
        torch.where(masked, MASK, tokens),
        position_ids=position,
        attention_mask=torch.ones(batch, 1, length, length, dtype=torch.bool).tril(),
        use_cache=False,
    ).logits
    clean = (position < start - 1) & (position < lengths - 1)
    following = ids.gather(1, (position + 1).clamp(max=length - 1))
    parts = [(logits[rows], target[rows]) for rows, target in ((masked, tokens), (clean, following)) if rows.any()]
    return sum(cross_entropy(*part) for part in parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_is_greedy_decoding(family: str) -> None:
    model = sharp_model(family)
    prompts = random_prompts(5)
    for eos, threshold, window, count in ((None, 2.0, 4, 13), (3, math.inf, 16, 40), (5, 0.7, 5, 24), (2, 1.2, 1, 9)):
        want = [greedy(model, prompt, 7, eos, count) for prompt in prompts]
        options = dict(
            mask_token_id=7, eos_token_id=eos, max_new_tokens=count, window=window, entropy_threshold=threshold
        )
        for use_cache in (True, False):
            output = generate_wedlm(model, prompts, verify=True, use_cache=use_cache, **options)
            assert output.sequences == want
        assert all(f <= len(row) for f, row in zip(output.forwards, want, strict=True))
        assert [generate_wedlm(model, p, verify=True, **options).sequences[0] for p in prompts] == want


@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_decoding_is_the_plain_implementation(family: str) -> None:
    model = sharp_model(family, seed=1)
    prompts = random_prompts(4, seed=1)
    for eos, threshold, window, count in ((None, 1.5, 4, 11), (3, math.inf, 16, 30), (5, 0.6, 6, 17), (2, 0.0, 3, 8)):
        plain = [plain_wedlm(model, prompt, 7, eos, count, window, threshold, 0.05) for prompt in prompts]
        options = dict(
            mask_token_id=7, eos_token_id=eos, max_new_tokens=count, window=window, entropy_threshold=threshold
        )
        for use_cache in (True, False):
            output = generate_wedlm(model, prompts, distance_penalty=0.05, use_cache=use_cache, **options)
            assert output.sequences == [row.sequences[0] for row in plain]
            assert output.order == [row.order[0] for row in plain]
            assert output.forwards == [row.forwards[0] for row in plain]
            if use_cache:
                assert output.processed == [row.processed[0] for row in plain]


@pytest.mark.parametrize("seed", range(12))
def test_many_random_settings(seed: int) -> None:
    rng = random.Random(seed)
    model = sharp_model(rng.choice(FAMILIES), vocabulary=rng.choice([4, 8, 30]), seed=seed)
    rows = model.config.vocab_size
    prompts = random_prompts(rng.randint(1, 7), rows, seed)
    mask, eos = rows - 1, rng.choice([None, 0, 1])
    count, window = rng.randint(1, 30), rng.randint(1, 20)
    threshold, penalty = rng.choice([0.0, 0.5, 1.0, 2.0, math.inf]), rng.choice([0.0, 0.02, 0.3])
    options = dict(mask_token_id=mask, eos_token_id=eos, max_new_tokens=count, window=window)
    options |= dict(entropy_threshold=threshold, distance_penalty=penalty)
    want = [greedy(model, prompt, mask, eos, count) for prompt in prompts]
    assert generate_wedlm(model, prompts, verify=True, **options).sequences == want
    plain = [plain_wedlm(model, prompt, mask, eos, count, window, threshold, penalty) for prompt in prompts]
    output = generate_wedlm(model, prompts, **options)
    assert (output.sequences, output.order) == ([p.sequences[0] for p in plain], [p.order[0] for p in plain])


def test_a_trained_model_decodes_in_parallel(trained) -> None:
    model, prompts, answers = trained
    assert [greedy(model, prompt, MASK, EOS, 40) for prompt in prompts] == answers
    output = generate_wedlm(model, prompts, max_new_tokens=40)
    assert output.sequences == answers
    assert output.tokens_per_forward > 2
    assert 0 < output.prefix_cacheability < 1
    assert any(order != sorted(order) for order in output.order)  # not from left to right alone


@pytest.mark.parametrize("threshold", [0.0, 0.4, math.inf])
@pytest.mark.parametrize("window", [1, 3, 16, 64])
def test_verify_on_a_trained_model(trained, window: int, threshold: float) -> None:
    model, prompts, _ = trained
    odd = [[START], [START + 3, 1, 1, START + 2], [5, START + 1, 6, 0]]  # prompts that it has never seen
    prompts = prompts + odd
    for count in (1, 2, 11, 40):
        want = [greedy(model, prompt, MASK, EOS, count) for prompt in prompts]
        options = dict(window=window, entropy_threshold=threshold, max_new_tokens=count)
        output = generate_wedlm(model, prompts, verify=True, **options)
        assert output.sequences == want
        assert output.tokens_per_forward >= 1
        if window == 16 and threshold and count == 40:
            assert output.tokens_per_forward > 2
        assert generate_wedlm(model, prompts, verify=True, use_cache=False, **options).sequences == want


def test_an_end_of_turn_that_is_drafted_inside_a_run(trained) -> None:
    model, prompts, answers = trained
    middle = answers[0][4]  # a token that the window reaches in one pass with what follows
    want = [greedy(model, prompt, MASK, middle, 40) for prompt in prompts]
    assert any(row[-1] == middle and len(row) < len(answers[n]) for n, row in enumerate(want))
    for options in (dict(verify=True), dict(verify=True, entropy_threshold=9.0), dict()):
        output = generate_wedlm(model, prompts, eos_token_id=middle, max_new_tokens=40, **options)
        assert output.sequences == want
    assert max(output.forwards) < max(map(len, want))


def test_max_new_tokens_cuts_the_window(trained) -> None:
    model, prompts, answers = trained
    for count in (1, 2, 7):
        verified = generate_wedlm(model, prompts, max_new_tokens=count, window=50, verify=True)
        assert verified.sequences == [answer[:count] for answer in answers]
        output = generate_wedlm(model, prompts, max_new_tokens=count, window=50)
        plain = [plain_wedlm(model, prompt, MASK, EOS, count, 50, 0.4, 0.02) for prompt in prompts]
        assert output.sequences == [row.sequences[0] for row in plain]
        assert output.processed == [row.processed[0] for row in plain]
        assert max(map(len, output.sequences)) == count


def test_the_mask_token_is_never_written() -> None:
    model = sharp_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[7] = 3 * model.lm_head.weight[2]
    prompts = random_prompts(5)
    with_mask = [greedy(model, prompt, 0, None, 20) for prompt in prompts]  # excludes another token
    assert any(7 in row for row in with_mask)
    for verify in (False, True):
        output = generate_wedlm(
            model, prompts, mask_token_id=7, max_new_tokens=20, verify=verify, temperature=0.0, entropy_threshold=1.0
        )
        assert all(7 not in row for row in output.sequences)
    assert output.sequences == [greedy(model, prompt, 7, None, 20) for prompt in prompts]
    drawn = generate_wedlm(model, prompts, mask_token_id=7, max_new_tokens=20, temperature=3.0, seed=0)
    assert all(7 not in row for row in drawn.sequences)


def test_a_prompt_may_hold_the_mask_id(trained) -> None:
    model, prompts, _ = trained
    prompt = [MASK, *prompts[0], MASK, MASK]
    for options in (dict(), dict(verify=True)):
        output = generate_wedlm(model, prompt, max_new_tokens=20, **options)
        if options:
            assert output.sequences == [greedy(model, prompt, MASK, EOS, 20)]
        else:
            assert output == plain_wedlm(model, prompt, MASK, EOS, 20, 16, 0.4, 0.02)


def test_window_of_one_is_token_by_token() -> None:
    model = sharp_model("qwen3")
    prompts = random_prompts(3)
    output = generate_wedlm(model, prompts, mask_token_id=7, max_new_tokens=10, window=1)
    assert output.forwards == [10] * 3 and output.order == [list(range(1, 11))] * 3
    assert output.processed == [1 + 9 * 2] * 3  # each pass a slot, each but the first the token before it
    assert output.tokens_per_forward == 1 and output.prefix_cacheability == 10 / 19


def test_drawing_from_one_token_is_greedy(trained) -> None:
    model, prompts, _ = trained
    want = generate_wedlm(model, prompts, max_new_tokens=30)
    assert generate_wedlm(model, prompts, max_new_tokens=30, temperature=0.7, top_k=1, seed=1) == want
    assert generate_wedlm(model, prompts, max_new_tokens=30, temperature=0.7, top_p=1e-6, seed=1) == want


def test_seeds_repeat_the_draws() -> None:
    model = sharp_model("llama", vocabulary=30)
    prompts = random_prompts(3, 30)

    def draw(**options) -> list[list[int]]:
        return generate_wedlm(model, prompts, mask_token_id=29, max_new_tokens=20, temperature=5.0, **options).sequences

    assert (
        draw(seed=1)
        == draw(seed=1)
        == draw(generator=torch.Generator().manual_seed(1))
        == draw(seed=1, use_cache=False)
    )
    assert draw(seed=1) != draw(seed=2)
    assert draw(seed=1) != draw(seed=1, top_k=2)


def test_filters_are_those_of_transformers() -> None:
    logits = torch.randn(50, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    for top_k, top_p in ((0, 1.0), (5, 1.0), (0, 0.3), (0, 0.95), (7, 0.8), (100, 0.5)):
        want = logits
        if top_k:
            want = TopKLogitsWarper(top_k)(None, want)
        if top_p < 1:
            want = TopPLogitsWarper(top_p)(None, want)
        assert torch.equal(filter_logits(logits, top_k, top_p), want)


def test_draws_follow_the_distribution() -> None:
    model = sharp_model("llama")
    prompt = [1, 2, 3]
    logits = logits_of(model, [*prompt, 7], [0, 1, 2, 3])[-1] / 4.0
    logits[7] = -torch.inf
    output = generate_wedlm(model, [prompt] * 4000, mask_token_id=7, max_new_tokens=1, temperature=4.0, seed=0)
    counts = torch.bincount(torch.tensor(output.sequences)[:, 0], minlength=8) / 4000
    torch.testing.assert_close(counts.double(), torch.softmax(logits, 0), rtol=0, atol=0.03)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_every_attention_gives_the_same_tokens(family: str) -> None:
    model = sharp_model(family)
    prompts = random_prompts(4)
    options = dict(mask_token_id=7, eos_token_id=2, max_new_tokens=20, entropy_threshold=1.0)
    outputs = []
    for prepare in (
        lambda: None,
        lambda: model.set_attn_implementation("eager"),
        lambda: BACKENDS["segment"].install(model),
    ):
        prepare()
        outputs.append([generate_wedlm(model, prompts, verify=verify, **options) for verify in (False, True)])
    assert outputs[0] == outputs[1] == outputs[2]


def test_an_adapter_decodes_like_its_merged_model() -> None:
    prompts = random_prompts(3)
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(sharp_model("qwen2"), config).double()
    options = dict(mask_token_id=7, eos_token_id=2, max_new_tokens=20, entropy_threshold=1.0)
    outputs = [generate_wedlm(model, prompts, verify=verify, **options) for verify in (False, True)]
    merged = model.merge_and_unload()
    assert outputs == [generate_wedlm(merged, prompts, verify=verify, **options) for verify in (False, True)]
    assert outputs[1].sequences == [greedy(merged, prompt, 7, 2, 20) for prompt in prompts]


def test_mode_and_gradients_are_left_alone() -> None:
    model = sharp_model("llama", attention_dropout=0.5).train()
    prompts = random_prompts(2)
    first = generate_wedlm(model, prompts, mask_token_id=7, max_new_tokens=9)
    assert model.training
    assert generate_wedlm(model.eval(), prompts, mask_token_id=7, max_new_tokens=9) == first
    assert not model.training
    model(torch.tensor(prompts[:1])).logits.sum().backward()  # nothing of the decoding is left in its buffers


def test_forms_of_prompts() -> None:
    model = sharp_model("llama")
    options = dict(mask_token_id=7, max_new_tokens=5)
    want = generate_wedlm(model, [[1, 2, 3], [3, 2, 1]], **options)
    assert generate_wedlm(model, torch.tensor([[1, 2, 3], [3, 2, 1]]), **options) == want
    assert generate_wedlm(model, [torch.tensor([1, 2, 3]), (3, 2, 1)], **options) == want
    both = [[1, 2, 3], [3, 2, 1]]
    ones = np.ones((2, 3), dtype=int)
    for several in (
        np.array(both),
        [np.array(row, dtype=np.uint8) for row in both],
        [[torch.tensor(1), 2, np.int32(3)], both[1]],
        {"input_ids": both},
        BatchEncoding({"input_ids": torch.tensor(both), "attention_mask": torch.tensor(ones)}),
        BatchEncoding({"input_ids": np.array(both), "attention_mask": ones}),
        [BatchEncoding({"input_ids": row, "attention_mask": [1, 1, 1]}) for row in both],
    ):
        assert generate_wedlm(model, several, **options) == want
    for single in (
        [1, 2, 3],
        (1, 2, 3),
        torch.tensor([1, 2, 3]),
        [[1, 2, 3]],
        range(1, 4),
        np.array([1, 2, 3]),
        [np.int64(1), 2, 3],
        {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]},
    ):
        assert generate_wedlm(model, single, **options).sequences == want.sequences[:1]
    ragged = BatchEncoding({"input_ids": [[1, 2, 3], [3]], "attention_mask": [[1, 1, 1], [1]]})
    assert generate_wedlm(model, ragged, **options) == generate_wedlm(model, [[1, 2, 3], [3]], **options)


def test_what_a_chat_template_returns_is_a_prompt() -> None:
    tokenizer, model = tiny.tiny_tokenizer(), tiny.tiny_model("llama")
    turns = [[{"role": "user", "content": text}] for text in ("Hi", "Good day")]
    texts = [tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    want = generate_wedlm(model, rows, mask_token_id=200, max_new_tokens=4)
    for given, rows_of in ((turns, want.sequences), (turns[:1], want.sequences[:1]), (turns[1], want.sequences[1:])):
        encoded = tokenizer.apply_chat_template(given, add_generation_prompt=True, return_dict=True)
        assert generate_wedlm(model, encoded, mask_token_id=200, max_new_tokens=4).sequences == rows_of
    padded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, padding=True, return_dict=True)
    with pytest.raises(ValueError, match="holds zeros, and prompts are given without padding"):
        generate_wedlm(model, padded, mask_token_id=200)


def test_numbers_of_numpy_count_as_numbers() -> None:
    model, prompts = sharp_model("llama"), random_prompts(3)
    plain = dict(max_new_tokens=20, window=4, entropy_threshold=1.0, temperature=0.5, top_k=3, seed=1)
    want = generate_wedlm(model, prompts, mask_token_id=7, eos_token_id=6, **plain)
    typed = {name: np.asarray(value)[()] for name, value in plain.items()}
    for eos in (np.int64(6), [6, None], (np.int64(6),), {6}, torch.tensor(6), np.array([6])):
        assert generate_wedlm(model, prompts, mask_token_id=np.int64(7), eos_token_id=eos, **typed) == want
    assert want.sequences != generate_wedlm(model, prompts, mask_token_id=7, eos_token_id=[None], **plain).sequences


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_the_head_runs_on_no_more_rows_than_are_needed(verify: bool, use_cache: bool) -> None:
    model, heads = sharp_model("llama"), []
    rng = random.Random(0)
    prompts = [[rng.randrange(7) for _ in range(length)] for length in (4, 400)]
    model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: heads.append(inputs[0].shape[1]))
    options = dict(mask_token_id=7, max_new_tokens=24, window=6, entropy_threshold=1.0, verify=verify)
    output = generate_wedlm(model, prompts, use_cache=use_cache, **options)
    assert len(heads) == max(output.forwards)
    assert heads[0] == 2 * (6 + verify)
    # Drafts that wait to be checked join the window; none are further from the sure tokens than another window.
    assert max(heads) <= 2 * (2 * 6 + verify)
    if verify:
        assert output.sequences == [greedy(model, prompt, 7, None, 24) for prompt in prompts]
    else:
        plain = [plain_wedlm(model, prompt, 7, None, 24, 6, 1.0, 0.02) for prompt in prompts]
        assert (output.sequences, output.order) == ([p.sequences[0] for p in plain], [p.order[0] for p in plain])

    forward = model.forward

    def without(input_ids, position_ids, attention_mask, past_key_values, use_cache):
        return forward(
            input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )

    model.forward = without  # as that of a model that knows no logits_to_keep
    heads.clear()
    assert generate_wedlm(model, prompts, use_cache=use_cache, **options) == output
    assert heads[0] == 406
    model.forward = forward
    model.hf_device_map = {"model": "cpu", "lm_head": 0}  # read, not obeyed: nothing is moved
    heads.clear()
    assert generate_wedlm(model, prompts, use_cache=use_cache, **options) == output
    assert heads[0] == 402 + verify


def test_what_the_model_was_saved_with_counts(trained, tmp_path) -> None:
    model, prompts, answers = trained
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert generate_wedlm(again, prompts, max_new_tokens=40).sequences == answers
    without = generate_wedlm(again, prompts[0], max_new_tokens=40, eos_token_id=255)
    assert len(without.sequences[0]) == 40


def test_bfloat16_runs(trained) -> None:
    _, prompts, _ = trained
    model = tiny.tiny_model("llama").bfloat16()
    options = dict(mask_token_id=MASK, max_new_tokens=9, verify=True)
    free = generate_wedlm(model, prompts, eos_token_id=[], **options)
    assert [len(row) for row in free.sequences] == [9] * len(prompts)
    assert all(MASK not in row for row in free.sequences)
    # The first pass is the same whatever ends a turn.
    first = free.sequences[0][0]
    stopped = generate_wedlm(model, prompts, eos_token_id=first, **options)
    assert stopped.sequences[0] == [first]
    assert all(first not in row[:-1] and (len(row) == 9 or row[-1] == first) for row in stopped.sequences)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(window=0), "window is 0; it must be a whole number of at least 1"),
        (dict(window=2.5), "window is 2.5"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(entropy_threshold=-0.1), "entropy_threshold is -0.1"),
        (dict(entropy_threshold=math.nan), "entropy_threshold is nan"),
        (dict(distance_penalty=-1.0), "distance_penalty is -1.0"),
        (dict(distance_penalty=math.inf), "distance_penalty is inf"),
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(temperature=1.0, top_p=0.0), "top_p is 0.0"),
        (dict(temperature=1.0, top_p=1.5), "top_p is 1.5"),
        (dict(temperature=1.0, top_k=-1), "top_k is -1"),
        (dict(top_k=3), "temperature 0 draws nothing"),
        (dict(top_p=0.9), "temperature 0 draws nothing"),
        (dict(verify=True, temperature=0.5), "set temperature to 0, or leave out verify"),
        (dict(entropy_threshold="1"), "entropy_threshold is '1'; it must be a number of at least 0 nats"),
        (dict(entropy_threshold=True), "entropy_threshold is True"),
        (dict(entropy_threshold=None), "entropy_threshold is None"),
        (dict(distance_penalty="0.1"), "distance_penalty is '0.1'; it must be a number of at least 0 nats"),
        (dict(temperature="1"), "temperature is '1'; it must be 0"),
        (dict(temperature=1e-320), "temperature is 1e-320; it must be 0 .* or a finite number of at least 0.001"),
        (dict(temperature=0.0009), "temperature is 0.0009"),
        (dict(temperature=math.inf), "temperature is inf"),
        (dict(temperature=math.nan), "temperature is nan"),
        (dict(temperature=1.0, top_p="0.9"), "top_p is '0.9'; it must be a number above 0"),
        (dict(temperature=1.0, top_k="3"), "top_k is '3'"),
        (dict(temperature=1.0, seed="3"), "seed is '3'; it must be a whole number from 0 to 4294967295"),
        (dict(temperature=1.0, seed=-1), "seed is -1"),
        (dict(seed=0), "seed sets the draws, and temperature 0 draws nothing; set temperature, or leave it out"),
        (dict(generator=torch.Generator()), "generator sets the draws, and temperature 0 draws nothing"),
        (dict(eos_token_id="2"), "eos_token_id holds '2'; it must be a token id"),
        (dict(eos_token_id=[1, "2"]), "eos_token_id holds '2'"),
        (dict(eos_token_id=True), "eos_token_id holds True"),
        (dict(eos_token_id=2.0), "eos_token_id holds 2.0"),
        (
            dict(mask_token_id="7"),
            "mask_token_id is '7'; it must be the whole number of one of the model's 8 vocabulary",
        ),
        (dict(mask_token_id=True), "mask_token_id is True"),
        (dict(mask_token_id=-1), "mask_token_id is -1"),
        (dict(seed=1, generator=torch.Generator()), "give one of them"),
        (dict(mask_token_id=None), "names no mask token, so it was not trained as WeDLM"),
        (dict(mask_token_id=8), "mask_token_id is 8.* one of the model's 8 vocabulary rows"),
        (dict(mask_token_id=2, eos_token_id=[1, 2]), "both the mask token and an end of turn"),
        (dict(prompts=[]), "prompts is empty"),
        (dict(prompts=[[1], []]), "prompt 1 has no tokens"),
        (dict(prompts=[[1, 8]]), "prompt 0 holds 8"),
        (dict(prompts=[[1, -1]]), "prompt 0 holds -1"),
        (dict(prompts=[[1.5]]), "prompt 0 holds 1.5"),
        (dict(prompts="some text"), "give token ids"),
        (dict(prompts=["some text"]), "prompt 0 holds 'some text'"),
        (dict(prompts=[[1], 2]), "prompt 1 is 2, and the first one is a list"),
        (dict(prompts=[1, [2]]), r"prompt 0 holds \[2\]"),
        (dict(prompts=5), "prompts is 5; it must be a list of token ids"),
        (dict(prompts=None), "prompts is None"),
        (dict(prompts=torch.tensor(5)), "prompts is 5"),
        (dict(prompts=np.array([1.0, 2.0])), "prompt 0 holds 1.0"),
        (dict(prompts=[[1, True]]), "prompt 0 holds True"),
        (dict(prompts=torch.ones(1, 1, 1, dtype=torch.long)), r"prompt 0 holds \[1\]"),
        (dict(prompts={"ids": [1]}), "a prompt has ids; its token ids belong under input_ids"),
        (dict(prompts={}), "a prompt has no keys"),
        (dict(prompts={"input_ids": [[1, 2], [0, 3]], "attention_mask": [[1, 1], [0, 1]]}), "without padding"),
        (dict(prompts={"input_ids": np.ones((1, 2), int), "attention_mask": np.array([[0, 1]])}), "without padding"),
        (dict(prompts=[{"input_ids": [0, 3], "attention_mask": torch.tensor([0, 1])}]), "without padding"),
    ],
)
def test_wrong_input(changes: dict, message: str) -> None:
    arguments = {"prompts": [[1, 2]], "mask_token_id": 7, **changes}
    with pytest.raises(ValueError, match=message):
        generate_wedlm(sharp_model("llama"), arguments.pop("prompts"), **arguments)


def test_models_that_cannot() -> None:
    with pytest.raises(ValueError, match="a mamba model keeps a state"):
        generate_wedlm(tiny.tiny_model("mamba"), [1], mask_token_id=7)
    model = sharp_model("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="load it with attn_implementation='sdpa'"):
        generate_wedlm(model, [1], mask_token_id=7)


def test_more_positions_than_the_model_was_made_for_are_said(caplog) -> None:
    generate_wedlm(sharp_model("llama", max_position_embeddings=8), [1, 2, 3], mask_token_id=7, max_new_tokens=6)
    assert "have 9 positions, and the model was made for 8" in caplog.text
