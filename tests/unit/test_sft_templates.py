"""Conversations as tokens and masks: what is trained, and what no special token in a prompt can change."""

import numpy as np
import pytest
from megalith.rlhf.batches import fit
from megalith.rlhf.data import Conversation
from megalith.rlhf.errors import InputError
from megalith.rlhf.templates import Segment, encode, encode_prompt, prompt_renderer, segments_of
from megalith.rlhf.tokenizer import byte_tokenizer
from tokenizers.processors import TemplateProcessing

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As reasoning models do: only the last answer shows its (empty) reasoning.
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "A:{{ '<think>' if loop.last else '' }}{{ m['content'] }}{{ eos_token }}"
    "{% else %}U:{{ m['content'] }}|{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


def tokenizer_with(template=None, eos=None, bos=False, specials=("<|im_start|>", "<|im_end|>")):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    if eos:
        tokenizer.eos_token = eos
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = template
    return tokenizer


def conversation(*turns, **extra):
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return Conversation(
        tuple({"role": roles[role], "content": text, **extra} for role, text in turns), "data.jsonl, line 7"
    )


def samples_of(tokenizer, *conversations, prompt_format="auto"):
    render = prompt_renderer(tokenizer, prompt_format)
    return encode([s for c in conversations for s in segments_of(c, render, tokenizer.eos_token)], tokenizer)


def trained_text(tokenizer, sample):
    return tokenizer.decode(sample.ids[sample.trained])


def test_the_alpaca_prompt_is_used_where_there_is_no_chat_template():
    tokenizer = byte_tokenizer()
    with_input = Conversation(
        ({"role": "user", "content": "Add.", "input": "2 2"}, {"role": "assistant", "content": "4"}), "data, line 1"
    )
    (sample,) = samples_of(tokenizer, with_input)
    assert tokenizer.decode(sample.ids) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n4<|endoftext|>"
    )
    assert trained_text(tokenizer, sample) == "4<|endoftext|>"


def test_plain_format_takes_the_text_as_it_stands():
    tokenizer = tokenizer_with(CHATML)
    (sample,) = samples_of(tokenizer, conversation(("u", "2+2="), ("a", "4")), prompt_format="plain")
    assert tokenizer.decode(sample.ids) == "2+2=4<|endoftext|>"


@pytest.mark.parametrize("prompt_format", ["chat", "alpaca", "plain"])
def test_only_completions_are_trained_and_each_ends_with_eos(prompt_format):  # S2, S3
    tokenizer = tokenizer_with(CHATML, eos="<|im_end|>")
    (sample,) = samples_of(
        tokenizer,
        conversation(("s", "brief"), ("u", "one"), ("a", "1"), ("u", "two"), ("a", "2")),
        prompt_format=prompt_format,
    )
    assert trained_text(tokenizer, sample) == "1<|im_end|>2<|im_end|>"
    assert sample.ids[-1] == tokenizer.eos_token_id and sample.trained[-1]


def test_loss_tokens_are_those_of_the_response_and_eos():  # S2
    tokenizer = byte_tokenizer()
    (sample,) = samples_of(tokenizer, conversation(("u", "question"), ("a", "answer")))
    assert sample.loss_tokens == len("answer") + 1


def test_eos_is_learned_when_pad_is_eos():  # S3
    tokenizer = tokenizer_with(CHATML)
    tokenizer.pad_token = tokenizer.eos_token
    (sample,) = samples_of(tokenizer, conversation(("u", "a"), ("a", "b")))
    assert sample.ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert sample.trained[-1]


def test_a_template_whose_turns_end_with_another_token_still_ends_with_eos():  # S3
    tokenizer = tokenizer_with(CHATML)
    (sample,) = samples_of(tokenizer, conversation(("u", "a"), ("a", "b")))
    assert trained_text(tokenizer, sample) == "b<|im_end|>\n<|endoftext|>"


def test_special_tokens_inside_a_prompt_change_no_mask():  # S4
    tokenizer = tokenizer_with(CHATML, eos="<|im_end|>")
    plain, injected = samples_of(
        tokenizer,
        conversation(("u", "xxx"), ("a", "answer")),
        conversation(("u", "<|im_end|><|pad|><|endoftext|>"), ("a", "answer")),
    )
    assert (injected.ids == tokenizer.pad_token_id).sum() == 1
    assert plain.trained.tolist() == injected.trained.tolist()


@pytest.mark.parametrize("template", [None, CHATML, "{{ bos_token }}" + CHATML])
def test_exactly_one_bos_whether_the_template_writes_it_or_not(template):  # S5
    tokenizer = tokenizer_with(template, bos=True)
    (sample,) = samples_of(tokenizer, conversation(("u", "a"), ("a", "b")))
    assert (sample.ids == tokenizer.bos_token_id).sum() == 1
    assert sample.ids[0] == tokenizer.bos_token_id and not sample.trained[0]


def test_no_token_is_merged_across_the_border_of_prompt_and_completion():  # S6
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["xy"])
    assert len(tokenizer("xy", add_special_tokens=False).input_ids) == 1
    (sample,) = samples_of(tokenizer, conversation(("u", "x"), ("a", "y")), prompt_format="plain")
    assert sample.trained.tolist() == [False, True, True]


def test_a_cut_sample_has_no_eos_label_and_a_prompt_that_fills_it_is_dropped():  # S7
    tokenizer = byte_tokenizer()
    samples = samples_of(
        tokenizer,
        *[
            conversation(("u", "q" * prompt), ("a", "a" * answer))
            for prompt, answer in [(3, 4), (3, 9), (8, 1), (7, 3)]
        ],
        prompt_format="plain",
    )
    fitted = fit(samples, max_len=8)
    assert (fitted.truncated, fitted.dropped) == (2, 1)
    whole, cut, barely = fitted.samples
    assert whole.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in cut.ids and len(cut) == 8 and cut.loss_tokens == 5
    assert barely.loss_tokens == 1


def test_every_assistant_turn_is_trained_once_when_the_template_rewrites_history():
    tokenizer = tokenizer_with(FORGETFUL)
    samples = samples_of(tokenizer, conversation(("u", "one"), ("a", "1"), ("u", "two"), ("a", "2")))
    assert [tokenizer.decode(sample.ids) for sample in samples] == [
        "U:one|A:<think>1<|endoftext|>",
        "U:one|A:1<|endoftext|>U:two|A:<think>2<|endoftext|>",
    ]
    assert [trained_text(tokenizer, sample) for sample in samples] == ["<think>1<|endoftext|>", "<think>2<|endoftext|>"]


def test_messages_after_the_last_answer_are_left_out():
    tokenizer = tokenizer_with(CHATML, eos="<|im_end|>")
    (sample,) = samples_of(tokenizer, conversation(("u", "one"), ("a", "1"), ("u", "unanswered")))
    assert "unanswered" not in tokenizer.decode(sample.ids)


def test_what_the_model_is_asked_at_inference_is_the_prefix_it_was_trained_on():
    for template, bos in [(None, True), (CHATML, False)]:
        tokenizer = tokenizer_with(template, bos=bos)
        turns = conversation(("u", "one"), ("a", "1"))
        (sample,) = samples_of(tokenizer, turns)
        prompt = encode_prompt(turns.messages[:1], prompt_renderer(tokenizer, "auto"), tokenizer)
        assert prompt == sample.ids[~sample.trained].tolist() == sample.ids[: len(prompt)].tolist()


def test_templates_that_cannot_be_used_name_the_row():
    refusing = tokenizer_with("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"data\.jsonl, line 7: the prompt cannot be rendered: .*roles must alternate"):
        samples_of(refusing, conversation(("u", "a"), ("a", "b")))
    with pytest.raises(InputError, match="line 7: the chat template renders message 1 differently"):
        samples_of(tokenizer_with("{{ messages | length }}"), conversation(("u", "a"), ("a", "b")))
    with pytest.raises(InputError, match="line 7: .*no place for role 'tool'"):
        samples_of(byte_tokenizer(), conversation(("u", "a"), ("t", "c"), ("a", "b")))


def test_a_tokenizer_without_eos_or_without_the_asked_template_is_refused():
    tokenizer = byte_tokenizer()
    with pytest.raises(InputError, match="no chat template"):
        prompt_renderer(tokenizer, "chat")
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no eos token"):
        prompt_renderer(tokenizer, "auto")


def test_segments_become_lengths_and_nothing_else():
    tokenizer = byte_tokenizer()
    (sample,) = encode([[Segment("ab", False), Segment("", True, eos=True), Segment("c", False)]], tokenizer)
    assert np.array_equal(sample.trained, [False, False, True, False])


def test_the_byte_tokenizer_gives_back_every_string():
    text = "héllo 世界\n\t🙂"
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 258
    assert tokenizer.decode(tokenizer(text).input_ids) == text
